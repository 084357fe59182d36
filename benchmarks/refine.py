"""What the second stage does for a texture: ``lods-refine`` on objects whose truth is known.

For each object, ``python benchmarks/refine.py`` takes the mesh that the pocket world's renders are
of (Debian's sweethome3d-furniture: ``--assets``, as for ``python -m pocket.make``), fits a texture
to the renders of ``pocket/ideal``, which has the light in it, and blurs that texture. From there
the second stage of ``configs/mesh-refine.yaml`` starts, with the embedded model. The 24 views of
``pocket/truth`` judge the fitted, the blurred and the refined texture, over white: PSNR over the
pixels of the object, and sharpness relative to the true views (:mod:`pocket.sharpness`). A row an
object and texture goes to ``benchmarks/results/refine.csv``, four views of truth, blurred and
refined to ``--sheet``.
"""

import argparse
import csv
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timing import ROOT, commit, write_table

OBJECTS = ("hamburger", "teddy bear", "cactus", "fire hydrant", "soccer ball", "cupcake")
SHEET_VIEWS = (0, 5, 12, 18)  # of the 24
TEXTURE, BATCH, FIT_STEPS, FIT_RATE = 256, 4, 200, 0.05


def surface_of(thing, assets: Path, most: int):
    """The object's mesh where its renders have it, without a texture; None above ``most``
    triangles."""
    from lods.assets import Mesh
    from lods.gaussians.mesh_file import read_mesh

    from pocket.assets import find_entry, rotation, unpack
    from pocket.world import HALF_SIDE

    archive = assets / f"{thing.library}.sh3f"
    entry = find_entry(archive, thing.entry)
    with tempfile.TemporaryDirectory() as folder:
        parts = read_mesh(unpack(archive, entry, Path(folder)))
    first = np.cumsum([0] + [len(part.vertices) for part in parts])
    places = np.concatenate([part.vertices for part in parts])
    faces = np.concatenate([part.faces + at for part, at in zip(parts, first)])
    found = Mesh(torch.from_numpy(places).float(), torch.from_numpy(faces.astype(np.int64)))
    if len(found.faces) > most:
        return None
    angle = np.radians(thing.turn)
    about = np.array(
        [[np.cos(angle), 0, np.sin(angle)], [0, 1, 0], [-np.sin(angle), 0, np.cos(angle)]]
    )
    vertices = found.vertices @ torch.from_numpy((about @ rotation(entry)).T).float()
    low, high = vertices.aminmax(dim=0)
    vertices = (vertices - (low + high) / 2) * (2 * HALF_SIDE / float((high - low).max()))
    return Mesh(vertices[:, [2, 0, 1]], found.faces)  # y up, front to +z -> z up, front to +x


def camera_of(numbers: np.ndarray) -> torch.Tensor:
    """Camera to world, (V, 4, 4), of elevation, azimuth, distance and field of view."""
    from lods.gaussians.cameras import orbit

    each = [orbit(1, float(d), float(e), float(a)) for e, a, d, _ in numbers]
    return torch.cat(each)


def drawn(mesh, numbers: np.ndarray, size: int):
    """(images before black (V, H, W, 3), alphas) from these cameras, of any fields of view."""
    from lods.gaussians.cameras import intrinsics, world_to_camera

    fovy = torch.deg2rad(torch.from_numpy(np.asarray(numbers)[:, 3]).float())
    views = world_to_camera(camera_of(numbers))
    image, alpha, _ = mesh.draw(views, intrinsics(fovy, size, size), size, size)
    return image, alpha


