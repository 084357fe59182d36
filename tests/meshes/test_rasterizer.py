"""The compiled rasteriser of triangles against its dense reference, and both against geometry."""

import numpy as np
import pytest
import torch
from lods.gaussians.backends import uncompiled
from lods.meshes import backends
from lods.meshes.rasterize import rasterization
from scipy.spatial import ConvexHull, Delaunay

from tests.meshes.scenes import FLAT, cameras, flat, pixels_as_units, sphere

EXACT = {"backend": "reference"}


def draw(backend, vertices, faces, size=(40, 36), count=2, distance=3.0, **options):
    """(face, outputs, gradients) with random textures, backgrounds and cotangents."""
    dtype = torch.float64 if backend == "reference" else torch.float32
    random = torch.Generator().manual_seed(1)

    def some(*shape):
        return torch.rand(shape, generator=random, dtype=torch.float64).to(dtype).requires_grad_()

    vertices = vertices.to(dtype).requires_grad_()
    uv, texture = (2 * some(len(vertices), 2)).detach().requires_grad_(), some(9, 7, 3)
    backgrounds = some(count, 3)
    views, Ks = cameras(count, *size, distance)
    views = views.to(dtype).requires_grad_()
    image, alpha, info = rasterization(
        vertices,
        faces,
        views,
        Ks.to(dtype),
        *size,
        texture=texture,
        uv=uv,
        backgrounds=backgrounds,
        backend=backend,
        **options,
    )
    outputs = {"image": image, "alpha": alpha} | {k: info[k] for k in ("weights", "depth")}
    total = sum(
        (value * torch.randn(value.shape, generator=random, dtype=torch.float64).to(dtype)).sum()
        for value in outputs.values()
    )
    leaves = {"vertices": vertices, "uv": uv, "texture": texture, "views": views}
    leaves["backgrounds"] = backgrounds
    gradients = dict(zip(leaves, torch.autograd.grad(total, list(leaves.values()))))
    return info["face"].long(), outputs, gradients


SCENES = {
    "a ball with dents": (sphere(2, 0.1), {}),
    "from inside of it": (sphere(2, 0.1), {"distance": 0.9}),
    "cut by both planes": (
        sphere(2, 0.1),
        {"distance": 0.9, "near_plane": 0.5, "far_plane": 1.5},
    ),
    "triangles smaller than pixels": (sphere(4, 0.004), {"size": (20, 22), "count": 1}),
    "not smoothed": (sphere(2, 0.1), {"antialias": False}),
}


@pytest.mark.parametrize("scene", SCENES)
def test_compiled_and_reference_agree_forwards_and_backwards(scene):
    (vertices, faces), options = SCENES[scene]
    face, outputs, gradients = draw("reference", vertices, faces, **options)
    own_face, own_outputs, own_gradients = draw("cpu", vertices, faces, **options)
    assert torch.equal(face, own_face) and (face >= 0).any()
    for name, value in outputs.items():
        assert torch.allclose(own_outputs[name].double(), value, atol=3e-5), name
    for name, value in gradients.items():
        error = (own_gradients[name].double() - value).norm()
        assert error <= 1e-4 * value.norm(), name


def test_tiles_of_the_reference_are_the_reference(monkeypatch):
    """They stand in for kernels that would have to be compiled first."""
    module = backends.get("cpu")
    monkeypatch.setattr(module, "is_compiled", lambda: False)
    with uncompiled():
        tiles = backends.get("cpu")
    assert tiles.__name__.endswith("tiles") and backends.get("cpu") is module
    monkeypatch.setattr(tiles, "MOST", 999)
    for options in ({}, {"distance": 0.9}):
        (vertices, faces) = sphere(2, 0.1)
        with uncompiled():
            drawn = draw("cpu", vertices, faces, **options)
        for one, other in zip(drawn, draw("cpu", vertices, faces, **options)):
            if isinstance(one, torch.Tensor):
                assert torch.equal(one, other)
            else:
                assert all((one[k] - other[k]).norm() <= 1e-4 * one[k].norm() for k in one)


