"""The TED-Adapter against its published form, its two bare products, and other ways to do the same, checked first.

    python benchmarks/ted_adapter.py                               # 768 wide, 384 hidden, 8 frames of 197 tokens, batch 4
    python benchmarks/ted_adapter.py --threads 1 --no-compile --json out.json

published: M2-CLIP's module, restated out of place (as released it writes to its input, and has no backward in fp32).
two products: x W^T twice, without anything else, by torch's own F.linear and by mmfast's linear (oneDNN on the CPU).
depthwise convolutions: mmfast's two products with torch's convolutions (oneDNN, cuDNN) between them.
Outputs and all gradients are held against float64 before anything is timed. Traffic is counted: rows of activations that the
operators of a forward read and write, a token, in rows of the adapter's width; "in memory" leaves out blocks of a few views,
which on the CPU stay in the cache.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import harness
import torch
import torch.nn.functional as F
from options import DTYPES, at_least, device_of
from report import aligned, machine_lines
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from variants import relative_error

from mmfast.adapters import FrameLayout, TEDAdapter
from mmfast_kernels.linear import linear

OURS, PUBLISHED = "mmfast", "published"
BARE = ("two products, F.linear", "two products, mmfast")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="ted_adapter.py",
        description="The TED-Adapter against its published form and its bare products, checked. "
        "Exit codes: 0 done; 2 wrong options; 3 results differ, nothing timed.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--dim", type=at_least(1), default=768)
    add("--hidden", type=at_least(1), default=384, help="of each branch")
    add("--frames", type=at_least(1), default=8)
    add("--grid", type=at_least(1), nargs=2, default=[14, 14], metavar=("H", "W"))
    add("--batch", type=at_least(1), help="clips; default: 4 on CPU, 21 on CUDA")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=sorted(DTYPES), help="default: bf16 on CUDA, fp32 on CPU")
    add("--threads", type=at_least(1), help="CPU threads; default: torch's")
    add("--rounds", type=at_least(2), default=15)
    add("--no-compile", action="store_true", help="leave out torch.compile")
    add("--seed", type=at_least(0), default=0)
    add("--json", metavar="FILE", help="write everything")
    options = parser.parse_args(arguments)
    options.device = device_of(parser, options.device)
    cuda = options.device.type == "cuda"
    options.dtype = DTYPES[options.dtype or ("bf16" if cuda else "fp32")]
    options.batch = options.batch or (21 if cuda else 4)
    return options


# -- the variants: x [B*F, 1 + h*w, D] -> the same --


def published(adapter: TEDAdapter, x: Tensor, frames: int, grid: tuple[int, int]) -> Tensor:
    """Each branch with its own products; the difference is taken of x, and b3 added to it."""
    rows, tokens, dim = x.shape
    fc1, fc2 = (partial(F.linear, weight=fc.weight, bias=fc.bias) for fc in (adapter.fc1, adapter.fc2))
    h = fc1(x).view(rows // frames, frames, tokens, -1).permute(0, 2, 3, 1).contiguous().flatten(0, 1)
    h = F.conv1d(h, adapter.conv.weight, adapter.conv.bias, padding=1, groups=h.shape[1])
    u = h.unflatten(0, (-1, tokens)).permute(0, 3, 1, 2).contiguous().flatten(0, 1)
    offset = adapter.offset_adapter
    cells = x.view(-1, frames, tokens, dim)[:, :, 1:]
    before = [0, *range(frames - 1)]
    d = (
        F.linear(cells - cells[:, before], offset.fc1.weight, offset.fc1.bias)
        .unflatten(2, grid)
        .permute(0, 4, 1, 2, 3)
        .contiguous()
    )
    d = F.conv3d(d, offset.conv.weight, offset.conv.bias, padding=(0, 1, 1), groups=d.shape[1])
    d = d.permute(0, 2, 3, 4, 1).contiguous().view(rows, tokens - 1, -1)
    o = F.linear(d, offset.fc2.weight, offset.fc2.bias)
    return x + fc2(u) + F.pad(o, (0, 0, 1, 0))


def convolutions(adapter: TEDAdapter, x: Tensor, frames: int, grid: tuple[int, int]) -> Tensor:
    """One product in, torch's depthwise convolutions, one product out."""
    rows, tokens, _ = x.shape
    offset = adapter.offset_adapter
    hidden = adapter.fc1.out_features
    first = torch.cat((adapter.fc1.weight, offset.fc1.weight))
    second = torch.cat((adapter.fc2.weight, offset.fc2.weight), 1)
    h = linear(x, first, F.pad(adapter.fc1.bias, (0, hidden))).view(-1, frames, tokens, 2 * hidden)
    # A column of frames, with neighbours in the last dimension side by side in memory.
    time = h[..., :hidden].permute(0, 3, 1, 2)
    u = F.conv2d(time, adapter.conv.weight[..., None], adapter.conv.bias, padding=(1, 0), groups=hidden)
    z = h[:, :, 1:, hidden:]
    d = z - torch.cat((z[:, :1], z[:, :-1]), 1) + offset.fc1.bias
    cells = d.reshape(rows, *grid, hidden).permute(0, 3, 1, 2)
    o = F.conv2d(cells, offset.conv.weight[:, :, 0], offset.conv.bias, padding=1, groups=hidden)
    o = F.pad(o.permute(0, 2, 3, 1).flatten(1, 2), (0, 0, 1, 0))
    both = torch.cat((u.permute(0, 2, 3, 1).reshape(rows, tokens, hidden), o), -1)
    out = x + linear(both, second, adapter.fc2.bias)
    return out + F.pad(offset.fc2.bias.expand(rows, tokens - 1, -1), (0, 0, 1, 0))


