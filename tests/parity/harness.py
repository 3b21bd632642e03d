"""Live parity: a PyTorch original and our model with the same random weights, compared tap by tap.

The conversion table does double duty: it carries the weights over, and it says which module of theirs is which of ours
(two modules correspond when the table takes exactly the parameters below the one to exactly those below the other). So
the outputs of all corresponding submodules are compared in the order in which the original computes them, and the first
that differs is named.

    reference = randomise(WhisperModel(config), seed=0)
    port(reference, model, table)
    taps = compare_taps(reference, lambda: reference(x), model, lambda: model(x), table)
    compare_outputs(taps.ours, taps.reference)
    compare_gradients(reference, lambda: reference(x).loss, model, lambda m: m(x).loss, table)
    assert_detects(lambda: compare_outputs(model(x), reference(x)), perturbations(model, count=3))

Everything is eager; JAX arrays inside a compiled function cannot be tapped and are left out of the comparison.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from tests.random_weights import random_tensor
from tests.tolerances import Tolerance, tolerance
from weights_conversion.rules import Step, Table

VARIABLES = nnx.Any(nnx.Param, nnx.BatchStat)
# Fields in which the original keeps state of its own shape; what depends on them (logits, tokens) is compared instead.
OWN_STATE = ("past_key_values",)
# The field of an output object that stands for it at a tap.
MAIN_FIELDS = ("last_hidden_state", "logits", "encoder_last_hidden_state", "extract_features", "waveform")


# --- precision -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def precision(name: str = "float64", threads: int | None = None) -> Iterator[None]:
    """Both sides in float64 or float32, products exact, PyTorch on `threads` threads (2; 1 beside other workers)."""
    threads = threads or (1 if "PYTEST_XDIST_WORKER" in os.environ else 2)
    dtype, before, before_threads = getattr(torch, name), torch.get_default_dtype(), torch.get_num_threads()
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)
    try:
        with jax.enable_x64(name == "float64"), jax.default_matmul_precision("highest"):
            yield
    finally:
        torch.set_default_dtype(before)
        torch.set_num_threads(before_threads)


# --- weights ---------------------------------------------------------------------------------------------------------


class StateDict:
    """A `state_dict` as the conversion engine's source of tensors. On PyTorch's meta device it has shapes only."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]):
        self.tensors = dict(tensors)

    def names(self) -> list[str]:
        """Every tensor's name."""
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def dtype(self, name: str) -> np.dtype:
        return np.dtype(str(self.tensors[name].dtype).removeprefix("torch."))

    def read(self, name: str) -> np.ndarray:
        tensor = self.tensors[name]
        if tensor.device.type == "meta":
            return np.empty(0, self.dtype(name))
        return tensor.detach().cpu().numpy().copy()


