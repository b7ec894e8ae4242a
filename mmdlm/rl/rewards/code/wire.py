"""Values as text and back, strictly: plain ones by exact type, all others as numbered objects.

Both ends of the sandbox use it (see `sandbox_worker`): the text comes from code that nobody has
read, so that reading it makes plain values of a fixed list of types, and nothing else. Loaded by
path; imports nothing of ours.

A message holds nodes `[tag, payload]`. A child of a node is None, a bool, a str, a small int, a
finite float, or `[n]`, the node n. Shared and cyclic containers stay what they are.
"""

import base64
import builtins
import collections
import datetime as dt
import decimal
import fractions
import json
import math
import operator
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

LONGEST = 64 << 20  # characters of a message
INLINE = 1 << 63
Node = list[Any]  # [tag, payload]
Other = Callable[[Any, "Writer"], Node]  # a value that is not plain -> its node
Unknown = Callable[[str, Any, "Reader"], Any]  # tag and payload of such a node -> the value

# Containers that hold themselves are made empty first, and filled last.
MUTABLE: dict[str, type] = {
    "list": list,
    "dict": dict,
    "set": set,
    "bytearray": bytearray,
    "deque": collections.deque,
    "OrderedDict": collections.OrderedDict,
    "defaultdict": collections.defaultdict,
    "Counter": collections.Counter,
}
FIXED: dict[str, type] = {"tuple": tuple, "frozenset": frozenset, "slice": slice}
TAGS = {kind: tag for tag, kind in (MUTABLE | FIXED).items()}
MAPPINGS = ("dict", "OrderedDict", "defaultdict", "Counter")
FACTORIES: tuple[type, ...] = (int, float, str, list, dict, set, tuple, bool)
ARRAY = re.compile(r"[<>|=]?[biufcSU]\d+")


class Broken(Exception):
    """A message that is none."""


class Writer:
    """Values -> children and their nodes.

    Args:
        other: Makes nodes of what is not plain.
        sent: Id of an object that the reader knows already -> its number there.
    """

    def __init__(self, other: Other, sent: Mapping[int, int] | None = None) -> None:
        self.other, self.sent = other, sent or {}
        self.nodes: list[Node] = []
        self.held: list[Any] = []  # the objects of the nodes
        self._known: dict[int, int] = {}

    def child(self, value: Any) -> Any:
        """Return what stands for a value in a node."""
        kind = type(value)
        if value is None or kind is bool or kind is str:
            return value
        if kind is int and -INLINE < value < INLINE:
            return value
        if kind is float and math.isfinite(value):
            return value
        if id(value) in self.sent:
            return self._add(["sent", self.sent[id(value)]], value)
        if id(value) in self._known:
            return [self._known[id(value)]]
        tag = TAGS.get(kind)
        if tag in MUTABLE:
            place = self._add([tag, None], value)
            self.nodes[place[0]][1] = self.content(value)
            return place
        if tag is not None:
            parts = (value.start, value.stop, value.step) if tag == "slice" else value
            return self._add([tag, [self.child(one) for one in parts]], value)
        node = _scalar(value)
        if node is not None:
            return self._add(node, value)
        numpy = sys.modules.get("numpy")
        if numpy is not None and isinstance(value, numpy.generic):
            item = value.item()  # a number of numpy is a number
            if type(item) is not kind:
                return self.child(item)
        node = None if numpy is None else _array(value, numpy)
        return self._add(self.other(value, self) if node is None else node, value)

    def content(self, value: Any) -> Any:
        """Return the payload of a mutable container, or of an array."""
        tag = TAGS.get(type(value))
        if tag is None:
            array = _array(value, sys.modules["numpy"])
            assert array is not None
            return array[1]
        if tag == "bytearray":
            return value.decode("latin-1")
        if tag in MAPPINGS:
            pairs = [[self.child(key), self.child(one)] for key, one in value.items()]
            factory = getattr(value, "default_factory", None)
            return [factory.__name__ if factory in FACTORIES else None, pairs]
        items = [self.child(one) for one in value]
        return [value.maxlen, items] if tag == "deque" else items

    def _add(self, node: Node, value: Any) -> Any:
        self.nodes.append(node)
        self.held.append(value)
        self._known[id(value)] = len(self.nodes) - 1
        return [len(self.nodes) - 1]


