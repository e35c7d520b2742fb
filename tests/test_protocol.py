"""What encoder and decoder agree on: the marker, the prompts as token ids, the tags."""

import dataclasses
import json
import time

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from nlae_jax.config import ProtocolConfig
from nlae_jax.lm.chat import plain_template, prompts_ids
from nlae_jax.lm.pretrained import load_tokenizer
from nlae_jax.roles.decoder import place_endings
from nlae_jax.roles.protocol import (
    CLOSING,
    OPENING,
    Protocol,
    blank_tokens,
    check_prompts,
    decoder_ids,
    endings,
    extract_explanation,
    find_marker,
    kept_protocol,
    make_protocol,
    response_ids,
    whole_prompt_ids,
)
from nlae_jax.runtime.errors import UserError
from tests.conftest import INJECTION_SCALE, tiny_config

TEXTS = ("The text is about values.", "a\n\nb", "  spaces around \n", "Ends with a list:\n- one\n- two")


class Characters:
    """A tokenizer of single characters: `ids` maps some of them, everything else is two tokens."""

    chat_template, special_tokens_map = "{{ messages[0]['content'] }}", {}

    def __init__(self, ids, decoded=None):
        self.ids, self.decoded = ids, decoded or {}

    def encode(self, text, add_special_tokens):
        assert not add_special_tokens
        return [self.ids[text]] if text in self.ids else [1, 2]

    def decode(self, ids):
        back = {token: char for char, token in self.ids.items()} | self.decoded
        return back[ids[0]]


def test_the_marker_is_the_rarest_single_token():
    assert find_marker(Characters({"㈀": 900, "㈁": 950, "㈂": 120, "─": 2000}), "{injection_char}") == "㈁"


def test_symbols_are_searched_where_no_enclosed_letter_is_a_token():
    assert find_marker(Characters({"─": 300, "₂": 200}), "{injection_char}") == "─"


def test_a_token_that_decodes_to_something_else_is_no_marker():
    assert find_marker(Characters({"─": 300, "₂": 200}, {300: "?"}), "{injection_char}") == "₂"


def test_an_invisible_character_is_no_marker():
    assert find_marker(Characters({"\u2028": 300, "\u200b": 301, "₂": 200}), "{injection_char}") == "₂"


def test_a_tokenizer_without_a_marker_is_refused():
    with pytest.raises(UserError, match="no character of"):
        find_marker(Characters({"a": 3}), "{injection_char}")


def test_a_character_that_merges_inside_the_prompt_is_no_marker():
    tokenizer = Characters({"─": 300, "v₂": 200, "₂": 200})
    assert find_marker(tokenizer, "v{injection_char}") == "₂"


def test_the_encoder_prompt_is_the_chat_template_around_the_slot(tokenizer, protocol):
    assert tokenizer.encode(protocol.marker, add_special_tokens=False) == [protocol.marker_id]
    whole = [*protocol.encoder_prefix, protocol.marker_id, *protocol.encoder_tail]
    user = tiny_config().protocol.encoder_prompt.replace("{injection_char}", protocol.marker)
    rendered = f"<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(whole) == rendered + OPENING
    assert whole.count(protocol.marker_id) == 1
    opening = list(protocol.encoder_tail[-protocol.opening_length :])
    assert opening == tokenizer.encode(OPENING, add_special_tokens=False)
    assert whole[: -protocol.opening_length] == tokenizer.encode(rendered, add_special_tokens=False)


def test_the_rest_of_the_protocol(tokenizer, protocol):
    assert protocol.closing == tuple(tokenizer.encode(CLOSING, add_special_tokens=False))
    assert protocol.eos_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert protocol.injection_scale == INJECTION_SCALE
    assert tokenizer.decode(list(protocol.decoder_prefix)) == "The text:\n"
    assert tokenizer.decode(list(protocol.decoder_suffix)) == "\nIt ends at:"


@pytest.mark.parametrize("text", TEXTS)
def test_the_decoder_prompt_spliced_is_the_prompt_as_one_string(tokenizer, protocol, text):
    ids = decoder_ids(tokenizer, protocol, text)
    assert tokenizer.decode(ids) == f"The text:\n{text.strip()}\nIt ends at:"
    inner = tokenizer.encode(text.strip(), add_special_tokens=False)
    assert ids == [*protocol.decoder_prefix, *inner, *protocol.decoder_suffix]


