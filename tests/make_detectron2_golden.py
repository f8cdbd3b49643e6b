"""Make tests/golden_*.npz: Detectron2's numbers, with which tests/test_agreement.py compares ours.

  python tests/make_detectron2_golden.py [CASE ...]

Needs Detectron2, which is neither fetched nor built here: any version with ROIAlignV2 (0.1 and
later). The files hold outputs only; weights, images and targets come from test_agreement.py.
"""

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the five modules

import test_agreement as shared

import model as detector
from tools import convert_weights

LEVELS = ["p2", "p3", "p4", "p5", "p6"]


def detectron2_config(config):
    """Detectron2's configuration for a Config of ours."""
    from detectron2.config import get_cfg

    cfg = get_cfg()
    norm = {"gn": "GN", "syncbn": "SyncBN", "frozen_bn": "FrozenBN"}[config.norm]
    head_norm = "" if norm == "FrozenBN" else norm
    mean, std = ([255 * v for v in reversed(s)] for s in (config.image_mean, config.image_std))
    options = {
        "MODEL.DEVICE": "cpu",
        "MODEL.META_ARCHITECTURE": "GeneralizedRCNN",
        "MODEL.PIXEL_MEAN": mean,  # BGR
        "MODEL.PIXEL_STD": std,
        "MODEL.BACKBONE.NAME": "build_resnet_fpn_backbone",
        "MODEL.BACKBONE.FREEZE_AT": 0,
        "MODEL.RESNETS.DEPTH": 50,
        "MODEL.RESNETS.NORM": norm,
        "MODEL.RESNETS.STRIDE_IN_1X1": config.stride_in_1x1,
        "MODEL.RESNETS.STEM_OUT_CHANNELS": config.stem_width,
        "MODEL.RESNETS.RES2_OUT_CHANNELS": 4 * config.stem_width,
        "MODEL.RESNETS.WIDTH_PER_GROUP": config.width_per_group,
        "MODEL.RESNETS.OUT_FEATURES": ["res2", "res3", "res4", "res5"],
        "MODEL.FPN.IN_FEATURES": ["res2", "res3", "res4", "res5"],
        "MODEL.FPN.OUT_CHANNELS": config.fpn_channels,
        "MODEL.FPN.NORM": head_norm,
        "MODEL.ANCHOR_GENERATOR.SIZES": [[32], [64], [128], [256], [512]],
        "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": [[0.5, 1.0, 2.0]],
        "MODEL.RPN.IN_FEATURES": LEVELS,
        "MODEL.RPN.BATCH_SIZE_PER_IMAGE": config.rpn_batch_size_per_image,
        "MODEL.RPN.SMOOTH_L1_BETA": config.rpn_smooth_l1_beta,
        "MODEL.RPN.PRE_NMS_TOPK_TRAIN": config.rpn_pre_nms_top_n_train,
        "MODEL.RPN.PRE_NMS_TOPK_TEST": config.rpn_pre_nms_top_n_test,
        "MODEL.RPN.POST_NMS_TOPK_TRAIN": config.rpn_post_nms_top_n_train,
        "MODEL.RPN.POST_NMS_TOPK_TEST": config.rpn_post_nms_top_n_test,
        "MODEL.ROI_HEADS.NAME": "CascadeROIHeads" if config.cascade else "StandardROIHeads",
        "MODEL.ROI_HEADS.IN_FEATURES": LEVELS[:4],
        "MODEL.ROI_HEADS.NUM_CLASSES": config.num_classes,
        "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": config.box_batch_size_per_image,
        "MODEL.ROI_BOX_HEAD.NAME": "FastRCNNConvFCHead",
        "MODEL.ROI_BOX_HEAD.NORM": head_norm,
        "MODEL.ROI_BOX_HEAD.NUM_CONV": config.box_head_convs,
        "MODEL.ROI_BOX_HEAD.NUM_FC": config.box_head_fcs,
        "MODEL.ROI_BOX_HEAD.CONV_DIM": config.box_head_channels,
        "MODEL.ROI_BOX_HEAD.FC_DIM": config.box_head_fc_channels,
        "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 7,
        "MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO": config.roi_sampling_ratio,
        "MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA": config.box_smooth_l1_beta,
        "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": config.cascade,
        "MODEL.MASK_ON": config.masks,
        "MODEL.ROI_MASK_HEAD.NAME": "MaskRCNNConvUpsampleHead",
        "MODEL.ROI_MASK_HEAD.NORM": head_norm,
        "MODEL.ROI_MASK_HEAD.NUM_CONV": 4,
        "MODEL.ROI_MASK_HEAD.CONV_DIM": config.mask_head_channels,
        "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION": 14,
        "MODEL.ROI_MASK_HEAD.POOLER_SAMPLING_RATIO": config.roi_sampling_ratio,
        "MODEL.KEYPOINT_ON": config.keypoints > 0,
        "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS": [config.keypoint_head_channels] * 8,
        "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS": config.keypoints or 17,
        "INPUT.MASK_FORMAT": "bitmask",
    }
    for name, value in options.items():
        cfg.merge_from_list([name, value])
    return cfg


