"""Measures explanations after another language model has said them in other words.

A meaning survives a paraphrase and a translation, a code does not. The rewording needs another language model, which
the config's describe provider names. Without one, these figures are left out.
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
# The instructions of each figure. Each instruction rewords the answer to the instruction before it.
REWORDINGS = {
    "fve_paraphrased": (_PARAPHRASE,),
    "fve_translated": (_TRANSLATE.format("French"), _TRANSLATE.format("English")),
}


def rewordings(work: Work, rewrite: Instruct | None) -> None:
    """Adds the figures of `REWORDINGS` to the ledger: FVE of reworded explanations. Does nothing without `rewrite`.

    Explanations for which the other model gave no answer do not count.
    """
    if rewrite is None:
        return
    rows = np.array([row for row in work.some(work.sizes.text).tolist() if work.texts[row].strip()], int)
    whole_texts = [work.texts[row] for row in rows]
    answers = {name: _reworded(rewrite, steps, whole_texts) for name, steps in REWORDINGS.items()}
    reworded = {name: [text or "" for text in texts] for name, texts in answers.items()}
    rebuilt = work.rebuilt_pool("rewordings", {"whole": whole_texts, **reworded})
    whole, _ = work.mse_of(whole_texts, rebuilt["whole"], rows)
    for name, texts in reworded.items():
        answered = work.full(np.array([bool(text) for text in texts], float), rows) == 1
        matched, permuted = (np.where(answered, mse, np.nan) for mse in work.mse_of(texts, rebuilt[name], rows))
        controls = {"whole": np.where(answered, whole, np.nan), "permuted": permuted}
        columns = {control: work.with_variance(mse) for control, mse in controls.items()}
        work.ledger.put("text", name, work.with_variance(matched), fve_of, columns)


def answers_asked(count: int) -> int:
    """Returns how many answers `rewordings` asks for if it asks about `count` rows."""
    return count * sum(map(len, REWORDINGS.values()))


def _reworded(rewrite: Instruct, steps: Sequence[str], texts: Sequence[str]) -> list[str | None]:
    """Returns each text after all steps, or None for a text that one of the steps gave no answer for."""
    current: dict[int, str] = dict(enumerate(texts))
    for step in steps:
        answers = rewrite(step, list(current.values()))
        current = {index: answer for index, answer in zip(current, answers, strict=True) if answer}
    return [current.get(index) for index in range(len(texts))]
