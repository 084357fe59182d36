"""Systems: what is optimised, and how. Importing this package registers the built-in ones."""

from threestudio.systems import base, dreamfusion, latentnerf, prolificdreamer, utils

__all__ = ["base", "dreamfusion", "latentnerf", "prolificdreamer", "utils"]
