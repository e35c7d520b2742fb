"""`nlae explain`: explains the activations of texts, chats or files of vectors."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from nlae_jax.cli.command import Command, seed, start_jax
from nlae_jax.cli.pairs import add_pair, check_pair, check_workdir, load_pair
from nlae_jax.cli.texts import argument_text, read_text
from nlae_jax.runtime.errors import UserError

if TYPE_CHECKING:
    from nlae_jax.api import NLA
    from nlae_jax.explore.explain import Explained, Options
    from nlae_jax.explore.items import Item
    from nlae_jax.explore.passage import Passage
    from nlae_jax.explore.select import Pick

_CSV = (
    "id", "position", "token", "explanation", "cos", "mse", "relative_mse", "norm", "outside", "cut", "repeated",
    "agreement", "consensus", "role", "section", "message_index", "generated",
)  # fmt: skip


def add_source(command: argparse.ArgumentParser, many: bool = False, prompts: bool = False) -> None:
    """Adds the options that name the source: one text or chat, `many` of them, or `prompts` with an edit for each."""
    source = command.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--text", action="append", help="a text to read" + ("; you can repeat the option" if many else "")
    )
    source.add_argument("--file", help="a UTF-8 text file")
    source.add_argument(
        "--chat", help="a JSON file with a list of messages (role, content), formatted with the model's chat template"
    )
    if prompts:
        source.add_argument(
            "--input", help="many prompts: a .jsonl file with text or messages, edit, and optionally at and word"
        )
    if many:
        source.add_argument(
            "--input", help="many texts or chats: a .jsonl or .csv file with text or messages, and optionally id"
        )
        source.add_argument(
            "--vectors",
            help="raw activations: a .npy file [N, d], or a .parquet file with the column activation_vector",
        )


def _add(explain: argparse.ArgumentParser) -> None:
    add_pair(explain)
    add_source(explain, many=True)
    explain.add_argument(
        "--generate",
        type=int,
        default=0,
        metavar="N",
        help="let the subject continue the text by up to N tokens, which are explained too",
    )
    explain.add_argument("--positions", help="explain only the tokens at these positions: -1, or 3,5,-2, or 10:20")
    explain.add_argument("--match", help="explain only the tokens of every occurrence of this phrase")
    explain.add_argument("--span", help="explain the mean activation of these tokens: 10:20, or a phrase of the text")
    explain.add_argument("--samples", type=int, default=1, help="number of explanations of each activation (default 1)")
    explain.add_argument(
        "--temperature",
        type=float,
        help="sampling temperature; 0 takes the likeliest token (default 0, or 1 with several samples)",
    )
    explain.add_argument("--seed", type=seed, default=0, help="seed of the sampled explanations (default 0)")
    explain.add_argument(
        "--html", help="file for a page that colours the tokens by score and shows explanations on hover"
    )
    explain.add_argument(
        "--out", help=".jsonl or .csv file for the results of --input; the same command continues an unfinished file"
    )
    explain.add_argument("--json", action="store_true", help="one JSON object on stdout")


def _check(options: argparse.Namespace) -> str:
    if options.vectors and (options.positions or options.match or options.span or options.generate):
        return "--vectors has no text: --positions, --match, --span and --generate belong to one"
    if bool(options.out) != bool(options.input):
        return "--input and --out belong together: many texts go into a file"
    if options.input and (options.html or options.json):
        return "--input writes --out; --html and --json are for single texts"
    return check_pair(options)


def given_texts(options: argparse.Namespace) -> list[str]:
    """Returns the texts of --text and --file. Raises UserError where one is empty."""
    texts = [argument_text(text) for text in options.text or ()]
    if options.file:
        texts = [read_text(options.file).removeprefix("\ufeff")]
    if not all(text.strip() for text in texts):
        raise UserError(f"{options.file or '--text'}: empty; there is nothing to explain")
    return texts


def check_temperature(value: float | None) -> None:
    """Raises UserError where a temperature is negative or not finite."""
    if value is not None and not 0 <= value < math.inf:
        raise UserError(f"--temperature: {value} should be 0 or more")


def _run(options: argparse.Namespace, _: list[str]) -> int:
    from nlae_jax.runtime.output import check_file

    check_workdir(options)
    texts = given_texts(options)
    check_temperature(options.temperature)
    if options.out is not None:
        check_file(options.out, "--out")
    if options.generate < 0:
        raise UserError(f"--generate: {options.generate} should be 0 or more")
    start_jax()
    from nlae_jax.explore.explain import Options, explain_passages, explain_vectors
    from nlae_jax.explore.items import read_items
    from nlae_jax.explore.passage import read_chat_file
    from nlae_jax.explore.vector_files import read_vectors

    writing = Options(options.temperature, None, options.samples, options.seed)
    messages = read_chat_file(options.chat) if options.chat else None
    items = read_items(options.input) if options.input else []
    nla = load_pair(options)
    if options.input:
        return _run_many(nla, items, options, writing)
    if options.vectors:
        vectors = nla.mapped(read_vectors(options.vectors, nla.width_read, nla.layer))
        explained = [explain_vectors(nla, vectors, writing)]
    else:
        selected = [_selected(nla, *source, options) for source in _named(texts, messages)]
        explained = explain_passages(nla, selected, writing)
    _show(nla, explained, options)
    return 0


def _named(texts: Sequence[str], messages: Any) -> list[tuple[str, Any]]:
    """Returns (name, source) of each text, or of the chat."""
    if messages is not None:
        return [("chat", messages)]
    return [("text" if len(texts) == 1 else f"text {number}", text) for number, text in enumerate(texts)]


def read_source(
    nla: NLA, name: str, source: Any, generate: int = 0, seed: int = 0, chat_goes_on: bool = False
) -> Passage:
    """Tokenises a text or the messages of a chat, and lets the subject continue it with up to `generate` tokens.

    With `chat_goes_on`, a chat ends where the model's answer begins, even if none is generated here.
    """
    from nlae_jax.explore.explainer import check_length
    from nlae_jax.explore.passage import extended, read_chat, read_text

    vocab_size = nla.subject.arch.vocab_size
    if isinstance(source, str):
        passage = read_text(nla.tokenizer, vocab_size, source, name)
    else:
        goes_on, answered = generate > 0 or chat_goes_on, source[-1]["role"] == "assistant"
        passage = read_chat(
            nla.tokenizer,
            vocab_size,
            source,
            name,
            add_generation_prompt=goes_on and not answered,
            continue_final_message=goes_on and answered,
        )
    if generate:
        check_length(passage, generate)
        (answer,) = nla.subject.generate([passage.ids], generate, temperature=0.0, seed=seed)
        passage = extended(nla.tokenizer, passage, answer)
    return passage


def _selected(nla: NLA, name: str, source: Any, options: argparse.Namespace) -> tuple[Passage, list[Pick]]:
    """Reads a source and selects its tokens by the options."""
    from nlae_jax.explore.select import picks_of

    passage = read_source(nla, name, source, options.generate, options.seed)
    return passage, picks_of(passage, options.positions, options.match, options.span)


def _run_many(nla: NLA, items: Sequence[Item], options: argparse.Namespace, writing: Options) -> int:
    """Explains one item after another into the file --out. An incomplete file of the same options is continued."""
    import dataclasses

    from nlae_jax.explore.explain import explain_passages
    from nlae_jax.explore.items import Results
    from nlae_jax.runtime.progress import progress, say

    selection = [options.generate, options.positions, options.match, options.span, nla.max_new_tokens, nla.identity]
    made_with = {
        "items": [dataclasses.asdict(item) for item in items],
        "options": [*selection, dataclasses.asdict(writing)],
    }
    results = Results(options.out, made_with, _CSV)
    # All are checked before the first is explained: an item that cannot be explained would stop the file at its place.
    for item in items[results.done :]:
        _check_item(nla, item, options)
    with progress(len(items), "texts", unit="text", start=results.done) as bar:
        for item in items[results.done :]:
            (explained,) = explain_passages(nla, [_selected(nla, *_source(item), options)], writing)
            rows = [explanation.row() for explanation in explained]
            results.add({"id": item.id, "tokens": rows}, [{"id": item.id, **row} for row in rows])
            bar.advance()
    say(f"explanations: {options.out}")
    return 0


def _source(item: Item) -> tuple[str, Any]:
    """Returns an item's name, and its text or messages."""
    return f"text {item.id}", item.messages if item.text is None else item.text


