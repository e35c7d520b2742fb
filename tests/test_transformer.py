"""The transformer against transformers' own numbers, in parts against the whole, and its log-probs in chunks."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from nlae_jax.config import MeshConfig
from nlae_jax.lm.arch import model_weights
from nlae_jax.lm.families import arch_from_hf, read_arch
from nlae_jax.lm.lora import adapter_weights
from nlae_jax.lm.transformer import Segment, Transformer, random_params
from nlae_jax.lm.weights import load_params
from nlae_jax.mesh import batch_sharding, make_mesh
from tests.conftest import drawn_params

GOLDEN = Path(__file__).parent / "golden"
NAMES = ("tied", "odd_heads", "rope_llama3")


@pytest.fixture(scope="session")
def batch(arch):
    """ids, mask [3, 11]: a full row, one padded on the right, one on the left."""
    ids = np.random.default_rng(0).integers(3, arch.vocab_size, (3, 11))
    mask = np.ones((3, 11), bool)
    mask[1, 7:] = False
    mask[2, :3] = False
    return np.where(mask, ids, 0), mask


@pytest.fixture(scope="session")
def forward(arch):
    """Jitted: params, ids, mask -> residuals [L + 1, B, T, d] as transformers numbers them, logits [B, T, V]."""
    return lambda arch: jax.jit(
        lambda params, ids, mask: Transformer(arch).apply({"params": params}, ids, mask, method=everything)
    )


def everything(lm, ids, mask):
    segment = lm.padded(ids, mask)
    return jnp.stack([lm.run((segment,), stop=k)[0][0] for k in range(lm.arch.num_layers + 1)]), lm(ids, mask)


def assert_close_where(mask, ours, theirs, tolerance=1e-4):
    """At real tokens, relative to the largest activation."""
    ours, theirs = np.asarray(ours)[..., mask, :], np.asarray(theirs)[..., mask, :]
    assert np.abs(ours - theirs).max() < tolerance * np.abs(theirs).max()


@pytest.mark.parametrize("name", NAMES)
def test_logits_and_every_residual_are_those_of_transformers(name, forward, tmp_path):
    with np.load(GOLDEN / f"{name}.npz") as file:
        golden = dict(file)
    save_file({str(key): golden[f"weight/{key}"] for key in golden["names"]}, tmp_path / "model.safetensors")
    arch = arch_from_hf(json.loads(str(golden["config"])))
    params = jax.tree.map(jnp.asarray, load_params(tmp_path, arch))
    mask = golden["attention_mask"]
    residuals, logits = forward(arch)(params, golden["input_ids"], mask)
    assert logits.dtype == jnp.float32
    assert residuals.shape == golden["hidden_states"].shape
    assert_close_where(mask, logits, golden["logits"])
    for ours, theirs in zip(residuals, golden["hidden_states"], strict=True):
        assert_close_where(mask, ours, theirs)


def test_transformers_reads_our_directory_and_computes_the_same(tiny_dir, params, forward, batch):
    torch = pytest.importorskip("torch")
    from transformers import LlamaForCausalLM

    ids, mask = batch
    model = LlamaForCausalLM.from_pretrained(tiny_dir, attn_implementation="eager").float().eval()
    positions = np.maximum(mask.cumsum(-1) - 1, 0)
    with torch.no_grad():
        theirs = model(
            input_ids=torch.tensor(ids),
            attention_mask=torch.tensor(mask.astype(np.int64)),
            position_ids=torch.tensor(positions),
            output_hidden_states=True,
        )
    residuals, logits = forward(read_arch(tiny_dir))(params, ids, mask)
    assert_close_where(mask, logits, theirs.logits.numpy())
    for ours, hidden in zip(residuals[:-1], theirs.hidden_states[:-1], strict=True):
        assert_close_where(mask, ours, hidden.numpy())


def test_padding_on_either_side_changes_nothing(arch, params, forward, batch):
    ids, mask = batch
    jitted = forward(arch)
    residuals, logits = jitted(params, ids, mask)
    for row, real in ((1, slice(0, 7)), (2, slice(3, 11))):
        alone_residuals, alone = jitted(params, ids[row : row + 1, real], mask[row : row + 1, real])
        np.testing.assert_allclose(logits[row, real], alone[0], atol=2e-5)
        np.testing.assert_allclose(residuals[:, row, real], alone_residuals[:, 0], atol=2e-5)


def test_what_stands_in_the_padding_has_no_influence(arch, params, forward, batch):
    ids, mask = batch
    jitted = forward(arch)
    expected, actual = jitted(params, ids, mask)[1], jitted(params, np.where(mask, ids, 7), mask)[1]
    np.testing.assert_array_equal(np.asarray(expected)[mask], np.asarray(actual)[mask])


@pytest.fixture(scope="module")
def deep():
    """A four-block architecture with parameters and adapters that are not zero."""
    arch = arch_from_hf(
        {
            "model_type": "llama",
            "vocab_size": 32,
            "hidden_size": 16,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "intermediate_size": 24,
        }
    )
    return arch, drawn_params(model_weights(arch), 0), drawn_params(adapter_weights(arch, 2), 1)


@pytest.mark.parametrize(("start", "stop"), [(0, 3), (1, 4), (4, 4)])
def test_running_a_part_in_place_is_running_a_slice(deep, start, stop):
    arch, params, adapters = deep
    x = np.random.default_rng(3).standard_normal((2, 5, arch.d_model)).astype(np.float32)
    segment = Segment(x, np.tile(np.arange(5), (2, 1)), np.ones((2, 5), bool))

    def run(arch, params, adapters, start, stop):
        variables = {"params": params, "lora": {"blocks": adapters}}
        part = jax.jit(
            lambda variables: Transformer(arch, 0.5).apply(variables, (segment,), start=start, stop=stop, method="run")[
                0
            ][0]
        )
        return part(variables)

    def sliced(tree):
        return jax.tree.map(lambda w: w[start:stop], tree)

    in_place = run(arch, params, adapters, start, stop)
    expected = x
    if stop > start:
        cut = {**params, "blocks": sliced(params["blocks"])}
        expected = run(arch.truncated(stop - start), cut, sliced(adapters), 0, stop - start)
    np.testing.assert_allclose(in_place, expected, rtol=1e-5, atol=1e-5)
    # Adapters no deeper than the part, as a decoder's are.
    if start == 0 and stop:
        np.testing.assert_allclose(run(arch, params, sliced(adapters), 0, stop), in_place, rtol=1e-5, atol=1e-5)


def test_remat_policies_give_the_same_gradients(deep):
    arch, params, _ = deep
    ids = np.random.default_rng(4).integers(0, 32, (2, 6))

    def gradient(remat):
        lm = Transformer(arch, remat=remat)
        loss = lambda params: jnp.square(lm.apply({"params": params}, ids, ids >= 0)).mean()  # noqa: E731
        return jax.jit(jax.grad(loss))(params)

    for remat in ("dots", "linear"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), gradient("none"), gradient(remat)
        )


@pytest.mark.parametrize("chunk", [1, 6, 100])
def test_log_probs_in_chunks_are_log_softmax(deep, chunk):
    """15 tokens: chunks that divide them and chunks that do not."""
    arch, params, _ = deep
    rng = np.random.default_rng(5)
    x = rng.standard_normal((3, 5, arch.d_model)).astype(np.float32)
    targets = rng.integers(0, arch.vocab_size, (3, 5))
    weights = rng.standard_normal((3, 5)).astype(np.float32)
    lm = Transformer(arch)

    def chunked(params, x):
        log_probs, entropy = lm.apply({"params": params}, x, targets, chunk, method="token_log_probs")
        return (log_probs * weights).sum(), (log_probs, entropy)

    def plain(params, x):
        log_probs = jax.nn.log_softmax(lm.apply({"params": params}, x, method="logits"))
        entropy = -(jnp.exp(log_probs) * log_probs).sum(-1)
        chosen = jnp.take_along_axis(log_probs, targets[..., None], -1)[..., 0]
        return (chosen * weights).sum(), (chosen, entropy)

    both = [jax.jit(jax.value_and_grad(f, argnums=(0, 1), has_aux=True))(params, x) for f in (chunked, plain)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), *both)


def test_devices_that_split_the_rows_split_the_heads_work(deep):
    arch, params, _ = deep
    lm, mesh = Transformer(arch), make_mesh(MeshConfig(data=8))
    x = jax.ShapeDtypeStruct((16, 9, arch.d_model), jnp.float32, sharding=batch_sharding(mesh))
    targets = jax.ShapeDtypeStruct((16, 9), jnp.int32, sharding=batch_sharding(mesh))

    def loss(params, x, targets):
        return lm.apply({"params": params}, x, targets, 64, method="token_log_probs")[0].sum()

    compiled = jax.jit(jax.grad(loss, argnums=1)).lower(params, x, targets).compile().as_text()
    assert "all-gather" not in compiled
    assert f"f32[16,9,{arch.vocab_size}]" not in compiled  # the logits of a chunk are nowhere in one piece


def test_entropy_carries_no_gradient(deep):
    arch, params, _ = deep
    x = np.ones((1, 2, arch.d_model), np.float32)
    lm = Transformer(arch)

    def entropy(x):
        return lm.apply({"params": params}, x, np.zeros((1, 2), np.int32), method="token_log_probs")[1].sum()

    assert entropy(x) > 0
    assert not np.any(jax.grad(entropy)(x))


def test_linen_initialises_the_declared_weights():
    arch = arch_from_hf(
        {
            "model_type": "llama",
            "vocab_size": 512,
            "hidden_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 64,
        }
    )
    ids, key = np.zeros((1, 2), np.int32), jax.random.PRNGKey(0)
    made = jax.jit(Transformer(arch).init)(key, ids, ids == 0)["params"]
    expected = jax.jit(lambda key: random_params(key, arch))(key)
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, expected)
    assert "head" in made  # untied
    np.testing.assert_array_equal(made["final_norm"], 1)
    for params in (made, expected):
        assert abs(params["embed"].std() - 64**-0.5) < 0.01


@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("temperature", [0.25, 1.0, 1.5])
def test_a_tempered_architecture_divides_its_logits(arch, params, softcap, temperature):
    arch = dataclasses.replace(arch, logit_softcap=softcap, logit_divisor=2.0)
    x = jax.random.normal(jax.random.PRNGKey(0), (2, 3, arch.d_model)) * 9
    logits = lambda arch: Transformer(arch).apply({"params": params}, x, method="logits")  # noqa: E731
    expected = logits(arch) / temperature
    assert float(jnp.abs(expected).max()) > 1
    np.testing.assert_allclose(logits(arch.tempered(temperature)), expected, rtol=1e-5, atol=1e-5)
