"""Section `text`: which of the words carry it, and whether they are words or a code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from nlae_jax.evaluate import text
from nlae_jax.evaluate.estimate import first, fve_of, share_of
from nlae_jax.evaluate.reconstruction import direction_mse
from nlae_jax.evaluate.work import RANKS, Work

_CHANGED = ("quotes_only", "quotes_removed", "sentences_shuffled", "words_shuffled", "lower_case")
# Of the tokens that a twin names instead: their ranks, from 0.
_TWINS = {"rank 2 to 4": (1, 2, 3), "rank 8 and beyond": tuple(range(7, RANKS))}

# mse [N] of changed explanations about their own activations and about others, by how they were changed.
_Mse = Mapping[str, tuple[np.ndarray, np.ndarray]]


def measure(work: Work) -> None:
    """Every text that is rebuilt is in one pool: most explanations have fewer sentences than are looked at."""
    rows, tokenizer = work.some(work.sizes.text), work.pair.tokenizer
    changed = [text.variants(tokenizer, work.texts[row], work.seed) for row in rows]
    pool = {name: [each[name] for each in changed] for name in changed[0]}
    dropped = _dropped_texts(work, rows)
    twins = {name: _twin_texts(work, ranks) for name, ranks in _TWINS.items()}
    rebuilt = work.rebuilt_pool(
        "changed_texts",
        {
            "whole": work.texts,
            **pool,
            "dropped": [one for _, _, one in dropped],
            **{name: list(texts.values()) for name, texts in twins.items()},
        },
    )
    whole, wrong = work.mse_of(work.texts, rebuilt["whole"], np.arange(len(work.texts)))
    beside = {"ids": work.with_variance(work.mse), "permuted": work.with_variance(wrong)}
    work.ledger.put("text", "fve_text", work.with_variance(whole), fve_of, beside)
    mse = {name: work.mse_of(texts, rebuilt[name], rows) for name, texts in pool.items()}
    _changed(work, mse, work.full(whole[rows], rows))
    _dropped(work, dropped, rebuilt["dropped"], whole)
    _twins(work, {name: (texts, rebuilt[name]) for name, texts in twins.items()}, whole)
    _copied(work)


def _changed(work: Work, mse: _Mse, whole: np.ndarray) -> None:
    put, columns = work.ledger.put, work.with_variance
    for name in _CHANGED:
        own, permuted = (columns(of) for of in mse[name])
        put("text", f"fve_{name}", own, fve_of, {"whole": columns(whole), "permuted": permuted})
    # Of no sentence FVE is 0, so its mse is the variance; the last part is all that follows.
    steps = [work.variance, *(mse[f"leading_{count + 1}"][0] for count in range(text.MOST_SENTENCES)), whole]
    names = [*(str(count + 1) for count in range(text.MOST_SENTENCES)), "rest"]
    gained = {name: a - b for name, a, b in zip(names, steps, steps[1:], strict=False)}
    parts = {name: columns(of) for name, of in gained.items()}
    put("text", "marginal_fve", None, share_of, parts=parts)
    cut = {str(count): columns(mse[f"tokens_{count}"][0]) for count in text.TOKEN_COUNTS}
    most = text.TOKEN_COUNTS[-1]
    put("text", "fve_tokens", cut[str(most)], fve_of, {"permuted": columns(mse[f"tokens_{most}"][1])}, cut)


def _dropped_texts(work: Work, rows: np.ndarray) -> list[tuple[int, str, str]]:
    """(row, which sentence is left out, what is left) of explanations of several sentences."""
    found = []
    for row in rows.tolist():
        count = len(text.real_sentences(work.texts[row]))
        others = range(min(count - 1, text.MOST_SENTENCES))
        found += [(row, "other", text.without_sentence(work.texts[row], number)) for number in others]
        found += [(row, "last", text.without_sentence(work.texts[row], -1))] if count > 1 else []
    return found


def _dropped(work: Work, dropped: Sequence[tuple[int, str, str]], rebuilt: np.ndarray, whole: np.ndarray) -> None:
    """Of each explanation the loss without its last sentence, and the mean loss without one of the others."""
    losses: dict[str, dict[int, list[float]]] = {"last": {}, "other": {}}
    if dropped:
        rows = np.array([row for row, _, _ in dropped])
        readable = np.array([bool(left) for _, _, left in dropped])
        lost = direction_mse(rebuilt, work.rows.h[rows], readable) - whole[rows]
        for (row, which, _), loss in zip(dropped, lost.tolist(), strict=True):
            losses[which].setdefault(row, []).append(loss)
    parts = {}
    for which, by_row in losses.items():
        column = np.full(len(whole), np.nan)
        column[list(by_row)] = [np.mean(of) for of in by_row.values()]
        parts[which] = work.with_variance(column)
    work.ledger.put("text", "dropped_sentence", None, share_of, parts=parts)


def _twin_texts(work: Work, ranks: Sequence[int]) -> dict[int, str]:
    """By row the explanation with another next token in it, of those that name the likeliest."""
    made = {row: text.twin(work.texts[row], ranked, ranks) for row, ranked in work.ranked.items()}
    return {row: other for row, other in made.items() if other is not None}


def _twins(work: Work, twins: Mapping[str, tuple[dict[int, str], np.ndarray]], whole: np.ndarray) -> None:
    parts = {}
    for name, (texts, rebuilt) in twins.items():
        parts[name] = np.full(len(whole), np.nan)
        if rows := list(texts):
            mse = direction_mse(rebuilt, work.rows.h[rows])
            tied = np.isclose(whole[rows], mse, rtol=0, atol=1e-9)
            parts[name][rows] = np.where(tied, 0.5, whole[rows] < mse)
    work.ledger.put("text", "twin", None, first, parts=parts)


def _copied(work: Work) -> None:
    bits = text.word_bits([*work.rows.contexts, *work.texts])

    def copied(order: np.ndarray) -> np.ndarray:
        column = np.full(len(order), np.nan)
        for row in work.has_context.tolist():
            if said := work.texts[order[row]]:
                column[row] = text.copied_bits(said, work.rows.contexts[row], bits)
        return column

    own, permuted = copied(np.arange(len(work.texts))), work.permuted(copied(work.other))
    work.ledger.put("text", "copied_bits", own, first, {"permuted": permuted})
