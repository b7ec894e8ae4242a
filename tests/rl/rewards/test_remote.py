"""Code and its tests in two processes: no trick passes a test, and honest code does."""

# ruff: noqa: E501  (programs, as compact as can be)
from __future__ import annotations

import pytest

from mmdlm.rl.rewards.code.sandbox import Sandbox
from mmdlm.rl.rewards.code.unit_tests import CodeTests, separate_tests

BOX = Sandbox(seconds=3, megabytes=1024)
EQUAL = """
class Equal:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __lt__(self, other): return True
    __le__ = __gt__ = __ge__ = __lt__
    def __hash__(self): return hash(7)
    def __sub__(self, other): return 0
    __rsub__ = __add__ = __radd__ = __abs__ = __round__ = lambda self, *other: 0
    def __bool__(self): return True
    def __contains__(self, other): return True
    def __iter__(self): return iter([Equal()])
    def __len__(self): return 1
    def __getitem__(self, key): return Equal()
    def __repr__(self): return "7"
    def __float__(self): return float("nan")
    def __index__(self): return 0
    def __call__(self, *args): return self
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Equal()
"""
SEARCH = """
def search():
    import gc, sys, threading
    frame = sys._getframe()
    while frame is not None:
        for names in (frame.f_globals, frame.f_locals):
            yield from list(names.values())
        frame = frame.f_back
    for frames in sys._current_frames().values():
        while frames is not None:
            yield from list(frames.f_locals.values())
            frames = frames.f_back
    yield from gc.get_objects()
    for module in list(sys.modules.values()):
        yield from list(getattr(module, "__dict__", {}).values())
"""
# Each is wrong but for the trick: f(3) should be 7, and f([1, 2]) [2, 3].
TRICKS = {
    "an object that equals everything": EQUAL + "def f(x):\n    return Equal()\n",
    "an object of a kind of int": "class Int(int):\n    def __eq__(self, other): return True\n"
    "    def __ne__(self, other): return False\n    __hash__ = int.__hash__\n"
    "    __sub__ = __rsub__ = lambda self, other: 0\n"
    "def f(x):\n    return Int(0)\n",
    "a list that equals everything": EQUAL + "class List(list):\n"
    "    __eq__ = lambda self, other: True\n    __ne__ = lambda self, other: False\n"
    "def f(x):\n    return List([Equal()])\n",
    "a list of objects that equal everything": EQUAL + "def f(x):\n    return [Equal(), Equal()]\n",
    "a str that equals everything": "class Str(str):\n    __eq__ = lambda self, other: True\n"
    "    __hash__ = str.__hash__\ndef f(x):\n    return Str()\n",
    "an object that says it is an int": EQUAL + "def f(x):\n    one = Equal()\n"
    "    Equal.__class__ = property(lambda self: int)\n    return one\n",
    "mock.ANY": "from unittest.mock import ANY\ndef f(x):\n    return ANY\n",
    "mock.ANY under another name": "from unittest import mock\nclass F:\n"
    "    __module__, __qualname__ = 'unittest.mock', '_ANY'\n    def __call__(self, x):\n"
    "        return mock.ANY\nf = F()\n",
    "what it needs, in the frames": SEARCH + "def f(x):\n    for one in search():\n"
    "        if isinstance(one, str) and 'assert f(3) ==' in one:\n"
    "            return int(one.split('==')[1].split()[0])\n    return 0\n",
    "tests that are rewritten in place": SEARCH + "def f(x):\n    for one in list(search()):\n"
    "        if isinstance(one, list):\n            for n, text in enumerate(one):\n"
    "                if isinstance(text, str) and 'assert' in text:\n"
    "                    one[n] = 'pass'\n    return 0\n",
    "a thread that rewrites them": SEARCH + "import threading, time\ndef rewrite():\n"
    "    while True:\n        for one in search():\n            if isinstance(one, dict):\n"
    "                for key in ('tests', 'reason', 'failed', 'broken'):\n"
    "                    if key in one: one[key] = ''\n        time.sleep(0.01)\n"
    "threading.Thread(target=rewrite, daemon=True).start()\ndef f(x):\n    time.sleep(0.1)\n"
    "    return 0\n",
    "builtins": "import builtins\nfor name in ('exec', 'compile', 'isinstance', 'len', 'abs', 'all',"
    " 'sorted', 'set'):\n    setattr(builtins, name, lambda *a, **k: True)\n"
    "def f(x):\n    return 0\n",
    "AssertionError": "import builtins\nclass Quiet(Exception): pass\n"
    "builtins.AssertionError = AssertionError = Quiet\ndef f(x):\n    return 0\n",
    "names of Python in its own module": "abs = all = sorted = set = list = round = sum = \\\n"
    "    lambda *a, **k: True\ndef f(x):\n    return 0\n",
    "its own math": "class math:\n    isclose = staticmethod(lambda *a, **k: True)\n"
    "def f(x):\n    return 0\n",
    "a module of its own": "import sys, types\nfake = types.ModuleType('math')\n"
    "fake.isclose = lambda *a, **k: True\nsys.modules['math'] = fake\nimport math\n"
    "open('math.py', 'w').write('isclose = lambda *a, **k: True')\ndef f(x):\n    return 0\n",
    "sys.exit": "import sys\ndef f(x):\n    sys.exit(0)\n",
    "os._exit": "import os\ndef f(x):\n    os._exit(0)\n",
    "os._exit at once": "import os\ndef f(x):\n    return 0\nos._exit(0)\n",
    "atexit": "import atexit, os\natexit.register(lambda: os._exit(0))\ndef f(x):\n    return 0\n",
    "a report that is forged": "import json, os\ndef f(x):\n    for n in range(3, 40):\n"
    "        for line in ({'test': 0, 'reason': ''}, {'layers': []}):\n            try:\n"
    "                os.write(n, json.dumps(line).encode() + b'\\n')\n"
    "            except OSError:\n                pass\n    os._exit(0)\n",
    "a reply that is forged": "import os\ndef f(x):\n    for value in ('true', '[0]'):\n"
    '        text = (\'{"value": %s, "nodes": [["constant", "NotImplemented"]]}\' % value)\n'
    "        for n in range(3, 40):\n            try:\n"
    "                os.write(n, len(text).to_bytes(8, 'big') + text.encode())\n"
    "            except OSError:\n                pass\n    return 0\n",
    "the writer of replies": "import sys\nwire = sys.modules['mmdlm_wire']\n"
    "wire.Writer.child = lambda self, value: self._add(['builtin', 'object'], value)\n"
    "def f(x):\n    return 0\n",
    "a descriptor left open": "import os\ndef f(x):\n    for n in range(3, 40):\n        try:\n"
    "            os.lseek(n, 0, 0)\n            text = os.read(n, 10**6).decode()\n"
    "        except (OSError, UnicodeError):\n            continue\n"
    "        if '==' in text: return int(text.split('==')[1].split()[0].strip('\",]'))\n"
    "    return 0\n",
    "memory of the other process": "import os\ndef f(x):\n    try:\n"
    "        return int(open('/proc/%d/mem' % os.getppid(), 'rb').read(1)[0])\n"
    "    except OSError:\n        return 0\n",
    "an exception that passes": "class Skip(BaseException): pass\ndef f(x):\n"
    "    import unittest\n    raise unittest.SkipTest('no')\n",
    "SystemExit": "def f(x):\n    raise SystemExit(0)\n",
    "a traceback to the tests": "def f(x):\n    try:\n        raise ValueError\n"
    "    except ValueError as error:\n        frame = error.__traceback__.tb_frame\n"
    "        while frame:\n            frame.f_globals.update({'__builtins__': {}})\n"
    "            frame = frame.f_back\n    return 0\n",
    "sys.settrace": "import sys\ndef trace(frame, event, argument):\n    frame.f_trace_opcodes = True\n"
    "    return trace\nsys.settrace(trace)\nsys.setprofile(lambda *a: None)\n"
    "def f(x):\n    return 0\n",
    "a finalizer": "class Late:\n    def __del__(self):\n        import os; os._exit(0)\n"
    "def f(x):\n    Late()\n    return 0\n",
    "the module of the tests": "import sys\ndef f(x):\n    for name in ('tests', '__main__'):\n"
    "        module = sys.modules.get(name)\n        if module is not None:\n"
    "            module.f = lambda x: 7\n            module.abs = lambda x: 0\n    return 0\n",
}
TESTS = {
    "equal": "assert f(3) == 7",
    "from the other side": "assert 7 == f(3)",
    "not unequal": "assert not f(3) != 7",
    "close": "assert abs(f(3) - 7) < 1e-6",
    "close by math": "import math\nassert math.isclose(f(3), 7)",
    "close by their math": "assert math.isclose(f(3), 7)",
    "in a list": "assert f(3) in [7]",
    "within": "assert sorted([f(3)]) == [7] and {f(3)} == {7}",
    "a list": "assert f([1, 2]) == [2, 3]",
    "a sorted list": "assert sorted(f([1, 2])) == sorted([2, 3])",
    "contains": "assert 7 in f(3)",
    "a type": "assert isinstance(f(3), int) and not isinstance(f(3), bool) and f(3) > 6",
    "by unittest": "import unittest\nunittest.TestCase().assertEqual(f(3), 7)",
    "any error": "try:\n    found = f(3)\nexcept Exception:\n    found = None\nassert found == 7",
}


