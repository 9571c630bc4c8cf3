"""The native networks with inputs, in one process and on the ranks of the pool."""

from pathlib import Path

import torch
from reference import Reference
from split import FAMILIES, UNCHANGED, evaluate

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


def loaded(name: str, config: dict, dtype: torch.dtype = torch.float64):
    """The network, and the folder of its weights."""
    folder, family = Path("network").absolute(), FAMILIES[KIND[name]]
    REFERENCES[name].network(**config).save_pretrained(folder)
    return load(lambda: family.build(config), in_folder(folder), family.sources, dtype, "cpu"), folder


def evaluated(network, latents, conditions) -> torch.Tensor:
    """What the network predicts at both steps."""
    conditioning = network.condition(*conditions)
    return torch.stack([network(latents, conditioning, step) for step in STEPS])


@torch.no_grad()
def both(ranks, name, layout, dtype, summing=True, mutation=None, text=None, changes=UNCHANGED, **size):
    config, latents, conditions = given(name, dtype, **size)
    conditions = (conditions[0], conditions[1][:, :text], *conditions[2:])
    alone, folder = loaded(name, config, dtype)
    expected = evaluated(alone, latents, conditions)
    network = (KIND[name], folder, config, dtype)
    answers = ranks.run(layout, evaluate, *network, latents, conditions, STEPS, summing, mutation, changes)
    return expected, answers
