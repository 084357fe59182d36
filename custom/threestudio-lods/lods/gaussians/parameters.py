"""Gaussians as the parameters of a module."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from jaxtyping import Float
from lods.gaussians.cameras import world_to_camera
from lods.gaussians.harmonics import SH_C0, view_colors
from lods.gaussians.reference import covariances
from torch import Tensor

DIMENSIONS = {"means": 2, "scales": 2, "quats": 2, "opacities": 1, "sh0": 3, "shN": 3}
NAMES = tuple(DIMENSIONS)


class GaussianParameters(nn.Module):
    """What a module with the parameters of Gaussians can do, whoever makes them.

    The parameters are ``gsplat``'s, directly on the module (so that an optimizer names them
    ``geometry.means`` and so on): ``means`` (N, 3) world units; ``scales`` (N, 3) log of the
    standard deviations; ``quats`` (N, 4) wxyz, of any length; ``opacities`` (N,) logits; ``sh0``
    (N, 1, 3) and, with ``sh_degree`` > 0, ``shN`` (N, (sh_degree+1)^2 - 1, 3) spherical harmonics.

    Loading a state dict takes over the number of Gaussians that is stored in it.
    """

    means: nn.Parameter
    scales: nn.Parameter
    quats: nn.Parameter
    opacities: nn.Parameter
    sh0: nn.Parameter
    shN: nn.Parameter  # where the degree is above 0
    # before the names of settings in messages
    settings_name = ""

    @property
    def count(self) -> int:
        """The number N of Gaussians."""
        return self.means.shape[0]

    @property
    def sh_degree(self) -> int:
        """The degree of the spherical harmonics; 0: one colour from all sides."""
        return degree_of(self.shN) if hasattr(self, "shN") else 0

    def gaussians(self) -> dict[str, nn.Parameter]:
        """The parameters by name, without those that the degree leaves out."""
        return {name: getattr(self, name) for name in NAMES if hasattr(self, name)}

    def whole(self) -> "GaussianParameters":
        """Everything that is drawn and exported: itself, unless a part of it is locked (see
        :mod:`lods.gaussians.edited`)."""
        return self

    def own_info(self, info: dict[str, Any]) -> dict[str, Any]:
        """What a rasteriser says of :meth:`whole`, of what is trained only."""
        return info

    def followers(self) -> dict[str, nn.Parameter]:
        """Further rows of each Gaussian that nothing trains and that a strategy of densification
        has to move, copy and remove with it: none."""
        return {}

    def set_gaussians(self, params: dict[str, nn.Parameter]) -> None:
        """Take over other parameters, as a densification strategy leaves them behind."""
        for name, value in params.items():
            setattr(self, name, value)

    @torch.no_grad()
    def clamp_scales(self, max_scale: float) -> None:
        """sigma <- min(sigma, ``max_scale``), in place, after a step of the optimizer; 0: nothing
        is done."""
        if max_scale > 0:
            self.scales.clamp_(max=math.log(max_scale))

    @torch.no_grad()
    def clamp_aspect(self, max_aspect: float) -> None:
        """sigma <- max(sigma, sigma_max / ``max_aspect``), with sigma_max a Gaussian's largest, in
        place, after a step of the optimizer; infinity: nothing is done.

        What is much thinner than a pixel is drawn as thick as one, so that a thin Gaussian is a
        bright streak where it is seen edge-on."""
        if max_aspect < math.inf:
            least = self.scales.max(dim=1, keepdim=True).values - math.log(max_aspect)
            self.scales.copy_(torch.maximum(self.scales, least))

    def base_colors(self) -> Float[Tensor, "N 3"]:
        """The colour (N, 3) without its view dependence: max(1/2 + SH_C0 * sh0, 0), which can
        exceed 1."""
        return (self.sh0[:, 0] * SH_C0 + 0.5).clamp_min(0.0)

    def colors(self, camera_positions: Float[Tensor, "B 3"]) -> Float[Tensor, "*B N 3"]:
        """Colours (N, 3), or (B, N, 3) where they depend on the view."""
        if self.sh_degree == 0:
            return self.base_colors()
        return view_colors(self.sh0, self.shN, self.means, camera_positions)

    @torch.no_grad()
    def splats(self, most: int | None = None) -> dict[str, Tensor]:
        """What viewers of Gaussians draw: ``centers`` (N, 3), ``covariances`` (N, 3, 3) in world
        units, ``rgbs`` (N, 3) in 0..1 without view dependence, ``opacities`` (N, 1) in 0..1. Of
        more than ``most`` Gaussians those with the largest product of opacity and extent (the
        product of the two larger standard deviations), in their order."""
        whole = self.whole()
        sigma, opacities = whole.scales.exp(), whole.opacities.sigmoid()
        kept = torch.arange(whole.count, device=whole.means.device)
        if most is not None and whole.count > most:
            extent = sigma.sort(dim=1).values[:, 1:].prod(dim=1)
            kept = (opacities * extent).topk(most).indices.sort().values
        return {
            "centers": whole.means[kept],
            "covariances": covariances(whole.quats[kept], sigma[kept]),
            "rgbs": whole.base_colors()[kept].clamp(max=1),
            "opacities": opacities[kept, None],
        }

    def export(self) -> dict[str, Tensor]:
        """Detached parameters by name, as :func:`lods.gaussians.write_ply` takes them."""
        return {name: value.detach() for name, value in self.whole().gaussians().items()}

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
                    f"fit {self.settings_name}sh_degree={self.sh_degree}"
                )
            # the Parameter object stays the same, so an existing optimizer keeps pointing at it
            param.data = param.data.new_empty(value.shape)
        if "shN" in stored and not hasattr(self, "shN"):
            raise ValueError(
                "the checkpoint has spherical harmonics: set "
                f"{self.settings_name}sh_degree={degree_of(stored['shN'])}"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)


def whole(geometry: Any) -> Any:
    """What of a geometry is drawn and exported: itself, if it is from elsewhere."""
    found = getattr(geometry, "whole", None)
    return geometry if found is None else found()


def degree_of(rest: Float[Tensor, "N K 3"]) -> int:
    """The degree of harmonics of which K are above the constant one."""
    return int((rest.shape[1] + 1) ** 0.5) - 1


class Gaussians(GaussianParameters):
    """Gaussians to draw, to train and to write, without a host:

    gaussians = Gaussians.ball(2000)
    images, alphas, info = gaussians.render(lods.gaussians.orbit(8, distance=2.5))
    gaussians.write_ply("ball.ply")
    """

    placement: Any = None  # of those of lods.assets.read: where they were in their file

    def __init__(self, tensors: dict[str, Tensor], device: Any = None) -> None:
        """``tensors``: those of :class:`GaussianParameters` by name, which are copied. Raises
        ``ValueError`` where some are missing or do not agree in number."""
        super().__init__()
        missing = [name for name in NAMES[:-1] if name not in tensors]
        if missing:
            raise ValueError(f"there are no Gaussians without {', '.join(missing)}")
        counts = {name: len(tensors[name]) for name in NAMES if name in tensors}
        if len(set(counts.values())) > 1:
            raise ValueError(f"the Gaussians do not agree in number: {counts}")
        for name in counts:
            value = tensors[name].detach().clone().to(device or tensors[name].device)
            setattr(self, name, nn.Parameter(value))

    @classmethod
    def points(
        cls,
        xyz: Any,
        rgb: Any,
        opacity: float = 0.1,
        scale: float = 1.0,
        sh_degree: int = 0,
        device: Any = "cpu",
    ) -> "Gaussians":
        """Round ones on a point cloud: ``xyz`` (N, 3) in world units, ``rgb`` (N, 3) in 0..1, N at
        least 4. ``opacity`` in 0..1; the standard deviations are ``scale`` times the root mean
        square distance to the 3 nearest neighbours."""
        from lods.gaussians.initialize import Points, from_points

        cloud = Points(np.asarray(xyz, np.float64), np.asarray(rgb, np.float64))
        return cls(from_points(cloud, opacity, scale, sh_degree, device), device)

    @classmethod
    def ball(
        cls,
        n_points: int = 4096,
        radius: float = 0.6,
        seed: int = 0,
        opacity: float = 0.1,
        sh_degree: int = 0,
        device: Any = "cpu",
    ) -> "Gaussians":
        """A ball around the origin, evenly filled, of random colours."""
        from lods.gaussians.initialize import BallInit

        cloud = BallInit(n_points, radius).points(np.random.default_rng(seed))
        return cls.points(cloud.xyz, cloud.rgb, opacity, sh_degree=sh_degree, device=device)

    @classmethod
    def file(
        cls,
        path: str | Path,
        n_points: int = 20000,
        radius: float = 0.0,
        seed: int = 0,
        opacity: float = 0.1,
        device: Any = "cpu",
    ) -> "Gaussians":
        """Those of a 3DGS or compressed ply, splat or spz; or of a point cloud (ply), or of
        ``n_points`` points on the surface of a mesh (obj, ply, glb, gltf, off, stl), with its
        colours and textures, centred and scaled to ``radius`` if that is above 0."""
        from lods.gaussians.initialize import FileInit, Points

        source = FileInit(str(path), n_points, radius).load(np.random.default_rng(seed))
        if isinstance(source, Points):
            return cls.points(source.xyz, source.rgb, opacity, device=device)
        return cls(source, device)

    def render(
        self,
        c2w: Float[Tensor, "C 4 4"],
        width: int = 256,
        height: int = 256,
        fovy: float = 40.0,
        **options: Any,
    ) -> tuple[Float[Tensor, "C H W X"], Float[Tensor, "C H W 1"], dict[str, Any]]:
        """What cameras see: images, alphas and ``info`` of :func:`lods.gaussians.rasterization`,
        which takes the ``options``.

        ``c2w``: camera to world with OpenGL's axes (x right, y up, z backward), as
        :func:`lods.gaussians.orbit` makes them; ``fovy``: vertical field of view in degrees.
        """
        from lods.gaussians.cameras import intrinsics
        from lods.gaussians.rasterize import rasterization

        c2w = c2w.to(self.means)
        K = intrinsics(torch.deg2rad(c2w.new_full((len(c2w),), fovy)), height, width)
        return rasterization(
            self.means,
            self.quats,
            self.scales.exp(),
            self.opacities.sigmoid(),
            self.colors(c2w[:, :3, 3]),
            world_to_camera(c2w),
            K,
            width,
            height,
            **{"packed": False, **options},
        )

    def groups(self, **rates: float) -> list[dict[str, Any]]:
        """Groups for an optimizer, one a parameter, with the learning rates of 3DGS
        (arXiv:2308.04079) where none is given: ``torch.optim.Adam(gaussians.groups(), eps=1e-15)``.
        """
        usual = {"means": 1.6e-4, "scales": 5e-3, "quats": 1e-3, "opacities": 0.05, "sh0": 2.5e-3}
        rates = {**usual, "shN": 1.25e-4, **rates}
        unknown = [name for name in rates if name not in NAMES]
        if unknown:
            raise ValueError(f"Gaussians have no {', '.join(unknown)}: they have {NAMES}")
        return [
            {"params": [value], "lr": rates[name], "name": name}
            for name, value in self.gaussians().items()
        ]

    def write_ply(self, path: str | Path, axes: str = "z-up") -> int:
        """Write a ply file of 3DGS; see :func:`lods.gaussians.write_ply`."""
        from lods.gaussians.ply import write_ply

        return write_ply(path, **self.export(), axes=axes)

    def mesh(self, resolution: int = 128, opacity: float = 0.15, density: float | None = None):
        """The coloured mesh around them; see :func:`lods.gaussians.surface.surface`."""
        from lods.gaussians.surface import surface

        return surface(self, resolution, opacity, density)
