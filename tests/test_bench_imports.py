"""The table of import times by package."""

from collections import Counter

import pytest

from tools.bench import imports

LOG = """\
import time: self [us] | cumulative | imported package
import time:    200000 |     200000 |     json.decoder
import time:    100000 |     300000 |   json
import time:   1500000 |    1500000 |   torch._C
import time:    500000 |    2300000 | torch
INFO: Model loaded successfully
import time:     10000 |      10000 | yaml
"""


def test_modules_count_for_their_package_with_the_time_of_their_own_code():
    assert imports.by_package(LOG) == pytest.approx({"standard library": 0.3, "torch": 2.0, "yaml": 0.01})


def test_a_table_has_the_medians_and_sums_small_packages():
    ours = [Counter({"torch": value, "yaml": 0.01, "json": 0.02}) for value in (1.0, 3.0, 2.0)]
    theirs = [Counter({"torch": 1.0, "peft": 0.5})]
    assert imports.table({"ours": ours, "theirs": theirs}).splitlines()[2:] == [
        "| torch | 2.00 | 1.00 |", "| peft | 0.00 | 0.50 |", "| 2 others | 0.03 | 0.00 |", "| all | 2.03 | 1.50 |",
    ]  # fmt: skip
