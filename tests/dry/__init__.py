"""What a training step on a GPU takes, counted on a machine without one.

    python -m tests.dry llama-3-8b --variant inductor

The CUDA build of torch runs over a stand-in for the CUDA runtime: everything is compiled as for an H200, allocated and
launched, but kernels do nothing. So peak memory and the bytes that Triton's kernels are given are what they are on a
GPU; numbers and times are not. Peaks that were measured on an H200 (26.00, 12.18 and 14.31 GiB) come out as 26.00,
12.18 and 14.31.
"""
