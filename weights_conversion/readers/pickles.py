"""A pickle, interpreted as data.

A pickle is a program for a stack machine. `Machine` decodes its instructions with `pickletools` and carries out those
that build plain values; a name stays a name (`Global`), what would call a function becomes plain data if its name is on
a list of harmless constructors, an inert `Record` if it is of a package whose checkpoints carry their configuration as
objects, and the end of the reading otherwise. Nothing is imported and nothing is called by name.
"""

from __future__ import annotations

import argparse
import math
import pickletools
import re
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from weights_conversion.readers.checks import Damaged, checked_shape, quoted
from weights_conversion.readers.tensors import LazyTensor

_MAX_COPIES = 64 << 20  # what the objects in a pickle may copy beyond four times its size
_MAX_DEPTH = 100  # of containers in one another


# --- names and objects -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Global:
    """A name in a pickle, `module.qualname`. It is never looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"

    @property
    def today(self) -> str:
        """The name as Python 3 and today's NumPy have it."""
        name = str(self)
        for old, new in _ALIASES.items():
            if name.startswith(old):
                return new + name.removeprefix(old)
        return name


_ALIASES = {"__builtin__.": "builtins.", "numpy._core.": "numpy.core.", "copy_reg.": "copyreg."}


@dataclass(eq=False)
class Record:
    """An object of a foreign class, kept as the data that its pickle holds; it has no behaviour.

    Attributes:
        class_name: "fairseq.data.dictionary.Dictionary".
        arguments: what the class would have been called with.
        state: what its `__setstate__` or `__dict__` would have received.
        elements: the items appended to it, if it was a list; `mapping`: the items set, if it was a dictionary.
    """

    class_name: str
    arguments: tuple = ()
    state: Any = None
    elements: list = field(default_factory=list)
    mapping: dict = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"Record({self.class_name})"


@dataclass(eq=False)
class _NumpyDtype:
    code: str

    def resolve(self) -> np.dtype:
        if not re.fullmatch(r"[<>|=]?([biufc]\d{1,2}|[SUV]\d{1,6}|\?|[bBhHiIlLqQefdgFD])", self.code):
            raise Damaged(f"it holds a NumPy array of dtype {quoted(self.code)}, which is not a plain number")
        return np.dtype(self.code)


@dataclass(eq=False)
class _NumpyArray:
    state: Any = None
    axes: tuple[int, ...] | None = None  # in which order they lie, where that is neither C's nor Fortran's

    def resolve(self) -> np.ndarray:
        _, shape, dtype, fortran, raw = self.state
        if not isinstance(dtype, _NumpyDtype) or not isinstance(raw, bytes):
            raise Damaged("it holds a NumPy array of Python objects")
        kind, sizes = dtype.resolve(), checked_shape(shape, "a NumPy array in it")
        if math.prod(sizes) * kind.itemsize != len(raw):
            raise Damaged("it holds a NumPy array whose bytes do not fill its shape")
        values = np.frombuffer(raw, kind).reshape(sizes, order="F" if fortran else "C")
        return (values if self.axes is None else values.transpose(self.axes)).copy()


# --- names that may stand in a pickle --------------------------------------------------------------------------------


def spelled(value: Any) -> str:
    """What should be a name or a number, spelled."""
    if not isinstance(value, (str, int, Global)):
        raise Damaged(f"it has a {type(value).__name__} where a name belongs")
    return str(value)


def quoted_object(value: Any) -> str:
    """What stands in a pickle, fit for an error message."""
    return quoted(str(value) if isinstance(value, Global) else value)


def _numpy_scalar(dtype: Any, raw: Any) -> Any:
    if not isinstance(dtype, _NumpyDtype) or not isinstance(raw, bytes):
        raise Damaged("it holds a NumPy scalar of a Python object")
    return np.frombuffer(raw, dtype.resolve(), count=1)[0].item()


def _from_buffer(raw: Any, dtype: Any, shape: Any, order: Any, axes: Any = None) -> _NumpyArray:
    """`numpy.core.numeric._frombuffer`: how protocol 5 writes an array."""
    return _NumpyArray((1, shape, dtype, order == "F", raw), axes)


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """`_codecs.encode`: how protocol 2, which has no bytes, spells `bytes`."""
    return text.encode({"latin1": "latin-1"}.get(encoding, "utf-8"))


