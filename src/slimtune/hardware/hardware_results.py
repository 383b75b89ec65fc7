"""What `slimtune plan`, `gpus`, `choose` and `cost` print as JSON, beside the estimates and offers themselves."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ..core.foundation.formatting import format_count, format_duration
from ..core.foundation.json_results import INLINE
from ..core.training.default_learning_rate import describe_far_learning_rate
from ..planning.gpu_specs import GpuFacts
from ..planning.interval import Interval
from ..planning.measured_speeds import MachineMeasurement
from ..planning.plan_result import LabelledFigure, MemoryVerdict, ResourceEstimate, ServingEstimate
from .machine_choice import BindingLimit, BreakEven, MachineOffer, TuningServicePrice
from .run_cost import RunCost

MILLION = 1_000_000
"""Tokens of a run whose rows are not known."""


def describe_training_amount(training_tokens: int) -> str:
    """Return what is trained, as text: a million tokens stand for a run whose rows are not known."""
    return "a million tokens" if training_tokens == MILLION else f"the run, {format_count(training_tokens)} tokens"


@dataclass(frozen=True)
class PlannedRunCost:
    """What the tokens of a planned run take."""

    tokens: int
    """Trained in the whole run; a million if the rows are not known."""
    run: RunCost = field(metadata=INLINE)
    """Time, energy and money."""


@dataclass(frozen=True)
class PlannedRun:
    """A planned run: what it takes on a GPU, and its cost."""

    estimate: ResourceEstimate = field(metadata=INLINE)
    """Memory, sizes and speed."""
    cost: PlannedRunCost | None
    """Time, energy and money; null if the speed is unknown."""
    learning_rate: float | None
    """Highest learning rate, the default one as training takes it; null: it depends on rows that are not known."""
    default_learning_rate: float | None
    """The learning rate that training takes by itself; null: it depends on rows that are not known."""
    smaller_base: str | None = None
    """A dense base with which the run fits; null: the run fits or a change makes it fit, or none was found."""

    def lines(self) -> Iterator[tuple[str, str]]:
        """Yield the answer as label and text, the notes last; "" is the label of the verdict's reason."""
        yield from self.estimate.lines()
        if self.smaller_base is not None:
            yield "smaller base", f"{self.smaller_base} fits, with the same settings"
        if self.cost is not None and self.estimate.verdict != "does not fit":
            name, hours = describe_training_amount(self.cost.tokens), self.cost.run.hours
            name += "" if self.cost.tokens == MILLION else ","
            text = f"{name} in {(hours * 3600).format(format_duration)}"
            yield "time", ", ".join(filter(None, (text, self.cost.run.format_rent())))
        if self.learning_rate and self.default_learning_rate:
            far = describe_far_learning_rate(self.learning_rate, self.default_learning_rate)
            yield from [("note", far)] if far else ()
        yield from (("note", note) for note in self.estimate.notes)

    def list_figures(self, *, unified_memory: bool) -> Iterator[LabelledFigure]:
        """Yield the sizes of the run, its time, energy and rent."""
        yield from self.estimate.list_run_figures(unified_memory=unified_memory)
        if self.cost is None or self.estimate.verdict == "does not fit":
            return
        run = self.cost.run
        yield LabelledFigure(
            describe_training_amount(self.cost.tokens), (run.hours * 3600).format(format_duration), "cost"
        )
        if run.kwh is not None:
            yield LabelledFigure("", run.kwh.format("{:.2g} kWh".format), "cost")
        if run.rent is not None:
            yield LabelledFigure("", run.rent.format("{:.2g} $".format), "rent")


@dataclass(frozen=True)
class UnplannedMethod:
    """A method whose run could not be planned."""

    method: str
    """Its name."""
    why: str
    """The reason, in one line."""


@dataclass(frozen=True)
class UnplannedGpus:
    """GPUs that a run could not be planned on, though it could on others."""

    group: str
    """What they have in common."""
    cards: list[str]
    """Their names."""
    why: str
    """The reason, in one line."""

    def __str__(self) -> str:
        return f"{len(self.cards)} {self.group} are left out: {self.why}"


@dataclass(frozen=True)
class PlanDetails:
    """What every answer of `slimtune plan --json` has."""

    plans: list[PlannedRun]
    """The run of each method."""
    unfit: list[UnplannedMethod]
    """The methods that could not be planned."""
    serve: ServingEstimate | None
    """What serving the tuned model takes; null without --serve."""
    serve_error: str | None
    """Why serving could not be planned."""
    plot: Path | None
    """The file with the bars; null without --plot."""
    recipe: Path | None
    """The recipe that was written; null without --write."""


