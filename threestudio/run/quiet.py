"""What libraries say about things that are as they should be here, kept from the user."""

import logging
import os
import warnings

_NOISE = (
    ".*does not have many workers.*",
    ".*GPU available but not used.*",
    ".*Checkpoint directory .* exists and is not empty.*",
    ".*resuming from a checkpoint that ended.*",
    ".*callbacks used to create the checkpoint.*",
    ".*The dirpath has changed from.*",
    ".*isinstance.treespec, LeafSpec.*",
    ".*LeafSpec.*is deprecated.*",
    ".*in eval mode at the start of training.*",
    ".*torchvision.*",
    ".*Experiment logs directory .* exists and is not empty.*",
    ".*`training_step` returned `None`.*",
    ".*predict returned None.*",
    ".*lr_scheduler.step.*before.*optimizer.step.*",
)


class _NotLightning(logging.Filter):
    """Drops what Lightning tells about itself (extensions log through the same logger)."""

    def filter(self, record):
        own = "pytorch_lightning" in record.pathname or "lightning_fabric" in record.pathname
        return record.levelno >= logging.WARNING or not own


def quieten(verbose: bool) -> None:
    """Filter warnings and logs, unless `verbose`. Importing Lightning undoes a part of it."""
    for name in ("pytorch_lightning", "pytorch_lightning.utilities.rank_zero", "lightning_fabric"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.DEBUG if verbose else logging.INFO)
        for handler in (logger, *logger.handlers):
            for old in [f for f in handler.filters if isinstance(f, _NotLightning)]:
                handler.removeFilter(old)
            if not verbose:
                handler.addFilter(_NotLightning())
    if not verbose:
        for message in _NOISE:
            warnings.filterwarnings("ignore", message=message)
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
