"""The command line where it needs no llama.cpp: help, usage, recipes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from formats import FORMATS
from qronos_export.cli import app
from qronos_export.commands.options import substitute_rows
from qronos_export.errors import UsageError
from qronos_export.recipe import RECIPE_FIELDS, Recipe, load_recipe, plain_value, recipe_from, shipped
from qronos_export.report import RunReport
from qronos_export.validation import CACHE_TYPES


def test_help_imports_nothing_heavy() -> None:
    """`--help` answers at once because nothing of this is imported for it."""
    program = (
        "import sys\n"
        "sys.argv = ['qronos-export', '--help']\n"
        "from qronos_export.cli import main\n"
        "try:\n    main()\nexcept SystemExit as done:\n    assert done.code == 0\n"
        "print([m for m in ('torch', 'transformers', 'gguf', 'numpy', 'yaml', 'formats') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]"), done.stdout
    for command in ("quantize", "convert", "validate", "compare", "report", "publish", "formats", "llamacpp"):
        assert command in done.stdout


def test_without_the_onnx_extra_commands_on_onnx_say_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"")
    commands = [["inspect", "model.onnx"], ["validate", "model.onnx", "--reference", "x"]]
    commands.append(["compare", "model.onnx", "--reference", "x"])
    program = (
        "import sys\n"
        "for name in ('onnx', 'onnx_ir', 'onnxruntime', 'onnxruntime_genai'):\n    sys.modules[name] = None\n"
        "from typer.testing import CliRunner\n"
        "from qronos_export.cli import app\n"
        f"for command in {commands}:\n    print(repr(CliRunner().invoke(app, command).exception))"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    says = "UsageError(\"ONNX needs onnx, which is not installed; run `pip install 'qronos-export[onnx]'`.\")"
    assert done.stdout.splitlines() == [says] * 3


CLEARING = """
import sys, time
from qronos_export import cli

@cli.app.command()
def endless():
    try:
        print("begun", flush=True)
        time.sleep(60)
    finally:
        print("clearing", flush=True)
        sys.stdin.readline()
        print("cleared", flush=True)

