"""Newton-Schulz orthogonalisation, the heart of Muon."""

from __future__ import annotations

import torch

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of x → a x + b x³ + c x⁵, chosen to grow small singular values fast; all end between about 0.7 and 1.2 (Jordan et al. 2024)."""


def orthogonal(matrix: torch.Tensor, iterations: int, dtype: torch.dtype, parts: int = 1) -> torch.Tensor:
    """About U Vᵀ of `matrix` = U S Vᵀ, times 0.2 √(larger side): the root mean square of an update of AdamW
    (Liu et al. 2025, eq. 4). Works in `dtype`, returns float32. `parts` matrices that lie one below the other are
    taken each by itself."""
    if parts > 1:
        return torch.cat([orthogonal(part, iterations, dtype) for part in matrix.chunk(parts)])
    a, b, c = COEFFICIENTS
    rows, columns = matrix.shape
    x = matrix.T if rows > columns else matrix
    x = (x / (x.norm() + 1e-7)).to(dtype)
    for _ in range(iterations):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    x = x.T if rows > columns else x
    return x.float() * (0.2 * max(rows, columns) ** 0.5)
