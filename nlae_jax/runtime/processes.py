"""Lets several processes work as one run: they start together, take the same decisions, and end together.

A single process is the first one, passes every barrier and gets its own values back. Several processes exchange small
values through the coordinator's key-value store (`jax.distributed`), and arrays through the mesh.

All processes must take the same decisions, or they wait for each other for ever. So a decision that depends on files or
clocks is taken by the first process for all (`by_first`), or on the devices (`Agreement`).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from nlae_jax.runtime import supervision
from nlae_jax.runtime.errors import UserError, first_line
from nlae_jax.runtime.world import is_first, world

T = TypeVar("T")


CONNECT_SECONDS = 120.0  # all processes must have found each other within this time


# --- starting

_WHOLE = re.compile(r"[0-9]{1,9}")


def settings(spec: str) -> tuple[str | None, int | None, int | None]:
    """Parses `--distributed` into (HOST:PORT, number of processes, this process's index).

    A part is None where the cluster must provide it. `auto` reads JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
    JAX_PROCESS_ID, of which jax reads only the first. Raises UserError for an invalid value.
    """
    if spec == "auto":
        address = os.environ.get("JAX_COORDINATOR_ADDRESS")
        texts: list[str | None] = [os.environ.get(name) for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID")]
        source = "--distributed: JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID"
    else:
        address, *counts = spec.split(",")
        texts = [*counts]
        source = f"--distributed {spec}"
        if len(texts) != 2:
            raise UserError(f"{source}: should be auto or HOST:PORT,COUNT,INDEX")
    host, _, port = (address or "").rpartition(":")
    if address is not None and not (host and _WHOLE.fullmatch(port) and 0 < int(port) < 65536):
        raise UserError(f"{source}: {address!r} should be HOST:PORT")
    if any(text is not None and not _WHOLE.fullmatch(text) for text in texts):
        raise UserError(f"{source}: COUNT and INDEX should be whole numbers")
    number, index = (None if text is None else int(text) for text in texts)
    if number is not None and index is not None and index >= number:
        raise UserError(f"{source}: INDEX should be from 0 to COUNT - 1")
    return address, number, index


def start(spec: str) -> None:
    """Joins the other processes, before anything is computed. `spec` is the value of `--distributed`.

    Raises UserError where no cluster is found, or where not all processes have joined within `CONNECT_SECONDS`.
    """
    import jax
    from jax._src import distributed  # the client that barriers and small values go through has no public name

    address, number, index = parsed = settings(spec)
    if number != 1 and address is not None and index is not None:
        _await_coordinator(address, index == 0)
    # `supervision.preemptible` handles SIGTERM within a time limit. jax's service would take the signal away from it.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            *parsed,
            cluster_detection_method=None if None in parsed else "deactivate",
            initialization_timeout=int(CONNECT_SECONDS),
        )
        index, number = jax.process_index(), jax.process_count()
    except (ValueError, TypeError) as error:
        raise UserError(
            "--distributed: no cluster found: this is no TPU pod, no job of Slurm, Open MPI or Kubernetes, and "
            "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID are not all set; give HOST:PORT,COUNT,INDEX "
            f"({first_line(error)})"
        ) from error
    except Exception as error:  # jax raises errors of many kinds
        raise UserError(
            f"--distributed: the processes did not come together within {CONNECT_SECONDS:.0f} s ({first_line(error)})"
        ) from error
    world.index, world.count, world.client = index, number, distributed.global_state.client
    world.coordinates = index == 0  # the first process runs jax's coordinator
    if number > 1:
        world.answered = time.monotonic()
        threading.Thread(target=supervision.watch, name="watch", daemon=True).start()
        coordinator = "" if world.coordinates else distributed.global_state.coordinator_address
        threading.Thread(target=supervision.guard, args=(coordinator,), name="guard", daemon=True).start()
        if coordinator:
            supervision.delay_abort()


def _await_coordinator(address: str, is_coordinator: bool) -> None:
    """Waits for the coordinator to listen. In the coordinator it checks that the port is free.

    Raises UserError where that fails, because jax would end the process without a message.
    """
    host, _, port = address.rpartition(":")
    if is_coordinator:
        try:
            with contextlib.closing(socket.socket(socket.AF_INET6 if socket.has_ipv6 else socket.AF_INET)) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(("", int(port)))
        except OSError as error:
            raise UserError(f"--distributed {address}: cannot listen there ({error.strerror})") from None
        return
    deadline, problem = time.monotonic() + CONNECT_SECONDS, ""
    while time.monotonic() < deadline:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except UnicodeError as error:  # a name that no domain can have
            raise UserError(f"--distributed {address}: {host} is not a valid host name ({error})") from None
        except OSError as error:
            problem = error.strerror or str(error)
            time.sleep(0.2)
    raise UserError(f"--distributed {address}: no coordinator there within {CONNECT_SECONDS:.0f} s ({problem})")


# --- doing things together


def barrier() -> None:
    """Waits until every process has called it."""
    if world.count > 1:
        world.client.wait_at_barrier(world.name("barrier"), supervision.FOREVER_MS)


def by_first(work: Callable[[], T]) -> T:
    """Runs `work` in the first process only, and returns its result in all processes.

    The result must be a JSON value. A UserError or Preempted that `work` raises is raised in all processes.
    """
    if world.count == 1:
        return work()
    key, client = world.name("value"), world.client
    if not is_first():
        answer = json.loads(client.blocking_key_value_get(key, supervision.FOREVER_MS))
        if "error" in answer:
            raise UserError(answer["error"])
        if "preempted" in answer:
            raise supervision.Preempted
        return answer["value"]
    try:
        text = json.dumps({"value": work()})
    except UserError as error:
        client.key_value_set(key, json.dumps({"error": str(error)}))
        raise
    except supervision.Preempted:
        client.key_value_set(key, json.dumps({"preempted": True}))
        raise
    client.key_value_set(key, text)
    return json.loads(text)["value"]


def compile_together(function: Any, *arguments: Any) -> None:
    """Compiles a jitted function for the given arguments, and waits until all processes have compiled it.

    Compiling may take minutes longer in one process, but on CPUs gloo waits only half a minute at a program's first
    exchange.
    """
    if world.count > 1:
        function.lower(*arguments).compile()
        barrier()


class Agreement:
    """Returns, when called, whether any process was asked to stop. All processes get the same answer.

    All processes must call it equally often. The answer is a reduction on the devices, in order with their other
    programs. Each call returns the reduction of the call before, so that no process waits for it.
    """

    def __init__(self, mesh: Any) -> None:
        import jax
        import jax.numpy as jnp
        from jax.sharding import NamedSharding, PartitionSpec

        self._split = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._any = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._before: Any = None

    def __call__(self) -> bool:
        if world.count == 1:
            return world.asked.is_set()
        import jax
        import numpy as np

        flags = np.full(self._split.mesh.size, world.asked.is_set(), np.int32)
        before, self._before = (
            self._before,
            self._any(jax.make_array_from_callback(flags.shape, self._split, lambda index: flags[index])),
        )
        return before is not None and bool(before)
