"""Where a model's files are: a path, or a repository of the Hugging Face hub in its local cache."""

from __future__ import annotations

import contextlib
import fnmatch
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from audiozoo.errors import SourceError, first_line

# A repository may hold the same weights several times, in this order of preference; the first that is there is taken.
WEIGHTS: tuple[tuple[str, ...], ...] = (
    ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model-*-of-*.bin", "pytorch_model.bin.index.json"),
    ("model.bin",),
    ("*.safetensors",),
    ("*.pt", "*.pth", "*.th", "*.bin"),
    ("*.onnx",),
)

# Configurations, tokenizers and vocabularies, all of them small.
FILES: tuple[str, ...] = ("*.json", "*.txt", "*.model", "*.yaml", "*.tiktoken")


def resolve(
    source: str | os.PathLike[str],
    *,
    patterns: Sequence[str] | None = None,
    revision: str | None = None,
    endpoint: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Path:
    """The local path of a model: `source` itself if it exists, else its snapshot from the Hugging Face hub.

    A snapshot that is in the cache is used again; nothing is downloaded twice, and an interrupted download is resumed.
    With `HF_HUB_OFFLINE=1`, or without a connection, the cache alone is used.

    Args:
        source: a file, a directory, or a hub id such as `openai/whisper-tiny`.
        patterns: files to fetch (`*` matches), by default the configuration, the tokenizer, and one copy of the
            weights: safetensors rather than a pickle, never those of TensorFlow or Flax.
        revision: a branch, tag or commit of a repository; the main branch by default. Of no meaning for a path.
        endpoint: address of the hub, by default `HF_ENDPOINT` or the public one.
        cache_dir: by default Hugging Face's.

    Raises:
        SourceError: there is no such path and no such repository or revision, it is private or gated, none of its files
            fit, or it is neither in the cache nor can it be reached.
    """
    path = Path(source).expanduser()
    if os.path.exists(path):  # unlike `path.exists()` also of a name that is too long for a file
        return path
    name = os.fspath(source)
    at = f"{name} at revision {revision}" if revision else name
    try:
        try:
            info = HfApi(endpoint=endpoint).model_info(name, revision=revision, timeout=30)
        except (GatedRepoError, RevisionNotFoundError, RepositoryNotFoundError):
            raise
        except HFValidationError:
            raise SourceError(f"{name} does not exist (and is not the name of a hub repository, OWNER/NAME).") from None
        except Exception as error:
            return _cached(at, name, revision, patterns, cache_dir, error)
        wanted = _choose([sibling.rfilename for sibling in info.siblings or []], patterns, at)
        # The commit, not the branch: what is in the cache for it needs no further question to the hub.
        snapshot = snapshot_download(
            name,
            revision=info.sha or revision,
            allow_patterns=wanted,
            endpoint=endpoint,
            max_workers=4,
            cache_dir=None if cache_dir is None else Path(cache_dir),
        )
        _remember(Path(snapshot), revision or "main")
        return Path(snapshot)
    except GatedRepoError:
        raise SourceError(
            f"{at} is gated: accept its conditions on its hub page, then log in with `hf auth login` or set HF_TOKEN."
        ) from None
    except RevisionNotFoundError:
        raise SourceError(f"{name} has no revision {revision} on the hub.") from None
    except RepositoryNotFoundError:
        raise SourceError(
            f"{name} is neither a path nor a repository of the hub that can be seen "
            "(if it is private, log in with `hf auth login` or set HF_TOKEN)."
        ) from None
    except OSError as error:
        if isinstance(error, SourceError):
            raise
        raise SourceError(f"{at} could not be downloaded, try again: {_reason(error)}.") from error
    except Exception as error:
        # A connection that breaks in the middle of a file surfaces as an error of the HTTP library at hand.
        if not type(error).__module__.startswith(("httpx", "httpcore", "requests", "urllib3")):
            raise
        raise SourceError(f"{at} could not be downloaded, try again: {_reason(error)}.") from error


def _choose(files: Iterable[str], patterns: Sequence[str] | None, at: str) -> list[str]:
    """The names to fetch out of those in a repository."""
    files = list(files)

    def matching(wanted: Iterable[str]) -> list[str]:
        return [
            file
            for file in files
            if any(fnmatch.fnmatchcase(file, p) and file.count("/") == p.count("/") for p in wanted)
        ]

    if patterns is not None:
        chosen = matching(patterns)
        if not chosen:
            raise SourceError(f"{at} holds none of the files {', '.join(patterns)}.")
        return chosen
    native = [file for file in files if file.startswith("params/")]
    weights = native or next(filter(None, map(matching, WEIGHTS)), [])
    if not weights:
        raise SourceError(f"{at} holds no weights that audiozoo can read (safetensors, PyTorch, CTranslate2, ONNX).")
    small = [file for file in matching(FILES) if not file.endswith(".index.json")]
    return sorted({*small, *weights})


def _cached(
    at: str,
    name: str,
    revision: str | None,
    patterns: Sequence[str] | None,
    cache_dir: str | os.PathLike[str] | None,
    error: Exception,
) -> Path:
    """The snapshot in the cache, when the hub cannot be asked."""
    if constants.HF_HUB_OFFLINE:
        why = "HF_HUB_OFFLINE is set"
    elif isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        said = (error.server_message or _reason(error)).splitlines()[0].rstrip(".")
        of_whom = ", the token in HF_TOKEN or of `hf auth login`" if status == 401 else ""
        why = f"the hub answers {status} ({said}{of_whom})"
    else:
        why = f"the hub cannot be reached ({_reason(error)})"
    repository = Path(cache_dir or constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    reference = repository / "refs" / (revision or "main")
    commit = (reference.read_text().strip() if reference.is_file() else "") or revision or "main"
    snapshot = repository / "snapshots" / commit
    if not snapshot.is_dir():
        raise SourceError(f"{at} is not in the local cache, and {why}.")
    found = [str(file.relative_to(snapshot)) for file in snapshot.rglob("*") if file.is_file()]
    try:
        _choose(found, patterns, at)
    except SourceError as missing:
        raise SourceError(f"In the local cache, {str(missing)[:-1]}; and {why}.") from None
    return snapshot


def _remember(snapshot: Path, revision: str) -> None:
    """Note which commit a branch or tag stands for, so that it is found without the hub.

    A cache that cannot be written, one of a whole institute, say, is used as it is.
    """
    if re.fullmatch(r"[0-9a-f]{40}", revision):
        return
    reference = snapshot.parent.parent / "refs" / revision
    with contextlib.suppress(OSError):
        if not reference.is_file() or reference.read_text() != snapshot.name:
            reference.parent.mkdir(parents=True, exist_ok=True)
            reference.write_text(snapshot.name)


def _reason(error: BaseException) -> str:
    return first_line(error, most=None).rstrip(".")
