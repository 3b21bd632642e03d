r"""Native checkpoints: arrays in Orbax's format, restored straight into their shards, beside a `config.json`.

    directory/
      config.json    {"audiozoo": {"format": 1, "version": …, "model_class": …}, "config": {…}, …}
      params/        Orbax: the parameters as nested dictionaries of arrays, readable without audiozoo
      …              tokenizer and processor files, copied along

A directory appears under its name only when it is complete: it is written beside its place and renamed. Restoring is
strict both ways. Orbax itself fills a tree with what it finds, and `nnx.merge` accepts a tree with holes, so names and
shapes are compared before anything is read, and every difference is listed in one error.

`save_tree` and `restore_tree` do the same for any other tree of arrays: optimiser states, training steps.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

from audiozoo.errors import AudiozooError, CheckpointError, SourceError, UsageError, first_line

FORMAT = 1
_PARAMS = "params"
_LISTED = 12  # names listed in an error, per kind of difference

_IN_FLIGHT_BYTES = 64_000_000
_CHUNK_BYTES = 32_000_000  # pieces of an array on disk; each is decoded on its own


def save(
    params: Any,
    directory: str | os.PathLike[str],
    config: Mapping[str, Any],
    files: Iterable[str | os.PathLike[str]] = (),
    *,
    overwrite: bool = False,
) -> None:
    """Write a native checkpoint.

    Args:
        params: an `nnx.Module` (random state is left out), or its parameters as nested dictionaries or by dotted path.
        directory: where to; it appears when it is complete.
        config: what `config.json` is to hold; `model_class` is required.
        files: tokenizer and processor files, or folders of them, to copy into the directory.
        overwrite: replace `directory` if it is a checkpoint.

    Raises:
        CheckpointError: the directory exists, or cannot be written.
        SourceError: one of `files` is not there.
        UsageError: `config` names no `model_class`, or `params` is empty.
    """
    if not config.get("model_class"):
        raise UsageError("The config of a checkpoint needs a model_class.")
    rest = {key: value for key, value in config.items() if key != "model_class"}
    header = {"format": FORMAT, "version": _version(), "model_class": config["model_class"]}
    try:
        text = json.dumps({"audiozoo": header, **rest}, indent=2, ensure_ascii=False) + "\n"
    except (TypeError, ValueError) as error:
        raise UsageError(f"The config of a checkpoint must be plain JSON: {error}.") from None
    with written_whole(directory, overwrite=overwrite) as temporary:
        for file in map(Path, files):
            if file.is_dir():
                shutil.copytree(file, temporary / file.name)
                continue
            if not file.is_file():
                raise SourceError(f"{file} is to be copied into the checkpoint and is not there.")
            if file.name == "config.json":
                raise UsageError(f"{file} would overwrite the checkpoint's own config.json.")
            shutil.copyfile(file, temporary / file.name)
        _write(params, temporary / _PARAMS, f"{directory} cannot be written")
        (temporary / "config.json").write_text(text, encoding="utf-8")


def restore(directory: str | os.PathLike[str], abstract: Any, shardings: Any = None) -> Any:
    """Read the parameters of a native checkpoint, each straight into its shards.

    Args:
        directory: what `save` wrote.
        abstract: a tree with the names, shapes and dtypes that are wanted: leaves have `.shape` and `.dtype`
            (`jax.ShapeDtypeStruct`, arrays, `nnx.Variable`), nested or by dotted path. A dtype other than the
            stored one converts on the way.
        shardings: a tree of the same structure with a `jax.sharding.Sharding` for each leaf, or nothing to place all on
            the first device.

    Returns:
        A tree like `abstract`, of `jax.Array`s.

    Raises:
        SourceError: there is no native checkpoint at `directory`.
        CheckpointError: it is incomplete or damaged, or its names or shapes are not those of `abstract`; the
            differences are listed, `-` for what it lacks, `+` for what it has besides, `!` for another shape.
    """
    directory = Path(directory)
    read_config(directory)
    return restore_tree(directory / _PARAMS, abstract, shardings)


def is_native(directory: str | os.PathLike[str]) -> bool:
    """Whether a directory is a checkpoint that `save` wrote."""
    try:
        config = json.loads((Path(directory) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(config, dict) and isinstance(config.get("audiozoo"), dict)


def read_config(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The configuration given to `save`, `model_class` included.

    Raises:
        SourceError: there is no `config.json`, or not one that `save` wrote.
        CheckpointError: it is damaged, or of a newer format.
    """
    path = Path(directory) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}.") from None
    header = config.get("audiozoo") if isinstance(config, dict) else None
    if not isinstance(header, dict):
        raise SourceError(f"{path} has no entry audiozoo: the directory is not a checkpoint that audiozoo.save wrote.")
    if header.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is of format {header.get('format')!r}, written by audiozoo {header.get('version')}; "
            f"this is {_version()}, which reads format {FORMAT}."
        )
    if not isinstance(header.get("model_class"), str):
        raise CheckpointError(f"{path} names no model_class.")
    return {"model_class": header["model_class"], **{key: value for key, value in config.items() if key != "audiozoo"}}