@dataclass(frozen=True)
class PlanResult:
    """What `plan --json` prints for one run."""

    run: PlannedRun = field(metadata=INLINE)
    """The run, also the only item of `plans`."""
    details: PlanDetails = field(metadata=INLINE)
    """Everything else."""


@dataclass(frozen=True)
class MethodPlansResult:
    """What `plan --json` prints for several methods."""

    model: str
    """The base."""
    card: str
    """The GPU's name."""
    details: PlanDetails = field(metadata=INLINE)
    """The plans."""


@dataclass(frozen=True)
class GpusResult:
    """What `gpus --json` prints."""

    cards: list[GpuFacts]
    """The GPUs."""


@dataclass(frozen=True)
class GpuWithVerdict:
    """A GPU, and whether a run fits on it."""

    facts: GpuFacts = field(metadata=INLINE)
    """Of the GPU."""
    verdict: MemoryVerdict
    """Whether the run fits."""
    need_bytes: Interval
    """Bytes that the run needs on it."""


@dataclass(frozen=True)
class GpuVerdictsResult:
    """What `slimtune gpus --for MODEL --json` prints."""

    model: str
    """The base."""
    smallest: str | None
    """The GPU with the least memory on which the run surely fits; null: none."""
    plans: list[ResourceEstimate]
    """The run on the smallest GPU of each kind."""
    cards: list[GpuWithVerdict]
    """The GPUs that slimtune trains on, the smallest first."""
    unplanned: list[UnplannedGpus]
    """Those that the run cannot be planned on."""


@dataclass(frozen=True)
class GpuComparisonResult:
    """What `slimtune gpus GPU GPU --json` prints."""

    model: str | None
    """The base; null if no run is asked about."""
    tokens: int | None
    """Of the run; a million if the rows are not known."""
    machines: list[MachineOffer]
    """The machines, in the order that was given."""


@dataclass(frozen=True)
class FittingOffer:
    """A machine that the run fits on."""

    offer: MachineOffer = field(metadata=INLINE)
    """The machine."""
    reason: str
    """Its price and the time of the run."""


@dataclass(frozen=True)
class ChooseResult:
    """What `choose --json` prints."""

    model: str
    """The base."""
    tokens: int
    """Of the run; a million if the rows are not known."""
    here: MachineOffer | None
    """This machine, if it was measured."""
    need_bytes: dict[str, Interval]
    """Bytes that the run needs, by the largest GPU of each kind."""
    buy: list[FittingOffer]
    """Machines to buy, the cheapest first."""
    rent: list[FittingOffer]
    """Machines to rent, the cheapest run first."""
    binding_limits: dict[str, list[BindingLimit]]
    """Which limits leave none to "buy" or to "rent": memory, price (none is known), budget, hours."""
    unplanned: list[UnplannedGpus]
    """Machines that the run cannot be planned on."""


@dataclass(frozen=True)
class BenchResult:
    """What `bench --json` prints."""

    measurement: MachineMeasurement = field(metadata=INLINE)
    """The speeds of this machine."""
    file: Path
    """Where the measurement is stored."""
    row: dict[str, str]
    """The measurement by the columns of the table of GPUs."""


@dataclass(frozen=True)
class PurchaseCost:
    """What a run costs on a machine that is bought."""

    dollars: Interval | None
    """Price of the machine; null: not known."""
    run: Interval | None
    """Dollars of a run's electricity; null: its power is not known."""


@dataclass(frozen=True)
class RentalProviderCost:
    """What a run costs on a machine that is rented."""

    name: str
    """Who rents it out."""
    run: Interval
    """Dollars of a run."""


@dataclass(frozen=True)
class TuningServiceCost:
    """What a run costs at a service that fine-tunes."""

    price: TuningServicePrice = field(metadata=INLINE)
    """The service and its price."""
    run: float
    """Dollars of a run."""


@dataclass(frozen=True)
class CostResult:
    """What `cost --json` prints."""

    model: str
    """The base."""
    tokens: int
    """Of the run; a million if the rows are not known."""
    machine: MachineOffer
    """The machine to buy or to rent."""
    buy: PurchaseCost
    """The run on it if it is bought."""
    rent: list[RentalProviderCost]
    """The run on it if it is rented."""
    services: list[TuningServiceCost]
    """The run at services that fine-tune."""
    runs_to_break_even: BreakEven | None
    """Runs after which buying is cheaper than the cheapest rent; null: never, or a price is not known."""
    runs_in_a_month: int
    """As given."""
