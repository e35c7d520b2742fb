"""Parts that all describers share that ask a language model: instruction, parsing, cache, bookkeeping."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from nlae_jax.config import DescribeConfig
from nlae_jax.data.answer_cache import AnswerCache
from nlae_jax.data.describer import Context, Describer, Progress
from nlae_jax.runtime import processes
from nlae_jax.runtime.errors import UserError

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

_MIN_CHARACTERS = 20
_MAX_CHARACTERS = 1_600  # about 400 tokens: three times the length that the instruction asks for
_MAX_ANSWER_CHARACTERS = 200_000  # of an answer, thinking included

_UNUSABLE = "no usable <explanation>"
_MIN_CHECKED = 16  # the share of lost answers is first checked after this many answers


# --- parsing an answer

# Names and signs that models put around their thinking before they answer.
_THINKING = "think|thinking|thought|reasoning|reflection|scratchpad|seed:think|longcat_think"
_TAG = re.compile(
    r"(?=[<\[◁])(?:"  # eight times as fast as trying every alternative at every character
    rf"(?P<open><(?:{_THINKING})\s{{0,9}}>|\[think\]|◁think▷|<\|begin_of_thought\|>|<\|start_thinking\|>"
    r"|<\|inner_prefix\|>|<\|channel>\s{0,9}thought)"
    rf"|(?P<close></(?:{_THINKING})\s{{0,9}}>|\[/think\]|◁/think▷|<\|end_of_thought\|>|<\|end_thinking\|>"
    r"|<\|inner_suffix\|>|<channel\|>)"
    r"|(?P<analysis><\|channel\|>\s{0,9}(?:analysis|commentary))|(?P<final><\|channel\|>\s{0,9}final)"
    r"|(?P<begin><explanation\s{0,9}>)|(?P<end></explanation\s{0,9}>))",
    re.IGNORECASE,
)
_THOUGHT = re.compile(rf"<({_THINKING})\s{{0,9}}>[^<]*</\1\s{{0,9}}>", re.IGNORECASE)
_LIST_MARK = re.compile(r"^\s*(?:[-*•]|\d{1,2}[.)])(?:\s+|$)")  # of one line
_QUOTES = tuple("\"'“‘`«")
_SURROGATE = re.compile("[\ud800-\udfff]")
# Control characters that are not white space, and marks that change the direction of the text.
_CONTROL = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]")


@dataclass(frozen=True)
class Answer:
    """The answer to one prompt. `text` is None where none came; `problem` then says why in a few words.

    The text is clean: valid Unicode of bounded length without control characters. Where there is a text, `problem` is
    the reason to report if it holds no explanation.
    """

    text: str | None
    problem: str = ""

    def __post_init__(self) -> None:
        if self.text is not None:
            object.__setattr__(self, "text", _clean(self.text))


def _clean(text: str) -> str:
    """Cleans text from outside, see `Answer`. Of a text that is too long only its explanation is kept."""
    if _SURROGATE.search(text):  # a pair of surrogates is one character; a lone one is invalid
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    text = _CONTROL.sub("", text)
    if len(text) > _MAX_ANSWER_CHARACTERS:
        body = _scan(text).explanation or ""
        text = f"<explanation>{body}</explanation>" if 0 < len(body) < _MAX_ANSWER_CHARACTERS // 2 else ""
    return text


def build_prompt(text: str) -> str:
    """Returns the user message that asks for a description of `text`."""
    return f"{INSTRUCTION}\n\nThe text:\n{text.encode('utf-8', 'replace').decode('utf-8')}"


def parse_answer(answer: str) -> str | None:
    """Returns an answer's explanation as one line of plain text, or None if there is no usable one.

    The explanation stands between the last pair of tags that is not part of the model's thinking.
    """
    body = _scan(_clean(answer)).explanation
    if body is None:
        return None
    lines = [_LIST_MARK.sub("", line) for line in _THOUGHT.sub("", body).splitlines()]
    line = " ".join(" ".join(lines).replace("**", "").split())
    return line if _MIN_CHARACTERS <= len(line) <= _MAX_CHARACTERS and " " in line else None


def explanation_of(response: str) -> str | None:
    """Returns an answer's explanation unchanged but stripped, or None where there is none or it is empty."""
    return (_scan(_clean(response)).explanation or "").strip() or None


