"""Output of `dry_run=true` and `dry_run=json`: the plan, and one rank's estimated memory, communication and FLOPs."""

import json
from typing import Any

from sglang_gen.backends.preflight import check_backend
from sglang_gen.config.schema import plain
from sglang_gen.dry_run.estimate import estimate
from sglang_gen.launch import judging
from sglang_gen.plan import image_size
from sglang_gen.types import Plan


def describe(plan: Plan) -> str:
    """The plan as a table, or as JSON with dry_run=json.

    Raises UserError for requests that the backend would refuse before it reads a weight.
    """
    check_backend(plan, warn=True)
    judging.prepared(plan)
    return json.dumps(_as_dict(plan), indent=2, ensure_ascii=False) if plan.run.dry_run == "json" else _as_table(plan)


def _as_dict(plan: Plan) -> dict[str, Any]:
    return {
        "model": plan.card.name,
        "pipeline": plan.pipeline_class,
        "components": {name: component.class_name for name, component in plan.card.components.items()},
        "layout": {**plain(plan.layout), "ranks": plan.layout.ranks},
        "requested": dict(plan.requested),
        "effective": dict(plan.effective),
        "batches": [[plain(sample) for sample in batch] for batch in plan.batches],
        "run": plain(plan.run),
        "sources": dict(plan.sources),
        "estimate": estimate(plan),
        "warnings": list(plan.warnings),
    }


def _as_table(plan: Plan) -> str:
    content, sampling = _as_dict(plan), plan.run.sampling
    layout = ", ".join(f"{name} {value}" for name, value in content["layout"].items())
    own, size = "model default", image_size.expected(plan)
    rows = [
        ("model", content["model"]),
        ("pipeline", content["pipeline"]),
        ("components", ", ".join(content["components"])),
        ("layout", layout),
        ("samples", f"{sum(map(len, plan.batches))} in {len(plan.batches)} batches"),
        ("width, height", f"{sampling.width or own}, {sampling.height or own}"),
        *([("frames", str(size.frames))] if size is not None and size.frames > 1 else []),
        ("steps, guidance, seed", f"{sampling.num_inference_steps}, {sampling.guidance_scale}, {sampling.seed}"),
    ]
    shown = {name: value for name, value in plan.requested.items() if name != "model"}  # a setting in the rows below
    rows += [(name, f"{_short(value)}  ->  {_short(plan.effective[name])}") for name, value in shown.items()]
    if rates := plan.effective.get("dtype_choice"):
        rows.append(("dtype=auto chosen by", _short(rates)))
    if library := plan.effective.get("float32_matmul"):
        rows.append(("float32 products by", library))
    rows += _estimated(content["estimate"])
    rows += [
        (path, f"{_short(_at(content['run'], path))}  (from {source})")
        for path, source in plan.sources.items()
        if source not in ("default",)
    ]
    rows += [("warning", warning) for warning in plan.warnings]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in rows)


def _estimated(estimated: dict[str, Any]) -> list[tuple[str, str]]:
    """Table rows of the estimates for one rank."""
    if "reason" in estimated:
        return [("estimate", estimated["reason"])]
    memory, alive = estimated["memory"], estimated["memory"]["alive"]
    weights = ", ".join(f"{name} {_bytes(size)}" for name, size in memory["weights"].items())
    activations = ", ".join(f"{name} {_bytes(size)}" for name, size in alive.items())
    rows = [
        ("memory per rank", f"{_bytes(memory['total'])}: weights ({weights}), activations ({activations})"),
        ("communication per step", _communication(estimated["step"])),
        ("communication of decoding", _communication(estimated["decoding"])),
        ("FLOPs per step", f"{estimated['step']['flops']:.3g} per rank"),
    ]
    needed, there = memory["total"], memory["there"]
    if there is not None and needed > there:
        rows.append(("warning", f"a rank needs {_bytes(needed)}, and this machine has {_bytes(there)} per rank"))
    return [*rows, *_predicted(estimated["prediction"])]


def _communication(stage: dict[str, Any]) -> str:
    listed = [f"{name} {calls['count']} x, {_bytes(calls['bytes'])}" for name, calls in stage["collectives"].items()]
    return "; ".join(listed) or "none"


def _bytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _predicted(prediction: dict[str, Any] | None) -> list[tuple[str, str]]:
    if prediction is None:
        return []
    if "reason" in prediction:
        return [("PREDICTION", f"none: {prediction['reason']}")]
    names = {
        "products_ms": "products",
        "attention_ms": "attention",
        "elementwise_ms": "element-wise",
        "communication_ms": "communication",
    }
    shares = ", ".join(f"{prediction[key]:.1f} {name}" for key, name in names.items())
    return [
        (
            "PREDICTION",
            f"{prediction['step_ms']:.1f} ms per step on {prediction['machine']} ({shares}); not measured",
        )
    ]


def _at(run: dict[str, Any], path: str) -> Any:
    value: Any = run
    for name in path.split("."):
        value = value[name]
    return value


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {item}" for name, item in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return str(value).replace("\n", "\\n")
