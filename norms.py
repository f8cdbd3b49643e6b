"""Normalization layers (Sec. 3.1 of "Rethinking ImageNet Pre-training", arXiv 1811.08883).

Every layer here maps x to

    y = gamma * (x - mean) / sqrt(var + eps) + beta        gamma, beta: learned, one per channel

and they differ in what mean and var are taken over. For x of shape [N, C, H, W]:

    layer             each mean is that of                    over the axes          how many means
    GroupNorm         one of 32 groups of channels, an image  C / 32, H, W           N * 32
    BatchNorm         a channel                               N, H, W                C
    SyncBatchNorm     a channel, in all processes             N of all, H, W         C
    FrozenBatchNorm   (constants of the pre-trained model)                           C

A detector that is trained from scratch needs GroupNorm or SyncBatchNorm, because a GPU holds only
one or two images of 800 x 1333. BN's statistics over so few images are noisy, and differ from the
running averages that it uses at test time. Detectors used to freeze BN at ImageNet's statistics,
which needs a pre-trained model. GroupNorm does not look at the batch at all; SyncBatchNorm takes
its statistics over the batch of all GPUs (8 x 2 images).
"""

import torch
import torch.distributed as dist
from torch import nn


class GroupNorm(nn.GroupNorm):
    """Group normalization (Wu and He, ECCV 2018) with the paper's setting: 32 groups, eps 1e-5.

    [N, C, H, W] to the same shape, dtype and memory format; statistics are float32 or better.
    Raises ValueError if `channels` cannot be divided into `groups`.
    """

    def __init__(self, channels, groups=32, eps=1e-5):
        super().__init__(groups, channels, eps)

    def forward(self, x):
        # torch's kernel is 4 to 9 times as fast as the formula on a CPU. On CUDA it copies bfloat16
        # and channels_last inputs first, and torch.compile cannot fuse it.
        copied = x.dtype != torch.float32 or not x.is_contiguous()
        if torch.compiler.is_compiling() or (x.is_cuda and copied and x.numel() > 0):
            return self.written_out(x)
        if not x.is_contiguous():
            # In channels_last, its variance on a CPU is E[x^2] - E[x]^2, which loses all digits
            # where the mean is large. So a rough mean of each group is subtracted first.
            few = x.detach()[:, :, ::8, ::8].unflatten(1, (self.num_groups, -1))
            rough = few.mean(dim=(2, 3, 4))  # [N, groups]
            x = x - rough.repeat_interleave(few.shape[2], dim=1)[:, :, None, None]
        return super().forward(x)

    def written_out(self, x):
        """The formula of GroupNorm in torch's operations."""
        n, c = x.shape[:2]
        groups = (n, self.num_groups, c // self.num_groups)
        x32 = x.to(torch.promote_types(x.dtype, torch.float32))
        # 1) mean and variance of each channel of each image
        var, mean = torch.var_mean(x32, dim=(2, 3), correction=0)  # [N, C]
        var, mean = var.view(groups), mean.view(groups)  # [N, groups, C / groups]
        # 2) those of a group: the mean of the means, and the mean of the variances + the variance
        #    of the means (E[x^2] - E[x]^2 would lose all digits where the mean is large)
        group_mean = mean.mean(dim=2, keepdim=True)  # [N, groups, 1]
        group_var = (var + (mean - group_mean).square()).mean(dim=2, keepdim=True)
        # 3) gamma * (x - mean) / sqrt(var + eps) + beta, as one multiplication and one addition
        scale = self.weight.view(groups[1:]) * (group_var + self.eps).rsqrt()
        shift = self.bias.view(groups[1:]) - group_mean * scale  # [N, groups, C / groups]
        return torch.addcmul(shift.view(n, c, 1, 1), x32, scale.view(n, c, 1, 1)).to(x.dtype)


class BatchNorm(nn.BatchNorm2d):
    """nn.BatchNorm2d over the images of this process alone: the layer that small batches break.

    A batch without elements (no RoIs) leaves the running statistics as they are, on every device.
    """

    def forward(self, x):  # [N, C, H, W] -> the same
        if x.numel() > 0:
            return super().forward(x)
        return x * self.weight[:, None, None] + self.bias[:, None, None]


class FrozenBatchNorm(nn.Module):
    """BN with constant statistics and nothing to learn: y = x * scale + shift for each channel.

    Detectron's "channel-wise affine", for pre-trained weights; buffers as in nn.BatchNorm2d.
    """

    def __init__(self, channels, eps=1e-5):
        super().__init__()
        self.eps = eps
        for name, value in (("weight", 1), ("bias", 0), ("running_mean", 0), ("running_var", 1)):
            self.register_buffer(name, torch.full((channels,), float(value)))

    def forward(self, x):  # [N, C, H, W] -> the same
        scale = self.weight * (self.running_var + self.eps).rsqrt()  # [C]
        shift = self.bias - self.running_mean * scale
        return torch.addcmul(shift.to(x.dtype)[:, None, None], x, scale.to(x.dtype)[:, None, None])


class AllReduceSum(torch.autograd.Function):
    """Sum of a tensor over all processes, differentiable.

    Its backward pass is an all-reduce too: every process r computes its own loss L_r from the same
    sum s = x_1 + ... + x_R, and what is minimized is L_1 + ... + L_R. So the gradient for *any* x_i
    is d(L_1 + ... + L_R)/ds, the sum of what the processes hold. (DDP then divides by R.)
    """

    @staticmethod
    def forward(ctx, x):
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, grad):
        total = grad.contiguous().clone()
        dist.all_reduce(total)
        return total


