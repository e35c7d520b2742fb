"""A GGUF file's metadata read as an `Arch`: the fields of an HF `config.json`, then `families.arch_from_hf`.

What sets the GGUF architectures apart is the table `families.GGUF_FAMILIES`. Here are those of their keys that take
more than a name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nlae_jax.lm.arch import Arch, Llama3Rope
from nlae_jax.lm.families import arch_from_hf
from nlae_jax.lm.fields import NAMES
from nlae_jax.lm.gguf.families import GGUF_FAMILIES, LONG_FACTORS, ROPE_FACTORS, SHORT_FACTORS, GgufFamily
from nlae_jax.lm.rope_fields import written_rope
from nlae_jax.lm.writers import by_block, part_of
from nlae_jax.runtime.errors import UserError
from nlae_jax.runtime.outside import quoted

_READ = (
    *("embedding_length", "block_count", "feed_forward_length", "attention.head_count", "attention.head_count_kv"),
    *("attention.key_length", "rope.freq_base"),
    *("rope.scaling.type", "rope.scaling.factor", "rope.scale_linear"),
)
# Keys with one value that can be run, where they are there: the size of a head. Of the second a family may read more.
_TURNED = "rope.dimension_count"
_HEAD_SIZES = ("attention.value_length", _TURNED)
_YARN = {"beta_fast": "rope.scaling.yarn_beta_fast", "beta_slow": "rope.scaling.yarn_beta_slow"}
_YARN_FACTORS = ("rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor")  # of older and newer converters
_NO_MATHS = (
    *("context_length", "vocab_size", "pooling_type", "tensor_data_layout"),
    *("rope.scaling.original_context_length", "rope.scaling.finetuned"),
)
_PATTERN = "attention.sliding_window_pattern"
_DRAFTS = "nextn_predict_layers"
_EXPERT_WIDTH = "expert_feed_forward_length"
_MOST = 1 << 24


class _Metadata:
    """The metadata of one architecture, by keys without its name; errors name the file and the whole key."""

    def __init__(self, path: Path, metadata: dict[str, Any], family: str) -> None:
        self._path, self._metadata, self._family = path, metadata, family
        self._read: set[str] = set()

    def fail(self, key: str, complaint: str) -> UserError:
        return UserError(f"{self._path}: {self._family}.{key} {complaint}")

    def get(self, key: str, absent: Any = None) -> Any:
        self._read.add(key)
        value = self._metadata.get(f"{self._family}.{key}")
        return absent if value is None else value

    def value(self, key: str) -> float | bool:
        """Returns a number or a switch."""
        value = self.get(key)
        return value if isinstance(value, bool) else self.number(key)

    def number(self, key: str, absent: float | None = None) -> float:
        """Returns a number. A float is rounded to the shortest decimal of the same float32: 1e-5, not 9.99…e-06."""
        value = self.get(key, absent)
        if isinstance(value, list) and value and all(entry == value[0] for entry in value):
            value = value[0]  # one for each block
        if value is None:
            raise UserError(f"{self._path}: the GGUF metadata lack {self._family}.{key}")
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.fail(key, f"should be one number, not {quoted(value)}")
        return value if isinstance(value, int) else float(str(np.float32(value)))

    def size(self, key: str, absent: int | None = None) -> int:
        """Returns a whole number within wide bounds. `families` checks the bounds of each field."""
        value = self.number(key, absent)
        if not 0 <= value <= _MOST or value != int(value):
            raise self.fail(key, f"should be a whole number from 0 to {_MOST}, not {quoted(value)}")
        return int(value)

    def refuse_unknown(self, known: set[str]) -> None:
        """Raises UserError for a key that nobody reads: the maths may depend on it."""
        prefix = f"{self._family}."
        for name, value in self._metadata.items():
            key = name.removeprefix(prefix)
            if name.startswith(prefix) and key not in {*known, *self._read} and value not in (0, "", [], None):
                raise self.fail(key, f"= {quoted(value)} is not supported; it may change the maths")


def read_gguf_arch(
    path: Path,
    metadata: dict[str, Any],
    tensors: Container[str],
    vocab_size: int,
    rope_tensors: Mapping[str, np.ndarray] | None = None,
) -> Arch:
    """Returns the architecture that GGUF `metadata` describe. It has the biases and the head that are in `tensors`.

    `rope_tensors` has the values of tensors with RoPE's constants, each [head_dim / 2], by their names. Raises
    UserError, naming `path` and the key, for an architecture or a variant that cannot be run.
    """
    name = metadata.get("general.architecture")
    if not isinstance(name, str) or name not in GGUF_FAMILIES:
        raise UserError(f"{path}: GGUF architecture {quoted(name)} is not supported; {', '.join(GGUF_FAMILIES)} are")
    family, keys = GGUF_FAMILIES[name], _Metadata(path, metadata, name)
    factors = rope_tensors or {}
    config = _common_fields(keys, family) | _own_fields(keys, family)
    keys.size("context_length", 0)  # not part of the maths, but the converted model's files have it
    if family.model_type in _MORE:
        config |= _MORE[family.model_type](keys, config, tensors, factors)
    config |= {"vocab_size": vocab_size, "tie_word_embeddings": "output.weight" not in tensors}
    config |= {field: tensor in tensors for field, tensor in family.biases}
    if name == "llama" and not np.all(factors.get(ROPE_FACTORS, 1) == 1):
        config["rope_scaling"] = _llama3_scaling(path, factors[ROPE_FACTORS], config["head_dim"], config["rope_theta"])
    if family.rope_by_kind and config.get("sliding_window"):
        turned = {"rope_theta": config["rope_theta"]}
        kinds = {
            "full_attention": turned | config["rope_scaling"],
            "sliding_attention": {"rope_type": "default"} | turned,
        }
        config |= {"rope_parameters": kinds, "rope_scaling": None}
    config = _by_family(config)
    known = {*_READ, *_HEAD_SIZES, *_NO_MATHS, "attention.causal", family.eps, *(key for key, _ in family.fields)}
    known |= {*family.ignored, *({_PATTERN} if family.window_period else ())}
    keys.refuse_unknown(known | ({*_YARN.values(), *_YARN_FACTORS} if family.yarn is not None else set()))
    try:
        return arch_from_hf(config)
    except UserError as error:
        raise UserError(f"{path}: its {name} metadata describe no model that can be run ({error})") from None


def _by_family(config: dict[str, Any]) -> dict[str, Any]:
    """Renames fields as the family names them. A field keeps its name if the config has the family's name, too."""
    names = NAMES.get(config["model_type"], {})
    return {key if (name := names.get(key, key)) in config else name: value for key, value in config.items()}


