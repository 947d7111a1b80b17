"""`python -I -S tether.py PARENT PROGRAM ARGUMENTS…`: become PROGRAM, which Linux kills as soon as process PARENT ends.

For programs of others that must not outlive their parent, such as p2pd. It runs as a file without site packages and replaces
itself by the program, which costs about 12 ms at the start. On other systems it only starts the program.
"""

import os
import sys

_PR_SET_PDEATHSIG = 1
_SIGKILL = 9


def command(program: str, *arguments: str) -> list[str]:
    """The command line that ties `program` to this process. Linux kills it when the thread that started it ends."""
    return [sys.executable, "-I", "-S", __file__, str(os.getpid()), program, *arguments]


def main(arguments: list[str]) -> None:
    parent, program = int(arguments[0]), arguments[1]
    if sys.platform.startswith("linux"):
        import ctypes

        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, _SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it had ended before the request
            sys.exit(1)
    os.execv(program, arguments[1:])


if __name__ == "__main__":
    main(sys.argv[1:])
