"""What authors' files of wav2vec 2.0's family hold beside weights: how sound is normalised, letters, names of classes.

fairseq keeps settings under "cfg" or "args" and a task's dictionary under "task_state"; older files of it have no
dictionary, and want `dict.ltr.txt` (letters), `dict.phn.txt` (phonemes) or `dict.lang.txt` (languages) beside them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from audiozoo.errors import CheckpointError
from audiozoo.processors.wav2vec2 import (
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Processor,
    fairseq_symbols,
)
from weights_conversion import warn_of_nameless_classes
from weights_conversion.readers import TensorSource, open_tensors

_HEAD = "w2v_encoder.proj.bias"
_LAYER_NORM = re.compile(r"feature_extractor\.conv_layers\.[1-9]\d*\.(2\.1|layer_norm)\.weight$")


def mapping(value: Any) -> dict[str, Any]:
    """Settings as a dictionary, whether the file has them as a namespace or as a configuration tree."""
    if isinstance(value, Mapping):
        return dict(value)
    return dict(vars(value)) if hasattr(value, "__dict__") else {}


def symbols_of(dictionary: Any) -> list[str]:
    """The entries of a fairseq dictionary in a file, in order; none if it is something else."""
    state = getattr(dictionary, "state", None)
    found = state.get("symbols") if isinstance(state, Mapping) else getattr(dictionary, "symbols", None)
    return [str(symbol) for symbol in found or []]


def _task(metadata: Mapping[str, Any]) -> list[str]:
    return symbols_of(mapping(metadata.get("task_state")).get("target_dictionary"))


def labels_of(tensors: TensorSource, count: int) -> tuple[str, ...]:
    """The names of a classifier's classes: from the file, or from the one `dict.….txt` beside it that fits."""
    found = _task(tensors.metadata)
    for path in () if len(found) == count else sorted(tensors.path.parent.glob("dict.*.txt")):
        if len(found := fairseq_symbols(path)) == count:
            break
    if len(found) == count:
        return tuple(found)
    remedy = "fairseq's list of them beside it: dict.lang.txt for languages, a name and any number a line."
    warn_of_nameless_classes(tensors.path, count, remedy)
    return tuple(f"LABEL_{i}" for i in range(count))


def vocabularies(path: Path) -> dict[str, dict[str, int]]:
    """The alphabet of every language in fairseq's file of MMS, as a nested `vocab.json` has it.

    CTC's blank, fairseq's `<s>`, is called `<pad>` here.

    Raises:
        CheckpointError: if a language has none.
    """
    found = {}
    for language, part in (open_tensors(path).metadata.get("adapter") or {}).items():
        symbols = _task(part)
        if not symbols:
            raise CheckpointError(f"{path} holds no dictionary of {language!r}.")
        found[str(language)] = Wav2Vec2CTCTokenizer.from_symbols(symbols[4:]).vocab
    return found


def normalises(tensors: TensorSource) -> bool:
    """Whether a file's model reads waveforms of mean 0 and variance 1: as it says, else if its convolutions have norms.

    Among the published files that say nothing of it, and those of torchaudio, those read normalised waveforms that have
    a LayerNorm after every convolution.
    """
    cfg = mapping(tensors.metadata.get("cfg"))
    for settings in (cfg.get("task"), cfg.get("model"), cfg, tensors.metadata.get("args")):
        if isinstance(said := mapping(settings).get("normalize"), bool):
            return said
    return any(_LAYER_NORM.search(name) for name in tensors.names())


def processor_of_file(path: Path) -> Wav2Vec2Processor:
    """The processor of an author's file; without a tokenizer if it has no letters, or they are nowhere to be found."""
    tensors = open_tensors(path)
    folder = path.parent
    if (folder / "preprocessor_config.json").is_file():
        extractor = Wav2Vec2FeatureExtractor.from_directory(folder)
    else:
        normal = normalises(tensors)
        extractor = Wav2Vec2FeatureExtractor(do_normalize=normal, return_attention_mask=normal)
    return Wav2Vec2Processor(extractor, _tokenizer(tensors))


def _tokenizer(tensors: TensorSource) -> Wav2Vec2CTCTokenizer | None:
    if not {_HEAD, "aux.bias"} & set(tensors.names()):
        return None
    if tensors.metadata.get("adapter"):
        nested = vocabularies(tensors.path)
        return Wav2Vec2CTCTokenizer(nested, target_lang=_language(tensors) or next(iter(nested)))
    if symbols := _task(tensors.metadata):
        return Wav2Vec2CTCTokenizer.from_symbols(symbols[4:])
    return Wav2Vec2Processor.tokenizer_in(tensors.path.parent)


def _language(tensors: TensorSource) -> str | None:
    """Which of its languages the network in fairseq's file of MMS speaks: the one whose head is the network's."""
    head = tensors.read(_HEAD)
    for language, part in tensors.metadata["adapter"].items():
        own = mapping(part.get("model")).get(_HEAD)
        if own is not None and own.shape == head.shape and np.array_equal(own.read(), head):
            return str(language)
    return None
