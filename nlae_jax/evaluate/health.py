"""Measures whether explanations are still prose about their own activation. A rising FVE does not show this.

Reinforcement learning can raise FVE while all explanations become the same template, repeat themselves or change to
another script. The measures use only the text. Every RL step computes them from its samples, and the evaluation
computes them from explanations of held-out activations. Both compare them with the bounds in `MEASURES`.

An empty text is an explanation that could not be read. The measures leave it out; `extraction_rate` counts it.
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

# --- splitting a text

_CJK = (
    "\u1100-\u11ff\u3040-\u30ff\u3100-\u318f\u31a0-\u31bf\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\ua960-\ua97f"
    "\uac00-\ud7ff\uf900-\ufaff\uff66-\uffdc\U00020000-\U0003ffff"
)
_CJK_CHARACTER = re.compile(f"[{_CJK}]")
# The pattern of a quoted span with its marks.
QUOTED = '"[^"\n]{0,80}"|“[^”\n]{0,80}”'
# Most CJK scripts put no spaces between words, so each of their characters counts as a word.
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
    """Returns the words of a text, case-folded. Each CJK character is a word."""
    return [word.casefold() for word in _WORD.findall(text)]


def cjk_pairs(text: str) -> set[str]:
    """Returns the pairs of neighbouring CJK characters in a text. In scripts without spaces, a pair is about a word."""
    return set(_CJK_PAIR.findall(text))


def pieces(text: str) -> list[str]:
    """Splits a text at spaces. Punctuation stays with its word. Each CJK character is a piece."""
    return _PIECE.findall(text)


def joined(parts: Sequence[str]) -> str:
    """Joins pieces to a text, with a space between two pieces unless one of them is CJK."""
    text = "".join(parts[:1])
    for before, part in pairwise(parts):
        text += part if has_cjk(before) or has_cjk(part) else f" {part}"
    return text


def sentences(text: str) -> list[str]:
    """Splits a text into sentences, after each `.`, `!`, `?` or line break. Marks inside quotations end no sentence."""
    ends = [match.end() for match in _SENTENCE_PART.finditer(text) if match[1]]
    return [text[start:end] for start, end in zip([0, *ends], [*ends, len(text)], strict=True)]


def real_sentences(text: str) -> list[str]:
    """Returns the sentences of a text that are not blank. Blank lines are added to the sentence before them."""
    kept: list[str] = []
    for sentence in sentences(text):
        if kept and not (sentence.strip() and kept[-1].strip()):
            kept[-1] += sentence
        else:
            kept.append(sentence)
    return [sentence for sentence in kept if sentence.strip()]


def candidates(text: str) -> list[str]:
    """Returns the next tokens that the text names: the quoted items of its first sentence, without their marks.

    `Next comes "a", "b" or a new line.` and `"a" or "b", then the verb.` both give a and b.
    """
    return [item for quoted in re.findall(QUOTED, sentences(text)[0]) if (item := quoted[1:-1].strip())]


def has_repeated_sentence(text: str) -> bool:
    """Returns whether two sentences of at least two words have the same words in the same order."""
    long = [tuple(found) for sentence in sentences(text) if len(found := words(sentence)) > 1]
    return len(set(long)) < len(long)


# --- lists

_Item = tuple[str, ...]  # an item of a list, as case-folded words and as quoted strings with their marks


def _lists(text: str) -> Iterator[list[_Item]]:
    """Yields the items of every list in the text.

    A list is a stretch of text between full stops, colons, brackets or similar marks. Commas, "and" and "or" separate
    its items. A stretch without such a separator is a list of one item.
    """
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
    """Returns how often a list may contain the item `name`.

    Idioms such as "again and again" repeat function words, and arrays repeat numbers.
    """
    if not any(character.isalpha() for unit in name for character in unit):
        return math.inf
    return 2 if all(unit in FUNCTION_WORDS for unit in name) else 1


def _count(name: _Item, items: list[_Item]) -> int:
    """Returns how often a list contains the item `name`.

    The first item also holds the words before the list, and the last item the words after it. For example, `The text is
    about cats, dogs and cats again` contains cats twice.
    """
    first, last = items[0], items[-1]
    ends_first = first != name and first[-len(name) :] == name
    begins_last = last != name and last[: len(name)] == name
    return items.count(name) + ends_first + begins_last


def _has_repetition(items: list[_Item]) -> bool:
    """Returns whether a list has a quoted string in two of its items, or contains an item too often."""
    quoted = [unit for item in items for unit in set(item) if unit[0] in _QUOTES and len(unit) > 1]
    # The last word of the first item may be the list's first name. With two items this is unclear, because a single
    # comma may also join two clauses.
    names = {*items, items[0][-1:]} if len(items) > 2 else set(items)
    return len(set(quoted)) < len(quoted) or any(_count(name, items) > _most_allowed(name) for name in names)


def has_repeated_item(text: str) -> bool:
    """Returns whether a list in the text repeats an item, or the text has a word three times in a row.

    Repetitions are `"of", "of" or "of"`, `"of" or then "of"`, `platform, platform and platform`,
    `about cats and cats` and `data data data`. Function words count from the third time on, and numbers may repeat, so
    `more and more` and `0, 0, 1` are no repetitions.
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
    """Returns whether the text repeats an item of a list or a sentence."""
    return has_repeated_item(text) or has_repeated_sentence(text)


