"""GGUF conversion, on files written here with the gguf package."""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

from nlae_jax.lm.arch import Arch, Llama3Rope
from nlae_jax.lm.families import read_arch, read_hf_config
from nlae_jax.lm.gguf.convert import convert_gguf, split_rotary_pairs
from nlae_jax.lm.pretrained import load_tokenizer
from nlae_jax.lm.tensors import TensorToWrite, write_safetensors
from nlae_jax.lm.weights import load_params
from nlae_jax.runtime.errors import UserError

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ hello", "1 2", "\u010a \u010a"]
TOKENS = [*SPECIAL, *sorted(ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in MERGES), "<tag>"]
TYPES = [gguf.TokenType.CONTROL] * len(SPECIAL) + [gguf.TokenType.NORMAL] * (len(TOKENS) - len(SPECIAL) - 1)
TYPES += [gguf.TokenType.USER_DEFINED]
TEMPLATE = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ARCH = Arch(len(TOKENS), 32, 2, 4, 2, 8, 64, norm_eps=1e-5, rope_theta=50_000.0, tied_head=True)


def interleave_rotary_pairs(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows as llama.cpp stores them: of each head, row i of the first half is followed by row i of the second."""
    halves = weight.reshape(heads, 2, -1, *weight.shape[1:])
    return np.stack([halves[:, 0], halves[:, 1]], axis=2).reshape(weight.shape)


def tiny_weights(arch: Arch = ARCH, seed: int = 0) -> dict[str, np.ndarray]:
    """GGUF name -> float32 [out, in], query and key rows in HF's order."""
    rng = np.random.default_rng(seed)
    heads, kv_heads = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
    shapes = {"token_embd": (arch.vocab_size, arch.d_model), "output_norm": (arch.d_model,)}
    if not arch.tied_head:
        shapes["output"] = shapes["token_embd"]
    for layer in range(arch.num_layers):
        for name, shape in {
            "attn_norm": (arch.d_model,),
            "ffn_norm": (arch.d_model,),
            "attn_q": (heads, arch.d_model),
            "attn_k": (kv_heads, arch.d_model),
            "attn_v": (kv_heads, arch.d_model),
            "attn_output": (arch.d_model, heads),
            "ffn_gate": (arch.d_ff, arch.d_model),
            "ffn_up": (arch.d_ff, arch.d_model),
            "ffn_down": (arch.d_model, arch.d_ff),
        }.items():
            shapes[f"blk.{layer}.{name}"] = shape
    return {f"{name}.weight": rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def write_tiny_gguf(
    path: Path,
    arch: Arch = ARCH,
    *,
    architecture: str = "llama",
    weights: dict[str, np.ndarray] | None = None,
    quantisation: gguf.GGMLQuantizationType | None = None,
    tokenizer_model: str = "gpt2",
    pre: str = "smollm",
    add_bos: bool | None = False,
    template: str = TEMPLATE,
    rope_scaling: str = "",
    raw: dict[str, tuple[np.ndarray, gguf.GGMLQuantizationType]] | None = None,
    tokenizer: Callable[[gguf.GGUFWriter], None] | None = None,
    tensors_a_file: int = 0,
) -> dict[str, np.ndarray]:
    """Writes a small model and returns its weights. Matrices of the blocks are stored in `quantisation`.

    Tensors of `raw` are stored as the bytes that are there; `tokenizer` writes another than the one described here.
    With `tensors_a_file` the model is split into files of so many, whose names are made of `path`.
    """
    weights = tiny_weights(arch) if weights is None else weights
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=tensors_a_file)
    writer.add_block_count(arch.num_layers)
    writer.add_context_length(128)
    writer.add_embedding_length(arch.d_model)
    writer.add_feed_forward_length(arch.d_ff)
    writer.add_head_count(arch.num_heads)
    writer.add_head_count_kv(arch.num_kv_heads)
    writer.add_key_length(arch.head_dim)
    writer.add_rope_dimension_count(arch.head_dim)
    writer.add_rope_freq_base(arch.rope_theta)
    writer.add_layer_norm_rms_eps(arch.norm_eps)
    if rope_scaling:
        writer.add_string(f"{architecture}.rope.scaling.type", rope_scaling)
    if tokenizer is not None:
        tokenizer(writer)
    else:
        writer.add_tokenizer_model(tokenizer_model)
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(TOKENS)
        writer.add_token_types(TYPES)
        writer.add_token_merges(MERGES)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_unk_token_id(0)
        if add_bos is not None:
            writer.add_add_bos_token(add_bos)
        writer.add_chat_template(template)
    for name, value in weights.items():
        heads = {"attn_q": arch.num_heads, "attn_k": arch.num_kv_heads}.get(name.split(".")[-2], 0)
        stored = interleave_rotary_pairs(value, heads) if heads else value
        if name in (raw or {}):
            writer.add_tensor(name, raw[name][0], raw_dtype=raw[name][1])
        elif quantisation is not None and value.ndim == 2 and name.startswith("blk."):
            writer.add_tensor(name, gguf.quantize(stored, quantisation), raw_dtype=quantisation)
        else:
            writer.add_tensor(name, np.ascontiguousarray(stored))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def test_config_and_weights_survive(tmp_path):
    weights = write_tiny_gguf(tmp_path / "m.gguf")
    convert_gguf(tmp_path / "m.gguf", tmp_path / "hf")
    assert sorted(path.name for path in (tmp_path / "hf").iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert read_arch(tmp_path / "hf") == ARCH
    config = read_hf_config(tmp_path / "hf")
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 2)
    assert config["max_position_embeddings"] == 128
    params = load_params(tmp_path / "hf", ARCH)
    np.testing.assert_array_equal(params["embed"], weights["token_embd.weight"])
    np.testing.assert_array_equal(params["final_norm"], weights["output_norm.weight"])
    for ours, theirs in {"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output", "down": "ffn_down"}.items():
        for layer in range(ARCH.num_layers):
            np.testing.assert_array_equal(params["blocks"][ours][layer], weights[f"blk.{layer}.{theirs}.weight"].T)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "m.gguf"]


