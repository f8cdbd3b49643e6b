"""One thread for each process: models here are small, and some tests start several processes."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
