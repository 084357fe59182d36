"""3D Gaussians as a threestudio geometry."""

import math
from dataclasses import dataclass, field
from typing import Annotated

import torch
import torch.nn as nn
from lods.gaussians.edited import EditedParameters
from lods.gaussians.initialize import INIT_TYPES, BallInit, FileInit, ShapEInit, initial_gaussians
from lods.gaussians.neighbours import KNN_BACKENDS
from lods.gaussians.parameters import GaussianParameters, degree_of
from lods.threestudio.regions import Region, box_of, inside

import threestudio
from threestudio.models.geometry.base import BaseGeometry


@threestudio.register("lods-gaussians")
class Gaussians(GaussianParameters, BaseGeometry):
    """Gaussians whose start and degree are set in a configuration; see
    :class:`lods.gaussians.parameters.GaussianParameters` for the parameters."""

    settings_name = "system.geometry."

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
        # the largest standard deviation of a Gaussian over its smallest, in training: thin ones are
        # streaks where they are seen edge-on; .inf: no limit
        max_aspect: Annotated[float, "[1, inf]"] = math.inf
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
        if not self.cfg.max_aspect >= 1:
            raise ValueError(
                f"system.geometry.max_aspect={self.cfg.max_aspect} must be a ratio of 1 or more, "
                "or .inf for no limit"
            )
        params = initial_gaussians(self.cfg, torch.device(self.device), self.settings_name)
        n_rest = (self.cfg.sh_degree + 1) ** 2 - 1
        if n_rest and "shN" not in params:  # a file of degree 0
            params["shN"] = torch.zeros(len(params["means"]), n_rest, 3)
        stored = params["shN"].shape[1] if "shN" in params else 0
        if stored != n_rest:
            degree = degree_of(params["shN"]) if stored else 0
            raise ValueError(
                f"'{self.cfg.file.path}' has spherical harmonics of degree {degree}: "
                f"set system.geometry.sh_degree={degree}"
            )
        for name, value in params.items():
            setattr(self, name, nn.Parameter(value.to(self.device)))
        if self.count > 0:
            threestudio.info(f"{self.count} Gaussians from init_type={self.cfg.init_type}")

    def limit_scales(self) -> None:
        """After a step of the optimizer: no standard deviation above ``max_scale``, and none below
        the largest of its Gaussian over ``max_aspect``."""
        self.clamp_scales(self.cfg.max_scale)
        self.clamp_aspect(self.cfg.max_aspect)


@threestudio.register("lods-edited-gaussians")
class EditedGaussians(EditedParameters, Gaussians):
    """Gaussians of a file that a method of :mod:`lods.methods.editing` changes: the system has
    renders of them as they were from :attr:`source`, for the same cameras. What is locked, and what
    anchors hold the rest by, is said in :class:`lods.gaussians.edited.EditedParameters`."""

    @dataclass
    class Config(Region, Gaussians.Config):
        """Of what the region leaves free, what is in the box stays in it."""

    cfg: Config

    def configure(self) -> None:
        super().configure()
        found = inside(self.cfg, self.means, self.settings_name, "Gaussians")
        self.begin(found, box_of(self.cfg))
        if len(found):
            threestudio.info(f"{self.count} of {len(found)} Gaussians may change")

    def limit_scales(self) -> None:
        """Also: no centre leaves the box."""
        super().limit_scales()
        self.clamp_to_box()
