"""Runs one Python program written by a language model, with its test, in a process of its own.

The same file is the parent (`run_program`) and the child (`python -I sandbox.py`). The child limits
itself before it runs anything: (1) rlimits on memory, processor time and files; (2) Landlock: only
Python and the system's libraries can be read, nothing can be written; (3) seccomp: no processes,
sockets, signals or changes to files; (4) a Python audit hook that refuses the same things. Landlock
and seccomp are Linux's, on x86-64 and aarch64; elsewhere the rest must do, and `missing_guards`
says so: a program that sets out to get round the audit hook can.

A program passes if the child reports a secret after the test has ended. Exit statuses and printed
text count for nothing. What remains: program and test share an interpreter and a namespace, as in
the published harnesses, so a program written against this very file can look the secret up in its
frames, and one that knows its test can cheat in it, for instance by a result that equals
everything. It cheats in its score alone: the kernel's guards do not rest on the interpreter. What
files exist and how large they are can be seen (stat), not what is in them.
"""

from __future__ import annotations

import builtins
import ctypes
import functools
import json
import os
import resource
import struct
import sys
import types

if __name__ != "__main__":  # the child needs none of these; they would triple its start-up
    import contextlib
    import math
    import secrets
    import select
    import signal
    import subprocess
    import tempfile
    import threading
    import time
    from concurrent.futures import ThreadPoolExecutor

    from tqdm import tqdm

START_SECONDS = 60.0  # for Python's own start on a busy machine; not counted as the program's
MEMORY = 2**30  # bytes of address space; numpy's import takes about a fifth of it
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
LONGEST_REPORT = 4096  # bytes; a child that says more is forging

# ------------------------------------------------------------------------------------------
# The parent


def run_program(solution: str, test: str, seconds: float = 10.0) -> str:
    """Says "passed", or in one line why not: "timed out", "AssertionError: ...".

    `solution` is run, then `test` in the same namespace, for `seconds` in all from the moment that
    the child is ready. Raises RuntimeError if no child can be started.
    """
    return judge(solution, test, seconds, threading.Event())[0]


def run_programs(
    pairs: list[tuple[str, str]], seconds: float = 10.0, workers: int | None = None
) -> list[str]:
    """`run_program` for many (solution, test), `workers` at a time (default: one a core), in order.

    An interrupt ends the children that run before it goes on.
    """
    stop = threading.Event()
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        verdicts = pool.map(lambda pair: judge(*pair, seconds, stop)[0], pairs)
        try:
            return list(tqdm(verdicts, "run", len(pairs), leave=False, disable=None))
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


@functools.cache
def missing_guards() -> list[str]:
    """The guards that this system does not offer, in words; programs run without them."""
    return judge("", "", START_SECONDS, threading.Event())[1]


def judge(solution: str, test: str, seconds: float, stop: threading.Event) -> tuple[str, list[str]]:
    """The verdict, and the guards that the child could not set up."""
    token = secrets.token_hex(16)
    request = {"solution": solution, "test": test, "token": token, "cpu": math.ceil(seconds) + 2}
    heard, late = talk(json.dumps(request).encode(), seconds, stop)
    ready, _, report = heard.partition(b"\n")
    if stop.is_set():
        return "stopped", []
    try:
        missing = json.loads(ready)
    except ValueError as error:  # nothing, or the words of a Python that could not start
        raise RuntimeError(f"the sandbox's child did not start: {heard[-500:]!r}") from error
    if report == token.encode():
        return "passed", missing
    if not report:
        return "timed out" if late else "the program ended before its test", missing
    # the program may have written the report: one line, nothing that a terminal would obey
    line = (report.decode(errors="replace").strip().splitlines() or [""])[0][:200]
    line = "".join(c if c.isprintable() else "?" for c in line)
    return "a forged report" if line in ("", "passed") else line, missing


def talk(request: bytes, seconds: float, stop: threading.Event) -> tuple[bytes, bool]:
    """What a child said before it ended or was late, and whether it was late. It is gone then."""
    command = [sys.executable, "-I", "-B", os.path.abspath(__file__)]
    inherited = {k: v for k, v in os.environ.items() if k in ("PATH", "LD_LIBRARY_PATH")}
    one_thread = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    with tempfile.TemporaryDirectory(prefix="sandbox-") as empty, tempfile.TemporaryFile() as stdin:
        stdin.write(request)  # a file, as a pipe would block if the child does not read
        stdin.seek(0)
        child = subprocess.Popen(
            command,
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,  # until the child is ready: why it cannot start
            cwd=empty,
            env={**inherited, **one_thread, "LC_ALL": "C.UTF-8"},
            start_new_session=True,
        )
        try:
            return listen(child.stdout.fileno(), seconds, stop)
        finally:
            # The child leads its group and session, so it cannot have left them; it has not been
            # reaped, so the group's number can belong to no one else
            with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS: all dead
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            child.stdout.close()


