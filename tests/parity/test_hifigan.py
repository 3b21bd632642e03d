"""HiFi-GAN's generator against SpeechT5's and SeamlessM4T's, its discriminators and spectral norm against PyTorch's."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from transformers.models.seamless_m4t.modeling_seamless_m4t import SeamlessM4THifiGan

import audiozoo
import audiozoo.cli
import audiozoo.loading
from audiozoo.errors import CheckpointError, SourceError
from audiozoo.layers import Conv1d, ConvTranspose1d
from audiozoo.layers.weight_norm import apply_weight_norm, fold_weight_norm
from audiozoo.models import hifigan
from audiozoo.models.hifigan import HifiGanConfig, HifiGanGenerator
from audiozoo.processors.hifigan import HifiGanProcessor
from audiozoo.recipes import recipe, run
from tests.models.random_model import random_model
from tests.parity import harness
from tests.training import tiny
from weights_conversion.hifigan import (
    DISCRIMINATOR_TABLE,
    MULTI_SCALE_TABLE,
    config_from_hugging_face,
    generator_rules,
    hugging_face_table,
    original_table,
)
from weights_conversion.rules import Rule, Table, conv_transpose1d

TINY = {
    "model_in_dim": 6,
    "upsample_initial_channel": 16,
    "upsample_rates": [5, 2],
    "upsample_kernel_sizes": [11, 4],
    "resblock_kernel_sizes": [3, 5],
    "resblock_dilation_sizes": [[1, 3], [1, 2]],
}


def test_speecht5_generator_tap_by_tap():
    reference = harness.randomise(transformers.SpeechT5HifiGan(transformers.SpeechT5HifiGanConfig(**TINY)))
    config = config_from_hugging_face(reference.config.to_dict())
    table = hugging_face_table(config)
    model = harness.ported(reference, lambda: HifiGanGenerator(config, rngs=nnx.Rngs(0)), table)
    x = np.random.default_rng(0).standard_normal((2, 9, 6))
    taps = harness.compare_taps(
        reference,
        lambda: reference(torch.tensor(x)),
        model,
        lambda: model(jnp.asarray(x)),
        table,
        minimum=20,
        compiled=True,
    )
    harness.assert_close(taps.ours, taps.reference, name="waveform")
    assert taps.ours.shape == (2, 90)
    # Trained apart, folded again: the same function.
    apart = apply_weight_norm(model)
    assert "upsampler.0.kernel_g" in harness.parameters(apart)
    run = jax.jit(lambda m: m(jnp.asarray(x)))
    harness.assert_close(run(apart), taps.ours, name="weight-normalised")
    harness.assert_close(run(fold_weight_norm(apart)), taps.ours, name="folded again")
    check = lambda: harness.assert_close(run(model), taps.reference)  # noqa: E731
    mutations = [*harness.perturbations(model, 2), harness.dropped(model, "conv_post.bias")]
    mutations.append(harness.dropped(model, "mean"))
    assert harness.assert_detects(check, mutations) == 4


def test_seamless_generator():
    """Five samples a frame out of eleven taps, no standardised input."""
    sizes = {k: v for k, v in TINY.items() if k != "model_in_dim"}
    settings = transformers.SeamlessM4TConfig(unit_embed_dim=3, lang_embed_dim=1, spkr_embed_dim=2, **sizes)
    reference = harness.randomise(SeamlessM4THifiGan(settings))
    config = HifiGanConfig(
        model_in_dim=6,
        upsample_initial_channel=16,
        upsample_rates=(5, 2),
        upsample_kernel_sizes=(11, 4),
        resblock_kernel_sizes=(3, 5),
        resblock_dilation_sizes=((1, 3), (1, 2)),
        weight_norm=False,
    )
    table = Table(generator_rules(config))
    model = harness.ported(reference, lambda: HifiGanGenerator(config, rngs=nnx.Rngs(0)), table)
    x = np.random.default_rng(0).standard_normal((1, 7, 6))
    with torch.no_grad():
        theirs = reference(torch.tensor(x.swapaxes(1, 2)))
    ours = jax.jit(lambda m, x, n: m(x, lengths=n))(
        model, jnp.pad(jnp.asarray(x), ((0, 0), (0, 4), (0, 0))), jnp.asarray([7])
    )
    harness.assert_close(ours[:, :70], theirs, name="waveform")
    assert not np.any(ours[:, 70:])


@pytest.mark.parametrize("stride", [1, 2, 5, 8])
@pytest.mark.parametrize("kernel", [1, 4, 11, 16])
def test_transposed_convolution_of_every_geometry(stride, kernel):
    rng = np.random.default_rng(0)
    for padding in sorted({0, kernel // 2, max((kernel - stride) // 2, 0)}):
        for extra in sorted({0, stride - 1}):
            if 6 * stride + kernel + extra - 2 * padding <= 0:
                continue
            theirs = torch.nn.ConvTranspose1d(4, 6, kernel, stride, padding, output_padding=extra, groups=2)
            harness.randomise(theirs)
            ours = ConvTranspose1d(
                4,
                6,
                kernel,
                stride=stride,
                padding=padding,
                output_padding=extra,
                groups=2,
                param_dtype=jnp.float64,
                rngs=nnx.Rngs(0),
            )
            harness.port(theirs, ours, Table([Rule("weight", "kernel", conv_transpose1d), Rule("bias", "bias")]))
            x = rng.standard_normal((2, 7, 4))
            with torch.no_grad():
                expected = theirs(torch.tensor(x.swapaxes(1, 2))).swapaxes(1, 2)
            harness.assert_close(ours(jnp.asarray(x)), expected, name=f"padding {padding}, output padding {extra}")


LAYERS = ((4, 15, 1, 1), (8, 41, 2, 2), (6, 5, 1, 1))


class Scale(torch.nn.Module):
    """A scale discriminator in PyTorch, spectrally or weight-normalised by PyTorch's own hooks."""

    def __init__(self, norm):
        super().__init__()
        widths = (1, *(width for width, *_ in LAYERS))
        self.convs = torch.nn.ModuleList(
            norm(torch.nn.Conv1d(widths[i], width, taps, stride, groups=groups, padding=taps // 2))
            for i, (width, taps, stride, groups) in enumerate(LAYERS)
        )
        self.conv_post = norm(torch.nn.Conv1d(widths[-1], 1, 3, padding=1))

    def forward(self, x):
        for conv in self.convs:
            x = torch.nn.functional.leaky_relu(conv(x), 0.1)
        return self.conv_post(x)[:, 0]


@pytest.mark.filterwarnings("ignore:.*_norm.*")
def test_multi_scale_discriminator_and_its_spectral_norm():
    reference = torch.nn.Module()
    reference.discriminators = torch.nn.ModuleList(
        [Scale(torch.nn.utils.spectral_norm), *(Scale(torch.nn.utils.weight_norm) for _ in range(2))]
    )
    harness.randomise(reference)
    model = harness.ported(
        reference, lambda: hifigan.MultiScaleDiscriminator(layers=LAYERS, rngs=nnx.Rngs(0)), MULTI_SCALE_TABLE
    )
    x = np.random.default_rng(0).standard_normal((2, 203))
    pool = torch.nn.AvgPool1d(4, 2, padding=2)
    run = jax.jit(lambda m: m(jnp.asarray(x))[0])

    def theirs():
        scores, wave = [], torch.tensor(x[:, None])
        for index, discriminator in enumerate(reference.discriminators):
            wave = pool(wave) if index else wave
            scores.append(discriminator(wave))
        return scores

    with torch.no_grad():
        for mine, other in zip(run(model), theirs(), strict=True):
            harness.assert_close(mine, other, name="scores")
        # A forward in training does one power iteration first.
        reference.train()
        trained = theirs()
        hifigan.power_iteration(model)
        for mine, other in zip(run(model), trained, strict=True):
            harness.assert_close(mine, other, name="scores after a power iteration")
        reference.eval()
    weights = torch.linspace(-1, 1, 203)

    def their_loss():
        return sum(torch.sum(weights[: s.shape[1]] * s) for s in theirs())

    def our_loss(m):
        return sum(jnp.sum(jnp.asarray(weights.numpy())[: s.shape[1]] * s) for s in m(jnp.asarray(x))[0])

    harness.compare_gradients(reference, their_loss, model, jax.jit(our_loss), MULTI_SCALE_TABLE)


def test_log_mel_is_the_authors():
    """Reflected ends, no centring, Slaney's filters, magnitudes: as `torch.stft` and `librosa` give it."""
    import librosa

    x = np.random.default_rng(0).standard_normal((2, 2048)) * 0.1
    padded = torch.nn.functional.pad(torch.tensor(x)[:, None], (384, 384), mode="reflect")[:, 0]
    spectrum = torch.stft(padded, 1024, 256, window=torch.hann_window(1024), center=False, return_complex=True)
    magnitude = torch.sqrt(spectrum.abs() ** 2 + 1e-9)
    bank = librosa.filters.mel(sr=22_050, n_fft=1024, n_mels=80, fmin=0, fmax=8000, dtype=np.float64)
    theirs = torch.log(torch.clamp(torch.tensor(bank) @ magnitude, min=1e-5))
    ours = hifigan.log_mel(jnp.asarray(x), f_max=8000.0)
    harness.assert_close(ours, theirs.transpose(1, 2), name="log-mel")
    assert ours.shape == (2, 8, 80)


def test_published_sizes():
    """Parameters of the generators as the paper's Table 1 has them, in millions: 13.92, 0.92, 1.46."""
    for name, millions in (("v1", 13.92), ("v2", 0.92), ("v3", 1.46)):
        config = getattr(HifiGanConfig, name)(weight_norm=False)
        model = harness.abstract(lambda config=config: HifiGanGenerator(config, rngs=nnx.Rngs(0)))
        count = sum(int(np.prod(v.shape)) for v in jax.tree.leaves(nnx.state(model, nnx.Param)))
        assert round(count / 1e6, 2) == pytest.approx(millions, abs=0.015), name


def test_a_strided_convolution_is_undone_in_geometry():
    conv = Conv1d(1, 1, 4, stride=2, padding=1, rngs=nnx.Rngs(0))
    up = ConvTranspose1d(1, 1, 4, stride=2, padding=1, rngs=nnx.Rngs(0))
    assert up(conv(jnp.ones((1, 12, 1)))).shape == (1, 12, 1)


def test_features_are_those_of_speecht5():
    theirs = transformers.SpeechT5FeatureExtractor()
    rng = np.random.default_rng(0)
    waveforms = [(0.1 * rng.standard_normal(n)).astype(np.float32) for n in (16_000, 9_001)]
    expected = theirs(audio_target=waveforms, sampling_rate=16_000, return_tensors="np", padding=True)
    inputs = HifiGanProcessor.speecht5()(waveforms, sampling_rate=16_000)
    np.testing.assert_array_equal(inputs["lengths"], expected["attention_mask"].sum(1))
    for row, length in enumerate(inputs["lengths"]):
        harness.assert_close(
            inputs["spectrogram"][row, :length], expected["input_values"][row, :length], kind="features"
        )


def test_the_authors_files_load(tmp_path):
    """`g_02500000` beside its config.json, in the spelling of the release: weight_g, weight_v, ups."""
    config = HifiGanConfig.v3(
        model_in_dim=6, upsample_initial_channel=16, upsample_rates=(4, 2), upsample_kernel_sizes=(8, 4)
    )
    model = random_model(lambda rngs: HifiGanGenerator(config, rngs=rngs))
    values = {name: leaf[...] for name, leaf in audiozoo.loading.variables(model).items()}
    spelt = {
        name.removeprefix("generator.").replace("parametrizations.weight.original0", "weight_g"): torch.tensor(array)
        for name, array in original_table(config).write(values)
    }
    spelt = {name.replace("parametrizations.weight.original1", "weight_v"): array for name, array in spelt.items()}
    assert {"conv_pre.weight_g", "ups.1.weight_v", "resblocks.5.convs.1.bias"} <= set(spelt)
    settings = {"resblock": "2", "num_mels": 6, "upsample_rates": [4, 2], "upsample_kernel_sizes": [8, 4]}
    settings |= {"upsample_initial_channel": 16, "resblock_kernel_sizes": [3, 5, 7], "sampling_rate": 22_050}
    settings |= {"resblock_dilation_sizes": [[1, 2], [2, 6], [3, 12]], "n_fft": 1024, "hop_size": 256}
    settings |= {"fmin": 50, "fmax": 6000}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    torch.save({"generator": spelt}, tmp_path / "g_02500000")
    with jax.enable_x64(False):
        loaded = audiozoo.load(tmp_path / "g_02500000")
    assert loaded.config == config
    found = audiozoo.loading.variables(loaded)
    assert set(found) == set(values)
    assert all(np.array_equal(found[name][...], values[name]) for name in values)
    processor = audiozoo.load_processor(tmp_path / "g_02500000")
    assert (processor.num_mels, processor.fmin, processor.fmax, processor.centered) == (6, 50, 6000, False)
    audiozoo.cli._convert(
        str(tmp_path / "g_02500000"), tmp_path / "ours", None, "float32", False, to_hugging_face=False
    )
    assert vars(audiozoo.load_processor(tmp_path / "ours")) == vars(processor)


def test_training_goes_on_with_the_authors_discriminators(tmp_path):
    """`do_02500000` beside `g_02500000`, in the spelling of the release, with the states of its optimisers."""
    vocoder = tiny.hifigan_model()[0]
    judge = random_model(lambda rngs: hifigan.HifiGanDiscriminator(**tiny.JUDGE, rngs=rngs), seed=1)

    def spelt(table, model):
        values = {name: leaf[...] for name, leaf in audiozoo.loading.variables(model).items()}
        names = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
        for name, array in table.write(values):
            for today, old in names.items():
                name = name.replace(today, old)
            yield name, torch.tensor(np.asarray(array))

    generator = {n.removeprefix("generator."): t for n, t in spelt(original_table(vocoder.config), vocoder)}
    both = dict(spelt(DISCRIMINATOR_TABLE, judge))
    assert {"mpd.discriminators.0.convs.0.weight_g", "msd.discriminators.0.convs.0.weight_u"} <= set(both)
    assert both["mpd.discriminators.0.convs.0.weight_v"].ndim == 4
    file = {kind: {n[4:]: t for n, t in both.items() if n.startswith(kind)} for kind in ("mpd", "msd")}
    states = {"state": {0: {"step": 3, "exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 2e-4}]}
    file |= {"optim_g": states, "optim_d": states, "steps": 2_500_000, "epoch": 100}
    names = ("upsample_rates", "upsample_kernel_sizes", "upsample_initial_channel", "resblock_kernel_sizes")
    settings = {n: getattr(vocoder.config, n) for n in (*names, "resblock_dilation_sizes", "sampling_rate", "resblock")}
    settings |= {"num_mels": 20, "n_fft": 128, "hop_size": 32, "fmin": 80, "fmax": 3600}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    torch.save({"generator": generator}, tmp_path / "g_02500000")
    row, _, _ = tiny.small(recipe("hifigan"))
    judges = []
    for beside in (True, False):
        if beside:
            torch.save(file, tmp_path / "do_02500000")
        else:
            (tmp_path / "do_02500000").unlink()
        begun = run.build(row, [], init=tmp_path / "g_02500000")
        judges.append(audiozoo.loading.variables(begun.trainer.task.networks["judge"]))
    wanted = audiozoo.loading.variables(judge)
    assert set(judges[0]) == set(wanted)
    for name, leaf in wanted.items():
        np.testing.assert_array_equal(judges[0][name][...], leaf[...], err_msg=name)
    assert not np.array_equal(
        judges[1]["mpd.discriminators.0.convs.0.kernel_v"][...], wanted["mpd.discriminators.0.convs.0.kernel_v"][...]
    )
    file["mpd"].pop("discriminators.0.conv_post.bias")
    torch.save(file, tmp_path / "do_02500000")
    with pytest.raises(CheckpointError, match="do_02500000 does not fit HifiGanDiscriminator"):
        run.build(row, [], init=tmp_path / "g_02500000")
    with pytest.raises(SourceError, match=r"do_02500000 holds the discriminators .* beside it, g_02500000"):
        audiozoo.load(tmp_path / "do_02500000")
