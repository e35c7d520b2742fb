"""Chat templates: as transformers renders them, and bounded whatever they do."""

import datetime
import signal

import pytest
from transformers import PreTrainedTokenizerFast

from nlae_jax.lm import chat, chat_worker
from nlae_jax.lm.chat import chat_ids, chats_ids, with_its_date
from nlae_jax.lm.tiny import tiny_tokenizer
from nlae_jax.runtime.errors import UserError

PLAIN = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}\n{% endfor %}"
PUBLISHED_STYLES = [
    PLAIN + "{% if add_generation_prompt %}assistant:{% endif %}",
    # Blocks on lines of their own, a system prompt, a namespace, loop controls.
    """{%- set ns = namespace(system='Be brief.', seen=0) -%}
    {%- for message in messages -%}
        {%- if message.role == 'system' %}{% set ns.system = message.content %}{% continue %}{% endif %}
        {% if loop.first %}
            {{- bos_token + '[' + ns.system + ']' }}
        {% endif %}
        {{- '\\n' + message['content'] | trim }}
        {%- set ns.seen = ns.seen + 1 %}
    {%- endfor %}
    {{- ns.seen }}""",
    # Macros, tojson with options, defaults, what is not defined.
    "{% macro turn(role, text) %}<{{ role }}>{{ text }}</{{ role }}>{% endmacro %}"
    "{{ turn('user', messages[0].content) }}{{ {'é': '<', 'a': [1, none]} | tojson }}"
    "{{ dict(b=1) | tojson(indent=2) }}{{ tools is none }}{{ documents is defined }}{{ nothing | default('no') }}",
    # Marks of what the assistant wrote; thinking switched off.
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}",
    "{{ messages | map(attribute='content') | join(' / ') | upper }}{{ messages[-1]['content'][:3] }}",
]


def with_template(template):
    return PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer(),
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        chat_template=template,
    )


@pytest.mark.parametrize("template", PUBLISHED_STYLES)
def test_prompts_are_those_of_transformers(template):
    tokenizer, messages = with_template(template), ["the text", " An array\nof <values> ", ""]
    found = chats_ids(tokenizer, messages, enable_thinking=False)
    for ids, message in zip(found, messages, strict=True):
        rendered = tokenizer.apply_chat_template(
            [{"role": "user", "content": message}], tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        assert ids == tokenizer.encode(rendered, add_special_tokens=False)
    assert chat_ids(tokenizer, messages[0], enable_thinking=False) == found[0]


@pytest.mark.parametrize(
    "template",
    [
        "{{ strftime_now('%d %B %Y') }}",
        "{{ strftime_now('%Y-%m-%d %H:%M:%S') }}{{ date_string }}",
        "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b') %}{% endif %}{{ date_string }}",
        "{{ range(1000) | random }}{{ lipsum() }}",
    ],
)
def test_a_prompt_is_the_same_every_day(template):
    """Asked again in another process, and nothing remembered."""
    tokenizer = with_template(template)
    first = chat_ids(tokenizer, "the")
    chat._rendered.cache_clear()
    assert chat_ids(tokenizer, "the") == first
    assert tokenizer.decode(first).count("2024") == template.count("%Y") + template.count("date_string }}")


def test_the_answer_to_a_large_request_is_not_kept():
    tokenizer, chats = with_template("{{ messages[0].content }}"), [[{"role": "user", "content": "x" * 1000}]]
    chat._rendered.cache_clear()
    for count, kept in ((2, 1), (500, 1)):
        assert chat.render_chats(tokenizer, chats * count, False) == ["x" * 1000] * count
        assert chat._rendered.cache_info().currsize == kept


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ raise_exception('not \x1b[31m here') }}", r"TemplateError: not \x1b[31m here"),
        ("{% for", "TemplateSyntaxError: unexpected 'end of template', line 1"),
        ("\n{{ }}", "TemplateSyntaxError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError: access to attribute '__class__'"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ namespace(__init__=1) }}", "SecurityError: a namespace cannot have the field '__init__'"),
        ("{% set ns = namespace() %}{% set ns.__class__ = 1 %}", "SecurityError"),
        ("{% include '/etc/passwd' %}", "TypeError: no loader for this environment"),
        ("{{ messages[7].content }}", "UndefinedError"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "OverflowError: Range too big"),
        ("{{ 'a' * 10 ** 11 }}", "it takes too much memory"),
        ("{{ '{:>20000000000}'.format(1) }}", "it takes too much memory"),
        ("{{ '%20000000000d' % 1 }}", "it takes too much memory"),
        ("{{ 'a' | center(10 ** 11) }}", "it takes too much memory"),
        ("{{ [0] * 10 ** 10 }}", "it takes too much memory"),
        (
            "{% set ns = namespace(s='a' * 9) %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
            "it takes too much memory|it has not ended",  # whichever is reached first on this machine
        ),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "calls itself without end"),
        ("{{ " + "(" * 50_000, "nested too deeply"),
        ("{% if 1 %}" * 3000 + "{% endif %}" * 3000, "nested too deeply"),
        ("{% for a in range(99999) %}{{ a }}{% endfor %}", "it writes more than 65544 characters"),
        ("x" * 70_000, "it writes more than 65544 characters"),
        ({"tool_use": "", "rag": ""}, "none of its chat templates ['rag', 'tool_use'] is called default"),
        (None, "its tokenizer has no chat template"),
        (7, "its chat template should be text; it is 7"),
    ],
)
def test_a_template_that_does_not_work_is_one_line(template, says):
    tokenizer = with_template(None)
    tokenizer.chat_template = template
    with pytest.raises(UserError) as caught:
        chat_ids(tokenizer, "the text")
    message = str(caught.value)
    assert message.startswith("subject.model: ") and any(text in message for text in says.split("|"))
    assert message.isprintable() and len(message) < 700


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{{ (7 ** 300000000) is none }}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    ],
)
def test_a_template_that_goes_on_for_ever_is_ended(template, monkeypatch):
    """Loops, one product that takes hours, and calls that double."""
    monkeypatch.setattr(chat, "_SECONDS", 0.4)
    with pytest.raises(UserError, match="it has not ended after 0 seconds of computing"):
        chat_ids(with_template(template), "the text")


