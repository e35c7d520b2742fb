"""Files of a workdir, in a directory and in a bucket: whole or not there, and one place that says which it is."""

import base64
import json
import math
import os
import pathlib
import stat
import subprocess
import sys
import threading

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from etils import epath
from hypothesis import given
from hypothesis import strategies as st

from nlae_jax.runtime import files
from nlae_jax.runtime.errors import UserError
from nlae_jax.runtime.files import (
    children,
    is_remote,
    json_line,
    kvstore,
    local_path,
    object_checksums,
    remove_abandoned,
    workdir_path,
)

pytest_plugins = ["tests.fake_gcs"]


@pytest.fixture(params=["directory", "bucket"])
def workdir(request, tmp_path):
    """A new workdir of each kind."""
    if request.param == "directory":
        return workdir_path(tmp_path / "W")
    request.getfixturevalue("gcs")
    return workdir_path("gs://bucket/runs/W")


def test_a_directory_stays_a_directory(tmp_path):
    assert type(workdir_path("runs/mine")) is type(pathlib.Path("runs/mine"))
    assert workdir_path(tmp_path) == tmp_path and not is_remote(tmp_path)
    assert kvstore(tmp_path) == {"driver": "file", "path": str(tmp_path)}


def test_home_is_where_a_tilde_says(tmp_path, monkeypatch):
    """A shell expands `--workdir ~/x` but not `--workdir=~/x`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert workdir_path("~/x") == tmp_path / "x" and workdir_path("~") == tmp_path
    assert local_path("~/a b/é", "--out") == tmp_path / "a b/é"
    assert workdir_path("a/~/x") == pathlib.Path("a/~/x")  # only at the beginning
    assert local_path(os.fsencode(tmp_path), "--out") == tmp_path


@pytest.mark.parametrize("name", ["~/x", "~nobody-of-this-name/x"])
def test_a_home_that_cannot_be_found(name, monkeypatch):
    """A container's user without an entry in passwd, and without HOME."""
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)
    with pytest.raises(UserError, match=rf"--workdir {name}: the home directory of ~ cannot be found"):
        workdir_path(name)


def test_a_workdir_is_called_what_can_be_said():
    assert local_path("caf\udce9", "--file") == pathlib.Path("caf\udce9")  # bytes that are not UTF-8
    with pytest.raises(UserError, match=r"^--workdir .* should be valid UTF-8"):
        workdir_path("caf\udce9")


@pytest.mark.parametrize("name", ["", " ", "\t\n", "a\0b"])
def test_a_name_that_is_no_path(name):
    for make, field in ((workdir_path, "--workdir"), (lambda name: local_path(name, "--out"), "--out")):
        with pytest.raises(UserError, match=f"^{field}") as error:
            make(name)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name", ["gs://bucket/x.jsonl", "gs:/bucket/x", "s3://bucket/x", pathlib.Path("gs://bucket/x")]
)
def test_only_a_workdir_may_be_in_a_bucket(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^--file (gs|s3):/.*: in a bucket; should be a path here"):
        local_path(name, "--file")
    if str(name).startswith("gs:/b"):  # written so, a run would go into a directory called gs:
        with pytest.raises(UserError, match=r"^--workdir gs:/bucket/x: .*gs://BUCKET/NAME"):
            workdir_path(name)


def test_a_bucket_keeps_its_name(gcs):
    path = workdir_path("gs://bucket/runs/mine/")
    assert isinstance(path, epath.Path) and is_remote(path) and is_remote(path / "a")
    assert str(path / "activations/x") == "gs://bucket/runs/mine/activations/x"
    assert workdir_path(path) == files.absolute(path) == path
    assert kvstore(path) == {"driver": "gcs", "bucket": "bucket", "path": "runs/mine"}


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("s3://bucket/x", "should be a directory or gs://BUCKET/NAME"),
        ("gs://", "a name within the bucket"),
        ("gs://bucket", "a name within the bucket"),
        ("gs://bucket//", "a name within the bucket"),
        ("gs://elsewhere/x", "bucket elsewhere cannot be read (there is no such bucket)"),
    ],
)
def test_a_name_that_cannot_be_a_workdir(gcs, name, says):
    with pytest.raises(UserError) as error:
        workdir_path(name)
    assert str(error.value).startswith(f"--workdir {name}: ") and says in str(error.value)


@pytest.mark.parametrize("status", [401, 403])
def test_a_bucket_that_refuses(gcs, status):
    gcs.refuse = lambda method, path: status
    with pytest.raises(UserError, match=r"--workdir gs://bucket/x: bucket bucket cannot be read .*refused by the test"):
        workdir_path("gs://bucket/x")


