"""Checks of the group offload: contradictory settings, and settings without effect on a CPU."""

from sglang_gen.config.schema import Run
from sglang_gen.errors import UserError
from sglang_gen.types import ModelCard

OFFLOADING = ("cuda",)  # devices whose memory is not the host's


def asked(run: Run) -> list[str]:
    """Names of the offload options that are enabled."""
    return [name for name, value in vars(run.offload).items() if value is True]


def active(run: Run, device: str) -> list[str]:
    """Names of the enabled options that have an effect on this device."""
    return asked(run) if device in OFFLOADING else []


def effective(run: Run, device: str, card: ModelCard) -> list[str]:
    """Names of the options that have an effect on this model, which may have no image encoder."""
    there = "image_encoder" in card.components
    return [name for name in active(run, device) if there or name != "image_encoder_cpu_offload"]


def check_offloading(run: Run) -> None:
    """Raises UserError for contradictory options."""
    if run.offload.disk_path and not run.offload.dit_layerwise_offload:
        raise UserError("offload.disk_path is the folder of layerwise offloading; add --dit-layerwise-offload")
    if run.offload.dit_cpu_offload and run.offload.dit_layerwise_offload:
        raise UserError("--dit-cpu-offload and --dit-layerwise-offload exclude each other; give one")
    if run.offload.dit_cpu_offload and run.compile.cuda_graphs:
        raise UserError(
            "--dit-cpu-offload moves the denoising network to other addresses in each generation, and "
            "compile.cuda_graphs replays those of its capture; give one of them"
        )


def warnings(run: Run, device: str) -> list[str]:
    """Warns that offloading has no effect on a CPU."""
    idle = [] if device in OFFLOADING else asked(run)
    return [f"{', '.join(idle)}: no effect, the run computes on the CPU"] if idle else []
