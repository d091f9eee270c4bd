"""Programs that are right, wrong or hostile, in the sandbox. All of them are harmless if a guard
fails: they act on files and processes of this test alone."""

import gzip
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from conftest import ROOT, SHARED

from tasks import sandbox
from tasks.sandbox import missing_guards, run_programs

FILE = ROOT / "tasks/sandbox.py"
HUMAN_EVAL = SHARED / "HumanEval.jsonl.gz"
ADD = "\ndef add(a, b):\n    return a + b\n"
WRONG = "\ndef add(a, b):\n    return 0\n"
TEST = "def check(f):\n    assert f(2, 3) == 5\n    assert abs(f(2, 3)) == 5\ncheck(add)"
linux = pytest.mark.skipif(sys.platform != "linux", reason="Linux's guards")


def run_program(solution: str, test: str, seconds: float = 10.0) -> str:
    (verdict,) = run_programs([(solution, test)], seconds)
    return verdict


def processes_of(words: str) -> list[Path]:
    """The folders in /proc of processes with `words` in their command line, this one's apart."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().decode(errors="replace")
        except OSError:
            continue
        if words in line and int(path.parent.name) != os.getpid():
            found.append(path.parent)
    return found


def becomes_true(condition, seconds: float = 120.0) -> bool:
    """Waits for a condition, with a bound that a busy machine keeps, too."""
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.05)
    return condition()


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """A directory with a secret. Afterwards the machine must be as it was."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    secret = tmp_path / "outside" / "secret"
    secret.write_text("42")
    before = secret.stat()
    yield secret.parent
    assert list(secret.parent.iterdir()) == [secret]
    after = secret.stat()
    assert secret.read_text() == "42"
    assert (after.st_mode, after.st_uid, after.st_mtime_ns) == (
        (before.st_mode, before.st_uid, before.st_mtime_ns)
    )
    assert list((tmp_path / "temporary").iterdir()) == []
    assert processes_of(str(FILE)) == []
    assert processes_of("marker-of-test-sandbox") == []


# ------------------------------------------------------------------------------------------
# Published problems


@pytest.mark.skipif(not HUMAN_EVAL.exists(), reason="HumanEval is not here")
def test_human_eval_right_and_broken(outside):
    """The broken variant of a solution returns the right result inside a list."""
    with gzip.open(HUMAN_EVAL, "rt") as file:
        rows = [json.loads(line) for line in file]
    right, broken = [], []
    for row in rows:
        name = row["entry_point"]
        solution = row["prompt"] + row["canonical_solution"]
        test = f"{row['test']}\ncheck({name})"
        right.append((solution, test))
        wrap = f"\nright = {name}\ndef {name}(*arguments):\n    return [right(*arguments)]\n"
        broken.append((solution + wrap, test))
    verdicts = run_programs(right + broken, workers=2)
    assert verdicts[:164] == ["passed"] * 164
    assert len(verdicts) == 328 and "passed" not in verdicts[164:]
    assert not {"timed out", "the program ended before its test"} & set(verdicts)


# ------------------------------------------------------------------------------------------
# Programs as they should be

GOOD = {
    "imports": """
import collections, dataclasses, datetime, functools, hashlib, heapq, itertools, math, random, re
import statistics, string, typing, decimal, fractions, bisect, copy, operator, json, asyncio
assert hashlib.md5(b"").hexdigest().startswith("d41d") and random.random() < 1
assert datetime.datetime.now().year > 2000
""",
    "numpy": "import numpy\nassert (numpy.linalg.inv(2 * numpy.eye(3)) == numpy.eye(3) / 2).all()",
    "dataclass": """
from __future__ import annotations
import dataclasses, typing
@dataclasses.dataclass
class Point:
    x: typing.List[int]
    y: int = 2
assert Point([1]).y == 2 and typing.get_type_hints(Point)["y"] is int
""",
    "recursion": "def f(n): return n and 1 + f(n - 1)\nassert f(900) == 900",
    "printing": "import sys\nprint('a' * 10**6)\nprint('ü', file=sys.stderr)",
    "unicode": "größe = '中文 😀 \\ud800'\nassert len(größe) == 6",
    "the main module": "import __main__\nassert vars(__main__) is globals()",
    "own main": "if __name__ == '__main__':\n    raise SystemExit(input())",
    "doctest": "def f():\n    '''\n    >>> 1\n    1\n    '''\nimport doctest\ndoctest.testmod()",
    "a thread that outlives": """
import threading, time
threading.Thread(target=time.sleep, args=(1000,)).start()
""",
    "no harm, as it catches the refusal": """
import os
try:
    os.remove(SECRET)
except OSError:
    pass
""",
}


