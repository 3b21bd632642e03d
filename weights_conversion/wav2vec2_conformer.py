"""wav2vec2-Conformer's foreign forms: Hugging Face directories, and fairseq's files.

fairseq's files are wav2vec 2.0's, with the Conformer's names in the blocks. The pre-trained ones are published without
an ending, `LL_relpos_PT_no_FT` and `LL_rope_PT_no_FT`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from audiozoo.errors import CheckpointError, SourceError
from audiozoo.models.wav2vec2_conformer import Wav2Vec2ConformerConfig
from weights_conversion import (
    ForeignCheckpoint,
    HuggingFaceForm,
    alphabets,
    labels_from_hugging_face,
    take,
    wav2vec2,
)
from weights_conversion.readers import TensorSource, open_tensors
from weights_conversion.rules import Constant, Ignore, Rule, Table
from weights_conversion.seamless_m4t import CONFORMER, UNREAD, HuggingFaceTable
from weights_conversion.wav2vec2 import (
    ADAPTER,
    FEATURE_ENCODER,
    config_to_hugging_face,
    fairseq_class,
    fairseq_settings,
    fairseq_table,
    family_table,
    kind_of_file,
    open_hugging_face,
    positional_convolution,
)

MODEL_TYPE = "wav2vec2-conformer"
FAMILY, PREFIX = "Wav2Vec2Conformer", "wav2vec2_conformer"
processor_of_file = alphabets.processor_of_file

# --- Hugging Face ----------------------------------------------------------------------------------------------------

BACKBONE = (
    *FEATURE_ENCODER,
    Rule("masked_spec_embed", "masked_spec_embed"),
    *positional_convolution("encoder.pos_conv_embed.conv", "encoder.pos_conv_embed.conv"),
    *CONFORMER,
    *ADAPTER,
)


def _frequencies(config: Wav2Vec2ConformerConfig) -> np.ndarray:
    r"""What `transformers` keeps of rotary positions, $\text{base}^{-2k/d}$, rounded where it rounds."""
    width = config.hidden_size // config.num_attention_heads
    exponents = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
    return 1 / (config.rotary_embedding_base ** exponents.astype(np.float64)).astype(np.float32)


def hugging_face_table(config: Wav2Vec2ConformerConfig, model_class: str) -> Table:
    """The correspondence with what `save_pretrained` writes for that class."""
    table = family_table(config, model_class, family=FAMILY, prefix=PREFIX, backbone=BACKBONE)
    inside = "" if model_class == f"{FAMILY}Model" else f"{PREFIX}."
    constants = []
    if config.position_embeddings_type == "rotary":
        constants = [Constant(f"{inside}encoder.embed_positions.inv_freq", lambda: _frequencies(config))]
    ignored = (*table.ignored, *UNREAD)
    return HuggingFaceTable(table.rules, renames=table.renames, ignored=ignored, constants=constants)


_CONFIG_DEFAULTS: dict[str, Any] = {
    f.name: f.default for f in dataclasses.fields(Wav2Vec2ConformerConfig) if f.name != "id2label"
}


def config_from_hugging_face(config: Mapping[str, Any], where: str = "config.json") -> Wav2Vec2ConformerConfig:
    """Our configuration from a `config.json`."""
    taken = take(config, _CONFIG_DEFAULTS, where, nullable=("position_embeddings_type",))
    return Wav2Vec2ConformerConfig(**taken, **labels_from_hugging_face(config))


def hugging_face(model: Any) -> HuggingFaceForm:
    """A model as the directory that `save_pretrained` would write."""
    name = type(model).__name__
    config = config_to_hugging_face(model.config, name, MODEL_TYPE)
    return HuggingFaceForm({"config.json": config}, hugging_face_table(model.config, name))


# --- fairseq ---------------------------------------------------------------------------------------------------------

_FEED_FORWARD = r"^(encoder\.layers\.\d+\.ffn[12])"
# The names inside the blocks as those of `transformers`, where they differ.
_NAMES: tuple[tuple[str, str], ...] = (
    (rf"{_FEED_FORWARD}\.layer_norm\.", r"\1_layer_norm."),
    (rf"{_FEED_FORWARD}\.w_1\.", r"\1.intermediate_dense."),
    (rf"{_FEED_FORWARD}\.w_2\.", r"\1.output_dense."),
)
_UNREAD = Ignore(r".*\.rotary_emb\.inv_freq", "frequencies, which follow from the settings")


def original_table(config: Wav2Vec2ConformerConfig, model_class: str) -> Table:
    """The correspondence with fairseq's names, of pre-trained and of fine-tuned files."""
    blocks = [rule for rule in CONFORMER if str(rule.foreign).startswith("encoder.layers.")]
    table = fairseq_table(config, model_class, family=FAMILY, prefix=PREFIX, blocks=blocks)
    return dataclasses.replace(table, renames=(*table.renames, *_NAMES), ignored=(*table.ignored, *UNREAD, _UNREAD))


