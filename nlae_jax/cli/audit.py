"""`nlae audit` compares many explanations with placebos, and `nlae compare` shows two pairs side by side."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from nlae_jax.cli.command import Command, seed, start_jax
from nlae_jax.cli.explain import add_source, check_temperature, given_texts, read_source
from nlae_jax.cli.pairs import add_pair, check_pair, check_workdir, load_pair
from nlae_jax.cli.texts import read_text
from nlae_jax.runtime.errors import UserError

if TYPE_CHECKING:
    import re
    from collections.abc import Sequence
    from pathlib import Path

    from nlae_jax.api import NLA
    from nlae_jax.explore.audit import Explanations
    from nlae_jax.explore.explain import Options
    from nlae_jax.explore.passage import Passage


def _add_audit(audit: argparse.ArgumentParser) -> None:
    add_pair(audit)
    audit.add_argument(
        "--input", required=True, help=".jsonl or .csv file of transcripts with text or messages, and optionally id"
    )
    terms = audit.add_mutually_exclusive_group()
    terms.add_argument("--terms", help="file with one term a line, to count in explanations and texts")
    terms.add_argument("--pattern", help="regular expression to count in explanations and texts")
    audit.add_argument("--every", type=int, default=1, metavar="N", help="explain every Nth token (default 1)")
    audit.add_argument("--search", help="show the explanations that contain this text")
    audit.add_argument("--placebo", action="store_true", help="compare with the explanations of other transcripts")
    audit.add_argument("--placebo-model", help="compare with another pair: a name or directory, as for --model")
    audit.add_argument("--placebo-workdir", help="compare with the pair of another run")
    audit.add_argument(
        "--seed", type=seed, default=0, help="seed of the exchange of explanations for --placebo (default 0)"
    )
    audit.add_argument("--out", help=".jsonl file for the explanations; the same command continues an unfinished file")
    audit.add_argument("--html", help="file for a page with a timeline of every term")
    audit.add_argument("--json", action="store_true", help="one JSON object on stdout")


def _run_audit(options: argparse.Namespace, _: list[str]) -> int:
    check_workdir(options)
    if options.every < 1:
        raise UserError(f"--every: {options.every} should be at least 1")
    if options.out is not None and options.out.suffix != ".jsonl":
        raise UserError(f"--out {options.out}: should be a .jsonl file")
    start_jax()
    from nlae_jax.explore.audit import audit, check_several, permuted, read_terms, unused_name
    from nlae_jax.explore.items import read_items
    from nlae_jax.explore.steer import compile_pattern

    terms: dict[str, re.Pattern[str]] = {}
    if options.terms:
        terms = read_terms(read_text(options.terms), str(options.terms))
    if (pattern := compile_pattern(None, options.pattern)) is not None:
        terms = {options.pattern: pattern}
    items = read_items(options.input)
    if options.placebo:
        check_several(item.id for item in items)
    nla = load_pair(options)
    passages = [read_source(nla, item.id, item.messages if item.text is None else item.text) for item in items]
    # Loaded before the first explanation is written: if one of these pairs did not load later, all would be lost.
    placebo_pairs = [(other, [_reread(other, passage) for passage in passages]) for other in _placebo_pairs(options)]
    explanations = _explained(nla, passages, options.every, options.out)
    placebos = {}
    if options.placebo:
        placebos["permuted"] = permuted(explanations, options.seed)
    for number, (other, reread) in enumerate(placebo_pairs):
        # A file beside --out for each placebo pair; its content names the pair.
        path = options.out and options.out.with_name(f"{options.out.stem}.placebo{number}{options.out.suffix}")
        other_explanations = _explained(other, reread, options.every, path)
        placebos[unused_name(other.name, placebos)] = [row.explanation for row in other_explanations.rows]
    report = audit(explanations, terms, placebos)
    _show_audit(nla, report, options)
    return 0


def _explained(nla: NLA, passages: Sequence[Passage], every: int, path: Path | None) -> Explanations:
    """Explains the passages. With a `path` the explanations are stored there, text by text."""
    from nlae_jax.explore.audit import explained_passages, kept_passages

    return explained_passages(nla, passages, every) if path is None else kept_passages(nla, passages, every, path)


def _placebo_pairs(options: argparse.Namespace) -> list[NLA]:
    """Loads the pairs whose explanations are placebos."""
    from nlae_jax.api import NLA

    pairs = [] if options.placebo_model is None else [NLA.from_pretrained(options.placebo_model)]
    return pairs if options.placebo_workdir is None else [*pairs, NLA.from_workdir(options.placebo_workdir)]


def _reread(other: NLA, passage: Passage) -> Passage:
    """Makes the same passage for another pair. Raises UserError where its tokenizer gives other tokens."""
    from nlae_jax.explore.passage import passage_of_ids

    reread = passage_of_ids(other.tokenizer, passage.ids, passage.text, passage.name)
    if [token.text for token in reread.tokens] != [token.text for token in passage.tokens]:
        raise UserError(f"{other.name}: its tokenizer reads {passage.name} differently; a placebo needs the same one")
    return reread


def _show_audit(nla: NLA, report: Any, options: argparse.Namespace) -> None:
    import dataclasses

    from nlae_jax.report.audit_page import audit_tables, places_table, write_audit_page
    from nlae_jax.runtime.output import show_json, show_rich
    from nlae_jax.runtime.progress import say

    row = report.row()
    hits = [dataclasses.asdict(place) for place in report.search(options.search)] if options.search else []
    if options.html:  # written first, because printing may fail
        write_audit_page(options.html, "audit", [row], f"Audit with {nla.name}")
        say(f"page: {options.html}")
    if options.json:
        show_json({**row, "search": hits, "pair": nla.description()})
    else:
        show_rich(*audit_tables(row), *([places_table(hits)] if options.search else []))


def _add_compare(compare: argparse.ArgumentParser) -> None:
    add_source(compare)
    compare.add_argument(
        "--workdir", action="append", default=[], help="the pair of the run in this workdir; give two pairs in all"
    )
    compare.add_argument("--model", action="append", default=[], help="a shipped pair, or a directory with av/ and ar/")
    compare.add_argument("--positions", help="explain only the tokens at these positions: -1, or 3,5,-2, or 10:20")
    compare.add_argument("--match", help="explain only the tokens of every occurrence of this phrase")
    compare.add_argument("--span", help="explain the mean activation of these tokens: 10:20, or a phrase of the text")
    compare.add_argument(
        "--temperature", type=float, default=0.0, help="sampling temperature; 0 takes the likeliest token (default 0)"
    )
    compare.add_argument("--html", help="file for a page of the results")
    compare.add_argument("--json", action="store_true", help="one JSON object on stdout")


def _check_compare(options: argparse.Namespace) -> str:
    count = len(options.workdir) + len(options.model)
    return "" if count == 2 else f"compare takes two pairs, each as --workdir or --model; there are {count}"


def _run_compare(options: argparse.Namespace, _: list[str]) -> int:
    texts = given_texts(options)
    check_temperature(options.temperature)
    start_jax()
    from nlae_jax.api import NLA
    from nlae_jax.explore.compare import compare
    from nlae_jax.explore.explain import Options
    from nlae_jax.explore.passage import read_chat_file
    from nlae_jax.report.audit_page import comparison_tables, write_audit_page
    from nlae_jax.runtime.output import show_json, show_rich
    from nlae_jax.runtime.progress import say

    source = read_chat_file(options.chat) if options.chat else texts[0]
    first, second = [
        *(NLA.from_workdir(workdir) for workdir in options.workdir),
        *(NLA.from_pretrained(model) for model in options.model),
    ]
    selection = options.positions, options.match, options.span
    writing: Options = Options(options.temperature)
    row = compare(first, second, source, writing, *selection).row()
    if options.html:  # written first, because printing may fail
        write_audit_page(options.html, "compare", [row], f"{first.name} and {second.name}")
        say(f"page: {options.html}")
    if options.json:
        show_json({**row, "pairs": [first.description(), second.description()]})
    else:
        show_rich(*comparison_tables(row))
    return 0


COMMANDS = (
    Command(
        "audit",
        "find words and terms in explanations that the transcripts do not contain, beside placebos",
        _add_audit,
        _run_audit,
        check=check_pair,
    ),
    Command("compare", "compare two pairs on the same tokens", _add_compare, _run_compare, check=_check_compare),
)
