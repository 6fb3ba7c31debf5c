"""Each computation, spelled by choices: what the property-based tests draw from, and how the choices become code.

A mutation is one mistake in the right formula; it makes another function of it, which is none of ours.
"""

import math

import torch
import torch.nn.functional as F

B, H, S, D, INNER, V = 2, 2, 6, 16, 12, 19
EPS = 1e-3
IGNORED = -100

SQUARE = {
    "pow": lambda x: x.pow(2),
    "**": lambda x: x**2,
    "product": lambda x: x * x,
    "square": torch.square,
    "float exponent": lambda x: torch.pow(x, 2.0),
}
MEAN = {
    "mean": lambda s: s.mean(-1, keepdim=True),
    "torch.mean": lambda s: torch.mean(s, dim=[-1], keepdim=True),
    "sum": lambda s: s.sum(-1, keepdim=True) / s.shape[-1],
    "times": lambda s: s.sum(dim=-1, keepdim=True) * (1 / s.shape[-1]),
    "unsqueezed": lambda s: s.mean(-1).unsqueeze(-1),
    "indexed": lambda s: s.mean(dim=-1)[..., None],
}
INVERT = {
    "rsqrt": lambda x, v: x * torch.rsqrt(v),
    "one over": lambda x, v: x * (1 / torch.sqrt(v)),
    "power": lambda x, v: x * v**-0.5,
    "divide": lambda x, v: x / v.sqrt(),
    "reciprocal": lambda x, v: v.sqrt().reciprocal() * x,
    "in place": lambda x, v: x * v.clone().rsqrt_(),
    "expanded": lambda x, v: v.pow(-0.5).expand_as(x) * x,
}
GAIN = {
    "none": lambda x, w: x,
    "weight": lambda x, w: x * w,
    "first": lambda x, w: w * x,
    "one plus": lambda x, w: (1 + w) * x,
    "plus one": lambda x, w: x * (w + 1.0),
    "viewed": lambda x, w: w.view(1, -1) * x,
}
LAYOUT = {
    "rows": lambda x: x,
    "flat": lambda x: x.reshape(-1, D),
    "transposed": lambda x: x.transpose(0, 1),
    "heads": lambda x: x.unsqueeze(2).expand(-1, -1, 2, -1).transpose(1, 2),
    "strided": lambda x: x[:, ::2],
}
CASTS = ("none", "all", "inside")  # to fp32 and back: never, around all, around all but the weight

RMS_NORM = {
    "square": SQUARE,
    "mean": MEAN,
    "invert": INVERT,
    "gain": GAIN,
    "layout": LAYOUT,
    "cast": CASTS,
}
RMS_NORM_MISTAKES = {
    "cubed": {"square": lambda x: x.abs() ** 3},
    "other dimension": {"mean": lambda s: s.mean(-2, keepdim=True)},
    "two dimensions": {"mean": lambda s: s.mean((-1, -2), keepdim=True)},
    "variance": {"mean": lambda s: s.mean(-1, keepdim=True) - s.mean(-1, keepdim=True).sqrt() * 0.1},
    "biased": {"mean": lambda s: s[..., 1:].mean(-1, keepdim=True)},
    "other root": {"invert": lambda x, v: x * v**-0.4},
    "root": {"invert": lambda x, v: x * v.sqrt()},
    "other numerator": {"invert": lambda x, v: x.flip(-1) * torch.rsqrt(v)},
    "eps of each row": {"invert": lambda x, v: x * torch.rsqrt(v + x[..., :1].abs())},
    "detached": {"mean": lambda s: s.detach().mean(-1, keepdim=True)},
    "dropped out": {"mean": lambda s: F.dropout(s, 0.5).mean(-1, keepdim=True)},
}


def rms_norm(choice):
    def fn(x, weight):
        h = choice["layout"](x)
        wide = h if choice["cast"] == "none" else h.float()
        y = choice["invert"](wide, choice["mean"](choice["square"](wide)) + EPS)
        if choice["cast"] == "inside":
            y = y.to(h.dtype)
        return choice["gain"](y, weight).to(h.dtype)

    return fn


