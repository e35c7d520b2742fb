"""Measures whether explanations are still prose about their own activation. A rising FVE does not show this.

Reinforcement learning can raise FVE while all explanations become the same template, repeat themselves or change to
another script. The measures use only the text. Every RL step computes them from its samples, and the evaluation
computes them from explanations of held-out activations. Both compare them with the bounds in `MEASURES`.

An empty text is an explanation that could not be read. The measures leave it out; `extraction_rate` counts it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nlae_jax.evaluate.wording import candidates, has_cjk, has_repeated_item, has_repeated_sentence, words
from nlae_jax.runtime.progress import warn


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
        "share of named next tokens that the previous activation's explanation does not name",
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
        "share of readable explanations (text and a closing tag); the measures of the text count only these",
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

    def add(self, values: Mapping[str, float]) -> None:
        """Keeps one step's values for `review`."""
        self._rows.append(values)

    def review(self, step: int) -> None:
        """Checks the means of the values that were added since the last review.

        Means are used because a single step has few explanations.
        """
        keys = dict.fromkeys(key for row in self._rows for key in row)
        means = {key: _mean([row[key] for row in self._rows if key in row]) for key in keys}
        count, self._rows = len(self._rows), []
        self.check(means, f"mean of the {count} steps up to {step}")

    def check(self, values: Mapping[str, Any], description: str) -> None:
        """Compares values with their bounds. `description` names what was measured, for the warning."""
        for measure in MEASURES:
            healthy = measure.is_healthy(values)
            if healthy is False and measure.key not in self._crossed:
                value = f"{values[measure.key]:.3g}"
                self._say(
                    f"{self._stage}: {measure.key} {value} ({description}) should be {measure.bound}: {measure.advice}"
                )
                self._crossed.add(measure.key)
            elif healthy:
                self._crossed.discard(measure.key)