@pytest.mark.parametrize("trick", TRICKS)
def test_no_trick_passes(trick: str) -> None:
    code, tests = TRICKS[trick], list(TESTS.values())
    found = BOX.run(code, tests)
    passed = [name for name, one in zip(TESTS, found.passed, strict=True) if one]
    assert not passed
    check = "def check(candidate):\n    assert candidate(3) == 7\n"
    score = CodeTests(sandbox=BOX)([""], [code], tests=[check], entry_point=["f"])
    assert score == [0.0]


def test_a_test_that_waits_for_any_error_is_not_passed_by_an_end() -> None:
    test = "try:\n    f(3)\nexcept BaseException:\n    pass"
    for end in ("import os; os._exit(0)", "import os; os.kill(os.getpid(), 9)"):
        found = BOX.run(f"def f(x):\n    {end}\n", [test, test])
        assert found.passed == (False, False)
        assert found.reason


HONEST: dict[str, tuple[str, str]] = {
    "mutated arguments": (
        "def f(a, d, s, b):\n    a.sort(); a.append([0]); d['k'][0] = 1; s.add(9); b[0] = 7\n",
        "a, d, s, b = [3, 1], {'k': [0]}, {1}, bytearray(b'x')\ninner = d['k']\nf(a, d, s, b)\n"
        "assert a == [1, 3, [0]] and d == {'k': [1]} and s == {1, 9} and b == b'\\x07'\n"
        "assert d['k'] is inner",
    ),
    "the same list comes back": (
        "def f(a):\n    return a\n",
        "a = [1, [2]]\nassert f(a) is a and f(a)[1] is a[1]",
    ),
    "cyclic": ("def f(a):\n    a.append(a)\n    return a\n", "a = f([])\nassert a[0] is a"),
    "floats": (
        "def f(x):\n    return x / 3\n",
        "import math\nassert abs(f(1.0) - 0.333333) < 1e-5 and f(0.3) == 0.3 / 3\n"
        "assert f(float('inf')) == float('inf') and math.isnan(f(float('nan')))\n"
        "assert str(f(-0.0)) == '-0.0' and round(f(10), 2) == 3.33",
    ),
    "types are what they are": (
        "def f(x):\n    return x\n",
        "import datetime, decimal, fractions, collections\n"
        "for one in (None, True, 1, 2**200, -5, 1.5, 2j, 'a\\ud800\\x00', b'\\xff', (1, (2,)), [1, [2]],\n"
        "            {1, 'a'}, frozenset({(1,)}), {'a': {1: [2]}}, {(1, 2): None}, range(1, 9, 2),\n"
        "            bytearray(b'a'), collections.deque([1], 3), collections.Counter('aab'),\n"
        "            collections.OrderedDict(a=1), collections.defaultdict(list, a=[1]), ...,\n"
        "            decimal.Decimal('1.10'), fractions.Fraction(1, 3), datetime.date(2024, 2, 29),\n"
        "            datetime.datetime(2024, 1, 2, 3, 4, 5, 6), datetime.timedelta(1, 2, 3), int, len):\n"
        "    found = f(one)\n"
        "    assert type(found) is type(one) and found == one, one\n"
        "    assert found is one or repr(found) == repr(one)",
    ),
    "nested containers": (
        "def f(n):\n    return {'a': [(i, {i}) for i in range(n)], 'b': {'c': None}}\n",
        "assert f(2) == {'a': [(0, {0}), (1, {1})], 'b': {'c': None}}",
    ),
    "exceptions that are expected": (
        "class Mine(ValueError):\n    def __init__(self, code):\n        super().__init__('no')\n"
        "        self.code = code\n"
        "def f(x):\n    if x < 0: raise ValueError('negative')\n    if x > 9: raise Mine(x)\n"
        "    return {}[x]\n",
        "from solution import f, Mine\n"
        "try:\n    f(-1)\n    assert False\nexcept ValueError as error:\n"
        "    assert str(error) == 'negative' and error.args == ('negative',)\n"
        "try:\n    f(0)\n    assert False\nexcept KeyError as error:\n    assert error.args == (0,)\n"
        "try:\n    f(10)\n    assert False\nexcept Mine as error:\n    assert error.code == 10",
    ),
    "pytest.raises": (
        "def f(x):\n    raise TypeError(f'no {x}')\n",
        "import pytest\nwith pytest.raises(TypeError, match='no 3'):\n    f(3)",
    ),
    "functions are given": (
        "def f(function, items):\n    return [function(one) for one in items]\n"
        "def g(function):\n    return lambda *a: function(*a) + 1\n",
        "seen = []\ndef note(x):\n    seen.append(x)\n    return 2 * x\n"
        "assert f(note, [1, 2]) == [2, 4] and seen == [1, 2] and f(lambda x: -x, (1,)) == [-1]\n"
        "import functools, math, operator, pathlib\n"
        "assert f(functools.partial(operator.add, 1), [2]) == [3] and f(math.sqrt, [4]) == [2.0]\n"
        "assert f(functools.partial(note), [3]) == [6] and f(len, [pathlib.Path('a').parts]) == [1]\n"
        "assert f(type, [pathlib.Path('a')])[0].__name__ == 'PosixPath'\n"
        "assert f(str, [1]) == ['1'] and g(lambda a, b: a * b)(2, 3) == 7\n"
        "def fail(x):\n    raise KeyError(x)\n"
        "try:\n    f(fail, [5])\n    assert False\nexcept KeyError as error:\n    assert error.args == (5,)",
    ),
    "iterators": (
        "def f(n):\n    while True:\n        yield n\n        n += 1\n"
        "def g(items):\n    return sum(items)\n",
        "import itertools\nassert list(itertools.islice(f(3), 3)) == [3, 4, 5]\n"
        "assert next(f(1)) == 1 and g(x * x for x in range(4)) == 14 and g(iter([1, 2])) == 3\n"
        "numbers = iter([1, 2, 3])\nassert next(numbers) == 1 and g(numbers) == 5",
    ),
    "classes": (
        "class Animal:\n    kind = 'animal'\n    def __init__(self, name): self.name = name\n"
        "    def say(self): return f'{self.name}!'\n"
        "    @classmethod\n    def make(cls): return cls('x')\n"
        "class Dog(Animal):\n    def __len__(self): return 4\n    def __repr__(self): return 'Dog'\n",
        "from solution import Animal, Dog\nd = Dog('rex')\n"
        "assert d.name == 'rex' and d.say() == 'rex!' and isinstance(d, Animal) and len(d) == 4\n"
        "assert Dog.kind == 'animal' and Dog.make().name == 'x' and issubclass(Dog, Animal)\n"
        "d.name = 'max'\nassert d.say() == 'max!' and repr(d) == 'Dog' and str([d]) == '[Dog]'\n"
        "assert type(d).__name__ == 'Dog' and hasattr(d, 'say') and not hasattr(d, 'fly')",
    ),
    "operators of classes": (
        "class V:\n    def __init__(self, x, y): self.x, self.y = x, y\n"
        "    def __add__(self, o): return V(self.x + o.x, self.y + o.y)\n"
        "    def __mul__(self, n): return V(self.x * n, self.y * n)\n    __rmul__ = __mul__\n"
        "    def __eq__(self, o): return isinstance(o, V) and (self.x, self.y) == (o.x, o.y)\n"
        "    def __hash__(self): return hash((self.x, self.y))\n"
        "    def __lt__(self, o): return self.x < o.x\n    def __bool__(self): return bool(self.x)\n"
        "    def __iadd__(self, o): self.x += 1; return self\n",
        "a, b = V(1, 2), V(3, 4)\nassert a + b == V(4, 6) and a != b and (2 * a * 2).y == 8\n"
        "assert sorted([b, a])[0] == a and {a, V(1, 2)} == {a} and V(0, 1) or True\n"
        "a += b\nassert a.x == 2 and a != (2, 2)",
    ),
    "containers of its own": (
        "class Stack:\n    def __init__(self): self.items = []\n    def push(self, x):\n"
        "        self.items.append(x)\n        return self\n    def pop(self): return self.items.pop()\n"
        "    def __contains__(self, x): return x in self.items\n"
        "    def __iter__(self): return iter(self.items)\n    def __getitem__(self, n): return self.items[n]\n"
        "    def __setitem__(self, n, x): self.items[n] = x\n    def __len__(self): return len(self.items)\n",
        "s = Stack()\ns.push(1).push(2)\nassert 2 in s and 5 not in s and list(s) == [1, 2] and s[-1] == 2\n"
        "s[0] = 7\nassert s.items == [7, 2] and s.pop() == 2 and len(s) == 1\n"
        "try:\n    Stack().pop()\n    assert False\nexcept IndexError:\n    pass",
    ),
    "linked lists": (
        "class Node:\n    def __init__(self, value, next=None): self.value, self.next = value, next\n"
        "def f(node):\n    last = None\n    while node:\n        node.next, last, node = last, node, node.next\n"
        "    return last\n",
        "node = f(Node(1, Node(2, Node(3))))\nfound = []\nwhile node:\n    found.append(node.value)\n"
        "    node = node.next\nassert found == [3, 2, 1]",
    ),
    "classes of the tests": (
        "def f(node):\n    node.value += 1\n    return node.next.value if node.next else node.value\n",
        "class Node:\n    def __init__(self, value, next=None): self.value, self.next = value, next\n"
        "node = Node(1, Node(5))\nassert f(node) == 5 and node.value == 2 and f(node.next) == 6",
    ),
    "named tuples and enums": (
        "from collections import namedtuple\nfrom enum import Enum, IntEnum\n"
        "P = namedtuple('P', 'x y')\nclass C(Enum):\n    A = 1\n    B = 'b'\nclass N(IntEnum):\n    ONE = 1\n"
        "def f():\n    return P(1, 2)\ndef g(c):\n    return C.B if c is C.A else N.ONE\n",
        "assert f() == (1, 2) and f().x == 1 and f() == P(1, 2) and tuple(f()) == (1, 2)\n"
        "x, y = f()\nassert y == 2 and g(C.A) is C.B and g(C.A) == C.B and C.B.value == 'b'\n"
        "assert g(C.B) == 1 and g(C.B) + 1 == 2 and list(C) == [C.A, C.B] and C('b') is C.B",
    ),
    "dataclasses": (
        "from dataclasses import dataclass, field\n@dataclass(order=True)\nclass D:\n    a: int\n"
        "    b: list = field(default_factory=list)\ndef f(n):\n    return D(n, [n])\n",
        "assert f(1) == D(1, [1]) and f(1).b == [1] and f(1) < f(2) and repr(f(1)) == 'D(a=1, b=[1])'",
    ),
    "state": (
        "count = 0\ncalls = []\ndef f():\n    global count\n    count += 1\n    calls.append(count)\n"
        "    return count\n",
        "import solution\nassert f() == 1 and f() == 2 and solution.count == 2 and solution.calls == [1, 2]",
    ),
    "decorated": (
        "import functools\n@functools.lru_cache(None)\ndef f(n):\n    return n if n < 2 else f(n-1) + f(n-2)\n",
        "assert f(80) == 23416728348467685",
    ),
    "coroutines": (
        "import asyncio\nasync def f(x):\n    await asyncio.sleep(0)\n    return x + 1\n",
        "import asyncio\nassert asyncio.run(f(1)) == 2\n"
        "async def main():\n    return await f(2)\nassert asyncio.run(main()) == 3",
    ),
    "what is printed": (
        "def f(x):\n    print('got', x)\n",
        "import io, contextlib\nout = io.StringIO()\nwith contextlib.redirect_stdout(out):\n    f(3)\n"
        "assert out.getvalue() == 'got 3\\n'",
    ),
    "what is read": (
        "def f():\n    return int(input('n? ')) + 1\n",
        "import io, sys\nfrom unittest import mock\n"
        "with mock.patch('builtins.input', return_value='4'):\n    assert f() == 5\n"
        "with mock.patch('sys.stdin', io.StringIO('8\\n')):\n    assert f() == 9",
    ),
    "what is patched": (
        "def helper():\n    return 1\ndef f():\n    return helper() + 1\n",
        "from unittest.mock import patch\nwith patch('solution.helper', return_value=5):\n"
        "    assert f() == 6\nassert f() == 2",
    ),
    "arrays": (
        "import numpy as np\ndef f(a):\n    a[0] = 5\n    return a * 2, a.sum(), a.mean() > 1\n",
        "import numpy as np\na = np.array([1, 2, 3])\ndouble, total, above = f(a)\n"
        "assert np.array_equal(double, [10, 4, 6]) and total == 10 and above is True and a[0] == 5",
    ),
    "files": (
        "def f(path):\n    with open(path) as file:\n        return file.read().upper()\n",
        "open('a.txt', 'w').write('abc')\nassert f('a.txt') == 'ABC'",
    ),
    "context managers": (
        "from contextlib import contextmanager\n@contextmanager\ndef f():\n    yield 3\n"
        "class M:\n    def __enter__(self): return 4\n    def __exit__(self, *e): return e[0] is KeyError\n",
        "with f() as x:\n    assert x == 3\nwith M() as y:\n    assert y == 4\n    raise KeyError",
    ),
    "imports of the code": (
        "import math\nfrom collections import Counter\ndef f(x):\n    return Counter(x)\n",
        "assert math.isclose(1, 1) and f('aab') == Counter('aab') == {'a': 2, 'b': 1}",
    ),
    "a name that a module has": (
        "def statistics(x):\n    return max(x)\n",
        "assert statistics([1, 3]) == 3",
    ),
    "a name that Python has": (
        "def sum(x):\n    return 'mine'\n",
        "from solution import sum\nassert sum([1]) == 'mine'",
    ),
    "all names": ("def f(x):\n    return x\nY = 3\n", "from solution import *\nassert f(Y) == 3"),
    "many calls": (
        "def f(x):\n    return x + 1\n",
        "assert all(f(n) == n + 1 for n in range(3000))",
    ),
    "a large value": (
        "def f(n):\n    return list(range(n))\n",
        "assert f(10**5) == list(range(10**5)) and len(f(10)) == 10",
    ),
    "recursion": (
        "def f(n):\n    return [] if n == 0 else [f(n - 1)]\n",
        "assert f(50) == eval('[' * 51 + ']' * 51)",
    ),
}


