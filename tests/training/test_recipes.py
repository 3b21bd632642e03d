"""Every recipe: a whole small run; its numbers; and what the command line makes of it."""

import dataclasses
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import soundfile
from flax import nnx
from typer.testing import CliRunner

import audiozoo
from audiozoo.cli import app
from audiozoo.decoding.windows import TranscriptionOptions, WindowDecoder
from audiozoo.errors import AudioError, AudiozooError, CheckpointError, UsageError
from audiozoo.layers import Dropout
from audiozoo.loading import speak_language, variables
from audiozoo.models import audio_spectrogram_transformer as ast
from audiozoo.models import bark, encodec, hifigan, whisper
from audiozoo.models.audio_spectrogram_transformer import ASTRecipe
from audiozoo.models.hubert import HubertForPreTrainingOutput
from audiozoo.models.musicgen import MusicgenRecipe
from audiozoo.models.speech_to_text import SpecAugmentPolicy
from audiozoo.models.wav2vec2 import Wav2Vec2Config
from audiozoo.processors.audio_spectrogram_transformer import ASTFeatureExtractor
from audiozoo.processors.clap import ClapFeatureExtractor
from audiozoo.processors.seamless_m4t import SeamlessM4TFeatureExtractor
from audiozoo.processors.speech_to_text import Speech2TextFeatureExtractor
from audiozoo.processors.speech_to_text_2 import Speech2Text2Tokenizer
from audiozoo.processors.vits import VitsProcessor, VitsTokenizer
from audiozoo.processors.wav2vec2 import Wav2Vec2CTCTokenizer, Wav2Vec2FeatureExtractor, Wav2Vec2Processor
from audiozoo.recipes import RECIPES, ROWS, objectives, plan, recipe, run
from audiozoo.recipes.generation import Music
from audiozoo.recipes.settings import SCHEDULES, Settings
from audiozoo.text import WhisperTokenizer
from audiozoo.training import checkpointing
from audiozoo.training.data import Item, collate, find_items
from audiozoo.training.loop import Options, Trainer, Turn
from audiozoo.training.parameters import Lora, partition
from tests.text.vocabularies import SMALL_SPECIALS, small_backend
from tests.training import tiny
from tests.weights_conversion import make_whisper_pt
from tests.weights_conversion.pytorch_files import write_pt
from weights_conversion import audio_spectrogram_transformer as ast_files
from weights_conversion import wav2vec2 as wav2vec2_files
from weights_conversion import whisper as whisper_files

