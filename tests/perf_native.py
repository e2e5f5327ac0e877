"""Instructions that csrc's host routines take, counted by callgrind in a driver of their own (tests/native/counted.cpp).

The driver is compiled with the flags of the package, and run once; every routine's count comes from a dump of its own.
"""

import ast
import functools
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DRIVER = ROOT / "tests" / "native" / "counted.cpp"
CASES = {name: name for name in re.findall(r'COUNTED\("([^"]+)"', DRIVER.read_text())}
NOT_HERE = 77  # the driver's exit status on a processor without what is counted


def compiler() -> str:
    return os.environ.get("CXX", "g++")


def host_flags() -> list[str]:
    """What setup.py compiles csrc with."""
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "HOST_FLAGS" for t in node.targets):
            return list(ast.literal_eval(node.value))
    raise LookupError("setup.py has no HOST_FLAGS")


@functools.cache
def version() -> str:
    for tool in ("valgrind", compiler()):
        if shutil.which(tool) is None:
            raise FileNotFoundError(f"{tool} is not installed")
    if not counts():
        raise OSError("the processor has no AVX2 or no FMA, of which the counts are")
    said = subprocess.run([compiler(), "--version"], capture_output=True, text=True, check=True).stdout
    return said.splitlines()[0]


@functools.cache
def counts() -> dict[str, int]:
    """Instructions by the name of the case; none on a processor without what is counted."""
    with tempfile.TemporaryDirectory() as folder:
        return run(build(ROOT / "csrc", Path(folder)), Path(folder))


def build(csrc: Path, folder: Path) -> Path:
    """The driver with the routines of `csrc`, compiled into `folder`."""
    binary = folder / "counted"
    sources = sorted(str(p) for p in csrc.glob("*.cpp") if p.name != "bindings.cpp")
    command = [compiler(), *host_flags(), f"-I{csrc}", str(DRIVER), *sources, "-ldl", "-o", str(binary)]
    built = subprocess.run(command, capture_output=True, text=True)
    if built.returncode:
        raise RuntimeError(f"{DRIVER.name} does not compile:\n{built.stderr}")
    return binary


def run(binary: Path, folder: Path) -> dict[str, int]:
    """The counts of a driver; its dumps go to `folder`."""
    command = [
        "valgrind",
        "--tool=callgrind",
        "--dump-instr=no",
        f"--callgrind-out-file={folder / 'dump'}",
        str(binary),
    ]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if ran.returncode == NOT_HERE:
        return {}
    if ran.returncode:
        raise RuntimeError(f"{binary.name} under callgrind ended with {ran.returncode}:\n{ran.stderr}")
    found = {}
    for dump in folder.glob("dump*"):
        text = dump.read_text()
        trigger = re.search(r"^desc: Trigger: Client Request: (.*)$", text, re.MULTILINE)
        total = re.search(r"^(?:summary|totals): (\d+)", text, re.MULTILINE)
        if trigger and total:
            found[trigger[1]] = int(total[1])
    return found


def measure(case: str) -> dict[str, float]:
    return {"instructions": counts()[case]}
