"""CLAP without PyTorch: shapes, the loss on many devices, training, processor, and how it is used."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from audiozoo import checkpoints, sharding
from audiozoo.audio.files import write
from audiozoo.commands import hearing
from audiozoo.errors import AudioError, CheckpointError, SourceError, UsageError
from audiozoo.layers import Dropout
from audiozoo.layers.batch_norm import BatchNorm, writable
from audiozoo.models import clap, roberta, swin
from audiozoo.processors.clap import ClapFeatureExtractor, ClapProcessor
from audiozoo.recipes import recipe
from audiozoo.text.roberta_tokenizer import RobertaTokenizer
from audiozoo.training.data import collate
from audiozoo.training.loop import Turn
from tests import processes
from tests.models.random_model import random_model
from tests.shapes import enforce
from tests.text.tiny_bpe import MERGES, vocabulary
from weights_conversion.clap import ORIGINAL_TABLE, hugging_face_table

RATE = 2_000  # Hz of the tiny processor, whose ten seconds are two
WORDS = {"low": "a low hum", "high": "the high whistle", "noise": "wind in the trees"}
TEXT = roberta.RobertaConfig(
    vocab_size=300,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=32,
    max_position_embeddings=60,  # fewer than the 77 that texts are padded to where they fit
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)
AUDIO = clap.ClapAudioConfig(
    window_size=4,
    num_mel_bins=16,
    spec_size=32,
    hidden_size=16,
    depths=(2, 1),
    num_attention_heads=(2, 2),
    patch_embeds_hidden_size=8,
    hidden_dropout_prob=0.0,
)


def tiny(seed: int = 0, **audio) -> clap.ClapModel:
    """Random weights; the temperatures as they start."""
    config = clap.ClapConfig(TEXT, dataclasses.replace(AUDIO, **audio), projection_dim=12)
    table = hugging_face_table(config, "ClapModel") if not audio else ORIGINAL_TABLE
    model = random_model(lambda rngs: clap.ClapModel(config, rngs=rngs), table, seed)
    for scale in (model.logit_scale_a, model.logit_scale_t):
        scale[...] = jnp.full_like(scale[...], np.log(config.logit_scale_init_value))
    return model


def inputs(batch: int = 2, views: int = 1, seed: int = 0) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    return {
        "input_ids": jnp.asarray(rng.integers(3, 300, (batch, 7)), jnp.int32),
        "input_features": jnp.asarray(rng.standard_normal((batch, views, 60, 16)), jnp.float32),
        "is_longer": jnp.asarray(np.arange(batch)[:, None] % 2 == 0),
        "attention_mask": jnp.ones((batch, 7), jnp.int32),
    }


def tiny_processor(fusion: bool = False) -> ClapProcessor:
    """Two seconds at 2 kHz: 61 frames of 66 samples, 16 mel bands."""
    extract = ClapFeatureExtractor(
        16, RATE, 66, 2, 128, frequency_max=1000, truncation="fusion" if fusion else "rand_trunc"
    )
    return ClapProcessor(extract, RobertaTokenizer.from_vocabulary(vocabulary(), MERGES))


def sound(kind: str, seed: int, seconds: float = 2.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    time = np.arange(int(seconds * RATE)) / RATE
    if kind == "noise":
        return rng.uniform(-0.5, 0.5, len(time)).astype(np.float32)
    frequency = rng.uniform(60, 120) if kind == "low" else rng.uniform(600, 900)
    return (0.5 * np.sin(2 * np.pi * frequency * time) + rng.normal(0, 0.01, len(time))).astype(np.float32)


# --- shapes, sizes, mistakes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fusion", [None, "iaff_1d", "aff_2d"])
def test_the_annotations_hold(monkeypatch, fusion):
    for module in (clap, swin, roberta):
        assert enforce(monkeypatch, module)
    model = tiny(enable_fusion=fusion is not None, fusion_type=fusion, tagging_head=True, num_classes=5)
    x = inputs(views=4 if fusion else 1)
    out = jax.eval_shape(lambda: model(**x, return_loss=True, output_attentions=True, output_hidden_states=True))
    assert out.logits_per_audio.shape == (2, 2)
    assert out.audio_model_output.hidden_states[-1].shape == (2, 16, 4, 4)
    tags = jax.eval_shape(lambda: model.audio_model.tag(x["input_features"], x["is_longer"]))
    assert tags.framewise_output.shape == (2, AUDIO.frames, 5)


def test_the_tagging_loss_is_the_mean_binary_cross_entropy():
    rng = np.random.default_rng(0)
    logits, targets = rng.normal(0, 2, (3, 5)).astype(np.float32), rng.integers(0, 2, (3, 5))
    p = 1 / (1 + np.exp(-logits.astype(np.float64)))
    wanted = -np.mean(np.where(targets, np.log(p), np.log(1 - p)))
    assert float(clap.tagging_loss(logits, targets)) == pytest.approx(wanted, rel=1e-6)


def test_mistakes_get_a_sentence():
    x = inputs()
    with pytest.raises(UsageError, match="no fusion named 'sum'"):
        tiny(enable_fusion=True, fusion_type="sum")
    with pytest.raises(UsageError, match="end at 16"):
        clap.ClapAudioConfig(depths=(1, 1), patch_embeds_hidden_size=8, hidden_size=24)
    model, fused = tiny(), tiny(enable_fusion=True)
    with pytest.raises(UsageError, match=r"takes \(batch, 4"):
        fused(**x)
    with pytest.raises(UsageError, match="is_longer"):
        fused.audio_model(jnp.zeros((1, 4, 60, 16)))
    with pytest.raises(UsageError, match=r"takes \(batch, 1, frames, 16\)"):
        model.get_audio_features(jnp.zeros((1, 1, 60, 64)))
    with pytest.raises(UsageError, match="2 depths and 1 counts of heads"):
        tiny(num_attention_heads=(2,))
    for layout in ({"spec_size": 8}, {"spec_size": 36}, {"num_mel_bins": 4}):
        with pytest.raises(UsageError, match="does not fold into"):
            tiny(**layout)
    for shape in ((0, 1, 60, 16), (1, 1, 0, 16)):
        with pytest.raises(UsageError, match="at least one of each"):
            model.get_audio_features(jnp.zeros(shape))
    with pytest.raises(UsageError, match="is_longer speaks of 3 items; there are 1"):
        fused.audio_model(jnp.zeros((1, 4, 60, 16)), jnp.ones((3, 1), bool))
    for tokens in ((0, 5), (1, 0), (5,)):
        with pytest.raises(UsageError, match="tokens have shape"):
            model.get_text_features(jnp.zeros(tokens, jnp.int32))
    with pytest.raises(UsageError, match=r"mask has shape \(2, 4\); \(2, 5\) is expected"):
        model.get_text_features(jnp.zeros((2, 5), jnp.int32), jnp.ones((2, 4), jnp.int32))
    with pytest.raises(UsageError, match="65 frames"):
        model.get_audio_features(jnp.zeros((1, 1, 65, 16)))
    with pytest.raises(UsageError, match="no tagging head"):
        model.audio_model.tag(x["input_features"])
    with pytest.raises(UsageError, match="not pairs"):
        jax.eval_shape(lambda: model(x["input_ids"][:1], x["input_features"], return_loss=True))
    with pytest.raises(UsageError, match="59 tokens"):
        model.get_text_features(jnp.zeros((1, 59), jnp.int32))
    with pytest.raises(AudioError, match="2 channels"):
        clap.embed_audio(model, tiny_processor(), np.zeros((2, RATE), np.float32), sampling_rate=RATE)
    for wrong, words in (
        ({"top": 0}, "top is 0"),
        ({"labels": []}, "no label"),
        ({"labels": ["a", " "]}, "label is empty"),
        ({"labels": ["caf\udce9"]}, r"caf\\udce9\.' is no text in UTF-8"),
        ({"template": "x"}, "no {}"),
    ):
        with pytest.raises(UsageError, match=words):
            clap.zero_shot(model, tiny_processor(), sound("low", 0), **({"labels": ["a"]} | wrong))
    with pytest.raises(UsageError, match="no label"):
        clap.caption_of_labels([])


@pytest.mark.slow
def test_vmap_padding_and_a_batch_agree():
    """Each item by itself, its text without the padding that the batch gives it."""
    model, x = tiny(), inputs(3)
    longest, lengths = x["input_ids"].shape[1], (7, 4, 5)
    mask = jnp.arange(longest) < jnp.asarray(lengths)[:, None]
    ids = jnp.where(mask, x["input_ids"], TEXT.pad_token_id)
    texts = jax.jit(lambda m, i, k: m.get_text_features(i, k).pooler_output)(model, ids, mask.astype(jnp.int32))
    for row, length in enumerate(lengths):
        alone = model.get_text_features(ids[row : row + 1, :length]).pooler_output[0]
        np.testing.assert_allclose(texts[row], alone, rtol=1e-5, atol=1e-6)
    sounds = jax.jit(lambda m, i: m.get_audio_features(i).pooler_output)(model, x["input_features"])
    rows = jax.vmap(lambda i: model.get_audio_features(i[None]).pooler_output[0])(x["input_features"])
    np.testing.assert_allclose(rows, sounds, rtol=1e-5, atol=1e-6)


def test_captions_of_labels():
    assert clap.caption_of_labels(["rain"]) == "The sounds of rain"
    assert clap.caption_of_labels(["rain", "wind"]) == "The sounds of rain and wind"
    assert clap.caption_of_labels(["rain", "wind", "birds"]) == "The sounds of rain, wind, and birds"


def test_batch_norm_leaves_masked_items_out_of_its_statistics():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 5, 3)), jnp.float32)
    kept, alone, none = BatchNorm(3), BatchNorm(3), BatchNorm(3)
    masked = kept(x, True, jnp.array([True, False, True, False]))
    np.testing.assert_allclose(masked[::2], alone(x[::2], True), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(kept.var[...], alone.var[...], rtol=1e-6)
    np.testing.assert_allclose(kept.mean[...], 0.1 * x[::2].mean((0, 1)), rtol=1e-5, atol=1e-7)
    none(x, True, jnp.zeros(4, bool))
    np.testing.assert_array_equal(none.var[...], np.ones(3))


def test_a_native_checkpoint_keeps_both_towers(tmp_path):
    model = tiny(enable_fusion=True, fusion_type="iaff_2d")
    saved = json.loads(json.dumps(dataclasses.asdict(model.config)))
    checkpoints.save({"scale": jnp.ones(1)}, tmp_path / "native", {"model_class": "ClapModel", "config": saved})
    read = checkpoints.read_config(tmp_path / "native")["config"]
    assert clap.ClapConfig(**read) == model.config


# --- the loss, on one device and on eight ----------------------------------------------------------------------------

SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import PartitionSpec as P
from audiozoo import sharding
from audiozoo.models.clap import contrastive_loss, mlp_contrastive_loss, normalize
from tests.models.test_clap import inputs, tiny

rng = np.random.default_rng(0)
audio, text, audio_mlp, text_mlp = (normalize(jnp.asarray(rng.standard_normal((16, 6)), jnp.float32)) for _ in range(4))
mesh = sharding.make_mesh({"data": 8})
rows, worst = P("data"), 0.0

def over_devices(loss, count):
    spread = jax.shard_map(
        lambda *x: loss(*x, 3.0, 5.0, axis_name="data"), mesh=mesh, in_specs=(rows,) * count, out_specs=P()
    )
    return jax.jit(jax.value_and_grad(spread, argnums=tuple(range(count))))

for loss, arrays in ((contrastive_loss, (audio, text)), (mlp_contrastive_loss, (audio, text, audio_mlp, text_mlp))):
    count = len(arrays)
    alone = jax.jit(jax.value_and_grad(lambda *x: loss(*x, 3.0, 5.0), argnums=tuple(range(count))))(*arrays)
    together = over_devices(loss, count)(*arrays)
    worst = max(worst, *(float(jnp.abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, (alone, together)))))
model, x = tiny(depths=(1,), hidden_size=8, num_attention_heads=(2,)), inputs(8)
step = jax.jit(lambda m, x: m(**x, return_loss=True).loss)
alone = step(model, x)
laid_out, place = sharding.shard(model, mesh), sharding.batch_sharding(mesh)
together = step(laid_out, jax.tree.map(lambda a: jax.device_put(a, place), x))
print(max(worst, float(jnp.abs(alone - np.asarray(together)))))
"""


