"""``lods-gs-system``: text to 3D Gaussians."""

import difflib
from dataclasses import dataclass, field
from typing import Annotated, Any

from jaxtyping import Float
from lods.gaussians.densify import STRATEGIES, Densifier
from lods.gaussians.files import write_gaussians
from lods.gaussians.mesh_file import write_mesh
from lods.gaussians.ply import write_ply, write_points
from lods.preflight import EDITED, refuse_densification
from lods.threestudio.systems.editing import Editing
from lods.threestudio.systems.original import complete
from lods.threestudio.systems.pictures import grey_cell
from lods.threestudio.systems.strategy_options import DefaultOptions, McmcOptions
from torch import Tensor

import threestudio
from threestudio.models.mesh import Mesh
from threestudio.utils.config import parse_structured


@dataclass
class StrategyConfig:
    """Growing and pruning; see :class:`lods.gaussians.densify.Densifier`."""

    name: Annotated[str, STRATEGIES] = "none"  # none | default | mcmc
    # world units; thresholds on 3D sizes are multiples of it
    scene_scale: Annotated[float, "(0, 1e6]"] = 1.0
    default: Annotated[dict, DefaultOptions] = field(default_factory=dict)
    mcmc: Annotated[dict, McmcOptions] = field(default_factory=dict)

    def contradictions(self):
        """Misspelt options of the strategy that is not chosen, whose own class does not see them:
        (field, what is wrong)."""
        for name, options in (("default", DefaultOptions), ("mcmc", McmcOptions)):
            known = list(options.__annotations__)
            for key in self[name] or {} if name != self.name else {}:
                near = difflib.get_close_matches(str(key), known, 1, 0.8)
                if key not in known and near:
                    yield (
                        f"{name}.{key}",
                        f"is no option of this strategy: did you mean {near[0]!r}?",
                    )


