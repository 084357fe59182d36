"""``lods edit``: a picture, Gaussians, or the texture of a mesh, changed by a text."""

import argparse
from pathlib import Path
from typing import Any

from lods.cameras import TOLD
from lods.commands.parser import Parser, count
from lods.models.vocabulary import OPTION

ABOUT = """\
Change what a picture shows, an object of Gaussians, or the texture of a mesh, by a text. What the
texts do not tell apart stays as it was, as far as the method can.

    lods edit armchair.png --from "a red armchair" --to "a blue armchair"
    lods edit armchair.png --from "an armchair" --to "a chair" --region 10,40,110,128
    lods edit object.ply --from "a red armchair" --to "a blue armchair" --box -1,-1,0,1,1,1
    lods edit chair.glb --from "a red armchair" --to "a blue armchair" --where "an armchair"

A picture's result is a folder; lods edit FOLDER goes on with it. Of an object, WHAT is a ply file
of 3D Gaussians, a mesh (glb, gltf, obj, ply, stl, off) or a RUN, and the result is a run.
"""
METHODS = "dds, pds, ssd, drf or lods-edit"
PICTURES = "of a picture"
OBJECTS = "of an object"
OPTIONS = {"source": "--from", "target": "--to"}


def parse_args(argv: list[str], command: str) -> argparse.Namespace:
    parser = Parser(command, ABOUT)
    add = parser.add_argument
    add(
        "what",
        metavar="WHAT",
        help="a picture, a ply file of Gaussians, a mesh, a RUN, or a result to go on with",
    )
    add("overrides", nargs="*", metavar="KEY=VALUE", help=f"{OBJECTS}: settings, as of lods train")
    add("--from", dest="source", metavar="TEXT", help="what is there")
    add("--to", dest="target", metavar="TEXT", help="what shall be there")
    add("--method", help=f"{METHODS} (dds)")
    add("--model", help="a card, a hub id or a diffusers folder (default: chosen, and said why)")
    add("--steps", type=count, help="steps (default: by model and method)")
    add("--scale", type=float, help="guidance scale (default: by model and method)")
    add("--seed", type=int, help="random seed (0)")
    add("--out", type=Path, metavar="FOLDER", help="of the results (below outputs/edit)")
    add("--gpu", type=int, help="index of the GPU, -1 for the CPU (0)")
    two = parser.add_argument_group(PICTURES)
    add = two.add_argument
    add("--lr", type=float, help="rate of SGD on the latents (default: by model and method)")
    add("--draws", type=count, help="draws of noise for a step (default: by model)")
    add("--every", type=count, help="steps between pictures and saved states (50)")
    add(
        "--details",
        type=float,
        help="share of what the autoencoder loses that comes back, where the structure stays (1)",
    )
    add("--negative-prompt", help="the null prompt (empty)")
    add(
        "--region",
        metavar="X0,Y0,X1,Y1",
        help="only these pixels may change: X1 and Y1 are the first outside",
    )
    add(
        "--mask",
        type=Path,
        metavar="FILE",
        help=f"only where this picture, of the same size, is light; {OBJECTS} what lies before its "
        "light pixels, seen from --azimuth and --elevation",
    )
    add("--where", metavar="WORDS", help=f"only where the model sees these words; {OBJECTS} too")
    add("--level", type=float, help="of --where: share of the strongest, 0 to 1 (0.5)")
    add("--cameras", choices=TOLD, help="how the model is told the side that is seen (words)")
    add(
        "--azimuth",
        type=float,
        metavar="DEGREES",
        help="side that is seen: 0 the front, 180 the back",
    )
    add("--elevation", type=float, metavar="DEGREES", help="side that is seen")
    add(
        OPTION,
        action="store_true",
        help="take texts without any word that the model knows",
    )
    three = parser.add_argument_group(OBJECTS)
    three.add_argument(
        "--box",
        metavar="X0,Y0,Z0,X1,Y1,Z1",
        help="only what is in this box may change, in world units: Gaussians by their centres, "
        "texels by their places on the surface; all others stay bit for bit",
    )
    return parser.parse_intermixed_args(argv)


def main(argv: list[str], command: str) -> int:
    # a box may begin with a minus, which argparse would take for an option
    joined, words = [], iter(argv)
    for word in words:
        if word in ("--box", "--region"):
            word = f"{word}={next(words, '')}"
        joined.append(word)
    args = parse_args(joined, command)
    what = Path(args.what)
    from lods.edits.picture import ENDS
    from lods.edits.settings import CONFIG

    if what.is_dir() and (what / CONFIG).is_file():
        return _picture(args, None)
    if what.suffix.lower() in ENDS:
        return _picture(args, what)
    from lods.commands import edit_object

    return edit_object.main(args)


def texts(args: argparse.Namespace, in_config: bool = False) -> tuple[str, str]:
    """--from and --to, which are written into a config or not. Raises ``ValueError``, one line, for
    them and for the other texts."""
    from lods.commands.make import unfit

    for option, text in (("--from", args.source), ("--to", args.target)):
        if text is None or not text.strip():
            raise ValueError(f"{option} is missing: say what is there, and what shall be there")
    for name in ("source", "target", "where", "negative_prompt"):
        if wrong := unfit(getattr(args, name) or "", in_config):
            raise ValueError(f"{OPTIONS.get(name, f'--{name}'.replace('_', '-'))} {wrong}")
    source, target = (" ".join(text.split()) for text in (args.source, args.target))
    if source == target:
        raise ValueError("--from and --to are the same: there is nothing to change")
    return source, target


def _picture(args: argparse.Namespace, path: Path | None) -> int:
    """Edit the picture at ``path``, or go on in the folder ``args.what``."""
    three = [("--box", args.box), ("KEY=VALUE", args.overrides)]
    if wrong := [name for name, value in three if value]:
        raise ValueError(f"{wrong[0]} is {OBJECTS}, and {args.what} is a picture's")
    from lods.edits import job
    from lods.playground import carry_out

    if path is None:
        unset = (None, False, [])
        given = {k for k, v in vars(args).items() if not any(v is u or v == [] for u in unset)}
        other = sorted(given - {"what", "steps", "gpu"})
        if other:
            raise ValueError(
                f"--{other[0].replace('_', '-')} is settled in {args.what}: only --steps can be "
                "changed where an edit goes on"
            )
        return carry_out(lambda: job.go_on(Path(args.what), args.steps), gpu_of(args))
    source, target = texts(args)
    regions = [n for n in ("region", "mask", "where") if getattr(args, n) is not None]
    if len(regions) > 1:
        raise ValueError(f"--{regions[0]} and --{regions[1]} exclude each other")
    wanted: dict[str, Any] = vars(args) | {"source": source, "target": target}
    return carry_out(lambda: job.start(path, wanted), gpu_of(args))


def gpu_of(args: argparse.Namespace) -> int:
    return 0 if args.gpu is None else args.gpu
