"""The clock of a run, by a time and a memory that the tests set: stages, steps, waiting for the device, peaks."""

import pytest

from sglang_gen.perf import clock, memory
from sglang_gen.perf.clock import Clock, Timer, timer
from sglang_gen.perf.memory import Checkpoint, Memory


class Watched:
    """Memory that was at these peaks when it is asked."""

    def __init__(self, *peaks: float) -> None:
        self.peaks = list(peaks)

    def checkpoint(self) -> Checkpoint:
        return Checkpoint(1.0, 2.0, self.peaks.pop(0), None, 4.0)


@pytest.fixture
def now(monkeypatch) -> list[float]:
    """The time in seconds, which passes where the test says so."""
    seconds = [100.0]
    monkeypatch.setattr(clock.time, "perf_counter", lambda: seconds[0])
    return seconds


def test_a_stage_that_is_entered_again_adds_to_its_time_and_keeps_its_higher_peak(now):
    clock = Clock(timer("cpu"), Watched(30.0, 20.0, 10.0))
    for stage, seconds in (("latents", 1.0), ("decoding", 2.0), ("latents", 4.0)):
        clock.enter(stage)
        now[0] += seconds
    clock.leave()
    now[0] += 50.0  # of no stage
    clock.leave()
    assert clock.stages_ms == pytest.approx({"latents": 5000, "decoding": 2000})
    assert clock.total_ms == pytest.approx(7000)
    assert [clock.checkpoints[name].peak_allocated_mb for name in ("latents", "decoding")] == [30.0, 20.0]


def test_processor_time_is_that_of_the_stages_and_waiting_has_none(now, monkeypatch):
    spent = [7.0]
    monkeypatch.setattr(clock.time, "process_time", lambda: spent[0])
    watch = Clock(timer("cpu"), Watched(0.0, 0.0))
    for stage, seconds in (("latents", 0.25), ("decoding", 0.5)):
        watch.enter(stage)
        now[0] += 10.0
        spent[0] += seconds
    watch.leave()
    spent[0] += 3.0  # of no stage
    watch.leave()
    assert (watch.cpu_ms, watch.total_ms) == pytest.approx((750, 20_000))


def test_a_stage_ends_when_the_device_has_finished_and_no_step_waits_for_it(now):
    """The device takes a second for each step, and the host queues all of them at once."""
    queued, waits = [0.0], []

    def wait() -> None:
        waits.append(len(queued))
        now[0] = 100.0 + queued[-1]

    device = Timer(wait, lambda: queued[-1], lambda start, end: 1000 * (end - start))
    clock = Clock(device, Watched(0.0, 0.0))
    clock.enter("denoising")
    for seconds in (1.0, 2.0, 4.0):
        queued.append(queued[-1] + seconds)
        clock.step()
    assert clock.steps_ms == []
    queued.append(queued[-1] + 8.0)  # behind the last step, such as a cast of the latents
    clock.leave()
    assert [duration for _, _, duration in clock.steps_ms] == pytest.approx([1000, 2000, 4000])
    assert clock.stages_ms["denoising"] == pytest.approx(15000)
    assert waits == [5]


def test_steps_are_numbered_in_each_batch_from_where_their_denoising_begins(now):
    clock = Clock(timer("cpu"), Watched(*[0.0] * 4))
    for batch in (0, 1):
        clock.batch = batch
        clock.enter("latents")
        now[0] += 7.0
        clock.enter("denoising")
        for seconds in (1.0, 2.0):
            now[0] += seconds
            clock.step()
        clock.leave()
    expected = [(0, 0, 1000), (0, 1, 2000), (1, 0, 1000), (1, 1, 2000)]
    assert [(batch, step, round(duration)) for batch, step, duration in clock.steps_ms] == expected


def test_a_peak_of_host_memory_counts_until_the_next_checkpoint(monkeypatch):
    held = [10.0]
    monkeypatch.setattr(memory, "host_anon_mb", lambda: held[0])
    watched = Memory("cpu")  # not entered, so that no thread looks
    watched._peak = 80.0
    peaks = [watched.checkpoint().peak_host_anon_mb]
    held[0] = 20.0
    peaks += [watched.checkpoint().peak_host_anon_mb for _ in range(2)]
    assert peaks == [80.0, 20.0, 20.0]


def test_merged_checkpoints_keep_what_is_held_now_and_the_higher_of_both_peaks():
    first, second = Checkpoint(1.0, 2.0, 3.0, None, 5.0), Checkpoint(10.0, 20.0, 2.0, 40.0, 50.0)
    assert second.merge(first) == Checkpoint(10.0, 20.0, 3.0, 40.0, 50.0)
    assert first.allocating(7.0).peak_allocated_mb == 7.0
    assert first.allocating(None) == first