def save_tree(tree: Any, directory: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Write any tree of arrays and numbers (an optimiser state, say); names are its paths, joined with dots.

    Raises:
        CheckpointError: the directory exists, or cannot be written.
        UsageError: the tree is empty, or one of its leaves is not an array or a number.
    """
    with written_whole(directory, overwrite=overwrite) as temporary:
        temporary.rmdir()  # Orbax makes it, and marks it as complete
        _write(tree, temporary, f"{directory} cannot be written")


def restore_tree(directory: str | os.PathLike[str], abstract: Any, shardings: Any = None) -> Any:
    """Read a tree that `save_tree` wrote; arguments and errors are those of `restore`."""
    directory = Path(directory).absolute()
    wanted, structure = _leaves(abstract)
    places = _places(wanted, shardings)
    stored = _stored(directory)
    _compare(directory, wanted, stored)
    if not wanted:
        return abstract
    # Orbax holds an array for one device twice; read on the host and put there one by one, it is held once.
    whole = all(isinstance(place, jax.sharding.SingleDeviceSharding) for place in places.values())
    target, arguments = {}, {}
    for name, leaf in wanted.items():
        target[name] = jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(leaf.dtype), sharding=places[name])
        on_host = ocp.RestoreArgs(restore_type=np.ndarray, dtype=leaf.dtype)
        arguments[name] = on_host if whole else ocp.ArrayRestoreArgs(dtype=leaf.dtype, sharding=places[name])
    # On its way to the device an array is there twice: those that are much of the whole go before the rest is read.
    much = max(sum(map(nbytes, wanted.values())) / 8, _IN_FLIGHT_BYTES)
    large = [name for name in wanted if whole and nbytes(wanted[name]) > much]
    small = [name for name in wanted if name not in large]
    arrays: dict[str, Any] = {}
    sentence = f"{directory} cannot be restored; it is incomplete or damaged"
    with _freed_memory_returned(), _orbax(sentence, wanted) as checkpointer:
        for part in filter(None, (large, small)):
            request = ocp.args.PyTreeRestore(
                item=_nest({name: target[name] for name in part}),
                restore_args=_nest({name: arguments[name] for name in part}),
                partial_restore=len(part) < len(wanted),
            )
            arrays |= _leaves(checkpointer.restore(directory, args=request))[0]
            if whole:
                for name in part:
                    arrays[name] = jax.device_put(arrays[name], places[name]).block_until_ready()
    return jax.tree.unflatten(structure, [arrays[name] for name in wanted])


def check_place(directory: Path, overwrite: bool, option: str = "overwrite=True") -> None:
    """Say that a checkpoint may not be written to a place, before there is one to write.

    Raises:
        CheckpointError: there is something that may not be replaced, or that is no checkpoint.
    """
    if (directory.exists() or directory.is_symlink()) and not overwrite:
        raise CheckpointError(f"{directory} exists already; choose another place, or replace it by {option}.")
    if directory.exists() and not directory.is_dir():
        raise CheckpointError(f"{directory} is a file, not a directory.")
    marks = ("config.json", "_METADATA")  # of a checkpoint, and of a tree of arrays
    if directory.is_dir() and any(directory.iterdir()) and not any((directory / mark).is_file() for mark in marks):
        raise CheckpointError(f"{directory} holds something else than a checkpoint; choose another place.")


@contextlib.contextmanager
def written_whole(directory: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary directory that takes the name `directory` at the end of the `with` block, and vanishes on an error.

    Raises:
        CheckpointError: `directory` may not be replaced (see `check_place`), or its parent cannot be written to.
    """
    directory = Path(directory).absolute()
    check_place(directory, overwrite)
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", suffix=".tmp", dir=directory.parent))
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be written: {error.strerror}.") from None
    made = temporary / directory.name
    try:
        made.mkdir()
        yield made
        if directory.exists():
            directory.rename(temporary / "replaced")
        made.rename(directory)
    except AudiozooError:  # a SourceError is an OSError too, and has its sentence already
        raise
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be written: {error.strerror or error}.") from error
    finally:
        if not directory.exists() and (temporary / "replaced").exists():
            (temporary / "replaced").rename(directory)
        shutil.rmtree(temporary, ignore_errors=True)


# --- Orbax -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _freed_memory_returned() -> Iterator[None]:
    """While a checkpoint is restored, give what is freed back to the system.

    glibc keeps arrays of up to 32 MiB that a thread frees for that thread, and Orbax reads with many: half of a
    restored model was kept so. Afterwards the limit is the 32 MiB that glibc arrives at by itself.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # another C library
        yield
        return
    threshold = -3  # M_MMAP_THRESHOLD
    mallopt(threshold, 1 << 20)
    try:
        yield
    finally:
        mallopt(threshold, 32 << 20)


@contextlib.contextmanager
def _orbax(sentence: str, arrays: Mapping[str, Any] | None = None) -> Iterator[ocp.Checkpointer]:
    """A checkpointer that reports damage in one sentence (Orbax raises whatever its many parts do) and saves memory.

    Orbax keeps up to 96 GB of arrays in flight between device and disk, which is a second copy of nearly any model.
    Here the limit is the largest array, as Orbax refuses to read one above the limit.
    """
    largest = max(map(nbytes, (arrays or {}).values()), default=0)
    in_flight = max(1.05 * largest, _IN_FLIGHT_BYTES) / 1e9
    # Of several processes the one that asks writes or reads alone, and waits for no other.
    here = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=here, active_processes={here}, barrier_sync_key_prefix=f"{here}"
    )
    handler = ocp.PyTreeCheckpointHandler(
        multiprocessing_options=alone,
        save_concurrent_gb=in_flight,
        restore_concurrent_gb=in_flight,
        save_device_host_concurrent_gb=in_flight,
        use_compression=False,  # zstd takes a tenth off float32 weights, for several times the time
    )
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.CRITICAL)  # Orbax's threads log what they raise, with all their frames
    try:
        with contextlib.closing(ocp.Checkpointer(handler, multiprocessing_options=alone)) as checkpointer:
            yield checkpointer
    except Exception as error:
        said = first_line(error, most=None)  # what it comes from, a full disk say, stands at its end
        raise CheckpointError(f"{sentence} ({said if len(said) <= 200 else '… ' + said[-150:]}).") from error
    finally:
        log.setLevel(level)


def _write(tree: Any, directory: Path, sentence: str) -> None:
    if isinstance(tree, nnx.Module):
        tree = nnx.to_pure_dict(nnx.state(tree, nnx.Not(nnx.RngState)))
    leaves, _ = _leaves(tree)
    if not leaves:
        raise UsageError("There is no array to save.")
    arrays = {}
    for name, leaf in leaves.items():
        array = leaf[...] if isinstance(leaf, nnx.Variable) else leaf
        if not isinstance(array, jax.Array):
            array = np.asarray(array)
        if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
            raise UsageError(f"{name} is a PRNG key; save jax.random.key_data of it.")
        if isinstance(array, jax.ShapeDtypeStruct) or array.dtype.kind in "OSUMm" or not array.size:
            raise UsageError(f"{name} has no numbers to save.")
        arrays[name] = array
    nested = _nest(arrays)
    chunks = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES), nested)
    with _orbax(sentence, arrays) as checkpointer:
        checkpointer.save(directory, args=ocp.args.PyTreeSave(nested, save_args=chunks))


def _stored(directory: Path) -> dict[str, Any]:
    """Names of the arrays in a checkpoint, with metadata that has `.shape` and `.dtype`."""
    if not (directory / "_METADATA").is_file():
        raise SourceError(f"{directory} holds no arrays in Orbax's format.")
    with _orbax(f"{directory} cannot be read; it is incomplete or damaged") as checkpointer:
        tree = checkpointer.metadata(directory).item_metadata.tree
    return _leaves(tree)[0]


def _compare(directory: Path, wanted: Mapping[str, Any], stored: Mapping[str, Any]) -> None:
    lines = []
    for sign, names in (("-", [n for n in wanted if n not in stored]), ("+", [n for n in stored if n not in wanted])):
        shapes = wanted if sign == "-" else stored
        lines += [f"  {sign} {name} {tuple(shapes[name].shape)}" for name in names[:_LISTED]]
        if len(names) > _LISTED:
            lines.append(f"  {sign} … and {len(names) - _LISTED} more")
    reshaped = [n for n in wanted if n in stored and tuple(wanted[n].shape) != tuple(stored[n].shape)]
    lines += [f"  ! {n} is {tuple(stored[n].shape)}, not {tuple(wanted[n].shape)}" for n in reshaped[:_LISTED]]
    if len(reshaped) > _LISTED:
        lines.append(f"  ! … and {len(reshaped) - _LISTED} more")
    if lines:
        listing = "\n".join(lines)
        raise CheckpointError(
            f"{directory} does not fit (- it lacks, + it has besides, ! has another shape):\n{listing}"
        )


# --- Trees -----------------------------------------------------------------------------------------------------------


def nbytes(array: Any) -> int:
    """Bytes of an array, or of one of which only shape and dtype are known."""
    return math.prod(array.shape) * jnp.dtype(array.dtype).itemsize


def _leaves(tree: Any) -> tuple[dict[str, Any], Any]:
    """Leaves by dotted path, and the structure to put them back into."""
    if isinstance(tree, nnx.Module):
        tree = nnx.to_pure_dict(nnx.state(tree, nnx.Not(nnx.RngState)))
    flat, structure = jax.tree.flatten_with_path(tree, is_leaf=lambda node: hasattr(node, "shape"))
    leaves: dict[str, Any] = {}
    for path, leaf in flat:
        name = ".".join(_part(key) for key in path) or "value"
        if name in leaves:
            raise UsageError(f"Two leaves of the tree are named {name}.")
        leaves[name] = leaf
    return leaves, structure


def _part(key: Any) -> str:
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def _nest(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """`{"a.b": x}` as `{"a": {"b": x}}`."""
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *parents, last = name.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise UsageError(f"{name} lies below a leaf of the tree.")
        if last in node:
            raise UsageError(f"{name} is both a leaf and a branch of the tree.")
        node[last] = leaf
    return tree


def _places(wanted: Mapping[str, Any], shardings: Any) -> dict[str, jax.sharding.Sharding]:
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    if not shardings:
        return dict.fromkeys(wanted, one)
    if isinstance(shardings, jax.sharding.Sharding):
        return dict.fromkeys(wanted, shardings)
    given, _ = _leaves(shardings)
    missing = [name for name in wanted if name not in given]
    if missing:
        raise UsageError(f"{len(missing)} parameters have no sharding, the first being {missing[0]}.")
    return {name: given[name] for name in wanted}


def _version() -> str:
    try:
        return metadata.version("audiozoo")
    except metadata.PackageNotFoundError:
        return "unknown"
