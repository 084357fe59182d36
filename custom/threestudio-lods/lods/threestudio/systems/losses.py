"""The losses of a system and their weights."""

from typing import Any

import torch
from jaxtyping import Float
from lods.threestudio.systems.coverage import Coverage
from torch import Tensor

from threestudio.systems.base import BaseLift3DSystem
from threestudio.utils.ops import binary_cross_entropy

# the guidances of this extension return some of these; a YAML may weigh all of them, so that the
# guidance can be changed in one line
GUIDANCE_LOSSES = ("sds", "lora", "embedding")


class Losses(BaseLift3DSystem):
    """Those of the guidance and the regularisers, weighed by ``system.loss`` and logged; see
    :class:`lods.threestudio.systems.base.LODSSystem`."""

    coverage: Coverage
    REGULARISERS: tuple[str, ...] = ("sparsity", "opaque")

    def on_fit_start(self) -> None:
        super().on_fit_start()
        scaled = getattr(self.trainer.precision_plugin, "scaler", None) is not None
        if scaled and hasattr(self.guidance, "loss_is_scaled"):
            self.guidance.loss_is_scaled()

    def loss_of(self, out: dict[str, Any], batch: dict[str, Any]) -> Float[Tensor, ""]:
        """The total loss of a rendered batch, with its parts logged."""
        self.coverage.see(out["opacity"], self._everywhere)
        image = self.guided_image(out)
        guided = self.guidance(image, self.prompt_utils, **batch, rgb_as_latents=False)
        for name, value in guided.items():
            if not name.startswith("loss_") and _is_scalar(value):
                self.note(f"train/{name}", value)
        losses = {k[len("loss_") :]: v for k, v in guided.items() if k.startswith("loss_")}
        loss = self.weigh(losses | self.regularisers(out))
        self.log("train/loss", loss.detach(), prog_bar=True)
        return loss

    def _everywhere(self, here: bool) -> bool:
        """Whether `here` is true in all processes."""
        return self.trainer.strategy.reduce_boolean_decision(here, all=True)

    def on_train_end(self) -> None:
        super().on_train_end()
        self.coverage.finish(self._everywhere)

    def guided_image(self, out: dict[str, Any]) -> Float[Tensor, "B H W 3"]:
        """What of a rendered batch the guidance looks at."""
        return out["comp_rgb"]

    def note(self, name: str, value: Any) -> None:
        """``self.log``, on the steps that loggers write only (``trainer.log_every_n_steps``): a
        dozen calls take Lightning several milliseconds."""
        every = self.trainer.log_every_n_steps
        if every and (self.global_step + 1) % every == 0:
            self.log(name, float(value.detach() if isinstance(value, Tensor) else value))

    def regularisers(self, out: dict[str, Any]) -> dict[str, Float[Tensor, ""]]:
        """The losses of the class docstring whose lambda stands in the YAML, by name."""
        losses = {}
        if self.wants("sparsity"):
            losses["sparsity"] = (out["opacity"] ** 2 + 0.01).sqrt().mean()
        if self.wants("opaque"):
            clamped = out["opacity"].clamp(1e-3, 1 - 1e-3)
            losses["opaque"] = binary_cross_entropy(clamped, clamped)
        return losses

    def wants(self, name: str) -> bool:
        """Whether the YAML weighs this loss."""
        return f"lambda_{name}" in self.cfg.loss

    def weigh(self, losses: dict[str, Float[Tensor, ""]]) -> Float[Tensor, ""]:
        """sum_i C(lambda_i) * loss_i, with losses and lambdas logged.

        Raises ValueError for a loss without a lambda, and for a lambda without a loss.
        """
        known = {f"lambda_{name}" for name in {*losses, *self.REGULARISERS, *GUIDANCE_LOSSES}}
        for key in self.cfg.loss:
            if key not in known:
                raise ValueError(
                    f"system.loss.{key} weighs a loss that does not exist: the keys are "
                    f"{', '.join(sorted(known))}"
                )
        total = 0.0
        self.loss_terms = {
            f"loss_{name}": torch.as_tensor(value).detach() for name, value in losses.items()
        }
        for name, value in losses.items():
            key = f"lambda_{name}"
            if key not in self.cfg.loss:
                raise ValueError(
                    f"{self.cfg.guidance_type} returns loss_{name} but system.loss has no {key}: "
                    f"add system.loss.{key}=1.0 to the configuration"
                )
            self.note(f"train/loss_{name}", value)
            total = total + value * self._weight(key)
        for key in self.cfg.loss:
            self.note(f"train_params/{key}", self._weight(key))
        return total

    def _weight(self, key: str) -> float:
        try:
            return self.C(self.cfg.loss[key])
        except TypeError as error:
            raise ValueError(f"system.loss.{key}: {error} (0 for none)") from None


def _is_scalar(value: Any) -> bool:
    return isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.numel() == 1)
