"""The Markdown page of scaling.py, from its figures alone."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from roofline_page import case, number, table


def figure(value: float | None) -> str:
    return "absent" if value is None else number(value)


def count(value: float) -> str:
    """Thousands, millions, billions, three digits that count."""
    for unit, size in (("billion", 1e9), ("million", 1e6)):
        if value >= size:
            return f"{number(value / size)} {unit}"
    return number(value)


def kind(row: Mapping[str, Any]) -> str:
    return "measured" if row["kind"] == "measured" else "predicted"


def page(result: Mapping[str, Any]) -> list[str]:
    """The whole page, a line an entry."""
    rows, node = result["rates"], result["node"]
    measured = sum(row["kind"] == "measured" for row in rows)
    return [
        "# Scaling",
        "",
        f"Ensemble inference of uint8 clips, 16 frames of 224 x 224. Of {len(rows)} configurations on the GPU {measured} were "
        f"measured; the others are **predictions** for {result['machine']['name']} ({result['machine']['source']}). Everything "
        "computed from a prediction is arithmetic.",
        "",
        *_inputs(result["inputs"]),
        *_throughput(rows, node),
        *_needs(rows),
        *_bottlenecks(rows, node),
        *_billion(rows, result["inputs"]),
        *(_cpu(result["cpu"]) if result["cpu"] else []),
    ]


def _inputs(inputs: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = ([one["name"], _with_unit(one), one["kind"], one["source"]] for one in inputs)
    return ["## Inputs", "", *table(["input", "value", "kind", "source"], rows)]


def _with_unit(one: Mapping[str, Any]) -> str:
    value = one["value"]
    if value is None:
        return "absent"
    return f"{value:,d} {one['unit']}".strip() if isinstance(value, int) else f"{number(value)} {one['unit']}"


def _throughput(rows: Sequence[Mapping[str, Any]], node: Mapping[str, Any]) -> list[str]:
    lines = (
        [
            case(row),
            number(row["needs"]["clips_s"]),
            count(row["needs"]["clips_day"]),
            count(row["needs"]["clips_day_all"]),
            kind(row),
            row["source"],
        ]
        for row in rows
    )
    header = ["model, ratio, views", "clips/s", "clips a day", f"{node['gpus']} GPUs, clips a day", "kind", "source"]
    return ["## Clips a day, GPUs that never wait", "", *table(header, lines)]


NEEDS = {
    "decode_cores": "cores that decode",
    "bus_whole_gb_s": "bus, whole clips, GB/s",
    "bus_kept_gb_s": "bus, kept cells, GB/s",
    "files_gb_s": "files from storage or network, GB/s",
    "network_decoded_gbit_s": "network if clips come decoded, Gbit/s",
}


def _needs(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = ([case(row), *(figure(row["needs"][key]) for key in NEEDS), kind(row)] for row in rows)
    header = ["model, ratio, views", *NEEDS.values(), "clips/s are"]
    return ["## What one GPU needs before it starves", "", *table(header, lines)]


def _bottlenecks(rows: Sequence[Mapping[str, Any]], node: Mapping[str, Any]) -> list[str]:
    names = list(rows[0]["limits"])
    routes = list(rows[0]["bottlenecks"])
    lines = []
    for row in rows:
        allowed = row["limits"]
        found = [f"{part}, {allowed[part] / allowed['GPUs']:.0%}" for part in row["bottlenecks"].values()]
        lines.append([case(row), *(count(allowed[name]) for name in names), *found])
    header = ["model, ratio, views", *names, *(f"{route}: bottleneck, GPUs busy" for route in routes)]
    known = {"decode": "decoding", "file_bytes": "file sizes", "bus": "the bus"}
    absent = [what for key, what in known.items() if node[key] is None]
    text = f"Clips a second that each part of a node of {node['gpus']} GPUs and {node['cores']} cores allows"
    text += f"; {', '.join(absent)}: absent, so not among them." if absent else "."
    return ["## Where the bottleneck is", "", text, "", *table(header, lines), *_moves(rows, routes), ""]


def _moves(rows: Sequence[Mapping[str, Any]], routes: Sequence[str]) -> list[str]:
    """For each route and model, which part limits at which configurations, from the cheapest to the dearest."""
    lines = ["How it moves, ratio x views from the cheapest to the dearest:", ""]
    for route in routes:
        for model, own in groupby(rows, key=lambda row: row["model"]):
            ordered = sorted(own, key=lambda row: -row["limits"]["GPUs"])
            parts = []
            for part, same in groupby(ordered, key=lambda row: row["bottlenecks"][route]):
                cases = ", ".join(f"{row['mask_ratio']:g} x {row['views']}" for row in same)
                parts.append(f"{part} ({cases})")
            lines.append(f"- {route}, ViT-{model[0].upper()}: {'; then '.join(parts)}")
    return lines


def _billion(rows: Sequence[Mapping[str, Any]], inputs: Sequence[Mapping[str, Any]]) -> list[str]:
    wanted = {"gpu_hours": "GPU hours", "core_hours": "core hours of decoding"}
    priced = any(one["name"].startswith("price") and one["value"] is not None for one in inputs)
    if priced:
        wanted |= {"gpu_cost": "cost of GPUs", "core_cost": "cost of decoding", "cost": "sum of what is known"}
    lines = ([case(row), *(figure(row["billion"][key]) for key in wanted), kind(row)] for row in rows)
    note = (
        "GPUs that never wait; prices as given."
        if priced
        else "GPUs that never wait; no prices given (--gpu-price, --core-price)."
    )
    return ["## A billion clips", "", note, "", *table(["model, ratio, views", *wanted.values(), "clips/s are"], lines)]


def _cpu(rates: Sequence[Mapping[str, Any]]) -> list[str]:
    ordered = sorted(rates, key=lambda rate: (rate["model"], rate["mask_ratio"], rate["views"]))
    lines = (
        [
            case(rate),
            number(rate["clips_s"]),
            count(rate["clips_s"] * 86400),
            number(1e9 / rate["clips_s"] / 3600),
            rate["source"],
        ]
        for rate in ordered
    )
    header = ["model, ratio, views", "clips/s", "clips a day", "hours for a billion", "source"]
    return ["## On a CPU, measured", "", *table(header, lines)]
