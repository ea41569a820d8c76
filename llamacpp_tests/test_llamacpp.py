"""llama.cpp found, run and understood, with the real tools."""

import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qronos_export.errors import CalibrationError, CheckpointError, LlamaCppError, OutputError, QronosError, UsageError
from qronos_export.llamacpp import PINNED, TOOLS, VARIABLE, LlamaCpp
from qronos_export.llamacpp_build import install
from qronos_export.llamacpp_find import find
from qronos_export.llamacpp_log import divergence, logits_bytes, planned_types
from qronos_export.process import run


@pytest.fixture(scope="session")
def tiny_checkpoint(demo_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama with SmolLM2's tokenizer, which the converter knows by its fingerprint."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(demo_gguf.parent, gguf_file=demo_gguf.name)
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


# ---- finding


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No llama.cpp in the environment, on PATH or in the cache, which is the folder returned."""
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.setenv("QRONOS_EXPORT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_version_is_that_of_the_pinned_build(llamacpp: LlamaCpp) -> None:
    assert llamacpp.version.split()[0] == PINNED


@pytest.mark.parametrize("layout", [".", "bin", "build/bin"])
def test_a_folder_given_may_be_the_tools_an_install_or_a_checkout(
    llamacpp: LlamaCpp, nowhere: Path, tmp_path: Path, layout: str
) -> None:
    folder = tmp_path / "given"
    (folder / layout).mkdir(parents=True)
    for tool in TOOLS:
        (folder / layout / tool).symlink_to(llamacpp.bin_folder / tool)
    found = find(folder)
    assert (found.bin_folder, found.version, found.origin) == (folder / layout, llamacpp.version, "the folder given")


def test_the_order_is_option_variable_path_cache(
    llamacpp: LlamaCpp, nowhere: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    installed = nowhere / f"llamacpp-{PINNED}"
    installed.mkdir(parents=True)
    (installed / "bin").symlink_to(llamacpp.bin_folder)
    assert find().origin == "`qronos-export llamacpp install`"
    assert install() == find()  # nothing to do: it is there

    monkeypatch.setenv("PATH", str(llamacpp.bin_folder))
    assert find().origin == "PATH"
    monkeypatch.setenv(VARIABLE, str(llamacpp.bin_folder))
    assert find().origin == VARIABLE
    assert find(llamacpp.bin_folder).origin == "the folder given"


def test_the_source_is_the_one_the_tools_were_built_from(llamacpp: LlamaCpp) -> None:
    assert llamacpp.source is not None
    assert (llamacpp.source / "convert_hf_to_gguf.py").is_file()


def test_nothing_found_names_the_four_places_and_the_remedy(nowhere: Path) -> None:
    with pytest.raises(LlamaCppError) as caught:
        find()
    for part in ("folder given", VARIABLE, "PATH", str(nowhere), "qronos-export llamacpp install"):
        assert part in str(caught.value)


def test_a_wrong_place_is_an_error_even_where_others_would_do(
    llamacpp: LlamaCpp, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(LlamaCppError, match="is not a folder"):
        find(tmp_path / "missing")
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    with pytest.raises(LlamaCppError, match=f"{VARIABLE}.* has no llama-perplexity"):
        find()
    (tmp_path / TOOLS[0]).symlink_to(llamacpp.bin_folder / TOOLS[0])
    with pytest.raises(LlamaCppError, match="lacks llama-quantize, llama-imatrix, llama-completion"):
        find()


def test_a_program_that_is_not_llamacpp_is_refused(tmp_path: Path) -> None:
    for tool in TOOLS:
        (tmp_path / tool).symlink_to(str(shutil.which("true")))
    with pytest.raises(LlamaCppError, match="does not look like llama"):
        find(tmp_path)


def test_without_a_compiler_install_says_so_and_leaves_nothing(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(LlamaCppError, match="No C\\+\\+ compiler"):
        install()
    assert [file.name for file in nowhere.iterdir()] == ["llamacpp.lock"]


# ---- running


def test_the_time_limit_ends_a_program_and_its_children(tmp_path: Path) -> None:
    child = "import subprocess, sys; p = subprocess.Popen(['sleep', '60']); print(p.pid, flush=True); p.wait()"
    pids: list[str] = []
    began = time.monotonic()
    with pytest.raises(LlamaCppError, match="stopped after 1 seconds"):
        run([sys.executable, "-c", child], time_limit=1, on_line=pids.append)
    assert time.monotonic() - began < 10
    assert _ended(int(pids[0]))


def test_raising_while_a_program_prints_ends_it() -> None:
    child = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    pids: list[str] = []

    def stop(line: str) -> None:
        pids.append(line)
        raise OutputError("enough")

    with pytest.raises(OutputError, match="enough"):
        run([sys.executable, "-c", child], time_limit=60, on_line=stop)
    assert _ended(int(pids[0]))


def test_a_failure_shows_the_command_its_end_and_the_exit_code() -> None:
    with pytest.raises(LlamaCppError) as caught:
        run([sys.executable, "-c", "import sys; [print('line', i) for i in range(99)]; sys.exit(3)"], time_limit=60)
    message = str(caught.value)
    assert "exit code 3" in message and "-c 'import sys;" in message
    assert "    line 98" in message and "line 68\n" not in message


def test_a_killed_program_names_the_signal() -> None:
    with pytest.raises(LlamaCppError, match=r"signal 4 .*built for another CPU"):
        run([sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGILL)"], time_limit=60)


def test_a_missing_program_is_readable() -> None:
    with pytest.raises(LlamaCppError, match="could not be started \\(No such file"):
        run(["/nonexistent/llama-perplexity"], time_limit=1)


# ---- quantizing


@pytest.mark.parametrize(
    ("ftype", "tensor_types", "pure"),
    [("Q4_0", {}, False), ("Q4_K_M", {"attn_q": "q5_1"}, False), ("Q8_0", {}, True), ("COPY", {}, False)],
)
def test_planned_types_are_what_quantize_writes(
    llamacpp: LlamaCpp, demo_gguf: Path, tmp_path: Path, ftype: str, tensor_types: dict[str, str], pure: bool
) -> None:
    from gguf import GGUFReader

    file = tmp_path / "quantized.gguf"
    options = [] if ftype == "COPY" else ["--allow-requantize"]
    planned = llamacpp.plan(demo_gguf, ftype, tensor_types=tensor_types, pure=pure, options=options).types
    llamacpp.quantize(demo_gguf, file, ftype, tensor_types=tensor_types, pure=pure, options=options)
    written = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(file).tensors}
    assert planned == written
    assert len(planned) == 272
    if tensor_types:
        assert planned["blk.0.attn_q.weight"] == "Q5_1"


def test_a_tensor_name_longer_than_its_column_is_read_whole() -> None:
    # The tool's format, "%-36s - [%s], type = %6s, ", with a name of 56 characters, the longest known one of llama.cpp.
    name = "a.blk.0.conformer_convolution_depthwise_normalized.weight"
    line = f"[   1/   2] {name:<36s} - [    64,     64,      1,      1], type =    f32, size = "
    assert planned_types(line + "    0.02 MiB ->     0.00 MiB (q4_K)\n").types == {name: "Q4_K"}
    assert planned_types(line + "    0.016 MiB\n").types == {name: "F32"}


def test_an_unknown_type_lists_the_known_ones(llamacpp: LlamaCpp, demo_gguf: Path) -> None:
    with pytest.raises(UsageError, match=r"no type 'Q4_9'; it accepts .*Q4_0, .*IQ4_XS.*F16"):
        llamacpp.plan(demo_gguf, "Q4_9")


def test_a_failed_quantization_leaves_no_file(llamacpp: LlamaCpp, demo_gguf: Path, tmp_path: Path) -> None:
    with pytest.raises(LlamaCppError, match="requantizing from type q4_1 is disabled"):
        llamacpp.quantize(demo_gguf, tmp_path / "out.gguf", "Q4_0")
    assert list(tmp_path.iterdir()) == []


def test_an_importance_matrix_helps_the_type_that_requires_one(
    llamacpp: LlamaCpp, demo_gguf: Path, english: Path, tmp_path: Path
) -> None:
    seen: list[tuple[int, int]] = []
    matrix = llamacpp.imatrix(
        demo_gguf, english, tmp_path / "imatrix.gguf", on_chunk=lambda *at: seen.append(at), context=64, chunks=4
    )
    assert seen[-1] == (4, 4)
    assert llamacpp.vocabulary(demo_gguf) == 49152
    # One tensor is enough, and quick; its 1536 columns are a multiple of 256.
    with_it: dict[str, Any] = {"tensor_types": {"blk.0.ffn_down": "iq2_xs"}, "options": ["--allow-requantize"]}
    with pytest.raises(LlamaCppError, match="requires an importance matrix"):
        llamacpp.quantize(demo_gguf, tmp_path / "without.gguf", "Q8_0", **with_it)
    assert llamacpp.plan(demo_gguf, "Q8_0", imatrix=matrix, **with_it).types["blk.0.ffn_down.weight"] == "IQ2_XS"
    llamacpp.quantize(demo_gguf, tmp_path / "with.gguf", "Q8_0", imatrix=matrix, **with_it)


# ---- converting


def test_a_converted_checkpoint_is_a_model_llamacpp_measures(
    llamacpp: LlamaCpp, tiny_checkpoint: Path, english: Path, tmp_path: Path
) -> None:
    file = llamacpp.convert(tiny_checkpoint, tmp_path / "tiny.gguf", "f32")
    assert [entry.name for entry in tmp_path.iterdir()] == ["tiny.gguf"]
    assert set(llamacpp.plan(file, "F32").types.values()) == {"F32"}
    measured = llamacpp.perplexity(file, english, context=64, chunks=4)
    # Random weights know nothing: about as many choices as there are tokens.
    assert 30_000 < measured.value < 70_000


def test_an_unknown_architecture_is_the_checkpoints_fault(llamacpp: LlamaCpp, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["BogusForCausalLM"], "model_type": "bogus"}))
    with pytest.raises(CheckpointError, match="does not know the architecture BogusForCausalLM"):
        llamacpp.convert(tmp_path, tmp_path / "out.gguf", "f32")
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        llamacpp.convert(tmp_path / "missing", tmp_path / "out.gguf", "f32")


def test_an_unknown_tokenizer_is_the_checkpoints_fault(
    llamacpp: LlamaCpp, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    altered = shutil.copytree(tiny_checkpoint, tmp_path / "altered")
    tokenizer = json.loads((altered / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"] = {
        "type": "ByteLevel",
        "add_prefix_space": True,
        "trim_offsets": True,
        "use_regex": False,
    }
    (altered / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(CheckpointError, match=r"does not recognise its tokenizer \(fingerprint \w{64}\)"):
        llamacpp.convert(altered, tmp_path / "out.gguf", "f32")


def test_without_a_source_convert_says_how_to_get_one(llamacpp: LlamaCpp, tmp_path: Path) -> None:
    with pytest.raises(LlamaCppError, match="qronos-export llamacpp install"):
        replace(llamacpp, source=None).convert(tmp_path, tmp_path / "out.gguf", "f32")


# ---- measuring


@pytest.fixture(scope="module")
def logits(llamacpp: LlamaCpp, demo_gguf: Path, english: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model's log-probabilities on four chunks of 64 tokens."""
    file = tmp_path_factory.mktemp("logits") / "logits"
    llamacpp.perplexity(demo_gguf, english, logits=file, context=64, chunks=4)
    assert file.stat().st_size == logits_bytes(49152, 64, 4)
    return file


def test_perplexity_and_divergence_of_a_model_against_itself(
    llamacpp: LlamaCpp, demo_gguf: Path, english: Path, logits: Path
) -> None:
    seen: list[tuple[int, int]] = []
    own = llamacpp.perplexity(demo_gguf, english, on_chunk=lambda *at: seen.append(at), context=64, chunks=4)
    assert (own.context, own.chunks) == (64, 4)
    assert 2 < own.value < 100 and 0 < own.error < own.value
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]

    seen.clear()
    same = llamacpp.kl_divergence(demo_gguf, logits, on_chunk=lambda *at: seen.append(at))
    assert (same.context, same.chunks) == (64, 4)
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert abs(same.mean) < 1e-4  # the stored log-probabilities have 16 bits
    assert same.same_top > 99
    assert same.perplexity == pytest.approx(own.value, rel=1e-4)
    assert same.perplexity_reference == pytest.approx(own.value, rel=1e-3)


