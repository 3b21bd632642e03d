"""EnCodec against its authors' package and `transformers`: 24, 48 and 32 kHz, and one hop of a stream.

Published sizes, random weights.
"""

from __future__ import annotations

import functools
import sys
import types
from typing import Any
from unittest import mock

import numpy as np

from benchmarks.framework import Case, Run, random_model, randomised, tensor, threads, within

SEED = 0
FIELDS = (
    "target_bandwidths",
    "sampling_rate",
    "audio_channels",
    "normalize",
    "chunk_length_s",
    "overlap",
    "num_filters",
    "upsampling_ratios",
    "norm_type",
    "use_causal_conv",
    "codebook_size",
    "use_conv_shortcut",
)


@functools.lru_cache(maxsize=1)
def original(size: str) -> Any:
    """`transformers`' model of a published size, random weights, float32."""
    import transformers

    from audiozoo.models.encodec import EncodecConfig

    ours = getattr(EncodecConfig, size)()
    config = transformers.EncodecConfig(**{name: getattr(ours, name) for name in FIELDS})
    return randomised(transformers.EncodecModel(config), SEED)


@functools.lru_cache(maxsize=1)
def model(size: str) -> Any:
    """Ours, with the same weights, made without the original."""
    from audiozoo.models.encodec import EncodecConfig, EncodecModel
    from weights_conversion.encodec import hugging_face_table

    config = getattr(EncodecConfig, size)()
    return random_model(EncodecModel, config, hugging_face_table(config), SEED)


def audio(size: str, seconds: float) -> np.ndarray:
    """Noise, float32 `(1, channels, samples)`."""
    from audiozoo.models.encodec import EncodecConfig

    config = getattr(EncodecConfig, size)()
    shape = (1, config.audio_channels, int(seconds * config.sampling_rate))
    return np.random.default_rng(1).normal(0, 0.1, shape).astype(np.float32)


def agree(ours: Any, theirs: Any) -> str:
    """The share of equal codes: the later codebooks see what the earlier ones left, ties included."""
    same = float(np.mean(np.asarray(ours) == np.asarray(theirs)))
    if same < 0.99:
        raise AssertionError(f"only {same:.2%} of the codes are equal")
    return f"{same:.3%} of codes equal"


def our_whole(size: str, seconds: float, bandwidth: float) -> Run:
    import jax

    import audiozoo

    run, x = audiozoo.jit(model(size)), jax.numpy.asarray(audio(size, seconds))

    def call() -> Any:
        output = run(x, bandwidth=bandwidth)
        np.asarray(output.audio_values)
        return np.asarray(output.audio_codes)

    return call


def their_whole(size: str, seconds: float, bandwidth: float) -> Run:
    import torch

    theirs, x = original(size), tensor(audio(size, seconds))

    def call() -> Any:
        with torch.inference_mode():
            return theirs(x, bandwidth=bandwidth).audio_codes.numpy()

    return call


def package_whole(bandwidth: float, seconds: float) -> Run:
    """The authors' 24 kHz codec; of torchaudio, which it imports, this needs nothing."""
    import torch

    with mock.patch.dict(sys.modules, {"torchaudio": types.ModuleType("torchaudio")}):
        from encodec.model import EncodecModel

    from audiozoo.loading import variables
    from weights_conversion.encodec import original_table

    size = "encodec_24khz"
    ours, x = model(size), tensor(audio(size, seconds))
    table = original_table(ours.config)
    weights = dict(table.write({name: v[...] for name, v in variables(ours).items()}))
    torch.set_num_threads(threads())
    theirs = EncodecModel.encodec_model_24khz(pretrained=False).eval()
    names = theirs.state_dict()  # in an older spelling than the table's
    theirs.load_state_dict({name: torch.from_numpy(np.array(weights[table.today(name)])) for name in names})
    theirs = theirs.to(x.dtype)
    theirs.set_target_bandwidth(bandwidth)

    def call() -> Any:
        with torch.inference_mode():
            frames = theirs.encode(x)
            theirs.decode(frames)
            return frames[0][0].numpy()

    return call


def codes(size: str, frames: int, books: int) -> np.ndarray:
    from audiozoo.models.encodec import EncodecConfig

    return np.random.default_rng(2).integers(0, getattr(EncodecConfig, size)().codebook_size, (1, 1, books, frames))


def our_decoding(size: str, frames: int, books: int) -> Run:
    import jax

    import audiozoo

    run, x = audiozoo.jit(model(size), "decode"), jax.numpy.asarray(codes(size, frames, books), "int32")
    return lambda: np.asarray(run(x, [None]).audio_values)


def their_decoding(size: str, frames: int, books: int) -> Run:
    import torch

    theirs, x = original(size), tensor(codes(size, frames, books))

    def call() -> Any:
        with torch.inference_mode():
            return theirs.decode(x, [None]).audio_values.float().numpy()

    return call


def our_hop() -> Run:
    """One frame in and one frame out, from a state in the middle of a stream."""
    import jax

    import audiozoo

    ours = model("encodec_24khz")
    encode, decode = audiozoo.jit(ours, "encode_chunk"), audiozoo.jit(ours, "decode_chunk")
    x, states = jax.numpy.asarray(audio("encodec_24khz", 320 / 24_000)), ours.initial_state()

    def call() -> Any:
        found, _ = encode(x, states["encoder"], bandwidth=6.0)
        return np.asarray(decode(found, states["decoder"])[0])

    return call


CASES = (
    Case(
        "encode + decode, 10 s, 24 kHz, 6 kbit/s",
        functools.partial(our_whole, "encodec_24khz", 10.0, 6.0),
        {
            "encodec": functools.partial(package_whole, 6.0, 10.0),
            "transformers": functools.partial(their_whole, "encodec_24khz", 10.0, 6.0),
        },
        target=2.0,
        agreement=agree,
        repeats=6,
    ),
    Case(
        "encode + decode, 5 s, 48 kHz stereo, 6 kbit/s",
        functools.partial(our_whole, "encodec_48khz", 5.0, 6.0),
        {"transformers": functools.partial(their_whole, "encodec_48khz", 5.0, 6.0)},
        target=1.5,
        agreement=agree,
        repeats=4,
    ),
    Case(
        "decode, 5 s, 32 kHz (MusicGen's)",
        functools.partial(our_decoding, "encodec_32khz", 250, 4),
        {"transformers": functools.partial(their_decoding, "encodec_32khz", 250, 4)},
        target=1.5,
        agreement=within(1e-4),
        repeats=4,
    ),
    Case("one hop of a stream (13 ms), encode + decode", our_hop, {}, repeats=50),
)