def test_untied_head_survives(tmp_path):
    arch = Arch(len(TOKENS), 32, 1, 2, 2, 16, 32, tied_head=False)
    weights = write_tiny_gguf(tmp_path / "m.gguf", arch)
    convert_gguf(tmp_path / "m.gguf", tmp_path / "hf")
    np.testing.assert_array_equal(load_params(tmp_path / "hf", arch)["head"], weights["output.weight"])
    assert read_arch(tmp_path / "hf") == arch


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "F16", "BF16", "F32"])
def test_quantised_tensors_are_dequantised(kind, tmp_path):
    quantisation = gguf.GGMLQuantizationType[kind]
    weights = write_tiny_gguf(tmp_path / "m.gguf", quantisation=quantisation)
    convert_gguf(tmp_path / "m.gguf", tmp_path / "hf")
    params = load_params(tmp_path / "hf", ARCH)
    for ours, theirs in {"v": "attn_v", "k": "attn_k"}.items():
        original = weights[f"blk.1.{theirs}.weight"]
        expected = gguf.dequantize(gguf.quantize(original, quantisation), quantisation)
        np.testing.assert_array_equal(params["blocks"][ours][1], expected.T)


def random_blocks(rng: np.random.Generator, rows: int, kind: str) -> np.ndarray:
    """Bytes [rows, block] of one K-quant block a row, whose half-precision scales are finite."""
    scales = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}[kind]  # where they lie
    size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1]
    blocks = rng.integers(0, 256, (rows, size), dtype=np.uint8)
    blocks[:, [start + 1 for start in scales]] &= 0xBF  # the top bit of the exponent
    return blocks


@pytest.mark.parametrize("kind", ["Q4_K", "Q5_K", "Q6_K"])
def test_k_quants_are_dequantised(kind, tmp_path):
    """The package reads these and does not write them: blocks of random bits, 256 weights each."""
    quantisation, rng = gguf.GGMLQuantizationType[kind], np.random.default_rng(0)
    arch = Arch(len(TOKENS), 256, 1, 2, 1, 8, 16)
    raw = {f"blk.0.attn_{name}.weight": random_blocks(rng, rows, kind) for name, rows in {"q": 16, "v": 8}.items()}
    write_tiny_gguf(tmp_path / "m.gguf", arch, raw={name: (value, quantisation) for name, value in raw.items()})
    convert_gguf(tmp_path / "m.gguf", tmp_path / "hf")
    blocks = load_params(tmp_path / "hf", arch)["blocks"]
    q, v = (gguf.dequantize(value, quantisation) for value in raw.values())
    assert np.isfinite(q).all() and q.shape == (16, 256)
    np.testing.assert_array_equal(interleave_rotary_pairs(blocks["q"][0].T, 2), q)
    np.testing.assert_array_equal(blocks["v"][0].T, v)


