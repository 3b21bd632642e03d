"""The commands of CTC models and speech encoders, on tiny checkpoints: transcribe, align, identify, units."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
import soundfile
from safetensors.numpy import save_file

import audiozoo
from audiozoo import packaged
from audiozoo.decoding import ctc, encoders, long_form
from audiozoo.decoding.units import KMeans, deduplicate, units
from audiozoo.evaluation import evaluate
from audiozoo.loading import variables
from audiozoo.models import hubert, sew, wav2vec2, wavlm
from audiozoo.models.hubert import HubertConfig
from audiozoo.models.wav2vec2 import Wav2Vec2Config
from audiozoo.processors.wav2vec2 import Wav2Vec2CTCTokenizer, Wav2Vec2FeatureExtractor, Wav2Vec2Processor
from audiozoo.processors.whisper import WhisperFeatureExtractor
from audiozoo.training.data import Item
from tests.hub_server import HubServer
from tests.models import tiny_whisper
from tests.models.random_model import random_model
from tests.test_cli import ROOT, Run, assert_refused, audiozoo_command  # noqa: F401 - a fixture
from tests.training import tiny
from weights_conversion import wav2vec2 as conversion

NETWORK = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "conv_dim": (8,) * 7,
    "feat_extract_norm": "layer",
    "conv_bias": True,
    "do_stable_layer_norm": True,
    "num_conv_pos_embeddings": 6,
    "num_conv_pos_embedding_groups": 2,
}
TOKENS = ["<pad>", "<s>", "</s>", "<unk>", "|", *"ABCDEFGH"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A recogniser of letters, a classifier and an encoder with random weights, and two seconds of noise."""
    folder = tmp_path_factory.mktemp("checkpoints")
    vocabulary = {token: index for index, token in enumerate(TOKENS)}
    processor = Wav2Vec2Processor(Wav2Vec2FeatureExtractor(), Wav2Vec2CTCTokenizer(vocabulary))
    letters = Wav2Vec2Config(**NETWORK, vocab_size=len(TOKENS))
    classes = Wav2Vec2Config(**NETWORK, classifier_proj_size=8, id2label=("yes", "no", "maybe"))
    models = {
        "ctc": random_model(lambda rngs: wav2vec2.Wav2Vec2ForCTC(letters, rngs=rngs)),
        "classifier": random_model(lambda rngs: wav2vec2.Wav2Vec2ForSequenceClassification(classes, rngs=rngs)),
        "hubert": random_model(lambda rngs: hubert.HubertModel(HubertConfig(**NETWORK), rngs=rngs)),
    }
    for name, model in models.items():
        audiozoo.export(model, folder / name)
        processor.save(folder / name)
    wave = np.random.default_rng(0).standard_normal(32_000) * 0.1
    soundfile.write(folder / "noise.wav", wave, 16_000)
    return folder


@pytest.fixture
def run(audiozoo_command, monkeypatch):  # noqa: F811
    from audiozoo.commands import terminal

    monkeypatch.setattr(terminal, "keep_compiled_programs", lambda: None)

    def call(*arguments, **options) -> Run:
        return audiozoo_command(*arguments, **options)

    return call


def test_a_recogniser_of_features_transcribes_and_embeds(run, tmp_path, checkpoints):
    """w2v-BERT's, whose files name no paper of waveforms."""
    model, sound = tiny.family("wav2vec2_bert", "Wav2Vec2BertForCTC"), checkpoints / "noise.wav"
    audiozoo.export(model, tmp_path / "model")
    tiny.PROCESSORS["wav2vec2_bert"].save(tmp_path / "model")
    heard = ctc.transcribe_ctc(model, tiny.PROCESSORS["wav2vec2_bert"], audiozoo.audio.read(sound))
    assert heard.text
    said = run("transcribe", sound, "--model", tmp_path / "model")
    assert " ".join(said.out.split()) == " ".join(heard.text.split()), said.err
    assert run("embed", sound, "--model", tmp_path / "model", "-o", tmp_path / "out.npz").code == 0
    assert np.load(tmp_path / "out.npz")["frames"].shape == (99, 16)
    aligned = run("align", sound, "sow", "--model", tmp_path / "model")
    assert aligned.code == 0, aligned.err
    assert "sow" in aligned.out


