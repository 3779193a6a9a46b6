"""What all benchmarks share: alternating runs, median and spread, a table on the screen, `--json` for the record.

A benchmark makes `Case`s with `compare` (ours and one or more peers, run in turn, so that a noisy minute hits both) and
hands them to `finish`, which prints them and, with `--json`, writes `benchmarks/results/NAME.json`.

    arguments = parser("generate", "Batch-1 decode …").parse_args()
    cases = compare("decode 64", "tokens/s", run_ours, {"transformers": run_theirs}, bars={"transformers": 1.5})
    finish("generate", arguments, cases, packages=["transformers"])
"""

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

Run = Callable[[], float]


@dataclass
class Case:
    """One line of a benchmark: a measurement of ours beside a peer's.

    `ours` and `theirs` are medians in `unit`; `ratio` is the median over the rounds of ours against theirs, turned so
    that more than 1 means ours is better; `spread` holds its lowest and highest round. `bar`: the least ratio promised.
    """

    case: str
    unit: str
    ours: float
    peer: str
    theirs: float
    ratio: float
    spread: tuple[float, float]
    bar: float | None
    met: bool | None


def alternate(runs: Mapping[str, Run], rounds: int = 5, warmup: int = 1) -> dict[str, list[float]]:
    """Call every run in turn, `warmup` rounds for nothing and `rounds` that count; the order turns from round to round.

    A run does its work once and returns its own measurement (tokens/s, seconds, bytes …).
    """
    names = list(runs)
    values: dict[str, list[float]] = {name: [] for name in names}
    for round_ in range(warmup + rounds):
        turn = round_ % len(names)
        for name in names[turn:] + names[:turn]:
            gc.collect()
            value = runs[name]()
            if round_ >= warmup:
                values[name].append(value)
                print(f"  round {round_ - warmup + 1}/{rounds}  {name}: {value:,.4g}", file=sys.stderr, flush=True)
    return values


def compare(
    case: str,
    unit: str,
    ours: Run,
    peers: Mapping[str, Run],
    *,
    bars: Mapping[str, float | None] | None = None,
    rounds: int = 5,
    warmup: int = 1,
    higher_is_better: bool = True,
) -> list[Case]:
    """Run ours and the peers in turn; one `Case` per peer."""
    print(f"{case} [{unit}]", file=sys.stderr, flush=True)
    values = alternate({"ours": ours, **peers}, rounds, warmup)
    return [
        make_case(case, unit, values["ours"], peer, values[peer], (bars or {}).get(peer), higher_is_better)
        for peer in peers
    ]


def make_case(
    case: str,
    unit: str,
    ours: Sequence[float],
    peer: str,
    theirs: Sequence[float],
    bar: float | None = None,
    higher_is_better: bool = True,
) -> Case:
    """A case from the rounds of both sides: round i of ours is held against round i of theirs."""
    ratios = [a / b if higher_is_better else b / a for a, b in zip(ours, theirs, strict=True)]
    ratio = statistics.median(ratios)
    return Case(
        case,
        unit,
        statistics.median(ours),
        peer,
        statistics.median(theirs),
        ratio,
        (min(ratios), max(ratios)),
        bar,
        None if bar is None else ratio >= bar,
    )


def parser(name: str, description: str, rounds: int = 5) -> argparse.ArgumentParser:
    """An argument parser with what every benchmark takes; add your own options to it."""
    arguments = argparse.ArgumentParser(prog=f"benchmarks/{name}.py", description=description)
    arguments.add_argument("--json", action="store_true", help=f"write benchmarks/results/{name}.json")
    arguments.add_argument("--rounds", type=int, default=rounds, help=f"rounds that count (default {rounds})")
    arguments.add_argument("--warmup", type=int, default=1, help="rounds before them (default 1)")
    arguments.add_argument("--threads", type=int, default=os.cpu_count(), help="torch threads (default: all CPUs)")
    return arguments


def finish(
    name: str,
    arguments: argparse.Namespace,
    cases: list[Case],
    packages: Iterable[str] = (),
    not_run: Mapping[str, str] | None = None,
) -> None:
    """Print the table and what was not run, why; with `--json` write the result file, missed bars and all."""
    print_table(cases)
    for what, reason in (not_run or {}).items():
        print(f"not run: {what}: {reason}")
    if arguments.json:
        print(f"written: {write(name, arguments, cases, packages, not_run).relative_to(ROOT)}")


def write(
    name: str,
    arguments: argparse.Namespace,
    cases: list[Case],
    packages: Iterable[str] = (),
    not_run: Mapping[str, str] | None = None,
) -> Path:
    """The result file, `benchmarks/results/NAME.json`.

    Cases of an earlier run that this one left out stay, each with the commit, date, command and machine of its own.
    """
    RESULTS.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {
        "benchmark": name,
        "command": command(),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": machine(arguments.threads),
        "versions": versions(packages),
        "cases": [rounded(case) for case in cases],
    }
    if not_run:
        record["not_run"] = dict(not_run)
    path = RESULTS / f"{name}.json"
    if path.exists():
        before = json.loads(path.read_text())
        anew = {(case.case, case.peer) for case in cases}
        own = {key: before[key] for key in ("commit", "date", "command", "machine")}
        record["cases"] += [own | case for case in before["cases"] if (case["case"], case["peer"]) not in anew]
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path


def print_table(cases: list[Case]) -> None:
    """The cases as an aligned table on standard output."""
    header = ("case", "unit", "ours", "peer", "theirs", "ratio", "spread", "bar", "met")
    rows = [
        (
            c.case,
            c.unit,
            f"{c.ours:,.4g}",
            c.peer,
            f"{c.theirs:,.4g}",
            f"{c.ratio:.3f}",
            f"{c.spread[0]:.3f}-{c.spread[1]:.3f}",
            "" if c.bar is None else f"{c.bar:g}",
            {None: "", True: "yes", False: "NO"}[c.met],
        )
        for c in cases
    ]
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    for row in [header, *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def rounded(case: Case) -> dict[str, Any]:
    """A case as JSON, in at most five significant figures."""

    def short(value: float) -> float:
        return float(f"{value:.5g}")

    record = {key: short(value) if isinstance(value, float) else value for key, value in asdict(case).items()}
    return {**record, "spread": [short(value) for value in case.spread]}


def command() -> str:
    """The command line to type again, without this machine's paths."""
    return " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])


def commit() -> str:
    """The short commit, with `+` where tracked files differ from it; "unknown" outside a checkout."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def machine(threads: int | None = None) -> dict[str, Any]:
    """Processor, cores, threads, memory and GPU; no host name, no paths."""
    import psutil
    import torch

    return {
        "processor": processor(),
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "threads": threads or torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.system(),
    }


def processor() -> str:
    """The processor's name with its widest vector extension."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    named = {key.strip(): value.strip() for key, value in fields.items()}
    flags = named.get("flags", "").split()
    extensions = [flag for flag in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16") if flag in flags]
    return " ".join([named.get("model name", platform.machine()), *extensions])


def versions(packages: Iterable[str] = ()) -> dict[str, str]:
    """Versions of Python, torch, and the packages named."""
    found = {"python": platform.python_version()}
    for package in ["torch", *packages]:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
