"""What is saved is read back by other libraries."""

import io
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import imageio.v2 as imageio
import numpy as np
import pytest
import torch
import trimesh
from PIL import Image

from threestudio.utils.errors import UserError
from threestudio.utils.saving import SaverMixin


@pytest.fixture
def saver(tmp_path):
    s = SaverMixin()
    s.set_save_dir(str(tmp_path / "save"))
    return s


def read(path):
    return np.asarray(Image.open(path))


def rand(*shape, seed=0):
    return np.random.default_rng(seed).random(shape, dtype=np.float32)


# --- paths --------------------------------------------------------------------------------------


def test_paths_are_made_inside_the_save_folder(saver, tmp_path):
    path = saver.get_save_path("a/b/c.png")
    assert path == str(tmp_path / "save" / "a" / "b" / "c.png")
    assert (tmp_path / "save" / "a" / "b").is_dir()
    assert saver.get_save_path("a/../d.png").endswith("d.png")
    with pytest.raises(ValueError, match="set_save_dir"):
        SaverMixin().get_save_dir()


@pytest.mark.parametrize("name", ["../x.png", "a/../../x.png", "/tmp/x.png", "../save2/x.png"])
def test_paths_outside_are_refused(saver, tmp_path, name):
    saver.get_save_path("a/here")
    with pytest.raises(UserError, match="outside"):
        saver.save_json(name, {})
    assert not list(tmp_path.glob("x.png")) and not (tmp_path / "save2").exists()


def test_a_link_out_of_the_save_folder_is_refused(saver, tmp_path):
    saver.get_save_path("a")
    (tmp_path / "save" / "link").symlink_to(tmp_path)
    with pytest.raises(UserError, match="outside"):
        saver.get_save_path("link/x.png")


# --- images -------------------------------------------------------------------------------------


def test_rgb_values(saver):
    x = rand(5, 7, 3)
    expected = np.rint(x * 255).astype(np.uint8)
    assert np.array_equal(read(saver.save_rgb_image("hwc.png", x)), expected)
    chw = torch.from_numpy(x).permute(2, 0, 1)
    path = saver.save_rgb_image("chw.png", chw, data_format="CHW")
    assert np.array_equal(read(path), expected)
    path = saver.save_rgb_image("range.png", torch.from_numpy(x * 2 - 1), data_range=(-1, 1))
    assert np.abs(read(path).astype(int) - expected).max() <= 1
    assert np.array_equal(read(saver.save_rgb_image("u8.png", expected)), expected)
    half = torch.from_numpy(x).to(torch.bfloat16).requires_grad_()
    assert np.abs(read(saver.save_rgb_image("bf16.png", half)).astype(int) - expected).max() <= 1


def test_rgb_out_of_range_and_nan(saver):
    x = np.array([[[-1.0, 2.0, np.nan]]])
    assert read(saver.save_rgb_image("x.png", x)).tolist() == [[[0, 255, 0]]]


def test_channels_beyond_three_stand_side_by_side(saver):
    x = np.rint(rand(4, 5, 8) * 255).astype(np.uint8)
    image = read(saver.save_rgb_image("x.png", x))
    assert image.shape == (4, 15, 3)
    assert np.array_equal(image[:, :5], x[..., :3]) and np.array_equal(image[:, 5:10], x[..., 3:6])
    assert np.array_equal(image[:, 10:, :2], x[..., 6:]) and (image[:, 10:, 2] == 0).all()
    grey = read(saver.save_rgb_image("grey.png", x[..., :1]))
    assert np.array_equal(grey, np.repeat(x[..., :1], 3, -1))
    two = read(saver.save_rgb_image("two.png", x[..., :2]))
    assert np.array_equal(two[..., :2], x[..., :2]) and (two[..., 2] == 0).all()


def test_grayscale_range_and_colormaps(saver):
    x = np.linspace(-3, 5, 24, dtype=np.float32).reshape(4, 6)
    image = read(saver.save_grayscale_image("n.png", x, cmap=None))
    expected = np.rint((x + 3) / 8 * 255).astype(np.uint8)
    assert np.array_equal(image, np.repeat(expected[..., None], 3, -1))
    image = read(saver.save_grayscale_image("r.png", x[..., None], data_range=(0, 1), cmap=None))
    assert image[0, 0].tolist() == [0, 0, 0] and image[-1, -1].tolist() == [255, 255, 255]
    jet = read(saver.save_grayscale_image("jet.png", x))
    assert jet[0, 0].tolist() == [0, 0, 128] and jet[-1, -1].tolist() == [128, 0, 0]
    for cmap in ("magma", "spectral"):
        other = read(saver.save_grayscale_image(f"{cmap}.png", x, cmap=cmap))
        assert not np.array_equal(other, jet)
    constant = read(saver.save_grayscale_image("c.png", np.full((2, 2), 3.0), cmap=None))
    assert (constant == 0).all()
    with pytest.raises(UserError, match="cmap"):
        saver.save_grayscale_image("x.png", x, cmap="rainbow")


