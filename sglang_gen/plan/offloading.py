"""Checks of the group offload: contradictory settings, and settings without effect on a CPU."""

from sglang_gen.config.schema import Run
from sglang_gen.errors import UserError


def asked(run: Run) -> list[str]:
    """Names of the offload options that are enabled."""
    return [name for name, value in vars(run.offload).items() if value is True]


def check_offloading(run: Run) -> None:
    """Raises UserError for contradictory options."""
    if run.offload.disk_path and not run.offload.dit_layerwise_offload:
        raise UserError("offload.disk_path is the folder of layerwise offloading; add --dit-layerwise-offload")
    if run.offload.dit_cpu_offload and run.offload.dit_layerwise_offload:
        raise UserError("--dit-cpu-offload and --dit-layerwise-offload exclude each other; give one")


def warnings(run: Run, device: str) -> list[str]:
    """Warns that offloading has no effect on a CPU."""
    idle = asked(run) if device == "cpu" else []
    return [f"{', '.join(idle)}: no effect, the run computes on the CPU"] if idle else []
