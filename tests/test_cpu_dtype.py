"""dtype=auto on a CPU: the rates that decide, where they are kept, and that one decision holds for a whole run."""

import json
import sys
import time
from pathlib import Path

import pytest
import torch
from launched import COMMAND, finish, free_port, start, words
from processors import AMX, XEON, ZEN
from rank_runs import SIZE, picture, record

from sglang_gen import env
from sglang_gen.config.schema import DType
from sglang_gen.errors import UserError
from sglang_gen.launch import launcher
from sglang_gen.perf import cpu_dtype
from sglang_gen.plan import make


class Processor:
    """Stands for the measurement: gives its rates, and counts how often it was asked."""

    def __init__(self) -> None:
        self.rates, self.asked = dict(XEON), 0

    def measure(self) -> dict[str, float]:
        self.asked += 1
        return dict(self.rates)

    def next_process(self) -> None:
        cpu_dtype._rates.cache_clear()


@pytest.fixture
def processor(monkeypatch, tmp_path):
    """A processor whose rates the test sets, and an empty cache folder."""
    found = Processor()
    monkeypatch.delenv("SGLANG_GEN_CPU_DTYPE")
    monkeypatch.setenv("SGLANG_GEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cpu_dtype, "measure", found.measure)
    yield found
    found.next_process()


@pytest.mark.parametrize(
    ("backend", "rates", "dtype"),
    [
        ("sglang", XEON, "float32"),
        ("sglang", AMX, "bfloat16"),
        ("sglang", {"float32": 100.0, "float32_onednn": 90.0, "bfloat16": 90.0}, "bfloat16"),
        ("sglang", {"float32": 100.0, "float32_onednn": 90.0, "bfloat16": 89.9}, "float32"),
        ("sglang", {"float32": 40.0, "float32_onednn": 40.0, "bfloat16": 0.9}, "float32"),
        ("sglang", ZEN, "float32"),
        ("diffusers", ZEN, "bfloat16"),  # computes its products with MKL
    ],
)
def test_bfloat16_is_taken_from_nine_tenths_of_float32s_rate_on(processor, backend, rates, dtype):
    processor.rates = rates
    chosen, recorded = make.choose_dtype(DType.auto, "cpu", backend)
    assert chosen == dtype
    assert recorded == {
        "dtype_choice": {
            "float32_gflops": rates["float32"],
            "float32_onednn_gflops": rates["float32_onednn"],
            "bfloat16_gflops": rates["bfloat16"],
            "source": "measured",
        }
    }
    assert make.choose_dtype(DType.float16, "cpu", backend) == ("float16", {})
    assert processor.asked == 1


def test_the_rates_are_measured_once_for_all_processes(processor):
    assert cpu_dtype.choose(native=True).dtype == "float32"
    processor.next_process()
    processor.rates = AMX  # nobody looks again
    assert cpu_dtype.choose(native=True) == cpu_dtype.Choice("float32", XEON, "measured")
    assert processor.asked == 1


@pytest.mark.parametrize("fact", ["processor", "flags", "cores", "threads", "torch"])
def test_another_machine_in_the_same_home_folder_measures_anew(processor, monkeypatch, fact):
    cpu_dtype.choose(native=True)
    match fact:
        case "processor":
            monkeypatch.setattr(env, "cpu", lambda: ("another processor", frozenset()))
        case "flags":
            name = env.cpu()[0]
            monkeypatch.setattr(env, "cpu", lambda: (name, frozenset({"amx_bf16"})))
        case "cores":
            monkeypatch.setattr(env, "cpu_count", lambda: 1000)
        case "threads":
            monkeypatch.setattr(torch, "get_num_threads", lambda: 1000)
        case "torch":
            monkeypatch.setattr(torch, "__version__", "1.0")
    processor.rates = AMX
    assert cpu_dtype.choose(native=True).dtype == "bfloat16"
    assert processor.asked == 2


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", '{"float32": 100.0}', '{"float32": 100.0, "bfloat16": "fast"}',
     '{"float32": NaN, "bfloat16": 100.0}', '{"float32": 0.0, "bfloat16": 100.0}', "\x00"],
)  # fmt: skip
def test_a_damaged_file_of_rates_is_measured_and_written_again(processor, tmp_path, content):
    cpu_dtype.choose(native=True)
    (file,) = (tmp_path / "cache" / "dtype").iterdir()
    file.write_text(content)
    processor.next_process()
    assert cpu_dtype.choose(native=True).dtype == "float32"
    assert processor.asked == 2
    assert json.loads(file.read_text()) == XEON
    assert list(file.parent.iterdir()) == [file]  # nothing temporary stays


