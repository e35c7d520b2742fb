"""What answers say, and how they are asked for, kept, and given up."""

import json
import threading

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from nlae_jax.config import DescribeConfig
from nlae_jax.data import answers
from nlae_jax.data.answer_cache import AnswerCache
from nlae_jax.data.answers import Answer, cached_describer, parse_answer, thinks_at_end
from nlae_jax.data.describer import Context
from nlae_jax.runtime import processes, world
from nlae_jax.runtime.errors import UserError
from nlae_jax.runtime.supervision import Preempted

GOOD = "A tutorial on baking bread, whose present sentence still needs a verb after the word flour."
TAGGED = f"<explanation>{GOOD}</explanation>"
DRAFT = "<explanation>Perhaps it is a poem about the sea, or a list.</explanation>"
UNTAGGED = "I cannot help with that."

# --- parsing


@pytest.mark.parametrize(
    ("answer", "line"),
    [
        (TAGGED, GOOD),
        (f"Sure!\n<Explanation>\n- **{GOOD}**\n\n2. More.\n</Explanation> Bye", GOOD + " More."),
        (f"<explanation>\r\n * {GOOD}\r\n\u2028 10) More.\r\n</explanation>", GOOD + " More."),
        (f"in <explanation> tags: {TAGGED}", GOOD),
        (f"{DRAFT} No, better: {TAGGED}", GOOD),
        (f"{TAGGED} {TAGGED.replace('<', '(')}", GOOD),
        (f"{TAGGED} And <explanation>another that was cut off", GOOD),
        (f"<explanation >{GOOD}</EXPLANATION>", GOOD),
        (GOOD, None),
        (f"<explanation>{GOOD}", None),
        (f"{GOOD}</explanation>", None),
        ("<explanation></explanation>", None),
        ("<explanation>short</explanation>", None),
        ("<explanation>" + "long " * 1_000 + "</explanation>", None),
        ("<explanation>" + "x" * 100 + "</explanation>", None),
        ("", None),
    ],
)
def test_parse_answer(answer, line):
    assert parse_answer(answer) == line


@pytest.mark.parametrize(
    ("opened", "closed"),
    [
        ("<think>", "</think>"),
        ("<THINK >", "</Think>"),
        ("<thinking>", "</thinking>"),
        ("<thought>", "</thought>"),
        ("<reasoning>", "</reasoning>"),
        ("<seed:think>", "</seed:think>"),
        ("[THINK]", "[/THINK]"),
        ("◁think▷", "◁/think▷"),
        ("<|begin_of_thought|>", "<|end_of_thought|>"),
        ("<|START_THINKING|>", "<|END_THINKING|>"),
        ("<|channel>thought\n", "<channel|>"),
        ("<|inner_prefix|>", "<|inner_suffix|>"),
        ("<longcat_think>", "</longcat_think>"),
        ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
    ],
)
def test_thinking_is_no_answer(opened, closed):
    for thought in (DRAFT, "Between <explanation> and </explanation>.", "I open with <explanation> and", ""):
        assert parse_answer(f"{opened}\nHm. {thought}\n{closed}\n\n{TAGGED}") == GOOD
        assert parse_answer(f"{thought}\n{closed}\n\n{TAGGED}") == GOOD  # the prompt had opened it
        assert parse_answer(f"{thought}\n{closed}\n") is None
        assert parse_answer(f"{opened}\nHm. {thought}") is None  # cut off in it
        assert parse_answer(f"{opened}\nHm. {thought}\n{closed}\n") is None
        assert parse_answer(f"{opened}{thought}{closed}{TAGGED}{opened}Right? {DRAFT}{closed}") == GOOD
        assert parse_answer(f"{opened}{thought}{closed}{TAGGED}{opened}Right? {DRAFT}") == GOOD


@pytest.mark.parametrize(
    ("answer", "line"),
    [
        (f"<think>a <think>b {DRAFT}</think> c {DRAFT}</think>{TAGGED}", GOOD),
        (f"<think>a <think>b</think> c {DRAFT}", None),
        (f"<think>a</think> {DRAFT} <think>b {DRAFT}</think> {TAGGED}", GOOD),
        (f"<think>{DRAFT}</think>\nIt is about bread.</explanation>", None),
        (f"<think>Now <explanation> begins.</think>{GOOD}</explanation>", None),
        (f"No <thinking> without an end here: {TAGGED}", None),
        (f"{TAGGED} <think>", GOOD),
        (f"<explanation>Bread, <think>is it?</think>{GOOD}</explanation>", f"Bread, {GOOD}"),
        (
            f"<explanation>It quotes </think> and <think>. {GOOD}</explanation>",
            f"It quotes </think> and <think>. {GOOD}",
        ),
        (f"<think>It quotes </think>: <explanation>ends on </think>, as I see it.</explanation></think>{TAGGED}", GOOD),
    ],
)
def test_thinking_in_odd_places(answer, line):
    assert parse_answer(answer) == line


