"""Table of the command-line flags: name, config path, section of the help page and help text.

Types and defaults are in the schema (`schema.leaves`). A test freezes the table; a setting without a flag is set as a
config key (`sampling.batch_size=4`).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Flag:
    """One flag. `path` is None only for --config, which is read before composition."""

    name: str
    path: str | None
    section: str
    help: str
    documented: bool = True  # False for the five flags that the documented command does not have

    @property
    def option(self) -> str:
        return f"--{self.name}"

    @property
    def key(self) -> str:
        """The flag as a key of a configuration file, such as model_path."""
        return self.name.replace("-", "_")


_REQUIRED = "Required arguments"
_MODEL = "Model configuration"
_SAMPLING = "Sampling parameters"
_BATCH = "Batch generation"
_PARALLEL = "Parallelism options"
_ATTENTION = "Attention backend"
_OFFLOAD = "CPU offloading"
_LORA = "LoRA adapters"
_QUANT = "Quantization"
_PERFORMANCE = "Performance options"
_OUTPUT = "Output options"
_ADVANCED = "Advanced options"

FLAGS: tuple[Flag, ...] = (
    Flag("model-path", "model.path", _REQUIRED,
         "hub id (Hugging Face; ModelScope with SGLANG_USE_MODELSCOPE=1), local folder or single safetensors file"),
    Flag("prompt", "sampling.prompt", _REQUIRED, "what to generate, taken verbatim"),
    Flag("config", None, _MODEL,
         "JSON or YAML file with model and generation parameters, or the record of an earlier run; alone it is enough"),
    Flag("model-id", "model.id", _MODEL,
         'the preset whose settings apply when the path does not tell (e.g. "Qwen-Image")'),
    Flag("backend", "backend.name", _MODEL,
         "auto (native where it can, else diffusers), sglang (native engine) or diffusers (any pipeline)"),
    Flag("trust-remote-code", "model.trust_remote_code", _MODEL, "run code that the model repository carries"),
    Flag("revision", "model.revision", _MODEL, "branch, tag or commit of the model repository"),
    Flag("negative-prompt", "sampling.negative_prompt", _SAMPLING, "what not to generate"),
    Flag("num-inference-steps", "sampling.num_inference_steps", _SAMPLING,
         "number of denoising steps, unless the preset has its own"),
    Flag("guidance-scale", "sampling.guidance_scale", _SAMPLING,
         "scale of classifier-free guidance, unless the preset has its own"),
    Flag("height", "sampling.height", _SAMPLING, "output height in pixels (default: the model's own)"),
    Flag("width", "sampling.width", _SAMPLING, "output width in pixels (default: the model's own)"),
    Flag("seed", "sampling.seed", _SAMPLING, "seed of the first sample; sample i takes seed + i (default: drawn once)"),
    Flag("image-path", "sampling.image_path", _SAMPLING, "input image, for pipelines that take one", documented=False),
    Flag("num-frames", "sampling.num_frames", _SAMPLING, "frames of a video", documented=False),
    Flag("num-samples", "sampling.num_samples", _BATCH, "number of samples per prompt"),
    Flag("num-gpus", "parallel.num_gpus", _PARALLEL, "number of ranks: GPUs, or CPU processes with device=cpu"),
    Flag("tp-size", "parallel.tp_size", _PARALLEL, "tensor parallel size"),
    Flag("sp-degree", "parallel.sp_degree", _PARALLEL, "sequence parallel degree: ring x ulysses"),
    Flag("ulysses-degree", "parallel.ulysses_degree", _PARALLEL, "Ulysses part of the sequence parallel degree"),
    Flag("ring-degree", "parallel.ring_degree", _PARALLEL, "Ring part of the sequence parallel degree"),
    Flag("dp-size", "parallel.dp_size", _PARALLEL, "number of data parallel groups"),
    Flag("dp-degree", "parallel.dp_degree", _PARALLEL,
         "GPUs in one data parallel group, inferred from the others when not given"),
    Flag("enable-cfg-parallel", "parallel.enable_cfg_parallel", _PARALLEL,
         "one rank for each branch of classifier-free guidance"),
    Flag("attention-backend", "attention.backend", _ATTENTION, "attention kernel"),
    Flag("attention-backend-config", "attention.backend_config", _ATTENTION, "settings of that kernel (JSON)"),
    Flag("cache-dit-config", "cache.cache_dit_config", _ATTENTION, "cache-dit settings (JSON, or a JSON or YAML file)"),
    Flag("dit-cpu-offload", "offload.dit_cpu_offload", _OFFLOAD, "keep the denoising network on the CPU between uses"),
    Flag("dit-layerwise-offload", "offload.dit_layerwise_offload", _OFFLOAD,
         "stream the denoising network layer by layer"),
    Flag("text-encoder-cpu-offload", "offload.text_encoder_cpu_offload", _OFFLOAD,
         "keep the text encoders on the CPU between uses"),
    Flag("image-encoder-cpu-offload", "offload.image_encoder_cpu_offload", _OFFLOAD,
         "keep the image encoder on the CPU between uses"),
    Flag("vae-cpu-offload", "offload.vae_cpu_offload", _OFFLOAD, "keep the VAE on the CPU between uses"),
    Flag("lora-path", "lora.path", _LORA, "LoRA weights: file, folder or hub id"),
    Flag("lora-nickname", "lora.nickname", _LORA, "name of the adapter"),
    Flag("lora-scale", "lora.scale", _LORA, "strength of the adapter (e.g. 0.125 for Hyper-SD)"),
    Flag("lora-target-modules", "lora.target_modules", _LORA,
         'modules that take the adapter, by comma ("q_proj,k_proj")'),
    Flag("transformer-weights-path", "quant.transformer_weights_path", _QUANT,
         "weights of the denoising network, plain or quantized: a safetensors or GGUF file, or a folder"),
    Flag("nunchaku-config", "quant.nunchaku_config", _QUANT, "SVDQuant settings (JSON, or a JSON or YAML file)"),
    Flag("enable-torch-compile", "compile.enable_torch_compile", _PERFORMANCE,
         "compile the network with torch.compile"),
    Flag("warmup", "compile.warmup", _PERFORMANCE, "run untimed steps on the run's own shapes first"),
    Flag("warmup-steps", "compile.warmup_steps", _PERFORMANCE, "denoising steps of the warmup"),
    Flag("disable-autocast", "compile.disable_autocast", _PERFORMANCE,
         "compute in the dtype of the stored weights, without mixed precision"),
    Flag("dtype", "dtype", _PERFORMANCE, "auto, float32, bfloat16 or float16", documented=False),
    Flag("output-path", "output.path", _OUTPUT, "folder for generated files"),
    Flag("perf-dump-path", "output.perf_dump_path", _OUTPUT, "JSON file for the performance metrics of the run"),
    Flag("fps", "output.fps", _OUTPUT, "frames per second of a video file", documented=False),
    Flag("log-level", "log_level", _OUTPUT, "debug, info, warning or error; debug shows tracebacks", documented=False),
    Flag("diffusers-kwargs", "backend.diffusers_kwargs", _ADVANCED,
         'further arguments of the diffusers pipeline (JSON: \'{"eta": 0.5}\')'),
    Flag("component-paths", "model.component_paths", _ADVANCED,
         'paths of single components (JSON: \'{"vae": "path/to/vae"}\')'),
    Flag("pipeline-class-name", "model.pipeline_class_name", _ADVANCED,
         "pipeline class, in place of the one in model_index.json"),
)  # fmt: skip

BY_KEY: dict[str, Flag] = {flag.key: flag for flag in FLAGS}
BY_PATH: dict[str, Flag] = {flag.path: flag for flag in FLAGS if flag.path}

FILE_OR_INLINE = ("cache.cache_dit_config", "quant.nunchaku_config")  # take JSON or the name of a file
