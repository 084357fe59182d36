"""Where Gaussians start, and how they are written and read."""

import math

import numpy as np
import pytest
import torch
from lods.gaussians import initialize as init
from lods.gaussians import ply
from lods.gaussians.axes import AXES
from lods.threestudio.geometry import Gaussians
from plyfile import PlyData, PlyElement

from tests.gaussians.clouds import random_gaussians

# -- initial values --------------------------------------------------------------------------------


def test_scale_is_the_rms_distance_to_three_neighbours():
    # the corners of a box with sides 1, 2, 3: the nearest of each corner are at 1, 2 and sqrt 5
    # (across the 1-2 face), since 3 and everything else is farther
    corners = np.array(np.meshgrid([0, 1], [0, 2], [0, 3])).reshape(3, -1).T.astype(float)
    expected = math.sqrt((1 + 4 + 5) / 3)
    assert np.allclose(init.neighbour_scale(corners), expected)
    params = init.from_points(init.Points(corners, np.full((8, 3), 0.25)), 0.1, 2.0, 0)
    assert torch.allclose(params["scales"].exp(), torch.tensor(2 * expected))
    assert torch.allclose(params["opacities"].sigmoid(), torch.tensor(0.1))
    assert torch.allclose(params["sh0"] * 0.5 / math.sqrt(math.pi) + 0.5, torch.tensor(0.25))
    assert torch.equal(params["quats"], torch.tensor([1.0, 0, 0, 0]).expand(8, 4))
    assert "shN" not in params
    # coinciding points have a size too
    assert np.allclose(init.neighbour_scale(np.zeros((5, 3))), math.sqrt(1e-7))
    with pytest.raises(ValueError, match="3 points are too few"):
        init.neighbour_scale(np.zeros((3, 3)))


def test_ball_is_uniform_and_reproducible():
    def make(seed):
        cfg = {"init_type": "ball", "init_seed": seed, "ball": {"n_points": 4000, "radius": 0.6}}
        return Gaussians(cfg)

    state = torch.get_rng_state()
    one, again, other = make(0), make(0), make(1)
    assert torch.equal(state, torch.get_rng_state())  # its own randomness
    assert torch.equal(one.means, again.means) and not torch.equal(one.means, other.means)
    r = one.means.norm(dim=1) / 0.6
    assert r.max() <= 1
    # uniform in the ball: E r^3 = 1/2, and no direction is preferred
    assert abs((r**3).mean().item() - 0.5) < 4 * math.sqrt(1 / 12 / 4000)
    assert one.means.mean(0).abs().max() < 0.03
    assert one.base_colors().min() >= 0 and abs(one.base_colors().mean() - 0.5) < 0.02


def test_axes_rotation():
    axes = AXES
    for front, up in (("+x", "+z"), ("-y", "+z"), ("+z", "+y"), ("-x", "-y")):
        R = init.axes_rotation(front, up)
        assert np.allclose(R @ axes[front], [1, 0, 0])
        assert np.allclose(R @ axes[up], [0, 0, 1])
        assert np.isclose(np.linalg.det(R), 1)  # a mirrored object would have -1
    for bad in (("+x", "-x"), ("front", "+z")):
        with pytest.raises(ValueError):
            init.axes_rotation(*bad)


def test_growing_points():
    rng = np.random.default_rng(0)
    points = init.Points(rng.uniform(-1, 1, (50, 3)), rng.uniform(0.5, 1, (50, 3)))
    grown = init.grow_points(points, 20000, 0.1, 0.2, rng)
    new = len(grown.xyz) - 50
    assert np.array_equal(grown.xyz[new:], points.xyz)  # the originals come last
    distance = np.linalg.norm(grown.xyz[:new, None] - points.xyz[None], axis=-1)
    assert new > 100 and distance.min(1).max() < 0.1
    excess = grown.rgb[:new] - points.rgb[distance.argmin(1)]
    assert excess.min() >= -1e-12 and excess.max() < 0.2 and excess.max() > 0.15
    assert grown.rgb.max() == 1.0  # clipped, not beyond
    # as many as the volume near the points: here estimated with an independent sample
    box = np.prod(points.xyz.max(0) - points.xyz.min(0))
    sample = rng.uniform(points.xyz.min(0), points.xyz.max(0), (20000, 3))
    near = np.linalg.norm(sample[:, None] - points.xyz[None], axis=-1).min(1) < 0.1
    assert box > 0 and abs(near.sum() - new) < 6 * math.sqrt(new)


