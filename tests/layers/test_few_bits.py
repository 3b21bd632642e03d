"""What must not be counted in few bits is not, and what is divided by a length may have none."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from audiozoo.layers import Conv1d, Dropout, Embed, Linear, abstract
from audiozoo.layers.alignment import repeat_by_duration
from audiozoo.layers.basic import unit_vectors
from audiozoo.layers.batch_norm import BatchNorm
from audiozoo.layers.convolution import ConvTranspose1d
from audiozoo.layers.positions import cosines_and_sines
from audiozoo.layers.splines import rational_quadratic_spline
from audiozoo.layers.weight_norm import weight_normalised
from audiozoo.models import (
    audio_spectrogram_transformer,
    bark,
    clap,
    conformer,
    ecapa_tdnn,
    encodec,
    hifigan,
    mbart,
    musicgen,
    seamless_m4t_v2,
    sew,
    speech_resynthesis,
    speecht5,
    swin,
    unispeech_sat,
    vits,
    wav2vec2,
    wavlm,
    whisper,
)
from audiozoo.models.t5 import T5LayerNorm
from tests.models import tiny_speecht5, tiny_vits
from tests.training import small_plans


def test_frames_are_counted_beyond_256_in_bfloat16():
    durations, values = np.array([[200, 101, 3]]), jnp.asarray([[[1.0], [2.0], [3.0]]], jnp.bfloat16)
    (repeated,) = repeat_by_duration(jnp.asarray(durations, jnp.bfloat16), 400, values)
    assert repeated.dtype == jnp.bfloat16
    wanted = np.repeat([1.0, 2.0, 3.0, 0.0], [200, 101, 3, 96])
    np.testing.assert_array_equal(np.asarray(repeated[0, :, 0], np.float32), wanted)


def test_positions_beyond_256_differ_in_bfloat16():
    exact = cosines_and_sines(jnp.array([1000, 1001, 1002]), 8, dtype=jnp.float32)
    rounded = cosines_and_sines(jnp.array([1000, 1001, 1002]), 8, dtype=jnp.bfloat16)
    np.testing.assert_array_equal(rounded, exact.astype(jnp.bfloat16))


def test_a_vector_of_zeros_has_a_gradient():
    x = jnp.array([[3.0, 4.0], [0.0, 0.0]])
    np.testing.assert_allclose(unit_vectors(x), [[0.6, 0.8], [0.0, 0.0]], rtol=1e-6)
    assert np.isfinite(jax.grad(lambda x: unit_vectors(x).sum())(x)).all()


READERS = {
    "Linear": lambda: Linear(4, 4, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)),
    "Conv1d": lambda: Conv1d(4, 4, 3, padding=1, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)),
    "ConvTranspose1d": lambda: ConvTranspose1d(4, 4, 1, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)),
    "BatchNorm": lambda: BatchNorm(4, dtype=jnp.bfloat16),
    "T5LayerNorm": lambda: T5LayerNorm(4, epsilon=1e-6, dtype=jnp.bfloat16, param_dtype=jnp.float32),
    "Embed": lambda: Embed(2, 4, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)),
}


@pytest.mark.parametrize("name", READERS)
def test_gradients_of_what_all_frames_share_are_sums_in_float32(name):
    """256 + 1 is 256 in bfloat16: of thousands of frames a bias, a scale or a token would see the first few."""
    layer, rng = READERS[name](), np.random.default_rng(0)
    x = jnp.asarray(rng.choice([-1.0, 1.0], (16, 1024, 4)), jnp.float32)
    slopes = jnp.asarray(rng.normal(1, 1, x.shape), jnp.bfloat16)

    @jax.jit
    def gradient(layer, x, slopes):
        return jax.grad(lambda layer: (layer(x) * slopes).astype(jnp.float32).sum())(layer)

    shared = {"Embed": "embedding", "T5LayerNorm": "scale"}.get(name, "bias")
    frames = jnp.ones(x.shape[:2], int) if name == "Embed" else x
    # Before its scale, the norm of x is x, which is 1 or -1.
    terms = slopes * x.astype(slopes.dtype) if shared == "scale" else slopes
    found = getattr(gradient(layer, frames, slopes), shared)[...].reshape(-1, 4)[-1]
    wanted = terms.astype(jnp.float32).sum((0, 1))
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_statistics_of_bfloat16_arrive():
    """A tenth of the way at each step, they would stop halfway, at steps that bfloat16 rounds to none."""
    norm = BatchNorm(2, param_dtype=jnp.bfloat16)
    x = 100 + jax.random.normal(jax.random.key(0), (64, 2), jnp.bfloat16)
    for _ in range(80):
        assert norm(x, train=True).dtype == jnp.bfloat16
    wanted = np.asarray(x, np.float32)
    np.testing.assert_allclose(norm.mean[...], wanted.mean(axis=0), rtol=1e-3)
    np.testing.assert_allclose(norm.var[...], wanted.var(axis=0, ddof=1), rtol=2e-2)
    assert norm(x).dtype == jnp.bfloat16


def test_batches_are_normalised_in_float32():
    """A mean that is large beside the deviation is not rounded before it is subtracted."""
    norm, x = BatchNorm(1, dtype=jnp.bfloat16), 100 + 0.1 * np.random.default_rng(0).standard_normal((64, 1))
    norm.mean[...], norm.var[...] = jnp.asarray([x.mean()], jnp.float32), jnp.asarray([x.var()], jnp.float32)
    found = norm(jnp.asarray(x, jnp.float32))
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(found, np.float64), (x - x.mean()) / x.std(), atol=0.02)


def test_a_weight_is_rounded_once():
    v = jax.random.normal(jax.random.key(0), (7, 256, 32), jnp.bfloat16)
    g = jax.random.uniform(jax.random.key(1), (1, 1, 32), jnp.bfloat16, 0.5, 2)
    wide = np.asarray(v, np.float64)
    exact = wide * np.asarray(g, np.float64) / np.sqrt(np.square(wide).sum(axis=(0, 1), keepdims=True))
    found = np.asarray(weight_normalised(g, v, 2), np.float64)
    np.testing.assert_allclose(found, exact, rtol=0.51 * float(jnp.finfo(jnp.bfloat16).eps))


def test_a_spline_of_rounded_bins_is_evaluated_in_float32():
    """Its knots are cumulative sums, and its inverse the root of a difference."""
    shapes = ((200, 1), (200, 1, 10), (200, 1, 10), (200, 1, 9))
    x, *bins = (3 * jax.random.normal(jax.random.key(i), s, jnp.bfloat16) for i, s in enumerate(shapes))
    for found, wanted in zip(
        rational_quadratic_spline(x, *bins, reverse=True),
        rational_quadratic_spline(*(a.astype(jnp.float32) for a in (x, *bins)), reverse=True),
        strict=True,
    ):
        np.testing.assert_array_equal(found, wanted)


def test_scores_that_are_summed_over_frames_are_float32(monkeypatch):
    """SpeechT5's CTC, whose prefixes add up the logarithms of hundreds of frames."""
    seen = []

    def scorer(log_probs, *more):
        seen.append(log_probs.dtype)
        raise InterruptedError

    monkeypatch.setattr(speecht5, "PrefixScorer", scorer)
    config = speecht5.SpeechT5Config(**tiny_speecht5.SIZES | {"ctc_weight": 0.5})
    model = abstract(lambda rngs: speecht5.SpeechT5ForSpeechToText(config, dtype=jnp.bfloat16, rngs=rngs))
    with pytest.raises(InterruptedError):
        jax.eval_shape(lambda model: model.generate(jnp.zeros((1, 2000)), ctc_weight=0.5), model)
    assert seen == [jnp.float32]


