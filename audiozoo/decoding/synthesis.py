"""Speech synthesis around a model's two halves: compiled for texts of any length, sentence by sentence, and in pieces.

A model that speaks (VITS) has three methods: `encode`, symbols to each symbol's prior and duration; `latents`, those to
as many frames as the durations say; `decode`, frames to samples. How many frames there are is known after the first, so
it and the other two are compiled apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from audiozoo.errors import UsageError
from audiozoo.layers.alignment import monotonic_alignment
from audiozoo.layers.basic import at_least_float32
from audiozoo.layers.weight_norm import fold_weight_norm

LONGEST = 600  # seconds that are said at once


def bucket(length: int, least: int = 16) -> int:
    """The smallest of a few lengths that holds `length`: eight to each doubling, so that at most 1/8 is padding."""
    if length <= least:
        return least
    step = max(least, 2 ** (max(length - 1, 1).bit_length() - 4))
    return -(-length // step) * step


@dataclass(frozen=True)
class Speech:
    """Synthesised speech.

    Attributes:
        text: what was said, if it came from text.
        waveform: samples, in float32 at least.
        sampling_rate: Hz.
        input_ids: symbols.
        durations: samples of each symbol.
    """

    text: str
    waveform: np.ndarray
    sampling_rate: int
    input_ids: np.ndarray
    durations: np.ndarray


def _noise(name: str, given: Any, size: int, key: jax.Array | None) -> dict[str, Any]:
    """Given noise padded to a bucket; or the key, from which any length draws the same first values."""
    if given is None:
        return {"key": jax.random.key(0) if key is None else key}
    given = np.asarray(given)[:, :size]
    return {name: np.pad(given, ((0, 0), (0, size - given.shape[1]), (0, 0)))}


class Synthesizer:
    """Synthesis compiled once for each of a few lengths.

    Symbols and frames are padded up to `bucket` lengths; masks keep the result what it would be without padding, noise
    included. Between the two compiled halves one array, the durations, comes to the host.
    """

    def __init__(self, model: Any):
        self.config = model.config
        graphdef, self._state = nnx.split(fold_weight_norm(model))

        def first(state: Any, ids: jax.Array, mask: jax.Array, speaker: Any, options: dict[str, Any]) -> Any:
            model = nnx.merge(graphdef, state)
            encoded, durations = model.encode(ids, mask, model.speaker_embedding(speaker), **options)
            return encoded.prior_means, encoded.prior_log_variances, durations

        def second(state: Any, frames: int, prior: Any, durations: Any, speaker: Any, options: dict[str, Any]) -> Any:
            model = nnx.merge(graphdef, state)
            return model.latents(*prior, durations, model.speaker_embedding(speaker), frames=frames, **options)

        def whole(state: Any, frames: int, prior: Any, durations: Any, speaker: Any, options: dict[str, Any]) -> Any:
            z, lengths = second(state, frames, prior, durations, speaker, options)
            return piece(state, z, lengths, speaker)

        def piece(state: Any, z: jax.Array, lengths: jax.Array, speaker: Any) -> jax.Array:
            model = nnx.merge(graphdef, state)
            waveform = model.decode(z, lengths, model.speaker_embedding(speaker))
            return at_least_float32(waveform)  # half precision is no sound file's

        self._first = jax.jit(first)
        self._latents = jax.jit(second, static_argnums=1)
        self._whole = jax.jit(whole, static_argnums=1)
        self._piece = jax.jit(piece)

    def _prior(
        self,
        input_ids: Any,
        speaker_id: Any,
        speaking_rate: Any,
        noise_scale_duration: Any,
        duration_noise: Any,
        durations: Any,
        key: jax.Array | None,
    ) -> tuple[Any, np.ndarray, Any]:
        ids = np.asarray(input_ids)
        if ids.ndim == 2 and ids.shape[0] == 1:
            ids = ids[0]
        if ids.ndim != 1 or ids.size == 0:
            raise UsageError(
                f"Synthesis takes one text's symbols, (time,), at least one; these have shape {ids.shape}."
            )
        if ids.min() < 0 or ids.max() >= self.config.vocab_size:
            raise UsageError(
                f"This model's symbols run from 0 to {self.config.vocab_size - 1}; "
                f"these from {ids.min()} to {ids.max()}."
            )
        voices = self.config.num_speakers
        if voices > 1 and speaker_id is not None and not 0 <= speaker_id < voices:
            raise UsageError(f"There is no voice {speaker_id}; this model has voices 0 to {voices - 1}.")
        time, config = ids.size, self.config
        size = bucket(time, 32)
        padded, mask = np.zeros((1, size), np.int32), np.zeros((1, size), np.int32)
        padded[0, :time], mask[0, :time] = ids, 1
        options: dict[str, Any] = {
            "speaking_rate": float(config.speaking_rate if speaking_rate is None else speaking_rate),
            "noise_scale_duration": float(
                config.noise_scale_duration if noise_scale_duration is None else noise_scale_duration
            ),
        }
        if options["speaking_rate"] <= 0:
            raise UsageError(f"The speaking rate must be above 0; it is {options['speaking_rate']}.")
        options |= _noise("duration_noise", duration_noise, size, key)
        speaker = None if speaker_id is None or config.num_speakers <= 1 else np.asarray([speaker_id], np.int32)
        means, deviations, predicted = self._first(self._state, padded, mask, speaker, options)
        if durations is None:
            lasting = np.asarray(predicted)
        else:
            if np.size(durations) != time:
                raise UsageError(f"There are {np.size(durations)} durations for {time} symbols.")
            lasting = np.zeros((1, size), np.float32)
            lasting[0, :time] = np.asarray(durations).reshape(-1)
        seconds = float(lasting.sum()) * config.hop_length / config.sampling_rate
        if not seconds <= LONGEST:  # infinite, or no number
            raise UsageError(
                f"This text would last {seconds:,.0f} s, at this speaking rate and with this noise of the durations; "
                f"{LONGEST} s at most are said at once."
            )
        return (means, deviations), lasting, speaker

    def _options(self, noise_scale: Any, prior_noise: Any, key: jax.Array | None, size: int) -> dict[str, Any]:
        scale = float(self.config.noise_scale if noise_scale is None else noise_scale)
        return {"noise_scale": scale} | _noise("prior_noise", prior_noise, size, key)

    def __call__(
        self,
        input_ids: Sequence[int] | Int[Array, " time"],
        speaker_id: int | None = None,
        *,
        speaking_rate: float | None = None,
        noise_scale: float | None = None,
        noise_scale_duration: float | None = None,
        durations: Float[Array, " time"] | None = None,
        duration_noise: Float[Array, "1 time 2"] | None = None,
        prior_noise: Float[Array, "1 frames latent"] | None = None,
        key: jax.Array | None = None,
        text: str = "",
    ) -> Speech:
        """Synthesise one text; the options are those of `VitsModel`'s call.

        Raises:
            UsageError: for symbols or a voice that the model does not have.
        """
        prior, lasting, speaker = self._prior(
            input_ids, speaker_id, speaking_rate, noise_scale_duration, duration_noise, durations, key
        )
        frames = max(int(lasting.sum()), 1)
        size = bucket(frames)
        options = self._options(noise_scale, prior_noise, key, size)
        waveform = self._whole(self._state, size, prior, lasting, speaker, options)
        return self._speech(text, np.asarray(waveform)[0, : frames * self.config.hop_length], input_ids, lasting)

    def _speech(self, text: str, waveform: np.ndarray, input_ids: Any, lasting: np.ndarray) -> Speech:
        ids = np.asarray(input_ids).reshape(-1)
        samples = (lasting[0, : ids.size] * self.config.hop_length).astype(np.int64)
        return Speech(text, waveform, self.config.sampling_rate, ids, samples)

    def stream(
        self,
        input_ids: Sequence[int] | Int[Array, " time"],
        speaker_id: int | None = None,
        *,
        chunk_frames: int = 64,
        speaking_rate: float | None = None,
        noise_scale: float | None = None,
        noise_scale_duration: float | None = None,
        durations: Float[Array, " time"] | None = None,
        duration_noise: Float[Array, "1 time 2"] | None = None,
        prior_noise: Float[Array, "1 frames latent"] | None = None,
        key: jax.Array | None = None,
    ) -> Iterator[np.ndarray]:
        """The same waveform in pieces of `chunk_frames` frames, the first long before the last is computed.

        Each piece is decoded with the frames around it that have a part in it (`HifiGanConfig.receptive_frames`), so
        that the pieces laid end to end are the whole.

        Raises:
            UsageError: for symbols or a voice that the model does not have, or pieces of no frame.
        """
        if chunk_frames < 1:
            raise UsageError(f"A piece has at least 1 frame, not {chunk_frames}.")
        prior, lasting, speaker = self._prior(
            input_ids, speaker_id, speaking_rate, noise_scale_duration, duration_noise, durations, key
        )
        frames, hop, reach = max(int(lasting.sum()), 1), self.config.hop_length, self.config.decoder.receptive_frames()
        size = bucket(frames)
        z, _ = self._latents(
            self._state, size, prior, lasting, speaker, self._options(noise_scale, prior_noise, key, size)
        )
        z = np.asarray(z)[:, :frames]
        window = chunk_frames + 2 * reach
        for start in range(0, frames, chunk_frames):
            # At the beginning the window is not moved to the left of it: what is there must be the convolutions' zeros.
            left = max(start - reach, 0)
            part = z[:, left : left + window]
            length = np.asarray([part.shape[1]], np.int32)
            part = np.pad(part, ((0, 0), (0, window - part.shape[1]), (0, 0)))
            waveform = np.asarray(self._piece(self._state, part, length, speaker))[0]
            first = (start - left) * hop
            yield waveform[first : first + min(chunk_frames, frames - start) * hop]


def speak(
    model: Any,
    sentences: Iterable[tuple[str, Sequence[int]]],
    *,
    speaker_id: int | None = None,
    speaking_rate: float | None = None,
    noise_scale: float | None = None,
    noise_scale_duration: float | None = None,
    seed: int = 0,
) -> Iterator[Speech]:
    """Speak a text, sentence by sentence.

    Args:
        model: the model, or a `Synthesizer` of it to be used again.
        sentences: each sentence and its symbols, as a processor's `sentences(text)` gives them.
        speaker_id: voice, of a model with several.
        speaking_rate: speed.
        noise_scale: liveliness of the sound.
        noise_scale_duration: liveliness of the rhythm.
        seed: of the noise.
    """
    synthesizer = model if isinstance(model, Synthesizer) else Synthesizer(model)
    if speaker_id is None and synthesizer.config.num_speakers > 1:
        speaker_id = 0
    for index, (sentence, ids) in enumerate(sentences):
        yield synthesizer(
            ids,
            speaker_id,
            speaking_rate=speaking_rate,
            noise_scale=noise_scale,
            noise_scale_duration=noise_scale_duration,
            key=jax.random.fold_in(jax.random.key(seed), index),
            text=sentence,
        )


def durations_of(attentions: Float[Array, "layers heads steps inputs"], samples: int) -> Int[np.ndarray, " inputs"]:
    """Samples of each symbol, by the monotonic path that a decoder's attention to its symbols fits best.

    The mean over layers and heads is searched. With fewer steps than symbols the samples are dealt out evenly.
    """
    mean = np.asarray(attentions, np.float32).mean(axis=(0, 1))
    steps, inputs = mean.shape
    ends = np.linspace(0, samples, inputs + 1).round()
    if steps >= inputs:
        scores = jnp.log(jnp.maximum(mean, 1e-8))[None]
        path = monotonic_alignment(scores, jnp.asarray([steps]), jnp.asarray([inputs]))[0]
        ends = np.concatenate([[0], np.cumsum(np.asarray(path).sum(axis=0))]) * samples / steps
    return np.diff(ends.round()).astype(np.int64)


def speak_spectrograms(
    model: Any,
    vocoder: Any,
    sentences: Iterable[tuple[str, Sequence[int]]],
    *,
    speaker_embedding: Float[np.ndarray, " speaker"],
    seed: int = 0,
    alignments: bool = False,
    threshold: float = 0.5,
    minlenratio: float = 0.0,
    maxlenratio: float = 20.0,
) -> Iterator[Speech]:
    """Speak a text, sentence by sentence, with a model that makes spectrograms (SpeechT5) and a vocoder.

    Args:
        model: makes a spectrogram of symbols, frame by frame.
        vocoder: makes sound of it.
        sentences: each sentence and its symbols, as a processor's `sentences(text)` gives them.
        speaker_embedding: x-vector of the wanted voice.
        seed: of the dropout that stays on when speaking.
        alignments: find out how long each symbol lasts; otherwise the last one has all samples.
        threshold: probability of the end at which a sentence ends.
        minlenratio: least number of frames for each symbol.
        maxlenratio: greatest number.
    """
    speaker = np.asarray(speaker_embedding, np.float32)[None]
    for index, (sentence, symbols) in enumerate(sentences):
        ids = np.asarray(symbols, np.int32)
        spoken = model.generate(
            ids[None],
            speaker_embeddings=speaker,
            vocoder=vocoder,
            output_cross_attentions=alignments,
            key=jax.random.fold_in(jax.random.key(seed), index),
            threshold=threshold,
            minlenratio=minlenratio,
            maxlenratio=maxlenratio,
        )
        waveform, attentions = spoken if alignments else (spoken, None)
        durations = np.zeros(len(ids), np.int64)
        durations[-1] = len(waveform)
        if attentions is not None:
            durations = durations_of(attentions, len(waveform))
        yield Speech(sentence, waveform, vocoder.config.sampling_rate, ids, durations)
