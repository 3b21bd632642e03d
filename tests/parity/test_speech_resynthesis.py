"""The vocoder of units against `transformers` (SeamlessM4T's, both versions) in float64, and the authors' files."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from transformers.models.seamless_m4t.modeling_seamless_m4t import SeamlessM4TCodeHifiGan as TheirV1
from transformers.models.seamless_m4t_v2.modeling_seamless_m4t_v2 import SeamlessM4Tv2CodeHifiGan as TheirV2

from audiozoo.errors import UsageError
from audiozoo.layers import Dropout
from audiozoo.models import speech_resynthesis
from audiozoo.models.hifigan import HifiGanDiscriminator
from audiozoo.models.speech_resynthesis import CodeHifiGanConfig, SeamlessM4TCodeHifiGan, SeamlessM4Tv2CodeHifiGan
from tests.parity import harness
from weights_conversion.code_hifigan_names import original_table, vocoder_table

TINY = {
    "unit_hifi_gan_vocab_size": 20,
    "unit_embed_dim": 6,
    "vocoder_num_langs": 3,
    "lang_embed_dim": 4,
    "vocoder_num_spkrs": 5,
    "spkr_embed_dim": 3,
    "upsample_initial_channel": 8,
    "upsample_rates": (5, 2),
    "upsample_kernel_sizes": (11, 4),
    "resblock_kernel_sizes": (3, 5),
    "resblock_dilation_sizes": ((1, 3), (1, 2)),
}
VERSIONS = {
    "v1": (TheirV1, transformers.SeamlessM4TConfig, SeamlessM4TCodeHifiGan, "spkr_id"),
    "v2": (TheirV2, transformers.SeamlessM4Tv2Config, SeamlessM4Tv2CodeHifiGan, "speaker_id"),
}


def pair(version: str):
    theirs, config, ours, _ = VERSIONS[version]
    reference = harness.randomise(theirs(config(**TINY)), 0)
    with torch.no_grad():
        reference.dur_predictor.proj.bias += 1.0  # several frames a unit
        reference.dur_predictor.proj.weight *= 2.0
    config = CodeHifiGanConfig(**TINY)
    table = vocoder_table(config)
    model = harness.ported(reference, lambda: ours(config, param_dtype=jnp.float64, rngs=nnx.Rngs(0)), table)
    return reference, model, table


@pytest.fixture(scope="module")
def v2():
    return pair("v2")


UNITS = np.array([[4, 4, 9, 17, 3, 2, 11, 5], [7, 12, 19, 4, 6, 1, 1, 1]])  # the second one padded


def their_call(reference, units, speakers, languages, name="speaker_id"):
    with torch.no_grad():
        ids = {name: torch.tensor(speakers)[:, None], "lang_id": torch.tensor(languages)[:, None]}
        return reference(torch.tensor(units), **ids)


@pytest.mark.parametrize("version", VERSIONS)
def test_every_tap_of_one_item(version):
    reference, model, table = pair(version)
    name = VERSIONS[version][3]
    one = UNITS[:1]
    taps = harness.compare_taps(
        reference,
        lambda: their_call(reference, one, [2], [1], name),
        model,
        lambda: model(one, **{name: 2}, lang_id=1),
        table,
        minimum=18,
    )
    (waveform, lengths), (their_waveform, their_lengths) = taps.ours, taps.reference
    harness.assert_close(waveform, their_waveform, name="waveform")
    assert lengths.tolist() == [int(their_lengths)] == [waveform.shape[1]]
    lasting = model.durations(model.unit_embedding(jnp.asarray(one)), jnp.array([8]))
    assert len(set(lasting[0].tolist())) > 1  # durations that differ
    mutations = [*harness.perturbations(model, 2), harness.dropped(model, "language_embedding.embedding")]
    harness.assert_detects(
        lambda: harness.assert_close(model(one, **{name: 2}, lang_id=1)[0], their_waveform), mutations
    )


def test_a_batch_is_its_items_and_the_originals_is_not(v2):
    reference, model, _ = v2
    speakers, languages = [0, 4], [2, 1]
    waveform, lengths = model.speak(UNITS, speakers, languages)
    singles = [their_call(reference, UNITS[i : i + 1, :n], speakers[i : i + 1], languages[i : i + 1]) for i, n in
               enumerate((8, 5))]  # fmt: skip
    for i, (single, _) in enumerate(singles):
        assert lengths[i] == single.shape[1]
        harness.assert_close(waveform[i, : lengths[i]], single[0], name=f"item {i}")
        assert not waveform[i, lengths[i] :].any()
    eager, _ = model(UNITS, speakers, languages)
    harness.assert_close(waveform, np.asarray(eager), name="compiled")
    # The original: padding sounds, and the end of the shorter item hears it.
    theirs, their_lengths = their_call(reference, UNITS, speakers, languages)
    n = lengths[1]
    assert their_lengths[1] > n  # a padding's frames are counted
    assert np.abs(theirs[1, n : int(their_lengths[1])].numpy()).max() > 1e-3
    assert np.abs(theirs[1, :n].numpy() - waveform[1, :n]).max() > 1e-6


def test_unit_1_is_a_unit_too(v2):
    """The original takes every 1 for padding, and a sequence that holds one for shorter than it is."""
    reference, model, _ = v2
    units = np.array([[4, 1, 9, 1, 3, 11]])
    theirs, their_lengths = their_call(reference, units, [0], [0])
    waveform, lengths = model(units)
    harness.assert_close(waveform, theirs, name="waveform")
    assert lengths[0] == theirs.shape[1] > int(their_lengths)
    padded, lengths = model(np.array([[4, 1, 1, 1]]), lengths=jnp.array([2]))
    assert lengths[0] == padded.shape[1] == their_call(reference, [[4, 1]], [0], [0])[0].shape[1]


def test_durations_given_and_none(v2):
    reference, model, _ = v2
    flat, _ = model(UNITS[:1], dur_prediction=False)
    given, _ = model(UNITS[:1], durations=jnp.ones((1, 8), jnp.int32))
    spoken, lengths = model.speak(UNITS[:1], dur_prediction=False)
    assert flat.shape == (1, 80)
    assert lengths.tolist() == [80]
    harness.assert_close(flat, np.asarray(given))
    harness.assert_close(jnp.asarray(spoken), np.asarray(flat))
    with torch.no_grad():
        three = (reference.language_embedding, reference.unit_embedding, reference.speaker_embedding)
        ids = (torch.zeros(1, 8, dtype=torch.long), torch.tensor(UNITS[:1]), torch.zeros(1, 8, dtype=torch.long))
        joined = torch.cat([table(i) for table, i in zip(three, ids, strict=True)], dim=-1)
        wanted = reference.hifi_gan(joined.transpose(1, 2))
    harness.assert_close(flat, wanted, name="waveform")


def test_bad_input_and_shapes_under_jit(v2):
    _, model, _ = v2
    for call, message in (
        (lambda: model([[3, 20]]), "no unit 20"),
        (lambda: model([[3]], 5), "no speaker 5"),
        (lambda: model([[3]], 0, -1), "no language -1"),
        (lambda: model([3, 4]), "whole numbers"),
        (lambda: model([[3], [4], [5]], [0, 1]), "need one speaker"),
        (lambda: jax.jit(lambda u: model(u))(jnp.asarray(UNITS)), "frames must be given"),
    ):
        with pytest.raises(UsageError, match=message):
            call()
    silent, lengths = model.speak(np.full((2, 3), 1))
    assert lengths.tolist() == [0, 0]
    assert not silent.any()


def test_the_authors_files(tmp_path, v2):
    """Random tensors in the authors' names and layout, weight-normalised: the same speech as the folded weights."""
    reference, model, _ = v2
    names = {"unit_embedding": "dict", "speaker_embedding": "spkr", "language_embedding": "lang", "hifi_gan.": ""}
    state = {}
    for name, tensor in reference.state_dict().items():
        for theirs, original in (*names.items(), ("upsampler", "ups")):
            name = name.replace(theirs, original)
        if "conv" in name and "dur" in name:
            name = name.replace(".weight", ".0.weight").replace(".bias", ".0.bias")
        if name.endswith(".weight") and ("conv" in name or "ups" in name) and "dur" not in name:
            v = tensor * 1.7
            state[name + "_v"] = v
            state[name + "_g"] = tensor.flatten(1).norm(dim=1).view(-1, 1, 1)
        else:
            state[name] = tensor.clone()
    torch.save({"generator": state}, tmp_path / "vocoder_v2.pt")
    from audiozoo.loading import paper_of
    from weights_conversion.code_hifigan_names import config_from_original, is_original
    from weights_conversion.readers import open_tensors

    assert paper_of(tmp_path / "vocoder_v2.pt").name == "seamless_m4t_v2"  # and no HiFi-GAN
    tensors = open_tensors(tmp_path / "vocoder_v2.pt")
    assert is_original(tensors)
    found = config_from_original(tensors)
    assert (found.unit_embed_dim, found.vocoder_num_langs, found.upsample_initial_channel) == (6, 3, 8)
    config = CodeHifiGanConfig(**TINY, weight_norm=True)
    create = lambda: SeamlessM4Tv2CodeHifiGan(config, param_dtype=jnp.float64, rngs=nnx.Rngs(0))  # noqa: E731
    loaded = harness.abstract(create)
    expected = {".".join(map(str, p)): v for p, v in nnx.to_flat_state(nnx.state(loaded))}
    table = original_table(config)
    loaded = nnx.merge(*nnx.split(create()))
    values = dict(table.read(tensors, table.plan(tensors, expected)))
    harness.assign(loaded, values)
    harness.assert_close(loaded(UNITS[:1])[0], np.asarray(model(UNITS[:1])[0]), name="waveform")
    for name, array in table.write(harness.parameters(loaded)):
        key = name.removeprefix("code_generator.")
        key = key.replace("parametrizations.weight.original0", "weight_g")
        key = key.replace("parametrizations.weight.original1", "weight_v")
        np.testing.assert_array_equal(array, state[key].numpy(), err_msg=name)


