"""Gaussians as files that viewers open."""

from dataclasses import dataclass, field

import threestudio
from threestudio.models.exporters.base import Exporter, ExporterOutput
from threestudio.utils.typing import *

FORMATS = {  # fmt -> (ending of the file, save_<type> of the system)
    "ply": (".ply", "gaussian_ply"),
    "points": ("-points.ply", "point_ply"),
}


@threestudio.register("lods-gaussian-exporter")
class GaussianExporter(Exporter):
    """'ply': all parameters in the standard 3DGS layout; 'points': centres and colours only."""

    @dataclass
    class Config(Exporter.Config):
        fmt: List[str] = field(default_factory=lambda: ["ply", "points"])
        save_name: str = "gaussians"

    cfg: Config

    def configure(self, *args, **kwargs) -> None:
        super().configure(*args, **kwargs)
        for fmt in self.cfg.fmt:
            if fmt not in FORMATS:
                raise ValueError(
                    f"system.exporter.fmt has '{fmt}': the formats are {', '.join(FORMATS)}"
                )

    def __call__(self) -> List[ExporterOutput]:
        outputs = []
        for fmt in self.cfg.fmt:
            ending, save_type = FORMATS[fmt]
            if fmt == "ply":
                params = self.geometry.export()
            else:
                params = {"xyz": self.geometry.means, "rgb": self.geometry.base_colors()}
            outputs.append(ExporterOutput(self.cfg.save_name + ending, save_type, params))
        return outputs
