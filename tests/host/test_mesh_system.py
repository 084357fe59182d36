"""The system of textured meshes through the command line and the trainer, with a tiny model."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from lods.meshes.initialize import MeshBallInit, textured
from lods.meshes.parameters import TexturedMesh
from omegaconf import OmegaConf
from PIL import Image

from tests.runs import ROOT, fit, launch, read, small_run, two_and_two

CONFIGS = {
    "embedding": ["lods-mesh-embedding.yaml"],
    "embedding+pocket": ["lods-mesh-embedding.yaml", "pocket-mesh.yaml"],
    "refine": ["lods-mesh-embedding.yaml", "mesh-refine.yaml"],
    "refine+pocket": ["lods-mesh-embedding.yaml", "pocket-mesh.yaml", "mesh-refine.yaml"],
}
FREE = "system.geometry.free_vertices=true"
SLOW = pytest.mark.slow
KEYS = ("state_dict", "optimizer_states", "rng_state", "global_step")


@pytest.fixture
def small(tiny_sd, tmp_path, monkeypatch):
    """``small(config, *overrides) -> (files, overrides)`` of a run of seconds, in tmp_path."""
    monkeypatch.chdir(tmp_path)

    def make(config, *more):
        return [str(ROOT / "configs" / name) for name in CONFIGS[config]], [
            *small_run(tiny_sd()),
            "system.geometry.ball.subdivisions=2",
            "system.geometry.texture_size=32",
            *(["system.guidance.cameras=words"] if "pocket" in config else []),
            *more,
        ]

    return make


def trial(config):
    name = "lods-mesh-refine" if "refine" in config else "lods-mesh-embedding"
    return Path("outputs") / name / "t"


@pytest.mark.parametrize(
    "config", [pytest.param(c, marks=SLOW if c == "refine" else ()) for c in CONFIGS]
)
def test_shipped_configurations_run(small, config, capsys):
    assert launch(*small(config)) == 0
    save = trial(config) / "save"
    with Image.open(save / "it2-test-sheet.png") as sheet:  # 5 of 12 views, each once
        assert sheet.size == (4 * 24, 2 * 24)
    with Image.open(save / "it2-0.png") as grid:  # rgb, opacity, depth
        assert grid.size == (3 * 24, 24)
    state = read(trial(config) / "ckpts" / "last.ckpt")["state_dict"]
    start = MeshBallInit(1.0, 2).load()
    assert len(state["geometry.faces"]) == len(start.faces)
    assert torch.equal(state["geometry.vertices"], state["geometry.start"])
    assert not (state["geometry.texture"] == 0.5).all()
    for name in ("mesh.obj", "mesh.glb"):
        mesh = trimesh.load(save / "it2-export" / name, process=False, force="mesh")
        assert len(mesh.faces) == len(start.faces) and mesh.visual.uv is not None
    with Image.open(save / "it2-export" / "mesh.png") as picture:
        written = np.asarray(picture)
    final = TexturedMesh(textured(MeshBallInit(1.0, 1).load(), 16))
    parts = {k.removeprefix("geometry."): v for k, v in state.items() if k.startswith("geometry.")}
    final.load_state_dict(parts)
    final.fill_unseen()
    assert np.array_equal(written, (255 * final.shown_texture().detach()).round().byte())
    assert f"mesh: {save / 'it2-export' / 'mesh.glb'}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change",
    [(), (FREE,), pytest.param(("system.guidance_type=lods-refine-guidance",), marks=SLOW)],
)
def test_four_steps_are_two_and_two(small, change):
    start, whole = two_and_two(small("embedding+pocket", *change), KEYS)
    for name in ("texture", "vertices"):
        one, other = (state["state_dict"][f"geometry.{name}"] for state in (start, whole))
        assert torch.equal(one, other) == (name == "vertices" and FREE not in change)


@pytest.mark.slow
def test_a_file_is_trained_and_may_be_gone_when_the_run_goes_on(small, tmp_path):
    """The checkpoint has the mesh, with a texture of the file's own size; another process resumes
    it to the same bits."""
    ball = MeshBallInit(1.0, 1).load()
    path = tmp_path / "ball.ply"
    colours = ((ball.vertices + 1) * 127).byte().numpy()
    trimesh.Trimesh(ball.vertices, ball.faces, vertex_colors=colours).export(path)
    file = [
        f"system.geometry.file={{path: {path}, half_side: 0.8}}",
        "system.geometry.init_type=file",
    ]
    files, overrides = small("embedding+pocket", *file, FREE, "checkpoint.every_n_train_steps=2")
    assert launch(files, [*overrides, "trainer.max_steps=4"]) == 0
    whole = trial("embedding") / "ckpts"
    path.unlink()
    again = [*overrides, "trainer.max_steps=4", "tag=again", f"resume={whole}/epoch=0-step=2.ckpt"]
    subprocess.run(
        [sys.executable, ROOT / "launch.py", "--config", *files, "--train", *again],
        check=True,
        capture_output=True,
    )
    other = whole.parents[1] / "again"
    one, two = read(whole / "last.ckpt"), read(other / "ckpts/last.ckpt")
    for key, value in one["state_dict"].items():
        assert torch.equal(value, two["state_dict"][key]), key
    assert one["state_dict"]["geometry.start"].abs().max() == pytest.approx(0.8, abs=1e-6)
    for name in ("it4-test-sheet.png", "it4-export/mesh.obj", "it4-export/mesh.png"):
        assert (whole.parent / "save" / name).read_bytes() == (other / "save" / name).read_bytes()


@pytest.mark.slow
def test_a_later_run_takes_the_mesh_of_an_earlier_one(small):
    """``system.weights``: the second stage starts from the first one's texture, of any size."""
    assert launch(*small("embedding+pocket", "trainer.max_steps=3")) == 0
    first = trial("embedding") / "ckpts/last.ckpt"
    more = f"system.weights={first}", "system.geometry.texture_size=16"
    system, _ = fit(*small("refine+pocket", *more), max_steps=0)
    assert torch.equal(system.geometry.texture, read(first)["state_dict"]["geometry.texture"])


