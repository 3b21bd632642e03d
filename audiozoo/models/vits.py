r"""# VITS: Conditional Variational Autoencoder with Adversarial Learning for End-to-End Text-to-Speech

Jaehyeon Kim, Jungil Kong, Juhee Son, 2021, arXiv 2106.06103.

Text and waveform are tied by one latent sequence $z$. A posterior encoder reads $z$ off the spectrogram; a prior
encoder predicts it from the text, one Gaussian for each phoneme, made flexible by a normalising flow; a HiFi-GAN
decoder turns it into sound. Which frame belongs to which phoneme is found while training, by a search for the monotonic
alignment that makes $z$ most likely; a flow-based predictor learns to sample the durations that the search found.

    spectrogram ── Conv, WaveNet × 16, Conv ── N(μ_q, σ_q) ──> z ── HiFi-GAN ──> waveform          training
                                                               │ f, 4 couplings
                                                             f(z) ── monotonic alignment search ──┐
    ids ── embed ── 6 × [attention, LN, convolutions, LN] ── Conv ──> μ_p, σ_p of each phoneme ───┘
                                   └── duration predictor ──> frames of each phoneme

    ids ──> μ_p, σ_p, durations ── repeat each phoneme ── N(μ_p, σ_p) ── f⁻¹ ──> z ── HiFi-GAN ──> waveform   synthesis

| paper | here |
| --- | --- |
| §2.1.2, Eq. 2, reconstruction loss | `VitsLosses.mel`, on `hifigan.mel_of_spectrogram` |
| §2.1.3, Eq. 3 and 4, KL divergence | `kl_loss` |
| §2.2.1, Eq. 5 and 6, monotonic alignment search | `log_likelihoods`, `layers.alignment.monotonic_alignment` |
| §2.2.2, Eq. 7, duration prediction; Appendix B.3 | `VitsStochasticDurationPredictor` |
| §2.3, Eq. 8 to 10, adversarial training | `VitsDiscriminator`, on `hifigan`'s losses |
| §2.4, Eq. 11, final loss | `generator_losses`, `discriminator_losses` |
| §2.5.1, posterior encoder | `VitsPosteriorEncoder`, `VitsWaveNet` |
| §2.5.2, prior encoder | `VitsTextEncoder`, `VitsResidualCouplingBlock`, `VitsResidualCouplingLayer` |
| the same, its Transformer | `VitsEncoder`, `VitsEncoderLayer`, `VitsAttention`, `VitsFeedForward` |
| §2.5.3, decoder | `hifigan.HifiGanGenerator` |
| §2.5.4, discriminator | `VitsDiscriminator` |
| §2.5.5, stochastic duration predictor; Figure 5 | `VitsConvFlow`, `VitsDilatedDepthSeparableConv`, `layers.splines` |
| not in the paper; in the released code: first in both flows | `VitsElementwiseAffine` |
| §2.5, several speakers; Appendix D, Eq. 12 to 14, voice conversion | `speaker_id`, `VitsModel.voice_conversion` |
| §4.1 and Table 1, VITS (DDP): the deterministic predictor | `VitsDurationPredictor` |
| §3.3, training | `training.loop.Trainer`, with the phases of `recipes.objectives.Voice` |
| not in the paper: compiled and streamed synthesis | `decoding.synthesis.Synthesizer` |

Where the original is wrong, the paper is followed. `transformers` runs the duration predictor's flows in the training
direction with a permutation after the first, affine one, which its own reverse direction does not undo; here the two
directions are inverse to each other, as in the authors' code. In a padded batch `transformers` lets what lies behind
the end of an item leak into its last samples; here each item sounds as it does by itself.

Checkpoints: `facebook/mms-tts-*` (1,100 languages), `kakao-enterprise/vits-ljs` and `-vctk`, the authors'
`pretrained_ljs.pth` and `pretrained_vctk.pth`, MMS' `G_100000.pth`, and Piper's voices, `.ckpt` and `.onnx`.

    import audiozoo
    from audiozoo.decoding.synthesis import speak
    model = audiozoo.load("facebook/mms-tts-eng")
    processor = audiozoo.load_processor("facebook/mms-tts-eng")
    for number, sentence in enumerate(speak(model, processor.sentences("Good morning. How are you?"))):
        audiozoo.audio.write(f"{number}.wav", sentence.waveform, model.config.sampling_rate)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from audiozoo.errors import UsageError
from audiozoo.layers import (
    Conv1d,
    Dropout,
    Embed,
    LayerNorm,
    Linear,
    activation,
    attend,
    gelu,
    relative_to_absolute,
)
from audiozoo.layers.alignment import monotonic_alignment, repeat_by_duration
from audiozoo.layers.attention import check_heads, merge_heads, split_heads
from audiozoo.layers.basic import at_least_float32, spread
from audiozoo.layers.splines import rational_quadratic_spline
from audiozoo.layers.stacking import all_weights, unseen
from audiozoo.layers.weight_norm import WeightNormConv1d
from audiozoo.models import hifigan
from audiozoo.models.hifigan import HifiGanConfig, HifiGanGenerator, PeriodDiscriminator, ScaleDiscriminator
from audiozoo.outputs import ABSENT, ModelOutput

# --- configuration ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class VitsConfig:
    """VITS' sizes (§2.5, Appendix B) under `transformers`' names; the defaults are MMS' English voice."""

    vocab_size: int = 38  # symbols: phonemes or characters
    hidden_size: int = 192  # h, channels of the text encoder, the WaveNets and the duration predictor
    num_hidden_layers: int = 6  # blocks of the text encoder
    num_attention_heads: int = 2  # of each block
    window_size: int = 4  # symbols on either side whose relative position is learnt
    use_bias: bool = True  # whether the attention's projections have biases
    ffn_dim: int = 768  # channels between a block's two convolutions
    layerdrop: float = 0.0  # kept for export; the paper drops no layer
    ffn_kernel_size: int = 3  # taps of a block's convolutions
    flow_size: int = 192  # channels of the latent z
    spectrogram_bins: int = 513  # bins of the linear spectrogram
    hidden_act: str = "relu"  # between a block's two convolutions
    hidden_dropout: float = 0.1  # after attention and after the convolutions
    attention_dropout: float = 0.1  # of attention weights
    activation_dropout: float = 0.1  # between the convolutions
    layer_norm_eps: float = 1e-5  # ε of every layer normalisation
    use_stochastic_duration_prediction: bool = True  # the flow-based predictor, or the deterministic one
    num_speakers: int = 1  # voices
    speaker_embedding_size: int = 0  # channels of a voice's embedding; 0 with one voice
    upsample_initial_channel: int = 512  # decoder's channels before its first stage
    upsample_rates: tuple[int, ...] = (8, 8, 2, 2)  # samples out for each one in, stage by stage
    upsample_kernel_sizes: tuple[int, ...] = (16, 16, 4, 4)  # taps of the transposed convolutions
    resblock_kernel_sizes: tuple[int, ...] = (3, 7, 11)  # taps, one residual block each
    resblock_dilation_sizes: tuple[tuple[int, ...], ...] = ((1, 3, 5), (1, 3, 5), (1, 3, 5))  # of each block's layers
    resblock: str = "1"  # HiFi-GAN's residual blocks of variant "1" or "2"; transformers knows only "1"
    leaky_relu_slope: float = 0.1  # below zero, in the decoder
    depth_separable_channels: int = 2  # channels of the duration predictor's flows
    depth_separable_num_layers: int = 3  # dilated convolutions of each conditioner
    duration_predictor_flow_bins: int = 10  # K, bins of a spline
    duration_predictor_tail_bound: float = 5.0  # B, the splines act on [-B, B]
    duration_predictor_kernel_size: int = 3  # taps
    duration_predictor_dropout: float = 0.5  # in training
    duration_predictor_num_flows: int = 4  # spline couplings in each of the two flows
    duration_predictor_filter_channels: int = 256  # channels of the deterministic predictor
    prior_encoder_num_flows: int = 4  # couplings of f
    prior_encoder_num_wavenet_layers: int = 4  # layers in each of them
    posterior_encoder_num_wavenet_layers: int = 16  # layers
    wavenet_kernel_size: int = 5  # taps
    wavenet_dilation_rate: int = 1  # layer i is dilated by this to the power of i
    wavenet_dropout: float = 0.0  # in training
    speaking_rate: float = 1.0  # default of the call's argument; twice as fast at 2
    noise_scale: float = 0.667  # default of the call's argument; standard deviation of z about the prior
    noise_scale_duration: float = 0.8  # default of the call's argument; standard deviation of the durations' noise
    sampling_rate: int = 16_000  # Hz
    pad_token_id: int | None = None  # kept for export
    decoder_weight_norm: bool = False  # decoder's kernels as magnitude and direction; True for the authors' files
    has_posterior: bool = True  # whether what only training and voice conversion need is there; False for .onnx

    @property
    def hop_length(self) -> int:
        """Samples of waveform for each frame of z."""
        return math.prod(self.upsample_rates)

    @property
    def decoder(self) -> HifiGanConfig:
        """The decoder: HiFi-GAN's generator without normalised ends (§2.5.3)."""
        return HifiGanConfig(
            model_in_dim=self.flow_size,
            sampling_rate=self.sampling_rate,
            upsample_initial_channel=self.upsample_initial_channel,
            upsample_rates=self.upsample_rates,
            upsample_kernel_sizes=self.upsample_kernel_sizes,
            resblock=self.resblock,
            resblock_kernel_sizes=self.resblock_kernel_sizes,
            resblock_dilation_sizes=self.resblock_dilation_sizes,
            leaky_relu_slope=self.leaky_relu_slope,
            condition_dim=self.speaker_embedding_size,
            use_post_bias=False,
            weight_norm=self.decoder_weight_norm,
            weight_norm_ends=False,
        )

    @classmethod
    def mms(cls, **changes: Any) -> VitsConfig:
        """A voice of MMS (arXiv 2305.13516, §7): one speaker, 16 kHz, the language's characters."""
        return cls(**changes)

    @classmethod
    def ljs(cls, **changes: Any) -> VitsConfig:
        """One speaker at 22,050 Hz, 178 phonemes (§3.1, LJ Speech)."""
        return cls(**{"vocab_size": 178, "sampling_rate": 22_050, **changes})

    @classmethod
    def vctk(cls, **changes: Any) -> VitsConfig:
        """109 speakers at 22,050 Hz (§3.1, VCTK)."""
        return cls.ljs(**{"num_speakers": 109, "speaker_embedding_size": 256, **changes})

    @classmethod
    def piper_high(cls, **changes: Any) -> VitsConfig:
        """Piper's high quality: the paper's sizes."""
        return cls(**{"vocab_size": 256, "sampling_rate": 22_050, **changes})

    @classmethod
    def piper_medium(cls, **changes: Any) -> VitsConfig:
        """Piper's medium quality: HiFi-GAN's variant 3 as decoder."""
        sizes: dict[str, Any] = {
            "upsample_initial_channel": 256,
            "upsample_rates": (8, 8, 4),
            "upsample_kernel_sizes": (16, 16, 8),
            "resblock": "2",
            "resblock_kernel_sizes": (3, 5, 7),
            "resblock_dilation_sizes": ((1, 2), (2, 6), (3, 12)),
        }
        return cls.piper_high(**(sizes | changes))

    @classmethod
    def piper_low(cls, **changes: Any) -> VitsConfig:
        """Piper's low quality: medium at 16 kHz."""
        return cls.piper_medium(**{"sampling_rate": 16_000, **changes})

    @classmethod
    def piper_x_low(cls, **changes: Any) -> VitsConfig:
        """Piper's lowest quality: half the channels, 16 kHz."""
        return cls.piper_low(**{"hidden_size": 96, "flow_size": 96, "ffn_dim": 384, **changes})


