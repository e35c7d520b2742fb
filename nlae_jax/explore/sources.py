"""Opens the run of a workdir. Loads the subject of a pair, and the texts and statistics of the pair's activations."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from nlae_jax.config import MeshConfig, load_config
from nlae_jax.explore.explainer import Explainer
from nlae_jax.explore.statistics import FILE, Statistics, load_statistics, statistics_of
from nlae_jax.interop.adapt import Adapter
from nlae_jax.interop.released import pair_path
from nlae_jax.interop.sidecar import Sidecar
from nlae_jax.lm.pretrained import check_same_tokenizer
from nlae_jax.mesh import make_mesh
from nlae_jax.roles.language_model import LanguageModel
from nlae_jax.run import resources
from nlae_jax.run.resources import PreparedRun
from nlae_jax.runtime.errors import UserError
from nlae_jax.runtime.files import workdir_path

_STATISTICS_ROWS = 4096  # activations of a run that its statistics are computed from


def open_trained(workdir: str | Path) -> PreparedRun:
    """Opens a workdir's run read-only: on the run's mesh if this machine has the devices, else on one device."""
    workdir = workdir_path(workdir)
    if not (workdir / "config.json").exists():
        raise UserError(f"--workdir {workdir}: no config.json there; it should be the workdir of a run")
    config = load_config(workdir / "config.json")
    try:
        make_mesh(config.mesh)
    except UserError:
        config = dataclasses.replace(config, mesh=MeshConfig())
    return resources.prepare(resources.open_run(config, workdir, read_only=True))


def has_activations(run: PreparedRun) -> bool:
    """Returns whether the run's activations exist. A pair also works after they have been deleted."""
    return (run.workdir / "activations/meta.json").exists()


def run_texts(run: PreparedRun, count: int) -> list[list[int]]:
    """Returns the token ids of at most `count` texts of the run. A run on datasets has no texts."""
    return [ids.tolist() for ids in run.store.index.ids[:count] if len(ids)]


def run_statistics(run: PreparedRun) -> Statistics:
    """Computes the statistics of a run's activations; of many activations, from a sample spread over all of them."""
    count = len(run.store.index.position)
    rows = np.unique(np.linspace(0, count - 1, _STATISTICS_ROWS).astype(int))
    return statistics_of(run.store.vectors(rows), f"{len(rows):,} of the run's activations")


def known_statistics(name: str) -> Callable[[Explainer], Statistics] | None:
    """Returns a loader of the statistics file in a pair's directory, or None if the directory has no such file."""
    path = pair_path(name) / FILE
    return (lambda pair: load_statistics(path, pair.d_model)) if path.is_file() else None


def released_subject(
    name: str, sidecar: Sidecar, layer: int, tokenizer: Any, dtype: str, mesh: Mesh | None
) -> LanguageModel:
    """Loads the model whose activations a released pair explains. Raises UserError if the model does not fit."""
    if not (name := name or sidecar.base_model or ""):
        raise UserError(f"{sidecar.path}: names no base_model; name the model as --subject")
    model = LanguageModel.from_pretrained(name, dtype, mesh)
    if model.arch.d_model != sidecar.d_model or model.arch.num_layers <= layer:
        raise UserError(
            f"subject {name}: {model.arch.num_layers} blocks of width {model.arch.d_model}; the "
            f"pair reads block {layer} of width {sidecar.d_model}"
        )
    check_same_tokenizer(tokenizer, model.tokenizer, f"subject {name}")
    return model


def mapped_subject(directory: Path, adapter: Adapter, dtype: str, mesh: Mesh | None) -> LanguageModel:
    """Loads the model that a map was fitted on. Raises UserError if the model's shape no longer fits the map."""
    model = LanguageModel.from_pretrained(adapter.model, dtype, mesh)
    arch, width = model.arch, adapter.matrix.shape[0]
    if arch.d_model != width or arch.num_layers <= adapter.layer:
        raise UserError(
            f"{directory}: {adapter.model} has {arch.num_layers} blocks of width {arch.d_model}; the map reads block "
            f"{adapter.layer} of width {width}"
        )
    return model
