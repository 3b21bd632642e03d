r"""# HuBERT: Self-Supervised Speech Representation Learning by Masked Prediction of Hidden Units

Wei-Ning Hsu, Benjamin Bolte, Yao-Hung Hubert Tsai, Kushal Lakhotia, Ruslan Salakhutdinov, Abdelrahman Mohamed, 2021,
arXiv 2106.07447.

The network is wav2vec 2.0's; what it learns from is new. Instead of telling codes apart that it learns at the same
time, it names the cluster that each hidden frame belongs to, and the clusters are made beforehand: by k-means on
cepstra, and once that has taught a first model, by k-means on a layer of that model. The clusters need not be right,
only the same for the same sound.

    waveform ── k-means (offline: cepstra, then a layer of the model before) ──> z (T,) ──────────┐
        │                                                                                 cross-entropy
        └── convolutions ── LN, Linear ── spans hidden ── Transformer ──> o (T, d) ── cos(A o, e_c)/τ
                                                               └── Linear ──> letters (CTC), classes

| paper | here |
| --- | --- |
| §II-A and §IV-B, hidden units by k-means | `audiozoo.decoding.units.KMeans`, `cepstra`, `units` |
| §II-B, Eq. 1; §II-E, Eq. 3 | `masked_prediction`, `HubertForPreTraining` |
| §II-C, Eq. 2, cluster ensembles | `num_clusters`, several `labels` |
| §II-D, iterative refinement | `audiozoo.decoding.units.units`, then `HubertForPreTraining` again |
| §II-E, implementation; Table I, sizes | `HubertConfig.base()`, `.large()`, `.xlarge()`, `HubertModel` |
| §II-E, the parts of BASE and of LARGE | `HubertFeatureProjection`, `HubertPositionalConvEmbedding`, `HubertEncoder…` |
| §II-E, fine-tuning | `HubertForCTC` |
| not in the paper; in the released checkpoints | `HubertForSequenceClassification`, `conv_pos_batch_norm` |
| not in the paper; wav2vec 2.0's heads over this network | `HubertForAudioFrameClassification`, `HubertForXVector` |
| not in the paper; in checkpoints released with WavLM | `HubertForSpeakerVerification` |

What differs from wav2vec 2.0: the objective; the first LayerNorm may be left out and the positional convolution may be
batch-normalised (checkpoints trained in bfloat16). `transformers` has no pre-training class for it; here it is, as in
fairseq. `frame_rule="samples"` counts a padded item's frames as the code did that HuBERT was released with, one more
than `transformers` does.

Checkpoints: `facebook/hubert-base-ls960`, `-large-ll60k`, `-xlarge-ll60k`, `-large-ls960-ft`, `-xlarge-ls960-ft`,
`superb/hubert-…`, fairseq's `hubert_base_ls960.pt`, `hubert_large_ll60k.pt`, `hubert_xtralarge_ll60k.pt` and the
fine-tuned ones, and scikit-learn's `hubert_base_ls960_L9_km500.bin` (`weights_conversion.hubert.read_kmeans`).

    import audiozoo
    from audiozoo.decoding.units import KMeans, deduplicate, units
    model = audiozoo.load("facebook/hubert-base-ls960")
    processor = audiozoo.load_processor("facebook/hubert-base-ls960")
    found, frames = deduplicate(units(model, processor, waveform, KMeans.load("km500.npz"), layer=9))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from audiozoo.errors import UsageError
from audiozoo.layers import Conv1d, Dropout, Linear
from audiozoo.layers.basic import unit_vectors
from audiozoo.layers.batch_norm import BatchNorm
from audiozoo.models.wav2vec2 import (
    Wav2Vec2Config,
    Wav2Vec2Encoder,
    Wav2Vec2EncoderStableLayerNorm,
    Wav2Vec2FeatureProjection,
    Wav2Vec2ForAudioFrameClassification,
    Wav2Vec2ForCTC,
    Wav2Vec2ForSequenceClassification,
    Wav2Vec2ForSpeakerVerification,
    Wav2Vec2ForXVector,
    Wav2Vec2Model,
    Wav2Vec2PositionalConvEmbedding,
    _WithBackbone,
    check_labels,
    features_penalty,
)
from audiozoo.outputs import ModelOutput


@dataclass(frozen=True)
class HubertConfig(Wav2Vec2Config):
    """Sizes of one checkpoint (Table I): wav2vec 2.0's, and what the paper adds."""

    feat_proj_layer_norm: bool = True  # whether a LayerNorm stands before the feature projection
    conv_pos_batch_norm: bool = False  # BatchNorm before the positional convolution instead of weight normalisation
    num_clusters: tuple[int, ...] = (504,)  # units of each set of labels (§II-C); 500 and fairseq's four special ones
    label_rate: float = 50.0  # labels a second; 100 for clusters of cepstra
    untie_final_proj: bool = False  # a projection for each set of labels
    frame_rule: str = "lengths"  # how padding is counted in frames; "samples" as in the released code

    @classmethod
    def base(cls) -> HubertConfig:
        """Table I, BASE: 12 blocks of width 768, pre-trained on 960 hours.

        94.4 M parameters; 94.7 M with the head of pre-training, which the table counts.
        """
        return cls()

    @classmethod
    def large(cls) -> HubertConfig:
        """Table I, LARGE: 24 pre-norm blocks of width 1024, pre-trained on 60,000 hours.

        315.4 M parameters; 316.6 M with the head of pre-training.
        """
        return cls(
            hidden_size=1024,
            num_hidden_layers=24,
            num_attention_heads=16,
            intermediate_size=4096,
            feat_extract_norm="layer",
            do_stable_layer_norm=True,
            conv_bias=True,
            codevector_dim=768,
            proj_codevector_dim=768,
        )

    @classmethod
    def xlarge(cls) -> HubertConfig:
        """Table I, X-LARGE: 48 pre-norm blocks of width 1280, heads of 80 channels.

        962.5 M parameters; 964.3 M with the head of pre-training.
        """
        return cls(
            hidden_size=1280,
            num_hidden_layers=48,
            num_attention_heads=16,
            intermediate_size=5120,
            feat_extract_norm="layer",
            do_stable_layer_norm=True,
            conv_bias=True,
            codevector_dim=1024,
            proj_codevector_dim=1024,
        )


