"""`soma doctor`, `soma runs`, `soma cache`."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from soma.base import runs as base_runs
from soma.base.units import human_bytes

runs_app = typer.Typer(no_args_is_help=True, help="List, compare and prune runs.")
cache_app = typer.Typer(no_args_is_help=True, help="List and clear copies of remote files and models.")
RunsFolder = Annotated[Path, typer.Option("--runs", help="Folder of runs and artefacts.", envvar="SOMA_RUNS")]
AsJson = Annotated[bool, typer.Option("--json", help="JSON instead of a table.")]
SIGNS = {"ok": "ok ", "off": "off", "problem": "!! "}


def doctor(runs: RunsFolder = Path("runs"), as_json: AsJson = False) -> None:
    """Say what this machine has, what is off, and why. Exit status 1 if something needed is broken."""
    from soma.base.doctor import diagnose, is_healthy, report

    checks = diagnose(runs)
    if as_json:
        typer.echo(json.dumps(report(checks), indent=1))
    else:
        for check in checks:
            typer.echo(f"{SIGNS[check.state]} {check.name:<20} {check.what}")
            for line in filter(None, (check.why, check.do)):
                typer.echo(f"{'':<24} {line}")
    if not is_healthy(checks):
        raise typer.Exit(1)


@runs_app.command("list")
def list_runs(runs: RunsFolder = Path("runs"), as_json: AsJson = False) -> None:
    """List the named runs, newest first."""
    found = base_runs.list_runs(runs)
    if as_json:
        typer.echo(json.dumps([asdict(run) for run in found], default=str, indent=1))
        return
    if not found:
        typer.echo(f"{runs}: no runs yet")
    for run in found:
        typer.echo(f"{run.name:<24} {run.status:<12} {run.started:<26} {human_bytes(run.bytes):>10}  {run.path}")


@runs_app.command("compare")
def compare(a: str, b: str, runs: RunsFolder = Path("runs"), as_json: AsJson = False) -> None:
    """Compare two runs: what differs in their recipes, their figures side by side, which stages made something else."""
    found = base_runs.compare_runs(runs, a, b)
    if as_json:
        typer.echo(json.dumps(asdict(found), default=str, indent=1))
        return
    typer.echo("recipe")
    for change in found.recipe:
        typer.echo(f"  {change.key:<40} {change.a!r} → {change.b!r}")
    typer.echo("figures")
    for name, (left, right) in found.metrics.items():
        typer.echo(f"  {name:<40} {_figure(left):>14} {_figure(right):>14}")
    typer.echo("stages")
    for stage in found.stages:
        typer.echo(f"  {stage.stage:<24} {_sameness(stage.same_content)}")


def _figure(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, int | float) else "-" if value is None else str(value)


def _sameness(same: bool | None) -> str:
    return {True: "same content", False: "different content", None: "not in both"}[same]


@runs_app.command("prune")
def prune(
    runs: RunsFolder = Path("runs"),
    keep: Annotated[int | None, typer.Option("--keep", help="Keep only the newest so many named runs.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go and remove nothing.")] = False,
) -> None:
    """Remove artefacts that no run refers to, and stale unfinished work."""
    result = base_runs.prune(runs, keep, dry_run)
    for removal in result.removed:
        verb = "would remove" if dry_run else "removed"
        typer.echo(f"{verb} {removal.path.name} ({human_bytes(removal.bytes)}): {removal.why}")
    for path, why in result.kept:
        typer.echo(f"kept {path.name}: {why}")
    typer.echo(f"{human_bytes(result.bytes)} {'would be ' if dry_run else ''}freed")


@cache_app.command("list")
def list_cached(as_json: AsJson = False) -> None:
    """List the remote files and models that are here, with their sizes."""
    from soma.base.cache import cache_root, list_cache

    found = list_cache()
    if as_json:
        typer.echo(json.dumps([asdict(one) for one in found], default=str, indent=1))
        return
    for one in found:
        typer.echo(f"{human_bytes(one.bytes):>10}  {one.fetched:<20}  {one.url}")
    typer.echo(f"{len(found)} in {cache_root()}; models of the Hugging Face hub lie in the hub's own cache")


@cache_app.command("clear")
def clear_cached(
    pattern: Annotated[str, typer.Argument(metavar="PATTERN", help="Addresses, e.g. 'https://example.org/*'.")] = "*",
) -> None:
    """Forget what was fetched from addresses that match PATTERN; left out, everything."""
    from soma.base.cache import clear_cache

    typer.echo(f"{human_bytes(clear_cache(pattern))} freed")
