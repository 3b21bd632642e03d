r"""wav2vec 2.0's foreign forms: Hugging Face directories, fairseq's `.pt` files, torchaudio's state dicts.

HuBERT, WavLM, UniSpeech, SEW, MMS and XLS-R call the same layers by the same names, so their modules build their tables
out of the rules here.
"""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from audiozoo.errors import CheckpointError, SourceError
from audiozoo.models.wav2vec2 import Wav2Vec2Config
from weights_conversion import (
    ForeignCheckpoint,
    HuggingFaceForm,
    alphabets,
    labels_from_hugging_face,
    labels_to_hugging_face,
    read_json,
    take,
)
from weights_conversion.alphabets import labels_of, mapping
from weights_conversion.readers import TensorSource, open_tensors
from weights_conversion.rules import Ignore, Rule, Table, Tensors, conv1d, identity, reshape, squeeze, transpose

MODEL_TYPE = "wav2vec2"
processor_of_file = alphabets.processor_of_file

# --- Hugging Face ----------------------------------------------------------------------------------------------------


def linear(foreign: str, ours: str | None = None) -> tuple[Rule, Rule]:
    """Weight and bias of a linear map."""
    ours = ours or foreign
    return Rule(f"{foreign}.weight", f"{ours}.kernel", transpose), Rule(f"{foreign}.bias", f"{ours}.bias")


def convolution(foreign: str, ours: str | None = None) -> tuple[Rule, Rule]:
    """Weight and bias of a convolution."""
    ours = ours or foreign
    return Rule(f"{foreign}.weight", f"{ours}.kernel", conv1d), Rule(f"{foreign}.bias", f"{ours}.bias")


def norm(foreign: str, ours: str | None = None) -> tuple[Rule, Rule]:
    """Weight and bias of a normalisation."""
    ours = ours or foreign
    return Rule(f"{foreign}.weight", f"{ours}.scale"), Rule(f"{foreign}.bias", f"{ours}.bias")


def positional_convolution(foreign: str, ours: str) -> tuple[Rule, ...]:
    """Magnitude, direction and bias of the weight-normalised convolution, in PyTorch's names of today."""
    parametrised = f"{foreign}.parametrizations.weight.original"
    return (
        Rule(f"{parametrised}0", f"{ours}.kernel_g", conv1d),
        Rule(f"{parametrised}1", f"{ours}.kernel_v", conv1d),
        Rule(f"{foreign}.bias", f"{ours}.bias"),
    )


# PyTorch's older names of the same two tensors.
OLD_WEIGHT_NORM = (
    (r"\.weight_g$", ".parametrizations.weight.original0"),
    (r"\.weight_v$", ".parametrizations.weight.original1"),
)

FEATURE_ENCODER = (
    *convolution("feature_extractor.conv_layers.{i}.conv"),
    *norm("feature_extractor.conv_layers.{i}.layer_norm"),
)
FEATURE_PROJECTION = (*norm("feature_projection.layer_norm"), *linear("feature_projection.projection"))
ATTENTION = linear("encoder.layers.{i}.attention.{p:q_proj|k_proj|v_proj|out_proj}")
ENCODER = (
    *positional_convolution("encoder.pos_conv_embed.conv", "encoder.pos_conv_embed.conv"),
    *norm("encoder.layer_norm"),
    *ATTENTION,
    *norm("encoder.layers.{i}.{norm:layer_norm|final_layer_norm}"),
    *linear("encoder.layers.{i}.feed_forward.{dense:intermediate_dense|output_dense}"),
)
ATTENTION_ADAPTERS = (
    *norm("encoder.layers.{i}.adapter_layer.norm"),
    *linear("encoder.layers.{i}.adapter_layer.{map:linear_1|linear_2}"),
)
ADAPTER = (
    *linear("adapter.proj"),
    *norm("adapter.proj_layer_norm"),
    *convolution("adapter.layers.{i}.conv"),
)
BACKBONE = (
    *FEATURE_ENCODER,
    *FEATURE_PROJECTION,
    Rule("masked_spec_embed", "masked_spec_embed"),
    *ENCODER,
    *ATTENTION_ADAPTERS,
    *ADAPTER,
)
QUANTIZER = (
    Rule("quantizer.codevectors", "quantizer.codevectors"),
    *linear("quantizer.weight_proj"),
    *linear("{projection:project_hid|project_q}"),
)
_CLASSIFIER = (*linear("{part:projector|classifier}"), Rule("layer_weights", "layer_weights"))

