"""What notebooks and the command line use of a trained pair."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from nlae_jax.config import MeshConfig, ProtocolConfig, load_config
from nlae_jax.evaluate.reconstruction import direction_mse
from nlae_jax.interop.adapt import WARNING, Adapter, is_adapter, read_adapter
from nlae_jax.interop.released import Released, open_released, pair_sidecar, pair_tokenizer
from nlae_jax.interop.sidecar import Sidecar, protocol_of
from nlae_jax.lm.pretrained import check_same_tokenizer, stop_ids
from nlae_jax.lm.tokens import check_ids, text_ids
from nlae_jax.mesh import make_mesh
from nlae_jax.roles.decoder import Decoder
from nlae_jax.roles.encoder import Encoder
from nlae_jax.roles.language_model import LanguageModel
from nlae_jax.roles.pair import Pair, Roles
from nlae_jax.roles.protocol import Protocol, check_prompts, decoder_ids
from nlae_jax.roles.roundtrip import RoundTrip
from nlae_jax.run import resources
from nlae_jax.run.resources import PreparedRun
from nlae_jax.run.training import trained_pair
from nlae_jax.runtime.errors import UserError
from nlae_jax.runtime.files import workdir_path
from nlae_jax.runtime.outside import encodable
from nlae_jax.runtime.progress import progress, warn

_SMALLEST_BATCH, _LARGEST_BATCH = 8, 64  # rows: a token costs little more for 64 of them than for 8
MAX_TOKENS = 2048  # of one text: the subject reads it in one piece, and attention grows with its square


class NLA:
    """A trained encoder and decoder, and the subject they read. Make one with `from_workdir` or `from_pretrained`."""

    def __init__(
        self,
        roles: Roles,
        pair: Pair,
        tokenizer: Any,
        subject: Callable[[], LanguageModel],
        max_new_tokens: int = 200,
        mesh: Mesh | None = None,
        adapter: Adapter | None = None,
    ) -> None:
        """`mesh`: that the pair's parameters are on, to split batches over.

        `adapter`: maps the subject's activations into those of the model that the pair was trained for.
        """
        self.adapter = adapter
        self.layer, self.tokenizer, self.max_new_tokens = roles.decoder.layer, tokenizer, max_new_tokens
        self._roles, self._pair, self._make_subject, self._mesh = roles, pair, subject, mesh
        for role in (roles.encoder, roles.decoder):
            check_prompts(role.protocol, tokenizer, role.arch.vocab_size)

    @cached_property
    def subject(self) -> LanguageModel:
        """The model whose activations are explained, loaded when first asked for."""
        return self._make_subject()

    @cached_property
    def _trip(self) -> RoundTrip:
        """The pair's compiled functions, for explanations of any length."""
        return RoundTrip(self._roles, self.tokenizer, _LARGEST_BATCH, self.max_new_tokens, self._mesh, _SMALLEST_BATCH)

    @staticmethod
    def from_workdir(workdir: str | Path) -> NLA:
        """The pair that a run has trained so far: by RL up to its newest checkpoint, else by the warm start.

        Changes nothing in the workdir, and may be used while the run goes on. It computes on the run's mesh where
        this machine has the devices for it, on one device otherwise.
        """
        run = open_run(workdir)
        stops = stop_ids(run.directory, run.tokenizer)
        subject = lambda: LanguageModel(run.arch, run.base, run.tokenizer, run.mesh, stops)  # noqa: E731
        return NLA(run.roles, trained_pair(run), run.tokenizer, subject, run.config.rl.max_new_tokens, run.mesh)

    @staticmethod
    def from_pretrained(
        av: str | Path, ar: str | Path = "", subject: str = "", dtype: str = "float32", mesh: Mesh | None = None
    ) -> NLA:
        """A pair in the reference's layout: directories or hub ids of an encoder and its decoder.

        Without `ar`, `av` is both: the name of a shipped pair ("smollm2-135m") or a directory with `av` and `ar`.
        Either may hold adapters, which need the base model that they name (`lm.adapters`). `av` may also be what
        `nlae adapt` wrote, of a model that no pair was trained for.

        Prompts, slot and scale are those of the sidecars, which are checked against the tokenizer. `subject` is the
        model that `explain_text` reads; if not given, the one that the sidecar names. Weights are kept in `dtype`, on
        the default device or split over a `mesh`. Raises UserError, naming file and field, where something does not
        fit.
        """
        if not ar and is_adapter(Path(av).expanduser()):
            return _adapted(Path(av).expanduser(), subject, dtype, mesh)
        encoder, decoder = open_released(str(av), "av"), open_released(str(ar or av), "ar")
        sidecar, tokenizer = pair_sidecar(encoder, decoder), pair_tokenizer(encoder, decoder)
        protocol = protocol_of(sidecar, tokenizer, ProtocolConfig(), encoder.injection_scale)
        if encoder.adapters or decoder.adapters:
            return _with_adapters(encoder, decoder, protocol, tokenizer, dtype, mesh)
        layer = decoder.decoder_layer
        roles = Roles(Encoder(encoder.arch, protocol), Decoder(decoder.arch, layer, protocol), rank=0)
        trained = {"lm": decoder.weights(dtype, mesh), "value_head": decoder.value_head(mesh)}
        pair = Pair({}, {"lm": encoder.weights(dtype, mesh)}, trained)
        return NLA(roles, pair, tokenizer, lambda: _subject(subject, sidecar, layer, tokenizer, dtype, mesh), mesh=mesh)

    def explain(self, vectors: Any, temperature: float = 0.0, max_new_tokens: int = 150, seed: int = 0) -> list[str]:
        """[B, d] raw activations -> one explanation each; '' where the encoder did not close its tag.

        `vectors` is an array of numpy, JAX or PyTorch, of any dtype and on any device, or a list of such rows.
        """
        vectors = self._checked(vectors)
        if max_new_tokens <= (least := len(self._roles.encoder.protocol.closing)):
            raise UserError(f"max_new_tokens: {max_new_tokens} should be more than the {least} of the closing tag")
        with progress(len(vectors), "explain", unit="activation") as bar:
            return self._trip.explain(self._pair, vectors, seed, temperature, bar.advance, max_new_tokens).texts

    def reconstruct(self, texts: Sequence[str]) -> np.ndarray:
        """Explanations -> activations [B, d] float32, raw as the decoder's head gives them."""
        if isinstance(texts, str):
            raise UserError("texts: should be a list of explanations; it is one text")
        if not len(texts):
            return np.zeros((0, self._d_model), np.float32)
        for number, text in enumerate(texts):
            ids = decoder_ids(self.tokenizer, self._roles.decoder.protocol, text)
            check_ids(ids, self._roles.decoder.arch.vocab_size, self.tokenizer, f"text {number}")
        return self._trip.reconstruct_texts(self._pair, texts)

    def score(self, texts: Sequence[str], vectors: Any) -> tuple[np.ndarray, np.ndarray]:
        """(mse, cos), each [B]: how well each text rebuilds its vector's direction; mse = 2 (1 - cos)."""
        if not len(texts):
            return np.zeros(0), np.zeros(0)
        vectors = self._checked(vectors)
        if len(texts) != len(vectors):
            raise UserError(f"score: {len(texts)} texts for {len(vectors)} vectors; there should be one each")
        mse = direction_mse(self.reconstruct(texts), vectors, np.array([bool(text.strip()) for text in texts]))
        return mse, 1 - mse / 2

    def explain_text(self, text: str, temperature: float = 0.0) -> list[dict[str, Any]]:
        """Every token's explanation: dicts of position, token, explanation, cos, mse.

        Position 0 is an attention sink whose activation holds nothing of the text; read it with that in mind.
        """
        return self.explain_texts([text], temperature)[0]

    def explain_texts(self, texts: Sequence[str], temperature: float = 0.0) -> list[list[dict[str, Any]]]:
        """The same for several texts, whose tokens are explained together."""
        names = ["text"] if len(texts) == 1 else [f"text {number}" for number in range(len(texts))]
        read = [self._read(text, name) for text, name in zip(texts, names, strict=True)]
        vectors = np.concatenate([vectors for _, vectors in read])
        explanations = self.explain(vectors, temperature, self.max_new_tokens)
        mse, cos = self.score(explanations, vectors)
        rows = iter(zip(explanations, cos.tolist(), mse.tolist(), strict=True))
        fields = ("explanation", "cos", "mse")
        return [
            [
                {
                    "position": position,
                    "token": self.subject.tokenizer.decode([token]),
                    **dict(zip(fields, next(rows), strict=True)),
                }
                for position, token in enumerate(ids)
            ]
            for ids, _ in read
        ]

    def _read(self, text: str, where: str) -> tuple[list[int], np.ndarray]:
        """A text's token ids and their activations [T, d], as the pair knows them."""
        ids = text_ids(self.subject.tokenizer, encodable(text))
        check_ids(ids, self.subject.arch.vocab_size, self.subject.tokenizer, where)
        if len(ids) > MAX_TOKENS:
            raise UserError(
                f"{where}: {len(ids)} tokens; at most {MAX_TOKENS} are explained at once: cut it into parts"
            )
        width = -(-len(ids) // 64) * 64
        padded, mask = np.zeros((1, width), np.int32), np.arange(width)[None] < len(ids)
        padded[0, : len(ids)] = ids
        layer = self.layer if self.adapter is None else self.adapter.layer
        vectors = np.asarray(self.subject.residual(padded, layer, mask=mask))[0, : len(ids)]
        return ids, vectors if self.adapter is None else self.adapter(vectors)

    @property
    def _d_model(self) -> int:
        return self._roles.encoder.arch.d_model

    def _checked(self, vectors: Any) -> np.ndarray:
        vectors = _as_float32(vectors)
        if vectors.ndim != 2 or vectors.shape[1] != self._d_model:
            raise UserError(f"vectors: shape {vectors.shape} should be [number, {self._d_model}]")
        if not len(vectors):
            raise UserError("vectors: none given; there should be at least one")
        if not np.isfinite(vectors).all():
            raise UserError("vectors: NaN or infinity among them")
        return vectors


def _as_float32(vectors: Any) -> np.ndarray:
    """Any library's array, or a list of them, as float32. Raises UserError where it is not one of numbers."""
    if isinstance(vectors, list | tuple) and any(hasattr(row, "detach") for row in vectors):
        vectors = [_as_float32(row) for row in vectors]
    try:
        if hasattr(vectors, "detach"):  # PyTorch's: maybe on another device, part of a graph, of a dtype numpy lacks
            vectors = vectors.detach().cpu().to_dense()
            vectors = (vectors.float() if vectors.is_floating_point() else vectors).numpy()
        host = np.asarray(jax.device_get(vectors))
        if host.dtype.kind in "cOSUmMb":  # complex numbers would lose a part, without a word
            raise TypeError(f"it is {host.dtype}")
        with np.errstate(over="ignore"):
            return host.astype(np.float32, copy=False)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"vectors: should be an array of numbers ({error})") from None


