"""Parquet files in the reference's schema: written as it reads them, read as it writes them."""

import dataclasses
import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from nlae_jax.cli import main
from nlae_jax.config import DatasetConfig
from nlae_jax.explore.sources import open_trained
from nlae_jax.interop import datasets
from nlae_jax.interop.datasets import dataset_files, dataset_sidecar, import_index, import_texts, import_vectors
from nlae_jax.run.export import export_datasets
from nlae_jax.run.resources import descriptions_of
from nlae_jax.runtime.errors import UserError
from tests.conftest import tiny_config

pytest_plugins = ["tests.tiny_run"]

NAMES = ("av_sft", "ar_sft", "rl", "held_out")
D = 64


@pytest.fixture(scope="module")
def run(tiny_run):
    return open_trained(tiny_run.workdir)


@pytest.fixture(scope="module")
def written(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("datasets")
    export_datasets(run, out)
    return out


@pytest.fixture
def files(written, tmp_path):
    """Copies that a test may damage: name -> path."""
    out = shutil.copytree(written, tmp_path / "datasets")
    return {name: out / f"{name}.parquet" for name in NAMES}


def rewrite(path, **columns):
    """The file with other columns; None drops one."""
    table = pq.read_table(path)
    for name, values in columns.items():
        index = table.schema.get_field_index(name)
        table = table.remove_column(index)
        if values is not None:
            table = table.add_column(index, name, values)
    pq.write_table(table, path)


def read(files, layer=1, **config):
    """What an import of the files would hold: index, descriptions, contexts."""
    sidecar = dataset_sidecar(files, D, layer)
    index = import_index(files, tiny_config(subject__layer=layer, **config))
    return index, *import_texts(files, index, sidecar)


def given(files):
    return {f"dataset__{name}": path for name, path in files.items()} | {"corpus__path": ""}


def test_the_schema_is_the_references(written, run):
    vector = pa.list_(pa.float32(), D)
    messages = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    tail = [
        ("activation_vector", vector),
        ("n_raw_tokens", pa.int64()),
        ("activation_layer", pa.int64()),
        ("doc_id", pa.string()),
        ("detokenized_text_truncated", pa.string()),
    ]
    head = {
        "av_sft": [("prompt", messages), ("response", pa.string())],
        "ar_sft": [("prompt", pa.string())],
        "rl": [("prompt", messages)],
        "held_out": [("prompt", messages)],
    }
    for name in NAMES:
        schema = pq.read_schema(written / f"{name}.parquet")
        assert schema.equals(pa.schema(head[name] + tail)), name
    row = pq.read_table(written / "av_sft.parquet").slice(0, 1).to_pylist()[0]
    assert row["prompt"] == [
        {"role": "user", "content": run.protocol.encoder_template.replace("{injection_char}", "<INJECT>")}
    ]
    assert row["response"].startswith("<explanation>\n")
    assert row["response"].endswith("\n</explanation>")
    meta = yaml.safe_load((written / "rl.parquet.nla_meta.yaml").read_text())
    assert set(meta["extraction"]) == {
        *("base_model", "d_model", "layer_index", "norm", "corpus", "corpus_slice", "positions_per_doc")
    }


def test_what_is_written_is_read_back(written, run):
    files = {name: written / f"{name}.parquet" for name in NAMES}
    index, descriptions, contexts, dropped = read(files)
    assert dropped == 0
    store = run.store
    described = dict(zip(*(descriptions[name].to_pylist() for name in ("row", "description")), strict=True))
    texts = dict(zip(contexts["row"].to_pylist(), contexts["text"].to_pylist(), strict=True))

    def of(index, split):
        """Rows in one order: the files are shuffled."""
        rows = index.rows_of(split).tolist()
        return sorted(rows, key=lambda row: (index.doc_ids[index.document[row]], index.position[row]))

    for split in ("encoder_sft", "rl", "held_out"):
        mine, theirs = of(index, split), of(store.index, split)
        assert [index.doc_ids[index.document[r]] for r in mine] == [
            store.index.doc_ids[store.index.document[r]] for r in theirs
        ]
        np.testing.assert_array_equal(index.position[mine], store.index.position[theirs])
        if split == "encoder_sft":
            assert [described[r] for r in mine] == [descriptions_of(run)[r] for r in theirs]
        if split == "held_out":
            assert [texts[r] for r in mine] == [run.tokenizer.decode(store.context_ids(r)) for r in theirs]
    gold = descriptions_of(run)[of(store.index, "decoder_sft")[0]]
    assert described[of(index, "decoder_sft")[0]] == run.protocol.decoder_template.replace("{explanation}", gold)


def test_a_run_on_datasets(tiny_run, run, files, tmp_path):
    """Every stage, from files alone; the activations are the other run's, and the held-out numbers make sense."""
    workdir = tmp_path / "W"
    assert main(tiny_run.arguments(workdir, **given(files))) == 0
    imported = open_trained(workdir)
    for split in ("encoder_sft", "decoder_sft", "rl", "held_out"):
        both = [np.sort(one.store.vectors(one.store.index.rows_of(split)), axis=0) for one in (imported, run)]
        np.testing.assert_array_equal(*both)
    assert imported.protocol.encoder_prefix == run.protocol.encoder_prefix
    assert imported.protocol.injection_scale == pytest.approx(run.protocol.injection_scale, rel=1e-6)
    result = json.loads((workdir / "eval.json").read_text())
    assert result["fve_gold"] is None
    assert result["num_documents"] == json.loads((tiny_run.workdir / "eval.json").read_text())["num_documents"]
    sample = json.loads((workdir / "samples/held_out.jsonl").read_text().splitlines()[0])
    assert sample["context"].endswith(sample["token"])
    assert (workdir / "report.html").exists()


def test_stored_prompts_reach_the_decoder_as_they_are(tiny_run, run, files, tmp_path):
    """To the last space; the loss of the first step says which was read."""
    losses = []
    before, _, after = run.protocol.decoder_template.partition("{explanation}")
    assert not after
    for number, changed in enumerate((False, True)):
        if changed:
            prompts = pq.read_table(files["ar_sft"])["prompt"].to_pylist()
            rewrite(
                files["ar_sft"], prompt=pa.array([before + p.removeprefix(before).replace(" ", "  ") for p in prompts])
            )
        workdir = tmp_path / f"W{number}"
        steps = {"sft__encoder_steps": 0, "sft__decoder_steps": 2}
        assert main(tiny_run.arguments(workdir, "sft", **given(files), **steps)) == 0
        losses.append(tiny_run.metrics(workdir)[0]["loss"])
    assert abs(losses[0] - losses[1]) > 1e-4


def test_without_a_held_out_file_documents_of_rl_alone_are_held_out(files):
    del files["held_out"]
    shared = pq.read_table(files["av_sft"])["doc_id"][0].as_py()
    docs = pq.read_table(files["rl"])["doc_id"].to_pylist()
    rewrite(files["rl"], doc_id=pa.array([shared if doc == docs[0] else doc for doc in docs]))
    for seed in range(5):
        index, *_ = read(files, seed=seed, split__held_out=0.2, split__rl=0.32)
        held_out = {index.doc_ids[index.document[row]] for row in index.rows_of("held_out")}
        trained = {index.doc_ids[index.document[row]] for row in index.rows_of("rl")}
        assert held_out
        assert not held_out & trained
        assert shared not in held_out


def test_lists_of_any_length_will_do_if_they_are_of_one_length(files, tmp_path):
    values = pq.read_table(files["rl"])["activation_vector"].to_pylist()
    rewrite(files["rl"], activation_vector=pa.array(values, pa.list_(pa.float64())))
    import_vectors(tmp_path / "A", {"rl": files["rl"]}, len(values), D, lambda rows: None)
    from nlae_jax.data.activations import open_vectors

    stored = open_vectors(tmp_path / "A", len(values), D).read().result()
    np.testing.assert_allclose(stored, np.array(values), rtol=1e-6)


def test_an_import_that_was_stopped_goes_on(files, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "_ROWS", 3)
    rows = sum(pq.read_metadata(path).num_rows for path in files.values())

    class Stopped(Exception):
        pass

    passed = []

    def stop(count):
        passed.append(count)
        if sum(passed) > rows // 2:
            raise Stopped

    with pytest.raises(Stopped):
        import_vectors(tmp_path / "A", files, rows, D, stop)
    read_again = []
    original = datasets.read_vectors
    monkeypatch.setattr(datasets, "read_vectors", lambda *a: read_again.append(1) or original(*a))
    import_vectors(tmp_path / "A", files, rows, D, lambda count: None)
    assert 0 < len(read_again) < -(-rows // 3) + 4 - len(passed) + 1
    from nlae_jax.data.activations import open_vectors

    expected = np.concatenate(
        [np.stack(pq.read_table(path)["activation_vector"].to_numpy()) for path in files.values()]
    )
    np.testing.assert_array_equal(open_vectors(tmp_path / "A", rows, D).read().result(), expected)


def test_files_that_were_replaced_meanwhile_are_refused(tiny_run, files, tmp_path, capsys):
    vectors_with(files["rl"], 7, np.nan)
    assert main(tiny_run.arguments(tmp_path / "W", "extract", **given(files))) == 2
    vectors_with(files["rl"], 7, 0.0)
    assert main(tiny_run.arguments(tmp_path / "W", "extract", **given(files))) == 2
    assert "the files are not those" in capsys.readouterr().err


def test_a_finished_import_needs_its_files_no_more(tiny_run, files, tmp_path):
    steps = {"sft__encoder_steps": 0, "sft__decoder_steps": 0, "rl__num_steps": 0}
    assert main(tiny_run.arguments(tmp_path / "W", "rl", **given(files), **steps)) == 0
    for path in files.values():
        path.unlink()
    assert open_trained(tmp_path / "W").protocol.marker
    assert len(open_trained(tmp_path / "W").store.contexts)


def test_only_documents_must_be_named(files):
    rewrite(files["rl"], n_raw_tokens=None)
    rewrite(files["rl"], activation_layer=None)
    index, *_ = read(files)
    assert not index.position[index.rows_of("rl")].any()


def vectors_with(path, row, value):
    values = np.stack(pq.read_table(path)["activation_vector"].to_numpy())
    values[row, 5] = value
    rewrite(path, activation_vector=pa.array(list(values), pa.list_(pa.float32(), D)))


def sidecar_with(path, **fields):
    path = path.with_name(f"{path.name}.nla_meta.yaml")
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | fields))


