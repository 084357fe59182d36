"""The comparison on real objects: grids, runs, the sweep of scales, the gallery and the report."""

import base64
import csv
import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lods.gaussians import Gaussians
from lods.models import renders
from omegaconf import OmegaConf
from PIL import Image

from evaluation import command, gallery, report, sweep
from evaluation.against_truth import TRUTH, truth_of
from evaluation.grid import TRUE, Run, load_grid
from evaluation.machine import ROOT
from evaluation.run import carry_out, sheet
from evaluation.run import load_run as config_of
from evaluation.table import RESULTS, Table, begun, columns_of, sheet_path
from evaluation.tuning import value_of
from evaluation.worlds import WORLDS, objects
from evaluation.worlds.objects import Objects, around
from pocket.truth import GALLERY, judged_cameras
from tests.study.launched import launched_run
from tests.study.test_report import Page
from threestudio.utils.config import load_config
from threestudio.utils.errors import UserError

GRIDS = ROOT / "evaluation/grids"
SIZE = 32


def article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


# --- grids ----------------------------------------------------------------------------------------


def test_the_comparison_is_of_the_objects_that_were_fixed_in_advance():
    grid = load_grid(GRIDS / "objects.yaml")
    real = [r for r in grid.runs if r.method != TRUE]
    cells = {(r.representation, r.method, r.prompt) for r in real}
    assert len(cells) == len(real) == 12 * 4 * 2 + 4 * 2 and not grid.tuning
    assert [*dict.fromkeys(r.prompt for r in real)] == [article(name) for name in GALLERY]
    told = {(r.representation, o) for r in real for o in r.overrides if "cameras" in o}
    assert told == {
        ("gaussians-tokens", "system.guidance.cameras=tokens"),
        ("gaussians-words", "system.guidance.cameras=words"),
        ("radiance-tokens", "system.guidance.cameras=tokens"),
    }


def test_scales_are_swept_on_other_objects():
    grid = load_grid(GRIDS / "scales.yaml")
    assert grid.tuning and grid.sheets and grid.world == "objects"
    real = [r for r in grid.runs if r.method != TRUE]
    scales = {value_of(r.settings, "system.guidance.guidance_scale") for r in real}
    assert scales == {1, 2.5, 5, 7.5, 15, 30, 100}
    assert {r.method for r in real} == {"sds", "lods-embedding", "lods-lora"}
    assert len(real) == 3 * 7 * 4 * 2  # told the camera, and by words
    used = {r.prompt for r in load_grid(GRIDS / "objects.yaml").runs}
    assert not {r.prompt for r in real} & used


def test_every_config_of_the_grids_is_there():
    for name in ("objects", "scales"):
        for run in load_grid(GRIDS / f"{name}.yaml").runs:
            assert all((ROOT / config).is_file() for config in run.configs)


NAMING = {"name", "tag", "exp_root_dir", "exp_dir", "trial_name", "trial_dir"}
NAMING |= {"use_timestamp", "timestamp"}


def leaves(section, path=""):
    """Dotted keys and values of a mapping."""
    for key, value in section.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{path}{key}.")
        elif path or key not in NAMING:
            yield f"{path}{key}", value


def test_the_comparison_has_the_settings_of_the_shipped_overlays(lods, tmp_path):
    """But for the weight of SDS and VSD, and what the camera is told by."""
    runs = [r for r in load_grid(GRIDS / "objects.yaml").runs if r.method != TRUE]
    for run in {(r.representation, r.method): r for r in runs}.values():
        kind, overlay = ("ngp", "-ngp") if run.representation.startswith("r") else ("gs", "")
        learns = "lora" if run.method in ("lods-lora", "vsd") else "embedding"
        names = [f"lods-{kind}-{learns}", f"pocket{overlay}", *["pocket-lora"] * (learns == "lora")]
        shipped = load_config(
            *(str(ROOT / f"configs/{name}.yaml") for name in names),
            cli_args=[
                f"system.prompt_processor.prompt={run.prompt}",
                f"system.guidance_type={run.guidance_type}",
                "data.n_test_views=24",
            ],
        )
        here, there = (
            dict(leaves(OmegaConf.to_container(cfg, resolve=True)))
            for cfg in (config_of(run, tmp_path), shipped)
        )
        there["system.guidance.cameras"] = run.representation.split("-")[1]
        if run.method in ("sds", "vsd"):
            there["system.loss.lambda_sds"] = 1 / there["system.guidance.guidance_scale"]
        assert here == there, run.title


