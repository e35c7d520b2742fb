"""README and documentation: what they name exists, and the drawing of the rooms is what the imports are."""

import ast
import configparser
import dataclasses
import re
import runpy
from pathlib import Path

import pytest

from nlae_jax import config
from nlae_jax.cli import main
from nlae_jax.config import leaves
from nlae_jax.evaluate.figures import FIGURES as FIGURES_OF_SUITE
from nlae_jax.runtime import supervision

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
IDS = [str(path.relative_to(ROOT)) for path in PAGES]
FIGURES = runpy.run_path(str(ROOT / "docs/tools/figures.py"))

LINK = re.compile(r"\]\(([^)\s]+)\)|(?:src|srcset|href)=\"([^\"]+)\"")
HERE = re.compile(r"(?<![\w/.])(?:nlae_jax|experiments|tests|launch|benchmarks|docs)/[\w./-]*[\w/]")
COMMIT = re.compile(r"\b(?=[a-f]*\d)(?=\d*[a-f])[0-9a-f]{7,40}\b")
SECTIONS = "|".join(sorted({leaf.name.partition(".")[0] for leaf in leaves() if "." in leaf.name}))

pages = pytest.mark.parametrize("page", PAGES, ids=IDS)


def headings(page):
    """The anchors of a page, as its headings give them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in titles}


def commands(text):
    """The command lines of a page's code blocks that begin with `nlae`, continued lines joined."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = (line for block in blocks for line in block.replace("\\\n", " ").splitlines())
    return [line for line in lines if line.startswith("nlae ")]


@pytest.fixture(scope="module")
def flags_of():
    """The flags of a command, none where there is no such command."""
    known = {}

    def read(command, capsys):
        if command not in known:
            with pytest.raises(SystemExit) as ended:
                main([command, "--help"])
            known[command] = set(re.findall(r"--[a-z-]+", capsys.readouterr().out)) if ended.value.code == 0 else set()
        return known[command]

    return read


@pages
def test_links_lead_somewhere(page):
    for match in LINK.finditer(page.read_text()):
        target, _, anchor = (match[1] or match[2]).partition("#")
        if target.startswith(("http:", "https:")):
            continue
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), target
        if anchor and not anchor.endswith("-mode-only"):  # which the theme reads
            assert anchor in headings(path), f"{target}#{anchor}"


@pages
def test_files_that_are_named_exist(page):
    for name in HERE.findall(page.read_text()):
        assert (ROOT / name).exists(), name


@pages
def test_commands_and_their_flags_exist(page, flags_of, capsys):
    text = page.read_text()
    for command in re.findall(r"`nlae ([a-z]+)", text):
        assert flags_of(command, capsys), f"nlae {command}"
    for line in commands(text):
        command, arguments = line.split()[1], re.sub(r"\"[^\"]*\"|#.*", "", line)
        for flag in re.findall(r"(?<=\s)--(?!config\.)[a-z-]+", arguments):
            assert flag in flags_of(command, capsys), f"nlae {command} {flag}"


@pages
def test_fields_of_the_config_exist(page):
    text, known = page.read_text(), {leaf.name for leaf in leaves()}
    named = re.findall(r"--config\.([a-z_]+(?:\.[a-z_]+)+)", text)
    named += [name for name in re.findall(rf"`((?:{SECTIONS})\.[a-z_]+)[`=]", text) if not name.endswith(".json")]
    assert [name for name in named if name not in known and name != "a.b"] == []


@pages
def test_targets_of_make_exist(page):
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:`|^)make ([a-z]+)", page.read_text(), re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_readme_is_short_and_of_no_single_commit():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 160
    assert COMMIT.findall(text) == []
    assert COMMIT.findall("at a5dda7c, not 1234567 or defaced") == ["a5dda7c"]


@pages
def test_python_in_it_is_python(page):
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        ast.parse(block)


def test_exit_codes_are_those_of_the_code():
    codes = re.findall(r"^\| (\d+) \|", (ROOT / "docs/resume.md").read_text(), re.MULTILINE)
    assert codes == ["0", "2", str(supervision.PREEMPTED), str(supervision.LOST), "130"]


def test_the_page_of_the_configuration_has_the_fields_and_nothing_else():
    griffe = pytest.importorskip("griffe")
    extensions = griffe.load_extensions(str(ROOT / "docs/tools/field_comments.py"))
    module = griffe.load("nlae_jax.config", search_paths=[ROOT], extensions=extensions)
    for section in ("SftConfig", "InitConfig", "RlConfig"):
        shown = re.findall(r"^\| `(\w+)` \|", module[section].docstring.value, re.MULTILINE)
        assert shown == [field.name for field in dataclasses.fields(getattr(config, section))]


def test_figures_are_as_they_are_drawn():
    for name, content in FIGURES["drawn"]().items():
        assert (ROOT / "docs/assets" / name).read_text() == content, f"{name}: run python docs/tools/figures.py"


def test_rooms_are_those_that_imports_are_held_to():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    floors = setup["importlinter:contract:rooms"]["layers"].split("\n")
    layers = [room for floor in floors for room in floor.replace(":", " ").split()]
    assert [name for names, _ in FIGURES["ROOMS"] for name in names if name != "__main__"] == layers


def test_every_figure_of_the_suite_is_in_the_documentation_with_its_formula():
    page = (ROOT / "docs/evaluation.md").read_text()
    for figure in FIGURES_OF_SUITE:
        row = next(line for line in page.splitlines() if line.startswith(f"| `{figure.key}` |"))
        escaped = [text.replace("|", "\\|") for text in (figure.meaning, figure.formula)]
        assert all(text in page for text in escaped), figure.key
        assert all(f"`{control}`" in page for control in figure.controls), figure.key
        assert row.count(" | ") == 4