ROOT = Path(__file__).resolve().parents[2]
TEXTS = ["a low hum", "high hiss", "a bell", "owl", "low bell", "a high hall"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Six sounds of 0.4 s with texts, labels, units and phonemes."""
    root = tmp_path_factory.mktemp("corpus")
    time, lines = np.arange(6400) / 16_000, []
    for index, text in enumerate(TEXTS):
        high = index % 2
        noise = np.random.default_rng(index).normal(0, 0.02, len(time))
        sound = 0.4 * np.sin(2 * np.pi * (200 + 900 * high + 20 * index) * time) + noise
        soundfile.write(root / f"{index}.wav", sound.astype(np.float32), 16_000)
        row = {"audio": f"{index}.wav", "text": text, "label": "high" if high else "low", "duration": 0.4}
        row |= {"language": "eng" if high else "deu", "composer": f"composer{1 + index % 3}"}
        row |= {"beats": [0.08 * beat for beat in range(6)], "notes": [[0, 2, 60, 80], [2, 5, 64 + index, 80]]}
        row["speaker_embedding"] = np.random.default_rng(index).normal(0, 1, 6).tolist()
        units = [(index + i // 4) % 6 for i in range(20)]
        lines.append(json.dumps(row | {"units": units, "phonemes": [1 + c % 4 for c in map(ord, text[:3])]}))
    (root / "set.jsonl").write_text("\n".join(lines))
    return root / "set.jsonl"


# What is left of the loss of a batch, at most, after 60 steps on it. The exceptions are contrastive and draw masks and
# distractors anew in each step.
LEFT = 0.5
LEFT_AT_MOST = {"sew_pretraining": 0.6, "unispeech_pretraining": 0.85, "wav2vec2_bert_pretraining": 0.65}
BY_HEART = "test_every_recipe_learns_a_batch_by_heart"


@pytest.fixture(scope="module")
def small_runs(corpus, request):
    """The results of `small_runs`, which trains in a process of its own, recipe by recipe, as they come."""
    wanted = [item for item in request.session.items if getattr(item, "originalname", "") == BY_HEART]
    names = [item.callspec.params["row"].name for item in wanted]
    command = [sys.executable, "-m", "tests.training.small_runs", str(corpus), *names]
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with tempfile.TemporaryFile() as messages:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": paths},
            stdout=subprocess.PIPE,
            stderr=messages,
            text=True,
        )
        results = {}

        def result(name):
            while name not in results:
                line = process.stdout.readline()
                if not line:
                    messages.seek(0)
                    pytest.fail(f"the process ended: {messages.read().decode()[-3000:]}")
                found = json.loads(line)
                results[found["recipe"]] = found
            return results[name]

        yield result
        process.kill()
        process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_recipe_learns_a_batch_by_heart(row, small_runs):
    """Evaluated without dropout and with the same masks and noise before and after: most of the loss is gone."""
    result = small_runs(row.name)
    assert "error" not in result, result["error"]
    assert result["finite"]
    assert result["deterministic"]
    assert result["after"] < LEFT_AT_MOST.get(row.name, LEFT) * result["before"], result
    assert result["moved"]
    assert not result["networks_that_stood_still"]
    assert not result["frozen_that_moved"]
    assert result["resumed"] is not False  # bit by bit, of the one that is stopped and goes on


@pytest.mark.parametrize("name", ["vits", "speecht5_pretraining"])
def test_nothing_is_dropped_in_evaluation(name, corpus, monkeypatch):
    """Whatever else a task draws."""
    row, model, processor = tiny.small(next(row for row in ROWS if row.name == name))
    items = find_items(corpus)
    ready = run.build(row, items, model=model, processor=processor, settings={"batch_size": 2})
    batch, keys, made = ready.batches(items, buckets=1).batch(0), [], Dropout.__init__

    def noted(dropout, key):
        keys.append(key)
        made(dropout, key)

    monkeypatch.setattr(Dropout, "__init__", noted)
    jax.eval_shape(ready.trainer._evaluation, ready.trainer.abstract(), ready.trainer.put(batch))
    assert set(keys) == {None}


def test_of_a_frozen_conformer_the_statistics_move(corpus):
    """As under `freeze_base_model` in transformers: no parameter of the body moves, each running statistic does."""
    row, model, processor = tiny.small(recipe("wav2vec2_conformer_classification"))
    items = find_items(corpus)
    ready = run.build(row, items, model=model, processor=processor, settings={"batch_size": 2, "steps": 1})
    before = {name: np.asarray(leaf[...]) for name, leaf in variables(model).items()}
    batch = ready.trainer.put(ready.batches(items, buckets=1).batch(0))
    state, _ = ready.trainer.step(ready.trainer.init(), batch)
    after = variables(ready.trained(state))
    moved = {name for name, value in before.items() if not np.array_equal(value, after[name][...])}
    statistics = {name for name, leaf in after.items() if isinstance(leaf, nnx.BatchStat)}
    assert statistics
    assert moved == statistics | {name for name in before if not name.startswith("wav2vec2_conformer.")}


@pytest.mark.slow
def test_low_rank_factors_find_queries_and_values():
    """LoRA's default finds something to adapt in every paper that is a Transformer, and trains little of it."""
    papers = {row.paper: row for row in ROWS if row.paper not in ("vits", "hifigan", "encodec")}
    for row in papers.values():
        row, model, _ = tiny.small(row)
        _, params, rest = partition(model)
        trainable = run.Trainable(pattern=row.new, lora=Lora(rank=1, within=row.adapted))
        trained, _ = jax.eval_shape(trainable.split, params, rest, jax.random.key(0))
        factors = [name for name in trained if name.endswith((".lora_a", ".lora_b"))]
        assert len(factors) >= 4, row.name
        small = sum(trained[name].size for name in factors)
        assert small < sum(value.size for value in params.values()) / 4, row.name


def test_low_rank_factors_leave_the_reader_of_texts_alone():
    """MusicGen's T5 stays as it is (§2.3): LoRA is the decoder's, unless it is asked for elsewhere."""
    row, model, processor = tiny.small(recipe("musicgen"))
    _, params, rest = partition(model)
    for lora, part in ((Lora(1), "decoder."), (Lora(1, within="^text_encoder"), "text_encoder.")):
        ready = run.build(row, [], model=model, processor=processor, lora=lora)
        trained, _ = ready.trainer.task.phases[0].trainable.split(params, rest, jax.random.key(0))
        assert {name[: len(part)] for name in trained} == {part}


def test_the_table_is_whole():
    assert set(RECIPES) <= {row.name for row in ROWS}
    assert len({row.name for row in ROWS}) == len(ROWS)
    for row in RECIPES.values():
        assert len(row.settings.source) > 10
        paper = audiozoo.registry.paper(row.paper)
        # Speech2Text2 is a decoder; it is trained behind an encoder, by a class of XLS-R's.
        assert row.model_class in paper.classes or row.name == "speech_to_text_2"
        assert row.size in paper.sizes
        judged = getattr(getattr(row.objective, "recipe", None), "problem_type", None)
        assert row.config.get("problem_type") == judged  # which the trained model's scores follow
    with pytest.raises(UsageError, match="did you mean 'wav2vec2_ctc'"):
        recipe("wav2vec2-ctx")


# --- the numbers -----------------------------------------------------------------------------------------------------


def settings(**changes):
    return Settings(source="a test", **({"steps": 100, "batch_size": 1, "learning_rate": 1.0} | changes))


def test_schedules():
    def rates(steps, **changes):
        rate = settings(**changes).rate()
        return [float(rate(jnp.asarray(step))) for step in steps]

    assert rates([0, 50, 99]) == [1, 1, 1]
    np.testing.assert_allclose(rates([0, 5, 10, 55, 100], schedule="linear", warmup=0.1), [0, 0.5, 1, 0.5, 0])
    np.testing.assert_allclose(
        rates([0, 10, 30, 50, 75, 100], schedule="tri_stage", warmup=0.1), [0.01, 1, 1, 1, 0.05**0.5, 0.05], rtol=1e-5
    )
    np.testing.assert_allclose(rates([0, 50, 100], schedule="cosine"), [1, 0.5, 0], atol=1e-6)
    np.testing.assert_allclose(rates([0, 5, 9, 10], schedule="stairs", decay=0.5, decay_steps=5), [1, 0.5, 0.5, 0.25])
    np.testing.assert_allclose(rates([5], schedule="exponential", decay=0.25, decay_steps=10), [0.5])
    for name, theirs, steps in (("ast", ASTRecipe.esc50(), 33), ("ast_tagging", ASTRecipe.audioset(), 166_000)):
        passes = steps * np.arange(1, 6 if name == "ast_tagging" else 25)
        ours, paper = recipe(name).settings.rate(), theirs.schedule(steps)
        for step in (*passes, *(passes - 1)):
            np.testing.assert_allclose(ours(int(step)), paper(int(step)), rtol=1e-5, err_msg=f"{name}, step {step}")
    np.testing.assert_allclose(rates([0, 3, 15], schedule="inverse_sqrt", warmup=4), [0.25, 1, 0.5])
    assert set(SCHEDULES) == {"constant", "linear", "tri_stage", "cosine", "exponential", "inverse_sqrt", "stairs"}
    for wrong in ({"schedule": "zigzag"}, {"optimizer": "sgd"}, {"optimizer": "adafactor", "weight_decay": 0.1}):
        with pytest.raises(UsageError):
            settings(**wrong)


def test_what_is_held_waits_and_what_decays():
    update = settings(held="^body", held_steps=0.02, weight_decay=0.1, learning_rate=0.1).transformation()
    params = {"body.kernel": jnp.ones((2, 2)), "head.kernel": jnp.ones((2, 2))}
    state, moved = update.init(params), []
    for _ in range(4):
        change, state = update.update(params, state, params)
        moved.append({name: float(jnp.abs(value).max()) > 0 for name, value in change.items()})
    assert [m["body.kernel"] for m in moved] == [False, False, True, True]
    assert all(m["head.kernel"] for m in moved)
    for name, steps in {"wav2vec2_ctc": 10_000, "unispeech_ctc": 2_000, "speecht5_recognition": 13_000}.items():
        numbers = recipe(name).settings
        assert numbers.held_steps * numbers.steps == pytest.approx(steps)  # of a shorter training the same share
    update = settings(weight_decay=0.5).transformation()
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2), "layers.stacked.bias": jnp.ones((3, 2))}
    params["conv.kernel_g"] = jnp.ones((1, 1, 2))  # the lengths of vectors
    change, _ = update.update(jax.tree.map(jnp.zeros_like, params), update.init(params), params)
    assert {name: float(value.min()) for name, value in change.items()} == {
        **dict.fromkeys(params, 0.0),
        "kernel": -0.5,
    }
    for name in ("wav2vec2_pretraining", "speecht5_recognition", "vits", "hifigan", "musicgen_melody"):
        update = dataclasses.replace(
            recipe(name).settings, warmup=0
        ).transformation()  # whose authors leave nothing out
        change, _ = update.update(jax.tree.map(jnp.zeros_like, params), update.init(params), params)
        assert all(float(value.max()) < 0 for value in change.values()), name
    with pytest.raises(UsageError, match="for matrices or for all"):
        settings(decays="biases")
    assert isinstance(settings(optimizer="adafactor").transformation(), optax.GradientTransformation)


def test_d_adaptation_finds_its_rate():
    """A factor of 1 on a rate that it finds: x² is brought down by orders of magnitude, and warm-up begins above 0."""
    numbers = settings(optimizer="dadapt_adamw", schedule="cosine", warmup=5, steps=400)
    assert float(numbers.rate()(jnp.asarray(0))) == pytest.approx(1 / 5)
    update, params = numbers.transformation(), {"kernel": jnp.full((2, 2), 3.0)}
    state = update.init(params)

    @jax.jit
    def step(params, state):
        change, state = update.update(params, state, params)  # the gradient of x²/2 is x
        return optax.apply_updates(params, change), state

    for _ in range(400):
        params, state = step(params, state)
    assert float(jnp.abs(params["kernel"]).max()) < 0.03


def test_units_follow_the_part_that_is_heard(corpus, tmp_path):
    """HuBERT's clusters are 50 a second: of a part from 0.1 to 0.3 s, the sixth to the fifteenth."""
    row, model, processor = tiny.small(recipe("hubert_pretraining"))
    config = dataclasses.replace(model.config, num_clusters=(20,))
    fields = {"units": list(range(20)), "crop": (0.1, 0.3)}
    example = row.objective.prepare(processor, config, np.zeros(3200, np.float32), fields, None)
    np.testing.assert_array_equal(example["labels"], np.arange(5, 15))
    written = row.objective.prepare(processor, config, np.zeros(3200, np.float32), {"units": "3 1 2"}, None)
    np.testing.assert_array_equal(written["labels"], [3, 1, 2])
    for wrong, sentence in {"1 x": "should be whole numbers", "1 999": "hold 999, and the model has"}.items():
        with pytest.raises(UsageError, match=sentence):
            row.objective.prepare(processor, config, np.zeros(3200, np.float32), {"units": wrong}, None)
    # Without units, clusters, of which there are 100 a second.
    hearing = SimpleNamespace(feature_extractor=processor.feature_extractor, clusters=lambda x: np.arange(len(x)))
    for rate, step in ((50.0, 2), (100.0, 1)):
        at = dataclasses.replace(config, label_rate=rate)
        labels = row.objective.prepare(hearing, at, np.ones(3200, np.float32), {}, None)["labels"]
        np.testing.assert_array_equal(labels, np.arange(0, 18, step))
    # They are found in what can be read.
    broken = tmp_path / "broken.wav"
    broken.write_bytes(b"RIFF")
    whole = dataclasses.replace(find_items(corpus)[0], fields={})
    hearing = SimpleNamespace()
    run._clusters(hearing, [Item("broken", broken), whole], SimpleNamespace(num_clusters=3))
    assert hearing.clusters.centroids.shape == (3, 39)
    with pytest.raises(AudioError, match="Of 1 recordings none can be read"):
        run._clusters(hearing, [Item("broken", broken)], SimpleNamespace(num_clusters=3))
    # Beside units of another making they are none.
    run._clusters(without := SimpleNamespace(), [whole, find_items(corpus)[0]], SimpleNamespace(num_clusters=3))
    assert not hasattr(without, "clusters")