def test_the_sweep_has_the_rate_of_the_overlay_for_a_lora(lods, tmp_path):
    wanted = load_config(str(ROOT / "configs/pocket-lora.yaml")).system.optimizer.params.guidance.lr
    runs = [r for r in load_grid(GRIDS / "scales.yaml").runs if r.method == "lods-lora"]
    for run in {r.representation: r for r in runs}.values():
        assert config_of(run, tmp_path).system.optimizer.params.guidance.lr == wanted


@pytest.mark.parametrize(
    "old, new, text",
    [
        ("world: objects", "world: object", "no .object.: did you mean .objects."),
        ("a hamburger", "a spaceship", "must name exactly one of: hamburger"),
        ("steps: 400\n", "steps: 400\n    views: 12\n", "views must be 24, those of the truth"),
    ],
)
def test_a_mistake_in_a_grid_of_objects_is_one_line(tmp_path, old, new, text):
    path = tmp_path / "objects.yaml"
    path.write_text((GRIDS / "objects.yaml").read_text().replace(old, new))
    with pytest.raises(UserError, match=text) as caught:
        load_grid(path)
    assert "\n" not in str(caught.value)


def test_a_comparison_goes_on_with_what_is_left(tmp_path, capsys):
    grid = load_grid(GRIDS / "objects.yaml")
    table = Table(tmp_path, world="objects")
    table.record(begun(grid.runs[0], 1, "c") | {"status": "ok"}, [], None)
    table.record(begun(grid.runs[1], 1, "c") | {"status": "it broke"}, [], None)
    arguments = [str(GRIDS / "objects.yaml"), "--out", str(tmp_path), "--dry-run"]
    assert command.main(arguments) == 0
    said = capsys.readouterr().out.splitlines()
    total = len(grid.runs)
    assert said[0] == (
        f"objects: {total} runs, 1 done, 1 failed (--retry repeats them), {total - 2} left"
    )
    assert len(said) == 1 + total - 2 and grid.runs[0].title not in said