@pytest.mark.slow
def test_eight_devices_give_the_loss_and_gradients_of_one():
    assert float(processes.output("-c", SHARDED)) < 1e-5


EVALUATED = """
import jax
from audiozoo import sharding
from audiozoo.recipes import recipe
from audiozoo.training.data import Whole
from audiozoo.training.loop import Trainer
from audiozoo.training.parameters import Trainable
from tests.models.test_clap import inputs, tiny, tiny_processor

def measured(batches, **options):
    model, row = tiny(depths=(1,), hidden_size=8, num_attention_heads=(2,)), recipe("clap")
    trainer = Trainer(row.objective.task(model, tiny_processor(), row.settings, Trainable()), **options)
    return trainer.evaluate(trainer.init(), batches)

cut = lambda *ends: [{n: a[s:e] for n, a in inputs(11).items()} for s, e in zip((0, *ends), ends)]
found = [measured(cut(11)), measured(cut(4, 8, 11)), measured(cut(10, 11))]
first, rest = cut(8, 11)
found.append(measured([first, Whole(rest)], mesh=sharding.make_mesh({"data": 8})))
print(max(abs(one[name] - found[0][name]) for one in found for name in ("loss", "accuracy")))
"""


@pytest.mark.slow
def test_an_evaluation_tells_all_pairs_apart_whatever_batches_and_devices():
    """A batch that eight devices do not divide comes in two parts, of which each held fewer texts to choose from."""
    assert float(processes.output("-c", EVALUATED)) < 1e-5


