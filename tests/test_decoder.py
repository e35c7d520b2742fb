"""The decoder: shared prefix = whole prompts, the subject's block K at first, the suffix after every explanation."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nlae_jax.lm.arch import model_weights
from nlae_jax.lm.lora import adapter_weights
from nlae_jax.mesh import Weight
from nlae_jax.roles.decoder import Decoder, place_suffix
from nlae_jax.roles.protocol import decoder_ids
from nlae_jax.roles.subject import Subject
from nlae_jax.train.state import init_decoder
from tests.conftest import drawn_params, tiny_config
from tests.test_encoder import assert_trees_close

LAYER, WIDTH, LENGTHS = 1, 6, (4, 6, 0, 1)


@pytest.fixture(scope="module")
def small(arch):
    """The tiny vocabulary on three narrow blocks: one more than the decoder reads."""
    return dataclasses.replace(arch, d_model=24, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=6, d_ff=32)


@pytest.fixture(scope="module")
def explanations(small):
    """ids [N, WIDTH] with anything after each row's end, and lengths [N]."""
    return np.random.default_rng(0).integers(1, small.vocab_size, (len(LENGTHS), WIDTH)), np.array(LENGTHS)


def whole_prompts(protocol, ids, length, left):
    """prefix, explanation, suffix as one padded sequence per row: ids and mask [N, 24]."""
    out, mask = np.zeros((len(LENGTHS), 24), np.int32), np.zeros((len(LENGTHS), 24), bool)
    for i, (tokens, n) in enumerate(zip(ids, length, strict=True)):
        row = [*protocol.decoder_prefix, *tokens[:n].tolist(), *protocol.decoder_suffix]
        real = slice(24 - len(row), 24) if left else slice(0, len(row))
        out[i, real], mask[i, real] = row, True
    return out, mask


class Kind(NamedTuple):
    """Decoders of one kind: how they are made, what they train, and their plain pass over whole prompts, jitted."""

    make: Callable
    trained: dict
    frozen: dict
    variables: Callable
    plain: Callable


@pytest.fixture(scope="module")
def kinds(small, protocol):
    head = {"value_head": np.eye(24, dtype=np.float32) + drawn_params(Weight((24, 24), ("norm", "embed"), 24), 3)}
    shallow = small.truncated(LAYER + 1)

    def kind(arch, trained, frozen, variables):
        make = lambda protocol: Decoder(arch, LAYER, protocol, 0.5)  # noqa: E731
        plain = value_and_gradient(make(protocol), variables, "from_prompts")
        return Kind(make, trained | head, frozen, variables, plain)

    return {
        "adapters_on_a_deeper_base": kind(
            small,
            {"adapters": drawn_params(adapter_weights(shallow, 2), 2)},
            drawn_params(model_weights(small), 1),
            lambda trained, base: {
                "params": {"lm": base, "value_head": trained["value_head"]},
                "lora": {"lm": {"blocks": trained["adapters"]}},
            },
        ),
        "own_weights": kind(
            shallow, {"lm": drawn_params(model_weights(shallow), 1)}, {}, lambda trained, _: {"params": trained}
        ),
    }


def value_and_gradient(decoder, variables, method):
    """Jitted: the reconstructions, and the gradient of a weighted sum of those of rows that are not empty."""
    weights = np.random.default_rng(1).standard_normal((len(LENGTHS), 24)) * (np.array(LENGTHS) > 0)[:, None]

    def loss(trained, frozen, *inputs):
        out = decoder.apply(variables(trained, frozen), *inputs, method=method)
        return (out * weights).sum(), out

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


@pytest.mark.parametrize(
    ("kind", "ends"),
    [
        ("own_weights", {}),
        ("adapters_on_a_deeper_base", {}),
        ("adapters_on_a_deeper_base", {"decoder_suffix": ()}),
        ("adapters_on_a_deeper_base", {"decoder_prefix": ()}),
    ],
)
def test_the_shared_prefix_is_a_plain_forward_pass(kind, ends, kinds, explanations, protocol):
    """Values, and gradients with respect to everything trained; with and without text at either end of the prompt."""
    protocol, kind, (ids, length) = dataclasses.replace(protocol, **ends), kinds[kind], explanations
    shared = value_and_gradient(kind.make(protocol), kind.variables, "__call__")
    (_, ours), our_gradient = shared(kind.trained, kind.frozen, ids, length)
    assert ours.dtype == jnp.float32
    readable = length + len(protocol.decoder_suffix) > 0
    for left in (False, True):
        prompts = whole_prompts(protocol, ids, length, left)
        (_, theirs), their_gradient = kind.plain(kind.trained, kind.frozen, *prompts)
        np.testing.assert_allclose(ours[readable], theirs[readable], rtol=1e-5, atol=1e-5)
        assert_trees_close(our_gradient, their_gradient)
    assert len({tuple(row) for row in np.round(np.asarray(ours)[readable], 3).tolist()}) == readable.sum()


