"""Directions and neurons: a planted one is heard, one that says nothing is not told from its controls."""

import copy
import dataclasses
import io
import json
import os
import zipfile

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

import nlae_jax
from nlae_jax.cli import main
from nlae_jax.explore.corpus import read_corpus
from nlae_jax.explore.directions import (
    DirectionSettings,
    change,
    control_directions,
    cosine,
    explain_direction,
    token_effects,
)
from nlae_jax.explore.neurons import check_layer, neuron_directions, parse_neuron
from nlae_jax.explore.surprisal import auc, mean_nll
from nlae_jax.explore.vector_files import read_direction, read_vectors
from nlae_jax.report.direction_page import direction_page, direction_tables
from nlae_jax.roles.language_model import LanguageModel
from nlae_jax.runtime.errors import UserError

pytest_plugins = ["tests.tiny_run", "tests.planted"]


@pytest.fixture(scope="module")
def corpus(planted, planted_texts):
    return read_corpus(planted, planted_texts, texts=48, tokens=32)


@pytest.fixture(scope="module")
def report(planted, corpus):
    return explain_direction(planted, "planted", 3 * planted.direction("list"), corpus)


def test_a_planted_direction_is_heard(report):
    assert report.explained and report.beats == {"heard": True, "agreement": True, "auc": True}
    assert "list" in report.explanation.split()
    assert report.sweep.best.heard > 0.9 and report.sweep.agreement > 0.9 and report.sweep.auc > 0.7
    assert report.heard_at
    assert {context.token.strip() for context in report.contexts} == {"list"}
    assert all("list" in context.explanation for context in report.contexts)
    assert len(report.controls) == 6 and not any(control.best.heard > 0.5 for control in report.controls)


def test_directions_that_say_nothing_do_not_look_explained(planted, corpus):
    rng = np.random.default_rng(5)
    fakes = [rng.standard_normal(planted.d_model) for _ in range(12)]
    fakes += [rng.permutation(planted.direction("list")) for _ in range(4)]
    reports = [
        explain_direction(planted, "fake", fake, corpus, DirectionSettings(contexts=4, seed=7)) for fake in fakes
    ]
    assert not any(report.explained for report in reports)


def test_a_neuron_that_writes_something_else_than_it_answers_to_does_not_look_explained(planted, corpus):
    """Its direction is heard, its activations belong to another word: what it says is not where it is active."""
    other = (corpus.h_NxD - planted.statistics.mean) @ planted.direction("string")
    report = explain_direction(planted, "mixed", planted.direction("list"), corpus, values_N=other)
    assert report.beats["heard"] and not report.beats["agreement"] and not report.explained


def test_equal_directions_have_not_changed_and_others_across():
    rng = np.random.default_rng(0)
    origin = rng.standard_normal(32).astype(np.float32)
    others = np.stack([origin, 3 * origin, origin + rng.standard_normal(32).astype(np.float32)])
    found = change(others, origin)
    assert not found[:2].any() and found[2].any()
    np.testing.assert_allclose(found @ origin, 0, atol=1e-5)
    assert cosine(found[0], found[2]) == 0


def test_a_page_and_tables_of_a_hostile_report(report):
    hostile = "</style><script>alert(1)</script>\x1b[2J"
    row = dataclasses.replace(report, name=hostile, explanation=hostile, mean_explanation="").row()
    row["contexts"][0]["before"] = hostile
    page = direction_page([row, report.row()], hostile)
    assert "<script" not in page and "\x1b" not in page
    assert "2 of 2 beat their controls" in page
    assert "<script" not in report._repr_html_() and "<article" in report._repr_html_()
    assert direction_tables(row)


def test_a_frame_of_all_points(report):
    frame = pytest.importorskip("pandas") and report.to_frame()
    assert len(frame) == 7 * 4 and set(frame["kind"]) == {"direction", "random", "shuffled"}


