"""Gaussians that are edited: some are locked, and all know what they were."""

from typing import Any

import torch
import torch.nn as nn
from jaxtyping import Bool, Float
from lods.gaussians.cameras import intrinsics, world_to_camera
from lods.gaussians.harmonics import SH_C0
from lods.gaussians.parameters import GaussianParameters
from torch import Tensor

FOLLOWS = "anchor_"  # before the names of the anchors, for a densification strategy
# of a rasteriser's ``info``, what has a row for each Gaussian: (C, N, ...)
PER_GAUSSIAN = ("means2d", "radii", "conics", "depths")


class Frozen(GaussianParameters):
    """Gaussians that nothing trains."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        for name, value in tensors.items():
            setattr(self, name, nn.Parameter(value.detach().clone(), requires_grad=False))


class EditedParameters(GaussianParameters):
    """The parameters of the module itself are those of the Gaussians that are free. Beside them:

    - ``source``, all that there were in the beginning (N of them, the free ones first, in the order
      in which all are drawn), and ``inside`` (N,), which of these are free. The others are
      *locked*: they are drawn and exported as they were, and are no parameters, so that neither an
      optimizer nor a strategy can touch them;
    - ``anchor``, what each free Gaussian was in the beginning; one that a strategy has made has the
      anchor of the one that it was made of.

    :meth:`begin` comes once, when the parameters are there.
    """

    inside: Tensor
    source: Frozen
    anchor: Frozen
    box: tuple[float, ...] | None = None  # which the free ones stay in

    def begin(self, inside: Bool[Tensor, " N"], box: tuple[float, ...] | None = None) -> None:
        """Lock all that is not ``inside``; with a ``box`` (x0, y0, z0, x1, y1, z1), in world units,
        what is free stays in it."""
        # one order for both: what has not changed is then drawn alike to the last bit
        order = torch.cat([inside.nonzero()[:, 0], (~inside).nonzero()[:, 0]])
        whole = {name: value.detach()[order] for name, value in self.gaussians().items()}
        self.box, inside = box, inside[order]
        self.register_buffer("inside", inside)
        self.source = Frozen(whole)
        free = {name: value[inside] for name, value in whole.items()}
        self.anchor = Frozen(free)
        for name, value in free.items():
            setattr(self, name, nn.Parameter(value.clone()))

    def restrict(self, inside: Bool[Tensor, " N"]) -> None:
        """Before the first step: of what is free, in the order of ``source``, only this stays."""
        inside = inside & self.inside
        for name, value in self.source.gaussians().items():
            setattr(self, name, nn.Parameter(value.detach().clone()))
        self.begin(inside, self.box)

    # -- what is drawn ---------------------------------------------------------------------------

    def whole(self) -> GaussianParameters:
        """The free ones and, after them, the locked ones."""
        locked = ~self.inside
        if not locked.any():
            return self
        found = GaussianParameters()
        for name, value in self.gaussians().items():
            rest = getattr(self.source, name)[locked]
            found.__dict__[name] = torch.cat([value, rest])
        return found

    def own_info(self, info: dict[str, Any]) -> dict[str, Any]:
        """What a rasteriser says of :meth:`whole`, of the free ones only, with the gradients that
        a densification strategy reads."""
        if len(self.inside) == 0 or self.inside.all():
            return info
        return {k: _first(v, self.count) if k in PER_GAUSSIAN else v for k, v in info.items()}

    # -- training --------------------------------------------------------------------------------

    @torch.no_grad()
    def clamp_to_box(self) -> None:
        """Centres that have left the box go back to its side, in place."""
        if self.box is not None:
            low, high = self.means.new_tensor(self.box).view(2, 3)
            self.means.copy_(self.means.clamp(low, high))

    def anchor_losses(self) -> dict[str, Float[Tensor, ""]]:
        """Mean squares of what has changed, over the free Gaussians: ``color`` (of rgb; higher
        harmonics count as they are), ``position`` (world units), ``opacity`` (0..1) and ``scale``
        (log of the standard deviations), each summed over a Gaussian's numbers."""
        was = self.anchor
        color = ((self.sh0 - was.sh0) * SH_C0).square().sum((1, 2))
        if self.sh_degree:
            color = color + (self.shN - was.shN).square().sum((1, 2))
        return {
            "color": color.mean(),
            "position": (self.means - was.means).square().sum(1).mean(),
            "opacity": (self.opacities.sigmoid() - was.opacities.sigmoid()).square().mean(),
            "scale": (self.scales - was.scales).square().sum(1).mean(),
        }

    def followers(self) -> dict[str, nn.Parameter]:
        """Rows that go with those of the Gaussians where a strategy moves, copies or removes
        them."""
        return {FOLLOWS + name: value for name, value in self.anchor.gaussians().items()}

    def set_gaussians(self, params: dict[str, nn.Parameter]) -> None:
        for name, value in params.items():
            part = self.anchor if name.startswith(FOLLOWS) else self
            setattr(part, name.removeprefix(FOLLOWS), value)

    # -- files -----------------------------------------------------------------------------------

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        inside = state_dict.get(f"{prefix}inside")
        if inside is not None:
            source = state_dict.get(f"{prefix}source.means")
            free, anchor = (state_dict.get(f"{prefix}{n}means") for n in ("", "anchor."))
            counts = [len(v) if isinstance(v, Tensor) and v.ndim else -1 for v in (source, inside)]
            own = [len(v) if isinstance(v, Tensor) and v.ndim else -1 for v in (free, anchor)]
            right = isinstance(inside, Tensor) and inside.dtype == torch.bool and inside.ndim == 1
            if not right or counts[0] != counts[1] or own[0] != own[1]:
                raise ValueError(
                    f"the checkpoint's {prefix}inside, source and anchor do not agree: it is "
                    "damaged, or not of an edit"
                )
            self.inside = self.inside.new_empty(inside.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _first(value: Tensor, count: int) -> Tensor:
    part: Any = value.detach()[:, :count]
    if value.is_leaf or value.retains_grad:  # torch warns of others, which have none
        for name in ("grad", "absgrad"):
            if (found := getattr(value, name, None)) is not None:
                setattr(part, name, found[:, :count])
    return part


def in_box(means: Float[Tensor, "N 3"], box: tuple[float, ...]) -> Bool[Tensor, " N"]:
    """Which centres are in the box (x0, y0, z0, x1, y1, z1), its sides included."""
    low, high = means.new_tensor(box).view(2, 3)
    return ((means >= low) & (means <= high)).all(1)


def in_mask(
    means: Float[Tensor, "N 3"],
    mask: Bool[Tensor, "H W"],
    c2w: Float[Tensor, "1 4 4"],
    fovy: float,
) -> Bool[Tensor, " N"]:
    """Which centres lie, at whatever depth, before pixels of the mask, as seen from a camera with
    OpenGL's axes and this vertical field of view (degrees)."""
    height, width = mask.shape
    K = intrinsics(torch.deg2rad(c2w.new_tensor([fovy])), height, width)[0]
    seen = means @ world_to_camera(c2w)[0, :3, :3].T + world_to_camera(c2w)[0, :3, 3]
    depth = seen[:, 2]
    place = (seen / depth[:, None]) @ K.T
    x, y = place[:, 0].floor().long(), place[:, 1].floor().long()
    within = (depth > 0) & (x >= 0) & (x < width) & (y >= 0) & (y < height)
    return within & mask[y.clamp(0, height - 1), x.clamp(0, width - 1)]
