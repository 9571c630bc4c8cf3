"""The networks of the presets as they were published: class and number of parameters, without positional tables."""

import json
from pathlib import Path

FILE = Path(__file__).resolve().parent.parent / "published_networks.json"
NETWORKS = {
    preset: {part: tuple(entry) for part, entry in parts.items()}
    for preset, parts in json.loads(FILE.read_text(encoding="utf-8")).items()
}
