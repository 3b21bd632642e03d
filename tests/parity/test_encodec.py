"""EnCodec against `transformers` and against its authors' package, in float64; `.ecdc` files byte for byte."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import io
import itertools
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
from audiozoo import codec
from audiozoo.codec import ecdc
from audiozoo.errors import AudioError, CheckpointError
from audiozoo.models import encodec
from audiozoo.models.encodec import Balancer, EncodecConfig, EncodecLanguageModel, EncodecModel
from audiozoo.processors.encodec import EncodecFeatureExtractor
from tests.models.random_model import random_model
from tests.parity import harness
from tests.parity.audiocraft_package import audiocraft
from weights_conversion.encodec import (
    DISCRIMINATOR_TABLE,
    config_from_hugging_face,
    hugging_face_table,
    language_model_table,
    original_table,
)

TINY = {
    "target_bandwidths": [1.5, 4.5],
    "sampling_rate": 2400,
    "hidden_size": 6,
    "num_filters": 4,
    "upsampling_ratios": [3, 2],
    "codebook_size": 8,
}
STEREO = {
    "target_bandwidths": [2.4, 4.8],
    "audio_channels": 2,
    "normalize": True,
    "chunk_length_s": 0.05,  # 120 samples, 20 frames
    "overlap": 0.1,
    "norm_type": "time_group_norm",
    "use_causal_conv": False,
}
MUSIC = {"use_causal_conv": False, "use_conv_shortcut": False}
ODD = {"pad_mode": "constant", "num_residual_layers": 2, "trim_right_ratio": 0.6, "num_lstm_layers": 1, "compress": 1}
ONE_STAGE = {"upsampling_ratios": [2], "sampling_rate": 800}
VARIANTS = {
    "causal": {},
    "stereo": STEREO,
    "music": MUSIC,
    "odd": ODD,
    "short causal": ONE_STAGE,
    "short stereo": STEREO | ONE_STAGE,
}


def signal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-0.8, 0.8, shape)


@functools.cache
def pair(variant: str = "causal"):
    """`transformers`' model with random weights, ours with the same, the table between them, ours compiled."""
    theirs_config = transformers.EncodecConfig(**(TINY | VARIANTS[variant]))
    reference = harness.randomise(transformers.EncodecModel(theirs_config), 1)
    config = config_from_hugging_face(theirs_config.to_dict())
    model = random_model(lambda rngs: EncodecModel(config, param_dtype=jnp.float64, rngs=rngs))
    table = hugging_face_table(config)
    harness.port(reference, model, table)
    return reference, model, table, audiozoo.jit(model)


@functools.cache
def original_package() -> types.SimpleNamespace:
    """The authors' package. It asks torchaudio for one thing, a spectrogram, which stands in here by `torch.stft`."""
    if importlib.util.find_spec("encodec") is None:
        pytest.skip("the authors' package is not installed: pip install --no-deps encodec==0.1.1")

    class Spectrogram(torch.nn.Module):
        def __init__(self, n_fft, hop_length, win_length, window_fn, normalized, center, pad_mode, power):
            super().__init__()
            assert normalized
            assert not center
            assert power is None
            self.n_fft, self.hop_length = n_fft, hop_length
            self.window = window_fn(win_length)

        def forward(self, x):
            flat = x.reshape(-1, x.shape[-1])
            z = torch.stft(flat, self.n_fft, self.hop_length, window=self.window, center=False, return_complex=True)
            return (z / self.window.pow(2).sum().sqrt()).reshape(*x.shape[:-1], *z.shape[1:])

    stand_in = types.ModuleType("torchaudio")
    stand_in.transforms = types.SimpleNamespace(Spectrogram=Spectrogram)
    with mock.patch.dict(sys.modules, {"torchaudio": stand_in}):
        names = ("model", "msstftd", "compress", "binary", "modules", "quantization", "quantization.ac")
        found = {name.replace(".", "_"): importlib.import_module(f"encodec.{name}") for name in names}
        return types.SimpleNamespace(core=importlib.import_module("encodec.quantization.core_vq"), **found)


def original_codec(variant: str = "causal", dtype: torch.dtype | None = None, books: int = 3):
    """The authors' model, small, with random weights; `books` codebooks of 1024 entries."""
    package, stereo = original_package(), variant == "stereo"
    kwargs = {"channels": 2 if stereo else 1, "dimension": 6, "n_filters": 4, "ratios": [3, 2]}
    kwargs |= {"causal": not stereo, "norm": "time_group_norm" if stereo else "weight_norm"}
    kwargs |= {"lstm": 0} if variant == "no LSTM" else {}
    model = package.model.EncodecModel(
        package.modules.SEANetEncoder(**kwargs),
        package.modules.SEANetDecoder(**kwargs),
        package.quantization.ResidualVectorQuantizer(dimension=6, n_q=books, bins=1024),
        [books * 4.0],
        2400,
        kwargs["channels"],
        normalize=stereo,
        segment=0.05 if stereo else None,
        overlap=0.1,
        name="encodec",
    )
    return harness.randomise(model, 2, dtype)


def config_of(original, **changes) -> EncodecConfig:
    """Our configuration of `original_codec`."""
    stereo = original.channels == 2
    fields = {"num_filters": 4, "hidden_size": 6, "upsampling_ratios": (3, 2), "sampling_rate": 2400}
    fields |= {"target_bandwidths": tuple(original.target_bandwidths)}
    base = EncodecConfig.encodec_48khz if stereo else EncodecConfig.encodec_24khz
    return base(**(fields | ({"chunk_length_s": 0.05, "overlap": 0.1} if stereo else {}) | changes))