class VitsModelOutput(ModelOutput):
    """Not in the paper: what synthesis gives; `spectrogram` is the masked latent z, the decoder's input."""

    waveform: Float[Array, "batch samples"] = ABSENT
    sequence_lengths: Int[Array, " batch"] = ABSENT
    spectrogram: Float[Array, "batch frames latent"] = ABSENT
    hidden_states: tuple[Float[Array, "batch time channels"], ...] | None = None
    attentions: tuple[Float[Array, "batch heads query key"], ...] | None = None
    durations: Float[Array, "batch time"] = ABSENT


class VitsTextEncoderOutput(ModelOutput):
    """§2.1.3: the text encoder's output, one Gaussian for each symbol."""

    last_hidden_state: Float[Array, "batch time channels"] = ABSENT
    prior_means: Float[Array, "batch time latent"] = ABSENT
    prior_log_variances: Float[Array, "batch time latent"] = ABSENT
    hidden_states: tuple[Float[Array, "batch time channels"], ...] | None = None
    attentions: tuple[Float[Array, "batch heads query key"], ...] | None = None


def _kwargs(dtype: Any, param_dtype: Any, rngs: nnx.Rngs) -> dict[str, Any]:
    return {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}


def _zero(layer: Conv1d) -> None:
    for parameter in (layer.kernel, layer.bias):
        assert parameter is not None
        parameter[...] = jnp.zeros_like(parameter[...])


# --- text encoder ----------------------------------------------------------------------------------------------------


def absolute_to_relative(
    x: Float[Array, "*batch queries queries"], window: int
) -> Float[Array, "*batch queries offsets"]:
    r"""The $2w + 1$ diagonals of `relative_to_absolute`, side by side again."""
    queries = x.shape[-1]
    width = queries + 2 * window
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(window, window)])
    x = x.reshape(*x.shape[:-2], -1)
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, queries)])
    return x.reshape(*x.shape[:-1], queries, width + 1)[..., : 2 * window + 1]