def open_run(workdir: str | Path) -> PreparedRun:
    """The run of a workdir, for reading: on its own mesh where this machine has the devices, else on one device."""
    workdir = workdir_path(workdir)
    if not (workdir / "config.json").exists():
        raise UserError(f"--workdir {workdir}: no config.json there; it should be the workdir of a run")
    config = load_config(workdir / "config.json")
    try:
        make_mesh(config.mesh)
    except UserError:
        config = dataclasses.replace(config, mesh=MeshConfig())
    return resources.prepare(resources.open_run(config, workdir, read_only=True))


def _with_adapters(
    encoder: Released, decoder: Released, protocol: Protocol, tokenizer: Any, dtype: str, mesh: Mesh | None
) -> NLA:
    """Both roles' adapters on one frozen base, which is the subject too: in memory once."""
    adapters = [role.adapters for role in (encoder, decoder) if role.adapters is not None]
    if len(adapters) < 2 or len({(a.base_model, a.rank, a.alpha) for a in adapters}) > 1:
        raise UserError(
            f"{decoder.sidecar.path.parent}: should hold adapters on the base model, and of the rank and scale, of "
            f"those in {encoder.sidecar.path.parent}"
        )
    of_encoder, of_decoder = adapters
    arch, layer, scale = encoder.arch, decoder.decoder_layer, of_encoder.alpha / of_encoder.rank
    roles = Roles(Encoder(arch, protocol, scale), Decoder(arch, layer, protocol, scale), rank=of_encoder.rank)
    base = encoder.weights(dtype, mesh)
    trained = {
        "adapters": of_decoder.read(arch.truncated(layer + 1)),
        "value_head": decoder.value_head(mesh),
    }
    pair = Pair(base, {"adapters": of_encoder.read(arch)}, trained)
    stops = stop_ids(encoder.directory, tokenizer)
    subject = lambda: LanguageModel(arch, base, tokenizer, mesh, stops)  # noqa: E731
    return NLA(roles, pair, tokenizer, subject, mesh=mesh)


