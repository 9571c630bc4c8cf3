"""Saves generated samples and their records, in the order of the samples."""

from pathlib import Path
from typing import Any

from sglang_gen import env, files, log
from sglang_gen.config import prompt_archive
from sglang_gen.config.schema import SCHEMA_VERSION, plain
from sglang_gen.errors import RunError
from sglang_gen.outputs import input_digests
from sglang_gen.types import Decoded, Plan, Sample


class Saved:
    """Saved files and data of the batches generated so far."""

    def __init__(self, plan: Plan, effective: dict[str, Any]) -> None:
        self.plan = plan
        self.effective = effective
        self.inputs = input_digests.digests(plan.run)
        self.paths: list[Path] = []
        self.frames: list[Any] = []
        self.latents: list[Any] = []  # kept only if perf.repeat > 1 and the pipeline returns them, else None
        self.seeds: list[int] = []
        self.samples: list[dict[str, Any]] = []

    def add(self, number: int, decoded: Decoded) -> None:
        """Save the images, videos or audio files of batch `number`."""
        self.effective |= _size(self.plan, decoded)
        if "cache" in decoded.effective:  # with the number of steps that this batch reused
            self.effective["cache"] = decoded.effective["cache"]
        for row, sample in enumerate(self.plan.batches[number]):
            path = self._save(sample, decoded, row)
            log.info(f"Generated {decoded.kind} saved to: {path}")
            self.paths.append(path)
            self.frames.append(decoded.saved(row))
            self.latents.append(kept_latents(self.plan, decoded, row))
            self.seeds.append(sample.seed)
            self.samples.append({**plain(sample), "batch": number, "file": path.name})

    def _save(self, sample: Sample, decoded: Decoded, row: int) -> Path:
        plan, effective = self.plan, self.effective

        def record(name: str) -> dict[str, Any]:
            return {
                "schema_version": SCHEMA_VERSION,
                "file": name,
                "sample": plain(sample),
                "run": prompt_archive.recorded(plan.run),
                "sources": dict(plan.sources),
                "requested": dict(plan.requested),
                "effective": {**effective, **decoded.effective},
                "inputs": self.inputs,
                "versions": dict(env.versions()),
                "commit_hash": env.commit_hash(),
            }

        latents = None
        if plan.run.output.latents:
            if decoded.noise is None or decoded.latents is None:
                raise RunError(f"{plan.card.pipeline_class} does not return its latents; leave out output.latents")
            latents = {"noise": decoded.noise[row], "latents": decoded.latents[row]}
        folder, data = Path(plan.run.output.path), decoded.saved(row)
        if decoded.kind == "image":
            return files.save_image(folder, data, record, latents)
        from sglang_gen.outputs import video_audio

        if decoded.kind == "video":
            return video_audio.save_video(folder, data, effective["fps"], record, latents)
        return video_audio.save_sound(folder, data, effective["sampling_rate"], record, latents)


def kept_latents(plan: Plan, decoded: Decoded, row: int) -> Any:
    """CPU latents of one sample, kept if perf.repeat > 1; None otherwise or if the pipeline does not return them."""
    return decoded.latents[row].cpu() if plan.run.perf.repeat > 1 and decoded.latents is not None else None


def _size(plan: Plan, decoded: Decoded) -> dict[str, Any]:
    """Effective settings that describe the result: image size, number of frames, rates."""
    if decoded.kind == "audio":
        return {"sampling_rate": decoded.rate, "samples": decoded.frames.shape[-1]}
    height, width = decoded.frames.shape[-3:-1]
    size = {"height": height, "width": width}
    if decoded.kind == "video":
        from sglang_gen.outputs.video_audio import FRAMES_PER_SECOND

        size |= {"num_frames": decoded.frames.shape[1], "fps": plan.run.output.fps or FRAMES_PER_SECOND}
    return size
