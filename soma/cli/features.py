"""`soma features`: the feature store."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from soma.base import progress
from soma.base.errors import UserError

features_app = typer.Typer(no_args_is_help=True, help="Feast: features that change over time, looked up and joined.")
Repo = Annotated[Path, typer.Argument(metavar="REPO", help="Folder with feature_store.yaml.")]


@features_app.command()
def init(
    repo: Annotated[Path, typer.Argument(metavar="REPO", help="Folder to make.")],
    online: Annotated[str, typer.Option(help="sqlite, or redis://HOST:PORT/DB.")] = "sqlite",
) -> None:
    """Make a repository with an example; installs Feast into an environment of its own the first time."""
    from soma.serve.features.repo import init as make

    with progress.use(progress.choose()):
        make(repo, online)
    typer.echo(f"{repo}: features.py says what there is; next: soma features apply {repo}")


@features_app.command()
def apply(repo: Repo) -> None:
    """Register what the repository's Python files define."""
    from soma.serve.features.repo import apply as register

    with progress.use(progress.choose()):
        names = register(repo)
    typer.echo(f"{repo}: {', '.join(names) or 'no feature views'}")


@features_app.command()
def materialize(
    repo: Repo,
    at: Annotated[str | None, typer.Option(help="As known at this time, as 2024-05-01T12:00 (UTC); now.")] = None,
    view: Annotated[list[str] | None, typer.Option(help="Only this view; repeat it.")] = None,
) -> None:
    """Write what a question would get now into the online store."""
    from soma.serve.features.repo import materialize as write

    with progress.use(progress.choose()):
        made = write(repo, None if at is None else moment(at), view or ())
    for name, count in made.items():
        typer.echo(f"{name}: {count} rows")


def moment(text: str) -> float:
    """Seconds since 1970 of a time; without a zone it is UTC."""
    try:
        made = datetime.fromisoformat(text)
    except ValueError:
        raise UserError(f"at {text!r}: expected a time as 2024-05-01T12:00") from None
    return (made if made.tzinfo else made.replace(tzinfo=UTC)).timestamp()


@features_app.command()
def serve(
    repo: Repo, port: Annotated[int, typer.Option(help="Port on loopback; 0 takes a free one.")] = 6566
) -> None:  # fmt: skip
    """Run Feast's feature server until Ctrl-C or SIGTERM."""
    from soma.serve.features.server import serve as run

    with progress.use(progress.choose()):
        run(repo, port)


@features_app.command()
def get(
    features: Annotated[list[str], typer.Argument(metavar="VIEW:FEATURE…", help="What to look up.")],
    entity: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Online: the entity; repeat it for further keys.")
    ] = None,
    url: Annotated[str, typer.Option(help="Online: the feature server.")] = "http://127.0.0.1:6566",
    repo: Annotated[Path | None, typer.Option(help="Historical: the repository.")] = None,
    entities: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Historical: Parquet with the keys and a time in each row.")
    ] = None,
    at: Annotated[str, typer.Option(help="Historical: the column with the time.")] = "event_timestamp",
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Historical: Parquet to write.")] = None,
    full_names: Annotated[bool, typer.Option("--full-names", help="Historical: columns as VIEW__FEATURE.")] = False,
) -> None:
    """Look features up: now, of one entity, at a server; or of a file's entities, as known at each row's time."""
    if entities is not None:
        if repo is None or out is None or entity:
            raise UserError("get: --entities FILE goes with --repo REPO and --out FILE, and without --entity")
        from soma.serve.features.repo import historical_file

        with progress.use(progress.choose()):
            count = historical_file(repo, features, entities, out, at, full_names=full_names)
        typer.echo(f"{out}: {count} rows")
        return
    if not entity:
        raise UserError("get: say whose (--entity KEY=VALUE), or give a file of them (--entities FILE)")
    from soma.serve.features.online import look_up_once

    keys = dict(pair(each) for each in entity)
    typer.echo(json.dumps(look_up_once(url, keys, features), ensure_ascii=False, indent=1))


def pair(text: str) -> tuple[str, str | int]:
    """KEY=VALUE; a value of digits alone is a number."""
    name, sign, value = text.partition("=")
    if not sign or not name:
        raise UserError(f"--entity {text!r}: expected KEY=VALUE")
    return name, int(value) if value.isascii() and value.isdigit() else value
