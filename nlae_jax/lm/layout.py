"""How the checkpoints of each family store our parameters: names, transposes, and tensors that hold several parameters.

One table per family serves reading and writing. HF stores a linear layer as [out, in], and ours is [in, out]. Our
blocks are stacked on a leading axis, and a block's experts on the next axis.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from nlae_jax.lm.arch import Arch, model_weights
from nlae_jax.lm.reading import Spread
from nlae_jax.mesh import Weight


@dataclasses.dataclass(frozen=True)
class Stored:
    """Where a checkpoint stores a parameter.

    `name` is that of the HF tensor, with {} for the block's number if each block has a tensor, and {expert} for the
    expert's number if each expert has one. `beside` are the parameters that the tensor holds along the axis of outputs,
    this one among them. Their `order` is one after another (""), head by head ("heads") or output by output
    ("outputs").
    """

    name: str
    transposed: bool = False  # the HF matrix is the transpose of ours
    beside: tuple[str, ...] = ()
    order: str = ""
    spaced: bool = False  # an axis of length 1 stands between the HF matrix's two

    @property
    def in_blocks(self) -> bool:
        return "{}" in self.name


@dataclasses.dataclass(frozen=True)
class Share:
    """The part of an HF tensor that is the entry `index` (block, expert) of parameter `name`.

    `expert` is the entry of the tensor's leading axis if one tensor has all experts of a block, else None. `spread`
    says which of the tensor's outputs are the parameter's; None means all.
    """

    name: str
    index: tuple[int, ...]
    expert: int | None
    spread: Spread | None


@dataclasses.dataclass(frozen=True)
class HfTensor:
    """One tensor of a checkpoint, and the parts of our parameters that it holds.

    `shape` is that of its matrix. `layer` is the block that it belongs to, or None.
    """

    name: str
    shape: tuple[int, ...]
    transposed: bool
    shares: tuple[Share, ...]
    layer: int | None = None
    spaced: bool = False

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape in the checkpoint."""
        return (*self.shape[:-1], 1, self.shape[-1]) if self.spaced else self.shape


def _shared(
    name: str, beside: str, transposed: bool = False, order: str = "", suffix: str = "", spaced: bool = False
) -> dict[str, Stored]:
    members = tuple(f"{member}{suffix}" for member in beside.split())
    return {member: Stored(name, transposed, members, order, spaced) for member in members}


