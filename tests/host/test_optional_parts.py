"""Adan against its update rule in NumPy; what needs a package that may be absent."""

import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from threestudio.systems.optimizers import Adan
from threestudio.systems.utils import parse_optimizer
from threestudio.utils.errors import UserError
from threestudio.utils.ops import get_mvp_matrix, get_projection_matrix
from threestudio.utils.rasterize import NVDiffRasterizerContext

# --- Adan -----------------------------------------------------------------------------------------


def adan(x, gradients, lr, betas, eps, decay, prox):
    """The rule for one array, in float64, from the gradients of all steps; yields x."""
    b1, b2, b3 = betas
    m = v = n = np.zeros_like(x)
    before = gradients[0]
    for k, g in enumerate(gradients, start=1):
        d = g - before
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * d
        n = b3 * n + (1 - b3) * (g + b2 * d) ** 2
        step = m / (1 - b1**k) + b2 * v / (1 - b2**k)
        rate = lr / (np.sqrt(n / (1 - b3**k)) + eps)
        if prox:
            x = (x - rate * step) / (1 + lr * decay)
        else:
            x = x * (1 - lr * decay) - rate * step
        before = g
        yield x


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("prox", [True, False])
@pytest.mark.parametrize("max_norm", [0.0, 0.7, 50.0])
def test_adan_follows_its_rule(foreach, prox, max_norm):
    rng = np.random.default_rng(0)
    shapes, betas, eps = [(3, 2), (5,)], (0.9, 0.8, 0.95), 1e-3
    starts = [rng.normal(size=s) for s in shapes]
    gradients = [[rng.normal(size=s) for s in shapes] for _ in range(6)]
    options = {"betas": betas, "eps": eps, "max_grad_norm": max_norm}
    params = [torch.nn.Parameter(torch.tensor(x)) for x in starts]
    groups = [{"params": [params[0]], "lr": 0.1}, {"params": [params[1]], "lr": 0.02}]
    optimizer = Adan(groups, weight_decay=0.3, no_prox=not prox, foreach=foreach, **options)
    for p in params:
        p.grad = torch.empty_like(p)  # kept, as with zero_grad(set_to_none=False)

    used = []
    for step in gradients:
        norm = np.sqrt(sum((g**2).sum() for g in step))
        scale = min(max_norm / (norm + eps), 1) if max_norm else 1
        used.append([g * scale for g in step])
    rules = [
        adan(x, [step[i] for step in used], lr, betas, eps, 0.3, prox)
        for i, (x, lr) in enumerate(zip(starts, (0.1, 0.02)))
    ]
    for k, expected in enumerate(zip(*rules)):
        for p, g in zip(params, gradients[k]):
            p.grad.copy_(torch.tensor(g))
        optimizer.step()
        for p, x in zip(params, expected):
            np.testing.assert_allclose(p.detach().numpy(), x, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("foreach, sizes", [(True, [2]), (False, [1, 1])])
def test_adan_takes_parameters_together_or_one_by_one(monkeypatch, foreach, sizes):
    params, seen = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)], []
    monkeypatch.setattr(Adan, "_update", lambda self, some, *rest: seen.append(len(some)))
    for p in params:
        p.grad = torch.ones(2)
    Adan(params, foreach=foreach).step()
    assert seen == sizes


def test_adan_continues_from_its_state():
    def steps(net, optimizer, n, seed):
        torch.manual_seed(seed)
        for _ in range(n):
            optimizer.zero_grad()
            net(torch.randn(4, 3)).square().mean().backward()
            optimizer.step()

    torch.manual_seed(0)
    nets = [torch.nn.Linear(3, 2) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    first, second = (Adan(net.parameters(), lr=0.05) for net in nets)
    for net, optimizer in zip(nets, (first, second)):
        steps(net, optimizer, 3, seed=1)
    resumed = Adan(nets[1].parameters(), lr=0.05)
    resumed.load_state_dict(second.state_dict())
    steps(nets[0], first, 3, seed=2)
    steps(nets[1], resumed, 3, seed=2)
    assert torch.equal(nets[0].weight, nets[1].weight)


def test_adan_by_name_minimises():
    net = torch.nn.Linear(2, 1)
    config = {"name": "Adan", "args": {"eps": 1.0e-8, "weight_decay": 2.0e-5, "foreach": False}}
    config["params"] = {"weight": {"lr": 0.05}, "bias": {"lr": 0.05}}
    optimizer = parse_optimizer(OmegaConf.create(config), net)
    assert type(optimizer) is Adan and optimizer.param_groups[0]["name"] == "weight"

    def closure():
        optimizer.zero_grad()
        loss = (net(torch.eye(2)) - 3).square().mean()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(200)]
    assert losses[-1] < 0.01 * losses[0]
    for bad in ({"betas": (0.9, 0.99)}, {"betas": (0.9, 1.0, 0.9)}, {"lr": -1.0}, {"eps": -1.0}):
        with pytest.raises(UserError):
            Adan(net.parameters(), **bad)


