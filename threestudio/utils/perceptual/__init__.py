"""LPIPS, the learned distance between pictures: ``PerceptualLoss``."""

from .perceptual import PerceptualLoss

__all__ = ["PerceptualLoss"]
