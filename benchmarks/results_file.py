"""One JSON a machine and commit, of the sections of one or several runs of run_all.py.

mmfast, machine, machine_after, ceilings     as every result in benchmarks/results has them
options, command, parts                      how it was made
ladders                                      as ensemble_masked.py writes them, each with its model and dtype
rows                                         products and copies of the ceilings, and ops, each with its section
grid, latency, host, steps                   rows of these sections; a step is what its own benchmark writes
gate, sections                               how it went: name -> state, why, seconds
skipped, red                                 what was left out and what was wrong, by section
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import harness

KEYS = {
    "ladder_small": "ladders",
    "ladder_base": "ladders",
    "ladder_large": "ladders",
    "grid": "grid",
    "latency": "latency",
    "host": "host",
    "training": "steps",
    "m2clip": "steps",
    "ted": "steps",
    "evl": "steps",
}  # others hold plain rows
LISTS = ("ladders", "rows", "grid", "latency", "host", "steps")
LIMITS = ("copy_gb_s", "gemm_tflop_s", "gemm_size")
FILE = "results.json"


def empty(machine: Mapping[str, Any], **about: Any) -> dict[str, Any]:
    """A result without sections.   about: mmfast, options, command."""
    made: dict[str, Any] = {**about, "machine": dict(machine), "machine_after": {}, "ceilings": {}, "parts": []}
    made |= {name: [] for name in LISTS}
    return made | {"gate": None, "sections": {}, "skipped": {}, "red": {}}


def add_section(result: dict[str, Any], name: str, content: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Put a section's file into the result, in place of what it had of that section."""
    drop_section(result, name)
    result["sections"][name] = dict(state)
    # Driver, clock of the multiprocessors, power drawn and its limit, before and after: only a section's own file has them.
    clocks = [content.get(when, {}).get("driver_clock_power") for when in ("machine", "machine_after")]
    if "machine" in content and any(clocks):
        result["sections"][name]["clocks"] = clocks
    if limits := {key: content[key] for key in LIMITS if key in content}:
        result["ceilings"] = limits
    result[KEYS.get(name, "rows")] += [{"section": name, **row} for row in content.get("rows", [])]
    for what in ("skipped", "red"):
        if content.get(what):
            result[what][name] = list(content[what])
    if content.get("machine_after"):
        result["machine_after"] = content["machine_after"]


def drop_section(result: dict[str, Any], name: str) -> None:
    for key in LISTS:
        result[key] = [row for row in result[key] if row.get("section") != name]
    for what in ("sections", "skipped", "red"):
        result[what].pop(name, None)


def of_machine(result: Mapping[str, Any]) -> tuple[str, str]:
    """What results must share to become one: the device's name with its threads or count, and the commit."""
    facts = result.get("machine", {})
    where = facts.get("gpu") or f"{facts.get('cpu', 'CPU')} {facts.get('threads', '?')} threads"
    return str(where), str(facts.get("commit", "unknown"))


def file_name(result: Mapping[str, Any]) -> str:
    where, commit = of_machine(result)
    changed = "_changed" if commit.endswith("+changes") else ""
    return f"{re.sub('[^a-z0-9]+', '_', where.lower()).strip('_')}_{commit[:12]}{changed}.json"


def read(paths: Iterable[Path]) -> list[tuple[Path, dict[str, Any]]]:
    """Results of run_all.py among files and folders.   ValueError for what is none."""
    found = []
    for path in paths:
        file = path / FILE if path.is_dir() else path
        content = harness.read_json(file)
        if missing := {"machine", "sections", *LISTS} - set(content):
            raise ValueError(f"{file} is no result of run_all.py: it has no {', '.join(sorted(missing))}")
        found.append((file, content))
    return found


def merged(results: Iterable[tuple[Path, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """One result for each machine and commit. A section that several have is taken from the one that was started last,
    green ones before others."""
    groups: dict[tuple[str, str], list[tuple[Path, Mapping[str, Any]]]] = {}
    for file, content in results:
        groups.setdefault(of_machine(content), []).append((file, content))
    return [_joined(group) for group in groups.values()]


def _joined(group: list[tuple[Path, Mapping[str, Any]]]) -> dict[str, Any]:
    group = sorted(group, key=lambda one: str(one[1]["machine"].get("date", "")))
    first = group[0][1]
    whole = empty(first["machine"], **{key: first.get(key) for key in ("mmfast", "options", "command")})
    for file, content in group:
        whole["parts"].append({"file": file.name, "machine": content["machine"], "command": content.get("command")})
        if content.get("quick"):
            whole["quick"] = True
        gate = content.get("gate")
        if gate and gate["state"] != "skipped":
            whole["gate"] = gate
        for name, state in content["sections"].items():
            old = whole["sections"].get(name)
            if old and old["state"] == "green" and state["state"] != "green":
                continue
            add_section(whole, name, _section(content, name), state)
    return whole


def _section(content: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A section as its own file had it."""
    key = KEYS.get(name, "rows")
    found: dict[str, Any] = {"rows": [row for row in content[key] if row.get("section") == name]}
    for what in ("skipped", "red"):
        found[what] = content.get(what, {}).get(name, [])
    if name == "ceilings":
        found |= content.get("ceilings", {})
    return found | {"machine_after": content.get("machine_after", {})}
