"""Energy of a generation: RAPL counters of a fake powercap tree, a fake NVML, and the entries in the perf dump."""

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sglang_gen.launch import rank
from sglang_gen.parallel.mesh import Mesh
from sglang_gen.perf import energy
from sglang_gen.types import Layout

RANGE = 262_143_328_850  # microjoules, as most processors have it


def write_zone(root: Path, folder: str, name: str, used: int) -> Path:
    place = root / folder
    place.mkdir(parents=True)
    (place / "name").write_text(f"{name}\n")
    (place / "max_energy_range_uj").write_text(f"{RANGE}\n")
    (place / "energy_uj").write_text(f"{used}\n")
    return place


@pytest.fixture
def tree(tmp_path) -> Path:
    """Two packages with cores and memory, the whole platform, and a second interface of the first package."""
    root = tmp_path / "powercap"
    (root / "intel-rapl").mkdir(parents=True)
    for package in (0, 1):
        write_zone(root, f"intel-rapl:{package}", f"package-{package}", 1_000_000)
        write_zone(root, f"intel-rapl:{package}:0", "core", 1_000_000)
        write_zone(root, f"intel-rapl:{package}:1", "dram", 1_000_000)
    write_zone(root, "intel-rapl:2", "psys", 1_000_000)
    write_zone(root, "intel-rapl-mmio:0", "package-0", 1_000_000)
    return root


def use(root: Path, joules: float, zones: str = "*:*") -> None:
    """Advance the counters of these zones, with their wrap-around."""
    for zone in root.glob(zones):
        path = zone / "energy_uj"
        path.write_text(str((int(path.read_text()) + round(joules * 1e6)) % RANGE))


@pytest.fixture
def lines(monkeypatch) -> list[str]:
    """Lines of the debug log."""
    found: list[str] = []
    monkeypatch.setattr(energy.log, "debug", found.append)
    return found


def test_packages_and_their_memory_count_once_each(tree):
    with energy.metered("cpu", True, tree) as meter:
        with meter.generation():
            use(tree, 30)
        with meter.generation():
            use(tree, 5)
        use(tree, 100)  # outside of a generation
    assert meter.generations == [{"cpu": 60, "dram": 60}, {"cpu": 10, "dram": 10}]


def test_a_counter_that_wraps_around_keeps_counting(tree):
    for zone in ("intel-rapl:0", "intel-rapl:1"):
        (tree / zone / "energy_uj").write_text(str(RANGE - 1_000_000))
    with energy.metered("cpu", True, tree) as meter, meter.generation():
        use(tree, 30)
    assert meter.generations == [{"cpu": 60, "dram": 60}]


def test_polling_sees_each_of_several_wrap_arounds(tree, monkeypatch):
    monkeypatch.setattr(energy, "POLLING", 0.001)
    with energy.metered("cpu", True, tree) as meter, meter.generation():
        (zone, _), until = meter.counters["cpu"], time.monotonic() + 10
        for _ in range(5):  # 1.9 ranges
            use(tree, 100_000, "intel-rapl:?")
            while zone.last_uj != int((tree / "intel-rapl:0" / "energy_uj").read_text()) and time.monotonic() < until:
                time.sleep(0.001)
    assert meter.generations[0]["cpu"] == pytest.approx(2 * 500_000)


@pytest.mark.parametrize("broken", ["energy_uj", "max_energy_range_uj"])
def test_a_package_that_cannot_be_read_leaves_no_partial_sum(tree, broken, lines):
    (tree / "intel-rapl:1" / broken).unlink()
    (tree / "intel-rapl:1" / broken).mkdir()  # cannot be read, by root neither
    with energy.metered("cpu", True, tree) as meter, meter.generation():
        use(tree, 30, "*:*:1")
    assert meter.generations == [{"cpu": None, "dram": 60}]
    assert [line for line in lines if line.endswith("cannot be read: Is a directory")]


def test_counters_that_only_root_may_read_are_absent(tree, monkeypatch, lines):
    def refuse(_: energy.Zone) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(energy.Zone, "_now", refuse)
    with energy.metered("cpu", True, tree) as meter, meter.generation():
        pass
    assert meter.generations == [{"cpu": None, "dram": None}]
    assert [line.endswith("cannot be read: Permission denied") for line in lines] == [True, True]


def test_a_counter_that_fails_during_a_generation_gives_no_number(tree):
    with energy.metered("cpu", True, tree) as meter, meter.generation():
        use(tree, 30)
        (tree / "intel-rapl:0" / "energy_uj").write_text("")
    assert meter.generations == [{"cpu": None, "dram": 60}]


def test_a_machine_without_counters_gives_no_number(tmp_path):
    with energy.metered("cpu", True, tmp_path / "missing") as meter, meter.generation():
        pass
    assert meter.generations == [{"cpu": None, "dram": None}]
    assert energy.total(meter.generations, 1, "cpu") is None


class NVMLError(Exception):
    pass


