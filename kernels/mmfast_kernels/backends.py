"""Who computes attention: a kernel of ours (Triton, CUDA, C++), cuDNN, flash-attn, or torch; and why another is refused.

The table tables/attention_backends.json holds the order of preference by head width, length and architecture; the first
backend that does not refuse the case is taken. MMFAST_ATTENTION=<name> takes one by name, or says why it cannot be.
"""

import functools
import importlib.util
import inspect
import os
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mmfast_kernels import attention_wgmma, tables
from mmfast_kernels.dispatch import HAVE_TRITON, INTERPRET

NAMES = ("triton", "wgmma", "cpp", "cudnn", "flash_attn", "torch")
UNSHIPPED = ("wgmma",)  # in no shipped order: by name, or where `mmfast tune` has measured it to be faster
TRITON_WIDTHS = (32, 64, 80, 128)
OWN_BACKWARD = ("triton", "cpp")  # the others bring torch's autograd
HALF = (torch.float16, torch.bfloat16)


class Case(NamedTuple):
    """What the choice of a backend depends on."""

    device: torch.device
    dtype: torch.dtype
    d: int
    n_q: int  # queries of the longest sequence
    n_k: int
    dense: bool = True  # every sequence has n_q queries and n_k keys
    causal: bool = False
    needs_grad: bool = False
    with_lse: bool = False
    row_stride: int = 0  # the largest of q, k and v
    aligned: bool = True  # all rows and heads of q, k and v begin at multiples of 16 bytes


class Lengths(NamedTuple):
    """Where sequences begin: cu_q and cu_k [S+1] int32, or both None when each has n_q queries and n_k keys."""

    cu_q: Tensor | None
    cu_k: Tensor | None
    n_q: int
    n_k: int


def refusal(backend: str, case: Case) -> str | None:
    """Why a backend cannot take this case; None when it can. ValueError for a name that is no backend."""
    if backend not in NAMES:
        raise ValueError(f"backend must be one of {', '.join(NAMES)}, got {backend!r}")
    if backend == "torch":
        return None
    if backend == "triton":
        return _refusal_of_triton(case)
    if backend == "wgmma":
        return _refusal_of_wgmma(case)
    if backend == "cpp":
        return _refusal_of_cpp(case)
    name = {"cudnn": "cuDNN", "flash_attn": "flash-attn"}[backend]
    if case.device.type != "cuda":
        return f"{name} needs a CUDA device, got {case.device.type}"
    if case.dtype not in HALF:
        return f"{name} takes float16 and bfloat16, got {case.dtype}"
    if _arch(case.device) < 80:
        return f"{name} needs sm_80 or newer, this is sm_{_arch(case.device)}"
    if case.with_lse:
        return f"the log-sum-exp is not taken from {name}"
    if backend == "cudnn":
        return _refusal_of_cudnn(case)
    if not _installed("flash_attn"):
        return "flash-attn is not installed (pip install flash-attn)"
    return None if case.d % 8 == 0 and case.d <= 256 else f"flash-attn takes d up to 256 in steps of 8, got {case.d}"


def _refusal_of_triton(case: Case) -> str | None:
    if not HAVE_TRITON:
        return "triton is not installed"
    if case.device.type != "cuda" and not INTERPRET:
        return f"triton needs a CUDA device, got {case.device.type}"
    if case.device.type == "cuda" and _arch(case.device) < 80:
        return f"triton needs sm_80 or newer, this is sm_{_arch(case.device)}"
    if case.dtype not in (*HALF, torch.float32):
        return f"the Triton kernel takes float16, bfloat16 and float32, got {case.dtype}"
    if case.d not in TRITON_WIDTHS:
        return f"the Triton kernel takes d in {TRITON_WIDTHS}, got {case.d}"
    if case.row_stride >= 2**23:  # times a block of up to 256 rows, an offset must fit 32 bits
        return f"the Triton kernel takes rows less than 2**23 elements apart, got {case.row_stride}"
    return None


