"""KV on CUDA devices: each operation is a folder with a kernel, a launcher that checks, and a plain reference.

A launcher runs its kernel on the caller's stream where the tensors lie on a CUDA device, and the reference where they
lie on the CPU: the same call, the same result. CuPy is imported when the first kernel is launched.
"""