def _adapted(directory: Path, subject: str, dtype: str, mesh: Mesh | None) -> NLA:
    """A pair behind a map from another model's activations."""
    adapter = read_adapter(directory)
    nla = NLA.from_pretrained(adapter.to, dtype=dtype, mesh=mesh)
    if nla._d_model != adapter.matrix.shape[1]:
        raise UserError(f"{directory}: maps to width {adapter.matrix.shape[1]}; {adapter.to} reads {nla._d_model}")
    warn(WARNING)
    make = lambda: LanguageModel.from_pretrained(subject or adapter.model, dtype, mesh)  # noqa: E731
    return NLA(nla._roles, nla._pair, nla.tokenizer, make, mesh=mesh, adapter=adapter)


def _subject(name: str, sidecar: Sidecar, layer: int, tokenizer: Any, dtype: str, mesh: Mesh | None) -> LanguageModel:
    """The model whose activations a released pair was made for."""
    if not (name := name or sidecar.base_model or ""):
        raise UserError(f"{sidecar.path}: names no base_model; say which model is the subject")
    model = LanguageModel.from_pretrained(name, dtype, mesh)
    if model.arch.d_model != sidecar.d_model or model.arch.num_layers <= layer:
        raise UserError(
            f"subject {name}: {model.arch.num_layers} blocks of width {model.arch.d_model}; the "
            f"pair reads block {layer} of width {sidecar.d_model}"
        )
    check_same_tokenizer(tokenizer, model.tokenizer, f"subject {name}")
    return model
