"""Whole models: swap the layers where zeros pay, by measurement, and say why not for the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import UninitializedParameter

from dass.nn import SparseConv2d, SparseLinear
from dass.sparse_layer import like
from dass.surgery import Slots, adopt_hooks, carry_over, copy_model, evaluating, make_permanent
from dass.timing import Sample, machine_facts, measure, speedup, threads

__all__ = ["LayerChoice", "SparsifyReport", "call_arguments", "densify", "sparsify"]

POLICIES = ("auto", "always")
# Below this share of zeros no kernel here has beaten the dense layer: not worth its measuring.
LEAST_ZEROS = 0.2
_ROUNDS = 7  # for a layer
_NETWORK_ROUNDS = 15
_SPARSE = (SparseConv2d, SparseLinear)


@dataclass(frozen=True)
class LayerChoice:
    """One layer of the model: what was measured (summed over its calls), chosen, and why.

    names: every name it goes by. inputs: the distinct input shapes of one forward pass, `calls` the
    number of calls. Times are None where nothing was measured.
    """

    names: tuple[str, ...]
    kind: str
    shape: tuple[int, ...]
    density: float
    inputs: tuple[tuple[int, ...], ...]
    calls: int
    dense_us: float | None
    sparse_us: float | None
    chosen: str
    reason: str


@dataclass(frozen=True)
class SparsifyReport:
    """What `sparsify` did. `print(report)` gives a table.

    dense_us, sparse_us: one forward pass of the network with every layer of the table dense, and as
    it was returned; timed in turn, medians. None without example inputs.
    """

    policy: str
    layers: tuple[LayerChoice, ...]
    dense_us: float | None
    sparse_us: float | None
    speedup: float | None
    margin: float
    machine: Mapping[str, object] = field(default_factory=dict)

    def to_dict(self) -> dict:
        """Plain numbers, strings, lists and dicts, as JSON knows them."""
        rows = [
            {
                **asdict(row),
                "names": list(row.names),
                "shape": list(row.shape),
                "inputs": [list(shape) for shape in row.inputs],
            }
            for row in self.layers
        ]
        return {**asdict(self), "layers": rows, "machine": dict(self.machine)}

    def __str__(self) -> str:
        table = [("layer", "kind", "weight", "density", "dense us", "sparse us", "chosen", "why")]
        for row in self.layers:
            times = ("" if t is None else f"{t:,.1f}" for t in (row.dense_us, row.sparse_us))
            names, shape = " = ".join(row.names) or "(model)", "x".join(map(str, row.shape))
            numbers = (f"{row.density:.1%}", *times)
            table.append((names, row.kind, shape, *numbers, row.chosen, row.reason))
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        justify = (*[str.ljust] * 3, *[str.rjust] * 3, *[str.ljust] * 2)
        lines = [
            "  ".join(f(*cell) for f, *cell in zip(justify, row, widths, strict=True)).rstrip()
            for row in table
        ]
        sparse = sum(row.chosen == "sparse" for row in self.layers)
        lines.append(f"{sparse} of {len(self.layers)} layers sparse (policy {self.policy!r})")
        if self.speedup is not None:
            lines.append(
                f"whole network: dense {self.dense_us:,.0f} us, now {self.sparse_us:,.0f} us: "
                f"{self.speedup:.2f}x, {self.machine['torch_threads']} threads, "
                f"{self.machine['cpu']}, {self.machine['dass_isa']}"
            )
        return "\n".join(lines)


class _Layer:
    """A convolution or linear layer of the model, in its two forms, and what is known of it."""

    def __init__(self, module: nn.Module, names: list[str]):
        self.module, self.names = module, names
        self.chosen = "sparse" if isinstance(module, _SPARSE) else "dense"
        self.forms = {self.chosen: module}
        self.bare: dict[str, nn.Module] = {}  # without the user's hooks, for timing
        self.calls: dict[tuple, int] = {}
        self.costs: dict[tuple, dict[str, float]] = {}
        self.failed = False
        self.reason = _why_not(module)
        self.density = _density(module)

    def prepare(self) -> None:
        """Builds both forms on the same Parameters; leaves a reason if there cannot be two."""
        module = self.module
        if self.reason is None and self.chosen == "dense" and self.density == 1:
            self.reason = "no zeros in its weight"
        if self.reason is not None:
            return
        conv = isinstance(module, nn.Conv2d)
        sparse = SparseConv2d if conv else SparseLinear
        if self.chosen == "sparse":
            module.refresh()
        for name, make in (
            ("dense", lambda: like(module, nn.Conv2d if conv else nn.Linear)),
            ("sparse", lambda: sparse.from_dense(module)),
        ):
            self.bare[name] = make().eval()
            if name not in self.forms:
                self.forms[name] = carry_over(module, make())
        if not self.bare["sparse"].is_packed:
            reason = self.bare["sparse"].why_dense or "no sparse kernels there"
            self.reason = f"on {module.weight.device.type}: {reason}"

    def totals(self) -> tuple[float, float] | None:
        """(dense, sparse) microseconds of all calls in one forward pass."""
        if not self.costs:
            return None
        dense, sparse = (
            sum(self.calls[key] * cost[name] for key, cost in self.costs.items())
            for name in ("dense", "sparse")
        )
        return dense, sparse

    def gain(self) -> float:
        dense, sparse = self.totals()
        return dense - sparse

    def judge(self, margin: float) -> None:
        """Chooses by what was measured."""
        if self.failed or not self.costs:
            self.chosen = "dense"
            self.reason = self.reason or "never called on the example inputs"
            return
        dense, sparse = self.totals()
        faster = dense >= sparse * (1 + margin)
        self.chosen = "sparse" if faster else "dense"
        self.reason = f"{dense / sparse:.2f}x" + ("" if faster else f": not {margin:.0%} faster")

    def row(self) -> LayerChoice:
        dense, sparse = self.totals() or (None, None)
        return LayerChoice(
            names=tuple(self.names),
            kind=_kind(self.module),
            shape=_shape(self.module),
            density=self.density,
            inputs=tuple(dict.fromkeys(tuple(key[0]) for key in self.calls)),
            calls=sum(self.calls.values()),
            dense_us=dense,
            sparse_us=sparse,
            chosen=self.chosen,
            reason=self.reason or "",
        )


class _Network:
    """The model, its layers, and the call that stands for its use."""

    def __init__(self, model: nn.Module, example):
        self.layers = _find_layers(model)
        self.model = model
        self._slots = Slots(model, [layer.module for layer in self.layers])
        self._args, self._kwargs = call_arguments(example)

    def use_chosen(self) -> None:
        self.model = self._slots.put([layer.forms[layer.chosen] for layer in self.layers])

    def use_dense(self) -> None:
        """Dense wherever there is a dense form."""
        forms = [layer.forms.get("dense", layer.module) for layer in self.layers]
        self.model = self._slots.put(forms)

    def use_found(self) -> None:
        """As the model came."""
        self.model = self._slots.put([layer.module for layer in self.layers])

    def run(self) -> object:
        return self.model(*self._args, **self._kwargs)


def sparsify(
    model: nn.Module,
    example_inputs,
    policy: str = "auto",
    *,
    inplace: bool = False,
    margin: float = 0.05,
    seconds: float = 0.03,
    num_threads: int | None = None,
) -> tuple[nn.Module, SparsifyReport]:
    """Runs each nn.Conv2d and nn.Linear sparse where that was measured to be faster.

    The zeros may come from any tool; pruning hooks of torch.nn.utils.prune and parametrizations are
    made permanent. Each layer is timed on the inputs it really gets, in their dtype and layout and
    under the autocast in force, against its plain dense form; one called with several shapes counts
    by the sum. A layer runs sparse if it was faster by `margin` twice, in two passes over the
    network. Then the network as a whole is timed against its dense form, and while it is not faster
    the half of the sparse layers that gained least goes back to dense.

    Args:
        model: in eval mode; a layer in training mode is left as it is.
        example_inputs: a tensor, a tuple or list of arguments, or a dict of keyword arguments, as
            in use: the choice is only good for inputs of this shape. With policy "always" also None
            (nothing is timed).
        policy: "auto", or "always": every layer that has a zero, unmeasured.
        inplace: change `model` itself. By default it is left untouched and a copy is converted.
        margin: 0.05 is 5 % faster.
        seconds: least time spent on each form of each layer in each pass; ten times that on the
            network.
        num_threads: torch's threads while measuring; default as set.

    Returns:
        (model, report). Parameters keep their names, so training and state dicts go on as before,
        with `mask` added. A layer found not to pay, even a sparse one, is a plain dense layer with
        exact zeros. Use the model returned: a bare layer cannot change in place.

    Raises:
        ValueError: an unknown policy, or no example to measure on. What the model raises on the
            example comes through, and `model` is then as it was.
    """
    if policy not in POLICIES:
        raise ValueError(f"unknown policy {policy!r}; known: {', '.join(POLICIES)}")
    if example_inputs is None and policy == "auto":
        raise ValueError("policy 'auto' measures: it needs example_inputs")
    net = _Network(model if inplace else copy_model(model), example_inputs)
    samples = None
    with evaluating(net.model), threads(num_threads):
        try:
            for layer in net.layers:
                layer.prepare()
            if policy == "auto":
                _choose(net, margin, seconds)
            else:
                _choose_all(net.layers)
            if example_inputs is not None:
                samples = _settle(net, 10 * seconds, revert=policy == "auto")
            net.use_chosen()
        except BaseException:
            net.use_found()
            raise
        facts = machine_facts()
    for layer in net.layers:
        adopt_hooks(layer.forms[layer.chosen])
    return net.model, SparsifyReport(
        policy=policy,
        layers=tuple(layer.row() for layer in net.layers),
        dense_us=samples["dense"].median_us if samples else None,
        sparse_us=samples["now"].median_us if samples else None,
        speedup=speedup(samples["dense"], samples["now"]) if samples else None,
        margin=margin,
        machine=facts,
    )


def densify(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Plain nn.Conv2d and nn.Linear again, with exact zeros where weights were pruned.

    A mask that is being learned is taken as it stands. Hooks, Parameters and modes are kept. By
    default a copy is converted. Use the model returned: a bare layer cannot change in place.
    """
    net = _Network(model if inplace else copy_model(model), ())
    for layer in net.layers:
        module = layer.module
        if isinstance(module, _SPARSE):
            module.freeze_mask()
            kind = nn.Conv2d if isinstance(module, nn.Conv2d) else nn.Linear
            layer.forms["dense"] = adopt_hooks(carry_over(module, like(module, kind)))
    net.use_dense()
    return net.model


