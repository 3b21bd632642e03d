r"""# UniSpeech-SAT: Universal Speech Representation Learning with Speaker Aware Pre-Training

Sanyuan Chen, Yu Wu, Chengyi Wang, Zhengyang Chen, Zhuo Chen, Shujie Liu, Jian Wu, Yao Qian, Furu Wei, Jinyu Li,
Xiangzhan Yu, 2021, arXiv 2110.05752.

Masked prediction learns what is said; who says it comes along by chance. UniSpeech-SAT adds a task for the speaker to
HuBERT's: out of the output of a middle block, a frame has to recognise codes of its own utterance among codes of the
whole batch, an utterance standing for its speaker. And a part of each utterance is covered by another one, whose
content is not to be predicted, so that the network must tell voices apart.

    another utterance ───────┐ (utterance mixing)
    waveform 16 kHz ─────────┴─> wav2vec 2.0's convolutions ──> spans masked ──> blocks 1 … 6 ──┬──> blocks 7 … 12
                                                                                                │          │
                quantiser ─> Linear ─> codes ── same utterance, or another? ── Linear <─────────┤          │
                                          (utterance-wise contrastive loss)                                │
                                                     cluster of each masked frame <── cosine ── Linear <───┘

| paper | here |
| --- | --- |
| § "Utterance-wise contrastive learning" | `utterance_contrastive_loss`, `UniSpeechSatForPreTraining` |
| § "Utterance mixing augmentation" | `audiozoo.models.wavlm.draw_mixes`, `audiozoo.models.wavlm.mix` |
| § "Speaker information enhanced training" | `UniSpeechSatModel` |
| the same, HuBERT's loss | `audiozoo.models.hubert.masked_prediction` |
| § "Experiments", sizes | `UniSpeechSatConfig.base()`, `.base_plus()`, `.large()` |
| not in the paper; in the released checkpoints | `UniSpeechSatFor…` heads |

The network is wav2vec 2.0's and the masked prediction HuBERT's, imported from their files; the mixing stands in the
file of WavLM (arXiv 2110.13900), which went on from here.

Where `transformers` and this file part: its pre-training class is a stub without a loss, whose `logits` are the
convolutional features; here they are the similarities to the clusters. Last hidden states and x-vectors differ as in
wav2vec 2.0's file. Of a padded batch, `frame_rule="samples"` counts frames as the released code does.

Checkpoints: `microsoft/unispeech-sat-base`, `-base-plus`, `-large`, `-base-100h-libri-ft`, `-base-sd`, `-base-sv`,
`-base-plus-sd`, `-base-plus-sv`, `-large-sd`, `-large-sv`, and Microsoft's own `UniSpeech-SAT-Base.pt`, `-Base+.pt`,
`-Large.pt`, and Large with ECAPA-TDNN for speakers.

    import audiozoo
    model = audiozoo.load("microsoft/unispeech-sat-base-plus-sv")
    processor = audiozoo.load_processor("microsoft/unispeech-sat-base-plus-sv")
    voices = model(**processor([one, other], sampling_rate=16_000)).embeddings
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from audiozoo.errors import UsageError
from audiozoo.layers import LayerNorm, Linear
from audiozoo.layers.basic import at_least_float32
from audiozoo.models.hubert import cluster_logits, masked_prediction, targets_of_frames
from audiozoo.models.wav2vec2 import (
    Wav2Vec2Config,
    Wav2Vec2ForAudioFrameClassification,
    Wav2Vec2ForCTC,
    Wav2Vec2ForSequenceClassification,
    Wav2Vec2ForSpeakerVerification,
    Wav2Vec2ForXVector,
    Wav2Vec2GumbelVectorQuantizer,
    Wav2Vec2Model,
    _WithBackbone,
    check_labels,
    cosine_similarity,
    diversity_loss,
    features_penalty,
    sample_negative_indices,
)
from audiozoo.models.wavlm import Mixes, mix
from audiozoo.outputs import ModelOutput


@dataclass(frozen=True)
class UniSpeechSatConfig(Wav2Vec2Config):
    """Sizes of one checkpoint (§ "Experiments"): wav2vec 2.0's, and what the paper adds."""

    num_clusters: int = 504  # classes of the pre-training targets
    label_rate: float = 50.0  # pre-training targets a second
    utterance_contrastive_layer: int = 6  # the block, counted from 1, whose output the speaker task reads
    cross_sample_instances: int = 100  # codes of the batch that a frame's utterance is told from
    ctc_loss_reduction: str = "mean"  # over the batch: "sum", "mean"
    frame_rule: str = "lengths"  # how padding is counted in frames; "samples" as in the released code

    @classmethod
    def base(cls) -> UniSpeechSatConfig:
        """§ "Experiments", Base: 12 blocks of width 768, pre-trained on 960 hours."""
        return cls()

    @classmethod
    def base_plus(cls) -> UniSpeechSatConfig:
        """§ "Experiments", Base+: Base, pre-trained on 94,000 hours."""
        return cls()

    @classmethod
    def large(cls) -> UniSpeechSatConfig:
        """§ "Experiments", Large: 24 pre-norm blocks of width 1024, LayerNorm in the convolutions."""
        return cls(
            hidden_size=1024,
            num_hidden_layers=24,
            num_attention_heads=16,
            intermediate_size=4096,
            codevector_dim=768,
            proj_codevector_dim=768,
            feat_extract_norm="layer",
            do_stable_layer_norm=True,
            utterance_contrastive_layer=12,
        )


