"""Every command is in one table, and every option says what its settings model says."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from typing import Any, get_args

import pytest
import typer
from pydantic import BaseModel
from typer.models import OptionInfo
from typer.testing import CliRunner

from kdata.config import parse_config
from kdata.jobs.reading import CaptureConfig
from kdata.pipelines.cli.common import FieldOption, field_help
from kdata.pipelines.cli.main import COMMANDS, app

ENTRIES = {name: entry for group in COMMANDS.values() for name, entry in group.items()}
# Options of the command line itself: they set no field of a settings model.
OWN = {
    "--out", "--set", "--config", "--resume", "--dry-run", "--save", "--plan", "--tokenizer",  # run, train, evaluate
    "--engine", "--json-schema",  # capture, generate, reread: which settings model, and a file that holds a setting
    "--deep", "--against-teacher", "--copy", "--hidden-size", "--head", "--block",  # verify, repair, audit
    "--canaries", "--candidates", "--oracle", "--trained-on", "--pattern",  # exposure, hacking, soften
    "--margins", "--list",  # score, select
    "--from", "--unit", "--method", "--memory", "--threads", "--picture", "--positions",  # score, select, plan show
    "--where",  # hygiene, select, view, pull
    "--provenance", "--limit",  # info, diff
    "--check",  # sql
    "--beside", "--port", "--open", "--export", "--rows",  # view
    "--price-per-hour", "--probe-tokens",  # estimate
    "--public", "--allow-secrets", "--skip", "--closed-teacher", "--teacher-license", "--language",  # push
    "--tag", "--while", "--every", "--with-hidden",  # push
    "--columns", "--link", "--by", "--num-rows", "--watch", "--hidden", "--seq-length",  # export, merge, split, ...
}  # fmt: skip
FORMAT_OF_OUTPUT = {
    "info", "sql", "status", "verify", "audit", "evaluate", "plan show", "plan compare", "export", "estimate", "advise",
    "exposure", "hacking", "diff",
}  # fmt: skip
# Options with another name than their field: the option is named for the part of the settings that the field stands for.
RENAMED = {
    ("model", "--teacher"), ("path", "--corpus"), ("path", "--prompts"), ("share", "--positions-share"),
    ("sql", "--positions-sql"), ("score", "--positions-score"), ("reference", "--positions-reference"),
}  # fmt: skip


def function_of(command: str) -> Any:
    module, _, name = ENTRIES[command].place.partition(":")
    return getattr(import_module(f"kdata.pipelines.cli.{module}"), name)


def options_of(command: str) -> Iterator[tuple[inspect.Parameter, OptionInfo]]:
    for parameter in inspect.signature(function_of(command), eval_str=True).parameters.values():
        for about in get_args(parameter.annotation)[1:]:
            if isinstance(about, OptionInfo):
                yield parameter, about


def flags_of(command: str) -> dict[str, Any]:
    """The parameters of a command as its parser has them, by name in Python."""
    *groups, name = command.split(" ")
    click_command = typer.main.get_command(app)
    for part in (*groups, name):
        click_command = click_command.get_command(None, part)  # type: ignore[attr-defined]
    return {parameter.name: parameter for parameter in click_command.params}


@pytest.mark.parametrize("command", ENTRIES)
def test_an_option_is_named_described_and_defaulted_as_its_model(command: str) -> None:
    flags = flags_of(command)
    for parameter, about in options_of(command):
        [*_, flag] = [opt for opt in flags[parameter.name].opts if opt.startswith("--")]
        if not isinstance(about, FieldOption):
            assert flag in OWN or (flag == "--format" and command in FORMAT_OF_OUTPUT), flag
            continue
        assert flag == "--" + about.field.replace("_", "-") or (about.field, flag) in RENAMED
        assert parameter.default in (None, inspect.Parameter.empty), "the default is the model's"
        for model in about.models:
            field = model.model_fields[about.field]
            assert field.description and field.description in flags[parameter.name].help
            if not field.is_required() and isinstance(field.default, str | int | float) and command != "reread":
                assert (
                    f"[default: {str(field.default).lower() if isinstance(field.default, bool) else field.default}]"
                    in (flags[parameter.name].help)
                )
        assert flags[parameter.name].required == (parameter.default is inspect.Parameter.empty)


def test_without_options_the_model_decides(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `kdata capture` hands on is what the model makes of the corpus alone."""
    from kdata.pipelines.cli import make

    settings: list[BaseModel] = []

    class Stop(Exception):
        pass

    def stop(config: BaseModel, corpus: object) -> None:
        settings.append(config)
        raise Stop

    (tmp_path / "c.jsonl").write_text('{"id": "a", "domain": "d", "text": "t"}\n')
    monkeypatch.setattr(make, "CaptureJob", stop)
    command = ["capture", str(tmp_path / "d"), "--teacher", "m", "--corpus", str(tmp_path / "c.jsonl")]
    top = ["--kind", "topk", "--k", "3"]
    for more, values in (([], {}), (top, {"kind": "topk", "k": 3}), ([*top, "--set", "k=5"], {"kind": "topk", "k": 5})):
        assert isinstance(CliRunner().invoke(app, [*command, *more]).exception, Stop)
        corpus = {"path": str(tmp_path / "c.jsonl")}
        assert settings.pop() == parse_config(CaptureConfig, {"corpus": corpus, **values}, "")


