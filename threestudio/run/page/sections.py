"""The parts of the page of a run."""

import json
import os
import re
from collections.abc import Sequence
from urllib.parse import quote

from threestudio.run.drawing import Triangles, left_out, packed
from threestudio.run.page import curves, settings
from threestudio.run.page.facts import Facts, size_of
from threestudio.run.page.markup import Html, joined, tag
from threestudio.run.page.pictures import Picture
from threestudio.run.page.settings import text_of

Parts = list[Html]
MAX_CHANGES = 500  # that are listed
MAX_COMMAND = 4000  # characters


def picture(found: Picture, alt: str, class_: str | None = None) -> Html:
    size = {"width": found.width, "height": found.height}
    return tag("img", src=found.data, alt=alt, class_=class_, loading="lazy", **size)


def link(facts: Facts, name: str, page_folder: str) -> Html:
    """A link to a file of a run, relative to the folder that the page is in."""
    path = os.path.relpath(os.path.abspath(facts.folder / name), os.path.abspath(page_folder))
    address = quote(os.fsencode(path.replace(os.sep, "/")))
    return tag("a", name, href=f"./{address}")


# --- the object -----------------------------------------------------------------------------------


def stage(facts: Facts, name: str, most: int) -> Html:
    """The object, to be turned, of at most so many Gaussians or triangles; with a picture where
    nothing can be drawn."""
    found = facts.drawn(most)
    if found is None:
        if facts.poster is None:
            return tag("div", tag("p", "There is no object to show."), class_="stage empty")
        still = picture(facts.poster, f"A view of {facts.title}")
        return tag("div", still, class_=f"stage {ground(facts)}")
    inside = [picture(facts.poster, f"A view of {facts.title}")] if facts.poster else []
    help_ = f"{facts.title}: drag to turn it, arrow keys turn it too, + and - zoom"
    canvas = tag("canvas", tabindex=0, role="img", aria_label=help_)
    said = tag("p", "Loading …", class_="said")
    shown = tag("div", *inside, canvas, said, class_=f"stage {ground(facts)}", data_object=name)
    about, data = packed(found, facts.camera)
    kind = "application/octet-stream"
    held = tag("script", Html(data), id=name, type=kind, data_about=json.dumps(about))
    return Html(shown + held)


def ground(facts: Facts) -> str:
    """The class of the colour behind an object: the nearest to that of its views."""
    color = facts.setting("system.background.color")
    numbers = color if isinstance(color, (list, tuple)) else [1.0]
    if not numbers or not all(isinstance(c, (int, float)) for c in numbers):
        return "white"
    mean = sum(max(0, min(1, number)) for number in numbers) / len(numbers)
    return "white" if mean > 0.75 else "black" if mean < 0.25 else "grey"


def tools(meshes: bool) -> Html:
    buttons = [("turn", "Stop"), ("reset", "Reset"), ("ground", "Background")]
    buttons += [("shape", "Shape")] * meshes
    made = [tag("button", text, type="button", data_do=name) for name, text in buttons]
    hint = tag("small", "Drag to turn; pinch, or click and scroll, to zoom.")
    return tag("div", *made, hint, class_="tools", hidden=True)


def about_object(facts: Facts, most: int) -> Parts:
    """What the drawing does not show."""
    drawn = facts.drawn(most)
    if facts.found is None or drawn is None:
        return []
    said = left_out(drawn, facts.found)
    if facts.object_file.endswith(".ckpt"):
        said.append("The run was stopped before its end: this is its last checkpoint.")
    return [tag("p", tag("small", text)) for text in said]


def rows(pairs: Sequence[tuple[str, str]]) -> Html:
    return tag("dl", *(part for what, text in pairs for part in (tag("dt", what), tag("dd", text))))


# --- pictures and curves --------------------------------------------------------------------------


def views(facts: Facts) -> Parts:
    if facts.sheet is None:
        return []
    return [picture(facts.sheet, f"Views of {facts.title} from all sides", "sheet")]


def growth(facts: Facts) -> Parts:
    if not facts.previews:
        return []
    steps = [
        tag("figure", picture(p, f"{facts.title} at {p.label}"), tag("figcaption", p.label))
        for p in facts.previews
    ]
    return [tag("div", *steps, class_="strip", tabindex=0)]


def plots(runs: Sequence[tuple[str, Facts]]) -> Parts:
    """A plot for each column that changes in one of the runs, with a line for each run."""
    names: dict[str, None] = {}
    for _, facts in runs:
        names |= dict.fromkeys(curves.chosen(facts.curves))
    drawn = []
    for name in sorted(names, key=curves.order):
        lines = [(label, facts.curves[name]) for label, facts in runs if name in facts.curves]
        if len(lines) == len(runs):
            drawn.append(curves.plot(name, lines))
        elif lines:  # the colours are those of all runs
            every = [(label, facts.curves.get(name, [])) for label, facts in runs]
            drawn.append(curves.plot(name, every))
    still = {
        curves.title(name): curve[0][1]
        for _, facts in runs[:1]
        for name, curve in sorted(facts.curves.items(), key=lambda item: curves.order(item[0]))
        if name not in names
    }
    made: Parts = [tag("div", *drawn, class_="plots")] if drawn else []
    if still and len(runs) == 1:
        text = ", ".join(f"{what} {curves.short(value)}" for what, value in still.items())
        made.append(tag("p", tag("small", f"Constant: {text}.")))
    return made


