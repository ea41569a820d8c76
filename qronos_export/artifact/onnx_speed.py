"""How fast onnxruntime-genai runs a model."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from pathlib import Path

from qronos_export.artifact.onnx_builder import check_packages
from qronos_export.errors import ArtifactError


def random_tokens(folder: Path, count: int) -> list[int]:
    """`count` tokens of the model's vocabulary, always the same. Raises ArtifactError where genai_config.json does not
    say how large that is."""
    file = folder / "genai_config.json"
    try:
        vocabulary = int(json.loads(file.read_text(encoding="utf-8"))["model"]["vocab_size"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ArtifactError(f"{file} does not say how many tokens the model knows ({error!r}).") from error
    return random.Random(0).choices(range(vocabulary), k=count)


def rates(folder: Path, tokens: Sequence[int], new: int, threads: int) -> tuple[float, float]:
    """Tokens per second reading `tokens` and writing `new` ones greedily; the first of them comes with the prompt.

    Raises ArtifactError where onnxruntime-genai cannot run the model that long.
    """
    check_packages()
    import onnxruntime_genai

    config = onnxruntime_genai.Config(str(folder))
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
    length = len(tokens) + new
    try:
        model = onnxruntime_genai.Model(config)
        parameters = onnxruntime_genai.GeneratorParams(model)
        parameters.set_search_options(do_sample=False, max_length=length, min_length=length)
        generator = onnxruntime_genai.Generator(model, parameters)
        begun = time.perf_counter()
        generator.append_tokens([list(tokens)])
        generator.generate_next_token()
        read = time.perf_counter()
        for _ in range(new - 1):
            generator.generate_next_token()
    except Exception as error:  # its exceptions share no base
        raise ArtifactError(f"onnxruntime-genai cannot run {folder} for {length} tokens: {error}.") from error
    return len(tokens) / (read - begun), (new - 1) / (time.perf_counter() - read)