def test_gradients_of_the_reference_are_differences():
    """Of the sum of the smoothed colours, while no pixel changes its triangle."""
    (vertices, faces), (views, Ks) = sphere(0), cameras(1, 12, 10)
    random = torch.Generator().manual_seed(3)
    colours = torch.rand(len(vertices), 2, generator=random).double()
    weight = torch.rand(10, 12, 3, generator=random).double()

    def total(points):
        image, alpha, _ = rasterization(
            points, faces, views.double(), Ks.double(), 12, 10, colours=colours, **EXACT
        )
        return (torch.cat([image, alpha], -1)[0] * weight).sum()

    vertices = vertices + 0.05 * torch.randn(vertices.shape, generator=random)
    assert torch.autograd.gradcheck(total, (vertices.requires_grad_(),), eps=1e-7, atol=1e-4)


# -- what is known in closed form ------------------------------------------------------------------


def coverage(places, faces, size, backend="cpu", z=1.0):
    """The alphas (H, W) of triangles in an image, whose corners ``places`` are in pixels."""
    width, height = size
    points = flat(places, z) if not isinstance(places, torch.Tensor) else places
    _, alpha, _ = rasterization(
        points,
        torch.as_tensor(faces),
        FLAT.to(points),
        pixels_as_units(*size).to(points),
        width,
        height,
        colours=torch.ones(len(points), 1).to(points),
        backend=backend,
    )
    return alpha[0, ..., 0]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_half_plane_covers_a_pixel_by_its_share(backend):
    """An upright edge at x covers the pixel k by x - k, within 0 and 1; and a level one alike."""
    for edge in (9.0, 9.2, 9.5, 9.75, 10.0):
        square = [(-50, -50), (edge, -50), (edge, 50), (-50, 50)]
        alpha = coverage(square, [[0, 1, 2], [0, 2, 3]], (20, 6), backend)
        expected = (edge - torch.arange(20.0)).clamp(0, 1).expand(6, 20)
        assert torch.allclose(alpha.float(), expected, atol=1e-6)
        turned = coverage([(y, x) for x, y in square], [[0, 1, 2], [0, 2, 3]], (6, 20), backend)
        assert torch.allclose(turned.float(), expected.T, atol=1e-6)


def test_a_row_beside_a_steep_edge_sums_to_where_the_edge_is():
    top, bottom = 4.3, 13.1  # x of the edge at y = 0 and y = 16
    corners = [(-50, 0), (top, 0), (bottom, 16), (-50, 16)]
    alpha = coverage(corners, [[0, 1, 2], [0, 2, 3]], (20, 16))
    middle = (torch.arange(16.0) + 0.5) / 16
    assert torch.allclose(alpha.sum(1), top + (bottom - top) * middle, atol=1e-4)


TRIANGLES = [
    [(5.3, 4.1), (40.2, 11.7), (17.6, 44.9)],
    [(3.2, 40.6), (44.9, 38.3), (30.4, 3.7)],
    [(8.5, 8.5), (39.5, 8.5), (8.5, 39.5)],
]


@pytest.mark.parametrize("corners", TRIANGLES)
def test_coverage_sums_to_the_area_and_its_gradient_is_that_of_the_area(corners):
    """A = 1/2 (q - p) x (r - p), dA/dp = 1/2 (q_y - r_y, r_x - q_x) and so on around."""
    points = flat(corners).float().requires_grad_()
    alpha = coverage(points, [[0, 1, 2]], (48, 48))
    p, q, r = (torch.tensor(c) for c in corners)
    area = 0.5 * ((q - p)[0] * (r - p)[1] - (q - p)[1] * (r - p)[0])
    assert abs(alpha.sum().item() - area.abs().item()) < 1.0  # of 500 to 800
    (gradient,) = torch.autograd.grad(alpha.sum(), points)
    expected = torch.stack([b - a for a, b in ((r, q), (p, r), (q, p))]) / 2
    expected = torch.stack([expected[:, 1], -expected[:, 0]], dim=1) * area.sign()
    # at depth 1 a step in space is one in pixels; along the ray it moves nothing but the size
    assert (gradient[:, :2] - expected).norm() < 0.05 * expected.norm()


