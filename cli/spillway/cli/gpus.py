"""Memory of common GPUs and shapes of common models, for `spillway size`. Data sheets and published configs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What sizing needs to know of a model. ``weights``: how many numbers its checkpoint holds."""

    name: str
    layers: int
    kv_heads: int
    head_dim: int
    weights: int
    max_positions: int

    def kv_bytes_per_token(self, element_bits: float) -> float:
        """2 · layers · kv_heads · head_dim · bytes: keys and values of one token over all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * element_bits / 8


GPU_MEMORY_GIB = {
    "T4": 15,
    "L4": 22.5,
    "A10": 22.5,
    "A10G": 22.5,
    "RTX-3090": 24,
    "RTX-4090": 24,
    "RTX-5090": 32,
    "V100-16": 16,
    "V100-32": 32,
    "A30": 24,
    "A40": 45,
    "L40S": 45,
    "A100-40": 40,
    "A100-80": 80,
    "H100": 80,
    "H200": 141,
    "B200": 180,
    "MI300X": 192,
}
"""Usable memory in GiB as the driver reports it, or the nominal size where they agree."""

MODELS = {
    shape.name: shape
    for shape in (
        ModelShape("smollm2-135m", 30, 3, 64, 134_515_008, 8_192),
        ModelShape("smollm2-1.7b", 24, 32, 64, 1_711_376_384, 8_192),
        ModelShape("tinyllama-1.1b", 22, 4, 64, 1_100_048_384, 2_048),
        ModelShape("llama-2-7b", 32, 32, 128, 6_738_415_616, 4_096),
        ModelShape("llama-2-13b", 40, 40, 128, 13_015_864_320, 4_096),
        ModelShape("llama-2-70b", 80, 8, 128, 68_976_648_192, 4_096),
        ModelShape("llama-3.2-1b", 16, 8, 64, 1_235_814_400, 131_072),
        ModelShape("llama-3.2-3b", 28, 8, 128, 3_212_749_824, 131_072),
        ModelShape("llama-3.1-8b", 32, 8, 128, 8_030_261_248, 131_072),
        ModelShape("llama-3.1-70b", 80, 8, 128, 70_553_706_496, 131_072),
        ModelShape("llama-3.1-405b", 126, 8, 128, 405_853_388_800, 131_072),
        ModelShape("mistral-7b", 32, 8, 128, 7_241_732_096, 32_768),
        ModelShape("qwen2-0.5b", 24, 2, 64, 494_032_768, 32_768),
        ModelShape("qwen2-7b", 28, 4, 128, 7_615_616_512, 32_768),
        ModelShape("qwen2-72b", 80, 8, 128, 72_706_203_648, 32_768),
        ModelShape("qwen3-0.6b", 28, 8, 128, 596_049_920, 40_960),
        ModelShape("qwen3-8b", 36, 8, 128, 8_190_735_360, 40_960),
        ModelShape("qwen3-32b", 64, 8, 128, 32_762_123_264, 40_960),
    )
}
