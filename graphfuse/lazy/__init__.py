"""Logits that are computed when somebody reads them.

A language model returns its logits beside the loss, and hardly anybody looks at them. The compiled graph therefore
returns what they are made from, the hidden states, and this tensor in their place. It has the shape, dtype and
autograd history of the logits and takes no memory:

- rows can be chosen and reshaped; a cast, a scale, a soft cap or a softmax can follow, or another tensor be added or
  multiplied, lazy or not: still nothing is computed (`functions`, `joins`);
- a loss, log-probabilities, a divergence, an argmax over the vocabulary run over chunks of tokens, never over the whole
  (`losses`);
- their gradient is not computed either, unless a hook, `retain_grad` or `autograd.grad` asks for it (`gradients`);
- whatever else reads the values gets a plain tensor in its place, computed once, with its autograd history. From then
  on the lazy tensor is a name for that one, in-place changes included.

After weights or hidden states have changed in place, reading raises. torch does not count what is written through
`.data`: that goes unnoticed, here as in autograd.

Every such materialisation is counted, by the line that caused it: `materialised`.
"""

from __future__ import annotations

from graphfuse.lazy import comparisons, differentiation, functions, joins, losses  # noqa: F401  (they fill the table)
from graphfuse.lazy import pointwise as pointwise  # after the others: it adds to what they do with tensors
from graphfuse.lazy import stacks as stacks  # after `losses`: it adds to what reduces
from graphfuse.lazy.formula import Formula, Part, Step, apply_formula
from graphfuse.lazy.tensor import LazyLogits, Source, lazy, materialised

__all__ = ["Formula", "LazyLogits", "Part", "Source", "Step", "apply_formula", "lazy", "materialised"]
