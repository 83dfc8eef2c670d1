"""The repository itself: which way it depends, what its documents show, what it ships."""

import doctest
import importlib.util
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import dass_kernels
from dass_kernels import formats

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.skipif(
    not (ROOT / "scripts" / "check_arrows.py").exists(), reason="not in the repository"
)


def _check_arrows():
    spec = importlib.util.spec_from_file_location(
        "check_arrows", ROOT / "scripts" / "check_arrows.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _hook(name):
    yaml = pytest.importorskip("yaml")
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    return next(h for repo in config["repos"] for h in repo["hooks"] if h["id"] == name)


@pytest.fixture
def small(tmp_path):
    """A repository with the files that the check reads, and nothing wrong with them."""
    for path, text in {
        "dass_kernels/__init__.py": '__all__ = ["conv2d", "pack"]\n',
        "dass_kernels/ops.py": "from . import _C\nfrom .formats import Packed\n",
        "dass/nn.py": "import dass_kernels as dk\nfrom dass_kernels import pack\ndk.conv2d, pack\n",
        "dass/zoo/net.py": "from .. import nn\nfrom . import other\nimport dass.nn\n",
        "tests/test_nn.py": "import bench, dass, dass_kernels._C\n",
        "csrc/cpu/kernels.h": "#include <cstdint>\n",
        "csrc/cpu/spmm.inl.h": '#include <immintrin.h>\n#include "kernels.h"\n',
        "csrc/cpu/isa.h": "#include <string>\n",
        "csrc/ops/conv.cpp": "#include <torch/csrc/stable/tensor.h>\n",
        "CMakeLists.txt": "add_compile_options(-O3 -mavx512f)\n",
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    return tmp_path


def test_the_arrows_hold():
    assert _check_arrows().violations(ROOT) == []


def test_the_check_passes_a_repository_without_violations(small):
    assert _check_arrows().violations(small) == []


# Flags are put together here, so that this file does not contain what it plants.
@pytest.mark.parametrize(
    ("path", "line", "says"),
    [
        ("dass_kernels/ops.py", "import dass", "must not import dass"),
        ("dass_kernels/ops.py", "from dass.masks import project", "must not import dass"),
        ("dass_kernels/ops.py", "def f():\n    import bench.cases", "must not import bench"),
        ("dass_kernels/ops.py", "import_module('dass.nn')", "must not import dass"),
        ("dass/nn.py", "from tests import helpers", "must not import tests"),
        ("dass/nn.py", "import dass_kernels.formats", "dass_kernels.formats is private"),
        ("dass/nn.py", "from dass_kernels.formats import Packed", "is private"),
        ("dass/nn.py", "from dass_kernels import _C", "does not export _C"),
        ("dass/nn.py", "from dass_kernels import hidden as pack", "does not export hidden"),
        ("dass/nn.py", "dk.formats.MAGIC", "does not export formats"),
        ("csrc/cpu/spmm.inl.h", "#include <vector>", "must not include <vector>"),
        ("csrc/cpu/spmm.inl.h", "# include <algorithm>", "must not include <algorithm>"),
        ("csrc/cpu/kernels.h", '#include "isa.h"', 'must not include "isa.h"'),
        ("csrc/cpu/kernels.h", "#include <torch/csrc/stable/tensor.h>", "must not include torch"),
        ("csrc/cpu/isa.h", "#include <ATen/ATen.h>", "must not include ATen"),
        ("csrc/cpu/isa.h", '#include "../ops/pack.h"', "must not include ../ops"),
        ("CMakeLists.txt", "add_compile_options(-march=" + "native)", "is not allowed"),
        ("csrc/ops/conv.cpp", '#pragma GCC optimize("fast-' + 'math")', "is not allowed"),
    ],
)
def test_the_check_finds_a_planted_violation(small, path, line, says):
    with (small / path).open("a") as file:
        file.write(line + "\n")
    found = _check_arrows().violations(small)
    assert len(found) == 1
    assert found[0].startswith(path)
    assert says in found[0]


def test_the_check_fails_as_a_command(small):
    command = [sys.executable, ROOT / "scripts" / "check_arrows.py", small]
    assert subprocess.run(command, capture_output=True).returncode == 0
    (small / "dass_kernels" / "ops.py").write_text("import dass\n")
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 1
    assert ran.stdout == "dass_kernels/ops.py:1: dass_kernels must not import dass\n"


@pytest.mark.parametrize(
    ("hook", "path", "bad", "good"),
    [
        ("kernels-below-dass", "dass_kernels/ops.py", "    from dass.nn import x", "import dassel"),
        ("kernels-below-dass", "dass_kernels/triton/spmm.py", "import dass", "from .ops import y"),
        ("kernel-includes", "csrc/cpu/spmm.inl.h", "#include <vector>", "#include <cstdint>"),
        ("kernel-includes", "csrc/cpu/vec.h", "#include <torch/x.h>", '#include "kernels.h"'),
        ("kernel-includes", "csrc/cpu/kernels.cpp", "# include <string>", "// <string>"),
    ],
)
def test_the_hooks_find_a_planted_violation(hook, path, bad, good):
    config = _hook(hook)
    assert re.search(config["files"], path)
    assert re.search(config["entry"], bad)
    assert not re.search(config["entry"], good)


def test_the_includes_hook_leaves_the_dispatcher_alone():
    assert not re.search(_hook("kernel-includes")["files"], "csrc/cpu/isa.cpp")


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
@pytest.mark.parametrize("isa", ["avx2", "avx512"])
def test_kernel_objects_define_nothing_that_other_code_could_link_to(isa):
    objects = sorted((ROOT / "build" / "cmake").glob(f"CMakeFiles/kernels_{isa}.dir/**/*.o"))
    if not objects:
        pytest.skip("no build folder, or not this processor's instruction set")
    listed = subprocess.run(
        ["nm", "-C", "--defined-only", *objects], capture_output=True, text=True, check=True
    ).stdout
    symbols = re.findall(r"^[0-9a-f]+ ([A-Za-z]) (.+)$", listed, re.M)
    assert symbols
    # Upper case, w and u: visible to the linker. V and W are the copies it may choose between.
    visible = [name for kind, name in symbols if kind.isupper() or kind in "wu"]
    allowed = re.compile(rf"dass::({isa}::|kTable)|.* dass::{isa}::")
    assert [name for name in visible if not allowed.match(name)] == []


def _python_blocks(text):
    return re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)


def test_the_examples_of_the_formats_are_what_the_code_gives():
    text = "\n".join(_python_blocks((ROOT / "docs" / "formats.md").read_text()))
    test = doctest.DocTestParser().get_doctest(text, {}, "docs/formats.md", None, 0)
    assert len(test.examples) > 30
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    said = []
    runner.run(test, out=said.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(said)


def _header_words():
    """The words' names by number: in Python and in C++."""
    python = {
        word: name
        for name, word in vars(formats).items()
        if re.fullmatch("_[A-Z_]+", name) and isinstance(word, int)
    }
    text = (ROOT / "csrc" / "ops" / "pattern_words.h").read_text()
    enum = re.search(r"enum PatternWord : int \{(.*?)\};", text, re.S)[1]
    cpp = {int(word): name for name, word in re.findall(r"k(\w+) = (\d+)", enum)}
    return python, cpp


def test_both_sides_name_the_header_alike():
    python, cpp = _header_words()
    assert cpp.pop(16) == "HeaderWords"
    assert sorted(python) == list(range(16))
    for word, name in cpp.items():
        assert name.removesuffix("At").lower() == python[word].strip("_").replace("_", "").lower()
    text = (ROOT / "docs" / "formats.md").read_text()
    assert all(f"\n| {word} |" in text for word in range(16))


def test_the_readme_examples_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # what they save goes here
    blocks = _python_blocks((ROOT / "README.md").read_text())
    assert blocks
    scope = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), scope)


def test_the_documents_link_to_files_that_exist():
    for document in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text()):
            if "://" not in link:
                assert (document.parent / link).exists(), f"{document.name}: {link}"


def test_the_version_is_one():
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M)[1]
    assert dass_kernels.__version__ == version
    assert re.search(rf"^## \[(Unreleased|{re.escape(version)})\]", _changelog(), re.M)


def _changelog():
    return (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.slow
def test_the_source_distribution_has_what_a_build_needs(tmp_path):
    ran = subprocess.run(
        [sys.executable, "setup.py", "-q", "egg_info", "-e", tmp_path, "sdist", "-d", tmp_path],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    sources = {str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.is_file()}
    assert sources
    assert {"CMakeLists.txt", "setup.py", "pyproject.toml", "LICENSE"} | sources <= names
    assert "dass/zoo/found.json" in names
    assert not [name for name in names if name.endswith((".so", ".o"))]
