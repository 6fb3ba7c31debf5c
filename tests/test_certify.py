"""The proof: small differences are found, and a proof is made once."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from graphfuse import certify as module
from graphfuse.certify import certify, forget
from graphfuse.patterns import CATALOGUE
from graphfuse.replay import record


@pytest.fixture(autouse=True)
def no_old_proofs():
    forget()
    yield
    forget()


def found_in(fn, *inputs):
    """The first match of any pattern, and its shadow."""
    found = []

    def backend(graph_module, example_inputs):
        shadow = record(graph_module, example_inputs)
        found.extend((match, shadow) for pattern in CATALOGUE for match in pattern.find(shadow))
        return graph_module.forward

    torch.compile(fn, backend=backend, fullgraph=True)(*inputs)
    return found[0]


def changed(match, **params):
    return dataclasses.replace(match, params={**match.params, **params})


def llama_norm(x, weight):
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5)
    return weight * h.to(x.dtype)


def gemma_norm(x, weight):
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5)
    return ((1.0 + weight.float()) * h).to(x.dtype)


def gated(x, gate, up):
    return F.silu(F.linear(x, gate)) * F.linear(x, up)


def rotated(x, cos, sin):
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


def head(x, weight, labels):
    return F.cross_entropy(F.linear(x, weight), labels)


def norm_inputs(dtype=torch.float32):
    return torch.randn(6, 64, dtype=dtype, requires_grad=True), torch.randn(64, dtype=dtype, requires_grad=True)


CASES = {
    "norm": (llama_norm, norm_inputs),
    "gate": (gated, lambda: [torch.randn(s, requires_grad=True) for s in [(6, 8), (12, 8), (12, 8)]]),
    "rope": (rotated, lambda: [torch.randn(2, 6, 16, requires_grad=True), torch.randn(6, 16), torch.randn(6, 16)]),
    "head": (
        head,
        lambda: [
            torch.randn(6, 8, requires_grad=True),
            torch.randn(20, 8, requires_grad=True),
            torch.randint(20, (6,)),
        ],
    ),
}
DIFFERENCES = [
    ("norm", {"eps": 1.01e-5}),
    ("norm", {"eps": 0.0}),
    ("norm", {"mode": "outside"}),
    ("norm", {"mode": "clamp"}),
    ("norm", {"gain": 1.0 + 1e-6}),
    ("norm", {"offset": 1.0}),
    ("gate", {"activation": "gelu"}),
    ("gate", {"activation": "swish", "alpha": 1.0001}),
    ("gate", {"up_offset": 1e-6}),
    ("gate", {"gate_max": 20.0}),
    ("gate", {"up_limit": 20.0}),
    ("rope", {"reverse": True}),
    ("rope", {"layout": "interleaved"}),
    ("rope", {"out_layout": "interleaved"}),
    ("rope", {"table": "interleaved"}),
    ("head", {"reduction": "sum"}),
    ("head", {"logit_scale": 1.0001}),
    ("head", {"softcap": 1000.0}),
    ("head", {"ignore_index": 0}),
]


@pytest.mark.parametrize("case", CASES)
def test_proves_what_is_the_same(case):
    fn, inputs = CASES[case]
    match, shadow = found_in(fn, *inputs())
    assert certify(match, shadow) is None


@pytest.mark.parametrize(("case", "params"), DIFFERENCES, ids=str)
def test_finds_small_differences(case, params):
    fn, inputs = CASES[case]
    match, shadow = found_in(fn, *inputs())
    reason = certify(changed(match, **params), shadow)
    assert reason is not None
    assert reason.startswith("certify: expected")


def test_accepts_less_rounding_and_refuses_much_more():
    match, shadow = found_in(llama_norm, *norm_inputs(torch.bfloat16))
    assert certify(changed(match, normalized_dtype=torch.float32), shadow) is None
    coarse = dataclasses.replace(match, replacement=lambda *inputs, **params: coarsely(match, *inputs, **params))
    assert "relative error of at most" in certify(coarse, shadow)


def coarsely(match, x, weight, **params):
    """With three bits fewer of `x`, unless it is float64."""
    if x.dtype == torch.bfloat16:
        x = x.to(torch.float8_e5m2).to(x.dtype)
    return match.replacement(x, weight, **params)


def test_refuses_another_dtype():
    match, shadow = found_in(llama_norm, *norm_inputs(torch.bfloat16))
    reason = certify(changed(match, out_dtype=torch.float32), shadow)
    assert reason == "certify: expected output of dtype torch.bfloat16, got torch.float32"


def test_refuses_what_has_no_numbers():
    x, weight = norm_inputs()
    match, shadow = found_in(llama_norm, x.detach()[:0], weight)
    assert certify(match, shadow).startswith("certify: expected numbers to compare, got none in ")


def test_refuses_what_does_not_run():
    match, shadow = found_in(llama_norm, *norm_inputs())
    reason = certify(changed(match, eps="small"), shadow)
    assert reason.startswith("certify: expected the replacement to run, got:")


def test_keeps_a_proof_for_all_that_it_depends_on(monkeypatch):
    proofs = []

    class Counted(module._Trial):
        def run(self):
            proofs.append(self.match)
            return super().run()

    monkeypatch.setattr(module, "_Trial", Counted)
    for inputs in (norm_inputs(), norm_inputs()):
        torch._dynamo.reset()
        certify(*found_in(llama_norm, *inputs))
    assert len(proofs) == 1
    torch._dynamo.reset()
    certify(*found_in(llama_norm, *norm_inputs(torch.bfloat16)))
    certify(*found_in(llama_norm, *(t.detach() for t in norm_inputs())))
    assert len(proofs) == 3
    forget()
    certify(proofs[0], found_in(llama_norm, *norm_inputs())[1])
    assert len(proofs) == 4


def test_leaves_the_state_of_torch_alone():
    match, shadow = found_in(llama_norm, *norm_inputs())
    state = torch.random.get_rng_state()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert certify(match, shadow) is None
        assert not torch.is_grad_enabled()
        assert torch.is_autocast_enabled("cpu")
    assert torch.equal(torch.random.get_rng_state(), state)


def test_shrinks_the_batch():
    """A proof costs the same for a large batch as for a small one."""
    match, shadow = found_in(llama_norm, torch.randn(4, 4096, 8), torch.randn(8))
    leaves = module._lead_in(match, shadow)[1]
    proof = module._Trial(match, shadow.cone(match.outputs, match.inputs), [], leaves)
    assert sum(tensor.numel() for tensor in proof._draw(0)) < 1000
    assert certify(match, shadow) is None


@pytest.mark.parametrize("noise", [0.0, 1e-17])
def test_rows_of_rounding_do_not_drown_the_others(noise):
    truth = torch.randn(8, 16, dtype=torch.float64)
    truth[0] = noise * torch.randn(16, dtype=torch.float64)
    good, bad = truth + 1e-4 * torch.randn(8, 16), truth + 1e-4 * torch.randn(8, 16)
    bad[3] *= 1.5
    assert module._error(good, truth) < 2e-4
    assert module._error(bad, truth) > 0.1
    wrong = good.clone()
    wrong[0] = 1.0  # where nothing is expected
    assert module._error(wrong, truth) > 0.1


def test_small_rows_count_as_much_as_large_ones():
    truth = torch.randn(8, 16, dtype=torch.float64) * torch.tensor([1.0, 1e-9]).repeat(4).unsqueeze(1).double()
    wrong = truth.clone()
    wrong[1] *= 2
    assert module._error(wrong, truth) > 0.3


def test_rows_that_are_left_of_a_difference_do_not_count_as_much():
    """The first of them is nothing but rounding of its terms, and those are of the size of the second."""
    truth = torch.tensor([[1e-6], [1.0]], dtype=torch.float64).expand(2, 16)
    got = truth + 1e-7
    assert module._error(got, truth) > 1e-2
    assert module._error(got, truth, by_row=False) < 2e-7


def attended(q, k, v):
    seen = torch.ones(4, 4, dtype=torch.bool, device=q.device).tril()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)


@pytest.mark.parametrize("is_enabled", [True, False])
@pytest.mark.parametrize("attends", [True, False])
def test_code_as_it_is_attends_without_cudnn(monkeypatch, is_enabled, attends):
    """That would make code for each kind of call, with a mask that the rewritten model never reads."""
    seen = []

    def watched(name):
        run = getattr(module._Trial, name)

        def method(trial, known, *, exact, device):
            seen.append((name, exact, torch.backends.cuda.cudnn_sdp_enabled()))
            return run(trial, known, exact=exact, device=device)

        monkeypatch.setattr(module._Trial, name, method)

    watched("_region")
    watched("_replacement")
    given = [torch.randn(1, 2, 4, 8) for _ in range(3)]
    match, shadow = found_in(attended, *given) if attends else found_in(llama_norm, torch.randn(4, 8), torch.randn(8))
    torch.backends.cuda.enable_cudnn_sdp(is_enabled)
    try:
        assert certify(match, shadow) is None
        assert torch.backends.cuda.cudnn_sdp_enabled() is is_enabled
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)
    real = [is_on for name, exact, is_on in seen if name == "_region" and not exact]
    assert real
    assert {*real} == {is_enabled and not attends}
    assert {is_on for name, exact, is_on in seen if name == "_replacement" or exact} == {is_enabled}


@pytest.mark.parametrize(("device", "count"), [("cuda", 1), ("cpu", 3)])
def test_proofs_beside_a_gpu_take_one_thread(device, count):
    """Others may be waiting for a processor, where the processes that compile kernels have them all."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with module._by_itself(torch.device(device)):
            assert torch.get_num_threads() == count
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