@pytest.mark.parametrize("mlps", [False, True])
def test_all_pairs_of_an_evaluation_have_the_loss_of_a_batch(mlps):
    config = clap.ClapConfig(TEXT, AUDIO, projection_dim=12, embedding_mlps=mlps)
    model, x = clap.ClapModel(config, rngs=nnx.Rngs(0)), inputs(5)
    output = jax.jit(lambda model, x: model(**x, return_loss=True))(model, x)
    found = clap.told_apart(model, output.audio_embeds, output.text_embeds)
    assert float(found["loss"]) == pytest.approx(float(output.loss), rel=1e-5)
    assert float(found["accuracy"]) == np.mean(output.logits_per_audio.argmax(axis=-1) == np.arange(5))


def test_the_loss_by_hand():
    """Two pairs: -log of each one's own share, in both directions."""
    audio, text = np.eye(2, dtype=np.float32), np.array([[0.8, 0.6], [0.0, 1.0]], np.float32)
    products = 3.0 * audio @ text.T
    rows = [-np.log(np.exp(products[i, i]) / np.exp(products[i]).sum()) for i in (0, 1)]
    columns = [-np.log(np.exp(products[i, i]) / np.exp(products[:, i]).sum()) for i in (0, 1)]
    loss = clap.contrastive_loss(jnp.asarray(audio), jnp.asarray(text), jnp.float32(3), jnp.float32(3))
    assert float(loss) == pytest.approx(np.mean(rows + columns), rel=1e-6)


