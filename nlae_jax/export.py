"""A trained pair, and the activations it learned from, in the reference's layout: `nlae export`."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from nlae_jax.data.datasets import SPLIT_OF, Exported, export_dataset
from nlae_jax.errors import UserError
from nlae_jax.evaluate.roundtrip import Pair
from nlae_jax.files import read_json, write_json
from nlae_jax.lm.families import hf_config, language_config, read_hf_config
from nlae_jax.lm.lora import merge
from nlae_jax.lm.pretrained import TOKENIZER_FILES, load_tokenizer
from nlae_jax.lm.tensors import TensorToWrite, write_safetensors
from nlae_jax.lm.weights import save_model
from nlae_jax.progress import progress
from nlae_jax.roles.adapters import write_adapters
from nlae_jax.roles.released import VALUE_HEAD
from nlae_jax.roles.sidecar import model_sidecar, write_sidecar
from nlae_jax.run import Run
from nlae_jax.train.state import Params


def export(
    run: Run, pair: Pair, out: Path, dtype: str = "bfloat16", datasets: bool = False, adapters: bool = False
) -> None:
    """Writes `out/av` and `out/ar`: model directories that transformers loads, adapters merged, with sidecars.

    With `adapters` the directories hold the adapters alone, as `roles.adapters` describes. With `datasets` also the
    run's activations, see `export_datasets`. All is made in a directory beside and moved into place at the end. Raises
    UserError where a part is there already.
    """
    if datasets and run.config.dataset.rl:
        raise UserError(f"--datasets: the activations of {run.workdir} come from such files: {run.config.dataset.rl}")
    if adapters and not run.config.lora.rank:
        raise UserError(f"--adapters: {run.workdir} has none; its lora.rank is 0")
    names = ["av", "ar"]
    for name in [*names, *(f"{name}.parquet" for name in SPLIT_OF if datasets)]:
        if (out / name).exists():
            raise UserError(f"--out {out}: {name} is there already; name a new directory")
    temporary = out / ".export.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        bases = {"av": pair.base, "ar": pair.base if pair.decoder_base is None else pair.decoder_base}
        with progress(2, "export", unit="model") as bar:
            for role, trained in (("av", pair.encoder), ("ar", pair.decoder)):
                if adapters:
                    _write_adapters(run, role, trained, temporary / role, dtype)
                else:
                    _write_model(run, role, bases[role], trained, temporary / role, dtype)
                _write_sidecar(run, role, temporary / role)
                bar.advance()
        if datasets:
            export_datasets(run, temporary)
        for path in sorted(temporary.iterdir()):
            path.rename(out / path.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_model(run: Run, role: str, base: Params, trained: Params, directory: Path, dtype: str) -> None:
    source, arch = _source(run, role), run.roles.encoder.arch
    if role == "ar":
        # A decoder has no head; tied, transformers finds nothing missing.
        arch = dataclasses.replace(run.roles.decoder.arch.truncated(run.config.subject.layer + 1), tied_head=True)
    directory.mkdir()
    special = _special_tokens(source, run.tokenizer)
    write_json(directory / "config.json", hf_config(arch) | special | {"torch_dtype": dtype})
    write_json(directory / "generation_config.json", {k: v for k, v in special.items() if k.endswith("token_id")})
    save_model(directory, arch, _merged(run, base, trained), dtype)
    _copy_tokenizer(source, directory, keep_bos=role == "av")
    if role == "ar":
        _write_head(directory, trained, dtype)


def _write_adapters(run: Run, role: str, trained: Params, directory: Path, dtype: str) -> None:
    """A role's adapters, beside the model that they sit on, and the decoder's head."""
    if (released := run.released.get(role)) is not None:
        base = released.adapters.base_model if released.adapters else run.config.init.names()[role]
    else:
        base = run.config.subject.model
    depth = run.arch.num_layers if role == "av" else run.config.subject.layer + 1
    directory.mkdir()
    write_adapters(directory, run.arch.truncated(depth), trained["adapters"], run.config.lora.alpha, base, dtype)
    if role == "ar":
        _write_head(directory, trained, dtype)


def _write_head(directory: Path, trained: Params, dtype: str) -> None:
    head = np.asarray(trained["value_head"]).T
    write_safetensors(directory / VALUE_HEAD, [TensorToWrite("weight", head.shape, lambda: head)], dtype)


def _write_sidecar(run: Run, role: str, directory: Path) -> None:
    corpus, model = run.store.meta["corpus"], run.config.subject.model
    content = model_sidecar(run.protocol, role, run.arch.d_model, run.config.subject.layer, model, corpus)
    write_sidecar(directory, content)


def _special_tokens(source: Path, tokenizer: Any) -> dict[str, Any]:
    """Fields of the source's config that are no maths. A generator should stop at whatever the source stops at."""
    config = read_hf_config(source)
    files = [config, language_config(config)]
    if (path := source / "generation_config.json").is_file():
        files.append(read_json(path))
    kept = {"max_position_embeddings", "bos_token_id", "pad_token_id"}
    fields = {key: value for file in files for key, value in file.items() if key in kept and value is not None}
    stops = {tokenizer.eos_token_id}
    for file in files:
        value = file.get("eos_token_id")
        stops |= set(value) if isinstance(value, list) else {value}
    stops = sorted(stops - {None})
    return fields | {"eos_token_id": stops[0] if len(stops) == 1 else stops}


