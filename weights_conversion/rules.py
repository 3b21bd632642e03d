r"""The rule engine: foreign tensor names and layouts to ours and back, as data.

A table is a list of rules, each *(foreign template, our template, operation)*:

    Rule("model.encoder.layers.{i}.fc1.weight", "model.encoder.layers.{i}.fc1.kernel", transpose)

`{i}` stands for a number and `{name:a|b}` for one of the words given; what a placeholder matched on one side is put in
its place on the other, so a rule reads in both directions. A side may also be a tuple of templates: one fused foreign
tensor against three of ours, or the other way round. Every operation knows its inverse, hence export is the
import's table read backwards and the round trip is exact to the bit.

Strictness goes both ways. A foreign key that no rule or more than one rule takes, a parameter of ours that nothing
fills, and a wrong shape are all collected before the first tensor is read, and raised together as one listing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from audiozoo.errors import CheckpointError
from weights_conversion.readers import TensorSource

Arrays = tuple[np.ndarray, ...]


class Tensors(Protocol):
    """What the engine asks of a foreign file: names and shapes without reading, one tensor at a time."""

    def names(self) -> list[str]:
        """Every tensor's name."""

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one tensor, without reading it."""

    def dtype(self, name: str) -> np.dtype:
        """The dtype of one tensor, without reading it."""

    def read(self, name: str) -> np.ndarray:
        """One tensor's values."""


# --- operations ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Operation:
    """An invertible change of layout: `forward` takes foreign arrays to ours, `inverse` ours to foreign ones."""

    name: str
    forward: Callable[[Arrays], Arrays]
    inverse: Callable[[Arrays], Arrays]

    def __rshift__(self, after: Operation) -> Operation:
        """`a >> b` applies `a`, then `b`."""
        return Operation(
            f"{self.name} >> {after.name}",
            lambda arrays: after.forward(self.forward(arrays)),
            lambda arrays: self.inverse(after.inverse(arrays)),
        )


def _each(function: Callable[[np.ndarray], np.ndarray]) -> Callable[[Arrays], Arrays]:
    return lambda arrays: tuple(function(array) for array in arrays)


def permute(*axes: int) -> Operation:
    """Reorder the axes: `permute(2, 1, 0)` takes PyTorch's `(out, in, time)` kernels to `(time, in, out)`."""
    back = tuple(int(axis) for axis in np.argsort(axes))
    return Operation(f"permute{axes}", _each(lambda a: a.transpose(axes)), _each(lambda a: a.transpose(back)))


identity = Operation("identity", lambda arrays: arrays, lambda arrays: arrays)
transpose = permute(1, 0)  # Linear: (out, in) -> (in, out)
conv1d = permute(2, 1, 0)  # Conv1d: (out, in/groups, time) -> (time, in/groups, out)
conv2d = permute(2, 3, 1, 0)  # Conv2d: (out, in/groups, height, width) -> (height, width, in/groups, out)
conv_transpose1d = permute(2, 0, 1)  # ConvTranspose1d: (in, out/groups, time) -> (time, in, out/groups)


def squeeze(axis: int) -> Operation:
    """Drop an axis of length one; the inverse puts it back."""
    return Operation(f"squeeze({axis})", _each(lambda a: np.squeeze(a, axis)), _each(lambda a: np.expand_dims(a, axis)))


def unsqueeze(axis: int) -> Operation:
    """Add an axis of length one; the inverse drops it."""
    return Operation(
        f"unsqueeze({axis})", _each(lambda a: np.expand_dims(a, axis)), _each(lambda a: np.squeeze(a, axis))
    )


def reshape(ours: Sequence[int], foreign: Sequence[int]) -> Operation:
    """Another shape for the same values in the same order; one length of each may be -1."""
    return Operation(f"reshape({tuple(ours)})", _each(lambda a: a.reshape(ours)), _each(lambda a: a.reshape(foreign)))


