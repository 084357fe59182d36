"""From noise predictions to gradients: the formulas of the papers, on tensors only.

Notation: x_t = alpha_t z + sigma_t eps, with alpha_t^2 = abar_t ("alphas_cumprod") and sigma_t^2 =
1 - abar_t for a diffusion, alpha_t = 1 - sigma_t for a rectified flow; eps_c the prediction under
the prompt, eps_u the one under the other condition (the null prompt, or a learned part), s the
guidance scale. All functions but those that say so hold for either.

Shapes: predictions and noise (B, ...), all alike; per-row numbers (alpha, sigma, w) (B,), or any
shape that broadcasts after :func:`rows`. Gradients are with respect to the latents z, their scale
is w(t)'s, and none of the functions draws random numbers.
"""

import math
from collections.abc import Sequence

from torch import Tensor

WEIGHTINGS = ("sds", "uniform", "fantasia3d", "velocity", "latent")
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", "flow")


def rows(value: Tensor, like: Tensor) -> Tensor:
    """Per-row numbers (B,) as (B, 1, ..., 1), to multiply a tensor (B, ...) with."""
    return value.reshape(-1, *[1] * (like.ndim - 1)).to(like)


def check_scale(scale: float, finite: bool = False, name: str = "guidance_scale") -> float:
    """Return ``scale`` if it is a usable guidance scale, else raise ``ValueError`` with ``name``.

    It has to be above 0 (LODS divides by it, and with 0 the prompt has no effect); ``inf`` is
    allowed unless ``finite``.
    """
    if not scale > 0:
        raise ValueError(f"{name} must be above 0, not {scale}: with 0 the prompt has no effect")
    if finite and math.isinf(scale):
        raise ValueError(
            f"{name} must be finite here: only the guidance_scale of the LODS methods may be .inf"
        )
    return scale


def weight(abar: Tensor, strategy: str = "sds", variance: Tensor | None = None) -> Tensor:
    """w(t), of differences of noise, from ``abar`` = alpha_t^2 and ``variance`` = sigma_t^2, by
    default 1 - abar (any shape, both alike):

    - "sds", sigma^2 (DreamFusion, arXiv:2209.14988);
    - "uniform", 1;
    - "fantasia3d", alpha sigma^2 (arXiv:2303.13873);
    - "velocity", 1 / alpha, which is 1 for differences of velocities;
    - "latent", sigma / alpha, which is 1 for differences of latents.

    The last two follow from :mod:`lods.models.schedule`.
    """
    if variance is None:
        variance = 1 - abar
    if strategy == "sds":
        return variance
    if strategy == "uniform":
        return abar * 0 + 1
    if strategy == "fantasia3d":
        return abar.sqrt() * variance
    if strategy == "velocity":
        return 1 / abar.sqrt()
    if strategy == "latent":
        return (variance / abar).sqrt()
    raise ValueError(f"weighting_strategy must be one of {WEIGHTINGS}, not {strategy!r}")


def to_noise(output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor, kind: str) -> Tensor:
    """The noise that a model's ``output`` at ``x_t`` means; ``kind`` is what the model predicts.

    - "epsilon": the noise itself;
    - "v_prediction", v = alpha eps - sigma z (arXiv:2202.00512): eps = alpha v + sigma x_t;
    - "sample", z: eps = (x_t - alpha z) / sigma;
    - "flow", v = eps - z with alpha + sigma = 1 (arXiv:2209.03003): eps = x_t + alpha v.
    """
    alpha, sigma = rows(alpha, x_t), rows(sigma, x_t)
    if kind == "epsilon":
        return output
    if kind == "v_prediction":
        return alpha * output + sigma * x_t
    if kind == "sample":
        return (x_t - alpha * output) / sigma
    if kind == "flow":
        return x_t + alpha * output
    raise ValueError(f"prediction_type must be one of {PREDICTION_TYPES}, not {kind!r}")


def cfg(eps_c: Tensor, eps_u: Tensor, s: float) -> Tensor:
    """Classifier-free guidance (arXiv:2207.12598) in the convention of Stable Diffusion:

    eps_u + s (eps_c - eps_u), so s = 0 ignores the prompt, s = 1 is eps_c, above 1 overstates.
    """
    return eps_u + s * (eps_c - eps_u)


def sds(eps_c: Tensor, eps_u: Tensor, eps: Tensor, s: float, w: Tensor) -> Tensor:
    """Score distillation sampling (DreamFusion, arXiv:2209.14988):

    g = w(t) [ cfg_s(eps_c, eps_u) - eps ].

    VSD (arXiv:2305.16213) has a learned prediction in place of the noise eps, ISM
    (arXiv:2311.11284) the prediction at a smaller t.
    """
    return rows(w, eps) * (cfg(eps_c, eps_u, s) - eps)


