"""The sidecar: read in both spellings, written so that it is read back, and checked against the tokenizer."""

import dataclasses
import math

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from nlae_jax.config import ProtocolConfig
from nlae_jax.interop.sidecar import (
    MOST_NEW_TOKENS,
    model_sidecar,
    neighbours,
    path_of,
    protocol_of,
    read_sidecar,
    write_sidecar,
)
from nlae_jax.roles.protocol import make_protocol
from nlae_jax.runtime.errors import UserError

TEMPLATES = ProtocolConfig("Say what\n{injection_char}\nis, as {json}", "Text: {explanation} of {a}. The end:")


@pytest.fixture(scope="module")
def protocol(tokenizer):
    return make_protocol(tokenizer, TEMPLATES, 8.0)


@pytest.fixture
def content(protocol):
    """An encoder's sidecar."""
    return model_sidecar(protocol, "av", 64, 1, "some/model", "some text", 48)


def read(tmp_path, content):
    write_sidecar(tmp_path, content)
    return read_sidecar(tmp_path)


@pytest.mark.parametrize("role", ["av", "ar"])
def test_what_is_written_is_read_back(tmp_path, protocol, tokenizer, role):
    sidecar = read(tmp_path, model_sidecar(protocol, role, 64, 1, "some/model", "some text", 48))
    assert (sidecar.role, sidecar.d_model, sidecar.layer, sidecar.base_model) == (role, 64, 1, "some/model")
    assert sidecar.encoder_template == TEMPLATES.encoder_prompt
    assert sidecar.decoder_template == TEMPLATES.decoder_prompt
    assert (sidecar.marker_id, sidecar.injection_scale, sidecar.max_new_tokens) == (protocol.marker_id, 8.0, 48)
    assert protocol_of(sidecar, tokenizer, ProtocolConfig(), 8.0) == protocol


def test_scales_are_numbers_and_templates_are_format_strings(content):
    """What the reference's client does with them: float(...) and str.format(...)."""
    assert float(content["extraction"]["mse_scale"]) == 8.0
    assert content["prompt_templates"]["actor"].format(injection_char="X") == "Say what\nX\nis, as {json}"
    assert content["prompt_templates"]["critic"].format(explanation="it") == "Text: it of {a}. The end:"


def test_a_sidecar_may_say_nothing_of_the_length_of_explanations(tmp_path, content):
    del content["max_new_tokens"]
    assert read(tmp_path, content).max_new_tokens is None


def test_a_length_without_measure_is_bounded(tmp_path, content):
    content["max_new_tokens"] = 10**9
    assert read(tmp_path, content).max_new_tokens == MOST_NEW_TOKENS


@pytest.mark.parametrize("limit", [0, -1, "48", True, 1.5])
def test_a_length_of_explanations_that_is_none(tmp_path, content, limit):
    content["max_new_tokens"] = limit
    with pytest.raises(UserError, match=r"max_new_tokens should be"):
        read(tmp_path, content)


def test_both_spellings_are_one(tmp_path, content):
    expected = read(tmp_path, content)
    content["role"] = "av"
    content["prompt_templates"] = {
        new: content["prompt_templates"][old] for new, old in (("av", "actor"), ("ar", "critic"))
    }
    assert read(tmp_path, content) == expected


def test_the_layer_of_a_released_encoder(tmp_path, content):
    del content["extraction"]["layer_index"]
    content["extraction_layer_index"] = 20
    assert read(tmp_path, content).layer == 20


@pytest.mark.parametrize("section", ["ar", "critic"])
@pytest.mark.parametrize("field", ["extraction_layer_index", "num_hidden_layers"])
def test_the_layer_has_four_spellings(tmp_path, content, section, field):
    content["role"], content[section] = "critic", {field: 20}
    assert read(tmp_path, content).layer == 20


@pytest.mark.parametrize(
    ("scale", "expected"),
    [(150, 150.0), ("75.5", 75.5), ("1e3", 1000.0), (None, 0.0), ("raw", 0.0), ("sqrt_d_model", math.sqrt(64))],
)
def test_scales(tmp_path, content, scale, expected):
    content["extraction"]["injection_scale"] = scale
    assert read(tmp_path, content).injection_scale == expected


def test_no_scale_is_not_a_scale_of_null(tmp_path, content):
    del content["extraction"]["injection_scale"]
    assert read(tmp_path, content).injection_scale is None


def test_beside_a_dataset(tmp_path, content):
    content |= {"kind": "nla_dataset", "extraction": {"d_model": 64, "layer_index": 1}}
    del content["role"], content["d_model"]
    path = tmp_path / "rl.parquet"
    write_sidecar(path, content)
    assert path_of(path).name == "rl.parquet.nla_meta.yaml"
    assert (read_sidecar(path).role, read_sidecar(path).d_model) == ("", 64)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"kind": "else"}, "kind 'else'"),
        ({"role": "judge"}, "role 'judge'"),
        ({"role": None}, "role should be"),
        ({"d_model": "64"}, "d_model should be"),
        ({"d_model": None}, "d_model should be"),
        ({"prompt_templates": {"critic": "{explanation}"}}, "prompt_templates.av"),
        ({"prompt_templates": {"actor": "no slot"}}, "prompt_templates.actor"),
        ({"prompt_templates": {"actor": "{injection_char} {x}"}}, "prompt_templates.actor"),
        ({"prompt_templates": {"actor": "{injection_char} {injection_char}"}}, "prompt_templates.actor"),
        ({"prompt_templates": {"actor": "{injection_char.x} {"}}, "prompt_templates.actor"),
        ({"tokens": {}}, "tokens.injection_char"),
        ({"extraction": {"injection_scale": "much"}}, "injection_scale 'much'"),
        ({"extraction": {"injection_scale": -1}}, "injection_scale -1"),
        ({"extraction": {"injection_scale": True}}, "injection_scale True"),
        ({"extraction": {"injection_scale": "1_0"}}, "injection_scale '1_0'"),
        ({"extraction": {"injection_scale": "\u0663"}}, "injection_scale '\u0663'"),
        ({"extraction": {"injection_scale": 1e60}}, "injection_scale 1e+60"),
        ({"extraction": {"injection_scale": 1e-60}}, "injection_scale 1e-60"),
        ({"extraction": {"layer_index": "one"}}, "extraction.layer_index"),
        ({"extraction": {"layer_index": -1}}, "extraction.layer_index should be the number of a block"),
    ],
)
def test_a_wrong_field_is_named(tmp_path, content, change, named):
    with pytest.raises(UserError) as error:
        read(tmp_path, content | change)
    assert named in str(error.value)
    assert "nla_meta.yaml" in str(error.value)


