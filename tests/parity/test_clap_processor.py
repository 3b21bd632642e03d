"""CLAP's features and tokens against `transformers`, which takes crops and a fused item at random."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers

from audiozoo import audio
from audiozoo.processors.clap import ClapFeatureExtractor, ClapProcessor, shrink
from audiozoo.text.roberta_tokenizer import RobertaTokenizer
from tests.parity import harness
from tests.text.tiny_bpe import MERGES, vocabulary

RATE = 48_000
TEXTS = ["the dog", "a thin dog outside, the ’dog’ éé 狗", "", " two  spaces\nand lines", "the <mask> dog</s>"]


@pytest.fixture(autouse=True, scope="module")
def _single_precision():
    with harness.precision("float32"):
        yield


@pytest.fixture
def middle_for_chance(monkeypatch):
    """The original's random choices, made as ours are: the middle of what could be drawn."""
    monkeypatch.setattr(np.random, "choice", lambda candidates: candidates[len(candidates) // 2])
    monkeypatch.setattr(np.random, "randint", lambda low, high: (high - low) // 2)


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-0.5, 0.5, int(seconds * RATE)).astype(np.float32)


def check(waveforms, ours: ClapFeatureExtractor, theirs, **options) -> dict[str, np.ndarray]:
    mine = ours(waveforms, sampling_rate=RATE, **options)
    reference = theirs(waveforms, sampling_rate=RATE, return_tensors="np", **options)
    assert mine["input_features"].dtype == np.float32
    wanted = reference["input_features"].astype(np.float32)
    harness.assert_close(mine["input_features"], wanted, kind="features", name="input_features")
    assert mine["is_longer"].shape == reference["is_longer"].shape
    return mine


@pytest.fixture
def exact_shrinking(monkeypatch):
    """The original shrinks in float32, where the place of frame 1000 is off by 6e-5 frames: here 0.003 dB."""
    original = torch.nn.functional.interpolate
    monkeypatch.setattr(
        torch.nn.functional, "interpolate", lambda x, **options: original(x.double(), **options).float()
    )


@pytest.mark.usefixtures("middle_for_chance", "exact_shrinking")
@pytest.mark.parametrize("truncation", ["fusion", "rand_trunc"])
def test_features_of_every_length(truncation):
    """Short, almost ten seconds, ten, less than a frame more, one frame more, and long ones."""
    options = {"truncation": truncation, "frequency_min": 50}
    ours, theirs = ClapFeatureExtractor(**options), transformers.ClapFeatureExtractor(**options)
    batch = [noise(s, i) for i, s in enumerate((0.01, 3.3, 9.99, 10, 10.005, 10.01, 10.03, 27.3))]
    mine = check(batch, ours, theirs)
    longer = [False] * 5 + [True] * 3 if truncation == "fusion" else [False] * 4 + [True] * 4
    assert mine["is_longer"][:, 0].tolist() == longer
    check(batch[1], ours, theirs)
    check(batch[1].astype(np.float64), ours, theirs)


@pytest.mark.usefixtures("middle_for_chance")
@pytest.mark.parametrize("padding", ["repeat", "pad"])
def test_padding(padding):
    ours, theirs = ClapFeatureExtractor(), transformers.ClapFeatureExtractor()
    check([noise(3.3)], ours, theirs, padding=padding)


def test_recordings(recordings):
    ours, theirs = (kind(truncation="rand_trunc") for kind in (ClapFeatureExtractor, transformers.ClapFeatureExtractor))
    for name in ("esc10_dog_1-100032-A-0.wav", "fsdd_3_jackson_0.wav"):
        check(audio.read(recordings / name, sampling_rate=RATE), ours, theirs)


def test_shrinking_is_torchs():
    mel = np.random.default_rng(0).standard_normal((1733, 5))
    theirs = torch.nn.functional.interpolate(
        torch.tensor(mel)[None, None], size=(1001, 5), mode="bilinear", align_corners=False
    )[0, 0]
    harness.assert_close(shrink(mel, 1001), theirs, name="shrunk")


def test_random_crops_lie_where_the_originals_may():
    ours, sound = ClapFeatureExtractor(), noise(11)
    mel = ours._log_mel(sound, "fusion")
    drawn = ours(sound, sampling_rate=RATE, crops="random", rng=np.random.default_rng(0))["input_features"][0]
    thirds = np.array_split(np.arange(len(mel) - 1000), 3)
    for view, third in zip(drawn[1:], thirds, strict=True):
        assert sum(np.array_equal(view, mel[start : start + 1001]) for start in third) == 1


def test_the_original_calls_a_random_short_item_longer(monkeypatch):
    """Its embedding then depends on chance and on the batch; the paper fuses what is longer than ten seconds."""
    ours, theirs = ClapFeatureExtractor(), transformers.ClapFeatureExtractor()
    batch = [noise(1, i) for i in range(4)]
    assert not ours(batch, sampling_rate=RATE)["is_longer"].any()
    for chance in range(4):
        monkeypatch.setattr(np.random, "randint", lambda low, high, chance=chance: chance)
        flags = theirs(batch, sampling_rate=RATE, return_tensors="np")["is_longer"]
        assert flags[:, 0].tolist() == [i == chance for i in range(4)]


def test_tokens_text_and_files(tmp_path):
    mask = transformers.AddedToken("<mask>", lstrip=True)  # as in roberta-base's files
    reference = transformers.RobertaTokenizer(vocab=vocabulary(), merges=MERGES, mask_token=mask)
    theirs = transformers.ClapProcessor(transformers.ClapFeatureExtractor(frequency_min=50), reference)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = ClapProcessor.from_directory(tmp_path / "theirs")
    assert ours.feature_extractor.frequency_min == 50
    built = RobertaTokenizer.from_vocabulary(vocabulary(), MERGES)
    ours.save(tmp_path / "ours")
    back = transformers.RobertaTokenizer.from_pretrained(tmp_path / "ours")
    for options in (
        {"padding": True},
        {"padding": "max_length", "max_length": 77, "truncation": True},
        {"padding": True, "max_length": 5, "truncation": True},
    ):
        wanted = reference(TEXTS, return_tensors="np", **options)
        for tokenizer in (ours.tokenizer, built):
            mine = tokenizer(TEXTS, **options)
            np.testing.assert_array_equal(mine["input_ids"], wanted["input_ids"])
            np.testing.assert_array_equal(mine["attention_mask"], wanted["attention_mask"])
        np.testing.assert_array_equal(back(TEXTS, return_tensors="np", **options)["input_ids"], wanted["input_ids"])
    rows = reference(TEXTS)["input_ids"]
    for skip in (False, True):
        assert ours.batch_decode(rows, skip) == reference.batch_decode(
            rows, skip_special_tokens=skip, clean_up_tokenization_spaces=False
        )
    both = ours(text=TEXTS[:2], audio=noise(1), sampling_rate=RATE)
    assert set(both) == set(
        theirs(text=TEXTS[:2], audio=noise(1), sampling_rate=RATE, return_tensors="np", padding=True)
    )
