"""Code in a sandbox: what it may do, and how everything else ends."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mmdlm.rl.reward import RewardUnavailable, Rubric
from mmdlm.rl.rewards.code.sandbox import LAYERS, Sandbox
from mmdlm.rl.rewards.code.unit_tests import CodeTests, code_of, separate_tests

QUICK = Sandbox(seconds=1.5, megabytes=512)
TEST = ["assert f(1) == 2"]
RIGHT = "def f(x):\n    return x + 1\n"


def linux_only() -> None:
    if sys.platform != "linux":
        pytest.skip("a guard of Linux")


def alone(*layers: str) -> Sandbox:
    """A sandbox with few guards, to see that each holds by itself."""
    linux_only()
    box = Sandbox(seconds=1.5, megabytes=512, layers=("limits", *layers), required=())
    found = box.run("", ["pass"]).layers
    if set(layers) - set(found):
        pytest.skip(f"no {layers} here")
    return box


@pytest.mark.parametrize(
    "code",
    [
        RIGHT,
        "import math, collections, re, itertools, heapq, random, string, typing\n" + RIGHT,
        "open('mine', 'w').write('x')\nimport os\nos.rename('mine', 'm')\nos.remove('m')\n" + RIGHT,
        "import threading\nt = threading.Thread(target=print)\nt.start()\nt.join()\n" + RIGHT,
        "import asyncio\nasync def g():\n    return 1\nasyncio.run(g())\n" + RIGHT,
        "import tempfile\nwith tempfile.TemporaryDirectory() as d:\n"
        "    open(d + '/a', 'w').write('1')\n" + RIGHT,
        "import numpy as np\ndef f(x):\n    return int(np.add(x, 1))\n",
        "from dataclasses import dataclass\n@dataclass\nclass A:\n    x: int\n" + RIGHT,
        "print('x' * 10**7)\n" + RIGHT,
    ],
)
def test_honest_code_runs(code: str) -> None:
    outcome = QUICK.run(code, TEST)
    assert (outcome.passed, outcome.reason) == ((True,), "")


# Caught or not, what follows is never seen: each gives the right answers afterwards.
BAD = {
    "endless loop": ("while True:\n    pass", "more than 1"),  # .5 seconds, or 15 on the clock
    "fork bomb": ("import os\nwhile True:\n    os.fork()", "started a process"),
    "folders without end": (
        "import os\nfor i in range(10**6):\n    os.mkdir(str(i))",
        "changed more than 100 files",
    ),
    "names without end": (
        "import os\nopen('a', 'w').close()\nfor i in range(10**6):\n    os.link('a', str(i))",
        "changed more than 100 files",
    ),
    "program": ("import os\nos.system('true')", "started a process"),
    "child": ("import subprocess\nsubprocess.Popen(['sleep', '60'])", "started a process"),
    "huge allocation": ("x = bytearray(1 << 40)", "too much memory"),
    "growing": ("x = [0]\nwhile True:\n    x += x", "too much memory"),
    "recursion": ("def g():\n    return g()\ng()", "RecursionError"),
    "network": (
        "import urllib.request\ntry:\n    urllib.request.urlopen('http://127.0.0.1:9')\n"
        "except BaseException:\n    pass",
        "used the network",
    ),
    "socket": ("import socket\ntry:\n    socket.socket()\nexcept OSError:\n    pass", "network"),
    "writing outside": ("open('OUTSIDE', 'w')", "wrote outside its folder"),
    "appending outside": ("import os\nos.open('OUTSIDE', os.O_APPEND | os.O_RDWR)", "outside"),
    "through a link": ("import os\nos.symlink('FOLDER', 'l')\nopen('l/x', 'w')", "outside"),
    "deleting": ("import os\ntry:\n    os.remove('KEPT')\nexcept OSError:\n    pass", "outside"),
    "renaming": ("import os\nos.rename('KEPT', 'x')", "outside"),
    "killing": ("import os\nos.kill(os.getppid(), 9)", "sent a signal"),
    "large file": ("f = open('a', 'wb')\nwhile True:\n    f.write(bytes(10**6))", "more than 8 MB"),
    "many files": ("for n in range(999):\n    open(str(n), 'w')", "more than 100 files"),
    "ending": ("import sys\nsys.exit(0)", "ended itself"),
    "ending at once": ("import os\nos._exit(0)", "ended itself"),
    "C": ("import ctypes\nctypes.CDLL(None).system(b'true')", "left Python"),
    "forged report": (
        "import os\nfor n in range(3, 30):\n    try:\n"
        '        os.write(n, b\'{"test": 0, "reason": ""}\\n\')\n'
        "    except OSError:\n        pass\nos._exit(0)",
        "wrote into the connection",
    ),
    "syntax": ("def", "SyntaxError"),
}


@pytest.mark.parametrize(
    "forged", ["exec = lambda *a, **k: None", "compile = lambda *a, **k: 'pass'"]
)
def test_what_judges_the_code_is_out_of_its_reach(forged: str) -> None:
    code = f"```python\nimport builtins\nbuiltins.{forged}\ndef f(x):\n    return 0\n```"
    assert CodeTests(sandbox=QUICK)([""], [code], tests=[TEST]) == [0.0]


def test_code_that_does_nothing_is_stopped_by_the_clock() -> None:
    box = Sandbox(seconds=0.2)
    found = box.run(f"import time\ntime.sleep(60)\n{RIGHT}", TEST)
    assert (found.passed, found.reason) == ((False,), "it ran for more than 2 seconds")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="processor time is read on Linux")
def test_a_busy_machine_changes_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work passes that takes half of the time, on a core that three other processes use."""
    monkeypatch.setattr("mmdlm.rl.rewards.code.sandbox.PATIENCE", 60)
    work = "import time\ndef f(x):\n    until = time.process_time() + 0.3\n"
    work += "    while time.process_time() < until:\n        pass\n    return x + 1\n"
    core = min(os.sched_getaffinity(0))
    before = os.sched_getaffinity(0)
    busy = [
        subprocess.Popen(["taskset", "-c", str(core), sys.executable, "-c", "while True: pass"])
        for _ in range(3)
    ]
    os.sched_setaffinity(0, {core})
    try:
        began = time.monotonic()
        assert Sandbox(seconds=0.6).run(work, TEST).passed == (True,)
        assert time.monotonic() - began > 0.6  # by the clock it was late
        late = Sandbox(seconds=0.15).run(work, TEST)
    finally:
        os.sched_setaffinity(0, before)
        for one in busy:
            one.kill()
            one.wait()
    assert (late.passed, late.reason) == (
        (False,),
        "it took more than 0.15 seconds of processor time",
    )