# What classes hold beside the backbone: regular expressions of whole names.
_OF_PRE_TRAINING = r"(quantizer|project_hid|project_q)(\..*)?"
_OF_CTC = r"lm_head\..*"
_OF_CLASSIFIERS = r"(projector|classifier)\..*|layer_weights"
_OF_X_VECTORS = r"(tdnn|objective)\..*|feature_extractor\.(weight|bias)"


def _left_behind(suffix: str) -> tuple[Ignore, ...]:
    """What a class does not take over from a file of another one, as of a recogniser that becomes a classifier."""
    own = {
        "ForPreTraining": (_OF_PRE_TRAINING,),
        "ForCTC": (_OF_CTC,),
        "ForSequenceClassification": (_OF_CLASSIFIERS,),
        "ForAudioFrameClassification": (_OF_CLASSIFIERS,),
        "ForXVector": (_OF_CLASSIFIERS, _OF_X_VECTORS),
        "Model": (),
    }
    if suffix not in own:
        return (Ignore(_OF_PRE_TRAINING, "left over from pre-training"),)
    heads = (_OF_PRE_TRAINING, _OF_CTC, _OF_CLASSIFIERS, _OF_X_VECTORS)
    return tuple(Ignore(head, "of another class") for head in heads if head not in own[suffix])


def _x_vector(config: Any) -> tuple[Rule, ...]:
    rules: list[Rule] = []
    for i, (taps, width) in enumerate(zip(config.tdnn_kernel, config.tdnn_dim, strict=True)):
        # A linear map over unfolded frames, (out, taps * in), is a convolution: (taps, in, out).
        as_kernel = transpose >> reshape((taps, -1, width), (-1, width))
        rules.append(Rule(f"tdnn.{i}.kernel.weight", f"tdnn.{i}.kernel", as_kernel))
        rules.append(Rule(f"tdnn.{i}.kernel.bias", f"tdnn.{i}.bias"))
    return (*rules, *linear("feature_extractor"), Rule("objective.weight", "objective.kernel"), *_CLASSIFIER)


def head_rules(config: Any, suffix: str) -> tuple[Rule, ...]:
    """What a class adds to the backbone; `suffix` is its name without the family's, "ForCTC"."""
    heads = {
        "ForCTC": linear("lm_head"),
        "ForPreTraining": QUANTIZER,
        "ForSequenceClassification": _CLASSIFIER,
        "ForAudioFrameClassification": _CLASSIFIER,
    }
    if suffix == "ForXVector":
        return _x_vector(config)
    if suffix not in heads:
        raise CheckpointError(f"There is no class …{suffix} of this family in `transformers`.")
    return heads[suffix]


def family_table(
    config: Any,
    model_class: str,
    *,
    family: str = "Wav2Vec2",
    prefix: str = "wav2vec2",
    backbone: Sequence[Rule] = BACKBONE,
    heads: Mapping[str, Sequence[Rule]] | None = None,
) -> Table:
    """The table of one class of a family.

    Args:
        config: our configuration.
        model_class: "Wav2Vec2ForCTC".
        family: its beginning.
        prefix: the name of the backbone in the classes with a head.
        backbone: rules of the bare model.
        heads: rules of the classes that this family has beside those of wav2vec 2.0, or in place of them, by suffix.
    """
    suffix = model_class.removeprefix(family)
    if not model_class.startswith(family):
        raise CheckpointError(f"{model_class} is not one of {family}'s classes.")
    ignored = _left_behind(suffix)
    if suffix == "Model":
        return Table(backbone, renames=((rf"^{prefix}\.", ""), *OLD_WEIGHT_NORM), ignored=ignored)
    rules = heads[suffix] if heads and suffix in heads else head_rules(config, suffix)
    bare = r"^(feature_extractor\.conv_layers|feature_projection|masked_spec_embed|encoder|adapter)\b"
    return Table(
        (*(rule.prefixed(f"{prefix}.", f"{prefix}.") for rule in backbone), *rules),
        renames=((bare, rf"{prefix}.\1"), *OLD_WEIGHT_NORM),
        ignored=ignored,
    )


def hugging_face_table(config: Wav2Vec2Config, model_class: str) -> Table:
    """The correspondence with what `save_pretrained` writes for that class."""
    return family_table(config, model_class)


_CONFIG_DEFAULTS: dict[str, Any] = {
    f.name: f.default for f in dataclasses.fields(Wav2Vec2Config) if f.name != "id2label"
}


