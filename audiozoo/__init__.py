"""Audio papers, each in one readable JAX/Flax file that runs the real checkpoints.

    import audiozoo

    model = audiozoo.load("openai/whisper-tiny.en")
    processor = audiozoo.load_processor("openai/whisper-tiny.en")
    tokens = model.generate(**processor(waveform, sampling_rate=16_000))
    print(processor.batch_decode(tokens, skip_special_tokens=True))

`load` takes a hub id, a directory or a file; `jit` compiles a model's call; `export` writes a directory that
`transformers` loads; `list_models` lists what there is.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from audiozoo.errors import AudioError, AudiozooError, CheckpointError, SourceError, UsageError
from audiozoo.registry import PAPERS

if TYPE_CHECKING:
    from flax import nnx
    from jax.sharding import Mesh

__version__ = "0.1.0"
__all__ = [
    "AudioError",
    "AudiozooError",
    "CheckpointError",
    "ModelInfo",
    "SourceError",
    "UsageError",
    "export",
    "jit",
    "list_models",
    "load",
    "load_processor",
    "save",
]

# What a directory may hold beside weights and config.json that a processor or a tokenizer reads.
PROCESSOR_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "normalizer.json",
    "generation_config.json",
    "vocabulary.txt",
    "vocabulary.json",
    "vocab.txt",
    "dictionary.txt",
    "dict.*.txt",
    "*.tiktoken",
    "*.onnx.json",
    "*.model",
    "speaker_embeddings_path.json",
)
# Folders of such files: Bark's voice presets.
PROCESSOR_FOLDERS = ("speaker_embeddings",)


@dataclasses.dataclass(frozen=True)
class ModelInfo:
    """A line of `list_models`: a published checkpoint, its paper and classes, its size's name and its licence."""

    checkpoint: str
    paper: str
    classes: tuple[str, ...]
    size: str
    tasks: tuple[str, ...]
    licence: str


def list_models(paper: str | None = None) -> list[ModelInfo]:
    """Every published checkpoint that the zoo runs, or those of one paper.

    Raises:
        UsageError: if there is no such paper.
    """
    from audiozoo import registry

    papers = PAPERS if paper is None else (registry.paper(paper),)
    return [
        ModelInfo(c.name, entry.name, entry.classes, c.size, entry.tasks, c.licence)
        for entry in papers
        for c in entry.checkpoints
    ]


if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """`audiozoo.audio`, `audiozoo.packaged` and `audiozoo.sharding` are imported when they are asked for."""
        if name in ("audio", "packaged", "sharding"):
            return importlib.import_module(f"audiozoo.{name}")
        raise AttributeError(f"module 'audiozoo' has no attribute {name!r}")


