"""An extension that registers a callback, linked into the ``custom/`` of a test."""

from pytorch_lightning.callbacks import Callback

import threestudio


@threestudio.register("toy-recorder")
class Recorder(Callback):
    """Writes a line per stage into the file `path`: its name, and the callbacks before this one."""

    def __init__(self, path: str, every: int = 1, share: float | None = None) -> None:
        if every < 1:
            raise ValueError(f"every must be above 0, not {every}")
        self.path = path

    def setup(self, trainer, pl_module, stage: str) -> None:
        before = trainer.callbacks[: trainer.callbacks.index(self)]
        words = [trainer.state.fn.value, *(type(each).__name__ for each in before)]
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(f"{' '.join(words)}\n")
