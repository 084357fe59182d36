from dataclasses import dataclass

import threestudio
from threestudio.models.exporters.base import Exporter, ExporterOutput
from threestudio.utils.typing import *


@threestudio.register("splat-exporter")
class SplatExporter(Exporter):
    @dataclass
    class Config(Exporter.Config):
        save_name: str = "splats"
        save_video: bool = False

    cfg: Config

    def __call__(self) -> List[ExporterOutput]:
        mesh = self.geometry.extract_mesh()
        params = {
            "mesh": mesh,
            "save_mat": False,
            "save_normal": False,
            "save_uv": False,
            "save_vertex_color": True,
        }
        return [
            ExporterOutput(save_name=f"{self.cfg.save_name}.obj", save_type="obj", params=params)
        ]
