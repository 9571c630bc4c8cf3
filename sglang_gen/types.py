"""The frozen values that pass between the steps of a run."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    import torch

    from sglang_gen.config.schema import Run
    from sglang_gen.perf.clock import Clock


DENOISERS = ("transformer", "transformer_2", "unet")  # components that denoise, by name
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4")


@dataclass(frozen=True)
class Component:
    """One entry of model_index.json: the class of a pipeline component and the folder that holds it."""

    library: str
    class_name: str
    folder: Path | None = None
    config: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelCard:
    """What is known of a model before a weight is loaded."""

    name: str  # as the user named it
    folder: Path | None  # local folder with weights; None where only the component configs are known
    pipeline_class: str
    components: Mapping[str, Component]
    settings: Mapping[str, Any] = field(default_factory=dict)  # the other entries of model_index.json
    file: Path | None = None  # a whole model in one file; `folder` then holds configs and tokenizers
    code: tuple[str, ...] = ()  # files of the repository that its pipeline wants to run
    absent: tuple[str, ...] = ()  # components that model_index.json names as [null, null]


@dataclass(frozen=True)
class Layout:
    """Degrees of the mesh axes, outermost first. Their product is the number of ranks."""

    dp: int = 1
    cfg: int = 1
    ring: int = 1
    ulysses: int = 1
    tp: int = 1

    @property
    def ranks(self) -> int:
        return self.dp * self.cfg * self.ring * self.ulysses * self.tp


@dataclass(frozen=True)
class Sample:
    """One picture to make. `index` counts over the whole run."""

    index: int
    prompt: str
    negative_prompt: str | None
    seed: int


@dataclass(frozen=True)
class Plan:
    """Everything that was decided before a weight is loaded. Nothing below the plan reads a source or a flag."""

    run: "Run"
    sources: Mapping[str, str]
    card: ModelCard
    layout: Layout
    backend: str
    device: str
    dtype: str
    batches: tuple[tuple[Sample, ...], ...]
    requested: Mapping[str, Any]
    effective: Mapping[str, Any]
    warnings: tuple[str, ...] = ()
    notices: tuple[str, ...] = ()
    here: int = 1  # ranks on this machine
    given: frozenset[str] = frozenset()  # config paths where the user asked for something else than the default
    stated_degrees: frozenset[str] = frozenset()  # of the group `parallel`, by the user or the file of an option

    @property
    def pipeline_class(self) -> str:
        """Name of the pipeline's class: what the run asks for, otherwise what the model says."""
        return self.run.model.pipeline_class_name or self.card.pipeline_class


@dataclass(frozen=True)
class Decoded:
    """What an engine makes of one batch."""

    frames: "np.ndarray[Any, Any]"  # image uint8 [B, H, W, 3]; video uint8 [B, F, H, W, 3]; audio float [B, C, T]
    noise: "torch.Tensor | None" = None  # what the first step starts from, in the pipeline's own layout
    latents: "torch.Tensor | None" = None  # what is decoded, in the pipeline's own layout
    kind: str = "image"  # image, video or audio
    rate: int | None = None  # samples per second of audio
    effective: Mapping[str, Any] = field(default_factory=dict)  # of what took effect, what this batch has of its own


class Engine(Protocol):
    """What a backend builds: something that turns a batch of samples into frames."""

    def sample(self, batch: tuple[Sample, ...], steps: int, clock: "Clock") -> Decoded | None:
        """The frames of a batch; None on ranks that leave decoding to another."""
        ...

    def effective(self) -> dict[str, Any]:
        """What took effect, read back from the built components."""
        ...

    def cache_decisions(self) -> dict[str, Any] | None:
        """What a step cache did in the last generation; None without one."""
        ...

    def traffic(self) -> dict[str, Any]:
        """What this rank sent to others in the timed generation, by stage; see `backends.native.comm_log`."""
        ...

    def close(self) -> None:
        """Undo whatever reaches beyond this engine."""
        ...


@dataclass(frozen=True)
class Result:
    """What a run leaves behind: `paths[i]` holds `frames[i]`, and `report` is the perf dump as a dict."""

    paths: tuple[Path, ...]
    frames: tuple["np.ndarray[Any, Any]", ...]
    seeds: tuple[int, ...]
    report: dict[str, Any]