def _choose_all(layers: list[_Layer]) -> None:
    for layer in layers:
        if layer.reason is None:
            layer.chosen, layer.reason = "sparse", "policy"


def _choose(net: _Network, margin: float, seconds: float) -> None:
    """Chooses layer by layer, in two passes: the second is for those that won the first."""
    contest = [layer for layer in net.layers if layer.reason is None]
    for layer in contest:
        if 1 - layer.density < LEAST_ZEROS:
            layer.chosen, layer.reason = "dense", f"only {1 - layer.density:.1%} zeros"
    contest = [layer for layer in contest if layer.reason is None]
    for first in (True, False):
        _measure_pass(net, contest, seconds, count_calls=first)
        for layer in contest:
            layer.judge(margin)
        contest = [layer for layer in contest if layer.chosen == "sparse"]


def _measure_pass(net: _Network, timed: list[_Layer], seconds: float, count_calls: bool) -> None:
    """One forward pass in which layers are timed on the very inputs they are called with.

    At once, inside a hook: to keep every input for later could take more memory than the network.
    """
    done: set[tuple] = set()

    def hook_of(layer: _Layer, time_it: bool):
        def hook(module, args, kwargs):
            x = args[0] if args else kwargs["input"]
            key = (x.shape, x.stride(), x.dtype)
            if count_calls:
                layer.calls[key] = layer.calls.get(key, 0) + 1
            if time_it and key in layer.calls and (id(layer), key) not in done:
                done.add((id(layer), key))
                _time_layer(layer, key, x, seconds)

        return hook

    handles = []
    net.use_found()
    try:
        for layer in net.layers:
            hook = hook_of(layer, layer in timed)
            handles.append(layer.module.register_forward_pre_hook(hook, with_kwargs=True))
        with torch.no_grad():
            net.run()
    finally:
        for handle in handles:
            handle.remove()


