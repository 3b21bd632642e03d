"""HuBERT against PyTorch: taps, outputs and gradients of every class; masked prediction and files as fairseq's."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from audiozoo.decoding.units import KMeans, cepstra, deltas
from audiozoo.layers import activations
from audiozoo.layers.batch_norm import writable
from audiozoo.models import hubert
from tests.parity import harness, speech_family
from tests.parity.harness import blank
from tests.parity.speech_family import EVERYTHING, FRAMES, LAYER, NO_DROPOUT, TINY, from_s3prl, jitted, padded, waves
from weights_conversion import hubert as conversion

FAMILY = speech_family.Family("Hubert", "HubertConfig", hubert, conversion, TINY)
pair = FAMILY.pair
BATCH_NORM = LAYER | {"conv_pos_batch_norm": True}


@pytest.mark.parametrize(
    ("head", "changes"), [("ForCTC", BATCH_NORM), ("ForSequenceClassification", {"feat_proj_layer_norm": False})]
)
def test_every_tap_and_output(head, changes):
    reference, model, table = pair(head, **changes)
    x, mask = padded()
    taps = harness.compare_taps(
        reference,
        lambda: reference(torch.tensor(x), attention_mask=torch.tensor(mask), **EVERYTHING),
        model,
        lambda: model(jnp.asarray(x), jnp.asarray(mask), **EVERYTHING, hidden_states_before_norm=True),
        table,
        minimum=30,
    )
    harness.compare_outputs(taps.ours, taps.reference)


def test_bare_model_and_weighted_sum():
    x, mask = padded()
    for head, changes in (("Model", LAYER), ("ForSequenceClassification", {"use_weighted_layer_sum": True})):
        reference, model, _ = pair(head, seed=1, **changes)
        with torch.no_grad():
            theirs = reference(torch.tensor(x), attention_mask=torch.tensor(mask))
        harness.compare_outputs(jitted(model)(input_values=x, attention_mask=mask), theirs)


def test_ctc_gradients():
    reference, model, table = pair("ForCTC", **(NO_DROPOUT | BATCH_NORM | {"num_hidden_layers": 1}))
    x, mask = padded()
    labels = np.array([[3, 4, 4, 7, -100], [1, 2, 5, -100, -100]])
    chosen = speech_family.spans()
    with speech_family.reference_in_double(), speech_family.masked(reference.hubert, chosen):
        compared = harness.compare_gradients(
            reference,
            lambda: reference(torch.tensor(x), attention_mask=torch.tensor(mask), labels=torch.tensor(labels)).loss,
            model,
            jax.jit(
                lambda m: (
                    m(
                        jnp.asarray(x), jnp.asarray(mask), jnp.asarray(labels), mask_time_indices=jnp.asarray(chosen)
                    ).loss
                )
            ),
            table,
        )
    assert "hubert.masked_spec_embed" in compared


def test_batch_norm_in_training():
    """By the batch's statistics, padding included, as in PyTorch: loss, every gradient, and the running statistics."""
    changes = NO_DROPOUT | BATCH_NORM | {"num_hidden_layers": 1, "mask_time_prob": 0.0}
    reference, model, table = pair("ForCTC", seed=4, **changes)
    reference.train()
    arrays = (*padded(), np.array([[3, 4, 4, 7, -100], [1, 2, 5, -100, -100]]))
    x, mask, labels = map(jnp.asarray, arrays)
    theirs = dict(zip(("input_values", "attention_mask", "labels"), map(torch.tensor, arrays), strict=True))
    key = jax.random.key(0)

    @jax.jit
    def loss(m):
        graphdef, params, rest = nnx.split(m, nnx.Param, ...)
        return nnx.merge(graphdef, params, writable(rest))(x, mask, labels, key=key).loss

    with speech_family.reference_in_double():
        compared = harness.compare_gradients(
            reference,
            lambda: reference(**theirs).loss,
            model,
            loss,
            table,
        )
    assert "hubert.encoder.pos_conv_embed.batch_norm.scale" in compared

    @jax.jit
    def moved(m):
        m = nnx.merge(*nnx.split(m))
        m(x, mask, key=key)
        return m

    after = moved(model).hubert.encoder.pos_conv_embed
    wanted = reference.hubert.encoder.pos_conv_embed.batch_norm
    harness.assert_close(after.batch_norm.mean, wanted.running_mean, name="running mean")
    harness.assert_close(after.batch_norm.var, wanted.running_var, name="running variance")
    before = model.hubert.encoder.pos_conv_embed
    assert np.any(np.asarray(before.batch_norm.mean[...]) != np.asarray(after.batch_norm.mean[...]))
    assert int(after.num_batches_tracked[...]) == int(before.num_batches_tracked[...]) + 1