def test_a_fine_mesh_covers_its_outline():
    """Of 5,120 triangles a few hundred are seen, each smaller than a pixel: the walk finds the
    silhouette behind those that a pixel shows."""
    vertices, faces = sphere(4)
    size = 24
    views, Ks = cameras(1, size, size)
    points = vertices.float().requires_grad_()
    _, alpha, _ = rasterization(
        points, faces, views, Ks, size, size, colours=torch.ones(len(points), 1)
    )
    seen = vertices @ views[0, :3, :3].double().T + views[0, :3, 3]
    places = (seen[:, :2] / seen[:, 2:] * Ks[0, 0, 0] + size / 2).numpy()
    outline = ConvexHull(places)
    assert abs(alpha.sum().item() - outline.volume) < 0.01 * outline.volume  # its area, in 2D
    # if it grows by a share s, so does the area of the outline, by about 2 s cos^-2 of its cone
    (gradient,) = torch.autograd.grad(alpha.sum(), points)
    step = 1e-3
    larger = seen + step * (vertices @ views[0, :3, :3].double().T)
    grown = ConvexHull((larger[:, :2] / larger[:, 2:] * Ks[0, 0, 0] + size / 2).numpy())
    slope = (grown.volume - outline.volume) / step
    assert abs((gradient * vertices).sum().item() - slope) < 0.03 * slope


def test_positions_are_interpolated_in_perspective():
    """With the vertices' own places as colours each pixel shows the point that its ray meets."""
    vertices, faces = sphere(1, 0.1)
    (views, Ks), size = cameras(2, 30, 26), (30, 26)
    vertices = vertices.float()
    image, _, info = rasterization(
        vertices, faces, views, Ks, *size, colours=vertices, antialias=False
    )
    camera, y, x = (info["face"] >= 0).nonzero().unbind(1)
    points = image[camera, y, x]
    seen = (views[camera, :3, :3] @ points[..., None])[..., 0] + views[camera, :3, 3]
    places = seen[:, :2] / seen[:, 2:] * Ks[camera, 0, :1] + Ks[camera, :2, 2]
    assert torch.allclose(places, torch.stack([x, y], 1) + 0.5, atol=1e-4)
    assert torch.allclose(seen[:, 2], info["depth"][camera, y, x, 0], atol=1e-5)


def test_a_texture_that_fits_the_pixels_is_the_picture():
    """Row 0 at the top, v upward, the first texel's centre at that of the first pixel."""
    random = torch.Generator().manual_seed(0)
    texture = torch.rand(5, 8, 3, generator=random)
    corners, uv = [(0, 0), (8, 0), (8, 5), (0, 5)], [(0, 1), (1, 1), (1, 0), (0, 0)]
    image, alpha, _ = rasterization(
        flat(corners).float(),
        torch.tensor([[0, 1, 2], [0, 2, 3]]),
        FLAT,
        pixels_as_units(8, 5),
        8,
        5,
        texture=texture,
        uv=torch.tensor(uv, dtype=torch.float32),
    )
    assert torch.allclose(image[0], texture, atol=1e-5) and (alpha == 1).all()


def test_a_texture_repeats_beyond_its_borders():
    texture = torch.arange(4.0).view(1, 4, 1)
    uv = torch.tensor([(0.0, 0.5), (3.0, 0.5), (3.0, 0.5), (0.0, 0.5)])
    corners = [(0, 0), (12, 0), (12, 1), (0, 1)]
    image, _, _ = rasterization(
        flat(corners).float(),
        torch.tensor([[0, 1, 2], [0, 2, 3]]),
        FLAT,
        pixels_as_units(12, 1),
        12,
        1,
        texture=texture,
        uv=uv,
    )
    assert torch.allclose(image[0, 0, :, 0], torch.arange(12.0) % 4, atol=1e-4)


def test_no_pixel_falls_between_triangles():
    """Of a crowd of triangles that fill the image, whose edges pass near and through pixels'
    centres."""
    random = np.random.default_rng(0)
    inner = random.uniform(0, 24, (60, 2)).round(1)
    grid = np.stack(np.meshgrid(np.arange(1, 24, 2), np.arange(1, 24, 2)), -1).reshape(-1, 2) + 0.5
    corners = np.array([(-9, -9), (33, -9), (33, 33), (-9, 33)])
    for places in (np.concatenate([corners, inner]), np.concatenate([corners, grid])):
        faces = Delaunay(places).simplices.tolist()
        depth = random.uniform(1, 3, len(places))[:, None]
        points = torch.from_numpy(np.concatenate([places, np.ones_like(depth)], 1) * depth)
        alpha = coverage(points.float(), faces, (24, 24))
        assert (alpha == 1).all()


