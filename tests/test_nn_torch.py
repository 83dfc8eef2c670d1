"""What torch does with networks of sparse layers: compilation, export, averages, processes."""

import concurrent.futures
import copy
import io

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.testing import assert_close

from dass.nn import SparseConv2d, SparseLinear


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


def random_mask(weight, density=0.3):
    return torch.rand(weight.shape) < density


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        SparseConv2d(3, 16, 3, padding=1, density=0.3),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        SparseConv2d(16, 16, 3, 2, 1, groups=4, density=0.2, padding_mode="reflect"),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        SparseLinear(16, 10, density=0.3, pattern="4x1"),
    )


def sparse_layers(model):
    return [m for m in model.modules() if isinstance(m, (SparseConv2d, SparseLinear))]


def compiled_trains_as_eager(backend, learn):
    model = network()
    for layer in sparse_layers(model) if learn else ():
        layer.learn_mask()
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for step in range(3):
        x = torch.randn(4 + step, 3, 9, 9)
        results = []
        for run, module in ((compiled, model), (eager, eager)):
            optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
            loss = run(x).square().sum()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            results.append(loss)
        assert_close(*results, rtol=1e-4, atol=1e-4)
    for p, q in zip(model.parameters(), eager.parameters(), strict=True):
        assert_close(p, q, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("learn", [False, True])
def test_compiled_training_without_graph_breaks(learn):
    compiled_trains_as_eager("aot_eager", learn)


@pytest.mark.slow
def test_inductor_training_and_inference():
    compiled_trains_as_eager("inductor", False)


def test_compiled_inference_sees_new_weights_and_masks():
    model = network().eval()
    x = torch.randn(4, 3, 9, 9)
    with torch.no_grad():
        model(x)  # the eager cache is warm, and must not end up in the graph
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        for _ in range(2):
            assert_close(compiled(x), model(x))
            model[0].weight.data.mul_(1.5)
            model[0].refresh()
        model[3].set_mask(random_mask(model[3].weight, 0.4))
        assert_close(compiled(x), model(x))


@pytest.mark.parametrize("strict", [False, True])
def test_export_with_a_dynamic_batch_saves_loads_and_trains(strict):
    model = network().eval()
    x = torch.randn(4, 3, 9, 9)
    with torch.no_grad():
        model(x)
    shapes = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(model, (x,), dynamic_shapes=shapes, strict=strict)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    x = torch.randn(7, 3, 9, 9)
    assert_close(loaded(x), model(x))
    loaded(x).sum().backward()
    model(x).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    for name, p in loaded.named_parameters():
        assert_close(p.grad, grads[name])


def test_averages_of_models_follow_weights_and_masks():
    for buffers in (False, True):
        model = network()
        mean = AveragedModel(model, use_buffers=buffers).eval()
        x = torch.randn(2, 3, 9, 9)
        with torch.no_grad():
            mean(x)
            for layer in sparse_layers(model):
                layer.weight.add_(1)
                if not buffers:  # torch averages bool buffers to bool: nonsense, but not ours
                    layer.set_mask(random_mask(layer.weight, 0.5))
            mean.update_parameters(model)
            assert_close(mean(x), model.eval()(x))


def test_threads_share_a_layer():
    layer = SparseConv2d(8, 8, 3, padding=1, density=0.3).eval()
    inputs = [torch.randn(1 + i % 3, 8, 6, 6) for i in range(32)]
    with torch.no_grad():
        want = [copy.deepcopy(layer)(x) for x in inputs]

    def run(x):
        with torch.inference_mode():
            return layer(x)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for got, expected in zip(pool.map(run, inputs), want, strict=True):
            assert torch.equal(got, expected)


def _ddp_worker(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    torch.manual_seed(rank)  # other weights, other masks: of other sizes
    model = nn.Sequential(
        SparseConv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), SparseLinear(8 * 9, 4, bias=False)
    )
    for layer in sparse_layers(model):
        layer.set_mask(random_mask(layer.weight, 0.2 + 0.3 * rank))
    ddp = DistributedDataParallel(model)
    masks = [layer.mask.clone() for layer in sparse_layers(model)]
    dense = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 4, bias=False))
    dense.load_state_dict(model.state_dict(), strict=False)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1, momentum=0.9)
    other = torch.optim.SGD(dense.parameters(), lr=0.1, momentum=0.9)
    for step in range(3):
        torch.manual_seed(step)
        x = torch.randn(4, 3, 5, 5)
        ddp(x[2 * rank : 2 * rank + 2]).square().mean().backward()
        dense(x).square().mean().backward()
        for layer, mask in zip((dense[0], dense[3]), masks, strict=True):
            layer.weight.grad *= mask
        for opt in (optimizer, other):
            opt.step()
            opt.zero_grad()
        if step == 1:  # a new mask on every rank, in the middle of training
            keep = torch.rand(4, 72, generator=torch.Generator().manual_seed(7)) < 0.5
            model[3].set_mask(keep)
            dense[3].weight.data *= keep
            masks[1] = keep
            for opt, weight in ((optimizer, model[3].weight), (other, dense[3].weight)):
                opt.state[weight]["momentum_buffer"] *= keep
    torch.save([masks, model.state_dict(), dense.state_dict()], f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_ddp_with_masks_of_other_sizes_at_the_start(tmp_path):
    torch.multiprocessing.spawn(_ddp_worker, (str(tmp_path),), nprocs=2)
    (masks, state, dense), (masks1, state1, _) = (torch.load(tmp_path / f"{r}.pt") for r in (0, 1))
    for a, b in zip(masks, masks1, strict=True):
        assert torch.equal(a, b) and 0 < a.sum() < a.numel()
    for key, value in state.items():
        assert torch.equal(value, state1[key])
        if key in dense:
            assert_close(value, dense[key])


def test_torch_func_differentiates_scores():
    torch.manual_seed(0)
    layer = SparseConv2d(4, 6, 3).learn_mask(0.25)
    x = torch.randn(2, 4, 6, 6)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(parameters):
        return torch.func.functional_call(layer, parameters, x).square().sum()

    found = torch.func.grad(loss)(parameters)
    loss(dict(layer.named_parameters())).backward()
    for name, p in layer.named_parameters():
        torch.testing.assert_close(found[name], p.grad)
    assert bool(found["scores"].any())
