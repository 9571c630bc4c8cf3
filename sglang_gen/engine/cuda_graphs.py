"""CUDA graphs of a denoising network: an evaluation is captured once for each input shape, then replayed.

A replay launches all kernels of an evaluation at once, on the addresses of the capture. Inputs are therefore copied to
static buffers, and the result is copied out of one.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sglang_gen.engine.caching.cached_chain import PlannedChain
from sglang_gen.errors import RunError, in_our_words, is_out_of_memory
from sglang_gen.tensor_tree import mapped, tensors

Evaluate = Callable[[Tensor, Any], Any]  # (latents [B, ...], other inputs) -> nested tensors
WARMUP = 3  # evaluations before a capture, for autotuning, compilation and workspaces, which cannot be captured
REFUSED = "compile.cuda_graphs: this network cannot be captured into a CUDA graph"


class Recorder:
    """Captures functions on the device. The graphs share one memory pool, because they never run concurrently."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()

    def record(self, function: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        """Capture `function`, which computes only on the GPU; returns its static outputs and the replay function.

        Raises RunError if the function does something that cannot be captured, such as a synchronization.
        """
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARMUP):
                function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            here = torch.cuda.stream(torch.cuda.current_stream())  # a failed capture does not restore the stream
            with here, torch.cuda.graph(graph, pool=self.pool):
                output = function()
        except RuntimeError as error:
            failure = _first_failure(error)
            if is_out_of_memory(failure):
                raise failure from None
            raise RunError(f"{REFUSED} ({in_our_words(failure)}); leave it out") from error
        return output, graph.replay


def _first_failure(error: BaseException) -> BaseException:
    """The original error: ending a failed capture raises a second one, which has the first as its context."""
    while error.__context__ is not None:
        error = error.__context__
    return error


class Captured:
    """A captured evaluation and its static buffers."""

    def __init__(self, evaluate: Evaluate, latents: Tensor, others: Any, recorder: Recorder) -> None:
        inputs = mapped(torch.clone, (latents, others))
        self.buffers = tensors(inputs)
        self.sources: list[Any] = [None] * len(self.buffers)  # state of the tensor last copied to each; None: unknown
        self.output, self.replay = recorder.record(lambda: evaluate(*inputs))

    def __call__(self, given: list[Tensor]) -> Any:
        """Replay the evaluation with these tensors, of the same shapes as the captured ones."""
        changed = [index for index, tensor in enumerate(given) if not _is_in(self.sources[index], tensor)]
        if changed:
            torch._foreach_copy_([self.buffers[index] for index in changed], [given[index] for index in changed])
        for index in changed:
            self.sources[index] = _state(given[index])
        self.replay()
        return mapped(torch.clone, self.output)  # guidance and schedulers still read it after the next replay


def _state(tensor: Tensor) -> tuple[Any, int, int]:
    """A weak reference to the tensor, its address, and its version counter."""
    return weakref.ref(tensor), tensor.data_ptr(), tensor._version


def _is_in(source: tuple[Any, int, int] | None, tensor: Tensor) -> bool:
    """Whether a buffer that was filled from `source` still holds the values of `tensor`."""
    return source is not None and source[0]() is tensor and source[1:] == (tensor.data_ptr(), tensor._version)


class Graphs:
    """Replaces a network's `evaluate` by one CUDA graph for each shape of its inputs.

    Inputs shared by all steps (text, rotary tables) are the same object in each step and are copied once a generation.
    What a step cache adds is an input too, and what it computes an output: there is one graph with and one without.
    """

    def __init__(self, network: Any, cache: PlannedChain | None = None) -> None:
        """Replaces `network.evaluate`, which may be compiled; `cache` is the network's chain of blocks."""
        self.network_evaluate: Any = network.evaluate
        self.cache = cache
        self.recorder = Recorder()
        self.captured: dict[Any, Captured] = {}
        network.evaluate = self

    def __call__(self, latents: Tensor, conditioning: Any) -> Tensor:
        """Raises RunError for an evaluation that cannot be captured."""
        inputs = (conditioning, self.cache.added if self.cache else None)
        given = tensors((latents, inputs))
        key = (self.cache.form if self.cache else None, *((tensor.shape, tensor.dtype) for tensor in given))
        if key not in self.captured:
            self.captured[key] = Captured(self._evaluate, latents, inputs, self.recorder)
        prediction, computed = self.captured[key](given)
        if self.cache is not None:
            self.cache.computed = computed
        return prediction  # type: ignore[no-any-return]

    def _evaluate(self, latents: Tensor, inputs: tuple[Any, Any]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The prediction, and what the cache computed."""
        conditioning, added = inputs
        if self.cache is None:
            return self.network_evaluate(latents, conditioning), ()
        self.cache.added, self.cache.computed = added, ()
        return self.network_evaluate(latents, conditioning), self.cache.computed
