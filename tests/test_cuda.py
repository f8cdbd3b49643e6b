"""What CUDA will run, proved on the CPU: how much is launched and waited for, and the same numbers.

Nothing here needs a GPU. Kernels and waits are counted in the operators that torch dispatches.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.ops import boxes as torchvision_boxes

import model as detector
from norms import GroupNorm

NARROW = dict(
    stem_width=32, width_per_group=32, fpn_channels=32, box_head_channels=32,
    box_head_fc_channels=32, mask_head_channels=32,
)  # fmt: skip

# -- Launches and waits ----------------------------------------------------------------------------

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


def test_a_train_step_launches_and_waits_no_more_than_detectron2s(monkeypatch):
    # Detectron2's, of R50-FPN with GN on two images, counted in the same way: 1,456 and 66. (A
    # group norm is one kernel here, as there; written out for CUDA, it is 13 forward, 37 backward.)
    # On CUDA, torchvision's NMS takes this way for up to 25,000 boxes.
    shifted = torchvision_boxes._batched_nms_coordinate_trick
    monkeypatch.setattr(detector.ops, "batched_nms", shifted)
    torch.manual_seed(0)
    model = detector.build_model(**NARROW).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, foreach=True)
    images = [torch.randint(256, (3, 128, 160)).byte() for _ in range(2)]
    targets = []
    for seed in range(2):
        low = torch.rand(7, 2) * torch.tensor([96.0, 64.0])
        masks = torch.ones(7, 128, 160, dtype=torch.uint8)
        target = {"boxes": torch.cat([low, low + 40], dim=1), "labels": torch.arange(1, 8)}
        targets.append(target | {"masks": masks, "seed": seed})

    def step():
        losses = model(images, targets)
        optimizer.zero_grad(set_to_none=True)
        sum(losses.values()).backward()
        optimizer.step()

    step()  # makes anchors and momentum
    with Count() as count:
        step()
    assert len(count.waits) <= 66, count.waits
    assert 500 < count.launches <= 1456


# -- GroupNorm by torch's kernel, and by the formula -----------------------------------------------


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


def written_out(norm, x):
    """What the norm computes on CUDA."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "is_cuda", True, raising=False)
        return norm(x)


@pytest.mark.parametrize("function, memory", [
    (GroupNorm.__call__, torch.contiguous_format),  # not channels_last, which only CUDA has
    (written_out, torch.contiguous_format), (written_out, torch.channels_last),
])  # fmt: skip
@pytest.mark.parametrize("mean", [0.0, 100.0])  # in deviations
def test_both_ways_of_group_norm_are_exact(function, memory, mean):
    g = torch.Generator().manual_seed(0)
    norm = GroupNorm(64)
    with torch.no_grad():
        norm.weight.copy_(0.5 + torch.rand(64, generator=g))
        norm.bias.copy_(torch.randn(64, generator=g))
    group_means = mean * torch.linspace(-1, 1, 32).repeat_interleave(2)
    x = torch.randn(3, 64, 39, 34, generator=g) + group_means[:, None, None]
    x = x.to(memory_format=memory).requires_grad_()
    grad = torch.randn(x.shape, generator=g)
    y = function(norm, x)
    y.backward(grad)
    assert y.is_contiguous(memory_format=memory)
    expected = group_norm_in_float64(x, norm, grad)
    for found, exact in zip((y, x.grad, norm.weight.grad, norm.bias.grad), expected):
        error = (found.detach() - exact).abs().max() / exact.abs().max()
        assert error < 2e-6 + 2e-7 * mean  # float32 holds x, and products with it, to 1e-7


@pytest.mark.filterwarnings("ignore:var_mean")  # of nothing
def test_group_norm_written_out_keeps_bfloat16_with_statistics_in_float32():
    # Rounded to bfloat16 (8 bits), a mean of 50 deviations would be off by a tenth of a deviation.
    g = torch.Generator().manual_seed(0)
    norm = GroupNorm(64)
    x = (torch.randn(2, 64, 20, 20, generator=g) + 50).bfloat16().requires_grad_()
    grad = torch.randn(x.shape, generator=g).bfloat16()
    y = written_out(norm, x)
    y.backward(grad)
    expected = group_norm_in_float64(x, norm, grad)
    assert y.dtype == x.grad.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), expected[0], atol=1e-2, rtol=2**-8)
    torch.testing.assert_close(x.grad.double(), expected[1], atol=1e-2, rtol=2**-7)
    torch.testing.assert_close(norm.weight.grad.double(), expected[2], atol=1e-2, rtol=2**-8)
    assert written_out(norm, x[:0]).shape == (0, 64, 20, 20)  # no RoIs


# -- Autocast --------------------------------------------------------------------------------------


def test_objectness_is_float32_under_autocast():
    torch.manual_seed(0)
    model = detector.build_model(**NARROW)
    features = [torch.randn(1, 32, 64 // 2**i, 64 // 2**i) for i in range(5)]
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        objectness, deltas, _ = model.rpn(features)
    logits = objectness[0].flatten()
    assert logits.dtype == deltas[0].dtype == torch.float32
    assert len(logits.unique()) > 0.9 * len(logits)  # in bfloat16, a few hundred values
