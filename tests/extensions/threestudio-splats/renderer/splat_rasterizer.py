from dataclasses import dataclass

import torch

import threestudio
from threestudio.models.background.base import BaseBackground
from threestudio.models.geometry.base import BaseGeometry
from threestudio.models.materials.base import BaseMaterial
from threestudio.models.renderers.base import Rasterizer
from threestudio.utils.ops import get_cam_info_gaussian
from threestudio.utils.rasterize import NVDiffRasterizerContext
from threestudio.utils.typing import *


class Camera(NamedTuple):
    FoVx: Float[Tensor, ""]
    FoVy: Float[Tensor, ""]
    camera_center: Float[Tensor, "3"]
    image_width: int
    image_height: int
    world_view_transform: Float[Tensor, "4 4"]
    full_proj_transform: Float[Tensor, "4 4"]


class BatchRenderer:
    def batch_forward(self, batch):
        renders = []
        for i in range(batch["c2w"].shape[0]):
            fovy = batch["fovy"][i]
            w2c, proj, cam_p = get_cam_info_gaussian(
                c2w=batch["c2w"][i], fovx=fovy, fovy=fovy, znear=0.1, zfar=100
            )
            camera = Camera(fovy, fovy, cam_p, batch["width"], batch["height"], w2c, proj)
            renders.append(self.draw(camera))
        out = {key: torch.stack([r[key] for r in renders]) for key in renders[0]}
        bg = self.background(dirs=batch["rays_d"])
        out["comp_rgb"] = out["comp_rgb"] + (1 - out["opacity"]) * bg
        return out


@threestudio.register("splat-rasterizer")
class SplatRasterizer(Rasterizer, BatchRenderer):
    @dataclass
    class Config(Rasterizer.Config):
        size: float = 0.15
        invert_bg_prob: float = 1.0

    cfg: Config

    def configure(
        self, geometry: BaseGeometry, material: BaseMaterial, background: BaseBackground
    ) -> None:
        threestudio.info("splats are drawn in plain torch")
        super().configure(geometry, material, background)
        self.mesh_context: Optional[NVDiffRasterizerContext] = None

    def draw(self, camera: Camera) -> Dict[str, Any]:
        pc = self.geometry
        ones = torch.ones_like(pc._xyz[:, :1])
        clip = torch.cat([pc._xyz, ones], dim=-1) @ camera.full_proj_transform
        depth = clip[:, 3]
        order = depth.argsort()
        ndc = clip[order, :2] / depth[order, None].clamp(min=0.01)
        rows, columns = torch.meshgrid(
            (torch.arange(camera.image_height, device=self.device) + 0.5) / camera.image_height,
            (torch.arange(camera.image_width, device=self.device) + 0.5) / camera.image_width,
            indexing="ij",
        )
        pixels = torch.stack([columns, rows], dim=-1) * 2 - 1
        d2 = (pixels[None] - ndc[:, None, None]).square().sum(-1)
        alpha = pc.get_opacity[order][..., None] * torch.exp(-d2 / (2 * self.cfg.size**2))
        through = torch.cumprod(torch.cat([torch.ones_like(alpha[:1]), 1 - alpha]), dim=0)
        weight = alpha * through[:-1]
        normal = torch.nn.functional.normalize(pc._xyz, dim=-1)
        color = self.material(
            features=pc.get_color,
            positions=pc._xyz,
            shading_normal=normal,
            light_positions=camera.camera_center.expand_as(pc._xyz),
        )[order]
        return {
            "comp_rgb": torch.einsum("nhw,nc->hwc", weight, color),
            "opacity": weight.sum(0)[..., None],
            "depth": (weight * depth[order][:, None, None]).sum(0)[..., None],
        }

    def forward(self, **batch) -> Dict[str, Any]:
        return self.batch_forward(batch)
