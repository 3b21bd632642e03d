"""VITS against `transformers` (synthesis), and against Piper's copy of the authors' code (training, discriminators)."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import json
import sys
import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

import audiozoo
import audiozoo.loading
from audiozoo.layers.weight_norm import fold_weight_norm
from audiozoo.loading import convert
from audiozoo.models import vits
from audiozoo.models.hifigan import discriminator_loss, feature_loss, generator_loss
from audiozoo.models.vits import VitsConfig, VitsModel
from tests.models.alignment_search import brute_force_alignment
from tests.parity import harness
from weights_conversion import ForeignCheckpoint
from weights_conversion.hifigan import WEIGHT_NORM_RENAMES, period_rules, scale_rules
from weights_conversion.rules import Rule, Table
from weights_conversion.vits import (
    config_from_hugging_face,
    config_from_tensors,
    hugging_face,
    hugging_face_table,
    original_table,
)

TINY = {
    "vocab_size": 20,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "window_size": 2,
    "ffn_dim": 24,
    "flow_size": 8,
    "spectrogram_bins": 9,
    "num_speakers": 3,
    "speaker_embedding_size": 5,
    "upsample_initial_channel": 16,
    "upsample_rates": [4, 2],
    "upsample_kernel_sizes": [8, 4],
    "resblock_kernel_sizes": [3, 5],
    "resblock_dilation_sizes": [[1], [2]],
    "duration_predictor_flow_bins": 4,
    "duration_predictor_num_flows": 2,
    "duration_predictor_filter_channels": 12,
    "depth_separable_num_layers": 2,
    "prior_encoder_num_flows": 2,
    "prior_encoder_num_wavenet_layers": 2,
    "posterior_encoder_num_wavenet_layers": 2,
    "wavenet_dilation_rate": 2,
}
RATE = {True: 30.0, False: 0.2}  # random weights predict long durations, or short ones
IDS = np.random.default_rng(0).integers(0, 20, (2, 7))
MASK = np.array([[1] * 7, [1] * 5 + [0] * 2])
NOISE = np.random.default_rng(1).standard_normal((2, 7, 2))
PRIOR_NOISE = np.random.default_rng(2).standard_normal((2, 4096, 8))


def double(config):
    return VitsModel(config, param_dtype=jnp.float64, rngs=nnx.Rngs(0))


@functools.cache
def pair(stochastic: bool = True):
    config = transformers.VitsConfig(
        **TINY, use_stochastic_duration_prediction=stochastic, speaking_rate=RATE[stochastic]
    )
    reference = harness.randomise(transformers.VitsModel(config), 0)
    ours = config_from_hugging_face(config.to_dict())
    table = hugging_face_table(ours)
    return reference, harness.ported(reference, lambda: double(ours), table), table


@contextlib.contextmanager
def noises(duration: np.ndarray, prior: np.ndarray):
    """The original's two draws, replaced."""

    def like(x: torch.Tensor) -> torch.Tensor:
        return torch.tensor(prior[: x.shape[0], : x.shape[2]].swapaxes(1, 2))

    with (
        mock.patch("torch.randn", lambda *shape: torch.tensor(duration.swapaxes(1, 2)).reshape(shape)),
        mock.patch("torch.randn_like", like),
    ):
        yield


def reference_call(reference, rows=slice(None), length=None, **kwargs):
    with noises(NOISE[rows, :length], PRIOR_NOISE[rows]), torch.no_grad():
        return reference(
            torch.tensor(IDS[rows, :length]),
            attention_mask=torch.tensor(MASK[rows, :length]),
            speaker_id=1,
            **kwargs,
        )


def our_call_without_masks(model, frames):
    """Synthesis with a decoder that knows no lengths, as the original's."""
    speaker = model.speaker_embedding(1)
    encoded, durations = model.encode(IDS, MASK, speaker, duration_noise=jnp.asarray(NOISE))
    prior, noise = (encoded.prior_means, encoded.prior_log_variances), jnp.asarray(PRIOR_NOISE[:, :frames])
    z, _ = model.latents(*prior, durations, speaker, frames=frames, prior_noise=noise)
    return model.decode(z, None, speaker), z