def _common_fields(keys: _Metadata, family: GgufFamily) -> dict[str, Any]:
    """Returns the fields that every family has: sizes and RoPE."""
    d_model, heads = keys.size("embedding_length"), keys.size("attention.head_count")
    if heads < 1:
        raise keys.fail("attention.head_count", "should be at least 1")
    head_dim = keys.size("attention.key_length", d_model // heads)
    _check_head_sizes(keys, head_dim, family.partial_rope)
    turned = {"partial_rotary_factor": part_of(keys.size(_TURNED, head_dim), head_dim)} if family.partial_rope else {}
    if keys.get("attention.causal", True) is not True:
        raise keys.fail("attention.causal", "should be true")
    return {
        "hidden_size": d_model,
        "num_hidden_layers": keys.size("block_count") - (keys.size(_DRAFTS, 0) if family.drafts else 0),
        "num_attention_heads": heads,
        "num_key_value_heads": 0 if family.head_parts else keys.size("attention.head_count_kv", heads) or heads,
        "head_dim": head_dim,
        "intermediate_size": _mlp_width(keys, family),
        "rms_norm_eps": keys.number(family.eps),
        "rope_theta": keys.number("rope.freq_base", 10_000.0),
        "rope_scaling": _scaling(keys, family),
        **turned,
    }


def _mlp_width(keys: _Metadata, family: GgufFamily) -> int:
    """Returns the width of an MLP, which a file without MLPs beside its experts may leave out.

    The width of experts is read for such families alone: what has been read is not refused as unknown.
    """
    if family.all_experts:
        return keys.size("feed_forward_length", keys.size(_EXPERT_WIDTH))
    return keys.size("feed_forward_length")


def _check_head_sizes(keys: _Metadata, head_dim: int, partial_rope: bool = False, suffix: str = "") -> None:
    for key in _HEAD_SIZES:
        if keys.get(key + suffix, head_dim) != head_dim and not (partial_rope and key == _TURNED):
            raise keys.fail(key + suffix, f"should be {head_dim}, the size of a head")


def _scaling(keys: _Metadata, family: GgufFamily) -> dict[str, Any] | None:
    """Returns the fields of RoPE scaling.

    As in llama.cpp, a factor without a type is linear, and a factor of 0 means no scaling.
    """
    kind = keys.get("rope.scaling.type", "linear")
    supported = "none and linear" if family.yarn is None else "none, linear and yarn"
    if kind == "longrope" and LONG_FACTORS in family.rope_tensors:
        return None  # the tensors say more
    if kind not in ("none", "linear") and (kind != "yarn" or family.yarn is None):
        raise keys.fail("rope.scaling.type", f"{quoted(kind)} is not supported; {supported} are")
    factor = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 0.0))
    if kind == "yarn":
        return _yarn(keys, factor, dict(family.yarn or ()))
    if kind == "linear" and factor not in (0, 1):
        return {"rope_type": "linear", "factor": factor}
    return None if family.yarn is None else {"rope_type": "default"}  # or a family might have one by default


