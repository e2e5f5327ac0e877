"""standardise: kernel and reference against float64, and its machine code."""

import pytest
import torch
from aot import ARCHS, compile_kernel, needs_compiler
from numerics import assert_close_to_truth
from torch import Tensor

from mmfast_kernels import norm, tables
from mmfast_kernels.standardise import standardise, standardise_op, standardise_ref

gpu = pytest.mark.gpu
interpret = pytest.mark.interpret
LANES = [pytest.param("cpu", torch.float32, marks=interpret), pytest.param("cpu", torch.float16, marks=interpret)] + [
    pytest.param("cuda", dtype, marks=gpu) for dtype in (torch.float32, torch.float16, torch.bfloat16)
]


def inputs(d: int, rows: int = 5, dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """x far from zero mean, and a carry in fp32 that is as large."""
    g = torch.Generator().manual_seed(d)
    x, carry = torch.randn(rows, d, generator=g) * 2 + 3, torch.randn(d, generator=g) * 2
    return x.to(device, dtype), carry.to(device)


def check(x: Tensor, carry: Tensor | None) -> None:
    truth = standardise_ref(x.double(), None if carry is None else carry.double())
    assert_close_to_truth("y", standardise(x, carry), standardise_ref(x, carry), truth)


@pytest.mark.parametrize("d", [1, 8, 100, 192, 300])
@pytest.mark.parametrize("carried", [False, True], ids=["alone", "carry"])
@pytest.mark.parametrize(("device", "dtype"), LANES)
def test_kernel(d: int, carried: bool, device: str, dtype: torch.dtype, poisoned_empty: None) -> None:
    x, carry = inputs(d, dtype=dtype, device=device)
    check(x, carry if carried else None)


@pytest.mark.parametrize("rows", [0, 1, 3])
@interpret
def test_rows_that_are_apart(rows: int, poisoned_empty: None) -> None:
    x, carry = inputs(100, rows=2 * rows)
    check(x[::2], carry)


@gpu
@pytest.mark.parametrize("d", [384, 768, 1024, 1408, 16384])
def test_model_widths_on_gpu(d: int) -> None:
    check(*inputs(d, rows=37, dtype=torch.bfloat16, device="cuda"))


@interpret
def test_registration() -> None:
    x, carry = inputs(48)
    torch.library.opcheck(standardise_op, (x, carry, 1e-6, torch.float16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reference_is_the_norm_of_the_sum(dtype: torch.dtype) -> None:
    x, carry = inputs(48, dtype=dtype)
    s = x.double() + carry
    truth = (s - s.mean(-1, keepdim=True)) / (s.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()
    plain = torch.nn.functional.layer_norm(s.to(dtype), (48,), eps=1e-6)
    assert_close_to_truth("y", standardise_ref(x, carry), plain, truth)


def test_gradient_of_the_reference() -> None:
    x, carry = inputs(12)
    x, carry = x.double().requires_grad_(), carry.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, carry: standardise(x, carry), (x, carry))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.ones(2, 3), torch.ones(2)), ValueError, r"carry takes \[3\]"),
        ((torch.ones(2, 0),), ValueError, r"x takes \[..., D\]"),
        ((torch.ones(2, 3, dtype=torch.int32),), TypeError, "x takes a floating dtype"),
        ((torch.ones(2, 3), torch.ones(3, dtype=torch.int64)), TypeError, "carry takes a floating dtype"),
    ],
)
def test_wrong_arguments_are_named(arguments: tuple[Tensor, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        standardise(*arguments)


@pytest.mark.aot
@needs_compiler
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("d", [384, 768, 1024, 1408, 16384])
def test_compiles_without_spills_or_barriers(d: int, arch: int) -> None:
    pytest.importorskip("triton")
    from mmfast_kernels import standardise_triton

    for config in (tables.lookup("norm", d=d).config, *tables.lookup("norm", d=d).alternatives):
        constants = norm.geometry(d, config)
        warps = constants.pop("num_warps")
        report = compile_kernel(
            standardise_triton.standardise_kernel,
            {
                "x_ptr": "*bf16",
                "carry_ptr": "*fp32",
                "y_ptr": "*bf16",
                "x_stride": "i32",
                "n_rows": "i32",
                "eps": "fp32",
            },
            constants,
            arch=arch,
            num_warps=warps,
            num_stages=2,
            aligned=["x_stride"],
        )
        report.check()
        assert set(report.load_bits) == {128}, report
        assert warps > 1 or report.instructions["BAR"] == 0, report