_LLAMA: dict[str, Stored] = {
    "embed": Stored("model.embed_tokens.weight"),
    "attn_norm": Stored("model.layers.{}.input_layernorm.weight"),
    "q": Stored("model.layers.{}.self_attn.q_proj.weight", True),
    "k": Stored("model.layers.{}.self_attn.k_proj.weight", True),
    "v": Stored("model.layers.{}.self_attn.v_proj.weight", True),
    "o": Stored("model.layers.{}.self_attn.o_proj.weight", True),
    "q_bias": Stored("model.layers.{}.self_attn.q_proj.bias"),
    "k_bias": Stored("model.layers.{}.self_attn.k_proj.bias"),
    "v_bias": Stored("model.layers.{}.self_attn.v_proj.bias"),
    "o_bias": Stored("model.layers.{}.self_attn.o_proj.bias"),
    "q_norm": Stored("model.layers.{}.self_attn.q_norm.weight"),
    "k_norm": Stored("model.layers.{}.self_attn.k_norm.weight"),
    "mlp_norm": Stored("model.layers.{}.post_attention_layernorm.weight"),
    "gate": Stored("model.layers.{}.mlp.gate_proj.weight", True),
    "up": Stored("model.layers.{}.mlp.up_proj.weight", True),
    "down": Stored("model.layers.{}.mlp.down_proj.weight", True),
    "gate_bias": Stored("model.layers.{}.mlp.gate_proj.bias"),
    "up_bias": Stored("model.layers.{}.mlp.up_proj.bias"),
    "down_bias": Stored("model.layers.{}.mlp.down_proj.bias"),
    "final_norm": Stored("model.norm.weight"),
    "head": Stored("lm_head.weight"),
}
# With norms before and after attention and MLP, Llama's name for the norm before the MLP is that of the norm after
# attention.
_POST_NORMS = _LLAMA | {
    "attn_post_norm": Stored("model.layers.{}.post_attention_layernorm.weight"),
    "mlp_norm": Stored("model.layers.{}.pre_feedforward_layernorm.weight"),
    "mlp_post_norm": Stored("model.layers.{}.post_feedforward_layernorm.weight"),
}
_GEMMA4 = _POST_NORMS | {
    "global_q": Stored("model.layers.{}.self_attn.q_proj.weight", True),
    "global_k": Stored("model.layers.{}.self_attn.k_proj.weight", True),
    "global_v": Stored("model.layers.{}.self_attn.v_proj.weight", True),
    "global_o": Stored("model.layers.{}.self_attn.o_proj.weight", True),
    "global_q_norm": Stored("model.layers.{}.self_attn.q_norm.weight"),
    "global_k_norm": Stored("model.layers.{}.self_attn.k_norm.weight"),
    "layer_scale": Stored("model.layers.{}.layer_scalar"),
}
# Gemma 4 with experts. One tensor has all experts of a block; the shared MLP has the names of a dense model's MLP.
_GEMMA4_MOE = _GEMMA4 | {
    "shared_gate": _GEMMA4["gate"],
    "shared_up": _GEMMA4["up"],
    "shared_down": _GEMMA4["down"],
    "shared_post_norm": Stored("model.layers.{}.post_feedforward_layernorm_1.weight"),
    "router": Stored("model.layers.{}.router.proj.weight", True),
    "router_norm": Stored("model.layers.{}.router.scale"),
    "expert_scale": Stored("model.layers.{}.router.per_expert_scale"),
    "experts_norm": Stored("model.layers.{}.pre_feedforward_layernorm_2.weight"),
    "experts_post_norm": Stored("model.layers.{}.post_feedforward_layernorm_2.weight"),
    **_shared("model.layers.{}.experts.gate_up_proj", "gate up", True),
    "down": Stored("model.layers.{}.experts.down_proj", True),
}
_GPT2 = {
    "embed": Stored("transformer.wte.weight"),
    "positions": Stored("transformer.wpe.weight"),
    "attn_norm": Stored("transformer.h.{}.ln_1.weight"),
    "attn_norm_bias": Stored("transformer.h.{}.ln_1.bias"),
    **_shared("transformer.h.{}.attn.c_attn.weight", "q k v"),
    **_shared("transformer.h.{}.attn.c_attn.bias", "q k v", suffix="_bias"),
    "o": Stored("transformer.h.{}.attn.c_proj.weight"),
    "o_bias": Stored("transformer.h.{}.attn.c_proj.bias"),
    "mlp_norm": Stored("transformer.h.{}.ln_2.weight"),
    "mlp_norm_bias": Stored("transformer.h.{}.ln_2.bias"),
    "up": Stored("transformer.h.{}.mlp.c_fc.weight"),
    "up_bias": Stored("transformer.h.{}.mlp.c_fc.bias"),
    "down": Stored("transformer.h.{}.mlp.c_proj.weight"),
    "down_bias": Stored("transformer.h.{}.mlp.c_proj.bias"),
    "final_norm": Stored("transformer.ln_f.weight"),
    "final_norm_bias": Stored("transformer.ln_f.bias"),
    "head": Stored("lm_head.weight"),
}
_GPT_NEOX = {
    "embed": Stored("gpt_neox.embed_in.weight"),
    "attn_norm": Stored("gpt_neox.layers.{}.input_layernorm.weight"),
    "attn_norm_bias": Stored("gpt_neox.layers.{}.input_layernorm.bias"),
    **_shared("gpt_neox.layers.{}.attention.query_key_value.weight", "q k v", True, "heads"),
    **_shared("gpt_neox.layers.{}.attention.query_key_value.bias", "q k v", order="heads", suffix="_bias"),
    "o": Stored("gpt_neox.layers.{}.attention.dense.weight", True),
    "o_bias": Stored("gpt_neox.layers.{}.attention.dense.bias"),
    "mlp_norm": Stored("gpt_neox.layers.{}.post_attention_layernorm.weight"),
    "mlp_norm_bias": Stored("gpt_neox.layers.{}.post_attention_layernorm.bias"),
    "up": Stored("gpt_neox.layers.{}.mlp.dense_h_to_4h.weight", True),
    "up_bias": Stored("gpt_neox.layers.{}.mlp.dense_h_to_4h.bias"),
    "down": Stored("gpt_neox.layers.{}.mlp.dense_4h_to_h.weight", True),
    "down_bias": Stored("gpt_neox.layers.{}.mlp.dense_4h_to_h.bias"),
    "final_norm": Stored("gpt_neox.final_layer_norm.weight"),
    "final_norm_bias": Stored("gpt_neox.final_layer_norm.bias"),
    "head": Stored("embed_out.weight"),
}
_PHI3 = _LLAMA | {
    **_shared("model.layers.{}.self_attn.qkv_proj.weight", "q k v", True),
    **_shared("model.layers.{}.mlp.gate_up_proj.weight", "gate up", True),
}
_GRANITE_HYBRID = _LLAMA | {
    **_shared("model.layers.{}.shared_mlp.input_linear.weight", "gate up", True),
    "down": Stored("model.layers.{}.shared_mlp.output_linear.weight", True),
}
_QWEN3_MOE = _LLAMA | {
    "router": Stored("model.layers.{}.mlp.gate.weight", True),
    "gate": Stored("model.layers.{}.mlp.experts.{expert}.gate_proj.weight", True),
    "up": Stored("model.layers.{}.mlp.experts.{expert}.up_proj.weight", True),
    "down": Stored("model.layers.{}.mlp.experts.{expert}.down_proj.weight", True),
}
_GPT_OSS = _LLAMA | {
    "sinks": Stored("model.layers.{}.self_attn.sinks"),
    "router": Stored("model.layers.{}.mlp.router.weight", True),
    "router_bias": Stored("model.layers.{}.mlp.router.bias"),
    **_shared("model.layers.{}.mlp.experts.gate_up_proj", "gate up", order="outputs"),
    **_shared("model.layers.{}.mlp.experts.gate_up_proj_bias", "gate up", order="outputs", suffix="_bias"),
    "down": Stored("model.layers.{}.mlp.experts.down_proj"),
    "down_bias": Stored("model.layers.{}.mlp.experts.down_proj_bias"),
}
_QWEN3_5 = _LLAMA | {
    **_shared("model.layers.{}.self_attn.q_proj.weight", "q q_gate", True, "heads"),
    **_shared("model.layers.{}.self_attn.q_proj.bias", "q q_gate", order="heads", suffix="_bias"),
    **_shared("model.layers.{}.linear_attn.in_proj_qkv.weight", "delta_q delta_k delta_v", True),
    "delta_z": Stored("model.layers.{}.linear_attn.in_proj_z.weight", True),
    "delta_b": Stored("model.layers.{}.linear_attn.in_proj_b.weight", True),
    "delta_a": Stored("model.layers.{}.linear_attn.in_proj_a.weight", True),
    **_shared(
        "model.layers.{}.linear_attn.conv1d.weight", "delta_q delta_k delta_v", True, suffix="_conv", spaced=True
    ),
    "delta_rate": Stored("model.layers.{}.linear_attn.A_log"),
    "delta_bias": Stored("model.layers.{}.linear_attn.dt_bias"),
    "delta_norm": Stored("model.layers.{}.linear_attn.norm.weight"),
    "delta_o": Stored("model.layers.{}.linear_attn.out_proj.weight", True),
}
_SHARED_EXPERT = {
    "shared_gate": Stored("model.layers.{}.mlp.shared_expert.gate_proj.weight", True),
    "shared_up": Stored("model.layers.{}.mlp.shared_expert.up_proj.weight", True),
    "shared_down": Stored("model.layers.{}.mlp.shared_expert.down_proj.weight", True),
    "shared_share": Stored("model.layers.{}.mlp.shared_expert_gate.weight", True),
}
_OF_EXPERTS = ("router", "gate", "up", "down")
_QWEN3_5_MOE = _QWEN3_5 | _SHARED_EXPERT | {name: _QWEN3_MOE[name] for name in _OF_EXPERTS}
_ONE_TENSOR = {
    **_shared("model.layers.{}.mlp.experts.gate_up_proj", "gate up", True),
    "down": Stored("model.layers.{}.mlp.experts.down_proj", True),
}
# Families that have a tensor for every expert or, as transformers' modules, one tensor with all experts of a block.
_PACKED = {
    **dict.fromkeys(("qwen3_moe", "olmoe"), _QWEN3_MOE | _ONE_TENSOR),
    "qwen3_5_moe_text": _QWEN3_5_MOE | _ONE_TENSOR,
}
_OTHERS: dict[str, dict[str, Stored]] = {
    **dict.fromkeys(("gemma2", "gemma3_text", "olmo2", "olmo3"), _POST_NORMS),
    "gpt2": _GPT2,
    "gpt_neox": _GPT_NEOX,
    "phi3": _PHI3,
    "granitemoehybrid": _GRANITE_HYBRID,
    "qwen3_moe": _QWEN3_MOE,
    "olmoe": _QWEN3_MOE,
    "gpt_oss": _GPT_OSS,
    "qwen3_5_text": _QWEN3_5,
    "qwen3_5_moe_text": _QWEN3_5_MOE,
    **dict.fromkeys(("gemma4_text", "gemma4_unified_text"), _GEMMA4),
}
# Families in which some models have experts and others do not: the table of those with experts.
_WITH_EXPERTS = {"gemma4_text": _GEMMA4_MOE}
# Other names under which the head has been saved.
_OTHER_HEADS = {"gpt_neox": "lm_head.weight"}
# Endings of the names of masks that older versions of transformers saved. Other families may not have such tensors.
_BUFFERS = {
    "gpt2": (".attn.bias", ".attn.masked_bias"),
    "gpt_neox": (".attention.bias", ".attention.masked_bias"),
}