def test_a_machine_too_busy_to_render_is_told(monkeypatch):
    monkeypatch.setattr(chat, "_WAIT_SECONDS", 0.01)
    with pytest.raises(UserError, match=r"its chat template does not work \(it has not ended after"):
        chat_ids(with_template("{{ 1 }} unmet so far"), "the text")


def test_the_directory_of_a_tokenizer_is_named(tmp_path):
    with_template("{{ 1 // 0 }}").save_pretrained(tmp_path)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"^{tmp_path}: its chat template"):
        chat_ids(tokenizer, "the text")


def test_the_default_of_several_templates_is_taken():
    tokenizer = with_template({"default": "one {{ messages[0].content }}", "rag": "two"})
    assert tokenizer.decode(chat_ids(tokenizer, "the")) == "one the"


def test_half_a_surrogate_pair_in_message_and_template():
    tokenizer = with_template("\ud83d{{ messages[0].content }}{{ '\\ud83d' }}")
    assert tokenizer.decode(chat_ids(tokenizer, "a\ud83d")) == "\ufffda\ufffd\ufffd"


def test_a_long_message_has_room():
    ids = chat_ids(with_template(PLAIN), "the " * 50_000)
    assert len(ids) > 50_000


@pytest.mark.parametrize(
    "template",
    [
        "{{ strftime_now('%d %B %Y') }}: {{ messages[0].content }}",
        '\n  {%- if true %}\n{{ strftime_now("%H:%M") }}\n{% endif %}\n\n {{ date_string }}',
        "  {% if date_string is defined %}{{ date_string }}{% else %}none{% endif %}",
        "{% macro today() %}{{ strftime_now('%A') }}{% endmacro %}{% for m in messages %}{{ today() }}{% endfor %}",
    ],
)
def test_a_template_with_its_date_prints_it_in_transformers_too(template):
    dated = with_template(with_its_date(template))
    assert dated.chat_template != template
    rendered = dated.apply_chat_template(
        [{"role": "user", "content": "the"}], tokenize=False, add_generation_prompt=True
    )
    expected = chat_ids(with_template(template), "the")
    assert dated.encode(rendered, add_special_tokens=False) == expected == chat_ids(dated, "the")
    assert chat_worker.TODAY.date() == datetime.date(2024, 7, 26)


def test_a_template_without_a_date_stays_as_it_is():
    assert with_its_date(PLAIN) == PLAIN


def test_the_worker_leaves_signals_alone():
    """The limit is that of the worker; a later one of this process would end it."""
    chat_ids(with_template(PLAIN + "unmet too"), "the")
    assert signal.getitimer(signal.ITIMER_PROF) == (0.0, 0.0)


def test_large_requests_are_not_kept():
    """A server's memory is not for the chats of its clients."""
    tokenizer = with_template("{{ messages[0]['content'] }}")
    chat._rendered.cache_clear()
    for text, kept in (("the", 1), ("the " * 70_000, 1)):
        assert chat.render_chats(tokenizer, [[{"role": "user", "content": text}]], False) == [text]
        assert chat._rendered.cache_info().currsize == kept