def config_from_hugging_face(config: Mapping[str, Any], where: str = "config.json") -> Wav2Vec2Config:
    """Our configuration from a `config.json`."""
    return Wav2Vec2Config(**take(config, _CONFIG_DEFAULTS, where), **labels_from_hugging_face(config))


def config_to_hugging_face(config: Any, model_class: str, model_type: str) -> dict[str, Any]:
    """A `config.json` from our configuration."""
    raw = dataclasses.asdict(config)
    labels = raw.pop("id2label")
    if raw.get("output_hidden_size") is None:
        raw.pop("output_hidden_size", None)
    raw |= {"architectures": [model_class], "model_type": model_type, "dtype": "float32"}
    if "conv_dim" in raw:
        raw["num_feat_extract_layers"] = len(config.conv_dim)
    return raw | labels_to_hugging_face(labels)


# --- fairseq ---------------------------------------------------------------------------------------------------------


def _fairseq_blocks() -> list[Rule]:
    block = "encoder.layers.{i}."
    rules = [
        *linear(
            block + "self_attn.{p:q_proj|k_proj|v_proj|out_proj}", block + "attention.{p:q_proj|k_proj|v_proj|out_proj}"
        ),
        *norm(block + "self_attn_layer_norm", block + "layer_norm"),
        *norm(block + "final_layer_norm"),
        *linear(block + "fc1", block + "feed_forward.intermediate_dense"),
        *linear(block + "fc2", block + "feed_forward.output_dense"),
    ]
    # MMS: one adapter a block, along a leading axis of length one.
    for theirs, mine, operation in (
        ("W_a", "linear_1.kernel", squeeze(0) >> transpose),
        ("W_b", "linear_2.kernel", squeeze(0) >> transpose),
        ("b_a", "linear_1.bias", squeeze(0)),
        ("b_b", "linear_2.bias", squeeze(0)),
        ("ln_W", "norm.scale", squeeze(0)),
        ("ln_b", "norm.bias", squeeze(0)),
    ):
        rules.append(Rule(f"{block}adapter_layer.{theirs}", f"{block}adapter_layer.{mine}", operation))
    return rules


def fairseq_table(
    config: Any,
    model_class: str,
    *,
    family: str = "Wav2Vec2",
    prefix: str = "wav2vec2",
    blocks: Sequence[Rule] | None = None,
) -> Table:
    """The correspondence with fairseq's names, of pre-trained and of fine-tuned files.

    Args:
        config: our configuration.
        model_class: "Wav2Vec2ForCTC".
        family: its beginning.
        prefix: the name of the backbone in the classes with a head.
        blocks: rules of the blocks, where they are not the Transformer's.
    """
    suffix = model_class.removeprefix(family)
    layer_norms = "feature_extractor.conv_layers.{i}.2.1"
    rules = [
        *convolution("feature_extractor.conv_layers.{i}.0", "feature_extractor.conv_layers.{i}.conv"),
        *(
            norm(layer_norms, "feature_extractor.conv_layers.{i}.layer_norm")
            if config.feat_extract_norm == "layer"
            else norm("feature_extractor.conv_layers.0.2", "feature_extractor.conv_layers.0.layer_norm")
        ),
        *norm("layer_norm", "feature_projection.layer_norm"),
        *linear("post_extract_proj", "feature_projection.projection"),
        Rule("mask_emb", "masked_spec_embed"),
        *positional_convolution("encoder.pos_conv.0", "encoder.pos_conv_embed.conv"),
        *norm("encoder.layer_norm"),
        *(_fairseq_blocks() if blocks is None else blocks),
    ]
    if suffix != "Model":
        rules = [rule.prefixed("", f"{prefix}.") for rule in rules]
    if suffix == "ForPreTraining":
        rules += [
            Rule("quantizer.vars", "quantizer.codevectors", identity),
            *linear("quantizer.weight_proj"),
            *linear("project_q"),
            *linear("final_proj", "project_hid"),
        ]
    elif suffix == "ForCTC":
        rules += linear("proj", "lm_head")
    elif suffix == "ForSequenceClassification":
        rules += [*linear("pooling_layer.linear", "projector"), *linear("pooling_layer.projection", "classifier")]
    other = r"quantizer\..*|project_q\..*|final_proj\..*|target_glu\..*"
    if suffix == "Model":
        other += r"|proj\..*|pooling_layer\..*"
    ignored = () if suffix == "ForPreTraining" else (Ignore(other, "no part of this class"),)
    renames = ((r"^w2v_encoder\.", ""), (r"^w2v_model\.", ""), *OLD_WEIGHT_NORM)
    return Table(rules, renames=renames, ignored=ignored)


