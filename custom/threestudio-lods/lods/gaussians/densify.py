"""Growing and pruning Gaussians with gsplat's strategies, under one shared optimizer.

gsplat's strategies replace parameters by longer or shorter ones and edit one optimizer per
parameter. Here all parameters of a run (also those of the guidance) share one optimizer, so a
strategy gets views of it, and the optimizer's groups and the geometry's attributes are pointed at
the new parameters afterwards.

gsplat computes two steps of the MCMC strategy in CUDA only; :func:`relocation` and
:func:`covariances` are the same formulas in torch and stand in for them, so that a strategy does
the same on every device.
"""

import contextlib
import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from lods import log
from lods.gaussians.strategies import DAMAGED, Census, default_strategy, mcmc_strategy
from torch import Tensor

STRATEGIES = ("none", "default", "mcmc")


def relocation(
    opacities: Float[Tensor, " N"],
    scales: Float[Tensor, "N 3"],
    ratios: Shaped[Tensor, " N"],
    binoms: Float[Tensor, "M M"],
) -> tuple[Float[Tensor, " N"], Float[Tensor, "N 3"]]:
    """Opacity and scale of n Gaussians that together replace one (3D Gaussian splatting as Markov
    chain Monte Carlo, arXiv:2404.09591, eq. 9), with o the old opacity (0..1), s the old scale
    (linear) and n = ``ratios`` clamped to 1..M:

        o' = 1 - (1 - o)^(1/n)
        s' = s * o / sum_{i=1..n} sum_{k=0..i-1} binom(i-1, k) (-1)^k o'^(k+1) / sqrt(k+1)

    ``binoms[n, k]`` are binomial coefficients. The alternating sum needs float64.
    """
    m = binoms.shape[0]
    n = ratios.clamp(1, m).long()
    # all of it in float64: binom(50, 25) is about 1e14, and the terms nearly cancel
    o = opacities.double()
    new = 1 - (1 - o) ** (1 / n)
    k = torch.arange(m, device=o.device, dtype=torch.float64)
    # summed over i first: sum_{i=1..n} binom(i-1, k) = binom(n, k+1)
    coefficient = binoms.double().cumsum(0)[n - 1] * (-1.0) ** k / (k + 1).sqrt()
    total = (coefficient * new[:, None] ** (k + 1)).sum(1)
    return new.to(opacities), ((o / total)[:, None] * scales).to(scales)


def covariances(
    quats: Float[Tensor, "N 4"], scales: Float[Tensor, "N 3"], **kwargs
) -> tuple[Float[Tensor, "N 3 3"], None]:
    """Sigma = R S S^T R^T with R the rotation of ``quats`` (wxyz, any length) and S = diag(scales).

    The second value stands where gsplat's function returns the inverse, which is not used here.
    """
    from gsplat.utils import normalized_quat_to_rotmat

    m = normalized_quat_to_rotmat(F.normalize(quats, dim=-1)) * scales[:, None]
    return m @ m.transpose(1, 2), None


@contextlib.contextmanager
def torch_operators():
    """While it is open, gsplat's strategies use the two torch functions above."""
    from gsplat.strategy import ops

    stand_ins = {"compute_relocation": relocation, "quat_scale_to_covar_preci": covariances}
    originals = {name: getattr(ops, name) for name in stand_ins}
    try:
        for name, function in stand_ins.items():
            setattr(ops, name, function)
        yield
    finally:
        for name, function in originals.items():
            setattr(ops, name, function)


AT_LEAST_0 = (0, math.inf)
RANGES = {  # of the strategies' numbers: the least, and what they must stay below
    "prune_opa": (0, 1),
    "min_opacity": (0, 1),
    "refine_every": (1, math.inf),
}