sys.argv = ["qronos-export", "endless"]
cli.main()
"""


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)], ids=lambda each: str(each)
)
def test_what_is_cleared_away_is_not_interrupted(number: int, code: int) -> None:
    """By a second Ctrl-C, nor by a session that ends or an operator who asks again."""
    with subprocess.Popen(
        [sys.executable, "-c", CLEARING], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # which who runs this may ignore
    ) as process:  # fmt: skip
        assert process.stdin and process.stdout and process.stderr
        assert process.stdout.readline() == "begun\n"
        process.send_signal(number)
        assert process.stdout.readline() == "clearing\n"
        for again in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            process.send_signal(again)
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.read() == "cleared\n", process.stderr.read()
    assert process.returncode == code


def test_what_is_ignored_stays_ignored() -> None:
    """`nohup qronos-export …` outlives the terminal."""
    program = "import os, signal, sys\nfrom qronos_export.cli import main\nsys.argv = ['qronos-export', '--version']\n"
    program += "try:\n    main()\nexcept SystemExit:\n    os.kill(os.getpid(), signal.SIGHUP)\n    print('alive')\n"
    done = subprocess.run(["nohup", sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("alive\n"), done.stderr


def test_formats_lists_every_format() -> None:
    shown = CliRunner().invoke(app, ["formats"])
    assert shown.exit_code == 0
    for fmt in FORMATS.values():
        assert any(line.split()[:2] == [fmt.name, f"{fmt.bits_per_weight:g}"] for line in shown.output.splitlines())


@pytest.mark.parametrize(
    "arguments",
    [
        ["quantize", "demo"],  # no --output
        ["quantize", "demo", "--output", "x", "--samples", "many"],
        ["validate"],
        ["frobnicate"],
        ["quantize", "demo", "--output", "x", "--override", "Q8_0"],
        ["quantize", "demo", "--output", "x", "--override", "blk.*=Q8_0", "--override", "blk.*=Q5_0"],
        ["quantize", "demo", "--output", "x", "--context", "2"],
        ["quantize", "demo", "--output", "x", "--chunks", "0"],
        ["validate", "absent.gguf", "--reference", "demo"],
        ["validate", "absent.onnx", "--reference", "demo"],
        ["validate", "absent.gguf", "--reference", "demo", "--gate", "absent.yaml"],
        ["validate", "absent.gguf", "--reference", "demo", "--junit", "limits.xml"],
        ["compare", "--reference", "demo"],
        ["compare", "absent.gguf", "--reference", "demo"],
        ["convert", "absent.gguf", "--output", "x"],
        ["convert", "absent.gguf", "--output", "x", "--artifact", "gguf"],
        ["report"],
        ["report", "x", "--chunks", "few"],
        ["quantize", "demo", "--output", "x", "--artifact", "gguf,gguf"],
        ["quantize", "demo", "--output", "x", "--accuracy-level", "3"],
        ["quantize", "demo", "--output", "x", "--accuracy-level", "0"],
    ],
)
def test_wrong_usage_exits_with_2(arguments: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", "qronos_export", *arguments], capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr and done.stderr.strip()


def test_cache_types_are_known_also_where_nothing_is_validated() -> None:
    options = ["quantize", "demo", "--output", "x", "--no-validate", "--cache-type-k", "bogus"]
    refused = CliRunner().invoke(app, options).exception
    assert isinstance(refused, UsageError)
    assert str(refused).startswith(f"--cache-type-k is 'bogus'; llama.cpp's cache has {', '.join(CACHE_TYPES)}.")


@pytest.mark.parametrize("arguments", [["--debug", "quantize"], ["quantize", "--debug"]])
def test_debug_shows_the_traceback_wherever_it_stands(arguments: list[str]) -> None:
    command = [sys.executable, "-m", "qronos_export", *arguments, "demo", "--output", "x", "--override", "Q8_0"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" in done.stderr and "is not GLOB=TYPE" in done.stderr


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"method": "magic"}, "method is 'magic'; expected one of qronos, gptaq, gptq, ldlq, gpfq, rtn"),
        ({"samples": 0}, "samples is 0; expected at least 1"),
        ({"damping": -1.0}, "damping is -1.0; expected a number ≥ 0"),
        ({"shrinkage": 2.0}, "shrinkage is 2.0"),
        ({"order": "random"}, "order is 'random'"),
        ({"bogus": 1}, "unknown key 'bogus'"),
        ({"samples": "8"}, "samples is '8'; expected int"),
        ({"damping": "much"}, "damping is 'much'; expected float"),
        ({"format": "Q4_0,"}, "format is 'Q4_0,'; expected names such as"),
        ({"format": "Q4_0,q4_0"}, "each once"),
        ({"transforms": "equalize,none"}, "transforms is 'none'; expected one of hadamard"),
        ({"transforms": ""}, "transforms is ''; expected one of hadamard"),
        ({"held_out": 0.7}, "held_out is 0.7; expected a share from 0 to 0.5"),
        ({"held_out": 0.25, "samples": 3}, "one in 4 sequences and there are 3; raise samples"),
        ({"match_lengths": "prompts.txt", "method": "rtn"}, "rtn reads none"),
        ({"attention_aware": True, "online": "quip"}, "quip mixes the rows of heads"),
        ({"residual_aware": True, "online": "quip"}, "quip turns what residual_aware compares"),
        ({"residual_aware": True, "method": "gptq"}, "residual_aware is for method qronos; method is gptq"),
        ({"refine": -1}, "refine is -1; expected a number of rounds"),
        ({"refine": 1, "method": "rtn"}, "refine is for methods qronos, gptaq, gptq, ldlq; method is rtn"),
        ({"stochastic": True, "method": "rtn"}, "stochastic is for methods qronos"),
        ({"held_out": 0.25, "method": "gpfq"}, "held_out is for methods qronos"),
        ({"kv_cache": {"k": "q2_k"}}, "kv_cache: k is 'q2_k'; expected one of f16, q8_0"),
        ({"kv_cache": {"q": "q8_0"}}, "kv_cache: a key is 'q'; expected one of k, v"),
        ({"kv_cache": "q8_0"}, "kv_cache is 'q8_0'; expected dict"),
        ({"online": "r3"}, "r3 rotates keys so that they round better, and nothing rounds them here"),
        ({"online": "r3", "kv_cache": {"v": "q4_0"}}, "nothing rounds them here"),
        ({"online": "r4,quip"}, "expected each once, and r4 or quip"),
        ({"online": "r5"}, "online is 'r5'; expected one of r3, r4, quip"),
        ({"transforms": "spinquant", "online": "quip"}, "quip rotates what spinquant"),
        ({"transforms": "spinquant,hadamard"}, "expected each once, and hadamard or spinquant"),
        ({"transforms": "equalize,equalize"}, "expected each once"),
        ({"transforms": "hadamard,magr"}, "a setting of its own: --magr 0.01"),
        ({"transforms": "spinquant", "spin_steps": 0}, "spin_steps is 0; expected at least 1"),
        ({"transforms": "spinquant", "sequence_length": 1}, "sequences of sequence_length 1 have none"),
        ({"overrides": {"blk.*": 4}}, r"overrides is {'blk.\*': 4}; expected dict"),
    ],
)
def test_bad_recipes_say_what_is_wrong(options: dict, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        recipe_from({"model": "demo", **options}, "here")


def test_recipes_round_trip_and_options_win(tmp_path: Path) -> None:
    recipe = Recipe("demo", format="Q8_0", damping=0.5, samples=3, kv_cache={"k": "int4"}, online="r3,r4")
    assert recipe_from(json.loads(json.dumps(recipe.to_json())), "json") == recipe
    file = tmp_path / "recipe.yaml"
    file.write_text("model: demo\nformat: Q8_0\ndamping: 1\n")
    loaded = load_recipe(file, samples=5)
    assert (loaded.format, loaded.damping, loaded.samples) == ("Q8_0", 1.0, 5)
    assert set(recipe.to_json()) == set(RECIPE_FIELDS)
    file.write_text("model: demo\ndamping: 1e-2\noverrides:\n  'blk.0.*': Q8_0\n  'blk.*': Q4_0\n")
    loaded = load_recipe(file)  # 1e-2 is a string in YAML 1.1
    assert loaded.damping == 0.01 and list(loaded.overrides) == ["blk.0.*", "blk.*"]


def test_shipped_recipes_are_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each says in its first line what it is for, loads by name, and is what `recipe show` prints."""
    runner = CliRunner()
    listed = runner.invoke(app, ["recipe", "list"]).output
    for name, path in shipped().items():
        text = path.read_text()
        assert text.startswith("# ") and name in listed
        assert load_recipe(name, model="demo").format != ""
        assert runner.invoke(app, ["recipe", "show", name]).output == text
        for fmt in load_recipe(name, model="demo").formats:
            assert text.startswith("# For `evaluate`") == (
                fmt[:4] in ("INT4", "UINT", "TERN") or "activations:" in text
            )
    assert {"q4_0", "q4_k_m", "mxfp4", "w2-hadamard-magr", "w4a4-int-quarot", "w4a4-spinquant"} <= shipped().keys()
    assert load_recipe("w4a4-mxfp4-spinquant", model="demo").transform_names == ["spinquant"]
    assert Recipe("demo", online="r3", kv_cache={"k": "q8_0"}).transform_names == ["equalize"]
    assert Recipe("demo", online="r4").transform_names == []  # whose inputs no search has seen
    with pytest.raises(UsageError, match=r"no recipe q4_9: no such file, nor one of .*q4_0"):
        load_recipe("q4_9", model="demo")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "q4_0").mkdir()  # say, the output of an earlier run
    assert load_recipe("q4_0", model="demo").format == "Q4_0"
    assert isinstance(runner.invoke(app, ["recipe", "show", "nothing"]).exception, UsageError)


