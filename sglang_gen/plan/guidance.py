"""Guidance in an interval of the steps (Kynkäänniemi et al. 2024), and checks of the guidance settings."""

from sglang_gen.config.schema import Run
from sglang_gen.errors import UserError
from sglang_gen.families import registry
from sglang_gen.types import DENOISERS, ModelCard


def check_interval(run: Run) -> None:
    """Raises UserError for an invalid guidance interval, or one that contains no step of the run."""
    interval = run.sampling.guidance_interval
    if interval is None:
        return
    if len(interval) != 2 or not 0 <= interval[0] < interval[1] <= 1:
        raise UserError(
            f"sampling.guidance_interval is {interval}; it must be two fractions of the steps, such as [0.2, 0.8]"
        )
    steps = run.sampling.num_inference_steps
    if not guided_steps(interval, steps):
        raise UserError(f"sampling.guidance_interval {interval} contains none of the {steps} steps")


def warnings(run: Run, gave: bool, card: ModelCard) -> list[str]:
    """Warns about a guidance scale that the user `gave` if the model does not take one."""
    network = card.components.get(DENOISERS[0])
    spec = registry.by_network_class(network.class_name) if gave and network else None
    setting = spec.guidance.input_setting if spec else None
    if network and setting and not network.config.get(setting):
        return [f"--guidance-scale has no effect: this model takes no guidance as an input ({setting})"]
    return []


def guided_steps(interval: list[float] | None, steps: int, skipped: int = 0) -> range:
    """Indices of the guided steps, counted from the first step that is run; all steps without an interval.

    The interval refers to all `steps` of the schedule, including the first `skipped` ones that an input image replaces,
    so that it always denotes the same noise levels.
    """
    first, stop = (0, steps) if interval is None else (round(fraction * steps) for fraction in interval)
    return range(max(first - skipped, 0), max(stop - skipped, 0))