def _named_tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Floating parameters and persistent buffers under the name that counts: the first of those that share storage."""
    state = module.state_dict(keep_vars=True)
    first: dict[int, str] = {}
    for name, tensor in state.items():
        if tensor.is_floating_point():
            first.setdefault(id(tensor), name)
    return {name: state[name] for name in first.values()}


def randomise(module: torch.nn.Module, seed: int = 0, dtype: torch.dtype | None = None) -> torch.nn.Module:
    """Fill every floating parameter and persistent buffer with `random_tensor(name, shape, seed)`; evaluation mode.

    Integer buffers, and what is computed at construction (buffers outside the checkpoint; frequencies of rotary
    positions), keep their values.
    """
    module = module.to(dtype or torch.get_default_dtype()).eval()
    with torch.no_grad():
        for name, tensor in _named_tensors(module).items():
            if not name.endswith("inv_freq"):
                tensor.copy_(torch.from_numpy(random_tensor(name, tuple(tensor.shape), seed)))
    return module


def parameters(model: nnx.Module) -> dict[str, Any]:
    """Our parameters (and running statistics) by dotted path."""
    state = nnx.to_flat_state(nnx.state(model, VARIABLES))
    return {".".join(map(str, path)): variable[...] for path, variable in state}


def assign(model: nnx.Module, values: Mapping[str, Any], dtype: Any = None) -> None:
    """Put values into the model, in place."""
    flat = []
    for path, variable in nnx.to_flat_state(nnx.state(model, VARIABLES)):
        name = ".".join(map(str, path))
        if name in values:
            flat.append((path, variable.replace(jnp.asarray(values[name], dtype or variable[...].dtype))))
    unknown = set(values) - {".".join(map(str, path)) for path, _ in flat}
    assert not unknown, f"the model has no {', '.join(sorted(unknown))}"
    nnx.update(model, nnx.from_flat_state(flat))


def steps_between(module: torch.nn.Module, model: nnx.Module, table: Table) -> list[Step]:
    """The table's plan from the original's state dict to our model, strict both ways."""
    return table.plan(
        StateDict(module.state_dict()), parameters(model), where=type(module).__name__, model=type(model).__name__
    )


def port(module: torch.nn.Module, model: nnx.Module, table: Table, dtype: Any = None) -> nnx.Module:
    """Copy the original's weights into our model through its conversion table, strict both ways.

    Args:
        module: the PyTorch original.
        model: ours; changed in place and returned.
        table: the conversion.
        dtype: of our parameters afterwards; by default that of the original's.
    """
    steps = steps_between(module, model, table)
    dtype = dtype or str(next(module.parameters()).dtype).removeprefix("torch.")
    assign(model, dict(table.read(StateDict(module.state_dict()), steps)), dtype)
    return model


def blank(factory: Callable[[], nnx.Module]) -> Any:
    """Our model in zeros: its weights come from elsewhere, so none is drawn, and no program compiled that draws it."""
    return jax.tree.map(lambda a: jnp.asarray(np.zeros(a.shape, a.dtype)), abstract(factory))


def ported(module: torch.nn.Module, factory: Callable[[], nnx.Module], table: Table, dtype: Any = None) -> Any:
    """Our model with the original's weights; `factory` only says its shapes, no random value is drawn or compiled.

    Args:
        module: the PyTorch original.
        factory: makes ours.
        table: the conversion, strict both ways.
        dtype: of our parameters; by default that of the original's.
    """
    model = abstract(factory)
    state = nnx.to_flat_state(nnx.state(model, VARIABLES))
    expected = {".".join(map(str, path)): variable for path, variable in state}
    source = StateDict(module.state_dict())
    steps = table.plan(source, expected, where=type(module).__name__, model=type(model).__name__)
    dtype = dtype or str(next(module.parameters()).dtype).removeprefix("torch.")
    values = {name: jnp.asarray(array, dtype) for name, array in table.read(source, steps)}
    flat = [(path, variable.replace(values[".".join(map(str, path))])) for path, variable in state]
    nnx.update(model, nnx.from_flat_state(flat))
    return model


# --- comparing two arrays --------------------------------------------------------------------------------------------


def as_numpy(x: Any) -> np.ndarray:
    """A PyTorch or JAX array as a NumPy one; bfloat16 as float32."""
    if isinstance(x, torch.Tensor):
        x = x.detach().cpu()
        return (x.float() if x.dtype == torch.bfloat16 else x).numpy()
    x = np.asarray(x)
    return x.astype(np.float32) if x.dtype.name == "bfloat16" else x


def _rms(x: np.ndarray) -> float:
    """Root mean square of the ordinary values; masks at -inf or the dtype's minimum are not ordinary."""
    size = np.abs(x).astype(np.float64)
    size = size[size < 1e30]  # false for NaN
    return float(np.sqrt(np.mean(size**2))) if size.size else 0.0


@dataclass(frozen=True)
class Difference:
    """How far two arrays are apart; `excess` above 1 means further than the tolerance allows."""

    excess: float
    absolute: float
    relative: float
    note: str = ""

    def __str__(self) -> str:
        if self.note:
            return self.note
        return f"max abs {self.absolute:.3g}, max rel {self.relative:.3g}, {self.excess:.3g} x the tolerance"


def difference(ours: Any, reference: Any, allowed: Tolerance, scale: float | None = None) -> Difference:
    """Compare two arrays; integers and booleans must be equal.

    Args:
        ours: our array.
        reference: the original's.
        allowed: the tolerance.
        scale: stands for rms(reference) where given.
    """
    a, b = as_numpy(ours), as_numpy(reference)
    if a.shape != b.shape:
        return Difference(np.inf, np.inf, np.inf, f"shape {a.shape} here, {b.shape} there")
    if a.size == 0:
        return Difference(0.0, 0.0, 0.0)
    if not np.issubdtype(b.dtype, np.inexact):
        wrong = int(np.sum(a != b))
        return Difference(np.inf if wrong else 0.0, wrong, wrong / b.size, f"{wrong} of {b.size} values are not equal")
    finite = np.isfinite(b)
    if not np.array_equal(np.where(finite, 0, a), np.where(finite, 0, b), equal_nan=True) or not np.all(
        np.isfinite(a[finite])
    ):
        return Difference(np.inf, np.inf, np.inf, "NaN or infinity at different places")
    wide = np.complex128 if np.iscomplexobj(b) else np.float64
    a, b = a[finite].astype(wide), b[finite].astype(wide)
    if b.size == 0:
        return Difference(0.0, 0.0, 0.0)
    apart = np.abs(a - b)
    size = np.maximum(np.abs(b), _rms(b) if scale is None else scale)
    relative = float(np.max(apart / np.maximum(size, 1e-300)))
    excess = float(np.max(apart / np.maximum(allowed.atol + allowed.rtol * size, 1e-300)))
    return Difference(excess, float(np.max(apart)), relative)


