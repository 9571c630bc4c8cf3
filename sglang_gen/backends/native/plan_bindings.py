"""What a cache plan is bound to: the facts of a run that decide its trajectory, apart from prompts and seeds."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sglang_gen.config.schema import Weights, plain
from sglang_gen.families.contract import Request, Spec
from sglang_gen.hub import weight_files
from sglang_gen.types import Plan

GUIDANCE_ARGUMENTS = ("guidance_rescale", "true_cfg_scale")  # of --diffusers-kwargs
SAMPLES, SAMPLE_BYTES = 64, 4096  # parts of each weight file that are compared


def bindings(plan: Plan, spec: Spec, request: Request, timesteps: Tensor) -> dict[str, Any]:
    """The facts of a run by the keys of `cache_plan.BINDINGS`, as JSON holds them."""
    run, components = plan.run, plan.card.components
    scheduler = components["scheduler"]
    arguments = {name: run.backend.diffusers_kwargs.get(name) for name in GUIDANCE_ARGUMENTS}
    return {
        "pipeline": plan.pipeline_class,
        "network": _digest(components[spec.network].config),
        "weights": weights_digest(plan, spec.network),
        "size": [request.size.height, request.size.width, request.size.frames],
        "scheduler": scheduler.class_name,
        "scheduler_config": _digest(scheduler.config),
        "steps": run.sampling.num_inference_steps,
        "timesteps": [round(value, 3) for value in timesteps.double().tolist()],
        "dtype": plan.dtype,
        "guidance_scale": run.sampling.guidance_scale,
        "guidance_interval": run.sampling.guidance_interval,
        "guidance_arguments": {name: value for name, value in arguments.items() if value is not None},
    }


def _digest(config: Mapping[str, Any]) -> str:
    """Digest of a config without the keys in which a library notes versions and paths."""
    content = {key: value for key, value in config.items() if not key.startswith("_")}
    return hashlib.sha256(json.dumps(plain(content), sort_keys=True, default=str).encode()).hexdigest()


def weights_digest(plan: Plan, name: str) -> str | None:
    """A digest of the size and of samples of the weight files of a component; None if they are not downloaded yet.

    Another training changes nearly all values, so samples tell it, where reading a whole checkpoint takes a minute.
    """
    if plan.run.model.weights is Weights.random:
        return "random"
    files, digest = _weight_files(plan, name), hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(str(size).encode())
        with open(path, "rb") as file:
            for sample in range(SAMPLES):
                file.seek(size * sample // SAMPLES)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest() if files else None


def _weight_files(plan: Plan, name: str) -> list[Path]:
    component, replaced = plan.card.components[name], plan.run.quant.transformer_weights_path
    if replaced:
        return list(weight_files.locate(replaced).paths)
    single = component.file or plan.card.file
    if single is not None:
        return [single]
    return [] if component.folder is None else sorted(component.folder.glob("*.safetensors"))