def test_controls_are_as_long_as_the_direction(planted):
    u = planted.direction("list")
    controls = control_directions(u, 2, seed=0)
    assert [kind for kind, _ in controls] == ["random", "random", "shuffled", "shuffled"]
    np.testing.assert_allclose([np.linalg.norm(v) for _, v in controls], 1.0)
    np.testing.assert_allclose(np.sort(controls[-1][1]), np.sort(u))


def test_promoted_tokens_are_those_of_the_unembedding(planted):
    subject = planted.subject
    embed, norm = np.asarray(subject.params["embed"]), np.asarray(subject.params["final_norm"])
    token = subject.tokenizer.encode("list", add_special_tokens=False)[0]
    promoted, suppressed = token_effects(planted, embed[token] / norm)
    assert promoted[0][0] == subject.tokenizer.decode([token])
    assert promoted[0][1] > 0 > suppressed[0][1]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=6), st.lists(st.integers(0, 3), min_size=1, max_size=6))
def test_auc_is_the_share_of_ordered_pairs(positive, negative):
    expected = np.mean([(p > n) + 0.5 * (p == n) for p in positive for n in negative])
    assert auc(np.array(positive), np.array(negative)) == pytest.approx(expected)


def test_nll_is_of_the_text_alone(tiny_lm):
    ids = tiny_lm.tokenizer.encode("the list of", add_special_tokens=False)
    (found,) = mean_nll(tiny_lm, [("a number", ids)])
    preface = tiny_lm.tokenizer.encode("a number\n\n", add_special_tokens=False)
    log_probs = np.asarray(tiny_lm.log_probs(np.array([[*preface, *ids]])))[0]
    assert found == pytest.approx(-log_probs[len(preface) - 1 :].mean(), abs=1e-5)


def test_a_preface_that_spells_a_token_without_an_embedding_is_read_without_it(tiny_lm):
    tokenizer = copy.deepcopy(tiny_lm.tokenizer)
    tokenizer.add_tokens([f"<extra{number}>" for number in range(tiny_lm.arch.vocab_size - len(tokenizer) + 1)])
    last = tokenizer.convert_ids_to_tokens(tiny_lm.arch.vocab_size)
    other = LanguageModel(tiny_lm.arch, tiny_lm.params, tokenizer)
    assert mean_nll(other, [(f"of{last} the", [3, 4])]) == pytest.approx(mean_nll(tiny_lm, [("of the", [3, 4])]))


# --- files


@pytest.fixture
def dictionary(tmp_path):
    rows = np.arange(3 * 8, dtype=np.float32).reshape(3, 8) + 1
    save_file({"W_dec": rows, "W_enc": np.ascontiguousarray(rows.T), "b_dec": rows[0]}, tmp_path / "sae.safetensors")
    np.savez(tmp_path / "params.npz", W_dec=rows, W_enc=rows.T, threshold=np.ones(3, np.float32))
    np.save(tmp_path / "columns.npy", rows.T)
    np.save(tmp_path / "one.npy", rows[1])
    return tmp_path, rows


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("sae.safetensors:W_dec[1]", 1),
        ("sae.safetensors[-1]", 2),
        ("sae.safetensors:b_dec", 0),
        ("params.npz[2]", 2),
        ("params.npz:W_dec[0]", 0),
        ("columns.npy[1]", 1),
        ("one.npy", 1),
    ],
)
def test_directions_of_files(dictionary, name, row):
    directory, rows = dictionary
    np.testing.assert_array_equal(read_direction(f"{directory}/{name}", 8).vector, rows[row])


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("none.npy", "no such file"),
        ("sae.safetensors:W_dec", "3 rows; say which one"),
        ("sae.safetensors:W_dec[3]", "row 3 out of range"),
        ("sae.safetensors:other[0]", "no key 'other'; it has W_dec, W_enc, b_dec"),
        ("one.npy[0]", "there is no row 0"),
        ("one.npy:W_dec", "no key"),
        ("broken.npy", "should be an array that numpy saved"),
        ("text.txt", "should be a .npy, .npz or .safetensors file"),
        ("zero.npy", "zero in every component"),
        ("nan.npy", "NaN or infinity"),
        ("words.npy", "should hold numbers"),
        ("wide.npy", r"shape \(1, 9\) should be \[number, 8\]"),
        ("broken.safetensors:a[0]", "cannot be read"),
    ],
)
def test_files_that_hold_no_direction(dictionary, name, named):
    directory, _ = dictionary
    (directory / "broken.npy").write_bytes(b"not an array")
    (directory / "broken.safetensors").write_bytes(b"not tensors")
    (directory / "text.txt").write_text("1 2 3")
    np.save(directory / "zero.npy", np.zeros(8))
    np.save(directory / "nan.npy", np.full(8, np.nan))
    np.save(directory / "wide.npy", np.ones(9))
    np.save(directory / "words.npy", np.array(["a"] * 8))
    with pytest.raises(UserError, match=named):
        read_direction(f"{directory}/{name}", 8)