def original_duration_loss(reference, units):
    """The authors' training (speech-resynthesis), in our words, with PyTorch's run lengths."""
    predicted, wanted = [], []
    for row in units:
        values, counts = torch.unique_consecutive(torch.tensor(row), return_counts=True)
        if len(counts) > 2:
            values, counts = values[1:-1], counts[1:-1]
        predicted.append(reference.dur_predictor(reference.unit_embedding(values)[None])[0])
        wanted.append(torch.log(counts.double() + 1))
    return torch.nn.functional.mse_loss(torch.cat(predicted), torch.cat(wanted))


def test_duration_loss_and_gradients(v2):
    reference, model, table = v2
    units = np.array([[3, 3, 3, 5, 7, 7, 9, 9], [4, 4, 4, 4, 4, 6, 6, 6], [2, 2, 8, 8, 8, 8, 3, 4]])
    reduced, durations = speech_resynthesis.run_lengths(jnp.asarray(units), jnp.array([8, 7, 6]))
    assert reduced.tolist()[:2] == [[3, 5, 7, 9, 0, 0, 0, 0], [4, 6, 0, 0, 0, 0, 0, 0]]
    assert durations.tolist() == [[3, 1, 2, 2, 0, 0, 0, 0], [5, 2, 0, 0, 0, 0, 0, 0], [2, 4, 0, 0, 0, 0, 0, 0]]
    compared = harness.compare_gradients(
        reference,
        lambda: original_duration_loss(reference, units),
        model,
        jax.jit(lambda m: speech_resynthesis.duration_loss(m, jnp.asarray(units))),
        table,
    )
    assert "dur_predictor.conv1.kernel" in compared
    key = jax.random.key(0)
    assert float(speech_resynthesis.duration_loss(model, jnp.asarray(units), key=key)) != float(
        speech_resynthesis.duration_loss(model, jnp.asarray(units))
    )
    assert Dropout(key).next_key() is not None


