import pytest
import torch

from pyfleet.gradients import gradient_norms


@pytest.mark.feature("S11")
def test_gradient_norms_are_torchs_own():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    for parameter in model[1].parameters():
        parameter.requires_grad_(False)
    model(torch.randn(5, 3)).square().sum().backward()
    assert gradient_norms(model.named_parameters()) == {
        "0.weight": model[0].weight.grad.norm().item(), "0.bias": model[0].bias.grad.norm().item()}