def assert_close(ours: Any, reference: Any, *, kind: str = "output", name: str = "value", scale: float | None = None):
    """Fail unless two arrays agree to the table's tolerance for `kind` and our dtype, and ours has the wider dtype.

    A float32 array where the original has float64 is a hidden cast, and fails.
    """
    a, b = as_numpy(ours), as_numpy(reference)
    floating = np.issubdtype(b.dtype, np.inexact)
    if floating and b.dtype.itemsize > a.dtype.itemsize:
        raise AssertionError(f"{name}: {a.dtype} here, {b.dtype} there: something casts")
    dtype = np.result_type(b.real.dtype if floating else np.float64).name
    if floating and str(getattr(ours, "dtype", "")) == "bfloat16":
        dtype = "bfloat16"
    found = difference(ours, reference, tolerance(kind, dtype), scale)
    if found.excess > 1:
        raise AssertionError(f"{name}: {found}")


# --- outputs ---------------------------------------------------------------------------------------------------------


def _fields(output: Any) -> dict[str, Any]:
    if isinstance(output, Mapping) or hasattr(output, "keys"):
        return {name: output[name] for name in output.keys() if output[name] is not None}  # noqa: SIM118
    raise TypeError(f"an output with named fields is wanted, not {type(output).__name__}")


def _is_array(x: Any) -> bool:
    return isinstance(x, torch.Tensor | jax.Array | np.ndarray)


def compare_outputs(
    ours: Any, reference: Any, *, kind: str = "output", name: str = "output", skip: Mapping[str, str] | None = None
) -> list[str]:
    """Every field that the original returns, by name, all layers of it; returns the names of what was compared.

    Args:
        ours: our output: named fields, a tuple, or an array.
        reference: the original's.
        kind: of the tolerance.
        name: for the message.
        skip: fields left out on purpose, each with the reason.

    Raises:
        AssertionError: if a field is missing here or differs; all that differ are listed.
    """
    compared: list[str] = []
    problems: list[str] = []

    def visit(a: Any, b: Any, path: str) -> None:
        if b is None:
            return
        if a is None:
            problems.append(f"{path}: the original returns it, we do not")
        elif _is_array(b) or np.isscalar(b):
            try:
                assert_close(a, b, kind=kind, name=path)
            except AssertionError as error:
                problems.append(str(error))
            compared.append(path)
        elif isinstance(b, tuple | list):
            if not isinstance(a, tuple | list) or len(a) != len(b):
                problems.append(f"{path}: {len(b)} parts there, {len(a) if hasattr(a, '__len__') else 'none'} here")
                return
            for index, (one, other) in enumerate(zip(a, b, strict=True)):
                visit(one, other, f"{path}[{index}]")
        else:
            mine = _fields(a)
            for field_name, value in _fields(b).items():
                if field_name in OWN_STATE or (skip and field_name in skip):
                    continue
                visit(mine.get(field_name), value, f"{path}.{field_name}")

    visit(ours, reference, name)
    if problems:
        raise AssertionError("\n".join(problems))
    assert compared, f"{name}: the original returned nothing to compare"
    return compared


# --- taps ------------------------------------------------------------------------------------------------------------


def main_array(output: Any) -> Any:
    """The array that stands for a module's output: the output itself, its main field, or its first array."""
    if _is_array(output):
        return output
    if isinstance(output, tuple | list):
        return next((found for part in output if (found := main_array(part)) is not None), None)
    if isinstance(output, Mapping) or hasattr(output, "keys"):
        fields = _fields(output)
        names = [n for n in MAIN_FIELDS if n in fields] or list(fields)
        return next((found for n in names if (found := main_array(fields[n])) is not None), None)
    return None


