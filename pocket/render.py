"""Pictures of the pocket world's objects, by VTK without a display (PyPI: ``pyvista``).

Three directional lights and a quarter of ambient light, no highlights, so that a point of the
surface has one brightness from everywhere. A picture is drawn at twice the size and averaged; its
transparency is kept, so that any background can be laid under it later.
"""

import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from pocket.assets import find_entry, rotation, unpack
from pocket.colours import level, paint
from pocket.tools import say, whole_file
from pocket.world import HALF_SIDE, OBJECTS, SIZE, Object, cameras

LIGHTS = (((1, 2, 2), 0.55), ((-2, 1, 1), 0.26), ((0, 2, -2), 0.28))  # where from, how bright
AMBIENT = 0.26
LARGEST_TEXTURE = 512  # pixels of a side
SEED = 20
LEVEL_VIEWS = 12  # from which the brightness of the painted part is taken


class Stage:
    """One object under the lights; ``picture`` photographs it.

    ``obj`` is the path of an OBJ file with the y axis up and its front towards +z; ``rotation`` a
    3 x 3 matrix applied to it first, ``turn`` degrees about the vertical after it.
    """

    def __init__(self, obj: Path, rotation: np.ndarray, turn: float, size: int = SIZE):
        pyvista = _pyvista()
        angle = np.radians(turn)
        about = np.array(
            [[np.cos(angle), 0, np.sin(angle)], [0, 1, 0], [-np.sin(angle), 0, np.cos(angle)]]
        )
        parts = _parts(obj)
        points = [np.asarray(part.vertices) @ (about @ rotation).T for part in parts]
        low = np.min([p.min(0) for p in points], axis=0)
        high = np.max([p.max(0) for p in points], axis=0)
        scale = 2 * HALF_SIDE / (high - low).max()
        plotter = pyvista.Plotter(off_screen=True, lighting="none", window_size=[2 * size] * 2)
        for part, where in zip(parts, points, strict=True):
            surface = pyvista.PolyData.from_regular_faces(
                (where - (low + high) / 2) * scale, np.asarray(part.faces)
            )
            colour, texture = _look(part)
            if texture is not None:
                surface.active_texture_coordinates = np.asarray(part.visual.uv, np.float32)
            # Edges sharper than 40 degrees stay edges.
            smooth: Any = surface.compute_normals(
                cell_normals=False,
                split_vertices=True,
                feature_angle=40.0,
                consistent_normals=False,
            )
            actor = plotter.add_mesh(
                smooth, color=colour, texture=texture, ambient=AMBIENT, diffuse=1.0, specular=0.0,
                smooth_shading=True, show_scalar_bar=False,
            )  # fmt: skip
            actor.ForceOpaqueOn()  # a texture's pixel is there or not: none is half transparent
        for where, brightness in LIGHTS:
            light = pyvista.Light(position=where, focal_point=(0, 0, 0), intensity=brightness)
            light.positional = False
            plotter.add_light(light)
        self.plotter = plotter

    def picture(self, elevation, azimuth, distance, fovy) -> np.ndarray:
        """uint8 (2 size, 2 size, 4), straight alpha: seen from a camera as in ``cameras``."""
        e, a = np.radians([elevation, azimuth])
        camera = self.plotter.camera
        towards = np.array([np.sin(a) * np.cos(e), np.sin(e), np.cos(a) * np.cos(e)])
        camera.position = distance * towards
        camera.focal_point = (0, 0, 0)
        camera.up = (0, 1, 0)
        camera.view_angle = fovy
        camera.clipping_range = (distance - 1.6, distance + 1.6)
        self.plotter.render()
        shot = self.plotter.screenshot(transparent_background=True, return_img=True)
        return np.asarray(shot)

    def close(self):
        self.plotter.close()


def _pyvista():
    try:
        import pyvista
    except ImportError:
        raise ValueError("The objects are rendered with pyvista: pip install pyvista") from None
    return pyvista


def _parts(obj: Path) -> list:
    """The meshes of an OBJ file, one a material."""
    import trimesh

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of lines that trimesh skips
        scene = trimesh.load_scene(obj, process=False, group_material=True, split_object=False)
    return [part for part in scene.geometry.values() if len(getattr(part, "faces", ()))]