def test_an_embedding_of_zeros_has_a_gradient():
    value, gradient = jax.value_and_grad(lambda x: clap.normalize(x).sum())(jnp.zeros(3))
    assert float(value) == 0
    assert np.isfinite(gradient).all()


# --- training and use ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained() -> tuple[clap.ClapModel, ClapProcessor, list[float]]:
    """A tiny CLAP taught in some seconds that hums are low, whistles high, and wind is noise; and its losses."""
    processor = tiny_processor()
    model = tiny(depths=(1, 1))
    kinds = list(WORDS)
    tokens = processor(text=[clap.PROMPT.replace("{}", WORDS[kind]) for kind in kinds])
    batches = [[sound(kind, 10 * i + j) for j, kind in enumerate(kinds)] for i in range(8)]
    features = np.stack([processor(audio=batch, sampling_rate=RATE)["input_features"] for batch in batches])
    optimiser = optax.adam(3e-3)
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    state = optimiser.init(params)

    @jax.jit
    def step(params, rest, state, features):
        def loss(params):
            trained = nnx.merge(graphdef, params, writable(rest))
            output = trained(
                tokens["input_ids"],
                features,
                attention_mask=tokens["attention_mask"],
                return_loss=True,
                key=jax.random.key(0),
            )
            return output.loss, nnx.state(trained, nnx.Not(nnx.Param))

        (value, rest), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = optimiser.update(gradient, state, params)
        return optax.apply_updates(params, updates), rest, state, value

    losses = []
    for count in range(100):
        params, rest, state, value = step(params, rest, state, features[count % len(features)])
        losses.append(float(value))
    return clap.clamp_logit_scales(nnx.merge(graphdef, params, rest)), processor, losses


