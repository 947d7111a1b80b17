"""`python -I -S tether.py PARENT REPORT PROGRAM ARGUMENTS…`: become PROGRAM, which Linux kills as soon as process PARENT ends.

For programs of others that must not outlive their parent, such as p2pd. It runs as a file without site packages and replaces
itself by the program, which costs about 12 ms at the start. On other systems it only starts the program.

REPORT is a descriptor of a unix socket, or -1. Over it the parent gets the descriptor at which Linux asks it about each
connection and each datagram of the program (seccomp_unotify(2)), or nothing, where the kernel does not offer that.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False  # importing typing takes time
if TYPE_CHECKING:
    from typing import Any

_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38
_SIGKILL = 9
_ASK, _ALLOW = 0x7FC00000, 0x7FFF0000
_NEW_LISTENER = 1 << 3
SYSTEM_CALLS = {"x86_64": (317, (42, 44, 46, 307), 0xC000003E), "aarch64": (277, (203, 206, 211, 269), 0xC00000B7)}
"""By machine: the number of seccomp, of connect, sendto, sendmsg and sendmmsg, and the name of the architecture (AUDIT_ARCH)."""


def command(program: str, *arguments: str, report: int = -1) -> list[str]:
    """The command line that ties `program` to this process. Linux kills it when the thread that started it ends."""
    return [sys.executable, "-I", "-S", __file__, str(os.getpid()), str(report), program, *arguments]


def main(arguments: list[str]) -> None:
    parent, report, program = int(arguments[0]), int(arguments[1]), arguments[2]
    if sys.platform.startswith("linux"):
        import ctypes

        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(_PR_SET_PDEATHSIG, _SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it had ended before the request
            sys.exit(1)
        if report >= 0:
            _have_the_parent_asked(libc, report)
    if report >= 0:
        os.close(report)
    os.execv(program, arguments[2:])


def _have_the_parent_asked(libc: Any, report: int) -> None:
    """Install a filter that stops the calls above until the parent has answered, and send the parent the descriptor for that.

    A filter binds the thread that installs it and what that becomes. Another thread sends, as sending is one of the calls.
    """
    import ctypes
    import socket
    import struct
    from threading import Thread

    if os.uname().machine not in SYSTEM_CALLS:
        return
    seccomp, asked, machine = SYSTEM_CALLS[os.uname().machine]
    load, equal, answer = 0x20, 0x15, 0x06  # BPF_LD | BPF_W | BPF_ABS, BPF_JMP | BPF_JEQ | BPF_K, BPF_RET | BPF_K
    steps = [(load, 0, 0, 4), (equal, 0, len(asked) + 1, machine), (load, 0, 0, 0)]
    steps += [(equal, len(asked) - place, 0, number) for place, number in enumerate(asked)]
    steps += [(answer, 0, 0, _ALLOW), (answer, 0, 0, _ASK)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    program = ctypes.create_string_buffer(struct.pack("HP", len(steps), ctypes.addressof(code)))
    coming, going = os.pipe()

    def send() -> None:
        if number := os.read(coming, 16):
            with socket.socket(fileno=os.dup(report)) as channel:
                socket.send_fds(channel, [b"."], [int(number)])

    sender = Thread(target=send)
    sender.start()
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0:
        listener = libc.syscall(seccomp, 1, _NEW_LISTENER, program)
        if listener >= 0:
            os.write(going, str(listener).encode())
    os.close(going)
    sender.join()
    os.close(coming)


if __name__ == "__main__":
    main(sys.argv[1:])