def test_prompts_that_begin_to_think():
    assert thinks_at_end("<|user|>x<|assistant|><think>\n")
    assert thinks_at_end("[SYSTEM] first [THINK]like this[/THINK] [INST]x[/INST][THINK]")
    assert not thinks_at_end("<|user|>x<|assistant|><think>\n\n</think>\n\n")
    assert thinks_at_end("<|turn>model\n<|channel>thought\n")
    assert not thinks_at_end("<|user|>x<|assistant|>")
    assert not thinks_at_end("<|turn>model\n<|channel>thought\n<channel|>")


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("bread \ud83d", "bread \ufffd"),
        ("\udc00 bread", "\ufffd bread"),
        ("bread \ud83c\udf5e", "bread \U0001f35e"),  # two parts of one character, as parts of content bring them
        ("\udf5e\ud83c", "\ufffd\ufffd"),
        ("bre\x00ad\x07", "bread"),
        ("\x1b[2Jbread\x9b", "[2Jbread"),
        ("\u202edaerb\u202c \ufeffbread", "daerb bread"),
    ],
)
def test_outside_text_is_clean(text, clean):
    assert Answer(text).text == clean
    assert parse_answer(f"<explanation>{GOOD} {text}</explanation>") == f"{GOOD} {clean}"


def test_long_answers_are_kept_as_what_they_say():
    long = "thoughts " * 50_000
    assert parse_answer(Answer(f"<think>{DRAFT}{long}</think>{TAGGED}").text) == GOOD
    assert parse_answer(Answer(f"{DRAFT}{long}</think>{TAGGED}").text) == GOOD
    assert parse_answer(Answer(f"{TAGGED}{long}").text) == GOOD
    for lost in (f"<think>{DRAFT}{long}", f"{DRAFT}{long}</think>", f"<explanation>{long}</explanation>", long):
        assert parse_answer(lost) is None and Answer(lost).text == ""
    assert len(Answer(f"<think>{long}</think>{TAGGED}").text) < 200


PIECES = [
    "<explanation>",
    "</explanation>",
    "<think>",
    "</think>",
    GOOD,
    "\r\n",
    " - ",
    "**",
    "\x85\u2028",
    "<",
    "\x00",
]
ANY = st.lists(st.sampled_from(PIECES) | st.characters() | st.sampled_from("\ud83d\ude00\ufeff\u202e")).map("".join)


@given(ANY)
@example(f"<explanation>\x00{GOOD}\ud800</explanation>")
def test_what_is_read_is_one_plain_line(answer):
    assert Answer(Answer(answer).text) == Answer(answer)
    line = parse_answer(answer)
    assert line == parse_answer(Answer(answer).text)
    if line is not None:
        line.encode("utf-8")
        assert len(line.splitlines()) == 1 and line == line.strip() and 20 <= len(line) <= 1_600
        assert min(line) >= " " and "\x7f" not in line