@pytest.mark.slow
def test_training_lowers_the_loss_and_words_find_sounds(trained):
    model, processor, losses = trained
    assert np.mean(losses[-8:]) < 0.2 * np.mean(losses[:3])
    assert float(model.logit_scale_a[...]) <= np.log(100) + 1e-6
    assert np.abs(np.asarray(model.audio_model.audio_encoder.batch_norm.mean[...])).max() > 1  # dB, far from 0
    for seed in (101, 102):
        for kind, words in WORDS.items():
            answer = clap.zero_shot(model, processor, sound(kind, seed), list(WORDS.values()), 2, sampling_rate=RATE)
            assert answer[0][0] == words, (kind, answer)
            assert len(answer) == 2
            assert 1.0 > answer[0][1] > answer[1][1] > 0.0


def test_a_long_sound_has_one_embedding(trained):
    model, processor, _ = trained
    long = np.concatenate([sound("low", 1), sound("noise", 2, 3.3)])
    first = clap.embed_audio(model, processor, long, sampling_rate=RATE)
    np.testing.assert_array_equal(first, clap.embed_audio(model, processor, long, sampling_rate=RATE))
    window = processor.feature_extractor.nb_max_samples
    starts = (0, window, len(long) - window)
    parts = [clap.embed_audio(model, processor, long[s : s + window], sampling_rate=RATE) for s in starts]
    mean = np.mean(parts, axis=0)
    np.testing.assert_allclose(first, mean / np.linalg.norm(mean), atol=1e-6)


def test_clamping_touches_the_scales_alone():
    model = tiny()
    model.logit_scale_t[...] = jnp.float32(9.0)
    model.logit_scale_a[...] = jnp.float32(-2.0)
    clamped = clap.clamp_logit_scales(model)
    assert float(clamped.logit_scale_t[...]) == pytest.approx(np.log(100))
    assert float(clamped.logit_scale_a[...]) == 0.0
    before, after = (m.text_projection.linear1.kernel[...] for m in (model, clamped))
    np.testing.assert_array_equal(before, after)


