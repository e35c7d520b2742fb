"""Section `text`: which of the words carry it, and whether they are words or a code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from nlae_jax.evaluate import text
from nlae_jax.evaluate.estimate import first, fve_of, share_of
from nlae_jax.evaluate.health import real_sentences
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
    pool["whole"] = [work.texts[row] for row in rows]
    rebuilt_whole, rebuilt["whole"] = rebuilt["whole"], rebuilt["whole"][rows]
    mse = {name: work.mse_of(texts, rebuilt[name], rows) for name, texts in pool.items()}
    quotes = np.array([bool(quoted) for quoted in pool["quotes_only"]], float)
    _changed(work, mse, work.full(quotes, rows) == 1, work.full(quotes[work.others(rows)], rows) == 1)
    other = _other_mse(work, rebuilt_whole, np.arange(len(work.texts)))
    _dropped(work, dropped, rebuilt["dropped"], whole, other)
    _twins(work, {name: (texts, rebuilt[name]) for name, texts in twins.items()}, whole, other)
    _copied(work)


def _other_mse(work: Work, rebuilt: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """[M]: mse of what is rebuilt [M, d] about `rows`, held against the activation that each row is permuted with.

    NaN where that is of the same document. What a change does to it says what the change does by itself.
    """
    other = work.other[rows]
    mse = direction_mse(rebuilt, work.rows.h[other], np.asarray(rebuilt.any(-1)))
    return np.where(work.rows.document[other] == work.rows.document[rows], np.nan, mse)


def _changed(work: Work, mse: _Mse, quoting: np.ndarray, other_quotes: np.ndarray) -> None:
    """Measures whole texts that were changed.

    `quoting` [N] and `other_quotes` [N] bool: the explanation quotes something, and so does the one that it is permuted
    with. The figures of quotations are of these alone.
    """
    put, columns = work.ledger.put, work.with_variance
    whole, wrong = mse["whole"]
    for name in _CHANGED:
        kept, kept_permuted = (quoting, quoting & other_quotes) if name.startswith("quotes") else (True, True)
        own, permuted, unchanged = (
            columns(np.where(mask, values, np.nan))
            for mask, values in ((kept, mse[name][0]), (kept_permuted, mse[name][1]), (kept, whole))
        )
        put("text", f"fve_{name}", own, fve_of, {"whole": unchanged, "permuted": permuted})
    gained, gained_wrong = ({name: columns(of) for name, of in _gained(work, mse, which).items()} for which in (0, 1))
    total, total_wrong = columns(work.variance - whole), columns(work.variance - wrong)
    put("text", "marginal_fve", total, share_of, {"permuted": total_wrong}, gained, {"permuted": gained_wrong})
    cut, cut_wrong = (
        {str(count): columns(mse[f"tokens_{count}"][which]) for count in text.TOKEN_COUNTS} for which in (0, 1)
    )
    most = str(text.TOKEN_COUNTS[-1])
    beside = {"whole": columns(whole), "permuted": cut_wrong[most]}
    put("text", "fve_tokens", cut[most], fve_of, beside, cut, {"permuted": cut_wrong})


def _gained(work: Work, mse: _Mse, which: int) -> dict[str, np.ndarray]:
    """By sentence how much of mse it takes away, of explanations of their own (0) or of other documents (1)."""
    # Of no sentence FVE is 0, so its mse is the variance; the last part is all that follows.
    leading = [mse[f"leading_{count + 1}"][which] for count in range(text.MOST_SENTENCES)]
    steps = [work.variance, *leading, mse["whole"][which]]
    names = [*(str(count + 1) for count in range(text.MOST_SENTENCES)), "rest"]
    return {name: before - after for name, before, after in zip(names, steps, steps[1:], strict=False)}


def _dropped_texts(work: Work, rows: np.ndarray) -> list[tuple[int, str, str]]:
    """(row, which sentence is left out, what is left) of explanations of several sentences."""
    found = []
    for row in rows.tolist():
        count = len(real_sentences(work.texts[row]))
        others = range(min(count - 1, text.MOST_SENTENCES))
        found += [(row, "other", text.without_sentence(work.texts[row], number)) for number in others]
        found += [(row, "last", text.without_sentence(work.texts[row], -1))] if count > 1 else []
    return found


def _dropped(
    work: Work, dropped: Sequence[tuple[int, str, str]], rebuilt: np.ndarray, whole: np.ndarray, other: np.ndarray
) -> None:
    """Of each explanation the loss without its last sentence, and the mean loss without one of the others.

    `whole` and `other` [N] are the mse of the whole explanation, of its own activation and of the permuted one.
    """
    rows = np.array([row for row, _, _ in dropped], int)
    readable = np.array([bool(left) for _, _, left in dropped], bool)
    lost = direction_mse(rebuilt, work.rows.h[rows], readable) - whole[rows]
    lost_other = _other_mse(work, rebuilt, rows) - other[rows]
    parts: dict[str, np.ndarray] = {}
    permuted: dict[str, np.ndarray] = {}
    for which in ("last", "other"):
        here = np.array([kind == which for _, kind, _ in dropped], bool)
        for columns, losses in ((parts, lost), (permuted, lost_other)):
            columns[which] = work.with_variance(_mean_by_row(losses[here], rows[here], len(whole)))
    work.ledger.put("text", "dropped_sentence", None, share_of, parts=parts, part_controls={"permuted": permuted})


def _mean_by_row(values: np.ndarray, rows: np.ndarray, count: int) -> np.ndarray:
    """[count]: the mean of the values of each row; NaN of a row without any."""
    total, number = (np.bincount(rows, weights, minlength=count) for weights in (values, None))
    return np.where(number > 0, total / np.maximum(number, 1), np.nan)


def _twin_texts(work: Work, ranks: Sequence[int]) -> dict[int, str]:
    """By row the explanation with another next token in it, of those that name the likeliest."""
    made = {row: text.twin(work.texts[row], ranked, ranks) for row, ranked in work.ranked.items()}
    return {row: other for row, other in made.items() if other is not None}


def _twins(
    work: Work, twins: Mapping[str, tuple[dict[int, str], np.ndarray]], whole: np.ndarray, other: np.ndarray
) -> None:
    """How often the explanation is nearer than its twin, to its own activation and to the permuted one."""

    def nearer(of_whole: np.ndarray, of_twin: np.ndarray) -> np.ndarray:
        tied = np.isclose(of_whole, of_twin, rtol=0, atol=1e-9)
        return np.where(np.isnan(of_twin), np.nan, np.where(tied, 0.5, of_whole < of_twin))

    parts, permuted = {}, {}
    for name, (texts, rebuilt) in twins.items():
        rows = np.array(list(texts), int)
        parts[name] = work.full(nearer(whole[rows], direction_mse(rebuilt, work.rows.h[rows])), rows)
        permuted[name] = work.full(nearer(other[rows], _other_mse(work, rebuilt, rows)), rows)
    work.ledger.put("text", "twin", None, first, parts=parts, part_controls={"permuted": permuted})


def _copied(work: Work) -> None:
    bits = text.word_bits([*work.rows.contexts, *work.texts, *work.rows.gold])

    def copied(texts: Sequence[str]) -> np.ndarray:
        column = np.full(len(texts), np.nan)
        for row in work.has_context.tolist():
            if said := texts[row]:
                column[row] = text.copied_bits(said, work.rows.contexts[row], bits)
        return column

    beside = {"permuted": work.permuted(copied([work.texts[row] for row in work.other]))}
    beside |= {"gold": copied(work.rows.gold)} if work.has_gold else {}
    work.ledger.put("text", "copied_bits", copied(work.texts), first, beside)
