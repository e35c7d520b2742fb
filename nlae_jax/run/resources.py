"""The resources that the stages of a run share. They are made once, by the functions here, and no stage changes them.

`open_run` checks a config and opens a workdir for it. `prepare` fixes the protocol. Both return plain frozen
dataclasses. Two resources are large and many commands do without them, so they are read at their first use: the models'
weights (`Weights`; 0.5 GB and 1.7 s for SmolLM2-135M, 140 GB for a 70B) and the table of the activations' documents and
rows (`Run.store`; 0.2 GB and 1.1 s for 100,000 documents).
"""

from __future__ import annotations

import dataclasses
import enum
import json
from collections.abc import Callable
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from nlae_jax.config import Config
from nlae_jax.data.activations import IMPORT_ANEW, ActivationStore
from nlae_jax.data.describe import check_provider
from nlae_jax.data.model_server import SERVERS
from nlae_jax.interop.datasets import check_datasets, check_same_prompt, dataset_files, dataset_sidecar
from nlae_jax.interop.released import Released, open_released, pair_sidecar
from nlae_jax.interop.sidecar import Sidecar, combined, protocol_of
from nlae_jax.lm.arch import Arch, model_weights
from nlae_jax.lm.families import read_arch
from nlae_jax.lm.pretrained import check_same_tokenizer, fingerprint, load_tokenizer, resolve_model
from nlae_jax.lm.weights import load_params
from nlae_jax.mesh import check_batches, make_mesh, place, replicated, tree_shardings
from nlae_jax.roles.pair import Params, Roles, check_experts, make_roles
from nlae_jax.roles.protocol import Protocol, check_prompts, kept_protocol, make_protocol
from nlae_jax.run.workdir import ANY_CHECKPOINT, check_record, check_trained_with, located, recorded, require, take
from nlae_jax.runtime import processes, world
from nlae_jax.runtime.errors import UserError
from nlae_jax.runtime.files import AnyPath, read_json, read_parquet, write_text
from nlae_jax.train.trackers import check_tracker


class Purpose(enum.IntEnum):
    """The purposes that random numbers are drawn for. Each has its own seed."""

    ENCODER_SFT = 2
    DECODER_SFT = 3
    RL = 4
    EVAL = 5


class Weights:
    """The weights of the models that a run starts from, on its mesh. Each model is read at its first use, then kept."""

    def __init__(self, config: Config, mesh: Mesh, directory: Path, arch: Arch, released: dict[str, Released]) -> None:
        """Reads nothing yet.

        `directory` and `arch` are the subject's. `released` holds the models that the roles "av" and "ar" start from
        instead of the subject.
        """
        self._config, self._mesh, self._directory, self._arch, self._released = config, mesh, directory, arch, released

    @cached_property
    def base(self) -> Params:
        """The subject's frozen weights."""
        shardings = tree_shardings(self._mesh, model_weights(self._arch))
        return load_params(self._directory, self._arch, self._config.subject.dtype, shardings=shardings)

    def start(self, role: str) -> Params:
        """Returns the weights that the role "av" or "ar" starts from.

        A released model that is trained itself (`lora.rank` is 0) is read as float32, so that no bits are lost.
        """
        if role in self._released and self._released[role].adapters is None:
            dtype = self._config.subject.dtype if self._config.lora.rank else "float32"
            return self._released[role].weights(dtype, self._mesh)
        return self.base

    @cached_property
    def bases(self) -> dict[str, Params]:
        """The frozen models that adapters sit on: `base`, and `decoder_base` where the decoder's sit on another."""
        if not self._config.lora.rank:
            return {"base": {}}
        encoder, decoder = self.start("av"), self.start("ar")
        return {"base": encoder} if encoder is decoder else {"base": encoder, "decoder_base": decoder}

    def forget_base(self) -> None:
        """Frees the subject's weights where no role's adapters sit on them. The next use of `base` reads them again."""
        base = self.__dict__.get("base")  # not `self.base`, which would read weights that nobody has used yet
        if not any(base is frozen for frozen in self.bases.values()):
            self.__dict__.pop("base", None)


