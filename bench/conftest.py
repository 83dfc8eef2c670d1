"""Options of `pytest bench/bench_ops.py`."""


def pytest_addoption(parser):
    group = parser.getgroup("bench")
    group.addoption(
        "--full",
        action="store_true",
        help="every layer shape of the zoo, every sparsity, every instruction set and dtype",
    )
    group.addoption("--dlmc", help="the DLMC matrices too, from this path (or DASS_DLMC)")
