"""MMS's foreign forms: a directory with the adapters of several languages. The network is wav2vec 2.0's."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from audiozoo.errors import CheckpointError, SourceError
from audiozoo.models.mms import MMSConfig
from audiozoo.models.wav2vec2 import Wav2Vec2Config
from weights_conversion import ForeignCheckpoint, HuggingFaceForm, wav2vec2
from weights_conversion.readers import TensorSource, open_tensors
from weights_conversion.rules import Rule, Table, Tensors, permute
from weights_conversion.wav2vec2 import ATTENTION_ADAPTERS, BACKBONE, family_table

MODEL_TYPE = "mms"  # of no published directory: those say wav2vec2, and load as one language

_TURNED = permute(0, 2, 1)  # (languages, out, in) -> (languages, in, out)
_BLOCK = "encoder.layers.{i}.adapter_layer."
STACKED_ADAPTERS = (
    Rule(_BLOCK + "norm.weight", _BLOCK + "norm.scale"),
    Rule(_BLOCK + "norm.bias", _BLOCK + "norm.bias"),
    Rule(_BLOCK + "{map:linear_1|linear_2}.weight", _BLOCK + "{map}.kernel", _TURNED),
    Rule(_BLOCK + "{map:linear_1|linear_2}.bias", _BLOCK + "{map}.bias"),
)
STACKED_HEADS = (Rule("lm_head.weight", "lm_head.kernel", _TURNED), Rule("lm_head.bias", "lm_head.bias"))


def is_of_a_language(name: str) -> bool:
    """Whether a tensor belongs to one language: its adapters and its head."""
    return ".adapter_layer." in name or name.startswith("lm_head.")


class SeveralLanguages:
    """A checkpoint's tensors, those of the languages side by side: a source for the engine of `rules`.

    Heads are padded with zeros to the largest alphabet.
    """

    def __init__(self, common: Tensors, languages: Mapping[str, TensorSource]):
        self.common, self.languages = common, languages
        for language, tensors in languages.items():
            wanted = {name for name in common.names() if is_of_a_language(name)}
            if wrong := sorted(wanted ^ set(tensors.names())):
                raise CheckpointError(f"The adapter for {language!r} does not fit the model: {', '.join(wrong[:5])}.")
        self.sizes = tuple(tensors.shape("lm_head.bias")[0] for tensors in languages.values())

    def names(self) -> list[str]:
        """Every tensor's name, those of the languages once."""
        return self.common.names()

    def shape(self, name: str) -> tuple[int, ...]:
        """With the languages in front, where a tensor belongs to one."""
        if not is_of_a_language(name):
            return self.common.shape(name)
        shape = next(iter(self.languages.values())).shape(name)
        if name.startswith("lm_head."):
            shape = (max(self.sizes), *shape[1:])
        return (len(self.languages), *shape)

    def dtype(self, name: str) -> np.dtype:
        """The dtype of one tensor, without reading it."""
        return self.common.dtype(name)

    def read(self, name: str) -> np.ndarray:
        """One tensor's values, of all languages."""
        if not is_of_a_language(name):
            return self.common.read(name)
        result = np.zeros(self.shape(name), self.dtype(name))
        for row, (language, tensors) in enumerate(self.languages.items()):
            value = tensors.read(name)
            if value.shape[1:] != result.shape[2:] or len(value) > result.shape[1]:
                raise CheckpointError(f"{name} of the adapter for {language!r} is {value.shape}, unlike the others.")
            result[row, : len(value)] = value
        return result


def hugging_face_table(config: MMSConfig, model_class: str) -> Table:
    """The correspondence with `save_pretrained`'s names, languages in front; without any, wav2vec 2.0's."""
    if model_class != "MMSForCTC":
        return wav2vec2.hugging_face_table(config, model_class)
    backbone = (*(rule for rule in BACKBONE if rule not in ATTENTION_ADAPTERS), *STACKED_ADAPTERS)
    return family_table(config, "MMSForCTC", family="MMS", backbone=backbone, heads={"ForCTC": STACKED_HEADS})


def hugging_face(model: Any) -> HuggingFaceForm:
    """There is no directory of several languages in one model.

    Raises:
        CheckpointError: always, with what to do.
    """
    raise CheckpointError(f"A {type(model).__name__} has no such form; export model.speaking(language), one at a time.")


def recognise(path: Path) -> bool:
    """Nothing is MMS's alone: its files and directories are wav2vec 2.0's, and load as one language."""
    return False


def adapters_of(directory: Path) -> dict[str, Path]:
    """The file of every language whose adapters lie in a directory."""
    files = [p for p in sorted(directory.glob("adapter.*.*")) if p.suffix in {".safetensors", ".bin"}]
    return {file.name.removeprefix("adapter.").removesuffix(file.suffix): file for file in files}


def open_checkpoint(path: Path, model_class: str | None = None) -> ForeignCheckpoint:
    """Open a directory as a recogniser of all languages whose `adapter.<language>.safetensors` it holds.

    Raises:
        SourceError: if there are no adapters.
        CheckpointError: if they do not fit the model.
    """
    if model_class not in (None, "MMSForCTC"):
        return wav2vec2.open_checkpoint(path, model_class)
    files = adapters_of(path) if path.is_dir() else {}
    if not files:
        raise SourceError(f"{path} holds no adapter.<language>.safetensors.")
    foreign = wav2vec2.open_checkpoint(path, "Wav2Vec2ForCTC")
    tensors = SeveralLanguages(foreign.tensors, {language: open_tensors(file) for language, file in files.items()})
    fields = {f.name: getattr(foreign.config, f.name) for f in dataclasses.fields(Wav2Vec2Config)}
    fields |= {"languages": tuple(files), "vocab_sizes": tensors.sizes, "vocab_size": max(tensors.sizes)}
    config = MMSConfig(**fields)
    return dataclasses.replace(
        foreign,
        model_class="MMSForCTC",
        config=config,
        tensors=tensors,
        table=hugging_face_table(config, "MMSForCTC"),
    )