def test_synthesis_tap_by_tap():
    reference, model, table = pair()
    frames = reference_call(reference).spectrogram.shape[2]
    taps = harness.compare_taps(
        reference,
        lambda: reference_call(reference),
        model,
        lambda: our_call_without_masks(model, frames),
        table,
        minimum=86,
        compiled=True,
    )
    waveform, z = taps.ours
    harness.assert_close(waveform, taps.reference.waveform, name="waveform")
    harness.assert_close(z, taps.reference.spectrogram.transpose(1, 2), name="spectrogram")


def test_deterministic_duration_predictor_and_its_gradients():
    reference, model, table = pair(False)
    hidden = np.random.default_rng(5).standard_normal((2, 7, 16))
    speaker = np.random.default_rng(6).standard_normal((2, 1, 5))
    weights = np.random.default_rng(7).standard_normal((2, 7, 1))
    arrays = (hidden, MASK[..., None].astype(float), speaker)

    def theirs():
        return reference.duration_predictor(*(torch.tensor(x.swapaxes(1, 2)) for x in arrays)).transpose(1, 2)

    run = jax.jit(lambda m: m(*map(jnp.asarray, arrays)))
    with torch.no_grad():
        harness.assert_close(run(model.duration_predictor), theirs(), name="log-durations")
    prefix = "duration_predictor."
    rules = [rule for rule in table.rules if str(rule.foreign).startswith(prefix)]
    own = Table([Rule(r.foreign.removeprefix(prefix), r.ours.removeprefix(prefix), r.operation) for r in rules])
    harness.compare_gradients(
        reference.duration_predictor,
        lambda: torch.sum(torch.tensor(weights) * theirs()),
        model.duration_predictor,
        lambda m: jnp.sum(jnp.asarray(weights) * run(m)),
        own,
    )


@functools.cache
def compiled_call():
    """Synthesis of both items, compiled once for all tests; options are arrays."""
    graphdef, _ = nnx.split(pair()[1])

    @jax.jit
    def run(state, options):
        model = nnx.merge(graphdef, state)
        noise = {"duration_noise": jnp.asarray(NOISE), "prior_noise": jnp.asarray(PRIOR_NOISE[:, :1024])}
        return model(
            jnp.asarray(IDS),
            jnp.asarray(MASK),
            1,
            **noise,
            **options,
            output_attentions=True,
            output_hidden_states=True,
        )

    defaults = {"speaking_rate": RATE[True], "noise_scale": 0.667, "noise_scale_duration": 0.8}
    return lambda model, **options: run(nnx.split(model)[1], defaults | options)


