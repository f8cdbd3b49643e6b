"""The one tiny recipe of all tests, train.py with it in processes of their own, and faults there.

A fault is (moment, count), where all counts begin at 0. The process kills itself (SIGKILL)
  step                                  before its count-th step
  write, sync, rename, renamed, prune   at that moment of the count-th checkpoint that it writes
  log                                   with half of the count-th line of the log written
or, before its count-th step,
  sigterm                               it gets a SIGTERM
  nan                                   its loss of classes is not a number from there on
"""

import itertools
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from pathlib import Path
from unittest import mock

import torch

import evaluate
import model as detector
import train

# A detector that runs every part of the code in a few milliseconds.
NARROW = dict(
    blocks=(1, 1, 1, 1), stem_width=32, width_per_group=32, fpn_channels=32,
    box_head_convs=1, box_head_channels=32, box_head_fc_channels=32,
    mask_head_convs=1, mask_head_channels=32, keypoint_head_channels=32,
    rpn_pre_nms_top_n_train=30, rpn_post_nms_top_n_train=20, rpn_post_nms_top_n_test=10,
    box_batch_size_per_image=16, box_score_thresh=0.0, box_detections_per_img=5,
)  # fmt: skip
TINY = train.Recipe(
    settings=NARROW, iterations=6, iterations_pretrained=6, tails=(3, 2), warmup_iterations=2,
    batch_size=2, images_per_gpu=2, min_sizes=(48, 64), max_size=80, test_size=48,
    eval_every=5, checkpoint_every=2, log_every=1,
)  # fmt: skip


def run_train(recipe, arguments, fault=None, pictures=False):
    """The command train.py with this recipe on the CPU; returns its exit code."""
    if fault:
        arrange(*fault)
    arguments = ["--recipe", "tiny", "--device", "cpu", "--workers", "0", *arguments]
    ending = train.show_results if pictures else lambda *_: None  # slow
    ending = mock.patch.object(train, "show_results", ending)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    with mock.patch.dict(train.RECIPES, tiny=recipe), ending:
        code = evaluate.run_command("train.py", train.main, arguments)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return code


# -- Faults --------------------------------------------------------------------------------------


def before_step(count, action, patch=setattr):
    """Have action() happen before the count-th step from now on."""
    steps, to_device = itertools.count(), train.to_device

    def at(*arguments):
        if next(steps) == count:
            action()
        return to_device(*arguments)

    patch(train, "to_device", at)


def spoil_losses(change, patch=setattr):
    """From here on, change(losses, targets) gives the losses of a model in training."""
    losses = detector.MaskRCNN.losses
    patch(detector.MaskRCNN, "losses", lambda *a: change(losses(*a), a[-1]))


def nan_loss(losses, _):
    return losses | {"loss_classifier": losses["loss_classifier"] * float("nan")}


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def arrange(moment, count):
    """Patch what train.py calls so that the fault happens."""
    at_steps = {"step": die, "sigterm": lambda: signal.raise_signal(signal.SIGTERM)}
    at_steps["nan"] = lambda: spoil_losses(nan_loss)
    calls, write_whole = itertools.count(), detector.write_whole
    called = {"sync": (os, "fsync"), "rename": (os, "replace"), "prune": (Path, "unlink")}

    def write_checkpoint(path, content):
        struck = "checkpoint" in str(path) and next(calls) == count
        if struck and moment == "write":
            Path(f"{path}.tmp").write_bytes(content[: len(content) // 2])
            die()
        if struck and moment in called:
            setattr(*called[moment], die)
        write_whole(path, content)
        if struck and moment == "renamed":
            die()

    def write_line(log, record):
        line, struck = json.dumps(record) + "\n", next(calls) == count
        with open(log.path, "a") as file:
            file.write(line[: len(line) // 2] if struck else line)
        if struck:
            die()

    if moment in at_steps:
        before_step(count, at_steps[moment])
    elif moment == "log":
        train.Log.write = write_line
    else:
        detector.write_whole = write_checkpoint


# -- Processes -----------------------------------------------------------------------------------

# Forked from one that has imported torch, and has computed nothing.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tiny_run"])


def start(function, arguments, output):
    """Processes as torchrun starts them: function(*arguments[rank]); output to OUTPUT.RANK.txt."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = []
    for rank, own in enumerate(arguments):
        joined = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(len(arguments))}
        joined |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        Path(f"{output}.{rank}.txt").write_text("")
        target = (function, own, joined, f"{output}.{rank}.txt")
        processes.append(CONTEXT.Process(target=_in_process, args=target))
    here = Path(__file__).resolve().parent
    with mock.patch.dict(os.environ, PYTHONPATH=f"{here}:{here.parent}"):  # for the preloading
        for process in processes:
            process.start()
    return processes


def _in_process(function, arguments, environment, output):
    os.environ.update(environment)
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    torch.set_num_threads(1)
    sys.exit(function(*arguments))


def wait(processes, limit=300):
    """Exit codes of processes that all end by themselves."""
    end = time.monotonic() + limit
    for process in processes:
        process.join(max(0, end - time.monotonic()))
    hanging = [process.kill() for process in processes if process.is_alive()]
    assert not hanging, f"still running after {limit} s"
    return [process.exitcode for process in processes]