def test_divergence_of_a_coarser_model(llamacpp: LlamaCpp, coarse_gguf: Path, logits: Path) -> None:
    coarse = llamacpp.kl_divergence(coarse_gguf, logits)
    assert 0.05 < coarse.mean < 3 and 0 < coarse.error < coarse.mean
    assert coarse.median < coarse.percentile_90 < coarse.percentile_99 <= coarse.maximum
    assert coarse.same_top < 95 and coarse.rms_delta_p > 1
    # A mean of logarithms is the logarithm of the ratio: what was parsed belongs together.
    assert math.log(coarse.perplexity / coarse.perplexity_reference) == pytest.approx(coarse.ln_ratio, rel=1e-4)


def test_a_quantized_cache_is_an_option(llamacpp: LlamaCpp, demo_gguf: Path, english: Path) -> None:
    cache = ["--cache-type-k", "q4_0", "--cache-type-v", "q4_0", "--flash-attn", "on"]
    plain = llamacpp.perplexity(demo_gguf, english, context=64, chunks=4)
    assert llamacpp.perplexity(demo_gguf, english, options=cache, context=64, chunks=4).value != plain.value


def test_a_text_shorter_than_two_chunks(llamacpp: LlamaCpp, demo_gguf: Path, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("Too little to measure anything with.")
    for measure in (llamacpp.perplexity, lambda model, text: llamacpp.imatrix(model, text, tmp_path / "imatrix.gguf")):
        with pytest.raises(CalibrationError, match=r"short\.txt is too short: \d+ tokens, and two chunks need 1024"):
            measure(demo_gguf, text)
    assert list(tmp_path.iterdir()) == [text]


def test_a_reference_of_another_vocabulary(llamacpp: LlamaCpp, demo_gguf: Path, logits: Path, tmp_path: Path) -> None:
    content = bytearray(logits.read_bytes())
    logits = tmp_path / "logits"
    content[12:16] = (49000).to_bytes(4, "little")  # see logits_bytes for the layout
    logits.write_bytes(content)
    with pytest.raises(LlamaCppError, match="49152 tokens in its vocabulary and the reference has 49000"):
        llamacpp.kl_divergence(demo_gguf, logits)
    logits.write_bytes(b"not log-probabilities")
    with pytest.raises(OutputError, match="is not a file of log-probabilities"):
        llamacpp.kl_divergence(demo_gguf, logits)


def test_a_variance_below_zero_is_none() -> None:
    """Files that hardly differ: llama.cpp takes it as a difference of sums and prints the root, ± -nan."""
    text = """\
computing over 2 chunks, n_ctx=128, batch_size=512, n_seq=4
chunk    PPL    ln(PPL(Q)/PPL(base))    KL Divergence    Δp RMS    Same top p
   1   12.1000 ±  0.3000     0.00001 ±     -nan     0.00000 ±  0.00000   0.010 ±  0.001 %   99.400 ±  0.100 %
   2   12.5000 ±  0.2500     0.00002 ±     -nan     0.00000 ±  0.00000   0.010 ±  0.001 %   99.500 ±  0.100 %
Mean PPL(Q) : 12.5 ± 0.25
Mean PPL(base) : 12.5 ± 0.25
Mean ln(PPL(Q)/PPL(base)) : 0.000024 ± -nan
Mean KLD: 0.000001 ± 0.000001
Maximum KLD: 0.1
99.0% KLD: 0.01
90.0% KLD: 0.001
Median KLD: 0.0001
RMS Δp : 0.01 ± 0.001 %
Same top p: 99.5 ± 0.1 %
"""
    found = divergence(text, Path("a.gguf"))
    assert (found.ln_ratio, found.ln_ratio_error) == (0.000024, 0)
    assert found.per_chunk is not None and found.per_chunk.same_top == pytest.approx([99.4, 99.6])
    for broken in ("nan ± nan", "nan ± -nan", "0.1 ± inf"):
        with pytest.raises(LlamaCppError, match="not finite"):
            divergence(text.replace("0.000024 ± -nan", broken), Path("a.gguf"))


def test_weights_that_are_not_numbers(llamacpp: LlamaCpp, demo_gguf: Path, english: Path, tmp_path: Path) -> None:
    from gguf import GGUFReader

    # Unchecked, this one NaN turns into a plausible perplexity: the next matrix product rounds it to some byte.
    file = tmp_path / "broken.gguf"
    shutil.copy(demo_gguf, file)
    reader = GGUFReader(file, "r+")
    (norm,) = (tensor for tensor in reader.tensors if tensor.name == "output_norm.weight")
    norm.data[0] = float("nan")
    reader.data.flush()
    with pytest.raises(LlamaCppError, match=r"'output_norm\.weight' has invalid data"):
        llamacpp.perplexity(file, english, context=64, chunks=4)


def test_the_disk_is_asked_before_anything_is_computed(
    llamacpp: LlamaCpp, demo_gguf: Path, english: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = shutil.disk_usage(tmp_path)._replace(free=10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: free)
    with pytest.raises(OutputError, match=r"need 0\.0122 GB in .*, which has 0\.001 GB free.*--chunks.*TMPDIR"):
        llamacpp.perplexity(demo_gguf, english, logits=tmp_path / "logits", context=64, chunks=4)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["noise", "truncated"])
def test_a_broken_file_shows_what_llamacpp_said(
    llamacpp: LlamaCpp, demo_gguf: Path, english: Path, tmp_path: Path, damage: str
) -> None:
    file = tmp_path / "broken.gguf"
    with demo_gguf.open("rb") as whole:
        file.write_bytes(whole.read(20_000_000) if damage == "truncated" else os.urandom(1000))
    said = {"noise": "invalid magic", "truncated": "not within the file bounds"}[damage]
    broken: list[Callable[[], object]] = [
        lambda: llamacpp.perplexity(file, english, context=64, chunks=4),
        lambda: llamacpp.plan(file, "Q8_0"),
    ]
    for use in broken:
        with pytest.raises(LlamaCppError, match=said) as caught:
            use()
        assert "broken.gguf" in str(caught.value) and '{"type"' not in str(caught.value)


def test_a_measurement_that_takes_too_long_leaves_no_file(
    llamacpp: LlamaCpp, demo_gguf: Path, english: Path, tmp_path: Path
) -> None:
    hurried = replace(llamacpp, time_limit=0.5)
    with pytest.raises(LlamaCppError, match="its time limit"):
        hurried.perplexity(demo_gguf, english, logits=tmp_path / "logits")
    assert list(tmp_path.iterdir()) == []


def test_missing_files_are_named_before_anything_runs(llamacpp: LlamaCpp, demo_gguf: Path, english: Path) -> None:
    gone = Path("gone")
    missing: list[tuple[type[QronosError], Callable[[], object]]] = [
        (CheckpointError, lambda: llamacpp.perplexity(gone, english)),
        (CalibrationError, lambda: llamacpp.perplexity(demo_gguf, gone)),
        (OutputError, lambda: llamacpp.kl_divergence(demo_gguf, gone)),
        (CheckpointError, lambda: llamacpp.plan(gone, "Q4_0")),
        (OutputError, lambda: llamacpp.quantize(demo_gguf, gone / "out.gguf", "Q4_0")),
    ]
    for error, use in missing:
        with pytest.raises(error, match="gone"):
            use()


def _ended(pid: int) -> bool:
    """True once the process is gone or only waits to be reaped."""
    for _ in range(50):
        status = Path(f"/proc/{pid}/stat")
        if not status.exists() or status.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return True
        time.sleep(0.1)
    return False


def test_a_tool_that_fails_without_a_word_is_asked_again(llamacpp: LlamaCpp, tmp_path: Path) -> None:
    """What llama.cpp's logger does on a busy machine: the exit code comes, the reason does not."""
    for tool in TOOLS:
        (tmp_path / tool).write_text(
            f"""#!/bin/sh
echo asked >> {tmp_path}/asked
[ "$(wc -l < {tmp_path}/asked)" -lt "$(cat {tmp_path}/silent)" ] || echo "this is why" >&2
exit 1
"""
        )
        (tmp_path / tool).chmod(0o755)
    mute = replace(llamacpp, bin_folder=tmp_path)
    model = tmp_path / "model.gguf"
    model.touch()
    for silent, said, asked in ((6, "this is why", 6), (9, "it printed nothing", 6), (1, "this is why", 1)):
        (tmp_path / "silent").write_text(f"{silent}\n")
        (tmp_path / "asked").unlink(missing_ok=True)
        with pytest.raises(LlamaCppError, match=said):
            mute.vocabulary(model)
        assert (tmp_path / "asked").read_text().count("asked") == asked
