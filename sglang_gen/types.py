"""Immutable data types passed between the steps of a run."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    import torch

    from sglang_gen.backends.comm_log import CommLog
    from sglang_gen.config.schema import Run
    from sglang_gen.perf.clock import Clock


DENOISERS = ("transformer", "transformer_2", "unet")  # names of denoising networks in model_index.json
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4")


@dataclass(frozen=True)
class Component:
    """One entry of model_index.json: the class of a pipeline component and the folder that holds it."""

    library: str
    class_name: str
    folder: Path | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    file: Path | None = None  # its weights in one file (--component-paths); `folder` then holds its config alone


@dataclass(frozen=True)
class ModelCard:
    """Description of a model, available before any weight is loaded."""

    name: str  # as the user named it
    folder: Path | None  # local folder with weights; None if only the component configs are known
    pipeline_class: str
    components: Mapping[str, Component]
    settings: Mapping[str, Any] = field(default_factory=dict)  # the other entries of model_index.json
    file: Path | None = None  # single-file checkpoint of the whole model; `folder` then holds configs and tokenizers
    code: tuple[str, ...] = ()  # Python files of the repository that the pipeline would execute
    absent: tuple[str, ...] = ()  # components listed in model_index.json as [null, null]


@dataclass(frozen=True)
class Layout:
    """Degrees of the mesh axes, outermost axis first. Their product is the number of ranks."""

    dp: int = 1
    cfg: int = 1
    ring: int = 1
    ulysses: int = 1
    tp: int = 1

    @property
    def ranks(self) -> int:
        return self.dp * self.cfg * self.ring * self.ulysses * self.tp


@dataclass(frozen=True)
class Size:
    """Height and width, in pixels or in latents, and the number of frames; an image is one frame."""

    height: int
    width: int
    frames: int = 1


@dataclass(frozen=True)
class Sample:
    """One sample to generate. `index` counts over the whole run."""

    index: int
    prompt: str
    negative_prompt: str | None
    seed: int


@dataclass(frozen=True)
class Plan:
    """All decisions about a run, made before any weight is loaded. Later steps read neither flags nor config files."""

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
    matmul: str = "torch"  # library of float32 products of the native engine on a CPU: torch or onednn
    given: frozenset[str] = frozenset()  # config paths that the user set to a value other than the default
    stated_degrees: frozenset[str] = frozenset()  # fields of `parallel` set by the user or by a group option
    reference: str | None = None  # folder of the reference images that quality.reference=auto stands for

    @property
    def pipeline_class(self) -> str:
        """Name of the pipeline class: the one set in the run, else the one in model_index.json."""
        return self.run.model.pipeline_class_name or self.card.pipeline_class


@dataclass(frozen=True)
class Decoded:
    """Output of an engine for one batch."""

    frames: "np.ndarray[Any, Any]"  # image or video uint8 [B, F, H, W, 3], an image is F = 1; audio float [B, C, T]
    noise: "torch.Tensor | None" = None  # input of the first denoising step, in the pipeline's own layout
    latents: "torch.Tensor | None" = None  # input of the decoder, in the pipeline's own layout
    kind: str = "image"  # image, video or audio
    rate: int | None = None  # samples per second of audio
    effective: Mapping[str, Any] = field(default_factory=dict)  # effective settings that are specific to this batch

    def saved(self, row: int) -> "np.ndarray[Any, Any]":
        """What is saved of one sample: image uint8 [H, W, 3], video uint8 [F, H, W, 3] or audio float [C, T]."""
        sample: np.ndarray[Any, Any] = self.frames[row]
        return sample[0] if self.kind == "image" else sample


class Engine(Protocol):
    """Interface of a backend's engine, which turns a batch of samples into frames."""

    def sample(self, batch: tuple[Sample, ...], steps: int, clock: "Clock") -> Decoded | None:
        """The frames of a batch; None on ranks that do not decode."""
        ...

    def effective(self) -> dict[str, Any]:
        """The settings that take effect, the same whenever it is asked; a batch's own are in `Decoded.effective`."""
        ...

    def cache_trace(self) -> "list[dict[str, Any]] | None":
        """Decisions of the step cache in the timed generation, see `perf.cache_trace`; None without a step cache."""
        ...

    def block_timings(self) -> list[dict[str, Any]] | None:
        """`[{name, calls, mean_ms, total_ms}]` of the timed generation; None unless perf.blocks is set."""
        ...

    def named_blocks(self) -> AbstractContextManager[None]:
        """Context in which each block that runs on its own is a range of torch.profiler with the block's name."""
        ...

    def traffic(self) -> "CommLog":
        """What this rank sent to others in the timed generation."""
        ...

    def close(self) -> None:
        """Undo changes to global state made by this engine."""
        ...


@dataclass(frozen=True)
class Result:
    """Result of a run: `frames[i]` is saved in `paths[i]`, see `Decoded.saved`; `report` is the perf dump as a dict."""

    paths: tuple[Path, ...]
    frames: tuple["np.ndarray[Any, Any]", ...]
    seeds: tuple[int, ...]
    report: dict[str, Any]