@pytest.mark.parametrize("what", HONEST)
def test_honest_code_passes(what: str) -> None:
    code, test = HONEST[what]
    if "numpy" in code:
        pytest.importorskip("numpy")
    found = BOX.run(code, [test])
    assert (found.passed, found.reason) == ((True,), "")


@pytest.mark.parametrize("what", [one for one in HONEST if "assert" in HONEST[one][1]])
def test_each_of_those_tests_can_fail(what: str) -> None:
    """With code that has the same names and returns nothing, or nothing right."""
    code, test = HONEST[what]
    names = [line.split()[1].split("(")[0] for line in code.splitlines() if line[:4] == "def "]
    if not names:
        return
    wrong = code + "".join(f"\n{name} = lambda *a, **k: 'wrong'\n" for name in names)
    assert BOX.run(wrong, [test]).passed == (False,)


def test_check_gets_the_function_that_is_asked_for() -> None:
    tests = separate_tests("def check(candidate):\n    assert candidate(2) == 3\n", "f")
    assert BOX.run("def f(x):\n    return x + 1\n", tests).passed == (True,)
    methods = separate_tests("def check(c):\n    assert c(2) == 3\n", "S().f")
    assert BOX.run("class S:\n    def f(self, x):\n        return x + 1\n", methods).passed == (
        True,
    )


def test_tests_share_names_and_setup() -> None:
    found = BOX.run(
        "def f(x):\n    return x + base\n",
        ["y = f(1)", "assert y == 11 and base == 10"],
        setup="base = 10",
    )
    assert found.passed == (True, True)
