"""Attention kernels by name: torch's scaled_dot_product_attention, kernels of other packages, FlexAttention."""

import importlib
import importlib.util
import math
import warnings
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from sglang_gen.config.schema import Attention
from sglang_gen.engine import onednn_attention, sparse_attention
from sglang_gen.errors import UserError, nearest
from sglang_gen.models.attention import Kernel
from sglang_gen.parallel.sequence import KernelWithLSE
from sglang_gen.types import Plan

SDPA_KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


@dataclass(frozen=True)
class Package:
    """A kernel from another package: the module, how to install it, and the name of the function."""

    module: str
    origin: str
    function: str
    heads_first: bool  # q, k, v as [B, H, L, D]; otherwise [B, L, H, D]
    exact: bool


KERNEL_PACKAGES = {
    "flash_attn": Package("flash_attn", "pip install flash-attn", "flash_attn_func", heads_first=False, exact=True),
    "flash_attn_3": Package(
        "flash_attn_interface", "built from flash-attention/hopper", "flash_attn_func", heads_first=False, exact=True
    ),
    "sage": Package("sageattention", "pip install sageattention", "sageattn", heads_first=True, exact=False),
}
ONEDNN = "onednn"  # of this package, on a CPU
CUDNN_ANY_LENGTH = 91500  # cuDNN 9.15: older versions return a wrong log-sum-exp at lengths that 128 does not divide
MOST_SCORES = 2**28  # auto tries `math`, which materializes the scores, up to this many bytes


@dataclass(frozen=True)
class Choice:
    """A kernel and the name under which the run record shows it."""

    name: str
    kernel: Kernel


def legal(device: str, dtype: torch.dtype, masked: bool = False) -> list[str]:
    """Values of `attention.backend` that run on this machine, with a mask if `masked`."""
    inside = [name for name in SDPA_KERNELS if runs(name, device, dtype, masked)]
    onednn = [ONEDNN] if _onednn_runs(device, dtype) else []
    others = [*onednn, *(name for name in KERNEL_PACKAGES if _usable(name, device, dtype)), "flex"]
    return ["auto", "sdpa", *inside, *([] if masked else others)]


def timed_by_shape(plan: Plan) -> bool:
    """Whether the kernel is the fastest on the run's shapes: with attention=auto, unless the run is in float32.

    There auto keeps torch's default kernel, as diffusers does, so that rounding matches; if oneDNN computes the float32
    products, rounding differs anyway. Among ranks of a ring only kernels that return a log-sum-exp are timed.
    """
    attention = plan.run.attention
    same_rounding = plan.dtype == "float32" and plan.matmul == "torch"
    return attention.backend == "auto" and not attention.backend_config and not same_rounding


def choose(
    attention: Attention,
    device: str,
    dtype: torch.dtype,
    grids: Iterable[sparse_attention.Grid],
    masked: bool = False,
) -> Choice:
    """The kernel for these settings; torch's own choice for `auto`. `grids` are the token grids of flex patterns.

    Raises UserError, with the names that run here, for an unknown or unsupported kernel or settings it does not take,
    and for a kernel that takes no mask if `masked`.
    """
    name = attention.backend
    if name in ("auto", "sdpa"):
        order = priority(attention.backend_config, device, dtype, masked)
        return Choice(f"sdpa({', '.join(order)})", inside_sdpa(order)) if order else sdpa()
    if name == "flex" and masked:
        raise UserError(_takes_no_mask(name, device, dtype))
    if name == "flex":
        pattern = sparse_attention.parse(attention.backend_config)
        return Choice(f"flex({pattern.describe()})", sparse_attention.kernel(pattern, grids, device))
    if attention.backend_config:
        raise UserError(
            f"attention.backend_config: the kernel '{name}' takes no settings; sdpa takes 'priority', flex a pattern"
        )
    if name in KERNEL_PACKAGES and importlib.util.find_spec(KERNEL_PACKAGES[name].module) is None:
        package = KERNEL_PACKAGES[name]
        wanting = f"'{name}' needs the package {package.module} ({package.origin})"
        raise UserError(f"attention.backend: {wanting}; legal here: {', '.join(legal(device, dtype, masked))}")
    if name not in (*SDPA_KERNELS, *KERNEL_PACKAGES, ONEDNN):
        names = legal(device, dtype, masked)
        unknown = f"the native engine has no kernel '{name}'{nearest(name, names)}"
        raise UserError(f"attention.backend: {unknown} (legal here: {', '.join(names)})")
    if not _runs_here(name, device, dtype):
        names = legal(device, dtype, masked)
        raise UserError(f"attention.backend: '{name}' does not run here; legal: {', '.join(names)}")
    if masked and (name not in SDPA_KERNELS or not runs(name, device, dtype, masked)):
        raise UserError(_takes_no_mask(name, device, dtype))
    return named(name)


