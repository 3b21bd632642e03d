"""SEW's and SEW-D's foreign forms: Hugging Face directories, and the original `.pt` files of fairseq's kind."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from audiozoo.errors import CheckpointError, SourceError
from audiozoo.models.sew import SEWConfig
from weights_conversion import ForeignCheckpoint, HuggingFaceForm, alphabets, labels_from_hugging_face, take
from weights_conversion.readers import TensorSource, open_tensors
from weights_conversion.rules import Ignore, Rule, Table, squeeze, transpose
from weights_conversion.wav2vec2 import (
    ATTENTION,
    FEATURE_ENCODER,
    config_to_hugging_face,
    fairseq_settings,
    fairseq_table,
    family_table,
    linear,
    network_sizes,
    norm,
    open_hugging_face,
    positional_convolution,
    settings_fields,
)

MODEL_TYPE = "sew"
MODEL_TYPES = ("sew", "sew-d")
processor_of_file = alphabets.processor_of_file


def _family(model_class: str) -> tuple[str, str]:
    """The beginning of a class's name, and the name of the backbone below a head."""
    return ("SEWD", "sew_d") if model_class.startswith("SEWD") else ("SEW", "sew")


# --- Hugging Face ----------------------------------------------------------------------------------------------------

_COMMON = (
    *FEATURE_ENCODER,
    *norm("layer_norm", "feature_projection.layer_norm"),
    *linear("feature_projection", "feature_projection.projection"),
    Rule("masked_spec_embed", "masked_spec_embed"),
    *positional_convolution("encoder.pos_conv_embed.conv", "encoder.pos_conv_embed.conv"),
    *linear("encoder.upsample.projection"),
)
_BLOCKS = (
    *norm("encoder.layer_norm"),
    *ATTENTION,
    *norm("encoder.layers.{i}.{norm:layer_norm|final_layer_norm}"),
    *linear("encoder.layers.{i}.feed_forward.{dense:intermediate_dense|output_dense}"),
)


def _disentangled() -> tuple[Rule, ...]:
    """The blocks of SEW-D, under DeBERTa's names, which the original files and `transformers` share."""
    theirs, ours = "encoder.encoder.layer.{i}.", "encoder.layers.{i}."
    rules: list[Rule] = []
    for name, mine in (
        ("attention.self.query_proj", "attention.q_proj"),
        ("attention.self.key_proj", "attention.k_proj"),
        ("attention.self.value_proj", "attention.v_proj"),
        ("attention.self.pos_key_proj", "attention.pos_key_proj"),
        ("attention.self.pos_query_proj", "attention.pos_query_proj"),
        ("attention.output.dense", "attention_output"),
        ("intermediate.dense", "intermediate_dense"),
        ("output.dense", "output_dense"),
    ):
        rules += linear(theirs + name, ours + mine)
    rules += norm(theirs + "attention.output.LayerNorm", ours + "layer_norm")
    rules += norm(theirs + "output.LayerNorm", ours + "final_layer_norm")
    rules.append(Rule("encoder.encoder.rel_embeddings.weight", "encoder.rel_embeddings.embedding"))
    return (*rules, *norm("encoder.encoder.LayerNorm", "encoder.rel_layer_norm"))


_OWN_PREDICTORS = (
    Rule("quantizer.codevectors", "quantizer.codevectors"),
    *linear("quantizer.weight_proj"),
    Rule("{head:project_hid|project_q}.dense_1.weight", "{head:project_hid|project_q}.dense_1.kernel", transpose),
    *linear("{head:project_hid|project_q}.dense_2"),
    *norm("{head:project_hid|project_q}.batch_norm"),
    Rule("{head:project_hid|project_q}.batch_norm.running_mean", "{head:project_hid|project_q}.batch_norm.mean"),
    Rule("{head:project_hid|project_q}.batch_norm.running_var", "{head:project_hid|project_q}.batch_norm.var"),
)


