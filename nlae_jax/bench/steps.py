"""`nlae bench`: times the phases of the real steps, and compares them with the machine's measured peaks.

The steps are those of training, on the configured subject's weights and random activations. All responses run to the
length limit. FLOPs are those that the mathematics needs, without recomputation. Speed does not depend on the weights'
values: a model directory may hold only a config.json. Then weights are random and prompts have the usual lengths.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from nlae_jax.bench.extraction import time_extraction
from nlae_jax.bench.flops import Shapes, decode_bytes, needed_flops, shapes_of
from nlae_jax.config import Config
from nlae_jax.lm.arch import Arch, model_weights
from nlae_jax.lm.families import read_arch
from nlae_jax.lm.modules import apply
from nlae_jax.lm.pretrained import has_tokenizer, load_tokenizer, resolve_model
from nlae_jax.lm.products import einsum
from nlae_jax.lm.transformer import Segment, random_params
from nlae_jax.lm.weights import has_weights, load_params
from nlae_jax.mesh import batch_sharding, make_mesh, place, replicated, tree_shardings
from nlae_jax.roles import direction
from nlae_jax.roles.encoder import Encoder
from nlae_jax.roles.pair import Params, Roles, make_roles
from nlae_jax.roles.protocol import Protocol, assumed_protocol, blank_tokens, make_protocol
from nlae_jax.runtime import world
from nlae_jax.train import steps
from nlae_jax.train.loop import compiled
from nlae_jax.train.state import RlState, init_decoder, init_encoder, init_role, rl_optimizers

PHASES = ("extraction", "rollout", "score", "reference", "policy", "encoder_sft", "rl_step", "unshared")


class _Peaks(NamedTuple):
    """How a machine's peaks are measured.

    One program should take milliseconds, because an accelerator's answer to the host takes a tenth of one.
    """

    width: int  # of the square matrices
    products: int  # in one program
    bytes: int  # of the array that is read and written
    passes: int  # over that array in one program


_ON_CPU, _ON_ACCELERATOR = _Peaks(2048, 1, 1 << 28, 1), _Peaks(8192, 8, 1 << 30, 16)


class UnsharedEncoder(Encoder):
    """The encoder with its constant prompt computed for every activation, as others do it. For comparison."""

    def prompt_segments(self, h_BxD: jax.Array) -> tuple[Segment, Segment]:
        prefix, act = super().prompt_segments(h_BxD)
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (h_BxD.shape[0], *x.shape)), prefix), act


@dataclasses.dataclass(frozen=True)
class Timing:
    """A compiled function's median seconds per call, seconds to compile, and bytes in use while it runs."""

    seconds: float
    compile_seconds: float
    bytes: int


def timed(function: Any, arguments: Callable[[], tuple[Any, ...]], repeats: int) -> Timing:
    """Times a jitted function. `arguments()` makes new ones before each call, because a step may reuse their memory."""
    operands = arguments()
    begin = time.perf_counter()
    program = function.lower(*operands).compile()
    compile_seconds = time.perf_counter() - begin
    jax.block_until_ready(program(*operands))
    seconds = []
    for _ in range(repeats):
        operands = jax.block_until_ready(arguments())
        begin = time.perf_counter()
        jax.block_until_ready(program(*operands))
        seconds.append(time.perf_counter() - begin)
    memory = program.memory_analysis()
    resident = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Timing(statistics.median(seconds), compile_seconds, resident + memory.temp_size_in_bytes)


def matmul_peak(dtype: Any) -> float:
    """Measures the best FLOP/s of products of square matrices on one device, in the precision that models use."""
    width, products = _peaks().width, _peaks().products
    # Scaled so that the entries of repeated products neither grow nor vanish.
    x = (jax.random.normal(jax.random.PRNGKey(0), (width, width)) * width**-0.5).astype(dtype)
    multiply = lambda a: jax.lax.fori_loop(0, products, lambda _, b: einsum("ij,jk->ik", a, b), a)  # noqa: E731
    return 2.0 * products * width**3 / _best_seconds(multiply, x)


