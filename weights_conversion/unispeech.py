"""UniSpeech's foreign forms: Hugging Face directories, and Microsoft's `.pt` files of fairseq's kind."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from audiozoo.errors import SourceError
from audiozoo.models.unispeech import UniSpeechConfig
from weights_conversion import ForeignCheckpoint, HuggingFaceForm, alphabets, labels_from_hugging_face, take
from weights_conversion.readers import TensorSource, open_tensors
from weights_conversion.rules import Ignore, Table
from weights_conversion.wav2vec2 import (
    QUANTIZER,
    config_to_hugging_face,
    fairseq_settings,
    fairseq_table,
    family_table,
    linear,
    network_sizes,
    open_hugging_face,
    settings_fields,
)

MODEL_TYPE = "unispeech"
processor_of_file = alphabets.processor_of_file
FAMILY, PREFIX = "UniSpeech", "unispeech"

# --- Hugging Face ----------------------------------------------------------------------------------------------------


def hugging_face_table(config: UniSpeechConfig, model_class: str) -> Table:
    """The correspondence with what `save_pretrained` writes for that class."""
    heads = {"ForPreTraining": (*QUANTIZER, *linear("ctc_proj"))}
    table = family_table(config, model_class, family=FAMILY, prefix=PREFIX, heads=heads)
    if model_class == "UniSpeechForPreTraining":
        return table
    return dataclasses.replace(table, ignored=(*table.ignored, Ignore(r"ctc_proj\..*", "left over from pre-training")))


_CONFIG_DEFAULTS = {f.name: f.default for f in dataclasses.fields(UniSpeechConfig) if f.name != "id2label"}


def config_from_hugging_face(config: Mapping[str, Any], where: str = "config.json") -> UniSpeechConfig:
    """Our configuration from a `config.json`."""
    return UniSpeechConfig(**take(config, _CONFIG_DEFAULTS, where), **labels_from_hugging_face(config))


def hugging_face(model: Any) -> HuggingFaceForm:
    """A UniSpeech model as the directory that `save_pretrained` would write."""
    name = type(model).__name__
    config = config_to_hugging_face(model.config, name, MODEL_TYPE)
    return HuggingFaceForm({"config.json": config}, hugging_face_table(model.config, name))


# --- Microsoft's files -----------------------------------------------------------------------------------------------


def microsoft_table(config: UniSpeechConfig, model_class: str) -> Table:
    """The correspondence with fairseq's names; the phoneme head of pre-training is called like that of fine-tuning."""
    table = fairseq_table(config, model_class, family=FAMILY, prefix=PREFIX)
    if model_class == "UniSpeechForPreTraining":
        return dataclasses.replace(table, rules=(*table.rules, *linear("proj", "ctc_proj")))
    return table


def config_from_microsoft(tensors: TensorSource) -> UniSpeechConfig:
    """Our configuration from the settings and shapes of a file."""
    settings = fairseq_settings(tensors.metadata)
    table = microsoft_table(UniSpeechConfig(), "UniSpeechForPreTraining")
    names = {table.today(name): name for name in tensors.names()}
    fields = network_sizes(tensors, names) | settings_fields(settings, _CONFIG_DEFAULTS)
    fields.setdefault("num_attention_heads", 12 if fields["hidden_size"] == 768 else 16)
    fields.setdefault("do_stable_layer_norm", fields["feat_extract_norm"] == "layer")
    if "quantizer.vars" in names:
        _, entries, width = tensors.shape(names["quantizer.vars"])
        groups = int(settings.get("latent_groups") or 2)
        fields["num_codevector_groups"], fields["num_codevectors_per_group"] = groups, entries // groups
        fields["codevector_dim"] = width * groups
        fields["proj_codevector_dim"] = tensors.shape(names["project_q.weight"])[0]
    if "proj.weight" in names:
        size = tensors.shape(names["proj.weight"])[0]
        fields["vocab_size" if _is_tuned(tensors) else "num_ctc_classes"] = size
    return UniSpeechConfig(**fields)


def _names_of_the_model(tensors: TensorSource) -> list[str]:
    settings = fairseq_settings(tensors.metadata)
    inner = settings["_inner"]
    said = (settings.get("_name"), settings.get("arch"), inner.get("_name"), inner.get("arch"))
    return [str(name) for name in said if name]


def _is_microsofts(tensors: TensorSource) -> bool:
    if tensors.format != "pytorch" or not any(
        n.endswith("feature_extractor.conv_layers.0.0.weight") for n in tensors.names()
    ):
        return False
    named = _names_of_the_model(tensors)
    return "unispeech" in named or bool(fairseq_settings(tensors.metadata).get("transpose"))


def _is_tuned(tensors: TensorSource) -> bool:
    """Fine-tuned: a CTC model around UniSpeech's, or no quantiser left."""
    has_head = any(name.endswith("w2v_encoder.proj.weight") for name in tensors.names())
    return has_head and not any(name.endswith("quantizer.vars") for name in tensors.names())


def recognise(path: Path) -> bool:
    """Is this one of Microsoft's `.pt` files of UniSpeech?"""
    return path.is_file() and path.suffix in {".pt", ".pth", ".bin"} and _is_microsofts(open_tensors(path))


def open_checkpoint(path: Path, model_class: str | None = None) -> ForeignCheckpoint:
    """Open a UniSpeech checkpoint of either form.

    Raises:
        SourceError: if files are missing.
        CheckpointError: if they are damaged or hold something else.
    """
    if path.is_dir() and (path / "config.json").is_file():
        return open_hugging_face(path, model_class, config_from_hugging_face, hugging_face_table)
    tensors = open_tensors(path)
    if not _is_microsofts(tensors):
        raise SourceError(f"{path} is no UniSpeech of Microsoft's, and has no config.json beside it.")
    if model_class is None:
        quantised = any(name.endswith("quantizer.vars") for name in tensors.names())
        rest = "UniSpeechForCTC" if _is_tuned(tensors) else "UniSpeechModel"
        model_class = "UniSpeechForPreTraining" if quantised else rest
    config = config_from_microsoft(tensors)
    # The second stage of pre-training has no text, and its file no phoneme head.
    absent = r"ctc_proj\..*" if model_class == "UniSpeechForPreTraining" else None
    return ForeignCheckpoint(
        model_class, config, tensors, microsoft_table(config, model_class), path, may_be_absent=absent
    )
