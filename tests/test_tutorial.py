"""torchvision's fine-tuning tutorial ("Object Detection Finetuning"), step by step, on this model.

What differs from the tutorial is what docs/pieces.md lists: build_model in place of
maskrcnn_resnet50_fpn and its new predictors, num_classes without background, predict for masks in
the pixels of the image.
"""

import math

import pytest
import torch
from torchvision import tv_tensors
from torchvision.ops import masks_to_boxes
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

import evaluate
import model as detector
from tests.test_recipes import SMALL_FPN


class Pedestrians(torch.utils.data.Dataset):
    """Images with a mask of instance numbers, as PennFudanPed has them; here, bright rectangles."""

    def __init__(self, count, transforms):
        self.count, self.transforms = count, transforms

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        image = torch.randint(0, 60, (3, 72, 96), dtype=torch.uint8, generator=generator)
        mask = torch.zeros(72, 96, dtype=torch.int64)
        for instance in (1, 2):
            x, y = (int(torch.randint(0, 20, (), generator=generator)) for _ in "xy")
            place = (slice(y + 8, y + 48), slice(x + 48 * (instance - 1), x + 48 * instance - 24))
            mask[place] = instance
            image[:, place[0], place[1]] = 200
        masks = (mask == mask.unique()[1:, None, None]).to(torch.uint8)
        boxes = masks_to_boxes(masks)
        target = {
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=image.shape[-2:]),
            "masks": tv_tensors.Mask(masks),
            "labels": torch.ones(len(masks), dtype=torch.int64),
            "image_id": index,
            "area": (boxes[:, 3] - boxes[:, 1]) * (boxes[:, 2] - boxes[:, 0]),
            "iscrowd": torch.zeros(len(masks), dtype=torch.int64),
        }
        return self.transforms(tv_tensors.Image(image), target)


def get_transform(train):
    transforms = [v2.RandomHorizontalFlip(0.5)] if train else []
    return v2.Compose([*transforms, v2.ToDtype(torch.float, scale=True), v2.ToPureTensor()])


def train_one_epoch(model, optimizer, loader):
    """The loop of the tutorial's engine.py, without its printing; returns the mean loss."""
    model.train()
    seen = []
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=len(loader))
    for images, targets in loader:
        images = [image.to("cpu") for image in images]
        targets = [
            {k: v.to("cpu") if isinstance(v, torch.Tensor) else v for k, v in target.items()}
            for target in targets
        ]
        losses = sum(loss for loss in model(images, targets).values())
        assert math.isfinite(losses.item())
        seen.append(losses.item())
        optimizer.zero_grad()
        losses.backward()
        optimizer.step()
        warmup.step()
    return sum(seen) / len(seen)


@pytest.mark.parametrize("pure", [True, False])  # False: tv_tensors go in as they are
def test_torchvisions_finetuning_tutorial_runs_on_this_model(pure):
    torch.manual_seed(0)
    transforms = get_transform(train=True)
    if not pure:
        transforms = v2.Compose(transforms.transforms[:-1])
    loader = torch.utils.data.DataLoader(
        Pedestrians(8, transforms),
        batch_size=2,
        shuffle=True,
        collate_fn=lambda batch: tuple(zip(*batch)),
    )
    # 1 class, the person: background is not counted
    model = detector.build_model("resnet50", num_classes=1, **SMALL_FPN)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.02, momentum=0.9, weight_decay=0.0005)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.1)
    losses = []
    for _ in range(2 if pure else 1):
        losses.append(train_one_epoch(model, optimizer, loader))
        scheduler.step()
    assert not pure or losses[1] < losses[0]

    model.eval()
    image, _ = Pedestrians(9, get_transform(train=False))[8]
    with torch.no_grad():
        (prediction,) = model([image])
    assert prediction["masks"].shape[1:] == (28, 28)  # torchvision: [N, 1, H, W]
    # predict resizes, and pastes the masks into the image
    prediction = evaluate.predict(model, image, min_size=72, max_size=96)
    assert prediction["masks"].shape[1:] == image.shape[1:]
    shown = functional.to_dtype(image, torch.uint8, scale=True)
    names = [f"pedestrian: {score:.3f}" for score in prediction["scores"]]
    shown = draw_bounding_boxes(shown, prediction["boxes"].long(), names, colors="red")
    shown = draw_segmentation_masks(shown, prediction["masks"], alpha=0.5, colors="blue")
    assert shown.shape == image.shape
