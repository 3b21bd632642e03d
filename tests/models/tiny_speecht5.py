"""A SpeechT5 small enough for tests, with a vocoder and a vocabulary of characters; it has learnt nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from audiozoo.models import speecht5
from audiozoo.models.hifigan import HifiGanConfig, SpeechT5HifiGan
from audiozoo.models.speecht5 import SpeechT5Config

SIZES: dict[str, Any] = {
    "hidden_size": 24,
    "encoder_layers": 1,
    "encoder_attention_heads": 3,
    "encoder_ffn_dim": 32,
    "decoder_layers": 1,
    "decoder_attention_heads": 3,
    "decoder_ffn_dim": 32,
    "conv_dim": (12, 12, 12),
    "conv_kernel": (10, 3, 2),
    "conv_stride": (5, 8, 8),
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 3,
    "encoder_max_relative_position": 6,
    "num_mel_bins": 8,
    "speech_decoder_prenet_units": 12,
    "speech_decoder_postnet_units": 8,
    "speech_decoder_postnet_layers": 2,
    "speaker_embedding_dim": 6,
    "max_text_positions": 20,
    "mask_time_length": 3,
    "num_clusters": 7,
    "final_dim": 6,
    "codevector_dim": 24,
    "num_codevectors_per_group": 5,
    "ctc_weight": 0.5,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "positional_dropout": 0.0,
    "speech_decoder_postnet_dropout": 0.0,
    "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
}
TEXT = ("the quick brown fox jumps over the lazy dog.", "how vexingly quick daft zebras jump!", "pack my box, please?")


def build(head: str, seed: int = 0, **changes: Any) -> Any:
    """One of the classes, "ForTextToSpeech"."""
    sizes = SIZES | ({} if head == "ForSpeechToText" else {"ctc_weight": 0.0}) | changes
    return getattr(speecht5, f"SpeechT5{head}")(SpeechT5Config(**sizes), rngs=nnx.Rngs(seed))


def vocoder() -> SpeechT5HifiGan:
    """Two samples a frame would do; 256 are what the real one makes, and 16 are made here."""
    sizes: dict[str, Any] = {"upsample_rates": (4, 4), "upsample_kernel_sizes": (8, 8)}
    sizes |= {"resblock_kernel_sizes": (3,), "resblock_dilation_sizes": ((1,),)}
    config = HifiGanConfig.speecht5(model_in_dim=8, upsample_initial_channel=8, **sizes)
    return SpeechT5HifiGan(config, rngs=nnx.Rngs(1))


def train_characters(directory: Path) -> Path:
    """A SentencePiece model of characters, its special tokens where SpeechT5's are."""
    import sentencepiece

    directory.mkdir(parents=True, exist_ok=True)
    (directory / "text.txt").write_text("\n".join(TEXT * 4))
    sentencepiece.SentencePieceTrainer.train(
        input=str(directory / "text.txt"), model_prefix=str(directory / "spm_char"), model_type="char",
        vocab_size=79, hard_vocab_limit=False, character_coverage=1.0, bos_id=0, pad_id=1, eos_id=2, unk_id=3,
        minloglevel=2,
    )  # fmt: skip
    return directory / "spm_char.model"


def wave(samples: int = 4000, seed: int = 0) -> np.ndarray:
    """Noise at 16 kHz."""
    return (0.1 * np.random.default_rng(seed).standard_normal(samples)).astype(np.float32)
