"""Behind the front door: from a path to a model, and back to a directory."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from audiozoo import checkpoints, sharding
from audiozoo.configs import with_tuples
from audiozoo.errors import AudiozooError, CheckpointError, SourceError, UsageError, first_line
from audiozoo.layers.abstract import abstract
from audiozoo.layers.stacking import unscanned
from audiozoo.registry import PAPERS, Paper, paper_of_class
from weights_conversion import ForeignCheckpoint, read_json
from weights_conversion.readers import open_tensors, write_safetensors

Progress = Callable[[int, int], None]


def variables(model: nnx.Module) -> dict[str, nnx.Variable]:
    """A model's parameters and statistics by dotted path, in a fixed order; random state is not among them."""
    state = nnx.state(model, nnx.Not(nnx.RngState))
    return {".".join(map(str, path)): leaf for path, leaf in sorted(nnx.to_flat_state(state), key=lambda item: item[0])}


def with_variables(model: nnx.Module, values: Mapping[str, Any]) -> nnx.Module:
    """The model with these arrays in place of its own; every one of its variables must be given."""
    graphdef, state = nnx.split(model)
    flat = []
    for path, leaf in nnx.to_flat_state(state):
        name = ".".join(map(str, path))
        flat.append((path, leaf.replace(values[name]) if name in values else leaf))
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def paper_of(path: Path) -> Paper:
    """The paper whose model lies at a path.

    Raises:
        SourceError: if nothing there is a model of the zoo.
        CheckpointError: if a file is damaged.
    """
    if path.is_dir() and (path / "config.json").is_file():
        config = read_json(path / "config.json")
        native = config.get("audiozoo")
        named = native.get("model_class") if isinstance(native, Mapping) else config.get("architectures") or []
        for name in named if isinstance(named, list) else [named]:
            try:
                return paper_of_class(str(name))
            except UsageError as error:
                raise SourceError(f"{path / 'config.json'} names the class {name}. {error}") from None
        for entry in PAPERS:
            kind = config.get("model_type")
            types = getattr(entry.conversion, "MODEL_TYPES", (entry.conversion.MODEL_TYPE,))
            if kind in types or (kind is None and entry.conversion.recognise(path)):
                return entry
    elif path.exists():
        for entry in PAPERS:
            if entry.conversion.recognise(path):
                return entry
    if not path.exists():
        raise SourceError(f"{path} does not exist.")
    if path.is_file():
        beside = path.parent / "config.json"
        if beside.is_file() and {"architectures", "model_type"} & set(read_json(beside)):
            raise SourceError(f"{path} is one file of a checkpoint; give the directory, {path.parent}.")
        open_tensors(path)  # what is damaged, or no file of weights, is said to be that
    known = ", ".join(entry.title for entry in PAPERS)
    raise SourceError(f"{path} is no checkpoint of a model that audiozoo runs ({known}).")


def processor_of(path: Path, paper: Paper | None = None) -> Any:
    """The processor of what lies at a path: as an author's file tells, else out of the files of the directory.

    Args:
        path: a directory or a file.
        paper: whose model is read from it; by default the one that is found there.
    """
    paper = paper or paper_of(path)
    with _made_of(path, "No processor can be made of the settings in"):
        made = processor_of_file(path, paper)
        return paper.processor_class.from_directory(path if path.is_dir() else path.parent) if made is None else made


def processor_of_file(path: Path, paper: Paper) -> Any:
    """The processor that an author's file tells of; None where the files of a directory say all of it."""
    make = getattr(paper.conversion, "processor_of_file", None)
    config = read_json(path / "config.json") if (path / "config.json").is_file() else {}
    whole = {"architectures", "audiozoo", "model_type"} & set(config)  # a directory of Hugging Face's, or of `save`
    return None if make is None or whole else make(path)


def load(
    path: Path,
    *,
    model_class: str | None = None,
    dtype: Any = None,
    param_dtype: Any = None,
    mesh: Any = None,
    rules: Sequence[Any] | None = None,
    initialize: str | None = None,
    progress: Progress | None = None,
) -> nnx.Module:
    """See `audiozoo.load`; `path` exists already."""
    paper = paper_of_class(model_class) if model_class else paper_of(path)
    param_dtype = jnp.dtype(param_dtype or jnp.float32)
    if path.is_dir() and checkpoints.is_native(path):
        return _load_native(path, paper, model_class, dtype, param_dtype, mesh, rules)
    with _made_of(path):
        foreign = paper.conversion.open_checkpoint(path, model_class)
    if foreign.model_class not in paper.classes:
        raise SourceError(f"{path} holds a {foreign.model_class}; {paper.title} has {', '.join(paper.classes)}.")
    cls = paper.model_class(foreign.model_class)
    return convert(foreign, cls, dtype, param_dtype, mesh, rules, initialize, progress)


