"""run_all.py's sections of training steps: the benchmarks that exist for each, at a size that this machine can show."""

from collections.abc import Callable, Sequence

import harness
import tiny
from section_run import Run

Main = Callable[[Sequence[str]], int]


def script(
    run: Run, what: str, main: Main, arguments: Sequence[str], seconds: float, peers: Sequence[str] | None = None
) -> None:
    """Run a benchmark's main and keep the JSON it writes.   Exit code 3 says that results differ.

    peers: of the benchmark. On a GPU it runs without the compiled one first: if compiling outlasts the section, that is kept. On
    a CPU nothing is compiled, which takes minutes.
    """
    path = run.path.with_name(f"{run.path.stem}.{what.replace(' ', '_')}.json")
    kept = None
    for names in _turns(run, peers):
        if not run.enough(what if kept is None else f"{what}, compiled", seconds):
            return
        with run.guarded(what):
            chosen = [] if names is None else ["--peers", *names]
            code = main([*arguments, *chosen, "--device", str(run.device), "--json", str(path)])
            if code or not path.exists():
                run.red(what, "results differ from the published ones" if code == 3 else f"exit code {code}")
            else:
                if kept is not None:
                    run.result["rows"].remove(kept)
                kept = {"step": what, **harness.read_json(path)}
                run.add(kept)
        path.unlink(missing_ok=True)


def _turns(run: Run, peers: Sequence[str] | None) -> list[list[str] | None]:
    if peers is None:
        return [None]
    quickly = [name for name in peers if name != "compiled"]
    return [quickly, list(peers)] if run.cuda and not run.quick and "compiled" in peers else [quickly]


def rounds(run: Run, count: int) -> list[str]:
    return ["--rounds", "2" if run.quick else str(count)]


def training(run: Run) -> None:
    """Whole steps of pre-training and distillation, forward to optimiser."""
    import train_step
    import train_variants

    for mode, seconds in {"pretrain": 90.0, "distill": 60.0}.items():
        more = ["--batch", "32"] if run.cuda else ["--batch", "1"]
        if run.quick:
            tiny.register()
            more = ["--batch", "2", "--mask-ratio", "0.5"]
            more += ["--model", f"{tiny.NAME}_pretrain" if mode == "pretrain" else tiny.NAME]
        arguments = ["--mode", mode, *more, *rounds(run, 7 if run.cuda else 3)]
        script(run, mode, train_step.main, arguments, seconds, train_variants.PEERS)


def m2clip(run: Run) -> None:
    """M2-CLIP's step: four losses, forward to optimiser."""
    import m2clip_step
    import m2clip_ways

    if not run.cuda and not run.quick and not run.full:
        return run.skip("m2clip", "takes minutes on a CPU: run m2clip_step.py, or --full")
    more = []
    if run.quick:
        tiny.register()
        more = ["--model", tiny.NAME, "--classes", "5", "--batch", "2"]
    script(run, "m2clip", m2clip_step.main, [*more, *rounds(run, 7)], 100.0, m2clip_ways.PEERS)


def ted(run: Run) -> None:
    """The TED-Adapter, forward, and forward and backward."""
    import ted_adapter

    more = [] if run.cuda else ["--no-compile"]
    if run.quick:
        more = ["--dim", "16", "--hidden", "8", "--frames", "3", "--grid", "6", "5", "--batch", "2", "--no-compile"]
    script(run, "ted", ted_adapter.main, [*more, *rounds(run, 9 if run.cuda else 5)], 45.0)


def evl(run: Run) -> None:
    """EVL's decoder and step, the backbone frozen, trained, or cached."""
    import evl as benchmark
    import evl_ways

    if not run.cuda and not run.quick and not run.full:
        return run.skip("evl", "takes minutes on a CPU: run evl.py, or --full")
    more = []
    if run.quick:
        tiny.register()
        more = ["--model", tiny.NAME, "--classes", "5", "--layers", "2", "--frames", "3", "--batch", "2", "--quick"]
    script(run, "evl", benchmark.main, [*more, *rounds(run, 5)], 110.0, evl_ways.PEERS)


SECTIONS: dict[str, Callable[[Run], None]] = {"training": training, "m2clip": m2clip, "ted": ted, "evl": evl}
