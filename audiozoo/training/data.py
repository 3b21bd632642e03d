"""Recordings to batches: folders, manifests and tar shards, in a shuffled order that any step can be asked for.

    items = find_items("corpus/")                     # or a .tsv, a .jsonl, a .tar, "shards/*.tar"
    data = Batches(items, prepare, batch_size=8, sampling_rate=16_000)
    batches = data.training()                         # a Grain iterator, without end
    batches.get_state(), batches.set_state(…)         # its position, to the batch

What comes as batch number $n$ depends on the items, the seed and $n$ alone: not on the number of threads, hosts or
devices, nor on when the run was last stopped. Recordings of like lengths share a batch and are padded to one of a few
lengths, so that few programs are compiled and little is computed for nothing. A recording that cannot be read is
counted and named, and the next one of like length takes its place, up to a limit.
"""

from __future__ import annotations

import csv
import functools
import glob
import io
import json
import math
import tarfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from audiozoo.audio import files as audio
from audiozoo.errors import AudioError, AudiozooError, SourceError, UsageError
from audiozoo.training import hosts

_MANIFEST_AUDIO = ("audio", "path", "file", "audio_filepath", "wav", "filename")
_MANIFEST_TEXT = ("text", "sentence", "transcript", "transcription", "caption")
_MANIFEST_SECONDS = ("seconds", "duration")


@dataclass(frozen=True)
class Member:
    """Bytes inside a tar file."""

    tar: Path
    offset: int
    size: int

    def read(self) -> bytes:
        """The bytes."""
        with self.tar.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


@dataclass(frozen=True)
class Item:
    """One recording and what is known of it.

    Attributes:
        name: for messages.
        audio: where its samples are.
        seconds: how long it is, if that is known without opening it.
        fields: `text`, `label` and whatever else came with it.
    """

    name: str
    audio: str | Path | Member
    seconds: float | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)

    def source(self) -> Any:
        """What `audiozoo.audio.read` takes."""
        return self.audio.read() if isinstance(self.audio, Member) else self.audio


# --- finding them ----------------------------------------------------------------------------------------------------


def find_items(source: str | Path) -> list[Item]:
    """The recordings of a folder, a manifest or tar shards, in a fixed order.

    - A folder: its sound files, but for hidden ones. The text is in a `.txt` of the same name or in LibriSpeech's
      `*.trans.txt`; a `.json` of the same name holds any fields, as a line of a `.jsonl`; the label is the name of
      the folder that it lies in.
    - A `.tsv`: fairseq's (the root in the first line, then `path<TAB>samples`, with the lines of a `.wrd`, `.ltr` or
      `.km` of the same name beside it), or one with a head, such as Common Voice's.
    - A `.jsonl`: an object a line, with `audio` (or `path`, `audio_filepath` …), `text`, `label`, `duration` …
    - A `.tar`, or a pattern of several: members of one name and different endings belong together.

    Raises:
        SourceError: there is nothing there, or not a recording in it.
        UsageError: a manifest cannot be understood.
    """
    path = Path(source)
    tars = sorted(map(Path, glob.glob(str(source)))) if any(c in str(source) for c in "*?[") else []
    if path.is_dir():
        tars = sorted(tar for tar in path.glob("*.tar") if not _hidden(tar.name))
        items = _of_tars(tars) if tars else _of_folder(path)
    elif tars or path.suffix == ".tar":
        items = _of_tars(tars or [path])
    elif not path.is_file():
        raise SourceError(f"There is no folder, manifest or tar file {source}.")
    elif path.suffix == ".jsonl":
        items = _of_jsonl(path)
    elif path.suffix == ".tsv":
        items = _of_tsv(path)
    else:
        raise UsageError(f"{source} is no folder, .tsv, .jsonl or .tar, which are the forms that data can have.")
    if not items:
        raise SourceError(f"{source} holds no recording.")
    return items


def _hidden(name: str | Path) -> bool:
    """Whether a file, or a folder around it, is hidden: macOS lays `._name` beside every file of another system."""
    return any(part.startswith(".") for part in Path(name).parts)