def test_a_conformer_goes_the_way_of_its_family(run, tmp_path, checkpoints):
    """wav2vec 2.0 with other blocks: each command hears its files as those of wav2vec 2.0."""
    sound, folders = checkpoints / "noise.wav", {}
    for head in ("ForCTC", "ForSequenceClassification"):
        folders[head] = tmp_path / head
        model = tiny.family("wav2vec2_conformer", f"Wav2Vec2Conformer{head}")
        audiozoo.export(model, folders[head])
        tiny.PROCESSOR.save(folders[head])
        if head == "ForCTC":
            heard = ctc.transcribe_ctc(model, tiny.PROCESSOR, audiozoo.audio.read(sound)).text
    assert heard
    made = run("convert", folders["ForCTC"], tmp_path / "native")
    assert made.code == 0, made.err
    for source in (folders["ForCTC"], tmp_path / "native"):
        said = run("transcribe", sound, "--model", source)
        assert " ".join(said.out.split()) == " ".join(heard.split()), said.err
    assert "sow" in run("align", sound, "sow", "--model", tmp_path / "native").out
    assert run("embed", sound, "--model", folders["ForCTC"], "-o", tmp_path / "out.npz").code == 0
    assert np.load(tmp_path / "out.npz")["frames"].shape == (100, 16)
    named = run("identify", sound, "--model", folders["ForSequenceClassification"])
    assert {"high", "low"} <= set(named.out.split()), named.err


def test_transcribe(run, checkpoints, tmp_path):
    source, sound = checkpoints / "ctc", checkpoints / "noise.wav"
    wave = audiozoo.audio.read(sound)
    model, processor = audiozoo.load(source), audiozoo.load_processor(source)
    heard = ctc.transcribe_ctc(model, processor, wave)
    assert heard.words
    plain = run("transcribe", sound, "--model", source)
    assert plain.code == 0, plain.err
    assert " ".join(plain.out.split()) == heard.text
    timed = json.loads(run("transcribe", sound, "--model", source, "--format", "json", "--word-timestamps").out)
    words = [word for segment in timed["segments"] for word in segment["words"]]
    assert [w["word"] for w in words] == [w["text"] for w in heard.words]
    assert [(w["start"], w["end"]) for w in words] == [(w["start"], w["end"]) for w in heard.words]
    assert all(a["start"] <= a["end"] <= b["start"] for a, b in itertools.pairwise(words))
    lines = run("transcribe", sound, "--model", source, "--format", "srt", "--word-timestamps").out.splitlines()
    assert timed["segments"][0]["text"].strip() in lines  # with spaces between the words
    cues = run("transcribe", sound, "--model", source, "--format", "srt").out
    assert cues.startswith("1\n00:00:0")
    assert cues.count("-->") == len(timed["segments"])
    beams = run("transcribe", sound, "--model", source, "--beam-size", "5", "--hotword", "ABBA")
    assert beams.code == 0, beams.err
    assert_refused(run("transcribe", sound, "--model", source, "--task", "translate"), "--task is Whisper's")
    assert_refused(run("transcribe", sound, "--model", source, "--language", "en"), "no adapters of languages")
    assert_refused(run("transcribe", sound, "--model", checkpoints / "classifier"), "does not transcribe")
    missing = run("transcribe", sound, "--model", source, "--language-model", tmp_path / "no.arpa")
    assert_refused(missing, "no language model")
    (tmp_path / "lexicon.txt").write_text("ah A |\nbee B |\n")
    spelled = run("transcribe", sound, "--model", source, "--lexicon", tmp_path / "lexicon.txt", "--word-bonus", "9")
    assert set(spelled.out.split()) <= {"ah", "bee"}, spelled.err
    assert spelled.out.strip()
    assert_refused(run("transcribe", sound, "--model", source, "--hotword", "XYZ"), "'XYZ' cannot be heard")
    for weight in ("--lm-weight", "--word-bonus"):
        assert_refused(run("transcribe", sound, "--model", source, weight, "1"), "--language-model")


