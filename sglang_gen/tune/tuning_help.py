"""The help page of `sglang tune`."""

from sglang_gen.tune.axes import TUNED_AXES
from sglang_gen.tune.tuning_options import DEFAULT_BUDGET

_AXES = "\n".join(f"{'':4}{axis.name:12}{axis.meaning}" for axis in TUNED_AXES if axis.by_default)
_OTHERS = "\n".join(f"{'':4}{axis.name:12}{axis.meaning}" for axis in TUNED_AXES if not axis.by_default)

TUNE_HELP = f"""\
usage: sglang tune --min-psnr DB [options] [flags and overrides of sglang generate]

Find the fastest configuration whose worst image, over the prompts of a manifest, keeps a PSNR against the images of the
base configuration without approximations. The base is the request itself; what the request sets is not searched.
Candidates are planned, then measured beside the base until the budget is spent. The result is an experiment file, which
sglang generate takes as experiment=NAME, and a report with all candidates.

Examples:
  sglang tune --min-psnr 34
  sglang tune --min-psnr 34 --max-memory 4GB --budget 20m model=sdxl parallel=single quality.manifest=prompts.jsonl
  sglang tune --min-psnr 34 --axes dtype,compile --baseline "backend=diffusers dtype=float32"
  sglang tune --min-psnr 34 dry_run=true

options:
  --min-psnr DB         PSNR in dB that every image must keep
  --max-memory AMOUNT   peak memory of a rank that no candidate may exceed, such as 4GB (of the GPU, else of the host)
  --budget TIME         no measurement starts after this time, such as 90s, 20m or 1h30m (default: {DEFAULT_BUDGET})
  --time CLOCK          elapsed (default), or processor: on a machine with other load, one process on a CPU
  --axes A,B            settings to search, see below
  --baseline WORDS      overrides of a configuration that is measured too, to compare with
  --name NAME           name of the experiment (default: model and bound, such as landscape_34db)
  --output-path DIR     folder of the results (default: outputs/tune/DATE)
  --config-dir DIR      folder with your own options; the experiment is written to its folder experiment
  -h, --help            show this help

axes that are searched by default:
{_AXES}
axes that --axes can name beside them:
{_OTHERS}

exit codes: 0 a configuration was found, 1 none keeps the bounds or the search failed, 2 wrong request"""
