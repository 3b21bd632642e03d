r"""# UniSpeech: Unified Speech Representation Learning with Labeled and Unlabeled Data

Chengyi Wang, Yu Wu, Yao Qian, Kenichi Kumatani, Shujie Liu, Furu Wei, Michael Zeng, Xuedong Huang, 2021,
arXiv 2101.07597.

What wav2vec 2.0 learns without text need not be what a recogniser wants. UniSpeech has labelled speech in rich
languages and trains on both at once: wav2vec 2.0's contrastive loss, and a CTC loss over phonemes. To make the
*codebooks* phonetic, the CTC head reads, at every other frame or so, the quantised features in place of the
Transformer's output. The network then goes on to poor languages, with the contrastive loss alone and a CTC head of
their own.

    waveform ── wav2vec 2.0's convolutions ──> z ──┬─> product quantiser ─> Linear ─> Linear ─> q (T, d)
                                                   │                                    │      │
      Linear ── spans masked ── Transformer ──> c (T, d) ───────── contrastive loss ────┘      │
                                                   └── each frame: c, or q with chance r ──────┘
                                                        └── Linear ──> phonemes, CTC

| paper | here |
| --- | --- |
| § "Model structure": encoder, quantiser | wav2vec 2.0's, imported from its file; `UniSpeechModel` |
| § "Unified training", the multitask loss | `UniSpeechForPreTraining` |
| the same, replacement of $c$ by $q$ | `replace_states` |
| § "Experiments", sizes | `UniSpeechConfig.large()` |
| fine-tuning | `UniSpeechForCTC` |
| not in the paper; in the released checkpoints | `UniSpeechForSequenceClassification` |

Predictions and codes are compared in the Transformer's width: the codes are projected, and the context is not.
Distractors come from all frames of the utterance, masked or not, as in the released recipe.

Where `transformers` and this file part: its pre-training class returns neither a loss nor CTC logits, draws
replacements in evaluation too, and counts the codebooks' use over all frames; here the objective is complete,
replacements are drawn with a `key` or given, and masked frames count. For a pre-norm model the last of the hidden
states is normalised (`hidden_states_before_norm=True` gives what its version 5 returns).

Checkpoints: `microsoft/unispeech-large-1500h-cv`, `-large-multi-lingual-1500h-cv`,
`patrickvonplaten/unispeech-large-1500h-cv-timit`, and Microsoft's fairseq `.pt` files.

    import audiozoo
    model = audiozoo.load("patrickvonplaten/unispeech-large-1500h-cv-timit")
    processor = audiozoo.load_processor("patrickvonplaten/unispeech-large-1500h-cv-timit")
    logits = model(**processor(waveform, sampling_rate=16_000)).logits
    text = processor.batch_decode(logits.argmax(-1))
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from audiozoo.errors import UsageError
from audiozoo.layers import Dropout, Linear
from audiozoo.layers.basic import at_least_float32
from audiozoo.layers.losses import ctc_loss
from audiozoo.models.wav2vec2 import (
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
    Wav2Vec2ForSequenceClassification,
    Wav2Vec2GumbelVectorQuantizer,
    Wav2Vec2Model,
    _WithBackbone,
    check_labels,
    contrastive_logits,
    contrastive_loss,
    diversity_loss,
    features_penalty,
    sample_negative_indices,
)
from audiozoo.outputs import ModelOutput


@dataclass(frozen=True)
class UniSpeechConfig(Wav2Vec2Config):
    """Sizes of one checkpoint (§ "Experiments"): wav2vec 2.0's, and what the paper adds."""

    num_ctc_classes: int = 80  # phonemes of the pre-training head, the blank among them
    replace_prob: float = 0.5  # r, chance that the CTC head reads a frame's code
    multitask_weight: float = 0.5  # α, weight of the CTC loss in pre-training; the contrastive one has 1 - α
    ctc_loss_reduction: str = "mean"  # over the batch in fine-tuning: "sum", "mean"

    @classmethod
    def large(cls) -> UniSpeechConfig:
        """§ "Experiments": 24 pre-norm blocks of width 1024, LayerNorm in the convolutions."""
        return cls(
            hidden_size=1024,
            num_hidden_layers=24,
            num_attention_heads=16,
            intermediate_size=4096,
            codevector_dim=768,
            proj_codevector_dim=768,
            feat_extract_norm="layer",
            conv_bias=True,
            do_stable_layer_norm=True,
        )


