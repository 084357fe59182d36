"""For guidance that reads no text."""

from dataclasses import dataclass

import torch

import threestudio
from threestudio.models.prompt_processors.base import PromptProcessor
from threestudio.utils.typing import *


@threestudio.register("dummy-prompt-processor")
class DummyPromptProcessor(PromptProcessor):
    """Loads no model: every embedding is one zero, whatever the prompt (which may be empty)."""

    @dataclass
    class Config(PromptProcessor.Config):
        pretrained_model_name_or_path: str = ""
        prompt: str = ""
        use_cache: bool = False

    cfg: Config

    def preprocess_prompt(self, prompt: str) -> str:
        return prompt

    def fingerprint(self) -> Optional[str]:
        return None

    def encode(self, texts: List[str]) -> Tuple[Float[Tensor, "N 1 1"], List[int]]:
        return torch.zeros(len(texts), 1, 1), [1] * len(texts)
