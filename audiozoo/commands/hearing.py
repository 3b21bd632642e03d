"""`audiozoo classify`, `audiozoo embed` and `audiozoo search`: what is heard, sounds and words in one space."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from audiozoo.commands import terminal
from audiozoo.commands.terminal import check_file, check_output, progress_bar, say, written_whole
from audiozoo.errors import AudioError, AudiozooError, SourceError, UsageError

TAGGER = "MIT/ast-finetuned-audioset-10-10-0.4593"
MATCHER = "laion/clap-htsat-unfused"
_EMBEDDERS = {"ClapModel": "clap", "ASTModel": "ast", "ASTForAudioClassification": "ast"}
SAVE_EVERY = 50  # new embeddings after which a search writes what it has, so that an interrupted one goes on from there

Model = Annotated[str | None, typer.Option(help=f"hub id, directory or file; by default {MATCHER}")]


def classify(
    file: Annotated[
        list[str],
        typer.Argument(help="a sound file; - is standard input; further words after --labels are labels too"),
    ],
    labels: Annotated[list[str] | None, typer.Option(help="what to choose from, in words: CLAP; without: AST")] = None,
    top: Annotated[int, typer.Option(help="how many labels to name")] = 5,
    model: Annotated[
        str | None, typer.Option(help=f"hub id, directory or file; by default {TAGGER} or {MATCHER}")
    ] = None,
    template: Annotated[
        str | None, typer.Option(help="sentence that a label is put into, at {}; by default This is a sound of {}.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Say what is heard, by AudioSet's tags or by words given."""
    sound, *more = file
    if more and not labels:
        raise UsageError(f"classify takes one file; to choose among words, put --labels before {more[0]!r}.")
    if template is not None and not labels:
        raise UsageError("--template is the sentence that --labels are put into; give some.")
    if top < 1:
        raise UsageError(f"--top is {top}; at least one label is to be named.")
    check_file(sound)
    terminal.keep_compiled_programs()
    import audiozoo
    from audiozoo import audio
    from audiozoo.decoding.encoders import CLASSIFIERS

    source = model or (MATCHER if labels else TAGGER)
    listener: Any = audiozoo.load(source)
    name = type(listener).__name__
    if labels:
        if name != "ClapModel":
            raise UsageError(f"{source} holds a {name}, which has labels of its own; leave --labels out.")
        from audiozoo.models.clap import PROMPT, zero_shot

        processor = audiozoo.load_processor(source)
        rate = processor.feature_extractor.sampling_rate
        found = zero_shot(
            listener,
            processor,
            audio.read(sound, rate),
            [*labels, *more],
            top,
            template=PROMPT if template is None else template,
            sampling_rate=rate,
        )
    elif name == "ASTForAudioClassification":
        from audiozoo.models.audio_spectrogram_transformer import classify as tags_of

        processor = audiozoo.load_processor(source)
        rate = processor.sampling_rate
        found = tags_of(listener, processor, audio.read(sound, rate), top, sampling_rate=rate)
    elif name == "ClapModel":
        raise UsageError(f"{source} chooses among words; give it some with --labels.")
    elif name.endswith(CLASSIFIERS):
        raise UsageError(f"{source} holds a {name}, whose classes audiozoo identify tells.")
    else:
        raise UsageError(f"{source} holds a {name}, which does not classify sounds.")
    if as_json:
        print(json.dumps([{"label": label, "score": score} for label, score in found], indent=2))
        return
    for label, score in found:
        print(f"{score:.3f}  {label}")


