"""How models add noise: x_t = alpha_t z + sigma_t eps at the timesteps t = 0 .. T - 1, with less of
it at the smaller ones.

A gradient w(t) (a_hat - a) can be written with three differences of what a model predicts and what
was true, which are multiples of one another where alpha and sigma are above 0:

    noise     eps_hat - eps = alpha_t d,
    latent    z - z_hat     = sigma_t d,
    velocity  d, of v = eps - z for a rectified flow, and of v = alpha eps - sigma z otherwise,

so that the same gradient has three weights, w_velocity = alpha_t w_noise = sigma_t w_latent
(:meth:`Schedule.convert_weight`). Methods work with noise, and w(t) means w_noise.
"""

import math
from collections.abc import Mapping
from typing import Any, Self

import torch
from jaxtyping import Float, Int
from lods import scores
from torch import Tensor

SPACES = ("noise", "velocity", "latent")
DENSITIES = ("uniform", "logit-normal")
MAX_TIMESTEPS = 100_000  # which tables are made of; published models have 1,000
ODD_SIGMAS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "invert_sigmas")
Rows = Float[Tensor, " B"]


class Schedule:
    """What every schedule offers. ``Schedule(alphas_cumprod)`` is a :class:`VariancePreserving`.

    All functions take a tensor of timesteps (B,), whole numbers from 0 to ``steps`` - 1, and return
    one float32 number per row. Nothing may assume that alpha^2 + sigma^2 is 1, nor that t is any
    linear measure of the noise: a rectified flow has neither.
    """

    steps: int  # the number T of timesteps
    space: str  # one of SPACES: of whose error the model's training took the mean square
    density: str  # one of DENSITIES: how its training drew t, see :meth:`draw`
    kind: str  # in words, for messages

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        kind: Any = VariancePreserving if cls is Schedule else cls
        return object.__new__(kind)

    def alpha_sigma(self, t: Int[Tensor, " B"]) -> tuple[Rows, Rows]:
        """(alpha_t, sigma_t) of each row."""
        raise NotImplementedError(f"{type(self).__name__} does not define alpha_sigma")

    def to(self, device: Any) -> "Schedule":
        """The same schedule, for timesteps on this device."""
        raise NotImplementedError(f"{type(self).__name__} does not define to")

    def weight(self, t: Int[Tensor, " B"], strategy: str = "sds") -> Rows:
        """w(t) of each row, of differences of noise: see :func:`lods.scores.weight`."""
        alpha, sigma = self.alpha_sigma(t)
        return scores.weight(alpha.square(), strategy, sigma.square())

    def convert_weight(self, w: Rows, t: Int[Tensor, " B"], of: str, to: str) -> Rows:
        """The weight of a difference in the space ``to`` that gives the gradient which ``w`` gives
        of that in the space ``of``, both of SPACES (see the module).

        Raises ``ValueError`` for another space.
        """
        alpha, sigma = self.alpha_sigma(t)
        factors = {"noise": alpha, "velocity": torch.ones_like(alpha), "latent": sigma}
        for space in (of, to):
            if space not in factors:
                raise ValueError(f"a weight is of one of {SPACES}, not of {space!r}")
        return w if of == to else w * factors[of] / factors[to]

    def to_noise(
        self, output: Tensor, x_t: Float[Tensor, "B ..."], t: Int[Tensor, " B"], kind: str
    ) -> Float[Tensor, "B ..."]:
        """The noise that a network's ``output`` means; ``kind``, what it predicts, is one of
        ``scores.PREDICTION_TYPES``."""
        return scores.to_noise(output, x_t, *self.alpha_sigma(t), kind)

    def draw(
        self, rows: int, low: int, high: int, device: Any, density: str | None = None
    ) -> Int[Tensor, " B"]:
        """Random timesteps (rows,) from ``low`` to ``high``, both included. ``density`` is one of
        DENSITIES, by default the model's own:

        - "uniform": each of them alike;
        - "logit-normal" (arXiv:2403.03206): u = 1 / (1 + exp(-n)) with n ~ N(0, 1), cut to the
          range, and t = floor(T u). Most are then near T / 2.

        For a flow with a shift the noise is a function of t, so that both mean another density of
        sigma than of t: see :class:`RectifiedFlow`.
        """
        density = self.density if density is None else density
        if density == "uniform":
            return torch.randint(low, high + 1, (rows,), device=device)
        if density != "logit-normal":
            raise ValueError(f"a density of timesteps is one of {DENSITIES}, not {density!r}")
        ends = torch.tensor([low / self.steps, (high + 1) / self.steps], dtype=torch.float64)
        first, last = torch.special.ndtr(torch.logit(ends)).tolist()
        share = first + (last - first) * torch.rand(rows, device=device, dtype=torch.float64)
        t = (self.steps * torch.sigmoid(torch.special.ndtri(share))).floor()
        return t.clamp(low, high).long()

    def transition_variance(self, now: tuple[Rows, Rows], then: tuple[Rows, Rows]) -> Rows:
        """Variance of the noise that is added on the way from the level ``now`` (alpha, sigma) to a
        noisier one, ``then``: sigma_then^2 - (alpha_then / alpha_now)^2 sigma_now^2."""
        return then[1] ** 2 - (then[0] / now[0]) ** 2 * now[1] ** 2

    def at(self, part: float) -> int:
        """The timestep at this part, of 0..1, of the way from a clean picture to noise: where the
        ways of a model's samples are straight, equal parts are equal steps."""
        return min(int(part * self.steps), self.steps - 1)

    def is_like(self, other: "Schedule") -> bool:
        """Whether both add the same noise: alpha^2 and sigma^2 within 1e-4 at every t."""
        if self.steps != other.steps:
            return False
        t = torch.arange(self.steps)
        one, two = self.to("cpu").alpha_sigma(t), other.to("cpu").alpha_sigma(t)
        return all(torch.allclose(a**2, b**2, atol=1e-4) for a, b in zip(one, two))


