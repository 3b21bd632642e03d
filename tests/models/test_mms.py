"""MMS without PyTorch: the romanised alphabet, and alignment with it."""

from __future__ import annotations

import numpy as np
import pytest

from audiozoo.evaluation import TASKS
from audiozoo.models import mms
from audiozoo.models.mms import MMSConfig
from audiozoo.processors.mms import AlignmentTokenizer, MMSProcessor

LETTERS = ["<blank>", "<pad>", "</s>", "<unk>", *"aienourtsmkldghybpwcvjzf", "'", "q", "x"]


@pytest.fixture
def dictionary(tmp_path):
    (tmp_path / "dictionary.txt").write_text("\n".join(LETTERS) + "\n")
    return tmp_path


def test_the_aligners_alphabet(dictionary):
    processor = MMSProcessor.from_directory(dictionary)
    tokenizer = processor.tokenizer
    assert isinstance(tokenizer, AlignmentTokenizer)
    assert len(tokenizer) == 31
    assert tokenizer.pad_token_id == 0
    assert [LETTERS[i] for i in tokenizer.word_ids("Don’t!")] == list("don't")
    assert tokenizer.word_ids("42") == []
    assert tokenizer.decode([4, 4, 0, 4, 5]) == "aai"
    # `audiozoo evaluate --language` says how a text is romanised, as `audiozoo align` does.
    aligner = type("Wav2Vec2ForCTC", (), {"config": MMSConfig()})()
    task = TASKS["alignment"](aligner, processor, language="rus")
    task.prepare([], [])
    assert task.model is aligner
    assert (task.processor.tokenizer.language, tokenizer.language) == ("rus", None)
    (dictionary / "dictionary.txt").write_text("a\nb\n")
    with pytest.raises(FileNotFoundError, match="no <blank>"):
        MMSProcessor.from_directory(dictionary)


def test_what_a_configuration_must_say():
    with pytest.raises(ValueError, match="2 languages have 1 sizes"):
        MMSConfig(languages=("eng", "fra"), vocab_sizes=(10,))
    with pytest.raises(ValueError, match="needs languages"):
        mms.MMSForCTC(MMSConfig(), rngs=None)
    one = {"languages": ("eng",), "vocab_sizes": (32,)}
    with pytest.raises(ValueError, match="needs adapter_attn_dim"):
        mms.MMSForCTC(MMSConfig(**one), rngs=None)
    assert np.isin(MMSConfig.lid(256).num_labels, [256])
