"""The training steps on the tiny model: one device and eight, fused and split, LoRA and full fine-tuning."""

import dataclasses
import functools
import itertools
import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nlae_jax.config import Config, MeshConfig
from nlae_jax.lm import transformer
from nlae_jax.lm.arch import Arch, DeltaNet, Experts, model_weights
from nlae_jax.lm.sampling import Samples
from nlae_jax.mesh import batch_sharding, make_mesh, place, replicated, tree_shardings
from nlae_jax.roles import direction
from nlae_jax.roles.pair import Roles, make_roles
from nlae_jax.roles.protocol import blank_tokens, response_ids
from nlae_jax.roles.rollout import rollout
from nlae_jax.roles.views import no_marks
from nlae_jax.train import objectives
from nlae_jax.train.loop import compiled, put_batch
from nlae_jax.train.state import (
    RlState,
    RoleState,
    abstract_params,
    init_decoder,
    init_encoder,
    init_role,
    make_optimizer,
    sft_schedule,
)
from nlae_jax.train.steps import (
    OBSERVED,
    SplitStep,
    decoder_sft_step,
    encoder_sft_step,
    rl_step,
)
from nlae_jax.train.updates import apply_update, in_microbatches
from tests.conftest import drawn_params, perturbed, slow_but, tiny_config, vectors

ONE, MESHES = (1, 1, 1), [(1, 8, 1), (2, 2, 2), (1, 2, 4), (8, 1, 1)]
BATCH, GROUP, RESPONSE = 8, 2, 8


def host(tree: Any) -> Any:
    """A copy that no step can give away."""
    return jax.tree.map(lambda x: np.array(x), tree)


def assert_equal_trees(ours: Any, theirs: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, host(ours), host(theirs))


def on_mesh(mesh: Any, roles: Roles, params: Any) -> Any:
    """The subject's weights where training has them."""
    return place(params, tree_shardings(mesh, model_weights(roles.encoder.arch)))


class Setting(NamedTuple):
    """A random model that closes some of its explanations, its roles, and what their training starts from."""

    config: Config
    roles: Roles
    params: Any
    encoder: Any
    decoder: Any
    blank: np.ndarray


@pytest.fixture(scope="module")
def settings(arch, protocol, tokenizer):
    """By LoRA rank. The closing tag is one token, which a large embedding makes likely in some contexts."""
    protocol = dataclasses.replace(protocol, closing=protocol.closing[:1])
    params = drawn_params(model_weights(arch), 0)
    params["embed"] = params["embed"].at[protocol.closing[0]].multiply(4.0)
    blank = blank_tokens(tokenizer, arch.vocab_size)
    made = {}
    for rank in (4, 0):
        config = tiny_config(
            lora__rank=rank,
            remat="none",
            rl__activations_per_step=BATCH,
            rl__samples_per_activation=GROUP,
            rl__max_new_tokens=RESPONSE,
            rl__kl_coef=0.1,
        )
        roles = make_roles(config, arch, protocol)
        encoder = perturbed(init_encoder(roles, params, jax.random.PRNGKey(1)), 1, 0.03)
        decoder = perturbed(init_decoder(roles, params, jax.random.PRNGKey(2)), 2)
        made[rank] = Setting(config, roles, params, encoder, decoder, blank)
    return made


class Start(NamedTuple):
    mesh: Any
    state: RlState
    frozen: Any
    batch: Any


def start(setting: Setting, sizes: tuple[int, int, int]) -> Start:
    """Everything an RL step takes, on a mesh, as the RL stage puts it there."""
    mesh, roles = make_mesh(MeshConfig(*sizes)), setting.roles
    optimizer = make_optimizer(setting.config, 1e-3)
    h = vectors(BATCH, roles.encoder.arch.d_model)
    encoder = init_role(mesh, roles.encoder_weights(), host(setting.encoder), optimizer)
    decoder = init_role(mesh, roles.decoder_weights(), host(setting.decoder), optimizer)
    constant = {"baselines": direction.baselines(vectors(64, h.shape[1], 1)), "blank": setting.blank}
    frozen = {
        "base": on_mesh(mesh, roles, host(setting.params)) if roles.rank else {},
        **jax.device_put(constant, replicated(mesh)),
    }
    if setting.config.rl.kl_coef:
        frozen["reference"] = jax.tree.map(jnp.copy, encoder.trained)
    key = jax.device_put(jax.random.PRNGKey(3), replicated(mesh))
    return Start(mesh, RlState(encoder, decoder, key), frozen, put_batch({"h": h}, mesh))


