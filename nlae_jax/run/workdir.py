"""A workdir's lock, the record of how it was made, and the checks that a config fits it and that no file is missing."""

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


def _fields_that_name(kind: str) -> tuple[str, ...]:
    """Returns the config fields whose value names a "model", a "file" or a "dataset"."""
    return tuple(leaf.name for leaf in leaves() if leaf.option.names == kind)


# A model's name may change as long as its weights do not: activations/subject.json identifies the weights.
_MODELS = _fields_that_name("model")
# These may also name a file that the package carries.
_FILES = _fields_that_name("file")
_DATASETS = _fields_that_name("dataset")

ANY_CHECKPOINT = "checkpoints/*/*/manifest.json"

# A record of how files were made -> those files. They are not used without the record.
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
    """Returns the config with absolute paths, because the next command may run in another directory."""
    values = flatten(dataclasses.asdict(config))
    paths = {name: values[name] for name in _MODELS if not values[name].startswith(("random:", "pypi:"))}
    paths = {name: text for name, text in paths.items() if text and local_path(text, f"config.{name}").exists()}
    names = [name for name in (*_FILES, *_DATASETS) if values[name] and "://" not in values[name]]
    paths |= {name: values[name] for name in names if values[name] != WARMSTART or os.path.exists(WARMSTART)}
    return resolve(values | {name: os.path.abspath(local_path(text, f"config.{name}")) for name, text in paths.items()})


def take(workdir: AnyPath, config: Config, record: dict[str, Any]) -> None:
    """Locks a workdir for a config, and stores the config if it differs from the workdir's in fields that may change.

    A missing config.json or protocol.json is written again from `record`, see `recorded`. Raises UserError where
    another process holds the workdir, or a file in it was made with a config that computes something else.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    _lock(workdir)
    remove_abandoned(workdir, "*", "checkpoints/*/*")
    _restore(workdir / "config.json", record, "config", write_json)
    _restore(workdir / "protocol.json", record, "protocol", write_json)
    require(workdir, "config.json")
    if (workdir / "config.json").exists():
        is_other = differs(workdir, config)
        check_trained_with(workdir, config)
        if is_other:
            claim(workdir, config)


def claim(workdir: AnyPath, config: Config) -> None:
    """Writes config.json. From then on the workdir belongs to this config."""
    write_json(workdir / "config.json", dataclasses.asdict(config))


def check_record(record: dict[str, Any], name: str, current: Any, where: str, workdir: AnyPath) -> None:
    """Raises UserError where the checkpoints' `record` has another value of `name` than `current`.

    `record` comes from `recorded`. `where` is the file or field that `current` was read from.
    """
    if name in record and record[name] != current:
        raise UserError(
            f"{where}: other {name} than {workdir / 'checkpoints'} was trained with; restore the former ones, or "
            "delete the checkpoints to train again"
        )


def _restore(path: AnyPath, record: dict[str, Any], name: str, write: Callable[[AnyPath, Any], None]) -> None:
    """Writes a missing file again, if the newest checkpoint's record has its content."""
    if not path.exists() and name in record:
        say(f"{path} is missing: made again, as the newest checkpoint has it")
        write(path, record[name])


def _lock(workdir: AnyPath) -> None:
    """Locks a local workdir, because two runs in one workdir would overwrite each other.

    A bucket is not locked: it has no lock that ends with the process that holds it.
    """
    if not is_remote(workdir):
        name = f"--workdir {workdir}"
        hold(
            pathlib.Path(workdir) / ".lock", name, "another nlae process is running there", "start no second run there"
        )


def recorded(workdir: AnyPath) -> dict[str, Any]:
    """Returns the record `made_with` of the newest readable checkpoint, or {} where none has one."""
    return _newest_record(workdir)[1]


def _newest_record(workdir: AnyPath) -> tuple[AnyPath, dict[str, Any]]:
    """Returns the newest checkpoint that has a record, and the record; (workdir, {}) where none has one."""
    for stage in reversed(ORDER):
        for path in sealed(workdir / "checkpoints" / stage):
            with contextlib.suppress(UserError, OSError):
                if isinstance(record := read_data(path).get("made_with"), dict):
                    return path, record
    return workdir, {}


