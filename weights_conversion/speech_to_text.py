"""fairseq S2T's foreign forms: Hugging Face directories of today and before, and fairseq's `.pt` files."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from audiozoo.errors import CheckpointError, SourceError
from audiozoo.models.speech_to_text import Speech2TextConfig, Speech2TextGenerationConfig
from audiozoo.processors.speech_to_text import Speech2TextProcessor
from weights_conversion import ForeignCheckpoint, HuggingFaceForm, read_json, search_options, take
from weights_conversion.readers import TensorSource, open_tensors
from weights_conversion.rules import Ignore, Rule, Table, Tied, transpose
from weights_conversion.wav2vec2 import convolution, fairseq_settings, linear, norm

MODEL_TYPE = "speech_to_text"
CLASSES = ("Speech2TextForConditionalGeneration", "Speech2TextModel")

_ENCODER = "encoder.layers.{i}."
_DECODER = "decoder.layers.{i}."
_PROJECTION = "{p:q_proj|k_proj|v_proj|out_proj}"
BLOCKS = (
    *linear(_DECODER + "{a:self_attn|encoder_attn}." + _PROJECTION),
    *norm(_DECODER + "{n:self_attn_layer_norm|encoder_attn_layer_norm|final_layer_norm}"),
    *linear(_DECODER + "{d:fc1|fc2}"),
)
DECODER = (Rule("decoder.embed_tokens.weight", "decoder.embed_tokens.embedding"), *BLOCKS)
RULES = (
    *convolution("encoder.conv.conv_layers.{i}"),
    *linear(_ENCODER + "self_attn." + _PROJECTION),
    *norm(_ENCODER + "{n:self_attn_layer_norm|final_layer_norm}"),
    *linear(_ENCODER + "{d:fc1|fc2}"),
    *norm("encoder.layer_norm"),
    *DECODER,
    *norm("decoder.layer_norm"),
)
# The table of sinusoids, which files of before have.
POSITIONS = Ignore(r"(.*\.)?embed_positions\.weights", "sinusoids, computed here")


def hugging_face_table(config: Speech2TextConfig, model_class: str) -> Table:
    """The correspondence with what `save_pretrained` writes for that class."""
    if model_class == "Speech2TextModel":
        head = Ignore(r"lm_head\.weight", "no part of this class")
        return Table(RULES, renames=((r"^model\.", ""),), ignored=(POSITIONS, head))
    if model_class != "Speech2TextForConditionalGeneration":
        raise CheckpointError(f"There is no class {model_class} in fairseq S2T; there are {', '.join(CLASSES)}.")
    rules = [rule.prefixed("model.", "model.") for rule in RULES]
    if config.tie_word_embeddings:
        tied = (Tied("lm_head.weight", "model.decoder.embed_tokens.weight"),)
        return Table(rules, ignored=(POSITIONS,), tied=tied)
    return Table([*rules, Rule("lm_head.weight", "lm_head.kernel", transpose)], ignored=(POSITIONS,))


_CONFIG_DEFAULTS = {f.name: f.default for f in dataclasses.fields(Speech2TextConfig)}
_GENERATION = ("num_beams", "max_length", "early_stopping", "forced_bos_token_id")


def config_from_hugging_face(config: Mapping[str, Any], where: str = "config.json") -> Speech2TextConfig:
    """Our configuration from a `config.json`."""
    return Speech2TextConfig(**take(config, _CONFIG_DEFAULTS, where))


def generation_from_hugging_face(
    generation: Mapping[str, Any], config: Mapping[str, Any], where: str
) -> Speech2TextGenerationConfig:
    """How to search, from a `generation_config.json`, or from what older files say of it in their `config.json`.

    What neither says is as in `transformers`: one beam, a text of twenty tokens.
    """
    merged = {n: v for n in _GENERATION if (v := generation.get(n, config.get(n))) is not None}
    kinds = {"num_beams": 1, "max_length": 1, "early_stopping": False, "forced_bos_token_id": 0}
    silent = {"num_beams": 1, "max_length": None, "early_stopping": False, "forced_bos_token_id": None}
    rest = search_options(generation, where, left_out=(*_GENERATION, "forced_eos_token_id"))
    return Speech2TextGenerationConfig(**(silent | take(merged, kinds, where)), options=rest)


def hugging_face(model: Any) -> HuggingFaceForm:
    """A model as the directory that `save_pretrained` would write."""
    name, config = type(model).__name__, dataclasses.asdict(model.config)
    ids = {n: config[n] for n in ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")}
    config |= {"architectures": [name], "model_type": MODEL_TYPE, "dtype": "float32", "is_encoder_decoder": True}
    files = {"config.json": config}
    if hasattr(model, "generation_config"):
        search = dataclasses.asdict(model.generation_config)
        search = {n: v for n, v in (search | dict(search.pop("options"))).items() if v is not None}
        files["generation_config.json"] = search | ids
    return HuggingFaceForm(files, hugging_face_table(model.config, name))


# --- fairseq ---------------------------------------------------------------------------------------------------------


def fairseq_table(config: Speech2TextConfig, model_class: str) -> Table:
    """The correspondence with the names of fairseq's architecture `s2t_transformer`."""
    if model_class not in CLASSES:
        raise CheckpointError(f"fairseq's file loads as one of {', '.join(CLASSES)}, not as {model_class}.")
    swaps = {"encoder.conv.": "encoder.subsample.", "encoder.layers.": "encoder.transformer_layers."}

    def theirs(rule: Rule) -> Rule:
        (foreign,), (ours,) = rule._foreign, rule._ours  # type: ignore[attr-defined]
        for mine, name in swaps.items():
            foreign = foreign.replace(mine, name) if foreign.startswith(mine) else foreign
        inside = "" if model_class == "Speech2TextModel" else "model."
        return Rule(foreign, inside + ours, rule.operation)

    rules = [theirs(rule) for rule in RULES]
    ignored = [
        Ignore(r"(encoder|decoder)\.(version|embed_positions\._float_tensor|_float_tensor)", "fairseq's own marks"),
        POSITIONS,
    ]
    head, tied = "decoder.output_projection.weight", ()
    if model_class == "Speech2TextModel":
        ignored.append(Ignore(re.escape(head), "no part of this class"))
    elif config.tie_word_embeddings:
        tied = (Tied(head, "decoder.embed_tokens.weight"),)  # type: ignore[assignment]
    else:
        rules.append(Rule(head, "lm_head.kernel", transpose))
    return Table(rules, ignored=tuple(ignored), tied=tied)


