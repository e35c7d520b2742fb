"""`nlae adapt`: fits a map with which a pair explains a model that it was not trained for."""

from __future__ import annotations

import argparse

from nlae_jax.cli.command import Command, show_result, start_jax
from nlae_jax.runtime.errors import UserError


def _add_adapt(adapt: argparse.ArgumentParser) -> None:
    adapt.add_argument(
        "--model", required=True, help="the model to explain: a directory, GGUF file, hub id or pypi:WHEEL"
    )
    adapt.add_argument(
        "--layer", required=True, type=int, help="block of the model whose output is read, counted from 0"
    )
    adapt.add_argument("--to", required=True, help="the pair: shipped (smollm2-135m), or a directory with av/ and ar/")
    adapt.add_argument("--out", required=True, help="directory for the map; give it to `nlae explain --model`")
    adapt.add_argument("--texts", default="", help="glob of texts, or warmstart (default: installed documentation)")
    adapt.add_argument("--documents", type=int, default=400, help="texts that both models read (default 400)")
    adapt.add_argument("--places", type=int, default=8, help="positions that are read in each text (default 8)")
    adapt.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="dtype of both models' weights (default float32)",
    )
    adapt.add_argument("--json", action="store_true", help="one JSON object on stdout")


def _run_adapt(options: argparse.Namespace, _: list[str]) -> int:
    for name in ("documents", "places"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name}: {getattr(options, name)} should be at least 1")
    start_jax()
    from nlae_jax.config import CorpusConfig
    from nlae_jax.interop.adapt import WARNING, adapt_pair
    from nlae_jax.report.table import adaptation_table
    from nlae_jax.runtime.output import afterwards, check_directory
    from nlae_jax.runtime.progress import say

    check_directory(options.out, "--out")
    corpus = CorpusConfig(path=options.texts, max_documents=options.documents)
    arguments = options.model, options.layer, options.to, options.out, corpus, options.places, options.dtype
    result = adapt_pair(*arguments)
    afterwards("no scores shown", lambda: show_result(result, adaptation_table, options.json))
    say(f"{options.out}: `nlae explain --model {options.out}` takes it; {WARNING}")
    return 0


COMMANDS = (
    Command(
        "adapt",
        "fit a linear map from another model's activations to a pair's, so that the pair explains that model",
        _add_adapt,
        _run_adapt,
    ),
)