def rl_parts(setting: Setting, optimizer: optax.GradientTransformation | None = None) -> Any:
    optimizer = optimizer or make_optimizer(setting.config, 1e-3)
    return rl_step(setting.roles, setting.config, optimizer, optimizer)


def keeping_gradients() -> optax.GradientTransformation:
    """Changes nothing: its state is the last gradient."""
    return optax.GradientTransformation(optax.tree.zeros_like, lambda g, state, params: (optax.tree.zeros_like(g), g))


class Outcome(NamedTuple):
    """Of some steps: the metrics of each, the last state on the host, the step, and what it started from."""

    metrics: list[dict[str, np.ndarray]]
    state: RlState
    step: Any
    begun: Start


def train(setting: Setting, sizes: tuple[int, int, int], fused: bool = True, num_steps: int = 2) -> Outcome:
    """Runs some steps. Whatever is frozen must be as it was after them."""
    begun = start(setting, sizes)
    frozen_before = host(begun.frozen)
    parts = rl_parts(setting)
    if fused:
        step: Any = compiled(parts.step, begun.state, begun.mesh)
    else:
        decoder = compiled(parts.train_decoder, begun.state.decoder, begun.mesh)
        step = SplitStep(parts, decoder, compiled(parts.train_encoder, begun.state.encoder, begun.mesh))
    state, metrics = begun.state, []
    for _ in range(num_steps):
        with jax.transfer_guard("disallow"):
            state, row = step(state, begun.frozen, begun.batch)
        metrics.append(jax.device_get(row))
    assert_equal_trees(begun.frozen, frozen_before)
    assert step._cache_size() == 1
    return Outcome(metrics, host(state), step, begun)


@pytest.fixture(scope="module")
def trained(settings):
    """By rank and mesh: the outcome of the fused step, which several tests compare with."""
    return functools.cache(lambda rank, sizes: train(settings[rank], sizes))


@pytest.fixture(scope="module")
def alone(trained):
    """By rank: the outcome on one device."""
    return functools.partial(trained, sizes=ONE)


def assert_metrics_close(ours, theirs, tolerance):
    assert [row.keys() for row in ours] == [row.keys() for row in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        if OBSERVED in other:
            assert_equal_trees(mine[OBSERVED], other[OBSERVED])
        for name in other.keys() - {OBSERVED}:
            # Differences of log-probs are rounding errors themselves.
            bound = 1e-5 if name == "logp_gap" else tolerance * max(1.0, abs(other[name]))
            assert abs(mine[name] - other[name]) <= bound, name


@pytest.mark.parametrize("rank", [4, 0])
def test_the_first_step_is_on_policy_and_at_the_reference(rank, alone):
    first, second = alone(rank).metrics
    assert 0 < first["logp_gap"] < 1e-5
    assert 0 <= first["kl"] < 1e-9
    assert second["logp_gap"] < 1e-5
    assert second["kl"] > 1e-6
    assert first["grad_norm_encoder"] > 1e-3 and first["grad_norm_decoder"] > 1e-3
    assert first["skipped_updates"] == 0
    # The model writes all kinds of responses, so that every branch is taken.
    assert 0.2 < first["extraction_rate"] < 0.9
    assert 0 < first["truncated_rate"] < 1 - first["extraction_rate"] + 1e-6
    assert first["zero_variance_groups"] < BATCH
    assert 0 < first["entropy"] < np.log(400)
    assert -4 < first["reward_mean"] < 0 < first["reward_std"]


@pytest.mark.parametrize(
    ("rank", "sizes"), slow_but([(4, (2, 2, 2)), (0, (1, 8, 1))], itertools.product((4, 0), MESHES))
)
def test_eight_devices_are_one_device(rank, sizes, trained, alone):
    assert_metrics_close(trained(rank, sizes).metrics, alone(rank).metrics, 1e-4)


def exchanges(arch, protocol, sizes, inside="decode/while/body") -> list[tuple[str, int]]:
    """Kind and numbers of every exchange between devices inside a rollout's decode loop, compiled from shapes."""
    mesh, config = make_mesh(MeshConfig(*sizes)), tiny_config()
    roles = make_roles(config, arch, protocol)
    weights = {"trained": roles.encoder_weights(), "base": model_weights(arch)}
    given = {name: abstract_params(mesh, declared) for name, declared in weights.items()}
    h = jax.ShapeDtypeStruct((BATCH, arch.d_model), jnp.float32, sharding=batch_sharding(mesh))
    key = jax.ShapeDtypeStruct((2,), jnp.uint32, sharding=replicated(mesh))

    @jax.jit
    def run(trained, base, h, key):
        return rollout(roles, trained, {"base": base}, h, key, samples_per_activation=1, max_new_tokens=RESPONSE)

    program = run.lower(given["trained"], given["base"], h, key).compile()
    results = [
        re.search(r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(-start)?\(", line)
        for line in program.as_text().splitlines()
        if inside in line
    ]
    shapes = [(found[2], re.findall(r"\[([\d,]*)\]", found[1])) for found in results if found]
    return [(kind, sum(math.prod(map(int, filter(None, s.split(",")))) for s in result)) for kind, result in shapes]


def most_exchanged(arch, protocol, sizes) -> int:
    return max(numbers for _, numbers in exchanges(arch, protocol, sizes))


@pytest.mark.parametrize("experts", [None, Experts(count=8, per_token=2)], ids=["dense", "experts"])
@pytest.mark.parametrize("platform", ["tpu", pytest.param("cpu", marks=pytest.mark.slow)])
@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2)])
def test_no_weight_is_moved_inside_the_decode_loop(sizes, platform, experts, protocol, monkeypatch):
    """Every part of a matrix that would have to be gathered is larger than anything that rows exchange.

    Layers are unrolled on a CPU and scanned elsewhere.
    """
    monkeypatch.setattr(transformer, "platform_of", lambda x: platform)
    sizes_of = {"vocab_size": 128, "d_model": 128, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 32}
    arch = Arch(**sizes_of, d_ff=512, tied_head=True, experts=experts)
    smallest = arch.d_model * arch.num_kv_heads * arch.head_dim // sizes[2]
    assert most_exchanged(arch, protocol, sizes) <= BATCH * arch.d_model + BATCH * 4 < smallest
    if sizes == (1, 8, 1) and experts is None:  # weights that stay as training has them are gathered at every token
        monkeypatch.setattr(transformer, "constrained_tree", lambda tree, *_: tree)
        assert most_exchanged(arch, protocol, sizes) >= smallest


