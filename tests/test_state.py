"""What training carries: float32 masters beside a bfloat16 model, and moments in few bits."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nlae_jax.config import MeshConfig
from nlae_jax.mesh import make_mesh
from nlae_jax.roles import direction
from nlae_jax.train.checkpoint import Checkpoints, restore_part
from nlae_jax.train.state import (
    abstract_params,
    abstract_role,
    init_decoder,
    init_encoder,
    init_role,
    kept_in,
    make_optimizer,
)
from nlae_jax.train.steps import decoder_sft_step, encoder_sft_step
from tests.conftest import drawn_params, perturbed, tiny_config, vectors

BATCH, WIDTH = 4, 8


@pytest.fixture(scope="module")
def case(make_tiny_roles, params):
    """Full fine-tuning: roles by dtype, parameters of both, what is frozen, a batch of either."""
    roles = {dtype: make_tiny_roles(lora__rank=0, subject__dtype=dtype) for dtype in ("float32", "bfloat16")}
    one, rng = roles["float32"], np.random.default_rng(0)
    h, ids = vectors(BATCH, 64), rng.integers(3, 300, (BATCH, WIDTH)).astype(np.int32)
    trained = {
        "encoder": perturbed(init_encoder(one, params, jax.random.PRNGKey(0)), 0, 0.02),
        "decoder": perturbed(init_decoder(one, params, jax.random.PRNGKey(0)), 1, 0.02),
    }
    frozen = {"base": {}, "baselines": direction.baselines(jnp.asarray(vectors(32, 64, 1)))}
    batch = {"h": h, "length": np.array([8, 3, 5, 8])}
    return roles, trained, frozen, {"encoder": {**batch, "response": ids}, "decoder": {**batch, "ids": ids}}


def step_of(roles, role, optimizer):
    return {"encoder": encoder_sft_step, "decoder": decoder_sft_step}[role](roles, optimizer)


def dots(jaxpr):
    """Operand dtypes and output dtype of every matrix product, inner programs included."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield [v.aval for v in equation.invars], equation.outvars[0].aval
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                if hasattr(inner := getattr(inner, "jaxpr", inner), "eqns"):
                    yield from dots(inner)


@pytest.mark.parametrize("role", ["encoder", "decoder"])
def test_masters_are_float32_and_the_model_computes_in_bfloat16(case, role):
    roles, trained, frozen, batch = case
    optimizer, losses = make_optimizer(tiny_config(), 1e-2), {}
    for dtype, one in roles.items():
        state = init_role(make_mesh(MeshConfig()), getattr(one, f"{role}_weights")(), trained[role], optimizer)
        step = jax.jit(step_of(one, role, optimizer))
        for _ in range(4):
            state, metrics = step(state, frozen, batch[role])
            losses.setdefault(dtype, []).append(float(metrics["loss"]))
        floating = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
        assert {x.dtype for x in floating} == {jnp.dtype("float32")}
        assert metrics["loss"].dtype == jnp.float32 and metrics["skipped_updates"] == 0
    full, half = losses["float32"], losses["bfloat16"]
    assert full[-1] < 0.9 * full[0]
    assert full != half
    np.testing.assert_allclose(half, full, rtol=0.03)  # 2^-8 in every activation


def test_products_with_weights_are_bfloat16_and_logits_float32(case):
    roles, trained, _, batch = case
    one, h, ids = roles["bfloat16"], batch["encoder"]["h"], batch["decoder"]["ids"]

    def write(trained):
        return one.encoder.apply(one.encoder_variables({}, trained), h, ids[:, None], method="log_probs")

    def read(trained):
        return one.decoder.apply(one.decoder_variables({}, trained), ids, batch["decoder"]["length"])

    written = list(dots(jax.make_jaxpr(write)(trained["encoder"]).jaxpr))
    assert {operand.dtype for operands, _ in written for operand in operands} == {jnp.dtype("bfloat16")}
    logits = [out.dtype for _, out in written if out.shape[-1] == one.encoder.arch.vocab_size]
    assert logits == [jnp.float32]
    assert {x.dtype for x in jax.eval_shape(write, trained["encoder"])} == {jnp.dtype("float32")}
    *others, head = dots(jax.make_jaxpr(read)(trained["decoder"]).jaxpr)
    assert {operand.dtype for operands, _ in others for operand in operands} == {jnp.dtype("bfloat16")}
    assert {operand.dtype for operand in head[0]} == {jnp.dtype("float32")}


def test_float32_is_not_converted(case):
    roles, trained, _, _ = case
    variables = roles["float32"].decoder_variables({}, trained["decoder"])
    same = jax.tree.map(lambda ours, given: ours is given, variables["params"]["lm"], trained["decoder"]["lm"])
    assert all(jax.tree.leaves(same))
    assert "convert" not in str(jax.make_jaxpr(lambda t: roles["float32"].encoder_variables({}, t))(trained["encoder"]))


def test_an_update_too_small_for_bfloat16_is_not_lost(case):
    roles, trained, frozen, batch = case
    one, optimizer = roles["bfloat16"], optax.sign_sgd(1e-5)
    state = init_role(make_mesh(MeshConfig()), one.encoder_weights(), trained["encoder"], optimizer)
    before = np.array(state.trained["lm"]["blocks"]["gate"])
    step = jax.jit(encoder_sft_step(one, optimizer))
    for _ in range(3):
        state, _ = step(state, frozen, batch["encoder"])
    moved = np.abs(np.asarray(state.trained["lm"]["blocks"]["gate"]) - before)
    assert (moved > 0.9e-5).mean() > 0.5
    assert moved.max() < 3.2e-5


