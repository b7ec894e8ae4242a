"""The end of the tests: what they hold of the code that they test, which is in another process.

What is read here was written by code that nobody has read. Plain values are made of it (see
`wire`), and handles: objects that stay with the code, and do there what they are asked to.

Loaded by path; imports nothing of ours but `wire` and `remote`, which `sandbox_worker` loads first.
"""

import ast
import builtins
import importlib
import io
import sys
import types
from collections.abc import Callable
from typing import Any

remote: Any = sys.modules["mmdlm_remote"]
wire: Any = sys.modules["mmdlm_wire"]
Send = Callable[[bytes], None]
Read = Callable[[int], bytes]


class Tests(remote.Peer):
    """The end of the tests. What it reads was written by code that nobody has read.

    `lost` says why the code cannot be asked any more, or is "".
    """

    def __init__(self, send: Send, read: Read) -> None:
        super().__init__(send, read)
        self.handles: dict[int, Any] = {}
        self.made: dict[int, Any] = {}
        self.lost = ""

    def ask(self, do: str, *args: Any, **options: Any) -> Any:
        if self.lost:  # a test has caught it
            raise remote.Stopped
        try:
            return super().ask(do, *args, **options)
        except (wire.Broken, BrokenPipeError):
            self.lost = "it wrote into the connection to its tests"
            raise remote.Stopped from None
        except remote.Stopped:
            self.lost = self.lost or "the code ended itself"
            raise

    def serve(self, message: dict[str, Any]) -> None:
        if message["do"] == "stopped":  # by its audit hook, which then ends it
            self.lost = f"it {message.get('what')}"
            raise remote.Stopped
        super().serve(message)

    def do(self, what: str, *args: Any, **options: Any) -> Any:
        """Return what the code may do with an object of the tests, which leads nowhere else."""
        if what == "readline":
            try:
                return f"{builtins.input()}\n"
            except EOFError:
                return ""
        if not args or id(args[0]) not in self._numbers:
            raise TypeError("that is not an object of the tests")
        private = what in ("getattr", "setattr") and str(args[1]).startswith("_")
        if what not in _allowed(args[0]) or private:
            raise AttributeError(f"the tests do not give that of a {type(args[0]).__name__}")
        return remote.DOING[what](*args, **options)

    def node_of(self, value: Any, writer: Any) -> Any:
        if isinstance(value, Handle | Remote):
            return ["own", _number(value)]
        if isinstance(value, type) and "_mmdlm_number" in vars(value):
            return ["own", vars(value)["_mmdlm_number"]]
        if isinstance(value, BaseException):
            args = tuple(one if type(one) in (str, int, float) else repr(one) for one in value.args)
            return ["error", [remote.builtin_error(type(value)), writer.child(args)]]
        allowed = _allowed(value)
        named = isinstance(value, type | types.FunctionType | types.BuiltinFunctionType)
        if not allowed or (named and value.__module__ not in (remote.TESTS, None)):
            try:  # a copy, or the same of the other end
                copied = importlib.import_module("pickle").dumps(value)
                return ["pickled", copied.decode("latin-1")]
            except Exception:
                if not allowed:
                    kind = type(value).__name__
                    raise TypeError(f"a {kind} of the tests cannot be given to the code") from None
        return ["theirs", self.keep(value)]

    def value_of(self, tag: str, payload: Any, reader: Any) -> Any:
        if tag == "theirs":
            return self.kept[payload]
        if tag == "error":
            return self._error(payload, reader)
        number, kind, *rest = payload
        if tag != "own" or type(number) is not int:
            raise wire.Broken
        if number not in self.handles:
            self.handles[number] = self._handle(number, kind, rest, reader)
        return self.handles[number]

    def mark(self, value: Any) -> Any:
        """Return the same object, as one that the tests made."""
        if not isinstance(value, Handle) or type(value)._mmdlm_single:
            return value
        number = _number(value)
        if number not in self.made:
            self.made[number] = _handle(self, number, type(value), made=True)
        return self.made[number]

    def _handle(self, number: int, kind: str, rest: list[Any], reader: Any) -> Any:
        if kind == "coroutine":
            return self._await(number)
        if kind == "object":
            mine = None if rest[0] is None else reader.child(rest[0])
            return _handle(self, number, mine if isinstance(mine, Remote) else Handle)
        name, children, error, single = rest
        bases = [reader.child(one) for one in children]
        fields = {"_mmdlm_peer": self, "_mmdlm_number": number}
        if error is not None:
            kinds = tuple(one for one in bases if not isinstance(one, Remote))
            base = getattr(builtins, error)
            if not issubclass(base, BaseException):
                raise wire.Broken
            return type(str(name), kinds or (base,), {**fields, "__str__": _told})
        kinds = tuple(one for one in bases if isinstance(one, Remote))
        return Remote(str(name), kinds or (Handle,), {**fields, "_mmdlm_single": bool(single)})

    async def _await(self, number: int) -> Any:
        return self.ask("run", _handle(self, number, Handle))

    def _error(self, payload: Any, reader: Any) -> BaseException:
        mine, module, name, text, args, attributes = payload
        kind = _error_class(module, name) if mine is None else reader.child(mine)
        if not isinstance(kind, type) or not issubclass(kind, BaseException):
            raise wire.Broken
        values = reader.child(args)
        try:
            error = kind(*values)
        except Exception:  # one with another signature
            error = kind.__new__(kind, *values)
        if mine is not None:
            error._text = str(text)  # type: ignore[attr-defined]
        for key, value in reader.child(attributes):
            if type(key) is str and not key.startswith("_"):
                setattr(error, key, value)
        return error


