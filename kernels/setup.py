"""Builds the distribution or1-kernels; everything but the extension is in pyproject.toml beside this file.

In the repository the C++ sources are one folder up, in a source distribution they are beside this file.
"""

from glob import glob
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import find_packages, setup

ParallelCompile("OR1_BUILD_JOBS", default=2).install()

csrc = "csrc" if Path("csrc").is_dir() else "../csrc"

setup(
    packages=find_packages(include=["or1_kernels*"]),
    package_data={"or1_kernels": ["py.typed", "*.pyi"]},
    ext_modules=[
        # The same flags as in setup.py of or1; tests/house/test_packages.py compares them.
        Pybind11Extension(
            "or1_kernels._native",
            sorted(glob(f"{csrc}/*.cpp")),
            depends=sorted(glob(f"{csrc}/*.hpp")),
            cxx_std=17,
            extra_compile_args=["-O3", "-fno-math-errno", "-pthread"],
            extra_link_args=["-pthread"],
        )
    ],
    cmdclass={"build_ext": build_ext},
)
