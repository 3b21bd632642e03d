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
from tests.parity.test_whisper import TINY, features

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


def test_generate_follows_the_file_as_transformers_does(tmp_path):
    """Beams, penalties, forbidden tokens and the length are the checkpoint's, where the caller says nothing."""
    search = {"num_beams": 3, "length_penalty": 0.2, "repetition_penalty": 1.4, "no_repeat_ngram_size": 2}
    tokens = {"suppress_tokens": [5, 6, 7, 8, 30, 31], "begin_suppress_tokens": [9], "no_timestamps_token_id": 95}
    with harness.precision("float32"):
        reference = harness.randomise(
            transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**TINY)), 7
        ).float()
        with torch.no_grad():  # sharper logits, so that the search has something to decide
            reference.model.decoder.layer_norm.weight.mul_(6)
        x = features(6).astype(np.float32)

        def compare(asked=None, **settings):
            reference.generation_config = transformers.GenerationConfig(
                **{n: TINY[n] for n in ("pad_token_id", "bos_token_id", "decoder_start_token_id")},
                **{"eos_token_id": 1, "do_sample": False} | settings,
            )
            reference.save_pretrained(tmp_path)
            theirs = reference.generate(torch.tensor(x), **(asked or {})).numpy()
            ours = audiozoo.load(tmp_path).generate(x, **(asked or {}))
            np.testing.assert_array_equal(ours[:, : theirs.shape[1]], theirs[:, : ours.shape[1]])
            assert not ours[:, theirs.shape[1] :].any()
            assert not theirs[:, ours.shape[1] :].any()
            return ours

        plain = compare(**tokens, max_length=12)
        searched = compare(**tokens, **search, max_new_tokens=9)
        shorter = compare({"max_length": 7}, **tokens)
        assert plain.shape[1] == 12
        assert searched.shape[1] == 9
        assert shorter.shape[1] == 7  # the prompt of two tokens does not count
        assert not np.array_equal(plain[:, :9], searched)
        assert 9 not in plain[:, 0]
