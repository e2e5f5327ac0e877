"""MM-CDFSL's ablations in miniature, on the synthetic cross-domain set: pre-training, distillation, episodes, masks.

A tiny ViT is pre-trained and distilled in every way of the paper's ablation, frozen, and scored by few-shot episodes on target
classes that nothing was trained on. What is printed is what was measured, also where the paper's effect does not show.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from harness import machine, write_json
from torch import Tensor
from torch.utils.data import DataLoader

from mmfast import MAEConfig, MaskedAutoencoder, MaskedViT, ViTConfig, sample_pack, tube_masks
from mmfast.data.crossdomain import CrossDomain
from mmfast.distill import MultimodalDistillation
from mmfast.episodes import Episodes, evaluate_episodes
from mmfast.guard import StepGuard
from mmfast.optim import WarmupCosine, param_groups
from mmfast.pretrain import MaskedPretraining

SIZES: dict[str, dict[str, Any]] = {
    "rgb": dict(img_size=64, patch_size=8, in_chans=3),
    "flow": dict(img_size=64, patch_size=8, in_chans=2),
    "pose": dict(img_size=16, patch_size=2, in_chans=21),
}
TINY: dict[str, Any] = dict(num_frames=8, embed_dim=128, depth=6, num_heads=4)
DECODER: dict[str, Any] = dict(decoder_embed_dim=64, decoder_depth=2, decoder_num_heads=2)
CE = {"rgb": 0.05, "flow": 0.05, "pose": 0.05}
RATIOS, VIEWS = (0.0, 0.5, 0.75, 0.9), (1, 2, 3, 5)
Clips = dict[str, Tensor]


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    torch.manual_seed(options.seed)
    started = time.perf_counter()
    sets = {name: draw(name, options) for name in ("source", "unlabelled", "test")}
    say(f"drew {sum(len(s['label']) for s in sets.values())} clips in {time.perf_counter() - started:.0f} s")
    lab = Lab(options, sets)
    rows = lab.ablation()
    sweep = lab.sweep()
    report = {
        "machine": machine(torch.device("cpu")),
        "options": {name: value for name, value in vars(options).items() if name not in ("json", "plot")},
        "clips": {name: len(s["label"]) for name, s in sets.items()},
        "minutes": (time.perf_counter() - started) / 60,
        "ablation": rows,
        "sweep": sweep,
    }
    print(table(rows, sweep, report))
    if options.json:
        write_json(options.json, report)
    if options.plot:
        plot(rows, sweep, options.plot)
    return 0


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--steps", type=int, default=600, help="of each pre-training")
    add("--distill-steps", type=int, default=400)
    add("--batch", type=int, default=32, help="source clips of a step, and as many target clips")
    add("--source-clips", type=int, default=100, help="of each of 16 classes")
    add("--target-clips", type=int, default=100, help="of each of 10 classes, without their labels")
    add("--test-clips", type=int, default=40, help="of each of 10 classes, for the episodes")
    add("--episodes", type=int, default=600)
    add("--mask-ratio", type=float, default=0.75, help="in pre-training and distillation")
    add("--rate", type=float, default=1e-3)
    add("--seed", type=int, default=0)
    add("--workers", type=int, default=0, help="processes that draw clips")
    add("--json", type=Path)
    add("--plot", type=Path)
    return parser.parse_args(arguments)


def draw(name: str, options: argparse.Namespace) -> Clips:
    """All clips of a set, in memory: each is drawn once."""
    count = {"source": options.source_clips, "unlabelled": options.target_clips, "test": options.test_clips}[name]
    domain, split = ("source", "train") if name == "source" else ("target", name)
    dataset = CrossDomain(domain, split, count, seed=options.seed)
    loader = DataLoader(dataset, batch_size=32, num_workers=options.workers)
    parts = []
    for i, batch in enumerate(loader):
        parts.append({k: v.half() if v.dtype == torch.float32 else v for k, v in batch.items()})
        if i % 10 == 0:
            say(f"drawing {name}: {min(32 * (i + 1), len(dataset))} of {len(dataset)}")
    return {k: torch.cat([p[k] for p in parts]) for k in parts[0]}


class Lab:
    """Trains, and scores what was trained."""

    def __init__(self, options: argparse.Namespace, sets: dict[str, Clips]) -> None:
        self.options = options
        self.sets = sets
        self.grid = ViTConfig(**SIZES["rgb"], **TINY).grid
        self.best: MaskedViT | None = None

    def ablation(self) -> list[dict[str, Any]]:
        """The paper's table, row after row."""
        rows = []

        def add(name: str, model: MaskedViT, modality: str = "rgb") -> None:
            rows.append({"name": name, "modality": modality} | self.scores(model, modality))
            say(f"{name}: " + ", ".join(f"{k}-shot {rows[-1][k]['mean']:.2%}" for k in ("1", "5")))

        add("random init", self.encoder(self.autoencoder("rgb")))
        add("source reconstruction", self.encoder(self.pretrain("rgb", target=0.0, ce=0.0)))
        add("+ target reconstruction", self.encoder(self.pretrain("rgb", target=1.0, ce=0.0)))
        student = self.encoder(self.pretrain("rgb", target=1.0, ce=CE["rgb"]))
        add("+ cross-entropy", student)
        teachers = {m: self.encoder(self.pretrain(m, target=1.0, ce=CE[m])) for m in ("flow", "pose")}
        for modality, teacher in teachers.items():
            add(f"teacher {modality}", teacher, modality)
        for chosen in (("flow",), ("pose",), ("flow", "pose")):
            self.best = self.distill(student, {m: teachers[m] for m in chosen})
            add(f"distilled from {' and '.join(chosen)}", self.best)
        return rows

    def sweep(self) -> list[dict[str, Any]]:
        """Accuracy of the last student over mask ratio and views."""
        assert self.best is not None
        rows = []
        for ratio in RATIOS:
            features = self.features(self.best, "rgb", max(VIEWS) if ratio else 1, ratio)
            for views in VIEWS if ratio else (1,):
                result = {str(k): self.score(features[:, :views], k) for k in (1, 5)}
                rows.append({"mask_ratio": ratio, "views": views} | result)
        return rows

    # -- training --

    def autoencoder(self, modality: str, classes: int = 0) -> MaskedAutoencoder:
        torch.manual_seed(self.options.seed)
        return MaskedAutoencoder(MAEConfig(**SIZES[modality], **TINY, **DECODER, num_classes=classes))

    def encoder(self, model: MaskedAutoencoder) -> MaskedViT:
        """The pre-trained encoder as a feature extractor: its norm, the mean over tokens, and fc_norm where it was trained."""
        modality = next(m for m, size in SIZES.items() if size["in_chans"] == model.config.in_chans)
        vit = MaskedViT(ViTConfig(**SIZES[modality], **TINY, final_norm=True))
        vit.load_state_dict(model.encoder.state_dict(), strict=False)
        if model.fc_norm is not None and vit.fc_norm is not None:
            vit.fc_norm.load_state_dict(model.fc_norm.state_dict())
        return vit.eval()

    def pretrain(self, modality: str, target: float, ce: float) -> MaskedAutoencoder:
        source, unlabelled = self.sets["source"], self.sets["unlabelled"]
        model = self.autoencoder(modality, classes=16 if ce else 0).train()
        step = MaskedPretraining(model, target_weight=target, ce_weight=ce)

        def loss(i: int) -> Tensor:
            a, b = self.pick(source, i, 0), self.pick(unlabelled, i, 1)
            mask = tube_masks(len(a), 1, self.grid, self.options.mask_ratio, seed=i)[:, 0]
            labels = source["label"][a] if ce else None
            videos = clips_of(source, modality, a), clips_of(unlabelled, modality, b)
            return step(*videos, mask, labels)["total"]

        what = f"{modality}, target {target:g}, cross-entropy {ce:g}"
        self.train(f"pretrain {what}", model, loss, self.options.steps, betas=(0.9, 0.95))
        return model

    def distill(self, student: MaskedViT, teachers: dict[str, MaskedViT]) -> MaskedViT:
        copy = MaskedViT(student.config)
        copy.load_state_dict(student.state_dict())
        step = MultimodalDistillation(copy, teachers).train()
        clips = self.sets["unlabelled"]

        def loss(i: int) -> Tensor:
            rows = self.pick(clips, i, 2)
            mask = tube_masks(len(rows), 1, self.grid, self.options.mask_ratio, seed=i)[:, 0]
            return step({m: clips_of(clips, m, rows) for m in ("rgb", *teachers)}, mask)["total"]

        self.train(f"distill from {' and '.join(teachers)}", step, loss, self.options.distill_steps)
        return copy.eval()

    def pick(self, clips: Clips, step: int, stream: int) -> Tensor:
        """The clips of a step: a fresh order every epoch, the same for every variant."""
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
        loss: Callable[[int], Tensor],
        steps: int,
        betas: tuple[float, float] = (0.9, 0.999),
    ) -> None:
        rate = self.options.rate
        optimizer = torch.optim.AdamW(param_groups(module, rate), betas=betas, fused=True)
        schedule = WarmupCosine(optimizer, steps, max(steps // 10, 1), min_lr=rate / 100)
        guard, started = StepGuard(optimizer, scheduler=schedule), time.perf_counter()
        torch.manual_seed(self.options.seed)
        for i in range(steps):
            value = loss(i)
            guard.step(value)
            if i % 50 == 0 or i == steps - 1:
                seconds = time.perf_counter() - started
                say(f"{name}: step {i + 1} of {steps}, loss {value.item():.4f}, {seconds:.0f} s")

    # -- scoring --

    def scores(self, model: MaskedViT, modality: str) -> dict[str, Any]:
        features = self.features(model, modality, 2, 0.75)
        return {str(k): self.score(features, k) for k in (1, 5)}

    @torch.no_grad()
    def features(self, model: MaskedViT, modality: str, views: int, ratio: float) -> Tensor:
        """[clips, views, D] of the test clips; each (clip, view) is encoded once."""
        test = self.sets["test"]
        made = []
        for rows in torch.arange(len(test["label"])).split(64):
            pack = sample_pack(
                len(rows), views, self.grid, ratio, seed=self.options.seed, clip_ids=test["clip_id"][rows]
            )
            encoded = model.encode(clips_of(test, modality, rows), pack)
            made.append(encoded.unflatten(0, (len(rows), views)))
        return torch.cat(made)

    def score(self, features: Tensor, shots: int) -> dict[str, float]:
        episodes = Episodes(
            self.sets["test"]["label"], k_shot=shots, episodes=self.options.episodes, seed=self.options.seed
        )
        result = evaluate_episodes(features[:, 0], features, episodes)
        return {"mean": result.mean, "std": result.std, "standard_error": result.standard_error}


def clips_of(clips: Clips, modality: str, rows: Tensor) -> Tensor:
    chosen = clips[modality][rows]
    return chosen.float() if chosen.dtype == torch.float16 else chosen


def table(rows: list[dict[str, Any]], sweep: list[dict[str, Any]], report: dict[str, Any]) -> str:
    def cell(score: dict[str, float]) -> str:
        return f"{100 * score['mean']:6.2f} +- {100 * score['standard_error']:.2f}"

    episodes = report["options"]["episodes"]
    lines = [
        f"5-way accuracy in %, {episodes} episodes, +- standard error; 2 views, ratio 0.75; {report['minutes']:.1f} minutes"
    ]
    lines.append(f"{'':32}{'1-shot':>16}{'5-shot':>16}")
    lines += [f"{row['name']:32}{cell(row['1']):>16}{cell(row['5']):>16}" for row in rows]
    lines.append("last student over mask ratio and views:")
    lines += [f"  ratio {r['mask_ratio']:<5} views {r['views']:<15}{cell(r['1']):>16}{cell(r['5']):>16}" for r in sweep]
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], sweep: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained")
    names = [row["name"] for row in rows]
    for offset, shots, colour in ((-0.2, "1", "#888888"), (0.2, "5", "#d55e00")):
        means = [100 * row[shots]["mean"] for row in rows]
        errors = [196 * row[shots]["standard_error"] for row in rows]
        places = [i + offset for i in range(len(rows))]
        left.barh(places, means, 0.38, xerr=errors, color=colour, label=f"{shots}-shot")
    left.set_yticks(range(len(rows)), names)
    left.invert_yaxis()
    left.axvline(20, color="black", linewidth=0.8, linestyle=":")
    left.set_xlabel("5-way accuracy, % (dotted: chance; bars: 95 %)")
    left.legend(frameon=False)
    for ratio in RATIOS:
        line = [row for row in sweep if row["mask_ratio"] == ratio]
        right.errorbar(
            [row["views"] for row in line],
            [100 * row["5"]["mean"] for row in line],
            [196 * row["5"]["standard_error"] for row in line],
            marker="o",
            label=f"ratio {ratio:g}",
        )
    right.set_xlabel("views")
    right.set_ylabel("5-way 5-shot accuracy, %")
    right.legend(frameon=False)
    aside = path.with_name(f".{path.name}")
    figure.savefig(aside, dpi=110, format=path.suffix[1:] or "png")
    aside.replace(path)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