def _source(run: Run, role: str) -> Path:
    """The model directory that the role started from."""
    return run.released[role].directory if role in run.released else run.directory


def _merged(run: Run, base: Params, trained: Params) -> Callable[[str, int | None], Any]:
    """(our name, layer) -> the trained parameter, its adapter added in."""
    if run.config.lora.rank == 0:
        lm, adapters = trained["lm"], {}
    else:
        lm, adapters = base, trained["adapters"]
    combine = jax.jit(merge, static_argnums=2)

    def values(name: str, layer: int | None) -> Any:
        if layer is None:
            return lm[name]
        adapter = jax.tree.map(lambda a: a[layer], adapters.get(name))
        return combine(lm["blocks"][name][layer], adapter, run.roles.encoder.lora_scale)

    return values


def _copy_tokenizer(source: Path, directory: Path, keep_bos: bool) -> None:
    """The tokenizer's files as they are.

    Without `keep_bos`, a tokenizer that names a token for the beginning of a text but does not add it names none in
    the copy: the reference's client takes a named one for one that is added.
    """
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, directory / name)
    tokenizer = load_tokenizer(directory)
    if keep_bos or tokenizer.bos_token_id is None or tokenizer.encode("x")[:1] == [tokenizer.bos_token_id]:
        return
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (path := directory / name).is_file():
            fields = json.loads(path.read_text(encoding="utf-8")) | {"bos_token": None}
            path.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if (left := load_tokenizer(directory).bos_token) is not None:
        raise RuntimeError(f"{directory}: the tokenizer still names {left!r} as the beginning of a text")


def export_datasets(run: Run, out: Path) -> None:
    """Writes `out/av_sft.parquet`, `ar_sft`, `rl` and `held_out` with their sidecars, rows in random order.

    A row of the warm start without a description is left out.
    """
    plan, described = run.store.plan, run.descriptions if run.warm_start else {}
    decode = partial(run.tokenizer.decode, skip_special_tokens=True)
    extraction = {
        "base_model": run.config.subject.model,
        "d_model": run.arch.d_model,
        "layer_index": run.config.subject.layer,
        "norm": "none",
        "corpus": run.store.meta["corpus"],
        "corpus_slice": {},
        "positions_per_doc": run.config.extract.positions_per_document,
    }
    with progress(len(SPLIT_OF), "export", unit="dataset") as bar:
        for name, split in SPLIT_OF.items():
            # The reference reads a file in order, and ours is ordered by the documents' lengths.
            rows = np.random.default_rng([run.config.seed, 2]).permutation(plan.rows_of(split))
            if name in ("av_sft", "ar_sft"):
                rows = np.array([row for row in rows.tolist() if row in described], np.int64)
            source = Exported(
                rows=rows,
                vectors=run.store.vectors,
                doc_id=lambda row: plan.doc_ids[plan.document[row]],
                position=lambda row: int(plan.position[row]),
                text=lambda row: decode(run.store.context_ids(row)),
                description=described.get,
            )
            export_dataset(out / f"{name}.parquet", name, source, run.protocol, extraction)
            bar.advance()
