"""What a browser draws, against our rasteriser: in the page of a run and in the studio."""

import math

import numpy as np
import torch
from lods.gaussians.cameras import intrinsics, orbit, world_to_camera
from lods.gaussians.ply import write_ply
from lods.gaussians.rasterize import rasterization

from tests.browser import patience
from tests.browser.test_run_page import browser, pixels, pytestmark, show  # noqa: F401
from tests.browser.test_studio import made, studio
from tests.run_folders import run_folder
from threestudio.run import drawing
from threestudio.run.page import write_page

AZIMUTH = 0.5  # radians, from where a viewer looks first
FULL = "performance.now = () => 0"  # a viewer that takes no time draws in full
LEVELS = 2.0  # of 255: the mean difference on the object; each layer is rounded to 8 bits


def cloud(count=3000):
    """A shell of flat and of long Gaussians, many of them faint: what is behind shows through."""
    rng = np.random.default_rng(0)
    means = rng.normal(size=(count, 3))
    means *= rng.uniform(0.5, 0.75, (count, 1)) / np.linalg.norm(means, axis=1, keepdims=True)
    colors = 0.5 + 0.45 * np.sin(5 * means + [0, 2, 4])
    parts = {
        "means": means,
        "scales": rng.uniform(math.log(0.008), math.log(0.07), (count, 3)),
        "quats": rng.normal(size=(count, 4)),
        "opacities": rng.uniform(-4, 3, count),
        "sh0": ((colors - 0.5) / 0.28209479177387814)[:, None],
    }
    return {name: torch.from_numpy(part).float() for name, part in parts.items()}


def render(parts, width, height, distance, middle=(0.0, 0.0, 0.0)):
    """Our picture (H, W, 3), 0..255 on white, and its opacity (H, W)."""
    c2w = orbit(1, distance, azimuth=math.degrees(AZIMUTH))
    c2w[:, :3, 3] += torch.tensor(middle)
    rgb = 0.5 + 0.28209479177387814 * parts["sh0"][:, 0]
    K = intrinsics(torch.tensor([math.radians(40)]), min(width, height), min(width, height))
    K[:, 0, 2], K[:, 1, 2] = width / 2, height / 2
    image, alpha, _ = rasterization(
        parts["means"],
        parts["quats"],
        parts["scales"].exp(),
        parts["opacities"].sigmoid(),
        rgb,
        world_to_camera(c2w),
        K,
        width,
        height,
        backgrounds=torch.ones(1, 3),
        backend="cpu",
    )
    return 255 * image[0].clamp(0, 1).numpy(), alpha[0, ..., 0].numpy()


def difference(seen, wanted, opacity, name):
    """The mean on the object, of 255. ``seen`` is a screenshot with the border around the canvas,
    which a layout puts to a fraction of a pixel: so the best of nine places counts."""
    height, width = opacity.shape
    border = (seen.shape[1] - width) // 2
    seen = np.pad(seen, ((2, 2), (2, 2), (0, 0)), "edge")
    best, mask = [], opacity > 0.05
    for y, x in np.ndindex(3, 3):
        y, x = y + border + 1, x + border + 1
        part = seen[y : y + height, x : x + width] - wanted
        best.append((np.abs(part)[mask].mean(), part[mask].mean(axis=0)))
    mean, bias = min(best, key=lambda found: found[0])
    print(f"{name}: mean {mean:.3f}, of which one direction {bias.round(2)}")
    return mean


def size_of(page):
    """The pixels of the canvas, which are those of the screen."""
    find = "(c => [c.width, c.height, c.clientWidth])(document.querySelector('.stage canvas'))"
    width, height, full = page.evaluate(find)
    assert width == full
    return width, height


def test_the_page_of_a_run_has_the_colours_of_its_renders(show, tmp_path):  # noqa: F811
    run, parts = run_folder(tmp_path / "r"), cloud()
    write_ply(run / "save/it30-export/gaussians.ply", **parts)
    page = show(write_page([run]), script=FULL)
    seen = pixels(page, "cloud")
    width, height = size_of(page)
    wanted, opacity = render(parts, width, height, 3.6)
    assert 0.1 < (opacity > 0.05).mean() < 0.6
    assert difference(seen, wanted, opacity, "page") < LEVELS


def test_the_studio_has_the_colours_of_renders(browser, tmp_path):  # noqa: F811
    made(tmp_path, "one")
    file, parts = tmp_path / "runs/one/gaussians.ply", cloud()
    write_ply(file, **parts)
    about = drawing.packed(drawing.read_object(file), drawing.Camera())[0]
    page = browser.new_page(viewport={"width": 500, "height": 600})
    page.add_init_script(FULL)
    with studio(tmp_path) as address:
        page.goto(f"{address}#/run/one")
        page.get_by_role("button", name="Background").click()  # white
        page.evaluate("document.querySelectorAll('.note, .on-stage').forEach(e => e.hidden = true)")
        page.wait_for_selector("canvas[data-state=resting]", timeout=patience.PAGE)
        patience.frames(page)
        seen = pixels(page, "studio cloud")
        width, height = size_of(page)
    page.close()
    wanted, opacity = render(parts, width, height, about["distance"], about["middle"])
    assert difference(seen, wanted, opacity, "studio") < LEVELS


def test_a_mesh_in_the_studio_has_its_colours(browser, tmp_path):  # noqa: F811
    from tests.host.run_pages import write_mesh

    made(tmp_path, "one")
    points = np.array([[0, y, z] for y in (-0.9, 0.9) for z in (-0.9, 0.9)], float)
    rgb = np.tile([[200, 100, 30]], (4, 1)) / 255
    faces = np.array([[0, 2, 1], [1, 2, 3]])
    write_mesh(tmp_path / "runs/one/gaussians.glb", points, rgb, faces)
    page = browser.new_page(viewport={"width": 1280, "height": 860})
    with studio(tmp_path) as address:
        page.goto(f"{address}#/run/one")
        page.get_by_role("button", name="Mesh").click()
        page.wait_for_selector(".on-stage >> text=Shape")
        seen = pixels(page, "studio mesh")
        middle = tuple(side // 2 for side in seen.shape[:2])
        assert np.abs(seen[middle] - [200, 100, 30]).max() <= 1
        page.get_by_role("button", name="Shape").click()
        assert np.ptp(pixels(page, "studio shape")[middle]) <= 1  # grey
    page.close()
