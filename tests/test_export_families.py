"""Every family out and in again: a pair with adapters, exported, in plain transformers and back as a released pair."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from safetensors.numpy import load_file, save_file

import nlae_jax
from nlae_jax.config import MeshConfig, resolve
from nlae_jax.interop.datasets import INJECT
from nlae_jax.interop.sidecar import tokens_and_templates, write_sidecar
from nlae_jax.lm.adapters import open_adapters
from nlae_jax.lm.families import FAMILIES, read_arch
from nlae_jax.lm.pretrained import TOKENIZER_FILES
from nlae_jax.mesh import make_mesh
from nlae_jax.roles.protocol import make_protocol
from nlae_jax.run.export import export
from nlae_jax.run.preparation import extract
from nlae_jax.run.resources import open_run, prepare
from nlae_jax.run.training import trained_pair
from nlae_jax.runtime.errors import UserError
from tests.conftest import TINY, perturbed, slow_but, tiny_config, vectors
from tests.test_families import CASES, GPT2, NEOX, SMALL, WIDE, assert_close, model_of, torch, transformers

LAYER = 1
TEXTS = ["the list of values", "It ends with: in that is for the array of strings", "an array"]
FIELDS = {
    "llama": SMALL | {"tie_word_embeddings": False},
    "mistral": WIDE | {"sliding_window": 6},
    "qwen2": SMALL | {"head_dim": 8, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 3},
    "qwen3": SMALL | {"attention_bias": True},
    "gemma2": SMALL | {"sliding_window": 6, "query_pre_attn_scalar": 12},
    "gemma3_text": WIDE
    | {"sliding_window": 5, "num_hidden_layers": 7, "rope_parameters": CASES["gemma3-ropes"][1]["rope_parameters"]},
    "smollm3": SMALL | {"no_rope_layers": [1, 0, 1, 1]},
    "olmo2": WIDE | {"tie_word_embeddings": True},
    "gpt2": GPT2 | {"n_positions": 512},
    "gpt_neox": NEOX | {"num_attention_heads": 2},
}
FIELDS |= {
    family: CASES[case][1]
    for family, case in {
        "olmo3": "olmo3-yarn",
        "ministral": "ministral",
        "ministral3": "ministral3-window",
        "phi3": "phi3-part",
        "granite": "granite",
        "granitemoehybrid": "granitemoehybrid",
        "qwen3_moe": "qwen3_moe",
        "olmoe": "olmoe",
        "gpt_oss": "gpt_oss",
        "qwen3_5_text": "qwen3_5_text-attention-first",
        "qwen3_5_moe_text": "qwen3_5_moe_text",
        "gemma4_text": "gemma4_text-ropes",
        "gemma4_unified_text": "gemma4_unified_text",
    }.items()
}
FIELDS["gemma4_text+experts"] = CASES["gemma4_text-experts"][1] | {
    "layer_types": ["sliding_attention", "full_attention"] * 3
}
FIELDS["gemma4_text+twelve"] = CASES["gemma4_text-twelve"][1] | {
    "layer_types": ["sliding_attention", "full_attention"] * 6
}
BASE_MODELS = ("gpt2", "gpt_neox")  # here without a chat template
FAST = ("llama", "gemma3_text", "gpt2", "phi3", "granite", "qwen3_moe+adapted", "qwen3_5_text")
MIXTURES = ["qwen3_moe", "olmoe", "gpt_oss", "gemma4_text+experts", "qwen3_5_moe_text"]


def model_directory(path, family, tokenizer, tiny_dir):
    """A random model of the family that speaks the tiny model's language; its tokenizer adds no token of its own."""
    fields = FIELDS[family] | {"vocab_size": len(tokenizer) + 3}
    model = model_of(family.partition("+")[0], fields, seed=len(family))
    model.save_pretrained(path)
    for name in TOKENIZER_FILES:
        if (tiny_dir / name).exists():
            shutil.copy(tiny_dir / name, path / name)
    if family in BASE_MODELS:
        settings = json.loads((path / "tokenizer_config.json").read_text())
        del settings["chat_template"]
        (path / "tokenizer_config.json").write_text(json.dumps(settings))


def nested(path):
    """The same as the language model of a multimodal checkpoint."""
    text = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": text}))


@pytest.fixture
def run(request, tmp_path, tiny_dir, tokenizer):
    """A run that has activations of the model's width, from a file, and nothing trained."""
    family = request.param.removesuffix("+adapted")  # whose experts have adapters
    directory = tmp_path / "model"
    model_directory(directory, family.removesuffix("+vision"), tokenizer, tiny_dir)
    if family.endswith("+vision"):
        nested(directory)
    width = read_arch(directory).d_model
    protocol = make_protocol(tokenizer, tiny_config().protocol, 1.0)
    rows, path = vectors(6, width), tmp_path / "rl.parquet"
    content = protocol.encoder_template.replace("{injection_char}", INJECT)
    table = {
        "prompt": [[{"role": "user", "content": content}]] * len(rows),
        "activation_vector": pa.array(list(rows), pa.list_(pa.float32(), width)),
        "n_raw_tokens": range(9, 9 + len(rows)),
        "activation_layer": [LAYER] * len(rows),
        "doc_id": [f"doc {row}" for row in range(len(rows))],
    }
    pq.write_table(pa.table(table), path)
    meta = {"kind": "nla_dataset", "extraction": {"d_model": width, "layer_index": LAYER}}
    write_sidecar(path, meta | tokens_and_templates(protocol))
    none = {"sft.encoder_steps": 0, "sft.decoder_steps": 0, "rl.num_steps": 0}
    given = {"subject.model": str(directory), "subject.layer": LAYER, "dataset.rl": str(path), "lora.rank": 2}
    given["lora.experts"] = request.param.endswith("+adapted")
    made = open_run(resolve({**TINY, **none, **given}), tmp_path / "W")
    extract(made)
    return prepare(made)