def _as_list(items: Any = ()) -> list:
    if not isinstance(items, (list, tuple)):
        raise Damaged("it builds a collection from something that is not a list")
    return items if isinstance(items, list) else list(items)


def _table(items: Any = ()) -> dict:
    return {_hashable(key): value for key, value in _as_list(items)}


# Names with a meaning; all of them build plain data. Those of PyTorch are in `pytorch.py`.
CONSTRUCTORS: Mapping[str, Callable[..., Any]] = {
    "collections.OrderedDict": _table,
    "collections.defaultdict": lambda factory=None, items=(): _table(items),
    "collections.Counter": lambda items=None: items if isinstance(items, dict) else _table(items or ()),
    "argparse.Namespace": lambda: argparse.Namespace(),
    "types.SimpleNamespace": lambda: argparse.Namespace(),
    "builtins.set": _as_list,
    "builtins.frozenset": _as_list,
    "builtins.complex": lambda real=0.0, imag=0.0: complex(float(real), float(imag)),
    "builtins.bytearray": lambda data=b"": bytes(data) if isinstance(data, bytes) else b"",
    "_codecs.encode": _encode,
    "numpy.dtype": lambda code, *_: _NumpyDtype(spelled(code)),
    "numpy.core.multiarray.scalar": _numpy_scalar,
    "numpy.core.multiarray._reconstruct": lambda *_: _NumpyArray(),
    "numpy.core.numeric._frombuffer": _from_buffer,
}
# Projects whose checkpoints carry their configuration as objects: these become inert `Record`s.
_INERT_PACKAGES = {
    *("fairseq", "fairseq2", "omegaconf", "hydra", "audiocraft", "dora", "flashy", "pytorch_lightning", "lightning"),
    *("lightning_fabric", "transformers", "speechbrain", "espnet", "espnet2", "TTS", "pathlib", "enum", "datetime"),
}
# Names without a meaning of their own, which objects mention.
NAMES: Set[str] = {
    *("typing.Any", "typing.Union", "typing.Optional", "typing.List", "typing.Dict", "types.SimpleNamespace"),
    *("builtins.int", "builtins.float", "builtins.str", "builtins.bool", "builtins.bytes", "builtins.list"),
    *("builtins.dict", "builtins.tuple", "builtins.object", "builtins.NoneType", "uuid.UUID"),
    *("builtins.long", "builtins.unicode"),  # Python 2's names, which protocol 2 uses
    *("copyreg._reconstructor", "numpy.ndarray"),
}


# --- the machine -----------------------------------------------------------------------------------------------------

_DISORDER = "its pickle is out of order"


class _Mark:
    """The stack machine's MARK."""


def _refusal(name: Global) -> Damaged:
    return Damaged(
        f"its pickle names {quoted(str(name))}, which is not on the list of harmless constructors, so it was not read "
        "(nothing was executed); a state dictionary saved with torch.save holds only tensors and plain values"
    )


