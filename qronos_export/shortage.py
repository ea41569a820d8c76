"""Memory that does not suffice: in which stage of a run, and what needs less."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from qronos_export.errors import OutOfMemoryError
from qronos_export.memory import ran_out
from qronos_export.recipe import Recipe


@dataclass
class Where:
    """The stage a run is in, and whether what is finished of it is kept."""

    recipe: Recipe
    resume: bool = False
    stage: str = "load"


@contextmanager
def named(where: Where) -> Iterator[None]:
    """Raises OutOfMemoryError for whatever says that memory did not suffice."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if not ran_out(error):
            raise
        what = [*str(error).splitlines(), type(error).__name__][0]
        raise OutOfMemoryError(f"Memory ran out in the stage {where.stage!r} ({what}). {_advice(where)}") from error


def _advice(where: Where) -> str:
    advice = _needs_less(where.stage, where.recipe)
    if where.resume and "--" in advice:
        advice += (
            " A run that is resumed may change --offload, --context and --no-validate; other settings begin anew, with "
            "--force."
        )
    return advice


def _needs_less(stage: str, recipe: Recipe) -> str:
    """What to change where memory does not suffice for a stage."""
    batch = f"a smaller --micro-batch (it is {recipe.micro_batch})"
    if stage == "calibration text":
        return "Sampling loads the whole model; give a text with --calibration FILE."
    if stage == "transforms":
        if "spinquant" in recipe.transform_names:
            return "spinquant learns through the whole model; choose other --transforms."
        return f"Try {batch}, or --transforms none."
    if stage == "layers" and recipe.method != "rtn":
        formats = ", one --format at a time" if len(recipe.formats) > 1 else ""
        if recipe.offload == "none":
            batch = f"--offload disk, {batch}"
        return f"Try {batch}, fewer --samples (they are {recipe.samples} × {recipe.sequence_length} tokens){formats}."
    if stage == "onnx graph":
        return "onnxruntime-genai's builder holds the model in float32; leave onnx out of --artifact."
    if stage.startswith("validate"):
        return f"Try {batch}, a smaller --context, or --no-validate."
    return "Embedding, head and one decoder block have to fit in float32; use a machine with more memory."
