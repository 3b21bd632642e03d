"""`audiozoo plan`: what a model needs and does on TPUs, by their own compiler."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from audiozoo.commands.terminal import keep_compiled_programs
from audiozoo.commands.training import FUSED_ATTENTION, values_of
from audiozoo.errors import UsageError


def plan(
    model: Annotated[str, typer.Argument(help="a published checkpoint's name, PAPER:SIZE or a directory; no weights")],
    topology: Annotated[str, typer.Option(help="kind and shape: v5e:8x8, v5p:4x4x4, v6e:4x4")] = "v5e:2x2",
    mesh: Annotated[str, typer.Option(help="data=4,fsdp=16,tensor=1; one size may be -1")] = "fsdp=-1",
    batch: Annotated[int, typer.Option(help="recordings in a step, on all chips together")] = 64,
    seconds: Annotated[float, typer.Option(help="length of a recording")] = 15.0,
    tokens: Annotated[int, typer.Option(help="tokens of text with a recording")] = 128,
    train: Annotated[bool, typer.Option("--train", help="a step of training; else a forward pass")] = False,
    recipe: Annotated[str | None, typer.Option(help="how to train; the paper's first recipe by default")] = None,
    model_class: Annotated[str | None, typer.Option(help="where the paper has several")] = None,
    config: Annotated[list[str] | None, typer.Option(help="NAME=VALUE, a field of the model's configuration")] = None,
    accumulate: Annotated[int, typer.Option(help="parts that a batch is cut into")] = 1,
    remat: Annotated[str, typer.Option(help="none, layers or dots: what is computed again to save memory")] = "none",
    stack: Annotated[bool, typer.Option(help="equal blocks by one scan: compiles faster")] = True,
    fused_attention: Annotated[bool, FUSED_ATTENTION] = False,
    average: Annotated[float | None, typer.Option(help="decay of a moving average of the parameters")] = None,
    dtype: Annotated[str, typer.Option(help="of the computation: float32 or bfloat16")] = "bfloat16",
    param_dtype: Annotated[str, typer.Option(help="of the parameters: float32 or bfloat16")] = "float32",
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Compile a step for TPUs, here, and say what a chip needs. The TPU's own compiler does it, without a TPU."""
    for name in (dtype, param_dtype):
        if name not in ("float32", "bfloat16"):
            raise UsageError(f"{name!r} is no dtype to plan with; take float32 or bfloat16.")
    if min(batch, tokens) < 1 or seconds <= 0:
        raise UsageError("A batch needs at least one recording, one token, and a length above 0 s.")
    if not (train or recipe) and (accumulate != 1 or remat != "none" or average is not None):
        raise UsageError("--accumulate, --remat and --average are of a step of training: add --train.")
    keep_compiled_programs()
    from audiozoo.recipes import plan as planning
    from audiozoo.training.loop import Options

    made = planning.plan(
        model,
        topology,
        mesh,
        planning.Amount(batch, seconds, tokens),
        train=train or recipe is not None,
        recipe=recipe,
        model_class=model_class,
        config=values_of(config),
        options=Options(accumulate, average, remat, stack, fused_attention=fused_attention),
        dtype=dtype,
        param_dtype=param_dtype,
    )
    print(json.dumps(made.as_dict(), indent=2) if as_json else made.text())
