"""Writes the prompt manifests of the embedded model that the package holds, as JSON lines of prompt and seed.

    python -m tools.landscape.manifest

Every prompt states all five attributes of a scene. The scenes are drawn from a fixed seed, and the manifest of 16
prompts is the beginning of that of 64.
"""

import json

import numpy as np

from sglang_gen.config import manifest
from tools.landscape.captions import full_caption
from tools.landscape.scene import sample_scene

SEED = 16
LENGTHS = (16, 64)


def lines(count: int) -> list[str]:
    rng = np.random.default_rng(SEED)
    return [
        json.dumps({"prompt": full_caption(sample_scene(rng), rng), "seed": index}, ensure_ascii=False)
        for index in range(count)
    ]


def main() -> None:
    for count in LENGTHS:
        path = manifest.SHIPPED / f"landscape{count}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join(lines(count)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
