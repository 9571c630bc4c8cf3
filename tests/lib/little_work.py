"""Work for the benchmarks that takes no time."""

import contextlib

from tools.bench import works

SPEC, BENCHMARK = works.BENCHMARKS["dit"]
LITTLE = works.Work(
    "little", SPEC, BENCHMARK.config
    | {
        "in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 32, "num_attention_heads": 2,
        "joint_attention_dim": 32, "pooled_projection_dim": 32, "axes_dims_rope": (8, 12, 12),
    },
    batch=1, tokens=5, size=4,
)  # fmt: skip


class Uncompiled:
    """Blocks that are left as they are."""

    limited = staticmethod(contextlib.nullcontext)

    def __init__(self, *_: object) -> None: ...

    def expect(self, _: object) -> None: ...
