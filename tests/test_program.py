"""dass_kernels.Program: its arguments, threads, memory, and whole random networks."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from fences import nan_step, place
from hypothesis import given
from hypothesis import strategies as st
from program_checks import ACTIVATIONS, SIMPLE, Net, check, layouts, numbers, program_of

import dass_kernels as dk
from dass.engine import tuning
from dass.engine.depth_first import groups
from dass.engine.plan import make_plan
from dass.engine.steps import suits_depthwise
from dass_kernels import testing


@pytest.fixture
def threads():
    """Sets how many threads torch has, and puts back as many as there were."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def network() -> Net:
    """One of everything, the last node its output."""
    net = Net(4, 21, 19, seed=5)
    a = net.conv("x", 9, 3, 1, density=0.5, stride=(2, 2), activation="relu")
    b = net.conv(a, 20, 1, density=0.4, activation="relu6")
    c = net.depthwise(b, 3, 1, activation="relu6")
    d = net.conv(c, 9, 1, density=0.4, residual=a)
    e = net.window(d, "max", (3, 3), (2, 2), (1, 1, 1, 1))
    f = net.mul(e, net.linear(net.mean(e), 9, activation="sigmoid"))
    whole = net.concat(f, net.affine(e, "hardswish"))
    net.linear(net.flatten(net.depthwise(whole, 5, 2)), 13, density=0.3)
    return net


def tensors(graph, batch: int, seed: int = 1) -> list[torch.Tensor]:
    """The input and empty outputs of a call."""
    outs = [torch.full((batch, *graph[name].shape), torch.nan) for name in graph.outputs]
    return [numbers(batch, graph.nodes[0].shape, seed), *outs]


def described(pixel: int = 1):
    net = network()
    plan = make_plan(net.graph(net.nodes[-1].name), pixel)
    tuning.use(plan, {})
    return plan, plan.described()


# --- What it computes -------------------------------------------------------------------------


@pytest.mark.usefixtures("one_thread")
def test_a_whole_network(isa):
    net = network()
    graph = net.graph(net.nodes[-1].name, net.nodes[4].name)
    for pixel, batch in layouts():
        check(graph, pixel, batch)
    found = groups(graph, lambda node: suits_depthwise(node, 1))
    check(graph, batch=2, fusions=found)


@pytest.mark.parametrize("count", [2, 3])
def test_threads_give_the_same_bits(isa, threads, count):
    """Parts of steps, whole images, and fewer images than threads."""
    net = network()
    graph = net.graph(net.nodes[-1].name)
    fused = groups(graph, lambda node: suits_depthwise(node, 1))
    for pixel, batch in ((1, 1), (1, 2), (1, 5), (dk.register_lanes(), 7)):
        for fusions in ((), fused) if pixel == 1 else ((),):
            program = program_of(make_plan(graph, pixel, fusions=fusions))
            threads(1)
            alone = tensors(graph, batch)
            program.run(alone)
            threads(count)
            for _ in range(3):
                together = tensors(graph, batch)
                program.run(together)
                assert torch.equal(alone[1], together[1])


@pytest.mark.parametrize("vectors", [4, 9, 10, 13, 14])
@pytest.mark.parametrize("count", [2, 3])
def test_threads_share_the_pixels_of_a_small_picture(isa, threads, count, vectors):
    """Fewer weights than pixels, few blocks: they are halved, and the bits stay."""
    net = Net(40, 14, 14, seed=vectors)
    a = net.conv("x", 24, density=0.1, activation="relu")
    net.conv(a, 24, 3, 1, density=0.1, residual=a)
    graph = net.graph(net.nodes[-1].name)

    def choose(plan):
        for step in tuning.products(plan):
            tuning.set_kernel(step, tuning.Kernel(False, 1, vectors))

    program = program_of(make_plan(graph, 1), choose)
    threads(1)
    alone = tensors(graph, 1)
    program.run(alone)
    threads(count)
    for _ in range(3):
        together = tensors(graph, 1)
        program.run(together)
        assert torch.equal(alone[1], together[1])


@pytest.mark.usefixtures("one_thread")
def test_calls_from_several_threads_do_not_meet(isa):
    net = network()
    graph = net.graph(net.nodes[-1].name)
    program = program_of(make_plan(graph, 1))
    wanted, got = {}, {}
    for seed in range(4):
        call = tensors(graph, 2, seed)
        program.run(call)
        wanted[seed] = call[1]

    def work(seed):
        for _ in range(5):
            call = tensors(graph, 2, seed)
            program.run(call)
            got[seed] = call[1]

    workers = [threading.Thread(target=work, args=(seed,)) for seed in wanted]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(torch.equal(got[seed], wanted[seed]) for seed in wanted)


