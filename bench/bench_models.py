"""Whole networks of the zoo: dense in every way torch has, against `dass.sparsify`.

python -m bench.bench_models --network mobilenet_v2 resnet18 --sparsity 0.9 0.95 --json out.json
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator

import torch

from bench import cases, session
from bench.contest import Contest, Entry, entries
from bench.layers import seed
from dass import zoo
from dass.convert import densify, sparsify
from dass.pruning import prune
from dass.timing import dense_variants


def sparsified(sparsities: Iterable[float], networks: Iterable[str]) -> Iterator[Contest]:
    for name in networks:
        for sparsity in sparsities:
            yield network_contest(name, sparsity)


def network_contest(
    name: str,
    sparsity: float,
    batch: int = 1,
    policies: tuple[str, ...] = ("auto",),
    threads: int = 1,
) -> Contest:
    """A pruned network after ``sparsify`` against the same network dense.

    Baselines: ``eager``, the dense network as it was given, and ``dense``, the fastest of all ways
    that torch has to run it. The masks are uniform magnitude masks of random weights.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = zoo.create(name).eval()
    prune(model, sparsity)
    x = torch.randn(batch, *zoo.input_shape(name), generator=seed(name, batch))
    dense = densify(model)
    found, swapped = {}, {}
    for policy in policies:
        fast, report = sparsify(dense, x, policy, num_threads=threads)
        found[policy] = Entry(lambda fast=fast: fast(x))
        chosen = sum(row.chosen == "sparse" for row in report.layers)
        swapped[policy] = f"{chosen} of {len(report.layers)}"
    variants = dense_variants(dense, x)
    return Contest(
        group="sparsify",
        kind=name,
        label=f"{name} b{batch}",
        sparsity=sparsity,
        entries={**found, **entries(variants)},
        baselines={"eager": ("nchw",), "dense": tuple(variants)},
        threads=threads,
        tolerance=1e-3,  # 50 layers of float32
        facts={"sparse_layers": swapped},
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    session.add_common_arguments(parser)
    parser.add_argument("--network", nargs="+", default=["mobilenet_v2", "resnet18"])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--sparsity", type=float, nargs="+", default=cases.SPARSITIES)
    parser.add_argument("--policy", nargs="+", default=["auto"], choices=["auto", "always"])
    options = session.parse(parser, arguments)
    session.run(
        (
            network_contest(name, s, options.batch, tuple(options.policy), options.threads)
            for name in options.network
            for s in options.sparsity
        ),
        options,
    )


if __name__ == "__main__":
    main()
