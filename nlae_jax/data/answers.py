"""What the describers that ask a language model share: the instruction, the parsing, the cache, the bookkeeping."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import threading
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nlae_jax import hosts
from nlae_jax.config import DescribeConfig
from nlae_jax.errors import UserError

if TYPE_CHECKING:  # describe.py imports the modules that import this one
    from nlae_jax.data.describe import Context, Describer, Progress

logger = logging.getLogger(__name__)

INSTRUCTION = (
    "Below is the beginning of a text, cut off at an arbitrary point. A language model that has read this far is about "
    "to predict what follows. Name the two or three features of the text that the model must be holding in mind to "
    "predict well, the most important one first. Good features are what kind of text it is and what it is about, what "
    "the present sentence or structure still needs, and who or what is being spoken of. The last feature must be "
    "about the very last words: quote them, and say what is likely to come directly after. Be concrete; quote words "
    "of the text where that helps; do not continue the text. Write 80 to 130 tokens of plain sentences, without "
    "headings or lists, between <explanation> and </explanation>, and nothing outside these tags."
)

_TAGGED = re.compile(r"<explanation>((?:(?!<explanation>).)*?)</explanation>", re.DOTALL | re.IGNORECASE)
_LIST_MARK = re.compile(r"^\s*(?:[-*•]|\d{1,2}[.)])\s+", re.MULTILINE)
_MIN_CHARACTERS = 20
_MAX_CHARACTERS = 1_600  # about 400 tokens: three times what was asked for

_MIN_CHECKED = 16  # answers after which the share of lost ones is looked at


@dataclass(frozen=True)
class Answer:
    """What came back for one prompt. `text` None: nothing did, and `problem` says why in a few words."""

    text: str | None
    problem: str = ""


# Texts -> (index of the text, the answer about it) in any order; closing the generator stops what is under way.
Ask = Callable[[Sequence[str]], Generator[tuple[int, Answer], None, None]]


def build_prompt(text: str) -> str:
    """The user message that asks for a description of `text`."""
    return f"{INSTRUCTION}\n\nThe text:\n{text.encode('utf-8', 'replace').decode('utf-8')}"


def parse_answer(answer: str) -> str | None:
    """The explanation inside an answer as one line of plain text; None if there is none worth keeping."""
    found = _TAGGED.search(answer)
    if found is None:
        return None
    line = " ".join(_LIST_MARK.sub("", found[1]).replace("**", "").split())
    return line if _MIN_CHARACTERS <= len(line) <= _MAX_CHARACTERS and " " in line else None


class AnswerCache:
    """Raw answers on disk, one file each, written whole or not at all. Safe for threads and for processes."""

    def __init__(self, directory: Path, *identity: object) -> None:
        """`identity`: whatever besides the text decides what is answered (provider, model, instruction, length)."""
        self._directory = directory
        self._identity = json.dumps([str(part) for part in identity])

    def get(self, text: str) -> str | None:
        """The stored answer, or None; a damaged file counts as none."""
        try:
            answer = json.loads(self._path(text).read_text(encoding="utf-8"))["answer"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return answer if isinstance(answer, str) else None

    def put(self, text: str, answer: str) -> None:
        if not hosts.is_first():  # where several compute the answers, all have the same
            return
        path = self._path(text)
        temporary = path.with_suffix(f".{os.getpid()}-{threading.get_ident()}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps({"answer": answer}), encoding="utf-8")
            temporary.replace(path)
        except OSError as error:
            raise UserError(f"{path.parent}: an answer cannot be stored: {error.strerror}") from None

    def _path(self, text: str) -> Path:
        digest = hashlib.sha256(f"{self._identity}\n{text}".encode("utf-8", "surrogatepass")).hexdigest()
        return self._directory / digest[:2] / f"{digest[2:]}.json"


def cached_describer(
    config: DescribeConfig,
    cache: AnswerCache,
    ask: Ask,
    progress: Progress | None,
    together: int = 1,
    by_all: bool = False,
) -> Describer:
    """A describer that asks only what the cache lacks. Raises UserError when more than half of the answers are lost.

    `together` consecutive texts are asked as a whole or not at all: where an answer depends on the other prompts of
    its batch, a killed run then continues with the batches, and so the answers, of a run that was not killed. With
    `by_all` every process asks, of the same texts: those that the first has no answer to. Only it knows stored answers.

    The share is looked at after the first `_MIN_CHECKED` answers (or all, if there are fewer) and after each
    further `4 * concurrency`, so that a wrong model or a dead server ends the run early; what was answered is kept.
    """
    window = _Window(config, cache)

    def describe(contexts: Sequence[Context]) -> list[str | None]:
        texts = list(dict.fromkeys(context.text for context in contexts))
        stored, proven = _stored_by_first(cache, texts) if by_all else _stored(cache, texts)
        groups = [texts[start : start + together] for start in range(0, len(texts), together)]
        asked = [text for group in groups if not all(text in stored for text in group) for text in group]
        again = set(asked)
        answers = {text: answer for text, answer in stored.items() if text not in again}
        count = Counter(context.text for context in contexts)
        report = progress or (lambda _: None)
        if answers:
            report(sum(count[text] for text in answers))
        problems: Counter[str] = Counter()
        window.begin(proven)
        with closing(ask(asked)) as results:
            for index, answer in results:
                window.add(asked[index], answer)
                if answer.text is not None:
                    answers[asked[index]] = answer.text
                else:
                    problems[answer.problem] += 1
                report(count[asked[index]])
        window.finish()
        lines = {text: parse_answer(answer) for text, answer in answers.items()}
        unusable = sum(line is None for line in lines.values())
        if unusable:
            problems["no usable <explanation>"] += unusable
        logger.info(
            "describe: %d texts, %d answered anew, %d dropped%s",
            len(texts), len(asked), sum(problems.values()), f" ({_counts(problems)})" if problems else "",
        )  # fmt: skip
        return [lines.get(context.text) for context in contexts]

    return describe


def _stored(cache: AnswerCache, texts: Sequence[str]) -> tuple[dict[str, str], bool]:
    """The stored answers, and whether any of them is usable."""
    found = {text: answer for text in texts if (answer := cache.get(text)) is not None}
    return found, any(map(parse_answer, found.values()))


def _stored_by_first(cache: AnswerCache, texts: Sequence[str]) -> tuple[dict[str, str], bool]:
    """The same, decided by the first process alone; in the others the answers are empty."""
    found: dict[str, str] = {}

    def look() -> list[Any]:
        stored, proven = _stored(cache, texts)
        found.update(stored)
        return ["".join("01"[text in stored] for text in texts), proven]

    marks, proven = hosts.by_first(look)
    return {text: found.get(text, "") for text, mark in zip(texts, marks, strict=True) if mark == "1"}, proven


class _Window:
    """Stores answers, and stops the run when a window of them is mostly lost.

    Unusable answers are stored when their window has passed: those of a server that was set up wrong are not kept.
    A window of a few answers is judged only as long as nothing usable was ever answered.
    """

    def __init__(self, config: DescribeConfig, cache: AnswerCache) -> None:
        self._config, self._cache = config, cache
        self._proven = False
        self._reset()

    def _reset(self) -> None:
        self._seen = 0
        self._size = max(_MIN_CHECKED, 4 * self._config.concurrency) if self._proven else _MIN_CHECKED
        self._problems: Counter[str] = Counter()
        self._unusable: list[tuple[str, str]] = []

    def begin(self, proven: bool) -> None:
        """A new call; `proven`: usable answers are in the cache already."""
        self._proven |= proven
        self._reset()

    def add(self, text: str, answer: Answer) -> None:
        self._seen += 1
        if answer.text is None:
            self._problems[answer.problem] += 1
        elif parse_answer(answer.text) is None:
            self._problems["no usable <explanation>"] += 1
            self._unusable.append((text, answer.text))
        else:
            self._cache.put(text, answer.text)
        if self._seen >= self._size:
            self._check()

    def finish(self) -> None:
        """The rest, if there is enough of it to judge."""
        if not self._proven or self._seen >= _MIN_CHECKED:
            self._check()
        self._store()

    def _check(self) -> None:
        lost = sum(self._problems.values())
        if 2 * lost > self._seen:
            raise UserError(
                f"describe.provider {self._config.provider}: {lost} of {self._seen} answers were lost "
                f"({_counts(self._problems)}); check describe.model, describe.base_url and describe.max_new_tokens"
            )
        self._store()
        self._proven |= self._seen > 0
        self._reset()

    def _store(self) -> None:
        for text, answer in self._unusable:
            self._cache.put(text, answer)


def _counts(problems: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {problem}" for problem, count in sorted(problems.items()))
