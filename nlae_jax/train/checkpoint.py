"""Checkpoints: orbax saves state and data position together, asynchronously; damaged ones are passed over."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import logging
import os
import resource
import shutil
from typing import Any

import jax
import orbax.checkpoint as ocp

from nlae_jax.runtime import processes, supervision, world
from nlae_jax.runtime.errors import UserError
from nlae_jax.runtime.files import (
    AnyPath,
    absolute,
    children,
    is_remote,
    move,
    object_checksums,
    read_fields,
    read_json,
    remove,
    write_json,
)
from nlae_jax.runtime.progress import warn

_MANIFEST = "manifest.json"
_UNFINISHED = "its saving was not finished"
_ITEMS = ("state/", "data/")  # what a checkpoint consists of, beside orbax's own notes
_CHECKSUM, _SIZE = "crc32c:", "bytes:"
_HASHED_BYTES = 16 << 30  # of a whole checkpoint: what one process reads back in seconds, while all others wait
_MARGIN = 1 << 20  # bytes that a checkpoint takes beyond its arrays, amply


class Checkpoints:
    """The checkpoints of one stage, `directory/STEP/`.

    A checkpoint counts once its manifest of file hashes is written, after orbax has finished it. Restoring takes the
    newest whose files still match.
    """

    def __init__(self, directory: AnyPath, keep: int) -> None:
        # orbax logs, with a traceback, the errors that it raises as well.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        self._directory = absolute(directory)
        self._manager = ocp.CheckpointManager(
            self._directory,
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True),
            item_names=("state", "data"),
        )
        self._unsealed: int | None = None

    def save(self, step: int, state: Any, data: dict[str, Any]) -> None:
        """Starts saving; the previous save is finished and sealed first. Raises OSError where the disk is too full."""
        self._seal()
        _require_space(self._directory, state)
        self._manager.save(
            step, args=ocp.args.Composite(state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(data))
        )
        self._unsealed = step

    def poll(self) -> None:
        """Seals the save under way if it has finished; call it once a step, so that a kill loses no finished save.

        The first process does: of all of them it is the one that orbax finishes a save in.
        """
        if world.is_first() and self._unsealed is not None and not self._manager.is_saving_in_progress():
            self._seal()

    def finish(self) -> None:
        """Waits until the save under way is finished and sealed."""
        self._seal()

    def _seal(self) -> None:
        # Forgotten first: a save that fails is reported once, and must never be sealed by a later call.
        step, self._unsealed = self._unsealed, None
        self._manager.wait_until_finished()
        if step is not None and world.is_first():
            path = self._directory / str(step)
            write_json(path / _MANIFEST, _hashes(path))
            for remains in self._directory.glob(f"{step}.unfinished*"):
                remove(remains)

    def restore(self, abstract: Any, step: int | None = None) -> tuple[int, Any, dict[str, Any]] | None:
        """(step, state, data) of the newest sound checkpoint, or of `step`; None where there is none.

        `abstract` is a state of the right structure, whose shardings the restored arrays take.
        """
        if step is None and (step := self.newest()) is None:
            return None
        return step, *self.restore_step(abstract, step)

    def restore_step(self, abstract: Any, step: int) -> tuple[Any, dict[str, Any]]:
        """(state, data) of a sound checkpoint, as `restore`."""
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(abstract_of(abstract)),
                data=ocp.args.JsonRestore(),
            ),
        )
        return restored["state"], restored["data"]

    def newest(self) -> int | None:
        """The step of the newest sound checkpoint. Newer ones that are damaged are set aside, with a warning."""
        aside, newest = processes.by_first(self._set_aside)
        for step, problem, name in aside:
            warn(
                f"checkpoint {self._directory / str(step)} is damaged ({problem}): moved to {name} beside it; going "
                "back to the one before it"
            )
        if aside:
            self._manager.reload()
        return newest

    def _set_aside(self) -> tuple[list[tuple[int, str, str]], int | None]:
        """Renames the newest checkpoints as far as they are damaged: (step, what is wrong, its new name) of each.

        With them the step of the one after them. Nothing is deleted: a copy of a workdir may not be complete yet. What
        was never finished goes once its step is saved anew.
        """
        aside: list[tuple[int, str, str]] = []
        for step in sorted(self._manager.all_steps(), reverse=True):
            if (problem := _problem(self._directory / str(step))) is None:
                return aside, step
            kind = "unfinished" if problem == _UNFINISHED else "damaged"
            names = itertools.chain([f"{step}.{kind}"], (f"{step}.{kind}-{number}" for number in itertools.count(2)))
            name = next(name for name in names if not (self._directory / name).exists())
            move(self._directory / str(step), self._directory / name)
            aside.append((step, problem, name))
        return aside, None

    def close(self) -> None:
        self._seal()
        self._manager.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        """A save under way is finished also when the run ends in an error; that error is the one to report.

        Not where others take part: they go on, and whoever waited for them here would not be heard of.
        """
        if error is not None and world.count() > 1 and not isinstance(error, supervision.Preempted):
            return
        with contextlib.suppress(*([Exception] if error is not None else [])):
            self.close()


def abstract_of(state: Any) -> Any:
    """Shapes, dtypes and shardings of a state's arrays."""
    return jax.tree.map(ocp.utils.to_shape_dtype_struct, state)


