"""The contract of a model family: the facts that the plan reads, with their defaults. Imports no torch.

A family is a folder with `spec.py`, which defines `SPEC`, and `pipeline.py`, which defines `PIPELINE`, a subclass of
`pipeline_contract.Pipeline`. `registry` finds it by its folder. A spec states what differs from the defaults here,
which are those of a transformer on patches that is trained by flow matching.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any

from sglang_gen.errors import UserError
from sglang_gen.types import TEXT_ENCODERS, ModelCard, Size

ComponentConfig = Mapping[str, Any]  # a component's config.json
Accepts = Callable[[Any], bool]  # whether the native engine supports a value of a config


@dataclass(frozen=True)
class Request:
    """Settings of one batch: `size` in pixels, `factor` pixels per latent, `guidance` (--guidance-scale).

    `skipped` is the number of steps that image-to-image skips; None without an input image. `watermark` is the model's
    `add_watermarker` and `boundary` its `boundary_ratio`; None if it is not set.
    """

    size: Size
    factor: int
    steps: int
    guidance: float
    text_length: int | None = None
    skipped: int | None = None
    watermark: bool | None = None
    boundary: float | None = None
    latent_frames: int = 1

    @property
    def steps_run(self) -> int:
        return self.steps - (self.skipped or 0)

    @property
    def latent_size(self) -> Size:
        """Height, width and frames of the latents."""
        return Size(self.size.height // self.factor, self.size.width // self.factor, self.latent_frames)


@dataclass(frozen=True)
class Limits:
    """Parallelism limits of a network at one image size."""

    heads: tuple[int, ...]  # distinct head counts of the attention layers
    channels: tuple[tuple[int, str], ...] = ()  # other sizes that tensor parallelism divides, with a description
    units: int = 1  # number of units that sequence parallelism distributes over ranks
    unit: str = "parts"  # name of these units


@dataclass(frozen=True)
class GuidanceKind:
    """Where a family's classifier-free guidance takes its scale from, and what a run without guidance is told.

    `input_setting` is the setting of the network's config that is true if --guidance-scale is an input of the network;
    then `true_cfg_scale` and a negative prompt request classifier-free guidance. None: --guidance-scale requests it.
    """

    unguided: str  # why there is no guidance; may contain {scale}
    ineffective_negative: str  # warning about a negative prompt without guidance; may contain {scale}
    input_setting: str | None = None

    @property
    def embedded(self) -> bool:
        """Whether --guidance-scale is an input of the network."""
        return self.input_setting is not None

    def scale(self, guidance: float, true_cfg: float, negative: bool) -> float:
        """Scale of classifier-free guidance; `negative`: there is a negative prompt. 1 or less: no guidance."""
        if not self.embedded:
            return guidance
        return true_cfg if negative else 1.0


CLASSIFIER_FREE = GuidanceKind(
    unguided="there is no guidance at a scale of {scale}",
    ineffective_negative="The negative prompt has no effect at a guidance scale of {scale}",
)
EMBEDDED = GuidanceKind(
    unguided="there is no guidance without a negative prompt and a true_cfg_scale above 1.0",
    ineffective_negative=(
        "The negative prompt has no effect at a true_cfg_scale of 1.0; raise it with "
        """--diffusers-kwargs '{{"true_cfg_scale": 4.0}}'"""
    ),
    input_setting="guidance_embeds",
)


@dataclass(frozen=True)
class Video:
    """Numbers of frames of a family that makes videos.

    `frames` is the default. The first frame is one latent frame, and so are every `step` frames after it.
    """

    frames: int
    step: int = 1

    def allows(self, frames: int) -> bool:
        return (frames - 1) % self.step == 0

    def latent_frames(self, frames: int) -> int:
        return 1 + (frames - 1) // self.step


def configured_size(config: ComponentConfig, factor: int) -> Size:
    """Default size of one frame in pixels, from the network's sample_size; `factor` pixels per latent.

    Raises UserError if the configuration has no sample_size.
    """
    side = config.get("sample_size")
    if not isinstance(side, int):
        raise UserError("The model's configuration has no default image size; give --height and --width")
    return Size(side * factor, side * factor)


def head_counts(counts: set[Any]) -> tuple[int, ...]:
    """The positive integers among `counts`, smallest first."""
    return tuple(sorted(count for count in counts if isinstance(count, int) and count > 0))


def configured_heads(config: ComponentConfig) -> tuple[int, ...]:
    """Distinct head counts of the attention layers, smallest first: those of a transformer."""
    return head_counts({config.get("num_attention_heads")})


def configured_head_widths(config: ComponentConfig) -> tuple[int, ...]:
    """Distinct numbers of channels of a head, smallest first: those of a transformer."""
    return head_counts({config.get("attention_head_dim")})


def no_channels(config: ComponentConfig) -> tuple[tuple[int, str], ...]:
    """Tensor parallelism divides only the heads of a transformer: its widths are multiples of their number."""
    return ()


def configured_patch(config: ComponentConfig) -> Any:
    return config.get("patch_size", 1)


def rows_of_patches(config: ComponentConfig, size: Size, factor: int) -> tuple[int, str]:
    return size.height // factor // config["patch_size"], "rows of patches"


def any_size(config: ComponentConfig) -> int | None:
    return None


@dataclass(frozen=True, kw_only=True, eq=False)
class Spec:
    """Facts about a model family. Its mappings are read-only too."""

    name: str  # of its folder in families/
    pipeline_class: str  # in model_index.json

    # Components: accepted classes by name (none: any class), and accepted settings of the denoising network's config.
    components: Mapping[str, tuple[str, ...]]
    settings: Mapping[str, Accepts]
    networks: tuple[str, ...] = ("transformer",)  # names of the denoising networks; a model may lack all but the first
    optional: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # all required if the model has the first
    file_prefixes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # of text encoders, in a single file
    converts_original: bool = False  # the family's `original.py` converts the authors' layout, instead of diffusers

    # Requests
    arguments: frozenset[str] = frozenset()  # keys of --diffusers-kwargs that the native engine supports
    guidance: GuidanceKind = CLASSIFIER_FREE
    strength: float = 0.6  # default noise strength of image-to-image
    keeps_image_size: bool = False  # an input image keeps its size; the requested size is ignored
    text_length: int | None = None  # default number of text tokens; None: the tokenizers' own length
    most_text_tokens: int | None = None  # largest sampling.max_sequence_length; None: the family does not take it
    text_masks: tuple[int, ...] = ()  # which outputs of `encode` are masks of padded texts; see `Pipeline.encode`
    zero_without_negative: bool = False  # default of force_zeros_for_empty_prompt in model_index.json

    # Scheduler
    scheduler_settings: Mapping[str, Any] = field(default_factory=dict)  # override outdated values of old configs
    schedulers: tuple[str, ...] = ()  # classes that sample every model of the family in any number of steps

    # Sizes: functions of the denoising network's config
    video: Video | None = None  # None: the family makes images
    default_size: Callable[[ComponentConfig, int], Size] = configured_size  # (config, factor) -> pixels of a frame
    patch: Callable[[ComponentConfig], Any] = configured_patch  # latents per token in each dimension
    packs_like: tuple[str, ...] = ()  # parts of class names of networks of diffusers with the same `patch`
    most_patches: Callable[[ComponentConfig], int | None] = any_size  # largest number of patches along a side

    skip_connections: Callable[[ComponentConfig], int] | None = None  # number of those of a UNet; None: a transformer

    # Parallelism: functions of the denoising network's config
    heads: Callable[[ComponentConfig], tuple[int, ...]] = configured_heads
    head_widths: Callable[[ComponentConfig], tuple[int, ...]] = configured_head_widths  # channels of a head
    channels: Callable[[ComponentConfig], tuple[tuple[int, str], ...]] = no_channels
    # (config, size in pixels, factor) -> number and name of the units that sequence parallelism distributes
    units: Callable[[ComponentConfig, Size, int], tuple[int, str]] = rows_of_patches

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, Mapping):
                object.__setattr__(self, each.name, MappingProxyType(dict(value)))

    @property
    def text_encoders(self) -> tuple[str, ...]:
        """Names of the text encoders, the optional ones included."""
        return tuple(name for name in TEXT_ENCODERS if name in self.components or name in self.optional)

    @property
    def network(self) -> str:
        """Name of the first denoising network, which every model of the family has."""
        return self.networks[0]

    @property
    def masks_text(self) -> bool:
        """Whether attention masks the padding of texts of unequal length, so that a kernel must take a mask."""
        return bool(self.text_masks)

    @property
    def network_classes(self) -> tuple[str, ...]:
        """Accepted classes of the denoising networks in diffusers."""
        return self.components[self.network]

    def networks_of(self, card: ModelCard) -> tuple[str, ...]:
        """Names of this model's denoising networks."""
        return tuple(name for name in self.networks if name in card.components)

    def tokens(self, length: int | None) -> int:
        """Number of text tokens: `length` (sampling.max_sequence_length) if it is given, else the family's default."""
        assert self.text_length is not None, f"{self.name} takes no length"
        return length or self.text_length

    def required(self, card: ModelCard) -> dict[str, tuple[str, ...]]:
        """The components that this model must have, with their accepted classes."""
        more = self.optional if any(name in card.components for name in [*self.optional][:1]) else {}
        return {**self.components, **more}

    def limits(self, config: ComponentConfig, size: Size, factor: int) -> Limits:
        """Parallelism limits at this size in pixels; `factor` pixels per latent."""
        return Limits(self.heads(config), self.channels(config), *self.units(config, size, factor))

    @property
    def makes(self) -> str:
        """Kind of the result, image or video; see `types.Decoded`."""
        return "image" if self.video is None else "video"

    @property
    def ineffective(self) -> dict[str, str]:
        """Config paths without effect, and what the pipeline does."""
        return dict.fromkeys(("sampling.num_frames", "output.fps"), "makes no video") if self.video is None else {}

    def latent_frames(self, size: Size) -> int:
        """Number of latent frames of a result of this size."""
        return 1 if self.video is None else self.video.latent_frames(size.frames)