def test_attention_scores_agree_with_the_interleaved_rotation():
    """What the reordering is for: rotating pairs of the stored rows = rotating halves of the restored ones."""
    rng = np.random.default_rng(0)
    heads, head_dim, width = 3, 8, 5
    stored_q, stored_k = rng.normal(size=(2, heads * head_dim, width))
    x, y = rng.normal(size=(2, width))
    frequencies = 100.0 ** -(np.arange(0, head_dim, 2) / head_dim)

    def pairs(vector: np.ndarray, position: int) -> np.ndarray:
        rows = vector.reshape(heads, head_dim // 2, 2)
        rotated = (rows[..., 0] + 1j * rows[..., 1]) * np.exp(1j * position * frequencies)
        return np.stack([rotated.real, rotated.imag], axis=-1).reshape(heads, head_dim)

    def halves(vector: np.ndarray, position: int) -> np.ndarray:
        rows = vector.reshape(heads, 2, head_dim // 2)
        rotated = (rows[:, 0] + 1j * rows[:, 1]) * np.exp(1j * position * frequencies)
        return np.concatenate([rotated.real, rotated.imag], axis=-1)

    expected = (pairs(stored_q @ x, 7) * pairs(stored_k @ y, 2)).sum(-1)
    q, k = split_rotary_pairs(stored_q, heads), split_rotary_pairs(stored_k, heads)
    np.testing.assert_allclose((halves(q @ x, 7) * halves(k @ y, 2)).sum(-1), expected)
    assert not np.allclose((halves(stored_q @ x, 7) * halves(stored_k @ y, 2)).sum(-1), expected)


def test_tokenizer_is_rebuilt(tmp_path):
    write_tiny_gguf(tmp_path / "m.gguf")
    convert_gguf(tmp_path / "m.gguf", tmp_path / "hf")
    tokenizer = load_tokenizer(tmp_path / "hf")
    text = "<|im_start|>say hello hello 1212\n\n漢<tag>é<|im_end|>"
    ids = tokenizer.encode(text)
    assert ids == Tokenizer.from_file(str(tmp_path / "hf" / "tokenizer.json")).encode(text).ids
    assert tokenizer.decode(ids) == text
    pieces = tokenizer.convert_ids_to_tokens(ids)
    assert pieces[0] == "<|im_start|>" and pieces[-1] == "<|im_end|>" and "<tag>" in pieces
    assert pieces.count("Ġhello") == 2
    assert "12" not in pieces and pieces.count("1") == 2  # digits never merge
    assert tokenizer.decode(ids, skip_special_tokens=True) == text[len("<|im_start|>") : -len("<|im_end|>")]


def test_bos_is_neither_named_nor_added_where_the_model_adds_none(tmp_path):
    write_tiny_gguf(tmp_path / "m.gguf")
    convert_gguf(tmp_path / "m.gguf", tmp_path / "hf")
    tokenizer = load_tokenizer(tmp_path / "hf")
    assert tokenizer.bos_token is None and tokenizer.encode("h") == [TOKENS.index("h")]
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token) == ("<|im_end|>", "<|im_end|>", SPECIAL[0])
    assert tokenizer.model_max_length == 128
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "h"}], tokenize=False, add_generation_prompt=True)
    assert chat == "<|im_start|>user\nh<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(("pre", "add_bos"), [("smollm", True), ("llama-bpe", None)])
def test_bos_is_named_and_added_where_the_model_adds_one(pre, add_bos, tmp_path):
    write_tiny_gguf(tmp_path / "m.gguf", pre=pre, add_bos=add_bos)
    convert_gguf(tmp_path / "m.gguf", tmp_path / "hf")
    tokenizer = load_tokenizer(tmp_path / "hf")
    assert tokenizer.bos_token == "<|im_start|>"
    assert tokenizer.encode("h") == [1, TOKENS.index("h")]
    assert tokenizer.encode("h", add_special_tokens=False) == [TOKENS.index("h")]


def test_bos_is_named_where_the_chat_template_asks_for_it(tmp_path):
    write_tiny_gguf(tmp_path / "m.gguf", template="{{ bos_token }}" + TEMPLATE)
    convert_gguf(tmp_path / "m.gguf", tmp_path / "hf")
    tokenizer = load_tokenizer(tmp_path / "hf")
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "h"}], tokenize=False)
    assert chat.startswith("<|im_start|><|im_start|>user")
    assert tokenizer.encode("h") == [TOKENS.index("h")]


