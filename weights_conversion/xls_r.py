"""XLS-R's foreign forms: Hugging Face directories of speech translation. Its encoders alone are wav2vec 2.0's.

Also fairseq's `wav2vec_seq2seq`, wav2vec 2.0 and Speech2Text2's decoder (arXiv 2104.06678) in one `.pt` file, and its
`xm_transformer`, XLS-R and mBART's.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from audiozoo.errors import CheckpointError, SourceError
from audiozoo.models.mbart import MBartConfig
from audiozoo.models.xls_r import SpeechEncoderDecoderConfig, SpeechEncoderDecoderGenerationConfig
from audiozoo.processors.xls_r import XLSRProcessor
from weights_conversion import (
    ForeignCheckpoint,
    HuggingFaceForm,
    hubert,
    read_json,
    search_options,
    sew,
    speech_to_text,
    speech_to_text_2,
    take,
    unispeech,
    unispeech_sat,
    wav2vec2,
    wav2vec2_bert,
    wav2vec2_conformer,
    wavlm,
)
from weights_conversion import xm_transformer_names as xm
from weights_conversion.readers import TensorSource, open_tensors
from weights_conversion.rules import Constant, Ignore, Rule, Table, Tied, transpose
from weights_conversion.wav2vec2 import OLD_WEIGHT_NORM, linear
from weights_conversion.xm_transformer_names import MBART

MODEL_TYPE = "speech-encoder-decoder"

# Which conversion knows an encoder, and which of its classes it is.
ENCODERS: dict[str, tuple[Any, str]] = {
    "wav2vec2": (wav2vec2, "Wav2Vec2Model"),
    "hubert": (hubert, "HubertModel"),
    "wavlm": (wavlm, "WavLMModel"),
    "unispeech": (unispeech, "UniSpeechModel"),
    "unispeech-sat": (unispeech_sat, "UniSpeechSatModel"),
    "sew": (sew, "SEWModel"),
    "sew-d": (sew, "SEWDModel"),
    "wav2vec2-conformer": (wav2vec2_conformer, "Wav2Vec2ConformerModel"),
    "wav2vec2-bert": (wav2vec2_bert, "Wav2Vec2BertModel"),
}

_HEAD = "lm_head.weight"


def _mbart_table(config: MBartConfig) -> Table:
    if config.tie_word_embeddings:
        return Table(MBART, ignored=(Ignore(re.escape(_HEAD), "the embedding again"),))
    return Table((*MBART, Rule(_HEAD, "lm_head.kernel", transpose)))


def hugging_face_table(config: SpeechEncoderDecoderConfig, model_class: str) -> Table:
    """The correspondence with what `save_pretrained` writes."""
    if model_class != "SpeechEncoderDecoderModel":
        raise CheckpointError(f"There is no class {model_class} in XLS-R; there is SpeechEncoderDecoderModel.")
    conversion, name = ENCODERS[config.encoder_type]
    encoder = conversion.hugging_face_table(config.encoder, name)
    text = config.decoder
    decoder = _mbart_table(text) if config.decoder_type == "mbart" else speech_to_text_2.hugging_face_table(text)
    rules = [rule.prefixed("encoder.", "encoder.") for rule in encoder.rules]
    rules += [rule.prefixed("decoder.", "decoder.") for rule in decoder.rules]
    ignored = [Ignore(rf"encoder\.(?:{i.pattern})", i.reason) for i in encoder.ignored]
    ignored += [Ignore(rf"decoder\.(?:{i.pattern})", i.reason) for i in decoder.ignored]
    return type(encoder)(
        (*rules, *linear("enc_to_dec_proj")),
        renames=OLD_WEIGHT_NORM,
        ignored=tuple(ignored),
        tied=tuple(Tied(f"decoder.{t.name}", f"decoder.{t.same_as}") for t in decoder.tied),
        constants=[Constant(f"encoder.{c.name}", c.value) for c in encoder.constants],
    )


_DECODER_DEFAULTS = {f.name: f.default for f in dataclasses.fields(MBartConfig)}


def _mbart_config(decoder: Mapping[str, Any], where: str) -> MBartConfig:
    # What a configuration leaves out has transformers' default, which is not always ours.
    return MBartConfig(**take({"scale_embedding": False, "vocab_size": 50_265, **decoder}, _DECODER_DEFAULTS, where))


def config_from_hugging_face(config: Mapping[str, Any], where: str = "config.json") -> SpeechEncoderDecoderConfig:
    """Our configuration from a `config.json`.

    Raises:
        CheckpointError: if its encoder is none of `ENCODERS`, or its decoder neither mBART nor Speech2Text2.
    """
    encoder, decoder = config.get("encoder") or {}, config.get("decoder") or {}
    hears, writes = str(encoder.get("model_type")), str(decoder.get("model_type"))
    if hears not in ENCODERS or writes not in ("mbart", speech_to_text_2.MODEL_TYPE):
        raise CheckpointError(
            f"{where}: an encoder of type wav2vec2 (or {', '.join(list(ENCODERS)[1:])}) and a decoder of type mbart or "
            f"speech_to_text_2 are wanted, not {hears} and {writes}."
        )
    text: Any
    text = _mbart_config(decoder, where)
    if writes == speech_to_text_2.MODEL_TYPE:
        text = speech_to_text_2.config_from_hugging_face(decoder, where)

    def token(name: str, default: int) -> int:
        found = [c[name] for c in (config, decoder) if c.get(name) is not None]
        return int(found[0]) if found else default

    return SpeechEncoderDecoderConfig(
        ENCODERS[hears][0].config_from_hugging_face(encoder, where),
        text,
        encoder_type=hears,
        decoder_type=writes,
        decoder_start_token_id=token("decoder_start_token_id", text.eos_token_id),
        pad_token_id=token("pad_token_id", text.pad_token_id),
        eos_token_id=token("eos_token_id", text.eos_token_id),
    )


_IDS = ("decoder_start_token_id", "pad_token_id", "eos_token_id")


def generation_from_hugging_face(
    generation: Mapping[str, Any], config: Mapping[str, Any], where: str
) -> SpeechEncoderDecoderGenerationConfig:
    """How to search, from a `generation_config.json`, or from what older files say of it in their `config.json`.

    These name all defaults as well; a `max_length` of 20 is nobody's wish, but that of `transformers`.
    """
    parts: list[Mapping[str, Any]] = [generation]
    if not generation:
        old = (config.get("decoder") or {}, config)
        parts = [{n: v for n, v in part.items() if (n, v) != ("max_length", 20)} for part in old]
    found = {name: value for part in parts for name, value in search_options(part, where)}
    return SpeechEncoderDecoderGenerationConfig(tuple(found.items()))


def hugging_face(model: Any) -> HuggingFaceForm:
    """A translation model as the directory that `save_pretrained` would write."""
    config, name = model.config, type(model).__name__
    encoder = wav2vec2.config_to_hugging_face(config.encoder, ENCODERS[config.encoder_type][1], config.encoder_type)
    if config.decoder_type == speech_to_text_2.MODEL_TYPE:
        decoder = speech_to_text_2.config_to_hugging_face(config.decoder)
    else:
        decoder = dataclasses.asdict(config.decoder) | {
            "architectures": ["MBartForCausalLM"],
            "model_type": "mbart",
            "is_decoder": True,
            "is_encoder_decoder": False,
        }
    raw = {
        "architectures": [name],
        "model_type": MODEL_TYPE,
        "is_encoder_decoder": True,
        "tie_word_embeddings": False,
        "encoder": encoder,
        "decoder": decoder | {"add_cross_attention": True, "decoder_start_token_id": config.decoder_start_token_id},
        "decoder_start_token_id": config.decoder_start_token_id,
        "pad_token_id": config.pad_token_id,
        "eos_token_id": config.eos_token_id,
    }
    search = dict(model.generation_config.options) | {name: raw[name] for name in _IDS}
    return HuggingFaceForm({"config.json": raw, "generation_config.json": search}, hugging_face_table(config, name))


# --- fairseq ---------------------------------------------------------------------------------------------------------

_ENCODER, _EMBED_OUT = "encoder.w2v_model.", "decoder.embed_out"


def fairseq_table(config: SpeechEncoderDecoderConfig, model_class: str) -> Table:
    """The correspondence with the names of fairseq's `wav2vec_seq2seq`."""
    if model_class != "SpeechEncoderDecoderModel":
        raise CheckpointError(f"fairseq's file loads as SpeechEncoderDecoderModel, not as {model_class}.")
    encoder = wav2vec2.fairseq_table(config.encoder, "Wav2Vec2Model")
    rules = [
        *(rule.prefixed(_ENCODER, "encoder.") for rule in encoder.rules),
        *linear("encoder.proj", "enc_to_dec_proj"),
        *(rule.prefixed("", "decoder.model.") for rule in speech_to_text.DECODER),
    ]
    if not config.decoder.tie_word_embeddings:
        rules.append(Rule(_EMBED_OUT, "decoder.lm_head.kernel", transpose))
    ignored = [Ignore(re.escape(_ENCODER) + f"(?:{i.pattern})", i.reason) for i in encoder.ignored]
    marks = Ignore(r"decoder\.(version|embed_positions\._float_tensor)", "fairseq's own marks")
    return Table(rules, renames=OLD_WEIGHT_NORM, ignored=(*ignored, marks, speech_to_text.POSITIONS))