@pytest.mark.parametrize("mixers", [(), ("delta", "attention")], ids=["attention", "delta"])
def test_a_block_exchanges_two_sums_while_decoding(mixers, protocol, monkeypatch):
    """And what changes from columns to rows; the residual stream is whole where every matrix reads it."""
    monkeypatch.setattr(transformer, "platform_of", lambda x: "tpu")
    sizes = {"vocab_size": 128, "d_model": 256, "num_layers": 4, "num_heads": 8, "num_kv_heads": 2, "head_dim": 16}
    delta = DeltaNet(key_heads=4, value_heads=8, key_dim=16, value_dim=16) if mixers else None
    arch = Arch(**sizes, d_ff=256, mixers=mixers * 2, delta=delta)
    found = exchanges(arch, protocol, (1, 8, 1), "ed_decode/while/body")
    streams = [kind for kind, numbers in found if numbers >= BATCH * arch.d_model]
    assert streams == ["all-reduce"] * 2 * max(1, len(mixers))


@pytest.mark.slow
@pytest.mark.parametrize(("batch", "adapted"), [(8, False), (5, True)])
def test_experts_on_eight_devices_write_what_they_write_on_one(batch, adapted, protocol, monkeypatch):
    """Prompts, which are a segment without rows and one with, and the decode loop; rows that no axis divides, too."""
    monkeypatch.setattr(transformer, "platform_of", lambda x: "tpu")
    sizes = {"vocab_size": 128, "d_model": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
    biases = ("router", "gate", "up", "down")
    arch = Arch(**sizes, d_ff=16, experts=Experts(count=8, per_token=2, normalised=True), biases=biases)
    roles = make_roles(tiny_config(lora__experts=adapted), arch, dataclasses.replace(protocol, closing=()))
    params = drawn_params(model_weights(arch), 0)
    trained = perturbed(init_encoder(roles, params, jax.random.PRNGKey(1)), 1, 0.1)
    h, key = vectors(batch, arch.d_model), jax.random.PRNGKey(3)

    @jax.jit
    def run(trained, base, h, key):
        return rollout(roles, trained, {"base": base}, h, key, samples_per_activation=2, max_new_tokens=RESPONSE)

    expected = run(trained, params, h, key)
    mesh = make_mesh(MeshConfig(2, 2, 2))
    trained = place(trained, tree_shardings(mesh, roles.encoder_weights()))
    h, key = jax.device_put((h, key), replicated(mesh))
    found = run(trained, on_mesh(mesh, roles, params), h, key)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_allclose(found.log_probs, expected.log_probs, atol=1e-4)


def test_logits_go_to_their_rows_in_parts(protocol, monkeypatch):
    """The head is split over two axes, rows over one: no device gets all rows' logits in between."""
    monkeypatch.setattr(transformer, "platform_of", lambda x: "tpu")
    sizes = {"vocab_size": 4096, "d_model": 64, "num_layers": 2, "num_heads": 8, "num_kv_heads": 2, "head_dim": 8}
    assert most_exchanged(Arch(**sizes, d_ff=64), protocol, (1, 4, 2)) < BATCH * 4096


@pytest.mark.slow
@pytest.mark.parametrize("sizes", MESHES)
@pytest.mark.parametrize("rank", [4, 0])
def test_warm_starts_on_eight_devices_are_one_device(rank, sizes, settings):
    setting, rng = settings[rank], np.random.default_rng(0)
    optimizer = make_optimizer(setting.config, 1e-3)
    batch = {"h": vectors(BATCH, 64), "length": np.array([0, 9, 1, 3, 5, 0, 7, 2])}
    tokens = rng.integers(3, 300, (BATCH, 9)).astype(np.int32)
    for role, name, make_step in (("encoder", "response", encoder_sft_step), ("decoder", "ids", decoder_sft_step)):
        metrics = []
        for mesh_sizes in (sizes, ONE):
            begun = start(setting, mesh_sizes)
            state = getattr(begun.state, role)
            step: Any = compiled(make_step(setting.roles, optimizer), state, begun.mesh)
            rows = []
            for _ in range(3):
                state, row = step(state, begun.frozen, put_batch({**batch, name: tokens}, begun.mesh))
                rows.append(jax.device_get(row))
            metrics.append(rows)
        assert metrics[1][2]["loss"] != metrics[1][0]["loss"]
        assert_metrics_close(*metrics, 1e-4)


def test_both_roles_learn(settings, alone):
    state = alone(4).state
    for role, before in ((state.encoder, settings[4].encoder), (state.decoder, settings[4].decoder)):
        assert role.step == 2
        moved = jax.tree.map(lambda new, old: np.abs(new - np.asarray(old)).max(), role.trained, before)
        assert all(0 < change < 3e-3 for change in jax.tree.leaves(moved))
    assert_equal_trees(state.key, jax.random.PRNGKey(3))


@pytest.fixture(scope="module")
def split(settings):
    """Three compiled parts, over eight devices."""
    return train(settings[4], (2, 2, 2), fused=False)


def test_fused_is_split(split, trained):
    fused = trained(4, (2, 2, 2))
    assert_metrics_close(split.metrics, fused.metrics, 1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), split.state, fused.state)


