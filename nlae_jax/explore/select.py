"""Selects tokens of a passage: by positions, by a phrase, or as a span whose activations are averaged."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

import numpy as np

from nlae_jax.explore.passage import Passage
from nlae_jax.runtime.errors import UserError
from nlae_jax.runtime.outside import quoted

_PART = re.compile(r"\s*(?:(-?\d{1,9})|(-?\d{1,9})?:(-?\d{1,9})?)\s*")


_LAST = 8  # by default this many last tokens are pushed: a single one is rarely enough


@dataclasses.dataclass(frozen=True)
class Pick:
    """The positions whose activations are explained as one vector: a single position, or a span that is averaged."""

    positions: tuple[int, ...]

    @property
    def last(self) -> int:
        """The last position."""
        return self.positions[-1]

    @property
    def is_span(self) -> bool:
        """Whether several positions are averaged."""
        return len(self.positions) > 1


def resolve_position(position: int, length: int, field: str = "positions") -> int:
    """Resolves a position; negative positions count from the end. Raises UserError if the position does not exist."""
    if not isinstance(position, int | np.integer) or isinstance(position, bool):
        raise UserError(f"{field}: {quoted(position)} should be a whole number")
    if not -length <= position < length:
        raise UserError(f"{field}: position {position} out of range (0..{length - 1})")
    return int(position) % length


def parse_positions(text: str, length: int, field: str = "--positions") -> list[int]:
    """Parses `-1`, `3,5,-2`, `10:20` (without 20) and mixtures, for a passage of `length` tokens.

    Positions keep the order in which they are written, with repeats. Ranges are cut at the passage's ends, like
    Python's slices. Raises UserError if a part has another form, if a single position does not exist, or if no position
    is selected.
    """
    positions: list[int] = []
    for part in text.split(","):
        match = _PART.fullmatch(part)
        if match is None:
            raise UserError(f"{field}: {quoted(part)} should be a position as -1, or a range as 10:20")
        if match[1] is not None:
            positions.append(resolve_position(int(match[1]), length, field))
        else:
            start, stop = (None if bound is None else int(bound) for bound in (match[2], match[3]))
            positions += range(*slice(start, stop).indices(length))
    if not positions:
        raise UserError(f"{field} {text}: selects none of the {length} tokens")
    return positions


def match_spans(passage: Passage, phrase: str, field: str = "--match") -> list[range]:
    """Returns the range of tokens that each occurrence of `phrase` touches, in order.

    If the phrase does not occur literally, it is searched without white space, because the tokens of some tokenizers
    lose white space. Raises UserError if the phrase does not occur.
    """
    if not phrase:
        raise UserError(f"{field}: empty; should be a part of the text")
    heads = [token for token in passage.tokens if token.fragment_index == 0]
    for squeezed in (False, True):
        searched = "".join(phrase.split()) if squeezed else phrase
        texts = ["".join(token.text.split()) if squeezed else token.text for token in heads]
        head_of_character = [index for index, text in enumerate(texts) for _ in text]
        spans = []
        for occurrence in re.finditer(re.escape(searched), "".join(texts)) if searched else ():
            first, last = heads[head_of_character[occurrence.start()]], heads[head_of_character[occurrence.end() - 1]]
            spans.append(range(first.position, last.position + last.fragment_count))
        if spans:
            return spans
    raise UserError(f"{field}: {quoted(phrase)} does not occur in {passage.name}")


def parse_span(passage: Passage, text: str, field: str = "--span") -> range:
    """Parses `10:20`, or a phrase, of which the first occurrence is taken. Raises UserError if no token is selected."""
    match = _PART.fullmatch(text)
    if match is None or match[1] is not None:
        return match_spans(passage, text, field)[0]
    positions = parse_positions(text, len(passage.tokens), field)
    return range(positions[0], positions[-1] + 1)


def parse_at(passage: Passage, text: str | None, field: str = "--at") -> list[int]:
    """Parses positions (see `parse_positions`) or a phrase into positions. None gives the last `_LAST` tokens."""
    if text is None:
        return list(range(max(1, len(passage.tokens) - _LAST), len(passage.tokens))) or [0]
    if all(_PART.fullmatch(part) for part in text.split(",")):
        return parse_positions(text, len(passage.tokens), field)
    return list(match_spans(passage, text, field)[0])


def picks_of(
    passage: Passage,
    positions: str | Sequence[int] | None = None,
    match: str | None = None,
    span: str | None = None,
) -> list[Pick]:
    """Returns the selection of a passage: every token, unless `positions`, `match` or `span` is given.

    `positions` and `match` select single tokens. `span` selects tokens whose activations are averaged. The selections
    are joined in this order. Raises UserError if one of the three selects no token.
    """
    length = len(passage.tokens)
    picks: list[Pick] = []
    if positions is not None:
        if isinstance(positions, str):
            selected = parse_positions(positions, length)
        else:
            selected = [resolve_position(position, length) for position in positions]
        picks += [Pick((position,)) for position in selected]
    if match is not None:
        picks += [Pick((position,)) for occurrence in match_spans(passage, match) for position in occurrence]
    if span is not None:
        picks.append(Pick(tuple(parse_span(passage, span))))
    if positions is None and match is None and span is None:
        picks = [Pick((position,)) for position in range(length)]
    return picks