def test_fused_adam_is_that_of_apex(monkeypatch):
    net = torch.nn.Linear(2, 1)
    monkeypatch.setitem(sys.modules, "apex", None)
    with pytest.raises(UserError, match="needs NVIDIA apex") as caught:
        parse_optimizer({"name": "FusedAdam"}, net)
    assert "\n" not in str(caught.value)
    fake = ModuleType("apex.optimizers")
    fake.FusedAdam = torch.optim.Adam
    monkeypatch.setitem(sys.modules, "apex", ModuleType("apex"))
    monkeypatch.setitem(sys.modules, "apex.optimizers", fake)
    optimizer = parse_optimizer({"name": "FusedAdam", "args": {"lr": 0.5}}, net)
    assert type(optimizer) is torch.optim.Adam and optimizer.param_groups[0]["lr"] == 0.5


# --- nvdiffrast -----------------------------------------------------------------------------------


def test_a_rasteriser_context_needs_nvdiffrast(monkeypatch):
    monkeypatch.setitem(sys.modules, "nvdiffrast", None)
    monkeypatch.setitem(sys.modules, "nvdiffrast.torch", None)
    for kind, expected in [("cuda", "needs nvdiffrast"), ("gl", "pip install"), ("vk", "gl, cuda")]:
        with pytest.raises(UserError, match=expected) as caught:
            NVDiffRasterizerContext(kind, torch.device("cpu"))
        assert "\n" not in str(caught.value)


class Plane:
    """Stands for nvdiffrast where it cannot run, and checks what it is given as nvdiffrast does.
    Every pixel shows triangle 0 at barycentric coordinates (1/2, 1/4)."""

    def __init__(self):
        self.made = []

    def RasterizeGLContext(self, device=None):
        self.made.append(("gl", device))
        return "context"

    def RasterizeCudaContext(self, device=None):
        self.made.append(("cuda", device))
        return "context"

    def rasterize(self, glctx, pos, tri, resolution, ranges=None, grad_db=True):
        assert glctx == "context" and pos.dtype == torch.float32 and tri.dtype == torch.int32
        assert pos.ndim == 3 and pos.is_contiguous() and tri.is_contiguous() and grad_db
        rast = torch.tensor([0.5, 0.25, 0.0, 1.0]).expand(len(pos), *resolution, 4)
        return rast, torch.zeros_like(rast)

    def interpolate(self, attr, rast, tri, rast_db=None, diff_attrs=None):
        assert attr.ndim == 3 and attr.dtype == torch.float32 and tri.dtype == torch.int32
        u, v = rast[..., :1], rast[..., 1:2]
        a, b, c = (attr[:, tri[0, i].long()][:, None, None] for i in range(3))
        return u * a + v * b + (1 - u - v) * c, (rast_db, diff_attrs)

    def antialias(self, color, rast, pos, tri):
        assert color.dtype == pos.dtype == torch.float32 and tri.dtype == torch.int32
        return color + 1


@pytest.fixture
def plane(monkeypatch):
    plane = Plane()
    monkeypatch.setitem(sys.modules, "nvdiffrast", SimpleNamespace(torch=plane))
    monkeypatch.setitem(sys.modules, "nvdiffrast.torch", plane)
    return plane


def test_rasteriser_methods(plane):
    context = NVDiffRasterizerContext("gl", torch.device("cpu"))
    NVDiffRasterizerContext("cuda", torch.device("cpu"))
    assert plane.made == [("gl", torch.device("cpu")), ("cuda", torch.device("cpu"))]

    c2w = torch.eye(4).repeat(2, 1, 1)
    c2w[:, 2, 3] = torch.tensor([2.0, 3.0])
    mvp = get_mvp_matrix(c2w, get_projection_matrix(torch.tensor([0.8, 0.9]), 1.0, 0.1, 10.0))
    corners = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0.5]], dtype=torch.float64)
    pos = context.vertex_transform(corners.float(), mvp)
    for b in range(2):
        for i in range(3):
            column = torch.cat([corners[i].float(), torch.ones(1)])
            torch.testing.assert_close(pos[b, i], mvp[b] @ column)

    tri = torch.tensor([[0, 1, 2]])
    rast, rast_db = context.rasterize(pos.double(), tri, 4)
    assert rast.shape == rast_db.shape == (2, 4, 4, 4)
    assert context.rasterize(pos, tri, (3, 5))[0].shape == (2, 3, 5, 4)
    one, one_db = context.rasterize_one(pos[0], tri, (3, 5))
    assert one.shape == one_db.shape == (3, 5, 4)
    centre = 0.5 * corners[0] + 0.25 * corners[1] + 0.25 * corners[2]
    got, derivatives = context.interpolate_one(corners, rast, tri, rast_db, diff_attrs="all")
    torch.testing.assert_close(got, centre.float().expand(2, 4, 4, 3))
    assert derivatives[0] is rast_db and derivatives[1] == "all"
    per_image = torch.stack([corners, 2 * corners])
    got, derivatives = context.interpolate(per_image, rast, tri)
    torch.testing.assert_close(got[1], 2 * centre.float().expand(4, 4, 3))
    assert derivatives == (None, None)
    color = torch.zeros(2, 4, 4, 3, dtype=torch.float64)
    assert (context.antialias(color, rast, pos.double(), tri) == 1).all()
