"""The doors of the sandbox, and how each is locked; see `sandbox` for what they are.

Loaded by path, by `sandbox_worker`; imports nothing of ours.
"""

import ctypes
import fcntl
import math
import os
import platform
import resource
import signal
import struct
import sys
from collections.abc import Callable
from typing import Any

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
MOST_FILES = 100  # that may be opened for writing, made, renamed or removed
LINUX = sys.platform == "linux"
MACHINE = platform.machine()
libc = ctypes.CDLL(None, use_errno=True)

PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38
F_GETPATH = 50  # of macOS


def lock(order: dict[str, Any], stop: Callable[[str], object]) -> list[str]:
    """Lock all doors that are wanted and that there are -> their names."""
    if LINUX:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # when the parent is killed, so is this
        libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    wanted, layers = order["layers"], []
    if "limits" in wanted:
        limit(order)
        layers.append("limits")
    if "landlock" in wanted and LINUX and landlock(order["folder"]):
        layers.append("landlock")
    if "seccomp" in wanted and LINUX and seccomp():
        layers.append("seccomp")
    elif "limits" in wanted:  # the next best against forks, but for root; it forbids threads too
        resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    if "audit" in wanted:
        layers.append("audit")
        sys.addaudithook(watch(order["folder"], stop))
    globals().pop("libc")  # what is left in reach is Python
    return layers


# ---- limits --------------------------------------------------------------------------------------


def limit(order: dict[str, Any]) -> None:
    """Of this process and, as far as there may be any, of its children."""
    seconds = math.ceil(order["seconds"])
    for name, value in (
        ("RLIMIT_CPU", seconds + 1),
        ("RLIMIT_AS", order["bytes"]),
        ("RLIMIT_DATA", order["bytes"]),
        ("RLIMIT_FSIZE", order["file_bytes"]),
        ("RLIMIT_NOFILE", 64),
        ("RLIMIT_CORE", 0),
    ):
        kind = getattr(resource, name)
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        try:
            resource.setrlimit(kind, (value, value))
        except (ValueError, OSError):
            if name != "RLIMIT_AS":  # macOS has it and does not keep it
                raise
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it
    if (
        LINUX and MACHINE in ARCHITECTURES
    ):  # a root without capabilities cannot raise its limits again
        header = struct.pack("=Ii", 0x20080522, 0)
        libc.syscall(numbers(SPECIAL)["capset"], header, bytes(24))


# ---- landlock ------------------------------------------------------------------------------------

READ = (1 << 0) | (1 << 2) | (1 << 3)  # execute, read a file, list a folder
FILE_ONLY = (1 << 0) | (1 << 1) | (1 << 2) | (1 << 14) | (1 << 15)
RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16, 6: 16}  # version -> how many rights there are
READABLE = (
    *("/usr", "/lib", "/lib64", "/lib32", "/etc/ld.so.cache", "/etc/localtime", "/etc/ssl"),
    *("/dev/urandom", "/dev/random", "/dev/zero", "/sys/devices/system/cpu"),
)


def landlock(folder: str) -> bool:
    """Forbid all files but the folder and what Python reads, and TCP; False where there is none."""
    version = libc.syscall(444, None, 0, 1)
    if version < 1:
        return False
    every = (1 << RIGHTS.get(version, 16)) - 1
    net, scoped = (3 if version >= 4 else 0), (3 if version >= 6 else 0)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    rules = libc.syscall(444, struct.pack("=QQQ", every, net, scoped), size, 0)
    if rules < 0:
        return False
    prefixes = (sys.prefix, sys.base_prefix, sys.exec_prefix, *sys.path)
    readable = {os.path.realpath(one) for one in (*READABLE, *prefixes) if one}
    allowed = [(one, READ) for one in sorted(readable - {"/"})]
    allowed += [(folder, every), ("/dev/null", every)]
    for path, rights in allowed:
        try:
            opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        rights &= every if os.path.isdir(path) else every & FILE_ONLY
        libc.syscall(445, rules, 1, struct.pack("=Qi", rights, opened), 0)
        os.close(opened)
    done = libc.syscall(446, rules, 0) == 0
    os.close(rules)
    return done


# ---- seccomp -------------------------------------------------------------------------------------