def test_vectors_of_files(dictionary):
    directory, rows = dictionary
    np.save(directory / "rows.npy", rows)
    np.testing.assert_array_equal(read_vectors(directory / "rows.npy", 8), rows)
    assert read_vectors(directory / "one.npy", 8).shape == (1, 8)


def test_vectors_of_parquet_files(tmp_path):
    """Lists of any other length are refused, also where their numbers add up to whole vectors."""
    path, rows = tmp_path / "rows.parquet", np.arange(16, dtype=np.float32).reshape(2, 8)
    pq.write_table(pa.table({"activation_vector": rows.tolist()}), path)
    np.testing.assert_array_equal(read_vectors(path, 8), rows)
    for lists, named in (
        ([[1.0] * 6, [1.0] * 10], "row 0: activation_vector has 6 numbers"),
        ([[1.0] * 8, None], "row 1: activation_vector is null"),
        ([[1.0] * 8, [float("nan")] * 8], "row 1: activation_vector has NaN"),
        (["a", "b"], "should hold lists of float32"),
    ):
        pq.write_table(pa.table({"activation_vector": lists}), path)
        with pytest.raises(UserError, match=named):
            read_vectors(path, 8)
    pq.write_table(pa.table({"other": [1]}), path)
    with pytest.raises(UserError, match="should be a parquet file with a column activation_vector"):
        read_vectors(path, 8)


def test_vectors_of_another_block_are_named(tmp_path):
    path, rows = tmp_path / "rows.parquet", np.arange(16, dtype=np.float32).reshape(2, 8)
    pq.write_table(pa.table({"activation_vector": rows.tolist(), "activation_layer": [3, 4]}), path)
    with pytest.raises(UserError, match="row 1: activation_layer is 4; the pair's block is 3"):
        read_vectors(path, 8, 3)
    np.testing.assert_array_equal(read_vectors(path, 8), rows)


@pytest.mark.parametrize("name", ["v.npy", "v.parquet"])
def test_vectors_do_not_come_through_pipes(tmp_path, name):
    """Nor from a directory."""
    os.mkfifo(tmp_path / name)
    (tmp_path / f"directory.{name}").mkdir()
    for path in (tmp_path / name, tmp_path / f"directory.{name}"):
        with pytest.raises(UserError, match=rf"{name}: (should be a regular file|.*[Ii]s a directory)"):
            read_vectors(path, 8)


def test_a_flipped_bit_in_a_page_is_seen(tmp_path):
    path = tmp_path / "rows.parquet"
    rows = np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)
    table = pa.table({"activation_vector": pa.array(rows.tolist(), pa.list_(pa.float32()))})
    pq.write_table(table, path, write_page_checksum=True, use_dictionary=False, compression="none")
    data = bytearray(path.read_bytes())
    data[data.index(rows[20].tobytes())] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"rows\.parquet: cannot be read"):
        read_vectors(path, 8)


