"""What models return: pytrees whose fields carry the names that `transformers` gives them.

A field that a call did not compute is `None`. Sequences of per-layer arrays are tuples, the embedding output first, as
in `transformers`. All arrays are channels-last, `(batch, time, channels)`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, dataclass_transform

import jax
from jaxtyping import Array, Float

ABSENT: Any = None  # the default of fields that every ordinary call computes


@dataclass_transform()
class ModelOutput:
    """Base of the output dataclasses: a pytree, with `output["logits"]`, iteration over what is set, and `keys()`."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Make every subclass a dataclass and a pytree."""
        super().__init_subclass__(**kwargs)
        dataclasses.dataclass(cls)
        jax.tree_util.register_dataclass(cls, [f.name for f in dataclasses.fields(cls)], [])  # type: ignore[arg-type]

    def keys(self) -> list[str]:
        """The names of the fields that are set."""
        return [f.name for f in dataclasses.fields(self) if getattr(self, f.name) is not None]  # type: ignore[arg-type]

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())


class BaseModelOutput(ModelOutput):
    """An encoder's output."""

    last_hidden_state: Float[Array, "batch time channels"] = ABSENT
    hidden_states: tuple[Float[Array, "batch time channels"], ...] | None = None
    attentions: tuple[Float[Array, "batch heads query key"], ...] | None = None


class BaseModelOutputWithPooling(ModelOutput):
    """An encoder's output, with one vector for the whole input."""

    last_hidden_state: Float[Array, "batch time channels"] = ABSENT
    pooler_output: Float[Array, "batch channels"] = ABSENT
    hidden_states: tuple[Float[Array, "batch time channels"], ...] | None = None
    attentions: tuple[Float[Array, "batch heads query key"], ...] | None = None


class DecoderOutput(ModelOutput):
    """A decoder's output, with the cache that the next call takes."""

    last_hidden_state: Float[Array, "batch time channels"] = ABSENT
    past_key_values: Any = None
    hidden_states: tuple[Float[Array, "batch time channels"], ...] | None = None
    attentions: tuple[Float[Array, "batch heads query key"], ...] | None = None
    cross_attentions: tuple[Float[Array, "batch heads query key"], ...] | None = None


class Seq2SeqModelOutput(ModelOutput):
    """An encoder-decoder's output without a head."""

    last_hidden_state: Float[Array, "batch time channels"] = ABSENT
    past_key_values: Any = None
    decoder_hidden_states: tuple[Float[Array, "batch time channels"], ...] | None = None
    decoder_attentions: tuple[Float[Array, "batch heads query key"], ...] | None = None
    cross_attentions: tuple[Float[Array, "batch heads query key"], ...] | None = None
    encoder_last_hidden_state: Float[Array, "batch time channels"] | None = None
    encoder_hidden_states: tuple[Float[Array, "batch time channels"], ...] | None = None
    encoder_attentions: tuple[Float[Array, "batch heads query key"], ...] | None = None


class Seq2SeqLMOutput(ModelOutput):
    """An encoder-decoder's output with a language-model head."""

    loss: Float[Array, ""] | None = None
    logits: Float[Array, "batch time vocabulary"] = ABSENT
    past_key_values: Any = None
    decoder_hidden_states: tuple[Float[Array, "batch time channels"], ...] | None = None
    decoder_attentions: tuple[Float[Array, "batch heads query key"], ...] | None = None
    cross_attentions: tuple[Float[Array, "batch heads query key"], ...] | None = None
    encoder_last_hidden_state: Float[Array, "batch time channels"] | None = None
    encoder_hidden_states: tuple[Float[Array, "batch time channels"], ...] | None = None
    encoder_attentions: tuple[Float[Array, "batch heads query key"], ...] | None = None


class CausalLMOutput(ModelOutput):
    """A decoder's output with a language-model (or CTC) head."""

    loss: Float[Array, ""] | None = None
    logits: Float[Array, "batch time vocabulary"] = ABSENT
    past_key_values: Any = None
    hidden_states: tuple[Float[Array, "batch time channels"], ...] | None = None
    attentions: tuple[Float[Array, "batch heads query key"], ...] | None = None
    cross_attentions: tuple[Float[Array, "batch heads query key"], ...] | None = None


class SequenceClassifierOutput(ModelOutput):
    """A classifier's output, one row of logits for each item."""

    loss: Float[Array, ""] | None = None
    logits: Float[Array, "batch labels"] = ABSENT
    hidden_states: tuple[Float[Array, "batch time channels"], ...] | None = None
    attentions: tuple[Float[Array, "batch heads query key"], ...] | None = None


class TokenClassifierOutput(ModelOutput):
    """A classifier's output, one row of logits for each frame."""

    loss: Float[Array, ""] | None = None
    logits: Float[Array, "batch time labels"] = ABSENT
    hidden_states: tuple[Float[Array, "batch time channels"], ...] | None = None
    attentions: tuple[Float[Array, "batch heads query key"], ...] | None = None


class Wav2Vec2BaseModelOutput(ModelOutput):
    """A speech encoder's output, with the convolutional features that it read, normalised and as they came."""

    last_hidden_state: Float[Array, "batch time channels"] = ABSENT
    extract_features: Float[Array, "batch time features"] = ABSENT
    conv_features: Float[Array, "batch time features"] = ABSENT
    hidden_states: tuple[Float[Array, "batch time channels"], ...] | None = None
    attentions: tuple[Float[Array, "batch heads query key"], ...] | None = None


class XVectorOutput(ModelOutput):
    """A speaker model's output: `embeddings` to compare speakers by, `logits` for the training loss."""

    loss: Float[Array, ""] | None = None
    logits: Float[Array, "batch channels"] = ABSENT
    embeddings: Float[Array, "batch channels"] | None = None
    hidden_states: tuple[Float[Array, "batch time channels"], ...] | None = None
    attentions: tuple[Float[Array, "batch heads query key"], ...] | None = None
