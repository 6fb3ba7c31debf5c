"""One layer by itself: the factory of `graphfuse bench model graphfuse.bench.layer:...`."""

from dataclasses import replace

import torch

import graphfuse
from graphfuse.bench import layer
from graphfuse.bench.workloads import workloads

SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}


def test_trains_the_layer_and_what_goes_in(monkeypatch):
    known = workloads()[layer.WORKLOAD]
    small = replace(known, batch=1, seq=8, config={**known.config, **SMALL})
    monkeypatch.setattr(layer, "workloads", lambda: {layer.WORKLOAD: small})
    model, given = layer.llama_3_8b()
    graphfuse.optimize(model, inner="aot_eager")
    model(**given).square().mean().backward()
    assert graphfuse.report(model).counts == {"causal_attention": 1, "rope": 2, "rms_norm": 3, "glu": 1}
    assert model.states.grad.shape == (1, 8, 16)
    assert torch.isfinite(model.states.grad).all()