def test_every_part_learns(v2):
    """HiFi-GAN's losses reach the tables through the generator's input."""
    _, model, _ = v2
    layers = ((4, 5, 1, 1), (4, 5, 2, 2))
    discriminator = HifiGanDiscriminator(
        periods=(2,), period_channels=(4, 4), scale_layers=layers, param_dtype=jnp.float64, rngs=nnx.Rngs(1)
    )
    rng = np.random.default_rng(0)
    batch = speech_resynthesis.CodeBatch(
        jnp.asarray(rng.integers(0, 20, (2, 12))),
        jnp.asarray(rng.uniform(-0.5, 0.5, (2, 120))),
        jnp.array([0, 3]),
        jnp.array([2, 1]),
    )

    def loss(m):
        losses, generated, real = speech_resynthesis.generator_losses(
            m, discriminator, batch, n_fft=64, hop_length=16, num_mels=10
        )
        assert generated.waveform.shape == real.shape
        return losses.total, losses

    graphdef, params = nnx.split(model)
    step = jax.jit(jax.value_and_grad(lambda p: loss(nnx.merge(graphdef, p)), has_aux=True))
    (total, losses), gradient = step(params)
    parts = losses.mel + losses.adversarial + losses.features + losses.duration
    harness.assert_close(total, np.asarray(parts), name="total")
    for path, value in nnx.to_flat_state(gradient):
        assert jnp.any(value[...] != 0), path


def test_published_size():
    config = CodeHifiGanConfig.seamless()
    with harness.precision("float32"):
        for theirs, their_config, ours, _ in VERSIONS.values():
            count = harness.assert_same_shapes(
                lambda t=theirs, c=their_config: t(c()),
                lambda o=ours: o(config, rngs=nnx.Rngs(0)),
                vocoder_table(config),
            )
            assert round(count / 1e6) == 42
