import numpy as np
import pytest
import torch
from torch import nn

from tests.pretend import pretended_gpu

APART = "expected all tensors to be on the same device"


def test_tensors_are_where_they_were_made_or_moved():
    with pretended_gpu():
        made, moved = torch.arange(4.0, device="cuda"), torch.ones(4).to("cuda")
        for there in (made, moved, made * moved, made[1:], torch.zeros_like(made), made.to(torch.int64), made.clone()):
            assert there.device == torch.device("cuda", 0) and there.is_cuda
        for here in (torch.ones(4), made.cpu(), made.to("cpu"), moved.to(torch.zeros(1)), torch.from_numpy(np.ones(3))):
            assert here.device == torch.device("cpu")
        assert float(made.sum()) == 6 and made.tolist() == [0, 1, 2, 3]
    assert torch.ones(2).device == torch.device("cpu") and not torch.cuda.is_available()


def test_devices_that_meet_are_an_error():
    with pretended_gpu():
        there, here = torch.ones(4, device="cuda"), torch.ones(4)
        layer = nn.Linear(4, 3).to("cuda")
        for mixed in (
            lambda: there + here,
            lambda: layer(here),
            lambda: torch.cat([there, here]),
            lambda: here @ there,
        ):
            with pytest.raises(RuntimeError, match=APART):
                mixed()
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()
        with pytest.raises(RuntimeError, match="generator"):
            torch.rand(3, generator=torch.Generator(), device="cuda")


def test_what_a_gpu_allows_is_none():
    with pretended_gpu():
        there = torch.arange(4.0, device="cuda")
        assert (there + torch.tensor(1.0)).tolist() == [1, 2, 3, 4]  # a number
        assert there[torch.tensor([2, 0])].tolist() == [2, 0]
        there.copy_(torch.ones(4))
        assert there.tolist() == [1] * 4 and there.is_cuda


def test_gradients_and_moments_are_with_their_parameters():
    with pretended_gpu():
        layer = nn.Linear(4, 3).to("cuda")
        optimizer = torch.optim.AdamW(layer.parameters())
        layer(torch.ones(2, 4, device="cuda")).sum().backward()
        optimizer.step()
        assert layer.weight.grad.is_cuda and optimizer.state[layer.weight]["exp_avg"].is_cuda