def test_only_the_array_that_is_asked_for_is_unpacked(tmp_path):
    """Another one may be larger than the memory: its header says so, and nobody need read it."""
    np.savez_compressed(tmp_path / "a.npz", W_dec=np.ones((3, 8), np.float32))
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (1 << 40, 1 << 10)})
    with zipfile.ZipFile(tmp_path / "a.npz", "a") as archive:
        archive.writestr("huge.npy", header.getvalue())
    np.testing.assert_array_equal(read_direction(f"{tmp_path}/a.npz[1]", 8).vector, np.ones(8))
    with pytest.raises(UserError, match=r"a\.npz: 'huge' is larger than 8,589,934,592 bytes"):
        read_direction(f"{tmp_path}/a.npz:huge[0]", 1 << 10)


# --- neurons


def test_neurons_by_name(arch):
    assert parse_neuron("1:7", arch) == (1, 7)
    for spec, named in (("1", "BLOCK:NEURON"), ("2:0", "block 2"), ("0:128", "128 should be"), ("a:b", "BLOCK")):
        with pytest.raises(UserError, match=named):
            parse_neuron(spec, arch)


def test_blocks_without_a_gate_have_no_neurons_to_read(arch):
    ungated = dataclasses.replace(arch, gated=False)
    for look in (lambda: check_layer(ungated, 0), lambda: parse_neuron("0:0", ungated)):
        with pytest.raises(UserError, match=r"^neuron: those of .* cannot be read"):
            look()


def test_all_neurons_of_a_block_check_first(planted, tmp_path, monkeypatch, capsys):
    """Neither a block that cannot be read nor a map to another pair costs the reading of a corpus."""
    monkeypatch.setattr("nlae_jax.api.NLA.from_pretrained", lambda *_: planted)
    monkeypatch.setattr("nlae_jax.cli.directions._corpus", lambda *_: pytest.fail("the corpus was read"))
    command = ["neuron", "--model", "planted", "--all", "0", "--out", str(tmp_path / "n.jsonl")]
    with monkeypatch.context() as patched:
        patched.setattr(planted.subject, "arch", dataclasses.replace(planted.subject.arch, gated=False))
        assert main(command) == 2
        assert "cannot be read: its blocks have experts, or no gate" in capsys.readouterr().err
    with monkeypatch.context() as patched:
        patched.setattr(planted, "adapter", object())
        for shown in (command, ["neuron", "--model", "planted", "0:1"]):
            assert main(shown) == 2
            assert "a map to another model's pair" in capsys.readouterr().err


def test_what_a_neuron_writes_and_reads(planted):
    """Turning one neuron up by 1 adds its write direction to what the block gives."""
    vectors = neuron_directions(planted, 1, 5)
    blocks = planted.subject.params["blocks"]
    np.testing.assert_array_equal(vectors["write"], blocks["down"][1, 5])
    np.testing.assert_allclose(vectors["gate"], blocks["gate"][1, :, 5] * blocks["mlp_norm"][1], rtol=1e-6)


