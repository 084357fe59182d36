"""``dreamfusion-system``: score distillation of a radiance field (arXiv:2209.14988)."""

from dataclasses import dataclass

import threestudio
from threestudio.systems.guided import GuidedSystem
from threestudio.utils.typing import *


@threestudio.register("dreamfusion-system")
class DreamFusion(GuidedSystem):
    """The guidance looks at the rendered colours. It and the prompt's text model are loaded where
    training begins, so that a test or an export needs neither; what a guidance learns is therefore
    not optimised here (see ``prolificdreamer-system``). Losses: :class:`GuidedSystem`."""

    @dataclass
    class Config(GuidedSystem.Config):
        pass

    cfg: Config

    @property
    def renders_latents(self) -> bool:
        """Whether ``comp_rgb`` is latents, not colours."""
        return False

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self.build_guidance()

    def training_step(self, batch, batch_idx):
        out = self(batch)
        guided = self.guidance(
            out["comp_rgb"],
            self.prompt_processor(),
            **batch,
            rgb_as_latents=self.renders_latents,
        )
        return self.total(guided, self.field_losses(out))