def _scalar(value: Any) -> Node | None:
    """Return the node of a plain value without parts; None for another."""
    kind = type(value)
    if kind is int:
        return ["int", hex(value)]
    if kind is float:
        return ["float", repr(value)]
    if kind is complex:
        return ["complex", [repr(value.real), repr(value.imag)]]
    if kind is bytes:
        return ["bytes", value.decode("latin-1")]
    if kind is range:
        return ["range", [hex(one) for one in (value.start, value.stop, value.step)]]
    if kind is decimal.Decimal:
        return ["Decimal", str(value)]
    if kind is fractions.Fraction:
        return ["Fraction", [hex(value.numerator), hex(value.denominator)]]
    if kind is dt.timedelta:
        return ["timedelta", [value.days, value.seconds, value.microseconds]]
    if kind is dt.date:
        return ["date", value.isoformat()]
    if kind in (dt.datetime, dt.time) and type(value.tzinfo) in (
        type(None),
        dt.timezone,
    ):
        return [kind.__name__, value.isoformat()]
    if value is Ellipsis or value is NotImplemented:
        return ["constant", repr(value)]
    name = _NAMES.get(id(value))
    return None if name is None else ["builtin", name]


# Types and functions that both ends have.
_FUNCTIONS: tuple[Any, ...] = (
    abs,
    all,
    any,
    bin,
    chr,
    divmod,
    hex,
    len,
    max,
    min,
    oct,
    ord,
    pow,
    repr,
    round,
)
_FUNCTIONS += (sorted, sum)
_BUILTINS: dict[str, Any] = {one.__name__: one for one in _FUNCTIONS} | {
    name: value for name, value in vars(builtins).items() if isinstance(value, type)
}
_NAMES = {id(value): name for name, value in _BUILTINS.items()}


def _array(value: Any, numpy: Any) -> Node | None:
    """Return the node of a numpy array of numbers or texts; None for another value."""
    if type(value) is not numpy.ndarray or not ARRAY.fullmatch(value.dtype.str):
        return None
    data = base64.b64encode(value.tobytes()).decode()
    return ["array", [value.dtype.str, list(value.shape), data]]


class Reader:
    """Nodes -> values.

    Args:
        nodes: As `Writer.nodes` has them.
        other: Makes values of nodes that are not plain.
        sent: Objects of this end that the other end may name by their numbers.
    """

    def __init__(self, nodes: Sequence[Any], other: Unknown, sent: Sequence[Any] = ()) -> None:
        self.nodes, self.other, self.sent = nodes, other, sent
        self.values: list[Any] = [None] * len(nodes)
        self._done = 0  # fixed nodes that are made
        for n, (tag, payload) in enumerate(nodes):
            if tag in MUTABLE:
                self.values[n] = _empty(tag, payload)
        for n, (tag, payload) in enumerate(nodes):
            self._done = n
            if tag not in MUTABLE:
                self.values[n] = self._fixed(tag, payload)
        self._done = len(nodes)
        for n, (tag, payload) in enumerate(nodes):
            if tag in MUTABLE:
                self.fill(self.values[n], tag, payload)

    def child(self, child: Any) -> Any:
        """Return the value that a child stands for."""
        if type(child) is not list:
            return child
        if len(child) != 1 or type(child[0]) is not int or not 0 <= child[0] < len(self.nodes):
            raise Broken
        n = child[0]
        if n >= self._done and self.nodes[n][0] not in MUTABLE:
            raise Broken
        return self.values[n]

    def fill(self, value: Any, tag: str, payload: Any) -> None:
        """Give a mutable container its content, whatever it held."""
        if tag == "bytearray":
            value[:] = payload.encode("latin-1")
        elif tag == "array":
            value[...] = _read_array(payload)
        elif tag in MAPPINGS:
            pairs = [(self.child(key), self.child(one)) for key, one in payload[1]]
            value.clear()
            for key, one in pairs:
                value[key] = one
        elif tag not in MUTABLE:
            raise Broken
        else:
            items = [self.child(one) for one in (payload[1] if tag == "deque" else payload)]
            value.clear()
            value.update(items) if tag == "set" else value.extend(items)

    def _fixed(self, tag: str, payload: Any) -> Any:
        if tag == "sent":
            if type(payload) is not int or not 0 <= payload < len(self.sent):
                raise Broken
            return self.sent[payload]
        if tag in FIXED:
            parts = [self.child(one) for one in payload]
            return slice(*parts) if tag == "slice" else FIXED[tag](parts)
        make = _MAKE.get(tag)
        return self.other(tag, payload, self) if make is None else make(payload)


