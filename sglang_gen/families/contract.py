"""What of a run the glue of a pipeline needs to know."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Request:
    """One batch: `height` and `width` in pixels, `factor` pixels per latent, `guidance` is --guidance-scale.

    `skipped` is how many of the steps an input picture spares; None: there is no picture. `watermark` is what the model
    says of an invisible one.
    """

    height: int
    width: int
    factor: int
    steps: int
    guidance: float
    text_length: int | None = None
    skipped: int | None = None
    watermark: bool | None = None

    @property
    def steps_run(self) -> int:
        return self.steps - (self.skipped or 0)

    @property
    def latent_size(self) -> tuple[int, int]:
        """Height and width of the latents."""
        return self.height // self.factor, self.width // self.factor
