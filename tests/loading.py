"""`python -m tests.loading DIRECTORY DTYPE SIZES [PORT PROCESS]`: loads a model in a process of its own.

SIZES are those of the mesh: `1,2,4`. With PORT and PROCESS it is one of two processes that have the mesh together.
Prints JSON: `seconds` of loading; `baseline` and `peak`, the memory before and the most until after it; `held`, the
bytes of the process's distinct shards; `read`, the bytes it read from anywhere; and `digests` of the shards.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from nlae_jax.config import MeshConfig
from nlae_jax.lm.arch import model_weights
from nlae_jax.lm.families import read_arch
from nlae_jax.lm.weights import load_params
from nlae_jax.mesh import make_mesh, tree_shardings


def status(field: str) -> int:
    """A memory field of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def bytes_read() -> int:
    """By all reading calls of this process, cached or not."""
    return int(Path("/proc/self/io").read_text().split()[1])


def digest(values: Any) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).view(np.uint8).data).hexdigest()


def distinct_shards(params: Any) -> dict[str, Any]:
    """What this process's devices hold, each part once: values by the parameter's path and the part's index."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {
        f"{jax.tree_util.keystr(path)} {shard.index}": shard.data
        for path, leaf in leaves
        for shard in leaf.addressable_shards
    }


def main(directory: str, dtype: str, sizes: str, port: str = "", process: str = "0") -> None:
    if port:
        jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=int(process))
    mesh = make_mesh(MeshConfig(*map(int, sizes.split(","))))
    arch = read_arch(Path(directory))
    shardings = tree_shardings(mesh, model_weights(arch))
    jax.device_put(np.zeros(3), jax.local_devices()[0]).block_until_ready()  # the client is there, and has its threads
    baseline, already, begun = status("VmRSS"), bytes_read(), time.monotonic()
    params = load_params(Path(directory), arch, dtype, shardings=shardings)
    seconds, read, peak = time.monotonic() - begun, bytes_read() - already, status("VmHWM")
    shards = distinct_shards(params)
    report = {
        "seconds": seconds,
        "baseline": baseline,
        "peak": peak,
        "read": read,
        "held": sum(values.nbytes for values in shards.values()),
        "digests": {name: digest(values) for name, values in shards.items()},
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