def test_a_model_that_fuses_learns_from_four_views():
    """§3.4 in training: what is longer is seen whole and through windows drawn anew; what is not, is not fused.

    And a text without end is cut to the tokens that it is cut to in use.
    """
    processor, objective = tiny_processor(fusion=True), recipe("clap").objective
    model = tiny(enable_fusion=True, depths=(1,), hidden_size=8, num_attention_heads=(2,))
    rng, waves = np.random.default_rng(0), (sound("high", 0, 5.0), sound("low", 1, 1.0))
    draw = [
        [
            objective.prepare(processor, model.config, wave, {"text": text}, rng)
            for wave, text in zip(waves, ("the dog", "the dog " * 99), strict=True)
        ]
        for _ in "ab"
    ]
    longest = TEXT.longest_text  # of which the batch has more, by its padding
    assert [int(example["attention_mask"].sum()) for example in draw[0]] == [len(draw[0][0]["input_ids"]), longest]
    batch, other = (collate(examples, objective.padding(processor), 10_000) for examples in draw)
    assert batch["input_features"].shape == (2, 4, 61, 16)
    assert batch["is_longer"].tolist() == [[True], [False]]
    np.testing.assert_array_equal(batch["input_features"][0, 0], other["input_features"][0, 0])  # the shrunk whole
    assert (batch["input_features"][0, 1:] != other["input_features"][0, 1:]).any(axis=(1, 2)).all()
    np.testing.assert_array_equal(batch["input_features"][1], other["input_features"][1])
    turn = Turn(step=jnp.int32(0), key=jax.random.key(0), training=False)
    found, wanted = jax.jit(
        lambda model, x: (
            objective.loss(processor)({"model": model}, x, turn),
            model(
                x["input_ids"][:, :longest],
                x["input_features"],
                x["is_longer"],
                x["attention_mask"][:, :longest],
                return_loss=True,
            ),
        )
    )(model, jax.tree.map(jnp.asarray, batch))
    assert float(found.total) == pytest.approx(2 * float(wanted.loss), rel=1e-5)


def test_frames_and_bands_are_hidden_in_training(monkeypatch):
    x = jnp.ones((300, 2, 50, 16))
    for axis, widest in ((2, 20), (3, 8)):
        y = np.moveaxis(np.asarray(clap.drop_stripes(x, jax.random.key(0), axis, widest)), axis, 1)
        assert (y == y[:, :, :1, :1]).all()  # the same in every view and along the other axis
        hidden = y[:, :, 0, 0] == 0
        assert hidden.sum(axis=1).max() <= 2 * (widest - 1)
        assert 0.8 < hidden.sum() / (300 * 2 * (widest - 1) / 2) <= 1  # two spans, half the widest, some of it shared
        edges = (np.diff(hidden.astype(int), axis=1) != 0).sum(axis=1)
        assert edges.max() == 4
        assert hidden[:, [0, -1]].any()
        assert len({tuple(row) for row in hidden.tolist()}) > 100
    drawn, draw = [], clap.drop_stripes
    monkeypatch.setattr(clap, "drop_stripes", lambda *given: drawn.append(given[2:]) or draw(*given))
    model, features = tiny(spec_augment=True), jnp.zeros((1, 1, 60, 16))
    encode = jax.eval_shape(lambda: model.audio_model(features))
    assert not drawn
    graphdef, state = nnx.split(model.audio_model)
    trained = jax.eval_shape(lambda s: nnx.merge(graphdef, writable(s))(features, key=jax.random.key(0)), state)
    assert drawn == [(2, 64), (3, 8)]
    assert trained.pooler_output.shape == encode.pooler_output.shape


def test_a_probe_tells_classes_from_embeddings():
    rng = np.random.default_rng(0)
    x, labels = rng.normal(size=(60, 6)).astype(np.float32), np.arange(60) % 3
    x[np.arange(60), labels] += 4
    probe = clap.fit_probe(x, labels, 3, steps=200)
    assert (np.asarray(probe(x)).argmax(axis=1) == labels).mean() > 0.95
    several = np.stack([x[:, 0] > 1, x[:, 1] > 1], axis=1).astype(np.float32)
    tags = clap.fit_probe(x, several, 2, steps=200)
    assert ((np.asarray(tags(x)) > 0) == several).mean() > 0.9
    with pytest.raises(UsageError, match="60 embeddings and labels of shape"):
        clap.fit_probe(x, labels[:9], 3)


def test_the_recipe_warms_up_and_decays():
    optimiser = clap.ClapRecipe(warmup_steps=10).optimizer(100)
    params = {"w": jnp.ones(())}
    state, sizes = optimiser.init(params), []
    update = jax.jit(optimiser.update)
    for _ in range(100):
        change, state = update({"w": jnp.ones(())}, state, params)
        sizes.append(-float(change["w"]))
    assert sizes[0] == 0.0
    assert max(sizes) == pytest.approx(1e-4, rel=1e-3)
    assert np.argmax(sizes) == 10
    assert sizes[-1] < 1e-6


