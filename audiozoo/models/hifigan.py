r"""# HiFi-GAN: Generative Adversarial Networks for Efficient and High Fidelity Speech Synthesis

Jungil Kong, Jaehyeon Kim, Jaekyoung Bae, 2020, arXiv 2010.05646.

A spectrogram becomes a waveform through a few transposed convolutions, each followed by residual blocks of several
kernel sizes and dilations whose outputs are averaged, so that patterns of many lengths are seen at once. Two kinds of
discriminators teach it: some see the waveform folded at prime periods, some see it at three rates.

    spectrogram (frames, bins) ── Conv k7 ──> (frames, d)
      ── [LeakyReLU, ConvTranspose × rate, mean over kernels of ResBlock(x)] per stage ──> (samples, d / 2^stages)
      ── LeakyReLU, Conv k7, tanh ──> waveform                                                 generator

    waveform ── fold at period p ── [Conv k5 s3, LeakyReLU] × 5 ── Conv k3 ──> scores          multi-period
    waveform ── average-pooled × 1, 2, 4 ── [grouped Conv k41] … ── Conv k3 ──> scores         multi-scale

| paper | here |
| --- | --- |
| §2.2, generator and multi-receptive field fusion; Figure 1 | `HifiGanGenerator` |
| §2.2 and Appendix A, residual blocks of variants 1, 2 and of variant 3 | `ResBlock1`, `ResBlock2` |
| §2.3, multi-period discriminator; Figure 2 | `PeriodDiscriminator`, `MultiPeriodDiscriminator` |
| §2.3, multi-scale discriminator | `ScaleDiscriminator`, `MultiScaleDiscriminator`, `SpectralNormConv1d` |
| §2.4, Eq. 1 and 2, least-squares GAN | `discriminator_loss`, `generator_loss` |
| §2.4, Eq. 3, mel-spectrogram loss | `log_mel`, `mel_loss` |
| §2.4, Eq. 4, feature matching | `feature_loss` |
| §2.4, Eq. 5 to 8, final losses; training | `generator_losses`, `discriminator_losses`, `HifiGanDiscriminator` |
| §3 and Appendix A, sizes | `HifiGanConfig.v1()`, `v2()`, `v3()` |
| not in the paper; in the released checkpoints | `SpeechT5HifiGan` |

Two generators that other papers took over differ in small things, each a field of the configuration: SpeechT5's
standardises its input (`normalize_before`), VITS' leaves its first and last convolution unnormalised, the last one
without bias, and adds a speaker's embedding (`condition_dim`). In all of them the slope before the last convolution is
0.01, not 0.1: the released code leaves it at PyTorch's default.

Checkpoints: the authors' `generator_v1`, `generator_v2`, `generator_v3` and `g_02500000`, each with its `config.json`
beside it; `microsoft/speecht5_hifigan`; and the decoders inside SeamlessM4T, VITS, MMS and Piper voices. A
training that goes on from a `g_02500000` takes the discriminators from the `do_02500000` beside it.

    import audiozoo
    vocoder = audiozoo.jit(audiozoo.load("microsoft/speecht5_hifigan"))
    processor = audiozoo.load_processor("microsoft/speecht5_hifigan")
    inputs = processor(audiozoo.audio.read("speech.wav"), sampling_rate=16_000)
    waveform = vocoder(**inputs)  # spectrogram (batch, frames, 80) -> (batch, 256 · frames)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from audiozoo.audio.features import mel_filterbank, stft
from audiozoo.errors import UsageError
from audiozoo.layers import Conv1d
from audiozoo.layers.basic import at_least_float32, spread, unit_vectors
from audiozoo.layers.weight_norm import WeightNormConv1d, WeightNormConvTranspose1d
from audiozoo.outputs import ABSENT, ModelOutput


@dataclass(frozen=True)
class HifiGanConfig:
    """The generator's sizes (§3, Appendix A) and the released checkpoints' variations."""

    model_in_dim: int = 80  # bins of a spectrogram frame
    sampling_rate: int = 22_050  # Hz of the waveform
    upsample_initial_channel: int = 512  # d, channels before the first stage; each stage halves them
    upsample_rates: tuple[int, ...] = (8, 8, 2, 2)  # samples out for each one in, stage by stage
    upsample_kernel_sizes: tuple[int, ...] = (16, 16, 4, 4)  # taps of the transposed convolutions
    resblock: str = "1"  # residual blocks of variant "1" (pairs of convolutions) or "2" (single ones)
    resblock_kernel_sizes: tuple[int, ...] = (3, 7, 11)  # taps, one residual block each
    resblock_dilation_sizes: tuple[tuple[int, ...], ...] = ((1, 3, 5), (1, 3, 5), (1, 3, 5))  # of each block's layers
    leaky_relu_slope: float = 0.1  # below zero, everywhere but before the last convolution
    final_leaky_relu_slope: float = 0.01  # below zero, before the last convolution
    normalize_before: bool = False  # standardise the spectrogram by stored means and scales (SpeechT5)
    condition_dim: int = 0  # width of a speaker's embedding added after the first convolution; 0 for none (VITS)
    use_post_bias: bool = True  # whether the last convolution has a bias (not in VITS)
    weight_norm: bool = True  # keep magnitude and direction of the kernels apart; False for folded checkpoints
    weight_norm_ends: bool = True  # whether that goes for the first and the last convolution too (not in VITS)

    def __post_init__(self) -> None:
        for one, other in (
            ("upsample_rates", "upsample_kernel_sizes"),
            ("resblock_kernel_sizes", "resblock_dilation_sizes"),
        ):
            if (count := len(getattr(self, one))) != (counted := len(getattr(self, other))):
                raise UsageError(f"{one} has {count} entries and {other} {counted}; they must be as many.")
        for rate, size in zip(self.upsample_rates, self.upsample_kernel_sizes, strict=True):
            if rate < 1 or size < rate or (size - rate) % 2:
                raise UsageError(
                    f"A kernel of {size} makes no {rate} samples of a frame; it must reach as far to either side."
                )
        if self.resblock not in ("1", "2"):
            raise UsageError(f"There are residual blocks '1' and '2', not {self.resblock!r}.")

    @property
    def samples_per_frame(self) -> int:
        """Samples out for each frame in."""
        return math.prod(self.upsample_rates)

    @classmethod
    def v1(cls, **changes: Any) -> HifiGanConfig:
        """Variant 1 (§3), for quality."""
        return cls(**changes)

    @classmethod
    def v2(cls, **changes: Any) -> HifiGanConfig:
        """Variant 2 (§3): a quarter of the channels."""
        return cls(**{"upsample_initial_channel": 128, **changes})

    @classmethod
    def v3(cls, **changes: Any) -> HifiGanConfig:
        """Variant 3 (§3, Appendix A): three stages and single-convolution residual blocks."""
        sizes: dict[str, Any] = {
            "upsample_initial_channel": 256,
            "upsample_rates": (8, 8, 4),
            "upsample_kernel_sizes": (16, 16, 8),
            "resblock": "2",
            "resblock_kernel_sizes": (3, 5, 7),
            "resblock_dilation_sizes": ((1, 2), (2, 6), (3, 12)),
        }
        return cls(**(sizes | changes))

    @classmethod
    def speecht5(cls, **changes: Any) -> HifiGanConfig:
        """SpeechT5's vocoder, in its released checkpoint: four stages of 4 at 16 kHz."""
        sizes: dict[str, Any] = {
            "sampling_rate": 16_000,
            "upsample_rates": (4, 4, 4, 4),
            "upsample_kernel_sizes": (8, 8, 8, 8),
            "normalize_before": True,
            "weight_norm": False,
        }
        return cls(**(sizes | changes))

    def receptive_frames(self) -> int:
        """Frames on either side that have a part in a frame's samples; for decoding in chunks."""
        samples = 3  # of the last convolution, k7
        stages = zip(reversed(self.upsample_rates), reversed(self.upsample_kernel_sizes), strict=True)
        second = self.resblock == "1"  # each dilated convolution is followed by a plain one
        widest = max(
            sum((size - 1) // 2 * (dilation + second) for dilation in dilations)
            for size, dilations in zip(self.resblock_kernel_sizes, self.resblock_dilation_sizes, strict=True)
        )
        for rate, size in stages:
            samples += widest
            # Sample n of a transposed convolution reads the frames i with 0 <= n + p - i·rate < size.
            padding = (size - rate) // 2
            after = (rate - 1 + samples + padding) // rate
            before = -((-samples + padding - size + 1) // rate)
            samples = max(after, before)
        return samples + 3  # of the first convolution, k7


def _mask(x: Float[Array, "batch time channels"], lengths: Int[Array, " batch"] | None) -> jax.Array:
    """Zeros from `lengths` on: what a convolution finds beyond the end of a single item."""
    if lengths is None:
        return x
    return jnp.where((jnp.arange(x.shape[1]) < lengths[:, None])[..., None], x, jnp.zeros((), x.dtype))


class _ResBlock(nnx.Module):
    """What the two residual blocks share."""

    slope: float

    def activate(self, x: jax.Array, lengths: Int[Array, " batch"] | None) -> jax.Array:
        """LeakyReLU, and silence beyond each item's end."""
        return _mask(jax.nn.leaky_relu(x, self.slope), lengths)


class ResBlock1(_ResBlock):
    r"""Residual block of variants 1 and 2 (§2.2; Appendix A, Table 5): per dilation $d$,
    $x \leftarrow x + \text{Conv}_1(\phi(\text{Conv}_d(\phi(x))))$, $\phi$ LeakyReLU.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        dilations: tuple[int, ...],
        *,
        slope: float = 0.1,
        weight_norm: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        def conv(dilation: int) -> WeightNormConv1d:
            padding = (kernel_size - 1) * dilation // 2
            return WeightNormConv1d(
                channels, channels, kernel_size, dilation=dilation, padding=padding, folded=not weight_norm, **kwargs
            )

        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.convs1 = nnx.List([conv(dilation) for dilation in dilations])
        self.convs2 = nnx.List([conv(1) for _ in dilations])
        self.slope = slope

    def __call__(
        self, x: Float[Array, "batch time channels"], lengths: Int[Array, " batch"] | None = None
    ) -> Float[Array, "batch time channels"]:
        """All dilations in turn; beyond `lengths` the convolutions see silence."""
        for dilated, plain in zip(self.convs1, self.convs2, strict=True):
            x = x + plain(self.activate(dilated(self.activate(x, lengths)), lengths))
        return x


class ResBlock2(_ResBlock):
    r"""Residual block of variant 3 (Appendix A, Table 5): per dilation, $x \leftarrow x + \text{Conv}_d(\phi(x))$."""

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        dilations: tuple[int, ...],
        *,
        slope: float = 0.1,
        weight_norm: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.convs = nnx.List(
            [
                WeightNormConv1d(
                    channels,
                    channels,
                    kernel_size,
                    dilation=dilation,
                    padding=(kernel_size - 1) * dilation // 2,
                    folded=not weight_norm,
                    dtype=dtype,
                    param_dtype=param_dtype,
                    rngs=rngs,
                )
                for dilation in dilations
            ]
        )
        self.slope = slope

    def __call__(
        self, x: Float[Array, "batch time channels"], lengths: Int[Array, " batch"] | None = None
    ) -> Float[Array, "batch time channels"]:
        """All dilations in turn; beyond `lengths` the convolutions see silence."""
        for conv in self.convs:
            x = x + conv(self.activate(x, lengths))
        return x


class HifiGanGenerator(nnx.Module):
    """Spectrogram to waveform (§2.2, Figure 1): transposed convolutions and multi-receptive field fusion."""

    def __init__(self, config: HifiGanConfig, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        ends_folded = not (config.weight_norm and config.weight_norm_ends)

        def end(features_in: int, features_out: int, **more: Any) -> Conv1d:
            more |= {"padding": 3, **kwargs}
            if config.weight_norm_ends:
                return WeightNormConv1d(features_in, features_out, 7, folded=ends_folded, **more)
            return Conv1d(features_in, features_out, 7, **more)

        channels = [config.upsample_initial_channel // 2**i for i in range(len(config.upsample_rates) + 1)]
        block = ResBlock1 if config.resblock == "1" else ResBlock2
        self.conv_pre = end(config.model_in_dim, channels[0])
        self.upsampler = nnx.List(
            [
                WeightNormConvTranspose1d(
                    channels[i],
                    channels[i + 1],
                    size,
                    stride=rate,
                    padding=(size - rate) // 2,
                    folded=not config.weight_norm,
                    **kwargs,
                )
                for i, (rate, size) in enumerate(zip(config.upsample_rates, config.upsample_kernel_sizes, strict=True))
            ]
        )
        self.resblocks = nnx.List(
            [
                block(width, size, dilations, slope=config.leaky_relu_slope, weight_norm=config.weight_norm, **kwargs)
                for width in channels[1:]
                for size, dilations in zip(config.resblock_kernel_sizes, config.resblock_dilation_sizes, strict=True)
            ]
        )
        self.conv_post = end(channels[-1], 1, use_bias=config.use_post_bias)
        if config.condition_dim:
            self.cond = Conv1d(config.condition_dim, channels[0], 1, **kwargs)
        if config.normalize_before:
            self.mean = nnx.BatchStat(jnp.zeros(config.model_in_dim, param_dtype))
            self.scale = nnx.BatchStat(jnp.ones(config.model_in_dim, param_dtype))
        self.config = config

    def __call__(
        self,
        spectrogram: Float[Array, "batch frames bins"],
        condition: Float[Array, "#batch one speaker"] | None = None,
        *,
        lengths: Int[Array, " batch"] | None = None,
    ) -> Float[Array, "batch samples"]:
        r"""Decode.

        Args:
            spectrogram: the features, frame by frame.
            condition: a speaker's embedding, for generators with `condition_dim`.
            lengths: frames of each item. With it each item comes out as it would by itself, and silent after its end;
                without it what lies beyond the end leaks into the last `receptive_frames`.

        Returns:
            A waveform in $(-1, 1)$, `config.samples_per_frame` samples a frame.
        """
        config = self.config
        x = spectrogram
        if config.normalize_before:
            x = (x - self.mean[...]) / self.scale[...]
        x = self.conv_pre(_mask(x, lengths))
        if condition is not None:
            x = x + spread(self.cond(condition), x)
        kernels = len(config.resblock_kernel_sizes)
        for i, (upsample, rate) in enumerate(zip(self.upsampler, config.upsample_rates, strict=True)):
            x = upsample(_mask(jax.nn.leaky_relu(x, config.leaky_relu_slope), lengths))
            lengths = None if lengths is None else lengths * rate
            # Multi-receptive field fusion: the mean of |k_r| residual blocks.
            fused = [block(x, lengths) for block in self.resblocks[i * kernels : (i + 1) * kernels]]
            x = sum(fused[1:], start=fused[0]) / kernels
        x = self.conv_post(_mask(jax.nn.leaky_relu(x, config.final_leaky_relu_slope), lengths))
        return _mask(jnp.tanh(x), lengths)[..., 0]


class SpeechT5HifiGan(HifiGanGenerator):
    """The generator as SpeechT5's released checkpoint has it: its input standardised, its kernels folded."""

    def __call__(
        self,
        spectrogram: Float[Array, "*batch frames bins"],
        condition: Float[Array, "#batch one speaker"] | None = None,
        *,
        lengths: Int[Array, " batch"] | None = None,
    ) -> Float[Array, "*batch samples"]:
        """Decode a batch, or one spectrogram `(frames, bins)` to one waveform `(samples,)`."""
        if spectrogram.ndim == 2:
            return super().__call__(spectrogram[None], condition, lengths=lengths)[0]
        return super().__call__(spectrogram, condition, lengths=lengths)


# --- discriminators --------------------------------------------------------------------------------------------------

Features = tuple[Float[Array, "_ _ _"], ...]  # of each layer: rows, time, channels


class PeriodDiscriminator(nnx.Module):
    """One part of the multi-period discriminator (§2.3, Figure 2b): every `period`-th sample, side by side.

    Its kernels reach over time only, so that each of the `period` columns is a row of the batch of a one-dimensional
    convolution.
    """

    def __init__(
        self,
        period: int,
        *,
        channels: tuple[int, ...] = (32, 128, 512, 1024, 1024),
        kernel_size: int = 5,
        stride: int = 3,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        widths = (1, *channels)
        self.convs = nnx.List(
            [
                WeightNormConv1d(
                    widths[i],
                    widths[i + 1],
                    kernel_size,
                    stride=stride if i < len(channels) - 1 else 1,
                    padding=(kernel_size - 1) // 2,
                    **kwargs,
                )
                for i in range(len(channels))
            ]
        )
        self.conv_post = WeightNormConv1d(channels[-1], 1, 3, padding=1, **kwargs)
        self.period = period

    def __call__(self, waveform: Float[Array, "batch time"]) -> tuple[Float[Array, "batch scores"], Features]:
        """Scores (near 1 for what it takes for real) and the features of every layer."""
        batch, time = waveform.shape
        rest = -time % self.period
        if rest:
            waveform = jnp.pad(waveform, ((0, 0), (0, rest)), mode="reflect")
        x = waveform.reshape(batch, -1, self.period).swapaxes(1, 2).reshape(batch * self.period, -1, 1)
        features = []
        for conv in self.convs:
            x = jax.nn.leaky_relu(conv(x), 0.1)
            features.append(x)
        x = self.conv_post(x)
        features.append(x)
        return x.reshape(batch, self.period, -1).swapaxes(1, 2).reshape(batch, -1), tuple(features)


class SpectralNormConv1d(Conv1d):
    r"""A convolution whose kernel is divided by its largest singular value (arXiv 1802.05957; cited in §2.3).

    $\sigma = u^\top W v$ with $W$ as a matrix `(out, in · taps)` and the singular vectors $u$, $v$ kept beside it as
    statistics; `power_iteration` brings them up to date, once for each forward of a training step.
    """

    def __init__(self, *args: Any, rngs: nnx.Rngs, **kwargs: Any):
        super().__init__(*args, rngs=rngs, **kwargs)
        taps, features_in, features_out = self.kernel.shape
        dtype = self.kernel.dtype
        self.u = nnx.BatchStat(unit_vectors(jax.random.normal(rngs.params(), (features_out,), dtype)))
        self.v = nnx.BatchStat(unit_vectors(jax.random.normal(rngs.params(), (features_in * taps,), dtype)))

    def matrix(self) -> Float[Array, "out columns"]:
        """The kernel as PyTorch flattens it."""
        kernel = self.kernel[...]
        return kernel.transpose(2, 1, 0).reshape(kernel.shape[2], -1)

    def weight(self) -> Float[Array, "time inputs outputs"]:
        r"""$W / \sigma$."""
        sigma = self.u[...] @ (self.matrix() @ self.v[...])
        return self.kernel[...] / sigma

    def power_iteration(self) -> None:
        r"""$v \leftarrow W^\top u$, $u \leftarrow W v$, each brought to length 1; changes the statistics in place."""
        matrix = jax.lax.stop_gradient(self.matrix())
        v = unit_vectors(matrix.T @ self.u[...], shortest=1e-12)
        self.v[...], self.u[...] = v, unit_vectors(matrix @ v, shortest=1e-12)


# (out channels, taps, stride, groups) of each layer.
HIFIGAN_SCALE_LAYERS = (
    (128, 15, 1, 1),
    (128, 41, 2, 4),
    (256, 41, 2, 16),
    (512, 41, 4, 16),
    (1024, 41, 4, 16),
    (1024, 41, 1, 16),
    (1024, 5, 1, 1),
)
VITS_SCALE_LAYERS = (
    (16, 15, 1, 1),
    (64, 41, 4, 4),
    (256, 41, 4, 16),
    (1024, 41, 4, 64),
    (1024, 41, 4, 256),
    (1024, 5, 1, 1),
)


class ScaleDiscriminator(nnx.Module):
    """One sub-discriminator of the multi-scale discriminator (§2.3; MelGAN, arXiv 1910.06711, Table 1d)."""

    def __init__(
        self,
        *,
        layers: tuple[tuple[int, int, int, int], ...] = HIFIGAN_SCALE_LAYERS,
        spectral_norm: bool = False,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        conv = SpectralNormConv1d if spectral_norm else WeightNormConv1d
        widths = (1, *(width for width, *_ in layers))
        self.convs = nnx.List(
            [
                conv(widths[i], width, taps, stride=stride, groups=groups, padding=taps // 2, **kwargs)
                for i, (width, taps, stride, groups) in enumerate(layers)
            ]
        )
        self.conv_post = conv(widths[-1], 1, 3, padding=1, **kwargs)

    def __call__(self, waveform: Float[Array, "batch time"]) -> tuple[Float[Array, "batch scores"], Features]:
        """Scores (near 1 for what it takes for real) and the features of every layer."""
        x = waveform[..., None]
        features = []
        for conv in self.convs:
            x = jax.nn.leaky_relu(conv(x), 0.1)
            features.append(x)
        x = self.conv_post(x)
        features.append(x)
        return x[..., 0], tuple(features)


class MultiPeriodDiscriminator(nnx.Module):
    """Sub-discriminators at periods 2, 3, 5, 7 and 11: primes, to overlap as little as possible (§2.3)."""

    def __init__(
        self,
        *,
        periods: tuple[int, ...] = (2, 3, 5, 7, 11),
        channels: tuple[int, ...] = (32, 128, 512, 1024, 1024),
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.discriminators = nnx.List(
            [
                PeriodDiscriminator(p, channels=channels, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
                for p in periods
            ]
        )

    def __call__(self, waveform: Float[Array, "batch time"]) -> tuple[list[jax.Array], list[Features]]:
        """Scores and features of each sub-discriminator."""
        judged = [discriminator(waveform) for discriminator in self.discriminators]
        return [scores for scores, _ in judged], [features for _, features in judged]


class MultiScaleDiscriminator(nnx.Module):
    """Three sub-discriminators: of the waveform, and of it averaged to half and to a quarter of the rate (§2.3).

    The first one's kernels are normalised by their spectral norm, the others' by weight normalisation.
    """

    def __init__(
        self,
        *,
        layers: tuple[tuple[int, int, int, int], ...] = HIFIGAN_SCALE_LAYERS,
        scales: int = 3,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.discriminators = nnx.List(
            [
                ScaleDiscriminator(layers=layers, spectral_norm=i == 0, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
                for i in range(scales)
            ]
        )

    def __call__(self, waveform: Float[Array, "batch time"]) -> tuple[list[jax.Array], list[Features]]:
        """Scores and features of each sub-discriminator."""
        scores, features = [], []
        for i, discriminator in enumerate(self.discriminators):
            if i:
                # The mean of 4 samples every 2, with 2 zeros at either end counted in.
                waveform = jax.lax.reduce_window(waveform, 0.0, jax.lax.add, (1, 4), (1, 2), ((0, 0), (2, 2))) / 4
            score, feature = discriminator(waveform)
            scores.append(score)
            features.append(feature)
        return scores, features


class HifiGanDiscriminator(nnx.Module):
    """Both kinds of discriminators together (§2.4, Eq. 7 and 8 sum over all of their parts)."""

    def __init__(
        self,
        *,
        periods: tuple[int, ...] = (2, 3, 5, 7, 11),
        period_channels: tuple[int, ...] = (32, 128, 512, 1024, 1024),
        scale_layers: tuple[tuple[int, int, int, int], ...] = HIFIGAN_SCALE_LAYERS,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.mpd = MultiPeriodDiscriminator(periods=periods, channels=period_channels, **kwargs)
        self.msd = MultiScaleDiscriminator(layers=scale_layers, **kwargs)

    def __call__(self, waveform: Float[Array, "batch time"]) -> tuple[list[jax.Array], list[Features]]:
        """Scores and features of each sub-discriminator."""
        (of_periods, period_features), (of_scales, scale_features) = self.mpd(waveform), self.msd(waveform)
        return of_periods + of_scales, period_features + scale_features


def power_iteration(model: nnx.Module) -> None:
    """Bring the singular vectors of every spectrally normalised layer up to date, in place."""
    for _, module in nnx.iter_modules(model):
        if isinstance(module, SpectralNormConv1d):
            module.power_iteration()


# --- losses ----------------------------------------------------------------------------------------------------------


def discriminator_loss(real: list[jax.Array], generated: list[jax.Array]) -> Float[Array, ""]:
    r"""$\sum_k \mathbb E[(D_k(x) - 1)^2 + D_k(G(s))^2]$ (Eq. 1)."""
    pairs = zip(map(at_least_float32, real), map(at_least_float32, generated), strict=True)
    return sum(
        (jnp.mean(jnp.square(1.0 - r)) + jnp.mean(jnp.square(g)) for r, g in pairs),
        start=jnp.zeros(()),
    )


def generator_loss(generated: list[jax.Array]) -> Float[Array, ""]:
    r"""$\sum_k \mathbb E[(D_k(G(s)) - 1)^2]$ (Eq. 2)."""
    return sum((jnp.mean(jnp.square(1.0 - g)) for g in map(at_least_float32, generated)), start=jnp.zeros(()))


def feature_loss(real: list[Features], generated: list[Features]) -> Float[Array, ""]:
    r"""$\lambda_{fm} \sum_k \sum_i \frac1{N_i} \lVert D_k^i(x) - D_k^i(G(s)) \rVert_1$, $\lambda_{fm} = 2$ (Eq. 4, 5).

    The real features are targets: no gradient goes through them.
    """
    distances = (
        jnp.mean(jnp.abs(at_least_float32(jax.lax.stop_gradient(r)) - at_least_float32(g)))
        for of_real, of_generated in zip(real, generated, strict=True)
        for r, g in zip(of_real, of_generated, strict=True)
    )
    return 2.0 * sum(distances, start=jnp.zeros(()))


def linear_spectrogram(
    waveform: Float[Array, "batch time"],
    n_fft: int,
    hop_length: int,
    *,
    epsilon: float = 1e-9,
    lengths: Int[Array, " batch"] | None = None,
) -> Float[Array, "batch frames bins"]:
    r"""$\sqrt{|X|^2 + \epsilon}$ of Hann windows of `n_fft` samples; one frame for each `hop_length` samples.

    Beyond its ends a waveform is mirrored; with `lengths`, in samples, each item is so beyond its own.
    """
    reach = (n_fft - hop_length) // 2
    if lengths is None:
        padded = jnp.pad(waveform, ((0, 0), (reach, reach)), mode="reflect")
    else:
        sample, last = jnp.abs(jnp.arange(-reach, waveform.shape[1] + reach)), lengths[:, None] - 1
        sample = jnp.where(sample > last, jnp.maximum(2 * last - sample, 0), sample)
        padded = jnp.take_along_axis(waveform, sample, axis=1)
    transform = stft(padded, n_fft, hop_length, center=False)
    return jnp.sqrt(jnp.square(transform.real) + jnp.square(transform.imag) + epsilon)


def mel_of_spectrogram(
    spectrogram: Float[Array, "batch frames bins"],
    sampling_rate: int,
    *,
    num_mels: int = 80,
    f_min: float = 0.0,
    f_max: float | None = None,
) -> Float[Array, "batch frames mels"]:
    r"""$\ln \max(M s, 10^{-5})$, $M$ Slaney's filterbank."""
    bank = mel_filterbank(spectrogram.shape[-1], num_mels, sampling_rate, f_min=f_min, f_max=f_max)
    return jnp.log(jnp.maximum(spectrogram @ jnp.asarray(bank, spectrogram.dtype), 1e-5))


def log_mel(
    waveform: Float[Array, "batch time"],
    sampling_rate: int = 22_050,
    *,
    n_fft: int = 1024,
    hop_length: int = 256,
    num_mels: int = 80,
    f_min: float = 0.0,
    f_max: float | None = None,
    epsilon: float = 1e-9,
) -> Float[Array, "batch frames mels"]:
    r"""$\phi$ of Eq. 3: the log-mel spectrogram that the loss compares, and (with `f_max` 8,000 Hz) the input."""
    spectrogram = linear_spectrogram(waveform, n_fft, hop_length, epsilon=epsilon)
    return mel_of_spectrogram(spectrogram, sampling_rate, num_mels=num_mels, f_min=f_min, f_max=f_max)


def mel_loss(
    target: Float[Array, "batch frames mels"], generated: Float[Array, "batch frames mels"]
) -> Float[Array, ""]:
    r"""$\lambda_{mel}\, \mathbb E \lVert \phi(x) - \phi(G(s)) \rVert_1$ (Eq. 3), $\lambda_{mel} = 45$ (Eq. 5)."""
    return 45.0 * jnp.mean(jnp.abs(target - generated))


class HifiGanBatch(ModelOutput):
    """A batch for training (§3): segments of spectrograms, and the waveforms that they were made of."""

    spectrogram: Float[Array, "batch frames bins"] = ABSENT
    waveform: Float[Array, "batch samples"] = ABSENT


class HifiGanLosses(ModelOutput):
    """The generator's loss and its parts, weights included (§2.4, Eq. 7)."""

    total: Float[Array, ""] = ABSENT
    mel: Float[Array, ""] = ABSENT
    adversarial: Float[Array, ""] = ABSENT
    features: Float[Array, ""] = ABSENT


class HifiGanOutput(ModelOutput):
    """§2.1: what the generator makes in training."""

    waveform: Float[Array, "batch samples"] = ABSENT


def generator_losses(
    model: HifiGanGenerator,
    discriminator: HifiGanDiscriminator,
    batch: HifiGanBatch,
    *,
    n_fft: int = 1024,
    num_mels: int = 80,
    hop_length: int | None = None,
    key: jax.Array | None = None,
) -> tuple[HifiGanLosses, HifiGanOutput, Float[Array, "batch samples"]]:
    r"""$L_G = \sum_k [L_{Adv}(G; D_k) + \lambda_{fm} L_{FM}(G; D_k)] + \lambda_{mel} L_{Mel}(G)$ (§2.4, Eq. 7).

    Args:
        model: the generator.
        discriminator: its judge, held fixed.
        batch: spectrograms and waveforms.
        n_fft: samples in a frame of the loss's spectrogram.
        num_mels: bands of it, over all frequencies.
        hop_length: samples from one of its frames to the next; by default those that the generator makes of a frame.
        key: not used: nothing here is drawn.

    Returns:
        The losses, what was generated, and the real waveform.
    """
    hop, rate = hop_length or model.config.samples_per_frame, model.config.sampling_rate
    generated = model(batch.spectrogram)

    def phi(waveform: jax.Array) -> jax.Array:
        return log_mel(waveform, rate, n_fft=n_fft, hop_length=hop, num_mels=num_mels)

    mel = mel_loss(phi(batch.waveform), phi(generated))
    _, real_features = discriminator(batch.waveform)
    scores, features = discriminator(generated)
    adversarial, matching = generator_loss(scores), feature_loss(real_features, features)
    losses = HifiGanLosses(adversarial + matching + mel, mel, adversarial, matching)
    return losses, HifiGanOutput(generated), batch.waveform


def discriminator_losses(
    discriminator: HifiGanDiscriminator,
    real: Float[Array, "batch samples"],
    generated: Float[Array, "batch samples"],
) -> Float[Array, ""]:
    r"""$L_D = \sum_k L_{Adv}(D_k; G)$ (§2.4, Eq. 8); no gradient goes back into `generated`."""
    scores, _ = discriminator(real)
    judged, _ = discriminator(jax.lax.stop_gradient(generated))
    return discriminator_loss(scores, judged)
