"""The script that gathers text cuts, cleans and deals it; nothing here is fetched."""

import importlib.util
import io
import itertools
import sys
import tarfile
import zlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

SCRIPT = Path(__file__).parent.parent / "experiments/smollm2/texts.py"
spec = importlib.util.spec_from_file_location("smollm2_texts", SCRIPT)
texts = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = texts  # dataclasses look their module up
spec.loader.exec_module(texts)

SENTENCE = "The keeper of the light on the point said that it was a cold night and that he would not go to the town. "
PROSE = SENTENCE * 5


@pytest.mark.parametrize(
    ("tokens", "prose"),
    [
        ("The jury said , `` No evidence '' , and left .", 'The jury said, "No evidence," and left.'),
        ("`` Who was that '' ? ? He asked .", '"Who was that?" He asked.'),
        ("more ' pro ' letters than ' con ' letters", "more 'pro' letters than 'con' letters"),
        ("`` He said ' no ' '' , she said .", "\"He said 'no,'\" she said."),
        ("the bill ( and its costs ) ; ; nobody's", "the bill (and its costs); nobody's"),
        ("the Legislators' votes : 10 % of $ 5", "the Legislators' votes: 10% of $5"),
    ],
)
def test_tokens_become_ordinary_prose(tokens, prose):
    assert texts.detokenised(tokens.split()) == prose


@given(st.lists(st.sampled_from(["word", "it's", "``", "''", "'", ",", ".", "?", ";", "(", ")", "$", "5", "--"])))
def test_detokenised_prose_keeps_every_word_and_has_no_space_before_punctuation(tokens):
    prose = texts.detokenised(tokens)
    assert not any(f" {mark}" in prose for mark in ",.?;)")
    assert "``" not in prose and "  " not in prose
    assert prose.count("word") == tokens.count("word") and prose.count("5") == tokens.count("5")


def test_cleaned_text_has_plain_line_ends_and_no_control_characters():
    assert texts.cleaned("\ufeffa\r\nb\rc\x00\x1b\td\u00a0e\u200b") == "a\nb\nc    d e"


@given(st.text(alphabet="aA.?!\"') ", max_size=80).map(lambda text: " ".join(text.split())))
def test_sentences_joined_are_the_paragraph(paragraph):
    assert " ".join(texts.sentences_of(paragraph)) == paragraph


@given(st.lists(st.integers(1, 40), max_size=30))
def test_passages_end_at_borders_and_keep_the_order(lengths):
    paragraphs = [f"Paragraph {index} begins. " + "It goes on. " * length for index, length in enumerate(lengths)]
    paragraphs = [paragraph.strip() for paragraph in paragraphs]
    passages = texts.passages_of(paragraphs)
    assert all(texts.SHORTEST <= len(passage) <= texts.LONGEST for passage in passages)
    found = list(itertools.chain.from_iterable(passage.split("\n\n") for passage in passages))
    assert found == [paragraph for paragraph in paragraphs if paragraph in found]
    lost = sum(len(paragraph) for paragraph in paragraphs) - sum(len(paragraph) for paragraph in found)
    assert lost < texts.SHORTEST  # only what is left at the end of a document


def test_a_long_paragraph_is_cut_between_sentences_and_long_code_is_dropped():
    passages = texts.passages_of([(SENTENCE * 60).strip()])
    assert len(passages) > 2
    assert all(passage.startswith("The keeper") and passage.endswith("town.") for passage in passages)
    assert texts.passages_of(["def f():\n" + "    x = 1\n" * 400]) == []


def test_code_is_parted_before_definitions():
    code = "import os\n\n\n@cached\ndef f():\n    x = 1\n\n    return x\n\n\nclass C:\n    def g(self): ...\n"
    assert texts.definitions_of(code) == [
        "import os",
        "@cached\ndef f():\n    x = 1\n\n    return x",
        "class C:\n    def g(self): ...",
    ]


def test_prose_is_told_from_tables_and_other_languages():
    assert texts.is_prose(PROSE)
    assert not texts.is_prose("1950 12.5 13 | 1951 12.9 14 | 1952 13.0 the of and " * 12)
    assert not texts.is_prose("Der Hund und die Katze gingen am Morgen in den Garten und sahen einen Vogel. " * 6)


