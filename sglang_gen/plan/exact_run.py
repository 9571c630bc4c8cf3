"""The run that makes the reference of another one (quality.reference=auto): the same samples without approximations."""

from dataclasses import replace
from typing import Any

from sglang_gen.config.schema import (
    Attention,
    BackendName,
    Cache,
    Compile,
    Device,
    DType,
    GuidanceBatching,
    LogLevel,
    Machine,
    Matmul,
    Offload,
    Output,
    Parallel,
    Perf,
    Quality,
    Quant,
    Run,
    Sweep,
    Tracking,
    plain,
)
from sglang_gen.plan.quality_request import is_replaced_by_quantized
from sglang_gen.types import Plan


def exact(plan: Plan) -> Run:
    """The run of the reference, in one process, one sample at a time.

    Approximations are step caches, quantization, guidance in an interval, and attention kernels that are quantized or
    sparse. They are left out, as is everything that changes rounding or the order of sums: other attention kernels,
    compilation, batches and parallelism. Model, adapters, samples, steps, guidance, size, backend and dtype stay.
    """
    run, native = plan.run, plan.backend == "sglang"
    weights = run.quant.transformer_weights_path
    own_products = native and plan.dtype == "float32" and plan.device == "cpu"
    return replace(
        run,
        backend=replace(
            run.backend,
            name=BackendName[plan.backend],
            float32_matmul=Matmul[plan.matmul] if own_products else Matmul.auto,
        ),
        parallel=Parallel(timeout_minutes=run.parallel.timeout_minutes),
        quant=Quant(transformer_weights_path=None if is_replaced_by_quantized(run) else weights),
        attention=Attention("sdpa" if native else "auto"),
        cache=Cache(),
        compile=Compile(disable_autocast=run.compile.disable_autocast),
        sampling=replace(run.sampling, guidance_interval=None, guidance_batching=GuidanceBatching.auto, batch_size=1),
        output=Output(),
        perf=Perf(work=False, machine_rates=False),
        quality=Quality(manifest=run.quality.manifest),
        tracking=Tracking(),
        machine=Machine(),
        sweep=Sweep(),
        device=Device[plan.device],
        dtype=DType[plan.dtype],
        deterministic=False,
        log_level=LogLevel.debug if run.log_level is LogLevel.debug else LogLevel.warning,
    )


def settings(run: Run) -> dict[str, Any]:
    """Settings of an exact run that decide its images, by group: without names of files, which others may have too."""
    described: dict[str, Any] = plain(replace(run, offload=Offload(), output=Output(), log_level=LogLevel.info))
    for path in ("model.path", "model.preset", "model.id", "model.example_prompt", "quality.manifest",
                 "parallel.timeout_minutes", "quant.transformer_weights_path", "sampling.image_path",
                 "sampling.latents", "model.component_paths", "model.configs"):  # fmt: skip
        group, _, name = path.partition(".")
        del described[group][name]
    return described
