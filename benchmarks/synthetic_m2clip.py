"""M2-CLIP in miniature, end to end on rendered clips: a CLIP of stills learns motion by its adapters alone.

A small CLIP learns from captioned stills what shapes, colours and places are called. Frozen, it gets adapters and heads, which
are trained on clips of 24 classes, "cross zigzags leftwards". Scored are the classes it was trained on, against linear probes of
the frozen CLIP on the same clips, and zero-shot classes: known motions of another shape, and motions never shown, each word of
which was. What is printed is what was measured.

    python benchmarks/synthetic_m2clip.py --json results/synthetic_m2clip.json --markdown results/synthetic_m2clip.md
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import machine, write_json
from options import at_least
from synthetic_cdfsl import each, workers
from synthetic_lab import say
from synthetic_m2clip_report import markdown, plot
from synthetic_motions import (
    CONTEXT,
    FRAMES,
    SIDE,
    TEMPLATES,
    Label,
    draw_clips,
    draw_stills,
    label_sets,
    tokenizer,
)
from torch import Tensor, nn
from torch.nn import functional as F

from mmfast.clip import CLIP
from mmfast.clip_config import CLIPConfig
from mmfast.data.captions import Captions
from mmfast.data.video_lists import label_words
from mmfast.m2clip import M2CLIP
from mmfast.m2clip_losses import contrastive_loss
from mmfast.optim import WarmupCosine, param_groups

TOWERS: dict[str, Any] = dict(
    embed_dim=128, image_size=SIDE, patch_size=8, context_length=CONTEXT, vision_width=128, vision_depth=4, vision_num_heads=4,
    text_width=128, text_depth=3, text_num_heads=4,
)  # fmt: skip
# Both towers' adapters everywhere, as on SSv2, whose labels tell of motion too.
ADAPTERS: dict[str, Any] = dict(preset="ssv2", num_frames=FRAMES, vision_hidden=64, text_hidden=64)
RUNS: dict[str, dict[str, Any]] = {"M2-CLIP": {}, "M2-CLIP without TED-Adapters": {"vision_layers": 0}}
SWITCHES = {"on": (True, True), "text off": (True, False), "vision off": (False, True), "off": (False, False)}
NAMES = label_sets()
TEST_SEED, TRAIN_SEED, STILL_SEED = 2_000_003, 1_000_003, 3  # of clips; a clip's class and place follow from its number


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="synthetic_m2clip.") as scratch, workers(options.jobs) as pool:
        folder = Path(scratch)
        stills = learn_stills(options, folder)
        baselines, *runs = each(pool, partial(do, options, folder), ["frozen", *RUNS])
    report = {
        "machine": machine(torch.device("cpu")),
        "options": {k: v for k, v in vars(options).items() if k not in ("json", "markdown", "plot")},
        "classes": {name: [label.name for label in labels] for name, labels in NAMES.items()},
        "minutes": (time.perf_counter() - started) / 60,
        "stills": stills,
        **baselines,
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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--still-steps", type=at_least(1), default=1000, help="of the CLIP on stills")
    add("--still-batch", type=at_least(2), default=128)
    add("--steps", type=at_least(1), default=1000, help="of adapters and heads on clips")
    add("--batch", type=at_least(1), default=32)
    add("--train-clips", type=at_least(1), default=160, help="of each of 24 classes")
    add("--test-clips", type=at_least(1), default=40, help="of each of 24 and twice 12 classes")
    add("--still-rate", type=float, default=1e-3, help="learning rate on stills")
    add("--rate", type=float, default=2e-3, help="learning rate on clips; text adapters have half of it")
    add("--seed", type=at_least(0), default=0)
    add("--jobs", type=at_least(1), default=min(2, os.cpu_count() or 1), help="processes of one thread each")
    add("--json", type=Path)
    add("--markdown", type=Path)
    add("--plot", type=Path)
    options = parser.parse_args(arguments)
    for name in ("json", "markdown", "plot"):
        path = getattr(options, name)
        if path and not path.resolve().parent.is_dir():
            parser.error(f"{path.resolve().parent} is no folder to write {path} into")
    return options


# -- training ----------------------------------------------------------------------------------------------------------


def learn_stills(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train a CLIP on stills and their captions, and leave it in the folder."""
    torch.manual_seed(options.seed)
    words, started = tokenizer(), time.perf_counter()
    clip = CLIP(CLIPConfig(vocab_size=len(words), **TOWERS)).train()

    def loss(step: int) -> dict[str, Tensor]:
        # Every still is new. One caption may fit several: they are of one class.
        images, captions = draw_stills(options.still_batch, STILL_SEED + options.seed * 1_000_000 + step)
        classes = {caption: i for i, caption in enumerate(dict.fromkeys(captions))}
        labels = torch.tensor([classes[caption] for caption in captions])
        token_ids = words([TEMPLATES[step % 2].replace("{}", caption) for caption in captions])
        scale = clip.logit_scale.exp().clamp(max=100)
        total = contrastive_loss(clip.encode_image(images), clip.encode_text(token_ids), labels, scale)
        return {"total": total}

    curve = train("stills", param_groups(clip, options.still_rate), loss, options.still_steps, options.still_rate)
    clip.eval().save_pretrained(folder / "clip")
    images, captions = draw_stills(512, STILL_SEED + options.seed * 1_000_000 - 1)
    known = list(dict.fromkeys(captions))
    with torch.no_grad():
        texts = clip.encode_text(words([TEMPLATES[0].replace("{}", caption) for caption in known]))
        found = (clip.encode_image(images) @ F.normalize(texts, dim=-1).t()).argmax(1).tolist()
    right = sum(known[i] == caption for i, caption in zip(found, captions, strict=True)) / len(captions)
    say(f"stills: {right:.1%} of new stills get their caption of {len(known)}")
    return {"accuracy": right, "captions": len(known), "seconds": time.perf_counter() - started, "curve": curve}


