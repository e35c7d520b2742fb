"""Explanations in other words: a meaning survives a paraphrase and a translation, a code does not.

They take another language model, which a describe provider asks: without one there are no such figures.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nlae_jax.data.describer import Instruct
from nlae_jax.evaluate.estimate import fve_of
from nlae_jax.evaluate.work import Work

_ANSWER = "Write the result between <explanation> and </explanation>, and nothing outside these tags.\n\nThe note:"
_PARAPHRASE = (
    "Below is a note on a text. Say the same in other words: change every word and the order of the sentences where "
    f"the meaning allows it, and neither add nor leave out anything. Keep what stands in quotation marks. {_ANSWER}"
)
_TRANSLATE = f"Below is a note on a text. Translate it into {{}}. Keep what stands in quotation marks. {_ANSWER}"
# What is asked, one after another, by the figure's name.
REWORDINGS = {
    "fve_paraphrased": (_PARAPHRASE,),
    "fve_translated": (_TRANSLATE.format("French"), _TRANSLATE.format("English")),
}


def rewordings(work: Work, rewrite: Instruct | None) -> None:
    """Puts the figures of `REWORDINGS`: FVE of explanations that were said in other words, of those that came back."""
    if rewrite is None:
        return
    rows = np.array([row for row in work.some(work.sizes.text).tolist() if work.texts[row].strip()], int)
    found = {name: _reworded(rewrite, steps, [work.texts[row] for row in rows]) for name, steps in REWORDINGS.items()}
    texts = {name: [text or "" for text in some] for name, some in found.items()}
    rebuilt = work.rebuilt_pool("rewordings", {"whole": [work.texts[row] for row in rows], **texts})
    whole, _ = work.mse_of([work.texts[row] for row in rows], rebuilt["whole"], rows)
    for name, some in texts.items():
        came = work.full(np.array([bool(text) for text in some], float), rows) == 1
        own, permuted = (np.where(came, mse, np.nan) for mse in work.mse_of(some, rebuilt[name], rows))
        beside = {"whole": np.where(came, whole, np.nan), "permuted": permuted}
        columns = {control: work.with_variance(mse) for control, mse in beside.items()}
        work.ledger.put("text", name, work.with_variance(own), fve_of, columns)


def answers_asked(count: int) -> int:
    """How many answers `rewordings` asks for, of so many rows."""
    return count * sum(map(len, REWORDINGS.values()))


def _reworded(rewrite: Instruct, steps: Sequence[str], texts: Sequence[str]) -> list[str | None]:
    """Each text after all steps; None where one of them gave nothing."""
    current: dict[int, str] = dict(enumerate(texts))
    for step in steps:
        answers = rewrite(step, list(current.values()))
        current = {index: answer for index, answer in zip(current, answers, strict=True) if answer}
    return [current.get(index) for index in range(len(texts))]