def check_trained_with(workdir: AnyPath, config: Config) -> None:
    """Raises UserError where the newest checkpoint was trained with other values of fields that bind it.

    Such fields differ where someone has edited config.json. Names of models and files may differ: the record identifies
    their content by itself. A record with fields that this version does not know is not compared.
    """
    path, record = _newest_record(workdir)
    try:
        trained_with = located(resolve(flatten(record["config"])))
    except (UserError, LookupError, AttributeError, TypeError, OSError):  # from another version, machine or user
        return
    new, old = _values(config), _values(trained_with)
    free_fields, order = (*_MODELS, *_FILES, *_DATASETS, "rl.num_steps"), list(Binds)
    bound_by_stage = order[: order.index(Binds[path.parent.name.upper()]) + 1]
    _refuse(
        workdir,
        [
            _change(leaf, old, new, path.relative_to(workdir))
            for leaf in leaves()
            if old[leaf.name] != new[leaf.name] and leaf.binds in bound_by_stage and leaf.name not in free_fields
        ],
    )


def require(workdir: AnyPath, name: str, others: Sequence[str] = ()) -> None:
    """Raises UserError where the file `name` is missing although files exist that were made with it.

    `others` are glob patterns of these files; by default they are those in `_RECORDS`.
    """
    if (workdir / name).exists():
        return
    for pattern in others or _RECORDS[name]:
        if (path := min(workdir.glob(pattern), default=None)) is not None:
            raise UserError(f"{workdir / name}: missing, but {path.relative_to(workdir)} was made with it; restore it")


def differs(workdir: AnyPath, config: Config) -> bool:
    """Returns whether the workdir's config differs from `config`.

    Raises UserError where an existing file was made with another value of a field that decides its content.
    """
    new, old = _values(config), _values(located(load_config(workdir / "config.json")))
    changed = [leaf for leaf in leaves() if old[leaf.name] != new[leaf.name]]
    free_fields = _same_content(workdir, config)
    bound = [
        _change(leaf, old, new, path.relative_to(workdir))
        for leaf in changed
        if leaf.name not in free_fields and (path := _made_with(workdir, leaf, config)) is not None
    ]
    _refuse(workdir, bound)
    return bool(changed)


def _values(config: Config) -> dict[str, Any]:
    """Returns the config's fields by name."""
    return flatten(dataclasses.asdict(config))


def _change(leaf: Leaf, old: dict[str, Any], new: dict[str, Any], made: object) -> str:
    """Says which field has changed, and which file was made with its old value."""
    return f"{leaf.name} {old[leaf.name]!r} -> {new[leaf.name]!r} ({made} was made with it)"


def _refuse(workdir: AnyPath, changes: Sequence[str]) -> None:
    """Raises UserError that lists the changes, if there are any."""
    if changes:
        raise UserError(f"--workdir {workdir}: made with another config: {', '.join(changes)}")


def _same_content(workdir: AnyPath, config: Config) -> tuple[str, ...]:
    """Returns the fields whose value may change, because the new place is known to hold the same content."""
    fields: tuple[str, ...] = ()
    if (workdir / "activations/subject.json").exists():  # `open_run` has compared the weights
        fields += _MODELS
    path = workdir / "activations/dataset.json"
    if path.exists() and read_json(path) == identities(dataset_files(config.dataset)):
        fields += _DATASETS
    return fields


def _made_with(workdir: AnyPath, leaf: Leaf, config: Config) -> AnyPath | None:
    """Returns the first file already made with the old value of a field, or None if the field may still change."""
    if leaf.name == "rl.num_steps":  # no step reads it: RL may go on for longer, or end now
        path = newest_sealed(workdir / "checkpoints/rl")
        return path if path is not None and int(path.name) > config.rl.num_steps else None
    order = list(Binds)
    for artefacts in order[order.index(leaf.binds) : order.index(Binds.NEVER)]:
        if (path := min(workdir.glob(artefacts.value), default=None)) is not None:
            return path
    return None