def memory_bandwidth() -> float:
    """Measures the best bytes per second of passes that read and write a large array in place, on one device."""
    size, passes = _peaks().bytes, _peaks().passes
    one_pass = lambda _, a: a + 1  # noqa: E731
    add = jax.jit(lambda a: jax.lax.fori_loop(0, passes, one_pass, a), donate_argnums=0)
    x, seconds = jnp.zeros(size // 4, jnp.float32), []
    for _ in range(8):
        begin = time.perf_counter()
        x = jax.block_until_ready(add(x))
        seconds.append(time.perf_counter() - begin)
    return 2.0 * size * passes / min(seconds)


def _peaks() -> _Peaks:
    """Returns the sizes to measure this machine's peaks with."""
    return _ON_CPU if jax.devices()[0].platform == "cpu" else _ON_ACCELERATOR


def _best_seconds(function: Callable[[jax.Array], jax.Array], x: jax.Array, repeats: int = 5) -> float:
    """Returns the seconds of a function's fastest call, without compilation."""
    compiled_function, seconds = jax.jit(function), []
    jax.block_until_ready(compiled_function(x))
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready(compiled_function(x))
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


class Workload(NamedTuple):
    """The roles, frozen arrays and batch that are timed. `rl_state` makes a new state."""

    roles: Roles
    config: Config
    frozen: Params
    rl_state: Callable[[], RlState]
    batch: Params
    shapes: Shapes
    assumed: str = ""  # says which parts of the model were missing


def endless(protocol: Protocol) -> Protocol:
    """Returns a protocol with the same prompts in which no token ends a response."""
    return dataclasses.replace(protocol, closing=(), eos_id=-1)


def make_workload(config: Config) -> Workload:
    """Makes the workload of the configured model and sizes, with random activations."""
    mesh, directory = make_mesh(config.mesh), resolve_model(config.subject.model)
    arch = read_arch(directory)
    protocol, blank, assumed = _prompts(config, arch, directory)
    roles = make_roles(config, arch, endless(protocol))
    shardings = tree_shardings(mesh, model_weights(arch))
    if has_weights(directory):
        base = load_params(directory, arch, config.subject.dtype, shardings=shardings)
    else:
        draw_params = jax.jit(partial(random_params, arch=arch, dtype=config.subject.dtype), out_shardings=shardings)
        base, assumed = draw_params(jax.random.PRNGKey(config.seed)), f"random weights{assumed and '; ' + assumed}"
    key, rl = jax.random.PRNGKey(config.seed), config.rl
    h = np.random.default_rng(config.seed).standard_normal((rl.activations_per_step, arch.d_model)).astype(np.float32)
    optimizers = rl_optimizers(config)
    everywhere = lambda tree: place(tree, replicated(mesh))  # noqa: E731

    def rl_state() -> RlState:
        encoder, decoder = init_encoder(roles, base, key), init_decoder(roles, base, key)
        return RlState(
            init_role(mesh, roles.encoder_weights(), encoder, optimizers[0]),
            init_role(mesh, roles.decoder_weights(), decoder, optimizers[1]),
            everywhere(jnp.copy(key)),  # a copy, because the step reuses the state's memory
        )

    frozen = {
        "base": base if config.lora.rank else {},
        "baselines": everywhere(direction.baselines(jnp.asarray(h))),
        "blank": everywhere(blank),
    }
    if rl.kl_coef:
        encoder = place(init_encoder(roles, base, key), tree_shardings(mesh, roles.encoder_weights()))
        frozen["reference"] = roles.reference(encoder)
    batch = {"h": place(h, batch_sharding(mesh))}
    return Workload(roles, config, frozen, rl_state, batch, shapes_of(config, protocol), assumed)


def _prompts(config: Config, arch: Arch, directory: Path) -> tuple[Protocol, np.ndarray, str]:
    """Returns the protocol, the blank tokens [V] bool, and a text that says what was assumed of them."""
    if not has_tokenizer(directory):
        return assumed_protocol(config.protocol), np.zeros(arch.vocab_size, bool), "no tokenizer"
    tokenizer = load_tokenizer(directory)
    protocol = make_protocol(tokenizer, config.protocol, config.protocol.injection_scale or 1.0)
    return protocol, blank_tokens(tokenizer, arch.vocab_size), ""


def unshared(workload: Workload) -> Workload:
    """Returns the workload of as many samples, each with its own prompt."""
    encoder = UnsharedEncoder(
        **{f: getattr(workload.roles.encoder, f) for f in ("arch", "protocol", "lora_scale", "remat", "attention")}
    )
    group = workload.shapes.group
    config = dataclasses.replace(
        workload.config,
        rl=dataclasses.replace(
            workload.config.rl, activations_per_step=workload.shapes.samples, samples_per_activation=1
        ),
    )
    return workload._replace(
        roles=dataclasses.replace(workload.roles, encoder=encoder),
        config=config,
        batch={"h": jnp.repeat(workload.batch["h"], group, axis=0)},
        shapes=workload.shapes.unshared(),
    )


def time_phases(workload: Workload, repeats: int, names: Sequence[str] = PHASES) -> dict[str, Timing]:
    """Times the phases in `names`: rollout, score, policy and, where RL has a KL term, reference.

    Each phase is compiled by itself.
    """
    roles, state = workload.roles, workload.rl_state()
    parts = steps.rl_step(roles, workload.config, *rl_optimizers(workload.config))
    frozen, batch = workload.frozen, workload.batch
    rollout = jax.jit(parts.rollout)
    samples = rollout(state, frozen, batch)
    tokens = samples.tokens

    def log_probs(trained: Params, frozen: Params, h: jax.Array, tokens: jax.Array) -> jax.Array:
        variables = roles.encoder_variables(frozen["base"], trained)
        return apply(roles.encoder, variables, h, tokens, method="log_probs")[0]

    def policy(trained: Params, frozen: Params, h: jax.Array, tokens: jax.Array) -> Params:
        def loss(trained: Params) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            variables, weights = roles.encoder_variables(frozen["base"], trained), jnp.ones(tokens.shape)
            loss_of = lambda log_probs, weight: (log_probs * weight).sum()  # noqa: E731
            return apply(roles.encoder, variables, h, tokens, loss_of, weights, method="loss")

        return jax.grad(loss, has_aux=True)(trained)

    encoder_arguments = (state.encoder.trained, frozen, batch["h"], tokens)
    phases = {
        "rollout": (rollout, (state, frozen, batch)),
        "score": (jax.jit(parts.score), (state.decoder, frozen, batch, samples)),
        "reference": (jax.jit(log_probs), encoder_arguments),
        "policy": (jax.jit(policy), encoder_arguments),
    }
    if not workload.config.rl.kl_coef:
        del phases["reference"]
    return {
        name: timed(function, partial(tuple, arguments), repeats)
        for name, (function, arguments) in phases.items()
        if name in names
    }


def time_rl_step(workload: Workload, repeats: int) -> Timing:
    """Times the fused RL step, as training runs it."""
    parts = steps.rl_step(workload.roles, workload.config, *rl_optimizers(workload.config))
    state = workload.rl_state()
    mesh = jax.tree.leaves(state)[0].sharding.mesh
    step = compiled(parts.step, state, mesh)
    del state
    return timed(step, lambda: (workload.rl_state(), workload.frozen, workload.batch), repeats)


def time_encoder_sft(workload: Workload, repeats: int) -> Timing:
    """Times the encoder's warm-start step, which has one response per activation."""
    optimizer, mesh = rl_optimizers(workload.config)[0], jax.tree.leaves(workload.rl_state())[0].sharding.mesh
    size, length = workload.shapes.sft_batch, workload.shapes.response
    h = jax.random.normal(jax.random.PRNGKey(1), (size, workload.roles.encoder.arch.d_model))
    batch = {"h": h, "response": jnp.ones((size, length), jnp.int32), "length": jnp.full(size, length, jnp.int32)}
    batch = place(batch, batch_sharding(mesh))
    state = lambda: workload.rl_state().encoder  # noqa: E731
    sft_step = steps.encoder_sft_step(workload.roles, optimizer, workload.config.sft.microbatches)
    step = compiled(sft_step, state(), mesh)
    return timed(step, lambda: (state(), workload.frozen, batch), repeats)


def bench(config: Config, repeats: int = 3, phases: Sequence[str] = PHASES) -> dict[str, Any]:
    """Returns the numbers of `nlae bench`: seconds of the `phases`, FLOPs, fractions of measured peaks, memory."""
    # Extraction comes first, because it loads the weights itself and frees them. It runs in one process only, because
    # several would need a directory that all of them see.
    extraction = time_extraction(config, repeats) if "extraction" in phases and _can_extract(config) else {}
    workload = make_workload(config)
    peaks = [matmul_peak(config.subject.dtype)]
    flops = needed_flops(workload.roles.encoder.arch, config.subject.layer, config.lora.rank, workload.shapes)
    timings = time_phases(workload, repeats, phases)
    if "encoder_sft" in phases:
        timings["encoder_sft"] = time_encoder_sft(workload, repeats)
    shared = time_rl_step(workload, repeats) if "rl_step" in phases else None
    unshared_step = time_rl_step(unshared(workload), repeats) if "unshared" in phases else None
    num_devices = len(workload.batch["h"].sharding.device_set)
    peaks.append(matmul_peak(config.subject.dtype))  # measured again, in case another program ran during the first
    peak, device, bandwidth = max(peaks), jax.devices()[0], memory_bandwidth()
    result: dict[str, Any] = {
        "device": f"{num_devices} {device.platform} {device.device_kind}",
        "assumed": workload.assumed,
        "shapes": workload.shapes._asdict(),
        "matmul_peak_flops": peak,
        "memory_bandwidth_bytes_per_second": bandwidth,
    }
    if "rollout" in timings:
        needed = decode_bytes(workload.roles.encoder.arch, workload.shapes, jnp.dtype(config.subject.dtype).itemsize)
        result["rollout_bandwidth_fraction"] = needed / timings["rollout"].seconds / (bandwidth * num_devices)
    result["phases"] = {
        name: {
            "seconds": timing.seconds,
            "flops": flops[name],
            "peak_fraction": flops[name] / timing.seconds / (peak * num_devices),
            "compile_seconds": timing.compile_seconds,
        }
        for name, timing in timings.items()
    }
    if shared:
        tokens = workload.shapes.samples * workload.shapes.response
        result |= {
            "rl_step_seconds": shared.seconds,
            "samples_per_second": workload.shapes.samples / shared.seconds,
            "tokens_per_second": tokens / shared.seconds,
            "peak_memory_bytes": shared.bytes,
            "compile_seconds": shared.compile_seconds,
        }
    if unshared_step:
        result["rl_step_seconds_unshared"] = unshared_step.seconds
    if shared and unshared_step:
        result["speedup_of_sharing"] = unshared_step.seconds / shared.seconds
    return result | extraction


def _can_extract(config: Config) -> bool:
    """Returns whether extraction can be timed: in one process, with a model that has weights and a tokenizer."""
    directory = resolve_model(config.subject.model)
    return world.count() == 1 and has_weights(directory) and has_tokenizer(directory)


def as_table(result: dict[str, Any]) -> Table:
    """Makes a table of the numbers of `bench`."""
    shapes = result["shapes"]
    title = (
        f"{result['device']}: {shapes['activations']} activations × {shapes['group']} samples, prompt "
        f"{shapes['prefix'] + shapes['act']}, response {shapes['response']}"
    )
    table = Table(title=title, title_justify="left")
    for column in ("phase", "seconds", "GFLOP", "of peak", "compile, s"):
        table.add_column(column, justify="left" if column == "phase" else "right")
    for name, phase in result["phases"].items():
        share = f"{100 * phase['peak_fraction']:.0f} %"
        cells = f"{phase['seconds']:.3f}", f"{phase['flops'] / 1e9:.0f}", share, f"{phase['compile_seconds']:.1f}"
        table.add_row(name, *cells)
    table.add_section()
    if "rl_step_seconds" in result:
        table.add_row("RL step", f"{result['rl_step_seconds']:.3f}", "", "", f"{result['compile_seconds']:.1f}")
    if "rl_step_seconds_unshared" in result:
        table.add_row("RL step, unshared", f"{result['rl_step_seconds_unshared']:.3f}")
    table.caption_justify = "left"
    table.caption = "; ".join(_notes(result))
    return table


def _notes(result: dict[str, Any]) -> list[str]:
    """Returns the lines under the table."""
    notes = [result["assumed"]] if result["assumed"] else []
    if "speedup_of_sharing" in result:
        notes.append(f"sharing the prompt: {result['speedup_of_sharing']:.2f}×")
    if "rl_step_seconds" in result:
        speed = f"{result['samples_per_second']:.2f} samples/s, {result['tokens_per_second']:.0f} tokens/s"
        notes += [speed, f"memory of a step {result['peak_memory_bytes'] / 1e9:.2f} GB"]
    peaks = f"matmul peak {result['matmul_peak_flops'] / 1e9:.0f} GFLOP/s, bandwidth "
    peaks += f"{result['memory_bandwidth_bytes_per_second'] / 1e9:.1f} GB/s"
    if "rollout_bandwidth_fraction" in result:
        peaks += f", of which the rollout needs {100 * result['rollout_bandwidth_fraction']:.0f} %"
    notes.append(peaks)
    if "extraction" in result:
        speed = f"extraction {result['extraction']['tokens_per_second']:.0f} tokens/s"
        notes.append(f"{speed}, {100 * result['extraction']['ratio']:.0f} % of the bare forward pass")
    return notes
