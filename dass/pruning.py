"""Pruning a whole model at once.

`dass.masks` decides which weights of a tensor stay; this module finds the layers and swaps them for
their sparse twins in place. `dass.schedule` does it step by step while the model trains.
"""

import difflib
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from fractions import Fraction

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import UninitializedParameter

from dass.masks import (
    SCOPES,
    keep_count,
    layer_counts,
    norm_kept,
    parse_pattern,
    pattern_capacity,
    pattern_fits,
    pattern_mask,
)
from dass.nn import SparseConv2d, SparseLinear
from dass.prune_report import LayerReport, PruneReport

METHODS = ("magnitude", "random")
EXCLUDE_WORDS = ("depthwise", "first", "last")
Score = Callable[[str, nn.Module], Tensor]


@dataclass(frozen=True)
class Rule:
    """How masks are chosen: the keywords that `prune` and `GradualPruner` share."""

    method: str | Score = "magnitude"
    scope: str = "uniform"
    pattern: str = "unstructured"
    floor: int | float = 1
    seed: int = 0
    densities: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self):
        if self.densities and parse_pattern(self.pattern).kind == "n:m":
            raise ValueError(
                f"pattern {self.pattern!r} fixes every density: no densities of layers"
            )
        if any(not 0 < density <= 1 for density in self.densities.values()):
            raise ValueError(f"densities must be in (0, 1], got {dict(self.densities)}")
        if not callable(self.method) and self.method not in METHODS:
            raise ValueError(
                f"unknown method {self.method!r}; known: {', '.join(METHODS)}, "
                "or a function (name, module) -> scores"
            )
        if self.scope not in SCOPES:
            raise ValueError(f"unknown scope {self.scope!r}; known: {', '.join(SCOPES)}")
        spec = parse_pattern(self.pattern)
        object.__setattr__(self, "pattern", spec.word)
        if spec.kind == "n:m" and self.scope != "uniform":
            raise ValueError(f"pattern {spec.word!r} fixes every density: scope must be 'uniform'")

    def check_sparsity(self, sparsity: float, name: str = "sparsity") -> None:
        if not 0 <= sparsity < 1:
            raise ValueError(f"{name} must be in [0, 1), got {sparsity}")
        spec = parse_pattern(self.pattern)
        if spec.kind == "n:m" and abs(sparsity - (1 - spec.n / spec.m)) > 1e-6:
            exact = 1 - spec.n / spec.m
            raise ValueError(f"pattern {spec.word!r} has {name} {exact:.6g}, got {sparsity}")

    def pattern_of(self, unit: "Unit") -> str:
        """The pattern, or "unstructured" where the layer's shape cannot hold it."""
        fits = pattern_fits(unit.weight.shape, self.pattern, unit.groups)
        return self.pattern if fits else "unstructured"

    def masks(self, units: "list[Unit]", sparsity: float, monotone: bool = False) -> list[Tensor]:
        """One mask per unit. monotone: inside the masks that the units have now."""
        spec = parse_pattern(self.pattern)
        if spec.kind == "n:m":
            sparsity = 1 - Fraction(spec.n, spec.m)
        scores = [self._scores(unit, i) for i, unit in enumerate(units)]
        caps = [pattern_capacity(unit.weight.shape, self.pattern_of(unit)) for unit in units]
        within = [mask_of(unit.modules[0]) if monotone else None for unit in units]
        if monotone:
            caps = [max(1, int(old.sum())) for old in within]
        named = self.named(units)
        free = [i for i in range(len(units)) if i not in named]
        counts = {i: min(keep_count(scores[i].numel(), d), caps[i]) for i, d in named.items()}
        if free:
            shapes = [tuple(units[i].weight.shape) for i in free]
            ranked = [scores[i] for i in free] if self.scope in ("global", "lamp") else None
            limits = [caps[i] for i in free]
            shared = layer_counts(shapes, sparsity, self.scope, ranked, self.floor, limits)
            counts |= zip(free, shared, strict=True)
        # A pattern that fits has no block across two groups: pattern_mask need not know of them.
        return [
            pattern_mask(score, counts[i] / score.numel(), self.pattern_of(unit), within=old)
            for i, (unit, score, old) in enumerate(zip(units, scores, within, strict=True))
        ]

    def named(self, units: "list[Unit]") -> dict[int, float]:
        """Index of a unit -> its own density; ValueError for a name that none has."""
        known = {name: i for i, unit in enumerate(units) for name in unit.names}
        if unknown := sorted(self.densities.keys() - known.keys()):
            raise ValueError(f"densities of layers that are not pruned: {', '.join(unknown[:3])}")
        return {known[name]: density for name, density in self.densities.items()}

    def _scores(self, unit: "Unit", index: int) -> Tensor:
        weight = unit.weight.detach()
        if self.method == "magnitude":
            return weight
        if self.method == "random":
            generator = torch.Generator().manual_seed(self.seed + index)
            return torch.rand(weight.shape, generator=generator).to(weight.device)
        scores = self.method(unit.names[0], unit.modules[0])
        if not isinstance(scores, Tensor) or scores.shape != weight.shape:
            got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise ValueError(
                f"scores of {unit.names[0]} must be a tensor {tuple(weight.shape)}, got {got}"
            )
        return scores.detach().to(weight.device)

    def report(self, units, masks, sparsity, skipped) -> PruneReport:
        rows = tuple(
            LayerReport(
                names=unit.names,
                shape=tuple(unit.weight.shape),
                weights=mask.numel(),
                kept=int(mask.sum()),
                norm_kept=norm_kept(unit.weight, mask),
                pattern=self.pattern_of(unit),
                norm=unit.weight.detach().double().norm().item(),
            )
            for unit, mask in zip(units, masks, strict=True)
        )
        method = getattr(self.method, "__name__", str(self.method))
        return PruneReport(sparsity, method, self.scope, self.pattern, rows, tuple(skipped))


