"""What every case needs: its name in the list, a model, and one process over the whole batch to agree with."""

import contextlib
import copy
import io
import os

import torch
import transformers
from torch import distributed, nn
from torch.nn import functional

import graphfuse
from tests.tiny import TINY, assert_close

OPTIONS = {"inner": "aot_eager", "strict": True}
WORLD = 2
TOKENS = torch.randint(3, 300, (4, 16), generator=torch.Generator().manual_seed(1))
LLAMA = {"rms_norm": 3, "rope": 2, "glu": 1}  # of one layer, with the last norm
HANDWRITTEN = {"rms_norm": 3, "glu": 2}
HEAD = {"linear_cross_entropy": 1, "lazy_logits": 1}

CASES = {}


def case(run):
    CASES[run.__name__] = run
    return run


def llama(**settings):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**TINY, "num_hidden_layers": 1, "use_cache": False, **settings})
    return transformers.LlamaForCausalLM(config).train()


class Block(nn.Module):
    def __init__(self, hidden, features):
        super().__init__()
        self.norm = nn.RMSNorm(hidden)
        self.gate = nn.Linear(hidden, features, bias=False)
        self.up = nn.Linear(hidden, features, bias=False)
        self.down = nn.Linear(features, hidden, bias=False)

    def forward(self, x):
        y = self.norm(x)
        return x + self.down(functional.silu(self.gate(y)) * self.up(y))


class Body(nn.Module):
    """Where the loop is: Dynamo gives a frame up if FSDP's hooks interrupt a loop in it."""

    def __init__(self, hidden, features):
        super().__init__()
        self.embed = nn.Embedding(320, hidden)
        self.layers = nn.ModuleList([Block(hidden, features) for _ in range(2)])

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return x


class Handwritten(nn.Module):
    """Nobody's architecture: returns its loss and its logits."""

    def __init__(self, hidden=48, features=64):
        super().__init__()
        torch.manual_seed(0)
        self.model = Body(hidden, features)
        self.scale = nn.Parameter(torch.rand(hidden))
        self.head = nn.Linear(hidden, 320, bias=False)

    def forward(self, tokens):
        x = self.model(tokens)
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * self.scale
        logits = self.head(x)
        return functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()), logits


def call(model, tokens):
    """The loss and the logits."""
    if any(isinstance(module, Handwritten) for module in model.modules()):
        return model(tokens)
    out = model(input_ids=tokens, labels=tokens)
    return out.loss, out.logits


def whole(tensor):
    """A plain copy of a tensor, whose parts may be on several processes."""
    tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return tensor.detach().clone()


def step(model, tokens, read=None):
    """Loss, logits and all gradients of a batch; `read` says when the logits are read."""
    loss, logits = call(model, tokens)
    found = {"loss": whole(loss)}
    if read == "before":
        found["logits"] = whole(logits.float())
    loss.backward()
    if read == "after":
        found["logits"] = whole(logits.float())
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            plain = name.replace("_orig_mod.", "").removeprefix("module.")
            found[plain.replace("_orig_mod.", "")] = whole(parameter.grad)
    return found


def agrees(model, wrap, *, tokens=None, read="before", steps=2, check=assert_close):
    """Training what `wrap` makes of the model does what one process does with the whole batch.

    Every process takes its share of it, or all of it where `tokens` says so.
    """
    alone = copy.deepcopy(model)
    wrapped = wrap(model)
    rank, share = distributed.get_rank(), len(TOKENS) // WORLD
    mine = slice(rank * share, (rank + 1) * share) if tokens is None else slice(None)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (alone, wrapped)]
    for _ in range(steps):
        expected = step(alone, TOKENS, read)
        found = step(wrapped, TOKENS[mine], read)
        if tokens is None:
            distributed.all_reduce(found["loss"])
            found["loss"] /= WORLD
        if "logits" in expected:
            expected["logits"] = expected["logits"][mine]
        check(found, expected)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return wrapped


def assert_rewritten(model, expected):
    """Whether there is a causal mask to drop depends on the version of transformers."""
    report = graphfuse.report(model)
    assert {name: n for name, n in report.counts.items() if name != "causal_attention"} == expected, report


@case
def torchrun_says_one_line_for_all_processes():
    assert os.environ["WORLD_SIZE"] == str(WORLD)
    with contextlib.redirect_stderr(io.StringIO()) as said:
        graphfuse.optimize(Handwritten(), **OPTIONS)(TOKENS)
    lines = [line for line in said.getvalue().splitlines() if line.startswith("graphfuse: 7 sites rewritten")]
    assert len(lines) == (distributed.get_rank() == 0), said.getvalue()
