"""Recordings in chunks of one length, which may overlap, as EnCodec's stereo model codes them."""

from __future__ import annotations

from audiozoo.errors import UsageError

LONGEST_S = 3600.0  # seconds of a chunk; settings that say more are wrong, and would be padded to as much


def check_chunk(name: str, seconds: float, sampling_rate: int) -> None:
    """Refuse a length of a chunk that is none.

    Args:
        name: what the length is called.
        seconds: the length.
        sampling_rate: Hz.

    Raises:
        UsageError: if a chunk would have no sample, or more than an hour.
    """
    if not (seconds * sampling_rate >= 1 and seconds <= LONGEST_S):
        raise UsageError(
            f"{name}={seconds} is no length of a chunk at {sampling_rate} Hz, which has a sample at least and an hour "
            "at most."
        )


def chunk_sizes(
    chunk_length_s: float | None, overlap: float | None, sampling_rate: int
) -> tuple[int | None, int | None]:
    """Samples of a chunk, and samples from the start of one to that of the next; None where that is not said.

    Args:
        chunk_length_s: seconds of a chunk; None for the recording as a whole.
        overlap: share of a chunk that the next one repeats.
        sampling_rate: Hz.

    Raises:
        UsageError: see `check_chunk`; or if the next chunk would not begin after a chunk's start and by its end.
    """
    if chunk_length_s is None:
        return None, None
    check_chunk("chunk_length_s", chunk_length_s, sampling_rate)
    length = int(chunk_length_s * sampling_rate)
    if overlap is None:
        return length, None
    if not 0 <= overlap < 1:
        raise UsageError(f"overlap={overlap} must be a share of a chunk: at least 0, and less than 1.")
    return length, max(1, int((1.0 - overlap) * length))
