"""The tokenizer inside a GGUF file, written as the files that `transformers` loads.

Three kinds, by `tokenizer.ggml.model`: gpt2 is byte-level BPE with merges, whose rules of splitting are named by
`tokenizer.ggml.pre`; llama is SentencePiece BPE, which has a score per token in place of merges; gemma4 is the same
with merges.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from nlae_jax.runtime.errors import UserError
from nlae_jax.runtime.outside import quoted

# Token types of the GGUF specification.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
# Those matched as a whole, before anything is merged.
_WHOLE = (_UNKNOWN, _CONTROL, _USER_DEFINED)
_SPACE = "\u2581"  # how SentencePiece writes a space

# Words with a leading space or mark, digits in groups of `{digits}`, punctuation, and white space.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{digits}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GROUPED_DIGITS, _SINGLE_DIGITS = _WORDS.replace("{digits}", "{1,3}"), _WORDS.replace("{digits}", "")
# Like the latter, with combining marks as parts of words.
_MARKED_WORDS = _SINGLE_DIGITS.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(
    r"[^\s\p{L}\p{N}]", r"[^\s\p{L}\p{M}\p{N}]"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
# Like those, but a word ends where a capital follows a small letter.
_CAPITALS = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# And like those, with a contraction's end kept on the word and digits in groups.
_CONTRACTED = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTED}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTED}|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclasses.dataclass(frozen=True)
class _Rules:
    """One value of `tokenizer.ggml.pre`."""

    split: str = ""  # the pattern of a word; empty: GPT-2's
    single_digits: bool = False  # cut off before that
    whole_words: bool = False  # a word that is a token is not put together by merges
    adds_bos: bool = False  # where the file does not say
    nfc: bool = False  # text is normalised first


_LLAMA3 = _Rules(_GROUPED_DIGITS, whole_words=True, adds_bos=True)
_PRE: dict[str, _Rules] = {
    "gpt-2": _Rules(),
    "olmo": _Rules(),
    "smollm": _Rules(single_digits=True),
    "refact": _Rules(single_digits=True),  # Granite 3
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "smaug-bpe": _Rules(_GROUPED_DIGITS),  # SmolLM3
    "dbrx": _Rules(_GROUPED_DIGITS),  # OLMo 2
    "qwen2": _Rules(_SINGLE_DIGITS, nfc=True),
    "qwen35": _Rules(_MARKED_WORDS, nfc=True),
    "gpt-4o": _Rules(_O200K),  # gpt-oss
    "tekken": _Rules(_CAPITALS, whole_words=True, adds_bos=True),
}


def _is_list_of(*kinds: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(type(item) in kinds for item in value)


# Key -> the type of its value, in words and as a test.
_Kind = tuple[str, Callable[[Any], bool]]
_TEXT: _Kind = ("a text", lambda value: isinstance(value, str))
_SWITCH: _Kind = ("true or false", lambda value: isinstance(value, bool))
_ID: _Kind = ("a whole number", lambda value: type(value) is int)
_TEXTS: _Kind = ("a list of texts", _is_list_of(str))
_KINDS: dict[str, _Kind] = {
    "tokenizer.ggml.model": _TEXT,
    "tokenizer.ggml.pre": _TEXT,
    "tokenizer.ggml.tokens": _TEXTS,
    "tokenizer.ggml.merges": _TEXTS,
    "tokenizer.ggml.token_type": ("a list of whole numbers", _is_list_of(int)),
    "tokenizer.ggml.scores": (
        "a list of finite numbers",
        lambda value: _is_list_of(int, float)(value) and all(map(math.isfinite, value)),
    ),
    "tokenizer.ggml.add_bos_token": _SWITCH,
    "tokenizer.ggml.add_space_prefix": _SWITCH,
    "tokenizer.chat_template": _TEXT,
    **{f"tokenizer.ggml.{role}_token_id": _ID for role in ("bos", "eos", "padding", "unknown")},
}

# Ids that llama.cpp takes where a file does not name them, by tokenizer.ggml.model.
_DEFAULT_IDS: dict[str, dict[str, int]] = {"gpt2": {}, "llama": {"bos": 1, "eos": 2, "unknown": 0}, "gemma4": {}}
_SENTENCEPIECE = ("llama", "gemma4")  # text in place of bytes, and spaces written as SentencePiece does


def write_tokenizer(path: Path, metadata: dict[str, Any], directory: Path) -> dict[str, int]:
    """Writes tokenizer.json and tokenizer_config.json; returns config.json's `bos_token_id` and the like.

    A beginning-of-text token is named in tokenizer_config.json only where the tokenizer adds it or the chat
    template asks for it: readers take a named one for one that is added. Raises UserError, naming the GGUF
    metadata key, for a tokenizer that cannot be rebuilt.
    """
    _check_kinds(path, metadata)
    model = metadata.get("tokenizer.ggml.model")
    if model not in _DEFAULT_IDS:
        raise UserError(
            f"{path}: tokenizer.ggml.model {model!r} is not supported; gpt2 (byte-level BPE), llama "
            "(SentencePiece BPE) and gemma4 are"
        )
    tokens, types = _vocabulary(path, metadata)
    ids = {role: _token_id(path, metadata, role, len(tokens)) for role in ("bos", "eos", "padding", "unknown")}
    tokenizer, adds_bos = _tokenizer(path, metadata, tokens, types, _token(tokens, ids["unknown"]))
    bos = ids["bos"]
    adds_bos = bool(metadata.get("tokenizer.ggml.add_bos_token", adds_bos)) and bos is not None
    if adds_bos and bos is not None:
        _add_bos(tokenizer, tokens[bos], bos)
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


def _check_kinds(path: Path, metadata: dict[str, Any]) -> None:
    """Raises UserError that names the first key of the tokenizer whose value has another type than the format says."""
    for key, (kind, fits) in _KINDS.items():
        if (value := metadata.get(key)) is not None and not fits(value):
            raise UserError(f"{path}: {key} should be {kind}; it is {quoted(value)}")


def _vocabulary(path: Path, metadata: dict[str, Any]) -> tuple[list[str], list[int]]:
    """Tokens in the order of their ids, and the type of each."""
    tokens, types = (_required(path, metadata, key) for key in ("tokens", "token_type"))
    if metadata["tokenizer.ggml.model"] in _SENTENCEPIECE and len(types) == len(tokens):
        # User-defined pieces are matched in the text as it stands; older files have SentencePiece's spaces there.
        spelt = zip(tokens, types, strict=True)
        tokens = [token.replace(_SPACE, " ") if kind == _USER_DEFINED else token for token, kind in spelt]
    if len(types) != len(tokens) or len(set(tokens)) != len(tokens):
        raise UserError(f"{path}: tokenizer.ggml.tokens should be distinct, with one tokenizer.ggml.token_type each")
    return tokens, types


def _required(path: Path, metadata: dict[str, Any], key: str) -> list[Any]:
    if not metadata.get(f"tokenizer.ggml.{key}"):
        raise UserError(f"{path}: the GGUF metadata lack tokenizer.ggml.{key}")
    return metadata[f"tokenizer.ggml.{key}"]


def _token_id(path: Path, metadata: dict[str, Any], role: str, size: int) -> int | None:
    key = f"tokenizer.ggml.{role}_token_id"
    value = metadata.get(key, _DEFAULT_IDS[metadata["tokenizer.ggml.model"]].get(role))
    if value is not None and not 0 <= value < size:
        raise UserError(f"{path}: {key} should be below {size}, the number of tokens; it is {value}")
    return None if value is None else int(value)


def _token(tokens: list[str], index: int | None) -> str | None:
    return None if index is None else tokens[index]


def _tokenizer(
    path: Path, metadata: dict[str, Any], tokens: list[str], types: list[int], unknown: str | None
) -> tuple[Tokenizer, bool]:
    """Returns the tokenizer, and whether it adds a beginning-of-text token by default."""
    if metadata["tokenizer.ggml.model"] in _SENTENCEPIECE:
        tokenizer, adds_bos = _sentencepiece_bpe(path, metadata, tokens, types, unknown), True
    else:
        rules = _rules(path, metadata)
        tokenizer, adds_bos = _byte_level_bpe(path, metadata, tokens, rules), rules.adds_bos
    whole = [(token, kind) for token, kind in zip(tokens, types, strict=True) if kind in _WHOLE]
    tokenizer.add_tokens([AddedToken(token, special=kind != _USER_DEFINED, normalized=False) for token, kind in whole])
    return tokenizer, adds_bos


def _rules(path: Path, metadata: dict[str, Any]) -> _Rules:
    name = metadata.get("tokenizer.ggml.pre")
    if name not in _PRE:
        raise UserError(f"{path}: tokenizer.ggml.pre {name!r} is not supported; {', '.join(_PRE)} are")
    return _PRE[name]


def _byte_level_bpe(path: Path, metadata: dict[str, Any], tokens: list[str], rules: _Rules) -> Tokenizer:
    vocabulary = {token: index for index, token in enumerate(tokens)}
    bpe = _bpe(path, vocabulary, _merges(path, metadata), ignore_merges=rules.whole_words)
    tokenizer = Tokenizer(bpe)
    steps: list[Any] = [_byte_level(use_regex=not rules.split)]
    if rules.split:
        steps.insert(0, pre_tokenizers.Split(Regex(rules.split), behavior="isolated"))
    if rules.single_digits:
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    tokenizer.pre_tokenizer = steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)
    if rules.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _merges(path: Path, metadata: dict[str, Any]) -> list[tuple[str, str]]:
    parts = (merge.partition(" ") for merge in _required(path, metadata, "merges"))
    return [(first, second) for first, _, second in parts]


def _bpe(path: Path, vocabulary: dict[str, int], merges: list[tuple[str, str]], **options: Any) -> models.BPE:
    try:
        return models.BPE(vocab=vocabulary, merges=merges, **options)
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise UserError(f"{path}: tokenizer.ggml.merges do not fit tokenizer.ggml.tokens ({error})") from None


def _sentencepiece_bpe(
    path: Path, metadata: dict[str, Any], tokens: list[str], types: list[int], unknown: str | None
) -> Tokenizer:
    """Makes BPE over characters. A character without a token becomes tokens of its bytes, such as <0x0A>."""
    if merged := metadata["tokenizer.ggml.model"] == "gemma4":
        merges = _merges(path, metadata)
    else:
        scores = _required(path, metadata, "scores")
        if len(scores) != len(tokens):
            raise UserError(f"{path}: tokenizer.ggml.scores should have one number for each of tokenizer.ggml.tokens")
        merges = _merges_from_scores(tokens, types, scores)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    bpe = _bpe(path, vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    # Llama 2 reads a text as if a space stood before it, and so each piece between special tokens; Gemma does not.
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", not merged))
    spaces = normalizers.Replace(" ", _SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces]) if prefix else spaces
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return tokenizer


def _merges_from_scores(tokens: list[str], types: list[int], scores: list[float]) -> list[tuple[str, str]]:
    """Returns the merges in their order of priority: as in SentencePiece, the token with the highest score first.

    Files made without SentencePiece's model give all tokens the same score. Their ids are in the order of priority.
    """
    known = {token for token, kind in zip(tokens, types, strict=True) if kind == _NORMAL}
    order = sorted((-score, index) for index, score in enumerate(scores) if types[index] == _NORMAL)
    return [
        (tokens[index][:cut], tokens[index][cut:])
        for _, index in order
        for cut in range(len(tokens[index]) - 1, 0, -1)
        if tokens[index][:cut] in known and tokens[index][cut:] in known
    ]


def _byte_level(use_regex: bool) -> pre_tokenizers.ByteLevel:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def _add_bos(tokenizer: Tokenizer, token: str, index: int) -> None:
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token}:1 $B:1", special_tokens=[(token, index)]
    )