def detectron2_model(config, weights):
    """A model of Detectron2 in evaluation mode, filled with a state dict."""
    from detectron2.modeling import build_model

    model = build_model(detectron2_config(config)).eval()
    result = model.load_state_dict(weights, strict=False)
    missing = [n for n in result.missing_keys if not n.endswith("num_batches_tracked")]
    assert not missing and not result.unexpected_keys, (missing, result.unexpected_keys)
    return model


@torch.no_grad()
def detections(model, image):
    """Everything on the way to the detections of an RGB image: {name: tensor}."""
    images = model.preprocess_image([{"image": image.flip(0)}])
    features = model.backbone(images.tensor)
    levels = [features[name] for name in LEVELS]
    found = dict(zip(LEVELS, levels))
    objectness, deltas = model.proposal_generator.rpn_head(levels)
    found["objectness"] = torch.cat([x.permute(0, 2, 3, 1).flatten() for x in objectness])
    found["rpn_deltas"] = torch.cat([x.permute(0, 2, 3, 1).flatten() for x in deltas])
    anchors = model.proposal_generator.anchor_generator(levels)
    found["anchors"] = torch.cat([a.tensor for a in anchors])
    proposals, _ = model.proposal_generator(images, features, None)
    found["proposals"] = proposals[0].proposal_boxes.tensor
    heads = model.roi_heads
    pooled = heads.box_pooler(levels[:4], [p.proposal_boxes for p in proposals])
    stages = [(heads.box_head, heads.box_predictor)]
    if isinstance(heads.box_head, torch.nn.ModuleList):  # a cascade
        stages = zip(heads.box_head, heads.box_predictor)
    for i, (head, predictor) in enumerate(stages):  # of all stages for the first one's RoIs
        found[f"class_logits_{i}"], found[f"box_deltas_{i}"] = predictor(head(pooled))
    instances, _ = heads(images, features, proposals, None)
    found["boxes"] = instances[0].pred_boxes.tensor.clone()
    found["scores"] = instances[0].scores.clone()
    found["labels"] = instances[0].pred_classes.clone() + 1
    if heads.keypoint_on:
        found["heatmaps"] = instances[0].pred_keypoint_heatmaps.clone()
        found["keypoints"] = instances[0].pred_keypoints.clone()
    if heads.mask_on:
        from detectron2.modeling.postprocessing import detector_postprocess

        found["masks"] = instances[0].pred_masks[:, 0].clone()
        size = [round(side * shared.OUTPUT_SCALE) for side in image.shape[-2:]]
        found["final_masks"] = detector_postprocess(instances[0], *size).pred_masks
    return found


def losses(model, images, targets):
    """Losses of a batch and the norm of every parameter's gradient: two dicts of floats."""
    from detectron2.structures import BitMasks, Boxes, Instances, Keypoints
    from detectron2.utils.events import EventStorage

    batch = []
    for image, target in zip(images, targets):
        instances = Instances(tuple(image.shape[-2:]))
        instances.gt_boxes = Boxes(target["boxes"])
        instances.gt_classes = target["labels"] - 1
        instances.gt_masks = BitMasks(target["masks"])
        instances.gt_keypoints = Keypoints(target["keypoints"])
        batch.append({"image": image.flip(0), "instances": instances})
    with EventStorage(0):
        found = model.train()(batch)
    sum(found.values()).backward()
    norms = {n: p.grad.norm().item() for n, p in model.named_parameters() if p.grad is not None}
    return {name: value.item() for name, value in found.items()}, norms


def pack(found):
    """What of the detections goes into the file: enough to notice any mistake, in few numbers."""
    packed = {}
    for name, value in found.items():
        value = value.numpy()
        if name in LEVELS or name in ("objectness", "rpn_deltas", "anchors"):
            value = shared.subsample(value)
        elif name.startswith(("class_logits", "box_deltas")):
            value = value[:: -(-len(value) // 25)]
        elif name == "masks":
            value = value[:, 1::3, 1::3]
        elif name == "heatmaps":
            value = value[:, ::4, 3::8, 3::8]
        elif name == "final_masks":
            packed["final_areas"] = value.sum((1, 2))
            value = np.packbits(value[::10])
        packed[name] = value
    return packed


def main(cases):
    torch.manual_seed(0)
    images = shared.golden_images()
    for case in cases or shared.CASES:
        ours = detector.build_model(**shared.golden_arguments(case))
        plain = convert_weights.to_detectron2(ours)
        weights = shared.golden_weights(case, {n: tuple(t.shape) for n, t in plain.items()})
        model = detectron2_model(ours.config, weights)
        content = {}
        for i, image in enumerate(images):
            found = pack(detections(model, image))
            content |= {f"{i}/{name}": value for name, value in found.items()}
        values, norms = losses(model, images, shared.golden_targets(case))
        content |= {f"loss/{name}": np.float32(value) for name, value in values.items()}
        content |= {f"norm/{name}": np.float32(value) for name, value in norms.items()}
        np.savez_compressed(Path(__file__).parent / f"golden_{case}.npz", **content)


if __name__ == "__main__":
    main(sys.argv[1:])
