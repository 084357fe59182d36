"""Methods: how a gradient is made out of a frozen model's predictions, one file for each paper.

A method of one's own is a class with one function:

    from lods import scores
    from lods.methods import Method, register

    @register("half-sds")
    class HalfSDS(Method):
        def gradient(self, x_t, t, eps, conditions):
            eps_c, eps_u = self.predict(x_t, t, conditions, conditions.prompt, conditions.null)
            return 0.5 * scores.sds(eps_c, eps_u, eps, self.cfg.guidance_scale, self.weight(t))
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lods.methods.base import Method
    from lods.methods.conditions import Conditions, Prompts
    from lods.methods.learning import LearningMethod
    from lods.methods.losses import Losses
    from lods.methods.registry import find, names, register

__all__ = [
    "Conditions",
    "LearningMethod",
    "Losses",
    "Method",
    "Prompts",
    "find",
    "names",
    "register",
]
_WHERE = {
    "Conditions": "conditions",
    "LearningMethod": "learning",
    "Losses": "losses",
    "Method": "base",
    "Prompts": "conditions",
    "find": "registry",
    "names": "registry",
    "register": "registry",
}


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
