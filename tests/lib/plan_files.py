"""Cache plans for runs of tiny pipelines."""

import json
from pathlib import Path
from typing import Any

from whole import plan_of

from sglang_gen.backends.native.plan_bindings import bindings
from sglang_gen.backends.native.request import check_native_request, evaluations
from sglang_gen.plan.cache_plan import FORMAT, PLAN_VERSION


def content(folder: Path, depths: list[int | None], *words: str, blocks: int | None = None) -> dict[str, Any]:
    """The plan of a run that `plan_of` plans with these overrides and as many steps as the schedule has."""
    steps = f"sampling.num_inference_steps={len(depths)}"
    plan = plan_of(f"model.path={folder}", "sampling.prompt=a cat", steps, *words)
    checked = check_native_request(plan)
    timesteps, _ = evaluations(checked, checked.full_request)
    config = plan.card.components[checked.spec.network].config
    blocks = blocks or config["num_layers"] + (config.get("num_single_layers") or 0)
    return {
        "format": FORMAT,
        "schema_version": PLAN_VERSION,
        "bound_to": bindings(plan, checked.spec, checked.full_request, timesteps),
        "blocks": blocks,
        "depths": depths,
        "computed_blocks": sum(blocks if depth is None else depth for depth in depths),
    }


def write(folder: Path, depths: list[int | None], *words: str, blocks: int | None = None) -> str:
    Path("plan.json").write_text(json.dumps(content(folder, depths, *words, blocks=blocks)))
    return "cache.plan_file=plan.json"
