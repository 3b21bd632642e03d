"""What speech encoders say of a recording without words: vectors of frames or of a speaker, and a class.

For the models of the wav2vec 2.0 family, whose call they have in common.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float

from audiozoo.errors import UsageError


@partial(jax.jit, static_argnames=("graphdef", "options"))
def _call(graphdef: Any, state: Any, values: jax.Array, mask: jax.Array | None, *, options: tuple) -> Any:
    return nnx.merge(graphdef, state)(values, mask, **dict(options))


def _run(model: Any, processor: Any, audios: list[np.ndarray], **options: Any) -> Any:
    """A padded batch through the model, as if each item were alone."""
    extractor = getattr(processor, "feature_extractor", processor)
    rate = extractor.sampling_rate
    inputs = extractor(audios, sampling_rate=rate, pad_to_multiple_of=rate // 2, return_attention_mask=True)
    values, mask = jnp.asarray(inputs["input_values"]), jnp.asarray(inputs["attention_mask"])
    if getattr(model.config, "feat_extract_norm", "layer") == "group":
        options["masked_group_norm"] = True
    graphdef, state = nnx.split(model)
    return _call(graphdef, state, values, mask, options=tuple(sorted(options.items())))


def embed(
    model: Any, processor: Any, audio: Float[np.ndarray, " samples"], *, layer: int | None = None
) -> dict[str, np.ndarray]:
    """Vectors of a recording.

    Args:
        model: any model of the family, with or without a head.
        processor: its processor.
        audio: waveform at the processor's rate.
        layer: which hidden state: 0 is the Transformer's input, -1 or None its output.

    Returns:
        `frames`, float32 `(frames, hidden)`; `times`, the seconds at which they begin; `mean`, their mean; and of a
        model with an x-vector head `embedding`, by whose cosine speakers are compared.

    Raises:
        UsageError: if the model is no such encoder, has no such layer, or wants a longer recording.
    """
    backbone = getattr(model, "backbone", model)
    if not hasattr(backbone, "frame_lengths"):
        raise UsageError(f"{type(model).__name__} is no speech encoder of the wav2vec 2.0 family.")
    layers = model.config.num_hidden_layers
    if layer is not None and not -layers - 1 <= layer <= layers:
        raise UsageError(f"There is no layer {layer}; this model has {layers}, and its input counts as layer 0.")
    together = getattr(model.config, "squeeze_factor", 1)  # SEW's Transformer sees one frame for each two
    count = int(backbone.frame_lengths(len(audio), adapter=False)) // together
    if (least := getattr(model, "least_frames", 1)) > count:
        raise UsageError(
            f"The recording is too short: it has {count} frames, and {type(model).__name__} needs {least}."
        )
    output = _run(model, processor, [audio], output_hidden_states=True)
    frames = np.asarray(output.hidden_states[-1 if layer is None else layer][0, :count], np.float32)
    step = (
        together
        * model.config.inputs_to_logits_ratio
        / getattr(processor, "feature_extractor", processor).sampling_rate
    )
    result = {"frames": frames, "times": np.arange(count) * step, "mean": frames.mean(axis=0)}
    if hasattr(output, "embeddings"):
        result["embedding"] = np.asarray(output.embeddings[0], np.float32)
    return result


def identify(
    model: Any,
    processor: Any,
    audio: Float[np.ndarray, " samples"],
    *,
    top_k: int = 5,
    crops: int = 1,
    crop_length_s: float = 10.0,
) -> list[tuple[str, float]]:
    """The most probable classes of a recording: its language, speaker, keyword or emotion, by the checkpoint.

    Args:
        model: with a sequence classifier.
        processor: its processor.
        audio: waveform at the processor's rate.
        top_k: how many.
        crops: listen to that many evenly spread pieces instead of the whole and average their logits, as XLS-R's
            language identification was evaluated (arXiv 2111.09296, there with 10 at random).
        crop_length_s: seconds a piece.

    Returns:
        `(label, probability)`, the most probable first.

    Raises:
        UsageError: if the model is no classifier, or the pieces are shorter than a frame.
    """
    if not type(model).__name__.endswith("ForSequenceClassification"):
        raise UsageError(f"{type(model).__name__} has no classes; identify needs a …ForSequenceClassification.")
    length = round(crop_length_s * getattr(processor, "feature_extractor", processor).sampling_rate)
    if crops > 1 and model.backbone.frame_lengths(length) < 1:
        raise UsageError(f"Pieces of {crop_length_s} s are too short for one frame.")
    pieces = [np.asarray(audio)]
    if crops > 1 and len(audio) > length:
        starts = np.linspace(0, len(audio) - length, crops).astype(int)
        pieces = [np.asarray(audio[start : start + length]) for start in starts]
    logits = jnp.mean(_run(model, processor, pieces).logits, axis=0)
    probabilities = np.asarray(jax.nn.softmax(logits))
    best = np.argsort(-probabilities)[:top_k]
    return [(model.config.id2label[i], float(probabilities[i])) for i in best]
