"""The paper's effects in miniature, on the generated data: every run of docs/miniature.md.

  python tools/miniature.py --out runs/miniature            all of it, then the table
  python tools/miniature.py --out runs/miniature --jobs 2   two runs at a time, a thread each
  python tools/miniature.py --out runs/miniature --table    the table of what is there

Each run is a command of train.py, printed before it starts; a run that is complete is not repeated,
one that was interrupted goes on. Seeds 0, 1, 2; the pre-trained backbone is one for all.

  Figure 1   random and pre-trained weights, 10x; 5x and 2x branch off that trunk
  Sec. 3.1   SyncBN over the batch of eight, in one process; BN in four processes of one image each,
             5x and 2x; frozen BN, which train.py refuses and this script forces on it
  Sec. 5.2   25 of the 1,000 images: random weights 3x, pre-trained weights 2x
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the five modules

import evaluate
import train
from tools.toy_coco import make_toy_coco

ROOT = Path(__file__).resolve().parent.parent
SEEDS = (0, 1, 2)
FOUR = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
# name: (arguments of train.py, of Python before it, the run whose trunk it branches off)
RUNS = {
    "random-10x": ("--schedule 10x --eval-every 160", [], None),
    "pretrained-10x": ("--schedule 10x --eval-every 160 --init {backbone}", [], None),
    "random-5x": ("--schedule 5x --eval-every 70", [], "random-10x"),
    "pretrained-5x": ("--schedule 5x --eval-every 70 --init {backbone}", [], "pretrained-10x"),
    "random-2x": ("--schedule 2x --eval-every 70", [], "random-10x"),
    "pretrained-2x": ("--schedule 2x --eval-every 70 --init {backbone}", [], "pretrained-10x"),
    "25-random-3x": ("--schedule 3x --subset 25", [], None),
    "25-pretrained-2x": ("--schedule 2x --subset 25 --init {backbone}", [], None),
    "syncbn-5x": ("--schedule 5x --eval-every 160 --norm syncbn", [], None),
    "bn-5x": ("--schedule 5x --eval-every 320 --norm bn --images-per-gpu 1", FOUR, None),
    "syncbn-2x": ("--schedule 2x --norm syncbn", [], "syncbn-5x"),
    "bn-2x": ("--schedule 2x --norm bn --images-per-gpu 1", FOUR, "bn-5x"),
    "frozen-bn-2x": ("--schedule 2x --norm frozen_bn", "forced", None),
}


def metrics_of(folder):
    """(bbox AP, mask AP) of the last evaluation in a run's log, and its last iteration.

    None and None for a run that stopped before its first one.
    """
    log = folder / "log.jsonl"
    records = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    evaluations = [record for record in records if "bbox" in record]
    if not evaluations:
        return None, None, records[-1]["iteration"] if records else 0
    last = evaluations[-1]
    return last["bbox"]["AP"], last["segm"]["AP"], last["iteration"]


def run(name, seed, out, environment):
    """One run, if it is not complete; its seconds are added to OUT/seconds.json."""
    folder = out / f"{name}-seed{seed}"
    if (folder / "seconds.json").exists():
        return
    arguments, before, trunk = RUNS[name]
    backbone = out / "backbone" / "checkpoint_0000600.pth"
    command = [sys.executable, *(before if before != "forced" else [])]
    command += [__file__, "--forced"] if before == "forced" else [str(ROOT / "train.py")]
    command += arguments.format(backbone=backbone).split()
    command += ["--seed", str(seed), "--out", str(folder), "--device", "cpu"]
    command += ["--data", str(out / "toy_coco")]
    if trunk:
        command += ["--from", str(out / f"{trunk}-seed{seed}")]
    if folder.exists():
        command.append("--resume")
    print(" ".join(command), flush=True)
    start = time.perf_counter()
    with open(out / f"{name}-seed{seed}.log", "a") as log:
        done = subprocess.run(command, stdout=log, stderr=log, env=environment, cwd=ROOT)
    if done.returncode != 0:
        print(f"{folder} stopped with exit code {done.returncode}; see its .log")
        if before != "forced":
            return
    (folder / "seconds.json").write_text(json.dumps(time.perf_counter() - start))


def table(out):
    lines = ["| run | iterations | bbox AP, seeds 0, 1, 2 | mean | mask AP | mean | minutes |"]
    lines.append("|---" * 7 + "|")
    for name in RUNS:
        folders = [out / f"{name}-seed{seed}" for seed in SEEDS]
        folders = [folder for folder in folders if (folder / "seconds.json").exists()]
        if not folders:
            continue
        found = [metrics_of(folder) for folder in folders]
        cells = [name, f"{found[0][2]:,}"]
        for values in zip(*(each[:2] for each in found)):
            if None in values:  # AP of no detection at all, or no evaluation
                cells += [", ".join("-" if v is None else f"{v:.1f}" for v in values), "-"]
                continue
            cells += [", ".join(f"{v:.1f}" for v in values), f"{statistics.mean(values):.1f}"]
        seconds = [json.loads((folder / "seconds.json").read_text()) for folder in folders]
        cells.append(f"{statistics.mean(seconds) / 60:.1f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def run_all(out, jobs, only, seeds):
    """The backbone, the data, the trunks, and then what branches off them."""
    environment = dict(os.environ) | ({"OMP_NUM_THREADS": "1"} if jobs > 1 else {})
    make_toy_coco(out / "toy_coco")
    if not list((out / "backbone").glob("checkpoint_*.pth")):
        command = [sys.executable, ROOT / "tools" / "pretrain_toy.py", "--out", out / "backbone"]
        subprocess.run([*map(str, command), "--device", "cpu"], check=True, env=environment)
    names = [name for name in RUNS if only in name]
    trunks = {trunk for _, _, trunk in RUNS.values()}
    for group in (
        [name for name in names if name in trunks],
        [name for name in names if name not in trunks],
    ):
        with ThreadPoolExecutor(jobs) as pool:
            for seed in seeds:
                for name in group:
                    pool.submit(run, name, seed, out, environment)


def main(arguments):
    if "--forced" in sys.argv:
        sys.argv.remove("--forced")
        with mock.patch.object(train, "check"):  # which would refuse frozen BN
            return train.main(sys.argv[1:])
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/miniature"), help="output folder (runs/miniature)")
    add("--jobs", type=int, default=1, help="simultaneous runs, one thread each (1)")
    add("--only", default="", help="only runs whose name contains this")
    add("--seeds", type=int, nargs="+", default=SEEDS, help="random seeds (0 1 2)")
    add("--table", action="store_true", help="only print the table")
    args = parser.parse_args(arguments)
    if not args.table:
        args.out.mkdir(parents=True, exist_ok=True)
        run_all(args.out.resolve(), args.jobs, args.only, args.seeds)
    print(table(args.out))
    return 0


if __name__ == "__main__":
    sys.exit(evaluate.run_command("miniature.py", main))
