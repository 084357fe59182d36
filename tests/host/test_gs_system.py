"""The Gaussian system through the command line and the trainer, with a tiny random model."""

import csv
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import trimesh
from lods.gaussians import Gaussians
from lods.threestudio.systems import turntable
from omegaconf import OmegaConf
from PIL import Image
from plyfile import PlyData

from tests.glb_files import read_glb
from tests.runs import (
    LEARNING,
    QUIET,
    ROOT,
    fit,
    launch,
    read,
    same,
    small_run,
    switch,
    two_and_two,
)

CONFIGS = {
    "embedding": ["lods-gs-embedding.yaml"],
    "lora": ["lods-gs-lora.yaml"],
    "embedding+pocket": ["lods-gs-embedding.yaml", "pocket-shapes.yaml"],
    "lora+pocket": ["lods-gs-lora.yaml", "pocket-shapes.yaml"],
}
GROW = "refine_start_iter: 0, refine_every: 1, refine_stop_iter: 9"
STRATEGIES = {  # with changes of the number of Gaussians at every step from 1 on
    "none": "system.strategy.name=none",
    "default": "system.strategy={name: default, scene_scale: 9.0, default: {"
    + f"{GROW}, grow_grad2d: 1.e-9, refine_scale2d_stop_iter: 0}}}}",
    "mcmc": "system.strategy={name: mcmc, mcmc: {" + GROW + ", min_opacity: 0.09}}",
}


@pytest.fixture
def small(tiny_sd, tmp_path, monkeypatch):
    """``small(config, *overrides) -> (files, overrides)`` of a run of seconds, in tmp_path."""
    monkeypatch.chdir(tmp_path)

    def make(config, *more):
        return [str(ROOT / "configs" / name) for name in CONFIGS[config]], [
            *small_run(tiny_sd()),
            "system.geometry.init_type=ball",
            "system.geometry.ball={n_points: 120, radius: 0.6}",
            *more,
        ]

    return make


def trial(config):
    return Path("outputs") / CONFIGS[config][0].removesuffix(".yaml") / "t"


BIG_BALL = (
    "system.geometry.init_opacity=0.9",
    "system.geometry.init_scale=1.5",
    "system.exporter.mesh_resolution=32",
)
KEYS = ("state_dict", "optimizer_states", "lods_densifier", "rng_state", "global_step")


SLOW = pytest.mark.slow

# -- resume ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "guidance, strategy",
    [("embedding", s) for s in STRATEGIES]
    + [("lora", "default"), ("sds", "mcmc")]
    + [(p, "none") for p in ("vsd", "inner", "perp-neg")]
    # these learn nothing
    + [pytest.param(p, "none", marks=SLOW) for p in ("csd", "nfsd", "bridge", "ism", "sdi")],
)
def test_four_steps_are_two_and_two(small, guidance, strategy):
    """A checkpoint of step 2, written by a callback inside of the loop, continues to the same
    step 4, although the number of Gaussians changes on the way."""
    config = "lora+pocket" if guidance == "lora" else "embedding+pocket"
    more = ["system.renderer.backend=torch"]  # the compiled one: test_resume_in_a_new_process
    more += switch(guidance)
    run = small(config, STRATEGIES[strategy], *more)
    start, whole = two_and_two(run, KEYS)
    counts = [len(c["state_dict"]["geometry.means"]) for c in (start, whole)]
    if strategy == "none":
        assert counts == [120, 120]
    else:
        assert 120 < counts[0] < counts[1]  # at the steps 1, 2 and 3
    moved = start["state_dict"]["geometry.means"][:5] - whole["state_dict"]["geometry.means"][:5]
    assert moved.abs().max() > 0
    learned = [k for k in whole["state_dict"] if k.startswith("guidance.") and "initial" not in k]
    if guidance not in LEARNING:
        assert not learned
    else:
        assert any(not torch.equal(start["state_dict"][k], whole["state_dict"][k]) for k in learned)


