"""Every matrix product of every step says how exact it is, lowered for the accelerators that this machine has not."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nlae_jax.lm import transformer
from nlae_jax.lm.attention import attend
from nlae_jax.lm.lora import merge
from nlae_jax.lm.products import einsum, precision_of
from nlae_jax.lm.segments import KeyValues
from nlae_jax.mesh import AXES
from nlae_jax.plan.abstract import STEPS, make_planned, programs
from nlae_jax.roles.language_model import LanguageModel
from nlae_jax.roles.pair import Pair
from nlae_jax.roles.roundtrip import RoundTrip
from nlae_jax.train.state import init_decoder, init_encoder
from tests.conftest import slow_but, tiny_config

HIGHEST = jax.lax.Precision.HIGHEST
PLATFORMS = {"cuda": "gpu", "tpu": "tpu"}  # as jax lowers for them, and as devices call theirs


def test_float32_is_float32():
    exact, narrow = jnp.ones((2, 2)), jnp.ones((2, 2), jnp.bfloat16)
    assert precision_of(exact, exact) == precision_of(exact, narrow) == HIGHEST
    assert precision_of(narrow, narrow) is None
    with jax.default_matmul_precision("bfloat16"):  # whatever the caller's own default is
        traced = jax.make_jaxpr(jax.grad(lambda a: einsum("ij,jk->ik", a, exact).sum()))(exact)
    assert str(traced).count("Precision.HIGHEST") >= 2
    assert einsum("ij,jk->ik", narrow, narrow, jnp.float32).dtype == jnp.float32
    assert einsum("ij,jk->ik", narrow, narrow).dtype == jnp.bfloat16


def products(function: Any, arguments: tuple[Any, ...], platform: str) -> set[tuple[str, str, str]]:
    """(dtypes of the operands, precision) of a jitted function's matrix products, lowered for a platform."""
    text = function.trace(*arguments).lower(lowering_platforms=(platform,)).as_text()
    assert "stablehlo.convolution" not in text
    found = re.findall(r"stablehlo\.dot_general .*", text)
    assert len(found) > 4
    return {_product(line) for line in found}


def _product(line: str) -> tuple[str, str, str]:
    left, right = re.search(r": \(tensor<(?:\d+x)*(\w+)>, tensor<(?:\d+x)*(\w+)>\)", line).groups()
    precision = re.search(r"precision = \[(\w+), \w+\]", line)
    return left, right, precision.group(1) if precision else "DEFAULT"


EXACT, NARROW = ("f32", "f32", "HIGHEST"), ("bf16", "bf16", "DEFAULT")


def every_program(sizes: tuple[int, int, int], **settings: Any) -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
    """What every stage compiles, from shapes: name, jitted function, arguments."""
    mesh = {f"mesh__{axis}": size for axis, size in zip(AXES, sizes, strict=True)}
    planned = make_planned(tiny_config(sft__batch_size=8, **mesh, **settings), jax.devices())
    for step in STEPS:
        for program in programs(planned, step):
            yield f"{step} {program.name}", program.function, program.arguments


@pytest.mark.parametrize(
    ("platform", "sizes", "settings"),
    [
        ("cuda", (1, 8, 1), {"lora__rank": 0, "subject__dtype": "bfloat16", "rl__kl_coef": 0.0}),
        ("tpu", (2, 2, 2), {"lora__rank": 4}),
        *slow_but(
            [],
            [
                ("cuda", (1, 1, 1), {"lora__rank": 4}),
                ("cuda", (1, 1, 1), {"lora__rank": 4, "subject__dtype": "bfloat16", "remat": "dots"}),
                ("cuda", (2, 2, 2), {"lora__rank": 0, "rl__fused": False, "rl__contrastive": 0.5}),
            ],
        ),
    ],
    ids=str,
)
def test_every_step_lowers_and_its_products_are_exact(platform, sizes, settings, monkeypatch):
    """What is float32 is multiplied as float32; in a bfloat16 run that is the decoder's head alone."""
    monkeypatch.setattr(transformer, "platform_of", lambda x: PLATFORMS[platform])
    names = []
    for name, function, arguments in every_program(sizes, **settings):
        found = products(function, arguments, platform)
        if "subject__dtype" not in settings:
            assert found == {EXACT}, name
        else:
            assert found in ({NARROW}, {NARROW, EXACT}), name
            assert (EXACT in found) == (name in ("decoder_sft step", "rl step")), name
        names.append(name)
    rl = ["rl rollout", "rl train_decoder", "rl train_encoder"] if "rl__fused" in settings else ["rl step"]
    assert names == ["extract read", "encoder_sft step", "decoder_sft step", *rl]


@pytest.mark.parametrize(("dtype", "exact"), [(jnp.float32, True), (jnp.bfloat16, False)])
def test_the_fused_kernel_s_products_are_as_exact(dtype, exact):
    """Its two forward and five backward ones."""
    k = jnp.ones((2, 3, 5, 16), dtype)
    keys = KeyValues(k, k, jnp.arange(15).reshape(3, 5), jnp.ones((3, 5), bool))

    def total(q, k, v):
        out = attend(q, keys.positions, [keys._replace(k=k, v=v)], implementation="pallas")
        return out.astype(jnp.float32).sum()

    traced = str(jax.make_jaxpr(jax.grad(total, argnums=(0, 1, 2)))(jnp.ones((3, 5, 4, 16), dtype), k, k))
    assert "pallas_call" in traced
    kernels = re.findall(r"dot_general\[(.*?)\]\n? ", traced, re.DOTALL)
    assert len(kernels) >= 7
    assert all(("Precision.HIGHEST" in kernel) == exact for kernel in kernels)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_notebooks_compute_as_exactly(platform, tiny_lm, lora_roles, tokenizer, params, monkeypatch):
    """Logits, residual streams, generation, explanations, reconstructions, adapters merged for export."""
    monkeypatch.setattr(transformer, "platform_of", lambda x: PLATFORMS[platform])
    lm = LanguageModel(tiny_lm.arch, params, tokenizer)
    ids, mask = jnp.ones((2, 8), jnp.int32), jnp.ones((2, 8), bool)
    key = jax.random.PRNGKey(0)
    pair = Pair(params, init_encoder(lora_roles, params, key), init_decoder(lora_roles, params, key))
    trip = RoundTrip(lora_roles, tokenizer, 2, 12)
    calls = [
        (lm._logits, (params, ids, mask)),
        (lm._residual, (params, ids, mask, 1)),
        (lm._generate, (params, ids, mask, key, 4, 1.0)),
        (trip._explain, (pair, jnp.ones((2, lm.arch.d_model)), key, 0.0, 12)),
        (trip._reconstruct, (pair, ids, jnp.full(2, 8), trip._endings)),
        (trip._reconstruct_prompts, (pair, ids, mask)),
    ]
    for function, arguments in calls:
        assert products(function, arguments, platform) == {EXACT}
    adapter = {"a": np.ones((2, 4, 8), np.float32), "b": np.ones((2, 4, 6), np.float32)}
    assert "HIGHEST" in str(jax.make_jaxpr(lambda w: merge(w, adapter, 1.0))(np.ones((2, 8, 6), np.float32)))
