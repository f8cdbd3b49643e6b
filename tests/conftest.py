"""What all tests start with: one thread a process, and signals that end a process by default."""

import os
import signal

# Models here are small, and some tests start several processes.
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

# A shell's background job and nohup ignore these two, and so would every process of a test.
for number, handler in (
    (signal.SIGINT, signal.default_int_handler),
    (getattr(signal, "SIGHUP", None), signal.SIG_DFL),
):
    if number and signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, handler)
