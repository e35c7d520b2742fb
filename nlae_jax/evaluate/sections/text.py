"""Section `text`: measures which parts of explanations carry the activation, and whether they are words or a code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from nlae_jax.evaluate import text
from nlae_jax.evaluate.estimate import first, fve_of, share_of
from nlae_jax.evaluate.reconstruction import direction_mse
from nlae_jax.evaluate.wording import real_sentences
from nlae_jax.evaluate.work import RANKS, Work

_CHANGED = ("quotes_only", "quotes_removed", "sentences_shuffled", "words_shuffled", "lower_case")
# The ranks, counted from 0, of the tokens that the twins name.
_TWINS = {"rank 2 to 4": (1, 2, 3), "rank 8 and beyond": tuple(range(7, RANKS))}

# By change: the mse [N] of the changed explanations with their own activations, and with those of other documents.
_Mse = Mapping[str, tuple[np.ndarray, np.ndarray]]


def measure(work: Work) -> None:
    """Adds the section's figures to the ledger.

    All texts are rebuilt together, because many of them are equal: most explanations have few sentences.
    """
    rows, tokenizer = work.some(work.sizes.text), work.pair.tokenizer
    variants = [text.variants(tokenizer, work.texts[row], work.seed) for row in rows]
    changed = {name: [variant[name] for variant in variants] for name in variants[0]}
    dropped = _dropped_texts(work, rows)
    twins = {name: _twin_texts(work, ranks) for name, ranks in _TWINS.items()}
    rebuilt = work.rebuilt_pool(
        "changed_texts",
        {
            "whole": work.texts,
            **changed,
            "dropped": [remaining for _, _, remaining in dropped],
            **{name: list(texts.values()) for name, texts in twins.items()},
        },
    )
    all_rows = np.arange(len(work.texts))
    whole, permuted = work.mse_of(work.texts, rebuilt["whole"], all_rows)
    controls = {"ids": work.with_variance(work.mse), "permuted": work.with_variance(permuted)}
    work.ledger.put("text", "fve_text", work.with_variance(whole), fve_of, controls)
    changed["whole"] = [work.texts[row] for row in rows]
    rebuilt_whole, rebuilt["whole"] = rebuilt["whole"], rebuilt["whole"][rows]
    mse = {name: work.mse_of(texts, rebuilt[name], rows) for name, texts in changed.items()}
    quotes = np.array([bool(quoted) for quoted in changed["quotes_only"]], float)
    _changed(work, mse, work.full(quotes, rows) == 1, work.full(quotes[work.others(rows)], rows) == 1)
    other = _other_mse(work, rebuilt_whole, all_rows)
    _dropped(work, dropped, rebuilt["dropped"], whole, other)
    _twins(work, {name: (texts, rebuilt[name]) for name, texts in twins.items()}, whole, other)
    _copied(work)


def _other_mse(work: Work, rebuilt: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Returns the mse [M] of reconstructions about M rows with the activations of other documents.

    `rebuilt` [M, d] are the reconstructions. The mse is NaN if the other row is of the same document. A change of a
    text also changes this mse. That shows how much the change does without any connection to the activation.
    """
    other = work.other[rows]
    mse = direction_mse(rebuilt, work.rows.h[other], np.asarray(rebuilt.any(-1)))
    return np.where(work.rows.document[other] == work.rows.document[rows], np.nan, mse)


def _changed(work: Work, mse: _Mse, quoting: np.ndarray, other_quotes: np.ndarray) -> None:
    """Adds the figures of explanations that were changed as a whole, and of their beginnings.

    `quoting` [N] bool says whether the explanation quotes something. `other_quotes` [N] bool says the same of the
    explanation that it is permuted with. The figures of quotations use only these explanations.
    """
    put, columns = work.ledger.put, work.with_variance
    whole, whole_permuted = mse["whole"]
    for name in _CHANGED:
        kept, kept_permuted = (quoting, quoting & other_quotes) if name.startswith("quotes") else (True, True)
        matched, permuted, unchanged = (
            columns(np.where(mask, values, np.nan))
            for mask, values in ((kept, mse[name][0]), (kept_permuted, mse[name][1]), (kept, whole))
        )
        put("text", f"fve_{name}", matched, fve_of, {"whole": unchanged, "permuted": permuted})
    gained, gained_permuted = (
        {name: columns(gain) for name, gain in _gained(work, mse, which).items()} for which in (0, 1)
    )
    total, total_permuted = columns(work.variance - whole), columns(work.variance - whole_permuted)
    put("text", "marginal_fve", total, share_of, {"permuted": total_permuted}, gained, {"permuted": gained_permuted})
    cut, cut_permuted = (
        {str(count): columns(mse[f"tokens_{count}"][which]) for count in text.TOKEN_COUNTS} for which in (0, 1)
    )
    most = str(text.TOKEN_COUNTS[-1])
    controls = {"whole": columns(whole), "permuted": cut_permuted[most]}
    put("text", "fve_tokens", cut[most], fve_of, controls, cut, {"permuted": cut_permuted})


