"""Writes a trained pair, and the activations it learned from, in the reference's layout: `nlae export`."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tokenizers import processors

from nlae_jax.interop.dataset_writer import Exported, export_dataset
from nlae_jax.interop.datasets import SPLIT_OF
from nlae_jax.interop.released import VALUE_HEAD
from nlae_jax.interop.sidecar import model_sidecar, write_sidecar
from nlae_jax.lm.adapters import write_adapters
from nlae_jax.lm.chat import chats_ids, plain_template, prompts_ids, with_its_date
from nlae_jax.lm.families import hf_config, language_config, read_hf_config
from nlae_jax.lm.lora import merge
from nlae_jax.lm.pretrained import TOKENIZER_FILES, load_tokenizer, stop_ids
from nlae_jax.lm.tensors import TensorToWrite, write_safetensors
from nlae_jax.lm.tokens import begin_ids, text_ids
from nlae_jax.lm.weights import save_model
from nlae_jax.roles.pair import Pair, Params
from nlae_jax.run.resources import PreparedRun, descriptions_of
from nlae_jax.runtime import outside
from nlae_jax.runtime.errors import UserError
from nlae_jax.runtime.files import write_json
from nlae_jax.runtime.locks import hold
from nlae_jax.runtime.progress import progress, warn


def export(
    run: PreparedRun, pair: Pair, out: Path, dtype: str = "bfloat16", datasets: bool = False, adapters: bool = False
) -> None:
    """Writes `out/av` and `out/ar`: model directories that transformers loads, with merged adapters and sidecars.

    With `adapters` the directories hold only the adapters, as `lm.adapters` describes. With `datasets` the run's
    activations are written too, see `export_datasets`. Everything is written into a temporary directory in `out` and
    moved into place at the end. Raises UserError where a part of the export exists already, where another process is
    exporting there, where `adapters` or `datasets` ask for something that the run does not have, and where transformers
    could not load the decoder.
    """
    if datasets and run.config.dataset.rl:
        raise UserError(f"--datasets: the activations of {run.workdir} come from such files: {run.config.dataset.rl}")
    if adapters and not run.config.lora.rank:
        raise UserError(f"--adapters: {run.workdir} has none; its lora.rank is 0")
    if not adapters:
        _check_last_block(run)
    out.mkdir(parents=True, exist_ok=True)
    temporary, lock = out / ".export.tmp", out / ".export.lock"
    hold(lock, f"--out {out}", "another nlae process is exporting there", "start no second export there")
    try:
        for name in ("av", "ar", *(f"{name}.parquet" for name in SPLIT_OF if datasets)):
            if (out / name).exists():
                raise UserError(f"--out {out}: {name} is there already; name a new directory")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
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
        lock.unlink(missing_ok=True)


def _write_model(run: PreparedRun, role: str, base: Params, trained: Params, directory: Path, dtype: str) -> None:
    """Writes a role's merged model: config, tokenizer, weights and the decoder's head."""
    source, arch = _source(run, role), run.roles.encoder.arch
    if role == "ar":
        # A decoder has no LM head. Declared as tied, transformers finds no weight missing.
        arch = dataclasses.replace(run.roles.decoder.arch.truncated(run.config.subject.layer + 1), tied_head=True)
    directory.mkdir()
    special = _special_tokens(source, run.tokenizer)
    write_json(directory / "config.json", hf_config(arch) | special | {"torch_dtype": dtype})
    write_json(directory / "generation_config.json", {k: v for k, v in special.items() if k.endswith("token_id")})
    _copy_tokenizer(source, directory, role)  # before the weights, which take long: it may raise
    save_model(directory, arch, _merged(run, base, trained), dtype)
    if role == "ar":
        _write_head(directory, trained, dtype)


def _check_last_block(run: PreparedRun) -> None:
    """Raises UserError where transformers would read the decoder's last block as a block of another kind."""
    arch, layer = run.roles.decoder.arch, run.config.subject.layer
    if arch.global_attention is not None and arch.mixers[layer] != "global":
        raise UserError(
            f"config.subject.layer: the decoder's last block, {layer}, has a window; transformers loads a "
            f"{arch.family} only if its last block has full attention; add --adapters to export the adapters alone"
        )


def _write_adapters(run: PreparedRun, role: str, trained: Params, directory: Path, dtype: str) -> None:
    """Writes a role's adapters with the name of the model that they sit on, and the decoder's head."""
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


def _write_sidecar(run: PreparedRun, role: str, directory: Path) -> None:
    config, corpus = run.config, run.store.meta["corpus"]
    content = model_sidecar(
        run.protocol,
        role,
        run.arch.d_model,
        config.subject.layer,
        config.subject.model,
        corpus,
        config.rl.max_new_tokens,
    )
    write_sidecar(directory, content)


def _special_tokens(source: Path, tokenizer: Any) -> dict[str, Any]:
    """Reads the fields of the source's config that do not describe the computation.

    `eos_token_id` holds all tokens that the source stops at, so that generation stops at the same ones.
    """
    config = read_hf_config(source)
    files = [config, language_config(config)]
    if (path := source / "generation_config.json").is_file():
        files.append(outside.read_json(path))
    names = {"max_position_embeddings", "bos_token_id", "pad_token_id"}
    fields = {key: value for file in files for key, value in file.items() if key in names and value is not None}
    stops = stop_ids(source, tokenizer)
    return fields | {"eos_token_id": stops[0] if len(stops) == 1 else list(stops)}


def _source(run: PreparedRun, role: str) -> Path:
    """Returns the model directory that the role started from."""
    return run.released[role].directory if role in run.released else run.directory


