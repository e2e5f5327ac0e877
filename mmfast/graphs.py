"""CUDA graphs for small batches, where launching the kernels takes longer than running them.

A graph is captured when a shape comes for the second time (the first run compiles the kernels), kept per model, and replayed
on copies of its inputs. It reads the weights where they are, so training steps in place are seen; a weight that has moved
makes a new graph.
"""

import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mmfast_kernels.backends import forced
from mmfast_kernels.dispatch import tf32_allowed
from mmfast_kernels.overlap import overlaps

from .masks import Pack

GRAPH_TOKENS = 16_384  # more tokens than this keep the GPU busy for longer than their launches take
KEPT_GRAPHS = 8

Forward = Callable[[Tensor, Tensor | None, Pack], Tensor]


@dataclass
class _Captured:
    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    pack: Pack  # the graph reads its tensors, so they must live as long
    output: Tensor


_graphs: "weakref.WeakKeyDictionary[Any, OrderedDict[Any, _Captured | None]]" = weakref.WeakKeyDictionary()


def replay(model: Any, forward: Forward, pixels: Tensor, row_of: Tensor | None, pack: Pack) -> Tensor:
    """forward(pixels, row_of, pack), through a CUDA graph where that pays."""
    if not _worthwhile(model, pixels, pack):
        return forward(pixels, row_of, pack)
    if row_of is not None:
        pixels = _padded(pixels, pack.num_tokens)
    seen = _graphs.setdefault(model, OrderedDict())
    key = _key(model, pixels, row_of, pack)
    if key not in seen:
        seen[key] = None
        while len(seen) > KEPT_GRAPHS:
            seen.popitem(last=False)
        return forward(pixels, row_of, pack)
    seen.move_to_end(key)
    captured = seen[key]
    if captured is None:
        captured = seen[key] = _capture(forward, pixels, row_of, pack)
    for static, given in zip(captured.inputs, _inputs(pixels, row_of, pack), strict=True):
        static.copy_(given, non_blocking=True)
    captured.graph.replay()
    return captured.output.clone()


def _worthwhile(model: Any, pixels: Tensor, pack: Pack) -> bool:
    return (
        pixels.is_cuda
        and pack.length is not None
        and 0 < pack.num_tokens <= GRAPH_TOKENS
        and not getattr(model, "training", False)
        and not torch.cuda.is_current_stream_capturing()
    )


def _key(model: Any, pixels: Tensor, row_of: Tensor | None, pack: Pack) -> tuple[Any, ...]:
    weights = hash(tuple(p.data_ptr() for p in model.parameters()))
    autocast = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
    layout = (pixels.shape, pixels.stride(), pixels.dtype, pixels.device, row_of is None)
    # Outside inference mode nothing may be copied into a tensor made inside.
    modes = (
        autocast,
        forced(),
        overlaps(pixels.device),
        tf32_allowed(),
        torch.is_inference_mode_enabled(),
        getattr(model, "use_adapters", False),
        getattr(getattr(model, "fused", None), "generation", 0),
        model.quantization() if hasattr(model, "quantization") else 0,
    )
    return (layout, pack.num_sequences, pack.length, weights, modes)


def _inputs(pixels: Tensor, row_of: Tensor | None, pack: Pack) -> tuple[Tensor, ...]:
    # Equal lengths: cu_seqlens and clip_of follow from the shapes, so only what changes from call to call is copied in.
    return (pixels, pack.keep_idx) if row_of is None else (pixels, pack.keep_idx, row_of)


def _padded(rows: Tensor, count: int) -> Tensor:
    """Rows filled up to one for every token, so that the shape does not change with the overlap of the views."""
    full = rows.new_zeros(count, *rows.shape[1:])
    full[: rows.shape[0]] = rows
    return full


def _capture(forward: Forward, pixels: Tensor, row_of: Tensor | None, pack: Pack) -> _Captured:
    inputs = tuple(t.clone() for t in _inputs(pixels, row_of, pack))
    static_pack = replace(pack, keep_idx=inputs[1], cu_seqlens=pack.cu_seqlens.clone(), clip_of=pack.clip_of.clone())
    static_rows = inputs[2] if len(inputs) == 3 else None
    with torch.cuda.device(pixels.device):
        stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            forward(inputs[0], static_rows, static_pack)
        current.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            # A pack of its own: what the first run left with the other would be a constant of the graph.
            output = forward(inputs[0], static_rows, replace(static_pack))
    return _Captured(graph, inputs, static_pack, output)