_DECODER_FIELDS = {
    "decoder_layerdrop": "decoder_layerdrop",
    "decoder_dropout": "dropout",
    "decoder_attention_dropout": "attention_dropout",
    "decoder_activation_dropout": "activation_dropout",
    "max_target_positions": "max_target_positions",
}


def config_from_fairseq(tensors: TensorSource) -> SpeechEncoderDecoderConfig:
    """Our configuration from the settings and shapes of a fairseq file.

    Raises:
        CheckpointError: for what `wav2vec_seq2seq` can be told to be and no checkpoint of the paper is.
    """
    settings, names = wav2vec2.fairseq_settings(tensors.metadata), tensors.names()
    wanted = {"decoder_normalize_before": False, "decoder_learned_pos": False, "no_token_positional_embeddings": False}
    for option, value in wanted.items():
        if bool(settings.get(option, value)) != value:
            raise CheckpointError(f"{tensors.path} was trained with {option}={settings[option]}, which is not built.")
    vocabulary, width = tensors.shape("decoder.embed_tokens.weight")
    fields = {m: settings[t] for t, m in _DECODER_FIELDS.items() if settings.get(t) is not None}
    text = speech_to_text_2.Speech2Text2Config(
        vocab_size=vocabulary,
        d_model=width,
        decoder_layers=1 + max(int(m[1]) for name in names if (m := re.match(r"decoder\.layers\.(\d+)\.", name))),
        decoder_attention_heads=int(settings.get("decoder_attention_heads") or 4),
        decoder_ffn_dim=tensors.shape("decoder.layers.0.fc1.weight")[0],
        tie_word_embeddings=_EMBED_OUT not in names,
        **({"dropout": 0.0, "max_target_positions": 2048} | fields),
    )
    encoder = wav2vec2.config_from_fairseq(tensors, _ENCODER)
    return SpeechEncoderDecoderConfig(encoder, text, decoder_type=speech_to_text_2.MODEL_TYPE)