def _merged(run: PreparedRun, base: Params, trained: Params) -> Callable[[str, int | None], Any]:
    """Returns a function (parameter name, layer) -> the trained parameter with its adapter added."""
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


def _copy_tokenizer(source: Path, directory: Path, role: str) -> None:
    """Copies the tokenizer's files, and changes them only where other programs would read other prompts.

    Encoder: a chat template that prints the date gets the date of training, and a base model gets a chat template.
    Decoder: the tokenizer puts no token after a text. A tokenizer that names a beginning-of-sequence token but does not
    add it names none, because the reference's client assumes that a named one is added. Raises UserError where a file
    is a link to another directory.
    """
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(_file_inside(source, name), directory / name)
    tokenizer = load_tokenizer(directory)
    if role == "av":
        return _fix_date(directory, tokenizer)
    if text_ids(tokenizer, "x") != tokenizer.encode("x"):
        _remove_end_tokens(directory, tokenizer)
    if tokenizer.bos_token_id is None or tokenizer.encode("x")[:1] == [tokenizer.bos_token_id]:
        return
    _change_settings(directory, [_SETTINGS, _SPECIAL], bos_token=None)
    if (bos_token := load_tokenizer(directory).bos_token) is not None:
        raise RuntimeError(f"{directory}: the tokenizer still names {bos_token!r} as the beginning of a text")


def _file_inside(source: Path, name: str) -> Path:
    """Returns the real path of a model directory's file.

    Raises UserError where it is a link out of the directory: an export is given away, and must hold no other files.
    """
    root, path = source.resolve(), (source / name).resolve()
    roots = [root]
    if root.parent.name == "snapshots":  # in the hub's cache every file is a link to `blobs`
        roots.append(root.parent.parent / "blobs")
    if not any(path.is_relative_to(root) for root in roots):
        raise UserError(
            f"{source / name}: a link to {path}, outside of the model; copy it there if it is to be exported"
        )
    return path


_SETTINGS, _SPECIAL = "tokenizer_config.json", "special_tokens_map.json"


def _change_settings(directory: Path, names: Sequence[str], **fields: Any) -> None:
    """Sets `fields` in those of the tokenizer's settings files `names` that exist."""
    for name in names:
        if (path := directory / name).is_file():
            changed = outside.read_json(path) | fields
            path.write_text(json.dumps(changed, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _remove_end_tokens(directory: Path, tokenizer: Any) -> None:
    """Makes a tokenizer put no tokens after a text, because the decoder is read at its prompt's last token.

    Raises UserError where the tokenizer's files cannot express that.
    """
    ids, backend = begin_ids(tokenizer), tokenizer.backend_tokenizer
    begin = list(zip(tokenizer.convert_ids_to_tokens(ids), ids, strict=True))
    single = [*(token for token, _ in begin), "$A"]
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=begin)
    backend.save(str(directory / "tokenizer.json"))
    _change_settings(directory, [_SETTINGS], add_eos_token=False)
    changed = load_tokenizer(directory)
    if changed.encode("x") != text_ids(tokenizer, "x"):
        raise UserError(
            f"{directory}: the tokenizer puts tokens after every text, which cannot be taken out of its files"
        )


def _fix_date(directory: Path, tokenizer: Any) -> None:
    """Fixes the date that the chat template prints to that of training, in whichever file holds the template.

    A base model without a chat template gets one that writes plain prompts.
    """
    expected = prompts_ids(tokenizer, ["x"])
    if tokenizer.chat_template is None:
        (directory / "chat_template.jinja").write_text(plain_template(tokenizer), encoding="utf-8")
        if chats_ids(load_tokenizer(directory), ["x"]) != expected:
            warn(f"{directory}: no chat template writes this base model's prompts; other programs write other ones")
        return
    if (path := directory / "chat_template.jinja").is_file():
        template = path.read_text(encoding="utf-8")
        if (dated := with_its_date(template)) == template:
            return
        path.write_text(dated, encoding="utf-8")
    elif (path := directory / _SETTINGS).is_file():
        template = outside.read_json(path).get("chat_template")
        changed: Any = (
            template and with_its_date(template)
            if not isinstance(template, list)
            else [
                named | {"template": with_its_date(named["template"])}
                for named in template  # several templates, each with a name
            ]
        )
        if changed == template:
            return
        _change_settings(directory, [_SETTINGS], chat_template=changed)
    if chats_ids(load_tokenizer(directory), ["x"]) != expected:
        warn(
            f"{directory}: the chat template prints the current date; other programs give the encoder another date "
            "than that of training"
        )


def export_datasets(run: PreparedRun, out: Path) -> None:
    """Writes `out/av_sft.parquet`, `ar_sft`, `rl` and `held_out` with their sidecars. Rows are in random order.

    Rows of the warm start that have no description are left out.
    """
    index, described = run.store.index, descriptions_of(run) if run.config.sft.learns else {}
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
            # The reference reads a file in order, and our rows are ordered by their documents' lengths.
            rows = np.random.default_rng([run.config.seed, 2]).permutation(index.rows_of(split))
            if name in ("av_sft", "ar_sft"):
                rows = np.array([row for row in rows.tolist() if row in described], np.int64)
            source = Exported(
                rows=rows,
                vectors=run.store.vectors,
                doc_id=lambda row: index.doc_ids[index.document[row]],
                position=lambda row: int(index.position[row]),
                text=lambda row: decode(run.store.context_ids(row)),
                description=lambda row: described.get(row, ""),
            )
            export_dataset(out / f"{name}.parquet", name, source, run.protocol, extraction)
            bar.advance()
