"""The evaluation harness without a training: metrics, true pictures, grids, tables."""

import math
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from evaluation import machine, metrics
from evaluation.grid import TRUE, Run, load_grid, written
from evaluation.table import CURVES, RESULTS, Table, begun
from pocket.shapes import truth
from pocket.shapes.data import VIEWS, asked
from pocket.shapes.judge import load, verdict
from pocket.shapes.scenes import COLOR_NAMES, KIND_NAMES, KINDS
from pocket.shapes.truth import Orbit
from tests.runs import ROOT
from tests.tiny_models import WORDS
from threestudio.utils.errors import UserError

GRIDS = ROOT / "evaluation/grids"
ORBIT = Orbit(15.0, 3.6, 40.0, 24)

# --- metrics --------------------------------------------------------------------------------------


def test_frechet_distance_of_a_set_to_itself_is_zero():
    rng = np.random.default_rng(0)
    few, many = rng.normal(size=(5, 30)), rng.normal(size=(400, 30))
    assert metrics.frechet(few, few) == pytest.approx(0, abs=1e-9)
    assert metrics.frechet(many, many[::-1]) == pytest.approx(0, abs=1e-9)
    assert metrics.frechet(few, many) > 1


def test_frechet_distance_of_known_gaussians():
    rng = np.random.default_rng(0)
    n = 200_000
    turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]  # of both: covariances with one set of axes
    x = rng.normal(size=(n, 3)) * [1, 2, 3] @ turn
    y = rng.normal(size=(n, 3)) * [2, 2, 0.5] @ turn + [3, 0, 4]
    # |mean|^2 + sum (s_x - s_y)^2
    assert metrics.frechet(x, y) == pytest.approx(25 + 1 + 0 + 6.25, rel=0.01)
    # Gaussians whose axes differ: tr (C_x C_y)^(1/2) in closed form for 2 x 2 matrices
    x, y = (
        rng.normal(size=(n, 2)) * [1, 3],
        rng.normal(size=(n, 2)) * [2, 1] @ [[0.6, 0.8], [-0.8, 0.6]],
    )
    cx = np.diag([1.0, 9.0])
    cy = np.array([[0.6, 0.8], [-0.8, 0.6]]).T @ np.diag([4.0, 1.0]) @ [[0.6, 0.8], [-0.8, 0.6]]
    root = math.sqrt(np.trace(cx @ cy) + 2 * math.sqrt(np.linalg.det(cx @ cy)))
    assert metrics.frechet(x, y) == pytest.approx(10 + 5 - 2 * root, rel=0.02)


def test_janus_rate_counts_fronts_seen_from_behind():
    azimuth = np.array([0.0, 90.0, 91.0, 180.0, 270.0, 269.0, -135.0, 360.0])
    front, back = VIEWS.index("front"), VIEWS.index("back")
    behind = np.array([False, False, True, True, False, True, True, False])
    assert metrics.janus_rate(np.where(behind, back, front), azimuth) == 0.0
    assert metrics.janus_rate(np.where(behind, front, back), azimuth) == 1.0
    view = np.where(behind, back, front)
    view[3] = front
    assert metrics.janus_rate(view, azimuth) == 0.25
    assert math.isnan(metrics.janus_rate(np.array([front]), np.array([0.0])))


def test_silhouette_iou_is_of_the_best_turn_and_shape():
    rng = np.random.default_rng(0)
    car, color = asked("a blue car")
    masks = np.stack([truth.around(rng, car, color, ORBIT)[1] > 0.5 for _ in range(2)])
    for turn in (0, 1, 7, 23):
        assert metrics.silhouette_iou(np.roll(masks[1], turn, axis=0), masks) == 1.0
        assert metrics.silhouette_iou(np.roll(masks[1], turn, axis=0), masks[1]) == 1.0
    lamp = truth.around(rng, *asked("a lamp"), ORBIT)[1] > 0.5
    assert 0.2 < metrics.silhouette_iou(lamp, masks) < 0.8
    # the order around the object counts
    shuffled = masks[0][rng.permutation(len(masks[0]))]
    assert metrics.silhouette_iou(shuffled, masks[0]) < 0.95
    empty = np.zeros((3, 4, 4), bool)
    half = empty.copy()
    half[:, :2] = True
    assert metrics.silhouette_iou(empty, empty) == 1.0
    assert metrics.silhouette_iou(half, ~empty) == 0.5
    assert metrics.silhouette_iou(empty, half) == 0.0


