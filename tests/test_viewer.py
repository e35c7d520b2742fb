"""The page in a browser: headless Chromium against a server with a tiny pair."""

from __future__ import annotations

import json
import shutil
import threading

import pytest

import nlae_jax
from nlae_jax.serve.app import ServerSettings
from nlae_jax.serve.reading import Reader
from tests.serving import Served

pytest_plugins = ["tests.tiny_run"]

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
playwright = pytest.importorskip("playwright.sync_api")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")

TEXT = "the of to in is"
HOSTILE = "<script>boom()</script> <img src=x onerror=boom()> &amp; \u202eevil\u202c"


@pytest.fixture(scope="module")
def reader(tiny_run):
    return Reader(nlae_jax.NLA.from_workdir(tiny_run.workdir))


@pytest.fixture(scope="module")
def address(reader):
    with Served(lambda: reader, ServerSettings()) as served:
        served.wait_ready()
        yield str(served.client.base_url)


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        made = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield made
        made.close()


@pytest.fixture
def open_page(browser, address):
    """Opens the page; whatever goes wrong in it fails the test."""
    contexts, wrong = [], []

    def opened(fragment="", at=address, **options):
        contexts.append(browser.new_context(bypass_csp=True, **options))  # for what the tests themselves evaluate
        page = contexts[-1].new_page()
        page.set_default_timeout(60_000)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda request: wrong.append(request.url) if not request.url.startswith(at) else None)
        page.goto(f"{at}/viewer{fragment}")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert [one for one in wrong if not one.startswith(("data:", "blob:"))] == []


def read(page, text):
    page.fill("#text", text)
    page.click("#read")
    page.wait_for_selector(".tok.scored")


def explain_all(page):
    page.click("#explain-all")
    page.wait_for_function(
        "document.querySelectorAll('#tokens .tok').length === document.querySelectorAll('.tok.scored').length"
    )


def test_the_last_token_is_explained_and_a_click_explains_another(open_page):
    page = open_page()
    read(page, TEXT)
    last = page.locator("#tokens .tok").count() - 1
    assert page.locator(".tok.pinned").get_attribute("data-p") == str(last)
    page.click("#t1")
    page.wait_for_selector("#t1.scored")
    assert page.inner_text("#detail h2") == "Token 1"
    assert page.inner_text("#detail .words")
    assert "relative mse" in page.inner_text("#detail .numbers")


def test_it_is_used_without_a_mouse(open_page):
    page = open_page()
    read(page, TEXT)
    page.focus(".tok.pinned")
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    page.wait_for_selector("#t1.scored")
    page.keyboard.press("Shift+ArrowRight")
    page.keyboard.press("Shift+ArrowRight")
    assert page.inner_text("#explain-selected") == "Explain 3 tokens"
    assert page.get_attribute("#t1", "aria-label").startswith("token 1")


def test_what_texts_hold_is_shown_and_never_run(open_page):
    page = open_page()
    page.evaluate("() => { window.boom = () => { throw new Error('a text was run') } }")
    read(page, HOSTILE)
    explain_all(page)
    assert page.locator("main img").count() == 0
    assert "<img src=x" in page.inner_text("#tokens")
    with page.expect_download() as saved:
        page.click("#save-html")
    content = saved.value.path().read_text()
    assert "<script" not in content
    assert "<img" not in content


def test_search_goes_from_hit_to_hit(open_page):
    page = open_page()
    read(page, TEXT)
    explain_all(page)
    word = page.inner_text("#list tbody tr:first-child td:nth-child(3)").split()[0]
    page.fill("#query", word)
    count = page.locator(".tok.hit").count()
    assert page.inner_text("#hits") == f"1/{count}"
    page.click("#previous")
    assert page.inner_text("#hits") == f"{count}/{count}"
    page.fill("#query", "no explanation says this")
    assert page.inner_text("#hits") == "0/0"
    assert page.is_disabled("#next")