def has_cjk(text: str) -> bool:
    """Returns whether the text has a Chinese, Japanese or Korean character."""
    return _CJK_CHARACTER.search(text) is not None


# --- measures of many explanations


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _distinct(texts_words: Sequence[Sequence[str]], n: int) -> float | None:
    """Returns different n-grams of words / all n-grams (Li et al. 2016), or None if there is no n-gram.

    An n-gram lies within one text.
    """
    grams = [tuple(text_words[i : i + n]) for text_words in texts_words for i in range(len(text_words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None


def _changed(per_text: Sequence[Sequence[str]]) -> tuple[int, int]:
    """Returns how many items the previous text does not have, and the number of items, from the second text on."""
    pairs = [(item, before) for before, items in zip(map(set, per_text), per_text[1:], strict=False) for item in items]
    return sum(item not in before for item, before in pairs), len(pairs)


def health(texts: Sequence[str], marker: str, group: int = 1) -> dict[str, float]:
    """Returns the measures of a batch of explanations, by the names in `MEASURES`, except those about FVE.

    `texts` are B · `group` explanations of B activations; the `group` explanations of an activation are consecutive.
    `marker` is the character in the encoder's slot.

    `distinct_…` and `changed_…` compare the explanations of different activations, never two samples of the same
    activation. For this, sample i of every activation makes batch i of B texts. The result is the mean over the `group`
    batches, so an RL step with several samples gives numbers comparable to those of an evaluation with one sample. The
    share of distinct n-grams falls with the number of texts, so compare only batches of the same size.

    A measure is left out if there is nothing to measure: without a readable text, with fewer than two readable texts in
    every batch, or without a quoted item.
    """
    batches = [[text for text in texts[i::group] if text] for i in range(group)]
    written = [text for batch in batches for text in batch]
    if not written:
        return {}
    repeated_item, repeated_sentence = (
        [has(text) for text in written] for has in (has_repeated_item, has_repeated_sentence)
    )
    measured: dict[str, float | None] = {
        "repeated_rate": _mean([any(both) for both in zip(repeated_item, repeated_sentence, strict=True)]),
        "repeated_item_rate": _mean(repeated_item),
        "repeated_sentence_rate": _mean(repeated_sentence),
        "marker_rate": _mean([marker in text for text in written]),
        "cjk_rate": _mean([has_cjk(text) for text in written]),
    }
    if compared := [batch for batch in batches if len(batch) > 1]:
        measured["distinct_explanations"] = _mean([len(set(batch)) / len(batch) for batch in compared])
        batches_words = [[words(text) for text in batch] for batch in compared]
        for n in (1, 2, 3):
            shares = [share for per_text in batches_words if (share := _distinct(per_text, n)) is not None]
            measured[f"distinct_{n}"] = _mean(shares) if shares else None
        batches_candidates = [[candidates(text) for text in batch] for batch in compared]
        for name, per_batch in (("changed_words", batches_words), ("changed_candidates", batches_candidates)):
            changed, total = map(sum, zip(*map(_changed, per_batch), strict=True))
            measured[name] = changed / total if total else None
    return {name: float(value) for name, value in measured.items() if value is not None}


def share_among(texts: Sequence[str], others: Sequence[str]) -> float | None:
    """Returns the share of the readable explanations that also occur in `others`, or None if none is readable.

    Two explanations are the same if every character is.
    """
    known = set(others)
    is_known = [text in known for text in texts if text]
    return _mean(is_known) if is_known else None


# --- bounds


@dataclasses.dataclass(frozen=True)
class Measure:
    """A number from `health` or `reconstruction.summarise`, with its healthy range.

    `at_most`, `at_least` and `above` give the range; at most one of them is set. Without them every value is healthy.
    `advice` says what to do if the value is outside. If `where_positive` names another number, the bound applies only
    if that number is above 0.
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
        """The bound in words, or '' if the measure has none."""
        for name in ("at_most", "at_least", "above"):
            if (limit := getattr(self, name)) is not None:
                condition = f" where {self.where_positive} is above 0" if self.where_positive else ""
                return f"{name.replace('_', ' ')} {limit:g}{condition}"
        return ""

    def is_healthy(self, values: Mapping[str, Any]) -> bool | None:
        """Returns whether the measure's value in `values` is within the bound.

        Returns None if there is no bound, if it does not apply, or if the value is not a finite number.
        """
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
_IDENTICAL = "share of explanations that are identical to explanations of {}, with the same random draws"

# The bounds leave room around good descriptions. Of written notes, 0 to 0.1 % repeat something, and 80 % of a note's
# words are not in the note before it. Template descriptions share a frame, so only 35 to 45 % of their words are not in
# the description before. In both, 97 % of the quoted next tokens are not in the text before.
MEASURES = (
    Measure(
        "repeated_rate",
        "share of explanations that repeat an item of a list or a sentence",
        at_most=0.02,
        advice=f"{_MORE_ENCODER}, or penalise repetition in RL (rl.repeat_penalty)",
    ),
    Measure("repeated_item_rate", 'share of explanations that repeat an item of a list, as in "of", "of" or "of"'),
    Measure("repeated_sentence_rate", "share of explanations that repeat a sentence"),
    Measure(
        "distinct_explanations",
        "number of different explanations / number of explanations, of different activations",
        at_least=0.95,
        advice=f"explanations are becoming the same template; {_LESS_DRIFT}",
    ),
    Measure("distinct_1", "number of different words / number of words; falls with the number of texts"),
    Measure("distinct_2", "number of different pairs of neighbouring words / number of pairs"),
    Measure("distinct_3", "number of different triples of neighbouring words / number of triples"),
    Measure(
        "changed_words",
        "share of words that are not in the previous activation's explanation",
        at_least=0.25,
        advice=f"explanations are becoming the same template; {_LESS_DRIFT}",
    ),
    Measure(
        "changed_candidates",
        "share of quoted next tokens that are not in the previous activation's explanation",
        at_least=0.5,
        advice=f"explanations of different activations name the same next tokens; {_MORE_ENCODER}",
    ),
    Measure(
        "marker_rate",
        "share of explanations that contain the character that marks the encoder's slot",
        at_most=0.01,
        advice="the encoder writes about its prompt and not about the vector; check protocol.injection_scale",
    ),
    Measure(
        "cjk_rate",
        "share of explanations that contain a Chinese, Japanese or Korean character",
        at_most=0.01,
        advice="this is no fault if the corpus has such text; otherwise check protocol.injection_scale, then "
        + _LESS_DRIFT,
    ),
    Measure(
        "extraction_rate",
        "share of explanations that end with their closing tag; only these are readable and counted in other shares",
        at_least=0.8,
        advice=f"raise rl.max_new_tokens if this limit cuts explanations; otherwise {_MORE_ENCODER}",
    ),
    Measure("truncated_rate", "share of explanations that the token limit cut before their closing tag"),
    Measure(
        "fve_gold_gap",
        "FVE of the descriptions (gold text) minus FVE of the explanations, on the same rows",
        above=0.0,
        where_positive="fve",
        advice="the decoder reads explanations better than descriptions that were written from the text itself, so "
        f"explanations may have become a code; read samples/held_out.jsonl, and if it shows a code {_LESS_DRIFT}",
    ),
    Measure(
        "fve_vector_gap",
        "FVE of the explanations minus the best FVE of explanations of a zero, mean or random vector, on the same rows",
        above=0.0,
        advice=f"explanations do not depend on the activation; {_MORE_ENCODER}, and check protocol.injection_scale",
    ),
    Measure("fve_zero", "FVE of explanations of the zero vector, compared with the true activations"),
    Measure("fve_mean_vector", "FVE of explanations of the mean vector, compared with the true activations"),
    Measure("fve_random_vector", "FVE of explanations of random vectors, compared with the true activations"),
    *(
        Measure(
            f"identical_to_{name}",
            _IDENTICAL.format(vector),
            at_most=0.05,
            advice=f"explanations do not depend on the activation; {_MORE_ENCODER}",
        )
        for name, vector in (
            ("zero", "the zero vector"),
            ("mean_vector", "the mean vector"),
            ("random_vector", "a random vector"),
        )
    ),
)


class Watch:
    """Warns if a measure crosses its bound. It warns again only after the measure has been healthy in between.

    `stage` begins each warning. `say` prints it.
    """

    def __init__(self, stage: str, say: Callable[[str], None] = warn) -> None:
        self._stage, self._say = stage, say
        self._crossed: set[str] = set()
        self._rows: list[Mapping[str, float]] = []

    def add(self, values: Mapping[str, float]) -> Mapping[str, float]:
        """Keeps one step's values for `review`, and returns them."""
        self._rows.append(values)
        return values

    def review(self, step: int) -> None:
        """Checks the means of the values that were added since the last review.

        Means are used because a single step has few explanations.
        """
        keys = dict.fromkeys(key for row in self._rows for key in row)
        means = {key: _mean([row[key] for row in self._rows if key in row]) for key in keys}
        count, self._rows = len(self._rows), []
        self.check(means, f"mean of the {count} steps up to {step}")

    def check(self, values: Mapping[str, Any], of: str) -> None:
        """Compares values with their bounds. `of` names what was measured, for the warning."""
        for measure in MEASURES:
            healthy = measure.is_healthy(values)
            if healthy is False and measure.key not in self._crossed:
                value = f"{values[measure.key]:.3g}"
                self._say(f"{self._stage}: {measure.key} {value} ({of}) should be {measure.bound}: {measure.advice}")
                self._crossed.add(measure.key)
            elif healthy:
                self._crossed.discard(measure.key)