@pytest.mark.slow
def test_resume_in_a_new_process(small):
    files, overrides = small("embedding+pocket", STRATEGIES["default"])
    overrides += ["checkpoint.every_n_train_steps=2"]
    assert launch(files, [*overrides, "trainer.max_steps=4"]) == 0
    whole = trial("embedding") / "ckpts"
    again = [*overrides, "trainer.max_steps=4", "tag=again"]
    subprocess.run(
        [sys.executable, ROOT / "launch.py", "--config", *files, "--train", *again]
        + [f"resume={whole}/epoch=0-step=2.ckpt"],
        check=True,
        capture_output=True,
    )
    one, two = read(whole / "last.ckpt"), read(whole.parents[1] / "again/ckpts/last.ckpt")
    for key in KEYS:
        same(one[key], two[key], key)
    for name in ("it4-test-sheet.png", "it4-export/gaussians.ply"):
        results = [whole.parent / "save" / name, whole.parents[1] / "again/save" / name]
        assert results[0].read_bytes() == results[1].read_bytes()


# -- every configuration, and what it leaves -------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS)
def test_shipped_configurations_run(small, config, capsys):
    assert launch(*small(config)) == 0
    save = trial(config) / "save"
    with Image.open(save / "it2-test-sheet.png") as sheet:  # 5 of 12 views, each once
        assert sheet.size == (4 * 24, 2 * 24)
    with Image.open(save / "it2-0.png") as grid:  # rgb, opacity, depth
        assert grid.size == (3 * 24, 24)
    assert sorted(p.name for p in (save / "it2-test").iterdir()) == [f"{i}.png" for i in range(5)]
    state = read(trial(config) / "ckpts" / "last.ckpt")["state_dict"]
    vertex = PlyData.read(str(save / "it2-export" / "gaussians.ply"))["vertex"]
    means = np.stack([vertex[c] for c in "xyz"], axis=1)
    assert np.array_equal(means, state["geometry.means"].numpy())
    assert np.array_equal(vertex["opacity"], state["geometry.opacities"].numpy())
    assert PlyData.read(str(save / "it2-export" / "gaussians-points.ply"))["vertex"].count == 120
    every = OmegaConf.load(trial(config) / "configs" / "parsed.yaml").trainer.log_every_n_steps
    metrics = trial(config) / "csv_logs" / "version_0" / "metrics.csv"
    rows = csv.DictReader(metrics.read_text().splitlines()) if metrics.exists() else []
    assert len([row for row in rows if row.get("train/loss_sds")]) == 2 // every
    printed = capsys.readouterr().out
    for what, name in {
        "video": "it2-test.mp4",
        "contact sheet": "it2-test-sheet.png",
        "gaussians": "it2-export/gaussians.ply (120)",
    }.items():
        assert f"{what}: {save / name}" in printed
    assert (save / "it2-test.mp4").stat().st_size > 500


