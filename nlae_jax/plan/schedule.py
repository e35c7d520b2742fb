"""Compiles a step's program only up to its schedule, which tells memory, operations and exchanges.

The TPU compiler spends most of its time on machine code, and it has no option to leave machine code out. A separate
process therefore compiles, and it is ended once the compiler has written the scheduled module and its buffers. The
names and the form of these files are not documented; they are those of libtpu 0.0.42.

Memory is a lower bound, because it counts only the buffers. For a whole program the compiler also reports the code, and
other temporaries: about twice as many bytes for some small models.
"""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from nlae_jax.config import Config, load_config
from nlae_jax.plan.abstract import make_planned, programs
from nlae_jax.plan.chips import nothing_kept, open_topology
from nlae_jax.runtime.errors import UserError
from nlae_jax.runtime.files import write_json

_MODULE = "*.after_optimizations_after_buffer_assignment.txt"
_BUFFERS = "*.after_optimizations-buffer-assignment.txt"
_ALLOCATION = re.compile(r"^allocation \d+: size (\d+), (.*)$", re.MULTILINE)
_COLOR = re.compile(r"\bcolor (\d+)\b")
_SECONDS_BETWEEN_LOOKS = 0.5
_MOST_SAID = 1 << 20  # characters: the bytes that a program needs stand before a long list of its arrays
_UNKNOWN_FORM = "nlae plan --quick: the files of this version of libtpu are not known; leave --quick out"


class Scheduled(NamedTuple):
    """A module's text, and bytes of the main memory of a device: its arguments, and all the rest."""

    text: str
    argument_bytes: int
    temporary_bytes: int


def scheduled(config: Config, topology_name: str, step: str, index: int) -> Scheduled:
    """Compiles program `index` of a step as far as its schedule.

    Raises RuntimeError with the compiler's message where it refuses the program, and UserError where it does not write
    the files that this module reads.
    """
    with tempfile.TemporaryDirectory(prefix="nlae-plan-") as name:
        directory = Path(name)
        write_json(directory / "config.json", dataclasses.asdict(config))
        command = [sys.executable, "-m", __name__, name, topology_name, step, str(index)]
        with open(directory / "said", "wb") as said, subprocess.Popen(command, stdout=said, stderr=said) as process:
            try:
                written = 0
                while (code := process.poll()) is None:
                    time.sleep(_SECONDS_BETWEEN_LOOKS)
                    before, written = written, sum(path.stat().st_size for path in directory.glob(_MODULE))
                    if written and written == before:  # to its end: it is written at once
                        break
            finally:
                process.kill()
        modules, buffers = (sorted(directory.glob(pattern)) for pattern in (_MODULE, _BUFFERS))
        if not modules or not buffers:
            if code:
                message = (directory / "said").read_text(encoding="utf-8", errors="replace")[-_MOST_SAID:]
                raise RuntimeError(f"the compiler's process ended with code {code}: {message}")
            raise UserError(_UNKNOWN_FORM)
        return Scheduled(modules[0].read_text(encoding="utf-8"), *buffer_bytes(buffers[0].read_text(encoding="utf-8")))


def buffer_bytes(assignment: str) -> tuple[int, int]:
    """Returns the bytes of main memory in a buffer assignment: those of arguments, and all others.

    Main memory is color 0, which the text does not mention. Raises UserError where the text names no allocation.
    """
    allocations = _ALLOCATION.findall(assignment)
    if not allocations:
        raise UserError(_UNKNOWN_FORM)
    arguments = others = 0
    for size, properties in allocations:
        color = _COLOR.search(properties)
        if color and color[1] != "0":
            continue
        if re.search(r"\bparameter \d+", properties):
            arguments += int(size)
        elif "constant" not in properties.split(", ")[0] and "thread-local" not in properties:
            others += int(size)
    return arguments, others


def main(directory: str, topology_name: str, step: str, index: str) -> None:
    """Compiles one program. It is the work of the separate process."""
    planned = make_planned(load_config(Path(directory) / "config.json"), open_topology(topology_name).devices)
    program = programs(planned, step)[int(index)]
    options = {"xla_dump_to": directory, "xla_dump_hlo_as_text": True}
    with nothing_kept():
        program.function.lower(*program.arguments).compile(compiler_options=options)


if __name__ == "__main__":
    main(*sys.argv[1:])
