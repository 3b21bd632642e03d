"""w2v-BERT's foreign forms: Hugging Face directories, and fairseq2's files, `conformer_shaw.pt` of 2.0 among them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from audiozoo.errors import CheckpointError, SourceError
from audiozoo.models.wav2vec2_bert import Wav2Vec2BertConfig
from audiozoo.processors.wav2vec2_bert import Wav2Vec2BertProcessor
from weights_conversion import ForeignCheckpoint, HuggingFaceForm, labels_from_hugging_face, take
from weights_conversion.readers import TensorSource, open_tensors
from weights_conversion.rules import Ignore, Rule, Table, Tensors
from weights_conversion.seamless_m4t import CONFORMER, LENGTH_ADAPTOR, ORIGINAL_NAMES, UNREAD
from weights_conversion.wav2vec2 import QUANTIZER, config_to_hugging_face, family_table, linear, norm, open_hugging_face

MODEL_TYPE = "wav2vec2-bert"
FAMILY, PREFIX = "Wav2Vec2Bert", "wav2vec2_bert"

# --- Hugging Face ----------------------------------------------------------------------------------------------------

BACKBONE = (
    *CONFORMER,
    Rule("masked_spec_embed", "masked_spec_embed"),
    *linear("adapter.proj"),
    *norm("adapter.proj_layer_norm"),
    *(rule.prefixed("adapter.layers.{i}.", "adapter.layers.{i}.") for rule in LENGTH_ADAPTOR),
)
_PRETRAINING = (*QUANTIZER, *linear("prediction"))


def hugging_face_table(config: Wav2Vec2BertConfig, model_class: str) -> Table:
    """The correspondence with what `save_pretrained` writes for that class; pre-training has none there."""
    heads = {"ForPreTraining": _PRETRAINING}
    table = family_table(config, model_class, family=FAMILY, prefix=PREFIX, backbone=BACKBONE, heads=heads)
    ignored, renames = (*table.ignored, *UNREAD), table.renames
    if model_class != f"{FAMILY}ForPreTraining":
        ignored += (Ignore(r"prediction\..*", "left over from pre-training"),)
    if model_class != f"{FAMILY}Model":
        renames = ((r"^(intermediate_ffn)\b", rf"{PREFIX}.\1"), *renames)
    return dataclasses.replace(table, ignored=ignored, renames=renames)


_CONFIG_DEFAULTS: dict[str, Any] = {
    f.name: f.default for f in dataclasses.fields(Wav2Vec2BertConfig) if f.name != "id2label"
}


def config_from_hugging_face(config: Mapping[str, Any], where: str = "config.json") -> Wav2Vec2BertConfig:
    """Our configuration from a `config.json`."""
    taken = take(config, _CONFIG_DEFAULTS, where, nullable=("position_embeddings_type",))
    return Wav2Vec2BertConfig(**taken, **labels_from_hugging_face(config))


def hugging_face(model: Any) -> HuggingFaceForm:
    """A w2v-BERT model as the directory that `save_pretrained` would write."""
    name = type(model).__name__
    config = config_to_hugging_face(model.config, name, MODEL_TYPE)
    return HuggingFaceForm({"config.json": config}, hugging_face_table(model.config, name))


# --- fairseq2 --------------------------------------------------------------------------------------------------------

_MARK = "encoder_frontend.model_dim_proj.weight"
_INSIDE = "w2v2_model."  # what stands before the names of a model that was trained with the masked prediction
# Those of fairseq2's wav2vec 2.0 as those of the translator that was built on it, and then as those of `transformers`.
FAIRSEQ2_NAMES: tuple[tuple[str, str], ...] = (
    (rf"^{_INSIDE}", ""),
    (r"^final_proj\.", "project_hid."),
    (r"^final_target_proj\.", "project_q."),
    (r"^final_bert_proj\.", "prediction."),
    (r"^quantizer\.entries$", "quantizer.codevectors"),
    (r"^quantizer\.entry_proj\.", "quantizer.weight_proj."),
    (r"^masker\.temporal_mask_embed$", "masked_spec_embed"),
    (r"^encoder_frontend\.", "speech_encoder_frontend."),
    (r"^encoder\.layers\.", "speech_encoder.inner.layers."),
    *ORIGINAL_NAMES,
    (r"^speech_encoder\.", ""),
)


def fairseq2_table(config: Wav2Vec2BertConfig, model_class: str) -> Table:
    """The correspondence with fairseq2's names."""
    table = hugging_face_table(config, model_class)
    other = r"masker\.spatial_mask_embed|quantizer\.num_updates|encoder\.layer_norm\..*"
    if model_class != f"{FAMILY}ForPreTraining":
        other += r"|(quantizer|project_hid|project_q|prediction)\..*"
    ignored = (*table.ignored, Ignore(other, "no part of this class"))
    return dataclasses.replace(table, renames=(*FAIRSEQ2_NAMES, *table.renames), ignored=ignored)


