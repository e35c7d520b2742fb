"""Loading by processes of their own: what each of several reads, and how much memory a large model takes."""

import json
import shutil
import socket
import subprocess
import sys
import zlib
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open

from nlae_jax.lm.arch import Arch
from nlae_jax.lm.layout import flat_weights, hf_name, hf_tensors
from nlae_jax.lm.weights import load_params
from tests.checkpoints import drawn, save_index, save_shards, shardings_on, write_config
from tests.conftest import environment_with
from tests.loading import digest, distinct_shards

ROOT = Path(__file__).parent.parent


def start(*arguments: object, devices: int) -> subprocess.Popen:
    """`tests.loading` in a process of its own, with so many fake devices."""
    command = [sys.executable, "-m", "tests.loading", *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, env=environment_with(devices), stdout=-1, stderr=-1, text=True)


def reports_of(*processes: subprocess.Popen) -> list[dict]:
    """What they print in the end; one that fails takes the others with it."""
    try:
        outputs = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors[-2000:]
    return [json.loads(output.splitlines()[-1]) for output, _ in outputs]


# What of the file each of two processes reads; devices 0 to 3 belong to the first.
@pytest.mark.parametrize(("sizes", "share"), [((1, 2, 4), 1 / 2), ((1, 4, 2), 1 / 2), ((2, 2, 2), 1)])
def test_two_processes_read_what_their_devices_hold(sizes, share, tmp_path):
    arch = Arch(1024, 256, 4, 8, 4, 32, 768, tied_head=False)
    weights = drawn(arch, "bfloat16")
    save_shards(tmp_path, weights, 3)
    write_config(tmp_path, arch)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    mesh = ",".join(map(str, sizes))
    reports = reports_of(*(start(tmp_path, "float32", mesh, port, number, devices=4) for number in range(2)))

    shardings = shardings_on(arch, sizes)
    whole = load_params(tmp_path, arch, shardings=shardings)
    expected = {name: digest(values) for name, values in distinct_shards(whole).items()}
    assert reports[0]["digests"] | reports[1]["digests"] == expected
    split = sum(value.nbytes for value in weights.values() if value.ndim == 2)
    kept_whole = sum(value.nbytes for value in weights.values() if value.ndim == 1)
    needed = split * share + kept_whole
    for report in reports:
        print(f"{sizes}: {report['read']} bytes read, {needed:.0f} needed, {split + kept_whole} in the files")
        assert needed <= report["read"] < needed + 100_000  # headers and config.json


SLACK = 64_000_000  # bytes: pieces on their way, headers, what Python and JAX keep of them
# The proportions of a model of 1.5 billion parameters: 3 GB in bfloat16.
LARGE = Arch(128_256, 2048, 16, 32, 8, 64, 8192, tied_head=False)


def fill_large(directory: Path, arch: Arch, shard_bytes: int = 600_000_000) -> dict[str, int]:
    """Writes a checkpoint whose tensors are pieces of one random buffer. Returns each tensor's bytes.

    One bit of the exponent is never set: no value is infinite or NaN.
    """
    pool = np.random.default_rng(0).integers(0, 1 << 16, arch.vocab_size * arch.d_model + 4096, np.uint16) & 0xFF7F
    shards, sizes = [{}], {}
    for tensor in hf_tensors(arch, flat_weights(arch)):
        theirs, first = tensor.name, zlib.crc32(tensor.name.encode()) % 4096
        values = pool[first : first + np.prod(tensor.shape)].reshape(tensor.shape)
        if sum(map(np.size, shards[-1].values())) * 2 + values.nbytes > shard_bytes:
            shards.append({})
        shards[-1][theirs], sizes[theirs] = values.view(ml_dtypes.bfloat16), values.nbytes
    save_index(directory, shards)
    write_config(directory, arch)
    return sizes


@pytest.fixture
def large(tmp_path):
    """The directory of a checkpoint of 3 GB and its tensors' bytes; it does not outlive the test."""
    try:
        yield tmp_path, fill_large(tmp_path, LARGE)
    finally:
        shutil.rmtree(tmp_path)


@pytest.mark.slow
def test_a_large_model_takes_its_own_size_and_little_more(large):
    """A fresh process, all of the mesh. The bound leaves no room for a copy of the largest tensor."""
    directory, sizes = large
    (report,) = reports_of(start(directory, "bfloat16", "2,2,2", devices=8))
    total, largest, added = sum(sizes.values()), max(sizes.values()), report["peak"] - report["baseline"]
    shards = len(list(directory.glob("*.safetensors")))
    measured = {name: round(value / 1e6, 1) for name, value in report.items() if name not in ("digests", "seconds")}
    print(f"{total / 1e6:.1f} MB in {shards} files, the largest tensor {largest / 1e6:.1f} MB; in MB: {measured}")
    print(f"{added / 1e6:.1f} MB added in {report['seconds']:.1f} s")
    assert shards >= 5 and report["held"] == total
    assert total <= report["read"] < total + 1_000_000
    assert added < total + SLACK < total + largest

    files = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    weights = {}
    for name in files:
        if "k_proj" in name or "embed" in name:
            with safe_open(directory / files[name], framework="np") as file:
                weights[name] = file.get_tensor(name)
    keys = np.stack([weights[hf_name(LARGE, "k", layer)].T for layer in range(LARGE.num_layers)])
    shardings = shardings_on(LARGE, (2, 2, 2))
    for name, values in {"['embed']": weights[hf_name(LARGE, "embed")], "['blocks']['k']": keys}.items():
        sharding = shardings["embed"] if name == "['embed']" else shardings["blocks"]["k"]
        for index in sharding.devices_indices_map(values.shape).values():
            assert report["digests"][f"{name} {index}"] == digest(values[index])