def test_pages_give_their_sentences_without_navigation_tables_and_listings():
    page = f"""<html><head><title>T</title></head><body><nav><p>{PROSE}</p></nav><h1>A heading</h1>
    <p>{SENTENCE}<b>So it was,</b> and so it stayed.</p><pre>{PROSE}</pre><table><tr><td>{PROSE}</td></tr></table>"""
    assert texts.page_paragraphs(page.encode()) == [f"{SENTENCE}So it was, and so it stayed."]


@given(st.sets(st.text(min_size=1, max_size=8), min_size=20, max_size=60), st.randoms())
def test_whole_works_are_dealt_in_shares_whatever_their_order(works, random):
    splits = texts.split_works("source", works)
    shuffled = list(works)
    random.shuffle(shuffled)
    assert texts.split_works("source", shuffled * 2) == splits
    counts = [list(splits.values()).count(split) for split in texts.SPLITS]
    assert sum(counts) == len(works)
    assert counts[1] == round(len(works) * texts.VALIDATION_SHARE)
    assert counts[2] == round(len(works) * texts.HELD_OUT_SHARE)


def test_listed_works_go_where_the_list_says():
    works = ["persuasion", "northanger abbey", "emma"]
    dealt = texts.split_works("r-cran-janeaustenr", works)
    assert dealt == {"persuasion": "held_out", "northanger abbey": "validation", "emma": "train"}


def test_passages_of_a_document_share_its_split():
    documents = [texts.Document(f"work {index}", "essays", [PROSE] * 9) for index in range(20)]
    source = texts.Source("source", "npm", "1", "MIT", lambda files: iter(documents))
    splits = {}
    for split, record in texts.passages(source, documents):
        splits.setdefault(record["id"].rsplit("/", 1)[0], set()).add(split)
        assert record["domain"] == "essays" and record["source"] == "source"
    assert len(splits) == 20 and all(len(found) == 1 for found in splits.values())
    assert set.union(*splits.values()) == set(texts.SPLITS)


def test_near_duplicates_are_found():
    seen = texts.Seen()
    words = [f"word{index}" for index in range(200)]
    assert seen.add(" ".join(words))
    assert not seen.add(" ".join(["Another", "start", *words[5:]]).upper())
    assert seen.add(" ".join(reversed(words)))


def test_training_text_that_repeats_held_out_text_is_dropped(tmp_path):
    def record(name, text):
        return {"id": name, "domain": "news", "source": "s", "text": text}

    pools = {
        ("train", "news"): [record("a", PROSE), record("b", "Quite another story " * 30)],
        ("held_out", "news"): [record("c", PROSE)],
    }
    written = texts.write_splits(pools, tmp_path)
    assert [(split, found["id"]) for split, found in written] == [("held_out", "c"), ("train", "b")]
    assert (tmp_path / "train/news.jsonl").read_text().count("\n") == 1
    assert "= news                             1       0        1" in texts.table(written)


def test_caps_hold_for_sources_and_domains():
    records = [{"id": f"{source}/{index}", "source": source} for source in "abc" for index in range(450)]
    kept = texts.chosen(records, "held_out")
    assert len(kept) == texts.MOST_PASSAGES["held_out"]
    assert kept == sorted(kept, key=records.index)
    assert len(texts.chosen(records[:450], "validation")) == texts.MOST_OF_A_SOURCE["validation"]


def xdr(strings):
    """R's serialisation of a character vector, as far as the reader looks at it."""
    items = b"".join(b"\x00\x04\x00\x09" + len(text.encode()).to_bytes(4, "big") + text.encode() for text in strings)
    return b"X\n\x00\x00\x00\x03" + b"\x00\x00\x00\x10" + len(strings).to_bytes(4, "big") + items


def test_strings_of_an_r_database_are_read():
    novels = [["EMMA", "", "Emma Woodhouse, handsome", "and rich"], ["PERSUASION", "", "Sir Walter"]]
    chunks = [zlib.compress(data) for data in (*map(xdr, novels), b"X\n an environment")]
    database = b"".join(len(chunk).to_bytes(4, "big") + chunk for chunk in chunks)
    assert list(texts.lazy_strings(database)) == novels
    documents = list(texts.read_austen({"./usr/lib/R/site-library/janeaustenr/data/Rdata.rdb": database}))
    assert [document.work for document in documents] == ["emma", "persuasion"]
    assert documents[0].paragraphs == ["EMMA", "Emma Woodhouse, handsome and rich"]


