"""Verdicts, and programs that try to get a better one, or to get out."""

import os
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

import puna
from puna.errors import PunaError
from puna.evaluate.sandbox import VERDICTS, Job, Judgement, Limits, Sandbox
from tests.evaluate.conftest import judged

#: The program does not know what the test wants of it.
SECRET = "assert f(1) == 'pqr'"


def answer(sandbox: Sandbox, program: str, expected: object) -> Judgement:
    """The judgement on `f()` giving exactly `expected`."""
    return sandbox.judge(Job(program, "f", f"found = f()\nassert found == {expected!r}, found"))


# ---- verdicts


@pytest.mark.parametrize(
    ("program", "verdict", "detail"),
    [
        ("def f(x): return 'pqr'", "passed", ""),
        ("def f(x): return 'pq'", "wrong", "AssertionError"),
        ("def f(x): return object", "wrong", "a type, which is not plain data"),
        ("def f(x): return x.y", "error", "AttributeError: 'int' object has no attribute 'y'"),
        ("def f(x) return 1", "error", "SyntaxError"),
        ("raise ValueError('at import')", "error", "ValueError: at import"),
        ("def g(x): return 'pqr'", "error", "KeyError: 'f'"),
        ("import torch", "error", "No module named 'torch'"),
        ("def f(x: List[int]): return 'pqr'", "error", "NameError: name 'List' is not defined"),
        ("def f(x): return f(x)", "error", "RecursionError"),
        ("def f(x): return bytearray(2 << 30)", "memory", "MemoryError"),
        ("x = [0] * (1 << 30)", "memory", "MemoryError"),
        ("def f(x):\n while True: print('x' * 1000)", "output", "printed more than 64 KiB"),
        ("def f(x): print('x' * (70 << 10), end=''); return 'pqr'", "output", "printed more than 64 KiB"),
        ("def f(x): print('x' * (60 << 10), end=''); return 'pqr'", "passed", ""),
        ("def f(x): return 'x' * (5 << 20)", "output", "an answer is longer than"),
        ("def f(x):\n while True: pass", "timeout", "1 s of processor time"),
        ("while True: pass", "timeout", "1 s of processor time"),
    ],
)
def test_verdicts_are_kept_apart(sandbox: Sandbox, program: str, verdict: str, detail: str) -> None:
    judgement = sandbox.judge(Job(program, "f", SECRET))
    assert judgement.verdict == verdict, judgement
    assert detail in judgement.detail


def test_a_program_that_sleeps_is_ended_by_the_wall_time(bubblewrap: str) -> None:
    with Sandbox(Limits(wall_seconds=0.7), workers=1) as sandbox:
        started = time.monotonic()
        judgement = sandbox.judge(Job("import time\ndef f(x): time.sleep(60)", "f", SECRET))
        assert (judgement.verdict, judgement.detail) == ("timeout", "no verdict after 0.7 s")
        assert time.monotonic() - started < 3
        assert sandbox.judge(Job("def f(x): return 'pqr'", "f", SECRET)).verdict == "passed"


def test_a_task_whose_own_code_fails_says_nothing_of_the_program(sandbox: Sandbox) -> None:
    program = "def f(x): return 'pqr'"
    for job in (
        Job(program, "f", SECRET, setup="import nothing_of_that_name"),
        Job(program, "f", "assert f(1) =="),
        Job(program, "f", "import os; os._exit(3)"),
        Job(program, "f", "f(object())"),
    ):
        assert sandbox.judge(job).verdict == "sandbox", job


def test_an_answer_that_is_endless_work_for_the_test_is_a_timeout(sandbox: Sandbox) -> None:
    job = Job("def f(x): return 10 ** 12", "f", "n = 0\nfor _ in range(f(1)): n += 1")
    judgement = sandbox.judge(job)
    assert (judgement.verdict, "its answers cost the test" in judgement.detail) == ("timeout", True), judgement
    assert sandbox.judge(Job("def f(x): return 'pqr'", "f", SECRET)).verdict == "passed"


