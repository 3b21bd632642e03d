"""How many parameters the docstrings of the published sizes say, and how many there are."""

from __future__ import annotations

import importlib
import inspect
import math
import pkgutil
import re

import pytest

from audiozoo import models
from audiozoo.layers.abstract import abstract
from audiozoo.loading import variables

# What is counted, in the order in which a docstring says it.
COUNTED = {
    "ASTConfig": ("ASTForAudioClassification",),
    "ClapAudioConfig": ("ClapAudioModel",),
    "ClapConfig": ("ClapModel",),
    "HubertConfig": ("HubertModel", "HubertForPreTraining"),
    "Pop2PianoConfig": ("Pop2PianoForConditionalGeneration",),
    "RobertaConfig": ("RobertaModel",),
    "SEWConfig": ("SEWForCTC",),
    **{f"SEWConfig.sew_d_{size}": ("SEWDForCTC",) for size in ("tiny", "small", "mid", "base", "base_plus")},
    "Speech2TextConfig": ("Speech2TextForConditionalGeneration",),
    "SpeechT5Config.asr": ("SpeechT5ForSpeechToText",),
    "SpeechT5Config.tts": ("SpeechT5ForTextToSpeech",),
    "SpeechT5Config.vc": ("SpeechT5ForSpeechToSpeech",),
    "T5Config": ("T5EncoderModel",),
    "Wav2Vec2BertConfig": ("Wav2Vec2BertModel",),
    "Wav2Vec2Config": ("Wav2Vec2ForPreTraining",),
    "Wav2Vec2ConformerConfig": ("Wav2Vec2ConformerForPreTraining",),
    "WavLMConfig": ("WavLMModel", "WavLMForPreTraining"),
    "WhisperConfig": ("WhisperForConditionalGeneration",),
    "XLSRConfig": ("wav2vec2.Wav2Vec2ForPreTraining",),
}


def said():
    """Every published size whose docstring says how many million parameters it has."""
    for info in pkgutil.iter_modules(models.__path__):
        module = importlib.import_module(f"audiozoo.models.{info.name}")
        for name, cls in vars(module).items():
            if not inspect.isclass(cls) or cls.__module__ != module.__name__:
                continue
            for size, method in vars(cls).items():
                text = inspect.getdoc(method) or "" if isinstance(method, classmethod) else ""
                if " M parameters" in text:
                    yield pytest.param(module, cls, size, re.findall(r"([\d.]+) M ", text), id=f"{name}.{size}")


@pytest.mark.parametrize(("module", "cls", "size", "millions"), list(said()))
def test_docstrings_count_right(module, cls, size, millions):
    counted = COUNTED.get(f"{cls.__name__}.{size}") or COUNTED[cls.__name__]
    for name, number in zip(counted, millions, strict=True):
        where, _, name = name.rpartition(".")
        model = getattr(importlib.import_module(f"audiozoo.models.{where}") if where else module, name)
        made = abstract(lambda rngs, model=model: model(getattr(cls, size)(), rngs=rngs))
        count = sum(math.prod(leaf.shape) for leaf in variables(made).values())
        assert f"{count / 1e6:.{len(number.partition('.')[2])}f}" == number, name