class VitsAttention(nnx.Module):
    r"""Self-attention with windowed relative positions (§2.5.2; Shaw et al., arXiv 1803.02155, Eq. 3 and 4).

    $\text{score}_{ij} = \frac{q_i \cdot (k_j + a^K_{j-i})}{\sqrt{d}}$ and
    $o_i = \sum_j \alpha_{ij} (v_j + a^V_{j-i})$, with $a = 0$ outside the window; all heads share the tables.
    """

    def __init__(self, config: VitsConfig, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        size, kwargs = config.hidden_size, _kwargs(dtype, param_dtype, rngs)
        check_heads(size, config.num_attention_heads)
        self.k_proj = Linear(size, size, use_bias=config.use_bias, **kwargs)
        self.v_proj = Linear(size, size, use_bias=config.use_bias, **kwargs)
        self.q_proj = Linear(size, size, use_bias=config.use_bias, **kwargs)
        self.out_proj = Linear(size, size, use_bias=config.use_bias, **kwargs)
        self.heads, self.window, self.dropout_rate = (
            config.num_attention_heads,
            config.window_size,
            config.attention_dropout,
        )
        head_dim = size // self.heads
        self.scale = head_dim**-0.5
        shape = (1, 2 * config.window_size + 1, head_dim)
        self.emb_rel_k = nnx.Param(self.scale * jax.random.normal(rngs.params(), shape, param_dtype))
        self.emb_rel_v = nnx.Param(self.scale * jax.random.normal(rngs.params(), shape, param_dtype))

    def __call__(
        self,
        x: Float[Array, "batch time channels"],
        mask: Bool[Array, "#batch 1 1 time"] | None = None,
        dropout: Dropout | None = None,
    ) -> tuple[Float[Array, "batch time channels"], Float[Array, "batch heads query key"]]:
        """Attend; returns the output and the attention weights."""
        query = split_heads(self.q_proj(x), self.heads)
        key, value = split_heads(self.k_proj(x), self.heads), split_heads(self.v_proj(x), self.heads)
        relative_keys, relative_values = self.emb_rel_k[0].astype(query.dtype), self.emb_rel_v[0].astype(query.dtype)
        bias = relative_to_absolute((query * self.scale) @ relative_keys.T)
        output, weights = attend(
            query,
            key,
            value,
            scale=self.scale,
            mask=mask,
            bias=bias,
            dropout_rate=self.dropout_rate,
            dropout=dropout,
        )
        output = output + absolute_to_relative(weights, self.window) @ relative_values
        return self.out_proj(merge_heads(output)), weights


class VitsFeedForward(nnx.Module):
    """Two convolutions over time in place of two linear maps (§2.5.2; FastSpeech, arXiv 1905.09263, §3.1)."""

    def __init__(self, config: VitsConfig, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        kwargs, taps = _kwargs(dtype, param_dtype, rngs), config.ffn_kernel_size
        padding = ((taps - 1) // 2, taps // 2)
        self.conv_1 = Conv1d(config.hidden_size, config.ffn_dim, taps, padding=padding, **kwargs)
        self.conv_2 = Conv1d(config.ffn_dim, config.hidden_size, taps, padding=padding, **kwargs)
        self.activation, self.dropout_rate = activation(config.hidden_act), config.activation_dropout

    def __call__(
        self,
        x: Float[Array, "batch time channels"],
        mask: Float[Array, "batch time 1"],
        dropout: Dropout | None = None,
    ) -> Float[Array, "batch time channels"]:
        """Convolve twice; padding is silence before each convolution and in the output."""
        x = self.activation(self.conv_1(x * mask))
        x = dropout(x, self.dropout_rate) if dropout else x
        return self.conv_2(x * mask) * mask


class VitsEncoderLayer(nnx.Module):
    """A block of the text encoder (§2.5.2): attention and convolutions, each added and then normalised."""

    def __init__(self, config: VitsConfig, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        kwargs = _kwargs(dtype, param_dtype, rngs)
        self.attention = VitsAttention(config, **kwargs)
        self.layer_norm = LayerNorm(config.hidden_size, epsilon=config.layer_norm_eps, **kwargs)
        self.feed_forward = VitsFeedForward(config, **kwargs)
        self.final_layer_norm = LayerNorm(config.hidden_size, epsilon=config.layer_norm_eps, **kwargs)
        self.dropout_rate = config.hidden_dropout

    def __call__(
        self,
        x: Float[Array, "batch time channels"],
        mask: Float[Array, "batch time 1"],
        dropout: Dropout | None = None,
    ) -> tuple[Float[Array, "batch time channels"], Float[Array, "batch heads query key"]]:
        """The block's output and its attention weights."""
        dropout = dropout or Dropout(None)
        attended, weights = self.attention(x, (mask[..., 0] > 0)[:, None, None], dropout)
        x = self.layer_norm(x + dropout(attended, self.dropout_rate))
        x = self.final_layer_norm(x + dropout(self.feed_forward(x, mask, dropout), self.dropout_rate))
        return x, weights


class VitsEncoder(nnx.Module):
    """The Transformer inside the text encoder (§2.5.2)."""

    def __init__(self, config: VitsConfig, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        kwargs = _kwargs(dtype, param_dtype, rngs)
        self.layers = nnx.List([VitsEncoderLayer(config, **kwargs) for _ in range(config.num_hidden_layers)])

    def __call__(
        self,
        x: Float[Array, "batch time channels"],
        mask: Float[Array, "batch time 1"],
        dropout: Dropout | None = None,
    ) -> tuple[Float[Array, "batch time channels"], tuple[jax.Array, ...], tuple[jax.Array, ...]]:
        """The last output, the outputs of all layers with the input first, and all attention weights."""
        x = x * mask
        states, attentions = [], []
        for layer in self.layers:
            states += [x, *unseen(layer)]
            x, weights = layer(x, mask, dropout)
            attentions.append(weights)
        x = x * mask
        return x, (*states, x), tuple(attentions)


class VitsTextEncoder(nnx.Module):
    r"""Symbols to $h_{text}$ and to the prior's $\mu_p$ and $\log \sigma_p$, one of each for a symbol (§2.5.2)."""

    def __init__(self, config: VitsConfig, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        kwargs = _kwargs(dtype, param_dtype, rngs)
        self.embed_tokens = Embed(config.vocab_size, config.hidden_size, **kwargs)
        self.encoder = VitsEncoder(config, **kwargs)
        self.project = Conv1d(config.hidden_size, 2 * config.flow_size, 1, **kwargs)
        self.scale = math.sqrt(config.hidden_size)

    def __call__(
        self,
        input_ids: Int[Array, "batch time"],
        mask: Float[Array, "batch time 1"],
        dropout: Dropout | None = None,
    ) -> VitsTextEncoderOutput:
        """Encode; what `transformers` calls log-variances are logarithms of standard deviations."""
        x, states, attentions = self.encoder(self.embed_tokens(input_ids) * self.scale, mask, dropout)
        means, log_deviations = jnp.split(self.project(x) * mask, 2, axis=-1)
        return VitsTextEncoderOutput(x, means, log_deviations, states, attentions)


# --- posterior encoder and flow --------------------------------------------------------------------------------------


class VitsWaveNet(nnx.Module):
    r"""Non-causal WaveNet residual blocks (§2.5.1; WaveGlow, arXiv 1811.00002, §2.1).

    Per layer $a = \tanh(W_f * x + V_f g) \odot \sigma(W_g * x + V_g g)$; one half of a projection of $a$ is added to
    $x$, the other to the output.
    """

    def __init__(
        self,
        config: VitsConfig,
        num_layers: int,
        *,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        size, kwargs = config.hidden_size, _kwargs(dtype, param_dtype, rngs)
        if config.speaker_embedding_size:
            self.cond_layer = WeightNormConv1d(config.speaker_embedding_size, 2 * size * num_layers, 1, **kwargs)
        taps, dilations = config.wavenet_kernel_size, [config.wavenet_dilation_rate**i for i in range(num_layers)]
        self.in_layers = nnx.List(
            [
                WeightNormConv1d(size, 2 * size, taps, dilation=d, padding=(taps - 1) * d // 2, **kwargs)
                for d in dilations
            ]
        )
        # The last layer has nothing to add to.
        widths = [2 * size] * (num_layers - 1) + [size]
        self.res_skip_layers = nnx.List([WeightNormConv1d(size, width, 1, **kwargs) for width in widths])
        self.size, self.dropout_rate = size, config.wavenet_dropout

    def __call__(
        self,
        x: Float[Array, "batch time channels"],
        mask: Float[Array, "batch time 1"],
        condition: Float[Array, "#batch 1 speaker"] | None = None,
        dropout: Dropout | None = None,
    ) -> Float[Array, "batch time channels"]:
        """All layers; `condition` is a voice's embedding."""
        output = jnp.zeros((), x.dtype)
        conditions = None if condition is None else self.cond_layer(condition)
        for i, (gates, projection) in enumerate(zip(self.in_layers, self.res_skip_layers, strict=True)):
            a = gates(x)
            if conditions is not None:
                a = a + spread(conditions[..., 2 * self.size * i : 2 * self.size * (i + 1)], a)
            a = jnp.tanh(a[..., : self.size]) * jax.nn.sigmoid(a[..., self.size :])
            a = projection(dropout(a, self.dropout_rate) if dropout else a)
            if i < len(self.in_layers) - 1:
                x = (x + a[..., : self.size]) * mask
                output = output + a[..., self.size :]
            else:
                output = output + a
        return output * mask


class VitsPosteriorEncoder(nnx.Module):
    r"""Linear spectrogram to $q_\phi(z \mid x) = \mathcal N(\mu_q, \sigma_q)$ (§2.5.1)."""

    def __init__(self, config: VitsConfig, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        kwargs = _kwargs(dtype, param_dtype, rngs)
        self.conv_pre = Conv1d(config.spectrogram_bins, config.hidden_size, 1, **kwargs)
        self.wavenet = VitsWaveNet(config, config.posterior_encoder_num_wavenet_layers, **kwargs)
        self.conv_proj = Conv1d(config.hidden_size, 2 * config.flow_size, 1, **kwargs)

    def __call__(
        self,
        spectrogram: Float[Array, "batch frames bins"],
        mask: Float[Array, "batch frames 1"],
        condition: Float[Array, "#batch 1 speaker"] | None = None,
        *,
        noise: Float[Array, "batch frames latent"],
        dropout: Dropout | None = None,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        r"""$z = \mu_q + \sigma_q \epsilon$ with $\epsilon$ = `noise`; returns $z, \mu_q, \log \sigma_q$."""
        x = self.wavenet(self.conv_pre(spectrogram) * mask, mask, condition, dropout)
        mean, log_deviation = jnp.split(self.conv_proj(x) * mask, 2, axis=-1)
        return (mean + noise * jnp.exp(log_deviation)) * mask, mean, log_deviation


class VitsResidualCouplingLayer(nnx.Module):
    r"""Affine coupling that shifts and does not scale, so that volumes are kept (§2.5.2; arXiv 1605.08803, Eq. 4)."""

    def __init__(self, config: VitsConfig, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        kwargs, half = _kwargs(dtype, param_dtype, rngs), config.flow_size // 2
        self.conv_pre = Conv1d(half, config.hidden_size, 1, **kwargs)
        self.wavenet = VitsWaveNet(config, config.prior_encoder_num_wavenet_layers, **kwargs)
        self.conv_post = Conv1d(config.hidden_size, half, 1, **kwargs)
        _zero(self.conv_post)  # a new flow is the identity

    def __call__(
        self,
        x: Float[Array, "batch frames latent"],
        mask: Float[Array, "batch frames 1"],
        condition: Float[Array, "#batch 1 speaker"] | None = None,
        *,
        reverse: bool = False,
        dropout: Dropout | None = None,
    ) -> Float[Array, "batch frames latent"]:
        r"""$[x_a, x_b] \mapsto [x_a, x_b \pm m(x_a)]$."""
        first, second = jnp.split(x, 2, axis=-1)
        mean = self.conv_post(self.wavenet(self.conv_pre(first) * mask, mask, condition, dropout)) * mask
        second = (second - mean) * mask if reverse else mean + second * mask
        return jnp.concatenate([first, second], axis=-1)


class VitsResidualCouplingBlock(nnx.Module):
    r"""The normalising flow $f_\theta$ (§2.1.3, Eq. 4; §2.5.2): couplings, the channels turned round after each."""

    def __init__(self, config: VitsConfig, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        kwargs = _kwargs(dtype, param_dtype, rngs)
        self.flows = nnx.List(
            [VitsResidualCouplingLayer(config, **kwargs) for _ in range(config.prior_encoder_num_flows)]
        )

    def __call__(
        self,
        x: Float[Array, "batch frames latent"],
        mask: Float[Array, "batch frames 1"],
        condition: Float[Array, "#batch 1 speaker"] | None = None,
        *,
        reverse: bool = False,
        dropout: Dropout | None = None,
    ) -> Float[Array, "batch frames latent"]:
        r"""$f_\theta(z)$, or $f_\theta^{-1}$ with `reverse`. Volumes are kept: the Jacobian's determinant is 1."""
        if reverse:
            for flow in reversed(self.flows):
                x = flow(x[..., ::-1], mask, condition, reverse=True)
            return x
        for flow in self.flows:
            x = flow(x, mask, condition, dropout=dropout)[..., ::-1]
        return x


# --- duration prediction ---------------------------------------------------------------------------------------------


class VitsDilatedDepthSeparableConv(nnx.Module):
    """Dilated depth-separable convolutions, the residual blocks of the duration predictor (§2.5.5, Figure 5c)."""

    def __init__(
        self,
        config: VitsConfig,
        dropout: float = 0.0,
        *,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        kwargs = _kwargs(dtype, param_dtype, rngs)
        size, taps, layers = (
            config.hidden_size,
            config.duration_predictor_kernel_size,
            config.depth_separable_num_layers,
        )
        self.convs_dilated = nnx.List(
            [
                Conv1d(size, size, taps, dilation=taps**i, padding=(taps - 1) * taps**i // 2, groups=size, **kwargs)
                for i in range(layers)
            ]
        )
        self.convs_pointwise = nnx.List([Conv1d(size, size, 1, **kwargs) for _ in range(layers)])
        self.norms_1 = nnx.List([LayerNorm(size, **kwargs) for _ in range(layers)])
        self.norms_2 = nnx.List([LayerNorm(size, **kwargs) for _ in range(layers)])
        self.dropout_rate = dropout

    def __call__(
        self,
        x: Float[Array, "batch time channels"],
        mask: Float[Array, "batch time 1"],
        condition: Float[Array, "batch time channels"] | None = None,
        dropout: Dropout | None = None,
    ) -> Float[Array, "batch time channels"]:
        """All layers; `condition` is added to the input."""
        if condition is not None:
            x = x + condition
        layers = zip(self.convs_dilated, self.convs_pointwise, self.norms_1, self.norms_2, strict=True)
        for dilated, pointwise, norm_1, norm_2 in layers:
            y = gelu(norm_1(dilated(x * mask)))
            y = gelu(norm_2(pointwise(y)))
            x = x + (dropout(y, self.dropout_rate) if dropout else y)
        return x * mask


class VitsConvFlow(nnx.Module):
    """Coupling of a spline whose bins are predicted from the other half (§2.5.5; neural spline flows, 1906.04032)."""

    def __init__(self, config: VitsConfig, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        kwargs = _kwargs(dtype, param_dtype, rngs)
        self.half, self.bins = config.depth_separable_channels // 2, config.duration_predictor_flow_bins
        self.bound, self.scale = config.duration_predictor_tail_bound, math.sqrt(config.hidden_size)
        self.conv_pre = Conv1d(self.half, config.hidden_size, 1, **kwargs)
        self.conv_dds = VitsDilatedDepthSeparableConv(config, **kwargs)
        self.conv_proj = Conv1d(config.hidden_size, self.half * (3 * self.bins - 1), 1, **kwargs)
        _zero(self.conv_proj)  # a new spline has equal bins

    def __call__(
        self,
        x: Float[Array, "batch time pair"],
        mask: Float[Array, "batch time 1"],
        condition: Float[Array, "batch time channels"],
        *,
        reverse: bool = False,
    ) -> tuple[Float[Array, "batch time pair"], Float[Array, " batch"]]:
        """The transformed pair and the log-determinant of each item (of the inverse with `reverse`)."""
        first, second = jnp.split(x, 2, axis=-1)
        parameters = self.conv_proj(self.conv_dds(self.conv_pre(first), mask, condition)) * mask
        parameters = parameters.reshape(*first.shape, -1)
        second, log_slope = rational_quadratic_spline(
            second,
            parameters[..., : self.bins] / self.scale,
            parameters[..., self.bins : 2 * self.bins] / self.scale,
            parameters[..., 2 * self.bins :],
            reverse=reverse,
            bound=self.bound,
        )
        return jnp.concatenate([first, second], axis=-1) * mask, jnp.sum(log_slope * mask, axis=(1, 2))


class VitsElementwiseAffine(nnx.Module):
    """Not in the paper; in the released code: a shift and a scale for each channel (Glow, arXiv 1807.03039, §3.1)."""

    def __init__(self, config: VitsConfig, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        channels = config.depth_separable_channels
        self.translate = nnx.Param(jnp.zeros(channels, param_dtype))
        self.log_scale = nnx.Param(jnp.zeros(channels, param_dtype))
        self.dtype = dtype

    def __call__(
        self,
        x: Float[Array, "batch time pair"],
        mask: Float[Array, "batch time 1"],
        condition: Float[Array, "batch time channels"] | None = None,
        *,
        reverse: bool = False,
    ) -> tuple[Float[Array, "batch time pair"], Float[Array, " batch"]]:
        """The transformed pair and the log-determinant of each item (of the inverse with `reverse`)."""
        translate, log_scale = self.translate[...].astype(x.dtype), self.log_scale[...].astype(x.dtype)
        log_determinant = jnp.sum(log_scale * mask, axis=(1, 2))
        if reverse:
            return (x - translate) * jnp.exp(-log_scale) * mask, -log_determinant
        return (translate + jnp.exp(log_scale) * x) * mask, log_determinant


class VitsStochasticDurationPredictor(nnx.Module):
    r"""Durations by a flow, with variational dequantisation and data augmentation (§2.2.2, Eq. 7; Appendix B.3).

    A duration $d$ is an integer and a single number, a flow wants neither: $u \in [0, 1)$ makes it continuous, $d - u$,
    and $\nu$ gives it company. Both come from $q_\phi(u, \nu \mid d, h)$, itself a flow, and
    $$\log p(d \mid h) \ge
    \mathbb E_{q}\Bigl[\log \frac{p_\theta(d - u, \nu \mid h)}{q_\phi(u, \nu \mid d, h)}\Bigr].$$
    """

    def __init__(self, config: VitsConfig, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        kwargs, size, rate = _kwargs(dtype, param_dtype, rngs), config.hidden_size, config.duration_predictor_dropout

        def flows(skip: int | None = None) -> nnx.List:
            layers: list[Any] = [VitsElementwiseAffine(config, **kwargs)]
            for i in range(1, config.duration_predictor_num_flows + 1):
                layers.append(None if i == skip else VitsConvFlow(config, **kwargs))
            return nnx.List(layers)

        self.conv_pre = Conv1d(size, size, 1, **kwargs)
        self.conv_proj = Conv1d(size, size, 1, **kwargs)
        self.conv_dds = VitsDilatedDepthSeparableConv(config, rate, **kwargs)
        if config.speaker_embedding_size:
            self.cond = Conv1d(config.speaker_embedding_size, size, 1, **kwargs)
        # Sampling leaves out the first spline, so files for inference do not hold it.
        self.flows = flows(skip=None if config.has_posterior else 1)
        if config.has_posterior:
            self.post_conv_pre = Conv1d(1, size, 1, **kwargs)
            self.post_conv_proj = Conv1d(size, size, 1, **kwargs)
            self.post_conv_dds = VitsDilatedDepthSeparableConv(config, rate, **kwargs)
            self.post_flows = flows()

    def condition(
        self,
        hidden_states: Float[Array, "batch time channels"],
        mask: Float[Array, "batch time 1"],
        speaker: Float[Array, "#batch 1 speaker"] | None,
        dropout: Dropout | None,
    ) -> Float[Array, "batch time channels"]:
        """What the flows are conditioned on. No gradient reaches the text encoder (§2.2.2)."""
        x = self.conv_pre(jax.lax.stop_gradient(hidden_states))
        if speaker is not None:
            x = x + spread(self.cond(jax.lax.stop_gradient(speaker)), x)
        return self.conv_proj(self.conv_dds(x, mask, dropout=dropout)) * mask

    def __call__(
        self,
        hidden_states: Float[Array, "batch time channels"],
        mask: Float[Array, "batch time 1"],
        speaker: Float[Array, "#batch 1 speaker"] | None = None,
        *,
        noise: Float[Array, "batch time 2"],
    ) -> Float[Array, "batch time 1"]:
        r"""Sample $\log d$: `noise`, already scaled, through the inverse of $p_\theta$'s flow."""
        condition = self.condition(hidden_states, mask, speaker, None)
        z = at_least_float32(noise)
        # The first spline only ever transforms ν, which is dropped here: it is left out.
        for flow in (*reversed(self.flows[2:]), self.flows[0]):
            z, _ = flow(z[..., ::-1], mask, condition, reverse=True)
        return z[..., :1].astype(jnp.promote_types(noise.dtype, condition.dtype))

    def negative_log_likelihood(
        self,
        hidden_states: Float[Array, "batch time channels"],
        mask: Float[Array, "batch time 1"],
        durations: Float[Array, "batch time 1"],
        speaker: Float[Array, "#batch 1 speaker"] | None = None,
        *,
        noise: Float[Array, "batch time 2"],
        dropout: Dropout | None = None,
    ) -> Float[Array, " batch"]:
        r"""The negative of the bound of Eq. 7, in nats for each item; `noise` is standard normal."""
        condition = self.condition(hidden_states, mask, speaker, dropout)
        posterior = self.post_conv_dds(self.post_conv_pre(durations), mask, dropout=dropout)
        posterior = self.post_conv_proj(posterior) * mask

        def total(x: jax.Array) -> jax.Array:
            return jnp.sum(x * mask, axis=(1, 2))

        def log_normal(x: jax.Array) -> jax.Array:
            return -0.5 * (math.log(2 * math.pi) + jnp.square(x))

        # log q(u, ν | d, h) = log N(ε) - log|det|; the sigmoid that brings u into (0, 1) is part of the flow.
        noise = noise * mask
        z, log_determinant = _forward(self.post_flows, noise, mask, condition + posterior)
        u, nu = z[..., :1], z[..., 1:]
        log_determinant = log_determinant + total(jax.nn.log_sigmoid(u) + jax.nn.log_sigmoid(-u))
        log_q = total(log_normal(noise)) - log_determinant

        # log p(d - u, ν | h), with log(d - u) as the first step of its flow.
        log_rest = jnp.log(jnp.maximum((durations - jax.nn.sigmoid(u)) * mask, 1e-5)) * mask
        z, log_determinant = _forward(self.flows, jnp.concatenate([log_rest, nu], axis=-1), mask, condition)
        log_p = total(log_normal(z)) + log_determinant - total(log_rest)
        return log_q - log_p


def _forward(flows: nnx.List, z: jax.Array, mask: jax.Array, condition: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A flow of the duration predictor, data to noise: affine, then splines, the two channels swapped after each."""
    z, log_determinant = flows[0](z, mask)
    for flow in flows[1:]:
        z, more = flow(z, mask, condition)
        z, log_determinant = z[..., ::-1], log_determinant + more
    return z, log_determinant


class VitsDurationPredictor(nnx.Module):
    """The deterministic predictor of $\\log d$ (§4.1, Table 1; FastSpeech, arXiv 1905.09263, §3.3)."""

    def __init__(self, config: VitsConfig, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        kwargs, size = _kwargs(dtype, param_dtype, rngs), config.duration_predictor_filter_channels
        taps, epsilon = config.duration_predictor_kernel_size, config.layer_norm_eps
        self.conv_1 = Conv1d(config.hidden_size, size, taps, padding=taps // 2, **kwargs)
        self.norm_1 = LayerNorm(size, epsilon=epsilon, **kwargs)
        self.conv_2 = Conv1d(size, size, taps, padding=taps // 2, **kwargs)
        self.norm_2 = LayerNorm(size, epsilon=epsilon, **kwargs)
        self.proj = Conv1d(size, 1, 1, **kwargs)
        if config.speaker_embedding_size:
            self.cond = Conv1d(config.speaker_embedding_size, config.hidden_size, 1, **kwargs)
        self.dropout_rate = config.duration_predictor_dropout

    def __call__(
        self,
        hidden_states: Float[Array, "batch time channels"],
        mask: Float[Array, "batch time 1"],
        speaker: Float[Array, "#batch 1 speaker"] | None = None,
        *,
        noise: Float[Array, "batch time 2"] | None = None,
        dropout: Dropout | None = None,
    ) -> Float[Array, "batch time 1"]:
        r"""$\log d$. No gradient reaches the text encoder; `noise` is not used."""
        dropout = dropout or Dropout(None)
        x = jax.lax.stop_gradient(hidden_states)
        if speaker is not None:
            x = x + spread(self.cond(jax.lax.stop_gradient(speaker)), x)
        x = dropout(self.norm_1(jax.nn.relu(self.conv_1(x * mask))), self.dropout_rate)
        x = dropout(self.norm_2(jax.nn.relu(self.conv_2(x * mask))), self.dropout_rate)
        return self.proj(x * mask) * mask


# --- alignment -----------------------------------------------------------------------------------------------------


def log_likelihoods(
    z: Float[Array, "batch frames latent"],
    means: Float[Array, "batch time latent"],
    log_deviations: Float[Array, "batch time latent"],
) -> Float[Array, "batch frames time"]:
    r"""$\log \mathcal N(f(z)_j;\ \mu_i, \sigma_i)$ of every frame $j$ under every symbol $i$ (§2.2.1, Eq. 6)."""
    precision = jnp.exp(-2 * log_deviations)
    constant = jnp.sum(-0.5 * math.log(2 * math.pi) - log_deviations, axis=-1)
    constant = constant - 0.5 * jnp.sum(jnp.square(means) * precision, axis=-1)
    squares = jnp.einsum("bfd,btd->bft", -0.5 * jnp.square(z), precision)
    products = jnp.einsum("bfd,btd->bft", z, means * precision)
    return constant[:, None] + squares + products


# --- the model -------------------------------------------------------------------------------------------------------


def frame_mask(lengths: Int[Array, " batch"], frames: int, dtype: Any) -> Float[Array, "batch frames 1"]:
    """1 before each item's end, 0 after it."""
    return (jnp.arange(frames) < lengths[:, None])[..., None].astype(dtype)


class VitsTrainingOutput(ModelOutput):
    """What a training forward gives: a segment of waveform, and what the losses compare (§2.1 to §2.3)."""

    waveform: Float[Array, "batch samples"] = ABSENT
    segment_starts: Int[Array, " batch"] = ABSENT
    duration_loss: Float[Array, ""] = ABSENT
    kl_loss: Float[Array, ""] = ABSENT
    alignment: Float[Array, "batch frames time"] = ABSENT
    latents: Float[Array, "batch frames latent"] = ABSENT


class VitsModel(nnx.Module):
    """VITS, whole: synthesis, voice conversion and the generator's part of training (Figure 1)."""

    def __init__(self, config: VitsConfig, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        kwargs = _kwargs(dtype, param_dtype, rngs)
        self.text_encoder = VitsTextEncoder(config, **kwargs)
        self.flow = VitsResidualCouplingBlock(config, **kwargs)
        self.decoder = HifiGanGenerator(config.decoder, **kwargs)
        self.duration_predictor = (
            VitsStochasticDurationPredictor(config, **kwargs)
            if config.use_stochastic_duration_prediction
            else VitsDurationPredictor(config, **kwargs)
        )
        if config.num_speakers > 1:
            self.embed_speaker = Embed(config.num_speakers, config.speaker_embedding_size, **kwargs)
        if config.has_posterior:
            self.posterior_encoder = VitsPosteriorEncoder(config, **kwargs)
        self.config = config

    def speaker_embedding(
        self, speaker_id: int | Int[Array, " batch"] | None
    ) -> Float[Array, "#batch 1 speaker"] | None:
        """The embedding of a voice, or of a voice for each item; None without one, or where there is one voice only.

        Raises:
            UsageError: for a voice that the model does not have.
        """
        voices = self.config.num_speakers
        if speaker_id is None or voices <= 1:
            return None
        ids = jnp.atleast_1d(jnp.asarray(speaker_id))
        if not isinstance(ids, jax.core.Tracer) and not bool(jnp.all((ids >= 0) & (ids < voices))):
            raise UsageError(f"There is no voice {speaker_id}; this model has voices 0 to {voices - 1}.")
        return self.embed_speaker(ids)[:, None]

    def encode(
        self,
        input_ids: Int[Array, "batch time"],
        attention_mask: Int[Array, "batch time"] | None = None,
        speaker: Float[Array, "#batch 1 speaker"] | None = None,
        *,
        speaking_rate: float | Float[Array, ""] | None = None,
        noise_scale_duration: float | Float[Array, ""] | None = None,
        duration_noise: Float[Array, "batch time 2"] | None = None,
        key: jax.Array | None = None,
    ) -> tuple[VitsTextEncoderOutput, Float[Array, "batch time"]]:
        """The first half of synthesis: the prior of each symbol, and how many frames it lasts.

        Arguments as for the call; `speaker` is a voice's embedding. The frames, which others will add up, are in at
        least float32: bfloat16 has no 257.
        """
        config, time = self.config, input_ids.shape[1]
        encoded = self.text_encoder(input_ids, self._symbol_mask(input_ids, attention_mask))
        hidden = encoded.last_hidden_state
        mask = self._symbol_mask(input_ids, attention_mask).astype(hidden.dtype)
        if duration_noise is None:
            duration_noise = jax.random.normal(_key(key, 0), (input_ids.shape[0], time, 2), hidden.dtype)
        scale = config.noise_scale_duration if noise_scale_duration is None else noise_scale_duration
        log_durations = self.duration_predictor(
            hidden, mask, speaker, noise=duration_noise.astype(hidden.dtype) * scale
        )
        rate = config.speaking_rate if speaking_rate is None else speaking_rate
        log_durations = log_durations.astype(jnp.promote_types(hidden.dtype, jnp.float32))
        durations = jnp.ceil(jnp.exp(log_durations) * mask * (1.0 / rate))
        return encoded, durations[..., 0]

    def _symbol_mask(self, input_ids: jax.Array, attention_mask: jax.Array | None) -> Float[Array, "batch time 1"]:
        dtype = self.text_encoder.embed_tokens.embedding.dtype
        present = jnp.ones(input_ids.shape, dtype) if attention_mask is None else jnp.asarray(attention_mask, dtype)
        return present[..., None]

    def latents(
        self,
        means: Float[Array, "batch time latent"],
        log_deviations: Float[Array, "batch time latent"],
        durations: Float[Array, "batch time"],
        speaker: Float[Array, "#batch 1 speaker"] | None = None,
        *,
        frames: int,
        noise_scale: float | Float[Array, ""] | None = None,
        prior_noise: Float[Array, "batch frames latent"] | None = None,
        key: jax.Array | None = None,
    ) -> tuple[Float[Array, "batch frames latent"], Int[Array, " batch"]]:
        r"""$z = f_\theta^{-1}(\mu_p + \sigma_p \epsilon)$, `frames` frames, zero after each end; and the ends."""
        means, log_deviations = repeat_by_duration(durations, frames, means, log_deviations)
        if prior_noise is None:
            prior_noise = jax.random.normal(_key(key, 1), means.shape, means.dtype)
        scale = self.config.noise_scale if noise_scale is None else noise_scale
        # A text without a frame still has one, of the prior's noise.
        lengths = jnp.maximum(jnp.sum(durations, axis=-1), 1).astype(jnp.int32)
        mask = frame_mask(lengths, frames, means.dtype)
        z = means + prior_noise.astype(means.dtype) * jnp.exp(log_deviations) * scale
        return self.flow(z, mask, speaker, reverse=True) * mask, lengths

    def decode(
        self,
        latents: Float[Array, "batch frames latent"],
        lengths: Int[Array, " batch"] | None = None,
        speaker: Float[Array, "#batch 1 speaker"] | None = None,
    ) -> Float[Array, "batch samples"]:
        """The last part of synthesis: z to waveform, silent after each item's end."""
        return self.decoder(latents, speaker, lengths=lengths)

    def __call__(
        self,
        input_ids: Int[Array, "batch time"],
        attention_mask: Int[Array, "batch time"] | None = None,
        speaker_id: int | Int[Array, " batch"] | None = None,
        *,
        speaking_rate: float | None = None,
        noise_scale: float | None = None,
        noise_scale_duration: float | None = None,
        durations: Float[Array, "batch time"] | None = None,
        duration_noise: Float[Array, "batch time 2"] | None = None,
        prior_noise: Float[Array, "batch frames latent"] | None = None,
        key: jax.Array | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
    ) -> VitsModelOutput:
        """Synthesise.

        How many frames come out depends on the durations. Eagerly they are looked at; inside `jax.jit` the shape must
        be known before, and is that of `prior_noise` (what is longer is cut, what is shorter is silent at the end).
        `Synthesizer` compiles both halves and needs no such thing.

        Args:
            input_ids: symbols.
            attention_mask: 1 for symbols, 0 for padding.
            speaker_id: a voice, or one for each item, of a model with several.
            speaking_rate: speed; 2 is twice as fast.
            noise_scale: standard deviation of z about its prior; 0 gives the same speech each time.
            noise_scale_duration: the same for the durations.
            durations: frames of each symbol, in place of predicted ones.
            duration_noise: standard normal values for the durations.
            prior_noise: standard normal values for z.
            key: source of what noise is not given; always the same one if there is none.
            output_attentions: also return the text encoder's attention weights.
            output_hidden_states: also return the outputs of its layers.

        Returns:
            `waveform`, `sequence_lengths` in samples, `spectrogram` (z) and `durations`.

        Raises:
            UsageError: inside `jax.jit`, if the number of frames is not known; for an unknown voice.
        """
        speaker = self.speaker_embedding(speaker_id)
        encoded, predicted = self.encode(
            input_ids,
            attention_mask,
            speaker,
            speaking_rate=speaking_rate,
            noise_scale_duration=noise_scale_duration,
            duration_noise=duration_noise,
            key=key,
        )
        if durations is None:
            durations = predicted
        durations = jnp.asarray(durations, predicted.dtype)
        if prior_noise is not None:
            frames = prior_noise.shape[1]
        elif isinstance(durations, jax.core.Tracer):
            raise UsageError(
                "The number of frames depends on the text, so inside jax.jit it must be given, as the length of "
                "prior_noise; audiozoo.decoding.synthesis.Synthesizer compiles synthesis for texts of any length."
            )
        else:
            frames = max(int(jnp.max(jnp.sum(durations, axis=-1))), 1)
        z, lengths = self.latents(
            encoded.prior_means,
            encoded.prior_log_variances,
            durations,
            speaker,
            frames=frames,
            noise_scale=noise_scale,
            prior_noise=prior_noise,
            key=key,
        )
        return VitsModelOutput(
            waveform=self.decode(z, lengths, speaker),
            sequence_lengths=lengths * self.config.hop_length,
            spectrogram=z,
            hidden_states=encoded.hidden_states if output_hidden_states else None,
            attentions=all_weights(encoded.attentions or ()) if output_attentions else None,
            durations=durations,
        )

    def voice_conversion(
        self,
        spectrogram: Float[Array, "batch frames bins"],
        source_id: int | Int[Array, " batch"],
        target_id: int | Int[Array, " batch"],
        *,
        lengths: Int[Array, " batch"] | None = None,
        noise_scale: float = 1.0,
        posterior_noise: Float[Array, "batch frames latent"] | None = None,
        key: jax.Array | None = None,
    ) -> VitsModelOutput:
        r"""The same speech in another voice (Appendix D, Eq. 12 to 14): $f^{-1}_{target}(f_{source}(z))$.

        For models with several voices: the text encoder, and so $f(z)$, knows none of them.

        Args:
            spectrogram: linear spectrogram of the source, as `hifigan.linear_spectrogram` makes it.
            source_id: its voice.
            target_id: the wanted voice.
            lengths: frames of each item.
            noise_scale: standard deviation of z about its posterior.
            posterior_noise: standard normal values for z.
            key: source of the noise, if it is not given.

        Raises:
            UsageError: if the model has one voice only, or no posterior encoder.
        """
        if self.config.num_speakers <= 1:
            raise UsageError("Voice conversion needs a model with several voices; this one has one.")
        self._needs_posterior("Voice conversion")
        batch, frames, _ = spectrogram.shape
        lengths = jnp.full((batch,), frames) if lengths is None else lengths
        mask = frame_mask(lengths, frames, spectrogram.dtype)
        if posterior_noise is None:
            posterior_noise = jax.random.normal(_key(key, 0), (batch, frames, self.config.flow_size), spectrogram.dtype)
        source, target = self.speaker_embedding(source_id), self.speaker_embedding(target_id)
        z, _, _ = self.posterior_encoder(spectrogram, mask, source, noise=posterior_noise * noise_scale)
        z = self.flow(self.flow(z, mask, source), mask, target, reverse=True) * mask
        waveform = self.decoder(z, target, lengths=lengths)
        return VitsModelOutput(waveform=waveform, sequence_lengths=lengths * self.config.hop_length, spectrogram=z)

    def _needs_posterior(self, what: str) -> None:
        if not self.config.has_posterior:
            raise UsageError(
                f"{what} needs the posterior encoder, which a file made for synthesis alone does not hold; "
                "load the training checkpoint instead."
            )

    def training_forward(
        self,
        input_ids: Int[Array, "batch time"],
        attention_mask: Int[Array, "batch time"],
        spectrogram: Float[Array, "batch frames bins"],
        spectrogram_lengths: Int[Array, " batch"],
        speaker_id: Int[Array, " batch"] | None = None,
        *,
        segment_frames: int = 32,
        key: jax.Array | None = None,
        posterior_noise: Float[Array, "batch frames latent"] | None = None,
        duration_noise: Float[Array, "batch time 2"] | None = None,
        segment_starts: Int[Array, " batch"] | None = None,
    ) -> VitsTrainingOutput:
        r"""The generator's forward in training (Figure 1a).

        Args:
            input_ids: symbols.
            attention_mask: 1 for symbols, 0 for padding.
            spectrogram: linear spectrogram of the recording, as `hifigan.linear_spectrogram` makes it.
            spectrogram_lengths: frames of each item; at least as many as its symbols, and as `segment_frames`.
            speaker_id: voice of each item.
            segment_frames: frames of the segment of z that is decoded (§2.1.2 and §3.3, windowed generator training).
            key: source of dropout, of the segments, and of what noise is not given; without it nothing is dropped.
            posterior_noise: standard normal values for z.
            duration_noise: standard normal values for the duration predictor's posterior.
            segment_starts: first frame of each item's segment.

        Raises:
            UsageError: if the model was loaded from a file made for synthesis alone.
        """
        self._needs_posterior("Training")
        config, (batch, frames, _) = self.config, spectrogram.shape
        keys = (None,) * 4 if key is None else tuple(jax.random.split(key, 4))
        dropout, dtype = Dropout(keys[0]), spectrogram.dtype
        if posterior_noise is None:
            posterior_noise = jax.random.normal(_key(keys[1], 0), (batch, frames, config.flow_size), dtype)
        if duration_noise is None:
            duration_noise = jax.random.normal(_key(keys[2], 1), (*input_ids.shape, 2), dtype)
        if segment_starts is None:
            room = spectrogram_lengths - segment_frames + 1
            segment_starts = jnp.floor(jax.random.uniform(_key(keys[3], 2), (batch,)) * room).astype(jnp.int32)
        speaker = self.speaker_embedding(speaker_id)
        mask = frame_mask(spectrogram_lengths, frames, dtype)
        symbols = jnp.asarray(attention_mask, dtype)[..., None]

        text = self.text_encoder(input_ids, symbols, dropout)
        z, _, posterior_log_deviations = self.posterior_encoder(
            spectrogram, mask, speaker, noise=posterior_noise, dropout=dropout
        )
        z_p = self.flow(z, mask, speaker, dropout=dropout)

        scores = log_likelihoods(*jax.lax.stop_gradient((z_p, text.prior_means, text.prior_log_variances)))
        symbol_counts = jnp.sum(attention_mask, axis=-1).astype(jnp.int32)
        alignment = monotonic_alignment(scores, spectrogram_lengths, symbol_counts)
        durations = jnp.sum(alignment, axis=1)[..., None]
        if isinstance(self.duration_predictor, VitsStochasticDurationPredictor):
            bound = self.duration_predictor.negative_log_likelihood(
                text.last_hidden_state, symbols, durations, speaker, noise=duration_noise, dropout=dropout
            )
            duration_loss = jnp.sum(bound) / jnp.sum(symbols)
        else:
            predicted = self.duration_predictor(text.last_hidden_state, symbols, speaker, dropout=dropout)
            target = jnp.log(durations + 1e-6) * symbols
            duration_loss = jnp.sum(jnp.square(predicted - target)) / jnp.sum(symbols)

        means = jnp.einsum("bft,btd->bfd", alignment, text.prior_means)
        log_deviations = jnp.einsum("bft,btd->bfd", alignment, text.prior_log_variances)
        waveform = self.decoder(slices(z, segment_starts, segment_frames), speaker)
        divergence = kl_loss(z_p, posterior_log_deviations, means, log_deviations, mask)
        return VitsTrainingOutput(waveform, segment_starts, duration_loss, divergence, alignment, z)


def _key(key: jax.Array | None, index: int) -> jax.Array:
    return jax.random.fold_in(jax.random.key(0) if key is None else key, index)


def slices(x: Float[Array, "batch time *rest"], starts: Int[Array, " batch"], size: int) -> jax.Array:
    """`size` steps of each item, from its own start."""
    return jax.vmap(lambda row, start: jax.lax.dynamic_slice_in_dim(row, start, size))(x, starts)


# --- losses and discriminator ----------------------------------------------------------------------------------------


def kl_loss(
    z_p: Float[Array, "batch frames latent"],
    posterior_log_deviations: Float[Array, "batch frames latent"],
    means: Float[Array, "batch frames latent"],
    log_deviations: Float[Array, "batch frames latent"],
    mask: Float[Array, "batch frames 1"],
) -> Float[Array, ""]:
    r"""$\log q_\phi(z \mid x) - \log p_\theta(z \mid c)$ (§2.1.3, Eq. 3), a frame.

    With $z = \mu_q + \sigma_q\epsilon$, $\log q$ is replaced by its mean $-\log\sigma_q - \tfrac12$; $\log p$ is taken
    at the sample, $f(z)$, whose flow keeps volumes.
    """
    divergence = log_deviations - posterior_log_deviations - 0.5
    divergence = divergence + 0.5 * jnp.square(z_p - means) * jnp.exp(-2.0 * log_deviations)
    return jnp.sum(divergence * mask) / jnp.sum(mask)


class VitsDiscriminator(nnx.Module):
    """HiFi-GAN's multi-period discriminator, joined by one that sees the waveform as it is (§2.5.4)."""

    def __init__(
        self,
        *,
        periods: tuple[int, ...] = (2, 3, 5, 7, 11),
        period_channels: tuple[int, ...] = (32, 128, 512, 1024, 1024),
        scale_layers: tuple[tuple[int, int, int, int], ...] = hifigan.VITS_SCALE_LAYERS,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        kwargs = _kwargs(dtype, param_dtype, rngs)
        self.discriminators = nnx.List(
            [
                ScaleDiscriminator(layers=scale_layers, **kwargs),
                *(PeriodDiscriminator(period, channels=period_channels, **kwargs) for period in periods),
            ]
        )

    def __call__(self, waveform: Float[Array, "batch time"]) -> tuple[list[jax.Array], list[hifigan.Features]]:
        """Scores and features of each sub-discriminator."""
        judged = [discriminator(waveform) for discriminator in self.discriminators]
        return [scores for scores, _ in judged], [features for _, features in judged]


class VitsLosses(ModelOutput):
    """The generator's loss and its parts (§2.4, Eq. 11); of them `mel` is before its weight of 45."""

    total: Float[Array, ""] = ABSENT
    mel: Float[Array, ""] = ABSENT
    kl: Float[Array, ""] = ABSENT
    duration: Float[Array, ""] = ABSENT
    adversarial: Float[Array, ""] = ABSENT
    features: Float[Array, ""] = ABSENT


class VitsBatch(ModelOutput):
    """A batch for training: symbols, and recordings of the same rate as the model's (§3.3)."""

    input_ids: Int[Array, "batch time"] = ABSENT
    attention_mask: Int[Array, "batch time"] = ABSENT
    waveform: Float[Array, "batch samples"] = ABSENT
    waveform_lengths: Int[Array, " batch"] = ABSENT
    speaker_id: Int[Array, " batch"] | None = None


def spectrogram_of(
    config: VitsConfig, waveform: Float[Array, "batch samples"], lengths: Int[Array, " batch"] | None = None
) -> Float[Array, "batch frames bins"]:
    r"""The posterior encoder's input (§3.2): $\sqrt{|X|^2 + 10^{-6}}$, a frame for each `hop_length` samples.

    With `lengths`, in samples, the last frames of a shorter item are those that it has by itself.
    """
    n_fft = 2 * (config.spectrogram_bins - 1)
    return hifigan.linear_spectrogram(waveform, n_fft, config.hop_length, epsilon=1e-6, lengths=lengths)


def generator_losses(
    model: VitsModel,
    discriminator: VitsDiscriminator,
    batch: VitsBatch,
    *,
    segment_frames: int = 32,
    num_mels: int = 80,
    mel_weight: float = 45.0,
    kl_weight: float = 1.0,
    **noise: Any,
) -> tuple[VitsLosses, VitsTrainingOutput, Float[Array, "batch samples"]]:
    r"""$L_{vae} = L_{recon} + L_{kl} + L_{dur} + L_{adv}(G) + L_{fm}(G)$ (§2.4, Eq. 11).

    Args:
        model: the generator.
        discriminator: its judge, held fixed.
        batch: symbols and recordings.
        segment_frames: frames that are decoded.
        num_mels: bands of the reconstruction loss.
        mel_weight: $\lambda_{recon}$.
        kl_weight: $\lambda_{kl}$.
        **noise: `key`, or the noises, of `VitsModel.training_forward`.

    Returns:
        The losses, the forward's output and the recording's segments.
    """
    config, hop = model.config, model.config.hop_length
    spectrogram = spectrogram_of(config, batch.waveform, batch.waveform_lengths)
    output = model.training_forward(
        batch.input_ids,
        batch.attention_mask,
        spectrogram,
        batch.waveform_lengths // hop,
        batch.speaker_id,
        segment_frames=segment_frames,
        **noise,
    )
    real = slices(batch.waveform, output.segment_starts * hop, segment_frames * hop)
    to_mel = partial(hifigan.mel_of_spectrogram, sampling_rate=config.sampling_rate, num_mels=num_mels)
    target = to_mel(slices(spectrogram, output.segment_starts, segment_frames))
    # L_recon = |x_mel - x̂_mel|₁ (Eq. 2)
    mel = jnp.mean(jnp.abs(target - to_mel(spectrogram_of(config, output.waveform))))
    _, real_features = discriminator(real)
    scores, features = discriminator(output.waveform)
    adversarial, matching = hifigan.generator_loss(scores), hifigan.feature_loss(real_features, features)
    total = adversarial + matching + mel_weight * mel + output.duration_loss + kl_weight * output.kl_loss
    losses = VitsLosses(total, mel, output.kl_loss, output.duration_loss, adversarial, matching)
    return losses, output, real


def discriminator_losses(
    discriminator: VitsDiscriminator,
    real: Float[Array, "batch samples"],
    generated: Float[Array, "batch samples"],
) -> Float[Array, ""]:
    r"""$L_{adv}(D)$ (§2.3, Eq. 8); no gradient goes back into `generated`."""
    scores, _ = discriminator(real)
    judged, _ = discriminator(jax.lax.stop_gradient(generated))
    return hifigan.discriminator_loss(scores, judged)