def _time_layer(layer: _Layer, key: tuple, x: Tensor, seconds: float) -> None:
    dense, sparse = layer.bare["dense"], layer.bare["sparse"]
    functions = {"dense": lambda: dense(x), "sparse": lambda: sparse(x)}
    try:
        with torch.inference_mode():
            want, got = dense(x), sparse(x)
        if problem := _differs(got, want):
            layer.failed, layer.reason = True, problem
            return
        if want.stride() != got.stride() and want.dim() == 4:
            # The next layer would pay for the other memory format.
            functions["sparse"] = lambda: sparse(x).contiguous(memory_format=torch.channels_last)
        samples = measure(functions, seconds=seconds, rounds=_ROUNDS)
    except (RuntimeError, ValueError) as error:
        layer.failed, layer.reason = True, f"failed: {error}"
        return
    layer.costs[key] = {name: sample.median_us for name, sample in samples.items()}


def _differs(got: Tensor, want: Tensor) -> str | None:
    """Why two outputs are not the same layer's, in the precision of their dtype; else None."""
    if got.shape != want.shape or got.dtype != want.dtype:
        return (
            f"sparse gives {got.dtype} {tuple(got.shape)}, dense {want.dtype} {tuple(want.shape)}"
        )
    if want.numel() == 0:
        return None
    scale = want.double().nan_to_num(0, 0, 0).abs().max().item()
    tolerance = 1e-3 if want.dtype in (torch.float32, torch.float64) else 5e-2
    error = (got.double() - want.double()).nan_to_num(0, 0, 0).abs().max().item()
    return None if error <= tolerance * max(scale, 1e-30) else f"outputs differ by {error:.2g}"


