"""Section `truth`: measures whether explanations agree with the text, without a judge."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from nlae_jax.data.mismatch import of_others
from nlae_jax.evaluate import reconstruction, truth
from nlae_jax.evaluate.estimate import first, share_of
from nlae_jax.evaluate.rows import SUFFIX, EvaluatedRows, read_activations, spread
from nlae_jax.evaluate.work import Work
from nlae_jax.lm.tokens import known_text_ids, pad

BEFORE = 10  # `recurrence` compares an explanation with those of so many tokens before
CANDIDATES = 10  # the suffix test has so many continuations, with the true one
_NOTES, _GOES_ON, _NONE = "Notes on a text: ", "\n\nThe text goes on:", "(none)"
_SUFFIX_BATCH = 2
_NOTHING = (float("nan"), float("nan"))


def measure(work: Work) -> None:
    """Adds the section's figures to the ledger."""
    rows, put = work.rows, work.ledger.put
    known = set(work.has_context.tolist())

    def counted(count: Callable[[str, str], tuple[int, int]], texts: Sequence[str]) -> np.ndarray:
        return np.array(
            [
                _or_none(count(text, context)) if row in known and text else _NOTHING
                for row, (text, context) in enumerate(zip(texts, rows.contexts, strict=True))
            ],
            np.float64,
        ).reshape(-1, 2)

    def expected(most: int, texts: Sequence[str]) -> np.ndarray:
        return work.full(
            np.array([truth.expects(texts[row], ranked, most) for row, ranked in work.ranked.items()]),
            np.array(list(work.ranked), int),
        )

    for key, measured, statistic in (
        ("words_in_context", partial(counted, truth.words_in_context), share_of),
        ("quotes_in_context", partial(counted, truth.quotes_in_context), share_of),
        ("expects_top1", partial(expected, 1), first),
        ("expects_top5", partial(expected, 5), first),
    ):
        controls = {"permuted": work.permuted(measured([work.texts[row] for row in work.other]))}
        controls |= {"gold": measured(rows.gold)} if work.has_gold else {}
        put("truth", key, measured(work.texts), statistic, controls)
    _suffix(work)
    _recurrence(work)
    _consensus(work)


def _or_none(counts: tuple[int, int]) -> tuple[float, float]:
    """Returns counts of found and of all cases, or NaN without a case: such a row does not count in `n`."""
    return counts if counts[1] else _NOTHING


def _suffix(work: Work) -> None:
    """Adds `suffix_test` and `suffix_gain`.

    The subject scores ten continuations after the explanation, after another document's explanation, and after none.
    """
    long_enough = np.flatnonzero([len(ids) >= SUFFIX for ids in work.rows.following_ids])
    rows = work.some(work.sizes.suffix, long_enough)
    candidates, valid = reconstruction.distractors(work.rows.document[long_enough], CANDIDATES - 1, work.seed)
    place = np.searchsorted(long_enough, rows)
    usable = valid[place].all(-1)
    rows, choices = rows[usable], long_enough[candidates[place][usable]]
    if not len(rows):
        for key in ("suffix_test", "suffix_gain"):
            work.ledger.put("truth", key, np.full(len(work.rows.h), np.nan))
        return
    explanations = [work.texts[row] or _NONE for row in rows]
    documents = work.rows.document[rows]
    other = work.others(rows)
    scores = {
        name: _continued(work, f"suffix_{name}", notes, choices)
        for name, notes in (
            ("notes", explanations),
            ("other_notes", [explanations[index] for index in other]),
            ("no_notes", [_NONE] * len(rows)),
        )
    }
    chance = work.full(np.full(len(rows), 1 / CANDIDATES), rows)
    picked = {name: work.full(truth.picked(values), rows) for name, values in scores.items()}
    picked["other_notes"] = work.full(of_others(truth.picked(scores["other_notes"]), documents, other), rows)
    work.ledger.put("truth", "suffix_test", picked.pop("notes"), first, {**picked, "chance": chance})
    gain, gain_of_other = (truth.picked(scores[name] - scores["no_notes"]) for name in ("notes", "other_notes"))
    controls = {"other_notes": work.full(of_others(gain_of_other, documents, other), rows), "chance": chance}
    work.ledger.put("truth", "suffix_gain", work.full(gain, rows), first, controls)