class UniSpeechSatModel(Wav2Vec2Model):
    """§ "Speaker information enhanced training": wav2vec 2.0's network, always with a vector for masked frames."""

    def __init__(self, config: Any, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        super().__init__(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        if not hasattr(self, "masked_spec_embed"):
            self.masked_spec_embed = nnx.Param(jax.random.uniform(rngs.params(), (config.hidden_size,), param_dtype))

    @property
    def frame_rule(self) -> str:  # type: ignore[override]
        """How padding is counted in frames; see `audiozoo.models.wav2vec2.frame_mask`."""
        return self.config.frame_rule


def sample_instances(
    key: jax.Array, mask_time_indices: Bool[Array, "batch frames"], count: int
) -> Int[Array, "batch frames instances"]:
    """§ "Utterance-wise contrastive learning": for each masked frame other masked frames of the whole batch.

    Drawn uniformly with replacement; the indices count through the batch, row after row. (The released code leaves out
    a frame of the first utterance in place of the frame itself.)
    """
    flat = jnp.asarray(mask_time_indices, bool).reshape(1, -1)
    return sample_negative_indices(key, flat, count).reshape(*mask_time_indices.shape, count)


def utterance_contrastive_loss(
    states: Float[Array, "batch frames width"],
    codes: Float[Array, "batch frames width"],
    instances: Int[Array, "batch frames instances"],
    mask_time_indices: Bool[Array, "batch frames"],
    temperature: float = 0.1,
) -> Float[Array, ""]:
    r"""§ "Utterance-wise contrastive learning": does a code come out of this frame's utterance?

    $$-\frac{1}{|M|(K + 1)} \sum_{t \in M} \Bigl( \sum_{c \in \text{same}} \log \sigma(\mathrm{sim}(s_t, c)/\kappa)
    + \sum_{c \in \text{other}} \log \sigma(-\mathrm{sim}(s_t, c)/\kappa) \Bigr)$$

    over the masked frames $M$; the candidates $c$ are the frame's own code and $K$ instances of the batch, those of
    the same utterance among them.

    Args:
        states: $s$, projected output of a middle block.
        codes: projected codes of all frames.
        instances: frames whose codes are asked about, counted through the batch.
        mask_time_indices: the masked frames.
        temperature: $\kappa$.
    """
    batch, frames, width = states.shape
    states, codes = at_least_float32(states), at_least_float32(codes)
    drawn = codes.reshape(batch * frames, width)[instances]
    candidates = jnp.concatenate([codes[:, :, None], drawn], axis=2)
    own = instances // frames == jnp.arange(batch)[:, None, None]
    own = jnp.pad(own, ((0, 0), (0, 0), (1, 0)), constant_values=True)
    logits = cosine_similarity(states[:, :, None], candidates) / temperature
    losses = -jax.nn.log_sigmoid(jnp.where(own, logits, -logits))
    counted = jnp.asarray(mask_time_indices, bool)
    return jnp.where(counted[..., None], losses, 0).sum() / (jnp.maximum(counted.sum(), 1) * candidates.shape[2])


class UniSpeechSatForPreTrainingOutput(ModelOutput):
    """§ "Speaker information enhanced training": the loss, a sum over masked frames, and its parts."""

    loss: Float[Array, ""] | None = None
    logits: Float[Array, "batch frames clusters"] | None = None
    projected_states: Float[Array, "batch frames hidden"] | None = None
    projected_quantized_states: Float[Array, "batch frames width"] | None = None
    codevector_perplexity: Float[Array, ""] | None = None
    hidden_states: tuple[Float[Array, "batch time channels"], ...] | None = None
    attentions: tuple[Float[Array, "batch heads query key"], ...] | None = None
    masked_loss: Float[Array, ""] | None = None
    utterance_loss: Float[Array, ""] | None = None
    diversity_loss: Float[Array, ""] | None = None
    features_pen: Float[Array, ""] | None = None


class UniSpeechSatForPreTraining(_WithBackbone):
    r"""§ "Speaker information enhanced training": masked prediction of clusters, and the task for the speaker.

    $$\mathcal L = \mathcal L_\text{content} + |M| \,(\lambda\, \mathcal L_\text{utterance} + 0.1\, \mathcal L_d)$$

    $\mathcal L_d$ is wav2vec 2.0's diversity of the codebooks' use. `project_hid`, `speaker_proj` and
    `label_embeddings_concat` are fairseq's `final_proj`, `spk_proj` and `label_embs_concat`.
    """

    base_model_prefix = "unispeech_sat"
    base_class = UniSpeechSatModel

    def __init__(self, config: Any, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        super().__init__(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.backbone.encoder.seen_after = config.utterance_contrastive_layer
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        linear = kwargs | {"kernel_init": nnx.initializers.normal(config.initializer_range)}
        self.quantizer = Wav2Vec2GumbelVectorQuantizer(config, **kwargs)
        # It reads the output of a block, not the convolutions'.
        entries = config.num_codevector_groups * config.num_codevectors_per_group
        init = nnx.initializers.normal(1.0)
        self.quantizer.weight_proj = Linear(config.hidden_size, entries, kernel_init=init, **kwargs)
        self.project_q = Linear(config.codevector_dim, config.proj_codevector_dim, **linear)
        self.project_hid = Linear(config.hidden_size, config.proj_codevector_dim, **linear)
        self.speaker_proj = Linear(config.hidden_size, config.codevector_dim, **linear)
        shape = (config.num_clusters, config.codevector_dim)
        self.label_embeddings_concat = nnx.Param(jax.random.uniform(rngs.params(), shape, param_dtype))
        self.layer_norm_for_extract = LayerNorm(config.hidden_size, epsilon=config.layer_norm_eps, **kwargs)

    def __call__(
        self,
        input_values: Float[Array, "batch samples"],
        attention_mask: Int[Array, "batch samples"] | None = None,
        labels: Int[Array, "batch targets"] | None = None,
        *,
        mask_time_indices: Bool[Array, "batch frames"] | None = None,
        instances: Int[Array, "batch frames instances"] | None = None,
        mixes: Mixes | None = None,
        normalize: bool = False,
        temperature: float | Float[Array, ""] = 2.0,
        gumbel_noise: Float[Array, "batch frames groups entries"] | None = None,
        utterance_weight: float | Float[Array, ""] = 1.0,
        features_pen_weight: float | Float[Array, ""] = 0.0,
        key: jax.Array | None = None,
        **options: Any,
    ) -> UniSpeechSatForPreTrainingOutput:
        r"""Predictions and, with `labels`, the loss.

        Args:
            input_values: waveforms at 16 kHz.
            attention_mask: 1 for a sample of the recording, 0 for padding behind it.
            labels: clusters of the unmixed speech, `label_rate` a second; -100 is left out.
            mask_time_indices: frames to mask and to predict; drawn if there is a `key`.
            instances: for each frame, the frames whose codes it is asked about (see `sample_instances`); drawn if
                there is a `key`. With neither there is no utterance-wise loss.
            mixes: what to lay over the waveforms (see `audiozoo.models.wavlm.draw_mixes`); nothing by default.
            normalize: bring waveforms that something was mixed into back to mean 0 and variance 1.
            temperature: $\tau$ of the Gumbel softmax (see `audiozoo.models.wav2vec2.gumbel_temperature`).
            gumbel_noise: of the Gumbel softmax; drawn if there is a `key`.
            utterance_weight: $\lambda$.
            features_pen_weight: weight of the mean square of the features, for each masked frame (10 in the recipes).
            key: switches dropout, layer drop, masking, sampling and noise on.
            options: see `Wav2Vec2Model`.

        Returns:
            `logits`, similarities to the clusters over the temperature; `projected_states`, the Transformer's output;
            `projected_quantized_states`, codes; with labels `loss`, a sum over masked frames, and its parts.

        Raises:
            UsageError: if there are labels and no mask, or a label is no cluster, or the widths that are compared
                differ, or there is no such block as `utterance_contrastive_layer`.
        """
        config = self.config
        if config.codevector_dim != config.proj_codevector_dim:
            raise UsageError(
                f"Outputs of width {config.proj_codevector_dim} are compared with clusters of width "
                f"{config.codevector_dim}; proj_codevector_dim and codevector_dim must agree."
            )
        if not 1 <= config.utterance_contrastive_layer <= config.num_hidden_layers:
            raise UsageError(
                f"The speaker task reads block {config.utterance_contrastive_layer} (utterance_contrastive_layer); the "
                f"model has {config.num_hidden_layers}."
            )
        keys = [None] * 4 if key is None else list(jax.random.split(key, 4))
        lengths = None if attention_mask is None else jnp.asarray(attention_mask).astype(jnp.int32).sum(axis=-1)
        if mixes is not None:
            input_values = mix(jnp.asarray(input_values), mixes, lengths=lengths, normalize=normalize)
        mask_time_indices, valid = self.frames_to_predict(input_values, attention_mask, mask_time_indices, keys[0])
        wanted = options.pop("output_hidden_states", False)
        outputs = self.backbone(
            input_values, attention_mask, mask_time_indices, output_hidden_states=True, key=keys[1], **options
        )
        features_pen = features_penalty(outputs.conv_features)
        states = self.project_hid(outputs.last_hidden_state)
        table, scale = self.label_embeddings_concat[...], config.contrastive_logits_temperature
        logits = cluster_logits(states, table, scale)
        middle = outputs.hidden_states[config.utterance_contrastive_layer]
        if config.do_stable_layer_norm:
            middle = self.layer_norm_for_extract(middle)
        counted = None if mask_time_indices is None else mask_time_indices & valid
        quantised, in_use, _ = self.quantizer(
            middle, counted, temperature=temperature, gumbel_noise=gumbel_noise, key=keys[2]
        )
        codes = self.project_q(quantised)
        loss = masked = utterance = diversity = None
        if labels is not None:
            if counted is None:
                raise UsageError("Pre-training needs masks: give mask_time_indices, or a key and a mask_time_prob.")
            check_labels(labels, config.num_clusters, f"the model has {config.num_clusters} clusters")
            ratio = config.label_rate * config.inputs_to_logits_ratio / 16_000
            targets = targets_of_frames(jnp.asarray(labels), valid.shape[1], ratio)
            masked, count = masked_prediction(states, table, targets, counted, scale)
            if instances is None and keys[3] is not None:
                instances = sample_instances(keys[3], counted, config.cross_sample_instances)
            loss = masked + features_pen_weight * features_pen * count
            if instances is not None:
                diversity = diversity_loss(in_use, config) * count
                utterance = utterance_contrastive_loss(
                    self.speaker_proj(middle), codes, jnp.asarray(instances), counted, scale
                )
                loss = loss + utterance_weight * utterance * count + config.diversity_loss_weight * diversity
        return UniSpeechSatForPreTrainingOutput(
            loss=loss,
            logits=logits,
            projected_states=outputs.last_hidden_state,
            projected_quantized_states=codes,
            codevector_perplexity=in_use,
            hidden_states=outputs.hidden_states if wanted else None,
            attentions=outputs.attentions,
            masked_loss=masked,
            utterance_loss=utterance,
            diversity_loss=diversity,
            features_pen=features_pen,
        )


class UniSpeechSatForCTC(Wav2Vec2ForCTC):
    """§ "Experiments": a linear layer onto the letters, trained with CTC."""

    base_model_prefix = "unispeech_sat"
    base_class = UniSpeechSatModel


class UniSpeechSatForSequenceClassification(Wav2Vec2ForSequenceClassification):
    """§ "Experiments": a class for a recording (SUPERB's keywords, intents, speakers, emotions)."""

    base_model_prefix = "unispeech_sat"
    base_class = UniSpeechSatModel


class UniSpeechSatForAudioFrameClassification(Wav2Vec2ForAudioFrameClassification):
    """§ "Experiments": who speaks when (`microsoft/unispeech-sat-base-plus-sd`)."""

    base_model_prefix = "unispeech_sat"
    base_class = UniSpeechSatModel


class UniSpeechSatForXVector(Wav2Vec2ForXVector):
    """§ "Experiments": a vector for a speaker (`microsoft/unispeech-sat-base-plus-sv`)."""

    base_model_prefix = "unispeech_sat"
    base_class = UniSpeechSatModel


class UniSpeechSatForSpeakerVerification(Wav2Vec2ForSpeakerVerification):
    """Not in the paper; in the released checkpoints: speakers, by ECAPA-TDNN over all layers."""

    base_model_prefix = "unispeech_sat"
    base_class = UniSpeechSatModel