def test_the_nearer_triangle_hides_the_other_whatever_their_order():
    square = [(-9, -9), (29, -9), (29, 29), (-9, 29)]
    points = torch.cat([flat(square, 2.0), flat(square, 1.5)]).float()
    faces = [[0, 1, 2], [0, 2, 3], [4, 5, 6], [4, 6, 7]]
    for order in ([0, 1, 2, 3], [2, 3, 0, 1]):
        _, _, info = rasterization(
            points,
            torch.tensor(faces)[order],
            FLAT,
            pixels_as_units(20, 20),
            20,
            20,
            colours=torch.ones(8, 1),
        )
        assert torch.allclose(info["depth"], torch.tensor(1.5))


def test_nothing_is_drawn_of_what_is_behind_or_flat_or_not_finite():
    triangle = flat(TRIANGLES[0])
    for points in (-triangle, triangle * float("nan"), triangle * 1e300 * 1e300):
        assert coverage(points.float(), [[0, 1, 2]], (48, 48)).sum() == 0
    assert coverage(triangle.float(), [[0, 1, 1]], (48, 48)).sum() == 0
    assert coverage(triangle.float(), np.zeros((0, 3), np.int64), (8, 8)).sum() == 0


def test_both_sides_are_drawn():
    assert torch.equal(
        coverage(TRIANGLES[0], [[0, 1, 2]], (48, 48)), coverage(TRIANGLES[0], [[0, 2, 1]], (48, 48))
    )


def test_results_do_not_depend_on_the_number_of_threads():
    threads, found = torch.get_num_threads(), []
    vertices, faces = sphere(3, 0.02)
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            found.append(draw("cpu", vertices, faces, size=(64, 60), count=1))
    finally:
        torch.set_num_threads(threads)
    (_, images, gradients), (_, others, other_gradients) = found
    assert all(torch.equal(images[k], others[k]) for k in images)
    assert all(torch.equal(gradients[k], other_gradients[k]) for k in gradients if k != "views")


# -- what is refused -------------------------------------------------------------------------------


def test_clip_space_for_nvdiffrast_is_the_same_camera():
    """x / w from -1 to 1 are the columns of the picture, y / w its rows from the top, z / w from -1
    at the near plane to 1 at the far one. (What follows from there needs a CUDA device.)"""
    Ks = torch.tensor([[[30.0, 0, 11], [0, 40, 9], [0, 0, 1]]])
    points = torch.tensor([[[0.3, -0.2, 0.5], [0.1, 0.4, 2.0], [-1.0, 1.0, 8.0]]])
    clip = backends.get("nvdiffrast")._clip(points, Ks, 20, 16, 0.5, 8.0)
    places = (clip[..., :2] / clip[..., 3:] + 1) / 2 * torch.tensor([20.0, 16])
    seen = points @ Ks.mT
    assert torch.allclose(places, seen[..., :2] / seen[..., 2:], atol=1e-5)
    z = clip[0, :, 2] / clip[0, :, 3]
    assert torch.allclose(z[[0, 2]], torch.tensor([-1.0, 1.0]), atol=1e-5) and -1 < z[1] < 1


def test_nvdiffrast_says_how_it_can_be_had():
    with pytest.raises(ValueError, match="no CUDA device; use backend='cpu'"):
        backends.resolve_backend("nvdiffrast", torch.device("cpu"))
    module = backends.get("nvdiffrast")
    assert "pip install" in module.GET and "github.com/NVlabs/nvdiffrast" in module.GET
    with pytest.raises(ValueError, match=r"must be one of auto, cpu, reference, nvdiffrast.*'cpu'"):
        backends.resolve_backend("cpus", torch.device("cpu"))
    assert backends.resolve_backend("auto", torch.device("cpu")) == "cpu"


@pytest.mark.parametrize(
    "change, said",
    [
        ({"faces": [[0, 1, 9]]}, "faces has indices that are not in 0..2"),
        ({"texture": torch.ones(2, 2, 3)}, "a texture needs uv"),
        ({"colours": None}, "give a texture with uv, or colours"),
        ({"colours": torch.ones(2, 3)}, r"colours has the shape \(2, 3\), expected \(3, 3\)"),
        ({"near_plane": 2.0, "far_plane": 1.0}, "near_plane < far_plane"),
    ],
)
def test_wrong_input_is_one_line(change, said):
    options = {"colours": torch.ones(3, 3), **change}
    faces = torch.tensor(options.pop("faces", [[0, 1, 2]]))
    with pytest.raises(ValueError, match=said) as caught:
        rasterization(
            flat(TRIANGLES[0]).float(), faces, FLAT, pixels_as_units(8, 8), 8, 8, **options
        )
    assert "\n" not in str(caught.value)