def with_kl(setting: Setting, kl_coef: float) -> Setting:
    rl = dataclasses.replace(setting.config.rl, kl_coef=kl_coef)
    return setting._replace(config=dataclasses.replace(setting.config, rl=rl))


@pytest.fixture(scope="module")
def of_no_weight(settings):
    """By rank: the outcome with a KL term whose weight changes no sum."""
    return functools.cache(lambda rank: train(with_kl(settings[rank], 1e-30), ONE))


@pytest.mark.parametrize(("rank", "fused"), slow_but([(4, True)], itertools.product((4, 0), (True, False))))
def test_without_a_kl_term_there_is_no_reference(rank, fused, settings, of_no_weight):
    """None is held; either step computes what one with a term of no weight does, without `kl` among the metrics."""
    ours, theirs = train(with_kl(settings[rank], 0.0), ONE, fused), of_no_weight(rank)
    assert "reference" not in ours.begun.frozen
    assert all(row["kl"] >= 0 for row in theirs.metrics)
    without = [{name: value for name, value in row.items() if name != "kl"} for row in theirs.metrics]
    assert_metrics_close(ours.metrics, without, 1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), ours.state, theirs.state)


def test_without_a_kl_term_no_reference_is_computed(settings):
    """A forward pass less, of the four that a policy gradient of adapters takes with it, beside rollout and scoring."""

    def flops(setting):
        begun, parts = start(setting, ONE), rl_parts(setting)
        samples = jax.eval_shape(parts.rollout, begun.state, begun.frozen, begun.batch)
        scores, metrics = jax.eval_shape(parts.train_decoder, begun.state.decoder, begun.frozen, begun.batch, samples)[
            1
        ]
        given = begun.state.encoder, begun.frozen, begun.batch, samples, scores, metrics
        return jax.jit(parts.train_encoder).lower(*given).compile().cost_analysis()["flops"]

    assert flops(with_kl(settings[4], 0.0)) < 0.85 * flops(with_kl(settings[4], 0.1))


