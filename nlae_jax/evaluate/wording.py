"""Splits a text into words, sentences, lists and quoted spans, and finds what it repeats."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from itertools import pairwise

from nlae_jax.data.english import FUNCTION_WORDS

_HANGUL = "\u1100-\u11ff\u3130-\u318f\ua960-\ua97f\uac00-\ud7ff\uffa0-\uffdc"  # Korean, with spaces between words
_UNSPACED = (
    "\u3040-\u312f\u31a0-\u31bf\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
)
_CJK = _HANGUL + _UNSPACED
_CJK_CHARACTER = re.compile(f"[{_CJK}]")
_UNSPACED_CHARACTER = re.compile(f"[{_UNSPACED}]")
# The pattern of a quoted span with its marks.
QUOTED = '"[^"\n]{0,80}"|“[^”\n]{0,80}”'
# Most CJK scripts put no spaces between words, so each of their characters counts as a word.
_WORD = re.compile(f"[{_CJK}]|[^\\W_{_CJK}]+(?:['’][^\\W_{_CJK}]+)*")
_CJK_PAIR = re.compile(f"(?=([{_CJK}]{{2}}))")
_PIECE = re.compile(f"[{_CJK}]|[^\\s{_CJK}]+")
_SENTENCE_END = r"[.!?](?=[\s\"”’')\]]|$)|[。！？\n]"
_SENTENCE_PART = re.compile(f"(?:{QUOTED})|({_SENTENCE_END})")
_LIST_UNIT = re.compile(rf"{QUOTED}|\w+(?:['’./-]\w+)*|[^\w\s]|\n")
_SEPARATORS = frozenset((",", "、", "，", "&", "or", "and", "nor"))
_QUOTES = '"“'
# A sentence says what comes next if this is in it, where "" stands for each of its quotations. "It follows", "it
# continues" and "likely a letter" are left out, because they may be about what came before.
_OF_NEXT = re.compile(
    r"""
    \bnext\b(?!\ to\b)
    | (?<!\bas\ ) \bexpect(?:s|ed|ing)?\b
    | \bpredict(?:s|ed|ing|ions?)?\b
    | \blikeliest\b
    | \blikely\ (?:(?:to\ be|is|are|either|the|words?|tokens?|candidates?)\ )* ""
    | ""\ (?:is|are|seems?)\ (?:\w+\ )?likely\b
    | \b(?:to|can|could|may|might|must|should|will|would|likely)\ (?:be\ followed\ by|follow|continue)\b
    | \bwhat\ follows\ (?:is|are|may|might|will)\b
    | ""\ follows?\ *(?:[.,;]|$)
    | \bcontinues?\ (?:with|as|by)\b
    | \bcontinuations?\b(?!\ of\b)
    """,
    re.IGNORECASE | re.VERBOSE,
)
_LIST_ENDS = frozenset(".!?。！？\n;:()[]{}—–")


def words(text: str) -> list[str]:
    """Returns the words of a text, case-folded. Each CJK character is a word."""
    return [word.casefold() for word in _WORD.findall(text)]


def cjk_pairs(text: str) -> set[str]:
    """Returns the pairs of neighbouring CJK characters in a text. In scripts without spaces, a pair is about a word."""
    return set(_CJK_PAIR.findall(text))


def pieces(text: str) -> list[str]:
    """Splits a text at spaces. Punctuation stays with its word. Each CJK character is a piece."""
    return _PIECE.findall(text)


def joined(parts: Sequence[str]) -> str:
    """Joins pieces to a text, with a space between two pieces unless one of them is CJK."""
    text = "".join(parts[:1])
    for before, part in pairwise(parts):
        text += part if has_cjk(before) or has_cjk(part) else f" {part}"
    return text


def sentences(text: str) -> list[str]:
    """Splits a text into sentences, after each `.`, `!`, `?` or line break. Marks inside quotations end no sentence."""
    ends = [match.end() for match in _SENTENCE_PART.finditer(text) if match[1]]
    return [text[start:end] for start, end in zip([0, *ends], [*ends, len(text)], strict=True)]


def real_sentences(text: str) -> list[str]:
    """Returns the sentences of a text that are not blank. Blank lines are added to the sentence before them."""
    kept: list[str] = []
    for sentence in sentences(text):
        if kept and not (sentence.strip() and kept[-1].strip()):
            kept[-1] += sentence
        else:
            kept.append(sentence)
    return [sentence for sentence in kept if sentence.strip()]


def candidates(text: str) -> list[str]:
    """Returns the next tokens that the text names: the quoted items of its first sentence, without their marks.

    `Next comes "a", "b" or a new line.` and `"a" or "b", then the verb.` both give a and b.
    """
    return _quoted_items(sentences(text)[0])


def _quoted_items(sentence: str) -> list[str]:
    """Returns the quoted spans of a sentence without their marks. Blank ones are left out."""
    return [item for quoted in re.findall(QUOTED, sentence) if (item := quoted[1:-1].strip())]


def named_next(text: str) -> list[str]:
    """Returns the next tokens that a text names, wherever it names them: the quoted items of its `naming_sentence`."""
    number = naming_sentence(text)
    return [] if number is None else _quoted_items(real_sentences(text)[number])


def naming_sentence(text: str) -> int | None:
    """Returns the number, among the `real_sentences` of a text, of the one that names the next tokens, or None.

    It is the first sentence if that quotes something. Otherwise it is the first sentence that quotes something and
    says what comes next, as in `A recipe. The next word may be "salt" or "oil".`
    """
    for number, sentence in enumerate(real_sentences(text)):
        if _quoted_items(sentence) and (number == 0 or _OF_NEXT.search(re.sub(QUOTED, '""', sentence))):
            return number
    return None


def has_repeated_sentence(text: str) -> bool:
    """Returns whether two sentences of at least two words have the same words in the same order."""
    long = [tuple(found) for sentence in sentences(text) if len(found := words(sentence)) > 1]
    return len(set(long)) < len(long)


# --- lists

_Item = tuple[str, ...]  # an item of a list, as case-folded words and as quoted strings with their marks


def _lists(text: str) -> Iterator[list[_Item]]:
    """Yields the items of every list in the text.

    A list is a stretch of text between full stops, colons, brackets or similar marks. Commas, "and" and "or" separate
    its items. A stretch without such a separator is a list of one item.
    """
    items: list[list[str]] = [[]]
    for unit in [*_LIST_UNIT.findall(text), "\n"]:
        if unit in _LIST_ENDS:
            if kept := [tuple(item) for item in items if item]:
                yield kept
            items = [[]]
        elif unit.casefold() in _SEPARATORS:
            items.append([])
        else:
            items[-1].append(unit if unit[0] in _QUOTES else unit.casefold())


def _most_allowed(name: _Item) -> float:
    """Returns how often a list may contain the item `name`.

    Idioms such as "again and again" repeat function words, and arrays repeat numbers.
    """
    if not any(character.isalpha() for unit in name for character in unit):
        return math.inf
    return 2 if all(unit in FUNCTION_WORDS for unit in name) else 1


def _count(name: _Item, items: list[_Item]) -> int:
    """Returns how often a list contains the item `name`.

    The first item also holds the words before the list, and the last item the words after it. For example, `The text is
    about cats, dogs and cats again` contains cats twice.
    """
    first, last = items[0], items[-1]
    ends_first = first != name and first[-len(name) :] == name
    begins_last = last != name and last[: len(name)] == name
    return items.count(name) + ends_first + begins_last


def _has_repetition(items: list[_Item]) -> bool:
    """Returns whether a list has a quoted string in two of its items, or contains an item too often."""
    quoted = [unit for item in items for unit in set(item) if unit[0] in _QUOTES and len(unit) > 1]
    # The last word of the first item may be the list's first name. With two items this is unclear, because a single
    # comma may also join two clauses.
    names = {*items, items[0][-1:]} if len(items) > 2 else set(items)
    return len(set(quoted)) < len(quoted) or any(_count(name, items) > _most_allowed(name) for name in names)


def has_repeated_item(text: str) -> bool:
    """Returns whether a list in the text repeats an item, or the text has a word three times in a row.

    Repetitions are `"of", "of" or "of"`, `"of" or then "of"`, `platform, platform and platform`,
    `about cats and cats` and `data data data`. Function words count from the third time on, and numbers may repeat, so
    `more and more` and `0, 0, 1` are no repetitions.
    """
    for items in _lists(text):
        if len(items) > 1 and _has_repetition(items):
            return True
        for item in items:
            for a, b, c in zip(item, item[1:], item[2:], strict=False):
                if a == b == c and any(character.isalpha() for character in a):
                    return True
    return False


def has_repetition(text: str) -> bool:
    """Returns whether the text repeats an item of a list or a sentence."""
    return has_repeated_item(text) or has_repeated_sentence(text)


def has_cjk(text: str) -> bool:
    """Returns whether the text has a Chinese, Japanese or Korean character."""
    return _CJK_CHARACTER.search(text) is not None


def has_unspaced(text: str) -> bool:
    """Returns whether the text has a Chinese or Japanese character, of scripts that put no spaces between words."""
    return _UNSPACED_CHARACTER.search(text) is not None
