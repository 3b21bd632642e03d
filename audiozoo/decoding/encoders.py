"""What speech encoders say of a recording without words: vectors of frames or of a speaker, and a class.

For the models of the wav2vec 2.0 family, whose call they have in common; classes also of Whisper's classifier.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float

from audiozoo.audio.features import covering
from audiozoo.errors import AudioError, UsageError

CLASSIFIERS = ("ForSequenceClassification", "WhisperForAudioClassification")  # how the names of their classes end
LONGEST_S = 60.0  # seconds that are heard in one piece: the Transformer's memory grows with their square


def in_steps(samples: int, config: Any) -> int:
    """Samples as steps of what a model reads, which are samples themselves, or w2v-BERT's features."""
    return int(samples // getattr(config, "samples_a_step", 1))


def heard(inputs: Mapping[str, Any]) -> Any:
    """What a model of the family reads, of what its processor returns: waveforms, or w2v-BERT's features."""
    return inputs["input_values"] if "input_values" in inputs else inputs["input_features"]


def given_speech(input_values: Any, input_features: Any) -> Any:
    """What a model is given to hear that takes either: waveforms, or features in their place.

    Raises:
        UsageError: if it is given both, or neither.
    """
    if (input_values is None) == (input_features is None):
        raise UsageError("Give what is to be heard either as input_values or as input_features.")
    return input_features if input_values is None else input_values


def first_heard(inputs: Mapping[str, Any]) -> np.ndarray:
    """The first recording of these inputs, without what its mask leaves out: w2v-BERT's last step may be half empty."""
    values, mask = np.asarray(heard(inputs)[0]), inputs.get("attention_mask")
    return values if mask is None else values[: int(mask[0].sum())]


def rounded(count: int, least: int) -> int:
    """`count` up to two leading binary digits: one of few sizes, at most a third larger."""
    step = max(least, 1 << max(int(count).bit_length() - 3, 0))
    return max(-(-count // step) * step, least)


def in_pieces(
    call: Callable[[np.ndarray, np.ndarray | None], Any],
    input_values: Float[np.ndarray, "steps ..."],
    count: int,
    ratio: int,
    *,
    chunk_length_s: float = 30.0,
    stride_length_s: float = 5.0,
    batch_size: int = 4,
    sampling_rate: int = 16_000,
    window: int = 400,
    progress: Callable[[int, int], None] | None = None,
) -> Float[np.ndarray, "frames width"]:
    """The frames that a model makes of a recording of any length.

    Pieces of `chunk_length_s` overlap by `stride_length_s` on each side; of each only the middle is kept, where the
    model saw what comes before and after. Pieces begin at whole frames, so the result has exactly the frames of one
    forward of the whole recording. What fits into one piece is computed in one piece.

    Args:
        call: makes `(batch, frames, width)` of `(batch, steps, *channels)` and its mask `(batch, steps)`, or None where
            nothing is padded.
        input_values: one recording as the processor returns it: a waveform, so that a step is a sample, or features.
        count: frames of the whole recording.
        ratio: steps from one frame to the next.
        chunk_length_s: seconds a piece; longer is better and takes memory with its square.
        stride_length_s: seconds thrown away at each inner edge.
        batch_size: pieces at a time.
        sampling_rate: steps a second.
        window: steps that a frame sees.
        progress: called with the pieces done and the pieces in all.

    Raises:
        UsageError: if the strides leave nothing of a piece, or one has no end.
    """
    if not (math.isfinite(chunk_length_s) and math.isfinite(stride_length_s)):
        raise UsageError(f"Pieces of {chunk_length_s} s with {stride_length_s} s cut off on both sides have no end.")
    chunk = round(chunk_length_s * sampling_rate / ratio)  # in frames
    stride = round(stride_length_s * sampling_rate / ratio)
    if not 0 <= 2 * stride < chunk:
        raise UsageError(f"Pieces of {chunk_length_s} s with {stride_length_s} s cut off on both sides leave nothing.")
    reach = len(input_values) - (count - 1) * ratio  # steps that the last frame sees, and a rest
    if count <= chunk:
        pieces = [(0, count, 0, count)]
    else:
        step = chunk - 2 * stride
        pieces = []
        for start in range(0, count, step):
            end = min(start + chunk, count)
            keep = start + stride if start else 0
            stop = count if end == count else end - stride
            pieces.append((start, end, keep, stop))
            if end == count:
                break
    # One length for all: bucketed for short recordings, so that another length does not compile again.
    longest = max(end - start for start, end, _, _ in pieces)
    frames = min(rounded(longest, 25), max(chunk, longest))
    width = (frames - 1) * ratio + max(reach, window)
    result: np.ndarray | None = None
    for first in range(0, len(pieces), batch_size):
        group = pieces[first : first + batch_size]
        rows = batch_size if len(pieces) > batch_size else len(group)
        values = np.zeros((rows, width, *input_values.shape[1:]), np.float32)
        mask = np.zeros((rows, width), np.int32)
        mask[len(group) :] = 1  # rows that only fill the batch
        for row, (start, end, _, _) in enumerate(group):
            piece = input_values[start * ratio : (end - 1) * ratio + max(reach, window)]
            values[row, : len(piece)] = piece
            mask[row, : len(piece)] = 1
        full = bool(mask.all())
        made = np.asarray(call(values, None if full else mask))
        if result is None:
            result = np.empty((count, made.shape[-1]), made.dtype)
        for row, (start, _, keep, stop) in enumerate(group):
            result[keep:stop] = made[row, keep - start : stop - start]
        if progress is not None:
            progress(min(first + batch_size, len(pieces)), len(pieces))
    assert result is not None
    return result


def alone(model: Any) -> Any:
    """The model as it hears every item of a padded batch as if it were alone, by whatever rules it was trained."""
    rules = {"frame_rule": "lengths", "squeeze_rule": "floor", "masked_convolution": True}

    def other(part: Any) -> dict[str, Any]:
        config = getattr(part, "config", None)
        return {name: rule for name, rule in rules.items() if getattr(config, name, rule) != rule}

    if not any(other(part) for _, part in nnx.iter_modules(model)):
        return model
    model = nnx.merge(*nnx.split(model))
    part: Any
    for _, part in nnx.iter_modules(model):
        if changed := other(part):
            part.config = dataclasses.replace(part.config, **changed)
    return model


def without_padding(config: Any) -> dict[str, bool]:
    """Options of a call that keep a batch's padding out of all that looks beyond a frame; see `Wav2Vec2Model`."""
    asked = {"masked_group_norm": getattr(config, "feat_extract_norm", "layer") == "group"}
    asked["masked_adapter"] = getattr(config, "add_adapter", False)
    return {name: True for name, needed in asked.items() if needed}


@partial(jax.jit, static_argnames=("graphdef", "options"))
def _call(graphdef: Any, state: Any, *inputs: jax.Array | None, options: tuple = ()) -> Any:
    return nnx.merge(graphdef, state)(*inputs, **dict(options))


def _padded(model: Any, processor: Any, audio: np.ndarray) -> dict[str, np.ndarray]:
    """What the processor returns of a recording, filled up to one of few lengths, and its mask."""
    extractor = getattr(processor, "feature_extractor", processor)
    rate = extractor.sampling_rate
    half = 50 if hasattr(model.config, "samples_a_step") else rate // 2  # a second, in frames of 10 ms or in samples
    return extractor(audio, sampling_rate=rate, pad_to_multiple_of=half, return_attention_mask=True)


def _run(model: Any, inputs: Mapping[str, np.ndarray], **options: Any) -> Any:
    """A padded recording through the model, as if it were alone."""
    values, mask = jnp.asarray(heard(inputs)), jnp.asarray(inputs["attention_mask"])
    options |= without_padding(model.config)
    graphdef, state = nnx.split(alone(model))
    return _call(graphdef, state, values, mask, options=tuple(sorted(options.items())))


def _over_pieces(model: Any, processor: Any, audio: np.ndarray, field: str) -> np.ndarray:
    """A field of the output for a recording in equal pieces of at most `LONGEST_S`, averaged: `(1, width)`."""
    rate = getattr(processor, "feature_extractor", processor).sampling_rate
    pieces = np.array_split(np.asarray(audio), max(math.ceil(len(audio) / (LONGEST_S * rate)), 1))
    found = [np.asarray(getattr(_run(model, _padded(model, processor, piece)), field), np.float64) for piece in pieces]
    return np.mean(found, axis=0)


def _over_windows(model: Any, processor: Any, audio: np.ndarray) -> np.ndarray:
    """The logits of Whisper's classifier for a recording in windows that cover it, averaged: `(1, classes)`."""
    extractor = getattr(processor, "feature_extractor", processor)
    graphdef, state = nnx.split(model)
    found = []
    for window in covering(np.asarray(audio), extractor.n_samples):
        features = extractor(window, sampling_rate=extractor.sampling_rate)["input_features"]
        found.append(np.asarray(_call(graphdef, state, jnp.asarray(features)).logits, np.float64))
    return np.mean(found, axis=0)


def embed(
    model: Any, processor: Any, audio: Float[np.ndarray, " samples"], *, layer: int | None = None
) -> dict[str, np.ndarray]:
    """Vectors of a recording.

    What is longer than a minute is heard in overlapping pieces (see `in_pieces`), and the vectors of a speaker in
    pieces are averaged.

    Args:
        model: any model of the family, with or without a head.
        processor: its processor.
        audio: waveform at the processor's rate.
        layer: which hidden state: 0 is the Transformer's input, -1 or None its output.

    Returns:
        `frames`, float32 `(frames, hidden)`; `times`, the seconds at which they begin; `mean`, their mean; and of a
        model with an x-vector head `embedding`, by whose cosine speakers are compared.

    Raises:
        UsageError: if the model is no such encoder, or has no such layer.
        AudioError: if the recording is too short for the model.
    """
    backbone = getattr(model, "backbone", model)
    if not hasattr(backbone, "frame_lengths"):
        raise UsageError(f"{type(model).__name__} is no speech encoder of the wav2vec 2.0 family.")
    layers = model.config.num_hidden_layers
    if layer is not None and not -layers - 1 <= layer <= layers:
        raise UsageError(f"There is no layer {layer}; this model has {layers}, and its input counts as layer 0.")
    together = getattr(model.config, "squeeze_factor", 1)  # SEW's Transformer sees one frame for each two
    extractor = getattr(processor, "feature_extractor", processor)
    rate, which = extractor.sampling_rate, -1 if layer is None else layer
    whole = len(audio) <= LONGEST_S * rate
    inputs = _padded(model, processor, audio) if whole else extractor(audio, sampling_rate=rate)
    values = first_heard(inputs)
    count = int(backbone.frame_lengths(len(values), adapter=False)) // together
    if (least := getattr(model, "least_frames", 1)) > count:
        raise AudioError(
            f"The recording is too short: it has {count} frames, and {type(model).__name__} needs {least}."
        )
    ratio = together * model.config.inputs_to_logits_ratio

    def state_of(output: Any) -> jax.Array:
        if (found := output.hidden_states[which]) is None:
            raise UsageError("The states between stacked layers are not known: load the model unstacked.")
        return found

    if whole:
        output = _run(model, inputs, output_hidden_states=True)
        frames = np.asarray(state_of(output)[0, :count], np.float32)
        speaker = getattr(output, "embeddings", None)
    else:
        graphdef, state = nnx.split(alone(backbone))
        options = tuple((without_padding(model.config) | {"output_hidden_states": True}).items())

        def call(values: np.ndarray, mask: np.ndarray | None) -> jax.Array:
            return state_of(_call(graphdef, state, values, mask, options=options))

        length, second, window = (in_steps(samples, model.config) for samples in (ratio, rate, 400))
        frames = in_pieces(call, values, count, length, sampling_rate=second, window=window).astype(np.float32)
        speaker = None
        if type(model).__name__.endswith(("ForXVector", "ForSpeakerVerification")):
            speaker = _over_pieces(model, processor, audio, "embeddings")
    result = {"frames": frames, "times": np.arange(count) * ratio / rate, "mean": frames.mean(axis=0)}
    if speaker is not None:
        result["embedding"] = np.asarray(speaker[0], np.float32)
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

    What is longer than a minute is heard in equal pieces, and their logits are averaged, as the classifier, which is
    linear in the mean over time, does with frames. Whisper's classifier hears windows of 30 s, the last flush with the
    end, and what is shorter with silence behind it, as in training.

    Args:
        model: with a classifier of recordings, a …ForSequenceClassification or WhisperForAudioClassification.
        processor: its processor.
        audio: waveform at the processor's rate.
        top_k: how many.
        crops: listen to that many evenly spread pieces instead of the whole and average their logits, as XLS-R's
            language identification was evaluated (arXiv 2111.09296, there with 10 at random).
        crop_length_s: seconds a piece.

    Returns:
        `(label, probability)`, the most probable first.

    Raises:
        UsageError: if the model is no classifier, or the pieces are shorter than a frame or have no end.
    """
    if not (name := type(model).__name__).endswith(CLASSIFIERS):
        raise UsageError(f"{name} has no classes; identify needs a …{' or a …'.join(CLASSIFIERS)}.")
    whisper = name == "WhisperForAudioClassification"
    if not math.isfinite(crop_length_s):
        raise UsageError(f"Pieces of {crop_length_s} s have no end.")
    extractor = getattr(processor, "feature_extractor", processor)
    length = round(crop_length_s * extractor.sampling_rate)

    steps = in_steps(length, model.config)
    if crops > 1 and (steps // extractor.n_fft if whisper else model.backbone.frame_lengths(steps)) < 1:
        raise UsageError(f"Pieces of {crop_length_s} s are too short for one frame.")
    pieces = [np.asarray(audio)]
    if crops > 1 and len(audio) > length:
        starts = np.linspace(0, len(audio) - length, crops).astype(int)
        pieces = [np.asarray(audio[start : start + length]) for start in starts]
    logits_of = _over_windows if whisper else partial(_over_pieces, field="logits")
    found = [logits_of(model, processor, piece) for piece in pieces]
    logits = np.mean(np.concatenate(found), axis=0)
    probabilities = np.asarray(jax.nn.softmax(logits))
    best = np.argsort(-probabilities)[:top_k]
    return [(model.config.id2label[i], float(probabilities[i])) for i in best]