# --- the codec -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["short causal", "short stereo"])
def test_every_tap(variant):
    reference, model, table, _ = pair(variant)
    x = signal(2, model.config.audio_channels, 33)
    taps = harness.compare_taps(
        reference,
        lambda: reference(torch.tensor(x), bandwidth=model.config.target_bandwidths[-1]),
        model,
        lambda: model(jnp.asarray(x), bandwidth=model.config.target_bandwidths[-1]),
        table,
        minimum=20,
        skip={"": "its first output are the codes, which have no tolerance; both outputs are compared below"},
    )
    harness.compare_outputs(taps.ours, taps.reference)
    assert len(np.unique(taps.ours.audio_codes)) == 8


@pytest.mark.parametrize(
    ("variant", "samples"),
    [
        ("causal", 1),
        ("causal", 47),
        ("stereo", 345),  # four chunks, the last one of 21 samples
        ("music", 46),
        ("odd", 53),
    ],
)
def test_every_variant_and_field(variant, samples):
    """Codes equal, waveforms to 1e-9: the whole with a mask at the largest bandwidth, its halves at the smallest."""
    reference, model, _, run = pair(variant)
    x = signal(2, model.config.audio_channels, samples)
    mask = np.ones((2, samples), np.int64)
    mask[1, samples // 2 + 1 :] = 0
    most = model.config.target_bandwidths[-1]
    with torch.no_grad():
        theirs = reference(torch.tensor(x), padding_mask=torch.tensor(mask), bandwidth=most)
    harness.compare_outputs(run(jnp.asarray(x), padding_mask=jnp.asarray(mask), bandwidth=most), theirs)
    if variant not in ("stereo", "odd"):
        return
    with torch.no_grad():
        theirs = reference.encode(torch.tensor(x))
        lacking = theirs.last_frame_pad_length
        values = reference.decode(theirs.audio_codes, theirs.audio_scales, last_frame_pad_length=lacking)
    encoded = audiozoo.jit(model, "encode")(jnp.asarray(x))
    harness.compare_outputs(encoded, theirs)
    assert encoded.audio_codes.shape[2] == model.config.quantizers_for(None)
    decoded = audiozoo.jit(model, "decode")(
        encoded.audio_codes, encoded.audio_scales, last_frame_pad_length=encoded.last_frame_pad_length
    )
    harness.compare_outputs(decoded, values)


def test_chunks_that_one_array_cannot_hold():
    """220 samples: three chunks of 20, 19 and 1 frames. `transformers` fails to stack them; the authors' list can."""
    reference, model, _, run = pair("stereo")
    x = signal(1, 2, 220)
    with torch.no_grad(), pytest.raises(RuntimeError):
        reference(torch.tensor(x))
    with pytest.raises(AudioError, match="both cut short"):
        run(jnp.asarray(x))
    frames = jax.eval_shape(model.encode_frames, jnp.asarray(x))
    assert [codes.shape[-1] for codes, _ in frames] == [20, 19, 1]


def test_mutations_are_noticed():
    reference, model, _, _ = pair("short causal")
    x = signal(2, 1, 33)
    with torch.no_grad():
        theirs, latents = reference(torch.tensor(x)), reference.encoder(torch.tensor(x))

    def check():
        # A small change of the encoder need not change a code.
        harness.assert_close(audiozoo.jit(model.encoder)(jnp.asarray(x).mT), latents.mT)
        harness.compare_outputs(audiozoo.jit(model)(jnp.asarray(x)), theirs)

    mutations = [
        *harness.perturbations(model, count=3),
        harness.dropped(model, "decoder.layers.1.layers.0.recurrent_bias"),
        harness.Replaced(jax.nn, "elu", jax.nn.selu),
    ]
    assert harness.assert_detects(check, mutations) == 5


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["short causal", "short stereo"])
def test_directories_there_and_back(tmp_path, variant):
    with harness.precision("float32"):
        theirs_config = transformers.EncodecConfig(**(TINY | VARIANTS[variant]))
        reference = harness.randomise(transformers.EncodecModel(theirs_config), 1)
        reference.save_pretrained(tmp_path / "theirs")
        model = audiozoo.load(tmp_path / "theirs")
        assert isinstance(model, EncodecModel)
        audiozoo.export(model, tmp_path / "ours")
        back, info = transformers.EncodecModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        for name, tensor in reference.state_dict().items():
            assert torch.equal(tensor, back.state_dict()[name]), name
        same = ("upsampling_ratios", "target_bandwidths", "chunk_length_s", "norm_type", "codebook_dim", "pad_mode")
        assert [str(getattr(back.config, n)) for n in same] == [str(getattr(reference.config, n)) for n in same]
        # The spelling of files written before PyTorch 2.
        older = {
            n.replace("parametrizations.weight.original0", "weight_g").replace(
                "parametrizations.weight.original1", "weight_v"
            ): t
            for n, t in reference.state_dict().items()
        }
        (tmp_path / "older").mkdir()
        torch.save(older, tmp_path / "older" / "pytorch_model.bin")
        (tmp_path / "older" / "config.json").write_text((tmp_path / "theirs" / "config.json").read_text())
        again = harness.parameters(audiozoo.load(tmp_path / "older"))
        for name, array in harness.parameters(model).items():
            np.testing.assert_array_equal(array, again[name], err_msg=name)