def convolutions_from_fairseq(text: str) -> list[tuple[int, int, int]]:
    """`(channels, taps, stride)` of every convolution, from "[(512, 10, 5)] + [(512, 3, 2)] * 4 + …", read as data.

    Raises:
        CheckpointError: if it is anything but lists of numbers, added and repeated.
    """

    def value(node: ast.AST) -> Any:
        if isinstance(node, ast.Expression):
            return value(node.body)
        if isinstance(node, ast.Constant) and type(node.value) is int and 0 <= node.value < 100_000:
            return node.value
        if isinstance(node, ast.List | ast.Tuple) and len(node.elts) <= 64:
            items = [value(item) for item in node.elts]
            return items if isinstance(node, ast.List) else tuple(items)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Mult):
            left, right = value(node.left), value(node.right)
            if isinstance(node.op, ast.Add) and isinstance(left, list) and isinstance(right, list):
                return left + right
            if isinstance(node.op, ast.Mult) and isinstance(left, list) and isinstance(right, int) and right <= 64:
                return left * right
        raise ValueError

    try:
        layers = value(ast.parse(text, mode="eval"))
        if not layers or any(len(layer) != 3 for layer in layers):
            raise ValueError
    except (ValueError, SyntaxError, TypeError, RecursionError):
        raise CheckpointError(f"{text[:80]!r} does not describe convolutions as fairseq does.") from None
    return layers