@contextlib.contextmanager
def reference_taps(module: torch.nn.Module) -> Iterator[list[tuple[str, np.ndarray]]]:
    """Collect `(name, output)` of every submodule's every call, in order of completion."""
    taps: list[tuple[str, np.ndarray]] = []
    handles = []

    def hook(name: str, _module: Any, _inputs: Any, output: Any) -> None:
        if (array := main_array(output)) is not None:
            taps.append((name, as_numpy(array).copy()))

    for name, submodule in module.named_modules():
        handles.append(submodule.register_forward_hook(functools.partial(hook, name)))
    try:
        yield taps
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def our_taps(
    model: nnx.Module, methods: Sequence[str] = ("__call__",), marker: jax.Array | None = None
) -> Iterator[list[tuple[str, Any]]]:
    """Collect `(path, output)` of every submodule's every call, in order of completion, by wrapping their classes.

    Args:
        model: ours.
        methods: the methods that count as a call.
        marker: an argument of the function that is being compiled around this; then what is computed at its level is
            collected as it is, traced.
    """
    taps: list[tuple[str, Any]] = []
    paths = {id(module): ".".join(map(str, path)) for path, module in nnx.iter_modules(model)}
    modules = [module for _, module in nnx.iter_modules(model)]  # alive as long as their ids count
    active: list[tuple[int, str]] = []
    patched: list[tuple[type, str, Any]] = []

    def wrap(original: Callable[..., Any], method: str) -> Callable[..., Any]:
        @functools.wraps(original)
        def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
            outer = (id(self), method) in active  # a subclass that calls super().__call__ is one call
            active.append((id(self), method))
            try:
                output = original(self, *args, **kwargs)
            finally:
                active.pop()
            array = main_array(output)
            if outer or id(self) not in paths or array is None:
                return output
            if not isinstance(array, jax.core.Tracer):
                taps.append((paths[id(self)], as_numpy(array)))
            elif marker is not None and array._trace is marker._trace:  # type: ignore[attr-defined]
                taps.append((paths[id(self)], array))
            return output

        return wrapper

    for method in methods:
        owners = {next((c for c in type(m).__mro__ if method in vars(c)), None) for m in modules}
        for owner in owners | {c for o in owners if o for c in o.__mro__ if method in vars(c)}:
            if owner is None or not issubclass(owner, nnx.Module) or owner is nnx.Module:
                continue
            patched.append((owner, method, vars(owner)[method]))
    try:
        for owner, method, original in patched:
            setattr(owner, method, wrap(original, method))
        yield taps
    finally:
        for owner, method, original in patched:
            setattr(owner, method, original)


def our_compiled_taps(
    model: nnx.Module, call: Callable[[], Any], methods: Sequence[str] = ("__call__",)
) -> tuple[Any, list[tuple[str, np.ndarray]]]:
    """What `call` returns and the taps of it, compiled as one program instead of one for each operation and shape.

    What is computed inside a loop or another compiled function is not among the taps.
    """
    paths: list[str] = []

    def run(marker: jax.Array) -> tuple[Any, list[jax.Array]]:
        with our_taps(model, methods, marker) as taps:
            output = call()
        paths[:] = [path for path, _ in taps]
        return output, [array for _, array in taps]

    output, arrays = jax.jit(run)(jnp.zeros(()))
    return output, [(path, as_numpy(array)) for path, array in zip(paths, arrays, strict=True)]


def _below(prefix: str, names: Iterable[str]) -> frozenset[str]:
    return frozenset(names) if not prefix else frozenset(n for n in names if n.startswith(prefix + "."))


@dataclass(frozen=True)
class Group:
    """Modules of theirs and ours that hold the same parameters, outermost first."""

    reference: tuple[str, ...]
    ours: tuple[str, ...]


