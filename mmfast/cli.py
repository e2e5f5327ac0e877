"""The command `mmfast`: one command a stage."""

import sys
from collections.abc import Callable, Sequence
from importlib import import_module

Command = Callable[[list[str]], int]

_TRAIN_EXTRAS = ("lightning", "jsonargparse", "docstring_parser", "torchmetrics")
_STAGES = {
    "pretrain": "stage I: masked pre-training of one modality on source and target clips",
    "distill": "stage II: one RGB student learns from teachers of several modalities",
    "fit-clip": "M2-CLIP: adapters and heads on a frozen CLIP learn labelled videos",
    "fit-evl": "EVL: a temporal decoder on a frozen CLIP or MaskedViT learns labelled videos",
}


def main(args: Sequence[str] | None = None) -> int:
    """Run a command.   args: sys.argv[1:] unless given. Returns the exit code; SystemExit where flags are wrong."""
    argv = list(sys.argv[1:] if args is None else args)
    if argv and argv[0] == "--version":
        from . import __version__

        sys.stdout.write(f"mmfast {__version__}\n")
        return 0
    if not argv or argv[0] in ("-h", "--help", "help"):
        sys.stdout.write(_help())
        return 0 if argv else 2
    name, rest = argv[0], argv[1:]
    commands = _commands()
    if name not in commands:
        sys.stderr.write(f"mmfast: unknown command {name!r}; the commands are {', '.join(commands)}\n")
        return 2
    try:
        return commands[name](rest)
    except ModuleNotFoundError as fault:
        if (fault.name or "").partition(".")[0] not in _TRAIN_EXTRAS:
            raise
        sys.stderr.write(f"mmfast {name} needs {fault.name}: pip install 'mmfast[train]'\n")
        return 2
    except (ValueError, OSError, FloatingPointError) as fault:
        sys.stderr.write(f"mmfast {name}: {fault}\n")
        return 1


def _commands() -> dict[str, Command]:
    from .commands import COMMANDS

    return {**{stage: _stage(stage) for stage in _STAGES}, **COMMANDS}


def _stage(name: str) -> Command:
    def command(argv: list[str]) -> int:
        # Lightning takes seconds to import, so only what trains imports it.
        return import_module("mmfast.stages.run").run(name, argv)

    command.__doc__ = _STAGES[name]
    return command


def _help() -> str:
    commands = _commands()
    width = max(map(len, commands))
    said = {name: (command.__doc__ or "").partition("\n")[0] for name, command in commands.items()}
    lines = [f"  {name:<{width}}  {line}" for name, line in said.items()]
    return "\n".join(
        ["usage: mmfast COMMAND [flags]", "", "commands:", *lines, "", "mmfast COMMAND --help says more.", ""]
    )
