"""Features that are colours already."""

from dataclasses import dataclass
from typing import Annotated

import threestudio
from threestudio.models.materials.base import BaseMaterial
from threestudio.models.networks import NetworkOptions, get_mlp
from threestudio.utils.ops import get_activation
from threestudio.utils.typing import *


@threestudio.register("no-material")
class NoMaterial(BaseMaterial):
    """``colour = color_activation(features)``, or of ``network(features)`` with an
    ``mlp_network_config``: no light, no shading."""

    @dataclass
    class Config(BaseMaterial.Config):
        # channels of the colour; 0: colours come from the geometry
        n_output_dims: Annotated[int, "[0, 4096]"] = 3
        color_activation: str = "sigmoid"
        # both or neither: channels of the features, and the network between them and the colour
        input_feature_dims: Annotated[Optional[int], "[1, 4096]"] = None
        mlp_network_config: Annotated[Optional[dict], NetworkOptions] = None
        requires_normal: bool = False

        def contradictions(self):
            """See :mod:`threestudio.utils.ranges`."""
            if (self.input_feature_dims is None) != (self.mlp_network_config is None):
                yield "input_feature_dims", "and mlp_network_config go together: set both, or none"

    cfg: Config

    def configure(self) -> None:
        cfg = self.cfg
        self.requires_normal = cfg.requires_normal
        self.activation = get_activation(cfg.color_activation)
        self.use_network = cfg.mlp_network_config is not None
        if self.use_network:
            self.network = get_mlp(
                cfg.input_feature_dims, cfg.n_output_dims, cfg.mlp_network_config
            )

    def forward(self, features: Float[Tensor, "*B F"], **kwargs) -> Float[Tensor, "*B C"]:
        wanted = self.cfg.input_feature_dims if self.use_network else self.cfg.n_output_dims
        if features.shape[-1] != wanted:
            name = "input_feature_dims" if self.use_network else "n_output_dims"
            raise ValueError(
                f"no-material has {name}={wanted} but the geometry gives {features.shape[-1]} "
                f"features: set material.{name} accordingly"
            )
        if self.use_network:
            flat = self.network(features.reshape(-1, wanted))
            features = flat.reshape(*features.shape[:-1], self.cfg.n_output_dims)
        return self.activation(features)

    def export(self, features: Float[Tensor, "*B F"], **kwargs) -> Dict[str, Any]:
        """``albedo`` (..., 3): the first three channels, within 0..1."""
        return {"albedo": self(features, **kwargs)[..., :3].clamp(0.0, 1.0)}
