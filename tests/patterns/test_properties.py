"""Spellings that nobody wrote down: drawn from choices, and rewritten; and with one mistake, which are left alone."""

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st

import graphfuse
from tests.patterns import spelled
from tests.patterns.spelled import IGNORED, INNER, B, D, H, S, V

few = settings(
    max_examples=20,
    phases=[Phase.generate],  # every example compiles: a failing one is not made smaller
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
KINDS = st.sampled_from(["float32", "bfloat16", "autocast", "dynamic"])


class Choice(dict):
    """What was drawn: names for people, and what they stand for."""

    def __init__(self, options, names):
        super().__init__({k: options[k][name] if isinstance(options[k], dict) else name for k, name in names.items()})
        self.names = names

    def __repr__(self):
        return repr(self.names)


def choices(options):
    drawn = {key: st.sampled_from(list(names)) for key, names in options.items()}
    return st.fixed_dictionaries(drawn).map(lambda names: Choice(options, names))


def norm_inputs():
    return torch.randn(B, S, D) * torch.logspace(-1, 1, S)[:, None], torch.randn(D)


def rope_inputs(choice):
    width = D if choice["part"] is None else 8
    cos, sin = spelled.tables(choice.names["turn"] in spelled.PAIRED, width)
    return torch.randn(B, S, H, D), torch.randn(B, S, H, D), cos, sin


def glu_inputs():
    return 2 * torch.randn(B, S, D), torch.randn(INNER, D) / 2, torch.randn(INNER, D) / 2


def head_inputs():
    labels = torch.randint(V, (B, S))
    labels[0, 2] = IGNORED
    return torch.randn(B, S, D), torch.randn(V, D) / 4, labels


@pytest.fixture
def check(verify):
    """Verify a function in one of the kinds."""

    def check(fn, inputs, kind="float32", tables=()):
        torch._dynamo.reset()
        dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
        inputs = [x.to(dtype).requires_grad_() if x.is_floating_point() else x for x in inputs]
        tables = [x.to(dtype) for x in tables]
        return verify(fn, [*inputs, *tables], dynamic=kind == "dynamic", autocast=kind == "autocast", ulps=2**14)

    return check


@few
@given(choices(spelled.RMS_NORM), KINDS)
def test_rewrites_rms_norm(check, choice, kind):
    report = check(spelled.rms_norm(choice), norm_inputs(), kind)
    assert report.counts == {"rms_norm": 1}, report


@few
@given(choices(spelled.LAYER_NORM), KINDS)
def test_rewrites_layer_norm(check, choice, kind):
    report = check(spelled.layer_norm(choice), (*norm_inputs(), torch.randn(D)), kind)
    assert report.counts == {"layer_norm": 1}, report


@few
@given(choices(spelled.ROPE), KINDS)
def test_rewrites_rope(check, choice, kind):
    q, k, *tables = rope_inputs(choice)
    report = check(spelled.rope(choice), (q, k), kind, tables)
    assert report.counts == {"rope": 1 + choice["both"]}, report


@few
@given(choices(spelled.GLU), KINDS)
def test_rewrites_glu(check, choice, kind):
    report = check(spelled.glu(choice), glu_inputs(), kind)
    assert report.counts == {"glu": 1}, report


@few
@given(choices(spelled.LINEAR_CROSS_ENTROPY), KINDS)
def test_rewrites_linear_cross_entropy(check, choice, kind):
    # Autocast casts between a reshape and the product, which hides the matrix, or the tokens' shape: refused.
    assume(kind != "autocast" or choice.names["linear"] in ("linear", "matmul"))
    report = check(spelled.linear_cross_entropy(choice), head_inputs(), kind)
    assert report.counts == {"linear_cross_entropy": 1}, report


@pytest.fixture
def leave(check):
    """Compile a function that is none of ours, compare it with eager, and assert that it was left alone."""

    def leave(name, mistake, fn, inputs, tables=()):
        if mistake != "dropped out":
            report = check(fn, inputs, tables=tables)
        else:  # no two runs agree
            torch._dynamo.reset()
            compiled = graphfuse.optimize(fn, inner="eager", fullgraph=True, strict=True)
            compiled(*inputs, *tables)
            report = graphfuse.report(compiled)
        assert name not in report.counts, report

    return leave


@few
@given(choices(spelled.RMS_NORM), st.sampled_from(list(spelled.RMS_NORM_MISTAKES)))
def test_leaves_what_is_almost_rms_norm(leave, choice, mistake):
    choice.update(spelled.RMS_NORM_MISTAKES[mistake])
    leave("rms_norm", mistake, spelled.rms_norm(choice), norm_inputs())


@few
@given(choices(spelled.LAYER_NORM), st.sampled_from(list(spelled.LAYER_NORM_MISTAKES)))
def test_leaves_what_is_almost_layer_norm(leave, choice, mistake):
    choice.update(spelled.LAYER_NORM_MISTAKES[mistake])
    leave("layer_norm", mistake, spelled.layer_norm(choice), (*norm_inputs(), torch.randn(D)))


@few
@given(choices(spelled.ROPE), st.sampled_from(list(spelled.ROPE_MISTAKES)))
def test_leaves_what_is_almost_rope(leave, choice, mistake):
    choice.update(spelled.ROPE_MISTAKES[mistake])
    q, k, *tables = rope_inputs(choice)
    leave("rope", mistake, spelled.rope(choice), (q, k), tables)


@few
@given(choices(spelled.GLU), st.sampled_from(list(spelled.GLU_MISTAKES)))
def test_leaves_what_is_almost_glu(leave, choice, mistake):
    choice.update(spelled.GLU_MISTAKES[mistake])
    leave("glu", mistake, spelled.glu(choice), glu_inputs())


@few
@given(choices(spelled.LINEAR_CROSS_ENTROPY), st.sampled_from(list(spelled.LINEAR_CROSS_ENTROPY_MISTAKES)))
def test_leaves_what_is_almost_linear_cross_entropy(leave, choice, mistake):
    choice.update(spelled.LINEAR_CROSS_ENTROPY_MISTAKES[mistake])
    leave("linear_cross_entropy", mistake, spelled.linear_cross_entropy(choice), head_inputs())