def test_settings_of_evaluate_are_yaml() -> None:
    assert plain_value("1e-3") == "1e-3" and plain_value("3") == 3 and plain_value("Q4_0") == "Q4_0"
    found = recipe_from({"model": "demo", "magr": plain_value("1e-3"), "pure": plain_value("true")}, "--set")
    assert (found.magr, found.pure) == (1e-3, True)
    assert plain_value("{k: q8_0, v: q4_0}") == {"k": "q8_0", "v": "q4_0"}
    with pytest.raises(UsageError, match="cannot be read as the value"):
        plain_value("{")
    refused = CliRunner().invoke(app, ["evaluate", "demo", "--set", "format"])
    assert isinstance(refused.exception, UsageError) and "KEY=VALUE" in str(refused.exception)


def test_a_report_is_a_recipe_too(tmp_path: Path) -> None:
    recipe = Recipe("demo", format="Q4_K_M,Q8_0", damping=1e-6, output_type="Q6_K", overrides={"a*": "Q4_0"})
    file = tmp_path / "report.json"
    RunReport({}, recipe.to_json(), {}, "cpu").write(file)
    assert load_recipe(file) == recipe
    assert load_recipe(file, format="Q4_0").format == "Q4_0"


def test_a_recipe_that_is_a_list_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("- not a recipe\n")
    with pytest.raises(UsageError, match="is not a recipe"):
        load_recipe(file)


def test_substitutes_are_counted_in_words() -> None:
    one = {"wanted": "Q6_K", "type": "Q8_0"}
    assert substitute_rows([one, {"wanted": "Q4_K", "type": "Q5_0"}, one, one]) == [
        ("substitutes", "3 tensors are Q8_0: Q6_K's blocks do not divide their rows"),
        ("substitutes", "1 tensor is Q5_0: Q4_K's blocks do not divide its rows"),
    ]
