"""What report_all.py reads: results of every benchmark, of one machine or several, brought into one form."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import harness
from machines import commit_of
from variants import OURS

KEPT = {0.0: 196, 0.5: 98, 0.75: 49, 0.9: 20}  # mask ratio -> cells of 196
CPU, GPU = "CPU", "GPU"
IN_BF16 = "published, bf16"
Timed = Mapping[str, Any]  # median, q1, q3 ... in milliseconds


@dataclass(frozen=True)
class Source:
    """Where a figure is from.   device: CPU or GPU."""

    file: str
    device: str
    machine: str
    commit: str
    date: str
    torch: str
    command: str

    @classmethod
    def of(cls, file: Path, content: Mapping[str, Any]) -> "Source":
        facts = content.get("machine", {})
        gpu = facts.get("gpu")
        name = gpu or f"{facts.get('cpu', 'CPU')}, {facts.get('threads', '?')} threads"
        return cls(
            file.name,
            GPU if gpu else CPU,
            str(name),
            commit_of(facts),
            str(facts.get("date", "")),
            str(facts.get("torch", "?")),
            str(content.get("command") or ""),
        )


@dataclass(frozen=True)
class Measured:
    """One case at one batch. ms: of the whole batch, by way. kind: ladder, grid or latency. peaks: bytes, where counted."""

    source: Source
    kind: str
    model: str
    kept: int
    cells: int
    views: int
    tokens: int
    clips: int
    ms: Mapping[str, Timed]
    peaks: Mapping[str, int | None] = field(default_factory=dict)
    floor_ms: float | None = None
    row: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, int, int]:
        """Model, kept cells and views: what is one line of a table."""
        return self.model, self.kept, self.views

    @property
    def ratio(self) -> float:
        """As it was asked for, where it is one of the usual ones: 0.9 of 196 cells leaves 20, not 19.6."""
        exact = 1 - self.kept / self.cells
        nearest = min(KEPT, key=lambda ratio: abs(ratio - exact))
        return nearest if self.cells == 196 and KEPT[nearest] == self.kept else exact


@dataclass(frozen=True)
class Step:
    """A training step, or an adapter's pass: milliseconds by way. published, ours: two of them. kind: of KINDS."""

    source: Source
    kind: str
    title: str
    clips: int
    ms: Mapping[str, Timed]
    peaks: Mapping[str, int | None]
    left_out: tuple[str, ...] = ()  # ways that are no peers, such as bare products


