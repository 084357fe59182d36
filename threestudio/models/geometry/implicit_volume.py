"""A density and features by position: an encoding followed by small networks."""

from dataclasses import dataclass, field
from typing import Annotated, TypedDict

import torch
import torch.nn.functional as F

import threestudio
from threestudio.models.geometry.base import contract_to_unisphere
from threestudio.models.geometry.density import DensityVolume, finite_difference_normal
from threestudio.models.networks import (
    EncodingOptions,
    NetworkOptions,
    get_encoding,
    get_mlp,
)
from threestudio.utils.errors import WrongKindError
from threestudio.utils.misc import loading_weights
from threestudio.utils.typing import *

NORMAL_TYPES = ("finite_difference", "finite_difference_laplacian", "analytic", "pred")


class AnnealOptions(TypedDict):
    """``density_blob_std`` by step: linear from ``start_val`` to ``end_val`` between two steps."""

    min_anneal_step: Annotated[int, "[0, 1e12]"]
    max_anneal_step: Annotated[int, "[0, 1e12]"]
    start_val: Annotated[float, "(0, 1e6]"]
    end_val: Annotated[float, "(0, 1e6]"]


@threestudio.register("implicit-volume")
class ImplicitVolume(DensityVolume):
    """raw(x) = density_network(e) and features = feature_network(e), with e the encoding of the
    position in the unit cube; see :class:`DensityVolume` for the density."""

    BLOBS = {"blob_magic3d": "linear", "blob_dreamfusion": "gaussian"}

    @dataclass
    class Config(DensityVolume.Config):
        n_input_dims: Annotated[int, "[1, 16]"] = 3
        density_bias: Annotated[Any, "(-inf, inf) or blob_magic3d or blob_dreamfusion"] = (
            "blob_magic3d"
        )
        pos_encoding_config: Annotated[dict, EncodingOptions] = field(
            default_factory=lambda: {
                "otype": "HashGrid",
                "n_levels": 16,
                "n_features_per_level": 2,
                "log2_hashmap_size": 19,
                "base_resolution": 16,
                "per_level_scale": 1.447269237440378,
            }
        )
        mlp_network_config: Annotated[dict, NetworkOptions] = field(
            default_factory=lambda: {
                "otype": "VanillaMLP",
                "activation": "ReLU",
                "output_activation": "none",
                "n_neurons": 64,
                "n_hidden_layers": 1,
            }
        )
        # finite_difference_laplacian takes central differences, finite_difference one-sided ones
        finite_difference_normal_eps: Annotated[float, "(0, 1e3]"] = 0.01  # world units
        isosurface_threshold: Annotated[Any, "(-inf, inf) or auto"] = 25.0
        anneal_density_blob_std_config: Annotated[Optional[dict], AnnealOptions] = None
        normal_type: Annotated[Optional[str], NORMAL_TYPES] = "finite_difference"

        def contradictions(self):
            """See :mod:`threestudio.utils.ranges`."""
            anneal = self.anneal_density_blob_std_config
            missing = set(AnnealOptions.__required_keys__) - set(anneal or ())
            if anneal is not None and missing:
                yield "anneal_density_blob_std_config", f"lacks {', '.join(sorted(missing))}"
            elif anneal is not None and anneal.min_anneal_step > anneal.max_anneal_step:
                yield (
                    "anneal_density_blob_std_config",
                    f"has min_anneal_step={anneal.min_anneal_step} after "
                    f"max_anneal_step={anneal.max_anneal_step}",
                )

    cfg: Config

    def configure(self) -> None:
        super().configure()
        cfg = self.cfg
        self.encoding = get_encoding(cfg.n_input_dims, cfg.pos_encoding_config)
        width = self.encoding.n_output_dims
        self.density_network = get_mlp(width, 1, cfg.mlp_network_config)
        if cfg.n_feature_dims > 0:
            self.feature_network = get_mlp(width, cfg.n_feature_dims, cfg.mlp_network_config)
        if cfg.normal_type == "pred":
            self.normal_network = get_mlp(width, 3, cfg.mlp_network_config)

    def update_step(self, epoch: int, global_step: int, on_load_weights: bool = False) -> None:
        """Set this step's ``density_blob_std``, linear between the two annealing steps."""
        anneal = self.cfg.anneal_density_blob_std_config
        if anneal is not None:
            low, high = anneal.min_anneal_step, anneal.max_anneal_step
            part = min(max((global_step - low) / max(high - low, 1), 0.0), 1.0)
            self.density_blob_std = anneal.start_val + part * (anneal.end_val - anneal.start_val)

    # -- density ---------------------------------------------------------------------------------

    def _encode(self, points: Float[Tensor, "*N D"]) -> Float[Tensor, "*N E"]:
        unit = contract_to_unisphere(points, self.bbox, self.unbounded)
        encoded = self.encoding(unit.reshape(-1, self.cfg.n_input_dims))
        return encoded.reshape(*points.shape[:-1], -1)

    def _density(
        self, points: Float[Tensor, "*N D"], encoded: Float[Tensor, "*N E"]
    ) -> Float[Tensor, "*N 1"]:
        flat = self.density_network(encoded.flatten(0, -2))
        return self.activated_density(points, flat.reshape(*points.shape[:-1], 1))

    def forward_density(self, points: Float[Tensor, "*N D"]) -> Float[Tensor, "*N 1"]:
        """The density alone."""
        return self._density(points, self._encode(points))

    # -- everything ------------------------------------------------------------------------------

    def forward(
        self, points: Float[Tensor, "*N D"], output_normal: bool = False
    ) -> Dict[str, Float[Tensor, "..."]]:
        """At world ``points``: ``density`` (..., 1); ``features`` (..., n_feature_dims) if there
        are any; with ``output_normal`` also ``normal`` and ``shading_normal`` (..., 3), unit
        vectors against the gradient of the density."""
        analytic = output_normal and self.cfg.normal_type == "analytic"
        if output_normal:
            self.check_normals()
        training = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.set_grad_enabled(training or analytic):
            if analytic and not points.requires_grad:
                points = points.clone().requires_grad_(True)
            encoded = self._encode(points)
            density = self._density(points, encoded)
            normal = self._normal(points, encoded, density, training) if output_normal else None
        if analytic and not training:
            density, encoded = density.detach(), encoded.detach()
        out = {"density": density}
        if self.cfg.n_feature_dims > 0:
            features = self.feature_network(encoded.flatten(0, -2))
            out["features"] = features.reshape(*points.shape[:-1], self.cfg.n_feature_dims)
        if normal is not None:
            out["normal"] = out["shading_normal"] = normal
        return out

    def _normal(
        self,
        points: Float[Tensor, "*N D"],
        encoded: Float[Tensor, "*N E"],
        density: Float[Tensor, "*N 1"],
        training: bool,
    ) -> Float[Tensor, "*N 3"]:
        kind = self.cfg.normal_type
        if kind == "pred":
            flat = self.normal_network(encoded.flatten(0, -2))
            return F.normalize(flat.reshape(*points.shape[:-1], 3), dim=-1)
        if kind == "analytic":
            (gradient,) = torch.autograd.grad(
                density, points, torch.ones_like(density), create_graph=training
            )
            return F.normalize(-gradient, dim=-1)
        return finite_difference_normal(
            self.forward_density,
            points,
            density,
            self.cfg.finite_difference_normal_eps,
            self.cfg.radius,
            central=kind == "finite_difference_laplacian",
        )

    # -- export and conversion -------------------------------------------------------------------

    def export(self, points: Float[Tensor, "*N D"], **kwargs) -> Dict[str, Any]:
        """``features`` at the points, for materials to turn into textures."""
        if self.cfg.n_feature_dims == 0:
            return {}
        encoded = self._encode(points)
        features = self.feature_network(encoded.flatten(0, -2))
        return {"features": features.reshape(*points.shape[:-1], self.cfg.n_feature_dims)}

    @staticmethod
    @torch.no_grad()
    def create_from(other, cfg=None, copy_net: bool = True, **kwargs) -> "ImplicitVolume":
        """A volume with the encoding and density network of another one, and, with ``copy_net``,
        its feature network."""
        if not isinstance(other, ImplicitVolume):
            raise WrongKindError(f"an implicit-volume cannot be made from {type(other).__name__}")
        made = ImplicitVolume(cfg, **kwargs)
        parts = ["encoding", "density_network"]
        if copy_net and made.cfg.n_feature_dims == other.cfg.n_feature_dims > 0:
            parts.append("feature_network")
        elif copy_net and other.cfg.n_feature_dims > 0:
            threestudio.warn(
                "the other geometry's texture is not taken over: it has "
                f"{other.cfg.n_feature_dims} features, and this one {made.cfg.n_feature_dims}"
            )
        for part in parts:
            state, target = getattr(other, part).state_dict(), getattr(made, part)
            with loading_weights(target, state, f"the other geometry's {part}"):
                target.load_state_dict(state)
        return made
