"""What tests share: eight fake devices, a cache of compiled programs, and one tiny model per session."""

# ruff: noqa: E402 (the environment is set before jax is imported)
from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import re
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

# Before anything imports jax. Processes that tests start inherit all of it.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Programs here compile for seconds and run for milliseconds: they are not optimised.
_XLA_FLAGS = {
    "xla_force_host_platform_device_count": "8",
    "xla_backend_optimization_level": "0",
    "xla_cpu_parallel_codegen_split_count": "1",
}
# With one part a program, and without fusion emitters, compiling takes half the time. Later lines of jaxlib end the
# process at the name of this flag.
if importlib.metadata.version("jaxlib").startswith("0.10."):
    _XLA_FLAGS["xla_cpu_use_fusion_emitters"] = "false"
_given = os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] = " ".join(
    [_given, *(f"--{name}={value}" for name, value in _XLA_FLAGS.items() if name not in _given)]
).strip()
COMPILED = Path(tempfile.gettempdir()) / f"nlae_jax_tests_{os.getuid()}" / "compiled"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(COMPILED))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import gc

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nlae_jax.config import Config, ProtocolConfig, resolve
from nlae_jax.lm.arch import Arch, LongRope
from nlae_jax.lm.tiny import write_tiny_model
from nlae_jax.mesh import Weight
from nlae_jax.roles.language_model import LanguageModel
from nlae_jax.roles.pair import Roles, make_roles
from nlae_jax.roles.protocol import Protocol, make_protocol

# Tracing makes many short-lived objects. With Python's thresholds a tenth of the suite's time goes into looking for
# cycles among all that the loaded libraries hold.
gc.set_threshold(50_000, 20, 50)

# No deadline: an example that compiles takes a second. Derandomised: the suite does the same work every time.
hypothesis.settings.register_profile("nlae_jax", deadline=None, derandomize=True, database=None, max_examples=50)
hypothesis.settings.load_profile("nlae_jax")


def environment_with(devices: int) -> dict[str, str]:
    """Returns the environment of the tests for a process with another number of fake devices."""
    return os.environ | {"XLA_FLAGS": re.sub(r"(device_count)=\d+", rf"\1={devices}", os.environ["XLA_FLAGS"])}


def slow_but(kept: Iterable[Any], cases: Iterable[Any]) -> list[Any]:
    """Returns the cases for `parametrize`; those not in `kept` are slow. A tuple is a case of several arguments."""
    kept = list(kept)
    arguments = lambda case: case if isinstance(case, tuple) else (case,)  # noqa: E731
    return [case if case in kept else pytest.param(*arguments(case), marks=pytest.mark.slow) for case in cases]


# What differs from the defaults in every tiny run: sizes, and learning rates that move a random model.
TINY: dict[str, Any] = {
    "subject.model": "random:tiny",
    "subject.layer": 0,
    "lora.rank": 4,
    "lora.alpha": 4.0,
    "protocol.encoder_prompt": "Vector: {injection_char}\nThe text is",
    "protocol.decoder_prompt": "The text:\n{explanation}\nIt ends at:",
    "sft.encoder_learning_rate": 1e-2,
    "sft.decoder_learning_rate": 1e-2,
    "sft.max_response_tokens": 32,
    "rl.activations_per_step": 8,
    "rl.samples_per_activation": 2,
    "rl.max_new_tokens": 24,
    "rl.encoder_learning_rate": 1e-3,
    "rl.decoder_learning_rate": 1e-3,
}

INJECTION_SCALE = 8.0


@pytest.fixture(scope="session")
def session_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty cache of converted models; compiled programs in it are the ones that outlive the session."""
    directory = tmp_path_factory.mktemp("nlae_cache")
    COMPILED.mkdir(parents=True, exist_ok=True)
    (directory / "compiled").symlink_to(COMPILED)
    return directory


@pytest.fixture(autouse=True)
def _nlae_cache(session_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never the user's own."""
    monkeypatch.setenv("NLAE_CACHE", str(session_cache))


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-block model with its tokenizer, in the HF layout."""
    directory = tmp_path_factory.mktemp("model") / "tiny"
    write_tiny_model(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_lm(tiny_dir: Path) -> LanguageModel:
    return LanguageModel.from_pretrained(str(tiny_dir))


@pytest.fixture(scope="session")
def arch(tiny_lm: LanguageModel) -> Arch:
    return tiny_lm.arch


@pytest.fixture(scope="session")
def params(tiny_lm: LanguageModel) -> dict[str, Any]:
    """The tiny model's parameters on the first device. Never donate them."""
    return tiny_lm.params


@pytest.fixture(scope="session")
def tokenizer(tiny_lm: LanguageModel) -> Any:
    return tiny_lm.tokenizer


def tiny_config(**overrides: Any) -> Config:
    """The tests' config; overrides name fields with `__` for the dot: `lora__rank=0`."""
    return resolve({**TINY, **{name.replace("__", "."): value for name, value in overrides.items()}})


@pytest.fixture(scope="session")
def protocol(tokenizer: Any) -> Protocol:
    config: ProtocolConfig = tiny_config().protocol
    return make_protocol(tokenizer, config, INJECTION_SCALE)


@pytest.fixture(scope="session")
def make_tiny_roles(arch: Arch, protocol: Protocol) -> Callable[..., Roles]:
    """Roles on the tiny model from overrides of `tiny_config`."""
    return lambda **overrides: make_roles(tiny_config(**overrides), arch, protocol)


@pytest.fixture(scope="session")
def lora_roles(make_tiny_roles: Callable[..., Roles]) -> Roles:
    return make_tiny_roles(lora__rank=4)


@pytest.fixture(scope="session")
def full_roles(make_tiny_roles: Callable[..., Roles]) -> Roles:
    """Full fine-tuning."""
    return make_tiny_roles(lora__rank=0)


def of_few_tokens(arch: Arch, most: int) -> Arch:
    """The same architecture with the same numbers, if it cannot be run on more than `most` tokens."""
    factors = (1.0,) * (arch.head_dim // 2)
    return dataclasses.replace(arch, rope_scaling=LongRope(factors, factors, 1.0, most))


def perturbed(tree: Any, seed: int, scale: float = 0.05) -> Any:
    """A parameter tree with noise on every array, so that fresh adapters do something."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray(np.asarray(x) + scale * rng.standard_normal(x.shape).astype(np.float32)), tree
    )


def drawn_params(weights: Any, seed: int) -> Any:
    """Random parameters for a tree of declared weights, without compiling anything. Norms are not all ones."""
    rng = np.random.default_rng(seed)

    def draw(weight: Weight) -> jax.Array:
        noise = rng.standard_normal(weight.shape)
        return jnp.asarray(noise * weight.fan_in**-0.5 if weight.fan_in else 1 + 0.2 * noise, jnp.float32)

    return jax.tree.map(draw, weights, is_leaf=lambda node: isinstance(node, Weight))


def vectors(count: int, width: int, seed: int = 0) -> np.ndarray:
    """Activations [count, width] float32 that share a mean direction, as a residual stream's do."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((count, width)) + 0.7 * np.sign(np.arange(width) - 9.5)).astype(np.float32)
