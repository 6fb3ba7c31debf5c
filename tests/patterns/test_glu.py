"""Gated MLPs: whatever the activation and the packing, and no other products."""

import math

import pytest
import torch
import torch.nn.functional as F

import graphfuse

T, D, INNER = 6, 16, 24


def separate(act):
    def mlp(x, gate, up):
        return act(F.linear(x, gate)) * F.linear(x, up)

    return mlp


def up_first(x, gate, up):
    return F.linear(x, up) * F.silu(F.linear(x, gate))


def chunked(x, gate, up):
    a, b = F.linear(x, torch.cat((gate, up))).chunk(2, dim=-1)
    return F.silu(a) * b


def chunked_up_first(x, gate, up):
    b, a = F.linear(x, torch.cat((up, gate))).chunk(2, dim=-1)
    return b * F.silu(a)


def split(x, gate, up):
    a, b = torch.split(F.linear(x, torch.cat((gate, up))), [INNER, INNER], dim=-1)
    return F.gelu(a) * b


def viewed(x, gate, up):
    packed = F.linear(x, torch.cat((gate, up))).view(*x.shape[:-1], 2, -1)
    return F.silu(packed[..., 0, :]) * packed[..., 1, :]


def unbound(x, gate, up):
    a, b = F.linear(x, torch.cat((gate, up))).unflatten(-1, (2, INNER)).unbind(-2)
    return F.silu(a) * b


def sliced(x, gate, up):
    packed = F.linear(x, torch.cat((gate, up)))
    return F.silu(packed[..., :INNER]) * packed[..., INNER:]


def gpt_oss(x, gate, up):
    packed = F.linear(x, torch.stack((gate, up), 1).flatten(0, 1))
    a, b = packed[..., ::2], packed[..., 1::2]
    a, b = a.clamp(min=None, max=7.0), b.clamp(min=-7.0, max=7.0)
    return (b + 1) * (a * torch.sigmoid(a * 1.702))


def clamped(x, gate, up):
    a, b = F.linear(x, gate).clamp(max=10.0), F.linear(x, up).clamp(min=-10.0, max=10.0)
    return F.silu(a) * b


def wide(x, gate, up):
    a, b = F.linear(x, gate), F.linear(x, up)
    return (F.silu(a.float()) * b.float()).to(x.dtype)


def biased(x, gate, up):
    return F.silu(F.linear(x, gate, gate[:, 0])) * F.linear(x, up, up[:, 0])


def matmul(x, gate, up):
    return F.silu(x @ gate.t()) * torch.matmul(x, up.t())


def experts(x, gate, up):
    x = x.unsqueeze(0).expand(2, -1, -1)
    packed = torch.bmm(x, torch.cat((gate, up)).t().expand(2, -1, -1))
    a, b = packed.chunk(2, dim=-1)
    return b * F.silu(a)


def rank_three(x, gate, up):
    return separate(F.silu)(x.view(2, T // 2, D), gate, up)


def in_place(x, gate, up):
    return F.silu(F.linear(x, gate)).mul_(F.linear(x, up))


def adapted(x, gate, up):
    a = F.linear(x, gate) + F.linear(F.linear(x, gate[:4]), gate[:, :4]) * 0.5
    return F.silu(a) * F.linear(x, up)


def scaled(x, gate, up):
    return F.linear(x, up) * F.silu(F.linear(x, gate) * 0.5)


def squared_relu(z):
    return torch.square(F.relu(z))


def quick_gelu(z):
    return z * torch.sigmoid(1.702 * z)


def silu_by_hand(z):
    return z / (1 + torch.exp(-z))


def gelu_by_hand(z):
    return 0.5 * z * (1.0 + torch.erf(z / math.sqrt(2.0)))


def gelu_tanh_by_hand(z):
    return 0.5 * z * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (z + 0.044715 * torch.pow(z, 3.0))))


def gelu_tanh(z):
    return F.gelu(z, approximate="tanh")


def called(name, fn):
    fn.__name__ = name
    return fn


