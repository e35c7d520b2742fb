"""Reading documents: every source, every way a file can be wrong, and the installed documentation."""

import gzip
import hashlib
import io
import json
import logging
import os
import random
import sys
import types
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nlae_jax.config import CorpusConfig
from nlae_jax.data import corpus, documentation, parquet
from nlae_jax.data.corpus import Document, read_documents
from nlae_jax.data.kinds import kinds_of_files
from nlae_jax.runtime.errors import UserError
from nlae_jax.runtime.globs import matching_paths

LONG = "The quick brown fox jumps over the lazy dog near the river. "


def texts_of(n):
    return [f"Document number {i}. " + LONG * 3 for i in range(n)]


def config(path, **fields):
    return CorpusConfig(path=str(path), min_characters=fields.pop("min_characters", 50), **fields)


def write_jsonl(path, rows, opener=open):
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def error_of(config):
    with pytest.raises(UserError) as caught:
        read_documents(config)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- sources


def test_all_formats_give_the_same_documents(tmp_path):
    texts = texts_of(7)
    (tmp_path / "txt").mkdir()
    for i, text in enumerate(texts):
        (tmp_path / "txt" / f"{i}.txt").write_text(text, encoding="utf-8")
    rows = [{"text": text, "other": 1} for text in texts]
    write_jsonl(tmp_path / "a.jsonl", rows)
    write_jsonl(tmp_path / "a.jsonl.gz", rows, gzip.open)
    pq.write_table(pa.table({"other": range(7), "text": texts}), tmp_path / "a.parquet", row_group_size=2)
    names = ("txt/*.txt", "a.jsonl", "a.jsonl.gz", "a.parquet")
    results = [read_documents(config(tmp_path / name)) for name in names]
    assert results[0] == results[1] == results[2] == results[3]
    assert {document.text for document in results[0]} == {text.strip() for text in texts}
    assert all(len(document.doc_id) == 16 and int(document.doc_id, 16) >= 0 for document in results[0])


def test_order_and_ids_depend_on_the_text_alone(tmp_path):
    rows = [{"text": text} for text in texts_of(20)]
    first = read_documents(config(write_jsonl(tmp_path / "a.jsonl", rows)))
    random.Random(3).shuffle(rows)
    assert read_documents(config(write_jsonl(tmp_path / "b.jsonl", rows))) == first
    expected = sorted(hashlib.sha256(corpus.normalise(row["text"]).encode()).hexdigest()[:16] for row in rows)
    assert [document.doc_id for document in first] == expected


def test_a_subset_is_the_beginning_of_the_whole(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ({"text": text} for text in texts_of(1_500)))
    everything = read_documents(config(path))
    assert len(everything) == 1_500
    assert read_documents(config(path, max_documents=5)) == everything[:5]
    assert read_documents(config(path, max_documents=2_000)) == everything


def test_duplicates_and_short_texts_are_dropped_and_counted(tmp_path, caplog):
    text = texts_of(1)[0]
    rows = [{"text": t} for t in (text, "  " + text.upper().replace(" ", "\n"), "short", "")]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    with caplog.at_level(logging.INFO, logger="nlae_jax.data.corpus"):
        documents = read_documents(config(path))
    assert [document.text for document in documents] == [text.strip()]
    assert "1 duplicates, 2 too short" in caplog.text and "1 documents kept of 4" in caplog.text


def test_text_field_and_nested_glob(tmp_path):
    (tmp_path / "x" / "y").mkdir(parents=True)
    write_jsonl(tmp_path / "x" / "y" / "a.jsonl", [{"body": LONG}])
    documents = read_documents(config(tmp_path / "**" / "*.jsonl", text_field="body"))
    assert documents == [Document(documents[0].doc_id, LONG.strip())]


def test_a_file_name_that_holds_glob_characters(tmp_path):
    write_jsonl(tmp_path / "a[1].jsonl", [{"text": LONG}])
    assert len(read_documents(config(tmp_path / "a[1].jsonl"))) == 1


def test_byte_order_mark_blank_lines_and_lone_surrogates(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps({"text": LONG + "\ud800"}).encode() + b"\n\n  \n")
    assert read_documents(config(path))[0].text.endswith("\ufffd")