@threestudio.register("lods-gs-system")
class LODSGaussianSplatting(Editing):
    """3D Gaussians; see :class:`LODSSystem` for the losses.

    Its own regularisers, ``gaussian_opacity`` and ``gaussian_scale``, are the mean opacity and the
    mean standard deviation (world units) of the Gaussians themselves: those of the MCMC strategy
    (arXiv:2404.09591).

    With ``lods-edited-gaussians`` the guidance is also given what they were (``source_rgb``), and
    ``anchor_color``, ``anchor_position``, ``anchor_opacity`` and ``anchor_scale`` hold them there
    (:meth:`lods.gaussians.edited.EditedParameters.anchor_losses`).
    """

    ANCHORS = ("color", "position", "opacity", "scale")
    REGULARISERS = (
        *Editing.REGULARISERS,
        "gaussian_opacity",
        "gaussian_scale",
        *(f"anchor_{name}" for name in ANCHORS),
    )
    EDITED, PIECE = EDITED, "Gaussian"

    @dataclass
    class Config(Editing.Config):
        geometry_type: str = "lods-gaussians"
        material_type: str = "no-material"  # Gaussians carry their colours themselves
        material: dict = field(default_factory=lambda: {"n_output_dims": 0})
        background_type: str = "solid-color-background"
        renderer_type: str = "lods-gaussian-rasterizer"
        exporter_type: str = "lods-gaussian-exporter"
        strategy: Annotated[dict, StrategyConfig] = field(default_factory=dict)
        # world units; of the original's YAML, whose unsaid constants it brings: see original.py
        radius: Annotated[float | None, "(0, 1e6]"] = None

    cfg: Config

    def configure(self) -> None:
        if self.cfg.radius is not None:
            complete(self.cfg)
        if self.resumed:
            # the checkpoint brings the Gaussians: do not run Shap-E for nothing
            self.cfg.geometry.init_type = "none"
        # before the models are loaded, which takes longer than to find a mistake
        strategy = parse_structured(StrategyConfig, self.cfg.strategy)
        args = strategy.get(strategy.name, {})
        self.densifier = Densifier(strategy.name, dict(args or {}), strategy.scene_scale)
        super().configure()
        self._rendered: tuple[int, dict, float] | None = None

    # -- training ------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if self.geometry.count == 0:
            raise ValueError(
                "there are no Gaussians to train: set system.geometry.init_type to ball, file or "
                "shap-e, or resume a run"
            )
        if self.densifier.strategy is not None:
            refuse_densification(self.trainer.world_size > 1, self.trainer.accumulate_grad_batches)
        self.densifier.begin(self.geometry.count, self.trainer.max_steps, self.resumed)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        out = self.renderer(**batch, absgrad=self.densifier.absgrad)
        self.densifier.before_backward(out["info"])
        scaler, step = getattr(self.trainer.precision_plugin, "scaler", None), self.true_global_step
        read = scaler is not None and self.densifier.reads_gradients(step)
        # only where it is of use: the CPU waits for the GPU to tell it
        self._rendered = (step, out["info"], scaler.get_scale() if read else 1.0)

        loss = self.loss_of(out, self.with_source(batch, out))
        self.note("train/n_gaussians", self.geometry.count)
        for name, number in self.densifier.census.total.items():
            self.note(f"train/n_{name}", number)
        return {"loss": loss}

    def regularisers(self, out: dict[str, Any]) -> dict[str, Float[Tensor, ""]]:
        losses = super().regularisers(out)
        if self.wants("gaussian_opacity"):
            losses["gaussian_opacity"] = self.geometry.opacities.sigmoid().mean()
        if self.wants("gaussian_scale"):
            losses["gaussian_scale"] = self.geometry.scales.exp().mean()
        return losses

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None) -> None:
        """Step, with the scheduled learning rates, and densify.

        Densification follows here and not in ``on_train_batch_end``, because Lightning lets its
        callbacks write checkpoints before it calls that hook: a checkpoint would hold Gaussians
        of before and random states of after.
        """
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self.geometry.limit_scales()
        if self._rendered is not None:
            step, info, scale = self._rendered
            info = self.geometry.own_info(info)
            self._rendered = None  # frees the graph's images
            # a step without gradients was skipped: nothing is to be grown after it, or moved
            if any(p.grad is not None for p in self.geometry.parameters()):
                self.densifier.after_step(self.geometry, self._optimizer, step, info, scale)

    # -- checkpoints ---------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["lods_densifier"] = self.densifier.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if "lods_densifier" in checkpoint:
            means = checkpoint.get("state_dict", {}).get("geometry.means")
            count = len(means) if isinstance(means, Tensor) and means.ndim else None
            state, device = checkpoint["lods_densifier"], self.geometry.means.device
            self.densifier.load_state_dict(state, device, count)

    # -- pictures and files --------------------------------------------------------------------

    def panels(self, out: dict[str, Any], i: int) -> list[dict[str, Any]]:
        return [*super().panels(out, i), grey_cell(out["depth"][i, ..., 0], None)]

    def save_gaussian_ply(self, filename: str, axes: str = "z-up", **gaussians: Tensor) -> str:
        """``save_type`` 'gaussian_ply' of an exporter: the standard 3DGS layout."""
        path = self.get_save_path(filename)
        n = write_ply(path, **gaussians, axes=axes)
        self._results["gaussians"] = f"{path} ({n})"
        return path

    def save_point_ply(self, filename: str, xyz: Tensor, rgb: Tensor, axes: str = "z-up") -> str:
        """``save_type`` 'point_ply' of an exporter: coloured points."""
        path = self.get_save_path(filename)
        write_points(path, xyz, rgb, axes)
        return path

    def save_gaussian_file(self, filename: str, axes: str = "z-up", **gaussians: Tensor) -> str:
        """``save_type`` 'gaussian_file' of an exporter: Gaussians in the format of the name's
        ending, see :func:`lods.gaussians.files.write_gaussians`."""
        path = self.get_save_path(filename)
        n = write_gaussians(path, gaussians, axes)
        self._results[filename.rpartition("/")[2]] = f"{path} ({n})"
        return path

    def save_gaussian_mesh(
        self,
        filename: str,
        mesh: Mesh,
        uv: Tensor | None = None,
        texture: Tensor | None = None,
    ) -> str:
        """``save_type`` 'gaussian_mesh' of an exporter: a glb with a texture, or with vertex
        colours, y upward as glTF wants it."""
        path = self.get_save_path(filename)
        write_mesh(
            path,
            mesh.v_pos[:, [1, 2, 0]],
            mesh.t_pos_idx,
            mesh.v_rgb,
            mesh.v_nrm[:, [1, 2, 0]],
            uv,
            texture,
        )
        self._results["mesh"] = path
        return path
