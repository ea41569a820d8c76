"""`evaluate --tasks`: lm-eval's scores are those of the float model and of what the recipe makes of it."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner

from formats import find_format
from qronos_export import evaluation
from qronos_export.checkpoint import load_whole, open_checkpoint, tokenizer
from qronos_export.cli import app
from qronos_export.corpus import held_out_text, held_out_tokens
from qronos_export.errors import TaskError, UsageError
from qronos_export.evaluation import Evaluated, evaluate
from qronos_export.online import online_model
from qronos_export.proof import Held
from qronos_export.recipe import Recipe
from qronos_export.tasks import Scores, Suite
from tests.families import make

TASK = """\
task: colours
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
  - {metric: brier_score, aggregation: brier_score, higher_is_better: false}
"""
THINGS = ("blood", "corn", "the sky", "fire", "sand", "water", "lava", "gold", "ice", "wine", "honey", "ink")
ITEMS: list[dict[str, Any]] = [
    {"question": f"What is {thing}?", "choices": [f"{other} or {thing[::-1]}" for other in THINGS[:4]], "answer": n % 4}
    for n, thing in enumerate(THINGS)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Tasks of a user: YAML files and their data, which `datasets` keeps a copy of elsewhere."""
    import datasets  # extras that tools/test installs: missing, it fails

    folder = tmp_path_factory.mktemp("tasks")
    (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in ITEMS))
    (folder / "colours.yaml").write_text(TASK.replace("FILE", str(folder / "items.jsonl")))
    (folder / "absent.yaml").write_text(TASK.replace("colours", "absent").replace("FILE", str(folder / "no.jsonl")))
    (folder / "unsafe.yaml").write_text((folder / "colours.yaml").read_text().replace("colours", "unsafe"))
    with (folder / "unsafe.yaml").open("a") as file:
        file.write("unsafe_code: true\n")
    (folder / "empty.jsonl").write_text(
        "".join(json.dumps(item | ({"choices": []} if n else {})) + "\n" for n, item in enumerate(ITEMS))
    )
    (folder / "empty.yaml").write_text(TASK.replace("colours", "empty").replace("FILE", str(folder / "empty.jsonl")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        datasets.disable_progress_bars()
        yield folder
        datasets.enable_progress_bars()


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "held.txt"
    path.write_text(held_out_text()[:60_000])
    return path


def finish(model: Path, recipe: Recipe | None, text: Path, **options: Any) -> Evaluated:
    *_, done = evaluate(str(model), recipe, Held(text, 64, 4), device="cpu", micro_batch=2, **options)
    assert isinstance(done, Evaluated)
    return done


def expected(folder: Path) -> tuple[float, float, float]:
    """Shares of items whose likeliest answer, as it is and per character, is the right one; and the mean squared
    distance of the answers' probabilities from it (Brier), which no two models share by chance."""
    checkpoint = open_checkpoint(str(folder))
    model, encode = load_whole(checkpoint), tokenizer(checkpoint)
    right, distance = torch.zeros(2), 0.0
    for item in ITEMS:
        question = f"Question: {item['question']}\nAnswer:"
        start = len(encode(question)["input_ids"])
        likelihood = []
        for choice in item["choices"]:
            ids = torch.tensor(encode(f"{question} {choice}")["input_ids"])
            with torch.no_grad():
                said = model(ids[None]).logits[0, start - 1 : -1].log_softmax(-1)
            likelihood.append(said.gather(1, ids[start:, None]).sum())
        plain = torch.stack(likelihood)
        lengths = torch.tensor([len(choice) for choice in item["choices"]])
        right += torch.tensor([int(each.argmax()) == item["answer"] for each in (plain, plain / lengths)])
        correct = torch.eye(len(plain))[item["answer"]]
        distance += float((plain.softmax(0) - correct).square().sum()) / len(ITEMS)
    acc, acc_norm = (right / len(ITEMS)).tolist()
    return acc, acc_norm, distance


def checked(found: Scores | None, folder: Path) -> float:
    """What lm-eval says of the model in `folder` is what a plain count says."""
    assert found is not None and list(found) == ["colours"]
    scores = found["colours"]
    *shares, distance = expected(folder)
    for metric, share in zip(("acc", "acc_norm"), shares, strict=True):
        assert scores[f"{metric},none"] == pytest.approx(share)
        error = math.sqrt(share * (1 - share) / (len(ITEMS) - 1))
        assert scores[f"{metric}_stderr,none"] == pytest.approx(error)
    assert scores["brier_score,none"] == pytest.approx(distance, rel=1e-6)
    return scores["brier_score,none"]


def test_scores_are_those_of_both_models(folder: Path, text: Path, tmp_path: Path) -> None:
    """The recipe's are those of a checkpoint that holds the rounded weights; the model's file stays as it is."""
    import lm_eval.models.huggingface as harness
    import tqdm

    model = make("llama", tmp_path / "tiny")
    weights = load_file(model / "model.safetensors")
    before = hashlib.sha256((model / "model.safetensors").read_bytes()).digest()
    recipe, seen = Recipe(str(model), "INT2", method="rtn"), []
    done = finish(
        model, recipe, text, tasks=["colours"], tasks_folder=folder, on_progress=lambda *step: seen.append(step)
    )
    assert hashlib.sha256((model / "model.safetensors").read_bytes()).digest() == before
    requests = sum(len(item["choices"]) for item in ITEMS)
    assert seen[-1] == (requests, requests) and harness.tqdm is tqdm.tqdm  # lm-eval has its bars back

    rounded = shutil.copytree(model, tmp_path / "rounded")
    for name, weight in weights.items():
        if weight.ndim == 2 and ".layers." in name:
            fmt = find_format("INT2", weight.shape[1])
            weights[name] = fmt.dequantize(fmt.quantize(weight, None))
    save_file(weights, rounded / "model.safetensors", {"format": "pt"})
    assert checked(done.scores_reference, model) != pytest.approx(checked(done.scores, rounded), rel=1e-5)


class Perplexity:
    """In the place of lm-eval's tasks: the perplexity of the model it is given, as transformers runs it, and the KL
    divergence of the first model it was given from this one."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens
        self.first: Tensor | None = None

    def __call__(self, names: list[str], folder: Path | None) -> Perplexity:
        return self

    def scores(self, model: nn.Module, tokenizer: Any, *, micro_batch: int, on_progress: Any) -> Scores:
        with torch.no_grad():
            logits = torch.cat([model(ids).logits.float() for ids in self.tokens.split(micro_batch)])
        half = self.tokens.shape[1] // 2
        said = logits[:, half:-1].flatten(0, 1).log_softmax(-1)
        self.first = said if self.first is None else self.first
        divergence = F.kl_div(said, self.first, log_target=True, reduction="batchmean")
        losses = F.nll_loss(said, self.tokens[:, half + 1 :].flatten())
        return {"text": {"perplexity": math.exp(losses), "kl_divergence": float(divergence)}}


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama_tied", {"transforms": "hadamard"}),
        ("llama", {"online": "r4", "activations": "int8"}),
        ("gemma3", {"activations": "mxfp8", "transforms": "none"}),
        ("mixtral", {"activations": "int8", "transforms": "none"}),
        ("qwen2", {"online": "quip"}),
        ("llama", {"kv_cache": {"k": "int4", "v": "int4"}}),
    ],
)
def test_tasks_see_the_model_that_is_measured(
    family: str, changes: dict[str, Any], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one piece as in the streams: transforms, stored values, rounded activations, online rotations."""
    checkpoint = open_checkpoint(str(make(family, tmp_path / "tiny")))
    monkeypatch.setattr(evaluation, "Suite", Perplexity(held_out_tokens(text, checkpoint, 64, 4)))
    recipe = Recipe(
        str(checkpoint.folder), "INT4_G32", calibration=str(text), samples=4, sequence_length=64, micro_batch=2
    )
    done = finish(checkpoint.folder, replace(recipe, **changes), text, tasks=["any"])
    found = done.evaluation
    assert done.scores_reference and done.scores and found.perplexity
    assert done.scores_reference["text"]["perplexity"] == pytest.approx(found.perplexity_reference, rel=1e-4)
    assert done.scores["text"]["perplexity"] == pytest.approx(found.perplexity, rel=1e-4)
    assert found.kl_divergence and found.kl_divergence > 0.01
    assert done.scores["text"]["kl_divergence"] == pytest.approx(found.kl_divergence, rel=0.01)


def test_activations_and_rotations_are_computed_in_one_piece_too(tmp_path: Path) -> None:
    """Were they not, the model in one piece would be another."""
    checkpoint = open_checkpoint(str(make("llama", tmp_path / "tiny")))
    tokens = torch.randint(5, 1000, (1, 32), generator=torch.Generator().manual_seed(0))

    def logits(**changes: Any) -> Tensor:
        recipe = Recipe("tiny", "INT4_G32", **changes)
        with torch.no_grad():
            return evaluation.Whole(online_model(recipe.online_names, checkpoint), recipe).model(tokens).logits

    plain = logits()
    for changes in ({"activations": "int8"}, {"kv_cache": {"v": "int4"}}):
        assert float((logits(**changes) - plain).abs().max()) > 1e-3 * float(plain.abs().max())
    for online in ("r4", "quip"):
        assert 0 < float((logits(online=online) - plain).abs().max()) < 1e-4 * float(plain.abs().max())


def test_standard_output_is_the_result_alone(folder: Path, text: Path, tmp_path: Path) -> None:
    model = make("llama", tmp_path / "tiny")
    settings = ["--text", str(text), "--context", "64", "--chunks", "4", "--json", "--tasks-folder", str(folder)]
    data = json.loads(CliRunner().invoke(app, ["evaluate", str(model), "--tasks", "colours", *settings]).stdout)
    assert (data["scores_reference"]["colours"]["acc,none"], data["scores"]) == (
        pytest.approx(expected(model)[0]),
        None,
    )


def test_scores_are_printed_with_their_errors(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Scored(Perplexity):
        def scores(self, *_: Any, **__: Any) -> Scores:
            row = {"acc,none": 0.5, "acc_stderr,none": 0.125, "exact_match,strict": 0.25}
            return {"colours": row, "hues": {"acc,none": 0.75}}

    monkeypatch.setattr(evaluation, "Suite", Scored(torch.empty(0)))
    model = make("llama", tmp_path / "tiny")
    settings = ["--text", str(text), "--context", "64", "--chunks", "2", "--set", "format=INT8", "--set", "method=rtn"]
    shown = CliRunner().invoke(app, ["evaluate", str(model), "--tasks", "colours,hues", *settings]).stdout
    assert [" ".join(line.split()) for line in shown.splitlines()][-6:] == [
        "colours acc 0.5000 ± 0.1250",
        "colours exact_match (strict) 0.2500",
        "acc of the recipe 0.5000 ± 0.1250",
        "exact_match (strict) of the recipe 0.2500",
        "hues acc 0.7500",
        "acc of the recipe 0.7500",
    ]


def test_tasks_that_cannot_be_run(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"Task absent cannot be loaded \(FileNotFoundError.*Hugging Face hub.*data_f"):
        Suite(["colours", "absent"], folder)
    with pytest.raises(UsageError, match="Task unsafe runs code that the model writes"):
        Suite(["unsafe"], folder)
    with pytest.raises(UsageError, match=r"--tasks-folder .*nothing is no folder"):
        Suite(["colours"], tmp_path / "nothing")
    import lm_eval.tasks

    # Reading all that comes with lm-eval takes seconds.
    own = partial(lm_eval.tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", own)
    with pytest.raises(UsageError, match=r"There is no task 'hue' in lm-eval or .*`lm-eval ls tasks`"):
        Suite(["colours", "hue"], folder)
    checkpoint = open_checkpoint(str(make("llama", tmp_path / "tiny")))
    with pytest.raises(TaskError, match=r"empty failed in lm-eval \("):
        Suite(["empty"], folder).scores(load_whole(checkpoint), tokenizer(checkpoint), micro_batch=2)


@pytest.mark.parametrize("package", ["lm_eval", "accelerate"])
def test_without_lm_eval(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert importlib.util.find_spec(package)
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UsageError, match=r"run `pip install 'qronos-export\[tasks\]'`"):
        Suite(["colours"])


@pytest.mark.parametrize(
    ("options", "says"), [(["--tasks", "a,,b"], "--tasks is 'a,,b'"), (["--tasks-folder", "."], "without --tasks")]
)
def test_tasks_have_names(options: list[str], says: str) -> None:
    refused = CliRunner().invoke(app, ["evaluate", "demo", *options])
    assert isinstance(refused.exception, UsageError) and says in str(refused.exception)