def corresponding(
    steps: Sequence[Step], reference_names: Iterable[str], our_paths: Iterable[str], aliases: Mapping[str, str] = {}
) -> list[Group]:
    """Which of the original's modules are which of ours, through the parameters below them.

    Args:
        steps: the conversion's plan.
        reference_names: the original's module names (those that were called).
        our_paths: our module paths (those that were called).
        aliases: other names of the foreign tensors (a tied head's weight -> the name that the plan reads).
    """
    all_foreign = [name for step in steps for name in step.foreign]
    all_ours = [path for step in steps for path in step.ours]
    to_ours = {name: step for step in steps for name in step.foreign}

    def key_of_reference(prefix: str) -> frozenset[str] | None:
        names = _below(prefix, [*all_foreign, *aliases])
        names = frozenset(aliases.get(n, n) for n in names)
        found = [to_ours[n] for n in names]
        if not names or not all(names.issuperset(step.foreign) for step in found):
            return None
        return frozenset(path for step in found for path in step.ours)

    theirs: dict[frozenset[str], list[str]] = defaultdict(list)
    for name in sorted(set(reference_names), key=lambda n: (n.count(".") if n else -1, n)):
        if key := key_of_reference(name):
            theirs[key].append(name)
    mine: dict[frozenset[str], list[str]] = defaultdict(list)
    for path in sorted(set(our_paths), key=lambda n: (n.count(".") if n else -1, n)):
        if key := _below(path, all_ours):
            mine[key].append(path)
    return [Group(tuple(names), tuple(mine.get(key, ()))) for key, names in theirs.items()]


def layouts(ours: np.ndarray, reference: np.ndarray) -> Iterator[np.ndarray]:
    """The original's array in every layout that has our shape: as it is, channels last, time first, heads merged."""
    seen = []
    b = reference
    candidates = [b]
    if b.ndim >= 3:
        candidates += [np.moveaxis(b, 1, -1), np.swapaxes(b, 0, 1), np.moveaxis(b, -1, 1), np.moveaxis(b, 0, -2)]
    if b.ndim == 2:
        candidates += [b.T]
    if b.ndim == 4:
        swapped = np.swapaxes(b, 1, 2)
        candidates += [swapped, b.reshape(*b.shape[:2], -1), swapped.reshape(*swapped.shape[:2], -1)]
    candidates += [b.reshape(ours.shape)] if b.size == ours.size else []
    for candidate in candidates:
        if candidate.shape == ours.shape and not any(np.array_equal(candidate, s, equal_nan=True) for s in seen):
            seen.append(candidate)
            yield candidate


@dataclass
class Taps:
    """What `compare_taps` found."""

    reference: Any
    ours: Any
    compared: list[str] = field(default_factory=list)  # "theirs ~ ours", in the original's order
    unmapped: list[str] = field(default_factory=list)  # called there, holding parameters, with no counterpart here

    def __str__(self) -> str:
        lines = [f"{len(self.compared)} taps compared"] + [f"  {name}" for name in self.compared]
        if self.unmapped:
            lines += [f"{len(self.unmapped)} modules of the original without a counterpart: {', '.join(self.unmapped)}"]
        return "\n".join(lines)


def _matches(ours: np.ndarray, reference: np.ndarray, allowed: Tolerance) -> Difference:
    """The smallest difference over the layouts."""
    found = [difference(ours, candidate, allowed) for candidate in layouts(ours, reference)]
    if not found:
        return Difference(np.inf, np.inf, np.inf, f"shape {ours.shape} here, {reference.shape} there")
    return min(found, key=lambda d: d.excess)