def test_every_output_and_each_item_as_by_itself():
    reference, model, _ = pair()
    ours = compiled_call()(model)
    batch = reference_call(reference, output_attentions=True, output_hidden_states=True)
    harness.compare_outputs(
        ours,
        batch,
        skip={
            "waveform": "the original's batch leaks over the ends; item by item below",
            "spectrogram": "channels first there, and shorter",
        },
    )
    for row, length in enumerate(MASK.sum(1)):
        alone = reference_call(reference, slice(row, row + 1), length)
        samples = int(alone.sequence_lengths[0])
        assert samples < 1024 * 8
        harness.assert_close(ours.waveform[row, :samples], alone.waveform[0], name=f"waveform of item {row}")
        assert not np.any(np.asarray(ours.waveform[row, samples:]))
        harness.assert_close(
            ours.spectrogram[row, : samples // 8], alone.spectrogram[0].T, name=f"spectrogram of item {row}"
        )


def synthesise(model, ids, mask, speaker, **options):
    """Our call, compiled."""
    return jax.jit(lambda m, options: m(ids, mask, speaker, **options))(model, options)


def test_speaking_rate_and_scales_are_options_of_the_call():
    reference, model, _ = pair()
    with (
        mock.patch.object(reference, "noise_scale", 0.3),
        mock.patch.object(reference, "noise_scale_duration", 0.5),
    ):
        theirs = reference_call(reference, slice(0, 1), speaking_rate=50.0)
    ours = compiled_call()(model, speaking_rate=50.0, noise_scale=0.3, noise_scale_duration=0.5)
    samples = int(theirs.sequence_lengths[0])
    assert int(ours.sequence_lengths[0]) == samples
    harness.assert_close(ours.waveform[0, :samples], theirs.waveform[0], name="waveform")


def test_mutations_are_noticed():
    reference, model, _ = pair()
    theirs = reference_call(reference, slice(0, 1)).waveform[0]

    def check():
        harness.assert_close(compiled_call()(model).waveform[0, : theirs.numel()], theirs)

    # What cannot show: training's modules, other voices, biases that cancel or round away in the durations' ceiling.
    mutations = harness.perturbations(model, 3, exclude=r"posterior_encoder.*|duration_predictor.*|embed_speaker.*")
    mutations.append(harness.dropped(model, "decoder.upsampler.0.bias"))
    assert harness.assert_detects(check, mutations) == 4


PARAMETERS = {"mms": 36_284_592, "ljs": 36_311_472, "vctk": 39_690_608, "piper_high": 36_326_448}


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_sizes(name):
    config = getattr(VitsConfig, name)()
    values = {k: v for k, v in dataclasses.asdict(config).items() if hasattr(transformers.VitsConfig(), k)}
    with harness.precision("float32"):
        count = harness.assert_same_shapes(
            lambda: transformers.VitsModel(transformers.VitsConfig(**values)),
            lambda: VitsModel(config, rngs=nnx.Rngs(0)),
            hugging_face_table(config),
        )
    assert count == PARAMETERS[name]


def test_export_is_what_transformers_loads(tmp_path):
    reference, model, _ = pair()
    form = hugging_face(model)
    values = {name: leaf[...] for name, leaf in audiozoo.loading.variables(model).items()}
    written = dict(form.table.write(values))
    state = reference.state_dict()
    assert set(written) == set(state)
    assert all(np.array_equal(written[name], state[name].numpy()) for name in state)
    config = transformers.VitsConfig(**form.files["config.json"])
    assert config_from_hugging_face(config.to_dict()) == model.config
    # The spelling of older files, and of the files that save_pretrained writes.
    old = {
        name.replace("parametrizations.weight.original0", "weight_g").replace(
            "parametrizations.weight.original1", "weight_v"
        ): tensor
        for name, tensor in state.items()
    }
    assert set(old) != set(state)
    foreign = ForeignCheckpoint("VitsModel", model.config, harness.StateDict(old), form.table, tmp_path)
    again = convert(foreign, VitsModel, param_dtype=jnp.float64)
    assert all(np.array_equal(a[...], values[name]) for name, a in audiozoo.loading.variables(again).items())


# --- the authors' code -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def piper():
    """Piper's copy of the authors' modules, with a search in NumPy in place of the compiled one."""
    pytest.importorskip("piper.train.vits", reason="piper-tts is part of the extra `reference`")
    search = types.ModuleType("piper.train.vits.monotonic_align")

    def maximum_path(scores, mask):
        frames, times = mask.sum(1)[:, 0].long(), mask.sum(2)[:, 0].long()
        found = brute_force_alignment(scores.numpy(), frames.numpy(), times.numpy())
        return torch.tensor(found, dtype=scores.dtype)

    search.maximum_path = maximum_path
    package = importlib.import_module("piper.train.vits")
    with mock.patch.dict(sys.modules, {search.__name__: search}):
        package.monotonic_align = search
        yield importlib.import_module("piper.train.vits.models")


@functools.cache
def authors(piper, *, resblock="1", speakers=3, stochastic=True):
    """A tiny model of the authors', and ours with its weights."""
    dilations = ((1, 3, 5),) if resblock == "1" else ((1, 3), (1, 2))
    width = 5  # of a voice's embedding, which a model of one voice has places for too, if its settings say so
    reference = piper.SynthesizerTrn(
        n_vocab=20,
        spec_channels=9,
        segment_size=6,
        inter_channels=8,
        hidden_channels=16,
        filter_channels=24,
        n_heads=2,
        n_layers=1,
        kernel_size=3,
        p_dropout=0.0,
        resblock=resblock,
        resblock_kernel_sizes=(3, 5)[: len(dilations)],
        resblock_dilation_sizes=dilations,
        upsample_rates=(4, 2),
        upsample_initial_channel=16,
        upsample_kernel_sizes=(8, 4),
        n_speakers=speakers,
        gin_channels=width,
        use_sdp=stochastic,
    )
    # Their depths are fixed; these are enough for a test.
    reference.enc_q = piper.PosteriorEncoder(9, 8, 16, 5, 1, 2, gin_channels=width)
    reference.flow = piper.ResidualCouplingBlock(8, 16, 5, 1, 2, n_flows=2, gin_channels=width)
    if stochastic:
        reference.dp = piper.StochasticDurationPredictor(16, 16, 3, 0.5, 2, gin_channels=width)
        reference.dp.post_flows = reference.dp.post_flows[:5]
    reference = harness.randomise(reference, 1)
    config = config_from_tensors(harness.StateDict(reference.state_dict()), resblock_dilation_sizes=dilations)
    table = original_table(config)
    return reference, harness.ported(reference, lambda: double(config), table), table


# Piper's qualities: channels of the latent and of the encoder's convolutions, residual blocks, voices.
QUALITIES = {
    "piper_x_low": (96, 384, "2", 1),
    "piper_high": (192, 768, "1", 4),
}


@pytest.mark.parametrize("name", QUALITIES)
def test_qualities_of_piper(piper, name):
    """Names, shapes and numbers of parameters, training's included, as Piper's training makes them."""
    width, inner, resblock, speakers = QUALITIES[name]
    decoder = {"resblock_kernel_sizes": (3, 7, 11), "resblock_dilation_sizes": ((1, 3, 5),) * 3}
    decoder |= {"upsample_rates": (8, 8, 2, 2), "upsample_kernel_sizes": (16, 16, 4, 4)}
    if resblock == "2":
        decoder = {"resblock_kernel_sizes": (3, 5, 7), "resblock_dilation_sizes": ((1, 2), (2, 6), (3, 12))}
        decoder |= {"upsample_rates": (8, 8, 4), "upsample_kernel_sizes": (16, 16, 8)}
    sizes = {"inter_channels": width, "hidden_channels": width, "filter_channels": inner, "n_heads": 2, "n_layers": 6}
    sizes |= {"kernel_size": 3, "p_dropout": 0.1, "resblock": resblock, "use_sdp": True, "n_speakers": speakers}
    sizes |= {"upsample_initial_channel": 256 if resblock == "2" else 512, "gin_channels": 512 if speakers > 1 else 0}
    several = {"num_speakers": speakers, "speaker_embedding_size": 512} if speakers > 1 else {}
    config = getattr(VitsConfig, name)(decoder_weight_norm=True, **several)
    with harness.precision("float32"):
        harness.assert_same_shapes(
            lambda: piper.SynthesizerTrn(n_vocab=256, spec_channels=513, segment_size=32, **sizes, **decoder),
            lambda: VitsModel(config, rngs=nnx.Rngs(0)),
            original_table(config),
        )


@pytest.mark.parametrize(("resblock", "speakers"), [("1", 3), ("2", 1)])
def test_the_authors_names_and_both_residual_blocks(piper, resblock, speakers):
    reference, model, _ = authors(piper, resblock=resblock, speakers=speakers)
    assert model.config.resblock == resblock
    assert model.config.decoder_weight_norm
    with noises(NOISE[:1], PRIOR_NOISE[:1]), torch.no_grad():
        sid = torch.tensor([1]) if speakers > 1 else None
        theirs, _, _, (z, *_) = reference.infer(
            torch.tensor(IDS[:1]), torch.tensor([7]), sid, noise_scale=0.5, length_scale=1 / 50
        )
    ours = synthesise(
        model,
        IDS[:1],
        None,
        1 if speakers > 1 else None,
        noise_scale=0.5,
        speaking_rate=50.0,
        duration_noise=jnp.asarray(NOISE[:1]),
        prior_noise=jnp.asarray(PRIOR_NOISE[:1, : z.shape[2]]),
    )
    harness.assert_close(ours.waveform, theirs[:, 0], name="waveform")


FRAMES = np.array([14, 11])
SPECTROGRAM = np.abs(np.random.default_rng(3).standard_normal((2, 14, 9)))
STARTS = np.array([3, 5])
POSTERIOR_NOISE = np.random.default_rng(4).standard_normal((2, 14, 8))


def authors_training_forward(reference):
    """The authors' forward with given noises and segments."""
    starts = torch.tensor((STARTS + 0.5) / (FRAMES - 6 + 1))
    with (
        mock.patch("torch.randn", return_value=torch.tensor(NOISE.swapaxes(1, 2))),
        mock.patch("torch.randn_like", return_value=torch.tensor(POSTERIOR_NOISE.swapaxes(1, 2))),
        mock.patch("torch.rand", return_value=starts),
    ):
        return reference(
            torch.tensor(IDS),
            torch.tensor(MASK.sum(1)),
            torch.tensor(SPECTROGRAM.swapaxes(1, 2)),
            torch.tensor(FRAMES),
            torch.tensor([0, 2]),
        )


def our_training_forward(model, key=None):
    return model.training_forward(
        jnp.asarray(IDS),
        jnp.asarray(MASK),
        jnp.asarray(SPECTROGRAM),
        jnp.asarray(FRAMES),
        jnp.asarray([0, 2]),
        segment_frames=6,
        key=key,
        posterior_noise=jnp.asarray(POSTERIOR_NOISE),
        duration_noise=jnp.asarray(NOISE),
        segment_starts=jnp.asarray(STARTS),
    )


def test_training_losses_and_their_gradients(piper):
    """The duration loss (Eq. 7), the KL divergence and the decoder, for every parameter; and the alignment."""
    losses = importlib.import_module("piper.train.vits.losses")
    reference, model, table = authors(piper)

    def theirs():
        waveform, duration, _, starts, _, mask, (_, z_p, m_p, logs_p, _, logs_q) = authors_training_forward(reference)
        assert starts.tolist() == STARTS.tolist()
        with mock.patch("torch.Tensor.float", lambda self: self):  # the authors' losses cast to float32
            kl = losses.kl_loss(z_p, logs_q, m_p, logs_p, mask)
        weights = torch.linspace(-1, 1, waveform.numel(), dtype=waveform.dtype).reshape(waveform.shape)
        return torch.sum(duration) + kl + torch.sum(weights * waveform)

    def ours(model):
        output = our_training_forward(model)
        weights = jnp.linspace(-1, 1, output.waveform.size).reshape(output.waveform.shape)
        return output.duration_loss + output.kl_loss + jnp.sum(weights * output.waveform)

    compared = harness.compare_gradients(reference, theirs, model, jax.jit(ours), table)
    assert len(compared) > 100


def test_training_with_the_deterministic_predictor(piper):
    """Its loss and the alignment; its gradients are compared by themselves."""
    reference, model, _ = authors(piper, stochastic=False)
    with torch.no_grad():
        waveform, duration, alignment, *_ = authors_training_forward(reference)
    ours = jax.jit(our_training_forward)(model)
    harness.assert_close(ours.duration_loss, torch.sum(duration), name="duration loss")
    harness.assert_close(ours.waveform, waveform[:, 0], name="segments")
    np.testing.assert_array_equal(ours.alignment, alignment[:, 0])


RATES = {"attention": 0.1, "activation": 0.2, "hidden": 0.3, "wavenet": 0.4}


@pytest.mark.parametrize("stochastic", [True, False])
def test_dropouts(piper, stochastic):
    reference, model, table = authors(piper, stochastic=stochastic)
    config = dataclasses.replace(model.config, **{f"{name}_dropout": rate for name, rate in RATES.items()})
    model = harness.ported(reference, lambda: double(config), table)
    places = {"attn_layers": "attention", "ffn_layers": "activation", "enc_p": "hidden"}
    for name, module in reference.named_modules():
        if isinstance(module, torch.nn.Dropout) and not name.startswith("dp."):
            module.p = RATES[next((places[part] for part in places if part in name.split(".")), "wavenet")]
    with harness.bent_dropouts(), torch.no_grad():
        waveform, duration, alignment, *_ = authors_training_forward(reference.train())
        reference.eval()
        ours = jax.jit(our_training_forward)(model, jax.random.key(0))
    np.testing.assert_array_equal(ours.alignment, alignment[:, 0])
    harness.assert_close(ours.waveform, waveform[:, 0], name="segments")
    harness.assert_close(ours.duration_loss, torch.sum(duration), name="duration loss")


def test_voice_conversion(piper):
    reference, model, _ = authors(piper)
    with (
        mock.patch("torch.randn_like", return_value=torch.tensor(POSTERIOR_NOISE[:1].swapaxes(1, 2))),
        torch.no_grad(),
    ):
        theirs, _, _ = reference.voice_conversion(
            torch.tensor(SPECTROGRAM[:1].swapaxes(1, 2)), torch.tensor([14]), torch.tensor([0]), torch.tensor([2])
        )
    convert_voice = jax.jit(lambda m, x, noise: m.voice_conversion(x, 0, 2, posterior_noise=noise))
    ours = convert_voice(model, jnp.asarray(SPECTROGRAM[:1]), jnp.asarray(POSTERIOR_NOISE[:1]))
    harness.assert_close(ours.waveform, theirs[:, 0], name="waveform")


def test_transformers_turns_the_first_flow_round_in_training(piper):
    """The same weights and noise: ours has the authors' likelihood; `transformers` another one."""
    theirs = harness.randomise(
        transformers.VitsModel(
            transformers.VitsConfig(
                **TINY
                | {
                    "duration_predictor_flow_bins": 10,
                    "num_speakers": 1,
                    "speaker_embedding_size": 0,
                    "duration_predictor_num_flows": 2,
                    "depth_separable_num_layers": 3,
                }
            )
        ),
        0,
    )
    config = config_from_hugging_face(theirs.config.to_dict())
    model = harness.ported(theirs, lambda: double(config), hugging_face_table(config))
    predictor = piper.StochasticDurationPredictor(16, 16, 3, 0.5, 2)
    predictor.post_flows = predictor.post_flows[:5]
    ours_alone = dict(nnx.to_flat_state(nnx.state(model.duration_predictor, nnx.Param)))
    # Into the authors' names, by the conversion table read backwards.
    names = {f"duration_predictor.{'.'.join(map(str, k))}": v[...] for k, v in ours_alone.items()}
    written = {k.removeprefix("dp."): torch.tensor(v) for k, v in original_table(config).write(names)}
    predictor.load_state_dict(written)
    predictor.eval()
    hidden = np.random.default_rng(5).standard_normal((2, 7, 16))
    durations = np.random.default_rng(6).integers(1, 6, (2, 7, 1)) * MASK[..., None].astype(float)
    arguments = (torch.tensor(hidden.swapaxes(1, 2)), torch.tensor(MASK[:, None].astype(float)))
    with torch.no_grad(), mock.patch("torch.randn", return_value=torch.tensor(NOISE.swapaxes(1, 2))):
        paper = predictor(*arguments, torch.tensor(durations.swapaxes(1, 2)))
        other = theirs.duration_predictor(*arguments, durations=torch.tensor(durations.swapaxes(1, 2)))
    ours = jax.jit(lambda m, *x: m.negative_log_likelihood(*x, noise=jnp.asarray(NOISE)))(
        model.duration_predictor, *map(jnp.asarray, (hidden, MASK[..., None].astype(float), durations))
    )
    harness.assert_close(ours, paper, name="negative log-likelihood")
    assert np.min(np.abs(np.asarray(ours) - other.numpy())) > 0.1


def small(discriminator, channels, groups=None):
    """The authors' discriminator with fewer channels: its forward, our sizes."""
    convs = torch.nn.ModuleList()
    width = 1
    for index, (layer, out) in enumerate(zip(discriminator.convs, channels, strict=False)):
        conv = type(layer)(
            width,
            out,
            layer.kernel_size,
            layer.stride,
            padding=layer.padding,
            groups=groups[index] if groups else 1,
        )
        convs.append(torch.nn.utils.weight_norm(conv))
        width = out
    convs[-1].stride = tuple(1 for _ in convs[-1].stride)
    discriminator.convs = convs
    post = discriminator.conv_post
    discriminator.conv_post = torch.nn.utils.weight_norm(
        type(post)(width, 1, post.kernel_size, post.stride, padding=post.padding)
    )
    return discriminator


SCALE_LAYERS = ((4, 15, 1, 1), (8, 41, 4, 2), (6, 41, 1, 2))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
def test_discriminator_losses_and_their_gradients(piper):
    losses = importlib.import_module("piper.train.vits.losses")
    with torch.device("meta"):  # its 41 million parameters are replaced
        reference = piper.MultiPeriodDiscriminator()
        period = piper.DiscriminatorP(3)
    reference.discriminators = torch.nn.ModuleList(
        [small(reference.discriminators[0], (4, 8, 6), (1, 2, 2)), small(period, (3, 4, 5))]
    )
    harness.randomise(reference, 2)
    table = Table(
        (
            *scale_rules("0"),
            *period_rules("discriminators.{i:1}.", "discriminators.{i}."),
        ),
        renames=WEIGHT_NORM_RENAMES,
    )

    def factory():
        return vits.VitsDiscriminator(
            periods=(3,), period_channels=(3, 4, 5), scale_layers=SCALE_LAYERS, rngs=nnx.Rngs(0)
        )

    model = harness.ported(reference, factory, table)
    # 101 samples do not fold at period 3 without a mirrored end.
    real, generated = np.random.default_rng(7).standard_normal((2, 2, 101))
    asked = [torch.tensor(x[:, None]) for x in (real, generated)]
    with mock.patch("torch.Tensor.float", lambda self: self):
        with torch.no_grad():
            scores_r, scores_g, features_r, features_g = reference(*asked)
            theirs = (losses.generator_loss(scores_g)[0], losses.feature_loss(features_r, features_g))
        judge = jax.jit(lambda m, x: m(x))
        (ours_r, ours_features_r), (ours_g, ours_features_g) = (judge(model, jnp.asarray(x)) for x in (real, generated))
        for mine, other in zip(ours_r + ours_g, scores_r + scores_g, strict=True):
            harness.assert_close(mine, other, name="scores")
        harness.assert_close(generator_loss(ours_g), theirs[0], name="generator loss")
        harness.assert_close(feature_loss(ours_features_r, ours_features_g), theirs[1], name="feature loss")
        harness.compare_gradients(
            reference,
            lambda: losses.discriminator_loss(*reference(*asked)[:2])[0],
            model,
            jax.jit(lambda m: vits.discriminator_losses(m, jnp.asarray(real), jnp.asarray(generated))),
            table,
        )
    assert callable(discriminator_loss)


def test_files_of_the_projects_load(piper, tmp_path):
    """MMS' directory with its `G_*.pth`, the authors' file beside its config.json, and Piper's training checkpoint."""
    reference, model, _ = authors(piper)
    state = {name: tensor.float() for name, tensor in reference.state_dict().items()}
    sizes = {"upsample_rates": [4, 2], "resblock_dilation_sizes": [[1, 3, 5]], "n_heads": 2}
    settings = {"model": sizes, "data": {"sampling_rate": 16_000, "text_cleaners": [], "add_blank": True}}
    (tmp_path / "mms").mkdir()
    for name in ("G_9000.pth", "G_100000.pth"):
        shift = 0.0 if name == "G_100000.pth" else 1.0  # the later one counts
        kept = {name: tensor + shift for name, tensor in state.items()}
        torch.save({"model": kept, "iteration": 1, "learning_rate": 2e-4}, tmp_path / "mms" / name)
    (tmp_path / "mms" / "config.json").write_text(json.dumps(settings))
    (tmp_path / "mms" / "vocab.txt").write_text("\n".join("_ abcdefghijklmnopqr") + "\n")
    hyper = {"sample_rate": 22_050, "upsample_rates": (4, 2), "resblock_dilation_sizes": ((1, 3, 5),), "n_heads": 2}
    judge = {"model_d.discriminators.0.convs.0.bias": torch.zeros(3)}
    lightning = {f"model_g.{name}": tensor for name, tensor in state.items()} | judge
    torch.save({"state_dict": lightning, "hyper_parameters": hyper, "epoch": 3}, tmp_path / "voice.ckpt")
    wanted = {name: np.asarray(leaf[...], np.float32) for name, leaf in audiozoo.loading.variables(model).items()}
    for path, rate in (("mms", 16_000), ("mms/G_100000.pth", 16_000), ("voice.ckpt", 22_050)):
        with jax.enable_x64(False):
            loaded = audiozoo.load(tmp_path / path)
        assert loaded.config == dataclasses.replace(model.config, sampling_rate=rate), path
        found = audiozoo.loading.variables(loaded)
        assert set(found) == set(wanted)
        assert all(np.array_equal(found[name][...], wanted[name]) for name in wanted)
    processor = audiozoo.load_processor(tmp_path / "mms")
    assert processor("Cab")["input_ids"].tolist() == [[0, 4, 0, 2, 0, 3, 0]]
    # What the authors' file holds in magnitude and direction, transformers wants in one.
    form = hugging_face(model)
    written = dict(form.table.write({name: leaf[...] for name, leaf in audiozoo.loading.variables(model).items()}))
    there = transformers.VitsModel(transformers.VitsConfig(**form.files["config.json"])).state_dict()
    assert {name: array.shape for name, array in written.items()} == {n: tuple(t.shape) for n, t in there.items()}
    layer = reference.dec.ups[0]
    folded = torch._weight_norm(layer.weight_v, layer.weight_g, 0)
    harness.assert_close(written["decoder.upsampler.0.weight"], folded, name="folded kernel")


def exported(reference, path, folding=True):
    """The graph that Piper makes of a voice: synthesis alone, the flow's weight normalisation folded with constants."""

    def infer(text, text_lengths, scales, sid=None):
        options = {"noise_scale": scales[0], "length_scale": scales[1], "noise_scale_w": scales[2], "sid": sid}
        return reference.infer(text, text_lengths, **options)[0].unsqueeze(1)

    reference.forward = infer
    given = (torch.tensor(IDS[:1]), torch.tensor([7]), torch.tensor([0.0, 1.0, 0.0]), torch.tensor([0]))
    torch.onnx.export(
        reference,
        given,
        path,
        opset_version=15,
        dynamo=False,
        do_constant_folding=folding,
        input_names=["input", "input_lengths", "scales", "sid"],
        output_names=["output"],
        dynamic_axes={"input": {1: "phonemes"}, "output": {2: "time"}},
    )


@pytest.mark.filterwarnings("ignore")
def test_an_exported_graph_of_several_voices(piper, tmp_path):
    """Every parameter that synthesis needs is found by the graph, as today's PyTorch exports it; rates and scales."""
    pytest.importorskip("onnx", reason="onnx is part of the extra `reference`")
    reference, model, _ = authors.__wrapped__(piper)  # one of its own to change
    reference.float().dec.remove_weight_norm()
    exported(reference, tmp_path / "voice.onnx")
    side = {"audio": {"sample_rate": 16_000}, "inference": {"noise_scale": 0.5, "length_scale": 2, "noise_w": 0.25}}
    (tmp_path / "voice.onnx.json").write_text(json.dumps(side))
    with jax.enable_x64(False):
        loaded = audiozoo.load(tmp_path / "voice.onnx")
    changes = {"has_posterior": False, "decoder_weight_norm": False, "sampling_rate": 16_000, "noise_scale": 0.5}
    kept = {"spectrogram_bins": loaded.config.spectrogram_bins}
    kept["posterior_encoder_num_wavenet_layers"] = loaded.config.posterior_encoder_num_wavenet_layers
    changes |= {"noise_scale_duration": 0.25, "speaking_rate": 0.5} | kept
    assert loaded.config == dataclasses.replace(model.config, **changes)
    wanted = audiozoo.loading.variables(fold_weight_norm(model))
    found = audiozoo.loading.variables(fold_weight_norm(loaded))
    assert len(found) > 100
    for name, leaf in found.items():
        np.testing.assert_allclose(leaf[...], wanted[name][...], rtol=2e-5, atol=2e-6, err_msg=name)
    exported(reference, tmp_path / "voice.onnx", folding=False)
    with jax.enable_x64(False):
        apart = audiozoo.loading.variables(fold_weight_norm(audiozoo.load(tmp_path / "voice.onnx")))
    assert set(apart) == set(found)
    for name, leaf in apart.items():
        np.testing.assert_allclose(leaf[...], found[name][...], rtol=2e-5, atol=2e-6, err_msg=name)