def test_a_failed_extraction_earns_minus_two_and_is_trained_on(split, settings):
    """One group with a readable and an unreadable response; in all others both are unreadable and equal."""
    setting, begun = settings[4], start(settings[4], (2, 2, 2))
    rollout, train_decoder, train_encoder = split.step.parts
    drawn = rollout(begun.state, begun.frozen, begun.batch)
    closing = setting.roles.encoder.protocol.closing[0]
    tokens = np.full((BATCH, GROUP, RESPONSE), 40, np.int32)
    lengths, closed = np.full((BATCH, GROUP), RESPONSE), np.zeros((BATCH, GROUP), bool)
    tokens[0, 0], lengths[0, 0], closed[0, 0] = [50, 51, 52, closing] + [0] * (RESPONSE - 4), 4, True
    samples = drawn._replace(tokens=tokens, lengths=lengths.astype(np.int32), closed=closed)
    samples = jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), samples, drawn)

    log_probs = jax.jit(
        lambda trained: setting.roles.encoder.apply(
            setting.roles.encoder_variables(begun.frozen["base"], trained), begun.batch["h"], tokens, method="log_probs"
        )[0]
    )
    before = np.asarray(log_probs(begun.state.encoder.trained))
    _, (scores, metrics) = train_decoder(begun.state.decoder, begun.frozen, begun.batch, samples)
    mse, length = np.asarray(scores.mse), np.asarray(scores.length)
    assert length.ravel().tolist() == [3] + [0] * 15
    assert (mse.ravel()[1:] == objectives.FAILED_MSE).all() and mse[0, 0] != objectives.FAILED_MSE
    encoder, metrics = train_encoder(begun.state.encoder, begun.frozen, begun.batch, samples, scores, metrics)
    assert split.step._cache_size() == 1
    assert abs(metrics["reward_mean"] - (-min(mse[0, 0], 2) - 2 * 15) / 16) < 1e-5
    assert metrics["zero_variance_groups"] == 7
    assert metrics["extraction_rate"] == 1 / 16
    assert metrics["truncated_rate"] == 15 / 16
    assert_equal_trees(metrics[OBSERVED], {"tokens": tokens, "lengths": lengths})  # for whoever reads the words
    gained = (np.asarray(log_probs(encoder.trained)) - before)[0]
    sign = np.sign(objectives.FAILED_MSE - mse[0, 0])
    assert sign * gained[0, :4].sum() > 1e-4  # the better response becomes likelier
    assert sign * gained[1].sum() < -1e-4  # and the worse one less so, readable or not


@pytest.mark.parametrize("temperature", [0.5, pytest.param(2.0, marks=pytest.mark.slow)])
def test_a_step_at_a_temperature_is_on_policy_there(settings, alone, temperature):
    config = settings[4].config
    config = dataclasses.replace(config, rl=dataclasses.replace(config.rl, temperature=temperature))
    metrics = train(settings[4]._replace(config=config), ONE).metrics
    assert all(0 < row["logp_gap"] < 1e-5 for row in metrics)
    assert 0 <= metrics[0]["kl"] < 1e-9
    assert bool(metrics[0]["entropy"] < alone(4).metrics[0]["entropy"]) == (temperature < 1)


def test_repetitions_and_open_quotations_cost_reward(settings):
    """With tables in which token 50 is a quotation mark, 51 a quoted word, 53 another word and 54 a comma."""
    config = settings[4].config
    charged = dataclasses.replace(config, rl=dataclasses.replace(config.rl, repeat_penalty=0.5))
    setting = settings[4]._replace(config=charged)
    begun, parts = start(setting, ONE), rl_parts(setting)
    vocab_size, closing = setting.roles.encoder.arch.vocab_size, setting.roles.encoder.protocol.closing[0]
    tables = no_marks(vocab_size)
    tables.quotes[50], tables.pieces[51, 0], tables.words[53], tables.separates[54] = 1, 7, 8, True
    frozen = begun.frozen | {"marks": tables}
    written = [[52], [50, 51], [50, 51, 50, 50, 51, 50], [50, 51, 50, 50, 51, 50, 50], [53, 54, 53]]
    expected = np.array([0, 1, 1, 2, 1])
    tokens = np.zeros((BATCH, GROUP, RESPONSE), np.int32)
    lengths = np.zeros((BATCH, GROUP), np.int32)
    for row, ids in enumerate(written):
        tokens.reshape(-1, RESPONSE)[row, : len(ids) + 1] = [*ids, closing]
        lengths.reshape(-1)[row] = len(ids) + 1
    samples = Samples(tokens, np.zeros(tokens.shape, np.float32), lengths, lengths > 0)
    _, (scores, metrics) = jax.jit(parts.train_decoder)(begun.state.decoder, frozen, begun.batch, samples)
    assert scores.repeats.ravel().tolist() == [*expected, *[0] * (BATCH * GROUP - len(written))]
    assert (np.asarray(scores.length) > 0).sum() == len(written)
    # The decoder is random, and the lowest reward would hide the charge.
    scores = scores._replace(mse=jnp.full((BATCH, GROUP), 0.25))
    _, metrics = jax.jit(parts.train_encoder)(begun.state.encoder, frozen, begun.batch, samples, scores, metrics)
    reward = np.full(BATCH * GROUP, -objectives.FAILED_MSE)
    reward[: len(written)] = -0.25 - 0.5 * expected
    assert abs(metrics["reward_mean"] - reward.mean()) < 1e-5


