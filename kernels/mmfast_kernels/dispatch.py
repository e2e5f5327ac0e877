"""Which path an op takes, and how it is registered.

An op runs its Triton kernel on CUDA tensors, and on CPU tensors under TRITON_INTERPRET=1 (the test lane that checks
kernel numerics without a GPU). Everything else runs the plain-torch reference beside the kernel.
"""

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"
NAMESPACE = "mmfast"
_library = torch.library.Library(NAMESPACE, "FRAGMENT")

try:
    import triton  # noqa: F401 (only whether it is there)
except ImportError:
    HAVE_TRITON = False
else:
    HAVE_TRITON = True


def use_kernel(*tensors: Tensor | None) -> bool:
    """True when these inputs go to the Triton kernel, forward and backward. Kernels accumulate in fp32: not for float64."""
    given = [t for t in tensors if t is not None]
    if any(t.dtype == torch.float64 for t in given):
        return False
    return HAVE_TRITON and (given[0].is_cuda or INTERPRET)


def needs_grad(*tensors: Tensor | None) -> bool:
    """True when autograd will want to come back through an op of these inputs."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def tf32_allowed() -> bool:
    """Whether torch may round fp32 products to TF32, which our products then do too."""
    # Not matmul.allow_tf32, which raises where fp32_precision, its successor, was set.
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def register(schema: str, impl: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Define mmfast::<schema>, and return the op.

    torch.Library costs about 3 us a call, torch.library.custom_op 13 us and more. The key CompositeExplicitAutograd
    runs the same function on every device, so opcheck and torch.compile are tested without a GPU.
    """
    name = schema.split("(", 1)[0]
    _library.define(schema)
    _library.impl(name, impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    return getattr(getattr(torch.ops, NAMESPACE), name).default