def split(parts: int | Sequence[int], axis: int = 0) -> Operation:
    """One foreign tensor cut along `axis` into equal parts, or into parts of the given lengths, for several of ours."""

    def cut(arrays: Arrays) -> Arrays:
        array = arrays[0]
        if isinstance(parts, int):
            return tuple(np.split(array, parts, axis))
        if array.shape[axis] != sum(parts):
            raise ValueError(f"{array.shape[axis]} does not divide into {parts}")
        return tuple(np.split(array, np.cumsum(parts)[:-1], axis))

    def join(arrays: Arrays) -> Arrays:
        lengths = [array.shape[axis] for array in arrays]
        if lengths != ([lengths[0]] * parts if isinstance(parts, int) else list(parts)):
            raise ValueError(f"{lengths} are not the parts {parts}")
        return (np.concatenate(arrays, axis),)

    return Operation(f"split({parts}, {axis})", cut, join)


def fuse(parts: int | Sequence[int], axis: int = 0) -> Operation:
    """Several foreign tensors laid end to end along `axis` as one of ours."""
    there = split(parts, axis)
    return Operation(f"fuse({parts}, {axis})", there.inverse, there.forward)


def stack(axis: int = 0) -> Operation:
    """Several foreign tensors of one shape along a new axis of ours."""

    def unstack(arrays: Arrays) -> Arrays:
        return tuple(np.moveaxis(arrays[0], axis, 0))

    return Operation(f"stack({axis})", lambda arrays: (np.stack(arrays, axis),), unstack)


def flip(axis: int) -> Operation:
    """Reverse one axis."""
    return Operation(f"flip({axis})", _each(lambda a: np.flip(a, axis)), _each(lambda a: np.flip(a, axis)))


def split_dropping_zeros(keep: Sequence[bool], axis: int = 0) -> Operation:
    """Cut into `len(keep)` equal parts and keep those marked; the others must hold only zeros, and are zeros again."""

    def forward(arrays: Arrays) -> Arrays:
        kept = []
        for part, wanted in zip(np.split(arrays[0], len(keep), axis), keep, strict=True):
            if wanted:
                kept.append(part)
            elif np.any(part):
                raise CheckpointError("a part of a fused tensor that has no place in the model is not zero.")
        return tuple(kept)

    def inverse(arrays: Arrays) -> Arrays:
        parts = iter(arrays)
        return (np.concatenate([next(parts) if k else np.zeros_like(arrays[0]) for k in keep], axis),)

    return Operation(f"split_dropping_zeros({tuple(keep)}, {axis})", forward, inverse)


# --- templates and rules ---------------------------------------------------------------------------------------------

_PLACEHOLDER = re.compile(r"\{(\w+)(?::([^{}]+))?\}")


def _words(templates: Iterable[str]) -> dict[str, str]:
    """The regular expression of every placeholder that the templates name."""
    words: dict[str, str] = {}
    for template in templates:
        for name, alternatives in _PLACEHOLDER.findall(template):
            if alternatives or name not in words:
                words[name] = alternatives or words.get(name, r"(?:0|[1-9]\d*)")
    return words


def _regex(template: str, words: Mapping[str, str]) -> re.Pattern[str]:
    pattern, position, seen = "", 0, set()
    for match in _PLACEHOLDER.finditer(template):
        name = match[1]
        pattern += re.escape(template[position : match.start()])
        pattern += f"(?P={name})" if name in seen else f"(?P<{name}>{words[name]})"
        seen.add(name)
        position = match.end()
    return re.compile(pattern + re.escape(template[position:]))


def _fill(template: str, values: Mapping[str, str]) -> str:
    return _PLACEHOLDER.sub(lambda match: values[match[1]], template)