def config_from_fairseq2(tensors: Tensors) -> Wav2Vec2BertConfig:
    """Our configuration from the shapes of fairseq2's file.

    Raises:
        CheckpointError: if its blocks are not those of 2.0.
    """
    bare = Table((), renames=FAIRSEQ2_NAMES)
    names = {bare.today(name): name for name in tensors.names()}

    def shape(name: str) -> tuple[int, ...]:
        return tensors.shape(names[name])

    block = "encoder.layers.0."
    if f"{block}self_attn.distance_embedding.weight" not in names or f"{block}conv_module.batch_norm.weight" in names:
        raise CheckpointError(
            "This file of fairseq2's has a Conformer of the first w2v-BERT, with other positions and BatchNorm; only "
            "those of 2.0 are read."
        )
    width, bands = shape("feature_projection.projection.weight")
    distances, channels = shape(f"{block}self_attn.distance_embedding.weight")
    ahead = 8 if distances == 73 else (distances - 1) // 2  # 2.0's looks further back than ahead
    fields: dict[str, Any] = {}
    if "quantizer.codevectors" in names and "project_q.weight" in names:
        entries, depth = shape("quantizer.codevectors")[1:]
        compared, whole = shape("project_q.weight")
        groups = whole // depth
        fields = {"num_codevector_groups": groups, "num_codevectors_per_group": entries // groups}
        fields |= {"codevector_dim": whole, "proj_codevector_dim": compared}
    blocks = 1 + max(int(n.split(".")[2]) for n in names if n.startswith("encoder.layers."))
    return Wav2Vec2BertConfig(
        hidden_size=width,
        feature_projection_input_dim=bands,
        num_hidden_layers=blocks,
        num_contrastive_layers=max(blocks // 3, 1),  # as in all of fairseq2's settings; a file does not say it
        num_attention_heads=width // channels,
        intermediate_size=shape(f"{block}ffn1.intermediate_dense.weight")[0],
        conv_depthwise_kernel_size=shape(f"{block}conv_module.depthwise_conv.weight")[2],
        left_max_position_embeddings=distances - 1 - ahead,
        right_max_position_embeddings=ahead,
        **fields,
    )


def _is_fairseq2s(tensors: TensorSource) -> bool:
    names = {name.removeprefix(_INSIDE) for name in tensors.names()}
    return _MARK in names and any(name.endswith(".ffn1_layer_norm.weight") for name in names)


def processor_of_file(path: Path) -> Wav2Vec2BertProcessor:
    """The processor of fairseq2's file, by what lies beside it."""
    return Wav2Vec2BertProcessor.from_directory(path.parent)


def recognise(path: Path) -> bool:
    """Is this a w2v-BERT of fairseq2's?"""
    if not path.is_file() or path.suffix not in {".pt", ".pth"}:
        return False
    return _is_fairseq2s(open_tensors(path))


def open_checkpoint(path: Path, model_class: str | None = None) -> ForeignCheckpoint:
    """Open a w2v-BERT checkpoint of either form.

    Raises:
        SourceError: if files are missing.
        CheckpointError: if they are damaged or hold something else.
    """
    if path.is_dir() and (path / "config.json").is_file():
        return open_hugging_face(path, model_class, config_from_hugging_face, hugging_face_table)
    tensors = open_tensors(path)
    if not _is_fairseq2s(tensors):
        raise SourceError(f"{path} is no w2v-BERT of fairseq2's, and has no config.json beside it.")
    if model_class is None:
        predicts = any(name.endswith("final_bert_proj.weight") for name in tensors.names())
        model_class = f"{FAMILY}ForPreTraining" if predicts else f"{FAMILY}Model"
    config = config_from_fairseq2(tensors)
    head = None if model_class == f"{FAMILY}Model" else rf"(?!{PREFIX}\.).*"  # one that the file lacks is to be trained
    return ForeignCheckpoint(
        model_class, config, tensors, fairseq2_table(config, model_class), path, may_be_absent=head
    )
