"""Recordings in chunks of one length that overlap, as EnCodec's stereo model codes them."""

from __future__ import annotations

from audiozoo.errors import UsageError


def chunk_sizes(
    chunk_length_s: float | None, overlap: float | None, sampling_rate: int
) -> tuple[int | None, int | None]:
    """Samples of a chunk, and samples from the start of one to that of the next; None where that is not said.

    Args:
        chunk_length_s: seconds of a chunk; None for the recording as a whole.
        overlap: share of a chunk that the next one repeats.
        sampling_rate: Hz.

    Raises:
        UsageError: if a chunk would have no sample or 2³¹ and more, or the next would not begin after its start and by
            its end.
    """
    if chunk_length_s is None:
        return None, None
    if not 1 <= chunk_length_s * sampling_rate < 2**31:
        raise UsageError(f"chunk_length_s={chunk_length_s} is no length of a chunk at {sampling_rate} Hz.")
    length = int(chunk_length_s * sampling_rate)
    if overlap is None:
        return length, None
    if not 0 <= overlap < 1:
        raise UsageError(f"overlap={overlap} must be a share of a chunk: at least 0, and less than 1.")
    return length, max(1, int((1.0 - overlap) * length))