def _refusal_of_wgmma(case: Case) -> str | None:
    if case.device.type != "cuda":
        return f"the wgmma kernel needs a CUDA device, got {case.device.type}"
    if _arch(case.device) != 90:
        return f"the wgmma kernel needs sm_90, this is sm_{_arch(case.device)}"
    if not attention_wgmma.MOST_KEYS:
        return "csrc was built without the wgmma kernel (it needs nvcc, and 90 in MMFAST_CUDA_ARCHS)"
    if case.dtype not in HALF:
        return f"the wgmma kernel takes float16 and bfloat16, got {case.dtype}"
    if case.d != 64:
        return f"the wgmma kernel takes d = 64, got {case.d}"
    if not case.dense:
        return "the wgmma kernel takes sequences of one length only"
    if case.causal:
        return "the wgmma kernel has no causal mask"
    if case.needs_grad:
        return "the wgmma kernel has no backward"
    if not 1 <= case.n_k <= attention_wgmma.MOST_KEYS:
        return f"the wgmma kernel takes 1 to {attention_wgmma.MOST_KEYS} keys, got {case.n_k}"
    return None if case.aligned else "the wgmma kernel takes rows and heads at multiples of 16 bytes only"


def _refusal_of_cpp(case: Case) -> str | None:
    if case.device.type != "cpu":
        return f"the C++ routine needs a CPU tensor, got {case.device.type}"
    if case.dtype != torch.float32:
        return f"the C++ routine takes float32, got {case.dtype}"
    if case.d % 16 or not 16 <= case.d <= 128:
        return f"the C++ routine takes d up to 128 in steps of 16, got {case.d}"
    if case.needs_grad and case.with_lse:
        return "the gradient of the log-sum-exp is not taken from the C++ routine"
    return None


def _refusal_of_cudnn(case: Case) -> str | None:
    if not case.dense:
        return "cuDNN takes sequences of one length only"
    if not torch.backends.cudnn.is_available() or not torch.backends.cuda.cudnn_sdp_enabled():
        return "cuDNN attention is not available in this torch, or switched off"
    if _only_deterministic():
        return "torch has cuDNN attention as not deterministic, and torch.use_deterministic_algorithms was called"
    if case.n_k < 2:
        return f"cuDNN takes two keys and more, got {case.n_k}"
    if case.d % 8 or case.d > 128:
        return f"cuDNN takes d up to 128 in steps of 8, got {case.d}"
    if case.causal and case.n_q != case.n_k:
        return f"cuDNN's causal mask is not aligned to the last key: {case.n_q} queries, {case.n_k} keys"
    return None


def _arch(device: torch.device) -> int:
    """tables.arch_of, as something torch.compile need not look into."""
    return tables.arch_of(device)


# All that torch.compiler.assume_constant_result does, which would import torch.compile, a second, into every process.
_arch._dynamo_marked_constant = True  # type: ignore[attr-defined]  # functions take attributes


@functools.cache
def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def forced() -> str | None:
    """The backend that MMFAST_ATTENTION names."""
    return os.environ.get("MMFAST_ATTENTION") or None


def insist(backend: str, case: Case) -> None:
    """ValueError with the reason, if a backend asked for by name refuses the case."""
    reason = refusal(backend, case)
    if reason is not None:
        raise ValueError(f"backend {backend} refused: {reason}")


def choose(case: Case) -> tuple[str, dict[str, str]]:
    """The backend for a case, and the reason of every backend that refuses it."""
    wanted = forced()
    if wanted is not None:
        insist(wanted, case)
    chosen, refused = _choose(case, _switches())
    return wanted or chosen, dict(refused)


def choose_for_gradient(case: Case, wanted: str | None) -> str:
    """The backend to train with: `wanted` if it is given and takes the case, else the table's choice.

    torch.compile cannot look into the table: while it traces, our own kernels are taken wherever they can be.
    """
    if wanted is not None:
        insist(wanted, case)
        return wanted
    if torch.compiler.is_compiling():
        return next((name for name in OWN_BACKWARD if refusal(name, case) is None), "torch")
    return _choose(case, _switches())[0]


def _only_deterministic() -> bool:
    return torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()


def _switches() -> tuple[bool, bool]:
    """Of torch's, those that a refusal depends on and that may be turned between two calls."""
    return torch.backends.cuda.cudnn_sdp_enabled(), _only_deterministic()


