"""Compiles csrc's host routines with their driver (tests/native/check.cpp) under a sanitizer, and runs it.

python tests/sanitize.py [address,undefined | thread ...]      exits with 1 on any report
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SANITIZERS = ("address,undefined", "thread")


def run(sanitizer: str) -> tuple[bool, str]:
    """Whether the driver ran without a report, and what compiler and driver said."""
    routines = [str(source) for source in (ROOT / "csrc").glob("*.cpp") if source.name != "bindings.cpp"]
    sources = [str(ROOT / "tests" / "native" / "check.cpp"), *routines]
    with tempfile.TemporaryDirectory() as folder:
        binary = str(Path(folder) / "check")
        flags = ["-std=c++17", "-O1", "-g", "-pthread", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off"]
        flags += [f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", f"-I{ROOT / 'csrc'}"]
        compiler = os.environ.get("CXX", "g++")
        built = subprocess.run([compiler, *flags, *sources, "-ldl", "-o", binary], capture_output=True, text=True)
        if built.returncode:
            return False, built.stderr
        ran = subprocess.run([binary], capture_output=True, text=True, timeout=120)
        return ran.returncode == 0 and not ran.stderr, ran.stdout + ran.stderr


def main() -> int:
    failed = 0
    for sanitizer in sys.argv[1:] or SANITIZERS:
        clean, said = run(sanitizer)
        sys.stdout.write(f"{sanitizer}: {'clean' if clean else 'FAILED'}\n{said}")
        failed |= not clean
    return failed


if __name__ == "__main__":
    sys.exit(main())
