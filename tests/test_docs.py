"""What the pages say is what the stored verdicts say."""

from pathlib import Path

from experiments.compared import primary, side_by_side, verdicts_of

ROOT = Path(__file__).parents[1]
BLOCKS = {
    "seeds 32 to 43": ROOT / "docs/default/verdicts.json",
    "seeds 64 to 75": ROOT / "docs/default/verdicts-second-block.json",
}


def test_a_real_model_stands_beside_the_toy_as_it_was_measured():
    sides = {
        "the toy, seeds 32 to 43": BLOCKS["seeds 32 to 43"],
        "SmolLM2-135M, seeds 0 to 2": ROOT / "docs/smollm/verdicts.json",
    }
    listed = {name: primary(verdicts_of(path)) for name, path in sides.items()}
    assert side_by_side(listed, "intervals") in (ROOT / "docs/smollm.md").read_text()


def test_the_primary_family_of_both_blocks_stands_as_it_was_measured():
    table = side_by_side({block: primary(verdicts_of(path)) for block, path in BLOCKS.items()})
    assert table in (ROOT / "docs/findings.md").read_text()
