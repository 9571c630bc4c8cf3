"""The comparison of whole generations: model folders, rounds, table and exit code; on this CPU, with tiny models."""

import json
import subprocess
import sys
from pathlib import Path
from statistics import median

import numpy as np
import pytest
from PIL import Image

from sglang_gen import env
from tools.bench import folders, pictures

SETTINGS = ("device=cpu", "dtype=auto", "perf=light", "perf.repeat=2", "compile.warmup=true")
ON_CPU = [name for name in pictures.ENTRIES if name not in pictures.ON_GPU]
FLUX: folders.Configs = {
    "transformer": {
        "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2,
        "joint_attention_dim": 32, "pooled_projection_dim": 32, "axes_dims_rope": (4, 6, 6),
    },
    "vae": pictures.TINY["vae"],
    "text_encoder": pictures.TINY["text_encoder"],
    "text_encoder_2": {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 1, "num_heads": 2},
}  # fmt: skip


@pytest.fixture
def in_process(sglang):
    """The command in this process, in place of one of its own."""

    def run(words, place: Path) -> str | None:
        place.mkdir(parents=True)
        done = sglang("generate", *words)
        return f"exit code {done.code}: {done.lines[-1]}" if done.code else None

    return run


def cells(table: str) -> dict[str, list[str]]:
    """The cells of each line by the words in its first one; the title's is empty."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")]
    assert {len(row) for row in rows} == {9}
    return {row[0].strip("`"): row[1:] for row in rows}


@pytest.mark.whole
def test_the_table_of_a_round_says_what_the_dumps_say_and_names_whoever_failed(in_process, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    told = []

    def run(words, place: Path) -> str | None:
        told.append(words)
        return in_process(words, place)

    table, code = pictures.measured(pictures.WORKS["tiny"], ON_CPU, SETTINGS, 1, tmp_path, "cpu", run)
    assert code == 1  # one of ours needs a compiler
    found = cells(table)
    for words in ("backend=sglang compile=regional", "backend=diffusers compile=full"):
        assert found[words][0].startswith("failed: exit code 2: ")
        assert "torch.compile on CPU needs a C++ compiler" in found[words][0]
    assert {frozenset(SETTINGS) <= set(words) for words in told} == {True}
    model = {words[words.index("--model-path") + 1] for words in told}
    assert model == {str(tmp_path / "model")}
    for name in ("sglang", "diffusers"):
        dump = json.loads((tmp_path / "rounds" / "1" / name / "perf.json").read_text())
        row = found[f"backend={name}"]
        stages = [{step["name"]: step["duration_ms"] / 1000 for step in times["steps"]} for times in dump["repeats"]]
        assert [set(each) - {"saving"} for each in stages] == [
            {"text_encoding", "latents", "denoising", "decoding"}
        ] * 2
        seconds = [each["denoising"] for each in stages]
        assert all(len(times["denoise_steps_ms"]) == 3 for times in dump["repeats"])
        whole = [sum(value for stage, value in each.items() if stage != "saving") for each in stages]
        peaks = [point["peak_host_anon_mb"] / 1024 for point in dump["memory_checkpoints"].values()]
        load = (dump["load"]["duration_ms"] + dump["load"]["imports_ms"]) / 1000
        assert row[0] == dump["effective"]["attention"] == "sdpa"
        assert row[1] == f"{median(seconds):.3f} ({min(seconds):.3f} to {max(seconds):.3f})"
        assert float(row[3]) == pytest.approx(median(whole), abs=2e-3)
        assert row[4:7] == [f"{max(peaks):.2f}", f"{load:.1f}", f"{dump['warmup']['duration_ms'] / 1000:.1f}"]
        assert dump["fingerprint"]["fields"]["guided"] is True
    assert found["backend=sglang"][2].startswith("1.00 (")  # nobody compiled: ours is the eager one
    assert found["backend=sglang"][7] == "identical" or float(found["backend=sglang"][7]) > 40
    assert "ours in the ratio: `backend=sglang`;" in table


@pytest.mark.whole
def test_a_model_with_a_t5_is_written_once_and_drawn_by_both_backends(in_process, tmp_path):
    checked = []
    folder = folders.write("flux_dev", tmp_path / "model", "cpu", FLUX, checked.append)
    assert [type(network).__name__ for network in checked] == ["FluxTransformer2DModel"]
    assert {str(parameter.dtype) for parameter in checked[0].parameters()} == {"torch.bfloat16"}
    index = json.loads((env.preset_configs("flux_dev") / "model_index.json").read_text())
    parts = {name for name, entry in index.items() if isinstance(entry, list)}
    assert {path.name for path in folder.iterdir()} == {"model_index.json", *parts}
    lengths = [json.loads((folder / name / "tokenizer_config.json").read_text())["model_max_length"]
               for name in ("tokenizer", "tokenizer_2")]  # fmt: skip
    assert lengths == [77, 512]
    written = (folder / "vae" / "config.json").stat().st_mtime_ns
    folders.write("flux_dev", folder, "cpu", FLUX, checked.append)
    assert len(checked) == 1
    assert (folder / "vae" / "config.json").stat().st_mtime_ns == written
    size = ("sampling.height=32", "sampling.width=32", "sampling.num_inference_steps=2")
    words = ("model=flux_dev", "--model-path", str(folder), "--prompt", "a lake", "--seed", "1", *size, *SETTINGS)
    assert pictures.rounds_of(words, ["sglang", "diffusers"], 1, tmp_path, in_process) == {}
    ours, theirs = (pictures.dumps_of(tmp_path, name)[0] for name in ("sglang", "diffusers"))
    assert pictures.likeness(ours, theirs) == "identical" or float(pictures.likeness(ours, theirs)) > 40
    assert np.asarray(Image.open(ours["picture"])).std() > 5  # of 255: something is drawn
    assert ours["fingerprint"]["fields"]["max_sequence_length"] == 512


def dump(seconds: list[float], commit: str = "abcdefg", gpus: tuple[str, ...] = (), device: str = "cpu") -> dict:
    """What is read of a perf dump, of pictures that took so long to denoise and as long again to decode."""

    def times(value: float) -> dict:
        steps = [{"name": name, "duration_ms": 1000 * value} for name in ("denoising", "decoding", "saving")]
        return {"total_duration_ms": 2000 * value, "steps": steps}

    point = {"peak_allocated_mb": 2048.0, "peak_host_anon_mb": 1024.0}
    return {
        "commit_hash": commit,
        "repeats": [times(value) for value in seconds],
        "memory_checkpoints": {"load": {**point, "peak_allocated_mb": None}, "denoising": point},
        "effective": {"attention": "flash", "device": device, "dtype": "bfloat16"},
        "load": {"duration_ms": 2000.0, "imports_ms": 1000.0},
        "warmup": {"duration_ms": 500.0},
        "machine": {"gpus": list(gpus), "cpu": "a processor", "cpu_count": 2, "threads": 1},
        "fingerprint": {"hash": "0"},
        "samples": [{"file": "picture.png"}],
    }


class Script:
    """Runs that write dumps with the seconds that are scripted for them, or fail."""

    def __init__(self, failing: tuple[str, ...] = (), **facts: object) -> None:
        self.failing, self.facts = failing, facts
        self.order: list[str] = []
        self.seconds = 1.0

    def __call__(self, words, place: Path) -> str | None:
        name = place.name
        self.order.append(name)
        if name in self.failing:
            return "exit code 1: out of | memory"
        place.mkdir(parents=True)
        self.seconds += 0.01
        factor = 2.0 if name.startswith("diffusers") else 1.0
        written = dump([factor * self.seconds] * 3, **self.facts)
        (place / "perf.json").write_text(json.dumps(written))
        Image.new("RGB", (4, 4)).save(place / "picture.png")
        return None


def test_competitors_take_turns_by_rounds_and_a_later_call_goes_on(tmp_path):
    script = Script()
    picture = pictures.WORKS["landscape"]
    names = ["sglang", "sglang-regional", "diffusers"]
    pictures.measured(picture, names, (), 2, tmp_path, "cpu", script)
    table, code = pictures.measured(picture, names, (), 1, tmp_path, "cpu", script)
    assert code == 0
    assert script.order == [*names, *names[1:], names[0], names[2], *names[:2]]
    assert "rounds of each: 3, of 3 images (intervals of processes)" in table
    found = cells(table)
    assert found["backend=diffusers"][0] == "flash"
    assert found["backend=diffusers"][1] == "2.100 (2.060 to 2.140)"
    assert found["backend=diffusers"][2].startswith("2.00 (1.87 to ")
    assert found["backend=diffusers"][3:] == ["4.200", "1.00", "3.0", "0.5", ""]
    assert found["backend=sglang"][7] == "identical"
    assert "ours in the ratio: `backend=sglang compile=regional`" in table
    again, _ = pictures.measured(picture, [*names, "diffusers-compile"], (), 0, tmp_path, "cpu", script)
    assert cells(again) == found | {"backend=diffusers compile=full": ["not run", *[""] * 7]}
    later = Script(commit="hijklmn")
    table, _ = pictures.measured(picture, names, (), 1, tmp_path, "cpu", later)
    assert "rounds of each: 1, of 3 images (intervals of images of one process)" in table  # not of other code
    assert "commit hijklmn." in table


def test_a_peer_that_fails_is_named_once_and_stops_nobody(tmp_path):
    script = Script(failing=("diffusers-compile",))
    table, code = pictures.measured(pictures.WORKS["landscape"], ON_CPU, (), 2, tmp_path, "cpu", script)
    assert code == 0
    assert script.order.count("diffusers-compile") == 1
    assert {script.order.count(name) for name in ON_CPU} == {1, 2}
    assert cells(table)["backend=diffusers compile=full"][0] == "failed: exit code 1: out of / memory"


def test_where_all_fail_the_table_still_names_them(tmp_path):
    script = Script(failing=tuple(ON_CPU))
    table, code = pictures.measured(pictures.WORKS["landscape"], ON_CPU, (), 2, tmp_path, "cpu", script)
    assert code == 1
    assert len(cells(table)) == 2 + len(ON_CPU)
    assert "Nothing ran." in table


@pytest.mark.parametrize(
    ("seconds", "gpus", "expected"),
    [
        (3.2, ("NVIDIA H200",), "3.3 s or less: met by `backend=sglang compile=graphs`, 3.200 s."),
        (3.4, ("NVIDIA H200",), "3.3 s or less: missed by `backend=sglang compile=graphs`, 3.400 s."),
        (3.2, ("NVIDIA H100 80GB HBM3",), "`, 3.200 s; measured on NVIDIA H100 80GB HBM3."),
        (3.2, (), "`, 3.200 s; measured on a CPU."),
    ],
)
def test_the_target_is_held_against_the_fastest_of_ours(seconds, gpus, expected):
    def made(value: float) -> list[dict]:
        return [dump([value] * 3, gpus=gpus, device="cuda") | {"picture": None}]

    found = {"sglang": made(5.0), "sglang-graphs": made(seconds)}
    table = pictures.table(found, {}, pictures.WORKS["flux_dev"].target)
    assert table.endswith(f"{expected}")
    assert cells(table)["backend=sglang"][4] == "2.00"  # of the GPU's memory
    assert "missed, none of ours ran" in pictures.table({"diffusers": made(9.0)}, {}, 3.3)


def test_the_works_ask_for_what_the_targets_are_of(composed):
    for name, steps, size, guidance in (("flux_dev", 28, 1024, 3.5), ("sdxl", 50, 1024, 7.5)):
        picture = pictures.WORKS[name]
        run = composed(*picture.words, "--prompt", pictures.PROMPT).run
        sampling = run.sampling
        found = (sampling.num_inference_steps, sampling.height, sampling.width, sampling.guidance_scale)
        assert found == (steps, size, size, guidance)
        assert picture.work().config == folders.configs(name)["unet" if name == "sdxl" else "transformer"]
    assert [pictures.WORKS[name].target for name in ("flux_dev", "sdxl", "landscape")] == [3.3, 1.6, None]


@pytest.mark.whole
def test_a_process_that_fails_is_told_with_its_code_and_its_last_line(tmp_path):
    said = pictures.generate(["--prompt", "a lake", "--num-inference-steps", "0"], tmp_path / "there")
    assert said.startswith("exit code 2: ")
    assert "sampling.num_inference_steps is 0" in said
    assert said.endswith((tmp_path / "there" / "log.txt").read_text().splitlines()[-1])


@pytest.mark.slow
def test_the_command_measures_the_tiny_work():
    words = ["--work", "tiny", "--rounds", "1", "--device", "cpu", "--only", "sglang,diffusers"]
    command = [sys.executable, "-m", "tools.bench.pictures", *words]
    done = subprocess.run(command, env=env.rank_variables(threads=1), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = cells(done.stdout)
    assert list(found)[2:] == ["backend=sglang", "backend=diffusers"]
    assert "failed" not in done.stdout
