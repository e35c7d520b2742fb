"""`python -m tests.killed POINT ARGUMENTS…`: the `nlae` command, which kills itself (SIGKILL) at one point of its work.

Each point is where something is half-done. Nothing in a killed process runs after it: no handler, no thread. At the
point `never` it does not kill itself, and is there to be interrupted.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from nlae_jax import cli
from nlae_jax.data import activations
from nlae_jax.report import page as report
from nlae_jax.runtime import files
from nlae_jax.train import checkpoint, metrics

_write_atomically = files.write_atomically


def die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("still alive")


def before(owner: Any, name: str, matches: Callable[..., bool] = lambda *_: True, skip: int = 0) -> None:
    """Dies when `owner.name` is called with matching arguments for the `skip + 1`st time."""
    original, left = getattr(owner, name), iter(range(skip))

    def patched(*arguments: Any, **options: Any) -> Any:
        if matches(*arguments) and next(left, None) is None:
            die()
        return original(*arguments, **options)

    setattr(owner, name, patched)


def half_written(file: str) -> None:
    """Dies when half of the temporary `file` is written."""

    def patched(path: Path, write: Callable[[Path], None]) -> None:
        if path.name == file:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}.tmp")
            write(temporary)
            os.truncate(temporary, temporary.stat().st_size // 2)
            die()
        _write_atomically(path, write)

    files.write_atomically = patched


def torn_row(stage: str, step: int) -> None:
    """Dies when half of a row of metrics.jsonl is written."""
    append = metrics.MetricsLog.append

    def patched(self: metrics.MetricsLog, row: dict[str, Any]) -> None:
        append(self, row)
        if (row["stage"], row["step"]) == (stage, step):
            os.truncate(self.path, self.path.stat().st_size - 40)
            die()

    metrics.MetricsLog.append = patched


def while_saving(stage: str, step: int) -> None:
    """Dies as soon as the files of a checkpoint begin to appear, wherever its writing then is."""
    save = checkpoint.Checkpoints.save

    def watch(directory: Path) -> None:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            for parent, _, names in os.walk(directory):  # unlike rglob it passes over what is just being renamed
                if names and f"/{step}.orbax" in parent:
                    die()

    def patched(self: checkpoint.Checkpoints, number: int, *rest: Any) -> None:
        if self._directory.name == stage and number == step:
            threading.Thread(target=watch, args=(self._directory,), daemon=True).start()
        save(self, number, *rest)
        if self._directory.name == stage and number == step:
            time.sleep(30)

    checkpoint.Checkpoints.save = patched


def manifest_of(stage: str, step: int) -> Callable[..., bool]:
    """Whether a file that is about to be written seals that checkpoint."""
    return lambda path, _: path.parts[-3:] == (stage, str(step), "manifest.json")


def extract() -> None:
    """Dies when the third batch has been written and is about to be counted."""
    activations._UNWRITTEN_SECONDS = 0.0  # else all rows of a tiny run are written at once
    before(activations, "write_json", lambda path, _: path.name == "progress.json", skip=2)


def extract_writing() -> None:
    """Dies while the third batch is being written."""
    activations._UNWRITTEN_SECONDS = 0.0
    before(activations._Writer, "_settle", skip=2)


POINTS: dict[str, Callable[[], None]] = {
    "index": lambda: half_written("rows.parquet"),
    "extract": extract,
    "extract_writing": extract_writing,
    "extract_meta": lambda: half_written("meta.json"),
    "describe": lambda: half_written("descriptions.parquet"),
    "encoder_sft": lambda: torn_row("encoder_sft", 5),
    "encoder_sft_saving": lambda: while_saving("encoder_sft", 8),
    "encoder_sft_unsealed": lambda: before(checkpoint, "write_json", manifest_of("encoder_sft", 10)),
    "encoder_sft_last": lambda: before(checkpoint, "write_json", manifest_of("encoder_sft", 60)),
    "decoder_sft": lambda: torn_row("decoder_sft", 3),
    "rl": lambda: torn_row("rl", 3),
    "rl_saving": lambda: while_saving("rl", 4),
    "rl_unsealed": lambda: before(checkpoint, "write_json", manifest_of("rl", 6)),
    "samples": lambda: half_written("held_out.jsonl"),
    "eval": lambda: half_written("eval.json"),
    "report": lambda: before(report, "write_report"),
}


if __name__ == "__main__":
    # What a background shell starts ignores control-C, and so would what that starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if sys.argv[1] != "never":
        POINTS[sys.argv[1]]()
    sys.exit(cli.main(sys.argv[2:]))