@dataclasses.dataclass(frozen=True)
class Run:
    """A config and its workdir, checked by `open_run`.

    `directory`, `arch` and `tokenizer` are the subject's. Where the run starts from a released encoder, the tokenizer
    is that encoder's, with its chat template. `released` holds the models that the roles "av" and "ar" start from
    instead of the subject. `identity` identifies the weights that the roles start from: adapters mean nothing on other
    weights. `record` says what the newest checkpoint was made with, see `workdir.recorded`.
    """

    config: Config
    workdir: AnyPath
    read_only: bool
    mesh: Mesh
    directory: Path
    arch: Arch
    tokenizer: Any
    released: dict[str, Released]
    identity: dict[str, str]
    record: dict[str, Any]
    weights: Weights
    open_store: Callable[[], ActivationStore]

    @property
    def base(self) -> Params:
        """The subject's weights, read at their first use."""
        return self.weights.base

    @property
    def store(self) -> ActivationStore:
        """The activations, opened at their first use: explaining needs none, and they may have been deleted."""
        return self.open_store()

    def held_out_rows(self, count: int | None = None) -> np.ndarray:
        """Returns the first `count` held-out rows, by default those that evaluation uses.

        Their order is random and depends on the seed only.
        """
        rows = self.store.index.rows_of("held_out")
        count = self.config.eval.num_activations if count is None else count
        return np.random.default_rng([self.config.seed, 1]).permutation(rows)[:count]

    def seed(self, purpose: int) -> int:
        """Returns the random seed of a purpose, which depends on the config's seed: 31 bits."""
        return int(np.random.SeedSequence([self.config.seed, purpose]).generate_state(1)[0] >> 1)

    def key(self, purpose: int) -> jax.Array:
        """Returns the PRNG key made from `seed`."""
        return jax.random.PRNGKey(self.seed(purpose))

    def on_mesh(self, tree: Any) -> Any:
        """Puts a copy of every array on each device of the mesh."""
        return place(tree, replicated(self.mesh))


@dataclasses.dataclass(frozen=True)
class PreparedRun(Run):
    """A run whose protocol is fixed, which training, evaluation and use of a pair need."""

    protocol: Protocol
    roles: Roles

    def made_with(self) -> dict[str, Any]:
        """Returns the record that this run's checkpoints carry.

        It tells them from those of another run, also when other files of the workdir are lost.
        """
        return {
            "config": dataclasses.asdict(self.config),
            "weights": self.identity,
            "rows": self.store.index.digest(),
            "protocol": json.loads(self.protocol.to_json()),
        }


def open_run(config: Config, workdir: AnyPath, read_only: bool = False) -> Run:
    """Checks a config against its models and the workdir, and locks the workdir for it.

    With `read_only` the workdir is neither locked nor changed, so another run may be training there. Raises UserError
    that names the field or file where something does not fit. All that can be checked before extraction is checked.
    """
    config = located(config)
    mesh = make_mesh(config.mesh)
    directory = resolve_model(config.subject.model)
    arch = read_arch(directory)
    if config.subject.layer >= arch.num_layers:
        raise UserError(
            f"config.subject.layer: {config.subject.layer} should be from 0 to {arch.num_layers - 1} "
            f"for {config.subject.model}"
        )
    check_experts(config, arch)
    require(workdir, "activations/subject.json")
    record = recorded(workdir)
    released = _open_released(config, directory, arch)
    run = Run(
        config=config,
        workdir=workdir,
        read_only=read_only,
        mesh=mesh,
        directory=directory,
        arch=arch,
        tokenizer=_tokenizer(directory, released),
        released=released,
        identity={"fingerprint": fingerprint(directory), **{role: model.identity for role, model in released.items()}},
        record=record,
        weights=Weights(config, mesh, directory, arch, released),
        open_store=cache(partial(_open_store, workdir, record)),
    )
    _check_identity(run)
    if read_only:
        check_trained_with(workdir, config)
    else:
        check_batches(config, mesh)
        _check_before_extraction(run)
        processes.by_first(lambda: take(workdir, config, run.record))
    return run


