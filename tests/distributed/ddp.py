"""DistributedDataParallel."""

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import graphfuse
from tests.distributed.harness import (
    HANDWRITTEN,
    HEAD,
    LLAMA,
    OPTIONS,
    Handwritten,
    agrees,
    assert_rewritten,
    case,
    llama,
)

WIDE = {"hidden": 192, "features": 1400}  # every matrix fills a bucket of 1 MiB, the smallest that Dynamo takes


def inside(**options):
    """What most trainers do: the model is compiled in place, and then wrapped."""
    return lambda model: DistributedDataParallel(graphfuse.optimize(model, **OPTIONS), **options)


def around(**options):
    return lambda model: torch.compile(DistributedDataParallel(model, **options), backend="graphfuse", options=OPTIONS)


@case
def ddp_around_an_optimized_model():
    model = llama()
    wrapped = agrees(model, inside())
    assert_rewritten(model, LLAMA | HEAD)
    assert_rewritten(wrapped, LLAMA | HEAD)
    assert graphfuse.report(model).notes == []


@case
def compile_around_ddp():
    model = Handwritten()
    wrapped = agrees(model, around())
    assert_rewritten(model, HANDWRITTEN | HEAD)
    assert_rewritten(wrapped, HANDWRITTEN | HEAD)


@case
def ddp_with_gradient_checkpointing():
    model = llama()
    model.gradient_checkpointing_enable()
    agrees(model, inside())
    assert_rewritten(model, LLAMA | HEAD)


@case
def ddp_leaves_logits_unread():
    graphfuse.lazy.tensor.materialised.clear()
    for options in ({}, {"find_unused_parameters": True}):
        torch._dynamo.reset()
        model = Handwritten()
        agrees(model, inside(**options), read=None)
        assert_rewritten(model, HANDWRITTEN | HEAD)
    assert not graphfuse.lazy.tensor.materialised


@case
def ddp_with_unused_parameters():
    for wrap in (inside, around):
        torch._dynamo.reset()
        model = Handwritten()
        model.unused = nn.Linear(2, 2)
        agrees(model, wrap(find_unused_parameters=True))
        assert_rewritten(model, HANDWRITTEN | HEAD)


@case
def ddp_with_a_static_graph():
    model = Handwritten()
    agrees(model, inside(static_graph=True), read="after")
    assert_rewritten(model, HANDWRITTEN | HEAD)


@case
def ddp_buckets_cost_sites_and_the_report_says_so():
    model = Handwritten(**WIDE)
    wrapped = agrees(model, inside(bucket_cap_mb=1.0))
    assert_rewritten(model, {"rms_norm": 3} | HEAD)
    assert_rewritten(wrapped, {"rms_norm": 3} | HEAD)
    (note,) = graphfuse.report(model).notes
    assert note.startswith("DDP: expected a graph in one piece, got 7 (buckets of 1.0 MiB), which costs glu 2"), note
    assert "torch._dynamo.config.optimize_ddp = False" in note


@case
def ddp_graph_is_whole_with_what_the_report_says():
    for mode in (False, "python_reducer"):
        torch._dynamo.reset()
        model = Handwritten(**WIDE)
        with torch._dynamo.config.patch(optimize_ddp=mode):
            agrees(model, inside(bucket_cap_mb=1.0))
        assert_rewritten(model, HANDWRITTEN | HEAD)
        assert graphfuse.report(model).notes == []


@case
def ddp_buckets_that_are_larger_cut_less():
    model = Handwritten(**WIDE)
    agrees(model, inside(bucket_cap_mb=100.0))  # the first bucket is always one of 1 MiB
    assert_rewritten(model, HANDWRITTEN | HEAD)
    assert graphfuse.report(model).notes == []


@case
def ddp_of_layers_optimized_one_by_one():
    def wrap(model):
        for layer in model.model.layers:
            graphfuse.optimize(layer, **OPTIONS)
        return DistributedDataParallel(model, bucket_cap_mb=1.0)

    model = Handwritten(**WIDE)
    with torch._dynamo.config.patch(optimize_ddp=False):
        agrees(model, wrap)
    assert_rewritten(model, {"rms_norm": 2, "glu": 2})