def compare_taps(
    reference: torch.nn.Module,
    call_reference: Callable[[], Any],
    model: nnx.Module,
    call_ours: Callable[[], Any],
    table: Table,
    *,
    minimum: int = 1,
    skip: Mapping[str, str] | None = None,
    loose: Mapping[str, str] | None = None,
    methods: Sequence[str] = ("__call__",),
    compiled: bool = False,
) -> Taps:
    """Run both models and compare the outputs of all corresponding submodules, in the original's order.

    Every module of the original that owns parameters, has a counterpart here and was called must be called here too.

    Args:
        reference: the original, already `randomise`d.
        call_reference: runs it.
        model: ours, already `port`ed.
        call_ours: runs ours.
        table: the conversion.
        minimum: fail if fewer taps than this are compared.
        skip: regular expressions of the original's module names left out on purpose, each with the reason.
        loose: regular expressions of the original's module names, each with the kind in the tolerance table to use.
        methods: our modules' methods that count as a call.
        compiled: compile our call as a whole; quicker, where nothing in it must be concrete.

    Returns:
        Both outputs and what was compared.

    Raises:
        AssertionError: naming the first tap that diverges.
    """
    skip, loose = dict(skip or {}), dict(loose or {})
    with torch.no_grad(), reference_taps(reference) as theirs:
        reference_output = call_reference()
    if compiled:
        our_output, mine = our_compiled_taps(model, call_ours, methods)
    else:
        with our_taps(model, methods) as mine:
            our_output = call_ours()
    result = Taps(reference_output, our_output)
    by_path: dict[str, list[np.ndarray]] = defaultdict(list)
    for path, array in mine:
        by_path[path].append(array)
    by_name: dict[str, list[np.ndarray]] = defaultdict(list)
    for name, array in theirs:
        by_name[name].append(array)
    last_call = {name: index for index, (name, _) in enumerate(theirs)}

    steps = steps_between(reference, model, table)
    state = reference.state_dict(keep_vars=True)
    read = {name for step in steps for name in step.foreign}
    shared: dict[int, str] = {id(state[name]): name for name in read}
    aliases = {n: shared[id(t)] for n, t in state.items() if n not in read and id(t) in shared}
    groups = corresponding(steps, by_name, by_path, aliases)
    owners = {name.rpartition(".")[0] for name in state}

    for group in sorted(groups, key=lambda g: min(last_call[n] for n in g.reference)):
        names = [n for n in group.reference if not any(re.fullmatch(p, n) for p in skip)]
        if not names:
            continue
        if not group.ours:
            result.unmapped += [n for n in names if n in owners]
            continue
        pairs = zip(names, group.ours, strict=True) if len(names) == len(group.ours) else ()
        preferred = {path: name for name, path in pairs}
        for path in reversed(group.ours):
            kind = next((k for p, k in loose.items() if any(re.fullmatch(p, n) for n in names)), "tap")
            order = sorted(names, key=lambda n: n != preferred.get(path))
            best: tuple[Difference, str] | None = None
            for name in order:
                found = _compare_calls(by_path[path], by_name[name], kind)
                if best is None or found.excess < best[0].excess:
                    best = (found, name)
                if found.excess <= 1:
                    break
            assert best is not None
            if best[0].excess > 1:
                raise AssertionError(
                    f"the first tap that diverges is {preferred.get(path, best[1])} (here {path or 'the model'}): "
                    f"{best[0]}\nbefore it, {result}"
                )
            result.compared.append(f"{best[1] or 'the model'} ~ {path or 'the model'}")
    missed = [n for n in result.unmapped if _has_counterpart(n, steps, model, aliases)]
    if missed:
        raise AssertionError(f"called there, never called here: {', '.join(missed)}\n{result}")
    if len(result.compared) < minimum:
        raise AssertionError(f"only {len(result.compared)} taps were compared, {minimum} wanted\n{result}")
    return result


def _compare_calls(ours: Sequence[np.ndarray], reference: Sequence[np.ndarray], kind: str) -> Difference:
    """All calls of one module, in order."""
    if len(ours) != len(reference):
        return Difference(np.inf, np.inf, np.inf, f"called {len(ours)} times here, {len(reference)} times there")
    worst = Difference(0.0, 0.0, 0.0)
    for a, b in zip(ours, reference, strict=True):
        if np.issubdtype(b.dtype, np.inexact) and a.dtype.itemsize < b.dtype.itemsize:
            return Difference(np.inf, np.inf, np.inf, f"{a.dtype} here, {b.dtype} there: something casts")
        found = _matches(a, b, tolerance(kind, np.dtype(b.real.dtype).name))
        worst = max(worst, found, key=lambda d: d.excess)
    return worst


def _has_counterpart(name: str, steps: Sequence[Step], model: nnx.Module, aliases: Mapping[str, str]) -> bool:
    paths = [".".join(map(str, path)) for path, _ in nnx.iter_modules(model)]
    return any(group.ours for group in corresponding(steps, [name], paths, aliases))


# --- gradients -------------------------------------------------------------------------------------------------------


