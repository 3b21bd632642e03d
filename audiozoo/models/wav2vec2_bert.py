r"""# w2v-BERT: Combining Contrastive Learning and Masked Language Modeling for Self-Supervised Speech Pre-Training

Yu-An Chung, Yu Zhang, Wei Han, Chung-Cheng Chiu, James Qin, Ruoming Pang, Yonghui Wu, 2021, arXiv 2108.06209.

HuBERT's targets come from a clustering beside the network, wav2vec 2.0 has none that a later block could learn from.
w2v-BERT has both in one network: its first blocks learn by wav2vec 2.0's contrastive task, whose quantiser thereby
becomes an inventory of sounds; the blocks behind them predict, of masked frames, which of its entries they are.

    log-mel, two frames of 10 ms ──> (T, 160) ── LN ──┬─> quantiser ──> entry (T) ──────────────────────────────┐
                                                      │        └──────> q (T, d) ──┐                            │
          Linear ── spans masked ── n Conformer blocks ──> c (T, d) ── contrastive loss                         │
                                         └── N − n Conformer blocks ──> (T, hidden) ── Linear ── cross-entropy ─┘

What is in use is w2v-BERT 2.0 (arXiv 2312.05187), the speech encoder of the second SeamlessM4T before it learnt to
translate: 24 Conformer blocks, trained on 4.5 million hours in over 143 languages, whose attention knows clipped
distances and whose convolutions look back only.

| paper | here |
| --- | --- |
| §3.1, contrastive module and masked prediction module: Conformer blocks | `audiozoo.models.conformer` |
| §3.1, feature encoder; in 2.0 no convolutions but pairs of filterbank frames | `Wav2Vec2BertFeatureProjection` |
| the network | `Wav2Vec2BertModel` |
| §3.2, Eq. 2, pre-training: $\mathcal L_p = \beta \mathcal L_c + \gamma \mathcal L_m$ | `Wav2Vec2BertForPreTraining` |
| §3.3, fine-tuning | `Wav2Vec2BertForCTC` |
| not in the paper; in fine-tuned checkpoints: classes | `Wav2Vec2BertForSequenceClassification` |
| the same, of every frame; speakers | `Wav2Vec2BertForAudioFrameClassification`, `Wav2Vec2BertForXVector` |
| not in the paper; in checkpoints for translation: a length adaptor | `Wav2Vec2BertAdapter` |
| sizes of 2.0 | `Wav2Vec2BertConfig.w2v_bert_2()`, `.w2v_bert_2_300m()` |

2.0's own objective has more codebooks, and a second masked prediction, of the nearest entry to a random projection; its
code is not published, and it is not here. What is here is the first paper's, with the settings of fairseq2's. Where
`transformers` and this file part: it has no pre-training class; and in a length adaptor its convolutions see the
padding (`masked_adapter=True` keeps it out).

Checkpoints: `facebook/w2v-bert-2.0`, as a Hugging Face directory or as fairseq2's `conformer_shaw.pt` beside it, and
what has been fine-tuned from it; as the encoder of a translator it stands in `audiozoo.models.xls_r`.

    import audiozoo
    model = audiozoo.load("facebook/w2v-bert-2.0")
    processor = audiozoo.load_processor("facebook/w2v-bert-2.0")
    states = model(**processor(waveform, sampling_rate=16_000)).last_hidden_state  # (batch, frames of 20 ms, 1024)
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from audiozoo.errors import CheckpointError, UsageError
from audiozoo.layers import Dropout, LayerNorm, Linear, check_frames
from audiozoo.layers.basic import at_least_float32
from audiozoo.models.conformer import ConformerConfig, ConformerEncoder, ConformerFeedForward, LengthAdaptorLayer
from audiozoo.models.wav2vec2 import (
    Lengths,
    Wav2Vec2ForAudioFrameClassification,
    Wav2Vec2ForCTC,
    Wav2Vec2ForSequenceClassification,
    Wav2Vec2ForXVector,
    Wav2Vec2GumbelVectorQuantizer,
    Wav2Vec2Model,
    _HeadSizes,
    _WithBackbone,
    check_division,
    check_x_vector,
    contrastive_logits,
    contrastive_loss,
    diversity_loss,
    sample_negative_indices,
)
from audiozoo.outputs import ModelOutput, Wav2Vec2BaseModelOutput


@dataclass(frozen=True)
class Wav2Vec2BertConfig(_HeadSizes):
    """Not in the paper: sizes of 2.0, as `transformers` names them, and those of the pre-training."""

    vocab_size: int = 32  # letters and special tokens of the CTC head
    hidden_size: int = 1024  # width of the Conformer
    num_hidden_layers: int = 24  # N, its blocks
    num_attention_heads: int = 16  # of hidden_size / heads channels each
    intermediate_size: int = 4096  # width inside a feed-forward module
    feature_projection_input_dim: int = 160  # log-mel bands of the frames that stand side by side
    hidden_act: str = "swish"  # of feed-forward and convolution module
    hidden_dropout: float = 0.0  # behind feed-forward modules, and before the first block
    activation_dropout: float = 0.0  # inside feed-forward modules
    attention_dropout: float = 0.0  # on attention weights, and behind attention
    feat_proj_dropout: float = 0.0  # behind the feature projection
    final_dropout: float = 0.1  # before the CTC head
    layerdrop: float = 0.1  # chance that training skips a block
    initializer_range: float = 0.02  # standard deviation that the heads' weights start from
    layer_norm_eps: float = 1e-5  # in every LayerNorm
    apply_spec_augment: bool = True  # whether spans may be masked at all
    mask_time_prob: float = 0.05  # share of frames under time spans; 0.65 in pre-training
    mask_time_length: int = 10  # frames a span
    mask_time_min_masks: int = 2  # spans at least, whatever the share
    mask_feature_prob: float = 0.0  # share of channels under channel spans
    mask_feature_length: int = 10  # channels a span
    mask_feature_min_masks: int = 0  # spans at least, whatever the share
    ctc_loss_reduction: str = "sum"  # over the batch: "sum", "mean"
    ctc_zero_infinity: bool = False  # drop items with too few frames for their labels
    use_weighted_layer_sum: bool = False  # heads read a learned mix of all layers
    classifier_proj_size: int = 768  # width before the sequence classifier
    tdnn_dim: tuple[int, ...] = (512, 512, 512, 512, 1500)  # channels out of the x-vector layers
    tdnn_kernel: tuple[int, ...] = (5, 3, 3, 1, 1)  # their taps
    tdnn_dilation: tuple[int, ...] = (1, 2, 3, 1, 1)  # frames between their taps
    xvector_output_dim: int = 512  # width of the speaker embedding
    pad_token_id: int = 0  # CTC's blank
    bos_token_id: int = 1  # of no use to the model; kept for export
    eos_token_id: int = 2  # of no use to the model; kept for export
    add_adapter: bool = False  # a length adaptor behind the Conformer
    adapter_kernel_size: int = 3  # taps of its convolutions
    adapter_stride: int = 2  # their stride
    num_adapter_layers: int = 1  # how many
    adapter_act: str = "relu"  # of its feed-forward modules
    use_intermediate_ffn_before_adapter: bool = False  # half a feed-forward module in front of it
    output_hidden_size: int | None = None  # its width, if not hidden_size
    position_embeddings_type: str | None = "relative_key"  # see `ConformerConfig`
    rotary_embedding_base: int = 10_000  # "rotary": longest period / 2π
    max_source_positions: int = 5000  # kept for export: "relative" positions have no end
    left_max_position_embeddings: int = 64  # "relative_key": frames back that are told apart
    right_max_position_embeddings: int = 8  # "relative_key": frames ahead that are told apart
    conv_depthwise_kernel_size: int = 31  # frames that the convolution sees
    conformer_conv_dropout: float = 0.1  # behind the convolution module
    id2label: tuple[str, ...] = ("LABEL_0", "LABEL_1")  # names of the classifier's classes

    # --- pre-training, as in fairseq2's recipe; no published checkpoint's `config.json` has these
    num_contrastive_layers: int = 8  # n, blocks of the contrastive module
    num_codevectors_per_group: int = 1024  # V, entries of each codebook
    num_codevector_groups: int = 1  # G, codebooks
    codevector_dim: int = 1024  # width of a quantised frame, all groups side by side
    proj_codevector_dim: int = 768  # width in which predictions and targets are compared
    contrastive_logits_temperature: float = 0.1  # κ of the contrastive loss
    num_negatives: int = 100  # K, distractors of each masked frame
    diversity_loss_weight: float = 0.1  # α
    contrastive_weight: float = 1.0  # β
    prediction_weight: float = 1.0  # γ
    feat_quantizer_dropout: float = 0.0  # on the features that are quantised

    def __post_init__(self) -> None:
        if self.use_intermediate_ffn_before_adapter and not self.add_adapter:
            raise CheckpointError("use_intermediate_ffn_before_adapter is for models with add_adapter.")
        if self.conv_depthwise_kernel_size % 2 == 0:
            raise CheckpointError(f"conv_depthwise_kernel_size is odd; {self.conv_depthwise_kernel_size} is not.")
        check_division(self, "codevector_dim", "num_codevector_groups")
        check_x_vector(self)

    @property
    def inputs_to_logits_ratio(self) -> int:
        """Samples of 16 kHz a frame, of which there is one for each step."""
        return self.samples_a_step

    @property
    def samples_a_step(self) -> int:
        """Samples of 16 kHz a step, two filterbank frames of 10 ms; other models of the family read samples."""
        return 320

    @property
    def conformer(self) -> ConformerConfig:
        """2.0's blocks."""
        return ConformerConfig.of_speech_encoder(
            self,
            block_layer_norm_eps=self.layer_norm_eps,
            last_layer_norm=False,
            left_max_position_embeddings=self.left_max_position_embeddings,
            right_max_position_embeddings=self.right_max_position_embeddings,
            causal_convolution=True,
        )

    @classmethod
    def w2v_bert_2(cls) -> Wav2Vec2BertConfig:
        """w2v-BERT 2.0: 24 blocks of width 1024, 580 M parameters."""
        return cls()

    @classmethod
    def w2v_bert_2_300m(cls) -> Wav2Vec2BertConfig:
        """fairseq2's smaller recipe: 12 blocks, four of them the contrastive module; nothing is published."""
        return cls(num_hidden_layers=12, num_contrastive_layers=4)


