"""Draws the figures of README and documentation, each for light and for dark pages: `python docs/tools/figures.py`.

`ROOMS` is also what `tests/test_docs.py` holds the imports of the package against.
"""

from __future__ import annotations

from pathlib import Path
from xml.sax.saxutils import escape

ASSETS = Path(__file__).parents[1] / "assets"

PALETTES = {
    "light": {
        "ink": "#1f2328",
        "soft": "#59636e",
        "line": "#8c959f",
        "card": "#f6f8fa",
        "subject": "#6e7781",
        "encoder": "#0969da",
        "decoder": "#8250df",
        "vector": "#bf5700",
    },
    "dark": {
        "ink": "#f0f6fc",
        "soft": "#b3bcc6",
        "line": "#768390",
        "card": "#1f262e",
        "subject": "#9198a1",
        "encoder": "#58a6ff",
        "decoder": "#c297ff",
        "vector": "#f0883e",
    },
}

# The package's modules by floor, top-down: a module imports from its own floor and from lower ones only.
ROOMS = (
    (("cli", "__main__", "api"), "entry points: the nlae command, the NLA class"),
    (("serve",), "a pair over HTTP, for many readers at once, and the page"),
    (("explore",), "using a pair: tokens, chats, neurons, steering, audits"),
    (("plan",), "compiles the training steps for a TPU slice, without a TPU"),
    (("bench",), "times the training steps on this machine"),
    (("run",), "a run: its workdir, its stages, the export of its pair"),
    (("report",), "pages and tables for people"),
    (("evaluate",), "FVE with its controls, claims, health"),
    (("train",), "loop, jitted steps, objectives, state, checkpoints, metrics"),
    (("interop",), "the reference's formats: sidecars, released pairs, datasets"),
    (("data",), "text, activations, descriptions, batches"),
    (("roles",), "protocol, subject, encoder, decoder, pair, round trip, directions"),
    (("lm",), "one decoder-only language model, its families and files"),
    (("mesh",), "the device axes, and how arrays are split over them"),
    (("config",), "every field, its default and its meaning"),
    (("runtime", "assets"), "processes, files, messages, errors; shipped data"),
)


def _text(x: float, y: float, words: str, color: str, size: int = 15, extra: str = "") -> str:
    return f'<text x="{x}" y="{y}" fill="{color}" font-size="{size}" {extra}>{escape(words)}</text>'


def _document(width: int, height: int, title: str, parts: list[str], color: str) -> str:
    """`color` is that of arrow heads."""
    return "\n".join(
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
            f'height="{height}" role="img" font-family="system-ui, \'DejaVu Sans\', sans-serif">',
            f"<title>{escape(title)}</title>",
            '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" '
            f'orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="{color}"/></marker></defs>',
            *parts,
            "</svg>\n",
        )
    )


def _vector(x: float, y: float, strengths: tuple[float, ...], color: str) -> str:
    """A column of cells, each as strong as its number."""
    return "".join(
        f'<rect x="{x}" y="{y + 17 * i}" width="26" height="15" rx="2" fill="{color}" fill-opacity="{strength}"/>'
        for i, strength in enumerate(strengths)
    )