def test_padding_has_no_influence(small, protocol, explanations):
    ids, length = explanations
    decoder = Decoder(small, LAYER, protocol)
    variables = {"params": {"lm": drawn_params(model_weights(small), 1), "value_head": np.eye(24, dtype=np.float32)}}
    run = jax.jit(lambda ids: decoder.apply(variables, ids, length))
    other = np.where(np.arange(WIDTH) < length[:, None], ids, 3)
    assert (other != ids).any()
    np.testing.assert_array_equal(run(ids), run(other))


@pytest.mark.parametrize("rank", [4, 0])
@pytest.mark.parametrize("layer", [0, 1])
def test_at_first_it_is_the_output_of_block_k(rank, layer, make_tiny_roles, arch, params, tokenizer, protocol):
    """On the same text as one string, tokenised as a reader of the text alone would."""
    roles = make_tiny_roles(lora__rank=rank, subject__layer=layer)
    base = params if rank else {}
    trained = init_decoder(roles, params, jax.random.PRNGKey(0))
    texts = ["the text is about values", "a", "Next comes a new line."]
    inner = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    ids, length = np.zeros((3, 16), np.int32), np.array([len(row) for row in inner])
    for row, tokens in enumerate(inner):
        ids[row, : len(tokens)] = tokens
    run = jax.jit(lambda trained: roles.decoder.apply(roles.decoder_variables(base, trained), ids, length))
    rebuilt = run(trained)
    subject = Subject(arch)
    read = jax.jit(lambda ids: subject.apply({"params": {"lm": params}}, ids, ids >= 0, layer, method="residual"))
    for row, text in enumerate(texts):
        prompt = np.zeros((1, 32), np.int32)
        tokens = decoder_ids(tokenizer, protocol, text)
        prompt[0, : len(tokens)] = tokens
        np.testing.assert_allclose(rebuilt[row], read(prompt)[0, len(tokens) - 1], atol=2e-5)


def test_a_decoder_of_its_own_has_k_plus_1_blocks(make_tiny_roles, params):
    roles = make_tiny_roles(lora__rank=0, subject__layer=0)
    trained = init_decoder(roles, params, jax.random.PRNGKey(0))
    assert {len(weight) for weight in trained["lm"]["blocks"].values()} == {1}
    np.testing.assert_array_equal(trained["value_head"], np.eye(64))
    lora = init_decoder(make_tiny_roles(subject__layer=0), params, jax.random.PRNGKey(0))
    assert len(lora["adapters"]["q"]["a"]) == 1
    assert tiny_config().subject.layer == 0


def test_the_head_is_x_times_the_matrix(small, protocol):
    head = np.random.default_rng(0).standard_normal((24, 24)).astype(np.float32)
    x = np.random.default_rng(1).standard_normal((2, 24)).astype(np.float32)
    decoder = Decoder(small, LAYER, protocol)
    variables = {"params": {"lm": drawn_params(model_weights(small), 0), "value_head": head}}
    np.testing.assert_allclose(decoder.apply(variables, x, method="read"), x @ head, rtol=1e-4, atol=1e-5)


@given(
    st.lists(st.integers(0, WIDTH), min_size=3, max_size=3),
    st.sampled_from([(), (9,), (7, 8, 9)]),
    st.integers(0, 2**31),
)
def test_the_suffix_follows_each_explanation(lengths, suffix, seed):
    ids = np.random.default_rng(seed).integers(1, 7, (3, WIDTH))
    out, valid, last = (
        np.asarray(x) for x in place_suffix(jnp.asarray(ids), jnp.array(lengths), jnp.asarray(suffix, jnp.int32))
    )
    assert out.shape == valid.shape == (3, WIDTH + len(suffix))
    for row, length in enumerate(lengths):
        expected = [*ids[row, :length].tolist(), *suffix]
        assert out[row][valid[row]].tolist() == expected
        assert valid[row].tolist() == [True] * len(expected) + [False] * (WIDTH + len(suffix) - len(expected))
        assert last[row] == max(len(expected) - 1, 0)
