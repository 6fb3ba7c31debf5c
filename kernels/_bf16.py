"""bfloat16 to float32, in as many instructions as there are numbers."""

from __future__ import annotations

from graphfuse.kernels._triton import HAS_PTX, tl, triton


@triton.jit
def tl_widen(x):
    """Return x in fp32.

    Two bfloat16 stand in one register: one is shifted up, of the other the rest is masked out. What LLVM makes of it
    takes the second out first. And a number that is only rounded to bfloat16 is converted beside another, which is what
    the GPU is fast at.
    """
    if HAS_PTX and x.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;",
            "=r,=r,r",
            [x],
            dtype=tl.float32,
            is_pure=True,
            pack=2,
        )
    else:
        return x.to(tl.float32)