def test_uv(saver):
    u, v = np.meshgrid(np.linspace(0, 1, 65)[:-1], np.linspace(0, 1, 65)[:-1])
    uv = np.stack([u, v], -1) + 1e-3
    color = read(saver.save_uv_image("c.png", uv, cmap="color"))
    assert np.array_equal(color[..., :2], np.rint(uv * 255)) and (color[..., 2] == 0).all()
    board = read(saver.save_uv_image("b.png", uv))
    expected = np.indices((64, 64)).sum(0) % 2 == 0
    assert np.array_equal(board, np.repeat(expected[..., None] * 255, 3, -1))


def test_save_image_alpha_and_16_bit(saver):
    rgba = np.rint(rand(3, 4, 4) * 255).astype(np.uint8)
    assert np.array_equal(read(saver.save_image("a.png", rgba)), rgba)
    deep = (rand(3, 5, 3) * 65535).astype(np.uint16)
    path = saver.save_image("deep.png", deep)
    import imageio_ffmpeg

    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", path]
    command += ["-f", "rawvideo", "-pix_fmt", "rgb48le", "-"]
    raw = subprocess.run(command, capture_output=True, check=True).stdout
    assert np.array_equal(np.frombuffer(raw, "<u2").reshape(3, 5, 3), deep)
    grey = read(saver.save_image("grey.png", deep[..., 0]))
    assert np.array_equal(grey, deep[..., 0])
    with pytest.raises(UserError, match="uint8"):
        saver.save_image("f.png", rand(3, 3, 3))
    with pytest.raises(UserError, match="png"):
        saver.save_image("f.jpg", deep)


def cell(value, h, w):
    return {"type": "rgb", "img": np.full((h, w, 3), value)}


def test_grid_places_and_resizes(saver):
    rows = [[cell(0.2, 4, 6), cell(0.4, 8, 3)], [cell(0.6, 4, 4)]]
    image = read(saver.save_image_grid("g.png", rows))
    assert image.shape == (16, 12, 3)
    levels = [[51, 102], [153, 0]]  # the missing cell is black
    for i in range(2):
        for j in range(2):
            assert (image[8 * i : 8 * i + 8, 6 * j : 6 * j + 6] == levels[i][j]).all()
    assert read(saver.save_image_grid("min.png", rows, align="min")).shape == (8, 6, 3)
    assert read(saver.save_image_grid("i.png", rows, align=5)).shape == (10, 10, 3)
    assert read(saver.save_image_grid("hw.png", rows, align=(3, 7))).shape == (6, 14, 3)
    one = read(saver.save_image_grid("one.png", rows[0]))
    assert np.array_equal(one, image[:8])
    with pytest.raises(UserError, match="align"):
        saver.save_image_grid("x.png", rows, align="left")
    with pytest.raises(UserError, match="no images"):
        saver.save_image_grid("x.png", [])
    with pytest.raises(UserError, match="hdr"):
        saver.save_image_grid("x.png", [{"type": "hdr", "img": np.zeros((2, 2, 3))}])


def test_grid_cells_are_drawn_like_single_images(saver):
    x, y = rand(6, 6, 3), rand(6, 6)
    cells = [
        {"type": "rgb", "img": x, "kwargs": {"data_range": (0, 2)}},
        {"type": "grayscale", "img": y, "kwargs": {"cmap": None}},
        {"type": "uv", "img": x[..., :2]},
    ]
    image = read(saver.save_image_grid("g.png", cells))
    single = [
        saver.save_rgb_image("x.png", x, data_range=(0, 2)),
        saver.save_grayscale_image("y.png", y, cmap=None),
        saver.save_uv_image("uv.png", x[..., :2]),
    ]
    assert np.array_equal(image, np.concatenate([read(p) for p in single], axis=1))


def test_texts_are_written_at_the_left_of_their_rows(saver):
    rows = [[cell(0.5, 40, 120)], [cell(0.5, 40, 120)], [cell(0.5, 40, 120)]]
    plain = read(saver.save_image_grid("p.png", rows)).astype(int)
    texts = ["first", "", 0.25]
    image = read(saver.save_image_grid("t.png", rows, texts=texts)).astype(int)
    changed = np.abs(image - plain).sum(-1) > 0
    assert changed[:20, :60].any() and changed[80:100, :60].any()
    assert not changed[40:80].any() and not changed[:, 60:].any()
    assert image.max() > 240 and image.min() < 15  # white letters, black edges