def hugging_face_table(config: SEWConfig, model_class: str) -> Table:
    """The correspondence with what `save_pretrained` writes for that class."""
    family, prefix = _family(model_class)
    blocks = _disentangled() if family == "SEWD" else _BLOCKS
    heads = {"ForPreTraining": _OWN_PREDICTORS}
    table = family_table(config, model_class, family=family, prefix=prefix, backbone=(*_COMMON, *blocks), heads=heads)
    if model_class.endswith("Model"):
        return table
    return dataclasses.replace(table, renames=((r"^layer_norm\.", f"{prefix}.layer_norm."), *table.renames))


_CONFIG_DEFAULTS = {f.name: f.default for f in dataclasses.fields(SEWConfig) if f.name != "id2label"}
# What a configuration of SEW-D that leaves these out means.
_DISENTANGLED_DEFAULTS = {"layer_norm_eps": 1e-7, "hidden_act": "gelu_python", "layerdrop": 0.0}
_ONLY_DISENTANGLED = (
    "position_buckets",
    "max_position_embeddings",
    "share_att_key",
    "pos_att_type",
    "norm_rel_ebd",
    "feature_layer_norm_eps",
)


def config_from_hugging_face(config: Mapping[str, Any], where: str = "config.json") -> SEWConfig:
    """Our configuration from a `config.json` of SEW or SEW-D."""
    fields = take(config, _CONFIG_DEFAULTS, where)
    if config.get("model_type") == "sew-d":
        if not config.get("relative_attention", True):
            raise CheckpointError(f"{where}: relative_attention is false; SEW-D is published with it alone.")
        fields = _DISENTANGLED_DEFAULTS | fields
    return SEWConfig(**fields, **labels_from_hugging_face(config))


def hugging_face(model: Any) -> HuggingFaceForm:
    """A model as the directory that `save_pretrained` would write."""
    name = type(model).__name__
    disentangled = _family(name)[0] == "SEWD"
    config = config_to_hugging_face(model.config, name, "sew-d" if disentangled else "sew")
    for field in () if disentangled else _ONLY_DISENTANGLED:
        del config[field]
    if disentangled:
        config["relative_attention"] = True
    return HuggingFaceForm({"config.json": config}, hugging_face_table(model.config, name))


# --- the original files ----------------------------------------------------------------------------------------------


def _predictors() -> tuple[Rule, ...]:
    """The pre-training heads: one-tap convolutions there, linear maps here."""
    one_tap = squeeze(2) >> transpose
    rules: list[Rule] = [Rule("quantizer.vars", "quantizer.codevectors"), *linear("quantizer.weight_proj")]
    for theirs, ours in (("final_proj", "project_hid"), ("project_q", "project_q")):
        rules += [
            Rule(f"{theirs}.net.0.weight", f"{ours}.dense_1.kernel", one_tap),
            *norm(f"{theirs}.net.1", f"{ours}.batch_norm"),
            Rule(f"{theirs}.net.1.running_mean", f"{ours}.batch_norm.mean"),
            Rule(f"{theirs}.net.1.running_var", f"{ours}.batch_norm.var"),
            Rule(f"{theirs}.net.3.weight", f"{ours}.dense_2.kernel", one_tap),
            Rule(f"{theirs}.net.3.bias", f"{ours}.dense_2.bias"),
        ]
    return tuple(rules)


def original_table(config: SEWConfig, model_class: str) -> Table:
    """The correspondence with the names of `sew-tiny-100k.pt` and its like: fairseq's, and those of the squeezing."""
    family, prefix = _family(model_class)
    suffix = model_class.removeprefix(family)
    bare = fairseq_table(config, f"{family}Model", family=family)
    rules = list(bare.rules)
    if family == "SEWD":
        rules = [r for r in rules if not str(r.foreign).startswith(("encoder.layers.", "encoder.layer_norm."))]
        rules += _disentangled()
    rules += linear("encoder.upsample.0", "encoder.upsample.projection")
    if suffix != "Model":
        rules = [rule.prefixed("", f"{prefix}.") for rule in rules]
    heads = {
        "ForPreTraining": _predictors(),
        "ForCTC": linear("proj", "lm_head"),
        "ForSequenceClassification": (),
        "Model": (),
    }
    if suffix not in heads:
        raise CheckpointError(f"There is no class {model_class} in this family.")
    counts = Ignore(r".*\.num_batches_tracked", "a counter of PyTorch's")
    other = r"(quantizer|project_q|final_proj|target_glu)\..*" + (r"|proj\..*" if suffix != "ForCTC" else "")
    ignored = (counts,) if suffix == "ForPreTraining" else (counts, Ignore(other, "no part of this class"))
    return Table((*rules, *heads[suffix]), renames=bare.renames, ignored=ignored)