def fairseq_settings(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """fairseq's settings of the model in a file; of a fine-tuned one, its own over those of the pre-trained one."""
    outer = mapping(mapping(metadata.get("cfg")).get("model")) or mapping(metadata.get("args"))
    inner = mapping(outer.get("w2v_args"))
    inner = mapping(inner.get("model")) or inner
    own = {k: v for k, v in outer.items() if v is not None and k != "w2v_args"}
    # A fine-tuned file names its dropouts and masks anew; the network's shape is that of the pre-trained one.
    return {**own, **{k: v for k, v in inner.items() if k not in own or k in _SHAPE}, "_inner": inner, "_own": own}


_SHAPE = (
    "conv_feature_layers",
    "encoder_attention_heads",
    "layer_norm_first",
    "extractor_mode",
    "latent_groups",
    "logit_temp",
    "num_negatives",
    "activation_fn",
)
_FAIRSEQ_FIELDS = {
    "activation_fn": "hidden_act",
    "dropout": "hidden_dropout",
    "attention_dropout": "attention_dropout",
    "activation_dropout": "activation_dropout",
    "dropout_input": "feat_proj_dropout",
    "dropout_features": "feat_quantizer_dropout",
    "final_dropout": "final_dropout",
    "mask_prob": "mask_time_prob",
    "mask_length": "mask_time_length",
    "mask_channel_prob": "mask_feature_prob",
    "mask_channel_length": "mask_feature_length",
    "logit_temp": "contrastive_logits_temperature",
    "num_negatives": "num_negatives",
}


_SHAPE_FIELDS = {
    "encoder_attention_heads": "num_attention_heads",
    "layer_norm_first": "do_stable_layer_norm",
    "encoder_layerdrop": "layerdrop",
    "label_rate": "label_rate",
    "num_buckets": "num_buckets",
    "max_distance": "max_bucket_distance",
    "squeeze_factor": "squeeze_factor",
    "mlp_hidden_size": "mlp_hidden_size",
    "position_buckets": "position_buckets",
    "max_position_embeddings": "max_position_embeddings",
    "share_att_key": "share_att_key",
    "norm_rel_ebd": "norm_rel_ebd",
    "utterance_contrastive_layer": "utterance_contrastive_layer",
    "replace_prob": "replace_prob",
}


def settings_fields(settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a configuration that fairseq's settings, or those of a follow-up's code, name.

    Args:
        settings: of the model.
        defaults: the fields that the configuration has, with their defaults.
    """
    fields = {}
    for theirs, mine in (_FAIRSEQ_FIELDS | _SHAPE_FIELDS).items():
        if settings.get(theirs) is not None and mine in defaults:
            fields[mine] = type(defaults[mine])(settings[theirs])
    if settings.get("conv_feature_layers"):
        fields["conv_stride"] = tuple(s for _, _, s in convolutions_from_fairseq(settings["conv_feature_layers"]))
    if not fields.get("mask_time_prob") and not fields.get("mask_feature_prob"):
        fields["mask_time_prob"] = 0.65  # the vector for masked frames is in every file
    return fields


def network_sizes(tensors: Tensors, names: Mapping[str, str]) -> dict[str, Any]:
    """What shapes say of a network: widths, layers, convolutions.

    Args:
        tensors: the file.
        names: today's name of each of its tensors, in fairseq's or torchaudio's spelling, to the file's.
    """

    def find(*candidates: str) -> tuple[int, ...]:
        for name in candidates:
            if name in names:
                return tensors.shape(names[name])
        raise CheckpointError(
            f"The checkpoint has no {candidates[0]}, so it is no wav2vec 2.0 of fairseq or torchaudio."
        )

    def count(start: str) -> int:
        return 1 + max(int(n.removeprefix(start).split(".")[0]) for n in names if n.startswith(start))

    torchaudio = "encoder.transformer.layer_norm.weight" in names
    blocks = "encoder.transformer.layers." if torchaudio else "encoder.layers."
    convolutions = range(count("feature_extractor.conv_layers."))
    kind = "conv" if torchaudio else "0"
    kernels = [find(f"feature_extractor.conv_layers.{i}.{kind}.weight") for i in convolutions]
    positional = "encoder.transformer.pos_conv_embed.conv" if torchaudio else "encoder.pos_conv.0"
    direction = find(f"{positional}.parametrizations.weight.original1")
    last = f"feature_extractor.conv_layers.{len(kernels) - 1}"
    layered = f"{last}.layer_norm.weight" in names or f"{last}.2.1.weight" in names
    mlp = "feed_forward.intermediate_dense" if torchaudio else "fc1"
    return {
        "hidden_size": direction[0],
        "num_hidden_layers": count(blocks),
        "intermediate_size": find(f"{blocks}0.{mlp}.weight")[0],
        "conv_dim": tuple(k[0] for k in kernels),
        "conv_kernel": tuple(k[2] for k in kernels),
        "conv_bias": f"feature_extractor.conv_layers.0.{kind}.bias" in names,
        "feat_extract_norm": "layer" if layered else "group",
        "num_conv_pos_embeddings": direction[2],
        "num_conv_pos_embedding_groups": direction[0] // direction[1],
    }


def config_from_fairseq(
    tensors: TensorSource, inside: str = "", renames: Sequence[tuple[str, str]] = ()
) -> Wav2Vec2Config:
    """Our configuration from the settings and shapes of a fairseq file.

    Args:
        tensors: the file.
        inside: what stands before the names of a model that lies inside another.
        renames: other names of what is looked up, as a `Table` has them.
    """
    settings = fairseq_settings(tensors.metadata)
    table = fairseq_table(Wav2Vec2Config(), "Wav2Vec2ForPreTraining")
    table = dataclasses.replace(table, renames=(*table.renames, *renames))
    names = {table.today(name.removeprefix(inside)): name for name in tensors.names() if name.startswith(inside)}
    fields = network_sizes(tensors, names)
    for theirs, mine in _FAIRSEQ_FIELDS.items():
        if settings.get(theirs) is not None:
            kind = type(_CONFIG_DEFAULTS[mine])
            fields[mine] = kind(settings[theirs])
    layerdrop = settings.get("layerdrop", settings.get("encoder_layerdrop"))
    fields["layerdrop"] = float(layerdrop or 0.0)
    fields["num_attention_heads"] = int(
        settings.get("encoder_attention_heads") or (12 if fields["hidden_size"] == 768 else 16)
    )
    stable = settings.get("layer_norm_first")
    fields["do_stable_layer_norm"] = fields["feat_extract_norm"] == "layer" if stable is None else bool(stable)
    if settings.get("conv_feature_layers"):
        fields["conv_stride"] = tuple(s for _, _, s in convolutions_from_fairseq(settings["conv_feature_layers"]))
    if "mask_emb" not in names:
        fields["mask_time_prob"] = fields["mask_feature_prob"] = 0.0
    elif not fields.get("mask_time_prob") and not fields.get("mask_feature_prob"):
        fields["mask_time_prob"] = 0.65  # pre-training's; the vector for masked frames is there
    if settings.get("apply_mask") is False and (inside or "proj.weight" in names):
        fields["apply_spec_augment"] = False
    if "quantizer.vars" in names:
        _, entries, width = tensors.shape(names["quantizer.vars"])
        groups = int(settings.get("latent_groups") or 2)
        fields["num_codevector_groups"], fields["num_codevectors_per_group"] = groups, entries // groups
        fields["codevector_dim"] = width * groups
        fields["proj_codevector_dim"] = tensors.shape(names["project_q.weight"])[0]
    if "proj.weight" in names:
        fields["vocab_size"] = tensors.shape(names["proj.weight"])[0]
    if "pooling_layer.projection.weight" in names:
        fields["classifier_proj_size"] = tensors.shape(names["pooling_layer.linear.weight"])[0]
        fields["id2label"] = labels_of(tensors, tensors.shape(names["pooling_layer.projection.weight"])[0])
    if (adapter := "encoder.layers.0.adapter_layer.W_a") in names:
        fields["adapter_attn_dim"] = tensors.shape(names[adapter])[1]
    return Wav2Vec2Config(**fields)


def fairseq_class(tensors: TensorSource) -> str:
    """The class of a fairseq file, by what stands behind the network in it."""
    names = tensors.names()
    if "w2v_encoder.proj.weight" in names:
        return "Wav2Vec2ForCTC"
    if any("pooling_layer.projection.weight" in name for name in names):
        return "Wav2Vec2ForSequenceClassification"
    return "Wav2Vec2ForPreTraining" if "quantizer.vars" in names else "Wav2Vec2Model"


# --- torchaudio ------------------------------------------------------------------------------------------------------


def torchaudio_table(model_class: str) -> Table:
    """The correspondence with the state dict of torchaudio's `Wav2Vec2Model`, which MMS's aligner also is."""
    block, ours = "encoder.transformer.layers.{i}.", "encoder.layers.{i}."
    words = "{p:q_proj|k_proj|v_proj|out_proj}"
    dense = "{dense:intermediate_dense|output_dense}"
    rules = (
        *FEATURE_ENCODER,
        *(rule.prefixed("encoder.", "") for rule in FEATURE_PROJECTION),
        *positional_convolution("encoder.transformer.pos_conv_embed.conv", "encoder.pos_conv_embed.conv"),
        *norm("encoder.transformer.layer_norm", "encoder.layer_norm"),
        *linear(f"{block}attention.{words}", f"{ours}attention.{words}"),
        *norm(block + "{norm:layer_norm|final_layer_norm}", ours + "{norm:layer_norm|final_layer_norm}"),
        *linear(f"{block}feed_forward.{dense}", f"{ours}feed_forward.{dense}"),
    )
    if model_class == "Wav2Vec2Model":
        return Table(rules, renames=OLD_WEIGHT_NORM, ignored=(Ignore(r"aux\..*", "no part of this class"),))
    if model_class == "Wav2Vec2ForCTC":
        deeper = tuple(rule.prefixed("", "wav2vec2.") for rule in rules)
        return Table((*deeper, *linear("aux", "lm_head")), renames=OLD_WEIGHT_NORM)
    raise CheckpointError(f"torchaudio's files load as Wav2Vec2Model or Wav2Vec2ForCTC, not as {model_class}.")


def config_from_torchaudio(tensors: Tensors) -> Wav2Vec2Config:
    """Our configuration from the shapes in torchaudio's state dict."""
    table = torchaudio_table("Wav2Vec2Model")
    names = {table.today(name): name for name in tensors.names()}
    fields = network_sizes(tensors, names)
    fields["num_attention_heads"] = 12 if fields["hidden_size"] == 768 else 16
    fields["do_stable_layer_norm"] = fields["feat_extract_norm"] == "layer"
    fields["mask_time_prob"] = 0.0  # the vector for masked frames is not in the file
    if "aux.weight" in names:
        fields["vocab_size"] = tensors.shape(names["aux.weight"])[0]
    return Wav2Vec2Config(**fields)


# --- opening ---------------------------------------------------------------------------------------------------------


def _architectures(directory: Path) -> list[str]:
    config = directory / "config.json"
    return (read_json(config).get("architectures") or []) if config.is_file() else []


def kind_of_file(tensors: TensorSource) -> str | None:
    """ "fairseq", "conformer" (fairseq's too, with other blocks), "torchaudio" or None."""
    names = tensors.names()
    if "encoder.transformer.layer_norm.weight" in names and "feature_extractor.conv_layers.0.conv.weight" in names:
        return None if any("rel_attn_embed" in name for name in names) else "torchaudio"  # WavLM
    if tensors.format != "pytorch" or not any(n.endswith("feature_extractor.conv_layers.0.0.weight") for n in names):
        return None
    if "relative_position_embedding" in mapping(tensors.metadata.get("cfg")):
        return None  # WavLM or UniSpeech-SAT
    settings = fairseq_settings(tensors.metadata)
    if settings.get("transpose"):
        return None  # UniSpeech
    said = [
        settings.get("_name"),
        settings.get("arch"),
        settings["_inner"].get("_name"),
        settings["_inner"].get("arch"),
    ]
    others = ("hubert", "wavlm", "unispeech", "ils", "sew", "data2vec")
    if any(str(name).startswith(others) for name in said if name):
        return None
    foreign = ("label_embs_concat", "spk_proj", "relative_attention_bias", "grep_linear", "encoder.upsample.")
    if any(word in name for name in names for word in foreign) or any("decoder." in name for name in names):
        return None
    return "conformer" if any(".conv_module." in name for name in names) else "fairseq"


def recognise(path: Path) -> bool:
    """Is this a `.pt` file of fairseq's wav2vec 2.0, or a state dict of torchaudio's?"""
    if not path.is_file() or path.suffix not in {".pt", ".pth", ".bin"}:
        return False
    return kind_of_file(open_tensors(path)) in ("fairseq", "torchaudio")


def open_checkpoint(path: Path, model_class: str | None = None) -> ForeignCheckpoint:
    """Open a wav2vec 2.0 checkpoint of any of the three forms.

    Raises:
        SourceError: if files are missing.
        CheckpointError: if they are damaged or hold something else.
    """
    if path.is_dir() and (path / "config.json").is_file():
        return open_hugging_face(path, model_class, config_from_hugging_face, hugging_face_table)
    tensors = open_tensors(path)
    kind = kind_of_file(tensors)
    if kind == "torchaudio":
        model_class = model_class or ("Wav2Vec2ForCTC" if "aux.weight" in tensors.names() else "Wav2Vec2Model")
        table = torchaudio_table(model_class)
        return ForeignCheckpoint(model_class, config_from_torchaudio(tensors), tensors, table, path)
    if kind == "fairseq":
        from weights_conversion import ecapa_tdnn_names as ecapa  # which needs the rules of this file

        if ecapa.is_verification(tensors):
            return ecapa.open_verification(path, tensors, "Wav2Vec2", "wav2vec2", config_from_fairseq, fairseq_table)
        model_class = model_class or fairseq_class(tensors)
        config = config_from_fairseq(tensors)
        return ForeignCheckpoint(model_class, config, tensors, fairseq_table(config, model_class), path)
    raise SourceError(f"{path} is no wav2vec 2.0 of fairseq or torchaudio, and has no config.json beside it.")


def open_hugging_face(
    directory: Path,
    model_class: str | None,
    read_config: Callable[[Mapping[str, Any], str], Any],
    make_table: Callable[[Any, str], Table],
) -> ForeignCheckpoint:
    """Open a Hugging Face directory of any paper of the family.

    Args:
        directory: holds `config.json` and tensors.
        model_class: by default the one that `config.json` names.
        read_config: our configuration from a `config.json`.
        make_table: the correspondence for a configuration and a class.
    """
    raw = read_json(directory / "config.json")
    if model_class is None:
        architectures = raw.get("architectures") or []
        if not architectures:
            raise SourceError(f"{directory / 'config.json'} names no class; give model_class.")
        model_class = str(architectures[0])
    config = read_config(raw, str(directory / "config.json"))
    tensors = open_tensors(directory)
    # Fine-tuned checkpoints of the first months lack the vector for masked frames, which only training reads.
    absent = None
    if not any(name.endswith("masked_spec_embed") for name in tensors.names()):
        absent = r"(\w+\.)?masked_spec_embed"
    return ForeignCheckpoint(
        model_class, config, tensors, make_table(config, model_class), directory, may_be_absent=absent
    )


def hugging_face(model: Any) -> HuggingFaceForm:
    """A wav2vec 2.0 model as the directory that `save_pretrained` would write."""
    name = type(model).__name__
    config = config_to_hugging_face(model.config, name, MODEL_TYPE)
    return HuggingFaceForm({"config.json": config}, hugging_face_table(model.config, name))


# --- adapters of one language (MMS) ----------------------------------------------------------------------------------


def adapter_table(prefix: str = "wav2vec2") -> Table:
    """The correspondence with `adapter.<language>.safetensors`: the adapter of every block, and the letters' head."""
    deeper = tuple(rule.prefixed(f"{prefix}.", f"{prefix}.") for rule in ATTENTION_ADAPTERS)
    return Table((*deeper, *linear("lm_head")))


def languages_of(tensors: TensorSource) -> dict[str, TensorSource]:
    """The adapters and head of every language in fairseq's file of MMS; none if it holds no languages."""
    found = tensors.metadata.get("adapter")
    own = {str(k): v.get("model") for k, v in found.items()} if isinstance(found, Mapping) else {}
    return {
        language: TensorSource(tensors.path, tensors.format, dict(part), {}, f"adapter.{language}.model")
        for language, part in own.items()
        if isinstance(part, Mapping)
    }


def read_adapter(directory: Path, language: str) -> dict[str, Any]:
    """Our parameters of one language's adapter, from `adapter.<language>.safetensors` or `.bin` in a directory.

    Args:
        directory: or fairseq's file of all languages.
        language: ISO 639-3 code.

    Raises:
        SourceError: if there is no such language, with those that there are.
    """
    if directory.is_file():
        found = languages_of(open_tensors(directory))
        if language not in found:
            shown = ", ".join(list(found)[:12]) + (" …" if len(found) > 12 else "")
            raise SourceError(f"{directory} has no adapter for {language!r}; it has {shown or 'none'}.")
        return parameters_of(found[language], fairseq_table(Wav2Vec2Config(), "Wav2Vec2ForCTC"), str(directory))
    for suffix in ("safetensors", "bin"):
        file = directory / f"adapter.{language}.{suffix}"
        if file.is_file():
            break
    else:
        known = sorted(p.name.split(".")[1] for p in directory.glob("adapter.*.*"))
        shown = ", ".join(known[:12]) + (" …" if len(known) > 12 else "")
        raise SourceError(f"{directory} has no adapter for {language!r}; it has {shown or 'none'}.")
    with open_tensors(file) as tensors:
        return parameters_of(tensors, adapter_table(), str(file))


def parameters_of(tensors: TensorSource, table: Table, where: str) -> dict[str, Any]:
    """Our parameters of one language, read strictly: every tensor must be an adapter's or the head's."""
    expected: dict[str, Any] = {}
    for name in tensors.names():
        for rule in table.rules:
            if (values := rule.match_foreign(table.today(name))) is not None:
                shape = tensors.shape(name)
                if re.search(r"adapter_layer\.(W_|b_|ln_)", name):  # fairseq's, along an axis of length one
                    shape = shape[1:]
                expected[rule.our_paths(values)[0]] = _Shape(shape[::-1])
    steps = table.plan(tensors, expected, where=where, model="an adapter")
    return dict(table.read(tensors, steps))


@dataclasses.dataclass(frozen=True)
class _Shape:
    shape: tuple[int, ...]


def load_adapter(model: Any, directory: str | Path, target_lang: str) -> Any:
    """A copy of a `Wav2Vec2ForCTC` with another language's adapters and head, of the size of its alphabet.

    Args:
        model: with `adapter_attn_dim`.
        directory: holds `adapter.<target_lang>.safetensors` or `.bin`; or fairseq's file of all languages.
        target_lang: ISO 639-3 code, as in the file's name.

    Raises:
        CheckpointError: if the model has no adapters, or the file does not fit it.
        SourceError: if there is no such file.
    """
    import jax.numpy as jnp
    from flax import nnx

    if getattr(model.config, "adapter_attn_dim", None) is None:
        raise CheckpointError(f"This {type(model).__name__} has no adapters: its adapter_attn_dim is not set.")
    values = read_adapter(Path(directory), target_lang)
    model = nnx.merge(*nnx.split(model))
    flat = {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    wanted = {name for name in flat if ".adapter_layer." in name or name.startswith("lm_head.")}
    if wanted != set(values):
        raise CheckpointError(
            f"The adapter for {target_lang!r} does not fit the model:\n"
            + "\n".join(
                [f"  + {n}" for n in sorted(set(values) - wanted)] + [f"  - {n}" for n in sorted(wanted - set(values))]
            )
        )
    size = int(values["lm_head.bias"].shape[0])
    for name, value in values.items():
        shape = tuple(flat[name].shape)
        if not name.startswith("lm_head.") and shape != value.shape:
            raise CheckpointError(f"{name} of the adapter for {target_lang!r} is {value.shape}; the model has {shape}.")
        module: Any = model
        *owners, leaf = name.split(".")
        for part in owners:
            module = module[int(part)] if part.isdigit() else getattr(module, part)
        setattr(module, leaf, nnx.Param(jnp.asarray(value, flat[name].dtype)))
    model.lm_head.out_features = size
    model.config = dataclasses.replace(model.config, vocab_size=size)
    return model
