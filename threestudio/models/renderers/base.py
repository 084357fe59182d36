"""Base classes of renderers, with the interface of threestudio 0.2.3."""

from dataclasses import dataclass
from typing import Annotated

import torch

from threestudio.models.background.base import BaseBackground
from threestudio.models.geometry.base import BaseGeometry
from threestudio.models.holder import SceneHolder
from threestudio.models.materials.base import BaseMaterial
from threestudio.utils.base import BaseModule
from threestudio.utils.errors import UserError
from threestudio.utils.typing import *


class Renderer(SceneHolder, BaseModule):
    """Draws ``geometry`` with ``material`` in front of ``background``.

    The three are read as attributes and exchanged by ``set_geometry``, ``set_material`` and
    ``set_background``. Buffer ``bbox`` (2, 3): the corners of ``[-radius, radius]^3``.
    """

    @dataclass
    class Config(BaseModule.Config):
        radius: Annotated[float, "(0, 1e6]"] = 1.0

    cfg: Config

    geometry_needs: Tuple[str, ...] = ()  # methods that the renderer calls of its geometry

    def configure(
        self, geometry: BaseGeometry, material: BaseMaterial, background: BaseBackground
    ) -> None:
        for method in self.geometry_needs:
            if not hasattr(geometry, method):
                raise UserError(
                    f"{type(self).__name__} cannot draw a {type(geometry).__name__}, which has no "
                    f"{method}(): set another system.renderer_type or system.geometry_type"
                )
        self.hold_scene(geometry, material, background)
        r = self.cfg.radius
        self.bbox: Float[Tensor, "2 3"]
        self.register_buffer("bbox", torch.tensor([[-r, -r, -r], [r, r, r]], dtype=torch.float32))

    def forward(self, *args, **kwargs) -> Dict[str, Any]:
        raise NotImplementedError(f"{type(self).__name__} does not define forward")


class VolumeRenderer(Renderer):
    """A renderer that integrates along rays (needs ``rays_o`` and ``rays_d``)."""


class Rasterizer(Renderer):
    """A renderer that projects primitives (needs ``c2w`` and ``fovy``, or ``mvp_mtx``)."""
