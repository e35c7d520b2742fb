"""Fits a linear map from one model's activations to another's, so that the other model's pair can explain the first.

Both models read the same texts. Where a token of each ends at the same character, both have read the same text, and the
two activations belong together. Ridge regression maps one to the other. The map carries only what the two models share:
the rest of an activation is lost, and no explanation says so.
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
from nlae_jax.lm.reading import read_tensors
from nlae_jax.lm.tensors import TensorToWrite, write_safetensors
from nlae_jax.lm.tokens import begin_ids, check_ids, pad
from nlae_jax.roles import direction
from nlae_jax.roles.language_model import LanguageModel
from nlae_jax.runtime.errors import UserError
from nlae_jax.runtime.files import local_path, read_bytes, read_fields, write_json
from nlae_jax.runtime.outside import encodable
from nlae_jax.runtime.progress import progress

ABOUT, MAP = "adapt.json", "map.safetensors"
WARNING = "an adapted pair reads what the two models share; what is the new model's own does not reach the explanations"

MAX_TOKENS = 256  # of a text, for either model, unless it can be run on fewer
MIN_POSITION = 16  # the first position that is read: earlier ones may be attention sinks
_BATCH = 8
_PENALTIES = 10.0 ** np.arange(-4, 5)  # per row, for standardised inputs
# Documents up to the first share are fitted on, those up to the second choose the penalty, the others are scored.
_SHARES = (0.8, 0.9)


@dataclasses.dataclass(frozen=True)
class Adapter:
    """Maps activations [N, d] of block `layer` of `model` to [N, e] float32 of the block that the pair `to` reads."""

    model: str
    layer: int
    to: str
    matrix: np.ndarray  # [d, e]
    mean: np.ndarray  # [d], of the inputs
    target_mean: np.ndarray  # [e]

    def __call__(self, h_NxD: np.ndarray) -> np.ndarray:
        return ((h_NxD - self.mean) @ self.matrix + self.target_mean).astype(np.float32)


def shared_ends(ends: Sequence[int], other: Sequence[int]) -> list[tuple[int, int]]:
    """Returns the pairs (index, index in `other`) of tokens that end at the same character of a text.

    `ends` and `other` hold the characters at which the tokens of two tokenisations end. Where several tokens are bytes
    of one character, the last of them ends it.
    """
    last = {end: index for index, end in enumerate(ends)}
    return [(last[end], index) for end, index in {end: index for index, end in enumerate(other)}.items() if end in last]


def tokenise(model: LanguageModel, text: str, name: str) -> tuple[list[int], list[int]]:
    """Returns a text's token ids and the characters at which they end.

    There are at most `MAX_TOKENS` of each, and no more than the model can be run on. The ids begin with the tokens that
    the tokenizer puts before a text, which end at 0. Raises UserError where the tokenizer does not report where tokens
    end.
    """
    if not model.tokenizer.is_fast:
        raise UserError(f"{name}: its tokenizer has no tokenizer.json, and does not tell where tokens end")
    encoded = model.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    begin, ends = begin_ids(model.tokenizer), [end for _, end in encoded["offset_mapping"]]
    # A text from a chat template begins with those tokens already.
    first = next((index for index, token in enumerate(encoded["input_ids"]) if token not in begin), len(ends))
    ids = [*begin, *encoded["input_ids"][first:]]
    check_ids(ids, model.arch.vocab_size, model.tokenizer, name)
    most = model.arch.within(MAX_TOKENS)
    return ids[:most], [*[0] * len(begin), *ends[first:]][:most]


def fit(h_NxD: np.ndarray, t_NxE: np.ndarray) -> Callable[[float], np.ndarray]:
    """Returns the ridge regression of targets [N, e] on inputs [N, d]: a function penalty -> matrix [d, e] float64.

    Targets are centred, inputs standardised, and the penalty is per row. One decomposition of the smaller of the two
    Gram matrices serves all penalties.
    """
    x, y = h_NxD.astype(np.float64), t_NxE.astype(np.float64)
    x = x - x.mean(0)
    scale = np.maximum(x.std(0), 1e-12)
    x, y = x / scale, y - y.mean(0)
    if x.shape[1] <= len(x):
        values, vectors = np.linalg.eigh(x.T @ x)
        projected = vectors.T @ (x.T @ y)
        solve = lambda penalty: vectors @ (projected / (values + penalty * len(x))[:, None])  # noqa: E731
    else:
        values, vectors = np.linalg.eigh(x @ x.T)
        projected = vectors.T @ y
        solve = lambda penalty: x.T @ (vectors @ (projected / (values + penalty * len(x))[:, None]))  # noqa: E731
    return lambda penalty: solve(penalty) / scale[:, None]


def scores(predicted: np.ndarray, target: np.ndarray) -> dict[str, float]:
    """Returns the FVE of directions (`fve`) and the mean cosine (`cos`) of predictions [N, e]."""
    unit = _directions(target)
    mse = np.square(_directions(predicted) - unit).mean()
    return {"fve": float(1 - mse / np.square(unit - unit.mean(0)).mean()), "cos": float(1 - mse / 2)}


def mean_scores(fitted_NxD: np.ndarray, target_NxD: np.ndarray) -> dict[str, float]:
    """Returns the scores of predicting the mean direction of the `fitted_NxD` targets.

    The mean is not renormalised for the FVE, which is therefore 0 but for chance.
    """
    mean, unit = _directions(fitted_NxD).mean(0), _directions(target_NxD)
    fve = 1 - np.square(unit - mean).mean() / np.square(unit - unit.mean(0)).mean()
    return {"fve": float(fve), "cos": float((unit @ mean).mean() / (np.linalg.norm(mean) * unit.shape[1] ** 0.5))}


def _directions(rows_NxD: np.ndarray) -> np.ndarray:
    """Scales rows to directions, as float64."""
    return np.asarray(direction.unit_direction(jnp.asarray(rows_NxD)), np.float64)


def read_pairs(
    model: LanguageModel,
    layer: int,
    other: LanguageModel,
    other_layer: int,
    documents: Sequence[Document],
    positions: int,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Reads activations [N, d] and [N, e] of the same text at up to `positions` places of each document.

    The third result is each row's document [N]. Raises UserError where the models share no such place.
    """
    rng, rows, texts = np.random.default_rng(seed), [], []
    for number, document in enumerate(documents):
        text = encodable(document.text)
        (ids, ends), (other_ids, other_ends) = tokenise(model, text, "--model"), tokenise(other, text, "--to")
        places = [pair for pair in shared_ends(ends, other_ends) if min(pair) >= MIN_POSITION]
        chosen = rng.choice(len(places), min(positions, len(places)), replace=False)
        rows += [(number, *places[index]) for index in sorted(chosen)]
        texts.append((ids, other_ids))
    if not rows:
        raise UserError(
            f"corpus: no text in which tokens of both models end together after {MIN_POSITION} tokens: use longer ones"
        )
    places_Nx3 = np.array(rows)
    with progress(2 * len(texts), "adapt", unit="text") as bar:
        model_texts, other_texts = ([pair[side] for pair in texts] for side in (0, 1))
        h_NxD = _activations(model, layer, model_texts, places_Nx3[:, [0, 1]], bar.advance)
        t_NxE = _activations(other, other_layer, other_texts, places_Nx3[:, [0, 2]], bar.advance)
        return h_NxD, t_NxE, places_Nx3[:, 0]


