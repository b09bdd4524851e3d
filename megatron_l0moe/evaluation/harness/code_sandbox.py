"""Runs one Python program that a language model wrote, cut off from the machine; started by `code_execution.py`.

`python -I -S code_sandbox.py FOLDER SECONDS MEMORY_MIB` reads the program from its standard input and prints one
line: `passed`, `failed: EXCEPTION` or `timed out`. FOLDER is an empty one, and is still empty afterwards. Only the
standard library is imported, so a start takes milliseconds.

The program runs in a child that has, in this order: user, network, mount, PID and IPC namespaces of its own (no
network device that is up, no way to see or signal other processes), a file system that is read-only but for an
empty folder in memory, limits on memory, CPU time, files and their size, no capabilities, and a system call filter
that refuses new processes, threads, programs and sockets. A step that the kernel refuses ends it before the
program starts, with exit code 3 and the step's name.

This guards against the accidents of generated code. It does not hide readable files, and a program that knows
this launcher could print the verdict itself.
"""

import ctypes
import math
import os
import platform
import resource
import select
import signal
import struct
import sys

SETUP_FAILED = 3
FILE_MIB = 16
FOLDER_MIB = 64
OPEN_FILES = 64
VERDICT_BYTES = 200

PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 1, 38, 22, 2
MS_REC_PRIVATE = 0x4000 | 0x40000
MS_NOSUID_NODEV = 0x2 | 0x4
MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY = 442, -100, 0x8000, 0x1
CAPABILITY_VERSION_3 = 0x20080522
EPERM = 1

# Numbers of the refused system calls (linux/arch/*/syscalls): new processes and threads, new programs, sockets,
# other processes' memory, other namespaces, and what can reach these in a roundabout way (bpf, io_uring, keyrings).
ARCHITECTURES = {
    "x86_64": (
        0xC000003E,
        (56, 57, 58, 435, 59, 322, 41, 53, 101, 310, 311, 272, 308, 321, 425, 248, 249, 250),
    ),
    "aarch64": (0xC00000B7, (220, 435, 221, 281, 198, 199, 117, 270, 271, 97, 268, 280, 425, 217, 218, 219)),
}
X32_SYSCALLS = 0x40000000
"""On x86_64 the numbers from here on are a second door to the same system calls."""


class SetupError(Exception):
    """The kernel refused a step of the isolation."""


def main() -> int:
    """Run the program on standard input and print the verdict."""
    folder, seconds, memory_mib = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
    program = sys.stdin.buffer.read()
    try:
        enter_namespaces()
        verdict = _watch(program, folder, seconds, memory_mib)
    except SetupError as error:
        sys.stdout.write(f"{error}\n")
        return SETUP_FAILED
    sys.stdout.write(f"{verdict}\n")
    return 0


def enter_namespaces() -> None:
    """Move this process into namespaces of its own; its children are the first ones of a new PID namespace."""
    user, group = os.getuid(), os.getgid()
    libc().prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    flags = os.CLONE_NEWUSER | os.CLONE_NEWNET | os.CLONE_NEWNS | os.CLONE_NEWPID | os.CLONE_NEWIPC
    try:
        os.unshare(flags)
        for name, text in (
            ("setgroups", "deny"),
            ("uid_map", f"{user} {user} 1"),
            ("gid_map", f"{group} {group} 1"),
        ):
            with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
                file.write(text)
    except OSError as error:
        raise SetupError(f"user and network namespaces ({error.strerror})") from error