def config_from_original(tensors: TensorSource) -> Wav2Vec2ConformerConfig:
    """Our configuration from the settings and shapes of a fairseq file.

    Raises:
        CheckpointError: if its blocks are put together in a way that no published file has.
    """
    settings = fairseq_settings(tensors.metadata)
    # By the name under which wav2vec 2.0's reader looks for the width of a block.
    common = wav2vec2.config_from_fairseq(tensors, renames=((r"\.ffn1\.w_1\.", ".fc1."),))
    table = original_table(Wav2Vec2ConformerConfig(), f"{FAMILY}ForPreTraining")
    names = {table.today(name): name for name in tensors.names()}
    block = "encoder.layers.0."
    positions = "relative" if f"{block}self_attn.pos_bias_u" in names else None
    if settings.get("pos_enc_type") == "rope" or f"{block}self_attn.rotary_emb.inv_freq" in names:
        positions = "rotary"
    if positions is None or settings.get("layer_norm_first") is False:
        raise CheckpointError(
            "Of fairseq's Conformers those are read that are published: with relative or rotary positions, and "
            "layer_norm_first."
        )
    heads = common.num_attention_heads
    if positions == "relative":
        heads = tensors.shape(names[f"{block}self_attn.pos_bias_u"])[0]
    elif (angles := f"{block}self_attn.rotary_emb.inv_freq") in names:
        heads = common.hidden_size // (2 * tensors.shape(names[angles])[0])
    rate = common.hidden_dropout  # one for all of a block
    known = {f.name: getattr(common, f.name) for f in dataclasses.fields(common)}
    return Wav2Vec2ConformerConfig(
        **known
        | {
            "hidden_act": "swish",
            "num_attention_heads": heads,
            "attention_dropout": rate,
            "activation_dropout": rate,
            "conformer_conv_dropout": rate,
            "position_embeddings_type": positions,
            "conv_depthwise_kernel_size": tensors.shape(names[f"{block}conv_module.depthwise_conv.weight"])[2],
        }
    )


def recognise(path: Path) -> bool:
    """Is this a file of fairseq's wav2vec 2.0 with Conformer blocks?"""
    if not path.is_file() or path.suffix not in {"", ".pt", ".pth", ".bin"}:
        return False
    return kind_of_file(open_tensors(path)) == "conformer"


def open_checkpoint(path: Path, model_class: str | None = None) -> ForeignCheckpoint:
    """Open a checkpoint of either form.

    Raises:
        SourceError: if files are missing.
        CheckpointError: if they are damaged or hold something else.
    """
    if path.is_dir() and (path / "config.json").is_file():
        return open_hugging_face(path, model_class, config_from_hugging_face, hugging_face_table)
    tensors = open_tensors(path)
    if kind_of_file(tensors) != "conformer":
        raise SourceError(f"{path} is no wav2vec2-Conformer of fairseq's, and has no config.json beside it.")
    config = config_from_original(tensors)
    model_class = model_class or fairseq_class(tensors).replace("Wav2Vec2", FAMILY)
    return ForeignCheckpoint(model_class, config, tensors, original_table(config, model_class), path)
