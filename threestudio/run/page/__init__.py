"""``report.html``: one file that shows a run, or several side by side, and needs no network.

It is made of what is in the folder of a run, whatever has become of the run: :mod:`.facts` reads
it, :mod:`.sections` writes the parts, and this module puts them into a page. The object is drawn by
the viewer of :mod:`threestudio.run.drawing`, and ``page.js`` has what is around it. (A static
recording of viser needs viser, a server for its making and 0.8 MB a page, and shares no camera with
its neighbour.)

The page is sent to others, and a run may have come from others. So all text is escaped
(:mod:`.markup`), and the page's own content security policy lets the browser run the one script of
which it has the hash, load nothing and send nothing.
"""

import base64
import hashlib
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import threestudio
from threestudio.run.drawing import BUDGET, VIEWER
from threestudio.run.page import sections
from threestudio.run.page.facts import Facts, read_facts
from threestudio.run.page.markup import Html, tag
from threestudio.utils.errors import UserError
from threestudio.utils.files import whole_file

NAME = "report.html"
GENERATOR = "threestudio-lods"
MAX_BYTES = 5_000_000
MAX_RUNS = 12  # a browser draws into 16 canvases at most
_HERE = Path(__file__).resolve().parent


def write_page(runs: Sequence, target=None) -> Path:
    """Write the page of one run's folder or of several to `target`, by default ``report.html`` in
    the folder of the one run, and return its path. The file is replaced only when the new one is
    complete.

    Raises :class:`UserError` for no run, more than MAX_RUNS, several without a target, and a target
    that is there and no such page; ``OSError`` where the disk takes no page.
    """
    target = check(runs, target)
    facts = [read_facts(run) for run in runs]
    budget = BUDGET
    while (
        len(text := page(facts, str(target.parent), budget).encode("utf-8", "replace")) >= MAX_BYTES
    ):
        if budget < 1000:
            raise UserError(
                f"a page of these {len(runs)} runs would have more than 5 MB: name fewer"
            )
        budget //= 2
    target.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(target) as tmp:
        tmp.write_bytes(text)
    return target


def check(runs: Sequence, target=None) -> Path:
    """Where :func:`write_page` would write. Raises as it does, before anything is read."""
    if not 1 <= len(runs) <= MAX_RUNS:
        raise UserError(f"a page shows 1 to {MAX_RUNS} runs, not {len(runs)}")
    if target is None and len(runs) > 1:
        raise UserError("a page of several runs needs a file to be written to")
    target = Path(runs[0], NAME) if target is None else Path(target)
    _refuse_foreign(target)
    return target


def _refuse_foreign(target: Path) -> None:
    if not os.path.lexists(target):
        return
    head = b""
    if target.is_file():
        with open(target, "rb") as file:
            head = file.read(4096)
    if f'content="{GENERATOR}"'.encode() not in head:
        raise UserError(f"{target} is there and not a page of a run: name another file")


def page(runs: Sequence[Facts], folder: str, budget: int = BUDGET) -> str:
    """The HTML of a page in ``folder``; ``budget``: how many Gaussians or triangles it may draw."""
    one = len(runs) == 1
    title = runs[0].title if one else f"{len(runs)} runs side by side"
    most = max(budget // len(runs), 500)
    body = _of_one(runs[0], folder, most) if one else _of_several(runs, folder, most)
    # one module: page.js finds what viewer.js exports beside itself
    files = (VIEWER, _HERE / "page.js", _HERE / "page.css")
    viewer, page_script, style = (file.read_text("utf-8") for file in files)
    script = viewer + page_script
    policy = (
        f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    head = [
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="generator", content=GENERATOR),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="referrer", content="no-referrer"),
        tag("title", title),
        Html(f"<style>{style}</style>"),
    ]
    whole = tag(
        "html",
        tag("head", *head),
        tag("body", *body, Html(f'<script type="module">{script}</script>')),
        lang="en",
    )
    return f"<!doctype html>\n{whole}\n"


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _section(title: str, parts: Sequence[Html] | None) -> list[Html]:
    return [tag("section", tag("h2", title), *parts)] if parts else []


def _of_one(facts: Facts, folder: str, most: int) -> list[Html]:
    shown = [_stage(facts, "object-0", most)]
    if facts.found is not None:
        shown.append(sections.tools(sections.is_mesh(facts)))
    shown += sections.about_object(facts, most)
    hero = [tag("div", *shown), sections.rows(facts.attempt("summary", facts.short) or [])]
    parts: dict[str, Callable[[], list[Html]]] = {
        "From all sides": lambda: sections.views(facts),
        "How it grew": lambda: sections.growth(facts),
        "Curves": lambda: sections.plots([("", facts)]),
        "What was learned": lambda: sections.learned(facts),
        "Settings": lambda: sections.differences(facts),
        "What was changed on the way": lambda: sections.changes(facts),
        "To repeat it": lambda: sections.again(facts),
        "Versions": lambda: sections.versions(facts),
        "Files": lambda: sections.files(facts, folder),
    }
    return [
        tag("header", tag("h1", facts.title), tag("p", facts.name, class_="soft")),
        tag("section", *hero, class_="hero"),
        *(html for name, make in parts.items() for html in _section(name, _try(facts, name, make))),
        _footer([facts]),
    ]


