"""What it takes to feed GPUs, and what a billion clips cost: a Markdown page computed from measured JSON.

    python benchmarks/scaling.py --results benchmarks/results gpu_results/ --decode --out scaling.md --json scaling.json
    python benchmarks/scaling.py --decode-from scaling.json --gpus 64 --cores 96 --gpu-price 3 --core-price 0.04

Every input stands in the page with the file and commit that it was measured at, or as given, or as arithmetic, or as absent.
Where no GPU result is given, a GPU's clips a second are predictions of roofline.py and say so.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import harness
import scaling_page
import torch
from machines import PRESETS, commit_of, with_rates
from options import at_least
from scaling_inputs import (
    ABSENT,
    GIVEN,
    MEASURED,
    Input,
    Rate,
    best,
    bus_of,
    bytes_to_gpu,
    gpu_rates,
    machine_of,
    measure_decode,
    rates_in,
    results_in,
)

DAY, HOUR, BILLION = 86400.0, 3600.0, 1e9


@dataclass(frozen=True)
class Node:
    """What feeds `gpus` GPUs. Rates None where they are not known.

    decode: clips a second of one core. file_bytes: read for a clip. bus: GB/s to each GPU. network: GB/s. storage: GB/s.
    """

    gpus: int
    cores: int
    decode: float | None
    file_bytes: float | None
    bus: float | None
    network: float
    storage: float


def needs(rate: Rate, node: Node) -> dict[str, float | None]:
    """What one GPU takes before it starves."""
    whole, kept = bytes_to_gpu(rate)
    r = rate.clips_s
    files = None if node.file_bytes is None else r * node.file_bytes / 1e9
    return {
        "clips_s": r,
        "clips_day": r * DAY,
        "clips_day_all": r * DAY * node.gpus,
        "decode_cores": None if node.decode is None else r / node.decode,
        "bus_whole_gb_s": r * whole / 1e9,
        "bus_kept_gb_s": r * kept / 1e9,
        "files_gb_s": files,
        "network_decoded_gbit_s": r * whole * 8 / 1e9,
    }


def limits(rate: Rate, node: Node) -> dict[str, float]:
    """Clips a second that each part of the node allows; parts that are not known are left out."""
    whole, kept = bytes_to_gpu(rate)
    found = {"GPUs": node.gpus * rate.clips_s}
    if node.bus is not None:
        found["bus, whole clips"] = node.gpus * node.bus * 1e9 / whole
        found["bus, kept cells"] = node.gpus * node.bus * 1e9 / kept
    if node.decode is not None:
        found["decoding"] = node.cores * node.decode
    found["network, decoded clips"] = node.network * 1e9 / whole
    if node.file_bytes is not None:
        found["network"] = node.network * 1e9 / node.file_bytes
        found["storage"] = node.storage * 1e9 / node.file_bytes
    return found


# Where clips are decoded -> the parts that they then go through; the bus is given kept cells alone.
ROUTES = {
    "decoded on the node": ("GPUs", "bus, kept cells", "decoding", "network", "storage"),
    "decoded elsewhere, sent whole": ("GPUs", "bus, kept cells", "network, decoded clips"),
}


def bottlenecks(found: Mapping[str, float]) -> dict[str, str]:
    """For each route the part that allows least."""
    return {
        route: min((part for part in parts if part in found), key=found.__getitem__) for route, parts in ROUTES.items()
    }


def billion(rate: Rate, node: Node, gpu_price: float | None, core_price: float | None) -> dict[str, float | None]:
    """Hours, and money where prices are given, of a billion clips on GPUs that never wait."""
    gpu_hours = BILLION / rate.clips_s / HOUR
    core_hours = None if node.decode is None else BILLION / node.decode / HOUR
    parts = [None if gpu_price is None else gpu_hours * gpu_price]
    parts.append(None if core_price is None or core_hours is None else core_hours * core_price)
    known = [part for part in parts if part is not None]
    return {
        "gpu_hours": gpu_hours,
        "core_hours": core_hours,
        "gpu_cost": parts[0],
        "core_cost": parts[1],
        "cost": sum(known) if known else None,
    }


def everything(options: argparse.Namespace) -> dict[str, Any]:
    """All figures of the page."""
    results = results_in(options.results)
    machine = with_rates(machine_of(results, options.machine), None, None, options.pcie)
    measured = [rate for file, content in results for rate in rates_in(file, content)]
    on_gpu, on_cpu = best(measured, "cuda"), best(measured, "cpu")
    rates = gpu_rates(on_gpu, machine)
    bus = (
        bus_of(results, machine)
        if options.pcie is None
        else Input("host to one GPU", options.pcie, "GB/s", GIVEN, "--pcie")
    )
    decode, about = decoding(options)
    size = file_size(options, about)
    node = Node(
        options.gpus, options.cores, decode.value, size.value, bus.value, options.network_gbit / 8, options.storage_gb_s
    )
    inputs = [
        decode,
        size,
        bus,
        Input("GPUs of a node", options.gpus, "", GIVEN, "--gpus"),
        Input("cores that decode", options.cores, "", GIVEN, "--cores"),
        Input("network of a node", options.network_gbit, "Gbit/s", GIVEN, "--network-gbit"),
        Input("storage of a node", options.storage_gb_s, "GB/s", GIVEN, "--storage-gb-s"),
    ]
    for name, price in (("price of a GPU", options.gpu_price), ("price of a core", options.core_price)):
        flag = "--gpu-price" if "GPU" in name else "--core-price"
        inputs.append(Input(name, price, "an hour", ABSENT if price is None else GIVEN, flag))
    rows = []
    for rate in rates:
        found = limits(rate, node)
        rows.append(
            asdict(rate)
            | {"needs": needs(rate, node), "limits": found, "bottlenecks": bottlenecks(found)}
            | {"billion": billion(rate, node, options.gpu_price, options.core_price)}
        )
    return {
        "machine": asdict(machine),
        "node": asdict(node),
        "inputs": [asdict(one) for one in inputs],
        "rates": rows,
        "cpu": [asdict(rate) for rate in on_cpu.values()],
        "decode": about,
        "written": harness.machine(torch.device("cpu")),
    }


def decoding(options: argparse.Namespace) -> tuple[Input, dict[str, Any] | None]:
    """Clips a second of one core, and the measurement it is from."""
    name, unit = "decoding, one core", "clips/s"
    if options.decode_clips_s is not None:
        return Input(name, options.decode_clips_s, unit, GIVEN, "--decode-clips-s"), None
    about: dict[str, Any] | None = None
    where = "now"
    if options.decode:
        about = measure_decode(options.decode_videos, options.decode_frames, options.decode_height)
    elif options.decode_from is not None:
        content = results_in([options.decode_from])[0][1]
        about = content.get("decode", content)
        if not isinstance(about, dict) or "clips_per_core_second" not in about:
            raise ValueError(f"{options.decode_from} has no measurement of decoding; --decode --json writes one")
        where = options.decode_from.name
    if about is None:
        return Input(name, None, unit, ABSENT, "--decode measures it"), None
    facts = about["machine"]
    source = f"{where}: {facts['cpu']}, commit {commit_of(facts)}, load {facts['load_average']}; {about['video']}"
    return Input(name, about["clips_per_core_second"], unit, MEASURED, source), about


def file_size(options: argparse.Namespace, about: Mapping[str, Any] | None) -> Input:
    """Bytes read from storage for a clip."""
    name, unit = "file read for a clip", "bytes"
    if options.clip_kb is not None:
        return Input(name, options.clip_kb * 1e3, unit, GIVEN, "--clip-kb")
    if about is None:
        return Input(name, None, unit, ABSENT, "--clip-kb gives it, --decode measures made-up videos")
    return Input(name, about["file_bytes"], unit, MEASURED, f"mean of the made-up videos: {about['video']}")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scaling.py",
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--results", nargs="*", type=Path, default=[], metavar="PATH", help="JSON files, or folders of run_all.py")
    add("--machine", choices=list(PRESETS), default="h200", help="GPU to predict for where no result is given")
    add(
        "--pcie",
        type=above_zero,
        metavar="GB_S",
        help="from the host to one GPU; default: measured, else the data sheet's",
    )
    add("--decode", action="store_true", help="measure decoding on this machine, on made-up videos (needs PyAV)")
    add("--decode-from", type=Path, metavar="JSON", help="decoding as an earlier run with --decode --json measured it")
    add("--decode-clips-s", type=above_zero, help="clips a second of one core, known otherwise")
    add("--decode-videos", type=at_least(1), default=6, help="for --decode: how many")
    add("--decode-frames", type=at_least(16), default=64, help="for --decode: frames of each")
    add("--decode-height", type=at_least(16), default=256, help="for --decode: their height; width is 4/3 of it")
    add("--clip-kb", type=above_zero, help="kilobytes of file read for a clip; default: of the made-up videos")
    add("--gpus", type=at_least(1), default=8, help="GPUs of a node")
    add("--cores", type=at_least(1), default=128, help="cores of a node that decode")
    add("--network-gbit", type=above_zero, default=100.0, help="network of a node")
    add("--storage-gb-s", type=above_zero, default=5.0, help="reading from a node's storage")
    add("--gpu-price", type=above_zero, help="of a GPU an hour; none: hours alone")
    add("--core-price", type=above_zero, help="of a core an hour")
    add("--out", type=Path, metavar="FILE", help="write the Markdown page here; none: print it")
    add("--json", metavar="FILE", help="write all figures")
    return parser.parse_args(arguments)


def above_zero(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, got {text!r}") from None
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return value


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    try:
        result = everything(options)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    text = "\n".join(scaling_page.page(result))
    if options.out:
        options.out.write_text(text)
        print(f"written: {options.out}")
    else:
        print(text)
    if options.json:
        harness.write_json(options.json, result)
        print(f"written: {options.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