def embed(
    files: Annotated[list[str] | None, typer.Argument(help="sound files; - is standard input")] = None,
    text: Annotated[list[str] | None, typer.Option(help="a text to embed; may be repeated")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="an .npz file with names and embeddings; without: JSON lines")
    ] = None,
    model: Model = None,
    layer: Annotated[
        int | None, typer.Option(help="of a speech encoder: whose frames; 0 is the Transformer's input")
    ] = None,
) -> None:
    """Embed sounds and texts (CLAP), or sounds alone. In CLAP's space the product of two says how well they fit.

    AST gives what its classifier sees. A speech encoder (wav2vec 2.0, HuBERT, WavLM, ...) gives the vector of the
    speaker, where it has a head for that, or the mean of the frames. The .npz file of a single recording holds the
    frames and their times as well. Of several recordings, those that cannot be heard are named and left out.
    """
    files, text = files or [], text or []
    if not files and not text:
        raise UsageError("There is nothing to embed; name sound files, or texts with --text.")
    if not all(map(str.strip, text)):
        raise UsageError("A text is empty; say in words what to embed.")
    for file in files:
        check_file(file)
    if output is not None:
        if output.suffix != ".npz":
            raise UsageError(f"{output} should end in .npz.")
        check_output(output)
    terminal.keep_compiled_programs()
    from audiozoo.models.clap import embed_text

    source = model or MATCHER
    embedder, processor, kind = _embedder(source)
    if text and kind != "clap":
        raise UsageError(f"{source} holds a {type(embedder).__name__}: it embeds sounds, and no --text.")
    if layer is not None and kind != "speech":
        raise UsageError(f"--layer is for speech encoders; {source} has one embedding of a sound.")
    said = list(embed_text(embedder, processor, text)) if text else []
    names: list[str] = []
    rows: list[np.ndarray] = []
    more: dict[str, np.ndarray] = {}
    with progress_bar("embedding", len(files), "files") as update:
        for count, file in enumerate(files, 1):
            try:
                if kind == "speech":
                    more = _speech_embedding(embedder, processor, file, layer)
                    rows.append(more["mean"] if layer is not None else more.get("embedding", more["mean"]))
                else:
                    rows.append(_embedding(embedder, processor, file))
            except (AudioError, SourceError) as error:
                if len(files) == 1:
                    raise
                say(f"audiozoo: {file}: {error}", "red")
            else:
                names.append(file)
            update(count, len(files))
    failed = len(files) - len(names)
    rows += said
    names += text
    if output is None:
        for name, row in zip(names, rows, strict=True):
            print(json.dumps({"name": name, "embedding": [round(float(x), 7) for x in row]}))
    elif rows:
        more = more if len(files) == 1 else {}
        _write_arrays(output, more | {"names": np.asarray(names), "embeddings": np.stack(rows)})
        say(f"{len(rows)} embeddings in {output}")
    if failed:
        raise SourceError(f"{failed} of {len(files)} files could not be embedded.")


