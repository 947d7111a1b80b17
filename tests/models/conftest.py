"""One thread per test process: bits are equal only for equal shapes and equally many threads on one processor."""

import torch

torch.set_num_threads(1)
