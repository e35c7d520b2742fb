"""A run's pair and activations in the reference's layout: out, into transformers and PyTorch, and in again."""

import fcntl
import json
import shutil
import types

import jax
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, processors

import nlae_jax
from nlae_jax.cli import main
from nlae_jax.lm.chat import chat_ids
from nlae_jax.lm.families import read_arch
from nlae_jax.lm.pretrained import load_tokenizer
from nlae_jax.lm.tokens import text_ids
from nlae_jax.roles.protocol import decoder_ids
from nlae_jax.roles.roundtrip import RoundTrip
from nlae_jax.run import export as export_module
from nlae_jax.run.export import _copy_tokenizer, export
from nlae_jax.runtime.errors import UserError
from tests.tiny_run import TinyRun

pytest_plugins = ["tests.tiny_run"]

TEXTS = ["the list of values", "It ends with: in that is", "an array"]


def relative_error(found, expected):
    return np.abs(np.asarray(found) - np.asarray(expected)).max() / np.abs(np.asarray(expected)).max()


@pytest.fixture(scope="module")
def lora_run(tiny_run, tmp_path_factory):
    """With adapters that have learned something, and a decoder shallower than the base."""
    workdir = tmp_path_factory.mktemp("lora") / "W"
    changed = {"lora__rank": 4, "subject__layer": 0, "sft__encoder_steps": 12, "rl__num_steps": 2}
    assert main(tiny_run.arguments(workdir, **changed)) == 0
    return workdir


@pytest.fixture(scope="module", params=["full", "lora"])
def exported(request, tiny_run, tmp_path_factory):
    """(workdir, directory of its export in float32)."""
    workdir = tiny_run.workdir if request.param == "full" else request.getfixturevalue("lora_run")
    out = tmp_path_factory.mktemp("exported") / "pair"
    assert main(["export", "--workdir", str(workdir), "--out", str(out), "--dtype", "float32", "--datasets"]) == 0
    return workdir, out


@pytest.fixture(scope="module")
def imported(exported):
    """(the pair as the run has it, the pair as read from its export)."""
    workdir, out = exported
    subject = json.loads((workdir / "config.json").read_text())["subject"]["model"]
    return nlae_jax.NLA.from_workdir(workdir), nlae_jax.NLA.from_pretrained(out / "av", out / "ar", subject)


def test_out_and_in_again_is_the_same_pair(imported):
    run, released = imported
    assert released.layer == run.layer
    assert relative_error(released.reconstruct(TEXTS), run.reconstruct(TEXTS)) < 1e-5
    h = np.asarray(
        run.subject.residual(run.tokenizer.encode("the of to in is that", return_tensors="np"), run.layer)[0]
    )
    texts = run.explain(h, max_new_tokens=48)
    assert released.explain(h, max_new_tokens=48) == texts
    np.testing.assert_allclose(released.score(texts, h)[0], run.score(texts, h)[0], atol=1e-5)
    released.max_new_tokens = run.max_new_tokens  # of what is cut there
    np.testing.assert_allclose(
        [token["mse"] for token in released.explain_text("the of to in")],
        [token["mse"] for token in run.explain_text("the of to in")],
        atol=1e-4,
    )


@pytest.mark.parametrize("size", [1, 3, 16])
def test_explanations_do_not_depend_on_the_company(imported, size):
    """In compiled batches of several sizes, filled up or not, in another order: the same greedy explanation."""
    _, released = imported
    ids = released.tokenizer.encode("the of to in is that it for as with on be at by this", return_tensors="np")
    h = np.asarray(released.subject.residual(ids, released.layer)[0])
    expected = released.explain(h, max_new_tokens=40)
    trip = RoundTrip(released._roles, released.tokenizer, size, 40)
    assert trip.explain(released._pair, h).texts == expected
    assert trip.explain(released._pair, h[:5]).texts == expected[:5]
    assert trip.explain(released._pair, h[::-1]).texts == expected[::-1]
    rebuilt = released.reconstruct(TEXTS)
    assert relative_error(trip.reconstruct_texts(released._pair, TEXTS), rebuilt) < 1e-5
    assert relative_error(trip.reconstruct_texts(released._pair, TEXTS[::-1])[::-1], rebuilt) < 1e-5