class Rows(TorchDispatchMode):
    """Counts the elements that operators read and write of tensors larger than the weights; views are free.

    total: of all. memory: of tensors that hold all tokens, which a block of a few views, made and used in the cache, does not.
    """

    def __init__(self, weights: int, tokens: float) -> None:
        super().__init__()
        self.weights, self.tokens = weights, tokens
        self.total = self.memory = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        made = out if isinstance(out, list | tuple) else [out]
        packet = func.overloadpacket
        # index_add_ touches the class tokens' rows alone, empty none.
        if func.is_view or packet in (torch.ops.aten.index_add_, torch.ops.aten.empty, torch.ops.aten.empty_like):
            return out
        written = [] if "out" in kwargs else [a for a in args[:1] if packet is torch.ops.mmfast.ted_stencil_]
        for t in (*args, *made, *written):
            for each in t if isinstance(t, list | tuple) else (t,):
                # An expanded tensor is read where it has memory.
                large = isinstance(each, Tensor) and each.is_floating_point() and each.numel() > self.weights
                if large and 0 not in each.stride():
                    self.total += each.numel()
                    held = each.untyped_storage().nbytes() // each.itemsize
                    self.memory += each.numel() if held >= self.tokens else 0
        return out


def counted(call: Callable[[], object], x: Tensor, hidden: int) -> tuple[float, float]:
    """Elements moved in one call a token and unit of width: all, and those to and from memory."""
    with torch.no_grad(), Rows(2 * hidden * x.shape[2], 0.9 * x.shape[0] * x.shape[1] * hidden) as mode:
        call()
    return mode.total / x.numel(), mode.memory / x.numel()


