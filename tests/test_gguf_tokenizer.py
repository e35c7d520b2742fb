"""Tokenizers rebuilt from GGUF metadata, against reference tokenizers made here and written into the files."""

import itertools
import json
import random
from pathlib import Path

import gguf
import pytest
import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from nlae_jax.lm.arch import Arch
from nlae_jax.lm.gguf.convert import convert_gguf
from nlae_jax.lm.gguf.tokenizer import write_tokenizer
from nlae_jax.lm.pretrained import load_tokenizer
from nlae_jax.runtime.errors import UserError
from tests.test_gguf import write_tiny_gguf

TEXTS = [
    "The quick brown fox doesn't jump; it's WE'LL see, isn't it? I'd say they're done.",
    "  two spaces, then   three\tand a tab\t\t, trailing   ",
    "\n\nNew lines\r\n\r\n  indented\n\n\n    def f(x):\n        return x**2 + 3.14159  # café\n",
    "Numbers 1 12 123 1234 12345678 and ½ ² ٣٤٥ x2y3",
    "Größe naïve Ελληνικά русский 漢字かな한국어 עברית हिन्दी",
    "emoji 👩‍👩‍👧 🇩🇪 and controls \x00\x7f",
    "camelCase HTTPServer ABCdef iPhone a/b//c http://x.y/?q=1&r=2",
    "cafe\u0301 A\u030a \ufb01",
    "<|im_start|>user\nhello<|im_end|>\n<tag>hello",
    "hello hello Hello hello",
    " ",
    "",
]
CORPUS = TEXTS * 3 + ["hello world the then there 12 123 doesn't we'll camelCase HTTPServer return\n\n    "] * 5
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]

# The patterns of the published tokenizer.json files.
LLAMA3 = (
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*"
    "|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
)
QWEN2 = (
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*"
    "|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
)
TEKKEN = (
    "[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]*[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]+"
    "|[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]+[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]*"
    "|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n/]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
)
O200K = (
    "[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]*[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    "|[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]+[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    "|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n/]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
)
QWEN35 = (
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?[\\p{L}\\p{M}]+|\\p{N}| ?[^\\s\\p{L}\\p{M}\\p{N}]+[\\r\\n]*"
    "|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
)
# tokenizer.ggml.pre -> pattern ("" for GPT-2's own), whether digits are cut off first, whether text is normalised.
PRE = {
    "gpt-2": ("", False, False),
    "smollm": ("", True, False),
    "llama-bpe": (LLAMA3, False, False),
    "smaug-bpe": (LLAMA3, False, False),
    "dbrx": (LLAMA3, False, False),
    "qwen2": (QWEN2, False, True),
    "qwen35": (QWEN35, False, True),
    "tekken": (TEKKEN, False, False),
    "gpt-4o": (O200K, False, False),
}


def byte_level_reference(pre, whole_words=False):
    pattern, digits, nfc = PRE[pre]
    tokenizer = Tokenizer(models.BPE(ignore_merges=whole_words))
    steps = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    if pattern:
        steps.append(pre_tokenizers.Split(Regex(pattern), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not pattern))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=420, special_tokens=SPECIAL, initial_alphabet=alphabet)
    )
    tokenizer.add_tokens([AddedToken("<tag>", normalized=False)])
    return tokenizer


def rebuilt(tmp_path, size, write):
    """The tokenizer of a converted file whose tokenizer metadata `write` adds."""
    write_tiny_gguf(tmp_path / "m.gguf", Arch(size, 8, 1, 1, 1, 8, 8), tokenizer=write)
    convert_gguf(tmp_path / "m.gguf", tmp_path / "hf")
    return load_tokenizer(tmp_path / "hf")


def byte_level_writer(reference, pre, merges=None, **keys):
    model = json.loads(reference.to_str())["model"]
    tokens = sorted(reference.get_vocab(), key=reference.get_vocab().get)
    kinds = {token: gguf.TokenType.CONTROL for token in SPECIAL} | {"<tag>": gguf.TokenType.USER_DEFINED}

    def write(writer):
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(tokens)
        writer.add_token_types([kinds.get(token, gguf.TokenType.NORMAL) for token in tokens])
        writer.add_token_merges([" ".join(merge) for merge in model["merges"]] if merges is None else merges)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        for key, value in keys.items():
            writer.add_bool(f"tokenizer.ggml.{key}", value)

    return write


