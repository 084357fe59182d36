"""What systems share whose geometry may be edited: a source, a region of words, anchors."""

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from jaxtyping import Float
from lods.cameras import Cameras
from lods.edits.trace import maps_of_words, traced
from lods.gaussians.cameras import orbit
from lods.threestudio.systems.pictures import rgb_cell
from lods.threestudio.systems.rates import ScheduledRates
from torch import Tensor

import threestudio

WHERE_ELEVATION = 15.0  # degrees, of the views in which words are looked for


class Editing(ScheduledRates):
    """With a geometry that has a ``source``, what was there, the guidance is also given renders of
    it (``source_rgb``), from the same cameras before the same background, and ``anchor_<name>`` of
    ``geometry.anchor_losses()`` hold what is free to it. A geometry without one is trained as by
    any other system.

    A subclass names its ``ANCHORS``, which are in its REGULARISERS too, the geometry that has a
    source (``EDITED``), and what such a geometry consists of (``PIECE``). Its renderer is a
    :class:`lods.threestudio.renderer.DrawsSources`, with a ``draw`` that draws a source in other
    colours.
    """

    ANCHORS: tuple[str, ...] = ()
    EDITED, PIECE = "", ""

    @dataclass
    class Config(ScheduledRates.Config):
        # of a geometry that is edited: words that the model sees in what of it may change, how
        # strongly (0..1), and from how many sides it is asked
        where: str | None = None
        where_level: Annotated[float, "[0, 1]"] = 0.5
        where_views: Annotated[int, "[1, 1000]"] = 8

    cfg: Config

    def configure(self) -> None:
        super().configure()
        if self.cfg.where is not None and not self.resumed:
            self._restrict_to(self.cfg.where)

    @torch.no_grad()
    def _restrict_to(self, words: str) -> None:
        """Only the pieces in which the model sees these words may change."""
        geometry, model = self.geometry, self.guidance.method.model
        if not hasattr(geometry, "restrict"):
            raise ValueError(f"system.where is of edits: set system.geometry_type={self.EDITED}")
        distance, fovy = geometry.cfg.view_distance, geometry.cfg.view_fovy
        size, device = model.image_size, model.device
        angle = torch.deg2rad(torch.full((1,), fovy, device=device))
        white = torch.ones(1, size, size, 3, device=device)
        prompts = self.guidance.prompts_of(self.prompt_utils)
        views, latents, conditions = [], [], []
        for i in range(self.cfg.where_views):
            azimuth = 360.0 * i / self.cfg.where_views
            numbers = torch.tensor([WHERE_ELEVATION, azimuth, distance, fovy], device=device)
            elevation, side, far, field_ = numbers[:, None]
            views.append(orbit(1, distance, WHERE_ELEVATION, azimuth).to(device))
            seen = self.renderer.before(geometry.source, white, views[-1], angle, size, size)
            latents.append(self.guidance.encode(seen))
            conditions.append(prompts.conditions(Cameras(elevation, side, far, fovy=field_)))

        def draw(colors: Tensor, c2w: Tensor) -> Tensor:
            return self.renderer.draw(geometry.source, colors, c2w, angle, size, size)[0][0]

        maps = maps_of_words(model, words, latents, conditions, (size, size))
        inside = traced(draw, geometry.source.count, maps, views) >= self.cfg.where_level
        if not (inside & geometry.inside.flatten()).any():
            raise ValueError(
                f"system.where: {words!r} is seen in no {self.PIECE} above system.where_level="
                f"{self.cfg.where_level:g}"
            )
        geometry.restrict(inside)
        threestudio.info(f"{words!r} is seen in {geometry.count} {self.PIECE}s, which may change")

    def with_source(self, batch: dict[str, Any], out: dict[str, Any]) -> dict[str, Any]:
        """The batch, with what was there where something is edited."""
        source = self._source(batch, out)
        return batch if source is None else {**batch, "source_rgb": source}

    def _source(self, batch: dict[str, Any], out: dict[str, Any]) -> Tensor | None:
        """What was there, seen as ``out`` is; None where nothing is edited."""
        source = getattr(self.geometry, "source", None)
        if source is None:
            return None
        if not hasattr(self.renderer, "before"):
            raise ValueError(
                f"system.renderer_type={self.cfg.renderer_type} cannot draw what is edited as it "
                f"was: set system.renderer_type={type(self).Config.renderer_type}"
            )
        return self.renderer.before(source, out["comp_rgb_bg"].detach(), **batch)

    def forward(self, batch: dict[str, Any]) -> dict[str, Any]:
        out = super().forward(batch)
        source = self._source(batch, out)
        return out if source is None else {**out, "source_rgb": source}

    def regularisers(self, out: dict[str, Any]) -> dict[str, Float[Tensor, ""]]:
        losses = super().regularisers(out)
        wanted = [name for name in self.ANCHORS if self.wants(f"anchor_{name}")]
        if wanted:
            if not hasattr(self.geometry, "anchor_losses"):
                raise ValueError(
                    f"system.loss.lambda_anchor_* hold {self.PIECE}s to what they were: set "
                    f"system.geometry_type={self.EDITED}, or leave them out"
                )
            found = self.geometry.anchor_losses()
            losses |= {f"anchor_{name}": found[name] for name in wanted}
        return losses

    def panels(self, out: dict[str, Any], i: int) -> list[dict[str, Any]]:
        before = [rgb_cell(out["source_rgb"][i])] if "source_rgb" in out else []
        return [*before, *super().panels(out, i)]

    def sheet_picture(self, out: dict[str, Any], i: int) -> Float[Tensor, "H W 3"]:
        """Of an edit what was there and, at its right, what is there now."""
        now = out["comp_rgb"][i]
        return torch.cat([out["source_rgb"][i], now], dim=1) if "source_rgb" in out else now