def refuse_bad_settings(name: str, cls: type, args: dict[str, Any]) -> None:
    """Raise ValueError for settings ``args`` that the strategy ``cls`` does not have, or that are
    of another type or out of range: whole numbers and sizes are 0 or more, opacities below 1."""
    types = {f.name: f.type for f in dataclasses.fields(cls)}
    for key, value in args.items():
        where = f"system.strategy.{name}.{key}"
        if key not in types:
            raise ValueError(f"{where} is unknown: the fields are {', '.join(types)}")
        kind = types[key]
        if kind is bool:
            if type(value) is not bool:
                raise ValueError(f"{where}={value!r} must be true or false")
        elif kind in (int, float):
            low, high = RANGES.get(key, AT_LEAST_0)
            number = type(value) in (int, kind)  # a whole number is a float too, a bool is neither
            if not (number and low <= value < high):
                what = "a whole number" if kind is int else "a number"
                below = "" if high == math.inf else f" and less than {high}"
                raise ValueError(f"{where}={value!r} must be {what} of {low} or more{below}")
        elif value != "means2d":  # key_for_gradient: the rasterisers here have no other
            raise ValueError(f"{where}={value!r} must be means2d")


class Densifier:
    """A strategy, its running state, and the bookkeeping around both.

    ``name`` is 'none', 'default' (adaptive density control of 3DGS, arXiv:2308.04079) or 'mcmc'
    (arXiv:2404.09591); ``args`` are the fields of the class that :mod:`.strategies` makes of
    gsplat's ``DefaultStrategy`` or ``MCMCStrategy``; ``scene_scale`` is the size in world units
    that the default strategy's 3D thresholds are multiples of. Raises ValueError for a name or
    settings that do not exist or are out of range.

    Use: :meth:`begin` before the first step, :meth:`before_backward` after rendering,
    :meth:`after_step` after the optimizer's step.
    """

    def __init__(self, name: str, args: dict[str, Any], scene_scale: float = 1.0) -> None:
        if name not in STRATEGIES:
            raise ValueError(
                f"system.strategy.name='{name}' is unknown: use one of {', '.join(STRATEGIES)}"
            )
        self.name = name
        self.strategy: Any = None
        self.state: dict[str, Any] = {}
        if name == "none":
            return
        if not (type(scene_scale) in (int, float) and 0 < scene_scale < math.inf):
            raise ValueError(f"system.strategy.scene_scale={scene_scale!r} must be a size above 0")
        cls = default_strategy() if name == "default" else mcmc_strategy()
        refuse_bad_settings(name, cls, args)
        self.strategy = cls(**args)
        self.state = self.strategy.initialize_state(
            **({"scene_scale": scene_scale} if name == "default" else {})
        )

    @property
    def absgrad(self) -> bool:
        """Whether the rasteriser has to sum absolute gradients (AbsGS, arXiv:2404.10484)."""
        return bool(getattr(self.strategy, "absgrad", False))

    @property
    def census(self) -> Census:
        """What has been done so far."""
        return self.strategy.census if self.strategy is not None else Census(self.name)

    def begin(self, count: int, max_steps: int, resumed: bool = False) -> None:
        """Look at a run of ``max_steps`` steps (-1: without end) with ``count`` Gaussians before
        its first step.

        Raises ValueError for a ``cap_max`` below ``count``, unless the default strategy, which may
        pass its cap by what it adds at once, has reached it before. Warns of dates of refinement
        that never come.
        """
        s = self.strategy
        if s is None:
            return
        where = f"system.strategy.{self.name}"
        limited = s.cap_max > 0 or self.name == "mcmc"
        if limited and count > s.cap_max and not (resumed and self.name == "default"):
            raise ValueError(
                f"{where}.cap_max={s.cap_max} is below the {count} Gaussians that the run begins "
                "with: raise it, or begin with fewer (system.geometry)"
            )
        if not resumed:
            self.census.first = count
        first = (s.refine_start_iter // s.refine_every + 1) * s.refine_every
        last = s.refine_stop_iter if max_steps < 0 else min(s.refine_stop_iter, max_steps)
        if first >= last:
            log.warn(
                f"system.strategy.name={self.name} changes nothing in this run: it would first act "
                f"at step {first}, and its refine_stop_iter is {s.refine_stop_iter}, "
                f"trainer.max_steps {max_steps}; lower {where}.refine_start_iter or refine_every"
            )

    def reads_gradients(self, step: int) -> bool:
        """Whether :meth:`after_step` looks at the gradient of the projected means at this step:
        the default strategy, as long as it refines."""
        return self.name == "default" and step < self.strategy.refine_stop_iter

    def before_backward(self, info: dict[str, Any]) -> None:
        """Ask for the gradient of the projected means, which the default strategy judges by."""
        if self.name == "default":
            info["means2d"].retain_grad()

    def after_step(
        self,
        geometry,
        optimizer: torch.optim.Optimizer,
        step: int,
        info: dict[str, Any],
        grad_scale: float = 1.0,
    ) -> bool:
        """Run the strategy once. ``step`` counts from 0 and ``info`` is the rasteriser's.
        ``grad_scale`` is the factor that the loss had when it was differentiated (the scaler of
        16-bit training): the thresholds are meant for gradients without it.

        Returns True when the number of Gaussians has changed.
        """
        if self.strategy is None:
            return False
        old = {**geometry.gaussians(), **getattr(geometry, "followers", dict)()}
        params = dict(old)
        trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
        # One view per parameter. The groups in it are throw-away, the state is the real one.
        views = {
            name: SimpleNamespace(param_groups=[{"params": [p]}], state=optimizer.state)
            for name, p in params.items()
            if id(p) in trained
        }
        for name, p in params.items():
            p.requires_grad_(name in views)  # what YAML does not list stays as it is
        if not {"means", "scales", "quats", "opacities"} <= views.keys():
            raise ValueError(
                f"system.strategy.name={self.name} needs geometry.means, scales, quats and "
                "opacities in system.optimizer.params"
            )
        lengths = {len(v) for v in self.state.values() if isinstance(v, Tensor) and v.ndim == 1}
        if lengths - {len(old["means"])}:
            raise ValueError(DAMAGED)
        if self.census.first == 0:  # of a checkpoint that does not know it
            self.census.first = len(old["means"])
        try:
            self._act(old, params, views, optimizer, step, info, grad_scale)
        finally:  # also where it stops the run half way: the optimizer's state is already new
            replaced = {id(old[name]): p for name, p in params.items() if p is not old[name]}
            if replaced:
                for group in optimizer.param_groups:
                    group["params"] = [replaced.get(id(p), p) for p in group["params"]]
                geometry.set_gaussians(params)
        return len(old["means"]) != len(params["means"])

    def _act(self, old, params, views, optimizer, step, info, grad_scale) -> None:
        """The strategy's own step, in place on ``params`` and ``views``."""
        arguments = (params, views, self.state, step, info)
        if self.name == "default":
            if not self.reads_gradients(step):
                return
            grad = info["means2d"].grad
            if grad is None or not torch.isfinite(grad).all():
                return  # a step that a 16-bit scaler skipped
            if grad_scale != 1.0:
                for g in (grad, getattr(info["means2d"], "absgrad", grad.new_zeros(0))):
                    g.div_(grad_scale)
            self.strategy.step_post_backward(*arguments)
        else:
            lr = next(
                group["lr"]
                for group in optimizer.param_groups
                if any(p is old["means"] for p in group["params"])
            )
            with torch_operators():
                self.strategy.step_post_backward(*arguments, lr=lr)

    def state_dict(self) -> dict[str, Any]:
        """Name and running state, of tensors and numbers only."""
        state = {"name": self.name, "state": dict(self.state)}
        return {**state, "census": self.census.state_dict()}

    def load_state_dict(
        self, stored: dict[str, Any], device: Any, count: int | None = None
    ) -> None:
        """Continue from :meth:`state_dict`. Another strategy than the stored one begins afresh.
        ``count``: of the Gaussians that the state is of, if it is known."""
        if not isinstance(stored, dict) or not isinstance(stored.get("state"), dict):
            raise ValueError(DAMAGED)
        if stored.get("name") != self.name:
            log.info(
                f"system.strategy is {self.name} now and was {stored.get('name')} in the "
                "checkpoint: it begins afresh"
            )
            return
        for key in ("grad2d", "count", "radii", "seen"):  # the others are constants
            value = stored["state"].get(key)
            if key not in self.state or value is None:
                continue
            of_each = isinstance(value, Tensor) and value.ndim == 1 and value.isfinite().all()
            if not of_each or count not in (None, len(value)):
                raise ValueError(
                    f"the checkpoint's densification state is damaged ({key} is not a finite "
                    "number for each Gaussian): take an earlier one, or set "
                    "system.strategy.name=none"
                )
            self.state[key] = value.to(device)
        self.census.load_state_dict(stored.get("census"))