def begins_with_thinking(text: str) -> bool:
    """Returns whether the first tag of `text` closes a model's thinking, or opens it at the text's very beginning.

    A tag in quotation marks does not count: the text is about it.
    """
    tags = (tag for tag in _TAG.finditer(text) if text[max(0, tag.start() - 1) : tag.start()] not in _QUOTES)
    first = next(tags, None)
    if first is None or first.lastgroup in ("begin", "end"):
        return False
    return first.lastgroup in ("close", "final") or not text[: first.start()].strip()


def thinks_at_end(text: str) -> bool:
    """Returns whether `text` ends inside a model's thinking, as the prompts of some chat templates do."""
    return _scan(text).thinking > 0


class _Scan(NamedTuple):
    explanation: str | None  # the last one outside of thinking
    thinking: int  # tags of thinking that are open at the end


def _scan(text: str) -> _Scan:
    """Finds the explanation in one pass over the tags. A thinking tag inside a complete explanation is a quotation.

    Where thinking is closed but was never opened, the prompt opened it: all text before was thinking. Where thinking is
    never closed, the answer was cut off in it. Thinking that quotes its own opening tag reads like that too. This loses
    an answer, which is counted and reported; taking a draft for the answer would go unnoticed.
    """
    thinking, explanation = 0, None
    start, thinking_before = -1, 0  # where the open explanation begins, and the value of `thinking` there
    for tag in _TAG.finditer(text):
        match tag.lastgroup:
            case "begin":
                start, thinking_before = tag.end(), thinking
            case "end" if start >= 0:
                thinking = thinking_before
                explanation = explanation if thinking else text[start : tag.start()]
                start = -1
            case "open":
                thinking += 1
            case "close" if thinking:
                thinking -= 1
            case "analysis":
                thinking = 1
            case "final" if thinking:
                thinking = 0
            case "close" | "final":
                thinking, explanation = 0, None
    return _Scan(explanation, thinking)


# --- asking


Keep = Callable[[int, str], None]  # (index of the text, answer): records the answer; may be called from any thread


class Ask(Protocol):
    def __call__(self, texts: Sequence[str], keep: Keep) -> Generator[tuple[int, Answer] | None, None, None]:
        """Yields (index of the text, answer) in any order, and None now and then while no answer comes.

        An answer with a text is handed to `keep` as soon as it arrives, before anything can fail. Closing the generator
        stops the requests under way.
        """
        ...


def cached_describer(
    config: DescribeConfig,
    cache: AnswerCache,
    ask: Ask,
    progress: Progress | None,
    together: int = 1,
    by_all: bool = False,
) -> Describer:
    """Makes a describer that asks only about texts that the cache has no answer to.

    Raises UserError when more than half of the answers are lost. The share is checked after the first `_MIN_CHECKED`
    answers (or all, if there are fewer) and after each further `4 * concurrency`, so that a wrong model or a dead
    server ends the run early. Usable answers stay stored.

    `together` consecutive texts are asked as a whole or not at all. Where an answer depends on the other prompts of its
    batch, a resumed run then has the batches, and so the answers, of a run that was never killed. With `by_all` every
    process asks about the same texts: those that the first process has no answer to. Only that one reads the cache.
    """
    window = _Window(config, cache)
    report = progress or (lambda _: None)

    def describe(contexts: Sequence[Context]) -> list[str | None]:
        count = Counter(context.text for context in contexts)
        texts = list(count)
        lines = _stored_by_first(cache, texts) if by_all else _stored(cache, texts)
        groups = [texts[start : start + together] for start in range(0, len(texts), together)]
        to_ask = [text for group in groups if not all(text in lines for text in group) for text in group]
        for text in to_ask:
            lines.pop(text, None)
        if lines:
            report(sum(count[text] for text in lines))
        unanswered: Counter[str] = Counter()
        window.begin(proven=any(lines.values()))
        with cache, window, closing(ask(to_ask, lambda index, answer: window.keep(to_ask[index], answer))) as results:
            for result in results:
                cache.sync()
                if result is None:
                    report(0)
                    continue
                text, answer = to_ask[result[0]], result[1]
                line = None if answer.text is None else parse_answer(answer.text)
                window.add(text, line, answer)
                if answer.text is not None:
                    lines[text] = line
                else:
                    unanswered[answer.problem] += 1
                report(count[text])
            window.finish()
        dropped = unanswered + Counter({_UNUSABLE: sum(line is None for line in lines.values())})
        logger.info(
            "describe: %d texts, %d answered anew, %d dropped%s",
            len(texts), len(to_ask), dropped.total(), f" ({_counts(dropped)})" if dropped else "",
        )  # fmt: skip
        return [lines.get(context.text) for context in contexts]

    return describe