def test_shap_e_points(monkeypatch):
    """The pipeline's mesh becomes points: every 4th vertex, its front (-y) turned to +x."""
    vertices = np.random.default_rng(0).normal(size=(400, 3))
    colors = np.random.default_rng(1).random((400, 3))
    monkeypatch.setattr(
        init.ShapEInit, "sample", lambda self, seed, device: init.Points(vertices, colors)
    )
    source = init.ShapEInit(prompt="a cat", growth_points=0, scale=1.6)
    points = source.points(np.random.default_rng(0), torch.device("cpu"))
    x, y, z = vertices[::4].T
    assert np.allclose(points.xyz, 1.6 * np.stack([-y, x, z], axis=1))
    assert np.array_equal(points.rgb, colors[::4])
    for prompt in ("", "lib:hamburger"):
        with pytest.raises(ValueError, match=r"shap_e\.prompt"):
            init.ShapEInit(prompt=prompt).points(np.random.default_rng(0), torch.device("cpu"))


@pytest.mark.parametrize("name", ["a folder", "nobody/shap-e"])
def test_shap_e_without_weights_is_one_line(tmp_path, monkeypatch, name):
    if name != "a folder":  # diffusers would try again and again
        refuse = staticmethod(lambda *args, **kwargs: pytest.fail("asked"))
        monkeypatch.setattr("diffusers.ShapEPipeline.load_config", refuse)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://hub.invalid")
    name = str(tmp_path / "none") if name == "a folder" else name
    shap_e = {"prompt": "x", "pretrained_model_name_or_path": name}
    with pytest.raises(ValueError, match="init_type=ball") as error:
        Gaussians({"init_type": "shap-e", "shap_e": shap_e})
    assert "\n" not in str(error.value)
    assert ("no network: " in str(error.value)) == (name == "nobody/shap-e")


@pytest.mark.parametrize(
    "cfg, message",
    [
        ({"init_type": "sphere"}, "init_type must be one of ball, file, shap-e, none, not"),
        ({"ball": {"n_point": 3}}, "n_point"),
        ({"ball": {"n_points": 3}}, "ball.n_points must be a whole number from 4 "),
        ({"init_type": "file"}, "path"),
        ({"init_type": "file", "file": {"path": "/no/such.ply"}}, "no file"),
        ({"sh_degree": 4}, "from 0 to 3"),
        ({"init_opacity": 1.0}, "above 0 and below 1, not 1"),
    ],
)
def test_wrong_settings(cfg, message):
    with pytest.raises((ValueError, TypeError), match=message) as error:
        Gaussians(cfg)
    assert "\n" not in str(error.value)


# -- files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [0, 3, 8, 15])
def test_ply_has_the_standard_layout(tmp_path, k):
    gaussians = random_gaussians(k=k)
    assert ply.write_ply(tmp_path / "a.ply", **gaussians) == 17
    vertex = PlyData.read(str(tmp_path / "a.ply"))["vertex"]
    rest = [f"f_rest_{i}" for i in range(3 * k)]
    names = ["x", "y", "z", "nx", "ny", "nz", "f_dc_0", "f_dc_1", "f_dc_2", *rest, "opacity"]
    names += ["scale_0", "scale_1", "scale_2", "rot_0", "rot_1", "rot_2", "rot_3"]
    assert [p.name for p in vertex.properties] == names
    assert all(p.val_dtype == "f4" for p in vertex.properties)

    def column(name):
        return torch.from_numpy(np.array(vertex[name]))

    for i in range(3):
        assert torch.equal(column("xyz"[i]), gaussians["means"][:, i])
        assert torch.equal(column(f"f_dc_{i}"), gaussians["sh0"][:, 0, i])
        assert torch.equal(column(f"scale_{i}"), gaussians["scales"][:, i])
        for j in range(k):  # channel after channel
            assert torch.equal(column(f"f_rest_{i * k + j}"), gaussians["shN"][:, j, i])
    assert torch.equal(column("opacity"), gaussians["opacities"])
    assert torch.equal(column("rot_2"), gaussians["quats"][:, 2])
    back = ply.read_ply(tmp_path / "a.ply")
    assert back.keys() == gaussians.keys()
    assert all(torch.equal(back[name], gaussians[name]) for name in gaussians)
    assert [p.name for p in tmp_path.iterdir()] == ["a.ply"]  # no half-written file remains