def _runs_here(name: str, device: str, dtype: torch.dtype) -> bool:
    if name == ONEDNN:
        return _onednn_runs(device, dtype)
    return (_usable if name in KERNEL_PACKAGES else runs)(name, device, dtype)


def _onednn_runs(device: str, dtype: torch.dtype) -> bool:
    return device == "cpu" and onednn_attention.runs(dtype)


def _takes_no_mask(name: str, device: str, dtype: torch.dtype) -> str:
    names = ", ".join(legal(device, dtype, masked=True))
    return f"attention.backend: '{name}' takes no mask, and this model masks the padding of its texts; legal: {names}"


def named(name: str) -> Choice:
    """A kernel without settings that is known to run here."""
    if name == "sdpa":
        return sdpa()
    if name in SDPA_KERNELS:
        return Choice(name, inside_sdpa([name]))
    if name == ONEDNN:
        return Choice(name, onednn_attention.attend)
    return Choice(name, _packaged(KERNEL_PACKAGES[name]))


def kernel_with_lse(
    name: str, device: str, dtype: torch.dtype, masked: bool = False, aligned: bool = False
) -> KernelWithLSE | None:
    """The kernel of that name as a function that also returns the log-sum-exp of its scores; None if it cannot.

    It takes a mask if `masked`. `aligned` says that 128 divides all lengths, which old versions of cuDNN need.
    """
    if name == "math":
        return _math_with_lse
    if name == ONEDNN:
        return onednn_attention.attend_with_lse
    if device == "cpu":
        return _cpu_flash_with_lse if name in ("sdpa", "flash") else None
    half = dtype.itemsize == 2
    if name == "sdpa":
        name = "flash" if half and not masked and runs("flash", device, dtype) else "efficient"
    if masked:
        return _efficient_with_lse if name == "efficient" else None
    if name == "cudnn" and not (aligned or _cudnn_version() >= CUDNN_ANY_LENGTH):
        return None
    half_only = {"flash": _flash_with_lse, "cudnn": _cudnn_with_lse} if half else {}
    return {**half_only, "efficient": _efficient_with_lse}.get(name)


def _cudnn_version() -> int:
    return torch.backends.cudnn.version() or 0  # type: ignore[no-untyped-call]


def aligned(shapes: Iterable[tuple[Any, ...]]) -> bool:
    """Whether 128 divides the lengths of all calls that return a log-sum-exp."""
    return all(length % 128 == 0 for shape in shapes if "lse" in shape for length in shape[2:4])


def _math_with_lse(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)  # scores lose precision in bfloat16 and overflow in float16
    scores = (q.to(wide) * q.shape[-1] ** -0.5) @ k.to(wide).mT
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    lse = scores.logsumexp(dim=-1)
    return ((scores - lse[..., None]).exp() @ v.to(wide)).to(v.dtype), lse


def _cpu_flash_with_lse(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, lse = flash(q, k, v) if mask is None else flash(q, k, v, attn_mask=_bias(mask, q.dtype))
    return out, lse


def _flash_with_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)
    return out, lse


def _cudnn_with_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)
    return out, lse.view(q.shape[:3])  # [B, H, L, 1]


def _efficient_with_lse(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    bias = None
    if mask is not None:  # its rows must begin at multiples of 16 bytes
        keys = k.shape[2]
        padded = F.pad(_bias(mask, q.dtype), (0, -keys % 16))
        bias = padded[..., :keys].expand(*q.shape[:3], keys)
    out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, True)
    return out, lse[..., : q.shape[2]]  # the kernel pads the log-sum-exp to a multiple of 32


def _bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask as what is added to the scores: 0 or -inf."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, -math.inf)


def sdpa() -> Choice:
    return Choice("sdpa", scaled_dot_product_attention)