def search(
    directory: Annotated[Path, typer.Argument(help="where to look, subdirectories included")],
    query: Annotated[str, typer.Argument(help="what to look for, in words")],
    top: Annotated[int, typer.Option(help="how many files to name")] = 5,
    model: Model = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Find sound files by a description. Embeddings are kept, so that the next search is quick."""
    if not directory.is_dir():
        raise SourceError(f"There is no directory {directory}.")
    if top < 1:
        raise UsageError(f"--top is {top}; at least one file is to be named.")
    if not query.strip():
        raise UsageError("The query is empty; say in words what to look for.")
    from audiozoo.audio.files import SUFFIXES

    # os.walk and isfile pass over what may not be looked at.
    every = (Path(folder, name) for folder, _, names in os.walk(directory) for name in names)
    files = sorted(path for path in every if path.suffix.lower() in SUFFIXES and os.path.isfile(path))
    if not files:
        raise SourceError(f"{directory} holds no sound files ({', '.join(SUFFIXES)}).")
    terminal.keep_compiled_programs()
    from audiozoo import hub
    from audiozoo.models.clap import embed_text

    source = model or MATCHER
    cache = terminal.cache_directory() / "embeddings" / f"{_identity(hub.resolve(source))}.npz"
    matcher, processor = _matcher(source)
    wanted = embed_text(matcher, processor, [query])[0]
    found, rows = embeddings_of(files, lambda file: _embedding(matcher, processor, str(file)), cache)
    if not found:
        raise SourceError(f"None of the {len(files)} sound files in {directory} can be read.")
    scores = np.stack(rows) @ wanted
    order = np.argsort(-scores, kind="stable")[:top]
    if as_json:
        print(json.dumps([{"file": str(found[i]), "score": float(scores[i])} for i in order], indent=2))
        return
    for i in order:
        print(f"{scores[i]:+.3f}  {found[i]}")


def embeddings_of(
    files: Sequence[Path], compute: Callable[[Path], np.ndarray], cache: Path
) -> tuple[list[Path], list[np.ndarray]]:
    """The embedding of every file that can be read, from the cache where the file has not changed since.

    The cache holds what it held before, too, so that one serves several directories. A cache that cannot be read is
    made anew; one that cannot be written is done without. What another search has written meanwhile stays.

    Args:
        files: sound files.
        compute: embeds one of them.
        cache: an .npz file, which need not exist; it is replaced whole.
    """
    known = _read_cache(cache)
    found, rows, fresh = [], [], 0
    with progress_bar("embedding", len(files), "files") as update:
        for count, file in enumerate(files, 1):
            try:
                status = file.stat()
                key = f"{file.resolve()}\n{status.st_size}\n{status.st_mtime_ns}"
                if key not in known:
                    known[key] = compute(file)
                    fresh += 1
                    if fresh % SAVE_EVERY == 0:
                        _write_cache(cache, known)
            except (AudiozooError, OSError) as error:  # it may be gone by now
                say(f"left out: {file}: {error}", "yellow")
                continue
            found.append(file)
            rows.append(known[key])
            update(count, len(files))
    if fresh % SAVE_EVERY:
        _write_cache(cache, known)
    return found, rows


def _read_cache(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            keys, rows = arrays["keys"], arrays["embeddings"]
    except Exception:  # what a damaged file raises is of many kinds
        return {}
    fits = keys.dtype.kind == "U" and rows.dtype.kind == "f" and rows.ndim == 2 and keys.shape == rows.shape[:1]
    return dict(zip(keys.tolist(), rows, strict=True)) if fits else {}


def _write_cache(path: Path, known: dict[str, np.ndarray]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        known = _read_cache(path) | known
        _write_arrays(path, {"keys": np.asarray(list(known)), "embeddings": np.stack(list(known.values()))})
    except (OSError, SourceError) as error:
        say(f"the embeddings are not kept: {error}", "yellow")


def _write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write an .npz file under a temporary name, then rename it."""
    with written_whole(path) as temporary:
        np.savez(temporary, **arrays)  # type: ignore[arg-type]


def _identity(path: Path) -> str:
    """What tells one checkpoint from another, and from itself after a change: names, sizes and times of its files.

    Of a file also of the settings beside it. And the release of audiozoo, which may compute other features than the
    last one.
    """
    import audiozoo

    whole = path.is_dir()
    files = sorted(p for p in path.rglob("*") if p.is_file()) if whole else [path, *sorted(path.parent.glob("*.json"))]
    parts = [f"{file.resolve()} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files]
    parts.append(audiozoo.__version__)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]


def _matcher(source: str) -> tuple[Any, Any]:
    import audiozoo

    matcher = audiozoo.load(source)
    if (name := type(matcher).__name__) != "ClapModel":
        raise UsageError(f"{source} holds a {name}; sounds and words are matched by a ClapModel.")
    return matcher, audiozoo.load_processor(source)


def _embedder(source: str) -> tuple[Any, Any, str]:
    """What embeds sounds, its processor, and its kind: clap, ast or speech."""
    import audiozoo

    model = audiozoo.load(source)
    kind = _EMBEDDERS.get(name := type(model).__name__)
    if kind is None and not hasattr(getattr(model, "backbone", model), "frame_lengths"):
        raise UsageError(f"{source} holds a {name}; sounds are embedded by a ClapModel, an AST or a speech encoder.")
    return model, audiozoo.load_processor(source), kind or "speech"


def _speech_embedding(model: Any, processor: Any, file: str, layer: int | None) -> dict[str, np.ndarray]:
    from audiozoo import audio
    from audiozoo.decoding.encoders import embed as embed_speech

    rate = getattr(processor, "feature_extractor", processor).sampling_rate
    return embed_speech(model, processor, audio.read(file, rate), layer=layer)


def _embedding(model: Any, processor: Any, file: str) -> np.ndarray:
    from audiozoo import audio
    from audiozoo.models import audio_spectrogram_transformer, clap

    rate = getattr(processor, "feature_extractor", processor).sampling_rate
    matches = type(model).__name__ == "ClapModel"
    embed_sound: Any = clap.embed_audio if matches else audio_spectrogram_transformer.embed
    return embed_sound(model, processor, audio.read(file, rate), sampling_rate=rate)
