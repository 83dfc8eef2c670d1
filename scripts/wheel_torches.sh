#!/usr/bin/env bash
# Installs one wheel, as it is, beside each torch named and runs there what reaches the compiled part:
# scripts/use_wheel.py and the tests of the kernels, copied away from the repository.
#
#     pip wheel . --no-deps --no-build-isolation -w dist
#     scripts/wheel_torches.sh dist/dass-*.whl torch==2.10.0 torch==2.13.0
#
# PYTHON names the Python, WORK a folder for the environments, of which one exists at a time: a CUDA
# build of torch takes up to 7 GB. Stops at the first that fails.
set -euo pipefail
wheel=$(realpath "$1")
shift
root=$(realpath "$(dirname "$0")/..")
work=$(mktemp -d "${WORK:-${TMPDIR:-/tmp}}/wheel.XXXXXX")
trap 'rm -rf "$work"' EXIT
export PIP_DISABLE_PIP_VERSION_CHECK=1

cp -r "$root/tests" "$root/pyproject.toml" "$root/scripts/use_wheel.py" "$work"
cd "$work"
for torch in "$@"; do
  rm -rf venv
  "${PYTHON:-python3}" -m venv venv
  venv/bin/pip install -q --no-cache-dir "$torch"
  venv/bin/pip install -q --no-cache-dir "${wheel}[test]"
  echo "== $torch: $(sha256sum "$wheel" | cut -c1-12) $(basename "$wheel")"
  venv/bin/python use_wheel.py
  venv/bin/python -m pytest -p no:cacheprovider \
    tests/test_{build,spmm,conv2d,linear,autograd,opinfo,program}.py
done
