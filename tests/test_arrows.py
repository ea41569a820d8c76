"""Imports run one way: cli → pipeline → {checkpoint, calibration, artifact, …} → rounding → formats → torch."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OUTSIDE = {  # third-party packages, and the only places that may import them
    "typer": ("qronos_export/cli.py", "qronos_export/commands/"),
    "rich": ("qronos_export/cli.py", "qronos_export/commands/"),
    "transformers": ("qronos_export/checkpoint/",),
    "safetensors": ("qronos_export/checkpoint/",),
    "tokenizers": ("qronos_export/checkpoint/",),
    "huggingface_hub": ("qronos_export/checkpoint/",),
    "gguf": ("qronos_export/artifact/gguf.py",),
    "onnx": ("qronos_export/artifact/onnx_",),
    "onnxruntime": ("qronos_export/artifact/onnx_session.py",),
    "onnxruntime_genai": ("qronos_export/artifact/onnx_builder.py",),
    "datasets": ("qronos_export/corpus.py",),
    "greenlet": ("qronos_export/suspended.py",),
    "lm_eval": ("qronos_export/tasks.py",),
    "tqdm": ("qronos_export/tasks.py",),
    "yaml": ("qronos_export/recipe.py",),
    "torch": ("formats/", "qronos_export/"),
    "numpy": ("formats/", "qronos_export/artifact/"),
}
LEAVES = {"errors", "cache", "device", "memory", "statistics", "process"}  # for anyone; they import one another only
INSIDE = {  # a module of qronos_export, and what else of qronos_export it may import
    "cli": {
        "conversion", "evaluation", "pipeline", "recipe", "report", "llamacpp", "llamacpp_build", "proof", "validation",
        "commands", "",
    },
    "commands": {"forecast", "llamacpp", "recipe"},
    "forecast": {
        "artifact", "budget", "checkpoint", "llamacpp", "pipeline", "plan", "proof", "recipe", "rehearsal", "survey",
        "transforms", "workspace",
    },
    "budget": {"checkpoint", "recipe", "rehearsal", "streams", "survey", "transformed", "transforms", "workspace"},
    "survey": {"attention", "calibration", "checkpoint", "corpus", "live", "suspended"},
    "rehearsal": {"artifact", "calibration", "layers", "live", "plan", "rounding", "transforms"},
    "live": set(),
    "__main__": {"cli"},
    "pipeline": {
        "activations", "artifact", "attention", "checkpoint", "calibration", "corpus", "llamacpp", "onnx_export",
        "onnx_validation", "plan", "proof", "recipe", "report", "streams", "transformed", "validation", "workspace",
    },
    "conversion": {"artifact", "checkpoint", "onnx_export", "pipeline", "recipe", "report", "workspace"},
    "onnx_export": {"artifact", "checkpoint", "onnx_validation", "recipe", "report"},
    "onnx_validation": {"artifact", "calibration", "checkpoint", "corpus", "validation"},
    "evaluation": {
        "activations", "artifact", "attention", "calibration", "checkpoint", "corpus", "layers", "online", "pipeline",
        "plan", "proof", "recipe", "streams", "suspended", "tasks", "transformed", "workspace",
    },
    "streams": {
        "activations", "artifact", "attention", "calibration", "checkpoint", "kv_cache", "layers", "plan", "recipe",
        "report", "rounding",
    },
    "proof": {"checkpoint", "corpus", "llamacpp", "onnx_validation", "validation"},
    "workspace": {"checkpoint", "recipe"},
    "layers": {"artifact", "attention", "calibration", "plan", "report", "rounding"},
    "plan": {"artifact", "recipe"},
    "calibration": {"suspended"},
    "transforms": {"activations", "rounding", "suspended"},
    "activations": set(),
    "attention": {"rounding"},
    "kv_cache": {"activations", "transforms"},
    "online": {"checkpoint", "suspended", "transforms"},
    "transformed": {"calibration", "checkpoint", "transforms"},
    "corpus": {"checkpoint"},
    "tasks": set(),
    "validation": {"llamacpp"},
    "llamacpp": {"llamacpp_log", "llamacpp_build"},
    "llamacpp_build": {"llamacpp"},
    "llamacpp_log": set(), "suspended": set(), "recipe": set(), "report": set(),
    "artifact": set(), "checkpoint": set(), "rounding": set(),
}  # fmt: skip


def imports(path: str, source: str) -> set[str]:
    """Every module a source names, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = path.split("/")[: -node.level] if node.level else []
            module = ".".join([*package, *filter(None, [node.module])])
            whole = module == "qronos_export"  # `from qronos_export import report` names a module too
            found |= {f"{module}.{alias.name}" for alias in node.names} if whole else {module}
    return found


def violations(path: str, source: str) -> list[str]:
    wrong = []
    own = path.removeprefix("qronos_export/").split("/")[0].removesuffix(".py")
    for module in imports(path, source):
        top, _, rest = module.partition(".")
        inner = rest.split(".")[0] if not rest.startswith("__") else ""
        if top == "formats":
            allowed = path.startswith("formats/") or own in {
                "rounding",
                "transforms",
                "layers",
                "plan",
                "artifact",
                "cli",
                "activations",
                "evaluation",
                "kv_cache",
                "conversion",
                "onnx_export",
                "report",
                "forecast",
                "budget",
                "rehearsal",
            }
        elif top == "qronos_export":
            reachable = LEAVES if own in LEAVES or own == "__init__" else LEAVES | INSIDE.get(own, set()) | {own}
            allowed = path.startswith("qronos_export/") and inner in reachable
        else:
            allowed = top in sys.stdlib_module_names or path.startswith(OUTSIDE.get(top, ()))
        if not allowed:
            wrong.append(f"{path} imports {module}")
    return wrong


def sources() -> list[str]:
    return sorted(
        str(p.relative_to(ROOT)) for folder in ("formats", "qronos_export") for p in (ROOT / folder).rglob("*.py")
    )


@pytest.mark.parametrize("path", sources())
def test_arrows_never_turn_back(path: str) -> None:
    assert violations(path, (ROOT / path).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("formats/block.py", "from qronos_export.errors import QronosError"),
        ("formats/block.py", "import transformers"),
        ("qronos_export/rounding/gptq.py", "from qronos_export.calibration import walk"),
        ("qronos_export/calibration.py", "from qronos_export import pipeline"),
        ("qronos_export/checkpoint/hub.py", "from ..pipeline import run"),
        ("qronos_export/checkpoint/hub.py", "from .. import pipeline"),
        ("qronos_export/pipeline.py", "def f():\n    import rich"),
        ("qronos_export/errors.py", "from qronos_export.report import sha256"),
    ],
)
def test_this_test_can_fail(path: str, source: str) -> None:
    assert violations(path, source)
