"""Classes of the nunchaku project's networks by the classes of diffusers that they replace. Imports no torch."""

NUNCHAKU_CLASSES = {
    "FluxTransformer2DModel": "NunchakuFluxTransformer2dModel",
    "SanaTransformer2DModel": "NunchakuSanaTransformer2DModel",
    "QwenImageTransformer2DModel": "NunchakuQwenImageTransformer2DModel",
}
