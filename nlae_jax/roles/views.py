"""The sentences and quoted strings of an explanation, found on its tokens.

They are used to choose the part of an explanation that the decoder reads, and to count repetitions.

If only whole explanations are scored, the encoder learns to quote the last words of the context and nothing else,
because these words alone rebuild much of the activation. In the decoder's warm start and in RL, the decoder therefore
reads only a part of some explanations of every batch.

A string that a sentence quotes twice (`"of", "of" or "the"`) adds nothing the second time. Neither does a word that a
list names twice (`about cats and cats`). RL may charge for both, and for a quotation that does not end.
"""

from __future__ import annotations

import re
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nlae_jax.config import Config, ViewsConfig

_STOPS = (".", "!", "?", "。", "！", "？")
_CLOSERS = "\"')]”’»"
_MARKS = '"“”'
_AT_MARKS = re.compile(f"[{_MARKS}]")
_MOST_MARKS = 32  # repeated strings are searched among the first 32 quotation marks; written notes have ten at most
_MOST_ITEMS = 64  # repeated words are searched among the first 64 items
_SEPARATORS = frozenset((",", ";", ":", "and", "or", "nor", "&"))


class Marks(NamedTuple):
    """Tables over the V tokens of a vocabulary.

    `quotes` counts the quotation marks in a token. `stops` says whether a token can end a sentence. `pieces` holds
    three hashes: of the text before the token's first mark, between its first two marks, and after its last mark.
    `words` holds a hash of the token's text without case. `spaces` says whether the token has white space at its
    beginning and at its end, and `separates` whether it stands between two items of a list.
    """

    quotes: jax.Array | np.ndarray  # [V] int32
    stops: jax.Array | np.ndarray  # [V] bool
    pieces: jax.Array | np.ndarray  # [V, 3] uint32; 0 for a text of nothing but white space
    words: jax.Array | np.ndarray  # [V] uint32; 0 for a text without letters
    spaces: jax.Array | np.ndarray  # [V, 2] bool
    separates: jax.Array | np.ndarray  # [V] bool


def marks(tokenizer: Any, vocab_size: int) -> Marks:
    """Builds the tables of a tokenizer. Ids that the tokenizer does not know get zeros."""
    tables = no_marks(vocab_size)
    num_tokens = min(len(tokenizer), vocab_size)
    for token, text in enumerate(tokenizer.batch_decode([[token] for token in range(num_tokens)])):
        first, *rest = _AT_MARKS.split(text)
        tables.quotes[token] = len(rest)
        tables.pieces[token] = [_hash(first), _hash(rest[0] if len(rest) > 1 else ""), _hash(rest[-1] if rest else "")]
        tables.stops[token] = text.strip().rstrip(_CLOSERS).endswith(_STOPS)
        tables.words[token] = _hash(text.casefold()) if any(character.isalpha() for character in text) else 0
        tables.spaces[token] = text[:1].isspace(), text[-1:].isspace()
        tables.separates[token] = text.strip().casefold() in _SEPARATORS
    return tables


def no_marks(vocab_size: int) -> Marks:
    """Returns the tables of a vocabulary without quotation marks, stops and words."""
    return Marks(
        quotes=np.zeros(vocab_size, np.int32),
        stops=np.zeros(vocab_size, bool),
        pieces=np.zeros((vocab_size, 3), np.uint32),
        words=np.zeros(vocab_size, np.uint32),
        spaces=np.zeros((vocab_size, 2), bool),
        separates=np.zeros(vocab_size, bool),
    )


def reads_marks(config: Config) -> bool:
    """Returns whether a run needs the tables: to show the decoder a part, or to charge for quotations."""
    return config.views != ViewsConfig() or config.rl.repeat_penalty > 0


def _hash(text: str) -> int:
    return zlib.crc32(text.strip().encode()) if text.strip() else 0


