"""A Bark of a few hundred parameters a layer: the numbers of its tokens, and of its windows, are a few dozen."""

from __future__ import annotations

from typing import Any

WIDTH: dict[str, Any] = {"num_layers": 2, "num_heads": 2, "hidden_size": 8, "block_size": 48, "bias": False}
SEMANTIC = WIDTH | {"input_vocab_size": 100, "output_vocab_size": 48}
COARSE = WIDTH | {"input_vocab_size": 80, "output_vocab_size": 80}
FINE = WIDTH | {"input_vocab_size": 20, "output_vocab_size": 20}
CODEC: dict[str, Any] = {
    "num_filters": 2,
    "hidden_size": 8,
    "codebook_dim": 8,
    "upsampling_ratios": [2, 2],
    "num_lstm_layers": 1,
    "target_bandwidths": [480.0],
}
CONFIG = {
    "semantic_config": SEMANTIC,
    "coarse_acoustics_config": COARSE,
    "fine_acoustics_config": FINE,
    "codec_config": CODEC,
}
GENERATION: dict[str, Any] = {
    "semantic_config": {
        "eos_token_id": 40,
        "text_encoding_offset": 48,
        "text_pad_token": 95,
        "semantic_infer_token": 99,
        "semantic_vocab_size": 40,
        "max_input_semantic_length": 8,
        "max_new_tokens": 24,
    },
    "coarse_acoustics_config": {
        "coarse_semantic_pad_token": 72,
        "coarse_infer_token": 74,
        "max_coarse_input_length": 8,
        "max_coarse_history": 12,
        "sliding_window_len": 6,
    },
    "fine_acoustics_config": {"max_fine_history_length": 8, "max_fine_input_length": 16},
    "codebook_size": 16,
}
