"""The report of the evaluation, from small tables made here."""

import base64
import csv
import itertools
import math
import random
import re
from collections import defaultdict
from html.parser import HTMLParser
from statistics import fmean

import numpy as np
import pytest
from PIL import Image
from scipy.stats import norm
from scipy.stats import t as student

from evaluation import plots, report
from evaluation.statistics import interval

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
            if "b" in self.open:
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
                    row |= dict(grid="pocket", canvas=canvas, prior=prior, prompt=prompt)
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
    assert not re.search(r"https?:|url\(|@import", text)
    assert ("meta", "name", "viewport") in page.attributes
    assert "prefers-color-scheme: dark" in text


def test_numbers_are_those_of_the_table(tmp_path):
    rows = make_rows()
    page, markdown = made(tmp_path, rows)
    shown = page.table("prior", "object accuracy, %", "seconds")
    assert set(shown) == set(PRIORS)
    for title, column, scale in (
        ("object accuracy, %", "object_accuracy", 100),
        ("colour accuracy, %", "color_accuracy", 100),
        ("Frechet distance", "frechet", 1),
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
    paired = page.tables[page.tables.index(next(t for t in page.tables if t[0][0] == "prior")) + 1]
    found = {r[0]: dict(zip(paired[0], r)) for r in paired[1:]}
    assert set(found) == {"csd", "vsd", "lods-embedding"}
    for prior in found:
        for title, column, scale in (
            ("object accuracy, %", "object_accuracy", 100),
            ("Frechet distance", "frechet", 1),
        ):
            base, mine = nested(rows, column, "sds"), nested(rows, column, prior)
            differences = {p: {s: mine[p][s] - base[p][s] for s in base[p]} for p in base}
            mean = scale * fmean(v for d in differences.values() for v in d.values())
            assert number(found[prior][title]) == pytest.approx(mean, abs=0.051)
            wide = scale * slow_bootstrap(differences)
            tolerance = 0.15 * (wide[1] - wide[0]) + 0.1
            assert ends(found[prior][title]) == pytest.approx(wide, abs=tolerance)
        mean = math.exp(fmean(math.log(mine[p][s] / base[p][s]) for p in base for s in base[p]))
        assert number(found[prior]["Frechet distance / sds"]) == pytest.approx(mean, abs=0.0051)


def test_the_best_is_bold_only_if_it_is_told_apart(tmp_path):
    rows = make_rows()
    for prior, gain in (("csd", -0.02), ("vsd", -0.03), ("lods-embedding", 0.05)):
        change(rows, prior, "object_accuracy", lambda x, gain=gain: x + gain)
        change(rows, prior, "frechet", lambda x: x)
    page, markdown = made(tmp_path, rows)
    shown = page.table("prior", "object accuracy, %", "seconds")
    best = shown["lods-embedding"]["object accuracy, %"]
    assert best in page.bold and f"**{best}**" in markdown
    assert not {shown[p]["object accuracy, %"] for p in PRIORS[:3]} & page.bold
    assert not {shown[p]["Frechet distance"] for p in PRIORS} & page.bold
    # with five prompts the same difference is not enough
    few = [r for r in rows if r["prompt"] in PROMPTS[:5]]
    page, _ = made(tmp_path, few)
    best = page.table("prior", "object accuracy, %", "seconds")["lods-embedding"]
    assert best["object accuracy, %"] not in page.bold
    assert "has too few prompts to be told apart from sds" in page.text


def test_sentences_say_what_the_numbers_say(tmp_path):
    rows = make_rows()
    rng = random.Random(1)
    change(rows, "csd", "object_accuracy", lambda x: x + rng.uniform(0.2, 0.3))
    change(rows, "vsd", "object_accuracy", lambda x: x + rng.uniform(-0.1, 0.1))
    change(rows, "lods-embedding", "object_accuracy", lambda x: x + rng.uniform(0.05, 0.06))
    for prior in ("csd", "vsd"):
        change(rows, prior, "frechet", lambda x: x + rng.uniform(-1, 1))
    change(rows, "lods-embedding", "frechet", lambda x: x - 9)
    page, _ = made(tmp_path, rows)
    (head, objects, distances) = next(t for t in page.tables if t[0][:2] == ["prior", "metric"])
    assert head[2:] == ["− sds", "− csd", "− vsd"] and objects[0] == "lods-embedding"
    assert re.fullmatch(r"\+5\.\d \[\+5\.\d, \+5\.\d\], 24 pairs", objects[2])
    assert objects[3].startswith("−1") and objects[2] in page.bold and objects[3] not in page.bold
    # Less distance is better.
    assert distances[2].startswith("−9.0 [") and distances[2] in page.bold
    where = "1 of 1 canvases: gaussians (lods-embedding, against sds, csd and vsd)"
    assert f"in both on no canvas; in the distance alone, on {where}." in page.text
    assert "lods-embedding has the lowest mean Frechet distance, " in page.text
    assert ", less than sds on 8 of 8 prompts, and all others are measurably worse." in page.text
    short = page.table("prior", "object accuracy", "Frechet distance")["gaussians"]
    assert short["prior"] == "lods-embedding" and "100 % in every run" not in page.text
    assert short["object accuracy"] == "leads sds and vsd; is behind csd"
    assert short["Frechet distance"] == "leads sds, csd and vsd"
    for prior in ("csd", "vsd"):
        change(rows, prior, "object_accuracy", lambda x: x)
    page, _ = made(tmp_path, rows)
    assert f"in both on {where}; in the distance alone, on {where}." in page.text
    # a faster vsd is a rival too, where it was run
    fast = [{**r, "prior": "vsd-fast"} for r in rows if r["prior"] == "lods-embedding"]
    page, _ = made(tmp_path, [*rows, *fast])
    assert "in both on no canvas; in the distance alone, on no canvas." in page.text
    seconds = {"vsd-fast": "7.0", "lods-embedding": "8.0"}
    quick = [r | {"seconds": seconds.get(r["prior"], r["seconds"])} for r in [*rows, *fast]]
    page, _ = made(tmp_path, quick)
    assert "not told apart from it: vsd-fast. Of these vsd-fast is the fastest (7.0 s" in page.text
    right = [{**r, "object_accuracy": "1"} if r["prior"] == "csd" else r for r in rows]
    page, _ = made(tmp_path, right)
    assert "gaussians: csd has an object accuracy of 100 % in every run: in that" in page.text
    page, _ = made(tmp_path, [r for r in rows if r["prior"] != "vsd"])
    assert "LODS against" not in page.text and "claim of LODS is not tested here." in page.text
    study = [{**r, "grid": "study"} for r in rows if r["prior"] in ("sds", "lods-embedding")]
    page, _ = made(tmp_path, [*rows, *study])
    claim = "in both on 1 of 1 canvases: gaussians (grid pocket) (lods-embedding, against"
    assert claim in page.text and "no test of the claim: gaussians (grid study)." in page.text
    up_and_down = itertools.cycle((0.1, -0.1))
    change(rows, "lods-embedding", "object_accuracy", lambda x: x + next(up_and_down))
    page, _ = made(tmp_path, rows)
    short = page.table("prior", "object accuracy", "Frechet distance")["gaussians"]
    assert short["object accuracy"].startswith("does not differ measurably from sds")


def test_true_renders_are_a_ceiling(tmp_path):
    rows = make_rows((*PRIORS, "true-renders"), seeds="0")
    for r in rows:
        if r["prior"] == "true-renders":
            r |= {"object_accuracy": "1.0", "frechet": "1.0", "seconds": "0.1"}
    page, _ = made(tmp_path, rows)
    shown = page.table("prior", "object accuracy, %", "seconds")
    ceiling = shown["true renders (ceiling)"]
    assert ceiling["object accuracy, %"] == "100.0 [100.0, 100.0]"
    assert ceiling["object accuracy, %"] not in page.bold
    assert page.text.count("true renders (ceiling)") == 1
    assert "true-renders" not in re.search(r"No other is better and faster.*", page.text).group()
    page, _ = made(tmp_path, [r for r in rows if r["prior"] != "true-renders"])
    assert "The ceiling, rows of the prior true-renders, is absent." in page.text


def test_what_is_absent_is_named(tmp_path):
    page, markdown = made(tmp_path, None)
    assert "results.csv is absent" in page.text and "judge.csv is absent" in markdown
    rows = make_rows()
    for r in rows:
        del r["janus_rate"], r["commit"]
    rows[3]["status"] = "loss is <b>not</b> finite at step 7"
    gone = rows.pop(10)
    page, markdown = made(tmp_path, rows)
    assert "computed from results.csv. Absent: curves.csv, judge.csv and tuning.csv." in page.text
    for text in ("curves.csv is absent", "tuning.csv is absent", "judge.csv is absent"):
        assert text in page.text and text in markdown
    assert "There are no contact sheets of this canvas." in page.text
    assert "Janus rate" in re.search(r"Not measured here: .*", page.text).group()
    assert "commit: not recorded." in page.text
    failed = (
        f"pocket / gaussians / sds / {rows[3]['prompt']} / {rows[3]['seed']}: {rows[3]['status']}"
    )
    assert failed in page.text and "1 run failed" in page.text
    assert gone["prior"] == "sds"
    assert "gaussians, runs missing that other priors have: sds 1." in page.text
    assert page.table("failed", "missing")["gaussians"]["missing"] == "1"
    assert page.table("prior", "object accuracy, %", "seconds")["sds"]["runs (prompts)"] == "22 (8)"


def test_text_of_others_is_no_markup(tmp_path):
    rows = make_rows(prompts=["<script>alert(1)</script> | x [y](z)", *PROMPTS])
    rows[0]["status"] = "<img src=x onerror=alert(1)>"
    page, markdown = made(tmp_path, rows)
    assert "script" not in page.tags and "<script>alert(1)" in page.text
    assert ("img", "src", "x") not in page.attributes
    assert r"\<script>" in markdown and r"\| x [y\](z)" in markdown


def test_the_same_tables_give_the_same_bytes(tmp_path):
    rows = make_rows(canvases=("nerf", "2d"))
    curves = [curve(r, step, 0.3) for r in rows[:40] for step in (10, 20)]
    made(tmp_path, rows, curves=curves)
    before = [(tmp_path / f"report.{end}").read_bytes() for end in ("html", "md")]
    made(tmp_path, rows, curves=curves)
    assert [(tmp_path / f"report.{end}").read_bytes() for end in ("html", "md")] == before
    made(tmp_path, rows[::-1], curves=curves[::-1])
    assert [(tmp_path / f"report.{end}").read_bytes() for end in ("html", "md")] == before
    rows[0]["frechet"] = "12.5"
    made(tmp_path, rows, curves=curves)
    assert [(tmp_path / f"report.{end}").read_bytes() for end in ("html", "md")] != before


def test_the_last_row_of_a_run_counts(tmp_path):
    rows = make_rows()
    failed = {**rows[0], "status": "killed", "object_accuracy": ""}
    page, _ = made(tmp_path, [failed, *rows])
    assert "1 row replaced by a later row of the same run." in page.text
    assert "killed" not in page.text
    page, _ = made(tmp_path, [*rows, failed])
    assert "killed" in page.text


def test_settings_of_one_prior_are_contestants_of_their_own(tmp_path):
    rows = make_rows()
    other = [{**r, "settings": "scale=7"} for r in rows if r["prior"] == "csd"]
    for r in other:
        r["object_accuracy"] = "0.9500"
    page, _ = made(tmp_path, [*rows, *other])
    shown = page.table("prior", "object accuracy, %", "seconds")
    assert number(shown["csd: scale=7"]["object accuracy, %"]) == 95.0
    assert number(shown["csd: as shipped"]["object accuracy, %"]) < 90
    assert "csd" not in shown
    longer = [{**r, "steps": "600"} for r in rows if r["prior"] == "csd"]
    page, _ = made(tmp_path, [*rows, *longer])
    assert "csd: as shipped, 300 steps" in page.text and ", 600 steps" in page.text
    assert page.table("failed", "missing")["gaussians"]["missing"] == "0"


@pytest.mark.parametrize(
    "cell, said", [("n/a", "frechet of the row 'pocket gaussians sds"), ("nan", "'nan', not a")]
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


def test_learning_is_told_by_its_sign(tmp_path):
    rows = make_rows((*PRIORS, "lods-lora"))
    rng = random.Random(2)
    for r in rows:
        if r["prior"] in ("vsd", "lods-embedding", "lods-lora"):
            first = rng.uniform(0.2, 0.3)
            change = {"vsd": 0.05, "lods-embedding": -0.05, "lods-lora": rng.uniform(-0.1, 0.1)}
            r["prior_loss_first"] = f"{first:.5f}"
            r["prior_loss_last"] = f"{first + change[r['prior']]:.5f}"
    curves = [curve(r, s, s / 100) for r in rows if r["prior"] == "vsd" for s in (10, 20)]
    curves += [curve(r, s, s / 50) for r in rows if r["prior"] == "vsd" for s in (10, 20)][:2]
    page, _ = made(tmp_path, rows, curves=curves)
    found = page.table("verdict", "change")
    assert found["vsd"]["verdict"] == "rises" and found["vsd"]["change"].startswith("+0.0500")
    assert found["lods-embedding"]["verdict"] == "falls"
    assert found["lods-lora"]["verdict"] == "does not change measurably"
    assert set(found) == {"vsd", "lods-embedding", "lods-lora"}
    assert "mean over runs (vsd 24)." in page.text
    page, _ = made(tmp_path, [r for r in rows if r["prompt"] in PROMPTS[:5]], curves=curves)
    assert page.table("verdict", "change")["vsd"]["verdict"] == "too few prompts to say"
    page, _ = made(tmp_path, make_rows())
    assert "No prior here has a denoising loss" in page.text


def test_sheets_of_the_first_seed_are_in_the_page(tmp_path):
    rows = make_rows(("sds", "csd"), prompts=PROMPTS[:2], seeds=("2", "10"))
    (tmp_path / "sheets").mkdir()
    (tmp_path / "sheets/pocket").mkdir()
    for prior, seed, color in (("sds", 2, "red"), ("sds", 10, "blue"), ("csd", 10, "lime")):
        file = tmp_path / f"sheets/pocket/gaussians-{prior}-a-car-{seed}.webp"
        Image.new("RGB", (256, 64), color).save(file)
    page, markdown = made(tmp_path, rows)
    pictures = [v for tag, name, v in page.attributes if (tag, name) == ("img", "src")]
    wanted = [(tmp_path / "sheets/pocket/gaussians-sds-a-car-2.webp").read_bytes()]
    assert [base64.b64decode(p.split(",")[1]) for p in pictures] == wanted
    assert all(p.startswith("data:image/webp;base64,") for p in pictures)
    for pair in (("width", "256"), ("height", "64"), ("loading", "lazy")):
        assert ("img", *pair) in page.attributes
    assert "![](sheets/pocket/gaussians-sds-a-car-2.webp)" in markdown and "Seed 2 at" in markdown
    shown = next(t for t in page.tables if t[0][0] == "")
    assert shown[0] == ["", "sds", "csd"]
    assert shown[1:] == [["a car", "", "none"], ["a mug", "none", "none"]]


def judge_row(test, level, **scores):
    return {"test": test, "level": level, "n": 480, "kind_accuracy": "0.9"} | scores


def test_the_judge_is_reported(tmp_path):
    ladder = [
        judge_row("true renders", "white ground", frechet="5.0"),
        judge_row("blurred", "2", frechet="9.0", commonest_kind="0.06", front_seen_behind="0.1"),
        judge_row("blurred", "4", frechet="20.0", kind_accuracy="0.051", commonest_kind="0.07"),
        judge_row("seen from behind", "90 to 135 degrees", front_seen_behind="0.02"),
        judge_row("seen from behind", "over 135 degrees", front_seen_behind="0.0312"),
    ]
    for r in ladder:
        for k in ("frechet", "commonest_kind", "front_seen_behind"):
            r.setdefault(k, "")
        r["commonest"] = "mug"
    page, _ = made(tmp_path, make_rows(), judge=ladder)
    assert "object accuracy ends at 5.1 %, and the Frechet distance rises at every" in page.text
    assert "fixed answer" not in page.text and "mug, is given in 7.0 %" in page.text
    assert (
        "Seen from behind: a front is seen in 2.0 % of views at 90 to 135 degrees and 3.1 % of "
        "views at over 135 degrees, a rate of 2.6 %." in page.text
    )
    assert "in up to 10.0 % of the views from behind (blurred 2)" in page.text
    assert page.table("test", "pictures")["blurred: 4"]["object, %"] == "5.1"
    ladder[2] |= {"frechet": "8.0", "commonest_kind": "0.8"}
    page, _ = made(tmp_path, make_rows(), judge=ladder)
    assert (
        "Frechet distance does not rise at 4; " in page.text and "(near a fixed answer" in page.text
    )


def test_the_pareto_front_is_what_nothing_beats():
    points = {"a": (1, 5), "b": (2, 4), "c": (3, 7), "d": (3, 6), "e": (9, 7)}
    assert plots.pareto(points, 1) == ["a", "c"]
    assert plots.pareto(points, -1) == ["a", "b"]


def test_an_axis_does_not_go_beyond_what_can_be(tmp_path):
    axis = plots.Axis([40.0, 100.0], 0, 100, bounds=(0, 100))
    assert axis(100.0) == 100 and axis.ticks()[-1] == 100 and axis(40.0) > 0
    assert plots.Axis([1.0, 40.0], 0, 100, bounds=(0, 100)).ticks()[0] == 0
    full = plots.Axis([100.0, 100.0], 0, 100, bounds=(0, 100))
    assert full(100.0) == 100 and full(99.0) < 100
    none = plots.Axis([0.0, 0.0], 0, 100, bounds=(0, 100))
    assert none(0.0) == 0
    rows = make_rows()
    change(rows, "sds", "object_accuracy", lambda x: 1.0)
    made(tmp_path, rows)
    page = (tmp_path / "report.html").read_text()
    assert page.count("object accuracy, % (more is better)") == 1
    plot = page[: page.index("object accuracy, % (more is better)")].rsplit("<svg", 1)[1]
    axis_y = re.findall(r'y="([\d.]+)" class="end">([\d.]+)<', plot)
    assert max(float(tick) for _, tick in axis_y) == 100
    assert min(float(y) for y, _ in axis_y) == plots.TOP + 4  # 100 % is where the axis ends


@pytest.mark.parametrize("name", ["lods-embedding-guided", "x" * 60])
def test_names_are_inside_of_plots(name):
    steady = interval({(str(k), "0"): 1.0 for k in range(8)})
    colors = defaultdict(int)
    for text in (
        plots.lines({name: [(0, 1), (1, 2)]}, {name: 0}, "t", ("x", "y")),
        plots.lines({f"{name}{k}": [(0, 1), (1, 2)] for k in range(40)}, colors, "t", "xy"),
        plots.scatter({name: (1.0, steady), "b": (9.0, steady)}, colors, 1, "t", "xy"),
    ):
        width, height = map(float, re.search(r'viewBox="0 0 (\d+) (\d+)"', text).groups())
        labels = re.findall(r'<text x="([\d.]+)" y="([\d.]+)">(\w[^<]*)</text>', text)
        assert labels
        for x, y, label in labels:
            assert float(x) + plots.LETTER * len(label) <= width and float(y) <= height


def test_plots_put_points_where_their_values_are():
    def steady(x):
        return interval({(str(k), "0"): x for k in range(8)})

    points = {"low": (10.0, steady(1.0)), "mid": (15.0, steady(2.0)), "high": (20.0, steady(3.0))}
    text = plots.scatter(points, dict.fromkeys(points, 0), 1, "<t>", ("x & y", "z"))
    dots = [tuple(map(float, d)) for d in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', text)]
    (x0, y0), (x1, y1), (x2, y2) = dots
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.11) and x1 > x0
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.11) and y1 < y0
    assert "&lt;t&gt;" in text and "x &amp; y" in text
    axis = plots.Axis([0.02, 3.0], 0, 100, log_from=10)
    assert axis.log and axis.ticks() == pytest.approx([0.02, 0.05, 0.1, 0.2, 0.5, 1, 2])
    assert axis(0.2) - axis(0.02) == pytest.approx(axis(2) - axis(0.2))
    plain = plots.Axis([0.0, 9.7], 0, 100)
    assert plain.ticks() == [0, 2, 4, 6, 8, 10]
    constant = plots.Axis([4.0, 4.0], 0, 100)
    assert constant(4.0) == 50 and math.isfinite(constant(5.0)) and constant.ticks()