def _try(facts: Facts, name: str, make: Callable[[], list[Html]]) -> list[Html]:
    """A section of what a run tells of itself, which may be anything."""
    return facts.attempt(name, make) or []


def _stage(facts: Facts, name: str, most: int) -> Html:
    shown = facts.attempt("object", lambda: sections.stage(facts, name, most))
    if shown is None:  # also where it has no poster
        facts.found = None
        shown = sections.stage(facts, name, most)
    return shown


def labels(runs: Sequence[Facts]) -> list[str]:
    """A name for each run: its prompt, and where runs share one, the first part of their folders
    that they differ in, or the last where that does not tell them apart."""
    titles = [facts.title for facts in runs]
    if len(set(titles)) == len(titles):
        return titles
    paths = [Path(os.path.abspath(facts.folder.path)) for facts in runs]
    shared = len(Path(os.path.commonpath(paths)).parts)
    names = [path.parts[min(shared, len(path.parts) - 1)] for path in paths]
    if len(set(names)) < len(names):
        names = [facts.name for facts in runs]
    return [f"{title} ({name})" for title, name in zip(titles, names)]


def _of_several(runs: Sequence[Facts], folder: str, most: int) -> list[Html]:
    named = list(zip(labels(runs), runs))
    cards = []
    for i, (label, facts) in enumerate(named):
        parts = [tag("h3", label), _stage(facts, f"object-{i}", most)]
        parts += sections.about_object(facts, most)
        cards.append(tag("article", *parts))
    meshes = any(map(sections.is_mesh, runs))
    made = [
        tag("header", tag("h1", f"{len(runs)} runs side by side")),
        *([sections.tools(meshes)] if any(f.found is not None for f in runs) else []),
        tag("section", *cards, class_="runs"),
        *_section("What they differ in", _try(runs[0], "comparison", lambda: _differing(named))),
    ]
    curves = _try(runs[0], "curves", lambda: sections.plots(named))
    made += _section(
        "Curves", [sections.key([label for label, _ in named]), *curves] if curves else []
    )
    for label, facts in named:
        told = (sections.views, sections.growth, sections.learned, sections.changes, sections.again)
        parts = [html for make in told for html in _try(facts, make.__name__, partial(make, facts))]
        parts += _try(facts, "files", partial(sections.files, facts, folder))
        made += _section(label, parts)
    return [*made, _footer(runs)]


def _differing(named: Sequence[tuple[str, Facts]]) -> list[Html]:
    """A table of what is told of the runs and of their settings, of both what is not the same in
    all; and a line with what all share of the former."""
    told = [dict(facts.attempt("summary", facts.short) or []) for _, facts in named]
    known = [dict(sections.settings.flat(facts.settings)) for _, facts in named]
    keys = dict.fromkeys(key for each in told for key in each)
    rows = {key: [each.get(key, "—") for each in told] for key in keys}
    body = [[key, *values] for key, values in rows.items() if len(set(values)) > 1]
    same = [f"{key} {values[0]}" for key, values in rows.items() if len(set(values)) == 1]
    left_out = sections.settings.PLACES
    for key in dict.fromkeys(key for each in known for key in each):
        values = [sections.text_of(e.get(key, sections.settings.UNKNOWN)) for e in known]
        if len(set(values)) > 1 and key not in left_out and key not in rows:
            body.append([key, *values])
    made = [sections.table(["", *(label for label, _ in named)], body, bold=-1)] if body else []
    shared = [tag("p", tag("small", f"The same in all: {', '.join(same)}."))] if same else []
    return [*made, *shared]


def _footer(runs: Sequence[Facts]) -> Html:
    parts = [tag("p", f"Made by {GENERATOR}; nothing on this page is loaded from elsewhere.")]
    missing = [
        f"{facts.name}: {text}" if len(runs) > 1 else text
        for facts in runs
        for text in facts.left_out
    ]
    if missing:
        parts.append(tag("p", f"Left out: {'; '.join(missing)}."))
    return tag("footer", *parts)


def try_page(run, target=None) -> Path | None:
    """The page of a run that has just ended, as of :func:`write_page`; what keeps it from being
    made is one warning, for the run has done its work."""
    try:
        return write_page([run], target)
    except Exception as error:
        text = " ".join(str(error).split())[:300] or type(error).__name__
        threestudio.warn(f"no {NAME}: {text}")
    return None
