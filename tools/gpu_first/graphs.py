"""Whether a CUDA graph of each network can be captured, and whether its replays are what an eager evaluation gives."""

import torch

from sglang_gen.engine.cuda_graphs import Graphs
from tools.bench import network_entries, works
from tools.gpu_first import network
from tools.gpu_first.sections import FAILED, Settings, SkippedError, table

TOLERANCE = 0.01  # of the largest number; kernels may be chosen anew for a capture


@torch.no_grad()
def compare(settings: Settings) -> str:
    """Replays with two different latents in turn, so that a buffer that is not refilled shows."""
    if not settings.gpu:
        raise SkippedError("a CPU has no CUDA graphs")
    rows = []
    for name, work in network.chosen(settings).items():
        model, condition, latents = network.drawn(work, settings)
        works.whole(work).parallelize(model)
        other = torch.randn_like(latents)
        conditioning = condition(model)
        expected = [model(each, conditioning, 0) for each in (latents, other)]
        captured = network_entries.sharing(model)
        Graphs(captured)
        for turn, index in enumerate((0, 1, 0)):
            replayed = captured((latents, other)[index], conditioning, 0)
            error = ((replayed - expected[index]).abs().max() / expected[index].abs().max()).item()
            same = "bitwise" if torch.equal(replayed, expected[index]) else f"to {error:.1e}"
            rows.append(
                (name, turn + 1, f"equal {same}" if error <= TOLERANCE else f"{FAILED}: differs by {error:.1e}")
            )
    return table(("network", "replay", "beside an eager evaluation"), rows)
