"""`soma keys`: who may use a service, and how much. `soma ledger`: what was used."""

import json
from dataclasses import asdict
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from soma.base.errors import UserError

if TYPE_CHECKING:
    from soma.serve.keys.store import Key, KeyStore

keys_app = typer.Typer(no_args_is_help=True, help="Make, list, rotate and revoke the keys of a service.")
ledger_app = typer.Typer(no_args_is_help=True, help="Report, back up and settle what a service has counted.")
Where = Annotated[
    str, typer.Option("--database", help="A file (SQLite) or postgresql://…", envvar="SOMA_DATABASE", show_default=True)
]
AsJson = Annotated[bool, typer.Option("--json", help="JSON instead of a table.")]
KeyId = Annotated[str, typer.Argument(metavar="KEY", help="A key's id, as `soma keys list` shows it.")]
DATABASE = "soma-keys.db"


def store_of(database: str, *, create: bool = False) -> "KeyStore":
    """The keys in a database."""
    from soma.serve.database import Database
    from soma.serve.keys.store import KeyStore

    return KeyStore(Database(database, create=create))


@keys_app.command("create")
def create(
    name: Annotated[str, typer.Argument(help="What the key is called: a person, a program.")],
    team: Annotated[str | None, typer.Option(help="Team that it belongs to; made if it is not there.")] = None,
    model: Annotated[
        list[str] | None, typer.Option(help="Model it may use (* and ? stand for any); repeat it.")
    ] = None,
    route: Annotated[
        list[str] | None, typer.Option(help="Route it may use, as /v1/*; left out, all that manage nothing.")
    ] = None,
    priority: Annotated[int, typer.Option(help="-100 to 100; lower goes first.")] = 0,
    days: Annotated[float | None, typer.Option(help="Days until it expires; left out, never.")] = None,
    admin: Annotated[bool, typer.Option("--admin", help="A key for the admin API and page alone.")] = False,
    database: Where = DATABASE,
) -> None:
    """Make a key. It is shown once, on standard output; the database keeps a hash."""
    key, secret = store_of(database, create=True).create(
        name, team=team, role="admin" if admin else "use", models=model, routes=route, priority=priority, days=days
    )
    typer.echo(f"{key.id}: keep what follows, it is not shown again", err=True)
    typer.echo(secret.text)


@keys_app.command("list")
def list_keys(database: Where = DATABASE, as_json: AsJson = False) -> None:
    """List the keys, the newest last."""
    found = store_of(database).all()
    if as_json:
        typer.echo(json.dumps([shown(key) for key in found], indent=1))
        return
    for key in found:
        scope = " ".join((*(key.models or ()), *(key.routes or ())))
        typer.echo(f"{key.id}  {key.state:<8} {key.role:<6} {key.name:<24} {key.team or '-':<16} {scope}".rstrip())
    if not found:
        typer.echo(f"{database}: no keys yet")


def shown(key: "Key") -> dict[str, Any]:
    """A key for JSON."""
    return {**asdict(key), "state": key.state}


@keys_app.command("rotate")
def rotate(
    key: KeyId,
    grace: Annotated[float, typer.Option(help="Seconds for which the old secret is still good.")] = 0.0,
    database: Where = DATABASE,
) -> None:
    """Give a key a new secret; id, scopes, budgets and history stay."""
    secret = store_of(database).rotate(key, grace)
    typer.echo(f"{key}: keep what follows, it is not shown again", err=True)
    typer.echo(secret.text)


@keys_app.command("expire")
def expire(
    key: KeyId,
    days: Annotated[float, typer.Option(help="Days until it expires; 0: now.")],
    database: Where = DATABASE,
) -> None:
    """Set when a key expires."""
    store_of(database).expire(key, days)
    typer.echo(f"{key} expires {when(store_of(database).get(key).expires_at)}")


@keys_app.command("revoke")
def revoke(key: KeyId, database: Where = DATABASE) -> None:
    """End a key for good. Services that run know it within a second; answers that run are finished."""
    store_of(database).revoke(key)
    typer.echo(f"{key} is revoked")


@keys_app.command("budget")
def budget(
    owner: Annotated[str, typer.Argument(metavar="OWNER", help="key:ID or team:NAME.")],
    period: Annotated[str, typer.Option(help="day or month (UTC).")] = "month",
    tokens: Annotated[int | None, typer.Option(help="Prompt and completion tokens together.")] = None,
    money: Annotated[str | None, typer.Option(help="In the currency of the price file.")] = None,
    database: Where = DATABASE,
) -> None:
    """Bound what a key or a team uses; with neither --tokens nor --money the bound goes away."""
    try:
        amount = None if money is None else Decimal(money)
    except InvalidOperation:
        raise UserError(f"money {money!r}: expected a number") from None
    made = store_of(database).set_budget(owner, period, tokens, amount)
    bounds = [f"{made.tokens} tokens" if made.tokens is not None else "", f"{money} in money" if money else ""]
    typer.echo(f"{owner} per {period}: {' and '.join(filter(None, bounds)) or 'no bound'}")


@ledger_app.command("report")
def report(
    by: Annotated[str, typer.Option(help="key, name, team, model, route, day, outcome, prompt: some, with commas.")] = (
        "key,model,day"
    ),
    since: Annotated[str | None, typer.Option(help="First UTC day, as 2026-11-01.")] = None,
    until: Annotated[str | None, typer.Option(help="Last UTC day.")] = None,
    form: Annotated[str, typer.Option("--format", help="table, csv or json.")] = "table",
    database: Where = DATABASE,
) -> None:
    """Sum up tokens and money."""
    from soma.serve.database import Database
    from soma.serve.ledger import report as reports

    columns = by.split(",")
    lines = reports.report(Database(database, create=False), columns, since, until)
    if form == "json":
        typer.echo(reports.as_json(lines))
    elif form == "csv":
        typer.echo(reports.as_csv(lines, columns), nl=False)
    elif form == "table":
        typer.echo(reports.as_table(lines, columns))
    else:
        raise UserError(f"format {form!r}: expected table, csv or json")


@ledger_app.command("backup")
def backup(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Where the copy goes.")], database: Where = DATABASE
) -> None:
    """Copy keys and ledger while services use them (SQLite; PostgreSQL has pg_dump)."""
    from soma.serve.database import Database

    Database(database, create=False).backup(file)
    typer.echo(f"{file}")


@ledger_app.command("estimate")
def estimate(
    host: Annotated[str, typer.Argument(metavar="HOST", help="Name of a machine that will not come back.")],
    database: Where = DATABASE,
) -> None:
    """Settle by estimate what services on a lost machine left open, in a database that several machines share."""
    from soma.serve.database import Database
    from soma.serve.ledger.recover import instances, settle_all

    where = Database(database, create=False)
    typer.echo(f"{settle_all(where, instances(where, host), {}, None)} calls settled by estimate")


def when(milliseconds: int | None) -> str:
    """A time, in UTC."""
    return (
        "never" if milliseconds is None else f"{datetime.fromtimestamp(milliseconds / 1000, UTC):%Y-%m-%d %H:%M:%S} UTC"
    )
