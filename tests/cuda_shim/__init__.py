"""csrc/cuda without a GPU: emulation on the processor, and what nvcc says of each kernel.

    python -m cuda_shim.gates      (from tests/) prints the table of both

``include/`` stands in for CUDA's headers, so that g++ compiles the very sources that nvcc does; a
fiber runs per thread. What this cannot show: time, and races that no order of fibers brings out.
"""
