r"""Spectrograms and what the papers make of them, in JAX: differentiable, batched, inside `jax.jit`.

The building blocks are general (`frame`, `stft`, `spectrogram`, `mel_filterbank`); what one paper calls its features is
a few lines on top of them (`log_mel_spectrogram` for Whisper). Everything is computed in the dtype of the waveform.

The discrete Fourier transform of a frame is XLA's real FFT: for 30 s of audio (3,000 frames of 400 samples, float32,
two CPU cores) the log-mel spectrogram takes 3.5 ms with it, 10 ms with a product with a 400 × 402 matrix, and 5.5 ms
with that matrix folded along its symmetry.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float
from numpy.typing import ArrayLike

from audiozoo.errors import AudioError, UsageError

# ------------------------------------------------------------------------------------- frames and Fourier transforms


def hann_window(length: int, periodic: bool = True) -> np.ndarray:
    r"""$w_n = \frac12 - \frac12 \cos(2\pi n / N)$, $N$ = `length` (periodic) or `length - 1` (symmetric); float64."""
    return 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(length) / (length if periodic else length - 1))


def frame(x: Float[Array, "*batch time"], length: int, hop: int) -> Float[Array, "*batch frames length"]:
    """Overlapping frames $x_{t \\cdot hop}, …, x_{t \\cdot hop + length - 1}$; samples that fill no frame are left out.

    Built from shifted views of hop-sized blocks rather than by a gather, so that no index table grows with `time`.
    """
    frames = 1 + (x.shape[-1] - length) // hop
    if x.shape[-1] < length:
        raise AudioError(f"{x.shape[-1]} samples are fewer than one frame of {length} samples.")
    shifts = -(-length // hop)
    total = (frames + shifts - 1) * hop
    x = x[..., :total]
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, total - x.shape[-1])])
    blocks = x.reshape(*x.shape[:-1], frames + shifts - 1, hop)
    views = [blocks[..., shift : shift + frames, : min(hop, length - shift * hop)] for shift in range(shifts)]
    return jnp.concatenate(views, axis=-1)


def covering(waveform: Float[np.ndarray, " time"], length: int) -> list[Float[np.ndarray, " samples"]]:
    """Windows of `length` samples that cover a waveform: end to end, but the last is flush with its end.

    What is not longer than a window, or no waveform at all, is the only one.
    """
    if waveform.ndim != 1 or len(waveform) <= length:
        return [waveform]
    starts = [*range(0, len(waveform) - length, length), len(waveform) - length]
    return [waveform[start : start + length] for start in starts]


def stft(
    x: Float[Array, "*batch time"],
    n_fft: int,
    hop_length: int,
    window: ArrayLike | None = None,
    *,
    center: bool = True,
    pad_mode: str = "reflect",
) -> Complex[Array, "*batch frames frequencies"]:
    r"""$X_{t,k} = \sum_n w_n\, x_{t \cdot hop + n}\, e^{-2\pi i k n / N}$ for $k = 0 … N/2$.

    Args:
        x: waveform, any leading axes.
        n_fft: $N$, samples in a frame.
        hop_length: samples between frames.
        window: $w$; a window shorter than $N$ is centred in it. A periodic Hann window of $N$ samples if not given.
        center: pad $\lfloor N/2 \rfloor$ samples at both ends, so that frame $t$ is centred on sample $t \cdot hop$.
        pad_mode: how, as in `numpy.pad`: "reflect", "constant" (zeros), "edge" ….
    """
    weights = hann_window(n_fft) if window is None else np.asarray(window, np.float64)
    if len(weights) > n_fft:
        raise UsageError(f"A window of {len(weights)} samples is longer than the frame of {n_fft}.")
    left = (n_fft - len(weights)) // 2
    weights = np.pad(weights, (left, n_fft - len(weights) - left))
    if center:
        half = n_fft // 2
        if pad_mode == "reflect" and x.shape[-1] <= half:
            raise AudioError(f"{x.shape[-1]} samples are too few to mirror {half} at the ends; pad the waveform first.")
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(half, half)], mode=pad_mode)
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))  # there is no Fourier transform of half precision
    return jnp.fft.rfft(frame(x, n_fft, hop_length) * jnp.asarray(weights, x.dtype))


def spectrogram(
    x: Float[Array, "*batch time"],
    n_fft: int,
    hop_length: int,
    window: ArrayLike | None = None,
    *,
    power: float = 2.0,
    center: bool = True,
    pad_mode: str = "reflect",
) -> Float[Array, "*batch frames frequencies"]:
    """$|X_{t,k}|^{power}$ of the `stft` with the same arguments."""
    return _magnitude(stft(x, n_fft, hop_length, window, center=center, pad_mode=pad_mode), power)


def _magnitude(x: Complex[Array, "*any"], power: float) -> Float[Array, "*any"]:
    if power == 2.0:
        return jnp.square(x.real) + jnp.square(x.imag)
    return jnp.abs(x) if power == 1.0 else jnp.abs(x) ** power


# ----------------------------------------------------------------------------------------------------- mel filterbanks

_SLANEY_BREAK_HZ, _SLANEY_HZ_PER_MEL, _SLANEY_LOG_STEP = 1000.0, 200.0 / 3.0, np.log(6.4) / 27.0


def hertz_to_mel(hertz: ArrayLike, scale: str = "slaney") -> np.ndarray:
    r"""Frequency in mel.

    - "htk": $2595 \log_{10}(1 + f/700)$; "kaldi": $1127 \ln(1 + f/700)$ (the same curve, other digits);
    - "slaney": linear below 1 kHz ($3f/200$), above $15 + 27 \ln(f/1000) / \ln 6.4$.
    """
    f = np.asarray(hertz, np.float64)
    if scale == "htk":
        return 2595.0 * np.log10(1.0 + f / 700.0)
    if scale == "kaldi":
        return 1127.0 * np.log(1.0 + f / 700.0)
    if scale == "slaney":
        above = _SLANEY_BREAK_HZ / _SLANEY_HZ_PER_MEL + (
            np.log(np.maximum(f, _SLANEY_BREAK_HZ) / _SLANEY_BREAK_HZ) / _SLANEY_LOG_STEP
        )
        return np.where(f < _SLANEY_BREAK_HZ, f / _SLANEY_HZ_PER_MEL, above)
    raise UsageError(f"There is no mel scale '{scale}'; choose slaney, htk or kaldi.")


def mel_to_hertz(mel: ArrayLike, scale: str = "slaney") -> np.ndarray:
    """The inverse of `hertz_to_mel`."""
    m = np.asarray(mel, np.float64)
    if scale == "htk":
        return 700.0 * (10.0 ** (m / 2595.0) - 1.0)
    if scale == "kaldi":
        return 700.0 * (np.exp(m / 1127.0) - 1.0)
    if scale == "slaney":
        knee = _SLANEY_BREAK_HZ / _SLANEY_HZ_PER_MEL
        above = _SLANEY_BREAK_HZ * np.exp(_SLANEY_LOG_STEP * (np.maximum(m, knee) - knee))
        return np.where(m < knee, _SLANEY_HZ_PER_MEL * m, above)
    raise UsageError(f"There is no mel scale '{scale}'; choose slaney, htk or kaldi.")


@lru_cache(maxsize=32)
def mel_filterbank(
    n_frequencies: int,
    n_mels: int,
    sampling_rate: int,
    *,
    f_min: float = 0.0,
    f_max: float | None = None,
    scale: str = "slaney",
    norm: str | None = "slaney",
    triangles_in_mel: bool = False,
) -> np.ndarray:
    r"""Triangular filters, evenly spaced in mel, as a matrix from the frequencies of an FFT to mel bands.

    Args:
        n_frequencies: $N/2 + 1$ bins between 0 Hz and half the sampling rate.
        n_mels: bands.
        sampling_rate: Hz.
        f_min: lower edge of the lowest band, Hz.
        f_max: upper edge of the highest band, Hz; half the sampling rate if not given.
        scale: "slaney", "htk" or "kaldi" (see `hertz_to_mel`).
        norm: "slaney" divides each triangle by half its width in Hz (equal area); `None` leaves its peak at 1.
        triangles_in_mel: straight edges over mel (Kaldi) rather than over Hz.

    Returns:
        float64 `(n_frequencies, n_mels)`, not to be written to.
    """
    f_max = sampling_rate / 2 if f_max is None else f_max
    corners = np.linspace(hertz_to_mel(f_min, scale), hertz_to_mel(f_max, scale), n_mels + 2)
    corners_hz = mel_to_hertz(corners, scale)
    bins = np.linspace(0.0, sampling_rate / 2, n_frequencies)
    if triangles_in_mel:
        edges, bins = corners, hertz_to_mel(bins, scale)
    else:
        edges = corners_hz
    widths = np.diff(edges)
    rising = (bins[:, None] - edges[:-2]) / widths[:-1]
    falling = (edges[2:] - bins[:, None]) / widths[1:]
    filters = np.maximum(0.0, np.minimum(rising, falling))
    if norm == "slaney":
        filters *= 2.0 / (corners_hz[2:] - corners_hz[:-2])
    elif norm is not None:
        raise UsageError(f"There is no filter norm '{norm}'; choose slaney or None.")
    filters.setflags(write=False)
    return filters


# --------------------------------------------------------------------------------------------------------------- Kaldi


def kaldi_window(name: str, length: int) -> np.ndarray:
    r"""Kaldi's windows, symmetric: "povey" ($\mathrm{hann}^{0.85}$), hanning, hamming, blackman, rectangular."""
    if name == "povey":
        return hann_window(length, periodic=False) ** 0.85
    windows: dict[str, Callable[[int], np.ndarray]] = {
        "hanning": np.hanning,
        "hamming": np.hamming,
        "blackman": np.blackman,
        "rectangular": np.ones,
    }
    if name not in windows:
        raise UsageError(f"Kaldi has no window '{name}'; choose povey, {', '.join(windows)}.")
    return windows[name](length)


