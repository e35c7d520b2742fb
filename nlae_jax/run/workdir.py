"""What a workdir says of how it was made, which config fits it, what must not be missing from it; and its lock."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from nlae_jax.assets import WARMSTART
from nlae_jax.config import Binds, Config, Leaf, flatten, leaves, load_config, resolve
from nlae_jax.interop.datasets import dataset_files, identities
from nlae_jax.runtime.errors import UserError
from nlae_jax.runtime.files import AnyPath, is_remote, local_path, read_json, remove_abandoned, write_json
from nlae_jax.runtime.locks import hold
from nlae_jax.runtime.progress import say
from nlae_jax.train.checkpoint import newest_sealed, read_data, sealed
from nlae_jax.train.metrics import ORDER


def _fields_that_name(what: str) -> tuple[str, ...]:
    return tuple(leaf.name for leaf in leaves() if leaf.option.names == what)


# What matters of a model is its weights, which activations/subject.json tells from others.
_MODELS = _fields_that_name("model")
# These may name what the package carries instead.
_FILES = _fields_that_name("file")
_DATASETS = _fields_that_name("dataset")

ANY_CHECKPOINT = "checkpoints/*/*/manifest.json"

# What says how other files were made -> those files: they are not used without it.
_RECORDS = {
    "config.json": (
        "activations/subject.json",
        "activations/rows.parquet",
        "activations/meta.json",
        "protocol.json",
        ANY_CHECKPOINT,
        "eval.json",
    ),
    "activations/subject.json": ("activations/rows.parquet", "activations/meta.json"),
}


def located(config: Config) -> Config:
    """The config with every path in full: what it is used from may be another directory the next time."""
    flat = flatten(dataclasses.asdict(config))
    paths = {name: flat[name] for name in _MODELS if not flat[name].startswith(("random:", "pypi:"))}
    paths = {name: text for name, text in paths.items() if text and local_path(text, f"config.{name}").exists()}
    names = [name for name in (*_FILES, *_DATASETS) if flat[name] and "://" not in flat[name]]
    paths |= {name: flat[name] for name in names if flat[name] != WARMSTART or os.path.exists(WARMSTART)}
    return resolve(flat | {name: os.path.abspath(local_path(text, f"config.{name}")) for name, text in paths.items()})


def take(workdir: AnyPath, config: Config, record: dict[str, Any]) -> None:
    """Locks a workdir, and gives it a config that is the same as its own or that it may be changed to.

    What is missing of config.json and protocol.json is made again from `record`, see `recorded`. Raises UserError where
    another process has the workdir, or something in it was made with a config that computes something else.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    _lock(workdir)
    remove_abandoned(workdir, "*", "checkpoints/*/*")
    _restore(workdir / "config.json", record, "config", write_json)
    _restore(workdir / "protocol.json", record, "protocol", write_json)
    require(workdir, "config.json")
    if (workdir / "config.json").exists() and differs(workdir, config):
        claim(workdir, config)


def claim(workdir: AnyPath, config: Config) -> None:
    """Writes config.json: from here on the workdir belongs to this config."""
    write_json(workdir / "config.json", dataclasses.asdict(config))


def check_record(record: dict[str, Any], name: str, found: Any, where: str, workdir: AnyPath) -> None:
    """Raises UserError where checkpoints were made with other `name` than are `found`; `record` as of `recorded`."""
    if name in record and record[name] != found:
        raise UserError(
            f"{where}: other {name} than {workdir / 'checkpoints'} was trained with; bring those back, or "
            "delete it to train anew"
        )


def _restore(path: AnyPath, record: dict[str, Any], name: str, write: Callable[[AnyPath, Any], None]) -> None:
    """Makes a file that is missing again, if the newest checkpoint says what was in it."""
    if not path.exists() and name in record:
        say(f"{path} is missing: made again, as the newest checkpoint has it")
        write(path, record[name])


def _lock(workdir: AnyPath) -> None:
    """Two runs in one workdir would overwrite each other. A bucket has no lock that ends with its process: no lock."""
    if not is_remote(workdir):
        name = f"--workdir {workdir}"
        hold(
            pathlib.Path(workdir) / ".lock", name, "another nlae process is running there", "start no second run there"
        )


def recorded(workdir: AnyPath) -> dict[str, Any]:
    """What the newest readable checkpoint says that it was made with; {} where none says."""
    for stage in reversed(ORDER):
        for path in sealed(workdir / "checkpoints" / stage):
            with contextlib.suppress(UserError, OSError):
                if isinstance(record := read_data(path).get("made_with"), dict):
                    return record
    return {}


def require(workdir: AnyPath, name: str, others: Sequence[str] = ()) -> None:
    """Raises UserError where the file is missing and there is something that was made with it."""
    if (workdir / name).exists():
        return
    for pattern in others or _RECORDS[name]:
        if (path := min(workdir.glob(pattern), default=None)) is not None:
            raise UserError(f"{workdir / name}: missing, but {path.relative_to(workdir)} was made with it; restore it")


def differs(workdir: AnyPath, config: Config) -> bool:
    """Whether the workdir's config is another. Raises UserError where that would compute something else."""
    now = flatten(dataclasses.asdict(config))
    before = flatten(dataclasses.asdict(located(load_config(workdir / "config.json"))))
    changed = [leaf for leaf in leaves() if before[leaf.name] != now[leaf.name]]
    same = _same_content(workdir, config)
    kept = [
        f"{leaf.name} {before[leaf.name]!r} -> {now[leaf.name]!r} ({path.relative_to(workdir)} was made with it)"
        for leaf in changed
        if leaf.name not in same and (path := _made_with(workdir, leaf, config)) is not None
    ]
    if kept:
        raise UserError(f"--workdir {workdir}: made with another config: {', '.join(kept)}")
    return bool(changed)


def _same_content(workdir: AnyPath, config: Config) -> tuple[str, ...]:
    """Fields that may name another place, because what lies there is known to be what was read."""
    same: tuple[str, ...] = ()
    if (workdir / "activations/subject.json").exists():  # compared before
        same += _MODELS
    path = workdir / "activations/dataset.json"
    if path.exists() and read_json(path) == identities(dataset_files(config.dataset)):
        same += _DATASETS
    return same


def _made_with(workdir: AnyPath, leaf: Leaf, config: Config) -> AnyPath | None:
    """The first file already made with the old value of a field; None if the field may still change."""
    if leaf.name == "rl.num_steps":  # no step reads it: RL may go on for longer, or end where it is
        path = newest_sealed(workdir / "checkpoints/rl")
        return path if path is not None and int(path.name) > config.rl.num_steps else None
    order = list(Binds)
    for made in order[order.index(leaf.binds) : order.index(Binds.NEVER)]:
        if (path := min(workdir.glob(made.value), default=None)) is not None:
            return path
    return None
