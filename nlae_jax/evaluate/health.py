"""Whether explanations are still prose about their own activation: what a rising FVE alone does not show.

Reinforcement learning can raise FVE while every explanation becomes one template, repeats itself or turns into another
script. Everything here is computed from the text alone, by the same functions in training (every RL step, on its
samples) and in evaluation (on held-out activations), and is held against the same bounds, those of `MEASURES`.

Empty texts are explanations that could not be read. They are left out: `extraction_rate` counts them.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from nlae_jax.data.english import FUNCTION_WORDS
from nlae_jax.runtime.progress import warn

# --- the text in units

_CJK = (
    "\u1100-\u11ff\u3040-\u30ff\u3100-\u318f\u31a0-\u31bf\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\ua960-\ua97f"
    "\uac00-\ud7ff\uf900-\ufaff\uff66-\uffdc\U00020000-\U0003ffff"
)
_CJK_CHARACTER = re.compile(f"[{_CJK}]")
# A quoted span with its marks, as a pattern.
QUOTED = '"[^"\n]{0,80}"|“[^”\n]{0,80}”'
# Most of these scripts put no spaces between words: each of their characters counts as one.
_WORD = re.compile(f"[{_CJK}]|[^\\W_{_CJK}]+(?:['’][^\\W_{_CJK}]+)*")
_CJK_PAIR = re.compile(f"(?=([{_CJK}]{{2}}))")
_PIECE = re.compile(f"[{_CJK}]|[^\\s{_CJK}]+")
_SENTENCE_END = r"[.!?](?=[\s\"”’')\]]|$)|[。！？\n]"
_SENTENCE_PART = re.compile(f"(?:{QUOTED})|({_SENTENCE_END})")
_LIST_UNIT = re.compile(rf"{QUOTED}|\w+(?:['’./-]\w+)*|[^\w\s]|\n")
_SEPARATORS = frozenset((",", "、", "，", "&", "or", "and", "nor"))
_QUOTES = '"“'
_LIST_ENDS = frozenset(".!?。！？\n;:()[]{}—–")


def words(text: str) -> list[str]:
    """The words of a text, case-folded; a character of a CJK script is a word."""
    return [word.casefold() for word in _WORD.findall(text)]


def cjk_pairs(text: str) -> set[str]:
    """Its pairs of neighbouring CJK characters: about a word each in scripts without spaces."""
    return set(_CJK_PAIR.findall(text))


def pieces(text: str) -> list[str]:
    """What stands between spaces, marks included; a character of a CJK script is a piece."""
    return _PIECE.findall(text)


def joined(parts: Sequence[str]) -> str:
    """Pieces as a text: a space between two of them, unless one is CJK."""
    text = "".join(parts[:1])
    for before, part in pairwise(parts):
        text += part if has_cjk(before) or has_cjk(part) else f" {part}"
    return text


def sentences(text: str) -> list[str]:
    """The text cut after each `.`, `!`, `?` or line break that ends a sentence; those inside quotation marks do not."""
    ends = [match.end() for match in _SENTENCE_PART.finditer(text) if match[1]]
    return [text[start:end] for start, end in zip([0, *ends], [*ends, len(text)], strict=True)]


def real_sentences(text: str) -> list[str]:
    """The sentences that hold anything. An empty line is none: it belongs to the sentence before it."""
    kept: list[str] = []
    for sentence in sentences(text):
        if kept and not (sentence.strip() and kept[-1].strip()):
            kept[-1] += sentence
        else:
            kept.append(sentence)
    return [sentence for sentence in kept if sentence.strip()]


def candidates(text: str) -> list[str]:
    """What the text expects to come next: the quoted items of its first sentence, without their marks.

    `Next comes "a", "b" or a new line.` and `"a" or "b", then the verb.` both give a and b.
    """
    return [item for quoted in re.findall(QUOTED, sentences(text)[0]) if (item := quoted[1:-1].strip())]


def has_repeated_sentence(text: str) -> bool:
    """Whether two sentences of at least two words have the same words."""
    long = [tuple(found) for sentence in sentences(text) if len(found := words(sentence)) > 1]
    return len(set(long)) < len(long)


# --- lists

_Item = tuple[str, ...]  # units of a list's item: words, case-folded, and quoted strings with their marks


def _lists(text: str) -> Iterator[list[_Item]]:
    """The items of every stretch of text between full stops, colons, brackets and the like, where it has several."""
    items: list[list[str]] = [[]]
    for unit in [*_LIST_UNIT.findall(text), "\n"]:
        if unit in _LIST_ENDS:
            if kept := [tuple(item) for item in items if item]:
                yield kept
            items = [[]]
        elif unit.casefold() in _SEPARATORS:
            items.append([])
        else:
            items[-1].append(unit if unit[0] in _QUOTES else unit.casefold())


def _most_allowed(name: _Item) -> float:
    """How often a list may have it. Idioms ("again and again") repeat function words, arrays repeat numbers."""
    if not any(character.isalpha() for unit in name for character in unit):
        return math.inf
    return 2 if all(unit in FUNCTION_WORDS for unit in name) else 1


def _count(name: _Item, items: list[_Item]) -> int:
    """How often a list has the item `name`.

    The first item has the words that lead to the list before it, and the last one those that follow: `The text is
    about cats, dogs and cats again` has cats twice.
    """
    first, last = items[0], items[-1]
    leading = first != name and first[-len(name) :] == name
    following = last != name and last[: len(name)] == name
    return items.count(name) + leading + following


def _has_repetition(items: list[_Item]) -> bool:
    """Whether a list has a quoted string in two of its items, or names one of its items twice."""
    quoted = [unit for item in items for unit in set(item) if unit[0] in _QUOTES and len(unit) > 1]
    # The first item's last word may be a name; where a comma only joins two clauses, nothing says that it is.
    names = {*items, items[0][-1:]} if len(items) > 2 else set(items)
    return len(set(quoted)) < len(quoted) or any(_count(name, items) > _most_allowed(name) for name in names)


def has_repeated_item(text: str) -> bool:
    """Whether a list in the text names something twice, or the text has a word three times on end.

    `"of", "of" or "of"`, `"of" or then "of"`, `platform, platform and platform`, `about cats and cats`,
    `data data data`. Not `more and more` or `0, 0, 1`: function words must be there three times, and bare numbers may
    repeat.
    """
    for items in _lists(text):
        if len(items) > 1 and _has_repetition(items):
            return True
        for item in items:
            for a, b, c in zip(item, item[1:], item[2:], strict=False):
                if a == b == c and any(character.isalpha() for character in a):
                    return True
    return False


def has_repetition(text: str) -> bool:
    """Whether a list in the text repeats an item, or the text a sentence."""
    return has_repeated_item(text) or has_repeated_sentence(text)


def has_cjk(text: str) -> bool:
    """Whether the text has a Chinese, Japanese or Korean character."""
    return _CJK_CHARACTER.search(text) is not None


# --- measures of many explanations


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _distinct(texts_words: Sequence[Sequence[str]], n: int) -> float | None:
    """Different n-grams of words / n-grams (Li et al. 2016), none across two texts; None without any."""
    grams = [tuple(found[i : i + n]) for found in texts_words for i in range(len(found) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None


def _changed(per_text: Sequence[Sequence[str]]) -> tuple[int, int]:
    """How many items the text before does not have, and how many there are, from the second text on."""
    pairs = [(item, before) for before, now in zip(map(set, per_text), per_text[1:], strict=False) for item in now]
    return sum(item not in before for item, before in pairs), len(pairs)


def health(texts: Sequence[str], marker: str, group: int = 1) -> dict[str, float]:
    """The measures of a batch of explanations by name, as `MEASURES` describes them; all but those of FVE.

    `texts` [B · group]: `group` consecutive ones of each activation. Activations are compared with each other, never
    samples of one: each of the `group` samples makes a batch of B texts, and the mean over these is taken. So the
    figures of a step with several samples mean the same as those of an evaluation with one. Distinct n-grams become
    fewer the more texts there are: compare batches of one size only. `marker`: the character in the encoder's slot.

    A measure is missing where there is nothing to measure: no text, less than two texts of a batch, no quoted item.
    """
    batches = [[text for text in texts[i::group] if text] for i in range(group)]
    written = [text for batch in batches for text in batch]
    if not written:
        return {}
    items, repeats = ([has(text) for text in written] for has in (has_repeated_item, has_repeated_sentence))
    measured: dict[str, float | None] = {
        "repeated_rate": _mean([a or b for a, b in zip(items, repeats, strict=True)]),
        "repeated_item_rate": _mean(items),
        "repeated_sentence_rate": _mean(repeats),
        "marker_rate": _mean([marker in text for text in written]),
        "cjk_rate": _mean([has_cjk(text) for text in written]),
    }
    if compared := [batch for batch in batches if len(batch) > 1]:
        measured["distinct_explanations"] = _mean([len(set(batch)) / len(batch) for batch in compared])
        batches_words = [[words(text) for text in batch] for batch in compared]
        for n in (1, 2, 3):
            shares = [share for found in batches_words if (share := _distinct(found, n)) is not None]
            measured[f"distinct_{n}"] = _mean(shares) if shares else None
        batches_candidates = [[candidates(text) for text in batch] for batch in compared]
        for name, found in (("changed_words", batches_words), ("changed_candidates", batches_candidates)):
            changed, total = map(sum, zip(*map(_changed, found), strict=True))
            measured[name] = changed / total if total else None
    return {name: float(value) for name, value in measured.items() if value is not None}


def share_among(texts: Sequence[str], others: Sequence[str]) -> float | None:
    """Share of the explanations that are also among `others`, to the character; None where none could be read."""
    known = set(others)
    written = [text in known for text in texts if text]
    return _mean(written) if written else None


# --- what is healthy


@dataclasses.dataclass(frozen=True)
class Measure:
    """A number of this module's or of `reconstruction.summarise`, and where it is healthy: everywhere, if not said.

    `advice` is what to do about it where it is not. The bound holds only where the number `where_positive` is above 0.
    """

    key: str
    meaning: str
    at_most: float | None = None
    at_least: float | None = None
    above: float | None = None
    where_positive: str = ""
    advice: str = ""

    @property
    def bound(self) -> str:
        """In words; empty without one."""
        for name in ("at_most", "at_least", "above"):
            if (limit := getattr(self, name)) is not None:
                condition = f" where {self.where_positive} is above 0" if self.where_positive else ""
                return f"{name.replace('_', ' ')} {limit:g}{condition}"
        return ""

    def is_healthy(self, values: Mapping[str, Any]) -> bool | None:
        """None where there is no bound, or no number to hold against it."""
        value: Any = values.get(self.key)
        condition: Any = values.get(self.where_positive, 0.0)
        if not self.bound or not _is_number(value):
            return None
        if self.where_positive and not (_is_number(condition) and condition > 0):
            return None
        return bool(
            (self.at_most is None or value <= self.at_most)
            and (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


_LESS_DRIFT = "start RL again with a higher rl.kl_coef or a lower rl.encoder_learning_rate"
_MORE_ENCODER = "train the encoder's warm start for longer (sft.encoder_steps), on more activations"
_IDENTICAL = "share of explanations that {} gives too, with the same random draws"

# Written notes are repeated in 0 to 0.1 % and differ from each other in 80 % of their words; template descriptions
# share a frame, and differ in 35 to 45 % of them. Both differ in 97 % of their candidates.
MEASURES = (
    Measure(
        "repeated_rate",
        "share of explanations with a repeated item in a list or a repeated sentence",
        at_most=0.02,
        advice=f"{_MORE_ENCODER}, or charge for it in RL (rl.repeat_penalty)",
    ),
    Measure("repeated_item_rate", 'share with a repeated item, as in "of", "of" or "of"'),
    Measure("repeated_sentence_rate", "share with a repeated sentence"),
    Measure(
        "distinct_explanations",
        "share of different explanations among those of different activations",
        at_least=0.95,
        advice=f"explanations are becoming one template; {_LESS_DRIFT}",
    ),
    Measure("distinct_1", "share of different words; falls with the number of texts"),
    Measure("distinct_2", "share of different pairs of words"),
    Measure("distinct_3", "share of different triples of words"),
    Measure(
        "changed_words",
        "share of words that the previous activation's explanation does not have",
        at_least=0.25,
        advice=f"explanations are becoming one template; {_LESS_DRIFT}",
    ),
    Measure(
        "changed_candidates",
        "share of quoted next tokens that the previous activation's explanation does not have",
        at_least=0.5,
        advice=f"the same next tokens are named whatever the activation; {_MORE_ENCODER}",
    ),
    Measure(
        "marker_rate",
        "share of explanations with the character that marks the encoder's slot",
        at_most=0.01,
        advice="the encoder writes about its prompt rather than the vector; check protocol.injection_scale",
    ),
    Measure(
        "cjk_rate",
        "share of explanations with a Chinese, Japanese or Korean character",
        at_most=0.01,
        advice="right where the corpus has such text; otherwise check protocol.injection_scale, then " + _LESS_DRIFT,
    ),
    Measure(
        "extraction_rate",
        "share of explanations that were closed, and so could be read; the shares above are of these alone",
        at_least=0.8,
        advice=f"raise rl.max_new_tokens where explanations are cut by it; else {_MORE_ENCODER}",
    ),
    Measure("truncated_rate", "share of explanations that the token limit cut before their closing tag"),
    Measure(
        "fve_gold_gap",
        "FVE of the gold text minus that of the explanations, on the same rows",
        above=0.0,
        where_positive="fve",
        advice="the decoder reads samples better than text written by who saw the context: they may have become a "
        f"code; read samples/held_out.jsonl, and if so {_LESS_DRIFT}",
    ),
    Measure(
        "fve_vector_gap",
        "FVE of the explanations minus the best of those of vectors that say nothing, on the same rows",
        above=0.0,
        advice=f"explanations do not depend on the activation; {_MORE_ENCODER}, and check protocol.injection_scale",
    ),
    Measure("fve_zero", "FVE of explanations of a zero vector, held against the true activations"),
    Measure("fve_mean_vector", "the same for the mean of the activations"),
    Measure("fve_random_vector", "the same for random vectors"),
    *(
        Measure(
            f"identical_to_{name}",
            _IDENTICAL.format(given),
            at_most=0.05,
            advice=f"explanations do not depend on the activation; {_MORE_ENCODER}",
        )
        for name, given in (
            ("zero", "a zero vector"),
            ("mean_vector", "the mean vector"),
            ("random_vector", "a random vector"),
        )
    ),
)


class Watch:
    """Says when a bound is crossed: one line, and no more of that bound until it has been kept again."""

    def __init__(self, stage: str, say: Callable[[str], None] = warn) -> None:
        self._stage, self._say = stage, say
        self._crossed: set[str] = set()
        self._rows: list[Mapping[str, float]] = []

    def add(self, values: Mapping[str, float]) -> Mapping[str, float]:
        """Keeps one step's values for `review`, and returns them."""
        self._rows.append(values)
        return values

    def review(self, step: int) -> None:
        """Checks the means of what was added since the last review: single steps have few explanations."""
        keys = dict.fromkeys(key for row in self._rows for key in row)
        means = {key: _mean([row[key] for row in self._rows if key in row]) for key in keys}
        count, self._rows = len(self._rows), []
        self.check(means, f"mean of the {count} steps up to {step}")

    def check(self, values: Mapping[str, Any], of: str) -> None:
        """Holds values against their bounds. `of` says what they are of."""
        for measure in MEASURES:
            healthy = measure.is_healthy(values)
            if healthy is False and measure.key not in self._crossed:
                value = f"{values[measure.key]:.3g}"
                self._say(f"{self._stage}: {measure.key} {value} ({of}) should be {measure.bound}: {measure.advice}")
                self._crossed.add(measure.key)
            elif healthy:
                self._crossed.discard(measure.key)