@pytest.mark.usefixtures("one_thread")
def test_profiling_runs_it_too(isa):
    net = network()
    graph = net.graph(net.nodes[-1].name)
    program = program_of(make_plan(graph, 1))
    ran, profiled = tensors(graph, 3), tensors(graph, 3)
    program.run(ran)
    times = program.profile(profiled)
    assert torch.equal(ran[1], profiled[1])
    assert len(times) == len(program.kernels) and all(t >= 0 for t in times) and sum(times) > 0


def test_no_images_are_nothing_to_do(isa):
    net = network()
    graph = net.graph(net.nodes[-1].name)
    program = program_of(make_plan(graph, 1))
    program.run(tensors(graph, 0))
    assert len(program.profile(tensors(graph, 0))) == len(program.kernels)


def test_it_tells_its_memory_and_its_kernels(isa):
    plan, steps = described()
    program = dk.Program(plan.images, plan.arena, plan.apart, steps)
    assert program.arena_bytes == 4 * plan.arena
    assert len(program.kernels) == len(steps) and all(program.kernels)


def test_a_program_outlives_a_change_of_the_instruction_set():
    """Its kernels were chosen when it was made."""
    net = Net(3, 9, 8)
    graph = net.graph(net.mean(net.window("x", "max", (3, 3), (1, 1))))
    best = dk.available_isas()[0]
    with testing.isa(best):
        program = program_of(make_plan(graph, 1))
        want = tensors(graph, 2)
        program.run(want)
    with testing.isa("scalar"):
        got = tensors(graph, 2)
        program.run(got)
    assert torch.equal(want[1], got[1])


# --- Random networks --------------------------------------------------------------------------