@pytest.fixture(scope="module")
def with_bos(tiny_dir):
    """The tiny tokenizer, adding a beginning of sequence as Llama's does."""
    tokenizer = load_tokenizer(tiny_dir)
    tokenizer.bos_token = "<|endoftext|>"
    bos = (tokenizer.bos_token, tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(f"{bos[0]} $A", special_tokens=[bos])
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    assert tokenizer.encode("a")[0] == tokenizer.bos_token_id
    return tokenizer


def test_the_beginning_of_sequence_stands_once_before_each_prompt(with_bos):
    protocol = make_protocol(with_bos, tiny_config().protocol, 1.0)
    for ids in (
        [*protocol.encoder_prefix, *protocol.encoder_tail],
        [*protocol.decoder_prefix, *protocol.decoder_suffix],
        decoder_ids(with_bos, protocol, "the text"),
    ):
        assert ids[0] == with_bos.bos_token_id
        assert ids.count(with_bos.bos_token_id) == 1
    for ids in (protocol.closing, protocol.encoder_tail, response_ids(with_bos, protocol, "the text")):
        assert with_bos.bos_token_id not in ids


RULES = ["$A <|im_end|>", "<|endoftext|> $A <|im_end|>", "<|endoftext|> $A", "$A <|im_end|> <|im_end|>"]
DECODER_PROMPTS = [
    "The text:\n{explanation}\nIt ends at:",
    "{explanation}",
    "{explanation} ends",
    "\n{explanation}",
    "<|endoftext|>The text:\n{explanation}",
    " \n<|endoftext|>The text:\n{explanation}",
]


def adding(tiny_dir, rule):
    """The tiny tokenizer with tokens that it puts around texts."""
    tokenizer = load_tokenizer(tiny_dir)
    tokenizer.bos_token = "<|endoftext|>"
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<|endoftext|>", "<|im_end|>")]
    backend = tokenizer.backend_tokenizer
    backend.post_processor = processors.TemplateProcessing(rule, special_tokens=special)
    return tokenizer


@pytest.mark.parametrize("prompt", DECODER_PROMPTS)
@pytest.mark.parametrize("rule", RULES)
def test_text_and_spliced_ids_are_one_prompt_whatever_the_tokenizer_adds(tiny_dir, rule, prompt):
    """RL splices, evaluation reads the text, a dataset brings it whole. It ends in what the template ends in."""
    tokenizer = adding(tiny_dir, rule)
    bos, eos = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    protocol = make_protocol(tokenizer, dataclasses.replace(tiny_config().protocol, decoder_prompt=prompt), 1.0)
    for explanation in ("a list", "the of", "<|endoftext|>the"):
        inner = tokenizer.encode(explanation, add_special_tokens=False)
        ids = decoder_ids(tokenizer, protocol, explanation)
        assert ids == [*protocol.decoder_prefix, *inner, *protocol.decoder_suffix]
        whole = prompt.replace("{explanation}", explanation)
        assert whole_prompt_ids(tokenizer, protocol, whole) == ids
        begins = rule.startswith("<") or "<" in prompt
        assert ids.count(bos) == begins + inner.count(bos)
        assert ids[0] == bos or not rule.startswith("<")
        assert eos not in ids


def test_prompts_with_tokens_that_a_model_lacks_are_refused(tokenizer, protocol, arch):
    check_prompts(protocol, tokenizer, arch.vocab_size)
    highest = max(*protocol.encoder_prefix, protocol.marker_id, *protocol.encoder_tail, *protocol.closing)
    with pytest.raises(UserError, match=rf"protocol\.encoder_prompt: the token .* has id {highest}"):
        check_prompts(protocol, tokenizer, highest)
    changed = dataclasses.replace(protocol, decoder_suffix=(arch.vocab_size,))
    with pytest.raises(UserError, match=r"protocol\.decoder_prompt: a token has id"):
        check_prompts(changed, tokenizer, arch.vocab_size)


@pytest.mark.parametrize(
    "change",
    [
        {"marker": 5},
        {"marker_id": "5"},
        {"marker_id": True},
        {"encoder_prefix": 5},
        {"closing": ["a"]},
        {"closing": [1.5]},
        {"eos_id": None},
        {"injection_scale": "8"},
        {"more": 1},
    ],
)
def test_a_kept_protocol_of_other_kinds_is_damaged(protocol, tokenizer, tmp_path, change):
    path = tmp_path / "protocol.json"
    path.write_text(json.dumps(json.loads(protocol.to_json()) | change))
    with pytest.raises(UserError, match=r"protocol\.json: damaged"):
        kept_protocol(path, tokenizer)


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"{}", b"[" * 100_000, b"\xff"])
def test_a_kept_protocol_that_cannot_be_read_is_damaged(tokenizer, tmp_path, content):
    path = tmp_path / "protocol.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"protocol\.json: damaged"):
        kept_protocol(path, tokenizer)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("encoder_prompt", "no slot", r"protocol.encoder_prompt: must contain \{injection_char\} exactly once"),
        ("encoder_prompt", "{injection_char}{injection_char}", "protocol.encoder_prompt: must contain"),
        ("encoder_prompt", "₂ {injection_char}", "no character of"),
        ("decoder_prompt", "no slot", r"protocol.decoder_prompt: must contain \{explanation\} exactly once"),
        ("decoder_prompt", "{explanation}{explanation}", "protocol.decoder_prompt: must contain"),
    ],
)
def test_a_template_that_does_not_work_is_named(tokenizer, field, value, message):
    config = dataclasses.replace(ProtocolConfig(), **{field: value})
    with pytest.raises(UserError, match=message):
        make_protocol(tokenizer, config, 1.0)