# --- §II-E, the network: where it is not wav2vec 2.0's ----------------------------------------------------------------


class HubertFeatureProjection(Wav2Vec2FeatureProjection):
    """§II-E, from the features' width to the Transformer's; in some released checkpoints without the LayerNorm."""

    def __init__(self, config: Any, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        super().__init__(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        if not config.feat_proj_layer_norm:
            del self.layer_norm

    def __call__(
        self, x: Float[Array, "batch frames features"], dropout: Dropout
    ) -> tuple[Float[Array, "batch frames hidden"], Float[Array, "batch frames features"]]:
        """The Transformer's input, and the features as they were projected."""
        if hasattr(self, "layer_norm"):
            x = self.layer_norm(x)
        return dropout(self.projection(x), self.config.feat_proj_dropout), x


class HubertPositionalConvEmbedding(Wav2Vec2PositionalConvEmbedding):
    """§II-E, the positional convolution; in released checkpoints trained in bfloat16 behind a BatchNorm.

    In training (with a `key`) it normalises by the batch, padding included, and its running statistics move a step;
    they are `nnx.BatchStat`s.
    """

    def __init__(self, config: Any, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        super().__init__(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        if config.conv_pos_batch_norm:
            kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
            taps, groups = config.num_conv_pos_embeddings, config.num_conv_pos_embedding_groups
            self.conv: Any = Conv1d(
                config.hidden_size, config.hidden_size, taps, padding=taps // 2, groups=groups, **kwargs
            )
            self.batch_norm = BatchNorm(config.hidden_size, **kwargs)
            # PyTorch counts along; of no use otherwise.
            self.num_batches_tracked = nnx.BatchStat(jnp.zeros((), jnp.int32))

    def __call__(
        self, x: Float[Array, "batch frames hidden"], training: bool = False
    ) -> Float[Array, "batch frames hidden"]:
        """What is added to the frames."""
        if hasattr(self, "batch_norm"):
            x = self.batch_norm(x, training)
            if training:
                self.num_batches_tracked[...] += 1
        return super().__call__(x)


class HubertEncoder(Wav2Vec2Encoder):
    """§II-E, the Transformer of BASE."""

    positional_class = HubertPositionalConvEmbedding


class HubertEncoderStableLayerNorm(Wav2Vec2EncoderStableLayerNorm):
    """§II-E, the Transformer of LARGE and X-LARGE: pre-norm blocks and a last LayerNorm."""

    positional_class = HubertPositionalConvEmbedding


class HubertModel(Wav2Vec2Model):
    """§II-E and Figure 1: convolutions, masking, Transformer."""

    feature_projection_class = HubertFeatureProjection
    encoder_class = HubertEncoder
    stable_encoder_class = HubertEncoderStableLayerNorm

    @property
    def frame_rule(self) -> str:  # type: ignore[override]
        """How padding is counted in frames."""
        return self.config.frame_rule


# --- §II-B to §II-E, masked prediction of hidden units ----------------------------------------------------------------


def targets_of_frames(
    labels: Int[Array, "batch labels"], frames: int, labels_a_frame: float
) -> Int[Array, "batch frames"]:
    """The label of each frame, where labels come at another rate; -100 for frames behind the last label."""
    index = np.floor(np.arange(frames, dtype=np.float32) * np.float32(labels_a_frame)).astype(np.int64)
    targets = labels[:, np.minimum(index, labels.shape[1] - 1)]
    return jnp.where(index < labels.shape[1], targets, -100)


def cluster_logits(
    states: Float[Array, "batch frames width"], embeddings: Float[Array, "clusters width"], temperature: float = 0.1
) -> Float[Array, "batch frames clusters"]:
    r"""§II-E, Eq. 3, the exponents: $\mathrm{sim}(A\,o_t, e_c)/\tau$, cosines in at least float32."""
    wide = jnp.promote_types(states.dtype, jnp.float32)
    cosines = jnp.einsum("btd,cd->btc", unit_vectors(states.astype(wide)), unit_vectors(embeddings.astype(wide)))
    return cosines / temperature


def masked_prediction(
    states: Float[Array, "batch frames width"],
    embeddings: Float[Array, "clusters width"],
    targets: Int[Array, "batch frames"],
    counted: Bool[Array, "batch frames"],
    temperature: float = 0.1,
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    r"""§II-B, Eq. 1, and §II-E, Eq. 3, over the frames that count:

    $$-\sum_t \log \frac{\exp(\mathrm{sim}(A\,o_t, e_{z_t})/\tau)}{\sum_c \exp(\mathrm{sim}(A\,o_t, e_c)/\tau)}$$

    Args:
        states: projected outputs $A\,o$.
        embeddings: $e$, one for each cluster.
        targets: $z$; -100 is left out.
        counted: which frames count.
        temperature: $\tau$.

    Returns:
        The sum, and the number of frames in it.
    """
    counted = counted & (targets >= 0)
    logits = cluster_logits(states, embeddings, temperature)
    chosen = jnp.take_along_axis(logits, jnp.where(counted, targets, 0)[..., None], axis=-1)[..., 0]
    losses = jax.nn.logsumexp(logits, axis=-1) - chosen
    return jnp.where(counted, losses, 0).sum(), counted.sum()


class HubertForPreTrainingOutput(ModelOutput):
    """§II-B: the loss and its parts, sums over frames and sets of labels; `features_pen` before its weight."""

    loss: Float[Array, ""] | None = None
    logits: tuple[Float[Array, "batch frames clusters"], ...] | None = None
    hidden_states: tuple[Float[Array, "batch time channels"], ...] | None = None
    attentions: tuple[Float[Array, "batch heads query key"], ...] | None = None
    masked_loss: Float[Array, ""] | None = None
    unmasked_loss: Float[Array, ""] | None = None
    features_pen: Float[Array, ""] | None = None


class HubertForPreTraining(_WithBackbone):
    r"""§II-B: $L = \alpha L_m + (1 - \alpha) L_u$, the cross-entropy over masked and over other frames.

    With several sets of labels (§II-C) the losses add up. Of the recipe only: a penalty on the features.
    """

    base_model_prefix = "hubert"
    base_class = HubertModel

    def __init__(self, config: Any, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        super().__init__(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        width, sets = config.proj_codevector_dim, len(config.num_clusters)
        self.final_proj = Linear(
            config.hidden_size,
            width * (sets if config.untie_final_proj else 1),
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        shape = (sum(config.num_clusters), width)
        self.label_embeddings = nnx.Param(jax.random.uniform(rngs.params(), shape, param_dtype))

    def logits(self, states: Float[Array, "batch frames hidden"]) -> tuple[Float[Array, "batch frames clusters"], ...]:
        """§II-E, Eq. 3, the exponents for every set of labels."""
        return tuple(
            cluster_logits(x, e, self.config.contrastive_logits_temperature) for x, e in self._projected(states)
        )

    def _projected(self, states: jax.Array) -> list[tuple[jax.Array, jax.Array]]:
        """For every set of labels the projected states and the embeddings."""
        config, sets = self.config, len(self.config.num_clusters)
        projected = self.final_proj(states)
        parts = jnp.split(projected, sets, axis=-1) if config.untie_final_proj else [projected] * sets
        edges = np.cumsum(config.num_clusters)[:-1]
        return list(zip(parts, jnp.split(self.label_embeddings[...], edges), strict=True))

    def __call__(
        self,
        input_values: Float[Array, "batch samples"],
        attention_mask: Int[Array, "batch samples"] | None = None,
        labels: Int[Array, "batch labels"] | Sequence[Int[Array, "batch labels"]] | None = None,
        *,
        mask_time_indices: Bool[Array, "batch frames"] | None = None,
        alpha: float = 1.0,
        features_pen_weight: float | Float[Array, ""] = 0.0,
        key: jax.Array | None = None,
        **options: Any,
    ) -> HubertForPreTrainingOutput:
        r"""Predictions and, with `labels`, the loss.

        Args:
            input_values: waveforms at 16 kHz.
            attention_mask: 1 for a sample of the recording, 0 for padding behind it.
            labels: clusters, `label_rate` a second, of every set of labels; -100 is left out. Frames behind the last
                one are left out too. (The released code cuts them off before the Transformer.) In a checkpoint of
                fairseq's, whose first four classes are special ones, cluster $k$ is $k + 4$.
            mask_time_indices: frames to mask and to predict; drawn if there is a `key`.
            alpha: $\alpha$; 1, as in the released models, counts the masked frames alone.
            features_pen_weight: weight of the mean square of the features, for each frame that counts (10 in BASE's
                recipe).
            key: switches dropout, layer drop and masking on.
            options: see `Wav2Vec2Model`.

        Returns:
            `logits` of every set of labels; with labels `loss`, a sum over frames, and its parts.

        Raises:
            UsageError: if there are labels and no mask, not as many sets as the model has, or a label is no cluster.
        """
        config = self.config
        keys = [None, None] if key is None else list(jax.random.split(key))
        spans, valid = self.frames_to_predict(input_values, attention_mask, mask_time_indices, keys[0])
        outputs = self.backbone(input_values, attention_mask, spans, key=keys[1], **options)
        features_pen = features_penalty(outputs.conv_features)
        loss = masked = unmasked = None
        if labels is not None:
            sets = self._sets(labels)
            if spans is None:
                raise UsageError("Pre-training needs masks: give mask_time_indices, or a key and a mask_time_prob.")
            ratio = config.label_rate * config.inputs_to_logits_ratio / 16_000
            masked = unmasked = jnp.zeros((), features_pen.dtype)
            counts = []
            for (states, embeddings), row in zip(self._projected(outputs.last_hidden_state), sets, strict=True):
                targets = targets_of_frames(row, valid.shape[1], ratio)
                temperature = config.contrastive_logits_temperature
                more, count = masked_prediction(states, embeddings, targets, spans & valid, temperature)
                others, rest = masked_prediction(states, embeddings, targets, ~spans & valid, temperature)
                masked, unmasked = masked + more, unmasked + others
                counts.append((count, rest))
            # $L = \alpha L_m + (1 - \alpha) L_u$
            loss = alpha * masked + (1 - alpha) * unmasked
            total = counts[0][0] * (alpha > 0) + counts[0][1] * (alpha < 1)
            loss = loss + features_pen_weight * features_pen * total
        return HubertForPreTrainingOutput(
            loss=loss,
            logits=self.logits(outputs.last_hidden_state),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            masked_loss=masked,
            unmasked_loss=unmasked,
            features_pen=features_pen,
        )

    def _sets(self, labels: Any) -> list[jax.Array]:
        """The sets of labels, checked."""
        clusters = self.config.num_clusters
        several = isinstance(labels, Sequence) or np.ndim(labels) == 3
        sets = list(labels) if several else [labels]
        if len(sets) != len(clusters):
            raise UsageError(f"The model predicts {len(clusters)} sets of labels; {len(sets)} are given.")
        for row, count in zip(sets, clusters, strict=True):
            check_labels(row, count, f"the model has {count} clusters")
        return [jnp.asarray(row) for row in sets]


# --- §II-E, fine-tuning, and the heads of the released checkpoints ----------------------------------------------------


class HubertForCTC(Wav2Vec2ForCTC):
    """§II-E, fine-tuning: a linear layer onto the letters, trained with CTC."""

    base_model_prefix = "hubert"
    base_class = HubertModel


class HubertForSequenceClassification(Wav2Vec2ForSequenceClassification):
    """Not in the paper; in the released checkpoints: a class for a recording."""

    base_model_prefix = "hubert"
    base_class = HubertModel


class HubertForAudioFrameClassification(Wav2Vec2ForAudioFrameClassification):
    """Not in the paper, nor in `transformers`: a class for every frame."""

    base_model_prefix = "hubert"
    base_class = HubertModel


class HubertForXVector(Wav2Vec2ForXVector):
    """Not in the paper, nor in `transformers`: an x-vector for a speaker."""

    base_model_prefix = "hubert"
    base_class = HubertModel


class HubertForSpeakerVerification(Wav2Vec2ForSpeakerVerification):
    """Not in the paper; in checkpoints released with WavLM: speakers, by ECAPA-TDNN over all layers."""

    base_model_prefix = "hubert"
    base_class = HubertModel
