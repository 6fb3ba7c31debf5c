"""Handing a graph on: caches are keyed on graphfuse's own sources."""

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.utils import fresh_cache

import graphfuse
from graphfuse import inner
from graphfuse.inner import Salt, source_digest


@pytest.fixture
def other_sources(monkeypatch):
    """The same, as if a file had been edited."""

    def edit(digest="edited"):
        monkeypatch.setattr(inner, "source_digest", lambda: digest)

    return edit


def test_salts_with_its_sources(other_sources):
    before = Salt().uuid()
    assert source_digest() in before
    assert Salt().uuid() == before
    other_sources()
    assert Salt().uuid() != before


def test_serves_nothing_from_before_an_edit(other_sources):
    """The gradient of an op is not in torch's cache key: without the salt, the old one would be used."""
    x = torch.randn(8, requires_grad=True)

    def cached():
        torch._dynamo.reset()
        counters.clear()
        graphfuse.optimize(lambda x: (x * 2).sin(), strict=True)(x).sum().backward()
        return counters["aot_autograd"]["autograd_cache_hit"]

    with fresh_cache(), torch._functorch.config.patch(enable_autograd_cache=True):
        assert (cached(), cached()) == (0, 1)
        other_sources()
        assert (cached(), cached()) == (0, 1)


class TheirPass(CustomGraphPass):
    def __init__(self, key):
        self.key = key
        self.graphs = []

    def __call__(self, graph):
        self.graphs.append(graph)

    def uuid(self):
        return self.key


def test_keeps_passes_of_the_user():
    theirs = TheirPass("theirs")
    salt = Salt(theirs)
    graph = torch.fx.Graph()
    salt(graph)
    assert theirs.graphs == [graph]
    assert "theirs" in salt.uuid()
    assert Salt([theirs, theirs]).uuid() != salt.uuid()


def test_is_not_cached_where_a_pass_of_the_user_cannot_be():
    assert Salt(TheirPass(None)).uuid() is None
    assert Salt(lambda graph: None).uuid() is None


def test_takes_options_and_mode_of_inductor():
    def fn(x):
        return x.sin() + 1

    x = torch.randn(8)
    compiled = graphfuse.optimize(fn, mode="max-autotune-no-cudagraphs", strict=True, max_fusion_size=8)
    torch.testing.assert_close(compiled(x), fn(x))
    assert graphfuse.report(compiled).sites == []