def test_a_link_brings_back_what_was_seen(open_page):
    page = open_page()
    read(page, "naïve 世界 " + TEXT)
    page.click("#t2")
    page.wait_for_selector("#t2.scored")
    fragment = "#" + page.url.partition("#")[2]
    again = open_page(fragment)
    again.wait_for_selector("#t2.scored.pinned")
    assert again.input_value("#text") == "naïve 世界 " + TEXT
    broken = open_page("#nonsense")
    broken.wait_for_function("document.getElementById('status').textContent === 'ready'")


def test_a_link_keeps_a_phrase_and_a_comment(open_page):
    page = open_page()
    read(page, TEXT)
    page.focus(".tok.pinned")
    page.keyboard.press("Shift+ArrowLeft")
    page.fill("#comment", "why <b>this</b>?")
    again = open_page(page.evaluate("location.hash"))
    again.wait_for_selector(".tok.scored.pinned")
    assert again.locator(".tok.selected").count() == 2
    assert again.inner_text("#comment-shown") == "why <b>this</b>?"
    with again.expect_download() as saved:
        again.click("#save-html")
    assert "why &#60;b&#62;this" in saved.value.path().read_text()


def test_a_tour_ends_where_it_began(open_page):
    page = open_page()
    page.wait_for_function("document.getElementById('status').textContent === 'ready'")
    page.click("#tour-start")
    page.wait_for_selector("#tour:visible")
    for _ in range(int(page.inner_text("#tour-count").partition("/")[2])):
        assert page.inner_text("#tour-text")
        page.click("#tour-next")
    assert page.is_hidden("#tour")
    assert page.evaluate("document.activeElement.id") == "tour-start"
    assert page.locator(".toured").count() == 0
    assert page.input_value("#text")


def test_a_finger_selects_several_tokens(open_page):
    page = open_page(viewport={"width": 360, "height": 700}, has_touch=True)
    read(page, TEXT)
    page.tap("#t1")
    page.wait_for_selector("#t1.scored")
    page.tap("text=Select up to…")
    page.tap("#t3")
    assert page.locator(".tok.selected").count() == 3
    assert page.inner_text("#explain-selected") == "Explain 3 tokens"
    assert page.locator("#t3.scored").count() == 0
    page.tap("#explain-selected")
    page.wait_for_selector("#t3.scored")


def test_two_tokens_stand_side_by_side(open_page):
    page = open_page()
    read(page, TEXT)
    page.click("text=Compare with another token")
    page.fill("#compare-with", "1")
    page.click("#do-Compare")
    page.wait_for_selector("details[data-tool=compare] .outcome")
    assert page.locator("details[data-tool=compare] .two .badge").count() == 2
    assert page.inner_text("#list tbody tr:first-child td:first-child") == "1"
    page.fill("#compare-with", "999")
    page.click("#do-Compare")
    page.wait_for_selector("#status.error")


def test_an_edit_keeps_what_stands_before_it(open_page):
    page = open_page()
    read(page, TEXT)
    page.click("#t1")
    page.wait_for_selector("#t1.scored")
    before = page.locator("#tokens .tok").count()
    page.fill("#text", TEXT + " for")
    page.click("#read")
    page.wait_for_selector(f"#t{before}.scored")
    assert "scored" in page.get_attribute("#t1", "class")


def test_samples_own_words_and_steering(open_page):
    page = open_page()
    read(page, TEXT)
    page.click("text=4 samples")
    page.wait_for_selector("text=agreement")
    assert page.locator("ol.samples li").count() == 4
    page.click("text=Score a sentence of your own")
    page.fill("#own-words", "the end")
    page.click("text=Score it")
    page.wait_for_selector("text=the encoder's")
    page.click("text=Edit the words")
    page.fill("#steer-words", "it for that is")
    page.fill("#steer-alpha", "0.5")
    page.click("button:has-text('Steer')")
    page.wait_for_selector("text=with your words")
    assert page.locator("details[data-tool=steer] .outcome").count() == 5
    assert page.input_value("#steer-alpha") == "0.5"


