"""In place of `sglang_gen.dry_run.predictions`, whose traces take 0.1 to 0.3 s for every dump."""

from collections.abc import Mapping
from typing import Any

from sglang_gen.backends.comm_log import CommLog
from sglang_gen.dry_run import traffic
from sglang_gen.parallel.mesh import Mesh
from sglang_gen.types import Plan


def compare(plan: Plan, mesh: Mesh, log: CommLog, measured: Mapping[str, Any]) -> tuple[traffic.Stages, None]:
    return traffic.predict(plan, mesh, log) if plan.layout.ranks > 1 else {}, None
