"""The model card of a run: metadata that the hub reads, then what the files are, how they were measured, how to run
them, and what made them. Everything in it is in report.json; nothing about the base model is made up.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from qronos_export.report import Artifact
from qronos_export.results import Results

CARD = "README.md"
LICENSE = "LICENSE"
MARK = "made by qronos-export"
"""By which a card of ours is known."""
_LIBRARIES = (("onnx-js", "transformers.js"), ("onnx", "onnxruntime-genai"))


def write_card(results: Results, repository: str | None = None, parts: Mapping[str, list[str]] | None = None) -> Path:
    """README.md in the folder of `results`, whole or not at all; and LICENSE where the model came with its text."""
    path = results.folder / CARD
    _put(path, model_card(results, repository, parts))
    if (text := results.report["model"].get("license_text")) is not None:
        _put(results.folder / LICENSE, text)
    return path


def model_card(results: Results, repository: str | None = None, parts: Mapping[str, list[str]] | None = None) -> str:
    """The card's text. `repository` is the owner/name it is for, if known; `parts` are the files that a large one is
    published as, by its name."""
    sections = [
        f"# {repository.partition('/')[2] if repository else results.report['model']['name']}",
        _introduction(results.report),
        _files(results, parts or {}),
        _measured(results),
        _running(results, repository, parts or {}),
        _made(results.report),
    ]
    body = "\n\n".join(section for section in sections if section)
    return str(ModelCard(f"---\n{_metadata(results).to_yaml()}\n---\n\n{body}\n"))


def _put(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def _metadata(results: Results) -> ModelCardData:
    model, calibration = results.report["model"], results.report["calibration"] or {}
    base, dataset = model.get("repository"), calibration.get("dataset")
    kinds = [_kind(artifact) for artifact in results.artifacts]
    file = {} if model.get("license") or "license_text" not in model else _of_file(model)
    measured = any(artifact.validation for artifact in results.artifacts)
    return ModelCardData(
        base_model=base,
        base_model_relation="quantized" if base else None,
        license=model.get("license", file.get("license")),
        license_name=model.get("license_name", file.get("license_name")),
        license_link=_link(model) or file.get("license_link"),
        language=model.get("language"),
        library_name="gguf" if "gguf" in kinds else next((name for kind, name in _LIBRARIES if kind in kinds), "onnx"),
        pipeline_tag=model.get("pipeline_tag", "text-generation"),  # llama.cpp and onnxruntime-genai do nothing else
        datasets=[dataset] if dataset else None,
        metrics=["perplexity"] if measured else None,
        tags=[
            *(["gguf", "llama.cpp"] if "gguf" in kinds else []),
            *(["onnx"] if any(kind != "gguf" for kind in kinds) else []),
            "quantized",
            results.report["recipe"]["method"],
            "qronos-export",
        ],
    )


def _of_file(model: Mapping[str, Any]) -> dict[str, str]:
    """A license whose text is all that is known, as the hub wants it."""
    return {"license": "other", "license_name": f"license-of-{model['name'].lower()}", "license_link": LICENSE}


def _link(model: Mapping[str, Any]) -> str | None:
    """The link to the license; one to a file beside the base model's card leads there, unless the file came along."""
    link, base = model.get("license_link"), model.get("repository")
    relative = isinstance(link, str) and "://" not in link
    if relative and base and "license_text" not in model:
        return f"https://huggingface.co/{base}/blob/{model['revision']}/{link}"
    return link


def _kind(artifact: Artifact) -> str:
    """gguf, onnx, onnx-js, onnx-plain or onnx-mx."""
    if artifact.path.endswith(".gguf"):
        return "gguf"
    return next(kind for kind in ("onnx-js", "onnx-plain", "onnx-mx", "onnx") if artifact.path.endswith(kind))


def _introduction(report: dict[str, Any]) -> str:
    model, base = report["model"], report["model"].get("repository")
    which = f"[{base}](https://huggingface.co/{base})" if base else f"`{model['name']}`"
    if model.get("revision"):
        which += f" at commit `{model['revision'][:12]}`"
    said = f"Quantized files of {which}, {MARK} {report['versions']['qronos-export']}."
    if not model.get("license") and "license_text" not in model:
        said += " The checkpoint came without a license or model card; see its source for the terms."
    return said