def test_the_fields_of_one_token_do_not_go_to_the_next(open_page):
    page = open_page()
    read(page, TEXT)
    explain_all(page)
    page.click("#t4")
    page.evaluate("document.querySelectorAll('#detail details').forEach(tool => { tool.open = true })")
    assert page.input_value("#compare-with") == "3"
    page.fill("#own-words", "mine of token 4")
    page.fill("#steer-words", "edited at token 4")
    page.fill("#steer-alpha", "0.5")
    page.click("#do-Select-up-to-")  # it is drawn again, and keeps what was typed
    assert page.input_value("#own-words") == "mine of token 4"
    page.keyboard.press("Escape")
    page.click("#do-Select-up-to-")
    page.click("#list tbody tr:nth-child(4)")
    assert page.inner_text("#detail h2") == "Token 3"
    assert page.input_value("#compare-with") == "2"
    assert page.input_value("#own-words") == ""
    assert page.input_value("#steer-words") == page.evaluate("state.results.get(3).result.description")
    assert page.input_value("#steer-alpha") == "0.3"
    page.fill("#own-words", "mine of the text before")
    page.fill("#text", "it for that is")
    page.click("#read")
    page.wait_for_function("state.tokens.length && state.results.get(state.pinned)?.state === 'scored'")
    page.click("#t3")
    page.wait_for_selector("#t3.scored")
    assert page.input_value("#own-words") == ""


def test_an_outcome_stays_with_its_token(open_page):
    page = open_page()
    read(page, TEXT)
    explain_all(page)
    page.click("#t4")
    page.click("text=Score a sentence of your own")
    page.fill("#own-words", "the end")
    held = []
    page.route("**/api/page/score", lambda route: held.append(route))
    with page.expect_request("**/api/page/score"):
        page.click("text=Score it")
    page.click("#t3")
    with page.expect_response("**/api/page/score"):
        held[0].continue_()
    page.wait_for_function("state.running === 0")
    assert page.inner_text("#detail h2") == "Token 3"
    assert page.locator("details[data-tool=own] .outcome").is_hidden()


@pytest.mark.parametrize(
    ("tool", "field", "press"),
    [("Edit the words", "#steer-alpha", "button:has-text('Steer')"), ("Compare with", "#compare-with", "#do-Compare")],
)
def test_an_empty_number_is_not_0(open_page, tool, field, press):
    page = open_page()
    read(page, TEXT)
    page.click(f"text={tool}")
    page.fill(field, "")
    page.click(press)
    page.wait_for_selector("#status.error")
    assert "should be" in page.inner_text("#status")


def test_two_tokens_of_one_text_are_compared(open_page):
    page = open_page()
    read(page, TEXT)
    page.click("text=Compare with another token")
    page.fill("#compare-with", "1")
    sent, changed = [], "await plain(...all); state.asked = {text: 'another text'}"
    page.route("**/api/page/compare", lambda route: (sent.append(route.request.post_data_json), route.continue_()))
    page.evaluate(f"() => {{ const plain = explain; explain = async (...all) => {{ {changed} }} }}")
    page.click("#do-Compare")
    page.wait_for_function("state.running === 0")
    assert [body["text"] for body in sent] == [TEXT]


def test_an_address_never_names_what_was_seen_before(open_page):
    page = open_page()
    read(page, TEXT)
    assert page.evaluate("location.hash")
    page.evaluate("() => { state.asked = {text: 'x'.repeat(60000)} }")
    page.click("#link")
    assert "too long for a link" in page.inner_text("#status")
    assert page.evaluate("location.hash") == ""
    page.evaluate("() => { state.mode = 'neuron' }")
    assert page.evaluate("keep({n: {vector: Array(4000).fill(0.123456789012)}})") is False


