"""A linear map from one model's activations into another's: a pair trained for the one then speaks of the other.

Both models read the same texts. Where a token of each ends at the same character, both have read the same text, and the
two activations there belong together; ridge regression maps one to the other. What the map carries is what the models
share: the rest of an activation is lost, and no explanation says so.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from nlae_jax.config import CorpusConfig
from nlae_jax.data.corpus import Document, read_named_documents
from nlae_jax.data.mismatch import mismatched
from nlae_jax.interop.released import open_released
from nlae_jax.lm.tensors import TensorToWrite, read_tensors, write_safetensors
from nlae_jax.lm.tokens import begin_ids, check_ids, pad
from nlae_jax.roles import direction
from nlae_jax.roles.language_model import LanguageModel
from nlae_jax.runtime.errors import UserError
from nlae_jax.runtime.files import local_path, read_bytes, read_fields, write_json
from nlae_jax.runtime.outside import encodable
from nlae_jax.runtime.progress import progress

ABOUT, MAP = "adapt.json", "map.safetensors"
WARNING = "an adapted pair reads what the two models share; what is the new model's own does not reach the explanations"

MAX_TOKENS = 256  # of a text that either model reads
MIN_POSITION = 16  # first that is read: the very first are attention sinks
_BATCH = 8
_PENALTIES = 10.0 ** np.arange(-4, 5)  # of standardised inputs, by row
_SHARES = (0.8, 0.9)  # of the documents: fitted on up to the first, the penalty chosen up to the second, scored beyond


@dataclasses.dataclass(frozen=True)
class Adapter:
    """Activations [N, d] of block `layer` of `model` -> [N, e] of the block that the pair `to` reads, float32."""

    model: str
    layer: int
    to: str
    matrix: np.ndarray  # [d, e]
    mean: np.ndarray  # [d]: of the inputs
    target_mean: np.ndarray  # [e]

    def __call__(self, h_NxD: np.ndarray) -> np.ndarray:
        return ((h_NxD - self.mean) @ self.matrix + self.target_mean).astype(np.float32)


def shared_ends(ends: Sequence[int], other: Sequence[int]) -> list[tuple[int, int]]:
    """Of two tokenisations of a text, by the characters at which tokens end, the tokens that end together.

    Of several tokens of one character (bytes of it) the last ends it.
    """
    last = {end: index for index, end in enumerate(ends)}
    return [(last[end], index) for end, index in {end: index for index, end in enumerate(other)}.items() if end in last]


def tokenise(model: LanguageModel, text: str, name: str) -> tuple[list[int], list[int]]:
    """A text's token ids, with what the tokenizer puts before texts, and where each ends (0 of those), up to a limit.

    Raises UserError where the tokenizer does not tell.
    """
    if not model.tokenizer.is_fast:
        raise UserError(f"{name}: its tokenizer has no tokenizer.json, and does not tell where tokens end")
    encoded = model.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    begin, ends = begin_ids(model.tokenizer), [end for _, end in encoded["offset_mapping"]]
    # A text that a chat template has made begins with those tokens already.
    own = next((index for index, token in enumerate(encoded["input_ids"]) if token not in begin), len(ends))
    ids = [*begin, *encoded["input_ids"][own:]]
    check_ids(ids, model.arch.vocab_size, model.tokenizer, name)
    return ids[:MAX_TOKENS], [*[0] * len(begin), *ends[own:]][:MAX_TOKENS]


def fit(h_NxD: np.ndarray, t_NxE: np.ndarray) -> Callable[[float], np.ndarray]:
    """Ridge regression of centred targets on standardised inputs: a penalty by row -> matrix [d, e] float64.

    One decomposition, of the smaller of the two Gram matrices, serves all penalties.
    """
    x, y = h_NxD.astype(np.float64), t_NxE.astype(np.float64)
    x = x - x.mean(0)
    scale = np.maximum(x.std(0), 1e-12)
    x, y = x / scale, y - y.mean(0)
    if x.shape[1] <= len(x):
        values, vectors = np.linalg.eigh(x.T @ x)
        seen = vectors.T @ (x.T @ y)
        solve = lambda penalty: vectors @ (seen / (values + penalty * len(x))[:, None])  # noqa: E731
    else:
        values, vectors = np.linalg.eigh(x @ x.T)
        seen = vectors.T @ y
        solve = lambda penalty: x.T @ (vectors @ (seen / (values + penalty * len(x))[:, None]))  # noqa: E731
    return lambda penalty: solve(penalty) / scale[:, None]


def scores(predicted: np.ndarray, target: np.ndarray) -> dict[str, float]:
    """`fve`, of directions as everywhere here, and the mean cosine."""
    unit = _directions(target)
    mse = np.square(_directions(predicted) - unit).mean()
    return {"fve": float(1 - mse / np.square(unit - unit.mean(0)).mean()), "cos": float(1 - mse / 2)}


def mean_scores(fitted: np.ndarray, target: np.ndarray) -> dict[str, float]:
    """The same of the mean direction that was fitted, not renormalised for the FVE, which is then 0 but for chance."""
    mean, unit = _directions(fitted).mean(0), _directions(target)
    fve = 1 - np.square(unit - mean).mean() / np.square(unit - unit.mean(0)).mean()
    return {"fve": float(fve), "cos": float((unit @ mean).mean() / (np.linalg.norm(mean) * unit.shape[1] ** 0.5))}


def _directions(rows: np.ndarray) -> np.ndarray:
    return np.asarray(direction.unit_direction(jnp.asarray(rows)), np.float64)


def read_pairs(
    model: LanguageModel,
    layer: int,
    other: LanguageModel,
    other_layer: int,
    documents: Sequence[Document],
    positions: int,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Activations [N, d] and [N, e] of the same text at up to `positions` places of each document, and whose [N]."""
    rng, rows, texts = np.random.default_rng(seed), [], []
    for number, document in enumerate(documents):
        text = encodable(document.text)
        (ids, ends), (other_ids, other_ends) = tokenise(model, text, "--model"), tokenise(other, text, "--to")
        places = [both for both in shared_ends(ends, other_ends) if min(both) >= MIN_POSITION]
        chosen = rng.choice(len(places), min(positions, len(places)), replace=False)
        rows += [(number, *places[index]) for index in sorted(chosen)]
        texts.append((ids, other_ids))
    if not rows:
        raise UserError(f"corpus: no text in which tokens of both models end together after {MIN_POSITION} tokens")
    where = np.array(rows)
    with progress(2 * len(texts), "adapt", unit="text") as bar:
        own, others = ([both[side] for both in texts] for side in (0, 1))
        h_NxD = _activations(model, layer, own, where[:, [0, 1]], bar.advance)
        return h_NxD, _activations(other, other_layer, others, where[:, [0, 2]], bar.advance), where[:, 0]