def _files(results: Results, parts: Mapping[str, list[str]]) -> str:
    rows = [
        "| file | type | bytes | bits a weight | perplexity | KL divergence, nats | same top token |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for artifact in results.artifacts:
        row = [f"`{artifact.path}`", artifact.format, f"{artifact.bytes:,}", f"{artifact.bits_per_weight:.3f}"]
        if found := results.validation(artifact):
            row += [
                f"{found.perplexity:.3f} ± {found.perplexity_error:.3f}",
                f"{found.kl_divergence:.5f} ± {found.kl_divergence_error:.5f}",
                f"{found.same_top:.2f} %",
            ]
        else:
            row += ["not measured"] * 3
        rows.append(f"| {' | '.join(row)} |")
    hashes = [f"{artifact.sha256}  {artifact.path}" for artifact in results.artifacts if _kind(artifact) == "gguf"]
    hashes += [
        f"{artifact.sha256}  {path.relative_to(results.folder)}"
        for artifact in results.artifacts
        if _kind(artifact) != "gguf"
        for path in results.files(artifact)
        if path.name.endswith("data")
    ]
    split = [f"`{name}` is published in parts, `{files[0]}` to `{files[-1]}`." for name, files in parts.items()]
    return "\n\n".join(
        ["## Files", "\n".join(rows), *split, "sha256, of ONNX models that of their data:", _fence("", *hashes)]
    )


def _measured(results: Results) -> str:
    """How each number was measured, files that were measured alike together."""
    alike: dict[str, list[str]] = {}
    for artifact in results.artifacts:
        if found := results.validation(artifact):
            how = (
                f"measured in {found.runtime} on {found.chunks} chunks of {found.context} tokens, the second half of "
                f"each scored, of the text with sha256 `{found.text_sha256}`, keys kept as {found.cache_k} and values "
                f"as {found.cache_v}. The float model's perplexity there is {found.perplexity_reference:.3f} ± "
                f"{found.perplexity_reference_error:.3f}. Errors are one standard deviation; the KL divergence is of "
                "the file's distribution of the next token from the float model's."
            )
            alike.setdefault(how, []).append(f"`{artifact.path}`")
    if not alike:
        return ""
    return "\n\n".join(["## How it was measured", *(f"{', '.join(files)}: {how}" for how, files in alike.items())])


def _running(results: Results, repository: str | None, parts: Mapping[str, list[str]]) -> str:
    ggufs = [artifact.path for artifact in results.artifacts if _kind(artifact) == "gguf"]
    genai = [artifact.path for artifact in results.artifacts if _kind(artifact) == "onnx"]
    js = [artifact.path for artifact in results.artifacts if _kind(artifact) == "onnx-js"]
    whole = [name for name in ggufs if name not in parts]
    firsts = [parts[name][0] if name in parts else name for name in ggufs]
    sections = ["## How to run it"]
    if firsts:
        given = f"--hf-repo {repository} --hf-file" if repository else "-m"
        sections += ["llama.cpp:", _fence("sh", *(f"llama-cli {given} {name}" for name in firsts))]
        if parts:
            sections.append("It finds the other parts by itself.")
    if whole:
        if repository:
            ollama = [f"ollama run hf.co/{repository}:{name}" for name in whole]
            studio = [f"lms get https://huggingface.co/{repository}"]
        else:
            ollama = [
                f"echo 'FROM ./{name}' > Modelfile && ollama create {_tag(name)} && ollama run {_tag(name)}"
                for name in whole
            ]
            studio = [f"lms import {name}" for name in whole]
        sections += ["Ollama:", _fence("sh", *ollama), "LM Studio:", _fence("sh", *studio)]
    if merged := [name for name in ggufs if name in parts]:
        lines = [f"llama-gguf-split --merge {parts[name][0]} {name}" for name in merged]
        sections += ["For Ollama and LM Studio make one file of the parts first:", _fence("sh", *lines)]
    if repository and (folders := [*genai, *js]):
        lines = [f"hf download {repository} --include '{name}/*' --local-dir ." for name in folders]
        sections += ["ONNX, after a download of the folder:", _fence("sh", *lines)]
    if genai:
        sections += ["onnxruntime-genai:", *(_fence("python", *_genai(name)) for name in genai)]
    if js:
        lines = [f'await pipeline("text-generation", "./{name}", {{ dtype: "q4" }});' for name in js]
        package = 'import { pipeline } from "@huggingface/transformers";'
        sections += ["transformers.js:", _fence("js", package, "", *lines)]
    return "\n\n".join(sections) if len(sections) > 1 else ""


def _tag(file: str) -> str:
    """A name for Ollama, which wants lower case."""
    return Path(file).stem.lower()


def _genai(folder: str) -> list[str]:
    return [
        "import onnxruntime_genai as og",
        "",
        f'model = og.Model("{folder}")',
        "tokenizer = og.Tokenizer(model)",
        "parameters = og.GeneratorParams(model)",
        "parameters.set_search_options(max_length=200)",
        "generator = og.Generator(model, parameters)",
        'generator.append_tokens(tokenizer.encode("The capital of France is"))',
        "while not generator.is_done():",
        "    generator.generate_next_token()",
        "print(tokenizer.decode(generator.get_sequence(0)))",
    ]


def _made(report: dict[str, Any]) -> str:
    """The recipe as it can be run again, on which text, and by which versions."""
    recipe, calibration = (public(report)[key] for key in ("recipe", "calibration"))
    said = "Rounded to nearest on searched scales, without calibration."
    if calibration:
        said = (
            f"Calibrated on {calibration['tokens']:,} tokens, {calibration['text']} (sha256 of the token ids "
            f"`{calibration['sha256']}`)."
        )
    again = "`qronos-export quantize --recipe report.json --output DIR` makes the same bytes from the same inputs:"
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    made = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True).rstrip()
    return "\n\n".join(["## How it was made", said, again, _fence("yaml", made), f"Versions: {versions}."])


def public(report: dict[str, Any]) -> dict[str, Any]:
    """The report without folders of the machine it was made on: of a path its last part stays."""
    model, recipe, calibration = dict(report["model"]), dict(report["recipe"]), report["calibration"]
    if not model.get("repository") and recipe["model"] != "demo":
        model["source"], recipe["model"] = Path(model["source"]).name, Path(recipe["model"]).name
    if recipe["calibration"] != "self" and not (calibration or {}).get("dataset"):
        recipe["calibration"] = Path(recipe["calibration"]).name
        calibration = calibration and {**calibration, "text": Path(calibration["text"]).name}
    return {**report, "model": model, "recipe": recipe, "calibration": calibration}


def _fence(language: str, *lines: str) -> str:
    return "\n".join([f"```{language}", *lines, "```"])
