"""What a Triton kernel that may overlap the one before it begins with."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def begin(OVERLAP: tl.constexpr):
    """Wait for the kernel before and all it wrote, and let the one after be made ready. Before any access to memory."""
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
