"""Machines beside each other on which a model is only run: what each costs, and how fast it answers there."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from ..core.foundation.json_results import INLINE
from ..planning.gpu_specs import GpuSpec
from ..planning.interval import Interval
from ..planning.plan_result import ServingEstimate
from .machine_choice import MachineOffer, find_limits_that_leave_none, make_machine_offer
from .run_cost import list_rent_prices

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

ServingLimit = Literal["memory", "price", "budget", "tokens_per_second"]
"""What leaves no machine to choose; "price": of those that fit no price is known."""


@dataclass(frozen=True)
class ServingOffer:
    """A machine that can be bought or rented, and how a model runs on it."""

    machine: MachineOffer = field(metadata=INLINE)
    """The machine."""
    serve: ServingEstimate
    """What the model takes there, and its speed."""
    rent_per_hour: Interval | None
    """Dollars; null: no rent is known."""

    @property
    def free_bytes(self) -> float:
        """Of the GPU's memory as sold, what the engine leaves at least."""
        return self.machine.memory_bytes - self.serve.need_bytes.high

    def get_dollars(self, *, by_rent: bool) -> Interval | None:
        """Return its price, or its rent of an hour."""
        return self.rent_per_hour if by_rent else self.machine.price


@dataclass(frozen=True)
class ServingChoiceResult:
    """What `choose --serve --json` prints."""

    model: str
    """The base."""
    buy: list[ServingOffer]
    """Machines to buy, the cheapest first."""
    rent: list[ServingOffer]
    """Machines to rent, the cheapest hour first."""
    binding_limits: dict[str, list[ServingLimit]]
    """Which limits leave none to "buy" or to "rent"."""
    considered: int
    """Machines that were asked about."""
    fitting: int
    """Those of them that surely have the memory."""


def make_serving_offers(
    config: "PreTrainedConfig", gpus: Iterable[GpuSpec], *, only_macbook: bool = False, **serving: Any
) -> Iterator[ServingOffer]:
    """Yield how a model runs on each GPU; `serving`: arguments of `estimate_serving_memory`."""
    from ..planning.serving_memory import build_served_model, estimate_serving_memory

    model = build_served_model(config)
    for gpu in gpus:
        hourly = [p.dollars_per_hour for p in list_rent_prices(gpu.name)]
        yield ServingOffer(
            machine=make_machine_offer(gpu, only_macbook=only_macbook),
            serve=estimate_serving_memory(config, gpu=gpu, model=model, **serving),
            rent_per_hour=Interval(min(hourly), max(hourly)) if hourly else None,
        )


def rank_serving_machines_by_price(
    offers: Iterable[ServingOffer],
    *,
    budget: float | None = None,
    min_tokens_per_second: float | None = None,
    by_rent: bool = False,
) -> list[ServingOffer]:
    """Return the machines that a model surely fits on and is surely fast enough on, by `make_price_rank`."""
    suited = []
    for offer in offers:
        dollars, speed = offer.get_dollars(by_rent=by_rent), offer.serve.decode_tokens_per_second
        if offer.serve.verdict != "fits" or speed is None or dollars is None:
            continue
        if speed.low >= (min_tokens_per_second or 0) and (budget is None or by_rent or dollars.high <= budget):
            rank = offer.machine.make_price_rank(dollars, offer.free_bytes, by_rent=by_rent)
            suited.append((rank, -speed.low, offer))
    return [offer for *_, offer in sorted(suited, key=lambda item: item[:2])]


def find_binding_serving_limits(
    offers: Sequence[ServingOffer], *, budget: float | None, min_tokens_per_second: float | None, by_rent: bool
) -> list[ServingLimit]:
    """Return which limits leave no machine, each alone or together; [] if one is left.

    The arguments are those of `rank_serving_machines_by_price`.
    """
    rank = partial(rank_serving_machines_by_price, offers, by_rent=by_rent)
    some_fit = any(offer.serve.verdict == "fits" for offer in offers)
    limits = {"budget": ("budget", budget), "tokens_per_second": ("min_tokens_per_second", min_tokens_per_second)}
    return find_limits_that_leave_none(rank, limits, some_fit)
