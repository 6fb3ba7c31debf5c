"""Handing a graph on to the backend that compiles it."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import operator
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import fx
from torch._dynamo.utils import dynamo_timed
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import CheckpointPolicy

from graphfuse.ahead import compile_ahead
from graphfuse.config import Config
from graphfuse.early import count_early
from graphfuse.overwrite import name_of, overwrite
from graphfuse.pairs import pair
from graphfuse.sums import add_up_products


@dynamo_timed("graphfuse.inner")
def compile_inner(graph_module: fx.GraphModule, example_inputs: Sequence[Any], config: Config) -> Callable[..., Any]:
    """Compile with the inner backend of `config`."""
    if config.inner == "inductor":
        from torch._inductor.compile_fx import compile_fx

        _shorten_messages()
        _call_directly()
        patches = dict(config.inner_options)
        if config.mode is not None and config.mode != "default":
            patches = {**torch._inductor.list_mode_options(config.mode), **patches}
        inductor = torch._inductor.config
        patches["joint_custom_pre_pass"] = JointPass(config.memory, inductor.joint_custom_pre_pass)
        # A captured backward does not write over what a captured forward left for it.
        patches["post_grad_custom_post_pass"] = PostGradPass(not config.captures, inductor.post_grad_custom_post_pass)
        patches.setdefault("reorder_for_peak_memory", inductor.reorder_for_peak_memory)  # set back after the pass
        with torch._functorch.config.patch(PARTITIONER[config.memory]), _decompositions():
            compiled: Any = compile_fx(graph_module, example_inputs, config_patches=patches)
    else:
        compiled = torch._dynamo.lookup_backend(config.inner)(graph_module, list(example_inputs))
    result: Callable[..., Any] = compiled
    return result


@contextlib.contextmanager
def _decompositions() -> Iterator[None]:
    """Inductor's, but that the gradient of embeddings in half precision on a GPU stays one op.

    In Inductor's own table: with one that is handed to it, AOTAutograd's cache is not used.
    """
    from torch._inductor.decomposition import select_decomp_table

    embedding_backward = torch.ops.aten.embedding_dense_backward.default
    table = select_decomp_table()
    inductors = table[embedding_backward]

    def decompose(grad: torch.Tensor, *others: Any) -> Any:
        op = torch.ops.graphfuse.embedding_backward.default if _is_summed_in_order(grad) else inductors
        return op(grad, *others)

    with mock.patch.dict(table, {embedding_backward: decompose}):
        yield


def _is_summed_in_order(grad: torch.Tensor) -> bool:
    """Whether tokens are sorted, so that no table in fp32 is needed."""
    return grad.is_cuda and grad.dtype in (torch.float16, torch.bfloat16)


def _shorten_messages() -> None:
    """Have Inductor's messages name the operands of an op, not what they were made of.

    It writes an operand with all that it was made of, except where it generates a loop, and with that many times over
    what several ops read. A model whose layers are nothing but matrix products, attention and graphfuse's ops is
    written 17 times as long for each layer more: and torch 2.11 writes the operands of any op that it has no lowering
    for, at its first use, whether somebody logs them or not. Four layers would compile for half an hour.
    """
    from torch._inductor import exc, ir

    def operator_str(target: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> str:
        named = {**{f"args[{i}]": arg for i, arg in enumerate(args)}, **kwargs}
        named = tree_map_only(ir.IRNode, lambda node: type(node).__name__, named)
        return "\n".join([f"  target: {target}", *(f"    {name}: {operand}" for name, operand in named.items())])

    exc.OperatorIssue.operator_str = staticmethod(operator_str)  # type: ignore[method-assign]


@functools.cache
def _call_directly() -> None:
    """Have code that Inductor generates call what graphfuse's ops do, past the dispatcher.

    That and autograd's part of it, which has nothing to do there, take as long as the rest of a call. Where kernels are
    small, the host is what a step waits for.
    """
    from torch._inductor import ir
    from torch._inductor.virtualized import V

    codegen = ir.FallbackKernel.codegen

    def codegen_directly(kernel: Any, wrapper: Any) -> None:
        op = kernel.op_overload
        if isinstance(op, torch._ops.OpOverload) and op.namespace == "graphfuse" and not V.graph.cpp_wrapper:
            # A function does not know the defaults of a schema, nor the names in it.
            is_whole = not kernel.kwargs and len(kernel.codegen_args()) == len(op._schema.arguments)
            name = op._schema.name.removeprefix("graphfuse::")
            if is_whole and hasattr(torch.ops.graphfuse.direct, name):
                kernel.python_kernel_name = f"torch.ops.graphfuse.direct.{name}"
        codegen(kernel, wrapper)

    ir.FallbackKernel.codegen = codegen_directly  # type: ignore[assignment, method-assign]


# What AOTAutograd's partitioner may compute again in backward, beside the ops below. It never recomputes a matrix
# product or an attention for it.
PARTITIONER: dict[str, dict[str, bool]] = {
    "speed": {},
    "balanced": {"ban_recompute_materialized_backward": False},
    "min": {"ban_recompute_materialized_backward": False, "aggressive_recomputation": True},
}

# Their results are gradients: a checkpoint that runs them again in backward pays for all their products twice.
RUN_ONCE = {"graphfuse::linear_cross_entropy"}

# Attention by any kernel: as dear as a matrix product, though the partitioner does not know it of every one.
ATTENTION = (
    "aten::_scaled_dot_product_",
    "graphfuse::attention",
    "graphfuse::causal_attention",
    "graphfuse::is_lower_triangle",
)

# One pass over what is saved anyway: cheaper to run again than to keep for backward. The partitioner knows only
# torch's own ops and would save their results.
RECOMPUTED = {f"graphfuse::{name}" for name in ("rms_norm", "layer_norm", "rope", "norm_rope", "glu", "packed_glu")}

# What only rearranges: read again through it, a value is the same.
VIEWS = {"aten::view", "aten::reshape", "aten::t", "aten::permute", "aten::transpose", "aten::_unsafe_view"}


class Pass(CustomGraphPass):
    """A pass of graphfuse's between Inductor's, which keys the caches below.

    The caches of Inductor and AOTAutograd do not look into an op: without graphfuse's own sources in their key, an
    edited backward would be served from before the edit. Passes that the user has set in the same place still run.
    """

    key = ""

    def __init__(self, user_passes: Any = None) -> None:
        several = isinstance(user_passes, (list, tuple))
        self.user_passes = [p for p in (user_passes if several else [user_passes]) if p is not None]

    def __call__(self, graph: fx.Graph) -> None:
        for user_pass in self.user_passes:
            user_pass(graph)
        self.change(graph)

    def change(self, graph: fx.Graph) -> None:
        """What the pass does."""
        raise NotImplementedError

    def uuid(self) -> Any:
        theirs = [p.uuid() if isinstance(p, CustomGraphPass) else None for p in self.user_passes]
        if None in theirs:
            return None  # a pass that cannot be cached: then neither can this one
        return ("graphfuse", source_digest(), self.key, *theirs)


class PostGradPass(Pass):
    """Rotates queries and keys in one launch; has backward add up products, and write over what only it still reads."""

    def __init__(self, overwrites: bool, user_passes: Any = None) -> None:
        super().__init__(user_passes)
        self.overwrites = overwrites
        self.key = f"overwrites {overwrites}"

    def change(self, graph: fx.Graph) -> None:
        pair(graph)
        if not (torch._inductor.config.max_autotune or torch._inductor.config.max_autotune_gemm):
            add_up_products(graph)  # Inductor times kernels for a product only where it sees one
        if self.overwrites and overwrite(graph):
            # It takes an input that is written over for freed then, and puts off what reads it last.
            torch._inductor.config.reorder_for_peak_memory = False
        compile_ahead(graph)


class JointPass(Pass):
    """Says which ops of graphfuse run once and which again in backward."""

    def __init__(self, memory: str = "balanced", user_passes: Any = None) -> None:
        super().__init__(user_passes)
        self.memory = self.key = memory

    def change(self, graph: fx.Graph) -> None:
        count_early(graph)
        if self.memory != "speed":
            for node in graph.find_nodes(op="call_function", target=torch.ops.graphfuse.add_rms_norm.default):
                normalize_again(graph, node)
        for node in graph.nodes:
            policy = self._policy(node)
            if policy is None:
                continue
            results = [user for user in node.users if user.target is operator.getitem]
            for value in (node, *results):
                value.meta["recompute"] = policy

    def _policy(self, node: fx.Node) -> CheckpointPolicy | None:
        """What the partitioner is told of a node, where it would not know."""
        name = name_of(node)
        if name in RUN_ONCE:
            return CheckpointPolicy.MUST_SAVE
        if "recompute" in node.meta or node.meta.get("partitioner_tag") == "is_backward":
            return None  # a checkpoint of the user's has decided
        if name.startswith(ATTENTION):
            return CheckpointPolicy.MUST_SAVE if self.memory == "min" else None
        if self.memory == "speed" or name not in RECOMPUTED:
            return None
        # A rotation's backward does not read what was rotated: it is run again only if that is there in backward.
        is_free = name != "graphfuse::rope" or _is_recomputed(node.args[0])
        return CheckpointPolicy.MUST_RECOMPUTE if is_free else None


def _is_recomputed(node: Any) -> bool:
    """Whether the value is, but for views, the result of an op that is run again in backward."""
    while isinstance(node, fx.Node) and (name_of(node) in VIEWS or node.target is operator.getitem):
        node = node.args[0]
    return isinstance(node, fx.Node) and name_of(node) in RECOMPUTED


def normalize_again(graph: fx.Graph, node: fx.Node) -> None:
    """Let backward read the norm of a total that it has anyway, not the result of `add_rms_norm`, kept for it."""
    results = {user.args[1]: user for user in node.users if user.target is operator.getitem}
    if len(results) < 2:
        return
    _, _, weight, *options, _, out_dtype = node.args
    with graph.inserting_after(max(results.values())):
        args = (results[0], weight, *options, out_dtype)
        again = graph.call_function(torch.ops.graphfuse.rms_norm.default, args)
    again.meta.update(results[1].meta)
    _read_in_backward(graph, results[1], again)
    if not again.users:
        graph.erase_node(again)


def _read_in_backward(graph: fx.Graph, node: fx.Node, again: fx.Node) -> None:
    """Give the readers of a node that belong to backward another one, also through views."""
    for user in list(node.users):
        if user is again:
            continue
        if user.meta.get("partitioner_tag") == "is_backward":
            user.replace_input_with(node, again)
        elif name_of(user) in VIEWS:
            with graph.inserting_after(user):
                view = graph.create_node(user.op, user.target, (again, *user.args[1:]), user.kwargs)
            view.meta.update(user.meta)
            _read_in_backward(graph, user, view)
            if not view.users:
                graph.erase_node(view)


@functools.cache
def source_digest() -> str:
    """SHA-256 over every Python file of the installed package."""
    digest = hashlib.sha256()
    root = Path(__file__).parent
    for path in sorted({*root.glob("*.py"), *root.glob("*/*.py")}):
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()
