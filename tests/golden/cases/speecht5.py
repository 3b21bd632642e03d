"""SpeechT5: a tiny voice, its spectrograms and its loss, and a tiny recogniser, with logits."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from audiozoo.models import speecht5
from tests.golden.golden import Case
from weights_conversion.speecht5 import config_from_hugging_face, hugging_face_table

CONFIG = {
    "vocab_size": 11,
    "hidden_size": 24,
    "encoder_layers": 2,
    "encoder_attention_heads": 3,
    "encoder_ffn_dim": 40,
    "decoder_layers": 2,
    "decoder_attention_heads": 3,
    "decoder_ffn_dim": 32,
    "conv_dim": [16, 12, 18],
    "conv_kernel": [10, 3, 2],
    "conv_stride": [5, 2, 2],
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 3,
    "encoder_max_relative_position": 5,
    "num_mel_bins": 6,
    "speech_decoder_prenet_units": 10,
    "speech_decoder_postnet_units": 7,
    "speech_decoder_postnet_layers": 3,
    "speaker_embedding_dim": 5,
    "max_speech_positions": 60,
    "max_text_positions": 30,
}
STEPS = 4
KEPT = np.random.default_rng(3).random((2, STEPS, 10)) < 0.5


def voice_inputs() -> dict[str, np.ndarray]:
    """Two texts, the second shorter, and spectrograms to be made."""
    rng = np.random.default_rng(0)
    ids = np.array([[5, 3, 8, 6, 2, 4, 9], [7, 4, 3, 2, 1, 1, 1]], np.int32)
    labels = rng.standard_normal((2, 2 * STEPS, 6))
    labels[1, 5:] = -100
    return {
        "input_ids": ids,
        "attention_mask": (ids != 1).astype(np.int32),
        "speaker_embeddings": rng.standard_normal((2, 5)),
        "labels": labels,
    }


def run_voice(model: Any, x: dict[str, Any]) -> dict[str, Any]:
    """Spectrogram and loss."""
    output = jax.jit(lambda m, x: m(**x, prenet_masks=KEPT))(model, x)
    return {"spectrogram": output.spectrogram, "loss": output.loss.astype(output.spectrogram.dtype)}


def run_voice_reference(model: Any, x: dict[str, np.ndarray]) -> dict[str, Any]:
    """The same of the original, with the same units kept in its pre-net and exact positions."""
    import torch

    from tests.parity.speech_family import reference_in_double
    from tests.parity.test_speecht5 import exact_positions, kept

    arguments = {k: torch.from_numpy(v) for k, v in x.items()}
    arguments["input_ids"] = arguments["input_ids"].long()
    with kept(exact_positions(model), KEPT), reference_in_double():
        output = model(**arguments)
    return {"spectrogram": output.spectrogram, "loss": output.loss}


def recogniser_inputs() -> dict[str, np.ndarray]:
    """Two waveforms, and what they say."""
    waves = np.random.default_rng(1).standard_normal((2, 700))
    return {"input_values": waves, "labels": np.array([[7, 5, 9, 2], [8, 2, -100, -100]], np.int32)}


def run_recogniser(model: Any, x: dict[str, Any]) -> dict[str, Any]:
    """Logits and loss."""
    output = jax.jit(lambda m, x: m(**x))(model, x)
    return {"logits": output.logits, "loss": output.loss.astype(output.logits.dtype)}


def run_recogniser_reference(model: Any, x: dict[str, np.ndarray]) -> dict[str, Any]:
    """The same of the original."""
    import torch

    from tests.parity.test_speecht5 import exact_positions

    output = exact_positions(model)(torch.from_numpy(x["input_values"]), labels=torch.from_numpy(x["labels"]).long())
    return {"logits": output.logits, "loss": output.loss}


def _case(name: str, head: str, inputs: Any, run: Any, run_reference: Any) -> Case:
    ours, full = config_from_hugging_face(CONFIG), f"SpeechT5{head}"

    def build(dtype: Any) -> nnx.Module:
        return getattr(speecht5, full)(ours, dtype=jnp.dtype(dtype), param_dtype=dtype, rngs=nnx.Rngs(0))

    def reference() -> Any:
        import transformers

        return getattr(transformers, full)(transformers.SpeechT5Config(**CONFIG, attn_implementation="eager"))

    return Case(name, CONFIG, build, hugging_face_table(ours, full), inputs, run, reference, run_reference)


CASES = (
    _case("speecht5", "ForTextToSpeech", voice_inputs, run_voice, run_voice_reference),
    _case("speecht5_recognition", "ForSpeechToText", recogniser_inputs, run_recogniser, run_recogniser_reference),
)
