"""Dense against sparse on this machine: layers, whole networks and training steps, as plain data.

    rows = compare_layers(dense, {"90 %": pruned}, x)
    whole = compare_networks(dense, {"90 %": pruned}, x)

The dense side is always the fastest way that torch has (:func:`dass.timing.dense_variants`), timed
in turn with the sparse one in the same process. Results are compared before they are timed.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from dass.convert import densify, sparsify
from dass.data import Batches, ImageDataset
from dass.nn import SparseConv2d, SparseLinear
from dass.schedule import attach_masks
from dass.surgery import evaluating
from dass.timing import Sample, dense_variants, measure, speedup, threads

__all__ = [
    "ResultsDifferError",
    "compare_layers",
    "compare_logits",
    "compare_networks",
    "compare_steps",
    "fold_batchnorm",
    "relative_error",
]

TOLERANCE = 1e-4  # float32 sums in another order
_SPARSE = (SparseConv2d, SparseLinear)


class ResultsDifferError(Exception):
    """Two ways to compute the same thing disagree: their times would mean nothing."""


def relative_error(got: Tensor, want: Tensor) -> float:
    """max |got - want| / max |want|; NaN anywhere gives infinity."""
    error = ((got - want).abs().max() / want.abs().max().clamp_min(1e-30)).item()
    return error if error == error else float("inf")


def compare_layers(
    dense: nn.Module,
    rivals: Mapping[str, nn.Module],
    x: Tensor,
    *,
    seconds: float = 0.1,
    rounds: int = 7,
    num_threads: int | None = 1,
    on_row: Callable[[int, int, str], None] | None = None,
) -> list[dict]:
    """Times each layer that is sparse in a rival, alone, against its dense twin in its best form.

    Layers of one kind, shape and input are timed once, on the first of them.

    Args:
        dense: the network unpruned.
        rivals: label -> the same network with some layers sparse and frozen (``dass.prune``).
        x: an input of the network; the layers get random inputs of the shapes they get there.
        seconds, rounds, num_threads: as in :func:`dass.timing.measure`, per function.
        on_row: called before each row with its number, their count and the layer's name.

    Returns:
        One dict per row: names, kind, weight and input (shapes), dense (way -> median_us, spread,
        rounds), best (the fastest way), sparse (label -> median_us, spread, rounds, density,
        speedup over best).

    Raises:
        ResultsDifferError: sparse and dense outputs disagree.
    """
    groups = _groups(dense, rivals, x)
    generator = torch.Generator().manual_seed(0)
    rows = []
    for i, names in enumerate(groups):
        if on_row:
            on_row(i, len(groups), names[0])
        layer, shape = dense.get_submodule(names[0]), groups[names]
        example = torch.randn(shape, generator=generator)
        functions = dense_variants(layer, example)
        ways = list(functions)
        sparse = {
            label: copy.deepcopy(twin).eval()
            for label, model in rivals.items()
            if isinstance(twin := model.get_submodule(names[0]), _SPARSE)
        }
        for label, twin in sparse.items():
            _check(names[0], twin, densify(twin), example)
            functions[label] = lambda twin=twin, x=example: twin(x)
        samples = measure(functions, seconds=seconds, rounds=rounds, num_threads=num_threads)
        row = {"names": list(names), "kind": _kind(layer), "weight": list(layer.weight.shape)}
        row |= {"input": list(shape), **_sides(samples, ways)}
        for label, twin in sparse.items():
            row["sparse"][label]["density"] = twin.density
        rows.append(row)
    return rows


def _groups(dense, rivals: Mapping[str, nn.Module], x: Tensor) -> dict[tuple[str, ...], tuple]:
    """names of layers alike -> shape of their input, in the order of execution."""
    shapes: dict[str, tuple] = {}
    handles = []
    for name, module in dense.named_modules():
        if any(isinstance(_find(model, name), _SPARSE) for model in rivals.values()):

            def note(module, args, name=name):
                shapes.setdefault(name, tuple(args[0].shape))

            handles.append(module.register_forward_pre_hook(note))
    try:
        with evaluating(dense), torch.inference_mode():
            dense(x)
    finally:
        for handle in handles:
            handle.remove()
    alike: dict[tuple, list[str]] = {}
    for name, shape in shapes.items():
        layer = dense.get_submodule(name)
        form = (tuple(layer.weight.shape), shape, layer.bias is None)
        if isinstance(layer, nn.Conv2d):
            form += (layer.stride, layer.padding, layer.dilation, layer.groups, layer.padding_mode)
        sparse_in = tuple(isinstance(_find(model, name), _SPARSE) for model in rivals.values())
        alike.setdefault((*form, sparse_in), []).append(name)
    return {tuple(names): shapes[names[0]] for names in alike.values()}


def _find(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _kind(layer: nn.Module) -> str:
    if isinstance(layer, nn.Linear):
        return "linear"
    words = f"{layer.kernel_size[0]}x{layer.kernel_size[1]}"
    if layer.groups == layer.in_channels > 1:
        words += " depthwise"
    elif layer.groups > 1:
        words += f" in {layer.groups} groups"
    return words + (f" /{layer.stride[0]}" if layer.stride[0] > 1 else "")


def compare_networks(
    dense: nn.Module,
    rivals: Mapping[str, nn.Module],
    x: Tensor,
    *,
    seconds: float = 0.3,
    rounds: int = 7,
    num_threads: int | None = 1,
    layer_seconds: float = 0.02,
) -> dict:
    """Times whole networks: dense in its best form against each rival through ``dass.sparsify``.

    On both sides BatchNorm is folded into the convolutions first.

    Args:
        dense, rivals, x, seconds, rounds, num_threads: as in :func:`compare_layers`.
        layer_seconds: what ``sparsify`` may spend per layer and form.

    Returns:
        input (shape), dense (way -> median_us, spread, rounds), best, and sparse: label ->
        median_us, spread, rounds, speedup over best, sparse_layers, layers, and error, the largest
        relative difference of the logits from those of the pruned network run dense.

    Raises:
        ResultsDifferError: sparse and dense outputs disagree.
    """
    folded = fold_batchnorm(dense, x)
    functions = dense_variants(folded, x)
    ways = list(functions)
    facts = {}
    for label, pruned in rivals.items():
        plain = densify(pruned).eval()
        deployed, chosen = sparsify(
            fold_batchnorm(plain, x), x, num_threads=num_threads, seconds=layer_seconds
        )
        facts[label] = {
            "error": _check(label, deployed, plain, x),
            "sparse_layers": sum(row.chosen == "sparse" for row in chosen.layers),
            "layers": len(chosen.layers),
        }
        functions[label] = lambda deployed=deployed: deployed(x)
    samples = measure(functions, seconds=seconds, rounds=rounds, num_threads=num_threads)
    found = {"input": list(x.shape), **_sides(samples, ways)}
    for label, more in facts.items():
        found["sparse"][label] |= more
    return found


def _sides(samples: Mapping[str, Sample], ways: list[str]) -> dict:
    """dense, best and sparse of timed functions, those in `ways` being the dense ones."""
    best = min(ways, key=lambda way: samples[way].median_us)
    return {
        "dense": {way: samples[way].to_dict() for way in ways},
        "best": best,
        "sparse": {
            name: {**sample.to_dict(), "speedup": speedup(samples[best], sample)}
            for name, sample in samples.items()
            if name not in ways
        },
    }


def _check(what: str, got: nn.Module, want: nn.Module, x: Tensor) -> float:
    with torch.inference_mode():
        error = relative_error(got(x), want(x))
    if error > TOLERANCE:
        raise ResultsDifferError(f"{what}: sparse and dense results differ by {error:.2g}")
    return error


@torch.inference_mode()
def compare_logits(
    plain: nn.Module, rivals: Mapping[str, nn.Module], images: ImageDataset
) -> dict[str, dict[str, float]]:
    """Accuracy ("plain" and each rival) and error (each rival) over all images.

    The error is the largest difference of the logits from the plain ones over the largest logit.

    Raises:
        ResultsDifferError: an error above 1e-4.
    """
    models, labels = {"plain": plain, **rivals}, []
    logits: dict[str, list[Tensor]] = {name: [] for name in models}
    for x, y in Batches(images, 250, shuffle=False):
        for name, model in models.items():
            logits[name].append(model(x))
        labels.append(y)
    whole, y = {name: torch.cat(parts) for name, parts in logits.items()}, torch.cat(labels)
    errors = {name: relative_error(whole[name], whole["plain"]) for name in rivals}
    for name, error in errors.items():
        if error > TOLERANCE:
            raise ResultsDifferError(f"{name}: logits run sparse and dense differ by {error:.2g}")
    accuracy = {name: (z.argmax(1) == y).float().mean().item() for name, z in whole.items()}
    return {"accuracy": accuracy, "error": errors}


def fold_batchnorm(model: nn.Module, x: Tensor) -> nn.Module:
    """A copy in eval mode whose convolutions contain the BatchNorm that follows them directly.

    Pairs are found by watching one forward pass: a BatchNorm whose input is the very output of a
    convolution that ran once. If the copy then computes something else (the convolution's output
    had a second reader), an unfolded copy is returned. Zeros stay zeros.
    """
    model = copy.deepcopy(model).eval()
    names = {module: name for name, module in model.named_modules()}
    made: dict[int, nn.Conv2d] = {}
    runs: dict[nn.Module, int] = {}
    pairs: dict[nn.Module, nn.Module] = {}
    kept = []  # outputs, so that no two have one id

    def saw_conv(module, args, output):
        runs[module] = runs.get(module, 0) + 1
        made[id(output)] = module
        kept.append(output)

    def sees_norm(module, args):
        runs[module] = runs.get(module, 0) + 1
        if (conv := made.get(id(args[0]))) is not None:
            pairs[module] = conv

    handles = []
    for module in names:
        if type(module) is nn.Conv2d:
            handles.append(module.register_forward_hook(saw_conv))
        elif type(module) is nn.BatchNorm2d and module.track_running_stats:
            handles.append(module.register_forward_pre_hook(sees_norm))
    with torch.no_grad():
        want = model(x)
        for handle in handles:
            handle.remove()
        folded = copy.deepcopy(model)
        for norm, conv in pairs.items():
            if runs[norm] == runs[conv] == 1:
                twins = (folded.get_submodule(names[module]) for module in (conv, norm))
                folded.set_submodule(names[conv], fuse_conv_bn_eval(*twins))
                folded.set_submodule(names[norm], nn.Identity())
        return folded if relative_error(folded(x), want) <= TOLERANCE else model


def compare_steps(
    pruned: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    seconds: float = 1.0,
    rounds: int = 7,
    num_threads: int | None = None,
) -> dict:
    """Times one fine-tuning step (forward, backward, SGD with momentum, masks enforced).

    Args:
        pruned: a network with frozen sparse layers; copies are trained.
        x, y: a batch of images and labels.
        seconds, rounds, num_threads: as in :func:`dass.timing.measure`.

    Returns:
        threads, batch, dense ("masked NCHW" and "masked channels_last": dense layers whose pruned
        weights are set to zero after each step), best, sparse ("sparse": the packed kernels in all
        three products).
    """
    functions = {
        "masked NCHW": _masked_step(pruned, x, y, torch.contiguous_format),
        "masked channels_last": _masked_step(pruned, x, y, torch.channels_last),
    }
    ways = list(functions)
    sparse = copy.deepcopy(pruned).train()
    optimizer = _sgd(sparse)
    attach_masks(optimizer, sparse)
    functions["sparse"] = _step(sparse, optimizer, x, y)
    with threads(num_threads) as count:
        samples = _measure_steps(functions, seconds, rounds)
    return {"threads": count, "batch": len(x), **_sides(samples, ways)}


def _measure_steps(functions: Mapping[str, Callable], seconds: float, rounds: int):
    """As `measure`, which is for inference: a training step must not run in inference_mode."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    start = time.perf_counter()
    for function in functions.values():
        function()
    calls = max(1, round(seconds * len(functions) / rounds / (time.perf_counter() - start)))
    order = list(functions)
    for _ in range(rounds):
        for name in order:
            start = time.perf_counter()
            for _ in range(calls):
                functions[name]()
            times[name].append((time.perf_counter() - start) / calls * 1e6)
        order.reverse()
    return {name: Sample(tuple(taken), calls) for name, taken in times.items()}


def _masked_step(pruned: nn.Module, x: Tensor, y: Tensor, form: torch.memory_format) -> Callable:
    dense = densify(pruned).to(memory_format=form).train()
    gone = [
        (dense.get_submodule(name).weight, ~layer.mask.contiguous(memory_format=form))
        if layer.mask.dim() == 4
        else (dense.get_submodule(name).weight, ~layer.mask)
        for name, layer in pruned.named_modules()
        if isinstance(layer, _SPARSE)
    ]
    optimizer = _sgd(dense)
    step = _step(dense, optimizer, x.contiguous(memory_format=form), y)

    def masked():
        step()
        with torch.no_grad():
            for weight, mask in gone:
                weight.masked_fill_(mask, 0)
                optimizer.state[weight]["momentum_buffer"].masked_fill_(mask, 0)

    return masked


def _sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Callable:
    def step():
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step
