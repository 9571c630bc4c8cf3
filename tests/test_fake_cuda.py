"""The fake GPU of tests/lib/fake_cuda: what it notes, and what it leaves behind."""

import pytest
import torch
from fake_cuda import fake_cuda, guard

pytestmark = [
    pytest.mark.whole,  # compiles the guard
    pytest.mark.skipif(guard.compiler() is None, reason="the device guard of the fake GPU needs a C++ compiler"),
]


def on_gpu(function) -> list[str]:
    """Reasons of the waits of a function of a tensor `[4]` on the fake GPU."""
    with fake_cuda() as gpu:
        function(torch.arange(4.0, device="cuda"))
    return sorted(note.reason for note in gpu.notes if note.kind == "wait")


@pytest.mark.parametrize(
    ("function", "reasons"),
    [
        (lambda x: x.sum().item(), ["reads values of the GPU"]),
        (lambda x: bool((x > 0).all()), ["reads values of the GPU"]),
        (lambda x: x.nonzero(), ["reads values of the GPU"]),
        (lambda x: x[x > 1], ["counts the elements of a mask"]),
        (lambda x: x[torch.tensor([0, 2])], ["copies an index to the GPU"]),
        (lambda x: x.to("cpu", non_blocking=True), ["copies cuda to cpu"]),
        (lambda x: torch.tensor([1.0, 2.0], device="cuda"), ["copies cpu to cuda"]),
        (lambda x: torch.ones(4).to("cuda", non_blocking=True), ["copies cpu to cuda from pageable memory"]),
        (lambda x: torch.ones(4).pin_memory().to("cuda", non_blocking=True), []),
        (lambda x: x.copy_(torch.ones(4)), ["copies cpu to cuda"]),
        (lambda x: (x * 2 + torch.tensor(3.0)).relu_()[1:], []),
    ],
)
def test_the_fake_gpu_notes_what_a_gpu_waits_for(function, reasons):
    assert on_gpu(function) == reasons


@pytest.mark.parametrize(
    ("function", "found"),
    [
        (lambda x: x + torch.ones(4), True),
        (lambda x: torch.cat([x, torch.ones(1)]), True),
        (lambda x: x[None] @ torch.ones(4, 1), True),
        (lambda x: torch.stack([x[0], torch.tensor(1.0)]), True),
        (lambda x: x * torch.tensor(2.0), False),
        (lambda x: torch.where(x > 1, x, torch.tensor(0.0)), False),
        (lambda x: x.to("cpu") + torch.ones(4), False),
    ],
)
def test_the_fake_gpu_notes_tensors_of_two_devices(function, found):
    with fake_cuda() as gpu:
        function(torch.arange(4.0, device="cuda"))
    assert bool(gpu.of("device")) == found


def test_a_fake_gpu_leaves_the_process_without_one():
    with fake_cuda():
        assert torch.zeros(1, device="cuda").is_cuda
    assert not torch.cuda.is_available()
    assert torch.cuda.device_count() == 0
    assert not torch.__future__.get_overwrite_module_params_on_conversion()


def test_the_data_of_a_tensor_moves_between_the_devices():
    with fake_cuda():
        weight = torch.nn.Parameter(torch.ones(2), requires_grad=False)
        host = weight.data
        weight.data = host.to("cuda")
        assert (weight.is_cuda, type(weight.data.cpu())) == (True, torch.Tensor)
        weight.data = host
        assert not weight.is_cuda
        assert isinstance(weight, torch.nn.Parameter)
