"""gsplat's strategies of growing and pruning, with what is wrong in them set right.

They say what they change, and stop a run that they are about to ruin: see :class:`Census`.
"""

import dataclasses
from typing import Any

import torch
from jaxtyping import Float, Num
from lods import log
from torch import Tensor

DAMAGED = "the checkpoint's densification state is damaged: take an earlier one"
LEAST_SHARE = 0.1  # of the Gaussians that a run began with
ADVICE = {  # by the setting that takes Gaussians away
    "prune_opa": "has pruned most: lower it",
    "prune_scale2d": "has pruned most: raise it",
    "prune_scale3d": "has pruned most: raise it or system.strategy.scene_scale",
    "min_opacity": "takes the others for dead: lower it",
    "noise_lr": "has moved the others out of all views: lower it",
}


class Census:
    """How many Gaussians a run began with, and what a strategy has done to them since.

    ``name`` is the strategy's. ``total`` counts what happens to Gaussians, of the ``kinds`` that
    the strategy knows; ``causes`` counts what was pruned by the setting that wanted it, and a
    Gaussian that two settings want pruned for both.
    """

    def __init__(self, name: str, *kinds: str) -> None:
        self.name = name
        self.first = 0
        self.total = dict.fromkeys(kinds, 0)
        self.causes: dict[str, int] = {}

    def note(self, **changes: int) -> None:
        for kind, number in changes.items():
            self.total[kind] += number

    def prune(self, step: int, left: int, causes: dict[str, tuple[int, float]]) -> None:
        """Say before it happens that ``left`` Gaussians will be left; ``causes`` has for each
        setting how many it wants pruned, and its value.

        Raises ValueError, with the setting that has pruned most so far, if ``left`` is less than
        ``LEAST_SHARE`` of the number that the run began with: the object would be gone.
        """
        for name, (number, _) in causes.items():
            self.causes[name] = self.causes.get(name, 0) + number
        if left >= max(1, LEAST_SHARE * self.first):
            return
        name = max(causes, key=self.causes.__getitem__)
        raise ValueError(
            f"step {step} would leave {left} of the {self.first} Gaussians that the run began with:"
            f" system.strategy.{self.name}.{name}={causes[name][1]:g} {ADVICE[name]}, or set "
            "system.strategy.name=none"
        )

    def state_dict(self) -> dict[str, Any]:
        return {"first": self.first, "total": dict(self.total), "causes": dict(self.causes)}

    def load_state_dict(self, stored: Any) -> None:
        """Continue from :meth:`state_dict`; from None, which older checkpoints have, afresh."""
        if stored is None:
            return
        parts = stored if isinstance(stored, dict) else {}
        first, total, causes = (parts.get(name) for name in ("first", "total", "causes"))
        # a tensor has values() too, which raises an error of its own
        if not (isinstance(total, dict) and isinstance(causes, dict)):
            raise ValueError(DAMAGED)
        numbers = (first, *total.values(), *causes.values())
        good = all(type(n) is int and n >= 0 for n in numbers)
        if not (good and total.keys() == self.total.keys() and causes.keys() <= ADVICE.keys()):
            raise ValueError(DAMAGED)
        self.first = stored["first"]
        self.total, self.causes = dict(stored["total"]), dict(stored["causes"])


def projected_size(info: dict[str, Any]) -> Float[Tensor, "C N"]:
    """How much of a picture each Gaussian covers: three standard deviations of its projection
    along the longer axis, over the longer side of the picture.

    ``info`` is the rasteriser's: ``conics`` (C, N, 3) are the entries xx, xy and yy of the inverse
    covariances [1/pixel^2], and ``eps2d`` [pixel^2] is what the rasteriser has added to the
    variances. It is taken away again, so that the size is the same at every resolution: by itself
    it makes a radius of 1.6 pixels, which is 5 % of a picture of 32. (``radii``, which gsplat's
    strategy takes, have it in them, are rounded up to pixels, and shrink with the opacity.)
    """
    a, b, c = info["conics"].detach().double().unbind(-1)
    # the longer axis: the smaller eigenvalue of the inverse, inverted
    half, gap = (a + c) / 2, ((a - c) ** 2 / 4 + b * b).sqrt()
    variance = (half + gap) / (a * c - b * b).clamp(min=1e-30)
    sigma = (variance - info.get("eps2d", 0.0)).clamp(min=0).sqrt()
    return 3 * sigma.float() / max(info["width"], info["height"])