def listen(pipe: int, seconds: float, stop: threading.Event) -> tuple[bytes, bool]:
    """Bytes until the end of the pipe, and whether time ran out; `seconds` from the first line."""
    heard = b""
    poll = select.poll()  # not select(), which knows no descriptors from 1024 on
    poll.register(pipe, select.POLLIN)
    deadline = time.monotonic() + START_SECONDS
    while len(heard) < LONGEST_REPORT:
        left = deadline - time.monotonic()
        if left <= 0 or stop.is_set():
            return heard, True
        if poll.poll(1000 * min(left, 0.2)):
            piece = os.read(pipe, LONGEST_REPORT)
            if not piece:
                break
            if b"\n" in piece and b"\n" not in heard:
                deadline = time.monotonic() + seconds
            heard += piece
    return heard, False


# ------------------------------------------------------------------------------------------
# The child


def main() -> None:
    """Reads a request from standard input, gives up its rights and runs the program."""
    with open(0, "rb", closefd=False) as file:  # not sys.stdin, whose buffer would keep the secret
        request = json.load(file)
    pipe, null = os.dup(1), os.open(os.devnull, os.O_RDWR)
    missing = give_up_rights(request["cpu"])
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    os.close(null)
    os.write(pipe, json.dumps(missing).encode() + b"\n")
    run(request["solution"], request["test"], request["token"], pipe)


def run(solution: str, test: str, token: str, pipe: int) -> None:
    """Runs both texts, writes the token or what went wrong to `pipe` and ends the process."""
    # Held here, as the program may replace any of them
    write, leave, execute, translate = os.write, os._exit, exec, compile
    names, original_names = vars(builtins), dict(vars(builtins))
    # In sys.modules, where dataclasses and typing look annotations up. Not named "__main__": a
    # program's own main block stays out, as in the published harnesses.
    module = types.ModuleType("program")
    namespace = vars(module)
    sys.modules["program"] = sys.modules["__main__"] = module
    try:
        execute(translate(solution, "<solution>", "exec", dont_inherit=True), namespace)
        names.update(original_names)  # the test is to see the real abs, all, len, ...
        namespace["__builtins__"] = names
        execute(translate(test, "<test>", "exec", dont_inherit=True), namespace)
        outcome = token
    except BaseException as error:  # SystemExit too: a program that leaves has not been tested
        try:
            outcome = f"{type(error).__name__}: {error}".removesuffix(": ")
        except BaseException:
            outcome = "an exception that cannot be described"
    write(pipe, outcome[:1000].encode(errors="replace"))
    leave(0)  # without atexit handlers, without waiting for threads


def give_up_rights(cpu_seconds: int) -> list[str]:
    """All guards, the order being that none stops the next; returns those that are missing."""
    limits = {"CPU": cpu_seconds, "AS": MEMORY, "FSIZE": 0, "CORE": 0, "NOFILE": 64}
    missing = [f"limit RLIMIT_{name}" for name, most in limits.items() if not limit(name, most)]
    readable = readable_places()
    linux = sys.platform == "linux"
    if linux:
        libc = ctypes.CDLL(None)
        libc.prctl(1, 9)  # PR_SET_PDEATHSIG: SIGKILL when the parent dies
        libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS, which the next two require
    if not (linux and restrict_files(libc, readable)):
        missing.append("Landlock (files)")
    if not (linux and restrict_calls(libc)):
        missing.append("seccomp (processes, network, signals)")
        limit("NPROC", 0)  # would stop threads too, but never root's: seccomp is better at it
    sys.addaudithook(audit_hook(readable))
    return missing


def limit(name: str, most: int) -> bool:
    """Sets a limit, or keeps a stricter one; False if this system has no such limit."""
    try:
        kind = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(kind)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, most))
    except (AttributeError, ValueError, OSError):
        return False
    return True


def readable_places() -> list[str]:
    """Files and directories, links resolved, that imports need."""
    places = [sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix]
    places += ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/nix/store"]
    places += ["/System/Library", "/etc/ld.so.cache", "/usr/share/zoneinfo"]
    places += os.environ.get("LD_LIBRARY_PATH", "").split(":")
    return sorted({os.path.realpath(p) for p in places if os.path.isabs(p) and os.path.exists(p)})


