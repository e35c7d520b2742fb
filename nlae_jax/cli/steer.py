"""`nlae steer`: measures the effect of an edited explanation on the model's continuations."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from nlae_jax.cli.command import Command, seed, start_jax
from nlae_jax.cli.explain import add_source, check_temperature, given_texts, read_source
from nlae_jax.cli.pairs import add_pair, check_pair, check_workdir, load_pair
from nlae_jax.cli.texts import argument_text
from nlae_jax.runtime.errors import UserError

if TYPE_CHECKING:
    import re
    from pathlib import Path

    from nlae_jax.api import NLA
    from nlae_jax.explore.passage import Passage
    from nlae_jax.explore.steer import SteerReport, SteerSettings


_ALPHAS = (
    "lengths of the push, relative to the activation's norm (default 0.15,0.25,0.35); with several, the verdict uses "
    "the length with most hits of the edit, which favours the edit; a single length gives a fair comparison"
)


def _add(steer: argparse.ArgumentParser) -> None:
    add_pair(steer)
    add_source(steer, prompts=True)
    steer.add_argument("--at", help="tokens to push: -1, 3,5, 10:20, or a phrase of the text (default: the last 8)")
    steer.add_argument("--edit", help="the edited explanation")
    steer.add_argument(
        "--original",
        action="append",
        help="explanation before the edit (default: the encoder's); repeat the option to subtract the mean of several",
    )
    counted = steer.add_mutually_exclusive_group()
    counted.add_argument("--word", help="count the continuations that contain this word")
    counted.add_argument("--pattern", help="count the continuations that match this regular expression")
    steer.add_argument("--alphas", default="0.15,0.25,0.35", help=_ALPHAS)
    steer.add_argument("--generated", action="store_true", help="push the generated tokens as well")
    steer.add_argument(
        "--controls", type=int, default=3, help="random directions of the same length (at least 3, default 3)"
    )
    steer.add_argument("--samples", type=int, default=8, help="continuations of each condition (default 8)")
    steer.add_argument("--tokens", type=int, default=32, help="tokens of a continuation (default 32)")
    steer.add_argument("--temperature", type=float, default=1.0, help="temperature of the continuations (default 1)")
    steer.add_argument(
        "--seed", type=seed, default=0, help="seed of the continuations and the random directions (default 0)"
    )
    steer.add_argument("--html", help="file for a page of the results")
    steer.add_argument("--json", action="store_true", help="one JSON object on stdout")


def _check(options: argparse.Namespace) -> str:
    if bool(options.input) == bool(options.edit):
        return "steer takes --edit, or --input with an edit on every line"
    if options.input and (options.at or options.original or options.word or options.pattern):
        return "--input brings at, original, word and pattern with every line"
    return check_pair(options)


def _run(options: argparse.Namespace, _: list[str]) -> int:
    check_workdir(options)
    texts = given_texts(options)
    check_temperature(options.temperature)
    start_jax()
    from nlae_jax.explore.passage import read_chat_file
    from nlae_jax.explore.steer import steer

    settings = _settings(options)
    if options.input:
        lines = _lines(options.input)
    else:
        source = read_chat_file(options.chat) if options.chat else texts[0]
        fields = {name: getattr(options, name) for name in ("at", "edit", "original", "word", "pattern")}
        lines = [{"name": "text", "source": source, **fields}]
    nla = load_pair(options)
    nla.check_own_subject("steer")
    # All prompts are checked before the first is steered: results come at the end, so a late error would lose them.
    prepared = [_prepared(nla, line) for line in lines]
    reports = [steer(nla, *arguments, settings) for arguments in prepared]
    _show(nla, reports, options)
    return 0


def _settings(options: argparse.Namespace) -> SteerSettings:
    from nlae_jax.explore.steer import SteerSettings

    try:
        alphas = tuple(float(alpha) for alpha in options.alphas.split(","))
    except ValueError:
        raise UserError(f"--alphas {options.alphas}: should be numbers, as 0.15,0.25") from None
    return SteerSettings(
        alphas,
        options.controls,
        options.samples,
        options.tokens,
        options.temperature,
        options.seed,
        options.generated,
    )


def _lines(path: Path) -> list[dict[str, Any]]:
    """Reads the prompts of a .jsonl file: text or messages, edit, and perhaps at, original, word, pattern."""
    from nlae_jax.explore.items import read_rows
    from nlae_jax.explore.passage import check_messages

    prompts = []
    for where, row in read_rows(path):
        text = row.get("text")
        source = text if isinstance(text, str) and text.strip() else check_messages(row.get("messages"), where)
        fields = {name: row.get(name) for name in ("at", "edit", "original", "word", "pattern")}
        if isinstance(fields["original"], str):
            fields["original"] = [fields["original"]]
        texts = {**fields, "original": None}
        invalid = next((name for name, value in texts.items() if not isinstance(value, str | None)), None)
        if invalid or not fields["edit"]:
            raise UserError(f"{where}: {invalid or 'edit'} should be a text")
        if not _is_texts(fields["original"]):
            raise UserError(f"{where}: original should be a text, or a list of at least one text")
        prompts.append({"name": where, "source": source, **fields})
    return prompts


def _is_texts(value: Any) -> bool:
    """Returns whether the value is None or a list of texts that is not empty."""
    return value is None or (isinstance(value, list) and value != [] and all(isinstance(text, str) for text in value))


def _prepared(
    nla: NLA, line: dict[str, Any]
) -> tuple[Passage, list[int], str, list[str] | None, re.Pattern[str] | None]:
    """Returns the arguments of `explore.steer.steer` for one prompt. Raises UserError that names its line."""
    from nlae_jax.explore.explainer import check_length
    from nlae_jax.explore.select import parse_at
    from nlae_jax.explore.steer import check_explanations, compile_pattern

    try:
        passage = read_source(nla, line["name"], line["source"], chat_goes_on=True)
        check_length(passage)
        pattern = compile_pattern(line["word"], line["pattern"])
        at = parse_at(passage, line["at"])
        edit = argument_text(line["edit"])
        original = None if line["original"] is None else [argument_text(text) for text in line["original"]]
        check_explanations(edit, original)
    except UserError as error:
        raise error if line["name"] == "text" else UserError(f"{line['name']}: {error}") from None
    return passage, at, edit, original, pattern


def _show(nla: NLA, reports: list[SteerReport], options: argparse.Namespace) -> None:
    from nlae_jax.explore.steer import summary
    from nlae_jax.report.audit_page import steer_tables, write_audit_page
    from nlae_jax.runtime.output import show_json, show_rich
    from nlae_jax.runtime.progress import say

    rows = [report.row() for report in reports]
    total = summary(reports)
    if options.html:  # written first, because printing may fail
        write_audit_page(options.html, "steer", rows, f"Steering with {nla.name}")
        say(f"page: {options.html}")
    if options.json:
        show_json({**rows[0], "pair": nla.description()} if not options.input else {"prompts": rows, "summary": total})
    else:
        for row in rows:
            show_rich(*steer_tables(row))
    if options.input and not options.json:
        show_rich(
            f"with a word or pattern {total['prompts']} prompts; the edit beats the best random direction on "
            f"{total['beaten']}{_interval(total['beaten_share_ci95'])}, loses on {total['lost']}, equal on "
            f"{total['equal']}"
        )
        names = {"none": "nothing added", "edit": "the edit", "random": "random directions"}
        for kind, pooled in total["conditions"].items():
            share = _interval(pooled["hit_rate_ci95"])
            show_rich(f"hits with {names[kind]}: {pooled['hits']} of {pooled['continuations']}{share}")
        if total["alpha_chosen"]:
            show_rich(
                "each prompt's α has most hits of the edit, which favours the edit; give one α for a fair comparison"
            )


def _interval(shares: tuple[float, float] | None) -> str:
    """Shows the interval of a share, or nothing where there is none."""
    return "" if shares is None else f" (share {shares[0]:.2f} to {shares[1]:.2f})"


COMMANDS = (Command("steer", "steer the subject by an edited explanation, beside controls", _add, _run, check=_check),)
