r"""# EnCodec: High Fidelity Neural Audio Compression

Alexandre Défossez, Jade Copet, Gabriel Synnaeve, Yossi Adi, 2022, arXiv 2210.13438.

An encoder turns a waveform into a few vectors a second; a residual vector quantiser replaces each of them by a sum of
codebook entries, of which as many are sent as the bandwidth allows; a decoder turns the sum back into a waveform. All
three are trained together, against reconstruction losses and against discriminators that look at complex spectrograms,
with a balancer that sets the size of each loss's gradient. A small Transformer that predicts the next indices lets an
arithmetic coder spend fewer bits on them.

    waveform (samples, channels) ── Conv k7 ── [ResBlock, ELU, Conv k2r stride r] × 4 ── LSTM × 2 ── ELU, Conv k7
      ──> z (frames, 128)                                                                                  encoder
    z ── e₁ = nearest entry to z; e₂ = nearest to z − e₁; … ──> codes (frames, K)           residual vector quantiser
    Σ eₖ ── Conv k7 ── LSTM × 2 ── [ELU, ConvTranspose k2r stride r, ResBlock] × 4 ── ELU, Conv k7 ──> waveform
                                                                                                           decoder
    codes ── Transformer ──> P(next codes) ── arithmetic coder ──> bytes                 `audiozoo.codec`: .ecdc files

| paper | here |
| --- | --- |
| §3.1, SEANet encoder and decoder; Figure 1 | `EncodecEncoder`, `EncodecDecoder` |
| §3.1, their layers | `EncodecConv1d`, `EncodecConvTranspose1d`, `EncodecResnetBlock`, `EncodecLSTM` |
| §3.1, streamable and non-streamable | `EncodecModel.encode_chunk`, `decode_chunk`; `EncodecModel.encode` |
| §3.2, residual vector quantisation, k-means, moving averages | `EncodecResidualVectorQuantizer`, `kmeans` |
| §3.3, language model and entropy coding | `EncodecLanguageModel`; `audiozoo.codec` |
| §3.4, reconstruction losses, Eq. 1 | `time_loss`, `frequency_loss` |
| §3.4, MS-STFT discriminator; Figure 2 | `STFTDiscriminator`, `MultiScaleSTFTDiscriminator` |
| §3.4, adversarial and feature losses, Eq. 2 | `generator_loss`, `feature_loss`, `discriminator_loss` |
| §3.4, commitment loss, Eq. 3 | `EncodecResidualVectorQuantizer.train_step` |
| §3.4, balancer, Eq. 5; its weights, §4.4 | `Balancer`, `codec_gradients` |
| §4.1 and released checkpoints, sizes | `EncodecConfig.encodec_24khz()`, `encodec_48khz()`, `encodec_32khz()` |
| not in the paper; the codec of AudioGen | `EncodecConfig.audiogen_16khz()` |

Where the released training code departs from the paper, the paper is followed, and `released=True` gives the other:
there the commitment loss reaches the encoder through the first codebook only, since the residual that the second one
sees is not detached; an entry that was replaced for want of use is overwritten by its old average at once; and after
k-means $m$ starts as the means, not the sums, so that entries shrink as the rows of the first batch outnumber them, and
take hundreds of steps to come back. In three things both codes follow their authors' release where the paper says
something else: the discriminator's first kernels are 3 × 9 (3 × 8 there), one discriminator serves all bandwidths (one
for each there), and the commitment loss is a mean over codebooks and channels (Eq. 3 is a sum).

Checkpoints: `facebook/encodec_24khz`, `facebook/encodec_48khz`, `facebook/encodec_32khz` (MusicGen's), the authors'
`encodec_24khz-d7cc33bc.th`, `encodec_48khz-7e698e3e.th` and language models `encodec_lm_24khz-1608e3c0.th`,
`encodec_lm_48khz-7add9fc3.th`, and AudioCraft's `compression_state_dict.bin`.

    import audiozoo
    from audiozoo.audio import read
    model = audiozoo.load("facebook/encodec_24khz")
    inputs = audiozoo.load_processor("facebook/encodec_24khz")(read("speech.wav", 24_000), sampling_rate=24_000)
    codes = model.encode(**inputs, bandwidth=6.0)  # .audio_codes (1, batch, 8, frames)
    waveform = model.decode(codes.audio_codes, codes.audio_scales).audio_values  # (batch, channels, samples)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from audiozoo.audio.chunks import chunk_sizes
from audiozoo.audio.features import hann_window, mel_filterbank, stft
from audiozoo.errors import AudioError, UsageError
from audiozoo.layers import Conv1d, LayerNorm, Linear, check_ids
from audiozoo.layers.activations import gelu
from audiozoo.layers.basic import GroupNorm, at_least_float32, promote, spread
from audiozoo.layers.convolution import ConvTranspose1d
from audiozoo.layers.positions import cosines_and_sines
from audiozoo.layers.weight_norm import (
    WeightNormConv1d,
    WeightNormConvTranspose1d,
    norm_except,
    weight_normalised,
)
from audiozoo.outputs import ABSENT, ModelOutput

_PADDING = {"reflect": "reflect", "constant": "constant", "replicate": "edge"}


@dataclass(frozen=True)
class EncodecConfig:
    """Sizes of §3.1 and §4.1, and of the language model of §3.3."""

    target_bandwidths: tuple[float, ...] = (1.5, 3.0, 6.0, 12.0, 24.0)  # kbit/s that the quantiser can be asked for
    sampling_rate: int = 24_000  # Hz
    audio_channels: int = 1  # 1 mono, 2 stereo
    normalize: bool = False  # divide every chunk by its loudness, and send that along (48 kHz)
    chunk_length_s: float | None = None  # seconds encoded at once; None for the whole recording
    overlap: float | None = None  # share of a chunk that the next one repeats
    hidden_size: int = 128  # channels of the latent z
    num_filters: int = 32  # C, channels of the first convolution; each downsampling doubles them
    num_residual_layers: int = 1  # residual blocks before each downsampling
    upsampling_ratios: tuple[int, ...] = (8, 5, 4, 2)  # strides of the decoder; the encoder has them in reverse
    norm_type: str = "weight_norm"  # of convolutions: "weight_norm", or "time_group_norm" (not causal)
    kernel_size: int = 7  # taps of the first convolution
    last_kernel_size: int = 7  # taps of the last convolution
    residual_kernel_size: int = 3  # taps of a residual block's first convolution
    dilation_growth_rate: int = 2  # dilation of residual block j is this to the power j
    use_causal_conv: bool = True  # pad on the left only, so that a stream can be coded as it comes
    pad_mode: str = "reflect"  # what lies beyond the ends: "reflect", "constant" (zeros) or "replicate"
    compress: int = 2  # a residual block's inner width is its outer one divided by this
    num_lstm_layers: int = 2  # S, in the encoder and in the decoder; with 0 there is no shortcut around them either
    trim_right_ratio: float = 1.0  # share of a causal transposed convolution's surplus that is cut on the right
    codebook_size: int = 1024  # entries of a codebook, a power of two
    codebook_dim: int | None = None  # channels of an entry; None or `hidden_size`
    use_conv_shortcut: bool = True  # a residual block's shortcut is a convolution, not the identity
    language_model_size: int = 200  # channels of the language model
    language_model_layers: int = 5  # its Transformer layers
    language_model_heads: int = 8  # attention heads
    language_model_context_s: float = 3.5  # seconds that it looks back

    def __post_init__(self) -> None:
        if self.norm_type not in ("weight_norm", "time_group_norm"):
            raise UsageError(f"norm_type is weight_norm or time_group_norm, not {self.norm_type!r}.")
        if self.pad_mode not in _PADDING:
            raise UsageError(f"pad_mode is one of {', '.join(_PADDING)}, not {self.pad_mode!r}.")
        if self.codebook_size & (self.codebook_size - 1):
            raise UsageError(f"codebook_size must be a power of two; {self.codebook_size} is not.")
        if self.codebook_dim not in (None, self.hidden_size):
            raise UsageError(
                f"codebook_dim is hidden_size ({self.hidden_size}) in all models; not {self.codebook_dim}."
            )
        if not self.use_causal_conv and self.trim_right_ratio != 1.0:
            raise UsageError("trim_right_ratio is for causal convolutions.")
        if self.chunk_length_s is not None and self.overlap is None:
            raise UsageError("chunk_length_s needs an overlap, which may be 0: it says where the next chunk begins.")
        chunk_sizes(self.chunk_length_s, self.overlap, self.sampling_rate)

    @property
    def hop_length(self) -> int:
        """Samples a frame of codes."""
        return math.prod(self.upsampling_ratios)

    @property
    def frame_rate(self) -> int:
        """Frames of codes a second."""
        return -(-self.sampling_rate // self.hop_length)

    @property
    def bits_per_codebook(self) -> int:
        """Bits of one index."""
        return self.codebook_size.bit_length() - 1

    @property
    def num_quantizers(self) -> int:
        """Codebooks, as many as the largest bandwidth pays for."""
        return int(1000 * self.target_bandwidths[-1] // (self.frame_rate * self.bits_per_codebook))

    @property
    def chunk_length(self) -> int | None:
        """Samples encoded at once."""
        return chunk_sizes(self.chunk_length_s, self.overlap, self.sampling_rate)[0]

    @property
    def chunk_stride(self) -> int | None:
        """Samples from the start of a chunk to that of the next."""
        return chunk_sizes(self.chunk_length_s, self.overlap, self.sampling_rate)[1]

    @property
    def language_model_context(self) -> int:
        """Frames that the language model looks back."""
        return int(self.language_model_context_s * self.frame_rate)

    @property
    def can_stream(self) -> bool:
        """Whether every layer looks back only, and recordings are coded in one piece, as loud as they are."""
        causal = self.use_causal_conv and self.norm_type == "weight_norm" and self.trim_right_ratio == 1.0
        return causal and self.chunk_length_s is None and not self.normalize

    def quantizers_for(self, bandwidth: float | None) -> int:
        """Codebooks that a bandwidth in kbit/s pays for; by default the smallest of `target_bandwidths`.

        Raises:
            UsageError: for a bandwidth that the model was not trained for.
        """
        if bandwidth is None:
            bandwidth = self.target_bandwidths[0]
        if bandwidth not in self.target_bandwidths:
            choices = ", ".join(f"{b:g}" for b in self.target_bandwidths)
            raise UsageError(f"This model codes at {choices} kbit/s, not at {bandwidth:g}.")
        return max(1, math.floor(bandwidth * 1000 / (self.bits_per_codebook * self.frame_rate)))

    @classmethod
    def encodec_24khz(cls, **changes: Any) -> EncodecConfig:
        """The causal mono model (§4.1)."""
        return cls(**changes)

    @classmethod
    def encodec_48khz(cls, **changes: Any) -> EncodecConfig:
        """The stereo model in overlapping chunks of one second (§3.1, non-streamable; §4.1)."""
        sizes: dict[str, Any] = {
            "target_bandwidths": (3.0, 6.0, 12.0, 24.0),
            "sampling_rate": 48_000,
            "audio_channels": 2,
            "normalize": True,
            "chunk_length_s": 1.0,
            "overlap": 0.01,
            "norm_type": "time_group_norm",
            "use_causal_conv": False,
        }
        return cls(**(sizes | changes))

    @classmethod
    def encodec_32khz(cls, **changes: Any) -> EncodecConfig:
        """MusicGen's codec: four codebooks of 2048 entries, 50 frames a second; not in the paper."""
        sizes: dict[str, Any] = {
            "target_bandwidths": (2.2,),
            "sampling_rate": 32_000,
            "num_filters": 64,
            "upsampling_ratios": (8, 5, 4, 4),
            "use_causal_conv": False,
            "codebook_size": 2048,
            "use_conv_shortcut": False,
        }
        return cls(**(sizes | changes))

    @classmethod
    def audiogen_16khz(cls, **changes: Any) -> EncodecConfig:
        """AudioGen's codec: as MusicGen's, at 16 kHz; not in the paper."""
        return cls.encodec_32khz(**({"sampling_rate": 16_000, "upsampling_ratios": (8, 5, 4, 2)} | changes))