def prepare(run: Run) -> PreparedRun:
    """Fixes the protocol, and writes it if the workdir has none. After that none of its fields can change any more."""
    protocol = _protocol(run)
    archs = {role: model.arch for role, model in run.released.items() if model.adapters is None}
    roles = make_roles(run.config, run.arch, protocol, archs.get("av"), archs.get("ar"))
    run_fields = {field.name: getattr(run, field.name) for field in dataclasses.fields(run)}
    return PreparedRun(**run_fields, protocol=protocol, roles=roles)


def sidecar_of(run: Run) -> Sidecar | None:
    """Returns the sidecar that fixes prompts and slot: a released pair's, else a dataset's, else None.

    Without a sidecar the config's prompts are used.
    """
    files, released = dataset_files(run.config.dataset), run.released
    of_dataset = dataset_sidecar(files, run.arch.d_model, run.config.subject.layer) if files else None
    if "av" in released:
        check_same_prompt(released["av"].sidecar, of_dataset)
    if len(released) == 2:
        return pair_sidecar(released["av"], released["ar"])
    for role, model in released.items():
        of_role = model.sidecar
        return combined(of_role, of_dataset or of_role) if role == "av" else combined(of_dataset or of_role, of_role)
    return of_dataset


def descriptions_of(run: Run) -> dict[int, str]:
    """Reads row number -> description, for the rows that have one. Raises UserError where the file is missing."""
    path = run.workdir / "activations/descriptions.parquet"
    if not path.exists():
        raise UserError(f"{run.workdir}: no descriptions yet; run `nlae describe` (or `nlae train`) first")
    remedy = f"restore it, or {IMPORT_ANEW}" if run.config.dataset.rl else "delete it to describe again"
    table = read_parquet(path, remedy, {"row": "whole numbers", "description": "texts"})
    return dict(zip(table["row"].to_pylist(), table["description"].to_pylist(), strict=True))


def _open_store(workdir: AnyPath, record: dict[str, Any]) -> ActivationStore:
    """Opens the store. Raises UserError where it does not exist, or where checkpoints were trained with another."""
    if not (workdir / "activations/meta.json").exists():
        raise UserError(f"{workdir}: no activations yet; run `nlae extract` (or `nlae train`) first")
    store = ActivationStore(workdir / "activations")
    check_record(record, "rows", store.index.digest(), str(workdir / "activations/rows.parquet"), workdir)
    return store


def _open_released(config: Config, directory: Path, arch: Arch) -> dict[str, Released]:
    """Opens the models that the roles "av" and "ar" start from instead of the subject: both, one or none.

    Raises UserError where one does not fit the subject.
    """
    released = {role: open_released(name, role) for role, name in config.init.names().items()}
    for role, model in released.items():
        if model.layer not in (None, config.subject.layer):
            raise UserError(
                f"config.init.{role}: made for block {model.layer}; subject.layer is {config.subject.layer}"
            )
        if model.arch.d_model != arch.d_model:
            raise UserError(
                f"config.init.{role}: activations of width {model.arch.d_model}; the subject's have {arch.d_model}"
            )
        _check_adapters(config, directory, role, model)
    return released


def _check_adapters(config: Config, directory: Path, role: str, released: Released) -> None:
    """Raises UserError where released adapters cannot be trained further with this config.

    They need the same base model, rank and scale, and must be on the same layers.
    """
    if (adapters := released.adapters) is None:
        return
    lora = config.lora
    for name in ("rank", "alpha", "experts"):
        configured, trained = getattr(lora, name), getattr(adapters, name)
        if configured != trained:
            raise UserError(f"config.lora.{name}: {configured} should be {trained}, that of {adapters.directory}")
    if fingerprint(released.directory) != fingerprint(directory):
        raise UserError(
            f"config.init.{role}: its adapters belong to {adapters.base_model}, which has other weights than "
            f"subject.model = {config.subject.model}"
        )