def test_an_update_that_is_not_finite_is_skipped_and_counted(settings, alone):
    step, begun = alone(4).step, start(settings[4], ONE)
    poison = {"h": jax.device_put(np.full((BATCH, 64), np.nan, np.float32), batch_sharding(begun.mesh))}
    before = host(begun.state)
    state, metrics = step(begun.state, begun.frozen, poison)
    assert metrics["skipped_updates"] == 2
    assert not np.isfinite(metrics["grad_norm_encoder"]) and not np.isfinite(metrics["grad_norm_decoder"])
    for after, earlier in ((state.encoder, before.encoder), (state.decoder, before.decoder)):
        assert_equal_trees((after.trained, after.opt_state), (earlier.trained, earlier.opt_state))
        assert after.step == earlier.step + 1
    _, metrics = step(state, begun.frozen, begun.batch)
    assert metrics["skipped_updates"] == 0
    assert step._cache_size() == 1


def test_apply_update_keeps_the_optimisers_count_when_it_skips():
    optimizer = optax.adam(optax.linear_schedule(1.0, 0.0, 10))
    trained = {"w": jnp.ones(3)}
    state = RoleState(jnp.int32(0), trained, optimizer.init(trained))
    skipped, norm, count = apply_update(state, {"w": jnp.array([0.0, jnp.inf, 1.0])}, optimizer)
    assert count == 1 and not np.isfinite(norm)
    assert_equal_trees(skipped._replace(step=state.step), state)
    stepped, norm, count = apply_update(skipped, {"w": jnp.array([0.0, 3.0, 4.0])}, optimizer)
    assert (count, norm, stepped.step) == (0, 5, 2)
    np.testing.assert_allclose(stepped.trained["w"], [1, 0, 0], atol=1e-5)


TEXTS = [f"The text is about {a} {b}." for a in ("values", "numbers") for b in ("and lists", "in it", "of arrays", "")]


@pytest.fixture(scope="module")
def descriptions(tokenizer, protocol):
    """Eight activations with a response each: ids [8, R], lengths [8]."""
    rows = [response_ids(tokenizer, protocol, text) for text in TEXTS]
    ids = np.zeros((8, max(map(len, rows)) + 2), np.int32)
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)] = tokens
    return ids, np.array([len(row) for row in rows])


def test_the_encoder_learns_to_write_descriptions(lora_roles, params, descriptions):
    """Eight of them by heart, on eight devices; and tokens after a response's end do not count."""
    mesh, config = make_mesh(MeshConfig(2, 2, 2)), tiny_config()
    optimizer = make_optimizer(config, 3e-2)
    trained = init_encoder(lora_roles, params, jax.random.PRNGKey(0))
    state = init_role(mesh, lora_roles.encoder_weights(), trained, optimizer)
    frozen = {"base": on_mesh(mesh, lora_roles, host(params))}
    step = compiled(encoder_sft_step(lora_roles, optimizer), state, mesh)
    ids, length = descriptions
    h = vectors(8, 64)
    after_the_end = np.arange(ids.shape[1]) >= length[:, None]
    losses = []
    for number in range(50):
        response = np.where(after_the_end, number, ids).astype(np.int32)
        state, metrics = step(state, frozen, put_batch({"h": h, "response": response, "length": length}, mesh))
        losses.append(float(metrics["loss"]))
    assert metrics["tokens"] == length.sum()
    assert 4 < losses[0] < 8  # a random model knows nothing: log 376 = 5.9
    assert losses[-1] < 0.5
    assert step._cache_size() == 1