class VariancePreserving(Schedule):
    """alpha_t = sqrt(abar_t), sigma_t = sqrt(1 - abar_t), from a table of abar_t (T,), float32,
    which diffusers calls ``alphas_cumprod`` (DDPM, arXiv:2006.11239)."""

    space, density, kind = "noise", "uniform", "a diffusion"

    def __init__(self, alphas_cumprod: Float[Tensor, " T"]):
        self.alphas_cumprod = alphas_cumprod.float()

    @property
    def steps(self) -> int:  # type: ignore[override]
        """The number T of timesteps."""
        return len(self.alphas_cumprod)

    def alpha_sigma(self, t):
        """See :class:`Schedule`."""
        abar = self.alphas_cumprod[t]
        return abar.sqrt(), (1 - abar).sqrt()

    def to(self, device):
        """See :class:`Schedule`."""
        return VariancePreserving(self.alphas_cumprod.to(device))

    def weight(self, t, strategy="sds"):
        """See :class:`Schedule`."""
        return scores.weight(self.alphas_cumprod[t], strategy)

    def transition_variance(self, now, then):
        """1 - (alpha_then / alpha_now)^2, which the general form is here."""
        return 1 - (then[0] / now[0]) ** 2


class RectifiedFlow(Schedule):
    """alpha = 1 - s, sigma = s (arXiv:2209.03003), where T even times u are shifted towards noise
    (arXiv:2403.03206, eq. 23):

        u_t = (t + 1/2) / T,  s_t = shift u_t / (1 + (shift - 1) u_t),

    and the network is told T s_t (see :meth:`told`), which is no whole number.

    Timesteps are whole numbers, as those of a diffusion are, although a flow knows all times: what
    counts in timesteps (the range of t, the interval of ISM, a grid of an inversion) means the same
    of both then, and with T = 1,000 two neighbours differ by at most 0.001 shift in s. Each stands
    for the middle of its bin, so that neither s = 0 nor s = 1 occurs, at which a difference of
    velocities is no difference of latents, or of noise; diffusers' own tables have u = (t + 1) / T.

    ``min_step_percent`` and ``max_step_percent`` of a method are parts of T, before the shift: with
    shift 3, 0.02 to 0.98 is s from 0.058 to 0.993. :meth:`part_of` is the way back from s. A
    uniform draw of t has the density shift / (shift + (1 - shift) s)^2 in s.
    """

    space, density, kind = "velocity", "logit-normal", "a flow"

    def __init__(self, shift: float = 1.0, steps: int = 1000, device: Any = "cpu"):
        if not 0 < shift < float("inf"):
            raise ValueError(f"the shift of a flow is a number above 0, not {shift}")
        self.shift, self.steps = float(shift), steps
        u = (torch.arange(steps, dtype=torch.float64) + 0.5) / steps
        s = self.shift * u / (1 + (self.shift - 1) * u)
        # alpha of its own: in float32, 1 - s has lost the digits of an s that is nearly 1
        self._alpha, self._sigma = ((1 - s).float().to(device), s.float().to(device))

    def alpha_sigma(self, t):
        """See :class:`Schedule`."""
        return self._alpha[t], self._sigma[t]

    def to(self, device):
        """See :class:`Schedule`."""
        return RectifiedFlow(self.shift, self.steps, device)

    def told(self, t: Int[Tensor, " B"], scale: float | None = None) -> Rows:
        """What a network is told of the time, ``scale`` s_t: by default T s_t."""
        return (self.steps if scale is None else scale) * self._sigma[t]

    def at(self, part):
        """The timestep at which sigma is ``part``."""
        return super().at(self.part_of(part))

    def part_of(self, s: float) -> float:
        """The part u of the timesteps at which sigma is ``s``, of 0..1: what a
        ``min_step_percent`` or ``max_step_percent`` has to be. u = s / (shift - (shift - 1) s)."""
        return s / (self.shift - (self.shift - 1) * s)


def flow_schedule(config: Mapping[str, Any], image_tokens: int) -> RectifiedFlow:
    """The schedule that a ``FlowMatchEulerDiscreteScheduler`` of diffusers has for a picture that
    is ``image_tokens`` tokens for the transformer, from its config:

    shift, or with ``use_dynamic_shifting`` exp(mu) (``time_shift_type`` linear: mu), with mu linear
    in the number of tokens: ``base_shift`` at ``base_image_seq_len``, ``max_shift`` at
    ``max_image_seq_len``.

    Raises ``ValueError``, one line, for a config that makes no sense, and for one with a schedule
    that is no shift of even times (Karras, beta, exponential, or inverted sigmas).
    """
    steps, shift = config.get("num_train_timesteps", 1000), config.get("shift", 1.0)
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= MAX_TIMESTEPS:
        raise ValueError(f"num_train_timesteps is {str(steps)[:30]}, not 1 to {MAX_TIMESTEPS}")
    odd = [name for name in ODD_SIGMAS if config.get(name)]
    if odd:
        raise ValueError(f"{odd[0]} is set, and only shifted times are known")
    try:
        if config.get("use_dynamic_shifting"):
            low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
            least, most = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
            mu = least + (most - least) * (image_tokens - low) / (high - low)
            shift = mu if config.get("time_shift_type") == "linear" else math.exp(mu)
        shift = float(shift)
    except (TypeError, ValueError, ArithmeticError):
        raise ValueError("its shift is no number") from None
    return RectifiedFlow(shift, steps)