def other_prompt(path, row):
    prompts = pq.read_table(path)["prompt"].to_pylist()
    prompts[row] = [{"role": "user", "content": "Another one: <INJECT>"}]
    rewrite(path, prompt=pa.array(prompts))


def count_of(files):
    return pq.read_metadata(files["rl"]).num_rows


def rl_with(name, make):
    """A damage: the column of rl.parquet with `make(number of rows)` in it."""
    return lambda files: rewrite(files["rl"], **{name: make(count_of(files))})


def not_utf8(count):
    stored = pa.array([b"doc"] * 4 + [b"caf\xe9"] + [b"doc"] * (count - 5))
    return pa.Array.from_buffers(pa.string(), count, stored.buffers())


def one_of(good, bad, kind=None):
    """A column of `good` with `bad` in row 3."""
    return lambda count: pa.array([good] * 3 + [bad] + [good] * (count - 4), kind)


VECTOR_DAMAGES = {
    "one number each": lambda count: pa.array([[[0.5]] * D] * count),
    "strings": lambda count: pa.array([["0.5"] * D] * count),
    "a string": lambda count: pa.array(["[0.5, 0.5]"] * count),
    "bytes": lambda count: pa.array([b"0" * 4 * D] * count),
    "numbers": lambda count: pa.array([0.5] * count),
    "booleans": lambda count: pa.array([[True] * D] * count),
    "structs": lambda count: pa.array([[{"x": 0.5}] * D] * count),
    "decimals": lambda count: pa.array([[None] * D] * count, pa.list_(pa.decimal128(5, 2))),
    "nothing": lambda count: pa.nulls(count),
}
ROW_DAMAGES = {
    "null in a vector": (
        "activation_vector",
        one_of([0.5] * D, [0.5] * (D - 1) + [None]),
        "row 3: activation_vector has NaN",
    ),
    "too large for float32": (
        "activation_vector",
        one_of([0.5] * D, [1e300] + [0.5] * (D - 1)),
        "row 3: activation_vector has NaN",
    ),
    "a vector that is null": ("activation_vector", one_of([0.5] * D, None), "row 3: activation_vector is null"),
    "an empty vector": ("activation_vector", one_of([0.5] * D, []), "row 3: activation_vector has 0 numbers"),
    "tokens nan": (
        "n_raw_tokens",
        one_of(5.0, float("nan")),
        "row 3: n_raw_tokens is nan; it should be a whole number",
    ),
    "tokens infinite": ("n_raw_tokens", one_of(5.0, float("inf")), "row 3: n_raw_tokens is inf"),
    "tokens 1.5": ("n_raw_tokens", one_of(5.0, 1.5), "row 3: n_raw_tokens is 1.5"),
    "tokens as text": (
        "n_raw_tokens",
        one_of("5", "3"),
        "the column n_raw_tokens should hold whole numbers; it is string",
    ),
    "tokens as lists": (
        "n_raw_tokens",
        one_of([5], [3]),
        "the column n_raw_tokens should hold whole numbers; it is list",
    ),
    "tokens as booleans": ("n_raw_tokens", one_of(True, False), "the column n_raw_tokens should hold whole numbers"),
    "tokens 2^40": ("n_raw_tokens", one_of(5, 2**40), "row 3: n_raw_tokens is 1099511627776"),
    "tokens 2^63": ("n_raw_tokens", one_of(5, 2**63, pa.uint64()), "row 3: n_raw_tokens is 9223372036854775808"),
    "tokens -2^63": ("n_raw_tokens", one_of(5, -(2**63)), "row 3: n_raw_tokens is -9223372036854775808"),
    "tokens negative": ("n_raw_tokens", one_of(5, -1), "row 3: n_raw_tokens is -1; it counts a text's tokens from 1"),
    "layer as text": (
        "activation_layer",
        one_of("1", "1"),
        "the column activation_layer should hold whole numbers; it is string",
    ),
    "layer nan": (
        "activation_layer",
        one_of(1.0, float("nan")),
        "row 3: activation_layer is nan; it should be a whole number",
    ),
    "another layer in a row": ("activation_layer", one_of(1, 2), "row 3: activation_layer is 2; subject.layer is 1"),
    "a document that is null": ("doc_id", one_of("a", None), "row 3: doc_id is null"),
    "documents as lists": ("doc_id", one_of(["a"], ["b"]), "the column doc_id should hold strings; it is list"),
    "documents as numbers with a part": (
        "doc_id",
        one_of(1.0, 1.5),
        "the column doc_id should hold strings; it is double",
    ),
    "documents not utf-8": ("doc_id", not_utf8, "row 4: doc_id: cannot be read"),
    "context not utf-8": ("detokenized_text_truncated", not_utf8, "row 4: detokenized_text_truncated: cannot be read"),
    "prompt as text": ("prompt", one_of("<INJECT>", "<INJECT>"), "row 0: prompt should be one user message"),
    "prompt as numbers": ("prompt", one_of(1, 2), "row 0: prompt should be one user message"),
    "prompt not utf-8": ("prompt", not_utf8, "row 4: prompt: cannot be read"),
}