def llama3_factors(scaling: Llama3Rope, arch: Arch) -> np.ndarray:
    """By cases, as the Llama 3.1 release computes it: the wavelength's place decides."""
    factors = []
    for index in range(0, arch.head_dim, 2):
        wavelength = 2 * np.pi * arch.rope_theta ** (index / arch.head_dim)
        if wavelength < scaling.original_max_positions / scaling.high_freq_factor:
            factors.append(1.0)
        elif wavelength > scaling.original_max_positions / scaling.low_freq_factor:
            factors.append(scaling.factor)
        else:
            smooth = scaling.original_max_positions / wavelength - scaling.low_freq_factor
            smooth /= scaling.high_freq_factor - scaling.low_freq_factor
            factors.append(1 / ((1 - smooth) / scaling.factor + smooth))
    return np.array(factors, np.float32)


def test_llama3_rope_is_recovered_from_its_factors(tmp_path):
    scaling = Llama3Rope(32.0, 1.0, 4.0, 8192)
    arch = Arch(len(TOKENS), 32, 1, 2, 1, 16, 32, rope_theta=500_000.0, rope_scaling=scaling)
    factors = llama3_factors(scaling, arch)
    assert len(set(factors)) >= 3
    weights = tiny_weights(arch) | {"rope_freqs.weight": factors}
    write_tiny_gguf(tmp_path / "m.gguf", arch, weights=weights)
    convert_gguf(tmp_path / "m.gguf", tmp_path / "hf")
    assert read_arch(tmp_path / "hf") == arch
    weights["rope_freqs.weight"] = factors * np.linspace(1, 0.9, len(factors), dtype=np.float32)
    write_tiny_gguf(tmp_path / "odd.gguf", arch, weights=weights)
    with pytest.raises(UserError, match="rope_freqs"):
        convert_gguf(tmp_path / "odd.gguf", tmp_path / "odd")


@pytest.mark.parametrize(
    "content", [b"", b"no", b"just a text, not a model", b"GGUF\x03\x00\x00\x00", b"GGUF" + b"\xff" * 64]
)
def test_file_that_is_no_gguf(content, tmp_path):
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(UserError, match="not a readable GGUF"):
        convert_gguf(tmp_path / "m.gguf", tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_truncated_gguf(tmp_path):
    write_tiny_gguf(tmp_path / "m.gguf")
    content = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="not a readable GGUF"):
        convert_gguf(tmp_path / "m.gguf", tmp_path / "hf")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": "qwen9"}, "architecture 'qwen9' is not supported"),
        ({"tokenizer_model": "t5"}, "tokenizer.ggml.model 't5'"),
        ({"pre": "mystery"}, "tokenizer.ggml.pre 'mystery'"),
        ({"rope_scaling": "yarn"}, "rope.scaling.type 'yarn'"),
    ],
)
def test_what_is_not_supported_is_named_and_nothing_is_left(options, message, tmp_path):
    write_tiny_gguf(tmp_path / "m.gguf", **options)
    with pytest.raises(UserError, match=message):
        convert_gguf(tmp_path / "m.gguf", tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_quantisation_that_cannot_be_read(tmp_path, monkeypatch):
    write_tiny_gguf(tmp_path / "m.gguf", quantisation=gguf.GGMLQuantizationType.Q8_0)
    monkeypatch.delitem(gguf.quants._type_traits, gguf.GGMLQuantizationType.Q8_0)
    with pytest.raises(UserError, match=r"blk\.0\.attn_\w+\.weight is quantised as Q8_0"):
        convert_gguf(tmp_path / "m.gguf", tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blk.1.attn_k.weight": None}, "lacks the tensor blk.1.attn_k.weight"),
        ({"token_embd.weight": None}, "lacks the tensor token_embd.weight"),
        ({"blk.0.attn_v.bias": np.zeros(16, np.float32)}, "unexpected tensor blk.0.attn_v.bias"),
        ({"blk.0.ffn_up.weight": np.zeros((8, 32), np.float32)}, "blk.0.ffn_up.weight has shape"),
    ],
)
def test_tensors_that_do_not_fit_are_named(change, message, tmp_path):
    weights = {name: value for name, value in (tiny_weights() | change).items() if value is not None}
    write_tiny_gguf(tmp_path / "m.gguf", weights=weights)
    with pytest.raises(UserError, match=message):
        convert_gguf(tmp_path / "m.gguf", tmp_path / "hf")


def test_existing_directory_is_never_overwritten(tmp_path):
    write_tiny_gguf(tmp_path / "m.gguf")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(json.dumps({"mine": True}))
    with pytest.raises(UserError, match="exists already"):
        convert_gguf(tmp_path / "m.gguf", tmp_path / "hf")
    assert read_hf_config(tmp_path / "hf") == {"mine": True}