def _activations(
    model: LanguageModel, layer: int, texts: Sequence[list[int]], where: np.ndarray, tell: Callable[[int], None]
) -> np.ndarray:
    """At `where` [N, 2], (text, position): [N, d] float32."""
    found = np.zeros((len(where), model.arch.d_model), np.float32)
    order = sorted(range(len(texts)), key=lambda text: len(texts[text]))
    for start in range(0, len(order), _BATCH):
        batch = order[start : start + _BATCH]
        width = -(-max(len(texts[text]) for text in batch) // 64) * 64
        ids, lengths = pad([texts[text] for text in batch] + [[0]] * (_BATCH - len(batch)), width)
        residual = np.asarray(model.residual(ids, layer, mask=np.arange(width) < lengths[:, None]), np.float32)
        for row, text in enumerate(batch):
            own = np.flatnonzero(where[:, 0] == text)
            found[own] = residual[row, where[own, 1]]
        tell(len(batch))
    return found


def adapt(h_NxD: np.ndarray, t_NxE: np.ndarray, document_N: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
    """The matrix [d, e] fitted on the first documents, and what it is worth on the last ones, beside controls.

    Controls on the same rows: `chance`, the predictions of other documents, on the rows that meet one; `mean`, the mean
    target; `random_map`, a random matrix whose outputs vary as much as the fitted one's. Raises UserError where one of
    the three parts has rows of fewer than two documents.
    """
    first, second = (round(share * (document_N.max() + 1)) for share in _SHARES)
    fitted, chosen, held_out = (
        document_N < first,
        (document_N >= first) & (document_N < second),
        document_N >= second,
    )
    parts = [len(np.unique(document_N[part])) for part in (fitted, chosen, held_out)]
    if min(parts) < 2:
        raise UserError(
            f"corpus: documents to fit on, to choose by and to score on are {', '.join(map(str, parts))}, too few; "
            "each takes two: give at least 20"
        )
    predict = lambda matrix, rows, own: (h_NxD[rows] - h_NxD[own].mean(0)) @ matrix + t_NxE[own].mean(0)  # noqa: E731
    solve = fit(h_NxD[fitted], t_NxE[fitted])
    penalty = max(_PENALTIES.tolist(), key=lambda p: scores(predict(solve(p), chosen, fitted), t_NxE[chosen])["fve"])
    own = fitted | chosen
    matrix = fit(h_NxD[own], t_NxE[own])(penalty)
    target, predicted = t_NxE[held_out], predict(matrix, held_out, own)
    spread = predicted - t_NxE[own].mean(0)
    draw = np.random.default_rng(0).standard_normal(matrix.shape) / np.maximum(h_NxD[own].std(0), 1e-12)[:, None]
    random = (h_NxD[held_out] - h_NxD[own].mean(0)) @ draw
    random *= np.sqrt(np.square(spread).mean() / np.square(random).mean())
    other = mismatched(document_N[held_out], 0)
    apart = document_N[held_out][other] != document_N[held_out]
    return matrix, {
        "map": scores(predicted, target),
        "chance": scores(predicted[other][apart], target[apart]),
        "mean": mean_scores(t_NxE[own], target),
        "random_map": scores(random + t_NxE[own].mean(0), target),
        "penalty": float(penalty),
        "documents": int(document_N.max() + 1),
        "fitted_on": int(own.sum()),
        "held_out": int(held_out.sum()),
    }


def adapt_pair(
    model: str, layer: int, to: str, directory: Path, corpus: CorpusConfig, positions: int, dtype: str = "float32"
) -> dict[str, Any]:
    """Fits the map from block `layer` of `model` to what the pair `to` reads, and keeps it in `directory`.

    Returns the scores of `adapt`. Raises UserError, naming what does not fit.
    """
    if is_adapter(local_path(to, "--to")):
        raise UserError(f"--to {to}: a map; it should be a pair")
    decoder = open_released(to, "ar")
    base = decoder.adapters.base_model if decoder.adapters else decoder.sidecar.base_model
    if not base:
        raise UserError(f"{decoder.sidecar.path}: names no base_model, whose activations the pair reads")
    own, other = LanguageModel.from_pretrained(model, dtype), LanguageModel.from_pretrained(base, dtype)
    if not 0 <= layer < own.arch.num_layers:
        raise UserError(f"--layer: {layer} should be from 0 to {own.arch.num_layers - 1}, a block of {model}")
    documents = read_named_documents(corpus, "--texts")
    h_NxD, t_NxE, document_N = read_pairs(own, layer, other, decoder.decoder_layer, documents, positions)
    matrix, result = adapt(h_NxD, t_NxE, document_N)
    fitted = document_N < round(_SHARES[1] * (document_N.max() + 1))
    adapter = Adapter(
        _from_anywhere(model),
        layer,
        _from_anywhere(to),
        matrix.astype(np.float32),
        h_NxD[fitted].mean(0),
        t_NxE[fitted].mean(0),
    )
    write_adapter(directory, adapter, result)
    return result


def _from_anywhere(name: str) -> str:
    """A path as one that holds in any working directory; other names as they are."""
    path = local_path(name, "model")
    return str(path.resolve()) if path.exists() else name


def write_adapter(directory: Path, adapter: Adapter, result: dict[str, Any]) -> None:
    """Two files; the one that says what the other is comes last."""
    directory.mkdir(parents=True, exist_ok=True)
    arrays = {"matrix": adapter.matrix, "mean": adapter.mean, "target_mean": adapter.target_mean}
    write_safetensors(directory / MAP, [TensorToWrite(n, a.shape, partial(np.asarray, a)) for n, a in arrays.items()])
    width, to_width = adapter.matrix.shape
    about = {"model": adapter.model, "layer": adapter.layer, "to": adapter.to, "width": width, "to_width": to_width}
    write_json(directory / ABOUT, about | {"sha256": _digest(directory / MAP)} | result)


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(read_bytes(path)).hexdigest()
    except FileNotFoundError:
        raise UserError(f"{path}: missing; {ABOUT} beside it says what it held: run `nlae adapt` again") from None


def is_adapter(directory: Path) -> bool:
    return (directory / ABOUT).is_file()


def read_adapter(directory: Path) -> Adapter:
    """Raises UserError, naming the file and the field, where something is missing or does not fit."""
    kinds = {"model": str, "layer": int, "to": str, "width": int, "to_width": int, "sha256": str}
    about = read_fields(directory / ABOUT, kinds)
    width, to_width = about["width"], about["to_width"]
    if min(width, to_width) < 1 or about["layer"] < 0:
        raise UserError(f"{directory / ABOUT}: width, to_width and layer should be sizes and the number of a block")
    if is_adapter(Path(about["to"])):
        raise UserError(f"{directory / ABOUT}: to: {about['to']} is a map too; it should be a pair")
    if _digest(directory / MAP) != about["sha256"]:
        raise UserError(f"{directory / MAP}: not as {ABOUT} says (sha256); run `nlae adapt` again")
    shapes: dict[str, tuple[int, ...]] = {"matrix": (width, to_width), "mean": (width,), "target_mean": (to_width,)}
    arrays = {name: np.asarray(array) for name, array in read_tensors(directory / MAP, shapes).items()}
    return Adapter(about["model"], about["layer"], about["to"], **arrays)
