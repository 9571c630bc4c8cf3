"""A decoded batch as bytes (safetensors), for the rank that saves."""

import json
from typing import Any

import torch
from safetensors.torch import load, save

from sglang_gen.config.schema import plain
from sglang_gen.types import Decoded, Plan


def encode(plan: Plan, decoded: Decoded | None) -> bytes:
    """The batch without the tensors that are not needed where it is saved; empty for a rank without a batch."""
    if decoded is None:
        return b""
    saved, compared = plan.run.output.latents, plan.run.perf.repeat > 1
    tensors = {"frames": torch.from_numpy(decoded.frames)}
    if saved and decoded.noise is not None:
        tensors["noise"] = decoded.noise
    if (saved or compared) and decoded.latents is not None:
        tensors["latents"] = decoded.latents
    facts = {"kind": decoded.kind, "rate": decoded.rate, "effective": plain(decoded.effective)}
    # A copy of each, because safetensors refuses tensors that share memory.
    copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    data: bytes = save(copies, metadata={"facts": json.dumps(facts)})
    return data


def decode(data: bytes) -> Decoded:
    """The batch that `encode` wrote."""
    tensors = load(data)
    length = int.from_bytes(data[:8], "little")  # of the header, which is JSON
    facts: dict[str, Any] = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["facts"])
    return Decoded(tensors["frames"].numpy(), tensors.get("noise"), tensors.get("latents"), **facts)