def test_a_tokenizer_without_an_end_is_refused(tiny_dir):
    tokenizer = load_tokenizer(tiny_dir)
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="names no end-of-sequence token"):
        make_protocol(tokenizer, ProtocolConfig(), 1.0)


def test_a_base_model_gets_a_plain_prompt(tiny_dir):
    tokenizer = load_tokenizer(tiny_dir)
    tokenizer.chat_template = None
    protocol = make_protocol(tokenizer, ProtocolConfig(), 1.0)
    ids = [*protocol.encoder_prefix, protocol.marker_id, *protocol.encoder_tail]
    prompt = ProtocolConfig().encoder_prompt.replace("{injection_char}", protocol.marker)
    assert tokenizer.decode(ids) == prompt + "\n" + OPENING
    tokenizer.chat_template = plain_template(tokenizer)
    assert make_protocol(tokenizer, ProtocolConfig(), 1.0) == protocol


def test_a_plain_prompt_begins_as_the_tokenizer_has_texts_begin(tiny_dir):
    tokenizer = load_tokenizer(tiny_dir)
    tokenizer.chat_template = None
    (bare,) = prompts_ids(tokenizer, ["the text"])
    begin = TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
    tokenizer.backend_tokenizer.post_processor = begin
    assert prompts_ids(tokenizer, ["the text"]) == [[1, *bare]]
    tokenizer.chat_template = plain_template(tokenizer)
    assert prompts_ids(tokenizer, ["the text"]) == [[1, *bare]]


def test_a_slot_at_the_very_beginning_is_refused(tiny_dir):
    tokenizer = load_tokenizer(tiny_dir)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    config = dataclasses.replace(ProtocolConfig(), encoder_prompt="{injection_char} says")
    with pytest.raises(UserError, match="at least one token should stand before"):
        make_protocol(tokenizer, config, 1.0)


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("<explanation>\nIt is.\n</explanation>", "It is."),
        ("before <explanation>It is.</explanation> after", "It is."),
        ("<explanation>\n\n  two\n\nparts \n</explanation>", "two\n\nparts"),
        ("<explanation>one</explanation><explanation>two</explanation>", "one"),
        ("<explanation>\nIt is.\n", None),
        ("It is.\n</explanation>", None),
        ("<explanation>\n \n</explanation>", None),
        ("", None),
    ],
)
def test_extraction(response, expected):
    assert extract_explanation(response) == expected


# No special tokens: a description is plain text.
explanations = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(
    lambda text: text.strip() and "<|" not in text
)


@given(explanations)
@example("ends with a tag <")
@example("ends with /")
@example("a\n\n\nb")
def test_a_response_is_tokenised_as_one_string_would_be(tokenizer, protocol, explanation):
    ids = response_ids(tokenizer, protocol, explanation)
    assert tuple(ids[-1 - len(protocol.closing) :]) == (*protocol.closing, protocol.eos_id)
    whole = f"{explanation.strip()}\n{CLOSING}"
    assert ids[:-1] == tokenizer.encode(whole, add_special_tokens=False)
    opened = tokenizer.encode(OPENING, add_special_tokens=False)
    assert extract_explanation(tokenizer.decode([*opened, *ids[:-1]])) == explanation.strip()


