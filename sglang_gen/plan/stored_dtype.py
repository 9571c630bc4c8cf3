"""--disable-autocast: the pipeline computes in the dtype of the denoising network's stored weights."""

from dataclasses import replace
from pathlib import Path

from sglang_gen.config.schema import DType, Run
from sglang_gen.errors import UserError
from sglang_gen.hub import component_folder, weight_files
from sglang_gen.plan.quantization import denoisers
from sglang_gen.types import ModelCard, Plan


def check_single_dtype(run: Run) -> None:
    """Raises UserError if two settings determine the dtype."""
    if run.compile.disable_autocast and run.dtype is not DType.auto:
        raise UserError(
            f"--disable-autocast uses the dtype of the stored weights and contradicts --dtype {run.dtype.name}; "
            "give one of the two"
        )


def settle(plan: Plan) -> Plan:
    """The plan with the stored dtype if --disable-autocast is set and the weights are on this machine.

    Raises UserError if torch cannot compute in the stored dtype.
    """
    if not plan.run.compile.disable_autocast:
        return plan
    dtype = _stored(plan.run, plan.card)
    return replace(plan, dtype=dtype or plan.dtype, effective={**plan.effective, "dtype": dtype or "stored"})


def require(plan: Plan) -> Plan:
    """`settle` for a model whose files are on this machine. Raises UserError if their dtype is still unknown."""
    settled = settle(plan)
    if settled.effective["dtype"] == "stored":
        raise UserError("--disable-autocast: there is no local safetensors file of the denoising network; use --dtype")
    return settled


def _stored(run: Run, card: ModelCard) -> str | None:
    """torch's name of the stored dtype; None if the weights are not on this machine yet."""
    paths = _files(run, card)
    if not paths:
        return None
    if paths[0].suffix.lower() == ".gguf":
        raise UserError(f"--disable-autocast: {paths[0]} stores GGUF blocks, which have no dtype; use --dtype")
    tensors = weight_files.read_headers(paths).tensors
    if not tensors:
        raise UserError(f"--disable-autocast: {paths[0]} holds no tensors")
    name = weight_files.stored_dtype(tensors)
    if name not in weight_files.FLOATS:
        raise UserError(
            f"--disable-autocast: the weights in {paths[0].parent} are stored in {name}, which is not a compute dtype; "
            "give one with --dtype"
        )
    return weight_files.FLOATS[name]


def _files(run: Run, card: ModelCard) -> tuple[Path, ...]:
    if run.quant.transformer_weights_path:
        return weight_files.locate(run.quant.transformer_weights_path).paths
    for name in denoisers(card):
        folder = card.components[name].folder
        return tuple(component_folder.in_folder(folder)) if folder else ()
    return ()