def our_gradients(model: nnx.Module, loss: Callable[[nnx.Module], jax.Array]) -> tuple[jax.Array, dict[str, Any]]:
    """The loss and its gradient with respect to every parameter, by dotted path."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    value, gradient = jax.value_and_grad(lambda p: loss(nnx.merge(graphdef, p, rest)))(params)
    return value, {".".join(map(str, path)): variable[...] for path, variable in nnx.to_flat_state(gradient)}


def compare_gradients(
    reference: torch.nn.Module,
    reference_loss: Callable[[], torch.Tensor],
    model: nnx.Module,
    our_loss: Callable[[nnx.Module], jax.Array],
    table: Table,
    *,
    skip: Mapping[str, str] | None = None,
) -> list[str]:
    """The loss and its gradient with respect to *every* parameter, through the conversion table.

    The table's operations are linear, so they carry gradients as they carry weights. A parameter that PyTorch gives no
    gradient must have a gradient of zero here.

    Args:
        reference: the original.
        reference_loss: its loss, with the graph behind it.
        model: ours.
        our_loss: the same loss of a model like ours.
        table: the conversion.
        skip: regular expressions of our paths left out on purpose, each with the reason.

    Returns:
        Our paths, all compared.
    """
    reference.zero_grad(set_to_none=True)
    loss = reference_loss()
    loss.backward()
    value, ours = our_gradients(model, our_loss)
    assert_close(value, loss, kind="gradient", name="loss")
    trainable = dict(reference.named_parameters(remove_duplicate=False))
    sizes = [_rms(as_numpy(p.grad)) for p in trainable.values() if p.grad is not None]
    assert sizes, "the original's loss reaches no parameter"
    floor = 1e-3 * max(sizes)  # a gradient that is zero up to rounding is compared at the size of the others
    problems, compared = [], []
    for step in steps_between(reference, model, table):
        if not all(name in trainable for name in step.foreign):
            continue  # a buffer
        gradients = [trainable[name].grad for name in step.foreign]
        known = tuple(
            np.zeros(tuple(trainable[n].shape)) if g is None else as_numpy(g)
            for n, g in zip(step.foreign, gradients, strict=True)
        )
        for path, wanted in zip(step.ours, step.operation.forward(known), strict=True):
            if path not in ours or any(re.fullmatch(p, path) for p in skip or {}):
                continue
            try:
                scale = max(_rms(wanted), floor)
                if all(g is None for g in gradients):
                    assert not np.any(ours[path]), f"{path}: PyTorch has no gradient here, ours is not zero"
                else:
                    assert_close(ours[path], wanted, kind="gradient", name=path, scale=scale)
            except AssertionError as error:
                problems.append(str(error))
            compared.append(path)
    uncovered = [p for p in ours if p not in compared and not any(re.fullmatch(q, p) for q in skip or {})]
    problems += [f"{path}: no gradient of the original corresponds" for path in uncovered]
    if problems:
        raise AssertionError(f"{len(problems)} of {len(ours)} gradients differ\n" + "\n".join(problems[:40]))
    return compared


# --- mutation --------------------------------------------------------------------------------------------------------

Mutation = contextlib.AbstractContextManager


@dataclass
class Changed(contextlib.AbstractContextManager):
    """Our model with one value of one parameter changed, for the length of a `with`."""

    model: nnx.Module
    path: str
    change: Callable[[np.ndarray], np.ndarray]
    what: str

    def __enter__(self) -> Changed:
        self.before = parameters(self.model)[self.path]
        assign(self.model, {self.path: self.change(np.array(self.before))})
        return self

    def __exit__(self, *_: object) -> None:
        assign(self.model, {self.path: self.before})

    def __str__(self) -> str:
        return f"{self.what} {self.path}"


def perturbations(
    model: nnx.Module, count: int = 3, seed: int = 0, amount: float = 1e-3, exclude: str | None = None
) -> list[Mutation]:
    """`count` mutations, each adding `amount` to one value of a parameter drawn at random.

    Args:
        model: ours.
        count: how many.
        seed: of the draw.
        amount: what is added.
        exclude: regular expression of the parameters that have no influence on what is checked.
    """
    paths = [p for p in sorted(parameters(model)) if not (exclude and re.fullmatch(exclude, p))]
    chosen = np.random.default_rng(seed).choice(len(paths), min(count, len(paths)), replace=False)

    def change(path: str) -> Callable[[np.ndarray], np.ndarray]:
        def add(array: np.ndarray) -> np.ndarray:
            array.flat[zlib.crc32(path.encode()) % array.size] += amount
            return array

        return add

    return [Changed(model, paths[i], change(paths[i]), "one value changed in") for i in chosen]


def dropped(model: nnx.Module, path: str) -> Mutation:
    """The mutation that zeroes one parameter: a forgotten bias."""
    return Changed(model, path, np.zeros_like, "zeroed")


@dataclass
class Replaced(contextlib.AbstractContextManager):
    """An attribute of an object (or an entry of a dict) replaced, for the length of a `with`: a GELU flipped."""

    target: Any
    name: str
    value: Any

    def __enter__(self) -> Replaced:
        if isinstance(self.target, dict):
            self.before = self.target[self.name]
            self.target[self.name] = self.value
        else:
            self.before = getattr(self.target, self.name)
            setattr(self.target, self.name, self.value)
        return self

    def __exit__(self, *_: object) -> None:
        if isinstance(self.target, dict):
            self.target[self.name] = self.before
        else:
            setattr(self.target, self.name, self.before)

    def __str__(self) -> str:
        return f"replaced {self.name}"


def assert_detects(check: Callable[[], Any], mutations: Iterable[Mutation]) -> int:
    """`check` passes as things are, fails under every mutation and passes again; returns how many it caught.

    A check that compiles must do so anew on each call, or it will not see a replaced function.
    """
    check()
    caught = 0
    for mutation in mutations:
        with mutation:
            try:
                check()
            except AssertionError:
                caught += 1
                continue
        raise AssertionError(f"the check does not notice: {mutation}")
    assert caught, "no mutation was tried"
    check()
    return caught


# --- dropout ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def bent_dropouts() -> Iterator[None]:
    r"""Every dropout in training is the curve $x + p \sin x$, on both sides; $p$ is its rate.

    It draws nothing, and is the same wherever arrays are laid out otherwise. A dropout that is missing, that stands
    elsewhere or has the rate of another gives other numbers.
    """
    from audiozoo.layers import basic

    def theirs(x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
        return x + p * torch.sin(x) if training else x

    def ours(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
        return x if key is None else x + rate * jnp.sin(x)

    with Replaced(torch.nn.functional, "dropout", theirs), Replaced(basic, "dropout", ours):
        yield


def rates(config: Any, **changes: float) -> dict[str, float]:
    """A rate of its own for every dropout of an original's configuration, and nothing else that training draws."""
    names = [name for name in config.to_dict() if "drop" in name or re.fullmatch("mask_.*_prob", name)]
    dropouts = [name for name in names if "dropout" in name and "layerdrop" not in name]
    return dict.fromkeys(names, 0.0) | {name: 0.1 + 0.07 * i for i, name in enumerate(dropouts)} | changes


