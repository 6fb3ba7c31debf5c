"""What the kernels over logits share: the numbers of a row, and the gradient of some of its logits.

The formulas are those of `_softmax_grad.py`. Every function is one of the device, inlined where it is called; a pointer
that is None is an option that is off.
"""
# Shape letters: V = classes (vocabulary).

from __future__ import annotations

from graphfuse.kernels._triton import HAS_PTX, tl, triton

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def tl_exp2(x):
    """Return 2 ** x, or 0 where that is below 1.2e-38, beside sums of at least 1.

    Whole numbers of the smallest float, which `tl.exp2` still tells apart, take it as many instructions as all else.
    """
    if HAS_PTX:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.exp2(x)


@triton.jit
def tl_exp(x):
    """Return exp(x), with the same care for small numbers."""
    if HAS_PTX:
        return tl_exp2(x * LOG2_E)
    else:
        return tl.exp(x)


@triton.jit
def tl_reciprocal(x):
    """Return 1 / x, to a unit in the last place, of numbers that are no smaller than 1."""
    if HAS_PTX:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / x


@triton.jit
def tl_tanh(u):
    """Return tanh(u) to 2e-7 of itself, from exp alone: able to run in the interpreter."""
    square = u * u
    series = square * (0.1333333333 + square * (-0.0539682540 + square * 0.0218694885))
    series = u * (1.0 + square * -0.3333333333 + square * series)
    size = 1.0 - 2.0 * tl_reciprocal(1.0 + tl_exp(2.0 * tl.abs(u)))
    return tl.where(tl.abs(u) < 0.3, series, tl.where(u < 0.0, -size, size))


@triton.jit
def tl_load_or_zero(ptr, row):
    """Return the number of a row, 0 where the tensor is None."""
    number = 0.0
    if ptr is not None:
        number = tl.load(ptr + row)
    return number


@triton.jit
def tl_bend(a, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, IS_NARROW: tl.constexpr):
    """Return z of a logit, and tanh of what is scaled and divided by the soft cap, 0 without one."""
    z = a * SCALE
    bent = 0.0
    if SOFTCAP != 0.0:
        if IS_NARROW and SOFTCAP <= 1000.0:
            # To 1e-7 of 1, not of itself: as z is, an exponent, that is enough. A third of the instructions.
            DOUBLED: tl.constexpr = 2.0 * LOG2_E * SCALE / SOFTCAP
            bent = 1.0 - 2.0 * tl_reciprocal(1.0 + tl_exp2(a * DOUBLED))
        else:
            INVERSE: tl.constexpr = 1.0 / SOFTCAP
            bent = tl_tanh(z * INVERSE)
        z = SOFTCAP * bent
    return z, bent


@triton.jit
def tl_vector_start(start, VECTOR: tl.constexpr, IS_ALIGNED: tl.constexpr):
    """Return where the vector begins that has the element `start` in it, and how many elements of it are before."""
    base = start
    if IS_ALIGNED:
        base = start // VECTOR * VECTOR
    return base, (start - base).to(tl.int32)


@triton.jit
def tl_weight_sum(weight_sum_ptr, V):
    """Return the sum of the class weights, the number of classes if the tensor is None."""
    weight_sum = V * 1.0
    if weight_sum_ptr is not None:
        weight_sum = tl.load(weight_sum_ptr)
    return weight_sum


@triton.jit
def tl_skip_losses(row, nll_ptr, smooth_ptr, lse_ptr):
    """Write 0 where a tensor is not None."""
    if nll_ptr is not None:
        tl.store(nll_ptr + row, 0.0)
    if smooth_ptr is not None:
        tl.store(smooth_ptr + row, 0.0)
    if lse_ptr is not None:
        tl.store(lse_ptr + row, 0.0)


@triton.jit
def tl_scan(
    logits_ptr,
    base,  # of a row whose first logit is `before` elements behind it
    start,
    before,
    tops,
    totals,
    spreads,
    pivot,
    class_weight_ptr,
    V,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
    IS_SMOOTHED: tl.constexpr,
    EVICTION: tl.constexpr,
    IS_MASKED: tl.constexpr,
):
    """Return what the lanes have read so far, and a vector each."""
    firsts = tl.arange(0, LANES)[:, None] * VECTOR
    places = start + firsts + tl.arange(0, VECTOR)[None, :]
    cols = places - before
    IS_NARROW: tl.constexpr = logits_ptr.dtype.element_ty.primitive_bitwidth == 16
    if IS_MASKED:
        is_class = (cols >= 0) & (cols < V)
        # Whole vectors, or none: what they hold of other rows is not used, and no allocation ends inside of one.
        is_read = is_class
        if IS_ALIGNED:
            is_read = start + firsts < V + before
        z = tl.load(logits_ptr + base + places, mask=is_read, other=0.0, eviction_policy=EVICTION).to(tl.float32)
        z, _ = tl_bend(tl.where(is_class, z, 0.0), SCALE, SOFTCAP, IS_NARROW)
    else:
        a = tl.load(logits_ptr + base + places, eviction_policy=EVICTION).to(tl.float32)
        z, _ = tl_bend(a, SCALE, SOFTCAP, IS_NARROW)
    if IS_SMOOTHED:
        distance = z - pivot
        if class_weight_ptr is not None:
            distance *= tl.load(class_weight_ptr + cols, mask=(cols >= 0) & (cols < V), other=0.0)
        if IS_MASKED:
            distance = tl.where(is_class, distance, 0.0)
        spreads += tl.sum(distance, 1)
    if IS_MASKED:
        z = tl.where(is_class, z, float("-inf"))
    new_tops = tl.maximum(tops, tl.max(z, 1))
    shifts = tl.where(new_tops == float("-inf"), 0.0, new_tops)
    totals = totals * tl_exp(tops - shifts) + tl.sum(tl_exp(z - shifts[:, None]), 1)
    return new_tops, totals, spreads