def _check_item(nla: NLA, item: Item, options: argparse.Namespace) -> None:
    """Raises UserError where an item cannot be read or selected from, as far as that shows before generation."""
    from nlae_jax.explore.explainer import check_length
    from nlae_jax.explore.select import picks_of

    passage = read_source(nla, *_source(item))
    check_length(passage, options.generate)
    if not options.generate:
        picks_of(passage, options.positions, options.match, options.span)


def _show(nla: NLA, explained: Sequence[Sequence[Explained]], options: argparse.Namespace) -> None:
    from nlae_jax.report.table import explanation_table
    from nlae_jax.runtime.output import show_json, show_rich

    rows = [[explanation.row() for explanation in text] for text in explained]
    if options.html:  # written first, because printing may fail
        from nlae_jax.report.explanation_page import write_explanation_page
        from nlae_jax.runtime.progress import say

        write_explanation_page(options.html, rows, nla.name, nla.layer)
        say(f"page: {options.html}")
    if options.json:
        results = [{"tokens": tokens} for tokens in rows]
        output = results[0] if len(results) == 1 else {"texts": results}
        show_json({**output, "pair": nla.description()})
    else:
        for tokens in rows:
            show_rich(explanation_table(tokens))


COMMANDS = (Command("explain", "explain and score the activations of a text, chat or file", _add, _run, check=_check),)