def lods(eps_c: Tensor, eps_u: Tensor, eps: Tensor, s: float, w: Tensor) -> Tensor:
    """Learning to optimize denoising scores (LODS, arXiv:2312.04820), with eps_u the LEARNED one:

    g = w(t) [ eps_c - eps / s + (1 - s) / s eps_u ],  and for s = inf  w(t) [ eps_c - eps_u ].

    Equal to sds(...) / s, written so that large s loses no digits.
    """
    inverse = 1 / s  # 0.0 for s = inf, which leaves exactly eps_c - eps_u
    return rows(w, eps) * (eps_c - inverse * eps + (inverse - 1) * eps_u)


def std_rescale(
    x_t: Tensor,
    eps_c: Tensor,
    eps_u: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    s: float,
    phi: float,
    w: Tensor,
    views: int = 1,
) -> Tensor:
    """What is added to :func:`lods` (s times as much to :func:`sds`) where the clean image that the
    guided prediction means is brought back to the spread of an image without guidance (MVDream,
    arXiv:2308.16512, after arXiv:2305.08891). With z(e) = (x_t - sigma_t e) / alpha_t, z_s that of
    cfg_s(eps_c, eps_u), and std over the elements of all ``views`` rows of an object together,

    z' = phi z_s std(z(eps_c)) / std(z_s) + (1 - phi) z_s,
    g = w(t) alpha_t / sigma_t (z - z') / s = lods(...) + w(t) alpha_t / sigma_t (z_s - z') / s.

    With w(t) = sigma_t / alpha_t ("latent") g s is the gradient of 1/2 |z - z'|^2. phi = 0 adds
    nothing. For s = inf the guided image counts with 1 - phi, and the other term is 0.
    """
    inverse = 1 / s
    alpha, sigma = rows(alpha, x_t), rows(sigma, x_t)
    # z_s / s, which is finite for s = inf
    guided = (inverse * x_t - sigma * (eps_c + (inverse - 1) * eps_u)) / alpha
    plain = (x_t - sigma * eps_c) / alpha

    def spread(z: Tensor) -> Tensor:
        each = z.unflatten(0, (-1, views)).flatten(1).std(1)
        return rows(each.repeat_interleave(views), x_t)

    ratio = inverse * spread(plain) / spread(guided).clamp_min(1e-8)
    return rows(w, x_t) * alpha / sigma * phi * (1 - ratio) * guided


def csd(eps_c: Tensor, eps_u: Tensor, w: Tensor) -> Tensor:
    """Classifier score distillation (CSD, arXiv:2310.19415):

    g = w(t) [ eps_c - eps_u ].

    SDS-Bridge (arXiv:2406.09417) is this with eps_u under a text of what the pictures look like.
    """
    return rows(w, eps_c) * (eps_c - eps_u)


def nfsd(eps_c: Tensor, eps_u: Tensor, eps_bad: Tensor, low: Tensor, s: float, w: Tensor) -> Tensor:
    """Noise-free score distillation (NFSD, arXiv:2310.17590), eps_bad under a text of bad pictures:

    g = w(t) [ delta_D + s (eps_c - eps_u) ],  with delta_D = eps_u in the rows where ``low`` (B,)
    is true, those of small t, and eps_u - eps_bad in the others.
    """
    domain = eps_u - rows(~low, eps_u) * eps_bad
    return rows(w, eps_u) * (domain + s * (eps_c - eps_u))


