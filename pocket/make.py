"""``python -m pocket.make``: the models of real objects from nothing, with a fixed seed.

Stages, each resumable and kept under --work: render the objects, whose models Debian's client
fetches; write the truth; train the autoencoder, and train it on; encode the renders; train text
encoder, encoder of cameras and UNet together; train the decoder on; save a
``StableDiffusionPipeline`` folder; train the judge; report what the judge says of the folder; train
the flow transformer, and save its folder; train the UNet on to see four views at once, and save
that folder. More steps than a finished UNet, decoder or transformer had train it on from the end of
its constant rate; new renders are taken in by every stage.

What a stage is made with, and the seconds that it took so far, are noted in the work folder
(``made_with.json``, ``times.json``). A stage that has begun is refused under another recipe.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pocket import recipes
from pocket.tools import say, whole_file

OUT = Path("custom/threestudio-lods/lods/models/pocket")
FLOW_OUT = OUT.with_name("pocket-flow")
VIEWS_OUT = OUT.with_name("pocket-views")
PACKAGE = Path(__file__).parent
STAGES = tuple(recipes.NEEDS)


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


@contextmanager
def timed(work: Path, stage: str) -> Iterator[None]:
    """Add the seconds of the block to those of ``stage`` in ``times.json``, and say them."""
    began = time.monotonic()
    try:
        yield
    finally:
        took, file = time.monotonic() - began, work / "times.json"
        times = recipes.read_json(file)
        before = times.get(stage, 0.0)
        times[stage] = round((before if isinstance(before, (int, float)) else 0.0) + took, 1)
        with whole_file(file) as tmp:
            tmp.write_text(json.dumps(times, indent=1) + "\n")
        say(f"{stage}: {duration(took)}, {duration(times[stage])} in all")


def duration(seconds: float) -> str:
    """As 12.3 s, 4 min 5 s or 3 h 7 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog="python -m pocket.make",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--work", type=Path, default=Path("build/pocket"))
    parser.add_argument(
        "--assets",
        type=Path,
        help="folder of the package sweethome3d-furniture or of its .sh3f files; by default the "
        "installed package, or apt-get fetches it to the work folder",
    )
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--flow-out", type=Path, default=FLOW_OUT)
    parser.add_argument("--views-out", type=Path, default=VIEWS_OUT)
    parser.add_argument(
        "--package",
        type=Path,
        default=PACKAGE,
        help="gets truth, ideal, judge.safetensors and results, by default this package itself",
    )
    parser.add_argument("--stages", help=f"of {','.join(STAGES)}; by default all")
    parser.add_argument("--views", type=positive, default=400, help="of each object")
    parser.add_argument(
        "--painted", type=positive, default=200, help="of these, those in each of its colours"
    )
    parser.add_argument("--vae-steps", type=positive, default=4400)
    parser.add_argument("--vae-on-steps", type=positive, default=5000)
    parser.add_argument(
        "--latent-views", type=positive, help="encode the first of each series only, for now"
    )
    parser.add_argument("--unet-steps", type=positive, default=100_000)
    parser.add_argument("--decoder-steps", type=positive, default=6000)
    parser.add_argument("--judge-steps", type=positive, default=2500)
    parser.add_argument("--flow-steps", type=positive, default=100_000)
    parser.add_argument("--views-steps", type=positive, default=20_000)
    parser.add_argument(
        "--batch", type=positive, default=48, help="of UNet and transformer; a GPU wants more"
    )
    parser.add_argument("--threads", type=positive, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="cpu, or cuda for the trainings")
    args = parser.parse_args(arguments)
    stages = args.stages.split(",") if args.stages else STAGES
    if unknown := set(stages) - set(STAGES):
        parser.error(f"--stages: {', '.join(sorted(unknown))} is not of {', '.join(STAGES)}")

    import torch

    torch.set_num_threads(args.threads)
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {args.device}: torch finds no GPU here")
    try:
        args.work.mkdir(parents=True, exist_ok=True)
        now = recipes.recipes(args.seed)
        recipes.check(args.work, stages, now)
        for stage in STAGES:
            if stage in stages:
                recipes.note(args.work, stage, now)
                with timed(args.work, stage):
                    RUN[stage](args)
    except (OSError, ValueError) as error:
        parser.error(str(error).splitlines()[0])
    except KeyboardInterrupt as error:
        say(f"stopped, {error}" if str(error) else "stopped")
        raise SystemExit(130) from None


def _render(args) -> None:
    from pocket import assets, render

    lacking = render.lacking(args.work, args.views, args.painted)
    if lacking:
        folder = assets.find(args.assets, args.work)
        slugs = {thing.slug for thing in lacking}
        render.render_all(folder, args.work, args.views, args.painted, slugs)


def _truth(args) -> None:
    from pocket import truth

    truth.make(args.assets, args.work, args.package / "truth", args.package / "ideal")


def _vae(args) -> None:
    from pocket import autoencoder

    autoencoder.train(args.work, args.vae_steps, seed=args.seed, device=args.device)


def _vae_on(args) -> None:
    from pocket import autoencoder

    autoencoder.train_on(args.work, args.vae_on_steps, seed=args.seed, device=args.device)


def _latents(args) -> None:
    from pocket import latents

    latents.encode_all(args.work, args.device, args.latent_views)


def _unet(args) -> None:
    from pocket import diffusion

    same = {"seed": args.seed, "batch": args.batch, "device": args.device}
    diffusion.train(args.work, args.unet_steps, **same)


def _decoder(args) -> None:
    from pocket import autoencoder

    autoencoder.train_decoder(args.work, args.decoder_steps, seed=args.seed, device=args.device)


def _save(args) -> None:
    from pocket import diffusion

    diffusion.save_pipeline(args.work, args.out)


def _judge(args) -> None:
    from pocket import judge

    judge.train(args.work, args.judge_steps, seed=args.seed, file=_judge_of(args))


def _report(args) -> None:
    from pocket import report

    report.report(
        args.out, args.work, args.package / "results" / args.out.resolve().name,
        judge_file=_judge_of(args),
    )  # fmt: skip


def _flow(args) -> None:
    from pocket import diffusion, flow

    same = {"seed": args.seed, "batch": args.batch, "device": args.device}
    more = {"name": flow.NAME, "kind": flow.Model, "peak": flow.PEAK}
    diffusion.train(args.work, args.flow_steps, **same, **more)


def _save_flow(args) -> None:
    from pocket import flow

    flow.save_pipeline(args.work, args.flow_out)


def _views(args) -> None:
    from pocket import diffusion, multiview

    same = {"seed": args.seed, "batch": args.batch, "device": args.device}
    more = {"name": multiview.NAME, "kind": multiview.Model, "peak": multiview.PEAK}
    diffusion.train(args.work, args.views_steps, **same, **more)


def _save_views(args) -> None:
    from pocket import multiview

    multiview.save_pipeline(args.work, args.views_out)


def _judge_of(args) -> Path:
    return args.package / "judge.safetensors"


RUN: dict[str, Callable[[argparse.Namespace], None]] = {
    "render": _render,
    "truth": _truth,
    "vae": _vae,
    "vae-on": _vae_on,
    "latents": _latents,
    "unet": _unet,
    "decoder": _decoder,
    "save": _save,
    "judge": _judge,
    "report": _report,
    "flow": _flow,
    "save-flow": _save_flow,
    "views": _views,
    "save-views": _save_views,
}


if __name__ == "__main__":
    main()