@pytest.mark.parametrize(
    "run",
    slow_but(FAST, [*FIELDS, "gemma3_text+vision", *(f"{family}+adapted" for family in MIXTURES)]),
    indirect=True,
)
def test_out_and_in_again(request, run, tmp_path):
    case = request.node.callspec.params["run"]
    pair = trained_pair(run)
    if run.arch.experts is not None:
        assert (pair.encoder["adapters"].get("down", {"a": np.empty(0)})["a"].ndim == 4) == case.endswith("+adapted")
    pair = pair._replace(encoder=perturbed(pair.encoder, 1, 0.1), decoder=perturbed(pair.decoder, 2, 0.1))
    out = tmp_path / "out"
    export(run, pair, out, "float32")

    whole, trunk = (transformers.AutoModelForCausalLM.from_pretrained(out / role) for role in ("av", "ar"))
    assert trunk.config.num_hidden_layers == LAYER + 1
    norm = next(name for name in ("norm", "ln_f", "final_layer_norm") if hasattr(trunk.base_model, name))
    setattr(trunk.base_model, norm, torch.nn.Identity())
    head = torch.tensor(load_file(out / "ar/value_head.safetensors")["weight"])
    template = yaml.safe_load((out / "ar/nla_meta.yaml").read_text())["prompt_templates"]["critic"]
    prompts = [run.tokenizer.encode(template.format(explanation=text)) for text in TEXTS]
    ids = np.arange(3, 22)[None]
    with torch.no_grad():
        logits = whole(torch.tensor(ids)).logits.numpy()
        rebuilt = torch.stack([trunk.base_model(torch.tensor([p])).last_hidden_state[0, -1] for p in prompts]) @ head.T
    nla = nlae_jax.NLA(run.roles, pair, run.tokenizer, lambda: None)
    assert_close(nla.reconstruct(TEXTS), rebuilt, "export", case)
    variables, mask = run.roles.encoder_variables(pair.base, pair.encoder), np.ones(ids.shape, bool)
    mine = jax.jit(lambda v: run.roles.encoder.apply(v, method=lambda encoder: encoder.lm(ids, mask)))(variables)
    assert_close(mine, logits, "export", case)

    released = nlae_jax.NLA.from_pretrained(out / "av", out / "ar", subject=run.config.subject.model)
    assert released.layer == LAYER
    assert_close(released.reconstruct(TEXTS), rebuilt, "import", case)
    encoder = nlae_jax.LanguageModel.from_pretrained(str(out / "av"))
    assert_close(encoder.logits(ids), logits, "import", case)

    if case.endswith("+adapted"):
        export(run, pair, tmp_path / "adapters", "float32", adapters=True)
        alone = nlae_jax.NLA.from_pretrained(tmp_path / "adapters")
        assert_close(alone.reconstruct(TEXTS), rebuilt, "import", case)
        back = open_adapters(tmp_path / "adapters/av").read(run.arch)
        jax.tree.map(np.testing.assert_array_equal, back, pair.encoder["adapters"])


@pytest.mark.parametrize("run", ["gemma4_text"], indirect=True)
def test_a_decoder_that_transformers_would_misread_is_refused(run, tmp_path):
    """It takes every last block for one of full attention; adapters come without blocks."""
    subject = dataclasses.replace(run.config.subject, layer=0)
    earlier = dataclasses.replace(run, config=dataclasses.replace(run.config, subject=subject))
    with pytest.raises(UserError, match="transformers loads a gemma4_text only"):
        export(earlier, trained_pair(run), tmp_path / "out", "float32")
    assert not (tmp_path / "out").exists()


def renamed(path, rename, extra=()):
    """Another layout of the same tensors."""
    tensors = load_file(path)
    save_file({rename(name): value for name, value in tensors.items()} | dict(extra), path)


@pytest.mark.parametrize("run", ["gemma3_text"], indirect=True)
def test_a_pair_as_it_is_released(run, tmp_path):
    """Gemma's nested config and names in the encoder; a norm and a [d, d] head that nobody reads in the decoder."""
    pair, out = trained_pair(run), tmp_path / "out"
    pair = pair._replace(encoder=perturbed(pair.encoder, 1, 0.1), decoder=perturbed(pair.decoder, 2, 0.1))
    export(run, pair, out, "float32")
    expected = nlae_jax.NLA.from_pretrained(out / "av", out / "ar")
    h = vectors(5, run.arch.d_model)
    texts, rebuilt = expected.explain(h, max_new_tokens=24), expected.reconstruct(TEXTS)
    nested(out / "av")
    renamed(out / "av/model.safetensors", lambda name: name.replace("model.", "language_model.model.", 1))
    width = run.arch.d_model
    spare = {"model.norm.weight": np.ones(width, np.float32), "lm_head.weight": np.eye(width, dtype=np.float32)}
    renamed(out / "ar/model.safetensors", str, spare)
    released = nlae_jax.NLA.from_pretrained(out / "av", out / "ar")
    assert released.explain(h, max_new_tokens=24) == texts
    np.testing.assert_array_equal(released.reconstruct(TEXTS), rebuilt)
    split = nlae_jax.NLA.from_pretrained(out / "av", out / "ar", mesh=make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))
    assert split.explain(h, max_new_tokens=24) == texts
    assert_close(split.reconstruct(TEXTS), rebuilt, "sharded", "gemma3")


def test_every_family_is_there():
    assert {family.partition("+")[0] for family in FIELDS} == set(FAMILIES)