def config_from_original(tensors: TensorSource) -> SEWConfig:
    """Our configuration from the settings and shapes of an original file."""
    disentangled = _is_disentangled(tensors)
    settings = fairseq_settings(tensors.metadata)
    table = original_table(SEWConfig(), "SEWDForPreTraining" if disentangled else "SEWForPreTraining")
    names = {table.today(name): name for name in tensors.names()}
    # DeBERTa's blocks under the names by which their number and widths are looked up.
    familiar = {
        re.sub(r"intermediate\.dense", "fc1", re.sub(r"^encoder\.encoder\.layer\.", "encoder.layers.", today)): name
        for today, name in names.items()
    }
    fields = network_sizes(tensors, familiar) | settings_fields(settings, _CONFIG_DEFAULTS)
    if disentangled:
        fields |= {"layer_norm_eps": 1e-7}
        if settings.get("pos_att_type"):
            fields["pos_att_type"] = tuple(settings["pos_att_type"].split("|"))
    fields.setdefault("num_attention_heads", fields["hidden_size"] // 64)
    if "quantizer.vars" in names:
        _, entries, width = tensors.shape(names["quantizer.vars"])
        groups = int(settings.get("latent_groups") or 2)
        fields["num_codevector_groups"], fields["num_codevectors_per_group"] = groups, entries // groups
        fields["codevector_dim"] = width * groups
        fields["mlp_hidden_size"] = tensors.shape(names["project_q.net.0.weight"])[0]
        fields["proj_codevector_dim"] = tensors.shape(names["project_q.net.3.weight"])[0]
    if "proj.weight" in names:
        fields["vocab_size"] = tensors.shape(names["proj.weight"])[0]
    return SEWConfig(**fields, frame_rule="samples", squeeze_rule="floor")


def _is_original(tensors: TensorSource) -> bool:
    return any(name.endswith("encoder.upsample.0.weight") for name in tensors.names())


def _is_disentangled(tensors: TensorSource) -> bool:
    return any(name.endswith("encoder.encoder.rel_embeddings.weight") for name in tensors.names())


def recognise(path: Path) -> bool:
    """Is this one of the original `.pt` files?"""
    return path.is_file() and path.suffix in {".pt", ".pth", ".bin"} and _is_original(open_tensors(path))


def open_checkpoint(path: Path, model_class: str | None = None) -> ForeignCheckpoint:
    """Open a checkpoint of SEW or SEW-D of either form.

    Raises:
        SourceError: if files are missing.
        CheckpointError: if they are damaged or hold something else.
    """
    if path.is_dir() and (path / "config.json").is_file():
        return open_hugging_face(path, model_class, config_from_hugging_face, hugging_face_table)
    tensors = open_tensors(path)
    if not _is_original(tensors):
        raise SourceError(f"{path} is no SEW of the original code, and has no config.json beside it.")
    if model_class is None:
        names = tensors.names()
        head = "ForPreTraining" if any(n.endswith("quantizer.vars") for n in names) else "Model"
        if any(n.endswith("w2v_encoder.proj.weight") for n in names):
            head = "ForCTC"
        model_class = ("SEWD" if _is_disentangled(tensors) else "SEW") + head
    config = config_from_original(tensors)
    return ForeignCheckpoint(model_class, config, tensors, original_table(config, model_class), path)
