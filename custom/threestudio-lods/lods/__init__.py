"""Score distillation: methods, models, learned parts and Gaussians, without a 3D framework.

    import lods

    method = lods.load("lods-lora", prompt="a blue backpack")
    losses = method(images)           # (B, 3, H, W) in 0..1, from a renderer of your own
    losses.total.backward()

Importing this is light: torch and the model libraries are imported when something of them is used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lods import assets, cameras, gaussians, learned, meshes, methods, models, scores
    from lods.cameras import Cameras
    from lods.methods.base import Method
    from lods.methods.losses import Losses
    from lods.methods.registry import register
    from lods.pictures import save_images

__version__ = "0.2.0"
__all__ = [
    "Cameras",
    "Losses",
    "Method",
    "__version__",
    "assets",
    "cameras",
    "gaussians",
    "learned",
    "load",
    "meshes",
    "methods",
    "models",
    "register",
    "save_images",
    "scores",
]
_PACKAGES = ("assets", "cameras", "gaussians", "learned", "meshes", "methods", "models", "scores")
_WHERE = {
    "Cameras": "lods.cameras",
    "Losses": "lods.methods.losses",
    "Method": "lods.methods.base",
    "register": "lods.methods.registry",
    "save_images": "lods.pictures",
}


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return importlib.import_module(f"lods.{name}")
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def load(
    method: str,
    model: Any = "pocket",
    prompt: str = "",
    negative_prompt: str = "",
    device: Any = None,
    **settings: Any,
) -> "Method":
    """A method with its model and its prompt, ready to be called.

        method = lods.load("lods-embedding", prompt="a blue backpack", guidance_scale=7.5)
        optimizer = torch.optim.Adam([{"params": [latents]}, {"params": method.parameters()}])
        losses = method(latents=latents)
        losses.total.backward()

    Args:
        method: a name of :func:`lods.methods.names`, such as lods-lora, lods-embedding, lods-sds
            (the ``lods-`` may be left out), or one registered from outside.
        model: a name for :func:`lods.models.load` (a card, a diffusers folder, a hub id, "auto"),
            or a model that follows :class:`lods.models.base.Model`.
        prompt: what to make; views are told by words that are added to it, such as "side view",
            or, with ``cameras="tokens"`` and a model that understands them, by the camera itself.
        negative_prompt: the null prompt of the formulas.
        device: of a model that is loaded here; by default the CUDA device, or the CPU.
        settings: fields of the method's ``Config``, of
            :class:`lods.models.memory.ModelSettings`, and of :class:`lods.prompts.TextSettings`.

    Returns an ``nn.Module`` whose parameters are the learned part: ``method(images, cameras)``
    gives :class:`lods.Losses`, ``method.step(i)`` moves its schedules to step i, and
    ``method.save(path)`` writes the learned part.

    Raises ``ValueError``, one line, for a name, a prompt or a setting that makes no sense, before
    anything is loaded.
    """
    from lods.loading import load_method

    return load_method(method, model, prompt, negative_prompt, device, settings)
