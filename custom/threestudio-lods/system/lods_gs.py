"""``lods-gs-system``: text to 3D Gaussians."""

from dataclasses import dataclass, field

import torch

import threestudio
from threestudio.systems.base import BaseLift3DSystem
from threestudio.utils.config import parse_structured
from threestudio.utils.misc import C
from threestudio.utils.ops import binary_cross_entropy
from threestudio.utils.typing import *

from ..gaussian.densify import Densifier
from ..gaussian.ply import write_gaussians, write_points

# the guidances of this extension return some of these; a YAML may weigh all of them, so that the
# guidance can be changed in one line
GUIDANCE_LOSSES = ("sds", "lora", "embedding")
REGULARISERS = ("sparsity", "opaque", "gaussian_opacity", "gaussian_scale")


@dataclass
class StrategyConfig:
    """Growing and pruning; see :class:`..gaussian.densify.Densifier`."""

    name: str = "none"  # none | default | mcmc
    scene_scale: float = 1.0  # world units; thresholds on 3D sizes are multiples of it
    default: dict = field(default_factory=dict)
    mcmc: dict = field(default_factory=dict)


@threestudio.register("lods-gs-system")
class LODSGaussianSplatting(BaseLift3DSystem):
    """Renders a batch of cameras, asks the guidance for its losses and adds regularisers.

    total = sum over all losses of C(system.loss.lambda_<name>) * loss, where the guidance gives
    ``sds`` and, if it learns, ``lora`` or ``embedding``, and with o the rendered opacity:

    - ``sparsity``: mean sqrt(o^2 + 0.01)
    - ``opaque``: binary cross entropy of o, clamped to 1e-3..1-1e-3, with itself
    - ``gaussian_opacity``, ``gaussian_scale``: mean opacity and mean standard deviation (world
      units) of the Gaussians themselves, the regularisers of the MCMC strategy (arXiv:2404.09591)

    A regulariser is computed when its lambda stands in the YAML.
    """

    @dataclass
    class Config(BaseLift3DSystem.Config):
        geometry_type: str = "lods-gaussians"
        material_type: str = "no-material"  # Gaussians carry their colours themselves
        material: dict = field(default_factory=lambda: {"n_output_dims": 0})
        background_type: str = "solid-color-background"
        renderer_type: str = "lods-gaussian-rasterizer"
        prompt_processor_type: str = "stable-diffusion-prompt-processor"
        exporter_type: str = "lods-gaussian-exporter"
        strategy: dict = field(default_factory=dict)
        # name of an optimizer group -> schedule of its learning rate, interpolated geometrically
        # (log-linear); groups that are not listed keep their 'lr'
        lr_schedule: dict = field(default_factory=dict)
        sheet_views: int = 12  # views of the contact sheet, evenly around the object
        sheet_columns: int = 4
        video_fps: int = 30

    cfg: Config

    def configure(self) -> None:
        if self.resumed:
            # the checkpoint brings the Gaussians: do not run Shap-E for nothing
            self.cfg.geometry.init_type = "none"
        super().configure()
        strategy = parse_structured(StrategyConfig, self.cfg.strategy)
        args = strategy.get(strategy.name, {})
        self.densifier = Densifier(strategy.name, dict(args or {}), strategy.scene_scale)
        self.guidance = threestudio.find(self.cfg.guidance_type)(self.cfg.guidance)
        self.prompt_processor = threestudio.find(self.cfg.prompt_processor_type)(
            self.cfg.prompt_processor
        )
        self.prompt_utils = self.prompt_processor()
        if hasattr(self.guidance, "initialize"):
            self.guidance.initialize(self.prompt_utils)
        self.on_predict_start()  # a mistake in the exporter's settings shall not cost a training
        self._rendered: Optional[Tuple[int, dict, float]] = None
        self._sheet: Dict[int, Tuple[float, int, Tensor]] = {}
        self._results: Dict[str, str] = {}

    def forward(self, batch: Dict[str, Any]) -> Dict[str, Any]:
        return self.renderer(**batch)

    # -- training ------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if self.geometry.count == 0:
            raise ValueError(
                "there are no Gaussians to train: set system.geometry.init_type to ball, file or "
                "shap-e, or resume a run"
            )
        names = [group.get("name") for group in self._optimizer.param_groups]
        for name in self.cfg.lr_schedule:
            if name not in names:
                raise ValueError(
                    f"system.lr_schedule names '{name}', which is not in system.optimizer.params "
                    f"({', '.join(str(n) for n in names)})"
                )
        if self.densifier.strategy is not None:
            if self.trainer.accumulate_grad_batches != 1:
                raise ValueError(
                    "densification needs every step: set trainer.accumulate_grad_batches=1 (and a "
                    "larger data.batch_size), or system.strategy.name=none"
                )
            if self.trainer.world_size > 1:
                raise ValueError(
                    "densification would change the Gaussians of each GPU differently: train on "
                    "one GPU, or set system.strategy.name=none"
                )

    @property
    def _optimizer(self) -> torch.optim.Optimizer:
        return self.optimizers(use_pl_optimizer=False)

    def training_step(self, batch: Dict[str, Any], batch_idx: int) -> Dict[str, Tensor]:
        out = self.renderer(**batch, absgrad=self.densifier.absgrad)
        self.densifier.before_backward(out["info"])
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        scale = scaler.get_scale() if scaler is not None else 1.0
        self._rendered = (self.true_global_step, out["info"], scale)

        guided = self.guidance(out["comp_rgb"], self.prompt_utils, **batch, rgb_as_latents=False)
        for name, value in guided.items():
            if not name.startswith("loss_") and _is_scalar(value):
                self.note(f"train/{name}", value)
        losses = {k[len("loss_") :]: v for k, v in guided.items() if k.startswith("loss_")}
        losses |= self.regularisers(out)
        loss = self.weigh(losses)
        self.log("train/loss", loss.detach(), prog_bar=True)
        self.note("train/n_gaussians", self.geometry.count)
        return {"loss": loss}

    def note(self, name: str, value: Any) -> None:
        """``self.log``, on the steps that loggers write only (``trainer.log_every_n_steps``): a
        dozen calls take Lightning several milliseconds."""
        every = self.trainer.log_every_n_steps
        if every and (self.global_step + 1) % every == 0:
            self.log(name, float(value.detach() if isinstance(value, Tensor) else value))

    def regularisers(self, out: Dict[str, Any]) -> Dict[str, Float[Tensor, ""]]:
        """The losses of the class docstring whose lambda stands in the YAML, by name."""

        wanted = [name for name in REGULARISERS if f"lambda_{name}" in self.cfg.loss]
        losses = {}
        if "sparsity" in wanted:
            losses["sparsity"] = (out["opacity"] ** 2 + 0.01).sqrt().mean()
        if "opaque" in wanted:
            clamped = out["opacity"].clamp(1e-3, 1 - 1e-3)
            losses["opaque"] = binary_cross_entropy(clamped, clamped)
        if "gaussian_opacity" in wanted:
            losses["gaussian_opacity"] = self.geometry.opacities.sigmoid().mean()
        if "gaussian_scale" in wanted:
            losses["gaussian_scale"] = self.geometry.scales.exp().mean()
        return losses

    def weigh(self, losses: Dict[str, Float[Tensor, ""]]) -> Float[Tensor, ""]:
        """sum_i C(lambda_i) * loss_i, with losses and lambdas logged.

        Raises ValueError for a loss without a lambda, and for a lambda without a loss.
        """
        known = {f"lambda_{name}" for name in {*losses, *REGULARISERS, *GUIDANCE_LOSSES}}
        for key in self.cfg.loss:
            if key not in known:
                raise ValueError(
                    f"system.loss.{key} weighs a loss that does not exist: the keys are "
                    f"{', '.join(sorted(known))}"
                )
        total = 0.0
        for name, value in losses.items():
            key = f"lambda_{name}"
            if key not in self.cfg.loss:
                raise ValueError(
                    f"{self.cfg.guidance_type} returns loss_{name} but system.loss has no {key}: "
                    f"add system.loss.{key}=1.0 to the configuration"
                )
            self.note(f"train/loss_{name}", value)
            total = total + value * self.C(self.cfg.loss[key])
        for key, value in self.cfg.loss.items():
            self.note(f"train_params/{key}", self.C(value))
        return total

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None) -> None:
        """Set the scheduled learning rates, step, densify.

        Densification follows here and not in ``on_train_batch_end``, because Lightning lets its
        callbacks write checkpoints before it calls that hook: a checkpoint would hold Gaussians
        of before and random states of after.
        """
        for group in optimizer.param_groups:
            if group.get("name") in self.cfg.lr_schedule:
                group["lr"] = C(
                    self.cfg.lr_schedule[group["name"]],
                    self.true_current_epoch,
                    self.true_global_step,
                    interpolation="exp",
                )
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if self._rendered is not None:
            step, info, scale = self._rendered
            self._rendered = None  # frees the graph's images
            self.densifier.after_step(self.geometry, self._optimizer, step, info, scale)

    # -- checkpoints ---------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: Dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["lods_densifier"] = self.densifier.state_dict()

    def on_load_checkpoint(self, checkpoint: Dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if "lods_densifier" in checkpoint:
            self.densifier.load_state_dict(checkpoint["lods_densifier"], self.geometry.means.device)

    # -- pictures ------------------------------------------------------------------------------

    def validation_step(self, batch: Dict[str, Any], batch_idx: int) -> None:
        out = self(batch)
        for i, index in enumerate(batch["index"].tolist()):
            self.save_image_grid(
                f"it{self.true_global_step}-{index}.png",
                [
                    _rgb(out["comp_rgb"][i]),
                    _grey(out["opacity"][i, ..., 0], (0, 1)),
                    _grey(out["depth"][i, ..., 0], None),
                ],
                name="validation_step",
                step=self.true_global_step,
            )

    def on_validation_epoch_end(self) -> None:
        pass

    def test_step(self, batch: Dict[str, Any], batch_idx: int) -> None:
        out = self(batch)
        for i, index in enumerate(batch["index"].tolist()):
            image = out["comp_rgb"][i]
            self.save_rgb_image(f"it{self.true_global_step}-test/{index}.png", image)
            self._keep_for_sheet(float(batch["azimuth"][i]), index, image)

    def _keep_for_sheet(self, azimuth: float, index: int, image: Float[Tensor, "H W 3"]) -> None:
        """Keep the frame if it is the nearest so far to one of the sheet's azimuths."""
        for view in range(self.cfg.sheet_views):
            wanted = 360.0 * view / self.cfg.sheet_views
            gap = abs((azimuth - wanted + 180.0) % 360.0 - 180.0)
            if view not in self._sheet or gap < self._sheet[view][0]:
                self._sheet[view] = (gap, index, image.detach().cpu())

    def on_test_epoch_end(self) -> None:
        name = f"it{self.true_global_step}-test"
        self._results["video"] = self.save_img_sequence(
            name,
            name,
            r"(\d+)\.png",
            save_format="mp4",
            fps=self.cfg.video_fps,
            name="test",
            step=self.true_global_step,
        )
        # with fewer frames than views, each frame stands on the sheet once
        frames = {index: image for _, index, image in self._sheet.values()}
        self._sheet = {}
        cells = [_rgb(image) for image in frames.values()]
        columns = min(self.cfg.sheet_columns, len(cells))
        blank = _rgb(torch.ones_like(cells[0]["img"]))
        cells += [blank] * (-len(cells) % columns)
        self._results["contact sheet"] = self.save_image_grid(
            f"{name}-sheet.png",
            [cells[i : i + columns] for i in range(0, len(cells), columns)],
            name="contact_sheet",
            step=self.true_global_step,
        )

    # -- files ---------------------------------------------------------------------------------

    def on_predict_epoch_end(self) -> None:
        """``--export``: the exporter's files, and what the guidance has learnt."""
        super().on_predict_epoch_end()
        if hasattr(self.guidance, "save_learned"):
            name = f"it{self.true_global_step}-export/prior.safetensors"
            path = self.guidance.save_learned(self.get_save_path(name))
            if path is not None:
                self._results["learnt prior"] = str(path)

    def on_test_end(self) -> None:
        """The files of ``--export`` are written at the end of a test too."""
        self.on_predict_start()
        self.exporter.cfg.save_video = False  # the video has just been made
        self.on_predict_epoch_end()
        super().on_test_end()

    def save_gaussian_ply(self, filename: str, **gaussians: Tensor) -> str:
        """``save_type`` 'gaussian_ply' of an exporter: the standard 3DGS layout."""
        path = self.get_save_path(filename)
        n = write_gaussians(path, **gaussians)
        self._results["gaussians"] = f"{path} ({n})"
        return path

    def save_point_ply(self, filename: str, xyz: Tensor, rgb: Tensor) -> str:
        """``save_type`` 'point_ply' of an exporter: coloured points."""
        path = self.get_save_path(filename)
        write_points(path, xyz, rgb)
        return path

    def result_summary(self) -> List[str]:
        """Where the results of the last test or export are: lines like 'video: <path>'."""
        return [f"{what}: {path}" for what, path in self._results.items()]


def _is_scalar(value: Any) -> bool:
    return isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.numel() == 1)


def _rgb(image: Float[Tensor, "H W 3"]) -> Dict[str, Any]:
    return {"type": "rgb", "img": image, "kwargs": {"data_format": "HWC", "data_range": (0, 1)}}


def _grey(image: Float[Tensor, "H W"], data_range: Optional[Tuple[float, float]]) -> Dict[str, Any]:
    return {"type": "grayscale", "img": image, "kwargs": {"cmap": None, "data_range": data_range}}
