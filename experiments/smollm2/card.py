"""Measures a pair on texts that it was not trained on, for its model card: docs/carried-pair.md.

    python experiments/smollm2/card.py runs/pair/texts/validation --before runs/pair/after_notes_again --out runs/card

The texts are those of texts.py, and files documentation.jsonl and passages.jsonl beside them.

It reads one activation of each document. The decoder reads the explanations as text. Every figure is the mean over
`--seeds` seeds of sampling, with an interval over documents; the seeds' own FVE stands beside it. `--before` is the
pair that the gain is measured from. The held-out texts are for the last measurement of a pair that is chosen, never for
choosing.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nlae_jax import NLA
from nlae_jax.assets import WARMSTART_NOTES
from nlae_jax.data.corpus import read_json_lines
from nlae_jax.data.mismatch import mismatched
from nlae_jax.evaluate.claims import claims, ending, parts
from nlae_jax.evaluate.estimate import estimate, fve_of, jackknifed
from nlae_jax.evaluate.health import health
from nlae_jax.evaluate.reconstruction import UNINFORMED, fve, summarise, uninformed, variances
from nlae_jax.evaluate.rows import likeliest
from nlae_jax.explore.passage import Passage, passage_of_ids
from nlae_jax.lm.tokens import begin_ids, text_ids

GROUPS = {
    "documentation": ("documentation",),
    "passages": ("passages",),
    "novels and news": ("novels", "news", "fiction"),
}
MIN_POSITION, MAX_TOKENS, LONGEST_TEXT = 5, 128, 2000  # tokens, tokens, characters
EXAMPLES, SHOWN = 20, 90  # explanations of the card, characters of their context
FIGURES = (
    ("FVE", "fve"),
    ("FVE, mean-norm", "fve_meannorm"),
    ("gain over the pair before", "fve_gain"),
    ("explanations permuted over documents", "fve_shuffled"),
    *((f"{name.removesuffix('_vector')} vector injected", f"fve_{name}") for name in UNINFORMED),
    ("first sentence alone", "fve_leading_1"),
    ("first two sentences", "fve_leading_2"),
    ("without the last sentence", "fve_without_last"),
    ("without quoted spans of the context", "fve_without_quotes"),
    ("without either", "fve_bare"),
    ("written notes through the decoder", "fve_gold"),
    ("expected tokens hold the subject's likeliest", "candidates_hold_top1"),
    ("the same, explanations permuted", "candidates_hold_top1_shuffled"),
    ("quoted last words are in the context", "ending_in_context"),
    ("the same, explanations permuted", "ending_in_context_shuffled"),
    ("quoted last words end the context", "ending_is_last"),
    ("an item of a list is repeated", "repeated_rate"),
    ("different explanations", "distinct_explanations"),
    ("different words / all words", "distinct_1"),
    ("the same of pairs of words", "distinct_2"),
    ("the same of triples of words", "distinct_3"),
    ("words that the explanation before does not have", "changed_words"),
    ("expected tokens that the explanation before does not have", "changed_candidates"),
    ("explanations with the marker", "marker_rate"),
    ("explanations with Chinese, Japanese or Korean signs", "cjk_rate"),
    ("closed explanations", "extraction_rate"),
)


class Place(NamedTuple):
    """A text up to the token whose activation is read, and the written note of it where there is one."""

    context: Passage
    document: str
    note: str = ""


def main() -> None:
    arguments = parsed()
    domains_needed = [domain for domains in GROUPS.values() for domain in domains]
    if missing := [name for name in domains_needed if not (Path(arguments.texts) / f"{name}.jsonl").exists()]:
        raise SystemExit(f"{arguments.texts}: should hold {', '.join(f'{name}.jsonl' for name in missing)}")
    after = NLA.from_pretrained(arguments.pair)
    before = NLA.from_pretrained(arguments.before) if arguments.before else after
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    card = {}
    for group, domains in GROUPS.items():
        places = drawn(after, Path(arguments.texts), domains, arguments.activations)
        card[group] = measured(after, before, places, arguments.seeds, arguments.temperature)
        (out / "card.json").write_text(json.dumps(card, indent=1, ensure_ascii=False))
    lines = [*table(card), "", *examples(card)]
    (out / "card.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", help="directory of DOMAIN.jsonl files with rows of id and text")
    parser.add_argument("--pair", default="smollm2-135m")
    parser.add_argument("--before", default="", help="the pair that the gain is measured from")
    parser.add_argument("--out", required=True)
    parser.add_argument("--activations", type=int, default=64, help="of each group of domains")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--temperature", type=float, default=0.6)
    return parser.parse_args()


def drawn(nla: NLA, texts: Path, domains: Sequence[str], count: int) -> list[Place]:
    """`count` places of as many documents. Passages that have written notes are read where a note was written."""
    rng = np.random.default_rng(0)
    begin = begin_ids(nla.tokenizer)
    documents = [(domain, row) for domain in domains for _, row in read_json_lines(texts / f"{domain}.jsonl")]
    noted = defaultdict(list)
    for _, row in read_json_lines(WARMSTART_NOTES):
        noted[row["passage"]].append(row)
    places: list[Place] = []
    for index in rng.permutation(len(documents))[:count]:
        domain, row = documents[index]
        note = ""
        if notes := noted[row["id"]] if domain == "passages" else []:
            row = notes[rng.integers(len(notes))]
            ids, note = text_ids(nla.tokenizer, row["text"], begin), row["note"]
        else:
            ids = text_ids(nla.tokenizer, row["text"][:LONGEST_TEXT], begin)
            ids = ids[: 1 + rng.integers(min(MIN_POSITION, len(ids) - 1), min(MAX_TOKENS, len(ids)))]
        context = passage_of_ids(nla.tokenizer, ids, nla.tokenizer.decode(ids, skip_special_tokens=True))
        places.append(Place(context, f"{domain} {index}", note))
    return places


def read(nla: NLA, places: Sequence[Place]) -> tuple[np.ndarray, list[str]]:
    """The activations [N, d] at the ends of the places, and the tokens that the subject thinks likeliest to follow."""
    h_NxD = np.stack([activations_TxD[-1] for activations_TxD in nla.read([place.context for place in places])])
    ranked = likeliest(nla.subject, [[place.context.ids] for place in places], 1)
    return h_NxD, [tokens[0] for (tokens,) in ranked]


def share_of_last(texts: Sequence[str], contexts: Sequence[str]) -> float:
    """The share of the explanations with quoted last words whose context ends with these words."""
    quoted = [(span.strip(), context) for text, context in zip(texts, contexts, strict=True) if (span := ending(text))]
    found = [span and context.rstrip().casefold().endswith(span.casefold()) for span, context in quoted]
    return float(np.mean([bool(last) for last in found])) if found else float("nan")


def measured(after: NLA, before: NLA, places: list[Place], seeds: int, temperature: float) -> dict[str, Any]:
    """The figures of `FIGURES` as means over seeds, with intervals over documents and the explanations of one seed."""
    h_NxD, expected = read(after, places)
    documents = np.array([place.document for place in places])
    runs = [of_seed(after, before, h_NxD, places, documents, temperature, seed) for seed in range(seeds)]
    mse = {name: np.mean([errors[name] for errors, _ in runs], axis=0) for name in runs[0][0]}
    notes = [place.note for place in places]
    mse["gold"] = np.where([bool(note) for note in notes], after.score_written(notes, h_NxD)[0], np.nan)
    variance = variances(h_NxD)
    figures = summarise(h_NxD, documents, mse, 2000, 0)
    figures["fve_of_seeds"] = [fve(errors["after"], variance) for errors, _ in runs]
    for name in mse.keys() - {"after", "before", "text"}:
        figures[f"fve_{name}_ci95"] = estimate(np.stack([mse[name], variance], -1), documents, fve_of)["ci95"]
    mean_norm = np.full(len(places), mse["after"].mean() / (1 - figures["fve_meannorm"]))
    figures["fve_meannorm_ci95"] = estimate(np.stack([mse["after"], mean_norm], -1), documents, fve_of)["ci95"]
    figures |= shares(after, [texts for _, texts in runs], places, documents, expected)
    figures["examples"] = [
        {"context": place.context.text, "likeliest": token, "explanation": text, "cos": float(1 - error / 2)}
        for place, token, text, error in zip(places, expected, runs[0][1], runs[0][0]["after"], strict=True)
    ]
    return figures


def shares(
    nla: NLA, texts_of_seeds: list[list[str]], places: list[Place], documents: np.ndarray, expected: list[str]
) -> dict[str, Any]:
    """The shares of `health` and `claims` as means over seeds, with intervals from leaving out documents."""
    contexts = [place.context.text for place in places]

    @functools.cache
    def of_rows(rows: tuple[int, ...]) -> dict[str, float]:
        found = []
        for seed, texts in enumerate(texts_of_seeds):
            kept, kept_contexts = ([values[row] for row in rows] for values in (texts, contexts))
            other = mismatched(documents[list(rows)], seed)
            measured = health(kept, nla.protocol.marker)
            measured |= claims(kept, kept_contexts, [expected[row] for row in rows], list(other))
            measured |= {"ending_is_last": share_of_last(kept, kept_contexts)}
            found.append(measured | {"extraction_rate": float(np.mean([bool(text) for text in kept]))})
        names = set.intersection(*map(set, found))
        return {name: float(np.mean([measured[name] for measured in found])) for name in names}

    figures: dict[str, Any] = {}
    for name, value in of_rows(tuple(range(len(places)))).items():
        figures[name] = value
        statistic = lambda rows, name=name: of_rows(tuple(rows.tolist())).get(name)  # noqa: E731
        figures[f"{name}_ci95"] = jackknifed(statistic, documents, limits=(0.0, 1.0))["ci95"]
    return figures


def of_seed(
    after: NLA,
    before: NLA,
    h_NxD: np.ndarray,
    places: list[Place],
    documents: np.ndarray,
    temperature: float,
    seed: int,
) -> tuple[dict[str, np.ndarray], list[str]]:
    """(mse [N] by name, explanations) of one seed of sampling."""
    contexts = [place.context.text for place in places]

    def explained(nla: NLA, vectors_NxD: np.ndarray) -> list[str]:
        return nla.explain(vectors_NxD, temperature, nla.max_new_tokens, seed)

    def errors(nla: NLA, texts: Sequence[str]) -> np.ndarray:
        return nla.score_written(texts, h_NxD)[0]

    texts = explained(after, h_NxD)
    by_part: dict[str, list[str]] = defaultdict(list)
    for text, context in zip(texts, contexts, strict=True):
        for name, part in parts(text, context).items():
            by_part[name].append(part)
    other = mismatched(documents, seed)
    after_N = errors(after, texts)
    return {
        "after": after_N,
        "text": after_N,
        "before": after_N if before is after else errors(before, explained(before, h_NxD)),
        "shuffled": errors(after, [texts[index] for index in other]),
        **{name: errors(after, explained(after, vectors)) for name, vectors in uninformed(h_NxD, seed).items()},
        **{name: errors(after, found) for name, found in by_part.items()},
    }, texts


def table(card: dict[str, Any]) -> list[str]:
    """The figures as a Markdown table, one column for each group."""
    lines = ["| | " + " | ".join(card) + " |", "|---" * (len(card) + 1) + "|"]
    counts = [f"{figures['num_activations']}" for figures in card.values()]
    lines.append("| activations, one of each document | " + " | ".join(counts) + " |")
    for name, key in FIGURES:
        lines.append(f"| {name} | " + " | ".join(shown(figures, key) for figures in card.values()) + " |")
    seeds = [", ".join(f"{value:.3f}" for value in figures["fve_of_seeds"]) for figures in card.values()]
    return [*lines, "| FVE of each seed | " + " | ".join(seeds) + " |"]


def shown(figures: dict[str, Any], key: str) -> str:
    if (value := figures.get(key)) is None:
        return "–"
    interval = figures.get(f"{key}_ci95")
    return f"{value:.3f}" + (f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else "")


def examples(card: dict[str, Any]) -> list[str]:
    """The first explanations of passages, which the package carries, as a Markdown table."""
    lines = ["| text, its end | likeliest next token | explanation | cos |", "|---|---|---|---|"]
    for row in card["passages"]["examples"][:EXAMPLES]:
        end = ("… " if len(row["context"]) > SHOWN else "") + row["context"][-SHOWN:]
        cells = (cell(end), f"`{cell(row['likeliest'])}`", cell(row["explanation"]), f"{row['cos']:.2f}")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    main()
