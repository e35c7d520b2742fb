"""Checkpoints: orbax saves state and data position together, asynchronously. Damaged checkpoints are passed over."""

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
_ITEMS = ("state/", "data/")  # the files in these directories must be in the manifest; orbax's own notes need not
_CHECKSUM, _SIZE = "crc32c:", "bytes:"
_HASHED_BYTES = 16 << 30  # larger checkpoints are not hashed: one process would read for long while all others wait
_MARGIN = 1 << 20  # an ample bound of the bytes that a checkpoint takes beyond its arrays


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
        """Starts saving `state` and `data`. The previous save is finished and sealed first.

        Raises OSError where the disk is too full.
        """
        self._seal()
        _require_space(self._directory, state)
        self._manager.save(
            step, args=ocp.args.Composite(state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(data))
        )
        self._unsealed = step

    def poll(self) -> None:
        """Seals the save under way if it has finished. Call it once a step, so that a kill loses no finished save.

        Only the first process seals, because orbax finishes a save there.
        """
        if world.is_first() and self._unsealed is not None and not self._manager.is_saving_in_progress():
            self._seal()

    def finish(self) -> None:
        """Waits until the save under way is finished and sealed."""
        self._seal()

    def _seal(self) -> None:
        # Cleared first: a save that fails is reported once, and must never be sealed by a later call.
        step, self._unsealed = self._unsealed, None
        self._manager.wait_until_finished()
        if step is not None and world.is_first():
            path = self._directory / str(step)
            write_json(path / _MANIFEST, _hashes(path))
            for unfinished in self._directory.glob(f"{step}.unfinished*"):
                remove(unfinished)

    def restore(self, abstract: Any, step: int | None = None) -> tuple[int, Any, dict[str, Any]] | None:
        """Returns (step, state, data) of the newest sound checkpoint, or of `step`; None where there is none.

        `abstract` is a state of the right structure. The restored arrays take its shardings.
        """
        if step is None and (step := self.newest()) is None:
            return None
        return step, *self.restore_step(abstract, step)

    def restore_step(self, abstract: Any, step: int) -> tuple[Any, dict[str, Any]]:
        """Returns (state, data) of a sound checkpoint; `abstract` as in `restore`."""
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(abstract_of(abstract)),
                data=ocp.args.JsonRestore(),
            ),
        )
        return restored["state"], restored["data"]

    def newest(self) -> int | None:
        """Returns the step of the newest sound checkpoint, or None. Renames newer damaged ones, with a warning."""
        set_aside, newest = processes.by_first(self._set_aside)
        for step, problem, name in set_aside:
            warn(
                f"checkpoint {self._directory / str(step)} is damaged ({problem}): moved to {name} beside it; going "
                "back to the one before it"
            )
        if set_aside:
            self._manager.reload()
        return newest

    def _set_aside(self) -> tuple[list[tuple[int, str, str]], int | None]:
        """Renames damaged checkpoints, from the newest on, until a sound one is found.

        Returns (step, problem, new name) of each renamed checkpoint, and the step of the sound one or None. Nothing is
        deleted, because a copy of a workdir may not be complete yet. An unfinished checkpoint is removed once its step
        is saved anew.
        """
        renamed: list[tuple[int, str, str]] = []
        for step in sorted(self._manager.all_steps(), reverse=True):
            if (problem := _problem(self._directory / str(step))) is None:
                return renamed, step
            kind = "unfinished" if problem == _UNFINISHED else "damaged"
            names = itertools.chain([f"{step}.{kind}"], (f"{step}.{kind}-{number}" for number in itertools.count(2)))
            name = next(name for name in names if not (self._directory / name).exists())
            move(self._directory / str(step), self._directory / name)
            renamed.append((step, problem, name))
        return renamed, None

    def close(self) -> None:
        self._seal()
        self._manager.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        """Finishes a save under way, also when the run ends in an error; that error is the one to report.

        With several processes it does not wait after an error. The other processes go on, so it would wait for them for
        ever and never report the error.
        """
        if error is not None and world.count() > 1 and not isinstance(error, supervision.Preempted):
            return
        with contextlib.suppress(*([Exception] if error is not None else [])):
            self.close()


def abstract_of(state: Any) -> Any:
    """Returns the shapes, dtypes and shardings of a state's arrays, in the state's structure."""
    return jax.tree.map(ocp.utils.to_shape_dtype_struct, state)


