r"""Sharding as data: ordered rules from parameter names to `PartitionSpec`s. No model file holds a word of it.

A rule is a regular expression, searched in the dotted path of a parameter, and the `PartitionSpec` for what it matches;
the first match wins. What no rule takes is replicated, or laid out by `fsdp`, the fallback. The compiler (GSPMD)
derives the rest from the parameters and the batch, on a mesh of `Auto` axes:

    mesh = make_mesh({"data": 4, "tensor": 2})
    model = shard(model, mesh, TRANSFORMER)                           # a model that is in memory
    model = audiozoo.load(source, mesh=mesh, rules=DEFAULT_RULES)     # straight from disk into shards
    batch = jax.device_put(batch, batch_sharding(mesh))
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from audiozoo.errors import UsageError


@dataclass(frozen=True)
class Rule:
    """What a regular expression matches is laid out by `spec`.

    Attributes:
        pattern: searched (not anchored) in the dotted path, `encoder.layers.0.fc1.kernel`.
        spec: one entry per axis of the parameter, None for an axis that is not divided. Missing entries count as None.
        required: whether it is an error if the pattern matches no parameter, or if the mesh lacks an axis of the spec.
            True for rules that a user writes; rules for a whole family of models are not.
    """

    pattern: str
    spec: P
    required: bool = True


@dataclass(frozen=True)
class Fsdp:
    """The fallback that `fsdp` makes."""

    min_size: int
    axis: str | None
    combine: bool = False
    whole: str | None = None


def fsdp(min_size: int = 1 << 16, axis: str | None = None, combine: bool = False, whole: str | None = None) -> Fsdp:
    """Fully sharded data parallelism for what no rule has divided: the longer of its last two axes that divides.

    Args:
        min_size: parameters with fewer elements stay replicated; gathering them costs more than it saves.
        axis: the mesh axis to split over; by default `fsdp` if the mesh has it, else `data`. If the mesh does not have
            it, parameters are replicated.
        combine: also split what a rule has divided already, along another of its axes.
        whole: a regular expression that finds the parameters that stay replicated whatever their size.
    """
    return Fsdp(min_size, axis, combine, whole)


# Tensor parallelism after Megatron-LM (Shoeybi et al. 2019, §3): the projections that open a block (q, k, v, fc1) split
# their outputs, those that close it (out_proj, fc2) split their inputs, so that a block needs one all-reduce. Kernels
# are (inputs, outputs), embeddings (vocabulary, features). Each family has names of its own for a feed-forward's two;
# T5's projections have shorter names, and no biases.
_OPENS = r"q_proj|k_proj|v_proj|fc1|intermediate_dense|intermediate|in_proj"
_CLOSES = r"out_proj|o_proj|fc2|output_dense|output"
TRANSFORMER: tuple[Rule, ...] = (
    Rule(rf"(^|[._])({_OPENS}|attention\.[qkv]|wi(_[01])?)\.kernel$", P(None, "tensor"), required=False),
    Rule(rf"(^|\.)({_OPENS})\.bias$", P("tensor"), required=False),
    Rule(rf"(^|[._])({_CLOSES}|attention\.o|wo)\.kernel$", P("tensor", None), required=False),
    Rule(r"(^|\.)(?!\w*position)\w+\.embedding$", P("tensor", None), required=False),
)

DEFAULT_RULES: tuple[Rule | Fsdp, ...] = (*TRANSFORMER, fsdp())

# For training, on a mesh with any of the axes `data`, `fsdp` and `tensor`: parameters and the optimiser's moments lie
# divided over `fsdp` and `tensor`, and in copies over `data`. The kernels of depthwise convolutions are small, and stay
# whole: with them the compiler would divide the channels, for which it gathers the whole batch on every device.
TRAINING_RULES: tuple[Rule | Fsdp, ...] = (
    *TRANSFORMER,
    fsdp(1 << 12, "fsdp", combine=True, whole=r"(^|\.)depthwise_conv\.kernel$"),
)

Rules = Sequence["Rule | Fsdp | tuple[str, P]"]


def make_mesh(axes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of `Auto` axes, in which the compiler chooses the sharding of every intermediate result.

    `jax.make_mesh` by itself makes `Explicit` axes, for which each ambiguous product needs an annotation in the model.

    Args:
        axes: names and sizes, `{"data": 4, "tensor": 2}`; one size may be -1, for all devices that are left.
        devices: all devices by default.

    Raises:
        UsageError: the sizes do not multiply to the number of devices.
    """
    count = len(jax.devices() if devices is None else devices)
    sizes = dict(axes)
    free = [name for name, size in sizes.items() if size == -1]
    if not sizes or len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise UsageError(f"The axes of a mesh need sizes of at least 1, one of them -1 at most, not {sizes}.")
    if free:
        sizes[free[0]] = max(count // math.prod(size for size in sizes.values() if size > 0), 1)
    if math.prod(sizes.values()) != count:
        raise UsageError(f"A mesh {sizes} needs {math.prod(sizes.values())} devices, and there are {count}.")
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), (AxisType.Auto,) * len(sizes), devices=devices)


