"""What the synthetic benchmark trains and scores: a tiny ViT on the cross-domain clips, one run a row of the table.

Every run is one process with one thread, reads the clips from a file, and leaves its encoder in a file.
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from mmfast import MAEConfig, MaskedAutoencoder, MaskedViT, ViTConfig, sample_pack, tube_masks
from mmfast.adaptive import calibrate_threshold, evaluate_adaptive, support_probabilities
from mmfast.data.crossdomain import CrossDomain
from mmfast.distill import MultimodalDistillation
from mmfast.episodes import EpisodeResult, Episodes, evaluate_episodes
from mmfast.guard import StepGuard
from mmfast.optim import WarmupCosine, param_groups
from mmfast.pretrain import MaskedPretraining

SIDE, CLASSES = 48, 16
SIZES: dict[str, dict[str, Any]] = {
    "rgb": dict(img_size=SIDE, patch_size=8, in_chans=3),
    "flow": dict(img_size=SIDE, patch_size=8, in_chans=2),
    "pose": dict(img_size=SIDE // 4, patch_size=2, in_chans=21),
}
# A token of four frames sees how things move; where it has two, the same accuracy takes more than twice the steps.
TINY: dict[str, Any] = dict(num_frames=8, tubelet_size=4, embed_dim=128, depth=4, num_heads=4)
DECODER: dict[str, Any] = dict(decoder_embed_dim=64, decoder_depth=1, decoder_num_heads=2)
# Normalised, a patch of wall is all grain, which nothing can predict; flow has no grain, and its own units are too large.
NORMALISED = {"rgb": False, "flow": True, "pose": False}
CE = {"rgb": 0.3, "flow": 0.5, "pose": 0.3}  # against raw targets, whose loss is about a hundredth, and normalised ones
# What minutes of training can see through: plain scenes, little grain, a calm camera, and no strays.
DIFFICULTY: dict[str, Any] = dict(noise=2.0, strays=0, camera=0.5, variety=0.3)
GRID = ViTConfig(**SIZES["rgb"], **TINY).grid
SPLITS = {"source": ("source", "train"), "unlabelled": ("target", "unlabelled"), "test": ("target", "test")}
RATIOS, VIEWS = (0.0, 0.5, 0.75, 0.9), (1, 2, 3, 5)
Clips = dict[str, Tensor]
Score = dict[str, float]


@dataclass(frozen=True)
class Run:
    """A row of the ablation. Without teachers it is pre-trained; with them it starts from the run `start` and is distilled."""

    key: str
    name: str
    modality: str = "rgb"
    target: float = 1.0
    ce: bool = True
    teachers: tuple[str, ...] = ()
    start: str = ""
    trained: bool = True


# The longest first, so that processes beside each other finish together.
FIRST = (
    Run("ce", "+ cross-entropy"),
    Run("both", "+ target reconstruction", ce=False),
    Run("pose", "teacher: pose", modality="pose"),
    Run("flow", "teacher: flow", modality="flow"),
    Run("source", "source reconstruction", target=0.0, ce=False),
    Run("random", "random init", ce=False, trained=False),
)
SECOND = (
    Run("from both", "distilled from flow and pose", teachers=("flow", "pose"), start="ce"),
    Run("from flow", "distilled from flow", teachers=("flow",), start="ce"),
    Run("from pose", "distilled from pose", teachers=("pose",), start="ce"),
)
ROWS = ("random", "source", "both", "ce", "from flow", "from pose", "from both", "flow", "pose")


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def draw(options: argparse.Namespace, folder: Path) -> dict[str, int]:
    """Draw all clips, each once, into <folder>/<split>.pt; returns how many."""
    counts = {"source": options.source_clips, "unlabelled": options.target_clips, "test": options.test_clips}
    for name, (domain, split) in SPLITS.items():
        dataset = CrossDomain(domain, split, counts[name], seed=options.seed, size=SIDE, **DIFFICULTY)
        loader = DataLoader(dataset, batch_size=64, num_workers=options.jobs if options.jobs > 1 else 0)
        parts = []
        for i, batch in enumerate(loader):
            parts.append({k: v.half() if v.dtype == torch.float32 else v for k, v in batch.items()})
            if i % 20 == 0:
                say(f"drawing {name}: {min(64 * (i + 1), len(dataset))} of {len(dataset)}")
        torch.save({k: torch.cat([p[k] for p in parts]) for k in parts[0]}, folder / f"{name}.pt")
        counts[name] = len(dataset)
    return counts


class Lab:
    """The clips of a folder, and what is trained on them and scored."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder = options, folder
        self.clips: dict[str, Clips] = {name: torch.load(folder / f"{name}.pt", mmap=True) for name in SPLITS}

    def row(self, run: Run) -> dict[str, Any]:
        """Train what the run says, keep its encoder, and score it on the target classes."""
        started = time.perf_counter()
        curve: list[dict[str, float]] = []
        if run.teachers:
            vit, curve = self.distilled(run)
        else:
            torch.manual_seed(self.options.seed)
            size = SIZES[run.modality] | TINY | DECODER
            kind: dict[str, Any] = dict(num_classes=CLASSES if run.ce else 0, normalize_target=NORMALISED[run.modality])
            model = MaskedAutoencoder(MAEConfig(**size, **kind))
            if run.trained:
                curve = self.pretrain(model, run)
            vit = _encoder(model, run.modality)
        seconds = time.perf_counter() - started
        torch.save(vit.state_dict(), self.folder / f"{run.key}.pt")
        scores = self.scores(self.features(vit, run.modality, 2, 0.75))
        say(f"{run.name}: " + ", ".join(f"{k}-shot {s['mean']:.2%}" for k, s in scores.items()))
        return (
            {"key": run.key, "name": run.name, "modality": run.modality} | scores | dict(seconds=seconds, curve=curve)
        )

    def sweep(self, run: Run, ratio: float) -> list[dict[str, Any]]:
        """Accuracy of a trained run over the number of views, and with views added only where they are needed."""
        features = self.features(self.load(run), run.modality, max(VIEWS) if ratio else 1, ratio)
        rows: list[dict[str, Any]] = []
        for views in VIEWS if ratio else (1,):
            rows.append({"mask_ratio": ratio, "views": views} | self.scores(features[:, :views]))
        if ratio == 0.75:
            rows.append(
                {"mask_ratio": ratio, "views": "adaptive"} | {str(k): self.adaptive(features, k) for k in (1, 5)}
            )
        return rows

    def order(self, run: Run) -> list[dict[str, Any]]:
        """What a trained run makes of clips whose frames are in order, shuffled, or all the same one."""
        test, model = self.clips["test"], self.load(run)
        video = test[run.modality]
        clips, frames = len(video), video.shape[2]
        generator = torch.Generator().manual_seed(self.options.seed)
        shuffled = torch.rand(clips, frames, generator=generator).argsort(1)
        one = torch.randint(frames, (clips, 1), generator=generator).expand(-1, frames)
        rows = []
        for name, order in (("in order", None), ("shuffled", shuffled), ("one frame repeated", one)):
            seen = video if order is None else video[torch.arange(clips)[:, None], :, order].transpose(1, 2)
            rows.append({"frames": name} | self.scores(self.features(model, run.modality, 2, 0.75, seen)))
        return rows

    def load(self, run: Run) -> MaskedViT:
        vit = MaskedViT(ViTConfig(**SIZES[run.modality], **TINY, final_norm=True))
        vit.load_state_dict(torch.load(self.folder / f"{run.key}.pt"))
        return vit.eval()

    # -- training --

    def pretrain(self, model: MaskedAutoencoder, run: Run) -> list[dict[str, float]]:
        source, unlabelled = self.clips["source"], self.clips["unlabelled"]
        step = MaskedPretraining(model, target_weight=run.target, ce_weight=CE[run.modality]).train()

        def losses(i: int) -> dict[str, Tensor]:
            a, b = self.pick(source, i, 0), self.pick(unlabelled, i, 1)
            mask = tube_masks(len(a), 1, GRID, self.options.mask_ratio, seed=i)[:, 0]
            target = clips_of(unlabelled, run.modality, b) if run.target else None
            return step(clips_of(source, run.modality, a), target, mask, source["label"][a] if run.ce else None)

        steps = self.options.steps if run.modality == "rgb" else self.options.teacher_steps
        return self.train(run.name, model, losses, steps, self.options.rate, betas=(0.9, 0.95))

    def distilled(self, run: Run) -> tuple[MaskedViT, list[dict[str, float]]]:
        first = {known.key: known for known in FIRST}
        student, clips = self.load(first[run.start]), self.clips["unlabelled"]
        step = MultimodalDistillation(student, {m: self.load(first[m]) for m in run.teachers}).train()

        def losses(i: int) -> dict[str, Tensor]:
            rows = self.pick(clips, i, 2)
            mask = tube_masks(len(rows), 1, GRID, self.options.mask_ratio, seed=i)[:, 0]
            return step({m: clips_of(clips, m, rows) for m in ("rgb", *run.teachers)}, mask)

        curve = self.train(run.name, step, losses, self.options.distill_steps, self.options.distill_rate)
        return student.eval(), curve

    def pick(self, clips: Clips, step: int, stream: int) -> Tensor:
        """The clips of a step: a fresh order every epoch, the same for every run."""
        count, batch = len(clips["label"]), self.options.batch
        first = step * batch
        rows = []
        for epoch in range(first // count, (first + batch - 1) // count + 1):
            order = torch.randperm(count, generator=torch.Generator().manual_seed(1000 * stream + epoch))
            rows.append(order[max(first - epoch * count, 0) : first + batch - epoch * count])
        return torch.cat(rows)

    def train(
        self,
        name: str,
        module: torch.nn.Module,
        losses: Callable[[int], dict[str, Tensor]],
        steps: int,
        rate: float,
        betas: tuple[float, float] = (0.9, 0.999),
    ) -> list[dict[str, float]]:
        """Returns the means of all losses over every 50 steps."""
        optimizer = torch.optim.AdamW(param_groups(module, rate), betas=betas, fused=True)
        schedule = WarmupCosine(optimizer, steps, steps // 10, min_lr=rate / 100)
        guard, started = StepGuard(optimizer, scheduler=schedule), time.perf_counter()
        torch.manual_seed(self.options.seed)
        curve: list[dict[str, float]] = []
        seen: list[dict[str, Tensor]] = []
        for i in range(steps):
            found = losses(i)
            guard.step(found["total"])
            seen.append({k: v.detach() for k, v in found.items() if v.dim() == 0})
            if len(seen) == 50 or i == steps - 1:
                means = {k: float(torch.stack([s[k] for s in seen]).mean()) for k in seen[0]}
                seen.clear()
                curve.append({"step": i + 1} | means)
                told = ", ".join(f"{k} {v:.4f}" for k, v in means.items())
                say(f"{name}: step {i + 1} of {steps}, {told}, {time.perf_counter() - started:.0f} s")
        return curve

    # -- scoring --

    @torch.no_grad()
    def features(
        self, model: MaskedViT, modality: str, views: int, ratio: float, video: Tensor | None = None
    ) -> Tensor:
        """[clips, views, D] of the test clips, or of what is shown in their place; each (clip, view) is encoded once."""
        test, seed = self.clips["test"], self.options.seed
        shown = test if video is None else {modality: video}
        made = []
        for rows in torch.arange(len(test["label"])).split(64):
            pack = sample_pack(len(rows), views, GRID, ratio, seed=seed, clip_ids=test["clip_id"][rows])
            made.append(model.encode(clips_of(shown, modality, rows), pack).unflatten(0, (len(rows), views)))
        return torch.cat(made)

    def episodes(self, shots: int, seed: int) -> Episodes:
        return Episodes(self.clips["test"]["label"], k_shot=shots, episodes=self.options.episodes, seed=seed)

    def scores(self, features: Tensor) -> dict[str, Score]:
        """Of 1 and of 5 shots; supports are seen under their first view."""
        each = {k: self.episodes(k, self.options.seed) for k in (1, 5)}
        return {str(k): _score(evaluate_episodes(features[:, 0], features, e)) for k, e in each.items()}

    def adaptive(self, features: Tensor, shots: int) -> Score:
        """Views until the margin is what supports of other episodes need to be decided as with all views, 99 in 100."""
        known = support_probabilities(features, self.episodes(shots, self.options.seed + 1))
        threshold = calibrate_threshold(known, agreement=0.99)
        result = evaluate_adaptive(features[:, 0], features, self.episodes(shots, self.options.seed), threshold)
        own = {"threshold": threshold, "mean_views": result.mean_views, "agreement": result.agreement}
        return _score(result.adaptive) | own


def _score(result: EpisodeResult) -> Score:
    return {"mean": result.mean, "std": result.std, "standard_error": result.standard_error}


def _encoder(model: MaskedAutoencoder, modality: str) -> MaskedViT:
    """The pre-trained encoder as a feature extractor: its norm, the mean over tokens, and fc_norm where it was trained."""
    vit = MaskedViT(ViTConfig(**SIZES[modality], **TINY, final_norm=True))
    vit.load_state_dict(model.encoder.state_dict(), strict=False)
    if model.fc_norm is not None and vit.fc_norm is not None:
        vit.fc_norm.load_state_dict(model.fc_norm.state_dict())
    return vit.eval()


def clips_of(clips: Clips, modality: str, rows: Tensor) -> Tensor:
    chosen = clips[modality][rows]
    return chosen.float() if chosen.dtype == torch.float16 else chosen
