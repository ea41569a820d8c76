"""Which tensor of an artifact gets which type: llama-quantize decides, within what the recipe wishes."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase

from qronos_export.artifact.gguf import GGUFFile
from qronos_export.errors import PlanError, UsageError
from qronos_export.llamacpp import LlamaCpp
from qronos_export.plan import CARRIERS, FOREIGN, Mix, check_overrides, is_foreign, mix, type_patterns
from qronos_export.recipe import Recipe


def choose_types(source: GGUFFile, name: str, recipe: Recipe, llamacpp: LlamaCpp) -> Mix:
    """The types of the artifact `name`, as llama-quantize would choose them with the recipe's wishes."""
    carrier, number = FOREIGN if is_foreign(name) else CARRIERS.get(name, (name, None))
    options = [
        *(["--output-tensor-type", recipe.output_type.lower()] if recipe.output_type else []),
        *(["--token-embedding-type", recipe.embedding_type.lower()] if recipe.embedding_type else []),
    ]
    patterns = type_patterns(source, recipe.overrides)
    planned = llamacpp.plan(source.path, carrier, tensor_types=patterns, pure=recipe.pure, options=options)
    if number is None:
        number = llamacpp.quantize_types()[name]
    if number is None:
        raise UsageError(f"--format {name} is no type; see `qronos-export formats`.")
    chosen = mix(source, name, number, planned.types, planned.substitutes, wishes(source, recipe))
    check_overrides(chosen, recipe.overrides)
    _check_ends(chosen, source, recipe)
    return chosen


def _check_ends(mix: Mix, source: GGUFFile, recipe: Recipe) -> None:
    """Raises PlanError for a type of output matrix or embedding that llama.cpp does not give it."""
    tied = "output.weight" not in source.tensors
    for option, tensor, kind in (
        ("--output-type", "token_embd.weight" if tied else "output.weight", recipe.output_type),
        ("--embedding-type", "token_embd.weight", recipe.embedding_type),
    ):
        if kind is None or tensor in mix.substitutes or mix.types[tensor] == kind.upper():
            continue
        raise PlanError(
            f"{option} {kind} would change nothing of {mix.name}: llama.cpp makes {tensor} {mix.types[tensor]}. "
            + ("It is the output matrix, too; name its type by --embedding-type alone." if tied else "Leave it out.")
        )


def wishes(source: GGUFFile, recipe: Recipe) -> Callable[[str], bool]:
    """Whether the recipe itself says what type a tensor gets."""
    embedding, head = "token_embd.weight", "output.weight"
    named = {embedding} if recipe.embedding_type else set()
    if recipe.output_type:
        named.add(head if head in source.tensors else embedding)
    return lambda tensor: tensor in named or any(fnmatchcase(tensor, glob) for glob in recipe.overrides)
