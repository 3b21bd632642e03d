r"""# CLAP: Large-Scale Contrastive Language-Audio Pretraining with Feature Fusion and Keyword-to-Caption Augmentation

Yusong Wu, Ke Chen, Tianyu Zhang, Yuchen Hui, Marianna Nezhurina, Taylor Berg-Kirkpatrick, Shlomo Dubnov, 2022, arXiv
2211.06687. Its audio encoder is HTSAT: Ke Chen, Xingjian Du, Bilei Zhu, Zejun Ma, Taylor Berg-Kirkpatrick, Shlomo
Dubnov, 2022, arXiv 2202.00874.

A sound and its description are pulled to the same place on a sphere, a sound and another's description apart. Then any
list of words is a classifier, and any sentence finds sounds. The sound tower is a Swin Transformer over a log-mel
spectrogram that is cut into four quarters laid one under the other; what is longer than 10 s is seen as a whole,
shrunk, and through three windows, fused by attention.

    waveform 48 kHz ── log-mel dB, 10 ms hop ──> (1001, 64), or 4 × that ── BatchNorm ── bicubic ──> (1024, 64)
      ── four quarters of time over each other ──> (256, 256) ── Conv 4 × 4 ──> 64 × 64 patches
      ── [fused with the three windows' patches] ── 4 Swin stages ── LN ──> 8 × 8 patches ── mean ──> (d_a,)
      ── Linear, ReLU, Linear ──> (512,) ── / norm ──┐
                                                     ├── · ── × e^s ──> logits
    text ── RoBERTa ── pooler ──> (768,) ── Linear, ReLU, Linear ──> (512,) ── / norm ──┘

| paper | here |
| --- | --- |
| §3.1, Eq. 1 and 2, encoders and their projections | `ClapAudioModel`, `RobertaModel`, `ClapProjectionLayer` |
| the same, one of the two alone | `ClapTextModelWithProjection`, `ClapAudioModelWithProjection` |
| §3.1, Eq. 3, contrastive loss | `contrastive_loss`, `ClapModel` |
| HTSAT §2.1, patch embedding, group Swin Transformer | `fold`, `ClapAudioPatchEmbed`, `Conv2d`, `ClapAudioEncoder` |
| HTSAT §2.2, token-semantic module, framewise output | `ClapTaggingHead`, `ClapAudioModel.tag`, `tagging_loss` |
| §3.4, feature fusion for variable-length input | `FeatureFusion`, `MelFusion` |
| §3.4, attentional (arXiv 2009.14082) | `AttentionalFusion`, `PointwiseAttention` |
| §2, label template (§3.5's captions improve on it) | `caption_of_labels` |
| §4.2 and §4.3, retrieval and zero-shot classification | `embed_audio`, `embed_text`, `sentences`, `zero_shot` |
| §4.1, Adam, warm-up and cosine decay | `ClapRecipe` |
| §4.3, supervised classification on what is heard | `LinearProbe`, `fit_probe` |
| not in the paper; in the released code: a loss of four terms | `EmbeddingMLP`, `mlp_contrastive_loss` |
| the same: scales that are kept in bounds, frames and bands hidden in training | `clamp_logit_scales`, `drop_stripes` |

Three things differ from `transformers` on purpose; a test shows both sides of each. Its loss takes the cross-entropy of
`logits_per_audio` transposed, hence asks twice which sound a text belongs to and never which text a sound; here Eq. 3
is taken in both directions. Its extractor says of one item drawn at random that it is longer than 10 s when none is,
hence gives the same sound another embedding in every batch; here such an item is not fused, as in the released
evaluation code. And it knows one way of fusing, `aff_2d`; here are all of the released code: `daf`, `aff` and `iaff`,
on spectrograms (`_1d`) or patches (`_2d`), and `channel_map`.

Checkpoints: `laion/clap-htsat-{unfused,fused}`, `laion/larger_clap_{general,music,music_and_speech}`; LAION's own
`630k-best.pt`, `630k-audioset-best.pt`, `630k-fusion-best.pt`, `630k-audioset-fusion-best.pt` and
`music_*.pt`, which also hold the tagging head (`tag`).

    import audiozoo
    from audiozoo.models.clap import zero_shot
    model = audiozoo.load("laion/clap-htsat-unfused")
    processor = audiozoo.load_processor("laion/clap-htsat-unfused")
    sound = audiozoo.audio.read("dog.wav", sampling_rate=48_000)
    for label, score in zero_shot(model, processor, sound, ["a dog", "a vacuum cleaner"]):
        print(f"{score:.2f} {label}")
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from audiozoo.audio.features import covering
from audiozoo.audio.files import check_waveform
from audiozoo.configs import restore_parts
from audiozoo.errors import UsageError
from audiozoo.layers import Conv1d, Dropout, LayerNorm, Linear, activation, promote
from audiozoo.layers.basic import at_least_float32, spread, unit_vectors
from audiozoo.layers.batch_norm import BatchNorm
from audiozoo.layers.losses import cross_entropy
from audiozoo.models.roberta import RobertaConfig, RobertaModel
from audiozoo.models.swin import SwinStage
from audiozoo.outputs import ABSENT, BaseModelOutputWithPooling, ModelOutput

FUSIONS = ("daf_1d", "aff_1d", "iaff_1d", "daf_2d", "aff_2d", "iaff_2d", "channel_map")
AUDIOSET_LABELS = 527
LARGEST_LOGIT_SCALE = math.log(100.0)
PROMPT = "This is a sound of {}."


@dataclass(frozen=True)
class ClapAudioConfig:
    """Sizes of HTSAT: HTSAT §3.1; the defaults are those of HTSAT-tiny, CLAP's usual sound tower."""

    window_size: int = 8  # patches along a side of an attention window
    num_mel_bins: int = 64  # mel bands
    spec_size: int = 256  # rows and columns of the folded spectrogram
    hidden_act: str = "gelu"  # of the MLPs
    patch_size: tuple[int, int] = (4, 4)  # rows and columns under a patch
    patch_stride: tuple[int, int] = (4, 4)  # rows and columns between patches
    num_classes: int = AUDIOSET_LABELS  # sounds that the tagging head knows
    hidden_size: int = 768  # width of the pooled output: patch_embeds_hidden_size, doubled at each merging
    depths: tuple[int, ...] = (2, 2, 6, 2)  # blocks of each stage
    num_attention_heads: tuple[int, ...] = (4, 8, 16, 32)  # of each stage
    enable_fusion: bool = False  # whether the model sees what is longer than 10 s through four spectrograms
    fusion_type: str | None = None  # one of `FUSIONS`; aff_2d where a model that fuses does not say
    patch_embeds_hidden_size: int = 96  # width of the first stage
    enable_patch_layer_norm: bool = True  # whether patches are normalised before the first stage
    hidden_dropout_prob: float = 0.1  # after the MLPs
    attention_probs_dropout_prob: float = 0.0  # on attention weights and after attention
    drop_path_rate: float = 0.0  # stochastic depth of the last block; it rises linearly from 0 at the first
    qkv_bias: bool = True  # whether queries, keys and values have biases
    mlp_ratio: float = 4.0  # how much wider the MLP is
    aff_block_r: int = 4  # how much narrower the fusion's attention is
    layer_norm_eps: float = 1e-5  # of the blocks' LayerNorms
    tagging_head: bool = False  # whether the token-semantic head is there; Hugging Face's files lack it
    spec_augment: bool = False  # whether training hides frames and bands, `drop_stripes`; LAION's code does

    def __post_init__(self) -> None:
        if self.enable_fusion and self.fusion not in FUSIONS:
            raise UsageError(f"There is no fusion named {self.fusion_type!r}; there are {', '.join(FUSIONS)}.")
        width = self.patch_embeds_hidden_size * 2 ** (len(self.depths) - 1)
        if self.hidden_size != width:
            raise UsageError(
                f"hidden_size is {self.hidden_size}; {len(self.depths)} stages that begin at a width of "
                f"{self.patch_embeds_hidden_size} end at {width}."
            )
        if len(self.depths) != len(self.num_attention_heads):
            raise UsageError(
                f"There are {len(self.depths)} depths and {len(self.num_attention_heads)} counts of heads."
            )
        last = -(-self.grid[0] // 2 ** (len(self.depths) - 1))  # rows of patches in the last stage
        if not self.ratio or self.spec_size % self.ratio or last % self.ratio:
            raise UsageError(
                f"A spectrogram of {self.num_mel_bins} bands does not fold into {self.spec_size} rows whose patches, "
                f"{last} rows of them in the last stage, divide into as many pieces."
            )

    @property
    def fusion(self) -> str | None:
        """How the four spectrograms are fused, or None."""
        return (self.fusion_type or "aff_2d") if self.enable_fusion else None

    @property
    def ratio(self) -> int:
        """Quarters of time that are laid over each other."""
        return self.spec_size // self.num_mel_bins

    @property
    def frames(self) -> int:
        """Frames of the unfolded spectrogram; shorter ones are stretched to it."""
        return self.spec_size * self.ratio

    @property
    def grid(self) -> tuple[int, int]:
        """Patches over rows and columns in the first stage."""
        return self.spec_size // self.patch_stride[0], self.spec_size // self.patch_stride[1]

    @property
    def framewise_repeats(self) -> int:
        """Input frames under one patch of the last stage, which the framewise output repeats."""
        return 2 ** (len(self.depths) - 1) * self.patch_stride[1]

    @classmethod
    def tiny(cls, **changes: Any) -> ClapAudioConfig:
        """HTSAT-tiny, the sizes of HTSAT §3.1: 27.5 M parameters."""
        return cls(**changes)

    @classmethod
    def base(cls, **changes: Any) -> ClapAudioConfig:
        """Not in the paper; in the released checkpoints (`HTSAT-base`): wider and deeper."""
        return cls(hidden_size=1024, patch_embeds_hidden_size=128, depths=(2, 2, 12, 2), **changes)

    @classmethod
    def large(cls, **changes: Any) -> ClapAudioConfig:
        """Not in the paper; in the released code (`HTSAT-large`)."""
        return cls(hidden_size=2048, patch_embeds_hidden_size=256, depths=(2, 2, 12, 2), **changes)


_TEXT = RobertaConfig(layer_norm_eps=1e-12)


@dataclass(frozen=True)
class ClapConfig:
    """Sizes of both towers, §3.3 and §4.1; the defaults are those of `laion/clap-htsat-unfused`."""

    text_config: RobertaConfig = field(default=_TEXT)  # the text tower
    audio_config: ClapAudioConfig = field(default_factory=ClapAudioConfig)  # the sound tower
    projection_dim: int = 512  # width of the embeddings
    projection_hidden_act: str = "relu"  # of the projections
    logit_scale_init_value: float = 1 / 0.07  # $1/\tau$ to start from
    embedding_mlps: bool = False  # whether the MLPs of `mlp_contrastive_loss` are there; Hugging Face's files lack them

    def __post_init__(self) -> None:
        restore_parts(self, text_config=RobertaConfig, audio_config=ClapAudioConfig)

    @property
    def text_length(self) -> int:
        """Tokens that a text is cut to: 77 in the released code, in training and in use, where there are positions."""
        return min(77, self.text_config.longest_text)

    @classmethod
    def htsat_unfused(cls) -> ClapConfig:
        """§4.1, HTSAT-tiny and RoBERTa: 153.5 M parameters."""
        return cls()

    @classmethod
    def htsat_fused(cls) -> ClapConfig:
        """§3.4, the same with feature fusion."""
        return cls(audio_config=ClapAudioConfig.tiny(enable_fusion=True, fusion_type="aff_2d"))

    @classmethod
    def larger(cls) -> ClapConfig:
        """Not in the paper; in the released checkpoints (`larger_clap_*`): HTSAT-base."""
        return cls(audio_config=ClapAudioConfig.base())

    @classmethod
    def largest(cls) -> ClapConfig:
        """Not in the paper; in the released code: HTSAT-large, which has no published weights."""
        return cls(audio_config=ClapAudioConfig.large())


# --- what models return ----------------------------------------------------------------------------------------------


class ClapOutput(ModelOutput):
    """What `ClapModel` returns: embeddings on the sphere, §3.1, their scaled products, and the loss, Eq. 3."""

    loss: Float[Array, ""] | None = None
    logits_per_audio: Float[Array, "sounds texts"] = ABSENT
    logits_per_text: Float[Array, "texts sounds"] = ABSENT
    text_embeds: Float[Array, "texts dim"] = ABSENT
    audio_embeds: Float[Array, "sounds dim"] = ABSENT
    text_model_output: BaseModelOutputWithPooling = ABSENT
    audio_model_output: BaseModelOutputWithPooling = ABSENT


class ClapTextModelOutput(ModelOutput):
    """What the text tower returns, §3.1; `text_embeds` are not normalised, as in `transformers`."""

    text_embeds: Float[Array, "texts dim"] = ABSENT
    last_hidden_state: Float[Array, "texts time hidden"] = ABSENT
    hidden_states: tuple[Float[Array, "texts time hidden"], ...] | None = None
    attentions: tuple[Float[Array, "texts heads time time"], ...] | None = None


class ClapAudioModelOutput(ModelOutput):
    """What the sound tower returns, §3.1; `audio_embeds` are not normalised, as in `transformers`."""

    audio_embeds: Float[Array, "sounds dim"] = ABSENT
    last_hidden_state: Float[Array, "sounds hidden bands frames"] = ABSENT
    hidden_states: tuple[Float[Array, "sounds hidden rows columns"], ...] | None = None
    attentions: tuple[Float[Array, "windows heads patches patches"], ...] | None = None


class ClapTaggingOutput(ModelOutput):
    """What the token-semantic head returns, HTSAT §2.2: what is heard, in the whole and at each frame."""

    logits: Float[Array, "sounds classes"] = ABSENT
    clipwise_output: Float[Array, "sounds classes"] = ABSENT
    framewise_output: Float[Array, "sounds frames classes"] = ABSENT
    fine_grained_embedding: Float[Array, "sounds frames hidden"] = ABSENT
    embedding: Float[Array, "sounds hidden"] = ABSENT


# --- from a spectrogram to an image, HTSAT §2.1 ----------------------------------------------------------------------


def cubic_weights(outputs: int, inputs: int) -> tuple[Int[np.ndarray, "4 outputs"], Float[np.ndarray, "4 outputs"]]:
    r"""Not in the paper; in the released code: which four inputs make each output of a cubic interpolation.

    Ends meet ends: output $i$ lies at $i\,(n - 1)/(m - 1)$, which `jax.image.resize` does not offer, and the kernel is
    Keys' with $a = -3/4$, not -1/2. Inputs beyond the ends repeat the last.

    Args:
        outputs: $m$.
        inputs: $n$.

    Returns:
        Indices and weights.
    """
    at = np.arange(outputs) * ((inputs - 1) / (outputs - 1) if outputs > 1 else 0.0)
    low = np.floor(at).astype(int)
    t, a = at - low, -0.75

    def near(x: np.ndarray) -> np.ndarray:  # |x| <= 1
        return ((a + 2) * x - (a + 3)) * x * x + 1

    def far(x: np.ndarray) -> np.ndarray:  # 1 < |x| < 2
        return ((a * x - 5 * a) * x + 8 * a) * x - 4 * a

    weights = np.stack([far(t + 1), near(t), near(1 - t), far(2 - t)])
    return np.clip(low + np.arange(-1, 3)[:, None], 0, inputs - 1), weights


def resize_cubic(x: Float[Array, "*shape"], length: int, axis: int) -> Float[Array, "*new_shape"]:
    """One axis stretched to `length` by `cubic_weights`."""
    if x.shape[axis] == length:
        return x
    indices, weights = cubic_weights(length, x.shape[axis])
    shape = [1] * x.ndim
    shape[axis] = length
    parts = [
        jnp.take(x, index, axis=axis) * jnp.asarray(weight, x.dtype).reshape(shape)
        for index, weight in zip(indices, weights, strict=True)
    ]
    return sum(parts[1:], parts[0])


def fold(x: Float[Array, "*batch frames mels"], config: ClapAudioConfig) -> Float[Array, "*batch rows columns"]:
    """HTSAT §2.1: a long narrow spectrogram as a square: stretched, cut along time, and the pieces laid in rows.

    Row `q * mels + m` holds band `m` during piece `q`.

    Raises:
        UsageError: if it is longer or has more bands than the model.
    """
    frames, mels = x.shape[-2:]
    if frames > config.frames or mels > config.num_mel_bins:
        raise UsageError(
            f"The spectrogram has {frames} frames and {mels} mel bands; this model takes at most {config.frames} and "
            f"{config.num_mel_bins}."
        )
    x = resize_cubic(resize_cubic(x, config.frames, x.ndim - 2), config.spec_size // config.ratio, x.ndim - 1)
    x = x.reshape(*x.shape[:-2], config.ratio, config.frames // config.ratio, x.shape[-1])
    return x.swapaxes(-1, -2).reshape(*x.shape[:-3], config.spec_size, config.frames // config.ratio)


# --- feature fusion, §3.4 --------------------------------------------------------------------------------------------


class PointwiseAttention(nnx.Module):
    """§3.4, one branch of attentional feature fusion (arXiv 2009.14082): narrow, normalise, widen, normalise."""

    def __init__(self, channels: int, narrow: int, **kwargs: Any):
        self.conv1, self.norm1 = Linear(channels, narrow, **kwargs), BatchNorm(narrow, **kwargs)
        self.conv2, self.norm2 = Linear(narrow, channels, **kwargs), BatchNorm(channels, **kwargs)

    def __call__(
        self, x: Float[Array, "batch places channels"], train: bool, mask: Bool[Array, " batch"]
    ) -> Float[Array, "batch places channels"]:
        """Each place by itself; only the masked items count in a batch's statistics."""
        return self.norm2(self.conv2(jax.nn.relu(self.norm1(self.conv1(x), train, mask))), train, mask)


class AttentionalFusion(nnx.Module):
    r"""§3.4, attentional feature fusion (AFF, arXiv 2009.14082) and its iterative kind (iAFF).

    $F = 2\,(\alpha X + (1 - \alpha) Y)$ with $\alpha = \sigma(L(X + Y) + G(X + Y))$, where $L$ looks at each place and
    $G$ at their mean. The iterative kind drops the factor 2 and computes $\alpha$ anew from its own first result, with
    a second $L$; the released code takes the first $G$ again, and so does this.
    """

    def __init__(self, channels: int, ratio: int, iterative: bool, **kwargs: Any):
        self.local_att = PointwiseAttention(channels, channels // ratio, **kwargs)
        self.global_att = PointwiseAttention(channels, channels // ratio, **kwargs)
        self.local_att2 = PointwiseAttention(channels, channels // ratio, **kwargs) if iterative else None

    def __call__(
        self,
        x: Float[Array, "batch places channels"],
        residual: Float[Array, "batch places channels"],
        train: bool,
        mask: Bool[Array, " batch"],
    ) -> Float[Array, "batch places channels"]:
        r"""$X$ and $Y$ fused."""

        def weight(local: PointwiseAttention, both: jax.Array) -> jax.Array:
            whole = self.global_att(both.mean(axis=1, keepdims=True), train, mask)
            near = local(both, train, mask)
            return jax.nn.sigmoid(near + spread(whole, near))

        alpha = weight(self.local_att, x + residual)
        if self.local_att2 is None:
            return 2 * x * alpha + 2 * residual * (1 - alpha)
        alpha = weight(self.local_att2, x * alpha + residual * (1 - alpha))
        return x * alpha + residual * (1 - alpha)


class FeatureFusion(nnx.Module):
    """§3.4: fuse the whole sound with its windows, for the items that are longer; the others stay as they are."""

    def __init__(self, kind: str, channels: int, ratio: int, **kwargs: Any):
        self.attention = None if kind == "daf" else AttentionalFusion(channels, ratio, kind == "iaff", **kwargs)

    def __call__(
        self,
        x: Float[Array, "batch places channels"],
        windows: Float[Array, "batch places channels"],
        is_longer: Bool[Array, " batch"],
        train: bool,
    ) -> Float[Array, "batch places channels"]:
        """`x` is the shrunk whole, `windows` the three windows end to end."""
        fused = x + windows if self.attention is None else self.attention(x, windows, train, is_longer)
        return jnp.where(is_longer[:, None, None], fused, x)


def _to_length(x: jax.Array, length: int, axis: int) -> jax.Array:
    """Cut, or zeros appended."""
    x = jax.lax.slice_in_dim(x, 0, min(length, x.shape[axis]), axis=axis)
    return jnp.pad(x, [(0, length - x.shape[axis] if i == axis % x.ndim else 0) for i in range(x.ndim)])


class Conv2d(nnx.Module):
    """HTSAT §2.1, patch projection: a strided convolution of rows and columns."""

    def __init__(
        self,
        channels: int,
        features: int,
        size: tuple[int, int],
        stride: tuple[int, int],
        padding: tuple[tuple[int, int], tuple[int, int]],
        *,
        dtype: Any,
        param_dtype: Any,
        rngs: nnx.Rngs,
    ):
        bound = (size[0] * size[1] * channels) ** -0.5
        shape = (*size, channels, features)
        self.kernel = nnx.Param(jax.random.uniform(rngs.params(), shape, param_dtype, -bound, bound))
        self.bias = nnx.Param(jax.random.uniform(rngs.params(), (features,), param_dtype, -bound, bound))
        self.stride, self.padding, self.dtype = stride, padding, dtype

    def __call__(self, x: Float[Array, "batch rows columns channels"]) -> Float[Array, "batch r c features"]:
        """Convolve; a kernel that tiles its input is a plain product with its tiles, which is faster on a CPU."""
        bias = self.bias[...]
        x, kernel, _ = promote(x, self.kernel[...], bias, dtype=self.dtype)
        (high, wide), channels = kernel.shape[:2], x.shape[-1]
        if self.stride == (high, wide) and not any(more for side in self.padding for more in side):
            rows, columns = x.shape[1] // high, x.shape[2] // wide
            tiles = x[:, : rows * high, : columns * wide].reshape(-1, rows, high, columns, wide, channels)
            tiles = tiles.swapaxes(2, 3).reshape(-1, rows, columns, high * wide * channels)
            y = tiles @ kernel.reshape(high * wide * channels, -1)
        else:
            y = jax.lax.conv_general_dilated(
                x, kernel, self.stride, self.padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
        return y + spread(bias, y)


class ClapAudioPatchEmbed(nnx.Module):
    """HTSAT §2.1, patch embedding, and §3.4, fusion of patches."""

    def __init__(self, config: ClapAudioConfig, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs):
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        (high, wide), stride = config.patch_size, config.patch_stride
        more = ((high - stride[0]) // 2, (wide - stride[1]) // 2)
        padding = ((more[0], more[0]), (more[1], more[1]))
        width, self.fusion = config.patch_embeds_hidden_size, config.fusion
        self.proj = Conv2d(4 if self.fusion == "channel_map" else 1, width, (high, wide), stride, padding, **kwargs)
        self.norm = LayerNorm(width, **kwargs) if config.enable_patch_layer_norm else None
        kind, dimension = (self.fusion or "none_").rsplit("_", 1)
        local: tuple[Any, ...] = ((high, 3 * wide), (stride[0], 3 * stride[1]), padding)
        self.mel_conv2d = Conv2d(1, width, *local, **kwargs) if dimension == "2d" else None
        self.fusion_model = FeatureFusion(kind, width, config.aff_block_r, **kwargs) if dimension == "2d" else None

    def __call__(
        self,
        images: Float[Array, "batch views rows columns"],
        is_longer: Bool[Array, " batch"] | None = None,
        train: bool = False,
    ) -> Float[Array, "batch patch_rows patch_columns width"]:
        """Cut into patches.

        Args:
            images: folded spectrograms, one view or four.
            is_longer: items whose views are fused.
            train: whether batches are normalised by their own statistics.
        """
        if self.fusion == "channel_map":
            x = self.proj(jnp.moveaxis(images, 1, -1))
        else:
            x = self.proj(images[:, 0, :, :, None])
        if self.mel_conv2d is not None and self.fusion_model is not None and is_longer is not None:
            batch, rows, columns, width = x.shape
            views = images[:, 1:]
            local = self.mel_conv2d(views.reshape(-1, *views.shape[2:], 1))
            local = local.reshape(batch, views.shape[1], *local.shape[1:]).swapaxes(1, 2)
            local = _to_length(local.reshape(batch, rows, -1, width), columns, 2)  # windows end to end along time
            flat = (batch, rows * columns, width)
            x = self.fusion_model(x.reshape(flat), local.reshape(flat), is_longer, train).reshape(x.shape)
        return x if self.norm is None else self.norm(x)


class MelFusion(nnx.Module):
    """§3.4, fusion of spectrograms (`_1d`): the windows' frames, thinned three times, against the shrunk whole."""

    def __init__(self, config: ClapAudioConfig, **kwargs: Any):
        mels, kind = config.num_mel_bins, str(config.fusion).removesuffix("_1d")
        self.mel_conv1d = Conv1d(mels, mels, 5, stride=3, padding=2, **kwargs)
        self.norm = BatchNorm(mels, **kwargs)
        self.fusion_model = FeatureFusion(kind, mels, 4, **kwargs)

    def __call__(
        self, x: Float[Array, "batch views frames mels"], is_longer: Bool[Array, " batch"], train: bool = False
    ) -> Float[Array, "batch 1 frames mels"]:
        """One spectrogram of four."""
        batch, _, frames, mels = x.shape
        local = self.mel_conv1d(x[:, 1:].reshape(-1, frames, mels))
        local = self.norm(local, train, jnp.repeat(is_longer, x.shape[1] - 1))
        local = _to_length(local.reshape(batch, -1, mels), frames, 1)
        return self.fusion_model(x[:, 0], local, is_longer, train)[:, None]


# --- the sound tower, HTSAT -------------------------------------------------------------------------------------------


class ClapTaggingHead(nnx.Module):
    """HTSAT §2.2 and Figure 1, token-semantic module: a convolution over the last patches, all bands at once."""

    def __init__(self, config: ClapAudioConfig, **kwargs: Any):
        bands = config.grid[0] // 2 ** (len(config.depths) - 1) // config.ratio
        padding = ((0, 0), (1, 1))
        self.tscam_conv = Conv2d(config.hidden_size, config.num_classes, (bands, 3), (1, 1), padding, **kwargs)

    def __call__(self, x: Float[Array, "batch bands frames hidden"]) -> Float[Array, "batch frames classes"]:
        """Logits of each class at each of the last stage's frames."""
        return self.tscam_conv(x)[:, 0]


def drop_stripes(
    x: Float[Array, "batch views frames mels"], key: jax.Array, axis: int, widest: int, count: int = 2
) -> Float[Array, "batch views frames mels"]:
    """Not in the paper; in the released code: some spans of frames (`axis` 2) or bands (3) are 0, others for each item.

    Args:
        x: spectrograms whose bands are normalised, so that 0 is their mean.
        key: of the draw.
        axis: 2 or 3.
        widest: a span is shorter than that.
        count: spans, which may overlap.
    """
    batch, length = x.shape[0], x.shape[axis]
    of_widths, of_starts = jax.random.split(key)
    widths = jax.random.randint(of_widths, (batch, count, 1), 0, min(widest, length))
    starts = (jax.random.uniform(of_starts, (batch, count, 1)) * (length - widths)).astype(jnp.int32)
    at = jnp.arange(length)
    hidden = ((at >= starts) & (at < starts + widths)).any(axis=1)  # (batch, length)
    shape = [batch, 1, 1, 1]
    shape[axis] = length
    return jnp.where(hidden.reshape(shape), jnp.zeros((), x.dtype), x)


class ClapAudioEncoder(nnx.Module):
    """HTSAT §2.1 and Figure 1: batch normalisation of each band, folding, patches, four Swin stages, LayerNorm."""

    def __init__(self, config: ClapAudioConfig, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        stages = len(config.depths)
        self.batch_norm = BatchNorm(config.num_mel_bins, dtype=dtype, param_dtype=param_dtype)
        fuses_mels = config.fusion is not None and config.fusion.endswith("_1d")
        self.mel_fusion = MelFusion(config, **kwargs) if fuses_mels else None
        self.patch_embed = ClapAudioPatchEmbed(config, **kwargs)
        rates = np.linspace(0.0, config.drop_path_rate, sum(config.depths))
        starts = np.cumsum((0, *config.depths))
        self.layers = nnx.List(
            [
                SwinStage(
                    config.patch_embeds_hidden_size * 2**i,
                    (config.grid[0] // 2**i, config.grid[1] // 2**i),
                    config.depths[i],
                    config.num_attention_heads[i],
                    config.window_size,
                    downsample=i < stages - 1,
                    drop_path_rates=tuple(float(rate) for rate in rates[starts[i] : starts[i + 1]]),
                    mlp_ratio=config.mlp_ratio,
                    hidden_act=config.hidden_act,
                    qkv_bias=config.qkv_bias,
                    dropout=config.hidden_dropout_prob,
                    attention_dropout=config.attention_probs_dropout_prob,
                    epsilon=config.layer_norm_eps,
                    **kwargs,
                )
                for i in range(stages)
            ]
        )
        self.norm = LayerNorm(config.hidden_size, **kwargs)
        self.config = config

    def __call__(
        self,
        input_features: Float[Array, "batch views frames mels"],
        is_longer: Bool[Array, "batch 1"] | None = None,
        *,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        key: jax.Array | None = None,
    ) -> BaseModelOutputWithPooling:
        """Encode spectrograms; see `ClapAudioModel`."""
        config, train = self.config, key is not None
        dropout = Dropout(key)
        views = 4 if config.enable_fusion else 1
        shape = input_features.shape
        if len(shape) != 4 or shape[1::2] != (views, config.num_mel_bins) or 0 in shape:
            raise UsageError(
                f"The features have shape {tuple(shape)}; this model takes (batch, {views}, frames, "
                f"{config.num_mel_bins}), at least one of each."
            )
        if config.enable_fusion and is_longer is None:
            raise UsageError("This model fuses features: tell it with is_longer, (batch, 1), which items are longer.")
        longer = None if is_longer is None else jnp.asarray(is_longer).reshape(-1).astype(bool)
        if longer is not None and len(longer) != shape[0]:
            raise UsageError(f"is_longer speaks of {len(longer)} items; there are {shape[0]}.")
        x = self.batch_norm(input_features, train)
        if self.mel_fusion is not None and longer is not None:
            x = self.mel_fusion(x, longer, train)
        if config.spec_augment and (augmenting := dropout.next_key()) is not None:
            frames, bands = jax.random.split(augmenting)
            x = drop_stripes(drop_stripes(x, frames, 2, 64), bands, 3, 8)
        x = self.patch_embed(fold(x, config), longer, train)
        hidden_states: list[Any] = [x]
        attentions: list[Any] = []
        for stage in self.layers:
            x, _, weights = stage(x, dropout)
            hidden_states.append(x)
            attentions.append(weights)
        x = self.norm(x)
        # HTSAT §2.1, the quarters side by side again: (batch, quarters * bands, time) -> (batch, bands, all of time).
        batch, rows, columns, width = x.shape
        x = x.reshape(batch, config.ratio, rows // config.ratio, columns, width).swapaxes(1, 2)
        x = x.reshape(batch, rows // config.ratio, config.ratio * columns, width)
        return BaseModelOutputWithPooling(
            last_hidden_state=jnp.moveaxis(x, -1, 1),
            pooler_output=x.mean(axis=(1, 2)),
            hidden_states=tuple(jnp.moveaxis(h, -1, 1) for h in hidden_states) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )


class ClapAudioModel(nnx.Module):
    """HTSAT, Figure 1: the encoder and, where the checkpoint has it, the token-semantic head."""

    def __init__(self, config: ClapAudioConfig, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.audio_encoder = ClapAudioEncoder(config, **kwargs)
        self.tagging_head = ClapTaggingHead(config, **kwargs) if config.tagging_head else None
        self.config, self.dtype = config, dtype

    def __call__(
        self,
        input_features: Float[Array, "batch views frames mels"],
        is_longer: Bool[Array, "batch 1"] | None = None,
        *,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        key: jax.Array | None = None,
    ) -> BaseModelOutputWithPooling:
        """Encode spectrograms.

        Args:
            input_features: log-mel spectrograms in dB as the processor gives them; four views for a model that fuses.
            is_longer: which items are longer than the model's 10 s, so that their views are fused.
            output_attentions: return the attention weights of each stage's last block.
            output_hidden_states: return the patches and every stage's output, `(batch, channels, rows, columns)`.
            key: switches dropout and stochastic depth on, and batches normalised by their own statistics.

        Returns:
            `last_hidden_state` `(batch, hidden_size, bands, frames)` and `pooler_output` `(batch, hidden_size)`.

        Raises:
            UsageError: for features of another shape than the model's, or a missing `is_longer`.
        """
        return self.audio_encoder(
            input_features,
            is_longer,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            key=key,
        )

    def tag(
        self,
        input_features: Float[Array, "batch views frames mels"],
        is_longer: Bool[Array, "batch 1"] | None = None,
        *,
        key: jax.Array | None = None,
    ) -> ClapTaggingOutput:
        """HTSAT §2.2: what is heard of AudioSet's 527 sounds, in the whole and over time.

        Frames are those of the folded spectrogram, `config.frames` for 10 s, about 9.8 ms each. Arguments as for the
        call.

        Raises:
            UsageError: if the checkpoint has no such head (Hugging Face's do not; LAION's `.pt` files do).
        """
        if self.tagging_head is None:
            raise UsageError("This checkpoint has no tagging head; LAION's own .pt files have one.")
        encoded = self.audio_encoder(input_features, is_longer, key=key)
        x = jnp.moveaxis(encoded.last_hidden_state, 1, -1)  # (batch, bands, frames, hidden)
        frames = self.tagging_head(x)
        logits, repeats = frames.mean(axis=1), self.config.framewise_repeats
        return ClapTaggingOutput(
            logits=logits,
            clipwise_output=jax.nn.sigmoid(logits),
            framewise_output=jnp.repeat(jax.nn.sigmoid(frames), repeats, axis=1),
            fine_grained_embedding=jnp.repeat(x.mean(axis=1), repeats, axis=1),
            embedding=encoded.pooler_output,
        )


def tagging_loss(logits: Float[Array, "batch classes"], targets: Float[Array, "batch classes"]) -> Float[Array, ""]:
    r"""HTSAT §2.2: binary cross-entropy of the whole sound's labels."""
    logits = at_least_float32(logits)
    return optax.sigmoid_binary_cross_entropy(logits, targets.astype(logits.dtype)).mean()


# --- both towers, §3.1 -----------------------------------------------------------------------------------------------


class ClapProjectionLayer(nnx.Module):
    r"""§3.1, Eq. 1 and 2: $E = \mathrm{MLP}(f(X))$, two layers into the common space."""

    def __init__(self, width: int, config: ClapConfig, **kwargs: Any):
        self.linear1 = Linear(width, config.projection_dim, **kwargs)
        self.linear2 = Linear(config.projection_dim, config.projection_dim, **kwargs)
        self.hidden_act = config.projection_hidden_act

    def __call__(self, x: Float[Array, "batch hidden"]) -> Float[Array, "batch dim"]:
        """Project."""
        return self.linear2(activation(self.hidden_act)(self.linear1(x)))


class EmbeddingMLP(nnx.Module):
    """Not in the paper; in the released checkpoints: two layers behind an embedding, for `mlp_contrastive_loss`."""

    def __init__(self, dim: int, **kwargs: Any):
        self.linear1 = Linear(dim, dim, **kwargs)
        self.linear2 = Linear(dim, dim, **kwargs)

    def __call__(self, x: Float[Array, "batch dim"], dropout: Dropout) -> Float[Array, "batch dim"]:
        """Linear, ReLU, dropout, Linear."""
        return self.linear2(dropout(jax.nn.relu(self.linear1(x)), 0.1))


def normalize(x: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
    r"""$x / \lVert x \rVert_2$; of zeros zeros, as in the released code (`transformers`: NaN)."""
    return unit_vectors(at_least_float32(x), shortest=1e-12).astype(x.dtype)


def _gathered(x: jax.Array, axis_name: str | None) -> jax.Array:
    return x if axis_name is None else jax.lax.all_gather(x, axis_name, tiled=True)


def _matching(logits: jax.Array, axis_name: str | None) -> jax.Array:
    r"""Mean of $-\log\operatorname{softmax}$ at each row's own partner, over all devices."""
    first = 0 if axis_name is None else jax.lax.axis_index(axis_name) * logits.shape[0]
    logits = at_least_float32(logits)
    own = jnp.take_along_axis(logits, (first + jnp.arange(logits.shape[0]))[:, None], axis=1)[:, 0]
    loss = (jax.nn.logsumexp(logits, axis=1) - own).mean()
    return loss if axis_name is None else jax.lax.pmean(loss, axis_name)


def contrastive_loss(
    audio_embeds: Float[Array, "pairs dim"],
    text_embeds: Float[Array, "pairs dim"],
    scale_audio: Float[Array, ""],
    scale_text: Float[Array, ""],
    axis_name: str | None = None,
) -> Float[Array, ""]:
    r"""§3.1, Eq. 3: each sound finds its text among all, and each text its sound.

    $$L = \frac{1}{2N} \sum_i \Bigl(-\log \frac{e^{E^a_i \cdot E^t_i / \tau}}{\sum_j e^{E^a_i \cdot E^t_j / \tau}}
          - \log \frac{e^{E^t_i \cdot E^a_i / \tau}}{\sum_j e^{E^t_i \cdot E^a_j / \tau}}\Bigr)$$

    A batch that is sharded over a mesh under `jax.jit` needs nothing more: XLA gathers. Inside `jax.shard_map`,
    `axis_name` names the axis over which the partners are gathered, with their gradients; every device then computes
    its own rows, and the mean over all devices is returned.

    Args:
        audio_embeds: $E^a$, of norm 1.
        text_embeds: $E^t$, of norm 1; those of one row belong together.
        scale_audio: $1/\tau$ for sounds looking for texts; the paper has one $\tau$, the checkpoints two.
        scale_text: $1/\tau$ for texts looking for sounds.
        axis_name: a mesh axis.
    """
    audio_loss = _matching(scale_audio * audio_embeds @ _gathered(text_embeds, axis_name).T, axis_name)
    text_loss = _matching(scale_text * text_embeds @ _gathered(audio_embeds, axis_name).T, axis_name)
    return (audio_loss + text_loss) / 2


def mlp_contrastive_loss(
    audio_embeds: Float[Array, "pairs dim"],
    text_embeds: Float[Array, "pairs dim"],
    audio_mlp: Float[Array, "pairs dim"],
    text_mlp: Float[Array, "pairs dim"],
    scale_audio: Float[Array, ""],
    scale_text: Float[Array, ""],
    axis_name: str | None = None,
) -> Float[Array, ""]:
    r"""Not in the paper; in the released code: Eq. 3 twice, each embedding against the other's through an MLP.

    With $1/\tau_a$: sounds against texts behind their MLP; with $1/\tau_t$: sounds behind theirs against texts.
    """
    first = contrastive_loss(audio_embeds, text_mlp, scale_audio, scale_audio, axis_name)
    return (first + contrastive_loss(audio_mlp, text_embeds, scale_text, scale_text, axis_name)) / 2


class ClapModel(nnx.Module):
    """§3 and Figure 1: both towers, both projections, both logit scales."""

    def __init__(self, config: ClapConfig, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        scale = jnp.asarray(math.log(config.logit_scale_init_value), param_dtype)
        self.logit_scale_a, self.logit_scale_t = nnx.Param(scale), nnx.Param(scale + 0)
        self.text_model = RobertaModel(config.text_config, **kwargs)
        self.text_projection = ClapProjectionLayer(config.text_config.hidden_size, config, **kwargs)
        self.audio_model = ClapAudioModel(config.audio_config, **kwargs)
        self.audio_projection = ClapProjectionLayer(config.audio_config.hidden_size, config, **kwargs)
        self.text_transform = EmbeddingMLP(config.projection_dim, **kwargs) if config.embedding_mlps else None
        self.audio_transform = EmbeddingMLP(config.projection_dim, **kwargs) if config.embedding_mlps else None
        self.config, self.dtype = config, dtype

    def get_text_features(
        self,
        input_ids: Int[Array, "batch time"],
        attention_mask: Int[Array, "batch time"] | None = None,
        position_ids: Int[Array, "#batch time"] | None = None,
    ) -> BaseModelOutputWithPooling:
        """The text tower's output, its `pooler_output` projected and of norm 1: the embedding."""
        output = self.text_model(input_ids, attention_mask, position_ids)
        pooled = normalize(self.text_projection(output.pooler_output))
        return BaseModelOutputWithPooling(output.last_hidden_state, pooled, output.hidden_states, output.attentions)

    def get_audio_features(
        self,
        input_features: Float[Array, "batch views frames mels"],
        is_longer: Bool[Array, "batch 1"] | None = None,
    ) -> BaseModelOutputWithPooling:
        """The sound tower's output, its `pooler_output` projected and of norm 1: the embedding."""
        output = self.audio_model(input_features, is_longer)
        pooled = normalize(self.audio_projection(output.pooler_output))
        return BaseModelOutputWithPooling(output.last_hidden_state, pooled, output.hidden_states, output.attentions)

    def __call__(
        self,
        input_ids: Int[Array, "texts time"],
        input_features: Float[Array, "sounds views frames mels"],
        is_longer: Bool[Array, "sounds 1"] | None = None,
        attention_mask: Int[Array, "texts time"] | None = None,
        position_ids: Int[Array, "#texts time"] | None = None,
        return_loss: bool = False,
        *,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        key: jax.Array | None = None,
    ) -> ClapOutput:
        """Compare every sound with every text.

        Args:
            input_ids: tokens.
            input_features: log-mel spectrograms.
            is_longer: see `ClapAudioModel`.
            attention_mask: 1 for real tokens, 0 for padding.
            position_ids: see `RobertaModel`.
            return_loss: return Eq. 3 too; sounds and texts are then pairs. A checkpoint with MLPs behind its
                embeddings, which was trained with `mlp_contrastive_loss`, gets that one.
            output_attentions: return both towers' attention weights.
            output_hidden_states: return both towers' states.
            key: training: dropout, stochastic depth, and batches normalised by their own statistics.
        """
        dropout = Dropout(key)
        asked: dict[str, Any] = {
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
        }
        audio = self.audio_model(input_features, is_longer, key=dropout.next_key(), **asked)
        text = self.text_model(input_ids, attention_mask, position_ids, key=dropout.next_key(), **asked)
        audio_embeds = normalize(self.audio_projection(audio.pooler_output))
        text_embeds = normalize(self.text_projection(text.pooler_output))
        scale_audio, scale_text = jnp.exp(self.logit_scale_a[...]), jnp.exp(self.logit_scale_t[...])
        loss = None
        if return_loss and len(audio_embeds) != len(text_embeds):
            raise UsageError(
                f"{len(audio_embeds)} sounds and {len(text_embeds)} texts are not pairs; the loss needs pairs."
            )
        if return_loss and self.audio_transform is not None and self.text_transform is not None:
            audio_mlp = self.audio_transform(audio_embeds, dropout)
            text_mlp = self.text_transform(text_embeds, dropout)
            loss = mlp_contrastive_loss(audio_embeds, text_embeds, audio_mlp, text_mlp, scale_audio, scale_text)
        elif return_loss:
            loss = contrastive_loss(audio_embeds, text_embeds, scale_audio, scale_text)
        return ClapOutput(
            loss=loss,
            logits_per_audio=audio_embeds @ text_embeds.T * scale_audio.astype(audio_embeds.dtype),
            logits_per_text=text_embeds @ audio_embeds.T * scale_text.astype(text_embeds.dtype),
            text_embeds=text_embeds,
            audio_embeds=audio_embeds,
            text_model_output=text,
            audio_model_output=audio,
        )


class ClapTextModelWithProjection(nnx.Module):
    """§3.1, Eq. 2: the text tower alone."""

    def __init__(self, config: ClapConfig, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.text_model = RobertaModel(config.text_config, **kwargs)
        self.text_projection = ClapProjectionLayer(config.text_config.hidden_size, config, **kwargs)
        self.config, self.dtype = config, dtype

    def __call__(
        self,
        input_ids: Int[Array, "batch time"],
        attention_mask: Int[Array, "batch time"] | None = None,
        position_ids: Int[Array, "#batch time"] | None = None,
        *,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        key: jax.Array | None = None,
    ) -> ClapTextModelOutput:
        """Embed texts; arguments as for `RobertaModel`."""
        output = self.text_model(
            input_ids,
            attention_mask,
            position_ids,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            key=key,
        )
        return ClapTextModelOutput(
            text_embeds=self.text_projection(output.pooler_output),
            last_hidden_state=output.last_hidden_state,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )


class ClapAudioModelWithProjection(nnx.Module):
    """§3.1, Eq. 1: the sound tower alone."""

    def __init__(self, config: ClapConfig, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.audio_model = ClapAudioModel(config.audio_config, **kwargs)
        self.audio_projection = ClapProjectionLayer(config.audio_config.hidden_size, config, **kwargs)
        self.config, self.dtype = config, dtype

    def __call__(
        self,
        input_features: Float[Array, "batch views frames mels"],
        is_longer: Bool[Array, "batch 1"] | None = None,
        *,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        key: jax.Array | None = None,
    ) -> ClapAudioModelOutput:
        """Embed sounds; arguments as for `ClapAudioModel`."""
        output = self.audio_model(
            input_features,
            is_longer,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            key=key,
        )
        return ClapAudioModelOutput(
            audio_embeds=self.audio_projection(output.pooler_output),
            last_hidden_state=output.last_hidden_state,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )


# --- training, §4.1 --------------------------------------------------------------------------------------------------


def clamp_logit_scales(model: ClapModel) -> ClapModel:
    r"""Not in the paper; in the released code: after every step $s \in [0, \log 100]$, so that no logit exceeds 100."""
    scales = {"logit_scale_a", "logit_scale_t"}
    leaves = [
        (path, leaf.replace(jnp.clip(leaf[...], 0.0, LARGEST_LOGIT_SCALE)) if path[-1] in scales else leaf)
        for path, leaf in nnx.to_flat_state(nnx.state(model))
    ]
    return nnx.merge(nnx.graphdef(model), nnx.from_flat_state(leaves))


def told_apart(
    model: ClapModel, audio_embeds: Float[Array, "pairs dim"], text_embeds: Float[Array, "pairs dim"]
) -> dict[str, Float[Array, ""]]:
    """The loss of any number of pairs, as `ClapModel` has it, and the share of sounds that are nearest to their text.

    By some rows of the logits at a time, so that memory grows with the pairs and not with their square.
    """

    def matching(queries: jax.Array, keys: jax.Array, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
        def one(row: jax.Array) -> tuple[jax.Array, jax.Array]:
            logits = at_least_float32(keys @ (scale * queries[row]))
            return jax.nn.logsumexp(logits) - logits[row], logits.argmax() == row

        losses, found = jax.lax.map(one, jnp.arange(len(queries)), batch_size=256)
        return losses.mean(), found.mean()

    scale_audio, scale_text = jnp.exp(model.logit_scale_a[...]), jnp.exp(model.logit_scale_t[...])
    audio_loss, accuracy = matching(audio_embeds, text_embeds, scale_audio)
    losses = [audio_loss, matching(text_embeds, audio_embeds, scale_text)[0]]
    if model.audio_transform is not None and model.text_transform is not None:
        audio_mlp = model.audio_transform(audio_embeds, Dropout(None))
        text_mlp = model.text_transform(text_embeds, Dropout(None))
        losses = [matching(*sides, scale_audio)[0] for sides in ((audio_embeds, text_mlp), (text_mlp, audio_embeds))]
        losses += [matching(*sides, scale_text)[0] for sides in ((audio_mlp, text_embeds), (text_embeds, audio_mlp))]
    return {"loss": jnp.stack(losses).mean(), "accuracy": accuracy}


@dataclass(frozen=True)
class ClapRecipe:
    """§4.1, training details: how the published models were trained."""

    learning_rate: float = 1e-4  # at the end of the warm-up
    batch_size: int = 2304  # pairs a step, over all devices
    warmup_steps: int = 3200  # not in the paper; in the released scripts
    weight_decay: float = 0.0  # not in the paper; in the released scripts
    beta1: float = 0.99  # of Adam
    beta2: float = 0.9  # of Adam

    def optimizer(self, steps: int) -> optax.GradientTransformation:
        """§4.1: Adam, a warm-up, and a cosine decay to 0 over `steps`."""
        warmup = min(self.warmup_steps, max(steps - 1, 1))
        schedule = optax.warmup_cosine_decay_schedule(0.0, self.learning_rate, warmup, steps)
        return optax.adamw(schedule, b1=self.beta1, b2=self.beta2, weight_decay=self.weight_decay)


class LinearProbe(nnx.Module):
    """§4.3, supervised classification, here with both towers frozen: a linear layer on a sound's embedding."""

    def __init__(self, dim: int, classes: int, **kwargs: Any):
        self.linear = Linear(dim, classes, **kwargs)

    def __call__(self, embeddings: Float[Array, "sounds dim"]) -> Float[Array, "sounds classes"]:
        """Logits."""
        return self.linear(embeddings)


def fit_probe(
    embeddings: Float[np.ndarray, "sounds dim"],
    labels: np.ndarray,
    classes: int,
    *,
    steps: int = 1000,
    learning_rate: float = 1e-2,
    seed: int = 0,
) -> LinearProbe:
    """§4.3: a linear layer that tells classes from embeddings, by Adam on all sounds at once, in one compiled loop.

    Args:
        embeddings: of `embed_audio`.
        labels: class numbers `(sounds,)`, or 1 where a sound is of a class `(sounds, classes)` if it may be of several.
        classes: how many there are.
        steps: of Adam.
        learning_rate: of Adam; it falls along a cosine.
        seed: of the weights.

    Raises:
        UsageError: if there is not one label, or row of labels, for every sound.
    """
    x, y = jnp.asarray(embeddings), jnp.asarray(labels)
    one = y.ndim == 1 and jnp.issubdtype(y.dtype, jnp.integer)
    if y.shape != ((len(x),) if one else (len(x), classes)):
        raise UsageError(
            f"There are {len(x)} embeddings and labels of shape {y.shape}; give one class number for each, or a row "
            f"of {classes}."
        )
    graphdef, params = nnx.split(LinearProbe(x.shape[1], classes, rngs=nnx.Rngs(seed)))
    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, steps))

    def loss(params: Any) -> jax.Array:
        logits = nnx.merge(graphdef, params)(x)
        return cross_entropy(logits, y) if one else tagging_loss(logits, y)

    def step(carry: Any, _: None) -> tuple[Any, None]:
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    run = jax.jit(lambda carry: jax.lax.scan(step, carry, length=steps)[0])
    return nnx.merge(graphdef, run((params, optimizer.init(params)))[0])


def caption_of_labels(labels: Sequence[str]) -> str:
    """§2, label template: "The sounds of a, b, and c".

    §3.5 improves on it by letting a T5 write the caption; that model is not part of CLAP's checkpoints.
    """
    if not labels:
        raise UsageError("There is no label to make a caption of.")
    if len(labels) < 3:
        return f"The sounds of {' and '.join(labels)}"
    return f"The sounds of {', '.join(labels[:-1])}, and {labels[-1]}"


# --- use, §4.2 and §4.3 ----------------------------------------------------------------------------------------------


@jax.jit
def _audio_features(model: ClapModel, input_features: jax.Array, is_longer: jax.Array) -> jax.Array:
    return model.get_audio_features(input_features, is_longer).pooler_output


@jax.jit
def _text_features(model: ClapModel, input_ids: jax.Array, attention_mask: jax.Array) -> jax.Array:
    return model.get_text_features(input_ids, attention_mask).pooler_output


def embed_audio(
    model: ClapModel, processor: Any, audio: Float[np.ndarray, " time"], *, sampling_rate: int = 48_000
) -> Float[np.ndarray, " dim"]:
    """§4.2: a sound's place on the sphere, the same on every call.

    A model that fuses sees a recording of any length at once. One that does not would see ten seconds of it, drawn at
    random in the original; here it is cut into windows, the last one flush with its end, and their embeddings are
    averaged.

    Args:
        model: both towers.
        processor: of the same checkpoint.
        audio: mono waveform in [-1, 1].
        sampling_rate: Hz of `audio`, to be checked.

    Raises:
        AudioError: as the processor.
    """
    audio = check_waveform(audio)
    fuses, window = model.config.audio_config.enable_fusion, processor.feature_extractor.nb_max_samples
    total = np.zeros(model.config.projection_dim)
    for piece in [audio] if fuses else covering(audio, window):
        inputs = processor(audio=piece, sampling_rate=sampling_rate)
        features, is_longer = jnp.asarray(inputs["input_features"]), jnp.asarray(inputs["is_longer"])
        total += np.asarray(_audio_features(model, features, is_longer), np.float64).sum(axis=0)
    return (total / np.linalg.norm(total)).astype(np.float32)


def embed_text(model: ClapModel, processor: Any, texts: Sequence[str]) -> Float[np.ndarray, "texts dim"]:
    """§4.2: texts' places on the sphere, one by one and padded to one length: nothing compiles anew.

    Texts are cut to `ClapConfig.text_length` tokens, as in training.
    """
    length = model.config.text_length
    inputs = processor(text=list(texts), padding="max_length", truncation=True, max_length=length)
    rows = [
        _text_features(model, jnp.asarray(ids[None]), jnp.asarray(mask[None]))
        for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
    ]
    return np.concatenate([np.asarray(row, np.float32) for row in rows])


def sentences(labels: Sequence[str], template: str = PROMPT) -> list[str]:
    """§4.3: labels put into the template at {}; the underscores that names of data sets have are spaces.

    Raises:
        UsageError: for a template without {}.
    """
    if "{}" not in template:
        raise UsageError(f"The template {template!r} has no {{}} where the label goes.")
    return [template.replace("{}", label.replace("_", " ")) for label in labels]


def zero_shot(
    model: ClapModel,
    processor: Any,
    audio: Float[np.ndarray, " time"],
    labels: Sequence[str],
    top: int = 5,
    *,
    template: str = PROMPT,
    sampling_rate: int = 48_000,
) -> list[tuple[str, float]]:
    """§4.3: which of the labels is heard, the most likely first.

    Args:
        model: both towers.
        processor: of the same checkpoint.
        audio: mono waveform in [-1, 1], of any length; see `embed_audio`.
        labels: what to choose from, each put into the template; see `sentences`. One that is given twice counts once.
        top: how many to return.
        template: the paper's "This is a sound of {}."; "{}" leaves labels as they are.
        sampling_rate: Hz of `audio`, to be checked.

    Returns:
        Labels and their probabilities over all labels: a softmax of the scaled products.

    Raises:
        UsageError: without labels, for an empty one, a template without {}, or a `top` below 1.
    """
    if not labels:
        raise UsageError("There is no label to choose from.")
    if not all(label.strip() for label in labels):
        raise UsageError("A label is empty; say in words what may be heard.")
    if top < 1:
        raise UsageError(f"top is {top}; at least one label is to be named.")
    labels = list(dict.fromkeys(labels))
    texts = embed_text(model, processor, sentences(labels, template))
    sound = embed_audio(model, processor, audio, sampling_rate=sampling_rate)
    logits = float(np.exp(np.float64(model.logit_scale_a[...]))) * texts.astype(np.float64) @ sound.astype(np.float64)
    scores = np.exp(logits - logits.max())
    scores /= scores.sum()
    order = np.argsort(-scores, kind="stable")[:top]
    return [(labels[i], float(scores[i])) for i in order]