# --- what can be wrong with files


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'{"text": "a"}\n{"text": \n', "a.jsonl:2: not valid JSON"),
        (b'["text"]\n', "a.jsonl:1: a JSON list"),
        (b'{"body": "a", "id": 1}\n', "a.jsonl:1: no field 'text'; corpus.text_field must be one of: 'body', 'id'"),
        (b'{"text": null}\n', "a.jsonl:1: the field 'text' is null"),
        (b'{"text": 3}\n', "a.jsonl:1: the field 'text' is int"),
        (b'{"text": "a"}\n{"text": "\xff"}\n', "byte 24 is not valid UTF-8"),
        (b"[" * 100_000, "a.jsonl:1: not valid JSON"),
        (b'{"text": 1' + b"1" * 5_000 + b"}", "a.jsonl:1: not valid JSON"),
        (b"", "a.jsonl: the file is empty"),
        (b" \n\n", "a.jsonl: the file is empty"),
    ],
)
@pytest.mark.parametrize("zipped", [False, True])
def test_bad_json_lines(tmp_path, content, expected, zipped):
    path = tmp_path / ("a.jsonl.gz" if zipped else "a.jsonl")
    path.write_bytes(gzip.compress(content) if zipped else content)
    assert expected.replace("a.jsonl", path.name) in error_of(config(path))


def test_bad_text_files(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"abc\xe9def")
    message = error_of(config(tmp_path / "*.txt"))
    assert "a.txt: byte 3 is not valid UTF-8" in message
    (tmp_path / "a.txt").write_bytes(b"")
    assert "a.txt: the file is empty" in error_of(config(tmp_path / "*.txt"))


def test_damaged_archives(tmp_path):
    whole = gzip.compress(json.dumps({"text": LONG}).encode() * 50)
    for name, content in [("cut", whole[:-12]), ("plain", b'{"text": "a"}'), ("flipped", whole[:20] + b"\xff" * 9)]:
        path = tmp_path / f"{name}.jsonl.gz"
        path.write_bytes(content)
        assert f"{name}.jsonl.gz: " in error_of(config(path))


def test_bad_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 this is not parquet")
    assert "a.parquet: cannot be read" in error_of(config(path))
    pq.write_table(pa.table({"body": ["a"]}), path)
    assert "no column 'text'; corpus.text_field must be one of: 'body'" in error_of(config(path))
    pq.write_table(pa.table({"text": ["a", "b", None]}), path, row_group_size=1)
    assert "a.parquet: row 2: the field 'text' is null" in error_of(config(path))
    pq.write_table(pa.table({"text": [1, 2]}), path)
    assert "the field 'text' is int" in error_of(config(path))
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), path)
    assert "the file is empty" in error_of(config(path))


def not_utf8(values, kind=pa.string()):
    """A column whose bytes are not text, which Arrow believes."""
    stored = pa.array(values, pa.large_binary() if kind == pa.large_string() else pa.binary())
    return pa.Array.from_buffers(kind, len(values), stored.buffers(), stored.null_count)


BAD = [b"good", b"caf\xe9", None, b"also good"]


@pytest.mark.parametrize(
    "column",
    [
        not_utf8(BAD),
        not_utf8(BAD, pa.large_string()),
    ],
)
@pytest.mark.parametrize("row_group", [1, 100])
def test_parquet_that_is_not_utf8(tmp_path, column, row_group):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": column}), path, row_group_size=row_group)
    assert "a.parquet: row 1: text: cannot be read (" in error_of(config(path, min_characters=1))


def test_a_dictionary_of_parquet_that_is_not_utf8(tmp_path):
    column = pa.DictionaryArray.from_arrays(pa.array([0, 1, 0, 2]), not_utf8([b"good", b"\xff\xfe", b"x"]))
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    assert "a.parquet: cannot be read: Invalid UTF8" in error_of(config(tmp_path / "a.parquet", min_characters=1))


@pytest.mark.parametrize(
    "column",
    [
        pa.array([b"bytes"]),
        pa.array([["a list"]]),
        pa.array([{"a": "struct"}]),
        pa.array([1.5]),
        pa.array([10**18], pa.timestamp("us")),  # a year that Python does not have
        pa.array([None]),
        pa.array([True]),
    ],
)
def test_parquet_of_other_types(tmp_path, column):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": column}), path)
    assert "a.parquet: row 0: the field 'text' is " in error_of(config(path, min_characters=1))