def test_the_decoder_learns_to_read_descriptions(lora_roles, params, tokenizer):
    mesh, config = make_mesh(MeshConfig()), tiny_config()
    optimizer = make_optimizer(config, 1e-2)
    trained = init_decoder(lora_roles, params, jax.random.PRNGKey(0))
    state = init_role(mesh, lora_roles.decoder_weights(), trained, optimizer)
    h = vectors(8, 64)
    frozen = {
        "base": on_mesh(mesh, lora_roles, host(params)),
        "baselines": jax.device_put(direction.baselines(h), replicated(mesh)),
    }
    step = compiled(decoder_sft_step(lora_roles, optimizer), state, mesh)
    rows = [tokenizer.encode(text, add_special_tokens=False) for text in TEXTS]
    ids, length = np.zeros((8, 24), np.int32), np.array([len(row) for row in rows])
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)] = tokens
    history = []
    for _ in range(40):
        state, metrics = step(state, frozen, put_batch({"h": h, "ids": ids, "length": length}, mesh))
        history.append({name: float(value) for name, value in metrics.items()})
    assert history[0]["loss"] > 1.5  # the identity head knows nothing of these vectors
    assert history[-1]["loss"] < 0.2
    variance, mean_norm = frozen["baselines"]
    for row in history:
        assert abs(row["fve"] - (1 - row["loss"] / variance)) < 1e-4
        assert abs(row["fve_meannorm"] - (1 - row["loss"] / mean_norm)) < 1e-4
    # A row without an explanation carries no loss and no gradient.
    without = put_batch({"h": h, "ids": ids, "length": np.where(np.arange(8) < 4, length, 0)}, mesh)
    _, metrics = step(state, frozen, without)
    assert metrics["loss"] < 0.2
    assert step._cache_size() == 1


def test_the_optimisers_state_is_split_as_its_parameters_are(settings):
    begun = start(settings[4], (2, 2, 2))
    moments = begun.state.encoder.opt_state[1][0]
    for tree in (moments.mu, moments.nu):
        jax.tree.map(
            lambda moment, weight: np.testing.assert_equal(moment.sharding, weight.sharding),
            tree,
            begun.state.encoder.trained,
        )
    parts = {shard.data.shape for shard in begun.frozen["base"]["blocks"]["gate"].addressable_shards}
    assert parts == {(2, 32, 64)}


def test_learning_rates_warm_up_and_fall():
    rates = [float(sft_schedule(1e-3, 100, 0.05)(count)) for count in range(100)]
    np.testing.assert_allclose(rates[:5], np.arange(1, 6) * 2e-4, rtol=1e-6)
    assert all(a > b for a, b in itertools.pairwise(rates[4:]))
    assert 0 < rates[-1] < 1e-6


@pytest.mark.parametrize(("steps", "warmup_fraction"), [(1, 0.05), (1, 1.0), (2, 0.0), (3, 1.0), (7, 0.5)])
def test_no_step_has_a_rate_of_zero(steps, warmup_fraction):
    rates = [float(sft_schedule(1e-3, steps, warmup_fraction)(count)) for count in range(steps)]
    assert min(rates) > 0 and max(rates) == pytest.approx(1e-3)


# --- microbatches


def assert_gradients_close(ours: Any, theirs: Any) -> None:
    """The whole's difference to 2e-6 of its norm; every array's largest to 4e-6 of its largest value."""
    difference = jax.tree.map(np.subtract, host(ours), host(theirs))
    assert optax.tree.norm(difference) <= 2e-6 * optax.tree.norm(theirs)
    for mine, other in zip(jax.tree.leaves(difference), jax.tree.leaves(host(theirs)), strict=True):
        assert np.abs(mine).max() <= 4e-6 * np.abs(other).max()


def in_parts(setting: Setting, microbatches: int) -> Setting:
    rl = dataclasses.replace(setting.config.rl, microbatches=microbatches)
    return setting._replace(config=dataclasses.replace(setting.config, rl=rl))


def gradients_of(setting: Setting, begun: Start, samples: Any, scores: Any = None) -> tuple[Any, Any, Any]:
    """An RL step's gradients of decoder and encoder after some rollout, scores (its own unless given), metrics."""
    parts = rl_parts(setting, keeping_gradients())
    state = begun.state
    decoder, (own, read) = jax.jit(parts.train_decoder)(
        state.decoder._replace(opt_state=state.decoder.trained), begun.frozen, begun.batch, samples
    )
    scores = scores or own
    encoder, metrics = jax.jit(parts.train_encoder)(
        state.encoder._replace(opt_state=state.encoder.trained), begun.frozen, begun.batch, samples, scores, read
    )
    return (decoder.opt_state, encoder.opt_state), own, jax.device_get(metrics)


