"""What a single-file checkpoint says that its network predicts, and the scheduler that samples it.

Checkpoints in their authors' layout have no scheduler configuration. Those that predict the velocity
v = alpha_t noise - sigma_t x_0 (Salimans and Ho 2022) say so by tensors that are read by their presence: `v_pred`, with
`ztsnr` where the noise schedule ends at a signal-to-noise ratio of zero (Lin et al. 2024), and `edm_vpred.sigma_max`
for networks that are conditioned on the noise level (Karras et al. 2022). Others say it in their metadata
(`modelspec.prediction_type`).
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from sglang_gen.hub.safetensors_header import Header
from sglang_gen.types import Component

METADATA = "modelspec.prediction_type"
PREDICTION_NAMES = {"v": "v_prediction", "v_prediction": "v_prediction", "epsilon": "epsilon"}
EDM = "edm_vpred."
# Schedulers of diffusers that can rescale their betas to a terminal signal-to-noise ratio of zero.
RESCALING = (
    "DDIMScheduler", "DDIMParallelScheduler", "DDPMScheduler", "DDPMParallelScheduler", "DPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler", "LCMScheduler", "TCDScheduler",
    "UniPCMultistepScheduler",
)  # fmt: skip
BETAS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "steps_offset")


def scheduler(component: Component, path: Path, header: Header) -> tuple[Component, str | None]:
    """The scheduler that the checkpoint's markers ask for, and the log line that says so; None where it stays.

    `component` is the scheduler of the component configs. Schedulers of flow matching are not touched.
    """
    if component.class_name.startswith("FlowMatch"):
        return component, None
    edm = [name for name in header.tensors if name.startswith(EDM)]
    if edm:
        settings = _edm(path, header)
        found = replace(component, class_name="EDMEulerScheduler", config=settings)
        marker = ", ".join(sorted(edm))
    else:
        marker, settings = _discrete(header)
        found = component
        if settings.get("rescale_betas_zero_snr") and component.class_name not in RESCALING:
            betas = {key: value for key, value in component.config.items() if key in BETAS}
            found = replace(component, class_name="EulerDiscreteScheduler", config=betas)
        found = replace(found, config={**found.config, **settings})
    changed = {
        key: value for key, value in settings.items() if component.config.get(key, SCHEDULER_DEFAULTS.get(key)) != value
    }
    if not changed and found.class_name == component.class_name:
        return component, None
    told = ", ".join(f"{key}={value}" for key, value in settings.items())
    return found, f"{path.name} has the marker {marker}: its scheduler is {found.class_name} with {told}"


SCHEDULER_DEFAULTS: Mapping[str, Any] = {"prediction_type": "epsilon", "rescale_betas_zero_snr": False}


def _discrete(header: Header) -> tuple[str, dict[str, Any]]:
    """The markers of a network that is conditioned on timesteps, and the settings that they stand for."""
    markers = [name for name in ("v_pred", "ztsnr") if name in header.tensors]
    settings: dict[str, Any] = {}
    if "v_pred" in markers:
        settings["prediction_type"] = "v_prediction"
    elif named := PREDICTION_NAMES.get(header.metadata.get(METADATA, "")):
        markers.append(f"{METADATA}={header.metadata[METADATA]}")
        settings["prediction_type"] = named
    if "ztsnr" in markers:
        settings |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return " and ".join(markers), settings


def _edm(path: Path, header: Header) -> dict[str, Any]:
    """Settings of the EDM scheduler; the noise levels are the numbers that the markers hold, if they hold one."""
    from safetensors import safe_open

    levels = {"sigma_max": 120.0, "sigma_min": 0.002}
    with safe_open(path, framework="pt") as file:
        for key in levels:
            tensor = header.tensors.get(f"{EDM}{key}")
            if tensor is not None and tensor.numbers == 1:
                levels[key] = float(file.get_tensor(f"{EDM}{key}").item())
    return {"prediction_type": "v_prediction", **levels, "sigma_data": 1.0, "sigma_schedule": "exponential"}
