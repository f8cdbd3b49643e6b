"""torchvision's fine-tuning tutorial ("Object Detection Finetuning"), step by step, on this model.

What differs from the tutorial is what docs/pieces.md lists: build_model in place of
maskrcnn_resnet50_fpn and its new predictors, num_classes without background, predict for masks in
the pixels of the image.
"""

import math

import pytest
import torch
from tiny_run import NARROW
from torchvision import tv_tensors
from torchvision.ops import masks_to_boxes
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

import evaluate
import model as detector


class Pedestrians(torch.utils.data.Dataset):
    """Images with a mask of instance numbers, as PennFudanPed has them; here, bright rectangles."""

    def __init__(self, transforms):
        self.transforms = transforms

    def __len__(self):
        return 6

    def __getitem__(self, index):
        image = torch.full((3, 72, 96), 30 + index, dtype=torch.uint8)
        mask = torch.zeros(72, 96, dtype=torch.int64)
        for instance, x in ((1, 5 + index), (2, 50 + index)):
            mask[20:60, x : x + 24] = instance
            image[:, 20:60, x : x + 24] = 200
        masks = (mask == mask.unique()[1:, None, None]).to(torch.uint8)
        boxes = masks_to_boxes(masks)
        target = {"image_id": index, "labels": torch.ones(2, dtype=torch.int64)}
        target |= {"area": masks.sum(dim=(1, 2)), "iscrowd": torch.zeros(2, dtype=torch.int64)}
        target["boxes"] = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(72, 96))
        target["masks"] = tv_tensors.Mask(masks)
        return self.transforms(tv_tensors.Image(image), target)


def get_transform(train, pure=True):
    transforms = [v2.RandomHorizontalFlip(0.5)] if train else []
    transforms.append(v2.ToDtype(torch.float, scale=True))
    return v2.Compose(transforms + [v2.ToPureTensor()] * pure)


def train_one_epoch(model, optimizer, loader):
    """The loop of the tutorial's engine.py, without its printing."""
    model.train()
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=len(loader))
    for images, targets in loader:
        losses = sum(loss for loss in model(list(images), list(targets)).values())
        assert math.isfinite(losses.item())
        optimizer.zero_grad()
        losses.backward()
        optimizer.step()
        warmup.step()


@pytest.mark.parametrize("pure", [True, False])  # False: tv_tensors go in as they are
def test_torchvisions_finetuning_tutorial_runs_on_this_model(pure):
    torch.manual_seed(0)
    loader = torch.utils.data.DataLoader(
        Pedestrians(get_transform(train=True, pure=pure)),
        batch_size=2,
        shuffle=True,
        collate_fn=lambda batch: tuple(zip(*batch)),
    )
    # 1 class, the person: background is not counted
    model = detector.build_model("resnet50", num_classes=1, **NARROW)
    parameters = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.SGD(parameters, lr=0.005, momentum=0.9, weight_decay=0.0005)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.1)
    train_one_epoch(model, optimizer, loader)
    scheduler.step()
    assert not any(map(torch.equal, before, parameters))  # all of them learn

    model.eval()
    image, _ = Pedestrians(get_transform(train=False))[0]
    with torch.no_grad():
        [prediction] = model([image])
    count = len(prediction["boxes"])
    assert prediction["masks"].shape == (count, 28, 28)  # torchvision: [N, 1, H, W]
    # predict resizes, and pastes the masks into the image
    prediction = evaluate.predict(model, image, min_size=72, max_size=96)
    assert prediction["masks"].shape == (len(prediction["boxes"]), *image.shape[1:])
    shown = functional.to_dtype(image, torch.uint8, scale=True)
    names = [f"pedestrian: {score:.3f}" for score in prediction["scores"]]
    shown = draw_bounding_boxes(shown, prediction["boxes"].long(), names, colors="red")
    shown = draw_segmentation_masks(shown, prediction["masks"], alpha=0.5, colors="blue")
    assert shown.shape == image.shape
