"""The plan: every decision of a run that needs no weight, made once from facts.

In: the composed `Run`, the model's card, the machine. Out: a frozen `Plan` that every later step obeys.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sglang_gen.config import manifest, prompts
from sglang_gen.config.schema import (
    DEGREES,
    CacheMethod,
    Device,
    DType,
    Run,
    leaves,
    plain,
    user_gave,
)
from sglang_gen.errors import UserError
from sglang_gen.hub import remote_code, resolve
from sglang_gen.outputs import dump_path, input_digests, trace_path
from sglang_gen.perf import cpu_dtype
from sglang_gen.plan import (
    attention_limits,
    backend_choice,
    checks,
    cpu_matmul,
    guidance,
    image_size,
    layout_limits,
    noise_levels,
    offloading,
    quality_request,
    quantization,
    random_request,
    step_cache,
    stored_dtype,
)
from sglang_gen.plan import degrees as layout
from sglang_gen.types import Layout, ModelCard, Plan

if TYPE_CHECKING:
    from sglang_gen.config.compose import Composed


def make_plan(composed: "Composed", card: ModelCard) -> Plan:
    """The plan of a run that passed `checks.check_request`. Raises UserError if model or machine rule it out."""
    run, sources = composed.run, composed.sources
    stated = layout.stated(sources)
    degrees = layout.infer(run.parallel, stated, layout_limits.common_heads(card))
    device = choose_device(run.device)
    backend, reason = backend_choice.choose(run, card, device)
    if backend == "sglang":
        backend_choice.check_start(run)
        backend_choice.check_video(run, card)
    run = prompts.pin(manifest.pin(run))
    batches = prompts.batches(prompts.samples(run), run.sampling.batch_size)
    image_size.check_size(run, card)
    image_size.check_text_length(run, card)
    noise_levels.check_scheduler_settings(run, card)
    layout_limits.check_layout(run, card, backend, reason, degrees, stated, batches)
    here = degrees.ranks if composed.place is None else composed.place.here
    if not run.dry_run:  # which computes on no GPU
        layout_limits.check_machine(here, device)
    dump_path.check_ranks(run.output.perf_dump_path, degrees.ranks)
    trace_path.check_trace_paths(run, degrees.ranks)
    if run.compile.cuda_graphs and device not in CAPTURING:
        raise UserError("compile.cuda_graphs needs a GPU, and this run computes on the CPU; leave it out")
    if run.perf.calibrate and device != "cpu":
        raise UserError(
            "perf.calibrate relates processor time to that of a fixed work, and this run computes on a GPU, whose time "
            "is not processor time; leave it out"
        )
    if run.compile.cuda_graphs and degrees.ring * degrees.ulysses * degrees.tp > 1:
        raise UserError(
            "compile.cuda_graphs captures no network that is split over ranks; leave it out, or run with "
            "parallel.dp_size or parallel.enable_cfg_parallel alone"
        )
    dtype, chosen_by = choose_dtype(run.dtype, device, backend)
    random_request.check_random_model(run, card)
    quantization.check_model(run, card, quantization.facts_of(device))
    quality_request.check_exact(run, card)
    quality_request.check_attributes(run, card)
    plan = Plan(
        run=run,
        sources=sources,
        card=card,
        layout=degrees,
        backend=backend,
        device=device,
        dtype=dtype,
        batches=batches,
        requested=requested(run),
        effective={
            **_effective(run, backend, degrees, device, dtype),
            **({} if run.compile.disable_autocast else chosen_by),
            "quantization": quantization.expected(run, card),
        },
        warnings=(
            *composed.warnings,
            *checks.request_warnings(run, sources, composed.versions),
            *checks.sweep_warnings(run, sources, composed.in_sweep),
            *checks.noise_warnings(run, batches),
            *quality_request.seed_warnings(run, user_gave(run, sources, "sampling.seed")),
            *input_digests.changed(run, sources, composed.inputs),
            *resolve.preset_warnings(run.model, card),
            *remote_code.warnings(run.model, card, sources),
            *(layout_limits.machine_warnings(here, device) if run.dry_run else ()),
            *offloading.warnings(run, device),
            *step_cache.warnings(run, backend),
            *guidance.warnings(run, user_gave(run, sources, "sampling.guidance_scale"), card),
        ),
        notices=(
            *((f"Backend: diffusers (the native engine cannot run this: {reason})",) if reason else ()),
            *remote_code.notices(run.model, card, sources),
        ),
        here=here,
        given=frozenset(path for path in leaves() if user_gave(run, sources, path)),
        stated_degrees=frozenset(stated),
    )
    plan = cpu_matmul.settle(stored_dtype.settle(plan))
    attention_limits.check_attention(plan)
    return plan


def complete(composed: "Composed", expected: Plan, card: ModelCard) -> Plan:
    """The plan with the card of a model whose files are local.

    The expected plan of a preset was made from the component configs in the package. If the model's own configs are the
    same, only the files are filled in; if they differ, everything that depends on them is decided again. Raises
    UserError if the files do not allow what was planned.
    """
    if _described_alike(expected.card, card):
        return cpu_matmul.settle(stored_dtype.require(replace(expected, card=card)))
    return cpu_matmul.settle(stored_dtype.require(make_plan(replace(composed, run=expected.run), card)))


def _described_alike(expected: ModelCard, card: ModelCard) -> bool:
    """Whether two cards have the same pipeline and the same components, wherever their files are."""
    without_files = [
        replace(
            each,
            folder=None,
            file=None,
            components={name: replace(part, folder=None, file=None) for name, part in each.components.items()},
        )
        for each in (expected, card)
    ]
    return without_files[0] == without_files[1]


CAPTURING = ("cuda",)  # devices with CUDA graphs


def choose_device(wanted: Device) -> str:
    """`cpu` or `cuda`. Raises UserError if cuda is requested and torch sees no CUDA device."""
    import torch

    if wanted is Device.cuda and not torch.cuda.is_available():
        raise UserError("device=cuda: torch sees no CUDA device; run with device=cpu")
    if wanted is Device.auto:
        return "cuda" if torch.cuda.is_available() else "cpu"
    return wanted.name


def choose_dtype(wanted: DType, device: str, backend: str) -> tuple[str, dict[str, Any]]:
    """The compute dtype, and for `effective` the rates that decided.

    auto is bfloat16 on a GPU that multiplies it, and on a CPU where it is not slower than float32; else float32.
    """
    if wanted is not DType.auto:
        return wanted.name, {}
    if device == "cuda":
        import torch

        return "bfloat16" if torch.cuda.get_device_capability() >= (8, 0) else "float32", {}
    found = cpu_dtype.choose(native=backend == "sglang")
    return found.dtype, {"dtype_choice": found.recorded()}


def requested(run: Run) -> dict[str, Any]:
    """Requested settings whose effective values can differ."""
    degrees = {name: value for name in DEGREES if (value := getattr(run.parallel, name)) is not None}
    return {
        "backend": run.backend.name.name,
        "attention": run.attention.backend,
        "dtype": run.dtype.name,
        "device": run.device.name,
        "parallel": degrees,
        "cache": _cache(run),
        "quantization": "nunchaku" if quantization.wants_nunchaku(run) else run.quant.method.name,
        "offload": offloading.asked(run),
        "lora": [adapter["path"] for adapter in [plain(run.lora), *plain(run.lora.adapters)] if adapter["path"]],
        "compile": run.compile.enable_torch_compile,
        "cuda_graphs": run.compile.cuda_graphs,
        "model": {"weights": run.model.weights.name},
    }


def _cache(run: Run) -> str:
    """The name of the requested step cache; `--cache-dit-config` without a method requests DBCache."""
    method = run.cache.method
    return (CacheMethod.dbcache if method is CacheMethod.none and run.cache.cache_dit_config else method).name


def _effective(run: Run, backend: str, degrees: Layout, device: str, dtype: str) -> dict[str, Any]:
    """The settings that are expected to take effect; the built engine replaces them by what it reads back."""
    asked = requested(run)
    return {
        "backend": backend,
        "attention": "sdpa" if asked["attention"] == "auto" else asked["attention"],
        "dtype": dtype,
        "device": device,
        "parallel": plain(degrees),
        "cache": asked["cache"],
        "quantization": asked["quantization"],
        "offload": offloading.active(run, device),
        "lora": asked["lora"],
        "compile": asked["compile"],
        "cuda_graphs": asked["cuda_graphs"],
        "seed": run.sampling.seed,
        "model": asked["model"],
    }
