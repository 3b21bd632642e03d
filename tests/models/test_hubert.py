"""HuBERT without PyTorch: several sets of labels, training on units of its own making, and what is refused."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.fft
from flax import nnx

from audiozoo.audio.features import kaldi_fbank
from audiozoo.decoding.units import KMeans, cepstra, deduplicate, units
from audiozoo.errors import AudiozooError
from audiozoo.models import hubert
from audiozoo.models.hubert import HubertConfig
from audiozoo.processors.wav2vec2 import Wav2Vec2FeatureExtractor
from tests.models.random_model import random_model

TINY = HubertConfig(
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=24,
    conv_dim=(8, 8, 8),
    conv_kernel=(10, 8, 4),
    conv_stride=(5, 8, 4),
    feat_extract_norm="layer",
    conv_bias=True,
    do_stable_layer_norm=True,
    num_conv_pos_embeddings=6,
    num_conv_pos_embedding_groups=2,
    proj_codevector_dim=8,
    num_clusters=(4,),
    label_rate=100.0,
    mask_time_prob=0.5,
    mask_time_length=3,
    layerdrop=0.0,
)


def melody(seed: int = 0) -> np.ndarray:
    """A second of four tones, each a tenth of a second long."""
    tones = np.random.default_rng(seed).integers(0, 4, 10)
    pitch = np.repeat(300 * 2.0**tones, 1600)
    return np.sin(2 * np.pi * np.cumsum(pitch) / 16_000).astype(np.float32)


@pytest.mark.slow
def test_hidden_units_are_learned():
    """§3.4 in small: clusters of cepstra, masked prediction of them, and units out of the model itself."""
    wave = melody()
    labels = KMeans.fit(jax.random.key(0), cepstra(jnp.asarray(wave)), 4, iterations=20, starts=3)
    first = labels(cepstra(jnp.asarray(wave)))
    assert len(set(first.tolist())) == 4
    model = random_model(lambda rngs: hubert.HubertForPreTraining(TINY, rngs=rngs))
    graphdef, params = nnx.split(model)
    optimiser = optax.adam(1e-2)
    x, targets = jnp.asarray(wave)[None], jnp.asarray(first)[None]

    @jax.jit
    def train(params, state):
        def step(carry, number):
            params, state = carry

            def loss(p):
                return nnx.merge(graphdef, p)(x, None, targets, key=jax.random.key(number)).loss

            value, gradient = jax.value_and_grad(loss)(params)
            updates, state = optimiser.update(gradient, state)
            return (optax.apply_updates(params, updates), state), value

        return jax.lax.scan(step, (params, state), jnp.arange(80))

    (params, _), losses = train(params, optimiser.init(params))
    assert losses[-5:].mean() < 0.6 * losses[:5].mean()
    trained = nnx.merge(graphdef, params)
    processor = Wav2Vec2FeatureExtractor(do_normalize=False)
    again = KMeans(np.random.default_rng(0).standard_normal((5, 16)).astype(np.float32))
    found = units(trained, processor, wave, again, layer=1)
    assert found.shape == (trained.backbone.frame_lengths(16_000),)
    assert set(found.tolist()) <= set(range(5))
    with pytest.raises(ValueError, match="frames of 16 channels; these have 3"):
        again(np.zeros((2, 3), np.float32))


def test_sets_of_labels():
    two = dataclasses.replace(TINY, num_clusters=(4, 6), untie_final_proj=True)
    model = random_model(lambda rngs: hubert.HubertForPreTraining(two, rngs=rngs))
    x, spans = jnp.asarray(melody())[None], np.zeros((1, 99), bool)
    spans[:, 10:20] = True
    rng = np.random.default_rng(0)
    labels = [rng.integers(0, n, (1, 100)) for n in (4, 6)]
    run = jax.jit(lambda m, a, b, alpha: m(x, None, [a, b], mask_time_indices=spans, alpha=alpha), static_argnums=3)
    both = run(model, *labels, 1.0)
    assert [z.shape for z in both.logits] == [(1, 99, 4), (1, 99, 6)]
    half = run(model, *labels, 0.5)
    assert float(half.loss) == pytest.approx(float(both.masked_loss + both.unmasked_loss) / 2, rel=1e-5)
    with pytest.raises(ValueError, match="predicts 2 sets of labels; 1 are given"):
        model(x, None, labels[0], mask_time_indices=spans)
    with pytest.raises(ValueError, match="go up to 6; the model has 6 clusters"):
        model(x, None, [labels[0], labels[1] + 1], mask_time_indices=spans)
    with pytest.raises(ValueError, match="needs masks"):
        model(x, None, labels)


def test_padding_counts_neither_as_masked_nor_as_not():
    model = random_model(lambda rngs: hubert.HubertForPreTraining(TINY, rngs=rngs))
    x, mask = jnp.asarray(melody())[None], (jnp.arange(16_000) < 9000).astype(jnp.int32)[None]
    spans, labels = np.zeros((1, 99), bool), np.random.default_rng(0).integers(0, 4, (1, 100))
    spans[:, 50:60] = True
    out = jax.jit(lambda m: m(x, mask, labels, mask_time_indices=spans))(model)
    losses = -np.take_along_axis(np.asarray(jax.nn.log_softmax(out.logits[0])), labels[:, :99, None], axis=2)[0, :, 0]
    heard = int(model.backbone.frame_lengths(9000))
    assert 50 < heard < 60
    assert float(out.masked_loss) == pytest.approx(losses[50:heard].sum(), rel=1e-5)
    assert float(out.unmasked_loss) == pytest.approx(losses[:50].sum(), rel=1e-5)


def test_cepstra_are_a_cosine_transform_and_its_slopes():
    def slopes(x):
        near = [[x[np.clip(t + n, 0, len(x) - 1)] for n in range(-2, 3)] for t in range(len(x))]
        return np.array([(2 * (b - a) + d - c) / 10 for a, c, _, d, b in near])

    wave = np.random.default_rng(0).standard_normal(2_000).astype(np.float32)
    found = cepstra(jnp.asarray(wave))
    transformed = scipy.fft.dct(np.asarray(kaldi_fbank(jnp.asarray(wave), 23)), norm="ortho")[:, :13]
    wanted = transformed * (1 + 11 * np.sin(np.pi * np.arange(13) / 22))
    wanted = np.concatenate([wanted, slopes(wanted), slopes(slopes(wanted))], axis=1)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


def test_a_cluster_without_frames_stays_where_it_is():
    x = jnp.asarray([[1.0], [1.0], [5.0], [5.0]])  # two places for three clusters
    kmeans = KMeans.fit(jax.random.key(0), x, 3, iterations=5)
    assert set(np.ravel(kmeans.centroids).tolist()) == {1.0, 5.0}
    assert kmeans.spread(x) == 0.0
    with pytest.raises(ValueError, match="4 frames cannot be divided into 5 clusters"):
        KMeans.fit(jax.random.key(0), x, 5)


def test_runs_and_files_of_units(tmp_path):
    found, frames = deduplicate(np.array([3, 3, 1, 1, 1, 3]))
    np.testing.assert_array_equal(found, [3, 1, 3])
    np.testing.assert_array_equal(frames, [2, 3, 1])
    assert len(deduplicate(np.array([], int))[0]) == 0
    kmeans = KMeans(np.eye(3, 5))
    kmeans.save(tmp_path / "km.npz")
    np.testing.assert_array_equal(KMeans.load(tmp_path / "km.npz").centroids, np.eye(3, 5))
    (tmp_path / "no.npz").write_bytes(b"no")
    (tmp_path / "half.npz").write_bytes((tmp_path / "km.npz").read_bytes()[:150])
    (tmp_path / "empty.npy").touch()
    np.save(tmp_path / "letters.npy", np.full((3, 5), "a"))
    np.save(tmp_path / "nan.npy", np.full((3, 5), np.nan))
    for name, told in (
        ("no.npz", "no file of centroids"),
        ("half.npz", "no file of centroids"),
        ("empty.npy", "no file of centroids"),
        ("letters.npy", "no finite numbers"),
        ("nan.npy", "no finite numbers"),
    ):
        with pytest.raises(AudiozooError, match=told):
            KMeans.load(tmp_path / name)
    with pytest.raises(ValueError, match="2 frames cannot be divided into 3 clusters"):
        KMeans.fit(jax.random.key(0), jnp.zeros((2, 4)), 3)
