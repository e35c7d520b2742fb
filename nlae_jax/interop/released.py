"""Opens and checks encoder and decoder directories in the reference's layout.

An encoder ("av") is an ordinary model directory. A decoder ("ar") holds the first K + 1 blocks and
`value_head.safetensors`. Either may hold adapters instead of a model (`lm/adapters.py`). Both have a sidecar
(`sidecar.py`).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from nlae_jax.assets import pair_directory, pair_names
from nlae_jax.interop.sidecar import Sidecar, combined, read_sidecar
from nlae_jax.lm.adapters import AdapterFile, has_adapters, open_adapters
from nlae_jax.lm.arch import Arch, model_weights
from nlae_jax.lm.families import read_arch
from nlae_jax.lm.pretrained import check_same_tokenizer, fingerprint, load_tokenizer, resolve_model
from nlae_jax.lm.reading import read_tensor
from nlae_jax.lm.weights import load_params
from nlae_jax.mesh import place, replicated, tree_shardings
from nlae_jax.runtime.errors import UserError
from nlae_jax.runtime.files import local_path

VALUE_HEAD = "value_head.safetensors"
MAX_NEW_TOKENS = 200  # of an explanation whose encoder's sidecar says nothing


@dataclasses.dataclass(frozen=True)
class Released:
    """One released encoder or decoder: its directory, architecture (a decoder has no LM head) and sidecar.

    Where it holds `adapters`, `directory` and `arch` are those of the base model.
    """

    directory: Path
    arch: Arch
    sidecar: Sidecar
    adapters: AdapterFile | None = None

    @property
    def layer(self) -> int | None:
        """The block K that the sidecar names, or None."""
        return self.sidecar.layer

    @property
    def decoder_layer(self) -> int:
        """The block whose output a decoder rebuilds. `open_released` refuses decoders that do not say it."""
        assert self.sidecar.layer is not None
        return self.sidecar.layer

    @property
    def identity(self) -> str:
        """A hash that identifies the weights."""
        if self.adapters is not None:
            return self.adapters.identity
        return fingerprint(self.directory, *([VALUE_HEAD] if self.sidecar.role == "ar" else []))

    @property
    def injection_scale(self) -> float:
        """The injection scale that an encoder was trained with; 0 injects activations unscaled.

        Raises UserError where the sidecar has none.
        """
        if self.sidecar.injection_scale is None:
            raise UserError(
                f"{self.sidecar.path}: extraction.injection_scale is missing; an encoder needs the one it learned"
            )
        return self.sidecar.injection_scale

    @property
    def max_new_tokens(self) -> int:
        """The length of explanations that the encoder was trained for, or a default where the sidecar has none."""
        return self.sidecar.max_new_tokens or MAX_NEW_TOKENS

    def weights(self, dtype: str, mesh: Mesh | None = None) -> dict[str, Any]:
        """Loads the parameters, sharded over the mesh if there is one."""
        is_decoder = self.sidecar.role == "ar"
        shardings = tree_shardings(mesh, model_weights(self.arch)) if mesh else None
        params = load_params(self.directory, self.arch, dtype, is_decoder, shardings)
        if is_decoder:  # its final norm is never applied, but the module declares it
            norm = jnp.ones(self.arch.d_model, params["embed"].dtype)
            for name in model_weights(self.arch).keys() - params.keys():
                params[name] = norm if shardings is None else place(norm, shardings[name])
        return params

    def value_head(self, mesh: Mesh | None = None) -> jax.Array:
        """Reads the decoder's head [d, d] float32 for y = x @ head. The file holds its transpose W, y = W x."""
        width = self.arch.d_model
        head = read_tensor(self.sidecar.path.parent / VALUE_HEAD, "weight", (width, width)).T
        return place(head, replicated(mesh)) if mesh else head


def open_released(name: str, role: str) -> Released:
    """Opens the encoder ("av") or decoder ("ar") `name`: a directory, a hub id, or a pair's directory or shipped name.

    Raises UserError that names file and field where it is none of these, or where its parts do not fit each other.
    """
    directory = _directory(name, role)
    adapters = open_adapters(directory) if has_adapters(directory) else None
    base = directory if adapters is None else resolve_model(adapters.base_model)
    arch, sidecar = read_arch(base), read_sidecar(directory)
    if sidecar.role != role:
        raise UserError(f"{sidecar.path}: its role is {sidecar.role!r}; {name} was given as {role!r}")
    if sidecar.d_model != arch.d_model:
        raise UserError(f"{sidecar.path}: d_model {sidecar.d_model} should be config.json's {arch.d_model}")
    if role == "ar" and not (directory / VALUE_HEAD).is_file():
        raise UserError(f"{directory / VALUE_HEAD}: no such file; a decoder has one")
    if adapters is not None:
        if sidecar.layer is None or sidecar.layer >= arch.num_layers:
            raise UserError(
                f"{sidecar.path}: extraction.layer_index {sidecar.layer} should be from 0 to {arch.num_layers - 1}, a "
                f"block of {adapters.base_model}"
            )
        return Released(base, arch, sidecar, adapters)
    if role == "av":
        return Released(directory, arch, sidecar)
    layer = arch.num_layers - 1
    if sidecar.layer not in (None, layer):
        raise UserError(
            f"{sidecar.path}: extraction_layer_index {sidecar.layer} should be {layer}: config.json has "
            f"{arch.num_layers} blocks, and a decoder ends with the block that is read"
        )
    arch = dataclasses.replace(arch, tied_head=True)
    return Released(directory, arch, dataclasses.replace(sidecar, layer=layer))


def pair_path(name: str) -> Path:
    """Returns the path that a pair's name means: the user's own where there is one, or else the package's pair.

    Raises UserError for a name that cannot be a path.
    """
    local = local_path(name, "model")
    return local if local.exists() else pair_directory(name) or local


def _directory(name: str, role: str) -> Path:
    """Returns the directory of a role's files."""
    if (directory := pair_path(name) / role).is_dir():
        return directory
    try:
        return resolve_model(name)
    except UserError as error:
        if "/" in name:
            raise
        raise UserError(f"{error}; the package carries the pairs {', '.join(pair_names())}") from None


def pair_sidecar(av: Released, ar: Released) -> Sidecar:
    """Combines the sidecars of a pair, with the decoder's own prompt. Raises UserError where they disagree."""
    encoder, decoder = av.sidecar, ar.sidecar
    if encoder.d_model != decoder.d_model:
        raise UserError(f"{decoder.path}: d_model {decoder.d_model} should be the encoder's {encoder.d_model}")
    if encoder.layer not in (None, decoder.layer):
        raise UserError(f"{decoder.path}: reads block {decoder.layer}; the encoder was made for block {encoder.layer}")
    sidecar = combined(encoder, decoder)
    if sidecar.decoder_template is None:
        raise UserError(f"{decoder.path}: prompt_templates.ar (or critic) is missing")
    return sidecar


def pair_tokenizer(av: Released, ar: Released) -> Any:
    """Loads the encoder's tokenizer, which the decoder shares. Raises UserError where the two differ."""
    tokenizer = load_tokenizer(av.directory)
    if ar.directory.resolve() != av.directory.resolve():  # a pair of adapters has one base model, and its tokenizer
        check_same_tokenizer(tokenizer, load_tokenizer(ar.directory), str(ar.directory))
    return tokenizer
