"""`qronos-export evaluate`: a recipe in torch, without a file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from qronos_export.commands.options import (
    ChunksOption,
    ContextOption,
    JsonOption,
    RecipeOption,
    SetOption,
    TextOption,
    counted,
    progress,
    setting_of,
    table,
)
from qronos_export.errors import UsageError
from qronos_export.recipe import load_recipe, recipe_from


def evaluate(
    model: Annotated[str, typer.Argument(help="Folder with config.json and safetensors, hub id, .gguf or `demo`.")],
    recipe: RecipeOption = None,
    settings: SetOption = None,
    text: TextOption = None,
    context: ContextOption = 512,
    chunks: ChunksOption = 40,
    tasks: Annotated[
        str | None, typer.Option(help="Zero-shot tasks by lm-eval's names, comma separated.", metavar="NAME[,NAME…]")
    ] = None,
    tasks_folder: Annotated[
        Path | None, typer.Option(help="YAML files of lm-eval tasks of your own.", metavar="FOLDER")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:i.")] = "auto",
    as_json: JsonOption = False,
) -> None:
    """Perplexity of MODEL in torch, by llama.cpp's protocol; with a recipe, what becomes of it, without writing a file.

    All linear layers of the blocks get the recipe's type, a key of `formats` or a grid such as INT4_G128; embedding and
    output matrix stay float. --tasks scores both models in lm-eval besides, and takes memory for all of their weights.
    """
    given = dict(setting_of(each) for each in settings or []) | {"model": model}
    wanted = load_recipe(recipe, **given) if recipe else recipe_from(given, "--set") if settings else None
    names = [] if tasks is None else [name.strip() for name in tasks.split(",")]
    if not all(names):
        raise UsageError(f"--tasks is {tasks!r}; expected names such as hellaswag,arc_easy.")
    if tasks_folder and not names:
        raise UsageError("--tasks-folder is given without --tasks; name the tasks in it that are to be run.")

    from qronos_export.evaluation import Evaluated
    from qronos_export.evaluation import evaluate as run_evaluation
    from qronos_export.events import Stage, Step
    from qronos_export.proof import Held

    with progress() as bar:
        task = bar.add_task("start", total=None, detail="")
        for event in run_evaluation(
            model,
            wanted,
            Held(text, context, chunks),
            tasks=names,
            tasks_folder=tasks_folder,
            device=device,
            on_progress=lambda done, total: bar.update(task, completed=done, total=total),
        ):
            if isinstance(event, Stage):
                bar.reset(task, total=event.steps, description=event.name, detail="")
            elif isinstance(event, Step):
                bar.update(task, completed=event.done, detail=event.layer.name if event.layer else "")
            elif isinstance(event, Evaluated):
                bar.remove_task(task)
                done, result, notes = event, event.evaluation, event.notes
    if as_json:
        scores = {"scores_reference": done.scores_reference, "scores": done.scores}
        typer.echo(json.dumps({**result.to_json(), "notes": notes, **scores}, indent=2))
        return
    rows = [
        ("perplexity of the model", f"{result.perplexity_reference:.4f} ± {result.perplexity_reference_error:.4f}"),
        ("measured on", f"{result.chunks} chunks of {result.context} tokens"),
    ]
    if result.perplexity is not None:
        rows[1:1] = [
            ("  of the recipe", f"{result.perplexity:.4f} ± {result.perplexity_error:.4f}"),
            ("KL divergence", f"{result.kl_divergence:.5f} ± {result.kl_divergence_error:.5f} nats"),
            ("same top token", f"{result.same_top:.2f} %"),
        ]
    for name, row in (done.scores_reference or {}).items():
        rows += [(f"{name} {metric}", shown) for metric, shown in _scored(row)]
        if done.scores:
            rows += [(f"  {metric} of the recipe", shown) for metric, shown in _scored(done.scores[name])]
    rows += [("note", note) for note in notes[:5]]
    if len(notes) > 5:
        rows.append(("", f"{counted(len(notes) - 5, 'more note')} with --json"))
    table(*rows)


def _scored(row: dict[str, float]) -> Iterator[tuple[str, str]]:
    """Metrics of a task as they are shown, their standard errors beside them."""
    for key, value in row.items():
        metric, _, rule = key.partition(",")
        if not metric.endswith("_stderr"):
            error = row.get(f"{metric}_stderr,{rule}")
            label = metric if rule == "none" else f"{metric} ({rule})"
            yield label, f"{value:.4f}" + ("" if error is None else f" ± {error:.4f}")
