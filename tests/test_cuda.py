"""What CUDA will run, proved on the CPU: how much is launched and waited for, and the same numbers.

Nothing here needs a GPU. Kernels and waits are counted in the operators that torch dispatches, with
the branches taken that CUDA takes.
"""

import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.ops import nms

import model as detector
from norms import GroupNorm

NARROW = dict(
    stem_width=32, width_per_group=32, fpn_channels=32, box_head_channels=32,
    box_head_fc_channels=32, mask_head_channels=32,
)  # fmt: skip

# ------------------------------------------------------------------------------------------------
# Launches and waits
# ------------------------------------------------------------------------------------------------

# Operators that launch nothing: views and allocations.
FREE = set("""
    view _unsafe_view expand permute transpose t slice select unsqueeze squeeze split unbind alias
    split_with_sizes detach as_strided diagonal empty new_empty empty_like empty_strided lift_fresh
    new_empty_strided _reshape_alias set_ unfold detach_ squeeze_ unsqueeze_ t_ transpose_
    is_same_size
""".split())  # fmt: skip
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "nms", "_unique2"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}


class Count(TorchDispatchMode):
    """Counts operators that launch kernels, and places where the host has to wait for the GPU."""

    def __init__(self):
        super().__init__()
        self.launches, self.waits = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        self.launches += name not in FREE
        waits = name in WAITING
        if name in INDEXING:
            by_mask = any(i is not None and i.dtype == torch.bool for i in args[1])
            scalar = name != "index" and args[2].dim() == 0  # a fill, not a copy
            waits = by_mask != scalar
        if waits:
            self.waits.append(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def count(monkeypatch):
    """Counts what a function does as on CUDA: (launches, waits)."""
    monkeypatch.setattr(detector, "nms_one_by_one", detector.nms_in_rounds)
    tolist = torch.Tensor.tolist

    def run(function):
        counted = Count()

        def counted_tolist(tensor):
            counted.waits.append("tolist")
            return tolist(tensor)

        with monkeypatch.context() as patch, counted:
            patch.setattr(torch.Tensor, "tolist", counted_tolist)
            function()
        return counted.launches, counted.waits

    return run


def make_batch(images, height=128, width=160):
    g = torch.Generator().manual_seed(images)
    batch, targets = [], []
    for seed in range(images):
        batch.append(torch.randint(0, 255, (3, height, width), dtype=torch.uint8, generator=g))
        low = torch.rand(7, 2, generator=g) * torch.tensor([width, height]) * 0.6
        boxes = torch.cat([low, low + 16], dim=1)
        masks = torch.ones(7, height, width, dtype=torch.uint8)
        labels = torch.randint(1, 81, (7,), generator=g)
        targets.append({"boxes": boxes, "labels": labels, "masks": masks, "seed": seed})
    return batch, targets


@pytest.mark.parametrize("images, most", [(2, 950), (8, 1000)])
def test_a_train_step_of_r50_fpn_gn_stays_within_its_budget(count, images, most):
    torch.manual_seed(0)
    model = detector.build_model(**NARROW, box_batch_size_per_image=64).train()
    biases = [p for p in model.parameters() if p.dim() == 1]
    weights = [p for p in model.parameters() if p.dim() > 1]
    groups = [{"params": p} for p in (biases[::2], biases[1::2], weights)]  # three, as train.py has
    optimizer = torch.optim.SGD(groups, lr=1e-3, momentum=0.9, fused=True)
    batch, targets = make_batch(images, 64, 96)

    def step():
        losses = model(batch, targets)
        optimizer.zero_grad(set_to_none=True)
        sum(losses.values()).backward()
        optimizer.step()

    step()  # anchors, momentum
    launches, waits = count(step)
    assert len(waits) <= 2, waits
    assert launches <= most, launches


def test_inference_waits_four_times_for_an_image(count):
    torch.manual_seed(0)
    model = detector.build_model(**NARROW).eval()
    (image,), _ = make_batch(1)
    with torch.no_grad():
        model([image])
        launches, waits = count(lambda: model([image]))
    assert len(waits) <= 4, waits


# ------------------------------------------------------------------------------------------------
# Non-maximum suppression
# ------------------------------------------------------------------------------------------------


def candidates(kind, n, g):
    """Boxes [n, 4] and scores [n] that are hard for NMS in one way."""
    low = torch.rand(n, 2, generator=g) * 60
    boxes = torch.cat([low, low + 1 + torch.rand(n, 2, generator=g) * 40], dim=1)
    scores = torch.rand(n, generator=g)
    if kind == "ties":  # of scores, and of overlaps with the thresholds 0.5 and 0.7
        boxes, scores = boxes.div(10).round().mul(10), (scores * 5).round()
    elif kind == "nested":
        size = torch.linspace(1, 80, n)[:, None]
        boxes = torch.cat([50 - size / 2, 50 - size / 2, 50 + size / 2, 50 + size / 2], dim=1)
    elif kind == "chain":  # each overlaps the next one only: the result takes n / 2 rounds
        at = torch.arange(n, dtype=torch.float32)[:, None] * 2
        boxes = torch.cat([at, 0 * at, at + 10, 0 * at + 10], dim=1)
        scores = torch.arange(n, 0, -1).float()
    elif kind == "empty":
        boxes[::2, 2:] = boxes[::2, :2]
        boxes[1::4, 2:] -= 30  # x2 < x1
    elif kind == "equal":
        boxes, scores = boxes[:1].expand(n, 4).clone(), torch.ones(n)
    return boxes, scores


def nms_of_torchvision(boxes, scores, groups, threshold, most):
    """The same by torchvision's function for each image and group, a list of index tensors."""
    kept = []
    for b, s, g in zip(boxes, scores, groups):
        keep = torch.zeros(len(s), dtype=torch.bool)
        for group in g.unique():
            here = ((g == group) & (s > -math.inf)).nonzero()[:, 0]
            keep[here[nms(b[here], s[here], threshold)]] = True
        kept.append(keep)
    return kept


@pytest.mark.parametrize("way", ["one by one", "in rounds"])
@pytest.mark.parametrize("kind", ["random", "ties", "nested", "chain", "empty", "equal"])
def test_nms_keeps_what_torchvision_keeps_of_each_image_and_group(kind, way, monkeypatch):
    ways = []
    if way == "in rounds":  # first; the other way only where they do not settle, or too few survive
        one_by_one = detector.nms_one_by_one

        def suppress(*arguments):
            return ways.pop()(*arguments)

        monkeypatch.setattr(detector, "nms_one_by_one", suppress)
    for seed, (n, most, threshold) in enumerate([(1, 5, 0.5), (150, 400, 0.7), (1300, 20, 0.5)]):
        g = torch.Generator().manual_seed(seed)
        pairs = [candidates(kind, n, g) for _ in range(2)]
        boxes, scores = (torch.stack(x) for x in zip(*pairs))
        groups = torch.randint(3, (2, n), generator=g) if kind != "chain" else torch.zeros(2, n)
        scores = scores.masked_fill(torch.rand(2, n, generator=g) < 0.1, -math.inf)
        if way == "in rounds":
            ways[:] = [one_by_one, detector.nms_in_rounds]
        index, valid, counts = detector.nms(boxes, scores, groups.long(), threshold, most)
        assert valid.sum(dim=1).tolist() == counts
        expected = nms_of_torchvision(boxes, scores, groups.long(), threshold, most)
        for i, keep in enumerate(expected):
            found = index[i, : counts[i]]
            assert counts[i] == min(keep.sum(), most) and index.shape == (2, min(most, n))
            assert keep[found].all() and len(found.unique()) == counts[i]
            # The best ones, in order of their scores (of equal scores, any)
            best = scores[i].masked_fill(~keep, -math.inf).sort(descending=True).values
            assert torch.equal(scores[i, found], best[: counts[i]])


# ------------------------------------------------------------------------------------------------
# GroupNorm written out
# ------------------------------------------------------------------------------------------------


def group_norm_in_float64(x, norm, grad):
    """Output and the gradients of x, weight and bias, from the definition."""
    x = x.detach().double().contiguous().requires_grad_()
    weight, bias = (p.detach().double().requires_grad_() for p in (norm.weight, norm.bias))
    groups = x.view(len(x), norm.num_groups, -1)
    mean = groups.mean(dim=2, keepdim=True)
    var = (groups - mean).square().mean(dim=2, keepdim=True)
    y = ((groups - mean) / (var + norm.eps).sqrt()).view_as(x)
    y = y * weight[:, None, None] + bias[:, None, None]
    y.backward(grad.double())
    return y.detach(), x.grad, weight.grad, bias.grad


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("mean", [0.0, 100.0])  # in deviations
def test_both_ways_of_group_norm_are_exact(memory, mean):
    g = torch.Generator().manual_seed(0)
    norm = GroupNorm(64)
    with torch.no_grad():
        norm.weight.copy_(0.5 + torch.rand(64, generator=g))
        norm.bias.copy_(torch.randn(64, generator=g))
    group_means = mean * torch.linspace(-1, 1, 32).repeat_interleave(2)
    x = torch.randn(3, 64, 39, 34, generator=g) + group_means[:, None, None]
    x = x.to(memory_format=memory)
    grad = torch.randn(x.shape, generator=g)
    expected = group_norm_in_float64(x, norm, grad)
    for function in (norm.written_out, norm):
        own = x.clone().requires_grad_()
        norm.zero_grad(set_to_none=True)
        y = function(own)
        y.backward(grad)
        assert y.is_contiguous(memory_format=memory)
        for found, exact in zip((y, own.grad, norm.weight.grad, norm.bias.grad), expected):
            error = (found.detach() - exact).abs().max() / exact.abs().max()
            assert error < 2e-6 + 2e-7 * mean  # float32 holds x, and products with it, to 1e-7


@pytest.mark.filterwarnings("ignore:var_mean")  # of nothing
def test_group_norm_written_out_keeps_bfloat16_with_statistics_in_float32():
    # Rounded to bfloat16 (8 bits), a mean of 50 deviations would be off by a tenth of a deviation.
    g = torch.Generator().manual_seed(0)
    norm = GroupNorm(64)
    x = (torch.randn(2, 64, 20, 20, generator=g) + 50).bfloat16().requires_grad_()
    grad = torch.randn(x.shape, generator=g).bfloat16()
    y = norm.written_out(x)
    y.backward(grad)
    expected = group_norm_in_float64(x, norm, grad)
    assert y.dtype == x.grad.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), expected[0], atol=1e-2, rtol=2**-8)
    torch.testing.assert_close(x.grad.double(), expected[1], atol=1e-2, rtol=2**-7)
    torch.testing.assert_close(norm.weight.grad.double(), expected[2], atol=1e-2, rtol=2**-8)
    assert norm.written_out(x[:0]).shape == (0, 64, 20, 20)  # no RoIs


