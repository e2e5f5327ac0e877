"""EVL's temporal modules in miniature: what each adds where labels tell of appearance, and where they tell of motion.

A small CLIP learns from captioned stills what shapes, colours and places are called, and nothing of motion. It is frozen, and
the features of its last blocks on rendered clips are computed once. On them EVL's decoder is trained with no temporal module,
with one after the other added, and with single ones, on two sets of labels of the same clips: shape and colour, or manner and
direction of the motion. Linear probes of the frozen class tokens stand beside it. What is printed is what was measured.

    python benchmarks/synthetic_evl.py --json results/synthetic_evl.json --markdown results/synthetic_evl.md
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from harness import machine, write_json
from options import at_least, ratio
from synthetic_cdfsl import each, workers
from synthetic_evl_report import markdown, plot
from synthetic_lab import say
from synthetic_m2clip import learn_stills, picked, probe
from synthetic_motions import COLOURS, DIRECTIONS, FRAMES, MANNERS, SHAPES, Label, draw_coloured
from torch import Tensor
from torch.nn import functional as F

from mmfast.clip import CLIP
from mmfast.evl import EVL
from mmfast.evl_config import EVLConfig
from mmfast.evl_decoder import LayerFeatures
from mmfast.optim import WarmupCosine

CONV, POSITIONS, CROSS = MODULES = ("temporal_conv", "temporal_positions", "temporal_cross_attention")
# In the order of the paper's equation; then what a module does by itself.
DECODERS: dict[str, tuple[str, ...]] = {
    "no temporal module": (),
    "+ convolution": (CONV,),
    "+ positions": (CONV, POSITIONS),
    "+ cross-attention": MODULES,
    "positions alone": (POSITIONS,),
    "cross-attention alone": (CROSS,),
}
LABELS = [Label(*numbers) for numbers in product(range(len(SHAPES)), range(len(MANNERS)), range(len(DIRECTIONS)))]
# Parts of a class, the first counts most: shape and colour, manner and direction.
CLASSES = {"appearance": (len(SHAPES), len(COLOURS)), "motion": (len(MANNERS), len(DIRECTIONS))}
PARTS = {"appearance": ("shape", "colour"), "motion": ("manner", "direction")}
SEEDS = {"train": 501_000_003, "test": 502_000_003}  # of clips, far from those of stills


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    started = time.perf_counter()
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    with tempfile.TemporaryDirectory(prefix="synthetic_evl.") as scratch, workers(options.jobs) as pool:
        folder = Path(scratch)
        frozen = each(pool, partial(prepare, options, folder), seeds)
        jobs = list(product(seeds, DECODERS, CLASSES))
        runs = each(pool, partial(fit, options, folder), jobs)
    report = {
        "machine": machine(torch.device("cpu")),
        "options": {k: v for k, v in vars(options).items() if k not in ("json", "markdown", "plot")},
        "classes": {kind: first * second for kind, (first, second) in CLASSES.items()},
        "minutes": (time.perf_counter() - started) / 60,
        "frozen": frozen,
        "runs": runs,
    }
    text = markdown(report)
    print(text)
    if options.json:
        write_json(options.json, report)
    if options.markdown:
        aside = options.markdown.with_name(f".{options.markdown.name}")
        aside.write_text(text + "\n")
        aside.replace(options.markdown)
    if options.plot:
        plot(report, options.plot)
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--still-steps", type=at_least(1), default=1000, help="of the CLIP on stills")
    add("--still-batch", type=at_least(2), default=128, help="stills of a step")
    add("--still-rate", type=float, default=1e-3, help="learning rate on stills")
    add("--steps", type=at_least(1), default=800, help="of each decoder")
    add("--batch", type=at_least(1), default=64, help="clips of a step")
    add("--rate", type=float, default=3e-3, help="learning rate of the decoders")
    add("--dropout", type=ratio, default=0.5, help="in the decoder's MLPs and in front of the head")
    add("--layers", type=at_least(1), default=2, help="of the decoder, and last blocks of the CLIP it reads")
    add("--train-clips", type=at_least(1), default=64, help="of each of the 48 shapes in motion")
    add("--test-clips", type=at_least(1), default=32, help="of each of the 48")
    add("--seeds", type=at_least(1), default=3, help="each with its own CLIP, clips and decoders")
    add("--first-seed", type=at_least(0), default=0, help="the settings were chosen on seed 100")
    add("--jobs", type=at_least(1), default=min(2, os.cpu_count() or 1), help="processes of one thread each")
    add("--json", type=Path, help="write everything")
    add("--markdown", type=Path, help="write the tables")
    add("--plot", type=Path, help="draw them (needs matplotlib)")
    options = parser.parse_args(arguments)
    for name in ("json", "markdown", "plot"):
        path = getattr(options, name)
        if path and not path.resolve().parent.is_dir():
            parser.error(f"{path.resolve().parent} is no folder to write {path} into")
    return options


# -- the frozen model --------------------------------------------------------------------------------------------------


def prepare(options: argparse.Namespace, folder: Path, seed: int) -> dict[str, Any]:
    """Train the CLIP of a seed on stills, leave it and the features of all clips in the folder, and fit the probes."""
    own = folder / str(seed)
    own.mkdir()
    stills = learn_stills(argparse.Namespace(**vars(options) | {"seed": seed}), own)
    started, model = time.perf_counter(), evl(own, options)
    parts = {}
    for part, each_label in (("train", options.train_clips), ("test", options.test_clips)):
        parts[part] = features_of(model, *draw(each_label, SEEDS[part] + seed))
        torch.save(parts[part], own / f"{part}.pt")
    seconds = time.perf_counter() - started
    tokens = {part: model.backbone.head(found["out"][-1][:, :, 0].float()) for part, found in parts.items()}
    views = {"mean of the frames": lambda x: x.mean(1), "all frames in order": lambda x: x.flatten(1)}
    probes: dict[str, dict[str, Any]] = {name: {} for name in views}
    for (name, view), kind in product(views.items(), CLASSES):
        given = view(tokens["train"]), parts["train"][kind], view(tokens["test"]), parts["test"][kind]
        probes[name][kind] = probe(*given)
        say(f"seed {seed}: linear probe, {name}, {kind}: {probes[name][kind]['accuracy']:.1%}")
    clips = {part: len(found["motion"]) for part, found in parts.items()}
    size = {part: (own / f"{part}.pt").stat().st_size for part in parts}
    return {"seed": seed, "stills": stills, "clips": clips, "bytes": size, "seconds": seconds, "probes": probes}


def draw(each_label: int, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Clips of all 48 labels in turn, and the class of each clip in both sets."""
    labels = [LABELS[i % len(LABELS)] for i in range(len(LABELS) * each_label)]
    found = [draw_coloured(labels[at : at + 256], seed + 4 * at) for at in range(0, len(labels), 256)]
    clips, colours = (torch.cat(column) for column in zip(*found, strict=True))
    shape, manner, way = torch.tensor([[label.shape, *label.motion] for label in labels]).t()
    return clips, {"appearance": shape * len(COLOURS) + colours, "motion": manner * len(DIRECTIONS) + way}