@st.composite
def nets(draw) -> Net:
    """Up to eight nodes on what came before, of sizes that meet."""
    size = (draw(st.integers(1, 14)), draw(st.integers(1, 36)))
    net = Net(draw(st.integers(2, 5)), *size, seed=draw(st.integers(0, 9)))
    pictures = ["x"]
    for _ in range(draw(st.integers(1, 8))):
        x = draw(st.sampled_from(pictures))
        same = [name for name in pictures if net.shape(name) == net.shape(x)]
        beside = [name for name in pictures if net.shape(name)[1:] == net.shape(x)[1:]]
        kind = draw(st.sampled_from(("conv", "residual", "depthwise", "pool", "sum", "concat",
                                     "scale", "act")))  # fmt: skip
        word = draw(st.sampled_from(ACTIVATIONS))
        taps, stride = draw(st.sampled_from((1, 3, 5))), draw(st.sampled_from((1, 1, 2)))
        if kind == "conv":
            y = net.conv(x, draw(st.integers(1, 6)), taps, taps // 2, density=0.5,
                         stride=(stride, stride), activation=word)  # fmt: skip
        elif kind == "residual":
            other = draw(st.sampled_from(same))
            y = net.conv(
                x, net.shape(x)[0], taps, taps // 2, density=0.5, residual=other, activation=word
            )
        elif kind == "depthwise" and net.shape(x)[0] > 1:
            taps = draw(st.sampled_from((3, 5, 7)))
            word = draw(st.sampled_from(SIMPLE))
            y = net.depthwise(x, taps, taps // 2, stride=(stride, stride), activation=word)
        elif kind == "pool":
            which = draw(st.sampled_from(("max", "avg")))
            y = net.window(x, which, (3, 3), (stride, stride), (1, 1, 1, 1), activation=word)
        elif kind == "sum":
            y = net.sum(x, draw(st.sampled_from(same)), word)
        elif kind == "concat" and net.shape(x)[0] < 20:
            y = net.concat(x, *draw(st.lists(st.sampled_from(beside), min_size=1, max_size=2)))
        elif kind == "scale":
            y = net.mul(x, net.linear(net.mean(x), net.shape(x)[0], activation="sigmoid"))
        else:
            y = net.act(x, draw(st.sampled_from(ACTIVATIONS[1:])))
        pictures.append(y)
    return net


@pytest.mark.parametrize("name", dk.available_isas())
@given(net=nets(), layout=st.integers(0, 5), fuse=st.booleans(), whole=st.booleans())
def test_random_networks(name, net, layout, fuse, whole):
    with testing.isa(name):
        outputs = [node.name for node in net.nodes[1:]] if whole else [net.nodes[-1].name]
        graph = net.graph(*outputs)
        pixel, batch = layouts()[layout]
        found = groups(graph, lambda node: suits_depthwise(node, 1)) if fuse and pixel == 1 else ()
        check(graph, pixel, batch, fusions=found)


# --- Errors -----------------------------------------------------------------------------------


def _make(steps, images: int = 1, arena: int = 4096, apart=(64, 64)) -> dk.Program:
    return dk.Program(images, arena, apart, steps)


@pytest.mark.parametrize(
    "kind", ["rows", "depthwise", "pool", "map", "mean", "gemv", "gather", "scatter", "fused"]
)
def test_a_step_that_lacks_something(kind):
    with pytest.raises(KeyError, match="step without"):
        _make([{"kind": kind}])


def test_every_key_is_needed():
    for step in described()[1]:
        for key in step:
            if key in ("residual", "relu_in", "deep", "depth"):
                continue  # optional
            if key == "other" and not step["combine"]:
                continue
            with pytest.raises(KeyError, match=f"step without '{key}'"):
                _make([{k: v for k, v in step.items() if k != key}])
    for key in place(1, 1, 1):
        lacking = {k: v for k, v in place(1, 1, 1).items() if k != key}
        with pytest.raises(KeyError, match=f"step without '{key}'"):
            _make([{"kind": "mean", "x": lacking, "y": place(1, 1, 1)}])


def test_an_unknown_kind():
    with pytest.raises(ValueError, match="unknown kind of step 'convolve'"):
        _make([{"kind": "convolve"}])


def _steps(kind: str) -> dict:
    return next(step for step in described()[1] if step["kind"] == kind)


@pytest.mark.parametrize(
    ("kind", "changes", "says"),
    [
        ("depthwise", {"kernel": 4}, "kernel must be 3, 5 or 7"),
        ("depthwise", {"kernel": 9}, "kernel must be 3, 5 or 7"),
        ("depthwise", {"kernel": 1}, "kernel must be 3, 5 or 7"),
        ("depthwise", {"stride_w": 3}, "stride must be 1 or 2"),
        ("depthwise", {"top": 60}, "too few zeros"),
        ("depthwise", {"left": 60}, "too few zeros"),
    ],
)
def test_a_depthwise_step_that_no_kernel_can_run(kind, changes, says):
    with pytest.raises(ValueError, match=says):
        _make([{**_steps(kind), **changes}])


def test_rows_of_pictures_that_do_not_fit_together():
    step = _steps("rows")
    wide = {**step["y"], "pitch": step["y"]["pitch"] + 1}
    with pytest.raises(ValueError, match="input and output must have one pitch"):
        _make([{**step, "y": wide}])
    with pytest.raises(ValueError, match="residual and output must have one pitch"):
        _make([{**step, "residual": wide}])
    sides = {"pixel": 3}
    with pytest.raises(ValueError, match="one pixel must fill a register"):
        _make([{**step, "x": {**step["x"], **sides}, "y": {**step["y"], **sides}}])


def test_a_sparse_matrix_that_no_kernel_can_run():
    step = {**_steps("gemv"), "sparse": True, "activation": 0}
    with testing.isa(dk.available_isas()[0]), pytest.raises(ValueError, match="this activation"):
        _make([{**step, "activation": 5}])
    with testing.isa("scalar"), pytest.raises(ValueError, match="this instruction set"):
        _make([step])


def _copy() -> dk.Program:
    """Of 64 floats, from the first tensor to the second."""
    step = {**nan_step(0), "bias": np.zeros(0, np.float32)}
    return _make([{**step, "x": place(1, 8, 8, space=1), "y": place(1, 8, 8, space=2)}])


@pytest.mark.parametrize(
    ("x", "y"),
    [
        (torch.zeros(2, 1, 8, 8, dtype=torch.float64), torch.zeros(2, 1, 8, 8)),
        (torch.zeros(2, 1, 8, 16)[..., ::2], torch.zeros(2, 1, 8, 8)),
        (torch.zeros(2, 1, 8, 8), torch.zeros(2, 1, 8, 8).transpose(2, 3)),
        (torch.zeros(2, 1, 8, 8), torch.zeros(2, 1, 8, 8, device="meta")),
    ],
)
def test_tensors_of_another_kind(x, y):
    with pytest.raises(ValueError, match="contiguous float32 on the CPU"):
        _copy().run([x, y])
    with pytest.raises(ValueError, match="contiguous float32 on the CPU"):
        _copy().profile([x, y])


@pytest.mark.parametrize("shape", [(2, 1, 8, 7), (1, 1, 8, 8), (3, 1, 8, 8), (2, 2, 8, 8)])
def test_tensors_of_another_size(shape):
    with pytest.raises(ValueError, match="2 images of 64 floats expected"):
        _copy().run([torch.zeros(2, 1, 8, 8), torch.zeros(shape)])


@pytest.mark.parametrize("count", [1, 3])
def test_too_few_or_too_many_tensors(count):
    with pytest.raises(ValueError):
        _copy().run([torch.zeros(2, 1, 8, 8)] * count)


def test_the_copy_that_the_errors_are_made_of():
    x, y = numbers(2, (1, 8, 8)), torch.zeros(2, 1, 8, 8)
    _copy().run([x, y])
    assert torch.equal(x, y)