def _of_folder(root: Path) -> list[Item]:
    texts: dict[Path, str] = {}
    files = sorted(path for path in root.rglob("*") if not _hidden(path.relative_to(root)))
    for path in (path for path in files if path.name.endswith(".trans.txt")):
        for line in lines_of(path):
            name, _, text = line.partition(" ")
            texts[path.parent / name] = text
    items = []
    for path in (path for path in files if path.suffix.lower() in audio.SUFFIXES):
        fields: dict[str, Any] = {} if path.parent == root else {"label": path.parent.name}
        stem = path.with_suffix("")
        if stem in texts:
            fields["text"] = texts[stem]
        elif (beside := path.with_suffix(".txt")).is_file():
            fields["text"] = _text(beside).strip()
        if (beside := path.with_suffix(".json")).is_file():
            fields = _with_text(fields | _object(_text(beside), str(beside)))
        items.append(Item(str(path), path, _seconds(fields), fields))
    return items


def _of_jsonl(path: Path) -> list[Item]:
    items = []
    for number, line in enumerate(lines_of(path), 1):
        if line.strip():
            items.append(_of_row(_object(line, f"{path}:{number}"), path, number))
    return items


def _of_tsv(path: Path) -> list[Item]:
    lines = lines_of(path)
    if not lines:
        return []
    if "\t" in lines[0]:
        table = csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
        return [_of_row({k: v for k, v in row.items() if k and v}, path, n) for n, row in enumerate(table, 2)]
    root, items = path.parent / lines[0], []
    beside = {suffix: path.with_suffix(f".{suffix}") for suffix in ("wrd", "ltr", "km", "phn")}
    labels = {s: lines_of(p) for s, p in beside.items() if p.is_file()}
    for suffix, rows in labels.items():
        if len(rows) != len(lines) - 1:
            raise UsageError(f"{beside[suffix]} has {len(rows)} lines for the {len(lines) - 1} of {path}.")
    for number, line in enumerate(lines[1:]):
        name, _, samples = line.partition("\t")
        fields: dict[str, Any] = {"samples": int(samples)} if samples.strip().isdigit() else {}
        if "wrd" in labels:
            fields["text"] = labels["wrd"][number]
        elif "ltr" in labels:
            fields["text"] = labels["ltr"][number].replace(" ", "").replace("|", " ").strip()
        for suffix in ("km", "phn"):
            if suffix in labels:
                fields["units" if suffix == "km" else "phonemes"] = labels[suffix][number].split()
        items.append(Item(str(root / name), root / name, None, fields))
    return items


def _of_row(row: dict[str, Any], manifest: Path, number: int) -> Item:
    name = next((row[key] for key in _MANIFEST_AUDIO if row.get(key)), None)
    if not isinstance(name, str):
        raise UsageError(f"{manifest}:{number} names no recording: it needs one of {', '.join(_MANIFEST_AUDIO)}.")
    if row.get("offset") not in (None, "", 0, "0", "0.0"):
        raise UsageError(
            f"{manifest}:{number} has an offset; recordings are read from their beginning: cut them first."
        )
    path = manifest.parent / name
    if not path.exists() and (manifest.parent / "clips" / name).exists():  # Common Voice
        path = manifest.parent / "clips" / name
    fields = {key: value for key, value in row.items() if key not in _MANIFEST_AUDIO}
    if isinstance(voice := fields.get("speaker_embedding"), str):
        fields["speaker_embedding"] = str(manifest.parent / voice)
    return Item(str(path), path, _seconds(row), _with_text(fields))