@functools.lru_cache(maxsize=4096)
def _choose(case: Case, switches: tuple[bool, bool]) -> tuple[str, tuple[tuple[str, str], ...]]:
    reasons = {name: refusal(name, case) for name in NAMES}
    row = tables.lookup(
        "attention_backends",
        arch=tables.arch_of(case.device),
        dtype=tables.dtype_name(case.dtype),
        d=case.d,
        n=case.n_k,
        dense=case.dense,
        needs_grad=case.needs_grad,
        with_lse=case.with_lse,
    )
    chosen = next(name for name in row.config["order"] if reasons[name] is None)
    return chosen, tuple((name, reason) for name, reason in reasons.items() if reason is not None)


def describe(device: torch.device | str) -> dict[str, dict[str, Any]]:
    """For typical cases on a device: {"backend": the one taken, "refused": {name: reason}}."""
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    half = torch.bfloat16
    cases = {f"{n} tokens, d 64, bf16": Case(device, half, 64, n, n) for n in (160, 392, 784, 1568)}
    cases["392 tokens, d 80, bf16"] = Case(device, half, 80, 392, 392)
    cases["392 tokens, d 64, fp32"] = Case(device, torch.float32, 64, 392, 392)
    cases["mixed lengths up to 392, d 64, bf16"] = Case(device, half, 64, 392, 392, dense=False)
    cases["text of 77, causal, d 64, bf16"] = Case(device, half, 64, 77, 77, causal=True)
    cases["392 tokens, d 64, bf16, training"] = Case(device, half, 64, 392, 392, needs_grad=True)
    return {name: _describe(case) for name, case in cases.items()}


def _describe(case: Case) -> dict[str, Any]:
    try:
        backend, refused = choose(case)
    except ValueError as error:  # MMFAST_ATTENTION names one that refuses
        return {"backend": None, "refused": {"MMFAST_ATTENTION": str(error)}}
    return {"backend": backend, "refused": refused}


# -- the backends other than Triton: q [T, H, d], k, v [Tk, H, d] -> [T, H, d] contiguous --


def run(backend: str, q: Tensor, k: Tensor, v: Tensor, at: Lengths, causal: bool, scale: float) -> Tensor:
    """Attention by cpp, or by cudnn, flash_attn or torch, which autograd can follow."""
    if q.numel() == 0:
        return q.clone(memory_format=torch.contiguous_format)
    if k.shape[0] == 0:
        return torch.zeros_like(q, memory_format=torch.contiguous_format)
    if backend == "cpp":
        from mmfast_kernels import attention_cpp

        return attention_cpp.forward(q, k, v, at, causal, scale)[0]
    if backend == "flash_attn":
        return _flash_attn(q, k, v, at, causal, scale)
    if at.cu_q is None:
        if backend == "cudnn":
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                return _dense(q, k, v, at.n_q, at.n_k, causal, scale)
        return _dense(q, k, v, at.n_q, at.n_k, causal, scale)
    if q.is_cuda and q.dtype in HALF and q.shape[2] % 8 == 0 and q.shape[2] <= 256 and _arch(q.device) >= 80:
        return _varlen_attn(q, k, v, at, causal, scale)
    if q.is_cuda or torch.compiler.is_compiling():
        return _padded(q, k, v, at, causal, scale)
    return _runs(q, k, v, at, causal, scale)


def _varlen_attn(q: Tensor, k: Tensor, v: Tensor, at: Lengths, causal: bool, scale: float) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    assert at.cu_q is not None
    assert at.cu_k is not None
    known = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {"is_causal": causal}
    if "window_size" in known:  # its successor
        options = {"window_size": (-1, 0) if causal else (-1, -1)}
    if "scale" in known:
        options["scale"] = scale
    elif scale != q.shape[2] ** -0.5:
        q = q * (scale * q.shape[2] ** 0.5)
    out = varlen_attn(q, k, v, at.cu_q, at.cu_k, at.n_q, at.n_k, **options)
    assert isinstance(out, Tensor)  # a pair only where the log-sum-exp is asked for
    return out


def _flash_attn(q: Tensor, k: Tensor, v: Tensor, at: Lengths, causal: bool, scale: float) -> Tensor:
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    if at.cu_q is not None:
        cu = (at.cu_q, at.cu_k, at.n_q, at.n_k)
        return flash_attn_varlen_func(q, k, v, *cu, softmax_scale=scale, causal=causal)
    sequences = q.shape[0] // at.n_q
    views = (x.unflatten(0, (sequences, n)) for x, n in ((q, at.n_q), (k, at.n_k), (v, at.n_k)))
    return flash_attn_func(*views, softmax_scale=scale, causal=causal).flatten(0, 1)


