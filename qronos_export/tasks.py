"""Zero-shot tasks, by EleutherAI's lm-eval: what a model gets right, in the harness whose numbers papers report.

This file owns every import of lm-eval, an extra. Which tasks there are, how they ask and how they score is lm-eval's;
its models are ours, in one piece and in memory. Tasks that run code which a model wrote are refused.
"""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qronos_export.errors import TaskError, UsageError

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager
    from torch import nn

Scores = dict[str, dict[str, float]]
"""Task or group -> lm-eval's name of a metric, a comma and its filter (`acc,none`, `acc_stderr,none`) -> its value."""
Progress = Callable[[int, int], None]


class Suite:
    """Some tasks by lm-eval's names, or by those in a user's `folder` of YAML files, which win."""

    def __init__(self, names: Sequence[str], folder: Path | None = None) -> None:
        """Reads the tasks' data, from the Hugging Face hub where they say so.

        Raises UsageError without lm-eval, and for tasks that do not exist, are not text alone, or run code;
        TaskError where a task or its data cannot be read.
        """
        if folder is not None and not folder.is_dir():
            raise UsageError(f"--tasks-folder {folder} is no folder; give one that holds YAML files of tasks.")
        try:
            import_module("lm_eval.models.huggingface")  # needs accelerate, too, which lm-eval does not ask for
        except ImportError as error:
            raise UsageError(f"--tasks needs lm-eval ({error}); run `pip install 'qronos-export[tasks]'`.") from error
        self._names = list(names)
        self._manager = _manager(self._names, folder)
        for name in self._names:
            try:
                with _reporting(None):
                    found = self._manager.load([name])["tasks"]
            except Exception as error:  # whatever the code of a task, `datasets` or a server has to say
                raise TaskError(
                    f"Task {name} cannot be loaded ({type(error).__name__}: {error}). Its YAML is not what lm-eval "
                    "expects, or its data is out of reach: tasks that come with lm-eval fetch theirs from the Hugging "
                    "Face hub, which needs a network or a copy in its cache; a task in --tasks-folder can read local "
                    "files by `dataset_path: json` and `dataset_kwargs: {data_files: …}`."
                ) from error
            for each, task in found.items():
                if getattr(task, "UNSAFE_CODE", False):
                    raise UsageError(f"Task {each} runs code that the model writes; use lm-eval itself, in a sandbox.")
                if getattr(task, "MULTIMODAL", False):
                    raise UsageError(f"Task {each} shows pictures or plays sound; the models here read text alone.")

    def scores(
        self, model: nn.Module, tokenizer: Any, *, micro_batch: int, on_progress: Progress | None = None
    ) -> Scores:
        """What `model`, a causal one of transformers', scores; `micro_batch` requests run at a time.

        `on_progress(done, total)` counts requests. Raises TaskError where a task asks something impossible.
        """
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from torch import OutOfMemoryError

        with _reporting(on_progress):
            try:
                found: Any = simple_evaluate(
                    model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=micro_batch),
                    tasks=self._names,
                    task_manager=self._manager,
                    log_samples=False,
                )
            except OutOfMemoryError:
                raise
            except Exception as error:  # a task's templates and metrics are code of its own
                names = ", ".join(self._names)
                raise TaskError(f"{names} failed in lm-eval ({type(error).__name__}: {error}).") from error
        return {
            name: {metric: value for metric, value in row.items() if "," in metric and isinstance(value, int | float)}
            for name, row in {**found["results"], **found.get("groups", {})}.items()
        }


def _manager(names: list[str], folder: Path | None) -> TaskManager:
    """The index of tasks that knows `names`; lm-eval's own, which take seconds to read, are in it where needed."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=folder, include_defaults=False) if folder else None
    if manager is None or not set(names) <= set(manager.all_tasks):
        manager = TaskManager(include_path=folder)
    if unknown := [name for name in names if name not in manager.all_tasks]:
        where = f"lm-eval or {folder}" if folder else "lm-eval; --tasks-folder names a folder with tasks of your own"
        raise UsageError(f"There is no task {unknown[0]!r} in {where}; `lm-eval ls tasks` lists what comes with it.")
    return manager


@contextmanager
def _reporting(on_progress: Progress | None) -> Iterator[None]:
    """lm-eval's bars become calls of `on_progress`; of its log only errors are left, and what it prints goes to
    standard error: the library does not draw, and standard output is the result's."""
    import tqdm
    from lm_eval.api import model, task
    from lm_eval.models import huggingface

    class Bar(tqdm.tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "file": io.StringIO()})

        def display(self, *_: Any, **__: Any) -> None:
            if on_progress and self.total:
                on_progress(int(self.n), int(self.total))

    log, places = logging.getLogger("lm_eval"), (tqdm, model, task, huggingface)
    level, bars = log.level, [place.tqdm for place in places]
    log.setLevel(logging.ERROR)
    for place in places:
        place.tqdm = Bar
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        log.setLevel(level)
        for place, bar in zip(places, bars, strict=True):
            place.tqdm = bar
