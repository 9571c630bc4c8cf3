"""Table of the command-line flags: name, config path, section of the help page and help text.

Types and defaults are in the schema (`schema.leaves`). A test freezes the table; a setting without a flag is set as a
config key (`sampling.batch_size=4`).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Flag:
    """One flag. `path` is None only for --config, which is read before composition.

    `{default}` in `help` stands for the default; otherwise the help page appends it.
    """

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
         "hub id, local folder or single safetensors file (default: the embedded model)"),
    Flag("prompt", "sampling.prompt", _REQUIRED, "what to generate; passed to the model unchanged"),
    Flag("config", None, _MODEL, "JSON or YAML file with settings, or the run record of an earlier run"),
    Flag("model-id", "model.id", _MODEL, "preset whose settings apply to --model-path, such as Qwen-Image"),
    Flag("backend", "backend.name", _MODEL,
         "auto: native engine (sglang) if it supports the run, else diffusers"),
    Flag("trust-remote-code", "model.trust_remote_code", _MODEL, "allow Python code of the model repository to run"),
    Flag("revision", "model.revision", _MODEL, "branch, tag or commit of the model repository"),
    Flag("negative-prompt", "sampling.negative_prompt", _SAMPLING, "what not to generate"),
    Flag("num-inference-steps", "sampling.num_inference_steps", _SAMPLING,
         "number of denoising steps (default: {default}, unless the preset sets it)"),
    Flag("guidance-scale", "sampling.guidance_scale", _SAMPLING,
         "scale of classifier-free guidance (default: {default}, unless the preset sets it)"),
    Flag("height", "sampling.height", _SAMPLING, "height in pixels (default: the model's)"),
    Flag("width", "sampling.width", _SAMPLING, "width in pixels (default: the model's)"),
    Flag("seed", "sampling.seed", _SAMPLING, "seed of the first sample; sample i uses seed + i (default: random)"),
    Flag("image-path", "sampling.image_path", _SAMPLING, "input image for image-to-image generation", documented=False),
    Flag("num-frames", "sampling.num_frames", _SAMPLING,
         "number of frames of a video (default: the model's)", documented=False),
    Flag("num-samples", "sampling.num_samples", _BATCH, "number of samples per prompt"),
    Flag("num-gpus", "parallel.num_gpus", _PARALLEL, "number of ranks: GPUs, or CPU processes with device=cpu"),
    Flag("tp-size", "parallel.tp_size", _PARALLEL, "tensor parallel size"),
    Flag("sp-degree", "parallel.sp_degree", _PARALLEL, "sequence parallel degree: ring degree x ulysses degree"),
    Flag("ulysses-degree", "parallel.ulysses_degree", _PARALLEL, "Ulysses degree of sequence parallelism"),
    Flag("ring-degree", "parallel.ring_degree", _PARALLEL, "Ring degree of sequence parallelism"),
    Flag("dp-size", "parallel.dp_size", _PARALLEL, "number of data parallel groups"),
    Flag("dp-degree", "parallel.dp_degree", _PARALLEL, "number of ranks per data parallel group"),
    Flag("enable-cfg-parallel", "parallel.enable_cfg_parallel", _PARALLEL,
         "one rank for each branch of classifier-free guidance"),
    Flag("attention-backend", "attention.backend", _ATTENTION, "attention kernel, such as sdpa, flash or math"),
    Flag("attention-backend-config", "attention.backend_config", _ATTENTION, "settings of the attention kernel"),
    Flag("cache-dit-config", "cache.cache_dit_config", _ATTENTION,
         "step cache settings of cache-dit, inline or as a JSON or YAML file"),
    Flag("dit-cpu-offload", "offload.dit_cpu_offload", _OFFLOAD,
         "keep the denoising network on the CPU while it is not used"),
    Flag("dit-layerwise-offload", "offload.dit_layerwise_offload", _OFFLOAD,
         "copy the denoising network to the GPU layer by layer"),
    Flag("text-encoder-cpu-offload", "offload.text_encoder_cpu_offload", _OFFLOAD,
         "keep the text encoders on the CPU while they are not used"),
    Flag("image-encoder-cpu-offload", "offload.image_encoder_cpu_offload", _OFFLOAD,
         "keep the image encoder on the CPU while it is not used"),
    Flag("vae-cpu-offload", "offload.vae_cpu_offload", _OFFLOAD, "keep the VAE on the CPU while it is not used"),
    Flag("lora-path", "lora.path", _LORA, "LoRA adapter: safetensors file, folder or hub id"),
    Flag("lora-nickname", "lora.nickname", _LORA, "name of the adapter in the run record"),
    Flag("lora-scale", "lora.scale", _LORA, "strength of the adapter, such as 0.125 for Hyper-SD"),
    Flag("lora-target-modules", "lora.target_modules", _LORA,
         "modules to apply the adapter to, such as to_q,to_k (default: all)"),
    Flag("transformer-weights-path", "quant.transformer_weights_path", _QUANT,
         "weights for the denoising network: safetensors or GGUF file, or folder"),
    Flag("nunchaku-config", "quant.nunchaku_config", _QUANT, "SVDQuant settings, inline or as a JSON or YAML file"),
    Flag("enable-torch-compile", "compile.enable_torch_compile", _PERFORMANCE,
         "compile the denoising network with torch.compile"),
    Flag("warmup", "compile.warmup", _PERFORMANCE,
         "run untimed steps with the shapes of the run before the generation"),
    Flag("warmup-steps", "compile.warmup_steps", _PERFORMANCE, "number of denoising steps of the warm-up"),
    Flag("disable-autocast", "compile.disable_autocast", _PERFORMANCE, "compute in the dtype of the stored weights"),
    Flag("dtype", "dtype", _PERFORMANCE, "dtype of the computation; auto depends on the device", documented=False),
    Flag("output-path", "output.path", _OUTPUT, "folder for the output files"),
    Flag("perf-dump-path", "output.perf_dump_path", _OUTPUT, "JSON file for the performance metrics of the run"),
    Flag("fps", "output.fps", _OUTPUT, "frames per second of a video", documented=False),
    Flag("log-level", "log_level", _OUTPUT,
         "lowest level that is logged to stderr; debug also shows tracebacks", documented=False),
    Flag("diffusers-kwargs", "backend.diffusers_kwargs", _ADVANCED,
         'arguments of the pipeline and its scheduler, such as \'{"eta": 0.5}\''),
    Flag("component-paths", "model.component_paths", _ADVANCED,
         'components to replace, such as \'{"vae": "path/to/vae"}\''),
    Flag("pipeline-class-name", "model.pipeline_class_name", _ADVANCED,
         "pipeline class that replaces the one in model_index.json"),
)  # fmt: skip

BY_KEY: dict[str, Flag] = {flag.key: flag for flag in FLAGS}
BY_PATH: dict[str, Flag] = {flag.path: flag for flag in FLAGS if flag.path}

FILE_OR_INLINE = ("cache.cache_dit_config", "quant.nunchaku_config")  # take JSON or the name of a file
