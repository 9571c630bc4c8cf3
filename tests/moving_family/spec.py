"""Facts about the videos of the tests."""

from sglang_gen.families.accepted import ANY, CLIP, VAE, number
from sglang_gen.families.contract import ComponentConfig, Spec, Video
from sglang_gen.types import Size

NETWORK = ("MovingTransformer",)


def default_size(config: ComponentConfig, factor: int) -> Size:
    return Size(8 * factor, 12 * factor)


def tokens(config: ComponentConfig, size: Size, factor: int) -> tuple[int, str]:
    return (size.height // factor) * (size.width // factor), "tokens of a frame"


SPEC = Spec(
    name="moving",
    pipeline_class="MovingPipeline",
    networks=("transformer", "transformer_2"),
    components={"transformer": NETWORK, "vae": VAE, "scheduler": ANY, "text_encoder": CLIP, "tokenizer": ANY},
    optional={"transformer_2": NETWORK},
    settings=dict.fromkeys(
        ("in_channels", "num_layers", "num_attention_heads", "attention_head_dim", "text_width"), number
    ),
    video=Video(frames=5, step=2),
    default_size=default_size,
    units=tokens,
)
