"""Few-shot adaptation with TED-Adapters and with EVL's decoder beside the logistic head, on the same synthetic episodes.

Heads on a frozen encoder, each query under the same masks: the published logistic one, on one masked view of each support;
the same on as many views as training sees; adapters with a head, trained on the supports; and EVL's decoder of all blocks with
a head, trained on them too, from a fresh start and from one that learned the source classes. Differences are paired,
episode by episode. The encoder is the row "+ cross-entropy" of synthetic_cdfsl.py, trained anew as there.

    python benchmarks/synthetic_adapters.py --json results/synthetic_adapters.json
"""

import argparse
import copy
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import machine, write_json
from synthetic_cdfsl import parse as study_options
from synthetic_lab import CLASSES, FIRST, GRID, Lab, clips_of, draw, say
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from mmfast import EVL, EVLConfig, MaskedViT, sample_pack
from mmfast.episodes import EpisodeResult, Episodes, evaluate_fresh
from mmfast.evl_fewshot import DecoderAdaptation, FewShotDecoder, evaluate_decoded
from mmfast.optim import WarmupCosine, param_groups
from mmfast.peft import Adaptation, FewShotAdapter, evaluate_adapted

TRAINED = FIRST[0]
# How decoders train was chosen on the clips, encoder and episodes of seed 1. Without temporal cross-attention: its tables, which
# start at 0, hardly move in so few steps, and over these small views on a CPU it takes ten times the rest of the decoder.
FRESH = DecoderAdaptation(temporal=("conv", "positions"))
FROM_SOURCE = DecoderAdaptation()
SOURCE_RATE = 4e-4  # as published
HEADS = {
    "logistic": "logistic, one view of a support",
    "views": "logistic, all views",
    "adapted": "TED-Adapters and head",
    "decoded": "EVL decoder and head",
    "source": "EVL decoder of source classes and head",
}
TRAINED_HEADS = {"adapted": "adapters", "decoded": "decoder", "source": "source decoder"}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--steps", type=int, default=4000, help="of the encoder's training")
    parser.add_argument("--decoder-steps", type=int, default=1500, help="on the source classes; 0 leaves that head out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)  # its products are too small to share
    started = time.perf_counter()
    options = study_options(["--steps", str(given.steps), "--seed", str(given.seed), "--jobs", "1"])
    with tempfile.TemporaryDirectory(prefix="synthetic_adapters.") as scratch:
        draw(options, Path(scratch))
        lab = Lab(options, Path(scratch))
        trained = lab.row(TRAINED)
        encoder = lab.load(TRAINED)
        source = source_decoder(encoder, lab, given.decoder_steps, given.seed) if given.decoder_steps else None
        rows = heads_study(encoder, lab.clips["test"], episodes=given.episodes, seed=given.seed, source=source)
    print(
        f"encoder: {TRAINED.name}, {given.steps} steps; {given.episodes} 5-way episodes, 2 views of mask ratio 0.75\n"
    )
    print(markdown(rows))
    report = {
        "machine": machine(torch.device("cpu")),
        "options": {name: value for name, value in vars(given).items() if name != "json"},
        "how": {"adapted": vars(Adaptation()), "decoded": vars(FRESH), "source": vars(FROM_SOURCE)},
        "minutes": (time.perf_counter() - started) / 60,
        "encoder": {key: value for key, value in trained.items() if key != "curve"},
        "heads": rows,
    }
    if given.json:
        write_json(given.json, report)
    return 0


def source_decoder(encoder: MaskedViT, lab: Lab, steps: int, seed: int = 0, mask_ratio: float = 0.75) -> EVL:
    """EVL's decoder on a frozen copy of the encoder, trained to tell the source classes under tube masks."""
    torch.manual_seed(seed)
    config = EVLConfig(
        encoder.config, num_layers=encoder.config.depth, num_classes=CLASSES, temporal_cross_attention=False
    )
    evl = EVL(config, copy.deepcopy(encoder))
    optimizer = torch.optim.AdamW(param_groups(evl, SOURCE_RATE), SOURCE_RATE)
    schedule = WarmupCosine(optimizer, steps, 0, min_lr=0.0)
    clips, right = lab.clips["source"], []
    evl.train()
    for step in range(steps):
        rows = lab.pick(clips, step, 5)
        labels = clips["label"][rows]
        logits = evl(clips_of(clips, "rgb", rows), sample_pack(len(rows), 1, GRID, mask_ratio, seed=step))
        optimizer.zero_grad()
        F.cross_entropy(logits, labels).backward()
        optimizer.step()
        schedule.step()
        right.append(float((logits.argmax(-1) == labels).double().mean()))
        if len(right) == 100 or step == steps - 1:
            say(f"decoder: step {step + 1} of {steps}, accuracy {sum(right) / len(right):.3f}")
            right.clear()
    return evl.eval()


class Held(Dataset):
    """Clips held in memory as a data set: "clip_id", "label" and one modality."""

    def __init__(self, clips: dict[str, Tensor], modality: str) -> None:
        self.clips, self.modality = clips, modality

    def __len__(self) -> int:
        return len(self.clips["label"])

    def __getitem__(self, row: int) -> dict[str, Any]:
        video = self.clips[self.modality][row]
        video = video.float() if video.is_floating_point() else video
        return {
            "clip_id": int(self.clips["clip_id"][row]),
            "label": int(self.clips["label"][row]),
            self.modality: video,
        }


def heads_study(
    model: MaskedViT,
    clips: dict[str, Tensor],
    modality: str = "rgb",
    *,
    shots: Sequence[int] = (1, 5),
    episodes: int = 100,
    views: int = 2,
    mask_ratio: float = 0.75,
    seed: int = 0,
    how: Adaptation | None = None,
    decoder: DecoderAdaptation | None = None,
    source: EVL | None = None,
    of_source: DecoderAdaptation | None = None,
) -> list[dict[str, Any]]:
    """One row for each number of shots: every head's accuracy, and what trained ones gain over those without steps.

    model: an encoder, which stays as it is. clips: "clip_id", "label" and the modality of all test clips, stacked. source: an
    EVL on the encoder whose decoder is a start too. how, decoder, of_source: of adapters, a fresh decoder, that of source.
    """
    how = Adaptation() if how is None else how
    decoder = FRESH if decoder is None else decoder
    of_source = FROM_SOURCE if of_source is None else of_source
    held, rows = Held(clips, modality), []
    for k in shots:
        drawn = Episodes(clips["label"], k_shot=k, episodes=episodes, seed=seed)
        settings: dict[str, Any] = dict(modality=modality, progress=False)
        started = time.perf_counter()
        found = {
            "logistic": evaluate_fresh(model, held, drawn, views, mask_ratio, seed, **settings),
            "views": evaluate_adapted(
                model, held, drawn, views, mask_ratio, seed, how=replace(how, steps=0), **settings
            ),
        }
        seconds = {"logistic": (time.perf_counter() - started) / 2}
        found_by: dict[str, Callable[..., EpisodeResult]] = {
            "adapted": partial(evaluate_adapted, model, how=how),
            "decoded": partial(evaluate_decoded, model, how=decoder),
        }
        if source is not None:
            found_by["source"] = partial(evaluate_decoded, source, how=of_source)
        for name, evaluate in found_by.items():
            before = time.perf_counter()
            found[name] = evaluate(held, drawn, views, mask_ratio, seed, **settings)
            seconds[name] = time.perf_counter() - before
        parameters = {"adapted": FewShotAdapter(model, how).num_parameters}
        parameters["decoded"] = FewShotDecoder(model, decoder).num_parameters
        if source is not None:
            parameters["source"] = FewShotDecoder(source, of_source).num_parameters
        gains = {
            f"gain of {name} over {other}": _gain(found[name], found[other])
            for name in found_by
            for other in ("logistic", "views")
        }
        scores = {name: _score(result) for name, result in found.items()}
        rows.append(
            {"shots": k, "episodes": episodes, "parameters": parameters} | scores | gains | {"seconds": seconds}
        )
    return rows


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The study as a Markdown table, in %."""
    cell = lambda score: f"{100 * score['mean']:.2f} ± {100 * score['standard_error']:.2f}"
    titles = " | ".join(f"{row['shots']}-shot" for row in rows)
    lines = [f"| head | {titles} |", f"| --- |{' --- |' * len(rows)}"]
    there = {key: name for key, name in HEADS.items() if key in rows[0]}
    lines += [f"| {name} | {' | '.join(cell(row[key]) for row in rows)} |" for key, name in there.items()]
    for key, name in TRAINED_HEADS.items():
        for other in ("logistic", "views") if key in there else ():
            each = [row[f"gain of {key} over {other}"] for row in rows]
            gains = " | ".join(f"{100 * g['mean']:+.2f} ± {100 * g['standard_error']:.2f}" for g in each)
            lines.append(f"| {name} less {HEADS[other]}, paired | {gains} |")
    return "\n".join(lines)


def _score(result: EpisodeResult) -> dict[str, float]:
    return {"mean": result.mean, "std": result.std, "standard_error": result.standard_error}


def _gain(adapted: EpisodeResult, other: EpisodeResult) -> dict[str, float]:
    mean, error = adapted.difference(other)
    return {"mean": mean, "standard_error": error}


if __name__ == "__main__":
    sys.exit(main())
