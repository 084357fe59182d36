"""The texture of a mesh that is edited: some texels are locked, and what there was is known."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from lods.meshes.charts import filled, points_of
from lods.meshes.parameters import MeshParameters
from torch import Tensor


@dataclass
class Before:
    """The mesh as it was, to be drawn."""

    mesh: MeshParameters

    @property
    def count(self) -> int:
        """Of the texels."""
        return self.mesh.texture.shape[0] * self.mesh.texture.shape[1]

    def draw(self, *args: Any, texels: Float[Tensor, "N 3"] | None = None, **options: Any) -> Any:
        """See :meth:`lods.meshes.parameters.MeshParameters.draw`; with other colours for the
        ``texels``, if given, row by row, of which those beside the charts take their borders'."""
        texture, charts = self.mesh.start_texture, self.mesh.charts
        if texels is not None:
            texture = texels.view_as(texture)
            texture = texture if charts is None else filled(texture, texture.detach(), charts)
        return self.mesh.draw(*args, texture=texture, **options)


class EditedTexture(MeshParameters):
    """Only the texels that are ``inside`` (H, W) change. The others keep every bit, and so do those
    beside the charts whose borders have not changed. The vertices stay.

    :meth:`begin` comes once, when the mesh is there.
    """

    inside: Tensor

    def begin(self) -> None:
        """At first all texels of the charts may change."""
        charts = self.charts
        height, width = self.texture.shape[:2]
        everything = torch.ones(height, width, dtype=torch.bool, device=self.texture.device)
        self.register_buffer("inside", everything if charts is None else charts.own.clone())

    def points(self) -> Float[Tensor, "K 3"]:
        """Where the texels of the charts are on the surface, row by row. Raises ``ValueError``, one
        line, where a texel is in several places: a region could not be told from the rest."""
        from lods.assets.baking import shared_texels

        charts = self.charts
        if len(self.faces) == 0:
            return self.vertices.new_zeros(0, 3)
        size = self.texture.shape[:2]
        if charts is None or shared_texels(self.uv, self.uv_faces, *size):
            raise ValueError(
                "several parts of the surface share texels, so that no region of it can be told "
                "from the rest: system.geometry.unwrap=true lays the texture out anew"
            )
        return points_of(self.vertices, self.faces, self.uv, self.uv_faces, charts)

    def restrict(self, inside: Bool[Tensor, " N"]) -> None:
        """Before the first step: of what is free, only this stays so; of all texels, row by row."""
        self.inside &= inside.view_as(self.inside)

    @property
    def source(self) -> Before:
        """What there was."""
        return Before(self)

    @property
    def count(self) -> int:
        """Of the texels that may change."""
        return int(self.inside.sum())

    # -- training --------------------------------------------------------------------------------

    def smooth_gradient(self, sigma: float) -> None:
        """As of any mesh, among the texels that may change: nothing comes from others."""
        self.texture.register_hook(self._free_alone)
        super().smooth_gradient(sigma)
        self.texture.register_hook(self._free_alone)

    def _free_alone(self, gradient: Tensor) -> Tensor:
        return gradient * self.inside[..., None]

    @torch.no_grad()
    def limit_colours(self) -> None:
        """Also: what is locked is as it was, whatever the optimizer does without a gradient."""
        super().limit_colours()
        self.texture.copy_(torch.where(self.inside[..., None], self.texture, self.start_texture))

    def _complete(self) -> Tensor:
        return self.texture.detach()  # what has not changed had something to show

    def anchor_losses(self) -> dict[str, Float[Tensor, ""]]:
        """``color``: the mean over the texels that may change of the squared change, summed over
        rgb."""
        change = (self.texture - self.start_texture).square().sum(-1)
        return {"color": (change * self.inside).sum() / self.inside.sum().clamp_min(1)}

    # -- files -----------------------------------------------------------------------------------

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        inside, texture = (state_dict.get(prefix + name) for name in ("inside", "texture"))
        if inside is not None and isinstance(texture, Tensor):
            right = isinstance(inside, Tensor) and inside.dtype == torch.bool
            if not right or inside.shape != texture.shape[:2]:
                raise ValueError(
                    f"the checkpoint's {prefix}inside is not of its texture: it is damaged, or not "
                    "of an edit"
                )
            self.inside = self.inside.new_empty(inside.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)