def candidates(shapes: Iterable[tuple[Any, ...]], device: str, dtype: torch.dtype) -> list[str]:
    """Exact kernels that `auto` times for calls of these shapes; torch's own choice comes first.

    A shape is `(B, H, L, S, D)`, followed by "masked" for a call with a mask, which each kernel must take, and by "lse"
    for a call whose log-sum-exp is merged.
    On a CPU torch chooses flash if it runs, so it is not listed again.
    """
    shapes = list(shapes)
    masked = any("masked" in shape for shape in shapes)
    scores = max(b * h * length * keys * dtype.itemsize for b, h, length, keys, *_ in shapes)
    without = {"math"} if scores > MOST_SCORES else set()
    inside = SDPA_KERNELS.keys() - without - ({"flash"} if device == "cpu" else set())
    usable = [name for name in sorted(inside) if runs(name, device, dtype, masked)]
    if masked:
        return ["sdpa", *usable]
    packages = [name for name in KERNEL_PACKAGES if KERNEL_PACKAGES[name].exact and _usable(name, device, dtype)]
    onednn = [ONEDNN] if _onednn_runs(device, dtype) else []
    return ["sdpa", *usable, *onednn, *(name for name in packages if _imports(KERNEL_PACKAGES[name]))]


def priority(config: Mapping[str, Any], device: str, dtype: torch.dtype, masked: bool = False) -> list[str]:
    """The kernels that sdpa may use, in order, from `{"priority": ["cudnn", "flash"]}`. Raises UserError.

    With `masked` they must take a mask.
    """
    for key in config:
        if key in sparse_attention.KEYS:
            raise UserError(f"attention.backend_config: '{key}' is a setting of flex; add attention=flex")
        if key != "priority":
            raise UserError(f"attention.backend_config: unknown key '{key}'{nearest(key, ['priority'])}")
    order = config.get("priority", [])
    usable = [name for name in SDPA_KERNELS if runs(name, device, dtype, masked)]
    if not isinstance(order, list) or any(name not in usable for name in order):
        kernels = "kernels that run here and take the mask of padded texts" if masked else "kernels that run here"
        raise UserError(f"attention.backend_config: 'priority' is a list of {kernels}: {', '.join(usable)}")
    return order


def runs(name: str, device: str, dtype: torch.dtype, masked: bool = False) -> bool:
    """True if this kernel of scaled_dot_product_attention computes a small problem on this device in this dtype.

    With `masked` the problem has a mask.
    """
    tensor = torch.zeros(1, 1, 16, 32, device=device, dtype=dtype)
    mask = [torch.ones(1, 1, 1, 16, device=device, dtype=torch.bool)] if masked else []
    with warnings.catch_warnings(action="ignore"):  # torch warns why a kernel is not available
        # The first call on a GPU sets torch's kernel order for the process (cuDNN first on Hopper). If it happened
        # inside `only`, the previous order would be restored afterwards and torch would never choose cuDNN again.
        scaled_dot_product_attention(tensor, tensor, tensor)
        try:
            inside_sdpa([name])(tensor, tensor, tensor, *mask)
        except RuntimeError:
            return False
    return True


def inside_sdpa(order: list[str]) -> Kernel:
    """scaled_dot_product_attention restricted to these of its kernels, in order of preference."""

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        with only(order):
            if mask is None:
                return scaled_dot_product_attention(q, k, v)
            return scaled_dot_product_attention(q, k, v, mask)

    return attend


def only(order: list[str]) -> AbstractContextManager[Any]:
    """Restrict scaled_dot_product_attention to these of its kernels, in order of preference, inside the context."""
    kernels = [SDPA_KERNELS[name] for name in order]
    return sdpa_kernel(kernels, set_priority=len(kernels) > 1)


def _usable(name: str, device: str, dtype: torch.dtype) -> bool:
    """Whether a package is installed and its kernels, which are CUDA kernels in half precision, fit the run."""
    return (
        device == "cuda"
        and dtype in (torch.float16, torch.bfloat16)
        and importlib.util.find_spec(KERNEL_PACKAGES[name].module) is not None
    )


def _imports(package: Package) -> bool:
    """Whether an installed package can be imported; one that was built for another torch version cannot."""
    try:
        return hasattr(importlib.import_module(package.module), package.function)
    except (ImportError, OSError, RuntimeError):
        return False


def _packaged(package: Package) -> Kernel:
    function = getattr(importlib.import_module(package.module), package.function)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if package.heads_first:
            return _tensor(function(q, k, v))
        return _tensor(function(*(x.transpose(1, 2) for x in (q, k, v)))).transpose(1, 2)

    return attend


def _tensor(result: Any) -> Tensor:
    """The attention output; some package versions return it with the log-sum-exp."""
    output: Tensor = result[0] if isinstance(result, tuple) else result
    return output