def test_parquet_in_every_layout_of_strings(tmp_path):
    expected = None
    for kind in (pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())):
        pq.write_table(pa.table({"text": pa.array(texts_of(3)).cast(kind)}), tmp_path / "a.parquet")
        found = read_documents(config(tmp_path / "a.parquet"))
        assert len(found) == 3 and (expected is None or found == expected)
        expected = found


def test_the_kind_of_a_text_is_its_domain_or_the_name_of_its_file(tmp_path):
    few = [text.strip() for text in texts_of(6)]
    write_jsonl(tmp_path / "letters.jsonl", [{"text": few[0], "domain": "letters\n of 1850"}, {"text": few[1]}])
    odd = [{"text": few[2], "domain": 7}, {"text": few[3], "domain": "x" * 1000}]
    write_jsonl(tmp_path / "odd.v2.jsonl", odd)
    pq.write_table(pa.table({"text": few[4:], "domain": ["code", None]}), tmp_path / "table.parquet")
    for name, found in (
        ("*.jsonl", ["letters of 1850", "letters", "odd", "x" * 59 + "…"]),
        ("table.parquet", ["code", "table"]),
    ):
        of_text = {document.text: document.domain for document in read_documents(config(tmp_path / name))}
        assert [of_text[text] for text in few if text in of_text] == found
    assert {document.domain for document in read_documents(CorpusConfig(path="warmstart"))} > {"python", "chat"}


def test_files_of_one_document_are_of_the_kind_of_their_folder(tmp_path):
    """Nested folders, other endings, and files of several documents beside them."""
    texts = iter(text.strip() for text in texts_of(20))
    kind_of = {}

    def put(name, kind, count=1):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        own = [next(texts) for _ in range(count)]
        kind_of.update(dict.fromkeys(own, kind))
        if name.endswith(".txt"):
            (tmp_path / name).write_text(own[0])
        elif name.endswith(".parquet"):
            pq.write_table(pa.table({"text": own}), tmp_path / name)
        else:
            write_jsonl(tmp_path / name, [{"text": text} for text in own])

    put("corpus/novels/a.txt", "novels")
    put("corpus/novels/b.v2.txt", "novels")
    put("corpus/novels/c.jsonl", "novels")
    put("corpus/news/uk/a.txt", "uk")
    put("corpus/news/uk/d.parquet", "uk")
    put("corpus/top.txt", "corpus")
    put("corpus/letters.old.jsonl", "letters", 2)
    for page in range(5):  # a folder per document
        put(f"corpus/pages/page {page}/index.txt", "pages")
    documents = read_documents(config(tmp_path / "corpus" / "**"))
    assert {document.text: document.domain for document in documents} == kind_of
    # Whatever of them is read.
    assert {document.domain for document in read_documents(config(tmp_path / "corpus/novels/a.txt"))} == {"novels"}


def test_files_and_folders_of_one_name_are_different_kinds():
    several = [Path(name) for name in ("/c/x/part.jsonl", "/c/y/part.jsonl", "/c/v1.2.jsonl", "/c/v1.3.jsonl.gz")]
    several += [Path("/c/notes.jsonl"), Path("/c/notes.parquet"), Path("/c/.hidden.jsonl")]
    single = [Path(name) for name in ("/c/x/en/1.txt", "/c/x/en/2.txt", "/c/y/en/1.txt", "/c/y/fr/1.txt")]
    named = kinds_of_files(several, single)
    assert [named[path] for path in several] == [
        *("x/part", "y/part", "v1.2", "v1.3", "notes.jsonl", "notes.parquet", "hidden")
    ]
    assert [named[path] for path in single] == ["x/en", "x/en", "y/en", "fr"]
    assert kinds_of_files([], [Path("/a.txt")]) == {Path("/a.txt"): ""}


def test_a_column_named_domain_may_be_the_text(tmp_path):
    few = [text.strip() for text in texts_of(2)]
    pq.write_table(pa.table({"domain": few}), tmp_path / "a.parquet")
    write_jsonl(tmp_path / "a.jsonl", [{"domain": text} for text in few])
    for name in ("a.parquet", "a.jsonl"):
        found = read_documents(config(tmp_path / name, text_field="domain"))
        assert {(document.text, document.domain) for document in found} == {(text, "a") for text in few}


