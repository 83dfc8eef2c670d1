"""Fixtures of the kernel tests, and the lines the summary ends with."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import settings

import dass_kernels
from dass_kernels import testing

# No deadline: a loaded machine is not a bug. The same examples on every CI run.
settings.register_profile("dass", deadline=None, max_examples=40, print_blob=True)
settings.register_profile("dass_ci", settings.get_profile("dass"), derandomize=True)
settings.register_profile("thorough", settings.get_profile("dass"), max_examples=1000)
settings.load_profile("dass_ci" if os.environ.get("CI") else "dass")

REPORT = pytest.StashKey[list]()


@pytest.fixture(params=dass_kernels.available_isas())
def isa(request):
    """Runs the test once per instruction set of this machine."""
    with testing.isa(request.param):
        yield request.param


@pytest.fixture
def poisoned():
    """Uninitialised memory is NaN: what torch.empty gives, and the kernels' own scratch.

    In deterministic mode torch fills each new tensor that an op has not written yet.
    """
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    testing.poison_scratch()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def one_thread():
    """One thread, then as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def report(request):
    """Appends a line to the summary that pytest prints at the end."""
    lines = request.config.stash.setdefault(REPORT, [])
    return lines.append


def pytest_terminal_summary(terminalreporter, config):
    lines = config.stash.get(REPORT, [])
    if lines:
        terminalreporter.section("dass")
        for line in lines:
            terminalreporter.write_line(line)