def test_judgements_stand_in_the_order_of_the_jobs_and_all_are_verdicts(sandbox: Sandbox) -> None:
    programs = ["def f(x): return 'pqr'", "def f(x): return 1", "def f(x): pass", "def f(x): return 1 / 0"] * 3
    judgements = judged(sandbox, [Job(program, "f", SECRET) for program in programs])
    assert [judgement.verdict for judgement in judgements] == ["passed", "wrong", "wrong", "error"] * 3
    assert {judgement.verdict for judgement in judgements} <= VERDICTS.keys()


def test_a_sandbox_that_was_killed_from_outside_is_replaced(bubblewrap: str) -> None:
    job = Job("def f(x): return 'pqr'", "f", SECRET)
    with Sandbox(workers=1) as sandbox:
        for killed in range(2):
            sandbox._places[killed]._process.kill()
            sandbox._places[killed]._process.wait()
            judgements = judged(sandbox, [job, job])
            again = [sandbox.judge(job) if judgement.is_doubtful else judgement for judgement in judgements]
            assert [judgement.verdict for judgement in again] == ["passed", "passed"]
        assert 3 <= len(sandbox._places) <= 6


# ---- the function seen through the pipe is the function


def test_what_a_test_may_rely_on_holds_through_the_pipe(sandbox: Sandbox) -> None:
    program = """
import collections, decimal, fractions
calls = []
def f(kind, *args, **kw):
    calls.append(kind)
    match kind:
        case "count": return len(calls)
        case "same": return args[0]
        case "names": return kw
        case "sort": args[0].sort()
        case "fill": args[0]["k"] = [1]; args[1].add(2); args[2].extend(b"ab")
        case "raise": raise LookupError("lost")
        case "own": raise type("Own", (Exception,), {})("mine")
        case "counter": return collections.Counter("aab")
        case "numbers": return [decimal.Decimal("0.5"), fractions.Fraction(1, 2)]
        case "lazy": return (x * x for x in range(3))
        case "keys": return {"a": 1}.keys()
"""
    test = """
import math
values = [None, True, False, 0, -1, 2 ** 20000, 1.5, -0.0, float("inf"), 1j, "a\\ud800\\0", b"\\xff", bytearray(b"x"),
          (), (1,), [1, [2]], {1, 2}, frozenset([1]), {"a": (1, {2: 3})}, range(1, 9, 2), ...]
for value in values:
    found = f("same", value)
    assert found == value and type(found) is type(value), (found, value)
assert f("same", True) is True and f("same", None) is None
assert math.isnan(f("same", math.nan)) and math.copysign(1, f("same", -0.0)) == -1
assert f("names", a=1, b=[2]) == {"a": 1, "b": [2]}
assert f("count") == len(values) + 6
xs = ys = [3, 1, 2]
assert f("sort", xs) is None and ys == [1, 2, 3]
d, s, b = {}, {1}, bytearray()
f("fill", d, s, b)
assert (d, s, b) == ({"k": [1]}, {1, 2}, b"ab")
try:
    f("raise")
    raise SystemError("no exception")
except LookupError as error:
    assert str(error) == "lost"
try:
    f("own")
    raise SystemError("no exception")
except Exception as error:
    assert str(error) == "Own: mine"
assert f("counter") == {"a": 2, "b": 1}
assert f("numbers") == [0.5, 0.5]
assert f("lazy") != [0, 1, 4] and list(f("lazy")) == [0, 1, 4]
assert f("keys") == {"a"}
assert helper(f("count")) == 2 * f("count") - 2
"""
    judgement = sandbox.judge(Job(program, "f", test, setup="def helper(x): return 2 * x\ndef f(): pass"))
    assert (judgement.verdict, judgement.detail) == ("passed", "")


def test_random_draws_and_the_order_of_sets_are_the_same_in_every_judgement(sandbox: Sandbox) -> None:
    job = Job(
        "import random\ndef f(): return [random.random(), str({'a', 'b', 'c', 'd'})]",
        "f",
        "import random\nassert not f(), f() + [random.random()]",
    )
    details = {sandbox.judge(job).detail for _ in range(3)}
    assert len(details) == 1
    assert "AssertionError: [0." in details.pop()