def test_regularisers_are_of_free_vertices(small):
    system, _ = fit(*small("embedding+pocket", FREE), max_steps=1)
    opacity = torch.rand(1, 2, 2, 1)
    losses = system.regularisers({"opacity": opacity})
    assert {"mesh_laplacian", "mesh_normals"} <= set(losses)
    assert torch.equal(losses["mesh_laplacian"], system.geometry.laplacian())
    assert torch.equal(losses["mesh_normals"], system.geometry.normal_consistency())
    assert losses["mesh_normals"] > 0
    system, _ = fit(*small("embedding+pocket"), max_steps=1)
    assert not {"mesh_laplacian", "mesh_normals"} & set(system.regularisers({"opacity": opacity}))


def test_colours_stay_within_0_to_1(small):
    system, _ = fit(*small("embedding", "system.optimizer.params.geometry.texture.lr=5"))
    texture = system.geometry.texture
    assert texture.min() == 0 and texture.max() == 1


@pytest.mark.parametrize(
    "options, said",
    [
        (["system.geometry.init_type=file"], "needs system.geometry.file.path"),
        (["system.geometry.init_type=run"], "needs system.geometry.run.path"),
        (["system.geometry.init_type=none"], "no mesh to train"),
        (["system.geometry.init_type=bal"], "must be one of ball, file, run, none"),
        (["system.geometry.texture_size=8"], "texture_size must be a whole number from 16 to"),
        (["system.renderer.backend=nvdiffrast"], "no CUDA device; use backend='cpu'"),
        (["system.renderer.backend=gsplat"], "must be one of auto, cpu, reference, nvdiffrast"),
        (["system.renderer_type=lods-gaussian-rasterizer"], "cannot draw a TexturedMeshGeometry"),
        (["system.exporter.fmt=fbx"], "has 'fbx': the formats are glb, obj"),
    ],
)
def test_mistakes_are_one_line(small, options, said):
    with pytest.raises(ValueError, match=said) as caught:
        fit(*small("embedding", *options))
    assert "\n" not in str(caught.value)


def test_free_vertices_need_a_rate(small, tmp_path):
    files, overrides = small("embedding", FREE)
    config = OmegaConf.load(files[0])
    del config.system.optimizer.params["geometry.vertices"]
    OmegaConf.save(config, tmp_path / "without.yaml")
    with pytest.raises(ValueError, match=r"set system\.optimizer\.params\.geometry\.vertices\.lr"):
        fit([str(tmp_path / "without.yaml")], overrides)
