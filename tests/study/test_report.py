"""The report of the evaluation, from small tables made here."""

import base64
import csv
import math
import random
import re
from html.parser import HTMLParser
from statistics import fmean

import numpy as np
import pytest
from PIL import Image
from scipy.stats import norm
from scipy.stats import t as student

from evaluation import plots, report
from evaluation.grid import TRUE
from evaluation.montage import GAP, LEFT
from evaluation.results import read, sections, values
from evaluation.statistics import interval
from evaluation.table import sheet_path

COLUMNS = (
    *("grid", "canvas", "prior", "prompt", "kind", "color", "seed", "settings", "steps", "status"),
    *("object_accuracy", "color_accuracy", "frechet", "janus_rate", "silhouette_iou", "clip_score"),
    *("prior_loss_first", "prior_loss_last", "seconds", "seconds_per_step", "peak_mib", "threads"),
    *("device", "cpu", "python", "torch", "diffusers", "peft", "commit"),
)
PROMPTS = [f"a {c}{k}" for c in ("", "red ") for k in ("car", "mug", "lamp", "chair")]
PRIORS = ("sds", "csd", "vsd", "lods-embedding")
MINUS = "\N{MINUS SIGN}"
VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Tables as lists of rows of cells, all attributes, and the text; tags have to be closed in
    their order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tables, self.attributes, self.tags, self.text = [], [], [], set(), ""
        self.bold = set()
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += [(tag, k, v) for k, v in attrs]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += [(tag, k, v) for k, v in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data
        if "td" in self.open or "th" in self.open:
            self.tables[-1][-1][-1] += data
            if "strong" in self.open:
                self.bold.add(data)

    def table(self, *header):
        """The first table with these columns, by the name of the row: {row: {column: cell}}."""
        for head, *rows in self.tables:
            if set(header) <= set(head):
                return {r[0]: dict(zip(head, r)) for r in rows}
        raise AssertionError(f"no table with {header}")


def make_rows(priors=PRIORS, canvases=("gaussians",), prompts=PROMPTS, seeds="012"):
    rng = random.Random(0)
    rows = []
    for canvas in canvases:
        for prior in priors:
            for prompt in prompts:
                for seed in seeds:
                    row = dict.fromkeys(COLUMNS, "")
                    row |= dict(grid="shapes", canvas=canvas, prior=prior, prompt=prompt)
                    row |= dict(seed=seed, status="ok", steps="300", device="cpu", threads="1")
                    row |= dict(commit="abc1234", cpu="EPYC", kind=prompt.split()[-1])
                    row["object_accuracy"] = f"{rng.uniform(0.6, 0.9):.4f}"
                    if "red" in prompt:
                        row["color_accuracy"] = f"{rng.uniform(0.6, 0.9):.4f}"
                    row["frechet"] = f"{rng.uniform(40, 90):.4f}"
                    row["seconds"] = f"{rng.uniform(40, 90):.2f}"
                    row["peak_mib"] = "714"
                    rows.append(row)
    return rows


def change(rows, prior, column, function):
    """Set a column of one prior from the same run of sds."""
    base = {(r["canvas"], r["prompt"], r["seed"]): r for r in rows if r["prior"] == "sds"}
    for r in rows:
        if r["prior"] == prior:
            value = function(float(base[r["canvas"], r["prompt"], r["seed"]][column]))
            r[column] = f"{value:.4f}"


def write_csv(file, rows):
    with open(file, "w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def made(folder, rows=None, **tables):
    """Write the tables and the report; returns the page and the Markdown."""
    for name, table in {"results": rows, **tables}.items():
        if table:
            write_csv(folder / f"{name}.csv", table)
    assert report.main(["--folder", str(folder)]) == 0
    text = (folder / "report.html").read_text()
    return Page(text), (folder / "report.md").read_text()


def number(cell):
    return float(cell.split()[0].replace(MINUS, "-"))


def ends(cell):
    return [float(x.replace(MINUS, "-")) for x in re.findall(r"[+\d.−]+", cell.split("[")[1])]


def slow_bootstrap(values, draws=4000):
    """values: {prompt: {seed: value}}; the interval by loops and another generator."""
    rng, n = random.Random(7), len(values)
    by_prompt = [fmean(seeds.values()) for seeds in values.values()]
    means = [fmean(rng.choice(by_prompt) for _ in by_prompt) for _ in range(draws)]
    tail = 100 * norm.cdf(-math.sqrt(n / (n - 1)) * student.ppf(0.975, n - 1))
    return np.percentile(means, (tail, 100 - tail))


def nested(rows, column, prior):
    found = {}
    for r in rows:
        if r["prior"] == prior and r[column]:
            found.setdefault(r["prompt"], {})[r["seed"]] = float(r[column])
    return found


def test_the_page_stands_alone(tmp_path):
    page, _ = made(tmp_path, make_rows(canvases=("2d", "gaussians")))
    assert {"table", "svg", "style", "title"} <= page.tags
    assert not {"script", "link", "iframe", "object"} & page.tags
    for tag, name, value in page.attributes:
        if name in ("src", "href", "srcset", "data", "xlink:href"):
            assert value.startswith(("data:", "#")), (tag, name)
    text = (tmp_path / "report.html").read_text()
    assert not re.search(r"https?:|url\((?!#)|@import", text)
    assert ("meta", "name", "viewport") in page.attributes
    assert "prefers-color-scheme: dark" in text


def test_numbers_are_those_of_the_table(tmp_path):
    rows = make_rows()
    page, markdown = made(tmp_path, rows)
    shown = page.table("method", "object accuracy, %", "seconds")
    assert set(shown) == set(PRIORS)
    for title, column, scale in (
        ("object accuracy, %", "object_accuracy", 100),
        ("colour accuracy, %", "color_accuracy", 100),
        ("Fréchet distance", "frechet", 1),
        ("seconds", "seconds", 1),
        ("peak memory, MiB", "peak_mib", 1),
    ):
        for prior in PRIORS:
            values = nested(rows, column, prior)
            mean = scale * fmean(v for seeds in values.values() for v in seeds.values())
            cell = shown[prior][title]
            assert number(cell) == pytest.approx(mean, abs=0.5 if column == "peak_mib" else 0.051)
            wide = scale * slow_bootstrap(values)
            tolerance = 0.15 * (wide[1] - wide[0]) + 0.1
            assert ends(cell) == pytest.approx(wide, abs=tolerance)
            assert f"{cell}" in markdown
    assert shown["sds"]["runs (prompts)"] == "24 (8)"
    objects, distances = (t for t in page.tables if t[0] == ["prompt", *PRIORS])
    for table, column, scale in ((objects, "object_accuracy", 100), (distances, "frechet", 1)):
        for prompt, *cells in table[1:]:
            for prior, cell in zip(PRIORS, cells):
                mean = scale * fmean(nested(rows, column, prior)[prompt].values())
                assert number(cell) == pytest.approx(mean, abs=0.051)
    paired = page.tables[page.tables.index(next(t for t in page.tables if t[0][0] == "method")) + 1]
    found = {r[0]: dict(zip(paired[0], r)) for r in paired[1:]}
    assert set(found) == {"csd", "vsd", "lods-embedding"}
    for prior in found:
        for title, column, scale in (
            ("object accuracy, %", "object_accuracy", 100),
            ("Fréchet distance", "frechet", 1),
        ):
            base, mine = nested(rows, column, "sds"), nested(rows, column, prior)
            differences = {p: {s: mine[p][s] - base[p][s] for s in base[p]} for p in base}
            mean = scale * fmean(v for d in differences.values() for v in d.values())
            assert number(found[prior][title]) == pytest.approx(mean, abs=0.051)
            wide = scale * slow_bootstrap(differences)
            tolerance = 0.15 * (wide[1] - wide[0]) + 0.1
            assert ends(found[prior][title]) == pytest.approx(wide, abs=tolerance)
        mean = math.exp(fmean(math.log(mine[p][s] / base[p][s]) for p in base for s in base[p]))
        assert number(found[prior]["Fréchet distance / sds"]) == pytest.approx(mean, abs=0.0051)


def test_the_best_is_bold_only_if_it_is_told_apart(tmp_path):
    rows = make_rows()
    for prior, gain in (("csd", -0.02), ("vsd", -0.03), ("lods-embedding", 0.05)):
        change(rows, prior, "object_accuracy", lambda x, gain=gain: x + gain)
        change(rows, prior, "frechet", lambda x: x)
    page, markdown = made(tmp_path, rows)
    shown = page.table("method", "object accuracy, %", "seconds")
    best = shown["lods-embedding"]["object accuracy, %"]
    assert best in page.bold and f"**{best}**" in markdown
    assert not {shown[p]["object accuracy, %"] for p in PRIORS[:3]} & page.bold
    assert not {shown[p]["Fréchet distance"] for p in PRIORS} & page.bold
    # with five prompts the same difference is not enough
    few = [r for r in rows if r["prompt"] in PROMPTS[:5]]
    page, _ = made(tmp_path, few)
    best = page.table("method", "object accuracy, %", "seconds")["lods-embedding"]
    assert best["object accuracy, %"] not in page.bold


def test_the_same_tables_give_the_same_bytes(tmp_path):
    rows = make_rows(canvases=("2d",), prompts=PROMPTS[:2], seeds="0")
    rows = [r | {"prior_loss_first": "0.2", "prior_loss_last": "0.1"} for r in rows]
    curves = [curve(r, step, 0.3) for r in rows for step in (10, 20)]
    made(tmp_path, rows, curves=curves)
    before = [(tmp_path / f"report.{end}").read_bytes() for end in ("html", "md")]
    made(tmp_path, rows, curves=curves)
    assert [(tmp_path / f"report.{end}").read_bytes() for end in ("html", "md")] == before
    made(tmp_path, rows[::-1], curves=curves[::-1])
    assert [(tmp_path / f"report.{end}").read_bytes() for end in ("html", "md")] == before
    rows[0]["frechet"] = "12.5"
    made(tmp_path, rows, curves=curves)
    assert [(tmp_path / f"report.{end}").read_bytes() for end in ("html", "md")] != before


def test_settings_of_one_method_are_contestants_of_their_own(tmp_path):
    rows = make_rows()
    other = [{**r, "settings": "scale=7"} for r in rows if r["prior"] == "csd"]
    for r in other:
        r["object_accuracy"] = "0.9500"
    page, _ = made(tmp_path, [*rows, *other])
    shown = page.table("method", "object accuracy, %", "seconds")
    assert number(shown["csd: scale=7"]["object accuracy, %"]) == 95.0
    assert number(shown["csd: as shipped"]["object accuracy, %"]) < 90
    assert "csd" not in shown
    longer = [{**r, "steps": "600"} for r in rows if r["prior"] == "csd"]
    page, _ = made(tmp_path, [*rows, *longer])
    assert "csd: as shipped, 300 steps" in page.text and ", 600 steps" in page.text
    assert page.table("failed", "missing")["gaussians (grid shapes)"]["missing"] == "0"


@pytest.mark.parametrize(
    "cell, said", [("n/a", "frechet of the row 'shapes gaussians sds"), ("nan", "'nan', not a")]
)
def test_a_cell_that_is_no_number_is_one_clear_line(tmp_path, capsys, cell, said):
    rows = make_rows()
    rows[0]["frechet"] = cell
    write_csv(tmp_path / "results.csv", rows)
    assert report.main(["--folder", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not (tmp_path / "report.html").exists()


def test_tables_that_are_none_are_one_clear_line(tmp_path, capsys):
    assert report.main(["--folder", str(tmp_path / "none")]) == 2
    assert "there is no folder" in capsys.readouterr().err
    (tmp_path / "results.csv").write_text("a,b\n1,2\n")
    assert report.main(["--folder", str(tmp_path)]) == 2
    assert "has no column grid" in capsys.readouterr().err
    (tmp_path / "results.csv").write_text("grid,canvas,prior,prompt,seed,status\np,2d,sds\n")
    assert report.main(["--folder", str(tmp_path)]) == 2
    assert "row 2: not as many cells" in capsys.readouterr().err


def curve(run, step, loss):
    row = {k: run[k] for k in ("grid", "canvas", "prior", "prompt", "seed")}
    return {**row, "step": step, "loss_sds": 1, "prior_loss": loss, "grad_norm": 1}


def judge_row(test, level, **scores):
    return {"test": test, "level": level, "n": 480, "kind_accuracy": "0.9"} | scores


def test_the_pareto_front_is_what_nothing_beats():
    points = {"a": (1, 5), "b": (2, 4), "c": (3, 7), "d": (3, 6), "e": (9, 7)}
    assert plots.pareto(points, 1) == ["a", "c"]
    assert plots.pareto(points, -1) == ["a", "b"]


def test_true_renders_are_a_ceiling(tmp_path):
    rows = make_rows((*PRIORS, "true-renders"), seeds="0")
    for r in rows:
        if r["prior"] == "true-renders":
            r |= {"object_accuracy": "1.0", "frechet": "1.0", "seconds": "0.1"}
    page, _ = made(tmp_path, rows)
    ceiling = page.table("method", "object accuracy, %", "seconds")["true renders"]
    assert ceiling["object accuracy, %"] == "100.0 [100.0, 100.0]"
    assert ceiling["object accuracy, %"] not in page.bold
    assert "true-renders" not in page.text
    page, _ = made(tmp_path, [r for r in rows if r["prior"] != "true-renders"])
    assert "true renders" not in page.table("method", "object accuracy, %", "seconds")


def test_lods_is_compared_with_its_rivals(tmp_path):
    rows, rng = make_rows(), random.Random(1)
    change(rows, "csd", "object_accuracy", lambda x: x + rng.uniform(0.2, 0.3))
    change(rows, "lods-embedding", "object_accuracy", lambda x: x + rng.uniform(0.05, 0.06))
    change(rows, "lods-embedding", "frechet", lambda x: x - 9)
    page, _ = made(tmp_path, rows)
    (head, objects, distances) = next(t for t in page.tables if t[0][:2] == ["method", "metric"])
    assert head[2:] == [f"{MINUS} sds", f"{MINUS} csd", f"{MINUS} vsd"]
    assert re.fullmatch(r"\+5\.\d \[\+5\.\d, \+5\.\d\]", objects[2])
    assert objects[3].startswith(f"{MINUS}1") and objects[2] in page.bold
    assert objects[3] not in page.bold
    # less distance is better
    assert distances[2].startswith(f"{MINUS}9.0 [") and distances[2] in page.bold
    page, _ = made(tmp_path, [r for r in rows if r["prior"] != "vsd"])
    assert "LODS minus its rivals" not in page.text


@pytest.mark.parametrize("third, contest", [("vsd", 1), ("vsd-fast", 1), ("nfsd", 0)])
def test_a_fast_rival_stands_for_its_kind(third, contest):
    (section,) = sections(make_rows(("sds", "csd", third, "lods-lora"), seeds="0"))
    assert section.contest == contest
    # without a judge there is nothing to say
    unjudged = [r | {"object_accuracy": "", "frechet": ""} for r in section.all_runs]
    assert not sections(unjudged)[0].contest


def test_what_failed_and_what_is_missing_is_in_tables(tmp_path, capsys):
    assert report.main(["--folder", str(tmp_path)]) == 2
    assert "results.csv has no runs" in capsys.readouterr().err
    rows = make_rows()
    for r in rows:
        del r["janus_rate"], r["commit"]
    rows[3]["status"] = "loss is <b>not</b> finite at step 7"
    assert rows.pop(10)["prior"] == "sds"
    page, _ = made(tmp_path, rows)
    measured = page.table("failed", "missing")["gaussians (grid shapes)"]
    assert (measured["failed"], measured["missing"]) == ("1", "1")
    failed = page.table("failed run (left out of the means)")
    name = f"shapes / gaussians / sds / {rows[3]['prompt']} / {rows[3]['seed']}"
    assert failed[name]["reason"] == rows[3]["status"]
    assert ["commit", "not recorded", "94"] in next(t for t in page.tables if "measured on" in t[0])
    shown = page.table("method", "object accuracy, %", "seconds")
    assert shown["sds"]["runs (prompts)"] == "22 (8)" and "Janus rate, %" not in shown["sds"]


def test_text_from_others_is_no_markup(tmp_path):
    rows = make_rows(prompts=["<script>alert(1)</script> | x [y](z)", *PROMPTS])
    rows[0]["status"] = "<img src=x onerror=alert(1)> ![](sheets/secret.png) $x$"
    page, markdown = made(tmp_path, rows)
    assert "script" not in page.tags and "<script>alert(1)" in page.text
    assert "img" not in page.tags and "![](sheets/secret.png) $x$" in page.text
    assert r"\<script>" in markdown and r"\| x [y\](z)" in markdown


def test_the_last_row_of_a_run_counts(tmp_path):
    rows = make_rows()
    failed = {**rows[0], "status": "killed", "object_accuracy": ""}
    page, _ = made(tmp_path, [failed, *rows])
    assert "killed" not in page.text
    page, _ = made(tmp_path, [*rows, failed])
    assert "killed" in page.text


def test_the_summary_is_included_as_it_was_written(tmp_path):
    text = "One paragraph, with *emphasis*.\n\nAnd 3 < 4."
    (tmp_path / "summary.md").write_text(text + "\n")
    page, markdown = made(tmp_path, make_rows())
    assert f"\n\n{text}\n\n" in markdown
    assert "em" in page.tags and "And 3 < 4." in page.text


def test_the_committed_summary_has_the_numbers_of_the_table():
    text = (report.FOLDER / "summary.md").read_text()
    found = {(s.grid, s.representation): s for s in sections(read(report.FOLDER / "results.csv"))}
    for grid, representation, method, said in (
        ("shapes", "2d", "lods-lora-fast", "94.6"),
        ("shapes", "2d", "sds", "119.0"),
        ("shapes", "gaussians", "lods-lora-fast", "97.0"),
        ("shapes", "gaussians", "sds", "116.9"),
        ("shapes", "nerf", "lods-lora-fast", "101.5"),
        ("shapes", "nerf", "sds", "96.4"),
        ("improve", "2d", "sds", "316.8"),
        ("improve", "2d", "csd", "374.6"),
        ("improve", "2d", "lods-lora-4", "124.8"),
        ("improve", "2d", "lods-lora-fast-guided", "147.8"),
    ):
        runs = values(found[grid, representation].runs[method], "frechet")
        assert f"{interval(runs, draws=1).mean:.1f}" == said
        assert said in text
    assert len(re.findall(r"\d+\.\d", text)) == 11  # these, and the scale of 2.5


def test_what_is_learned_is_a_table_and_a_plot(tmp_path):
    rows = make_rows((*PRIORS, "lods-lora"))
    rng = random.Random(2)
    for r in rows:
        if r["prior"] in ("vsd", "lods-lora"):
            first = rng.uniform(0.2, 0.3)
            r["prior_loss_first"] = f"{first:.5f}"
            r["prior_loss_last"] = f"{first + (0.05 if r['prior'] == 'vsd' else -0.05):.5f}"
    curves = [curve(r, s, s / 100) for r in rows if r["prior"] == "vsd" for s in (10, 20)]
    page, _ = made(tmp_path, rows, curves=curves)
    found = page.table("change")
    assert set(found) == {"vsd", "lods-lora"}
    assert found["vsd"]["change"] == "+0.0500 [+0.0500, +0.0500]"
    assert found["lods-lora"]["change"].startswith(f"{MINUS}0.0500")
    assert "gaussians (grid shapes): denoising loss of the learned part" in page.text
    page, _ = made(tmp_path, make_rows())
    assert "learned part" not in page.text


def test_sheets_of_the_first_seed_are_in_the_page(tmp_path):
    rows = make_rows(("sds", "csd"), prompts=PROMPTS[:2], seeds=("2", "10"))
    (tmp_path / "sheets/shapes").mkdir(parents=True)
    for prior, seed, color in (("sds", 2, "red"), ("sds", 10, "blue"), ("csd", 10, "lime")):
        file = tmp_path / f"sheets/shapes/gaussians-{prior}-a-car-{seed}.webp"
        Image.new("RGB", (256, 64), color).save(file)
    page, markdown = made(tmp_path, rows)
    pictures = [v for tag, name, v in page.attributes if (tag, name) == ("img", "src")]
    wanted = [(tmp_path / "sheets/shapes/gaussians-sds-a-car-2.webp").read_bytes()]
    assert [base64.b64decode(p.split(",")[1]) for p in pictures] == wanted
    assert all(p.startswith("data:image/webp;base64,") for p in pictures)
    assert "![](sheets/shapes/gaussians-sds-a-car-2.webp)" in markdown
    shown = next(t for t in page.tables if t[0] == ["prompt", "sds"])
    assert shown[1:] == [["a car", ""], ["a mug", "none"]]


def test_the_judge_is_reported(tmp_path):
    blank = {"frechet": "", "front_seen_behind": "", "n": 480, "kind_accuracy": "0.9"}
    rows = [
        {"test": "true renders", "level": "", **blank, "frechet": "5.0"},
        {"test": "blurred", "level": "4", **blank, "kind_accuracy": "0.051"},
    ]
    page, _ = made(tmp_path, make_rows(), judge=rows)
    assert page.table("test", "pictures") == {
        "true renders": {
            "test": "true renders",
            "pictures": "480",
            "object, %": "90.0",
            "Fréchet distance": "5.0",
        },
        "blurred: 4": {
            "test": "blurred: 4",
            "pictures": "480",
            "object, %": "5.1",
            "Fréchet distance": "",
        },
    }


def test_contestants_of_a_plot_look_different():
    known = report.looks({"lods-lora": "lods-lora", "sds": "sds"})
    more = report.looks({"sds": "sds", "mine": "mine", "sds: x=1": "sds", "sds: x=2": "sds"})
    assert more["sds"] == known["sds"] != known["lods-lora"]
    assert len(set(more.values())) == 4
    assert len({str(plots._look(k)) for k in range(40)}) == 40


def test_plots_name_what_they_show():
    steady = interval({(str(k), "0"): 1.0 for k in range(8)})
    names = {"a<b": 0, "$x$": 1, "lods-lora": 12, "other": 30}
    for text in (
        plots.lines({n: [(0, 1), (1, 2)] for n in names}, names, "t & $u$", ("x", "y")),
        plots.scatter({n: (k + 1.0, steady) for n, k in names.items()}, names, 1, "t & $u$", "xy"),
    ):
        page = Page(text)
        assert all(name in page.text for name in (*names, "t & $u$")) and "http" not in text


# --- montages -------------------------------------------------------------------------------------


def test_a_montage_has_a_row_a_method_and_a_column_a_prompt(tmp_path):
    (grid, on), (file, methods) = next(iter(report.MONTAGES.items()))
    rows = [{**r, "grid": grid} for r in make_rows(("sds", "csd", "lods-lora"), (on,))]
    write_csv(tmp_path / "results.csv", rows)
    report.draw(tmp_path)
    assert not (tmp_path / file).exists()  # there are no sheets yet
    prompt = sorted({r["prompt"] for r in rows})[1]
    colors = {"sds": (250, 0, 0), "lods-lora": (0, 0, 250)}  # there is no sheet of csd
    for method, color in colors.items():
        sheet = sheet_path(tmp_path, grid, on, method, prompt, "0")
        sheet.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (128, 32), color).save(sheet, lossless=True)
    report.draw(tmp_path)
    with Image.open(tmp_path / file) as image:
        page = np.asarray(image.convert("RGB")).astype(int)
    top = page.shape[0] - len(methods) * (32 + GAP)
    for method in ("sds", "csd", "lods-lora"):
        y, x = top + methods.index(method) * (32 + GAP), LEFT + (64 + GAP)
        inside, beside = page[y + 2 : y + 30, x + 2 : x + 62], page[y : y + 32, x - GAP : x - 1]
        assert np.abs(inside - np.array(colors.get(method, (255, 255, 255)))).max() < 12
        assert beside.min() > 240


def test_what_carries_over_says_what_the_table_says():
    """The mean distances of docs/carry-over.md, of the contestants of the study."""
    text = (report.FOLDER.parent / "carry-over.md").read_text()
    found = {
        s.representation: s
        for s in sections(read(report.FOLDER / "results.csv"))
        if s.grid == "improve"
    }
    # numbers of a line in their order -> whose means they are
    told = {
        "2d": {
            "| learn faster": "lods-lora lods-lora-fast sds csd vsd-100 vsd-100-fast",
            "| learn more often": "lods-lora lods-lora-4",
            "| four draws": "lods-lora lods-lora-draws",
            "| four times as often": "lods-lora-4-fast",
            "| timesteps that fall": "lods-lora lods-lora-monotone",
            "| the first half as SDS": "lods-lora lods-lora-after-sds",
            "| towards guided samples": "lods-lora-fast-guided lods-lora-fast",
            "| the embedding in place": "lods-embedding lods-embedding-4 lods-embedding-4-fast",
            "| a low scale": "sds-5 vsd-2.5-fast lods-lora-10-fast",
        },
        "gaussians": {
            "after the 200 steps": f"lods-lora-fast sds {TRUE}",
            "(`prompt_scale=2`) it has": "lods-lora-fast-guided",
        },
    }
    prompts = {"chair": "a red chair", "table": "a blue table"}
    runs = found["gaussians"].runs
    for kind, prompt in prompts.items():
        pair = (runs["lods-lora-fast"], runs["lods-lora-fast-guided"])
        before, after = (values(of, "frechet")[prompt, "0"] for of in pair)
        assert f"{kind} {before:.0f} becomes {after:.0f}" in text
    for canvas, lines in told.items():
        runs = found[canvas].runs | {TRUE: found[canvas].ceiling}
        for start, names in lines.items():
            (rest,) = text.split(start)[1:]
            said = re.findall(r"(?<![\w.-])\d+(?!\w|\.\d)", rest.split("| ", 1)[-1])
            means = [fmean(values(runs[n], "frechet").values()) for n in names.split()]
            assert list(map(int, said[: len(means)])) == list(map(round, means)), (canvas, start)
    better = {
        "| learn faster": "lods-lora-fast",
        "| learn more often": "lods-lora-4",
        "| four draws": "lods-lora-draws",
        "| four times as often": "lods-lora-4-fast",
        "| timesteps that fall": "lods-lora-monotone",
        "| the first half as SDS": "lods-lora-after-sds",
        "| towards guided samples": "lods-lora-fast-guided",
        "| the embedding in place": "lods-embedding-4 lods-embedding-4-fast",
    }
    runs = {name: values(rows, "frechet") for name, rows in found["2d"].runs.items()}
    for start, names in better.items():
        base = runs["lods-embedding" if "embedding" in start else "lods-lora"]
        counts = [sum(runs[n][key] < base[key] for key in base) for n in names.split()]
        (line,) = (x for x in text.splitlines() if x.startswith(start))
        assert re.findall(r"(\d) of 6", line) == list(map(str, counts)), start