def test_blank_tokens_are_those_of_white_space_only(tokenizer, arch):
    blank = blank_tokens(tokenizer, arch.vocab_size)
    assert blank.shape == (arch.vocab_size,)
    found = {tokenizer.decode([int(i)]) for i in np.flatnonzero(blank)}
    assert {" ", "\n", "\t"} <= found
    assert not any(text.strip() for text in found)
    assert not blank[tokenizer.encode("the", add_special_tokens=False)[0]]
    assert not blank[len(tokenizer) :].any()


def test_a_tokenizer_larger_than_the_model_is_cut(tokenizer, arch):
    np.testing.assert_array_equal(blank_tokens(tokenizer, 200), blank_tokens(tokenizer, arch.vocab_size)[:200])


def test_json_and_back_is_the_identity(protocol, tmp_path):
    assert Protocol.from_json(protocol.to_json()) == protocol


def test_a_workdir_keeps_the_protocol_it_was_made_with(protocol, tokenizer, tmp_path):
    path = tmp_path / "protocol.json"
    yesterday = dataclasses.replace(protocol, encoder_prefix=(*protocol.encoder_prefix, 7))
    path.write_text(yesterday.to_json())
    assert kept_protocol(path, tokenizer) == yesterday
    path.write_text(dataclasses.replace(protocol, closing=(1, 2)).to_json())
    with pytest.raises(UserError, match=r"protocol\.json: made with another tokenizer: closing differ"):
        kept_protocol(path, tokenizer)


@pytest.fixture(scope="module")
def merging():
    """A tokenizer that takes punctuation together with what follows it, as those of Qwen and Llama 3 do."""
    raw = Tokenizer(models.BPE())
    rule = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(rule, behavior="isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    raw.decoder = decoders.ByteLevel()
    text = ["<explanation>\nit is. So it is.\n</explanation> ends.</text> <summary> or!</text> list)</text> ₂ " * 20]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=360, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator(text, trainer)
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}\nassistant: "
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|end|>", chat_template=template)


FRAME = ProtocolConfig("What is {injection_char} then", "Summary of <text>{explanation}</text> <summary>")


def test_endings_make_spliced_tokens_those_of_the_whole_text(merging):
    protocol = make_protocol(merging, FRAME, 1.0)
    found = endings(merging, protocol, len(merging) + 5)
    assert found.ids.shape == (len(merging) + 5, len(protocol.decoder_suffix) + 1)
    for text in ("it is.", "So it ends!", "a list)", "it is", "is.\n", "ends"):
        ids = merging.encode(text, add_special_tokens=False)
        placed, valid, last = place_endings(np.array([ids + [0] * 3]), np.array([len(ids)]), found)
        spliced = [*protocol.decoder_prefix, *np.asarray(placed)[0][np.asarray(valid)[0]].tolist()]
        assert spliced == decoder_ids(merging, protocol, text), text
        assert int(last[0]) == int(np.asarray(valid).sum()) - 1
    merged = merging.encode("it is.", add_special_tokens=False) + list(protocol.decoder_suffix)
    whole = decoder_ids(merging, protocol, "it is.")
    assert [*protocol.decoder_prefix, *merged] != whole  # else the table would not be needed here


def test_most_endings_are_plain(merging, tokenizer, protocol):
    made = make_protocol(merging, FRAME, 1.0)
    found = endings(merging, made, len(merging))
    plain = [
        row[:n].tolist() == [token, *made.decoder_suffix] for token, (row, n) in enumerate(zip(*found, strict=True))
    ]
    assert 0.5 < np.mean(plain) < 1
    assert (
        endings(
            tokenizer, dataclasses.replace(protocol, decoder_template="Notes: {explanation}", decoder_suffix=()), 300
        )
        is None
    )


def test_a_row_without_an_explanation_has_a_tail_too(merging):
    protocol = make_protocol(merging, FRAME, 1.0)
    found = endings(merging, protocol, len(merging))
    ids, valid, last = place_endings(np.zeros((2, 4), np.int32), np.array([0, 4]), found)
    assert valid[0].sum() == last[0] + 1 >= 1
    assert ids.shape == valid.shape == (2, 4 + len(protocol.decoder_suffix))


def test_extraction_takes_no_longer_for_blank_lines():
    """A regular expression took the cube of their number: 40 seconds for these."""
    clock = time.process_time()
    assert extract_explanation("<explanation>\n" + "\n" * 2_000) is None
    assert extract_explanation("<explanation>" + "\n" * 500_000 + "It is." + " \n" * 500_000 + CLOSING) == "It is."
    assert time.process_time() - clock < 2
