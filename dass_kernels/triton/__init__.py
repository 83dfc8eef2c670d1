"""Kernels for GPUs in Triton: column vectors (K3) and blocks (K4), forward and both gradients.

``panels`` lays the pattern out, ``heuristics`` chooses kernel and tiles, ``kernels`` holds the
Triton code, ``ops`` runs it behind ``torch.ops.dass`` for CUDA tensors. Importing this package does
not import triton; ``kernels`` and ``ops`` do, at the first call.
"""
