"""``python -m pocket.make``: the models of real objects from nothing, with a fixed seed.

Stages, each resumable and kept under --work: train the autoencoder; encode the renders; train text
encoder, encoder of cameras and UNet together; train the decoder on; save a
``StableDiffusionPipeline`` folder; train the flow transformer, and save its folder. More steps than
a finished UNet, decoder or transformer had train it on from the end of its constant rate; new
renders are taken in by every stage.
"""

import argparse
import json
from pathlib import Path

from pocket.tools import say, whole_file

OUT = Path("custom/threestudio-lods/lods/models/pocket")
FLOW_OUT = OUT.with_name("pocket-flow")
STAGES = ("vae", "latents", "unet", "decoder", "save", "flow", "save-flow")


def recipes(args) -> dict[str, dict]:
    """What each stage is made with and cannot be changed once it has begun."""
    from pocket import autoencoder, diffusion, flow

    vae = [*autoencoder.CHANNELS, autoencoder.LATENT_CHANNELS]
    unet = [*diffusion.CHANNELS, diffusion.WIDTH]
    return {
        "vae": {"seed": args.seed, "channels": vae},
        "unet": {"seed": args.seed, "channels": unet},
        "flow": {"seed": args.seed, "channels": [flow.LAYERS_OF_TRANSFORMER, flow.HEADS]},
    }


def check_work(work: Path, now: dict[str, dict]) -> None:
    """Raise ``ValueError`` if stages in ``work`` were made by another recipe than ``now``'s; later
    stages take what they left there."""
    for stage, before in _read(work).items():
        other = [
            f"{key} {value}, not {now[stage].get(key)}"
            for key, value in before.items()
            if stage in now and now[stage].get(key) != value
        ]
        if other:
            raise ValueError(
                f"{work}: the stage {stage} was made with {', '.join(other)}: give another --work"
            )


def note(work: Path, stage: str, recipe: dict) -> None:
    """Remember what a stage is made with."""
    with whole_file(work / "made_with.json") as tmp:
        tmp.write_text(json.dumps({**_read(work), stage: recipe}, indent=1) + "\n")


def _read(work: Path) -> dict[str, dict]:
    file = work / "made_with.json"
    try:
        made = json.loads(file.read_text()) if file.exists() else {}
    except ValueError:
        made = None
    if not isinstance(made, dict) or not all(isinstance(v, dict) for v in made.values()):
        raise ValueError(f"{file} is damaged: give another --work")
    return made


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m pocket.make", description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/pocket"))
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--flow-out", type=Path, default=FLOW_OUT)
    parser.add_argument("--stages", help=f"of {','.join(STAGES)}")
    parser.add_argument("--vae-steps", type=positive, default=4400)
    parser.add_argument(
        "--latent-views", type=positive, help="encode the first of each series only, for now"
    )
    parser.add_argument("--unet-steps", type=positive, default=100_000)
    parser.add_argument("--decoder-steps", type=positive, default=6000)
    parser.add_argument("--flow-steps", type=positive, default=100_000)
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
        now = recipes(args)
        check_work(args.work, now)
        for stage in STAGES:
            if stage in stages:
                if stage in now:
                    note(args.work, stage, now[stage])
                _run(stage, args)
    except (OSError, ValueError) as error:
        parser.error(str(error).splitlines()[0])
    except KeyboardInterrupt as error:
        say(f"stopped, {error}" if str(error) else "stopped")
        raise SystemExit(130) from None


def _run(stage: str, args) -> None:
    from pocket import autoencoder, diffusion, flow, latents

    options = {"seed": args.seed, "device": args.device}
    if stage == "vae":
        autoencoder.train(args.work, args.vae_steps, **options)
    elif stage == "latents":
        latents.encode_all(args.work, args.device, args.latent_views)
    elif stage == "unet":
        diffusion.train(args.work, args.unet_steps, batch=args.batch, **options)
    elif stage == "decoder":
        autoencoder.train_decoder(args.work, args.decoder_steps, **options)
    elif stage == "save":
        diffusion.save_pipeline(args.work, args.out)
    elif stage == "flow":
        more = {"name": flow.NAME, "kind": flow.Model, "peak": flow.PEAK}
        diffusion.train(args.work, args.flow_steps, batch=args.batch, **options, **more)
    elif stage == "save-flow":
        flow.save_pipeline(args.work, args.flow_out)


if __name__ == "__main__":
    main()