@pytest.mark.parametrize("variant", ["causal", "stereo", "no LSTM"])
def test_the_authors_files(tmp_path, variant):
    """A bare `.th` file: sizes come from its shapes, and the model computes what theirs does."""
    original = original_codec(variant)
    torch.save(original.state_dict(), tmp_path / "encodec.th")
    model = audiozoo.load(tmp_path / "encodec.th", param_dtype=jnp.float64)
    found, wanted = model.config, config_of(original, num_lstm_layers=0 if variant == "no LSTM" else 2)
    derived = ["num_filters", "hidden_size", "upsampling_ratios", "num_quantizers", "norm_type", "audio_channels"]
    derived.append("num_lstm_layers")
    assert [getattr(found, n) for n in derived] == [getattr(wanted, n) for n in derived]
    model.config = wanted
    x = signal(1, original.channels, 220)
    with torch.no_grad():
        frames = original.encode(torch.tensor(x))
        values = original.decode(frames)
    ours = audiozoo.jit(model, "encode_frames")(jnp.asarray(x))
    assert len(ours) == len(frames) == (3 if variant == "stereo" else 1)
    for (codes, scale), (their_codes, their_scale) in zip(ours, frames, strict=True):
        np.testing.assert_array_equal(codes, their_codes)
        assert (scale is None) == (their_scale is None)
        if scale is not None:
            harness.assert_close(scale, their_scale)
    harness.assert_close(audiozoo.jit(model, "decode_frames")(ours), values)


AUDIOCRAFT = """
sample_rate: 2400
channels: 1
encodec:
  autoencoder: seanet
  quantizer: rvq
  sample_rate: ${sample_rate}
  channels: ${channels}
  causal: true
  renormalize: false
seanet:
  dimension: 6
  channels: ${channels}
  causal: ${encodec.causal}
  n_filters: 4
  n_residual_layers: 1
  ratios: [3, 2]
  activation: ELU
  activation_params: {alpha: 1.0}
  norm: weight_norm
  norm_params: {}
  kernel_size: 7
  residual_kernel_size: 3
  last_kernel_size: 7
  dilation_base: 2
  pad_mode: constant
  true_skip: false
  compress: 2
  lstm: 2
  disable_norm_outer_blocks: 0
  decoder: {trim_right_ratio: 1.0, final_activation: null, final_activation_params: null}
rvq: {n_q: 3, q_dropout: false, bins: 1024}
"""


def test_what_transformers_cannot_hold(tmp_path):
    """Its LSTM has one layer at least."""
    model = EncodecModel(config_of(original_codec("no LSTM"), num_lstm_layers=0), rngs=nnx.Rngs(0))
    with pytest.raises(CheckpointError, match="no EnCodec without an LSTM"):
        audiozoo.export(model, tmp_path / "out")


def test_audiocraft_files(tmp_path):
    original = original_codec()
    path = tmp_path / "compression_state_dict.bin"
    torch.save({"best_state": original.state_dict(), "xp.cfg": AUDIOCRAFT, "version": "1", "exported": True}, path)
    model = audiozoo.load(path)
    assert model.config == config_of(original, pad_mode="constant")
    torch.save({"best_state": original.state_dict(), "xp.cfg": AUDIOCRAFT.replace("ELU", "ReLU")}, path)
    with pytest.raises(CheckpointError, match=r"seanet\.activation"):
        audiozoo.load(path)
    torch.save({"best_state": original.state_dict(), "xp.cfg": AUDIOCRAFT.replace("bins", "bin")}, path)
    with pytest.raises(CheckpointError, match="not the configuration"):
        audiozoo.load(path)


def test_published_sizes():
    hub = {
        "encodec_24khz": {},
        "encodec_48khz": {
            "target_bandwidths": [3.0, 6.0, 12.0, 24.0],
            "sampling_rate": 48_000,
            "audio_channels": 2,
            "normalize": True,
            "chunk_length_s": 1.0,
            "overlap": 0.01,
            "norm_type": "time_group_norm",
            "use_causal_conv": False,
        },
        "encodec_32khz": {
            "target_bandwidths": [2.2],
            "sampling_rate": 32_000,
            "num_filters": 64,
            "upsampling_ratios": [8, 5, 4, 4],
            "use_causal_conv": False,
            "codebook_size": 2048,
            "use_conv_shortcut": False,
        },
    }
    for name, fields in hub.items():
        theirs = transformers.EncodecConfig(**fields)
        config = getattr(EncodecConfig, name)()
        assert dataclasses.replace(config, codebook_dim=128) == config_from_hugging_face(theirs.to_dict())
        count = harness.assert_same_shapes(
            functools.partial(transformers.EncodecModel, theirs),
            functools.partial(EncodecModel, config, rngs=nnx.Rngs(0)),
            hugging_face_table(config),
        )
        books = 32 * 1024 if name == "encodec_24khz" else 16 * 1024 if name == "encodec_48khz" else 4 * 2048
        trained = count - books * (2 * 128 + 1) - config.num_quantizers
        assert round(trained / 1e6, 1) == {"encodec_24khz": 14.9, "encodec_48khz": 14.9, "encodec_32khz": 56.9}[name]
    package = original_package().model
    for name in ("24khz", "48khz"):
        config = getattr(EncodecConfig, f"encodec_{name}")()
        harness.assert_same_shapes(
            functools.partial(getattr(package.EncodecModel, f"encodec_model_{name}"), pretrained=False),
            functools.partial(EncodecModel, config, rngs=nnx.Rngs(0)),
            original_table(config),
        )
        harness.assert_same_shapes(
            functools.partial(
                package.LMModel,
                config.num_quantizers,
                1024,
                num_layers=5,
                dim=200,
                past_context=int(3.5 * config.frame_rate),
            ),
            functools.partial(EncodecLanguageModel, config, rngs=nnx.Rngs(0)),
            language_model_table(config),
        )


def voiced(seconds: float, rate: int, channels: int) -> np.ndarray:
    """Like speech: harmonics of a wandering pitch, four syllables a second with near silence between, breath."""
    t = np.arange(int(seconds * rate)) / rate
    pitch = 2 * np.pi * np.cumsum(120 + 25 * np.sin(2 * np.pi * 1.3 * t)) / rate
    harmonics = sum(np.sin(h * pitch + h * h) / h for h in range(1, 30))
    syllables = np.maximum(np.sin(2 * np.pi * 4 * t), 0.01)
    breath = np.random.default_rng(0).standard_normal((channels, t.size))
    return (0.2 * syllables * harmonics + 0.003 * breath)[None].astype(np.float32)