def test_any_damage_to_parquet_is_one_line(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": texts_of(20)}), path)
    whole, rng = path.read_bytes(), random.Random(0)
    refused = 0
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(bytes(data[: rng.randrange(len(data))] if rng.random() < 0.2 else data))
        try:
            read_documents(config(path, min_characters=1))
        except UserError as error:
            refused += 1
            assert "a.parquet" in str(error) and "\n" not in str(error)
    assert refused > 50


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_what_may_never_end_is_no_corpus(tmp_path, name):
    for make in (os.mkfifo, lambda path: os.symlink("/dev/zero", path)):
        make(tmp_path / name)
        assert f"{name}: should be a regular file" in error_of(config(tmp_path / "*"))
        (tmp_path / name).unlink()


@pytest.fixture
def short_lines(monkeypatch):
    monkeypatch.setattr(corpus, "_MOST_BYTES", 10_000)


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("line", [b" " * 20_000, b'{"text": "' + b"x" * 20_000, b"\0" * 20_000])
def test_a_line_without_end(tmp_path, short_lines, zipped, line):
    content = json.dumps({"text": LONG}).encode() + b"\n" + line
    path = tmp_path / ("a.jsonl.gz" if zipped else "a.jsonl")
    path.write_bytes(gzip.compress(content) if zipped else content)
    assert f"{path.name}:2: a line of more than 10,000 bytes" in error_of(config(path))


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_a_cell_without_end(tmp_path, short_lines, kind):
    texts = pa.array([LONG, "x" * 10_001, LONG]).cast(kind)
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    says = "a.parquet: row 1: the field 'text' has 10,001 characters; at most 10,000 are read"
    assert says in error_of(config(tmp_path / "a.parquet"))


def test_few_long_cells_are_read_at_once(tmp_path, monkeypatch):
    rows = 50
    pq.write_table(pa.table({"text": [f"{row} {LONG}" for row in range(rows)]}), tmp_path / "a.parquet")
    sizes = []
    check = parquet.check_batch
    monkeypatch.setattr(
        parquet, "check_batch", lambda path, start, batch: sizes.append(len(batch)) or check(path, start, batch)
    )
    assert len(read_documents(config(tmp_path / "a.parquet"))) == rows and max(sizes) == rows
    sizes.clear()
    monkeypatch.setattr(corpus, "_MOST_BYTES", 3 * len(LONG))
    assert len(read_documents(config(tmp_path / "a.parquet"))) == rows and max(sizes) <= 10


def test_of_a_line_without_end_only_the_beginning_is_read(tmp_path, short_lines, monkeypatch):
    """However far it goes on: here for ever."""
    asked = []

    class Endless(io.RawIOBase):
        def readline(self, size=-1):
            asked.append(size)
            return b"x" * size

    monkeypatch.setattr(corpus, "_unpacked", lambda path, stored: Endless())
    (tmp_path / "a.jsonl").write_text("x")
    assert "a line of more than 10,000 bytes" in error_of(config(tmp_path / "a.jsonl"))
    assert asked == [10_001]


def test_a_text_file_that_is_too_large(tmp_path, short_lines):
    (tmp_path / "a.txt").write_text("x" * 10_001)
    assert "a.txt: larger than the 10,000 bytes" in error_of(config(tmp_path / "a.txt"))
    (tmp_path / "a.txt").write_text("x" * 10_000)
    assert len(read_documents(config(tmp_path / "a.txt"))) == 1


@pytest.mark.parametrize(
    "pattern",
    ["**/*.txt", "**", "*/**/*.txt", "a/**", "**/b/**/*.txt", "**/**/*.txt", "a**/2.txt", "**.txt", "x [[]1]/**/*.txt"],
)
@pytest.mark.parametrize("absolute", [False, True])
def test_patterns_match_as_ever(tmp_path, monkeypatch, pattern, absolute):
    import glob

    for name in ("1.txt", "a/2.txt", "a/b/3.txt", "a/b/c/4.txt", "x [1]/y/5.txt", ".h/z/6.txt", "a/.7.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    monkeypatch.chdir(tmp_path)
    pattern = str(tmp_path / pattern) if absolute else pattern
    ours, theirs = matching_paths(pattern), glob.glob(pattern, recursive=True)
    ours, theirs = ({os.path.normpath(path) for path in found if os.path.isfile(path)} for found in (ours, theirs))
    assert ours == theirs


def test_links_in_circles(tmp_path, monkeypatch):
    """Each directory is read once; with two such links there would be 2^40 ways into it."""
    write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts_of(1)])
    (tmp_path / "b/c").mkdir(parents=True)
    write_jsonl(tmp_path / "b/c/d.jsonl", [{"text": texts_of(2)[1]}])
    for name, target in (("self", "."), ("b/up", ".."), ("b/c/top", "../.."), ("one", "two"), ("two", "one")):
        (tmp_path / name).symlink_to(target)
    elsewhere = tmp_path.with_name(f"{tmp_path.name}-elsewhere")
    elsewhere.mkdir()
    write_jsonl(elsewhere / "e.jsonl", [{"text": texts_of(3)[2]}])
    (tmp_path / "linked").symlink_to(elsewhere)
    assert len(read_documents(config(tmp_path / "**/*.jsonl"))) == 3
    assert len(list(matching_paths(str(tmp_path / "**/*.jsonl")))) == 3
    monkeypatch.chdir(tmp_path)
    assert len(read_documents(config("**/**/*.jsonl"))) == 3


