"""The callbacks of a run, under the names that upstream has for them."""

from threestudio.run.progress import CustomProgressBar, ProgressCallback
from threestudio.run.snapshot_callbacks import (
    CodeSnapshotCallback,
    ConfigSnapshotCallback,
    VersionedCallback,
)

__all__ = [
    "CodeSnapshotCallback",
    "ConfigSnapshotCallback",
    "CustomProgressBar",
    "ProgressCallback",
    "VersionedCallback",
]