def test_what_does_not_apply_is_nan():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(24, 4))
    said = {
        "kind": np.repeat([3, 5], 12),
        "color": np.repeat([1, 2, 3], 8),
        "view": np.full(24, VIEWS.index("front")),
        "features": features,
    }
    azimuth = truth.azimuths(24)
    all_of_them = metrics.judged(said, 3, 2, azimuth, features)
    assert KINDS[3].front and all_of_them["object_accuracy"] == 0.5
    assert all_of_them["color_accuracy"] == pytest.approx(1 / 3)
    assert all_of_them["janus_rate"] == 1.0 and all_of_them["frechet"] < 1e-9
    no_color = metrics.judged(said, 3, -1, azimuth, features)  # of a kind that has several
    assert math.isnan(no_color["color_accuracy"]) and math.isnan(no_color["frechet"])
    # several objects, as in 2D, may be of several colours, as the reference's are
    assert KINDS[3].natural and metrics.judged(said, 3, -1, None, features)["frechet"] < 1e-9
    assert math.isnan(metrics.judged(said, 3, 2, None, features)["janus_rate"])
    assert not KINDS[5].front
    assert math.isnan(metrics.judged(said, 5, 2, azimuth, features)["janus_rate"])


def make_tiny_clip(folder, seed=0) -> Path:
    from transformers import CLIPConfig, CLIPModel

    from pocket.tokenizer import save_tokenizer

    tokenizer = save_tokenizer(folder, WORDS, 16)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos")}
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = CLIPConfig(
        text_config={
            **sizes,
            **ids,
            "vocab_size": len(tokenizer),
            "num_attention_heads": 2,
            "max_position_embeddings": 16,
        },
        vision_config={**sizes, "num_attention_heads": 2, "image_size": 32, "patch_size": 8},
        projection_dim=8,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        CLIPModel(config).save_pretrained(folder, safe_serialization=True)
    return folder


def test_clip_score_is_the_cosine_of_image_and_prompt(tmp_path):
    from evaluation.run import load_clip

    model, tokenizer = load_clip(str(make_tiny_clip(tmp_path)))
    torch.manual_seed(0)
    images, prompt = torch.rand(3, 3, 32, 32), "a red car"
    mean, std = (torch.tensor(v)[:, None, None] for v in (metrics.CLIP_MEAN, metrics.CLIP_STD))
    with torch.no_grad():
        seen = model.vision_model(pixel_values=(images - mean) / std).pooler_output
        read = model.text_model(**tokenizer([prompt], return_tensors="pt")).pooler_output
        x, y = model.visual_projection(seen), model.text_projection(read)
    cosines = (x @ y.T)[:, 0] / x.norm(dim=1) / y.norm()
    expected = float(100 * cosines.clamp(min=0).mean())
    scores = [metrics.clip_score(model, tokenizer, images, p) for p in (prompt, "a blue house")]
    assert scores[0] == pytest.approx(expected, abs=1e-3)
    assert scores[0] != scores[1]
    larger = images.repeat_interleave(4, 2).repeat_interleave(4, 3)
    assert 0 <= metrics.clip_score(model, tokenizer, larger, prompt) <= 100
    with pytest.raises(UserError, match="cannot be had"):
        load_clip(str(tmp_path / "nothing"))


# --- true pictures --------------------------------------------------------------------------------


def test_true_pictures_are_what_the_prompt_says():
    judge = load()
    other = truth.example(*asked("a lamp"), ORBIT, seed=0, count=24)
    others = verdict(judge, other.rgb)["features"]
    for prompt in ("a blue car", "a penguin"):
        kind, color = asked(prompt)
        made = truth.example(kind, color, ORBIT, seed=0, count=24)
        assert made.rgb.shape == (24, 3, 64, 64) and made.opacity.shape == (24, 64, 64)
        said = verdict(judge, made.rgb)
        true = truth.reference(kind, color, ORBIT)
        scores = metrics.judged(said, kind, color, made.azimuth, true.features)
        assert scores["object_accuracy"] > 0.9 and scores["janus_rate"] < 0.2
        assert color < 0 or scores["color_accuracy"] > 0.9
        assert metrics.silhouette_iou(made.opacity.numpy() > 0.5, true.masks) > 0.8
        far = metrics.frechet(true.features, others)
        assert far > 3 * scores["frechet"]
        # a white ground
        corner = made.rgb[:, :, 0, 0]
        assert corner.min() == 1.0


def test_true_cameras_are_those_of_the_data_module():
    """A ball's silhouette has the size that the camera's distance and angle give it."""
    import threestudio

    data = threestudio.find("random-camera-datamodule")(
        {"eval_camera_distance": 3.6, "eval_fovy_deg": 40.0, "n_test_views": 24, "rays": False}
    )
    data.setup("test")
    for index, azimuth in ((0, 0.0), (6, 90.0)):
        batch = data.test_dataset[index]
        assert float(batch["azimuth"]) == pytest.approx(truth.azimuths(24)[index]) == azimuth
        # a point on the front is seen in the middle, and from 90 degrees at the left
        point = batch["mvp_mtx"] @ torch.tensor([0.8, 0.0, 0.0, 1.0])
        x = float(point[0] / point[3])
        assert x == pytest.approx(0.0, abs=1e-5) if azimuth == 0 else x < -0.3
    rng = np.random.default_rng(0)
    _, opacity = truth.around(rng, KIND_NAMES.index("car"), 4, ORBIT)
    # the car is long: seen from its side it is wider than from its front
    width = (opacity > 0.5).any(1).sum(-1)
    assert width[6] > 1.5 * width[0]


def test_references_are_kept_and_examples_are_others(tmp_path, monkeypatch):
    kind, color = asked("a red mushroom")
    first = truth.reference(kind, color, None, tmp_path)
    assert first.features.shape == (truth.FRONTS, 128) and first.masks is None
    assert len(list(tmp_path.iterdir())) == 1
    monkeypatch.setattr(truth, "fronts", None)  # not drawn again
    assert np.array_equal(truth.reference(kind, color, None, tmp_path).features, first.features)
    monkeypatch.undo()
    monkeypatch.setattr(truth, "FRONTS", 7)
    assert len(truth.reference(kind, color, None, tmp_path).features) == 7
    one, same, two = (truth.example(kind, color, None, s, 3).rgb for s in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, two)


# --- grids ----------------------------------------------------------------------------------------

GRID = """
methods:
  csd:
    guidance_type: lods-sds-guidance
    overrides: {system.guidance.guidance_scale: 5, scene_lr: 0.5}
    representations:
      a: {overrides: {system.guidance.guidance_scale: 7}, tune: {data.x: [1, 2]}}
  lods: {guidance_type: lods-embedding-guidance}
representations:
  a: {configs: [evaluation/playground.yaml], steps: 3, overrides: {data.n_particles: 2, data.x: 9}}
  b:
    configs: [evaluation/playground.yaml]
    steps: 4
    methods: [lods]
    seeds: [1]
prompts: [a blue car, a penguin]
seeds: [0, 1]
overrides: {data.n_particles: 5, list: [0, 0.5, "${trainer.max_steps}"]}
"""


@pytest.fixture
def write(tmp_path):
    def grid(text):
        path = tmp_path / "try.yaml"
        path.write_text(text)
        return path

    return grid


def test_a_grid_is_the_product_of_its_axes(write):
    grid = load_grid(write(GRID))
    assert grid.name == "try" and grid.tuning
    count = {}
    for run in grid.runs:
        count[run.representation, run.method] = count.get((run.representation, run.method), 0) + 1
    assert count == {
        ("a", "csd"): 8,
        ("a", "lods"): 4,
        ("a", TRUE): 4,
        ("b", "lods"): 2,
        ("b", TRUE): 2,
    }
    assert len({r.title for r in grid.runs}) == len(grid.runs)
    one = next(r for r in grid.runs if r.method == "csd" and "data.x=2" in r.settings)
    # later ones win; settings are the method's own
    assert one.settings == "data.x=2 scene_lr=0.5 system.guidance.guidance_scale=7"
    assert one.scene_lr == 0.5 and one.steps == 3
    assert set(one.overrides) == {
        "data.n_particles=2",
        "data.x=2",
        "system.guidance.guidance_scale=7",
        'list=[0,0.5,"${trainer.max_steps}"]',
    }
    assert not load_grid(write(GRID.replace("tune: {data.x: [1, 2]}", ""))).tuning
    some = "settings: [{data.x: 1, scene_lr: 2.0}, {data.x: 4}]"  # and not their product
    grid = load_grid(write(GRID.replace("tune: {data.x: [1, 2]}", some)))
    cells = {r.settings: r.scene_lr for r in grid.runs if r.method == "csd"}
    guidance = "system.guidance.guidance_scale=7"
    want = {f"data.x=1 scene_lr=2.0 {guidance}": 2.0, f"data.x=4 scene_lr=0.5 {guidance}": 0.5}
    assert grid.tuning and cells == want
    more = "  lods: {settings: [{data.y: 1}, {data.y: 2}], "  # of a method: everywhere
    grid = load_grid(write(GRID.replace("  lods: {", more)))
    cells = {(r.representation, r.settings) for r in grid.runs if r.method == "lods"}
    assert cells == {(on, f"data.y={y}") for on in "ab" for y in (1, 2)}


@pytest.mark.parametrize(
    "old, new, text",
    [
        ("seeds: [0, 1]\n", "seeds: [0, 1]\nprompt: x\n", "has no field 'prompt': did you mean"),
        ("steps: 4", "stps: 4", "representation b has no field 'stps': did you mean 'steps'"),
        ("guidance_type: lods-emb", "type: lods-emb", "method lods has no field 'type'"),
        (
            "methods: [lods]",
            "methods: [lod]",
            "b: methods has no 'lod': did you mean 'lods'",
        ),
        ("seeds: [1]", "seeds: [3]", "representation b: seeds has no 3: there are 0, 1"),
        ("      a: {over", "      c: {over", "method csd: representations has no 'c'"),
        ("tune: {data.x: [1, 2]}", "tune: {data.x: 1}", "tune.data.x must be a list"),
        ("tune: {data.x: [1, 2]}", "settings: []", "on a: settings must be a list of mappings"),
        ("tune: {data.x: [1, 2]}", "settings: [data.x=1]", "mappings, not ['data.x=1']"),
        (
            "data.x: 9",
            "trainer.max_steps: 9",
            "on a: trainer.max_steps is no override here",
        ),
        ("scene_lr: 0.5", "scene_lr: -1", "scene_lr must be a number above 0"),
        ("a penguin", "a dragon", "'a dragon' must name exactly one of"),
        ("  lods: {", f"  {TRUE}: {{", "is not a method"),
        ("steps: 4", "steps: 0", "at least 1 step"),
        ("prompts: [", "prompts: [[", "not valid YAML"),
        ("seeds: [0, 1]\n", "seeds: [0, 1]\npriors: {}\n", "has priors and methods, which are the"),
    ],
)
def test_a_mistake_in_a_grid_is_one_line(write, old, new, text):
    assert old in GRID
    with pytest.raises(UserError) as error:
        load_grid(write(GRID.replace(old, new)))
    assert text in str(error.value) and "\n" not in str(error.value)


def test_a_grid_with_the_old_names_of_its_keys_is_the_same(write):
    now = load_grid(write(GRID)).runs
    old = GRID.replace("methods:", "priors:").replace("representations:", "canvases:")
    assert old != GRID and load_grid(write(old)).runs == now
    assert now[0].identity["canvas"] == "a" and now[0].identity["prior"] in ("csd", "lods")


def test_values_are_written_as_the_command_line_reads_them():
    from threestudio.utils.config import parse_overrides

    values = [1, 1e-5, 0.1, float("inf"), True, None, "a b, c", [0, 0.98, 1e-3, "${a.b}"], {"a": 1}]
    for value in values:
        read = parse_overrides([f"x={written(value)}"])
        assert OmegaConf.to_container(read, resolve=False) == {"x": value}


def test_a_list_of_runs_may_be_cut_short():
    """``evaluate.py ... --dry-run | head -1``: more than a pipe holds is left unread."""
    command = [sys.executable, "evaluate.py", GRIDS / "shapes.yaml", "--dry-run", "--out", "none"]
    pipe = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    with subprocess.Popen(command, **pipe) as process:
        assert process.stdout.readline().startswith("shapes: ")
        process.stdout.close()
        assert (process.stderr.read(), process.wait()) == ("", 0)


# --- tables ---------------------------------------------------------------------------------------


def a_run(**changes) -> Run:
    fields = dict(grid="g", representation="2d", method="sds", prompt="a blue car", seed=0)
    more = dict(settings="", steps=3, configs=(), overrides=())
    return Run(**{**fields, **more, **changes})


def row_of(run, **changes):
    return begun(run, 1, "c") | {"status": "ok"} | {k: str(v) for k, v in changes.items()}


def curves_of(run, losses):
    cells = {k: run.identity[k] for k in CURVES if k in run.identity}
    return [
        cells | dict(step=i, loss_sds=v, prior_loss="", grad_norm=1) for i, v in enumerate(losses)
    ]


def test_a_new_row_replaces_that_of_its_cell(tmp_path):
    table = Table(tmp_path)
    one, other = a_run(), a_run(seed=1)
    assert begun(one, 2, "c")["kind"] == "car" and begun(one, 2, "c")["color"] == COLOR_NAMES[4]
    table.record(row_of(one, frechet=1), curves_of(one, [1, 2]), b"old")
    table.record(row_of(other, frechet=2), curves_of(other, [3]), None)
    again = a_run(settings="x=1")
    assert table.find(one)["frechet"] == "1" and table.find(again) is None
    assert table.find(a_run(steps=4)) is None
    table.record(row_of(again, frechet=3), curves_of(again, [5]), b"new")
    assert [(r["seed"], r["frechet"]) for r in table.rows()] == [("1", "2"), ("0", "3")]
    lines = (tmp_path / "curves.csv").read_text().splitlines()
    assert lines[0] == ",".join(CURVES) and len(lines) == 3
    sheet = tmp_path / "sheets/g/2d-sds-a-blue-car-0.webp"
    assert sheet.read_bytes() == b"new"
    table.record(row_of(again, status="broken"), [], None)
    assert not sheet.exists()  # or it would be shown as that of the run that failed
    assert (tmp_path / "results.csv").read_text().startswith(",".join(RESULTS) + "\n")


def test_each_setting_of_a_tuning_has_a_row(tmp_path):
    table = Table(tmp_path, tuning=True)
    for settings in ("x=1", "x=2", "x=1"):
        run = a_run(settings=settings)
        table.record(row_of(run), curves_of(run, [1]), b".")
    assert [r["settings"] for r in table.rows()] == ["x=2", "x=1"]
    assert {p.name for p in tmp_path.iterdir()} == {"tuning.csv"}


@pytest.mark.parametrize(
    "changes",
    [
        {"overrides": ("a=1",)},
        {"configs": ("x.yaml",)},
        {"guidance_type": "lods-csd-guidance"},
        {"views": 12},
        {"scene_lr": 2.0},
        {"judge": False},
        {"clip": "x"},
    ],
)
def test_a_changed_grid_has_other_runs(tmp_path, changes):
    table = Table(tmp_path)
    table.record(row_of(a_run()), [], None)
    assert table.find(a_run(**changes)) is None and table.find(a_run()) is not None


def test_the_folder_of_a_table_is_no_file(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(UserError, match=r"cannot be made .File exists.: give another"):
        Table(tmp_path / "out")


def _record_many(folder, worker):
    for i in range(15):
        run = a_run(seed=100 * worker + i)
        Table(folder).record(row_of(run), curves_of(run, [1, 2]), None)


def test_tables_are_shared_by_processes(tmp_path):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_record_many, args=(tmp_path, k)) for k in range(4)]
    for process in workers:
        process.start()
    for process in workers:
        process.join()
    assert len({r["seed"] for r in Table(tmp_path).rows()}) == 60
    assert len((tmp_path / "curves.csv").read_text().splitlines()) == 1 + 120