_MARKS = {_ENCODER + "feature_extractor.conv_layers.0.0.weight", "decoder.layers.0.encoder_attn.q_proj.weight"}


def recognise(path: Path) -> bool:
    """Is this a directory of a translator, or a `.pt` file of fairseq's `wav2vec_seq2seq` or `xm_transformer`?"""
    if path.is_file():
        if path.suffix not in {".pt", ".pth"}:
            return False
        tensors = open_tensors(path)
        return set(tensors.names()) >= _MARKS or xm.is_xm_transformer(tensors)
    return (path / "config.json").is_file() and read_json(path / "config.json").get("model_type") == MODEL_TYPE


def processor_of_file(path: Path) -> XLSRProcessor:
    """The processor of a fairseq file, from what lies beside it: Speech2Text2's `dict.X.txt`, or mBART-50's pieces."""
    return XLSRProcessor.from_directory(path.parent)


def open_checkpoint(path: Path, model_class: str | None = None) -> ForeignCheckpoint:
    """Open a directory of speech translation, or a fairseq file.

    Raises:
        SourceError: if files are missing.
        CheckpointError: if they are damaged or hold something else.
    """
    if path.is_file():
        tensors, model_class = open_tensors(path), model_class or "SpeechEncoderDecoderModel"
        if xm.is_xm_transformer(tensors):
            config = xm.config_from_fairseq(tensors)
            return ForeignCheckpoint(model_class, config, tensors, xm.fairseq_table(config, model_class), path)
        if not set(tensors.names()) >= _MARKS:
            raise SourceError(f"{path} is no translator of fairseq's, and no directory with a config.json.")
        config = config_from_fairseq(tensors)
        return ForeignCheckpoint(model_class, config, tensors, fairseq_table(config, model_class), path)
    if not (path.is_dir() and (path / "config.json").is_file()):
        raise SourceError(f"{path} is no directory with a config.json.")
    raw, side = read_json(path / "config.json"), path / "generation_config.json"
    generation = read_json(side) if side.is_file() else {}
    raw |= {name: generation[name] for name in _IDS if isinstance(generation.get(name), int)}
    model_class = model_class or str((raw.get("architectures") or ["SpeechEncoderDecoderModel"])[0])
    config = config_from_hugging_face(raw, str(path / "config.json"))
    tensors = open_tensors(path)
    if config.decoder_type == speech_to_text_2.MODEL_TYPE:
        text = speech_to_text_2.as_in_file(config.decoder, tensors, "decoder.")
        config = dataclasses.replace(config, decoder=text)
    absent = None
    if not any(name.endswith("masked_spec_embed") for name in tensors.names()):
        absent = r"encoder\.masked_spec_embed"
    table = hugging_face_table(config, model_class)
    search = {"generation_config": generation_from_hugging_face(generation, raw, str(path / "config.json"))}
    return ForeignCheckpoint(model_class, config, tensors, table, path, search, may_be_absent=absent)
