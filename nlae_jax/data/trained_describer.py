"""The provider `describer`: the describer that the package carries writes the descriptions, offline.

`roles.describer` holds the model, and `experiments/smollm2/describer.py` trained it.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from nlae_jax.assets import describer_directory
from nlae_jax.config import DescribeConfig
from nlae_jax.data.answers import Answer, AnswerCache, Keep, cached_describer
from nlae_jax.data.describer import Describer, DescribeResources, Progress
from nlae_jax.lm.adapters import AdapterFile, has_adapters, open_adapters
from nlae_jax.lm.families import read_arch
from nlae_jax.lm.lora import merge
from nlae_jax.lm.pretrained import load_tokenizer, resolve_model
from nlae_jax.lm.weights import load_params
from nlae_jax.roles.describer import prompt_ids
from nlae_jax.roles.language_model import LanguageModel
from nlae_jax.runtime.errors import UserError

_BATCH = 32  # texts of similar length that are described at once
_TOGETHER = 256  # texts that are sorted by length together: a killed run describes at most these again
_MAX_NEW_TOKENS = 96
_TEMPERATURE = 0.7  # at 0.5 half of the notes name a candidate twice, at 1 they make little sense


class TextDescriber:
    """Writes one note per text. Make one with `from_directory`."""

    def __init__(self, model: LanguageModel) -> None:
        self._model = model

    @staticmethod
    def from_directory(directory: Path) -> TextDescriber:
        """Loads adapters and the base model that they name. Raises UserError where one of them is missing."""
        adapters = open_adapters(directory)
        base = resolve_model(adapters.base_model)
        arch = read_arch(base)
        params = _merged(load_params(base, arch), adapters, adapters.read(arch))
        return TextDescriber(LanguageModel(arch, params, load_tokenizer(base)))

    def describe(self, texts: Sequence[str], seed: int = 0) -> list[str | None]:
        """Writes a note on each text: one line without angle brackets, or None where the note was cut off or empty.

        The same texts with the same `seed` get the same notes.
        """
        notes = dict(self.written(texts, seed))
        return [notes[index] for index in range(len(texts))]

    def written(self, texts: Sequence[str], seed: int = 0) -> Iterator[tuple[int, str | None]]:
        """Yields the number of each text and the note on it, as `describe` writes it, batch by batch."""
        tokenizer = self._model.tokenizer
        prompts = [prompt_ids(tokenizer, text) for text in texts]
        order = sorted(range(len(texts)), key=lambda index: len(prompts[index]))
        for number, start in enumerate(range(0, len(order), _BATCH)):
            batch = order[start : start + _BATCH]
            replies = self._model.generate(
                [prompts[index] for index in batch], _MAX_NEW_TOKENS, _TEMPERATURE, seed + number
            )
            for index, reply in zip(batch, replies, strict=True):
                is_finished = len(reply) < _MAX_NEW_TOKENS
                yield index, _clean(tokenizer.decode(reply, skip_special_tokens=True)) if is_finished else None


def carried_describer() -> Path:
    """Returns the directory of the describer that the package carries. Raises UserError where it carries none."""
    if not has_adapters(directory := describer_directory()):
        raise UserError("describe.provider: this installation carries no describer; use another provider")
    return directory


def describer_provider(
    config: DescribeConfig, resources: DescribeResources, progress: Progress | None = None
) -> Describer:
    """Makes a describer from the adapters that the package carries. Raises UserError where it carries none."""
    directory = carried_describer()
    describer = TextDescriber.from_directory(directory)

    def ask(texts: Sequence[str], keep: Keep) -> Generator[tuple[int, Answer], None, None]:
        for start in range(0, len(texts), _TOGETHER):
            for index, note in describer.written(texts[start : start + _TOGETHER]):
                answer = Answer(f"<explanation>{note or ''}</explanation>")
                keep(start + index, answer.text or "")
                yield start + index, answer

    cache = AnswerCache(resources.cache_directory, config.provider, open_adapters(directory).identity)
    return cached_describer(config, cache, ask, progress, _TOGETHER)


def _merged(params: dict[str, Any], file: AdapterFile, adapters: dict[str, Any]) -> dict[str, Any]:
    """Returns the base's parameters with the adapters added."""
    combine, scale = jax.jit(merge, static_argnums=2), file.alpha / file.rank
    blocks = {name: combine(weight, adapters.get(name), scale) for name, weight in params["blocks"].items()}
    return {**params, "blocks": blocks}


def _clean(note: str) -> str | None:
    """Makes a note one line without angle brackets, which would look like an explanation's tags."""
    return " ".join(note.translate({ord("<"): "(", ord(">"): ")"}).split()) or None
