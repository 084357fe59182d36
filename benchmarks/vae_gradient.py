"""How much of an autoencoder's gradient another one gives: the cosine between the two.

    python benchmarks/vae_gradient.py --model sd21-base --vae taesd --images renders/*.png

Distillation sends a gradient g of the latents back to the picture x, as J^T g with J the derivative
of the encoder. For each picture, and several g, both encoders' J^T g are compared: the cosine, and
the ratio of the lengths. g is the gradient of SDS for --prompt at the latents of the model's own
encoder, the same for both. The cosine of the latents themselves stands beside it. Without --images
the pictures are smooth random ones.

``--tiny`` makes both autoencoders with random weights, to see that the script runs: its numbers
mean nothing, and are written nowhere unless --out says so.
"""

import argparse
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from timing import ROOT, machine, show, write_table

OUT = ROOT / "benchmarks" / "results" / "vae_gradient.csv"


def tiny_models(folder: Path) -> tuple[str, str]:
    """(a model, a tiny autoencoder), of random weights."""
    from diffusers import AutoencoderTiny

    from tests.tiny_models import make_tiny_sd

    model, vae = folder / "model", folder / "vae"
    make_tiny_sd(model)
    AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ).save_pretrained(vae)
    return str(model), str(vae)


def pictures(files: list[Path], size: int, count: int) -> torch.Tensor:
    """(N, 3, size, size) in 0..1 from files, or smooth random ones."""
    if not files:
        noise = torch.rand(count, 3, max(2, size // 32), max(2, size // 32))
        return F.interpolate(noise, (size, size), mode="bicubic").clamp(0, 1)
    import numpy as np
    from PIL import Image

    opened = [Image.open(file).convert("RGB").resize((size, size)) for file in files]
    arrays = [torch.from_numpy(np.asarray(image).copy()) for image in opened]
    return torch.stack(arrays).permute(0, 3, 1, 2).float() / 255


def back(model, images: torch.Tensor, grad: torch.Tensor, seed: int) -> tuple[torch.Tensor, ...]:
    """(latents, J^T g) of a model's encoder."""
    images = images.clone().requires_grad_()
    torch.manual_seed(seed)
    z = model.encode(images)
    return z.detach(), torch.autograd.grad(z, images, grad)[0]


def cosine(one: torch.Tensor, two: torch.Tensor) -> float:
    """Between all numbers of two tensors."""
    return float(F.cosine_similarity(one.flatten().double(), two.flatten().double(), dim=0))


def compare(model: str, vae: str, images: list[Path], args: argparse.Namespace) -> list[dict]:
    """One row for each picture and draw."""
    import lods

    method = lods.load("lods-sds", model, prompt=args.prompt, device=args.device)
    own = method.model
    other = lods.models.load(model, own.device, model_vae=vae)
    about = {"model": args.model, "vae": args.vae, **machine(), "device": str(own.device)}
    rows = []
    for i, image in enumerate(pictures(images, own.image_size, args.count)):
        image = image[None].to(own.device)
        for draw in range(args.draws):
            torch.manual_seed(1000 + draw)
            with torch.no_grad():
                z = own.encode(image)
            leaf = z.clone().requires_grad_()
            torch.manual_seed(draw)
            grad = torch.autograd.grad(method(latents=leaf).terms["loss_sds"], leaf)[0]
            (z_own, x_own), (z_other, x_other) = (
                back(each, image, grad, draw) for each in (own, other)
            )
            row = {
                "picture": images[i].name if images else f"random {i}",
                "draw": draw,
                "cosine_of_gradients": round(cosine(x_own, x_other), 4),
                "ratio_of_lengths": round(float(x_other.norm() / x_own.norm()), 4),
                "cosine_of_latents": round(cosine(z_own, z_other), 4),
            }
            show(row, {})
            rows.append(row | about)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="sd21-base", help="a card, folder, file or hub id")
    parser.add_argument("--vae", default="taesd", help="the other autoencoder (taesd)")
    parser.add_argument("--prompt", default="a DSLR image of a hamburger")
    parser.add_argument("--images", nargs="*", type=Path, default=[], help="pictures to encode")
    parser.add_argument("--count", type=int, default=4, help="random pictures (4)")
    parser.add_argument("--draws", type=int, default=4, help="gradients of each picture (4)")
    parser.add_argument("--device", help="cpu or cuda:0 (the GPU if there is one)")
    parser.add_argument("--tiny", action="store_true", help="both of random weights, to try it")
    parser.add_argument("--out", type=Path, help="CSV (benchmarks/results/vae_gradient.csv)")
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.tiny:
        with tempfile.TemporaryDirectory() as folder:
            model, vae = tiny_models(Path(folder))
            args.model, args.vae = "tiny, random", "tiny, random"
            rows = compare(model, vae, args.images, args)
    else:
        rows = compare(args.model, args.vae, args.images, args)
    cosines = torch.tensor([row["cosine_of_gradients"] for row in rows])
    print(f"cosine of the gradients: mean {cosines.mean():.4f}, least {cosines.min():.4f}")
    if args.out or not args.tiny:
        write_table(args.out or OUT, rows)


if __name__ == "__main__":
    main()