@pytest.mark.parametrize("pre", PRE)
def test_byte_level_bpe_is_the_reference(tmp_path, pre):
    reference = byte_level_reference(pre)
    tokenizer = rebuilt(tmp_path, reference.get_vocab_size(), byte_level_writer(reference, pre, add_bos_token=False))
    for text in TEXTS:
        expected = reference.encode(text).ids
        assert tokenizer.encode(text) == expected, text
        # Words too: merges that were learnt within one word would not show that two were not split.
        words = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
        assert words == reference.pre_tokenizer.pre_tokenize_str(text)
        assert tokenizer.decode(expected) == reference.decode(expected, skip_special_tokens=False)
        if not PRE[pre][2]:
            assert tokenizer.decode(expected) == text
    assert tokenizer.decode(tokenizer.encode(TEXTS[7])) == ("café Å \ufb01" if PRE[pre][2] else TEXTS[7])


def test_the_rules_of_splitting_differ_here():
    """Else the comparison could not fail: the texts tell each rule from the next."""
    pieces = {
        pre: tuple(str(byte_level_reference(pre).pre_tokenizer.pre_tokenize_str(text)) for text in TEXTS)
        for pre in ("gpt-2", "smollm", "dbrx", "qwen2", "tekken", "gpt-4o")
    }
    assert len(set(pieces.values())) == len(pieces)


@pytest.mark.parametrize(("pre", "whole"), [("llama-bpe", True), ("tekken", True), ("dbrx", False), ("qwen2", False)])
def test_words_that_no_merges_lead_to(tmp_path, pre, whole):
    """Llama 3 and Tekken look a whole word up first; the others only merge."""
    reference = byte_level_reference(pre)
    write = byte_level_writer(reference, pre, merges=["h e"], add_bos_token=False)
    assert "hello" in reference.get_vocab()
    pieces = rebuilt(tmp_path, reference.get_vocab_size(), write).tokenize("hello")
    assert pieces == (["hello"] if whole else ["he", "l", "l", "o"])


@pytest.mark.parametrize(("pre", "adds"), [("llama-bpe", True), ("tekken", True), ("qwen2", False), ("dbrx", False)])
def test_bos_where_the_file_does_not_say(tmp_path, pre, adds):
    reference = byte_level_reference(pre)
    tokenizer = rebuilt(tmp_path, reference.get_vocab_size(), byte_level_writer(reference, pre))
    assert tokenizer.encode("h") == ([1] if adds else []) + reference.encode("h").ids


UNKNOWN, CONTROL, USER, BYTE = (
    gguf.TokenType.UNKNOWN,
    gguf.TokenType.CONTROL,
    gguf.TokenType.USER_DEFINED,
    gguf.TokenType.BYTE,
)
LLAMA2 = {"<unk>": UNKNOWN, "<s>": CONTROL, "</s>": CONTROL}
GEMMA = {
    "<pad>": CONTROL,
    "<eos>": CONTROL,
    "<bos>": CONTROL,
    "<unk>": UNKNOWN,
    "<tag>": USER,
    "  ": USER,  # the converter writes user-defined pieces with real spaces
    "▁▁▁": USER,  # and did not always
    "\n": USER,
    "\n\n": USER,
}


def sentencepiece_vocabulary(first, seed=0):
    """(token, score, type) in the order of ids. Ids do not follow scores, so that only scores give the merges."""
    learner = Tokenizer(models.BPE())
    learner.train_from_iterator((text.replace(" ", "▁") for text in CORPUS), trainers.BpeTrainer(vocab_size=330))
    learnt = sorted(learner.get_vocab(), key=learner.get_vocab().get)
    learnt = [token for token in learnt if token not in first and not set(token) & set("漢👩\x00")]
    merged = [token for token in learnt if len(token) > 1]
    merged = [(token, -float(rank), gguf.TokenType.NORMAL) for rank, token in enumerate(merged)]
    single = [(token, -1e4, gguf.TokenType.NORMAL) for token in learnt if len(token) == 1]
    rest = merged + single
    random.Random(seed).shuffle(rest)
    rest = [(f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)] + rest
    return [(token, -1000.0, kind) for token, kind in first.items()] + rest


