"""Writes the report of the first minutes on a GPU.

    make gpu-first                                                   # on a GPU, within 8 minutes
    python -m tools.gpu_first --budget 240 --only environment,rates  # less
    python -m tools.gpu_first --device cpu --size tiny               # on a CPU, to see that it works

Each section runs in a process of its own: one that fails or hangs is named in the report and does not end the others.
The exit code is 1 if a section failed.
"""

import argparse
import sys
from pathlib import Path

from tools.gpu_first import attention, environment, graphs, network, rates, runs, steps
from tools.gpu_first.sections import Section, Settings, report, run_all

# In the order of what a short budget should still give; `most` seconds of each, on networks of full size.
SECTIONS = {
    "environment": Section("environment", environment.describe, 40),
    "rates": Section("sustained matrix rate", rates.measure, 60),
    "attention": Section("attention kernels", attention.order, 90),
    "graphs": Section("CUDA graphs", graphs.compare, 90),
    "runs": Section("offloading and memory", runs.measure, 150),
    **{name: Section(f"a step of {name}", steps.of(name), 240) for name in network.NAMES},
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--size", default="full", choices=("full", "tiny"), help="of the networks")
    parser.add_argument("--budget", type=float, default=480.0, help="seconds for all sections (default 480)")
    parser.add_argument("--only", default=",".join(SECTIONS), help=f"of {', '.join(SECTIONS)}")
    parser.add_argument("--output", type=Path, default=Path("gpu_first.md"), help="the report (default gpu_first.md)")
    given = parser.parse_args(argv)
    names = given.only.split(",")
    if unknown := sorted(set(names) - SECTIONS.keys()):
        parser.error(f"--only: no section {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    outcomes = run_all([SECTIONS[name] for name in names], Settings(given.device, given.size), given.budget)
    given.output.write_text(report(outcomes, "The first minutes on this machine"), encoding="utf-8")
    print(f"Report: {given.output}")
    return int(any(outcome.result == "failed" for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