# --- §3.1: layers ----------------------------------------------------------------------------------------------------


def pad(x: Float[Array, "batch time channels"], left: int, right: int, mode: str) -> jax.Array:
    """Extend both ends. What is too short to be mirrored gets zeros at its end first, which are cut off again."""
    if not left and not right:
        return x
    length = x.shape[1]
    short = max(0, max(left, right) + 1 - length) if mode == "reflect" else 0
    if short:
        x = jnp.pad(x, ((0, 0), (0, short), (0, 0)))
    x = jnp.pad(x, ((0, 0), (left, right), (0, 0)), mode=_PADDING[mode])
    return x[:, : left + length + right]


class EncodecConv1d(nnx.Module):
    r"""Convolution whose input is padded so that $\lceil T/s \rceil$ frames come out (§3.1).

    Of the $p = d(k - 1) + 1 - s$ frames of padding, a causal one has all on the left, one that is not about half. What
    the last frame lacks is added on the right.
    """

    def __init__(
        self,
        config: EncodecConfig,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        dilation: int = 1,
        **kwargs: Any,
    ):
        conv = WeightNormConv1d if config.norm_type == "weight_norm" else Conv1d
        self.conv = conv(in_channels, out_channels, kernel_size, stride=stride, dilation=dilation, **kwargs)
        if config.norm_type == "time_group_norm":
            self.norm = GroupNorm(out_channels, 1, **kwargs)
        self.channels, self.stride = in_channels, stride
        self.surplus = (kernel_size - 1) * dilation + 1 - stride
        self.causal, self.pad_mode = config.use_causal_conv, config.pad_mode

    def __call__(self, x: Float[Array, "batch time inputs"]) -> Float[Array, "batch frames outputs"]:
        """Convolve a whole recording."""
        last = -x.shape[1] % self.stride
        right = 0 if self.causal else self.surplus // 2
        y = self.conv(pad(x, self.surplus - right, right + last, self.pad_mode))
        return self.norm(y) if hasattr(self, "norm") else y

    def stream(
        self, x: Float[Array, "batch time inputs"], context: Float[Array, "batch past inputs"] | None
    ) -> tuple[Float[Array, "batch frames outputs"], Float[Array, "batch past inputs"]]:
        """Convolve what comes next; `context` is the end of what came before, None at the start.

        After an input that is no multiple of the stride nothing can follow: it is extended as the end of a recording.
        """
        last = -x.shape[1] % self.stride
        if context is None:
            x = pad(x, self.surplus, last, self.pad_mode)
        else:
            x = pad(jnp.concatenate([context.astype(x.dtype), x], axis=1), 0, last, self.pad_mode)
        return self.conv(x), x[:, x.shape[1] - self.surplus :]

    def silence(self, batch: int, dtype: Any) -> Float[Array, "batch past inputs"]:
        """The context of a stream that was silent before."""
        return jnp.zeros((batch, self.surplus, self.channels), dtype)


