"""What holds for all tests.

Several files are tested at a time, on few cores: torch gets one thread, here and in the processes that the tests start, since
threads that share a core wait for each other. Set before anything imports torch; who sets it himself has his way.
No property test has a deadline (hypothesis gives each example 200 ms): none may fail because the machine is busy.
"""

import os

from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")
