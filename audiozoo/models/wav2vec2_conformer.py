r"""# wav2vec2-Conformer, of: fairseq S2T: Fast Speech-to-Text Modeling with fairseq

Changhan Wang, Yun Tang, Xutai Ma, Anne Wu, Sravya Popuri, Dmytro Okhonko, Juan Pino, 2020, arXiv 2010.05171.

wav2vec 2.0 with other blocks: those of the Conformer, in which a convolution stands behind attention. Where a frame
lies is no longer told by a convolution in front of them but in each block's attention, by the distance of two frames
or by a rotation of each. Everything else is wav2vec 2.0's: the convolutions that hear, what is masked, the quantiser,
the contrastive task, and the heads that are trained afterwards. What fairseq's S2T says of it, in its later version, is
a size (Table 3) and word error rates (Table 4); the network is described in no paper.

    waveform 16 kHz ── 7 × [Conv, LN, GELU], 320 samples a frame ──> z (T, 512) ── LN ──┬─> product quantiser ─> q
                                                                                        │                       │
      Linear ──> (T, d) ── spans replaced by one learned vector                         │            contrastive loss
      ── N × Conformer block: ½ FFN, attention, convolution, ½ FFN, LN ── LN ──> c (T, d) ──────────────────────┘
                                        └── Linear ──> logits (T, letters) ── CTC

| paper | here |
| --- | --- |
| wav2vec 2.0 (arXiv 2006.11477), §2, feature encoder, quantiser; §3.1, masking | `audiozoo.models.wav2vec2` |
| Conformer (arXiv 2005.08100), §2: blocks; relative positions | `audiozoo.models.conformer` |
| RoFormer (arXiv 2104.09864), Eq. 34: rotary positions | `audiozoo.models.conformer.rotate` |
| both, one behind the other | `Wav2Vec2ConformerEncoder`, `Wav2Vec2ConformerModel` |
| wav2vec 2.0, §3.2 and §3.3: objective, fine-tuning | `Wav2Vec2ConformerForPreTraining`, `Wav2Vec2ConformerForCTC` |
| not in the paper; in fine-tuned checkpoints: classes | `Wav2Vec2ConformerForSequenceClassification` |
| the same, of frames; speakers | `Wav2Vec2ConformerForAudioFrameClassification`, `Wav2Vec2ConformerForXVector` |
| sizes of the released checkpoints | `Wav2Vec2ConformerConfig.rel_pos_large()`, `.rope_large()` |

Where `transformers` and this file part: last hidden states and x-vectors, as in wav2vec 2.0's file. As in the released
code the blocks' convolutions see what stands in the padding behind a shorter item of a batch, so that its last frames
depend on its neighbours; a configuration of `masked_convolution=True` keeps it out, and a padded batch equals its items
one by one. What transcribes, aligns and identifies hears with it.

Checkpoints: `facebook/wav2vec2-conformer-rel-pos-large`, `-rel-pos-large-100h-ft`, `-rel-pos-large-960h-ft`,
`facebook/wav2vec2-conformer-rope-large`, `-rope-large-100h-ft`, `-rope-large-960h-ft`, and fairseq's files of the same
models.

    import audiozoo
    model = audiozoo.load("facebook/wav2vec2-conformer-rel-pos-large-960h-ft")
    processor = audiozoo.load_processor("facebook/wav2vec2-conformer-rel-pos-large-960h-ft")
    logits = model(**processor(waveform, sampling_rate=16_000)).logits
    text = processor.batch_decode(logits.argmax(-1))
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from audiozoo.errors import CheckpointError
from audiozoo.layers import Dropout
from audiozoo.models.conformer import ConformerConfig, ConformerEncoder
from audiozoo.models.wav2vec2 import (
    Wav2Vec2Config,
    Wav2Vec2ForAudioFrameClassification,
    Wav2Vec2ForCTC,
    Wav2Vec2ForPreTraining,
    Wav2Vec2ForSequenceClassification,
    Wav2Vec2ForXVector,
    Wav2Vec2Model,
    Wav2Vec2PositionalConvEmbedding,
)
from audiozoo.outputs import BaseModelOutput


@dataclass(frozen=True)
class Wav2Vec2ConformerConfig(Wav2Vec2Config):
    """Not in the paper; in the released checkpoints: wav2vec 2.0's sizes, and those of the blocks."""

    position_embeddings_type: str | None = "relative"  # "rotary", or None; see `ConformerConfig`
    rotary_embedding_base: int = 10_000  # "rotary": longest period / 2π
    max_source_positions: int = 5000  # kept for export: "relative" positions have no end
    conv_depthwise_kernel_size: int = 31  # frames that a block's convolution sees
    conformer_conv_dropout: float = 0.1  # behind the convolution module
    masked_convolution: bool = False  # whether a block's convolution sees zeros in place of padding

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.position_embeddings_type not in ("relative", "rotary", None):
            raise CheckpointError(
                f"position_embeddings_type is {self.position_embeddings_type!r}; there are relative, rotary and None."
            )
        if self.conv_depthwise_kernel_size % 2 == 0:
            raise CheckpointError(f"conv_depthwise_kernel_size is odd; {self.conv_depthwise_kernel_size} is not.")

    @property
    def conformer(self) -> ConformerConfig:
        """The blocks."""
        return ConformerConfig.of_speech_encoder(
            self, layer_norm_eps=self.layer_norm_eps, masked_convolution=self.masked_convolution
        )

    @classmethod
    def rel_pos_large(cls) -> Wav2Vec2ConformerConfig:
        """`rel-pos-large`: 24 blocks of width 1024 with relative positions, 621 M parameters with the quantiser."""
        return dataclasses.replace(cls.large_lv60(), hidden_act="swish")  # type: ignore[return-value]

    @classmethod
    def rope_large(cls) -> Wav2Vec2ConformerConfig:
        """`rope-large`: the same with rotary positions, 595 M parameters with the quantiser."""
        return dataclasses.replace(cls.rel_pos_large(), position_embeddings_type="rotary")