@triton.jit
def tl_losses(
    logits_ptr,  # [N, V], row stride L
    row,
    target,
    class_weight_ptr,
    weight_sum,
    nll_ptr,
    smooth_ptr,
    lse_ptr,
    V,
    L,
    NO_TARGET: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,  # logits in a load of a lane
    IS_ALIGNED: tl.constexpr,  # whether logits_ptr is a multiple of such a load
    EVICTION: tl.constexpr,
):
    """Write the numbers of a row; return its largest logit, and the sum of the exponentials relative to that.

    Each lane keeps these numbers of what it has read itself, and they meet once, at the end of the row: lanes that
    have to wait for each other all the way do not keep memory busy.
    """
    # A target outside the classes reads nothing and makes NaN of what depends on it.
    has_target = target != NO_TARGET
    inside = (target >= 0) & (target < V)
    at_target = tl.load(logits_ptr + row * L + tl.where(inside, target, 0)).to(tl.float32)
    at_target, _ = tl_bend(at_target, SCALE, SOFTCAP, logits_ptr.dtype.element_ty.primitive_bitwidth == 16)
    # Sums over all classes are taken relative to one logit, so that a large common offset costs no digits.
    pivot = tl.where(at_target > float("-inf"), at_target, 0.0)

    tops = tl.full((LANES,), float("-inf"), tl.float32)
    totals = tl.zeros((LANES,), tl.float32)
    spreads = tl.zeros((LANES,), tl.float32)  # sum_c w_c * (z_c - pivot)
    base, before = tl_vector_start(row * L, VECTOR, IS_ALIGNED)
    STEP: tl.constexpr = LANES * VECTOR
    whole = (V + before) // STEP * STEP
    # Most of a row takes no mask, which would be a third of the instructions; its ends do.
    for start in tl.range(STEP, whole, STEP):
        tops, totals, spreads = tl_scan(
            logits_ptr, base, start, before, tops, totals, spreads, pivot, class_weight_ptr, V,
            SCALE, SOFTCAP, LANES, VECTOR, IS_ALIGNED, smooth_ptr is not None, EVICTION, False,
        )  # fmt: skip
    for start in tl.range(0, V + before, tl.maximum(whole, STEP)):
        tops, totals, spreads = tl_scan(
            logits_ptr, base, start, before, tops, totals, spreads, pivot, class_weight_ptr, V,
            SCALE, SOFTCAP, LANES, VECTOR, IS_ALIGNED, smooth_ptr is not None, EVICTION, True,
        )  # fmt: skip

    top = tl.max(tops)
    total = tl.sum(totals * tl_exp(tops - tl.where(top == float("-inf"), 0.0, top)))
    spread = tl.sum(spreads)
    # Shifted form: log(total) - (at_target - top), never (top + log(total)) - at_target.
    log_total = tl.log(total)
    if nll_ptr is not None:
        nll = log_total - (at_target - top)
        tl.store(nll_ptr + row, tl.where(has_target, tl.where(inside, nll, float("nan")), 0.0))
    if smooth_ptr is not None:
        tl.store(smooth_ptr + row, weight_sum * (log_total + (top - pivot)) - spread)
    if lse_ptr is not None:
        tl.store(lse_ptr + row, top + log_total)
    return top, total


@triton.jit
def tl_on_target(on_target, target, V, NO_TARGET: tl.constexpr):
    """Return what nll is multiplied by: 0 without a target, NaN for one outside the classes."""
    on_target = tl.where(target != NO_TARGET, on_target, 0.0)
    inside = (target >= 0) & (target < V)
    return tl.where(inside | (on_target == 0.0), on_target, float("nan"))


@triton.jit
def tl_gradient(
    a,
    cols,
    on_target,  # what is subtracted: 0 of all classes but the target
    top,
    p_factor,
    smooth,
    class_weight_ptr,
    V,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    IS_NARROW: tl.constexpr,  # whether logits are of two bytes
    IS_SMOOTHED: tl.constexpr,
):
    """Return the gradient of some logits; the factors are multiplied by SCALE."""
    z, bent = tl_bend(a, SCALE, SOFTCAP, IS_NARROW)
    grad = tl_exp(z - top) * p_factor
    if IS_SMOOTHED:
        uniform = smooth
        if class_weight_ptr is not None:
            uniform *= tl.load(class_weight_ptr + cols, mask=(cols >= 0) & (cols < V), other=0.0)
        grad -= uniform
    grad -= on_target
    if SOFTCAP != 0.0:
        grad *= 1.0 - bent * bent
    return grad
