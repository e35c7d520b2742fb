"""Messages: one line, of a length that can be read, that no terminal obeys."""

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nlae_jax.runtime.errors import UserError, one_line


@given(st.text(st.characters(), max_size=60), st.integers(10, 50))
def test_any_text_is_a_line_that_can_be_printed(text, longest):
    line = one_line(text, longest)
    assert line.isprintable() and len(line) <= longest
    line.encode("utf-8")
    assert str(UserError(text)).isprintable()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain  text, ünïcödé 中文", "plain  text, ünïcödé 中文"),
        ("two\r\n  lines\tand a tab ", "two lines and a tab "),
        ("\x1b[31mred\x07", r"\x1b[31mred\x07"),
        ("turned \u202e around", r"turned \u202e around"),
        ("half \ud83d a pair", r"half \ud83d a pair"),
    ],
)
def test_what_a_terminal_would_obey_is_written_out(text, expected):
    assert one_line(text) == str(UserError(text)) == expected


def test_a_message_stays_short():
    assert len(str(UserError("x" * 10**7))) == 2000
    assert one_line("\x1b" * 100, 20) == r"\x1b\x1b\x1b\x1b\x1…"[:19] + "…"


def test_it_passes_between_processes():
    assert str(pickle.loads(pickle.dumps(UserError("a\x1b")))) == r"a\x1b"