def sentences(ids_NxT: jax.Array, length_N: jax.Array, tables: Marks) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns each token's sentence number [N, T] int32 from 0, whether it is quoted [N, T] bool, and the counts [N].

    The counts are of the sentences in each row. A token is quoted if it stands between quotation marks or holds one.
    A sentence ends with a stop outside of quotation marks.
    """
    valid = jnp.arange(ids_NxT.shape[1]) < length_N[:, None]
    marks_NxT = jnp.where(valid, tables.quotes[ids_NxT], 0)
    after = jnp.cumsum(marks_NxT, axis=1) % 2 == 1
    before = (jnp.cumsum(marks_NxT, axis=1) - marks_NxT) % 2 == 1
    quoted = valid & (before | after | (marks_NxT > 0))
    ends = valid & tables.stops[ids_NxT] & ~after
    sentence = jnp.cumsum(ends, axis=1) - ends
    count = jnp.max(jnp.where(valid, sentence, -1), axis=1) + 1
    return sentence.astype(jnp.int32), quoted, count


def repeated_strings(ids: jax.Array, length: jax.Array, tables: Marks) -> jax.Array:
    """Counts each explanation's quoted strings that their sentence has quoted before: ids [..., T] -> [...] int32.

    The white space around a string does not count. Strings are compared by the sum of their tokens' hashes.
    """
    ids_NxT, length_N = ids.reshape(-1, ids.shape[-1]), length.reshape(-1)
    sentence, _, _ = sentences(ids_NxT, length_N, tables)
    valid = jnp.arange(ids_NxT.shape[1]) < length_N[:, None]
    marks_NxT = jnp.where(valid, tables.quotes[ids_NxT], 0)
    after = jnp.cumsum(marks_NxT, axis=1)
    before = after - marks_NxT
    pieces = jnp.where(valid[..., None], jnp.asarray(tables.pieces)[ids_NxT], 0)
    # Piece number m stands behind m marks; those of odd number are quoted, and closed where there are more marks.
    number = jnp.arange(_MOST_MARKS)
    places = jnp.stack([before, before + 1, after], axis=-1)
    holds = places[..., None] == number  # [N, T, 3, M]
    holds &= jnp.stack([valid, marks_NxT > 1, marks_NxT > 0], axis=-1)[..., None]
    total = jnp.where(holds, pieces[..., None], 0).sum((1, 2), dtype=jnp.uint32)[:, 1::2]
    sentence_of_string = jnp.max(jnp.where(holds, sentence[..., None, None], -1), (1, 2))[:, 1::2]
    closed = number[1::2] < after[:, -1:]
    same = (total[:, :, None] == total[:, None, :]) & (sentence_of_string[:, :, None] == sentence_of_string[:, None, :])
    earlier = closed[:, None, :] & (number[:, None] > number)[1::2, 1::2]
    repeated = closed & (total > 0) & (same & earlier).any(-1)
    return repeated.sum(1).astype(jnp.int32).reshape(length.shape)


def repeated_words(ids: jax.Array, length: jax.Array, tables: Marks) -> jax.Array:
    """Counts each explanation's items of one word that end an item before them: ids [..., T] -> [...] int32.

    `It mentions cats, dogs and cats` has one: the first item is `It mentions cats`. Separators, quoted strings and ends
    of sentences stand between items. Items are compared within their sentence, without case. Idioms such as `more and
    more` count too.
    """
    ids_NxT, length_N = ids.reshape(-1, ids.shape[-1]), length.reshape(-1)
    width = ids_NxT.shape[1]
    sentence_NxT, quoted_NxT, _ = sentences(ids_NxT, length_N, tables)
    valid_NxT = jnp.arange(width) < length_N[:, None]
    between_NxT = quoted_NxT | jnp.asarray(tables.separates)[ids_NxT]
    holds_letters = valid_NxT & ~between_NxT & (jnp.asarray(tables.words)[ids_NxT] > 0)
    # An item is the tokens between two places; the sentence's number is added, so that its end is such a place too.
    item_NxT = jnp.cumsum(between_NxT, axis=1) + sentence_NxT
    count = min(2 * width, _MOST_ITEMS)
    in_item = (item_NxT[:, :, None] == jnp.arange(count)) & holds_letters[:, :, None]  # [N, T, M]
    place = jnp.arange(width)[:, None]
    first = jnp.min(jnp.where(in_item, place, width), axis=1)
    spaces_NxTx2 = jnp.asarray(tables.spaces)[ids_NxT]
    begins = spaces_NxTx2[..., 0] | jnp.roll(spaces_NxTx2[..., 1], 1, axis=1)
    begins_item = place == first[:, None]
    last_word = jnp.max(jnp.where(in_item & (begins[:, :, None] | begins_item), place, -1), axis=1)
    hashes = jnp.asarray(tables.words)[ids_NxT][:, :, None]
    word_NxM = jnp.where(in_item & (place >= last_word[:, None]), hashes, 0).sum(1, dtype=jnp.uint32)
    sentence_NxM = jnp.max(jnp.where(in_item, sentence_NxT[:, :, None], -1), axis=1)
    same = (word_NxM[:, :, None] == word_NxM[:, None, :]) & (sentence_NxM[:, :, None] == sentence_NxM[:, None, :])
    earlier = jnp.tril(jnp.ones((count, count), bool), -1)
    repeated = (last_word >= 0) & (last_word == first) & (same & earlier & (word_NxM > 0)[:, None]).any(-1)
    return repeated.sum(1).astype(jnp.int32).reshape(length.shape)


def open_quotations(ids: jax.Array, length: jax.Array, tables: Marks) -> jax.Array:
    """Returns 1 for each explanation with an odd number of quotation marks, else 0: ids [..., T] -> [...] int32.

    A quotation does not end there. Two such quotations in one explanation are not found. Without a charge for open
    quotations, an encoder that is charged for repeated strings leaves marks out to escape the charge.
    """
    valid = jnp.arange(ids.shape[-1]) < length[..., None]
    return jnp.where(valid, tables.quotes[ids], 0).sum(-1).astype(jnp.int32) % 2


def keep(ids_NxT: jax.Array, length_N: jax.Array, kept_NxT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Moves the tokens that `kept` [N, T] bool marks to the left of their row, and puts zeros after them.

    Returns the moved ids [N, T] and the number of kept tokens of each row [N].
    """
    selected = kept_NxT & (jnp.arange(ids_NxT.shape[1]) < length_N[:, None])
    order = jnp.argsort(~selected, axis=1, stable=True)
    length = selected.sum(1).astype(length_N.dtype)
    moved = jnp.take_along_axis(ids_NxT, order, axis=1)
    return jnp.where(jnp.arange(ids_NxT.shape[1]) < length[:, None], moved, 0), length


