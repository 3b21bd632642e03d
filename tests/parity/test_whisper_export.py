"""Whisper goes through our files and back: what `transformers` wrote, it reads again to the bit."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import transformers

import audiozoo
from audiozoo.loading import variables
from tests.parity import harness
from tests.parity.test_whisper import TINY

NAMES = ["WhisperForConditionalGeneration", "WhisperForCausalLM", "WhisperForAudioClassification", "WhisperModel"]


@pytest.mark.parametrize("shards", [False, True], ids=["one file", "shards"])
@pytest.mark.parametrize("name", NAMES)
def test_transformers_reads_what_we_export(name, shards, tmp_path):
    with harness.precision("float32"):
        config = transformers.WhisperConfig(**TINY)
        reference = harness.randomise(getattr(transformers, name)(config), seed=3).float()
        reference.save_pretrained(tmp_path / "theirs", max_shard_size="20KB" if shards else "50GB")
        assert (tmp_path / "theirs" / "model.safetensors.index.json").exists() is shards
        model = audiozoo.load(tmp_path / "theirs")
        assert type(model).__name__ == name
        audiozoo.export(model, tmp_path / "ours")

        again, report = getattr(transformers, name).from_pretrained(tmp_path / "ours", output_loading_info=True)
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            assert not report[kind], (kind, report[kind])
        theirs, ours = reference.state_dict(), again.state_dict()
        assert theirs.keys() == ours.keys()
        for key, tensor in theirs.items():
            assert torch.equal(tensor, ours[key]), key
        written = json.loads((tmp_path / "ours" / "config.json").read_text())
        assert written["architectures"] == [name]
        shape = {
            key: value for key, value in TINY.items() if key != "begin_suppress_tokens"
        }  # of generation_config.json
        assert {key: written[key] for key in shape} == shape

        back = variables(audiozoo.load(tmp_path / "ours"))
        for path, variable in variables(model).items():
            np.testing.assert_array_equal(np.asarray(variable[...]), np.asarray(back[path][...]), path)


def test_a_native_checkpoint_exports_as_well(tmp_path):
    with harness.precision("float32"):
        reference = harness.randomise(
            transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**TINY)), 4
        )
        reference.float().save_pretrained(tmp_path / "theirs")
        audiozoo.save(audiozoo.load(tmp_path / "theirs"), tmp_path / "native")
        audiozoo.export(audiozoo.load(tmp_path / "native"), tmp_path / "ours")
        again = transformers.WhisperForConditionalGeneration.from_pretrained(tmp_path / "ours").state_dict()
        for key, tensor in reference.state_dict().items():
            assert torch.equal(tensor, again[key]), key
