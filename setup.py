"""Builds dass_kernels._C with CMake. Compiler flags live in CMakeLists.txt."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import SetupError

ROOT = Path(__file__).resolve().parent


def torch_root():
    """The installed torch package, or None.

    An isolated build (plain ``pip install .``) hides the environment's packages from imports, but
    only torch's headers and libraries are needed, and those lie where the environment keeps them.
    """
    spec = find_spec("torch")
    if spec is not None and spec.origin:
        return Path(spec.origin).parent
    for key in ("purelib", "platlib"):
        candidate = Path(sysconfig.get_paths()[key]) / "torch"
        if (candidate / "include").is_dir():
            return candidate
    return None


def package_version():
    text = (ROOT / "pyproject.toml").read_text()
    return re.search(r'^version = "(.+)"$', text, re.M).group(1)


def torch_version(root):
    text = (root / "version.py").read_text()
    return re.search(r"__version__ = '([^']+)'", text).group(1)


def tool_path():
    """Where cmake and ninja are looked for: this environment first, which need not be activated."""
    return os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])


class CMakeBuild(build_ext):
    def build_extension(self, ext):
        import pybind11

        root = torch_root()
        if root is None:
            raise SetupError("torch is not installed: `pip install torch` first, then install dass")
        out = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = ROOT / "build" / ("asan" if os.environ.get("DASS_SANITIZE") == "1" else "cmake")
        path = tool_path()
        env = {**os.environ, "PATH": path}
        args = [
            # Given anew each time: an isolated build's ninja is gone when the next build starts.
            f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja', path=path)}",
            f"-DPython3_EXECUTABLE={sys.executable}",
            f"-DTORCH_ROOT={root}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={out}",
            f"-DDASS_VERSION={package_version()}",
            f"-DDASS_TORCH_VERSION={torch_version(root)}",
            f"-DDASS_SANITIZE={'ON' if os.environ.get('DASS_SANITIZE') == '1' else 'OFF'}",
        ]
        subprocess.check_call(
            [
                "cmake",
                "-S",
                str(ROOT),
                "-B",
                str(build),
                "-G",
                "Ninja",
                "-DCMAKE_BUILD_TYPE=None",
                *args,
            ],
            env=env,
        )
        subprocess.check_call(["cmake", "--build", str(build)], env=env)


setup(
    ext_modules=[Extension("dass_kernels._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    # Read by an isolated build, which then gets torch only if the environment has none.
    setup_requires=[] if torch_root() else ["torch>=2.10"],
)
