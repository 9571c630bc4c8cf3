"""A stand-in for CUDA graphs."""

import torch


class Repeated:
    """A recorder for a CPU. As with a real one nothing is computed before the first replay, and a replay overwrites."""

    made: list["Repeated"]

    def __init__(self) -> None:
        self.shapes, self.replays = [], 0
        self.made.append(self)

    def record(self, function):
        output = torch.full_like(function(), torch.nan)
        self.shapes.append(tuple(output.shape))

        def replay() -> None:
            self.replays += 1
            output.copy_(function())

        return output, replay
