"""Logits that are computed when somebody reads them: the same numbers and gradients as eager's, whoever reads them."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.torch_version import TorchVersion
from torch.utils.checkpoint import checkpoint

import graphfuse
from graphfuse.lazy import LazyLogits, materialised

B, S, H, V = 2, 7, 16, 8200
TOLERANCE = 2e-5
HEAD = {"linear_cross_entropy": 1, "lazy_logits": 1}


class Decoder(nn.Module):
    """The end of a language model: loss and logits."""

    def __init__(self, cap=None, scale=None, bias=False, wide=False):
        super().__init__()
        self.embed = nn.Embedding(V, H)
        self.head = nn.Linear(H, V, bias=bias)
        self.cap, self.scale, self.wide = cap, scale, wide

    def forward(self, tokens, labels=None):
        logits = self.head(self.embed(tokens).tanh())
        if self.scale is not None:
            logits = logits * self.scale
        if self.cap is not None:
            logits = torch.tanh(logits / self.cap) * self.cap
        if self.wide:
            logits = logits.float()
        if labels is None:
            return logits
        return F.cross_entropy(logits[:, :-1].float().reshape(-1, V), labels[:, 1:].reshape(-1)), logits


@pytest.fixture(autouse=True)
def count():
    materialised.clear()
    return materialised


@pytest.fixture
def tokens():
    return torch.randint(V, (B, S))


def pair(inner="eager", cls=Decoder, **options):
    model = cls(**options)
    compiled = graphfuse.optimize(copy.deepcopy(model), inner=inner, strict=True, fullgraph=True)
    return model, compiled


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return [parameter.grad for parameter in model.parameters()]


def assert_same(model, compiled, use):
    """`use` of both models gives the same number and the same gradients."""
    expected, got = use(model), use(compiled)
    torch.testing.assert_close(got, expected, rtol=TOLERANCE, atol=1e-6)
    if not expected.requires_grad:
        return
    for ours, theirs in zip(gradients(compiled, got), gradients(model, expected), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE * float(theirs.abs().amax()))


def selective_log_softmax(logits, index):
    """Log-probabilities of some tokens, a sequence at a time, as preference trainers spell it."""
    selected = torch.gather(logits, -1, index.unsqueeze(-1)).squeeze(-1)
    return selected - torch.stack([torch.logsumexp(row, dim=-1) for row in logits])


def entropy_in_chunks(logits):
    flat = logits.reshape(-1, logits.shape[-1])
    parts = []
    for chunk in flat.split(4):
        log_p = F.log_softmax(chunk, dim=-1)
        parts.append(-(torch.exp(log_p) * log_p).sum(-1))
    return torch.cat(parts).mean()


UNREAD = {
    "cross_entropy": lambda z, y: F.cross_entropy(z.view(-1, V), y.view(-1)),
    "shifted": lambda z, y: F.cross_entropy(z[:, :-1].contiguous().view(-1, V), y[:, 1:].reshape(-1)),
    "shifted in float": lambda z, y: F.cross_entropy(z[..., :-1, :].float().flatten(0, 1), y[..., 1:].flatten()),
    "classes second": lambda z, y: F.cross_entropy(z.transpose(1, 2), y),
    "classes second by permute": lambda z, y: F.cross_entropy(z.permute(0, 2, 1), y),
    "in parts of tokens": lambda z, y: sum(
        F.cross_entropy(part.flatten(0, 1), labels.flatten(), reduction="sum")
        for part, labels in zip(torch.tensor_split(z, 3, dim=1), y.tensor_split([3, 5], dim=1), strict=True)
    ),
    "module": lambda z, y: nn.CrossEntropyLoss(label_smoothing=0.1)(z.view(-1, V), y.view(-1)),
    "per token": lambda z, y: (F.cross_entropy(z.flatten(0, 1), y.flatten(), reduction="none") * 0.5).sum(),
    "ignored": lambda z, y: F.cross_entropy(z.view(-1, V), y.masked_fill(y % 2 == 0, -100).view(-1)),
    "nll of log_softmax": lambda z, y: F.nll_loss(F.log_softmax(z, dim=-1).view(-1, V), y.view(-1)),
    "gathered": lambda z, y: -z.log_softmax(-1).gather(-1, y.unsqueeze(-1)).squeeze(-1).mean(),
    "selective": lambda z, y: -selective_log_softmax(z, y).mean(),
    "by keyword": lambda z, y: F.nll_loss(
        torch.log_softmax(input=torch.flatten(input=z, end_dim=1), dim=-1), y.view(-1)
    ),
    "temperature": lambda z, y: F.cross_entropy((z / 0.7).view(-1, V), y.view(-1)),
    "mask of tokens": lambda z, y: F.cross_entropy(z[y > V // 4], y[y > V // 4]),
    "rows by number": lambda z, y: F.cross_entropy(z[0].index_select(0, torch.tensor([3, 1])), y[0, [3, 1]]),
    "entropy": lambda z, y: -(z.softmax(-1) * z.log_softmax(-1)).sum(-1).mean(),
    "entropy in chunks": lambda z, y: entropy_in_chunks(z),
    "z-loss": lambda z, y: z.logsumexp(-1).square().mean(),
    "largest": lambda z, y: z.max(dim=-1).values.sum() + z.topk(3, -1).values.mean(),
    "accuracy": lambda z, y: (z.detach().argmax(-1) == y).float().mean(),
}
READ = {
    "function of all": lambda z, y: (z.sigmoid() * z).mean(),
    "two readers": lambda z, y: z.square().mean() + z[:, -1].exp().mean(),
    "last token": lambda z, y: z[:, -1, :].softmax(-1).square().sum(),
    "some classes": lambda z, y: z[..., :10].square().sum(),
    "two classes of the last token": lambda z, y: F.cross_entropy(z[:, -1, [5, 9]], y[:, 0] % 2),
    "loss with probabilities": lambda z, y: F.cross_entropy(z.view(-1, V), z.detach().view(-1, V).softmax(-1)),
    "divergence": lambda z, y: F.kl_div(z.log_softmax(-1), z.detach().roll(1, -1).softmax(-1), reduction="batchmean"),
    "bits": lambda z, y: z.detach().view(torch.int32).float().mean(),
    "small targets": lambda z, y: F.cross_entropy(z.view(-1, V), (y % 200).to(torch.uint8).view(-1)),
    "checkpointed loss": lambda z, y: checkpoint(lambda z: F.cross_entropy(z[0], y[0]), z, use_reentrant=True),
    "concatenated": lambda z, y: torch.cat([z, z], 1).square().mean(),
}


def changed(z, y):
    last = z[:, -1]
    z.div_(2.0)
    last.mul_(3.0)
    return z.square().mean() + last.sum() * 1e-3


def assigned(z, y):
    z[..., 5] = -1.0
    z[:, 0] = 0.0
    return z.square().mean() + F.cross_entropy(z.view(-1, V), y.view(-1))


def changed_under_no_grad(z, y):
    with torch.no_grad():
        z.mul_(0.5)
    return F.cross_entropy(z.view(-1, V), y.view(-1))


WRITTEN = {"changed": changed, "assigned": assigned, "changed without history": changed_under_no_grad}


@pytest.mark.parametrize("settings", [{}, {"cap": 5.0}, {"scale": 0.5, "bias": True}], ids=str)
@pytest.mark.parametrize("use", UNREAD.values(), ids=UNREAD)
def test_computes_no_logits_for(use, settings, tokens, count):
    model, compiled = pair(**settings)
    assert_same(model, compiled, lambda m: use(m(tokens), tokens))
    assert isinstance(compiled(tokens), LazyLogits)
    assert not count, count


@pytest.mark.parametrize("settings", [{}, {"scale": 0.5, "bias": True}], ids=str)
def test_computes_no_logits_for_a_soft_cap_outside(settings, tokens, count):
    model, compiled = pair(**settings)
    assert_same(model, compiled, lambda m: F.cross_entropy((torch.tanh(m(tokens) / 3.0) * 3.0)[0], tokens[0]))
    assert not count, count


@pytest.mark.parametrize("use", [*READ.values(), *WRITTEN.values()], ids=[*READ, *WRITTEN])
def test_computes_logits_once_for(use, tokens, count):
    model, compiled = pair()
    assert_same(model, compiled, lambda m: use(m(tokens), tokens))
    assert sum(count.values()) <= 2  # a detached copy is another tensor
    assert all(__file__ in line for line in count), count


@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
def test_returns_them_beside_a_fused_loss(inner, tokens, count):
    model, compiled = pair(inner)
    assert_same(model, compiled, lambda m: m(tokens, tokens)[0])
    assert not count
    assert graphfuse.report(compiled).counts == HEAD

    def loss_and_squares(model):
        loss, logits = model(tokens, tokens)
        return loss + logits.cos().mean()

    assert_same(model, compiled, loss_and_squares)
    assert sum(count.values()) == 1


def test_looks_like_the_logits(tokens, count):
    model, compiled = pair(wide=True)
    expected, got = model(tokens), compiled(tokens)
    assert isinstance(got, torch.Tensor)
    assert (got.shape, got.dtype, got.device) == (expected.shape, expected.dtype, expected.device)
    assert (got.stride(), got.requires_grad, len(got)) == (expected.stride(), True, B)
    assert torch.zeros_like(got).shape == expected.shape
    assert not count


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=lambda m: m.__name__)
def test_evaluates(mode, tokens, count):
    model, compiled = pair()
    with mode():
        (loss, logits), (expected, reference) = compiled(tokens, tokens), model(tokens, tokens)
        torch.testing.assert_close(loss, expected)
        assert torch.equal(logits.argmax(-1), reference.argmax(-1))
        assert not count
        torch.testing.assert_close(logits + 0, reference)


def test_is_a_tensor_without_gradients_where_no_loss_is_fused(tokens):
    _, compiled = pair()
    with torch.no_grad():
        assert type(compiled(tokens)) is torch.Tensor


def test_can_be_turned_off(tokens):
    compiled = graphfuse.optimize(Decoder(), inner="eager", lazy_logits=False)
    assert type(compiled(tokens)) is torch.Tensor
    assert type(compiled(tokens, tokens)[1]) is torch.Tensor


def test_is_stored_and_copied_as_a_tensor(tokens):
    model, compiled = pair()
    expected, got = model(tokens).detach(), compiled(tokens).detach()
    buffer = io.BytesIO()
    torch.save(got, buffer)
    buffer.seek(0)
    copies = [pickle.loads(pickle.dumps(got)), torch.load(buffer), copy.deepcopy(got), torch.from_numpy(got.numpy())]
    copies += [torch.tensor(got.tolist()), copy.copy(got) + 0, got.clone() + 0, got.to("cpu") + 0]
    for other in copies:
        torch.testing.assert_close(other, expected)
    assert repr(got) == repr(expected)


def test_refuses_to_be_read_after_the_weights_changed(tokens):
    _, compiled = pair()
    optimizer = torch.optim.SGD(compiled.parameters(), lr=0.1)
    loss, logits = compiled(tokens, tokens)
    loss.backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"logits: expected to be read before the weights .*lazy_logits=False"):
        logits.sum()
    with pytest.raises(RuntimeError, match=r"logits: expected to be read before"):
        F.cross_entropy(logits.view(-1, V), tokens.view(-1))


def test_refuses_to_be_read_after_the_weights_were_replaced(tokens):
    _, compiled = pair()
    logits = compiled(tokens)
    compiled.head.weight.data = torch.zeros(V, H)
    with pytest.raises(RuntimeError, match=r"logits: expected to be read before the weights"):
        logits.argmax(-1)


def test_detached_logits_may_become_a_leaf(tokens):
    model, compiled = pair()
    leaves = [m(tokens).detach().requires_grad_() for m in (model, compiled)]
    for leaf in leaves:
        F.cross_entropy(leaf.view(-1, V), tokens.view(-1)).backward()
    torch.testing.assert_close(leaves[1].grad, leaves[0].grad)


def test_refuses_to_be_reshaped_in_place(tokens):
    _, compiled = pair()
    with pytest.raises(RuntimeError, match="logits: expected no change of their shape in place, got unsqueeze_"):
        compiled(tokens).unsqueeze_(0)


@pytest.mark.parametrize("function", [torch.exp, torch.tanh, torch.softmax, torch.log_softmax, F.nll_loss])
def test_has_the_dtype_that_autocast_gives(function, tokens):
    model, compiled = pair()

    def dtype(m):
        logits = m(tokens).bfloat16()
        with torch.autocast("cpu", torch.bfloat16):
            if function is F.nll_loss:
                return function(torch.log_softmax(logits, -1).view(-1, V), tokens.view(-1)).dtype
            return (function(logits, -1) if "softmax" in function.__name__ else function(logits)).dtype

    assert dtype(compiled) == dtype(model)


def test_keeps_values_that_were_read_before_the_weights_changed(tokens):
    model, compiled = pair()
    logits = compiled(tokens)
    logits.sum()
    with torch.no_grad():
        compiled.head.weight.zero_()
    torch.testing.assert_close(logits + 0, model(tokens))


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return -grad


def test_passes_through_autograd_functions_of_others(tokens):
    """A fused loss must not skip what stands between it and the logits."""
    model, compiled = pair()
    assert_same(model, compiled, lambda m: F.cross_entropy(Reverse.apply(m(tokens)).view(-1, V), tokens.view(-1)))


@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_goes_into_another_compiled_function(tokens):
    model, compiled = pair()
    loss = torch.compile(UNREAD["cross_entropy"], backend="aot_eager")
    assert_same(model, compiled, lambda m: loss(m(tokens), tokens))


@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_crosses_a_graph_break(tokens):
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.decoder = Decoder()

        def forward(self, tokens):
            logits = self.decoder(tokens)
            torch._dynamo.graph_break()
            return F.cross_entropy(logits.view(-1, V), tokens.view(-1))

    model = Broken()
    compiled = graphfuse.optimize(copy.deepcopy(model), inner="aot_eager", strict=True)
    assert_same(model, compiled, lambda m: m(tokens))


def test_works_under_checkpoint_and_autocast(tokens):
    model, compiled = pair("aot_eager")

    def checkpointed(m):
        return torch.utils.checkpoint.checkpoint(lambda t: m(t, t)[0], tokens, use_reentrant=False)

    assert_same(model, compiled, checkpointed)
    torch._dynamo.reset()
    with torch.autocast("cpu", torch.bfloat16):
        logits, reference = compiled(tokens), model(tokens)
        assert logits.dtype == reference.dtype == torch.bfloat16
        loss = F.cross_entropy(logits.view(-1, V), tokens.view(-1))
        expected = F.cross_entropy(reference.view(-1, V), tokens.view(-1))
    assert loss.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(logits + 0, reference)  # autocast is off by now


def test_frees_the_memory_of_the_logits():
    """The hidden states stay; of the logits there is nothing but their shape."""
    _, compiled = pair()
    logits = compiled(torch.randint(V, (B, S)))
    assert logits.source.own is None
    assert logits.source.formula.tensors[0].shape == (B, S, H)


@pytest.mark.skipif(TorchVersion(torch.__version__) < "2.13", reason="see graphfuse.breaks")
def test_messages_said_once_do_not_break_the_graph(tokens):
    import functools
    import logging

    @functools.lru_cache(None)
    def say_once(self, *args):
        self.warning(*args)

    logging.Logger.say_once = say_once
    try:
        logger = logging.getLogger("somebody")

        class Talking(Decoder):
            def forward(self, tokens, labels):
                logits = self.head(self.embed(tokens))
                logger.say_once("using the default loss")
                return F.cross_entropy(logits.view(-1, V), labels.view(-1))

        compiled = graphfuse.optimize(Talking(), inner="eager", strict=True, fullgraph=True)
        compiled(tokens, tokens)
        assert graphfuse.report(compiled).counts == {"linear_cross_entropy": 1}
    finally:
        del logging.Logger.say_once


def test_a_hook_leaves_logits_unread_and_sees_their_gradient(tokens):
    """As FSDP hangs one on every output."""
    model, compiled = pair()
    _, logits = compiled(tokens, tokens)
    logits.register_hook(lambda grad: 3 * grad)
    assert not materialised
    _, eager = model(tokens, tokens)
    ours, theirs = gradients(compiled, logits.float().cos().sum()), gradients(model, 3 * eager.float().cos().sum())
    for got, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, expected, rtol=TOLERANCE, atol=TOLERANCE * float(expected.abs().amax()))
