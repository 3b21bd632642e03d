"""Speech2Text2's foreign forms: Hugging Face directories of the decoder alone. With an encoder it is XLS-R's kind."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from audiozoo.errors import CheckpointError, SourceError
from audiozoo.models.speech_to_text_2 import Speech2Text2Config
from weights_conversion import ForeignCheckpoint, HuggingFaceForm, read_json, take
from weights_conversion.readers import TensorSource, open_tensors
from weights_conversion.rules import Rule, Table, Tied, transpose
from weights_conversion.speech_to_text import DECODER, POSITIONS

MODEL_TYPE = "speech_to_text_2"
CLASS = "Speech2Text2ForCausalLM"

RULES = tuple(rule.prefixed("model.", "model.") for rule in DECODER)
EMBEDDING, HEAD = "model.decoder.embed_tokens.weight", "lm_head.weight"


def hugging_face_table(config: Speech2Text2Config, model_class: str = CLASS) -> Table:
    """The correspondence with what `save_pretrained` writes (and wrote, until version 4.40)."""
    if model_class != CLASS:
        raise CheckpointError(f"There is no class {model_class} in Speech2Text2; there is {CLASS}.")
    if config.tie_word_embeddings:
        return Table(RULES, ignored=(POSITIONS,), tied=(Tied(HEAD, EMBEDDING),))
    return Table((*RULES, Rule(HEAD, "lm_head.kernel", transpose)), ignored=(POSITIONS,))


_CONFIG_DEFAULTS = {f.name: f.default for f in dataclasses.fields(Speech2Text2Config)}


def config_from_hugging_face(config: Mapping[str, Any], where: str = "config.json") -> Speech2Text2Config:
    """Our configuration from a `config.json`, or from the part of one that describes a decoder."""
    return Speech2Text2Config(**take(config, _CONFIG_DEFAULTS, where))


def config_to_hugging_face(config: Speech2Text2Config) -> dict[str, Any]:
    """A `config.json` from our configuration."""
    return dataclasses.asdict(config) | {
        "architectures": [CLASS],
        "model_type": MODEL_TYPE,
        "is_decoder": True,
        "is_encoder_decoder": False,
        "decoder_start_token_id": config.eos_token_id,
        "bos_token_id": 0,
    }


def as_in_file(config: Speech2Text2Config, tensors: TensorSource, inside: str = "") -> Speech2Text2Config:
    """The configuration with a tied or an untied head as the file has it, which published configurations belie.

    Args:
        config: as `config.json` says.
        tensors: the file.
        inside: the decoder's prefix in it.
    """
    names = tensors.names()
    if inside + HEAD not in names or inside + EMBEDDING not in names:
        return dataclasses.replace(config, tie_word_embeddings=True)
    tied = np.array_equal(tensors.read(inside + HEAD), tensors.read(inside + EMBEDDING))
    return dataclasses.replace(config, tie_word_embeddings=tied)


def hugging_face(model: Any) -> HuggingFaceForm:
    """A decoder as the directory that `save_pretrained` would write."""
    return HuggingFaceForm(
        {"config.json": config_to_hugging_face(model.config)}, hugging_face_table(model.config, type(model).__name__)
    )


def recognise(path: Path) -> bool:
    """Is this a directory of the decoder alone? There is no other form of it."""
    return (
        path.is_dir()
        and (path / "config.json").is_file()
        and read_json(path / "config.json").get("model_type") == MODEL_TYPE
    )


def open_checkpoint(path: Path, model_class: str | None = None) -> ForeignCheckpoint:
    """Open a directory of the decoder alone.

    Raises:
        SourceError: if files are missing.
        CheckpointError: if they are damaged or hold something else.
    """
    if not (path.is_dir() and (path / "config.json").is_file()):
        raise SourceError(f"{path} is no directory with a config.json.")
    tensors = open_tensors(path)
    config = config_from_hugging_face(read_json(path / "config.json"), str(path / "config.json"))
    config = as_in_file(config, tensors)
    return ForeignCheckpoint(model_class or CLASS, config, tensors, hugging_face_table(config), path)