@dataclass(frozen=True)
class Rule:
    """One line of a table.

    Attributes:
        foreign: template, or tuple of templates, of the foreign names.
        ours: template, or tuple of templates, of our dotted parameter paths.
        operation: how the foreign arrays become ours.
        numbers: for placeholders that count differently, `{"i": (2, 1)}` says *foreign i = 2 · ours + 1*.
    """

    foreign: str | tuple[str, ...]
    ours: str | tuple[str, ...]
    operation: Operation = identity
    numbers: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_foreign", (self.foreign,) if isinstance(self.foreign, str) else self.foreign)
        object.__setattr__(self, "_ours", (self.ours,) if isinstance(self.ours, str) else self.ours)
        words = _words((*self._foreign, *self._ours))  # type: ignore[attr-defined]
        for side in ("_foreign", "_ours"):
            templates = getattr(self, side)
            if any({n for n, _ in _PLACEHOLDER.findall(t)} != set(words) for t in templates):
                sides = f"{self.foreign} {self.ours}"
                raise ValueError(f"every template of a rule must name the same placeholders: {sides}")
            object.__setattr__(self, side + "_regex", tuple(_regex(t, words) for t in templates))

    def _match(self, side: str, name: str) -> dict[str, str] | None:
        """The placeholders' values, counted our way, if `name` fits a template of that side."""
        for regex in getattr(self, side + "_regex"):
            if match := regex.fullmatch(name):
                values = match.groupdict()
                if side == "_foreign":
                    for key, (step, offset) in self.numbers.items():
                        number, rest = divmod(int(values[key]) - offset, step)
                        if rest or number < 0:
                            return None
                        values[key] = str(number)
                return values
        return None

    def match_foreign(self, name: str) -> dict[str, str] | None:
        """Placeholder values if this rule takes the foreign name, else None."""
        return self._match("_foreign", name)

    def match_ours(self, path: str) -> dict[str, str] | None:
        """Placeholder values if this rule fills our path, else None."""
        return self._match("_ours", path)

    def foreign_names(self, values: Mapping[str, str]) -> tuple[str, ...]:
        """The foreign names for these placeholder values."""
        counted = dict(values)
        for key, (step, offset) in self.numbers.items():
            counted[key] = str(step * int(values[key]) + offset)
        return tuple(_fill(t, counted) for t in self._foreign)  # type: ignore[attr-defined]

    def our_paths(self, values: Mapping[str, str]) -> tuple[str, ...]:
        """Our parameter paths for these placeholder values."""
        return tuple(_fill(t, values) for t in self._ours)  # type: ignore[attr-defined]

    def prefixed(self, foreign: str, ours: str) -> Rule:
        """The same rule one level deeper on both sides."""
        return Rule(
            tuple(foreign + t for t in self._foreign),  # type: ignore[attr-defined]
            tuple(ours + t for t in self._ours),  # type: ignore[attr-defined]
            self.operation,
            self.numbers,
        )


@dataclass(frozen=True)
class Ignore:
    """Foreign keys left out on purpose: a regular expression for the whole name, and the reason."""

    pattern: str
    reason: str


@dataclass(frozen=True)
class Tied:
    """A foreign key that repeats another one (a tied output head): checked to be equal to the bit, then left out."""

    name: str
    same_as: str


@dataclass(frozen=True)
class Constant:
    """A foreign tensor that follows from the configuration (a table of the mask): left out, and written again."""

    name: str
    value: Callable[[], np.ndarray]


_COMPARED_BYTES = 16 << 20


def _same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal in dtype, shape and every bit: NaN equals the same NaN, and minus zero does not equal zero."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    a, b = (np.ascontiguousarray(x).reshape(-1).view(np.uint8) for x in (a, b))
    # By the piece: a comparison makes a Boolean for each byte, which of a table of tokens would be another gigabyte.
    starts = range(0, a.size, _COMPARED_BYTES)
    return all(np.array_equal(a[i : i + _COMPARED_BYTES], b[i : i + _COMPARED_BYTES]) for i in starts)


