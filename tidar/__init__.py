"""Command line: one command per stage of the pipeline.

    tidar quickstart                     the whole pipeline on this machine
    tidar import SOURCE FOLDER           a GGUF file or a dual-mode model of others
    tidar answers | pack | train | evaluate | publish JOB.yaml
    tidar models [NAME]                  registered versions
    tidar promote NAME VERSION           and rollback NAME
    tidar generate | bench | profile | serve MODEL

MODEL is a folder or URI of a bundle or of an AR checkpoint, or models:/NAME@ALIAS. With --json, standard output holds
one JSON object and nothing else; progress goes to standard error. Exit codes: 0 done, 2 wrong input (one line names the
fault), 1 anything else.
"""

import os
import sys
from typing import NoReturn

import typer
from typer.exceptions import TyperException

from tidar import demonstration, importing, inference, registry, stages
from tidar.output import note
from tidar_core.artifacts.network.loopback import exempt_loopback
from tidar_core.errors import TidarError, UserError

__all__ = ["app", "main"]

COMMANDS = (
    demonstration.quickstart,
    importing.import_,
    stages.answers,
    stages.pack,
    stages.train,
    stages.evaluate,
    stages.publish,
    registry.models,
    registry.promote,
    registry.rollback,
    inference.generate,
    inference.bench,
    inference.profile,
    inference.serve,
)
"""Functions of the commands, in the order of the help text. A command has the name of its function, without a trailing
underscore."""

app = typer.Typer(
    help="Train, evaluate and serve TiDAR models: think in diffusion, talk in autoregression.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in COMMANDS:
    app.command(command.__name__.removesuffix("_"))(command)


def main() -> None:
    """Run the command line; wrong input ends in one line and exit code 2, never in a traceback."""
    exempt_loopback()
    try:
        sys.exit(app(standalone_mode=False) or 0)
    except TidarError as error:
        _exit(str(error), 2 if isinstance(error, UserError) else 1)
    except (KeyboardInterrupt, typer.Abort):
        _exit("stopped", 1)
    except OSError as error:  # e.g. a full disk or a folder without rights, anywhere
        if error.errno is None:
            raise
        where = f"{error.filename}: " if error.filename else ""
        _exit(f"{where}{os.strerror(error.errno)}; check the path, its rights and the room there", 1)
    except TyperException as error:  # an unknown option, a value out of range
        _exit(error.format_message() or "see tidar --help", 2)


def _exit(message: str, code: int) -> NoReturn:
    """Print one line and exit."""
    note(f"tidar: {' '.join(message.split())}")
    sys.exit(code)