@pytest.mark.parametrize(
    "filler",
    ["\n", " ", "\n ", "- ", "1.", "\r\n", "*", "<", "< ", "</", "<think>", "<think >", "</think>", "<explanation>",
     "<explanation> ", "</explanation>", "<think><", "\x85", "<|channel|> "],
)  # fmt: skip
def test_answers_of_any_shape_are_read_in_one_pass(filler):
    """Where the time grows with the square of the length, this takes many minutes."""
    many = filler * (190_000 // len(filler))
    for text in (many, f"<explanation>{many}", f"<explanation>{GOOD}{many}</explanation>", f"<think>{many}</think>"):
        parse_answer(text)


# --- asking and keeping


def contexts(n):
    return [Context(f"doc{i}", f"Text number {i} about bread", ()) for i in range(n)]


def describer(tmp_path, reply, progress=None, end=lambda n: None, **fields):
    """A describer and the texts that it asked; `reply(n)` answers the n-th, after which `end(n)` may raise."""
    config, asked = DescribeConfig(provider="openai", **{"concurrency": 2, **fields}), []

    def ask(texts, keep):
        for i, text in enumerate(texts):
            n = len(asked)
            asked.append(text)
            answer = reply(n)
            if answer.text is not None:
                keep(i, answer.text)
            end(n)
            yield i, answer

    return cached_describer(config, AnswerCache(tmp_path / "answers", "m"), ask, progress), asked


@pytest.mark.parametrize("error", [KeyboardInterrupt, Preempted, UserError("401"), OSError("disk")])
def test_an_answer_is_kept_before_anything_else_happens(tmp_path, error):
    def end(n):
        if n == 7:
            raise error

    describe, first = describer(tmp_path, lambda n: Answer(TAGGED if n != 3 else UNTAGGED), end=end)
    with pytest.raises(error if isinstance(error, type) else type(error)):
        describe(contexts(20))
    describe, second = describer(tmp_path, lambda n: Answer(TAGGED))
    assert describe(contexts(20)) == [GOOD] * 3 + [None] + [GOOD] * 16
    assert first + second == [context.text for context in contexts(20)]


def test_a_stop_heard_while_nothing_comes(tmp_path):
    """Where a provider waits, the progress is asked, and may end it."""
    closed = threading.Event()

    def ask(texts, keep):
        try:
            while True:
                yield None
        finally:
            closed.set()

    def progress(rows):
        assert rows == 0
        raise Preempted

    cache = AnswerCache(tmp_path / "answers", "m")
    with pytest.raises(Preempted):
        cached_describer(DescribeConfig(), cache, ask, progress)(contexts(3))
    assert closed.is_set()


def test_unusable_answers_of_a_window_that_failed_are_asked_again(tmp_path):
    described, asked = describer(tmp_path, lambda n: Answer(TAGGED if n < 39 else UNTAGGED))
    with pytest.raises(UserError, match=r"9 of 16 answers were lost \(9 no usable <explanation>\)"):
        described(contexts(60))
    assert len(asked) == 48 and len(list((tmp_path / "answers").iterdir())) == 1
    described, asked = describer(tmp_path, lambda n: Answer(TAGGED))
    assert described(contexts(60)) == [GOOD] * 60
    assert asked == [context.text for context in contexts(60)[39:]]


def test_unusable_answers_that_came_as_the_window_failed_are_asked_again(tmp_path):
    """While the provider was being closed."""

    def ask(texts, keep):
        try:
            for i in range(16):
                keep(i, UNTAGGED)
                yield i, Answer(UNTAGGED)
        finally:
            keep(16, UNTAGGED)
            keep(17, TAGGED)

    cache = AnswerCache(tmp_path / "answers", "m")
    with pytest.raises(UserError, match="16 of 16"):
        cached_describer(DescribeConfig(), cache, ask, None)(contexts(18))
    assert cache.lookup([c.text for c in contexts(18)], str) == {contexts(18)[17].text: TAGGED}


def test_a_server_that_never_gave_anything_usable_is_asked_again(tmp_path):
    """Its run was ended before that was found out."""

    def end(n):
        if n == 9:
            raise KeyboardInterrupt

    describe, _ = describer(tmp_path, lambda n: Answer(UNTAGGED), end=end)
    with pytest.raises(KeyboardInterrupt):
        describe(contexts(12))
    describe, asked = describer(tmp_path, lambda n: Answer(TAGGED))
    assert describe(contexts(12)) == [GOOD] * 12 and len(asked) == 12


@pytest.mark.parametrize("usable", [True, False])
def test_all_processes_ask_what_the_first_has_no_answer_to(tmp_path, monkeypatch, usable):
    """Those that see no stored answers too, and only the first writes."""
    texts = [context.text for context in contexts(20)]
    cache = AnswerCache(tmp_path / "answers", "m")
    for n, text in enumerate(texts[:9]):
        cache.put(text, TAGGED if usable and n % 2 else UNTAGGED)
    decided, asked = [], {}

    def process(name, directory):
        def ask(texts, keep):
            asked[name] = list(texts)
            for i in range(len(texts)):
                keep(i, TAGGED)
                yield i, Answer(TAGGED)

        return cached_describer(DescribeConfig(), AnswerCache(directory, "m"), ask, None, together=4, by_all=True)

    monkeypatch.setattr(processes, "by_first", lambda work: decided.append(work()) or decided[0])
    expected = [GOOD if n % 2 or n > 7 or not usable else None for n in range(20)]
    assert process("first", tmp_path / "answers")(contexts(20)) == expected
    monkeypatch.setattr(world, "is_first", lambda: False)
    monkeypatch.setattr(processes, "by_first", lambda work: json.loads(json.dumps(decided[0])))
    process("second", tmp_path / "nowhere")(contexts(20))
    assert asked["first"] == asked["second"] == texts[8 if usable else 0 :]  # the third four are asked as a whole
    assert not (tmp_path / "nowhere").exists()


def test_why_answers_were_unusable_is_said(tmp_path):
    describe, _ = describer(tmp_path, lambda n: Answer("<think>", "cut off by describe.max_new_tokens"))
    with pytest.raises(UserError, match=r"16 of 16 answers were lost \(16 cut off by describe.max_new_tokens\)"):
        describe(contexts(20))


def test_stored_lines_hold_what_was_answered(tmp_path):
    describe, _ = describer(tmp_path, lambda n: Answer(f"<think>\x00hm</think>{TAGGED}"))
    describe(contexts(2))
    (part,) = (tmp_path / "answers").iterdir()
    assert [json.loads(line)["answer"] for line in part.read_text().splitlines()] == [f"<think>hm</think>{TAGGED}"] * 2


def test_the_prompt_holds_instruction_and_text():
    assert answers.build_prompt("caf\u00e9 \ud800").endswith("The text:\ncaf\u00e9 ?")
