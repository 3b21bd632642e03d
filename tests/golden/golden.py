"""Golden files: what the original computes, kept in a few KB, for machines without PyTorch.

A file holds a seed instead of weights (`tests/random_weights.py` makes them again from it), the configuration, the
inputs, the original's outputs in float64 (large ones as samples and moments), and the versions that made them.

A paper describes its cases in `tests/golden/cases/<paper>.py`, as a tuple `CASES` of `Case`. The command
`python -m tests.golden.generate` writes `<name>.npz`; `test_golden.py` reads it on whatever backend JAX has.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tests.random_weights import random_parameters
from tests.tolerances import ANY, tolerance
from weights_conversion.rules import Table

DIRECTORY = Path(__file__).parent
SAMPLES = 256  # values kept of a large array
VARIABLES = nnx.Any(nnx.Param, nnx.BatchStat)


@dataclass(frozen=True)
class Case:
    """One golden file.

    Attributes:
        name: of the file, without `.npz`; a paper's first case has the paper's name.
        config: everything that both sides are built from, as JSON.
        build: makes our model for a parameter dtype.
        table: the conversion whose foreign names key the random weights.
        inputs: arrays by name, floating ones in float64.
        run: our outputs by name.
        reference: makes the original; imports PyTorch inside.
        run_reference: its outputs by the same names, as NumPy arrays or tensors.
        seed: of the weights.
        needs: where the original is in no package of the extra `reference`, what has it: `transformers==4.40.2`.
    """

    name: str
    config: Mapping[str, Any]
    build: Callable[[Any], nnx.Module]
    table: Table
    inputs: Callable[[], dict[str, np.ndarray]]
    run: Callable[[nnx.Module, dict[str, Any]], dict[str, Any]]
    reference: Callable[[], Any]
    run_reference: Callable[[Any, dict[str, np.ndarray]], dict[str, Any]]
    seed: int = 0
    needs: str | None = None

    @property
    def path(self) -> Path:
        """Where the file lies."""
        return DIRECTORY / f"{self.name}.npz"


@dataclass(frozen=True)
class Golden:
    """What a file holds."""

    seed: int
    config: dict[str, Any]
    versions: dict[str, str]
    inputs: dict[str, np.ndarray]
    outputs: dict[str, dict[str, np.ndarray]] = field(repr=False)


def cases() -> Iterator[Case]:
    """The cases of all papers."""
    for path in sorted((DIRECTORY / "cases").glob("*.py")):
        if path.stem != "__init__":
            yield from importlib.import_module(f"tests.golden.cases.{path.stem}").CASES


def digest(array: Any) -> dict[str, np.ndarray]:
    """What is kept of an output: all of it if small, else evenly spread samples, and its mean and root mean square."""
    array = np.asarray(array)
    if array.size <= SAMPLES or not np.issubdtype(array.dtype, np.inexact):
        return {"all": array}
    stride = -(-array.size // SAMPLES) | 1  # odd, so that it runs through all positions of power-of-two axes
    kept = np.asarray(array, np.float64)
    return {
        "shape": np.asarray(array.shape),
        "samples": kept.reshape(-1)[::stride],
        "moments": np.asarray([kept.mean(), np.sqrt(np.mean(kept**2))]),
    }


def write(case: Case, outputs: Mapping[str, Any], versions: Mapping[str, str]) -> None:
    """Write a case's file: to a temporary name, then renamed."""
    arrays = {f"input.{name}": array for name, array in case.inputs().items()}
    for name, value in outputs.items():
        arrays |= {f"output.{name}.{part}": array for part, array in digest(value).items()}
    record = {"seed": case.seed, "config": dict(case.config), "versions": dict(versions)}
    temporary = case.path.with_name(f".{case.name}.npz")
    np.savez_compressed(temporary, record=np.asarray(json.dumps(record)), **arrays)
    temporary.replace(case.path)


def read(path: Path) -> Golden:
    """Read a file."""
    with np.load(path, allow_pickle=False) as arrays:
        record = json.loads(str(arrays["record"]))
        inputs, outputs = {}, {}
        for key in arrays.files:
            kind, _, rest = key.partition(".")
            if kind == "input":
                inputs[rest] = arrays[key]
            elif kind == "output":
                name, _, part = rest.rpartition(".")
                outputs.setdefault(name, {})[part] = arrays[key]
    return Golden(record["seed"], record["config"], record["versions"], inputs, outputs)


