"""Files that are written, imported and rendered by Blender, against our own renders.

It takes a Python that has Blender's package (``pip install bpy`` in an environment of its own, some
500 MB): LODS_BLENDER=/tmp/blender/bin/python pytest -m slow tests/assets/test_blender.py.
"""

import json
import math
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from lods import assets
from lods.gaussians.cameras import orbit
from lods.meshes import TexturedMesh, textured
from PIL import Image

from tests.assets.test_colours import LEVELS, textured_chart
from tests.assets.things import ball, chart_mesh
from tests.viewer_table import note

BLENDER = os.environ.get("LODS_BLENDER")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BLENDER is None, reason="LODS_BLENDER names no Python that has bpy"),
]
SIZE, FOVY = 256, 40.0
NEAR = 0.8 / math.tan(math.radians(FOVY / 2))  # 160 pixels a unit: a field of the chart has 32
# from our world to Blender's: what glTF's importer makes of our axes; of other files they stay
TURNED = {".glb": torch.tensor([[0.0, 1, 0, 0], [-1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])}
THINGS = {  # what, the files of it, and the camera: distance, elevation, azimuth
    "chart": (textured_chart, (".glb", ".obj"), (NEAR, 0.0, 0.0)),
    "colours": (chart_mesh, (".glb", ".ply"), (NEAR, 0.0, 0.0)),
    "ball": (ball, (".glb", ".obj"), (3.4, 25.0, 40.0)),
}
KINDS = [(name, end) for name, (_, ends, _) in THINGS.items() for end in ends]


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    """``{(name, end): (Blender's picture, ours)}``, (H, W, 4) 0..255, of one start of Blender."""
    folder, jobs, ours = tmp_path_factory.mktemp("blender"), [], {}
    for name, (make, ends, camera) in THINGS.items():
        mesh = make()
        c2w = orbit(1, *camera)
        images, alphas, _ = TexturedMesh(textured(mesh, 512)).render(c2w, SIZE, SIZE, fovy=FOVY)
        ours[name] = 255 * torch.cat([images[0].clamp(0, 1), alphas[0]], dim=-1).detach().numpy()
        for end in ends:
            file = folder / f"{name}{end}"
            assets.write(file, mesh)
            turned = TURNED.get(end, torch.eye(4)) @ c2w[0]
            job = {"file": str(file), "picture": str(file.with_suffix(f"{end}.png"))}
            jobs.append(job | {"camera": turned.tolist(), "fovy": FOVY, "size": SIZE})
    (folder / "jobs.json").write_text(json.dumps(jobs))
    script = Path(__file__).with_name("blender_render.py")
    words = [str(BLENDER), str(script), str(folder / "jobs.json")]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found = {}
    for (name, end), job in zip(KINDS, jobs):
        with Image.open(job["picture"]) as picture:
            found[name, end] = np.asarray(picture.convert("RGBA"), float), ours[name]
    return found


@pytest.mark.parametrize(("name", "end"), KINDS)
def test_blender_shows_the_colours_of_our_renders(rendered, name, end):
    theirs, own = rendered[name, end]
    assert np.abs(theirs[..., 3] - own[..., 3]).mean() < LEVELS  # the same place and size
    whole = (theirs[..., 3] > 254) & (own[..., 3] > 254)
    assert whole.mean() > 0.2
    apart = np.abs(theirs - own)[whole][:, :3]
    note("Blender", f"{name}{end}", apart)
    assert apart.mean() < LEVELS
