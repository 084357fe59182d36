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
from types import SimpleNamespace

import torch
import torch.nn.functional as F

import threestudio
from threestudio.utils.typing import *

STRATEGIES = ("none", "default", "mcmc")


def relocation(
    opacities: Float[Tensor, "N"],
    scales: Float[Tensor, "N 3"],
    ratios: Shaped[Tensor, "N"],
    binoms: Float[Tensor, "M M"],
) -> Tuple[Float[Tensor, "N"], Float[Tensor, "N 3"]]:
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
) -> Tuple[Float[Tensor, "N 3 3"], None]:
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


def _default_strategy():
    """gsplat's DefaultStrategy, with its opacity reset, its pruning by size and its radii set
    right."""
    from gsplat.strategy import DefaultStrategy
    from gsplat.strategy.ops import remove, reset_opa

    @dataclasses.dataclass
    class ResettableStrategy(DefaultStrategy):
        """In gsplat 1.5 the opacity reset never happens (``0 & step > 0`` is a chained comparison
        with 0), and Gaussians that are too big are only pruned after its first date. Here
        ``reset_every`` = 0 means never and any other number means it, and big Gaussians are
        pruned from the step ``prune_big_after`` on. ``cap_max`` > 0 stops growing above so many
        Gaussians."""

        reset_every: int = 0
        prune_big_after: int = 0
        cap_max: int = 0

        def step_post_backward(self, params, optimizers, state, step, info, packed=False):
            if step >= self.refine_stop_iter:
                return
            if not packed:  # gsplat keeps the radius of the camera that is written last
                radii = info["radii"]
                seen = (radii > 0).all(-1, keepdim=True)
                largest = (radii * seen).amax(0, keepdim=True)
                info = {**info, "radii": largest * seen}
            self._update_state(params, state, info, packed=packed)
            since_reset = step % self.reset_every if self.reset_every > 0 else step
            if (
                step > self.refine_start_iter
                and step % self.refine_every == 0
                and since_reset >= self.pause_refine_after_reset
            ):
                cloned = split = 0
                if not self.cap_max or len(params["means"]) < self.cap_max:
                    cloned, split = self._grow_gs(params, optimizers, state, step)
                pruned = self._prune_gs(params, optimizers, state, step)
                if self.verbose:
                    threestudio.info(
                        f"step {step}: {cloned} Gaussians cloned, {split} split, {pruned} pruned, "
                        f"{len(params['means'])} now"
                    )
                for value in state.values():
                    if isinstance(value, torch.Tensor):
                        value.zero_()
            if self.reset_every > 0 and step > 0 and since_reset == 0:
                reset_opa(params, optimizers, state, value=2 * self.prune_opa)

        @torch.no_grad()
        def _prune_gs(self, params, optimizers, state, step):
            prune = torch.sigmoid(params["opacities"]) < self.prune_opa
            if step >= self.prune_big_after:
                size = params["scales"].exp().amax(-1)
                prune |= size > self.prune_scale3d * state["scene_scale"]
                if step < self.refine_scale2d_stop_iter:
                    prune |= state["radii"] > self.prune_scale2d
            n = int(prune.sum())
            if n > 0:
                remove(params, optimizers, state, prune)
            return n

    return ResettableStrategy