def _repeats(tensors: Tensors, name: str, other: str) -> bool:
    """Does one tensor of a file repeat another? It is read only if it does not lie where the other does."""
    if isinstance(tensors, TensorSource) and tensors[name] == tensors[other]:
        return True
    return _same_bits(tensors.read(name), tensors.read(other))


@dataclass(frozen=True)
class Step:
    """One application of a rule: these foreign tensors give these parameters."""

    foreign: tuple[str, ...]
    ours: tuple[str, ...]
    operation: Operation


def _misfits(step: Step, tensors: Tensors, expected: Mapping[str, Any], filled: Collection[str]) -> list[str]:
    """Why what a step gives does not fit a model, of which other steps have `filled` some parameters."""
    if all(path not in expected for path in step.ours):
        return [f"  + {name}  (the model has no such parameter)" for name in step.foreign]
    which = ", ".join(step.foreign)
    virtual = tuple(np.broadcast_to(np.False_, tensors.shape(n)) for n in step.foreign)
    try:
        arrays = step.operation.forward(virtual)
        if [a.shape for a in step.operation.inverse(arrays)] != [v.shape for v in virtual]:
            raise ValueError
    except ValueError:
        shapes = ", ".join(str(v.shape) for v in virtual)
        return [f"  ! {which}  (shape {shapes} does not go through {step.operation.name})"]
    problems = []
    for path, array in zip(step.ours, arrays, strict=False):
        if path in filled:
            problems.append(f"  + {which}  ({path} is already filled)")
        elif path not in expected:
            problems.append(f"  + {which}  (the model has no {path})")
        elif array.shape != tuple(expected[path].shape):
            shape = tuple(expected[path].shape)
            problems.append(f"  ! {which}  (gives {path} the shape {array.shape}; the model has {shape})")
    return problems


