"""WavLM's foreign forms: Hugging Face directories, Microsoft's `.pt` files, torchaudio's state dicts.

UniSpeech-SAT's files come out of the same code, so its module reads their settings with the functions here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from audiozoo.errors import CheckpointError, SourceError
from audiozoo.models.wavlm import WavLMConfig
from weights_conversion import ForeignCheckpoint, HuggingFaceForm, alphabets, labels_from_hugging_face, take
from weights_conversion import ecapa_tdnn_names as ecapa
from weights_conversion.readers import TensorSource, open_tensors
from weights_conversion.rules import Ignore, Rule, Table, split, transpose
from weights_conversion.wav2vec2 import (
    BACKBONE,
    config_to_hugging_face,
    fairseq_table,
    family_table,
    linear,
    network_sizes,
    open_hugging_face,
    settings_fields,
)
from weights_conversion.wav2vec2 import torchaudio_table as wav2vec2_of_torchaudio

MODEL_TYPE = "wavlm"
processor_of_file = alphabets.processor_of_file

# --- Hugging Face ----------------------------------------------------------------------------------------------------

_ATTENTION = "encoder.layers.{i}.attention."
_TABLE = "encoder.layers.0.attention.rel_attn_embed"
GATED_BIAS = (
    *linear(f"{_ATTENTION}gru_rel_pos_linear"),
    Rule(f"{_ATTENTION}gru_rel_pos_const", f"{_ATTENTION}gru_rel_pos_const"),
    Rule(f"{_TABLE}.weight", f"{_TABLE}.embedding"),
)
_PREDICTION = (*linear("final_proj"), Rule("label_embeddings", "label_embeddings"))


def hugging_face_table(config: WavLMConfig, model_class: str) -> Table:
    """The correspondence with what `save_pretrained` writes for that class."""
    heads = {"ForPreTraining": _PREDICTION}
    table = family_table(
        config, model_class, family="WavLM", prefix="wavlm", backbone=(*BACKBONE, *GATED_BIAS), heads=heads
    )
    if model_class == "WavLMForPreTraining":
        return table
    own = Ignore(r"final_proj\..*|label_embeddings", "left over from pre-training")
    return dataclasses.replace(table, ignored=(*table.ignored, own))


_CONFIG_DEFAULTS = {f.name: f.default for f in dataclasses.fields(WavLMConfig) if f.name != "id2label"}


def config_from_hugging_face(config: Mapping[str, Any], where: str = "config.json") -> WavLMConfig:
    """Our configuration from a `config.json`."""
    return WavLMConfig(**take(config, _CONFIG_DEFAULTS, where), **labels_from_hugging_face(config))


# --- Microsoft's files -----------------------------------------------------------------------------------------------


def microsoft_table(
    config: Any,
    model_class: str,
    *,
    family: str = "WavLM",
    prefix: str = "wavlm",
    attention: Sequence[Rule] | None = None,
    heads: Mapping[str, Sequence[Rule]] | None = None,
) -> Table:
    """The correspondence with the names of `WavLM-Base.pt`, which are fairseq's and those of the gated bias.

    Args:
        config: our configuration.
        model_class: "WavLMForCTC".
        family: its beginning.
        prefix: the name of the backbone in the classes with a head.
        attention: rules beside those of wav2vec 2.0; the gated bias by default.
        heads: rules of the classes with a head in such a file, by suffix.
    """
    if attention is None:
        attention = (
            *linear("encoder.layers.{i}.self_attn.grep_linear", f"{_ATTENTION}gru_rel_pos_linear"),
            Rule("encoder.layers.{i}.self_attn.grep_a", f"{_ATTENTION}gru_rel_pos_const"),
            Rule("encoder.layers.0.self_attn.relative_attention_bias.weight", f"{_TABLE}.embedding"),
        )
    if heads is None:
        prediction = (*linear("final_proj"), Rule("label_embs_concat", "label_embeddings"))
        heads = {"ForPreTraining": prediction, "ForCTC": linear("proj", "lm_head")}
    bare = fairseq_table(config, f"{family}Model", family=family)
    rules = [*bare.rules, *attention]
    suffix = model_class.removeprefix(family)
    if suffix != "Model":
        rules = [*(rule.prefixed("", f"{prefix}.") for rule in rules), *heads.get(suffix, ())]
    other = r"(final_proj|target_glu|quantizer|project_q|spk_proj|encoder\.layer_norm_for_extract)\..*"
    other = f"label_embs_concat|{other}"
    if suffix != "ForCTC":
        other += r"|proj\..*"
    ignored = () if suffix == "ForPreTraining" else (Ignore(other, "no part of this class"),)
    return Table(rules, renames=bare.renames, ignored=ignored)


def settings_of(tensors: TensorSource) -> dict[str, Any]:
    """The settings of the model, which such a file holds flat under "cfg", or one level deeper."""
    cfg = tensors.metadata.get("cfg") or {}
    cfg = cfg if isinstance(cfg, Mapping) else vars(cfg)
    inner = cfg.get("model", cfg)
    return dict(inner if isinstance(inner, Mapping) else vars(inner))


def microsoft_fields(tensors: TensorSource, table: Table, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a configuration from the settings and shapes of a file.

    Args:
        tensors: the file.
        table: the correspondence.
        defaults: the fields that the configuration has, with their defaults.
    """
    names = {table.today(name): name for name in tensors.names()}
    fields = network_sizes(tensors, names) | settings_fields(settings_of(tensors), defaults)
    if "label_embs_concat" in names:
        clusters, width = tensors.shape(names["label_embs_concat"])
        fields["num_clusters"], fields["proj_codevector_dim"] = clusters, width
    if "proj.weight" in names:
        fields["vocab_size"] = tensors.shape(names["proj.weight"])[0]
    return fields


