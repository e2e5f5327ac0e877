"""The commands that need no training stack: COMMANDS maps a name to a function of its arguments that gives the exit code."""

from collections.abc import Callable
from importlib import import_module

# name -> one line for the list of commands
SUMMARIES = {
    "predict": "class probabilities of videos, by a classifier or few-shot from a labelled folder, to CSV or JSON",
    "extract": "features of every (clip, view) of a collection, in safetensors shards",
    "evaluate": "the accuracy table of few-shot episodes, of a classifier over many views, or zero-shot by texts",
    "sweep": "accuracy and latency over mask ratios and views, and the best setting under a budget",
    "convert": "a checkpoint into mmfast's own folder or another project's names",
    "package": "ensemble as one file that torch runs without mmfast, from Python or C++",
    "doctor": "check a data set's files against its annotations",
    "tune": "the kernels' configurations, measured on this machine's GPU",
    "info": "versions, devices, what was compiled, which attention backend is taken",
}


def _lazy(name: str) -> Callable[[list[str]], int]:
    def command(argv: list[str]) -> int:
        from .common import guarded

        return guarded(name, import_module(f".{name}", __name__).main, argv)

    command.__doc__ = SUMMARIES[name]
    return command


COMMANDS: dict[str, Callable[[list[str]], int]] = {name: _lazy(name) for name in SUMMARIES}