def _gained(work: Work, mse: _Mse, which: int) -> dict[str, np.ndarray]:
    """Returns by sentence how much the sentence lowers the mse: [N] each.

    `which` is 0 for explanations with their own activations, 1 for those with activations of other documents.
    """
    # Without a sentence FVE is 0, so the mse is the variance. The last part is the rest of the explanation.
    leading = [mse[f"leading_{count + 1}"][which] for count in range(text.MOST_SENTENCES)]
    steps = [work.variance, *leading, mse["whole"][which]]
    names = [*(str(count + 1) for count in range(text.MOST_SENTENCES)), "rest"]
    return {name: before - after for name, before, after in zip(names, steps, steps[1:], strict=False)}


def _dropped_texts(work: Work, rows: np.ndarray) -> list[tuple[int, str, str]]:
    """Leaves out each sentence of the explanations of several sentences.

    Returns (row, which sentence is left out: "last" or "other", the remaining text).
    """
    dropped = []
    for row in rows.tolist():
        count = len(real_sentences(work.texts[row]))
        others = range(min(count - 1, text.MOST_SENTENCES))
        dropped += [(row, "other", text.without_sentence(work.texts[row], number)) for number in others]
        dropped += [(row, "last", text.without_sentence(work.texts[row], -1))] if count > 1 else []
    return dropped


def _dropped(
    work: Work, dropped: Sequence[tuple[int, str, str]], rebuilt: np.ndarray, whole: np.ndarray, other: np.ndarray
) -> None:
    """Adds `dropped_sentence`: the loss without the last sentence, and the mean loss without one of the others.

    `dropped` is the result of `_dropped_texts`, `rebuilt` are the reconstructions from its texts. `whole` and `other`
    [N] are the mse of the whole explanation with its own activation and with that of another document.
    """
    rows = np.array([row for row, _, _ in dropped], int)
    readable = np.array([bool(remaining) for _, _, remaining in dropped], bool)
    lost = direction_mse(rebuilt, work.rows.h[rows], readable) - whole[rows]
    lost_other = _other_mse(work, rebuilt, rows) - other[rows]
    parts: dict[str, np.ndarray] = {}
    permuted: dict[str, np.ndarray] = {}
    for which in ("last", "other"):
        chosen = np.array([kind == which for _, kind, _ in dropped], bool)
        for columns, losses in ((parts, lost), (permuted, lost_other)):
            columns[which] = work.with_variance(_mean_by_row(losses[chosen], rows[chosen], len(whole)))
    work.ledger.put("text", "dropped_sentence", None, share_of, parts=parts, part_controls={"permuted": permuted})


def _mean_by_row(values: np.ndarray, rows: np.ndarray, count: int) -> np.ndarray:
    """Returns [count]: the mean of the values [M] of each row in `rows` [M], NaN for a row without values."""
    total, number = (np.bincount(rows, weights, minlength=count) for weights in (values, None))
    return np.where(number > 0, total / np.maximum(number, 1), np.nan)


def _twin_texts(work: Work, ranks: Sequence[int]) -> dict[int, str]:
    """Returns the twins of the explanations that name the likeliest next token, by row (see `text.twin`)."""
    twins = {row: text.twin(work.texts[row], ranked, ranks) for row, ranked in work.ranked.items()}
    return {row: twin for row, twin in twins.items() if twin is not None}


def _twins(
    work: Work, twins: Mapping[str, tuple[dict[int, str], np.ndarray]], whole: np.ndarray, other: np.ndarray
) -> None:
    """Adds `twin`: how often the explanation's mse is below that of its twin.

    `twins` maps a part's name to the twins by row and to their reconstructions. `whole` and `other` [N] are the mse of
    the explanation with its own activation and with that of another document.
    """

    def nearer(mse: np.ndarray, twin_mse: np.ndarray) -> np.ndarray:
        tied = np.isclose(mse, twin_mse, rtol=0, atol=1e-9)
        return np.where(np.isnan(twin_mse), np.nan, np.where(tied, 0.5, mse < twin_mse))

    parts, permuted = {}, {}
    for name, (texts, rebuilt) in twins.items():
        rows = np.array(list(texts), int)
        parts[name] = work.full(nearer(whole[rows], direction_mse(rebuilt, work.rows.h[rows])), rows)
        permuted[name] = work.full(nearer(other[rows], _other_mse(work, rebuilt, rows)), rows)
    work.ledger.put("text", "twin", None, first, parts=parts, part_controls={"permuted": permuted})


def _copied(work: Work) -> None:
    """Adds `copied_bits`: the information that explanations copy from their contexts."""
    bits = text.word_bits([*work.rows.contexts, *work.texts, *work.rows.gold])

    def copied(texts: Sequence[str]) -> np.ndarray:
        column = np.full(len(texts), np.nan)
        for row in work.has_context.tolist():
            if texts[row]:
                column[row] = text.copied_bits(texts[row], work.rows.contexts[row], bits)
        return column

    controls = {"permuted": work.permuted(copied([work.texts[row] for row in work.other]))}
    controls |= {"gold": copied(work.rows.gold)} if work.has_gold else {}
    work.ledger.put("text", "copied_bits", copied(work.texts), first, controls)
