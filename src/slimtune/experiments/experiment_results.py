"""What `slimtune compare --json` and `slimtune tune --json` print, and `compare.json` and `tune.json` contain."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from ..core.foundation.json_results import INLINE
from ..evaluation.estimate import Estimate

Cost = Literal["memory", "size", "time"]
"""What a method costs: peak memory, size of its file, time of its training."""
COSTS: tuple[Cost, ...] = get_args(Cost)


# --- compare ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class MethodPreferences:
    """How often and by how much a method's runs prefer the chosen answers of pairs, over seeds and pairs."""

    base_accuracy: float
    """Share of the pairs in which the base gives the chosen answer the higher log p, 0 to 1."""
    tuned_accuracy: float
    """The same of the tuned models."""
    accuracy_gain: Estimate
    """Tuned models minus base."""
    base_margin: float
    """Mean of log p(chosen) - log p(rejected) by the base, in nats per pair."""
    tuned_margin: float
    """The same by the tuned models."""
    margin_gain: Estimate
    """Tuned models minus base."""


@dataclass(frozen=True, kw_only=True)
class ComparedMethod:
    """The finished runs of one method, or of one objective; means are over its seeds."""

    method: str
    """Name, as the user typed it."""
    of: str
    """The method's name in the registry."""
    settings: dict[str, Any]
    """The method's settings, as in a recipe."""
    task: dict[str, Any] | None
    """The objective, as in a recipe; null: the recipe's."""
    rate: float | Literal["auto"]
    """Learning rate."""
    rate_from: Literal["default", "given", "tuned"]
    """Where the learning rate is from."""
    seeds: Sequence[int]
    """Seeds whose runs are finished."""
    ranked: bool
    """Whether the runs of all seeds are finished; else the method is compared with no other."""
    steps: int
    """Optimizer steps of a run."""
    trained_tokens: Sequence[int]
    """Tokens that each run was trained on."""
    trainable_params: int
    """Parameters that are trained."""
    total_params: int
    """Parameters of the model with its adapter."""
    trained_percent: float
    """Share of the parameters that are trained, in per cent."""
    file_bytes: int
    """Size of the adapter file."""
    peak_bytes: float
    """Peak memory, mean."""
    train_seconds: float
    """Time of the training steps by the clock, mean."""
    time_seconds: float
    """Time that methods are compared by: of the clock, on a CPU the processor's, which other work disturbs less."""
    tokens_per_second: float
    """Trained tokens per second, mean."""
    base_loss: float
    """Loss of the base on the test rows, in nats per supervised token."""
    tuned_loss: float
    """Loss of the tuned models on the test rows, mean, in nats per supervised token."""
    loss_reduction: Estimate
    """Base minus tuned models, over seeds and rows, in nats per supervised token."""
    loss_reduction_by_seed: Sequence[float]
    """The loss reduction of each run."""
    loss_reduction_sd_seeds: float | None
    """Standard deviation of the loss reduction between seeds; null: there is one seed."""
    oom_events: int
    """How often memory ran out, over all runs."""
    skipped_steps: int
    """Steps with NaN or Inf, over all runs."""
    dtype: str
    """Dtype of the base's weights."""
    device: str
    """Device that the runs trained on."""
    front: Sequence[Cost] = ()
    """Costs for which no other method gains more at the same cost or less."""
    preference: MethodPreferences | None = field(default=None, metadata=INLINE)

    @property
    def gain(self) -> Estimate:
        """How much better than the base it is: what ranks methods."""
        return self.loss_reduction if self.preference is None else self.preference.accuracy_gain

    @property
    def gain_name(self) -> str:
        """What `gain` is called."""
        return "loss reduction" if self.preference is None else "accuracy gain"

    @property
    def gain_unit(self) -> str:
        """The unit of `gain`."""
        return "nats per token" if self.preference is None else "of the pairs"

    def get_cost(self, cost: Cost) -> float:
        """Return a cost, in bytes or seconds."""
        return {"memory": self.peak_bytes, "size": self.file_bytes, "time": self.time_seconds}[cost]


@dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """The difference of the gains of two methods, paired by seed and row."""

    a: str
    """A method."""
    b: str
    """Another method."""
    seeds: Sequence[int]
    """Seeds that both have."""
    difference: float
    """Gain of a minus gain of b; above 0, a is better."""
    ci95: tuple[float, float]
    """95 % interval of the difference."""
    p: float
    """P-value of no difference."""
    p_corrected: float
    """The same with Holm's correction for the number of pairs."""
    beyond_noise: bool
    """Whether the corrected p-value is below 0.05, over two seeds or more."""


@dataclass(frozen=True, kw_only=True)
class LeftOutMethod:
    """A method that was not trained."""

    method: str
    """Name of the method."""
    why: str
    """Why it does not fit."""


@dataclass(frozen=True, kw_only=True)
class FailedRun:
    """A run, or a search, that failed."""

    method: str
    """Name of the method."""
    seed: int | None
    """Seed of the run; null: the search of the method's learning rate failed."""
    why: str
    """Message of the error."""


@dataclass(frozen=True, kw_only=True)
class LearningRateTrial:
    """A learning rate that was tried."""

    rate: float
    """Learning rate."""
    loss: float | None
    """Lowest validation loss; null: it was stopped early, or was not finite."""
    pruned: bool
    """Whether it was stopped early."""


@dataclass(frozen=True, kw_only=True)
class LearningRateSearch:
    """The search of a method's learning rate."""

    rate: float
    """The learning rate with the lowest validation loss."""
    at_the_edge: bool
    """Whether it lies within a tenth of the searched range from an end."""
    trials: Sequence[LearningRateTrial]
    """All that were tried, in their order."""


@dataclass(frozen=True, kw_only=True)
class CompareResult:
    """What `compare --json` prints."""

    output_dir: str
    """Folder of the comparison."""
    model: str
    """The base."""
    dtype: str | None
    """Dtype of the base's weights; null: no run is finished."""
    device: str | None
    """Device that the runs trained on; null: no run is finished."""
    tokens: int | None
    """Trained tokens of a run that were asked for; null: the length of the recipe."""
    steps: int
    """Optimizer steps of a run."""
    seeds: Sequence[int]
    """Seeds of each method."""
    at_once: int
    """Runs of a method that trained at the same time in one process."""
    rows: int
    """Test rows."""
    test_tokens: int
    """Supervised tokens of the test rows."""
    base_loss: float | None
    """Loss of the base on them, in nats per supervised token; null: no run is finished."""
    methods: Sequence[ComparedMethod]
    """The methods with a finished run, the best first, those that are not ranked last."""
    pairs: Sequence[PairedDifference]
    """The difference of every two ranked methods."""
    advice: str
    """Which method to take, in one sentence."""
    on: str | None
    """Where runs trained at the same time, as `--on` says it; null: here, one after another."""
    searched: dict[str, LearningRateSearch]
    """The searches of learning rates by method."""
    left_out: Sequence[LeftOutMethod]
    """Methods that were not trained."""
    failed: Sequence[FailedRun]
    """Runs and searches that failed."""
    seconds: float
    """Time of the command."""


# --- tune ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class TrialResult:
    """One trial of a search."""

    run: str
    """Name of its run folder."""
    values: dict[str, Any]
    """Value of each searched setting."""
    outcome: Literal["complete", "pruned", "failed"]
    """How it ended."""
    loss: float | None
    """Validation loss of the adapter that it keeps, in nats per supervised token; null unless it is complete."""
    seconds: float | None
    """Time that it took; null: unknown."""
    why: str
    """Why it failed; empty if it did not."""


@dataclass(frozen=True, kw_only=True)
class TuneResult:
    """What `tune --json` prints."""

    output_dir: str
    """Folder of the search."""
    model: str
    """The base."""
    over: dict[str, str]
    """Searched range of each setting."""
    validation_rows: int
    """Validation rows that the losses are of."""
    trials: Sequence[TrialResult]
    """The trials, in the order in which they were begun."""
    best: TrialResult
    """The trial with the lowest loss."""
    recipe_loss: float | None
    """Loss of the recipe's own values; null: they were not tried."""
    at_the_edge: Sequence[str]
    """Settings whose best value lies at an end of its range."""
    best_recipe: str
    """Recipe file of the best trial."""
    seconds: float
    """Time of the command."""
