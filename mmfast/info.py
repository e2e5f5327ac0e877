"""`python -m mmfast.info`: versions, devices, what was compiled for which architectures, which attention backend is taken."""

import platform
import sys
from importlib.metadata import PackageNotFoundError, version

import torch

from mmfast_kernels import _C, tables, tuned
from mmfast_kernels.backends import describe

from . import __version__

OPTIONAL = ("triton", "flash-attn", "av", "nvtx", "transformers", "lightning", "matplotlib")


def report() -> str:
    """The whole report as text."""
    lines = [f"mmfast {__version__}", f"python {platform.python_version()} on {platform.platform()}"]
    lines.append(f"torch {torch.__version__}, CUDA {torch.version.cuda or 'not built in'}")
    lines += [f"{name} {_version(name)}" for name in OPTIONAL]
    lines += ["", f"compiled: {_C.build_info()}"]
    archs = _C.cuda_archs.replace(";", ", sm_") if _C.with_cuda else ""
    lines += [f"CUDA C++ for: sm_{archs}" if archs else "CUDA C++: none (built without nvcc)", "", "devices"]
    lines.append(f"  cpu: {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    devices = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    for device in devices[1:]:
        p = torch.cuda.get_device_properties(device)
        lines.append(
            f"  {device}: {p.name}, sm_{p.major}{p.minor}, {p.multi_processor_count} multiprocessors, "
            f"{p.total_memory / 2**30:.0f} GiB"
        )
    lines += ["", f"kernel configurations: {_tables()}"]
    for device in devices:
        lines += ["", f"attention on {device}", *_attention(device)]
    return "\n".join(lines)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _tables() -> str:
    folder = tuned.folder()
    if folder is None:
        return "shipped"
    own = sum(len(tuned.rows(op)) for op in tables.names())
    return f"{own} cases measured here ({folder}), else shipped" if own else "shipped (`mmfast tune` measures this GPU)"


def _attention(device: torch.device) -> list[str]:
    cases = describe(device)
    lines = [f"  {case}: {chosen['backend'] or 'none'}" for case, chosen in cases.items()]
    refused: dict[str, list[str]] = {}
    for case, chosen in cases.items():
        for name, reason in chosen["refused"].items():
            refused.setdefault(f"  {name} refused: {reason}", []).append(case)
    for line, where in refused.items():
        lines.append(line if len(where) == len(cases) else f"{line} ({'; '.join(where)})")
    return lines


if __name__ == "__main__":
    sys.stdout.write(report() + "\n")