def test_a_bucket_that_may_only_be_read(gcs):
    path = workdir_path("gs://bucket/x") / "config.json"
    gcs.refuse_upload = lambda name: 403
    with pytest.raises(UserError, match=r"gs://bucket/x/config.json: these credentials may not write it \(Forbidden: "):
        files.write_json(path, {})
    assert not path.exists()


def test_without_the_client_for_buckets(gcs, monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UserError, match=r"--workdir gs://bucket/x: buckets need pip install '\.\[gcs\]'"):
        workdir_path("gs://bucket/x")


def test_what_is_written_is_read(workdir):
    table = pa.table({"row": [1, 2], "text": ["a", "é"]})
    files.write_json(workdir / "a/b.json", {"é": [1.5, None]})
    files.write_parquet(workdir / "a/c.parquet", table)
    assert files.read_json(workdir / "a/b.json") == {"é": [1.5, None]}
    assert files.read_text(workdir / "a/b.json").endswith("}\n")
    assert files.read_parquet(workdir / "a/c.parquet", "make it again") == table
    assert sorted(path.name for path in children(workdir / "a")) == ["b.json", "c.parquet"]
    assert list(children(workdir / "elsewhere")) == []
    assert sorted(str(path.relative_to(workdir)) for path in workdir.glob("*/*.json")) == ["a/b.json"]
    (workdir / "a/b.json").unlink()
    assert [path.name for path in children(workdir / "a")] == ["c.parquet"]


def test_what_is_damaged_is_named(workdir):
    files.write_atomically(workdir / "b.json", lambda path: path.write_bytes(b'{"a": \xff'))
    files.write_atomically(workdir / "c.parquet", lambda path: path.write_bytes(b"PAR1PAR1"))
    with pytest.raises(UserError, match=r"b\.json: not valid JSON"):
        files.read_json(workdir / "b.json")
    with pytest.raises(UserError, match=r"c\.parquet: damaged; make it again"):
        files.read_parquet(workdir / "c.parquet", "make it again")


def test_a_file_is_replaced_whole_or_not_at_all(workdir):
    path = workdir / "a.txt"
    files.write_atomically(path, lambda temporary: temporary.write_text("old"))

    def fail(temporary):
        temporary.write_text("half")
        raise OSError("no more")

    with pytest.raises(OSError, match="no more"):
        files.write_atomically(path, fail)
    assert files.read_text(path) == "old" and [path.name for path in children(workdir)] == ["a.txt"]
    files.write_atomically(path, lambda temporary: temporary.write_text("new"))
    assert files.read_text(path) == "new"


def test_an_object_of_many_parts(gcs):
    """Above 5 MB it is sent in parts, and there is nothing until the last one."""
    data, path = bytes(range(256)) * 40_000, workdir_path("gs://bucket/W") / "large"
    files.write_atomically(path, lambda temporary: temporary.write_bytes(data))
    assert path.read_bytes() == data and gcs.uploads == [("W/large", len(data))]


@pytest.mark.parametrize("copies", [True, False])
def test_a_directory_is_moved_and_removed(workdir, request, copies):
    """Also in a store that does not copy by itself."""
    for name, data in (("a/1", b"x"), ("a/b/2", b"y" * 10_000), ("a2", b"z"), ("ab/3", b"")):
        (workdir / name).parent.mkdir(parents=True, exist_ok=True)
        (workdir / name).write_bytes(data)
    if is_remote(workdir) and not copies:
        request.getfixturevalue("gcs").refuse = lambda method, path: 501 if "rewriteTo" in path else 0
    files.move(workdir / "a", workdir / "a.damaged")
    assert not (workdir / "a").exists()
    assert (workdir / "a.damaged/1").read_bytes() == b"x" and (workdir / "a.damaged/b/2").read_bytes() == b"y" * 10_000
    assert (workdir / "a2").read_bytes() == b"z" and (workdir / "ab/3").read_bytes() == b""
    files.remove(workdir / "a.damaged")
    assert sorted(path.name for path in children(workdir)) == ["a2", "ab"]


def test_checksums_are_those_of_the_store(gcs):
    path = workdir_path("gs://bucket/W")
    for number in range(120):  # more than a page
        (path / f"a/{number}").write_bytes(b"%d" % number)
    (path.parent / "W2").write_bytes(b"not below W")
    gcs.refuse = lambda method, url: 500 if "alt=media" in url else 0
    checksums = object_checksums(path)
    assert len(checksums) == 120
    assert base64.b64decode(checksums["a/7"]) == google_crc32c.value(b"7").to_bytes(4, "big")


# --- files that several processes write, or none any more