def is_sealed(path: AnyPath) -> bool:
    """Returns whether the checkpoint directory was written to its end."""
    return bool((path / _MANIFEST).exists())


def is_whole(path: AnyPath) -> bool:
    """Returns whether the checkpoint directory was written to its end and its files are as they were written.

    All processes must call it together. The first one looks.
    """
    return processes.by_first(lambda: _problem(path)) is None


def newest_sealed(directory: AnyPath) -> AnyPath | None:
    """Returns a stage's newest checkpoint that was written to its end, or None where there is none."""
    return next(iter(sealed(directory)), None)


def sealed(directory: AnyPath) -> list[AnyPath]:
    """Returns a stage's checkpoints that were written to their end, the newest first."""
    complete = [path for path in children(directory) if path.name.isdecimal() and is_sealed(path)]
    return sorted(complete, key=lambda path: -int(path.name))


def restore_part(path: AnyPath, abstract: Any) -> Any | None:
    """Restores only those arrays of a checkpoint's state that `abstract` has, with its shardings.

    The other arrays take no memory. Returns None where the checkpoint is unfinished or damaged. Writes nothing.
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
    """Raises OSError where the disk or the limit on a file's size is too small for this process's part of `state`.

    It is checked before the save: one that fails in the middle does so in threads of orbax, which print tracebacks.
    """
    if is_remote(directory):
        return
    shards = [shard for leaf in jax.tree.leaves(state) for shard in leaf.addressable_shards if shard.replica_id == 0]
    needed = sum(shard.data.nbytes for shard in shards)
    largest = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if largest != resource.RLIM_INFINITY and largest < needed:  # most of the bytes may go into one file
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), str(directory))
    if shutil.disk_usage(directory).free < needed + _MARGIN:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(directory))


def _hashes(path: AnyPath) -> dict[str, str]:
    """Returns file name -> a hash of its content, for every file of a checkpoint but its manifest.

    On a local disk the hash is SHA-256. For a checkpoint of more than `_HASHED_BYTES` it is only the file's size, which
    is what a full disk or a killed process gets wrong. On a bucket it is the checksum that the store keeps, marked by
    `_CHECKSUM`, so nothing is read back. The two kinds cannot be compared: the content of a checkpoint that was copied
    between a disk and a bucket is not checked.
    """
    if is_remote(path):
        checksums = {name: _CHECKSUM + checksum for name, checksum in object_checksums(path).items()}
        return {name: checksum for name, checksum in checksums.items() if name != _MANIFEST}
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.name != _MANIFEST)
    sizes = {file: file.stat().st_size for file in files}
    hashed = sum(sizes.values()) <= _HASHED_BYTES
    return {str(file.relative_to(path)): _hash(file) if hashed else f"{_SIZE}{sizes[file]}" for file in files}


def _hash(path: AnyPath) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_same(expected: str, actual: str | None) -> bool:
    """Returns whether a file's hash is the one in the manifest.

    Where only one of the two is a bucket's checksum, they cannot be compared: the file then only has to exist.
    """
    if actual is None or expected.startswith(_CHECKSUM) == actual.startswith(_CHECKSUM):
        return actual == expected
    return True


def _problem(path: AnyPath) -> str | None:
    """Describes the first problem of a checkpoint's files. Returns None if they are as they were written."""
    try:
        expected = read_json(path / _MANIFEST)
    except FileNotFoundError:
        return _UNFINISHED
    except UserError as error:
        return str(error).removeprefix(f"{path / _MANIFEST}: ")
    if not isinstance(expected, dict) or not expected or not all(isinstance(value, str) for value in expected.values()):
        return f"{_MANIFEST} names no files with their checksums"
    actual = _hashes(path)
    if changed := sorted(name for name in expected if not _is_same(expected[name], actual.get(name))):
        return f"changed or missing: {changed[0]}"
    unchecked = sorted(name for name in actual.keys() - expected.keys() if name.startswith(_ITEMS))
    return f"not in {_MANIFEST}: {unchecked[0]}" if unchecked else None


def read_data(path: AnyPath) -> dict[str, Any]:
    """Reads the `data` that `Checkpoints.save` was given. Raises UserError where it cannot be read."""
    return read_fields(path / "data" / "metadata", {})
