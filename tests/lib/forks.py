"""The server of the standard library that forks processes for the tests, with the libraries of a rank imported."""

import multiprocessing

IMPORTED = [
    "torch.distributed", "diffusers", "transformers", "sglang_gen.backends.native.engine", "sglang_gen.launch.rank",
    "sglang_gen.launch.worker", "sglang_gen.families.text_encoder_parallel",
]  # fmt: skip


def preload() -> None:
    """Let the server import once what each process would; it starts with the first process."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(IMPORTED)