def default_strategy():
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
        Gaussians. ``grow_scale2d`` and ``prune_scale2d`` are sizes of :func:`projected_size`, and
        the halves of a Gaussian that is split are judged by their own size, not by its.

        ``census`` is told of every change.
        """

        reset_every: int = 0
        prune_big_after: int = 0
        cap_max: int = 0

        def __post_init__(self):
            self.census = Census("default", "cloned", "split", "pruned")

        def step_post_backward(self, params, optimizers, state, step, info, packed=False):
            if step >= self.refine_stop_iter:
                return
            if not packed:
                info = {**info, "radii": self._sizes(info)}
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
                self.census.note(cloned=cloned, split=split, pruned=pruned)
                if self.verbose or cloned or split or pruned:
                    log.info(
                        f"step {step}: {cloned} Gaussians cloned, {split} split, {pruned} pruned, "
                        f"{len(params['means'])} now"
                    )
                for value in state.values():
                    if isinstance(value, torch.Tensor):
                        value.zero_()
            if self.reset_every > 0 and step > 0 and since_reset == 0:
                reset_opa(params, optimizers, state, value=2 * self.prune_opa)

        @staticmethod
        def _sizes(info) -> Num[Tensor, "C N 2"]:
            """What stands in the place of ``radii``, in pixels: of each Gaussian the largest size
            on any picture that shows it (gsplat keeps that of the camera that is written last),
            and 0 where it is not shown."""
            seen = (info["radii"] > 0).all(-1, keepdim=True)
            if "conics" in info:
                side = max(info["width"], info["height"])
                # gsplat takes a 0 for what is not shown
                size = (projected_size(info) * side).clamp(min=1e-6)[..., None].expand(-1, -1, 2)
            else:
                size = info["radii"]
            return size.where(seen, 0).amax(0, keepdim=True) * seen

        @torch.no_grad()
        def _grow_gs(self, params, optimizers, state, step):
            cloned, split = super()._grow_gs(params, optimizers, state, step)
            if split and state.get("radii") is not None:
                # the halves stand last, 1.6 times smaller, and still with the radius of the whole
                state["radii"][-2 * split :] /= 1.6
            return cloned, split

        @torch.no_grad()
        def _prune_gs(self, params, optimizers, state, step):
            masks = {"prune_opa": torch.sigmoid(params["opacities"]) < self.prune_opa}
            if step >= self.prune_big_after:
                size = params["scales"].exp().amax(-1)
                masks["prune_scale3d"] = size > self.prune_scale3d * state["scene_scale"]
                if step < self.refine_scale2d_stop_iter:
                    masks["prune_scale2d"] = state["radii"] > self.prune_scale2d
            prune = torch.stack(list(masks.values())).any(0)
            n = int(prune.sum())
            if n > 0:
                causes = {name: (int(m.sum()), getattr(self, name)) for name, m in masks.items()}
                self.census.prune(step, len(prune) - n, causes)
                remove(params, optimizers, state, prune)
            return n

    return ResettableStrategy


def mcmc_strategy():
    """gsplat's MCMCStrategy, which says what it does."""
    from gsplat.strategy import MCMCStrategy
    from gsplat.strategy.ops import inject_noise_to_position

    @dataclasses.dataclass
    class CountedStrategy(MCMCStrategy):
        """``census`` is told of every change, and before a date of refinement how many Gaussians
        are dead (``min_opacity``; gsplat's relocation fails if all are) or have been in no view
        since the last one, where noise that is too strong has brought them."""

        def __post_init__(self):
            self.census = Census("mcmc", "relocated", "added")

        def initialize_state(self):
            return {**super().initialize_state(), "seen": None}

        def step_post_backward(self, params, optimizers, state, step, info, lr):
            state["binoms"] = state["binoms"].to(params["means"].device)
            if "radii" in info:
                seen = (info["radii"] > 0).all(-1).any(0)
                state["seen"] = seen if state["seen"] is None else state["seen"] | seen
            if (
                self.refine_start_iter < step < self.refine_stop_iter
                and step % self.refine_every == 0
            ):
                self._look(params, state, step)
                relocated = self._relocate_gs(params, optimizers, state["binoms"])
                added = self._add_new_gs(params, optimizers, state["binoms"])
                self.census.note(relocated=relocated, added=added)
                if self.verbose or relocated or added:
                    log.info(
                        f"step {step}: {relocated} Gaussians relocated, {added} added, "
                        f"{len(params['means'])} now"
                    )
            inject_noise_to_position(
                params=params, optimizers=optimizers, state={}, scaler=lr * self.noise_lr
            )

        @torch.no_grad()
        def _look(self, params, state, step):
            alive = params["opacities"].sigmoid() > self.min_opacity
            seen = torch.ones_like(alive) if state["seen"] is None else state["seen"]
            state["seen"] = None
            causes = {
                "min_opacity": (int((~alive).sum()), self.min_opacity),
                "noise_lr": (int((alive & ~seen).sum()), self.noise_lr),
            }
            self.census.prune(step, int((alive & seen).sum()), causes)

    return CountedStrategy