def test_a_cache_folder_that_cannot_be_written_is_measured_once_in_a_process(processor, monkeypatch):
    Path("taken").write_text("a file")
    monkeypatch.setenv("SGLANG_GEN_CACHE", "taken")
    assert [cpu_dtype.choose(native=True).dtype for _ in range(3)] == ["float32"] * 3
    assert processor.asked == 1


def test_a_run_that_was_measuring_at_the_same_time_decides_for_both(processor, monkeypatch):
    def slower() -> dict[str, float]:
        path = cpu_dtype._cache_file()
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(AMX))  # the other run was done first
        return XEON

    monkeypatch.setattr(cpu_dtype, "measure", slower)
    assert cpu_dtype.choose(native=True).dtype == "bfloat16"
    assert json.loads(cpu_dtype._cache_file().read_text()) == AMX


def test_the_rates_are_kept_in_the_users_cache_folder(processor, monkeypatch, tmp_path):
    monkeypatch.delenv("SGLANG_GEN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    cpu_dtype.choose(native=True)
    assert len(list((tmp_path / "xdg" / "sglang-gen" / "dtype").iterdir())) == 1


def test_the_variable_says_what_auto_is_and_nothing_is_measured(processor, monkeypatch):
    monkeypatch.setenv("SGLANG_GEN_CPU_DTYPE", "bfloat16")
    assert cpu_dtype.choose(native=True) == cpu_dtype.Choice("bfloat16", {}, "SGLANG_GEN_CPU_DTYPE")
    monkeypatch.setenv("SGLANG_GEN_CPU_DTYPE", "float16")
    with pytest.raises(UserError, match="SGLANG_GEN_CPU_DTYPE is 'float16'; it must be float32 or bfloat16"):
        cpu_dtype.choose(native=True)
    assert processor.asked == 0


@pytest.mark.parametrize(
    ("words", "times"),
    [
        (("--cfg", "job"), 0),
        (("dry_run=true",), 1),
        (("dry_run=true", "--dtype", "bfloat16"), 0),
    ],
)
def test_only_what_needs_the_dtype_measures(processor, sglang, pipelines, words, times):
    assert sglang("generate", "--help").code == 0
    done = sglang("generate", "--model-path", pipelines["sd15"], "--prompt", "a", *words)
    assert done.code == 0, done.err
    assert processor.asked == times


def test_a_dry_run_shows_the_dtype_and_the_rates(processor, sglang, pipelines):
    done = sglang("generate", "--model-path", pipelines["sd15"], "--prompt", "a", "dry_run=true")
    rows = dict(line.split("  ", 1) for line in done.out.splitlines())
    assert rows["dtype"].strip() == "auto  ->  float32"
    assert rows["dtype=auto chosen by"].strip() == (
        "float32_gflops 332.0, float32_onednn_gflops 320.0, bfloat16_gflops 189.0, source measured"
    )
    assert rows["float32 products by"].strip() == "torch"


@pytest.mark.whole
def test_a_record_gives_its_dtype_on_a_machine_with_other_rates(processor, sglang, pipelines):
    run = ("generate", "--model-path", pipelines["sd15"], "--prompt", "a", "--height", 32, "--width", 32,
           "--num-inference-steps", 2)  # fmt: skip
    processor.rates = AMX
    assert sglang(*run, "--output-path", "first").code == 0
    assert record("first")["effective"]["dtype"] == "bfloat16"
    assert record("first")["effective"]["dtype_choice"]["bfloat16_gflops"] == 470.0
    assert processor.asked == 1  # the plan is made twice
    processor.next_process()
    cpu_dtype._cache_file().unlink()
    processor.rates = XEON
    assert sglang("generate", "--config", "first/generated_image_0.json", "--output-path", "again").code == 0
    assert record("again")["effective"]["dtype"] == "bfloat16"
    assert "dtype_choice" not in record("again")["effective"]
    assert (picture("again", 0) == picture("first", 0)).all()
    assert sglang(*run, "--output-path", "other").code == 0
    assert record("other")["effective"]["dtype"] == "float32"


def test_the_ranks_compute_in_the_dtype_of_their_launcher(monkeypatch, sglang, pipelines, pool):
    """The ranks' own environment says float32."""
    monkeypatch.setattr(launcher, "open_ranks", pool.open)
    with pool.open(2, "cpu"):
        pass
    monkeypatch.setenv("SGLANG_GEN_CPU_DTYPE", "bfloat16")
    done = sglang("generate", "--model-path", pipelines["sd15"], "--prompt", "a", *SIZE[:4], "--seed", 7,
                  "--num-inference-steps", 2, "parallel=dp2", "--num-samples", 2)  # fmt: skip
    assert done.code == 0, done.err
    assert [record("outputs", number)["effective"]["dtype"] for number in range(2)] == ["bfloat16"] * 2


@pytest.mark.slow
def test_on_several_machines_the_first_decides(pipelines):
    port, ranks = free_port(), []
    for rank, dtype in enumerate(("bfloat16", "float32")):
        place = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        run = ["auto" if word == "float32" else word for word in words(pipelines["sd15"], "parallel=tp2")]
        ranks.append(start([sys.executable, *COMMAND, *run], SGLANG_GEN_CPU_DTYPE=dtype, **place))
    codes, lines = finish(*ranks)
    assert codes == [0, 0], lines
    assert record("outputs")["effective"]["dtype"] == "bfloat16"


def test_the_measurement_is_plausible_and_short():
    """Half a second holds on a processor that emulates bfloat16, and beside other work."""
    torch.ones(2, 2) @ torch.ones(2, 2)
    generator = torch.get_rng_state()
    started = time.process_time()
    rates = cpu_dtype.measure()
    assert time.process_time() - started < 0.5
    assert set(rates) == {"float32", "float32_onednn", "bfloat16"}
    assert all(0.01 < rate < 1e6 for rate in rates.values())
    assert torch.equal(torch.get_rng_state(), generator)  # the run's noise is untouched


@pytest.mark.parametrize(
    ("gflops", "largest"),
    [
        ({"float32": 40.0, "float32_onednn": 40.0, "bfloat16": 0.9}, 128),  # emulated: no larger product is asked for
        ({"float32": 107.0, "float32_onednn": 240.0, "bfloat16": 470.0}, 512),
        ({"float32": 1.0, "float32_onednn": 1.0, "bfloat16": 1.0}, 128),
        ({"float32": 5000.0, "float32_onednn": 9000.0, "bfloat16": 20000.0}, 2048),
    ],
)
def test_products_grow_only_as_far_as_time_allows(monkeypatch, gflops, largest):
    clock, sizes = [0.0], []

    def seconds(size: int) -> dict[str, float]:
        sizes.append(size)
        found = {name: 2 * size**3 / rate / 1e9 for name, rate in gflops.items()}
        clock[0] += (1 + cpu_dtype.DTYPE_ROUNDS) * sum(found.values())
        return found

    monkeypatch.setattr(cpu_dtype, "_seconds", seconds)
    monkeypatch.setattr(cpu_dtype.time, "perf_counter", lambda: clock[0])
    rates = cpu_dtype.measure()
    assert sizes[-1] == largest
    assert clock[0] < 0.5
    assert rates == pytest.approx(gflops, rel=0.01)
