"""Interleaved timing and the statistics of ratios. No framework is imported here."""

import dataclasses
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol


class Contestant(Protocol):
    """A compiled optimizer with its own parameters, gradients and state."""

    def place(self) -> None:
        """Makes parameters, gradients and state anew, somewhere else in memory."""

    def run(self, steps: int) -> float:
        """Takes steps, waits for their end, and returns the seconds that passed."""
        ...


@dataclasses.dataclass(frozen=True)
class Plan:
    """How much is measured: `placements` of the buffers, and `rounds` at each.

    A sample is as many steps as last `sample` seconds.
    """

    placements: int = 6
    rounds: int = 5
    sample: float = 0.02


@dataclasses.dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> 'Spread':
        low, median, high = statistics.quantiles(values, n=4, method='inclusive')
        return cls(median, low, high)

    def __str__(self) -> str:
        return f'{self.median:.2f} [{self.low:.2f}, {self.high:.2f}]'


def stopwatch(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def interleave(contestants: Mapping[str, Contestant], plan: Plan) -> dict[str, list[float]]:
    """Seconds a step of each contestant, one number a round.

    In every round each is measured once, in an order drawn anew, so that a disturbance of the
    machine meets all alike; ratios are to be taken within a round. Where the allocator happens to
    put the buffers changes times by a tenth and more, so they are placed several times.
    """
    order = random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(plan.placements):
        steps = {}
        for name in order.sample(list(contestants), len(contestants)):
            contestants[name].place()
            contestants[name].run(1)
            steps[name] = max(1, round(plan.sample / contestants[name].run(2) * 2))
        for _ in range(plan.rounds):
            for name in order.sample(list(contestants), len(contestants)):
                seconds[name].append(contestants[name].run(steps[name]) / steps[name])
    return seconds


def ratios(seconds: Mapping[str, Sequence[float]], base: str) -> dict[str, Spread]:
    """Each contestant's time over that of `base`, round by round."""
    return {
        name: Spread.of([x / y for x, y in zip(values, seconds[base], strict=True)])
        for name, values in seconds.items()
        if name != base
    }


def verdict(ours: Spread, floor: Spread, target: float = 1.0) -> str:
    """Whether a ratio meets its target, given that of the baseline with itself."""
    if ours.median <= target:
        return 'met'
    return 'within noise' if ours.low <= target * floor.high else 'missed'
