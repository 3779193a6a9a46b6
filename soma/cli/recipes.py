"""`soma run`, `soma recipe`, `soma adapt`."""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from soma.base import progress

recipe_app = typer.Typer(no_args_is_help=True, help="Look at recipes: schema, check, show.")

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe's YAML file.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a value, e.g. --set train.steps=200.")
]
RunsFolder = Annotated[Path, typer.Option("--runs", help="Folder of runs and artefacts.", envvar="SOMA_RUNS")]


def run(
    recipe: RecipePath,
    overrides: Overrides = None,
    runs: RunsFolder = Path("runs"),
    explain: Annotated[
        bool, typer.Option("--explain", help="Say which stages are cached and why others would run.")
    ] = False,
    first: Annotated[
        str | None, typer.Option("--from", metavar="STAGE", help="Start here; earlier stages must be there.")
    ] = None,
    last: Annotated[str | None, typer.Option("--to", metavar="STAGE", help="Stop after this stage.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Make the chosen stages anew, cached or not.")] = False,
    runner: Annotated[
        Literal["local", "ray"] | None,
        typer.Option("--runner", help="Where data is worked on; short for --set data.runner=…; ray: RAY_ADDRESS."),
    ] = None,
    workers: Annotated[
        int | None, typer.Option("--workers", min=1, help="Processes that work on data; short for data.workers.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Events as JSON lines on standard output.")] = False,
) -> None:
    """Run a recipe: text in, a trained, measured, served model out. What is there already is not made again."""
    from soma.recipe import load

    short = {"data.runner": runner, "data.workers": workers}
    loaded = load(
        recipe, [*(overrides or []), *(f"{key}={value}" for key, value in short.items() if value is not None)]
    )
    if explain:
        _explain(loaded, runs, as_json)
        return
    execute(loaded, runs, as_json, first=first, last=last, force=force)


def _name_registry(recipe: Any, runs: Path) -> None:
    """Let `registry:` look where this run registers its model, unless the environment says otherwise."""
    os.environ.setdefault("SOMA_RUNS", str(runs))
    if recipe.tracking.uri:
        os.environ.setdefault("SOMA_REGISTRY", recipe.tracking.uri)


def _explain(recipe: Any, runs: Path, as_json: bool) -> None:
    from soma.run import plan

    _name_registry(recipe, runs)
    for item in plan(recipe, runs):
        if as_json:
            typer.echo(
                json.dumps({"stage": item.stage.name, "key": item.key, "cached": item.cached, "reasons": item.reasons})
            )
        else:
            typer.echo(f"{item.stage.name:<20} {'cached' if item.cached else 'runs'}  {item.path.name}")
            for reason in item.reasons:
                typer.echo(f"{'':<20}   {reason}")


def execute(recipe: Any, runs: Path, as_json: bool, **selection: Any) -> None:
    """Run a recipe with a progress display and print its summary; one rank of several takes its part and ends."""
    from soma.run import run as run_recipe
    from soma.train.parallel.launch import launched

    _name_registry(recipe, runs)
    if launched():
        from soma.train.parallel import ranks
        from soma.train.trainer import train

        if ranks.begin() > 0:
            ranks.follow(train)
            ranks.leave()
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    with progress.use(progress.choose(as_json=as_json)) as reporter:
        result = run_recipe(recipe, runs, **selection)
        reporter.event("finished", folder=str(result.folder), metrics=result.record["metrics"])
    if not as_json:
        typer.echo("")
        for line in summary(result):
            typer.echo(line)
    if launched():
        ranks.leave()


def summary(result: Any) -> list[str]:
    """What a person wants to know at the end of a run: figures, where the report is, what to do next."""
    lines = result.headline()
    if result.report is not None:
        lines.append(f"Report: {result.report}")
    if result.model is not None:
        typed = Path(sys.argv[0])  # .venv/bin/soma, as it was called
        here = typed.is_absolute() and typed.is_relative_to(Path.cwd())
        soma = typed.relative_to(Path.cwd()) if here else typed if typed.name == "soma" else "soma"
        lines += ["Next:", f"  {soma} chat {result.model}", f"  {soma} serve {result.model}"]
    return lines


@recipe_app.command("schema")
def schema() -> None:
    """Print the JSON Schema of a recipe, for editors."""
    from soma.recipe import json_schema

    typer.echo(json.dumps(json_schema(), indent=2))


@recipe_app.command("explain")
def explain(
    key: Annotated[
        str, typer.Argument(metavar="KEY", help="A block or a field: train, data.sources. Left out: all.")
    ] = "",
) -> None:
    """Say what a key means, its type and default, and what can stand below it."""
    from soma.recipe import explain as facts_of

    for one in facts_of(key):
        kind = one.type if one.is_block or one.default == "required" else f"{one.type}, {one.default}"
        typer.echo(f"{one.key}  ({kind}{', required' if one.default == 'required' else ''})")
        typer.echo(f"    {one.description}")


@recipe_app.command("show")
def show(
    recipe: RecipePath,
    overrides: Overrides = None,
    all_values: Annotated[
        bool, typer.Option("--all", help="Every default too, not only what is written down.")
    ] = False,
) -> None:
    """Print a recipe as it is understood, with everything that it extends."""
    from soma.recipe import load, to_yaml

    typer.echo(to_yaml(load(recipe, overrides or []), only_set=not all_values), nl=False)


@recipe_app.command("check")
def check(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Check a recipe and name its stages."""
    from soma.recipe import load
    from soma.stages.order import stages_of

    loaded = load(recipe, overrides or [])
    typer.echo(f"{recipe}: fine; stages: {', '.join(stage.name for stage in stages_of(loaded))}")


def adapt(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Start from this: folder, hf:ID, registry:NAME.")],
    data: Annotated[str, typer.Argument(metavar="DATA", help="Text (files, a folder), or pairs (JSON, JSONL).")],
    overrides: Overrides = None,
    runs: RunsFolder = Path("runs"),
    name: Annotated[str, typer.Option("--name", help="Name of the run.")] = "adapt",
    as_json: Annotated[bool, typer.Option("--json", help="Events as JSON lines on standard output.")] = False,
) -> None:
    """Adapt a model: text is learned by further pretraining, instruction pairs by tuning, preferences by DPO.

    What DATA is, its rows tell. --set changes any value of the recipe, e.g. --set train.epochs=2 or tune.steps=100.
    """
    from soma.adapt import adapt_recipe

    execute(adapt_recipe(name, model, data, overrides or []), runs, as_json)
