"""What both versions of SeamlessM4T are tested with: sizes, inputs, exact positions, and the authors' names."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.models.seamless_m4t import modeling_seamless_m4t as first
from transformers.models.seamless_m4t_v2 import modeling_seamless_m4t_v2 as second
from transformers.models.wav2vec2_bert import modeling_wav2vec2_bert as bert
from transformers.models.wav2vec2_conformer import modeling_wav2vec2_conformer as conformer

TINY: dict[str, Any] = {
    "vocab_size": 60,
    "t2u_vocab_size": 30,
    "hidden_size": 16,
    "encoder_layers": 1,
    "encoder_ffn_dim": 20,
    "encoder_attention_heads": 2,
    "decoder_layers": 2,
    "decoder_ffn_dim": 20,
    "decoder_attention_heads": 2,
    "feature_projection_input_dim": 10,
    "speech_encoder_layers": 1,
    "speech_encoder_attention_heads": 2,
    "speech_encoder_intermediate_size": 20,
    "conv_depthwise_kernel_size": 5,
    "adaptor_kernel_size": 4,
    "adaptor_stride": 4,
    "t2u_encoder_layers": 1,
    "t2u_encoder_ffn_dim": 20,
    "t2u_encoder_attention_heads": 2,
    "t2u_decoder_ffn_dim": 20,
    "t2u_decoder_attention_heads": 2,
    "unit_hifi_gan_vocab_size": 26,
    "unit_embed_dim": 6,
    "vocoder_num_langs": 3,
    "lang_embed_dim": 4,
    "vocoder_num_spkrs": 5,
    "spkr_embed_dim": 3,
    "upsample_initial_channel": 8,
    "upsample_rates": (5, 2),
    "upsample_kernel_sizes": (11, 4),
    "resblock_kernel_sizes": (3,),
    "resblock_dilation_sizes": ((1, 3),),
    "max_new_tokens": 9,
}
LANGUAGES = {
    "text_decoder_lang_to_code_id": {"eng": 50, "spa": 51},
    "t2u_lang_code_to_id": {"eng": 28, "spa": 29},
    "vocoder_lang_code_to_id": {"eng": 0, "spa": 2},
}


@contextlib.contextmanager
def exact_positions() -> Iterator[None]:
    """The originals compute angles in float32 even for a float64 model; here they may not."""

    def make(length: int, width: int, padding: int) -> torch.Tensor:
        angles = np.arange(length)[:, None] * np.exp(-np.log(1e4) / (width // 2 - 1) * np.arange(width // 2))
        table = torch.from_numpy(np.concatenate([np.sin(angles), np.cos(angles)], axis=1))
        table[padding] = 0
        return table.to(torch.get_default_dtype())

    def relative(self: Any, hidden: torch.Tensor) -> torch.Tensor:
        apart = torch.arange(hidden.shape[1] - 1, -hidden.shape[1], -1, dtype=torch.float64)[:, None]
        angles = apart / 10_000.0 ** (torch.arange(0, self.d_model, 2, dtype=torch.float64) / self.d_model)
        return torch.stack([angles.sin(), angles.cos()], dim=-1).reshape(1, len(apart), -1).to(hidden.dtype)

    with pytest.MonkeyPatch.context() as patch:
        for sinusoids in (
            first.SeamlessM4TSinusoidalPositionalEmbedding,
            second.SeamlessM4Tv2SinusoidalPositionalEmbedding,
        ):
            patch.setattr(sinusoids, "get_embedding", staticmethod(make))
        for distances in (
            first.SeamlessM4TConformerRelPositionalEmbedding,
            bert.Wav2Vec2BertRelPositionalEmbedding,
            conformer.Wav2Vec2ConformerRelPositionalEmbedding,
        ):
            patch.setattr(distances, "forward", relative)
        yield


def text(seed: int = 0) -> dict[str, np.ndarray]:
    """Two texts, the second padded."""
    rng = np.random.default_rng(seed)
    ids, mask = rng.integers(9, 60, (2, 7)), np.ones((2, 7), np.int64)
    ids[:, 0], ids[:, -1] = 50, 3
    ids[1, 5:], mask[1, 5:] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def speech(seed: int = 0) -> dict[str, np.ndarray]:
    """Frames of two recordings, the second padded."""
    mask = np.ones((2, 30), np.int64)
    mask[1, 17:] = 0
    return {"input_features": np.random.default_rng(seed).standard_normal((2, 30, 10)), "attention_mask": mask}


def targets() -> dict[str, np.ndarray]:
    """What the text decoder reads."""
    ids, mask = np.random.default_rng(9).integers(4, 60, (2, 6)), np.ones((2, 6), np.int64)
    mask[1, 4:] = 0
    return {"decoder_input_ids": ids, "decoder_attention_mask": mask}


def torched(x: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """The same for PyTorch."""
    return {name: torch.tensor(array) for name, array in x.items()}


def jaxed(x: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """The same for JAX."""
    return {name: jnp.asarray(array) for name, array in x.items()}


def write_pieces(file: Path) -> None:
    """A small SentencePiece model of letters, which begins with <unk>, <s> and </s> as the authors' do."""
    import sentencepiece

    text = iter(["abc de fg", "ab cde", "g f e d c b a"] * 9)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=text, model_prefix=str(file.with_suffix("")), model_type="bpe", vocab_size=24,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip


def vocoder_state(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A vocoder of `transformers` in the authors' names, its kernels as magnitude and direction."""
    names = {"unit_embedding": "dict", "speaker_embedding": "spkr", "language_embedding": "lang", "hifi_gan.": ""}
    result = {}
    for name, tensor in state.items():
        for theirs, original in (*names.items(), ("upsampler", "ups")):
            name = name.replace(theirs, original)
        if "dur_predictor.conv" in name:
            name = name.replace(".weight", ".0.weight").replace(".bias", ".0.bias")
        if name.endswith(".weight") and ("conv" in name or "ups" in name) and "dur" not in name:
            result[name + "_v"] = tensor.clone()
            result[name + "_g"] = tensor.flatten(1).norm(dim=1).view(-1, 1, 1)
        else:
            result[name] = tensor.clone()
    return result