class Machine:
    """Interprets a pickle as data. Opcodes are decoded by `pickletools.genops`; their meaning is defined here.

    Every opcode that would import, call or mutate foreign code is replaced by bookkeeping: `GLOBAL` pushes a `Global`
    (or stops the reading), `REDUCE` and `NEWOBJ` consult `constructors` or build a `Record`, `BUILD` stores the state.

    Args:
        persistent: what a persistent id stands for.
        size: bytes of the pickle.
        constructors: names that may be called, and what calling them builds.
        names: other names that may stand in the pickle.
    """

    def __init__(
        self,
        persistent: Callable[[Any], Any],
        size: int,
        constructors: Mapping[str, Callable[..., Any]] = CONSTRUCTORS,
        names: Set[str] = NAMES,
    ):
        self.persistent = persistent
        self.constructors, self.names = constructors, names
        self.room = 4 * size + _MAX_COPIES
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, stream: Any) -> Any:
        """What the next pickle in a stream builds."""
        for opcode, argument, _ in pickletools.genops(stream):
            name = opcode.name
            if name == "STOP":
                return self.stack.pop()
            handler = getattr(self, "_op_" + name, None)
            if handler is not None:
                handler(argument)
            elif name in _LITERALS:
                self.stack.append(argument)
            else:
                raise Damaged(f"its pickle uses the instruction {name}, which no checkpoint needs")
        raise Damaged("its pickle does not end")

    def _popmark(self) -> list[Any]:
        for i in range(len(self.stack) - 1, -1, -1):
            if self.stack[i] is _Mark:
                items = self.stack[i + 1 :]
                del self.stack[i:]
                return items
        raise Damaged(_DISORDER)

    def _call(self, function: Any, arguments: Any) -> Any:
        if not isinstance(function, Global) or not isinstance(arguments, tuple):
            raise Damaged(f"its pickle calls {quoted(type(function).__name__)}, which is not a name")
        name = function.today
        self._copies(*arguments)
        if name in self.constructors:
            return self.constructors[name](*arguments)
        if name == "copyreg._reconstructor":  # protocol 0 and 1: (class, base, state of the base)
            return self._call(arguments[0], ())
        if name.partition(".")[0] in _INERT_PACKAGES:
            return Record(name, arguments)
        raise _refusal(function)

    def _known(self, name: Global) -> Global:
        """`name` if it may stand in a pickle at all; raises at once otherwise."""
        today = name.today
        if today in self.constructors or today in self.names or today.partition(".")[0] in _INERT_PACKAGES:
            return name
        raise _refusal(name)

    def _copies(self, *values: Any) -> None:
        """Count what an instruction may copy: an object can be named again and again at a few bytes each time."""
        self.room -= sum(len(value) for value in values if isinstance(value, (str, bytes, list, tuple, dict)))
        if self.room < 0:
            raise Damaged("it repeats its content without end")

    # Constants, stack and memo.
    def _op_PROTO(self, version):
        pass

    _op_FRAME = _op_PROTO

    def _op_NONE(self, _):
        self.stack.append(None)

    def _op_NEWTRUE(self, _):
        self.stack.append(True)

    def _op_NEWFALSE(self, _):
        self.stack.append(False)

    def _op_BYTEARRAY8(self, data):
        self.stack.append(bytes(data))

    def _op_MARK(self, _):
        self.stack.append(_Mark)

    def _op_POP(self, _):
        self.stack.pop()

    def _op_POP_MARK(self, _):
        self._popmark()

    def _op_DUP(self, _):
        self.stack.append(self.stack[-1])

    def _op_BINPUT(self, index):
        self.memo[index] = self.stack[-1]

    _op_LONG_BINPUT = _op_PUT = _op_BINPUT

    def _op_MEMOIZE(self, _):
        self.memo[len(self.memo)] = self.stack[-1]

    def _op_BINGET(self, index):
        self.stack.append(self.memo[index])

    _op_LONG_BINGET = _op_GET = _op_BINGET

    # Containers. Sets become lists: nothing here needs to hash what a stranger wrote.
    def _op_EMPTY_LIST(self, _):
        self.stack.append([])

    _op_EMPTY_SET = _op_EMPTY_LIST

    def _op_EMPTY_DICT(self, _):
        self.stack.append({})

    def _op_EMPTY_TUPLE(self, _):
        self.stack.append(())

    def _op_TUPLE(self, _):
        self.stack.append(tuple(self._popmark()))

    def _op_TUPLE1(self, _):
        self.stack[-1:] = [(self.stack[-1],)]

    def _op_TUPLE2(self, _):
        self.stack[-2:] = [(self.stack[-2], self.stack[-1])]

    def _op_TUPLE3(self, _):
        self.stack[-3:] = [(self.stack[-3], self.stack[-2], self.stack[-1])]

    def _op_LIST(self, _):
        self.stack.append(self._popmark())

    _op_FROZENSET = _op_LIST

    def _op_DICT(self, _):
        items = self._popmark()
        self.stack.append({_hashable(key): value for key, value in zip(items[::2], items[1::2], strict=True)})

    def _op_APPEND(self, _):
        item = self.stack.pop()
        self._extend([item])

    def _op_APPENDS(self, _):
        self._extend(self._popmark())

    _op_ADDITEMS = _op_APPENDS

    def _extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        target = target.elements if isinstance(target, Record) else target
        if not isinstance(target, list):
            raise Damaged(_DISORDER)
        target.extend(items)

    def _op_SETITEM(self, _):
        value, key = self.stack.pop(), self.stack.pop()
        self._update([key, value])

    def _op_SETITEMS(self, _):
        self._update(self._popmark())

    def _update(self, items: list[Any]) -> None:
        target = self.stack[-1]
        target = target.mapping if isinstance(target, Record) else target
        if not isinstance(target, dict):
            raise Damaged(_DISORDER)
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_hashable(key)] = value

    # Names and objects.
    def _op_GLOBAL(self, names):
        module, _, name = names.partition(" ")
        self.stack.append(self._known(Global(module, name)))

    def _op_STACK_GLOBAL(self, _):
        name, module = self.stack.pop(), self.stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise Damaged(_DISORDER)
        self.stack.append(self._known(Global(module, name)))

    def _op_REDUCE(self, _):
        arguments, function = self.stack.pop(), self.stack.pop()
        self.stack.append(self._call(function, arguments))

    _op_NEWOBJ = _op_REDUCE

    def _op_NEWOBJ_EX(self, _):
        keywords, arguments, function = self.stack.pop(), self.stack.pop(), self.stack.pop()
        made = self._call(function, arguments)
        if isinstance(made, Record):
            made.state = keywords
        self.stack.append(made)

    def _op_BUILD(self, _):
        state, target = self.stack.pop(), self.stack[-1]
        self._copies(state)
        if isinstance(target, Record):
            target.state = state
        elif isinstance(target, argparse.Namespace):
            if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
                raise Damaged("it holds a namespace without names")
            vars(target).update(state)
        elif isinstance(target, _NumpyArray):
            target.state = state
        elif isinstance(target, _NumpyDtype):
            if state[1] in ("<", ">"):
                target.code = state[1] + target.code.lstrip("<>|=")
        elif not isinstance(target, (dict, LazyTensor)):  # attributes of an OrderedDict or a Parameter
            raise Damaged(_DISORDER)

    def _op_BINPERSID(self, _):
        self.stack.append(self.persistent(self.stack.pop()))


