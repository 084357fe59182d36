"""Random scenes of Gaussians, and their drawings with all gradients, for the tests."""

import inspect

import torch
from lods.gaussians import rasterization, reference

NAMES = ("means", "quats", "scales", "opacities", "colors", "viewmats", "backgrounds")


def make_scene(seed, n=60, cameras=1, width=37, height=21, channels=3, opaque=False, own=False):
    """Gaussians of all sizes and shapes in and around the view of slightly different cameras."""
    g = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.rand(*shape, generator=g, dtype=torch.float64)

    def randn(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    viewmats = torch.eye(4, dtype=torch.float64).repeat(cameras, 1, 1)
    for view in viewmats:
        q, _ = torch.linalg.qr(torch.eye(3, dtype=torch.float64) + 0.15 * randn(3, 3))
        view[:3, :3] = q * q.diagonal().sign()
        view[:3, 3] = torch.tensor([0.0, 0.0, 3.0]) + 0.2 * randn(3)
    Ks = torch.zeros(cameras, 3, 3, dtype=torch.float64)
    Ks[:, 0, 0], Ks[:, 1, 1] = (
        width * (1.1 + 0.3 * rand(cameras)),
        width * (1 + 0.3 * rand(cameras)),
    )
    Ks[:, 0, 2], Ks[:, 1, 2] = width * (0.4 + 0.2 * rand(cameras)), 0.5 * height
    Ks[:, 2, 2] = 1
    return {
        "means": 0.9 * randn(n, 3),
        "quats": randn(n, 4),
        "scales": torch.exp(0.8 * randn(n, 3) - 2.4),
        "opacities": 0.9 + 0.1 * rand(n) if opaque else rand(n) ** 2,
        "colors": rand(*((cameras,) if own else ()), n, channels),
        "viewmats": viewmats,
        "Ks": Ks,
        "width": width,
        "height": height,
        "backgrounds": rand(cameras, channels),
    }


def is_clear_cut(scene):
    """Whether no pair is so near to a threshold that rounding in single precision decides."""
    geometry = [scene[k] for k in ("means", "quats", "scales", "opacities", "viewmats", "Ks")]
    size = scene["width"], scene["height"]
    means2d, conics, depths, extents = reference.project(*geometry, *size, 0.01, 1e10, 0.3)
    y, x = torch.meshgrid(torch.arange(size[1]), torch.arange(size[0]), indexing="ij")
    pixels = torch.stack([x, y], -1).reshape(-1, 1, 2) + 0.5
    for i in range(len(means2d)):
        order = depths[i].argsort()
        order = order[extents[i, order].amin(-1) > 0]
        dx, dy = (pixels - means2d[i, order]).unbind(-1)
        a, b, c = conics[i, order].unbind(-1)
        alpha = scene["opacities"][order] * torch.exp(
            -0.5 * (a * dx**2 + 2 * b * dx * dy + c * dy**2)
        )
        left = torch.cumprod(1 - alpha.clamp(max=0.999) * (alpha >= 1 / 255), -1)
        near = [(alpha * 255 - 1).abs() < 2e-5, (alpha - 0.999).abs() < 1e-6]
        near.append((left * 1e4 - 1).abs() < 2e-4)
        if any(bool(x.any()) for x in near):
            return False
    return True


def clear_cut_scene(**kwargs):
    seeds = (seed for seed in range(1000) if is_clear_cut(make_scene(seed, **kwargs)))
    return make_scene(next(seeds), **kwargs)


def render(scene, backend, dtype, seed=0, rasterize=rasterization, **options):
    """Results and, from random cotangents of colours and alphas, all gradients."""
    scene = {k: v.to(dtype) if torch.is_tensor(v) else v for k, v in scene.items()}
    leaves = {k: scene[k].clone().requires_grad_() for k in NAMES if k in scene}
    arguments = {**scene, **leaves, "packed": False, **options}
    image, alpha, info = rasterize(**arguments, backend=backend)
    info["means2d"].retain_grad()
    g = torch.Generator().manual_seed(seed)
    loss = 0
    for x in (image, alpha):
        loss = loss + (x * torch.randn(x.shape, generator=g, dtype=torch.float64).to(dtype)).sum()
    loss.backward()
    grads = {k: v.grad for k, v in leaves.items()}
    return {"image": image, "alpha": alpha, "means2d": info["means2d"].grad, **grads}, info


def assert_near(a, b, tolerance):
    """Equal up to ``tolerance`` times the largest value (or 1)."""
    assert (a is None) == (b is None)
    if a is not None and a.numel():
        assert a.shape == b.shape
        error = (a.detach().double() - b.detach().double()).abs().max().item()
        assert error <= tolerance * max(1.0, b.detach().abs().max().item())


def complete(**given):
    """All arguments of ``rasterization`` but the backend, as backends get them."""
    parameters = inspect.signature(rasterization).parameters
    return {name: given.get(name, p.default) for name, p in parameters.items() if name != "backend"}
