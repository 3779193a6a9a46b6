"""`soma data convert`, `check`: instruction files."""

from pathlib import Path
from typing import Any

import typer

SCHEMAS = "alpaca, alpaca_text, messages, sharegpt, preference, kto or seeds"


def add_commands(app: typer.Typer) -> None:
    """Put the commands under `soma data`."""
    app.command("convert")(convert)
    app.command("check")(check)
    app.command("show")(show)
    app.add_typer(generate_app, name="generate")


def convert(
    source: str = typer.Argument(..., metavar="IN", help="A JSON or JSONL file, a folder of such, or an address."),
    out: Path = typer.Argument(..., metavar="OUT", help="The file to write: .jsonl or .json, also .gz, .bz2, .xz."),
    to: str = typer.Option(..., "--to", help=f"The schema to write: {SCHEMAS}."),
    schema: str = typer.Option(None, "--from", help="The schema to read (default: told by the first row)."),
    skip_bad: bool = typer.Option(False, "--skip-bad", help="Leave out rows that do not fit, instead of stopping."),
) -> None:
    """Write instruction data in another schema, without loss: what OUT cannot hold is kept in its field soma_kept."""
    from soma.data.instruct.convert import convert_file

    outcome = convert_file(source, out, _schema(to, "--to"), _schema(schema, "--from"), strict=not skip_bad)
    for line in outcome.lines():
        typer.echo(f"left out: {line}", err=True)
    found = ", ".join(sorted(outcome.schemas)) or "nothing"
    typer.echo(f"{out}: {outcome.written:,} rows of {to} from {outcome.rows:,} rows ({found})")


def check(
    source: str = typer.Argument(..., metavar="IN", help="A JSON or JSONL file, a folder of such, or an address."),
    schema: str = typer.Option(None, "--schema", help="The schema to hold it to (default: told by the first row)."),
) -> None:
    """Whether every row of instruction data fits its schema: what does not is named by file, row and field."""
    from soma.data.instruct.convert import check_file

    outcome = check_file(source, _schema(schema, "--schema"))
    for line in outcome.lines():
        typer.echo(line, err=True)
    found = ", ".join(f"{count:,} {name}" for name, count in sorted(outcome.schemas.items())) or "nothing that fits"
    typer.echo(f"{source}: {outcome.rows:,} rows: {found}; {len(outcome.wrong):,} wrong")
    if outcome.wrong:
        raise typer.Exit(1)


def show(
    source: str = typer.Argument(..., metavar="FILE", help="Instruction data in any schema."),
    model: str = typer.Option(..., "--model", help="Model or tokenizer whose chat template is used."),
    row: int = typer.Option(None, "--row", min=1, help="Show this row alone, counted from 1."),
    sequence_length: int = typer.Option(None, "--sequence-length", min=2, help="Show how rows share sequences."),
    page: Path = typer.Option(None, "--html", metavar="PAGE", help="Write a page instead of printing."),
) -> None:
    """The tokens of instruction data, coloured by what is learned (between « and »), and how they are packed."""
    from soma.data.instruct import show as shown

    parts = shown.show(source, model, row, sequence_length)
    if page is None:
        typer.echo(shown.terminal(parts))
    else:
        page.write_text(shown.page(parts, f"{source} with {model}"), encoding="utf-8")
        typer.echo(f"{page}: {sum(not isinstance(part, str) for part in parts):,} conversations")


def _schema(name: str | None, option: str) -> Any:
    from soma.base.errors import UserError
    from soma.data.instruct.schemas import SCHEMAS as KNOWN

    if name is not None and name not in KNOWN:
        raise UserError(f"{option} {name}: no such schema; {SCHEMAS} expected")
    return name


generate_app = typer.Typer(no_args_is_help=True, help="Make instruction data with a model behind an endpoint.")
SEEDS = typer.Option(..., "--seeds", help="Tasks to start from: JSON or JSONL in any schema of `soma data convert`.")
URL = typer.Option(..., "--url", help="Base address of an OpenAI-compatible endpoint, such as http://localhost:8000.")
MODEL = typer.Option(..., "--model", help="The model's name there.")
OUT = typer.Option(..., "--out", help="Folder of rows.jsonl, report.json and the journal; the same command resumes it.")
KEY = typer.Option(None, "--api-key-env", help="Name of the environment variable with the endpoint's key.")
ROWS = typer.Option(None, "--rows", min=1, help="Stop at this many rows, before duplicates are taken out.")
REQUESTS = typer.Option(None, "--budget-requests", min=1, help="Send at most this many requests, retries included.")
TOKENS = typer.Option(None, "--budget-tokens", min=1, help="Use at most this many tokens, prompts and answers.")
MONEY = typer.Option(None, "--budget-money", help="Spend at most this much, at --price-in and --price-out.")
PRICE_IN = typer.Option("0", "--price-in", help="Price of a million prompt tokens.")
PRICE_OUT = typer.Option("0", "--price-out", help="Price of a million answer tokens.")
CONCURRENCY = typer.Option(8, "--concurrency", min=1, max=256, help="Requests at once; the rows are the same for any.")
TEMPERATURE = typer.Option(0.7, "--temperature", min=0, help="Of the model's sampling.")
MAX_TOKENS = typer.Option(1024, "--max-tokens", min=1, help="Longest answer.")
SEED = typer.Option(0, "--seed", help="Of what is shown to the model and which operators are used.")
DECONTAMINATE = typer.Option([], "--decontaminate", help="Evaluation set whose items no row may hold (repeatable).")


