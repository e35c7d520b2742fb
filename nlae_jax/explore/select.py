"""What people select of a passage: positions, a phrase, a span whose activations are averaged."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from nlae_jax.explore.passage import Passage
from nlae_jax.runtime.errors import UserError
from nlae_jax.runtime.outside import quoted

_PART = re.compile(r"\s*(?:(-?\d{1,9})|(-?\d{1,9})?:(-?\d{1,9})?)\s*")


_LAST = 8  # tokens that are pushed where nobody says which: single ones are rarely enough


@dataclasses.dataclass(frozen=True)
class Pick:
    """The positions whose activations are explained as one vector: a single one, or a span that is averaged."""

    positions: tuple[int, ...]

    @property
    def last(self) -> int:
        return self.positions[-1]

    @property
    def is_span(self) -> bool:
        return len(self.positions) > 1


def resolve_position(position: int, length: int, field: str = "positions") -> int:
    """A position as Python counts: -1 is the last one. Raises UserError where there is none such."""
    if not -length <= position < length:
        raise UserError(f"{field}: position {position} out of range (0..{length - 1})")
    return position % length


def parse_positions(text: str, length: int, field: str = "--positions") -> list[int]:
    """`-1`, `3,5,-2`, `10:20` (20 is not among them) and mixtures, for a passage of `length` tokens.

    In the order that they are written in, repeats kept. Ranges are cut at the passage's ends, as Python's slices are.
    Raises UserError where a part is none of these, a single position is not there, or nothing is selected.
    """
    found: list[int] = []
    for part in text.split(","):
        match = _PART.fullmatch(part)
        if match is None:
            raise UserError(f"{field}: {quoted(part)} should be a position as -1, or a range as 10:20")
        if match[1] is not None:
            found.append(resolve_position(int(match[1]), length, field))
        else:
            start, stop = (None if bound is None else int(bound) for bound in (match[2], match[3]))
            found += range(*slice(start, stop).indices(length))
    if not found:
        raise UserError(f"{field} {text}: selects none of the {length} tokens")
    return found


def match_spans(passage: Passage, phrase: str, field: str = "--match") -> list[range]:
    """The tokens that each occurrence of `phrase` touches, in order.

    Where the phrase is not found as it is, white space is ignored: some tokenizers' tokens lose it. Raises UserError
    where it does not occur.
    """
    if not phrase:
        raise UserError(f"{field}: empty; should be a part of the text")
    heads = [token for token in passage.tokens if token.fragment_index == 0]
    for squeezed in (False, True):
        wanted = "".join(phrase.split()) if squeezed else phrase
        texts = ["".join(token.text.split()) if squeezed else token.text for token in heads]
        owner = [index for index, text in enumerate(texts) for _ in text]
        spans = []
        for found in re.finditer(re.escape(wanted), "".join(texts)) if wanted else ():
            first, last = heads[owner[found.start()]], heads[owner[found.end() - 1]]
            spans.append(range(first.position, last.position + last.fragment_count))
        if spans:
            return spans
    raise UserError(f"{field}: {quoted(phrase)} does not occur in {passage.name}")


def parse_span(passage: Passage, text: str, field: str = "--span") -> range:
    """`10:20`, or a phrase of the text: the tokens of its first occurrence. Raises UserError where there are none."""
    match = _PART.fullmatch(text)
    if match is None or match[1] is not None:
        return match_spans(passage, text, field)[0]
    found = parse_positions(text, len(passage.tokens), field)
    return range(found[0], found[-1] + 1)


def parse_at(passage: Passage, text: str | None, field: str = "--at") -> list[int]:
    """Positions as `parse_positions` takes them, or the tokens of a phrase; the last `_LAST` if nothing is said."""
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
    """What is selected of a passage; every token where nothing is said.

    `positions` and `match` select single tokens, `span` one average. Several of them add up, in this order.
    """
    length = len(passage.tokens)
    picks: list[Pick] = []
    if positions is not None:
        if isinstance(positions, str):
            chosen = parse_positions(positions, length)
        else:
            chosen = [resolve_position(position, length) for position in positions]
        picks += [Pick((position,)) for position in chosen]
    if match is not None:
        picks += [Pick((position,)) for occurrence in match_spans(passage, match) for position in occurrence]
    if span is not None:
        picks.append(Pick(tuple(parse_span(passage, span))))
    if positions is None and match is None and span is None:
        picks = [Pick((position,)) for position in range(length)]
    return picks
