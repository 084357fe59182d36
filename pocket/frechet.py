"""The Frechet distance between two sets of feature vectors."""

import numpy as np
from jaxtyping import Float


def frechet(a: Float[np.ndarray, "N D"], b: Float[np.ndarray, "M D"]) -> float:
    """Squared Frechet (2-Wasserstein) distance of the Gaussians with the mean and covariance of
    the rows of ``a`` and of ``b``:

        |mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))

    With C_a = R_a^T R_a the last trace is the sum of the singular values of R_a R_b^T, which needs
    no root of a matrix and holds for sets of fewer than D rows too. Small sets bias the distance
    upward. Each set needs at least two rows.
    """
    a, b = np.asarray(a, float), np.asarray(b, float)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(f"two sets (N, D), (M, D), N and M at least 2: not {a.shape}, {b.shape}")
    roots = [np.linalg.qr(x - x.mean(0), "r") / np.sqrt(len(x) - 1) for x in (a, b)]
    spread = sum(np.square(root).sum() for root in roots)
    common = np.linalg.norm(roots[0] @ roots[1].T, "nuc")
    # Rounding must not make the distance of a set to itself negative.
    return float(max(np.square(a.mean(0) - b.mean(0)).sum() + spread - 2 * common, 0.0))