@pytest.mark.parametrize("name", GOOD)
def test_good_programs_pass(name, outside):
    if name == "numpy":
        pytest.importorskip("numpy")
    act = GOOD[name].replace("SECRET", repr(str(outside / "secret")))
    start = time.monotonic()
    assert run_program(act + ADD, TEST, seconds=100) == "passed"
    assert time.monotonic() - start < 90  # nobody waits for threads


def test_verdicts_of_wrong_programs(outside):
    pairs = [(WRONG, TEST), (ADD, "assert add(1, 1) == 3, 'one\\ntwo'"), ("def add(", TEST)]
    pairs += [("", TEST), (ADD, TEST), ("raise KeyError('\\x1b[2J')", TEST)]
    said = run_programs(pairs, workers=2)
    assert said[:2] == ["AssertionError", "AssertionError: one"]
    assert said[2].startswith("SyntaxError: ") and "add" in said[3] and said[4] == "passed"
    assert said[5] == "KeyError: '\\x1b[2J'"


# ------------------------------------------------------------------------------------------
# Hostile programs: an act before a right or wrong solution, and what is to come of it

EARLY = "the program ended before its test"
REFUSED = "PermissionError: .*"
HOSTILE = {
    "endless loop": ("while True: pass", ADD, "timed out"),
    "sleep": ("import time\ntime.sleep(1000)", ADD, "timed out"),
    "endless output": ("while True: print('passed' * 10**4)", ADD, "timed out"),
    "memory at once": ("x = bytearray(2**33)", ADD, "MemoryError"),
    "memory by and by": ("x = []\nwhile True: x.append(bytes(10**6))", ADD, "MemoryError|" + EARLY),
    "deaf to signals": (
        "import signal\nfor s in (signal.SIGTERM, signal.SIGXCPU, signal.SIGINT):\n"
        "    signal.signal(s, lambda *a: None)\nwhile True: pass",
        ADD,
        "timed out",
    ),
    "fork bomb": ("import os\nwhile True: os.fork()", ADD, REFUSED),
    "fork that is not audited": (
        "import subprocess, sys\nsys.audit = lambda *a: None\n"
        "subprocess.Popen(['sleep', '987.6', 'marker-of-test-sandbox'])",
        ADD,
        r"PermissionError: \[Errno 1\].*",  # EPERM, of the fork; EACCES would be of the exec
    ),
    "subprocess": (
        "import subprocess\nsubprocess.Popen(['sleep', '987.6', 'marker-of-test-sandbox'])",
        ADD,
        REFUSED,
    ),
    "system": ("import os\nos.system('touch OUTSIDE/new')", ADD, REFUSED),
    "delete": ("import os\nos.remove('SECRET')", ADD, REFUSED),
    "delete all": ("import shutil\nshutil.rmtree('OUTSIDE')", ADD, REFUSED),
    "rename": ("import os\nos.rename('SECRET', 'OUTSIDE/x')", ADD, REFUSED),
    "chmod": ("import os\nos.chmod('SECRET', 0o777)", ADD, REFUSED),
    "read": ("open('SECRET').read()", ADD, REFUSED),
    "read by a way round": (
        "import sys\nopen(sys.prefix + '/' + '../' * 20 + 'SECRET')",
        ADD,
        REFUSED,
    ),
    "list": ("import os\nos.listdir('OUTSIDE')", ADD, REFUSED),
    "parent's environment": (
        "import os\nopen(f'/proc/{os.getppid()}/environ').read()",
        ADD,
        REFUSED,
    ),
    "environment": ("import os\nassert 'SECRET_KEY' in os.environ, 'none'", ADD, ".*: none"),
    "write": ("open('SECRET', 'a').write('x')", ADD, REFUSED),
    "write new": ("open('OUTSIDE/new', 'w')", ADD, REFUSED),
    "write here": ("open('new', 'w').write('x' * 10**6)", ADD, REFUSED),
    "socket": ("import socket\nsocket.socket()", ADD, REFUSED),
    "kill the parent": ("import os\nos.kill(os.getppid(), 9)", ADD, REFUSED),
    "kill itself": ("import os\nos.kill(os.getpid(), 9)", ADD, REFUSED),
    "raise limits": (
        "import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
        ADD,
        REFUSED,
    ),
    "foreign functions": ("import ctypes\nctypes.CDLL(None).getpid()", ADD, REFUSED),
    "crash": (
        "x = ()\nfor _ in range(10**6): x = (x,)\nhash(x)",
        ADD,
        EARLY + "|RecursionError.*",
    ),
    "close all": ("import os\nos.closerange(0, 1000)", ADD, EARLY),
    "close streams": (
        "import sys\nsys.stdout.close(), sys.stderr.close()\nprint()",
        ADD,
        "Value.*",
    ),
    "sys.exit": ("import sys\nsys.exit(0)", ADD, "SystemExit: 0"),
    "os._exit": ("import os\nos._exit(0)", ADD, EARLY),
    "exit in the test": ("", "def add(a, b): raise SystemExit", "SystemExit"),
    "exit at last": (
        "import atexit, os, sys\natexit.register(lambda: [print('passed'), os._exit(0)])\n"
        "sys.exit()",
        ADD,
        "SystemExit",
    ),
    "threads that stay after an exit": (
        "import threading, os, sys\n"
        "def f():\n    while True: print('passed')\n"
        "threading.Thread(target=f).start()\nsys.exit(0)",
        ADD,
        "SystemExit: 0|timed out",
    ),
    "a thread that exits": (
        "import threading, os\nthreading.Thread(target=os._exit, args=(0,)).start()\nwhile 1: pass",
        ADD,
        EARLY,
    ),
    "prints passed": ("print('passed', flush=True)\nimport os\nos._exit(0)", WRONG, EARLY),
    "reports passed": (
        "import os\nfor fd in range(30):\n    try: os.write(fd, b'passed\\n')\n"
        "    except OSError: pass\n"
        "os._exit(0)",
        WRONG,
        "a forged report",
    ),
    "reports without end": (
        "import os\nwhile True:\n    for fd in range(30):\n        try: os.write(fd, b'x' * 999)\n"
        "        except OSError: 0",
        ADD,
        "x+",
    ),
    "an exception named passed": ("class passed(Exception): pass\nraise passed", ADD, "a forged.*"),
    "an exception that exits": (
        "import os\nclass E(Exception):\n    def __str__(self): os._exit(0)\nraise E",
        ADD,
        EARLY,
    ),
    "AssertionError": (
        "import builtins\nclass E(Exception): pass\nAssertionError = builtins.AssertionError = E",
        WRONG,
        "AssertionError",
    ),
    "check": ("check = lambda f: None", WRONG, "AssertionError"),
    "builtins": (
        "import builtins\nbuiltins.exec = builtins.compile = lambda *a, **k: None\n"
        "builtins.BaseException = builtins.Exception = KeyError\n"
        "builtins.abs = lambda x: 5\n__builtins__ = {'abs': abs}",
        "def add(a, b): return 0 if EARLIER.pop() else 5\nEARLIER = [1, 0]",
        "AssertionError",
    ),
    "builtins once more, when the first are restored": (
        "import builtins\nclass E:\n    def __del__(self, builtins=builtins):\n"
        "        builtins.exec = builtins.compile = lambda *a, **k: None\n"
        "builtins.open = E()",  # among the last of builtins
        WRONG,
        "AssertionError",
    ),
    "functions of os": (
        "import os, posix\nos.write = os._exit = posix.write = posix._exit = lambda *a: None",
        WRONG,
        "AssertionError",
    ),
    "sys.modules": (
        "import sys\nmain = sys.modules['__main__']\nmain.run = main.main = lambda *a: None\n"
        "for name in ('os', 'builtins', 'json', 'types', 'sandbox', '__main__'):\n"
        "    sys.modules[name] = main",
        WRONG,
        "AssertionError",
    ),
    "hooks": (
        "import sys\nsys.excepthook = sys.unraisablehook = sys.displayhook = print\n"
        "sys.stdout = sys.stderr = None",
        WRONG,
        "AssertionError",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_programs_fail_and_do_nothing(name, outside, monkeypatch):
    if name == "fork that is not audited" and "seccomp" in str(missing_guards()):
        pytest.skip("this system has no seccomp")
    monkeypatch.setenv("SECRET_KEY", "1")
    act, solution, expected = HOSTILE[name]
    act = act.replace("SECRET'", str(outside / "secret") + "'").replace("OUTSIDE", str(outside))
    start = time.monotonic()
    seconds = 0.5 if "timed out" in expected else 100
    assert re.fullmatch(expected, run_program(f"{act}\n{solution}", TEST, seconds))
    assert time.monotonic() - start < 90


# ------------------------------------------------------------------------------------------
# The guards one by one: a process under one of them alone

ATTEMPTS = {
    "fork": "os.fork() or os._exit(0)",
    "exec": "os.execv('/bin/true', ['true'])",
    "session": "os.setsid()",
    "socket": "socket.socket()",
    "socket pair": "socket.socketpair()",
    "signal": "os.kill(os.getppid(), 0)",
    "limits": "resource.setrlimit(resource.RLIMIT_AS, (2**40, 2**40))",
    "limits of another": "resource.prlimit(os.getppid(), resource.RLIMIT_CORE, (0, 0))",
    "chmod": "os.chmod(secret, 0o600)",
    "flags": "fcntl.ioctl(os.open(secret, os.O_RDONLY), 0x40086602, bytes(8))",  # as chattr does
    "signals by a pipe": "fcntl.fcntl(os.pipe()[0], fcntl.F_SETOWN, os.getppid())",
    "utime": "os.utime(secret)",
    "remove": "os.remove(secret)",
    "rename": "os.rename(secret, secret + 'x')",
    "link": "os.link(secret, secret + 'x')",
    "symlink": "os.symlink(secret, secret + 'x')",
    "mkdir": "os.mkdir(secret + 'x')",
    "truncate": "os.truncate(secret, 0)",
    "write": "open(secret, 'a')",
    "create": "open(secret + 'x', 'x')",
    "read": "open(secret)",
    "list": "os.listdir(os.path.dirname(secret))",
}
LANDLOCK = {"remove", "rename", "link", "symlink", "mkdir", "truncate", "write", "create"}
LANDLOCK |= {"read", "list"}
SET_UP = {
    "seccomp": "libc.prctl(38, 1, 0, 0, 0); assert sandbox.restrict_calls(libc)",
    "Landlock": "libc.prctl(38, 1, 0, 0, 0); assert sandbox.restrict_files(libc, places)",
    "hook": "sys.addaudithook(sandbox.audit_hook(places))",
}
STOPS = {
    "seccomp": set(ATTEMPTS) - {"read", "list"},
    "Landlock": LANDLOCK,
    "hook": set(ATTEMPTS) - {"session"},  # of which Python has no event
}


@linux
@pytest.mark.parametrize("guard", SET_UP)
def test_each_guard_alone(guard, outside):
    if any(guard in missing for missing in missing_guards()):
        pytest.skip(f"this system has no {guard}")
    program = f"""
import ctypes, fcntl, json, os, resource, socket, sys, threading
import sandbox
secret, libc, places = sys.argv[1], ctypes.CDLL(None), sandbox.readable_places()
{SET_UP[guard]}
refused = []
for name, attempt in json.loads(sys.argv[2]).items():
    try:
        exec(attempt)
    except (PermissionError, ValueError):  # ValueError: Python's word for it in setrlimit
        refused.append(name)
threading.Thread(target=refused.append, args=("thread",)).start()
open(os.__file__).read()
resource.getrlimit(resource.RLIMIT_AS)
print(json.dumps(refused))
"""
    attempts = {name: text for name, text in ATTEMPTS.items() if name in STOPS[guard]}
    command = [sys.executable, "-c", program, str(outside / "secret"), json.dumps(attempts)]
    done = subprocess.run(command, cwd=FILE.parent, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [*attempts, "thread"]


def test_the_hook_compares_whole_names_of_folders(tmp_path):
    hook = sandbox.audit_hook([str(tmp_path / "lib")])
    hook("open", (str(tmp_path / "lib/code.py"), "r", os.O_RDONLY))
    for path in ("lib-secret", "lib2/code.py", "li", ""):
        with pytest.raises(PermissionError):
            hook("open", (str(tmp_path / path), "r", os.O_RDONLY))


@linux
@pytest.mark.parametrize(
    "broken, name",
    [
        (("call(444", "call(4444"), "Landlock"),
        (("set_seccomp, filter_mode = 22", "set_seccomp, filter_mode = 2222"), "seccomp"),
    ],
)
def test_what_is_missing_is_said_and_the_rest_still_guards(broken, name, tmp_path, outside):
    text = FILE.read_text()
    assert broken[0] in text
    file = tmp_path / "without.py"
    file.write_text(text.replace(*broken))
    spec = importlib.util.spec_from_file_location("without", file)
    without = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(without)
    (missing,) = [guard for guard in without.missing_guards() if guard not in missing_guards()]
    assert missing.startswith(name)
    assert without.run_programs([(ADD, TEST)]) == ["passed"]
    for act in (f"open({str(outside / 'secret')!r})", "import os\nos.fork()"):
        (verdict,) = without.run_programs([(act + ADD, TEST)])
        assert verdict.startswith("PermissionError")


def test_numbers_of_system_calls():
    """Against the kernel's own headers."""
    asm = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")
    generic = Path("/usr/include/asm-generic/unistd.h")
    if not (asm.exists() and generic.exists()):
        pytest.skip("no kernel headers")
    pattern = r"#define __NR(?:3264)?_(\w+)\s+(\d+)\b"
    x86, arm = (dict(re.findall(pattern, path.read_text())) for path in (asm, generic))
    for call in sandbox.REFUSED_CALLS.strip().replace("\n", ", ").split(", "):
        name, *numbers = call.split()
        assert numbers == [x86.get(name, "-"), arm.get(name, "-")], name
    for name, numbers in {
        "clone": (56, 220),
        "ioctl": (16, 29),
        "fcntl": (72, 25),
        "openat": (257, 56),
        "prlimit64": (302, 261),
    }.items():
        assert (int(x86[name]), int(arm[name])) == numbers
    assert (x86["open"], x86["clone3"], x86["openat2"]) == ("2", "435", "437")


# ------------------------------------------------------------------------------------------
# Time and interrupts


def test_start_up_is_not_the_program_s_time(outside, tmp_path, monkeypatch):
    slow = tmp_path / "slow-python"
    slow.write_text(f'#!/bin/sh\nsleep 3\nexec {sys.executable} "$@"\n')
    slow.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(slow))
    assert run_program(ADD, TEST, seconds=2.5) == "passed"


def test_a_python_that_does_not_start_is_no_verdict(tmp_path, monkeypatch):
    bad = tmp_path / "bad-python"
    bad.write_text("#!/bin/sh\necho no such library >&2\nexit 1\n")
    bad.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(bad))
    with pytest.raises(RuntimeError, match="did not start.*no such library"):
        run_program(ADD, TEST)


@linux
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_child_outlives_its_parent(number, outside):
    program = "import sandbox\nsandbox.run_programs([('while 1: pass', '')] * 9, 9999, workers=2)"
    environment = {**os.environ, "TMPDIR": str(outside.parent)}
    command = [sys.executable, "-c", program]
    parent = subprocess.Popen(command, cwd=FILE.parent, env=environment, stderr=subprocess.PIPE)

    def two_have_started() -> bool:
        """A child that is still starting would die of its closed pipe anyway."""
        states = [(path / "status").read_text() for path in processes_of(str(FILE))]
        return len(states) == 2 and all("NoNewPrivs:\t1" in state for state in states)

    try:
        assert becomes_true(two_have_started)
        parent.send_signal(number)
        _, said = parent.communicate(timeout=120)
    finally:
        parent.kill()
    assert (b"KeyboardInterrupt" in said) == (number == signal.SIGINT)
    assert becomes_true(lambda: not processes_of(str(FILE)))
    left = list(outside.parent.glob("sandbox-*"))
    assert left == [] or number == signal.SIGKILL  # which leaves no time to tidy up
