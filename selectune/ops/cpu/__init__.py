"""The ops on the CPU, by numba.

kernels      tensors in, tensors out
loops        the weight gradient at its support
passes       one-pass loops over a tensor or a vector
bounded      tensors in, tensors out, for bounds on a gradient; bound_loops: its loops
vectors      intrinsics: addresses, an atomic counter, a transpose in registers
compiled     loops are compiled at first use and cached on disk
threads      a loop runs on torch's own threads
"""
