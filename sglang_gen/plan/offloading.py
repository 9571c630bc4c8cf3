"""Settings of the group offload that contradict, and those that a CPU leaves without effect."""

from sglang_gen.config.schema import Run
from sglang_gen.errors import UserError


def asked(run: Run) -> list[str]:
    """The components that are to wait elsewhere, by option."""
    return [name for name, value in vars(run.offload).items() if value is True]


def check(run: Run) -> None:
    """Raises UserError for two options that contradict."""
    if run.offload.disk_path and not run.offload.dit_layerwise_offload:
        raise UserError("offload.disk_path holds what layerwise offloading streams; add --dit-layerwise-offload")
    if run.offload.dit_cpu_offload and run.offload.dit_layerwise_offload:
        raise UserError("--dit-cpu-offload and --dit-layerwise-offload exclude each other; give one")


def warnings(run: Run, device: str) -> list[str]:
    """On a CPU there is nowhere to offload from."""
    idle = asked(run) if device == "cpu" else []
    return [f"{', '.join(idle)}: no effect, the run computes on the CPU"] if idle else []