def test_a_comment_of_a_link_goes_with_its_text(open_page):
    page = open_page()
    read(page, TEXT)
    page.fill("#comment", "look here")
    again = open_page(page.evaluate("location.hash"))
    again.wait_for_selector(".tok.scored.pinned")
    again.click("#read")
    again.wait_for_function("state.running === 0")
    assert again.inner_text("#comment-shown") == "look here"
    read(again, "it for that is")
    again.wait_for_function("state.running === 0")
    assert again.is_hidden("#comment-shown")
    assert again.input_value("#comment") == ""
    own = "of my own"
    again.fill("#comment", own)
    read(again, TEXT)
    assert again.inner_text("#comment-shown") == own


def test_a_chat_is_bubbles_and_the_model_answers(open_page):
    page = open_page()
    page.click("#tab-chat")
    page.fill("#turns textarea", "the of to")
    page.click("#answer")
    page.wait_for_selector(".bubble.assistant .tok.scored")
    assert page.locator(".bubble").count() == 2
    assert page.locator("#tokens .strip").first.is_hidden()
    page.check("#template")
    assert page.locator("#tokens .strip").first.is_visible()


def test_a_neuron_stands_beside_its_controls(open_page):
    page = open_page()
    page.click("#tab-neuron")
    page.fill("#neuron", "0:3")
    page.click("#look")
    page.wait_for_selector("table.sweep")
    assert "random direction" in page.inner_text("table.sweep")
    with page.expect_download() as saved:
        page.click("#direction button")
    assert json.loads(saved.value.path().read_text())["neuron"] == "0:3"
    again = open_page(page.evaluate("location.hash"))
    again.wait_for_selector("table.sweep")
    assert again.input_value("#neuron") == "0:3"
    page.fill("#neuron", "0:99999")
    page.click("#look")
    page.wait_for_selector("#status.error")


def test_it_waits_for_a_server_that_loads(open_page, reader):
    go = threading.Event()

    def load():
        go.wait(60)
        return reader

    with Served(load, ServerSettings()) as slow:
        page = open_page(at=str(slow.client.base_url))
        page.wait_for_function("/loading/.test(document.getElementById('status').textContent)")
        go.set()
        page.wait_for_function("document.getElementById('status').textContent === 'ready'")


def test_what_takes_long_is_stopped(open_page, reader):
    page = open_page()
    page.wait_for_function("state.info !== null")
    page.evaluate("() => { state.info.max_new_tokens = 4096 }")
    page.route("**/explain", lambda route: route.continue_(post_data=hot(route.request.post_data)))
    page.fill("#text", " ".join([TEXT] * 8))
    page.click("#read")
    page.wait_for_selector("#tokens .tok")
    page.click("#explain-all")
    page.wait_for_selector("#tokens .tok.writing")
    page.click("#stop")
    page.wait_for_function("document.getElementById('status').textContent === 'stopped'")
    assert page.locator("#tokens .tok.writing, #tokens .tok.queued").count() == 0


def hot(body):
    """At this temperature most explanations take long to end: of forty, some are always being written."""
    return json.dumps({**json.loads(body), "temperature": 5})


def test_it_asks_for_the_token_that_a_server_wants(open_page, reader):
    with Served(lambda: reader, ServerSettings(secret="sesame")) as closed:
        page = open_page(at=str(closed.client.base_url))
        page.wait_for_selector("#secret:visible")
        page.fill("#secret", "sesame")
        page.keyboard.press("Enter")
        page.wait_for_function("document.getElementById('status').textContent === 'ready'")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_it_in_either_light(open_page, scheme):
    page = open_page(viewport={"width": 360, "height": 700}, color_scheme=scheme)
    read(page, TEXT + " " + "x" * 300)
    assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, background[4:-1].split(","))) < 200) == (scheme == "dark")
