"""Runs Python programs that a language model wrote, with their tests, each in its own process.

This file is the parent (`run_programs`) and also the child (`python -I sandbox.py`), so it imports
nothing local. The child limits itself before it runs anything: (1) rlimits on memory, processor
time and files; (2) Landlock: only Python and the system's libraries can be read, nothing can be
written; (3) seccomp: no processes, sockets, signals or changes to files; (4) a Python audit hook
that refuses the same things. Landlock and seccomp need Linux on x86-64 or aarch64. A determined
program can get round the other two; `missing_guards` says what this system lacks.

A program passes if the child reports a secret after the test has ended. Exit statuses and printed
text do not count. Two weaknesses remain. Program and test share a namespace, as in the published
harnesses, so a program that knows this file or its test can cheat in its score. It cannot get past
the kernel's guards. And a program can see which files exist and how large they are (stat).
"""

from __future__ import annotations

import builtins
import ctypes
import json
import os
import resource
import struct
import sys
import types

if __name__ != "__main__":  # the child does without these, which would triple its start-up
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


def run_programs(
    pairs: list[tuple[str, str]], seconds: float = 10.0, workers: int | None = None
) -> list[str]:
    """Runs many (solution, test), `workers` at a time (default: one a core). Returns for each
    "passed", or in one line why not: "timed out", "AssertionError: ...". Solution and test together
    have `seconds` once their process is ready. Raises RuntimeError if none can be started."""
    stop = threading.Event()
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        try:
            verdicts = pool.map(lambda pair: run_program(*pair, seconds, stop)[0], pairs)
            return list(tqdm(verdicts, "run", len(pairs), leave=False, disable=None))
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


def missing_guards() -> list[str]:
    """Returns the guards that this system does not offer; programs run without them."""
    return run_program("", "", START_SECONDS, threading.Event())[1]


def run_program(
    solution: str, test: str, seconds: float, stop: threading.Event
) -> tuple[str, list[str]]:
    """Returns the verdict, and the guards that the child could not set up."""
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
    # The program may have written the report: take one line, and nothing that a terminal obeys.
    line = (report.decode(errors="replace").strip().splitlines() or [""])[0][:200]
    line = "".join(c if c.isprintable() else "?" for c in line)
    return "a forged report" if line in ("", "passed") else line, missing


def talk(request: bytes, seconds: float, stop: threading.Event) -> tuple[bytes, bool]:
    """Returns what a child said, and whether it was late. The child has ended then."""
    env = {k: v for k, v in os.environ.items() if k in ("PATH", "LD_LIBRARY_PATH")}
    env |= {f"{library}_NUM_THREADS": "1" for library in ("OPENBLAS", "OMP", "MKL")}
    with tempfile.TemporaryDirectory(prefix="sandbox-") as empty, tempfile.TemporaryFile() as stdin:
        stdin.write(request)  # a file, as a pipe would block if the child does not read
        stdin.seek(0)
        child = subprocess.Popen(
            [sys.executable, "-I", "-B", os.path.abspath(__file__)],
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,  # until the child is ready: why it cannot start
            cwd=empty,
            env=env | {"LC_ALL": "C.UTF-8"},
            start_new_session=True,
        )
        try:
            return listen(child.stdout.fileno(), seconds, stop)
        finally:
            # The child leads its session, so it cannot have left its group. It has not been
            # reaped, so no other group can have that number.
            with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS: all dead
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            child.stdout.close()


def listen(pipe: int, seconds: float, stop: threading.Event) -> tuple[bytes, bool]:
    """Returns what the pipe says, and whether time ran out: `seconds` after the first line."""
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


def main() -> None:
    """Reads a request from standard input, gives up its rights and runs the program."""
    with open(0, "rb", closefd=False) as file:  # the buffer of sys.stdin would keep the secret
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
    # The program may replace any of these, so keep them.
    write, leave, execute, translate = os.write, os._exit, exec, compile
    names, original_names = vars(builtins), dict(vars(builtins))
    # dataclasses and typing look annotations up in sys.modules. The name is not "__main__": the
    # program's own main block does not run, as in the published harnesses.
    module = types.ModuleType("program")
    namespace = vars(module)
    sys.modules["program"] = sys.modules["__main__"] = module
    try:
        execute(translate(solution, "<solution>", "exec", dont_inherit=True), namespace)
        names.update(original_names)  # so that the test sees the real abs, all, len, ...
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
    """Sets up all guards, in an order in which none stops the next. Returns the missing ones."""
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
        limit("NPROC", 0)  # stops threads, too, and nothing for root, so it is second choice
    sys.addaudithook(audit_hook(readable))
    return missing


def limit(name: str, most: int) -> bool:
    """Sets a limit, or keeps a stricter one. Returns False if this system has no such limit."""
    try:
        kind = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(kind)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, most))
    except (AttributeError, ValueError, OSError):
        return False
    return True


def readable_places() -> list[str]:
    """Returns the files and directories that imports need, with links resolved."""
    places = [sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix]
    places += ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/nix/store"]
    places += ["/System/Library", "/etc/ld.so.cache", "/usr/share/zoneinfo"]
    places += os.environ.get("LD_LIBRARY_PATH", "").split(":")
    return sorted({os.path.realpath(p) for p in places if os.path.isabs(p) and os.path.exists(p)})


