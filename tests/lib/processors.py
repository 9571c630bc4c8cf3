"""Rates of matrix products of processors, in GFLOP/s, as `perf.cpu_dtype` measures them."""

XEON = {"float32": 332.0, "float32_onednn": 320.0, "bfloat16": 189.0}  # avx512_bf16 without AMX
AMX = {"float32": 100.0, "float32_onednn": 100.0, "bfloat16": 470.0}
ZEN = {"float32": 110.0, "float32_onednn": 240.0, "bfloat16": 200.0}  # MKL does not use AVX-512 there
