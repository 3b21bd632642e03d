"""Autoregressive decoding over any model's step, compiled into one loop."""

from audiozoo.decoding.cache import Growing, Shared, group_beams, ungroup_beams
from audiozoo.decoding.config import GenerationConfig
from audiozoo.decoding.generate import GenerateOutput, generate
from audiozoo.decoding.processors import LogitsProcessor

__all__ = [
    "GenerateOutput",
    "GenerationConfig",
    "Growing",
    "LogitsProcessor",
    "Shared",
    "generate",
    "group_beams",
    "ungroup_beams",
]