def _error_class(module: str, name: str) -> type[BaseException]:
    """Return an exception of the standard library; Exception where it is none."""
    kind: Any = None
    if str(module).partition(".")[0] in sys.stdlib_module_names:
        kind = importlib.import_module(module)
        for part in str(name).split("."):
            kind = getattr(kind, part, None)
    if isinstance(kind, type) and issubclass(kind, BaseException):
        return kind
    return Exception


def _told(error: Any) -> str:
    """Return what the code says that its exception says."""
    return str(vars(error).get("_text", ", ".join(map(str, error.args))))


def _allowed(value: Any) -> tuple[str, ...]:
    """Return what the code may do with an object of the tests; nothing: it gets a copy."""
    if isinstance(value, type):
        return ("call",)
    if type(value).__module__ == remote.TESTS or isinstance(value, io.IOBase):
        return ("call", "getattr", "setattr", "iter", "next", "len", "getitem")
    if callable(value):
        return ("call",)
    return ("next", "iter") if hasattr(type(value), "__next__") else ()


class Remote(type):
    """A class of the code: a class here, so that `isinstance` and names are what they are there."""

    _mmdlm_peer: Tests
    _mmdlm_number: int

    def __call__(cls, *args: Any, **options: Any) -> Any:
        return cls._mmdlm_peer.mark(cls._mmdlm_peer.ask("call", cls, *args, **options))

    def __getattr__(cls, name: str) -> Any:
        return _attribute(cls, name)

    def __iter__(cls) -> Any:
        return iter(cls._mmdlm_peer.ask("iter", cls))

    def __len__(cls) -> int:
        return int(cls._mmdlm_peer.ask("len", cls))

    def __getitem__(cls, key: Any) -> Any:
        return cls._mmdlm_peer.ask("getitem", cls, key)


class Handle:
    """An object of the code. Its methods are made below, all that ask the code alike."""

    _mmdlm_peer: Tests
    _mmdlm_number: int
    _mmdlm_made: bool  # by the tests
    _mmdlm_single = False  # of an Enum

    def __getattr__(self, name: str) -> Any:
        return _attribute(self, name)

    def __contains__(self, value: Any) -> bool:
        if self._mmdlm_made:
            return bool(self._mmdlm_peer.ask("contains", self, value))
        plain = _content(self)
        items = plain[0] if plain else iter(self)
        return any(one is value or one == value for one in items)

    def __exit__(self, kind: Any, error: Any, trace: Any) -> Any:
        return self._mmdlm_peer.ask("exit", self, error)

    def __deepcopy__(self, memory: Any) -> Any:
        return self._mmdlm_peer.ask("deepcopy", self)

    def __divmod__(self, other: Any) -> Any:
        return self // other, self % other


def _handle(peer: Tests, number: int, kind: type, *, made: bool = False) -> Any:
    handle: Any = object.__new__(kind)
    vars(handle).update(_mmdlm_peer=peer, _mmdlm_number=number, _mmdlm_made=made)
    return handle


