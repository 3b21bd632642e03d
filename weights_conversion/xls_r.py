"""XLS-R's foreign forms: Hugging Face directories of speech translation. Its encoders alone are wav2vec 2.0's."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from audiozoo.errors import CheckpointError, SourceError
from audiozoo.models.mbart import MBartConfig
from audiozoo.models.xls_r import SpeechEncoderDecoderConfig
from weights_conversion import ForeignCheckpoint, HuggingFaceForm, read_json, take, wav2vec2
from weights_conversion.readers import open_tensors
from weights_conversion.rules import Ignore, Rule, Table, transpose
from weights_conversion.wav2vec2 import BACKBONE, OLD_WEIGHT_NORM, linear, norm

MODEL_TYPE = "speech-encoder-decoder"

_BLOCK = "decoder.model.decoder.layers.{i}."
_HEAD = "decoder.lm_head.weight"
DECODER = (
    Rule("decoder.model.decoder.{e:embed_tokens|embed_positions}.weight", "decoder.model.decoder.{e}.embedding"),
    *norm("decoder.model.decoder.{n:layer_norm|layernorm_embedding}"),
    *linear(_BLOCK + "{a:self_attn|encoder_attn}.{p:q_proj|k_proj|v_proj|out_proj}"),
    *norm(_BLOCK + "{n:self_attn_layer_norm|encoder_attn_layer_norm|final_layer_norm}"),
    *linear(_BLOCK + "{d:fc1|fc2}"),
)


def hugging_face_table(config: SpeechEncoderDecoderConfig, model_class: str) -> Table:
    """The correspondence with what `save_pretrained` writes."""
    if model_class != "SpeechEncoderDecoderModel":
        raise CheckpointError(f"There is no class {model_class} in XLS-R; there is SpeechEncoderDecoderModel.")
    rules = [rule.prefixed("encoder.", "encoder.") for rule in BACKBONE]
    rules += [*DECODER, *linear("enc_to_dec_proj")]
    ignored: tuple[Ignore, ...] = ()
    if config.decoder.tie_word_embeddings:
        ignored = (Ignore(_HEAD, "the embedding again"),)
    else:
        rules.append(Rule(_HEAD, "decoder.lm_head.kernel", transpose))
    return Table(rules, renames=OLD_WEIGHT_NORM, ignored=ignored)


_DECODER_DEFAULTS = {f.name: f.default for f in dataclasses.fields(MBartConfig)}


def config_from_hugging_face(config: Mapping[str, Any], where: str = "config.json") -> SpeechEncoderDecoderConfig:
    """Our configuration from a `config.json`.

    Raises:
        CheckpointError: if its encoder is no wav2vec 2.0 or its decoder no mBART.
    """
    encoder, decoder = config.get("encoder") or {}, config.get("decoder") or {}
    if encoder.get("model_type") != "wav2vec2" or decoder.get("model_type") != "mbart":
        raise CheckpointError(
            f"{where}: an encoder of type wav2vec2 and a decoder of type mbart are wanted, not "
            f"{encoder.get('model_type')} and {decoder.get('model_type')}."
        )
    # What a configuration leaves out has transformers' default, which is not always ours.
    text = MBartConfig(**take({"scale_embedding": False, "vocab_size": 50_265, **decoder}, _DECODER_DEFAULTS, where))

    def token(name: str, default: int) -> int:
        found = [c[name] for c in (config, decoder) if c.get(name) is not None]
        return int(found[0]) if found else default

    return SpeechEncoderDecoderConfig(
        wav2vec2.config_from_hugging_face(encoder, where),
        text,
        decoder_start_token_id=token("decoder_start_token_id", text.eos_token_id),
        pad_token_id=token("pad_token_id", text.pad_token_id),
        eos_token_id=token("eos_token_id", text.eos_token_id),
    )


def hugging_face(model: Any) -> HuggingFaceForm:
    """A translation model as the directory that `save_pretrained` would write."""
    config, name = model.config, type(model).__name__
    encoder = wav2vec2.config_to_hugging_face(config.encoder, "Wav2Vec2Model", "wav2vec2")
    decoder = dataclasses.asdict(config.decoder) | {
        "architectures": ["MBartForCausalLM"],
        "model_type": "mbart",
        "is_decoder": True,
        "is_encoder_decoder": False,
        "add_cross_attention": True,
        "decoder_start_token_id": config.decoder_start_token_id,
    }
    raw = {
        "architectures": [name],
        "model_type": MODEL_TYPE,
        "is_encoder_decoder": True,
        "tie_word_embeddings": False,
        "encoder": encoder,
        "decoder": decoder,
        "decoder_start_token_id": config.decoder_start_token_id,
        "pad_token_id": config.pad_token_id,
        "eos_token_id": config.eos_token_id,
    }
    return HuggingFaceForm({"config.json": raw}, hugging_face_table(config, name))


def recognise(path: Path) -> bool:
    """Is this a file of XLS-R with a decoder? Only directories hold one, and those are known by their type."""
    return (
        path.is_dir()
        and (path / "config.json").is_file()
        and read_json(path / "config.json").get("model_type") == MODEL_TYPE
    )


def open_checkpoint(path: Path, model_class: str | None = None) -> ForeignCheckpoint:
    """Open a directory of speech translation.

    Raises:
        SourceError: if files are missing.
        CheckpointError: if they are damaged or hold something else.
    """
    if not (path.is_dir() and (path / "config.json").is_file()):
        raise SourceError(f"{path} is no directory with a config.json.")
    raw = read_json(path / "config.json")
    model_class = model_class or str((raw.get("architectures") or ["SpeechEncoderDecoderModel"])[0])
    config = config_from_hugging_face(raw, str(path / "config.json"))
    tensors = open_tensors(path)
    absent = None
    if not any(name.endswith("masked_spec_embed") for name in tensors.names()):
        absent = r"encoder\.masked_spec_embed"
    table = hugging_face_table(config, model_class)
    return ForeignCheckpoint(model_class, config, tensors, table, path, may_be_absent=absent)
