"""Access to the parts of a scene (geometry, material, background) without owning them."""

from types import SimpleNamespace

from threestudio.models.background.base import BaseBackground
from threestudio.models.geometry.base import BaseGeometry
from threestudio.models.materials.base import BaseMaterial


class SceneHolder:
    """Mixin of renderers and exporters, which use a geometry, a material and a background.

    The three are kept in a plain object: an ``nn.Module`` attribute would be registered as a
    submodule, and the parameters of the geometry would then stand twice in checkpoints and
    optimizers (once in the system, once in its renderer).
    """

    def hold_scene(
        self, geometry: BaseGeometry, material: BaseMaterial, background: BaseBackground
    ) -> None:
        self._scene = SimpleNamespace(geometry=geometry, material=material, background=background)

    @property
    def geometry(self) -> BaseGeometry:
        return self._scene.geometry

    @property
    def material(self) -> BaseMaterial:
        return self._scene.material

    @property
    def background(self) -> BaseBackground:
        return self._scene.background

    def set_geometry(self, geometry: BaseGeometry) -> None:
        self._scene.geometry = geometry

    def set_material(self, material: BaseMaterial) -> None:
        self._scene.material = material

    def set_background(self, background: BaseBackground) -> None:
        self._scene.background = background
