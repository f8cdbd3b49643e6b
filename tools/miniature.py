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
import shlex
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the five modules
import evaluate
from tools.toy_coco import make_toy_coco

ROOT = Path(__file__).resolve().parent.parent
SEEDS = (0, 1, 2)
ONE = ["train.py"]
FOUR = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4", "train.py"]
FORCED = ["-c", "import sys, train; train.check = lambda *_: None; train.main()"]
# name: (how Python starts train.py, its arguments, the run whose trunk it branches off)
RUNS = {
    "random-10x": (ONE, "--schedule 10x --eval-every 160", None),
    "pretrained-10x": (ONE, "--schedule 10x --eval-every 160 --init {backbone}", None),
    "random-5x": (ONE, "--schedule 5x --eval-every 70", "random-10x"),
    "pretrained-5x": (ONE, "--schedule 5x --eval-every 70 --init {backbone}", "pretrained-10x"),
    "random-2x": (ONE, "--schedule 2x --eval-every 70", "random-10x"),
    "pretrained-2x": (ONE, "--schedule 2x --eval-every 70 --init {backbone}", "pretrained-10x"),
    "25-random-3x": (ONE, "--schedule 3x --subset 25", None),
    "25-pretrained-2x": (ONE, "--schedule 2x --subset 25 --init {backbone}", None),
    "syncbn-5x": (ONE, "--schedule 5x --eval-every 160 --norm syncbn", None),
    "bn-5x": (FOUR, "--schedule 5x --eval-every 320 --norm bn --images-per-gpu 1", None),
    "syncbn-2x": (ONE, "--schedule 2x --norm syncbn", "syncbn-5x"),
    "bn-2x": (FOUR, "--schedule 2x --norm bn --images-per-gpu 1", "bn-5x"),
    "frozen-bn-2x": (FORCED, "--schedule 2x --norm frozen_bn", None),
}
TRUNKS = {trunk for _, _, trunk in RUNS.values()}


def run(name, seed, out, environment):
    """One run, if it is not complete; its seconds go to seconds.json in its folder."""
    folder = out / f"{name}-seed{seed}"
    if (folder / "seconds.json").exists():
        return
    python, arguments, trunk = RUNS[name]
    backbone = out / "backbone" / "checkpoint_0000600.pth"
    command = [sys.executable, *python, *arguments.format(backbone=backbone).split()]
    command += ["--seed", seed, "--out", folder, "--data", out / "toy_coco", "--device", "cpu"]
    if trunk:
        command += ["--from", out / f"{trunk}-seed{seed}"]
    command = [str(word) for word in [*command, "--resume"]]
    print(shlex.join(command), flush=True)
    start = time.perf_counter()
    with open(f"{folder}.log", "a") as log:
        done = subprocess.run(command, stdout=log, stderr=log, env=environment, cwd=ROOT)
    if done.returncode != 0:
        print(f"{folder} stopped with exit code {done.returncode}; see {log.name}")
    if done.returncode == 0 or python == FORCED:  # which is expected to stop
        (folder / "seconds.json").write_text(json.dumps(time.perf_counter() - start))


def run_all(out, jobs, only, seeds):
    """The data, the backbone, the trunks, and then what branches off them."""
    environment = dict(os.environ) | ({"OMP_NUM_THREADS": "1"} if jobs > 1 else {})
    make_toy_coco(out / "toy_coco")
    if not list((out / "backbone").glob("checkpoint_*.pth")):
        command = [sys.executable, "tools/pretrain_toy.py", "--device", "cpu"]
        command += ["--out", str(out / "backbone")]
        subprocess.run(command, check=True, env=environment, cwd=ROOT)
    names = [name for name in RUNS if only in name]
    for group in (TRUNKS & {*names}, {*names} - TRUNKS):
        with ThreadPoolExecutor(jobs) as pool:
            for seed in seeds:
                for name in filter(group.__contains__, names):
                    pool.submit(run, name, seed, out, environment)


def result_of(folder):
    """A run's last box AP and mask AP (None: there is none), its last iteration, its minutes."""
    lines = (folder / "log.jsonl").read_text().splitlines()
    records = [{"iteration": 0}, *map(json.loads, lines)]
    last = next((record for record in reversed(records) if "bbox" in record), {})
    aps = [last.get(kind, {}).get("AP") for kind in ("bbox", "segm")]
    minutes = json.loads((folder / "seconds.json").read_text()) / 60
    return *aps, records[-1]["iteration"], minutes


def format_table(out):
    """The complete runs as a table in markdown."""
    lines = ["| run | iterations | bbox AP, seeds 0, 1, 2 | mean | mask AP | mean | minutes |"]
    lines.append("|---" * 7 + "|")
    for name in RUNS:
        folders = [out / f"{name}-seed{seed}" for seed in SEEDS]
        results = [result_of(f) for f in folders if (f / "seconds.json").exists()]
        if not results:
            continue
        *both, iterations, minutes = zip(*results)
        cells = [name, f"{iterations[0]:,}"]
        for aps in both:
            cells.append(", ".join("-" if ap is None else f"{ap:.1f}" for ap in aps))
            cells.append("-" if None in aps else f"{statistics.mean(aps):.1f}")
        lines.append(f"| {' | '.join(cells)} | {statistics.mean(minutes):.1f} |")
    return "\n".join(lines)


def main(arguments=None):
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
    print(format_table(args.out))


if __name__ == "__main__":
    sys.exit(evaluate.run_command("miniature.py", main))
