"""Lazy logits in what people write over them: still lazy, and the same as in eager."""

import operator

import pytest
import torch
import torch.nn.functional as F

from graphfuse.lazy import losses, materialised
from tests.test_lazy import Decoder, V, assert_same, pair

B, S = 2, 7


@pytest.fixture
def tokens(monkeypatch):
    """The rows go through in several chunks."""
    monkeypatch.setattr(losses, "CHUNK_BYTES", 4 * V * 4)
    materialised.clear()
    return torch.randint(V, (B, S))


def unlikelihood(z, y):
    """Tokens that were there before should not come again."""
    seen = y.unsqueeze(1).expand(-1, S, -1)
    return -torch.log(torch.clamp(1.0 - z.log_softmax(-1).exp(), min=1e-5)).gather(-1, seen).sum(-1).mean()


def margin(z, y):
    """How far the best of all others is above the token that comes."""
    picked = z.gather(-1, y.unsqueeze(-1)).squeeze(-1)
    return F.relu(1 - picked + z.scatter(-1, y.unsqueeze(-1), -torch.inf).amax(-1)).mean()


def soft_targets(z, y):
    return F.one_hot(y, V) * 0.9 + 0.1 / V


def masked_products(z, y):
    """As MiniLLM distils: where a logit is infinite, nothing."""
    products = (z.detach() / 2).softmax(-1, dtype=torch.float32) * F.log_softmax(z, -1, dtype=torch.float32)
    total = torch.masked_fill(products, torch.isinf(z), 0).sum(-1)
    return -(total.view(-1) * (y != 3).view(-1)).sum() / (y != 3).sum()


def padded_head(z, y):
    """A head with more classes than the tokenizer."""
    z = z[..., : V - 8].float()
    return F.cross_entropy((15 * torch.tanh(z / 15)).view(-1, V - 8), y.clamp(max=V - 9).view(-1))


def rank(z, y):
    """How many tokens are more likely than the one that comes."""
    return (z > z.gather(-1, y.unsqueeze(-1))).sum(-1)


RANKS = {
    "logits": rank,
    "from below": lambda z, y: (z.gather(-1, y.unsqueeze(-1)).squeeze(-1).unsqueeze(-1) < z).sum(-1),
    "log-probabilities": lambda z, y: rank(z.log_softmax(-1), y),
    "detached": lambda z, y: rank(z.detach(), y),
    "of a copy": lambda z, y: (z.detach() > z.gather(-1, y.unsqueeze(-1))).sum(-1),
}