def test_cubemap_cross(saver):
    faces = np.stack([np.full((2, 2, 3), (i + 1) / 10) for i in range(6)])
    image = read(saver.save_cubemap("c.png", faces))
    cross = np.rint(image[::2, ::2, 0] / 25.5).astype(int)
    assert cross.tolist() == [[0, 3, 0, 0], [2, 5, 1, 6], [0, 4, 0, 0]]
    rgba = read(saver.save_cubemap("a.png", np.concatenate([faces, faces[..., :1]], -1), rgba=True))
    assert rgba.shape == (6, 8, 4) and rgba[0, 0, 3] == 0 and rgba[2, 4, 3] == round(25.5)


# --- sequences ----------------------------------------------------------------------------------


def write_frames(saver, count, h, w):
    for i in range(count):
        saver.save_rgb_image(f"frames/{i}.png", np.full((h, w, 3), i / (count - 1)))
    saver.save_json("frames/notes.json", {})
    saver.save_rgb_image("frames/depth-3.png", np.zeros((h, w, 3)))


@pytest.mark.parametrize("size", [(32, 48), (33, 47)])
def test_mp4_frames_order_and_format(saver, size):
    write_frames(saver, 12, *size)
    path = saver.save_img_sequence("turn", "frames", r"^(\d+)\.png", save_format="mp4", fps=24)
    assert path.endswith("turn.mp4")
    with imageio.get_reader(path) as video:
        meta = video.get_meta_data()
        frames = [f.mean() for f in video]
        shape = video.get_data(0).shape
    assert len(frames) == 12  # and not in the order 0, 1, 10, 11, 2 of the names
    assert np.abs(np.array(frames) - np.arange(12) / 11 * 255).max() < 4
    assert meta["codec"] == "h264" and meta["pix_fmt"].startswith("yuv420p") and meta["fps"] == 24
    assert shape == (size[0] + size[0] % 2, size[1] + size[1] % 2, 3)


def test_gif(saver):
    write_frames(saver, 5, 7, 9)
    path = saver.save_img_sequence("turn.gif", "frames", r"^(\d+)\.png", save_format="gif", fps=20)
    with Image.open(path) as gif:
        assert gif.n_frames == 5 and gif.size == (9, 7) and gif.info["duration"] == 50
        assert gif.info["loop"] == 0
        gif.seek(4)
        assert np.asarray(gif.convert("RGB")).min() == 255


def test_sequence_errors(saver):
    write_frames(saver, 2, 4, 4)
    with pytest.raises(UserError, match="no frames"):
        saver.save_img_sequence("x", "frames", r"^(\d+)\.jpg")
    with pytest.raises(UserError, match="no frames"):
        saver.save_img_sequence("x", "nowhere", r"^(\d+)\.png")
    with pytest.raises(UserError, match="save_format"):
        saver.save_img_sequence("x", "frames", r"^(\d+)\.png", save_format="avi")


# --- data and geometry --------------------------------------------------------------------------


def test_data(saver, tmp_path):
    x = torch.randn(3, 4)
    assert np.array_equal(np.load(saver.save_data("x", x)), x.numpy())
    path = saver.save_data("d.npz", {"a": x, "b": np.arange(3)})
    loaded = np.load(path)
    assert np.array_equal(loaded["a"], x.numpy()) and loaded["b"].tolist() == [0, 1, 2]
    assert torch.equal(torch.load(saver.save_state_dict("s.pt", {"x": x}))["x"], x)
    assert json.loads(Path(saver.save_json("j.json", {"a": [1, 2]})).read_text()) == {"a": [1, 2]}
    (tmp_path / "source").write_text("hello")
    assert Path(saver.save_file("copy.txt", str(tmp_path / "source"))).read_text() == "hello"


def test_convert_data(saver):
    out = saver.convert_data({"a": [torch.ones(2), None], "b": np.zeros(1)})
    assert isinstance(out["a"][0], np.ndarray) and out["a"][1] is None
    with pytest.raises(TypeError, match="str"):
        saver.convert_data("text")