def _tokenizer(directory: Path, released: dict[str, Released]) -> Any:
    """Loads the subject's tokenizer, or the released encoder's with its chat template if there is one.

    Raises UserError where a released model's tokenizer reads text otherwise than the subject's.
    """
    subject = load_tokenizer(directory)
    tokenizers = {role: load_tokenizer(model.directory) for role, model in released.items()}
    for role, tokenizer in tokenizers.items():
        check_same_tokenizer(subject, tokenizer, f"config.init.{role}")
    return tokenizers.get("av", subject)


def _check_identity(run: Run) -> None:
    """Raises UserError where the workdir's activations or checkpoints were made with other weights."""
    path, names = (
        run.workdir / "activations/subject.json",
        (run.config.subject.model, *run.config.init.names().values()),
    )
    if path.exists() and read_json(path) != run.identity:
        raise UserError(f"{path}: made with other weights than are now in {', '.join(names)}; restore the former ones")
    check_record(run.record, "weights", run.identity, "config.subject.model, config.init", run.workdir)


def _check_before_extraction(run: Run) -> None:
    """Raises UserError for problems that would otherwise show only after hours.

    It checks the datasets, the tracker, the prompts with this tokenizer, and the provider of the descriptions.
    """
    config = run.config
    check_datasets(config)
    check_tracker(config.track)
    protocol = _new_protocol(run, sidecar_of(run), 1.0)
    check_prompts(protocol, run.tokenizer, run.arch.vocab_size)
    closing = protocol.closing
    if config.rl.max_new_tokens <= len(closing):
        raise UserError(
            f"config.rl.max_new_tokens: {config.rl.max_new_tokens} should be more than the "
            f"{len(closing)} tokens of the closing tag"
        )
    if world.is_first() and not config.dataset.rl:
        _check_provider(run)


def _check_provider(run: Run) -> None:
    """Raises UserError where the provider cannot give the descriptions that the workdir does not have yet.

    A server's key is also checked after extraction. The corpus is read together with a file of descriptions.
    """
    directory, describe, learns = run.workdir / "activations", run.config.describe, run.config.sft.learns
    if (directory / "descriptions.parquet").exists():
        return
    is_indexed, is_extracted = (directory / "rows.parquet").exists(), (directory / "meta.json").exists()
    is_of_file = describe.provider == "file" and not is_indexed
    if is_of_file or (learns and (describe.provider in SERVERS or not is_extracted)):
        check_provider(describe, run.tokenizer, is_indexed)


def _protocol(run: Run) -> Protocol:
    """Reads the protocol that the workdir was made with, or makes one. Every process makes the same one."""
    if (path := run.workdir / "protocol.json").exists():
        protocol, trained_with = kept_protocol(path, run.tokenizer), run.record.get("protocol", {})
        fields = json.loads(protocol.to_json())
        # Only the recorded fields are compared: later versions may have added fields.
        check_record(run.record, "protocol", {name: fields.get(name) for name in trained_with}, str(path), run.workdir)
        return protocol
    require(run.workdir, "protocol.json", (ANY_CHECKPOINT,))
    sidecar = sidecar_of(run)
    protocol = _new_protocol(run, sidecar, _injection_scale(run, sidecar))
    if not run.read_only and world.is_first():
        write_text(path, protocol.to_json())
    return protocol


def _new_protocol(run: Run, sidecar: Sidecar | None, injection_scale: float) -> Protocol:
    if sidecar is not None:
        return protocol_of(sidecar, run.tokenizer, run.config.protocol, injection_scale)
    return make_protocol(run.tokenizer, run.config.protocol, injection_scale)


def _injection_scale(run: Run, sidecar: Sidecar | None) -> float:
    """Returns the config's scale, else the released encoder's, else the dataset's, else the activations' 75 % norm."""
    if scale := run.config.protocol.injection_scale:
        return scale
    if "av" in run.released:
        return run.released["av"].injection_scale
    if sidecar is not None and sidecar.injection_scale is not None:
        return sidecar.injection_scale  # 0: vectors are injected unscaled
    return run.store.meta["norm_p75"]
