"""From a mask to the ids of the tokens that stay.

An op of its own, so that torch.compile takes it in one graph: how many ids there are is only known at run time.
"""

import torch
from torch import Tensor

from mmfast_kernels.dispatch import register


def _kept(removed: Tensor) -> Tensor:
    return removed.logical_not().nonzero()[:, -1].to(torch.int32)


def _kept_fake(removed: Tensor) -> Tensor:
    return removed.new_empty((torch.library.get_ctx().new_dynamic_size(),), dtype=torch.int32)


_kept_op = register("kept_ids(Tensor removed) -> Tensor", _kept, _kept_fake)


def kept_ids(removed: Tensor) -> Tensor:
    """Ids of the tokens that stay, mask after mask, ascending in each.

    removed: bool [..., N], True = removed. Returns int32 [T]. On a GPU this waits for the device, since T is read back.
    """
    return _kept_op(removed)
