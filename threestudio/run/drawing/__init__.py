"""Objects of runs, drawn by a browser: for the page of a run, and for whoever shows one elsewhere.

:mod:`.objects` reads the file of an object and packs it, ``viewer.js`` unpacks and draws it with
WebGL 2 and turns it by mouse, finger and keys. Nothing here imports torch.

The viewer is our own, 19 KB that lie in every page. The libraries that draw Gaussians stand on
three.js (2.1 MB) and have 0.6 MB (@mkkellogg/gaussian-splats-3d 0.4.7) or, minified, 2.7 MB
(@sparkjsdev/spark 2.2.0), of the 5 MB that a page may have. Both start workers and run WebAssembly,
which a policy that lets one script run by its hash does not allow.
"""

from pathlib import Path

from threestudio.run.drawing.objects import (
    Camera,
    Splats,
    Triangles,
    fewer,
    left_out,
    packed,
    read_object,
)

__all__ = [
    "BUDGET",
    "VIEWER",
    "Camera",
    "Splats",
    "Triangles",
    "fewer",
    "left_out",
    "packed",
    "read_object",
]

BUDGET = 120_000  # Gaussians or triangles that a browser draws at a time
VIEWER = Path(__file__).with_name("viewer.js")  # a module: it exports Camera and Viewer
