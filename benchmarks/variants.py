"""The rungs of the ladder for one case, and the check that all of them compute the same probabilities."""

import copy
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import flops
import torch
from harness import Call, peak_of, progress
from peers import Attention, HuggingFace, PlainViT, have_onednn, have_transformers, kept_ids, sdpa
from probes import Replayed
from torch import Tensor

if TYPE_CHECKING:
    from mmfast import MaskedViT

OURS = "mmfast"
BARE = "bare matrix products"
FP32_BAR = 1e-5
SLACK = 2.0  # an error may be so many times that of the published path in the same dtype


@dataclass(frozen=True)
class Case:
    """One line of the grid: P views of every clip, `kept` cells of `cells` in each slot."""

    views: int
    kept: int
    cells: int
    slots: int

    @property
    def ratio(self) -> float:
        return 1 - self.kept / self.cells

    @property
    def tokens(self) -> int:
        return self.kept * self.slots

    @property
    def full(self) -> bool:
        return self.kept == self.cells

    @property
    def title(self) -> str:
        if self.full:
            return f"all {self.tokens} tokens, 1 view"
        plural = "" if self.views == 1 else "s"
        return f"{self.tokens} of {self.cells * self.slots} tokens (ratio {self.ratio:.3g}), {self.views} view{plural}"


class Rungs:
    """What is timed: the model, the same weights in plain torch, and one batch of clips on the device.

    model: in `dtype`. state: its weights in fp32, not cast: the truth that every dtype is held against.
    video: uint8 [B, C, F, H, W] on the model's device. All rungs see the same video, weights and masks.
    fused: with mmfast prepared by fuse_for_inference too. graphs: on a GPU with `strong` as a CUDA graph too.
    """

    def __init__(
        self,
        model: "MaskedViT",
        state: Mapping[str, Tensor],
        video: Tensor,
        *,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        hugging_face: bool = False,
        compiled: bool = True,
        fused: bool = False,
        graphs: bool = False,
    ) -> None:
        self.config = model.config
        self.video, self.seed, self.dtype = video, seed, dtype
        self.device = video.device
        self.exact = PlainViT(state, model.config).to(self.device)
        self.plain = PlainViT(state, model.config).to(self.device, dtype) if dtype != torch.float32 else self.exact
        self.model = model
        self.hugging_face = HuggingFace(self.plain, model.config) if hugging_face and have_transformers() else None
        on_cpu = self.device.type == "cpu" and dtype == torch.float32 and have_onednn()
        self.onednn = PlainViT(state, model.config).with_onednn() if on_cpu else None
        self.compiled: dict[str, Callable[..., Tensor]] = {}
        if compiled and self.device.type == "cuda":
            for mode in ("max-autotune", "max-autotune-no-cudagraphs"):
                self.compiled[mode] = torch.compile(self.plain.strong, dynamic=False, mode=mode)
        self.own = {OURS: model}
        if fused:
            self.own[f"{OURS}, fused"] = copy.deepcopy(model).eval().fuse_for_inference()
            if dtype != torch.float32:
                self.own[f"{OURS}, fused, tanh"] = copy.deepcopy(model).eval().fuse_for_inference("tanh")
        self.graphs = graphs and self.device.type == "cuda"

    def on(self, video: Tensor, graphs: bool) -> "Rungs":
        """The same models over other clips."""
        other = copy.copy(self)
        other.video, other.graphs = video, graphs and self.device.type == "cuda"
        return other

    def masks(self, case: Case) -> Tensor:
        """bool [B, P, N], the masks that mmfast samples itself from the seed."""
        from mmfast import tube_masks

        grid = self.config.grid
        clips = self.video.shape[0]
        return tube_masks(clips, case.views, grid, keep=case.kept, seed=self.seed, device=self.device)

    def calls(self, case: Case) -> dict[str, Call]:
        """The rungs in the order of the ladder. mmfast samples its masks inside the timed call; others get them."""
        masks = self.masks(case)
        keep = kept_ids(masks)
        plain, video, device = self.plain, self.video, self.device
        calls: dict[str, Call] = {}
        if self.exact is not plain:
            calls["published, fp32"] = lambda: self.exact.published(video, masks)
            if device.type == "cuda":
                calls["published, TF32"] = lambda: with_tf32(lambda: self.exact.published(video, masks))
        calls["published"] = lambda: plain.published(video, masks)
        calls["published + SDPA"] = lambda: plain.published(video, masks, sdpa)
        if self.hugging_face is not None:
            theirs = self.hugging_face
            calls["transformers"] = lambda: theirs.published(video, masks)
        calls["strong"] = lambda: plain.strong(video, keep)
        if device.type == "cuda":
            for name, attention in forced_backends(self.dtype).items():
                calls[f"strong, {name}"] = bound(plain.strong, video, keep, attention)
            if self.graphs:
                for name, attention in {"": sdpa, **forced_backends(self.dtype)}.items():
                    captured = Replayed(bound(plain.strong, video, keep, attention), device)
                    calls[f"strong, {name}, CUDA graph" if name else "strong, CUDA graph"] = captured
            for mode, function in self.compiled.items():
                calls[f"strong, {mode}"] = bound(function, video, keep)
        else:
            calls["strong, clip by clip"] = bound(clip_by_clip, plain, video, keep)
            if self.onednn is not None:
                calls["strong, clip by clip, oneDNN"] = bound(clip_by_clip, self.onednn, video, keep)
        for name, model in self.own.items():
            calls[name] = bound(model.ensemble, video, views=case.views, keep=case.kept, seed=self.seed)
        last, given = list(self.own.items())[-1], {"views": case.views, "keep": case.kept, "seed": self.seed}
        if device.type == "cuda" and len(self.own) > 1:
            calls[f"{last[0]}, in L2"] = bound(last[1].ensemble, video, **given, micro_batch="l2")
        return calls

    def bare(self, case: Case) -> dict[str, Call]:
        """The case's matrix products and nothing else, all clips at once and a clip at a time.

        On a GPU without the attention products, whose scores no good kernel writes to memory.
        """
        clips, cuda = self.video.shape[0], self.device.type == "cuda"

        def products(batch: int) -> Callable[[], None]:
            return flops.bare_products(
                self.config,
                batch * case.views,
                case.tokens,
                device=self.device,
                dtype=self.dtype,
                attention=not cuda,
            )

        at_once = products(clips)
        if cuda:
            return {BARE: at_once}
        one = products(1)

        def one_by_one() -> None:
            for _ in range(clips):
                one()

        return {BARE: at_once, f"{BARE}, clip by clip": one_by_one}

    def flops(self, name: str, case: Case) -> flops.Flops:
        """Operations of one clip on a rung: the published paths embed every token for every view."""
        gathers = name.startswith(("strong", OURS, BARE))
        return flops.count(self.config, case.tokens, case.views, case.tokens if gathers else None)


