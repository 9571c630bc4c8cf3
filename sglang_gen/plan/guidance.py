"""Guidance in an interval of the steps (Kynkäänniemi et al. 2024): which steps are guided, and what cannot be."""

from sglang_gen.config.schema import Run
from sglang_gen.errors import UserError
from sglang_gen.types import ModelCard


def check(run: Run) -> None:
    """Raises UserError for an interval that is none, or that holds none of the run's steps."""
    interval = run.sampling.guidance_interval
    if interval is None:
        return
    if len(interval) != 2 or not 0 <= interval[0] < interval[1] <= 1:
        raise UserError(
            f"sampling.guidance_interval is {interval}; it must be two fractions of the steps, such as [0.2, 0.8]"
        )
    steps = run.sampling.num_inference_steps
    if not guided_steps(interval, steps):
        raise UserError(f"sampling.guidance_interval {interval} holds none of {steps} steps")


def warnings(run: Run, gave: bool, card: ModelCard) -> list[str]:
    """What there is to say of a guidance scale that the user `gave` and the model does not take."""
    network = card.components.get("transformer")
    if (
        gave
        and network
        and network.class_name == "FluxTransformer2DModel"
        and not network.config.get("guidance_embeds")
    ):
        return ["--guidance-scale has no effect: this model takes no guidance as an input (guidance_embeds)"]
    return []


def guided_steps(interval: list[float] | None, steps: int, skipped: int = 0) -> range:
    """Numbers of the steps that are guided, where step 0 is the first that is run: all where there is no interval.

    An interval is of all `steps` of the schedule, whatever number of them an input picture spares, so that it names
    the same noise levels.
    """
    first, stop = (0, steps) if interval is None else (round(fraction * steps) for fraction in interval)
    return range(max(first - skipped, 0), max(stop - skipped, 0))