class Wav2Vec2ConformerEncoder(ConformerEncoder):
    r"""Not in the paper; in the released checkpoints: the Conformer in place of the Transformer $g: Z \to C$.

    `pos_conv_embed`, wav2vec 2.0's positional convolution, is in every checkpoint and in nothing that is computed.
    """

    def __init__(
        self, config: Wav2Vec2ConformerConfig, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs
    ):
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        super().__init__(config.conformer, **kwargs)
        self.pos_conv_embed = Wav2Vec2PositionalConvEmbedding(config, **kwargs)

    def __call__(
        self,
        x: Float[Array, "batch frames hidden"],
        mask: Bool[Array, "batch frames"] | None = None,
        *,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        hidden_states_before_norm: bool = False,
        dropout: Dropout | None = None,
    ) -> BaseModelOutput:
        """Contextualized representations; see `audiozoo.models.wav2vec2.Wav2Vec2Encoder`."""
        output = super().__call__(
            x, mask, output_attentions=output_attentions, output_hidden_states=output_hidden_states, dropout=dropout
        )
        if output.hidden_states is not None and not hidden_states_before_norm:
            output.hidden_states = (*output.hidden_states[:-1], output.last_hidden_state)
        return output


class Wav2Vec2ConformerModel(Wav2Vec2Model):
    """Not in the paper; in the released checkpoints: feature encoder, masking, and the Conformer."""

    encoder_class = stable_encoder_class = Wav2Vec2ConformerEncoder


class _OfConformer:
    """The heads of wav2vec 2.0 over `Wav2Vec2ConformerModel`."""

    base_model_prefix: ClassVar[str] = "wav2vec2_conformer"
    base_class: ClassVar[type] = Wav2Vec2ConformerModel


class Wav2Vec2ConformerForPreTraining(_OfConformer, Wav2Vec2ForPreTraining):
    """wav2vec 2.0, §3.2: the contrastive and the diversity loss."""


class Wav2Vec2ConformerForCTC(_OfConformer, Wav2Vec2ForCTC):
    """wav2vec 2.0, §3.3: a linear layer onto the letters, trained with CTC."""


class Wav2Vec2ConformerForSequenceClassification(_OfConformer, Wav2Vec2ForSequenceClassification):
    """Not in the paper; in fine-tuned checkpoints: a class for a recording."""


class Wav2Vec2ConformerForAudioFrameClassification(_OfConformer, Wav2Vec2ForAudioFrameClassification):
    """Not in the paper; in fine-tuned checkpoints: a class for every frame."""


class Wav2Vec2ConformerForXVector(_OfConformer, Wav2Vec2ForXVector):
    """Not in the paper; in fine-tuned checkpoints: an embedding of the speaker."""