def test_pieces_for_subtitles():
    words = [{"text": "ab", "start": t, "end": t + 0.2, "score": 1.0} for t in (0.0, 0.3, 0.6, 1.5, 1.8, 9.5)]
    heard = ctc.Transcription("", words, [], 10.0)
    assert [s["text"] for s in heard.segments()] == ["ab ab ab", "ab ab", "ab"]
    assert [(s["start"], s["end"]) for s in heard.segments()] == [(0.0, 0.8), (1.5, 2.0), (9.5, 9.7)]
    assert [len(s["words"]) for s in heard.segments(longest=0.5)] == [2, 1, 2, 1]
    assert [len(s["words"]) for s in heard.segments(letters=5)] == [2, 1, 2, 1]
    # A script without spaces: one word, taken apart at a pause and where it is too long.
    starts = zip("abcdefg", (0, 1, 2, 3, 9, 10, 11), strict=True)
    letters = [{"text": x, "start": t, "end": t + 0.1, "score": 1.0} for x, t in starts]
    word = {"text": "abcdefg", "start": 0.0, "end": 11.1, "score": 1.0}
    heard = ctc.Transcription("", [word, words[-1] | {"start": 11.2, "end": 11.5}], letters, 12.0)
    assert [s["text"] for s in heard.segments(pause=2.0)] == ["abcd", "efg ab"]
    assert [s["text"] for s in heard.segments(pause=2.0, letters=3)] == ["abc", "d", "efg", "ab"]
    # As long as it may be, it stays whole.
    assert [s["text"] for s in heard.segments(letters=7, longest=11.1)] == ["abcdefg", "ab"]
    starts = (0.0, 0.5, 1.0)
    words = [{"text": "ab", "start": t, "end": t + 0.25, "score": 1.0} for t in starts]
    heard = ctc.Transcription("", words, [], 10.0)
    assert [s["text"] for s in heard.segments(letters=8, longest=1.25)] == ["ab ab ab"]
    assert [s["text"] for s in heard.segments(pause=0.25)] == ["ab"] * 3
    assert [s["text"] for s in heard.segments(longest=0.125)] == ["ab"] * 3  # no characters are known
    # The next word's first character belongs to that word, wherever this one ends.
    words = [{"text": "abc", "start": 0.0, "end": 3.0}, {"text": "d", "start": 3.0, "end": 4.0}]
    letters = [{"text": x, "start": float(t), "end": t + 1.0} for t, x in enumerate("abcd")]
    assert [s["text"] for s in ctc.Transcription("", words, letters, 4.0).segments(letters=2)] == ["ab", "c", "d"]


def test_align(run, checkpoints, tmp_path):
    source, sound = checkpoints / "ctc", checkpoints / "noise.wav"
    model, processor = audiozoo.load(source), audiozoo.load_processor(source)
    wanted = ctc.align(model, processor, audiozoo.audio.read(sound), "abba cafe")
    shown = run("align", sound, "abba cafe", "--model", source)
    assert shown.code == 0, shown.err
    rows = [line.split("\t") for line in shown.out.splitlines()]
    assert rows[0] == ["start", "end", "score", "text"]
    assert [row[3] for row in rows[1:]] == ["abba", "cafe"]
    assert [float(row[0]) for row in rows[1:]] == [w["start"] for w in wanted]
    (tmp_path / "text.txt").write_text("abba <star> cafe", encoding="utf-8-sig")
    found = json.loads(run("align", sound, "--file", tmp_path / "text.txt", "--model", source, "--format", "json").out)
    assert [w["text"] for w in found["words"]] == ["abba", "cafe"]
    glued = run("align", sound, "abba<star>cafe", "--model", source, "--format", "json").out
    assert json.loads(glued) == found
    assert "-->" in run("align", sound, "abba", "--model", source, "--format", "vtt", "--star").out
    assert_refused(run("align", sound, "--model", source), "either as an argument or with --file")
    assert_refused(run("align", tmp_path / "no.wav", "abba", "--model", source), "no file")
    assert_refused(run("align", sound, "--file", tmp_path / "no.txt", "--model", source), "There is no file")
    assert_refused(run("align", sound, "xyz", "--model", source), "no letter that the model knows")
    assert_refused(run("align", sound, "abba", "--model", checkpoints / "classifier"), "does not align")