def with_tf32(call: Callable[[], Tensor]) -> Tensor:
    """Run a call with TF32 matrix products and convolutions."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    try:
        return call()
    finally:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def clip_by_clip(plain: PlainViT, video: Tensor, keep: Tensor) -> Tensor:
    """`strong` on one clip after the other: on a CPU what a clip needs stays in the cache."""
    return torch.cat([plain.strong(one, ids) for one, ids in zip(video.split(1), keep.split(1), strict=True)])


def bound(function: Callable[..., Any], *args: Any, **options: Any) -> Call:
    return lambda: function(*args, **options)


def forced_backends(dtype: torch.dtype) -> dict[str, Attention]:
    """Each of torch's attention kernels by name, called directly so that no selection runs in the timed call."""
    aten = torch.ops.aten

    def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return aten._scaled_dot_product_flash_attention(q, k, v)[0]

    def cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return aten._scaled_dot_product_cudnn_attention(q, k, v, None, False)[0]

    def efficient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return aten._scaled_dot_product_efficient_attention(q, k, v, None, False)[0]

    if dtype == torch.float32:
        return {"efficient": efficient}
    return {"flash": flash, "cudnn": cudnn, "efficient": efficient}


def relative_error(got: Tensor, truth: Tensor) -> float:
    """Norm of the difference over the norm of the truth; NaN where either holds one."""
    got, truth = got.double(), truth.double()
    return float((got - truth).norm() / truth.norm())


@dataclass(frozen=True)
class Gate:
    """What the check found. errors: against the published path in fp32. peaks: allocated, resident bytes, on a CPU."""

    errors: Mapping[str, float]
    allowed: float
    crashed: Mapping[str, str]
    peaks: Mapping[str, tuple[int, int | None]]

    @property
    def red(self) -> list[str]:
        # Written so that a NaN is red.
        return [name for name, error in self.errors.items() if not error <= self.allowed]

    def without(self, names: Collection[str]) -> "Gate":
        return replace(self, errors={name: error for name, error in self.errors.items() if name not in names})


def into(probs: dict[str, Tensor], name: str, call: Call) -> Call:
    def run() -> None:
        probs[name] = torch.as_tensor(call())

    return run


def check(rungs: Rungs, case: Case, calls: Mapping[str, Call]) -> Gate:
    """Run every rung once and compare its probabilities with the published path in fp32 (TF32 off).

    fp32: relative error at most 1e-5. Lower precision: at most twice that of the published path in the same dtype.
    A peer that crashes is left out and named; mmfast or the published path crashing is an error like any other.
    """
    probs: dict[str, Tensor] = {}
    crashed: dict[str, str] = {}
    peaks: dict[str, tuple[int, int | None]] = {}
    for name, call in progress(calls.items(), f"{case.title}: checking", len(calls)):
        try:
            if rungs.device.type == "cpu":
                # On a CPU a call takes seconds, so the one that is checked also tells its memory.
                peaks[name] = peak_of(into(probs, name, call), rungs.device)
            else:
                probs[name] = torch.as_tensor(call()).clone()
        except Exception as error:  # a peer that cannot run here is reported, of whatever it dies
            if name == OURS or name.startswith("published"):
                raise
            crashed[name] = f"{type(error).__name__}: {(str(error) or ' ').splitlines()[0]}"
    exact = "published" if rungs.exact is rungs.plain else "published, fp32"
    errors = {name: relative_error(value, probs[exact]) for name, value in probs.items()}
    return Gate(errors, max(FP32_BAR, SLACK * errors["published"]), crashed, peaks)
