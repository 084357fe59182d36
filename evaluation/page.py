"""A page of few parts, written once as Markdown and once as HTML that needs no other file: pictures
are data URIs, plots are inline SVG, there is no script."""

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from markdown_it import MarkdownIt


class Bold(str):
    """A table's cell in bold."""


def marked(text: str) -> str:
    """Text from others in Markdown: nothing in it is markup, not even in a table's cell."""
    plain = re.sub(r"([\\`*|<&]|\](?=\()|(?<!\w)_|_(?!\w))", r"\\\1", text)
    plain = " ".join(plain.split())
    return f"**{plain}**" if isinstance(text, Bold) else plain


@dataclass
class Heading:
    level: int
    text: str

    def markdown(self) -> str:
        return "#" * self.level + " " + marked(self.text)


@dataclass
class Text:
    """Markdown that somebody wrote; it stays as it is."""

    text: str

    def markdown(self) -> str:
        return self.text.strip()


@dataclass
class Table:
    """Rows of strings; a cell that is a path is a picture, and None is none."""

    header: Sequence[str]
    rows: Sequence[Sequence[str | Path | None]]
    caption: str = ""
    folder: Path = Path()  # what links to pictures are relative to

    def markdown(self) -> str:
        def cell(value):
            if isinstance(value, Path):
                return f"![]({value.relative_to(self.folder).as_posix()})"
            return "none" if value is None else marked(value)

        def line(cells):
            return "| " + " | ".join(cells) + " |"

        head = [line(map(marked, self.header)), line("---" for _ in self.header)]
        text = "\n".join([*head, *(line(map(cell, row)) for row in self.rows)])
        return f"{marked(self.caption)}\n\n{text}" if self.caption else text


@dataclass
class Figure:
    """A plot; Markdown has its caption only."""

    svg: str
    caption: str

    def markdown(self) -> str:
        return marked(f"{self.caption} (The plot is in report.html.)")


STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1e; --soft: #66666c; --line: #d9d9de;
  --paper: #ffffff; --band: #f4f4f6; }
@media (prefers-color-scheme: dark) { :root { --ink: #ececf0; --soft: #a0a0a8; --line: #3a3a40;
  --paper: #151518; --band: #1f1f24; } }
body { margin: 0 auto; max-width: 84rem; padding: 1.2rem 1rem 4rem; background: var(--paper);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
h1, h2, h3 { line-height: 1.2; text-wrap: balance; } h2 { margin-top: 2.6rem; }
p, figcaption { max-width: 46rem; } figcaption { color: var(--soft); font-size: .9rem; }
.wide { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: top; white-space: nowrap; } th { color: var(--soft); }
td:last-child { white-space: normal; min-width: 7rem; }
td:first-child { font-weight: 600; position: sticky; left: 0; background: var(--paper); }
tbody tr:nth-child(even) td { background: var(--band); }
figure { margin: 1rem 0; overflow-x: auto; }
svg { width: 100%; min-width: 32rem; max-width: 46rem; height: auto; background: #fff;
  border-radius: 4px; }
td img { display: block; max-width: none; border-radius: 3px; background: #fff; }
"""


def markdown(blocks: Sequence) -> str:
    return "\n\n".join(block.markdown() for block in blocks) + "\n"


def html(blocks: Sequence, title: str, folder: Path) -> str:
    """``folder``: what pictures are relative to."""
    render = MarkdownIt("commonmark", {"html": False}).enable("table").render

    def picture(found: re.Match) -> str:
        data = base64.b64encode((folder / found[1]).read_bytes()).decode()
        return f'<img loading="lazy" src="data:image/{Path(found[1]).suffix[1:]};base64,{data}" '

    parts = []
    for block in blocks:
        if isinstance(block, Figure):
            caption = f"<figcaption>{escape(block.caption)}</figcaption>"
            parts.append(f"<figure>{block.svg}{caption}</figure>\n")
        else:
            text = render(block.markdown())
            text = re.sub(r'<img src="(sheets/[^"]*)" ', picture, text)
            text = text.replace("<table>", '<div class="wide"><table>')
            parts.append(text.replace("</table>", "</table></div>"))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style></head>\n"
        f"<body>\n{''.join(parts)}</body></html>\n"
    )
