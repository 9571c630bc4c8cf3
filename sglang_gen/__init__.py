"""sglang-gen: one command and a research harness for fast diffusion inference."""

from sglang_gen import signals

if signals.is_command():  # before the other imports, which take a tenth of a second
    signals.leave_quietly()

from sglang_gen import env
from sglang_gen.generate import generate
from sglang_gen.types import Result

__all__ = ["Result", "__version__", "generate"]
__version__ = env.VERSION
