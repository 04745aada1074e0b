"""Nothing imports upward: tensors below, ``torch.nn`` in the middle, ``transformers`` at the top."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import hf_lgp

PACKAGE = Path(hf_lgp.__file__).parent
FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))
GROUND = {
    "estimator.py", "splice.py", "sealed.py", "settings.py", "state_files.py", "_version.py",
    "rows/attention.py", "rows/groups.py", "control/plan.py", "control/measurement.py", "control/controller.py",
    "control/residual.py",
    "control/step_times.py",
    "control/clock.py", "control/exchange.py", "linear/kernel_ridge.py",
}  # fmt: skip
TOP = {
    "attention_interface.py", "trainer.py", "training_args.py", "compatibility.py", "renamed_weights.py", "probe.py",
    "cli.py", "run_callback.py", "__init__.py",
}  # fmt: skip


def floor_of(name: str) -> int:
    return 0 if name in GROUND else 2 if name in TOP else 1


def imports_of(path: Path) -> list[str]:
    """Files of the package, and packages outside it, that a file imports."""
    found = []
    for node in ast.walk(ast.parse((PACKAGE / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            folder = path.parent if node.level == 1 else path.parent.parent
            found.append((folder / f"{(node.module or '__init__').replace('.', '/')}.py").as_posix())
        elif isinstance(node, ast.ImportFrom):
            found += [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
    return found


@pytest.mark.parametrize("path", FILES, ids=str)
def test_nothing_imports_upward(path: Path) -> None:
    floor = floor_of(path.as_posix())
    for name in imports_of(path):
        if name.endswith(".py"):
            assert floor_of(name) <= floor, f"{path} imports {name}, a floor above it"
        elif name.split(".")[0] in ("transformers", "accelerate"):
            assert floor == 2, f"{path} imports {name}"
        elif name.startswith("torch.nn") and not name.startswith("torch.nn.functional"):
            assert floor > 0, f"{path} imports {name}"


def test_the_house_is_no_larger_than_it_may_be() -> None:
    lines = {path: len((PACKAGE / path).read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert sum(lines.values()) <= 5600 and max(lines.values()) <= 350
    assert all((PACKAGE / name).is_file() for name in GROUND | TOP - {"probe.py"})
