"""The protocol of encoder and decoder: prompts as token ids, the slot, the tags, the injection scale.

Encoder prompts differ between activations only at one position, the slot. It is stored as `prefix` (the
tokens before the slot) and `tail` (the tokens after it). The tail ends in the opening tag, which is part of the prompt
and not sampled. The decoder's prompt is `prefix`, explanation, `suffix`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from nlae_jax.config import ProtocolConfig
from nlae_jax.lm.chat import prompts_ids
from nlae_jax.lm.tokens import begin_ids, check_ids, text_ids
from nlae_jax.runtime.errors import UserError
from nlae_jax.runtime.files import AnyPath, read_text
from nlae_jax.runtime.outside import encodable, parse_json, quoted

OPENING, CLOSING = "<explanation>\n", "</explanation>"

# The ranges of characters searched for a marker: enclosed CJK first, as in the reference, then symbols.
_MARKER_RANGES = ((0x3200, 0x3400), (0x2000, 0x3000))

_MARKERS_AT_ONCE = 32  # rendered in one call: nearly always the first of them fits, so more would be wasted


# A field's type -> a test whether a value read from JSON has that type.
_IS: dict[str, Callable[[Any], bool]] = {
    "str": lambda value: isinstance(value, str),
    "int": lambda value: type(value) is int,
    "float": lambda value: type(value) in (int, float),
    "tuple[int, ...]": lambda value: isinstance(value, list) and all(type(item) is int for item in value),
}


@dataclasses.dataclass(frozen=True)
class Protocol:
    """The prompts, tags and scale that a pair was trained with. Token ids are tuples of int.

    `marker` is the character whose single token, `marker_id`, stands in the slot of the tokenised prompt.
    """

    marker: str
    marker_id: int
    encoder_template: str
    decoder_template: str
    encoder_prefix: tuple[int, ...]
    encoder_tail: tuple[int, ...]
    opening_length: int  # trailing tokens of `encoder_tail` that are the opening tag
    decoder_prefix: tuple[int, ...]
    decoder_suffix: tuple[int, ...]
    closing: tuple[int, ...]
    eos_id: int
    injection_scale: float  # L2 norm of the injected vector; 0 injects the activation unscaled

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False, indent=1)

    @staticmethod
    def from_json(text: str) -> Protocol:
        """Reads the text that `to_json` writes. Raises UserError for any other text."""
        fields = parse_json(text, "a protocol", dict)
        kinds = {field.name: _IS[str(field.type)] for field in dataclasses.fields(Protocol)}
        if fields.keys() != kinds.keys() or not all(kinds[name](value) for name, value in fields.items()):
            raise UserError(f"a protocol: should have exactly the fields {', '.join(kinds)}, each of its own type")
        values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()}
        return Protocol(**values)


def find_marker(tokenizer: Any, template: str) -> str:
    """Finds the rarest character that is exactly one token, alone and inside the encoder's rendered prompt.

    Byte-level merges give rare tokens high ids, so the rarest character is the one with the highest id. Raises
    UserError where no character fits.
    """
    for low, high in _MARKER_RANGES:
        candidates: dict[int, str] = {}
        for code in range(low, high):
            ids = tokenizer.encode(chr(code), add_special_tokens=False)
            if len(ids) == 1 and chr(code).isprintable() and tokenizer.decode(ids) == chr(code):
                candidates[ids[0]] = chr(code)
        rarest = sorted(candidates, reverse=True)
        for start in range(0, len(rarest), _MARKERS_AT_ONCE):
            marker_ids = rarest[start : start + _MARKERS_AT_ONCE]
            prompts = prompts_ids(
                tokenizer, [template.replace("{injection_char}", candidates[token]) for token in marker_ids]
            )
            for marker_id, ids in zip(marker_ids, prompts, strict=True):
                if ids.count(marker_id) == 1:
                    return candidates[marker_id]
    raise UserError(
        "protocol.encoder_prompt: no character of U+2000 to U+2FFF or U+3200 to U+33FF is a single token in its place; "
        "put white space or a line break before {injection_char}, or take a model with another tokenizer"
    )


def make_protocol(tokenizer: Any, config: ProtocolConfig, injection_scale: float, marker: str = "") -> Protocol:
    """Tokenises the prompts and checks them. The default `marker` is the result of `find_marker`.

    Raises UserError that names the template or the marker that does not work.
    """
    for field, template, placeholder in (
        ("protocol.encoder_prompt", config.encoder_prompt, "{injection_char}"),
        ("protocol.decoder_prompt", config.decoder_prompt, "{explanation}"),
    ):
        if template.count(placeholder) != 1:
            raise UserError(f"{field}: must contain {placeholder} exactly once")
    marker = marker or find_marker(tokenizer, config.encoder_prompt)
    marker_ids = tokenizer.encode(marker, add_special_tokens=False)
    if len(marker_ids) != 1:
        raise UserError(f"subject.model: the slot's marker {quoted(marker)} is not one token to its tokenizer")
    (marker_id,) = marker_ids
    (ids,) = prompts_ids(tokenizer, [config.encoder_prompt.replace("{injection_char}", marker)])
    if ids.count(marker_id) != 1:
        raise UserError(
            f"protocol.encoder_prompt: should contain {quoted(marker)} as one token; it has {ids.count(marker_id)}"
        )
    slot = ids.index(marker_id)
    if slot == 0:  # the first position is an attention sink, whatever stands there
        raise UserError("protocol.encoder_prompt: at least one token should stand before {injection_char}")
    opening = tokenizer.encode(OPENING, add_special_tokens=False)
    before, after = config.decoder_prompt.split("{explanation}")
    return Protocol(
        marker=marker,
        marker_id=marker_id,
        encoder_template=config.encoder_prompt,
        decoder_template=config.decoder_prompt,
        encoder_prefix=tuple(ids[:slot]),
        encoder_tail=(*ids[slot + 1 :], *opening),
        opening_length=len(opening),
        decoder_prefix=tuple(text_ids(tokenizer, before)),
        decoder_suffix=tuple(tokenizer.encode(after, add_special_tokens=False)),
        closing=tuple(tokenizer.encode(CLOSING, add_special_tokens=False)),
        eos_id=_eos_id(tokenizer),
        injection_scale=injection_scale,
    )


def check_prompts(protocol: Protocol, tokenizer: Any, vocab_size: int) -> None:
    """Raises UserError where a prompt holds a token that a model of `vocab_size` embeddings lacks."""
    encoder = [*protocol.encoder_prefix, protocol.marker_id, *protocol.encoder_tail, *protocol.closing, protocol.eos_id]
    check_ids(encoder, vocab_size, tokenizer, "protocol.encoder_prompt")
    check_ids([*protocol.decoder_prefix, *protocol.decoder_suffix], vocab_size, tokenizer, "protocol.decoder_prompt")


def _eos_id(tokenizer: Any) -> int:
    if tokenizer.eos_token_id is None:
        raise UserError("subject.model: its tokenizer names no end-of-sequence token")
    return int(tokenizer.eos_token_id)


def response_ids(tokenizer: Any, protocol: Protocol, explanation: str) -> list[int]:
    """Returns the tokens that the encoder should write after the opening tag.

    They are the explanation, the closing tag and the end of sequence.

    The line break before the closing tag is tokenised by itself. Some tokenizers would merge it with a full stop. The
    decoder sees these tokens without the line break, so in RL its last token would differ from that in SFT.
    """
    texts = encodable(explanation).strip(), "\n"
    body, line_break = (tokenizer.encode(text, add_special_tokens=False) for text in texts)
    return [*body, *line_break, *protocol.closing, protocol.eos_id]


def decoder_ids(tokenizer: Any, protocol: Protocol, explanation: str) -> list[int]:
    """Returns the decoder's whole prompt, tokenised as one string, as a reader of the text would tokenise it."""
    return whole_prompt_ids(
        tokenizer, protocol, protocol.decoder_template.replace("{explanation}", explanation.strip())
    )


