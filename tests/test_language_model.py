"""The notebook's language model: logits, residuals, and generation from prompts of different lengths."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nlae_jax
from nlae_jax.config import MeshConfig
from nlae_jax.explore.explainer import read_batches
from nlae_jax.lm.pretrained import load_tokenizer
from nlae_jax.lm.transformer import random_params
from nlae_jax.mesh import make_mesh, replicated
from nlae_jax.roles.language_model import LanguageModel
from nlae_jax.runtime.errors import UserError
from tests.conftest import of_few_tokens, slow_but


@pytest.fixture(scope="module")
def prompts(arch):
    """Token ids of different lengths, more than one batch of them."""
    rng = np.random.default_rng(0)
    return [rng.integers(3, arch.vocab_size, length).tolist() for length in (5, 17, 64, 1, 30, *range(2, 15))]


def padded(prompts, width=64, left=True):
    """ids and mask [N, width]."""
    ids, mask = np.zeros((len(prompts), width), np.int32), np.zeros((len(prompts), width), bool)
    for row, prompt in enumerate(prompts):
        real = slice(width - len(prompt), width) if left else slice(0, len(prompt))
        ids[row, real], mask[row, real] = prompt, True
    return ids, mask


def test_it_is_at_the_top_of_the_package():
    assert nlae_jax.LanguageModel is LanguageModel


def test_logits_and_residual_have_the_promised_shapes(tiny_lm, arch, prompts):
    ids, mask = padded(prompts[:3])
    logits, residual = tiny_lm.logits(ids, mask), tiny_lm.residual(ids, layer=1, mask=mask)
    assert logits.shape == (3, 64, arch.vocab_size) and logits.dtype == jnp.float32
    assert residual.shape == (3, 64, arch.d_model)
    # Lists are as good as arrays, and no mask means that all tokens are real.
    row = ids[2].tolist()
    np.testing.assert_allclose(tiny_lm.logits([row])[0], logits[2], atol=1e-5)


def test_the_last_residual_gives_the_logits_and_layers_differ(tiny_lm, params, prompts):
    ids, mask = padded(prompts[2:3])
    first, last = (np.asarray(tiny_lm.residual(ids, layer=layer, mask=mask)) for layer in (0, 1))
    normed = last / np.sqrt(np.square(last).mean(-1, keepdims=True) + 1e-5) * np.asarray(params["final_norm"])
    np.testing.assert_allclose(normed @ np.asarray(params["embed"]).T, tiny_lm.logits(ids, mask), atol=1e-4)
    assert np.abs(first - last).max() > 0.1


@pytest.mark.parametrize("layer", [-1, 2])
def test_a_layer_that_is_not_there_is_refused(tiny_lm, layer):
    with pytest.raises(UserError, match=f"layer: {layer} should be from 0 to 1"):
        tiny_lm.residual([[3, 4]], layer=layer)


def test_both_paddings_give_the_same(tiny_lm, prompts):
    (left_ids, left), (right_ids, right) = padded(prompts[:3]), padded(prompts[:3], left=False)
    np.testing.assert_allclose(
        np.asarray(tiny_lm.logits(left_ids, left))[left], np.asarray(tiny_lm.logits(right_ids, right))[right], atol=2e-5
    )


def test_greedy_tokens_are_those_of_each_prompt_alone(tiny_lm, prompts, tokenizer):
    replies = tiny_lm.generate(prompts, 6, temperature=0.0)
    assert len(replies) == len(prompts)
    assert len({tuple(reply) for reply in replies}) > 10
    for prompt, reply in [*zip(prompts[:5], replies, strict=False), (prompts[-1], replies[-1])]:
        assert tiny_lm.generate([prompt], 6, temperature=0.0) == [reply]
        # Without any cache: every token is the likeliest after all that precedes it.
        ids, mask = padded([[*prompt, *reply]], width=80, left=False)
        likeliest = np.asarray(tiny_lm.logits(ids, mask))[0].argmax(-1)[len(prompt) - 1 :][: len(reply)]
        assert likeliest.tolist() == reply
        assert len(reply) == 6 or tokenizer.eos_token_id not in reply


def test_sampling_follows_its_seed(tiny_lm, prompts):
    def draw(seed):
        return tiny_lm.generate(prompts[:2], 6, temperature=1.0, seed=seed)

    assert draw(0) == draw(0) != draw(1)


def test_a_reply_ends_before_the_end_of_sequence(tiny_lm, arch, tokenizer):
    """A model that writes nothing else: a reply is empty, and has no end of sequence in it."""
    constant = jax.tree.map(np.zeros_like, tiny_lm.params)
    constant["final_norm"] = np.ones(arch.d_model, np.float32)
    constant["embed"] = np.full((arch.vocab_size, arch.d_model), 0.1, np.float32)
    constant["embed"][tokenizer.eos_token_id] = 1.0
    model = LanguageModel(arch, jax.tree.map(jnp.asarray, constant), tokenizer)
    assert model.generate([[3, 4], [5]], 6, temperature=0.0) == [[], []]


def test_chat_goes_through_the_template(tiny_lm, tokenizer):
    rendered = "<|im_start|>user\nthe text<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer.encode(rendered, add_special_tokens=False)
    expected = tokenizer.decode(tiny_lm.generate([ids], 6, temperature=0.0)[0])
    assert tiny_lm.chat(["the text"], 6, temperature=0.0) == [expected]


def test_bfloat16_weights_give_nearly_the_same_logits(tiny_dir, tiny_lm, prompts):
    low = LanguageModel.from_pretrained(str(tiny_dir), dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(low.params)} == {jnp.dtype(jnp.bfloat16)}
    ids, mask = padded(prompts[:3])
    logits, expected = np.asarray(low.logits(ids, mask))[mask], np.asarray(tiny_lm.logits(ids, mask))[mask]
    assert logits.dtype == np.float32
    assert 0 < np.abs(logits - expected).max() < 0.2


def stopping(tiny_dir, directory, **files):
    """The tiny model in `directory`, with fields changed in its JSON files."""
    shutil.copytree(tiny_dir, directory)
    for name, fields in files.items():
        path = directory / f"{name}.json"
        known = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(known | fields))
    return directory


@pytest.mark.parametrize("file", ["generation_config", "config"])
@pytest.mark.parametrize("several", [True, False])
def test_a_reply_ends_at_every_token_that_the_files_name(tiny_lm, tiny_dir, tmp_path, tokenizer, file, several):
    prompts = [[5, 9], [7, 30, 12]]
    plain = tiny_lm.generate(prompts, 8, temperature=0.0)
    stop = plain[0][2]
    named = {"eos_token_id": [2, stop, -1, 2**40] if several else stop}
    model = LanguageModel.from_pretrained(str(stopping(tiny_dir, tmp_path / "m", **{file: named})))
    assert set(model.stop_ids) == {tokenizer.eos_token_id, stop}
    cut = [reply[: reply.index(stop)] if stop in reply else reply for reply in plain]
    assert model.generate(prompts, 8, temperature=0.0) == cut
    assert cut[0] == plain[0][: plain[0].index(stop)]


@pytest.mark.parametrize("value", ["2", [2, "3"], {"a": 2}, True, [[2]], 2.5])
def test_an_end_that_is_no_number_is_named(tiny_dir, tmp_path, value):
    stopping(tiny_dir, tmp_path / "m", generation_config={"eos_token_id": value})
    with pytest.raises(UserError, match=r"generation_config\.json: eos_token_id should be a number or several"):
        LanguageModel.from_pretrained(str(tmp_path / "m"))


@pytest.mark.parametrize("content", ["[]", "[" * 10**5, '{"eos_token_id": 1e999}'])
def test_a_generation_config_that_cannot_be_read_is_named(tiny_dir, tmp_path, content):
    shutil.copytree(tiny_dir, tmp_path / "m")
    (tmp_path / "m/generation_config.json").write_text(content)
    with pytest.raises(UserError, match=r"generation_config\.json: "):
        LanguageModel.from_pretrained(str(tmp_path / "m"))


def test_a_token_without_an_embedding_is_named(tiny_dir):
    """An index beyond the table reads its last row, and one below it counts from the end: both in silence."""
    model = LanguageModel.from_pretrained(str(tiny_dir))
    model.tokenizer.add_tokens([f"<extra{number}>" for number in range(20)])
    ids = model.tokenizer.encode("of <extra19>")
    assert ids[-1] >= model.arch.vocab_size
    says = rf"the token '<extra19>' has id {ids[-1]}; the model has embeddings for ids 0 to {model.arch.vocab_size - 1}"
    for use in (
        lambda: model.residual([ids], 1),
        lambda: model.logits([ids]),
        lambda: model.generate([[3], ids], 4),
        lambda: model.chat(["the", "of <extra19>"], 4),
    ):
        with pytest.raises(UserError, match=says):
            use()
    with pytest.raises(UserError, match="a token has id -1"):
        model.logits([[3, -1]])


def test_what_stands_in_padding_does_not_matter(tiny_lm):
    mask = np.array([[True, True, False]])
    expected = tiny_lm.logits([[3, 4, 0]], mask)[0, :2]
    for padding in (-100, 10**6):
        np.testing.assert_array_equal(tiny_lm.logits([[3, 4, padding]], mask)[0, :2], expected)


@pytest.mark.parametrize("ids", [[3, 4], [[[3]]], [[3.5, 4.0]], [["a"]], [[True]]])
def test_ids_that_are_none_are_refused(tiny_lm, ids):
    with pytest.raises(UserError, match=r"ids: .* should be whole numbers \[batch, time\]"):
        tiny_lm.logits(ids)
    with pytest.raises(UserError, match="ids: rows should be padded"):
        tiny_lm.logits([[3, 4], [3]])
    with pytest.raises(UserError, match="mask: shape"):
        tiny_lm.logits([[3, 4]], [[True]])


def test_a_mesh_is_kept(tiny_dir, tiny_lm, prompts):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    split = LanguageModel.from_pretrained(str(tiny_dir), mesh=mesh)
    assert len(split.params["embed"].sharding.device_set) == 8
    placed = jax.tree.leaves(split._put(np.zeros((4, 4), np.int32)))
    assert [leaf.sharding for leaf in placed] == [replicated(mesh)]
    assert split.generate(prompts[:3], 6, temperature=0.0) == tiny_lm.generate(prompts[:3], 6, temperature=0.0)


def test_a_model_without_a_chat_template_says_so(tiny_lm, arch, params, tiny_dir):
    tokenizer = load_tokenizer(tiny_dir)
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        LanguageModel(arch, params, tokenizer).chat(["the"], 4)


def test_names_that_are_no_model_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"no config\.json there"):
        LanguageModel.from_pretrained(str(tmp_path))


# --- neurons, log-probs, steering


def test_neurons_are_what_the_down_projection_reads(tiny_lm):
    """Their weighted sum is what the MLP adds: block 1 without it, plus that, is block 1."""
    ids = np.arange(3, 15)[None]
    neurons = np.asarray(tiny_lm.neurons(ids, layer=1))
    assert neurons.shape == (1, 12, tiny_lm.arch.d_ff)
    blocks = tiny_lm.params["blocks"]
    silent = {**blocks, "down": blocks["down"].at[1].set(0.0)}
    without = LanguageModel(tiny_lm.arch, {**tiny_lm.params, "blocks": silent}, tiny_lm.tokenizer)
    middle = np.asarray(without.residual(ids, layer=1))
    whole = middle + neurons @ np.asarray(blocks["down"][1])
    np.testing.assert_allclose(whole, tiny_lm.residual(ids, layer=1), atol=1e-4)
    with pytest.raises(UserError, match="layer: 2"):
        tiny_lm.neurons(ids, layer=2)


def test_log_probs_are_those_of_the_logits(tiny_lm):
    ids = np.array([[5, 6, 7, 8, 0], [9, 10, 11, 12, 13]])
    mask = np.array([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]], bool)
    logits = np.asarray(jax.nn.log_softmax(tiny_lm.logits(ids, mask)))
    expected = np.take_along_axis(logits[:, :-1], ids[:, 1:, None], -1)[..., 0]
    found = np.asarray(tiny_lm.log_probs(ids, mask))
    np.testing.assert_allclose(found[mask[:, 1:]], expected[mask[:, 1:]], atol=1e-5)


@pytest.mark.parametrize("layer", [0, 1])
def test_nothing_added_changes_nothing_and_something_does(tiny_lm, layer):
    prompts = [[5, 6, 7], [9, 10, 11, 12, 13]]
    plain = tiny_lm.generate(prompts, 12, temperature=0.0)
    zeros = [np.zeros((len(prompt), tiny_lm.arch.d_model)) for prompt in prompts]
    assert tiny_lm.steer(prompts, zeros, layer, 12, temperature=0.0) == plain
    push = [np.array(one) for one in zeros]
    push[1][-1] = 50 * np.asarray(tiny_lm.params["embed"][77])  # at the last token of the second prompt alone
    steered = tiny_lm.steer(prompts, push, layer, 12, temperature=0.0)
    assert steered[0] == plain[0] and steered[1] != plain[1]
    with pytest.raises(UserError, match="later: shape"):
        tiny_lm.steer(prompts, zeros, layer, 4, later=np.zeros((2, 3)))
    with pytest.raises(UserError, match="added: shape"):
        tiny_lm.steer(prompts, [zeros[0], zeros[0]], layer, 4)


@pytest.mark.parametrize("layer", [0, 1])
def test_what_is_added_to_generated_tokens_is_what_reading_them_with_it_gives(tiny_lm, layer):
    """The steered text is read back with the same vector at the same tokens: each token is the likeliest there."""
    prompt, later = [5, 6, 7], 20 * np.asarray(tiny_lm.params["embed"][77])
    zeros = np.zeros((3, tiny_lm.arch.d_model), np.float32)
    (written,) = tiny_lm.steer([prompt], [zeros], layer, 8, temperature=0.0, later=[later])
    assert written != tiny_lm.steer([prompt], [zeros], layer, 8, temperature=0.0)[0] and len(written) > 2
    for count in range(1, len(written)):
        added = np.concatenate([zeros, np.tile(later, (count, 1))])
        (following,) = tiny_lm.steer([prompt + written[:count]], [added], layer, 1, temperature=0.0)
        assert following == [written[count]]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (([[5]], 2, float("nan")), "temperature: nan"),
        (([[5]], 2, -1.0), "temperature: -1.0"),
        (([[5]], 2, "0"), "temperature: 0"),
        (([[5]], 0), "max_new_tokens: 0"),
        (([[5]], 2.5), "max_new_tokens: 2.5"),
        (([[5]], True), "max_new_tokens: True"),
        (([[5]], 2, 1.0, -1), "seed: -1"),
        (([[5]], 2, 1.0, 2**32), "seed: 4294967296 should be from 0 to 4294967295"),
        (([[5], []], 2), "prompt 1: empty"),
        (([[5.5]], 2), "prompt 0: token ids should be whole numbers"),
        (([[True]], 2), "prompt 0: token ids should be whole numbers"),
    ],
)
def test_what_no_continuation_can_be_drawn_with(tiny_lm, arguments, named):
    with pytest.raises(UserError, match=named):
        tiny_lm.generate(*arguments)
    assert tiny_lm.generate([], 2) == []


def test_a_seed_has_32_bits_as_in_http(tiny_lm):
    replies = [tiny_lm.generate([[3, 4]] * 4, 6, seed=seed) for seed in (2**32 - 1, 2**31, 2**31 - 1)]
    assert replies[0] != replies[1] != replies[2] != replies[0]


def test_prompts_of_one_length_may_be_an_array(tiny_lm):
    prompts = np.array([[3, 4, 5], [6, 7, 8]])
    assert tiny_lm.generate(prompts, 2, temperature=0.0) == tiny_lm.generate(prompts.tolist(), 2, temperature=0.0)


@pytest.mark.parametrize("shape", [(0, 3), (1, 0)])
def test_nothing_to_read_is_named(tiny_lm, shape):
    with pytest.raises(UserError, match="should be whole numbers"):
        tiny_lm.logits(np.zeros(shape, int))


@pytest.mark.parametrize("layer", [True, 1.0, "1", None])
def test_a_layer_is_a_whole_number(tiny_lm, layer):
    with pytest.raises(UserError, match="layer: "):
        tiny_lm.residual([[5]], layer)


def test_arrays_of_any_library_and_dtype(tiny_lm):
    """Of PyTorch too: with a gradient, and of a dtype that numpy lacks. Those on a GPU go the same way."""
    torch = pytest.importorskip("torch")
    ids, h = np.array([[3, 4, 5], [6, 7, 8]]), np.ones((2, tiny_lm.arch.d_model), np.float32)
    vectors = torch.tensor(h).to(torch.bfloat16).requires_grad_()
    tokens = OnDevice(torch.tensor(ids))
    mask = OnDevice(torch.ones(2, 3, dtype=torch.bool))
    np.testing.assert_array_equal(tiny_lm.logits(tokens, mask), tiny_lm.logits(ids))
    expected = tiny_lm.run_with(ids, h, 1, 0)
    for given in (vectors, list(vectors), OnDevice(vectors)):
        np.testing.assert_array_equal(tiny_lm.run_with(tokens, given, OnDevice(torch.tensor([1, 1])), 0), expected)
    steered = tiny_lm.steer(ids, np.stack([h, h, h], 1), 0, 3, 0.0, later=h)
    added = torch.stack([vectors] * 3, 1)
    assert tiny_lm.steer([OnDevice(row) for row in torch.tensor(ids)], added, 0, 3, 0.0, later=vectors) == steered


class OnDevice:
    """Behaves as a tensor on a GPU does: numpy cannot read it before it is copied."""

    def __init__(self, tensor):
        self._tensor, self.shape = tensor, tensor.shape

    def __len__(self):
        return len(self._tensor)

    def __array__(self, *arguments, **options):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")

    def detach(self):
        return self

    def cpu(self):
        return self._tensor.detach()


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda lm, wrong: lm.logits(wrong), "ids: "),
        (lambda lm, wrong: lm.logits([[3]], wrong), "mask: "),
        (lambda lm, wrong: lm.run_with([[3]], wrong, 0, 0), "h: "),
        (lambda lm, wrong: lm.run_with([[3]], np.ones((1, lm.arch.d_model)), wrong, 0), "position: "),
        (lambda lm, wrong: lm.generate([wrong], 2), "prompt 0: "),
        (lambda lm, wrong: lm.generate([3, 4], 2), "prompt 0: "),
        (lambda lm, wrong: lm.steer([[3]], [wrong], 0, 2), "added: "),
        (lambda lm, wrong: lm.steer([[3]], np.ones((1, 1, lm.arch.d_model)), 0, 2, later=wrong), "later: "),
    ],
)
def test_what_is_no_array_of_numbers_is_named(tiny_lm, call, named):
    torch = pytest.importorskip("torch")
    with pytest.raises(UserError, match=f"^{named}") as caught:
        call(tiny_lm, torch.zeros(1, 1, device="meta"))
    assert "\n" not in str(caught.value)


# --- models that can be run on few tokens

MOST = 40


@pytest.fixture(scope="module")
def short_and_long(arch, params, tokenizer):
    """(kind) -> a model that can be run on `MOST` tokens, and one with the same numbers that can be run on more."""

    def models(kind):
        if kind == "longrope":
            return tuple(LanguageModel(one, params, tokenizer) for one in (of_few_tokens(arch, MOST), arch))
        long = dataclasses.replace(arch, positions=4 * MOST, rotary_dim=0)
        table = jax.random.normal(jax.random.PRNGKey(1), (4 * MOST, arch.d_model))
        short, drawn = dataclasses.replace(long, positions=MOST), random_params(jax.random.PRNGKey(0), long)
        return (
            LanguageModel(short, drawn | {"positions": table[:MOST]}, tokenizer),
            LanguageModel(long, drawn | {"positions": table}, tokenizer),
        )

    return models


def readings(vocab_size, width, most=MOST):
    """Each way to read, with rows of `most` real tokens: name -> (lm -> results, which of them have a meaning)."""
    rng = np.random.default_rng(3)
    rows = [rng.integers(3, vocab_size, length).tolist() for length in (most, 9)]
    ids, mask = (np.concatenate(parts) for parts in zip(padded(rows), padded(rows, left=False), strict=True))
    right, right_mask, columns = ids[2:], mask[2:], np.arange(64)[None]
    before, before_mask = right[:1], columns < most - 10
    read, read_mask = right[:1, 28:40], columns[:, :12] < 10
    after, after_mask = np.stack([read, read[:, ::-1]], 1), np.stack([read_mask, columns[:, :12] < 4], 1)
    h, every = rng.normal(size=(4, width)).astype(np.float32), np.ones((), bool)
    spliced = (before, before_mask, read, read_mask, h[None, :2], 0)
    return {
        "logits": (lambda lm: lm.logits(ids, mask), mask),
        "residual": (lambda lm: lm.residual(ids, 1, mask), mask),
        "neurons": (lambda lm: lm.neurons(ids, 1, mask), mask),
        "run_with": (lambda lm: lm.run_with(ids, h, 5, 0, mask), mask),
        "likeliest": (lambda lm: lm.likeliest(right[:1], right_mask[:1], [[35]], 3), every),
        "log_probs": (lambda lm: lm.log_probs(right, right_mask), right_mask[:, 1:]),
        "splice": (lambda lm: lm.splice(*spliced).log_p[..., :9], every),
        "continuations": (lambda lm: lm.continuations(before, before_mask, after, after_mask), every),
    }


READINGS = tuple(readings(99, 1))


@pytest.mark.parametrize(
    ("kind", "name"),
    slow_but([("longrope", "residual")], [(kind, name) for kind in ("longrope", "learned") for name in READINGS]),
)
def test_padding_beyond_what_a_model_can_be_run_on_changes_nothing(short_and_long, arch, kind, name):
    short, long = short_and_long(kind)
    read, meant = readings(arch.vocab_size, arch.d_model)[name]
    found, expected = (np.asarray(read(lm))[meant] for lm in (short, long))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", READINGS)
def test_a_token_too_many_is_one_line(short_and_long, arch, name):
    short, _ = short_and_long("longrope")
    read, _ = readings(arch.vocab_size, arch.d_model, MOST + 1)[name]
    with pytest.raises(UserError, match=f"^a sequence of {MOST + 1} tokens is too long .* can be run on {MOST}$"):
        read(short)


@pytest.mark.parametrize("kind", slow_but(["longrope"], ["longrope", "learned"]))
def test_a_prompt_and_its_continuation_fill_the_model(short_and_long, arch, kind):
    """Prompts are padded to 64 tokens; the longest one leaves room for 7."""
    short, long = short_and_long(kind)
    prompts = [np.random.default_rng(n).integers(3, arch.vocab_size, n).tolist() for n in (MOST - 7, 20)]
    assert short.generate(prompts, 7, temperature=0.0) == long.generate(prompts, 7, temperature=0.0)
    added = [np.ones((len(prompt), arch.d_model)) for prompt in prompts]
    assert short.steer(prompts, added, 0, 7, temperature=0.0) == long.steer(prompts, added, 0, 7, temperature=0.0)
    for asked in (lambda: short.generate(prompts, 8), lambda: short.steer(prompts, added, 0, 8)):
        with pytest.raises(UserError, match=f"a sequence of {MOST + 1} tokens is too long"):
            asked()


def test_texts_that_fill_the_model_are_read_in_batches(short_and_long, arch):
    """As passages are, whose batches are padded to 64 tokens."""
    short, long = short_and_long("longrope")
    texts = [np.random.default_rng(n).integers(3, arch.vocab_size, n).tolist() for n in (MOST, 3, MOST - 1)]
    found, expected = (read_batches(texts, lambda ids, mask, lm=lm: lm.residual(ids, 1, mask)) for lm in (short, long))
    for mine, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-5, atol=1e-6)
