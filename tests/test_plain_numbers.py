"""What a header shows of quantized weights, and what is plain."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sglang_gen.hub.plain_numbers import quantized
from sglang_gen.hub.safetensors_header import read_header

WEIGHT = "blocks.0.to_q.weight"
HALF = torch.zeros(4, 4, dtype=torch.float16)
ROW = torch.zeros(4, dtype=torch.float16)
EIGHT = torch.zeros(4, 4).to(torch.float8_e4m3fn)


def shown(tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> str | None:
    save_file(tensors, "file.safetensors", metadata)
    return quantized(read_header(Path("file.safetensors")))


@pytest.mark.parametrize(
    ("tensors", "name"),
    [
        ({WEIGHT: EIGHT, "blocks.0.to_q.scale_weight": torch.ones(())}, "scaled fp8"),
        ({WEIGHT: EIGHT, "blocks.0.to_q.weight_scale": torch.ones(())}, "scaled fp8"),
        ({WEIGHT: EIGHT, "blocks.0.to_q.weight_scale_inv": torch.ones(1, 1)}, "scaled fp8"),
        ({WEIGHT: EIGHT, "blocks.0.to_q.scale": torch.ones(())}, "scaled fp8"),
        ({WEIGHT: HALF, "scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)}, "scaled fp8"),
        ({WEIGHT: HALF, "blocks.0.to_q.comfy_quant": torch.zeros(40, dtype=torch.uint8)}, "comfy_quant"),
        ({WEIGHT: torch.zeros(8, 1, dtype=torch.uint8), f"{WEIGHT}.absmax": torch.ones(1)}, "uint8|U8|bitsandbytes"),
        ({f"{WEIGHT}.quant_state.bitsandbytes__nf4": torch.zeros(3, dtype=torch.uint8)}, "bitsandbytes"),
        ({WEIGHT: torch.zeros(4, 4, dtype=torch.int8)}, "I8"),
        ({WEIGHT: torch.zeros(4, 4, dtype=torch.int64)}, "I64"),
        ({"blocks.0.to_q.bias": torch.zeros(4, dtype=torch.int32)}, "I32"),
        ({"blocks.0.to_q.qweight": torch.zeros(4, 4, dtype=torch.int32)}, "GPTQ"),
        ({"blocks.0.to_q.weight._data": torch.zeros(4, 4, dtype=torch.int8)}, "quanto"),
        ({"blocks.0.packed": torch.zeros(4, 4, dtype=torch.uint8)}, "U8"),
    ],
)
def test_quantized_tensors_are_told_by_name_or_by_dtype(tensors, name):
    found = shown(tensors)
    assert found is not None
    assert any(part in found for part in name.split("|"))


@pytest.mark.parametrize("key", ["quantization_config", "_quantization_metadata"])
def test_a_declaration_in_the_metadata_is_enough(key):
    assert key in str(shown({WEIGHT: HALF}, {key: '{"quant_method": "x"}'}))


@pytest.mark.parametrize(
    "tensors",
    [
        {WEIGHT: HALF, "blocks.0.norm_q.weight": ROW},
        {WEIGHT: EIGHT, "blocks.0.to_q.bias": ROW},  # a cast that nothing scales
        {WEIGHT: EIGHT, "blocks.0.norm.query_norm.scale": ROW},  # a norm of FLUX
        {"embeddings.position_ids": torch.arange(77)[None], "embeddings.weight": HALF},
        {"norm.num_batches_tracked": torch.tensor(3), "model_ema.num_updates": torch.tensor(3)},
        {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)},
    ],
)
def test_plain_numbers_and_their_buffers_are_let_through(tensors):
    assert shown(tensors) is None