def fitted(mesh, thing, folder: Path) -> None:
    """Fit the texture to the renders of a folder, before random backgrounds."""
    from lods.models.renders import Renders

    known = Renders.read(folder)
    [entry] = [each for each in known.objects if (each.name, each.colour) == (thing.name, None)]
    pictures = torch.from_numpy(known.views(entry)).float() / 255
    optimizer = torch.optim.Adam(mesh.groups(texture=FIT_RATE))
    random = torch.Generator().manual_seed(0)
    for step in range(FIT_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = FIT_RATE * 0.1 ** (step / FIT_STEPS)
        some = torch.randint(len(pictures), (BATCH,), generator=random)
        image, alpha = drawn(mesh, entry.cameras[some.numpy()], known.size)
        behind = torch.rand(BATCH, 1, 1, 3, generator=random)
        true = pictures[some]
        error = image + (1 - alpha) * behind - (true[..., :3] + (1 - true[..., 3:]) * behind)
        optimizer.zero_grad()
        error.square().sum().backward()
        optimizer.step()
        mesh.limit_colours()


def refined(mesh, prompt: str, model: str, steps: int, seed: int) -> None:
    """The second stage, with the settings of the shipped configurations."""
    import lods
    from lods.cameras import Cameras

    from threestudio.utils.config import load_config
    from threestudio.utils.misc import C

    files = [ROOT / f"configs/{name}.yaml" for name in ("lods-mesh-embedding", "pocket-mesh")]
    words = [f"system.prompt_processor.prompt={prompt}", f"trainer.max_steps={steps}"]
    files.append(ROOT / "configs/mesh-refine.yaml")
    cfg = load_config(*map(str, files), cli_args=words)
    guidance, data = cfg.system.guidance, cfg.data
    method = lods.load(
        "lods-refine",
        model,
        prompt,
        cameras="tokens",
        guidance_scale=guidance.guidance_scale,
        min_step_percent=list(guidance.min_step_percent),
        max_step_percent=list(guidance.max_step_percent),
    )
    mesh.smooth_gradient(cfg.system.geometry.texture_smoothing)
    optimizer = torch.optim.Adam(mesh.groups(texture=0.0), eps=1e-15)
    random = np.random.default_rng(seed)
    torch.manual_seed(seed)
    for step in range(steps):
        method.step(step)
        rate = C(cfg.system.lr_schedule["geometry.texture"], 0, step, interpolation="exp")
        for group in optimizer.param_groups:
            group["lr"] = rate
        ranges = (data.elevation_range, (-180, 180), data.camera_distance_range, data.fovy_range)
        numbers = np.stack([random.uniform(low, high, data.batch_size) for low, high in ranges], 1)
        image, alpha = drawn(mesh, numbers, data.width)
        behind = torch.rand(len(numbers), 1, 1, 3)
        images = (image + (1 - alpha) * behind).permute(0, 3, 1, 2)
        e, a, d, f = torch.from_numpy(numbers).float().unbind(1)
        optimizer.zero_grad()
        method(images, Cameras(e, a, d, fovy=f)).total.backward()
        optimizer.step()
        mesh.limit_colours()


def blur(mesh, sigma: float) -> np.ndarray:
    """The texture blurred by a Gaussian over the texels that charts cover, and no others."""
    from lods.assets.baking import texels_of
    from scipy.ndimage import gaussian_filter

    texture = mesh.texture.detach().numpy()
    known = texels_of(mesh.uv, mesh.uv_faces, *texture.shape[:2])[0] >= 0
    share = gaussian_filter(known.astype(np.float32), sigma)[..., None]
    total = gaussian_filter(texture * known[..., None], (sigma, sigma, 0))
    return np.where(share > 1e-3, total / share.clip(1e-3), texture)


def judged(mesh, true) -> dict[str, float]:
    """Against the true views: PSNR over the object's pixels, and sharpness, over white."""
    from evaluation.against_truth import over
    from pocket.sharpness import sharpness

    with torch.no_grad():
        image, alpha = drawn(mesh, true.cameras, true.rgb.shape[1])
    made = over(image, alpha[..., 0])
    inside = true.opacity > 0.5
    error = float((made - true.rgb)[inside].square().mean())
    return {
        "psnr": round(float(-10 * np.log10(error)), 2),
        "sharpness": round(sharpness(made, true.rgb), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--objects", nargs="+", default=list(OBJECTS))
    parser.add_argument("--assets", type=Path, help="folder of the .sh3f files, or of the package")
    parser.add_argument("--work", type=Path, default=ROOT / "build/refine")
    parser.add_argument("--model", default="pocket", help="or pocket/ideal, which knows the truth")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--blur", type=float, default=4.0, help="standard deviation in texels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--most", type=int, default=60000, help="triangles of an object")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/refine.csv")
    parser.add_argument("--sheet", type=Path, default=None)
    args = parser.parse_args()
    from threestudio.utils.extensions import load_extension

    load_extension(ROOT / "custom" / "threestudio-lods")
    from lods.meshes import TexturedMesh, textured

    from evaluation.against_truth import over, truth_of
    from pocket.assets import find

    assets, lines = find(args.assets, args.work), []
    rows = list(csv.DictReader(args.out.open())) if args.out.exists() else []
    for name in args.objects:
        true = truth_of(name)
        surface = surface_of(true.thing, assets, args.most)
        if surface is None:
            print(f"{name}: more than {args.most} triangles, left out", flush=True)
            continue
        mesh = TexturedMesh(textured(surface, TEXTURE))
        begin = time.perf_counter()
        fitted(mesh, true.thing, ROOT / "pocket/ideal")
        found = {"fitted": judged(mesh, true)}
        blurred = blur(mesh, args.blur)
        with torch.no_grad():
            mesh.texture.copy_(torch.from_numpy(blurred))
        pictures = [true.rgb]
        for stage in ("blurred", "refined"):
            if stage == "refined":
                refined(mesh, f"a {name}", args.model, args.steps, args.seed)
            found[stage] = judged(mesh, true)
            with torch.no_grad():
                image, alpha = drawn(mesh, true.cameras, true.rgb.shape[1])
            pictures.append(over(image, alpha[..., 0]))
        lines.append(torch.cat([torch.cat(list(p[list(SHEET_VIEWS)]), 1) for p in pictures], 1))
        about = {"model": args.model, "steps": args.steps, "blur": args.blur, "seed": args.seed}
        for stage, numbers in found.items():
            row = {"object": name, "texture": stage, **numbers, "triangles": len(surface.faces)}
            rows.append(row | about | {"commit": commit()})
            print(row, flush=True)
        print(f"{name}: {time.perf_counter() - begin:.0f} s", flush=True)
        write_table(args.out, rows)
        if args.sheet is not None:
            args.sheet.parent.mkdir(parents=True, exist_ok=True)
            whole = (torch.cat(lines).clamp(0, 1).numpy() * 255).round().astype(np.uint8)
            Image.fromarray(whole).save(args.sheet)


if __name__ == "__main__":
    sys.exit(main())
