"""Draws every figure of a result folder from its tables alone."""

from collections.abc import Callable
from pathlib import Path

from matplotlib.figure import Figure

from figures.activity import activity_figure, share_figure
from figures.circuit_diff import circuit_diff_figure
from figures.interventions import joint_figure, rescue_figure
from figures.reversion import behaviour_figure, retention_figure
from figures.style import save
from figures.tables import read_table, read_tolerance


def draw_all(folder: Path) -> list[Path]:
    """Draw folder/figures/*.svg and *.png; equal tables give equal bytes.

    Seeds that failed a gate are left out, as in the verdicts, and every figure names them.

    Returns:
        The files written, in the order of the report.

    Raises:
        ValueError: one line naming the table, the column or the setting that cannot be used.
    """
    names = ("behaviour", "components", "retention", "joint", "rescue")
    gates = read_table(folder, "gates")
    failed = sorted(set(gates.loc[~gates["passed"].astype(bool), "seed"]))
    tables = (read_table(folder, name) for name in names)
    behaviour, components, retention, joint, rescue = (table[~table["seed"].isin(failed)] for table in tables)
    tolerance = read_tolerance(folder)
    figures: dict[str, Callable[[], Figure]] = {
        "circuit_diff": lambda: circuit_diff_figure(components, retention),
        "activity": lambda: activity_figure(components, tolerance),
        "share": lambda: share_figure(components, tolerance),
        "joint": lambda: joint_figure(joint, tolerance),
        "retention": lambda: retention_figure(retention, components),
        "behaviour": lambda: behaviour_figure(behaviour),
        "rescue": lambda: rescue_figure(rescue),
    }
    note = f"not drawn, for failing a gate: seed {', '.join(map(str, failed))}" if failed else ""
    return [path for stem, draw in figures.items() for path in save(draw(), folder / "figures", stem, note)]