def load(
    source: str | Path,
    *,
    model_class: str | None = None,
    dtype: Any = None,
    param_dtype: Any = None,
    mesh: Mesh | None = None,
    rules: Sequence[Any] | None = None,
    initialize: str | None = None,
    stack_layers: bool = False,
    revision: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> nnx.Module:
    """Load a model.

    Args:
        source: a directory (Hugging Face's, CTranslate2's, or one that `save` wrote), a file of an original project, or
            a Hugging Face hub id.
        model_class: the class to load as, where the checkpoint leaves a choice; by default what its `config.json` says.
        dtype: dtype of the computation; by default that of parameters and inputs.
        param_dtype: dtype of the parameters; float32 by default, whatever the file holds.
        mesh: devices to lay the parameters out on; every tensor goes straight to its shards.
        rules: `(regular expression, PartitionSpec)` pairs, first match wins; by default `sharding.DEFAULT_RULES`.
        initialize: a regular expression of whole parameter paths (`"classifier\\..*"`) that are drawn at random if the
            checkpoint does not have them (a new head, for fine-tuning). Without it the checkpoint must hold every
            parameter, as a directory that `save` wrote always does.
        stack_layers: run equal blocks by one scan, so that a deep model compiles in the time of one block. Such a model
            computes and is saved as any other, but keeps no cache (`generate`) and shows nothing between its blocks.
        revision: branch, tag or commit of a hub repository; of no meaning for a path.
        progress: called with the bytes read so far and the bytes in all.

    Returns:
        The model, an `nnx.Module` with `.config`, in evaluation mode.

    Raises:
        SourceError: if there is nothing of that name, or nothing that the zoo runs.
        CheckpointError: if the checkpoint is damaged or does not fit its class.
        UsageError: if the class or a dtype is unknown, for float64 while JAX has it switched off, or if `initialize` is
            no regular expression.
    """
    from audiozoo import hub, loading
    from audiozoo.layers import stacking

    for wanted in (dtype, param_dtype):
        _check_dtype(wanted)
    try:
        re.compile(initialize or "")
    except re.error as error:
        raise UsageError(f"initialize={initialize!r} is not a regular expression: {error}.") from None

    path = hub.resolve(str(source), revision=revision)
    model = loading.load(
        path,
        model_class=model_class,
        dtype=dtype,
        param_dtype=param_dtype,
        mesh=mesh,
        rules=rules,
        initialize=initialize,
        progress=progress,
    )
    return stacking.scanned(model) if stack_layers else model


def _check_dtype(dtype: Any) -> None:
    import jax.numpy as jnp
    import numpy as np

    try:
        known = dtype is None or jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:
        known = False
    if not known:
        raise UsageError(f"{dtype!r} is no dtype of a model; take float32, bfloat16, float16 or float64.")
    if dtype is not None and jnp.asarray(np.zeros(0, dtype)).dtype != jnp.dtype(dtype):
        raise UsageError(f'{jnp.dtype(dtype)} needs jax.config.update("jax_enable_x64", True); JAX rounds to float32.')


def load_processor(source: str | Path, *, revision: str | None = None) -> Any:
    """Load the processor that turns waveforms and text into a model's inputs, and its outputs into text.

    Args:
        source: as for `load`.
        revision: branch, tag or commit of a hub repository; of no meaning for a path.

    Raises:
        SourceError: if the source is not there, or lacks the files of a processor.
    """
    from audiozoo import hub, loading

    inside = (f"{folder}/{files}" for folder in PROCESSOR_FOLDERS for files in ("*.np[yz]", "*/*.np[yz]"))
    path = hub.resolve(str(source), patterns=("config.json", *PROCESSOR_FILES, *inside), revision=revision)
    return loading.processor_of(path)


def jit(model: nnx.Module, method: str = "__call__") -> Callable[..., Any]:
    """A model's call, compiled once for each combination of input shapes and options.

    The model is split into structure and arrays once, here, and weight-normalised kernels are folded; later changes to
    its parameters do not show. Arrays and numbers among the arguments are traced; text, booleans and None are static,
    and so are the keywords that the model's class lists in `static_arguments`. A token id that the model
    lacks, which the call itself refuses, is not seen in an array that is traced.

    Args:
        model: any model of the zoo.
        method: the method to compile instead of the call.

    Raises:
        UsageError: if the model has no such method, or one that compiles itself.
    """
    import jax
    from flax import nnx

    from audiozoo.layers.weight_norm import fold_weight_norm

    if not callable(getattr(model, method, None)):
        raise UsageError(f"A {type(model).__name__} has no method {method!r} to compile.")
    if method == "generate":
        raise UsageError("generate compiles its own loop; call it as it is.")
    graphdef, state = nnx.split(fold_weight_norm(model))
    names = getattr(type(model), "static_arguments", ())

    def is_static(value: Any) -> bool:
        return value is None or isinstance(value, (bool, str)) or (callable(value) and not isinstance(value, jax.Array))

    def call(state: Any, args: tuple, kwargs: dict, static: tuple) -> Any:
        static_args, static_kwargs = static
        whole = list(args)
        for index, value in static_args:
            whole.insert(index, value)
        return getattr(nnx.merge(graphdef, state), method)(*whole, **kwargs, **dict(static_kwargs))

    compiled = jax.jit(call, static_argnums=3)

    def arguments(args: tuple, kwargs: dict) -> tuple[Any, ...]:
        kwargs = {k: v.item() if k in names and hasattr(v, "item") else v for k, v in kwargs.items()}
        static_args = tuple((i, a) for i, a in enumerate(args) if is_static(a))
        fixed = {k for k, v in kwargs.items() if k in names or is_static(v)}
        static_kwargs = tuple(sorted((k, kwargs[k]) for k in fixed))
        traced = tuple(a for a in args if not is_static(a))
        named = {k: v for k, v in kwargs.items() if k not in fixed}
        return state, traced, named, (static_args, static_kwargs)

    def run(*args: Any, **kwargs: Any) -> Any:
        return compiled(*arguments(args, kwargs))

    def lower(*args: Any, **kwargs: Any) -> Any:
        return compiled.lower(*arguments(args, kwargs))

    run.lower = lower  # type: ignore[attr-defined]
    run.__doc__ = f"`{type(model).__name__}.{method}`, compiled."
    run.compiled = compiled  # type: ignore[attr-defined]
    return run


def save(
    model: nnx.Module, directory: str | Path, *, processor_from: str | Path | None = None, overwrite: bool = False
):
    """Write a model as a native checkpoint: Orbax arrays beside a `config.json`, restored straight into shards.

    Args:
        model: any model of the zoo.
        directory: where to; it appears only when it is complete.
        processor_from: a directory whose processor and tokenizer files are copied along.
        overwrite: whether an existing checkpoint may be replaced.

    Raises:
        CheckpointError: if the directory exists or cannot be written.
        SourceError: if `processor_from` is no directory.
    """
    from audiozoo import loading

    loading.save(model, Path(directory), files=_processor_files(processor_from), overwrite=overwrite)


def export(
    model: nnx.Module,
    directory: str | Path,
    *,
    processor_from: str | Path | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write a model as a Hugging Face directory, which `transformers` loads with no missing and no unexpected key.

    Args:
        model: any model of the zoo.
        directory: where to; it appears only when it is complete.
        processor_from: a directory whose processor and tokenizer files are copied along.
        overwrite: whether an existing checkpoint may be replaced.
        progress: called with the bytes written so far and the bytes in all.

    Raises:
        CheckpointError: if the directory exists or cannot be written.
        SourceError: if `processor_from` is no directory.
    """
    from audiozoo import loading

    loading.export(
        model, Path(directory), files=_processor_files(processor_from), overwrite=overwrite, progress=progress
    )


def _processor_files(directory: str | Path | None) -> list[Path]:
    if directory is None:
        return []
    if not Path(directory).is_dir():
        raise SourceError(f"processor_from is {directory}, where there is no directory with a processor's files.")
    folders = [path for name in PROCESSOR_FOLDERS if (path := Path(directory) / name).is_dir()]
    return [path for pattern in PROCESSOR_FILES for path in sorted(Path(directory).glob(pattern))] + folders