# ------------------------------------------------------------------------------------------------
# torch.compile and autocast
# ------------------------------------------------------------------------------------------------


def test_compiled_parts_give_the_same_numbers_and_are_compiled_once():
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = detector.build_model(**NARROW, blocks=(1, 1, 1, 1), box_head_convs=1).train()
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.GroupNorm):
                m.weight.uniform_(0.5, 1.5)
    compilations = []

    def backend(graph, inputs):
        compilations.append(graph)
        return torch._dynamo.backends.debugging.aot_eager(graph, inputs)

    parts = {
        model.backbone.res2: [(2, 32, 16, 24), (2, 32, 24, 32), (3, 32, 32, 16)],
        model.box_heads[0].convs: [(20, 32, 7, 7), (90, 32, 7, 7), (300, 32, 7, 7)],
    }
    for part, shapes in parts.items():
        compiled = torch.compile(part, backend=backend, dynamic=True)
        seen = len(compilations)
        for shape in shapes:
            x = torch.randn(shape)
            torch.testing.assert_close(compiled(x), part(x), atol=1e-4, rtol=1e-4)
        assert len(compilations) == seen + 1  # not again for another size
    torch._dynamo.reset()


def test_objectness_is_float32_under_autocast():
    torch.manual_seed(0)
    model = detector.build_model(**NARROW)
    features = [torch.randn(1, 32, 64 // 2**i, 64 // 2**i) for i in range(5)]
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        objectness, deltas, _ = model.rpn(features)
    logits = objectness[0].flatten()
    assert logits.dtype == deltas[0].dtype == torch.float32
    assert len(logits.unique()) > 0.9 * len(logits)  # in bfloat16, a few hundred values