def _look(part):
    """(colour, texture) of a mesh. A texture is shown as it is: these models' materials have any
    colour beside it."""
    material = part.visual.material
    image = getattr(material, "image", None)
    if image is None or part.visual.uv is None:
        return [float(c) / 255 for c in material.diffuse[:3]], None
    # Mipmaps make Mesa's software renderer hang on faces without extent in the texture; a texture
    # of about the picture's size does without.
    image = image.convert("RGBA")
    image.thumbnail((LARGEST_TEXTURE, LARGEST_TEXTURE))
    pixels = np.asarray(image).copy()
    pixels[..., 3] = np.where(pixels[..., 3] < 128, 0, 255)
    if (pixels[..., 3] == 255).all():
        pixels = pixels[..., :3]
    texture = _pyvista().Texture(np.ascontiguousarray(pixels))
    texture.repeat, texture.interpolate, texture.mipmap = True, True, False
    return "white", texture


def reduce(picture: np.ndarray) -> np.ndarray:
    """Straight uint8 (2n, 2n, 4) -> premultiplied uint8 (n, n, 4), by means of four pixels."""
    part = picture.astype(np.float32) / 255
    part[..., :3] *= part[..., 3:]
    n = len(part) // 2
    return (part.reshape(n, 2, n, 2, 4).mean((1, 3)) * 255 + 0.5).astype(np.uint8)


def stage_of(thing: Object, assets: Path, folder: Path, size: int = SIZE) -> Stage:
    """The stage of an object, its model unpacked to ``folder``."""
    archive = assets / f"{thing.library}.sh3f"
    entry = find_entry(archive, thing.entry)
    obj = unpack(archive, entry, folder)
    return Stage(obj, rotation(entry), thing.turn, size)


def files_of(thing: Object, work: Path, count: int, painted: int) -> dict[str | None, tuple]:
    """(file, views that it should have) of an object by its colours, None for its own."""
    folder = work / "renders" / thing.slug
    sorts = {None: count, **dict.fromkeys(thing.colours, min(painted, count))}
    names = {c: "rgba.npy" if c is None else f"rgba-{c}.npy" for c in sorts}
    return {c: (folder / names[c], wanted) for c, wanted in sorts.items()}


def lacking(work: Path, count: int, painted: int) -> list[Object]:
    """The objects that have fewer views under ``work`` than these."""
    return [
        thing
        for thing in OBJECTS
        if any(
            not file.exists() or len(np.load(file, mmap_mode="r")) < wanted
            for file, wanted in files_of(thing, work, count, painted).values()
        )
    ]


def render(
    thing: Object, assets: Path, work: Path, count: int, painted: int, every: int = 50
) -> None:
    """Render an object to ``work/renders/<slug>``: ``cameras.npy``, ``rgba.npy`` with ``count``
    views and ``rgba-<colour>.npy`` with the first ``painted`` of them in each of its colours.

    A folder that has views already gets those that are missing; ``every`` so many, the files are
    written, whole or not at all.
    """
    folder = work / "renders" / thing.slug
    folder.mkdir(parents=True, exist_ok=True)
    files = files_of(thing, work, count, painted)
    sorts = {c: wanted for c, (_, wanted) in files.items()}
    have = {c: list(np.load(f)) if f.exists() else [] for c, (f, _) in files.items()}
    if all(len(have[c]) >= wanted for c, wanted in sorts.items()):
        return
    # What was rendered for a larger count stays, with its cameras.
    views = cameras(max(count, *map(len, have.values())), SEED)
    start = min(len(have[c]) for c, wanted in sorts.items() if len(have[c]) < wanted)
    with tempfile.TemporaryDirectory() as unpacked:
        stage = stage_of(thing, assets, Path(unpacked))
        m = 1.0
        if thing.colours:
            m = level((stage.picture(*c.tolist()) for c in cameras(LEVEL_VIEWS, SEED)), thing)
        for i in range(start, count):
            picture = stage.picture(*views[i].tolist())
            for colour, wanted in sorts.items():
                if len(have[colour]) == i < wanted:
                    seen = picture if colour is None else paint(picture, thing, colour, m)
                    have[colour].append(reduce(seen))
            if (i + 1) % every == 0 or i + 1 == count:
                _save(folder / "cameras.npy", views[: max(map(len, have.values()))])
                for colour, pictures in have.items():
                    if pictures:
                        _save(files[colour][0], np.stack(pictures))
        stage.close()


def _save(file: Path, array: np.ndarray):
    with whole_file(file) as tmp, tmp.open("wb") as stream:
        np.save(stream, array)


def render_all(assets: Path, work: Path, count: int, painted: int, only=None) -> None:
    """Render all objects (or those whose slugs are in ``only``), resumable."""
    for thing in OBJECTS:
        if only is None or thing.slug in only:
            render(thing, assets, work, count, painted)
            say(f"{thing.name}: {count} views")