def _watch(program: bytes, folder: str, seconds: float, memory_mib: int) -> str:
    """Run the program in a child, for at most `seconds` of wall clock, and return its verdict."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        try:
            isolate(folder, seconds, memory_mib)
            os.write(writing, b"ready\n")
        except BaseException as error:
            os.write(writing, f"setup: {error}"[:VERDICT_BYTES].encode())
            os._exit(0)
        execute(program, writing)
    os.close(writing)
    handle = os.pidfd_open(child)
    ended = bool(select.select([handle], [], [], seconds)[0])
    os.kill(child, signal.SIGKILL)  # the first process of its namespace: nothing in there outlives it
    _, status = os.waitpid(child, 0)
    said = os.read(reading, 2 * VERDICT_BYTES).decode("utf-8", errors="replace")
    if not said.startswith("ready\n"):
        raise SetupError(said.removeprefix("setup: ") or "the child ended before the program")
    if not ended:
        return "timed out"
    if said.removeprefix("ready\n"):
        return said.removeprefix("ready\n")
    if os.WIFSIGNALED(status):
        return f"failed: {signal.Signals(os.WTERMSIG(status)).name}"
    return "failed: it ended its process"


def isolate(folder: str, seconds: float, memory_mib: int) -> None:
    """Leave this process no way to change anything outside: files, limits, capabilities, system calls.

    Args:
        folder: an empty folder in memory is put over it, the only place that can be written, and becomes the
            working folder.
    """
    libc().prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.setsid()
    _checked("private mounts", libc().mount(b"none", b"/", None, MS_REC_PRIVATE, None))
    attributes = struct.pack("QQQQ", MOUNT_ATTR_RDONLY, 0, 0, 0)
    _checked(
        "a read-only file system",
        libc().syscall(MOUNT_SETATTR, AT_FDCWD, b"/", AT_RECURSIVE, attributes, len(attributes)),
    )
    size = f"size={FOLDER_MIB}m,mode=700".encode()
    _checked("a folder in memory", libc().mount(b"tmpfs", folder.encode(), b"tmpfs", MS_NOSUID_NODEV, size))
    os.chdir(folder)
    os.environ.clear()
    os.environ.update({"HOME": folder, "TMPDIR": folder, "PATH": ""})
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    _limit(seconds, memory_mib)
    header = struct.pack("Ii", CAPABILITY_VERSION_3, 0)
    _checked("no capabilities", libc().capset(header, bytes(24)))
    _checked("no new privileges", libc().prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    _filter_system_calls()


def _limit(seconds: float, memory_mib: int) -> None:
    cpu = math.ceil(seconds) + 1  # the wall clock comes first, unless whoever watches it was killed
    for what, value in (
        (resource.RLIMIT_AS, memory_mib * 2**20),
        (resource.RLIMIT_CPU, cpu),
        (resource.RLIMIT_FSIZE, FILE_MIB * 2**20),
        (resource.RLIMIT_NOFILE, OPEN_FILES),
        (resource.RLIMIT_NPROC, 0),  # root is not bound by it; the system call filter is what counts
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(what, (value, value))


def _filter_system_calls() -> None:
    """Install a seccomp filter (linux/filter.h: classic BPF over struct seccomp_data)."""
    audit, refused = ARCHITECTURES[platform.machine()]
    load, equal, at_least, answer = 0x20, 0x15, 0x35, 0x06
    kill, allow, deny = 0x80000000, 0x7FFF0000, 0x00050000 | EPERM
    steps = [
        (load, 0, 0, 4),  # the architecture
        (equal, 1, 0, audit),
        (answer, 0, 0, kill),
        (load, 0, 0, 0),  # the number of the call
        (at_least, len(refused) + 1, 0, X32_SYSCALLS),
        *((equal, len(refused) - i, 0, number) for i, number in enumerate(refused)),
        (answer, 0, 0, allow),
        (answer, 0, 0, deny),
    ]
    code = b"".join(struct.pack("HBBI", *step) for step in steps)
    buffer = ctypes.create_string_buffer(code)
    header = struct.pack("HP", len(steps), ctypes.addressof(buffer))
    _checked("a system call filter", libc().prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, header, 0, 0))


def execute(program: bytes, verdict: int) -> None:
    """Run the program and write the verdict; does not return."""
    said = b"passed"
    try:
        exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})  # noqa: S102 - what this file is for
    except BaseException as error:
        said = f"failed: {type(error).__name__}"[:VERDICT_BYTES].encode()
    os.write(verdict, said)
    os._exit(0)


def libc() -> ctypes.CDLL:
    """Return the C library."""
    return ctypes.CDLL(None, use_errno=True)


def _checked(step: str, result: int) -> None:
    if result != 0:
        raise SetupError(f"{step} ({os.strerror(ctypes.get_errno())})")


if __name__ == "__main__":
    sys.exit(main())
