"""CUDA graphs of a denoising network: an evaluation is recorded once for each shape of its inputs, then replayed.

A replay launches all kernels of an evaluation at once, from and to the addresses of the recording, so inputs are copied
to buffers that stay and the result is copied out of one.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sglang_gen.errors import RunError, first_line, is_out_of_memory
from sglang_gen.tensor_tree import mapped, tensors

Evaluate = Callable[[Tensor, Any], Tensor]  # (latents [B, ...], conditioning of one step) -> prediction of their shape
WARMUP = 3  # evaluations before a recording: they choose algorithms, compile and fill workspaces, which it cannot
REFUSED = "compile.cuda_graphs: this network cannot be captured into a CUDA graph"


class Recorder:
    """The device's part. Its graphs share one pool of memory, since no two of them ever run at once."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()

    def record(self, function: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        """What holds the function's result after each replay, and the replay. The function computes on the GPU alone.

        Raises RunError where it does anything that a graph cannot hold, such as waiting for a number.
        """
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARMUP):
                function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            here = torch.cuda.stream(torch.cuda.current_stream())  # to which a capture that fails does not come back
            with here, torch.cuda.graph(graph, pool=self.pool):
                output = function()
        except RuntimeError as error:
            failure = _first_failure(error)
            if is_out_of_memory(failure):
                raise failure from None
            raise RunError(f"{REFUSED} ({first_line(failure)}); leave it out") from error
        return output, graph.replay


def _first_failure(error: BaseException) -> BaseException:
    """The end of a capture that failed fails too; what it was about stands behind that."""
    while error.__context__ is not None:
        error = error.__context__
    return error


class Captured:
    """A recorded evaluation and its buffers."""

    def __init__(self, evaluate: Evaluate, latents: Tensor, conditioning: Any, recorder: Recorder) -> None:
        inputs = mapped(torch.clone, (latents, conditioning))
        self.buffers = tensors(inputs)
        self.sources: list[Any] = [None] * len(self.buffers)  # what each holds a copy of; None: of nobody knows what
        self.output, self.replay = recorder.record(lambda: evaluate(*inputs))

    def __call__(self, given: list[Tensor]) -> Tensor:
        """The evaluation with these tensors in place of those that it was recorded with, all of the same shapes."""
        changed = [index for index, tensor in enumerate(given) if not _is_in(self.sources[index], tensor)]
        if changed:
            torch._foreach_copy_([self.buffers[index] for index in changed], [given[index] for index in changed])
        for index in changed:
            self.sources[index] = _state(given[index])
        self.replay()
        return self.output.clone()  # guidance and schedulers read it after the next replay


def _state(tensor: Tensor) -> tuple[Any, int, int]:
    """The tensor (not kept alive by this), where its numbers are, and how often they have been changed in place."""
    return weakref.ref(tensor), tensor.data_ptr(), tensor._version


def _is_in(source: tuple[Any, int, int] | None, tensor: Tensor) -> bool:
    """Whether a buffer that was filled from `source` holds the numbers of this very tensor."""
    return source is not None and source[0]() is tensor and source[1:] == (tensor.data_ptr(), tensor._version)


class Graphs:
    """A network's `evaluate`, out of a graph for each shape of its inputs.

    What all steps share (text, rotary tables) is the same object in each of them and is copied once a generation.
    """

    def __init__(self, network: Any) -> None:
        """Takes the place of `evaluate`, compiled or not."""
        self.evaluate: Evaluate = network.evaluate
        self.recorder = Recorder()
        self.captured: dict[Any, Captured] = {}
        network.evaluate = self

    def __call__(self, latents: Tensor, conditioning: Any) -> Tensor:
        """Raises RunError for an evaluation that cannot be captured."""
        given = tensors((latents, conditioning))
        shapes = tuple((tensor.shape, tensor.dtype) for tensor in given)
        if shapes not in self.captured:
            self.captured[shapes] = Captured(self.evaluate, latents, conditioning, self.recorder)
        return self.captured[shapes](given)