SPELLINGS = [
    *(
        (called(f"separate {activation}", separate(act)), activation)
        for act, activation in [
            (F.silu, "silu"),
            (F.gelu, "gelu"),
            (gelu_tanh, "gelu_tanh"),
            (quick_gelu, "swish"),
            (F.relu, "relu"),
            (squared_relu, "relu2"),
            (torch.sigmoid, "sigmoid"),
            (torch.tanh, "tanh"),
        ]
    ),
    (called("silu by hand", separate(silu_by_hand)), "silu"),
    (called("gelu by hand", separate(gelu_by_hand)), "gelu"),
    (called("gelu tanh by hand", separate(gelu_tanh_by_hand)), "gelu_tanh"),
    (up_first, "silu"),
    (chunked, "silu"),
    (chunked_up_first, "silu"),
    (split, "gelu"),
    (viewed, "silu"),
    (unbound, "silu"),
    (sliced, "silu"),
    (gpt_oss, "swish"),
    (clamped, "silu"),
    (wide, "silu"),
    (biased, "silu"),
    (matmul, "silu"),
    (experts, "silu"),
    (rank_three, "silu"),
    (in_place, "silu"),
    (adapted, "silu"),
    (scaled, "silu"),
]


def inputs(dtype=torch.float32):
    return (
        (3 * torch.randn(T, D)).to(dtype).requires_grad_(),
        (torch.randn(INNER, D) / 2).to(dtype).requires_grad_(),
        (torch.randn(INNER, D) / 2).to(dtype).requires_grad_(),
    )


def named(value):
    return getattr(value, "__name__", "")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("spelling", "activation"), SPELLINGS, ids=named)
def test_rewrites(spelling, activation, dtype, verify):
    report = verify(spelling, inputs(dtype), ulps=2**14 if dtype == torch.bfloat16 else 4)
    assert report.counts == {"glu": 1}, report
    assert report.sites[0].params["activation"] == activation


@pytest.mark.parametrize(("spelling", "activation"), SPELLINGS[-17:], ids=named)
def test_rewrites_at_dynamic_shapes(spelling, activation, verify):
    report = verify(spelling, inputs(), dynamic=True)
    assert report.counts == {"glu": 1}, report


@pytest.mark.parametrize(
    "spelling", [separate(F.silu), separate(gelu_tanh), chunked, gpt_oss, wide, in_place], ids=named
)
def test_rewrites_under_autocast(spelling, verify):
    report = verify(spelling, inputs(), autocast=True, ulps=2**14)
    assert report.counts == {"glu": 1}, report


def test_reads_off_clamps_slope_and_offset(verify):
    (site,) = verify(gpt_oss, inputs()).sites
    expected = {"activation": "swish", "alpha": 1.702, "gate_max": 7.0, "up_limit": 7.0, "up_offset": 1.0}
    assert {name: site.params[name] for name in expected} == pytest.approx(expected)
    assert site.variant == "swish(1.702), clamped, up +1, interleaved, float32"


def softplus_gate(x, gate, up):
    return F.softplus(F.linear(x, gate)) * F.linear(x, up)


def wrong_gelu(x, gate, up):
    z = F.linear(x, gate)
    return z * 0.5 * (1 + torch.erf(z / 1.5)) * F.linear(x, up)


def hyper_connection(x, gate, up):
    return 2 * torch.sigmoid(F.linear(x, gate)) * F.linear(x, up)


def shifted_silu(x, gate, up):
    return F.silu(F.linear(x, gate) + 1) * F.linear(x, up)


def squared_up(x, gate, up):
    return F.silu(F.linear(x, gate)) * F.linear(x, up).square()


def gate_of_softmax(x, gate, up):
    return F.silu(F.linear(x, gate)) * F.linear(x, up).softmax(-1)


def no_gate(x, gate, up):
    z = F.linear(x, gate)
    return z * torch.sigmoid(1.702 * z)


def broadcast(x, gate, up):
    return torch.sigmoid(F.linear(x, gate[:1])) * F.linear(x, up)


def bilinear(x, gate, up):
    return F.linear(x, gate) * F.linear(x, up)


@pytest.mark.parametrize(
    "spelling",
    [
        softplus_gate,
        wrong_gelu,
        hyper_connection,
        shifted_silu,
        squared_up,
        gate_of_softmax,
        no_gate,
        broadcast,
        bilinear,
    ],
    ids=named,
)
def test_leaves_near_misses_right(spelling, verify):
    """Some of these are no gates; some may yet be rewritten in part. All stay what they were."""
    report = verify(spelling, inputs())
    assert report.counts == ({"glu": 1} if spelling is shifted_silu else {}), report


