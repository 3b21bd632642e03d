"""`audiozoo train` and `audiozoo recipes`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from audiozoo.commands.terminal import keep_compiled_programs, messages, seed_option
from audiozoo.errors import UsageError

FUSED_ATTENTION = typer.Option("--fused-attention", help="on TPUs: attention of long inputs by one kernel")


def recipes() -> None:
    """List the recipes, and where their numbers are from."""
    from audiozoo.recipes import RECIPES

    for row in RECIPES.values():
        print(f"{row.name}  ({row.model_class}, {row.settings.steps:,} updates of {row.settings.batch_size})")
        print(f"  {row.settings.source}")


def train(
    recipe: Annotated[str, typer.Argument(help="its name; audiozoo recipes lists them")],
    data: Annotated[str, typer.Option(help="a folder, a .tsv or .jsonl manifest, a .tar or a pattern of several")],
    out: Annotated[Path, typer.Option(help="directory of the run; an interrupted run goes on there")],
    init: Annotated[str | None, typer.Option(help="checkpoint to go on from: hub id, directory or file")] = None,
    size: Annotated[str | None, typer.Option(help="published size to begin with, at random weights")] = None,
    evaluation: Annotated[str | None, typer.Option(help="data to evaluate on")] = None,
    held_out: Annotated[float, typer.Option(help="share of the data to evaluate on instead")] = 0.0,
    language: Annotated[str | None, typer.Option(help="of the texts, where the recordings do not say")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="NAME=VALUE, a setting: steps=1000")] = None,
    config: Annotated[list[str] | None, typer.Option(help="NAME=VALUE, a field of the model's configuration")] = None,
    lora: Annotated[int | None, typer.Option(help="train low-rank factors of this rank")] = None,
    mesh: Annotated[str | None, typer.Option(help="data=4,fsdp=2,tensor=1")] = None,
    distributed: Annotated[str | None, typer.Option(help="auto, or HOST:PORT,COUNT,INDEX: several processes")] = None,
    accumulate: Annotated[int, typer.Option(help="parts that a batch is cut into")] = 1,
    remat: Annotated[str, typer.Option(help="none, layers or dots: what is computed again to save memory")] = "none",
    stack: Annotated[bool, typer.Option("--stack", help="equal blocks by one scan: compiles faster")] = False,
    fused_attention: Annotated[bool, FUSED_ATTENTION] = False,
    average: Annotated[float | None, typer.Option(help="decay of a moving average of the parameters")] = None,
    seed: Annotated[int, seed_option("of all that is drawn")] = 0,
    dtype: Annotated[str, typer.Option(help="of the computation: float32 or bfloat16")] = "float32",
    evaluate_every: Annotated[int | None, typer.Option(help="steps between evaluations and checkpoints")] = None,
    patience: Annotated[int | None, typer.Option(help="evaluations without improvement, then stop")] = None,
    log_every: Annotated[int, typer.Option(help="steps between reports")] = 10,
    limit: Annotated[int, typer.Option("--unreadable", help="recordings that may be unreadable: left out")] = 10,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="write TensorBoard's files")] = False,
) -> None:
    """Train a model by a paper's recipe. A run that was stopped goes on."""
    if dtype not in ("float32", "bfloat16"):
        raise UsageError(f"{dtype!r} is no dtype to train in; take float32 or bfloat16.")
    keep_compiled_programs()
    from audiozoo import sharding
    from audiozoo.recipes import recipe as find
    from audiozoo.recipes import run
    from audiozoo.training import hosts
    from audiozoo.training.loop import Options
    from audiozoo.training.parameters import Lora

    if distributed is not None:
        hosts.connect(distributed)
    run.train(
        find(recipe),
        data,
        out,
        init=init,
        size=size,
        evaluation=evaluation,
        held_out=held_out,
        language=language,
        settings=values_of(set_),
        config=values_of(config),
        lora=None if lora is None else Lora(rank=lora, alpha=2 * lora),
        mesh=None if mesh is None else sharding.parse_mesh(mesh),
        options=Options(accumulate, average, remat, stack, seed, fused_attention),
        dtype=None if dtype == "float32" else dtype,
        evaluate_every=evaluate_every,
        patience=patience,
        log_every=log_every,
        limit=limit,
        tensorboard=tensorboard,
        console=messages,
    )
    print(out / "model")


def values_of(texts: list[str] | None) -> dict[str, Any]:
    """What lines of NAME=VALUE say."""
    values: dict[str, Any] = {}
    for text in texts or []:
        name, sign, value = text.partition("=")
        if not sign:
            raise UsageError(f"{text!r} is not understood; write NAME=VALUE.")
        try:
            values[name] = json.loads(value)
        except ValueError:
            values[name] = value
    return values
