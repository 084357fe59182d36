"""``lods-mesh-system``: text to the texture, and the shape, of a mesh."""

from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Float
from lods.assets import Mesh, Placement, write
from lods.preflight import EDITED_MESH
from lods.threestudio.systems.editing import Editing
from lods.threestudio.systems.pictures import grey_cell
from torch import Tensor

import threestudio


@threestudio.register("lods-mesh-system")
class LODSTexturedMesh(Editing):
    """A textured mesh; see :class:`LODSSystem` for the losses.

    Its own regularisers are of vertices that are trained (``system.geometry.free_vertices``):
    ``mesh_laplacian`` (:func:`lods.meshes.regularize.laplacian`) and ``mesh_normals``
    (:func:`lods.meshes.regularize.normal_consistency`). Without free vertices they are not
    computed.

    With ``lods-edited-mesh`` the guidance is also given what it was (``source_rgb``), and
    ``anchor_color`` holds it there (:meth:`lods.meshes.edited.EditedTexture.anchor_losses`).
    """

    ANCHORS = ("color",)
    REGULARISERS = (*Editing.REGULARISERS, "mesh_laplacian", "mesh_normals", "anchor_color")
    EDITED, PIECE = EDITED_MESH, "texel"

    @dataclass
    class Config(Editing.Config):
        geometry_type: str = "lods-mesh"
        material_type: str = "no-material"  # the texture is the colour
        material: dict = field(default_factory=lambda: {"n_output_dims": 0})
        background_type: str = "solid-color-background"
        renderer_type: str = "lods-mesh-rasterizer"
        exporter_type: str = "lods-mesh-exporter"

    cfg: Config

    def configure(self) -> None:
        if self.resumed:
            # the checkpoint brings the mesh, and its file may be gone
            self.cfg.geometry["init_type"] = "none"
        super().configure()

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if not len(self.geometry.faces):
            raise ValueError(
                "there is no mesh to train: set system.geometry.init_type to ball, file or run, "
                "or resume a run"
            )
        names = [group.get("name") for group in self._optimizer.param_groups]
        if self.geometry.vertices.requires_grad and "geometry.vertices" not in names:
            raise ValueError(
                "system.geometry.free_vertices=true trains the vertices, which have no learning "
                "rate: set system.optimizer.params.geometry.vertices.lr"
            )

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        out = self(batch)
        source = {key: out[key] for key in ("source_rgb",) if key in out}
        return {"loss": self.loss_of(out, {**batch, **source})}

    def regularisers(self, out: dict[str, Any]) -> dict[str, Float[Tensor, ""]]:
        losses = super().regularisers(out)
        if not self.geometry.vertices.requires_grad:
            return losses
        if self.wants("mesh_laplacian"):
            losses["mesh_laplacian"] = self.geometry.laplacian()
        if self.wants("mesh_normals"):
            losses["mesh_normals"] = self.geometry.normal_consistency()
        return losses

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None) -> None:
        """Step, and keep the colours within 0..1: here and not in ``on_train_batch_end``, before
        which checkpoints are written."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self.geometry.limit_colours()

    def on_test_start(self) -> None:
        """What is final shows no texel that nothing has reached."""
        super().on_test_start()
        self.geometry.fill_unseen()

    def on_predict_epoch_start(self) -> None:
        super().on_predict_epoch_start()
        self.geometry.fill_unseen()

    def panels(self, out: dict[str, Any], i: int) -> list[dict[str, Any]]:
        return [*super().panels(out, i), grey_cell(out["depth"][i, ..., 0], None)]

    def save_textured_mesh(
        self, filename: str, mesh: Mesh, axes: str | None, placement: Placement | None
    ) -> str:
        """``save_type`` 'textured_mesh' of an exporter: see :func:`lods.assets.write`."""
        path = self.get_save_path(filename)
        write(path, mesh, axes, placement)
        self._results["mesh" if filename.endswith(".glb") else "mesh as obj"] = path
        return path
