"""A GGUF file's metadata read as an `Arch`: the fields of an HF `config.json`, then `families.arch_from_hf`.

What sets the GGUF architectures apart is the table `GGUF_FAMILIES`. It holds what llama.cpp's converter does
to their weights and what its graphs fix without a metadata key; key names are those of the `gguf` package.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Container
from pathlib import Path
from typing import Any

import numpy as np

from nlae_jax.lm.arch import Arch, Llama3Rope
from nlae_jax.lm.families import arch_from_hf
from nlae_jax.lm.fields import NAMES
from nlae_jax.lm.rope_fields import written_rope
from nlae_jax.lm.writers import part_of
from nlae_jax.runtime.errors import UserError
from nlae_jax.runtime.outside import quoted


@dataclasses.dataclass(frozen=True)
class GgufFamily:
    """One GGUF architecture; the defaults are those of Qwen2."""

    model_type: str  # HF's
    rotary_pairs: bool = False  # rows of queries and keys lie with rotary pairs side by side
    rope_factors: bool = False  # there may be a tensor of factors by which RoPE wavelengths are stretched
    fields: tuple[tuple[str, str], ...] = ()  # metadata key -> config.json field, if the file has the key
    fixed: tuple[tuple[str, Any], ...] = ()  # config.json fields without a key, or the values for missing keys
    window_period: int = 0  # in each group of so many blocks, all but the last have a window; 0: no such pattern
    model_type_with_window: str = ""  # replaces `model_type` in files that name a window
    biases: tuple[tuple[str, str], ...] = (("attention_bias", "blk.0.attn_q.bias"), ("mlp_bias", "blk.0.ffn_up.bias"))
    eps: str = "attention.layer_norm_rms_epsilon"  # the key of what norms add to the variance
    partial_rope: bool = False  # a key says how much of a head turns
    # Where RoPE may be stretched by YaRN: the fields of its parameters that the graph fixes; None: it may not.
    yarn: tuple[tuple[str, Any], ...] | None = None
    rope_by_kind: bool = False  # blocks with a window have the base alone, without the scaling
    names: tuple[tuple[str, str], ...] = ()  # our parameter -> GGUF tensor, where it is not the usual one
    joined: tuple[tuple[str, tuple[str, ...]], ...] = ()  # GGUF tensor -> our parameters in it, one after another
    query_scalar: bool = False  # scores are scaled by a constant of the release
    wide_scale_layers: int = 0  # the release with so many blocks scales by d_model / num_heads, others by head_dim


_SLIDING_WINDOW = ("attention.sliding_window", "sliding_window")
_LOGIT_SOFTCAP = ("final_logit_softcapping", "final_logit_softcapping")

_EXPERTS = (("expert_count", "num_experts"), ("expert_used_count", "num_experts_per_tok"))
_QKV = (
    ("blk.{}.attn_qkv.weight", ("q", "k", "v")),
    ("blk.{}.attn_qkv.bias", ("q_bias", "k_bias", "v_bias")),
)
_LAYER_NORM = "attention.layer_norm_epsilon"

GGUF_FAMILIES: dict[str, GgufFamily] = {
    # Mistral is stored as llama too; its window, where a file names one, is all that sets it apart.
    "llama": GgufFamily(
        "llama", rotary_pairs=True, rope_factors=True, fields=(_SLIDING_WINDOW,), model_type_with_window="mistral"
    ),
    "qwen2": GgufFamily("qwen2"),
    "qwen3": GgufFamily("qwen3"),
    "gemma2": GgufFamily(
        "gemma2",
        fields=(_SLIDING_WINDOW, _LOGIT_SOFTCAP, ("attn_logit_softcapping", "attn_logit_softcapping")),
        window_period=2,
        query_scalar=True,
        wide_scale_layers=46,
    ),
    "gemma3": GgufFamily(
        "gemma3_text",
        fields=(_SLIDING_WINDOW, _LOGIT_SOFTCAP, ("rope.freq_base_swa", "rope_local_base_freq")),
        fixed=(("sliding_window", None),),
        window_period=6,
        query_scalar=True,
        wide_scale_layers=62,
    ),
    "smollm3": GgufFamily("smollm3", rotary_pairs=True, fixed=(("no_rope_layer_interval", 4),)),
    # OLMo 3 is stored as olmo2 with a window.
    "olmo2": GgufFamily(
        "olmo2",
        fields=(_SLIDING_WINDOW,),
        window_period=4,
        model_type_with_window="olmo3",
        biases=(("attention_bias", "blk.0.attn_q.bias"),),
        yarn=(("truncate", True),),
        rope_by_kind=True,
    ),
    "gpt2": GgufFamily("gpt2", fields=(("context_length", "n_positions"),), biases=(), eps=_LAYER_NORM, joined=_QKV),
    "gptneox": GgufFamily(
        "gpt_neox",
        fields=(("use_parallel_residual", "use_parallel_residual"),),
        biases=(("attention_bias", "blk.0.attn_qkv.bias"),),
        eps=_LAYER_NORM,
        partial_rope=True,
        joined=_QKV,
    ),
    "phi3": GgufFamily(
        "phi3",
        fields=(_SLIDING_WINDOW,),
        biases=(),
        partial_rope=True,
        joined=(_QKV[0], ("blk.{}.ffn_up.weight", ("gate", "up"))),
    ),
    "gpt-oss": GgufFamily(
        "gpt_oss",
        fields=(_SLIDING_WINDOW, *_EXPERTS, ("expert_feed_forward_length", "intermediate_size")),
        window_period=2,
        biases=(("attention_bias", "blk.0.attn_q.bias"),),
        yarn=(("truncate", False),),
        names=(("mlp_norm", "blk.{}.post_attention_norm.weight"),),
    ),
    "qwen3moe": GgufFamily(
        "qwen3_moe",
        fields=(*_EXPERTS, ("expert_feed_forward_length", "moe_intermediate_size")),
        fixed=(("norm_topk_prob", True),),
    ),
    "olmoe": GgufFamily("olmoe", fields=_EXPERTS, fixed=(("norm_topk_prob", False),)),
    "granite": GgufFamily(
        "granite",
        rotary_pairs=True,
        fields=(
            ("attention.scale", "attention_multiplier"),
            ("embedding_scale", "embedding_multiplier"),
            ("residual_scale", "residual_multiplier"),
            ("logit_scale", "logits_scaling"),
        ),
    ),
}

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
_MOST = 1 << 24


class _Metadata:
    """The metadata of one architecture, by keys without its name; errors name the file and the whole key."""

    def __init__(self, path: Path, metadata: dict[str, Any], family: str) -> None:
        self._path, self._metadata, self._family = path, metadata, family

    def fail(self, key: str, complaint: str) -> UserError:
        return UserError(f"{self._path}: {self._family}.{key} {complaint}")

    def get(self, key: str, absent: Any = None) -> Any:
        value = self._metadata.get(f"{self._family}.{key}")
        return absent if value is None else value

    def value(self, key: str) -> float | bool:
        """Returns a number or a switch."""
        value = self.get(key)
        return value if isinstance(value, bool) else self.number(key)

    def number(self, key: str, absent: float | None = None) -> float:
        """Returns a number. A float is rounded to the shortest decimal of the same float32: 1e-5, not 9.99…e-06."""
        value = self.get(key, absent)
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

    def refuse_unknown(self, known: Container[str]) -> None:
        """Raises UserError for a key that nobody reads: the maths may depend on it."""
        prefix = f"{self._family}."
        for name, value in self._metadata.items():
            key = name.removeprefix(prefix)
            if name.startswith(prefix) and key not in known and value not in (0, "", [], None):
                raise self.fail(key, f"= {quoted(value)} is not supported; it may change the maths")


def read_gguf_arch(
    path: Path,
    metadata: dict[str, Any],
    tensors: Container[str],
    vocab_size: int,
    rope_factors: np.ndarray | None = None,
) -> Arch:
    """Returns the architecture that GGUF `metadata` describe. It has the biases and the head that are in `tensors`.

    `rope_factors` [head_dim / 2] are the values of rope_freqs.weight. Raises UserError, naming `path` and the
    key, for an architecture or a variant that cannot be run.
    """
    name = metadata.get("general.architecture")
    if not isinstance(name, str) or name not in GGUF_FAMILIES:
        raise UserError(f"{path}: GGUF architecture {quoted(name)} is not supported; {', '.join(GGUF_FAMILIES)} are")
    family, keys = GGUF_FAMILIES[name], _Metadata(path, metadata, name)
    config = _common_fields(keys, family) | _own_fields(keys, family)
    config |= {"vocab_size": vocab_size, "tie_word_embeddings": "output.weight" not in tensors}
    config |= {field: tensor in tensors for field, tensor in family.biases}
    if rope_factors is not None and not np.all(rope_factors == 1):
        config["rope_scaling"] = _llama3_scaling(path, rope_factors, config["head_dim"], config["rope_theta"])
    if family.rope_by_kind and config.get("sliding_window"):
        turned = {"rope_theta": config["rope_theta"]}
        kinds = {
            "full_attention": turned | config["rope_scaling"],
            "sliding_attention": {"rope_type": "default"} | turned,
        }
        config |= {"rope_parameters": kinds, "rope_scaling": None}
    config = _by_family(config)
    known = {*_READ, *_HEAD_SIZES, *_NO_MATHS, "attention.causal", family.eps, *(key for key, _ in family.fields)}
    known |= {_PATTERN} if family.window_period else set()
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
    for key in _HEAD_SIZES:
        if keys.get(key, head_dim) != head_dim and not (family.partial_rope and key == _TURNED):
            raise keys.fail(key, f"should be {head_dim}, the size of a head")
    turned = {"partial_rotary_factor": part_of(keys.size(_TURNED, head_dim), head_dim)} if family.partial_rope else {}
    if keys.get("attention.causal", True) is not True:
        raise keys.fail("attention.causal", "should be true")
    return {
        "hidden_size": d_model,
        "num_hidden_layers": keys.size("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.size("attention.head_count_kv", heads) or heads,
        "head_dim": head_dim,
        "intermediate_size": keys.size("feed_forward_length"),
        "rms_norm_eps": keys.number(family.eps),
        "rope_theta": keys.number("rope.freq_base", 10_000.0),
        "rope_scaling": _scaling(keys, family),
        **turned,
    }


def _scaling(keys: _Metadata, family: GgufFamily) -> dict[str, Any] | None:
    """Returns the fields of RoPE scaling.

    As in llama.cpp, a factor without a type is linear, and a factor of 0 means no scaling.
    """
    kind = keys.get("rope.scaling.type", "linear")
    supported = "none and linear" if family.yarn is None else "none, linear and yarn"
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