def test_a_byte_order_mark_is_no_text_wherever_it_comes_from(tmp_path):
    text = "\ufeff" + LONG
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    write_jsonl(tmp_path / "a.jsonl", [{"text": text}])
    pq.write_table(pa.table({"text": [text]}), tmp_path / "a.parquet")
    for name in ("a.txt", "a.jsonl", "a.parquet"):
        (document,) = read_documents(config(tmp_path / name))
        assert document.text == LONG.strip()


def test_home_in_a_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_jsonl(tmp_path / "a.jsonl", [{"text": LONG}])
    assert len(read_documents(CorpusConfig(path="~/*.jsonl", min_characters=1))) == 1
    assert "the home directory of ~ cannot be found" in error_of(CorpusConfig(path="~nobody-of-this-name/*.jsonl"))


def test_bad_paths(tmp_path):
    assert "matches no file" in error_of(config(tmp_path / "*.jsonl"))
    assert "is a directory: write a glob such as" in error_of(config(tmp_path))
    (tmp_path / "a.csv").write_text("text\n")
    assert "a.csv: corpus.path reads files that end in .txt, .jsonl" in error_of(config(tmp_path / "*"))
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    assert "gone.txt: cannot be read: No such file" in error_of(config(tmp_path / "*.txt"))


def test_nothing_left_says_why(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "short"}, {"text": "also short"}])
    message = error_of(config(path))
    assert "no document is left of 2 read; dropped: 2 too short (corpus.min_characters is 50)" in message


def test_bad_configuration():
    assert "corpus.path and corpus.hub" in error_of(CorpusConfig(path="a.txt", hub="b/c"))
    assert "corpus.max_documents" in error_of(CorpusConfig(path="a.txt", max_documents=-1))


# --- the hub


class FakeRows(list):
    def shuffle(self, seed, buffer_size):
        return FakeRows(reversed(self))


def fake_datasets(monkeypatch, load_dataset):
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))


def test_hub_streams_and_stops_early(monkeypatch):
    asked = []

    def load_dataset(name, configuration, **options):
        asked.append((name, configuration, options))
        return FakeRows({"text": text} for text in texts_of(9))

    fake_datasets(monkeypatch, load_dataset)
    documents = read_documents(CorpusConfig(hub="owner/name:part", max_documents=3, min_characters=10))
    assert asked == [("owner/name", "part", {"split": "train", "streaming": True})]
    assert {document.text for document in documents} == {text.strip() for text in texts_of(9)[6:]}
    assert len(read_documents(CorpusConfig(hub="owner/name", min_characters=10))) == 9


@pytest.mark.parametrize(("text_field", "expected"), [("text", {"letters"}), ("domain", {""})])
def test_the_kind_of_a_hub_text_is_its_domain_unless_that_is_the_text(monkeypatch, text_field, expected):
    rows = FakeRows(
        {text_field: text} | ({"domain": "letters"} if text_field == "text" else {}) for text in texts_of(4)
    )
    fake_datasets(monkeypatch, lambda name, configuration, **options: rows)
    documents = read_documents(CorpusConfig(hub="owner/name", text_field=text_field, min_characters=10))
    assert {document.domain for document in documents} == expected


