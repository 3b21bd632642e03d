"""UniSpeech-SAT's foreign forms: Hugging Face directories and Microsoft's `.pt` files, which WavLM's code reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from audiozoo.errors import CheckpointError, SourceError
from audiozoo.models.unispeech_sat import UniSpeechSatConfig
from weights_conversion import ForeignCheckpoint, HuggingFaceForm, alphabets, labels_from_hugging_face, take, wavlm
from weights_conversion import ecapa_tdnn_names as ecapa
from weights_conversion.readers import TensorSource, open_tensors
from weights_conversion.rules import Ignore, Rule, Table
from weights_conversion.wav2vec2 import QUANTIZER, config_to_hugging_face, family_table, linear, norm, open_hugging_face

MODEL_TYPE = "unispeech-sat"
processor_of_file = alphabets.processor_of_file
FAMILY, PREFIX = "UniSpeechSat", "unispeech_sat"

# --- Hugging Face ----------------------------------------------------------------------------------------------------

_PRETRAINING = (
    *QUANTIZER,
    *linear("speaker_proj"),
    Rule("label_embeddings_concat", "label_embeddings_concat"),
    *norm("layer_norm_for_extract"),
)


def hugging_face_table(config: UniSpeechSatConfig, model_class: str) -> Table:
    """The correspondence with what `save_pretrained` writes for that class."""
    table = family_table(config, model_class, family=FAMILY, prefix=PREFIX, heads={"ForPreTraining": _PRETRAINING})
    if model_class == "UniSpeechSatForPreTraining":
        return table
    own = Ignore(r"(speaker_proj|layer_norm_for_extract)\..*|label_embeddings_concat", "left over from pre-training")
    return dataclasses.replace(table, ignored=(*table.ignored, own))


_CONFIG_DEFAULTS = {f.name: f.default for f in dataclasses.fields(UniSpeechSatConfig) if f.name != "id2label"}


def config_from_hugging_face(config: Mapping[str, Any], where: str = "config.json") -> UniSpeechSatConfig:
    """Our configuration from a `config.json`."""
    return UniSpeechSatConfig(**take(config, _CONFIG_DEFAULTS, where), **labels_from_hugging_face(config))


def hugging_face(model: Any) -> HuggingFaceForm:
    """A UniSpeech-SAT model as the directory that `save_pretrained` would write."""
    name = type(model).__name__
    config = config_to_hugging_face(model.config, name, MODEL_TYPE)
    return HuggingFaceForm({"config.json": config}, hugging_face_table(model.config, name))


# --- Microsoft's files -----------------------------------------------------------------------------------------------


def microsoft_table(config: UniSpeechSatConfig, model_class: str) -> Table:
    """The correspondence with the names of `UniSpeech-SAT-Base.pt`: fairseq's, without WavLM's gated bias."""
    pretraining = (
        Rule("quantizer.vars", "quantizer.codevectors"),
        *linear("quantizer.weight_proj"),
        *linear("project_q"),
        *linear("final_proj", "project_hid"),
        *linear("spk_proj", "speaker_proj"),
        Rule("label_embs_concat", "label_embeddings_concat"),
        *norm("encoder.layer_norm_for_extract", "layer_norm_for_extract"),
    )
    heads = {"ForPreTraining": pretraining, "ForCTC": linear("proj", "lm_head")}
    return wavlm.microsoft_table(config, model_class, family=FAMILY, prefix=PREFIX, attention=(), heads=heads)


def config_from_microsoft(tensors: TensorSource) -> UniSpeechSatConfig:
    """Our configuration from the settings and shapes of a file.

    Raises:
        CheckpointError: for an experiment of the training code that no published checkpoint contains.
    """
    settings = wavlm.settings_of(tensors)
    odd = [n for n in ("relative_position_embedding", "gru_rel_pos") if settings.get(n)]
    odd += ["expand_attention_head_size"] if int(settings.get("expand_attention_head_size") or -1) > 0 else []
    odd += ["activation_fn=glu"] if settings.get("activation_fn") == "glu" else []
    if odd:
        raise CheckpointError(f"{tensors.path} was trained with {', '.join(odd)}, which UniSpeech-SAT is not.")
    table = microsoft_table(UniSpeechSatConfig(), "UniSpeechSatForPreTraining")
    fields = wavlm.microsoft_fields(tensors, table, _CONFIG_DEFAULTS)
    names = {table.today(name): name for name in tensors.names()}
    if "quantizer.vars" in names:
        _, entries, width = tensors.shape(names["quantizer.vars"])
        groups = int(settings.get("latent_groups") or 2)
        fields["num_codevector_groups"], fields["num_codevectors_per_group"] = groups, entries // groups
        fields["codevector_dim"] = width * groups
    return UniSpeechSatConfig(**fields, frame_rule="samples")


def _is_microsofts(tensors: TensorSource) -> bool:
    names = tensors.names()
    if tensors.format != "pytorch" or not any(n.endswith("feature_extractor.conv_layers.0.0.weight") for n in names):
        return False
    if any("grep_linear" in name for name in names):
        return False  # WavLM
    settings = wavlm.settings_of(tensors)
    return "relative_position_embedding" in settings or any(name.endswith("spk_proj.weight") for name in names)


def recognise(path: Path) -> bool:
    """Is this one of Microsoft's `.pt` files of UniSpeech-SAT?"""
    return path.is_file() and path.suffix in {".pt", ".pth", ".bin"} and _is_microsofts(open_tensors(path))


def open_checkpoint(path: Path, model_class: str | None = None) -> ForeignCheckpoint:
    """Open a UniSpeech-SAT checkpoint of either form.

    Raises:
        SourceError: if files are missing.
        CheckpointError: if they are damaged or hold something else.
    """
    if path.is_dir() and (path / "config.json").is_file():
        return open_hugging_face(path, model_class, config_from_hugging_face, hugging_face_table)
    tensors = open_tensors(path)
    if not _is_microsofts(tensors):
        raise SourceError(f"{path} is no UniSpeech-SAT of Microsoft's, and has no config.json beside it.")
    names = tensors.names()
    if ecapa.is_verification(tensors):
        return ecapa.open_verification(path, tensors, FAMILY, PREFIX, config_from_microsoft, microsoft_table)
    if model_class is None:
        model_class = "UniSpeechSatModel"
        if "label_embs_concat" in names:
            model_class = "UniSpeechSatForPreTraining"
        elif any(name.endswith("w2v_encoder.proj.weight") for name in names):
            model_class = "UniSpeechSatForCTC"
    config = config_from_microsoft(tensors)
    # Published files may have no head; one that they lack is drawn at random, for training.
    head = None if model_class == "UniSpeechSatModel" else r"(?!unispeech_sat\.).*"
    return ForeignCheckpoint(
        model_class, config, tensors, microsoft_table(config, model_class), path, may_be_absent=head
    )
