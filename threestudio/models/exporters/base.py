"""Base class of exporters, with the interface of threestudio 0.2.3."""

from dataclasses import dataclass

import threestudio
from threestudio.models.background.base import BaseBackground
from threestudio.models.geometry.base import BaseGeometry
from threestudio.models.holder import SceneHolder
from threestudio.models.materials.base import BaseMaterial
from threestudio.utils.base import BaseObject
from threestudio.utils.typing import *


@dataclass
class ExporterOutput:
    """One file to write: the system calls ``save_<save_type>(<folder>/<save_name>, **params)``."""

    save_name: str
    save_type: str
    params: Dict[str, Any]


class Exporter(SceneHolder, BaseObject):
    """``exporter() -> [ExporterOutput, ...]`` from a geometry, a material and a background."""

    @dataclass
    class Config(BaseObject.Config):
        save_video: bool = False  # also render the test views and write their video

    cfg: Config

    geometry_needs: Tuple[str, ...] = ()  # methods that the exporter calls of its geometry

    def configure(
        self, geometry: BaseGeometry, material: BaseMaterial, background: BaseBackground
    ) -> None:
        self.hold_scene(geometry, material, background)

    def __call__(self, *args, **kwargs) -> List[ExporterOutput]:
        raise NotImplementedError(f"{type(self).__name__} does not define __call__")


@threestudio.register("dummy-exporter")
class DummyExporter(Exporter):
    """Exports nothing; with ``save_video`` a way to get the video only."""

    def __call__(self, *args, **kwargs) -> List[ExporterOutput]:
        return []