def kaldi_fbank(
    x: Float[Array, "*batch time"],
    n_mels: int = 80,
    sampling_rate: int = 16_000,
    *,
    frame_length: float = 25.0,
    frame_shift: float = 10.0,
    window: str = "povey",
    preemphasis: float = 0.97,
    remove_dc_offset: bool = True,
    f_min: float = 20.0,
    f_max: float = 0.0,
    snip_edges: bool = True,
    power: float = 2.0,
    floor: float = float(np.finfo(np.float32).eps),
    dither: float = 0.0,
    key: Array | None = None,
) -> Float[Array, "*batch frames mels"]:
    r"""Kaldi's log-mel filterbank energies (`compute-fbank-feats`), as `torchaudio.compliance.kaldi.fbank` has them.

    Each frame by itself loses its mean, is sharpened ($y_n = x_n - c\,x_{n-1}$, with $x_{-1} = x_0$), windowed, and
    padded to a power of two for the transform. The triangles are straight over mel; the logarithm is natural.

    Args:
        x: waveforms. Kaldi's are 16-bit integers: multiply by 32,768 where the checkpoint was trained so (fairseq S2T),
            not where it was not (AST).
        n_mels: bands.
        sampling_rate: Hz.
        frame_length: ms.
        frame_shift: ms.
        window: see `kaldi_window`.
        preemphasis: $c$.
        remove_dc_offset: subtract each frame's mean.
        f_min: lower edge of the lowest band, Hz.
        f_max: upper edge of the highest band, Hz; not positive: that much below half the sampling rate.
        snip_edges: only whole frames, $1 + \lfloor (T - L) / S \rfloor$; else $\lfloor (T + S/2) / S \rfloor$ frames of
            the waveform mirrored at its ends.
        power: 2 for energies, 1 for magnitudes.
        floor: least value before the logarithm.
        dither: standard deviation of noise added to every frame; needs `key`.
        key: of `jax.random`.

    Raises:
        AudioError: shorter than one frame.
    """
    length, shift = int(sampling_rate * frame_length * 0.001), int(sampling_rate * frame_shift * 0.001)
    if not snip_edges:
        frames = (x.shape[-1] + shift // 2) // shift
        left = length // 2 - shift // 2
        right = (frames - 1) * shift + length - left - x.shape[-1]
        if frames < 1:
            raise AudioError(f"{x.shape[-1]} samples are fewer than half a frame shift of {shift} samples.")
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(max(left, 0), max(right, 0))], mode="symmetric")
        x = x[..., max(-left, 0) :]
    y = frame(x, length, shift)
    if not snip_edges:
        y = y[..., :frames, :]
    if dither:
        if key is None:
            raise UsageError("Dither is random: give kaldi_fbank a key of jax.random.")
        y = y + dither * jax.random.normal(key, y.shape, y.dtype)
    if remove_dc_offset:
        y = y - y.mean(axis=-1, keepdims=True)
    y = y - preemphasis * jnp.concatenate([y[..., :1], y[..., :-1]], axis=-1)
    n_fft = 1 << (length - 1).bit_length()
    spectrum = jnp.fft.rfft(y * jnp.asarray(kaldi_window(window, length), y.dtype), n_fft)
    filters = mel_filterbank(
        n_fft // 2 + 1,
        n_mels,
        sampling_rate,
        f_min=f_min,
        f_max=f_max if f_max > 0 else sampling_rate / 2 + f_max,
        scale="kaldi",
        norm=None,
        triangles_in_mel=True,
    )
    energies = _magnitude(spectrum, power)
    mel = jnp.matmul(energies, jnp.asarray(filters, energies.dtype), precision=jax.lax.Precision.HIGHEST)
    return jnp.log(jnp.maximum(mel, floor))


