"""What a bare machine needs before the parts run: wheels from a folder, and the C++ module built by its compiler."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.lib.paths import ROOT

_BUILD_LIMIT_S = 200


def environment(wheels: Path | None, out: Path) -> dict[str, str]:
    """Return the children's environment: repository and wheels importable, threads that sleep at barriers."""
    extra = [ROOT]
    if importlib.util.find_spec("or1_kernels") is None:
        extra.append(ROOT / "kernels")
    if wheels is not None:
        site = install(wheels, out / "site")
        extra += [site, *_beside(site)]
    path = os.pathsep.join([*map(str, extra), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    sys.path[:0] = map(str, extra)
    return environment


def install(wheels: Path, site: Path) -> Path:
    """Install every wheel of the folder into `site`: all at once, and one by one if a bad wheel stops the others."""
    found = sorted(wheels.glob("*.whl"))
    if not found:
        print(f"no wheels in {wheels}; benchmarks/gpu/wheels.txt lists what to bring", file=sys.stderr)
    options = ["-q", "--no-deps", "--no-index", "--target", str(site), "--upgrade"]
    command = [sys.executable, "-m", "pip", "install", *options]
    if not found or subprocess.run([*command, *map(str, found)], capture_output=True).returncode == 0:
        return site
    for wheel in found:
        done = subprocess.run([*command, str(wheel)], capture_output=True, text=True)
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            print(f"not installed: {wheel.name}: {last}", file=sys.stderr)
    return site


def _beside(site: Path) -> list[Path]:
    """Return the folders that .pth files of a site add, by path or by code: Python reads them in its own site only."""
    code = (
        "import site, sys; before = set(sys.path); site.addsitedir(sys.argv[1])\n"
        "print(*[p for p in sys.path if p not in before and p != sys.argv[1]], sep='\\n')"
    )
    done = subprocess.run([sys.executable, "-c", code, str(site)], capture_output=True, text=True)
    return [Path(line) for line in done.stdout.splitlines() if line]


def build_native(environment: dict[str, str]) -> str:
    """Build or1_kernels._native unless it is there. Return what was done, or the reason why it is not there."""
    if _imports("or1_kernels._native", environment):
        return "there"
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
    if compiler is None:
        return "not built: no C++ compiler (g++, clang++ or $CXX)"
    for name in ("pybind11", "setuptools"):
        if not _imports(name, environment):
            return f"not built: {name} is not installed; bring its wheel (benchmarks/gpu/wheels.txt)"
    # Writes into the repository: the module must lie beside the package, and its name holds the Python version.
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    jobs = {"OR1_BUILD_JOBS": str(os.cpu_count() or 2), "CXX": compiler}
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment | jobs, capture_output=True, text=True, timeout=_BUILD_LIMIT_S
        )
    except subprocess.TimeoutExpired:
        return f"not built: the compiler took more than {_BUILD_LIMIT_S} s"
    if done.returncode != 0 or not _imports("or1_kernels._native", environment):
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return f"not built: setup.py build_ext ended with {done.returncode}: {last}"
    return "built"


def has_gpu(environment: dict[str, str]) -> bool:
    """Return True if torch sees a GPU. A child asks: the parent must hold no memory on the device it measures."""
    code = "import sys, torch; sys.exit(0 if torch.cuda.is_available() else 1)"
    return subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0


def _imports(module: str, environment: dict[str, str]) -> bool:
    command = [sys.executable, "-c", f"import {module}"]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True).returncode == 0
