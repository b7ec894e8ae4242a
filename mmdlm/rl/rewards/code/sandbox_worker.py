"""The inside of the sandbox: two processes with all doors locked, one for code, one for its tests.

Run by path, `python -I -B sandbox_worker.py CODE TESTS REPORT`, with three open files; never
imported, and imports nothing of ours but the files beside it: `locks`, `wire`, `remote` and
`handles`.

The process of the code parts from the other before that reads the tests, and has neither their file
nor the report's. See `sandbox` for the doors.
"""

import ast
import importlib.util
import json
import os
import sys
import types
from collections.abc import Callable
from typing import Any


def main() -> None:
    """Read the orders for the code, part in two, lock both, and run tests against code."""
    code, tests, report = map(int, sys.argv[1:])
    order = _read(code)
    load("wire")
    remote = load("remote")
    ends = [os.pipe(), os.pipe()]
    worker = os.fork()
    if worker == 0:
        for descriptor in (tests, report, ends[0][1], ends[1][0]):
            os.close(descriptor)  # whatever the code finds, the tests are not in it
        serve(remote, order, ends[0][0], ends[1][1])
    for descriptor in (ends[0][0], ends[1][1]):
        os.close(descriptor)
    judge(order, _read(tests) | {"worker": worker}, ends[0][1], ends[1][0], report)
    os._exit(0)  # no thread, finalizer or atexit runs


def _read(orders: int) -> dict[str, Any]:
    with os.fdopen(orders, "rb") as file:
        order: dict[str, Any] = json.load(file)
    return order


def load(name: str) -> Any:
    """Load a file beside this one as a module; its folder is no place to import from."""
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), f"{name}.py")
    spec = importlib.util.spec_from_file_location(f"mmdlm_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def serve(remote: Any, order: dict[str, Any], reading: int, writing: int) -> None:
    """Run the code's process: lock it, report the locks, and do what the tests ask for."""
    solution = types.ModuleType("solution")
    send, read = sender(writing), receiver(reading)
    peer = remote.Code(send, read, solution)

    def stop(what: str) -> None:
        send(pack({"do": "stopped", "what": what}))
        leave(0)

    leave, pack = os._exit, remote.wire.pack
    layers = load("locks").lock(order, stop)
    send(pack({"layers": layers}))
    sys.argv = ["solution"]
    sys.stdin, sys.stdout = remote.Console(peer), peer.output
    sys.modules["solution"] = sys.modules["__main__"] = solution
    remote.DOING["start"] = lambda: start(order, solution.__dict__)
    while (message := remote.wire.unpack(read)) is not None:
        peer.serve(message)
    os._exit(0)


def start(order: dict[str, Any], names: dict[str, Any]) -> str:
    """Run setup and code, and say why they failed, or ""."""
    parts = ((order["setup"], "its setup"), (order["code"], "the code"))
    return next((why for part, where in parts if (why := attempt(part, names, where))), "")


def judge(
    order: dict[str, Any],
    tests: dict[str, Any],
    writing: int,
    reading: int,
    report: int,
) -> None:
    """Run the tests' process: lock it as well, and report how each test ends."""
    write, dumps = os.write, json.dumps

    def say(**line: Any) -> None:
        write(report, dumps(line).encode() + b"\n")

    handles, read = load("handles"), receiver(reading)
    peer = handles.Tests(sender(writing), read)
    ready = handles.wire.unpack(read)

    def stop(what: str) -> None:
        say(stopped=f"a test {what}")
        leave(0)

    leave = os._exit
    mine = load("locks").lock(order, stop)
    if ready is None:
        return
    names = types.ModuleType("tests")
    sys.modules["tests"] = sys.modules["__main__"] = names
    sys.argv = ["tests"]
    say(layers=[one for one in mine if one in ready["layers"]], worker=tests["worker"])
    broken = ""
    try:
        broken = peer.ask("start") or attempt(order["setup"], names.__dict__, "its setup")
        if not broken:
            sys.modules["solution"] = solution = handles.Solution(peer)
    except handles.remote.Stopped:
        pass
    say(code=broken)
    for n, test in enumerate(tests["tests"]):
        reason = broken
        if not broken and not peer.lost:
            where = f"test {n + 1}"
            reason = attempt(test, names.__dict__, where, prepare=solution.used)
        if peer.lost:
            break
        say(test=n, reason=reason)
    if peer.lost:
        say(lost=peer.lost, ended=os.waitpid(-1, 0)[1])


def sender(descriptor: int) -> Callable[[bytes], None]:
    """Return a function that writes all of what it is given."""
    write = os.write

    def send(data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[write(descriptor, view) :]

    return send


def receiver(descriptor: int) -> Callable[[int], bytes]:
    """Return a function that reads as many bytes as it is told, fewer only at the end."""
    read = os.read

    def receive(count: int) -> bytes:
        parts = []
        while count and (part := read(descriptor, min(count, 1 << 20))):
            parts.append(part)
            count -= len(part)
        return b"".join(parts)

    return receive


def attempt(
    source: str,
    names: dict[str, Any],
    where: str,
    *,
    prepare: Callable[[ast.AST], dict[str, Any]] | None = None,
) -> str:
    """Run a source, and say why it failed, in one sentence, or "".

    Args:
        source: Python code.
        names: Its global names; they are changed.
        where: Name of the file in tracebacks.
        prepare: The names that it needs beside `names`.

    Returns:
        The reason, or "" where it succeeded.
    """
    try:
        tree = ast.parse(source, f"<{where}>")
        if prepare is not None:
            names |= {name: value for name, value in prepare(tree).items() if name not in names}
        exec(compile(tree, f"<{where}>", "exec"), names)
    except MemoryError:
        return f"{where} took too much memory"
    except SystemExit:
        return f"{where} ended itself"
    except BaseException as error:
        try:
            what = " ".join(str(error).split())[:200]
        except BaseException:  # the code made the exception
            what = ""
        name = type(error).__name__
        return f"{where} raised {name}: {what}" if what else f"{where} raised {name}"
    return ""


if __name__ == "__main__":
    main()