# ------------------------------------------------------------------------------------------------------------- Whisper

WHISPER_SAMPLING_RATE = 16_000
WHISPER_N_FFT = 400  # 25 ms
WHISPER_HOP = 160  # 10 ms
WHISPER_CHUNK_SECONDS = 30
WHISPER_CHUNK_SAMPLES = WHISPER_CHUNK_SECONDS * WHISPER_SAMPLING_RATE
WHISPER_CHUNK_FRAMES = WHISPER_CHUNK_SAMPLES // WHISPER_HOP


def _log10_mel(power: Float[Array, "*batch frames frequencies"], n_mels: int) -> Float[Array, "*batch frames mels"]:
    filters = jnp.asarray(mel_filterbank(WHISPER_N_FFT // 2 + 1, n_mels, WHISPER_SAMPLING_RATE), power.dtype)
    mel = jnp.matmul(power, filters, precision=jax.lax.Precision.HIGHEST)
    return jnp.log10(jnp.maximum(mel, 1e-10))


@partial(jax.jit, static_argnames="n_mels")
def log_mel_spectrogram(x: Float[Array, "*batch time"], n_mels: int = 80) -> Float[Array, "*batch mels frames"]:
    r"""Whisper's input (§2.2): log-magnitude mel spectrogram, 25 ms windows every 10 ms, scaled to about $[-1, 1]$.

    $$ L = \log_{10} \max(M |X|^2, 10^{-10}), \qquad
       \mathrm{out} = \tfrac14 \left( \max(L, \max L - 8) + 4 \right) $$

    with $\max L$ over each waveform, padding included. The released models drop the last of the $1 + T/160$ frames.

    Args:
        x: 16 kHz waveforms in [-1, 1]; pad them to 30 s (480,000 samples) for the released encoders.
        n_mels: 80, or 128 for large-v3 and turbo.

    Returns:
        `(*batch, n_mels, time // 160)` in the dtype of `x`.
    """
    power = spectrogram(x, WHISPER_N_FFT, WHISPER_HOP)[..., :-1, :]
    log_mel = _log10_mel(power, n_mels)
    log_mel = jnp.maximum(log_mel, log_mel.max(axis=(-2, -1), keepdims=True) - 8.0)
    return jnp.swapaxes((log_mel + 4.0) / 4.0, -2, -1)


@contextmanager
def double_precision_on_cpu() -> Iterator[None]:
    """Inside, JAX computes in float64 on the CPU, so that features do not depend on the accelerator."""
    try:
        cpu = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS leaves the CPU out: the default device, in single precision
        yield
        return
    with jax.enable_x64(True), jax.default_device(cpu):
        yield


@partial(jax.jit, static_argnames="n_mels")
def _log10_mel_chunk(x: Float[Array, " time"], n_mels: int) -> Float[Array, "mels frames"]:
    return _log10_mel(spectrogram(x, WHISPER_N_FFT, WHISPER_HOP, center=False), n_mels).T


def long_log_mel_spectrogram(
    waveform: np.ndarray | jax.Array | Iterable[np.ndarray], n_mels: int = 80, padding: int = 0
) -> Float[np.ndarray, "mels frames"]:
    """`log_mel_spectrogram` of one waveform of any length, on the host, through one compiled chunk of 30 s.

    No length compiles anew, and only the result grows with the length. The maximum is taken over the whole file, as in
    OpenAI's `transcribe`, so this is not the same as the spectrograms of 30 s pieces.

    Computed in double precision on the CPU (9 ms for 30 s, against 3.5 ms in single), so that every accelerator sees
    the same features: single-precision transforms, PyTorch's included, are off by up to 1e-4 in the quiet bands of a
    loud frame.

    Args:
        waveform: 16 kHz `(time,)`, or its consecutive blocks (`audio.blocks(path)`).
        n_mels: 80 or 128.
        padding: zeros appended to the waveform (samples).

    Returns:
        float32 `(n_mels, (time + padding) // 160)`; float64 if the waveform is.
    """
    pieces: Iterable[np.ndarray | jax.Array] = [waveform] if isinstance(waveform, np.ndarray | jax.Array) else waveform
    half, step = WHISPER_N_FFT // 2, WHISPER_CHUNK_SAMPLES
    span = step - WHISPER_HOP + WHISPER_N_FFT  # samples under the windows of one chunk of 3,000 frames
    dtype: type[np.floating] = np.float32
    total = 0

    def samples_and_zeros() -> Iterator[np.ndarray]:
        nonlocal dtype, total
        for piece in pieces:
            samples = np.asarray(piece)
            if samples.ndim != 1:
                raise AudioError(f"The waveform has shape {samples.shape}; one dimension, (time,), is expected.")
            dtype = np.float64 if samples.dtype == np.float64 else dtype
            total += len(samples)
            yield samples
        for start in range(0, padding, step):
            zeros = np.zeros(min(step, padding - start), np.float32)
            total += len(zeros)
            yield zeros

    def with_mirrored_ends() -> Iterator[np.ndarray]:
        """What `stft` makes of the whole waveform with `center`, piece by piece."""
        head = tail = np.zeros(0, np.float32)
        for samples in samples_and_zeros():
            tail = np.concatenate([tail, samples[-half - 1 :]])[-half - 1 :]
            if len(head) > half:
                yield samples
                continue
            head = np.concatenate([head, samples])
            if len(head) > half:
                yield np.concatenate([head[half:0:-1], head])
        if len(head) <= half:
            raise AudioError(f"{total} samples are too few for a spectrogram; at least {half + 1} are needed.")
        yield tail[-2::-1]

    chunks: list[np.ndarray] = []

    def transform(samples: np.ndarray) -> None:
        filled = np.zeros(span, np.float64)
        filled[: len(samples)] = samples
        with double_precision_on_cpu():
            chunks.append(np.asarray(_log10_mel_chunk(jnp.asarray(filled), n_mels)).astype(dtype))

    waiting: list[np.ndarray] = []
    length = 0
    for samples in with_mirrored_ends():
        waiting.append(samples)
        length += len(samples)
        if length >= span:
            joined = np.concatenate(waiting)
            starts = range(0, length - span + 1, step)
            for start in starts:
                transform(joined[start : start + span])
            waiting = [joined[starts[-1] + step :].copy()]
            length = len(waiting[0])
    frames = total // WHISPER_HOP  # the last of 1 + total // hop is dropped
    if len(chunks) * WHISPER_CHUNK_FRAMES < frames:
        transform(np.concatenate(waiting))
    log_mel = np.concatenate(chunks, axis=1)[:, :frames]
    chunks.clear()
    # In place: of hours, every copy counts.
    np.maximum(log_mel, log_mel.max() - 8.0, out=log_mel)
    log_mel += 4.0
    log_mel /= 4.0
    return log_mel
