"""``python -m pocket.make``: the models of real objects from nothing, with a fixed seed.

Stages, each resumable and kept under --work: train the autoencoder, encode the renders, train text
encoder, camera encoder and UNet together, train the decoder on, save a ``StableDiffusionPipeline``
folder.
"""

import argparse
from pathlib import Path

STAGES = ("vae", "decoder")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/pocket"))
    parser.add_argument("--stages", help=f"of {','.join(STAGES)}")
    parser.add_argument("--vae-steps", type=int, default=6000)
    parser.add_argument("--decoder-steps", type=int, default=6000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    stages = args.stages.split(",") if args.stages else STAGES
    if unknown := set(stages) - set(STAGES):
        parser.error(f"--stages: {', '.join(sorted(unknown))} is not of {', '.join(STAGES)}")

    import torch

    torch.set_num_threads(args.threads)
    try:
        if "vae" in stages:
            from pocket.autoencoder import train

            train(args.work, steps=args.vae_steps, seed=args.seed)
        if "decoder" in stages:
            from pocket.autoencoder import train_decoder

            train_decoder(args.work, steps=args.decoder_steps, seed=args.seed)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