@dataclass(frozen=True)
class Table:
    """The whole correspondence between one foreign format and one of our models.

    Attributes:
        rules: what becomes what.
        renames: `(regular expression, replacement)` pairs applied in order to foreign names before matching, for the
            spellings that older files use; export writes today's spelling.
        ignored: keys left out on purpose.
        tied: keys that repeat others.
        constants: keys left out, which export writes again because the originals want them.
    """

    rules: Sequence[Rule]
    renames: Sequence[tuple[str, str]] = ()
    ignored: Sequence[Ignore] = ()
    tied: Sequence[Tied] = ()
    constants: Sequence[Constant] = ()

    def today(self, name: str) -> str:
        """A foreign name in today's spelling."""
        for pattern, replacement in self.renames:
            name = re.sub(pattern, replacement, name)
        return name

    def steps_for(self, paths: Iterable[str]) -> list[Step]:
        """The applications of rules that fill these parameters, in the order of `paths`; raises if one has none."""
        steps: dict[tuple[str, ...], Step] = {}
        problems = []
        paths = list(paths)
        present = set(paths)
        for path in paths:
            found = [(rule, values) for rule in self.rules if (values := rule.match_ours(path)) is not None]
            if len(found) != 1:
                problems.append(f"  - {path}  ({'no rule' if not found else f'{len(found)} rules'} for this parameter)")
                continue
            rule, values = found[0]
            names, ours = rule.foreign_names(values), rule.our_paths(values)
            if absent := [other for other in ours if other not in present]:
                problems.append(f"  - {', '.join(absent)}  (goes together with {path})")
                continue
            steps.setdefault(names, Step(names, ours, rule.operation))
        if problems:
            raise CheckpointError("The conversion table does not cover the model:\n" + "\n".join(problems))
        return list(steps.values())

    def plan(
        self,
        tensors: Tensors,
        expected: Mapping[str, Any],
        *,
        where: str = "The checkpoint",
        model: str = "the model",
        may_be_absent: str | None = None,
    ) -> list[Step]:
        """Compare a file with a model, without reading a tensor.

        Args:
            tensors: the foreign file.
            expected: our parameter paths with anything that has a `.shape`.
            where: the file's name for the message.
            model: the model's name for the message.
            may_be_absent: a regular expression of parameters that the file need not hold.

        Returns:
            The steps that fill the parameters.

        Raises:
            CheckpointError: with a +/- listing of every key too many, too few or of a wrong shape.
        """
        actual, problems = self._names_today(tensors)
        steps, unmatched = self._matches(tensors, actual)
        problems += unmatched
        filled: set[str] = set()
        for step in steps:
            problems += _misfits(step, tensors, expected, filled)
            if any(path in expected for path in step.ours):
                filled.update(step.ours)
        for path in expected:
            if path not in filled and not (may_be_absent and re.fullmatch(may_be_absent, path)):
                problems.append(f"  - {path}  (shape {tuple(expected[path].shape)}; nothing in the file fills it)")
        if problems:
            counts = {mark: sum(p.startswith(f"  {mark}") for p in problems) for mark in "+-!"}
            shown = problems[:60] + ([f"  … and {len(problems) - 60} more"] if len(problems) > 60 else [])
            raise CheckpointError(
                f"{where} does not fit {model}: {counts['+']} unexpected (+), {counts['-']} missing (-), "
                f"{counts['!']} of a wrong shape (!).\n" + "\n".join(shown)
            )
        return steps

    def _names_today(self, tensors: Tensors) -> tuple[dict[str, str], list[str]]:
        """Today's spelling of each tensor's name, without constants, and that name; and what is there twice."""
        actual: dict[str, str] = {}
        problems = []
        for name in tensors.names():
            today = self.today(name)
            if today in actual:
                problems.append(f"  + {name}  (the same tensor as {actual[today]})")
            actual[today] = name
        for constant in self.constants:
            actual.pop(constant.name, None)
        for pair in self.tied:
            if pair.name in actual and pair.same_as not in actual:
                actual[pair.same_as] = actual.pop(pair.name)  # a file may hold either of the two
        return actual, problems

    def _matches(self, tensors: Tensors, actual: Mapping[str, str]) -> tuple[list[Step], list[str]]:
        """The rules that take the tensors of a file, and what no rule takes, or several do."""
        steps: dict[tuple[str, ...], Step] = {}
        problems = []
        tied = {t.name: t for t in self.tied}
        for today, name in actual.items():
            if any(re.fullmatch(i.pattern, today) for i in self.ignored):
                continue
            if today in tied and tied[today].same_as in actual:
                other = actual[tied[today].same_as]
                if not _repeats(tensors, name, other):
                    problems.append(f"  + {name}  (differs from {other}, to which the model ties it)")
                continue
            found = [(rule, values) for rule in self.rules if (values := rule.match_foreign(today)) is not None]
            if len(found) != 1:
                problems.append(f"  + {name}  ({'no rule takes it' if not found else f'{len(found)} rules take it'})")
                continue
            rule, values = found[0]
            names = rule.foreign_names(values)
            if absent := [n for n in names if n not in actual]:
                problems.append(f"  - {', '.join(absent)}  (goes together with {name})")
                continue
            steps[names] = Step(tuple(actual[n] for n in names), rule.our_paths(values), rule.operation)
        return list(steps.values()), problems

    def read(self, tensors: Tensors, steps: Iterable[Step]) -> Iterator[tuple[str, np.ndarray]]:
        """Carry out a plan tensor by tensor, yielding `(our path, array)` as foreign arrays come in."""
        for step in steps:
            arrays = step.operation.forward(tuple(tensors.read(name) for name in step.foreign))
            yield from zip(step.ours, arrays, strict=True)

    def write(self, parameters: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
        """The way back: our parameters as `(foreign name, array)`, tensor by tensor, in C order."""
        for step in self.steps_for(parameters):
            arrays = step.operation.inverse(tuple(np.asarray(parameters[path]) for path in step.ours))
            for name, array in zip(step.foreign, arrays, strict=True):
                yield name, np.asarray(array, order="C")
        for constant in self.constants:
            yield constant.name, constant.value()