def is_sealed(path: AnyPath) -> bool:
    """Whether the checkpoint directory was written to its end."""
    return bool((path / _MANIFEST).exists())


def is_whole(path: AnyPath) -> bool:
    """Whether the checkpoint directory was written to its end, and its files are as they were written.

    Several processes ask together: the first looks.
    """
    return processes.by_first(lambda: _problem(path)) is None


def newest_sealed(directory: AnyPath) -> AnyPath | None:
    """A stage's newest checkpoint that was written to its end; None where there is none."""
    return next(iter(sealed(directory)), None)


def sealed(directory: AnyPath) -> list[AnyPath]:
    """A stage's checkpoints that were written to their end, the newest first."""
    complete = [path for path in children(directory) if path.name.isdecimal() and is_sealed(path)]
    return sorted(complete, key=lambda path: -int(path.name))


def restore_part(path: AnyPath, abstract: Any) -> Any | None:
    """Those arrays of a checkpoint's state that `abstract` has, with its shardings; no memory is taken for others.

    None where the checkpoint is not there to its end, or its files are damaged. Writes nothing.
    """
    if not is_whole(path):
        return None
    arguments = ocp.args.PyTreeRestore(
        item=abstract,
        restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
        partial_restore=True,
    )
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler()).restore(absolute(path) / "state", args=arguments)


def _require_space(directory: AnyPath, state: Any) -> None:
    """Asked before: a save that fails in the middle does so in threads of orbax, which print their own tracebacks."""
    if is_remote(directory):
        return
    shards = [shard for leaf in jax.tree.leaves(state) for shard in leaf.addressable_shards if shard.replica_id == 0]
    needed = sum(shard.data.nbytes for shard in shards)
    largest = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if largest != resource.RLIM_INFINITY and largest < needed:  # most of it may come into one file
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), str(directory))
    if shutil.disk_usage(directory).free < needed + _MARGIN:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(directory))


def _hashes(path: AnyPath) -> dict[str, str]:
    """What tells the content of every file of a checkpoint but its manifest, by the file's name within it.

    On a bucket that is the checksum which the store keeps: nothing is read back. A copy of a checkpoint made there is
    not checked by content here, nor the other way round: `_CHECKSUM` marks what is none of ours. Of a checkpoint of
    more than `_HASHED_BYTES` only sizes are told, which is what a full disk or a killed process gets wrong.
    """
    if is_remote(path):
        found = {name: _CHECKSUM + checksum for name, checksum in object_checksums(path).items()}
        return {name: checksum for name, checksum in found.items() if name != _MANIFEST}
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.name != _MANIFEST)
    sizes = {file: file.stat().st_size for file in files}
    content = sum(sizes.values()) <= _HASHED_BYTES
    return {str(file.relative_to(path)): _hash(file) if content else f"{_SIZE}{sizes[file]}" for file in files}


def _hash(path: AnyPath) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_same(expected: str, found: str | None) -> bool:
    """Whether a file is what its manifest says; where one of the two is a bucket's checksum, whether it is there."""
    if found is None or expected.startswith(_CHECKSUM) == found.startswith(_CHECKSUM):
        return found == expected
    return True


def _problem(path: AnyPath) -> str | None:
    """What is wrong with a checkpoint's files; None if they are as they were written."""
    try:
        expected = read_json(path / _MANIFEST)
    except FileNotFoundError:
        return _UNFINISHED
    except UserError as error:
        return str(error).removeprefix(f"{path / _MANIFEST}: ")
    if not isinstance(expected, dict) or not expected or not all(isinstance(value, str) for value in expected.values()):
        return f"{_MANIFEST} names no files with their checksums"
    found = _hashes(path)
    if changed := sorted(name for name in expected if not _is_same(expected[name], found.get(name))):
        return f"changed or missing: {changed[0]}"
    unchecked = sorted(name for name in found.keys() - expected.keys() if name.startswith(_ITEMS))
    return f"not in {_MANIFEST}: {unchecked[0]}" if unchecked else None


def read_data(path: AnyPath) -> dict[str, Any]:
    """What `Checkpoints.save` was given as `data`. Raises UserError where it cannot be read."""
    return read_fields(path / "data" / "metadata", {})