def round_trip(palette: dict[str, str]) -> str:
    """Subject, activation, encoder, words, decoder, rebuilt activation, and the comparison that trains both."""
    ink, soft, line = palette["ink"], palette["soft"], palette["line"]
    middle = 'text-anchor="middle"'
    heavy = f'font-weight="600" {middle}'
    parts = []

    def box(x: int, width: int, role: str, lines: tuple[str, str], y: int = 92, height: int = 96) -> None:
        parts.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="10" fill="{palette["card"]}" '
            f'stroke="{palette[role]}" stroke-width="2"/>'
        )
        parts.append(_text(x + width / 2, y + 35, role, palette[role], 18, heavy))
        for i, words in enumerate(lines):
            parts.append(_text(x + width / 2, y + 59 + 19 * i, words, soft, 14, middle))

    def arrow(path: str) -> None:
        parts.append(f'<path d="{path}" fill="none" stroke="{line}" stroke-width="2" marker-end="url(#head)"/>')

    # The subject: blocks over the text that it reads, one of them read.
    parts.append(_text(92, 38, "subject", palette["subject"], 18, heavy))
    for i in range(6):
        read = i == 2
        parts.append(
            f'<rect x="32" y="{54 + 26 * i}" width="120" height="20" rx="4" fill="{palette["card"]}" '
            f'stroke="{palette["vector"] if read else palette["subject"]}" stroke-width="{2.5 if read else 1.2}"/>'
        )
    parts.append(_text(92, 120, "block K", palette["vector"], 13, middle))
    parts.append(_text(92, 234, "The capital of", soft, 15, middle))
    parts.append(
        f'<text x="92" y="254" fill="{soft}" font-size="15" {middle}>France is '
        f'<tspan fill="{ink}" font-weight="700">Paris</tspan></text>'
    )

    cells = (0.9, 0.25, 0.6, 1.0, 0.15, 0.75, 0.4)
    arrow("M154 116 C180 116 182 140 206 140")
    parts.append(_vector(212, 80, cells, palette["vector"]))
    parts.append(_text(225, 66, "activation", palette["vector"], 14, middle))
    arrow("M244 140 L278 140")
    box(284, 124, "encoder", ("turns it", "into words"))
    arrow("M410 140 L440 140")

    parts.append(
        f'<rect x="446" y="62" width="212" height="156" rx="10" fill="{palette["card"]}" stroke="{line}" '
        'stroke-dasharray="5 4"/>'
    )
    words = (
        'Next comes ".", ","',
        'or "and". The text is',
        "about city, city and city.",
        "The text ends: city of",
        "Paris. Paris",
    )
    for i, row in enumerate(words):
        parts.append(_text(464, 94 + 24 * i, row, ink, 14, 'font-style="italic"'))
    parts.append(_text(552, 50, "explanation", soft, 14, middle))
    arrow("M660 140 L690 140")
    box(696, 124, "decoder", ("rebuilds it", "from the words"))
    arrow("M822 140 L852 140")
    parts.append(_vector(858, 80, (0.8, 0.3, 0.5, 1.0, 0.25, 0.7, 0.5), palette["vector"]))
    parts.append(_text(871, 66, "rebuilt", palette["vector"], 14, middle))

    # The comparison, and what comes of it.
    parts.append(f'<path d="M225 204 L225 290 L400 290" fill="none" stroke="{line}" stroke-width="2"/>')
    parts.append(f'<path d="M871 204 L871 290 L706 290" fill="none" stroke="{line}" stroke-width="2"/>')
    parts.append(f'<rect x="400" y="266" width="306" height="48" rx="24" fill="{palette["card"]}" stroke="{line}"/>')
    parts.append(_text(553, 296, "same direction? here cos 0.916", ink, 16, middle))
    arrow("M430 266 C400 240 346 240 346 196")
    arrow("M676 266 C706 240 758 240 758 196")
    parts.append(_text(344, 254, "reward", palette["encoder"], 14, 'text-anchor="end"'))
    parts.append(_text(764, 254, "error", palette["decoder"], 14))
    title = "A subject's activation becomes words, the words become an activation, and how well they agree trains both."
    return _document(920, 330, title, parts, line)


def architecture(palette: dict[str, str]) -> str:
    """The rooms of the package as floors: imports point down."""
    parts, height = [], 52
    for i, (names, purpose) in enumerate(ROOMS):
        y = 10 + height * i
        parts.append(
            f'<rect x="52" y="{y}" width="838" height="44" rx="8" fill="{palette["card"]}" stroke="{palette["line"]}"/>'
        )
        label = ", ".join(name for name in names if name != "__main__")
        if len(names) > 4:
            parts.append(_text(68, y + 19, label, palette["encoder"], 14, 'font-weight="600"'))
            parts.append(_text(68, y + 37, purpose, palette["ink"], 13))
        else:
            parts.append(_text(68, y + 27, label, palette["encoder"], 15, 'font-weight="600"'))
            parts.append(_text(300, y + 27, purpose, palette["ink"], 15))
    bottom = 10 + height * len(ROOMS)
    parts.append(
        f'<path d="M26 14 L26 {bottom - 12}" stroke="{palette["line"]}" stroke-width="2" marker-end="url(#head)"/>'
    )
    parts.append(
        _text(0, 0, "imports", palette["soft"], 13, f'transform="translate(17 {bottom / 2 + 24}) rotate(-90)"')
    )
    return _document(
        900, bottom + 4, "The package's modules, top-down; each imports only from below.", parts, palette["line"]
    )


FIGURES = {"round-trip": round_trip, "architecture": architecture}


def drawn() -> dict[str, str]:
    """File name -> content of every figure."""
    return {
        f"{name}-{theme}.svg": draw(palette) for name, draw in FIGURES.items() for theme, palette in PALETTES.items()
    }


if __name__ == "__main__":
    for name, content in drawn().items():
        (ASSETS / name).write_text(content, encoding="utf-8")
