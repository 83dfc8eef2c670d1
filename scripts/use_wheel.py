"""Uses the installed package once through: kernels, gradients, a pruned network, its engine, files.

Prints the versions; an assertion fails if a result is wrong. Run by scripts/wheel_torches.sh.
"""

import tempfile
from pathlib import Path

import torch

import dass
import dass_kernels as dk
from dass_kernels import testing

torch.manual_seed(0)
info = dk.build_info()
print(f"torch {torch.__version__}, built with torch {info['torch_built']}, isas {info['isas']}")
print(f"from {Path(dk.__file__).parent.relative_to(Path.cwd())}")

for isa in dk.available_isas():
    with testing.isa(isa):
        for fmt in testing.FORMATS:
            weight, mask = testing.random_weight((32, 16, 3, 3), 0.2, fmt)
            x, bias = testing.randn(5, 16, 9, 9), testing.randn(32)
            testing.check_conv2d(x, weight, mask, bias, format=fmt, activation="relu", padding=1)
            matrix, kept = testing.random_weight((32, 24), 0.3, fmt)
            testing.check_linear(testing.randn(3, 24), matrix, kept, bias, format=fmt)
print("conv2d, linear and their gradients: right on every instruction set, in every format")

conv = torch.nn.Conv2d(16, 32, 3, padding=1)
sparse = dass.SparseConv2d.from_dense(conv, torch.rand_like(conv.weight) < 0.1)
optimizer = torch.optim.SGD(sparse.parameters(), lr=0.1)
x, losses = torch.randn(4, 16, 8, 8), []
for _ in range(3):
    loss = sparse(x).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
assert losses[2] < losses[0], losses
print("three training steps of a SparseConv2d: the loss falls")

model = dass.zoo.create("resnet20").eval()
dass.prune(model, 0.95, exclude="first")
image = torch.randn(1, 3, 32, 32)
fast, report = dass.sparsify(model, image)
with torch.inference_mode():
    want = model(image)
    torch.testing.assert_close(fast(image), want, rtol=1e-3, atol=1e-3)
    with tempfile.TemporaryDirectory() as folder:
        dass.save(fast, f"{folder}/net.safetensors")
        again = dass.load(f"{folder}/net.safetensors")
    assert torch.equal(again(image), fast(image))
layers = [m for m in fast.modules() if isinstance(m, (dass.SparseConv2d, dass.SparseLinear))]
print(f"resnet20 at 95 % zeros: {len(layers)} layers sparse, saved and loaded, same outputs")

engine = dass.compile(model, image, cache=None)
with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
    torch.testing.assert_close(engine(image), want, rtol=1e-4, atol=1e-4)
    engine.save(f"{folder}/net.engine")
    again = dass.load_engine(f"{folder}/net.engine", cache=None)
    assert torch.equal(again(image), engine(image))
code = dk.emit_unavailable() or "with emitted code"
print(f"the same compiled ({code}), saved and loaded, same outputs")