# ---- programs that want to pass without knowing the answer

FORGE = """
import os
def f(x):
    said = b'l3:s6:answers3:pqxl0:'
    for fd in range(3, 64):
        try: os.write(fd, len(said).to_bytes(8, 'big') + said)
        except OSError: pass
    return 1
"""

CHEATS = {
    "an object that equals everything": (
        "class Yes:\n def __eq__(self, other): return True\n def __bool__(self): return True\ndef f(x): return Yes()",
        "wrong",
    ),
    "a number that equals everything": (
        "class Yes(int):\n def __eq__(self, other): return True\n __hash__ = int.__hash__\ndef f(x): return Yes()",
        "wrong",
    ),
    "a text that equals everything": (
        "class Yes(str):\n def __eq__(self, other): return True\n __hash__ = str.__hash__\ndef f(x): return Yes('a')",
        "wrong",
    ),
    "a list that equals everything": (
        "class Yes(list):\n def __eq__(self, other): return True\n def __len__(self): return 9\ndef f(x): return Yes()",
        "wrong",
    ),
    "a lie about __class__": (
        "class Yes:\n __class__ = str\n def __eq__(self, other): return True\ndef f(x): return Yes()",
        "error",
    ),
    "print passed and exit": ("import os\ndef f(x):\n print('passed\\t', flush=True)\n os._exit(0)", "error"),
    "exit at import": ("import sys\nprint('passed')\nsys.exit(0)", "error"),
    "exit in the function": ("def f(x): raise SystemExit(0)", "error"),
    "stop the test's loop": ("def f(x): raise StopIteration", "error"),
    "walk the frames and append passed": (
        "import sys, os\ndef f(x):\n frame = sys._getframe()\n while frame:\n"
        "  for v in [*frame.f_locals.values(), *frame.f_globals.values()]:\n"
        "   if isinstance(v, list): v.append('passed')\n"
        "   if isinstance(v, dict): v['verdict'] = 'passed'\n  frame = frame.f_back\n os._exit(0)",
        "error",
    ),
    "look for the test in memory": (
        "import gc\ndef f(x):\n for o in gc.get_objects():\n"
        "  if isinstance(o, dict) and 'questions' in o: return o['questions'].split(\"'\")[1]\n return 'none'",
        "wrong",
    ),
    "replace builtins": (
        "import builtins\nbuiltins.AssertionError = builtins.isinstance = None\n"
        "builtins.__build_class__ = print\ndef f(x): return 1",
        "error",
    ),
    "replace the worker's functions": (
        "import sys\nfor m in list(sys.modules.values()): m.encode = m._answer = lambda *v: b'T'\ndef f(x): return 1",
        "error",
    ),
    "write answers and verdicts into every descriptor": (FORGE, "wrong"),
    "write passed into every descriptor": (
        "import os\ndef f(x):\n for fd in range(64):\n"
        "  try: os.write(fd, b'passed\\t')\n  except OSError: pass\n os._exit(0)",
        "error",
    ),
    "close every descriptor and wait": (
        "import os, time\ndef f(x):\n os.closerange(0, 64)\n time.sleep(60)",
        "error",
    ),
    "kill all that can be killed": (
        "import os\ndef f(x):\n for pid in (os.getppid(), 1, -1):\n"
        "  try: os.kill(pid, 9)\n  except OSError: pass\n return 1",
        "wrong",
    ),
    "kill the own process group": ("import os\ndef f(x): os.kill(0, 9)", "wrong"),
    "kill itself": ("import os\ndef f(x): os.kill(os.getpid(), 9)", "wrong"),
    "pretend a timeout": ("import os\ndef f(x): os._exit(137)", "error"),
    "crash the interpreter": ("import ctypes\ndef f(x): ctypes.string_at(0)", "error"),
    "an answer that holds itself": ("def f(x):\n xs = []\n xs.append(xs)\n return xs", "wrong"),
    "an answer nested without end": ("def f(x):\n xs = []\n for _ in range(10 ** 5): xs = [xs]\n return xs", "wrong"),
    "fork bomb": ("import os\ndef f(x):\n while True: os.fork()", "error"),
}