@pytest.mark.parametrize("damage", VECTOR_DAMAGES)
def test_vectors_that_are_none(tiny_run, files, tmp_path, capsys, damage):
    rl_with("activation_vector", VECTOR_DAMAGES[damage])(files)
    assert main(tiny_run.arguments(tmp_path / "W", "extract", **given(files))) == 2
    complaint = capsys.readouterr().err.splitlines()[-1]
    assert "rl.parquet: " in complaint and "activation_vector" in complaint


@pytest.mark.parametrize("damage", ROW_DAMAGES)
def test_values_that_cannot_be(tiny_run, files, tmp_path, capsys, damage):
    column, make, named = ROW_DAMAGES[damage]
    rl_with(column, make)(files)
    assert main(tiny_run.arguments(tmp_path / "W", "extract", **given(files))) == 2
    assert f"rl.parquet: {named}" in capsys.readouterr().err.splitlines()[-1]


def test_a_flipped_bit_of_an_exported_file_is_seen(tiny_run, files, tmp_path, capsys):
    """As in a workdir: every page has its checksum."""
    data = bytearray(files["rl"].read_bytes())
    data[len(data) // 2] ^= 1
    files["rl"].write_bytes(data)
    assert main(tiny_run.arguments(tmp_path / "W", "extract", **given(files))) == 2
    assert "rl.parquet: cannot be read" in capsys.readouterr().err.splitlines()[-1]


def test_the_answer_of_a_response_and_not_its_draft(files):
    """In whatever way the model that wrote the responses was made to think."""
    count = pq.read_metadata(files["av_sft"]).num_rows
    response = "<think><explanation>a draft</explanation></think><explanation>\nthe answer\n</explanation>"
    rewrite(files["av_sft"], response=pa.array([response] * count))
    _, described, _, dropped = read(files)
    assert dropped == 0 and described["description"].to_pylist()[:count] == ["the answer"] * count


@pytest.mark.parametrize(("column", "value"), [("response", 3), ("response", ["a"])])
def test_responses_that_are_no_text(tiny_run, files, tmp_path, capsys, column, value):
    rewrite(files["av_sft"], **{column: pa.array([value] * pq.read_metadata(files["av_sft"]).num_rows)})
    assert main(tiny_run.arguments(tmp_path / "W", "extract", **given(files))) == 2
    assert "av_sft.parquet: row 0: response should be a string" in capsys.readouterr().err


def test_whole_numbers_may_be_written_as_floats_and_be_missing(files):
    """As pandas writes them where one is missing."""
    count = count_of(files)
    rewrite(
        files["rl"],
        n_raw_tokens=pa.array([7.0, None] + [5.0] * (count - 2)),
        activation_layer=pa.array([1.0, None] + [1.0] * (count - 2)),
        doc_id=pa.array(range(count), pa.int32()),
    )
    index, *_ = read(files)
    start = sum(pq.read_metadata(files[name]).num_rows for name in ("av_sft", "ar_sft"))
    assert index.position[start : start + 3].tolist() == [6, 0, 4]
    assert index.doc_ids[index.document[start + 2]] == "2"


@pytest.mark.parametrize("kind", [pa.float16(), pa.float32(), pa.float64(), pa.int8()])
@pytest.mark.parametrize("make_list", [pa.list_, pa.large_list, lambda kind: pa.list_(kind, D)])
def test_vectors_of_any_numbers(files, tmp_path, kind, make_list):
    column = pa.array([[1] * D] * count_of(files)).cast(make_list(kind))
    values = datasets.read_vectors(files["rl"], 0, column, D)
    assert values.dtype == np.float32 and values.shape == (len(column), D) and (values == 1).all()


DAMAGES = {
    "nan": (lambda f: vectors_with(f["rl"], 7, np.nan), "rl.parquet: row 7: activation_vector has NaN"),
    "infinity": (lambda f: vectors_with(f["av_sft"], 2, np.inf), "av_sft.parquet: row 2: activation_vector has NaN"),
    "width": (
        lambda f: rewrite(f["rl"], activation_vector=pa.array([[0.5] * 8] * pq.read_metadata(f["rl"]).num_rows)),
        "has 8 numbers; the subject's width is 64",
    ),
    "no vectors": (lambda f: rewrite(f["rl"], activation_vector=None), "no column 'activation_vector'"),
    "no documents": (lambda f: rewrite(f["av_sft"], doc_id=None), "av_sft.parquet: no column 'doc_id'"),
    "no responses": (lambda f: rewrite(f["av_sft"], response=None), "no column 'response'"),
    "no prompts": (lambda f: rewrite(f["rl"], prompt=None), "no column 'prompt'"),
    "other layer": (
        lambda f: rewrite(f["rl"], activation_layer=pa.array([5] * pq.read_metadata(f["rl"]).num_rows)),
        "row 0: activation_layer is 5; subject.layer is 1",
    ),
    "other prompt": (lambda f: other_prompt(f["rl"], 3), "rl.parquet: row 3: another prompt"),
    "other decoder's prompt": (
        lambda f: rewrite(f["ar_sft"], prompt=pa.array(["Else."] * pq.read_metadata(f["ar_sft"]).num_rows)),
        "ar_sft.parquet: row 0: prompt should be the text of prompt_templates.ar",
    ),
    "not a parquet": (lambda f: f["rl"].write_bytes(b"PAR1 no"), "rl.parquet: cannot be read"),
    "empty": (
        lambda f: pq.write_table(pq.read_table(f["rl"]).slice(0, 0), f["rl"]),
        "rl.parquet: the file has no rows",
    ),
    "missing": (lambda f: f["ar_sft"].unlink(), "config.dataset.ar_sft"),
    "no sidecar": (
        lambda f: f["rl"].with_name("rl.parquet.nla_meta.yaml").unlink(),
        "rl.parquet.nla_meta.yaml: no such file",
    ),
    "other marker": (
        lambda f: sidecar_with(f["av_sft"], prompt_templates={"actor": "Else: {injection_char}"}),
        "another prompt or injection token",
    ),
    "sidecar of another width": (lambda f: sidecar_with(f["rl"], extraction={"d_model": 32}), "extraction.d_model 32"),
    "trained on what is evaluated": (
        lambda f: shutil.copy(f["rl"], f["held_out"]),
        "of its documents are also trained on",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_wrong_is_named_by_file_and_row(tiny_run, files, tmp_path, capsys, damage):
    spoil, named = DAMAGES[damage]
    spoil(files)
    assert main(tiny_run.arguments(tmp_path / "W", "extract", **given(files))) == 2
    assert named in " ".join(capsys.readouterr().err.splitlines()[-1:])


@pytest.mark.parametrize("missing", ["rl", "av_sft", "ar_sft"])
def test_a_file_that_a_stage_needs(tiny_run, files, tmp_path, capsys, missing):
    del files[missing]
    assert main(tiny_run.arguments(tmp_path / "W", "extract", **given(files))) == 2
    assert f"config.dataset.{missing}: no file is named" in capsys.readouterr().err


def test_no_datasets():
    assert dataset_files(DatasetConfig()) == {}
    with pytest.raises(UserError, match=r"config\.dataset\.rl"):
        dataset_files(DatasetConfig(rl="/nowhere.parquet"))


@pytest.mark.parametrize("scale", [50.0, 0.0])
def test_a_dataset_says_the_scale_of_the_run(run, tmp_path, scale):
    """Else a run on it would take that of the norms. It stands where the reference passes over it."""
    protocol = dataclasses.replace(run.protocol, injection_scale=scale)
    export_datasets(dataclasses.replace(run, protocol=protocol), tmp_path)
    files = {name: tmp_path / f"{name}.parquet" for name in NAMES}
    assert dataset_sidecar(files, D, run.config.subject.layer).injection_scale == scale
