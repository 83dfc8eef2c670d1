"""From a model to the graph: torch.export, then node by node (`dass.engine.translate`)."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram, export

from dass.convert import densify
from dass.engine.builder import BATCH, Builder, NoStep, Value, is_batch
from dass.engine.graph import Graph
from dass.engine.translate import ALIASES, STEPS

__all__ = ["capture"]


def capture(model: nn.Module, example: Tensor) -> Graph:
    """The graph of a model in eval mode; weights float64, exact copies of the model's.

    Masked layers count as plain ones whose weights contain zeros. The graph is good for any batch
    where torch.export finds the model to be, else for the example's (`Graph.batch`). An operation
    without a node of its own becomes a Torch node with the reason.

    Args:
        model: float32, on the CPU; it is left as it is.
        example: float32 [B, C, H, W].

    Raises:
        ValueError: a model in training mode or of another dtype or device, another example, several
            inputs or outputs, or a model that torch.export or the graph has no form for.
    """
    _check(model, example)
    program, batch = _export(densify(model), example)
    inputs, outputs = program.graph_signature.user_inputs, program.graph_signature.user_outputs
    if len(inputs) != 1 or len(outputs) != 1 or not program.call_spec.out_spec.is_leaf():
        raise ValueError(
            "the model must take one tensor and return one tensor; this one has "
            f"{len(inputs)} inputs and {len(outputs)} outputs, or returns a container"
        )
    graph = _Capture(program, batch).run()
    graph.batch = batch
    return graph


def _check(model: nn.Module, example: Tensor) -> None:
    if not isinstance(example, Tensor):
        raise ValueError(
            f"example must be one tensor [B, C, H, W], got {type(example).__name__}: models with "
            "several inputs are not supported"
        )
    if example.dim() != 4 or example.dtype != torch.float32:
        raise ValueError(
            f"example must be float32 [B, C, H, W], got {example.dtype} {list(example.shape)}"
        )
    for name, module in model.named_modules():
        if module.training:
            raise ValueError(f"{name or 'the model'} is in training mode: call model.eval() first")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise ValueError(f"{name} is {tensor.dtype}: the model must be float32 (model.float())")
        if tensor.device.type != "cpu":
            raise ValueError(f"{name} is on {tensor.device}: the model must be on the CPU")


def _export(model: nn.Module, example: Tensor) -> tuple[ExportedProgram, int | None]:
    """The program, and the batch that it is bound to."""
    two = torch.cat([example[:1], example[:1]])  # a batch of one would be taken for a constant
    with torch.no_grad():
        try:
            return export(model, (two,), dynamic_shapes=({0: Dim("batch")},)), None
        except Exception:
            pass  # its code fixes the batch, or is wrong: the second attempt will tell
        try:
            return export(model, (example,)), len(example)
        except Exception as error:
            raise ValueError(f"torch.export cannot capture the model: {error}") from error


class _Capture:
    """One pass over the exported nodes; ``values`` has what each of them is in the graph."""

    def __init__(self, program: ExportedProgram, batch: int | None):
        self.program, self.builder = program, Builder(batch)
        self.values: dict[fx.Node, object] = {}
        self.root: dict[fx.Node, fx.Node] = {}  # the node whose memory it shares
        self.order = {node: i for i, node in enumerate(program.graph.nodes)}

    def run(self) -> Graph:
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                self.values[node] = self._placeholder(node)
            elif node.op == "call_function":
                self.values[node] = self._call(node)
            elif node.op == "output":
                (result,) = node.args[0]
                return self._finish(result)
            else:
                raise ValueError(f"the model contains {node.op} {node.target}: not supported")
        raise AssertionError("an exported graph ends in its output")

    def _finish(self, result: fx.Node) -> Graph:
        value = self.values.get(result)
        if not isinstance(value, Value):
            raise ValueError("the model's output does not depend on its input")
        value = self.builder.exact(value, self.builder.logical(result))
        return Graph(self.builder.nodes, [value.name])

    def _placeholder(self, node: fx.Node) -> object:
        self.root[node] = node
        signature = self.program.graph_signature
        if node.name in signature.user_inputs:
            return self.builder.input(node)
        for names, store in (
            (signature.inputs_to_parameters, self.program.state_dict),
            (signature.inputs_to_buffers, self.program.state_dict),
            (signature.inputs_to_lifted_tensor_constants, self.program.constants),
        ):
            if node.name in names:
                name = names[node.name]
                found = store[name] if name in store else self.program.constants[name]
                return found.detach()
        raise ValueError(f"the model has an input {node.name} that is no tensor: not supported")

    def _call(self, node: fx.Node) -> object:
        meta = node.meta.get("val")
        if isinstance(meta, torch.SymInt):
            return self._size(node, meta)
        if meta is None or isinstance(meta, (int, float, bool)):
            return meta  # an assertion about shapes, or a number that export has worked out
        if node.target.__class__.__name__ == "builtin_function_or_method":
            source, index = node.args  # getitem: one tensor of several
            self.root[node] = self.root.get(source, source)
            return self.values[source][index]
        if not isinstance(node.target, torch._ops.OpOverload):
            raise ValueError(f"the model contains {node.target}: not supported")
        self.root[node] = self._root(node)
        args, kwargs = fx.map_arg((node.args, node.kwargs), self._decode)
        if not any(isinstance(self.values.get(arg), Value) for arg in node.all_input_nodes):
            return node.target(*args, **kwargs)
        name = str(node.target)
        try:
            if name not in STEPS:
                raise NoStep(f"the engine has no step for {name}")
            value = STEPS[name](self.builder, node, *args, **kwargs)
        except NoStep as reason:
            value = self.builder.fallback(node, self.values, str(reason))
        if node.target._schema.is_mutable:
            self._rebind(node, value)
        return value

    def _size(self, node: fx.Node, size: torch.SymInt) -> object:
        if is_batch(size):
            return BATCH
        raise ValueError(f"{node.name} is a size computed from the batch's, {size}: not supported")

    def _decode(self, node: fx.Node) -> object:
        return self.values[node]

    def _root(self, node: fx.Node) -> fx.Node:
        """The node whose memory this one's result shares, by the operation's schema."""
        source = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
        returns = node.target._schema.returns
        shares = str(node.target) in ALIASES or any(each.alias_info for each in returns)
        return self.root.get(source, source) if shares and source is not None else node

    def _rebind(self, node: fx.Node, value: object) -> None:
        """After a change in place, every name of the tensor stands for what it has become."""
        old = self.values[node.args[0]]
        for other, root in self.root.items():
            if root is not self.root[node] or other is node:
                continue
            if self.values[other] is old:
                self.values[other] = value
            elif any(self.order[user] > self.order[node] for user in other.users):
                raise ValueError(
                    f"{node.name} changes a tensor in place of which {other.name} is a view: "
                    "not supported"
                )