@pytest.fixture(scope="module")
def mms(tmp_path_factory):
    """A recogniser of English, with the adapter of a language of other letters."""
    folder = tmp_path_factory.mktemp("languages") / "mms"
    alphabets = {"eng": "ab", "fra": "éèç"}
    vocabularies = {
        language: {token: index for index, token in enumerate([*TOKENS[:5], *letters])}
        for language, letters in alphabets.items()
    }
    for language in ("fra", "eng"):
        config = Wav2Vec2Config(**NETWORK, vocab_size=len(vocabularies[language]), adapter_attn_dim=4)
        model = random_model(lambda rngs: wav2vec2.Wav2Vec2ForCTC(config, rngs=rngs))  # noqa: B023
        if language == "eng":
            audiozoo.export(model, folder)
            break
        values = {n: leaf[...] for n, leaf in variables(model).items() if ".adapter_layer." in n or "lm_head" in n}
        own = dict(conversion.adapter_table().write(values))
    save_file(own, folder / "adapter.fra.safetensors")
    tokenizer = Wav2Vec2CTCTokenizer(vocabularies, target_lang="eng")
    Wav2Vec2Processor(Wav2Vec2FeatureExtractor(), tokenizer).save(folder)
    return folder


def test_languages_of_mms(run, checkpoints, mms):
    """ISO 639-3 codes, which are not Whisper's: adapters, head and letters change together."""
    sound, options = checkpoints / "noise.wav", ("--model", mms)
    english = run("transcribe", sound, *options)
    french = run("transcribe", sound, *options, "--language", "fra")
    assert french.code == 0, french.err
    assert set(english.out) - set(" \n") <= set("ab")
    assert set(french.out) - set(" \n") <= set("éèç")
    assert french.out.strip()
    assert run("align", sound, "éç", *options, "--language", "fra").code == 0
    assert_refused(run("transcribe", sound, *options, "--language", "deu"), "no adapter for 'deu'; it has fra")
    for option in (("--no-condition-on-previous-text",), ("--seed", "1"), ("--no-speech-threshold", "none")):
        assert_refused(run("transcribe", sound, *options, *option), "is Whisper's")


