r"""Parameters by name: taking a network apart and putting it together, and which of its parameters are trained.

`Trainable` says which: all, those whose name a regular expression finds, or the small factors of LoRA
(arXiv 2106.09685), which replaces a frozen matrix $W_0$ by $W_0 + \frac{\alpha}{r} A B$ with $A$ of $r$ columns.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from audiozoo import sharding
from audiozoo.errors import UsageError

Arrays = dict[str, jax.Array]
_A, _B = ".lora_a", ".lora_b"


@dataclass(frozen=True)
class Skeleton:
    """A network without its arrays."""

    graphdef: Any
    variables: tuple[tuple[tuple[Any, ...], str, Any], ...]  # path, dotted name, an empty variable


def partition(network: nnx.Module) -> tuple[Skeleton, Arrays, Arrays]:
    """A network as its skeleton, its parameters, and its other variables (statistics, codebooks)."""
    graphdef, state = nnx.split(network)
    variables: list[tuple[tuple[Any, ...], str, Any]] = []
    params: Arrays = {}
    rest: Arrays = {}
    for path, leaf in nnx.to_flat_state(state):
        name, value = ".".join(map(str, path)), leaf.get_value()
        variables.append((path, name, leaf.replace(jax.ShapeDtypeStruct(value.shape, value.dtype))))
        (params if isinstance(leaf, nnx.Param) else rest)[name] = value
    return Skeleton(graphdef, tuple(variables)), params, rest


def join(skeleton: Skeleton, values: Mapping[str, jax.Array]) -> Any:
    """The network with these arrays."""
    flat = [(path, empty.replace(values[name])) for path, name, empty in skeleton.variables]
    return nnx.merge(skeleton.graphdef, nnx.from_flat_state(flat))


def restore(rest: Arrays, network: nnx.Module) -> Arrays:
    """`rest` with what a call changed in the network in place; parameters among it stay as they are."""
    changed = {
        ".".join(map(str, path)): leaf.get_value()
        for path, leaf in nnx.to_flat_state(nnx.state(network))
        if not isinstance(leaf, nnx.Param)
    }
    return {name: jax.lax.stop_gradient(changed.get(name, value)).astype(value.dtype) for name, value in rest.items()}


@dataclass(frozen=True)
class Lora:
    r"""LoRA (arXiv 2106.09685, §4.1): $W_0 + \frac{\alpha}{r} A B$; $A$ begins at random, $B$ at zero.

    Attributes:
        rank: $r$.
        alpha: $\alpha$.
        pattern: the kernels that are adapted; queries and values, as in §4.2 there, by default.
        within: of those, the ones whose name this finds as well; all by default.
    """

    rank: int = 8
    alpha: float = 16.0
    pattern: str = r"(^|\.)(q_proj|v_proj|query|value|q|v)\.kernel$"
    within: str = ""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UsageError(f"LoRA's factors have a rank of at least 1, not {self.rank}.")

    def adapts(self, name: str) -> bool:
        """Whether a parameter of this name gets factors."""
        return bool(re.search(self.pattern, name) and re.search(self.within, name))


@dataclass(frozen=True)
class Trainable:
    """Which parameters of a network are trained.

    Attributes:
        pattern: a regular expression that finds the names of those that are trained.
        frozen: one that finds those of them that are not.
        lora: train low-rank factors, and of the rest only what `pattern` finds.
        nothing: train nothing.
    """

    pattern: str | None = None
    frozen: str | None = None
    lora: Lora | None = None
    nothing: bool = False

    def _trained(self, name: str) -> bool:
        if self.nothing or (self.pattern is None and self.lora is not None):
            return False
        return bool(re.search(self.pattern or "", name)) and not (self.frozen and re.search(self.frozen, name))

    def split(self, params: Arrays, rest: Arrays, key: jax.Array) -> tuple[Arrays, Arrays]:
        """What is trained, and everything else.

        Raises:
            UsageError: if nothing is found to train.
        """
        trained = {name: value for name, value in params.items() if self._trained(name)}
        others = {name: value for name, value in params.items() if name not in trained} | rest
        if self.lora is not None:
            for index, name in enumerate(filter(self.lora.adapts, params)):
                *stack, inputs, outputs = params[name].shape  # a stack of blocks has an axis in front
                dtype = params[name].dtype
                draw = jax.random.normal(jax.random.fold_in(key, index), (*stack, inputs, self.lora.rank), dtype)
                trained[name + _A] = draw / inputs**0.5
                trained[name + _B] = jnp.zeros((*stack, self.lora.rank, outputs), dtype)
        if not trained and not self.nothing:
            raise UsageError(f"No parameter is trained: nothing is found by {self.pattern or self.lora}.")
        return trained, others

    def whole(self, trained: Arrays, others: Arrays) -> Arrays:
        """All parameters and other variables, low-rank factors multiplied out."""
        values = others | {name: value for name, value in trained.items() if not name.endswith((_A, _B))}
        if self.lora is not None:
            for name in (n.removesuffix(_A) for n in trained if n.endswith(_A)):
                # W₀ + α/r A B
                low = trained[name + _A] @ trained[name + _B]
                values[name] = values[name] + (self.lora.alpha / self.lora.rank) * low.astype(values[name].dtype)
        return values


def shardings_like(state: Any, mesh: Mesh, rules: sharding.Rules) -> Any:
    """Where every array of a training state lies: an optimiser's moments with the parameter of their name."""
    arrays = {
        f"{network}.{name}": value
        for part in (state.params, state.rest)
        for network, values in part.items()
        for name, value in values.items()
    }
    found = sharding.shardings_for(arrays, mesh, rules)
    everywhere = NamedSharding(mesh, P())

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        keys = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        for name in keys[1:]:
            known = arrays.get(f"{keys[0]}.{name}")
            if known is not None and known.shape == leaf.shape:
                return found[f"{keys[0]}.{name}"]
        return everywhere

    return jax.tree.map_with_path(place, state)
