"""sglang-gen: a research harness and one command for fast diffusion inference."""

from sglang_gen.generate import generate
from sglang_gen.types import Result

__all__ = ["Result", "generate"]
__version__ = "0.1.0"
