from dataclasses import dataclass

import torch

from threestudio import find, info, register
from threestudio.systems.base import BaseLift3DSystem
from threestudio.utils.ops import binary_cross_entropy
from threestudio.utils.typing import *


@register("noise-score-system")
class NoiseScoreSystem(BaseLift3DSystem):
    @dataclass
    class Config(BaseLift3DSystem.Config):
        visualize_samples: bool = False

    cfg: Config

    def configure(self):
        super().configure()

    def forward(self, batch: Dict[str, Any]) -> Dict[str, Any]:
        return {**self.renderer(**batch)}

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self.prompt_processor = find(self.cfg.prompt_processor_type)(self.cfg.prompt_processor)
        self.guidance = find(self.cfg.guidance_type)(self.cfg.guidance)
        info("guidance is ready")

    def extra_loss(self, out: Dict[str, Any]) -> Float[Tensor, ""]:
        return torch.zeros((), device=out["comp_rgb"].device)

    def training_step(self, batch, batch_idx):
        out = self(batch)
        guidance_out = self.guidance(
            out["comp_rgb"], self.prompt_processor(), **batch, rgb_as_latents=False
        )
        loss = self.extra_loss(out)
        for name, value in guidance_out.items():
            self.log(f"train/{name}", value)
            if name.startswith("loss_"):
                loss = loss + value * self.C(self.cfg.loss[name.replace("loss_", "lambda_")])
        opacity = out["opacity"].clamp(1e-3, 1 - 1e-3)
        loss = loss + self.C(self.cfg.loss.lambda_opaque) * binary_cross_entropy(opacity, opacity)
        for name, value in self.cfg.loss.items():
            self.log(f"train_params/{name}", self.C(value))
        return {"loss": loss}

    def _save(self, batch, out, folder=""):
        self.save_image_grid(
            f"it{self.true_global_step}{folder}/{batch['index'][0]}.png",
            [{"type": "rgb", "img": out["comp_rgb"][0], "kwargs": {"data_format": "HWC"}}]
            + [
                {
                    "type": "grayscale",
                    "img": out["opacity"][0, :, :, 0],
                    "kwargs": {"cmap": None, "data_range": (0, 1)},
                }
            ],
            name="step",
            step=self.true_global_step,
        )

    def validation_step(self, batch, batch_idx):
        self._save(batch, self(batch), "-val")

    def on_validation_epoch_end(self):
        pass

    def test_step(self, batch, batch_idx):
        self._save(batch, self(batch), "-test")

    def on_test_epoch_end(self):
        self.save_img_sequence(
            f"it{self.true_global_step}-test",
            f"it{self.true_global_step}-test",
            r"(\d+)\.png",
            save_format="mp4",
            fps=30,
            name="test",
            step=self.true_global_step,
        )