def test_brown_files_lose_tags_and_headings():
    heading = b"Rain/nn-hl today/nr-hl"
    first = b"It/pps rained/vbd ,/, he/pps said/vbd ./.\nAll/abn day/nn ./."
    tagged = b"\n\n\t" + b"\n\n\n\t".join([heading, first, b"Yes/rb !/. !/."]) + b"\n"
    (document,) = texts.read_brown({"package/ca01": tagged, "package/cats.txt": b"ca01 news"})
    assert (document.work, document.domain) == ("ca01", "news")
    assert document.paragraphs == ["It rained, he said. All day.", "Yes!"]


def test_archives_are_read_in_memory():
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        member = tarfile.TarInfo("package/a.txt")
        member.size = 2
        archive.addfile(member, io.BytesIO(b"hi"))
        archive.addfile(tarfile.TarInfo("package/empty"), None)
    assert texts.tar_files(stream.getvalue())["package/a.txt"] == b"hi"


def test_every_source_names_its_licence_and_is_pinned_where_it_can_be():
    names = [source.name for source in texts.SOURCES]
    assert len(set(names)) == len(names)
    for source in texts.SOURCES:
        assert source.licence
        assert bool(source.version) == (source.client != "apt")


def test_a_missing_program_is_named_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match=r"^texts.py needs pip, npm, apt-get, dpkg-deb on PATH$"):
        texts.main(tmp_path / "out")


def test_texts_that_exist_are_not_written_over(tmp_path, monkeypatch):
    monkeypatch.setattr(texts.shutil, "which", lambda program: program)
    (tmp_path / "train").mkdir()
    with pytest.raises(SystemExit, match="train exists already"):
        texts.main(tmp_path)


def test_a_client_that_fails_gives_its_error_line(tmp_path):
    command = [sys.executable, "-c", "import sys; sys.exit('warning: old\\nERROR: no such version\\nsee the log')"]
    with pytest.raises(SystemExit, match=r"failed: ERROR: no such version$"):
        texts.run(command, tmp_path)


def test_the_carried_passages_keep_the_splits_that_the_carried_pair_was_trained_with(monkeypatch):
    monkeypatch.setattr(texts, "documentation_texts", lambda: [])
    monkeypatch.setattr(texts, "DOCUMENTED", ())
    found = [(split, record["id"]) for split, record in texts.own_records()]
    assert [sum(split == name for split, _ in found) for name in texts.SPLITS] == [879, 87, 114]
    assert {"a225", "b114", "c203", "d200"} <= {name for split, name in found if split == "held_out"}


def test_held_out_documentation_is_of_other_packages_and_repeats_nothing_installed(monkeypatch):
    installed = [f"{PROSE} {index}." for index in range(400)]
    docstring = " ".join(f"word{index}" for index in range(100))
    documented = texts.Source(
        "other", "pip", "1", "MIT", lambda files: (texts.Document(str(i), "documentation", [t]) for i, t in files)
    )
    monkeypatch.setattr(texts, "documentation_texts", lambda: installed)
    monkeypatch.setattr(texts, "DOCUMENTED", (documented,))
    monkeypatch.setattr(texts, "fetched", lambda source: enumerate([installed[0], docstring]))
    documentation = [found for found in texts.own_records() if found[1]["domain"] == "documentation"]
    assert [record["id"] for split, record in documentation if split == "held_out"] == ["other/1"]
    dealt = [split for split, record in documentation if record["source"] == "installed"]
    assert 0.8 < dealt.count("train") / len(dealt) < 0.97 and 0.03 < dealt.count("validation") / len(installed) < 0.14


def test_docstrings_of_a_package_are_documents():
    function = f'def f():\n    """{PROSE}"""\n'
    documents = list(texts.docstrings({"pack/a.py": function.encode(), "pack/b.txt": b"no", "pack/c.py": b"x = 1"}))
    assert [(document.domain, document.paragraphs) for document in documents] == [("documentation", [PROSE.strip()])]
