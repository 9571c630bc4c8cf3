"""Prediction type of a single-file checkpoint's network, and the matching scheduler.

Checkpoints in their authors' layout have no scheduler configuration. A network that predicts the velocity
v = alpha_t noise - sigma_t x_0 (Salimans and Ho 2022) is marked by the presence of tensors: `v_pred`, with `ztsnr` if
the noise schedule ends at a signal-to-noise ratio of zero (Lin et al. 2024), and `edm_vpred.sigma_max` for networks
conditioned on the noise level (Karras et al. 2022). Other checkpoints state it in their metadata
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
# diffusers' schedulers that support `rescale_betas_zero_snr`.
RESCALING = (
    "DDIMScheduler", "DDIMParallelScheduler", "DDPMScheduler", "DDPMParallelScheduler", "DPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler", "LCMScheduler", "TCDScheduler",
    "UniPCMultistepScheduler",
)  # fmt: skip
BETAS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "steps_offset")


def scheduler(component: Component, path: Path, header: Header) -> tuple[Component, str | None]:
    """The scheduler that the checkpoint's markers require, and a log line about the change, None if there is none.

    `component` is the scheduler of the component configs. Flow matching schedulers are returned unchanged.
    """
    if component.class_name.startswith("FlowMatch"):
        return component, None
    edm = [name for name in header.tensors if name.startswith(EDM)]
    if edm:
        settings = _edm(path, header)
        marked = replace(component, class_name="EDMEulerScheduler", config=settings)
        marker = ", ".join(sorted(edm))
    else:
        marker, settings = _discrete(header)
        marked = component
        if settings.get("rescale_betas_zero_snr") and component.class_name not in RESCALING:
            betas = {key: value for key, value in component.config.items() if key in BETAS}
            marked = replace(component, class_name="EulerDiscreteScheduler", config=betas)
        marked = replace(marked, config={**marked.config, **settings})
    changed = {
        key: value for key, value in settings.items() if component.config.get(key, SCHEDULER_DEFAULTS.get(key)) != value
    }
    if not changed and marked.class_name == component.class_name:
        return component, None
    listed = ", ".join(f"{key}={value}" for key, value in settings.items())
    return marked, f"{path.name} has the marker {marker}: its scheduler is {marked.class_name} with {listed}"


SCHEDULER_DEFAULTS: Mapping[str, Any] = {"prediction_type": "epsilon", "rescale_betas_zero_snr": False}


def _discrete(header: Header) -> tuple[str, dict[str, Any]]:
    """Markers of a network conditioned on timesteps, and the scheduler settings that they imply."""
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
    """Settings of the EDM scheduler. The noise levels are read from the marker tensors if these hold one number."""
    from safetensors import safe_open

    levels = {"sigma_max": 120.0, "sigma_min": 0.002}
    with safe_open(path, framework="pt") as file:
        for key in levels:
            tensor = header.tensors.get(f"{EDM}{key}")
            if tensor is not None and tensor.numbers == 1:
                levels[key] = float(file.get_tensor(f"{EDM}{key}").item())
    return {"prediction_type": "v_prediction", **levels, "sigma_data": 1.0, "sigma_schedule": "exponential"}
