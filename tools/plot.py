"""The curves of training runs, overlaid: validation AP and training loss against iteration.

  python tools/plot.py RUN [RUN ...] [--out curves.png]

RUN is a folder that train.py has written to (or its log.jsonl). The figure has the paper's Figures
1, 3, 4 and 7 on the left (box AP; mask and keypoint AP paler) and Figure 8 on the right (loss, as a
running mean over a fiftieth of the longest run). Runs whose names differ in the schedule only, as
r50-gn-2x and r50-gn-6x, have one colour; name the trunk of branches first. It needs matplotlib.
"""

import argparse
import json
import re
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the five modules
import evaluate
from data import UserError

CURVES = {  # of a record: (what, which number): opacity
    ("bbox", "AP"): 1.0,
    ("segm", "AP"): 0.4,
    ("keypoints", "AP"): 0.4,
    ("voc", "mAP50"): 1.0,
}
LINES = ("-", "--", ":", "-.")  # of the runs of one colour


def read_log(run):
    """The records (dicts) of RUN/log.jsonl. The last line of a killed run may be half a line."""
    path = Path(run)
    path = path / "log.jsonl" if path.is_dir() else path
    records = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    if not records:
        raise UserError(f"{path} has no record of a training run; name another run.")
    return records


def smooth(points, window):
    """Running mean of (iteration, value) pairs, each over the `window` iterations up to it."""
    iterations, values = np.asarray(points, float).T
    sums = np.cumsum(np.insert(values, 0, 0))
    ends = np.arange(1, len(points) + 1)
    starts = np.searchsorted(iterations, iterations - window, side="right")
    return list(zip(iterations, (sums[ends] - sums[starts]) / (ends - starts)))


def plot(runs, output):
    """Draw the curves of runs (folders) into the file `output`; its suffix says which format."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("plot.py needs matplotlib: pip install matplotlib.") from None
    logs = [read_log(run) for run in runs]
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    window = max(records[-1]["iteration"] for records in logs) / 50
    names = [Path(run).resolve().name for run in runs]
    groups = [re.sub(r"-\d+x(?=-|$)", "", name) for name in names]
    colors = {group: f"C{i}" for i, group in enumerate(dict.fromkeys(groups))}
    trunks = {}  # the first curve of each colour and metric

    def draw(axes, number, metric, points, **look):
        """A curve of a run. A branch starts at its trunk's last point before the branch's log."""
        start, group = logs[number][0]["iteration"], groups[number]
        trunk = trunks.setdefault((group, metric), points)
        points = [point for point in trunk if point[0] < start][-1:] + points
        style = LINES[groups[:number].count(group) % len(LINES)]
        axes.plot(*zip(*points), style, color=colors[group], **look)

    for number, (name, records) in enumerate(zip(names, logs)):
        for (kind, metric), alpha in CURVES.items():
            points = [(r["iteration"], r[kind][metric]) for r in records if kind in r]
            points = [point for point in points if point[1] is not None]
            if points:
                draw(left, number, kind, points, alpha=alpha, marker=".")
        steps = [(r["iteration"], r["loss"]) for r in records if "loss" in r]
        if steps:
            draw(right, number, "loss", smooth(steps, window), label=name)
    left.set_ylabel("validation AP (masks and keypoints: paler)")
    right.set_ylabel("training loss")
    for axes in (left, right):
        axes.set_xlabel("iteration")
        axes.grid(alpha=0.3)
    if right.lines:
        right.legend()
    figure.savefig(output, dpi=120)


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder, or its log.jsonl")
    parser.add_argument("--out", default="curves.png", metavar="FILE", help="(curves.png)")
    args = parser.parse_args(arguments)
    plot(args.runs, args.out)
    print(args.out)


if __name__ == "__main__":
    sys.exit(evaluate.run_command("plot.py", main))