@pytest.mark.parametrize("rank", [4, pytest.param(0, marks=pytest.mark.slow)])
def test_an_rl_step_in_microbatches_is_the_whole(rank, settings):
    """The second half of the activations has shorter responses: what is divided by must be the whole batch's."""
    setting = settings[rank]
    begun = start(setting, ONE)
    samples = jax.jit(rl_parts(setting).rollout)(begun.state, begun.frozen, begun.batch)
    short = jnp.minimum(samples.lengths, jnp.array([8, 8, 8, 8, 1, 2, 3, 8])[:, None])
    samples = samples._replace(lengths=short, closed=samples.closed & (short == samples.lengths))
    gradients, scores, metrics = gradients_of(setting, begun, samples)
    assert metrics["skipped_updates"] == 0 and 0 < metrics["extraction_rate"] < 1
    for count in (2, 8):
        # The same scores: an advantage divides their rounding errors by the spread of its group.
        parted, parted_scores, parted_metrics = gradients_of(in_parts(setting, count), begun, samples, scores)
        for ours, theirs in zip(parted, gradients, strict=True):
            assert_gradients_close(ours, theirs)
        np.testing.assert_allclose(parted_scores.mse, scores.mse, rtol=1e-6)
        np.testing.assert_array_equal(parted_scores.length, scores.length)
        assert_metrics_close([parted_metrics], [metrics], 1e-6)


@pytest.mark.parametrize("role", ["encoder", "decoder"])
def test_a_warm_start_in_microbatches_is_the_whole(role, settings):
    setting, rng = settings[4], np.random.default_rng(0)
    begun, optimizer = start(setting, ONE), keeping_gradients()
    batch = {"h": vectors(BATCH, 64), "length": np.array([0, 9, 1, 3, 5, 0, 7, 2])}
    batch["response" if role == "encoder" else "ids"] = rng.integers(3, 300, (BATCH, 9)).astype(np.int32)
    make_step = {"encoder": encoder_sft_step, "decoder": decoder_sft_step}[role]
    state = getattr(begun.state, role)
    state = state._replace(opt_state=state.trained)
    whole, metrics = jax.jit(make_step(setting.roles, optimizer))(state, begun.frozen, batch)
    for count in (2, 4):
        parted, parted_metrics = jax.jit(make_step(setting.roles, optimizer, count))(state, begun.frozen, batch)
        assert_gradients_close(parted.opt_state, whole.opt_state)
        assert_metrics_close([jax.device_get(parted_metrics)], [jax.device_get(metrics)], 1e-6)


def test_microbatches_on_eight_devices_are_one_device(settings, alone):
    assert_metrics_close(train(in_parts(settings[0], 2), (2, 2, 1)).metrics, alone(0).metrics, 1e-4)


def test_a_device_keeps_its_rows_in_every_microbatch():
    """Splitting a batch and joining what it gives moves no row; only the gradient is summed over devices."""
    mesh = make_mesh(MeshConfig(2, 4, 1))
    batch = put_batch({"x": np.arange(96, dtype=np.float32).reshape(32, 3) / 96}, mesh)
    weights = jax.device_put(jnp.ones(3), replicated(mesh))

    def loss_fn(w, part):
        rows = jnp.tanh(part["x"] @ w)
        return rows.sum() / 32, rows

    step = jax.jit(lambda w, batch, count: in_microbatches(loss_fn, w, batch, count), static_argnums=2)
    (loss, rows), gradient = step(weights, batch, 1)
    for count in (2, 4):
        program = step.lower(weights, batch, count).compile()
        (parted_loss, parted_rows), parted = program(weights, batch)
        np.testing.assert_allclose(parted_rows, rows, rtol=1e-6)
        assert parted_rows.sharding.is_equivalent_to(batch["x"].sharding, 1)
        np.testing.assert_allclose([parted_loss, *parted], [loss, *gradient], rtol=1e-6)
        text = program.as_text()
        assert "all-reduce" in text
        assert not any(moved in text for moved in ("all-to-all", "collective-permute", "all-gather"))


def test_one_microbatch_is_no_loop():
    traced = jax.make_jaxpr(lambda w, x: in_microbatches(lambda w, x: ((w * x).sum(), x), w, x, 1))(jnp.ones(3), 2.0)
    assert "scan" not in str(traced)