def config_from_microsoft(tensors: TensorSource) -> WavLMConfig:
    """Our configuration from the settings and shapes of a Microsoft file."""
    table = microsoft_table(WavLMConfig(), "WavLMForPreTraining")
    fields = microsoft_fields(tensors, table, _CONFIG_DEFAULTS)
    return WavLMConfig(**fields, frame_rule="samples")


# --- torchaudio ------------------------------------------------------------------------------------------------------

_THEIRS = "encoder.transformer.layers.{i}.attention."
_QKV = tuple(f"{_ATTENTION}{p}_proj" for p in "qkv")


def torchaudio_table() -> Table:
    """The correspondence with the state dict of torchaudio's WavLM, of which the bare model is published."""
    common = wav2vec2_of_torchaudio("Wav2Vec2Model")
    attention = (
        Rule(f"{_THEIRS}attention.in_proj_weight", tuple(f"{p}.kernel" for p in _QKV), split(3) >> transpose),
        Rule(f"{_THEIRS}attention.in_proj_bias", tuple(f"{p}.bias" for p in _QKV), split(3)),
        *linear(f"{_THEIRS}attention.out_proj", f"{_ATTENTION}out_proj"),
        *linear(f"{_THEIRS}gru_rel_pos_linear", f"{_ATTENTION}gru_rel_pos_linear"),
        Rule(f"{_THEIRS}gru_rel_pos_const", f"{_ATTENTION}gru_rel_pos_const"),
        Rule("encoder.transformer.layers.0.attention.rel_attn_embed.weight", f"{_TABLE}.embedding"),
    )
    network = [rule for rule in common.rules if ".attention." not in str(rule.foreign)]
    return dataclasses.replace(common, rules=(*network, *attention))


def config_from_torchaudio(tensors: TensorSource) -> WavLMConfig:
    """Our configuration from the shapes in torchaudio's state dict."""
    fields = network_sizes(tensors, {torchaudio_table().today(name): name for name in tensors.names()})
    first = "encoder.transformer.layers.0.attention."
    fields["num_attention_heads"] = tensors.shape(f"{first}gru_rel_pos_const")[1]
    fields["num_buckets"] = tensors.shape(f"{first}rel_attn_embed.weight")[0]
    fields["do_stable_layer_norm"] = fields["feat_extract_norm"] == "layer"
    return WavLMConfig(**fields, mask_time_prob=0.0)  # the vector for masked frames is not in the file


# --- opening ---------------------------------------------------------------------------------------------------------


def _is_torchaudios(tensors: TensorSource) -> bool:
    return "encoder.transformer.layers.0.attention.rel_attn_embed.weight" in tensors.names()


def _is_microsofts(tensors: TensorSource) -> bool:
    return any(name.endswith("self_attn.grep_linear.weight") for name in tensors.names())


def recognise(path: Path) -> bool:
    """Is this one of Microsoft's `.pt` files of WavLM, or a state dict of torchaudio's?"""
    if not path.is_file() or path.suffix not in {".pt", ".pth", ".bin"}:
        return False
    return _is_microsofts(tensors := open_tensors(path)) or _is_torchaudios(tensors)


def open_checkpoint(path: Path, model_class: str | None = None) -> ForeignCheckpoint:
    """Open a WavLM checkpoint of any of the three forms.

    Raises:
        SourceError: if files are missing.
        CheckpointError: if they are damaged or hold something else.
    """
    if path.is_dir() and (path / "config.json").is_file():
        return open_hugging_face(path, model_class, config_from_hugging_face, hugging_face_table)
    tensors = open_tensors(path)
    if _is_torchaudios(tensors):
        if model_class not in (None, "WavLMModel"):
            raise CheckpointError(f"torchaudio's file of WavLM loads as WavLMModel, not as {model_class}.")
        return ForeignCheckpoint("WavLMModel", config_from_torchaudio(tensors), tensors, torchaudio_table(), path)
    if not _is_microsofts(tensors):
        raise SourceError(f"{path} is no WavLM of Microsoft's or torchaudio's, and has no config.json beside it.")
    names = tensors.names()
    if ecapa.is_verification(tensors):
        return ecapa.open_verification(path, tensors, "WavLM", "wavlm", config_from_microsoft, microsoft_table)
    if model_class is None:
        model_class = "WavLMModel"
        if any(name.endswith("label_embs_concat") for name in names):
            model_class = "WavLMForPreTraining"
        elif any(name.endswith("w2v_encoder.proj.weight") for name in names):
            model_class = "WavLMForCTC"
    config = config_from_microsoft(tensors)
    # Published files have no head; one that they lack is drawn at random, for training.
    head = None if model_class == "WavLMModel" else r"(?!wavlm\.).*"
    return ForeignCheckpoint(
        model_class, config, tensors, microsoft_table(config, model_class), path, may_be_absent=head
    )


def hugging_face(model: Any) -> HuggingFaceForm:
    """A WavLM model as the directory that `save_pretrained` would write."""
    name = type(model).__name__
    config = config_to_hugging_face(model.config, name, MODEL_TYPE)
    return HuggingFaceForm({"config.json": config}, hugging_face_table(model.config, name))