class Densifier:
    """A strategy, its running state, and the bookkeeping around both.

    ``name`` is 'none', 'default' (adaptive density control of 3DGS, arXiv:2308.04079) or 'mcmc'
    (arXiv:2404.09591); ``args`` are the fields of gsplat's ``DefaultStrategy`` (plus those of
    ``ResettableStrategy`` above) or ``MCMCStrategy``; ``scene_scale`` is the size in world units
    that the default strategy's 3D thresholds are multiples of.

    Use: :meth:`before_backward` after rendering, :meth:`after_step` after the optimizer's step.
    """

    def __init__(self, name: str, args: Dict[str, Any], scene_scale: float = 1.0) -> None:
        if name not in STRATEGIES:
            raise ValueError(
                f"system.strategy.name='{name}' is unknown: use one of {', '.join(STRATEGIES)}"
            )
        self.name = name
        self.strategy = None
        self.state: Dict[str, Any] = {}
        if name == "none":
            return
        if name == "mcmc":
            from gsplat.strategy import MCMCStrategy as cls
        else:
            cls = _default_strategy()
        known = [f.name for f in dataclasses.fields(cls)]
        for key in args:
            if key not in known:
                raise ValueError(
                    f"system.strategy.{name}.{key} is unknown: the fields are {', '.join(known)}"
                )
        self.strategy = cls(**args)
        self.state = self.strategy.initialize_state(
            **({"scene_scale": scene_scale} if name == "default" else {})
        )

    @property
    def absgrad(self) -> bool:
        """Whether the rasteriser has to sum absolute gradients (AbsGS, arXiv:2404.10484)."""
        return bool(getattr(self.strategy, "absgrad", False))

    def before_backward(self, info: Dict[str, Any]) -> None:
        """Ask for the gradient of the projected means, which the default strategy judges by."""
        if self.name == "default":
            info["means2d"].retain_grad()

    def after_step(
        self,
        geometry,
        optimizer: torch.optim.Optimizer,
        step: int,
        info: Dict[str, Any],
        grad_scale: float = 1.0,
    ) -> bool:
        """Run the strategy once. ``step`` counts from 0 and ``info`` is the rasteriser's.
        ``grad_scale`` is the factor that the loss had when it was differentiated (the scaler of
        16-bit training): the thresholds are meant for gradients without it.

        Returns True when the number of Gaussians has changed.
        """
        if self.strategy is None:
            return False
        old = geometry.gaussians()
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
        arguments = (params, views, self.state, step, info)
        if self.name == "default":
            grad = info["means2d"].grad
            if grad is None or not torch.isfinite(grad).all():
                return False  # a step that a 16-bit scaler skipped
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
        replaced = {id(old[name]): p for name, p in params.items() if p is not old[name]}
        if not replaced:
            return False
        for group in optimizer.param_groups:
            group["params"] = [replaced.get(id(p), p) for p in group["params"]]
        geometry.set_gaussians(params)
        before, now = len(old["means"]), len(params["means"])
        if now == 0:
            raise ValueError(
                f"system.strategy pruned all {before} Gaussians at step {step}: lower its "
                "prune_opa, raise its prune_scale3d or scene_scale, or set system.strategy.name "
                "to none"
            )
        if before != now:
            threestudio.debug(f"step {step}: {before} -> {now} Gaussians")
        return before != now

    def state_dict(self) -> Dict[str, Any]:
        """Name and running state, of tensors and numbers only."""
        return {"name": self.name, "state": dict(self.state)}

    def load_state_dict(
        self, stored: Dict[str, Any], device: Any, count: Optional[int] = None
    ) -> None:
        """Continue from :meth:`state_dict`. Another strategy than the stored one begins afresh.
        ``count``: of the Gaussians that the state is of, if it is known."""
        if not isinstance(stored, dict) or not isinstance(stored.get("state"), dict):
            raise ValueError("the checkpoint's densification state is damaged: take an earlier one")
        if stored.get("name") != self.name:
            threestudio.info(
                f"system.strategy is {self.name} now and was {stored.get('name')} in the "
                "checkpoint: it begins afresh"
            )
            return
        for key, value in stored["state"].items():
            if key in self.state and key != "scene_scale":
                each = self.name == "default"  # of whose states each has a value for every Gaussian
                shape = (count,) if each else tuple(self.state[key].shape)
                begun = each and value is None  # nothing has been summed up yet
                right = isinstance(value, Tensor) and shape in ((None,), tuple(value.shape))
                if not (begun or right):
                    raise ValueError(
                        f"the checkpoint's densification state {key} is not of the shape {shape}: "
                        "take an earlier one, or set system.strategy.name=none"
                    )
                self.state[key] = value.to(device) if isinstance(value, Tensor) else value
