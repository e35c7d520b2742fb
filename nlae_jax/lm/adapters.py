"""Reads and writes trained adapters as small directories in the layout of the PEFT library.

The directory of a role holds `adapter_config.json`, `adapter_model.safetensors` and the sidecar; the decoder's also
holds `value_head.safetensors`. The config names the base model that the adapters belong to.
`peft.PeftModel.from_pretrained` loads an encoder's adapters onto the base model.

In transformers 5, a block's module `experts` holds the matrices of all its experts in two parameters. PEFT names them
in `target_parameters` and wraps the module once for each: first for the input matrices, then for the output matrix. So
the adapters of the former are stored under `experts.base_layer`, and those of the latter under `experts`.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Container, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nlae_jax.lm.arch import Arch, expert_layers, linear_layers
from nlae_jax.lm.layout import hf_tensors
from nlae_jax.lm.lora import adapter_weights
from nlae_jax.lm.reading import read_tensors
from nlae_jax.lm.tensors import TensorToWrite, write_safetensors
from nlae_jax.runtime.errors import UserError
from nlae_jax.runtime.files import read_bytes, write_json
from nlae_jax.runtime.outside import fits_float32, parse_json, quoted

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

_PREFIX = "base_model.model."

# Fields of PEFT's config with which the result is another one than that of plain LoRA.
_OTHER_MATHS = (
    *("use_rslora", "use_dora", "fan_in_fan_out", "layer_replication", "lora_bias", "use_qalora", "use_bdlora"),
    *("alora_invocation_tokens", "arrow_config"),
)
# Initialisations that also change the base model's weights: the beginnings of their names.
_OTHER_BASES = ("pissa", "olora", "corda", "loftq")


@dataclasses.dataclass(frozen=True)
class AdapterFile:
    """The adapters of one directory. `base_model` names the model that they belong to. Their scale is `alpha / rank`.

    `experts` says whether experts have adapters too. `alphas` are the values of alpha that the file gives for single
    modules, by the last part of the modules' names.
    """

    directory: Path
    base_model: str
    rank: int
    alpha: float
    alphas: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    experts: bool = False

    def read(self, arch: Arch) -> dict[str, dict[str, jax.Array]]:
        """Reads the tree of `lora.adapter_weights`, float32. `arch` has as many blocks as the adapters.

        Raises UserError if the files hold further tensors or scale a module differently, because the result would be
        another model than the files'.
        """
        tree = adapter_weights(arch, self.rank, self.experts)
        modules = _modules(arch, tree)
        if others := sorted(self.alphas.keys() - {module.short for module in modules}):
            raise UserError(
                f"{self.directory / CONFIG}: alpha_pattern: {quoted(others[0])} is not supported; only names of "
                "modules such as q_proj are"
            )
        shapes = {}
        for module in modules:
            inputs, rank = tree[module.members[0]]["a"].shape[-1], module.stacked * len(module.members) * self.rank
            # PEFT's lora_A is [rank, in], as our `a`; its lora_B is [out, rank], the transpose of our `b`.
            shapes[module.tensor("a")] = (rank, inputs)
            shapes[module.tensor("b")] = (module.outputs, rank)
            if (alpha := self.alphas.get(module.short, self.alpha)) != len(module.members) * self.alpha:
                raise UserError(
                    f"{self.directory / CONFIG}: alpha_pattern: {module.short} has {quoted(alpha)}; it should be "
                    f"{len(module.members) * self.alpha:g}, the scale of the others"
                )
        stored = read_tensors(self.directory / WEIGHTS, shapes, whole=True)
        # Cut up by numpy: a thousand small operations of JAX took as long as reading the base model.
        tensors = {name: np.asarray(tensor) for name, tensor in stored.items()}
        layers: dict[str, dict[str, list[np.ndarray]]] = {name: {"a": [], "b": []} for name in tree}
        for module in modules:
            a, b = tensors[module.tensor("a")], tensors[module.tensor("b")]
            a_ExRxI = a.reshape(module.stacked, -1, a.shape[1])
            b_OxRxE = b.reshape(module.outputs, -1, module.stacked)
            for number, (name, places) in enumerate(zip(module.members, module.places, strict=True)):
                ranks = slice(number * self.rank, (number + 1) * self.rank)
                for part, values in (("a", a_ExRxI[:, ranks]), ("b", b_OxRxE[places, ranks].T)):
                    layers[name][part].append(values.reshape(tree[name][part].shape[1:]))
        return {
            name: {part: jnp.asarray(np.stack(rows)) for part, rows in pair.items()} for name, pair in layers.items()
        }

    @property
    def identity(self) -> str:
        """A hash of the weight files, which is another one for other adapters."""
        digest = hashlib.sha256()
        for path in sorted(self.directory.glob("*.safetensors")):
            digest.update(path.name.encode() + path.read_bytes())
        return digest.hexdigest()


def has_adapters(directory: Path) -> bool:
    """Returns whether a directory holds adapters rather than a whole model."""
    return (directory / CONFIG).is_file()


def open_adapters(directory: Path) -> AdapterFile:
    """Reads `adapter_config.json`. Raises UserError that names the field that is missing or not supported."""
    path = directory / CONFIG
    content = parse_json(read_bytes(path), path, dict)
    rank, alpha, base_model = (content.get(name) for name in ("r", "lora_alpha", "base_model_name_or_path"))
    if content.get("peft_type") != "LORA":
        raise UserError(f"{path}: peft_type {content.get('peft_type')!r} should be LORA")
    if not isinstance(rank, int) or isinstance(rank, bool) or not 0 < rank <= 65_536:
        raise UserError(f"{path}: r {rank!r} should be a whole number above 0")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not alpha > 0 or not fits_float32(alpha):
        raise UserError(f"{path}: lora_alpha {alpha!r} should be a number above 0")
    if not isinstance(base_model, str) or not base_model:
        raise UserError(
            f"{path}: base_model_name_or_path {base_model!r} should name the model that the adapters sit on"
        )
    for name in _OTHER_MATHS:
        if content.get(name):
            raise UserError(f"{path}: {name} is not supported; it should be false or null")
    if str(content.get("init_lora_weights")).startswith(_OTHER_BASES):
        raise UserError(
            f"{path}: init_lora_weights {quoted(content['init_lora_weights'])} changes the base model, which these "
            "adapters then do not fit; save them converted to plain LoRA"
        )
    alphas = content.get("alpha_pattern") or {}
    if not isinstance(alphas, dict):
        raise UserError(f"{path}: alpha_pattern {quoted(alphas)} should be an object")
    return AdapterFile(directory, base_model, rank, float(alpha), alphas, bool(content.get("target_parameters")))


def write_adapters(
    directory: Path, arch: Arch, adapters: dict[str, Any], alpha: float, base_model: str, dtype: str = "bfloat16"
) -> None:
    """Writes `adapters`, which have as many blocks as `arch`, into the existing `directory`.

    `alpha / rank` is their scale, and `base_model` the name of the model that they belong to.
    """
    rank = next(iter(adapters.values()))["a"].shape[-2]
    tensors = []
    modules = _modules(arch, adapters)
    for module in modules:
        stored_as = module.stacked, rank, -1
        a_ExRxI = np.concatenate(
            [np.asarray(adapters[name]["a"][module.index]).reshape(stored_as) for name in module.members], axis=1
        )
        b_OxRxE = np.zeros((module.outputs, a_ExRxI.shape[1], module.stacked), np.float32)
        for number, (name, places) in enumerate(zip(module.members, module.places, strict=True)):
            b_ExRxO = np.asarray(adapters[name]["b"][module.index]).reshape(stored_as)
            b_OxRxE[places, number * rank : (number + 1) * rank] = b_ExRxO.T
        for part, values in (("a", a_ExRxI.reshape(-1, a_ExRxI.shape[2])), ("b", b_OxRxE.reshape(module.outputs, -1))):
            tensors.append(TensorToWrite(module.tensor(part), values.shape, partial(np.asarray, values)))
    write_safetensors(directory / WEIGHTS, tensors, dtype)
    joined = {module.short: len(module.members) for module in modules if len(module.members) > 1}
    parameters = sorted({f"experts.{module.short}" for module in modules if module.experts})
    write_json(
        directory / CONFIG,
        {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base_model,
            "r": rank,
            "lora_alpha": alpha,
            "target_modules": sorted({module.short for module in modules if not module.experts}),
            **({"target_parameters": parameters} if parameters else {}),
            **({"rank_pattern": {name: count * rank for name, count in joined.items()}} if joined else {}),
            **({"alpha_pattern": {name: count * alpha for name, count in joined.items()}} if joined else {}),
            "lora_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
        },
    )


@dataclasses.dataclass(frozen=True)
class _Module:
    """A linear layer of the HF model. `members` are our linear layers that it joins, and `places` their outputs in it.

    The adapters of a layer with n members have n times the rank: the members' stand side by side, and `b` is zero
    outside of each member's block. A layer of `experts` is a parameter with the matrices of all experts of a block. Its
    `a` is stored as [experts, rank, in] and its `b` as [out, rank, experts], both flattened.
    """

    name: str
    index: int  # in the stacks of its members
    members: tuple[str, ...]
    places: tuple[np.ndarray, ...]
    outputs: int
    experts: int = 0

    @property
    def short(self) -> str:
        return self.name.rpartition(".")[2]

    @property
    def stacked(self) -> int:
        """The number of matrices that the layer holds."""
        return self.experts or 1

    def tensor(self, part: str) -> str:
        module = self.name
        if self.experts:
            module = module.rpartition(".")[0] + ("" if "down" in self.members else ".base_layer")
        return f"{_PREFIX}{module}.lora_{part.upper()}.weight"


def _modules(arch: Arch, names: Container[str]) -> list[_Module]:
    """Returns the modules that hold the linear layers `names`, block by block."""
    layers = linear_layers(arch) | expert_layers(arch)
    weights = {name: weight for name, weight in layers.items() if name in names}
    modules = []
    for tensor in hf_tensors(arch, weights, packed=True):
        shares = [share for share in tensor.shares if not share.expert]  # the first expert's, which all are like
        widths = [weights[share.name].shape[-1] for share in shares]
        pairs = zip(shares, widths, strict=True)
        places = (share.spread.places(width) if share.spread else np.arange(width) for share, width in pairs)
        name, members = tensor.name.removesuffix(".weight"), tuple(share.name for share in shares)
        experts = arch.experts.count if arch.experts and shares[0].expert is not None else 0
        modules.append(_Module(name, shares[0].index[0], members, tuple(places), sum(widths), experts))
    return modules