def test_mutations_are_noticed():
    reference, model, _ = pair("ForCTC", **BATCH_NORM)
    x = waves(1)
    with torch.no_grad():
        theirs = reference(torch.tensor(x))
    mutations = [
        *harness.perturbations(model, count=2, exclude=r".*(masked_spec_embed|num_batches_tracked)"),
        harness.dropped(model, "hubert.encoder.pos_conv_embed.batch_norm.mean"),
        harness.Replaced(activations.ACTIVATIONS, "gelu", activations.gelu_tanh),
    ]
    check = lambda: harness.compare_outputs(jitted(model)(input_values=x), theirs)  # noqa: E731
    assert harness.assert_detects(check, mutations) == 4


# --- masked prediction -----------------------------------------------------------------------------------------------


def nce_by_brute_force(states, embeddings, targets, counted, temperature=0.1):
    """The objective as the released code arranges it: the truth first, then all classes, its duplicate struck out."""
    total = 0.0
    for b, t in zip(*np.nonzero(counted), strict=True):
        if targets[b, t] < 0:
            continue
        own = embeddings[targets[b, t]]
        candidates = np.concatenate([own[None], embeddings])
        cosine = candidates @ states[b, t] / np.linalg.norm(candidates, axis=1) / np.linalg.norm(states[b, t])
        logits = cosine / temperature
        logits[1 + targets[b, t]] = -np.inf
        total += np.log(np.exp(logits).sum()) - logits[0]
    return total


def test_masked_prediction_is_cross_entropy_over_all_clusters():
    rng = np.random.default_rng(0)
    states, embeddings = rng.standard_normal((2, 7, 5)), rng.standard_normal((9, 5))
    targets = rng.integers(-1, 9, (2, 7))
    targets[targets < 0] = -100
    counted = rng.random((2, 7)) < 0.6
    found, count = hubert.masked_prediction(*map(jnp.asarray, (states, embeddings, targets, counted)))
    harness.assert_close(found, nce_by_brute_force(states, embeddings, targets, counted))
    assert count == (counted & (targets >= 0)).sum() > 0


@pytest.mark.parametrize("ratio", [1.0, 2.0, 0.7])
def test_labels_of_another_rate(ratio):
    labels = np.arange(20)[None]
    found = np.asarray(hubert.targets_of_frames(jnp.asarray(labels), 24, ratio))[0]
    index = (torch.arange(24).float() * ratio).long().numpy()  # the released code
    known = index < 20
    np.testing.assert_array_equal(found[known], labels[0, index[known]])
    assert (found[~known] == -100).all()


# --- fairseq ---------------------------------------------------------------------------------------------------------

SETTINGS = {
    "_name": "hubert",
    "label_rate": 800,  # of 16 kHz by 20 samples a frame: one label a frame
    "conv_feature_layers": "[(16, 10, 5)] + [(12, 3, 2)] * 1 + [(18,2,2)]",
    "encoder_layers": 2,
    "encoder_embed_dim": 24,
    "encoder_ffn_embed_dim": 40,
    "encoder_attention_heads": 3,
    "conv_pos": 8,
    "conv_pos_groups": 3,
    "final_dim": 6,
    "logit_temp": 0.1,
    "mask_prob": 0.8,
    "dropout": 0.0,
    "attention_dropout": 0.0,
}


@pytest.fixture(scope="module")
def fairseq_hubert():
    """The pure-PyTorch copy of fairseq's HuBERT, which takes its layers from that of wav2vec 2.0."""
    from_s3prl("wav2vec2/wav2vec2_model.py")
    return from_s3prl("hubert/hubert_model.py")


