"""The one table: which paper holds which classes, sizes, tasks and published checkpoints, under which licences.

Importing it imports no model: classes are named, and resolved when they are asked for.
"""

from __future__ import annotations

import difflib
import importlib
from dataclasses import dataclass
from typing import Any

from audiozoo.errors import UsageError


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint.

    Attributes:
        name: hub id, or the file name that the original project gives it.
        size: name of the configuration that it runs.
        licence: the licence its publisher states for the weights.
    """

    name: str
    size: str
    licence: str


@dataclass(frozen=True)
class Paper:
    """One paper of the zoo.

    Attributes:
        name: module name, in `audiozoo.models` and in `weights_conversion`.
        title: short name.
        paper: full title.
        year: of the first version.
        arxiv: identifier, or empty if there is no paper.
        classes: model classes, the main one first, named as in `transformers`.
        config: configuration class.
        sizes: classmethods of the configuration.
        tasks: what it does for a user.
        checkpoints: what has been published.
        processor: `module:Class` of its processor.
    """

    name: str
    title: str
    paper: str
    year: int
    arxiv: str
    classes: tuple[str, ...]
    config: str
    sizes: tuple[str, ...]
    tasks: tuple[str, ...]
    checkpoints: tuple[Checkpoint, ...]
    processor: str

    @property
    def module(self) -> Any:
        """The paper's model file."""
        return importlib.import_module(f"audiozoo.models.{self.name}")

    @property
    def conversion(self) -> Any:
        """The paper's conversion module."""
        return importlib.import_module(f"weights_conversion.{self.name}")

    def model_class(self, name: str) -> Any:
        """One of the paper's classes."""
        return getattr(self.module, name)

    @property
    def config_class(self) -> Any:
        """The paper's configuration class."""
        return getattr(self.module, self.config)

    @property
    def processor_class(self) -> Any:
        """The paper's processor class."""
        module, name = self.processor.split(":")
        return getattr(importlib.import_module(module), name)


def _whisper_checkpoints() -> tuple[Checkpoint, ...]:
    sizes = {
        "tiny": "tiny",
        "tiny.en": "tiny_en",
        "base": "base",
        "base.en": "base_en",
        "small": "small",
        "small.en": "small_en",
        "medium": "medium",
        "medium.en": "medium_en",
        "large": "large",
        "large-v2": "large_v2",
        "large-v3": "large_v3",
        "large-v3-turbo": "large_v3_turbo",
    }
    openai = [
        Checkpoint(f"openai/whisper-{name}", size, "MIT" if name == "large-v3-turbo" else "Apache-2.0")
        for name, size in sizes.items()
    ]
    files = [Checkpoint(f"{name}.pt", size, "MIT") for name, size in sizes.items() if name != "large"]
    distil = [
        Checkpoint(f"distil-whisper/distil-{name}", f"distil_{size}", "MIT")
        for name, size in (
            ("small.en", "small_en"),
            ("medium.en", "medium_en"),
            ("large-v2", "large_v2"),
            ("large-v3", "large_v3"),
        )
    ]
    faster = [
        Checkpoint(f"Systran/faster-whisper-{name}", size, "MIT") for name, size in sizes.items() if "turbo" not in name
    ]
    return (*openai, *files, *distil, *faster)


PAPERS: tuple[Paper, ...] = (
    Paper(
        name="whisper",
        title="Whisper",
        paper="Robust Speech Recognition via Large-Scale Weak Supervision",
        year=2022,
        arxiv="2212.04356",
        classes=(
            "WhisperForConditionalGeneration",
            "WhisperForAudioClassification",
            "WhisperForCausalLM",
            "WhisperModel",
        ),
        config="WhisperConfig",
        sizes=(
            "tiny",
            "tiny_en",
            "base",
            "base_en",
            "small",
            "small_en",
            "medium",
            "medium_en",
            "large",
            "large_v2",
            "large_v3",
            "large_v3_turbo",
            "distil_small_en",
            "distil_medium_en",
            "distil_large_v2",
            "distil_large_v3",
        ),
        tasks=("transcription", "translation into English", "language identification", "alignment", "classification"),
        checkpoints=_whisper_checkpoints(),
        processor="audiozoo.processors.whisper:WhisperProcessor",
    ),
)


def paper(name: str) -> Paper:
    """The paper of that module name or title.

    Raises:
        UsageError: if there is none, with the nearest name.
    """
    wanted = name.lower().replace("-", "_").replace(" ", "_")
    for entry in PAPERS:
        if wanted in {entry.name, entry.title.lower().replace(" ", "_")}:
            return entry
    near = difflib.get_close_matches(wanted, [entry.name for entry in PAPERS], n=1)
    raise UsageError(f"There is no paper {name!r} in the zoo" + (f"; did you mean {near[0]}?" if near else "."))


def paper_of_class(name: str) -> Paper:
    """The paper that holds a model class.

    Raises:
        UsageError: if no paper does.
    """
    for entry in PAPERS:
        if name in entry.classes:
            return entry
    classes = [c for entry in PAPERS for c in entry.classes]
    near = difflib.get_close_matches(name, classes, n=1)
    raise UsageError(
        f"No paper of the zoo has a class {name!r}"
        + (f"; did you mean {near[0]}?" if near else f"; there are {classes}.")
    )


def markdown_table() -> str:
    """The README's table of papers."""
    rows = ["| paper | year | classes | sizes | tasks | checkpoints | code | notebook |", "| --- " * 8 + "|"]
    for entry in PAPERS:
        link = f"[{entry.title}](https://arxiv.org/abs/{entry.arxiv})" if entry.arxiv else entry.title
        rows.append(
            f"| {link} | {entry.year} | {', '.join(f'`{c}`' for c in entry.classes)} | {len(entry.sizes)} "
            f"| {', '.join(entry.tasks)} | {len(entry.checkpoints)} "
            f"| [{entry.name}.py](audiozoo/models/{entry.name}.py) "
            f"| [{entry.name}.ipynb](notebooks/{entry.name}.ipynb) |"
        )
    return "\n".join(rows) + "\n"
