"""A model's chat template at work, within bounds: the template is a program that came with the model."""

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
_SECONDS = 3.0  # of computing
_SECONDS_A_CHAT = 0.02  # and for each chat of many
_WAIT_SECONDS = 120.0  # by the clock: other programs may keep the machine busy
_BYTES = 1 << 30
_CHARACTERS = 1 << 16  # beside the message
_KEPT_CHARACTERS = 1 << 18  # of a request whose answer is kept: one of many long prefixes takes tens of megabytes


def chat_ids(tokenizer: Any, message: str, **options: Any) -> list[int]:
    """`chats_ids` of one message."""
    return chats_ids(tokenizer, [message], **options)[0]


def chats_ids(tokenizer: Any, messages: Sequence[str], **options: Any) -> list[list[int]]:
    """Users' messages in the model's chat template, each up to where the reply begins.

    `options` are the template's own. Raises as `render_chats`.
    """
    chats = [[{"role": "user", "content": message}] for message in messages]
    prompts = render_chats(tokenizer, chats, add_generation_prompt=True, **options)
    # The template writes the tokens that begin a sequence itself.
    return [tokenizer.encode(prompt, add_special_tokens=False) for prompt in prompts]


def render_chats(
    tokenizer: Any, chats: Sequence[Sequence[Mapping[str, str]]], add_generation_prompt: bool, **options: Any
) -> list[str]:
    """Chats, each a list of messages with `role` and `content`, as the model's chat template writes them.

    `options` are the template's own. Templates that print a date get a constant one: a prompt must not change from day
    to day. Raises UserError, naming the tokenizer's directory if it has one, where there is no template or it does not
    work: it raises, cannot be parsed, does not end, or writes too much.
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
    """What an encoder reads of messages: `chats_ids`, or, of a base model without a chat template, plain texts."""
    if tokenizer.chat_template is None:
        return [text_ids(tokenizer, encodable(message) + "\n") for message in messages]
    return chats_ids(tokenizer, messages)


def plain_template(tokenizer: Any) -> str:
    """A chat template that writes the prompts that `prompts_ids` takes without one, for programs that need one."""
    begin = "".join(tokenizer.convert_ids_to_tokens(begin_ids(tokenizer)))
    written = "{% for message in messages %}{{ message['content'] + '\\n' }}{% endfor %}"
    return f"{{{{ {json.dumps(begin)} }}}}{written}"


def with_its_date(template: str) -> str:
    """The template printing the date that `chats_ids` has it print, in transformers too, whose clock goes on."""
    from nlae_jax.lm.chat_worker import DATE_STRING, TODAY

    if "strftime_now" not in template and "date_string" not in template:
        return template
    dates = {form: TODAY.strftime(form) for _, form in _DATE_CALL.findall(template)}
    # A block's own line break is no part of the prompt, so what follows begins a line as it did.
    return (
        f"{{% macro strftime_now(form) %}}{{{{ {json.dumps(dates)}.get(form, {json.dumps(DATE_STRING)}) }}}}"
        f"{{% endmacro %}}\n{{% set date_string = {json.dumps(DATE_STRING)} %}}\n{template}"
    )


def _name(tokenizer: Any) -> str:
    return getattr(tokenizer, "name_or_path", "") or "subject.model"


def _plain(value: Any) -> Any:
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else str(value)


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
    """`_run_worker` of a request that is small enough to be kept with its answer."""
    return _run_worker(request)


def _run_worker(request: str) -> tuple[list[str], str]:
    """The worker's prompts, and what it complains of, if anything."""
    try:
        # -P: files beside the worker are no modules of it. Whatever it prints is one JSON object.
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
