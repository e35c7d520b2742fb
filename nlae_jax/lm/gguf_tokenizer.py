"""The tokenizer inside a GGUF file, written as the files that `transformers` loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from nlae_jax.errors import UserError

# Token types of the GGUF specification that are matched as a whole, before byte-pair merging.
_CONTROL, _USER_DEFINED = 3, 4

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def write_tokenizer(path: Path, metadata: dict[str, Any], directory: Path) -> dict[str, int]:
    """Writes tokenizer.json and tokenizer_config.json; returns config.json's `bos_token_id` and the like.

    A beginning-of-text token is named in tokenizer_config.json only where the tokenizer adds it or the chat
    template asks for it: readers take a named one for one that is added. Raises UserError, naming the GGUF
    metadata key, for a tokenizer that cannot be rebuilt.
    """
    tokens, types = _vocabulary(path, metadata)
    ids = {role: _token_id(path, metadata, role, len(tokens)) for role in ("bos", "eos", "padding", "unknown")}
    tokenizer = _byte_level_bpe(path, metadata, tokens)
    for token, kind in zip(tokens, types, strict=True):
        if kind in (_CONTROL, _USER_DEFINED):
            tokenizer.add_tokens([AddedToken(token, special=kind == _CONTROL, normalized=False)])
    adds_bos = bool(metadata.get("tokenizer.ggml.add_bos_token", _is_llama3(metadata))) and ids["bos"] is not None
    if adds_bos:
        _add_bos(tokenizer, tokens[ids["bos"]], ids["bos"])
    tokenizer.save(str(directory / "tokenizer.json"))

    template = metadata.get("tokenizer.chat_template")
    names_bos = adds_bos or "bos_token" in (template or "")
    pad = ids["padding"] if ids["padding"] is not None else ids["eos"]
    config = {
        # Not the family's own class: that one rebuilds the splitting rules instead of reading tokenizer.json.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": adds_bos,
        "bos_token": tokens[ids["bos"]] if names_bos and ids["bos"] is not None else None,
        "eos_token": _token(tokens, ids["eos"]),
        "pad_token": _token(tokens, pad),
        "unk_token": _token(tokens, ids["unknown"]),
        "chat_template": template,
        "clean_up_tokenization_spaces": False,
    }
    if length := metadata.get(f"{metadata['general.architecture']}.context_length"):
        config["model_max_length"] = int(length)
    config = {key: value for key, value in config.items() if value is not None}
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (directory / "tokenizer_config.json").write_text(text, encoding="utf-8")
    special = {"bos_token_id": ids["bos"], "eos_token_id": ids["eos"], "pad_token_id": pad}
    return {key: value for key, value in special.items() if value is not None}


def _vocabulary(path: Path, metadata: dict[str, Any]) -> tuple[list[str], list[int]]:
    """Tokens in the order of their ids, and the type of each."""
    for key in ("tokens", "token_type", "merges"):
        if not metadata.get(f"tokenizer.ggml.{key}"):
            raise UserError(f"{path}: the GGUF metadata lack tokenizer.ggml.{key}")
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    if len(types) != len(tokens) or len(set(tokens)) != len(tokens):
        raise UserError(f"{path}: tokenizer.ggml.tokens should be distinct, with one tokenizer.ggml.token_type each")
    return tokens, types


def _token_id(path: Path, metadata: dict[str, Any], role: str, size: int) -> int | None:
    key = f"tokenizer.ggml.{role}_token_id"
    value = metadata.get(key)
    if value is not None and not 0 <= value < size:
        raise UserError(f"{path}: {key} should be below {size}, the number of tokens; it is {value}")
    return None if value is None else int(value)


def _token(tokens: list[str], index: int | None) -> str | None:
    return None if index is None else tokens[index]


def _is_llama3(metadata: dict[str, Any]) -> bool:
    return metadata.get("tokenizer.ggml.pre") in ("llama-bpe", "llama3", "llama-v3")


def _byte_level_bpe(path: Path, metadata: dict[str, Any], tokens: list[str]) -> Tokenizer:
    model, rules = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if model != "gpt2":
        raise UserError(f"{path}: tokenizer.ggml.model {model!r} is not supported; gpt2 (byte-level BPE) is")
    if rules == "smollm":
        split = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _byte_level(use_regex=True)])
    elif rules == "gpt-2":
        split = _byte_level(use_regex=True)
    elif _is_llama3(metadata):
        isolated = pre_tokenizers.Split(Regex(_LLAMA3_SPLIT), behavior="isolated")
        split = pre_tokenizers.Sequence([isolated, _byte_level(use_regex=False)])
    else:
        raise UserError(f"{path}: tokenizer.ggml.pre {rules!r} is not supported; smollm, gpt-2 and llama-bpe are")
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    try:
        # Llama 3 looks a whole word up before it merges.
        bpe = models.BPE(vocab=vocabulary, merges=merges, ignore_merges=_is_llama3(metadata))
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise UserError(f"{path}: tokenizer.ggml.merges do not fit tokenizer.ggml.tokens ({error})") from None
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _byte_level(use_regex: bool) -> pre_tokenizers.ByteLevel:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def _add_bos(tokenizer: Tokenizer, token: str, index: int) -> None:
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token}:1 $B:1", special_tokens=[(token, index)]
    )