def perp_neg(eps_c: Tensor, eps_u: Tensor, negatives: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Perp-Neg (arXiv:2304.04968): the prediction to use for eps_c, away from N other texts:

    eps_u + d + sum_i w_i (n_i - (n_i . d) / (d . d) d),  d = eps_c - eps_u, n_i = eps_i - eps_u,

    with eps_i in ``negatives`` and w_i <= 0 in ``weights`` (B, N): only the part of a negative that
    is perpendicular to the prompt's own direction counts.
    """
    d = eps_c - eps_u
    dims = tuple(range(1, d.ndim))
    square = d.square().sum(dims, keepdim=True).clamp_min(1e-12)
    result = eps_c
    for eps_i, w_i in zip(negatives, weights.unbind(1)):
        n = eps_i - eps_u
        result = result + rows(w_i, d) * (n - (n * d).sum(dims, keepdim=True) / square * d)
    return result


def dds(
    eps_c: Tensor, eps_u: Tensor, source_c: Tensor, source_u: Tensor, s: float, w: Tensor
) -> Tensor:
    """Delta denoising score (DDS, arXiv:2304.07090), eps_* at the noised picture under the prompt
    and the null prompt, source_* at the source, noised alike, under its own text and the null:

    g = w(t) [ cfg_s(eps_c, eps_u) - cfg_s(source_c, source_u) ].
    """
    return rows(w, eps_c) * (cfg(eps_c, eps_u, s) - cfg(source_c, source_u, s))


def lods_edit(
    eps_c: Tensor, eps_u: Tensor, source_c: Tensor, source_u: Tensor, s: float, w: Tensor
) -> Tensor:
    """:func:`lods` at the picture less :func:`lods` at the source, with the same noise, which
    cancels; eps_u and source_u are the LEARNED predictions:

    g = w(t) [ eps_c - source_c + (1 - s) / s (eps_u - source_u) ],
    and for s = inf  w(t) [ (eps_c - eps_u) - (source_c - source_u) ].

    Equal to dds(...) / s.
    """
    return rows(w, eps_c) * (eps_c - source_c + (1 / s - 1) * (eps_u - source_u))


def pds_weights(
    now: tuple[Tensor, Tensor],
    before: tuple[Tensor, Tensor],
    earlier: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """(psi, chi) of :func:`pds`, float64, from the levels (alpha, sigma) at t, at t - 1 and at the
    earlier timestep p. With a = alpha_t / alpha_{t-1} and b = sigma_t^2 - a^2 sigma_{t-1}^2 (of a
    diffusion sqrt(1 - beta_t) and beta_t) the posterior of x_p has

        mean c0 z_hat + c1 x_t,  c0 = alpha_p b / sigma_t^2,  c1 = a sigma_p^2 / sigma_t^2,
        variance v = b sigma_p^2 / sigma_t^2,
        psi = (alpha_p - c0 - c1 alpha_t) / sqrt(v),  chi = c0 sigma_t / (alpha_t sqrt(v)).

    For p = t - 1 this is the posterior of the chain, and psi is 0.
    """
    (alpha, sigma), (alpha_1, sigma_1), (alpha_p, sigma_p) = (
        (level[0].double(), level[1].double()) for level in (now, before, earlier)
    )
    a = alpha / alpha_1
    b = sigma**2 - a**2 * sigma_1**2
    c0, c1 = alpha_p * b / sigma**2, a * sigma_p**2 / sigma**2
    deviation = (b * sigma_p**2 / sigma**2).sqrt()
    return (alpha_p - c0 - c1 * alpha) / deviation, c0 * sigma / (alpha * deviation)


def pds(moved: Tensor, guided: Tensor, source: Tensor, psi: Tensor, chi: Tensor) -> Tensor:
    """Posterior distillation sampling (PDS, arXiv:2311.13831), with ``moved`` = z - z_source and
    the guided predictions at the picture and at the source:

    g = psi(t) (z - z_source) + chi(t) (guided - source),

    which is the difference of the stochastic latents (x_p - mu(x_t, guided)) / sqrt(v) of the two,
    for the same noise in x_t and the same in x_p. See :func:`pds_weights`.
    """
    return rows(psi, moved) * moved + rows(chi, moved) * (guided - source)


def ssd(
    eps_c: Tensor,
    eps_u: Tensor,
    eps_source: Tensor,
    anchor: Tensor,
    extra: Tensor,
    scales: tuple[float, float, float],
    w: Tensor,
) -> Tensor:
    """The three differences of stable score distillation (SSD, ICCV 2025), with eps_source the
    prediction at the picture under the source's text:

    g = w(t) [ a (eps_source - anchor) + s (eps_c - eps_source) + b (eps_c - eps_u - extra) ],

    ``scales`` = (a, s, b). Published: ``anchor`` is the prediction at the source under the null
    prompt, ``extra`` is 0.
    """
    a, s, b = scales
    total = a * (eps_source - anchor) + s * (eps_c - eps_source) + b * ((eps_c - eps_u) - extra)
    return rows(w, total) * total


def ddim(
    x: Tensor, eps: Tensor, start: tuple[Tensor, Tensor], end: tuple[Tensor, Tensor]
) -> Tensor:
    """One step of DDIM without noise (arXiv:2010.02502), up or down, between two noise levels
    (alpha, sigma), given the noise ``eps`` in x:

    alpha_end z + sigma_end eps,  z = (x - sigma_start eps) / alpha_start.
    """
    z = (x - rows(start[1], x) * eps) / rows(start[0], x)
    return rows(end[0], x) * z + rows(end[1], x) * eps
