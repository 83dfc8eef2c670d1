"""The CUDA side of the ops without a GPU: what is chosen and why, and tracing with fake tensors.

A fake ``cuda:0`` tensor has a shape and a device and no memory, so layers can be traced for a GPU
on a machine that has none. torch's CPU build cannot build an autograd graph on one, so these are
without gradients.
"""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import dass
import dass_kernels as dk
from dass_kernels import gpu, testing
from dass_kernels.triton import autotune, heuristics
from dass_kernels.triton.heuristics import Tiles, choose
from dass_kernels.triton.panels import block_depth, build_panels, build_transposed, read_rows

HAS_TRITON = torch._C._dispatch_has_kernel_for_dispatch_key("dass::conv2d", "CUDA")
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
GPU = torch.device("cuda:0")


def rows_of(mask, format="auto", groups=1):
    return read_rows(dk.pack(torch.ones(mask.shape), mask, format, groups).pattern)


def block_mask(shape, height, depth, density, seed=0):
    """Blocks of ``height`` outputs and ``depth`` channels, each at one tap."""
    outputs, channels, *kernel = shape
    coarse = testing.random_mask(
        (outputs // height, channels // depth, *kernel), density, seed=seed
    )
    return coarse.repeat_interleave(height, 0).repeat_interleave(depth, 1)


def tall_mask(shape, height, density, seed=0):
    """Column vectors of ``height`` outputs that lie anywhere: rows are shuffled."""
    coarse = testing.random_mask((shape[0] // height, *shape[1:]), density, seed=seed)
    mask = coarse.repeat_interleave(height, 0)
    return mask[torch.randperm(shape[0], generator=testing.generator(seed))]


def kept_by(panels, rows):
    """Every (output, channel * taps + tap, place in values) that the panels visit."""
    found = []
    per_panel = panels.height // panels.block
    for panel in range(panels.count):
        for at in range(int(panels.ptr[panel]), int(panels.ptr[panel + 1])):
            column, entry = int(panels.columns[at]), int(panels.entry[at])
            assert int(panels.owner[at // panels.depth]) == panel
            for j in range(panel * per_panel, (panel + 1) * per_panel):
                for r in range(panels.block):
                    output = int(panels.rows[j]) + r
                    if column >= 0 and output < rows.outputs:
                        place = (int(panels.first[j]) + entry) * panels.block + r
                        found.append((output, column, place))
    return sorted(found)


def expected(packed):
    """The same from ``flat`` and ``perm``, which the CPU kernels are tested with."""
    columns = packed.shape[1:].numel()
    per_group, found = packed.shape[0] // packed.groups, []
    for place in packed.perm.tolist():
        output, column = divmod(int(packed.flat[place]), columns)
        found.append((output, column + output // per_group * columns, place))
    return sorted(found)


CASES = [
    ((20, 5, 3, 3), "4x1", 1, 16, 16),
    ((37, 19), "16x1", 1, 32, 16),
    ((33, 7), "csr", 1, 16, 16),
    ((32, 6, 1, 3), "8x1", 2, 16, 32),
]


@pytest.mark.parametrize(("shape", "format", "groups", "height", "depth"), CASES)
@pytest.mark.parametrize("density", [0, 0.3, 1])
def test_panels_hold_every_kept_weight_once(shape, format, groups, height, depth, density):
    mask = testing.random_mask(shape, density, format)
    packed = dk.pack(torch.ones(shape), mask, format, groups)
    rows = read_rows(packed.pattern)
    panels = build_panels(rows, height, depth, blocked=False)
    assert kept_by(panels, rows) == expected(packed)
    steps = build_transposed(rows, panels, 16)
    found = []
    for tile in range(steps.count):
        for step in range(int(steps.ptr[tile]), int(steps.ptr[tile + 1])):
            panel, tap = int(steps.panel[step]), int(steps.tap[step])
            for lane in range(16):
                entry = int(steps.entry[step * 16 + lane])
                if entry < 0:
                    continue
                column = int(steps.channels[tile * 16 + lane]) * rows.taps + tap
                per_panel = height // panels.block
                for j in range(panel * per_panel, (panel + 1) * per_panel):
                    for r in range(panels.block):
                        output = int(panels.rows[j]) + r
                        if output < rows.outputs:
                            place = (int(panels.first[j]) + entry) * panels.block + r
                            found.append((output, column, place))
    assert sorted(found) == expected(packed)


def test_steps_of_blocks_stay_at_one_tap_in_neighbouring_channels():
    mask = block_mask((64, 64, 3, 3), 32, 32, 0.4)
    rows = rows_of(mask)
    assert block_depth(rows) == 32
    panels = build_panels(rows, 32, 32, blocked=True)
    channel, tap = panels.columns.view(-1, 32) // 9, panels.columns.view(-1, 32) % 9
    assert bool((tap == tap[:, :1]).all())
    assert bool((channel == channel[:, :1] + torch.arange(32)).all())
    assert bool((channel[:, 0] % 32 == 0).all())
    packed = dk.pack(torch.ones(mask.shape), mask)
    assert kept_by(panels, rows) == expected(packed)
    mask[:, 5, 1, 1] = False  # one channel short: not made of blocks any more
    assert block_depth(rows_of(mask)) == 0


def test_rows_that_share_their_columns_make_tall_panels_wherever_they_lie():
    rows = rows_of(tall_mask((128, 64), 64, 0.25))
    choice = choose(rows, torch.float16, "sm_90")
    assert (choice.kernel, choice.tiles.height) == ("column_vectors", 64)
    assert choose(rows, torch.float16, "sm_80").tiles.height == 32
    blocks = choose(rows_of(block_mask((64, 64, 3, 3), 32, 32, 0.25)), torch.float16, "sm_80")
    assert (blocks.kernel, blocks.tiles.depth) == ("blocks", 32)


@pytest.mark.parametrize(
    ("mask", "dtype", "arch", "groups", "says"),
    [
        (testing.random_mask((64, 64), 0.6, "16x1"), torch.float16, None, 1, "at most 50%"),
        (testing.random_mask((64, 64), 0.2, "csr"), torch.float16, None, 1, "share their inputs"),
        (testing.random_mask((64, 64), 0.2, "16x1"), torch.float64, None, 1, "for float64"),
        (testing.random_mask((64, 3, 3, 3), 0.2, "16x1"), torch.float16, None, 1, "only 3 inputs"),
        (testing.random_mask((64, 8, 3, 3), 0.2, "16x1"), torch.float16, None, 4, "16 outputs"),
        # by exact architecture, not "9.0 or newer"
        (testing.random_mask((64, 64), 0.2, "16x1"), torch.float16, "sm_103", 1, "sm_103 is not"),
        (testing.random_mask((64, 64), 0.2, "16x1"), torch.float16, "sm_75", 1, "sm_75 is not"),
    ],
)
def test_what_stays_dense_has_a_reason(mask, dtype, arch, groups, says):
    choice = choose(rows_of(mask, groups=groups), dtype, arch)
    assert choice.kernel == "dense" and says in choice.reason


def test_a_kernel_can_be_forced():
    rows = rows_of(testing.random_mask((64, 64), 0.9, "csr"))
    with heuristics.forced("column_vectors", Tiles(16)):
        assert choose(rows, torch.float32).tiles == Tiles(16)
    assert choose(rows, torch.float32).kernel == "dense"
    with pytest.raises(ValueError, match="unknown kernel"), heuristics.forced("fast"):
        pass
    with pytest.raises(ValueError, match="needs tiles"), heuristics.forced("blocks"):
        pass


def test_the_tuner_keeps_the_fastest_by_gpu_shape_and_pattern():
    rows = rows_of(testing.random_mask((64, 64), 0.2, "16x1"))
    tuner, asked = autotune.Tuner(), []

    def seconds(choice):
        asked.append(choice)
        return 1.0 if choice.tiles.pixels == 64 else 2.0

    def tune(gpu="A", shape=(8, 64), of=rows):
        return tuner.choose(of, torch.float16, "sm_80", gpu, shape, seconds)

    assert tune().tiles.pixels == 64
    count = len(asked)
    assert count > 2 and tune().tiles.pixels == 64 and len(asked) == count
    other = rows_of(testing.random_mask((64, 64), 0.2, "16x1", seed=3))
    for change in ({"gpu": "B"}, {"shape": (9, 64)}, {"of": other}):
        tune(**change)
        assert len(asked) > count, change
        count = len(asked)


def test_the_tuner_measures_nothing_where_the_weight_stays_dense():
    rows = rows_of(testing.random_mask((64, 64), 0.2, "csr"))
    args = (rows, torch.float16, "sm_80", "A", (8, 64))
    assert autotune.Tuner().choose(*args, lambda choice: 1 / 0).kernel == "dense"


def test_a_cpu_weight_needs_no_reason():
    packed = dk.pack(testing.randn(64, 64), testing.random_mask((64, 64), 0.9))
    assert dk.dense_reason(packed.pattern, torch.float32, torch.device("cpu")) is None


@needs_triton
def test_the_reason_for_a_gpu_names_the_pattern():
    mask = testing.random_mask((64, 64), 0.2)
    packed = dk.pack(testing.randn(64, 64), mask)
    assert "share their inputs" in dk.dense_reason(packed.pattern, torch.float32, GPU)
    packed = dk.pack(testing.randn(64, 64), testing.random_mask((64, 64), 0.2, "16x1"))
    assert dk.dense_reason(packed.pattern, torch.float32, GPU) is None


@needs_triton
def test_a_second_library_for_cuda_is_left_alone():
    assert gpu.register("CUDA") is False


def network(pattern="16x1", density=0.25):
    torch.manual_seed(0)
    return torch.nn.Sequential(
        dass.SparseConv2d(32, 64, 3, stride=2, padding=1, density=density, pattern=pattern),
        torch.nn.ReLU(),
        dass.SparseConv2d(64, 32, 1, density=density, pattern=pattern),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        dass.SparseLinear(32, 48, density=density, pattern=pattern),
    ).requires_grad_(False)


@contextlib.contextmanager
def fake():
    """Fake tensors for the body, without gradients. Layers are built before: a mask has data."""
    torch._dynamo.reset()
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        yield
    torch._dynamo.reset()


def example(dtype=torch.float32):
    return torch.empty(2, 32, 9, 9, device=GPU, dtype=dtype)


def sparse_calls(graph):
    return [str(n.target) for n in graph.nodes if str(n.target).startswith("dass.")]


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_layers_moved_to_a_gpu_run_the_sparse_ops(dtype):
    net = network()
    with fake():
        net = net.to(GPU, dtype)
        assert all(m.is_packed for m in net if hasattr(m, "mask"))
        y = net(example(dtype))
        assert (y.device, y.dtype, tuple(y.shape)) == (GPU, dtype, (2, 48))


@needs_triton
def test_layers_no_kernel_is_for_are_not_packed():
    net = network("unstructured")
    with fake():
        net = net.to(GPU)
        layers = [m for m in net if hasattr(m, "mask")]
        assert not any(m.is_packed for m in layers)
        assert all("share their inputs" in m.why_dense for m in layers)


@needs_triton
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile_traces_the_sparse_ops_for_a_gpu(backend):
    graphs, net = [], network()

    def keep(module, inputs):
        graphs.append(module.graph)
        return torch._dynamo.lookup_backend(backend)(module, inputs)

    with fake():
        y = torch.compile(net.to(GPU), fullgraph=True, backend=keep)(example())
        assert (y.device, tuple(y.shape)) == (GPU, (2, 48))
    # Dynamo's graph is of the wrappers' ops, each of ours once.
    assert sum("dass" in str(n.target) for n in graphs[0].nodes) == 3


@needs_triton
def test_export_traces_the_sparse_ops_for_a_gpu():
    net = network().half().eval()
    with fake():
        program = torch.export.export(net.to(GPU), (example(torch.float16),))
    assert sparse_calls(program.graph) == ["dass.conv2d.default"] * 2 + ["dass.linear.default"]
    y = program.graph.output_node().args[0][0].meta["val"]
    assert (y.device, y.dtype, tuple(y.shape)) == (GPU, torch.float16, (2, 48))


@needs_triton
def test_gradient_ops_have_shapes_for_a_gpu():
    packed = dk.pack(torch.ones(32, 16, 3, 3), testing.random_mask((32, 16, 3, 3), 0.2, "16x1"))
    spec = dk.conv_spec(packed.shape, 2, 1, 1)

    def empty(*shape, dtype=torch.float16):
        return torch.empty(*shape, device=GPU, dtype=dtype)

    with fake():
        pattern = empty(len(packed.pattern), dtype=torch.int32)
        grad, x, values = empty(2, 32, 5, 5), empty(2, 16, 9, 9), empty(len(packed.values))
        dx = torch.ops.dass.conv2d_dx(grad, values, pattern, spec, 16, 9, 9)
        dv = torch.ops.dass.conv2d_dw(grad, x, pattern, spec, len(values))
        assert (dx.device, dx.dtype, dx.shape) == (GPU, torch.float16, x.shape)
        assert (dv.device, dv.dtype, dv.shape) == (GPU, torch.float16, values.shape)