# Name and number on x86-64 and on ARM64; "-" where it has none.
KILLED = """
socket 41 198 | connect 42 203 | fork 57 - | vfork 58 - | execve 59 221 | execveat 322 281 |
kill 62 129 | tkill 200 130 | rt_sigqueueinfo 129 138 | rt_tgsigqueueinfo 297 240 |
ptrace 101 117 | process_vm_readv 310 270 | process_vm_writev 311 271 | bpf 321 280 |
perf_event_open 298 241 | userfaultfd 323 282 | mount 165 40 | umount2 166 39 | unshare 272 97 |
setns 308 268 | pivot_root 155 41 | chroot 161 51 | keyctl 250 219 | add_key 248 217 |
request_key 249 218 | init_module 175 105 | finit_module 313 273 | delete_module 176 106 |
kexec_load 246 104 | kexec_file_load 320 294 | reboot 169 142 | settimeofday 164 170 |
clock_settime 227 112 | open_by_handle_at 304 265 | pidfd_send_signal 424 424 |
io_uring_setup 425 425 | open_tree 428 428 | move_mount 429 429 | fsopen 430 430 |
pidfd_open 434 434 | mount_setattr 442 442
"""
REFUSED = """
chmod 90 - | fchmod 91 52 | chown 92 - | fchown 93 55 | lchown 94 - | utime 132 - |
fchmodat 268 53 | fchownat 260 54 | fchmodat2 452 452 | setxattr 188 5 | mknod 133 - |
lsetxattr 189 6 | fsetxattr 190 7 | removexattr 197 14 | lremovexattr 198 15 |
fremovexattr 199 16 | utimensat 280 88 | utimes 235 - | futimesat 261 - | mknodat 259 33 |
setpriority 141 140 | sched_setaffinity 203 122 | shmget 29 194 | sched_setscheduler 144 119 |
msgget 68 186 | semget 64 190 | mq_open 240 180 | memfd_create 319 279 | memfd_secret 447 447
"""
SPECIAL = """
clone 56 220 | tgkill 234 131 | prlimit64 302 261 | clone3 435 435 | capset 126 91
"""
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}


def numbers(table: str) -> dict[str, int]:
    """Name -> number on this machine."""
    column = 1 + list(ARCHITECTURES).index(MACHINE)
    rows = [row.split() for row in table.replace("\n", " ").split("|")]
    return {row[0]: int(row[column]) for row in rows if row[column] != "-"}


CLONE_THREAD = 0x00010000
KILL, REFUSE, ALLOW = 0x80000000, 0x00050000, 0x7FFF0000
NO_SUCH_CALL, NOT_PERMITTED = 38, 1
LOAD, JUMP_EQUAL, JUMP_SET, JUMP_AT_LEAST, RETURN = 0x20, 0x15, 0x45, 0x35, 0x06
AT_NUMBER, AT_ARCH, AT_ARGUMENT = 0, 4, 16  # in struct seccomp_data; the low half comes first


def seccomp() -> bool:
    """Install the filter; False on a machine or a kernel that has none."""
    if MACHINE not in ARCHITECTURES:
        return False
    special, me = numbers(SPECIAL), os.getpid()
    code = [
        (LOAD, 0, 0, AT_ARCH),
        (JUMP_EQUAL, 1, 0, ARCHITECTURES[MACHINE]),
        (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, AT_NUMBER),
    ]
    if MACHINE == "x86_64":  # the second numbering of the same calls
        code += [(JUMP_AT_LEAST, 0, 1, 0x40000000), (RETURN, 0, 0, KILL)]

    def unless(number: int, test: int, value: int) -> None:
        """End the process at this call, unless its first argument passes the test."""
        code.extend(
            [
                (JUMP_EQUAL, 0, 4, number),
                (LOAD, 0, 0, AT_ARGUMENT),
                (test, 1, 0, value),
                (RETURN, 0, 0, KILL),
                (RETURN, 0, 0, ALLOW),
            ]
        )

    unless(special["clone"], JUMP_SET, CLONE_THREAD)  # threads are let through, processes not
    unless(special["tgkill"], JUMP_EQUAL, me)  # abort() sends itself a signal
    code += [  # of its own limits it may read and lower what it likes
        (JUMP_EQUAL, 0, 5, special["prlimit64"]),
        (LOAD, 0, 0, AT_ARGUMENT),
        (JUMP_EQUAL, 2, 0, 0),
        (JUMP_EQUAL, 1, 0, me),
        (RETURN, 0, 0, KILL),
        (RETURN, 0, 0, ALLOW),
    ]
    # glibc then falls back to clone, whose flags can be read here
    code += [(JUMP_EQUAL, 0, 1, special["clone3"]), (RETURN, 0, 0, REFUSE | NO_SUCH_CALL)]
    for number in numbers(KILLED).values():
        code += [(JUMP_EQUAL, 0, 1, number), (RETURN, 0, 0, KILL)]
    for number in numbers(REFUSED).values():
        code += [(JUMP_EQUAL, 0, 1, number), (RETURN, 0, 0, REFUSE | NOT_PERMITTED)]
    code.append((RETURN, 0, 0, ALLOW))
    program = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *one) for one in code))
    header = struct.pack("@HP", len(code), ctypes.addressof(program))
    return libc.prctl(PR_SET_SECCOMP, 2, header, 0, 0) == 0