CENTRE = {
    "mean": lambda x: x - x.mean(-1, keepdim=True),
    "sum": lambda x: x - x.sum(-1, keepdim=True) / x.shape[-1],
    "unsqueezed": lambda x: torch.sub(x, torch.mean(x, -1).unsqueeze(-1)),
    "keyword": lambda x: x.sub(x.mean(dim=-1, keepdim=True)),
}
VARIANCE = {
    **{
        f"{square} {mean}": (lambda x, c, s=s, m=m: m(s(c))) for square, s in SQUARE.items() for mean, m in MEAN.items()
    },
    "var": lambda x, c: x.var(-1, keepdim=True, unbiased=False),
    "correction": lambda x, c: torch.var(x, dim=-1, correction=0, keepdim=True),
    "var_mean": lambda x, c: torch.var_mean(x, -1, correction=0, keepdim=True)[0],
    "of the centred": lambda x, c: c.var(-1, keepdim=True, correction=0),
}
SHIFT = {
    "none": lambda x, b: x,
    "bias": lambda x, b: x + b,
    "first": lambda x, b: b + x,
    "viewed": lambda x, b: torch.add(x, b.view(1, -1)),
}
LAYER_NORM = {
    "centre": CENTRE,
    "variance": VARIANCE,
    "invert": INVERT,
    "gain": GAIN,
    "shift": SHIFT,
    "layout": LAYOUT,
    "cast": CASTS,
}
LAYER_NORM_MISTAKES = {
    "unbiased": {"variance": lambda x, c: x.var(-1, keepdim=True)},
    "other dimension": {"centre": lambda x: x - x.mean(-2, keepdim=True)},
    "mean added": {"centre": lambda x: x + x.mean(-1, keepdim=True)},
    "half the mean": {"centre": lambda x: x - 0.5 * x.mean(-1, keepdim=True)},
    "mean of some": {"centre": lambda x: x - x[..., 1:].mean(-1, keepdim=True)},
    "fourth moment": {"variance": lambda x, c: c.pow(4).mean(-1, keepdim=True)},
    "variance over rows": {"variance": lambda x, c: c.pow(2).mean(-2, keepdim=True)},
    "not centred": {"variance": lambda x, c: x.pow(2).mean(-1, keepdim=True)},
    "detached": {"variance": lambda x, c: c.detach().pow(2).mean(-1, keepdim=True)},
    "other root": {"invert": lambda x, v: x * v**-0.6},
}


def layer_norm(choice):
    def fn(x, weight, bias):
        h = choice["layout"](x)
        wide = h if choice["cast"] == "none" else h.float()
        centred = choice["centre"](wide)
        y = choice["invert"](centred, choice["variance"](wide, centred) + EPS)
        if choice["cast"] == "inside":
            y = y.to(h.dtype)
        return choice["shift"](choice["gain"](y, weight), bias).to(h.dtype)

    return fn


def signed_roll(x):
    half = x.shape[-1] // 2
    return torch.roll(x, half, -1) * torch.cat((-torch.ones(half), torch.ones(half))).to(x.dtype)


def turned(a, b):
    return torch.cat((-b, a), -1)


def paired(x):
    pairs = x.unflatten(-1, (-1, 2))
    return torch.stack((-pairs[..., 1], pairs[..., 0]), -1).reshape(x.shape)


TURN = {  # what the sine is multiplied by
    "chunk": lambda x: turned(*x.chunk(2, -1)),
    "slice": lambda x: torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), dim=-1),
    "split": lambda x: turned(*x.split(x.shape[-1] // 2, -1)),
    "unbind": lambda x: turned(*x.unflatten(-1, (2, -1)).unbind(-2)),
    "roll": signed_roll,
    "stack": lambda x: torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2),
    "pairs": paired,
}
PAIRED = ("stack", "pairs")
JOIN = {
    "sum": lambda x, t, cos, sin: x * cos + t * sin,
    "swapped": lambda x, t, cos, sin: (t * sin) + (x * cos),
    "tables first": lambda x, t, cos, sin: torch.add(cos * x, sin * t),
    "addcmul": lambda x, t, cos, sin: torch.addcmul(x * cos, t, sin),
    "other sign": lambda x, t, cos, sin: x * cos - t * sin,
    "in place": lambda x, t, cos, sin: (x * cos).add_(t * sin),
}
PART = {"all": None, "first": lambda x: (x[..., :8], x[..., 8:]), "narrow": lambda x: (x.narrow(-1, 0, 8), x[..., 8:])}
ROPE = {
    "turn": TURN,
    "join": JOIN,
    "part": PART,
    "seen": {"heads first": 1, "heads last": 2},
    "cast": ("none", "all"),
    "both": (False, True),
}
ROPE_MISTAKES = {
    "one sign wrong": {"turn": lambda x: torch.cat(x.chunk(2, -1)[::-1], -1)},
    "both signs": {"turn": lambda x: -torch.cat(x.chunk(2, -1)[::-1], -1)},
    "not swapped": {"turn": lambda x: torch.cat((-x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]), -1)},
    "turned back": {"turn": lambda x: x.flip(-1)},
    "rolled by one": {"turn": lambda x: x.roll(1, -1)},
    "one table": {"join": lambda x, t, cos, sin: x * cos + t * cos},
    "squared": {"join": lambda x, t, cos, sin: x * cos * cos + t * sin},
    "clamped": {"join": lambda x, t, cos, sin: x * cos + (t * sin).clamp(max=0.5)},
    "scaled": {"join": lambda x, t, cos, sin: x * cos + 2 * (t * sin).tanh()},
    "dropped out": {"join": lambda x, t, cos, sin: x * cos + F.dropout(t, 0.5) * sin},
}