FAIRSEQ_DECODER_FIELDS = {
    "decoder_attention_heads": "decoder_attention_heads",
    "activation_fn": "activation_function",
    "dropout": "dropout",
    "attention_dropout": "attention_dropout",
    "activation_dropout": "activation_dropout",
    "decoder_layerdrop": "decoder_layerdrop",
}
_FAIRSEQ_FIELDS = FAIRSEQ_DECODER_FIELDS | {
    "encoder_attention_heads": "encoder_attention_heads",
    "max_source_positions": "max_source_positions",
    "max_target_positions": "max_target_positions",
    "input_channels": "input_channels",
}


def config_from_fairseq(tensors: TensorSource) -> Speech2TextConfig:
    """Our configuration from the settings and shapes of a fairseq file.

    Raises:
        CheckpointError: for what `s2t_transformer` can be told to be and no released checkpoint is.
    """
    settings, shape, names = fairseq_settings(tensors.metadata), tensors.shape, tensors.names()
    wanted = {"encoder_normalize_before": True, "decoder_normalize_before": True, "decoder_learned_pos": False}
    for option, value in wanted.items():
        if bool(settings.get(option, value)) != value:
            raise CheckpointError(f"{tensors.path} was trained with {option}={settings[option]}, which is not built.")

    def count(pattern: str) -> int:
        return 1 + max(int(m[1]) for name in names if (m := re.match(pattern, name)))

    convolutions = count(r"encoder\.subsample\.conv_layers\.(\d+)\.")
    kernels = [shape(f"encoder.subsample.conv_layers.{i}.weight") for i in range(convolutions)]
    vocabulary, width = shape("decoder.embed_tokens.weight")
    fields = {m: settings[t] for t, m in _FAIRSEQ_FIELDS.items() if settings.get(t) is not None}
    channels = int(fields.get("input_channels", 1))
    fields.setdefault("encoder_attention_heads", width // 64)
    fields.setdefault("decoder_attention_heads", width // 64)
    head = "decoder.output_projection.weight"
    tied = head not in names or bool(settings.get("share_decoder_input_output_embed", True))
    return Speech2TextConfig(
        vocab_size=vocabulary,
        d_model=width,
        input_feat_per_channel=kernels[0][1] // channels,
        num_conv_layers=convolutions,
        conv_kernel_sizes=tuple(int(k[2]) for k in kernels),
        conv_channels=kernels[0][0] if convolutions > 1 else Speech2TextConfig.conv_channels,
        encoder_layers=count(r"encoder\.transformer_layers\.(\d+)\."),
        decoder_layers=count(r"decoder\.layers\.(\d+)\."),
        encoder_ffn_dim=shape("encoder.transformer_layers.0.fc1.weight")[0],
        decoder_ffn_dim=shape("decoder.layers.0.fc1.weight")[0],
        scale_embedding=not settings.get("no_scale_embedding", False),
        tie_word_embeddings=tied,
        **fields,
    )


_MARKS = {"encoder.subsample.conv_layers.0.weight", "encoder.transformer_layers.0.self_attn.q_proj.weight"}


def recognise(path: Path) -> bool:
    """Is this a `.pt` file of fairseq's `s2t_transformer`?"""
    return path.is_file() and path.suffix in {".pt", ".pth"} and set(open_tensors(path).names()) >= _MARKS


def processor_of_file(path: Path) -> Speech2TextProcessor:
    """The processor of a fairseq file, from what lies beside it.

    Raises:
        SourceError: if there is no dictionary with its SentencePiece model.
    """
    return Speech2TextProcessor.from_directory(path.parent)


def open_checkpoint(path: Path, model_class: str | None = None) -> ForeignCheckpoint:
    """Open a Hugging Face directory or a fairseq file.

    Raises:
        SourceError: if files are missing.
        CheckpointError: if they are damaged or hold something else.
    """
    attributes: dict[str, Any] = {}
    if path.is_dir():
        where = path / "config.json"
        raw = read_json(where)
        model_class = model_class or str((raw.get("architectures") or [CLASSES[0]])[0])
        config, tensors = config_from_hugging_face(raw, str(where)), open_tensors(path)
        table = hugging_face_table(config, model_class)
        side = path / "generation_config.json"
        search = generation_from_hugging_face(read_json(side) if side.is_file() else {}, raw, str(where))
    else:
        tensors = open_tensors(path)
        if not set(tensors.names()) >= _MARKS:
            raise SourceError(f"{path} is no s2t_transformer of fairseq, and no directory with a config.json.")
        model_class, config = model_class or CLASSES[0], config_from_fairseq(tensors)
        table, search = fairseq_table(config, model_class), Speech2TextGenerationConfig()
    if model_class == CLASSES[0]:
        attributes["generation_config"] = search
    return ForeignCheckpoint(model_class, config, tensors, table, path, attributes)
