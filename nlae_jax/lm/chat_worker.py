"""Renders a model's chat template in a process of its own: `python -P chat_worker.py < request > answer`.

A chat template is a program that came with a model. Jinja's sandbox keeps it from files and from Python; it does not
keep it from going on for ever or from filling the memory, which only a process can be kept from.

Reads a JSON object: `template`; `messages`, one chat each; `variables`, what templates may read besides; and the limits
`seconds` (of computing), `bytes` (of memory) and `characters` (of one prompt). Writes `{"prompts": [...]}`, or
`{"error": "..."}`. Imports nothing of this project, whose packages take longer to load than the work takes.
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

# What the templates of Llama 3 say where they are told nothing. A prompt must not change from day to day.
TODAY = datetime.datetime(2024, 7, 26)
DATE_STRING = TODAY.strftime("%d %b %Y")


class _Generation(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}`, which marks what an assistant wrote, and adds nothing to the prompt."""

    tags = {"generation"}  # noqa: RUF012 (as its base class declares it)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


class _Namespace(jinja2.utils.Namespace):
    """Jinja's, without names that begin with an underscore: those lead to what the sandbox keeps templates from."""

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
    """Unlike Jinja's, it does not escape what is special in HTML."""
    return json.dumps(value, **{"ensure_ascii": False, **options})


def environment() -> jinja2.Environment:
    """What transformers gives to chat templates, except for the date."""
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    made.filters["tojson"] = _to_json
    made.globals |= {
        "raise_exception": _raise,
        "strftime_now": TODAY.strftime,
        "namespace": _Namespace,
        "dict": lambda *args, **fields: dict(*args, **fields),
    }
    return made


def rendered(request: dict[str, Any]) -> list[str]:
    """The prompts, one for each chat."""
    template = environment().from_string(request["template"])
    prompts = []
    for messages in request["messages"]:
        random.seed(0)  # a template may draw, but the same whenever it is asked
        pieces, left = [], request["characters"]
        for piece in template.generate(messages=messages, **{"date_string": DATE_STRING, **request["variables"]}):
            pieces.append(piece)
            left -= len(piece)
            if left < 0:
                _raise(f"it writes more than {request['characters']} characters")
        prompts.append("".join(pieces))
    return prompts


def _limit(seconds: float, memory: int) -> None:
    """From here on so much more may be used: the process ends with its time, and gets no memory beyond."""
    signal.setitimer(signal.ITIMER_PROF, seconds)  # the signal ends a process that has nothing else in mind for it
    with contextlib.suppress(OSError, ValueError):  # not every system has these
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + memory
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def main() -> None:
    request = json.load(sys.stdin)
    _limit(request["seconds"], request["bytes"])
    try:
        answer: dict[str, Any] = {"prompts": rendered(request)}
    except RecursionError:
        answer = {"error": "it is nested too deeply, or calls itself without end"}
    except MemoryError:
        answer = {"error": "it takes too much memory"}
    except Exception as error:  # whatever a template does
        line = getattr(error, "lineno", None)
        answer = {"error": f"{type(error).__name__}: {str(error)[:500]}" + (f", line {line}" if line else "")}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