def _settle(net: _Network, seconds: float, revert: bool) -> dict[str, Sample]:
    """Times the network dense and as chosen; with `revert`, again until that is not slower."""
    while True:
        samples = measure(
            {"dense": net.run, "now": net.run},
            seconds=seconds,
            rounds=_NETWORK_ROUNDS,
            setup={"dense": net.use_dense, "now": net.use_chosen},
        )
        chosen = [layer for layer in net.layers if layer.chosen == "sparse" and layer.costs]
        if not revert or not chosen or speedup(samples["dense"], samples["now"]) >= 1:
            return samples
        chosen.sort(key=_Layer.gain)
        for layer in chosen[: (len(chosen) + 1) // 2]:
            layer.chosen = "dense"
            layer.reason += ", but the whole network was no faster with it"


def _find_layers(model: nn.Module) -> list[_Layer]:
    for module in list(model.modules()):
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            make_permanent(module)
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, (_ConvNd, nn.Linear)):
            names.setdefault(module, []).append(name)
    return [_Layer(module, aliases) for module, aliases in names.items()]


def _why_not(module: nn.Module) -> str | None:
    """Why a layer cannot have a sparse form; None if it can."""
    kind = type(module)
    if not isinstance(module, (nn.Conv2d, nn.Linear)):
        return f"no sparse {kind.__name__}"
    if kind not in (nn.Conv2d, nn.Linear, *_SPARSE):
        return f"{kind.__name__} is a subclass that may run code of its own"
    weight = module._parameters.get("weight")
    if weight is None or isinstance(weight, UninitializedParameter):
        return "its weight is computed, not a Parameter, or not yet initialised"
    if "forward" in vars(module):
        return "its forward has been replaced"
    if not weight.is_floating_point():
        return f"{weight.dtype} weight"
    if weight.numel() == 0 or weight.is_meta:
        return "its weight has no data"
    if module.training:
        return "in training mode: call model.eval() first"
    if isinstance(module, _SPARSE) and module.scores is not None:
        return "its mask is being learned: freeze_mask() first"
    return None


def _shape(module: nn.Module) -> tuple[int, ...]:
    weight = getattr(module, "weight", None)
    known = isinstance(weight, Tensor) and not isinstance(weight, UninitializedParameter)
    return tuple(weight.shape) if known else ()


def _density(module: nn.Module) -> float:
    if isinstance(module, _SPARSE):
        return module.density
    if not _shape(module) or module.weight.is_meta or not module.weight.numel():
        return 1.0
    return int(module.weight.detach().count_nonzero()) / module.weight.numel()


def _kind(module: nn.Module) -> str:
    if not isinstance(module, _ConvNd):
        return "linear"
    word = "conv " + "x".join(map(str, module.kernel_size))
    if any(s != 1 for s in module.stride):
        word += f" /{'x'.join(map(str, dict.fromkeys(module.stride)))}"
    if any(d != 1 for d in module.dilation):
        word += f" d{'x'.join(map(str, dict.fromkeys(module.dilation)))}"
    return word + (f" g{module.groups}" if module.groups != 1 else "")


def call_arguments(example) -> tuple[tuple, dict]:
    """(args, kwargs) of example inputs: a tensor, a tuple or list of arguments, or a dict."""
    if isinstance(example, Mapping):
        return (), dict(example)
    return (tuple(example), {}) if isinstance(example, (tuple, list)) else ((example,), {})
