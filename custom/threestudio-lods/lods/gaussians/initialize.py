"""Where the Gaussians start: a ball, a file, or an object that Shap-E makes from the prompt.

Every source gives a coloured point cloud, from which :func:`from_points` makes Gaussians; only a
ply file that already holds Gaussians is taken as it is. All randomness comes from the seed in the
configuration, never from the global generators, so that the choice of a source does not change
the cameras or the noise of the run.
"""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from lods import log
from lods.gaussians.axes import AXES, axes_rotation, rotate_gaussians
from lods.gaussians.files import is_of_gaussians, read_gaussians
from lods.gaussians.harmonics import SH_C0
from lods.gaussians.mesh_file import read_mesh
from lods.gaussians.neighbours import neighbour_scale
from lods.settings import make
from scipy.spatial import cKDTree  # type: ignore[attr-defined]
from torch import Tensor

INIT_TYPES = ("ball", "file", "shap-e", "none")


@dataclass
class Points:
    """A coloured point cloud: ``xyz`` (N, 3) in world units, ``rgb`` (N, 3) in 0..1."""

    xyz: np.ndarray
    rgb: np.ndarray


def from_points(
    points: Points,
    opacity: float,
    scale: float,
    sh_degree: int,
    device: Any = "cpu",
    knn_backend: str = "auto",
) -> dict[str, Tensor]:
    """Round Gaussians on a point cloud.

    Returns ``means`` (N, 3), ``scales`` (N, 3) = log(scale * rms distance to 3 neighbours),
    ``quats`` (N, 4) = identity, wxyz, ``opacities`` (N,) = logit(opacity), ``sh0`` (N, 1, 3) =
    (rgb - 1/2) / SH_C0 and, for ``sh_degree`` > 0, ``shN`` (N, (sh_degree+1)^2 - 1, 3) = 0, all on
    the CPU. ``device`` and ``knn_backend``: where and how :func:`neighbour_scale` is computed.
    """
    if not 0.0 < opacity < 1.0:
        raise ValueError(f"init_opacity={opacity} must lie strictly between 0 and 1")
    if not scale > 0.0:
        raise ValueError(f"init_scale={scale} must be positive")
    n = len(points.xyz)
    if not (np.abs(points.xyz) <= np.finfo(np.float32).max).all():
        raise ValueError("the initial points are not finite in float32")
    size = neighbour_scale(points.xyz, torch.device(device), knn_backend)
    size = torch.from_numpy(size * scale).float()
    params = {
        "means": torch.from_numpy(points.xyz).float(),
        "scales": size.log()[:, None].repeat(1, 3),
        "quats": torch.tensor([1.0, 0.0, 0.0, 0.0]).repeat(n, 1),
        "opacities": torch.logit(torch.full((n,), float(opacity))),
        "sh0": (torch.from_numpy(points.rgb).float()[:, None] - 0.5) / SH_C0,
    }
    if sh_degree > 0:
        params["shN"] = torch.zeros(n, (sh_degree + 1) ** 2 - 1, 3)
    if not all(value.isfinite().all() for value in params.values()):
        raise ValueError("the initial points are too far from each other for float32")
    return params


@dataclass
class BallInit:
    """Uniformly filled ball of random colours."""

    n_points: Annotated[int, "[4, 1e8]"] = 4096
    radius: Annotated[float, "(0, 1e6]"] = 0.6  # world units

    def points(self, rng: np.random.Generator) -> Points:
        if self.n_points < 4 or not self.radius > 0:
            raise ValueError(
                f"ball.n_points={self.n_points} must be at least 4 and "
                f"ball.radius={self.radius} positive"
            )
        direction = rng.normal(size=(self.n_points, 3))
        direction /= np.linalg.norm(direction, axis=1, keepdims=True)
        # the volume inside r grows with r^3, so r ~ U^(1/3)
        r = self.radius * rng.random((self.n_points, 1)) ** (1 / 3)
        return Points(direction * r, rng.random((self.n_points, 3)))


