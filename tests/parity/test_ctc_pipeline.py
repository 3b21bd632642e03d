"""Long recordings through CTC in overlapping pieces against the pipeline of `transformers`: texts and times."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers

from audiozoo.decoding.ctc import transcribe_ctc
from audiozoo.processors.wav2vec2 import Wav2Vec2CTCTokenizer, Wav2Vec2FeatureExtractor, Wav2Vec2Processor
from tests.parity import harness
from tests.parity.speech_family import LAYER
from tests.parity.test_wav2vec2 import pair

VOCABULARY = {token: index for index, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", "|", *"ABCDEF"])}
# Frames that see exactly the 320 samples from one to the next, so that a piece has as many frames on both sides. Of the
# published convolutions, which see 400, the pipeline's pieces lack their last frame.
STRIDES = (5, 2, 2, 2, 2, 2, 2)
OPTIONS = {"chunk_length_s": 1.0, "stride_length_s": 0.2}  # 50 frames, of which 10 on each side go


def noise(samples: int) -> np.ndarray:
    return np.random.default_rng(samples).standard_normal(samples).astype(np.float32)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The pipeline with a random model, and ours with its weights; neither normalises, which theirs does to a piece."""
    reference, model, table = pair(
        "Wav2Vec2ForCTC", seed=3, **LAYER, conv_dim=(12,) * 7, conv_kernel=STRIDES, conv_stride=STRIDES
    )
    with torch.no_grad():
        bias = reference.lm_head.bias
        bias -= reference(torch.tensor(noise(16_000)[None], dtype=bias.dtype)).logits.mean(dim=(0, 1))  # all are heard
        bias[1:4] = -1e3  # but <s>, </s> and <unk>, whose names the pipeline writes into the text
    harness.port(reference, model, table)
    folder = tmp_path_factory.mktemp("processor")
    processor = Wav2Vec2Processor(Wav2Vec2FeatureExtractor(do_normalize=False), Wav2Vec2CTCTokenizer(VOCABULARY))
    processor.save(folder)
    pipeline = transformers.pipeline(
        "automatic-speech-recognition",
        model=reference,
        tokenizer=transformers.Wav2Vec2CTCTokenizer.from_pretrained(folder),
        feature_extractor=transformers.Wav2Vec2FeatureExtractor.from_pretrained(folder),
    )
    return pipeline, model, processor


@pytest.mark.parametrize("samples", [110 * 320, 41_234, 9_999], ids=["whole pieces", "a shorter last one", "one piece"])
def test_texts_and_times(both, samples):
    pipeline, model, processor = both
    ours = transcribe_ctc(model, processor, noise(samples), batch_size=2, **OPTIONS)
    for level, found in (("char", ours.characters), ("word", ours.words)):
        theirs = pipeline(noise(samples), return_timestamps=level, **OPTIONS)
        assert ours.text == theirs["text"]
        wanted = [(c["text"], *np.round(c["timestamp"], 3)) for c in theirs["chunks"] if c["text"] != " "]
        assert [(c["text"], c["start"], c["end"]) for c in found] == wanted
    assert len(set(ours.text)) > 3
    if samples > 16_000:
        assert transcribe_ctc(model, processor, noise(samples)).characters != ours.characters, "pieces can be told"


def test_where_the_pipeline_counts_otherwise(both, monkeypatch):
    """In a batch its last piece may get a frame of padding; and a rest that makes no frame is another piece to it."""
    pipeline, model, processor = both
    frames, pieces, ours = [], [], []
    decode, forward = pipeline.tokenizer.decode, pipeline._forward
    monkeypatch.setattr(pipeline.tokenizer, "decode", lambda ids, **kw: frames.append(len(ids)) or decode(ids, **kw))
    for batch_size in (1, 2):
        pipeline(noise(41_234), batch_size=batch_size, **OPTIONS)
    assert frames == [128, 129]
    assert int(model.backbone.frame_lengths(41_234)) == 128
    monkeypatch.setattr(pipeline, "_forward", lambda x, **kw: pieces.append(x["stride"]) or forward(x, **kw))
    pipeline(noise(110 * 320 + 100), **OPTIONS)
    transcribe_ctc(model, processor, noise(110 * 320 + 100), **OPTIONS, progress=lambda _, count: ours.append(count))
    assert (len(pieces), ours[-1]) == (4, 3)