def _continued(work: Work, name: str, notes: Sequence[str], choices: np.ndarray) -> np.ndarray:
    """Returns the subject's log p [n, C] of the continuations of the rows `choices` [n, C] after each of n notes."""
    lm = work.pair.subject()
    prompts = [known_text_ids(lm.tokenizer, f"{_NOTES}{note}{_GOES_ON}", lm.arch.vocab_size) for note in notes]
    width = -(-max(map(len, prompts)) // 64) * 64
    ids, length = pad(prompts, width)
    after = np.array([[work.rows.following_ids[row][:SUFFIX] for row in row_choices] for row_choices in choices])

    def compute(part: slice) -> dict[str, Any]:
        batch = np.arange(len(prompts))[part]
        filled = np.concatenate([batch, batch[:1].repeat(_SUFFIX_BATCH - len(batch))])
        mask = np.arange(width) < length[filled][:, None]
        log_p = lm.continuations(ids[filled], mask, after[filled], np.ones(after[filled].shape, bool))
        return {"scores": np.asarray(log_p, np.float64)[: len(batch)]}

    asked = [prompts, after.tolist()]
    return np.asarray(work.kept.run(name, len(prompts), _SUFFIX_BATCH, compute, of=asked)["scores"])


def recurrence_rows(rows: EvaluatedRows, sampled: int, seed: int) -> np.ndarray:
    """Returns at most `sampled` rows for `recurrence`. They have `BEFORE` tokens between the first token and their own.

    The rows may be without activations.
    """
    return spread(rows.document, sampled, seed, np.flatnonzero([len(ids) > BEFORE + 1 for ids in rows.context_ids]))


def _recurrence(work: Work) -> None:
    """Adds `recurrence`: how much explanations share with the explanations of the tokens before."""
    rows = recurrence_rows(work.rows, work.sizes.sampled, work.seed)
    matched, permuted = (np.full(len(work.rows.h), np.nan) for _ in range(2))
    if len(rows):
        read = read_activations(work.pair.subject(), work.pair.layer, [work.rows.context_ids[row] for row in rows])
        windows = np.concatenate([vectors[-BEFORE - 1 : -1] for vectors in read])
        # The places identify the work, and not the vectors, because another run may round them differently.
        places = [[rows.tolist(), BEFORE]]
        written = work.written("tokens_before", windows, places, rebuild=False)["texts"]
        before = [written[i * BEFORE : (i + 1) * BEFORE] for i in range(len(rows))]
        other = work.others(rows)
        matched[rows] = [truth.recurrence(work.texts[row], before[i]) for i, row in enumerate(rows)]
        with_other = [truth.recurrence(work.texts[row], before[other[i]]) for i, row in enumerate(rows)]
        permuted[rows] = of_others(np.array(with_other), work.rows.document[rows], other)
    work.ledger.put("truth", "recurrence", matched, first, {"other": permuted})


def _consensus(work: Work) -> None:
    """Adds the figures of the words that most samples of an activation share."""
    rows, texts, _ = work.sampled
    known = np.isin(rows, work.has_context)
    rows, texts = rows[known], [samples for samples, is_known in zip(texts, known, strict=True) if is_known]
    # Each has two columns: words found in a context and all words; in `sizes`, shared words and all words.
    shared_found, all_found, permuted, sizes = (np.full((len(work.rows.h), 2), np.nan) for _ in range(4))
    other = work.others(rows)
    for i, (row, samples) in enumerate(zip(rows, texts, strict=True)):
        shared, every = truth.consensus(samples), set().union(*map(truth.content_words, samples))
        shared_found[row] = _or_none(truth.precision(shared, work.rows.contexts[row]))
        all_found[row] = _or_none(truth.precision(every, work.rows.contexts[row]))
        permuted[row] = _or_none(truth.precision(shared, work.rows.contexts[rows[other[i]]]))
        sizes[row] = len(shared), len(every)
    permuted[rows] = of_others(permuted[rows], work.rows.document[rows], other)
    controls = {"all_words": all_found, "permuted": permuted}
    work.ledger.put("truth", "consensus_precision", shared_found, share_of, controls)
    work.ledger.put("truth", "consensus_words", sizes[:, 0], first, {"all_words": sizes[:, 1]})