def _unfilled(case: Case, dtype: Any) -> nnx.Module:
    """Our model with shapes in place of its values, so that none is drawn, unless it keeps something else beside."""
    key = jax.random.key(0)  # for all: counting keys in a trace is quadratic in flax 0.12.8
    with mock.patch.object(nnx.RngStream, "__call__", return_value=key):
        model = nnx.eval_shape(lambda: case.build(dtype))
    return case.build(dtype) if jax.tree.leaves(nnx.state(model, nnx.Not(VARIABLES))) else model


def randomised(case: Case, dtype: Any) -> nnx.Module:
    """Our model with the case's weights, in the given dtype, and without PyTorch."""
    model = _unfilled(case, dtype)
    state = nnx.to_flat_state(nnx.state(model, VARIABLES))
    named = {".".join(map(str, path)): variable for path, variable in state}
    values = random_parameters(named, case.table, case.seed)
    flat = [(path, v.replace(jnp.asarray(values[".".join(map(str, path))], dtype))) for path, v in state]
    nnx.update(model, nnx.from_flat_state(flat))
    return model


def compare(
    case: Case, golden: Golden, dtype: str, backend: str = ANY, place: Callable[[Any], Any] = lambda model: model
) -> int:
    """Run ours on the file's inputs and compare with the file's outputs; returns the number of arrays compared.

    Args:
        case: the case.
        golden: its file.
        dtype: of parameters, inputs and the computation.
        backend: for the tolerance.
        place: lays the model out on devices.

    Raises:
        AssertionError: naming the outputs that differ.
    """
    assert json.loads(json.dumps(dict(case.config))) == golden.config, f"{case.name}: made for another configuration"
    assert case.seed == golden.seed
    wanted = jnp.dtype(dtype)
    inputs = {
        name: jnp.asarray(array, wanted if np.issubdtype(array.dtype, np.floating) else None)
        for name, array in golden.inputs.items()
    }
    outputs = case.run(place(randomised(case, wanted)), inputs)
    assert set(outputs) == set(golden.outputs), f"{sorted(outputs)} here, {sorted(golden.outputs)} in the file"
    allowed, problems = tolerance("golden", dtype, backend), []
    for name, parts in golden.outputs.items():
        ours = outputs[name]
        if jnp.issubdtype(ours.dtype, jnp.floating):
            assert ours.dtype == wanted, f"{case.name}, {name}: {ours.dtype} instead of {wanted}"
            ours = np.asarray(ours.astype(jnp.float64 if dtype == "float64" else jnp.float32), np.float64)
        ours = np.asarray(ours)
        if "all" in parts:
            shape, found, expected = parts["all"].shape, ours, parts["all"]
        else:
            shape = tuple(parts["shape"])
            kept = digest(ours) if ours.shape == shape else {"samples": np.empty(0), "moments": np.empty(0)}
            found = np.concatenate([kept["samples"], kept["moments"]])
            expected = np.concatenate([parts["samples"], parts["moments"]])
        if ours.shape != shape:
            problems.append(f"{name}: shape {ours.shape} here, {shape} in the file")
        elif not np.issubdtype(expected.dtype, np.inexact):
            if not np.array_equal(found, expected):
                problems.append(f"{name}: {int(np.sum(found != expected))} of {expected.size} values are not equal")
        else:
            rms = float(parts["moments"][1]) if "moments" in parts else float(np.sqrt(np.mean(expected**2)))
            limit = allowed.atol + allowed.rtol * np.maximum(np.abs(expected), rms)
            apart = np.abs(found - expected)
            if not np.all(apart <= limit):  # NaN is not
                problems.append(f"{name}: max abs {np.max(apart):.3g}, {np.max(apart / limit):.3g} x the tolerance")
    if problems:
        raise AssertionError(f"{case.name} in {dtype} on {backend}:\n" + "\n".join(problems))
    return len(golden.outputs)