def test_a_mesh_of_gaussians(small, capsys):
    options = ["system.exporter.fmt=glb", "system.exporter.mesh_resolution=32"]
    options.append("system.exporter.glb_colors=vertices")
    assert launch(*small("embedding+pocket", *options, *BIG_BALL)) == 0
    [path] = (trial("embedding+pocket") / "save" / "it2-export").glob("*.glb")
    mesh = trimesh.load(path, force="mesh", process=False)
    # half a unit and more on each side, about the origin; two steps move it little
    assert mesh.is_watertight and (mesh.bounds[0] < -0.4).all() and (mesh.bounds[1] > 0.4).all()
    _, attributes, _ = read_glb(path)
    assert {"POSITION", "NORMAL", "COLOR_0"} <= attributes.keys()
    assert f"mesh: {path}" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_is_exported_for_the_viewers_of_others(small, capsys):
    """Every other file of Gaussians, a glb with a texture, and the views without background."""
    assert launch(*small("embedding+pocket", *BIG_BALL)) == 0
    folder = trial("embedding+pocket")
    export = folder / "save" / "it2-export"
    before = {path.name for path in export.iterdir()}
    options = [
        f"resume={folder}/ckpts/last.ckpt",
        "system.exporter.fmt=[splat,compressed-ply,spz,glb]",
        "system.exporter.texture_size=64",
        "system.turntable=both",
    ]
    assert launch([str(folder / "configs" / "parsed.yaml")], options, "--export") == 0
    ends = (".splat", ".compressed.ply", ".spz", ".glb")
    wanted = {f"gaussians{end}" for end in ends} | {"turntable.webp", "frames"}
    assert {path.name for path in export.iterdir()} - before == wanted
    _, attributes, _ = read_glb(export / "gaussians.glb")
    assert set(attributes) == {"POSITION", "NORMAL", "TEXCOORD_0"}
    for end in ends[:3]:
        assert Gaussians.file(export / f"gaussians{end}").count == 120
    views = len(list((folder / "save" / "it2-test").glob("*.png")))
    frames = sorted((export / "frames").iterdir())
    assert len(frames) == views > 1
    with Image.open(frames[0]) as frame, Image.open(export / "turntable.webp") as animation:
        pixels = np.asarray(frame)
        assert frame.mode == "RGBA" and animation.n_frames == views
        assert pixels[0, 0, 3] == 0 and pixels[12, 12, 3] > 200
        shown = np.asarray(animation.convert("RGBA")).astype(float)
    assert np.abs(shown - pixels)[pixels[..., 3] > 250].mean() < 12
    assert f"animation: {export / 'turntable.webp'}" in capsys.readouterr().out


def test_frames_show_what_renders_show_in_front_of_any_background():
    g = torch.Generator().manual_seed(0)
    color, alpha = torch.rand(9, 9, 3, generator=g), torch.rand(9, 9, 1, generator=g)
    alpha[0] = 0
    picture = turntable.straight(color * alpha, alpha).astype(float) / 255
    for background in (0.0, 0.4, 1.0):
        rendered = (color * alpha + (1 - alpha) * background).numpy()
        shown = picture[..., :3] * picture[..., 3:] + (1 - picture[..., 3:]) * background
        assert np.abs(shown - rendered).max() < 1.5 / 255


def test_test_and_export_reproduce(small):
    run = small("lora+pocket", STRATEGIES["mcmc"], "trainer.max_steps=3")
    assert launch(*run) == 0
    folder = trial("lora")
    files = ["it3-test-sheet.png", "it3-test/3.png", "it3-export/gaussians.ply"]
    files += ["it3-export/gaussians-points.ply", "it3-test.mp4"]
    before = {name: (folder / "save" / name).read_bytes() for name in files}
    resume = f"resume={folder}/ckpts/last.ckpt"
    parsed = [str(folder / "configs" / "parsed.yaml")]
    for mode, written in (("--test", files), ("--export", files[2:4])):
        for name in files:
            (folder / "save" / name).unlink()
        assert launch(parsed, [resume], mode) == 0
        for name in files:
            path = folder / "save" / name
            if name in written:
                assert path.read_bytes() == before[name], (mode, name)
            else:
                assert not path.exists()
            path.write_bytes(before[name])