def test_gsplat_writes_the_same_values(tmp_path):
    """An exporter that we did not write."""
    from gsplat import export_splats

    gaussians = random_gaussians(k=3)
    export_splats(**gaussians, format="ply", save_to=str(tmp_path / "theirs.ply"))
    back = ply.read_ply(tmp_path / "theirs.ply")  # it has no normals
    assert all(torch.equal(back[name], gaussians[name]) for name in gaussians)


def test_export_leaves_out_what_is_not_finite(tmp_path, caplog):
    gaussians = random_gaussians(k=0)
    gaussians["scales"][3, 1] = math.nan
    gaussians["opacities"][5] = math.inf
    with caplog.at_level("WARNING", logger="pytorch_lightning"):
        assert ply.write_ply(tmp_path / "a.ply", **gaussians) == 15
    assert "2 of 17 Gaussians" in caplog.text
    keep = [i for i in range(17) if i not in (3, 5)]
    assert torch.equal(ply.read_ply(tmp_path / "a.ply")["means"], gaussians["means"][keep])


def write_ply(path, columns, n):
    data = np.zeros(n, dtype=[(name, "f4") for name in columns])
    for name, value in columns.items():
        data[name] = value
    PlyData([PlyElement.describe(data, "vertex")]).write(str(path))


def test_bad_ply_files(tmp_path):
    path = tmp_path / "bad.ply"
    path.write_bytes(b"not a ply")
    cases = [("not a readable ply", None)]
    whole = {name: 1.0 for name in ply.gaussian_properties(0)}
    cases.append(("lacks the properties rot_3", {k: v for k, v in whole.items() if k != "rot_3"}))
    cases.append(("4 of 4 points are not finite", {**whole, "scale_1": np.nan}))
    zero = {f"rot_{i}": [0, 0, 1, 1] for i in range(4)}
    cases.append(("none of 4 Gaussians", {**whole, **zero, "scale_1": [0, 0, np.nan, 99]}))
    cases.append(("not those of harmonics", {**whole, "f_rest_0": 0.0}))
    fourth = {f"f_rest_{i}": 0.0 for i in range(72)}
    cases.append(("degree 0 to 3", {**whole, **fourth}))
    cases.append(("quaternions of length 0", {**whole, **{f"rot_{i}": 0.0 for i in range(4)}}))
    cases.append(("lacks the properties z", {"x": 0.0, "y": 0.0}))
    for message, columns in cases:
        if columns is not None:
            write_ply(path, columns, 4)
        with pytest.raises(ValueError, match=message) as error:
            ply.read_ply(path)
        assert "\n" not in str(error.value)
    write_ply(path, whole, 0)
    with pytest.raises(ValueError, match="holds no points"):
        ply.read_ply(path)
    # cut short
    ply.write_ply(path, **random_gaussians())
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match="not a readable ply"):
        ply.read_ply(path)


def test_coloured_points_round_trip(tmp_path):
    rng = np.random.default_rng(0)
    xyz = torch.from_numpy(rng.normal(size=(30, 3))).float()
    rgb = torch.from_numpy(rng.integers(0, 256, (30, 3)) / 255).float()
    ply.write_points(tmp_path / "p.ply", xyz, rgb)
    back = ply.read_ply(tmp_path / "p.ply")
    assert np.array_equal(back["xyz"], xyz.double().numpy())
    assert np.allclose(back["rgb"], rgb, atol=1e-7)
    geometry = Gaussians(
        {"init_type": "file", "file": {"path": str(tmp_path / "p.ply"), "radius": 0.5}}
    )
    middle = (geometry.means.amin(0) + geometry.means.amax(0)) / 2
    assert middle.abs().max() < 0.2  # centred before scaling, by the box
    assert torch.isclose(geometry.means.norm(dim=1).max(), torch.tensor(0.5))
    assert torch.allclose(geometry.base_colors(), rgb, atol=1e-6)