def do(options: argparse.Namespace, folder: Path, what: str) -> dict[str, Any]:
    return frozen(options, folder) if what == "frozen" else adapted(options, folder, what)


def adapted(options: argparse.Namespace, folder: Path, name: str) -> dict[str, Any]:
    """Train adapters and heads on the classes that are seen, and score them everywhere."""
    torch.manual_seed(options.seed)
    words, started = tokenizer(), time.perf_counter()
    seen = NAMES["seen"]
    captions = Captions(words, [label.name for label in seen], label_words(label.name for label in seen))
    assert captions.words is not None
    heads: dict[str, Any] = dict(
        num_classes=len(seen), num_words=len(captions.words), vision_num_heads=4, text_num_heads=4
    )
    model = M2CLIP.from_pretrained(folder / "clip", **ADAPTERS, **heads, **RUNS[name]).train()
    video, labels = clips_of(seen, options.train_clips, TRAIN_SEED + options.seed)
    masking = torch.Generator().manual_seed(options.seed)

    def losses(step: int) -> dict[str, Tensor]:
        rows = picked(len(labels), options.batch, step)
        token_ids, mlm_labels = captions.masked(labels[rows], masking)
        return model.losses(video[rows], token_ids, labels[rows], captions.class_token_ids, mlm_labels)

    curve = train(name, model.param_groups(options.rate), losses, options.steps, options.rate)
    seconds = time.perf_counter() - started
    model.eval()
    test, truth = clips_of(seen, options.test_clips, TEST_SEED + options.seed)
    report: dict[str, Any] = {"name": name, "trainable": model.num_trainable(), "seconds": seconds, "curve": curve}
    report["cmlm_test"] = masked_words(model, captions, test, truth, options.seed)
    report["supervised"] = supervised(model, captions, test, truth)
    order = torch.rand(len(test), FRAMES, generator=torch.Generator().manual_seed(options.seed)).argsort(1)
    shuffled = test[torch.arange(len(test))[:, None], :, order].transpose(1, 2)
    report["shuffled"] = supervised(model, captions, shuffled, truth)
    report["zero_shot"] = {}
    for switch, (vision, text) in SWITCHES.items():
        model.enable_adapters(vision=vision, text=text)
        report["zero_shot"][switch] = zero_shot(options, words, lambda v: model.encode_video(v).features, model.clip)
    told = ", ".join(f"{kind} {score:.1%}" for kind, score in report["supervised"].items())
    say(f"{name}: {told}; {report['zero_shot']['on']}")
    return report


