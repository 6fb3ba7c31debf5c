"""nn.DataParallel: replicas of a model that was compiled in place are right, and do not say that they are."""

import copy
import pickle

import pytest
import torch
from torch import nn

import graphfuse


class Replicated(nn.Linear):
    """At module level, for pickle."""


@pytest.fixture
def model():
    return graphfuse.optimize(Replicated(3, 4), inner="eager", strict=True)


def test_replicas_run_their_own_weights(model):
    """What `nn.parallel.replicate` does for each device, on one."""
    x = torch.ones(2, 3)
    model(x)
    with pytest.warns(graphfuse.GraphfuseWarning, match="DataParallel: expected one process for each device"):
        replica = model._replicate_for_data_parallel()
    replica.weight, replica.bias = torch.zeros(4, 3), torch.ones(4)
    torch.testing.assert_close(replica(x), torch.ones(2, 4))
    torch.testing.assert_close(model(x), nn.functional.linear(x, model.weight, model.bias))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_know_nothing_of_it(model, duplicate):
    other = duplicate(model)
    replica = other._replicate_for_data_parallel()
    replica.weight, replica.bias = torch.zeros(4, 3), torch.ones(4)
    torch.testing.assert_close(replica(torch.ones(2, 3)), torch.ones(2, 4))
    assert b"graphfuse" not in pickle.dumps(other.__dict__)