def test_start_from_gaussians_in_a_file(tmp_path):
    gaussians = random_gaussians(k=3)
    path = str(tmp_path / "g.ply")
    ply.write_ply(path, **gaussians)
    geometry = Gaussians({"init_type": "file", "sh_degree": 1, "file": {"path": path}})
    assert all(torch.equal(v, gaussians[k]) for k, v in geometry.export().items())
    with pytest.raises(ValueError, match="sh_degree=1"):
        Gaussians({"init_type": "file", "sh_degree": 0, "file": {"path": path}})
    with pytest.raises(ValueError, match="taken as they are"):
        Gaussians({"init_type": "file", "sh_degree": 1, "file": {"path": path, "radius": 1.0}})
    # a file without view dependence starts a geometry that has it
    ply.write_ply(path, **random_gaussians(k=0))
    geometry = Gaussians({"init_type": "file", "sh_degree": 2, "file": {"path": path}})
    assert geometry.shN.shape == (17, 8, 3) and not geometry.shN.any()


@pytest.mark.parametrize("suffix", ["obj", "ply", "glb"])
def test_start_from_a_mesh(tmp_path, suffix):
    """A box that is 4 long along y, coloured red where y > 0: the front -y must come to +x."""
    import trimesh

    mesh = trimesh.creation.box((1, 4, 2)).subdivide().subdivide()
    red, blue = [255, 0, 0, 255], [0, 0, 255, 255]
    mesh.visual.vertex_colors = [red if y > 0 else blue for y in mesh.vertices[:, 1]]
    path = str(tmp_path / f"box.{suffix}")
    mesh.export(path)
    file = {"path": path, "n_points": 2000, "front": "-y", "up": "+z"}
    geometry = Gaussians({"init_type": "file", "file": file})
    assert geometry.count == 2000
    size = geometry.means.amax(0) - geometry.means.amin(0)
    assert torch.allclose(size, torch.tensor([4.0, 1.0, 2.0]), atol=0.02)
    # on the surface
    half = torch.tensor([2.0, 0.5, 1.0])
    assert (geometry.means.abs() - half).amax(1).abs().max() < 1e-4
    colors = geometry.base_colors()
    front, back = geometry.means[:, 0] > 0.05, geometry.means[:, 0] < -1.05
    assert torch.allclose(colors[front], torch.tensor([0.0, 0.0, 1.0]), atol=0.01)
    assert torch.allclose(colors[back], torch.tensor([1.0, 0.0, 0.0]), atol=0.01)
    # uniform in area: the two ends have 2 of the 28 area units each
    ends = (geometry.means[:, 0].abs() > 2 - 1e-4).float().mean()
    assert abs(ends.item() - 4 / 28) < 0.03


@pytest.mark.parametrize("uv", [False, True])
@pytest.mark.parametrize("suffix", ["glb", "obj"])
def test_a_mesh_of_one_material_has_its_colour(tmp_path, suffix, uv):
    """Without a picture; as exporters write plain materials, with and without UVs."""
    import trimesh

    mesh = trimesh.creation.box()
    if suffix == "glb":
        material = trimesh.visual.material.PBRMaterial(baseColorFactor=[0, 255, 0, 255])
    else:
        material = trimesh.visual.material.SimpleMaterial(diffuse=[0, 255, 0, 255])
    coordinates = np.zeros((len(mesh.vertices), 2)) if uv else None
    mesh.visual = trimesh.visual.TextureVisuals(uv=coordinates, material=material)
    path = tmp_path / f"box.{suffix}"
    mesh.export(path)
    geometry = Gaussians({"init_type": "file", "file": {"path": str(path), "n_points": 50}})
    colors = geometry.base_colors()
    torch.testing.assert_close(
        colors, torch.tensor([0.0, 1.0, 0.0]).expand(50, 3), atol=0.01, rtol=0
    )
