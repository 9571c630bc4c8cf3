"""When DBCache reuses a step: warm-up, mask, limits and thresholds, in the order in which cache-dit asks for them."""

from dataclasses import dataclass, field

ALWAYS = 1.0  # a threshold from which on any change is small enough


@dataclass(frozen=True)
class Rules:
    """The settings of `conf/cache` that decide. `mask` has a 1 for each step that is computed."""

    threshold: float
    accumulated: float | None = None  # largest sum of the changes of a generation
    warmup: int = 0
    warmup_interval: int = 1
    mask: tuple[int, ...] | None = None
    static: bool = False  # whether every 0 of the mask is reused
    most: int = -1  # reused steps; -1 for no limit
    most_in_a_row: int = -1

    @property
    def always_computed(self) -> range:
        """Steps of the warm-up. With a mask it ends at the first step that may be reused."""
        ones = self.warmup
        if self.mask is not None:
            ones = next((step for step, entry in enumerate(self.mask) if not entry), len(self.mask))
        return range(0, min(self.warmup, ones), self.warmup_interval)

    @property
    def dynamic(self) -> bool:
        """Whether a change of the residual decides about any step."""
        return not (self.static and self.mask is not None)


@dataclass
class Decider:
    """Decides for one image and guidance branch, or for an image with both, over the steps of a generation."""

    rules: Rules
    reused: list[int] = field(default_factory=list)
    in_a_row: int = 0
    changes: float = 0.0  # sum of the changes that were compared
    last: int | None = None  # the last step that was decided

    def begin(self, step: int) -> None:
        """Start a step; to be called once for each step, in order."""
        if not self.reused or self.reused[-1] != self.last:
            self.in_a_row = 0
        self.last = step

    def without_residual(self, step: int) -> bool | None:
        """Whether the step is reused, where its residual does not matter; None where it does."""
        rules = self.rules
        if step in rules.always_computed:
            return False
        if rules.mask is not None:
            if step < len(rules.mask) and rules.mask[step]:
                return False
            if rules.static:
                return True
        if 0 <= rules.most <= len(self.reused) or 0 <= rules.most_in_a_row <= self.in_a_row:
            return False
        if rules.accumulated and self.changes >= rules.accumulated:
            return False
        if rules.threshold <= 0:
            return False
        return True if rules.threshold >= ALWAYS else None

    def with_residual(self, change: float) -> bool:
        """Whether a step is reused whose residual has this relative change; one that is not finite never is."""
        if change > 0:
            self.changes += change
        return change < self.rules.threshold

    def reuse(self, step: int) -> None:
        """Count a step that is reused."""
        self.reused.append(step)
        self.in_a_row += 1