def test_the_command_with_a_model_of_the_hub(checkpoints, mms, tmp_path):
    """As a user runs it, `HF_ENDPOINT` naming the hub: model, tokenizer and adapter, each downloaded once."""
    files, options = (
        {file.name: file.read_bytes() for file in mms.iterdir()},
        ("--model", "zoo/mms", "--language", "fra"),
    )
    environment = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    with HubServer({"zoo/mms": files}) as hub:
        done = subprocess.run(
            [sys.executable, "-m", "audiozoo.cli", "transcribe", checkpoints / "noise.wav", *options],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=environment
            | {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
            | {"PYTHONPATH": str(ROOT), "AUDIOZOO_CACHE": str(tmp_path / "audiozoo"), "JAX_PLATFORMS": "cpu"},
        )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert set(done.stdout) - set(" \n") <= set("éèç")
    downloads = hub.downloads()
    assert len(downloads) == len(set(downloads))
    assert {"config.json", "vocab.json", "model.safetensors", "adapter.fra.safetensors"} <= set(downloads)


def test_align_with_whisper(run, recordings):
    if packaged.TINY_EN.find() is None:
        pytest.skip("the package with the real tiny.en is not installed")
    text = (
        "And so, my fellow Americans, ask not what your country can do for you, ask what you can do for your country."
    )
    arguments = ("align", recordings / "jfk.flac", text, "--model", packaged.whisper())
    words = json.loads(run(*arguments, "--format", "json").out)["words"]
    assert " ".join(word["text"] for word in words) == text
    starts = [word["start"] for word in words]
    assert starts == sorted(starts)
    assert 7 < next(w["start"] for w in words if w["text"] == "ask" and w["start"] > 5) < 9
    assert_refused(run(*arguments, "--star"), "<star> needs a CTC model")


def test_transcribe_where_somebody_is_speaking(run, checkpoints, tmp_path, monkeypatch):
    """Each region as if it were alone, at its own time."""
    monkeypatch.setattr(audiozoo.audio.speech, "silero", lambda: lambda chunk: float(any(chunk)))
    source, sound = checkpoints / "ctc", tmp_path / "pauses.wav"
    model, processor = audiozoo.load(source), audiozoo.load_processor(source)
    noise, quiet = audiozoo.audio.read(checkpoints / "noise.wav"), np.zeros(64_000, np.float32)
    wave = np.concatenate([quiet, noise, quiet, noise[:16_000], quiet])
    soundfile.write(sound, wave, 16_000, subtype="FLOAT")
    regions = audiozoo.audio.speech_regions(wave)
    parts = [ctc.transcribe_ctc(model, processor, wave[round(a * 16_000) : round(b * 16_000)]) for a, b in regions]
    assert [bool(part.words) for part in parts] == [True, True]
    arguments = ("transcribe", sound, "--model", source, "--vad", "--format", "json", "--word-timestamps")
    found = json.loads(run(*arguments).out)
    words = [word for segment in found["segments"] for word in segment["words"]]
    assert found["text"] == " ".join(part.text for part in parts)
    assert [word["word"] for word in words] == [word["text"] for part in parts for word in part.words]
    for edge in ("start", "end"):
        times = [at + word[edge] for (at, _), part in zip(regions, parts, strict=True) for word in part.words]
        assert [word[edge] for word in words] == pytest.approx(times, abs=1e-3)
    seen = []
    ctc.transcribe_ctc(model, processor, wave, vad={"min_speech_s": 1.5}, progress=lambda *now: seen.append(now))
    assert seen == [(1, 1)]
    soundfile.write(sound, quiet, 16_000)
    assert json.loads(run(*arguments).out) == {"text": "", "segments": [], "language": None}


def test_identify(run, checkpoints, tmp_path):
    source, sound = checkpoints / "classifier", checkpoints / "noise.wav"
    wanted = encoders.identify(audiozoo.load(source), audiozoo.load_processor(source), audiozoo.audio.read(sound))
    found = json.loads(run("identify", sound, "--model", source, "--json").out)
    assert [entry["label"] for entry in found] == [label for label, _ in wanted]
    assert found[0]["probability"] == pytest.approx(wanted[0][1], abs=1e-5)
    piped = run("identify", "-", "--model", source, "--json", stdin=sound.read_bytes())
    assert json.loads(piped.out) == found
    shown = run("identify", sound, "--model", source, "--top", "1")
    assert shown.out.strip().endswith(wanted[0][0])
    assert_refused(run("identify", sound, "--model", checkpoints / "ctc"), "does not identify")
    soundfile.write(tmp_path / "one.wav", np.zeros(1), 16_000)
    assert_refused(run("identify", tmp_path / "one.wav", "--model", source), "audiozoo: The waveform is too short")
    pieces = ("identify", sound, "--model", source, "--crops", "3", "--crop-length")
    model, processor = audiozoo.load(source), audiozoo.load_processor(source)
    wave = audiozoo.audio.read(sound)
    heard = [dict(encoders.identify(model, processor, wave[at : at + 8_000])) for at in (0, 12_000, 24_000)]
    mean = {label: np.exp(np.mean([np.log(one[label]) for one in heard])) for label in heard[0]}  # of logits
    found = {entry["label"]: entry["probability"] for entry in json.loads(run(*pieces, "0.5", "--json").out)}
    assert found == pytest.approx({label: p / sum(mean.values()) for label, p in mean.items()}, abs=1e-5)
    for seconds in ("0", "-1", "0.02"):
        assert_refused(run(*pieces, seconds), "too short for one frame")
    assert_refused(run(*pieces, "inf"), "have no end")
    assert_refused(run(*pieces[:4], "--crop-length", "2"), "say how many")


def test_whispers_classifier_hears_windows(run, tmp_path):
    """Those that cover the recording, and what is shorter with silence behind it."""
    config = dataclasses.replace(tiny_whisper.TINY, max_source_positions=50, id2label=("en", "fr", "de"))
    model = tiny_whisper.build("WhisperForAudioClassification", config)
    extractor = WhisperFeatureExtractor(feature_size=8, chunk_length=1)
    folder, sound = tmp_path / "listener", tmp_path / "noise.wav"
    audiozoo.export(model, folder)
    extractor.save(folder)
    wave = np.random.default_rng(0).standard_normal(40_000).astype(np.float32) * np.linspace(0.01, 0.3, 40_000)
    command = ("identify", sound, "--model", folder)

    def logits(first: float, seconds: float) -> np.ndarray:
        window = wave[int(first * 16_000) :][: int(seconds * 16_000)].astype(np.float32)
        return np.asarray(model(extractor(window, sampling_rate=16_000)["input_features"]).logits[0])

    for seconds, windows, options in (
        (2.5, [(0, 1), (1, 1), (1.5, 1)], ()),
        (1.0, [(0, 1)], ()),
        (0.3, [(0, 0.3)], ()),
        (2.5, [(0, 0.5), (1, 0.5), (2, 0.5)], ("--crops", "3", "--crop-length", "0.5")),
    ):
        soundfile.write(sound, wave[: int(seconds * 16_000)], 16_000, subtype="FLOAT")
        found = json.loads(run(*command, *options, "--json").out)
        wanted = jax.nn.softmax(np.mean([logits(*window) for window in windows], axis=0))
        said = {row["label"]: row["probability"] for row in found}
        assert said == pytest.approx(dict(zip(config.id2label, wanted.tolist(), strict=True)), abs=2e-5)
    assert_refused(run(*command, "--crops", "3", "--crop-length", "0.02"), "too short for one frame")
    assert_refused(run("classify", sound, "--model", folder), "whose classes audiozoo identify tells")
    item = Item("noise", sound, fields={"label": "fr"})
    scores = evaluate(model, extractor, [item], "classification").predictions[0]["scores"]
    assert scores == pytest.approx(dict(encoders.identify(model, extractor, audiozoo.audio.read(sound))), abs=2e-5)


def test_whisper_identifies_languages(run, checkpoints, monkeypatch):
    if packaged.TINY_EN.find() is None:
        pytest.skip("the package with the real tiny.en is not installed")
    sound = checkpoints / "noise.wav"
    command = ("identify", sound, "--model", packaged.whisper(), "--top", "2")
    assert_refused(run(*command), "This model is English-only")
    assert_refused(run(*command, "--crops", "2"), "leave --crops out")
    monkeypatch.setattr(long_form, "detect_language", lambda *_: {"de": 0.2, "en": 0.7, "fr": 0.1})
    assert run(*command).out.split("\n") == [" 70.0 %  en", " 20.0 %  de", ""]


def test_long_recordings_are_heard_in_pieces(checkpoints, monkeypatch):
    """The Transformer's input depends on a neighbourhood alone: in pieces it is the same. Logits are averaged."""
    wave, processor = audiozoo.audio.read(checkpoints / "noise.wav"), audiozoo.load_processor(checkpoints / "ctc")
    encoder, classifier = (audiozoo.load(checkpoints / name) for name in ("hubert", "classifier"))
    whole = encoders.embed(encoder, processor, wave, layer=0)
    halves = [dict(encoders.identify(classifier, processor, half)) for half in np.split(wave, 2)]
    monkeypatch.setattr(encoders, "LONGEST_S", 1.0)
    short = {"chunk_length_s": 0.8, "stride_length_s": 0.2, "batch_size": 2}
    monkeypatch.setattr(encoders, "in_pieces", functools.partial(encoders.in_pieces, **short))
    pieces = encoders.embed(encoder, processor, wave, layer=0)
    np.testing.assert_allclose(pieces["frames"], whole["frames"], atol=1e-4)
    np.testing.assert_array_equal(pieces["times"], whole["times"])
    found = dict(encoders.identify(classifier, processor, wave))
    wanted = {label: np.sqrt(halves[0][label] * halves[1][label]) for label in found}
    total = sum(wanted.values())
    assert found == pytest.approx({label: value / total for label, value in wanted.items()}, rel=1e-4)


def test_units(run, checkpoints, tmp_path):
    source, sound = checkpoints / "hubert", checkpoints / "noise.wav"
    kmeans = KMeans(np.random.default_rng(0).standard_normal((5, 16)).astype(np.float32))
    kmeans.save(tmp_path / "km.npz")
    wave = audiozoo.audio.read(sound)
    wanted = units(audiozoo.load(source), audiozoo.load_processor(source), wave, kmeans, layer=1)
    options = ("--clusters", tmp_path / "km.npz", "--model", source, "--layer", "1")
    every = run("units", sound, *options, "--every-frame")
    assert every.code == 0, every.err
    assert every.out.split() == [str(unit) for unit in wanted]
    merged = json.loads(run("units", sound, *options, "--json").out)
    found, frames = deduplicate(wanted)
    assert merged == {"units": found.tolist(), "frames": frames.tolist()}
    assert_refused(run("units", sound, "--clusters", tmp_path / "no.npz", "--model", source), "no file")
    narrow = KMeans(np.ones((5, 3), np.float32))
    narrow.save(tmp_path / "narrow.npz")
    options = ("--model", source, "--layer", "1", "--clusters", tmp_path / "narrow.npz")
    assert_refused(run("units", sound, *options), "frames of 3 channels; these have 16")
    (tmp_path / "text.bin").write_text("no pickle")
    assert_refused(
        run("units", sound, "--model", source, "--clusters", tmp_path / "text.bin"), "no uncompressed joblib"
    )


def test_the_family_speaks_the_same_commands(run, checkpoints, tmp_path):
    """WavLM's speaker vectors, SEW's squeezed frames."""
    sound, processor = checkpoints / "noise.wav", audiozoo.load_processor(checkpoints / "ctc")
    small = {"tdnn_dim": (8,) * 5, "xvector_output_dim": 6}
    squeezed = NETWORK | {"conv_dim": (8,) * 13, "feat_extract_norm": "group", "conv_bias": False}
    models = {
        "wavlm": random_model(lambda rngs: wavlm.WavLMForXVector(wavlm.WavLMConfig(**NETWORK, **small), rngs=rngs)),
        "sew": random_model(lambda rngs: sew.SEWModel(sew.SEWConfig(**squeezed), rngs=rngs)),
    }
    for name, model in models.items():
        audiozoo.export(model, tmp_path / name)
        processor.save(tmp_path / name)
        out = tmp_path / f"{name}.npz"
        shown = run("embed", sound, "--model", tmp_path / name, "-o", out)
        assert shown.code == 0, shown.err
        with np.load(out) as kept:
            vector = "embedding" if name == "wavlm" else "mean"
            np.testing.assert_array_equal(kept["embeddings"][0], kept[vector])
            assert kept["frames"].shape == ((99 if name == "wavlm" else 49), 16)
            assert len(kept["times"]) == len(kept["frames"])
            np.testing.assert_allclose(np.diff(kept["times"]), 0.02 if name == "wavlm" else 0.04)
    layer = json.loads(run("embed", sound, "--layer", "0", "--model", tmp_path / "wavlm").out)["embedding"]
    wanted = encoders.embed(audiozoo.load(tmp_path / "wavlm"), processor, audiozoo.audio.read(sound), layer=0)["mean"]
    np.testing.assert_allclose(layer, wanted, atol=1e-5)  # not the speaker's vector, which is of no layer
    assert_refused(run("embed", sound, "--text", "a dog", "--model", tmp_path / "sew"), "no --text")
    assert_refused(run("embed", sound, "--layer", "5", "--model", tmp_path / "sew"), "no layer 5")
    soundfile.write(tmp_path / "short.wav", np.ones(4000) * 0.1, 16_000)
    short = run("embed", tmp_path / "short.wav", "--model", tmp_path / "wavlm")
    assert_refused(short, "has 12 frames, and WavLMForXVector needs 16")