USES = {
    "entropy with an epsilon": lambda z, y: -(z.softmax(-1) * torch.log(z.softmax(-1) + 1e-8)).sum(-1).mean(),
    "entropy by name": lambda z, y: torch.special.entr(z.softmax(-1)).sum(-1).mean(),
    "unlikelihood": unlikelihood,
    "soft targets": lambda z, y: F.cross_entropy(z.view(-1, V), soft_targets(z, y).view(-1, V)),
    "soft targets, classes second": lambda z, y: F.cross_entropy(z.transpose(1, 2), soft_targets(z, y).transpose(1, 2)),
    "soft targets, one by one": lambda z, y: (
        F.cross_entropy(z[0], soft_targets(z, y)[0], reduction="none").square().sum()
    ),
    "soft targets of its own": lambda z, y: F.cross_entropy(z.view(-1, V), (z.detach() / 2).view(-1, V).softmax(-1)),
    "masked products": masked_products,
    "squared": lambda z, y: F.mse_loss(z, z.detach() * 0.5),
    "squared by hand": lambda z, y: ((z - z.mean(-1, keepdim=True)) ** 2).mean(),
    "absolute": lambda z, y: F.l1_loss(z.softmax(-1), (z.detach() / 2).softmax(-1), reduction="sum"),
    "smooth": lambda z, y: F.smooth_l1_loss(z, z.detach() * 0.5, beta=0.1),
    "total variation": lambda z, y: 0.5 * ((z.softmax(-1) - (z.detach() / 2).softmax(-1)).abs()).sum(-1).mean(),
    "odds": lambda z, y: (1 / (1 + (-z).exp()) - z.sigmoid() + z.sigmoid().square()).mean(),
    "padded head": padded_head,
    "padded head with a divergence": lambda z, y: F.kl_div(
        z[:, 1:, :-8].log_softmax(-1), z.detach()[:, 1:, :-8].div(2).softmax(-1), reduction="batchmean"
    ),
    "bias of classes": lambda z, y: F.cross_entropy((z + torch.linspace(-1, 1, V)).view(-1, V), y.view(-1)),
    "bias from the left": lambda z, y: (torch.linspace(1, 2, V)[None, None].double() - z).logsumexp(-1).mean(),
    "banned classes": lambda z, y: F.cross_entropy(z.masked_fill(torch.arange(V) < 9, -1e4)[0], y[0]),
    "classes where": lambda z, y: torch.where(torch.arange(V) < 9, -1e4, z).logsumexp(-1).mean(),
    "rows where": lambda z, y: torch.where((y % 2 == 0).unsqueeze(-1), z, 0.0).logsumexp(-1).mean(),
    "margin": margin,
    "without infinities": lambda z, y: F.cross_entropy(z.nan_to_num().mT, y),
    "mean of chosen rows": lambda z, y: z[y % 2 == 0].mean() + z.float().clone().mean(),
    "rows of a range": lambda z, y: -z.log_softmax(-1)[0][range(S), y[0]].mean(),
    "rows of a list": lambda z, y: z[[0, 1], [2, 3]].logsumexp(-1).mean(),
    "rows of an array": lambda z, y: z[0][y[0].numpy() % S].logsumexp(-1).mean(),
    "largest of all": lambda z, y: z.detach().max() + z.detach().min() + z.detach().mean() + z.detach().sum() / V,
    "checks": lambda z, y: torch.isfinite(z).all().float() + torch.isnan(z).any() + (z > 0.5).float().mean(),
    "counted": lambda z, y: (
        (z.detach() >= 0.0).sum().float() + (z.ne(0.1)).sum() / V + (z.softmax(-1) < 0.1).sum(-1).sum()
    ),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_computes_no_logits_for(use, tokens):
    model, compiled = pair(scale=0.5, bias=True)
    assert_same(model, compiled, lambda m: use(m(tokens), tokens))
    assert not materialised, materialised


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad], ids=lambda m: m.__name__)
@pytest.mark.parametrize("rank", RANKS.values(), ids=RANKS)
def test_a_token_is_not_above_itself(rank, mode, tokens):
    model, compiled = pair()
    with mode():
        assert torch.equal(rank(compiled(tokens), tokens), rank(model(tokens), tokens))
    assert not materialised, materialised


def test_entries_that_changed_are_compared_as_they_are(tokens):
    model, compiled = pair()
    results = []
    for m in (model, compiled):
        z = m(tokens).detach()
        picked = z.gather(-1, tokens.unsqueeze(-1))
        picked.add_(0.25)
        results.append((z > picked).sum(-1))
    assert torch.equal(*results)


BINARY = ["add", "sub", "mul", "truediv", "pow", "eq", "ne", "gt", "ge", "lt", "le"]


@pytest.mark.parametrize("number", [2, 0.5], ids=str)
@pytest.mark.parametrize("name", BINARY)
def test_meets_a_number_from_either_side(name, number, tokens):
    function = getattr(operator, name)
    model, compiled = pair()
    for swapped in (False, True) if name != "pow" else (False,):
        use = (lambda z: function(number, z)) if swapped else (lambda z: function(z, number))
        materialised.clear()
        expected, got = (use(m(tokens).detach().abs()) for m in (model, compiled))
        assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
        assert not materialised, materialised
        if name not in ("eq", "ne", "gt", "ge", "lt", "le"):
            torch.testing.assert_close(got + 0, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "function",
    [torch.sigmoid, torch.square, lambda z: z**2, torch.log1p],
    ids=["sigmoid", "square", "power", "log1p"],  # the same in every process that collects them
)
def test_has_the_dtype_that_autocast_gives(function, tokens):
    model, compiled = pair()
    with torch.autocast("cpu", torch.bfloat16):
        expected, got = (function(m(tokens).abs()) for m in (model, compiled))
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got + 0, expected, rtol=0.02, atol=0.02)


