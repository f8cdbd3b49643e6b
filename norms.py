"""Normalization layers, Sec. 3.1 of "Rethinking ImageNet Pre-training" (arXiv 1811.08883).

Batch normalization cannot train a detector from scratch as it is: with 1 or 2 images per GPU its
statistics are too noisy, and the usual escape, freezing them at their ImageNet values, needs a
pre-trained model. The paper uses either of two layers that work with small batches:

  GroupNorm       statistics of one image only, over groups of channels; no batch involved
  SyncBatchNorm   BN whose statistics come from all GPUs (8 x 2 images)

in place of what detectors used before:

  FrozenBatchNorm BN turned into a fixed affine map; only makes sense with pre-trained statistics
  BatchNorm       BN over the images of one GPU: what small batches break

This file imports torch only. Each class can be lifted out, SyncBatchNorm with AllReduceSum.
"""

import torch
import torch.distributed as dist
from torch import nn


class GroupNorm(nn.GroupNorm):
    """Group normalization (Wu and He, ECCV 2018) with the paper's setting: 32 groups, eps 1e-5.

    Raises ValueError if `channels` cannot be divided into `groups`.
    """

    def __init__(self, channels, groups=32, eps=1e-5):
        if channels % groups != 0:
            raise ValueError(
                f"GroupNorm cannot divide {channels} channels into {groups} groups; "
                f"choose widths that are multiples of {groups}."
            )
        super().__init__(groups, channels, eps)


class FrozenBatchNorm(nn.Module):
    """y = (x - running_mean) / sqrt(running_var + eps) * weight + bias, and none of it is trained.

    The layer of fine-tuned detectors before this paper ("channel-wise affine" in Detectron). The
    four vectors are buffers with the names of nn.BatchNorm2d, so its weights load as they are.
    """

    def __init__(self, channels, eps=1e-5):
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x):  # [N, C, H, W] -> the same
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return torch.addcmul(shift.to(x.dtype)[:, None, None], x, scale.to(x.dtype)[:, None, None])

    def extra_repr(self):
        return f"{len(self.weight)}, eps={self.eps}"


class BatchNorm(nn.BatchNorm2d):
    """nn.BatchNorm2d over the images of this process alone; the layer that small batches break.

    A batch without elements (no RoIs) leaves the running statistics as they are, on every device.
    """

    def forward(self, x):
        if x.numel() > 0:
            return super().forward(x)
        return x * self.weight[:, None, None] + self.bias[:, None, None]


class AllReduceSum(torch.autograd.Function):
    """Sum of a tensor over all processes, differentiable.

    Why the backward is an all-reduce too: every process r computes its own loss L_r from the same
    sum s = x_1 + ... + x_R, and what is minimized is the sum of all the losses. So the gradient
    with respect to *any* x_i is d(L_1 + ... + L_R)/ds: the sum of what the processes hold.
    (DDP then divides every gradient by R, which makes the sum of the losses their mean.)
    """

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, grad):
        total = grad.contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


class SyncBatchNorm(nn.BatchNorm2d):
    """nn.BatchNorm2d whose training statistics are those of the batches of all processes together.

    Parameters, buffers and evaluation are nn.BatchNorm2d's. Processes may have different numbers
    of images, of different sizes, even none: every element counts the same, and a process without
    any still joins the all-reduces of the forward and of the backward pass, which would otherwise
    wait for it for ever. With one process this is plain BN over its batch.

    On CUDA, torch's fused kernels compute the same, but wait for the device once a layer, and let
    the running statistics decay where no process has any element; elsewhere (gloo) the code below
    does it.
    """

    def __init__(self, channels, eps=1e-5, momentum=0.1, process_group=None):
        super().__init__(channels, eps, momentum)
        self.process_group = process_group

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        world_size = 1
        if dist.is_available() and dist.is_initialized():
            world_size = dist.get_world_size(self.process_group)
        if world_size == 1 and x.numel() > 0:
            return super().forward(x)
        if world_size > 1 and x.is_cuda:
            return self._forward_cuda(x, world_size)
        return self._forward(x, world_size)

    def _forward(self, x, world_size):
        # Each process sends the sum and the sum of squares of each channel, and its number of
        # elements. The squares are summed around the local mean and moved to zero in float64:
        # E[x^2] - E[x]^2 in float32 would lose the variance of channels whose mean is large.
        n = x.numel() // x.shape[1]
        x32 = x.float()
        local_mean = x32.sum(dim=(0, 2, 3)) / max(n, 1)  # [C]
        squares = (x32 - local_mean[:, None, None]).square().sum(dim=(0, 2, 3)).double()
        local_mean = local_mean.double()
        moments = torch.cat([local_mean * n, squares + local_mean.square() * n])
        sums = torch.cat([moments, moments.new_tensor([float(n)])])  # [2C + 1]
        if world_size > 1:
            sums = AllReduceSum.apply(sums, self.process_group)
        count = sums[-1].detach().clamp(min=1)
        mean, square = (sums[:-1] / count).chunk(2)
        var = square - mean.square()  # biased, as BN normalizes with it

        with torch.no_grad():
            # A batch without any element anywhere (count 0) leaves the running statistics alone;
            # `torch.where` and not `if`, so that no process has to wait for the number.
            seen = sums[-1] > 0
            unbiased = var * (count / (count - 1).clamp(min=1))
            for running, batch in ((self.running_mean, mean), (self.running_var, unbiased)):
                batch = batch.to(running.dtype)
                running.copy_(torch.where(seen, running.lerp(batch, self.momentum), running))
            self.num_batches_tracked += 1

        scale = self.weight * (var + self.eps).rsqrt().float()
        shift = self.bias - mean.float() * scale
        return torch.addcmul(shift[:, None, None], x32, scale[:, None, None]).to(x.dtype)

    def _forward_cuda(self, x, world_size):
        from torch.nn.modules._functions import SyncBatchNorm as fused  # torch's own layer calls it

        self.num_batches_tracked += 1
        group = self.process_group or dist.group.WORLD
        # A process without elements sends its zeros in its own dtype; the others send float32.
        y = fused.apply(
            x if x.numel() > 0 else x.float(), self.weight, self.bias,
            self.running_mean, self.running_var, self.eps, self.momentum, group, world_size,
        )  # fmt: skip
        return y.to(x.dtype)


NORMS = {
    "gn": GroupNorm,
    "syncbn": SyncBatchNorm,
    "bn": BatchNorm,
    "frozen_bn": FrozenBatchNorm,
    "none": lambda channels: nn.Identity(),
}


def make_norm(kind, channels):
    """The normalization layer `kind` ("gn", "syncbn", "bn", "frozen_bn", "none") for [N, C, H, W].

    Raises ValueError for an unknown kind, and for channels that GroupNorm cannot divide.
    """
    if kind not in NORMS:
        raise ValueError(f"Unknown normalization {kind!r}; choose one of {', '.join(NORMS)}.")
    return NORMS[kind](channels)
