"""The native networks with inputs, in one process and on the ranks of the pool."""

from pathlib import Path

import torch
from reference import Reference
from split import FAMILIES

from sglang_gen.hub.component_folder import in_folder
from sglang_gen.weights.load import load

STEPS = (0, 2)  # steps that are evaluated
REFERENCES = {"sd3": Reference("sd3"), "flux": Reference("flux"), "sdxl": Reference("sdxl"), "sd15": Reference("sd")}
CONFIGS = {
    "sd3": REFERENCES["sd3"].variants["sd35-medium"],
    "flux": REFERENCES["flux"].variants["dev"]
    | {"num_attention_heads": 4, "attention_head_dim": 8, "axes_dims_rope": (2, 2, 4)},
    "sdxl": REFERENCES["sdxl"].variants["sdxl"] | {"attention_head_dim": 4},
    "sd15": REFERENCES["sd15"].variants["sd15"] | {"attention_head_dim": 4},
}
KIND = {"sd3": "sd3", "flux": "flux", "sdxl": "sdxl", "sd15": "sd"}


def given(name: str, dtype: torch.dtype, **size):
    """(config, latents, what `condition` takes) of a network."""
    reference, config = REFERENCES[name], CONFIGS[name]
    latents, *texts = reference.inputs(config, dtype, **size)
    return config, latents, reference.conditions(latents, tuple(texts))


def read(name: str, config: dict, folder: Path, dtype: torch.dtype):
    """Our network with the weights of a folder."""
    family = FAMILIES[KIND[name]]
    return load(lambda: family.build(config), in_folder(folder), family.sources, dtype, "cpu")


def loaded(name: str, config: dict, dtype: torch.dtype = torch.float64):
    """Our network with the weights of diffusers' reference, and their folder."""
    folder = Path("network").absolute()
    REFERENCES[name].network(**config).save_pretrained(folder)
    return read(name, config, folder, dtype), folder


def evaluated(network, latents, conditions) -> torch.Tensor:
    """What the network predicts at both steps."""
    conditioning = network.condition(*conditions)
    return torch.stack([network(latents, conditioning, step) for step in STEPS])