class Quantised:
    r"""Codes of one side, chosen in float32, beside the distances that float64 finds between the same vectors.

    float32 takes the wrong one of two entries only if their distances differ by less than what it may lose. With unit
    roundoff $u$, products of $n$ terms lose at most $\gamma_{n+3} = (n + 3)u / (1 - (n + 3)u)$ of the sizes that are
    summed up (Higham, Accuracy and Stability of Numerical Algorithms, §3.1), so each $|r|^2 - 2re + |e|^2$ at most
    $\gamma_{n+3}(|r| + |e|)^2$; and $r$, by $k$ subtractions of float32 vectors, lost at most $k u$ of the largest of
    them, which moves a distance between two entries by $2 |e - e'|$ times that.
    """

    def __init__(self, vectors: np.ndarray, codes: np.ndarray, books: np.ndarray):
        self.codes, roundoff = codes, 2.0**-24
        left, size, largest = vectors.astype(np.float64), vectors.shape[1], 0.0
        gamma = (size + 3) * roundoff / (1 - (size + 3) * roundoff)
        self.exact, self.lost, self.apart = np.empty_like(codes), np.empty(codes.shape), []
        for k, (book, chosen) in enumerate(zip(books, codes, strict=True)):
            norms = np.sum(book**2, axis=1)
            distances = np.sum(left**2, axis=1)[:, None] - 2 * left @ book.T + norms
            rows = np.arange(len(left))
            self.exact[k] = best = np.argmin(distances, axis=1)
            self.lost[k] = distances[rows, chosen] - distances[rows, best]
            length = np.linalg.norm(left, axis=1)
            largest = np.maximum(largest, length)
            between = np.linalg.norm(book[chosen] - book[best], axis=1)
            bound = 2 * gamma * (length + np.sqrt(norms.max())) ** 2 + 2 * k * roundoff * largest * between
            self.apart.append((distances, bound))
            left = left - book[chosen]

    def assert_right(self) -> None:
        """Every code is the nearest entry to what its predecessors left over, but for at most 0.1 % of near-ties."""
        wrong = self.exact != self.codes
        assert wrong.mean() <= 0.001, f"{wrong.sum()} of {wrong.size} are not the nearest entry"
        for k, frame in np.argwhere(wrong):
            assert self.lost[k, frame] <= self.apart[k][1][frame], (k, frame, self.lost[k, frame])

    def assert_same_choices(self, other: Quantised, moved: np.ndarray) -> None:
        """The same code wherever what is left over is the same, but for at most 0.1 % of near-ties.

        Where two sides part, later codes of that frame stand for another vector: those `assert_right` alone can judge.

        Args:
            other: the other side.
            moved: how far the vectors that it quantised are from these.
        """
        differs = self.codes != other.codes
        first = differs & (np.cumsum(differs, axis=0) == 1)
        compared = np.cumsum(differs, axis=0) - differs == 0
        assert first.sum() <= 0.001 * compared.sum(), f"{first.sum()} of {compared.sum()} choices differ"
        assert compared.mean() > 0.9
        for k, frame in np.argwhere(first):
            distances, bound = self.apart[k]
            a, b = self.codes[k, frame], other.codes[k, frame]
            between = abs(distances[frame, a] - distances[frame, b])
            # d|r - e|² = 2 (r - e) dr
            by_moving = 2 * (np.sqrt(distances[frame, a]) + np.sqrt(distances[frame, b])) * moved[frame]
            assert between <= 2 * bound[frame] + by_moving, (k, frame, between)


@pytest.mark.parametrize("name", ["24khz", "48khz"])
def test_full_size_in_single_precision(name):
    """A second at 24 kbit/s: both sides' float32 codes are float64's, near-ties aside; the same codes decode alike."""
    stereo = name == "48khz"
    with harness.precision("float32"):
        config = getattr(EncodecConfig, f"encodec_{name}")()
        names = set(transformers.EncodecConfig().to_dict())
        theirs_config = transformers.EncodecConfig(**{k: v for k, v in vars(config).items() if k in names})
        reference = harness.randomise(transformers.EncodecModel(theirs_config), 3)
        model = harness.ported(reference, lambda: EncodecModel(config, rngs=nnx.Rngs(0)), hugging_face_table(config))
        x = voiced(1.0, config.sampling_rate, config.audio_channels)
        with torch.no_grad():
            theirs = reference.encode(torch.tensor(x), bandwidth=24.0)
            scale = theirs.audio_scales[0].numpy()[..., None] if stereo else np.float32(1)
            expected = reference.encoder(torch.tensor(x / scale))[0].T.numpy()

        def encode(model, x):
            outputs = model.encode(x, bandwidth=24.0)
            scale = outputs.audio_scales[0][..., None] if stereo else 1
            return outputs.audio_codes, model.encoder((x / scale).swapaxes(1, 2))[0]

        codes, vectors = jax.jit(encode)(model, x)
        harness.assert_close(vectors, expected)
        books = np.stack([layer.codebook.embed.double().numpy() for layer in reference.quantizer.layers])
        original = Quantised(expected, theirs.audio_codes.numpy()[0, 0], books)
        ours = Quantised(np.asarray(vectors), np.asarray(codes)[0, 0], books)
        assert ours.codes.shape == ((16, 150) if stereo else (32, 75))
        for side in (original, ours):
            side.assert_right()
        ours.assert_same_choices(original, np.linalg.norm(vectors - expected, axis=1))
        # The second nearest entry, or the residual of another frame, is seen at once.
        second = ours.codes.copy()
        second[3, 40:44] = np.argsort(ours.apart[3][0][40:44], axis=1)[:, 1]
        for wrong in (second, np.roll(ours.codes, 1, axis=1)):
            with pytest.raises(AssertionError):
                Quantised(np.asarray(vectors), wrong, books).assert_right()
            with pytest.raises(AssertionError):
                ours.assert_same_choices(Quantised(np.asarray(vectors), wrong, books), np.zeros(len(vectors)))
        if not stereo:
            with torch.no_grad():
                values = reference.decode(theirs.audio_codes, theirs.audio_scales).audio_values
            decoded = audiozoo.jit(model, "decode")(jnp.asarray(theirs.audio_codes.numpy()), [None]).audio_values
            harness.assert_close(decoded, values)