def test_sheet_takes_the_nearest_of_the_frames(small):
    system, _ = fit(*small("embedding+pocket", "system.sheet_views=4", "system.sheet_columns=3"))
    azimuths = torch.linspace(0, 360, 30).tolist()
    for index, azimuth in enumerate(azimuths):
        system._keep_for_sheet(azimuth, index, torch.full((8, 8, 3), index / 29))
    Path("save/it2-test").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save("save/it2-test/0.png")
    system.set_resume_status(0, 2)
    system.on_test_epoch_end()
    with Image.open("save/it2-test-sheet.png") as file:
        sheet = np.asarray(file)
    assert sheet.shape == (16, 24, 3)  # 4 pictures in rows of 3, the rest white
    shown = [sheet[8 * (i // 3) + 4, 8 * (i % 3) + 4, 0] for i in range(6)]
    nearest = [np.abs(np.array(azimuths) - a).argmin() for a in (0, 90, 180, 270)]
    assert shown == [round(255 * i / 29) for i in nearest] + [255, 255]


def test_a_sheet_of_as_many_views_as_there_are_has_each_once(small):
    import threestudio

    system, _ = fit(*small("embedding+pocket"))
    for views in (1, 4, 12, 60):
        system.cfg.sheet_views = views
        data = threestudio.find("random-camera-datamodule-gs")({"n_test_views": views})
        data.setup("test")
        for azimuth, index in zip(data.test_dataset.azimuth.tolist(), range(views)):
            system._keep_for_sheet(azimuth, index, torch.zeros(8, 8, 3))
        assert [index for _, index, _ in system._sheet.values()] == list(range(views))
        system._sheet = {}


def test_a_video_is_of_the_frames_of_its_test(small):
    """Not of those that an earlier test with more views has left."""
    assert launch(*small("embedding+pocket")) == 0
    folder = trial("embedding+pocket")
    frames = folder / "save/it2-test"
    (frames / "7.png").write_bytes((frames / "0.png").read_bytes())
    parsed = [str(folder / "configs" / "parsed.yaml")]
    assert launch(parsed, [f"resume={folder}/ckpts/last.ckpt"], "--test") == 0
    assert sorted(p.name for p in frames.iterdir()) == [f"{i}.png" for i in range(5)]
    # nor an export that renders
    fewer = ["data.n_test_views=3", "system.exporter.save_video=true"]
    assert launch(parsed, [f"resume={folder}/ckpts/last.ckpt", *fewer], "--export") == 0
    assert sorted(p.name for p in frames.iterdir()) == [f"{i}.png" for i in range(3)]


def test_no_sheet_and_no_weights_are_no_end(small, tmp_path):
    """Without a sheet the files at the end are written; what a run started from may be gone when it
    is tested."""
    assert launch(*small("lora+pocket")) == 0
    learned = trial("lora") / "save/it2-export/prior.safetensors"
    weights = learned.rename(tmp_path / "start.safetensors")
    more = ["system.sheet_views=0", f"system.guidance.weights={weights}"]
    assert launch(*small("lora+pocket", *more)) == 0
    save = trial("lora").with_name("t-002") / "save"  # the first one is left as it is
    assert (save / "it2-export/prior.safetensors").exists()
    assert not (save / "it2-test-sheet.png").exists()
    weights.unlink()
    parsed, resume = trial("lora") / "configs/parsed.yaml", trial("lora") / "ckpts/last.ckpt"
    gone = f"{tmp_path}/gone.ckpt"
    more = [f"system.weights={gone}", f"system.geometry.weights={gone}:geometry"]
    assert launch([str(parsed)], [f"resume={resume}", *more], "--test") == 0
    with pytest.raises(ValueError, match="sheet_columns must be a whole number from 1 to "):
        fit(*small("embedding+pocket", "system.sheet_columns=0"))


@pytest.mark.parametrize(
    "option, said",
    [
        ("system.loss.lambda_sparsity=null", "loss.lambda_sparsity is empty: give it a value"),
        ("system.guidance.max_step_percent=null", "max_step_percent is empty: give it a value"),
        ("data.height=null", "height is empty: give it a value, or leave"),
        (
            "data.width=64.5",
            "width must be a whole number from 1 to 16384, or a list",
        ),
        ("system.exporter.fmt=null", "system.exporter.fmt has 'None'"),
    ],
)
def test_a_value_of_a_wrong_kind_is_named(small, option, said):
    with pytest.raises(ValueError, match=said) as caught:
        fit(*small("embedding+pocket", option))
    assert "\n" not in str(caught.value)


def test_lora_configuration_differs_in_the_prior_only():
    one, two = (
        OmegaConf.to_container(OmegaConf.load(ROOT / "configs" / f"lods-gs-{name}.yaml"))
        for name in ("embedding", "lora")
    )
    one["name"] = two["name"]
    one["system"]["guidance_type"] = two["system"]["guidance_type"]
    one["system"]["optimizer"]["params"]["guidance"]["lr"] = 5e-6
    assert one == two


# -- losses, learning rates, mistakes --------------------------------------------------------------


def test_losses_are_their_formulas(small):
    extra = [f"system.loss.lambda_{name}=1.0" for name in ("gaussian_scale", "gaussian_opacity")]
    system, _ = fit(*small("embedding+pocket", *extra))
    opacity = torch.tensor([0.0, 0.3, 0.9, 1.0]).view(1, 2, 2, 1).requires_grad_()
    losses = system.regularisers({"opacity": opacity})
    o = opacity.detach().double()
    assert torch.isclose(losses["sparsity"].double(), (o * o + 0.01).sqrt().mean())
    c = o.clamp(1e-3, 0.999)
    entropy = -(c * c.log() + (1 - c) * (1 - c).log()).mean()
    assert torch.isclose(losses["opaque"].double(), entropy, atol=1e-6)
    assert torch.isclose(losses["gaussian_scale"], system.geometry.scales.exp().mean())
    assert torch.isclose(losses["gaussian_opacity"], system.geometry.opacities.sigmoid().mean())
    # it pushes opacities away from 1/2
    (grad,) = torch.autograd.grad(losses["opaque"], opacity)
    assert grad.flatten()[1] > 0 > grad.flatten()[2]


def test_total_is_the_weighted_sum_and_lambdas_are_scheduled(small, monkeypatch):
    run = small("embedding+pocket", "system.loss.lambda_sds=[0,2.0,4.0,2]")
    system, _ = fit(*run)
    logged = {}
    monkeypatch.setattr(system, "log", lambda k, v, **kw: logged.update({k: float(v)}))
    system.set_resume_status(0, 1)
    system.trainer.log_every_n_steps = 1
    losses = {"sds": torch.tensor(5.0), "embedding": torch.tensor(7.0)}
    assert system.weigh(losses).item() == 3 * 5 + 7
    assert logged["train/loss_sds"] == 5 and logged["train_params/lambda_sds"] == 3
    del system.cfg.loss["lambda_embedding"]
    with pytest.raises(ValueError, match=r"add system\.loss\.lambda_embedding=1\.0"):
        system.weigh(losses)


def test_learning_rates_follow_the_schedule_geometrically(small):
    rates = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            groups = {g["name"]: g["lr"] for g in trainer.optimizers[0].param_groups}
            rates.append([groups["geometry.means"], groups["geometry.sh0"]])

    schedule = "system.lr_schedule={geometry.means: [0, 1.0, 0.01, 2]}"
    fixed = "system.optimizer.params.geometry.sh0.lr=0.05"
    fit(*small("embedding+pocket", schedule, fixed), callbacks=[Watch()], max_steps=4)
    assert np.allclose(rates, [[1.0, 0.05], [0.1, 0.05], [0.01, 0.05], [0.01, 0.05]])


def test_only_what_is_listed_is_trained(small):
    run = small("embedding+pocket", STRATEGIES["mcmc"])
    files, overrides = run
    import threestudio
    from threestudio.utils.config import load_config

    cfg = load_config(*files, cli_args=overrides)
    del cfg.system.optimizer.params["geometry.sh0"]
    system = threestudio.find(cfg.system_type)(cfg.system)
    before = {k: v.detach().clone() for k, v in system.geometry.gaussians().items()}
    trainer = pl.Trainer(max_steps=1, enable_checkpointing=False, **QUIET)
    trainer.fit(system, datamodule=threestudio.find(cfg.data_type)(cfg.data))
    changed = {k: not torch.equal(v, before[k]) for k, v in system.geometry.gaussians().items()}
    assert not changed.pop("sh0") and changed.pop("means") and changed["opacities"]


@pytest.mark.parametrize(
    "override, message",
    [
        ("system.loss.lambda_sparsty=1.0", "system.loss.lambda_sparsty weighs a loss that does"),
        ("system.lr_schedule={geometry.mean: [0, 1., 1., 2]}", "names 'geometry.mean', which"),
        ("system.strategy.name=mcmmc", "must be one of none, default, mcmc"),
        ("system.strategy={name: mcmc, mcmc: {cap: 3}}", "mcmc.cap is unknown: the fields are"),
        (
            "system.strategy={name: mcmc, mcmc: {cap_max: 119}}",
            "system.strategy.mcmc.cap_max=119 is below the 120 Gaussians that the run begins with",
        ),
        ("system.geometry.max_scale=-0.1", "system.geometry.max_scale must be a number from 0"),
        ("system.geometry.init_type=none", "there are no Gaussians to train"),
        ("system.geometry.bal.n_points=3", "bal"),
        ("system.exporter.fmt=[obj]", "the formats are ply, points, glb"),
        ("system.turntable=gif", "system.turntable has 'gif': it is one or a list of webp, webm"),
    ],
)
def test_mistakes_are_one_line(small, capsys, override, message):
    files, overrides = small("embedding+pocket", override)
    assert launch(files, overrides) != 0
    error = capsys.readouterr().err
    line = next(line for line in error.splitlines() if line.startswith("error:"))
    assert message in line and "Traceback" not in error
    assert not list(Path("outputs").glob("*/*/ckpts/*"))  # found before anything is trained


@pytest.mark.parametrize("strategy", ["none", "default"])
def test_no_gaussian_grows_above_max_scale(small, strategy):
    """Also none that starts above it, and none that is split or cloned."""
    more = [STRATEGIES[strategy], "system.geometry.init_scale=2.0"]
    limits = ("system.geometry.max_scale=0", "system.geometry.max_scale=0.15")
    free, held = (fit(*small("embedding+pocket", *more, x))[0].geometry for x in limits)
    assert free.scales.exp().max() > 0.2
    assert held.scales.exp().max() < 0.15 * (1 + 1e-6)
    assert (free.count > 120) == (held.count > 120) == (strategy == "default")


def test_a_collapse_is_one_line_and_says_how_to_avoid_it(small, capsys):
    more = STRATEGIES["default"].replace("grow_grad2d: 1.e-9", "prune_scale3d: 1.e-4")
    assert launch(*small("embedding+pocket", more, "trainer.max_steps=4")) != 0
    error = capsys.readouterr().err
    line = next(line for line in error.splitlines() if line.startswith("error:"))
    assert "step 1 would leave 0 of the 120 Gaussians that the run began with" in line
    assert "system.strategy.default.prune_scale3d=0.0001 has pruned most: raise it" in line
    assert "Traceback" not in error


def test_changes_of_the_count_are_logged(small, monkeypatch):
    import threestudio
    from threestudio.utils.config import load_config

    logged = {}
    files, overrides = small("embedding+pocket", STRATEGIES["mcmc"])
    system_type = threestudio.find(load_config(*files, cli_args=overrides).system_type)
    monkeypatch.setattr(
        system_type, "note", lambda self, name, value: logged.setdefault(name, []).append(value)
    )
    fit(files, overrides, max_steps=4)
    counts = logged["train/n_gaussians"]
    assert counts == [120, 120, 126, 132]  # 5 % after the steps 1 and 2, and after the last
    assert logged["train/n_added"] == [0, 0, 6, 12] and logged["train/n_relocated"][0] == 0


def test_accumulation_with_densification_is_refused(small, capsys):
    more = [STRATEGIES["default"], "trainer.accumulate_grad_batches=2"]
    assert launch(*small("embedding+pocket", *more)) != 0
    assert re.search(r"error: .*accumulate_grad_batches=1", capsys.readouterr().err)


def test_a_skipped_step_does_not_densify(small, lods, monkeypatch):
    class Drop(pl.Callback):
        """As a guard against NaN does, in the first step."""

        def on_before_optimizer_step(self, trainer, system, optimizer):
            if trainer.global_step == 0:
                for parameter in system.parameters():
                    parameter.grad = None

    steps = []
    module = sys.modules["lods.gaussians.densify"]
    monkeypatch.setattr(
        module.Densifier, "after_step", lambda self, g, o, step, *a: steps.append(step)
    )
    fit(*small("embedding+pocket"), callbacks=[Drop()])
    assert steps == [1]