def test_plain_transformers_loads_both(exported, imported):
    """The decoder rebuilt from its description: no final norm, the head from its file, the last token."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    run, _ = imported
    _, out = exported
    models = {}
    for role in ("av", "ar"):
        models[role], info = transformers.AutoModelForCausalLM.from_pretrained(
            out / role, dtype=torch.float32, output_loading_info=True
        )
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    template = yaml.safe_load((out / "ar/nla_meta.yaml").read_text())["prompt_templates"]["critic"]
    head = torch.tensor(load_file(out / "ar/value_head.safetensors")["weight"])
    trunk, tokenizer = models["ar"].model, transformers.AutoTokenizer.from_pretrained(out / "ar")
    trunk.norm = torch.nn.Identity()
    with torch.no_grad():
        last = [
            trunk(torch.tensor([tokenizer.encode(template.format(explanation=text))])).last_hidden_state[0, -1]
            for text in TEXTS
        ]
        rebuilt = torch.stack(last) @ head.T
        ids = torch.arange(3, 14)[None]
        logits = models["av"](ids).logits.numpy()
    assert relative_error(run.reconstruct(TEXTS), rebuilt) < 1e-4
    encoder = nlae_jax.LanguageModel.from_pretrained(str(out / "av"))
    assert relative_error(encoder.logits(ids.numpy()), logits) < 1e-4


def test_transformers_continues_as_the_encoder_does(exported, imported):
    """The client's way: embed the prompt, put the scaled vector into the slot, generate."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    run, _ = imported
    _, out = exported
    model = transformers.AutoModelForCausalLM.from_pretrained(out / "av", dtype=torch.float32)
    tokenizer, meta = load_tokenizer(out / "av"), yaml.safe_load((out / "av/nla_meta.yaml").read_text())
    tokens = meta["tokens"]
    content = meta["prompt_templates"]["actor"].format(injection_char=tokens["injection_char"])
    chat = [{"role": "user", "content": content}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
    slot = prompt.index(tokens["injection_token_id"])
    assert prompt[slot - 1] == tokens["injection_left_neighbor_id"]
    assert prompt[slot + 1] == tokens["injection_right_neighbor_id"]
    ids = prompt + tokenizer.encode("<explanation>\n", add_special_tokens=False)
    h = np.asarray(run.subject.residual(run.tokenizer.encode("the of to in", return_tensors="np"), run.layer)[0])
    texts = run.explain(h, max_new_tokens=40)
    for row, text in zip(h, texts, strict=True):
        x = model.model.embed_tokens(torch.tensor([ids])).detach().clone()
        x[0, slot] = torch.tensor(row) * (meta["extraction"]["injection_scale"] / np.linalg.norm(row))
        mask = torch.ones(x.shape[:2], dtype=torch.long)
        written = model.generate(inputs_embeds=x, attention_mask=mask, do_sample=False, max_new_tokens=40)[0]
        response = tokenizer.decode(written, skip_special_tokens=True)
        assert text == (response.split("</explanation>")[0].strip() if "</explanation>" in response else "")


def test_the_decoder_ends_with_the_block_that_is_read(exported):
    workdir, out = exported
    layer = json.loads((workdir / "config.json").read_text())["subject"]["layer"]
    arch, whole = read_arch(out / "ar"), read_arch(out / "av")
    assert (arch.num_layers, whole.num_layers) == (layer + 1, 2)
    meta = yaml.safe_load((out / "ar/nla_meta.yaml").read_text())
    assert meta["critic"]["extraction_layer_index"] == meta["extraction"]["layer_index"] == layer
    assert load_file(out / "ar/value_head.safetensors")["weight"].shape == (arch.d_model, arch.d_model)


def test_trained_weights_are_written_as_they_are(tiny_run, tmp_path):
    """Without adapters in float32 nothing is computed: to the last bit."""
    from nlae_jax.explore.sources import open_trained
    from nlae_jax.lm.weights import load_params
    from nlae_jax.run.training import trained_pair

    assert main(["export", "--workdir", str(tiny_run.workdir), "--out", str(tmp_path), "--dtype", "float32"]) == 0
    pair = trained_pair(open_trained(tiny_run.workdir))
    read = load_params(tmp_path / "av", read_arch(tmp_path / "av"))
    jax.tree.map(np.testing.assert_array_equal, read, jax.device_get(pair.encoder["lm"]))
    head = load_file(tmp_path / "ar/value_head.safetensors")["weight"]
    np.testing.assert_array_equal(head.T, pair.decoder["value_head"])


def test_half_the_bytes_in_bfloat16(tiny_run, tmp_path):
    assert main(["export", "--workdir", str(tiny_run.workdir), "--out", str(tmp_path / "half")]) == 0
    command = ["export", "--workdir", str(tiny_run.workdir), "--out", str(tmp_path / "whole"), "--dtype", "float32"]
    assert main(command) == 0
    half, whole = ((tmp_path / name / "av/model.safetensors").stat().st_size for name in ("half", "whole"))
    assert half < 0.52 * whole
    released = nlae_jax.NLA.from_pretrained(tmp_path / "half/av", tmp_path / "half/ar")
    run = nlae_jax.NLA.from_workdir(tiny_run.workdir)
    assert 1e-5 < relative_error(released.reconstruct(TEXTS), run.reconstruct(TEXTS)) < 0.1
    half = nlae_jax.NLA.from_pretrained(tmp_path / "half/av", tmp_path / "half/ar", dtype="bfloat16")
    assert relative_error(half.reconstruct(TEXTS), run.reconstruct(TEXTS)) < 0.2


def test_nothing_is_overwritten(exported, capsys):
    workdir, out = exported
    before = sorted(path.stat().st_mtime_ns for path in out.rglob("*"))
    assert main(["export", "--workdir", str(workdir), "--out", str(out)]) == 2
    assert "is there already" in capsys.readouterr().err
    assert sorted(path.stat().st_mtime_ns for path in out.rglob("*")) == before


def test_what_was_left_by_a_kill_is_made_again(tiny_run, tmp_path):
    (tmp_path / ".export.tmp/av").mkdir(parents=True)
    assert main(["export", "--workdir", str(tiny_run.workdir), "--out", str(tmp_path), "--datasets"]) == 0
    names = {
        "av",
        "ar",
        *(f"{n}.parquet{s}" for n in ("av_sft", "ar_sft", "rl", "held_out") for s in ("", ".nla_meta.yaml")),
    }
    assert {path.name for path in tmp_path.iterdir()} == names


def test_a_generator_stops_where_the_source_does(exported):
    for role in ("av", "ar"):
        tokenizer = load_tokenizer(exported[1] / role)
        for name in ("config.json", "generation_config.json"):
            assert json.loads((exported[1] / role / name).read_text())["eos_token_id"] == tokenizer.eos_token_id


def test_adapters_are_refused_on_other_weights(tiny_run, exported, tmp_path, capsys):
    """The released directory is rewritten after training began from it."""
    pair = shutil.copytree(exported[1], tmp_path / "pair")
    layer = json.loads((exported[0] / "config.json").read_text())["subject"]["layer"]
    given = {"init__av": pair / "av", "init__ar": pair / "ar", "subject__layer": layer, "lora__rank": 2}
    none = {"sft__encoder_steps": 0, "sft__decoder_steps": 0, "rl__num_steps": 0}
    assert main(tiny_run.arguments(tmp_path / "W", "rl", **given, **none)) == 0
    path = pair / "ar/value_head.safetensors"
    save_file({"weight": load_file(path)["weight"] * 2}, path)
    assert main(tiny_run.arguments(tmp_path / "W", "rl", **given, **none)) == 2
    assert "made with other weights" in capsys.readouterr().err


def test_a_named_but_unused_beginning_token_is_not_named_in_the_decoder(tiny_run, tiny_dir, tmp_path):
    """The reference's client asserts that a tokenizer which names one also adds it."""
    model = shutil.copytree(tiny_dir, tmp_path / "model")
    settings = json.loads((model / "tokenizer_config.json").read_text()) | {"bos_token": "<|im_start|>"}
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    changed = {"subject__model": model, "sft__encoder_steps": 2, "sft__decoder_steps": 2, "rl__num_steps": 0}
    assert main(tiny_run.arguments(tmp_path / "W", "rl", **changed)) == 0
    assert main(["export", "--workdir", str(tmp_path / "W"), "--out", str(tmp_path / "out")]) == 0
    assert load_tokenizer(tmp_path / "out/av").bos_token == "<|im_start|>"
    assert load_tokenizer(tmp_path / "out/ar").bos_token is None
    text = "the list"
    assert load_tokenizer(tmp_path / "out/ar").encode(text) == load_tokenizer(model).encode(text)


# --- a released pair to start from


DATED = "Today is {{ strftime_now('%d %B %Y') }}.\n"


def test_a_pair_of_a_troublesome_model(tiny_run, tiny_dir, tmp_path, capsys):
    """A link to a secret is not given away, and other programs read the prompts of training."""
    model, secret = shutil.copytree(tiny_dir, tmp_path / "model"), tmp_path / "secret"
    secret.write_text("#version: 0.2\nmy password\n")
    (model / "merges.txt").symlink_to(secret)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings |= {"bos_token": "<|endoftext|>", "chat_template": DATED + settings["chat_template"]}
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    raw = Tokenizer.from_file(str(model / "tokenizer.json"))
    special = [(token, raw.token_to_id(token)) for token in ("<|endoftext|>", "<|im_end|>")]
    raw.post_processor = processors.TemplateProcessing("<|endoftext|> $A <|im_end|>", special_tokens=special)
    raw.save(str(model / "tokenizer.json"))
    changed = {"subject__model": model, "sft__encoder_steps": 2, "sft__decoder_steps": 2, "rl__num_steps": 0}
    assert main(tiny_run.arguments(tmp_path / "W", "rl", **changed)) == 0
    command = ["export", "--workdir", str(tmp_path / "W"), "--out", str(tmp_path / "out"), "--dtype", "float32"]
    assert main(command) == 2
    assert f"{model}/merges.txt: a link to {secret}, outside of the model" in capsys.readouterr().err
    assert not any("password" in path.read_text("latin-1") for path in tmp_path.glob("out/**/*") if path.is_file())

    (model / "merges.txt").unlink()
    assert main(command) == 0
    run, transformers = nlae_jax.NLA.from_workdir(tmp_path / "W"), pytest.importorskip("transformers")
    av, ar = (transformers.AutoTokenizer.from_pretrained(tmp_path / "out" / role) for role in ("av", "ar"))
    meta = yaml.safe_load((tmp_path / "out/ar/nla_meta.yaml").read_text())
    content = meta["prompt_templates"]["actor"].format(injection_char=meta["tokens"]["injection_char"])
    chat = av.apply_chat_template([{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True)
    protocol = run._roles.encoder.protocol
    assert chat.startswith("Today is 26 July 2024.")
    prompt = [*protocol.encoder_prefix, protocol.marker_id, *protocol.encoder_tail[: -protocol.opening_length]]
    assert av.encode(chat, add_special_tokens=False) == prompt
    critic = meta["prompt_templates"]["critic"].format(explanation="a list")
    assert ar.encode(critic) == decoder_ids(run.tokenizer, protocol, "a list")
    released = nlae_jax.NLA.from_pretrained(tmp_path / "out/av", tmp_path / "out/ar", str(model))
    assert released._roles.encoder.protocol == protocol
    assert relative_error(released.reconstruct(TEXTS), run.reconstruct(TEXTS)) < 1e-5


@pytest.fixture
def source(tiny_dir, tmp_path):
    return shutil.copytree(tiny_dir, tmp_path / "models/source")


def link(path, target):
    path.unlink(missing_ok=True)
    path.symlink_to(target)


@pytest.mark.parametrize("name", ["merges.txt", "chat_template.jinja", "added_tokens.json", "tokenizer.model"])
@pytest.mark.parametrize("way", ["absolute", "relative", "twice", "through a directory"])
def test_a_link_out_of_the_model_is_not_followed(source, tmp_path, name, way):
    secret = tmp_path / "secret"
    secret.write_text("{}")
    if way == "absolute":
        link(source / name, secret)
    elif way == "relative":
        link(source / name, "../../secret")
    elif way == "twice":
        link(source / "inner", secret)
        link(source / name, "inner")
    else:
        link(source / "here", tmp_path)
        link(source / name, "here/secret")
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=rf"{name}: a link to {secret}, outside of the model"):
        _copy_tokenizer(source, tmp_path / "out", "av")
    assert not (tmp_path / "out" / name).exists()


def test_links_within_a_model_and_in_the_hubs_cache_are_followed(source, tmp_path):
    """The hub's files lie in `blobs`, under their hashes."""
    (source / "tokenizer.json").rename(source / "real.json")
    link(source / "tokenizer.json", "real.json")
    link(tmp_path / "alias", source)
    hub = tmp_path / "hub/models--a--b"
    (hub / "blobs").mkdir(parents=True)
    (hub / "snapshots/0123").mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copy(source / name, hub / "blobs" / name[::-1])
        link(hub / "snapshots/0123" / name, f"../../blobs/{name[::-1]}")
    for number, directory in enumerate((source, tmp_path / "alias", hub / "snapshots/0123")):
        out = tmp_path / f"out{number}"
        out.mkdir()
        _copy_tokenizer(directory, out, "av")
        assert not any(path.is_symlink() for path in out.iterdir())
        assert (out / "tokenizer.json").read_bytes() == (source / "real.json").read_bytes()
    link(hub / "snapshots/0123/merges.txt", "../../refs")
    (hub / "refs").write_text("main")
    with pytest.raises(UserError, match="outside of the model"):
        _copy_tokenizer(hub / "snapshots/0123", tmp_path / "out2", "av")


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("rule", ["$A <|im_end|>", "<|endoftext|> $A <|im_end|>", "<|endoftext|> $A", "$A"])
def test_a_decoders_tokenizer_puts_nothing_after_a_text(source, tmp_path, rule, named):
    raw = Tokenizer.from_file(str(source / "tokenizer.json"))
    special = [(token, raw.token_to_id(token)) for token in ("<|endoftext|>", "<|im_end|>")]
    raw.post_processor = processors.TemplateProcessing(rule, special_tokens=special)
    raw.save(str(source / "tokenizer.json"))
    settings = json.loads((source / "tokenizer_config.json").read_text())
    bos = {"bos_token": "<|endoftext|>"} if named else {}
    (source / "tokenizer_config.json").write_text(json.dumps(settings | bos))
    (tmp_path / "ar").mkdir()
    _copy_tokenizer(source, tmp_path / "ar", "ar")
    copied, expected = load_tokenizer(tmp_path / "ar"), text_ids(load_tokenizer(source), "of the")
    assert copied.encode("of the") == expected
    # The reference's client asserts that a tokenizer which names a beginning also adds it.
    assert copied.bos_token_id is None or expected[0] == copied.bos_token_id


@pytest.mark.parametrize("place", ["settings", "file", "several"])
def test_an_exported_chat_template_prints_the_date_of_training(source, tmp_path, place):
    settings = json.loads((source / "tokenizer_config.json").read_text())
    template = DATED + settings.pop("chat_template")
    if place == "file":
        (source / "chat_template.jinja").write_text(template)
    elif place == "several":
        settings["chat_template"] = [{"name": "default", "template": template}, {"name": "rag", "template": "{{ 1 }}"}]
    else:
        settings["chat_template"] = template
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "av").mkdir()
    _copy_tokenizer(source, tmp_path / "av", "av")
    chat = [{"role": "user", "content": "the"}]
    rendered = load_tokenizer(tmp_path / "av").apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    before = load_tokenizer(source)
    assert rendered.startswith("Today is 26 July 2024.\n<|im_start|>user\nthe")
    assert before.encode(rendered, add_special_tokens=False) == chat_ids(before, "the")
    assert (tmp_path / "av/tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


def test_a_date_that_cannot_be_fixed_is_said(source, tmp_path, capsys):
    settings = json.loads((source / "tokenizer_config.json").read_text())
    settings["chat_template"] = "{% set form = '%A' %}{{ strftime_now(form) }}" + settings["chat_template"]
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "av").mkdir()
    _copy_tokenizer(source, tmp_path / "av", "av")
    assert "prints the current date" in capsys.readouterr().err


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_training_goes_on_from_a_released_pair(tiny_run, exported, tmp_path, rank):
    """What a run starts from is what the other ended with, and RL moves it from there."""
    workdir, out = exported
    layer = json.loads((workdir / "config.json").read_text())["subject"]["layer"]
    learns = workdir == tiny_run.workdir  # the other pair closes no explanation yet: nothing to learn
    started = {
        "init__av": out / "av",
        "init__ar": out / "ar",
        "subject__layer": layer,
        "lora__rank": rank,
        "sft__encoder_steps": 0,
        "sft__decoder_steps": 0,
        **({"mesh__fsdp": 2, "mesh__tensor": 2} if rank and learns else {}),
    }
    pair = nlae_jax.NLA.from_workdir(workdir)
    assert main(tiny_run.arguments(tmp_path / "W", "rl", **started, rl__num_steps=0)) == 0
    begun = nlae_jax.NLA.from_workdir(tmp_path / "W")
    assert relative_error(begun.reconstruct(TEXTS), pair.reconstruct(TEXTS)) < 1e-5
    assert (tmp_path / "W/protocol.json").read_text() == (workdir / "protocol.json").read_text()
    assert not (tmp_path / "W/activations/descriptions.parquet").exists()
    assert main(tiny_run.arguments(tmp_path / "W", "rl", **started, rl__num_steps=1)) == 0
    if learns:
        moved = nlae_jax.NLA.from_workdir(tmp_path / "W")
        assert relative_error(moved.reconstruct(TEXTS), pair.reconstruct(TEXTS)) > 1e-5


def test_evaluating_a_released_pair(tiny_run, tmp_path):
    """The run's own evaluation, from its export: no warm start, no RL."""
    out = tmp_path / "pair"
    assert main(["export", "--workdir", str(tiny_run.workdir), "--out", str(out), "--dtype", "float32"]) == 0
    given = {"init__av": out / "av", "init__ar": out / "ar", "sft__encoder_steps": 0, "sft__decoder_steps": 0}
    assert main(tiny_run.arguments(tmp_path / "W", "eval", **given, rl__num_steps=0)) == 0
    mine, theirs = (json.loads((w / "eval.json").read_text()) for w in (tmp_path / "W", tiny_run.workdir))
    assert mine["fve_gold"] is None
    assert mine["fve"] == pytest.approx(theirs["fve"], abs=1e-4)
    assert mine["fve_shuffled"] == pytest.approx(theirs["fve_shuffled"], abs=1e-4)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda out: (out / "av/nla_meta.yaml").unlink(), "av/nla_meta.yaml: no such file"),
        (lambda out: (out / "ar/value_head.safetensors").unlink(), "value_head.safetensors"),
        (lambda out: change(out / "av/nla_meta.yaml", role="critic"), "given as 'av'"),
        (lambda out: change(out / "av/nla_meta.yaml", d_model=32), "d_model 32"),
        (lambda out: change(out / "ar/nla_meta.yaml", critic={"extraction_layer_index": 7}), "should be"),
        (lambda out: change(out / "av/nla_meta.yaml", extraction={"layer_index": 7}), "was made for block 7"),
        (lambda out: change(out / "av/nla_meta.yaml", extraction={}), "extraction.injection_scale is missing"),
        (
            lambda out: save_file({"weight": np.zeros((3, 3), np.float32)}, out / "ar/value_head.safetensors"),
            "shape (3, 3)",
        ),
        (
            lambda out: save_file({"bias": np.zeros((3, 3), np.float32)}, out / "ar/value_head.safetensors"),
            "lacks the tensor 'weight'",
        ),
    ],
)
def test_what_does_not_fit_is_named(exported, tmp_path, capsys, damage, named):
    out = shutil.copytree(exported[1], tmp_path / "out")
    damage(out)
    assert main(["explain", "--av", str(out / "av"), "--ar", str(out / "ar"), "--text", "the of"]) == 2
    assert named in capsys.readouterr().err