# --- training --------------------------------------------------------------------------------------------------------


def quantisers(entries: int = 4, books: int = 3):
    """The authors' residual quantiser before its first batch, and ours."""
    package = original_package()
    original = package.quantization.ResidualVectorQuantizer(6, books, entries, kmeans_iters=5)
    config = EncodecConfig(
        target_bandwidths=(books * (entries.bit_length() - 1) * 0.4,),
        sampling_rate=2400,
        hidden_size=6,
        upsampling_ratios=(3, 2),
        codebook_size=entries,
    )
    ours = encodec.EncodecResidualVectorQuantizer(config, dtype=None, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    return original.to(torch.float64).train(), ours


def buffers(original) -> dict[str, np.ndarray]:
    books = [layer._codebook for layer in original.vq.layers]
    return {n: np.stack([getattr(b, n).numpy() for b in books]) for n in ("embed", "embed_avg", "cluster_size")}


def test_two_training_steps_of_the_quantiser_as_released():
    """k-means on the first batch, moving averages on both; the gradient that reaches the encoder, and its fault."""
    original, ours = quantisers()
    rng = np.random.default_rng(0)
    weights = signal(2, 40, 6, seed=9)
    for step in range(2):
        z = signal(2, 40, 6, seed=step)
        rows = np.stack([[rng.permutation(80)[:4] for _ in range(3)] for _ in range(2)])
        x = torch.tensor(z, requires_grad=True)
        # k-means draws in the first step only; no entry is dead.
        queue = [rows[0, k] for k in range(3)] if step == 0 else []
        with mock.patch.object(
            original_package().core, "sample_vectors", lambda s, _, q=queue: s[torch.tensor(q.pop(0))]
        ):
            quantized, codes, loss = original.vq(x.mT)
        (loss.mean() + (quantized.mT * torch.tensor(weights)).sum()).backward()

        def objective(z, rows=rows):
            result = ours.train_step(z, rows=jnp.asarray(rows), kmeans_iterations=5, released=True)
            return result.commitment_loss + jnp.sum(result.quantized * weights), result

        (_, result), gradient = jax.jit(jax.value_and_grad(objective, has_aux=True))(jnp.asarray(z))
        np.testing.assert_array_equal(result.codes, codes.transpose(0, 1))
        harness.assert_close(result.quantized, quantized.mT, name="quantized")
        harness.assert_close(result.commitment_loss, loss.mean(), name="commitment")
        harness.assert_close(gradient, x.grad, kind="gradient")
        for name, expected in buffers(original).items():
            harness.assert_close(result.codebooks[name], expected, name=f"{name} after step {step}")
        ours.replace(result.codebooks)


def test_the_commitment_gradient_of_the_paper():
    """Every codebook's residual pulls at the encoder, as in AudioCraft; in the released code only the first one's."""
    core = audiocraft(core="quantization.core_vq").core
    kwargs = {"dim": 6, "codebook_size": 4, "kmeans_init": True, "kmeans_iters": 5, "threshold_ema_dead_code": 0}
    original = core.ResidualVectorQuantization(num_quantizers=3, **kwargs).double().train()
    _, ours = quantisers()
    z, weights, rows = signal(2, 10, 6), signal(2, 10, 6, seed=9), np.arange(24).reshape(2, 3, 4) % 19
    x, queue = torch.tensor(z, requires_grad=True), list(rows[0])
    with mock.patch.object(core, "sample_vectors", lambda s, _: s[torch.tensor(queue.pop(0))]):
        quantized, codes, losses = original(x.mT)
    (losses.mean() + (quantized.mT * torch.tensor(weights)).sum()).backward()

    @functools.partial(jax.jit, static_argnames="released")
    def step(z, released):
        def objective(z):
            options = {"rows": jnp.asarray(rows), "kmeans_iterations": 5, "dead_below": 0}
            result = ours.train_step(z, released=released, **options)
            return result.commitment_loss + jnp.sum(result.quantized * weights), result

        return jax.value_and_grad(objective, has_aux=True)(z)

    (_, result), gradient = step(jnp.asarray(z), False)
    np.testing.assert_array_equal(result.codes, codes.transpose(0, 1))
    harness.assert_close(result.quantized, quantized.mT, name="quantized")
    harness.assert_close(result.commitment_loss, losses.mean(), name="commitment")
    harness.assert_close(gradient, x.grad, kind="gradient")
    assert np.abs(step(jnp.asarray(z), True)[1] - gradient).max() > 1e-3


def test_balancer():
    """Three steps of AudioCraft's, of a decay that shows: the balanced gradient of each."""
    theirs = audiocraft(balancer="losses.balancer").balancer.Balancer({"a": 0.1, "b": 3.0}, ema_decay=0.8)
    ours = Balancer({"a": 0.1, "b": 3.0}, decay=0.8)
    state, rng = ours.init(jnp.float64), np.random.default_rng(0)
    for step in range(3):
        targets = rng.standard_normal((2, 3, 1, 50)) * [[[[1.0]]], [[[30.0]]]]
        y = torch.tensor(rng.standard_normal((3, 1, 50)), requires_grad=True)
        losses = {n: (y - torch.tensor(t)).abs().pow(1.5).mean() for n, t in zip("ab", targets, strict=True)}
        gradients = {n: torch.autograd.grad(loss, y, retain_graph=True)[0].numpy() for n, loss in losses.items()}
        theirs.backward(losses, y)
        combined, state = ours({n: jnp.asarray(g) for n, g in gradients.items()}, state)
        harness.assert_close(combined, y.grad, kind="gradient", name=f"step {step}")


@functools.cache
def discriminators(channels: int = 1):
    original = harness.randomise(
        original_package().msstftd.MultiScaleSTFTDiscriminator(
            4, in_channels=channels, n_ffts=[64, 32], hop_lengths=[16, 8], win_lengths=[64, 32]
        )
    )
    kwargs = {"filters": 4, "channels": channels, "param_dtype": jnp.float64}
    ours = random_model(lambda rngs: encodec.MultiScaleSTFTDiscriminator((64, 32), **kwargs, rngs=rngs))
    return original, harness.port(original, ours, DISCRIMINATOR_TABLE)


def torch_features(real, fake) -> torch.Tensor:
    terms = [
        (a - b).abs().mean() / a.abs().mean()
        for r, f in zip(real, fake, strict=True)
        for a, b in zip(r, f, strict=True)
    ]
    return torch.stack(terms).mean()


def test_discriminator_and_its_losses():
    """Of stereo: scores and features of every layer; the hinge loss, and its gradient for every parameter."""
    original, ours = discriminators(2)
    x, y = signal(2, 2, 200), signal(2, 2, 200, seed=1)
    scores, features = jax.jit(lambda m, v: m(v))(ours, jnp.asarray(x))
    with torch.no_grad():
        their_scores, their_features = original(torch.tensor(x))
    for a, b in zip(scores, their_scores, strict=True):
        harness.assert_close(jnp.moveaxis(a, -1, 1), b)
    for a, b in zip(itertools.chain(*features), itertools.chain(*their_features), strict=True):
        harness.assert_close(jnp.moveaxis(a, -1, 1), b)

    def reference_loss():
        real, fake = original(torch.tensor(x))[0], original(torch.tensor(y))[0]
        terms = [torch.relu(1 - a).mean() + torch.relu(1 + b).mean() for a, b in zip(real, fake, strict=True)]
        return torch.stack(terms).mean()

    compared = harness.compare_gradients(
        original,
        reference_loss,
        ours,
        lambda m: encodec.discriminator_loss(m(jnp.asarray(x))[0], m(jnp.asarray(y))[0]),
        DISCRIMINATOR_TABLE,
    )
    assert len(compared) == 2 * (2 + 5 * 3)


def torch_mel(x: torch.Tensor, rate: int, n_fft: int, normalized: bool) -> torch.Tensor:
    hop = n_fft // 4
    edge = (n_fft - hop) // 2
    x = torch.nn.functional.pad(x, (edge, edge), mode="reflect")
    x = torch.nn.functional.pad(x, (0, -(x.shape[-1] - n_fft) % hop))
    window = torch.hann_window(n_fft)
    z = torch.stft(x[:, 0], n_fft, hop, window=window, center=False, return_complex=True)
    z = z / window.pow(2).sum().sqrt() if normalized else z
    bank = transformers.audio_utils.mel_filter_bank(n_fft // 2 + 1, 64, 0.0, rate / 2, rate, norm=None, mel_scale="htk")
    return torch.einsum("bft,fm->bmt", z.abs().pow(2), torch.tensor(bank))


def torch_frequency(x, y, rate, exponents, alphas, average, normalized) -> torch.Tensor:
    loss = torch.zeros(())
    for exponent, alpha in zip(exponents, alphas, strict=True):
        a, b = (torch_mel(v, rate, 2**exponent, normalized) for v in (x, y))
        loss = loss + (a - b).abs().mean() + alpha * (torch.log10(a + 1e-5) - torch.log10(b + 1e-5)).pow(2).mean()
    return loss / (2 * len(exponents)) if average else loss


@pytest.mark.filterwarnings("ignore:At least one mel filter")
def test_frequency_loss_of_the_paper_and_of_the_released_code():
    x, y = signal(1, 1, 2500), signal(1, 1, 2500, seed=1)
    released = {
        "exponents": range(6, 8),
        "alphas": [(2**i - 1) ** 0.5 for i in range(6, 8)],
        "average": False,
        "normalized": False,
    }
    for options in ({"exponents": range(5, 7), "alphas": [1.0, 1.0], "average": True, "normalized": True}, released):
        ours = jax.jit(lambda a, b, o=options: encodec.frequency_loss(a, b, 24_000, **o))(
            jnp.asarray(x), jnp.asarray(y)
        )
        harness.assert_close(ours, torch_frequency(torch.tensor(x), torch.tensor(y), 24_000, **options))


@pytest.mark.filterwarnings("ignore:At least one mel filter")
def test_the_gradient_of_a_training_step():
    """All losses through the balancer, after a step that moved its averages: the gradient of every parameter."""
    original = original_codec(books=2)
    config = config_of(original)
    model = random_model(lambda rngs: EncodecModel(config, param_dtype=jnp.float64, rngs=rngs))
    table = original_table(config)
    harness.port(original, model, table)
    judge, our_judge = discriminators()
    x = torch.tensor(signal(2, 1, 198))
    weights = {"time": 0.1, "frequency": 1.0, "adversarial": 3.0, "feature": 3.0}
    scales = {"exponents": (5,), "alphas": (1.0,), "average": True, "normalized": True}
    rows = np.zeros((2, 2, 1024), int)
    norms = dict.fromkeys(weights, 0.7)

    class Step(torch.autograd.Function):
        """The identity, whose gradient is what the balancer gives."""

        @staticmethod
        def forward(ctx, y, gradient):
            ctx.save_for_backward(gradient)
            return y.sum() * 0

        @staticmethod
        def backward(ctx, _):
            return ctx.saved_tensors[0], None

    def reference_loss():
        quantized, _, loss = original.quantizer.vq(original.encoder(x))
        y = original.decoder(quantized)[..., : x.shape[-1]]
        free = y.detach().requires_grad_()
        (scores, fake), (_, real) = judge(free), judge(x)
        losses = {
            "time": (x - free).abs().mean(),
            "frequency": torch_frequency(x, free, 2400, **scales),
            "adversarial": torch.stack([torch.relu(1 - s).mean() for s in scores]).mean(),
            "feature": torch_features([[f.detach() for f in r] for r in real], fake),
        }
        total = torch.zeros_like(free)
        for name, value in losses.items():
            (gradient,) = torch.autograd.grad(value, free, retain_graph=True)
            # The averages after one earlier step of norm 0.7, decay 0.9.
            norm = gradient.flatten(1).norm(dim=1).mean().item()
            average = (0.9 * norms[name] + norm) / 1.9
            total += weights[name] / sum(weights.values()) / (1e-12 + average) * gradient
        return Step.apply(y, total) + 0.5 * loss.mean()

    original.train()
    for layer in original.quantizer.vq.layers:
        layer._codebook.inited.fill_(1.0)
        layer._codebook.cluster_size.fill_(5.0)
    harness.port(original, model, table)
    balancer = Balancer(weights, decay=0.9)
    state = encodec.BalancerState(
        {name: jnp.asarray(0.7) for name in weights}, {name: jnp.asarray(1.0) for name in weights}
    )

    @jax.jit
    def ours(model, judge, state):
        return encodec.codec_gradients(
            model,
            jnp.asarray(x.numpy()),
            balancer,
            state,
            discriminator=judge,
            commitment_weight=0.5,
            frequency_options=scales,
            rows=jnp.asarray(rows),
            released=True,
        )

    gradient, after, losses, _ = ours(model, our_judge, state)
    assert set(losses) == {*weights, "commitment"}
    assert float(after.weights["time"]) == 1.9
    before = {n: b.clone() for n, b in original.named_buffers()}
    original.zero_grad()
    reference_loss().backward()
    original.load_state_dict(before, strict=False)
    theirs = {n: p.grad for n, p in original.named_parameters()}
    flat = {".".join(map(str, path)): v[...] for path, v in nnx.to_flat_state(gradient)}
    largest = max(float(g.abs().max()) for g in theirs.values())
    compared = 0
    for step in harness.steps_between(original, model, table):
        if step.foreign[0] not in theirs:
            continue
        wanted = step.operation.forward(tuple(theirs[n].numpy() for n in step.foreign))
        for path, array in zip(step.ours, wanted, strict=True):
            scale = max(float(np.sqrt(np.mean(array**2))), 1e-3 * largest)
            harness.assert_close(flat[path], array, kind="gradient", name=path, scale=scale)
            compared += 1
    assert compared == len(flat)


# --- language model and files ----------------------------------------------------------------------------------------


@functools.cache
def language_models():
    """The authors', for 2 codebooks of 16 entries, looking 5 frames back, and ours."""
    original = original_package().model.LMModel(2, 16, num_layers=2, dim=16, past_context=5)
    config = EncodecConfig(
        target_bandwidths=(2 * 4 * 0.4,),
        sampling_rate=2400,
        upsampling_ratios=(3, 2),
        codebook_size=16,
        language_model_size=16,
        language_model_layers=2,
        language_model_context_s=5 / 400,
    )
    assert (config.num_quantizers, config.language_model_context) == (2, 5)
    ours = random_model(lambda rngs: EncodecLanguageModel(config, param_dtype=jnp.float64, rngs=rngs))
    return harness.randomise(original), ours, language_model_table(config)


def test_language_model():
    """At once and frame by frame, past its memory; its loss and all gradients."""
    original, ours, table = language_models()
    harness.port(original, ours, table)
    codes = np.random.default_rng(0).integers(0, 16, (2, 2, 13))
    previous = np.pad(codes[..., :-1] + 1, ((0, 0), (0, 0), (1, 0)))
    with torch.no_grad():
        expected, _, _ = original(torch.tensor(previous))  # (batch, entries, codebooks, frames)
        states, offset, steps = None, 0, []
        for t in range(13):
            step, states, offset = original(torch.tensor(previous[..., t : t + 1]), states, offset)
            steps.append(step)
    torch.testing.assert_close(torch.cat(steps, -1), expected)
    logits = jax.jit(lambda m, i: m(i))(ours, jnp.asarray(previous))
    harness.assert_close(jax.nn.softmax(logits, axis=-1).transpose(0, 3, 2, 1), expected)
    state, run = ours.initial_state(2), jax.jit(lambda m, *rest: m.step(*rest))
    for t in range(13):
        pdf, state = run(ours, jnp.asarray(previous[..., t]), state)
        harness.assert_close(pdf.transpose(0, 2, 1), expected[..., t], name=f"frame {t}")

    def reference_loss():
        pdf, _, _ = original(torch.tensor(previous))
        return -pdf.log().gather(1, torch.tensor(codes)[:, None]).mean()

    compared = harness.compare_gradients(
        original, reference_loss, ours, lambda m: encodec.language_model_loss(m, jnp.asarray(codes)), table
    )
    assert len(compared) == 5 + 2 * (8 + 4 + 4)


def test_language_model_files(tmp_path):
    original, _, _ = language_models()
    torch.save(original.state_dict(), tmp_path / "encodec_lm.th")
    model = audiozoo.load(tmp_path / "encodec_lm.th")
    assert isinstance(model, EncodecLanguageModel)
    assert (model.config.num_quantizers, model.config.codebook_size, model.config.language_model_layers) == (2, 16, 2)


def test_range_coder_bytes():
    """Uniform, skewed and impossible symbols: the same bytes as theirs, and read back from either."""
    package = original_package()
    theirs = package.quantization_ac
    rng = np.random.default_rng(0)
    for symbols, sharpness in ((2, 1.0), (5, 30.0), (1024, 3.0), (3000, 0.1)):
        pdfs = torch.softmax(torch.tensor(rng.standard_normal((120, symbols)) * sharpness).float(), -1) * (1 - 1e-6)
        message = [int(rng.choice(symbols, p=p.double().numpy() / p.double().sum().item())) for p in pdfs[:-20]]
        message += [int(p.argmin()) for p in pdfs[-20:]]
        cdfs = codec.quantized_cdf(pdfs.numpy())
        sink, encoder = io.BytesIO(), codec.RangeEncoder()
        their_encoder = theirs.ArithmeticCoder(sink)
        for pdf, cdf, symbol in zip(pdfs, cdfs, message, strict=True):
            expected = theirs.build_stable_quantized_cdf(pdf, 24)
            np.testing.assert_array_equal(cdf, expected.numpy())
            their_encoder.push(symbol, expected)
            encoder.push(symbol, cdf)
        their_encoder.flush()
        content = encoder.finish()
        assert content == sink.getvalue()
        reader = codec.BitReader(content)
        decoder = codec.RangeDecoder(reader)
        assert [decoder.pull(cdf) for cdf in cdfs] == message
        assert reader.position == len(content)


@pytest.mark.parametrize("variant", ["causal", "stereo"])
@pytest.mark.parametrize("with_lm", [False, True], ids=["plain", "language model"])
def test_files_byte_for_byte(variant, with_lm):
    """Their whole program writes what ours writes, given the same probabilities, and each reads the other's file."""
    package = original_package()
    with harness.precision("float32"):
        original = original_codec(variant, torch.float32)
        config = config_of(original, language_model_size=16, language_model_layers=1, language_model_context_s=6 / 400)
        model = random_model(lambda rngs: EncodecModel(config, rngs=rngs))
        harness.port(original, model, original_table(config))
        lm = random_model(lambda rngs: EncodecLanguageModel(config, rngs=rngs)) if with_lm else None
        compiled = ecdc.Compiled(model, lm)

        class Predictor(torch.nn.Module):
            """Their interface to our language model."""

            def forward(self, indices, states=None, offset=0):
                state = lm.initial_state(1) if states is None else states
                pdf, state = compiled._step(compiled._weights, indices[..., 0].numpy().astype(np.int32), state)
                return torch.tensor(np.asarray(pdf)).permute(0, 2, 1)[..., None], state, offset + 1

        original.set_target_bandwidth(config.target_bandwidths[0])
        x = signal(config.audio_channels, 250, seed=4).astype(np.float32)
        if variant == "stereo":  # a loudness that no order of summation rounds
            x = np.where(x[:1] > 0, 0.5, -0.5).astype(np.float32).repeat(2, axis=0)
        with (
            mock.patch.object(original, "get_lm_model", Predictor),
            mock.patch.dict(package.compress.MODELS, {"encodec": lambda: original}),
            torch.no_grad(),
        ):
            expected = package.compress.compress(original, torch.tensor(x), use_lm=with_lm)
            ours = codec.compress(compiled, x)
            assert ours == expected
            values, rate = package.compress.decompress(ours)
        assert rate == 2400
        harness.assert_close(codec.decompress(expected, compiled), values)


def test_a_length_that_the_authors_program_cannot_read_back():
    """6,720 samples at 24 kHz are 21 frames; 6720 / 24000 · 75 in floating point is a little more, so it wants 22."""
    package, config = original_package(), EncodecConfig.encodec_24khz()
    original = package.model.EncodecModel.encodec_model_24khz(pretrained=False)
    header = ecdc.Header("encodec_24khz", 6720, 2, False)
    codes = np.arange(42).reshape(21, 2)
    content = header.to_bytes() + codec.pack_bits(codes, 10)
    with (
        mock.patch.dict(package.compress.MODELS, {"encodec_24khz": lambda: original}),
        pytest.raises(EOFError),
    ):
        package.compress.decompress(content)
    compiled = mock.Mock(spec=ecdc.Compiled, config=config, language_model=None)
    compiled.run.side_effect = lambda method, codes: np.zeros((1, 1, codes.shape[-1] * 320))
    assert codec.decompress(content, compiled).shape == (1, 6720)
    np.testing.assert_array_equal(compiled.run.call_args[0][1][0], codes.T)


# --- processor -------------------------------------------------------------------------------------------------------


def test_processor(tmp_path):
    for fields in ({}, {"feature_size": 2, "sampling_rate": 48_000, "chunk_length_s": 1.0, "overlap": 0.01}):
        theirs = transformers.EncodecFeatureExtractor(**fields)
        theirs.save_pretrained(tmp_path)
        ours = EncodecFeatureExtractor.from_directory(tmp_path)
        rate, stereo = theirs.sampling_rate, theirs.feature_size == 2
        cut = {} if stereo else {"max_length": 90}
        audio = [signal(*((2, n) if stereo else (n,)), seed=n).astype(np.float32) for n in (500, 96_100, 95_040)]
        cases = [(audio[0], {}), (audio, {}), (audio[:1], {"padding": "max_length", "max_length": 700})]
        cases += [(audio[1:2] if stereo else audio[1:], {"padding": False, "truncation": True} | cut)]
        for raw, options in cases:
            expected = theirs(raw, sampling_rate=rate, return_tensors="np", **options)
            found = ours(raw, rate, **options)
            assert set(found) == set(expected), options
            for name, array in expected.items():
                np.testing.assert_array_equal(found[name], array, err_msg=f"{name} {options}")
        ours.save(tmp_path / "saved")
        again = json.loads((tmp_path / "saved" / "preprocessor_config.json").read_text())
        assert again == json.loads((tmp_path / "preprocessor_config.json").read_text())