class Wav2Vec2BertFeatureProjection(nnx.Module):
    """Not in the paper; in the released checkpoint: LayerNorm over the bands, and a linear map to the model's width."""

    def __init__(self, config: Wav2Vec2BertConfig, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs):
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        bands = config.feature_projection_input_dim
        self.layer_norm = LayerNorm(bands, epsilon=config.layer_norm_eps, **kwargs)
        self.projection = Linear(bands, config.hidden_size, **kwargs)
        self.rate = config.feat_proj_dropout

    def __call__(
        self, x: Float[Array, "batch frames bands"], dropout: Dropout
    ) -> tuple[Float[Array, "batch frames hidden"], Float[Array, "batch frames bands"]]:
        """Projected features, and normalised ones, which the quantiser reads."""
        normalised = self.layer_norm(x)
        return dropout(self.projection(normalised), self.rate), normalised


class Wav2Vec2BertAdapter(nnx.Module):
    """Not in the paper; in checkpoints for translation: blocks that halve the number of frames."""

    def __init__(self, config: Wav2Vec2BertConfig, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs):
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        width = config.adapter_size
        if width != config.hidden_size:
            self.proj = Linear(config.hidden_size, width, **kwargs)
            self.proj_layer_norm = LayerNorm(width, epsilon=config.layer_norm_eps, **kwargs)
        conformer = dataclasses.replace(config.conformer, hidden_size=width)
        pooling: dict[str, Any] = {"taps": config.adapter_kernel_size, "stride": config.adapter_stride}
        pooling |= {"act": config.adapter_act, "dropout": config.conformer_conv_dropout}
        self.layers = nnx.List(
            [LengthAdaptorLayer(conformer, **pooling, **kwargs) for _ in range(config.num_adapter_layers)]
        )
        self.config = config

    def __call__(
        self,
        x: Float[Array, "batch frames hidden"],
        lengths: Int[Array, " batch"] | None,
        dropout: Dropout,
        masked: bool = False,
    ) -> Float[Array, "batch fewer width"]:
        """Shorten the sequence. (Layer drop, which would change the length at random, is not applied here.)

        Args:
            x: frames.
            lengths: how many of each item are speech; attention does not see the others.
            dropout: source of keys.
            masked: the convolutions see zeros in place of the others too.
        """
        if hasattr(self, "proj"):
            x = self.proj_layer_norm(self.proj(x))
        for layer in self.layers:
            real = None
            if lengths is not None:
                real = jnp.arange(x.shape[1]) < lengths[:, None] if masked else None
                lengths = pooled_lengths(lengths, self.config, 1)
            x = layer(x, lengths, real, dropout=dropout)
        return x


