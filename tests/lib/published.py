"""The networks of the presets as they were published: class and number of parameters."""

# (class, parameters). Positional tables are buffers and are counted in BUFFERS below.
CLIP_L = ("CLIPTextModel", 123_060_480)
CLIP_L_PROJECTED = ("CLIPTextModelWithProjection", 123_650_304)  # CLIP_L and a 768 x 768 projection
CLIP_H = ("CLIPTextModel", 340_387_840)  # OpenCLIP ViT-H, 23 of its 24 layers
CLIP_G = ("CLIPTextModelWithProjection", 694_659_840)  # OpenCLIP ViT-bigG
T5_XXL = ("T5EncoderModel", 4_762_310_656)
UMT5_XXL = ("UMT5EncoderModel", 5_680_910_336)
VAE_4 = ("AutoencoderKL", 83_653_863)  # 4 latent channels
VAE_16 = ("AutoencoderKL", 83_819_683)  # 16 latent channels, no quant convolutions
SD3_TEXT = {"text_encoder": CLIP_L_PROJECTED, "text_encoder_2": CLIP_G, "text_encoder_3": T5_XXL}
FLUX_TEXT = {"text_encoder": CLIP_L, "text_encoder_2": T5_XXL}
WAN_TEXT_AND_VAE = {"text_encoder": UMT5_XXL, "vae": ("AutoencoderKLWan", 126_892_531)}

NETWORKS = {
    "flux_dev": FLUX_TEXT | {"vae": VAE_16, "transformer": ("FluxTransformer2DModel", 11_901_408_320)},
    "flux_schnell": FLUX_TEXT | {"vae": VAE_16, "transformer": ("FluxTransformer2DModel", 11_891_178_560)},
    "qwen_image": {
        "text_encoder": ("Qwen2_5_VLForConditionalGeneration", 8_292_166_656),
        "transformer": ("QwenImageTransformer2DModel", 20_430_401_088),
        "vae": ("AutoencoderKLQwenImage", 126_892_531),
    },
    "sd15": {
        "text_encoder": CLIP_L,
        "vae": VAE_4,
        "unet": ("UNet2DConditionModel", 859_520_964),
        "safety_checker": ("StableDiffusionSafetyChecker", 303_981_588),
    },
    "sd21": {"text_encoder": CLIP_H, "vae": VAE_4, "unet": ("UNet2DConditionModel", 865_910_724)},
    "sd35_large": SD3_TEXT | {"vae": VAE_16, "transformer": ("SD3Transformer2DModel", 8_056_627_520)},
    "sd35_medium": SD3_TEXT | {"vae": VAE_16, "transformer": ("SD3Transformer2DModel", 2_243_171_520)},
    "sd3_medium": SD3_TEXT | {"vae": VAE_16, "transformer": ("SD3Transformer2DModel", 2_028_328_000)},
    "sdxl": {
        "text_encoder": CLIP_L,
        "text_encoder_2": CLIP_G,
        "vae": VAE_4,
        "unet": ("UNet2DConditionModel", 2_567_463_684),
    },
    "wan21_t2v_14b": WAN_TEXT_AND_VAE | {"transformer": ("WanTransformer3DModel", 14_288_491_584)},
    "wan21_t2v_1_3b": WAN_TEXT_AND_VAE | {"transformer": ("WanTransformer3DModel", 1_418_996_800)},
}
