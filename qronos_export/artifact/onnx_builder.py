"""A decoder graph by onnxruntime-genai's model builder: float weights, KV cache, genai_config.json, tokenizer.

The builder knows the architectures, we do not: it is the oracle for the graph as llama.cpp's converter is for GGUF. It
runs in this process and needs no network.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from importlib.util import find_spec
from pathlib import Path

from qronos_export.errors import ArtifactError, UsageError

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
                # A head tied to the embedding stands in the graph twice; our writer gives both the same bytes. A cache
                # of the window's size alone is one that onnxruntime-genai manages and no other caller.
                ["hf_token=false", "shared_embeddings=false", "windowed_kv_cache=false"],
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


def set_windows(graph: Path, windows: Sequence[int | None]) -> None:
    """Let layer i of the builder's `graph` attend to the last `windows[i]` tokens, or to all. The builder does so for
    some models and forgets it for others (Mistral, Phi-3). Raises ArtifactError where a layer cannot."""
    import onnx
    from onnx.helper import make_attribute

    model = onnx.load(graph, load_external_data=False)
    missing = {index for index, window in enumerate(windows) if window}
    for node in model.graph.node:
        layer = re.search(r"/layers\.(\d+)/", node.name)
        if node.op_type != "GroupQueryAttention" or layer is None:
            continue
        kept = [each for each in node.attribute if each.name != "local_window_size"]
        del node.attribute[:]
        node.attribute.extend([*kept, make_attribute("local_window_size", windows[int(layer[1])] or -1)])
        missing.discard(int(layer[1]))
    if missing:
        raise ArtifactError(
            f"layer {min(missing)} attends to the last {windows[min(missing)]} tokens, and the builder's graph has no "
            "GroupQueryAttention there that could be told so. Use --artifact gguf."
        )
    onnx.save(model, graph)