def test_two_at_once_have_files_of_their_own(tmp_path):
    """Each is in the middle of writing when the other begins and ends."""
    path, inside, done = tmp_path / "report.html", threading.Event(), threading.Event()

    def slow(temporary):
        temporary.write_text("slow")
        inside.set()
        assert done.wait(60)

    thread = threading.Thread(target=files.write_atomically, args=(path, slow))
    thread.start()
    assert inside.wait(60)
    files.write_text(path, "fast")
    assert path.read_text() == "fast"
    remove_abandoned(tmp_path)  # what is being written is not abandoned
    done.set()
    thread.join()
    assert path.read_text() == "slow"
    assert os.listdir(tmp_path) == ["report.html"]


def test_many_at_once(tmp_path):
    """Threads that write one file and clear away what others have left, as `nlae report` does."""
    path, failures = tmp_path / "report.html", []

    def work(text):
        try:
            for _ in range(50):
                files.write_text(path, text)
                remove_abandoned(tmp_path)
                assert path.read_text() in ("a" * 1000, "b" * 1000)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(letter * 1000,)) for letter in "abab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and os.listdir(tmp_path) == ["report.html"]


def test_what_killed_processes_left_is_removed_when_the_next_run_starts(tmp_path):
    code = (
        "import os, pathlib, signal; from nlae_jax.runtime.files import write_atomically\n"
        "write_atomically(pathlib.Path('a/b.json'), lambda t: (t.write_text('half'), os.kill(os.getpid(), 9)))"
    )
    environment = {**os.environ, "PYTHONPATH": str(pathlib.Path(files.__file__).parents[1])}
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=False).returncode == -9
    (left,) = (tmp_path / "a").iterdir()
    assert left.name.startswith(".b.json.") and left.read_text() == "half"
    (tmp_path / "a/mine.tmp").write_text("not hidden: a person's")
    remove_abandoned(tmp_path)
    assert left.exists()
    remove_abandoned(tmp_path, "*")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["mine.tmp"]
    remove_abandoned(tmp_path / "no such directory", "*")


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", none)
    files.write_text(tmp_path / "a", "x")
    assert (tmp_path / "a").read_text() == "x"
    (tmp_path / ".b.tmp").write_text("another's, for all that can be told")
    remove_abandoned(tmp_path)
    assert (tmp_path / ".b.tmp").exists()


def test_a_file_is_as_readable_as_any(tmp_path):
    before = os.umask(0o027)
    try:
        files.write_text(tmp_path / "a", "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


@pytest.mark.parametrize("name", ["n" * 255, "文" * 85, "😀" * 63])
def test_the_longest_name_can_be_written(tmp_path, name):
    files.write_text(tmp_path / name, "x")
    assert (tmp_path / name).read_text() == "x"


# --- what JSON cannot say


def test_numbers_that_json_lacks_are_null(workdir):
    value = {
        "a": math.nan,
        "b": [1.5, -math.inf],
        "c": {"d": (np.float32(math.inf), np.int64(3))},
        "e": np.float64(0.1),
    }
    files.write_json(workdir / "a.json", value)
    expected = {"a": None, "b": [1.5, None], "c": {"d": [None, 3]}, "e": 0.1}
    assert files.read_json(workdir / "a.json") == expected
    assert json.loads(files.read_text(workdir / "a.json"), parse_constant=pytest.fail) == expected


def test_text_that_utf8_cannot_say_is_kept_in_json(workdir):
    """A path of the command line that is not UTF-8 arrives so."""
    files.write_json(workdir / "a.json", {"path": "caf\udce9 é 🙂"})
    assert files.read_json(workdir / "a.json") == {"path": "caf\udce9 é 🙂"}


# --- files without end, and other files than were written


def fifo(path):
    os.mkfifo(path)


def device(path):
    path.symlink_to("/dev/zero")


def directory(path):
    path.mkdir()


@pytest.mark.parametrize("make", [fifo, device, directory])
def test_what_may_never_end_is_not_read(tmp_path, make):
    path = tmp_path / "a"
    make(path)
    for read in (files.read_json, files.read_text, files.read_bytes, lambda path: files.read_parquet(path, "")):
        with pytest.raises(UserError, match="a: should be a regular file"):
            read(path)


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 101)
    assert len(files.read_bytes(tmp_path / "a", most=101)) == 101
    with pytest.raises(UserError, match="a: larger than the 100 bytes"):
        files.read_bytes(tmp_path / "a", most=100)
    with (tmp_path / "b").open("wb") as file:
        file.truncate(1 << 40)  # takes no room on the disk
    with pytest.raises(UserError, match="b: larger than"):
        files.read_json(tmp_path / "b")