def known_decoder_ids(tokenizer: Any, protocol: Protocol, text: str, vocab_size: int) -> list[int]:
    """Returns `decoder_ids` without tokens that a model of `vocab_size` embeddings lacks.

    A text that an encoder sampled piece by piece may spell such a token.
    """
    return [token for token in decoder_ids(tokenizer, protocol, text) if token < vocab_size]


def whole_prompt_ids(tokenizer: Any, protocol: Protocol, prompt: str) -> list[int]:
    """Tokenises a finished decoder prompt: the decoder's template with an explanation in it."""
    prompt = encodable(prompt)
    if protocol.decoder_template.partition("{explanation}")[0].strip():
        return text_ids(tokenizer, prompt)
    # The template begins with the explanation. Its text must not change the constant prefix (a BOS token) before it.
    return [*begin_ids(tokenizer), *tokenizer.encode(prompt, add_special_tokens=False)]


def extract_explanation(response: str) -> str | None:
    """Returns the stripped text between the tags, or None if a tag is missing or the text is blank."""
    # No regular expression: one with white space at both ends takes the cube of a run of line breaks.
    text, closing, _ = response.partition(OPENING.rstrip())[2].partition(CLOSING)
    return text.strip() or None if closing else None


def blank_tokens(tokenizer: Any, vocab_size: int) -> np.ndarray:
    """Marks the tokens that consist of white space, which stripping an explanation removes at its ends: [V] bool."""
    blank = np.zeros(vocab_size, bool)
    for token_id in range(min(len(tokenizer), vocab_size)):
        text = tokenizer.decode([token_id])
        blank[token_id] = bool(text) and not text.strip()
    return blank


