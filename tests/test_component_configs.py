"""The component configurations shipped with the presets name the networks that were published.

A configuration is right when its class, built on the meta device, has the published number of parameters and when
no key of it goes unread: a misspelt key would otherwise fall back to a default without a word.
"""

import importlib
import inspect
import json
from pathlib import Path

import pytest
import torch
from published import NETWORKS

CONFIGS = Path(__file__).resolve().parent.parent / "sglang_gen" / "assets" / "configs"

# pos_embed_max_size^2 x width: stored in the checkpoints of this family beside the parameters.
SD3_POSITIONS = {"sd3_medium": 192**2 * 1536, "sd35_medium": 384**2 * 1536, "sd35_large": 192**2 * 2432}

FLOW = "FlowMatchEulerDiscreteScheduler"
LATENT_DIFFUSION_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
WAN_FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0, "solver_order": 2}
SCHEDULERS = {
    "flux_dev": (FLOW, {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "max_image_seq_len": 4096}),
    "flux_schnell": (FLOW, {"use_dynamic_shifting": False, "shift": 1.0}),
    "qwen_image": (FLOW, {"use_dynamic_shifting": True, "max_shift": 0.9, "shift_terminal": 0.02}),
    "sd15": ("PNDMScheduler", LATENT_DIFFUSION_BETAS | {"prediction_type": "epsilon", "steps_offset": 1}),
    "sd21": ("DDIMScheduler", LATENT_DIFFUSION_BETAS | {"prediction_type": "v_prediction", "steps_offset": 1}),
    "sd35_large": (FLOW, {"use_dynamic_shifting": False, "shift": 3.0}),
    "sd35_medium": (FLOW, {"use_dynamic_shifting": False, "shift": 3.0}),
    "sd3_medium": (FLOW, {"use_dynamic_shifting": False, "shift": 3.0}),
    "sdxl": ("EulerDiscreteScheduler", LATENT_DIFFUSION_BETAS | {"prediction_type": "epsilon", "steps_offset": 1}),
    "wan21_t2v_14b": ("UniPCMultistepScheduler", WAN_FLOW),
    "wan21_t2v_1_3b": ("UniPCMultistepScheduler", WAN_FLOW),
}

PARTS = [(preset, part) for preset, parts in NETWORKS.items() for part in sorted(parts)]


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def component_class(preset: str, part: str) -> tuple[str, type]:
    """Library and class that model_index.json names for one part of a preset."""
    library, name = read(CONFIGS / preset / "model_index.json")[part]
    module = library if library in ("diffusers", "transformers") else f"diffusers.pipelines.{library}"
    return library, getattr(importlib.import_module(module), name)


def build_on_meta(preset: str, part: str) -> torch.nn.Module:
    library, cls = component_class(preset, part)
    folder = CONFIGS / preset / part
    with torch.device("meta"):
        if library == "diffusers":
            return cls.from_config(read(folder / "config.json"))
        return cls(cls.config_class.from_pretrained(folder))


def test_eleven_presets_hold_sixty_five_files_and_no_others():
    presets = sorted(path.name for path in CONFIGS.iterdir())
    assert presets == sorted(NETWORKS) == sorted(SCHEDULERS)
    assert len(presets) == 11

    expected = {f"{preset}/model_index.json" for preset in NETWORKS}
    expected |= {f"{preset}/scheduler/scheduler_config.json" for preset in SCHEDULERS}
    expected |= {f"{preset}/{part}/config.json" for preset, part in PARTS}
    found = {path.relative_to(CONFIGS).as_posix(): path for path in CONFIGS.rglob("*") if path.is_file()}
    assert set(found) == expected
    assert (len(PARTS), len(found)) == (43, 65)
    assert max(path.stat().st_size for path in found.values()) < 4096


@pytest.mark.parametrize("preset", sorted(NETWORKS))
def test_the_model_index_lists_exactly_the_parts_that_have_a_folder(preset):
    index = read(CONFIGS / preset / "model_index.json")
    listed = {part for part, value in index.items() if isinstance(value, list) and value[0] is not None}
    assert {part for part in listed if not part.startswith(("tokenizer", "feature"))} == set(NETWORKS[preset]) | {
        "scheduler"
    }
    assert hasattr(importlib.import_module("diffusers"), index["_class_name"])


@pytest.mark.parametrize(("preset", "part"), PARTS)
def test_a_part_built_on_meta_has_the_published_number_of_parameters(preset, part):
    network = build_on_meta(preset, part)
    count = sum(parameter.numel() for parameter in network.parameters())
    assert (type(network).__name__, count) == NETWORKS[preset][part]
    assert all(parameter.is_meta for parameter in network.parameters())


@pytest.mark.parametrize("preset", sorted(SD3_POSITIONS))
def test_an_sd3_checkpoint_also_stores_its_table_of_positions(preset):
    transformer = build_on_meta(preset, "transformer")
    parameters = dict(transformer.named_parameters())
    stored = {name: tensor.numel() for name, tensor in transformer.state_dict().items() if name not in parameters}
    assert stored == {"pos_embed.pos_embed": SD3_POSITIONS[preset]}


@pytest.mark.parametrize(("preset", "part"), PARTS)
def test_a_part_names_its_class_and_every_key_is_read(preset, part):
    library, cls = component_class(preset, part)
    config = read(CONFIGS / preset / part / "config.json")
    if library == "diffusers":
        named = config["_class_name"]
        read_keys = set(inspect.signature(cls.__init__).parameters) | {"_class_name", "_diffusers_version"}
    else:
        (named,) = config["architectures"]
        read_keys = set(cls.config_class().to_dict())
    assert named == cls.__name__
    assert set(config) <= read_keys


@pytest.mark.parametrize("preset", sorted(SCHEDULERS))
def test_a_scheduler_builds_and_keeps_the_published_schedule(preset):
    _, cls = component_class(preset, "scheduler")
    config = read(CONFIGS / preset / "scheduler" / "scheduler_config.json")
    scheduler = cls.from_config(config)
    name, facts = SCHEDULERS[preset]
    assert type(scheduler).__name__ == config["_class_name"] == name
    assert {key: scheduler.config[key] for key in facts} == facts
    assert scheduler.config.num_train_timesteps == 1000
