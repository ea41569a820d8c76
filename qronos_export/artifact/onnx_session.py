"""A decoder in ONNX run by onnxruntime, without a past: tokens in, logits out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from qronos_export.artifact.onnx_builder import check_packages
from qronos_export.artifact.onnx_data import check
from qronos_export.errors import ArtifactError, UsageError

MODELS = ("model.onnx", "onnx/model_q4.onnx")
_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


def find_model(path: Path) -> Path:
    """The .onnx that `path`, a file or a folder of a layout we write, stands for. Raises UsageError."""
    check_packages()
    found = next((path / name for name in MODELS if (path / name).is_file()), path)
    if not found.is_file():
        raise UsageError(f"{path} is no ONNX model; give model.onnx or the folder with it.")
    return found


class Session:
    """`path` loaded. Raises ArtifactError where its data is missing or onnxruntime cannot run it."""

    def __init__(self, path: Path) -> None:
        import onnx
        import onnxruntime

        self.path = path
        self.version = onnxruntime.__version__
        try:
            model = onnx.load(path, load_external_data=False)
        except Exception as error:  # protobuf's DecodeError is not importable from a stable place
            raise ArtifactError(f"{path} cannot be read as ONNX ({error}).") from error
        for tensor in model.graph.initializer:
            check(tensor, path.parent)
        opsets = ", ".join(f"{each.domain or 'ai.onnx'} {each.version}" for each in model.opset_import)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        # Of standard DequantizeLinear and MatMul it makes MatMulNBits, and would round inputs to int8.
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
        try:
            self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its exceptions share no base
            raise ArtifactError(
                f"onnxruntime {self.version} cannot run {path}, of opset {opsets} and IR {model.ir_version}: "
                f"{str(error).splitlines()[0]}. A newer onnxruntime may."
            ) from error
        self._inputs = self._session.get_inputs()
        names = {each.name for each in self._inputs}
        if "input_ids" not in names or "logits" not in {each.name for each in self._session.get_outputs()}:
            raise ArtifactError(
                f"{path} is no decoder with input_ids and logits; its inputs are {', '.join(sorted(names))}."
            )

    def logits(self, tokens: Tensor) -> Tensor:
        """Float32 [sequences, length, vocabulary] of `tokens` int64 [sequences, length]. Raises ArtifactError where
        onnxruntime fails."""
        count, length = tokens.shape
        feed = {"input_ids": tokens.cpu().numpy(), "attention_mask": np.ones((count, length), np.int64)}
        feed["position_ids"] = np.broadcast_to(np.arange(length), (count, length))
        for each in self._inputs:
            if each.name.startswith("past_key_values."):
                size = each.shape[3] if isinstance(each.shape[3], int) else self._head_size()
                feed[each.name] = np.zeros((count, each.shape[1], 0, size), _TYPES[each.type])
        names = {each.name for each in self._inputs}
        try:
            (found,) = self._session.run(["logits"], {name: value for name, value in feed.items() if name in names})
        except Exception as error:  # its exceptions share no base
            raise ArtifactError(
                f"onnxruntime {self.version} stopped while it ran {self.path}: {str(error).splitlines()[0]}."
            ) from error
        return torch.from_numpy(found).float()

    def _head_size(self) -> int:
        """Where the graph leaves it open."""
        file = self.path.with_name("genai_config.json")
        try:
            return int(json.loads(file.read_text(encoding="utf-8"))["model"]["decoder"]["head_size"])
        except (OSError, ValueError, LookupError) as error:
            raise ArtifactError(f"{self.path} leaves the size of heads open, and {file} does not say it.") from error