@pytest.mark.parametrize("spelling", [wrong_gelu], ids=named)
def test_says_which_activations_there_are(spelling, verify):
    reasons = [site.reason for site in verify(spelling, inputs()).refused]
    assert reasons, "expected a refusal"
    assert all(reason.startswith("activation: expected one of silu, gelu,") for reason in reasons)


def uses_activation(x, gate, up):
    z = F.silu(F.linear(x, gate))
    return z * F.linear(x, up), z


def uses_gate(x, gate, up):
    z = F.linear(x, gate)
    return F.silu(z) * F.linear(x, up) + z


def detached_gate(x, gate, up):
    return F.silu(F.linear(x, gate)).detach() * F.linear(x, up)


def gate_without_gradient(x, gate, up):
    with torch.no_grad():
        z = F.silu(F.linear(x, gate))
    return z * F.linear(x, up)


def adds_after(x, gate, up):
    y = F.silu(F.linear(x, gate)) * F.linear(x, up)
    return y.add_(x[:, :1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "spelling", [uses_activation, uses_gate, detached_gate, gate_without_gradient, adds_after], ids=named
)
def test_stays_right_where_others_reach_in(spelling, dtype, verify):
    verify(spelling, inputs(dtype), ulps=2**14 if dtype == torch.bfloat16 else 4)


def changes_gate_between(x, gate, up):
    z = F.linear(x, gate)
    a = F.silu(z)
    z.add_(1)
    return a * F.linear(x, up) + z


def changes_activation_between(x, gate, up):
    a = F.silu(F.linear(x, gate))
    a[0] = 0
    return a * F.linear(x, up)


def activates_in_place(x, gate, up):
    return F.silu(F.linear(x, gate), inplace=True).mul_(F.linear(x, up))


@pytest.mark.parametrize("spelling", [changes_gate_between, changes_activation_between, activates_in_place], ids=named)
def test_refuses_values_that_change(spelling, verify):
    x, gate, up = inputs()
    report = verify(spelling, (x.detach(), gate.detach(), up.detach()))
    assert report.rewritten == [], report


def test_leaves_random_numbers_alone():
    def fn(x, gate, up):
        return F.silu(F.dropout(F.linear(x, gate))) * F.dropout(F.linear(x, up)), F.dropout(F.silu(x)) * x

    compiled = graphfuse.optimize(fn, inner="eager", fullgraph=True, strict=True)
    assert all(y.isfinite().all() for y in compiled(*inputs()))


def test_leaves_a_dropped_out_activation_alone():
    def fn(x, gate, up):
        return F.dropout(F.silu(F.linear(x, gate)), 0.5) * F.linear(x, up)

    compiled = graphfuse.optimize(fn, inner="eager", fullgraph=True, strict=True)
    assert compiled(*inputs()).isfinite().all()
    assert graphfuse.report(compiled).rewritten == []


def test_refuses_gates_whose_second_factor_is_bent(verify):
    def capped(x):
        return 4.0 * torch.tanh(x / 4.0)

    def gate(x, w, v):
        return capped(x @ w) * torch.sigmoid(x @ w) * capped(x @ v)

    report = verify(gate, tuple(torch.randn(shape, requires_grad=True) for shape in ((5, 8), (8, 12), (8, 12))))
    assert [site.reason for site in report.refused] == [
        "activation: expected one of silu, gelu, gelu_tanh, relu, relu2, sigmoid, tanh, swish, got another function"
    ]


PACKED = {chunked: "gate first", chunked_up_first: "up first", sliced: "gate first", viewed: "gate first"}
PACKED |= {unbound: "gate first", gpt_oss: "interleaved"}


@pytest.mark.parametrize(("spelling", "packing"), PACKED.items(), ids=lambda p: getattr(p, "__name__", p))
def test_takes_packed_projections_whole(spelling, packing, verify):
    """Nothing has to put the gradients of its parts together."""
    (site,) = verify(spelling, inputs()).sites
    assert site.params["packing"] == packing


def test_takes_parts_of_a_projection_apart(verify):
    def qkv_and_mlp(x, gate, up):
        packed = F.linear(x, torch.cat((gate, up, up)))
        a, b, c = packed.chunk(3, dim=-1)
        return F.silu(a) * b, c

    (site,) = verify(qkv_and_mlp, inputs()).sites
    assert "packing" not in site.params
