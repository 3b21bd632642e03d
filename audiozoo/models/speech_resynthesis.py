r"""# Speech Resynthesis from Discrete Disentangled Self-Supervised Representations

Adam Polyak, Yossi Adi, Jade Copet, Eugene Kharitonov, Kushal Lakhotia, Wei-Ning Hsu, Abdelrahman Mohamed,
Emmanuel Dupoux, 2021, arXiv 2104.00355.

What is said, as a sequence of discrete units (cluster numbers of a self-supervised model's frames), and who says it, as
one vector, are enough to make the waveform again: a HiFi-GAN whose input is not a spectrogram but looked up in tables.
Speech translation took it over to speak what it has translated into units (Lee et al., arXiv 2107.05604): units that
repeat are written once there, and a small network says for how many frames each of them lasts.

    units u_1 … u_T ── table ──> (T, 1280) ── duration predictor ──> d_1 … d_T, at least 1 frame of 20 ms each
      ── each repeated d_t times ──> (frames, 1280) ┐
    language ── table ──> (1, 256) ── repeated ─────┼── side by side ── HiFi-GAN, × 320 ──> waveform at 16 kHz
    speaker ── table ──> (1, 256) ── repeated ──────┘

| paper | here |
| --- | --- |
| §3.2, decoder: HiFi-GAN over embedded codes; Figure 1 | `CodeHifiGan` |
| §3.1, speaker embedding, a table | `CodeHifiGan.features` |
| §3.2, training: HiFi-GAN's losses | `generator_losses`, `CodeBatch` |
| arXiv 2107.05604, units without repetitions | `run_lengths` |
| arXiv 2107.05604, duration prediction (FastSpeech 2, arXiv 2006.04558, §2.3) | `VariancePredictor` |
| arXiv 2308.11596, §4, one vocoder for 36 languages | `SeamlessM4TCodeHifiGan`, `CodeHifiGanConfig` |
| arXiv 2312.05187, §3, the same network with other weights | `SeamlessM4Tv2CodeHifiGan` |

What is not here: the paper's pitch codes, with the VQ-VAE that makes them; no checkpoint that the zoo runs has them.

A batch comes out as its items would one by one: padding is silence to every convolution, and each item ends where its
own units do. `transformers` pads too, but its convolutions see the padding, and the duration predictor gives it sound;
and it takes the *number* of units that are not the padding's for the item's length, although 1, the padding, is a unit
as well. Tests show both.

Checkpoints: `vocoder_v2.pt` and `vocoder_36langs.pt` of the authors of SeamlessM4T, and the vocoders inside its
checkpoints, `facebook/hf-seamless-m4t-{medium,large}` and `facebook/seamless-m4t-v2-large`.

    import audiozoo
    vocoder = audiozoo.load("vocoder_v2.pt")
    units = [[5884, 2411, 5280, 1803, 5932, 3421, 3992, 1867]]
    waveform, lengths = vocoder(units, speaker_id=0, lang_id=4)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from audiozoo.decoding.synthesis import bucket
from audiozoo.errors import UsageError
from audiozoo.layers import Conv1d, Dropout, Embed, LayerNorm, Linear
from audiozoo.layers.alignment import repeat_by_duration
from audiozoo.layers.basic import at_least_float32
from audiozoo.layers.weight_norm import fold_weight_norm
from audiozoo.models import hifigan
from audiozoo.models.hifigan import HifiGanBatch, HifiGanConfig, HifiGanDiscriminator, HifiGanGenerator, HifiGanOutput
from audiozoo.outputs import ABSENT, ModelOutput


@dataclass(frozen=True)
class CodeHifiGanConfig:
    """Sizes of a vocoder of units, by default those of the released ones (arXiv 2308.11596, §4)."""

    unit_hifi_gan_vocab_size: int = 10_000  # units
    unit_embed_dim: int = 1280  # width of a unit's vector
    vocoder_num_langs: int = 36  # languages
    lang_embed_dim: int = 256  # width of a language's vector
    vocoder_num_spkrs: int = 200  # speakers
    spkr_embed_dim: int = 256  # width of a speaker's vector
    variance_predictor_kernel_size: int = 3  # taps of the duration predictor's convolutions
    var_pred_dropout: float = 0.5  # inside the duration predictor
    t2u_pad_token_id: int = 1  # what batches of units are padded with
    sampling_rate: int = 16_000  # Hz of the waveform
    upsample_initial_channel: int = 512  # channels before the generator's first stage
    upsample_rates: tuple[int, ...] = (5, 4, 4, 2, 2)  # samples out for each one in, stage by stage
    upsample_kernel_sizes: tuple[int, ...] = (11, 8, 8, 4, 4)  # taps of the transposed convolutions
    resblock_kernel_sizes: tuple[int, ...] = (3, 7, 11)  # taps, one residual block each
    resblock_dilation_sizes: tuple[tuple[int, ...], ...] = ((1, 3, 5), (1, 3, 5), (1, 3, 5))  # of each block's layers
    leaky_relu_slope: float = 0.1  # below zero
    weight_norm: bool = False  # keep magnitude and direction of the kernels apart, as for training

    @classmethod
    def seamless(cls, **changes: Any) -> CodeHifiGanConfig:
        """arXiv 2308.11596, §4, and 2312.05187: both vocoders, for 36 languages."""
        return cls(**changes)

    @property
    def generator(self) -> HifiGanConfig:
        """The HiFi-GAN that reads the three vectors side by side."""
        return HifiGanConfig(
            model_in_dim=self.lang_embed_dim + self.unit_embed_dim + self.spkr_embed_dim,
            sampling_rate=self.sampling_rate,
            upsample_initial_channel=self.upsample_initial_channel,
            upsample_rates=self.upsample_rates,
            upsample_kernel_sizes=self.upsample_kernel_sizes,
            resblock_kernel_sizes=self.resblock_kernel_sizes,
            resblock_dilation_sizes=self.resblock_dilation_sizes,
            leaky_relu_slope=self.leaky_relu_slope,
            weight_norm=self.weight_norm,
        )


def sizes_of(config: Any) -> CodeHifiGanConfig:
    """Not in the paper: the vocoder's sizes, of its own configuration or out of the translator's around it."""
    return config if isinstance(config, CodeHifiGanConfig) else config.vocoder


def run_lengths(
    units: Int[Array, "batch frames"], lengths: Int[Array, " batch"] | None = None
) -> tuple[Int[Array, "batch frames"], Int[Array, "batch frames"]]:
    """Units without repetitions, and for how many frames each one lasts; zeros behind the last one.

    arXiv 2107.05604, unit-based vocoder: "reduced" units. Frames from `lengths` on do not count.
    """
    frames = units.shape[1]
    valid = jnp.arange(frames) < (jnp.full(units.shape[:1], frames) if lengths is None else lengths)[:, None]
    begins = valid & jnp.concatenate([jnp.ones_like(valid[:, :1]), units[:, 1:] != units[:, :-1]], axis=1)
    run = jnp.cumsum(begins, axis=1) - 1

    def collect(units: jax.Array, begins: jax.Array, run: jax.Array, valid: jax.Array) -> tuple[jax.Array, jax.Array]:
        reduced = jnp.zeros_like(units).at[jnp.where(begins, run, frames)].set(units, mode="drop")
        return reduced, jnp.zeros_like(units).at[run].add(valid.astype(units.dtype))

    return jax.vmap(collect)(units, begins, run, valid)


class VariancePredictor(nnx.Module):
    r"""FastSpeech 2's predictor (arXiv 2006.04558, §2.3), here of $\ln(1 + d)$, $d$ the frames that a symbol lasts.

    Twice: convolution, ReLU, LayerNorm, dropout; then a projection to one value.
    """

    def __init__(
        self,
        features: int,
        hidden: int,
        kernel_size: int = 3,
        *,
        dropout: float = 0.5,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        padding = ((kernel_size - 1) // 2, kernel_size // 2)
        self.conv1 = Conv1d(features, hidden, kernel_size, padding=padding, **kwargs)
        self.ln1 = LayerNorm(hidden, **kwargs)
        self.conv2 = Conv1d(hidden, hidden, kernel_size, padding=padding, **kwargs)
        self.ln2 = LayerNorm(hidden, **kwargs)
        self.proj = Linear(hidden, 1, **kwargs)
        self.dropout_rate = dropout

    def __call__(
        self,
        x: Float[Array, "batch time features"],
        mask: Bool[Array, "batch time"] | None = None,
        dropout: Dropout | None = None,
    ) -> Float[Array, "batch time"]:
        """Predict one value a symbol; where `mask` is False the convolutions see zeros."""
        dropout = dropout or Dropout(None)
        for conv, norm in ((self.conv1, self.ln1), (self.conv2, self.ln2)):
            if mask is not None:
                x = jnp.where(mask[..., None], x, jnp.zeros((), x.dtype))
            x = dropout(norm(jax.nn.relu(conv(x))), self.dropout_rate)
        return self.proj(x)[..., 0]


def frames_of(log_durations: Float[Array, "batch time"], mask: Bool[Array, "batch time"]) -> Int[Array, "batch time"]:
    r"""$d = \max(1, \operatorname{round}(e^{\ln(1+d)} - 1))$ frames, halves to the even side; 0 outside the mask."""
    durations = jnp.maximum(jnp.round(jnp.expm1(at_least_float32(log_durations))).astype(jnp.int32), 1)
    return jnp.where(mask, durations, 0)


def repeat(
    values: Float[Array, "batch time channels"], durations: Int[Array, "batch time"], frames: int
) -> Float[Array, "batch frames channels"]:
    """Not in the paper: each symbol's vector as many times as it lasts, in `frames` frames, zeros at the end."""
    return repeat_by_duration(durations, frames, values)[0]