def _with_text(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields, with what is spoken as `text`, by whatever of the usual names it is given."""
    text = next((fields[key] for key in _MANIFEST_TEXT if fields.get(key) not in (None, "")), None)
    if isinstance(text, int | float):  # "text": 1995
        text = str(text)
    return fields if text is None else fields | {"text": text}


def _of_tars(tars: Sequence[Path]) -> list[Item]:
    items = []
    for path in tars:
        for stem, group in sorted(_groups(path).items()):
            sound = next((group[suffix] for suffix in audio.SUFFIXES if suffix in group), None)
            if sound is None:
                continue
            fields: dict[str, Any] = {}
            if ".txt" in group:
                fields["text"] = _decoded(group[".txt"].read(), f"{path}: {stem}.txt").strip()
            if ".cls" in group:
                fields["label"] = _decoded(group[".cls"].read(), f"{path}: {stem}.cls").strip()
            if ".json" in group:
                where = f"{path}: {stem}.json"
                fields = _with_text(fields | _object(_decoded(group[".json"].read(), where), where))
            items.append(Item(f"{path}: {stem}", sound, _seconds(fields), fields))
    return items


def _groups(path: Path) -> dict[str, dict[str, Member]]:
    """What a tar file holds: of each name without its suffix, the members by their suffixes."""
    groups: dict[str, dict[str, Member]] = {}
    try:
        with tarfile.open(path, "r:") as file:
            for member in file:
                if member.isfile() and not _hidden(member.name):
                    stem, dot, suffix = member.name.rpartition(".")
                    found = Member(path, member.offset_data, member.size)
                    groups.setdefault(stem, {})[(dot + suffix).lower()] = found
    except (OSError, tarfile.TarError) as error:
        raise SourceError(f"{path} is no tar file that can be read: {error}.") from None
    return groups


def _text(path: Path) -> str:
    try:
        return _decoded(path.read_bytes(), str(path))
    except OSError as error:
        raise SourceError(f"{path} cannot be read ({error.strerror}).") from None


def lines_of(path: Path) -> list[str]:
    """Lines as files have them; `str.splitlines` would end one at any of Unicode's separators within a text, too."""
    return [line.rstrip("\n") for line in io.StringIO(_text(path), newline=None)]


def _decoded(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8-sig")  # with a byte order mark or without
    except UnicodeDecodeError as error:
        raise UsageError(f"{where} is not UTF-8 text (byte {error.start}).") from None


def _object(text: str, where: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise UsageError(f"{where} is not valid JSON: {error}.") from None
    if not isinstance(content, dict):
        raise UsageError(f"{where} is no JSON object.")
    return content


def _seconds(fields: Mapping[str, Any]) -> float | None:
    for key in _MANIFEST_SECONDS:
        try:
            seconds = float(fields[key])
        except (KeyError, TypeError, ValueError):
            continue
        return seconds if math.isfinite(seconds) else None
    return None


def labels_of(given: Any, names: Sequence[str]) -> list[str]:
    """Labels as a list; a text that is none of `names` is several with commas between."""
    if isinstance(given, list | tuple):
        return [str(label) for label in given]
    text = str(given)
    return [text] if text in names or "," not in text else [part.strip() for part in text.split(",")]


# --- one example, one batch ------------------------------------------------------------------------------------------

Example = dict[str, np.ndarray]
Prepare = Callable[[np.ndarray, Mapping[str, Any], np.random.Generator], Example]


@dataclass(frozen=True)
class Padding:
    """How examples of several lengths become one array: filled with `value` up to a multiple of `multiple`.

    With no multiple, up to the length of the batch's bucket, in samples.
    """

    value: float = 0.0
    multiple: int | None = None


def collate(examples: Sequence[Example], padding: Mapping[str, Padding], samples: int) -> Example:
    """One array for each name: stacked, or first padded along the first axis where `padding` says so."""
    batch = {}
    for name in examples[0]:
        arrays = [np.asarray(example[name]) for example in examples]
        if name in padding:
            rule, longest = padding[name], max(len(a) for a in arrays)
            length = max(samples, longest) if rule.multiple is None else -(-longest // rule.multiple) * rule.multiple
            length = max(length, rule.multiple or 1)
            out = np.full((len(arrays), length, *arrays[0].shape[1:]), rule.value, arrays[0].dtype)
            for row, array in zip(out, arrays, strict=True):
                row[: len(array)] = array
            batch[name] = out
        else:
            batch[name] = np.stack(arrays)
    return batch


class Whole(dict[str, np.ndarray]):
    """A batch that is too small to be divided: every host, and every device, has all of it."""


# --- all of them -----------------------------------------------------------------------------------------------------


class Batches:
    """Batches of a set of recordings.

    Args:
        items: what `find_items` found.
        prepare: `(waveform, fields, random generator)` to an example's arrays.
        batch_size: examples a batch, over all hosts.
        sampling_rate: Hz that recordings are brought to.
        padding: by array name; see `collate`.
        seed: of order and crops.
        buckets: how many lengths batches may have.
        seconds: recordings that are longer are cut, at a random place, or left out if they have a text. Of one that is
            cut, `fields["crop"]` tells `prepare` the seconds between which it is heard.
        shortest: seconds; what is shorter is left out.
        limit: recordings that may be unreadable; one more is an error.
        threads: that read ahead.
        process: `(index, count)` of this host; it reads its own rows only.
        whole: whether what is longer is left out, text or not.
        odds: `items` to how often each is to be drawn, in relation to the others; without, each comes once a pass.
        mono: whether `prepare` is given one channel `(time,)`, or all of them `(channels, time)`.

    Raises:
        AudioError: too many recordings cannot be read, or none is of a length that is wanted.
    """

    def __init__(
        self,
        items: Sequence[Item],
        prepare: Prepare,
        *,
        batch_size: int,
        sampling_rate: int = 16_000,
        padding: Mapping[str, Padding] | None = None,
        seed: int = 0,
        buckets: int = 4,
        seconds: float = 30.0,
        shortest: float = 0.05,
        limit: int = 10,
        threads: int = 2,
        process: tuple[int, int] = (0, 1),
        whole: bool | None = None,
        odds: Callable[[Sequence[Item]], np.ndarray | None] | None = None,
        mono: bool = True,
    ):
        if batch_size % process[1]:
            raise UsageError(f"A batch of {batch_size} cannot be divided among {process[1]} hosts.")
        self.prepare, self.batch_size, self.sampling_rate = prepare, batch_size, sampling_rate
        self.padding, self.seed, self.seconds = dict(padding or {}), seed, seconds
        self.limit, self.threads, self.process, self.whole, self.mono = limit, threads, process, whole, mono
        self.unreadable: dict[str, str] = {}
        self.left_out: list[str] = []  # too long for their text, or too short
        self._lock = threading.Lock()
        kept, lengths = [], []
        for item in items:
            length = self._length(item)
            if length is None or length < shortest or (length > seconds and self._kept_whole(item)):
                if length is not None:
                    self.left_out.append(item.name)
                continue
            kept.append(item)
            lengths.append(min(length, seconds))
        if not kept:
            raise AudioError(f"Of {len(items)} recordings none can be used: {self.report()}.")
        self.items = kept
        given = None if odds is None else odds(kept)
        self.odds = None if given is None else np.asarray(given, np.float64) / np.sum(given)
        # The buckets' edges: quantiles of the lengths, in half seconds, so that few shapes are compiled.
        quantiles = np.quantile(lengths, np.linspace(0, 1, buckets + 1)[1:])
        edges = sorted({min(float(np.ceil(2 * q) / 2), max(seconds, 0.5)) for q in quantiles})
        self.edges = [round(edge * sampling_rate) for edge in edges]
        self._bucket = np.searchsorted(edges, lengths)

    def _kept_whole(self, item: Item) -> bool:
        return "text" in item.fields if self.whole is None else self.whole

    def _length(self, item: Item) -> float | None:
        if item.seconds is not None:
            return item.seconds
        try:
            return audio.info(item.source()).seconds
        except (AudiozooError, OSError) as error:
            self._unreadable(item, error)
            return None

    def _unreadable(self, item: Item, error: Exception) -> None:
        with self._lock:
            self.unreadable[item.name] = str(error)
            if len(self.unreadable) > self.limit:
                names = ", ".join(list(self.unreadable)[:3])
                raise AudioError(
                    f"{len(self.unreadable)} recordings cannot be read, and {self.limit} were allowed; among them are "
                    f"{names}. The last: {error}"
                )

    def report(self) -> str:
        """What was left out, in words."""
        parts = [f"{len(self.unreadable)} unreadable"] + [f"  {n}: {e}" for n, e in list(self.unreadable.items())[:5]]
        return "; ".join([*parts, f"{len(self.left_out)} too long or too short"])

    # --- the order ---

    def __len__(self) -> int:
        """Batches in one pass."""
        return max(len(self.items) // self.batch_size, 1)

    @functools.lru_cache(maxsize=2)  # noqa: B019 - this pass and the next
    def _pass(self, number: int) -> tuple[tuple[int, np.ndarray], ...]:
        """The batches of one pass, each a bucket and indices of items."""
        rng = np.random.default_rng([self.seed, number])
        count = len(self.items)
        order = rng.permutation(count) if self.odds is None else rng.choice(count, count, p=self.odds)
        if len(order) < self.batch_size:
            order = np.resize(order, self.batch_size)
        batches, left = [], np.zeros(0, int)
        for bucket in range(len(self.edges)):
            # What does not fill a batch joins the next longer bucket.
            members = np.concatenate([left, order[self._bucket[order] == bucket]])
            whole = len(members) // self.batch_size * self.batch_size
            batches += [(bucket, rows) for rows in members[:whole].reshape(-1, self.batch_size)]
            left = members[whole:]
        return tuple(batches[i] for i in rng.permutation(len(batches)))

    def batch(self, index: int) -> Example:
        """Batch number `index` of an endless training, this host's rows of it."""
        number, place = divmod(int(index), len(self))
        bucket, rows = self._pass(number)[place]
        size = self.batch_size // self.process[1]
        start = self.process[0] * size
        return self._load(rows[start : start + size], bucket, (self.seed, int(index), 0), start)

    def _load(self, rows: np.ndarray, bucket: int, seed: tuple[int, ...], first: int) -> Example:
        """Rows of a batch, of which `first` come before these: what is drawn for a row depends on its place in all."""
        seeds = [[*seed, place] for place in range(first, first + len(rows))]
        examples = [self._readable(row, s) or self._another(row, s) for row, s in zip(rows, seeds, strict=True)]
        return collate(examples, self.padding, self.edges[bucket])

    def _readable(self, row: int, seed: Sequence[int]) -> Example | None:
        try:
            return self._example(self.items[row], np.random.default_rng(seed))
        except (AudiozooError, OSError) as error:
            self._unreadable(self.items[row], error)
            return None

    def _another(self, row: int, seed: Sequence[int]) -> Example:
        """The next recording that can be read, of the same bucket if there is one."""
        following = np.roll(np.arange(len(self.items)), -row - 1)
        for other in following[np.argsort(self._bucket[following] != self._bucket[row], kind="stable")]:
            if (example := self._readable(other, seed)) is not None:
                return example
        raise AudioError(f"Not one recording can be read: {self.report()}.")

    def _as_wide(self, batch: Example) -> Example:
        """The rows of this host padded to the lengths of the host that has the longest: all have parts of one array."""
        names = [name for name in self.padding if name in batch]
        lengths = hosts.largest([batch[name].shape[1] for name in names])
        for name, length in zip(names, lengths, strict=True):
            array = batch[name]
            if length > array.shape[1]:
                more = [(0, length - size if axis == 1 else 0) for axis, size in enumerate(array.shape)]
                batch[name] = np.pad(array, more, constant_values=self.padding[name].value)
        return batch

    def _example(self, item: Item, rng: np.random.Generator) -> Example:
        waveform = audio.read(item.source(), self.sampling_rate, self.mono)
        most, fields, samples = int(self.seconds * self.sampling_rate), item.fields, waveform.shape[-1]
        if samples > most + self.sampling_rate // 10 and self._kept_whole(item):
            length = samples / self.sampling_rate
            raise AudioError(f"{item.name} lasts {length:.1f} s, not {item.seconds} s; {self.seconds} s may be heard.")
        if samples > most:
            start = int(rng.integers(samples - most + 1))
            waveform = waveform[..., start : start + most]
            fields = {**fields, "crop": (start / self.sampling_rate, (start + most) / self.sampling_rate)}
        return self.prepare(waveform, fields, rng)

    # --- iterators ---

    def training(self) -> Any:
        """All batches of an endless training in order, read ahead by threads: a Grain iterator with a position.

        Raises:
            UsageError: Grain is not installed.
        """
        try:
            import grain
        except ImportError:
            raise UsageError('Training reads its data with Grain: pip install "audiozoo[train]".') from None
        reading = grain.ReadOptions(num_threads=self.threads, prefetch_buffer_size=2 * self.threads)
        batches = grain.MapDataset.range(0, 2**31 - 1).map(self.batch).to_iter_dataset(reading)
        return iter(batches.map(self._as_wide))  # by whoever asks, so that hosts do it in the same order

    def evaluation(self, parts: int = 1) -> Iterator[Example]:
        """Every recording once, the shortest first; the last batch is smaller. Others stand in for unreadable ones.

        Args:
            parts: that a mesh divides a batch into; what then is left of the last batch comes by itself, as `Whole`.
        """
        order = np.argsort(self._bucket, kind="stable")
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            even = len(rows) // parts * parts
            if even:
                each = even // self.process[1]
                first = self.process[0] * each
                own = rows[first : first + each]
                yield self._as_wide(self._load(own, int(self._bucket[rows].max()), (self.seed, start), first))
            if even < len(rows):
                rest = rows[even:]
                yield Whole(self._load(rest, int(self._bucket[rest].max()), (self.seed, start), even))