@torch.no_grad()
def features_of(model: EVL, clips: Tensor, classes: dict[str, Tensor]) -> dict[str, Any]:
    """What the decoder reads of every clip, in half precision, a tensor a layer; and the classes."""
    halves = [[_half(layer) for layer in model.stream(part)] for part in clips.split(128)]
    found: dict[str, Any] = dict(classes)
    for i, name in enumerate(("out", "q", "k")):
        found[name] = [torch.cat([part[i] for part in layer]) for layer in zip(*halves, strict=True)]
    return found


def _half(layer: LayerFeatures) -> tuple[Tensor, Tensor, Tensor]:
    assert layer.q is not None
    assert layer.k is not None
    return layer.out.half(), layer.q.half(), layer.k.half()


def evl(folder: Path, options: argparse.Namespace, name: str = "+ cross-attention", classes: int = 1) -> EVL:
    """The CLIP in the folder under a decoder of a name, which starts anew."""
    tower = CLIP.from_pretrained(folder / "clip").visual
    modules: dict[str, Any] = {module: module in DECODERS[name] for module in MODULES}
    config = EVLConfig(
        tower.config, num_layers=options.layers, num_frames=FRAMES, num_classes=classes, mlp_dropout=options.dropout,
        class_dropout=options.dropout, **modules,
    )  # fmt: skip
    return EVL(config, tower).eval()


