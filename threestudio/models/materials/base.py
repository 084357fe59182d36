"""Base class of materials, with the interface of threestudio 0.2.3."""

from dataclasses import dataclass

from threestudio.utils.base import BaseModule
from threestudio.utils.typing import *


class BaseMaterial(BaseModule):
    """``forward(features (..., F), **what the renderer knows) -> colours (..., C)``."""

    @dataclass
    class Config(BaseModule.Config):
        pass

    cfg: Config

    # what the renderer has to compute and pass
    requires_normal: bool = False
    requires_tangent: bool = False

    def forward(self, *args, **kwargs) -> Float[Tensor, "*B C"]:
        raise NotImplementedError(f"{type(self).__name__} does not define forward")

    def export(self, *args, **kwargs) -> Dict[str, Any]:
        """Texture maps of an exported asset (``albedo``, ``metallic``, ...), by name."""
        return {}
