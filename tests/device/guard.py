"""Compiles ``guard.cpp`` and loads it, which has to come before torch: importing this does both.

As a plugin of pytest it comes early enough: ``PYTHONPATH=tests/device python -m pytest -p guard -m device tests/device``.
"""

from __future__ import annotations

import ctypes
import importlib.util
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent
FOLDER = HERE.parents[1] / "build"


def load() -> None:
    """Compile the guard, unless that was done for this torch, and load it.

    Raises:
        RuntimeError: If torch is there already, which by then has settled that there is no GPU.
    """
    if "torch" in sys.modules:
        raise RuntimeError("The simulated GPU has to be loaded before torch: see `make test-device`.")
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    torch = Path(spec.origin).parent
    library = FOLDER / f"guard-{version('torch')}.so"
    if not library.is_file():
        FOLDER.mkdir(exist_ok=True)
        includes = [f"-I{torch / path}" for path in ("include", "include/torch/csrc/api/include")]
        links = [f"-L{torch / 'lib'}", f"-Wl,-rpath,{torch / 'lib'}", "-ltorch_cpu", "-lc10"]
        compiler = ["g++", "-std=c++20", "-O0", "-shared", "-fPIC"]
        subprocess.run([*compiler, *includes, str(HERE / "guard.cpp"), *links, "-o", str(library)], check=True)
    ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)


load()
