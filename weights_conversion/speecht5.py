"""SpeechT5's foreign forms: Hugging Face directories, and the authors' `.pt` files, written by fairseq.

One of those is their language model, fairseq's `transformer_lm`. Its `dict.txt` has a token and its count a line, in
the order of the ids, behind the four special tokens that are in every dictionary of fairseq's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from audiozoo.errors import CheckpointError, SourceError
from audiozoo.models.speecht5 import SpeechT5Config, SpeechT5GenerationConfig, SpeechT5LanguageModelConfig
from audiozoo.processors.wav2vec2 import fairseq_symbols
from weights_conversion import (
    ForeignCheckpoint,
    HuggingFaceForm,
    labels_from_hugging_face,
    read_json,
    search_options,
    speech_to_text,
    take,
)
from weights_conversion.readers import TensorSource, open_tensors
from weights_conversion.rules import Ignore, Rule, Table, Tied, conv1d, transpose
from weights_conversion.wav2vec2 import (
    FEATURE_PROJECTION,
    OLD_WEIGHT_NORM,
    config_to_hugging_face,
    convolution,
    convolutions_from_fairseq,
    fairseq_settings,
    linear,
    norm,
    open_hugging_face,
    positional_convolution,
)

MODEL_TYPE = "speecht5"

# --- Hugging Face ----------------------------------------------------------------------------------------------------

_PROJECTIONS = "{p:q_proj|k_proj|v_proj|out_proj}"
_DENSE = "feed_forward.{d:intermediate_dense|output_dense}"


def _prefixed(prefix: str, rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
    return tuple(rule.prefixed(prefix, prefix) for rule in rules)


def _batch_norm(foreign: str, ours: str) -> tuple[Rule, ...]:
    return (
        *norm(foreign, ours),
        Rule(f"{foreign}.running_mean", f"{ours}.mean"),
        Rule(f"{foreign}.running_var", f"{ours}.var"),
    )


ENCODER = _prefixed(
    "speecht5.encoder.wrapped_encoder.",
    (
        *norm("layer_norm"),
        *linear("layers.{i}.attention." + _PROJECTIONS),
        *norm("layers.{i}.{n:layer_norm|final_layer_norm}"),
        *linear("layers.{i}." + _DENSE),
        Rule("embed_positions.pe_k.weight", "embed_positions.pe_k.embedding"),
    ),
)
DECODER = _prefixed(
    "speecht5.decoder.wrapped_decoder.",
    (
        *linear("layers.{i}.{a:self_attn|encoder_attn}." + _PROJECTIONS),
        *norm("layers.{i}.{n:self_attn_layer_norm|encoder_attn_layer_norm|final_layer_norm}"),
        *linear("layers.{i}." + _DENSE),
    ),
)
SPEECH_ENCODER_PRENET = _prefixed(
    "speecht5.encoder.prenet.",
    (
        *convolution("feature_encoder.conv_layers.{i}.conv"),
        *norm("feature_encoder.conv_layers.{i}.layer_norm"),
        *FEATURE_PROJECTION,
        Rule("masked_spec_embed", "masked_spec_embed"),
        *positional_convolution("pos_conv_embed.conv", "pos_conv_embed.conv"),
    ),
)
TEXT_ENCODER_PRENET = _prefixed(
    "speecht5.encoder.prenet.",
    (
        Rule("embed_tokens.weight", "embed_tokens.embedding"),
        Rule("encode_positions.alpha", "encode_positions.alpha"),
    ),
)
SPEECH_DECODER = (
    *_prefixed(
        "speecht5.decoder.prenet.",
        (
            *linear("layers.{i}"),
            *linear("{l:final_layer|speaker_embeds_layer}"),
            Rule("encode_positions.alpha", "encode_positions.alpha"),
        ),
    ),
    *_prefixed(
        "speech_decoder_postnet.",
        (
            *linear("{l:feat_out|prob_out}"),
            Rule("layers.{i}.conv.weight", "layers.{i}.conv.kernel", conv1d),
            *_batch_norm("layers.{i}.batch_norm", "layers.{i}.batch_norm"),
        ),
    ),
)
TEXT_DECODER_PRENET = (
    Rule("speecht5.decoder.prenet.embed_tokens.weight", "speecht5.decoder.prenet.embed_tokens.embedding"),
)
_HEAD = "text_decoder_postnet.lm_head.weight"
CLASSES: dict[str, tuple[Rule, ...]] = {
    "SpeechT5Model": (),
    "SpeechT5ForSpeechToText": (*SPEECH_ENCODER_PRENET, *TEXT_DECODER_PRENET),
    "SpeechT5ForTextToSpeech": (*TEXT_ENCODER_PRENET, *SPEECH_DECODER),
    "SpeechT5ForSpeechToSpeech": (*SPEECH_ENCODER_PRENET, *SPEECH_DECODER),
}
_COUNTERS = Ignore(r"(.*\.)?num_batches_tracked", "PyTorch's count of training steps, which nothing reads")
# Tables of positions, which are computed.
_POSITIONS = Ignore(
    r".*\.(encode_positions\.pe|(pos_sinusoidal_embed|embed_positions)\.weights)", "positions are computed"
)


@dataclasses.dataclass(frozen=True)
class _WithCounters(Table):
    """A table that writes, with the statistics of each BatchNorm, the count of steps that PyTorch keeps."""

    def write(self, parameters: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
        """Our parameters, and the counts."""
        for name, array in super().write(parameters):
            yield name, array
            if name.endswith(".running_mean"):
                yield name.replace(".running_mean", ".num_batches_tracked"), np.zeros((), np.int64)


def hugging_face_table(config: SpeechT5Config, model_class: str) -> Table:
    """The correspondence with what `save_pretrained` writes for that class."""
    if model_class not in CLASSES:
        raise CheckpointError(f"transformers has no class {model_class}; it has {', '.join(CLASSES)}.")
    if config.layer_norm_first:
        raise CheckpointError("transformers has no SpeechT5 with norms first (LARGE); audiozoo.save keeps it.")
    rules = (*ENCODER, *DECODER, *CLASSES[model_class])
    ignored: tuple[Ignore, ...] = (_POSITIONS, _COUNTERS)
    if model_class == "SpeechT5Model":
        rules = tuple(
            Rule(
                tuple(f.removeprefix("speecht5.") for f in _sides(rule.foreign)),
                tuple(o.removeprefix("speecht5.") for o in _sides(rule.ours)),
                rule.operation,
            )
            for rule in rules
        )
    if model_class == "SpeechT5ForSpeechToText":
        if config.tie_word_embeddings:
            ignored += (Ignore(re_escape(_HEAD), "the embedding again"),)
        else:
            rules += (Rule(_HEAD, "text_decoder_postnet.lm_head.kernel", transpose),)
        if config.ctc_weight:
            raise CheckpointError("transformers has no CTC head for SpeechT5; export model.without_ctc().")
    return _WithCounters(rules, renames=OLD_WEIGHT_NORM, ignored=ignored)


def _sides(side: str | tuple[str, ...]) -> tuple[str, ...]:
    return (side,) if isinstance(side, str) else side


def re_escape(name: str) -> str:
    """A name as the regular expression of itself."""
    return name.replace(".", r"\.")


_CONFIG_DEFAULTS: dict[str, Any] = {
    f.name: f.default for f in dataclasses.fields(SpeechT5Config) if f.name != "id2label"
}


def config_from_hugging_face(config: Mapping[str, Any], where: str = "config.json") -> SpeechT5Config:
    """Our configuration from a `config.json`."""
    return SpeechT5Config(**take(config, _CONFIG_DEFAULTS, where), **labels_from_hugging_face(config))


def hugging_face(model: Any) -> HuggingFaceForm:
    """A SpeechT5 as the directory that `save_pretrained` would write.

    Raises:
        CheckpointError: for what `transformers` does not have: LARGE, a CTC head, identification, pre-training, the
            language model.
    """
    config, name = model.config, type(model).__name__
    table = hugging_face_table(config, name)
    files = {"config.json": config_to_hugging_face(config, name, MODEL_TYPE)}
    if name == "SpeechT5ForSpeechToText":
        tokens = ("bos_token_id", "decoder_start_token_id", "eos_token_id", "pad_token_id")
        search = {"max_length": config.max_text_positions, **dict(model.generation_config.options)}
        files["generation_config.json"] = {n: getattr(config, n) for n in tokens} | search
    return HuggingFaceForm(files, table)


# --- the authors' files ----------------------------------------------------------------------------------------------

TASKS = {
    "pretrain": "SpeechT5ForPreTraining",
    "s2t": "SpeechT5ForSpeechToText",
    "t2s": "SpeechT5ForTextToSpeech",
    "s2s": "SpeechT5ForSpeechToSpeech",
    "s2c": "SpeechT5ForSequenceClassification",
}
# The nets of each class, by the beginning of their foreign names.
_SPEECH_IN, _TEXT_IN = "speech_encoder_prenet", "text_encoder_prenet"
_SPEECH_OUT, _TEXT_OUT = "speech_decoder_p(re|ost)net", "text_decoder_p(re|ost)net"
_NETS = {
    "SpeechT5ForPreTraining": (_SPEECH_IN, _TEXT_IN, _SPEECH_OUT, _TEXT_OUT, "hubert_layer", "quantizer"),
    "SpeechT5ForSpeechToText": (_SPEECH_IN, _TEXT_OUT),
    "SpeechT5ForTextToSpeech": (_TEXT_IN, _SPEECH_OUT),
    "SpeechT5ForSpeechToSpeech": (_SPEECH_IN, _SPEECH_OUT),
    "SpeechT5ForSpeechEnhancement": (_SPEECH_IN, _SPEECH_OUT),
    "SpeechT5ForSequenceClassification": (_SPEECH_IN, "speaker_decoder_postnet"),
}
_ALL_NETS = (
    _SPEECH_IN, _TEXT_IN, _SPEECH_OUT, _TEXT_OUT, "speaker_decoder_postnet", "hubert_layer", "quantizer", "projection"
)  # fmt: skip


def original_table(config: SpeechT5Config, model_class: str) -> Table:
    """The correspondence with the authors' names."""
    if model_class not in _NETS:
        raise CheckpointError(f"The authors' files load as {', '.join(_NETS)}, not as {model_class}.")
    whole = model_class == "SpeechT5ForPreTraining"
    # Where our parts stand: in pre-training side by side as in the authors' code, else inside the shared model.
    encoder, decoder = ("encoder.", "decoder.") if whole else (
        "speecht5.encoder.wrapped_encoder.", "speecht5.decoder.wrapped_decoder."
    )  # fmt: skip
    speech_in = "speech_encoder_prenet." if whole else "speecht5.encoder.prenet."
    speech_out = "speech_decoder_prenet." if whole else "speecht5.decoder.prenet."
    text_out = "text_decoder_prenet." if whole else "speecht5.decoder.prenet."
    block = "layers.{i}."
    rules = [
        *norm("encoder.layer_norm", f"{encoder}layer_norm"),
        Rule("encoder.pos_emb.pe_k.weight", f"{encoder}embed_positions.pe_k.embedding"),
        *linear(f"encoder.{block}self_attn.{_PROJECTIONS}", f"{encoder}{block}attention.{_PROJECTIONS}"),
        *norm(f"encoder.{block}self_attn_layer_norm", f"{encoder}{block}layer_norm"),
        *norm(f"encoder.{block}final_layer_norm", f"{encoder}{block}final_layer_norm"),
        *linear(f"encoder.{block}fc1", f"{encoder}{block}feed_forward.intermediate_dense"),
        *linear(f"encoder.{block}fc2", f"{encoder}{block}feed_forward.output_dense"),
        *linear(
            f"decoder.{block}{{a:self_attn|encoder_attn}}.{_PROJECTIONS}",
            f"{decoder}{block}{{a:self_attn|encoder_attn}}.{_PROJECTIONS}",
        ),
        *norm(
            f"decoder.{block}{{n:self_attn_layer_norm|encoder_attn_layer_norm|final_layer_norm}}",
            f"{decoder}{block}{{n:self_attn_layer_norm|encoder_attn_layer_norm|final_layer_norm}}",
        ),
        *linear(f"decoder.{block}fc1", f"{decoder}{block}feed_forward.intermediate_dense"),
        *linear(f"decoder.{block}fc2", f"{decoder}{block}feed_forward.output_dense"),
    ]
    ignored = [
        _COUNTERS,
        Ignore(r"(encoder|decoder)\.version|.*\.embed_positions\._float_tensor", "fairseq's own"),
        Ignore(r"decoder\.(pos_emb|layers\.\d+\.norm_k)\..*", "not used: the decoder has no relative positions"),
    ]
    if config.layer_norm_first:
        rules += norm(f"encoder.{block}norm_k", f"{encoder}{block}norm_k")
        rules += norm("decoder.layer_norm", f"{decoder}layer_norm")
    else:
        ignored.append(Ignore(r"encoder\.layers\.\d+\.norm_k\..*", "not used where norms come last"))
    if config.ctc_weight and model_class == "SpeechT5ForSpeechToText":
        rules += linear("encoder.proj", "ctc_proj")
    else:
        ignored.append(Ignore(r"encoder\.proj\..*", "CTC head"))
    nets = _NETS[model_class]
    if _SPEECH_IN in nets:
        theirs = "speech_encoder_prenet."
        layered = config.feat_extract_norm == "layer"
        there = f"{theirs}feature_extractor.conv_layers." + ("{i}.2.1" if layered else "0.2")
        here = f"{speech_in}feature_encoder.conv_layers." + ("{i}" if layered else "0") + ".layer_norm"
        rules += [
            *convolution(
                theirs + "feature_extractor.conv_layers.{i}.0", speech_in + "feature_encoder.conv_layers.{i}.conv"
            ),
            *norm(there, here),
            *norm(f"{theirs}layer_norm", f"{speech_in}feature_projection.layer_norm"),
            *linear(f"{theirs}post_extract_proj", f"{speech_in}feature_projection.projection"),
            Rule(f"{theirs}mask_emb", f"{speech_in}masked_spec_embed"),
            *positional_convolution(f"{theirs}pos_conv.0", f"{speech_in}pos_conv_embed.conv"),
        ]
    if _TEXT_IN in nets:
        theirs = "text_encoder_prenet.encoder_prenet."
        alpha = "text_encoder_positions.alpha" if whole else "speecht5.encoder.prenet.encode_positions.alpha"
        rules.append(Rule(f"{theirs}1.alpha", alpha))
        if whole:
            ignored.append(Ignore(re_escape(theirs) + r"0\.weight", "the text decoder's embedding again"))
        else:
            rules.append(Rule(f"{theirs}0.weight", "speecht5.encoder.prenet.embed_tokens.embedding"))
    if _SPEECH_OUT in nets:
        theirs, post = "speech_decoder_prenet.", "speech_decoder_postnet."
        rules += [
            *linear(theirs + "decoder_prenet.0.0.prenet.{i}.0", speech_out + "layers.{i}"),
            *linear(f"{theirs}decoder_prenet.0.1", f"{speech_out}final_layer"),
            Rule(f"{theirs}decoder_prenet.1.alpha", f"{speech_out}encode_positions.alpha"),
            *linear(f"{theirs}spkembs_layer.0", f"{speech_out}speaker_embeds_layer"),
            *linear(post + "{l:feat_out|prob_out}"),
            Rule(post + "postnet.postnet.{i}.0.weight", post + "layers.{i}.conv.kernel", conv1d),
            *_batch_norm(post + "postnet.postnet.{i}.1", post + "layers.{i}.batch_norm"),
        ]
    if _TEXT_OUT in nets:
        rules.append(Rule("text_decoder_prenet.embed_tokens.weight", f"{text_out}embed_tokens.embedding"))
        head = "text_decoder_postnet.output_projection.weight"
        if config.tie_word_embeddings or whole:
            ignored.append(Ignore(re_escape(head), "the embedding again"))
        else:
            rules.append(Rule(head, "text_decoder_postnet.lm_head.kernel", transpose))
    if "speaker_decoder_postnet" in nets:
        rules.append(Rule("speaker_decoder_postnet.output_projection.weight", "classifier.kernel", transpose))
    if whole:
        rules += [
            Rule("hubert_layer.label_embs_concat", "label_embeddings"),
            *linear("hubert_layer.final_proj", "final_proj"),
            Rule("quantizer.vars", "quantizer.codevectors"),
            *linear("quantizer.weight_proj"),
        ]
    other = "|".join(net for net in _ALL_NETS if net not in nets)
    if other:
        ignored.append(Ignore(rf"({other})\..*", "a net of another task"))
    return Table(rules, renames=OLD_WEIGHT_NORM, ignored=ignored)