@pytest.fixture
def nvml(monkeypatch) -> SimpleNamespace:
    """NVML of a machine with one GPU of this process: `joules` is its counter, `ended` whether NVML was shut down."""

    def by_uuid(uuid: str) -> str:
        if uuid != "GPU-1234":
            raise NVMLError("not found")
        return uuid

    def read(handle: str) -> int:
        if fake.joules is None:
            raise NVMLError("not supported")
        return round(1000 * fake.joules)

    fake = SimpleNamespace(
        joules=70.0, ended=False, NVMLError=NVMLError, nvmlInit=lambda: None,
        nvmlShutdown=lambda: setattr(fake, "ended", True), nvmlDeviceGetHandleByUUID=by_uuid,
        nvmlDeviceGetTotalEnergyConsumption=read,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="1234"))
    return fake


def test_each_rank_reads_its_own_gpu_and_only_the_first_the_processors(tree, nvml):
    with energy.metered("cuda", False, tree) as meter, meter.generation():
        use(tree, 30)
        nvml.joules += 12.5
    assert meter.generations == [{"gpu": 12.5}]
    assert nvml.ended
    with energy.metered("cuda", True, tree) as meter, meter.generation():
        use(tree, 30)
        nvml.joules += 1
    assert meter.generations == [{"cpu": 60, "dram": 60, "gpu": 1}]


def test_a_gpu_without_a_counter_and_a_missing_package_give_no_number(tree, nvml, monkeypatch, lines):
    nvml.joules = None
    for installed, reason in ((nvml, "not supported"), (None, "nvidia-ml-py")):
        monkeypatch.setitem(sys.modules, "pynvml", installed)
        with energy.metered("cuda", False, tree) as meter, meter.generation():
            pass
        assert meter.generations == [{"gpu": None}]
        assert reason in lines[-1]


def test_the_total_is_the_sum_over_ranks_of_the_sources_that_all_of_them_read():
    readings = [{"cpu": 10.0, "dram": 2.0, "gpu": 40.0}, {"gpu": 44.0}]
    assert energy.total(readings, 4, "cuda") == {
        "total": 96.0, "per_image": 24.0, "sources": {"cpu": 10.0, "dram": 2.0, "gpu": 84.0},
    }  # fmt: skip
    two_machines = [{"cpu": 10.0, "dram": None}, {"cpu": None, "dram": None}]
    assert energy.total(two_machines, 1, "cpu") is None
    still = [{"cpu": 0.0, "dram": 2.0}]
    assert energy.total(still, 1, "cpu") == {"total": 2.0, "per_image": 2.0, "sources": {"dram": 2.0}}
    without_one_gpu = [{"cpu": 10.0, "gpu": 40.0}, {"gpu": None}]
    assert energy.total(without_one_gpu, 1, "cuda") is None


def test_one_rank_of_each_machine_reads_its_processors(monkeypatch):
    assert [rank._first_here(Mesh(Layout(tp=2), number)) for number in (0, 1)] == [True, False]
    for number, first in ((1, False), (2, True)):  # two machines with two ranks each
        place = {"RANK": number, "WORLD_SIZE": 4, "LOCAL_RANK": number % 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": 1}
        for name, value in {**place, "MASTER_ADDR": "here"}.items():
            monkeypatch.setenv(name, str(value))
        assert rank._first_here(Mesh(Layout(tp=4), number)) is first


@pytest.fixture
def run(sglang, pipelines):
    def run(*words: str) -> dict:
        size = ("--height", "32", "--width", "32", "--num-inference-steps", "1", "--seed", "1", "--prompt", "a")
        always = ("perf=light", "--guidance-scale", "1", "--perf-dump-path", "perf.json")
        done = sglang("generate", "--model-path", pipelines["sd3"], *size, *always, *words)
        assert done.code == 0, done.err
        return json.loads(Path("perf.json").read_text())

    return run


def test_the_dump_has_the_energy_of_each_generation_and_image(run, tree, monkeypatch):
    monkeypatch.setattr(energy, "POWERCAP", tree)
    monkeypatch.setattr(energy, "POLLING", 60)
    calls = iter(range(10_000))
    monkeypatch.setattr(energy.Zone, "_now", lambda self: 3_000_000 * next(calls))  # 3 J between two readings of a zone
    dump = run("--num-samples", "2", "perf.repeat=2")
    each = 4 * 3.0  # four zones, read in turn
    assert dump["energy_j"] == {
        "total": 4 * each, "per_image": 2 * each, "sources": {"cpu": 2 * each, "dram": 2 * each},
    }  # fmt: skip
    assert [repeat["energy_j"] for repeat in dump["repeats"]] == [4 * each, 4 * each]
    assert dump["ranks"][0]["energy_j"] == {"cpu": 2 * each, "dram": 2 * each}


def test_the_energy_is_null_where_nothing_can_be_read(run, tmp_path, monkeypatch):
    monkeypatch.setattr(energy, "POWERCAP", tmp_path / "missing")
    dump = run()
    assert (dump["energy_j"], dump["repeats"][0]["energy_j"], dump["ranks"][0]["energy_j"]) == (None, None, None)
