"""`python -m sglang_gen ...` is `sglang ...`; so torchrun takes it: `torchrun --nproc-per-node 2 -m sglang_gen ...`."""

from sglang_gen.cli import console

console()