def restrict_files(libc: ctypes.CDLL, readable: list[str]) -> bool:
    """Allows reading below `readable` only (linux/landlock.h). Returns whether that worked."""

    def call(number: int, *arguments) -> int:
        return libc.syscall(ctypes.c_long(number), *arguments)

    version = call(444, None, ctypes.c_size_t(0), 1)  # landlock_create_ruleset, for its version
    if version < 1:
        return False
    # A bit for each kind of access: 13 in version 1, then REFER, TRUNCATE and, in 5, IOCTL_DEV.
    # Version 4 adds TCP, version 6 abstract sockets and signals. Unknown fields are an error.
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
fork 57 -, vfork 58 -, execve 59 221, execveat 322 281, setsid 112 157, setpgid 109 154, kill 62 129
tkill 200 130, tgkill 234 131, rt_sigqueueinfo 129 138, rt_tgsigqueueinfo 297 240
pidfd_open 434 434, pidfd_getfd 438 438, pidfd_send_signal 424 424, kcmp 312 272, ptrace 101 117
process_vm_readv 310 270, process_vm_writev 311 271, process_madvise 440 440, migrate_pages 256 238
move_pages 279 239, setpriority 141 140, ioprio_set 251 30, setrlimit 160 164, sched_setattr 314 274
sched_setparam 142 118, sched_setscheduler 144 119, sched_setaffinity 203 122, creat 85 -
truncate 76 45, rename 82 -, renameat 264 38, renameat2 316 276, link 86 -, linkat 265 37
symlink 88 -, symlinkat 266 36, unlink 87 -, unlinkat 263 35, mkdir 83 -, mkdirat 258 34, rmdir 84 -
mknod 133 -, mknodat 259 33, chmod 90 -, fchmod 91 52, fchmodat 268 53, chown 92 -, lchown 94 -
fchown 93 55, fchownat 260 54, utime 132 -, utimes 235 -, futimesat 261 -, utimensat 280 88
setxattr 188 5, lsetxattr 189 6, fsetxattr 190 7, removexattr 197 14, lremovexattr 198 15
fremovexattr 199 16, open_by_handle_at 304 265, fanotify_init 300 262, memfd_create 319 279
memfd_secret 447 447, shmget 29 194, shmctl 31 195, shmat 30 196, semop 65 193, semtimedop 220 192
msgsnd 69 189, msgrcv 70 188, semget 64 190, semctl 66 191, msgget 68 186, msgctl 71 187
mq_open 240 180, mq_unlink 241 181, add_key 248 217, request_key 249 218, keyctl 250 219
userfaultfd 323 282, perf_event_open 298 241, bpf 321 280, io_uring_setup 425 425
io_uring_enter 426 426, io_uring_register 427 427, mount 165 40, umount2 166 39, pivot_root 155 41
chroot 161 51, unshare 272 97, setns 308 268, move_mount 429 429, open_tree 428 428, fsopen 430 430
fsconfig 431 431, fsmount 432 432, fspick 433 433, mount_setattr 442 442, swapon 167 224
swapoff 168 225, reboot 169 142, kexec_load 246 104, kexec_file_load 320 294, init_module 175 105
finit_module 313 273, delete_module 176 106, settimeofday 164 170, clock_settime 227 112
adjtimex 159 171, clock_adjtime 305 266, sethostname 170 161, setdomainname 171 162, acct 163 89
quotactl 179 60, quotactl_fd 443 443, syslog 103 116, vhangup 153 58, iopl 172 -, ioperm 173 -
"""


def restrict_calls(libc: ctypes.CDLL) -> bool:
    """Refuses system calls by a BPF program (linux/seccomp.h). Returns whether that worked."""
    column = {"x86_64": 0, "aarch64": 1}.get(os.uname().machine)
    if column is None:
        return False
    equal, at_least, any_bit, load, end = 0x15, 0x35, 0x45, 0x20, 0x06  # opcodes
    refuse, unknown = (end, 0, 0, 0x50001), (end, 0, 0, 0x50026)  # fail with EPERM, with ENOSYS
    allow, kill = (end, 0, 0, 0x7FFF0000), (end, 0, 0, 0x80000000)
    low = [16 + 8 * i for i in range(6)]  # where the lower halves of the arguments are
    # (opcode, instructions to skip if true, if false, operand). The call's number is at 0, the
    # architecture at 4: on another one (32-bit calls) the numbers mean other calls.
    code = [(load, 0, 0, 4), (equal, 1, 0, (0xC000003E, 0xC00000B7)[column]), kill, (load, 0, 0, 0)]
    # Calls that are newer than this table, from fchmodat2 of Linux 6.6 on; x32's are above them
    code += [(at_least, 0, 1, 452), unknown]
    for number in (435, 437):  # clone3, openat2: a filter cannot read their flags
        code += [(equal, 0, 1, number), unknown]
    for call in REFUSED_CALLS.strip().replace("\n", ", ").split(", "):
        number = call.split()[1 + column]
        if number != "-":
            code += [(equal, 0, 1, int(number)), refuse]
    # clone: only threads (CLONE_THREAD)
    code += [(equal, 0, 4, (56, 220)[column]), (load, 0, 0, low[0])]
    code += [(any_bit, 1, 0, 0x10000), refuse, allow]
    # ioctl: only TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX; others change files that
    # are open for reading. fcntl: only descriptors and flags; others send signals or lock.
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
    # prlimit64: only reading, where the third argument is null; root could raise its own limits
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
    """Returns a hook that raises PermissionError at what a program has no business with. gc.get_...
    and sys._current_... would lead to the frames of this file."""
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
        if isinstance(path, int):  # a descriptor: checked when it was opened
            return
        if writes or not (realpath(path or ".") + "/").startswith(inside):
            raise PermissionError(f"{event} of {path!r} is not allowed here")

    return hook


if __name__ == "__main__":
    main()