@dataclass
class FileInit:
    """A mesh (obj, ply, glb, gltf, off or stl), a coloured point cloud, or Gaussians (a 3DGS or
    compressed ply, splat or spz)."""

    path: str = ""
    n_points: Annotated[int, "[4, 1e8]"] = 20000  # points drawn on the surface of a mesh
    # above 0: centre the file and scale it to this bounding radius
    radius: Annotated[float, "[0, 1e6]"] = 0.0
    # the file's axes that shall face azimuth 0 and point up; auto: +z and +y for glTF and spz, as
    # their specifications say, what a ply of ours says of itself, else +x and +z
    front: Annotated[str, ("auto", *AXES)] = "auto"
    up: Annotated[str, ("auto", *AXES)] = "auto"

    def axes(self, path: Path, said: tuple[str, str] | None) -> tuple[str, str]:
        """Front and up of the file, in its own axes; ``said``: by itself."""
        gltf = path.suffix.lower() in (".glb", ".gltf")
        front, up = said or (("+z", "+y") if gltf else ("+x", "+z"))
        return front if self.front == "auto" else self.front, up if self.up == "auto" else self.up

    def load(self, rng: np.random.Generator) -> Points | dict[str, Tensor]:
        """The points, or the Gaussians of a file that has them."""
        if not self.path:
            raise ValueError("init_type=file needs system.geometry.file.path=<mesh or Gaussians>")
        path = Path(self.path).expanduser()
        if not path.is_file():
            raise ValueError(f"system.geometry.file.path: no file '{path}'")
        of_points = path.suffix.lower() == ".ply" or is_of_gaussians(path)
        content = read_gaussians(path) if of_points else {}
        rotation = axes_rotation(*self.axes(path, content.pop("axes", None)))
        if "means" in content:
            if self.radius:
                raise ValueError(
                    f"'{path}' holds Gaussians, whose sizes are taken as they are: remove "
                    "system.geometry.file.radius"
                )
            return rotate_gaussians(content, rotation)
        if content and "faces" not in content:
            points = Points(content["xyz"], content["rgb"])
        else:
            points = sample_mesh(path, self.n_points, rng, content.get("rgb"))
        xyz = points.xyz @ rotation.T
        if self.radius > 0:
            xyz = xyz - (xyz.min(0) + xyz.max(0)) / 2
            extent = np.linalg.norm(xyz, axis=1).max()
            if extent == 0:
                raise ValueError(f"'{path}': all points are the same, nothing to scale")
            xyz = xyz * (self.radius / extent)
        return Points(xyz, points.rgb)


def sample_mesh(
    path: Path, n_points: int, rng: np.random.Generator, vertex_rgb: np.ndarray | None = None
) -> Points:
    """``n_points`` uniform on the surface of a mesh, with the colours that viewers show there
    (mid grey if it has none). ``vertex_rgb``: colours 0..1 of a ply file's vertices."""
    if n_points < 4:
        raise ValueError(f"system.geometry.file.n_points={n_points} must be at least 4")
    parts = read_mesh(path)
    areas = np.concatenate([part.areas() for part in parts] or [np.zeros(0)])
    finite = np.isfinite(areas)
    areas = np.where(finite, areas, 0.0)
    total = areas.sum()
    if len(areas) > 0 and not (finite.any() and np.isfinite(total)):
        raise ValueError(f"'{path}' has vertices that are not finite, or too far away")
    if not total > 0:
        raise ValueError(f"'{path}' holds no triangles")
    if not finite.all():
        log.warn(
            f"'{path}': {int((~finite).sum())} of {len(finite)} triangles are not finite and left "
            "out"
        )
    chosen = rng.choice(len(areas), n_points, p=areas / total)
    # uniform barycentric coordinates: fold the unit square onto the triangle
    ab = rng.random((n_points, 2))
    ab = np.where(ab.sum(1, keepdims=True) > 1, 1 - ab, ab)
    weights = np.concatenate([1 - ab.sum(1, keepdims=True), ab], axis=1)
    points = Points(np.zeros((n_points, 3)), np.full((n_points, 3), 0.5))
    first = np.cumsum([0] + [len(part.faces) for part in parts])
    owner = np.searchsorted(first, chosen, side="right") - 1
    # parts with the same picture follow each other: it is decoded once, and one is held at a time
    decoded, said = (None, None), False
    order = np.argsort(owner, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(owner[order])) + 1)
    for mine in sorted(groups, key=lambda mine: id(parts[owner[mine[0]]].picture)):
        part, index = parts[owner[mine[0]]], owner[mine[0]]
        faces = chosen[mine] - first[index]
        points.xyz[mine] = (part.triangles(faces) * weights[mine][..., None]).sum(1)
        if vertex_rgb is not None and part.rgb is not None and len(part.rgb) == len(vertex_rgb):
            part.rgb = vertex_rgb
        try:
            if part.picture is not None and decoded[0] is not part.picture:
                decoded = (part.picture, part.picture.pixels())
            pixels = None if part.picture is None else decoded[1]
            points.rgb[mine] = part.colors(faces, weights[mine], pixels)
        except Exception as error:  # of many kinds: a picture has what its file says
            if not said:
                log.warn(f"colours of '{path}' cannot be read ({error}): they are grey")
            said = True
    known = np.isfinite(points.rgb).all(1)
    if not known.all():
        points.rgb[~known] = 0.5
        log.warn(f"colours of '{path}' are not finite in places: they are grey there")
    return points


