"""Limits of attention kernels that are known before a weight is read: dtype, size of the heads, compilation."""

from sglang_gen.errors import UserError
from sglang_gen.families import registry
from sglang_gen.families.contract import configured_head_widths
from sglang_gen.types import DENOISERS, ModelCard, Plan

SAGE_WIDEST_HEAD = 128  # channels of a head that SageAttention's kernels take


def check_attention(plan: Plan) -> None:
    """Raises UserError for the native engine's own kernel on diffusers, and where SageAttention cannot compute."""
    run, name = plan.run, plan.run.attention.backend
    if name == "onednn" and plan.backend != "sglang":
        raise UserError(
            "attention.backend: 'onednn' is a kernel of the native engine, and this run uses diffusers; "
            "run with attention=sdpa"
        )
    if plan.device != "cuda" or "sage" not in name:
        return
    if plan.dtype == "float32":
        raise UserError(
            f"attention.backend: '{name}' computes in half precision, and this run is float32; add --dtype bfloat16 or "
            "run with attention=sdpa"
        )
    widest = _widest_head(plan.card)
    if widest > SAGE_WIDEST_HEAD:
        raise UserError(
            f"attention.backend: '{name}' takes heads of at most {SAGE_WIDEST_HEAD} channels, and this network has "
            f"heads of {widest}; run with attention=sdpa"
        )
    if plan.backend == "sglang" and run.compile.enable_torch_compile:
        raise UserError(
            f"attention.backend: torch.compile cannot trace '{name}', and the native engine compiles blocks with their "
            "attention; run with compile=none or attention=sdpa"
        )


def _widest_head(card: ModelCard) -> int:
    """Channels of the widest head of the denoising networks; 0 if their configurations do not say it."""
    widths = [0]
    for network in (card.components[name] for name in DENOISERS if name in card.components):
        spec = registry.by_network_class(network.class_name)
        widths += (spec.head_widths if spec else configured_head_widths)(network.config)
    return max(widths)