def sentencepiece_ids(vocabulary, text, prefix):
    """SentencePiece's BPE, from its definition: whole pieces first, then the best-scored neighbours are joined."""
    ids = {token: index for index, (token, _, _) in enumerate(vocabulary)}
    scores = {token: score for token, score, kind in vocabulary if kind == gguf.TokenType.NORMAL}
    ids |= {token.replace("▁", " "): ids[token] for token, _, kind in vocabulary if kind == USER}
    whole = {t.replace("▁", " ") for t, _, kind in vocabulary if kind in (UNKNOWN, CONTROL, USER)}
    whole = sorted(whole, key=len, reverse=True)

    def bpe(part):
        symbols = list((" " + part if prefix else part).replace(" ", "▁")) if part else []
        while joins := [(-scores[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(symbols)) if a + b in scores]:
            _, best = min(joins)
            symbols[best : best + 2] = [symbols[best] + symbols[best + 1]]
        spelt = ([s] if s in scores else [f"<0x{byte:02X}>" for byte in s.encode()] for s in symbols)
        return [ids[piece] for pieces in spelt for piece in pieces]

    found, start, at = [], 0, 0
    while at < len(text):
        token = next((t for t in whole if text.startswith(t, at)), None)
        if token is None:
            at += 1
            continue
        found += [*bpe(text[start:at]), ids[token]]
        start = at = at + len(token)
    return found + bpe(text[start:])


def sentencepiece_writer(vocabulary, ids=None, prefix=None, add_bos=None, scores=True):
    tokens, values, types = zip(*vocabulary, strict=True)

    def write(writer):
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(list(tokens))
        if scores:
            writer.add_token_scores(list(values))
        writer.add_token_types(list(types))
        for role, index in (ids or {}).items():
            writer.add_uint32(f"tokenizer.ggml.{role}_token_id", index)
        if prefix is not None:
            writer.add_add_space_prefix(prefix)
        if add_bos is not None:
            writer.add_add_bos_token(add_bos)

    return write


GEMMA_IDS = {"bos": 2, "eos": 1, "unknown": 3, "padding": 0}


@pytest.mark.parametrize(
    ("first", "ids", "prefix", "bos"),
    [(LLAMA2, {}, True, 1), (GEMMA, GEMMA_IDS, False, 2)],
    ids=["llama2", "gemma"],
)
def test_sentencepiece_bpe_is_the_reference(tmp_path, first, ids, prefix, bos):
    vocabulary = sentencepiece_vocabulary(first)
    # Llama 2's files name neither: a space before the text and a <s> are what llama.cpp does without.
    write = sentencepiece_writer(vocabulary, ids, prefix=None if prefix else False)
    tokenizer = rebuilt(tmp_path, len(vocabulary), write)
    for text in [*TEXTS, "<tag>x  y\n\n\nz<tag>", "a    b     c"]:
        expected = sentencepiece_ids(vocabulary, text, prefix)
        assert tokenizer.encode(text) == [bos, *expected], text
        assert tokenizer.encode(text, add_special_tokens=False) == expected
        assert tokenizer.decode(expected) == text
    assert tokenizer.bos_token_id == bos
    assert tokenizer.tokenize("hello") == (["▁", "hello"] if prefix else ["hello"])
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("漢", add_special_tokens=False))[-3:] == [
        "<0xE6>",
        "<0xBC>",
        "<0xA2>",
    ]


@pytest.mark.parametrize(("add_bos", "prefix"), [(True, False), (False, True), (False, False)])
def test_what_the_file_says_of_bos_and_of_a_first_space_holds(tmp_path, add_bos, prefix):
    vocabulary = sentencepiece_vocabulary(LLAMA2)
    tokenizer = rebuilt(tmp_path, len(vocabulary), sentencepiece_writer(vocabulary, {}, prefix, add_bos))
    expected = sentencepiece_ids(vocabulary, "hello hello", prefix)
    assert tokenizer.encode("hello hello") == ([1] if add_bos else []) + expected
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>" if add_bos else None, "</s>")


