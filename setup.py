"""Builds or1_kernels._native (csrc/); everything else about the package is in pyproject.toml.

kernels/ itself is not a package: with an __init__.py it would shadow the PyPI package `kernels`,
which transformers looks for. Only kernels/or1_kernels is one, so it is mapped here by hand.
"""

from glob import glob

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import find_packages, setup

ParallelCompile("OR1_BUILD_JOBS", default=2).install()

setup(
    packages=find_packages(include=["or1", "or1.*"])
    + find_packages("kernels", include=["or1_kernels*"])
    # Data alone: what `or1 demo` and `or1 init` copy.
    + ["or1_examples"],
    package_dir={"or1": "or1", "or1_kernels": "kernels/or1_kernels", "or1_examples": "examples"},
    package_data={
        "or1": ["py.typed"],
        "or1_kernels": ["py.typed"],
        "or1_examples": ["quickstart.toml", "tiny-adder/*", "recipes/*", "smollm2/*.*"],
    },
    ext_modules=[
        Pybind11Extension(
            "or1_kernels._native",
            sorted(glob("csrc/*.cpp")),
            depends=sorted(glob("csrc/*.hpp")),
            cxx_std=17,
            # No -march=native: instruction sets are chosen at run time, so a wheel built here runs elsewhere.
            extra_compile_args=["-O3", "-fno-math-errno", "-pthread"],
            extra_link_args=["-pthread"],
        )
    ],
    cmdclass={"build_ext": build_ext},
)
