"""The only numerical comparison of the op tests.

Truth is the reference in float64. The bar: an op may be at most twice as far from it as plain torch is in the op's own
dtype, plus 1e-5 of the value. Written as `error <= allowed`, so that a NaN fails.
"""

import torch
from torch import Tensor


def assert_close_to_truth(name: str, got: Tensor, plain: Tensor, truth: Tensor, slack: float = 2.0) -> None:
    """got: the op's result. plain: plain torch's result in the same dtype. truth: float64."""
    assert got.shape == truth.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(truth.shape)}"
    assert truth.dtype == torch.float64, f"{name}: truth must be float64, got {truth.dtype}"
    if truth.numel() == 0:
        return
    error = (got.double() - truth).abs()
    plain_error = (plain.double() - truth).abs().max()
    allowed = slack * plain_error + 1e-5 * truth.abs().clamp(min=1.0)
    worst = (error - allowed).argmax()
    assert bool((error <= allowed).all()), (
        f"{name}: error {error.flatten()[worst]:.3e} at {int(worst)} exceeds {allowed.flatten()[worst]:.3e} "
        f"(plain torch's worst error is {plain_error:.3e})"
    )


def relative_error(got: Tensor, truth: Tensor) -> float:
    """Norm of the difference over the norm of the truth."""
    return float((got.double() - truth.double()).norm() / truth.double().norm())
