"""A document of few parts, written once as Markdown and once as one HTML page that needs nothing
else: pictures are data URIs, plots are inline SVG, there is no script."""

import base64
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from PIL import Image

SENTENCE = 48  # characters of a cell, from which its text is broken into lines
TYPES = {".webp": "image/webp", ".png": "image/png"}


class Bold(str):
    """A table's cell in bold."""


def _marked(text: str) -> str:
    """Text of others in Markdown: nothing in it is markup, a table's cell included."""
    text = re.sub(r"([\\`*|<]|\](?=\()|(?<!\w)_|_(?!\w))", r"\\\1", text)
    return " ".join(text.split())


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")


def listed(names: Iterable[str]) -> str:
    """``a, b and c``."""
    names = list(names)
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


@dataclass
class Heading:
    level: int
    text: str

    def markdown(self) -> str:
        return "#" * self.level + " " + _marked(self.text)

    def html(self) -> str:
        return f"<h{self.level}>{escape(self.text)}</h{self.level}>"


@dataclass
class Text:
    text: str

    def markdown(self) -> str:
        return _marked(self.text)

    def html(self) -> str:
        return f"<p>{escape(self.text)}</p>"


@dataclass
class Bullets:
    items: Sequence[str]

    def markdown(self) -> str:
        return "\n".join(f"- {_marked(item)}" for item in self.items)

    def html(self) -> str:
        return "<ul>" + "\n".join(f"<li>{escape(item)}</li>" for item in self.items) + "</ul>"


@dataclass
class Table:
    """Rows of strings; the first column names the row."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        def line(cells):
            return "| " + " | ".join(cells) + " |"

        def cell(text):
            return f"**{_marked(text)}**" if isinstance(text, Bold) else _marked(text)

        head = [line(_marked(h) for h in self.header), line("---" for _ in self.header)]
        return "\n".join(head + [line(cell(c) for c in row) for row in self.rows])

    def html(self) -> str:
        def cell(k, text):
            if k == 0:
                return f'<th scope="row">{escape(text)}</th>'
            kind = ' class="said"' if len(text) > SENTENCE else ""
            text = f"<b>{escape(text)}</b>" if isinstance(text, Bold) else escape(text)
            return f"<td{kind}>{text}</td>"

        head = "".join(f'<th scope="col">{escape(h)}</th>' for h in self.header)
        rows = ["".join(cell(k, c) for k, c in enumerate(row)) for row in self.rows]
        body = "\n".join(f"<tr>{row}</tr>" for row in rows)
        return (
            f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody>'
            "</table></div>"
        )


@dataclass
class Figure:
    """A plot; Markdown has its caption only."""

    svg: str
    caption: str

    def markdown(self) -> str:
        return _marked(f"{self.caption} (The plot is in report.html.)")

    def html(self) -> str:
        return f"<figure>{self.svg}<figcaption>{escape(self.caption)}</figcaption></figure>"


@dataclass
class Gallery:
    """Pictures in rows and columns, None where there is none; ``folder`` is what Markdown's links
    are relative to."""

    header: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Path | None]]]
    folder: Path

    def markdown(self) -> str:
        rows = []
        for name, files in self.rows:
            links = [f"![]({f.relative_to(self.folder).as_posix()})" if f else "-" for f in files]
            rows.append(f"| {_marked(name)} | " + " | ".join(links) + " |")
        head = "| " + " | ".join(["", *map(_marked, self.header)]) + " |"
        return "\n".join([head, "|" + " --- |" * (len(self.header) + 1), *rows])

    def html(self) -> str:
        head = "".join(f'<th scope="col">{escape(h)}</th>' for h in ("", *self.header))
        rows = []
        for name, files in self.rows:
            cells = [
                f"<td>{self._picture(f, f'{column}: {name}') if f else 'none'}</td>"
                for column, f in zip(self.header, files)
            ]
            rows.append(f'<tr><th scope="row">{escape(name)}</th>{"".join(cells)}</tr>')
        body = "\n".join(rows)
        return (
            f'<div class="wide"><table class="sheets"><thead><tr>{head}</tr></thead>\n'
            f"<tbody>{body}</tbody></table></div>"
        )

    def _picture(self, file: Path, alt: str) -> str:
        data = base64.b64encode(file.read_bytes()).decode()
        with Image.open(file) as image:
            width, height = image.size
        return (
            f'<img loading="lazy" decoding="async" width="{width}" height="{height}" '
            f'alt="{escape(alt)}" src="data:{TYPES[file.suffix]};base64,{data}">'
        )


STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1e; --soft: #66666c; --line: #d9d9de;
  --paper: #ffffff; --band: #f4f4f6; --c0: #4e79a7; --c1: #d1701b; --c2: #c23b3d; --c3: #3f8f88;
  --c4: #4a8f3c; --c5: #a8861b; --c6: #96608f; --c7: #1f4fe0; --c8: #c2188b; --c9: #0b7f9c;
  --c10: #7b3fd1; --c11: #8a5a2b; --c12: #2f7d32; --c13: #6e6e73; }
@media (prefers-color-scheme: dark) { :root { --ink: #ececf0; --soft: #a0a0a8; --line: #3a3a40;
  --paper: #151518; --band: #1f1f24; --c0: #8fb4dc; --c1: #f6a35c; --c2: #f07f80; --c3: #7fccc4;
  --c4: #8fd07f; --c5: #e6c760; --c6: #d3a3cb; --c7: #86a6ff; --c8: #ff86d2; --c9: #6fd3ea;
  --c10: #c2a1ff; --c11: #d3a57a; --c12: #86cf8a; --c13: #b4b4ba; } }
body { margin: 0 auto; max-width: 76rem; padding: 1.2rem 1rem 4rem; background: var(--paper);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
h1, h2, h3 { line-height: 1.2; text-wrap: balance; } h2 { margin-top: 2.6rem; }
p, li, figcaption { max-width: 46rem; } figcaption { color: var(--soft); font-size: .9rem; }
.wide { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: top; } td { white-space: nowrap; } .said { white-space: normal; }
thead th { color: var(--soft); }
tbody th { font-weight: 600; position: sticky; left: 0; background: var(--paper); }
tbody tr:nth-child(even) > * { background: var(--band); }
figure { margin: 1rem 0; overflow-x: auto; }
svg { width: 100%; min-width: 32rem; max-width: 44rem; height: auto; }
svg text { font: 11px system-ui, sans-serif; fill: currentColor; paint-order: stroke;
  stroke: var(--paper); stroke-width: 3px; }
svg .mid { text-anchor: middle; fill: var(--soft); } svg .end { text-anchor: end;
  fill: var(--soft); } svg path { fill: none; } svg .grid { stroke: var(--line); }
svg .axis { stroke: var(--soft); } svg .front { stroke: var(--soft); stroke-dasharray: 4 4; }
svg .line { stroke: currentColor; stroke-width: 1.8; } svg .dot { fill: currentColor; }
.sheets img { display: block; max-width: none; border-radius: 3px; background: #fff; }
""" + "".join(f".c{k} {{ color: var(--c{k}); }}\n" for k in range(14))


def markdown(blocks: Sequence) -> str:
    return "\n\n".join(block.markdown() for block in blocks) + "\n"


def html(blocks: Sequence, title: str) -> str:
    body = "\n".join(block.html() for block in blocks)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style></head>\n"
        f"<body>\n{body}\n</body></html>\n"
    )