@generate_app.command("self-instruct")
def self_instruct(
    seeds: str = SEEDS, url: str = URL, model: str = MODEL, out: Path = OUT, api_key_env: str = KEY, rows: int = ROWS,
    budget_requests: int = REQUESTS, budget_tokens: int = TOKENS, budget_money: str = MONEY, price_in: str = PRICE_IN,
    price_out: str = PRICE_OUT, concurrency: int = CONCURRENCY, temperature: float = TEMPERATURE,
    max_tokens: int = MAX_TOKENS, seed: int = SEED, decontaminate: list[str] = DECONTAMINATE,
    novelty: float = typer.Option(0.7, "--novelty", help="Leave out instructions whose ROUGE-L with another is above."),
) -> None:  # fmt: skip
    """Self-Instruct: new tasks with instances, from a pool of seed tasks, filtered for novelty."""
    budget = _budget(rows, budget_requests, budget_tokens, budget_money, price_in, price_out)
    _generate(seeds, out, method="self-instruct", model=model, url=url, api_key_env=api_key_env, rows=rows,
              temperature=temperature, max_tokens=max_tokens, seed=seed, decontaminate=tuple(decontaminate),
              concurrency=concurrency, budget=budget, novelty=novelty)  # fmt: skip


@generate_app.command("evol-instruct")
def evol_instruct(
    seeds: str = SEEDS, url: str = URL, model: str = MODEL, out: Path = OUT, api_key_env: str = KEY, rows: int = ROWS,
    budget_requests: int = REQUESTS, budget_tokens: int = TOKENS, budget_money: str = MONEY, price_in: str = PRICE_IN,
    price_out: str = PRICE_OUT, concurrency: int = CONCURRENCY, temperature: float = TEMPERATURE,
    max_tokens: int = MAX_TOKENS, seed: int = SEED, decontaminate: list[str] = DECONTAMINATE,
    epochs: int = typer.Option(4, "--epochs", min=1, help="Times that every task is evolved."),
) -> None:  # fmt: skip
    """Evol-Instruct: tasks made harder or rarer, answered, and eliminated where that failed."""
    budget = _budget(rows, budget_requests, budget_tokens, budget_money, price_in, price_out)
    _generate(seeds, out, method="evol-instruct", model=model, url=url, api_key_env=api_key_env, rows=rows,
              temperature=temperature, max_tokens=max_tokens, seed=seed, decontaminate=tuple(decontaminate),
              concurrency=concurrency, budget=budget, epochs=epochs)  # fmt: skip


def _budget(
    rows: int | None, requests: int | None, tokens: int | None, money: str | None, price_in: str, price_out: str
) -> Any:
    from decimal import Decimal, InvalidOperation

    from soma.base.errors import UserError
    from soma.data.instruct.generate.settings import Budget

    if rows is None and requests is None and tokens is None and money is None:
        raise UserError("say how much: --budget-requests, --budget-tokens, --budget-money or --rows")
    try:
        prices = [Decimal(price_in), Decimal(price_out)]
        limit = None if money is None else Decimal(money)
    except InvalidOperation:
        raise UserError("--budget-money, --price-in and --price-out are numbers, such as 2.50") from None
    if money is not None and not any(prices):
        raise UserError("--budget-money needs --price-in and --price-out (for a million tokens)")
    return Budget(requests, tokens, limit, *prices)


def _generate(seeds: str, out: Path, **settings: Any) -> None:
    from soma.data.instruct.generate.output import generate
    from soma.data.instruct.generate.settings import Settings

    report = generate(seeds, Settings(**settings), out)
    spent = report["spent"]
    left_out = ", ".join(f"{count:,} {reason}" for reason, count in report["left_out"].items()) or "nothing"
    typer.echo(f"{out / 'rows.jsonl'}: {report['rows']:,} rows; left out: {left_out}")
    typer.echo(
        f"spent {spent['requests']:,} requests, {spent['tokens_in']:,} + {spent['tokens_out']:,} tokens, "
        f"{spent['money']}" + (" (the budget is used up)" if report["over_budget"] else "")
    )
