"""JSON and YAML of others: whatever is wrong is one line that names the file, and nothing takes long."""

import io
import json
import logging
import os

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from nlae_jax.runtime.errors import UserError
from nlae_jax.runtime.outside import clean_log, encodable, parse_json, quoted, read_bytes, read_json, read_yaml

BILLION_LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + before] * 9)}]\n"
    for before, name in zip("abcdefghi", "bcdefghij", strict=True)
)
MERGED_LAUGHS = "a: &a {x: 1, y: 2}\n" + "".join(
    f"{name}: &{name} {{<<: [{', '.join(['*' + before] * 9)}]}}\n"
    for before, name in zip("abcdefghi", "bcdefghij", strict=True)
)


def complaint(read, path, content):
    """The message, which is one short line with the file's name first."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as caught:
        read(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and message.isprintable() and len(message) < 400
    return message.removeprefix(f"{path}: ")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "not valid JSON (Expecting value at line 1)"),
        ("{\n'a'", "at line 2"),
        ("[]", "should hold an object; it holds []"),
        ("null", "should hold an object; it holds None"),
        ('"' + "x" * 10**6 + '"', "should hold an object; it holds 'xxx"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        ('{"a": 1' + "0" * 6000 + "}", "a number of 6001 digits"),
        ('{"a": -1' + "0" * 400 + "}", "a number of 402 digits"),
        ('{"a": 1e999}', "1e999 is not a finite number"),
        ('{"a": NaN}', "NaN is not a finite number"),
        ('{"a": -Infinity}', "-Infinity is not a finite number"),
        ('{"a": "\x1b"}', "Invalid control character"),
        (b"\xff\xfe{}", "not UTF-8 at byte 0"),
        (b"\xef\xbb\xbf{}", "BOM"),
        ('{"a": 1} {"b": 2}', "Extra data"),
    ],
)
def test_json_that_is_not_what_it_should_be(tmp_path, content, says):
    assert says in complaint(read_json, tmp_path / "config.json", content)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "should hold fields with values; it holds None"),
        ("- a", "should hold fields with values; it holds ['a']"),
        ("a: [", "not valid YAML"),
        ("a: b\n---\nc: d", "another document at line 2"),
        (b"a: \xff", "not UTF-8 at byte 3"),
        ("[" * 100_000, "nested too deeply"),
        ("- " * 50_000, "nested too deeply"),
        ("? " * 20_000, "nested too deeply"),
        (BILLION_LAUGHS, "its aliases expand to more than 100000 values"),
        (MERGED_LAUGHS, "its aliases expand to more than 100000 values"),
        ("a: &a [*a]", "an alias that contains itself"),
        ("a: &a {b: *a}", "an alias that contains itself"),
        ("a: *b", "undefined alias 'b'"),
        ("a: 1" + "0" * 5000, "a number of too many digits"),
        ("a: 0x" + "f" * 6000, "takes more than 64 bits"),
        ("a: 9223372036854775808", "takes more than 64 bits"),
        ("a: .inf", "not finite"),
        ("a: .nan", "not finite"),
        ("a: {b: [.nan]}", "not finite"),
        ("date: 2026-13-45", "month must be in 1..12"),
        ("date: 2026-02-30 25:61:61", "day is out of range for month"),
        ("? [a]\n: b", "unhashable key"),
        ("a: !!python/object/apply:os.system [x]", "could not determine a constructor"),
        ("a: !!timestamp x", "does not fit its tag"),
        ("a: !!bool maybe", "does not fit its tag"),
        ("a: '\x1b'", "special characters are not allowed"),
        ("a: " + "x" * (1 << 18), "larger than 256 kB"),
    ],
)
def test_yaml_that_is_not_what_it_should_be(tmp_path, content, says):
    assert says in complaint(read_yaml, tmp_path / "nla_meta.yaml", content)


@pytest.mark.parametrize("read", [read_json, read_yaml])
def test_what_is_no_file_is_not_waited_for(tmp_path, read):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(UserError, match="should be a file"):
            read(path)
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "none")


def test_a_file_of_any_size_is_not_read_whole(tmp_path):
    with (tmp_path / "large").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(UserError, match="larger than 65536 kB"):
        read_bytes(tmp_path / "large")


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**62), 2**62)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3),
    max_leaves=10,
)


@given(st.dictionaries(st.text(max_size=5), json_values, max_size=4))
def test_what_others_write_is_read(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("outside") / "file"
    path.write_text(json.dumps(value), encoding="utf-8")
    assert read_json(path) == value
    path.write_text(yaml.safe_dump(value, allow_unicode=True), encoding="utf-8")
    assert read_yaml(path) == value


@given(st.binary(max_size=60))
@example(b"a: 1_000:60")
@example(b"a: !!omap [x]")
def test_no_bytes_are_a_traceback(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("outside") / "file"
    path.write_bytes(content)
    for read in (read_json, read_yaml):
        try:
            value = read(path)
        except UserError:
            continue
        assert isinstance(value, dict)


def test_half_a_surrogate_pair_becomes_the_sign_for_it():
    assert parse_json(rb'{"a\ud83d": ["\ud83d", "\ud83d\ude00"]}', "x") == {"a\ufffd": ["\ufffd", "😀"]}
    assert parse_json('"\ud83d"', "x") == encodable("\ud83d") == "\ufffd"


def test_yaml_too(tmp_path):
    (tmp_path / "file").write_text(r'a: "\ud83d"')
    assert read_yaml(tmp_path / "file") == {"a": "\ufffd"}


def test_aliases_that_stay_small_are_followed(tmp_path):
    (tmp_path / "file").write_text("a: &a [1, 2]\nb: *a\nc: {<<: {d: 3}}\n")
    assert read_yaml(tmp_path / "file") == {"a": [1, 2], "b": [1, 2], "c": {"d": 3}}


def test_numbers_of_our_own_may_be_none():
    """A workdir's files, which older versions wrote with NaN in them."""
    assert str(parse_json("[NaN, -Infinity]", "eval.json", list, finite=False)) == "[nan, -inf]"


@pytest.mark.parametrize("kind", [dict, list, str, int])
def test_the_outermost_value_is_what_was_asked_for(kind):
    texts = {dict: "{}", list: "[]", str: '"x"', int: "3"}
    for other, text in texts.items():
        if other is kind:
            assert isinstance(parse_json(text, "x", kind), kind)
        else:
            with pytest.raises(UserError, match=r"^x: should hold"):
                parse_json(text, "x", kind)


def test_any_value_can_be_quoted():
    deep = []
    for _ in range(100_000):
        deep = [deep]
    assert quoted(10**5000) == "a int too large to show"
    assert quoted(deep) == "a list too large to show"
    assert len(quoted("x" * 10**6)) == 120
    assert quoted("a\x1b\n") == r"'a\x1b\n'"


def test_logs_of_a_library_are_safe_to_print():
    name, stream = "nlae_jax_tests.library", io.StringIO()
    logger, inner = logging.getLogger(name), logging.getLogger(f"{name}.inner")
    handler = logging.StreamHandler(stream)
    logger.addHandler(handler)
    logger.propagate = False
    for _ in range(2):
        clean_log(name)
    inner.warning("token %s", "\x1b]0;title\x07")
    logger.warning("100%\x07")
    assert stream.getvalue() == "token \\x1b]0;title\\x07\n100%\\x07\n"
    assert len(handler.filters) == 1