class Lengths(NamedTuple):
    """Lengths of the protocol's parts, in tokens."""

    prompt: int  # the encoder's prompt
    slot: int  # the slot's position in that prompt, from 0
    opening: int  # the opening tag
    closing: int  # the closing tag
    frame: int  # the decoder's prompt without the explanation


ASSUMED = Lengths(125, 95, 4, 4, 12)  # about those of experiments/bench.py with SmolLM2's tokenizer


def assumed_protocol(config: ProtocolConfig, closing: int = ASSUMED.closing) -> Protocol:
    """Makes a protocol for a model without a tokenizer, with prompts of the usual lengths.

    Use it to compile and to time steps, which do not depend on the ids of the prompts' tokens.
    """
    suffix = ASSUMED.frame // 3 if config.decoder_prompt.partition("{explanation}")[2] else 0
    return Protocol(
        marker="?",
        marker_id=1,
        encoder_template=config.encoder_prompt,
        decoder_template=config.decoder_prompt,
        encoder_prefix=(1,) * ASSUMED.slot,
        encoder_tail=(1,) * (ASSUMED.prompt - ASSUMED.slot - 1),
        opening_length=ASSUMED.opening,
        decoder_prefix=(1,) * (ASSUMED.frame - suffix),
        decoder_suffix=(1,) * suffix,
        closing=tuple(range(1, closing + 1)),
        eos_id=0,
        injection_scale=config.injection_scale or 1.0,
    )


class Endings(NamedTuple):
    """For each token that may end an explanation, the tokens that stand for it and the suffix in the decoder's prompt.

    They are usually the token and the suffix. They are other tokens if the tokenizer merges across the explanation's
    end ("." and "</" into ".</"), or if the token ends in white space, which is stripped.
    """

    ids: np.ndarray  # [V, W] int32, padded on the right
    length: np.ndarray  # [V] int32


def endings(tokenizer: Any, protocol: Protocol, vocab_size: int) -> Endings | None:
    """Computes the endings of all tokens of a vocabulary. Returns None if all are the token and the suffix."""
    suffix = protocol.decoder_template.partition("{explanation}")[2]
    width, num_tokens = len(protocol.decoder_suffix) + 1, min(len(tokenizer), vocab_size)
    ids = np.tile(np.array([0, *protocol.decoder_suffix], np.int32), (vocab_size, 1))
    ids[:, 0] = np.arange(vocab_size)
    length, changed = np.full(vocab_size, width, np.int32), False
    texts = tokenizer.batch_decode([[token] for token in range(num_tokens)])
    by_themselves = tokenizer(texts, add_special_tokens=False)["input_ids"]
    followed = tokenizer([text.rstrip() + suffix for text in texts], add_special_tokens=False)["input_ids"]
    for token, (text, by_itself, ending) in enumerate(zip(texts, by_themselves, followed, strict=True)):
        # A piece of a character, or of a word, is not tokenised to itself: its ending cannot be found from it alone.
        if by_itself == [token] and text.strip() and len(ending) <= width and ending != ids[token].tolist():
            ids[token, : len(ending)], length[token], changed = ending, len(ending), True
    return Endings(ids, length) if changed else None


def kept_protocol(path: AnyPath, tokenizer: Any) -> Protocol:
    """Reads the protocol that a workdir was made with.

    Raises UserError where the file is damaged, or where it does not fit the tokenizer. The encoder's prompt may
    differ, because some chat templates print the date; the stored prompt is used.
    """
    try:
        stored = Protocol.from_json(read_text(path))
    except (ValueError, UserError):
        raise UserError(
            f"{path}: damaged; restore this file, which holds the prompts that the workdir was trained with"
        ) from None
    prompts = ProtocolConfig(stored.encoder_template, stored.decoder_template)
    current = make_protocol(tokenizer, prompts, stored.injection_scale, stored.marker)
    current = dataclasses.replace(current, encoder_prefix=stored.encoder_prefix, encoder_tail=stored.encoder_tail)
    if changed := [f.name for f in dataclasses.fields(Protocol) if getattr(current, f.name) != getattr(stored, f.name)]:
        raise UserError(f"{path}: made with another tokenizer: {', '.join(changed)} differ")
    return stored
