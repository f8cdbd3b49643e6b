"""What all tests start with: one thread a process, for models here are small."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