def test_takes_arguments_by_any_name(tokens):
    """What is not foreseen reads the logits, as what is wrong does, and then torch says so."""
    model, compiled = pair()
    other = torch.rand(B, S, 1) + 0.5
    for use in (
        lambda z: torch.add(input=z, other=other),
        lambda z: torch.add(z, other, alpha=2),
        lambda z: torch.pow(z, exponent=2),
        lambda z: torch.mul(z, other=2.0),
        lambda z: torch.sub(z, other=1.5),
        lambda z: torch.argmax(z, axis=-1, keepdims=True),
        lambda z: z.sigmoid().mean(axis=-1),
        lambda z: torch.gt(z, other=0.1),
        lambda z: z.type_as(other=other),
    ):
        torch.testing.assert_close(use(compiled(tokens)) * 1, use(model(tokens)) * 1)
    for wrong in (lambda z: z.pow(), lambda z: z.add("1"), lambda z: z.gather(-1), lambda z: torch.mul(z, by=2)):
        with pytest.raises(TypeError):
            wrong(compiled(tokens))


def test_sums_of_all_are_not_rounded_row_by_row(tokens):
    model, compiled = pair()
    expected, got = (m(tokens).detach().bfloat16() for m in (model, compiled))
    torch.testing.assert_close(got.mean(), expected.mean(), rtol=0.01, atol=0)
    torch.testing.assert_close(got.sum(dtype=torch.float64), expected.sum(dtype=torch.float64), rtol=1e-3, atol=1e-3)
    assert not materialised, materialised


def test_what_meets_the_logits_may_change_before_they_are_read(tokens):
    """A temperature, a mask of rows: numbers that a loop changes in place."""
    model, compiled = pair()
    results = []
    for m in (model, compiled):
        temperature, mask, bias = torch.full((B, 1, 1), 0.7), tokens.unsqueeze(-1) % 2 == 0, torch.ones(V)
        scaled = (m(tokens).detach() / temperature).masked_fill(mask, 0.0) + bias
        temperature.mul_(2), mask.fill_(False), bias.zero_()
        results.append(scaled.logsumexp(-1))
    torch.testing.assert_close(*results)


def test_an_index_of_an_array_is_a_copy(tokens):
    model, compiled = pair()
    results = []
    for m in (model, compiled):
        z = m(tokens).detach()
        rows = z[tokens[:, 0].numpy() % B]
        rows.mul_(2.0)
        results.append((rows.sum(-1), z.sum(-1)))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:The .grad attribute")
@pytest.mark.parametrize(
    "rows", [lambda z: z[:, :-1], lambda z: z.transpose(0, 1), lambda z: z[:, 2], lambda z: z[..., :9]]
)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_some_rows_go_into_another_compiled_function(rows, backend, tokens):
    """As the losses of torchtune and torchtitan do, which are compiled apart from the model."""
    model, compiled = pair()
    loss = torch.compile(
        lambda z: F.cross_entropy(z.flatten(0, -2), z.new_ones(z.numel() // z.shape[-1]).long()), backend=backend
    )
    assert_same(model, compiled, lambda m: loss(rows(m(tokens))))


@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_rows_that_the_model_chose_go_into_another_compiled_function(tokens):
    class Recent(Decoder):
        def forward(self, tokens, labels=None):
            return super().forward(tokens)[:, -3:]

    model, compiled = pair(cls=Recent)
    loss = torch.compile(lambda z: z.logsumexp(-1).mean(), backend="aot_eager")
    assert_same(model, compiled, lambda m: loss(m(tokens)))


def test_graphs_of_other_logits_are_told_apart(tokens):
    """AOTAutograd's cache asks, and warns where there is no answer."""
    _, compiled = pair()
    logits = compiled(tokens)
    found = {each._stable_hash_for_caching() for each in (logits, logits.detach(), logits[:, :-1], logits.bfloat16())}
    assert len(found) == 4
    assert compiled(tokens)._stable_hash_for_caching() in found