def shown(
    ids_BxGxT: jax.Array, length_BxG: jax.Array, tables: Marks | None, config: ViewsConfig
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Returns the tokens [B, G, T] that the decoder sees, their lengths [B, G], and the activations [B] it sees whole.

    Without `tables` or with the default `config`, the decoder sees everything and the third result is None.

    The decoder sees only the first sentences of the explanations of the first activations in the batch, which are the
    share `leading`. At least one sentence stays. If there are several, at least one is removed. The number of remaining
    sentences is spread evenly over these activations. For half of these activations and for others, together the share
    `unquoted`, the quotations are removed. All samples of an activation share a view, so their rewards can be compared.
    Batches are drawn at random, so it does not matter which activations are chosen.
    """
    if tables is None or config == ViewsConfig():
        return ids_BxGxT, length_BxG, None
    batch, group, width = ids_BxGxT.shape
    cut, unquoted = round(config.leading * batch), round(config.unquoted * batch)
    row = jnp.arange(batch)
    is_cut = row < cut
    is_unquoted = (row >= cut // 2) & (row < cut // 2 + unquoted)
    ids, length = ids_BxGxT.reshape(-1, width), length_BxG.reshape(-1)
    sentence, quoted, count = sentences(ids, length, tables)
    per_sample = lambda x: jnp.repeat(x, group)  # noqa: E731
    left = 1 + jnp.floor(per_sample((row + 0.5) / max(cut, 1)) * (count - 1)).astype(jnp.int32)
    view = ~(per_sample(is_cut)[:, None] & (sentence >= left[:, None])) & ~(per_sample(is_unquoted)[:, None] & quoted)
    ids, length = keep(ids, length, view)
    return ids.reshape(ids_BxGxT.shape), length.reshape(length_BxG.shape), ~(is_cut | is_unquoted)