# ---- audit ---------------------------------------------------------------------------------------

FORBIDDEN = {
    **dict.fromkeys(
        ("os.fork", "os.forkpty", "os.system", "os.exec", "os.spawn", "os.posix_spawn"),
        "started a process",
    ),
    **dict.fromkeys(("subprocess.Popen", "pty.spawn", "os.startfile"), "started a process"),
    **dict.fromkeys(("os.kill", "os.killpg", "signal.pthread_kill"), "sent a signal"),
    **dict.fromkeys(("urllib.Request", "http.client.connect"), "used the network"),
    **dict.fromkeys(("ftplib.connect", "smtplib.connect", "webbrowser.open"), "used the network"),
    "resource.prlimit": "changed its limits",
}
PATHS = {  # event -> which arguments are paths that it changes, and which are folders to start from
    "os.remove": ((0, 1),),
    "os.rmdir": ((0, 1),),
    "os.mkdir": ((0, 2),),
    "os.rename": ((0, 2), (1, 3)),
    "os.link": ((0, 2), (1, 3)),
    "os.symlink": ((1, 2),),
    "os.truncate": ((0, None),),
    "os.chmod": ((0, 2),),
    "os.chown": ((0, 3),),
    "os.utime": ((0, 3),),
    "os.setxattr": ((0, None),),
    "os.removexattr": ((0, None),),
}


def path_of(folder: int) -> str:
    """Of an open folder; "" where the system does not say."""
    try:
        if LINUX:
            return os.readlink(f"/proc/self/fd/{folder}")
        return fcntl.fcntl(folder, F_GETPATH, bytes(1024)).rstrip(b"\0").decode()
    except OSError:
        return ""


def watch(folder: str, stop: Callable[[str], object]) -> Callable[[str, tuple[Any, ...]], None]:
    """Return the audit hook, which tells `stop` what is forbidden; `stop` ends the process."""
    check, count = _path_check(folder, stop), _file_counter(stop)
    unix = 1  # AF_UNIX: event loops talk to themselves through a pair of these

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if isinstance(flags, int) and flags & WRITES and not isinstance(path, int):
                check(path)
                count()
        elif event in FORBIDDEN:
            stop(f"{FORBIDDEN[event]} ({event})")
        elif event.startswith("socket."):
            mine = event == "socket.gethostname"
            if event == "socket.__new__":
                mine = arguments[1] == unix
            if not mine:
                stop(f"used the network ({event})")
        elif event in PATHS:
            count()
            for path, start in PATHS[event]:
                check(arguments[path], None if start is None else arguments[start])
        elif event.startswith("ctypes.") and (event, arguments) != ("ctypes.dlopen", (None,)):
            stop(f"left Python ({event})")

    return hook


def _path_check(folder: str, stop: Callable[[str], object]) -> Callable[..., None]:
    """Return a function that stops the process for a path outside `folder`.

    It holds the functions that it calls, so that the code in the sandbox cannot replace them.
    """
    inside, real, join = os.path.join(folder, ""), os.path.realpath, os.path.join
    decode, absolute, start_of = os.fsdecode, os.path.isabs, path_of

    def check(path: Any, start: Any = None) -> None:
        if path is None or isinstance(path, int):
            return
        path = decode(path)
        if start not in (None, -1) and not absolute(path):
            path = join(start_of(start), path)
        path = real(path)
        if not (path + "/").startswith(inside) and path != "/dev/null":
            stop(f"wrote outside its folder: {path[:100]!r}")

    return check


def _file_counter(stop: Callable[[str], object]) -> Callable[[], None]:
    """Return a function that stops the process when it is called more than `MOST_FILES` times."""
    opened = [0]

    def count() -> None:
        opened[0] += 1
        if opened[0] > MOST_FILES:
            stop(f"opened or changed more than {MOST_FILES} files")

    return count