@dataclass
class Results:
    """Everything that the files hold."""

    sources: list[Source] = field(default_factory=list)
    cases: list[Measured] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    ops: list[tuple[Source, Mapping[str, Any]]] = field(default_factory=list)
    products: list[tuple[Source, Mapping[str, Any]]] = field(default_factory=list)
    host: list[tuple[Source, Mapping[str, Any]]] = field(default_factory=list)
    ceilings: dict[Source, Mapping[str, float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)  # what was skipped or wrong in the runs

    def product_rate(self, source: Source) -> float:
        """TFLOP/s of the fastest matrix product that was measured in the same run."""
        rates = [row["tflop_s"] for found, row in self.products if found is source]
        return max(self.ceilings[source]["gemm_tflop_s"], *rates, 0.0)

    @property
    def measured_gpu(self) -> bool:
        return any(source.device == GPU for source in self.sources)


KINDS = {
    "pretrain": "pre-training step",
    "distill": "distillation step, 3 teachers",
    "m2clip": "M2-CLIP step",
    "ted forward": "TED-Adapter, forward",
    "ted both": "TED-Adapter, forward and backward",
    "evl": "EVL step, backbone frozen",
}


def size_name(model: str) -> str:
    """ViT-S of videomae_small_patch16_224; the name itself of a model that is none of those."""
    for size in ("small", "base", "large", "huge"):
        if f"videomae_{size}" in model:
            return f"ViT-{size[0].upper()}"
    return model


def read(paths: Iterable[Path]) -> Results:
    """All results among files; those of other benchmarks are passed over.   ValueError for a file that is none."""
    found = Results()
    for path in paths:
        content = harness.read_json(path)
        if content.get("quick"):
            raise ValueError(f"{path} was made with --quick: its times mean nothing")
        source = Source.of(path, content)
        before = len(found.cases), len(found.steps), len(found.ops), len(found.products)
        found.cases += cases_of(source, content)
        found.steps += steps_of(path, content)
        for row in content.get("rows", []):
            if "op" in row:
                found.ops.append((source, row))
            elif "product" in row:
                found.products.append((source, row))
        found.host += [(source, row) for row in content.get("host", [])]
        if before == (len(found.cases), len(found.steps), len(found.ops), len(found.products)):
            continue
        found.sources.append(source)
        if "gemm_tflop_s" in content.get("ceilings", {}):
            found.ceilings[source] = content["ceilings"]
        found.notes += notes_of(source, content)
    return found


def cases_of(source: Source, content: Mapping[str, Any]) -> Iterator[Measured]:
    options = content.get("options") or {}
    for ladder in content.get("ladders", []):
        rows, case = ladder["rows"], ladder["case"]
        yield Measured(
            source,
            "ladder",
            ladder.get("model") or options.get("model") or "?",
            case["kept"],
            case["cells"],
            case["views"],
            case["tokens"],
            rows[0]["clips"],
            {row["name"]: row["timing"] for row in rows},
            {row["name"]: row["peak_bytes"] for row in rows},
            ladder.get("floor_ms"),
            ladder,
        )
    for kind in ("grid", "latency"):
        for row in content.get(kind, []):
            case = row["case"]
            tokens = case["kept"] * case["slots"]
            about = (row["model"], case["kept"], case["cells"], case["views"], tokens, row["clips"])
            yield Measured(source, kind, *about, row["timings"], row=row)


def steps_of(path: Path, content: Mapping[str, Any]) -> Iterator[Step]:
    for step in content.get("steps", []):
        yield from steps_of(path, {"command": content.get("command"), **step})
    source, title = Source.of(path, content), str(content.get("title", ""))
    if "moved" in content and "times" in content:
        options = content["options"]
        title = f"{options['dim']} wide, 2 x {options['hidden']} hidden, {options['batch']} clips"
        for what, kind in (("forward", "ted forward"), ("forward and backward", "ted both")):
            bare = tuple(name for name in content["times"][what] if name.startswith("two products"))
            yield Step(source, kind, title, options["batch"], content["times"][what], {}, bare)
        return
    if "decoder_alone" in content:
        rows, kind = [row for row in content["rows"] if row["kind"] == "frozen"], "evl"
    elif "towers" in content:
        rows, kind = content["rows"], "m2clip"
    elif title.startswith(("pretrain step", "distill step")) and "rows" in content:
        rows, kind = content["rows"], title.split()[0]
    else:
        return
    peaks = {row["name"]: row.get("peak_bytes") for row in rows}
    clips = rows[0].get("clips") or content["options"]["batch"]
    yield Step(source, kind, title, clips, {row["name"]: row["timing"] for row in rows}, peaks)


def notes_of(source: Source, content: Mapping[str, Any]) -> list[str]:
    notes = []
    for what in ("red", "skipped"):
        listed = content.get(what)
        for section, lines in listed.items() if isinstance(listed, dict) else ():
            notes += [f"{source.file}, {section}, {what}: {line}" for line in lines]
    sections = content.get("sections") or {}
    for name, state in {**({"gate": content["gate"]} if content.get("gate") else {}), **sections}.items():
        if state["state"] not in ("green", "skipped"):
            notes.append(f"{source.file}, {name}: {state['state']}: {state['why']}")
    return notes


# -- the best of each -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Best:
    """Milliseconds, of a clip or a step, and what reached it."""

    ms: float
    name: str
    clips: int = 0
    spread: float = 0.0


def best(found: Iterable[tuple[str, Timed, int]]) -> Best | None:
    """The fastest, per clip.   found: name, timing of a batch, its clips."""
    made = [
        Best(timing["median"] / clips, name, clips, (timing["q3"] - timing["q1"]) / 2 / timing["median"])
        for name, timing, clips in found
    ]
    return min(made, key=lambda one: one.ms, default=None)


@dataclass(frozen=True)
class Line:
    """One case on one machine: each way at its own best batch."""

    sources: tuple[Source, ...]
    published: Best | None
    peer: Best | None
    ours: Best

    @property
    def over_published(self) -> float | None:
        return None if self.published is None else self.published.ms / self.ours.ms

    @property
    def over_peer(self) -> float | None:
        return None if self.peer is None else self.peer.ms / self.ours.ms


def line_of(found: Sequence[tuple[Source, Mapping[str, Timed], int]], left_out: Sequence[str] = ()) -> Line | None:
    """Of several measurements of one case: source, timings by way, clips.   None without mmfast."""
    every = [(name, timing, clips) for _, ms, clips in found for name, timing in ms.items() if name not in left_out]
    ours = best(one for one in every if is_ours(one[0]))
    if ours is None:
        return None
    # As released: fp32 where that was run, else the precision that was.
    exact = [one for one in every if one[0] == "published, fp32"]
    published = best(exact or (one for one in every if one[0] == "published"))
    if published is not None and not exact and found[0][0].device == GPU:
        published = replace(published, name=IN_BF16)  # the precision of a GPU's runs
    peer = best(one for one in every if not one[0].startswith(OURS))
    return Line(tuple(dict.fromkeys(source for source, _, _ in found)), published, peer, ours)


def is_ours(name: str) -> bool:
    """mmfast as it is or fused; "lean" and others trade speed for something else."""
    name = name.removesuffix(", in L2")
    return name in (OURS, f"{OURS}, fused", f"{OURS}, fused, tanh")


def newest(sources: Iterable[Source]) -> str:
    """The date of the newest."""
    return max((source.date for source in sources), default="")


def lines(results: Results, device: str, kinds: Sequence[str] = ("ladder", "grid")) -> dict[tuple[str, int, int], Line]:
    """Every case on the machine and commit that measured it last.   kinds: of measurements to take it from."""
    groups: dict[tuple[str, int, int], dict[tuple[str, str], list[Measured]]] = {}
    for case in results.cases:
        if case.source.device == device and case.kind in kinds:
            group = groups.setdefault(case.key, {})
            group.setdefault((case.source.machine, case.source.commit), []).append(case)
    made = {}
    for key, by_machine in groups.items():
        chosen = max(by_machine.values(), key=lambda group: newest(case.source for case in group))
        line = line_of([(case.source, case.ms, case.clips) for case in chosen])
        if line is not None:
            made[key] = line
    return made


def grid_lines(results: Results, device: str) -> dict[tuple[str, int, int], Line]:
    """As `lines`, from the grid alone where there is one: there every case has the published path in one precision."""
    return lines(results, device, ("grid",)) or lines(results, device)


def step_lines(results: Results, device: str) -> dict[str, tuple[Step, Line]]:
    """Of every kind of step, the one measured last."""
    made: dict[str, tuple[Step, Line]] = {}
    for step in sorted(results.steps, key=lambda step: step.source.date):
        if step.source.device != device:
            continue
        line = line_of([(step.source, step.ms, step.clips)], step.left_out)
        if line is not None:
            made[step.kind] = step, line
    return made
