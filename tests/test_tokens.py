"""Text as token ids: one beginning, no end, and no token without an embedding."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from nlae_jax.lm.tiny import tiny_tokenizer
from nlae_jax.lm.tokens import begin_ids, check_ids, known_text_ids, text_ids, width_within
from nlae_jax.runtime.errors import UserError

BOS, TURN, EOS = ("<|endoftext|>", 0), ("<|im_start|>", 1), ("<|im_end|>", 2)


def adding(single):
    """The tiny tokenizer with a post-processor of its own."""
    raw = tiny_tokenizer()
    raw.post_processor = single if not isinstance(single, str) else template(single)
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token=BOS[0], eos_token=EOS[0])


def template(single):
    return processors.TemplateProcessing(single=single, special_tokens=[BOS, TURN, EOS])


RULES = {
    "nothing": ("$A", []),
    "a beginning": (f"{BOS[0]} $A", [0]),
    "an end": (f"$A {EOS[0]}", []),
    "both": (f"{BOS[0]} $A {EOS[0]}", [0]),
    "two before, two after": (f"{BOS[0]} {TURN[0]} $A {EOS[0]} {EOS[0]}", [0, 1]),
    "as BERT": (processors.BertProcessing(EOS, BOS), [0]),
    "as RoBERTa": (processors.RobertaProcessing(EOS, BOS), [0]),
    "after bytes": (processors.Sequence([processors.ByteLevel(), template(f"{BOS[0]} $A {EOS[0]}")]), [0]),
}


@pytest.mark.parametrize("rule", RULES)
def test_what_a_tokenizer_puts_before_texts_and_nothing_after(rule):
    single, begin = RULES[rule]
    tokenizer = adding(single)
    bare = tokenizer.encode("of the text", add_special_tokens=False)
    assert begin_ids(tokenizer) == begin
    assert text_ids(tokenizer, "of the text") == text_ids(tokenizer, "of the text", begin) == [*begin, *bare]
    assert text_ids(tokenizer, "") == begin


@pytest.mark.parametrize("rule", [rule for rule, (_, begin) in RULES.items() if begin])
@pytest.mark.parametrize("repeats", [1, 2, 3])
@pytest.mark.parametrize("space", ["", " ", "\n\n"])
def test_text_that_begins_already_begins_once(rule, repeats, space):
    """As a chat template writes it, maybe read and written more than once."""
    single, begin = RULES[rule]
    tokenizer = adding(single)
    already = "".join({0: BOS[0], 1: TURN[0]}[token] for token in begin)
    bare = tokenizer.encode("of the text", add_special_tokens=False)
    assert text_ids(tokenizer, space + already * repeats + "of the text") == [*begin, *bare]


@pytest.mark.parametrize("already", [BOS[0], TURN[0], BOS[0] + BOS[0] + TURN[0], TURN[0] + BOS[0]])
def test_a_part_of_the_beginning_is_not_doubled(already):
    tokenizer = adding(RULES["two before, two after"][0])
    bare = tokenizer.encode("of the text", add_special_tokens=False)
    assert text_ids(tokenizer, already + "of the text") == [0, 1, *bare]


def test_a_beginning_inside_of_a_text_stays():
    tokenizer = adding(RULES["a beginning"][0])
    ids = text_ids(tokenizer, f"of{BOS[0]}the")
    assert ids[0] == 0 and ids.count(0) == 2


def test_white_space_stays_where_no_beginning_follows():
    tokenizer = adding(RULES["a beginning"][0])
    assert tokenizer.decode(text_ids(tokenizer, "\n\n the")) == BOS[0] + "\n\n the"


def test_a_tokenizer_that_adds_nothing_leaves_what_is_written():
    tokenizer = adding(RULES["nothing"][0])
    assert text_ids(tokenizer, BOS[0] * 2 + "of")[:2] == [0, 0]


def test_padding_and_truncation_of_the_file_do_not_count():
    raw = tiny_tokenizer()
    raw.enable_truncation(3)
    raw.enable_padding(length=16)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token=BOS[0], eos_token=EOS[0], pad_token=BOS[0])
    expected = tiny_tokenizer().encode("of the text of the text").ids
    assert text_ids(tokenizer, "of the text of the text") == expected


@given(st.text(max_size=30), st.sampled_from(sorted(RULES)))
def test_every_text_begins_as_a_reader_of_texts_expects(text, rule):
    single, begin = RULES[rule]
    tokenizer = adding(single)
    ids = text_ids(tokenizer, text)
    assert ids[: len(begin)] == begin
    if not text.startswith("<"):
        assert ids[len(begin) :] == tokenizer.encode(text, add_special_tokens=False)


def test_a_token_beyond_the_table_is_named():
    tokenizer = adding(RULES["nothing"][0])
    size = len(tokenizer)
    tokenizer.add_tokens(["<extra\x1b>"])
    ids = text_ids(tokenizer, "of <extra\x1b>")
    assert ids[-1] == size
    check_ids(ids, size + 1, tokenizer, "text")
    with pytest.raises(UserError, match=rf"^text: the token '<extra\\x1b>' has id {size}; .* 0 to {size - 1}$"):
        check_ids(ids, size, tokenizer, "text")
    for wrong in (-1, 10**9):
        with pytest.raises(UserError, match=f"text: a token has id {wrong};"):
            check_ids(np.array([[3, wrong]]), size, tokenizer, "text")
    check_ids([], size, tokenizer, "text")


def test_what_a_model_sampled_is_read_without_tokens_that_it_lacks():
    tokenizer = adding(RULES["both"][0])
    size = len(tokenizer)
    tokenizer.add_tokens(["<extra>"])
    assert known_text_ids(tokenizer, "of<extra> the", size) == text_ids(tokenizer, "of the")


@given(st.integers(1, 300), st.integers(0, 100), st.integers(0, 300), st.integers(0, 50))
def test_a_width_is_one_that_the_model_has(length, padding, most, others):
    width = width_within(length + padding, length, most, others)
    assert length <= width <= length + padding
    if most == 0 or length + padding + others <= most:
        assert width == length + padding
    elif length + others <= most:
        assert width + others == most
    else:  # too many tokens, which the model refuses by their number
        assert width == length
