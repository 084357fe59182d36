"""Tensor helpers against closed forms, for batches of one to four (three is the tricky one)."""

import math

import pytest
import torch
import torch.nn.functional as F

from threestudio.utils import ops
from threestudio.utils.loss import tv_loss


def cameras(batch, seed=0):
    """Random rigid OpenGL poses."""
    generator = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(batch, 3, 3, generator=generator))[0]
    rotation = rotation * torch.linalg.det(rotation)[:, None, None].sign()
    c2w = torch.eye(4).repeat(batch, 1, 1)
    c2w[:, :3, :3] = rotation
    c2w[:, :3, 3] = torch.randn(batch, 3, generator=generator)
    return c2w


@pytest.mark.parametrize("batch", [1, 2, 3, 4])
def test_rays_project_back_to_their_pixels(batch):
    height, width, fovy = 5, 7, torch.linspace(0.6, 1.2, batch)
    c2w = cameras(batch)
    focal = 0.5 * height / torch.tan(fovy / 2)
    directions = torch.stack([ops.get_ray_directions(height, width, float(f)) for f in focal])
    rays_o, rays_d = ops.get_rays(directions, c2w, keepdim=True)
    assert rays_o.shape == rays_d.shape == (batch, height, width, 3)
    assert torch.allclose(rays_d.norm(dim=-1), torch.ones(batch, height, width))

    mvp = ops.get_mvp_matrix(c2w, ops.get_projection_matrix(fovy, width / height, 0.1, 100.0))
    points = rays_o + 2.5 * rays_d
    clip = torch.einsum("bij,bhwj->bhwi", mvp, F.pad(points, (0, 1), value=1.0))
    ndc = clip[..., :3] / clip[..., 3:]
    assert torch.allclose((ndc[..., 0] + 1) / 2 * width, torch.arange(width) + 0.5, atol=1e-4)
    rows = (torch.arange(height) + 0.5)[:, None]
    assert torch.allclose((ndc[..., 1] + 1) / 2 * height, rows.expand(height, width), atol=1e-4)
    assert torch.allclose(ops.get_full_projection_matrix(c2w, mvp @ c2w), mvp.mT, atol=1e-5)


def test_projection_planes():
    proj = ops.get_projection_matrix(torch.tensor([0.8]), 1.5, 0.1, 100.0)[0]
    for depth, z in ((0.1, -1.0), (100.0, 1.0)):
        clip = proj @ torch.tensor([0.0, 0.0, -depth, 1.0])
        assert float(clip[2] / clip[3]) == pytest.approx(z, abs=1e-4)


def test_get_rays_shapes_and_noise():
    c2w = cameras(3)
    directions = ops.get_ray_directions(4, 2, (3.0, 5.0), principal=(1.0, 2.0))
    each = [ops.get_rays(directions, c2w[i], normalize=False) for i in range(3)]
    rays_o, rays_d = ops.get_rays(directions[None].expand(3, -1, -1, -1), c2w, normalize=False)
    assert torch.equal(rays_d, torch.cat([d for _, d in each]))
    assert torch.equal(rays_o, torch.cat([o for o, _ in each]))
    flat = ops.get_rays(directions.reshape(-1, 3), c2w[0], normalize=False)
    assert torch.equal(flat[1], each[0][1])
    per_ray = ops.get_rays(directions.reshape(-1, 3)[:3], c2w, normalize=False)
    for i in range(3):
        expected = c2w[i, :3, :3] @ directions.reshape(-1, 3)[i]
        assert torch.allclose(per_ray[1][i], expected, atol=1e-6)
    noisy = ops.get_rays(directions, c2w[0], noise_scale=0.5, normalize=False)
    shift = noisy[0] - each[0][0]
    assert shift.abs().max() > 0 and torch.allclose(shift, shift[:1].expand_as(shift), atol=1e-6)


def test_gaussian_camera_sees_what_the_ray_camera_sees():
    c2w = cameras(1, seed=3)[0]
    fovx, fovy = 0.9, 0.7
    view, full, centre = ops.get_cam_info_gaussian(c2w, fovx, fovy, 0.1, 100.0)
    assert torch.allclose(centre, c2w[:3, 3], atol=1e-6)
    # a point up and to the right of the optical axis, 2 in front
    point = c2w @ torch.tensor([2 * math.tan(fovx / 2), 2 * math.tan(fovy / 2), -2.0, 1.0])
    camera = point @ view
    assert float(camera[2]) == pytest.approx(2.0, abs=1e-5)  # OpenCV: forward is +z
    clip = point @ full
    assert torch.allclose(clip[:2] / clip[3], torch.tensor([1.0, -1.0]), atol=1e-5)  # y goes down
    near = (c2w @ torch.tensor([0.0, 0.0, -0.1, 1.0])) @ full
    assert float(near[2]) == pytest.approx(0.0, abs=1e-5)
    proj = ops.get_projection_matrix_gaussian(0.1, 100.0, fovx, fovy)
    assert ops.get_fov_gaussian(proj) == pytest.approx((fovx, fovy))
    assert torch.equal(ops.convert_pose(ops.convert_pose(c2w)), c2w)


def test_vectors():
    x, n = torch.randn(3, 3), F.normalize(torch.randn(3, 3), dim=-1)
    assert torch.allclose(ops.dot(x, n)[:, 0], torch.einsum("bi,bi->b", x, n))
    mirrored = ops.reflect(x, n)
    assert torch.allclose(ops.dot(mirrored, n), ops.dot(x, n), atol=1e-6)
    assert torch.allclose(mirrored + x, 2 * ops.dot(x, n) * n, atol=1e-6)
    a, b = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    rest = ops.perpendicular_component(a, b)
    assert torch.allclose((rest * b).sum((1, 2, 3)), torch.zeros(2), atol=1e-4)
    assert torch.allclose(ops.perpendicular_component(rest, b), rest, atol=1e-5)