def test_pretraining_hears_what_use_hears():
    """Without padding, and normalised after mixing; UniSpeech's distractors are any frames, in evaluation as well."""

    class Listening:
        def __init__(self, model):
            self.config, self.backbone = model.config, model.backbone

        def __call__(self, values, present, **options):
            self.options = options
            return HubertForPreTrainingOutput(loss=jnp.zeros(()))

    for name, training in (("wavlm_pretraining", True), ("unispeech_pretraining", False)):
        row, model, processor = tiny.small(recipe(name))
        batch = {"input_values": jnp.ones((2, 3200)), "attention_mask": jnp.ones((2, 3200), jnp.int32)}
        listening = Listening(model)
        row.objective.loss(processor)(
            {"model": listening}, batch, Turn(jax.random.key(0), jnp.zeros(()), None, training)
        )
        told = listening.options
        assert told["masked_group_norm"]
        if training:
            assert told["normalize"]
        else:
            masked = np.asarray(told["mask_time_indices"]).reshape(-1)
            assert masked.any()
            assert not masked[np.asarray(told["sampled_negative_indices"])[told["mask_time_indices"]]].all()


def test_bark_learns_from_texts_and_codes_as_it_reads_them(monkeypatch):
    """Texts with their offset, which keeps them apart from semantic tokens, their padding, and no longer than read.

    It hears recordings at the rate of its codec, which the processor does not know. The fine model learns windows as
    long as those that it generates: what is behind a recording is padding, and what is in front may be known.
    """
    row, model, processor = tiny.small(recipe("bark"))
    assert run.sampling_rate(model, processor) == model.config.codec_config.sampling_rate == 24_000
    for text, wanted in (("a b", [48 + 17, 48 + 18, *[95] * 6]), ("a " * 9, [48 + 17] * 8)):
        fields = {"text": text, "units": [1, 2, 3]}
        example = row.objective.prepare(
            processor, model.config, np.zeros(800, np.float32), fields, np.random.default_rng(0)
        )
        assert example["input_ids"].tolist() == wanted
    prepare = functools.partial(row.objective.prepare, processor, model.config, rng=np.random.default_rng(0))
    examples = [prepare(waveform=np.ones(39, np.float32), fields=fields) for _ in range(30)]  # 9 frames of 4 samples
    assert {int(e["frames"]) for e in examples} == {9}
    known = {int(e["known"]) for e in examples}
    assert known > {0}
    assert known < set(range(9))
    seen = {}
    monkeypatch.setattr(bark, "coarse_loss", lambda model, read, turns, key: seen.update(turns=turns.shape) or 0.0)
    monkeypatch.setattr(
        bark, "fine_loss", lambda model, codes, *given, key: seen.update(codes=codes.shape, given=given) or 0.0
    )
    batch = {name: jnp.asarray(array)[None] for name, array in examples[0].items()}
    loss = row.objective.loss(processor)
    jax.eval_shape(lambda batch: loss({"model": model}, batch, Turn(None, 0, training=False)).total, batch)
    assert seen["turns"] == (1, 2 * 12)  # of eight semantic tokens
    assert seen["codes"] == (1, tiny.GENERATION.fine_acoustics_config.max_fine_input_length, 3)
    assert [x.shape for x in seen["given"][1:]] == [(1,), (1,)]
    # Numbers are the checkpoint's, also where the recipe's are others.
    ready = run.build(recipe("bark"), [], model=model, processor=processor)
    assert ready.recipe.objective.ids == model.coarse_acoustics.generation_config == tiny.GENERATION