def parse_mesh(text: str, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh from `data=4,fsdp=2,tensor=1`; one size may be -1.

    Raises:
        UsageError: if it cannot be read, or does not fit the devices.
    """
    axes: dict[str, int] = {}
    for part in filter(None, text.split(",")):
        name, _, size = part.partition("=")
        if name.strip() not in ("data", "fsdp", "tensor") or not re.fullmatch(r"-1|\d+", size.strip()):
            raise UsageError(f"The mesh {text!r} is not understood; write data=4,fsdp=2,tensor=1, or some of these.")
        axes[name.strip()] = int(size)
    return make_mesh(axes, devices)


def batch_sharding(mesh: Mesh, axis: str | Sequence[str] = "data") -> NamedSharding:
    """The sharding of a batch: its first axis over `axis`, or over several, as far as the mesh has them."""
    axes = tuple(name for name in ((axis,) if isinstance(axis, str) else axis) if name in mesh.shape)
    return NamedSharding(mesh, P(axes[0] if len(axes) == 1 else axes) if axes else P())


def shards(place: NamedSharding) -> int:
    """Into how many parts a sharding divides an array's first axis."""
    names = _names(place.spec[0]) if len(place.spec) else ()
    return math.prod(place.mesh.shape[name] for name in names)


def put(array: Any, place: NamedSharding) -> jax.Array:
    """An array that every host holds whole, or that lies on the mesh, laid out on a mesh that may span hosts."""
    if place.is_fully_addressable or (isinstance(array, jax.Array) and not array.is_fully_addressable):
        return jax.device_put(array, place)
    whole = np.asarray(array)
    return jax.make_array_from_callback(whole.shape, place, lambda index: whole[index])


def shardings_for(params: Any, mesh: Mesh, rules: Rules = DEFAULT_RULES) -> dict[str, Any]:
    """The sharding of every parameter.

    An axis that does not divide evenly is not an error: the division moves on to the next axis of the parameter that
    divides, and if none does the parameter is replicated over that mesh axis. Stacked layers lie as one alone would.

    Args:
        params: arrays or `ShapeDtypeStruct`s (`nnx.eval_shape`), as nested dictionaries, by dotted path, or a module.
        mesh: the devices.
        rules: `Rule`s or `(pattern, PartitionSpec)` pairs, first match wins, and at most one `fsdp(...)`.

    Returns:
        `NamedSharding`s, in nested dictionaries or by dotted path like `params`.

    Raises:
        UsageError: a required rule matches nothing, names an axis that the mesh lacks, or has more entries than the
            parameter has axes.
    """
    checked, fallback = _checked(rules, mesh)
    axis = (fallback and fallback.axis) or ("fsdp" if "fsdp" in mesh.shape else "data")
    matched: set[Rule] = set()
    if isinstance(params, nnx.Module):
        params = nnx.state(params, nnx.Not(nnx.RngState))
    if isinstance(params, nnx.State):
        params = nnx.to_pure_dict(params)

    def place(path: str, node: Any) -> Any:
        if isinstance(node, Mapping):
            return {key: place(f"{path}.{key}" if path else str(key), child) for key, child in node.items()}
        stacked = ".stacked." in path  # of `layers.stacking`: a first axis of layers, each laid out as one alone is
        shape = tuple(node.shape)[stacked:]
        rule = next((rule for rule in checked if re.search(rule.pattern, path)), None)
        entries: list[tuple[str, ...]] = [()] * len(shape)
        if rule is not None:
            matched.add(rule)
            entries = _divide(path, shape, rule, mesh)
        divided = any(entries) and not (fallback and fallback.combine)
        divided = divided or bool(fallback and fallback.whole and re.search(fallback.whole, path))
        if fallback and not divided and axis in mesh.shape and math.prod(shape) >= fallback.min_size:
            for i in sorted(_divisible(shape), key=lambda i: -shape[i]):
                if not entries[i] and shape[i] % mesh.shape[axis] == 0:
                    entries[i] = (axis,)
                    break
        return NamedSharding(mesh, _spec([()] * stacked + entries))

    placed = place("", params)
    unused = [rule.pattern for rule in checked if rule.required and rule not in matched]
    if unused:
        raise UsageError(
            f"The sharding rule {unused[0]!r} matches no parameter that an earlier rule has not taken"
            + (f", and so do {len(unused) - 1} more." if len(unused) > 1 else ".")
        )
    return placed


def shard(model: nnx.Module, mesh: Mesh, rules: Rules = DEFAULT_RULES) -> nnx.Module:
    """The same model with its parameters laid out on a mesh; `model` itself is left as it is."""
    graphdef, state = nnx.split(model)
    flat = nnx.to_flat_state(state)
    names = {path: ".".join(map(str, path)) for path, leaf in flat if not isinstance(leaf, nnx.RngState)}
    places = shardings_for({names[path]: leaf for path, leaf in flat if path in names}, mesh, rules)
    moved = [
        (path, leaf.replace(put(leaf[...], places[names[path]])) if path in names else leaf) for path, leaf in flat
    ]
    return nnx.merge(graphdef, nnx.from_flat_state(moved))


def _checked(rules: Iterable[Any], mesh: Mesh) -> tuple[list[Rule], Fsdp | None]:
    checked: list[Rule] = []
    fallback = None
    for rule in rules:
        if isinstance(rule, Fsdp):
            if fallback is not None:
                raise UsageError("There can be only one fsdp fallback among sharding rules.")
            fallback = rule
            continue
        rule = rule if isinstance(rule, Rule) else Rule(rule[0], rule[1])
        try:
            re.compile(rule.pattern)
        except re.error as error:
            raise UsageError(f"The sharding rule {rule.pattern!r} is not a regular expression: {error}.") from None
        names = [name for entry in rule.spec for name in _names(entry)]
        absent = [name for name in names if name not in mesh.shape]
        if absent and rule.required:
            axes = ", ".join(mesh.shape)
            raise UsageError(f"The sharding rule {rule.pattern!r} names the axis {absent[0]!r}; the mesh has {axes}.")
        checked.append(rule)
    return checked, fallback


def _names(entry: Any) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def _divide(path: str, shape: tuple[int, ...], rule: Rule, mesh: Mesh) -> list[tuple[str, ...]]:
    """The mesh axes that divide each axis of a parameter: those of the rule, moved on where a size does not divide."""
    if len(rule.spec) > len(shape):
        raise UsageError(
            f"The sharding rule {rule.pattern!r} has {len(rule.spec)} entries, and {path} has the shape {shape}."
        )
    entries: list[tuple[str, ...]] = [()] * len(shape)
    postponed: list[str] = []
    for i, entry in enumerate(rule.spec):
        for name in _names(entry):
            if name not in mesh.shape:
                continue
            if shape[i] % math.prod(mesh.shape[n] for n in (*entries[i], name)) == 0:
                entries[i] = (*entries[i], name)
            else:
                postponed.append(name)
    for name in postponed:
        for j in _divisible(shape):
            if not entries[j] and shape[j] % mesh.shape[name] == 0:
                entries[j] = (name,)
                break
    return entries


def _divisible(shape: tuple[int, ...]) -> range:
    """The last two axes, inputs and outputs. Before them stand layers, or the taps of a convolution.

    With its taps on several devices, XLA computes some strided convolutions wrongly, without a word.
    """
    return range(max(0, len(shape) - 2), len(shape))


def _spec(entries: list[tuple[str, ...]]) -> P:
    plain: list[Any] = [None if not entry else entry[0] if len(entry) == 1 else entry for entry in entries]
    return P(*plain)
