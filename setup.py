"""Builds dass_kernels._C, and on request dass_kernels._cuda, with CMake.

Compiler flags live in CMakeLists.txt. The CUDA library is built with ``DASS_CUDA=1``, or when nvcc
is found and the installed torch is one for CUDA; never by asking whether a GPU is present.
"""

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


def find_nvcc(root):
    """nvcc of DASS_NVCC, CUDA_HOME, the PATH, or the wheel nvidia-cuda-nvcc, else None."""
    home = os.environ.get("CUDA_HOME")
    places = [os.environ.get("DASS_NVCC"), f"{home}/bin/nvcc" if home else None, "nvcc"]
    places += sorted(map(str, root.parent.glob("nvidia/cu*/bin/nvcc")))
    return next((found for p in places if p and (found := shutil.which(p))), None)


def cuda_compiler(root):
    """The nvcc to build the CUDA library with, or None where it is not to be built."""
    wish = os.environ.get("DASS_CUDA", "")
    if wish == "0" or root is None or os.environ.get("DASS_SANITIZE") == "1":
        return None
    nvcc = find_nvcc(root)
    if wish == "1":
        if nvcc is None:
            raise SetupError(
                "DASS_CUDA=1, but no nvcc: set DASS_NVCC or CUDA_HOME, or install the wheels "
                "nvidia-cuda-nvcc, nvidia-cuda-crt, nvidia-nvvm, nvidia-cuda-runtime and "
                "nvidia-cuda-cccl"
            )
        return nvcc
    cuda_torch = re.search(r"^cuda\b.*= '", (root / "version.py").read_text(), re.M)
    return nvcc if cuda_torch else None


def tool_path():
    """Where cmake and ninja are looked for: this environment first, which need not be activated."""
    return os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])


class CMakeBuild(build_ext):
    def build_extension(self, ext):
        if ext.name != "dass_kernels._C":  # made by the same run of CMake
            return
        import pybind11

        root = torch_root()
        if root is None:
            raise SetupError("torch is not installed: `pip install torch` first, then install dass")
        out = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = ROOT / "build" / ("asan" if os.environ.get("DASS_SANITIZE") == "1" else "cmake")
        path = tool_path()
        env = {**os.environ, "PATH": path}
        nvcc = cuda_compiler(root)
        args = [
            # Given anew each time: an isolated build's ninja is gone when the next build starts.
            f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja', path=path)}",
            f"-DPython3_EXECUTABLE={sys.executable}",
            f"-DTORCH_ROOT={root}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={out}",
            f"-DDASS_VERSION={package_version()}",
            f"-DDASS_CUDA={'ON' if nvcc else 'OFF'}",
            f"-DDASS_NVCC={nvcc or ''}",
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


names = ["_C", "_cuda"] if cuda_compiler(torch_root()) else ["_C"]
setup(
    ext_modules=[Extension(f"dass_kernels.{name}", sources=[]) for name in names],
    cmdclass={"build_ext": CMakeBuild},
    # Read by an isolated build, which then gets torch only if the environment has none.
    setup_requires=[] if torch_root() else ["torch>=2.10"],
)
