"""`audiozoo evaluate`: every task with a tiny model, the real tiny.en on real speech, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import sys

import jax
import numpy as np
import pytest
import soundfile

import audiozoo
from audiozoo import cli, packaged
from audiozoo.codec import compress, decompress
from audiozoo.commands import terminal
from audiozoo.decoding import ctc
from audiozoo.decoding.encoders import embed, identify
from audiozoo.decoding.pieces import write_pieces
from audiozoo.decoding.units import KMeans
from audiozoo.errors import AudioError, SourceError, UsageError
from audiozoo.evaluation import TASKS, evaluate, task_for
from audiozoo.evaluation.tasks import mel_distance, normaliser
from audiozoo.models import audio_spectrogram_transformer as ast
from audiozoo.models import clap, musicgen, wav2vec2
from audiozoo.models.seamless_m4t import SeamlessM4TForSpeechToSpeech
from audiozoo.processors.seamless_m4t import SeamlessM4TFeatureExtractor
from audiozoo.training import metrics
from audiozoo.training.data import find_items
from tests.models import test_seamless_m4t as seamless
from tests.models.random_model import random_model
from tests.training import tiny

SPEAKERS = ("ann", "ann", "ben", "ben")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Four sounds of 0.6 s, and a file that is none."""
    root = tmp_path_factory.mktemp("evaluation")
    time, rows = np.arange(9600) / 16_000, []
    for index, speaker in enumerate(SPEAKERS):
        noise = np.random.default_rng(index).normal(0, 0.05, len(time))
        sound = 0.4 * np.sin(2 * np.pi * (200 + 150 * index) * time) + noise
        soundfile.write(root / f"{index}.wav", sound.astype(np.float32), 16_000)
        label = "high" if index > 1 else "low"
        rows.append({"audio": f"{index}.wav", "text": f"sound {index}", "label": label, "speaker": speaker})
    (root / "set.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (root / "broken.wav").write_bytes(b"no sound")
    return root / "set.jsonl"


@pytest.fixture(scope="module")
def items(corpus):
    return find_items(corpus)


@pytest.fixture(scope="module")
def waves(items):
    return [audiozoo.audio.read(item.audio) for item in items]


@pytest.fixture(scope="module")
def letters():
    return tiny.family("wav2vec2", "Wav2Vec2ForCTC")


def with_fields(items, values, name):
    return [dataclasses.replace(i, fields={name: v}) for i, v in zip(items, values, strict=True)]


# --- each task -------------------------------------------------------------------------------------------------------


def test_transcription_counts_what_the_model_gets_wrong(items, waves, letters, corpus):
    said = [ctc.transcribe_ctc(letters, tiny.PROCESSOR, wave).text for wave in waves]
    assert any(said)
    own = evaluate(letters, tiny.PROCESSOR, with_fields(items, said, "text")[:1], normalise="none")
    assert (own.task, own.metrics["wer"], own.metrics["cer"]) == ("transcription", 0.0, 0.0)
    seen = []
    broken = dataclasses.replace(items[0], name="broken.wav", audio=corpus.parent / "broken.wav")
    result = evaluate(
        letters, tiny.PROCESSOR, [*items, broken], batch_size=2, normalise="none", progress=lambda *a: seen.append(a)
    )
    expected = metrics.error_rates([item.fields["text"] for item in items], said)
    assert result.metrics == expected
    assert [row["hypothesis"] for row in result.predictions] == said
    assert result.predictions[1]["wer"] == pytest.approx(metrics.error_rates(["sound 1"], [said[1]])["wer"], abs=1e-4)
    assert (result.count, list(result.unreadable), seen[-1]) == (4, ["broken.wav"], (5, 5))
    assert "not a sound file" in result.unreadable["broken.wav"]
    assert evaluate(letters, tiny.PROCESSOR, items, limit=1).count == 1


def test_the_others_of_a_batch_are_heard_without_one_that_is_too_short(items, letters, corpus):
    soundfile.write(corpus.parent / "short.wav", np.zeros(100), 16_000)
    short = dataclasses.replace(items[0], name="short.wav", audio=corpus.parent / "short.wav")
    with_it = evaluate(letters, tiny.PROCESSOR, [items[0], short, *items[1:]], batch_size=5, normalise="none")
    without = evaluate(letters, tiny.PROCESSOR, items, batch_size=5, normalise="none")
    assert with_it.predictions == without.predictions
    assert list(with_it.unreadable) == ["short.wav"]


def test_normalisation_is_whispers(items, letters, monkeypatch):
    heard = {"1": "the colour is thirty one", "2": "Größe"}
    monkeypatch.setattr(
        "audiozoo.evaluation.tasks._written", lambda *a, **k: [(text, k["language"]) for text in heard.values()]
    )
    pair = with_fields(items[:2], ["The color is 31.", "größe!"], "text")
    rates = {
        name: evaluate(letters, tiny.PROCESSOR, pair, normalise=name, language=language).metrics["wer"]
        for name, language in (("none", None), ("basic", None), ("english", "de"), (None, "en"), (None, "de"))
    }
    assert rates.pop(None) == rates["basic"] == 3 / 5  # of German: letters' case and marks only
    assert rates["none"] == 1.0
    assert rates["english"] == 0.0
    assert evaluate(letters, tiny.PROCESSOR, pair, language="en").metrics["wer"] == 0.0
    several = [(heard["1"], "en"), (heard["2"], "de")]  # found by the model, each its own
    monkeypatch.setattr("audiozoo.evaluation.tasks._written", lambda *a, **k: several)
    assert evaluate(letters, tiny.PROCESSOR, pair).metrics["wer"] == 0.0
    assert {normaliser("basic", name)("你好").strip() for name in ("zh", "Chinese", "cmn", "cmn_Hant")} == {"你 好"}


class Words:
    """A tokenizer of letters, and a processor around S2T's features."""

    def __init__(self, extractor):
        self.feature_extractor = extractor

    def __call__(self, waves, sampling_rate, **options):
        return self.feature_extractor(waves, sampling_rate, **options)

    def decode(self, ids, skip_special_tokens=True):
        return " ".join(str(i) for i in ids if i > 3)


def test_translation(items, waves):
    model, processor = tiny.s2t_model()
    words = Words(processor.feature_extractor)
    options = {"max_new_tokens": 6, "num_beams": 2}
    said = [write_pieces(model, words, wave, batch_invariant=True, **options)["text"] for wave in waves]
    wanted = with_fields(items, [*said[:3], "4 5 6 7 8"], "translation")
    result = evaluate(model, words, wanted, beams=2, generate={"max_new_tokens": 6})
    assert result.task == "translation"
    assert result.metrics == metrics.translation_scores([i.fields["translation"] for i in wanted], said)
    assert task_for(model, items).name == "transcription"
    with pytest.raises(UsageError, match="no tokenizer 'xx'"):
        evaluate(model, words, wanted, tokenize="xx")
    with pytest.raises(UsageError, match="leave the normalisation out"):
        evaluate(model, words, wanted, normalise="basic")


def test_a_translator_that_speaks_is_asked_for_text(items, waves):
    model, words = seamless.make(SeamlessM4TForSpeechToSpeech), Words(SeamlessM4TFeatureExtractor())
    model.generation_config = dataclasses.replace(seamless.TABLES, vocoder_lang_code_to_id=())
    x = words(waves[:1], 16_000, pad_to_multiple_of=256)
    options = {"attention_mask": x.pop("attention_mask"), "batch_invariant": True}
    said = words.decode(model.generate_text("spa", **x, **options).sequences[0])
    wanted = with_fields(items[:1], [said], "translation")
    for chosen in ({"language": "spa"}, {"generate": {"tgt_lang": "spa"}}):
        assert evaluate(model, words, wanted, **chosen).predictions[0]["hypothesis"] == said
    for chosen, match in (
        ({}, "The model writes many languages; say which with language"),
        ({"source": "m4t/"}, "m4t/ writes many languages; say which with --language"),
        ({"language": "spanish"}, "does not write 'spanish'; it has"),
    ):
        with pytest.raises(UsageError, match=match):
            evaluate(model, words, with_fields(items, ["a"] * 4, "translation"), **chosen)


def test_classification(items, waves):
    model = tiny.family("wav2vec2", "Wav2Vec2ForSequenceClassification")
    result = evaluate(model, tiny.PROCESSOR, items, "classification")
    found = [dict(identify(model, tiny.PROCESSOR, wave)) for wave in waves]
    right = [max(f, key=f.get) == item.fields["label"] for f, item in zip(found, items, strict=True)]
    scores = np.asarray([[f["high"], f["low"]] for f in found])
    targets = np.asarray([[i.fields["label"] == name for name in ("high", "low")] for i in items])
    assert result.metrics["accuracy"] == np.mean(right)
    assert result.metrics["map"] == pytest.approx(metrics.mean_average_precision(targets, scores))
    assert result.predictions[0]["scores"] == pytest.approx(found[0], abs=1e-5)
    many = TASKS["classification"](model, tiny.PROCESSOR)
    many._names = list("abcdef")
    rows = [{"label": label, "_scores": -np.arange(6.0)} for label in "aef"]
    assert (many.score(rows)["accuracy"], many.score(rows)["top5"]) == (1 / 3, 2 / 3)
    with pytest.raises(UsageError, match="no label 'dog'"):
        evaluate(model, tiny.PROCESSOR, with_fields(items, ["dog"] * 4, "label"))
    with pytest.raises(UsageError, match="2 classes, and the model chooses one"):
        evaluate(model, tiny.PROCESSOR, with_fields(items, ["high,low"] * 4, "label"))


def test_tagging(items, waves):
    model, processor = tiny.ast_model()
    assert task_for(model, items).name == "classification"
    config = dataclasses.replace(model.config, problem_type="multi_label_classification")
    model = random_model(lambda rngs: ast.ASTForAudioClassification(config, rngs=rngs))
    tags = [["high", "low"], "high,low", "low", "high"]
    result = evaluate(model, processor, with_fields(items, tags, "labels"))
    found = [dict(ast.classify(model, processor, wave)) for wave in waves]
    scores = np.asarray([[f["high"], f["low"]] for f in found])
    targets = np.asarray([[1, 1], [1, 1], [0, 1], [1, 0]])
    assert (result.task, set(result.metrics)) == ("tagging", {"map"})
    assert result.metrics["map"] == pytest.approx(metrics.mean_average_precision(targets, scores))
    with pytest.raises(UsageError, match="and ASTForAudioClassification the whole"):
        evaluate(model, processor, with_fields(items, tags, "labels"), crops=3)


def test_sounds_and_words(items):
    model, processor = tiny.clap_model()
    rate = processor.feature_extractor.sampling_rate
    waves = [audiozoo.audio.read(item.audio, rate) for item in items]
    found = evaluate(model, processor, items, "zero-shot")
    chosen = [clap.zero_shot(model, processor, w, ["high", "low"], sampling_rate=rate)[0] for w in waves]
    assert found.metrics["accuracy"] == np.mean([c[0] == i.fields["label"] for c, i in zip(chosen, items, strict=True)])
    assert found.predictions[0]["scores"][chosen[0][0]] == pytest.approx(chosen[0][1], abs=1e-5)
    with pytest.raises(UsageError, match=r"no \{\} where"):
        evaluate(model, processor, items, "zero-shot", template="a sound")
    with pytest.raises(UsageError, match="no label 'high'"):
        evaluate(model, processor, items, "zero-shot", labels=["low"])
    result = evaluate(model, processor, items)
    sounds = np.stack([clap.embed_audio(model, processor, w, sampling_rate=rate) for w in waves])
    words = clap.embed_text(model, processor, [i.fields["text"] for i in items])
    ranks = (-(words @ sounds.T)).argsort(axis=1)
    assert result.task == "retrieval"
    assert result.metrics["text_to_audio_recall@1"] == np.mean(ranks[:, 0] == np.arange(4))
    assert result.metrics["audio_to_text_recall@1"] == np.mean((sounds @ words.T).argmax(axis=1) == np.arange(4))
    assert result.metrics["audio_to_text_recall@5"] == 1.0
    captions = [["a hum"], ["a bell", "bells", "owls"], ["sound 2", "sound 3"], ["sound 1"]]
    result = evaluate(model, processor, with_fields(items, captions, "captions"))
    words = clap.embed_text(model, processor, [text for texts in captions for text in texts])
    owners = np.asarray([0, 1, 1, 1, 2, 2, 3])
    assert result.metrics["text_to_audio_recall@1"] == np.mean((words @ sounds.T).argmax(axis=1) == owners)
    assert result.metrics["audio_to_text_recall@1"] == np.mean(
        owners[(sounds @ words.T).argmax(axis=1)] == np.arange(4)
    )


def test_verification(items, waves, tmp_path):
    config = {name: value for name, value in tiny.SPEECH.items() if name not in ("vocab_size", "id2label")}
    config |= {"tdnn_dim": (8, 8), "tdnn_kernel": (3, 1), "tdnn_dilation": (1, 1), "xvector_output_dim": 8}
    config = wav2vec2.Wav2Vec2Config(**config)
    model = random_model(lambda rngs: wav2vec2.Wav2Vec2ForXVector(config, rngs=rngs))
    result = evaluate(model, tiny.PROCESSOR, items)
    vectors = [embed(model, tiny.PROCESSOR, wave)["embedding"] for wave in waves]
    pairs = [(a, b) for a in range(4) for b in range(a + 1, 4)]
    cosines = [
        float(vectors[a] @ vectors[b] / np.linalg.norm(vectors[a]) / np.linalg.norm(vectors[b])) for a, b in pairs
    ]
    same = np.asarray([SPEAKERS[a] == SPEAKERS[b] for a, b in pairs])
    assert result.metrics["eer"] == metrics.equal_error_rate(same, np.asarray(cosines))[0]
    assert [row["score"] for row in result.predictions] == pytest.approx(cosines, abs=1e-5)
    assert TASKS["verification"].fits(type("WavLMForSpeakerVerification", (), {})())
    (tmp_path / "trials.txt").write_text("1 0.wav 1.wav\n0 0.wav 3.wav\n")
    tried = evaluate(model, tiny.PROCESSOR, items, trials=tmp_path / "trials.txt")
    assert [row["score"] for row in tried.predictions] == pytest.approx([cosines[0], cosines[2]], abs=1e-5)
    twins = [dataclasses.replace(items[0], name=f"{speaker}/again.wav") for speaker in SPEAKERS[1:3]]
    for text, match in (
        ("1 0.wav\n", "is no trial"),
        ("1 0.wav 9.wav\n", "9.wav, which is not among"),
        ("\n", "no trial"),
        ("1 again.wav 0.wav\n", "again.wav, which several recordings are called"),
    ):
        (tmp_path / "trials.txt").write_text(text)
        with pytest.raises(UsageError, match=match):
            evaluate(model, tiny.PROCESSOR, [*items, *twins], trials=tmp_path / "trials.txt")
    # A recording of fewer frames than the vectors need is left out.
    soundfile.write(tmp_path / "short.wav", waves[0][:500], 16_000)
    short = dataclasses.replace(items[0], name="short.wav", audio=tmp_path / "short.wav")
    found = evaluate(model, tiny.PROCESSOR, [*items, short])
    assert (found.metrics["eer"], list(found.unreadable)) == (result.metrics["eer"], ["short.wav"])


def test_silence_has_no_ratio_to_noise():
    model, processor = tiny.encodec_model()
    rows = [{"si_snr": ratio, "seconds": 0.5, "bytes": 100, "mel_distance": 1.0} for ratio in (np.nan, 4.0, 6.0)]
    score = TASKS["coding"](model, processor).score
    assert score(rows) == {"si_snr": 5.0, "kbps": pytest.approx(1.6), "mel_distance": 1.0}
    assert np.isnan(score(rows[:1])["si_snr"])


@pytest.mark.slow
def test_coding_and_vocoding(items):
    model, processor = tiny.encodec_model()
    result = evaluate(model, processor, items, bandwidth=3.2)
    ratios, sizes = [], 0
    for item, row in zip(items, result.predictions, strict=True):
        wave = audiozoo.audio.read(item.audio, 800)
        content = compress(model, wave[None], 3.2)
        ratios.append(metrics.si_snr(wave[None], decompress(content, model)))
        sizes += len(content)
        assert row["bytes"] == len(content)
    assert result.metrics["si_snr"] == pytest.approx(np.mean(ratios), abs=1e-3)
    assert result.metrics["kbps"] == pytest.approx(sizes * 8 / 1000 / 2.4, rel=1e-6)
    with pytest.raises(UsageError, match="kbit/s"):
        evaluate(model, processor, items, bandwidth=100.0)
    wave = audiozoo.audio.read(items[0].audio, 8000)
    assert mel_distance(wave, wave, 8000) == 0.0
    noise = np.random.default_rng(0).normal(0, 0.1, 30_000)
    assert mel_distance(noise, np.e * noise, 24_000) == pytest.approx(1.0, abs=1e-3)  # of natural logarithms
    model, processor = tiny.hifigan_model()
    result = evaluate(model, processor, items[:2])
    made = np.asarray(model(processor(wave, 8000)["spectrogram"]))[0]
    length = min(len(made), len(wave))
    assert result.task == "vocoding"
    expected = mel_distance(wave[:length], made[:length], 8000)
    assert result.predictions[0]["mel_distance"] == pytest.approx(expected, rel=1e-3)


def test_synthesis_is_what_the_judge_hears(items, letters):
    model, processor = tiny.vits_model()
    result = evaluate(
        model, processor, with_fields(items[:2], ["a bell", "owl"], "text"), judge=(letters, tiny.PROCESSOR), seed=1
    )
    again = evaluate(
        model, processor, with_fields(items[:2], ["a bell", "owl"], "text"), judge=(letters, tiny.PROCESSOR), seed=1
    )
    assert result.task == "synthesis"
    assert result.predictions == again.predictions
    assert result.metrics["words"] == 3
    assert all(row["seconds"] > 0 for row in result.predictions)
    with pytest.raises(UsageError, match="'vocal' is no option of synthesis"):
        evaluate(model, processor, items, vocal=1)
    with pytest.raises(UsageError, match="'width' is no option of the decoding of a VitsModel"):
        evaluate(model, processor, items, generate={"width": 2, "seed": 1}, judge=(letters, tiny.PROCESSOR))


def test_composition_is_how_well_the_music_fits_the_words(items):
    """The score of music that is the text's own embedding, or its opposite."""
    from types import SimpleNamespace

    matcher, processor = tiny.clap_model()
    rate = processor.feature_extractor.sampling_rate
    model = type("MusicgenForConditionalGeneration", (), {})()
    model.audio_encoder, model.config = None, SimpleNamespace(audio_encoder=SimpleNamespace(sampling_rate=rate))
    sound = audiozoo.audio.read(items[0].audio, rate)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(musicgen, "compose", lambda *a, **k: np.stack([sound, sound]))
        result = evaluate(model, None, items[:2], judge=(matcher, processor))
    words = clap.embed_text(matcher, processor, ["sound 0", "sound 1"])
    fits = words @ clap.embed_audio(matcher, processor, sound, sampling_rate=rate)
    assert [row["clap"] for row in result.predictions] == pytest.approx(fits.tolist(), abs=1e-5)
    assert result.metrics["clap"] == pytest.approx(float(fits.mean()), abs=1e-5)


def test_alignment_and_units(items, waves, letters):
    texts = ["a low hum", "high bells"]
    words = [ctc.align(letters, tiny.PROCESSOR, w, text) for w, text in zip(waves, texts, strict=False)]
    late = [
        [{"text": w["text"], "start": w["start"] + 0.06, "end": w["end"] + 0.06} for w in sentence]
        for sentence in words
    ]
    result = evaluate(letters, tiny.PROCESSOR, with_fields(items[:2], late, "words"))
    assert result.task == "alignment"
    assert result.metrics["boundary_error"] == pytest.approx(0.06)
    assert (result.metrics["within_50ms"], result.metrics["within_100ms"]) == (0.0, 1.0)
    rows = [{"_off": np.asarray([1.05 - 1.0, 0.1, 0.3])}]  # the first is 0.05 and a rounding
    assert TASKS["alignment"](letters, tiny.PROCESSOR).score(rows) == {
        "boundary_error": pytest.approx(0.15),
        "median_boundary_error": 0.1,
        "within_50ms": 1 / 3,
        "within_100ms": 2 / 3,
        "within_200ms": 2 / 3,
    }
    with pytest.raises(UsageError, match="no list of objects with text, start and end"):
        evaluate(letters, tiny.PROCESSOR, with_fields(items, ["a"] * 4, "words"), "alignment")

    frames = embed(letters, tiny.PROCESSOR, waves[0], layer=1)
    clusters = KMeans.fit(jax.random.key(0), frames["frames"], 3, iterations=3)
    units, times = clusters(frames["frames"]), frames["times"]
    edge = float(times[1])
    phones = [{"text": str(u), "start": float(t), "end": float(t) + edge} for u, t in zip(units, times, strict=True)]
    marked = with_fields(items[:1], [phones[:-1]], "phones")
    result = evaluate(letters, tiny.PROCESSOR, marked, clusters=clusters, layer=1)
    assert result.task == "units"
    assert result.metrics["frames"] == len(units) - 1  # the last one is in no phone
    assert result.metrics["phone_purity"] == pytest.approx(1)
    assert result.metrics["pnmi"] == pytest.approx(1)
    with pytest.raises(UsageError, match="give the clusters"):
        evaluate(letters, tiny.PROCESSOR, marked)


def test_what_cannot_be_measured_says_so(items, letters, corpus):
    model, processor = tiny.encodec_model()
    for match, call in {
        "There is no task 'singing'; there are translation": lambda: task_for(letters, items, "singing"),
        "A Wav2Vec2ForCTC does no coding; it does transcription": lambda: task_for(letters, items, "coding"),
        "A object does nothing that is measured here": lambda: task_for(object(), items),
        "Nothing is known of the recordings": lambda: task_for(letters, with_fields(items, ["x"] * 4, "mood")),
        "0.wav has no text, which transcription": lambda: evaluate(
            letters, tiny.PROCESSOR, with_fields(items, ["x"] * 4, "mood"), "transcription"
        ),
        "At least one recording": lambda: evaluate(letters, tiny.PROCESSOR, items, limit=0),
        "'width' is no option of the decoding of a Wav2Vec2ForCTC": lambda: evaluate(
            letters, tiny.PROCESSOR, items[:1], generate={"width": 2}
        ),
        "no normalisation 'french'": lambda: evaluate(letters, tiny.PROCESSOR, items, normalise="french"),
    }.items():
        with pytest.raises(UsageError, match=match):
            call()
    broken = [dataclasses.replace(items[0], audio=corpus.parent / "broken.wav")]
    with pytest.raises(AudioError, match="Of 1 recordings none can be heard"):
        evaluate(model, processor, broken)
    assert len(TASKS) == 13


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def command(monkeypatch, capsys):
    monkeypatch.setattr(terminal, "keep_compiled_programs", lambda: None)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["audiozoo", "evaluate", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
        return code, *capsys.readouterr()

    return run


def test_the_command_measures_a_directory(command, corpus, items, tmp_path, letters):
    letters_directory = tmp_path / "model"
    tiny.PROCESSOR.save(tmp_path)
    files = [path for path in tmp_path.iterdir() if path.name != "config.json"]
    audiozoo.loading.save(letters, letters_directory, files=files)
    out = tmp_path / "predictions.jsonl"
    code, text, messages = command(letters_directory, "--data", corpus, "-o", out, "--beams", 2)
    assert code == 0, messages
    assert "transcription" in text
    assert "wer" in text
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [row["reference"] for row in rows] == [item.fields["text"] for item in items]
    for arguments, word in (
        (("--data", tmp_path / "none.jsonl"), "There is no folder"),
        (("--data", corpus, "--task", "coding"), "does no coding"),
        (("--data", corpus, "-o", tmp_path / "no" / "where.jsonl"), "cannot be written"),
        (("--data", corpus, "--dtype", "int8"), "no dtype"),
        (("--data", corpus, "--bandwidth", 6), "'bandwidth' is no option of transcription"),
        (("--data", corpus, "--clusters", tmp_path / "km.npz"), "There is no file"),
        (("--data", corpus, "--vocoder", "x"), "are for SpeechT5"),
        (("--data", corpus, "--set", "beams"), "write NAME=VALUE"),
    ):
        code, text, messages = command(letters_directory, *arguments)
        assert (code, text) == (1, ""), messages
        assert word in " ".join(messages.split())
        assert len(messages.strip().splitlines()) == 1


def test_a_list_of_sentences(tmp_path):
    from audiozoo.commands.evaluation import _items

    (tmp_path / "lines.txt").write_text("a bell\n\nan\u2028owl\n", encoding="utf-8")
    assert [item.fields["text"] for item in _items(str(tmp_path / "lines.txt"))] == ["a bell", "an\u2028owl"]
    (tmp_path / "lines.txt").write_text("\n")
    with pytest.raises(SourceError, match="holds no text"):
        _items(str(tmp_path / "lines.txt"))
    (tmp_path / "lines.txt").write_bytes(b"\xff")
    with pytest.raises(UsageError, match="UTF-8"):
        _items(str(tmp_path / "lines.txt"))


SENTENCES = {
    "jfk.flac": "And so, my fellow Americans: ask not what your country can do for you - ask what you can do for your "
    "country.",
    "LJ050-0131.wav": "unless a system is established for the frequent formal review of activities thereunder. in this "
    "regard",
    "nabucasa_en_US-kathleen.mp3": "Author of the danger trail, Philip Steels, etc.",
    "fsdd_7_jackson_0.wav": "seven",
}


@pytest.mark.slow
def test_the_real_tiny_en_on_real_speech(command, recordings, tmp_path):
    """Its errors are known: "there under", "steals" and "heaven", 4 of 47 words; one file is damaged."""
    if packaged.TINY_EN.find() is None:
        pytest.skip("the packages of the extra `demo` are not installed")
    rows = [{"audio": str(recordings / name), "text": text} for name, text in SENTENCES.items()]
    (tmp_path / "broken.wav").write_bytes(b"no sound")
    data = tmp_path / "set.jsonl"
    data.write_text("\n".join(map(json.dumps, [*rows, {"audio": "broken.wav", "text": "nothing"}])))
    out = tmp_path / "predictions.jsonl"
    code, text, messages = command(packaged.whisper(), "--data", data, "--json", "-o", out)
    assert code == 0, messages
    result = json.loads(text)
    assert (result["task"], result["recordings"]) == ("transcription", 4)
    assert result["metrics"]["wer"] == pytest.approx(4 / 47)
    assert result["metrics"]["cer"] < 0.04
    assert list(result["unreadable"]) == [str(tmp_path / "broken.wav")]
    assert "1 of 5 recordings were left out" in messages
    wrong = [json.loads(line)["wer"] for line in out.read_text(encoding="utf-8").splitlines()]
    assert wrong == [0.0, 0.125, 0.125, 1.0]