def test_scale_tensor():
    x = torch.tensor([[-1.0, 0.0], [1.0, 3.0]])
    assert torch.equal(ops.scale_tensor(x, (-1, 3), None), (x + 1) / 4)
    bbox = torch.tensor([[-2.0, -4.0], [2.0, 4.0]])
    back = ops.scale_tensor(ops.scale_tensor(x, bbox, (0, 1)), None, bbox)
    assert torch.allclose(back, x)


@pytest.mark.parametrize(
    "name, expected",
    [
        (None, lambda x: x),
        ("none", lambda x: x),
        ("exp", torch.exp),
        ("shifted_exp", lambda x: torch.exp(x - 1)),
        ("trunc_exp", torch.exp),
        ("shifted_trunc_exp", lambda x: torch.exp(x - 1)),
        ("Sigmoid", torch.sigmoid),
        ("tanh", torch.tanh),
        ("shifted_softplus", lambda x: F.softplus(x - 1)),
        ("scale_-11_01", lambda x: (x + 1) / 2),
        ("softplus", F.softplus),
        ("relu", F.relu),
    ],
)
def test_activations(name, expected):
    x = torch.linspace(-3, 3, 9)
    assert torch.allclose(ops.get_activation(name)(x), expected(x))


def test_srgb_curve():
    srgb = ops.get_activation("lin2srgb")
    x = torch.tensor([-1.0, 0.0, 0.0031308, 0.5, 1.0, 2.0])
    assert torch.allclose(srgb(x), torch.tensor([0, 0, 0.04045, 0.735357, 1, 1]), atol=1e-4)


def test_unknown_activation_is_answered():
    with pytest.raises(ValueError, match="did you mean 'sigmoid'"):
        ops.get_activation("sigmoyd")


def test_gradients_of_the_special_functions():
    x = torch.tensor([1.0, 20.0], requires_grad=True)
    ops.trunc_exp(x).sum().backward()
    assert torch.allclose(x.grad, torch.exp(torch.tensor([1.0, 15.0])))
    x = torch.randn(3, requires_grad=True)
    wanted = torch.randn(3)
    (2 * ops.SpecifyGradient.apply(x, wanted)).backward()
    assert torch.equal(x.grad, 2 * wanted)


def test_losses():
    p, t = torch.tensor([0.2, 0.9]), torch.tensor([0.0, 1.0])
    assert torch.allclose(ops.binary_cross_entropy(p, t), F.binary_cross_entropy(p, t))
    p.requires_grad_()
    ops.binary_cross_entropy(p, p).backward()  # of an opacity with itself
    expected = -(torch.log(p) - torch.log(1 - p)) / 2
    assert torch.allclose(p.grad, expected.detach(), atol=1e-6)
    q = torch.tensor([0.0, 0.5])
    expected = -math.log(0.99) - 2 * math.log(0.5)
    got = ops.ce_pq_loss(torch.tensor([0.0, 1.0]), q, torch.tensor([1.0, 2.0]))
    assert float(got) == pytest.approx(expected, rel=1e-5)
    sdf = torch.tensor([[1.0], [-2.0], [3.0]])
    got = ops.tet_sdf_diff(sdf, torch.tensor([[0, 1], [0, 2]]))  # only the first edge crosses
    expected = F.softplus(torch.tensor(1.0)) + F.softplus(torch.tensor(2.0))
    assert torch.allclose(got, expected)
    x = torch.zeros(2, 3, 4, 5)
    x[:, :, :, 1:] = 1.0  # one vertical edge of height one
    assert float(tv_loss(x)) == pytest.approx(2 * (3 * 4) / (3 * 4 * 4))


def test_decays():
    r = torch.tensor(0.3)
    assert float(ops.shifted_expotional_decay(1.0, 0.5, -0.606, r)) == pytest.approx(
        math.exp(-0.15) - 0.606
    )
    assert float(ops.shifted_cosine_decay(2.0, 1.0, 0.5, r)) == pytest.approx(2 * math.cos(0.8) + 2)


@pytest.mark.parametrize("chunk", [0, 1, 3, 7, 100])
def test_chunks_change_nothing(chunk):
    x, y = torch.randn(7, 2), torch.randn(7, 2)

    def func(a, k, b=None):
        return {"sum": a + k * b, "nested": [a, (b, None)]}

    out, whole = ops.chunk_batch(func, chunk, x, 3, b=y), func(x, 3, b=y)
    assert torch.equal(out["sum"], whole["sum"])
    assert torch.equal(out["nested"][0], x) and torch.equal(out["nested"][1][0], y)
    assert out["nested"][1][1] is None


def test_chunks_refuse_what_cannot_be_joined():
    with pytest.raises(TypeError, match="cannot be joined"):
        ops.chunk_batch(lambda a: "text", 2, torch.zeros(4))
    with pytest.raises(ValueError, match="one length"):
        ops.chunk_batch(lambda a, b: a, 2, torch.zeros(4), torch.zeros(5))


def test_an_empty_ray_gets_a_sample():
    empty = torch.zeros(0)
    indices, start, end = ops.validate_empty_rays(empty.long(), empty, empty)
    assert indices.tolist() == [0] and start.tolist() == end.tolist() == [0.0]
    one = torch.ones(1)
    assert ops.validate_empty_rays(one.long(), one, one)[1] is one
