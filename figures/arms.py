"""Arms of a study: their order, their names, and a grid of panels with one for each."""

from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from figures.style import EXPOSURE_LABEL, GRID, REGIMES, STEP_LABEL, ordered

MOST_COLUMNS = 5
TITLE_WIDTH = 27  # letters
# Panels share one exposure axis, so that they can be compared, unless that would squeeze one to a sliver.
MOST_SQUEEZE = 6


@dataclass(frozen=True)
class Arm:
    """One regime at one strength of decay."""

    regime: str
    optimizer: str
    lr: float
    weight_decay: float
    decay_target: str

    @property
    def decays(self) -> bool:
        """Whether exposure grows; otherwise the arm is drawn against steps."""
        return self.weight_decay > 0


ARM_COLUMNS = [field.name for field in fields(Arm)]


def arms_of(table: pd.DataFrame) -> list[Arm]:
    """Distinct arms: by regime, those without decay first, decay to zero before other targets, weak to strong."""
    found = [Arm(*row) for row in table[ARM_COLUMNS].drop_duplicates().itertuples(index=False, name=None)]
    regimes = ordered((arm.regime for arm in found), REGIMES)
    return sorted(
        found,
        key=lambda arm: (
            regimes.index(arm.regime),
            arm.decays,
            arm.decay_target != "zero",
            arm.lr * arm.weight_decay,
            *map(str, astuple(arm)),
        ),
    )


def rows_of(table: pd.DataFrame, arm: Arm) -> pd.DataFrame:
    """The rows of one arm."""
    keep = np.ones(len(table), dtype=bool)
    for column in ARM_COLUMNS:
        keep &= (table[column] == getattr(arm, column)).to_numpy(dtype=bool, na_value=False)
    return table[keep]


def arm_label(arm: Arm, among: Sequence[Arm]) -> str:
    """The name that verdicts give an arm, such as `sft, wd 4, to base`; what goes without saying is left out.

    Args:
        among: the arms it is shown with; its lr is named where its regime has several.
    """
    parts = [arm.regime, f"wd {arm.weight_decay:g}"]
    if arm.decays and arm.decay_target != "zero":
        parts.append(f"to {arm.decay_target}")
    if arm.optimizer != "adamw":
        parts.append(arm.optimizer)
    if len({other.lr for other in among if other.regime == arm.regime}) > 1:
        parts.append(f"lr {arm.lr:g}")
    return ", ".join(parts)


def x_column(arm: Arm) -> str:
    """The column an arm is drawn against: exposure, or step where exposure never grows."""
    return "exposure" if arm.decays else "step"


def arm_panels(table: pd.DataFrame, y_label: str) -> tuple[Figure, list[tuple[Arm, Axes]]]:
    """A figure with one titled panel for each arm; a regime starts a new row.

    Args:
        table: rows with the arm's columns, `step` and `exposure`; must not be empty.
    """
    arms = arms_of(table)
    cells = _cells(arms)
    n_rows, n_columns = max(row for row, _ in cells) + 1, max(column for _, column in cells) + 1
    figure = Figure(figsize=(max(8.6, 1.9 * n_columns + 0.5), 1.85 * n_rows + 0.8), layout="constrained")
    grid = figure.subplots(n_rows, n_columns, sharey=True, squeeze=False)
    for axes in grid.flat:
        axes.set_visible(False)
    limits = _limits(table, arms)
    panels = []
    for arm, (row, column) in zip(arms, cells, strict=True):
        axes = grid[row, column]
        axes.set_visible(True)
        axes.set_title(_title(arm_label(arm, arms)), loc="left")
        axes.set_xlabel(EXPOSURE_LABEL if arm.decays else STEP_LABEL, fontsize=8)
        axes.set_xlim(0, limits[arm])
        axes.locator_params(axis="x", nbins=4)
        axes.grid(**GRID)
        if column == 0:
            axes.set_ylabel(y_label)
        panels.append((arm, axes))
    return figure, panels


def _title(label: str) -> str:
    """A label that is too long for one line is broken after a comma."""
    lines = [""]
    for part in label.split(", "):
        fits = not lines[-1] or len(lines[-1]) + len(part) < TITLE_WIDTH
        lines = [*lines[:-1], f"{lines[-1]}, {part}".removeprefix(", ")] if fits else [*lines, part]
    return "\n".join(lines)


def _cells(arms: Sequence[Arm]) -> list[tuple[int, int]]:
    """Row and column of each arm."""
    cells: list[tuple[int, int]] = []
    for before, arm in zip([None, *arms], arms, strict=False):
        row, column = cells[-1] if cells else (0, -1)
        wraps = column + 1 == MOST_COLUMNS or (before is not None and before.regime != arm.regime)
        cells.append((row + 1, 0) if wraps else (row, column + 1))
    return cells


def _limits(table: pd.DataFrame, arms: Sequence[Arm]) -> dict[Arm, float]:
    """Right end of every arm's x-axis: shared by arms that are drawn against the same thing, where that reads well."""
    ends = {arm: float(rows_of(table, arm)[x_column(arm)].max()) for arm in arms}
    ends = {arm: end if end > 0 else 1.0 for arm, end in ends.items()}
    limits = {}
    for arm, end in ends.items():
        peers = [other_end for other, other_end in ends.items() if other.decays == arm.decays]
        limits[arm] = 1.02 * (max(peers) if max(peers) <= MOST_SQUEEZE * min(peers) else end)
    return limits