class EncodecConvTranspose1d(nnx.Module):
    r"""Transposed convolution that gives $sT$ frames: of $s(T - 1) + k$ the surplus $k - s$ is cut (§3.1)."""

    def __init__(
        self, config: EncodecConfig, in_channels: int, out_channels: int, kernel_size: int, stride: int, **kwargs: Any
    ):
        conv = WeightNormConvTranspose1d if config.norm_type == "weight_norm" else ConvTranspose1d
        self.conv = conv(in_channels, out_channels, kernel_size, stride=stride, **kwargs)
        if config.norm_type == "time_group_norm":
            self.norm = GroupNorm(out_channels, 1, **kwargs)
        surplus = kernel_size - stride
        self.right = math.ceil(surplus * config.trim_right_ratio) if config.use_causal_conv else surplus // 2
        self.left = surplus - self.right
        self.channels, self.stride = in_channels, stride
        self.past = -(-kernel_size // stride) - 1  # earlier frames that reach into one frame's samples

    def __call__(self, x: Float[Array, "batch frames inputs"]) -> Float[Array, "batch time outputs"]:
        """Spread a whole recording; a normalisation counts what is cut afterwards."""
        y = self.conv(x)
        y = self.norm(y) if hasattr(self, "norm") else y
        return y[:, self.left : y.shape[1] - self.right]

    def stream(
        self, x: Float[Array, "batch frames inputs"], context: Float[Array, "batch past inputs"] | None
    ) -> tuple[Float[Array, "batch time outputs"], Float[Array, "batch past inputs"]]:
        """Spread what comes next; `context` holds the last frames of what came before, None at the start."""
        frames = x.shape[1]
        context = self.silence(x.shape[0], x.dtype) if context is None else context.astype(x.dtype)
        x = jnp.concatenate([context, x], axis=1)
        start = self.past * self.stride
        return self.conv(x)[:, start : start + frames * self.stride], x[:, x.shape[1] - self.past :]

    def silence(self, batch: int, dtype: Any) -> Float[Array, "batch past inputs"]:
        """The context of a stream that has not begun."""
        return jnp.zeros((batch, self.past, self.channels), dtype)


class _LSTMCell(nnx.Module):
    """The weights of one layer: gates in PyTorch's order, input, forget, cell, output."""

    def __init__(self, size: int, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs):
        bound = size**-0.5

        def draw(*shape: int) -> nnx.Param:
            return nnx.Param(jax.random.uniform(rngs.params(), shape, param_dtype, -bound, bound))

        self.input_kernel, self.input_bias = draw(size, 4 * size), draw(4 * size)
        self.recurrent_kernel, self.recurrent_bias = draw(size, 4 * size), draw(4 * size)
        self.dtype = dtype


class EncodecLSTM(nnx.Module):
    """Layers of LSTM with one shortcut around them all (§3.1: "a sequence modeling component")."""

    def __init__(self, config: EncodecConfig, size: int, **kwargs: Any):
        self.layers = nnx.List([_LSTMCell(size, **kwargs) for _ in range(config.num_lstm_layers)])
        self.size = size

    def __call__(self, x: Float[Array, "batch time channels"]) -> Float[Array, "batch time channels"]:
        """Run over a whole recording."""
        return self.stream(x, None)[0]

    def stream(
        self, x: Float[Array, "batch time channels"], state: Any
    ) -> tuple[Float[Array, "batch time channels"], Any]:
        """Run on; `state` is a pair $(h, c)$ for each layer, None at the start."""
        if state is None:
            state = self.silence(x.shape[0], x.dtype)
        y, after = x, []
        for cell, (h, c) in zip(self.layers, state, strict=True):
            bias = cell.input_bias[...] + cell.recurrent_bias[...]
            arrays = promote(y, cell.input_kernel[...], cell.recurrent_kernel[...], bias, dtype=cell.dtype)
            y, input_kernel, recurrent_kernel, _ = arrays
            # The recurrence keeps at least float32: hundreds of steps of rounding add up.
            wide = jnp.promote_types(y.dtype, jnp.float32)
            # All inputs at once; what is left for the loop is one product with h.
            inputs = y @ input_kernel
            inputs = jnp.swapaxes(inputs + spread(bias, inputs), 0, 1).astype(wide)
            kernel = recurrent_kernel.astype(wide)

            def step(
                carry: tuple[jax.Array, jax.Array], z: jax.Array, kernel: jax.Array = kernel
            ) -> tuple[Any, jax.Array]:
                h, c = carry
                i, f, g, o = jnp.split(z + h @ kernel, 4, axis=-1)
                c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
                h = jax.nn.sigmoid(o) * jnp.tanh(c)
                return (h, c), h

            last, outputs = jax.lax.scan(step, (h.astype(wide), c.astype(wide)), inputs)
            y = jnp.swapaxes(outputs, 0, 1).astype(y.dtype)
            after.append(last)
        return x + y, tuple(after)

    def silence(self, batch: int, dtype: Any) -> Any:
        """The state of a stream that has not begun."""
        zeros = jnp.zeros((batch, self.size), jnp.promote_types(dtype, jnp.float32))
        return tuple((zeros, zeros) for _ in self.layers)


class _ELU(nnx.Module):
    """$x$ for $x > 0$, else $e^x - 1$. It has a place of its own in the list of layers, as in the checkpoints."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return jax.nn.elu(x)

    def stream(self, x: jax.Array, state: Any) -> tuple[jax.Array, Any]:
        return self(x), state

    def silence(self, batch: int, dtype: Any) -> Any:
        return ()


class EncodecResnetBlock(nnx.Module):
    """Residual unit (§3.1): ELU and a dilated convolution, ELU and one of one tap, around them a shortcut."""

    def __init__(self, config: EncodecConfig, channels: int, dilation: int, **kwargs: Any):
        inner = channels // config.compress
        self.block = nnx.List(
            [
                _ELU(),
                EncodecConv1d(config, channels, inner, config.residual_kernel_size, dilation=dilation, **kwargs),
                _ELU(),
                EncodecConv1d(config, inner, channels, 1, **kwargs),
            ]
        )
        self.shortcut = EncodecConv1d(config, channels, channels, 1, **kwargs) if config.use_conv_shortcut else None

    def __call__(self, x: Float[Array, "batch time channels"]) -> Float[Array, "batch time channels"]:
        """Shortcut and block, summed."""
        return self._shortcut(x) + _run(self.block, x)

    def stream(
        self, x: Float[Array, "batch time channels"], state: Any
    ) -> tuple[Float[Array, "batch time channels"], Any]:
        """The same of what comes next."""
        y, state = _stream(self.block, x, state)
        return self._shortcut(x) + y, state

    def silence(self, batch: int, dtype: Any) -> Any:
        """The state of a stream that was silent before."""
        return _silence(self.block, batch, dtype)

    def _shortcut(self, x: jax.Array) -> jax.Array:
        return x if self.shortcut is None else self.shortcut(x)


def _run(layers: Any, x: jax.Array) -> jax.Array:
    for layer in layers:
        x = layer(x)
    return x


def _stream(layers: Any, x: jax.Array, state: Any) -> tuple[jax.Array, Any]:
    after = []
    for layer, before in zip(layers, state if state is not None else [None] * len(layers), strict=True):
        x, then = layer.stream(x, before)
        after.append(then)
    return x, tuple(after)


def _silence(layers: Any, batch: int, dtype: Any) -> Any:
    return tuple(layer.silence(batch, dtype) for layer in layers)


class EncodecEncoder(nnx.Module):
    """Waveform to latent vectors (§3.1, Figure 1)."""

    def __init__(self, config: EncodecConfig, **kwargs: Any):
        width = config.num_filters
        layers: list[Any] = [EncodecConv1d(config, config.audio_channels, width, config.kernel_size, **kwargs)]
        for ratio in reversed(config.upsampling_ratios):
            dilations = [config.dilation_growth_rate**j for j in range(config.num_residual_layers)]
            layers += [EncodecResnetBlock(config, width, dilation, **kwargs) for dilation in dilations]
            layers += [_ELU(), EncodecConv1d(config, width, 2 * width, 2 * ratio, stride=ratio, **kwargs)]
            width *= 2
        if config.num_lstm_layers:
            layers.append(EncodecLSTM(config, width, **kwargs))
        layers += [_ELU(), EncodecConv1d(config, width, config.hidden_size, config.last_kernel_size, **kwargs)]
        self.layers = nnx.List(layers)

    def __call__(self, x: Float[Array, "batch samples channels"]) -> Float[Array, "batch frames latent"]:
        """Encode a whole recording: a frame for every `hop_length` samples begun."""
        return _run(self.layers, x)

    def stream(
        self, x: Float[Array, "batch samples channels"], state: Any
    ) -> tuple[Float[Array, "batch frames latent"], Any]:
        """Encode what comes next, a multiple of `hop_length` samples."""
        return _stream(self.layers, x, state)


class EncodecDecoder(nnx.Module):
    """Latent vectors to waveform (§3.1): the encoder mirrored."""

    def __init__(self, config: EncodecConfig, **kwargs: Any):
        width = config.num_filters * 2 ** len(config.upsampling_ratios)
        layers: list[Any] = [EncodecConv1d(config, config.hidden_size, width, config.kernel_size, **kwargs)]
        if config.num_lstm_layers:
            layers.append(EncodecLSTM(config, width, **kwargs))
        for ratio in config.upsampling_ratios:
            layers += [_ELU(), EncodecConvTranspose1d(config, width, width // 2, 2 * ratio, ratio, **kwargs)]
            width //= 2
            dilations = [config.dilation_growth_rate**j for j in range(config.num_residual_layers)]
            layers += [EncodecResnetBlock(config, width, dilation, **kwargs) for dilation in dilations]
        layers += [_ELU(), EncodecConv1d(config, width, config.audio_channels, config.last_kernel_size, **kwargs)]
        self.layers = nnx.List(layers)

    def __call__(self, z: Float[Array, "batch frames latent"]) -> Float[Array, "batch samples channels"]:
        """Decode a whole recording: `hop_length` samples a frame."""
        return _run(self.layers, z)

    def stream(
        self, z: Float[Array, "batch frames latent"], state: Any
    ) -> tuple[Float[Array, "batch samples channels"], Any]:
        """Decode what comes next."""
        return _stream(self.layers, z, state)


# --- §3.2: residual vector quantisation ------------------------------------------------------------------------------


class Codebooks(ModelOutput):
    """The codebooks and the running averages that move them (§3.2): a value that a training step returns."""

    embed: Float[Array, "quantizers entries channels"] = ABSENT
    embed_avg: Float[Array, "quantizers entries channels"] = ABSENT
    cluster_size: Float[Array, "quantizers entries"] = ABSENT
    inited: Float[Array, "quantizers one"] = ABSENT


class Quantized(ModelOutput):
    """What quantisation gives in training (§3.2, §3.4): values to decode, codes, the commitment loss, new codebooks."""

    quantized: Float[Array, "batch frames channels"] = ABSENT
    codes: Int[Array, "batch quantizers frames"] = ABSENT
    commitment_loss: Float[Array, ""] = ABSENT
    codebooks: Codebooks = ABSENT


def nearest(x: Float[Array, "rows channels"], entries: Float[Array, "entries channels"]) -> Int[Array, " rows"]:
    r"""$\arg\min_j \lVert x - e_j \rVert^2$, that is, of $\lVert e_j \rVert^2 - 2 x \cdot e_j$."""
    products = jnp.matmul(x, entries.T, precision=jax.lax.Precision.HIGHEST)
    return jnp.argmin(jnp.sum(jnp.square(entries), axis=-1) - 2.0 * products, axis=-1).astype(jnp.int32)


def _totals(
    x: Float[Array, "rows channels"], codes: Int[Array, " rows"], entries: int
) -> tuple[Float[Array, " entries"], Float[Array, "entries channels"]]:
    """How many rows each entry stands for, and their sum."""
    counts = jax.ops.segment_sum(jnp.ones(codes.shape, x.dtype), codes, entries)
    return counts, jax.ops.segment_sum(x, codes, entries)


def kmeans(
    x: Float[Array, "rows channels"], start: Float[Array, "clusters channels"], iterations: int
) -> tuple[Float[Array, "clusters channels"], Float[Array, " clusters"]]:
    """Lloyd's algorithm: the means, and how many rows each had last. A mean without rows stays where it is."""

    def step(_: Any, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        means, _counts = carry
        counts, sums = _totals(x, nearest(x, means), means.shape[0])
        means = jnp.where(counts[:, None] > 0, sums / jnp.maximum(counts, 1.0)[:, None], means)
        return means, counts

    return jax.lax.fori_loop(0, iterations, step, (start, jnp.zeros(start.shape[0], x.dtype)))


def _placed(
    values: Float[Array, "rows channels"], starts: Float[Array, "entries channels"], iterations: int, released: bool
) -> tuple[Float[Array, "entries channels"], Float[Array, "entries channels"], Float[Array, " entries"]]:
    """§3.2, the first batch: entries by k-means, with their running sums and counts."""
    means, counts = kmeans(values, starts, iterations)
    return means, means if released else means * counts[:, None], counts


def _revived(
    average: Float[Array, "entries channels"],
    count: Float[Array, " entries"],
    spares: Float[Array, "entries channels"],
    dead_below: float,
) -> tuple[Float[Array, "entries channels"], Float[Array, " entries"]]:
    """§3.2: sums and counts in which what stands for too little begins anew, at a row of the batch."""
    dead = count < dead_below
    return jnp.where(dead[:, None], spares * dead_below, average), jnp.where(dead, dead_below, count)


def _followed(
    values: Float[Array, "rows channels"],
    codes: Int[Array, " rows"],
    average: Float[Array, "entries channels"],
    count: Float[Array, " entries"],
    decay: float,
    epsilon: float,
) -> tuple[Float[Array, "entries channels"], Float[Array, "entries channels"], Float[Array, " entries"]]:
    r"""§3.2: entries at the mean of what they stand for, with running sums $m$ and counts $N$.

    With $n_j$ rows of sum $s_j$ in this batch, and $K$ entries,

    $$N_j \leftarrow \gamma N_j + (1 - \gamma) n_j, \qquad m_j \leftarrow \gamma m_j + (1 - \gamma) s_j, \qquad
    e_j = m_j \Big/ \frac{N_j + \epsilon}{\sum_i N_i + K\epsilon} \sum_i N_i.$$
    """
    size = len(count)
    counts, sums = _totals(values, codes, size)
    count = decay * count + (1 - decay) * counts
    average = decay * average + (1 - decay) * sums
    smooth = (count + epsilon) / (count.sum() + size * epsilon) * count.sum()
    return average / smooth[:, None], average, count


class EncodecResidualVectorQuantizer(nnx.Module):
    r"""Quantises $z$, then what is left of it, and so on (§3.2; SoundStream, arXiv 2107.03312, Algorithm 1).

    The codebooks are no parameters: `train_step` moves them by running averages. One array holds all, so that one
    compiled loop runs over them.
    """

    def __init__(self, config: EncodecConfig, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs):
        shape = (config.num_quantizers, config.codebook_size, config.hidden_size)
        self.embed = nnx.BatchStat(jax.random.normal(rngs.params(), shape, param_dtype))
        wide = jnp.promote_types(param_dtype, jnp.float32)  # a hundredth of a step would round to none
        self.embed_avg = nnx.BatchStat(self.embed[...].astype(wide))
        self.cluster_size = nnx.BatchStat(jnp.zeros(shape[:2], wide))
        self.inited = nnx.BatchStat(jnp.zeros((shape[0], 1), param_dtype))

    def encode(
        self, z: Float[Array, "batch frames channels"], num_quantizers: int
    ) -> Int[Array, "batch quantizers frames"]:
        """The indices of the first `num_quantizers` codebooks."""
        batch, frames, channels = z.shape

        def step(residual: jax.Array, entries: jax.Array) -> tuple[jax.Array, jax.Array]:
            codes = nearest(residual, entries)
            return residual - entries[codes], codes

        embed = self.embed[...][:num_quantizers]
        z, embed = promote(z, embed)
        _, codes = jax.lax.scan(step, z.reshape(-1, channels), embed)
        return codes.reshape(num_quantizers, batch, frames).swapaxes(0, 1)

    def decode(self, codes: Int[Array, "batch quantizers frames"]) -> Float[Array, "batch frames channels"]:
        r"""$\sum_k e^{(k)}_{c_k}$."""
        books, size, _ = self.embed.shape
        if codes.shape[1] > books:
            raise UsageError(f"There are codes of {codes.shape[1]} codebooks; this model has {books}.")
        check_ids(codes, size)  # a larger one would be the next codebook's
        flat = self.embed[...].reshape(-1, self.embed.shape[2])
        offsets = size * jnp.arange(codes.shape[1], dtype=codes.dtype)
        return flat[codes + offsets[:, None]].sum(axis=1)

    def train_step(
        self,
        z: Float[Array, "batch frames channels"],
        num_quantizers: int | Int[Array, ""] | None = None,
        *,
        key: jax.Array | None = None,
        rows: Int[Array, "two quantizers entries"] | None = None,
        decay: float = 0.99,
        dead_below: float = 2.0,
        epsilon: float = 1e-5,
        kmeans_iterations: int = 50,
        released: bool = False,
    ) -> Quantized:
        r"""Quantise for training (§3.2, §3.4), with gradients straight through to $z$.

        The first batch places the entries by k-means. Then each entry follows the mean of what it stands for, counts
        $N$ and sums $m$ decaying by $\gamma$; an entry with $N$ below `dead_below` moves to a row of the batch.

        Args:
            z: latent vectors.
            num_quantizers: codebooks to use; may be traced, so that each step can draw its bandwidth. By default all.
            key: draws `rows`.
            rows: rows of the batch (counted over batch and frames) from which k-means starts, and which take the place
                of dead entries; instead of `key`.
            decay: $\gamma$.
            dead_below: see above; 0 replaces none. $N$ settles at a batch's frames by codebook entries: where that is
                below 2, most entries move at every step, as in the released package; then give less.
            epsilon: Laplace smoothing of the counts.
            kmeans_iterations: of the first batch.
            released: as the released package does it (see the head of this file).
        """
        batch, frames, channels = z.shape
        used = self.embed.shape[0] if num_quantizers is None else num_quantizers
        total, size, _ = self.embed.shape
        if rows is None:
            if key is None:
                raise UsageError("Training the quantiser draws rows of the batch: give it a key, or the rows.")
            rows = _draw_rows(key, (2, total, size), batch * frames)
        books = jax.tree.map(at_least_float32, self.codebooks())
        x = z.reshape(-1, channels).astype(jnp.promote_types(z.dtype, books.embed.dtype))
        fixed = jax.lax.stop_gradient(x)

        def step(carry: tuple[jax.Array, jax.Array], layer: tuple[jax.Array, ...]) -> tuple[Any, Any]:
            so_far, loss = carry
            index, embed, average, count, inited, starts, spares = layer
            active = index < used
            # r_k = z - Σ_{j<k} q_j, in which only z carries a gradient.
            residual, values = x - so_far, fixed - so_far
            if released:
                residual = jnp.where(index == 0, residual, values)

            first_batch = active & (inited[0] == 0)
            embed, average, count = jax.lax.cond(
                first_batch,
                lambda: _placed(values, values[starts], kmeans_iterations, released),
                lambda: (embed, average, count),
            )
            codes = nearest(values, embed)
            chosen = embed[codes]
            commitment = jnp.mean(jnp.square(residual - chosen))  # ||z_k - q_k(z_k)||²
            if not released:
                average, count = _revived(average, count, values[spares], dead_below)
            fresh = (*_followed(values, codes, average, count, decay, epsilon), jnp.ones_like(inited))
            kept = (embed, average, count, inited)
            after = jax.tree.map(lambda a, b: jnp.where(active, a, b), fresh, kept)
            so_far = so_far + jnp.where(active, chosen, jnp.zeros((), x.dtype))
            return (so_far, loss + jnp.where(active, commitment, 0.0)), (codes, after)

        layers = (jnp.arange(total), books.embed, books.embed_avg, books.cluster_size, books.inited, rows[0], rows[1])
        layers = jax.lax.stop_gradient(layers)
        (quantized, loss), (codes, after) = jax.lax.scan(step, (jnp.zeros_like(fixed), jnp.zeros((), x.dtype)), layers)
        quantized = x + jax.lax.stop_gradient(quantized - x)
        return Quantized(
            quantized.reshape(z.shape).astype(z.dtype),
            codes.reshape(total, batch, frames).swapaxes(0, 1),
            loss / used,
            Codebooks(*after),
        )

    def codebooks(self) -> Codebooks:
        """The codebooks as they are."""
        return Codebooks(self.embed[...], self.embed_avg[...], self.cluster_size[...], self.inited[...])

    def replace(self, codebooks: Codebooks) -> None:
        """Put what a training step returned in their place."""
        for name in codebooks:
            variable = getattr(self, name)
            variable[...] = codebooks[name].astype(variable.dtype)


def _draw_rows(key: jax.Array, shape: tuple[int, int, int], count: int) -> jax.Array:
    """Rows of a batch, none twice where there are enough."""
    if count < shape[-1]:
        return jax.random.randint(key, shape, 0, count)
    keys = jax.random.split(key, shape[0] * shape[1])
    return jax.vmap(lambda k: jax.random.permutation(k, count)[: shape[-1]])(keys).reshape(shape)


def random_quantizers(key: jax.Array, config: EncodecConfig) -> Int[Array, ""]:
    """Codebooks to train with in this step: those of a bandwidth drawn at random (§3.2)."""
    choices = jnp.asarray([config.quantizers_for(b) for b in config.target_bandwidths])
    return jax.random.choice(key, choices)


# --- the codec -------------------------------------------------------------------------------------------------------


class EncodecEncoderOutput(ModelOutput):
    """Codes of `encode` (§3.2), the loudness of each chunk (None each without `normalize`), and frames to drop."""

    audio_codes: Int[Array, "chunks batch quantizers frames"] = ABSENT
    audio_scales: list[Float[Array, "batch one"] | None] = ABSENT
    last_frame_pad_length: int = 0


class EncodecDecoderOutput(ModelOutput):
    """The waveform of `decode` (§3.1)."""

    audio_values: Float[Array, "batch channels samples"] = ABSENT


class EncodecOutput(ModelOutput):
    """Codes and the waveform that they give (§3.1)."""

    audio_codes: Int[Array, "chunks batch quantizers frames"] = ABSENT
    audio_values: Float[Array, "batch channels samples"] = ABSENT


class EncodecTrainingOutput(ModelOutput):
    """A reconstruction with gradients (§3.4), the commitment loss, and the codebooks after the step."""

    audio_values: Float[Array, "batch channels samples"] = ABSENT
    audio_codes: Int[Array, "batch quantizers frames"] = ABSENT
    commitment_loss: Float[Array, ""] = ABSENT
    codebooks: Codebooks = ABSENT


Frame = tuple[Int[Array, "batch quantizers _"], Float[Array, "batch one"] | None]  # the last one is shorter


class EncodecModel(nnx.Module):
    """Encoder, quantiser and decoder (§3)."""

    static_arguments = ("bandwidth", "last_frame_pad_length")  # what `audiozoo.jit` compiles for, value by value

    def __init__(self, config: EncodecConfig, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.encoder = EncodecEncoder(config, **kwargs)
        self.decoder = EncodecDecoder(config, **kwargs)
        self.quantizer = EncodecResidualVectorQuantizer(config, **kwargs)
        self.config = config

    def __call__(
        self,
        input_values: Float[Array, "batch channels samples"] | None = None,
        padding_mask: Any = None,
        bandwidth: float | None = None,
        audio_codes: Int[Array, "chunks batch quantizers frames"] | None = None,
        audio_scales: Sequence[Any] | None = None,
        last_frame_pad_length: int = 0,
    ) -> EncodecOutput:
        """Encode and decode, or decode codes alone.

        Args:
            input_values: waveform in [-1, 1].
            padding_mask: `(batch, samples)` or `(batch, channels, samples)`, 1 where there is audio; the rest is taken
                as silence.
            bandwidth: kbit/s, one of `config.target_bandwidths`; the smallest by default.
            audio_codes: codes instead of audio.
            audio_scales: what `encode` returned along with them.
            last_frame_pad_length: likewise.
        """
        if (audio_codes is None) != (audio_scales is None):
            raise UsageError("audio_codes and audio_scales go together: give both, or neither.")
        if audio_codes is None:
            if input_values is None:
                raise UsageError("Give the model audio (input_values), or codes and scales.")
            frames = self.encode_frames(self.masked(input_values, padding_mask), bandwidth)
            values = self.decode_frames(frames)[..., : input_values.shape[-1]]
            return EncodecOutput(self._stack(frames)[0], values)
        decoded = self.decode(audio_codes, audio_scales or [], padding_mask, last_frame_pad_length)
        return EncodecOutput(audio_codes, decoded.audio_values)

    # --- whole recordings ---

    def encode(
        self,
        input_values: Float[Array, "batch channels samples"],
        padding_mask: Any = None,
        bandwidth: float | None = None,
    ) -> EncodecEncoderOutput:
        """Codes of a waveform; arguments as in `__call__`.

        Raises:
            UsageError: for a bandwidth that the model does not have.
            AudioError: for another number of channels than the model's.
        """
        frames = self.encode_frames(self.masked(input_values, padding_mask), bandwidth)
        codes, lacking = self._stack(frames)
        return EncodecEncoderOutput(codes, [scale for _, scale in frames], lacking)

    def decode(
        self,
        audio_codes: Int[Array, "chunks batch quantizers frames"],
        audio_scales: Sequence[Any],
        padding_mask: Any = None,
        last_frame_pad_length: int = 0,
    ) -> EncodecDecoderOutput:
        """The waveform of codes.

        Args:
            audio_codes: what `encode` returned; any number of codebooks up to the model's.
            audio_scales: what `encode` returned.
            padding_mask: the mask given to `encode`; its length, if shorter, cuts the result.
            last_frame_pad_length: what `encode` returned.
        """
        if audio_codes.ndim != 4:
            raise UsageError(
                f"audio_codes has shape {audio_codes.shape}; (chunks, batch, quantizers, frames) is expected."
            )
        if self.config.chunk_length is None and audio_codes.shape[0] != 1:
            raise UsageError(f"This model codes a recording in one chunk; there are {audio_codes.shape[0]}.")
        if len(audio_scales) != audio_codes.shape[0]:
            raise UsageError(f"There are {audio_codes.shape[0]} chunks of codes and {len(audio_scales)} scales.")
        if self.config.normalize and any(scale is None for scale in audio_scales):
            raise UsageError("This model needs the loudness of every chunk: pass the audio_scales of encode.")
        frames = list(zip(audio_codes, audio_scales, strict=True))
        if last_frame_pad_length:
            codes, scale = frames[-1]
            frames[-1] = (codes[..., :-last_frame_pad_length], scale)
        values = self.decode_frames(frames)
        if padding_mask is not None:
            values = values[..., : padding_mask.shape[-1]]
        return EncodecDecoderOutput(values)

    def encode_frames(
        self, input_values: Float[Array, "batch channels samples"], bandwidth: float | None = None
    ) -> list[Frame]:
        """Codes and loudness of each chunk (§3.1): the last may be shorter. Chunks of one length run as one batch."""
        config = self.config
        batch, channels, samples = input_values.shape
        if channels != config.audio_channels:
            raise AudioError(f"The waveform has {channels} channels; this model codes {config.audio_channels}.")
        if not samples:
            raise AudioError("The waveform is empty (0 samples).")
        length, stride = config.chunk_length or samples, config.chunk_stride or samples
        starts = range(0, samples, stride)
        by_length: dict[int, list[int]] = {}
        for chunk, start in enumerate(starts):
            by_length.setdefault(min(length, samples - start), []).append(chunk)
        frames: list[Any] = [None] * len(starts)
        for size, chunks in by_length.items():
            parts = [input_values[..., starts[c] : starts[c] + size] for c in chunks]
            codes, scales = self.encode_frame(jnp.concatenate(parts), bandwidth)
            for i, c in enumerate(chunks):
                rows = slice(i * batch, (i + 1) * batch)
                frames[c] = (codes[rows], None if scales is None else scales[rows])
        return frames

    def decode_frames(self, frames: Sequence[Frame]) -> Float[Array, "batch channels samples"]:
        """The waveform of chunks, which fade into each other where they overlap."""
        by_length: dict[int, list[int]] = {}
        for index, (codes, _) in enumerate(frames):
            by_length.setdefault(codes.shape[-1], []).append(index)
        parts: list[Any] = [None] * len(frames)
        for chunks in by_length.values():
            values = self.decode_frame(jnp.concatenate([frames[c][0] for c in chunks]))
            for i, part in zip(chunks, jnp.split(values, len(chunks)), strict=True):
                scale = frames[i][1]
                parts[i] = part if scale is None else part * scale[..., None]
        if self.config.chunk_length is None:
            return parts[0]
        return overlap_add(parts, self.config.chunk_stride or 1)

    def encode_frame(self, x: Float[Array, "batch channels samples"], bandwidth: float | None = None) -> Frame:
        """Codes and loudness of one chunk, or of a recording that is not cut into chunks."""
        quantizers = self.config.quantizers_for(bandwidth)
        x, scale = self._normalised(x)
        return self.quantizer.encode(self.encoder(x.swapaxes(1, 2)), quantizers), scale

    def decode_frame(self, codes: Int[Array, "batch quantizers frames"]) -> Float[Array, "batch channels samples"]:
        """The waveform of one chunk, before its loudness is restored."""
        return self.decoder(self.quantizer.decode(codes)).swapaxes(1, 2)

    def _normalised(self, x: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """Divided by the root mean square of the mean of the channels (§3.1)."""
        if not self.config.normalize:
            return x, None
        loudness = jnp.sqrt(jnp.mean(jnp.square(x.mean(axis=1)), axis=-1)) + 1e-8
        return x / loudness[:, None, None], loudness[:, None]

    def masked(self, x: jax.Array, mask: Any) -> jax.Array:
        """A waveform `(batch, channels, samples)`, silent where a mask of it, or of `(batch, samples)`, is 0."""
        if x.ndim != 3:
            raise AudioError(f"input_values has shape {x.shape}; (batch, channels, samples) is expected.")
        if mask is None:
            return x
        mask = jnp.asarray(mask)
        mask = mask[:, None] if mask.ndim == 2 else mask
        if mask.shape not in (x.shape, (x.shape[0], 1, x.shape[2])):
            raise UsageError(f"padding_mask has shape {mask.shape}, which does not fit input_values of {x.shape}.")
        return jnp.where(mask != 0, x, jnp.zeros((), x.dtype))

    def _stack(self, frames: Sequence[Frame]) -> tuple[jax.Array, int]:
        lengths = [codes.shape[-1] for codes, _ in frames]
        lacking = lengths[0] - lengths[-1]
        if len(set(lengths[:-1])) > 1:
            raise AudioError(
                "The last two chunks are both cut short, which one array of codes cannot hold; let the processor pad "
                "the waveform, or use encode_frames."
            )
        last = jnp.pad(frames[-1][0], ((0, 0), (0, 0), (0, lacking)))
        return jnp.stack([*(codes for codes, _ in frames[:-1]), last]), lacking

    # --- streams (§3.1) ---

    def shortest_start(self) -> int:
        """Samples that a stream's first chunk must have where the ends are mirrored: enough for the mirror."""
        config = self.config
        scale, needed = 1, config.hop_length
        if config.pad_mode != "reflect":
            return needed
        for layer in self.encoder.layers:
            for conv in layer.block if isinstance(layer, EncodecResnetBlock) else [layer]:
                if isinstance(conv, EncodecConv1d):
                    needed = max(needed, scale * (conv.surplus + 1) if conv.surplus else 0)
                    scale *= conv.stride
        needed = max(needed, scale * config.kernel_size)  # the decoder's first convolution
        return -(-needed // config.hop_length) * config.hop_length

    def initial_state(self, batch: int = 1, dtype: Any = jnp.float32) -> dict[str, Any]:
        """States `"encoder"` and `"decoder"` of streams before which all was silent.

        With them any chunk may come first, and the stream equals the codec with `pad_mode` "constant". Started with
        None instead, it equals the codec as it is.
        """
        self._check_stream()
        return {name: _silence(getattr(self, name).layers, batch, dtype) for name in ("encoder", "decoder")}

    def encode_chunk(
        self, input_values: Float[Array, "batch channels samples"], state: Any = None, bandwidth: float | None = None
    ) -> tuple[Int[Array, "batch quantizers frames"], Any]:
        """Codes of what comes next in a stream, and the state after it.

        Args:
            input_values: a multiple of `config.hop_length` samples.
            state: what the last call returned; None at the start (then at least `shortest_start` samples), or
                `initial_state()["encoder"]`.
            bandwidth: kbit/s.
        """
        samples = input_values.shape[-1]
        if samples % self.config.hop_length:
            raise AudioError(
                f"A chunk of a stream has a multiple of {self.config.hop_length} samples, not {samples}; the last one "
                "goes to encode_last_chunk."
            )
        return self._encode_next(input_values, state, bandwidth)

    def encode_last_chunk(
        self, input_values: Float[Array, "batch channels samples"], state: Any = None, bandwidth: float | None = None
    ) -> tuple[Int[Array, "batch quantizers frames"], Any]:
        """`encode_chunk` for the end of a stream, with any number of samples: a frame for the last ones begun."""
        return self._encode_next(input_values, state, bandwidth)

    def _encode_next(self, x: jax.Array, state: Any, bandwidth: float | None) -> tuple[jax.Array, Any]:
        self._check_stream()
        if x.ndim != 3 or x.shape[1] != self.config.audio_channels:
            raise AudioError(
                f"The chunk has shape {x.shape}; (batch, {self.config.audio_channels}, samples) is expected."
            )
        if not x.shape[-1]:
            raise AudioError("The chunk is empty (0 samples).")
        self._check_start(state, x.shape[-1], "encoder", x.shape[0])
        z, state = self.encoder.stream(x.swapaxes(1, 2), state)
        return self.quantizer.encode(z, self.config.quantizers_for(bandwidth)), state

    def decode_chunk(
        self, audio_codes: Int[Array, "batch quantizers frames"], state: Any = None
    ) -> tuple[Float[Array, "batch channels samples"], Any]:
        """The waveform of what comes next in a stream, and the state after it; `state` as in `encode_chunk`."""
        self._check_stream()
        if audio_codes.ndim != 3:
            raise UsageError(f"audio_codes has shape {audio_codes.shape}; (batch, quantizers, frames) is expected.")
        self._check_start(state, audio_codes.shape[-1] * self.config.hop_length, "decoder", audio_codes.shape[0])
        values, state = self.decoder.stream(self.quantizer.decode(audio_codes), state)
        return values.swapaxes(1, 2), state

    def _check_stream(self) -> None:
        if not self.config.can_stream:
            raise UsageError("This model looks ahead, normalises, or cuts into chunks; a causal one can code a stream.")

    def _check_start(self, state: Any, samples: int, part: str, batch: int) -> None:
        if state is None and samples < self.shortest_start():
            raise AudioError(
                f"The first chunk of a stream needs {self.shortest_start()} samples, to mirror them at the start; "
                f"{samples} are too few. Start from initial_state() to have silence there instead."
            )
        if state is not None:
            wanted = jax.eval_shape(lambda: _silence(getattr(self, part).layers, batch, jnp.float32))
            if [jnp.shape(leaf) for leaf in jax.tree.leaves(state)] != [leaf.shape for leaf in jax.tree.leaves(wanted)]:
                raise UsageError(f"The state is none of this model's {part} for a batch of {batch}.")

    # --- training (§3.4) ---

    def reconstruct(
        self,
        input_values: Float[Array, "batch channels samples"],
        num_quantizers: int | Int[Array, ""] | None = None,
        **options: Any,
    ) -> EncodecTrainingOutput:
        """Encode, quantise with gradients straight through, decode.

        Args:
            input_values: waveforms, one chunk each.
            num_quantizers: see `random_quantizers`; may be traced.
            options: of `EncodecResidualVectorQuantizer.train_step`; `key` at least.
        """
        x, scale = self._normalised(input_values)
        result = self.quantizer.train_step(self.encoder(x.swapaxes(1, 2)), num_quantizers, **options)
        values = self.decoder(result.quantized).swapaxes(1, 2)[..., : input_values.shape[-1]]
        values = values if scale is None else values * scale[..., None]
        return EncodecTrainingOutput(values, result.codes, result.commitment_loss, result.codebooks)


def overlap_add(
    parts: Sequence[Float[Array, "batch channels _samples"]], stride: int
) -> Float[Array, "batch channels total"]:
    """Lay chunks at multiples of `stride`; where several cover a sample, the one whose middle is nearer counts more.

    The weights are a triangle over the first chunk's length, divided by their sum; not in the paper, but in the
    released code.
    """
    length, count = parts[0].shape[-1], len(parts)
    total, steps = stride * (count - 1) + parts[-1].shape[-1], -(-length // stride)
    position = np.arange(1, length + 1) / (length + 1)
    triangle = 0.5 - np.abs(position - 0.5)
    present = np.arange(length) < np.asarray([part.shape[-1] for part in parts])[:, None]

    def laid(x: Any, xp: Any) -> Any:
        """Sum of `(chunks, …, length)`: cut into steps, each of which moves as far as it stands."""
        rest = ((0, 0),) * (x.ndim - 2)
        x = xp.pad(x, ((0, 0), *rest, (0, steps * stride - length)))
        x = x.reshape(*x.shape[:-1], steps, stride)
        moved = [xp.pad(x[..., j, :], ((j, steps - 1 - j), *rest, (0, 0))) for j in range(steps)]
        x = xp.moveaxis(sum(moved[1:], moved[0]), 0, -2)
        return x.reshape(*x.shape[:-2], -1)[..., :total]

    alike = [jnp.pad(part, ((0, 0), (0, 0), (0, length - part.shape[-1]))) for part in parts]
    values = laid(jnp.stack(alike) * jnp.asarray(triangle, alike[0].dtype), jnp)
    return values / jnp.asarray(laid(present * triangle, np), values.dtype)


# --- §3.4: discriminator ---------------------------------------------------------------------------------------------


class _Conv2d(nnx.Module):
    """Convolution over `(batch, time, frequency, channels)`, weight-normalised unless `plain`."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        size: tuple[int, int],
        *,
        stride: int = 1,
        dilation: int = 1,
        plain: bool = False,
        dtype: Any,
        param_dtype: Any,
        rngs: nnx.Rngs,
    ):
        bound = (math.prod(size) * inputs) ** -0.5
        kernel = jax.random.uniform(rngs.params(), (*size, inputs, outputs), param_dtype, -bound, bound)
        if plain:
            self.kernel = nnx.Param(kernel)
        else:
            self.kernel_g, self.kernel_v = nnx.Param(norm_except(kernel, 3).astype(kernel.dtype)), nnx.Param(kernel)
        self.bias = nnx.Param(jax.random.uniform(rngs.params(), (outputs,), param_dtype, -bound, bound))
        time, frequency = (size[0] - 1) * dilation // 2, (size[1] - 1) // 2
        self.padding = ((time, time), (frequency, frequency))
        self.stride, self.dilation, self.plain, self.dtype = stride, dilation, plain, dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.kernel[...] if self.plain else weight_normalised(self.kernel_g[...], self.kernel_v[...], 3)
        bias = self.bias[...]
        x, kernel, _ = promote(x, kernel, bias, dtype=self.dtype)
        y = jax.lax.conv_general_dilated(
            x,
            kernel,
            (1, self.stride),
            self.padding,
            rhs_dilation=(self.dilation, 1),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return y + spread(bias, y)


Features = tuple[Float[Array, "batch frames _frequencies _channels"], ...]


class STFTDiscriminator(nnx.Module):
    """One scale of the discriminator (§3.4, Figure 2): convolutions over a complex spectrogram, dilated along time.

    Its first convolution is not normalised: the released code leaves it so.
    """

    def __init__(
        self,
        n_fft: int,
        *,
        channels: int = 1,
        filters: int = 32,
        slope: float = 0.2,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        convs = [_Conv2d(2 * channels, filters, (3, 9), plain=True, **kwargs)]
        convs += [_Conv2d(filters, filters, (3, 9), stride=2, dilation=d, **kwargs) for d in (1, 2, 4)]
        convs += [_Conv2d(filters, filters, (3, 3), **kwargs)]
        self.convs = nnx.List(convs)
        self.conv_post = _Conv2d(filters, 1, (3, 3), **kwargs)
        self.n_fft, self.slope = n_fft, slope

    def __call__(
        self, x: Float[Array, "batch channels samples"]
    ) -> tuple[Float[Array, "batch frames frequencies one"], Features]:
        """Scores, and every layer's output for the feature loss."""
        window = hann_window(self.n_fft)
        # The window has unit energy; frames a quarter of it apart; real parts of all channels, then imaginary ones.
        z = stft(x, self.n_fft, self.n_fft // 4, window / np.sqrt(np.sum(window**2)), center=False)
        y = jnp.moveaxis(jnp.concatenate([z.real, z.imag], axis=1), 1, -1)
        features = []
        for conv in self.convs:
            y = jax.nn.leaky_relu(conv(y), self.slope)
            features.append(y)
        return self.conv_post(y), tuple(features)


class MultiScaleSTFTDiscriminator(nnx.Module):
    """Discriminators of several windows (§3.4); at 48 kHz the paper's windows are twice as long.

    Made for one channel, it judges those of a stereo recording one by one, as in the paper; made for two, together.
    """

    def __init__(
        self,
        n_ffts: tuple[int, ...] = (2048, 1024, 512, 256, 128),
        *,
        channels: int = 1,
        filters: int = 32,
        slope: float = 0.2,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        kwargs: dict[str, Any] = {"channels": channels, "filters": filters, "slope": slope}
        kwargs |= {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.discriminators = nnx.List([STFTDiscriminator(n_fft, **kwargs) for n_fft in n_ffts])
        self.channels = channels

    def __call__(self, x: Float[Array, "batch channels samples"]) -> tuple[tuple[jax.Array, ...], tuple[Features, ...]]:
        """Scores and features of every scale."""
        x = x.reshape(-1, self.channels, x.shape[-1])
        results = [discriminator(x) for discriminator in self.discriminators]
        return tuple(scores for scores, _ in results), tuple(features for _, features in results)


# --- §3.4: losses ----------------------------------------------------------------------------------------------------


def time_loss(x: Float[Array, "batch channels samples"], y: Float[Array, "batch channels samples"]) -> Float[Array, ""]:
    r"""$\ell_t = \lVert x - \hat x \rVert_1$, as a mean."""
    return jnp.mean(jnp.abs(x - y))


def mel_spectrogram(
    x: Float[Array, "batch channels samples"],
    sampling_rate: int,
    n_fft: int,
    *,
    n_mels: int = 64,
    normalized: bool = True,
) -> Float[Array, "batch channels frames mels"]:
    r"""$S_i(x)$ of §3.4, as power: windows of $2^i$ samples, a quarter of that apart, over mirrored ends.

    `normalized` gives the window unit energy.
    """
    hop = n_fft // 4
    edge = (n_fft - hop) // 2
    x = jnp.pad(x, ((0, 0), (0, 0), (edge, edge)), mode="reflect")
    last = -(x.shape[-1] - n_fft) % hop
    x = jnp.pad(x, ((0, 0), (0, 0), (0, last)))
    window = hann_window(n_fft)
    z = stft(x, n_fft, hop, window / np.sqrt(np.sum(window**2)) if normalized else window, center=False)
    bank = mel_filterbank(n_fft // 2 + 1, n_mels, sampling_rate, scale="htk", norm=None)
    power = jnp.square(z.real) + jnp.square(z.imag)
    return power @ jnp.asarray(bank, power.dtype)


def frequency_loss(
    x: Float[Array, "batch channels samples"],
    y: Float[Array, "batch channels samples"],
    sampling_rate: int,
    *,
    exponents: Sequence[int] = tuple(range(5, 12)),
    alphas: Sequence[float] | None = None,
    average: bool = True,
    normalized: bool = True,
    n_mels: int = 64,
    floor: float = 1e-5,
) -> Float[Array, ""]:
    r"""$\ell_f = \frac{1}{|\alpha| |s|} \sum_i \lVert S_i(x) - S_i(\hat x) \rVert_1 +
    \alpha_i \lVert \log S_i(x) - \log S_i(\hat x) \rVert_2^2$ (§3.4, Eq. 1), norms as means.

    The logarithm (of base 10, of $S + \text{floor}$) is in the released training code, not in the paper, and so is the
    mean square in place of the norm.

    Args:
        x: waveform.
        y: reconstruction.
        sampling_rate: Hz.
        exponents: $e$, windows are $2^i$.
        alphas: $\alpha_i$; 1 each, as in the paper, by default (the released code has $\sqrt{2^i - 1}$).
        average: divide by the number of terms, not done in the released code.
        normalized: whether windows have unit energy, as in the paper.
        n_mels: bands.
        floor: see above.
    """
    alphas = [1.0] * len(exponents) if alphas is None else alphas
    loss = jnp.zeros((), x.dtype)
    for exponent, alpha in zip(exponents, alphas, strict=True):
        a, b = (mel_spectrogram(v, sampling_rate, 2**exponent, n_mels=n_mels, normalized=normalized) for v in (x, y))
        loss = loss + jnp.mean(jnp.abs(a - b))
        loss = loss + alpha * jnp.mean(jnp.square(jnp.log10(a + floor) - jnp.log10(b + floor)))
    return loss / (2 * len(exponents)) if average else loss


def generator_loss(scores: Sequence[jax.Array], *, hinge: bool = True) -> Float[Array, ""]:
    r"""$\ell_g = \frac1K \sum_k \max(0, 1 - D_k(\hat x))$ (§3.4); without `hinge`, $-D_k(\hat x)$."""
    terms = [jnp.mean(jax.nn.relu(1.0 - s) if hinge else -s) for s in map(at_least_float32, scores)]
    return sum(terms, jnp.zeros((), terms[0].dtype)) / len(terms)


def feature_loss(real: Sequence[Features], fake: Sequence[Features]) -> Float[Array, ""]:
    r"""$\ell_{feat} = \frac{1}{KL} \sum_{k,l} \lVert D_k^l(x) - D_k^l(\hat x) \rVert_1 / \text{mean} |D_k^l(x)|$
    (§3.4, Eq. 2).
    """
    terms = [
        jnp.mean(jnp.abs(a - b)) / jnp.mean(jnp.abs(a))
        for layers_real, layers_fake in zip(real, fake, strict=True)
        for a, b in zip(map(at_least_float32, layers_real), map(at_least_float32, layers_fake), strict=True)
    ]
    return sum(terms, jnp.zeros((), terms[0].dtype)) / len(terms)


def discriminator_loss(real: Sequence[jax.Array], fake: Sequence[jax.Array]) -> Float[Array, ""]:
    r"""$L_d = \frac1K \sum_k \max(0, 1 - D_k(x)) + \max(0, 1 + D_k(\hat x))$ (§3.4)."""
    pairs = zip(map(at_least_float32, real), map(at_least_float32, fake), strict=True)
    terms = [jnp.mean(jax.nn.relu(1.0 - a)) + jnp.mean(jax.nn.relu(1.0 + b)) for a, b in pairs]
    return sum(terms, jnp.zeros((), terms[0].dtype)) / len(terms)


class BalancerState(ModelOutput):
    r"""Running sums behind $\langle \lVert g_i \rVert \rangle_\beta$ (§3.4): of the norms, and of their weights."""

    norms: dict[str, Float[Array, ""]] = ABSENT
    weights: dict[str, Float[Array, ""]] = ABSENT


@dataclass(frozen=True)
class Balancer:
    r"""Gives each loss the share $\lambda_i / \sum_j \lambda_j$ of the gradient at the decoder's output (§3.4, Eq. 5).

    $\tilde g_i = R \frac{\lambda_i}{\sum_j \lambda_j} \cdot \frac{g_i}{\langle \lVert g_i \rVert_2 \rangle_\beta}$

    Attributes:
        weights: $\lambda_i$, by the loss's name.
        total_norm: $R$.
        decay: $\beta$.
        epsilon: added to the average norm.
        rescale: without it the gradients are only weighted and summed.
    """

    weights: Mapping[str, float]
    total_norm: float = 1.0
    decay: float = 0.999
    epsilon: float = 1e-12
    rescale: bool = True

    @classmethod
    def encodec_24khz(cls) -> Balancer:
        """The weights of §4.4 for 24 kHz."""
        return cls({"time": 0.1, "frequency": 1.0, "adversarial": 3.0, "feature": 3.0})

    @classmethod
    def encodec_48khz(cls) -> Balancer:
        """The weights of §4.4 for 48 kHz."""
        return cls({"time": 0.1, "frequency": 1.0, "adversarial": 4.0, "feature": 4.0})

    def init(self, dtype: Any = jnp.float32) -> BalancerState:
        """Before the first step."""
        return BalancerState(*({name: jnp.zeros((), dtype) for name in self.weights} for _ in range(2)))

    def __call__(
        self, gradients: Mapping[str, Float[Array, "batch ..."]], state: BalancerState
    ) -> tuple[Float[Array, "batch ..."], BalancerState]:
        """The balanced sum of gradients, and the state after it. Norms are taken item by item and averaged."""
        total = sum(self.weights[name] for name in gradients)
        norms, weights, balanced = dict(state.norms), dict(state.weights), []
        for name, gradient in gradients.items():
            squares = jnp.square(at_least_float32(gradient))
            norm = jnp.mean(jnp.sqrt(jnp.sum(squares, axis=tuple(range(1, gradient.ndim)))))
            norms[name] = self.decay * norms[name] + norm
            weights[name] = self.decay * weights[name] + 1.0
            if self.rescale:
                scale = self.weights[name] / total * self.total_norm / (self.epsilon + norms[name] / weights[name])
                balanced.append(gradient * scale)
            else:
                balanced.append(gradient * self.weights[name])
        return sum(balanced[1:], balanced[0]), BalancerState(norms, weights)


def codec_gradients(
    model: EncodecModel,
    input_values: Float[Array, "batch channels samples"],
    balancer: Balancer,
    state: BalancerState,
    *,
    discriminator: MultiScaleSTFTDiscriminator | None = None,
    num_quantizers: int | Int[Array, ""] | None = None,
    commitment_weight: float = 1.0,
    frequency_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> tuple[Any, BalancerState, dict[str, Float[Array, ""]], EncodecTrainingOutput]:
    r"""The gradient of one training step of encoder and decoder (§3.4).

    Each loss is differentiated with respect to $\hat x$ alone; the balanced sum goes back through the model once,
    together with the commitment loss, which the balancer leaves alone.

    Args:
        model: the codec.
        input_values: waveforms.
        balancer: which losses, and their weights: "time", "frequency", and with a discriminator "adversarial" and
            "feature".
        state: the balancer's.
        discriminator: without it there are no adversarial losses.
        num_quantizers: codebooks to use.
        commitment_weight: $\lambda_w$.
        frequency_options: of `frequency_loss`.
        options: of the quantiser's `train_step`: `key` …

    Returns:
        The gradient, as a state of `nnx.Param`; the balancer's state; the losses by name; the reconstruction, with the
        codebooks to put into `model.quantizer`.
    """
    parts: Any = nnx.split(model, nnx.Param, ...)
    graphdef, params, rest = parts

    def forward(params: Any) -> tuple[tuple[jax.Array, jax.Array], EncodecTrainingOutput]:
        output = nnx.merge(graphdef, params, rest).reconstruct(input_values, num_quantizers, **options)
        return (output.audio_values, output.commitment_loss), output

    (values, commitment), pull_back, output = jax.vjp(forward, params, has_aux=True)
    losses: dict[str, jax.Array] = {"commitment": commitment}
    gradients: dict[str, jax.Array] = {}
    rate = model.config.sampling_rate
    separate = {
        "time": lambda y: time_loss(input_values, y),
        "frequency": lambda y: frequency_loss(input_values, y, rate, **(frequency_options or {})),
    }
    for name, loss in separate.items():
        if name in balancer.weights:
            losses[name], gradients[name] = jax.value_and_grad(loss)(values)
    if discriminator is not None:
        _, real = discriminator(input_values)

        def adversarial(y: jax.Array) -> tuple[jax.Array, jax.Array]:
            scores, fake = discriminator(y)
            return generator_loss(scores), feature_loss(real, fake)

        (losses["adversarial"], losses["feature"]), back = jax.vjp(adversarial, values)
        for name, other in (("adversarial", "feature"), ("feature", "adversarial")):
            if name in balancer.weights:
                wanted = {name: jnp.ones_like(losses[name]), other: jnp.zeros_like(losses[other])}
                (gradients[name],) = back((wanted["adversarial"], wanted["feature"]))
    combined, state = balancer(gradients, state)
    (gradient,) = pull_back((combined.astype(values.dtype), jnp.asarray(commitment_weight, commitment.dtype)))
    return gradient, state, losses, output


# --- §3.3: language model --------------------------------------------------------------------------------------------


class LanguageModelState(ModelOutput):
    """What the language model of §3.3 remembers: keys and values of the last frames, in a ring, and frames so far."""

    past_keys: Float[Array, "batch layers past heads width"] = ABSENT
    past_values: Float[Array, "batch layers past heads width"] = ABSENT
    frames: Int[Array, ""] = ABSENT


class _LanguageModelLayer(nnx.Module):
    """A Transformer layer that normalises after each sum."""

    def __init__(self, width: int, heads: int, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs):
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.q_proj, self.k_proj = Linear(width, width, **kwargs), Linear(width, width, **kwargs)
        self.v_proj, self.out_proj = Linear(width, width, **kwargs), Linear(width, width, **kwargs)
        self.linear1, self.linear2 = Linear(width, 4 * width, **kwargs), Linear(4 * width, width, **kwargs)
        self.norm1, self.norm2 = LayerNorm(width, **kwargs), LayerNorm(width, **kwargs)
        self.heads = heads

    def split(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:-1], self.heads, -1)

    def __call__(self, x: jax.Array, keys: jax.Array, values: jax.Array, visible: jax.Array) -> jax.Array:
        """`visible` is `(query, key)`."""
        query = self.split(self.q_proj(x))
        logits = jnp.einsum("bqhd,bkhd->bhqk", query * query.shape[-1] ** -0.5, keys)
        weights = jax.nn.softmax(jnp.where(visible, at_least_float32(logits), -jnp.inf), axis=-1).astype(values.dtype)
        attended = jnp.einsum("bhqk,bkhd->bqhd", weights, values)
        x = self.norm1(x + self.out_proj(attended.reshape(x.shape)))
        return self.norm2(x + self.linear2(gelu(self.linear1(x))))


class EncodecLanguageModel(nnx.Module):
    r"""Predicts the codes of a frame, all codebooks at once, from the frames before it (§3.3).

    A frame's input is the sum of an embedding for each codebook; index 0 stands for "nothing yet", so codes are counted
    from 1. Each layer looks back `config.language_model_context` frames; before the first frame there is one zero
    vector, which is attended to as well (not in the paper; in the released checkpoints).
    """

    def __init__(self, config: EncodecConfig, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        width, books, size = config.language_model_size, config.num_quantizers, config.codebook_size
        self.emb = nnx.Param(jax.random.normal(rngs.params(), (books, size + 1, width), param_dtype))
        self.norm_in = LayerNorm(width, **kwargs)
        self.layers = nnx.List(
            [
                _LanguageModelLayer(width, config.language_model_heads, **kwargs)
                for _ in range(config.language_model_layers)
            ]
        )
        bound = width**-0.5
        self.kernel = nnx.Param(jax.random.uniform(rngs.params(), (books, width, size), param_dtype, -bound, bound))
        self.bias = nnx.Param(jax.random.uniform(rngs.params(), (books, size), param_dtype, -bound, bound))
        self.config, self.dtype = config, dtype

    def __call__(
        self, indices: Int[Array, "batch quantizers frames"], offset: int | Int[Array, ""] = 0
    ) -> Float[Array, "batch frames quantizers entries"]:
        """Logits of the codes of every frame, given for each what came before.

        Args:
            indices: 1 + the codes of the previous frame; 0 for the first. Fewer codebooks than the model's will do.
            offset: position of the first frame.
        """
        context = self.config.language_model_context
        x = self._embed(indices, offset + jnp.arange(indices.shape[2]))
        length = x.shape[1]
        # Position 0 among the keys is the zero vector.
        behind = jnp.arange(1, length + 1)[:, None] - jnp.arange(length + 1)[None]
        visible = (behind >= 0) & (behind <= context)
        for layer in self.layers:
            past = jnp.pad(x, ((0, 0), (1, 0), (0, 0)))
            x = layer(x, layer.split(layer.k_proj(past)), layer.split(layer.v_proj(past)), visible)
        return self._logits(x, indices.shape[1])

    def initial_state(self, batch: int = 1) -> LanguageModelState:
        """Before the first frame: the zero vector's keys and values."""
        past = self.config.language_model_context
        zero = jnp.zeros((batch, 1, self.config.language_model_size), self.dtype or self.emb.dtype)

        def begin(name: str) -> jax.Array:
            first = [layer.split(getattr(layer, name)(zero)) for layer in self.layers]
            return jnp.pad(jnp.stack(first, axis=1), ((0, 0), (0, 0), (0, past - 1), (0, 0), (0, 0)))

        return LanguageModelState(begin("k_proj"), begin("v_proj"), jnp.zeros((), jnp.int32))

    def step(
        self, indices: Int[Array, "batch quantizers"], state: LanguageModelState
    ) -> tuple[Float[Array, "batch quantizers entries"], LanguageModelState]:
        """Probabilities of the next frame's codes, and the state after it; `indices` as in `__call__`.

        They are in float32 or wider: rounded to fewer bits they would not add up to 1, as a range coder needs them to.
        """
        x = self._embed(indices[:, :, None], state.frames[None])
        past = self.config.language_model_context
        known = jnp.arange(past) < state.frames + 1  # the zero vector counts
        visible = jnp.concatenate([known, jnp.ones(1, bool)])[None]
        slot = (state.frames + 1) % past
        keys, values = state.past_keys, state.past_values
        for index, layer in enumerate(self.layers):
            key, value = layer.split(layer.k_proj(x)), layer.split(layer.v_proj(x))
            x = layer(
                x,
                jnp.concatenate([state.past_keys[:, index], key], axis=1),
                jnp.concatenate([state.past_values[:, index], value], axis=1),
                visible,
            )
            keys, values = keys.at[:, index, slot].set(key[:, 0]), values.at[:, index, slot].set(value[:, 0])
        probabilities = jax.nn.softmax(at_least_float32(self._logits(x, indices.shape[1])[:, 0]), axis=-1)
        return probabilities, LanguageModelState(keys, values, state.frames + 1)

    def _embed(self, indices: jax.Array, positions: jax.Array) -> jax.Array:
        """Sum of embeddings, normalised, and cosines and sines of the position."""
        books = indices.shape[1]
        offsets = (self.config.codebook_size + 1) * jnp.arange(books, dtype=indices.dtype)
        table = self.emb[...].reshape(-1, self.emb.shape[2])
        x = self.norm_in(table[indices + offsets[:, None]].sum(axis=1))
        return x + cosines_and_sines(positions, x.shape[-1], dtype=x.dtype)

    def _logits(self, x: jax.Array, books: int) -> jax.Array:
        x, kernel, bias = promote(x, self.kernel[...][:books], self.bias[...][:books], dtype=self.dtype)
        y = jnp.einsum("btd,kdn->btkn", x, kernel)
        return y + spread(bias, y)


def language_model_loss(
    model: EncodecLanguageModel, codes: Int[Array, "batch quantizers frames"], offset: int | Int[Array, ""] = 0
) -> Float[Array, ""]:
    """Mean cross-entropy in nats of codes under the language model (§3.3).

    The paper trains on 5 s at a time, and draws `offset`, the position of the first frame, so that the model has seen
    the positions of longer recordings; and it draws the bandwidth, that is, how many codebooks there are.
    """
    previous = jnp.pad(codes[..., :-1] + 1, ((0, 0), (0, 0), (1, 0)))
    log_probabilities = jax.nn.log_softmax(at_least_float32(model(previous, offset)), axis=-1)
    picked = jnp.take_along_axis(log_probabilities, codes.transpose(0, 2, 1)[..., None], axis=-1)
    return -jnp.mean(picked)