@contextmanager
def _made_of(source: Any, wrong: str = "No model can be made of the sizes in") -> Iterator[None]:
    """Sizes of which no model can be made (a width of 0, a text for a part) get one sentence, wherever they are met.

    So do settings of which no processor can be made.
    """
    try:
        yield
    except AudiozooError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        if isinstance(error, AttributeError) and not isinstance(
            error.obj, int | float | str | list | tuple | dict | None
        ):
            raise  # of what no JSON holds: a mistake of ours
        raise CheckpointError(f"{wrong} {source} ({first_line(error)}).") from error


def convert(
    foreign: ForeignCheckpoint,
    cls: Any,
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
    mesh: Any = None,
    rules: Sequence[Any] | None = None,
    initialize: str | None = None,
    progress: Progress | None = None,
) -> nnx.Module:
    """Read a foreign checkpoint tensor by tensor into a model, each one straight to its shards."""

    def create(rngs: Any) -> nnx.Module:
        return cls(foreign.config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

    with _made_of(foreign.source):
        model = abstract(create)
    expected = variables(model)
    shardings = _shardings(expected, mesh, rules)
    steps = foreign.table.plan(
        foreign.tensors,
        expected,
        where=str(foreign.source),
        model=foreign.model_class,
        may_be_absent="|".join(f"(?:{e})" for e in (initialize, foreign.may_be_absent) if e) or None,
    )
    # The largest first: on its way to a device an array is there twice, and then little else is.
    steps.sort(key=lambda step: -max(checkpoints.nbytes(expected[path]) for path in step.ours if path in expected))
    total = sum(map(checkpoints.nbytes, expected.values()))
    done, values = 0, {}
    for name, array in foreign.table.read(foreign.tensors, steps):
        if name not in expected:
            continue
        values[name] = place(array, expected[name].dtype, shardings.get(name))
        done += values[name].nbytes
        if progress is not None:
            progress(done, total)
    if absent := [name for name in expected if name not in values]:

        def draw() -> dict[str, jax.Array]:
            fresh = variables(create(nnx.Rngs(0)))
            return {name: fresh[name][...] for name in absent}

        # Compiled, so that what the checkpoint does have is not drawn as well.
        values |= {n: place(np.asarray(a), expected[n].dtype, shardings.get(n)) for n, a in jax.jit(draw)().items()}
    return finish(with_variables(model, values), foreign.attributes)


def place(array: np.ndarray, dtype: Any, where: Any = None) -> jax.Array:
    """An array on its devices, in C order and of the model's dtype, with no second copy on the host.

    `jnp.asarray` would make one on the way. And it is waited for: JAX copies on while the next array is read, and
    several would be there twice.
    """
    array = np.asarray(array, dtype=dtype, order="C")
    placed = jax.device_put(array) if where is None else sharding.put(array, where)
    return placed.block_until_ready()


def finish(model: nnx.Module, attributes: Mapping[str, Any]) -> nnx.Module:
    """Set what a checkpoint says beside its weights."""
    for name, value in attributes.items():
        setattr(model, name, value)
    return model


def _shardings(expected: Mapping[str, Any], mesh: Any, rules: Sequence[Any] | None) -> dict[str, Any]:
    if mesh is None:
        if rules is not None:
            raise UsageError("Sharding rules need a mesh: audiozoo.load(…, mesh=audiozoo.sharding.make_mesh({…})).")
        return {}
    return sharding.shardings_for(expected, mesh, sharding.DEFAULT_RULES if rules is None else rules)


# --- languages (MMS) -------------------------------------------------------------------------------------------------


def speak_language(
    model: Any, processor: Any, language: str | None, source: str | None = None, option: str = "--language"
) -> tuple[Any, Any]:
    """A CTC model and its processor for a language: with its adapters, of MMS; without any there is none to choose.

    For the aligner, and for recognisers of phonemes, the language says how a text is read.

    Args:
        model: the model.
        processor: its processor.
        language: the language; None is the model's own.
        source: where the model is from: adapters of other languages lie there, and messages name it.
        option: what names the language there.

    Raises:
        UsageError: if the model knows one language only, or holds several and none, or another, is asked for.
    """
    from audiozoo import hub
    from audiozoo.decoding.ctc import in_one_language
    from audiozoo.processors.mms import AlignmentTokenizer
    from weights_conversion.wav2vec2 import load_adapter

    name = source or "The model"
    if hasattr(model, "speaking"):
        return in_one_language(model, processor, language, name, option)
    if language is None:
        return model, processor
    processor = copy.deepcopy(processor)
    if isinstance(processor.tokenizer, AlignmentTokenizer):
        processor.set_target_lang(language)  # how the text is romanised
    elif processor.tokenizer.phonemizer_lang is not None:
        processor.tokenizer.phonemizer_lang = language  # how the text is pronounced
    elif getattr(model.config, "adapter_attn_dim", None) is None:
        raise UsageError(f"{name} has no adapters of languages; leave {option} out.")
    elif source is None:
        return in_one_language(model, processor, language, name, option)
    else:
        model = load_adapter(model, hub.resolve(source, patterns=(f"adapter.{language}.*",)), language)
        processor.set_target_lang(language)
    return model, processor


# --- native directories ----------------------------------------------------------------------------------------------


def save(model: nnx.Module, directory: Path, *, files: Iterable[Path] = (), overwrite: bool = False) -> None:
    """See `audiozoo.save`."""
    model = unscanned(model)
    values = {name: leaf[...] for name, leaf in variables(model).items()}
    settings = dataclasses.asdict(model.config)  # type: ignore[attr-defined]
    config: dict[str, Any] = {"model_class": type(model).__name__, "config": settings}
    if hasattr(model, "generation_config"):
        config["generation_config"] = dataclasses.asdict(model.generation_config)
    checkpoints.save(values, directory, config, files=list(files), overwrite=overwrite)


def _load_native(
    path: Path, paper: Paper, model_class: str | None, dtype: Any, param_dtype: Any, mesh: Any, rules: Any
) -> nnx.Module:
    saved = checkpoints.read_config(path)
    if model_class not in (None, saved["model_class"]):
        raise CheckpointError(f"{path} holds a {saved['model_class']}, not a {model_class}.")
    cls = paper.model_class(saved["model_class"])
    with _made_of(path):
        config, _ = native_config(path, paper)
        model = abstract(lambda rngs: cls(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs))
    expected = variables(model)
    values = checkpoints.restore(path, expected, _shardings(expected, mesh, rules))
    attributes = {}
    if "generation_config" in saved:
        kind = type(_attribute_of(cls, config, "generation_config"))
        attributes["generation_config"] = from_dict(kind, saved["generation_config"])
    return finish(with_variables(model, values), attributes)


def native_config(path: Path, paper: Paper) -> tuple[Any, str]:
    """The configuration in a native directory, and the name of the class that it is of."""
    saved = checkpoints.read_config(path)
    cls = paper.model_class(saved["model_class"])
    if not isinstance(saved.get("config"), Mapping):
        raise CheckpointError(f"{path / 'config.json'} does not hold the model's configuration.")
    return from_dict(getattr(cls, "config_class", paper.config_class), saved["config"]), saved["model_class"]


def _attribute_of(cls: Any, config: Any, name: str) -> Any:
    return getattr(abstract(lambda rngs: cls(config, rngs=rngs)), name)


def from_dict(cls: Any, values: Mapping[str, Any]) -> Any:
    """A frozen dataclass from JSON: lists become tuples; an unknown name is an error."""
    fields = {f.name: f for f in dataclasses.fields(cls)}
    if unknown := sorted(set(values) - set(fields)):
        raise CheckpointError(f"{cls.__name__} has no {', '.join(unknown)}; a newer audiozoo may have written this.")

    return cls(**{name: with_tuples(value) for name, value in values.items()})


# --- Hugging Face directories ----------------------------------------------------------------------------------------


def export(
    model: nnx.Module,
    directory: Path,
    *,
    files: Iterable[Path] = (),
    overwrite: bool = False,
    progress: Progress | None = None,
) -> None:
    """See `audiozoo.export`."""
    model = unscanned(model)
    paper = paper_of_class(type(model).__name__)
    form = paper.conversion.hugging_face(model)
    values = {name: leaf[...] for name, leaf in variables(model).items()}
    total, done = sum(v.nbytes for v in values.values()), 0

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        nonlocal done
        for name, array in form.table.write(values):
            yield name, array
            done += array.nbytes
            if progress is not None:
                progress(done, total)

    with checkpoints.written_whole(directory, overwrite=overwrite) as temporary:
        for file in files:
            if file.is_dir():
                shutil.copytree(file, temporary / file.name)
            else:
                (temporary / file.name).write_bytes(file.read_bytes())
        for name, value in form.files.items():
            (temporary / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
        write_safetensors(temporary, tensors())