def test_the_reference_of_a_bfloat16_model_is_bfloat16_and_computes_the_same(case, lora_roles, arch):
    roles, trained, _, _ = case
    for dtype, one in roles.items():
        reference = one.reference(trained["encoder"])
        assert {x.dtype for x in jax.tree.leaves(reference)} == {jnp.dtype(dtype)}
        given, kept = (one.encoder_variables({}, t) for t in (trained["encoder"], reference))
        jax.tree.map(np.testing.assert_array_equal, kept, given)
        for copied, own in zip(jax.tree.leaves(reference), jax.tree.leaves(trained["encoder"]), strict=True):
            assert copied.unsafe_buffer_pointer() != own.unsafe_buffer_pointer()
    adapters = drawn_params(lora_roles.encoder_weights(), 0)
    jax.tree.map(np.testing.assert_array_equal, lora_roles.reference(adapters), adapters)


# --- moments in few bits


def gradients(seed, steps):
    rng = np.random.default_rng(seed)
    scale = np.exp(rng.standard_normal(500))
    return [{"w": jnp.asarray(scale * rng.standard_normal(500), jnp.float32)} for _ in range(steps)]


def run(optimizer, drawn, params):
    state = optimizer.init(params)
    for gradient in drawn:
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def test_moments_in_bfloat16_step_almost_the_same():
    adamw, params = optax.adamw(1e-2, b1=0.9, b2=0.95), {"w": jnp.zeros(500)}
    full, _ = run(adamw, gradients(0, 50), params)
    half, state = run(kept_in("bfloat16", adamw), gradients(0, 50), params)
    assert state[0].mu["w"].dtype == state[0].nu["w"].dtype == jnp.bfloat16
    assert half["w"].dtype == jnp.float32
    assert state[0].count.dtype == jnp.int32
    difference = np.abs(half["w"] - full["w"])
    assert 0 < difference.max() < 0.05 * np.abs(full["w"]).max()


@pytest.mark.parametrize("b2", [0.95, 0.98, 0.999])
def test_a_second_moment_in_bfloat16_forgets_only_if_it_forgets_quickly(b2):
    """The reason for the bound on b2: after one large gradient, a slow average never falls again."""
    second, small = {}, {"w": jnp.full(3, 1e-3)}
    for dtype in ("float32", "bfloat16"):
        optimizer = kept_in(dtype, optax.adam(1e-2, b2=b2))
        _, state = run(optimizer, [{"w": jnp.ones(3)}], {"w": jnp.zeros(3)})
        state = jax.lax.fori_loop(0, 600, lambda _, state, o=optimizer: o.update(small, state)[1], state)
        second[dtype] = float(state[0].nu["w"][0])
    if b2 < 0.99:
        assert second["float32"] == pytest.approx(1e-6, rel=0.15)
        assert second["bfloat16"] == pytest.approx(1e-6, rel=0.3)
    else:
        assert second["float32"] == pytest.approx((1 - b2) * b2**600, rel=0.01)
        assert second["bfloat16"] == pytest.approx(1 - b2, rel=0.01)


def test_float32_moments_are_plain_adamw():
    config, params = tiny_config(), {"w": jnp.ones(500)}
    plain = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2, b1=0.9, b2=0.95, weight_decay=0.0))
    ours, theirs = (run(o, gradients(0, 3), params) for o in (make_optimizer(config, 1e-2), plain))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_bfloat16_moments_are_split_as_parameters_and_resume_bit_for_bit(lora_roles, tmp_path):
    """Saved, restored onto the same mesh and stepped on: equal to never having stopped."""
    config = tiny_config(optimizer__moment_dtype="bfloat16")
    mesh, optimizer = make_mesh(MeshConfig(2, 2, 2)), make_optimizer(config, 1e-2)
    weights = lora_roles.encoder_weights()
    make = lambda: init_role(mesh, weights, drawn_params(weights, 0), optimizer)  # noqa: E731
    state = make()
    moments = state.opt_state[1][0]
    for tree in (moments.mu, moments.nu):
        jax.tree.map(lambda m, w: np.testing.assert_equal(m.sharding, w.sharding), tree, state.trained)
        assert {m.dtype for m in jax.tree.leaves(tree)} == {jnp.dtype("bfloat16")}

    @jax.jit
    def step(state, seed):
        gradient = jax.tree.map(lambda w: jnp.sin(w * seed), state.trained)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.trained)
        return state._replace(trained=optax.apply_updates(state.trained, updates), opt_state=opt_state)

    for seed in (1.0, 2.0):
        state = step(state, seed)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(2, state, {})
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        _, restored, _ = checkpoints.restore(make())
    jax.tree.map(lambda a, b: np.testing.assert_equal(a.dtype, b.dtype), restored, state)
    jax.tree.map(np.testing.assert_array_equal, step(restored, 3.0), step(state, 3.0))
    trained = restore_part(tmp_path / "2", {"trained": abstract_params(mesh, weights)})["trained"]
    jax.tree.map(np.testing.assert_array_equal, trained, state.trained)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_abstract_role_is_that_which_init_role_makes(lora_roles, dtype):
    mesh, optimizer = make_mesh(MeshConfig(2, 2, 2)), make_optimizer(tiny_config(optimizer__moment_dtype=dtype), 1e-2)
    weights = lora_roles.decoder_weights()
    abstract, made = (
        abstract_role(mesh, weights, optimizer),
        init_role(mesh, weights, drawn_params(weights, 0), optimizer),
    )
    of = lambda x: (x.shape, x.dtype, x.sharding.spec)  # noqa: E731
    assert jax.tree.map(of, abstract) == jax.tree.map(of, made)
    assert {x.sharding.mesh for x in jax.tree.leaves(abstract)} == {mesh}