def _number(value: Any) -> int:
    return int(value._mmdlm_number)


def _attribute(value: Any, name: str) -> Any:
    if name.startswith("__") and name not in ("__name__", "__qualname__"):
        raise AttributeError(name)
    return value._mmdlm_peer.ask("getattr", value, name)


def _content(handle: Handle) -> tuple[Any, ...]:
    """Return the plain content of a subclass of a list or number: a tuple of one, or none."""
    content = handle._mmdlm_peer.ask("plain", handle)
    if type(content) is not tuple or len(content) > 1:
        raise wire.Broken
    return content if content and type(content[0]) in remote.PLAIN else ()


def _asking(name: str) -> Callable[..., Any]:
    def method(self: Handle, *args: Any, **options: Any) -> Any:
        return self._mmdlm_peer.ask(name, self, *args, **options)

    return method


def _compared(name: str, test: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    def method(self: Handle, other: Any) -> Any:
        if isinstance(other, Handle):
            return self._mmdlm_peer.ask(name, self, other)
        content = _content(self)
        if content:
            return test(content[0], other)
        return {"eq": False, "ne": True}.get(name, NotImplemented)

    return method


def _binary(name: str, *, swapped: bool = False) -> Callable[..., Any]:
    def method(self: Handle, other: Any) -> Any:
        if not isinstance(other, Handle) and not self._mmdlm_made:
            content = _content(self)
            if not content:
                return NotImplemented
            pair = (other, content[0]) if swapped else (content[0], other)
            return remote.DOING[name](*pair)
        pair = (other, self) if swapped else (self, other)
        found = self._mmdlm_peer.ask(name, *pair)
        same = self._mmdlm_made and type(found) is type(self)
        return self._mmdlm_peer.mark(found) if same else found

    return method


for _name in (*remote.UNARY, "call", "setattr", "delattr", "enter"):
    if _name != "deepcopy":
        setattr(Handle, f"__{_name}__", _asking(_name))
for _name, _test in remote.COMPARED.items():
    setattr(Handle, f"__{_name}__", _compared(_name, _test))
for _name in remote.BINARY:
    setattr(Handle, f"__{_name}__", _binary(_name))
    setattr(Handle, f"__i{_name}__", _binary(f"i{_name}"))
    setattr(Handle, f"__r{_name}__", _binary(_name, swapped=True))


class Solution(types.ModuleType):
    """The module of the code, as the tests see it."""

    def __init__(self, peer: Tests) -> None:
        super().__init__(remote.SOLUTION)
        origins = {str(name): origin for name, origin in dict(peer.ask("names")).items()}
        public = [name for name in origins if not name.startswith("_") and name not in _builtins]
        vars(self).update(_peer=peer, _origins=origins, __all__=public)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        match self._origins.get(name):
            case [module] if module in REAL or module in ALIASES.values():
                return importlib.import_module(module)
            case [module, str(what)] if module in REAL and what == name:
                return getattr(importlib.import_module(module), name)
        return self._peer.ask("getattr", remote.SOLUTION, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._peer.ask("setattr", remote.SOLUTION, name, value)

    def __delattr__(self, name: str) -> None:
        self._peer.ask("delattr", remote.SOLUTION, name)

    def used(self, tests: ast.AST) -> dict[str, Any]:
        """Return what tests use of the code without an import; never Python's own names."""
        nodes = list(ast.walk(tests))
        names = {node.id for node in nodes if isinstance(node, ast.Name)} & self._origins.keys()
        looked_into = {
            node.value.id
            for node in nodes
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
        }
        found: dict[str, Any] = {}
        for name in names - _builtins:
            module = ALIASES.get(name, name)
            if name in looked_into and module in (*sys.stdlib_module_names, *ALIASES.values()):
                found[name] = importlib.import_module(module)
            else:
                found[name] = getattr(self, name)
        return found


_builtins = set(vars(builtins)) | {"__name__", "__builtins__"}
ALIASES = {"np": "numpy", "pd": "pandas", "numpy": "numpy", "pandas": "pandas"}
# Modules that tests may need because the code imported them; the tests get the real ones.
REAL = (
    *("bisect", "cmath", "collections", "copy", "datetime", "decimal", "fractions", "functools"),
    *("heapq", "itertools", "json", "math", "operator", "random", "re", "statistics", "string"),
    *("time", "typing"),
)