def test_equal_scores_leave_the_order_of_ids(tmp_path):
    """Files made from tokenizer.json alone have the same score everywhere."""
    vocabulary = sentencepiece_vocabulary(LLAMA2)
    ranked = sorted(vocabulary[3:], key=lambda entry: -entry[1])
    in_order = vocabulary[:3] + ranked
    flat = [(token, -1000.0, kind) for token, _, kind in in_order]
    tokenizer = rebuilt(tmp_path, len(flat), sentencepiece_writer(flat, {}))
    for text in TEXTS:
        assert tokenizer.encode(text) == [1, *sentencepiece_ids(in_order, text, True)]


def test_scores_are_needed(tmp_path):
    vocabulary = sentencepiece_vocabulary(LLAMA2)
    with pytest.raises(UserError, match=r"lack tokenizer\.ggml\.scores"):
        rebuilt(tmp_path, len(vocabulary), sentencepiece_writer(vocabulary, {}, scores=False))


def test_gemma4_is_the_class_of_transformers(tmp_path):
    """The merges are in the file, and white space is not user-defined."""
    vocabulary = sentencepiece_vocabulary(dict(list(GEMMA.items())[:5]))
    tokens = [token for token, *_ in vocabulary]
    normal = {token for token, _, kind in vocabulary if kind == gguf.TokenType.NORMAL}
    cuts = [(token[:cut], token[cut:]) for token in tokens if token in normal for cut in range(1, len(token))]
    merges = [pair for pair in cuts if normal.issuperset(pair)]
    reference = transformers.GemmaTokenizer(vocab={token: n for n, token in enumerate(tokens)}, merges=merges)
    reference.add_tokens([AddedToken("<tag>", normalized=False)])
    as_llama = sentencepiece_writer(vocabulary, GEMMA_IDS, prefix=False, scores=False)

    def write(writer):
        as_llama(writer)
        writer.add_tokenizer_model("gemma4")
        writer.add_token_merges([" ".join(pair) for pair in merges])

    tokenizer = rebuilt(tmp_path, len(vocabulary), write)
    for text in [*TEXTS, "<tag>x  y\n\n\nz<tag>", "a    b     c"]:
        expected = reference.encode(text, add_special_tokens=False)
        assert tokenizer.encode(text) == [GEMMA_IDS["bos"], *expected], text
        assert tokenizer.decode(expected) == text


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tokenizer.ggml.model", ["gpt2"]),
        ("tokenizer.ggml.pre", ["gpt-2"]),
        ("tokenizer.ggml.tokens", 5),
        ("tokenizer.ggml.tokens", [1, 2, 3, 4]),
        ("tokenizer.ggml.token_type", "abcd"),
        ("tokenizer.ggml.merges", [1]),
        ("tokenizer.ggml.scores", [float("nan")] * 4),
        ("tokenizer.ggml.scores", ["a"] * 4),
        ("tokenizer.ggml.eos_token_id", "3"),
        ("tokenizer.ggml.eos_token_id", True),
        ("tokenizer.ggml.eos_token_id", 2.5),
        ("tokenizer.ggml.add_bos_token", "false"),
        ("tokenizer.ggml.add_space_prefix", 0),
        ("tokenizer.chat_template", 5),
    ],
)
def test_a_key_of_another_type_is_named(tmp_path, key, value):
    metadata = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": ["a", "b", "ab", "<e>"],
        "tokenizer.ggml.token_type": [1, 1, 1, 3],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.eos_token_id": 3,
    }
    assert write_tokenizer(Path("m.gguf"), metadata, tmp_path)["eos_token_id"] == 3
    with pytest.raises(UserError, match=rf"m\.gguf: {key} should be "):
        write_tokenizer(Path("m.gguf"), metadata | {key: value}, tmp_path)
