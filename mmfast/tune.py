"""Configurations of the kernels, measured on this machine's GPU for the shapes that given models will meet.

Every configuration of a table's row is timed on what a forward, and a training step, launches; so are the backends that take
its attention. One wins only by more than the quartiles' distance of both, and only if the models' results stay what they were.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from mmfast_kernels import backends, overlap, tables, tuned
from mmfast_kernels.attention import packed_self_attention
from mmfast_kernels.tables import Timed

from .config import mae_from_name
from .ensemble import micro_batch_size
from .mae import MaskedAutoencoder
from .masks import kept_per_slot, sample_pack
from .vit import MaskedViT

ATTENTION = "attention_backends"
OVERLAP = "overlap"
_DTYPES = {tables.dtype_name(dtype): dtype for dtype in (*backends.HALF, torch.float32)}
_TOKENS = 16_384  # that attention's backends are timed on

Rows = dict[str, list[dict[str, Any]]]  # by op, as tuned.py reads them


@dataclass(frozen=True)
class Workload:
    """What a model will do.   name: a size that from_name knows. batch: clips at once; None as ensemble takes them.

    train: a step of classification, and of pre-training where the size has a published decoder, beside the forward.
    """

    name: str
    views: int = 2
    mask_ratio: float = 0.75
    batch: int | None = None
    train: bool = False

    def __str__(self) -> str:
        clips = "" if self.batch is None else f", {self.batch} clips"
        return f"{self.name}, ratio {self.mask_ratio:g}, {self.views} views{clips}{', training' * self.train}"


@dataclass(frozen=True)
class Found:
    """rows: what was measured, with its winner. won: how many of them are not the shipped choice. dropped: op -> why."""

    rows: Rows
    dropped: dict[str, str]

    @property
    def won(self) -> int:
        return sum(row["config"] != row["timed"][0]["config"] for rows in self.rows.values() for row in rows)


def tune(
    workloads: Sequence[Workload],
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cuda",
    model: MaskedViT | None = None,
    progress: bool = True,
) -> Found:
    """Measure every configuration that the workloads meet.   model: in place of the one that each workload's name makes.

    Nothing is written. Raises ValueError for a name that is not known.
    """
    jobs = [Job(workload, dtype, torch.device(device), model) for workload in workloads]
    with _tables({}):
        before = [job.results() for job in jobs]
        _reload()  # so that what was chosen then is asked for again
        with tables.recording() as recorded:
            for job in tqdm(jobs, unit="workload", desc="kernels", disable=not progress):
                job.results()
        rows: Rows = {}
        for (op, case), timed in recorded.timed.items():
            if len(timed) > 1:
                rows.setdefault(op, []).append(_row(case, timed))
        cases = sorted({case for op, case in recorded.asked if op == ATTENTION}, key=str)
        for case in tqdm(cases, unit="case", desc="attention", disable=not progress):
            timed = time_backends(dict(case), torch.device(device))
            if len(timed) > 1:
                rows.setdefault(ATTENTION, []).append(_row(case, timed))
    arch = tables.arch_of(torch.device(device))
    if arch >= 90:
        rows[OVERLAP] = [_row((("arch", arch),), time_overlap(jobs))]
    dropped = {}
    for op in list(rows):
        if fault := _changes({op: rows[op]}, jobs, before):
            dropped[op] = fault
            del rows[op]
    return Found(rows, dropped)


def warm(
    workloads: Sequence[Workload],
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cuda",
    model: MaskedViT | None = None,
    progress: bool = True,
) -> None:
    """Compile what the workloads launch into Triton's cache, and time nothing."""
    for workload in tqdm(workloads, unit="workload", desc="compiling", disable=not progress):
        Job(workload, dtype, torch.device(device), model).results()


def best(timed: Sequence[Timed]) -> Timed:
    """The fastest; the first, which is the shipped one, unless another is faster by more than both spread."""
    first = timed[0]
    fastest = min(timed, key=lambda one: one.ms)
    return fastest if fastest.ms + fastest.spread / 2 < first.ms - first.spread / 2 else first