def restrict_files(libc: ctypes.CDLL, readable: list[str]) -> bool:
    """Landlock (linux/landlock.h): reading below `readable`, and no other access to files."""

    def call(number: int, *arguments) -> int:
        return libc.syscall(ctypes.c_long(number), *arguments)

    version = call(444, None, ctypes.c_size_t(0), 1)  # landlock_create_ruleset, for its version
    if version < 1:
        return False
    # One bit a kind of access: 13 kinds in version 1, then REFER, TRUNCATE and, in 5, IOCTL_DEV.
    # From 4 on both of TCP, from 6 on abstract sockets and signals. Unknown fields are an error.
    kinds = 13 + (version >= 2) + (version >= 3) + (version >= 5)
    fields = [2**kinds - 1, 3, 3][: 1 + (version >= 4) + (version >= 6)]
    attributes = struct.pack(f"{len(fields)}Q", *fields)
    ruleset = call(444, attributes, ctypes.c_size_t(len(attributes)), 0)
    read_file, read_directory = 1 << 2, 1 << 3
    for path in readable:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        access = read_file | (read_directory if os.path.isdir(path) else 0)
        call(445, ruleset, 1, struct.pack("=Qi", access, place), 0)  # add_rule, PATH_BENEATH
        os.close(place)
    restricted = call(446, ruleset, 0) == 0  # landlock_restrict_self
    os.close(ruleset)
    return restricted


# System calls that the filter refuses: name, number on x86-64, number on aarch64 ("-": none)
REFUSED_CALLS = """
socket 41 198, socketpair 53 199, connect 42 203, bind 49 200, listen 50 201, sendto 44 206
fork 57 -, vfork 58 -, execve 59 221, execveat 322 281, setsid 112 157, setpgid 109 154
kill 62 129, tkill 200 130, tgkill 234 131, rt_sigqueueinfo 129 138, rt_tgsigqueueinfo 297 240
pidfd_open 434 434, pidfd_getfd 438 438, pidfd_send_signal 424 424, kcmp 312 272
ptrace 101 117, process_vm_readv 310 270, process_vm_writev 311 271, process_madvise 440 440
migrate_pages 256 238, move_pages 279 239, setpriority 141 140, ioprio_set 251 30, setrlimit 160 164
sched_setattr 314 274, sched_setparam 142 118, sched_setscheduler 144 119, sched_setaffinity 203 122
creat 85 -, truncate 76 45, rename 82 -, renameat 264 38, renameat2 316 276, link 86 -
linkat 265 37, symlink 88 -, symlinkat 266 36, unlink 87 -, unlinkat 263 35, mkdir 83 -
mkdirat 258 34, rmdir 84 -, mknod 133 -, mknodat 259 33, chmod 90 -, fchmod 91 52
fchmodat 268 53, chown 92 -, lchown 94 -, fchown 93 55, fchownat 260 54, utime 132 -, utimes 235 -
futimesat 261 -, utimensat 280 88, setxattr 188 5, lsetxattr 189 6, fsetxattr 190 7
removexattr 197 14, lremovexattr 198 15, fremovexattr 199 16, open_by_handle_at 304 265
fanotify_init 300 262, memfd_create 319 279, memfd_secret 447 447, shmget 29 194, shmctl 31 195
shmat 30 196, semop 65 193, semtimedop 220 192, msgsnd 69 189, msgrcv 70 188
semget 64 190, semctl 66 191, msgget 68 186, msgctl 71 187, mq_open 240 180, mq_unlink 241 181
add_key 248 217, request_key 249 218, keyctl 250 219, userfaultfd 323 282, perf_event_open 298 241
bpf 321 280, io_uring_setup 425 425, io_uring_enter 426 426, io_uring_register 427 427
mount 165 40, umount2 166 39, pivot_root 155 41, chroot 161 51, unshare 272 97, setns 308 268
move_mount 429 429, open_tree 428 428, fsopen 430 430, fsconfig 431 431, fsmount 432 432
fspick 433 433, mount_setattr 442 442, swapon 167 224, swapoff 168 225, reboot 169 142
kexec_load 246 104, kexec_file_load 320 294, init_module 175 105, finit_module 313 273
delete_module 176 106, settimeofday 164 170, clock_settime 227 112, adjtimex 159 171
clock_adjtime 305 266, sethostname 170 161, setdomainname 171 162, acct 163 89, quotactl 179 60
quotactl_fd 443 443, syslog 103 116, vhangup 153 58, iopl 172 -, ioperm 173 -
"""