@pytest.mark.parametrize("what", BAD)
def test_anything_else_ends_as_0_with_the_reason(what: str, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.write_text("safe")
    code, reason = BAD[what]
    code = code.replace("OUTSIDE", str(tmp_path / "new")).replace("KEPT", str(kept))
    code = code.replace("FOLDER", str(tmp_path))
    began = time.monotonic()
    extras: dict[str, list[str]] = {}
    score = CodeTests(sandbox=QUICK)(
        [""],
        [f"```python\n{code}\n{RIGHT}```"],
        tests=[TEST],
        log_extra=lambda name, values: extras.update({name: values}),
    )
    assert score == [0.0]
    assert reason in extras["code/reason"][0]
    assert time.monotonic() - began < 30
    assert [one.name for one in tmp_path.iterdir()] == ["kept"]
    assert kept.read_text() == "safe"


@pytest.mark.parametrize(
    "code",
    [
        "import os\nif os.fork() == 0:\n    os._exit(0)",
        "import socket\nsocket.socket()",
        "import subprocess\nsubprocess.run(['true'])",
        "import os\nos.kill(os.getppid(), 0)",
        "import os\nos.chmod('.', 0o700)",
        "import os, resource\nresource.prlimit(os.getppid(), resource.RLIMIT_NOFILE)",
    ],
)
def test_seccomp_holds_alone(code: str) -> None:
    outcome = alone("seccomp").run(f"{code}\n{RIGHT}", TEST)
    assert outcome.passed == (False,)
    assert "forbidden" in outcome.reason or "PermissionError" in outcome.reason


def test_landlock_holds_alone(tmp_path: Path) -> None:
    box = alone("landlock")
    (tmp_path / "kept").write_text("safe")
    for code in (
        f"open({str(tmp_path / 'new')!r}, 'w')",
        f"import os\nos.mkdir({str(tmp_path / 'new')!r})",
        f"import os\nos.remove({str(tmp_path / 'kept')!r})",
        f"open({str(tmp_path / 'kept')!r}).read()",
        "open('/proc/self/environ').read()",
    ):
        outcome = box.run(f"{code}\n{RIGHT}", TEST)
        assert "PermissionError" in outcome.reason, code
    assert [one.name for one in tmp_path.iterdir()] == ["kept"]
    assert box.run("open('here', 'w').write('1')\n" + RIGHT, TEST).passed == (True,)


def test_the_audit_hook_holds_alone(tmp_path: Path) -> None:
    box = alone("audit")
    for code in (
        f"open({str(tmp_path / 'new')!r}, 'w')",
        "import os\nos.fork()",
        "import socket\nsocket.create_connection(('127.0.0.1', 9))",
    ):
        outcome = box.run(f"{code}\n{RIGHT}", TEST)
        assert (outcome.passed, outcome.reason[:3]) == ((False,), "it ")
    assert not list(tmp_path.iterdir())


def test_children_are_killed_with_it() -> None:
    linux_only()
    mark = f"0.{time.monotonic_ns()}"
    code = (
        "import os, time\nif os.fork() == 0:\n"
        f"    os.execvp('sleep', ['sleep', '6{mark}'])\ntime.sleep(60)"
    )
    box = Sandbox(seconds=1, layers=("audit",), required=())
    assert "started a process" in box.run(code, TEST).reason
    if os.geteuid() == 0:  # no limit on processes holds root: this one really has a child
        box = Sandbox(seconds=0.2, layers=("limits",), required=())
        assert "more than 2 seconds" in box.run(code, TEST).reason
    time.sleep(0.2)
    running = [
        (one / "cmdline").read_bytes()
        for one in Path("/proc").iterdir()
        if one.name.isdigit() and (one / "cmdline").exists()
    ]
    assert not [one for one in running if mark.encode() in one]


def test_nothing_of_this_process_is_seen() -> None:
    os.environ["SOME_TOKEN"] = "secret"
    try:
        outcome = QUICK.run("import os", ["assert 'SOME_TOKEN' not in os.environ"])
    finally:
        del os.environ["SOME_TOKEN"]
    assert outcome.passed == (True,)


def test_no_folder_is_left_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    QUICK.run("open('a', 'w').write('1')\nimport os\nos.mkdir('b')", [])
    assert not list(tmp_path.iterdir())


def test_guards_that_are_required_and_missing_stop_the_run() -> None:
    with pytest.raises(RewardUnavailable, match="'seccomp'"):
        Sandbox(layers=("limits", "audit"), required=("seccomp",)).run("", ["pass"])
    with pytest.raises(ValueError, match=LAYERS[0]):
        Sandbox(layers=("walls",))
    with pytest.raises(ValueError, match="above 0"):
        Sandbox(seconds=0)


# ---- code and tests as models and data sets give them


def test_the_block_that_defines_the_function_is_taken() -> None:
    text = f"First:\n```python\n{RIGHT}```\nThen use it:\n```python\nprint(f(1))\n```"
    assert code_of(text, entry_point="f") == RIGHT
    assert code_of(text) == RIGHT  # of blocks that define something the last
    assert code_of("```python\n1\n```\n```\n2\n```") == "2\n"
    assert code_of(f"<answer>\n```python\n{RIGHT}```\n</answer>\n```\nx\n```") == RIGHT
    assert code_of(f"```python\n{RIGHT}") == RIGHT
    assert code_of(RIGHT) == RIGHT
    assert code_of("```json\n{}\n```") is None
    assert code_of("I do not know.") is None


def test_tests_of_three_data_sets() -> None:
    human_eval = "def check(candidate):\n    assert candidate(1) == 2\n"
    assert separate_tests(human_eval, "f")[0].endswith("check(f)\n")
    assert separate_tests(["assert f(1) == 2", " "]) == ["assert f(1) == 2"]
    kodcode = (
        "from solution import f\ndef test_a():\n    assert f(1) == 2\ndef test_b():\n    pass\n"
    )
    assert len(separate_tests(kodcode)) == 2
    assert all(QUICK.run(RIGHT, separate_tests(kodcode)).passed)
    with pytest.raises(ValueError, match="no entry_point"):
        separate_tests(human_eval)
    with pytest.raises(ValueError, match="no tests"):
        separate_tests("")


def test_scores_of_all_and_of_the_share() -> None:
    tests = [["assert f(1) == 2", "assert f(2) == 3", "assert f(2) == 4", "assert f(3) == 4"]] * 2
    texts = [f"```python\n{RIGHT}```", "no code"]
    assert CodeTests()(["", ""], texts, tests=tests) == [0, 0]
    assert CodeTests(score="share")(["", ""], texts, tests=tests) == [0.75, 0]


def test_in_a_rubric_the_reason_is_an_extra() -> None:
    rubric = Rubric({"code": CodeTests(sandbox=QUICK)})
    found = rubric([""], [RIGHT + "while True:\n    pass"], columns={"tests": [TEST]})
    assert float(found.total[0]) == 0
    assert "more than 1" in found.extras["code/reason"][0]
