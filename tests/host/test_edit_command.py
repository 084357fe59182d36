"""``lods edit`` of an object: the training that it starts, and mistakes in one line."""

import numpy as np
import pytest
import torch
import trimesh
from lods import cli, host
from lods.commands import edit_object
from lods.gaussians import Gaussians
from lods.gaussians.cameras import orbit
from lods.gaussians.edited import in_mask
from lods.preflight import EDITING, preflight
from PIL import Image

from threestudio.utils.config import load_config

RED, BLUE = ("a red armchair", "a blue armchair")


@pytest.fixture
def ply(tmp_path, monkeypatch):
    """A file of 20 Gaussians in an empty folder, which is the current one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    Gaussians.ball(20).write_ply(tmp_path / "object.ply")
    return tmp_path / "object.ply"


@pytest.fixture
def config(monkeypatch):
    """``config(what, *flags)``: what the training that is started would have for its config."""
    started = []
    monkeypatch.setattr(edit_object, "start", lambda words: started.append(words) or 0)

    def read(what, *flags):
        words = ["edit", str(what), "--from", RED, "--to", BLUE, "--model", "pocket"]
        assert cli.main([*words, *map(str, flags)]) == 0
        words = started[-1]
        end = words.index("--train")
        files = [str(host.home() / "configs" / f"{name}.yaml") for name in words[1:end]]
        return load_config(*files, cli_args=words[end + 1 :])

    return read


@pytest.mark.parametrize("method", ["dds", "pds", "ssd", "drf", "edit", "lods-edit"])
def test_the_training_has_what_was_asked_for(ply, config, method):
    cfg = config(ply, "--method", method, "--steps", 7, "--scale", 3, "--seed", 5, "data.width=64")
    preflight(cfg, "train")
    system = cfg.system
    assert system.guidance_type == f"lods-{method.removeprefix('lods-')}-guidance"
    assert system.guidance_type in EDITING
    assert (system.prompt_processor.source_prompt, system.prompt_processor.prompt) == (RED, BLUE)
    assert (cfg.trainer.max_steps, system.guidance.guidance_scale, cfg.seed) == (7, 3, 5)
    assert system.geometry.file.path == str(ply) and cfg.data.width == 64
    assert system.guidance.cameras == "tokens" and system.geometry_type == "lods-edited-gaussians"
    assert system.geometry.box is None and system.strategy.name == "none"


def test_a_box_and_a_mask_are_settings_of_the_geometry(ply, config, tmp_path):
    Image.new("L", (16, 16), 255).save(tmp_path / "mask.png")
    words = ["--where", "the armchair", "--level", 0.3]
    cfg = config(ply, "--box", "-1,-1,-1,1,1,1", "--mask", "mask.png", "--azimuth", -30, *words)
    geometry = cfg.system.geometry
    assert (cfg.system.where, cfg.system.where_level) == ("the armchair", 0.3)
    assert list(geometry.box) == [-1, -1, -1, 1, 1, 1]
    assert geometry.mask == str(tmp_path / "mask.png")
    assert (geometry.mask_azimuth, geometry.view_distance, geometry.view_fovy) == (-30, 3.6, 40)


def test_harmonics_of_a_file_are_kept_and_trained(tmp_path, ply, config):
    ball = Gaussians.ball(20)
    tensors = {**ball.export(), "shN": torch.zeros(20, 15, 3)}
    Gaussians(tensors).write_ply(tmp_path / "high.ply")
    cfg = config(tmp_path / "high.ply")
    assert cfg.system.geometry.sh_degree == 3
    assert cfg.system.optimizer.params["geometry.shN"].lr > 0
    assert "geometry.shN" not in config(ply).system.optimizer.params


def test_a_run_is_edited_from_what_it_has_exported(ply, config, tmp_path):
    run = tmp_path / "outputs" / "lods-gs" / "a_chair"
    for step, place in ((5, run), (40, run)):
        folder = place / "save" / f"it{step}-export"
        folder.mkdir(parents=True)
        (folder / "gaussians.ply").write_bytes(ply.read_bytes())
    (run / "configs").mkdir()
    (run / "configs" / "parsed.yaml").write_text("{}\n")
    found = config("a_chair").system.geometry.file.path
    assert found.endswith("it40-export/gaussians.ply")


@pytest.mark.parametrize("name", ["box.glb", "box.ply"])
def test_a_mesh_is_edited_in_its_texture(ply, config, tmp_path, name):
    trimesh.creation.box((1.0, 2, 1)).export(tmp_path / name)
    cfg = config(name, "--box", "-1,-1,0,1,1,1", "--method", "ssd", "--where", "an armchair")
    preflight(cfg, "train")
    system = cfg.system
    assert cfg.system_type == "lods-mesh-system" and system.geometry_type == "lods-edited-mesh"
    assert system.geometry.file.path == str(tmp_path / name) and system.geometry.most_texels == 0
    assert list(system.geometry.box) == [-1, -1, 0, 1, 1, 1] and system.where == "an armchair"
    assert (system.exporter.fmt, system.exporter.axes) == ("glb", "file")
    assert system.guidance_type == "lods-ssd-guidance" and cfg.trainer.max_steps == 200


@pytest.mark.parametrize("name", ["mesh.glb", "model.glb"])
def test_a_run_without_gaussians_is_edited_in_its_mesh(ply, config, tmp_path, name):
    run = tmp_path / "outputs" / "lods-mesh" / "a_chair"
    (run / "save" / "it5-export").mkdir(parents=True)
    trimesh.creation.box((1.0, 2, 1)).export(run / "save" / "it5-export" / name)
    (run / "configs").mkdir()
    (run / "configs" / "parsed.yaml").write_text("{}\n")
    assert config("a_chair").system.geometry.file.path.endswith(f"it5-export/{name}")


@pytest.mark.parametrize(
    ("what", "flags", "said"),
    [
        ("none.ply", [], "there is no file none.ply"),
        ("points.ply", [], "points.ply is no ply file of 3D Gaussians"),
        ("text.txt", [], "neither a picture, nor a ply file of Gaussians, nor a mesh, nor a run"),
        ("none.glb", [], "there is no file none.glb"),
        ("bad.glb", [], "bad.glb: "),
        ("empty.obj", [], "no triangles"),
        ("nothing", [], "there is no run 'nothing'"),
        ("object.ply", ["--box", "1,2,3"], "--box '1,2,3' is not written X0,Y0,Z0,X1,Y1,Z1"),
        ("object.ply", ["--box", "1,0,0,0,1,1"], "six numbers with X0 < X1"),
        ("object.ply", ["--box", "nan,0,0,1,1,1"], "six numbers with X0 < X1"),
        ("object.ply", ["--mask", "none.png"], "there is no picture --mask none.png"),
        ("object.ply", ["--azimuth", "3"], "--azimuth is the side of --mask here"),
        ("object.ply", ["--where", " "], "--where is empty: give words that the model knows"),
        (
            "object.ply",
            ["--where", "the quux"],
            "--where: this model can see no word of 'the quux'",
        ),
        ("object.ply", ["--level", "0.5"], "--level is of --where, which is not there"),
        ("object.ply", ["--region", "0,0,1,1"], "--region is of a picture, and object.ply is none"),
        ("object.ply", ["--method", "sds"], "--method sds edits nothing"),
        ("object.ply", ["--to", "a car " * 2000], "--to has 12000 characters: 5000 are the most"),
        ("object.ply", ["--to", "a ${car}"], "--to holds '${', which configs take for a reference"),
        ("object.ply", ["--to", RED], "--from and --to are the same"),
        ("object.ply", ["--to", "a hamburgr"], "names no object that this model knows"),
        ("object.ply", ["--model", "no-such-card"], "no-such-card"),
    ],
)
def test_a_mistake_is_one_line(ply, tmp_path, monkeypatch, capsys, what, flags, said):
    monkeypatch.setattr(edit_object, "start", lambda words: pytest.fail("started"))
    (tmp_path / "text.txt").write_text("text")
    (tmp_path / "bad.glb").write_bytes(b"glTF")
    (tmp_path / "empty.obj").write_text("v 0 0 0\n")
    (tmp_path / "points.ply").write_text("ply\nformat ascii 1.0\nelement vertex 0\nend_header\n")
    given = {flags[0]} if flags else set()
    texts = [w for k, v in (("--from", RED), ("--to", BLUE)) if k not in given for w in (k, v)]
    model = [] if "--model" in given else ["--model", "pocket"]
    assert cli.main(["edit", what, *texts, *model, *flags]) == 2
    text = capsys.readouterr().err
    assert said in text and len(text.splitlines()) == 1


def test_making_from_nothing_with_a_method_that_edits_is_refused(capsys):
    assert cli.main(["make", "a cat", "--method", "dds", "--model", "pocket"]) == 2
    assert "lods-dds changes what is there: lods edit FILE --from TEXT" in capsys.readouterr().err


def test_a_mask_holds_what_lies_before_its_light_pixels():
    """From the front, +x towards the camera, +y to its right, +z upward."""
    mask = np.zeros((40, 40), bool)
    mask[:20, 20:] = True  # upper right
    means = torch.tensor(
        [[0, 0.4, 0.4], [0.5, 0.4, 0.4], [0, -0.4, 0.4], [0, 0.4, -0.4], [9, 0.1, 0.1], [0, 9, 0]]
    )
    inside = in_mask(means.float(), torch.from_numpy(mask), orbit(1, 3.6, 0.0, 0.0), 40.0)
    assert inside.tolist() == [True, True, False, False, False, False]
