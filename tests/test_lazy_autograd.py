"""Lazy logits under autograd: whoever asks for their gradient gets eager's, though the loss never had the logits."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import get_gradient_edge, register_multi_grad_hook
from torch.utils._python_dispatch import TorchDispatchMode

from graphfuse.lazy import materialised
from graphfuse.lazy.gradients import LazyGrad
from tests.test_lazy import V, pair

B, S = 2, 7


@pytest.fixture
def tokens():
    materialised.clear()
    return torch.randint(V, (B, S))


def fused(z, y):
    return F.cross_entropy(z.view(-1, V), y.view(-1))


def shifted(z, y):
    return F.cross_entropy(z[:, :-1].float().flatten(0, 1), y[:, 1:].flatten())


def distilled(z, y):
    """Two lazy operands of the same formula."""
    p, log_p = z.softmax(-1), z.log_softmax(-1)
    return (p * log_p).sum(-1).mean() + F.cross_entropy(z.transpose(1, 2), y, label_smoothing=0.1)


def gathered(z, y):
    return -(z / 0.7).log_softmax(-1).gather(-1, y.unsqueeze(-1)).squeeze(-1).sum() + z.topk(3, -1).values.sum()


def mixed(z, y):
    mixture = torch.stack([z.log_softmax(-1), (z / 2).log_softmax(-1)], dim=1).logsumexp(1)
    return mixture.scatter(-1, y.unsqueeze(-1), 0.5).mT[:, 1:].square().mean()


def iterated(z, y):
    return sum(row.logsumexp(-1).mean() * (k + 1) for k, row in enumerate(z))


def read(z, y):
    return z.cos().square().mean()


def both(z, y):
    return fused(z, y) + read(z, y) + z.double().sin().mean()


LOSSES = {f.__name__: f for f in (fused, shifted, distilled, gathered, mixed, iterated, read, both)}
EVERY_LOSS = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def grad(m, z, y, loss):
    return torch.autograd.grad(loss(z, y), z)


def grad_with_parameters(m, z, y, loss):
    return torch.autograd.grad([loss(z, y)], [z, m.head.weight, m.embed.weight])


def grad_of_edge(m, z, y, loss):
    return [grad + 0 for grad in torch.autograd.grad(loss(z, y), get_gradient_edge(z))]


def grad_of_a_slice(m, z, y, loss):
    rows = z[:1]
    return torch.autograd.grad(loss(rows, y[:1]), [rows, z])


def retained_before(m, z, y, loss):
    z.retain_grad()
    loss(z, y).backward()
    return z.grad, z.retains_grad


def retained_after(m, z, y, loss):
    value = loss(z, y)
    z.retain_grad()
    value.backward()
    return z.grad, z.retains_grad


def retained_twice(m, z, y, loss):
    value = loss(z, y)
    z.retain_grad()
    value.backward(retain_graph=True)
    value.backward()
    return (z.grad,)


def retained_by_inputs(m, z, y, loss):
    torch.autograd.backward(loss(z, y), inputs=[z])
    return (z.grad,)


def hooked_before(m, z, y, loss):
    seen = []
    z.register_hook(lambda grad: seen.append(grad + 0))
    loss(z, y).backward()
    return seen


def hooked_after(m, z, y, loss):
    seen, value = [], loss(z, y)
    z.register_hook(lambda grad: seen.append(grad + 0))
    value.backward()
    return seen


def changed_by_a_hook(m, z, y, loss):
    value = loss(z, y)
    z.register_hook(lambda grad: grad.clamp(max=1e-5) * 3)
    value.backward()
    return ()


def written_by_a_hook(m, z, y, loss):
    value = loss(z, y)
    z.register_hook(lambda grad: None if grad.mul_(2.0) is grad else 0)
    value.backward()
    return ()


def hooked_as_several(m, z, y, loss):
    seen, value = [], loss(z, y)
    register_multi_grad_hook([z], lambda grads: seen.append(grads[0] + 0))
    value.backward()
    return seen


def hook_removed(m, z, y, loss):
    handle = z.register_hook(lambda grad: 0 * grad)
    value = loss(z, y)
    handle.remove()
    value.backward()
    return ()


def hooked_node(m, z, y, loss):
    seen, value = [], loss(z, y)
    z.grad_fn.register_prehook(lambda grads: seen.append(grads[0] + 0))
    value.backward()
    return seen


def a_leaf(m, z, y, loss):
    leaf, seen = z.detach().requires_grad_(), []
    leaf.register_post_accumulate_grad_hook(lambda leaf: seen.append(leaf.grad + 0))
    loss(leaf, y).backward()
    return *seen, leaf.grad


def second_derivative(m, z, y, loss):
    (first,) = torch.autograd.grad(loss(z, y), z, create_graph=True)
    (first * 1e3).square().sum().backward()
    return (first,)


def second_derivative_of_the_head(m, z, y, loss):
    (first,) = torch.autograd.grad(loss(z, y), m.head.weight, create_graph=True)
    (first.square().sum() + 0.1 * loss(z, y)).backward()
    return (first,)


ASKED = [grad, grad_with_parameters, grad_of_edge, grad_of_a_slice, retained_before, retained_after, retained_twice]
ASKED += [retained_by_inputs, hooked_before, hooked_after, changed_by_a_hook, written_by_a_hook, hooked_as_several]
ASKED += [hook_removed, hooked_node, a_leaf, second_derivative, second_derivative_of_the_head]


def outcome(use, m, y, *args):
    """What it returns, and the gradients of all parameters."""
    m.zero_grad()
    found = [each.detach() + 0 if isinstance(each, torch.Tensor) else each for each in use(m, m(y), y, *args)]
    return found, [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in m.parameters()]


def assert_as_eager(use, y, *args, inner="eager", **settings):
    model, compiled = pair(inner, **settings)
    for found, expected in zip(outcome(use, compiled, y, *args), outcome(use, model, y, *args), strict=True):
        assert len(found) == len(expected)
        for ours, theirs in zip(found, expected, strict=True):
            if not isinstance(theirs, torch.Tensor):
                assert ours == theirs
            else:
                top = float(theirs.abs().nan_to_num(0.0, 0.0, 0.0).amax()) if theirs.numel() else 0.0
                torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=5e-5 * top + 1e-9, equal_nan=True)


@pytest.mark.parametrize("use", ASKED, ids=lambda f: f.__name__)
@EVERY_LOSS
def test_gradients_of_logits(loss, use, tokens):
    assert_as_eager(use, tokens, loss)


@pytest.mark.parametrize("use", [grad_with_parameters, retained_after, changed_by_a_hook], ids=lambda f: f.__name__)
@pytest.mark.parametrize("settings", [{"cap": 5.0}, {"scale": 0.5, "bias": True}, {"wide": True}], ids=str)
def test_gradients_of_logits_of_other_heads(settings, use, tokens):
    assert_as_eager(use, tokens, both, inner="aot_eager", **settings)


def test_nothing_is_computed_where_nobody_asks(tokens):
    """No logits and no gradient of them: that is what the loss was fused for."""
    _, compiled = pair()
    sizes = set()

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            sizes.update(r.shape for r in [result] if isinstance(r, torch.Tensor) and type(r) is torch.Tensor)
            return result

    logits = compiled(tokens)
    logits.register_hook(lambda grad: None)
    loss = distilled(compiled(tokens), tokens)
    with Sizes():
        loss.backward()
    assert not materialised
    assert compiled.head.weight.grad is not None
    assert (B, S, V) not in sizes


def test_a_hook_that_does_not_look_costs_nothing(tokens):
    """As those that only note that backward has begun."""
    model, compiled = pair()
    logits, seen = compiled(tokens), []
    loss = fused(logits, tokens)
    logits.register_hook(seen.append)
    loss.backward()
    assert [type(each) for each in seen] == [LazyGrad]
    assert not materialised
    expected = model(tokens)
    (expected,) = torch.autograd.grad(fused(expected, tokens), expected)
    torch.testing.assert_close(seen[0] + 0, expected)
    assert sum(materialised.values()) == 2  # for the view, and for the loss of it


@pytest.mark.parametrize("use", [grad, retained_after, hooked_after, changed_by_a_hook], ids=lambda f: f.__name__)
def test_memory_goes_without_the_collector(use, tokens):
    """Autograd's nodes are in no cycle, through which the collector would not see."""
    _, compiled = pair()
    gc.collect()
    gc.disable()
    try:
        logits = compiled(tokens)
        sources = [weakref.ref(logits.source), weakref.ref(logits.source.formula)]
        use(compiled, logits, tokens, both)
        sources.append(weakref.ref(logits.source.own))
        compiled.zero_grad()
        del logits
        assert [source() for source in sources] == [None] * 3
    finally:
        gc.enable()