def test_losses_are_float32():
    half = partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    assert jax.eval_shape(clap.tagging_loss, half((2, 5)), half((2, 5))).dtype == jnp.float32
    lasting = jax.eval_shape(
        speech_resynthesis.duration_error, half((2, 5)), jnp.ones((2, 5), int), jnp.ones((2, 5), bool)
    )
    assert lasting.dtype == jnp.float32
    config = encodec.EncodecConfig.encodec_24khz()
    model = abstract(lambda rngs: encodec.EncodecLanguageModel(config, dtype=jnp.bfloat16, rngs=rngs))
    codes = jax.ShapeDtypeStruct((1, 2, 9), jnp.int32)
    assert jax.eval_shape(encodec.language_model_loss, model, codes).dtype == jnp.float32
    balancer = encodec.Balancer({"time": 1.0})
    slopes = jnp.asarray(np.random.default_rng(0).standard_normal((1, 4000)), jnp.bfloat16)
    _, state = balancer({"time": slopes}, balancer.init())
    np.testing.assert_allclose(state.norms["time"], np.linalg.norm(np.asarray(slopes, np.float64)), rtol=1e-5)


def test_counts_of_codebook_entries_move_by_hundredths():
    """Of 1,000 rows a count of 900 learns 1 at a step, which is none in bfloat16."""
    config = encodec.EncodecConfig(hidden_size=2, codebook_size=2, target_bandwidths=(1.5,), num_filters=1)
    quantizer = encodec.EncodecResidualVectorQuantizer(config, dtype=None, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    z = jnp.tile(jnp.asarray([[1.0, 0.0], [-1.0, 0.0]], jnp.bfloat16), (1, 1000, 1))
    quantizer.embed[...] = jnp.broadcast_to(z[0, :2], quantizer.embed.shape)
    quantizer.embed_avg[...] = 900.0 * quantizer.embed[...]
    quantizer.cluster_size[...], quantizer.inited[...] = quantizer.cluster_size[...] + 900.0, quantizer.inited[...] + 1

    @jax.jit
    def step(quantizer):
        return quantizer.train_step(z, 1, key=jax.random.key(0)).codebooks

    for _ in range(100):
        quantizer.replace(step(quantizer))
    wanted = 1000 - 100 * 0.99**100
    np.testing.assert_allclose(quantizer.cluster_size[...][0], wanted, rtol=1e-4)
    assert quantizer.embed.dtype == jnp.bfloat16


def sums_in_few_bits(program):
    """How many terms each sum of a program has that is taken in bfloat16."""
    for equation in program.eqns:
        name, arguments = equation.primitive.name, [v.aval for v in equation.invars]
        if name in ("reduce_sum", "cumsum", "scatter-add") and arguments[0].dtype == jnp.bfloat16:
            terms, sums = arguments[-1].size, equation.outvars[0].aval.size
            yield terms if name == "cumsum" else terms / sums
        for inner in jax.tree.leaves(tuple(equation.params.values()), is_leaf=lambda value: hasattr(value, "eqns")):
            if hasattr(inner, "eqns"):
                yield from sums_in_few_bits(getattr(inner, "jaxpr", inner))


HALF, SMALL = {"dtype": jnp.bfloat16}, small_plans.CONFIGURATIONS
NEAR = {"left_max_position_embeddings": 2, "right_max_position_embeddings": 1}
KEYED = conformer.ConformerConfig(8, 1, 2, 8, position_embeddings_type="relative_key", **NEAR)
SPEAKERS = ecapa_tdnn.EcapaTdnnConfig(8, 8, 4, (2,), 2, 4, 4, global_context=True)
VOICES = {"condition_dim": 4, "upsample_initial_channel": 8, "upsample_rates": (2,), "upsample_kernel_sizes": (4,)}
VOICES |= {"model_in_dim": 8, "resblock_kernel_sizes": (3,), "resblock_dilation_sizes": ((1,),)}
GATED = wavlm.WavLMConfig(hidden_size=8, num_attention_heads=2, num_conv_pos_embedding_groups=2)
APART = sew.SEWConfig(hidden_size=8, num_attention_heads=2, num_conv_pos_embedding_groups=2)
TAKEN = jnp.zeros((1, 16, 100), int)
SHARED = {  # what many frames have in common: a module, and its call with 64 of them, 8 wide
    "WavLM's gates": (
        lambda rngs: wavlm.WavLMAttention(GATED, **HALF, rngs=rngs),
        lambda module, x: module(x, jnp.ones((2, 64, 64), x.dtype))[0],
    ),
    "distances beyond SpeechT5's": (
        lambda rngs: Linear(8, 8, **HALF, rngs=rngs),
        lambda module, x: speecht5.relative_scores(module(x)[None], jnp.ones((6, 8))),
    ),
    "distances beyond a Conformer's": (
        lambda rngs: conformer.ConformerSelfAttention(KEYED, **HALF, rngs=rngs),
        lambda module, x: module(x)[0],
    ),
    "distances beyond SEW-D's": (
        lambda rngs: sew.DisentangledSelfAttention(APART, **HALF, rngs=rngs),
        lambda module, x: module(x, x[0, :4], np.repeat(np.arange(4), [60, 3, 4, 60]))[0],
    ),
    "windows of Swin": (
        lambda rngs: swin.WindowAttention(8, 2, 2, **HALF, rngs=rngs),
        lambda module, x: module(x.reshape(16, 4, 8), np.zeros((16, 4, 4)), Dropout(None))[0],
    ),
    "fusion in CLAP": (
        lambda rngs: clap.AttentionalFusion(8, 2, False, **HALF, param_dtype=jnp.float32, rngs=rngs),
        lambda module, x: module(x, x, False, jnp.ones(1, bool)),
    ),
    "squeeze-excitation": (
        lambda rngs: ecapa_tdnn.SqueezeExcitation(SPEAKERS, **HALF, rngs=rngs),
        lambda module, x: module(x),
    ),
    "the whole in ECAPA-TDNN": (
        lambda rngs: ecapa_tdnn.AttentiveStatisticsPooling(SPEAKERS, **HALF, rngs=rngs),
        lambda module, x: module(x),
    ),
    "a voice in VITS": (
        lambda rngs: vits.VitsWaveNet(dataclasses.replace(tiny_vits.CONFIG, hidden_size=8), 2, **HALF, rngs=rngs),
        lambda module, x: module(x, jnp.ones((1, 64, 1), x.dtype), x[:, :1, :4]),
    ),
    "a voice in HiFi-GAN": (
        lambda rngs: hifigan.HifiGanGenerator(hifigan.HifiGanConfig(**VOICES), **HALF, rngs=rngs),
        lambda module, x: module(x, x[:, :1, :4]),
    ),
    "a melody in MusicGen": (
        lambda rngs: musicgen.MusicgenMelodyForConditionalGeneration(SMALL["musicgen"][1], **HALF, rngs=rngs),
        lambda module, x: module.encode_melody(x.reshape(1, -1)[:, None, :12]),
    ),
    "distractors": (
        lambda rngs: wav2vec2.Wav2Vec2ForPreTraining(SMALL["wav2vec2"][1], **HALF, rngs=rngs),
        lambda module, x: (
            module(jnp.pad(x.reshape(1, -1), ((0, 0), (0, 4608))), None, jnp.ones((1, 16), bool), TAKEN).loss
        ),
    ),
    "instances of a batch": (
        lambda rngs: Linear(8, 8, **HALF, rngs=rngs),
        lambda module, x: unispeech_sat.utterance_contrastive_loss(
            x, module(x), jnp.zeros((1, 64, 100), int), jnp.ones((1, 64), bool)
        ),
    ),
    "characters that last 32 units each": (
        lambda rngs: seamless_m4t_v2.SeamlessM4Tv2TextToUnitForConditionalGeneration(
            SMALL["seamless_m4t_v2"][1], **HALF, rngs=rngs
        ),
        lambda module, x: (
            module(
                jnp.zeros((1, 4, 16), jnp.bfloat16),
                jnp.ones((1, 16), int),
                jnp.full((1, 4), 4),
                durations=jnp.full((1, 16), 32),
                frames=512,
            ).last_hidden_state
        ),
    ),
    "EnCodec's language model": (
        lambda rngs: encodec.EncodecLanguageModel(SMALL["encodec"][1], **HALF, rngs=rngs),
        lambda module, x: encodec.language_model_loss(module, jnp.ones((1, 1, 30), int)),
    ),
    # What 64 recordings have in common.
    "positions in Whisper": (
        lambda rngs: whisper.WhisperEncoder(SMALL["whisper"][1], **HALF, param_dtype=jnp.float32, rngs=rngs),
        lambda module, x: module(jnp.zeros((64, 8, 100))).last_hidden_state,
    ),
    "positions in mBART": (
        lambda rngs: mbart.MBartForCausalLM(SMALL["xls_r"][1].decoder, **HALF, rngs=rngs),
        lambda module, x: module(jnp.zeros((64, 2), int)).logits,
    ),
    "positions in AST": (
        lambda rngs: audio_spectrogram_transformer.ASTModel(
            SMALL["audio_spectrogram_transformer"][1], **HALF, rngs=rngs
        ),
        lambda module, x: module(jnp.zeros((64, 48, 16))).last_hidden_state,
    ),
    "positions in Bark": (
        lambda rngs: bark.BarkSemanticModel(SMALL["bark"][1], **HALF, rngs=rngs),
        lambda module, x: module(inputs_embeds=x.swapaxes(0, 1)).logits,
    ),
    "history in Bark": (
        lambda rngs: bark.BarkSemanticModel(SMALL["bark"][1], **HALF, rngs=rngs),
        lambda module, x: module.prompt(
            jnp.zeros((64, 8), int), jnp.zeros((1, 8), int), bark.BarkSemanticGenerationConfig()
        ),
    ),
}


@pytest.mark.parametrize("name", SHARED)
def test_what_many_frames_share_learns_from_sums_in_float32(name):
    create, call = SHARED[name]
    x = jax.ShapeDtypeStruct((1, 64, 8), jnp.bfloat16)

    def loss(module, x):
        return call(module, x).astype(jnp.float32).sum()

    program = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(abstract(create), x)
    assert max(sums_in_few_bits(program.jaxpr), default=1) <= 8