@pytest.fixture
def mesh():
    box = trimesh.creation.box()
    v, f = np.array(box.vertices, np.float32), np.array(box.faces)
    uv = rand(10, 2)
    return SimpleNamespace(
        v_pos=torch.from_numpy(v),
        t_pos_idx=torch.from_numpy(f),
        v_nrm=torch.from_numpy(v / np.linalg.norm(v, axis=1, keepdims=True)),
        v_tex=torch.from_numpy(uv),
        t_tex_idx=torch.from_numpy(np.random.default_rng(0).integers(0, 10, f.shape)),
        v_rgb=torch.from_numpy(rand(8, 3, seed=1)),
    )


def load_obj(path):
    return trimesh.load(path, process=False, maintain_order=True)


def test_mesh(saver, mesh):
    for suffix in ("ply", "obj", "glb"):
        path = saver.save_mesh(f"m.{suffix}", mesh.v_pos, mesh.t_pos_idx)
        loaded = trimesh.load(path, process=False, force="mesh")
        assert np.allclose(loaded.triangles, mesh.v_pos.numpy()[mesh.t_pos_idx.numpy()])


def test_obj_plain_and_with_colours(saver, mesh):
    (path,) = saver.save_obj("m", mesh)
    loaded = load_obj(path)
    assert path.endswith("m.obj") and np.array_equal(loaded.faces, mesh.t_pos_idx)
    assert np.allclose(loaded.vertices, mesh.v_pos)
    (path,) = saver.save_obj("c.obj", mesh, save_vertex_color=True)
    colors = load_obj(path).visual.vertex_colors[:, :3]
    assert np.abs(colors.astype(float) - mesh.v_rgb.numpy() * 255).max() <= 1


def test_obj_normals(saver, mesh):
    (path,) = saver.save_obj("n.obj", mesh, save_normal=True)
    loaded = load_obj(path)
    assert np.allclose(loaded.vertex_normals, mesh.v_nrm, atol=1e-6)
    assert np.array_equal(loaded.faces, mesh.t_pos_idx)


@pytest.mark.parametrize("save_normal", [False, True])
def test_obj_with_texture(saver, mesh, save_normal):
    kd = rand(8, 8, 3)
    paths = saver.save_obj(
        "export/model.obj",
        mesh,
        save_mat=True,
        save_uv=True,
        save_normal=save_normal,
        map_Kd=kd,
        map_Pr=rand(8, 8, 1),
        map_format="png",
    )
    names = sorted(p.rsplit("/", 1)[1] for p in paths)
    assert names == ["model.mtl", "model.obj", "texture_kd.png", "texture_roughness.png"]
    loaded = trimesh.load(paths[0], process=False)  # splits vertices at seams
    corners = mesh.v_tex.numpy()[mesh.t_tex_idx.numpy()] * [1, -1] + [0, 1]
    assert np.allclose(loaded.visual.uv[loaded.faces], corners, atol=1e-6)
    assert np.allclose(loaded.triangles, mesh.v_pos.numpy()[mesh.t_pos_idx.numpy()])
    image = np.asarray(loaded.visual.material.image.convert("RGB"))
    assert np.array_equal(image, np.rint(kd * 255))
    mtl = next(p for p in paths if p.endswith(".mtl"))
    assert "map_Pr texture_roughness.png" in Path(mtl).read_text()


# --- loggers ------------------------------------------------------------------------------------


def test_wandb_is_off_unless_enabled_and_says_when_it_is_missing(saver, monkeypatch):
    saver.create_loggers({})
    saver.create_loggers({"wandb": {"enable": False, "project": "p"}})
    assert saver.get_loggers() == []
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if not installed
    with pytest.raises(UserError, match="pip install wandb"):
        saver.create_loggers({"wandb": {"enable": True, "project": "p"}})


def test_named_images_go_to_the_logger(saver, monkeypatch):
    logged = []
    experiment = SimpleNamespace(log=logged.append)
    saver._wandb_logger = SimpleNamespace(experiment=experiment)
    fake = SimpleNamespace(Image=lambda p: ("image", p), Video=lambda p: ("video", p))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    path = saver.save_rgb_image("a.png", rand(3, 3, 3), name="train/rgb", step=7)
    saver.save_rgb_image("b.png", rand(3, 3, 3))
    assert logged == [{"train/rgb": ("image", path), "trainer/global_step": 7}]


def test_jpeg_is_close(saver):
    x = np.tile(np.linspace(0, 1, 64, dtype=np.float32)[:, None, None], (1, 64, 3))
    path = saver.save_rgb_image("x.jpg", x)
    with open(path, "rb") as file:
        image = Image.open(io.BytesIO(file.read()))
    assert image.format == "JPEG"
    assert np.abs(np.asarray(image).astype(int) - np.rint(x * 255)).max() <= 3