def test_deeper_blocks_are_dropped_more_often():
    """From never, at the first block, evenly up to the rate, through all stages."""
    encoder = nnx.eval_shape(lambda: tiny(depths=(2, 1), drop_path_rate=0.3).audio_model.audio_encoder)
    rates = [block.drop_path_rate for stage in encoder.layers for block in stage.blocks]
    np.testing.assert_allclose(rates, [0.0, 0.15, 0.3])


def test_dropout_and_stochastic_depth_need_a_key():
    block = swin.SwinBlock(4, (4, 4), 2, 4, shifted=False, drop_path_rate=0.5, dropout=0.3, rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((6, 4, 4, 4)), jnp.float32)
    run = jax.jit(lambda key: block(x, Dropout(key))[0])
    one, two, again, still = run(jax.random.key(1)), run(jax.random.key(2)), run(jax.random.key(1)), run(None)
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - two).max() > 1e-3
    assert np.abs(one - still).max() > 1e-3
    branch = jax.jit(lambda key: swin.drop_path(jnp.ones((64, 2)), 0.25, Dropout(key)))(jax.random.key(0))
    assert {round(float(v), 5) for v in np.unique(branch)} == {0.0, round(1 / 0.75, 5)}
    assert (branch[:, 0] == branch[:, 1]).all()


def test_swin_parts_are_sharded_like_any_transformer():
    mesh = sharding.make_mesh({"data": 1, "tensor": 1}, jax.devices()[:1])
    specs = sharding.shardings_for(nnx.state(tiny(), nnx.Param), mesh, sharding.TRANSFORMER)
    block = specs["audio_model"]["audio_encoder"]["layers"][0]["blocks"][0]
    assert block["attention"]["q_proj"]["kernel"].spec[1] == "tensor"
    assert block["mlp"]["fc2"]["kernel"].spec[0] == "tensor"


# --- processor -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("waveform", "rate", "message"),
    [
        (np.zeros(0, np.float32), RATE, "empty"),
        (np.full(99, np.nan, np.float32), RATE, "not finite|NaN"),
        (np.zeros((4000, 2), np.float32), RATE, "channel"),
        (np.zeros(99, np.int16), RATE, "int"),
        (np.zeros(99, np.float32), 16_000, "16000|16,000"),
    ],
    ids=["empty", "nan", "stereo", "integer", "rate"],
)
def test_unusable_audio_gets_a_sentence(waveform, rate, message):
    with pytest.raises(AudioError, match=message):
        tiny_processor()(audio=waveform, sampling_rate=rate)


def test_processor_mistakes(tmp_path):
    processor = tiny_processor()
    with pytest.raises(UsageError, match="text, audio, or both"):
        processor()
    with pytest.raises(UsageError, match="'audios' is an option of audio"):
        processor(text="a dog", audios=sound("low", 0))
    with pytest.raises(UsageError, match="crops"):
        processor(audio=sound("low", 0), sampling_rate=RATE, crops="best")
    with pytest.raises(UsageError, match="truncation"):
        ClapFeatureExtractor(truncation="cut")
    with pytest.raises(UsageError, match="several lengths"):
        processor(text=["the dog", "a"], padding=False)
    with pytest.raises(UsageError, match="no padding"):
        processor(text="a", padding="left")
    with pytest.raises(SourceError, match=r"preprocessor_config\.json"):
        ClapProcessor.from_directory(tmp_path)
    (tmp_path / "config.json").write_text('{"audio_config": {"enable_fusion": true}}')
    assert ClapFeatureExtractor.from_directory(tmp_path).truncation == "fusion"
    with pytest.raises(SourceError, match=r"merges\.txt"):
        ClapProcessor.from_directory(tmp_path)(text="a dog")
    (tmp_path / "preprocessor_config.json").write_text('{"feature_extractor_type": "ASTFeatureExtractor"}')
    with pytest.raises(CheckpointError, match="ASTFeatureExtractor"):
        ClapFeatureExtractor.from_directory(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        RobertaTokenizer.from_directory(tmp_path)


def test_processor_there_and_back(tmp_path):
    processor = tiny_processor(fusion=True)
    processor.save(tmp_path)
    back = ClapProcessor.from_directory(tmp_path)
    assert vars(back.feature_extractor) == vars(processor.feature_extractor)
    given = {"text": ["the dog", "a"], "audio": sound("low", 0, 3.0), "sampling_rate": RATE}
    ours, theirs = processor(**given), back(**given)
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
    assert ours["input_features"].shape == (1, 4, 61, 16)
    assert ours["is_longer"].tolist() == [[True]]
    assert back.decode(ours["input_ids"][0], skip_special_tokens=True) == "the dog"
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary()), encoding="utf-8")
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in MERGES), encoding="utf-8")
    spelt = ClapProcessor.from_directory(tmp_path)
    np.testing.assert_array_equal(spelt(text=["the dog", "a"])["input_ids"], ours["input_ids"])


