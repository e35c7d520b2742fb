"""Model families: reads an `Arch` from an HF `config.json`, and writes a `config.json` from an `Arch`.

A family has a reader in `FAMILIES`, which makes an `Arch` from the fields of the file, and an entry in
`writers.WRITTEN`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from nlae_jax.lm import mixed_readers, readers
from nlae_jax.lm.arch import Arch
from nlae_jax.lm.fields import NAMES, Fields, required
from nlae_jax.lm.rope_fields import written_rope
from nlae_jax.lm.writers import WRITTEN, own_fields
from nlae_jax.runtime.errors import UserError
from nlae_jax.runtime.outside import quoted, read_json

FAMILIES: dict[str, Callable[[Fields], Arch]] = {
    "llama": readers.llama,
    "mistral": readers.mistral,
    "qwen2": readers.qwen2,
    "qwen3": readers.qwen3,
    "gemma2": readers.gemma2,
    "gemma3_text": readers.gemma3,
    "gemma4_text": mixed_readers.gemma4,
    "gemma4_unified_text": mixed_readers.gemma4,
    "smollm3": readers.smollm3,
    "olmo2": readers.olmo2,
    "gpt2": readers.gpt2,
    "gpt_neox": readers.gpt_neox,
    "olmo3": readers.olmo3,
    "ministral": readers.ministral,
    "ministral3": readers.ministral3,
    "phi3": readers.phi3,
    "granite": readers.granite,
    "granitemoehybrid": readers.granitemoehybrid,
    "qwen3_moe": mixed_readers.qwen3_moe,
    "olmoe": mixed_readers.olmoe,
    "gpt_oss": mixed_readers.gpt_oss,
    "qwen3_5_text": mixed_readers.qwen3_5,
    "qwen3_5_moe_text": mixed_readers.qwen3_5_moe,
}

# Models with a vision tower, and the family of their language model unless `text_config` names one.
_WITH_VISION = {
    "gemma3": "gemma3_text",
    "gemma4": "gemma4_text",
    "gemma4_unified": "gemma4_unified_text",
    "mistral3": "mistral",
    "qwen3_5": "qwen3_5_text",
    "qwen3_5_moe": "qwen3_5_moe_text",
}
# Models with a vision tower whose head is tied unless the file says otherwise.
_TIED = ("gemma3", "gemma4", "gemma4_unified")
# Models whose class in transformers takes logits as the head gives them, whatever the language model's own class does.
_BARE_HEADS = ("gemma3", "mistral3")


def language_config(config: dict[str, Any]) -> dict[str, Any]:
    """Returns the language model's part of an HF `config.json`, which for most models is all of it.

    Raises UserError if the model has a vision tower and its `text_config` is missing or not supported.
    """
    whole = config.get("model_type")
    if not isinstance(whole, str) or whole not in _WITH_VISION:
        return config
    text = required(config, "text_config")
    if not isinstance(text, dict):
        raise UserError("config.json: text_config should be an object")
    family = text.get("model_type", _WITH_VISION[whole])
    if not isinstance(family, str) or family not in FAMILIES:
        raise UserError(f"config.json: text_config.model_type {quoted(family)} is not supported")
    # What is said outside holds for the whole model; inside there may be no more than a default of the class.
    tied = config.get("tie_word_embeddings")
    tied = text.get("tie_word_embeddings", whole in _TIED) if tied is None else tied
    read = {"model_type": family, "architectures": [WRITTEN[family].transformers_class], "tie_word_embeddings": tied}
    return text | read | (dict.fromkeys(("final_logit_softcapping", "logits_scaling")) if whole in _BARE_HEADS else {})


def arch_from_hf(config: dict[str, Any]) -> Arch:
    """Reads the architecture from an HF `config.json`. Raises UserError if it is not supported."""
    config = language_config(config)
    family = config.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise UserError(f"config.json: model_type {quoted(family)} is not supported; supported: {', '.join(FAMILIES)}")
    try:
        fields = Fields(config)
        fields.only("is_causal", True)  # without it, transformers lets tokens of any family see later ones
        arch = FAMILIES[family](fields)
        fields.finish()
    except (TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise UserError(f"config.json: a size or constant is not a sensible number ({error})") from None
    if arch.num_kv_heads < 1 or arch.num_heads % arch.num_kv_heads:
        raise UserError(
            f"config.json: num_attention_heads = {arch.num_heads} should be a multiple of "
            f"num_key_value_heads = {arch.num_kv_heads}"
        )
    return arch


def read_arch(directory: Path) -> Arch:
    """Reads the architecture from the `config.json` of a model directory. Raises UserError that names the directory."""
    config = read_hf_config(directory)
    try:
        arch = arch_from_hf(config)
        if arch.rotary_dim is None and (arch.head_dim % 2 or not arch.head_dim):
            raise UserError(f"config.json: head_dim = {arch.head_dim} should be even and above 0: RoPE turns pairs")
    except UserError as error:
        raise UserError(f"{directory}/{error}") from None
    return arch


def read_hf_config(directory: Path) -> dict[str, Any]:
    """Reads the `config.json` of a model directory. Raises UserError if it is missing or not a JSON object."""
    try:
        return read_json(Path(directory) / "config.json")
    except FileNotFoundError:
        raise UserError(f"{directory}: no config.json there; a model directory in the HF layout has one") from None


def hf_config(arch: Arch) -> dict[str, Any]:
    """Returns the fields of a `config.json` for `arch`: the inverse of `arch_from_hf`.

    Raises ValueError if no config.json of the family describes this architecture.
    """
    written, names = WRITTEN[arch.family], NAMES.get(arch.family, {})
    common = {
        "vocab_size": arch.vocab_size,
        "hidden_size": arch.d_model,
        "num_hidden_layers": arch.num_layers,
        "num_attention_heads": arch.num_heads,
        "num_key_value_heads": arch.num_kv_heads,
        "head_dim": arch.head_dim,
        "intermediate_size": arch.d_ff,
        "rms_norm_eps": arch.norm_eps,
        "rope_theta": arch.rope_theta,
        "tie_word_embeddings": arch.tied_head,
    }
    family_fields = own_fields(arch)
    fields = {key: value for key, value in common.items() if key not in written.lacks}
    fields |= {key.partition("/")[0]: family_fields[key] for key in written.fields}
    config: dict[str, Any] = {"architectures": [written.transformers_class], "model_type": arch.family}
    config |= {names.get(key, key): value for key, value in fields.items()}
    if (scaling := written_rope(arch.rope_scaling)) and "rope_parameters" not in config:
        config["rope_scaling"] = scaling
    if arch_from_hf(config) != arch:
        raise ValueError(f"the config.json of this {arch.family} cannot be written: {arch}")
    return config
