"""Few-shot adaptation with TED-Adapters beside the logistic head, on the same episodes of the synthetic cross-domain set.

Three heads on a frozen encoder, each query under the same masks: the published logistic one, on one masked view of each
support; the same on as many views as training sees; and adapters with a head, trained on the supports. Differences are
paired, episode by episode. The encoder is the row "+ cross-entropy" of synthetic_cdfsl.py, trained anew as there.

    python benchmarks/synthetic_adapters.py --json results/synthetic_adapters.json
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from harness import machine, write_json
from synthetic_cdfsl import parse as study_options
from synthetic_lab import FIRST, Lab, draw
from torch import Tensor
from torch.utils.data import Dataset

from mmfast import MaskedViT
from mmfast.episodes import EpisodeResult, Episodes, evaluate_fresh
from mmfast.peft import Adaptation, FewShotAdapter, evaluate_adapted

TRAINED = FIRST[0]
HEADS = {
    "logistic": "logistic, one view of a support",
    "views": "logistic, all views",
    "adapted": "TED-Adapters and head",
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--steps", type=int, default=4000, help="of the encoder's training")
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
        rows = heads_study(lab.load(TRAINED), lab.clips["test"], episodes=given.episodes, seed=given.seed)
    print(
        f"encoder: {TRAINED.name}, {given.steps} steps; {given.episodes} 5-way episodes, 2 views of mask ratio 0.75\n"
    )
    print(markdown(rows))
    report = {
        "machine": machine(torch.device("cpu")),
        "options": {name: value for name, value in vars(given).items() if name != "json"},
        "how": vars(Adaptation()),
        "minutes": (time.perf_counter() - started) / 60,
        "encoder": {key: value for key, value in trained.items() if key != "curve"},
        "heads": rows,
    }
    if given.json:
        write_json(given.json, report)
    return 0


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
) -> list[dict[str, Any]]:
    """One row for each number of shots: every head's accuracy, and what adapters gain over the others.

    model: an encoder, which stays as it is. clips: "clip_id", "label" and the modality of all test clips, stacked.
    """
    how = Adaptation() if how is None else how
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
        before = time.perf_counter()
        found["adapted"] = evaluate_adapted(model, held, drawn, views, mask_ratio, seed, how=how, **settings)
        rows.append(
            {"shots": k, "episodes": episodes, "parameters": FewShotAdapter(model, how).num_parameters}
            | {name: _score(result) for name, result in found.items()}
            | {f"gain over {name}": _gain(found["adapted"], found[name]) for name in ("logistic", "views")}
            | {"seconds": {"logistic": (before - started) / 2, "adapted": time.perf_counter() - before}}
        )
    return rows


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The study as a Markdown table, in %."""
    cell = lambda score: f"{100 * score['mean']:.2f} ± {100 * score['standard_error']:.2f}"
    titles = " | ".join(f"{row['shots']}-shot" for row in rows)
    lines = [f"| head | {titles} |", f"| --- |{' --- |' * len(rows)}"]
    lines += [f"| {name} | {' | '.join(cell(row[key]) for row in rows)} |" for key, name in HEADS.items()]
    for key in ("logistic", "views"):
        gains = " | ".join(f"{100 * g['mean']:+.2f} ± {100 * g['standard_error']:.2f}" for g in _each(rows, key))
        lines.append(f"| adapters less {HEADS[key]}, paired | {gains} |")
    return "\n".join(lines)


def _each(rows: Sequence[dict[str, Any]], key: str) -> list[dict[str, float]]:
    return [row[f"gain over {key}"] for row in rows]


def _score(result: EpisodeResult) -> dict[str, float]:
    return {"mean": result.mean, "std": result.std, "standard_error": result.standard_error}


def _gain(adapted: EpisodeResult, other: EpisodeResult) -> dict[str, float]:
    mean, error = adapted.difference(other)
    return {"mean": mean, "standard_error": error}


if __name__ == "__main__":
    sys.exit(main())
