#!/usr/bin/env bash
# Build the wheel, install it into a new virtual environment, and run it outside the checkout.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m build --wheel --outdir "$work/dist" "$root" > "$work/build.log" || { cat "$work/build.log"; exit 1; }
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --constraint "$root/constraints.txt" torch
"$work/venv/bin/python" -m pip install --quiet --constraint "$root/constraints.txt" "$work"/dist/*.whl
cd "$work"
"$work/venv/bin/sglang" generate --help > help.txt
grep -q -- --num-inference-steps help.txt
"$work/venv/bin/sglang" generate --prompt "A serene landscape with mountains and a lake at sunset" --seed 42 --num-inference-steps 4
"$work/venv/bin/python" - <<'PY'
import json
from PIL import Image
image = Image.open("outputs/generated_image_0.png")
record = json.load(open("outputs/generated_image_0.json"))
assert image.size[0] >= 128 and image.getextrema()[0][1] > image.getextrema()[0][0], image.size
assert record["run"]["sampling"]["seed"] == 42
PY
echo "wheel smoke test: passed"
