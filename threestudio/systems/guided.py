"""What the systems share that a guidance trains: losses and their weights, and pictures."""

from dataclasses import dataclass

import threestudio
from threestudio.systems.base import BaseLift3DSystem
from threestudio.utils.errors import UserError, nearest
from threestudio.utils.ops import binary_cross_entropy, dot
from threestudio.utils.typing import *


class GuidedSystem(BaseLift3DSystem):
    """total = sum_i C(system.loss.lambda_i) loss_i over the guidance's losses and these:

    - ``orient``: sum over samples of w max(0, n . d)^2 over the number of rays that meet anything
      (Ref-NeRF, arXiv:2112.03907, eq. 11); w the weight of a sample, without a gradient
    - ``sparsity``: mean sqrt(o^2 + 0.01) of the opacity o
    - ``opaque``: the binary cross entropy of o, clamped to 1e-3..1-1e-3, with itself
    - ``z_variance``: the mean variance of the depth of rays with o > 1/2 (HiFA, arXiv:2305.18766)

    A loss of the guidance needs a lambda; one of these four without a lambda is left out.
    """

    @dataclass
    class Config(BaseLift3DSystem.Config):
        pass

    cfg: Config

    def forward(self, batch: Dict[str, Any]) -> Dict[str, Any]:
        return {**self.renderer(**batch)}

    def build_guidance(self) -> None:
        """Make ``prompt_processor`` and ``guidance``."""
        cfg = self.cfg
        self.prompt_processor = threestudio.find(cfg.prompt_processor_type)(cfg.prompt_processor)
        self.guidance = threestudio.find(cfg.guidance_type)(cfg.guidance)

    # --- losses -----------------------------------------------------------------------------------

    def weight_of(self, name: str) -> Optional[float]:
        """lambda_<name> now, or None where the config has none."""
        value = self.cfg.loss.get(f"lambda_{name}")
        return None if value is None else self.C(value)

    def total(self, guided: Dict[str, Any], own: Dict[str, Tensor]) -> Dict[str, Tensor]:
        """What ``training_step`` returns, of the guidance's output and the system's own losses;
        all of them are logged, with their weights."""
        for name, value in guided.items():
            if isinstance(value, Tensor) and value.ndim == 0:
                self.log(f"train/{name}", value.detach())  # not as a number, which a GPU waits for
            elif isinstance(value, (int, float)):
                self.log(f"train/{name}", float(value))
        losses = {k.removeprefix("loss_"): v for k, v in guided.items() if k.startswith("loss_")}
        for name in losses:
            if self.weight_of(name) is None:
                raise UserError(
                    f"the guidance has a loss {name!r}: add system.loss.lambda_{name}, its weight"
                    f"{nearest(f'lambda_{name}', self.cfg.loss)}"
                )
        for name, value in own.items():
            self.log(f"train/loss_{name}", value.detach())
            losses[name] = value
        for key, value in self.cfg.loss.items():
            self.log(f"train_params/{key}", self.C(value))
        self.loss_terms = {f"loss_{k}": v.detach() for k, v in losses.items()}
        return {"loss": sum(value * self.weight_of(name) for name, value in losses.items())}

    def field_losses(self, out: Dict[str, Any]) -> Dict[str, Float[Tensor, ""]]:
        """The losses of the class docstring that have a weight; ``orient`` if that is above 0."""
        opacity, losses = out["opacity"], {}
        if (self.weight_of("orient") or 0) > 0:
            if "normal" not in out:
                raise UserError(
                    "system.loss.lambda_orient needs normals: set "
                    "system.geometry.normal_type=finite_difference and "
                    "system.material.requires_normal=true, or lambda_orient to 0"
                )
            away = dot(out["normal"], out["t_dirs"]).clamp(min=0).square()
            met = (opacity > 0).sum().clamp(min=1)
            losses["orient"] = (out["weights"].detach() * away).sum() / met
        if self.weight_of("sparsity") is not None:
            losses["sparsity"] = (opacity.square() + 0.01).sqrt().mean()
        if self.weight_of("opaque") is not None:
            inside = opacity.clamp(1e-3, 1 - 1e-3)
            losses["opaque"] = binary_cross_entropy(inside, inside)
        if "z_variance" in out and self.weight_of("z_variance") is not None:
            solid = opacity > 0.5
            variance = out["z_variance"].where(solid, 0)
            losses["z_variance"] = variance.sum() / solid.sum().clamp(min=1)
        return losses

    # --- pictures ---------------------------------------------------------------------------------

    def picture(self, batch: Dict[str, Any]) -> Dict[str, Any]:
        """What is shown of a view: ``comp_rgb``, ``opacity``, and ``comp_normal`` if there is."""
        return self(batch)

    def save_view(self, name: str, batch: Dict[str, Any], stage: str) -> None:
        """Save colours, normals and opacity of each view of the batch, side by side."""
        out = self.picture(batch)
        for i, index in enumerate(batch["index"]):
            panels = [("rgb", out["comp_rgb"][i], {"data_format": "HWC"})]
            if "comp_normal" in out:
                panels.append(("rgb", out["comp_normal"][i], {"data_format": "HWC"}))
            grey = {"cmap": None, "data_range": (0, 1)}
            panels.append(("grayscale", out["opacity"][i, :, :, 0], grey))
            self.save_image_grid(
                f"it{self.true_global_step}{name}{int(index)}.png",
                [{"type": kind, "img": img, "kwargs": kwargs} for kind, img, kwargs in panels],
                name=stage,
                step=self.true_global_step,
            )

    def validation_step(self, batch, batch_idx):
        self.save_view("-", batch, "validation_step")

    def on_validation_epoch_end(self):
        pass

    def test_step(self, batch, batch_idx):
        self.save_view("-test/", batch, "test_step")

    def on_test_epoch_end(self):
        folder = f"it{self.true_global_step}-test"
        self.save_img_sequence(
            folder, folder, r"(\d+)\.png", fps=30, name="test", step=self.true_global_step
        )