@pytest.mark.parametrize(("layered", "untied"), [(False, True), (True, False)], ids=["base", "large"])
def test_fairseqs_own_model_and_its_file(fairseq_hubert, layered, untied, tmp_path, monkeypatch):
    """Both sets of labels, masked and other frames: the losses of fairseq's forward, read from its own file."""
    from audiozoo.loading import convert

    changes = {"layer_norm_first": layered, "extractor_mode": "layer_norm" if layered else "default"}
    settings = SETTINGS | changes | {"conv_bias": layered, "untie_final_proj": untied}
    sizes = (5, 7)
    with harness.precision("float32"):
        config = fairseq_hubert.HubertConfig(**{k: v for k, v in settings.items() if k != "_name"})
        task = fairseq_hubert.HubertPretrainingConfig()
        reference = fairseq_hubert.HubertModel(config, task, [range(n) for n in sizes])
        reference = harness.randomise(reference, 6, torch.float32)
        torch.save({"model": reference.state_dict(), "cfg": {"model": settings}}, tmp_path / "hubert.pt")
        assert conversion.recognise(tmp_path / "hubert.pt")
        foreign = conversion.open_checkpoint(tmp_path / "hubert.pt")
        assert foreign.model_class == "HubertForPreTraining"
        assert foreign.config.num_clusters == (12,)  # the file does not say how they divide
        assert (foreign.config.label_rate, foreign.config.mask_time_prob) == (800.0, 0.8)
        parts = dataclasses.replace(foreign.config, num_clusters=sizes)
        table = conversion.hubert_fairseq_table(parts, "HubertForPreTraining")
        model = blank(lambda: hubert.HubertForPreTraining(parts, rngs=nnx.Rngs(0)))
        harness.port(reference, model, table)
        if not untied:
            loaded = convert(foreign, hubert.HubertForPreTraining)
            np.testing.assert_array_equal(loaded.label_embeddings[...], model.label_embeddings[...])
        x = waves().astype(np.float32)
        chosen = speech_family.spans()
        monkeypatch.setattr(fairseq_hubert, "compute_mask_indices", lambda *a, **k: chosen)
        rng = np.random.default_rng(2)
        labels = [rng.integers(0, n, (2, FRAMES)) for n in sizes]
        with torch.no_grad():
            nothing = torch.zeros(x.shape, dtype=torch.bool)
            theirs = reference(torch.tensor(x), [torch.tensor(row) for row in labels], padding_mask=nothing)
            wanted = {
                kind: sum(
                    torch.nn.functional.cross_entropy(z, torch.zeros(len(z), dtype=torch.long), reduction="sum")
                    for z in theirs[f"logit_{kind}_list"]
                )
                for kind in "mu"
            }
        run = jax.jit(lambda m: m(jnp.asarray(x), None, labels, mask_time_indices=chosen, features_pen_weight=10.0))
        ours = run(model)
        harness.assert_close(ours.masked_loss, wanted["m"], name="masked")
        harness.assert_close(ours.unmasked_loss, wanted["u"], name="unmasked")
        harness.assert_close(ours.features_pen, theirs["features_pen"], name="penalty")
        whole = wanted["m"] + 10 * theirs["features_pen"] * chosen.sum()
        harness.assert_close(ours.loss, whole, name="loss")
    if not untied:
        return
    # Both losses weighted, and every gradient, in double precision.
    reference = reference.double()
    model = blank(lambda: hubert.HubertForPreTraining(parts, param_dtype=jnp.float64, rngs=nnx.Rngs(0)))
    harness.port(reference, model, table)
    wave, rows = torch.tensor(x).double(), [torch.tensor(row) for row in labels]

    def total():
        out = reference(wave, rows, padding_mask=nothing)
        m, u = (
            sum(torch.logsumexp(z, 1).sum() - z[:, 0].sum() for z in out[f"logit_{kind}_list"]) for kind in ("m", "u")
        )
        return 0.7 * m + 0.3 * u + 10 * out["features_pen"] * chosen.size

    options = {"labels": labels, "mask_time_indices": chosen, "alpha": 0.7, "features_pen_weight": 10.0}
    ours = jax.jit(lambda m: m(jnp.asarray(wave.numpy()), **options).loss)
    with speech_family.reference_in_double():
        compared = harness.compare_gradients(reference, total, model, ours, table)
    assert {"final_proj.kernel", "label_embeddings", "hubert.masked_spec_embed"} <= set(compared)


# --- cepstra and clusters --------------------------------------------------------------------------------------------