def _stored(cache: AnswerCache, texts: Sequence[str]) -> dict[str, str | None]:
    """Returns text -> its stored explanation, or None for an unusable answer.

    Without any usable answer it returns {}: a server that never gave one was set up wrong, and is asked again.
    """
    lines = cache.lookup(texts, parse_answer)
    return lines if any(lines.values()) else {}


def _stored_by_first(cache: AnswerCache, texts: Sequence[str]) -> dict[str, str | None]:
    """Returns what `_stored` does, read by the first process alone.

    The other processes learn which texts have a usable answer, but not the answers.
    """
    lines: dict[str, str | None] = {}

    def look() -> str:
        lines.update(_stored(cache, texts))
        return "".join("0" if text not in lines else "1" if lines[text] else "-" for text in texts)

    marks = processes.by_first(look)
    value_of = {"1": "known to the first process", "-": None}
    return {text: lines.get(text, value_of[mark]) for text, mark in zip(texts, marks, strict=True) if mark in value_of}


class _Window:
    """Stores answers, and stops the run when most answers of a window are lost.

    Unusable answers are withdrawn when their window fails, because a server that was set up wrong must be asked again.
    A last window of only a few answers is judged only if no usable answer ever came. It is a context manager, left when
    no more answers come.
    """

    def __init__(self, config: DescribeConfig, cache: AnswerCache) -> None:
        self._config, self._cache = config, cache
        self._proven = self._failed = False
        self._unjudged: set[str] = set()  # texts with an unusable answer whose window has not passed
        self._reset()

    def _reset(self) -> None:
        self._seen = 0
        self._size = max(_MIN_CHECKED, 4 * self._config.concurrency) if self._proven else _MIN_CHECKED
        self._problems: Counter[str] = Counter()
        self._unusable: list[str] = []

    def begin(self, proven: bool) -> None:
        """Begins a new call of the describer. `proven` says that the cache already holds usable answers."""
        self._proven |= proven
        self._reset()

    def __enter__(self) -> _Window:
        return self

    def __exit__(self, *_: object) -> None:
        if self._failed:
            self._cache.withdraw(list(self._unjudged))
            self._failed = False
        self._unjudged.clear()

    def keep(self, text: str, answer: str) -> None:
        """Stores an answer at once, because it was paid for. May be called from any thread."""
        self._cache.put(text, answer)
        if parse_answer(answer) is None:
            self._unjudged.add(text)

    def add(self, text: str, line: str | None, answer: Answer) -> None:
        """Counts an answer whose explanation is `line`, and judges the window if it is full."""
        self._seen += 1
        if line is None:
            self._problems[answer.problem or _UNUSABLE] += 1
            self._unusable.append(text)
        if self._seen >= self._size:
            self._check()

    def finish(self) -> None:
        """Judges the last, incomplete window, if it has enough answers."""
        if not self._proven or self._seen >= _MIN_CHECKED:
            self._check()

    def _check(self) -> None:
        lost = self._problems.total()
        if 2 * lost > self._seen:
            self._failed = True
            raise UserError(
                f"describe.provider {self._config.provider}: {lost} of {self._seen} answers were lost "
                f"({_counts(self._problems)}); check describe.model, describe.base_url and describe.max_new_tokens"
            )
        self._unjudged.difference_update(self._unusable)
        self._proven |= self._seen > 0
        self._reset()


def _counts(problems: Mapping[str, int]) -> str:
    """Lists problems with their counts, for a message."""
    return ", ".join(f"{count} {problem}" for problem, count in sorted(problems.items()))
