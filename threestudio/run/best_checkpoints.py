"""Lightning's ``ModelCheckpoint`` without its trust in the paths that a checkpoint holds."""

import os
from pathlib import PurePath
from typing import Any

import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor

from threestudio.utils.checkpoint_files import is_checkpoint_of


class BestCheckpoints(ModelCheckpoint):
    """``ModelCheckpoint``, which keeps the last or the best checkpoints and removes others.

    Lightning restores the paths that it is going to remove from the checkpoint that is resumed,
    whoever wrote that. Here only the names of files count: a name that stands for a regular
    ``.ckpt`` file in this run's own folder of checkpoints is one of this run's, in a copied or
    moved run too, and every other one is forgotten. The best and the worst of them are found anew
    from their scores.
    """

    def __init__(self, dirpath: Any = None, *args, **kwargs) -> None:
        super().__init__(dirpath, *args, **kwargs)
        # asked here: Lightning keeps what the link leads to
        self._linked = dirpath is not None and os.path.islink(os.path.normpath(dirpath))

    @property
    def state_key(self) -> str:
        # that of Lightning's class: checkpoints of before, and of upstream, are continued
        return super().state_key.replace(type(self).__qualname__, ModelCheckpoint.__qualname__, 1)

    def load_state_dict(self, state_dict: Any) -> None:
        state = state_dict if isinstance(state_dict, dict) else {}
        if self.monitor is None:
            self.best_model_path = self._own(state.get("best_model_path"))
            return
        scores = state.get("best_k_models")
        found = {
            path: score
            for stored, score in (scores.items() if isinstance(scores, dict) else ())
            if (path := self._own(stored)) and _is_score(score)
        }
        if not found:
            return
        best, worst = (min, max) if self.mode == "min" else (max, min)
        ordered = sorted(found, key=lambda path: float(found[path]), reverse=best is max)
        if self.save_top_k > 0:  # a resumed run may be told to keep fewer
            ordered = ordered[: self.save_top_k]
        self.best_k_models = {path: found[path] for path in ordered}
        self.best_model_path = best(self.best_k_models, key=self.best_k_models.get)
        self.best_model_score = self.best_k_models[self.best_model_path]
        if len(self.best_k_models) == self.save_top_k:
            self.kth_best_model_path = worst(self.best_k_models, key=self.best_k_models.get)
            self.kth_value = self.best_k_models[self.kth_best_model_path]

    def _own(self, path: Any) -> str:
        """The file of that name in this run's folder, or "". A folder that is a link may be that of
        others' files."""
        name = PurePath(path).name if isinstance(path, str) else ""
        if not name or "\0" in name or name == "last.ckpt" or self.dirpath is None:
            return ""
        if self._linked:
            return ""
        own = os.path.join(self.dirpath, name)
        return own if is_checkpoint_of(own, self.dirpath) else ""


def _is_score(value: Any) -> bool:
    return isinstance(value, Tensor) and value.shape == () and bool(torch.isfinite(value).all())