def restrict_calls(libc: ctypes.CDLL) -> bool:
    """seccomp (linux/seccomp.h): a filter, in BPF, over the numbers and arguments of calls."""
    column = {"x86_64": 0, "aarch64": 1}.get(os.uname().machine)
    if column is None:
        return False
    equal, at_least, any_bit, load, end = 0x15, 0x35, 0x45, 0x20, 0x06  # opcodes
    refuse, unknown = (end, 0, 0, 0x50001), (end, 0, 0, 0x50026)  # fail with EPERM, with ENOSYS
    allow, kill = (end, 0, 0, 0x7FFF0000), (end, 0, 0, 0x80000000)
    low = [16 + 8 * i for i in range(6)]  # where the lower halves of the arguments are
    # (opcode, instructions to skip if true, if false, operand); the number is at 0, the
    # architecture at 4: another one's numbers (32-bit calls) would mean other calls
    code = [(load, 0, 0, 4), (equal, 1, 0, (0xC000003E, 0xC00000B7)[column]), kill, (load, 0, 0, 0)]
    # Calls that this table does not know, from fchmodat2 of Linux 6.6 on; x32's are above them
    code += [(at_least, 0, 1, 452), unknown]
    for number in (435, 437):  # clone3, openat2: their flags are out of reach; libc uses the old
        code += [(equal, 0, 1, number), unknown]
    for call in REFUSED_CALLS.strip().replace("\n", ", ").split(", "):
        number = call.split()[1 + column]
        if number != "-":
            code += [(equal, 0, 1, int(number)), refuse]
    # clone: only for threads (CLONE_THREAD)
    code += [(equal, 0, 4, (56, 220)[column]), (load, 0, 0, low[0])]
    code += [(any_bit, 1, 0, 0x10000), refuse, allow]
    # ioctl: only TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX; others change a file
    # that is open for reading. fcntl: only descriptors and flags; others send signals or lock.
    terminal, descriptor = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451), (0, 1, 2, 3, 4, 1030)
    for numbers, commands in (((16, 29), terminal), ((72, 25), descriptor)):
        code += [(equal, 0, 2 + 2 * len(commands), numbers[column]), (load, 0, 0, low[1])]
        for command in commands:
            code += [(equal, 0, 1, command), allow]
        code += [refuse]
    # open and openat: neither O_WRONLY, O_RDWR, O_CREAT nor O_TRUNC
    for number, flags in [(2, low[1]), (257, low[2])] if column == 0 else [(56, low[2])]:
        code += [(equal, 0, 4, number), (load, 0, 0, flags)]
        code += [(any_bit, 0, 1, WRITING), refuse, allow]
    # prlimit64: reading, so that the third argument is null; root could raise its own limits
    code += [(equal, 0, 6, (302, 261)[column]), (load, 0, 0, low[2]), (any_bit, 2, 0, 0xFFFFFFFF)]
    code += [(load, 0, 0, low[2] + 4), (any_bit, 0, 1, 0xFFFFFFFF), refuse, allow, allow]

    filters = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in code))
    program = struct.pack("HP", len(code), ctypes.addressof(filters))  # struct sock_fprog
    set_seccomp, filter_mode = 22, ctypes.c_ulong(2)  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
    return libc.prctl(set_seccomp, filter_mode, program) == 0


REFUSED_EVENTS = ("os.", "shutil.", "subprocess.", "socket.", "ctypes.", "resource.", "fcntl.")
REFUSED_EVENTS += ("signal.pthread_kill", "pty.", "sqlite3.", "syslog.", "gc.get_", "sys._current_")
READING_EVENTS = ("os.listdir", "os.scandir", "os.walk", "os.fwalk")


def audit_hook(readable: list[str]):
    """A hook that raises PermissionError at what a program has no business with. gc.get_... and
    sys._current_... are among it as they lead to the frames of this file."""
    refused, reading, realpath = REFUSED_EVENTS, READING_EVENTS, os.path.realpath
    inside = tuple(os.path.join(place, "") for place in readable)

    def hook(event: str, arguments: tuple) -> None:
        if event == "open":
            path, mode, flags = arguments
            writes = set(mode or "") & set("wax+") or (flags or 0) & WRITING
        elif event in reading:
            path, writes = arguments[0], False
        elif event.startswith(refused) and event not in ("os.putenv", "os.unsetenv"):
            raise PermissionError(f"{event} is not allowed here")
        else:
            return
        if isinstance(path, int):  # a descriptor, opened before or checked when it was opened
            return
        if writes or not (realpath(path or ".") + "/").startswith(inside):
            raise PermissionError(f"{event} of {path!r} is not allowed here")

    return hook


if __name__ == "__main__":
    main()
