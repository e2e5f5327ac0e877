"""What fp8 (e4m3) costs in accuracy, and where it comes from; emulated, so that it needs no GPU.

    python benchmarks/fp8_accuracy.py                                    # ViT-S, then 800 steps of training: minutes
    python benchmarks/fp8_accuracy.py --model videomae_base_patch16_224 --steps 0 --json out.json

int8_accuracy.py's measurements and options, of a model whose blocks run all their linear layers in fp8.
"""

import sys
from collections.abc import Sequence

import int8_accuracy
import torch
from torch import Tensor

from mmfast import MaskedViT
from mmfast.fp8 import LAYERS

LARGEST = 448.0


def rounded(x: Tensor) -> Tensor:
    """Every row of x as e4m3 with its own scale holds it."""
    step = x.abs().amax(-1, keepdim=True) / LARGEST
    return (x / step.where(step > 0, 1)).to(torch.float8_e4m3fn).to(x.dtype) * step


def quantized(model: MaskedViT) -> MaskedViT:
    """The model with all the layers that can in fp8."""
    return model.quantize_fp8(LAYERS)


def main(arguments: Sequence[str] | None = None) -> int:
    return int8_accuracy.main(arguments, int8_accuracy.Precision("fp8", rounded, quantized))


if __name__ == "__main__":
    sys.exit(main())
