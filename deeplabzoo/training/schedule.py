"""Learning rate schedules: functions of the step alone, so that they have no state to save."""

import bisect
import math
from dataclasses import dataclass
from typing import Literal

from deeplabzoo.errors import UsageError

ScheduleKind = Literal["poly", "cosine", "step", "constant"]
SCHEDULES: tuple[ScheduleKind, ...] = ("poly", "cosine", "step", "constant")


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A learning rate schedule over `steps` steps.

    >>> Schedule(kind="poly", lr=0.01, steps=100)(50) == 0.01 * 0.5**0.9
    True
    """

    kind: ScheduleKind
    lr: float
    steps: int
    power: float = 0.9
    """Of `poly`: lr x (1 - step / steps)^power (DeepLabV3, section 4.1)."""
    milestones: tuple[float, ...] = (0.5, 0.75)
    """Of `step`: the shares of the steps after which the learning rate is multiplied by `gamma`."""
    gamma: float = 0.1
    floor: float = 0.0
    """Of `poly` and `cosine`: lower limit, as a share of `lr`."""
    warmup_steps: int = 0
    """The learning rate rises linearly over so many first steps, from `warmup_from` x lr; the schedule starts at step 0."""
    warmup_from: float = 0.1

    def __post_init__(self) -> None:
        if self.kind not in SCHEDULES:
            raise UsageError(f"Unknown schedule {self.kind!r}; expected one of {', '.join(SCHEDULES)}.")
        if self.steps < 1 or self.lr < 0 or self.warmup_steps < 0:
            values = f"{self.steps!r}, {self.lr!r}, {self.warmup_steps!r}"
            raise UsageError(f"A schedule needs steps >= 1, lr >= 0 and warmup_steps >= 0, not {values}.")

    def __call__(self, step: int) -> float:
        """Return the learning rate of `step`, counted from 0."""
        done = min(step / self.steps, 1.0)
        if self.kind == "poly":
            factor = max(float((1 - done) ** self.power), self.floor)
        elif self.kind == "cosine":
            factor = self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * done))
        elif self.kind == "step":
            factor = float(self.gamma ** bisect.bisect_right(self.milestones, done))
        else:
            factor = 1.0
        if step < self.warmup_steps:
            factor *= self.warmup_from + (1 - self.warmup_from) * step / self.warmup_steps
        return self.lr * factor


@dataclass(frozen=True)
class PhasedSchedule:
    """Consecutive schedules, each counting its steps from 0: e.g. 65 epochs at 1e-2, then 5 at 1e-3."""

    schedules: tuple[Schedule, ...]

    @property
    def steps(self) -> int:
        """Length of all phases together."""
        return sum(schedule.steps for schedule in self.schedules)

    def at(self, step: int) -> tuple[int, int]:
        """Return (number of the phase, step within it); past the end it is the last phase."""
        for number, schedule in enumerate(self.schedules[:-1]):
            if step < schedule.steps:
                return number, step
            step -= schedule.steps
        return len(self.schedules) - 1, step

    def __call__(self, step: int) -> float:
        """Return the learning rate of `step` of the whole run."""
        number, within = self.at(step)
        return self.schedules[number](within)
