"""Train torchvision's Mask R-CNN by the toy recipe in place of ours: what does it reach?

  python tools/peer_torchvision.py --data toy_coco --seed 0 [--iterations N]

The same narrow architecture, built of torchvision's own parts, is trained on the same batches of
the generated images for the same iterations at the same rates, and evaluated by pycocotools on the
same split. It takes about as long as `python train.py`. docs/miniature.md has its AP beside ours.
"""

import argparse
import contextlib
import io
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from pycocotools import mask as coco_mask
from pycocotools.cocoeval import COCOeval
from torch import nn
from torchvision.models import resnet
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import AnchorGenerator
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the five modules

import data
import evaluate
import model as detector
import train


def group_norm(channels):
    return nn.GroupNorm(32, channels)


class NarrowResNet(resnet.ResNet):
    """torchvision's ResNet with another width of the stem, which its constructor fixes at 64."""

    def __init__(self, stem_width, blocks):
        nn.Module.__init__(self)
        self._norm_layer = group_norm
        self.inplanes, self.dilation, self.groups, self.base_width = stem_width, 1, 1, 64
        self.conv1 = nn.Conv2d(3, stem_width, 7, stride=2, padding=3, bias=False)
        self.bn1 = group_norm(stem_width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        for i, count in enumerate(blocks):
            layer = self._make_layer(
                resnet.Bottleneck, stem_width * 2**i, count, stride=1 if i == 0 else 2
            )
            setattr(self, f"layer{i + 1}", layer)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")


def build_peer(c, min_size, max_size):
    """torchvision's Mask R-CNN with the widths and numbers of a Config of ours."""
    body = NarrowResNet(c.stem_width, c.blocks)
    channels = [c.stem_width * 4 * 2**i for i in range(4)]
    layers = {f"layer{i + 1}": str(i) for i in range(4)}
    backbone = BackboneWithFPN(body, layers, channels, c.fpn_channels, norm_layer=group_norm)
    width = c.fpn_channels
    box_head = FastRCNNConvFCHead(
        (width, 7, 7),
        [c.box_head_channels] * 4,
        [c.box_head_fc_channels],
        norm_layer=group_norm,
    )
    box_predictor = FastRCNNPredictor(c.box_head_fc_channels, c.num_classes + 1)
    mask_width = c.mask_head_channels
    model = MaskRCNN(
        backbone,
        rpn_anchor_generator=AnchorGenerator(c.anchor_sizes, (c.anchor_ratios,) * 5),
        box_head=box_head,
        box_predictor=box_predictor,
        mask_head=MaskRCNNHeads(width, [mask_width] * 4, 1, norm_layer=group_norm),
        mask_predictor=MaskRCNNPredictor(mask_width, mask_width, c.num_classes + 1),
        min_size=min_size,
        max_size=max_size,
        image_mean=c.image_mean,
        image_std=c.image_std,
        rpn_batch_size_per_image=c.rpn_batch_size_per_image,
        rpn_pre_nms_top_n_train=c.rpn_pre_nms_top_n_train,
        rpn_pre_nms_top_n_test=c.rpn_pre_nms_top_n_test,
        rpn_post_nms_top_n_train=c.rpn_post_nms_top_n_train,
        rpn_post_nms_top_n_test=c.rpn_post_nms_top_n_test,
        box_batch_size_per_image=c.box_batch_size_per_image,
    )
    nn.init.normal_(box_predictor.cls_score.weight, std=0.01)  # Detectron's, as ours
    nn.init.normal_(box_predictor.bbox_pred.weight, std=0.001)
    nn.init.zeros_(box_predictor.cls_score.bias)
    nn.init.zeros_(box_predictor.bbox_pred.bias)
    return model


@torch.inference_mode()
def coco_ap(model, dataset):
    """bbox and mask AP in percent, by pycocotools on the pasted masks that torchvision returns."""
    model.eval()
    results = []
    for image, target in tqdm([dataset[i] for i in range(len(dataset))], desc="evaluate"):
        found = model([image.float() / 255])[0]
        masks = np.asfortranarray(
            (found["masks"][:, 0] >= 0.5).permute(1, 2, 0).numpy().astype(np.uint8)
        )
        codes = coco_mask.encode(masks) if masks.shape[2] else []
        for box, label, score, code in zip(found["boxes"], found["labels"], found["scores"], codes):
            x1, y1, x2, y2 = box.tolist()
            results.append({
                "image_id": target["image_id"], "category_id": dataset.category_ids[label - 1],
                "bbox": [x1, y1, x2 - x1, y2 - y1], "score": score.item(), "segmentation": code,
            })  # fmt: skip
    aps = {}
    truth = dataset.coco_gt()
    for kind in ("bbox", "segm"):
        with contextlib.redirect_stdout(io.StringIO()):
            # pycocotools takes the area of the mask where a result has no "bbox"
            other = "segmentation" if kind == "bbox" else "bbox"
            chosen = [{k: v for k, v in r.items() if k != other}
                      for r in results]  # fmt: skip
            evaluation = COCOeval(truth, truth.loadRes(chosen), kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        aps[kind] = round(100 * float(evaluation.stats[0]), 2)
    return aps


def run(arguments):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="toy_coco", help="data set (toy_coco)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (0)")
    parser.add_argument("--iterations", type=int, help="length of the run (800)")
    args = parser.parse_args(arguments)
    recipe = train.RECIPES["toy"]
    recipe = replace(recipe, iterations=args.iterations or recipe.iterations)
    torch.manual_seed(args.seed)
    train_set = data.open_split(args.data, "train2017", training=True)
    val_set = data.open_split(args.data, "val2017")
    config = detector.build_model(num_classes=len(train_set.classes), **recipe.model).config
    model = build_peer(config, recipe.test_size, recipe.max_size).train()
    optimizer = train.make_optimizer(model, recipe)
    images = data.TrainingSet(train_set, recipe.min_sizes, recipe.max_size)
    sampler = data.BatchSampler(train_set, recipe.images_per_gpu, args.seed)
    loader = data.read_ahead(images, 2, sampler)
    start = time.perf_counter()
    bar = tqdm(range(recipe.iterations))
    for iteration in bar:
        for group in optimizer.param_groups:
            group["lr"] = train.learning_rate(iteration, recipe) * group["rate"]
        images, targets = next(loader)
        loss = sum(model([image.float() / 255 for image in images], targets).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if iteration % 10 == 0:
            bar.set_postfix_str(f"loss {loss.item():.3f}")
    minutes = (time.perf_counter() - start) / 60
    aps = coco_ap(model, val_set)
    print(
        f"torchvision, seed {args.seed}, {recipe.iterations} iterations: {minutes:.1f} min, {aps}"
    )


if __name__ == "__main__":
    sys.exit(evaluate.run_command("peer_torchvision.py", run))
