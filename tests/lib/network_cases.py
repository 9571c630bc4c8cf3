"""The native networks with inputs, in one process and on the ranks of the pool."""

from pathlib import Path

import network_flux
import network_sd3
import network_unet
import torch
from split import GLUE, UNCHANGED, evaluate

from sglang_gen.hub.component_folder import in_folder
from sglang_gen.weights.load import load

STEPS = (0, 2)  # steps that are evaluated


REFERENCES = {"sd3": network_sd3, "flux": network_flux, "sdxl": network_unet, "sd15": network_unet}
KIND = {"sd3": "sd3", "flux": "flux", "sdxl": "unet", "sd15": "unet"}


def given(name: str, dtype: torch.dtype, **size):
    """(config, latents, what `condition` takes) of a network."""
    if name == "sd3":
        config = network_sd3.PLAIN | {"qk_norm": "rms_norm", "dual_attention_layers": (0, 1)}
        latents, *texts = network_sd3.inputs(config, dtype, **size)
        return config, latents, (network_sd3.TIMESTEPS, *texts, *latents.shape[-2:])
    if name == "flux":
        config = network_flux.DEV | {"num_attention_heads": 4, "attention_head_dim": 8, "axes_dims_rope": (2, 2, 4)}
        latents, *texts = network_flux.inputs(config, dtype)
        grid = (network_flux.ROWS, network_flux.COLUMNS)
        return config, latents, (network_flux.TIMESTEPS, *texts, 3500.0, *grid)
    config = getattr(network_unet, name.upper()) | {"attention_head_dim": 4}
    latents, *texts = network_unet.inputs(config, dtype, **size)
    return config, latents, (network_unet.TIMESTEPS, *texts)


def loaded(name: str, config: dict, dtype: torch.dtype = torch.float64):
    """The network, and the folder of its weights."""
    folder = Path("network").absolute()
    REFERENCES[name].reference(**config).save_pretrained(folder)
    glue = GLUE[KIND[name]]
    return load(lambda: glue.build(config), in_folder(folder), glue.sources, dtype, "cpu"), folder


def evaluated(network, latents, conditions) -> torch.Tensor:
    """What the network predicts at both steps."""
    conditioning = network.condition(*conditions)
    return torch.stack([network(latents, conditioning, step) for step in STEPS])


@torch.no_grad()
def both(ranks, name, layout, dtype, summing=True, mutation=None, text=None, changes=UNCHANGED, **size):
    folder = Path("network")
    config, latents, conditions = given(name, dtype, **size)
    conditions = (conditions[0], conditions[1][:, :text], *conditions[2:])
    REFERENCES[name].reference(**config).save_pretrained(folder)
    glue = GLUE[KIND[name]]
    alone = load(lambda: glue.build(config), in_folder(folder), glue.sources, dtype, "cpu")
    conditioning = alone.condition(*conditions)
    expected = torch.stack([alone(latents, conditioning, step) for step in (0, 2)])
    network = (KIND[name], folder.absolute(), config, dtype)
    answers = ranks.run(layout, evaluate, *network, latents, conditions, (0, 2), summing, mutation, changes)
    return expected, answers
