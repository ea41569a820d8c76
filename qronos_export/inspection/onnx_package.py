"""What lies beside an ONNX model: onnxruntime-genai's or transformers' configuration, tokenizer, chat template."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qronos_export.inspection.found import ERROR, Entry, Finding

GENAI, CONFIG, TOKENIZER = "genai_config.json", "config.json", "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"
_LARGEST = 1 << 22  # bytes of a configuration
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


@dataclass
class Package:
    metadata: dict[str, Entry] = field(default_factory=dict)
    tokenizer: dict[str, Any] = field(default_factory=dict)
    chat_templates: dict[str, str] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)


def read_package(model: Path) -> Package:
    """Beside `model`, or one folder up where that is transformers.js' `onnx`. Files that are not there are nothing
    wrong, unless a configuration wants them."""
    folder = model.parent.parent if model.parent.name == "onnx" else model.parent
    package = Package()
    genai, config, tokenizer = (_json(folder / name, package) for name in (GENAI, CONFIG, TOKENIZER))
    described = genai.get("model")
    described = described if isinstance(described, dict) else {}
    for prefix, facts in (("genai", described), ("config", config)):
        for key, value in facts.items():
            if isinstance(value, str | int | float):
                package.metadata[f"{prefix}.{key}"] = Entry(type(value).__name__, value)
    size = described.get("vocab_size", config.get("vocab_size"))
    wanted = bool(described) or "transformers.js_config" in config
    files = [name for name in _TOKENIZERS if (folder / name).is_file()]
    if wanted and not files:
        package.findings.append(Finding(ERROR, "tokenizer", f"none of {', '.join(_TOKENIZERS)} lies beside the model"))
    if wanted and type(size) is not int:
        package.findings.append(Finding(ERROR, "vocab_size", f"neither {GENAI} nor {CONFIG} says it"))
    if not (files or tokenizer):
        return package
    special = {}
    for name in ("bos", "eos", "pad", "unk"):
        token, index = _text(tokenizer.get(f"{name}_token")), described.get(f"{name}_token_id")
        if token is not None or isinstance(index, int | list):
            special[name] = {"id": index, "token": token}
    package.tokenizer = {"model": tokenizer.get("tokenizer_class"), "files": files, "size": size, "special": special}
    found = tokenizer.get("chat_template")
    if isinstance(found, str):
        package.chat_templates[f"{TOKENIZER} chat_template"] = found
    if (text := _read(folder / TEMPLATE, package)) is not None:
        package.chat_templates[TEMPLATE] = text
    return package


def _json(path: Path, package: Package) -> dict[str, Any]:
    text = _read(path, package)
    if text is None:
        return {}
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        package.findings.append(Finding(ERROR, path.name, f"it is no JSON: {error}"))
        return {}
    if not isinstance(found, dict):
        package.findings.append(Finding(ERROR, path.name, "it is no JSON object"))
        return {}
    return found


def _read(path: Path, package: Package) -> str | None:
    try:
        if not path.is_file():
            return None
        with path.open("rb") as file:
            data = file.read(_LARGEST + 1)
    except OSError as error:
        package.findings.append(Finding(ERROR, path.name, f"it cannot be read: {error.strerror}"))
        return None
    if len(data) > _LARGEST:
        package.findings.append(Finding(ERROR, path.name, f"it has more than {_LARGEST >> 20} MiB and was not read"))
        return None
    return data.decode("utf-8", "backslashreplace")


def _text(token: Any) -> str | None:
    """A special token as transformers writes it: its text, or an object with it."""
    found = token.get("content") if isinstance(token, dict) else token
    return found if isinstance(found, str) else None