def _claim_and_wait(folder, ready):
    claim = Table(folder).claim(a_run())
    ready.set()
    signal.pause()
    claim.release()


def test_a_run_is_claimed_once_and_freed_by_death(tmp_path):
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    holder = context.Process(target=_claim_and_wait, args=(tmp_path, ready))
    holder.start()
    assert ready.wait(20)
    table = Table(tmp_path)
    assert table.claim(a_run()) is None
    assert table.claim(a_run(settings="x=1")) is None  # of the same cell
    assert table.claim(a_run(seed=5)) is not None
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    claim = table.claim(a_run())
    assert claim is not None and table.claim(a_run()) is None
    claim.release()
    assert table.claim(a_run()) is not None


def test_a_table_of_other_columns_is_left_alone(tmp_path):
    (tmp_path / "results.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="other columns"):
        Table(tmp_path).record(row_of(a_run()), [], None)
    assert (tmp_path / "results.csv").read_text() == "a,b\n1,2\n"


# --- what the code is ---


def test_what_the_code_is_does_not_hang_on_other_commits(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "ROOT", tmp_path)

    def git(*args):
        command = ["git", "-c", "user.name=t", "-c", "user.email=t@t", *args]
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)

    git("init", "-q")
    for name in ("configs/a.yaml", "docs/table.csv", "evaluation/grids/g.yaml"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    git("add", "."), git("commit", "-qm", "1")
    before, first = machine.code(), machine.commit()
    (tmp_path / "docs/table.csv").write_text("2")
    (tmp_path / "evaluation/grids/g.yaml").write_text("2")
    git("commit", "-qam", "2")
    assert machine.code() == before and machine.commit() != first
    (tmp_path / "configs/b.yaml").write_text("1")
    new = machine.code()
    (tmp_path / "configs/b.yaml").unlink()
    (tmp_path / "configs/a.yaml").write_text("2")
    edited = machine.code()
    git("commit", "-qam", "3")
    assert len({before, new, edited, machine.code()}) == 4
