"""The one tiny recipe of all tests; and train.py with it and a fault, for test_faults.py to kill.

  FAULT=write:3 python tests/tiny_run.py --data DIR --out OUT [arguments of train.py]

FAULT is MOMENT:N, for rank 0 (MOMENT:N:RANK for another one). The process kills itself (SIGKILL)
  write, sync, rename, renamed, prune   at that moment of the N-th checkpoint that it writes
  log                                   with half of the N-th line of the log written
  step                                  before step N
or, at step N:
  nan        the mask loss is not a number
  raise      an exception
  sigterm    it gets a SIGTERM (sighup, sigint: likewise)
With ":once FILE" after it, the fault happens only if there is no FILE yet, which it makes.
"""

import multiprocessing
import os
import signal
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import model as detector
import train

# A detector that runs every part of the code in a few milliseconds.
NARROW = {
    "blocks": (1, 1, 1, 1),
    "stem_width": 32,
    "width_per_group": 32,
    "fpn_channels": 32,
    "box_head_convs": 1,
    "box_head_channels": 32,
    "box_head_fc_channels": 32,
    "mask_head_convs": 1,
    "mask_head_channels": 32,
    "rpn_pre_nms_top_n_train": 30,
    "rpn_post_nms_top_n_train": 20,
    "rpn_post_nms_top_n_test": 10,
    "box_batch_size_per_image": 16,
    "box_score_thresh": 0.0,
    "box_detections_per_img": 5,
}
STEPS = int(os.environ.get("TINY_STEPS", 40))
TINY = train.Recipe(
    model=NARROW,
    iterations=STEPS,
    iterations_pretrained=STEPS,
    tails=(10, 4),
    batch_size=2,
    images_per_gpu=2,
    warmup_iterations=2,
    min_sizes=(48, 64),
    max_size=80,
    test_size=48,
    eval_every=STEPS // 2,
    checkpoint_every=2 if STEPS < 100 else 100,
    log_every=1,
)


class Fault:
    """Patches the functions that train.py uses so that one of their calls is the last."""

    def __init__(self, text):
        text, _, once = text.partition(":once ")
        moment, count, *rank = text.split(":")
        if int(os.environ.get("RANK", 0)) != int(rank[0] if rank else 0):
            return
        if once and Path(once).exists():
            return
        self.moment, self.count, self.once = moment, int(count), once
        self.checkpoints = self.lines = 0
        self.started = self.armed = False
        if moment in ("step", "nan", "raise") or moment.startswith("sig"):
            self.at_step()
        elif moment == "log":
            self.in_log()
        else:
            self.in_checkpoint()

    def strike(self):
        if self.once:
            Path(self.once).touch()
        if self.moment == "raise":
            raise ArithmeticError("the fault of this test")
        if self.moment.startswith("sig"):
            os.kill(os.getpid(), getattr(signal, self.moment.upper()))
        elif self.moment == "nan":
            losses = detector.MaskRCNN.losses
            detector.MaskRCNN.losses = lambda *a: {
                k: v * float("nan") if k == "loss_mask" else v for k, v in losses(*a).items()
            }
        else:
            os.kill(os.getpid(), signal.SIGKILL)

    def at_step(self):
        learning_rate, make_loader = train.learning_rate, train.make_loader

        def at(iteration, recipe):
            if self.started and iteration == self.count:  # the header asks for rates, too
                self.started = False
                self.strike()
            return learning_rate(iteration, recipe)

        def starting(*arguments):
            self.started = True
            return make_loader(*arguments)

        train.learning_rate = at
        train.make_loader = starting

    def in_log(self):
        def write(log, record):
            line = train.json.dumps(record) + "\n"
            self.lines += 1
            with open(log.path, "a") as file:
                if self.lines == self.count:
                    file.write(line[: len(line) // 2])
                    file.flush()
                    self.strike()
                file.write(line)

        train.Log.write = write

    def in_checkpoint(self):
        """The moments of `model.write_whole` while it writes a checkpoint, and of pruning."""
        save, fsync, replace, unlink = torch.save, os.fsync, os.replace, Path.unlink

        def dying(moment, function, after=False):
            def call(*arguments, **named):
                if self.armed and self.moment == moment:
                    if after:
                        function(*arguments, **named)
                    self.strike()
                return function(*arguments, **named)

            return call

        def writing(checkpoint, file, *arguments, **named):
            self.checkpoints += 1
            save(checkpoint, file, *arguments, **named)
            self.armed = self.checkpoints >= self.count
            if self.armed and self.moment == "write":
                file.truncate(file.tell() // 2)
                self.strike()

        torch.save = writing
        os.fsync = dying("sync", fsync)
        Path.unlink = dying("prune", unlink)
        if self.moment in ("rename", "renamed"):
            os.replace = dying(self.moment, replace, after=self.moment == "renamed")


def main(arguments):
    train.RECIPES["tiny"] = TINY
    if "FAULT" in os.environ:
        Fault(os.environ["FAULT"])
    return train.main(["--recipe", "tiny", "--device", "cpu", *arguments])


def in_process(arguments, environment, output):
    """The target of a forked process: the same, with its output in a file."""
    os.environ.update(environment)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of its loading processes
    sys.exit(main(arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
