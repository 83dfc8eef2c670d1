"""Sparse convolution and matrix kernels as differentiable torch ops.

    packed = dass_kernels.pack(conv.weight, mask)
    y = dass_kernels.conv2d(x, packed, conv.bias, padding=1, activation="relu")

Knows nothing of networks or training: that is the package ``dass``.
"""

import torch  # noqa: F401  loads the libraries that _C links against

from . import _C  # isort: skip
from .build import active_isa, available_isas, build_info, set_isa
from .formats import Packed, build_pattern, choose_format, flat_index, pack
from .gpu import dense_reason, register
from .lanes import conv2d_lanes, from_lanes, register_lanes, to_lanes
from .ops import conv2d, conv2d_values, conv_spec, linear, linear_values, spmm
from .program import Program, emit_unavailable

__version__ = _C.__version__
__all__ = [
    "Packed",
    "Program",
    "active_isa",
    "available_isas",
    "build_info",
    "build_pattern",
    "choose_format",
    "conv2d",
    "conv2d_lanes",
    "conv2d_values",
    "conv_spec",
    "dense_reason",
    "emit_unavailable",
    "flat_index",
    "from_lanes",
    "linear",
    "linear_values",
    "pack",
    "register_lanes",
    "set_isa",
    "spmm",
    "to_lanes",
]

register()
active_isa()  # an unknown DASS_ISA is an error here, not at the first call
