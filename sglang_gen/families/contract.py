"""Run settings that a family's pipeline needs."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Request:
    """Settings of one batch: `height` and `width` in pixels, `factor` pixels per latent, `guidance` (--guidance-scale).

    `skipped` is the number of steps that image-to-image skips; None without an input image. `watermark` is the model's
    `add_watermarker`; None if it is not set.
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
