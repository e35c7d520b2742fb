"""The page of explained texts: complete, closed to scripts, and proof against hostile text."""

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from nlae_jax.report.explanation_page import explanation_page, write_explanation_page


def token(position: int, text: str, explanation: str, mse: float) -> dict[str, Any]:
    return {"position": position, "token": text, "explanation": explanation, "cos": 1 - mse / 2, "mse": mse}


class Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        assert not any(name.startswith("on") for name, _ in attrs)

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_every_token_and_its_words_are_there() -> None:
    texts = [[token(0, "The", "", 2.0), token(1, " river", "Next comes water.", 0.1)], [token(0, "One", "a", 0.5)]]
    page = explanation_page(texts, "smollm2-135m", 20)
    reader = Reader()
    reader.feed(page)
    text = " ".join(" ".join(reader.words).split())
    assert "What smollm2-135m holds at every token" in text and "block 20" in text
    assert "Next comes water." in text and "(empty)" in text and "attention sink" in text
    assert page.count('class="token" tabindex="0"') == 3


def test_better_scores_have_more_colour() -> None:
    texts = [[token(1, "a", "x", mse) for mse in (0.0, 0.3, 0.6, 4.0)]]
    shades = re.findall(r'tabindex="0" style="--shade:([\d.]+)"', explanation_page(texts, "m", 1))
    assert [float(shade) for shade in shades] == [0.5, 0.25, 0.0, 0.0]


def test_a_character_of_several_tokens_is_shown_once() -> None:
    """Each of its tokens has the whole character as text."""
    rows = [token(1, "Hi ", "x", 0.1), *(token(2 + i, "🙂", "x", 0.1) | {"fragment_index": i} for i in range(3))]
    text = re.sub(r'<span\s+class="card".*?</span>', "", explanation_page([rows], "m", 1), flags=re.DOTALL)
    assert text.count("🙂") == 1 and text.count("·") == 2
    assert "“🙂 (part 3)”" in explanation_page([rows], "m", 1)


@pytest.mark.parametrize(
    "hostile", ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "{{ 7 * 7 }}", "\x1b[2J\u202eevil"]
)
def test_hostile_text_stays_text(tmp_path: Path, hostile: str) -> None:
    path = tmp_path / "page.html"
    write_explanation_page(path, [[token(1, hostile, hostile, 0.2)]], hostile, 3)
    page = path.read_text(encoding="utf-8")
    reader = Reader()
    reader.feed(page)
    assert not {"script", "img", "link", "iframe"} & set(reader.tags)
    assert "49" not in page.partition("<main>")[2] and "\x1b" not in page and "\u202e" not in page
    assert "default-src 'none'" in page
