"""Renders a model's chat template in a separate process: `python -P chat_worker.py < request > answer`.

A chat template is a program that came with a model. Jinja's sandbox keeps it from files and from Python, but not from
running for ever or filling the memory. For that it needs a process with limits.

The request is a JSON object with `template`, `messages` (one list for each chat), `variables` (further variables for
the template), and the limits `seconds` (of processor time), `bytes` (of memory) and `characters` (of one prompt). The
answer is `{"prompts": [...]}` or `{"error": "..."}`. This file imports nothing of the package, which would take longer
to load than the rendering takes.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import random
import resource
import signal
import sys
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

# The default date of Llama 3's templates. It is constant, because a prompt must not change from day to day.
TODAY = datetime.datetime(2024, 7, 26)
DATE_STRING = TODAY.strftime("%d %b %Y")


class _Generation(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}`, which marks the assistant's words and adds nothing to the prompt."""

    tags = {"generation"}  # noqa: RUF012 (as its base class declares it)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


class _Namespace(jinja2.utils.Namespace):
    """Jinja's namespace without names that begin with an underscore, which would lead out of the sandbox."""

    def __init__(self, *args: Any, **fields: Any) -> None:
        super().__init__()
        for name, value in dict(*args, **fields).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace cannot have the field {name!r}")
        super().__setitem__(name, value)


def _raise(message: Any) -> None:
    raise jinja2.TemplateError(str(message))


def _to_json(value: Any, **options: Any) -> str:
    """Writes JSON without escapes for HTML, which Jinja's filter adds."""
    return json.dumps(value, **{"ensure_ascii": False, **options})


def environment() -> jinja2.Environment:
    """Returns the environment in which transformers renders chat templates, but with a constant date."""
    sandbox = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    sandbox.filters["tojson"] = _to_json
    sandbox.globals |= {
        "raise_exception": _raise,
        "strftime_now": TODAY.strftime,
        "namespace": _Namespace,
        "dict": lambda *args, **fields: dict(*args, **fields),
    }
    return sandbox


def rendered(request: dict[str, Any]) -> list[str]:
    """Renders a request and returns one prompt for each chat."""
    template = environment().from_string(request["template"])
    prompts = []
    for messages in request["messages"]:
        random.seed(0)  # a template's random choices are the same each time
        pieces, left = [], request["characters"]
        for piece in template.generate(messages=messages, **{"date_string": DATE_STRING, **request["variables"]}):
            pieces.append(piece)
            left -= len(piece)
            if left < 0:
                _raise(f"it writes more than {request['characters']} characters")
        prompts.append("".join(pieces))
    return prompts


def _limit(seconds: float, memory: int) -> None:
    """Limits the processor time and the memory that the process may use from now on."""
    signal.setitimer(signal.ITIMER_PROF, seconds)  # the signal ends a process without a handler for it
    with contextlib.suppress(OSError, ValueError):  # some systems lack these limits
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + memory
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def main() -> None:
    """Reads a request from stdin and writes the answer to stdout."""
    request = json.load(sys.stdin)
    _limit(request["seconds"], request["bytes"])
    try:
        answer: dict[str, Any] = {"prompts": rendered(request)}
    except RecursionError:
        answer = {"error": "it is nested too deeply, or calls itself without end"}
    except MemoryError:
        answer = {"error": "it takes too much memory"}
    except Exception as error:  # a template may raise anything
        line = getattr(error, "lineno", None)
        answer = {"error": f"{type(error).__name__}: {str(error)[:500]}" + (f", line {line}" if line else "")}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