@pytest.mark.parametrize("text", ["kind: [", "- a list", "\xff", ""])
def test_a_damaged_file_is_named(tmp_path, text):
    (tmp_path / "nla_meta.yaml").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"nla_meta\.yaml"):
        read_sidecar(tmp_path)


@pytest.mark.parametrize(
    "template",
    [
        "{injection_char:>20000000000}",
        "{injection_char:{injection_char}}",
        "{injection_char!r}",
        "{injection_char.__class__}",
        "{injection_char[0]}",
        "{0}",
        "{}",
        "{injection_char} }",
        "{injection_char} {",
        "{injection_char} {injection_char:5}",
        "{injection_char} {{injection_char}}",
        "{{injection_char}}",
    ],
)
def test_a_template_that_is_more_than_a_place_for_the_slot_is_refused(tmp_path, content, template):
    """Nothing of it is carried out: the first would take 20 GB."""
    content["prompt_templates"]["actor"] = template
    with pytest.raises(UserError, match=r"nla_meta\.yaml: prompt_templates\.actor should hold"):
        read(tmp_path, content)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "kind: &a [x, x]\n"
            + "".join(f"k{i}: &k{i} [{', '.join(['*' + ('a' if i == 0 else f'k{i - 1}')] * 9)}]\n" for i in range(9)),
            "aliases",
        ),
        ("[" * 100_000, "nested too deeply"),
        ("kind: nla_model\nd_model: 1" + "0" * 5000, "too many digits"),
        ("kind: nla_model\nrole: av\nd_model: 1" + "0" * 50, "64 bits"),
        ("created: 2026-13-45", "month must be in 1..12"),
        ("kind: [[[[x]]]]", "kind should be a str"),
        ("kind: " + "x" * 10_000, "kind 'xxx"),
        ('kind: "\\x1b]0;\\x07"', r"kind '\x1b]0;\x07'"),
        ("kind: nla_model\nrole: av\nd_model: -64", "d_model should be at least 1; it is -64"),
        ("kind: nla_model\nrole: av\nd_model: 0", "d_model should be at least 1"),
        ("kind: nla_model\nrole: av\nd_model: yes", "d_model should be a int; it is True"),
    ],
)
def test_a_sidecar_that_others_made_up_is_one_line(tmp_path, text, says):
    (tmp_path / "nla_meta.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        read_sidecar(tmp_path)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}/nla_meta.yaml: ") and says in message
    assert message.isprintable() and len(message) < 400


@pytest.mark.parametrize("scale", [10**18, 2**63, "1e999", "nan", [], {}, "9" * 400])
def test_scales_of_any_size(tmp_path, content, scale):
    content["extraction"]["injection_scale"] = scale
    if scale == 10**18:
        assert read(tmp_path, content).injection_scale == 1e18
    else:
        with pytest.raises(UserError, match=r"nla_meta\.yaml: "):
            read(tmp_path, content)


def test_no_sidecar(tmp_path):
    with pytest.raises(UserError, match=r"nla_meta\.yaml: no such file"):
        read_sidecar(tmp_path)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"marker_id": 5}, "injection_token_id"),
        ({"marker": "two tokens"}, "injection_token_id"),
        ({"neighbours": (5, 2)}, "injection_left_neighbor_id: 5"),
        ({"neighbours": None}, "injection_right_neighbor_id: 5"),
        ({"suffix_ids": (1, 2)}, "critic_suffix_ids"),
    ],
)
def test_another_tokenizer_is_refused(tmp_path, content, protocol, tokenizer, change, named):
    if change.get("neighbours", 0) is None:
        change = {"neighbours": (neighbours(protocol)[0], 5)}
    sidecar = dataclasses.replace(read(tmp_path, content), **change)
    with pytest.raises(UserError, match=named):
        protocol_of(sidecar, tokenizer, ProtocolConfig(), 8.0)


@given(st.text("ab{}\n", max_size=12), st.text("ab{}\n", max_size=12))
def test_braces_of_a_template_survive(tmp_path_factory, tokenizer, before, after):
    """Whatever stands around the slot."""
    protocol = make_protocol(tokenizer, TEMPLATES, 8.0)
    changed = dataclasses.replace(protocol, encoder_template=before + "{injection_char}" + after)
    content = yaml.safe_load(yaml.safe_dump(model_sidecar(changed, "av", 64, 1, "m", "c", 48)))
    directory = tmp_path_factory.mktemp("sidecar")
    if (before + after).count("{injection_char}") == 0:
        assert read(directory, content).encoder_template == changed.encoder_template


def test_a_suffix_of_switches_is_none(tmp_path, content):
    content["tokens"]["critic_suffix_ids"] = [True, 3]
    with pytest.raises(UserError, match="critic_suffix_ids should be a list of numbers"):
        read(tmp_path, content)
