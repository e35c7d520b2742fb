"""TPU generations: the published figures of a chip, and the least time that a step's work takes on it."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from nlae_jax.plan.cost import Cost, Total
from nlae_jax.runtime.errors import UserError, first_line

GIB = 1 << 30

# The library only compiles and uses no device. So it need not ask the cloud for settings, must not warn that it got
# none, and may be loaded while another process uses it.
_COMPILING_ONLY = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

UNITS = ("compute", "memory", "links")  # the units of a chip that may bound a step's time


@dataclasses.dataclass(frozen=True)
class Chip:
    """The figures of one chip."""

    memory_bytes: int  # of main memory
    flops: float  # bfloat16 FLOP/s
    memory_bandwidth: float  # bytes/s of main memory
    link_bandwidth: float  # bytes/s of all links together, outgoing
    links: int  # to neighbours, two for each dimension of the torus

    @property
    def usable_bytes(self) -> int:
        """The memory that programs may use: compiling for v5e fails beyond 15.75 of 16 GiB, others are similar."""
        return int(self.memory_bytes * 0.98)

    @property
    def ring_bandwidth(self) -> float:
        """Bytes/s of the two links that a ring along one dimension of the torus uses."""
        return self.link_bandwidth * 2 / self.links


# "Key specifications" of https://cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e and /tpu7x. The published bandwidth of
# the interconnect counts both directions (1200 GB/s for v5p, 4800 Gbit/s in its first announcement): half of it here.
CHIPS = {
    "v4": Chip(32 * GIB, 275e12, 1.2e12, 300e9, 6),
    "v5e": Chip(16 * GIB, 197e12, 819e9, 200e9, 4),
    "v5p": Chip(95 * GIB, 459e12, 2.765e12, 600e9, 6),
    "v6e": Chip(32 * GIB, 918e12, 1.638e12, 400e9, 4),
    "tpu7x": Chip(192 * GIB, 2307e12, 7.38e12, 600e9, 6),
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice of a pod: its devices, which programs are compiled for but which do not exist here.

    A chip may be two devices (7x).
    """

    name: str
    chip: Chip
    devices: list[Any]
    devices_per_chip: int

    @property
    def chips(self) -> int:
        """The number of chips."""
        return len(self.devices) // self.devices_per_chip

    @property
    def device(self) -> Chip:
        """A device's share of its chip."""
        chip, parts = self.chip, self.devices_per_chip
        shares = chip.flops / parts, chip.memory_bandwidth / parts, chip.link_bandwidth / parts
        return Chip(chip.memory_bytes // parts, *shares, chip.links)


def open_topology(name: str) -> Topology:
    """Makes a slice such as `v5p:4x4x8`. Raises UserError where the TPU compiler does not know it, or is missing."""
    from jax.experimental import topologies

    generation, _, shape = name.partition(":")
    if generation not in CHIPS or not shape:
        raise UserError(f"--topology {name}: should be GENERATION:SHAPE, as v5p:4x4x8; generations: {', '.join(CHIPS)}")
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("nlae plan: the TPU compiler is missing; pip install 'nlae_jax[plan]'")
    try:
        # A slice that is smaller than a host's 2x2x1 chips needs explicit bounds.
        host = [min(int(size), most) for size, most in zip((*shape.split("x"), "1"), (2, 2, 1), strict=False)]
        with _environment(_COMPILING_ONLY):
            topology = topologies.get_topology_desc(platform="tpu", topology_name=name, chips_per_host_bounds=host)
        devices: list[Any] = list(topology.devices)
    except Exception as error:  # the compiler raises errors of its own kinds
        raise UserError(f"--topology {name}: {first_line(error)}") from None
    chips = {tuple(device.coords) for device in devices}
    return Topology(name, CHIPS[generation], devices, len(devices) // len(chips))


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Sets missing environment variables for the `with` block. The library reads them when it is loaded."""
    added = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


def seconds(cost: Cost, device: Chip) -> dict[str, float]:
    """Returns the least seconds of the work: of `compute`, `memory` and `links` each alone, and of the whole `step`.

    Within a loop's trip, and outside all loops, the three units overlap perfectly, so the longest counts. Loops run one
    after another. Units run at their published peaks. A collective uses the two links of one dimension of the torus.
    """
    step = sum(trips * max(alone_seconds(part, device).values()) for _, trips, part in cost.flattened())
    return {**alone_seconds(cost.total(), device), "step": step}


def alone_seconds(cost: Cost | Total, device: Chip) -> dict[str, float]:
    """Returns the seconds of each of `UNITS` by itself, for the work outside loops."""
    links = cost.sent / device.ring_bandwidth
    by_unit = (cost.flops + cost.repeated_flops) / device.flops, cost.bytes / device.memory_bandwidth, links
    return dict(zip(UNITS, by_unit, strict=True))


@contextlib.contextmanager
def nothing_kept() -> Iterator[None]:
    """Switches jax's cache off: programs for devices that this machine does not have cannot be read back from it."""
    before = jax.config.values["jax_enable_compilation_cache"]
    _switch_cache(False)
    try:
        yield
    finally:
        _switch_cache(before)


def _switch_cache(on: bool) -> None:
    """Jax looks at the switch once a process, at the first program, and again after a reset. Files stay."""
    jax.config.update("jax_enable_compilation_cache", on)
    compilation_cache.reset_cache()
