"""What a batch is worth: what an objective hands to a model, counts and cuts, with models that only listen."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from audiozoo.errors import UsageError
from audiozoo.layers.losses import ctc_loss
from audiozoo.models import clap, hifigan, vits
from audiozoo.models.audio_spectrogram_transformer import ASTRecipe
from audiozoo.models.speech_to_text import SpecAugmentPolicy
from audiozoo.processors.encodec import EncodecFeatureExtractor
from audiozoo.processors.vits import VitsProcessor, VitsTokenizer
from audiozoo.recipes import objectives, recipe, run
from audiozoo.training.loop import Turn
from tests.training import tiny

TRAINING, EVALUATION = Turn(jax.random.key(0), jnp.asarray(0)), Turn(jax.random.key(0), jnp.asarray(0), None, False)


class Listening:
    """A model that notes what it is given, and answers with what it was made with."""

    def __init__(self, config, backbone=None, **answer):
        self.config, self.backbone, self.answer = config, backbone, answer

    def __call__(self, *heard, **options):
        self.heard, self.options = heard, options
        return SimpleNamespace(**self.answer)


class Last:
    """A generator whose whole numbers are the largest that there may be."""

    @staticmethod
    def integers(stop):
        return stop - 1


def test_ctc_counts_letters():
    """The sum over a batch: no letters are padding and blanks, and an item too short for its letters adds nothing."""
    row, model, processor = tiny.small(recipe("wav2vec2_ctc"))
    mask = jnp.asarray(np.arange(3200) < np.array([[3200], [2000], [400]]), jnp.int32)
    lengths = model.backbone.frame_lengths(mask.sum(axis=1))
    logits = jnp.asarray(np.random.default_rng(0).normal(0, 1, (3, int(lengths[0]), 20)), jnp.float32)
    listening = Listening(model.config, model.backbone, logits=logits)
    labels = jnp.asarray([[5, 6, -100, -100], [7, 0, 7, 8], [5, 6, 7, 8]])
    batch = {"input_values": jnp.zeros((3, 3200)), "attention_mask": mask, "labels": labels}
    loss = row.objective.loss(processor)({"model": listening}, batch, EVALUATION)
    apart = ctc_loss(logits, labels, lengths, blank=0, reduction="none")
    assert np.isfinite(apart).tolist() == [True, True, False]
    assert float(loss.total) == pytest.approx(float(apart[:2].sum()), rel=1e-6)
    assert int(loss.count) == 9
    assert listening.options["key"] is None
    assert listening.options["masked_group_norm"]


@pytest.mark.parametrize("turn", [TRAINING, EVALUATION], ids=["training", "evaluation"])
def test_text_is_smoothed_and_masked_in_training_alone(turn):
    """A language in front is read and not learnt, nor counted; right is what is right where there is a label."""
    frames, mask = jnp.asarray(np.random.default_rng(0).normal(0, 1, (2, 40, 80)), jnp.float32), jnp.ones((2, 40), int)
    extractor = SimpleNamespace(in_jax=lambda waveform, length: (frames, mask))
    labels = jnp.asarray([[9, 4, 5, 2], [9, 4, 2, -100]])
    likely = jax.nn.one_hot(jnp.asarray([[9, 4, 6, 2], [9, 4, 2, 0]]), 10)
    objective = objectives.Seq2Seq(
        features="filterbank", smoothing=0.1, augmentation=SpecAugmentPolicy(2, 27, 2, 20, 1.0)
    )
    for languages, count, right in (({}, 7, 6), ({"de": 9}, 5, 4)):
        processor = SimpleNamespace(feature_extractor=extractor, tokenizer=SimpleNamespace(lang_code_to_id=languages))
        listening = Listening(None, logits=likely, loss=jnp.asarray(2.0))
        batch = {"waveform": jnp.zeros((2, 9)), "length": jnp.asarray([9, 9]), "labels": labels}
        loss = objective.loss(processor)({"model": listening}, batch, turn)
        assert (int(loss.count), float(loss.total)) == (count, 2.0 * count)
        assert int(loss.metrics["accuracy"]) == right
        assert listening.options.get("ignore_prefix_size", 0) == len(languages)
        assert listening.options.get("label_smoothing") == (0.1 if turn.training else None)
        assert np.array_equal(listening.options["input_features"], frames) != turn.training
        assert (listening.options["key"] is None) != turn.training
        assert listening.options["batch_invariant"]


def test_a_text_fits_the_model():
    """Its tokens are below the vocabulary and no more than there are places; its end is written once."""
    kind = type(
        "Tokens", (), {"eos_token_id": 2, "__call__": lambda self, text: {"input_ids": [4, 9, *map(int, text.split())]}}
    )
    processor = SimpleNamespace(tokenizer=kind(), feature_extractor=SimpleNamespace(do_normalize=False))

    def learnt(text, **sizes):
        config = SimpleNamespace(**({"vocab_size": 10, "max_target_positions": 3} | sizes))
        return objectives.Seq2Seq().prepare(processor, config, np.zeros(9, np.float32), {"text": text}, None)["labels"]

    assert learnt("2").tolist() == learnt("2 ").tolist() == [4, 9, 2]
    assert learnt("3", max_target_positions=4).tolist() == [4, 9, 3, 2]
    with pytest.raises(UsageError, match="has 3 tokens, and the model has places for 2"):
        learnt("2", max_target_positions=2)
    with pytest.raises(UsageError, match="writes token 9, and the model knows 9"):
        learnt("2", vocab_size=9)


def test_masked_frames_are_counted_where_there_is_speech():
    """Of wav2vec 2.0: with the weights of its paper, and distractors among masked frames where nothing is drawn."""
    row, model, processor = tiny.small(recipe("wav2vec2_pretraining"))
    mask = (np.arange(6400) < np.array([[6400], [2000]])).astype(np.int32)
    batch = {"input_values": jnp.zeros((2, 6400)), "attention_mask": jnp.asarray(mask)}
    backbone = model.backbone
    valid = backbone.frame_mask(batch["attention_mask"], backbone.frame_lengths(6400))
    everywhere = SimpleNamespace(
        frame_lengths=backbone.frame_lengths,
        frame_mask=backbone.frame_mask,
        feature_extractor=None,
        draw_masks=lambda key, items, frames, valid: (jnp.ones((items, frames), bool), None),
    )
    output = SimpleNamespace(loss=1.0, keys=lambda: ())
    for turn in (TRAINING._replace(step=jnp.asarray(200_000)), EVALUATION):
        listening = Listening(model.config, everywhere)
        listening.__class__ = type(
            "L", (Listening,), {"__call__": lambda self, *a, **o: (Listening.__call__(self, *a, **o), output)[1]}
        )
        loss = row.objective.loss(processor)({"model": listening}, batch, turn)
        told = listening.options
        assert int(loss.count) == int(valid.sum())
        assert (told["features_pen_weight"], told["feature_grad_mult"]) == (10.0, 0.1)
        assert ("sampled_negative_indices" in told) != turn.training
        assert (told["key"] is None) != turn.training
        assert float(told["temperature"]) == pytest.approx(2.0 * 0.999995 ** int(turn.step), rel=1e-4)


def test_spectrograms_end_with_the_sound():
    """What is behind a recording is padding; two that are mixed are as long as the longer one."""
    extractor = SimpleNamespace(window=4, hop=2, padding=-9.0, in_jax=lambda waveform: waveform.reshape(2, 24, 2))
    waveform = jnp.asarray(np.random.default_rng(0).normal(0, 0.1, (2, 48)), jnp.float32)
    batch = {"waveform": waveform, "length": jnp.asarray([22, 50]), "labels": jnp.asarray([[1.0, 0.0], [0.0, 1.0]])}
    recipes = ASTRecipe(mixup_rate=1.0, frequency_mask=0, time_mask=0)
    listening = Listening(None, logits=jnp.asarray([[1.0, 0.0], [1.0, 0.0]]))

    def heard(turn, **changes):
        objective = objectives.Spectrogram(recipe=dataclasses.replace(recipes, **changes))
        given = batch if objective.several else batch | {"labels": jnp.asarray([0, 1])}
        loss = objective.loss(extractor)({"model": listening}, given, turn)
        padding = np.asarray(listening.heard[0] == -9.0).all(axis=2).sum(axis=1)
        return listening.heard[0], padding.tolist(), int(loss.metrics["accuracy"])

    alone, padded, right = heard(EVALUATION)
    assert (padded, right) == ([14, 0], 1)
    mixed, padded, _ = heard(TRAINING)
    assert padded == [0, 0]
    assert np.abs(mixed[1] - alone[1]).max() > 0.01
    one, padded, right = heard(TRAINING, problem_type="single_label_classification")
    assert (padded, right) == ([14, 0], 1)
    np.testing.assert_array_equal(one, alone)


def test_parts_are_cut_anywhere():
    """Of a recording longer than what is heard, the last place is flush with its end; a short one is filled up."""
    wave = np.arange(10_000, dtype=np.float32)
    for name in ("ast", "clap", "hifigan", "encodec"):
        row, model, processor = tiny.small(recipe(name))
        fields = {"label": "high", "text": "a bell"}
        kind = "input_values" if name == "encodec" else "waveform"
        if name == "clap":
            processor = SimpleNamespace(
                tokenizer=processor.tokenizer, feature_extractor=SimpleNamespace(truncation="", nb_max_samples=6000)
            )
        example = row.objective.prepare(processor, model.config, wave, fields, Last())
        last = np.ravel(example[kind])
        assert 0 < len(last) < 10_000
        np.testing.assert_array_equal(last, wave[-len(last) :])
        first = row.objective.prepare(processor, model.config, wave, fields, SimpleNamespace(integers=lambda stop: 0))
        np.testing.assert_array_equal(np.ravel(first[kind]), wave[: len(last)])
        if name != "clap":
            short = row.objective.prepare(processor, model.config, wave[1:50], fields, Last())
            np.testing.assert_array_equal(np.ravel(short[kind]), np.pad(wave[1:50], (0, len(last) - 49)))


def test_a_voice_learns_from_whole_frames():
    """One more than there are symbols, or than a segment has, at least."""
    voice, config = (
        VitsProcessor(VitsTokenizer(tiny.LETTERS, phonemize=False)),
        SimpleNamespace(hop_length=8, num_speakers=1),
    )
    objective = objectives.Voice(segment_frames=4)
    for samples, text, wanted in ((101, "a", 96), (9, "a", 40), (101, "abcdehilnosuw" * 2, None)):
        example = objective.prepare(voice, config, np.ones(samples, np.float32), {"text": text}, None)
        wanted = wanted or 8 * (len(example["input_ids"]) + 1)
        assert len(example["waveform"]) == example["waveform_lengths"] == wanted


def test_scales_of_clap_stay_in_their_bounds():
    keep = objectives._keep_scales()
    params = {"logit_scale_a": jnp.asarray(4.6), "logit_scale_t": jnp.asarray(0.1), "kernel": jnp.asarray(0.1)}
    changes = {"logit_scale_a": jnp.asarray(1.0), "logit_scale_t": jnp.asarray(-1.0), "kernel": jnp.asarray(-1.0)}
    after = optax.apply_updates(params, keep.update(changes, keep.init(params), params)[0])
    assert float(after["logit_scale_a"]) == pytest.approx(clap.LARGEST_LOGIT_SCALE)
    assert float(after["logit_scale_t"]) == 0.0
    assert float(after["kernel"]) == pytest.approx(-0.9)


def test_texts_are_cut_to_what_clap_reads():
    longest = []
    model = Listening(
        SimpleNamespace(text_length=5), audio_embeds=jnp.zeros((2, 3)), logits_per_audio=jnp.eye(2), loss=0.5
    )
    extractor = SimpleNamespace(in_jax=lambda waveform: longest.append(waveform.shape))
    batch = {
        "input_ids": jnp.ones((2, 16), int),
        "attention_mask": jnp.ones((2, 16), int),
        "waveform": jnp.zeros((2, 7)),
    }
    loss = objectives.Contrastive().loss(SimpleNamespace(feature_extractor=extractor))(
        {"model": model}, batch, EVALUATION
    )
    assert model.heard[0].shape == model.options["attention_mask"].shape == (2, 5)
    assert (float(loss.total), loss.count, int(loss.metrics["accuracy"])) == (1.0, 2, 2)
    assert longest == [(2, 7)]


@pytest.mark.parametrize(("channels", "share"), [(1, 2 / 3), (2, 1 / 2)])
def test_how_often_the_judge_of_a_codec_learns(channels, share):
    """EnCodec, §3.4: in two of three steps, in stereo in one of two, where its windows are twice as long as well."""
    row, model, _ = tiny.small(recipe("encodec"))
    config = dataclasses.replace(model.config, audio_channels=channels)
    codec = SimpleNamespace(config=config)
    codec = nnx.eval_shape(lambda: type(model)(config, rngs=nnx.Rngs(0))) if channels == 2 else model
    objective = dataclasses.replace(row.objective, judge={"filters": 1})
    task = objective.task(codec, EncodecFeatureExtractor(channels, 800), row.settings, run.Trainable())
    windows = [scale.n_fft for scale in task.networks["judge"].discriminators]
    assert windows == [channels * size for size in (2048, 1024, 512, 256, 128)]
    assert set(task.networks["balancer"].names) == {"time", "frequency", "adversarial", "feature"}
    optimizer, params = task.phases[1].optimizer, {"x": jnp.zeros(())}

    def step(state, _):
        updates, state = optimizer.update({"x": jnp.ones(())}, state, params)
        return state, updates["x"] != 0

    _, learnt = jax.jit(lambda state: jax.lax.scan(step, state, length=900))(optimizer.init(params))
    assert float(learnt[300:].mean()) == pytest.approx(share, abs=0.06)


def test_judges_hold_still_what_they_judge():
    """No gradient goes back into what was made, nor into what the features are compared with."""
    x = jnp.asarray([[0.5, 2.0]])
    for losses in (hifigan.discriminator_losses, vits.discriminator_losses):
        slopes = jax.grad(lambda real, fake, f=losses: f(lambda x: ([x], []), real, fake), (0, 1))(x, x)
        assert np.any(slopes[0])
        assert not np.any(slopes[1])
    slopes = jax.grad(lambda real, fake: hifigan.feature_loss([(real,)], [(fake,)]), (0, 1))(x, 2 * x)
    assert not np.any(slopes[0])
    assert np.any(slopes[1])


def test_a_judge_follows_its_singular_vectors():
    """HiFi-GAN's, at each of its turns."""
    row, model, processor = tiny.small(recipe("hifigan"))
    task = row.objective.task(model, processor, row.settings, run.Trainable())
    layer = task.networks["judge"].msd.discriminators[0].convs[0]
    before = np.asarray(layer.u[...])
    with pytest.raises(TypeError):
        task.phases[1].loss(task.networks, {}, TRAINING._replace(carried=()))
    assert np.abs(layer.u[...] - before).max() > 1e-4
