"""Two processes that call each other: the tests in one, the code that they test in the other.

What passes between them is text (see `wire`). The end of the tests makes plain values of it, or a
`Handle`: an object that stays with the code, and never equals a plain value unless its content is
one that does. So no object of the code says what it is worth, and nothing of the code reaches the
tests, their frames, their builtins or what they expect.

An operator takes a plain value to an object of the code only where the tests made that object, by
calling its class; elsewhere a test would tell the code what it expects of it.

Here is what both ends have, and the end of the code; that of the tests is in `handles`. Loaded by
path; imports nothing of ours but `wire`, which `sandbox_worker` loads first.
"""

import builtins
import copy
import enum
import importlib
import io
import operator
import sys
import types
from collections.abc import Callable
from typing import Any

wire: Any = sys.modules["mmdlm_wire"]
Send = Callable[[bytes], None]
Read = Callable[[int], bytes]
PRINTED = 1 << 20  # characters that are handed on of what one call prints
SOLUTION, TESTS = "solution", "tests"  # names of the modules


class Stopped(BaseException):
    """The other end is not there any more, or does not keep to the rules."""


class Peer:
    """One end of the connection; the other end knows the objects in `kept` by their numbers."""

    def __init__(self, send: Send, read: Read) -> None:
        self.send, self.receive = send, read
        self.kept: list[Any] = []
        self._numbers: dict[int, int] = {}

    def keep(self, value: Any) -> int:
        """Return the number of an object here."""
        number = self._numbers.get(id(value))
        if number is None:
            number = self._numbers[id(value)] = len(self.kept)
            self.kept.append(value)
        return number

    def ask(self, do: str, *args: Any, **options: Any) -> Any:
        """Have the other end do something, and do what it asks for in the meantime."""
        writer = wire.Writer(self.node_of)
        roots = [writer.child(args), writer.child(options)]
        self.send(wire.pack({"do": do, "nodes": writer.nodes, "roots": roots}))
        while True:
            message = wire.unpack(self.receive)
            if message is None:
                raise Stopped
            if "do" not in message:
                return self._answer(message, writer)
            self.serve(message)

    def serve(self, message: dict[str, Any]) -> None:
        """Do what the other end asks for, and reply."""
        reader = wire.read(message.get("nodes"), self.value_of)
        try:
            args, options = (reader.child(one) for one in message["roots"])
        except (TypeError, ValueError, KeyError):
            raise wire.Broken from None
        before = {n: wire.snapshot(value) for n, value in enumerate(reader.values)}
        failed = False
        try:
            value = self.do(message["do"], *args, **options)
        except Stopped:
            raise
        except BaseException as error:  # a test may expect it, SystemExit included
            failed, value = True, error
        try:
            reply = self._reply(value, reader, before)
        except (RecursionError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            failed = True
            why = TypeError(f"what the code returns cannot be looked at ({error})")
            reply = self._reply(why, reader, {})
        self.send(wire.pack({**reply, "failed": failed, "printed": self.printed()}))

    def _reply(self, value: Any, reader: Any, before: dict[int, Any]) -> dict[str, Any]:
        known = {id(reader.values[n]): n for n, content in before.items() if content is not None}
        writer = wire.Writer(self.node_of, known)
        root = writer.child(value)
        after = [
            [n, writer.content(reader.values[n])]
            for n, content in before.items()
            if content is not None and not wire.same(content, wire.snapshot(reader.values[n]))
        ]
        return {"value": root, "nodes": writer.nodes, "after": after}

    def _answer(self, message: dict[str, Any], writer: Any) -> Any:
        reader = wire.read(message.get("nodes"), self.value_of, writer.held)
        try:
            for n, payload in message.get("after", []):  # what it changed of what it was given
                reader.fill(writer.held[n], writer.nodes[n][0], payload)
            value = reader.child(message["value"])
        except (TypeError, ValueError, KeyError, IndexError, AttributeError):
            raise wire.Broken from None
        if text := message.get("printed"):
            sys.stdout.write(str(text))
        if message.get("failed"):
            if not isinstance(value, BaseException):
                raise wire.Broken
            raise value
        return value

    def do(self, what: str, *args: Any, **options: Any) -> Any:
        """Do what the other end asks for."""
        raise NotImplementedError

    def node_of(self, value: Any, writer: Any) -> Any:
        """Turn a value that is not plain into a node."""
        raise NotImplementedError

    def value_of(self, tag: str, payload: Any, reader: Any) -> Any:
        """Return the value that a node stands for, which is not plain."""
        raise NotImplementedError

    def printed(self) -> str:
        """Return what was printed since the last reply."""
        return ""


# ---- the end of the code -------------------------------------------------------------------------

BINARY = {
    name: getattr(operator, f"__{name}__")
    for name in (
        *("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul"),
        *("lshift", "rshift", "and", "or", "xor"),
    )
}
COMPARED = {name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")}
UNARY: dict[str, Callable[..., Any]] = {
    "len": len,
    "iter": iter,
    "next": next,
    "bool": bool,
    "repr": repr,
    "str": str,
    "format": format,
    "hash": hash,
    "int": int,
    "float": float,
    "complex": complex,
    "index": operator.index,
    "round": round,
    "abs": abs,
    "neg": operator.neg,
    "pos": operator.pos,
    "invert": operator.invert,
    "reversed": reversed,
    "getitem": operator.getitem,
    "setitem": operator.setitem,
    "delitem": operator.delitem,
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
}
DOING: dict[str, Callable[..., Any]] = {
    **BINARY,
    **{f"i{name}": getattr(operator, f"__i{name}__") for name in BINARY},
    **COMPARED,
    **UNARY,
    "divmod": divmod,
    "contains": operator.contains,
    "getattr": getattr,
    "setattr": setattr,
    "delattr": delattr,
    "call": lambda what, *args, **options: what(*args, **options),
    "enter": lambda what: type(what).__enter__(what),
    "exit": lambda what, error: type(what).__exit__(
        what, None if error is None else type(error), error, None
    ),
    "run": lambda what: importlib.import_module("asyncio").run(what),
}
PLAIN = (dict, list, tuple, set, frozenset, str, bytes, bytearray, int, float, complex)
# For members of an Enum that is a str or an int too, which say another thing of themselves.
EXACT: dict[type, Any] = {str: str.__str__, int: int.__int__, float: float.__float__}


class Code(Peer):
    """The end of the code that is tested; all of it is in that code's reach."""

    def __init__(self, send: Send, read: Read, module: types.ModuleType) -> None:
        super().__init__(send, read)
        self.module = module
        self.foreign: dict[int, Foreign] = {}
        self.output = io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace")

    def serve(self, message: dict[str, Any]) -> None:
        try:
            super().serve(message)
        except wire.Broken:  # a copy that cannot be made here
            why = TypeError("what the test gives cannot be given to the code")
            self.send(wire.pack({**self._reply(why, None, {}), "failed": True}))

    def do(self, what: str, *args: Any, **options: Any) -> Any:
        if what == "plain":  # its content, as a tuple of one or none
            base = next((one for one in PLAIN if isinstance(args[0], one)), None)
            return () if base is None else (EXACT.get(base, base)(args[0]),)
        if what == "names":
            return {name: _origin(value) for name, value in vars(self.module).items()}
        if what in ("getattr", "setattr", "delattr") and args[0] == SOLUTION:
            args = (self.module, *args[1:])
        return DOING[what](*args, **options)

    def node_of(self, value: Any, writer: Any) -> Any:
        if isinstance(value, Foreign):
            return ["theirs", vars(value)["_number"]]
        if isinstance(value, BaseException):
            kind = type(value)
            mine = writer.child(kind) if kind.__module__ == SOLUTION else None
            parts = writer.child(tuple(value.args)), writer.child(tuple(vars(value).items()))
            return ["error", [mine, kind.__module__, kind.__qualname__, str(value), *parts]]
        number = self.keep(value)
        if isinstance(value, type):
            mine = value.__module__ == SOLUTION
            bases = [writer.child(one) for one in value.__bases__ if one.__module__ == SOLUTION]
            error = mine and issubclass(value, BaseException) and builtin_error(value)
            single = issubclass(value, enum.Enum)
            return ["own", [number, "class", value.__name__, bases, error or None, single]]
        kind = type(value)
        if kind is types.CoroutineType:
            return ["own", [number, "coroutine"]]
        mine = writer.child(kind) if kind.__module__ == SOLUTION else None
        return ["own", [number, "object", mine]]

    def value_of(self, tag: str, payload: Any, reader: Any) -> Any:
        if tag == "own":
            return self.kept[payload]
        if tag == "theirs":
            return self.foreign.setdefault(payload, Foreign(self, payload))
        if tag == "pickled":  # by the tests, which may run what they like here
            return importlib.import_module("pickle").loads(payload.encode("latin-1"))
        assert tag == "error"
        name, args = payload
        return getattr(builtins, name, Exception)(*reader.child(args))

    def printed(self) -> str:
        self.output.flush()
        raw: Any = self.output.buffer
        text = raw.getvalue().decode("utf-8", "replace")
        raw.seek(0)
        raw.truncate()
        return str(text[:PRINTED])


def _origin(value: Any) -> list[str] | None:
    """Where a name was imported from; None for what the code made."""
    if isinstance(value, types.ModuleType):
        return [value.__name__]
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    if isinstance(module, str) and isinstance(name, str) and module != SOLUTION:
        return [module, name]
    return None


def builtin_error(kind: type) -> str:
    """Return the nearest exception of Python's own that a class descends from."""
    return next(one.__name__ for one in kind.__mro__ if one.__module__ == "builtins")


class Foreign:
    """An object of the tests, for the code: a function, an iterator, or of a class of theirs."""

    def __init__(self, peer: Code, number: int) -> None:
        vars(self).update(_peer=peer, _number=number)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._peer.ask("getattr", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._peer.ask("setattr", self, name, value)

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self._peer.ask("call", self, *args, **options)

    def __iter__(self) -> Any:
        return self._peer.ask("iter", self)

    def __next__(self) -> Any:
        return self._peer.ask("next", self)

    def __len__(self) -> Any:
        return self._peer.ask("len", self)

    def __getitem__(self, key: Any) -> Any:
        return self._peer.ask("getitem", self, key)

    def __bool__(self) -> bool:
        return True

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *reason: object) -> None:
        return None


class Console(io.TextIOBase):
    """What the code reads from: the standard input of the tests, which they may replace."""

    def __init__(self, peer: Code) -> None:
        self.peer = peer

    def readable(self) -> bool:
        return True

    def readline(self, size: int = -1) -> str:  # type: ignore[override]
        return str(self.peer.ask("readline"))

    def read(self, size: int | None = -1) -> str:
        return "".join(iter(self.readline, ""))