_SETTINGS = {
    "dropout": "hidden_dropout",
    "attention_dropout": "attention_dropout",
    "activation_dropout": "activation_dropout",
    "activation_fn": "hidden_act",
    "encoder_layerdrop": "encoder_layerdrop",
    "decoder_layerdrop": "decoder_layerdrop",
    "encoder_attention_heads": "encoder_attention_heads",
    "decoder_attention_heads": "decoder_attention_heads",
    "layer_norm_first": "layer_norm_first",
    "mask_prob": "mask_time_prob",
    "hubert_mask_length": "mask_time_length",
    "mask_channel_prob": "mask_feature_prob",
    "mask_channel_length": "mask_feature_length",
    "max_text_positions": "max_text_positions",
    "max_speech_positions": "max_speech_positions",
    "dprenet_dropout_rate": "speech_decoder_prenet_dropout",
    "postnet_dropout_rate": "speech_decoder_postnet_dropout",
    "logit_temp": "logit_temp",
    "codebook_prob": "codebook_prob",
    "ctc_weight": "ctc_weight",
}


def config_from_original(tensors: TensorSource, model_class: str) -> SpeechT5Config:
    """Our configuration from the settings and shapes of one of the authors' files."""
    settings = fairseq_settings(tensors.metadata)
    table = Table((), renames=OLD_WEIGHT_NORM)
    names = {table.today(name): name for name in tensors.names()}

    def shape(name: str) -> tuple[int, ...]:
        if name not in names:
            raise CheckpointError(f"The checkpoint has no {name}, so it is no SpeechT5 of its authors'.")
        return tensors.shape(names[name])

    def count(start: str) -> int:
        return 1 + max((int(n.removeprefix(start).split(".")[0]) for n in names if n.startswith(start)), default=-1)

    fields: dict[str, Any] = {}
    for theirs, mine in _SETTINGS.items():
        if settings.get(theirs) is not None:
            fields[mine] = type(_CONFIG_DEFAULTS[mine])(settings[theirs])
    distances, head = shape("encoder.pos_emb.pe_k.weight")
    (width,) = shape("encoder.layer_norm.weight")
    fields |= {
        "hidden_size": width,
        "encoder_layers": count("encoder.layers."),
        "decoder_layers": count("decoder.layers."),
        "encoder_attention_heads": width // head,
        "encoder_ffn_dim": shape("encoder.layers.0.fc1.weight")[0],
        "decoder_ffn_dim": shape("decoder.layers.0.fc1.weight")[0],
        "encoder_max_relative_position": distances // 2,
        "layer_norm_first": "decoder.layer_norm.weight" in names,
        "frame_rule": "samples",
    }
    fields.setdefault("decoder_attention_heads", width // head)
    for embedding in ("text_decoder_prenet.embed_tokens.weight", "text_encoder_prenet.encoder_prenet.0.weight"):
        if embedding in names:
            fields["vocab_size"] = shape(embedding)[0]
    convolutions = count("speech_encoder_prenet.feature_extractor.conv_layers.")
    if convolutions:
        start = "speech_encoder_prenet.feature_extractor.conv_layers."
        kernels = [shape(f"{start}{i}.0.weight") for i in range(convolutions)]
        direction = shape("speech_encoder_prenet.pos_conv.0.parametrizations.weight.original1")
        layered = f"{start}{convolutions - 1}.2.1.weight" in names
        fields |= {
            "conv_dim": tuple(k[0] for k in kernels),
            "conv_kernel": tuple(k[2] for k in kernels),
            "conv_bias": f"{start}0.0.bias" in names,
            "feat_extract_norm": "layer" if layered else "group",
            "num_conv_pos_embeddings": direction[2],
            "num_conv_pos_embedding_groups": direction[0] // direction[1],
        }
        if settings.get("conv_feature_layers"):
            layers = convolutions_from_fairseq(settings["conv_feature_layers"])
            fields["conv_stride"] = tuple(stride for _, _, stride in layers)
        if not fields.get("mask_time_prob") and not fields.get("mask_feature_prob"):
            # The vector for hidden frames is in every file; the masking of training is switched off apart.
            fields |= {"mask_time_prob": SpeechT5Config.base().mask_time_prob, "apply_spec_augment": False}
    if (first := "speech_decoder_prenet.decoder_prenet.0.0.prenet.0.0.weight") in names:
        units, mels = shape(first)
        post = "speech_decoder_postnet.postnet.postnet."
        fields |= {
            "num_mel_bins": mels,
            "speech_decoder_prenet_units": units,
            "speech_decoder_prenet_layers": count("speech_decoder_prenet.decoder_prenet.0.0.prenet."),
            "reduction_factor": shape("speech_decoder_postnet.feat_out.weight")[0] // mels,
            "speech_decoder_postnet_layers": count(post),
            "speech_decoder_postnet_units": shape(f"{post}0.0.weight")[0],
            "speech_decoder_postnet_kernel": shape(f"{post}0.0.weight")[2],
            "speaker_embedding_dim": shape("speech_decoder_prenet.spkembs_layer.0.weight")[1] - width,
        }
    if (head_of_speakers := "speaker_decoder_postnet.output_projection.weight") in names:
        fields["id2label"] = tuple(f"LABEL_{i}" for i in range(shape(head_of_speakers)[0]))
    if (units_of := "hubert_layer.label_embs_concat") in names:
        fields["num_clusters"], fields["final_dim"] = shape(units_of)
    if "quantizer.vars" in names:
        _, entries, code = shape("quantizer.vars")
        groups = int(settings.get("latent_groups") or 2)
        fields |= {"num_codevector_groups": groups, "num_codevectors_per_group": entries // groups}
        fields["codevector_dim"] = code * groups
    if model_class != "SpeechT5ForSpeechToText":
        fields["ctc_weight"] = 0.0
    elif "encoder.proj.weight" in names:
        fields.setdefault("ctc_weight", 0.5)  # the recipe's
    return SpeechT5Config(**fields)


def _is_the_authors(tensors: TensorSource) -> bool:
    names = tensors.names()
    nets = ("speech_encoder_prenet.", "text_encoder_prenet.")
    return (
        tensors.format == "pytorch"
        and "encoder.pos_emb.pe_k.weight" in names
        and any(name.startswith(nets) for name in names)
    )


def _class_of(tensors: TensorSource) -> str:
    """By the task that the file names, else by the nets that it holds.

    Raises:
        SourceError: if neither says.
    """
    metadata, names = tensors.metadata, tensors.names()
    for settings in (metadata.get("args"), metadata.get("cfg")):
        found = settings if isinstance(settings, Mapping) else dict(vars(settings)) if settings is not None else {}
        task = found.get("task") if isinstance(found.get("task"), Mapping) else {}
        for place in (found, task or {}, found.get("model")):
            value = place.get("t5_task") if isinstance(place, Mapping) else getattr(place, "t5_task", None)
            if value in TASKS:
                return TASKS[value]
    if any(name.startswith("quantizer.") for name in names) and any(n.startswith("hubert_layer.") for n in names):
        return "SpeechT5ForPreTraining"
    if any(name.startswith("speaker_decoder_postnet.") for name in names):
        return "SpeechT5ForSequenceClassification"
    raise SourceError(f"The file does not say for which task it is; give model_class, one of {', '.join(_NETS)}.")


# --- the authors' language model -------------------------------------------------------------------------------------

LANGUAGE_MODEL = "SpeechT5LanguageModel"
_WORDS, _LOGITS = "decoder.embed_tokens.weight", "decoder.output_projection.weight"
_MARKS = {_WORDS, "decoder.layers.0.self_attn.q_proj.weight", "decoder.layers.0.fc1.weight"}
_LANGUAGE_MODEL_FIELDS = speech_to_text.FAIRSEQ_DECODER_FIELDS | {"max_target_positions": "max_position_embeddings"}


def language_model_table(config: SpeechT5LanguageModelConfig) -> Table:
    """The correspondence with the names of fairseq's `transformer_lm`."""
    rules = [rule.prefixed("", "model.") for rule in (*speech_to_text.DECODER, *norm("decoder.layer_norm"))]
    marks = Ignore(r"decoder\.(version|embed_positions\._float_tensor)", "fairseq's own marks")
    ignored = (marks, speech_to_text.POSITIONS)
    if config.tie_word_embeddings:
        return Table(rules, ignored=ignored, tied=(Tied(_LOGITS, _WORDS),))
    return Table([*rules, Rule(_LOGITS, "lm_head.kernel", transpose)], ignored=ignored)


def config_from_language_model(tensors: TensorSource) -> SpeechT5LanguageModelConfig:
    """Our configuration from the settings and shapes of a `transformer_lm`, and the `dict.txt` beside it.

    Raises:
        CheckpointError: without settings, for what `transformer_lm` can be told to be and the authors' is not, or for a
            dictionary of another size.
    """
    path, settings, names = tensors.path, fairseq_settings(tensors.metadata), tensors.names()
    if "decoder_attention_heads" not in settings:
        raise CheckpointError(f"{path} does not say with how many heads it was trained: it has neither cfg nor args.")
    for option, built in {"activation_fn": ("gelu", "relu"), "no_token_positional_embeddings": (False, None)}.items():
        if settings.get(option, built[-1]) not in built:
            raise CheckpointError(f"{path} was trained with {option}={settings[option]}, which is not built.")
    vocabulary, width = tensors.shape(_WORDS)
    tokens: tuple[str, ...] = ()
    if (dictionary := path.parent / "dict.txt").is_file():
        tokens = ("<s>", "<pad>", "</s>", "<unk>", *fairseq_symbols(dictionary))
        if len(tokens) != vocabulary:
            raise CheckpointError(
                f"{dictionary} names {len(tokens)} tokens, four special ones included; {path.name} has {vocabulary}."
            )
    return SpeechT5LanguageModelConfig(
        vocab_size=vocabulary,
        d_model=width,
        decoder_layers=len({name.split(".")[2] for name in names if name.startswith("decoder.layers.")}),
        decoder_ffn_dim=tensors.shape("decoder.layers.0.fc1.weight")[0],
        scale_embedding=not settings.get("no_scale_embedding"),
        tie_word_embeddings=_LOGITS not in names or bool(settings.get("share_decoder_input_output_embed")),
        tokens=tokens,
        **{"activation_function": "relu"}
        | {m: settings[t] for t, m in _LANGUAGE_MODEL_FIELDS.items() if settings.get(t) is not None},
    )


def _is_language_model(tensors: TensorSource) -> bool:
    names = set(tensors.names())
    return names >= _MARKS and all(n.startswith("decoder.") and ".encoder_attn." not in n for n in names)


# --- the ways in -----------------------------------------------------------------------------------------------------


def _file_of(path: Path) -> Path | None:
    """An author's file: the path itself, or the one `.pt` file of a directory."""
    if path.is_dir():
        found = sorted(path.glob("*.pt"))
        return found[0] if len(found) == 1 else None
    return path if path.suffix in {".pt", ".pth", ".bin"} else None


def recognise(path: Path) -> bool:
    """Is this one of the authors' `.pt` files, or a directory with one?"""
    if (file := _file_of(path)) is None:
        return False
    tensors = open_tensors(file)
    return _is_the_authors(tensors) or _is_language_model(tensors)


def open_checkpoint(path: Path, model_class: str | None = None) -> ForeignCheckpoint:
    """Open a SpeechT5 checkpoint of either form.

    Raises:
        SourceError: if files are missing.
        CheckpointError: if they are damaged or hold something else.
    """
    if path.is_dir() and (path / "config.json").is_file():
        opened = open_hugging_face(path, model_class, config_from_hugging_face, hugging_face_table)
        side = path / "generation_config.json"
        if opened.model_class == "SpeechT5ForSpeechToText" and side.is_file():
            search = SpeechT5GenerationConfig(search_options(read_json(side), str(side)))
            opened.attributes = {"generation_config": search}
        return opened
    tensors = open_tensors(_file_of(path) or path)
    if _is_language_model(tensors):
        if model_class not in (None, LANGUAGE_MODEL):
            raise CheckpointError(f"{path} holds a {LANGUAGE_MODEL}, not a {model_class}.")
        language = config_from_language_model(tensors)
        return ForeignCheckpoint(LANGUAGE_MODEL, language, tensors, language_model_table(language), path)
    if not _is_the_authors(tensors):
        raise SourceError(f"{path} is no SpeechT5 of its authors', and has no config.json beside it.")
    model_class = model_class or _class_of(tensors)
    config = config_from_original(tensors, model_class)
    return ForeignCheckpoint(model_class, config, tensors, original_table(config, model_class), path)
