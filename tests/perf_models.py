"""What a model's forward pass or training step launches, computes and moves, counted on tensors without memory.

The model runs in fake tensors by the path that it takes on a GPU. Counted are the ops that torch dispatches and that
compute: mmfast's, one Triton kernel each in a forward pass (pooling and some backward ops have a second, small one), and
torch's, one kernel each; views and allocations are not. Of each: its operations (a multiply and an add are two) and the
bytes of the tensors that it reads and writes. A layer's share is the difference between models of two layers and of one.
"""

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from mmfast.config import from_name, mae_from_name
from mmfast.mae import MaskedAutoencoder
from mmfast.masks import Pack
from mmfast.vit import MaskedViT
from mmfast_kernels import attention, backends, dispatch

VIDEO = (3, 16, 224, 224)
GRID = (8, 14, 14)
CLASSES = 204
ALLOCATIONS = ("empty", "empty_like", "new_empty", "empty_strided", "lift_fresh")


class Work(TorchDispatchMode):
    """Counts the ops dispatched below it."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()
        self.operations = self.bytes = 0

    def minus(self, other: "Work") -> "Work":
        """What is here and not in the other."""
        left = Work()
        left.ops = Counter({name: n for name in self.ops | other.ops if (n := self.ops[name] - other.ops[name])})
        left.operations, left.bytes = self.operations - other.operations, self.bytes - other.bytes
        return left

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = op(*args, **(kwargs or {}))
        name = op._schema.name
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in op._schema.returns)
        if not view and name.startswith(("aten::", "mmfast::")) and name.split("::")[1] not in ALLOCATIONS:
            given, made = list(_tensors([args, kwargs])), list(_tensors(out))
            self.ops[name.removeprefix("aten::")] += 1
            self.operations += _operations(name, args, made)
            self.bytes += _bytes(name, args, given, made)
        return out


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (list, tuple)):
        for leaf in tree:
            yield from _tensors(leaf)
    elif isinstance(tree, dict):
        yield from _tensors(list(tree.values()))


def _operations(name: str, args: Any, made: list[Tensor]) -> int:
    kind = name.split("::")[1].rstrip("_")
    if kind in ("mm", "bmm"):
        return 2 * made[0].numel() * args[0].shape[-1]
    if kind == "addmm":
        return 2 * made[0].numel() * args[1].shape[-1]
    if kind in ("linear_gelu", "linear_gelu_hidden"):
        return 2 * made[0].numel() * args[0].shape[1]
    if kind == "tube_embed":
        return 2 * made[0].numel() * args[1][0].numel()
    if kind == "tube_embed_dweight":
        return 2 * args[0].shape[0] * made[0].numel()
    if kind == "packed_attention":
        return 4 * args[0].numel() * args[6]
    if kind == "self_attention_backward":
        return 10 * args[2].numel() * args[5]
    return 0


def _bytes(name: str, args: Any, given: list[Tensor], made: list[Tensor]) -> int:
    tensors = {id(t): t for t in (*given, *made)}.values()
    total = sum(t.numel() * t.element_size() for t in tensors)
    if name == "mmfast::tube_embed":  # of the clips only what is kept
        video, weight, tokens = args[0], args[1], made[0].shape[0]
        total += (tokens * weight[0].numel() - video.numel()) * video.element_size()
    elif name == "mmfast::tube_embed_dweight":
        video, dy = args[1], args[0]
        total += (dy.shape[0] * made[0][0].numel() - video.numel()) * video.element_size()
    written_in_place = {id(t) for t in given} & {id(t) for t in made}
    return total + sum(t.numel() * t.element_size() for t in made if id(t) in written_in_place)


@contextmanager
def gpu_path(model: nn.Module) -> Iterator[None]:
    """Tensors have no memory, the model's too, and the ops take them for what their kernels run on."""
    mode = FakeTensorMode()
    _fake(model, mode)
    patches = [mock.patch.object(module, "INTERPRET", True) for module in (dispatch, backends, attention)]
    backends._choose.cache_clear()
    for patch in patches:
        patch.start()
    try:
        with mode:
            yield
    finally:
        for patch in patches:
            patch.stop()
        backends._choose.cache_clear()


def _fake(model: nn.Module, mode: FakeTensorMode) -> None:
    """The model's tensors without their memory."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(mode.from_tensor(parameter.data), parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = mode.from_tensor(buffer)


def _ids(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.int32)


def _pack(sequences: int, length: int) -> Pack:
    return Pack(_ids(sequences * length), _ids(sequences + 1), _ids(sequences), length, length, tubes=True)


Case = Callable[[int], Work]  # by the number of layers


def inference(size: str, cells: int, views: int, *, fused: bool = False, clips: int = 4) -> Case:
    """The class scores of an ensemble's views in bf16, from uint8 clips.   cells: of 196 that each view keeps."""

    def run(depth: int) -> Work:
        model = MaskedViT(from_name(f"videomae_{size}_patch16_224", num_classes=CLASSES, depth=depth)).eval()
        model = model.to(torch.bfloat16)
        if fused:
            model.fuse_for_inference()
        with gpu_path(model), torch.no_grad():
            video, pack = torch.empty(clips, *VIDEO, dtype=torch.uint8), _pack(clips * views, GRID[0] * cells)
            with Work() as work:
                model.logits(model.embed(video, pack), pack, GRID)
        return work

    return run


def pretraining(size: str, cells: int, *, clips: int = 4) -> Case:
    """Forward and backward of masked pre-training's loss under autocast to bf16, encoder and decoder as deep."""

    def run(depth: int) -> Work:
        config = mae_from_name(f"pretrain_videomae_{size}_patch16_224", depth=depth, decoder_depth=depth)
        model = MaskedAutoencoder(config)
        with gpu_path(model):
            video, visible = torch.empty(clips, *VIDEO, dtype=torch.uint8), _pack(clips, GRID[0] * cells)
            with Work() as work:
                with torch.autocast("cpu", torch.bfloat16):
                    loss = model.reconstruction_loss(video, visible)
                loss.backward()
        return work

    return run


CASES: dict[str, Case] = {
    "ViT-S inference, ratio 0.75, 2 views": inference("small", 49, 2),
    "ViT-S inference, ratio 0.75, 2 views, fused": inference("small", 49, 2, fused=True),
    "ViT-S inference, full clip": inference("small", 196, 1),
    "ViT-B inference, ratio 0.9, 2 views": inference("base", 20, 2),
    "ViT-B inference, ratio 0.9, 2 views, fused": inference("base", 20, 2, fused=True),
    "ViT-S pre-training, ratio 0.9": pretraining("small", 20),
}


def version() -> str:
    if not dispatch.HAVE_TRITON:
        raise ImportError("without triton no model takes the kernels' path")
    return "torch " + ".".join(torch.__version__.split(".")[:2])


@functools.cache
def layer_and_rest(case: str) -> tuple[Work, Work]:
    """The work of one more layer, and of everything that is no layer."""
    one, two = (CASES[case](depth) for depth in (1, 2))
    return two.minus(one), one.minus(two.minus(one))


def measure(case: str) -> dict[str, float]:
    figures: dict[str, float] = {}
    for where, work in zip(("a layer", "besides"), layer_and_rest(case), strict=True):
        figures |= {
            f"{where}: ops": work.ops.total(),
            f"{where}: operations": work.operations,
            f"{where}: bytes": work.bytes,
        }
        figures |= {f"{where}: {name}": count for name, count in sorted(work.ops.items())}
    return figures