def refuse_foreign_parts(index: dict[str, Any]) -> None:
    """Raise ValueError if a ``model_index.json`` names a pipeline or parts of its own, which
    diffusers may import, from the folder or from wherever Python finds the name."""
    if index.get("_class_name") != "ShapEPipeline":
        raise ValueError(f"model_index.json names the pipeline {index.get('_class_name')!r}")
    for part, value in index.items():
        library = value[0] if isinstance(value, (list, tuple)) and value else "diffusers"
        if library not in ("diffusers", "transformers", "shap_e"):
            raise ValueError(f"model_index.json takes {part} from {library!r}")


def refuse_out_of_reach(name: str) -> None:
    """Raise ConnectionError at once for a hub id that can be had from nowhere: diffusers would try
    for half a minute."""
    from lods.models.cards import out_of_reach

    why = out_of_reach(name) if name.count("/") == 1 and not Path(name).is_dir() else ""
    if why:
        raise ConnectionError(why)


@contextlib.contextmanager
def data_only():
    """Within this, ``torch.load`` reads tensors and never runs code, whoever calls it and whatever
    their default (that of diffusers 0.19 does not protect)."""
    load = torch.load
    torch.load = lambda *args, **kwargs: load(*args, **{**kwargs, "weights_only": True})
    try:
        yield
    finally:
        torch.load = load


def grow_points(
    points: Points, n_candidates: int, distance: float, color_noise: float, rng: np.random.Generator
) -> Points:
    """Thicken a cloud as GaussianDreamer (arXiv:2310.08529) does.

    Of ``n_candidates`` uniform points in the bounding box those nearer than ``distance`` to a
    point are kept, with the nearest point's colour plus uniform noise in [0, ``color_noise``) per
    channel, clipped to 1. They come before the original points.
    """
    lo, hi = points.xyz.min(0), points.xyz.max(0)
    candidates = rng.uniform(lo, hi, (n_candidates, 3))
    # cKDTree returns infinite distances and an index out of range beyond the bound
    found, nearest = cKDTree(points.xyz).query(candidates, distance_upper_bound=distance)
    near = found < distance
    rgb = points.rgb[nearest[near]] + rng.uniform(0, color_noise, (int(near.sum()), 3))
    return Points(
        np.concatenate([candidates[near], points.xyz]),
        np.concatenate([rgb.clip(0, 1), points.rgb]),
    )


