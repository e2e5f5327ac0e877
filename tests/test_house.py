"""The rules of the house that a machine can hold: imports go down only, banned patterns, one version of each tool."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
# Floor of each module, by the longest prefix that fits. A module imports its own floor or one below.
FLOORS = {
    "mmfast_kernels": 1,
    "mmfast": 3,
    "mmfast.masks": 2,
    "mmfast.config": 2,
    "mmfast.decoder_pack": 2.1,
    "mmfast.layers": 2.2,
    "mmfast.adapters": 2.2,
    "mmfast.quantized": 2.2,
    "mmfast.fp8": 2.2,
    "mmfast.quantize": 2.3,
    "mmfast.fused": 2.25,
    "mmfast.clip_config": 2.1,
    "mmfast.clip_blocks": 2.3,
    "mmfast.clip_vision": 3,
    "mmfast.clip_text": 3,
    "mmfast.clip": 3,
    "mmfast.data": 2,
    "mmfast.graphs": 2.4,
    "mmfast.ensemble": 2.5,  # below the model: it knows a protocol, and vit.py calls it
    "mmfast.timm_names": 2.9,
    "mmfast.vit_encoder": 2.9,
    "mmfast.vit": 3,
    "mmfast.checkpoints": 3,
    "mmfast.mae": 3,
    "mmfast.optim": 2,
    "mmfast.guard": 2,
    "mmfast.pretrain": 4,
    "mmfast.distill": 4,
    "mmfast.newton": 2,
    "mmfast.fewshot": 4,
    "mmfast.episode_sampler": 4,
    "mmfast.episodes": 4.1,
    "mmfast.adaptive": 4.2,
    "mmfast.peft": 4.2,
    "mmfast.evl_fewshot": 4.3,
    "mmfast.shards": 2,
    "mmfast.loading": 2,
    "mmfast.program_towers": 4,
    "mmfast.programs": 4,
    "mmfast.package": 4.7,
    "mmfast.extract": 4.5,
    "mmfast.predict": 4.5,
    "mmfast.multiview": 4.6,
    "mmfast.evl_cache": 4.6,
    "mmfast.stages": 5,
    "mmfast.plots": 5,
    "mmfast.commands": 6,
    "mmfast.cli": 6.1,
    "mmfast.__main__": 6.2,
    "mmfast.profiling": 0,
    "mmfast.info": 5,
    "benchmarks": 9,
}


def _tracked(*suffixes: str) -> list[Path]:
    names = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if names.returncode:
        pytest.skip("not a git checkout")
    paths = [Path(n) for n in names.stdout.splitlines()]
    return [p for p in paths if p.suffix in suffixes and (ROOT / p).exists()]


def _module(path: Path) -> str:
    parts = list(path.with_suffix("").parts)
    if parts[0] == "kernels":
        parts = parts[1:]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _floor(module: str) -> float | None:
    fits = [m for m in FLOORS if module == m or module.startswith(m + ".")]
    return FLOORS[max(fits, key=len)] if fits else None


def _imports(path: Path) -> list[str]:
    module, found = _module(path), []
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                up = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*up, base]).strip(".")
            found += [f"{base}.{alias.name}" for alias in node.names]
    return found


def test_imports_go_down_only() -> None:
    broken = []
    for path in _tracked(".py"):
        own = _floor(_module(path))
        if own is None or path.parts[0] == "tests" or _module(path) == "mmfast":
            continue
        for imported in _imports(path):
            other = _floor(imported)
            if other is not None and other > own:
                broken.append(f"{path} (floor {own}) imports {imported} (floor {other})")
    assert not broken, "\n".join(broken)


def test_kernels_know_no_module() -> None:
    broken = [
        f"{p}: {i}" for p in _tracked(".py") if p.parts[0] == "kernels" for i in _imports(p) if i == "torch.nn.Module"
    ]
    assert not broken, broken


def _bans() -> list[dict[str, str]]:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    return [h for repo in config["repos"] for h in repo["hooks"] if h.get("language") == "pygrep"]


@pytest.mark.parametrize("ban", _bans(), ids=lambda b: b["id"])
def test_banned_pattern_is_absent(ban: dict[str, str]) -> None:
    hits = []
    for path in _tracked(".py", ".cpp", ".h", ".cu", ".cuh"):
        if not re.search(ban.get("files", ""), str(path)) or re.search(ban.get("exclude", "^$"), str(path)):
            continue
        if ban.get("types") == ["python"] and path.suffix != ".py":
            continue
        hits += [
            f"{path}:{n}: {line.strip()}"
            for n, line in enumerate((ROOT / path).read_text().splitlines(), 1)
            if re.search(ban["entry"], line)
        ]
    assert not hits, "\n".join(hits)


def test_ruff_has_one_version() -> None:
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    pinned = re.search(r"^ruff==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M)
    assert pinned is not None
    assert f"rev: v{pinned[1]} " in hooks


def test_importing_mmfast_does_not_import_extras() -> None:
    extras = {"av", "nvtx", "transformers", "matplotlib", "flash_attn", "lightning"}
    code = f"import sys, mmfast.vit, mmfast.data.video, mmfast.checkpoints; print({extras} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()", out.stdout
