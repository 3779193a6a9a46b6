"""`soma prompt`: versioned prompts."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

from soma.base.errors import UserError

if TYPE_CHECKING:
    from soma.serve.templates.library import Library

prompt_app = typer.Typer(no_args_is_help=True, help="Show, fill in, test and compare versioned prompts.")
Folder = Annotated[
    Path, typer.Option("--prompts", metavar="FOLDER", help="Where the prompts are.", envvar="SOMA_PROMPTS")
]
Reference = Annotated[str, typer.Argument(metavar="NAME[@VERSION]", help="A prompt; without a version its newest.")]
AsJson = Annotated[bool, typer.Option("--json", help="JSON instead of a table.")]
PROMPTS = Path("prompts")


def library_of(folder: Path) -> "Library":
    """The prompts in a folder."""
    from soma.serve.templates.library import Library

    return Library(folder)


@prompt_app.command("list")
def list_prompts(prompts: Folder = PROMPTS, as_json: AsJson = False) -> None:
    """List prompts and versions with the mean score of their last test."""
    from soma.serve.templates.score import compare, scores

    library = library_of(prompts)
    known = {
        (each.prompt, each.model): each
        for name in library.templates
        if scores(library, name)
        for each in compare(library, name)
    }
    rows: list[dict[str, Any]] = []
    for template in library:
        shots = template.file.examples
        rows.append({
            "prompt": template.label, "variables": list(template.file.variables),
            "examples": shots.select if shots else None, "description": template.file.description,
            "scores": {model: each.mean for (label, model), each in known.items() if label == template.label},
        })  # fmt: skip
    if as_json:
        typer.echo(json.dumps(rows, indent=1, ensure_ascii=False))
        return
    for row in rows:
        told = "  ".join(f"{model} {mean:.1%}" for model, mean in row["scores"].items()) or "-"
        typer.echo(f"{row['prompt']:<36} {row['examples'] or 'zero-shot':<10} {told}  {row['description']}".rstrip())
    if not rows:
        typer.echo(f"{prompts}: no prompts yet")


@prompt_app.command()
def show(reference: Reference, prompts: Folder = PROMPTS) -> None:
    """Show a version: its name with the hash, and what it says."""
    template = library_of(prompts).get(reference)
    typer.echo(f"# {template.label}")
    shown = template.file.model_dump(mode="json", exclude_defaults=True)
    typer.echo(yaml.safe_dump(shown, sort_keys=False, allow_unicode=True, width=120), nl=False)


@prompt_app.command()
def render(
    reference: Reference,
    var: Annotated[
        list[str] | None, typer.Option("--var", metavar="NAME=VALUE", help="A variable; a value is YAML; repeat it.")
    ] = None,
    prompts: Folder = PROMPTS,
    as_json: AsJson = False,
) -> None:
    """Fill a prompt in and print what the model would get."""
    variables = dict(pair(each) for each in var or ())
    _, made = library_of(prompts).render(reference, variables)
    if as_json:
        typer.echo(json.dumps(asdict(made), indent=1, ensure_ascii=False))
        return
    typer.echo(f"{made.label}" + (f", {made.tokens} tokens" if made.tokens is not None else ""), err=True)
    if made.messages is None:
        typer.echo(made.text, nl=False)
        return
    for turn in made.messages:
        typer.echo(f"[{turn['role']}]\n{turn['content']}")


def pair(text: str) -> tuple[str, Any]:
    """NAME=VALUE; the value as YAML reads it, so that 3 is a number and '"3"' a text."""
    name, sign, value = text.partition("=")
    if not sign:
        raise UserError(f"--var {text!r}: expected NAME=VALUE")
    try:
        return name, yaml.safe_load(value) if value else ""
    except yaml.YAMLError:
        return name, value


@prompt_app.command("test")
def run(
    reference: Reference,
    url: Annotated[str, typer.Option(help="An OpenAI-compatible service, up to and with /v1.")],
    model: Annotated[str, typer.Option(help="The model to ask.")],
    prompts: Folder = PROMPTS,
    key: Annotated[str | None, typer.Option(help="Its key.", envvar="SOMA_API_KEY")] = None,
    parallel: Annotated[int, typer.Option(help="Requests at once.", min=1)] = 4,
    least: Annotated[float, typer.Option(help="Exit with status 1 if the mean score is lower.", min=0, max=1)] = 0.0,
) -> None:
    """Run a prompt's tests and keep the scores beside it."""
    from soma.serve.templates.score import run_tests, wilson

    scores = run_tests(library_of(prompts), reference, url, model, key=key, parallel=parallel)
    for score in scores:
        typer.echo(f"{score.score:5.2f}  {json.loads(score.case)['variables']}  {score.answer.strip()!r}")
    mean = sum(score.score for score in scores) / len(scores)
    low, high = wilson(mean, len(scores))
    typer.echo(f"{scores[0].prompt} on {model}: {mean:.1%} of {len(scores)} ({low:.1%} to {high:.1%})")
    if mean < least:
        raise typer.Exit(1)


@prompt_app.command()
def compare(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A prompt.")],
    prompts: Folder = PROMPTS,
    model: Annotated[str | None, typer.Option(help="Only this model.")] = None,
    as_json: AsJson = False,
) -> None:
    """Compare the versions of a prompt by their last tests, each with the one before it, case by case."""
    from soma.serve.templates.score import compare as standings_of

    standings = standings_of(library_of(prompts), name, model)
    if as_json:
        typer.echo(json.dumps([asdict(each) for each in standings], indent=1))
        return
    for each in standings:
        tokens = "-" if each.prompt_tokens is None else f"{each.prompt_tokens:.0f}"
        versus = "" if each.p is None else f"  better {each.better}, worse {each.worse} (p {each.p:.3f})"
        edited = "" if each.is_current else "  (the file is gone or was edited since)"
        typer.echo(f"{each.prompt:<32} {each.model:<16} {each.mean:6.1%} of {each.cases} "
                   f"({each.low:.1%} to {each.high:.1%})  {tokens} tokens{versus}{edited}")  # fmt: skip