class UniSpeechModel(Wav2Vec2Model):
    """§ "Model structure": wav2vec 2.0's network as it is."""


def replace_states(
    context: Float[Array, "batch frames hidden"],
    codes: Float[Array, "batch frames hidden"],
    replaced: Bool[Array, "batch frames"] | None,
) -> Float[Array, "batch frames hidden"]:
    """§ "Unified training": what the CTC head reads: the codes at the replaced frames, the context elsewhere."""
    return context if replaced is None else jnp.where(jnp.asarray(replaced, bool)[..., None], codes, context)


class UniSpeechForPreTrainingOutput(ModelOutput):
    """§ "Unified training": the loss, a sum over the batch, and its parts."""

    loss: Float[Array, ""] | None = None
    projected_states: Float[Array, "batch frames hidden"] | None = None
    projected_quantized_states: Float[Array, "batch frames hidden"] | None = None
    codevector_perplexity: Float[Array, ""] | None = None
    hidden_states: tuple[Float[Array, "batch time channels"], ...] | None = None
    attentions: tuple[Float[Array, "batch heads query key"], ...] | None = None
    ctc_logits: Float[Array, "batch frames classes"] | None = None
    ctc_loss: Float[Array, ""] | None = None
    contrastive_loss: Float[Array, ""] | None = None
    diversity_loss: Float[Array, ""] | None = None
    features_pen: Float[Array, ""] | None = None


