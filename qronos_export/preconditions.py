"""What no run can do, whatever the model; said before anything is opened."""

from __future__ import annotations

from qronos_export.errors import UsageError
from qronos_export.llamacpp import LlamaCpp
from qronos_export.llamacpp_log import check_scored
from qronos_export.onnx_export import check_foreign
from qronos_export.plan import CARRIERS, check_types, is_foreign
from qronos_export.proof import Held
from qronos_export.ranks import Ranks
from qronos_export.recipe import Recipe
from qronos_export.validation import CACHE_TYPES


def check_recipe(recipe: Recipe, held: Held | None, llamacpp: LlamaCpp) -> None:
    """Raises UsageError for what no run can do with any model; `held` is None where nothing is validated."""
    check_types(recipe)
    if held and held.chunks is not None and "gguf" in recipe.artifacts:
        check_scored(held.chunks, held.context)
    if recipe.activations not in ("none", "llama.cpp", "q8_0", "q8_k"):
        raise UsageError(
            f"activations: {recipe.activations} is for `evaluate` alone: llama.cpp rounds what a matrix reads to eight "
            "bits of its own, q8_0 or q8_k."
        )
    for which, kind in recipe.kv_cache.items():
        if kind not in CACHE_TYPES:
            raise UsageError(
                f"kv_cache: {{{which}: {kind}}} is for `evaluate` alone: llama.cpp's cache has no such type."
            )
    if recipe.kv_cache and "gguf" not in recipe.artifacts:
        raise UsageError(
            "kv_cache rounds keys and values as llama.cpp does, and ONNX models keep floats; leave it out."
        )
    if recipe.online != "none":
        raise UsageError(f"online: {recipe.online} is for `evaluate` alone: llama.cpp rotates nothing while it runs.")
    if recipe.method == "rtn" and (recipe.magr or recipe.activations != "none"):
        raise UsageError(
            "method: rtn looks at no activations, so magr and activations would do nothing; leave them out."
        )
    if recipe.method == "rtn" and recipe.kv_cache and not held:
        raise UsageError("method: rtn looks at no keys and values; without --validate, kv_cache does nothing.")
    known = llamacpp.quantize_types()
    for name in recipe.formats:
        if is_foreign(name):
            check_foreign(name, recipe)
        elif name not in CARRIERS and known.get(name) is None:
            raise UsageError(
                f"There is no type {name!r}; llama.cpp has {', '.join([*CARRIERS, *filter(known.get, known)])}."
            )


def check_ranks(recipe: Recipe, ranks: Ranks, resume: bool = False) -> None:
    """Raises UsageError unless there is something to do for every process, and a GPU where they are to have one."""
    if ranks.world == 1:
        return
    if resume:
        raise UsageError("--resume keeps the hidden states of one process; leave it out, or run without torchrun.")
    if recipe.method == "rtn":
        raise UsageError("method: rtn has no sequences to share; run it without torchrun.")
    ranks.check_device(recipe.device)
    one_in = recipe.holds_out_one_in
    held = recipe.samples // one_in if one_in else recipe.samples
    if min(held, recipe.samples - held if one_in else held) < ranks.world:
        apart = ", and one more to hold out" if one_in else ""
        raise UsageError(
            f"{recipe.samples} samples are too few for {ranks.world} processes, each of which needs one{apart}; raise "
            "--samples."
        )