@pytest.mark.parametrize("content", [b"[" * 100_000, b"1" * 5000, b"", b"\xff", b"{", b"[" * 900 + b"{" + b"]" * 900])
def test_json_that_cannot_be_read_is_named(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.json: not valid JSON"):
        files.read_json(tmp_path / "a.json")


@pytest.mark.parametrize(
    "content",
    [
        [],
        None,
        3,
        "a",
        {},
        {"a": 1},
        {"a": "1", "b": 1},
        {"a": True, "b": 1},
        {"a": 1, "b": None},
        {"a": 1, "b": 10**400},
    ],
)
def test_fields_that_are_missing_or_of_another_type(tmp_path, content):
    files.write_json(tmp_path / "a.json", content)
    with pytest.raises(UserError, match=r"a\.json: "):
        files.read_fields(tmp_path / "a.json", {"a": int, "b": float})
    files.write_json(tmp_path / "a.json", {"a": 1, "b": 2, "c": None})
    assert files.read_fields(tmp_path / "a.json", {"a": int, "b": float})["c"] is None


def test_a_flipped_bit_of_a_table_is_noticed(workdir):
    table = pa.table({"text": ["some words that are not repeated"] * 5 + ["others"], "row": list(range(6))})
    files.write_parquet(workdir / "a.parquet", table)
    whole = (workdir / "a.parquet").read_bytes()
    noticed = 0
    for position in range(0, len(whole), 11):
        data = bytearray(whole)
        data[position] ^= 1
        (workdir / "a.parquet").write_bytes(bytes(data))
        try:
            assert files.read_parquet(workdir / "a.parquet", "again", {"text": "texts", "row": "whole numbers"}).equals(
                table
            )
        except UserError as error:
            noticed += 1
            assert "again" in str(error) and "\n" not in str(error)
    assert noticed > 5


def test_tables_without_checksums_and_in_any_directory_are_read(tmp_path):
    """Those of older runs; and a directory called a=1 is no column."""
    (tmp_path / "a=1").mkdir()
    table = pa.table({"row": [1, 2]})
    pq.write_table(table, tmp_path / "a=1/t.parquet")
    assert files.read_parquet(tmp_path / "a=1/t.parquet", "") == table


def test_a_table_that_lacks_what_is_needed(workdir):
    files.write_parquet(workdir / "a.parquet", pa.table({"row": [1]}))
    with pytest.raises(UserError, match=r"a\.parquet: damaged \(no column 'text'\); again"):
        files.read_parquet(workdir / "a.parquet", "again", {"row": "whole numbers", "text": "texts"})
    with pytest.raises(UserError, match=r"b\.parquet: missing; again"):
        files.read_parquet(workdir / "b.parquet", "again")


def test_tensorstore_takes_every_path_that_a_person_writes(tmp_path, monkeypatch):
    """It refuses ".." in a path, and a relative path is another's as soon as the process changes directory."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for name in ("../there/vectors", "there/../../there/vectors", str(tmp_path / "there/vectors")):
        assert kvstore(pathlib.Path(name)) == {"driver": "file", "path": str(tmp_path / "there/vectors")}


@given(st.dictionaries(st.text(), st.text()))
def test_a_line_of_json_is_one_line_to_every_reader(value):
    """Of text too, whose `splitlines` ends lines at ten characters."""
    line = json_line({"\x85": "\u2028\u2029\x0b\x0c\x1c\x1d\x1e\r\n", **value})
    assert line.splitlines() == [line] and json.loads(line).items() >= value.items()
    assert json_line({"a": float("nan"), "b": "é"}, (",", ":")) == '{"a":null,"b":"é"}'


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999"])
def test_a_number_that_is_none_is_no_field(tmp_path, number):
    (tmp_path / "a.json").write_text(f'{{"b": {number}}}')
    with pytest.raises(UserError, match=r"a\.json: b should be a float"):
        files.read_fields(tmp_path / "a.json", {"b": float})


@pytest.mark.parametrize("column", [["1"], [1.0], [None], [True]])
def test_a_column_of_another_type_is_damage(workdir, column):
    files.write_parquet(workdir / "a.parquet", pa.table({"row": column}))
    with pytest.raises(UserError, match=r"the column 'row' should hold whole numbers, without nulls\); again"):
        files.read_parquet(workdir / "a.parquet", "again", {"row": "whole numbers"})


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())], ids=str
)
def test_texts_are_texts_in_every_layout(workdir, kind):
    """A table that another program has rewritten may have its texts in another layout."""
    files.write_parquet(workdir / "a.parquet", pa.table({"text": pa.array(["a", "b", "a"], kind)}))
    table = files.read_parquet(workdir / "a.parquet", "again", {"text": "texts"})
    assert table["text"].to_pylist() == ["a", "b", "a"]


@pytest.mark.parametrize("kind", [pa.int64(), pa.binary(), pa.dictionary(pa.int32(), pa.int64())], ids=str)
def test_what_is_no_text_in_any_layout(kind):
    assert not files.is_text(kind)
