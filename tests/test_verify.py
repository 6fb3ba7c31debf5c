"""verify=True: the first batch against eager, and a model that is as if that batch had run once."""

import copy

import pytest
import torch
from torch import nn

import graphfuse
from graphfuse import VerificationError

D = 16


class Model(nn.Module):
    """A norm, dropout, a buffer that every forward changes, and a part that was frozen in eval."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(D))
        self.linear, self.dropout = nn.Linear(D, D), nn.Dropout(dropout)
        self.statistics, self.frozen = nn.BatchNorm1d(D), nn.BatchNorm1d(D)
        self.frozen.eval()

    def forward(self, x, target=None):
        h = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight
        h = self.frozen(self.statistics(self.dropout(self.linear(h))))
        return {"loss": h.square().mean(), "logits": h}


@torch._dynamo.register_backend(name="off_by_a_percent")
def off_by_a_percent(graph_module, example_inputs):
    return lambda *args: tuple(1.01 * out if out.is_floating_point() else out for out in graph_module(*args))


def twins(**options):
    model = Model(**options)
    model.frozen.eval()
    return model, copy.deepcopy(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_prints_figures_and_goes_on(dtype, capsys):
    model, twin = (m.to(dtype) for m in twins())
    graphfuse.optimize(model, inner="eager", verify=True, strict=True)
    x = torch.randn(8, D, dtype=dtype)
    out = model(x)
    printed = capsys.readouterr().out
    wide = "float64" if dtype == torch.float32 else "float32"
    assert f"first batch verified in training, against eager in {wide}" in printed
    assert [line.split()[0] for line in printed.splitlines()[2:5]] == ["loss", "logits", "gradients"]
    torch.testing.assert_close(out["logits"], twin(x)["logits"], rtol=0.02, atol=0.02)
    model(x)
    assert capsys.readouterr().out == ""  # the first batch only


def test_leaves_the_model_as_if_the_batch_ran_once():
    model, twin = twins()
    graphfuse.optimize(model, inner="eager", verify=True)
    x = torch.randn(8, D)
    before = torch.random.get_rng_state()
    model(x)["loss"].backward()
    assert torch.equal(before, torch.random.get_rng_state())
    twin(x)["loss"].backward()
    assert model.statistics.num_batches_tracked.item() == 1
    torch.testing.assert_close(dict(model.named_buffers()), dict(twin.named_buffers()))
    torch.testing.assert_close([p.grad for p in model.parameters()], [p.grad for p in twin.parameters()])
    assert model.training
    assert not model.frozen.training


def test_compares_in_evaluation_where_training_draws_random_numbers(capsys):
    model, _ = twins(dropout=0.5)
    graphfuse.optimize(model, inner="eager", verify=True)
    torch.manual_seed(3)
    out = model(torch.ones(8, D))["logits"]
    assert "verified in evaluation, as training draws random numbers" in capsys.readouterr().out
    assert model.training
    assert model.dropout.training
    assert not model.frozen.training
    torch.manual_seed(3)
    torch.testing.assert_close(model(torch.ones(8, D))["logits"], out)  # the seed was not used up by the comparison


def test_raises_what_eager_does_not_explain():
    model, _ = twins()
    graphfuse.optimize(model, inner="off_by_a_percent", verify=True)
    with pytest.raises(VerificationError, match=r"^loss: expected a relative error of at most .* got 1\.0e-02$"):
        model(torch.randn(8, D))


def test_compares_outputs_alone_without_gradients(capsys):
    model, _ = twins()
    graphfuse.optimize(model.eval(), inner="eager", verify=True)
    with torch.no_grad():
        model(torch.randn(8, D))
    printed = capsys.readouterr().out
    assert "verified in evaluation, against" in printed
    assert "gradient" not in printed


def test_does_not_take_functions():
    with pytest.raises(TypeError, match=r"model: expected an nn\.Module to verify, got function"):
        graphfuse.optimize(lambda x: x, verify=True)