def compare_in_training(reference: torch.nn.Module, model: nnx.Module, inputs: Mapping[str, Any], **ours: Any) -> None:
    """Every output in training, with `bent_dropouts`; `inputs` are arrays or constants, `ours` are for our model."""
    arrays = {name: value for name, value in inputs.items() if isinstance(value, np.ndarray)}
    constants = {name: value for name, value in inputs.items() if name not in arrays}
    with bent_dropouts(), torch.no_grad():
        reference.train()
        theirs = reference(**{name: torch.tensor(array) for name, array in arrays.items()}, **constants)
        reference.eval()
        run = jax.jit(lambda m, x, key: m(**x, **constants, **ours, key=key))
        found = run(model, jax.tree.map(jnp.asarray, arrays), jax.random.key(0))
    compare_outputs(found, theirs)


# --- published sizes, at no memory -----------------------------------------------------------------------------------


def abstract(factory: Callable[[], nnx.Module]) -> nnx.Module:
    """`nnx.eval_shape(factory)` with one constant random key: counting keys in a trace is quadratic in flax 0.12.8."""
    key = jax.random.key(0)
    with Replaced(nnx.RngStream, "__call__", lambda _: key):
        return nnx.eval_shape(factory)


def assert_same_shapes(
    reference_factory: Callable[[], torch.nn.Module],
    our_factory: Callable[[], nnx.Module],
    table: Table,
) -> int:
    """Names, shapes and parameter counts of a published size, on PyTorch's meta device against `nnx.eval_shape`.

    Returns:
        The number of parameters, the same on both sides; tied ones count once, ignored ones not at all.
    """
    with torch.device("meta"):
        reference = reference_factory()
    model = abstract(our_factory)
    state = nnx.to_flat_state(nnx.state(model, VARIABLES))
    expected = {".".join(map(str, path)): variable for path, variable in state}
    source = StateDict(reference.state_dict())
    steps = table.plan(source, expected, where=type(reference).__name__, model=type(model).__name__)
    theirs = sum(int(np.prod(source.shape(name))) for step in steps for name in step.foreign)
    ours = sum(int(np.prod(variable.shape)) for variable in expected.values())
    assert theirs == ours, f"{theirs} parameters there, {ours} here"
    floating = {n: t for n, t in reference.state_dict(keep_vars=True).items() if t.is_floating_point()}
    left_out = {n for n in floating if any(re.fullmatch(i.pattern, n) for i in table.ignored)}
    counted = {id(t): t.numel() for t in floating.values()}
    kept = {id(t) for n, t in floating.items() if n not in left_out}
    ignored = sum({id(t): t.numel() for n, t in floating.items() if n in left_out and id(t) not in kept}.values())
    assert ours == sum(counted.values()) - ignored, f"{sum(counted.values())} values there, {ours} here"
    return ours