def tables(pairs, width=D):
    """cos and sin for every feature, in halves or in pairs."""
    angles = torch.rand(B, S, width // 2) * 6
    angles = angles.repeat_interleave(2, -1) if pairs else torch.cat((angles, angles), -1)
    return angles.cos(), angles.sin()


def rope(choice):
    def rotate(x, cos, sin):
        rest = None
        if choice["part"] is not None:
            x, rest = choice["part"](x)
        wide = x if choice["cast"] == "none" else x.float()
        y = choice["join"](wide, choice["turn"](wide), cos, sin).to(x.dtype)
        return y if rest is None else torch.cat((y, rest), -1)

    def fn(q, k, cos, sin):
        cos, sin = cos.unsqueeze(choice["seen"]), sin.unsqueeze(choice["seen"])
        if choice["seen"] == 1:
            q, k = q.transpose(1, 2), k.transpose(1, 2)
        return (rotate(q, cos, sin), rotate(k, cos, sin)) if choice["both"] else (rotate(q, cos, sin), k * 2)

    return fn


ACTIVATION = {
    "silu": F.silu,
    "silu by hand": lambda z: z * torch.sigmoid(z),
    "silu by exp": lambda z: z / (1 + torch.exp(-z)),
    "gelu": F.gelu,
    "gelu by hand": lambda z: z * 0.5 * (1 + torch.erf(z / math.sqrt(2))),
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "quick gelu": lambda z: z * torch.sigmoid(1.702 * z),
    "relu": F.relu,
    "relu by clamp": lambda z: z.clamp(min=0),
    "relu2": lambda z: F.relu(z) ** 2,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}


def halves(p):
    return p[..., :INNER], p[..., INNER:]


PACKING = {
    "separate": None,
    "chunk": (torch.cat, lambda p: p.chunk(2, -1)),
    "split": (torch.cat, lambda p: p.split(INNER, dim=-1)),
    "slice": (torch.cat, halves),
    "narrow": (torch.cat, lambda p: (p.narrow(-1, 0, INNER), p.narrow(-1, INNER, INNER))),
    "view": (torch.cat, lambda p: p.view(*p.shape[:-1], 2, -1).unbind(-2)),
    "tensor_split": (torch.cat, lambda p: torch.tensor_split(p, 2, dim=-1)),
    "interleaved": (lambda ws: torch.stack(ws, 1).flatten(0, 1), lambda p: (p[..., ::2], p[..., 1::2])),
}
LINEAR = {
    "linear": F.linear,
    "matmul": lambda x, w: x @ w.t(),
    "einsum": lambda x, w: torch.einsum("bsd,od->bso", x, w),
    "flat": lambda x, w: torch.mm(x.reshape(-1, D), w.T).view(*x.shape[:-1], -1),
}
TIMES = {
    "act first": lambda a, b: a * b,
    "up first": lambda a, b: b * a,
    "mul": torch.mul,
    "in place": lambda a, b: a.clone().mul_(b),  # some activations save their result
}
LIMIT = {"none": lambda z: z, "clamp": lambda z: z.clamp(max=2.0)}
GLU = {
    "activation": ACTIVATION,
    "packing": PACKING,
    "linear": LINEAR,
    "times": TIMES,
    "limit": LIMIT,
    "cast": ("none", "all"),
}
GLU_MISTAKES = {
    "softplus": {"activation": F.softplus},
    "mish": {"activation": F.mish},
    "wrong gelu": {"activation": lambda z: z * 0.5 * (1 + torch.erf(z / 1.5))},
    "sine": {"activation": lambda z: z * torch.sin(z)},
    "elu": {"activation": F.elu},
    "softmax": {"activation": lambda z: z.softmax(-1)},
    "rounded": {"activation": lambda z: F.silu(z.round())},
    "doubled": {"activation": lambda z: 2 * torch.sigmoid(z)},
    "dropped out": {"activation": lambda z: F.dropout(F.silu(z), 0.5)},
    "squared up": {"times": lambda a, b: a * b.square()},
    "maximum": {"times": torch.maximum},
}


def glu(choice):
    def fn(x, gate, up):
        if choice["packing"] is None:
            a, b = choice["linear"](x, gate), choice["linear"](x, up)
        else:
            pack, take = choice["packing"]
            a, b = take(choice["linear"](x, pack((gate, up))))
        if choice["cast"] == "all":
            a, b = a.float(), b.float()
        return choice["times"](choice["activation"](choice["limit"](a)), b).to(x.dtype)

    return fn


MOVE = {  # logits and labels of the tokens that are compared
    "none": lambda z, y: (z, y),
    "slices": lambda z, y: (z[:, :-1], y[:, 1:]),
    "dots": lambda z, y: (z[..., :-1, :].contiguous(), y[..., 1:].contiguous()),
    "pad": lambda z, y: (z, F.pad(y, (0, 1), value=IGNORED)[..., 1:].contiguous()),
}
FINAL = {
    "none": lambda z: z,
    "scale": lambda z: z * 0.5,
    "divide": lambda z: z / 2.0,
    "softcap": lambda z: torch.tanh(z / 5.0) * 5.0,
}


def by_hand(z, y):
    nll = z.logsumexp(-1) - z.gather(-1, y.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    counted = y != IGNORED
    return (nll * counted).sum() / counted.sum()


LOSS = {
    "view": lambda z, y: F.cross_entropy(z.reshape(-1, V), y.reshape(-1)),
    "classes second": lambda z, y: F.cross_entropy(z.transpose(1, 2), y),
    "nll": lambda z, y: F.nll_loss(F.log_softmax(z, dim=-1).flatten(0, 1), y.flatten()),
    "sum": lambda z, y: F.cross_entropy(z.flatten(0, 1), y.flatten(), reduction="sum") / 7,
    "none": lambda z, y: F.cross_entropy(z.flatten(0, 1), y.flatten(), reduction="none").mean(),
    "smoothed": lambda z, y: F.cross_entropy(z.flatten(0, 1), y.flatten(), label_smoothing=0.1),
    "log of softmax": lambda z, y: F.nll_loss(z.softmax(-1).log().view(-1, V), y.reshape(-1)),
    "by hand": by_hand,
    "module": lambda z, y: torch.nn.CrossEntropyLoss()(z.reshape(-1, V), y.reshape(-1)),
}
LINEAR_CROSS_ENTROPY = {
    "linear": LINEAR,
    "final": FINAL,
    "move": MOVE,
    "loss": LOSS,
    "cast": ("none", "all"),
}
LINEAR_CROSS_ENTROPY_MISTAKES = {
    "probabilities": {
        "loss": lambda z, y: F.cross_entropy(z.flatten(0, 1), F.one_hot(y.flatten().clamp(min=0), V) * 0.9)
    },
    "other softmax": {"loss": lambda z, y: F.nll_loss(z.log_softmax(1).flatten(0, 1), y.flatten())},
    "sigmoid": {"loss": lambda z, y: F.nll_loss(F.logsigmoid(z).flatten(0, 1), y.flatten())},
    "margin": {"loss": lambda z, y: F.multi_margin_loss(z.flatten(0, 1), y.flatten().clamp(min=0))},
    "clamped": {"final": lambda z: z.clamp(max=0.5)},
    "cubed": {"final": lambda z: z**3},
    "dropped out": {"final": lambda z: F.dropout(z, 0.5)},
    "per token": {"final": lambda z: z / z.detach().abs().amax(-1, keepdim=True)},
    "focal": {"loss": lambda z, y: (z.log_softmax(-1) * z.softmax(-1)).sum(-1).mean() + 0 * y.sum()},
}


def linear_cross_entropy(choice):
    def fn(x, weight, labels):
        z = choice["linear"](x, weight)
        z, y = choice["move"](choice["final"](z.float() if choice["cast"] == "all" else z), labels)
        return choice["loss"](z, y)

    return fn
