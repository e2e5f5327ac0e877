"""Whether kernels overlap: programmatic dependent launch, of sm_90 and later.

A kernel launched so is made ready while the one before it ends, and waits, before it touches memory, for that one and all it
wrote. It saves a microsecond or two between two kernels, which counts where a pass is short. The table overlap.json holds
the choice, which `mmfast tune` measures on whole passes; MMFAST_OVERLAP=1 or 0, read once, overrules it.
"""

import functools
import os

import torch

from mmfast_kernels import tables


@functools.cache
def overlaps(device: torch.device) -> bool:
    """Whether kernels on this device are launched so. ValueError for a MMFAST_OVERLAP other than 0 and 1."""
    wanted = os.environ.get("MMFAST_OVERLAP") or None
    if wanted not in (None, "0", "1"):
        raise ValueError(f"MMFAST_OVERLAP takes 0 or 1, got {wanted!r}")
    arch = tables.arch_of(device)
    chosen = tables.lookup("overlap", arch=arch).config["on"] if wanted is None else wanted == "1"
    return arch >= 90 and bool(chosen)


def launch_options(device: torch.device) -> dict[str, bool]:
    """What a kernel with a constant OVERLAP is launched with."""
    return {"OVERLAP": True, "launch_pdl": True} if overlaps(device) else {"OVERLAP": False}
