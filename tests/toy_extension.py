"""A system, its data and a Lift3D system as small as they can be, loaded as an extension."""

import os
import random
import signal
from dataclasses import dataclass

import numpy as np
import pytorch_lightning as pl
import torch

import threestudio
from threestudio.models.exporters.base import Exporter, ExporterOutput
from threestudio.models.geometry.base import BaseGeometry
from threestudio.models.renderers.base import Rasterizer
from threestudio.systems.base import BaseLift3DSystem, BaseSystem
from threestudio.utils.base import Updateable
from threestudio.utils.config import parse_structured
from threestudio.utils.typing import *

LIFT = {  # the parts of a ToyLift3D
    "geometry_type": "toy-geometry",
    "geometry": {"size": 3},
    "material_type": "no-material",
    "background_type": "solid-color-background",
    "renderer_type": "toy-renderer",
}


class Endless(torch.utils.data.IterableDataset, Updateable):
    def __iter__(self):
        while True:
            yield {"x": torch.ones(1)}


@dataclass
class ToyDataConfig:
    n_views: int = 2


@threestudio.register("toy-data")
class ToyData(pl.LightningDataModule):
    def __init__(self, cfg=None):
        super().__init__()
        self.cfg = parse_structured(ToyDataConfig, cfg)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(Endless(), batch_size=None)

    def val_dataloader(self):
        return torch.utils.data.DataLoader([{"index": i} for i in range(self.cfg.n_views)])

    test_dataloader = predict_dataloader = val_dataloader


@threestudio.register("toy-system")
class ToySystem(BaseSystem):
    """Noise from all global generators in the loss; validation draws from them too."""

    @dataclass
    class Config(BaseSystem.Config):
        prompt: str = ""
        nan_at: int = -1
        signal_at: int = -1
        signal: str = "SIGINT"

    def configure(self):
        self.body = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 1))
        self.empty = torch.nn.ReLU()
        self.validated, self.tested, self.seen = [], [], []

    def training_step(self, batch, batch_idx):
        self.seen.append(self.true_global_step)
        if self.true_global_step == self.cfg.signal_at and self.seen.count(self.cfg.signal_at) == 1:
            os.kill(os.getpid(), getattr(signal, self.cfg.signal))
        noise = torch.randn(5, 4) + np.random.rand() + random.gauss(0, 1)  # noqa: NPY002
        loss = self.body(noise).square().mean()
        if self.true_global_step == self.cfg.nan_at:
            loss = loss * float("nan")
        self.log("train/loss_toy", loss)
        return {"loss": loss}

    def validation_step(self, batch, batch_idx):
        torch.randn(batch_idx + 1), np.random.rand(3), random.random()  # noqa: NPY002
        self.validated.append(self.true_global_step)

    def on_validation_epoch_end(self):
        pass

    def test_step(self, batch, batch_idx):
        self.tested.append(self.true_global_step)
        value = float(sum(p.sum() for p in self.parameters()))
        self.save_json(f"it{self.true_global_step}-test.json", {"sum": value})

    def predict_step(self, batch, batch_idx):
        pass

    def result_summary(self):
        return [f"the toy was tested at {sorted(set(self.tested))}"]


@threestudio.register("toy-faulty-system")
class ToyFaultySystem(ToySystem):
    """Goes wrong in the way of `fault` in the steps `at` to `at + n - 1`."""

    @dataclass
    class Config(ToySystem.Config):
        fault: str = ""  # loss | constant | gradient | parameter | cuda | memory | allocation
        at: int = 2
        n: int = 1
        manual: bool = False

    def configure(self):
        super().configure()
        self.automatic_optimization = not self.cfg.manual

    def faulty(self, *kinds):
        now = self.cfg.at <= self.true_global_step < self.cfg.at + self.cfg.n
        return now and self.cfg.fault in kinds

    def training_step(self, batch, batch_idx):
        if self.faulty("cuda"):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU")
        if self.faulty("memory"):
            raise MemoryError
        if self.faulty("allocation"):
            torch.empty(2**58)
        loss = super().training_step(batch, batch_idx)["loss"]
        if self.faulty("loss"):
            self.loss_terms = {"loss_toy": loss.detach() / 0, "loss_other": torch.ones(())}
            loss = loss / 0
        if self.faulty("constant") and batch_idx % 2 == 0:  # the gradients stay finite
            loss = loss + float("nan")
        if self.faulty("gradient"):  # sqrt at 0: a finite loss, and 0 * inf in two elements
            loss = loss + (0 * self.body[0].weight[0, :2]).sqrt().sum()
        if self.cfg.manual:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            self.spoil()
        return {"loss": loss}

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self.spoil()

    def spoil(self):
        if self.cfg.fault == "parameter" and self.true_global_step == self.cfg.at + self.cfg.manual:
            self.body[1].bias.data.fill_(float("inf"))


@threestudio.register("toy-geometry")
class ToyGeometry(BaseGeometry):
    @dataclass
    class Config(BaseGeometry.Config):
        size: int = 2

    def configure(self):
        self.points = torch.nn.Parameter(torch.zeros(self.cfg.size))
        self.updates = []

    def update_step(self, epoch, global_step, on_load_weights=False):
        self.updates.append((epoch, global_step, on_load_weights))


@threestudio.register("toy-grown-geometry")
class ToyGrownGeometry(ToyGeometry):
    @staticmethod
    def create_from(other, cfg=None, copy_net=True, **kwargs):
        grown = ToyGrownGeometry(cfg)
        grown.points.data = other.points.data.repeat(2)
        grown.copied_net = copy_net
        return grown


@threestudio.register("toy-renderer")
class ToyRenderer(Rasterizer):
    def forward(self, **batch):
        return {"comp_rgb": self.geometry.points.mean() + torch.randn(()) * 0.1}


@threestudio.register("toy-exporter")
class ToyExporter(Exporter):
    def __call__(self):
        points = self.geometry.points.detach().tolist()
        return [ExporterOutput("points.json", "json", {"payload": points})]


@threestudio.register("toy-lift3d-system")
class ToyLift3D(BaseLift3DSystem):
    def training_step(self, batch, batch_idx):
        return {"loss": (self.renderer(**batch)["comp_rgb"] - 1).square()}

    def validation_step(self, batch, batch_idx):
        pass

    def on_validation_epoch_end(self):
        pass

    def test_step(self, batch, batch_idx):
        pass

    def on_test_epoch_end(self):
        pass