@pytest.mark.parametrize("cheat", CHEATS)
def test_no_cheat_passes(sandbox: Sandbox, cheat: str) -> None:
    program, expected = CHEATS[cheat]
    judgement = sandbox.judge(Job(program, "f", SECRET))
    assert judgement.verdict == expected, judgement


def test_a_test_that_forgives_exceptions_does_not_forgive_a_program_that_is_gone(sandbox: Sandbox) -> None:
    test = "try:\n    f(1)\nexcept BaseException:\n    pass"
    assert sandbox.judge(Job("def f(x): raise ValueError", "f", test)).verdict == "passed"
    assert sandbox.judge(Job("import os\ndef f(x): os._exit(0)", "f", test)).verdict == "error"
    assert sandbox.judge(Job("def f(x): return object()", "f", test)).verdict == "passed"
    assert sandbox.judge(Job("def f(x): return object()", "f", "assert f(1) != 2")).verdict == "wrong"
    assert sandbox.judge(Job("def f(x): raise StopIteration", "f", "assert all(map(f, [1, 2]))")).verdict == "error"


# ---- programs that want out


def test_the_network_cannot_be_reached(sandbox: Sandbox) -> None:
    program = """
import socket
def f(port):
    reached = []
    for kind, target in ((1, ("127.0.0.1", port)), (2, ("127.0.0.1", port)), (1, ("1.1.1.1", 53))):
        try:
            with socket.socket(socket.AF_INET, kind) as s:
                s.settimeout(0.3)
                s.connect(target)
                s.send(b"x")
                if kind == 1: reached.append(target)
        except OSError: pass
    return reached
"""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(type=socket.SOCK_DGRAM) as datagrams:
        port = server.getsockname()[1]
        datagrams.bind(("127.0.0.1", port))
        server.settimeout(0.2)
        datagrams.settimeout(0.2)
        judgement = sandbox.judge(Job(program, "f", f"found = f({port})\nassert found == [], found"))
        assert judgement.verdict == "passed", judgement
        with pytest.raises(TimeoutError):
            server.accept()
        with pytest.raises(TimeoutError):
            datagrams.recv(1)
        with socket.create_connection(("127.0.0.1", port)):  # it does listen
            server.accept()[0].close()


def test_sockets_of_the_host_cannot_be_reached_by_path_or_by_abstract_name(sandbox: Sandbox, open_folder: Path) -> None:
    program = """
import socket
def f(*names):
    reached = []
    for name in names:
        for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
            with socket.socket(socket.AF_UNIX, kind) as s:
                try: s.connect(name)
                except OSError: continue
                reached.append(name)
    return reached
"""
    path, abstract = str(open_folder / "s"), f"\0puna-{uuid.uuid4().hex}"
    with socket.socket(socket.AF_UNIX) as by_path, socket.socket(socket.AF_UNIX) as by_name:
        for listener, name in ((by_path, path), (by_name, abstract)):
            listener.bind(name)
            listener.listen()
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(name)
        (open_folder / "s").chmod(0o777)
        judgement = sandbox.judge(Job(program, "f", f"found = f({path!r}, {abstract!r})\nassert found == [], found"))
    assert judgement.verdict == "passed", judgement


LIBC = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
def refused(result):
    return result == -1 and ctypes.get_errno() in (1, 38)
"""


def test_no_process_can_be_traced_or_read_and_none_but_the_programs_own_is_there(sandbox: Sandbox) -> None:
    program = f"""{LIBC}
def f():
    if not refused(libc.ptrace(16, 1, 0, 0)): return "attached"  # PTRACE_ATTACH
    if not refused(libc.process_vm_readv(1, 0, 0, 0, 0, 0)): return "read"
    alive = []
    for pid in range(2, 3000):
        try: os.kill(pid, 0)
        except ProcessLookupError: continue
        except PermissionError: pass
        alive.append(pid)
    return [os.getpid(), os.getppid(), alive]
