"""A cloud of 3D Gaussians as a threestudio geometry."""

import math
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
import torch.nn as nn
from jaxtyping import Float
from lods.gaussians.harmonics import SH_C0
from lods.gaussians.initialize import INIT_TYPES, BallInit, FileInit, ShapEInit, initial_gaussians
from lods.gaussians.neighbours import KNN_BACKENDS
from torch import Tensor

import threestudio
from threestudio.models.geometry.base import BaseGeometry

DIMENSIONS = {"means": 2, "scales": 2, "quats": 2, "opacities": 1, "sh0": 3, "shN": 3}
NAMES = tuple(DIMENSIONS)


@threestudio.register("lods-gaussians")
class Gaussians(BaseGeometry):
    """Gaussians with ``gsplat``'s parameters, directly on the module (so that an optimizer names
    them ``geometry.means`` and so on):

    ``means`` (N, 3) world units; ``scales`` (N, 3) log of the standard deviations; ``quats``
    (N, 4) wxyz, of any length; ``opacities`` (N,) logits; ``sh0`` (N, 1, 3) and, with
    ``sh_degree`` > 0, ``shN`` (N, (sh_degree+1)^2 - 1, 3) spherical harmonics.

    Loading a state dict takes over the number of Gaussians that is stored in it.
    """

    @dataclass
    class Config(BaseGeometry.Config):
        sh_degree: Annotated[int, "[0, 3]"] = 0  # 0: one colour from all sides; up to 3
        init_type: Annotated[str, INIT_TYPES] = "ball"  # ball | file | shap-e | none
        init_seed: Annotated[int, "[0, 4294967295]"] = 0
        # of points; a 3DGS ply brings its own. The scale: times the rms distance to the 3 nearest
        # neighbours
        init_opacity: Annotated[float, "(0, 1)"] = 0.1
        init_scale: Annotated[float, "(0, 1e6]"] = 1.0
        # world units: no standard deviation grows above it in training, since a huge and faint
        # Gaussian is a veil before the views; 0: no limit
        max_scale: Annotated[float, "[0, 1e6]"] = 0.0
        # who finds the neighbours: auto | simple-knn | gswarp (both CUDA) | scipy
        knn_backend: Annotated[str, KNN_BACKENDS] = "auto"
        # the settings of each init_type: BallInit, FileInit and ShapEInit in initialize.py
        ball: Annotated[dict, BallInit] = field(default_factory=dict)
        file: Annotated[dict, FileInit] = field(default_factory=dict)
        shap_e: Annotated[dict, ShapEInit] = field(default_factory=dict)

    cfg: Config

    def configure(self) -> None:
        if not 0 <= self.cfg.sh_degree <= 3:
            raise ValueError(f"system.geometry.sh_degree={self.cfg.sh_degree} must be 0 to 3")
        if not 0 <= self.cfg.max_scale < math.inf:
            raise ValueError(
                f"system.geometry.max_scale={self.cfg.max_scale} must be a size in world units, or "
                "0 for no limit"
            )
        params = initial_gaussians(self.cfg, torch.device(self.device))
        n_rest = (self.cfg.sh_degree + 1) ** 2 - 1
        if n_rest and "shN" not in params:  # a file of degree 0
            params["shN"] = torch.zeros(len(params["means"]), n_rest, 3)
        stored = params["shN"].shape[1] if "shN" in params else 0
        if stored != n_rest:
            degree = int((stored + 1) ** 0.5) - 1
            raise ValueError(
                f"'{self.cfg.file.path}' has spherical harmonics of degree {degree}: "
                f"set system.geometry.sh_degree={degree}"
            )
        for name, value in params.items():
            setattr(self, name, nn.Parameter(value.to(self.device)))
        if self.count > 0:
            threestudio.info(f"{self.count} Gaussians from init_type={self.cfg.init_type}")

    @property
    def count(self) -> int:
        """The number N of Gaussians."""
        return self.means.shape[0]

    def gaussians(self) -> dict[str, nn.Parameter]:
        """The parameters by name, without those that ``sh_degree`` leaves out."""
        return {name: getattr(self, name) for name in NAMES if hasattr(self, name)}

    def set_gaussians(self, params: dict[str, nn.Parameter]) -> None:
        """Take over other parameters, as a densification strategy leaves them behind."""
        for name, value in params.items():
            setattr(self, name, value)

    @torch.no_grad()
    def limit_scales(self) -> None:
        """After a step of the optimizer: sigma <- min(sigma, ``max_scale``), in place."""
        if self.cfg.max_scale > 0:
            self.scales.clamp_(max=math.log(self.cfg.max_scale))

    def base_colors(self) -> Float[Tensor, "N 3"]:
        """The colour (N, 3) without its view dependence: max(1/2 + SH_C0 * sh0, 0), which can
        exceed 1."""
        return (self.sh0[:, 0] * SH_C0 + 0.5).clamp_min(0.0)

    def export(self) -> dict[str, Tensor]:
        """Detached parameters by name, as :func:`..gaussian.ply.write_gaussians` takes them."""
        return {name: value.detach() for name, value in self.gaussians().items()}

    @staticmethod
    def _refuse(key: str, value: Any, dimensions: int) -> None:
        """Raise ValueError for a stored value that no Gaussians have."""
        real = isinstance(value, Tensor) and value.is_floating_point()
        if not real or value.ndim != dimensions:
            raise ValueError(f"the checkpoint's {key} is not a table of {dimensions} dimension(s)")
        # a view that repeats one number can claim any size; it would be allocated
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise ValueError(f"the checkpoint's {key} claims more values than the file holds")
        bad = int((~torch.isfinite(value)).sum())
        if bad:
            raise ValueError(
                f"the checkpoint's {key} has {bad} values that are not finite: take an earlier one"
            )

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        stored = {n: state_dict[prefix + n] for n in NAMES if prefix + n in state_dict}
        for name, value in stored.items():
            self._refuse(prefix + name, value, DIMENSIONS[name])
        counts = {name: len(value) for name, value in stored.items()}
        if len(set(counts.values())) > 1:
            raise ValueError(f"the checkpoint's Gaussians do not agree in number: {counts}")
        for name, param in self.gaussians().items():
            value = stored.get(name)
            if value is None:
                if name == "shN" and stored:  # of degree 0 then, which is zeros of a higher one
                    n = next(iter(counts.values()))
                    state_dict[prefix + name] = param.data.new_zeros(n, *param.shape[1:])
                    param.data = param.data.new_empty(n, *param.shape[1:])
                continue  # torch itself reports other missing keys, where it is asked to
            if value.shape[1:] != param.shape[1:]:
                raise ValueError(
                    f"the checkpoint's {prefix}{name} has shape {tuple(value.shape)} and does not "
                    f"fit system.geometry.sh_degree={self.cfg.sh_degree}"
                )
            # the Parameter object stays the same, so an existing optimizer keeps pointing at it
            param.data = param.data.new_empty(value.shape)
        if "shN" in stored and not hasattr(self, "shN"):
            degree = int((stored["shN"].shape[1] + 1) ** 0.5) - 1
            raise ValueError(
                f"the checkpoint has spherical harmonics: set system.geometry.sh_degree={degree}"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)