class Work:
    """Inputs, parameters and the calls on them."""

    def __init__(self, options: argparse.Namespace) -> None:
        torch.manual_seed(options.seed)
        self.options, self.frames, self.grid = options, options.frames, (options.grid[0], options.grid[1])
        device, dtype = options.device, options.dtype
        self.adapter = TEDAdapter(options.dim, options.hidden)
        for name, parameter in self.adapter.named_parameters():
            torch.nn.init.normal_(parameter, std=0.3 if "conv" in name else 0.03)
        self.adapter = self.adapter.to(device, dtype)
        shape = (options.batch * options.frames, 1 + self.grid[0] * self.grid[1], options.dim)
        self.x = torch.randn(shape, device=device).to(dtype).requires_grad_()
        self.dy = torch.randn(shape, device=device).to(dtype)
        width = (2 * options.hidden, options.dim)
        self.bare = [
            (torch.randn(s, device=device) * 0.03).to(dtype).requires_grad_() for s in (width, (width[1], width[0]))
        ]
        layout = FrameLayout.dense(options.batch, self.frames, self.grid, device=device)
        self.variants: dict[str, Callable[[TEDAdapter, Tensor], Tensor]] = {
            PUBLISHED: self._published,
            "depthwise convolutions": lambda adapter, x: convolutions(adapter, x, self.frames, self.grid),
        }
        if not options.no_compile:
            self.variants["torch.compile"] = torch.compile(self._published, dynamic=False)
        self.variants[OURS] = lambda adapter, x: adapter.run(x.view(-1, x.shape[2]), layout).view(x.shape)

    def _published(self, adapter: TEDAdapter, x: Tensor) -> Tensor:
        return published(adapter, x, self.frames, self.grid)

    def gradients(
        self, variant: Callable[[TEDAdapter, Tensor], Tensor], adapter: TEDAdapter, x: Tensor
    ) -> list[Tensor]:
        """The output without the residual, and all gradients."""
        y = variant(adapter, x)
        return [y - x, *torch.autograd.grad(y, [x, *adapter.parameters()], self.dy.to(x.dtype))]

    def errors(self) -> dict[str, float]:
        """Of every variant, the largest relative error of the output and the gradients against float64."""
        exact = TEDAdapter(self.options.dim, self.options.hidden).to(self.options.device, torch.float64)
        exact.load_state_dict(self.adapter.state_dict())
        truth = self.gradients(self._published, exact, self.x.detach().double().requires_grad_())
        found = {}
        for name, variant in self.variants.items():
            got = self.gradients(variant, self.adapter, self.x)
            found[name] = max(relative_error(a.detach(), b.detach()) for a, b in zip(got, truth, strict=True))
        return found

    def calls(self, train: bool) -> dict[str, Callable[[], object]]:
        x, dy = self.x, self.dy
        w1, w2 = self.bare
        made: dict[str, tuple[Callable[[], Tensor], list[Tensor]]] = {
            BARE[0]: (lambda: F.linear(F.linear(x, w1), w2), self.bare),
            BARE[1]: (lambda: linear(linear(x, w1), w2), self.bare),
        }
        for name, variant in self.variants.items():
            made[name] = (partial(variant, self.adapter, x), list(self.adapter.parameters()))

        def step(call: Callable[[], Tensor], parameters: list[Tensor]) -> object:
            return torch.autograd.grad(call(), [x, *parameters], dy)

        def alone(call: Callable[[], Tensor]) -> object:
            with torch.no_grad():
                return call()

        return {
            name: partial(step, call, parameters) if train else partial(alone, call)
            for name, (call, parameters) in made.items()
        }


def allowed(errors: dict[str, float]) -> float:
    return max(1e-5, 2 * errors[PUBLISHED])


def run(options: argparse.Namespace) -> int:
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    work = Work(options)
    facts = harness.machine(options.device)
    print(*machine_lines(facts, harness.ceilings(options.device, options.dtype)), sep="\n")
    tokens = work.x.shape[0] * work.x.shape[1]
    print(f"{tokens} tokens, {options.dim} wide, 2 x {options.hidden} hidden, {options.dtype}")
    errors = work.errors()
    red = {name: error for name, error in errors.items() if not error <= allowed(errors)}
    if red:
        print(*(f"{name}: relative error {e:.2e}, allowed {allowed(errors):.2e}" for name, e in red.items()), sep="\n")
        print("nothing timed")
        return 3
    moved = {
        name: counted(partial(variant, work.adapter, work.x), work.x, options.hidden)
        for name, variant in work.variants.items()
        if name != "torch.compile"
    }
    results: dict[str, Any] = {"machine": facts, "options": vars(options), "errors": errors, "moved": moved}
    times = {}
    for train in (False, True):
        what = "forward and backward" if train else "forward"
        taken = harness.measure(work.calls(train), options.device, rounds=options.rounds, warmup=2, what=what)
        bare = min(taken[name].median for name in BARE)
        table: list[tuple[str, ...]] = [(what, "ms", "+-", "x bare", "rows moved", "in memory", "error")]
        for name, timing in taken.items():
            rows = [f"{count:.2f}" for count in moved.get(name, ())] if not train else []
            error = f"{errors[name]:.1e}" if name in errors else ""
            ratio = f"{timing.median / bare:.2f}"
            table.append((name, f"{timing.median:.2f}", f"{timing.spread:.0%}", ratio, *(rows or ["", ""]), error))
        print(*aligned(table), sep="\n", flush=True)
        ours = taken[OURS].median
        peers = [f"{taken[name].median / ours:.2f} x {name}" for name in work.variants if name != OURS]
        print(f"mmfast: {ours / bare:.3f} times the faster bare products; faster than others: {', '.join(peers)}\n")
        times[what] = taken
    if options.json:
        harness.write_json(options.json, results | {"times": times})
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        options = parse(arguments)
    except SystemExit as stop:
        return int(stop.code or 0)
    return run(options)


if __name__ == "__main__":
    sys.exit(main())