class UniSpeechForPreTraining(_WithBackbone):
    r"""§ "Unified training":

    $$\mathcal L = \alpha\, \mathcal L_\text{ctc} + (1 - \alpha)\,(\mathcal L_c + 0.1\, \mathcal L_d)$$

    with wav2vec 2.0's contrastive and diversity losses (arXiv 2006.11477, Eq. 3 and 4), each a sum over masked frames,
    and a CTC loss summed over the batch. $\alpha = 0$, or no labels, is the second stage, on speech without text.
    """

    base_model_prefix = "unispeech"
    base_class = UniSpeechModel

    def __init__(self, config: Any, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        super().__init__(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        linear = kwargs | {"kernel_init": nnx.initializers.normal(config.initializer_range)}
        self.quantizer = Wav2Vec2GumbelVectorQuantizer(config, **kwargs)
        self.project_q = Linear(config.codevector_dim, config.proj_codevector_dim, **linear)
        self.project_hid = Linear(config.proj_codevector_dim, config.hidden_size, **linear)
        self.ctc_proj = Linear(config.hidden_size, config.num_ctc_classes, **linear)

    def __call__(
        self,
        input_values: Float[Array, "batch samples"],
        attention_mask: Int[Array, "batch samples"] | None = None,
        mask_time_indices: Bool[Array, "batch frames"] | None = None,
        sampled_negative_indices: Int[Array, "batch frames negatives"] | None = None,
        labels: Int[Array, "batch tokens"] | None = None,
        *,
        replaced: Bool[Array, "batch frames"] | None = None,
        temperature: float | Float[Array, ""] = 2.0,
        gumbel_noise: Float[Array, "batch frames groups entries"] | None = None,
        gumbel_noise_everywhere: Float[Array, "batch frames groups entries"] | None = None,
        features_pen_weight: float | Float[Array, ""] = 0.0,
        key: jax.Array | None = None,
        **options: Any,
    ) -> UniSpeechForPreTrainingOutput:
        r"""Predictions, codes, phonemes and, in training, the loss.

        Args:
            input_values: waveforms at 16 kHz.
            attention_mask: 1 for a sample of the recording, 0 for padding behind it.
            mask_time_indices: frames to mask and to predict; drawn if there is a `key`.
            sampled_negative_indices: distractors of each frame, counted through the batch; drawn from all frames of
                the utterance if there is a `key`. With neither there is no contrastive loss.
            labels: phonemes; -100 and the blank (`pad_token_id`) are left out. Without them, and of an utterance that
                has none, there is no CTC loss.
            replaced: frames of which the CTC head reads the code; drawn with probability $r$ if there is a `key`.
            temperature: $\tau$ of the Gumbel softmax (see `audiozoo.models.wav2vec2.gumbel_temperature`).
            gumbel_noise: for the codes of the masked frames; drawn if there is a `key`.
            gumbel_noise_everywhere: for a second quantisation, which distractors and replacements come from; drawn if
                there is a `key`.
            features_pen_weight: weight of the mean square of the features, for each masked frame.
            key: switches dropout, layer drop, masking, sampling, replacement and noise on.
            options: see `Wav2Vec2Model`.

        Returns:
            `projected_states`, $c$, and `projected_quantized_states`, $q$ of all frames; `ctc_logits`; with
            negatives or labels `loss`, and its parts.
        """
        config = self.config
        keys = [None] * 8 if key is None else list(jax.random.split(key, 8))
        mask_time_indices, valid = self.frames_to_predict(input_values, attention_mask, mask_time_indices, keys[0])
        if mask_time_indices is None and key is not None:
            raise UsageError("Pre-training needs masks: apply_spec_augment with a mask_time_prob above 0.")
        outputs = self.backbone(input_values, attention_mask, mask_time_indices, key=keys[1], **options)
        context = outputs.last_hidden_state
        features_pen = features_penalty(outputs.conv_features)
        unmasked = Dropout(keys[2])(outputs.extract_features, config.feat_quantizer_dropout)
        quantised, in_use, codes = self.quantizer(
            unmasked, mask_time_indices, temperature=temperature, gumbel_noise=gumbel_noise, key=keys[3]
        )
        everywhere, _, codes_everywhere = self.quantizer(
            unmasked, temperature=temperature, gumbel_noise=gumbel_noise_everywhere, key=keys[4]
        )
        truth, everywhere = (self.project_hid(self.project_q(q)) for q in (quantised, everywhere))
        if replaced is None and keys[5] is not None:
            replaced = jax.random.uniform(keys[5], valid.shape) < config.replace_prob
        mixed = Dropout(keys[6])(replace_states(context, everywhere, replaced), config.final_dropout)
        ctc_logits = self.ctc_proj(mixed)
        if sampled_negative_indices is None and keys[7] is not None:
            sampled_negative_indices = sample_negative_indices(keys[7], valid, config.num_negatives)
        loss = contrastive = diversity = ctc = None
        if sampled_negative_indices is not None:
            if mask_time_indices is None:
                raise UsageError("Give mask_time_indices together with sampled_negative_indices.")
            chosen = jnp.asarray(sampled_negative_indices)
            negatives = at_least_float32(everywhere).reshape(-1, everywhere.shape[-1])[chosen]
            same = (codes_everywhere.reshape(-1, codes.shape[-1])[chosen] == codes[:, :, None]).all(axis=-1)
            logits = contrastive_logits(context, truth, negatives, config.contrastive_logits_temperature, same)
            count = mask_time_indices.sum()
            contrastive = contrastive_loss(logits, mask_time_indices)
            diversity = diversity_loss(in_use, config) * count
            loss = contrastive + config.diversity_loss_weight * diversity + features_pen_weight * features_pen * count
        if labels is not None:
            check_labels(labels, config.num_ctc_classes, f"the pre-training head has {config.num_ctc_classes} classes")
            phonemes = jnp.asarray(labels)
            losses = ctc_loss(
                ctc_logits,
                phonemes,
                valid.sum(axis=1),
                blank=config.pad_token_id,
                reduction="none",
                zero_infinity=config.ctc_zero_infinity,
            )
            known = ((phonemes >= 0) & (phonemes != config.pad_token_id)).any(axis=1)
            ctc = jnp.where(known, losses, 0).sum()
            own = config.multitask_weight * ctc
            loss = own if loss is None else own + (1.0 - config.multitask_weight) * loss
        return UniSpeechForPreTrainingOutput(
            loss=loss,
            projected_states=context,
            projected_quantized_states=everywhere,
            codevector_perplexity=in_use,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            ctc_logits=ctc_logits,
            ctc_loss=ctc,
            contrastive_loss=contrastive,
            diversity_loss=diversity,
            features_pen=features_pen,
        )


class UniSpeechForCTC(Wav2Vec2ForCTC):
    """§ "Unified training", fine-tuning: a linear layer onto the letters or phonemes of a language, with CTC."""

    base_model_prefix = "unispeech"
    base_class = UniSpeechModel


class UniSpeechForSequenceClassification(Wav2Vec2ForSequenceClassification):
    """Not in the paper; in the released checkpoints: a class for a recording."""

    base_model_prefix = "unispeech"
    base_class = UniSpeechModel