def test_hub_errors(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install" in error_of(CorpusConfig(hub="owner/name"))

    def fail(*_, **__):
        raise RuntimeError("no such\ndataset")

    fake_datasets(monkeypatch, fail)
    assert "corpus.hub 'owner/name' (split 'train') cannot be read: no such dataset" in error_of(
        CorpusConfig(hub="owner/name")
    )
    fake_datasets(monkeypatch, lambda *_, **__: FakeRows([{"text": None}]))
    assert "row 0: the field 'text' is null" in error_of(CorpusConfig(hub="owner/name"))


# --- the installed documentation

DOCSTRING = '''
    """Return the mean of the values that are given, or of the ones that pass the test.

    The mean is computed in one pass over the data, and it does not depend on the order in which
    they come. It is an error to call this with no values at all, because there is nothing to return.

    Examples
    --------
    >>> mean([1, 2, 3])
    2

    .. note:: hidden directive

    Copyright 2001 by somebody. All rights reserved.

    See :func:`~package.median` for a measure that is less easily moved by a few large values.
    """
'''


def test_documentation_is_read_and_never_run(tmp_path):
    package = tmp_path / "package"
    (package / "tests").mkdir(parents=True)
    marker = tmp_path / "ran"
    source = f"open({str(marker)!r}, 'w').close()\ndef mean(values):{DOCSTRING}"
    (package / "a.py").write_text(source)
    (package / "b.py").write_text(f"if True:\n  class A:\n    {DOCSTRING.replace('mean of', 'MEAN of')}")
    (package / "broken.py").write_text("def f(:\n" + '"""' + LONG * 9 + '"""')
    (package / "binary.py").write_bytes(b"\0\xff" * 400 + b'"""' + LONG.encode() * 9 + b'"""')
    (package / "code.py").write_text('"""' + "x[i] += y[j] * 3 // (k - 1);\n" * 30 + '"""')
    (package / "tests" / "c.py").write_text(f"def other():{DOCSTRING.replace('mean', 'other')}")
    texts = documentation.documentation_texts([tmp_path])
    assert not marker.exists()
    assert len(texts) == 1  # b.py repeats a.py but for one word
    assert texts[0].startswith("Return the ") and texts[0].endswith("few large values.")
    assert "See package.median for" in texts[0]
    for noise in (">>>", "Examples", "---", "hidden directive", "Copyright", ":func:"):
        assert noise not in texts[0]


def test_prose_is_told_from_lists_and_code():
    assert documentation.is_prose("This is a sentence about what the function does when it is called with nothing.")
    assert not documentation.is_prose("alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu")
    assert not documentation.is_prose("if (a[0] == b[1]) { return c->d(e, f) + 1; } else { x = {}; }")
    assert not documentation.is_prose("1 2 3")


@pytest.mark.slow
def test_the_default_corpus_is_large_and_clean():
    documents = read_documents(CorpusConfig())
    assert len(documents) >= 2_000
    assert len({document.doc_id for document in documents}) == len(documents)
    assert all(len(document.text) >= 350 and not document.text.startswith(">>> ") for document in documents)
    assert documents == sorted(documents, key=lambda document: document.doc_id)


@pytest.mark.parametrize("source", ["jsonl", "parquet", "hub"])
def test_ids_and_passages_of_every_source(tmp_path, monkeypatch, source):
    """Without its passage, a text of a passage that was trained on may be held out."""
    rows = [
        {"text": text, "id": number, "passage": passage}
        for number, (text, passage) in enumerate(zip(texts_of(3), (5, 5, 6), strict=True))
    ]
    if source == "jsonl":
        path = write_jsonl(tmp_path / "a.jsonl", rows)
    else:
        path = tmp_path / "a.parquet"
        pq.write_table(pa.table({name: [row[name] for row in rows] for name in rows[0]}), path)
    fake_datasets(monkeypatch, lambda name, configuration, **options: FakeRows(rows))
    settings = CorpusConfig(hub="owner/name", min_characters=10) if source == "hub" else config(path, min_characters=10)
    documents = sorted(read_documents(settings), key=lambda document: document.name)
    assert [(document.name, document.passage) for document in documents] == [("0", "5"), ("1", "5"), ("2", "6")]