"""
    assert answer(sandbox, program, [1, 0, []]).verdict == "passed"


def test_nothing_is_left_for_the_next_program(bubblewrap: str) -> None:
    program = f"""{LIBC}
def f():
    found = [os.path.exists("/tmp/note"), libc.shmget(42, 4096, 0o600) != -1, libc.msgget(42, 0o600) != -1]
    found.append(os.nice(0) != 0)
    open("/tmp/note", "w").close()
    made = [libc.shmget(42, 4096, 0o1600) != -1, libc.msgget(42, 0o1600) != -1, os.nice(5) == 5]
    key = libc.syscall(248 if os.uname().machine == "x86_64" else 217, b"user", b"note", b"x", 1, -4)
    return [found, made, refused(key)]
"""
    with Sandbox(workers=1) as sandbox:  # one after the other in the same place
        for _ in range(3):
            judgement = answer(sandbox, program, [[False] * 4, [True] * 3, True])
            assert judgement.verdict == "passed", judgement
        assert len(sandbox._places) == 2


def test_a_test_begins_anew_in_every_judgement_of_its_task(bubblewrap: str) -> None:
    job = Job("def f(x): return 'pqr'", "f", f"seen.append(f(1))\n{SECRET}\nassert seen == ['pqr'], seen", "seen = []")
    with Sandbox(workers=1) as sandbox:
        assert [sandbox.judge(job).detail for _ in range(3)] == [""] * 3


def test_a_program_has_its_own_descriptors_and_no_other(sandbox: Sandbox) -> None:
    program = """
import os
def f():
    found = []
    for descriptor in range(256):
        try: os.fstat(descriptor); found.append(descriptor)
        except OSError: pass
    return len(found)
"""
    assert answer(sandbox, program, 5).verdict == "passed"  # nothing to read, words twice, questions, answers


def test_the_tests_of_the_task_are_in_no_file_and_no_descriptor_of_the_program(sandbox: Sandbox) -> None:
    program = """
import os
def f(x):
    texts = []
    for folder, folders, files in os.walk("/"):
        if folder.startswith(("/usr", "/lib", "/bin", "/nix", "/dev", PREFIX)):
            folders.clear()  # the system's own, tens of thousands, which a disk takes long to list
            continue
        for name in files:
            try: texts.append(open(os.path.join(folder, name), "rb").read())
            except OSError: pass
    for descriptor in range(64):
        try: os.set_blocking(descriptor, False); texts.append(os.read(descriptor, 1 << 20))
        except OSError: pass
    return "pqr" if any(b"'pq" + b"r'" in text for text in texts) else "none"
""".replace("PREFIX", repr(sys.base_prefix))
    judgement = sandbox.judge(Job(program, "f", SECRET))
    assert (judgement.verdict, judgement.detail) == ("wrong", f"AssertionError, at: {SECRET}")


def test_nothing_can_be_written_but_the_own_tmp(sandbox: Sandbox) -> None:
    name = f"puna-{uuid.uuid4().hex}"
    program = f"""
import os
def f():
    written = []
    for folder in ("/", "/usr", "/usr/lib", "/etc", "/dev", "/dev/shm", "/puna", "/root", "/home", "/var/tmp", "/tmp",
                   {os.getcwd()!r}, {sys.prefix!r}, {sys.base_prefix!r}, "/proc", "/sys"):
        try:
            with open(os.path.join(folder, {name!r}), "w") as file: file.write("x")
            written.append(folder)
        except OSError: pass
    return written
"""
    assert answer(sandbox, program, ["/tmp"]).verdict == "passed"
    assert not (Path("/tmp") / name).exists()
    assert answer(sandbox, "import os\ndef f(): return os.listdir('/tmp')", []).verdict == "passed"


def test_files_of_the_host_cannot_be_seen(sandbox: Sandbox, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("s")
    places = ["/proc", "/sys", "/home", "/etc/passwd", "/var", os.getcwd(), str(secret), sys.prefix]
    program = f"import os\ndef f(): return [p for p in {places} if os.path.exists(p)]"
    assert answer(sandbox, program, []).verdict == "passed"
    assert (
        answer(
            sandbox,
            "import os\ndef f(): return dict(os.environ).keys() - {'PWD', 'LC_CTYPE'}",
            {"PATH", "HOME", "LANG", "PYTHONHASHSEED", "LD_BIND_NOW"},
        ).verdict
        == "passed"
    )


def test_the_program_is_an_ordinary_user_without_capabilities(sandbox: Sandbox) -> None:
    program = """
