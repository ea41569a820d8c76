from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer

from qronos_export.commands.options import (
    CacheKOption,
    CacheVOption,
    ChunksOption,
    ContextOption,
    JsonOption,
    LlamaCppOption,
    TextOption,
    cache_types,
    table,
)


def validate(
    file: Annotated[Path, typer.Argument(help="The quantized .gguf, or an ONNX model or folder.")],
    reference: Annotated[str, typer.Option(help="Its float model: folder, hub id, .gguf or `demo`.")],
    text: TextOption = None,
    context: ContextOption = 512,
    chunks: ChunksOption = None,
    cache_type_k: CacheKOption = None,
    cache_type_v: CacheVOption = None,
    max_kld: Annotated[float | None, typer.Option(help="Fail above this KL divergence, in nats.")] = None,
    max_ppl_increase: Annotated[
        float | None, typer.Option(help="Fail above this rise of perplexity, in percent.")
    ] = None,
    gate: Annotated[Path | None, typer.Option(help="YAML of limits, see docs/howto/gates.md.", metavar="FILE")] = None,
    baseline: Annotated[
        Path | None,
        typer.Option(help="An earlier --json for the gate's limits against one, not the gate's.", metavar="FILE"),
    ] = None,
    junit: Annotated[Path | None, typer.Option(help="Write a test case for each limit.", metavar="FILE")] = None,
    summary: Annotated[
        str | None,
        typer.Option(help="Write Markdown; github: append it to the job's summary.", metavar="FILE|github"),
    ] = None,
    as_json: JsonOption = False,
    llamacpp: LlamaCppOption = None,
) -> None:
    """Perplexity and KL divergence of FILE against its float model: a GGUF in llama.cpp, ONNX in onnxruntime.

    Exits with 0 when all limits are kept, 1 when one is missed or something fails, 2 for wrong usage.
    """
    from qronos_export import gate_report
    from qronos_export.errors import GateError, QronosError, UsageError
    from qronos_export.gate import load_gates
    from qronos_export.llamacpp_find import find
    from qronos_export.proof import Held, prove, prove_onnx

    gates = load_gates(gate, baseline, max_kld=max_kld, max_ppl_increase=max_ppl_increase)
    held = Held(text, context, chunks, cache_types(cache_type_k, cache_type_v))
    if junit is not None:
        if not gates.names:
            raise UsageError("--junit has a test case for each limit and there is none; give --gate or --max-kld.")
        gate_report.check_folder(junit, "--junit")
    summary_file = None if summary is None else gate_report.summary_file(summary)
    if summary_file is not None:
        gate_report.check_folder(summary_file, "--summary")

    begun = time.perf_counter()
    try:
        gates.check_fits(text, context, chunks)
        if file.suffix == ".onnx" or file.is_dir():
            result = prove_onnx(file, reference, held)
        else:
            result = prove(file, reference, held, llamacpp=find(llamacpp))
        verdicts = gates.verdicts(result)
    except QronosError as error:
        if junit is not None:  # nothing that an earlier run left says otherwise
            gate_report.write(junit, gate_report.junit_error(file, str(error), time.perf_counter() - begun))
        raise
    seconds = time.perf_counter() - begun
    failures = [verdict.says for verdict in verdicts if not verdict.passed]
    if as_json:
        typer.echo(json.dumps({**result.to_json(), "failures": failures, "passed": not failures}, indent=2))
    else:
        table(
            ("perplexity", f"{result.perplexity:.4f} ± {result.perplexity_error:.4f}"),
            ("  of the float model", f"{result.perplexity_reference:.4f} ({result.perplexity_increase:+.2f} %)"),
            ("KL divergence", f"{result.kl_divergence:.5f} ± {result.kl_divergence_error:.5f} nats"),
            ("same top token", f"{result.same_top:.2f} %"),
            ("measured on", f"{result.chunks} chunks of {result.context} tokens, {result.runtime}"),
            ("cache", f"keys {result.cache_k}, values {result.cache_v}"),
            *((verdict.limit, verdict.says) for verdict in verdicts if verdict.passed),
        )
    if junit is not None:
        gate_report.write(junit, gate_report.junit(file, verdicts, seconds))
    if summary_file is not None:
        put = gate_report.append if summary == gate_report.GITHUB else gate_report.write
        put(summary_file, gate_report.markdown(file, result, verdicts))
    if failures:
        raise GateError(f"{file} failed: " + " ".join(failures))
