from dataclasses import dataclass

import torch

import threestudio
from threestudio.systems.base import BaseLift3DSystem
from threestudio.systems.utils import parse_optimizer, parse_scheduler
from threestudio.utils.loss import tv_loss
from threestudio.utils.typing import *


@threestudio.register("two-optimizers-system")
class TwoOptimizers(BaseLift3DSystem):
    """Points that grow in number have an optimizer of their own, and the background has another."""

    @dataclass
    class Config(BaseLift3DSystem.Config):
        grow_at: int = 0
        grow_by: int = 5
        background_optimizer: dict = None
        background_scheduler: dict = None

    cfg: Config

    def configure(self) -> None:
        super().configure()
        self.automatic_optimization = False
        self.prompt_processor = threestudio.find(self.cfg.prompt_processor_type)(
            self.cfg.prompt_processor
        )
        self.prompt_utils = self.prompt_processor()

    def configure_optimizers(self):
        points = parse_optimizer(self.cfg.optimizer, self)
        other = parse_optimizer(self.cfg.background_optimizer, self)
        return [
            {"optimizer": points},
            {
                "optimizer": other,
                "lr_scheduler": parse_scheduler(self.cfg.background_scheduler, other),
            },
        ]

    def forward(self, batch: Dict[str, Any]) -> Dict[str, Any]:
        self.renderer.background.train(self.training)
        return self.renderer.batch_forward(batch)

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self.guidance = threestudio.find(self.cfg.guidance_type)(self.cfg.guidance)

    def training_step(self, batch, batch_idx):
        points, other = self.optimizers()
        out = self(batch)
        guidance_out = self.guidance(out["comp_rgb"], self.prompt_utils, **batch)
        loss = self.C(self.cfg.loss["lambda_tv"]) * tv_loss(out["comp_rgb"].permute(0, 3, 1, 2))
        for name, value in guidance_out.items():
            self.log(f"train/{name}", value)
            if name.startswith("loss_"):
                loss = loss + value * self.C(self.cfg.loss[name.replace("loss_", "lambda_")])
        self.manual_backward(loss)
        for optimizer in (points, other):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.lr_schedulers().step()
        if batch_idx == self.cfg.grow_at:
            self._grow(points)
        return {"loss": loss}

    def _grow(self, optimizer) -> None:
        old = [self.geometry._xyz, self.geometry._color, self.geometry._opacity]
        self.geometry.grow(self.cfg.grow_by)
        new = [self.geometry._xyz, self.geometry._color, self.geometry._opacity]
        for group, a, b in zip(optimizer.param_groups, old, new):
            state = optimizer.state.pop(a)
            for key in ("exp_avg", "exp_avg_sq"):
                more = torch.zeros_like(b[len(a) :])
                state[key] = torch.cat([state[key], more])
            optimizer.state[b] = state
            group["params"] = [b]

    def validation_step(self, batch, batch_idx):
        out = self(batch)
        self.save_rgb_image(f"it{self.true_global_step}-val.png", out["comp_rgb"][0])

    def on_validation_epoch_end(self):
        pass

    def test_step(self, batch, batch_idx):
        out = self(batch)
        path = f"it{self.true_global_step}-test/{batch['index'][0]}.png"
        threestudio.debug(self.get_save_path(path))
        self.save_rgb_image(path, out["comp_rgb"][0])

    def on_test_epoch_end(self):
        step = self.true_global_step
        self.save_img_sequence(f"it{step}-test", f"it{step}-test", r"(\d+)\.png", fps=30)

    def on_load_checkpoint(self, ckpt_dict) -> None:
        # the number of points is that of the checkpoint; the base class is not called
        missing = ckpt_dict["state_dict"]["geometry._xyz"].shape[0] - len(self.geometry._xyz)
        if missing > 0:
            self.geometry.grow(missing)