def pooled_lengths(lengths: Lengths, config: Wav2Vec2BertConfig, layers: int) -> Lengths:
    """Frames that blocks of the length adaptor make of so many."""
    taps, stride = config.adapter_kernel_size, config.adapter_stride
    for _ in range(layers):
        lengths = (lengths + 2 * (stride // 2) - taps) // stride + 1
    return lengths


class Wav2Vec2BertModel(Wav2Vec2Model):
    """§3.1: contrastive module and masked prediction module, one behind the other: N Conformer blocks."""

    def __init__(
        self, config: Wav2Vec2BertConfig, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs
    ):
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.feature_projection = Wav2Vec2BertFeatureProjection(config, **kwargs)
        if config.mask_time_prob > 0 or config.mask_feature_prob > 0:
            self.masked_spec_embed = nnx.Param(jax.random.uniform(rngs.params(), (config.hidden_size,), param_dtype))
        self.encoder = ConformerEncoder(config.conformer, **kwargs)
        if config.use_intermediate_ffn_before_adapter:
            self.intermediate_ffn = ConformerFeedForward(config.conformer, act="relu", **kwargs)
        if config.add_adapter:
            self.adapter: Any = Wav2Vec2BertAdapter(config, **kwargs)
        self.config = config

    def frame_lengths(self, sample_lengths: Lengths, *, adapter: bool = True) -> Lengths:
        """Frames out of that many steps of features: as many, or fewer behind the adaptor if there is one."""
        layers = self.config.num_adapter_layers if adapter and self.config.add_adapter else 0
        return pooled_lengths(sample_lengths, self.config, layers)

    def frame_mask(
        self, attention_mask: Int[Array, "batch steps"], frames: int, *, adapter: bool = True
    ) -> Bool[Array, "batch frames"]:
        """Which frames are speech, behind the adaptor if there is one."""
        lengths = self.frame_lengths((attention_mask != 0).sum(axis=-1), adapter=adapter)
        return jnp.arange(frames) < lengths[:, None]

    def __call__(  # type: ignore[override]
        self,
        input_features: Float[Array, "batch steps bands"],
        attention_mask: Int[Array, "batch steps"] | None = None,
        mask_time_indices: Bool[Array, "batch steps"] | None = None,
        mask_feature_indices: Bool[Array, "batch hidden"] | None = None,
        *,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        masked_adapter: bool = False,
        key: jax.Array | None = None,
    ) -> Wav2Vec2BaseModelOutput:
        """Contextualised representations of speech, one every 20 ms.

        Args:
            input_features: pairs of log-mel frames, each band normalised over the recording; see
                `audiozoo.processors.wav2vec2_bert`.
            attention_mask: 1 for a step of the recording, 0 for padding behind it.
            mask_time_indices: frames to mask; drawn if there is a `key`.
            mask_feature_indices: channels to mask; drawn if there is a `key`.
            output_attentions: return every block's attention weights.
            output_hidden_states: return the input of every block, and the output, before any adaptor.
            masked_adapter: let the adaptor's convolutions see zeros in place of the padding, so that a padded batch
                gives what its items give one by one.
            key: switches dropout, layer drop and masking on.

        Returns:
            `last_hidden_state`, `(batch, frames, hidden)`; and `extract_features`, the normalised features.

        Raises:
            UsageError: for features of another width, and for none.
        """
        check_frames(input_features, self.config.feature_projection_input_dim)
        dropout = Dropout(key)
        batch, frames, _ = input_features.shape
        mask = None if attention_mask is None else self.frame_mask(attention_mask, frames, adapter=False)
        x, features = self.feature_projection(input_features, dropout)
        if (mask_key := dropout.next_key()) is not None:
            spans, channels = self.draw_masks(mask_key, batch, frames, mask)
            mask_time_indices = spans if mask_time_indices is None else mask_time_indices
            mask_feature_indices = channels if mask_feature_indices is None else mask_feature_indices
        encoded = self.encoder(
            self.mask(x, mask_time_indices, mask_feature_indices),
            mask,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            dropout=dropout,
        )
        x = encoded.last_hidden_state
        if hasattr(self, "intermediate_ffn"):
            x = x + 0.5 * self.intermediate_ffn(x, dropout)
        if hasattr(self, "adapter"):
            x = self.adapter(x, None if mask is None else mask.sum(axis=1), dropout, masked_adapter)
        return Wav2Vec2BaseModelOutput(
            last_hidden_state=x,
            extract_features=features,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )


# --- §3.2, pre-training -----------------------------------------------------------------------------------------------


class Wav2Vec2BertForPreTrainingOutput(ModelOutput):
    """§3.2: the loss, a sum over the masked frames of the batch, and its parts."""

    loss: Float[Array, ""] | None = None
    projected_states: Float[Array, "batch frames width"] | None = None
    projected_quantized_states: Float[Array, "batch frames width"] | None = None
    codevector_perplexity: Float[Array, ""] | None = None
    prediction_logits: Float[Array, "batch frames groups entries"] | None = None
    codes: Int[Array, "batch frames groups"] | None = None
    hidden_states: tuple[Float[Array, "batch frames channels"], ...] | None = None
    attentions: tuple[Float[Array, "batch heads query key"], ...] | None = None
    contrastive_loss: Float[Array, ""] | None = None
    diversity_loss: Float[Array, ""] | None = None
    prediction_loss: Float[Array, ""] | None = None


class Wav2Vec2BertForPreTraining(_WithBackbone):
    r"""§3.2, Eq. 1 and 2:

    $$\mathcal L_p = \beta\, \mathcal L_c + \gamma\, \mathcal L_m, \qquad \mathcal L_c = \mathcal L_w + \alpha\,
    \mathcal L_d$$

    $\mathcal L_w$ and $\mathcal L_d$ are wav2vec 2.0's (arXiv 2006.11477, Eq. 3 and 4), of the states behind block
    $n$; $\mathcal L_m$ is the cross-entropy between what is said of a masked frame behind block $N$ and the entry that
    the quantiser took for it, which has no gradient. All are sums over the masked frames.
    """

    base_model_prefix = "wav2vec2_bert"
    base_class = Wav2Vec2BertModel

    def __init__(
        self, config: Wav2Vec2BertConfig, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs
    ):
        if not 0 < config.num_contrastive_layers < config.num_hidden_layers:
            raise UsageError(
                f"The contrastive module cannot have {config.num_contrastive_layers} of {config.num_hidden_layers} "
                "blocks: num_contrastive_layers is from 1 on, and leaves one for the masked prediction."
            )
        super().__init__(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.backbone.encoder.seen_after = config.num_contrastive_layers
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.quantizer = Wav2Vec2GumbelVectorQuantizer(config, channels=config.feature_projection_input_dim, **kwargs)
        self.project_hid = Linear(config.hidden_size, config.proj_codevector_dim, **kwargs)
        self.project_q = Linear(config.codevector_dim, config.proj_codevector_dim, **kwargs)
        entries = config.num_codevector_groups * config.num_codevectors_per_group
        self.prediction = Linear(config.hidden_size, entries, **kwargs)

    def __call__(
        self,
        input_features: Float[Array, "batch steps bands"],
        attention_mask: Int[Array, "batch steps"] | None = None,
        mask_time_indices: Bool[Array, "batch steps"] | None = None,
        sampled_negative_indices: Int[Array, "batch steps negatives"] | None = None,
        *,
        temperature: float | Float[Array, ""] = 2.0,
        gumbel_noise: Float[Array, "batch steps groups entries"] | None = None,
        key: jax.Array | None = None,
        **options: Any,
    ) -> Wav2Vec2BertForPreTrainingOutput:
        r"""Predictions, targets and, in training, the loss.

        Args:
            input_features: see `Wav2Vec2BertModel`.
            attention_mask: 1 for a step of the recording, 0 for padding behind it.
            mask_time_indices: frames to mask and to predict; drawn if there is a `key`.
            sampled_negative_indices: distractors of each frame (see `sample_negative_indices` of wav2vec 2.0);
                drawn if there is a `key`. With neither there is no loss.
            temperature: $\tau$ of the Gumbel softmax (see `audiozoo.models.wav2vec2.gumbel_temperature`).
            gumbel_noise: of the quantiser; drawn if there is a `key`. With neither it takes the best entry.
            key: switches dropout, layer drop, masking, sampling and noise on.
            options: see `Wav2Vec2BertModel`.

        Returns:
            `projected_states` and `projected_quantized_states`, $c$ and $q$ in the width in which they are compared;
            `prediction_logits`, and `codes`, what they should have said; with negatives `loss`, and its parts.

        Raises:
            UsageError: without masks.
        """
        config = self.config
        keys = [None] * 5 if key is None else list(jax.random.split(key, 5))
        mask_time_indices, _ = self.frames_to_predict(input_features, attention_mask, mask_time_indices, keys[0])
        if mask_time_indices is None and (key is not None or sampled_negative_indices is not None):
            raise UsageError("Pre-training needs masks: give mask_time_indices, or a key and a mask_time_prob.")
        wanted = options | {"output_hidden_states": True}
        outputs = self.backbone(input_features, attention_mask, mask_time_indices, key=keys[1], **wanted)
        states = outputs.hidden_states
        # c, behind the contrastive module's blocks
        context = self.project_hid(states[config.num_contrastive_layers])
        unmasked = Dropout(keys[2])(outputs.extract_features, config.feat_quantizer_dropout)
        quantised, in_use, codes = self.quantizer(
            unmasked, mask_time_indices, temperature=temperature, gumbel_noise=gumbel_noise, key=keys[3]
        )
        quantised = self.project_q(quantised)
        logits = self.prediction(states[-1])
        logits = logits.reshape(*logits.shape[:2], config.num_codevector_groups, config.num_codevectors_per_group)
        if sampled_negative_indices is None and keys[4] is not None and mask_time_indices is not None:
            sampled_negative_indices = sample_negative_indices(keys[4], mask_time_indices, config.num_negatives)
        loss = contrastive = diversity = predicted = None
        if sampled_negative_indices is not None and mask_time_indices is not None:
            negatives = at_least_float32(quantised).reshape(-1, quantised.shape[-1])[sampled_negative_indices]
            same = (codes.reshape(-1, codes.shape[-1])[sampled_negative_indices] == codes[:, :, None]).all(axis=-1)
            candidates = contrastive_logits(context, quantised, negatives, config.contrastive_logits_temperature, same)
            contrastive = contrastive_loss(candidates, mask_time_indices)
            diversity = diversity_loss(in_use, config) * mask_time_indices.sum()
            log_p = jax.nn.log_softmax(at_least_float32(logits), axis=-1)
            said = jnp.take_along_axis(log_p, codes[..., None], axis=-1)[..., 0].sum(axis=-1)
            predicted = -jnp.where(mask_time_indices, said, 0).sum()
            # L_p = β (L_w + α L_d) + γ L_m
            loss = config.contrastive_weight * (contrastive + config.diversity_loss_weight * diversity)
            loss = loss + config.prediction_weight * predicted
        return Wav2Vec2BertForPreTrainingOutput(
            loss=loss,
            projected_states=context,
            projected_quantized_states=quantised,
            codevector_perplexity=in_use,
            prediction_logits=logits,
            codes=codes,
            hidden_states=outputs.hidden_states if options.get("output_hidden_states") else None,
            attentions=outputs.attentions,
            contrastive_loss=contrastive,
            diversity_loss=diversity,
            prediction_loss=predicted,
        )


# --- §3.3, fine-tuning, and the heads of fine-tuned checkpoints -------------------------------------------------------


class _FromFeatures:
    """The heads of wav2vec 2.0 over what is called `input_features` here; see `Wav2Vec2BertModel` for the options."""

    base_model_prefix: ClassVar[str] = "wav2vec2_bert"
    base_class: ClassVar[type] = Wav2Vec2BertModel

    def __call__(
        self,
        input_features: Float[Array, "batch steps bands"],
        attention_mask: Int[Array, "batch steps"] | None = None,
        labels: Array | None = None,
        **options: Any,
    ) -> Any:
        """See the class of wav2vec 2.0's of the same name; `input_features` are what `Wav2Vec2BertModel` reads."""
        return super().__call__(input_features, attention_mask, labels, **options)  # type: ignore[misc]


class Wav2Vec2BertForCTC(_FromFeatures, Wav2Vec2ForCTC):  # type: ignore[misc]
    """§3.3: a linear layer onto letters, trained with CTC. (The paper's own has a transducer.)"""


class Wav2Vec2BertForSequenceClassification(_FromFeatures, Wav2Vec2ForSequenceClassification):  # type: ignore[misc]
    """Not in the paper; in fine-tuned checkpoints: a class for a recording."""


class Wav2Vec2BertForAudioFrameClassification(_FromFeatures, Wav2Vec2ForAudioFrameClassification):  # type: ignore[misc]
    """Not in the paper; in fine-tuned checkpoints: a class for every frame."""


class Wav2Vec2BertForXVector(_FromFeatures, Wav2Vec2ForXVector):  # type: ignore[misc]
    """Not in the paper; in fine-tuned checkpoints: an embedding of the speaker."""