def key(labels: Sequence[str]) -> Html:
    """Which colour is which run's."""
    lines = []
    for i, label in enumerate(labels):
        mark = tag("polyline", points="0,5 14,5", class_=f"line{i % 6}")
        lines.append(tag("li", tag("svg", mark, viewBox="0 0 14 10", aria_hidden="true"), label))
    return tag("ul", *lines, class_="key")


# --- words ----------------------------------------------------------------------------------------


def learned(facts: Facts) -> Parts:
    part = facts.learned
    if part is None:
        return []
    told = [("what", part.what), ("size", f"{part.numbers:,} numbers, {size_of(part.size)}")]
    told += [("learned on", part.metadata["model"])] if "model" in part.metadata else []
    told += [("has moved by", part.moved)] if part.moved else []
    return [rows(told)]


def table(header: Sequence[str], body: Sequence[Sequence[str]], bold: int = 1) -> Html:
    """``bold``: the column whose cells are bold; the first has keys."""
    head = tag("tr", *(tag("th", text) for text in header))
    lines = []
    for row in body:
        cells = [tag("td", _breakable(row[0]), class_="key")]
        for i, text in enumerate(row[1:], 1):
            cells.append(tag("td", text, class_="value" if i == bold else None))
        lines.append(tag("tr", *cells))
    inside = [tag("thead", head), tag("tbody", *lines)]
    return tag("div", tag("table", *inside), class_="wide")


def _breakable(key: str) -> Html:
    """A dotted key that may go on in another line after a dot or an underscore."""
    return Html(re.sub(r"([._])", r"\1<wbr>", joined(key)))


def differences(facts: Facts) -> Parts:
    """What was set in the command, and by section what is not the default."""
    made: Parts = []
    typed = facts.command.overrides if facts.command else []
    if typed:
        split = [word.partition("=") for word in typed]
        made.append(table(["set in the command", "value"], [[k, v] for k, _, v in split]))
    if not facts.settings:
        return made
    found = settings.differing(facts.settings, settings.defaults(facts.settings))
    groups: dict[str, list[list[str]]] = {}
    for name, value, default in found:
        parts = name.split(".")
        deep = parts[0] == "system" and len(parts) > 2
        section = ".".join(parts[: 2 if deep else 1]) if len(parts) > 1 else "run"
        groups.setdefault(section, []).append([name, text_of(value), text_of(default)])
    if groups:
        text = "What is not the default, by section; — stands where no default is declared:"
        made.append(tag("p", text, class_="above"))
    for section, lines in groups.items():
        count = tag("span", f"{len(lines)}")
        header = ["setting", "value", "default"]
        made.append(tag("details", tag("summary", section, count), table(header, lines)))
    text = facts.folder.text(settings.PARSED)
    if text:
        made.append(tag("details", tag("summary", "all settings"), tag("pre", text)))
    return made


def changes(facts: Facts) -> Parts:
    """What somebody changed on the way."""
    found = settings.read_changes(facts.folder)
    if not found:
        return []
    made: Parts = [table(["before step", "setting", "from", "to"], found[:MAX_CHANGES], bold=3)]
    if len(found) > MAX_CHANGES:
        more = f"{len(found) - MAX_CHANGES:,} more are in {settings.CHANGES}."
        made.append(tag("p", tag("small", more)))
    return made


def again(facts: Facts) -> Parts:
    """The commands."""
    if facts.command is None:
        return []
    made: Parts = [tag("p", "It was made by")]
    asked = facts.trainings[0].get("asked") if facts.trainings else None
    if isinstance(asked, str) and asked:
        made += [tag("pre", asked[:MAX_COMMAND], class_="command"), tag("p", "which has called")]
    made.append(tag("pre", facts.command, class_="command"))
    if facts.settings:
        home, steered = str(facts.folder.path), facts.folder.has(settings.CHANGES)
        text = settings.repeating(facts.command, facts.settings, home, steered)
        made.append(
            tag("p", "Again from the start, with the settings and the seed that it has saved:")
        )
        made.append(tag("pre", text, class_="command"))
    return made


def versions(facts: Facts) -> Parts:
    if not facts.trainings:
        return []
    found = facts.trainings[-1].get("versions")
    if not isinstance(found, dict):
        return []
    return [tag("p", ", ".join(f"{name} {number}" for name, number in found.items()))]


def files(facts: Facts, page_folder: str) -> Parts:
    items = []
    for what, name, size in facts.files:
        about = tag("small", f" {what}, {size_of(size)}")
        items.append(tag("li", link(facts, name, page_folder), about))
    return [tag("ul", *items, class_="files")] if items else []


def is_mesh(facts: Facts) -> bool:
    return isinstance(facts.found, Triangles)
