"""Pre-train the toy recipes' backbone on single shapes: what ImageNet is to the paper's models.

  python tools/pretrain_toy.py [--out runs/toy-pretrain]
  python train.py --init runs/toy-pretrain/checkpoint_0000600.pth

Average pooling and a linear classifier stand on res5. The checkpoint has the backbone alone, for
train.py --init: Figure 1 in miniature compares such runs with those from random weights.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the five modules
import evaluate
import model as detector
import train
from data import UserError
from tools.toy_coco import TOY_CATEGORIES, ToyPatches

RECIPE = replace(
    train.TOY, iterations=600, tails=(220, 80), batch_size=64, learning_rate=0.02,
    warmup_iterations=50,
)  # fmt: skip
HELD_OUT = 500  # shapes to measure the accuracy on


class Classifier(nn.Module):
    """The backbone of a detector, average pooling and a linear layer."""

    def __init__(self, backbone, num_classes):
        super().__init__()
        self.backbone = backbone
        self.classifier = nn.Linear(backbone.channels[-1], num_classes)

    def forward(self, batch):  # normalized images [B, 3, 64, 64] -> scores [B, classes]
        res5 = self.backbone(batch)[-1]
        return self.classifier(res5.mean(dim=(2, 3)))


def pretrain(out, iterations, seed, workers, device):
    """Train, measure, write OUT/checkpoint_ITERATIONS.pth; returns its path and the accuracy."""
    torch.manual_seed(seed)
    model = detector.build_model(num_classes=len(TOY_CATEGORIES), **RECIPE.settings).to(device)
    network = Classifier(model.backbone, len(TOY_CATEGORIES)).to(device).train()
    optimizer = train.make_optimizer(network, RECIPE)
    patches = ToyPatches(HELD_OUT + iterations * RECIPE.batch_size, seed)
    batches = DataLoader(
        Subset(patches, range(HELD_OUT, len(patches))), RECIPE.batch_size, num_workers=workers
    )

    def classify(images):  # uint8 [B, 3, 64, 64]
        batch, _ = model.batch(list(images.to(device)))
        return network(batch)

    bar = tqdm(batches, unit="it", dynamic_ncols=True)
    for iteration, (images, labels) in enumerate(bar):
        for group in optimizer.param_groups:
            group["lr"] = train.learning_rate(iteration, RECIPE) * group["rate_factor"]
        loss = F.cross_entropy(classify(images), labels.to(device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if iteration % RECIPE.log_every == 0:
            bar.set_postfix_str(f"loss {loss.item():.3f}")

    network.eval()
    with torch.no_grad():
        images, labels = zip(*(patches[i] for i in range(HELD_OUT)))
        right = classify(torch.stack(images)).argmax(dim=1).cpu() == torch.tensor(labels)
    state = model.state_dict()
    state = {name: t for name, t in state.items() if name.startswith(("backbone.", "image_"))}
    path = Path(out, f"checkpoint_{iterations:07d}.pth")
    path.parent.mkdir(parents=True, exist_ok=True)
    detector.save_model(model, path, weights=state)
    return path, 100 * right.float().mean().item()


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", default="runs/toy-pretrain", metavar="DIR", help="folder (runs/toy-pretrain)")
    add("--iterations", type=int, default=RECIPE.iterations, metavar="N", help="length (600)")
    add("--seed", type=int, default=0, metavar="N", help="random seed (0)")
    add("--workers", type=int, default=2, metavar="N", help="processes that draw shapes (2)")
    add("--device", metavar="D", help="cuda or cpu (cuda if there is one)")
    args = parser.parse_args(arguments)
    if train.checkpoints_in(args.out):
        raise UserError(f"{args.out} has a checkpoint already; give another --out.")
    _, _, device = evaluate.start_processes(args.device)
    print(f"{args.iterations:,} iterations of {RECIPE.batch_size} single shapes")
    path, accuracy = pretrain(args.out, args.iterations, args.seed, args.workers, device)
    print(f"Accuracy on {HELD_OUT} other shapes: {accuracy:.1f} %")
    print(f"Backbone: {path}")


if __name__ == "__main__":
    sys.exit(evaluate.run_command("pretrain_toy.py", main))
