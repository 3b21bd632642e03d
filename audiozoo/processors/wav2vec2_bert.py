"""w2v-BERT's processor: normalised filterbanks in, two frames of 10 ms side by side; letters, by CTC, out."""

from __future__ import annotations

import os
from pathlib import Path

from audiozoo.processors import extractor_settings
from audiozoo.processors.seamless_m4t import SeamlessM4TFeatureExtractor
from audiozoo.processors.wav2vec2 import Wav2Vec2CTCTokenizer, Wav2Vec2FeatureExtractor, Wav2Vec2Processor


def speech_extractor(directory: str | os.PathLike[str]) -> Wav2Vec2FeatureExtractor:
    """What makes the input of a speech encoder of either kind: features if the files of a directory say so."""
    named = (extractor_settings(Path(directory)) or {}).get("feature_extractor_type")
    if named == SeamlessM4TFeatureExtractor.__name__:
        return SeamlessM4TFeatureExtractor.from_directory(directory)  # type: ignore[return-value]
    return Wav2Vec2FeatureExtractor.from_directory(directory)


class Wav2Vec2BertProcessor(Wav2Vec2Processor):
    """Feature extractor and tokenizer of one checkpoint, called as the `transformers` class is.

    What it makes of audio is `input_features`, float32 `(batch, steps, 160)`, and `attention_mask`.

    Attributes:
        feature_extractor: waveforms to model inputs, SeamlessM4T's.
        tokenizer: letters, or None for a checkpoint without a vocabulary (pre-trained, or with a classifier).
    """

    def __init__(
        self, feature_extractor: SeamlessM4TFeatureExtractor, tokenizer: Wav2Vec2CTCTokenizer | None = None
    ) -> None:
        super().__init__(feature_extractor, tokenizer)  # type: ignore[arg-type]

    @classmethod
    def from_directory(cls, directory: str | os.PathLike[str], target_lang: str | None = None) -> Wav2Vec2BertProcessor:
        """From the files of a checkpoint directory; without a vocabulary there is no tokenizer."""
        folder = Path(directory)
        return cls(SeamlessM4TFeatureExtractor.from_directory(folder), cls.tokenizer_in(folder, target_lang))


__all__ = ["Wav2Vec2BertProcessor", "speech_extractor"]
