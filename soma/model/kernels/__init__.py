"""GPU kernels in Triton: attention for training and for the paged cache, and the small fused steps of inference.

Nothing here is imported without a GPU (or `TRITON_INTERPRET=1`, under which the tests run the same kernels on the CPU).
"""
