"""Operations on the inside of a model: copy it, still it, exchange layers and put them back.

They leave everything but the layers themselves as it was: Parameters, hooks, modes, shared modules.
"""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils import prune as torch_prune

from dass.nn import SparseLinear

_SPARSE_ONLY = vars(SparseLinear(1, 1)).keys() - vars(nn.Linear(1, 1)).keys()
_SPARSE_TENSORS = ("mask", "scores")


class Slots:
    """Every place of a model that holds one of some layers, to exchange those in no time.

    layers: the modules as the model has them now; each must not be replaced by other means.
    """

    def __init__(self, model: nn.Module, layers: list[nn.Module]):
        self._root = model
        number = {id(layer): i for i, layer in enumerate(layers)}
        self._is_root = number.get(id(model))
        self._places = [
            (parent._modules, key, number[id(child)])
            for parent in list(model.modules())
            for key, child in parent._modules.items()
            if id(child) in number
        ]

    def put(self, layers: list[nn.Module]) -> nn.Module:
        """Puts the layers in, in the constructor's order, and returns the model: another object if
        the model is itself one of the layers."""
        for modules, key, i in self._places:
            modules[key] = layers[i]
        return self._root if self._is_root is None else layers[self._is_root]


def carry_over(old: nn.Module, new: nn.Module) -> nn.Module:
    """Gives `new` what else `old` has: mode, hooks, attributes, further buffers and submodules.

    Hook tables are shared, not copied: a RemovableHandle removes from the table it was made for.
    """
    mine = vars(new)
    for key, value in vars(old).items():
        if key in ("_parameters", "_buffers", "_modules"):
            extra = {k: v for k, v in value.items() if k not in mine[key]}
            mine[key].update({k: v for k, v in extra.items() if k not in _SPARSE_TENSORS})
            continue
        shared = key in ("training", "_is_full_backward_hook") or "_hooks" in key
        if shared or (key not in mine and key not in _SPARSE_ONLY):
            mine[key] = value
    return new


def adopt_hooks(module: nn.Module) -> nn.Module:
    """Points the hooks that know their module at the one they are on now."""
    for key, table in vars(module).items():
        if key.endswith("_hooks") and isinstance(table, dict):
            for hook in table.values():
                if getattr(hook, "with_module", False):
                    hook.module = weakref.ref(module)
    return module


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode for a block: nothing may be learned from example inputs."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, training in modes:
            if training:
                module.training = False
        yield
    finally:
        for module, training in modes:
            if training:
                module.training = True


def copy_model(model: nn.Module) -> nn.Module:
    """deepcopy, also of weights that torch.nn.utils.prune left as the result of a computation."""
    computed = [
        (vars(module), key, value)
        for module in model.modules()
        for key, value in vars(module).items()
        if isinstance(value, Tensor) and not value.is_leaf
    ]
    try:
        for attributes, key, value in computed:
            attributes[key] = value.detach()
        return copy.deepcopy(model)
    finally:
        for attributes, key, value in computed:
            attributes[key] = value


def make_permanent(module: nn.Module) -> None:
    """Turns a weight computed by torch.nn.utils.prune or a parametrization into a Parameter."""
    if parametrize.is_parametrized(module):
        # A copied module shares its one-off class with the original, which must keep its property.
        kind = type(module)
        members = {k: v for k, v in vars(kind).items() if k not in ("__dict__", "__weakref__")}
        module.__class__ = type(kind.__name__, kind.__bases__, members)
        for name in list(module.parametrizations):
            parametrize.remove_parametrizations(module, name, leave_parametrized=True)
    for hook in list(module._forward_pre_hooks.values()):
        if isinstance(hook, torch_prune.BasePruningMethod):
            torch_prune.remove(module, hook._tensor_name)