def test_cepstra_are_kaldis():
    """13 coefficients by definition: the orthonormal cosine transform of the log-mel energies, liftered."""
    from scipy.fft import dct

    from audiozoo.audio.features import kaldi_fbank

    wave = jnp.asarray(np.random.default_rng(0).standard_normal(8000))
    energies = np.asarray(kaldi_fbank(wave, 23))
    wanted = dct(energies, norm="ortho", axis=1)[:, :13] * (1 + 11 * np.sin(np.pi * np.arange(13) / 22))
    found = np.asarray(cepstra(wave))
    assert found.shape == (48, 39)
    harness.assert_close(found[:, :13], wanted)
    # Slopes: least squares through five frames.
    padded_frames = np.pad(wanted, ((2, 2), (0, 0)), mode="edge")
    line = [np.polyfit(np.arange(-2, 3), padded_frames[t : t + 5], 1)[0] for t in range(48)]
    harness.assert_close(found[:, 13:26], np.array(line))
    harness.assert_close(found[:, 26:], np.asarray(deltas(jnp.asarray(np.array(line)))))


def test_kmeans_and_its_file(tmp_path):
    """As good as scikit-learn's, and scikit-learn's own file is read without running anything in it."""
    cluster = pytest.importorskip("sklearn.cluster", reason="librosa brings scikit-learn; here it is missing")
    joblib = pytest.importorskip("joblib", reason="librosa brings joblib; here it is missing")
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((8, 4)) * 4)[rng.integers(0, 8, 600)] + rng.standard_normal((600, 4))
    theirs = cluster.MiniBatchKMeans(8, n_init=3, random_state=0, batch_size=600).fit(x)
    ours = KMeans.fit(jax.random.key(0), jnp.asarray(x), 8, iterations=30, starts=4)
    assert ours.spread(jnp.asarray(x)) <= 1.01 * theirs.inertia_ / len(x)
    joblib.dump(theirs, tmp_path / "km.bin")
    read = KMeans(conversion.read_kmeans(tmp_path / "km.bin"))
    np.testing.assert_array_equal(read.centroids, theirs.cluster_centers_)
    np.testing.assert_array_equal(read(jnp.asarray(x)), theirs.predict(x))
    (tmp_path / "text.bin").write_text("no pickle")
    with pytest.raises(ValueError, match="no uncompressed joblib file"):
        conversion.read_kmeans(tmp_path / "text.bin")


# --- sizes and files -------------------------------------------------------------------------------------------------

LARGE = LAYER | {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
XLARGE = LAYER | {"hidden_size": 1280, "num_hidden_layers": 48, "num_attention_heads": 16, "intermediate_size": 5120}


@pytest.mark.parametrize(
    ("name", "changes", "count"), [("base", {}, 94.4), ("large", LARGE, 315.4), ("xlarge", XLARGE, 962.5)]
)
def test_published_sizes(name, changes, count):
    config = getattr(hubert.HubertConfig, name)()
    with harness.precision("float32"):
        found = harness.assert_same_shapes(
            lambda: transformers.HubertForCTC(transformers.HubertConfig(**changes)),
            lambda: hubert.HubertForCTC(config, rngs=nnx.Rngs(0)),
            conversion.hugging_face_table(config, "HubertForCTC"),
        )
    assert found / 1e6 == pytest.approx(count, abs=0.1)


def test_full_size_in_float32():
    with harness.precision("float32"):
        reference = transformers.HubertForCTC(transformers.HubertConfig(num_hidden_layers=3))
        reference = harness.randomise(reference, 0, torch.float32)
        _, model, _ = FAMILY.ported(reference, "HubertForCTC")
        x = waves(1, 16_000).astype(np.float32)
        with torch.no_grad():
            theirs = reference(torch.tensor(x))
        harness.compare_outputs(jitted(model)(input_values=x), theirs)


@pytest.mark.parametrize("head", ["Model", "ForCTC"])
def test_hugging_face_directories(head, tmp_path):
    FAMILY.round_trip(head, tmp_path, **BATCH_NORM)


def test_dropouts():
    reference, model, _ = pair("ForCTC", **harness.rates(transformers.HubertConfig()), **BATCH_NORM)
    harness.compare_in_training(reference, model, {"input_values": waves()})
