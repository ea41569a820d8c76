"""A decoder graph by onnxruntime-genai's model builder: float weights, KV cache, genai_config.json, tokenizer.

The builder knows the architectures, we do not: it is the oracle for the graph as llama.cpp's converter is for GGUF. It
runs in this process and needs no network.
"""

from __future__ import annotations

import io
import warnings
from contextlib import redirect_stderr, redirect_stdout
from importlib.util import find_spec
from pathlib import Path

from qronos_export.errors import UsageError

PACKAGES = ("onnx", "onnx_ir", "onnxruntime", "onnxruntime_genai")


def check_packages() -> None:
    """Raises UsageError unless what ONNX needs is installed."""
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise UsageError(f"ONNX needs {missing[0]}, which is not installed; run `pip install 'qronos-export[onnx]'`.")


def build_float(checkpoint: Path, architecture: str, destination: Path) -> Path:
    """The model in folder `checkpoint` as a float32 GenAI package in `destination`, whose model.onnx is returned.

    Takes memory for the whole model in float32, meanwhile. Raises UsageError, naming `architecture`, for models the
    builder does not know.
    """
    check_packages()
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        from onnxruntime_genai.models.builder import create_model, parse_extra_options

        scratch = str(destination / "cache")
        try:
            options = parse_extra_options(
                None,
                str(checkpoint),
                str(destination),
                "fp32",
                "cpu",
                scratch,
                # A head tied to the embedding stands in the graph twice; our writer gives both the same bytes.
                ["hf_token=false", "shared_embeddings=false"],
            )
            create_model(None, str(checkpoint), str(destination), "fp32", "cpu", scratch, **options)
        except OSError:
            raise
        except Exception as error:  # it refuses by NotImplementedError, or trips over what it does not expect
            raise UsageError(
                f"onnxruntime-genai's model builder cannot make {architecture} into ONNX "
                f"({type(error).__name__}: {error}). Use --artifact gguf, or a newer onnxruntime-genai."
            ) from error
    return destination / "model.onnx"