def test_a_vocoder_learns_of_its_own_spectrograms(monkeypatch):
    """Those of its processor, as many frames as the segment has, for the loss as well."""
    row, model, processor = tiny.small(recipe("hifigan"))
    wave = np.random.default_rng(0).normal(0, 0.1, 900).astype(np.float32)
    example = row.objective.prepare(processor, model.config, wave, {}, np.random.default_rng(1))
    given = {}

    def losses(model, judge, batch, **options):
        given.update(options, spectrogram=batch.spectrogram)
        raise StopIteration

    monkeypatch.setattr(hifigan, "generator_losses", losses)
    phase = row.objective.task(model, processor, row.settings, run.Trainable()).phases[0]
    with pytest.raises(StopIteration):
        phase.loss({"generator": model, "judge": None}, {n: a[None] for n, a in example.items()}, None)
    wanted = processor(example["waveform"], 8000)["spectrogram"]
    assert wanted.shape == (1, 512 // 32, 20)
    np.testing.assert_allclose(given["spectrogram"], wanted, atol=1e-4)
    assert (given["n_fft"], given["num_mels"]) == (processor.n_fft, processor.num_mels) == (128, 20)


def test_whisper_learns_from_windows_as_it_hears_them():
    """Of 30 s, the silence behind a recording included; or, with `allow_short`, as short as `transcribe` makes them."""
    heard = []

    def network(input_features, labels, key, allow_short):
        heard.append((input_features.shape, allow_short))
        return SimpleNamespace(loss=0.0, logits=jnp.zeros((1, 2, 4)))

    network.config = whisper.WhisperConfig()
    for name, seconds, frames in [("whisper", 6, 3000), ("whisper_short", 6, 1000), ("whisper_short", 29, 3000)]:
        batch = {"waveform": np.ones((1, 16_000 * seconds), np.float32), "labels": np.ones((1, 2))}
        recipe(name).objective.loss(None)({"model": network}, batch, Turn(None, 0, training=False))
        assert heard.pop() == ((1, 80, frames), name == "whisper_short")
        decoder = SimpleNamespace(window_frames=3000, options=TranscriptionOptions(allow_short=name == "whisper_short"))
        assert WindowDecoder.width(decoder, 100 * seconds) == frames


def test_numbers_are_learnt_as_they_are_spoken(corpus):
    """By SpeechT5, whose characters have no digits."""
    row, model, processor = tiny.small(recipe("speecht5"))
    fields, wave = find_items(corpus)[0].fields, np.zeros(6400, np.float32)
    digits, words = (
        row.objective.prepare(processor, model.config, wave, {**fields, "text": text}, None)["input_ids"]
        for text in ("2 bells", "two bells")
    )
    np.testing.assert_array_equal(digits, words)


def test_tags_join_the_text_of_music():
    """What else is known of a piece, but not its text by the name that a manifest gives it."""
    _, model, processor = tiny.small(recipe("musicgen"))
    always, read = MusicgenRecipe(merge=1.0, drop_description=0.0, word_dropout=0.0), []

    def tokenizer(texts):
        read.extend(texts)
        return {"input_ids": [[1]], "attention_mask": [[1]]}

    processor = SimpleNamespace(tokenizer=tokenizer, feature_extractor=processor.feature_extractor)
    fields = {"caption": "a reel", "text": "a reel", "genre": "folk", "label": "x", "bpm": 120}
    Music(always).prepare(processor, model.config, np.zeros(80, np.float32), fields, np.random.default_rng(0))
    assert read == ["a reel. genre: folk"]


@pytest.mark.parametrize("name", ["encodec", "musicgen"])
def test_stereo_is_learnt_in_stereo(name, tmp_path):
    """Left and right as they are recorded, a mono recording in both; a model of one channel hears their mean."""
    row, model, processor = tiny.small(recipe(name))
    rate, numbers = run.sampling_rate(model, processor), dataclasses.replace(row.settings, batch_size=1)
    sides = np.random.default_rng(0).uniform(-1, 1, (rate // 5, 2)).astype(np.float32)
    for recorded in (sides, sides[:, :1]):
        soundfile.write(tmp_path / "a.wav", recorded, rate, subtype="FLOAT")
        items = [dataclasses.replace(item, fields={"text": "a"}) for item in find_items(tmp_path)]
        for channels in (1, 2):
            config = dataclasses.replace(model.config, audio_channels=channels)
            ready = run.Run(row, numbers, SimpleNamespace(config=config), processor, SimpleNamespace(options=Options()))
            batch = ready.batches(items).batch(0)
            heard = batch["input_values"] if name == "encodec" else batch["waveform"].swapaxes(1, 2)
            wanted = recorded.mean(axis=1)[None] if channels == 1 else np.broadcast_to(recorded, sides.shape).T
            assert heard.shape[1] == channels
            np.testing.assert_allclose(heard[0, :, : len(sides)], wanted, atol=1e-6)


def test_languages_are_learnt_from_the_data(corpus):
    """Each language gets an alphabet of its own texts; a model that holds them all keeps its own."""
    row = recipe("mms")
    items = find_items(corpus)
    _, model, processor = tiny.small(row)
    assert run._learnt(row, items, processor, model.config) == {}
    capitals = [dataclasses.replace(i, fields={**i.fields, "text": i.fields["text"].upper()}) for i in items]
    with pytest.raises(UsageError, match="Most letters of the texts, such as 'A LOW HUM', are not in the vocabulary"):
        run._learnt(row, capitals, processor, model.config)
    new = tiny.Wav2Vec2Processor(tiny.Wav2Vec2FeatureExtractor())
    found = run._learnt(row, items, new, dataclasses.replace(model.config, languages=("fra",), vocab_sizes=(9,)))
    assert found["languages"] == ("deu", "eng")
    for language, size, texts in zip(found["languages"], found["vocab_sizes"], (TEXTS[::2], TEXTS[1::2]), strict=True):
        assert size == 5 + len(set("".join(texts)) - {" "})
        assert set(new.tokenizer.vocab[language]) > set("".join(texts)) - {" "}
    # Of what was learnt, `transcribe`, `align` and `evaluate` take the language that they are asked for.
    with pytest.raises(UsageError, match="run/model holds deu, eng; say which with --language"):
        speak_language(model, processor, None, "run/model")
    spoken, of_it = speak_language(model, processor, "deu", "run/model")
    np.testing.assert_array_equal(spoken.lm_head.kernel[...], model.lm_head.kernel[0])
    assert (type(spoken).__name__, of_it.tokenizer.target_lang) == ("Wav2Vec2ForCTC", "deu")
    fields = {"text": "a", "language": "ita"}
    with pytest.raises(UsageError, match="holds no 'ita'"):
        row.objective.prepare(processor, model.config, np.zeros(3200, np.float32), fields, None)


def test_texts_are_written_in_their_language(corpus, tmp_path, monkeypatch):
    """Of Whisper, and its task; of the tokenizers that put a language in front; the tokenizer itself stays as it is."""
    backend = small_backend()
    backend.add_special_tokens(SMALL_SPECIALS)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = WhisperTokenizer.from_tokenizer_file(tmp_path / "tokenizer.json")
    row, model, _ = tiny.small(recipe("whisper"))
    vocabulary = {"vocab_size": backend.get_vocab_size(), "decoder_start_token_id": tokenizer.sot}
    config = dataclasses.replace(model.config, **vocabulary)
    processor = SimpleNamespace(tokenizer=tokenizer)

    def labels(**fields):
        ids = row.objective.prepare(processor, config, np.zeros(800), {"text": "cafe", **fields}, None)["labels"]
        return tokenizer.convert_ids_to_tokens(ids.tolist())

    assert labels(language="german")[:3] == ["<|de|>", "<|transcribe|>", "<|notimestamps|>"]
    assert labels(language="ja", task="translate")[:3] == ["<|ja|>", "<|translate|>", "<|notimestamps|>"]
    assert labels(language="de")[-1] == "<|endoftext|>"
    with pytest.raises(UsageError, match=f"tokens, and the model has places for {config.max_target_positions}"):
        labels(text="cafe " * config.max_target_positions, language="de")
    written = (("de", "transcribe"), ("ja", "transcribe"), ("ja", "translate"))
    texts = ["".join(labels(language=language, task=task)[3:-1]) for language, task in written]
    assert texts == ["Ġcafe", "cafe", "Ġcafe"]  # as it writes them itself: a space before words, where there are any
    heard = 320 * config.max_source_positions
    with pytest.raises(UsageError, match=f"{heard + 1} samples, and the model hears {heard} at once"):
        row.objective.prepare(processor, config, np.zeros(heard + 1), {"text": "cafe", "language": "de"}, None)
    with pytest.raises(UsageError, match="writes many languages, and a recording has no language"):
        labels()
    with pytest.raises(UsageError, match="knows no language 'klingon'"):
        labels(language="klingon")
    assert tokenizer.language is None

    class Several(tiny.Tokens):
        lang_code_to_id: ClassVar = {"de": 40, "fr": 41}

        def set_target_lang(self, language):
            self.start = self.lang_code_to_id[language]

    row, model, processor = tiny.small(recipe("speech_to_text"))
    processor.tokenizer = Several(40)
    example = row.objective.prepare(
        processor, model.config, np.ones(800, np.float32), {"text": "a", "language": "fr"}, None
    )
    assert example["labels"][0] == 41
    assert processor.tokenizer.start == 40
    with pytest.raises(UsageError, match="a recording has no language"):
        row.objective.prepare(processor, model.config, np.ones(800, np.float32), {"text": "a"}, None)
    # It is read and not learnt; in training alone bands and stretches are masked.
    labels = jnp.asarray([[41, 5, 2]])
    batch = {"waveform": jnp.ones((1, 8000)), "length": jnp.asarray([8000]), "labels": labels}
    seen = []
    monkeypatch.setattr(objectives, "spec_augment", lambda x, *arguments: seen.append(arguments) or x)
    for training in (True, False):
        turn = Turn(jax.random.key(0), jnp.asarray(0), training=training)
        made = row.objective.loss(processor)
        assert jax.jit(lambda m, made=made, turn=turn: made({"model": m}, batch, turn).count)(model) == 2
    assert [policy for policy, *_ in seen] == [SpecAugmentPolicy.ld()]
    # Speech2Text2's tokenizer writes no end, which its decoder has to learn.
    row, model, processor = tiny.small(recipe("speech_to_text_2"))
    pieces = {piece: index for index, piece in enumerate(["<s>", "<pad>", "</s>", "<unk>", "a", "b"])}
    processor.tokenizer = Speech2Text2Tokenizer(pieces, merges=[])
    for fields in ({"text": "a b"}, {"text": "b", "translation": "a b"}):  # what it is measured by, too
        example = row.objective.prepare(processor, model.config, np.ones(800, np.float32), fields, None)
        assert example["labels"].tolist() == [4, 5, 2]
    item = find_items(corpus)[0]
    assert run._with_language(item, "fra").fields["language"] == "deu"
    assert run._with_language(dataclasses.replace(item, fields={}), "fra").fields == {"language": "fra"}


@pytest.mark.parametrize("extractor", [Speech2TextFeatureExtractor(), SeamlessM4TFeatureExtractor()], ids=type)
def test_features_on_the_device_are_the_processors(extractor):
    """Of padded waveforms of an even, an odd and the least number of frames."""
    rng = np.random.default_rng(0)
    waveforms = [rng.normal(0, 0.1, samples).astype(np.float32) for samples in (8000, 5999, 560)]
    wanted = extractor(waveforms, 16_000)
    padded = np.stack([np.pad(w, (0, 8000 - len(w))) for w in waveforms])
    features, mask = jax.jit(extractor.in_jax)(padded, np.asarray([8000, 5999, 560]))
    np.testing.assert_array_equal(mask, wanted["attention_mask"])
    np.testing.assert_allclose(features, wanted["input_features"], atol=2e-3)


@pytest.mark.parametrize("name", ["speech_to_text", "seamless_m4t"])
def test_padding_changes_no_translators_loss(name):
    """As it changes nothing of what `audiozoo translate` writes."""
    row, model, processor = tiny.small(recipe(name))
    waveform = jnp.asarray(np.random.default_rng(0).normal(0, 0.1, (1, 8000)), jnp.float32)
    batch = {"length": jnp.asarray([8000]), "labels": jnp.asarray([[4, 5, 2]])}
    turn, made = Turn(jax.random.key(0), jnp.asarray(0), training=False), row.objective.loss(processor)
    alone, padded = (
        jax.jit(lambda m, x=x: made({"model": m}, batch | {"waveform": x}, turn).total)(model)
        for x in (waveform, jnp.pad(waveform, ((0, 0), (0, 4000))))
    )
    assert padded == pytest.approx(float(alone), rel=1e-5)


def test_what_a_recording_must_bring_is_named(corpus):
    fields = find_items(corpus)[0].fields
    rng = np.random.default_rng(0)
    for name, field in {
        "pop2piano": "beats",
        "bark": "units",
        "speecht5": "speaker_embedding",
        "seamless_m4t": "language",
        "mms": "language",
        "speecht5_pretraining": "units",
    }.items():
        row, model, processor = tiny.small(recipe(name))
        lacking = {key: value for key, value in fields.items() if key != field}
        with pytest.raises(UsageError, match=f"a recording has no {field}"):
            row.objective.prepare(processor, model.config, np.zeros(6400, np.float32), lacking, rng)
    row, model, processor = tiny.small(recipe("speecht5"))
    wrong = {**fields, "speaker_embedding": [1.0, 2.0]}
    with pytest.raises(UsageError, match="has 2 numbers; the model's have 6"):
        row.objective.prepare(processor, model.config, np.zeros(6400, np.float32), wrong, rng)
    voice, config = VitsProcessor(VitsTokenizer(tiny.LETTERS, phonemize=False)), SimpleNamespace(hop_length=8)
    with pytest.raises(UsageError, match="'1995' has no symbol that this voice knows"):
        recipe("vits").objective.prepare(voice, config, np.zeros(800, np.float32), {"text": "1995"}, rng)
    row, model, processor = tiny.small(recipe("pop2piano"))
    with pytest.raises(UsageError, match="more than the 3 beats"):
        row.objective.prepare(processor, model.config, np.zeros(3200), {**fields, "beats": [0.0, 0.1, 0.2]}, rng)


def test_arrangers_are_the_checkpoints_and_what_follows_a_segment_is_silence(corpus):
    row, model, processor = tiny.small(recipe("pop2piano"))
    model.generation_config = dataclasses.replace(
        model.generation_config, composer_to_feature_token=(("ann", 7), ("bob", 8))
    )
    items = find_items(corpus)
    objective = run.build(row, items, model=model, processor=processor).recipe.objective
    fields = {**items[0].fields, "composer": "bob"}
    one = objective.prepare(processor, model.config, np.ones(8000, np.float32), fields, np.random.default_rng(0))
    assert one["composer"] == 1
    heard = collate([one], objective.padding(processor), 0)["input_features"][0]
    silence = processor.feature_extractor.log_mel(np.zeros(4096))
    assert len(heard) > len(one["input_features"])
    np.testing.assert_array_equal(heard[len(one["input_features"]) :] == silence[0], True)
    with pytest.raises(UsageError, match="no composer 'composer1'; there are ann, bob"):
        objective.prepare(processor, model.config, np.ones(8000), {**fields, "composer": "composer1"}, None)


def test_rare_sounds_are_drawn_more_often():
    """AST's balanced sampling, of full AudioSet alone; a class may have a comma in its name."""
    names = ("rain", "speech, whispered", "owl")
    config = SimpleNamespace(id2label=names, num_labels=3)
    labels = ["rain", "speech, whispered", "rain, owl", ["rain", "speech, whispered"], "rain"]
    items = [Item(str(i), Path("x.wav"), 1.0, {"label": label}) for i, label in enumerate(labels)]
    rain, whispered, owl = 1000 / 4.01, 1000 / 2.01, 1000 / 1.01
    odds = recipe("ast_tagging").objective.odds(config, items)
    np.testing.assert_allclose(odds, [rain, whispered, rain + owl, rain + whispered, rain])
    assert recipe("ast").objective.odds(config, items) is None
    assert run._learnt(recipe("ast_tagging"), items, None, config) == {}
    more = [*items, Item("6", Path("x.wav"), 1.0, {"label": "a folder", "labels": ["fox"]})]
    assert run._learnt(recipe("ast_tagging"), more, None, config) == {"id2label": ("fox", "owl", *names[:2])}
    assert run._learnt(recipe("ast"), more[-1:], None, config) == {"id2label": ("a folder",)}
    with pytest.raises(UsageError, match="one label of a recording, and one has 2: rain, speech, whispered"):
        recipe("ast").objective.prepare(ASTFeatureExtractor(), config, np.zeros(9), items[3].fields, None)
    alone = dataclasses.replace(recipe("ast").objective, recipe=ASTRecipe(problem_type="single_label_classification"))
    np.testing.assert_allclose(alone.odds(config, items[:2]), [1000 / 1.01] * 2)


@pytest.mark.slow
def test_encodecs_loss_has_the_balanced_gradient():
    """Its scalar loss is made so that its gradient is what the balancer gives."""
    row, model, processor = tiny.small(next(row for row in ROWS if row.name == "encodec"))
    task = row.objective.task(model, processor, row.settings, run.Trainable())
    batch = {"input_values": jnp.asarray(np.random.default_rng(0).normal(0, 0.2, (2, 1, 160)), jnp.float32)}
    turn = run.Trainer(task)  # compiles nothing yet
    key = jax.random.key(3)
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params):
        networks = dict(task.networks) | {"codec": nnx.merge(graphdef, params, jax.tree.map(lambda x: x, rest))}
        networks["balancer"] = nnx.merge(*nnx.split(task.networks["balancer"]))
        return task.phases[0].loss(networks, batch, Turn(key, jnp.asarray(0), training=False)).total

    ours = jax.jit(jax.grad(loss))(params)
    count_key, own = jax.random.split(key)

    @jax.jit
    def direct(params):
        balancer = encodec.Balancer.encodec_24khz()
        return encodec.codec_gradients(
            nnx.merge(graphdef, params, rest),
            batch["input_values"],
            balancer,
            balancer.init(),
            discriminator=task.networks["judge"],
            num_quantizers=encodec.random_quantizers(count_key, model.config),
            key=own,
            **row.objective.options,
        )[0]

    assert turn.phase.keys() == {"codec", "judge"}
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(direct(params)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


# --- from data to a model --------------------------------------------------------------------------------------------


def test_a_head_wider_than_the_vocabulary_stays():
    """Many published heads have columns for `<s>` and `</s>`, which their vocabulary lacks."""
    processor = Wav2Vec2Processor(
        Wav2Vec2FeatureExtractor(), Wav2Vec2CTCTokenizer({"<pad>": 0, "<unk>": 1, "|": 2, "a": 3})
    )
    items = [SimpleNamespace(fields={"text": "a"})]
    found = [run._learnt(recipe("wav2vec2_ctc"), items, processor, Wav2Vec2Config(vocab_size=n)) for n in (4, 6, 7)]
    assert found == [{}, {}, {"vocab_size": 4}]


@pytest.mark.slow
def test_train_learns_letters_saves_goes_on_and_loads(corpus, tmp_path):
    """A whole run from nothing: vocabulary of the texts, checkpoints, a model to load; a second run that goes on.

    It goes on without evaluation, and so gives the last model, not the best of before.
    """
    config = {name: value for name, value in tiny.SPEECH.items() if name not in ("vocab_size", "id2label")}
    how = {
        "config": config | {"feat_extract_norm": "layer"},
        "settings": {"batch_size": 2, "steps": 4, "held_steps": 0},
        "held_out": 0.34,
        "evaluate_every": 2,
        "log_every": 2,
    }
    ours = recipe("wav2vec2_ctc")
    model = run.train(ours, corpus, tmp_path / "run", **how)
    letters = sorted(set("".join(TEXTS)) - {" "})
    processor = audiozoo.load_processor(tmp_path / "run" / "model")
    assert processor.tokenizer.tokens()[5:] == letters
    assert model.config.vocab_size == 5 + len(letters)
    loaded = audiozoo.load(tmp_path / "run" / "model")
    for a, b in zip(jax.tree.leaves(nnx.state(model)), jax.tree.leaves(nnx.state(loaded)), strict=True):
        np.testing.assert_array_equal(a, b)
    how["settings"]["steps"] = 6
    again = run.train(ours, corpus, tmp_path / "run", **how | {"held_out": 0.0})
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [2, 2, 4, 4, 6]
    assert type(again) is type(model)
    assert np.any(again.lm_head.kernel[...] != model.lm_head.kernel[...])
    with pytest.raises(CheckpointError, match="holds a run of the recipe wav2vec2_ctc"):
        run.train(recipe("hubert_ctc"), corpus, tmp_path / "run", **how)
    # From the trained model to another vocabulary and LoRA: the body stays, the head is new and learns.
    (tmp_path / "new.jsonl").write_text(
        "\n".join(
            json.dumps({"audio": str(corpus.parent / f"{i}.wav"), "text": "xyz", "duration": 0.4}) for i in range(4)
        )
    )
    adapted = run.train(
        ours,
        tmp_path / "new.jsonl",
        tmp_path / "lora",
        init=tmp_path / "run" / "model",
        processor=tiny.Wav2Vec2Processor(processor.feature_extractor),
        lora=Lora(rank=2),
        settings=how["settings"] | {"steps": 2},
    )
    assert adapted.config.vocab_size == 8
    body = adapted.wav2vec2.encoder.layers[0].feed_forward.intermediate_dense.kernel[...]
    np.testing.assert_array_equal(body, again.wav2vec2.encoder.layers[0].feed_forward.intermediate_dense.kernel[...])
    query = adapted.wav2vec2.encoder.layers[0].attention.q_proj.kernel[...]
    assert np.any(query != again.wav2vec2.encoder.layers[0].attention.q_proj.kernel[...])


def test_a_checkpoint_of_another_optimiser_stays_and_so_does_what_it_was_begun_with(corpus, tmp_path):
    """AST's recipe had no L2 penalty once, whose part of the optimiser moves those behind it; no settings are lost."""
    small, model, processor = tiny.small(recipe("ast"))
    begun = {"steps": 2, "batch_size": 2, "weight_decay": 0.0}
    how = {"model": model, "processor": processor}
    run.train(small, corpus, tmp_path / "run", settings=begun, **how)
    said = (tmp_path / "run" / "run.json").read_text()
    on = begun | {"steps": 3}
    with pytest.raises(
        CheckpointError, match=r"of this model, but of another optimiser: it .*\. Go on with the settings"
    ):
        run.train(small, corpus, tmp_path / "run", settings=on | {"weight_decay": 5e-7}, **how)
    assert (tmp_path / "run" / "run.json").read_text() == said
    run.train(small, corpus, tmp_path / "run", settings=on, **how)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["settings"]["steps"] == 3


def test_spectrograms_are_as_large_as_the_model_reads(corpus):
    """A new AST's processor follows its configuration; a checkpoint's positions are cut, its processor with them."""
    row, model, processor = tiny.small(recipe("ast"))
    items, settings = find_items(corpus), {"batch_size": 2}
    config = {n: v for n, v in vars(model.config).items() if n not in ("id2label", "problem_type")}
    new = run.build(row, items, config=config, settings=settings, options=Options(seed=3))
    assert new.batches(items).seed == 3
    assert (new.processor.max_length, new.processor.num_mel_bins) == (48, 16)
    assert new.model.config.problem_type == row.objective.recipe.problem_type
    shorter = run.build(
        row,
        items,
        model=model,
        processor=processor,
        config={"max_length": 32, "hidden_dropout_prob": 0.1},
        settings=settings,
    )
    assert (shorter.processor.max_length, processor.max_length) == (32, 48)
    assert (shorter.model.config.max_length, shorter.model.config.hidden_dropout_prob) == (32, 0.1)
    wanted = ast.resized(model, max_length=32)
    for a, b in zip(jax.tree.leaves(shorter.model), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(a, b)
    wave, samples = np.arange(9000.0), shorter.processor.samples  # longer than a window: heard from anywhere
    heard = [
        row.objective.prepare(shorter.processor, shorter.model.config, wave, items[0].fields, np.random.default_rng(i))
        for i in range(3)
    ]
    starts = [int(example["waveform"][0]) for example in heard]
    assert len(set(starts)) == 3
    for start, example in zip(starts, heard, strict=True):
        np.testing.assert_array_equal(example["waveform"], wave[start : start + samples])
    for ready in (new, shorter):
        batch = ready.trainer.put(ready.batches(items, buckets=1).batch(0))
        jax.eval_shape(ready.trainer._step, ready.trainer.abstract(), batch)


def test_a_changed_model_computes_in_the_dtype_that_was_asked_for(corpus):
    row, model, processor = tiny.small(recipe("wav2vec2_ctc"))
    for dropout in (0.2, model.config.hidden_dropout):
        changed = run.build(
            row,
            find_items(corpus),
            model=model,
            processor=processor,
            config={"hidden_dropout": dropout},
            settings={"batch_size": 2},
            dtype=jnp.bfloat16,
        ).model
        assert changed.config.hidden_dropout == dropout
        assert jax.eval_shape(lambda model: model(jnp.zeros((1, 800))).logits, changed).dtype == jnp.bfloat16


@pytest.mark.parametrize("name", ["vits", "hifigan", "encodec"])
def test_judges_compute_in_the_dtype_that_was_asked_for(name):
    """Their parameters are in float32 all the same, and so are the losses."""
    row, model, processor = tiny.small(recipe(name))
    judge = row.objective.task(model, processor, row.settings, run.Trainable(), jnp.bfloat16).networks["judge"]
    sound = jnp.zeros((1, 1, 4096) if name == "encodec" else (1, 4096))
    scores, features = jax.eval_shape(lambda judge: judge(sound), judge)
    assert {x.dtype for x in jax.tree.leaves((scores, features))} == {jnp.dtype(jnp.bfloat16)}
    assert {x.dtype for x in jax.tree.leaves(nnx.state(judge, nnx.Param))} == {jnp.dtype(jnp.float32)}
    losses = encodec if name == "encodec" else hifigan
    for loss, of in (
        (losses.discriminator_loss, (scores, scores)),
        (losses.generator_loss, (scores,)),
        (losses.feature_loss, (features, features)),
    ):
        assert jax.eval_shape(loss, *of).dtype == jnp.float32


@pytest.mark.parametrize(("given", "number"), [(1, 1), ("Ann", 2), (3, None), ("Bob", None), (-1, None)])
def test_a_speaker_is_given_by_number_or_name(given, number):
    processor = VitsProcessor(VitsTokenizer(tiny.LETTERS, phonemize=False), {"Ann": 2})
    config, fields = SimpleNamespace(hop_length=8, num_speakers=3), {"text": "abc", "speaker_id": given}
    arguments = processor, config, np.zeros(800, np.float32), fields, None
    if number is not None:
        assert recipe("vits").objective.prepare(*arguments)["speaker_id"] == number
        return
    with pytest.raises(UsageError, match="the model has voices 0 to 2"):
        recipe("vits").objective.prepare(*arguments)


def test_what_cannot_be_trained_says_so(corpus, tmp_path, monkeypatch):
    items = find_items(corpus)
    ctc, ast = recipe("wav2vec2_ctc"), recipe("ast")
    bare = [dataclasses.replace(item, fields={}) for item in items]
    capitals = [dataclasses.replace(item, fields={"text": item.fields["text"].upper()}) for item in items]
    _, model, processor = tiny.small(ctc)
    fusing = SimpleNamespace(feature_extractor=ClapFeatureExtractor(max_length_s=2, truncation="fusion"))
    for match, call in {
        "no setting of a recipe": lambda: run.build(ctc, items, settings={"rate": 1}),
        "no field of Wav2Vec2Config": lambda: run.build(ctc, items, config={"width": 1}),
        "has no size 'huge'": lambda: run.build(ctc, items, size="huge"),
        "A size is of a model that begins": lambda: run.build(
            ctc, items, size="base", model=model, processor=processor
        ),
        "recordings with texts": lambda: run.build(ctc, bare),
        "which has a, b, c, d, e …": lambda: run.build(ctc, capitals, model=model, processor=processor),
        "no recording has one": lambda: run.build(ast, bare),
        "has no vocabulary": lambda: run.build(recipe("whisper"), items),
        "would learn no fusion": lambda: run.build(recipe("clap"), items, processor=fusing, settings={"seconds": 2}),
    }.items():
        with pytest.raises(UsageError, match=match):
            call()
    for match, how in {
        "steps cannot be 'many': by default it is 80000": {"settings": {"steps": "many"}},
        "steps is a whole number of at least 1, not 0": {"settings": {"steps": 0}},
        "batch_size is a whole number of at least 1, not 2.5": {"settings": {"batch_size": 2.5}},
        "hidden_size cannot be '9'": {"config": {"hidden_size": "9"}},
        "do_stable_layer_norm cannot be 1": {"config": {"do_stable_layer_norm": 1}},
        "A batch of 6 cannot be divided among the 4 parts of the mesh": {
            "mesh": jax.sharding.AbstractMesh((2, 2, 2), ("data", "fsdp", "tensor")),
            "settings": {"batch_size": 6},
        },
    }.items():
        with pytest.raises(UsageError, match=match):
            run.build(ctc, items, **how)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UsageError, match="Several processes train one model on a mesh"):
        run.build(ctc, items)
    monkeypatch.undo()
    for match, how in {
        "there is nothing to evaluate on": {"patience": 2},
        "give one of the two": {"evaluation": corpus, "held_out": 0.5},
        "holds 6 recordings, and all would be held out": {"held_out": 0.99},
        "log_every is at least 1, not 0": {"log_every": 0},
        r"lies in \[0, 1\), not at 1.5": {"held_out": 1.5},
    }.items():
        with pytest.raises(UsageError, match=match):
            run.train(ctc, corpus, tmp_path / "run", **how)
    assert not (tmp_path / "run").exists()
    (tmp_path / "run" / "model" / "notes").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="holds something else than a checkpoint"):
        run.train(ctc, corpus, tmp_path / "run")
    ready = run.build(ctc, items, model=model, processor=processor, settings={"batch_size": 2, "steps": 1e1})
    assert ready.settings.steps == 10
    with pytest.raises(AudioError, match="a recording has none"):
        ready.batches(bare).batch(0)


@pytest.fixture
def still(monkeypatch):
    """Steps that compute nothing: what is trained stays as it is. Gives the batches that they were to learn from."""
    init, batches = Trainer.__init__, []

    def quick(self, *args, **kwargs):
        def step(state, batch):
            batches.append(batch)
            return dataclasses.replace(state, step=state.step + 1), {"loss": 0.0}

        init(self, *args, **kwargs)
        self.step = step

    monkeypatch.setattr(Trainer, "__init__", quick)
    monkeypatch.setattr(checkpointing, "checksums", lambda arrays: {})  # a program for each model
    return batches


@pytest.mark.parametrize("name", list({type(row.objective): name for name, row in RECIPES.items()}.values()))
def test_the_command_takes_every_kind_of_recipe(name, corpus, tmp_path, still, monkeypatch):
    """`audiozoo train NAME --init DIRECTORY`, of a small model: data, batches, a step, a model to load."""
    row, model, processor = tiny.small(recipe(name))
    monkeypatch.setitem(RECIPES, name, row)
    reader = audiozoo.registry.paper(row.paper).processor_class
    monkeypatch.setattr(reader, "from_directory", classmethod(lambda cls, directory: processor))
    audiozoo.save(model, tmp_path / "init")
    arguments = ["train", name.replace("_", "-"), "--data", str(corpus), "--out", str(tmp_path / "run")]
    arguments += ["--init", str(tmp_path / "init"), "--set=batch_size=2", "--set=steps=1", "--log-every=1"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.exception
    assert done.stdout == f"{tmp_path / 'run' / 'model'}\n"
    told = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in told] == [1]
    trained = audiozoo.load(tmp_path / "run" / "model")
    assert type(trained) is type(model)
    changed = {n for n, value in vars(trained.config).items() if value != getattr(model.config, n)}
    assert changed <= {*row.config, "encoder"}  # whose class, of XLS-R, is written as the one above it
    for a, b in zip(jax.tree.leaves(nnx.state(trained)), jax.tree.leaves(nnx.state(model)), strict=True):
        np.testing.assert_array_equal(a, b)
    # And `audiozoo plan --recipe NAME` plans a step on such a batch.
    choice = plan.choose(str(tmp_path / "init"))
    assert plan.recipe_of(choice, name) is row
    amount = plan.Amount(2, 0.4, 8)
    planned = plan.example(row, choice, plan._processor(choice, amount), amount)
    forms = [{n: (a.dtype, a.ndim, a.shape[0]) for n, a in batch.items()} for batch in (planned, still[0])]
    assert forms[0] == forms[1]


def values_of(model):
    """Arrays by name."""
    return {name: np.asarray(leaf[...]) for name, leaf in variables(model).items()}


def fairseq_file(folder, leave_out=()):
    """A small wav2vec 2.0 as fairseq writes it after pre-training."""
    model = tiny.family("wav2vec2", "Wav2Vec2ForPreTraining")
    table = wav2vec2_files.fairseq_table(model.config, "Wav2Vec2ForPreTraining")
    tensors = {name: array for name, array in table.write(values_of(model)) if name not in leave_out}
    settings = {"conv_feature_layers": "[(8, 10, 10), (8, 3, 8), (8, 2, 4)]", "encoder_attention_heads": 2}
    return write_pt(folder / "wav2vec_small.pt", tensors, root="model", cfg={"model": settings}), values_of(model)


def pretrained(folder):
    """A small HuBERT as `audiozoo train hubert_pretraining` leaves it."""
    model = tiny.family("hubert", "HubertForPreTraining")
    run._save(model, Wav2Vec2Processor(Wav2Vec2FeatureExtractor()), folder / "pretrained")
    return folder / "pretrained", values_of(model)


def ast_file(folder):
    """A small AST of three classes as its authors have it."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 16}
    grid = {"max_length": 128, "time_stride": 16, "frequency_stride": 16}
    config = ast.ASTConfig(**sizes, **grid, **ast_files.ORIGINAL_EPS, id2label=("a", "b", "c"))
    model = tiny.random_model(lambda rngs: ast.ASTForAudioClassification(config, rngs=rngs))
    tensors = dict(ast_files.ORIGINAL_TABLE.write(values_of(model)))
    return write_pt(folder / "audioset_16_16_0.4.pth", tensors), values_of(model)


def deit_file(folder):
    """A DeiT of 3 × 3 patches, and the AST of 8 × 8 that begins with it."""
    path, _ = ast_file(folder)
    with ast_files.open_tensors(path) as source:
        tensors = {n.removeprefix("v."): source.read(n) for n in source.names() if n.startswith("v.")}
    tensors["patch_embed.proj.weight"] = np.repeat(tensors["patch_embed.proj.weight"], 3, axis=1)
    tensors["pos_embed"] = tensors["pos_embed"][:, : 2 + 9]
    path = write_pt(folder / "deit_tiny_distilled_patch16_48.pth", tensors)
    sizes = {"max_length": 128, "time_stride": 16, "frequency_stride": 16}
    return path, values_of(ast_files.from_deit(path, rngs=nnx.Rngs(0), **sizes))


def whisper_file(folder):
    """A small Whisper of OpenAI's; a tokenizer beside it."""
    backend = small_backend()
    backend.add_special_tokens(SMALL_SPECIALS)
    backend.save(str(folder / "tokenizer.json"))
    dims = make_whisper_pt.DIMS | {"n_vocab": backend.get_vocab_size(), "n_text_ctx": 32, "n_audio_ctx": 100}
    config = whisper_files.config_from_openai(dims)
    model = tiny.random_model(lambda rngs: whisper.WhisperForConditionalGeneration(config, rngs=rngs))
    tensors = dict(whisper_files.OPENAI_TABLE.write(values_of(model)))
    return write_pt(folder / "tiny.pt", tensors, root="model_state_dict", dims=dims), values_of(model)


CLASSES = {"projector.kernel": (16, 5), "projector.bias": (5,), "classifier.kernel": (5, 2), "classifier.bias": (2,)}


@pytest.mark.parametrize(
    ("name", "make", "new", "more"),
    [
        ("wav2vec2_ctc", fairseq_file, {"lm_head.kernel": (16, 17), "lm_head.bias": (17,)}, []),
        ("hubert_ctc", pretrained, {"lm_head.kernel": (16, 17), "lm_head.bias": (17,)}, []),
        ("hubert_classification", pretrained, CLASSES, []),
        ("ast", ast_file, {"classifier.dense.kernel": (64, 2), "classifier.dense.bias": (2,)}, []),
        (
            "ast_tagging",
            deit_file,
            {"classifier.dense.kernel": (64, 2), "classifier.dense.bias": (2,)},
            ["--config=max_length=128", "--config=time_stride=16", "--config=frequency_stride=16"],
        ),
        ("whisper", whisper_file, {}, []),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_training_begins_with_an_authors_file(name, make, new, more, corpus, tmp_path, still):
    """Before the first step every parameter is the file's; only a head for other letters or classes is drawn."""
    path, given = make(tmp_path)
    rows = [json.loads(line) for line in corpus.read_text().splitlines()]
    changed = [row | {"audio": str(corpus.parent / row["audio"]), "language": "en"} for row in rows]
    (tmp_path / "set.jsonl").write_text("\n".join(map(json.dumps, changed)))
    arguments = ["train", name, "--data", str(tmp_path / "set.jsonl"), "--out", str(tmp_path / "run")]
    arguments += ["--init", str(path), "--set=batch_size=2", "--set=steps=1", *more]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.exception
    trained = values_of(audiozoo.load(tmp_path / "run" / "model"))
    for key, value in trained.items():
        if key in new:
            assert value.shape == new[key]
            assert np.any(value) or key.endswith("bias")
        else:
            np.testing.assert_array_equal(value, given[key], err_msg=key)
    assert len(still) == 1


def test_an_authors_file_that_does_not_fit(corpus, tmp_path):
    items = find_items(corpus)
    path, _ = fairseq_file(tmp_path, leave_out=["encoder.layers.0.fc1.bias"])
    with pytest.raises(CheckpointError, match=r"does not fit Wav2Vec2ForCTC: 0 unexpected .*, 1 missing") as caught:
        run.build(recipe("wav2vec2_ctc"), items, init=path)
    assert "encoder.layers.0.feed_forward.intermediate_dense.bias" in str(caught.value)
    for name, file, match in (
        ("hubert_ctc", path, "is no HuBERT of fairseq's"),
        ("encodec", path, "is no file of EnCodec's authors"),
        ("wav2vec2_ctc", deit_file(tmp_path)[0], "is no wav2vec 2.0 of fairseq or torchaudio"),
        ("whisper", make_whisper_pt.PATH, "There is no tokenizer|do not belong together"),
    ):
        with pytest.raises(AudiozooError, match=match) as caught:
            run.build(recipe(name), items, init=file)
        assert "\n" not in str(caught.value)
    path, _ = pretrained(tmp_path)
    for name in ("wav2vec2_ctc", "ast", "whisper"):
        with pytest.raises(CheckpointError, match="holds a HubertForPreTraining, which is not the body of a "):
            run.build(recipe(name), items, init=path)
    path, _ = whisper_file(tmp_path)
    shutil.copy(make_whisper_pt.PATH, path)  # whose vocabulary is smaller than the tokenizer beside it
    row, texts = (
        recipe("whisper"),
        [dataclasses.replace(item, fields={"text": "a", "language": "en"}) for item in items],
    )
    ready = run.build(row, texts, init=path, settings={"batch_size": 2})
    with pytest.raises(AudioError, match=r"The tokenizer writes token \d+, and the model knows 19"):
        ready.batches(texts).batch(0)


@pytest.mark.parametrize(("name", "stacked"), [("speecht5", False), ("speecht5_recognition", True)])
def test_a_loss_that_reads_between_blocks_gets_no_stack(corpus, name, stacked):
    row, model, processor = tiny.small(recipe(name))
    how = {"model": model, "processor": processor, "config": {"use_guided_attention_loss": True}}
    ready = run.build(row, find_items(corpus), options=Options(stack=True), **how)
    assert ready.trainer.options.stack == stacked


@pytest.mark.slow
def test_a_stack_recomputed_and_adapted_by_low_rank_goes_on(corpus, tmp_path):
    """`--stack --remat --lora --mesh`, stopped and gone on with, is as in one go; what is saved is a plain model."""
    row, model, _ = tiny.small(recipe("ast"))
    config = dataclasses.replace(model.config, num_hidden_layers=2, id2label=("a", "b", "c"))
    model = tiny.random_model(lambda rngs: ast.ASTForAudioClassification(config, rngs=rngs))
    audiozoo.save(model, tmp_path / "init")
    options = ["--stack", "--remat=layers", "--lora=2", "--mesh=data=1", "--log-every=1"]
    numbers = ["--set=batch_size=2", "--set=schedule=constant", "--set=learning_rate=0.01"]

    def train(out, steps, options=options):
        arguments = ["train", row.name, "--data", str(corpus), "--init", str(tmp_path / "init")]
        arguments += ["--out", str(tmp_path / out), f"--set=steps={steps}"]
        return CliRunner().invoke(app, [*arguments, *numbers, *options])

    for out, steps in (("whole", 2), ("parts", 1), ("parts", 2)):
        done = train(out, steps)
        assert done.exit_code == 0, done.exception
    lines = (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
    whole, parts = (values_of(audiozoo.load(tmp_path / out / "model")) for out in ("whole", "parts"))
    before = values_of(model)
    assert set(whole) == set(parts) == set(before)
    for name, value in parts.items():
        np.testing.assert_array_equal(value, whole[name], err_msg=name)
        if name.startswith("classifier."):  # which is new, of two classes, and learns
            assert value.shape[-1] in (2, 16)
            assert value.shape != before[name].shape or np.any(value != before[name])
        elif name.endswith(("q_proj.kernel", "v_proj.kernel")):
            assert np.linalg.matrix_rank(value - before[name], tol=1e-5) == 2, name
        else:
            np.testing.assert_array_equal(value, before[name], err_msg=name)
    for other in (options[1:], [*options, "--lora=3"]):
        wrong = train("parts", 3, other)
        assert isinstance(wrong.exception, CheckpointError), wrong.exception
        assert "\n" not in str(wrong.exception)


def test_the_command_trains(corpus, tmp_path, still):
    fields = {**tiny.SPEECH, "feat_extract_norm": "layer"}
    changes = [f"--config={n}={json.dumps(v)}" for n, v in fields.items() if n not in ("vocab_size", "id2label")]
    steps = ["--set=steps=2", "--set=batch_size=2", "--set=learning_rate=1e-3"]
    arguments = ["train", "wav2vec2_ctc", "--data", str(corpus), "--out", str(tmp_path / "run"), "--mesh=data=1"]
    done = CliRunner().invoke(app, [*arguments, *steps, *changes])
    assert done.exit_code == 0, done.exception
    assert type(audiozoo.load(tmp_path / "run" / "model")).__name__ == "Wav2Vec2ForCTC"
    wrong = CliRunner().invoke(app, [*arguments, "--set=steps"])
    assert "write NAME=VALUE" in str(wrong.exception)
    assert "wav2vec2_ctc" in CliRunner().invoke(app, ["recipes"]).output
