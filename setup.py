"""Builds every fleetcore/**/*.pyx as one extension module; everything declarative is in pyproject.toml."""
import os
import sys
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup

# The one table of flags. No -march: kernels pick their instruction set at run time, so a wheel runs on any
# machine of its architecture. -ffp-contract=off and no fast-math: the same bits on every rank.
COMPILE = ["-O3", "-ffp-contract=off", "-fno-math-errno", "-std=gnu11", "-fvisibility=hidden", "-Wall", "-Wextra",
           "-Wno-unused-function", "-Wno-unused-parameter", "-Wno-cast-function-type", "-Wno-missing-field-initializers"]
LINK = []
MACROS = [("_GNU_SOURCE", None), ("CYTHON_CLINE_IN_TRACEBACK", "0")]

if os.environ.get("FLEETCORE_SANITIZE"):        # `make sanitize`
    COMPILE = [flag for flag in COMPILE if flag != "-O3"] + [
        "-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined"]
    LINK += ["-fsanitize=address,undefined"]

sources = sorted(Path("fleetcore").rglob("*.pyx"))
extensions = [
    Extension(
        ".".join(path.with_suffix("").parts),
        [str(path)],
        include_dirs=[str(path.parent)],
        depends=[str(header) for header in sorted(path.parent.glob("*.h"))],
        define_macros=MACROS,
        extra_compile_args=COMPILE,
        extra_link_args=LINK,
    )
    for path in sources
]

setup(
    ext_modules=cythonize(
        extensions,
        nthreads=os.cpu_count() if sys.platform == "linux" else 0,
        compiler_directives={
            "language_level": 3, "boundscheck": False, "wraparound": False, "cdivision": True,
            "initializedcheck": False, "embedsignature": True, "binding": True, "freethreading_compatible": False,
        },
    ),
)