def _empty(tag: str, payload: Any) -> Any:
    """Return a mutable container with nothing in it."""
    if tag == "deque":
        return collections.deque(maxlen=payload[0])
    if tag == "defaultdict":
        factory = next((one for one in FACTORIES if one.__name__ == payload[0]), None)
        return collections.defaultdict(factory)
    return MUTABLE[tag]()


def _read_array(payload: Any) -> Any:
    import numpy as np

    kind, shape, data = payload
    if not ARRAY.fullmatch(kind) or not all(type(one) is int for one in shape):
        raise Broken
    flat = np.frombuffer(base64.b64decode(data), dtype=kind)
    return flat.reshape(shape).copy()


def _read_constant(payload: Any) -> Any:
    return {"Ellipsis": Ellipsis, "NotImplemented": NotImplemented}[payload]


_MAKE: dict[str, Callable[[Any], Any]] = {
    "int": lambda text: int(text, 16),
    "float": float,
    "complex": lambda parts: complex(float(parts[0]), float(parts[1])),
    "bytes": lambda text: text.encode("latin-1"),
    "range": lambda parts: range(*(int(one, 16) for one in parts)),
    "Decimal": decimal.Decimal,
    "Fraction": lambda parts: fractions.Fraction(*(int(one, 16) for one in parts)),
    "timedelta": lambda parts: dt.timedelta(*parts),
    "date": dt.date.fromisoformat,
    "datetime": dt.datetime.fromisoformat,
    "time": dt.time.fromisoformat,
    "constant": _read_constant,
    "builtin": lambda name: _BUILTINS[name],
    "array": _read_array,
}


def snapshot(value: Any) -> list[Any] | bytes | None:
    """Return what a mutable container holds now; None for another value."""
    tag = TAGS.get(type(value))
    if tag is None and (numpy := sys.modules.get("numpy")) and type(value) is numpy.ndarray:
        return bytes(value.tobytes())
    if tag not in MUTABLE:
        return None
    if tag == "bytearray":
        return bytes(value)
    return [one for pair in value.items() for one in pair] if tag in MAPPINGS else list(value)


def same(one: list[Any] | bytes, other: list[Any] | bytes) -> bool:
    """Two snapshots hold the very same objects."""
    if isinstance(one, bytes) or isinstance(other, bytes):
        return one == other
    return len(one) == len(other) and all(map(operator.is_, one, other))


def read(nodes: Any, other: Unknown, sent: Sequence[Any] = ()) -> Reader:
    """Return the values of nodes; raise Broken for what is no node."""
    try:
        return Reader(nodes, other, sent)
    except Exception:  # what was written may ask for anything
        raise Broken from None


def pack(message: Mapping[str, Any]) -> bytes:
    """Encode a message as bytes, its length first."""
    text = json.dumps(message, allow_nan=False).encode()
    if len(text) > LONGEST:
        raise ValueError(f"a value of {len(text)} bytes is too large to be looked at")
    return len(text).to_bytes(8, "big") + text


def unpack(read: Callable[[int], bytes]) -> dict[str, Any] | None:
    """Return the next message that `read` gives (it takes a number of bytes); None at the end.

    Raises Broken for what is no message.
    """
    head = read(8)
    if not head:
        return None
    size = int.from_bytes(head, "big")
    if len(head) < 8 or size > LONGEST:
        raise Broken
    text = read(size)
    if len(text) < size:
        raise Broken
    try:
        message = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise Broken from None
    if type(message) is not dict:
        raise Broken
    return message


def _no_constant(name: str) -> None:
    raise ValueError(name)  # NaN and Infinity are nodes