def prune(
    model: nn.Module,
    sparsity: float,
    method: str | Score = "magnitude",
    scope: str = "uniform",
    pattern: str = "unstructured",
    exclude: str | Iterable[str] = (),
    floor: int | float = 1,
    seed: int = 0,
    densities: Mapping[str, float] | None = None,
    permute: bool = False,
    example_inputs: Tensor | tuple | None = None,
) -> PruneReport:
    """Prune `model` in place to `sparsity` in [0, 1) over its Conv2d and Linear weights.

    Each eligible layer becomes a SparseConv2d / SparseLinear with a frozen mask, under the same
    name, with the same Parameter objects, hooks, attributes and mode; a layer that is sparse
    already gets the new mask. Biases and other modules stay as they are. Eligible: exactly
    nn.Conv2d or nn.Linear (a subclass may run code of its own) and any sparse layer.

    method: "magnitude" (|w|), "random" (uniform, from `seed`), or a function (name, module) ->
        scores of the weight's shape, the largest |score| kept.
    scope: how the weights that stay are shared between layers: "uniform", "erk", "global" or
        "lamp", see `masks.layer_counts`. The scope decides how many from single weights, the
        pattern then decides which.
    pattern: see `masks.pattern_mask`; blocks are kept whole, so counts are rounded up to blocks.
    exclude: layers to leave alone: globs on module names (fnmatch; a match on a container holds for
        all below it) and the words "depthwise" (groups = in_channels > 1), "first" and "last" (by
        order of registration, over eligible layers). Default none, the setting of the DASS paper.
    floor: the least that a layer keeps, as a count (int) or a density (float in (0, 1)).
    densities: name of a layer -> its own density in (0, 1], such as what `edge_densities()` of a
        network of a searched genotype returns. Sparsity and scope are then those of the others.
    permute: first give the channels an order in which the pattern keeps more (`dass.permute`, which
        see; magnitude only), with `example_inputs`; a network of the zoo needs none.

    A module registered under several names stays one module. Layers tied by one weight Parameter
    stay tied, get one mask and count once. Raises ValueError where a weight is also used by a
    module that is not pruned, for unknown words, a sparsity outside [0, 1) or out of the pattern's
    reach, a glob that matches nothing, and a model without eligible layer; the model is then
    unchanged.
    """
    rule = Rule(method, scope, pattern, floor, seed, densities or {})
    rule.check_sparsity(sparsity)
    units, skipped = find_units(model, exclude)
    masks = rule.masks(units, sparsity)
    permuted = None
    if permute:
        from dass.permutation import example_of, permute_for  # which builds on this module

        inputs = example_of(model) if example_inputs is None else example_inputs
        permuted = permute_for(rule, model, inputs, units, sparsity)
        masks = rule.masks(units, sparsity)
    report = replace(rule.report(units, masks, sparsity, skipped), permuted=permuted)
    apply_masks(model, units, masks, rule)
    return report


@dataclass
class Unit:
    """The modules that share one weight Parameter (nearly always one), and all their names."""

    names: tuple[str, ...]
    modules: list[nn.Module]

    @property
    def weight(self) -> nn.Parameter:
        return self.modules[0].weight

    @property
    def groups(self) -> int:
        return getattr(self.modules[0], "groups", 1)


def find_units(
    model: nn.Module, exclude: str | Iterable[str]
) -> tuple[list[Unit], list[tuple[str, str]]]:
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    skipped, eligible = [], {}
    for module, aliases in names.items():
        reason = _why_not(module)
        if reason:
            skipped.append((aliases[0], reason))
        elif reason is None:
            eligible[module] = aliases
    for module, word in _excluded(eligible, names, exclude).items():
        skipped.append((eligible.pop(module)[0], f"excluded by {word!r}"))
    if not eligible:
        raise ValueError(f"no layer to prune in {type(model).__name__}; {skipped or 'none found'}")
    if model in eligible and not isinstance(model, (SparseConv2d, SparseLinear)):
        raise ValueError(
            f"a bare {type(model).__name__} cannot be swapped in place: wrap it in nn.Sequential"
        )
    units: dict[nn.Parameter, Unit] = {}
    for module, aliases in eligible.items():
        unit = units.setdefault(module.weight, Unit((), []))
        unit.names += tuple(aliases)
        unit.modules.append(module)
    _check_ties(names, units)
    return list(units.values()), skipped


