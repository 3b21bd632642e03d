"""A Whisper of a few thousand random parameters, for tests without the original."""

from __future__ import annotations

import dataclasses
from typing import Any

from flax import nnx

from audiozoo.models import whisper
from audiozoo.models.whisper import WhisperConfig
from tests.models.random_model import random_model
from weights_conversion.whisper import hugging_face_table

TINY = WhisperConfig(
    vocab_size=67,
    num_mel_bins=8,
    d_model=16,
    encoder_layers=2,
    encoder_attention_heads=2,
    encoder_ffn_dim=24,
    decoder_layers=1,
    decoder_attention_heads=4,
    decoder_ffn_dim=20,
    max_source_positions=12,
    max_target_positions=48,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=1,
    decoder_start_token_id=2,
)


def build(name: str = "WhisperForConditionalGeneration", config: WhisperConfig = TINY, **kwargs: Any) -> nnx.Module:
    """A model whose every parameter is random, none at its initial 0 or 1."""
    create = getattr(whisper, name)
    model = random_model(lambda rngs: create(config, **kwargs, rngs=rngs), hugging_face_table(config, name), seed=5)
    if config is TINY and hasattr(model, "generation_config"):
        # Ids within the small vocabulary: beyond it an embedding is NaN. The time tokens are the last six.
        model.generation_config = dataclasses.replace(
            model.generation_config, prev_sot_token_id=3, no_timestamps_token_id=config.vocab_size - 7
        )
    return model
