"""`python -m sglang_gen ...` runs `sglang ...`; torchrun uses it: `torchrun --nproc-per-node 2 -m sglang_gen ...`."""

from sglang_gen.cli import console

console()