@dataclass
class ShapEInit:
    """The surface of the object that Shap-E (arXiv:2305.02463) makes from the prompt."""

    prompt: str = ""
    pretrained_model_name_or_path: str = "openai/shap-e"
    guidance_scale: Annotated[float, "[0, 1e6]"] = 15.0
    num_steps: Annotated[int, "[1, 10000]"] = 64
    vertex_stride: Annotated[int, "[1, 1e6]"] = 4  # every 4th vertex of the mesh
    # candidates of grow_points; 0: do not grow
    growth_points: Annotated[int, "[0, 1e9]"] = 1_000_000
    growth_distance: Annotated[float, "[0, 1e6]"] = 0.01  # in Shap-E's unit cube
    color_noise: Annotated[float, "[0, 1e3]"] = 0.2
    scale: Annotated[float, "(0, 1e6]"] = 1.6  # world units per unit of Shap-E
    # the side that Shap-E's objects turn to the viewer
    front: Annotated[str, tuple(AXES)] = "-y"
    up: Annotated[str, tuple(AXES)] = "+z"

    def points(self, rng: np.random.Generator, device: torch.device) -> Points:
        if not self.prompt.strip() or self.prompt.startswith("lib:"):
            raise ValueError(
                "Shap-E needs the prompt in words: set system.geometry.shap_e.prompt="
                f"'...' (it is '{self.prompt}')"
            )
        points = self.sample(int(rng.integers(2**31)), device)
        points = Points(points.xyz[:: self.vertex_stride], points.rgb[:: self.vertex_stride])
        if self.growth_points > 0:
            points = grow_points(
                points, self.growth_points, self.growth_distance, self.color_noise, rng
            )
        rotation = axes_rotation(self.front, self.up)
        return Points(points.xyz @ rotation.T * self.scale, points.rgb)

    def sample(self, seed: int, device: torch.device) -> Points:
        """The vertices of the mesh, in Shap-E's own axes."""
        try:
            from diffusers import ShapEPipeline  # type: ignore
            from lods.models.files import load_complete
            from transformers import CLIPTextModelWithProjection

            name = self.pretrained_model_name_or_path
            refuse_out_of_reach(name)
            refuse_foreign_parts(ShapEPipeline.load_config(name))  # type: ignore
            with data_only():  # not all weights of Shap-E on the hub are safetensors
                options = {"torch_dtype": torch.float16 if device.type == "cuda" else torch.float32}
                # a pipeline would take a text encoder without all of its weights
                text = load_complete(CLIPTextModelWithProjection, name, "text_encoder", **options)
                pipe = ShapEPipeline.from_pretrained(name, text_encoder=text, **options).to(device)
        except Exception as error:
            reason = str(error).strip().splitlines()
            raise ValueError(
                f"Shap-E's weights '{self.pretrained_model_name_or_path}' cannot be had "
                f"({type(error).__name__}: {reason[0] if reason else ''}): download them, or "
                "start from a ball with system.geometry.init_type=ball; on a CPU, or to try it "
                "out, add --config configs/pocket.yaml, which needs no download"
            ) from error
        made: Any = pipe(
            self.prompt,
            guidance_scale=self.guidance_scale,
            num_inference_steps=self.num_steps,
            generator=torch.Generator().manual_seed(seed),
            output_type="mesh",
        )
        mesh = made.images[0]
        rgb = torch.stack([mesh.vertex_channels[c] for c in "RGB"], dim=-1)
        xyz = mesh.verts.detach().cpu().double().numpy()
        if len(xyz) == 0:
            raise ValueError(f"Shap-E found no surface for '{self.prompt}': try another seed")
        return Points(xyz, rgb.detach().cpu().double().numpy().clip(0, 1))


def initial_gaussians(
    cfg: Any, device: torch.device, where: str = "system.geometry."
) -> dict[str, Tensor]:
    """The Gaussians that a configuration with the fields of ``lods-gaussians`` asks for; see
    :func:`from_points` for the keys. ``init_type`` 'none' gives none at all (a checkpoint or a
    file fills them in). ``where`` stands before the fields' names in messages."""
    # all three blocks are looked at, so that a misspelt key is found whichever source is chosen
    ball = make(BallInit, cfg.ball, f"{where}ball.")
    file = make(FileInit, cfg.file, f"{where}file.")
    shap_e = make(ShapEInit, cfg.shap_e, f"{where}shap_e.")
    rng = np.random.default_rng(cfg.init_seed)
    if cfg.init_type == "none":
        source = None
    elif cfg.init_type == "ball":
        source = ball.points(rng)
    elif cfg.init_type == "file":
        source = file.load(rng)
    elif cfg.init_type == "shap-e":
        source = shap_e.points(rng, device)
    else:
        raise ValueError(
            f"{where}init_type='{cfg.init_type}' is unknown: use ball, file, shap-e or none"
        )
    if source is None:
        n_rest = (cfg.sh_degree + 1) ** 2 - 1
        empty = {"means": (0, 3), "scales": (0, 3), "quats": (0, 4), "opacities": (0,)}
        empty |= {"sh0": (0, 1, 3)} | ({"shN": (0, n_rest, 3)} if n_rest else {})
        return {name: torch.zeros(shape) for name, shape in empty.items()}
    if isinstance(source, Points):
        return from_points(
            source, cfg.init_opacity, cfg.init_scale, cfg.sh_degree, device, cfg.knn_backend
        )
    return source
