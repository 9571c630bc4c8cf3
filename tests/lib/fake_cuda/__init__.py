"""A GPU that is not there: tensors that say they are on "cuda" and hold their values on the CPU.

Every operator that a GPU would refuse, and every operator that would make the host wait for the GPU, is noted with the
stage of the run and the line that called it.
"""

from fake_cuda.device import FakeCuda, Note, fake_cuda

__all__ = ["FakeCuda", "Note", "fake_cuda"]