class CodeHifiGan(nnx.Module):
    """§3.2, Figure 1: units, a language and a speaker to a waveform."""

    own_voices: ClassVar[tuple[int, ...]] = ()  # of each language, the first of its own speakers
    static_arguments = ("frames",)

    def __init__(self, config: Any, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.config, config = config, sizes_of(config)
        width = config.unit_embed_dim
        self.dur_predictor = VariancePredictor(
            width, width, config.variance_predictor_kernel_size, dropout=config.var_pred_dropout, **kwargs
        )
        self.unit_embedding = Embed(config.unit_hifi_gan_vocab_size, width, **kwargs)
        self.speaker_embedding = Embed(config.vocoder_num_spkrs, config.spkr_embed_dim, **kwargs)
        self.language_embedding = Embed(config.vocoder_num_langs, config.lang_embed_dim, **kwargs)
        self.hifi_gan = HifiGanGenerator(config.generator, **kwargs)

    def own_voice(self, lang_id: int) -> int:
        """Not in the paper; in the released vocoders: a speaker of a language, or the first of all if none is known."""
        sizes = sizes_of(self.config)
        released = (sizes.vocoder_num_langs, sizes.vocoder_num_spkrs) == (len(self.own_voices), 200)
        return self.own_voices[lang_id] if released else 0

    def unit_lengths(self, input_ids: Int[Array, "batch time"]) -> Int[Array, " batch"]:
        """Units of each item: up to the last one that is not padding."""
        real = jnp.asarray(input_ids) != sizes_of(self.config).t2u_pad_token_id
        return jnp.max(jnp.where(real, jnp.arange(1, real.shape[1] + 1), 0), axis=1, initial=0)

    def durations(
        self, units: Float[Array, "batch time features"], lengths: Int[Array, " batch"]
    ) -> Int[Array, "batch time"]:
        """For how many frames of 20 ms each embedded unit lasts; 0 from `lengths` on."""
        mask = jnp.arange(units.shape[1]) < lengths[:, None]
        return frames_of(self.dur_predictor(units, mask), mask)

    def features(
        self,
        units: Float[Array, "batch time features"],
        speaker_id: Int[Array, " batch"],
        lang_id: Int[Array, " batch"],
        durations: Int[Array, "batch time"],
        frames: int,
    ) -> Float[Array, "batch frames inputs"]:
        """What the generator reads (§3.2): `[language; unit; speaker]` in each frame."""
        units = repeat(units, durations, frames)

        def everywhere(x: jax.Array) -> jax.Array:
            wide = jnp.broadcast_to(at_least_float32(x)[:, None], (len(units), frames, x.shape[-1]))
            return wide.astype(x.dtype)

        language, speaker = self.language_embedding(lang_id), self.speaker_embedding(speaker_id)
        return jnp.concatenate([everywhere(language), units, everywhere(speaker)], axis=-1)

    def decode(
        self,
        units: Float[Array, "batch time features"],
        speaker_id: Int[Array, " batch"],
        lang_id: Int[Array, " batch"],
        durations: Int[Array, "batch time"],
        frames: int,
    ) -> tuple[Float[Array, "batch samples"], Int[Array, " batch"]]:
        """The second half of the call: waveforms out of embedded units and their durations, and the samples of each."""
        features = self.features(units, speaker_id, lang_id, durations, frames)
        lengths = durations.sum(axis=1)
        waveform = self.hifi_gan(features, lengths=lengths)
        return waveform, lengths * self.hifi_gan.config.samples_per_frame

    def __call__(
        self,
        input_ids: Any,
        speaker_id: Any = 0,
        lang_id: Any = 0,
        *,
        lengths: Int[Array, " batch"] | None = None,
        durations: Int[Array, "batch time"] | None = None,
        dur_prediction: bool = True,
        frames: int | None = None,
    ) -> tuple[Float[Array, "batch samples"], Int[Array, " batch"]]:
        """Speak.

        How many frames come out depends on the durations. Eagerly they are looked at; inside `jax.jit` the shape must
        be known before: `frames`, or a call without duration prediction. `speak` compiles both halves.

        Args:
            input_ids: units, `(batch, time)`.
            speaker_id: a voice, or one for each item.
            lang_id: a language, or one for each item.
            lengths: units of each item; by default up to the last one that is not `t2u_pad_token_id`.
            durations: frames of each unit, in place of predicted ones.
            dur_prediction: False for units that are not reduced: each lasts one frame.
            frames: frames of the longest item; what is longer is cut.

        Returns:
            Waveforms, silent after each item's end, and the samples of each.

        Raises:
            UsageError: for a unit, voice or language that the model does not have; inside `jax.jit`, if the number of
                frames is not known.
        """
        ids, speakers, languages = checked(sizes_of(self.config), input_ids, speaker_id, lang_id)
        counts = self.unit_lengths(ids) if lengths is None else jnp.asarray(lengths)
        units = self.unit_embedding(ids)
        if durations is not None:
            durations = jnp.where(jnp.arange(units.shape[1]) < counts[:, None], durations, 0)
        elif dur_prediction:
            durations = self.durations(units, counts)
        else:
            durations = (jnp.arange(units.shape[1]) < counts[:, None]).astype(jnp.int32)
            frames = units.shape[1] if frames is None else frames
        if frames is None:
            if isinstance(durations, jax.core.Tracer):
                raise UsageError(
                    "How long the speech is depends on the units, so inside jax.jit frames must be given; speak() "
                    "compiles for units of any length."
                )
            frames = max(int(jnp.max(durations.sum(axis=1), initial=0)), 1)
        return self.decode(units, speakers, languages, durations, frames)

    def speak(
        self,
        input_ids: Any,
        speaker_id: Any = 0,
        lang_id: Any = 0,
        *,
        lengths: Any = None,
        dur_prediction: bool = True,
    ) -> tuple[np.ndarray, np.ndarray]:
        """As the call, compiled once for each of a few lengths; voice -1 is the language's own."""
        if np.ndim(speaker_id) == 0 and speaker_id == -1:
            speaker_id = [self.own_voice(int(language)) for language in np.ravel(lang_id)]
        units, speakers, languages = checked(sizes_of(self.config), input_ids, speaker_id, lang_id)
        if lengths is None:
            lengths = self.unit_lengths(units)
        graphdef, state = nnx.split(fold_weight_norm(self))
        padded = jnp.pad(units, ((0, 0), (0, bucket(units.shape[1]) - units.shape[1])))
        if dur_prediction:
            durations = _durations(graphdef, state, padded, jnp.asarray(lengths))
        else:
            durations = (jnp.arange(padded.shape[1]) < jnp.asarray(lengths)[:, None]).astype(jnp.int32)
        longest = max(int(durations.sum(axis=1).max(initial=0)), 1)
        waveform, samples = _decode(graphdef, state, padded, speakers, languages, durations, bucket(longest))
        waveform = at_least_float32(waveform)  # half precision is no sound file's
        return np.asarray(waveform)[:, : longest * self.hifi_gan.config.samples_per_frame], np.asarray(samples)


@partial(jax.jit, static_argnums=0)
def _durations(graphdef: Any, state: Any, units: jax.Array, lengths: jax.Array) -> jax.Array:
    model = nnx.merge(graphdef, state)
    return model.durations(model.unit_embedding(units), lengths)


@partial(jax.jit, static_argnums=(0, 6))
def _decode(graphdef: Any, state: Any, units: Any, speakers: Any, languages: Any, durations: Any, frames: int) -> Any:
    model = nnx.merge(graphdef, state)
    return model.decode(model.unit_embedding(units), speakers, languages, durations, frames)


def checked(
    config: CodeHifiGanConfig, input_ids: Any, speaker_id: Any, lang_id: Any
) -> tuple[Int[Array, "batch time"], Int[Array, " batch"], Int[Array, " batch"]]:
    """Not in the paper: units, a speaker and a language for each item, as arrays that fit one another.

    Raises:
        UsageError: for anything that the model's tables do not have.
    """
    units = jnp.asarray(input_ids)
    if units.ndim != 2 or not jnp.issubdtype(units.dtype, jnp.integer):
        raise UsageError(f"Units come as whole numbers, (batch, time), not as {units.dtype} {units.shape}.")
    given = (
        ("unit", units, config.unit_hifi_gan_vocab_size),
        ("speaker", jnp.asarray(speaker_id).reshape(-1), config.vocoder_num_spkrs),
        ("language", jnp.asarray(lang_id).reshape(-1), config.vocoder_num_langs),
    )
    for name, ids, size in given:
        if isinstance(ids, jax.core.Tracer) or not ids.size:
            continue
        wrong = np.asarray(ids)[(np.asarray(ids) < 0) | (np.asarray(ids) >= size)]
        if wrong.size:
            raise UsageError(f"There is no {name} {wrong[0]}; this vocoder has {name}s 0 to {size - 1}.")
    for name, ids, _ in given[1:]:
        if ids.shape[0] not in (1, len(units)):
            raise UsageError(f"{len(units)} items need one {name}, or one each, not {ids.shape[0]}.")
    speakers, languages = (jnp.broadcast_to(ids, units.shape[:1]) for _, ids, _ in given[1:])
    return units, speakers, languages


class SeamlessM4TCodeHifiGan(CodeHifiGan):
    """arXiv 2308.11596, §4: the vocoder of SeamlessM4T, by the name and with the argument that it has there."""

    own_voices = (
        0, 2, 3, 4, 5, 6, 7, 9, 10, 11, 14, 15, 16, 17, 29, 30, 31, 32, 35, 36, 37, 38, 39, 40, 41, 42, 43, 46, 49, 50,
        51, 58, 59, 60, 63, 66,
    )  # fmt: skip

    def __call__(  # type: ignore[override]
        self, input_ids: Any, spkr_id: Any = 0, lang_id: Any = 0, **options: Any
    ) -> tuple[jax.Array, jax.Array]:
        """Speak; see `CodeHifiGan`."""
        return super().__call__(input_ids, options.pop("speaker_id", spkr_id), lang_id, **options)


class SeamlessM4Tv2CodeHifiGan(CodeHifiGan):
    """arXiv 2312.05187, §3: the vocoder of SeamlessM4T v2, the same network with other weights."""

    own_voices = (
        0, 1, 2, 3, 4, 6, 7, 9, 10, 11, 14, 15, 16, 17, 29, 30, 31, 32, 35, 38, 39, 40, 41, 43, 44, 45, 46, 49, 52, 53,
        54, 61, 62, 63, 66, 69,
    )  # fmt: skip


# --- training --------------------------------------------------------------------------------------------------------


class CodeBatch(ModelOutput):
    """§3.2: a batch for training; one unit for each frame, repetitions included."""

    units: Int[Array, "batch frames"] = ABSENT
    waveform: Float[Array, "batch samples"] = ABSENT
    speaker_id: Int[Array, " batch"] = ABSENT
    lang_id: Int[Array, " batch"] = ABSENT


class CodeHifiGanLosses(ModelOutput):
    """§3.2: the generator's loss and its parts, weights included."""

    total: Float[Array, ""] = ABSENT
    mel: Float[Array, ""] = ABSENT
    adversarial: Float[Array, ""] = ABSENT
    features: Float[Array, ""] = ABSENT
    duration: Float[Array, ""] = ABSENT


def duration_error(
    predicted: Float[Array, "batch time"], durations: Int[Array, "batch time"], mask: Bool[Array, "batch time"]
) -> Float[Array, ""]:
    r"""Mean of $(\ln(1 + \hat d) - \ln(1 + d))^2$ inside the mask (arXiv 2107.05604)."""
    predicted = at_least_float32(predicted)
    error = jnp.square(predicted - jnp.log1p(durations.astype(predicted.dtype)))
    return jnp.sum(jnp.where(mask, error, 0)) / jnp.maximum(mask.sum(), 1)


def duration_loss(
    model: CodeHifiGan, units: Int[Array, "batch frames"], *, key: jax.Array | None = None
) -> Float[Array, ""]:
    r"""`duration_error` over the runs of equal units.

    The first and the last run of a segment are cut by its ends, and left out, unless there are no others.
    """
    reduced, durations = run_lengths(units)
    count = jnp.sum(durations > 0, axis=1, keepdims=True)
    first = (count > 2).astype(units.dtype)
    index = jnp.arange(units.shape[1])
    mask = index < count - 2 * first
    position = jnp.minimum(index + first, units.shape[1] - 1)
    reduced, durations = (jnp.take_along_axis(x, position, axis=1) for x in (reduced, durations))
    return duration_error(model.dur_predictor(model.unit_embedding(reduced), mask, Dropout(key)), durations, mask)


def generator_losses(
    model: CodeHifiGan,
    discriminator: HifiGanDiscriminator,
    batch: CodeBatch,
    *,
    n_fft: int = 1024,
    hop_length: int = 256,
    num_mels: int = 80,
    duration_weight: float = 1.0,
    key: jax.Array | None = None,
) -> tuple[CodeHifiGanLosses, HifiGanOutput, Float[Array, "batch samples"]]:
    r"""§3.2: HiFi-GAN's $L_G$ over embedded units, and the loss of the duration predictor (arXiv 2107.05604).

    Args:
        model: the vocoder.
        discriminator: its judge, held fixed.
        batch: units frame by frame, and waveforms of 320 samples a frame.
        n_fft: samples in a frame of the loss's spectrogram.
        hop_length: samples from one of its frames to the next.
        num_mels: its bands.
        duration_weight: of the durations' loss.
        key: switches dropout on.

    Returns:
        The losses, what was generated, and the real waveform.
    """
    frames = batch.units.shape[1]
    units = model.unit_embedding(batch.units)
    features = model.features(units, batch.speaker_id, batch.lang_id, jnp.ones_like(batch.units), frames)
    losses, generated, real = hifigan.generator_losses(
        model.hifi_gan,
        discriminator,
        HifiGanBatch(features, batch.waveform),
        n_fft=n_fft,
        hop_length=hop_length,
        num_mels=num_mels,
    )
    duration = duration_weight * duration_loss(model, batch.units, key=key)
    total = losses.total + duration
    return CodeHifiGanLosses(total, losses.mel, losses.adversarial, losses.features, duration), generated, real
