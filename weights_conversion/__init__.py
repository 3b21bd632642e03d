"""Foreign checkpoints: what each paper's originals call things, and how that becomes ours.

One module a paper. Each gives

- `recognise(path) -> bool`: is this file or directory one of the original project's own forms? (Hugging Face
  directories need no recognising: their `config.json` names the class.)
- `open_checkpoint(path, model_class=None) -> ForeignCheckpoint`: opened, not yet read;
- `hugging_face(model) -> HuggingFaceForm`: what `audiozoo.export` writes;
- where the original's own files tell something of it, `processor_of_file(path)`: their processor.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from audiozoo.decoding.config import GenerationConfig
from audiozoo.errors import CheckpointError, SourceError, UsageError
from weights_conversion.rules import Table, Tensors


@dataclass
class ForeignCheckpoint:
    """A checkpoint of another project, opened but not read.

    Attributes:
        model_class: name of our class that runs it.
        config: our configuration of that class.
        tensors: the foreign tensors.
        table: how they become our parameters.
        attributes: what else to set on the model (`generation_config` …).
        source: where it came from, for messages.
        may_be_absent: a regular expression of parameters that published files of this kind may lack; they are drawn at
            random.
    """

    model_class: str
    config: Any
    tensors: Tensors
    table: Table
    source: Path
    attributes: Mapping[str, Any] = field(default_factory=dict)
    may_be_absent: str | None = None


@dataclass
class HuggingFaceForm:
    """What a model looks like as a Hugging Face directory.

    Attributes:
        files: JSON files by name; `config.json` is one of them.
        table: the correspondence to write the tensors by.
    """

    files: Mapping[str, Mapping[str, Any]]
    table: Table


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        SourceError: if there is no such file.
        CheckpointError: if it is not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SourceError(f"{path.parent} has no {path.name}.") from None
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits, and lists in lists without end
        raise CheckpointError(f"{path} is not valid JSON ({error}).") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__} where a JSON object is due.")
    return value


def take(
    config: Mapping[str, Any], names: Mapping[str, Any], where: str, nullable: Collection[str] = ()
) -> dict[str, Any]:
    """The entries of a foreign configuration that are named, each of the type of its default.

    Args:
        config: the foreign configuration.
        names: names and defaults of our configuration.
        where: the file, for messages.
        nullable: names whose null is a value; that of others says nothing.

    Raises:
        CheckpointError: for a value of the wrong type.
    """
    taken: dict[str, Any] = {}
    for name, default in names.items():
        if config.get(name) is None:
            if name in nullable and name in config:
                taken[name] = None
            continue
        value = config[name]
        kind = type(default)
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if isinstance(value, list):
            value = tuple(tuple(v) if isinstance(v, list) else v for v in value)
        if default is not None and not isinstance(value, kind):
            raise CheckpointError(f"{where}: {name} is {config[name]!r}, which is no {kind.__name__}.")
        taken[name] = value
    return taken


# Of a `generation_config.json`, not of the search: the special tokens, which models keep, and what is returned.
_NOT_SEARCH = {"bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "return_dict_in_generate"}
_NOT_SEARCH |= {"output_scores", "output_logits", "output_log_probs"}


def search_options(
    generation: Mapping[str, Any], where: str, left_out: Collection[str] = ()
) -> tuple[tuple[str, Any], ...]:
    """How a checkpoint wants its tokens searched for: the options that are not at their defaults.

    Args:
        generation: a `generation_config.json`.
        where: the file, for messages.
        left_out: options that the paper keeps elsewhere.

    Raises:
        CheckpointError: for a value that makes no sense.
    """
    names = [f.name for f in fields(GenerationConfig) if f.name not in _NOT_SEARCH | set(left_out)]
    try:
        chosen = GenerationConfig(**{name: generation[name] for name in names if generation.get(name) is not None})
    except UsageError as error:
        raise CheckpointError(f"{where}: {error}") from None
    default = GenerationConfig()
    return tuple((n, getattr(chosen, n)) for n in names if getattr(chosen, n) != getattr(default, n))


def labels_from_hugging_face(config: Mapping[str, Any]) -> dict[str, Any]:
    """`{"id2label": names in order}` if the configuration names or counts its classes, else nothing.

    Raises:
        CheckpointError: if it does not name them by their numbers.
    """
    named = config.get("id2label")
    if isinstance(named, Mapping) and named:
        if wrong := [key for key in named if not str(key).isdecimal()]:
            raise CheckpointError(f"The configuration's id2label has {wrong[0]!r} for the number of a class.")
        return {"id2label": tuple(str(named[key]) for key in sorted(named, key=int))}
    if isinstance(config.get("num_labels"), int):
        return {"id2label": tuple(f"LABEL_{i}" for i in range(config["num_labels"]))}
    return {}


def warn_of_nameless_classes(path: Path, count: int, remedy: str) -> None:
    """Say that a file does not name its classes, and what to put beside it (`remedy`)."""
    warnings.warn(
        f"{path} does not hold the names of its {count} classes, which are called LABEL_0 and so on. Put {remedy}",
        stacklevel=3,
    )


def labels_to_hugging_face(labels: tuple[str, ...]) -> dict[str, Any]:
    """The two dictionaries that a Hugging Face configuration names its classes with."""
    return {
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
    }