def _dense(q: Tensor, k: Tensor, v: Tensor, n_q: int, n_k: int, causal: bool, scale: float) -> Tensor:
    sequences = q.shape[0] // n_q
    q, k, v = (x.unflatten(0, (sequences, n)).transpose(1, 2) for x, n in ((q, n_q), (k, n_k), (v, n_k)))
    unaligned = causal and n_q != n_k  # SDPA's own causal mask is aligned to the first key, ours to the last
    seen = torch.ones(n_q, n_k, dtype=torch.bool, device=q.device).tril(n_k - n_q) if unaligned else None
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=causal and not unaligned, scale=scale)
    out = out.transpose(1, 2)
    if unaligned and n_q > n_k:  # the first queries see no key
        out = torch.where((torch.arange(n_q, device=q.device) >= n_q - n_k)[None, :, None, None], out, 0.0)
    return out.flatten(0, 1).contiguous()


def _runs(q: Tensor, k: Tensor, v: Tensor, at: Lengths, causal: bool, scale: float) -> Tensor:
    """On the CPU the lengths are at hand: neighbours of one length go through SDPA together, without padding."""
    assert at.cu_q is not None
    assert at.cu_k is not None
    starts = list(zip(at.cu_q.tolist(), at.cu_k.tolist(), strict=True))
    pieces = []
    first = 0
    while first < len(starts) - 1:
        (q0, k0), (q1, k1) = starts[first], starts[first + 1]
        n_q, n_k, last = q1 - q0, k1 - k0, first + 1
        while last < len(starts) - 1 and starts[last + 1] == (starts[last][0] + n_q, starts[last][1] + n_k):
            last += 1
        q_end, k_end = starts[last]
        if n_q and n_k:
            pieces.append(_dense(q[q0:q_end], k[k0:k_end], v[k0:k_end], n_q, n_k, causal, scale))
        else:
            pieces.append(q.new_zeros(q_end - q0, *q.shape[1:]))
        first = last
    pieces.append(q.new_zeros(q.shape[0] - starts[-1][0], *q.shape[1:]))
    return torch.cat(pieces)


def _padded(q: Tensor, k: Tensor, v: Tensor, at: Lengths, causal: bool, scale: float) -> Tensor:
    """Without the lengths on the host: every sequence padded to the longest. Traceable, and waits for no device."""
    assert at.cu_q is not None
    assert at.cu_k is not None
    q_ids, q_live = _slots(at.cu_q, at.n_q, q.shape[0])
    k_ids, k_live = _slots(at.cu_k, at.n_k, k.shape[0])
    seen = k_live[:, None, :].expand(-1, at.n_q, -1)
    if causal:
        shift = (at.cu_k.diff() - at.cu_q.diff())[:, None, None]
        steps = torch.arange(max(at.n_q, at.n_k), device=q.device)
        seen = seen & (steps[None, None, : at.n_k] <= steps[None, : at.n_q, None] + shift)
    blind = ~seen.any(-1, keepdim=True)  # a query without keys takes them all, then is set to 0: no NaN, no gradient
    mask = (seen | blind)[:, None]
    q_pad = torch.where(q_live[..., None, None], q[q_ids], 0.0).transpose(1, 2)
    k_pad, v_pad = (torch.where(k_live[..., None, None], x[k_ids], 0.0).transpose(1, 2) for x in (k, v))
    out = F.scaled_dot_product_attention(q_pad, k_pad, v_pad, attn_mask=mask, scale=scale).transpose(1, 2)
    out = torch.where(blind[..., None], 0.0, out)
    rows = torch.arange(q.shape[0], device=q.device, dtype=at.cu_q.dtype)
    sequence = (torch.searchsorted(at.cu_q, rows, right=True) - 1).clamp(0, at.cu_q.shape[0] - 2)
    slot = (rows - at.cu_q[sequence]).clamp(0, at.n_q - 1)
    return out[sequence, slot]


def _slots(cu: Tensor, longest: int, rows: int) -> tuple[Tensor, Tensor]:
    """[S, longest]: the row in each slot of each sequence, and whether there is one."""
    slot = torch.arange(longest, device=cu.device)
    ids = (cu[:-1, None] + slot).clamp(max=rows - 1)
    return ids, slot < cu.diff()[:, None]
