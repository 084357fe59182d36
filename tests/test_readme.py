"""The README's section on the comparison, from small tables and from the committed one."""

import re
from statistics import fmean

import numpy as np
import pytest
from PIL import Image, ImageDraw

from evaluation import overview, readme
from evaluation.grid import TRUE, load_grid
from evaluation.montage import GAP, LINE, layout, wrapped
from evaluation.results import read, sections, values
from evaluation.table import sheet_path
from tests.test_report import MINUS, PRIORS, change, made, make_rows, nested, number, write_csv
from threestudio.utils.errors import UserError


def test_the_readme_says_what_the_table_says(tmp_path):
    text = readme.README.read_text()
    written = text.split(readme.MARKS[0])[1].split(readme.MARKS[1])[0]
    assert written.strip() == readme.results().strip()  # else: make report
    copy = tmp_path / "README.md"
    copy.write_text(text)
    rows = make_rows((*PRIORS, "true-renders"))
    change(rows, "vsd", "frechet", lambda x: x - 7)
    made(tmp_path, rows)
    readme.update(copy, tmp_path)
    before, after = (t.split(readme.MARKS[0])[0] for t in (text, copy.read_text()))
    assert before == after and copy.read_text().endswith(text.split(readme.MARKS[1])[1])
    vsd = next(line for line in copy.read_text().splitlines() if line.startswith("| vsd |"))
    cells = [cell.strip() for cell in vsd.split("|")[1:-1]]
    assert cells[:2] == ["vsd", "24"] and cells[-2] == f"**{MINUS}7.0 [{MINUS}7.0, {MINUS}7.0]**"
    want = nested(rows, "object_accuracy", "vsd")
    mean = 100 * fmean(fmean(seeds.values()) for seeds in want.values())
    assert number(cells[2]) == pytest.approx(mean, abs=0.051)
    assert "nothing below is final" in copy.read_text()
    whole = [run.identity | {"status": "ok"} for run in load_grid(overview.GRID).runs]
    assert overview.progress(whole) == "" and f" 1 of its {len(whole)} runs" in overview.progress(
        [*rows, whole[7]]
    )
    stale = [{**whole[7], "settings": "scene_lr=9"}, {**whole[7], "grid": "study"}]
    assert (
        " 1 of its " in (told := overview.progress([whole[7], *stale])) and ", 1 row there" in told
    )
    whole[3] |= {"status": "broken"}
    assert overview.progress(whole).startswith(f"1 run of {len(whole)} failed")
    assert overview.progress(stale[1:]) == ""  # a table of other grids
    copy.write_text("no marks")
    with pytest.raises(UserError, match="put them where results go"):
        readme.update(copy, tmp_path)


def test_a_study_has_a_picture_and_no_table(tmp_path):
    grid, canvas = readme.STUDY
    rows = [{**r, "grid": grid} for r in make_rows(("sds", "csd", "lods-lora"), (canvas,))]
    made(tmp_path, rows)
    picture = readme.PICTURES[readme.STUDY]
    readme.draw(tmp_path)
    assert not (tmp_path / picture.file).exists()  # there are no sheets yet
    assert picture.file not in readme.results(tmp_path)
    (tmp_path / "sheets" / grid).mkdir(parents=True)
    prompt = sorted({r["prompt"] for r in rows})[1]
    colors = {"sds": (250, 0, 0), "lods-lora": (0, 0, 250)}  # there is no sheet of csd
    for prior, color in colors.items():
        file = sheet_path(tmp_path, grid, canvas, prior, prompt, "0")
        Image.new("RGB", (128, 32), color).save(file, lossless=True)
    readme.draw(tmp_path)
    with Image.open(tmp_path / picture.file) as image:
        page = np.asarray(image.convert("RGB")).astype(int)
    prompts = sorted({r["prompt"] for r in rows})
    left, heads = layout(ImageDraw.Draw(Image.new("RGB", (1, 1))), picture.priors, prompts, 64)
    top = 4 + LINE * max(map(len, heads))
    for prior in ("sds", "csd", "lods-lora"):
        row, column = picture.priors.index(prior), 1
        y, x = top + row * (32 + GAP), left + column * (64 + GAP)
        inside, beside = page[y + 2 : y + 30, x + 2 : x + 62], page[y : y + 32, x - GAP : x - 1]
        assert np.abs(inside - np.array(colors.get(prior, (255, 255, 255)))).max() < 12
        assert beside.min() > 240
    others = make_rows()
    write_csv(tmp_path / "results.csv", [*others, *rows])
    before, after = readme.results(tmp_path).split(f"(docs/evaluation/{picture.file})")
    assert "8 prompts, 3 seeds" in before and "| lods-embedding | 24 |" in before
    assert "has the lowest mean Frechet distance" in before
    assert "| lods-lora |" not in before + after  # which is in the study only


def test_headings_are_wrapped_and_not_cut():
    draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    prompt = "a picture of an orange birthday cake"
    for text in (prompt, "x" * 100, f"{prompt} {'y' * 60} z", "a"):
        lines = wrapped(draw, text, 100)
        assert "".join(lines).replace(" ", "") == text.replace(" ", "")
        assert all(0 < draw.textlength(line) <= 100 for line in lines)
    assert " ".join(wrapped(draw, prompt, 100)) == prompt  # broken between words
    left, _ = layout(draw, ["sds", "a-prior-with-a-very-long-name"], [], 100)
    assert left > draw.textlength("a-prior-with-a-very-long-name") + 4


def test_what_carries_over_says_what_the_table_says():
    """The mean distances of docs/carry-over.md, of the contestants of the study."""
    text = (readme.README.parent / "docs/carry-over.md").read_text()
    found = {
        s.canvas: s for s in sections(read(readme.FOLDER / "results.csv")) if s.grid == "improve"
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
