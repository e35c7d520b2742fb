"""Explanations in other words: a meaning survives them, a code in the order of words does not."""

import pytest

from nlae_jax.cli import main
from nlae_jax.config import DescribeConfig
from nlae_jax.data.providers import rewriter
from nlae_jax.evaluate.rewordings import REWORDINGS, rewordings
from nlae_jax.evaluate.work import Work
from nlae_jax.runtime.errors import UserError
from tests.planted_pairs import SIZES, planted, planted_rows
from tests.servers import chat, serving


@pytest.fixture(scope="module")
def rows(tiny_lm):
    return planted_rows(tiny_lm)


def reversed_words(instruction, texts):
    """What keeps every word and loses their order; nothing comes back for the last text."""
    return [*(" ".join(reversed(text.split())) for text in texts[:-1]), None]


def figures_of(tiny_lm, rows, directory, write, read, rewrite=reversed_words):
    work = Work(planted(tiny_lm, rows, write, read, "planted"), rows, directory, 0, 200, SIZES)
    rewordings(work, rewrite)
    return work.ledger.sections.get("text", {})


def test_a_meaning_survives_and_a_code_does_not(tiny_lm, rows, tmp_path):
    number = lambda text: int("".join(filter(str.isdigit, text)) or 0)  # noqa: E731
    meant = lambda row, n: f"the text has number {row}"  # noqa: E731
    kept = figures_of(tiny_lm, rows, tmp_path / "meaning", meant, lambda text: rows.h[number(text)])
    coded = lambda row, n: f"{row % 7} a {row // 7}"  # noqa: E731

    def decode(text):
        first, _, second = text.split()
        return rows.h[min(int(first) + 7 * int(second), len(rows.h) - 1)]

    lost = figures_of(tiny_lm, rows, tmp_path / "code", coded, decode)
    # Translated texts went there and back: reversed twice is as it was.
    assert kept["fve_paraphrased"]["value"] == pytest.approx(1, abs=1e-6)
    assert kept["fve_translated"]["value"] == pytest.approx(1, abs=1e-6)
    assert kept["fve_paraphrased"]["controls"]["whole"]["value"] == pytest.approx(1, abs=1e-6)
    assert kept["fve_paraphrased"]["controls"]["permuted"]["value"] < 0
    assert lost["fve_paraphrased"]["value"] < 0 < lost["fve_translated"]["value"]
    # What did not come back is in none of them; two steps lose two texts.
    assert [kept[name]["n"] for name in REWORDINGS] == [39, 38]
    assert kept["fve_translated"]["controls"]["whole"]["n"] == 38


def test_without_a_provider_there_is_no_figure(tiny_lm, rows, tmp_path):
    assert figures_of(tiny_lm, rows, tmp_path, lambda row, n: "a b", lambda text: rows.h[0], None) == {}


def test_other_words_are_other_work(tiny_lm, rows, tmp_path):
    """A second provider's answers are rebuilt anew in the same directory."""
    at_first = lambda text: rows.h[len(text) % len(rows.h)]  # noqa: E731
    write = lambda row, n: f"number {row} of them"  # noqa: E731
    one = figures_of(tiny_lm, rows, tmp_path, write, at_first)
    longer = lambda instruction, texts: [f"{text} again" for text in texts]  # noqa: E731
    two = figures_of(tiny_lm, rows, tmp_path, write, at_first, longer)
    assert one["fve_paraphrased"]["value"] != two["fve_paraphrased"]["value"]


def test_a_server_is_asked_once_for_each_step(tmp_path):
    texts = [f"A note on text number {number}." for number in range(5)]
    config = DescribeConfig(provider="openai", model="m", concurrency=2)

    def reply(number, body):
        asked = body["messages"][0]["content"]
        return chat(f"<explanation>As {asked.splitlines()[-1]}</explanation>")

    with serving() as start:
        url, script = start(reply)
        config = DescribeConfig(provider="openai", model="m", concurrency=2, base_url=url)
        for _ in range(2):
            rewrite = rewriter(config, tmp_path)
            assert rewrite("Say it anew.", texts) == [f"As {text}" for text in texts]
        assert len(script.requests) == 5
        assert all(prompt.startswith("Say it anew.") for prompt in script.asked)
        rewrite("Translate it.", texts[:2])
        assert len(script.requests) == 7


@pytest.mark.parametrize("provider", ["template", "file", "subject", "describer"])
def test_only_servers_reword(tmp_path, provider):
    with pytest.raises(UserError, match=r"describe.provider: .* should be openai or anthropic"):
        rewriter(DescribeConfig(provider=provider), tmp_path)


def test_what_keeps_a_server_from_being_asked_is_said_before_the_work(tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(UserError, match="OPENAI_API_KEY is not set"):
        rewriter(DescribeConfig(provider="openai", model="m"), tmp_path)
    with pytest.raises(UserError, match=r"describe\.model is empty"):
        rewriter(DescribeConfig(provider="openai"), tmp_path)


def test_the_command_says_what_is_missing(capsys, tmp_path):
    with pytest.raises(SystemExit, match="2"):
        main(["eval", "--model", "smollm2-135m", "--text", "a", "--out", str(tmp_path), "--reword"])
    assert "--reword takes --config" in capsys.readouterr().err