def layout(arch: Arch, packed: bool = False) -> dict[str, Stored]:
    """Returns where each parameter of the family is stored. `packed`: one tensor has all experts of a block.

    In families that have only one layout, `packed` changes nothing.
    """
    if arch.experts is not None and arch.family in _WITH_EXPERTS:
        return _WITH_EXPERTS[arch.family]
    if packed and arch.family in _PACKED:
        return _PACKED[arch.family]
    return _OTHERS.get(arch.family, _LLAMA)


def is_packed(arch: Arch, names: Iterable[str]) -> bool:
    """Returns whether tensors with these names are packed: one tensor has all experts of a block."""
    if arch.family not in _PACKED:
        return False
    down = _PACKED[arch.family]["down"].name.format(0)
    return any(plain_name(arch, name) == down for name in names)


def hf_name(arch: Arch, name: str, layer: int = 0, expert: int = 0) -> str:
    """Returns the HF name of our parameter `name`, for a block and an expert if the parameter belongs to them."""
    return layout(arch)[name].name.format(layer, expert=expert)


def flat_weights(arch: Arch) -> dict[str, Weight]:
    """Returns `arch.model_weights` as one level: the blocks' weights beside the others."""
    weights: dict[str, Any] = model_weights(arch)
    return {name: weight for name, weight in weights.items() if name != "blocks"} | weights["blocks"]