def test_the_commands(tiny_run, planted_texts, tmp_path, capsys):
    shared = ["--workdir", str(tiny_run.workdir), "--steps=0.5,2", "--controls=1", "--contexts=2", "--texts=8"]
    capsys.readouterr()
    assert main(["neuron", "0:3", *shared, "--json", "--html", str(tmp_path / "n.html")]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["name"] == "neuron 0:3" and report["explained"] in (True, False)
    assert len(report["controls"]) == 2 and len(report["contexts"]) == 2
    assert "the run's corpus" in report["corpus"] and (tmp_path / "n.html").exists()
    np.save(tmp_path / "u.npy", np.ones(64))
    assert main(["direction", str(tmp_path / "u.npy"), *shared, "--corpus", str(planted_texts)]) == 0
    assert "u.npy" in capsys.readouterr().out
    out = tmp_path / "all.jsonl"
    many = ["neuron", "--all", "0", "--top", "2", "--out", str(out), *shared]
    assert main(many) == 0
    assert "2 neurons, each" in capsys.readouterr().err
    first = out.read_bytes()
    assert len(first.splitlines()) == 2 and (tmp_path / "all.html").exists()
    out.write_bytes(first.splitlines(keepends=True)[0])  # as if it had been stopped: the rest is made again
    assert main([*many[:-1], "--texts=9"]) == 2
    assert "other options" in capsys.readouterr().err


def test_a_file_of_neurons_goes_on_with_the_same_texts_and_pair(tiny_run, planted_texts, tmp_path, capsys, monkeypatch):
    """It is what the texts and the parameters are that counts, not where they lie."""
    shared = ["--workdir", str(tiny_run.workdir), "--steps=1", "--controls=1", "--contexts=1", "--texts=4"]
    many = ["neuron", "--all", "0", "--top=1", "--choose=random", "--out", str(tmp_path / "n.jsonl"), *shared]
    texts, moved = tmp_path / "t.jsonl", tmp_path / "moved.jsonl"
    for path in (texts, moved):
        path.write_bytes(planted_texts.read_bytes())
    assert main([*many, "--corpus", str(texts)]) == 0
    whole = (tmp_path / "n.jsonl").read_bytes()
    assert main([*many, "--corpus", str(moved)]) == 0
    assert (tmp_path / "n.jsonl").read_bytes() == whole
    moved.write_text(moved.read_text().replace("list", "array"))
    capsys.readouterr()
    assert main([*many, "--corpus", str(moved)]) == 2
    assert "other options" in capsys.readouterr().err
    trained = nlae_jax.NLA.from_workdir(tiny_run.workdir)
    identity, longer = trained.identity, jax.tree.map(lambda leaf: 1.01 * leaf, trained.pair.decoder)
    trained._pair = trained.pair._replace(decoder=longer)
    del trained.identity
    assert trained.identity != identity
    monkeypatch.setattr("nlae_jax.api.NLA.from_workdir", lambda _: trained)
    assert main([*many, "--corpus", str(texts)]) == 2
    assert "other options" in capsys.readouterr().err


HEADERS = {
    "unclosed": "(" * 9000,
    "deep": "-" * 9000 + "1",
    "switch": "{'descr': '<f4', 'fortran_order': False, 'shape': (True, 8)}",
    "list as a key": "{'descr': '<f4', []: False, 'shape': (1, 8)}",
    "endless": "{'descr': '<f4', 'fortran_order': False, 'shape': (1" + "0" * 4000 + ", 8)}",
}


def npy(header):
    encoded = header.encode() + b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(encoded).to_bytes(2, "little") + encoded + b"\0" * 64


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_headers_that_make_no_sense_are_one_line(tmp_path, header):
    (tmp_path / "a.npy").write_bytes(npy(header))
    with pytest.raises(UserError, match=r"a\.npy: should be an array that numpy saved"):
        read_vectors(tmp_path / "a.npy", 8)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("a.npy", npy(header))
    with pytest.raises(UserError, match=r"a\.npz: (cannot be read|'a' is larger than)"):
        read_direction(f"{tmp_path}/a.npz:a", 8)


@pytest.mark.parametrize(("offset", "value"), [(8, 1), (10, 99)], ids=["encrypted", "packed in another way"])
def test_archives_that_cannot_be_unpacked_are_one_line(tmp_path, offset, value):
    np.savez(tmp_path / "a.npz", a=np.ones(8))
    data = bytearray((tmp_path / "a.npz").read_bytes())
    data[data.find(b"PK\x01\x02") + offset] = value
    (tmp_path / "a.npz").write_bytes(data)
    with pytest.raises(UserError, match=r"a\.npz: cannot be read"):
        read_direction(f"{tmp_path}/a.npz:a", 8)


@pytest.mark.parametrize("size", [1e25, 1e-20, 1e-40])
def test_vectors_whose_squares_leave_float32_are_refused(tmp_path, size):
    """They would be injected as zeros, and scored as orthogonal to everything."""
    np.save(tmp_path / "a.npy", np.stack([np.ones(8), np.full(8, size), np.zeros(8)]))
    with pytest.raises(UserError, match=r"a\.npy: row 1: NaN or infinity, or numbers whose squares"):
        read_vectors(tmp_path / "a.npy", 8)
    pq.write_table(pa.table({"activation_vector": [[1.0] * 8, [size] * 8]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet: row 1: activation_vector has NaN"):
        read_vectors(tmp_path / "a.parquet", 8)
