"""What an autoencoder loses of a picture, put back where an edit left the picture's structure."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

WINDOW = 7  # pixels a side, over which structure and colour are compared
SMALL = 0.03**2  # contrast that counts as none, as in SSIM
SAME_COLOR = 0.05  # change of a colour that counts as one
DARK = 0.05  # luminance below which a ratio to it says little
LUMINANCE = (0.2126, 0.7152, 0.0722)  # ITU-R BT.709
Picture = Float[Tensor, "3 H W"]


def with_details(source: Picture, plain: Picture, edited: Picture, part: float = 1.0) -> Picture:
    """``edited``, what a decoder makes of edited latents, with ``part`` (0 to 1) of the details
    that it lost of the ``source``, whose own latents it decodes to ``plain``. All are in 0..1.

    With Y the luminance, and means, variances and covariances over windows of 7 x 7 pixels,

        r = source - plain
        w = max(0, (2 cov(Y_plain, Y_edited) + c) / (var Y_plain + var Y_edited + c))
        k = exp(-|mean(edited - plain)|^2 / (2 * 0.05^2))
        result = edited + part * w * (k r + (1 - k) edited * Y_r / (Y_plain + 0.05))

    w, the contrast and structure term of SSIM (Wang et al. 2004, c = 0.03^2), is 1 where an edit
    kept the structure, and 0 where it made another. Where the colour stayed (k = 1) the details are
    added; where it changed they are shades, whose ratio to their surroundings is kept. Where
    nothing changed the result is the source.
    """

    def mean(x: Tensor) -> Tensor:
        around = F.pad(x[None], (WINDOW // 2,) * 4, mode="reflect")
        return F.avg_pool2d(around, WINDOW, 1)[0]

    rest = source - plain
    weights = source.new_tensor(LUMINANCE)[:, None, None]
    y_plain, y_edited, y_rest = ((weights * x).sum(0, keepdim=True) for x in (plain, edited, rest))
    mean_plain, mean_edited = mean(y_plain), mean(y_edited)
    covariance = mean(y_plain * y_edited) - mean_plain * mean_edited
    variances = mean(y_plain**2) - mean_plain**2 + mean(y_edited**2) - mean_edited**2
    structure = ((2 * covariance + SMALL) / (variances.clamp_min(0) + SMALL)).clamp(0, 1)
    change = mean(edited - plain).square().sum(0, keepdim=True)
    kept = torch.exp(-change / (2 * SAME_COLOR**2))
    shade = edited * y_rest / (y_plain + DARK)
    return (edited + part * structure * (kept * rest + (1 - kept) * shade)).clamp(0, 1)