def _yarn(keys: _Metadata, factor: float, fixed: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields of YaRN. The attention factor always follows from `factor`.

    A file may name this attention factor, or 1, by which llama.cpp multiplies it. Raises UserError for another value.
    """
    usual = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
    for key in _YARN_FACTORS:
        named = keys.number(key, 1.0)
        if not math.isclose(named, 1.0) and not math.isclose(named, usual, rel_tol=1e-5):
            raise keys.fail(key, f"= {named} is not supported; 1 and {usual:.6g} are")
    betas = {field: keys.number(key) for field, key in _YARN.items() if keys.get(key) is not None}
    original = keys.size("rope.scaling.original_context_length")
    return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original, **betas, **fixed}


def _own_fields(keys: _Metadata, family: GgufFamily) -> dict[str, Any]:
    """Returns the fields that only some families have."""
    fields = dict(family.fixed) | {field: keys.value(key) for key, field in family.fields if keys.get(key) is not None}
    fields["model_type"] = family.model_type
    window = fields.get("sliding_window")
    if family.model_type_with_window:
        fields["model_type"] = family.model_type_with_window if window else family.model_type
        fields["sliding_window"] = window or None
    layers = keys.size("block_count")
    if family.window_period and (window or not family.model_type_with_window):
        has_no_window = "sliding_window" in fields and not window
        sliding = [False] * layers if has_no_window else _sliding(keys, family.window_period, layers)
        fields["layer_types"] = ["sliding_attention" if is_sliding else "full_attention" for is_sliding in sliding]
    if family.query_scalar:
        per_head = keys.size("embedding_length") // keys.size("attention.head_count")
        head_dim = keys.size("attention.key_length", per_head)
        fields["query_pre_attn_scalar"] = per_head if layers == family.wide_scale_layers else head_dim
    return fields


def _sliding(keys: _Metadata, period: int, layers: int) -> list[bool]:
    """Returns which blocks have a window: those that the file lists, or all but the last of every `period`."""
    pattern = keys.get(_PATTERN, period)
    if isinstance(pattern, list):
        if len(pattern) != layers:
            raise keys.fail(_PATTERN, f"should have {layers} entries, one a block; it has {len(pattern)}")
        return [bool(is_sliding) for is_sliding in pattern]
    period = keys.size(_PATTERN, period)
    return [not period or layer % period < period - 1 for layer in range(layers)]


def _granite(keys: _Metadata, *_: Any) -> dict[str, Any]:
    if keys.get("rope.scaling.finetuned", True) is not True:
        raise keys.fail("rope.scaling.finetuned", "= False, attention without RoPE, is not supported")
    return {}


def _ministral3(keys: _Metadata, config: dict[str, Any], *_: Any) -> dict[str, Any]:
    beta, stretched = keys.number("attention.temperature_scale", 0.0), dict(config["rope_scaling"])
    if not beta:
        return {"model_type": "mistral", "sliding_window": None}
    stretched |= {"mscale_all_dim": keys.number("rope.scaling.yarn_log_multiplier", 0.0)}
    return {"rope_scaling": stretched | {"llama_4_scaling_beta": beta}}


def _phi3(keys: _Metadata, _: Any, __: Any, factors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Returns the fields of LongRoPE, or none where the file has no factors of it."""
    named = {"long_factor": LONG_FACTORS, "short_factor": SHORT_FACTORS}
    if not factors and keys.get("rope.scaling.type") != "longrope":
        return {}
    if missing := sorted(set(named.values()) - set(factors)):
        raise keys.fail("rope.scaling.type", f"is longrope, and the GGUF lacks the tensor {missing[0]}")
    scaling: dict[str, Any] = {key: [float(str(factor)) for factor in factors[name]] for key, name in named.items()}
    original, factor = keys.size("rope.scaling.original_context_length"), keys.number("rope.scaling.attn_factor", 1.0)
    context = keys.size("context_length", original)
    grown = math.sqrt(1 + math.log(context / original) / math.log(original)) if context > original > 1 else 1.0
    usual = math.isclose(factor, grown, rel_tol=1e-6)  # then the exact number, which the file has as a float32
    scaling |= {"rope_type": "longrope"} | ({} if usual else {"attention_factor": factor})
    lengths = {"max_position_embeddings": context, "original_max_position_embeddings": original}
    return lengths | {"rope_scaling": scaling}


def _qwen3_5(keys: _Metadata, config: dict[str, Any], *_: Any) -> dict[str, Any]:
    """Returns the fields of DeltaNet: its sizes, and which blocks have it."""
    value_heads, layers = keys.size("ssm.time_step_rank"), config["num_hidden_layers"]
    every = keys.size("full_attention_interval", 4)
    recurrent = keys.get("attention.recurrent_layers", [bool(every and (n + 1) % every) for n in range(layers)])
    if not isinstance(recurrent, list):
        raise keys.fail("attention.recurrent_layers", f"should be a list, not {quoted(recurrent)}")
    inner = keys.size("ssm.inner_size")
    if not value_heads or inner % value_heads:
        raise keys.fail("ssm.inner_size", f"= {inner} should be a multiple of ssm.time_step_rank = {value_heads}")
    return {
        "layer_types": ["linear_attention" if has_state else "full_attention" for has_state in recurrent[:layers]],
        "linear_conv_kernel_dim": keys.size("ssm.conv_kernel"),
        "linear_num_key_heads": keys.size("ssm.group_count"),
        "linear_num_value_heads": value_heads,
        "linear_key_head_dim": keys.size("ssm.state_size"),
        "linear_value_head_dim": inner // value_heads,
    }


def _qwen3_5_moe(keys: _Metadata, config: dict[str, Any], *_: Any) -> dict[str, Any]:
    sizes = {
        "num_experts": "expert_count",
        "num_experts_per_tok": "expert_used_count",
        "moe_intermediate_size": _EXPERT_WIDTH,
        "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
    }
    return _qwen3_5(keys, config) | {field: keys.size(key) for field, key in sizes.items()}


def _gemma4(
    keys: _Metadata, config: dict[str, Any], tensors: Container[str], factors: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """Returns the fields of heads of two sizes, of RoPE of two kinds, and of experts beside the MLP."""
    layers, wide = config["num_hidden_layers"], config["head_dim"]
    narrow = keys.size("attention.key_length_swa")
    _check_head_sizes(keys, narrow, suffix="_swa")
    sliding = _sliding(keys, 6, layers)
    narrow_heads, wide_heads = _heads_by_kind(keys, sliding)
    pairs = _turned_pairs(keys, factors.get(ROPE_FACTORS, np.ones(wide // 2)), wide)
    full = [block for block, slides in enumerate(sliding) if not slides]
    experts = {
        "enable_moe_block": keys.size("expert_count", 0) > 0,
        "num_experts": keys.size("expert_count", 0) or None,
        "top_k_experts": keys.size("expert_used_count", 0) or None,
        "moe_intermediate_size": keys.size(_EXPERT_WIDTH, 0) or None,
    }
    return experts | {
        "head_dim": narrow,
        "global_head_dim": wide,
        "num_key_value_heads": narrow_heads,
        "per_layer_config": by_block({n: {"head_dim": wide, "num_key_value_heads": wide_heads} for n in full}),
        "attention_k_eq_v": f"blk.{full[0]}.attn_v.weight" not in tensors,
        "layer_types": ["sliding_attention" if slides else "full_attention" for slides in sliding],
        "num_kv_shared_layers": keys.size("attention.shared_kv_layers", 0),
        "hidden_size_per_layer_input": keys.size("embedding_length_per_layer_input", 0),
        "rope_scaling": None,
        "rope_parameters": {
            "sliding_attention": {
                "rope_type": "default",
                "rope_theta": keys.number("rope.freq_base_swa", config["rope_theta"]),
            },
            "full_attention": {
                "rope_type": "proportional",
                "rope_theta": config["rope_theta"],
                "partial_rotary_factor": part_of(2 * pairs, wide),
            },
        },
    }


def _heads_by_kind(keys: _Metadata, sliding: list[bool]) -> tuple[int, int]:
    """Returns the numbers of key heads in blocks with a window, and in those without."""
    key = "attention.head_count_kv"
    listed = keys.get(key)
    by_block = listed if isinstance(listed, list) else [keys.size(key)] * len(sliding)
    if len(by_block) != len(sliding):
        raise keys.fail(key, f"should have {len(sliding)} entries, one a block; it has {len(by_block)}")
    narrow, wide = (
        {heads for heads, slides in zip(by_block, sliding, strict=True) if slides is has_window}
        for has_window in (True, False)
    )
    if len(wide) != 1 or len(narrow) > 1:
        raise keys.fail(key, "should be one number for blocks with a window, and one for those without, the last block")
    return min(narrow or wide), min(wide)


def _turned_pairs(keys: _Metadata, factors: np.ndarray, head_dim: int) -> int:
    """Returns how many rotary pairs of a head turn. The wavelengths of the other pairs are stretched by 1e30."""
    pairs = int((factors == 1).sum())
    if factors.shape != (head_dim // 2,) or (factors[:pairs] != 1).any() or (factors[pairs:] < 1e29).any():
        raise keys.fail("rope.freq_base", f"is scaled by {ROPE_FACTORS}, which should hold ones and then 1e30")
    return pairs


_More = Callable[[_Metadata, dict[str, Any], Container[str], Mapping[str, np.ndarray]], dict[str, Any]]
_MORE: dict[str, _More] = {
    "granite": _granite,
    "ministral3": _ministral3,
    "phi3": _phi3,
    "qwen3_5_text": _qwen3_5,
    "qwen3_5_moe_text": _qwen3_5_moe,
    "gemma4_text": _gemma4,
}


def _llama3_scaling(path: Path, factors: np.ndarray, head_dim: int, theta: float) -> dict[str, Any] | None:
    """Returns the fields of Llama 3's RoPE scaling, of which a GGUF holds only the resulting factors.

    All releases of Llama 3 share three of the four constants; the fourth is the largest factor. Raises UserError if the
    constants do not reproduce the factors, because the model would silently compute something else.
    """
    scaling = Llama3Rope(float(factors.max()), low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=8192)
    wavelengths = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    kept = (scaling.original_max_positions / wavelengths - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    kept = np.clip(kept, 0, 1)
    expected = 1 / ((1 - kept) / scaling.factor + kept)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-3):
        raise UserError(
            f"{path}: the RoPE factors in rope_freqs.weight are not those of Llama 3; other factors are not supported"
        )
    return written_rope(scaling)