def test_features_inside_a_compiled_program():
    """LAION's, rounded to 16 bits, of which a quiet sound leaves little."""
    extract = ClapFeatureExtractor.laion(fusion=False)
    waveform = np.random.default_rng(0).uniform(-1e-4, 1e-4, 480_000).astype(np.float32)
    inside = np.asarray(jax.jit(extract.in_jax)(jnp.asarray(waveform[None])))
    outside = extract(waveform, sampling_rate=48_000)["input_features"]
    np.testing.assert_allclose(inside, outside, atol=2e-2, rtol=0)  # dB; float32 against float64
    extract.quantize = False
    assert np.abs(inside - np.asarray(jax.jit(extract.in_jax)(jnp.asarray(waveform[None])))).max() > 0.5


# --- embeddings kept on disk -----------------------------------------------------------------------------------------


def test_embeddings_are_kept_until_a_file_changes(tmp_path, capsys):
    files = [tmp_path / f"{name}.wav" for name in "abc"]
    for index, file in enumerate(files):
        write(file, sound("low", index), RATE)
    asked = []

    def compute(file: Path) -> np.ndarray:
        asked.append(file.name)
        if file.name == "b.wav":
            raise AudioError("It is not a sound.")
        return np.full(3, len(asked), np.float32)

    cache = tmp_path / "kept" / "one.npz"
    found, rows = hearing.embeddings_of(files, compute, cache)
    assert [f.name for f in found] == ["a.wav", "c.wav"]
    assert "b.wav: It is not a sound." in capsys.readouterr().err
    assert list(cache.parent.iterdir()) == [cache]  # nothing half-written stays
    write(files[2], sound("low", 9, 1.0), RATE)
    again, second = hearing.embeddings_of(files, compute, cache)
    assert asked == ["a.wav", "b.wav", "c.wav", "b.wav", "c.wav"]
    np.testing.assert_array_equal(rows[0], second[0])
    assert again == found
    packed = bytearray(cache.read_bytes())
    packed[packed.index(b"PK\x01\x02") + 10] = 99  # compressed by a method that nobody knows
    with cache.open("wb") as other:
        np.save(other, np.zeros(3))
    array = cache.read_bytes()
    np.savez(cache, keys=np.asarray(["a", "b"]), embeddings=np.zeros(2))  # of another program
    for damaged in (b"damaged", bytes(packed), array, cache.read_bytes()):
        cache.write_bytes(damaged)
        hearing.embeddings_of(files[:1], compute, cache)
        assert asked.pop() == "a.wav"
        hearing.embeddings_of(files[:1], compute, cache)
        assert len(asked) == 5

    def beside(file: Path) -> np.ndarray:
        hearing.embeddings_of(files[2:], compute, cache)
        return compute(file)

    cache.unlink()
    hearing.embeddings_of(files[:1], beside, cache)
    asked.clear()
    hearing.embeddings_of([files[0], files[2]], compute, cache)
    assert not asked  # of two searches at a time neither's are lost
    before = hearing._identity(cache)  # a file, as of a checkpoint of LAION's
    (cache.parent / "preprocessor_config.json").write_text("{}")
    assert hearing._identity(cache) != before