class SyncBatchNorm(nn.BatchNorm2d):
    """nn.BatchNorm2d whose training statistics are those of the batches of all processes together.

    Processes may have different numbers of images, of different sizes, even none: every element
    counts the same. A process without elements still joins the all-reduces of the forward and the
    backward pass; otherwise the others would hang. (nn.SyncBatchNorm runs on CUDA only, waits for
    the device in each layer, and lets running statistics decay when there are no elements.)
    """

    def forward(self, x):  # [N, C, H, W] -> the same
        together = dist.is_available() and dist.is_initialized()
        world_size = dist.get_world_size() if together else 1
        if not self.training or (world_size == 1 and x.numel() > 0):
            return super().forward(x)

        # 1) in float32, the local mean m and sum (x - m)^2 of each channel (x^2 would cost digits);
        #    from them, in float64, sum x = n m and sum x^2 = sum (x - m)^2 + n m^2
        n = x.numel() // x.shape[1]
        x32 = x.to(torch.promote_types(x.dtype, torch.float32))
        m = x32.sum(dim=(0, 2, 3)) / max(n, 1)  # [C]
        centred = (x32 - m[:, None, None]).square().sum(dim=(0, 2, 3)).double()
        m = m.double()
        sums = torch.cat([m * n, centred + m.square() * n, m.new_tensor([float(n)])])  # [2 C + 1]

        # 2) the same over all processes
        if world_size > 1:
            sums = AllReduceSum.apply(sums)
        count = sums[-1].detach().clamp(min=1)
        mean, mean_of_squares = (sums[:-1] / count).chunk(2)  # [C] each
        var = mean_of_squares - mean.square()
        self.update_running_statistics(mean, var, count, seen=sums[-1] > 0)

        # 3) gamma * (x - mean) / sqrt(var + eps) + beta
        scale = self.weight * (var + self.eps).rsqrt().to(x32.dtype)
        shift = self.bias - mean.to(x32.dtype) * scale
        return torch.addcmul(shift[:, None, None], x32, scale[:, None, None]).to(x.dtype)

    @torch.no_grad()
    def update_running_statistics(self, mean, var, count, seen):
        """running += momentum * (batch - running) where `seen` (an `if` would wait for the GPU)."""
        unbiased = var * (count / (count - 1).clamp(min=1))
        for running, batch in ((self.running_mean, mean), (self.running_var, unbiased)):
            batch = batch.to(running.dtype)
            running.copy_(torch.where(seen, running.lerp(batch, self.momentum), running))
        self.num_batches_tracked += seen


NORMS = {
    "gn": GroupNorm,
    "syncbn": SyncBatchNorm,
    "bn": BatchNorm,
    "frozen_bn": FrozenBatchNorm,
    "none": lambda channels: nn.Identity(),
}


def make_norm(kind, channels):
    """The normalization layer `kind`, a key of NORMS, for [N, C, H, W]; ValueError for another."""
    if kind not in NORMS:
        raise ValueError(f"Unknown normalization {kind!r}; choose one of {', '.join(NORMS)}.")
    return NORMS[kind](channels)