def test_a_default_that_differs_is_noticed() -> None:
    class Model(BaseModel):
        k: int = 3

    Model.model_fields["k"].description = "Entries."
    assert field_help("k", (Model,)) == "Entries. [default: 3]"
    assert field_help("k", (Model,), "as in DATASET") == "Entries. [default: as in DATASET]"


@pytest.mark.parametrize("command", ENTRIES)
def test_the_table_has_the_first_line_of_a_command_s_help(command: str) -> None:
    text = inspect.getdoc(function_of(command)) or ""
    line = ENTRIES[command].line
    assert text.splitlines()[0] == line
    assert len(line) <= 62, "the list of commands must fit 80 columns"


def test_the_most_used_commands_have_examples() -> None:
    for command in ("capture", "sql", "select", "train", "verify", "info"):
        examples = (inspect.getdoc(function_of(command)) or "").partition("Examples:\n")[2].splitlines()
        assert examples and all(line.startswith(f"  kdata {command} ") for line in examples)


@pytest.mark.parametrize("command", ["", *ENTRIES])
def test_help_fits_80_columns(command: str) -> None:
    shown = CliRunner(env={"COLUMNS": "80"}).invoke(app, [*command.split(), "--help"])
    assert shown.exit_code == 0
    long = [line for line in shown.output.splitlines() if len(line) > 80]
    assert not long, long


@pytest.mark.parametrize("command", ENTRIES)
def test_the_help_says_which_options_take_a_value(command: str) -> None:
    """Without a name for the value `--port` looks like a flag."""
    for parameter, about in options_of(command):
        flag = parameter.annotation is not None and "bool" in str(get_args(parameter.annotation)[0])
        assert flag or about.metavar, (command, parameter.name)


def test_the_help_lists_every_command_in_its_group() -> None:
    shown = CliRunner(env={"COLUMNS": "80"}).invoke(app, ["--help"]).output
    for title, group in COMMANDS.items():
        block = shown.split(f"\n{title}:\n")[1].split("\n\n")[0]
        assert [re.split(r"\s{2,}", line.strip(), maxsplit=1) for line in block.splitlines()] == [
            [name, entry.line] for name, entry in group.items()
        ]


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys\nfrom kdata.pipelines.cli.main import call\nassert call(['--help']) == 0\n"
        "print(*{name.split('.')[0] for name in sys.modules}, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"torch", "vllm", "duckdb", "numba", "pyarrow", "numpy", "transformers", "matplotlib", "ray"}
    assert "rich" in done.stderr and not set(done.stderr.split()) & heavy


@pytest.mark.parametrize("arguments", [[], ["plan"]])
def test_a_group_without_a_command_prints_its_help(arguments: list[str]) -> None:
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0 and shown.output.startswith("Usage: ")


def test_the_version_needs_no_command() -> None:
    shown = CliRunner().invoke(app, ["--version"])
    assert shown.exit_code == 0 and re.fullmatch(r"kdata \d+\.\d+\.\d+\n", shown.output)