def test_arguments_that_changed_since_are_refused(tokens):
    """The gradient of the logits would be that of other labels."""
    _, compiled = pair()
    logits, labels = compiled(tokens), tokens.clone()
    loss = fused(logits, labels)
    labels.zero_()
    with pytest.raises(RuntimeError, match=r"gradient of logits: expected arguments .* lazy_logits=False"):
        torch.autograd.grad(loss, logits)


def test_a_loss_of_the_same_graph_has_no_gradient_of_logits(tokens):
    """Nor has it under torch's own backends: both are outputs of one function."""
    _, compiled = pair()
    loss, logits = compiled(tokens, tokens)
    with pytest.raises(RuntimeError, match=r"inputs: expected .* got logits beside a loss of the same compiled graph"):
        torch.autograd.grad(loss, logits, retain_graph=True)
    assert torch.autograd.grad(loss, logits, allow_unused=True) == (None,)


def test_checkpointed_losses_tell_the_logits(tokens):
    def use(m, z, y):
        value = torch.utils.checkpoint.checkpoint(fused, z, y, use_reentrant=False)
        z.retain_grad()
        value.backward()
        return (z.grad,)

    assert_as_eager(use, tokens)


def test_autocast_is_that_of_the_loss(tokens):
    def use(m, z, y):
        with torch.autocast("cpu", torch.bfloat16):
            value = shifted(z.bfloat16(), y)
        return torch.autograd.grad(value, z)

    assert_as_eager(use, tokens)
