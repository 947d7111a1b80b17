"""`python skewed.py FILE ARGUMENTS…`: the `lutetia` command on a machine whose clock is wrong.

FILE holds eight bytes, a little-endian double: the seconds that `time.time` is ahead, also while the process runs. What the
kernel and p2pd call time stays right; everything of ours that asks for the time of day gets the wrong one, trainers excepted.
"""

from __future__ import annotations

import mmap
import struct
import sys
import time


def main() -> None:
    with open(sys.argv.pop(1), "rb") as file:
        offset = mmap.mmap(file.fileno(), 8, prot=mmap.PROT_READ)
    right = time.time
    time.time = lambda: right() + struct.unpack("<d", offset[:8])[0]
    from lutetia.cli.main import main as lutetia

    lutetia()


if __name__ == "__main__":
    main()
