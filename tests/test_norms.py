"""norms.py against torch's own layers and float64, in one process and in two (gloo)."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from norms import NORMS, FrozenBatchNorm, GroupNorm, SyncBatchNorm

CHANNELS = 5
# Process r's share of the joined batch: images of different number and size.
SHAPES = {"sizes": [(2, CHANNELS, 6, 4), (1, CHANNELS, 3, 7)]}
SHAPES["empty"] = [(3, CHANNELS, 4, 4), (0, CHANNELS, 14, 14)]  # a mask head without RoIs
MOMENTUM = 0.3


def run_processes(worker, folder, *args):
    """worker(rank, folder, *args) in two processes joined by gloo; fails, never hangs."""
    # forked: a spawned process would import torch again, for seconds
    mp.start_processes(start, (worker, folder, args), 2, start_method="fork")


def start(rank, worker, folder, args):
    torch.set_num_threads(1)
    limit = timedelta(seconds=60)  # one that waits longer for the other raises
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", store, timeout=limit, rank=rank, world_size=2)
    worker(rank, folder, *args)
    dist.destroy_process_group()


def randomize(norm, seed=3):
    """Parameters and running statistics that are not 0 and 1."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in norm.state_dict().items():
            if value.is_floating_point():
                low = 0.5 if "var" in name or "weight" in name else -1
                value.copy_(low + 2 * torch.rand(value.shape, generator=g))
    return norm


def inputs(shapes):
    """Input and the gradient that arrives at the output, of every process."""
    g = torch.Generator().manual_seed(7)
    x = [2 * torch.randn(s, generator=g) + torch.arange(s[1])[:, None, None] for s in shapes]
    return x, [torch.randn(s, generator=g) for s in shapes]


def flat(tensors):
    """Images of any sizes as one batch [1, C, 1, n]: BN sees elements, not images."""
    return torch.cat([t.transpose(0, 1).flatten(1) for t in tensors], dim=1)[None, :, None]


def run(norm, x, grad):
    """Output, gradients and state after one training step."""
    x = x.clone().requires_grad_()
    y = norm(x)
    y.backward(grad)
    gradients = [norm.weight.grad, norm.bias.grad]
    return y.detach(), x.grad, *gradients, norm.running_mean, norm.running_var


def test_group_norm_has_the_papers_setting_and_says_what_does_not_divide():
    norm = GroupNorm(64)
    x = 1e-2 * torch.randn(2, 64, 5, 3, dtype=torch.float64)  # variance 1e-4: eps matters
    groups = x.view(2, 32, 2 * 15)
    var, mean = torch.var_mean(groups, dim=2, keepdim=True, unbiased=False)
    expected = ((groups - mean) / (var + 1e-5).sqrt()).view_as(x)
    torch.testing.assert_close(norm.double()(x), expected)
    with pytest.raises(ValueError, match="divisible"):
        GroupNorm(48)


def test_frozen_batch_norm_is_batch_norm_in_evaluation():
    bn = randomize(nn.BatchNorm2d(CHANNELS)).eval()
    frozen = FrozenBatchNorm(CHANNELS)
    frozen.load_state_dict(bn.state_dict(), strict=False)
    x = torch.randn(2, CHANNELS, 4, 3)
    for _ in range(2):  # training changes nothing
        torch.testing.assert_close(frozen.train()(x), bn(x))
    assert not list(frozen.parameters())


def test_one_process_is_batch_norm():
    x, grad = (t[0] for t in inputs(SHAPES["sizes"]))
    pair = [randomize(c(CHANNELS, momentum=MOMENTUM)) for c in (SyncBatchNorm, nn.BatchNorm2d)]
    for _ in range(2):  # twice: the second step starts from the first one's statistics
        for mine, reference in zip(*(run(norm, x, grad) for norm in pair)):
            torch.testing.assert_close(mine, reference)
        x = x * 2 - 1
    assert list(pair[0].state_dict()) == list(pair[1].state_dict())
    assert pair[0].num_batches_tracked == 2
    torch.testing.assert_close(*(norm.eval()(x) for norm in pair))


def test_large_means_do_not_cost_the_variance():
    # float32 has 7 digits: of E[x^2] = 1e8 none is left for a variance of 1. The statistics must be
    # good to 1e-3; the output to 2 units in the last place of x (at 1e4 one unit is 1e-3).
    x = (1e4 + torch.randn(4, CHANNELS, 16, 16, generator=torch.Generator().manual_seed(0))).float()
    norm = SyncBatchNorm(CHANNELS, momentum=1.0)
    y = norm(x)
    var, mean = torch.var_mean(x.double(), dim=(0, 2, 3), keepdim=True, unbiased=False)
    expected = (x.double() - mean) / (var + norm.eps).sqrt()
    torch.testing.assert_close(y.double(), expected, atol=2e-3, rtol=0)
    n = x.numel() / CHANNELS
    unbiased = var.flatten() * n / (n - 1)
    torch.testing.assert_close(norm.running_var.double(), unbiased, atol=0, rtol=1e-3)


@pytest.mark.parametrize("kind", ["syncbn", "bn"])
def test_a_batch_without_elements_changes_no_statistics(kind):
    norm = randomize(NORMS[kind](CHANNELS))
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    before = {name: norm.state_dict()[name].clone() for name in statistics}
    x = torch.zeros(0, CHANNELS, 14, 14, requires_grad=True)
    y = norm(x)
    y.sum().backward()
    assert y.shape == x.shape and x.grad.shape == x.shape
    assert torch.equal(norm.weight.grad, torch.zeros(CHANNELS))  # and not None: DDP waits for it
    assert torch.equal(norm.bias.grad, torch.zeros(CHANNELS))
    for name, value in before.items():
        assert torch.equal(norm.state_dict()[name], value)


def train_once(rank, folder):
    results = {}
    for case, shapes in SHAPES.items():
        norm = randomize(SyncBatchNorm(CHANNELS, momentum=MOMENTUM))
        x, grad = inputs(shapes)
        results[case] = [t.clone() for t in run(norm, x[rank], grad[rank])]
        results[case].append(norm.eval()(x[0]).detach())
    torch.save(results, f"{folder}/{rank}.pth")


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("norms"))
    run_processes(train_once, folder)
    return [torch.load(f"{folder}/{rank}.pth") for rank in range(2)]


@pytest.mark.parametrize("case", SHAPES)
def test_two_processes_are_batch_norm_of_all_elements(two_processes, case):
    # The reference is float64; float32 sums of 100 numbers of order 5 are good to some 1e-6.
    x, grad = inputs(SHAPES[case])
    bn = randomize(nn.BatchNorm2d(CHANNELS, momentum=MOMENTUM)).double()
    reference = run(bn, flat(x).double(), flat(grad).double())
    y, x_grad, weight_grad, bias_grad, mean, var, evaluated = zip(*(r[case] for r in two_processes))

    def check(ours, expected):
        torch.testing.assert_close(ours.double(), expected, atol=1e-5, rtol=1e-5)

    check(flat(y), reference[0])
    check(flat(x_grad), reference[1])  # through the statistics that both share
    check(sum(weight_grad), reference[2])  # each process has its own part; DDP adds them up
    check(sum(bias_grad), reference[3])
    for rank in range(2):
        check(mean[rank], reference[4])
        check(var[rank], reference[5])
        check(evaluated[rank], bn.eval()(x[0].double()))
