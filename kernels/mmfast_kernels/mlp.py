"""Linear layer and GELU in one pass.

    y = gelu(h), h = x W^T + b              stored beside y where a gradient is needed
    dh = dy gelu'(h)    db = sum of dh over rows, in the same pass    dx = dh W    dW = dh^T x
    erf     0.5 h (1 + erf(h / sqrt 2))
    tanh    0.5 h (1 + tanh(h (c0 + c1 r + c2 r^2))), r = min(h^2, 36): the erf form within 2.5e-5 for a quarter of its
            instructions. On 16-bit outputs the hardware's tanh adds at most 2.5e-4 |h|, an eighth of a bf16 rounding.
    quick   h sigmoid(1.702 h), CLIP's

Where no kernel runs, "tanh" computes the erf form, which torch has as one pass and which it stands for.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfast_kernels import tables
from mmfast_kernels.dispatch import HAVE_TRITON, needs_grad, register, tf32_allowed, use_kernel
from mmfast_kernels.linear import differentiating_twice, grads_by_torch, linear, linear_erf_gelu
from mmfast_kernels.overlap import launch_options

if HAVE_TRITON:
    from triton.tools.tensor_descriptor import TensorDescriptor

    from mmfast_kernels import mlp_backward_triton, mlp_triton

MODES = ("erf", "tanh", "quick")
REFIT = (0.797506497, 0.0370045102, -3.51252277e-4)


@functools.cache
def sm_count(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def describable(*tensors: Tensor) -> bool:
    """True for matrices that the copy engine can address: base and row pitch in steps of 16 bytes, rows apart."""
    return all(
        t.data_ptr() % 16 == 0
        and t.stride(0) * t.element_size() % 16 == 0
        and t.stride(0) >= t.shape[1]
        and t.stride(1) == 1
        for t in tensors
    )


def launch(
    x: Tensor,  # [M, K]
    weight: Tensor,  # [N, K]
    bias: Tensor | None,  # [N]
    y: Tensor,  # [M, N]
    h: Tensor | None,  # [M, N], contiguous as y is; the product before the GELU
    mode: str,
    config: Mapping[str, Any],
) -> None:
    """One launch of the kernel that config names."""
    (m, k), n = x.shape, weight.shape[0]
    bm, bn, bk = config["BM"], config["BN"], config["BK"]
    tiles = math.ceil(m / bm) * math.ceil(n / bn)
    approx = x.dtype != torch.float32 and x.is_cuda
    options = {key: value for key, value in config.items() if key not in ("kernel", "blocks_per_sm")}
    options |= launch_options(x.device)
    if config["kernel"] == "descriptor":
        blocks = [(x, [bm, bk]), (weight, [bn, bk]), (y, [bm, bn // 2])]
        descriptors = [TensorDescriptor.from_tensor(t, block) for t, block in blocks]
        h_descriptor = None if h is None else TensorDescriptor.from_tensor(h, [bm, bn // 2])
        grid = (min(tiles, config["blocks_per_sm"] * sm_count(x.device)),)
        mlp_triton.linear_gelu_descriptor_kernel[grid](
            *descriptors, h_descriptor, bias, m, n, k, MODE=mode, APPROX=approx, **options
        )
    else:
        precision = "tf32" if tf32_allowed() else "ieee"
        mlp_triton.linear_gelu_kernel[(tiles,)](
            x, weight, y, h, bias, x.stride(0), weight.stride(0), m, n, k,
            MODE=mode, APPROX=approx, PRECISION=precision, EVEN_K=k % bk == 0, **options,
        )  # fmt: skip


def _run(x: Tensor, weight: Tensor, bias: Tensor | None, mode: str, *, hidden: bool) -> tuple[Tensor, Tensor | None]:
    x = x if x.stride(1) == 1 else x.contiguous()
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    y = _fwd_fake(x, weight, bias, mode)
    h = torch.empty_like(y) if hidden else None
    if y.numel():
        tiles = math.ceil(y.shape[0] / 128) * math.ceil(y.shape[1] / 128)
        dtype = tables.dtype_name(x.dtype)
        run = functools.partial(launch, x, weight, bias, y, h, mode)
        with torch.cuda.device_of(x):
            run(
                tables.config(
                    "linear_gelu",
                    run,
                    arch=tables.arch_of(x.device),
                    dtype="tf32" if dtype == "fp32" and tf32_allowed() else dtype,
                    descriptor=describable(x, weight, y),
                    small=tiles <= sm_count(x.device),
                )
            )
    return y, h


def _fwd(x: Tensor, weight: Tensor, bias: Tensor | None, mode: str) -> Tensor:
    return _run(x, weight, bias, mode, hidden=False)[0]


def _fwd_fake(x: Tensor, weight: Tensor, bias: Tensor | None, mode: str) -> Tensor:
    return torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype, device=x.device)


def _fwd_hidden(x: Tensor, weight: Tensor, bias: Tensor | None, mode: str) -> tuple[Tensor, Tensor]:
    y, h = _run(x, weight, bias, mode, hidden=True)
    assert h is not None
    return y, h


def _fwd_hidden_fake(x: Tensor, weight: Tensor, bias: Tensor | None, mode: str) -> tuple[Tensor, Tensor]:
    return _fwd_fake(x, weight, bias, mode), _fwd_fake(x, weight, bias, mode)


def _bwd(dy: Tensor, h: Tensor, mode: str, act: bool, sums: bool) -> list[Tensor]:
    (m, n), dy, h = h.shape, dy.contiguous(), h.contiguous()
    outputs = _bwd_fake(dy, h, mode, act, sums)

    def run(config: Mapping[str, Any]) -> Tensor | None:
        blocks = math.ceil(n / config["BN"])
        groups = min(math.ceil(m / config["BM"]), max(config["blocks_per_sm"] * sm_count(h.device) // blocks, 1))
        partial = torch.empty((groups, n), dtype=torch.float32, device=h.device) if sums else None
        mlp_backward_triton.gelu_backward_kernel[(groups * blocks,)](
            dy, h, outputs[0], outputs[1] if act else None, partial, m, n,
            MODE=mode, BM=config["BM"], BN=config["BN"], num_warps=config["num_warps"],
        )  # fmt: skip
        return partial

    if h.numel():
        with torch.cuda.device_of(h):
            arch, dtype = tables.arch_of(h.device), tables.dtype_name(h.dtype)
            partial = run(tables.config("gelu_backward", run, arch=arch, dtype=dtype))
        if partial is not None:
            torch.sum(partial, 0, out=outputs[-1])
    elif sums:
        outputs[-1].zero_()
    return outputs


def _bwd_fake(dy: Tensor, h: Tensor, mode: str, act: bool, sums: bool) -> list[Tensor]:
    outputs = [torch.empty(h.shape, dtype=h.dtype, device=h.device) for _ in range(2 if act else 1)]
    return [*outputs, torch.empty(h.shape[1], dtype=torch.float32, device=h.device)] if sums else outputs


linear_gelu_op = register("linear_gelu(Tensor x, Tensor weight, Tensor? bias, str mode) -> Tensor", _fwd, _fwd_fake)
# Returns y and h.
linear_gelu_hidden_op = register(
    "linear_gelu_hidden(Tensor x, Tensor weight, Tensor? bias, str mode) -> (Tensor, Tensor)",
    _fwd_hidden,
    _fwd_hidden_fake,
)
# Returns dh, then gelu(h) where act asks for it, then the sums of dh over rows, [N] fp32, where sums asks for them.
gelu_backward_op = register(
    "gelu_backward(Tensor dy, Tensor h, str mode, bool act, bool sums) -> Tensor[]", _bwd, _bwd_fake
)


class _LinearGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, mode: str) -> Tensor:
        y, h = linear_gelu_hidden_op(x, weight, bias, mode)
        ctx.save_for_backward(x, weight, bias, h)
        ctx.mode = mode
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, h = ctx.saved_tensors
        if differentiating_twice():
            return *grads_by_torch(functools.partial(linear_gelu_ref, mode=ctx.mode), (x, weight, bias), dy), None
        want_x, want_weight, want_bias, _ = ctx.needs_input_grad
        dh, *sums = gelu_backward_op(dy, h, ctx.mode, False, want_bias)
        return (
            dh @ weight if want_x else None,
            dh.t() @ x if want_weight else None,
            sums[0].to(dh.dtype) if want_bias else None,
            None,
        )


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None, mode: str = "erf") -> Tensor:
    """gelu(x W^T + b) with the GELU form that mode names: "erf" (exact), "tanh" (erf's fast stand-in) or "quick".

    x: [..., K]. weight: [N, K]. bias: [N] or None. One dtype, or any under autocast. Returns [..., N] in that dtype.
    Products of fp32 are exact unless torch.backends.cuda.matmul allows TF32. Raises ValueError, TypeError.
    """
    if mode not in MODES:
        raise ValueError(f"linear_gelu: mode takes one of {MODES}, got {mode!r}")
    x, weight, bias = checked_linear("linear_gelu", x, weight, bias)
    if use_kernel(x, weight, bias):
        run = _LinearGelu.apply if needs_grad(x, weight, bias) else linear_gelu_op
        return run(x.reshape(-1, x.shape[-1]), weight, bias, mode).view(*x.shape[:-1], weight.shape[0])
    if mode != "quick":
        return linear_erf_gelu(x, weight, bias)
    h = linear(x, weight, bias)
    if h.dtype in (torch.bfloat16, torch.float16):
        return h * torch.sigmoid(1.702 * h)
    if torch.is_grad_enabled() and h.requires_grad:
        return F.silu(h * 1.702) / 1.702
    return F.silu(h.mul_(1.702), inplace=True).div_(1.702)


def checked_linear(
    op: str, x: Tensor, weight: Tensor, bias: Tensor | None, names: tuple[str, str] = ("weight", "bias")
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The three as they enter the product: in autocast's dtype where it is on. Raises ValueError, TypeError."""
    if weight.dim() != 2:
        raise ValueError(f"{op}: {names[0]} takes [N, K], got {tuple(weight.shape)}")
    if x.dim() < 1 or x.shape[-1] != weight.shape[1] or weight.shape[1] == 0:
        raise ValueError(
            f"{op}: x takes [..., {weight.shape[1]}] for {names[0]} {tuple(weight.shape)}, got {tuple(x.shape)}"
        )
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if not x.is_floating_point():
        raise TypeError(f"{op}: x takes a floating dtype, got {x.dtype}")
    return x, *checked_parameters(op, x, weight, bias, names)


def checked_parameters(
    op: str, x: Tensor, weight: Tensor, bias: Tensor | None, names: tuple[str, str]
) -> tuple[Tensor, Tensor | None]:
    """weight and bias in the dtype of x, which is that of the product. Raises ValueError, TypeError."""
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{op}: {names[1]} takes [{weight.shape[0]}], got {tuple(bias.shape)}")
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    for name, tensor in zip(names, (weight, bias), strict=True):
        if tensor is not None and tensor.dtype != x.dtype:
            raise TypeError(f"{op}: {name} takes x's floating dtype, got {tensor.dtype} with x {x.dtype}")
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, x on {x.device}")
    return weight, bias


def linear_gelu_ref(x: Tensor, weight: Tensor, bias: Tensor | None, mode: str = "erf") -> Tensor:
    """linear_gelu in plain torch, "tanh" by its own formula."""
    return gelu_ref(F.linear(x, weight, bias), mode)


def gelu_ref(h: Tensor, mode: str) -> Tensor:
    """The GELU form that mode names, by its formula."""
    if mode == "erf":
        return F.gelu(h)
    if mode == "quick":
        return h * torch.sigmoid(1.702 * h)
    r = h.square().clamp(max=36.0)
    return 0.5 * h * (1 + torch.tanh(h * (REFIT[0] + r * (REFIT[1] + r * REFIT[2]))))