# --- models in several files


@pytest.fixture
def parts(tmp_path):
    """A model in one file, `whole.gguf`, and in three parts."""
    write_tiny_gguf(tmp_path / "whole.gguf")
    write_tiny_gguf(tmp_path / "split.gguf", tensors_a_file=8)
    parts = sorted(tmp_path.glob("split-*.gguf"))
    assert [part.name for part in parts] == [f"split-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    return parts


@pytest.mark.parametrize("named", [0, 2])
def test_parts_are_read_as_one_model(parts, tmp_path, named):
    """Whichever of them is named."""
    convert_gguf(tmp_path / "whole.gguf", tmp_path / "expected")
    convert_gguf(parts[named], tmp_path / "hf")
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "hf" / name).read_bytes() == (tmp_path / "expected" / name).read_bytes(), name


@pytest.mark.parametrize("lost", [0, 1])
def test_a_missing_part_is_named(parts, tmp_path, lost):
    parts[lost].unlink()
    with pytest.raises(UserError, match=rf"{parts[lost].name}: missing; {parts[2].name} is one of 3 parts"):
        convert_gguf(parts[2], tmp_path / "hf")


def test_parts_under_wrong_names_are_refused(parts, tmp_path):
    with pytest.raises(UserError, match=r"alone\.gguf: split\.no and split\.count say part 0, .*of 3"):
        convert_gguf(parts[0].rename(tmp_path / "alone.gguf"), tmp_path / "hf")
    (tmp_path / "alone.gguf").rename(parts[0])
    parts[1].rename(tmp_path / "second")
    parts[2].rename(parts[1])
    (tmp_path / "second").rename(parts[2])
    with pytest.raises(UserError, match=r"00002-of-00003\.gguf: split\.no"):
        convert_gguf(parts[0], tmp_path / "hf")


def test_parts_that_do_not_belong_together_are_refused(parts, tmp_path):
    write_tiny_gguf(tmp_path / "a-00001-of-00002.gguf")
    write_tiny_gguf(tmp_path / "a-00002-of-00002.gguf")
    with pytest.raises(UserError, match=r"a-00002-of-00002\.gguf: the tensor .* is in another part too"):
        convert_gguf(tmp_path / "a-00001-of-00002.gguf", tmp_path / "hf")


def test_a_name_that_only_looks_like_a_part(tmp_path):
    write_tiny_gguf(tmp_path / "m-00003-of-00002.gguf")
    write_tiny_gguf(tmp_path / "m-00001-of-00001.gguf")
    for name in ("m-00003-of-00002", "m-00001-of-00001"):
        convert_gguf(tmp_path / f"{name}.gguf", tmp_path / name)


# --- values and sizes that no model has


@pytest.mark.parametrize("name", ["output_norm.weight", "blk.1.attn_q.weight", "token_embd.weight"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_value_that_is_no_number_is_named(tmp_path, name, value):
    weights = tiny_weights()
    weights[name].reshape(-1)[3] = value
    write_tiny_gguf(tmp_path / "m.gguf", weights=weights)
    with pytest.raises(UserError, match=f"the tensor {name} holds NaN or infinity"):
        convert_gguf(tmp_path / "m.gguf", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("layers", [2**31, 2**24, 5000])
def test_a_senseless_number_of_blocks_is_one_line(tmp_path, layers):
    write_tiny_gguf(tmp_path / "m.gguf", dataclasses.replace(ARCH, num_layers=layers), weights=tiny_weights())
    with pytest.raises(UserError, match=r"block_count|num_hidden_layers"):
        convert_gguf(tmp_path / "m.gguf", tmp_path / "hf")


def test_a_process_of_the_same_number_keeps_its_files(tmp_path):
    """In two containers with one cache, both may be number 1."""
    others = tmp_path / f".hf.{os.getpid()}.tmp/half", tmp_path / f".a.safetensors.{os.getpid()}.tmp"
    others[0].mkdir(parents=True)
    others[1].write_bytes(b"half")
    write_tiny_gguf(tmp_path / "m.gguf")
    convert_gguf(tmp_path / "m.gguf", tmp_path / "hf")
    write_safetensors(tmp_path / "a.safetensors", [TensorToWrite("a", (2,), lambda: np.ones(2))])
    assert (tmp_path / "hf/config.json").is_file() and (tmp_path / "a.safetensors").is_file()
    assert others[0].is_dir() and others[1].read_bytes() == b"half"
