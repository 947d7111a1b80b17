"""What holds for all tests.

Several files are tested at a time, on few cores: torch gets one thread, here and in the processes that the tests start, since
threads that share a core wait for each other. Set before anything imports torch; who sets it himself has his way.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