# -- decoders ----------------------------------------------------------------------------------------------------------


def fit(options: argparse.Namespace, folder: Path, job: tuple[int, str, str]) -> dict[str, Any]:
    """Train one decoder as EVL was published (AdamW with weight decay on everything, cosine, no warm-up), and score it."""
    seed, name, kind = job
    torch.manual_seed(seed)
    own, classes = folder / str(seed), CLASSES[kind]
    model = evl(own, options, name, classes[0] * classes[1]).train()
    train = torch.load(own / "train.pt", mmap=True)
    given = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(given, lr=options.rate, weight_decay=0.05, fused=True)
    schedule = WarmupCosine(optimizer, options.steps, 0, min_lr=0.0)
    started, losses = time.perf_counter(), []
    for step in range(options.steps):
        rows = picked(len(train[kind]), options.batch, step)
        optimizer.zero_grad(set_to_none=True)
        logits = model.proj(model.decode(layers(model, train, rows)))
        loss = F.cross_entropy(logits, train[kind][rows])
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
    seconds = time.perf_counter() - started
    model.eval()
    test = torch.load(own / "test.pt", mmap=True)
    scores = {what: score(model, test, kind, order) for what, order in orders(len(test[kind]), seed).items()}
    means = [float(part.mean()) for part in torch.stack(losses).split(25)]
    curve = [{"step": min(25 * (i + 1), options.steps), "loss": mean} for i, mean in enumerate(means)]
    told = ", ".join(f"{part} {share:.1%}" for part, share in scores["in order"].items())
    say(f"seed {seed}: {name}, {kind}: {told}; shuffled {scores['shuffled']['class']:.1%}; {seconds:.0f} s")
    return {"seed": seed, "decoder": name, "labels": kind, "parameters": model.num_trainable()} | {
        "scores": scores, "seconds": seconds, "curve": curve,
    }  # fmt: skip


def layers(model: EVL, clips: dict[str, Any], rows: Tensor, order: Tensor | None = None) -> Iterator[LayerFeatures]:
    """The features of some clips in fp32, their frames in another order [B, F] where one is given."""
    at = rows[:, None] if order is not None else rows
    take = lambda x: (x[at, order] if order is not None else x[at]).float()
    for out, q, k in zip(clips["out"], clips["q"], clips["k"], strict=True):
        crossed = model.config.temporal_cross_attention
        yield LayerFeatures(take(out), take(q) if crossed else None, take(k) if crossed else None)


def orders(count: int, seed: int) -> dict[str, Tensor | None]:
    """Frames as they are, and every clip's in an order of its own."""
    drawn = torch.rand(count, FRAMES, generator=torch.Generator().manual_seed(seed))
    return {"in order": None, "shuffled": drawn.argsort(1)}


@torch.no_grad()
def score(model: EVL, clips: dict[str, Any], kind: str, order: Tensor | None) -> dict[str, float]:
    """Accuracy of the class, and of each of its two parts by itself."""
    parts = torch.arange(len(clips[kind])).split(128)
    taken = [layers(model, clips, rows, None if order is None else order[rows]) for rows in parts]
    found, truth = torch.cat([model.proj(model.decode(t)).argmax(1) for t in taken]), clips[kind]
    second = CLASSES[kind][1]
    hits = (found == truth, found // second == truth // second, found % second == truth % second)
    return {name: float(hit.float().mean()) for name, hit in zip(("class", *PARTS[kind]), hits, strict=True)}


if __name__ == "__main__":
    sys.exit(main())