def _activations(
    model: LanguageModel, layer: int, texts: Sequence[list[int]], places_Nx2: np.ndarray, advance: Callable[[int], None]
) -> np.ndarray:
    """Reads the activations [N, d] float32 at the places (text, position)."""
    h_NxD = np.zeros((len(places_Nx2), model.arch.d_model), np.float32)
    order = sorted(range(len(texts)), key=lambda text: len(texts[text]))
    for start in range(0, len(order), _BATCH):
        batch = order[start : start + _BATCH]
        width = -(-max(len(texts[text]) for text in batch) // 64) * 64
        ids, lengths = pad([texts[text] for text in batch] + [[0]] * (_BATCH - len(batch)), width)
        residual = np.asarray(model.residual(ids, layer, mask=np.arange(width) < lengths[:, None]), np.float32)
        for row, text in enumerate(batch):
            of_text = np.flatnonzero(places_Nx2[:, 0] == text)
            h_NxD[of_text] = residual[row, places_Nx2[of_text, 1]]
        advance(len(batch))
    return h_NxD


def adapt(h_NxD: np.ndarray, t_NxE: np.ndarray, document_N: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
    """Fits the matrix [d, e] on the first documents, and scores it on the last ones, beside controls.

    The controls are scored on the same rows: `chance` are the predictions of other documents (for rows that can be
    exchanged with one), `mean` is the mean target, and `random_map` is a random matrix whose outputs vary as much as
    the fitted one's. Raises UserError where one of the three parts has rows of fewer than two documents.
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
    predict = lambda matrix, rows, fit_on: (h_NxD[rows] - h_NxD[fit_on].mean(0)) @ matrix + t_NxE[fit_on].mean(0)  # noqa: E731
    solve = fit(h_NxD[fitted], t_NxE[fitted])
    penalty = max(_PENALTIES.tolist(), key=lambda p: scores(predict(solve(p), chosen, fitted), t_NxE[chosen])["fve"])
    used = fitted | chosen
    matrix = fit(h_NxD[used], t_NxE[used])(penalty)
    target, predicted = t_NxE[held_out], predict(matrix, held_out, used)
    spread = predicted - t_NxE[used].mean(0)
    draw = np.random.default_rng(0).standard_normal(matrix.shape) / np.maximum(h_NxD[used].std(0), 1e-12)[:, None]
    random = (h_NxD[held_out] - h_NxD[used].mean(0)) @ draw
    random *= np.sqrt(np.square(spread).mean() / np.square(random).mean())
    other = mismatched(document_N[held_out], 0)
    differs = document_N[held_out][other] != document_N[held_out]
    return matrix, {
        "map": scores(predicted, target),
        "chance": scores(predicted[other][differs], target[differs]),
        "mean": mean_scores(t_NxE[used], target),
        "random_map": scores(random + t_NxE[used].mean(0), target),
        "penalty": float(penalty),
        "documents": int(document_N.max() + 1),
        "fitted_on": int(used.sum()),
        "held_out": int(held_out.sum()),
    }


def adapt_pair(
    model: str, layer: int, to: str, directory: Path, corpus: CorpusConfig, positions: int, dtype: str = "float32"
) -> dict[str, Any]:
    """Fits the map from block `layer` of `model` to the block that the pair `to` reads, and writes it to `directory`.

    Returns the scores of `adapt`. Raises UserError that names what does not fit.
    """
    if is_adapter(local_path(to, "--to")):
        raise UserError(f"--to {to}: a map; it should be a pair")
    decoder = open_released(to, "ar")
    base = decoder.adapters.base_model if decoder.adapters else decoder.sidecar.base_model
    if not base:
        raise UserError(f"{decoder.sidecar.path}: names no base_model, whose activations the pair reads")
    source, target = LanguageModel.from_pretrained(model, dtype), LanguageModel.from_pretrained(base, dtype)
    if not 0 <= layer < source.arch.num_layers:
        raise UserError(f"--layer: {layer} should be from 0 to {source.arch.num_layers - 1}, a block of {model}")
    documents = read_named_documents(corpus, "--texts")
    h_NxD, t_NxE, document_N = read_pairs(source, layer, target, decoder.decoder_layer, documents, positions)
    matrix, result = adapt(h_NxD, t_NxE, document_N)
    fitted = document_N < round(_SHARES[1] * (document_N.max() + 1))
    adapter = Adapter(
        _absolute_name(model),
        layer,
        _absolute_name(to),
        matrix.astype(np.float32),
        h_NxD[fitted].mean(0),
        t_NxE[fitted].mean(0),
    )
    write_adapter(directory, adapter, result)
    return result


def _absolute_name(name: str) -> str:
    """Returns the absolute path of an existing file or directory, and other names unchanged."""
    path = local_path(name, "model")
    return str(path.resolve()) if path.exists() else name


def write_adapter(directory: Path, adapter: Adapter, result: dict[str, Any]) -> None:
    """Writes the map and then the file that describes it."""
    directory.mkdir(parents=True, exist_ok=True)
    arrays = {"matrix": adapter.matrix, "mean": adapter.mean, "target_mean": adapter.target_mean}
    write_safetensors(directory / MAP, [TensorToWrite(n, a.shape, partial(np.asarray, a)) for n, a in arrays.items()])
    width, to_width = adapter.matrix.shape
    about = {"model": adapter.model, "layer": adapter.layer, "to": adapter.to, "width": width, "to_width": to_width}
    write_json(directory / ABOUT, about | {"sha256": _digest(directory / MAP)} | result)


def _digest(path: Path) -> str:
    """Returns the sha256 of the map. Raises UserError where it is missing."""
    try:
        return hashlib.sha256(read_bytes(path)).hexdigest()
    except FileNotFoundError:
        raise UserError(f"{path}: missing; {ABOUT} beside it says what it held: run `nlae adapt` again") from None


def is_adapter(directory: Path) -> bool:
    """Returns whether a directory holds a map."""
    return (directory / ABOUT).is_file()


def read_adapter(directory: Path) -> Adapter:
    """Reads a map. Raises UserError that names file and field where something is missing or does not fit."""
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
