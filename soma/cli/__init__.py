"""The command `soma`. Thin: it parses, calls one function of a room, prints. Heavy imports wait inside the commands."""

import errno
import os
import sys

import typer

from soma.base.disk import full
from soma.base.errors import UserError
from soma.base.parent import end_with_parent
from soma.cli import (
    acts,
    annotation,
    embeddings,
    features,
    feedback,
    gateway,
    graphs,
    models,
    profiles,
    prompts,
    recipes,
    retrieval,
    schedules,
    sweeps,
    tokenizers,
    training,
    upkeep,
    upstreams,
)

# Mistakes about paths, not ours: no right to write there, a read-only disk, a file where a folder should be …
NOT_OURS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG)

INTERRUPTED = 130  # exit status after Ctrl-C


def _version(asked: bool) -> None:
    if asked:
        import soma

        typer.echo(f"soma {soma.__version__}")
        raise typer.Exit


app = typer.Typer(
    name="soma",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Raw text in, a trained, measured and served language model out.",
)


@app.callback()
def _options(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version and exit."
    ),
) -> None:
    """Options of the command itself."""


app.command("run")(recipes.run)
app.add_typer(recipes.recipe_app, name="recipe")
app.command("train")(training.train)
app.command("adapt")(recipes.adapt)
app.command("sweep")(sweeps.sweep)
app.command("chat")(models.chat)
app.command("serve")(models.serve)
app.command("gateway")(upstreams.gateway)
app.command("generate")(models.generate)
app.command("index")(retrieval.index)
app.command("search")(retrieval.search)
app.command("schedule")(schedules.schedule)
app.command("doctor")(upkeep.doctor)
annotation.data_app.command("report")(profiles.report)
annotation.data_app.command("schema")(profiles.schema)
app.add_typer(acts.data_app, name="data")
app.add_typer(feedback.feedback_app, name="feedback")
app.add_typer(tokenizers.tokenizer_app, name="tokenizer")
app.add_typer(embeddings.model_app, name="model")
app.add_typer(graphs.graph_app, name="graph")
app.add_typer(gateway.keys_app, name="keys")
app.add_typer(gateway.ledger_app, name="ledger")
app.add_typer(features.features_app, name="features")
app.add_typer(prompts.prompt_app, name="prompt")
app.add_typer(upkeep.runs_app, name="runs")
app.add_typer(upkeep.cache_app, name="cache")


def main() -> None:
    """Entry point: a person's mistake is one clear message and exit status 2, never a traceback."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent()  # torchrun, which ends its ranks unless it is killed with -9
    try:
        app()
    except UserError as error:
        fail(str(error), 2)
    except SystemExit as end:
        if end.code == INTERRUPTED:  # typer has caught KeyboardInterrupt, and ends without a word
            from soma.train.parallel.launch import launched

            other = ", unless another rank has named a mistake" if launched() else ""  # torchrun ends us for it
            fail(f"interrupted; the same command goes on from here{other}", INTERRUPTED)
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.filename and error.errno in NOT_OURS:
            fail(f"{error.filename}: {(error.strerror or '').lower()}; choose another path, or mend this one", 2)
        if (said := full(error)) is None:
            raise
        where = f" while writing {said.filename}" if isinstance(said, OSError) and said.filename else ""
        fail(
            f"the disk is full{where}; nothing finished is lost. Free some space (`soma runs prune`) and run it again",
            1,
        )


def fail(message: str, status: int) -> None:
    """Print an error to standard error and exit."""
    typer.echo(f"soma: {message}", err=True)
    sys.exit(status)
