"""Files of profiler traces (perf.trace): one for each rank, in the output folder. Only older traces are replaced."""

import gzip
import re
import zlib
from pathlib import Path

from sglang_gen import files
from sglang_gen.config.schema import Run
from sglang_gen.errors import UserError

TRACE = re.compile(r"trace(\.rank\d+)?\.json\.gz")
HEAD = b'"schemaVersion"'  # among the first bytes of a trace of torch.profiler


def trace_path(folder: str, rank: int) -> Path:
    """The file of a rank: `trace.json.gz` for rank 0, `trace.rank1.json.gz` for rank 1."""
    return Path(folder) / (f"trace.rank{rank}.json.gz" if rank else "trace.json.gz")


def check_trace_paths(run: Run, ranks: int) -> None:
    """Raises UserError if a trace cannot be written or would replace another file."""
    if not run.perf.trace:
        return
    for path in (trace_path(run.output.path, rank) for rank in range(ranks)):
        files.check_file(path)
        if path.exists() and not _is_trace(path):
            raise UserError(
                f"perf.trace writes {path}, and the file of that name is not a profiler trace and would be lost; "
                "move it away or change --output-path"
            )


def _is_trace(path: Path) -> bool:
    try:
        with gzip.open(path) as file:
            return HEAD in file.read(200)
    except (OSError, EOFError, zlib.error):
        return False
