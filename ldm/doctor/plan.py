"""What a training will take of a card: memory, work, and from an assumed share of the card's peak time and price."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ldm.doctor.finding import Finding
from ldm.errors import UserError
from ldm.training.cards import Card
from ldm.training.cost import TrainingCost, training_cost
from ldm.training.plan import Plan
from ldm.training.run import build_without_memory, describe, first_stage_problem, step_settings
from ldm.training.shares import Sharing

__all__ = ["Assumptions", "Duration", "examine_plan", "time_lines"]


@dataclass(frozen=True)
class Assumptions:
    """What time and price are reckoned with.

    Args:
        mfu: the share of the card's peak that a training reaches, above 0 to 1 (model FLOPs utilisation).
        tflops: the peak in TFLOP/s, None for that of the card's data sheet.
        price: of a card for an hour, in any currency; None for no price.
    """

    mfu: float
    tflops: float | None = None
    price: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.mfu <= 1:
            raise UserError(f"--mfu {self.mfu:g}: give a share of the peak, above 0 to 1, such as 0.2")
        for flag, value in (("--tflops", self.tflops), ("--price", self.price)):
            if value is not None and not 0 < value < float("inf"):
                raise UserError(f"{flag} {value:g}: give a positive number")


@dataclass(frozen=True)
class Duration:
    """Seconds of an optimiser step of `samples` on `cards`, and the number of steps, None where it is open."""

    seconds: float
    samples: int
    cards: int
    steps: int | None

    def lines(self, price: float | None = None) -> list[str]:
        """Describe it, and what it costs where a card has a price for an hour."""
        lines = [
            f"a step of {self.samples:,} samples: {self.seconds:.3g} s, {self.samples / self.seconds:.4g} samples/s"
        ]
        if self.steps is None:
            return [
                *lines,
                "no end: the config has no lightning.trainer.max_steps; give --max_steps for the whole time",
            ]
        hours = self.steps * self.seconds / 3600
        whole = f"{self.steps:,} steps: {hours:.4g} h on {self.cards}, {hours * self.cards:.4g} hours of a card"
        cost = (
            [] if price is None else [f"price: {hours * self.cards * price:,.2f}, at {price:g} for an hour of a card"]
        )
        return [*lines, whole, *cost]


def time_lines(plan: Plan, flops: int, card: Card, assumed: Assumptions) -> list[str]:
    """Return how long a training lasts whose steps of a device take so many FLOPs, and what is assumed for that."""
    precision = str(plan.lightning["trainer"].get("precision", 32))
    peak = assumed.tflops or card.peak(precision, plan.lightning.get("float32_matmul_precision"))
    if peak is None:
        return [f"not known: the peak of {card.name} in precision {precision}; give --tflops"]
    seconds = plan.batch.accumulate * flops / (peak * 1e12 * assumed.mfu)
    steps = plan.lightning["trainer"].get("max_steps")
    duration = Duration(seconds, plan.batch.total, plan.batch.processes, steps if steps and steps > 0 else None)
    said = f"assumed: {assumed.mfu:.0%} of {peak:g} TFLOP/s ({precision}); validation, data and exchange take no time"
    return [said, *duration.lines(assumed.price)]


def examine_plan(plan: Plan, card: Card, assumed: Assumptions) -> Iterator[Finding]:
    """Yield what is trained, what of the card it takes, and how long that lasts. Needs neither data nor devices.

    Raises UserError for a model that cannot be built.
    """
    model = build_without_memory(plan)
    stop = first_stage_problem(plan)
    yield Finding("What is trained", lines=[*describe(plan, model), *([f"it would not start: {stop}"] if stop else [])])
    try:
        sharing = Sharing.of(plan.strategy, plan.batch.processes)
        cost = training_cost(model, *step_settings(plan), card.memory, sharing)
    except UserError as error:
        yield Finding("Memory and work", lines=[f"not counted: {error}"])
        return
    yield Finding("Memory and work", lines=cost.lines(), problems=_too_large(plan, cost, card))
    yield Finding("Time and price", lines=time_lines(plan, cost.step.flops, card, assumed))


def _too_large(plan: Plan, cost: TrainingCost, card: Card) -> list[str]:
    fitting = 0 if cost.largest is None else cost.largest.batch
    if plan.batch.per_device <= fitting:
        return []
    remedy = f"set data.params.batch_size={fitting}" if fitting else "use a larger card, or checkpointing"
    more = f" and lightning.trainer.accumulate_grad_batches={-(-plan.batch.per_device // fitting)}" if fitting else ""
    return [f"{plan.batch.per_device} samples do not fit on {card.name}; {remedy}{more}"]