def test_runs_that_could_not_be_judged_are_not_begun(tmp_path, monkeypatch):
    monkeypatch.setattr(objects, "TRUTH", tmp_path / "nowhere")
    with pytest.raises(UserError, match="has no true views"):
        command.main([str(GRIDS / "objects.yaml"), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out/results.csv").exists()


# --- tables ---------------------------------------------------------------------------------------


def a_run(**changes) -> Run:
    fields = dict(grid="objects", representation="gaussians-tokens", method="sds", seed=0)
    more = dict(settings="", steps=3, configs=(), overrides=(), prompt="a cat", world="objects")
    return Run(**{**fields, **more, **changes})


def test_tables_of_objects_have_the_metrics_against_the_truth(tmp_path):
    wanted = ("object_accuracy", "psnr", "ssim", "gmsd", "iou", "janus_rate", "sharpness")
    assert set(wanted) < set(columns_of("objects")) and columns_of("shapes") == RESULTS
    row = begun(a_run(prompt="a red car"), 1, "c")
    assert (row["kind"], row["color"]) == ("car", "red")
    Table(tmp_path, world="objects").record(row | {"status": "ok"}, [], None)
    with pytest.raises(UserError, match="other columns"):
        Table(tmp_path).rows()


def test_runs_of_another_world_are_other_runs():
    assert a_run().digest != a_run(world="shapes").digest


def test_a_tuning_keeps_the_sheets_of_all_settings_where_it_is_asked_to(tmp_path):
    runs = [a_run(settings=f"x={k}") for k in (1, 2)]
    for sheets in (False, True):
        table = Table(tmp_path / str(sheets), True, "objects", sheets)
        for run in runs:
            table.record(begun(run, 1, "c") | {"status": "ok"}, [], run.settings.encode())
        kept = [
            sheet_path(table.folder, *(row[k] for k in sweep.KEYS), row["settings"])
            for row in table.rows()
        ]
        there = [path.read_text() if path.exists() else None for path in kept]
        assert there == (["x=1", "x=2"] if sheets else [None, None])


# --- runs -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ideal(tmp_path_factory):
    """The folder of an ideal denoiser that knows the true views of a toy train, reduced."""
    true = renders.Renders.read(TRUTH)
    (thing,) = (t for t in true.objects if t.name == "toy train")
    views = torch.from_numpy(true.views(thing)).permute(0, 3, 1, 2).float()
    small = F.interpolate(views, (SIZE, SIZE), mode="area").permute(0, 2, 3, 1)
    folder = tmp_path_factory.mktemp("ideal")
    pictures = small.round().byte().numpy()
    renders.write(folder, {("toy train", None): (judged_cameras(), pictures)})
    return folder


def from_ideal(ideal, representation: str, configs, steps: int, *overrides: str) -> Run:
    model = f"system.prompt_processor.pretrained_model_name_or_path={ideal}"
    return a_run(
        representation=representation,
        prompt="a toy train",
        steps=steps,
        configs=configs,
        overrides=(model, "system.guidance.cameras=tokens", *overrides),
        guidance_type="lods-sds-guidance",
    )


def test_each_latent_is_seen_from_a_side_of_its_own(ideal, tmp_path, monkeypatch):
    """Told the camera, a perfect model makes the true view from there, whatever is before it."""
    monkeypatch.chdir(tmp_path)
    run = from_ideal(
        ideal, "2d-tokens", ("evaluation/objects-2d.yaml",), 40,
        "system.guidance.guidance_scale=1.0", "system.optimizer.params.particles.lr=0.1",
        "data.batch_size=3", "system.guidance.ideal_neighbours=1",
    )  # fmt: skip
    found = carry_out(run, 1, "c", tmp_path)
    row = found["row"]
    assert row["status"] == "ok" and set(row) == set(columns_of("objects"))
    assert float(row["psnr"]) > 15 and row["psnr"] == row["nearest_psnr"]
    assert row["iou"] == "" and float(row["saturation"]) == pytest.approx(1, abs=0.3)
    picture = Image.open(io.BytesIO(base64.b64decode(found["sheet"])))
    assert picture.size == (4 * 128, 128)


def test_gaussians_are_judged_from_the_cameras_of_the_truth(ideal, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = from_ideal(
        ideal, "gaussians-tokens", ("configs/lods-gs-embedding.yaml", "configs/ideal.yaml"), 2,
        "data.width=32", "data.height=32", "data.batch_size=1", "system.geometry.ball.n_points=99",
        "system.strategy.name=none",
    )  # fmt: skip
    seen = []
    look = Objects.look
    monkeypatch.setattr(Objects, "look", lambda *a: seen.append(look(*a)) or seen[0])
    row = carry_out(run, 1, "c", tmp_path)["row"]
    assert row["status"] == "ok"
    assert seen[0].rgb.shape == (24, 3, 128, 128)
    np.testing.assert_allclose(seen[0].azimuth, judged_cameras()[:, 1])
    filled = {k for k in Objects.metrics if row[k]}
    # of a picture on latents, and of objects in several colours, only
    assert set(Objects.metrics) - filled == {"nearest_psnr", "color_accuracy"}


def test_the_truth_is_judged_as_a_run_is():
    run = a_run(prompt="a toy train", method=TRUE, steps=0)
    world = WORLDS["objects"]
    flat = world.example(run.prompt, None, 0, 4)
    true = truth_of(run.prompt)
    assert torch.equal(flat.rgb.permute(0, 2, 3, 1), true.rgb[around(4)])
    scores = world.score(run.prompt, object(), world.example(run.prompt, object(), 0, 24), True)
    assert scores["object_accuracy"] > 0.9 and scores["view_accuracy"] > 0.7
    assert "psnr" not in scores


# --- the sweep ------------------------------------------------------------------------------------

SCALES = (1.0, 10.0, 100.0)


def swept_folder(folder, more=(), **fields):
    """A tuning of two methods at SCALES, two prompts: SDS is best at 10, LODS the higher the
    better; ``more`` are rows to add, with these fields."""
    table = Table(folder, True, "objects", True)
    for method in ("sds", "lods-lora"):
        for scale in SCALES:
            for k, prompt in enumerate(("a horse", "a snowman")):
                run = a_run(
                    grid="scales", representation="2d-tokens", method=method, prompt=prompt,
                    settings=f"system.guidance.guidance_scale={scale}",
                )  # fmt: skip
                psnr = 20 + k - (abs(scale - 10) if method == "sds" else -scale / 100)
                row = begun(run, 1, "c") | {"status": "ok", "psnr": str(psnr)}
                table.record(row, [], picture(int(scale)))
    for run in more:
        table.record(begun(run, 1, "c") | {"status": "ok"} | fields, [], picture(200))
    return folder


def picture(grey: int, width: int = 4) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width * 128, 128), (grey,) * 3).save(file, "WEBP", lossless=True)
    return file.getvalue()


def test_a_sweep_finds_the_best_value_of_each_method(tmp_path):
    assert sweep.main(["--folder", str(swept_folder(tmp_path))]) == 0
    with (tmp_path / "scales.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 3
    best = {r["method"]: float(r["value"]) for r in rows if r["best"] == "psnr"}
    assert best == {"sds": 10, "lods-lora": 100}
    (row,) = (r for r in rows if r["method"] == "sds" and r["value"] == "10")
    assert row["runs"] == row["prompts"] == "2" and float(row["psnr"]) == 20.5
    assert float(row["psnr_low"]) < 20.5 < float(row["psnr_high"])


def test_the_sheet_of_a_sweep_has_methods_down_and_values_across(tmp_path):
    true = a_run(
        grid="scales", representation="2d-tokens", method=TRUE, prompt="a horse", steps=0
    )  # fmt: skip
    sweep.main(["--folder", str(swept_folder(tmp_path, [true]))])
    with Image.open(tmp_path / "scales.webp") as page:
        assert page.size[0] == 150 + 4 * 132
        middle = [
            page.convert("L").getpixel((150 + 132 * k + 64, page.size[1] - 64)) for k in (0, 2)
        ]
        last = page.convert("L").getpixel((150 + 132 * 3 + 64, page.size[1] - 64))
    assert abs(middle[0] - 1) < 9 and abs(middle[1] - 100) < 9 and abs(last - 200) < 9


def test_a_value_that_failed_somewhere_is_not_the_best(tmp_path):
    swept_folder(tmp_path)
    table = Table(tmp_path, True, "objects", True)
    worse = next(r for r in table.rows() if (r["prior"], r["prompt"]) == ("sds", "a horse")
                 and r["settings"].endswith("=10.0"))  # fmt: skip
    table.record(worse | {"status": "it broke", "psnr": ""}, [], None)
    sweep.main(["--folder", str(tmp_path)])
    with (tmp_path / "scales.csv").open(newline="") as file:
        rows = {(r["method"], r["value"]): r for r in csv.DictReader(file)}
    assert rows["sds", "10"]["failed"] == "1" and not rows["sds", "10"]["best"]
    assert rows["sds", "1"]["best"] == "psnr"


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--grid", "other"], "no runs of the grid other"),
        (["--prompt", "a cat"], "those with all: a horse, a snowman"),
        ([], "several other settings"),
    ],
)
def test_what_cannot_be_swept_is_one_line(tmp_path, capsys, arguments, said):
    mixed = a_run(
        grid="scales", representation="2d-tokens", prompt="a horse",
        settings="scene_lr=2.0 system.guidance.guidance_scale=1.0",
    )  # fmt: skip
    swept_folder(tmp_path, [] if arguments else [mixed], psnr="1")
    assert sweep.main(["--folder", str(tmp_path), *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


# --- the gallery ----------------------------------------------------------------------------------


def compared_folder(folder, leave_out=(), methods=("sds",), on=("gaussians-tokens",)):
    table = Table(folder, world="objects")
    for where in on:
        for k, name in enumerate(GALLERY):
            for j, method in enumerate(methods):
                run = a_run(prompt=article(name), method=method, representation=where)
                psnr = 18 + k % 3 + j + (2 if where.endswith("tokens") else 0)
                scores = {"psnr": str(psnr), "object_accuracy": "0.9", "saturation": str(1 + j)}
                status = "it broke" if name in leave_out else "ok"
                row = begun(run, 1, "c") | {"status": status, "seconds": "60"} | scores
                table.record(row, [], None if name in leave_out else picture(100 + k))
    return folder


def test_the_gallery_has_every_object_beside_the_truth(tmp_path):
    assert gallery.main(["--folder", str(compared_folder(tmp_path))]) == 0
    with Image.open(tmp_path / "gallery.webp") as page:
        assert page.size == (3 * 524 - 12, 4 * (16 + 256 + 12) - 12)
        shown = np.asarray(page.convert("RGB"), np.float32)
    assert (tmp_path / "gallery.webp").stat().st_size < 400_000
    for k, name in enumerate(GALLERY):
        x, y = k % 3 * 524, k // 3 * 284 + 16
        true = truth_of(article(name)).rgb[[0, 6, 12, 18]].numpy()
        made = shown[y + 128 : y + 256, x : x + 512]
        assert np.abs(shown[y : y + 128, x : x + 512] - np.concatenate(true, 1) * 255).mean() < 4
        assert np.abs(made - (100 + k)).mean() < 3
    with (tmp_path / "gallery.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [r["object"] for r in rows] == list(GALLERY)
    assert [r["psnr"] for r in rows[:3]] == ["20", "21", "22"] and "frechet" not in rows[0]


def test_no_object_is_left_out_of_the_gallery(tmp_path, capsys):
    compared_folder(tmp_path, leave_out=("cat", "car"))
    assert gallery.main(["--folder", str(tmp_path)]) == 2
    assert "has no finished run of: cat, car; --partial" in capsys.readouterr().err
    assert not (tmp_path / "gallery.webp").exists()


def test_a_gallery_of_some_objects_says_which_are_missing(tmp_path):
    compared_folder(tmp_path, leave_out=("cat", "car"))
    assert gallery.main(["--folder", str(tmp_path), "--partial"]) == 0
    with (tmp_path / "gallery.csv").open(newline="") as file:
        made = [row["object"] for row in csv.DictReader(file)]
    assert made == [name for name in GALLERY if name not in ("cat", "car")]
    white = np.full((8, 400, 3), 255, np.uint8)
    cells = {"object": "cake", "psnr": ""}
    bare, named = (gallery.page([(cells, white, white)], missing) for missing in ([], ["cat"]))
    assert bare.size == (400, 16 + 2 * 8) and named.size == (400, bare.size[1] + 16)
    assert np.array_equal(np.asarray(named)[:32], np.asarray(bare))
    assert (np.asarray(named)[32:] < 128).any()  # the line of what is missing


def red_ball(folder, prompt):
    """A launched run of it."""
    ball = Gaussians.ball(400, radius=0.6, seed=1, opacity=0.95)
    with torch.no_grad():
        ball.sh0[:] = torch.tensor([1.7, -1.7, -1.7])
    return str(launched_run(folder, prompt, ball))


def test_launched_runs_are_rendered_into_a_gallery(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runs = [red_ball(tmp_path / k, p) for k, p in (("one", "a car"), ("two", "a cat"))]
    assert gallery.main([*runs, "--partial"]) == 0
    assert capsys.readouterr().out == "wrote gallery.webp and gallery.csv\n"
    with (tmp_path / "gallery.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["object"], r["run"]) for r in rows] == [("cat", runs[1]), ("car", runs[0])]
    assert all(0 < float(r["psnr"]) < 20 and 0 < float(r["iou"]) < 1 for r in rows)
    with Image.open("gallery.webp") as page:
        assert page.size == (2 * 524 - 12, 16 + 256 + 16)  # two objects, and a line of the missing
        middle = np.asarray(page.convert("RGB"), int)[16 + 128 + 64, [64, 524 + 64]]
    assert (middle[:, 0] > middle[:, 1] + 100).all()  # the red balls below the true objects


@pytest.mark.parametrize(
    "prompts, more, said",
    [
        (["a cat"], [], "what is given has no finished run of: hamburger, "),
        (["a car", "a red car"], ["--partial"], "have the same object, car: give one"),
        (["a horse"], ["--partial"], "the gallery has no horse; leave this run out"),
        (["a cat"], ["--partial", "--out", "g.csv"], "must end in .webp"),
        ([], ["nowhere", "--partial"], "nowhere is no run"),
    ],
)
def test_runs_that_make_no_gallery_cost_one_line(
    tmp_path, monkeypatch, capsys, prompts, more, said
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gallery, "views_of", None)  # nothing is rendered before it is clear
    runs = [red_ball(tmp_path / str(k), prompt) for k, prompt in enumerate(prompts)]
    assert gallery.main([*runs, *more]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not list(tmp_path.glob("g*"))


def test_a_picture_is_packed_below_its_limit():
    noise = np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    page = Image.fromarray(noise)
    best = len(gallery.packed(page))
    assert len(gallery.packed(page, best - 1)) < best
    with pytest.raises(UserError, match="at any quality"):
        gallery.packed(page, 100)


# --- the report -----------------------------------------------------------------------------------


def test_the_report_of_objects_tells_what_the_tokens_bring(tmp_path):
    on = ("gaussians-tokens", "gaussians-words")
    compared_folder(tmp_path, methods=("sds", "lods-lora"), on=on)
    assert report.main(["--folder", str(tmp_path)]) == 0
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    assert "compared with the true objects" in page.text and "pocket-shapes" not in page.text
    found = page.table("method", "runs (prompts)", "PSNR, dB")
    assert found["sds"]["PSNR, dB"].startswith("21.0 [")  # mean of 20, 21 and 22
    brought = page.text.index("The camera as tokens, minus words for the view: gaussians")
    assert brought and "+2.0 [+2.0, +2.0]" in page.bold
    # lods-lora minus sds: more is better of PSNR, and neither of saturation
    assert "+1.0 [+1.0, +1.0]" in page.bold
    assert "+1.00 [+1.00, +1.00]" in page.text and "+1.00 [+1.00, +1.00]" not in page.bold
    assert (tmp_path / "tokens.webp").exists() and (tmp_path / "words.webp").exists()


def test_a_sheet_shows_latents_in_their_order():
    world = WORLDS["objects"]
    made = world.example("a toy train", None, 0, 4)
    shown = np.asarray(Image.open(io.BytesIO(sheet(made, 128))).convert("RGB"), np.float32)
    wanted = torch.cat(list(made.rgb), dim=2).permute(1, 2, 0).numpy() * 255
    assert np.abs(shown - wanted).mean() < 4
