"""Section `truth`: whether explanations are true of the text, without a judge."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from nlae_jax.data.mismatch import of_others
from nlae_jax.evaluate import reconstruction, truth
from nlae_jax.evaluate.estimate import first, share_of
from nlae_jax.evaluate.rows import SUFFIX, read_activations
from nlae_jax.evaluate.work import Work
from nlae_jax.lm.tokens import pad

BEFORE = 10  # tokens before an activation, for recurrence
CANDIDATES = 10  # continuations that the true one is among
_NOTES, _GOES_ON, _NONE = "Notes on a text: ", "\n\nThe text goes on:", "(none)"
_SUFFIX_BATCH = 2


def measure(work: Work) -> None:
    """What the words say against the text, its next tokens, its continuation and other samples."""
    rows, put = work.rows, work.ledger.put
    known = set(work.has_context.tolist())

    def counted(count: Callable[[str, str], tuple[int, int]], texts: Sequence[str]) -> np.ndarray:
        return np.array(
            [
                count(text, context) if row in known and text else (np.nan, np.nan)
                for row, (text, context) in enumerate(zip(texts, rows.contexts, strict=True))
            ],
            np.float64,
        ).reshape(-1, 2)

    def expected(most: int, texts: Sequence[str]) -> np.ndarray:
        return work.full(
            np.array([truth.expects(texts[row], ranked, most) for row, ranked in work.ranked.items()]),
            np.array(list(work.ranked), int),
        )

    for key, of, statistic in (
        ("words_in_context", partial(counted, truth.words_in_context), share_of),
        ("quotes_in_context", partial(counted, truth.quotes_in_context), share_of),
        ("expects_top1", partial(expected, 1), first),
        ("expects_top5", partial(expected, 5), first),
    ):
        beside = {"permuted": work.permuted(of([work.texts[row] for row in work.other]))}
        beside |= {"gold": of(rows.gold)} if work.has_gold else {}
        put("truth", key, of(work.texts), statistic, beside)
    _suffix(work)
    _recurrence(work)
    _consensus(work)


def _suffix(work: Work) -> None:
    """Ten continuations after an explanation, after another's, and after none."""
    full = np.flatnonzero([len(ids) >= SUFFIX for ids in work.rows.following_ids])
    rows = work.some(work.sizes.suffix, full)
    candidates, valid = reconstruction.distractors(work.rows.document[full], CANDIDATES - 1, work.seed)
    place = np.searchsorted(full, rows)
    usable = valid[place].all(-1)
    rows, choices = rows[usable], full[candidates[place][usable]]
    if not len(rows):
        for key in ("suffix_test", "suffix_gain"):
            work.ledger.put("truth", key, np.full(len(work.rows.h), np.nan))
        return
    told = [work.texts[row] or _NONE for row in rows]
    documents = work.rows.document[rows]
    other = work.others(rows)
    scores = {
        name: _continued(work, f"suffix_{name}", notes, choices)
        for name, notes in (
            ("notes", told),
            ("other_notes", [told[index] for index in other]),
            ("no_notes", [_NONE] * len(rows)),
        )
    }
    chance = work.full(np.full(len(rows), 1 / CANDIDATES), rows)
    best = {name: work.full(truth.picked(of), rows) for name, of in scores.items()}
    best["other_notes"] = work.full(of_others(truth.picked(scores["other_notes"]), documents, other), rows)
    work.ledger.put("truth", "suffix_test", best.pop("notes"), first, {**best, "chance": chance})
    gain, gain_of_other = (truth.picked(scores[name] - scores["no_notes"]) for name in ("notes", "other_notes"))
    beside = {"other_notes": work.full(of_others(gain_of_other, documents, other), rows), "chance": chance}
    work.ledger.put("truth", "suffix_gain", work.full(gain, rows), first, beside)


def _continued(work: Work, name: str, notes: Sequence[str], choices: np.ndarray) -> np.ndarray:
    """[n, C]: log p of the continuations of the rows `choices` [n, C] after each row's notes."""
    lm = work.pair.subject()
    prompts = [lm.tokenizer.encode(f"{_NOTES}{told}{_GOES_ON}") for told in notes]
    width = -(-max(map(len, prompts)) // 64) * 64
    ids, length = pad(prompts, width)
    after = np.array([[work.rows.following_ids[row][:SUFFIX] for row in row_choices] for row_choices in choices])

    def compute(part: slice) -> dict[str, Any]:
        some = np.arange(len(prompts))[part]
        filled = np.concatenate([some, some[:1].repeat(_SUFFIX_BATCH - len(some))])
        mask = np.arange(width) < length[filled][:, None]
        found = lm.continuations(ids[filled], mask, after[filled], np.ones(after[filled].shape, bool))
        return {"scores": np.asarray(found, np.float64)[: len(some)]}

    asked = [prompts, after.tolist()]
    return np.asarray(work.kept.run(name, len(prompts), _SUFFIX_BATCH, compute, of=asked)["scores"])


def recurrence_rows(work: Work) -> np.ndarray:
    """The sampled rows of `recurrence`: with as many tokens before their own, and the text's first one before these."""
    return work.some(work.sizes.sampled, np.flatnonzero([len(ids) > BEFORE + 1 for ids in work.rows.context_ids]))


def _recurrence(work: Work) -> None:
    rows = recurrence_rows(work)
    own, other = (np.full(len(work.rows.h), np.nan) for _ in range(2))
    if len(rows):
        read = read_activations(work.pair.subject(), work.pair.layer, [work.rows.context_ids[row] for row in rows])
        windows = np.concatenate([vectors[-BEFORE - 1 : -1] for vectors in read])
        places = [[rows.tolist(), BEFORE]]  # rather than the vectors: rounding is no other work
        written = work.written("tokens_before", windows, places, rebuild=False)["texts"]
        before = [written[i * BEFORE : (i + 1) * BEFORE] for i in range(len(rows))]
        documents = work.rows.document[rows]
        wrong = work.others(rows)
        own[rows] = [truth.recurrence(work.texts[row], before[i]) for i, row in enumerate(rows)]
        recurs = [truth.recurrence(work.texts[row], before[wrong[i]]) for i, row in enumerate(rows)]
        other[rows] = of_others(np.array(recurs), documents, wrong)
    work.ledger.put("truth", "recurrence", own, first, {"other": other})


def _consensus(work: Work) -> None:
    rows, texts, _ = work.sampled
    known = np.isin(rows, work.has_context)
    rows, texts = rows[known], [each for each, here in zip(texts, known, strict=True) if here]
    agreed, said, permuted, sizes = (np.full((len(work.rows.h), 2), np.nan) for _ in range(4))
    documents = work.rows.document[rows]
    wrong = work.others(rows)
    for i, (row, samples) in enumerate(zip(rows, texts, strict=True)):
        shared, every = truth.consensus(samples), set().union(*map(truth.content_words, samples))
        agreed[row] = truth.precision(shared, work.rows.contexts[row])
        said[row] = truth.precision(every, work.rows.contexts[row])
        permuted[row] = truth.precision(shared, work.rows.contexts[rows[wrong[i]]])
        sizes[row] = len(shared), len(every)
    permuted[rows] = of_others(permuted[rows], documents, wrong)
    beside = {"all_words": said, "permuted": permuted}
    work.ledger.put("truth", "consensus_precision", agreed, share_of, beside)
    work.ledger.put("truth", "consensus_words", sizes[:, 0], first, {"all_words": sizes[:, 1]})
