"""Files of a workdir, in a directory and in a bucket: whole or not there, and one place that says which it is."""

import base64
import pathlib
import sys

import google_crc32c
import pyarrow as pa
import pytest
from etils import epath

from nlae_jax import files
from nlae_jax.errors import UserError
from nlae_jax.files import children, is_remote, kvstore, object_checksums, workdir_path

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


def test_checksums_are_those_of_the_store(gcs):
    path = workdir_path("gs://bucket/W")
    for number in range(120):  # more than a page
        (path / f"a/{number}").write_bytes(b"%d" % number)
    (path.parent / "W2").write_bytes(b"not below W")
    gcs.refuse = lambda method, url: 500 if "alt=media" in url else 0
    checksums = object_checksums(path)
    assert len(checksums) == 120
    assert base64.b64decode(checksums["a/7"]) == google_crc32c.value(b"7").to_bytes(4, "big")