import ctypes, os
def f():
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    sets = (ctypes.c_uint32 * 6)()
    libc.capget(header, sets)
    new_namespaces = [libc.unshare(flag) for flag in (0x10000000, 0x20000, 0x20000000)]
    return [os.getuid() != 0, list(sets), new_namespaces, libc.mount(b"x", b"/tmp", b"tmpfs", 0, None)]
"""
    assert answer(sandbox, program, [True, [0] * 6, [-1] * 3, -1]).verdict == "passed"


def test_processes_are_limited_each_sandbox_for_itself(sandbox: Sandbox) -> None:
    program = """
import os, time
def f():
    for n in range(100):
        try:
            if os.fork() == 0: time.sleep(3); os._exit(0)
        except BlockingIOError:
            return n
    return 100
"""
    job = Job(program, "f", f"found = f()\nassert 1 <= found < {sandbox.limits.processes}, found")
    assert [judgement.detail for judgement in judged(sandbox, [job] * 4)] == [""] * 4


def test_the_own_tmp_and_every_file_in_it_are_small(sandbox: Sandbox) -> None:
    program = """
def f():
    total = 0
    for i in range(100):
        try:
            with open(f"/tmp/{i}", "wb", buffering=0) as file:
                while True: total += file.write(bytes(1 << 20))
        except OSError as error:
            if error.errno == 28: break
    return [i, total]
"""
    limits = sandbox.limits
    test = f"""