class Job:
    """A workload with its models and clips, on a device."""

    def __init__(self, workload: Workload, dtype: torch.dtype, device: torch.device, model: MaskedViT | None) -> None:
        self.workload, self.device, self.dtype = workload, device, dtype
        model = MaskedViT.from_name(workload.name, num_classes=400) if model is None else model
        self.model = model.to(device, dtype).eval()
        c = model.config
        tokens = workload.views * c.grid[0] * kept_per_slot(c.grid, workload.mask_ratio)
        clips = workload.batch or micro_batch_size(tokens, device)
        generator = torch.Generator().manual_seed(0)
        shape = (clips, c.in_chans, c.num_frames, *c.frame_size)
        self.video = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8).to(device)
        self.pack = sample_pack(clips, workload.views, c.grid, workload.mask_ratio, seed=0, device=device)
        self.single = sample_pack(1, workload.views, c.grid, workload.mask_ratio, seed=0, device=device)
        self.pretrained: MaskedAutoencoder | None = None
        if workload.train and model.config.in_chans == 3 and workload.mask_ratio:
            with contextlib.suppress(ValueError):  # a size without a published decoder
                config = mae_from_name(f"pretrain_{workload.name}")
                self.pretrained = MaskedAutoencoder(config).to(device)

    def results(self) -> list[Tensor]:
        """What the models give: probabilities, then the loss and the gradients' norm of every step."""
        # Without ensemble's CUDA graphs, which would go on with the kernels that they were made with.
        with torch.no_grad():
            found = [self.model(self.video, self.pack).float().softmax(-1)]
        if self.workload.train:
            found.append(self._step(self.model, self._classified))
            if self.pretrained is not None:
                found.append(self._step(self.pretrained, self._reconstructed))
        return found

    def one_clip(self) -> Tensor:
        """The logits of the first clip's views."""
        return self.model(self.video[:1], self.single)

    def _classified(self) -> Tensor:
        logits = self.model(self.video, self.pack)
        labels = torch.arange(len(logits), device=self.device) % logits.shape[1]
        return F.cross_entropy(logits.float(), labels)

    def _reconstructed(self) -> Tensor:
        assert self.pretrained is not None
        return self.pretrained.reconstruction_loss(self.video, self.pack)

    def _step(self, model: torch.nn.Module, loss_of: Callable[[], Tensor]) -> Tensor:
        """Under autocast, in training mode, as a stage runs it: the loss and the gradients' norm."""
        own = next(model.parameters()).dtype
        model.train().float()
        try:
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                loss = loss_of()
            loss.backward()
            grads = [p.grad for p in model.parameters() if p.grad is not None]
            return torch.stack([loss.detach(), torch.nn.utils.get_total_norm(grads)]).float()
        finally:
            model.zero_grad()
            model.to(own).eval()


def time_backends(case: Mapping[str, Any], device: torch.device) -> list[Timed]:
    """The backends that take an attention case, the table's choice first. case: as attention_backends.json has it.

    Each is held against the first before it counts; one that is off or cannot run is infinitely slow.
    """
    if not case["dense"] or case["with_lse"]:
        return []
    n, dtype = case["n"], _DTYPES[case["dtype"]]
    full = backends.Case(device, dtype, case["d"], n, n, needs_grad=case["needs_grad"])
    order = next(row for row in tables.shipped(ATTENTION) if row.holds(case)).config["order"]
    takers = [name for name in (*order, *backends.UNSHIPPED) if backends.refusal(name, full) is None]
    generator = torch.Generator().manual_seed(0)
    shape = (max(1, _TOKENS // n) * n, 3, 6, case["d"])
    qkv = torch.randn(shape, generator=generator).to(device, dtype).requires_grad_(case["needs_grad"])
    timed: list[Timed] = []
    truth: Tensor | None = None
    for name in takers:
        config = {"order": [name, *(other for other in order if other != name)]}

        def run(_: Mapping[str, Any], name: str = name) -> Tensor:
            out = packed_self_attention(qkv, length=n, backend=name)
            if case["needs_grad"]:
                (out,) = torch.autograd.grad(out, qkv, torch.ones_like(out))
            return out

        try:
            out = run(config).float()
        except RuntimeError:  # a library that takes the case in words alone
            timed.append(Timed(config, math.inf))
            continue
        truth = out if truth is None else truth
        good = bool((out - truth).norm() <= 2e-2 * truth.norm())
        timed.append(tables.measure(run, config) if good else Timed(config, math.inf))
    return timed


def time_overlap(jobs: Sequence[Job]) -> list[Timed]:
    """One clip of every job, one after another in a CUDA graph, first without and then with kernels that overlap."""
    timed = []
    for on in (False, True):
        config = {"on": on}
        with _tables({OVERLAP: [{"when": {}, "config": config}]}):
            captured: list[torch.cuda.CUDAGraph] = []

            def run(_: Mapping[str, Any], captured: list[torch.cuda.CUDAGraph] = captured) -> None:
                if not captured:
                    captured.append(_captured(jobs))
                captured[0].replay()

            timed.append(tables.measure(run, config))
    return timed


# -- inside ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _tables(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterator[None]:
    """With these measured rows alone."""
    try:
        with tuned.instead(rows):
            _reload()
            yield
    finally:
        _reload()


@torch.no_grad()
def _captured(jobs: Sequence[Job]) -> torch.cuda.CUDAGraph:
    graph, stream, current = torch.cuda.CUDAGraph(), torch.cuda.Stream(), torch.cuda.current_stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        for job in jobs:  # compiles
            job.one_clip()
    current.wait_stream(stream)
    with torch.cuda.graph(graph, stream=stream):
        for job in jobs:
            job.one_clip()
    return graph


def _reload() -> None:
    tables.reload()
    backends._choose.cache_clear()
    overlap.overlaps.cache_clear()


def _row(case: tuple[tuple[str, Any], ...], timed: Sequence[Timed]) -> dict[str, Any]:
    each = [
        {"config": dict(one.config), "ms": one.ms if math.isfinite(one.ms) else None, "spread": one.spread}
        for one in timed
    ]
    return {"when": dict(case), "config": dict(best(timed).config), "timed": each}


def _changes(rows: Rows, jobs: Sequence[Job], before: Sequence[Sequence[Tensor]]) -> str | None:
    """How far results move with these rows, if they move more than rounding does; None where they stay."""
    with _tables(rows):
        for job, old in zip(jobs, before, strict=True):
            for was, now in zip(old, job.results(), strict=True):
                error = float((now - was).norm() / was.norm())
                if not error <= 2e-2:
                    return f"{job.workload}: results differ by {error:.2e} from those of the shipped configurations"
    return None
