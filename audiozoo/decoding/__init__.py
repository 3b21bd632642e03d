"""Autoregressive decoding over any model's step, compiled into one loop."""

from audiozoo.decoding.cache import Growing, Shared, group_beams, ungroup_beams, while_loop
from audiozoo.decoding.config import GenerationConfig
from audiozoo.decoding.generate import GenerateOutput, generate
from audiozoo.decoding.processors import LogitsProcessor
from audiozoo.decoding.speculative import AssistedOutput, assisted_generate
from audiozoo.decoding.streaming import Generator, bucketed

__all__ = [
    "AssistedOutput",
    "GenerateOutput",
    "GenerationConfig",
    "Generator",
    "Growing",
    "LogitsProcessor",
    "Shared",
    "assisted_generate",
    "bucketed",
    "generate",
    "group_beams",
    "ungroup_beams",
    "while_loop",
]