files, total = f()
assert files == {limits.tmp_mib // limits.file_mib}, files
assert {limits.tmp_mib} - 2 <= total / 2**20 <= {limits.tmp_mib}, total
"""
    judgement = sandbox.judge(Job(program, "f", test))
    assert judgement.verdict == "passed", judgement


DETACHED = """
import os, time
def f():
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0: os.execv("/usr/bin/sleep", [{name!r}, "60"])
        os._exit(0)
    os.wait()
    time.sleep({seconds})
    return 1
"""


def test_a_grandchild_in_a_session_of_its_own_does_not_outlive_the_judgement(sandbox: Sandbox) -> None:
    name = f"puna-{uuid.uuid4().hex}"
    assert answer(sandbox, DETACHED.format(name=name, seconds=0.2), 1).verdict == "passed"
    assert wait_for(lambda: not processes(name))


def test_when_the_judge_is_killed_all_that_it_started_is_gone(bubblewrap: str, open_folder: Path) -> None:
    name = f"puna-{uuid.uuid4().hex}"
    script = f"""
from puna.evaluate.sandbox import Job, Sandbox
with Sandbox() as sandbox:
    sandbox.judge(Job({DETACHED.format(name=name, seconds=60)!r}, "f", "f()"))
"""
    judge = subprocess.Popen([sys.executable, "-c", script], env={**os.environ, "TMPDIR": str(open_folder)})
    try:
        assert wait_for(lambda: processes(name), seconds=15), "the grandchild never started"
    finally:
        judge.kill()
        judge.wait()
    assert wait_for(lambda: not processes(name))


def processes(name: str) -> list[str]:
    """The processes of this machine whose first argument is `name`."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                words = (folder / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            found += [folder.name] if words[0] == name.encode() else []
    return found


def wait_for(condition: object, seconds: float = 3.0) -> bool:
    deadline = time.monotonic() + seconds
    while not (met := condition()) and time.monotonic() < deadline:  # type: ignore[operator]
        time.sleep(0.02)
    return bool(met)


# ---- machines without


@pytest.mark.parametrize(
    ("manager", "command"),
    [("apt-get", "apt-get install -y bubblewrap"), ("dnf", "dnf install"), ("apk", "apk add bubblewrap")],
)
def test_without_bubblewrap_it_refuses_with_the_command_that_installs_it(
    manager: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_program(tmp_path / manager, "exit 0")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PunaError, match=f"only inside bubblewrap, which is not here; install it: .*{command}"):
        Sandbox().__enter__()


def test_where_bubblewrap_cannot_work_it_refuses_and_says_why(
    open_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_program(open_folder / "bwrap", "echo 'bwrap: No permissions to create a new namespace' >&2; exit 1")
    monkeypatch.setenv("PATH", f"{open_folder}:{os.environ['PATH']}")
    with pytest.raises(PunaError, match=r"(?s)nothing was run: bwrap: No permissions to create .*user namespaces"):
        Sandbox().__enter__()


def test_a_sandbox_that_judges_wrongly_is_not_used(bubblewrap: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sandbox, "_judge", lambda self, job: Judgement("passed", "", 0.0))
    with pytest.raises(PunaError, match=r"nothing was run: passed"):
        Sandbox().__enter__()


def test_a_sandbox_leaves_nothing_behind(bubblewrap: str, open_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(open_folder))
    before = set(os.listdir("/proc/self/fd"))
    with Sandbox(workers=1) as sandbox:
        assert len(list(open_folder.iterdir())) == 1
        assert sandbox.judge(Job("def f(x): return 'pqr'", "f", SECRET)).verdict == "passed"
    assert list(open_folder.iterdir()) == []
    assert set(os.listdir("/proc/self/fd")) == before


def test_what_a_judge_that_was_killed_left_goes_and_what_another_uses_stays(
    bubblewrap: str, open_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(open_folder))
    for name in ("old", "new"):
        (open_folder / f"puna-sandbox-{name}/inside").mkdir(parents=True)
    with Sandbox(workers=1):
        (used,) = [folder for folder in open_folder.iterdir() if not folder.name.endswith(("old", "new"))]
        for folder in (used, open_folder / "puna-sandbox-old"):
            os.utime(folder, (0, 0))
        with Sandbox(workers=1):
            assert used.exists()
            assert not (open_folder / "puna-sandbox-old").exists()
    assert [folder.name for folder in open_folder.iterdir()] == ["puna-sandbox-new"]


@pytest.mark.skipif(os.geteuid() != 0, reason="the tests run as an ordinary user, so all the others show this")
def test_an_ordinary_user_judges_as_root_does_and_however_many_processes_it_has(
    bubblewrap: str, open_folder: Path
) -> None:
    python = "/usr/bin/python3"
    code = "import sys; print(sys.version_info >= (3, 11))"
    if not Path(python).exists() or "True" not in subprocess.check_output([python, "-c", code], text=True):
        pytest.skip("no Python of the system, 3.11 or newer, that an ordinary user could run")
    for file in Path(puna.__file__).parent.rglob("*.py"):
        copy = open_folder / "puna" / file.relative_to(Path(puna.__file__).parent)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
    script = """
import os, subprocess
from puna.evaluate.sandbox import Job, Sandbox
others = [subprocess.Popen(["sleep", "30"]) for _ in range(20)]
loop = "for n in range(99): os.fork() or time.sleep(9)"
fork = f"import os, time\\ndef f():\\n try:\\n  {loop}\\n except OSError: return n"
with Sandbox(workers=1) as sandbox:
    for program, test in (("def f(): return 3", "assert f() == 3"), ("def f(): return 4", "assert f() == 3"),
                          (fork, "assert 1 < f() < 8")):
        print(sandbox.judge(Job(program, "f", test)).verdict)
    print(sandbox.mechanism)
for other in others: other.kill()
"""
    user = {"user": 12345, "group": 12345, "extra_groups": []}
    printed = subprocess.check_output([python, "-B", "-c", script], cwd=open_folder, text=True, **user)
    *verdicts, mechanism = printed.splitlines()
    assert verdicts == ["passed", "wrong", "passed"]
    assert "uid 12345" in mechanism


def write_program(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
