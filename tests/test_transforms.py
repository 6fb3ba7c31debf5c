"""Functions that torch.func transforms inside what is compiled."""

import pytest
import torch
import torch.nn.functional as F

import graphfuse


def of_weight(f):
    return lambda w, x, y: f(lambda w, x, y: F.cross_entropy(F.rms_norm(x, (8,)) @ w.T, y), w, x, y)


TRANSFORMED = {
    "grad": of_weight(lambda f, *args: torch.func.grad(f)(*args)),
    "vmap": of_weight(lambda f, *args: torch.func.vmap(f, (None, 0, 0))(*args)),
    "jvp": of_weight(lambda f, w, x, y: torch.func.jvp(lambda w: f(w, x[0], y[0]), (w,), (w,))),
    "vmap of grad": of_weight(lambda f, *args: torch.func.vmap(torch.func.grad(f), (None, 0, 0))(*args)),
}


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("transformed", TRANSFORMED.values(), ids=TRANSFORMED)
@pytest.mark.filterwarnings("error::graphfuse.GraphfuseWarning")
def test_leaves_alone_what_torch_func_transforms(transformed, inner):
    """And nothing of it behind, for what is compiled next."""
    w, x, y = torch.randn(20, 8), torch.randn(3, 8), torch.randint(20, (3,))
    x, y = (x, y) if transformed is TRANSFORMED["grad"] else (x[:, None], y[:, None])
    compiled = graphfuse.optimize(transformed, inner=inner)
    torch.testing.assert_close(compiled(w, x, y), transformed(w, x, y))
    notes = graphfuse.report(compiled).notes
    assert all(note.startswith("torch.func: expected no transform") for note in notes)
    assert len(notes) == (transformed is not TRANSFORMED["vmap"])  # of which the graph can be replayed
    other = graphfuse.optimize(lambda x: F.rms_norm(x, (8,)), inner=inner)
    other(torch.randn(2, 8, requires_grad=True)).sum().backward()
    assert graphfuse.report(other).counts == {"rms_norm": 1}
