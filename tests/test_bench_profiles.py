"""The profile of a denoising step: every operator has a kind, and the kinds are all of the time."""

import pytest
import torch
from little_work import LITTLE, Uncompiled

from tools.bench import network_entries, profiles


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("aten::mkldnn_convolution", "convolutions"),
        ("aten::addmm", "products"),
        ("mkldnn::_linear_pointwise", "products"),
        ("nvjet_tst_128x256_64x4_2x1_v_bz_TNT", "products"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("void pytorch_flash::flash_fwd_kernel", "attention"),
        ("graph_0_cpp_fused_add_gelu_3", "fused loops"),
        ("triton_poi_fused_convolution_mul_1", "fused loops"),
        ("aten::native_group_norm", "norms"),
        ("aten::silu", "activations"),
        ("aten::copy_", "copies"),
        ("aten::mul", "other loops"),
    ],
)
def test_the_kind_of_an_operator(name, kind):
    assert profiles.kind_of(name) == kind


def test_the_shares_of_a_network_are_all_of_its_time(monkeypatch):
    monkeypatch.setattr(network_entries, "Compiled", Uncompiled)
    lines = profiles.measured(LITTLE, "cpu", torch.float32).splitlines()
    ours = [f"| {network_entries.ours_name(torch.float32, mode)}" for mode in network_entries.MODES]
    assert [line.split(" | ")[0] for line in lines[2:]] == [*ours, "| diffusers"]
    products = []
    for line in lines[2:]:
        shares = [float(cell.rstrip("% ")) for cell in line.strip("| ").split(" | ")[2:]]
        assert sum(shares) == pytest.approx(100, abs=0.1 * len(shares) + 0.8)
        products.append(shares[lines[0].split(" | ").index("products") - 2])
    assert max(products) > 1  # not each: the machine may pause for longer than this network computes
