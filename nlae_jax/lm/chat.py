"""Renders a model's chat template, a program that came with the model, within limits of time and memory."""

from __future__ import annotations

import functools
import json
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nlae_jax.lm.tokens import begin_ids, text_ids
from nlae_jax.runtime.errors import UserError
from nlae_jax.runtime.outside import encodable, parse_json, quoted

_DATE_CALL = re.compile(r"""strftime_now\(\s*(["'])([^"'\\]*)\1\s*\)""")

_WORKER = Path(__file__).with_name("chat_worker.py")

# Bounds of one rendering. Templates of released models take milliseconds and add a few thousand characters.
_SECONDS = 3.0  # of processor time
_SECONDS_A_CHAT = 0.02  # more for each chat
_WAIT_SECONDS = 120.0  # by the clock, because other programs may keep the machine busy
_BYTES = 1 << 30
_CHARACTERS = 1 << 16  # of a prompt, beside the message
# The longest request whose answer is kept. An answer to one with many long prefixes takes tens of megabytes.
_KEPT_CHARACTERS = 1 << 18


def chat_ids(tokenizer: Any, message: str, **options: Any) -> list[int]:
    """Returns `chats_ids` of one message."""
    return chats_ids(tokenizer, [message], **options)[0]


def chats_ids(tokenizer: Any, messages: Sequence[str], **options: Any) -> list[list[int]]:
    """Returns the token ids of each user's message in the model's chat template, up to where the reply begins.

    `options` are passed to the template. Raises UserError as `render_chats` does.
    """
    chats = [[{"role": "user", "content": message}] for message in messages]
    prompts = render_chats(tokenizer, chats, add_generation_prompt=True, **options)
    # No special tokens are added, because the template writes the tokens that begin a sequence.
    return [tokenizer.encode(prompt, add_special_tokens=False) for prompt in prompts]


def render_chats(
    tokenizer: Any, chats: Sequence[Sequence[Mapping[str, str]]], add_generation_prompt: bool, **options: Any
) -> list[str]:
    """Renders chats with the model's chat template. Each chat is a list of messages with `role` and `content`.

    `options` are passed to the template. A template that prints a date gets a constant one, because a prompt must not
    change from day to day. Raises UserError, which names the tokenizer's directory if it has one, if there is no
    template, or if the template raises, cannot be parsed, does not end, or writes too much.
    """
    name = _name(tokenizer)
    cleaned = [[{key: encodable(text) for key, text in message.items()} for message in chat] for chat in chats]
    length = max((sum(len(message["content"]) for message in chat) for chat in cleaned), default=0)
    request = {
        "template": _template(tokenizer, name),
        "messages": cleaned,
        "variables": {
            "tools": None,
            "documents": None,
            **{key: _plain(value) for key, value in tokenizer.special_tokens_map.items()},
            "add_generation_prompt": add_generation_prompt,
            **options,
        },
        "characters": _CHARACTERS + length,
        "seconds": _SECONDS + _SECONDS_A_CHAT * len(cleaned),
        "bytes": _BYTES,
    }
    asked = json.dumps(request)
    prompts, error = _rendered(asked) if len(asked) <= _KEPT_CHARACTERS else _run_worker(asked)
    if error:
        raise UserError(f"{name}: its chat template does not work ({error})")
    return [encodable(prompt) for prompt in prompts]


def prompts_ids(tokenizer: Any, messages: Sequence[str]) -> list[list[int]]:
    """Returns the ids of an encoder's prompts: `chats_ids`, or plain texts for a base model without a chat template."""
    if tokenizer.chat_template is None:
        return [text_ids(tokenizer, encodable(message) + "\n") for message in messages]
    return chats_ids(tokenizer, messages)


def plain_template(tokenizer: Any) -> str:
    """Returns a chat template that writes the plain prompts of `prompts_ids`, for programs that need a template."""
    begin = "".join(tokenizer.convert_ids_to_tokens(begin_ids(tokenizer)))
    written = "{% for message in messages %}{{ message['content'] + '\\n' }}{% endfor %}"
    return f"{{{{ {json.dumps(begin)} }}}}{written}"


def with_its_date(template: str) -> str:
    """Changes a template so that it prints the constant date of `chats_ids` in transformers too."""
    from nlae_jax.lm.chat_worker import DATE_STRING, TODAY

    if "strftime_now" not in template and "date_string" not in template:
        return template
    dates = {form: TODAY.strftime(form) for _, form in _DATE_CALL.findall(template)}
    # Jinja drops the line break after a block, so the template still begins at the beginning of a line.
    return (
        f"{{% macro strftime_now(form) %}}{{{{ {json.dumps(dates)}.get(form, {json.dumps(DATE_STRING)}) }}}}"
        f"{{% endmacro %}}\n{{% set date_string = {json.dumps(DATE_STRING)} %}}\n{template}"
    )


def _name(tokenizer: Any) -> str:
    return getattr(tokenizer, "name_or_path", "") or "subject.model"


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else str(value)


def _template(tokenizer: Any, name: str) -> str:
    template = tokenizer.chat_template
    if isinstance(template, dict):  # several, by name
        if "default" not in template:
            raise UserError(f"{name}: none of its chat templates {quoted(sorted(template))} is called default")
        template = template["default"]
    if template is None:
        raise UserError(f"{name}: its tokenizer has no chat template; who chats needs an instruct model")
    if not isinstance(template, str):
        raise UserError(f"{name}: its chat template should be text; it is {quoted(template)}")
    return encodable(template)


@functools.lru_cache(maxsize=32)
def _rendered(request: str) -> tuple[list[str], str]:
    """Does what `_run_worker` does, and keeps the answer. It is for small requests."""
    return _run_worker(request)


def _run_worker(request: str) -> tuple[list[str], str]:
    """Renders a request in the worker's process. Returns the prompts, and the error or an empty text."""
    try:
        # With -P the worker cannot import the files beside it. It prints one JSON object.
        done = subprocess.run(
            [sys.executable, "-P", str(_WORKER)],
            input=request.encode(),
            capture_output=True,
            timeout=_WAIT_SECONDS,
            check=False,
        )
    except OSError as error:
        return [], f"no process can be started for it: {error}"
    except subprocess.TimeoutExpired:
        return [], f"it has not ended after {_WAIT_SECONDS:.0f} seconds"
    if done.returncode == -signal.SIGPROF:
        return [], f"it has not ended after {_SECONDS:.0f} seconds of computing"
    if done.returncode:
        lines = done.stderr.decode("utf-8", "replace").strip().splitlines()
        return [], lines[-1] if lines else f"its process ended with status {done.returncode}"
    answer = parse_json(done.stdout, "chat template", dict)
    return answer.get("prompts", []), answer.get("error", "")