def train(name: str, groups: list[dict[str, Any]], losses: Any, steps: int, rate: float) -> list[dict[str, float]]:
    """AdamW, warm-up and a cosine to 0. Returns the means of all losses over every 25 steps."""
    optimizer = torch.optim.AdamW(groups, lr=rate, weight_decay=0.01, fused=True)
    schedule = WarmupCosine(optimizer, steps, steps // 10, min_lr=0.0)
    started = time.perf_counter()
    parameters = [p for group in groups for p in group["params"]]
    curve: list[dict[str, float]] = []
    past: list[dict[str, Tensor]] = []
    for step in range(steps):
        optimizer.zero_grad(set_to_none=True)
        found = losses(step)
        found["total"].backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        past.append({key: value.detach() for key, value in found.items()})
        if len(past) == 25 or step == steps - 1:
            means = {key: float(torch.stack([p[key] for p in past]).mean()) for key in past[0]}
            past.clear()
            curve.append({"step": step + 1} | means)
            if step == steps - 1 or (step + 1) % 100 == 0:
                told = ", ".join(f"{key} {value:.3f}" for key, value in means.items())
                say(f"{name}: step {step + 1} of {steps}, {told}, {time.perf_counter() - started:.0f} s")
    return curve


def clips_of(labels: Sequence[Label], each_class: int, seed: int) -> tuple[Tensor, Tensor]:
    """Clips of every class in turn, and their classes."""
    numbers = torch.arange(len(labels) * each_class) % len(labels)
    parts = [
        draw_clips([labels[i] for i in part.tolist()], seed + 1000 * n) for n, part in enumerate(numbers.split(256))
    ]
    return torch.cat(parts), numbers


def picked(count: int, batch: int, step: int) -> Tensor:
    """The clips of a step: a fresh order every epoch, the same in every run."""
    per_epoch = max(count // batch, 1)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(step // per_epoch))
    return order[step % per_epoch * batch :][:batch]


# -- scoring -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def masked_words(model: M2CLIP, captions: Captions, video: Tensor, truth: Tensor, seed: int) -> float:
    """The loss of masked words, one a caption."""
    token_ids, mlm_labels = captions.masked(truth, torch.Generator().manual_seed(seed))
    parts = []
    for rows in torch.arange(len(truth)).split(128):
        given = token_ids[rows], truth[rows], captions.class_token_ids, mlm_labels[rows]
        parts.append(float(model.losses(video[rows], *given)["cmlm"]) * len(rows))
    return sum(parts) / len(truth)


@torch.no_grad()
def supervised(model: M2CLIP, captions: Captions, video: Tensor, truth: Tensor) -> dict[str, float]:
    """Accuracy by the class head, by the texts of the classes, and by the sum of both probabilities."""
    encoded = [model.encode_video(video[rows]) for rows in torch.arange(len(video)).split(128)]
    heads = torch.cat([e.class_logits for e in encoded]).softmax(-1)
    texts = model.class_scores(torch.cat([e.features for e in encoded]), captions.class_token_ids).softmax(-1)
    scores = {"class head": heads, "texts": texts, "both": heads + texts}
    return {name: float((score.argmax(1) == truth).float().mean()) for name, score in scores.items()}


@torch.no_grad()
def zero_shot(options: argparse.Namespace, words: Any, encode: Any, clip: CLIP) -> dict[str, dict[str, float]]:
    """Accuracy on classes that were not trained on.

    label: among the set's 12. motion: of the motion, among those of the set, where the shape is told. of 48: among all labels.
    encode: uint8 clips to features.
    """
    every = [label for labels in NAMES.values() for label in labels]
    texts = F.normalize(clip.encode_text(Captions(words, [label.name for label in every]).class_token_ids), dim=-1)
    scores: dict[str, dict[str, float]] = {}
    for name in ("new pairs", "new motions"):
        labels = NAMES[name]
        video, truth = clips_of(labels, options.test_clips, TEST_SEED + options.seed + len(name))
        features = torch.cat([encode(video[rows]) for rows in torch.arange(len(video)).split(128)])
        products = features @ texts.t()
        right = torch.tensor([every.index(labels[i]) for i in truth.tolist()])
        motions = {label.motion for label in labels}
        allowed = torch.tensor([[o in labels for o in every]])
        told = torch.tensor(
            [[o.shape == labels[i].shape and o.motion in motions for o in every] for i in truth.tolist()]
        )
        scores[name] = {
            kind: float((products.masked_fill(~mask, float("-inf")).argmax(1) == right).float().mean())
            for kind, mask in (("label", allowed), ("motion", told), ("of 48", torch.ones_like(allowed)))
        }
    return scores


@torch.no_grad()
def frozen(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The CLIP as it is: linear probes of its frames' class tokens, and its own zero-shot scores."""
    clip = CLIP.from_pretrained(folder / "clip")
    sets = {
        "train": clips_of(NAMES["seen"], options.train_clips, TRAIN_SEED + options.seed),
        "test": clips_of(NAMES["seen"], options.test_clips, TEST_SEED + options.seed),
    }
    tokens = {
        name: torch.cat([clip.visual.head(clip.visual.forward_frames(part)) for part in video.split(128)])
        for name, (video, _) in sets.items()
    }
    probes = {}
    for name, of in (("mean of the frames", lambda x: x.mean(1)), ("all frames in order", lambda x: x.flatten(1))):
        probes[name] = probe(of(tokens["train"]), sets["train"][1], of(tokens["test"]), sets["test"][1])
        say(f"linear probe, {name}: {probes[name]['accuracy']:.1%}")
    own = zero_shot(options, tokenizer(), lambda v: F.normalize(clip.encode_image(v), dim=-1).mean(1), clip)
    return {"probes": probes, "frozen_zero_shot": own}


def probe(train: Tensor, labels: Tensor, test: Tensor, truth: Tensor) -> dict[str, float]:
    """Multinomial logistic regression, its penalty chosen on a fifth of the training clips."""
    centre, scale = train.mean(0), train.std(0) + 1e-6
    train, test = (train - centre) / scale, (test - centre) / scale
    held = torch.arange(len(labels)) >= len(labels) * 4 // 5
    penalties = (1e-4, 1e-3, 1e-2, 1e-1)
    scores = [_accuracy(_regression(train[~held], labels[~held], p), train[held], labels[held]) for p in penalties]
    best = penalties[scores.index(max(scores))]
    return {"accuracy": _accuracy(_regression(train, labels, best), test, truth), "penalty": best}


def _regression(x: Tensor, labels: Tensor, penalty: float) -> nn.Linear:
    layer = nn.Linear(x.shape[1], int(labels.max()) + 1)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    solver = torch.optim.LBFGS(layer.parameters(), max_iter=300, history_size=20, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(layer(x), labels) + penalty / 2 * layer.weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        solver.step(closure)  # type: ignore[no-untyped-call]  # torch left LBFGS untyped
    return layer


def _accuracy(layer: nn.Linear, x: Tensor, labels: Tensor) -> float:
    return float((layer(x).argmax(1) == labels).float().mean())


if __name__ == "__main__":
    sys.exit(main())
