"""Imports run one way: cli → pipeline → {checkpoint, calibration, artifact, …} → rounding → formats → torch."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OUTSIDE = {  # third-party packages, and the only places that may import them
    "typer": ("qronos_export/cli.py", "qronos_export/commands/"),
    "rich": ("qronos_export/commands/",),
    "transformers": ("qronos_export/checkpoint/",),
    "safetensors": ("qronos_export/checkpoint/",),
    "tokenizers": ("qronos_export/checkpoint/",),
    "huggingface_hub": ("qronos_export/checkpoint/", "qronos_export/card.py", "qronos_export/publish.py"),
    "gguf": ("qronos_export/artifact/gguf",),
    "onnx": ("qronos_export/artifact/onnx_", "qronos_export/inspection/onnx_"),
    "onnxruntime": ("qronos_export/artifact/onnx_session.py",),
    "onnxruntime_genai": ("qronos_export/artifact/onnx_builder.py", "qronos_export/artifact/onnx_speed.py"),
    "datasets": ("qronos_export/corpus.py",),
    "greenlet": ("qronos_export/calibration.py", "qronos_export/suspended.py"),
    "lm_eval": ("qronos_export/tasks.py",),
    "tqdm": ("qronos_export/tasks.py",),
    "jinja2": ("qronos_export/page.py",),
    "markupsafe": ("qronos_export/page.py",),
    "matplotlib": ("qronos_export/comparison_plot.py", "qronos_export/figures.py", "qronos_export/page.py"),
    "yaml": ("qronos_export/recipe.py", "qronos_export/card.py", "qronos_export/gate.py"),
    "torch": ("formats/", "qronos_export/"),
    "numpy": ("formats/", "qronos_export/artifact/"),
}
LEAVES = {
    "errors",
    "cache",
    "device",
    "memory",
    "precision",
    "states",
    "statistics",
    "process",
    "paired",
}  # for anyone; import one another
INSIDE = {  # a module of qronos_export, and what else of qronos_export it may import
    "cli": {"commands", ""},
    "commands": {
        "card", "comparison", "comparison_plot", "conversion", "evaluation", "events", "followers", "forecast", "gate",
        "gate_report", "inspection", "llamacpp_build", "llamacpp_find", "page", "pipeline", "proof", "publish", "ranks",
        "recipe", "report", "results", "resume", "runs", "validation", "worst",
    },
    "comparison": {"artifact", "checkpoint", "events", "llamacpp", "onnx_validation", "proof", "validation"},
    "comparison_plot": {"comparison"},
    "gate": {"validation"},
    "gate_report": {"validation"},
    "forecast": {
        "artifact", "budget", "checkpoint", "choice", "llamacpp", "output", "plan", "preconditions", "proof",
        "provenance", "recipe", "rehearsal", "resolved", "survey", "transformed", "transforms", "workspace",
    },
    "budget": {
        "checkpoint", "layers", "recipe", "rehearsal", "streams", "survey", "transformed", "transforms", "workspace",
    },
    "survey": {"attention", "calibration", "checkpoint", "corpus", "decoder", "live", "suspended"},
    "rehearsal": {"artifact", "calibration", "layers", "live", "plan", "rounding", "transforms"},
    "live": set(),
    "__main__": {"cli"},
    "publish": {"artifact", "card", "checkpoint", "gate", "llamacpp", "report", "results", "workspace"},
    "card": {"report", "results"},
    "results": {"report", "typed_json", "validation"},
    "provenance": {"", "artifact", "checkpoint"},
    "pipeline": {
        "activations", "artifact", "attention", "calibration", "checkpoint", "choice", "corpus", "durable", "events",
        "folding", "followers", "identity", "llamacpp", "onnx_export", "onnx_validation", "output", "plan",
        "preconditions", "proof", "provenance", "ranks", "recipe", "report", "residual", "resolved", "resume",
        "shortage", "streams", "transformed", "validation", "workspace",
    },
    "identity": {"checkpoint", "recipe", "report"},
    "shortage": {"recipe"},
    "events": {"report"},
    "preconditions": {"llamacpp", "llamacpp_log", "onnx_export", "plan", "proof", "ranks", "recipe", "validation"},
    "followers": {"artifact", "calibration", "checkpoint", "folding", "plan", "ranks", "recipe", "shortage", "streams"},
    "folding": {"checkpoint", "ranks", "recipe", "transformed"},
    "output": {"artifact", "plan"},
    "resolved": {"checkpoint", "corpus", "recipe"},
    "choice": {"artifact", "llamacpp", "plan", "recipe"},
    "durable": {"report"},
    "resume": {"artifact", "calibration", "decoder", "durable", "plan", "report", "workspace"},
    "conversion": {"artifact", "checkpoint", "events", "onnx_export", "recipe", "report", "workspace"},
    "onnx_export": {"artifact", "checkpoint", "onnx_validation", "recipe", "report"},
    "onnx_validation": {"artifact", "calibration", "checkpoint", "corpus", "decoder", "validation"},
    "evaluation": {
        "activations", "artifact", "attention", "calibration", "checkpoint", "corpus", "decoder", "events", "folding",
        "layers", "online", "plan", "proof", "recipe", "residual", "resolved", "streams", "suspended", "tasks",
        "transformed", "workspace",
    },
    "streams": {
        "activations", "artifact", "attention", "calibration", "checkpoint", "decoder", "kv_cache", "layers", "plan",
        "ranks", "recipe", "report", "rounding",
    },
    "proof": {"checkpoint", "corpus", "llamacpp", "onnx_validation", "validation"},
    "page": {"figures", "report", "runs", "workspace", "worst"},
    "figures": {"report", "runs"},
    "runs": {"artifact", "report", "typed_json", "validation"},
    "worst": {"checkpoint", "llamacpp", "log_probabilities", "proof", "validation"},
    "log_probabilities": {"llamacpp_log"},
    "workspace": {"checkpoint", "recipe"},
    "inspection": {"artifact"},
    "layers": {"artifact", "attention", "calibration", "plan", "ranks", "report", "rounding"},
    "plan": {"artifact", "recipe"},
    "calibration": {"decoder", "loans", "ranks", "residual", "suspended"}, "decoder": set(), "loans": {"suspended"},
    "ranks": set(),
    "transforms": {"activations", "ranks", "rounding", "suspended"},
    "activations": set(),
    "attention": {"rounding"},
    "kv_cache": {"activations", "transforms"},
    "online": {"checkpoint", "suspended", "transforms"},
    "transformed": {"calibration", "checkpoint", "decoder", "ranks", "suspended", "transforms"},
    "corpus": {"checkpoint"},
    "tasks": set(),
    "validation": {"llamacpp"},
    "llamacpp": {"llamacpp_log"},
    "llamacpp_find": {"llamacpp", "llamacpp_log"},
    "llamacpp_build": {"llamacpp", "llamacpp_find"},
    "llamacpp_log": set(), "residual": set(), "suspended": {"residual"},
    "recipe": set(), "report": {"typed_json"}, "typed_json": set(),
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
                "commands",
                "activations",
                "evaluation",
                "kv_cache",
                "conversion",
                "inspection",
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
