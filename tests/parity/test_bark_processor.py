"""Bark's processor against `transformers`' on the same files: ids, padding, voice presets."""

from __future__ import annotations

import numpy as np
import transformers

from audiozoo.processors.bark import BarkProcessor
from tests.processors.test_bark_processor import WORDS, preset

TEXTS = [
    "Hello, hello my dog!",
    "my  dog\n[laughs] hello .",
    "你好。Hello",
    "xyz he\u0301llo",
    "HELLO my\tdog" + " my" * 40,
    "héllo\u00a0my\u200bdog",
]


def test_ids_and_voices(tmp_path):
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    tokenizer = transformers.BertTokenizer(str(vocabulary), do_lower_case=False)
    paths = {}
    for name, seed in (("v2/en_speaker_0", 6), ("announcer", 8)):
        paths[name] = {}
        for part, array in preset(seed).items():
            file = tmp_path / "in" / f"{name}_{part}.npy"
            file.parent.mkdir(parents=True, exist_ok=True)
            np.save(file, array)
            paths[name][part] = str(file.relative_to(tmp_path))
    theirs = transformers.BarkProcessor(tokenizer, {"repo_or_path": str(tmp_path), **paths})
    saved = str(tmp_path / "saved")
    theirs.save_pretrained(saved)
    ours = BarkProcessor.from_directory(saved)
    assert sorted(ours.available_voice_presets) == sorted(theirs.available_voice_presets)
    for text in (*TEXTS, TEXTS):
        for name in paths:
            wanted = theirs(text, voice_preset=name, return_tensors="np")
            found = ours(text, voice_preset=name)
            np.testing.assert_array_equal(found["input_ids"], wanted["input_ids"])
            np.testing.assert_array_equal(found["attention_mask"], wanted["attention_mask"])
            np.testing.assert_equal(found["history_prompt"], dict(wanted["history_prompt"]))
    # From the vocabulary alone, and what we write, read by them.
    plain = BarkProcessor.from_vocabulary({word: i for i, word in enumerate(WORDS)})
    assert [plain.encode(text) for text in TEXTS] == [ours.encode(text) for text in TEXTS]
    ours.save(tmp_path / "back")
    back = transformers.BarkProcessor.from_pretrained(str(tmp_path / "back"))
    again = back(TEXTS, voice_preset="announcer", return_tensors="np")
    np.testing.assert_array_equal(again["input_ids"], ours(TEXTS)["input_ids"])
    np.testing.assert_equal(dict(again["history_prompt"]), preset(8))