def change(path, **fields):
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | fields))


def test_swapped_directories_are_noticed(exported):
    out = exported[1]
    with pytest.raises(UserError, match="given as 'av'"):
        nlae_jax.NLA.from_pretrained(out / "ar", out / "av")


def test_a_pair_for_another_layer_is_refused(tiny_run, exported, tmp_path, capsys):
    layer = json.loads((exported[0] / "config.json").read_text())["subject"]["layer"]
    given = {"init__av": exported[1] / "av", "init__ar": exported[1] / "ar", "subject__layer": 1 - layer}
    assert main(tiny_run.arguments(tmp_path / "W", "rl", **given)) == 2
    assert f"subject.layer is {1 - layer}" in capsys.readouterr().err
    assert not (tmp_path / "W").exists()


def test_explaining_with_a_released_pair(exported, tiny_run: TinyRun, capsys):
    out = exported[1]
    command = ["explain", "--av", str(out / "av"), "--ar", str(out / "ar"), "--subject", str(tiny_run.model)]
    assert main([*command, "--text", "the of to", "--json"]) == 0
    tokens = json.loads(capsys.readouterr().out)["tokens"]
    assert len(tokens) == len(load_tokenizer(out / "av").encode("the of to"))
    for wrong in (["--av", "x"], ["--workdir", "x", "--subject", "y"], ["--workdir", "x", "--dtype", "bfloat16"]):
        with pytest.raises(SystemExit):
            main(["explain", *wrong, "--text", "the"])


def test_a_second_export_leaves_the_first_ones_files_alone(tmp_path):
    """It deleted what the first one was writing."""
    run = types.SimpleNamespace(config=types.SimpleNamespace(lora=types.SimpleNamespace(rank=1)))
    (tmp_path / ".export.tmp/av").mkdir(parents=True)
    with (tmp_path / ".export.lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match=f"--out {tmp_path}: another nlae process is exporting there"):
            export(run, None, tmp_path, adapters=True)
    assert (tmp_path / ".export.tmp/av").exists()


def test_a_pair_that_another_process_exported_meanwhile_is_seen(tmp_path, monkeypatch):
    """A second export may get the lock just when the first one has ended."""
    run = types.SimpleNamespace(config=types.SimpleNamespace(lora=types.SimpleNamespace(rank=1)))
    monkeypatch.setattr(export_module, "hold", lambda *_: (tmp_path / "av").mkdir())
    with pytest.raises(UserError, match=f"--out {tmp_path}: av is there already"):
        export(run, None, tmp_path, adapters=True)