def hf_tensors(arch: Arch, weights: Mapping[str, Weight], packed: bool = False) -> Iterator[HfTensor]:
    """Yields every tensor of a checkpoint with these parameters: first those outside of blocks, then block by block."""
    table = {name: stored for name, stored in layout(arch, packed).items() if name in weights}
    first = {name: stored for name, stored in table.items() if stored.beside[:1] in ((), (name,))}
    for name, stored in first.items():
        if not stored.in_blocks:
            yield _tensor(arch, weights, name, stored, (), None)
    for layer in range(arch.num_layers):
        for name, stored in first.items():
            place = arch.place(weights[name].axes[0], layer) if stored.in_blocks else None
            if place is None:
                continue
            if "{expert}" not in stored.name:
                yield _tensor(arch, weights, name, stored, (place,), layer)
            else:
                for expert in range(arch.experts.count if arch.experts else 0):
                    yield _tensor(arch, weights, name, stored, (place, expert), layer)


def _tensor(
    arch: Arch, weights: Mapping[str, Weight], name: str, stored: Stored, index: tuple[int, ...], layer: int | None
) -> HfTensor:
    members = stored.beside or (name,)
    inside = weights[name].shape[len(index) :]
    experts = arch.experts.count if arch.experts and "experts" in weights[name].axes[len(index) :] else None
    widths = [weights[member].shape[-1] for member in members]
    groups = {"": 1, "heads": arch.num_heads, "outputs": widths[0]}[stored.order]
    sizes = [width // groups for width in widths]
    shares = []
    for number, member in enumerate(members):
        spread = Spread(sizes[number], sum(sizes), sum(sizes[:number])) if len(members) > 1 else None
        if experts is None:
            shares.append(Share(member, index, None, spread))
        else:
            shares += [Share(member, (*index, expert), expert, spread) for expert in range(experts)]
    matrix = (*inside[experts is not None : -1], sum(widths))
    shape = (() if experts is None else (experts,)) + (matrix[::-1] if stored.transposed else matrix)
    hf = stored.name.format(layer, expert=index[-1] if index else 0)
    return HfTensor(hf, shape, stored.transposed, tuple(shares), layer, stored.spaced)


def plain_name(arch: Arch, name: str) -> str:
    """Returns the name of a tensor as a checkpoint with a head and without a vision tower has it.

    A checkpoint with a vision tower puts a prefix before the language model's names, of which there is a new and an old
    spelling. A checkpoint that was saved without the head lacks the model's own prefix.
    """
    root, trunk = _trunk(arch.family)
    if inside := trunk.match(name):
        return f"{root}." + name[inside.end() :]
    name = name.removeprefix("language_model.") if name.startswith("language_model.lm_head.") else name
    return hf_name(arch, "head") if name == _OTHER_HEADS.get(arch.family) else name


@functools.cache
def _trunk(family: str) -> tuple[str, re.Pattern[str]]:
    """Returns the prefix of a family's names, and a pattern that matches any prefix before the rest of a name."""
    names = [stored.name.split(".") for stored in _OTHERS.get(family, _LLAMA).values()]
    root = names[0][0]
    inner = "|".join(sorted({parts[1] for parts in names if parts[0] == root}))
    return root, re.compile(rf"(?:model\.)?(?:language_model\.)?(?:{root}\.)?(?=(?:{inner})\.)")


def is_buffer(arch: Arch, name: str) -> bool:
    """Returns whether a tensor is a constant that follows from config.json."""
    return name.endswith(("rotary_emb.inv_freq", *_BUFFERS.get(arch.family, ())))