def _why_not(module: nn.Module) -> str | None:
    """None: eligible. "": no layer with a weight of this kind. Else why it is left dense."""
    if not isinstance(module, (_ConvNd, nn.Linear)):
        return ""
    if not isinstance(module, (nn.Conv2d, nn.Linear)):
        return f"no sparse {type(module).__name__}"
    weight = module._parameters.get("weight")
    if "forward" in vars(module):
        return "its forward has been replaced"
    if isinstance(weight, UninitializedParameter):
        return "lazy: its shape is not known before the first forward"
    if weight is None:
        return "its weight is computed, not a Parameter"
    if type(module) not in (nn.Conv2d, nn.Linear) and not isinstance(
        module, (SparseConv2d, SparseLinear)
    ):
        return f"{type(module).__name__} is a subclass that may run code of its own"
    if not weight.is_floating_point():
        return f"{weight.dtype} weight"
    return "empty" if weight.numel() == 0 else None


def _excluded(eligible: dict, names: dict, exclude: str | Iterable[str]) -> dict[nn.Module, str]:
    """The eligible modules to leave alone, each with the glob or word that says so."""
    found: dict[nn.Module, str] = {}
    order = list(eligible)
    for glob in [exclude] if isinstance(exclude, str) else exclude:
        roots = [name for aliases in names.values() for name in aliases if fnmatchcase(name, glob)]
        hits = [
            module
            for module, aliases in eligible.items()
            if any(not r or a == r or a.startswith(r + ".") for a in aliases for r in roots)
        ]
        if glob == "depthwise":
            hits += [
                m for m in order if getattr(m, "groups", 1) == getattr(m, "in_channels", 0) > 1
            ]
        elif glob in ("first", "last"):
            hits += order[:1] if glob == "first" else order[-1:]
        elif not hits:
            known = [name for aliases in eligible.values() for name in aliases]
            close = difflib.get_close_matches(glob, known, n=5, cutoff=0) or known[:5]
            raise ValueError(
                f"exclude {glob!r} matches no layer that could be pruned; "
                f"closest: {', '.join(close)}; words: {', '.join(EXCLUDE_WORDS)}"
            )
        found.update((module, glob) for module in hits if module not in found)
    return found


def _check_ties(names: dict[nn.Module, list[str]], units: dict[nn.Parameter, Unit]) -> None:
    for module, aliases in names.items():
        for key, parameter in module._parameters.items():
            unit = units.get(parameter) if parameter is not None else None
            if unit and not (key == "weight" and any(module is m for m in unit.modules)):
                raise ValueError(
                    f"the weight of {unit.names[0]} is also {aliases[0]}.{key}, which is not "
                    f"pruned: exclude {unit.names[0]!r}, or untie them"
                )


def mask_of(module: nn.Module) -> Tensor:
    if isinstance(module, (SparseConv2d, SparseLinear)):
        return module.current_mask()
    return torch.ones_like(module.weight, dtype=torch.bool)


def apply_masks(model: nn.Module, units: list[Unit], masks: list[Tensor], rule: Rule) -> None:
    """Give every unit its mask; dense modules are replaced under every parent that holds them."""
    swapped: dict[nn.Module, nn.Module] = {}
    for unit, mask in zip(units, masks, strict=True):
        pattern = rule.pattern_of(unit)
        for i, module in enumerate(unit.modules):
            if isinstance(module, (SparseConv2d, SparseLinear)):
                module.pattern = pattern
                module.set_mask(mask)
            else:
                unit.modules[i] = swapped[module] = _sparse_twin(module, mask, pattern)
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if child in swapped:
                parent._modules[key] = swapped[child]


def _sparse_twin(module: nn.Module, mask: Tensor, pattern: str) -> nn.Module:
    kind = SparseConv2d if isinstance(module, nn.Conv2d) else SparseLinear
    twin = kind.from_dense(module, mask)
    twin.pattern = pattern
    for key, value in vars(module).items():
        if key not in vars(twin) or key in ("training", "_is_full_backward_hook"):
            vars(twin)[key] = value
        elif key in ("_parameters", "_buffers", "_modules"):
            vars(twin)[key].update({k: v for k, v in value.items() if k not in vars(twin)[key]})
        elif "_hooks" in key:
            # The dict itself moves: a RemovableHandle holds the dict it will remove from.
            value.update(vars(twin)[key])
            vars(twin)[key] = value
            for hook in value.values():
                if getattr(hook, "with_module", False):
                    hook.module = weakref.ref(twin)
    return twin