_LITERALS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
    *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
}


# --- plain values ----------------------------------------------------------------------------------------------------


def _hashable(key: Any) -> Any:
    """A dictionary key that hashes without recursion."""
    if isinstance(key, tuple):
        if len(key) > 64 or any(isinstance(part, tuple) for part in key):
            raise Damaged("it holds a dictionary with nested keys")
        return tuple(_hashable(part) for part in key)
    if key is None or isinstance(key, (str, int, float, bool, bytes, complex, Global)):
        return key
    if isinstance(key, Record):
        alone = len(key.arguments) == 1 and isinstance(key.arguments[0], (str, int, float))
        return str(key.arguments[0]) if alone else key.class_name
    raise Damaged(f"it holds a dictionary whose keys are {type(key).__name__}s")


def plain(value: Any, seen: dict[int, Any] | None = None, depth: int = 0) -> Any:
    """Replace the machine's bookkeeping by plain values: NumPy arrays, and OmegaConf's nodes by their content."""
    if depth > _MAX_DEPTH:
        raise Damaged(f"it is nested more than {_MAX_DEPTH} levels deep")
    seen = {} if seen is None else seen
    if id(value) in seen:
        return seen[id(value)]
    if isinstance(value, (_NumpyArray, _NumpyDtype)):
        seen[id(value)] = made = value.resolve()
        return made
    if isinstance(value, Global):
        return str(value)
    if isinstance(value, dict):
        seen[id(value)] = table = {}
        table.update({plain(key): plain(item, seen, depth + 1) for key, item in value.items()})
        return table
    if isinstance(value, list):
        items: list[Any] = []
        seen[id(value)] = items
        items.extend(plain(item, seen, depth + 1) for item in value)
        return items
    if isinstance(value, tuple):
        seen[id(value)] = parts = tuple(plain(item, seen, depth + 1) for item in value)
        return parts
    if isinstance(value, argparse.Namespace):
        seen[id(value)] = value
        for key, item in list(vars(value).items()):
            setattr(value, key, plain(item, seen, depth + 1))
        return value
    if isinstance(value, Record):
        if value.class_name.startswith("omegaconf.") and isinstance(value.state, dict):
            content = next((value.state[key] for key in ("_content", "_val") if key in value.state), None)
            return plain(content, seen, depth + 1)
        seen[id(value)] = value
        value.arguments = plain(value.arguments, seen, depth + 1)
        value.state = plain(value.state, seen, depth + 1)
        value.elements = plain(value.elements, seen, depth + 1)
        value.mapping = plain(value.mapping, seen, depth + 1)
    return value
