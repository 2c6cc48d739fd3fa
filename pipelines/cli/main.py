"""The command `kdata`: the list of its commands, and what becomes of an error.

A command's module is imported when the command is called, so `kdata --help` is fast.

Whatever goes wrong ends as one line on stderr that starts with `error:`; where several things are wrong, each gets a further
line, indented. Exit status:

    0    done
    1    refused: data, files, network, teacher, memory; or a check failed (verify, audit)
    2    wrong usage: an unknown command or option, a wrong value of an option or of a setting (ConfigError)
    130  stopped by Ctrl-C

An exception that none of this names is a defect of kdata: it keeps its traceback, and asks for a report. `--debug` shows the
traceback of every error.
"""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from types import FrameType, TracebackType
from typing import Annotated, Any, NamedTuple, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

import kdata
from kdata.errors import ConfigError, KdataError, redacted
from kdata.observe.terminal import PlainConsole, prepare_streams
from kdata.observe.text import visible
from kdata.pipelines.cli import STOPPED
from kdata.teachers.environment import set_environment


class Entry(NamedTuple):
    """A command: MODULE:FUNCTION in this folder, and the first line of its help.

    passes_on: options that it does not know are arguments of another command.
    """

    place: str
    line: str
    passes_on: bool = False


COMMANDS: dict[str, dict[str, Entry]] = {
    "Run everything": {
        "run": Entry("train:run", "Run a recipe: capture, select, train, evaluate, report."),
        "estimate": Entry(
            "estimate:estimate", "Say what a run will take: tokens, bytes, memory, hours.", passes_on=True
        ),
    },
    "Make data": {
        "capture": Entry("make:capture", "Have a teacher read text; keep its distributions."),
        "generate": Entry("make:generate", "Have a teacher write text; keep its distributions."),
        "reread": Entry("make:reread", "Have a second teacher read the rows of a dataset."),
        "combine": Entry("make:combine", "Combine the distributions of several teachers."),
        "retokenize": Entry("make:retokenize", "Turn a dataset into one for another tokenizer."),
        "soften": Entry("make:soften", "Soften what is stored where the text may be private."),
        "import": Entry("make:import_", "Import another tool's logit dataset."),
    },
    "Choose": {
        "hygiene": Entry("hygiene:hygiene", "Find duplicates, test questions, poor and personal text."),
        "score": Entry("choose:score", "Add a score to every row of a dataset, or to every token."),
        "hidden": Entry("hidden:hidden", "Store a model's hidden states beside a dataset."),
        "select": Entry("choose:select", "Choose what to train on: write a plan of rows, or of tokens."),
        "plan show": Entry("choose:show", "Show what a plan takes of each domain."),
        "plan compare": Entry("choose:compare", "Show what two plans have in common."),
    },
    "Train": {
        "train": Entry("train:train", "Train a student from a dataset; no teacher is needed."),
        "evaluate": Entry("train:evaluate", "Measure a student on a held-out dataset."),
        "hacking": Entry("train:hacking", "Find where a run learns its teacher's errors."),
    },
    "Check": {
        "verify": Entry("check:verify", "Check every byte of a dataset."),
        "repair": Entry("check:repair", "Set damaged shards aside, so that the rest is a dataset again."),
        "audit": Entry("check:audit", "Test whether a release reveals the teacher's weights."),
        "exposure": Entry("check:exposure", "Measure how far models give planted secrets away."),
    },
    "Share": {
        "push": Entry("share:push", "Copy a dataset to a folder, to the Hub or to another URL."),
        "pull": Entry("share:pull", "Bring a dataset from the Hub or a URL, or rows of it."),
        "diff": Entry("share:diff", "Show what differs between two datasets or versions."),
        "export": Entry("share:export", "Write a dataset in another tool's format."),
        "merge": Entry("share:merge", "Put the rows of several datasets into one."),
        "split": Entry("share:split", "Cut a dataset into parts."),
        "head": Entry("share:head", "Copy the first rows of a dataset."),
    },
    "Look": {
        "info": Entry("look:info", "Show what a dataset is and how much it holds."),
        "sql": Entry("look:sql", "Query a dataset in SQL."),
        "view": Entry("view:view", "Look at a dataset in a browser."),
        "status": Entry("look:status", "Show how far a run or a capture is."),
        "report": Entry("look:report", "Write the report page of a run."),
        "advise": Entry("look:advise", "Say what measured runs recommend for a dataset."),
    },
}
# What others call it; close spellings are suggested anyway.
OTHER_WORDS = {"explore": "view", "browse": "view", "dedup": "hygiene", "filter": "select", "distill": "train"}
CONTEXT = {"help_option_names": ["-h", "--help"]}


class Command(TyperCommand):
    """A command whose help names arguments without their Python types."""

    def format_options(self, ctx: typer.Context, formatter: Any) -> None:  # type: ignore[override]
        """Arguments, then options."""
        for title, kind in (("Arguments", "argument"), ("Options", "option")):
            parameters = [p for p in self.get_params(ctx) if p.param_type_name == kind]
            records = [record for p in parameters if (record := p.get_help_record(ctx)) is not None]
            if records:
                with formatter.section(title):
                    formatter.write_dl([(name.partition(" <")[0], text) for name, text in records])


class Loaded(Mapping[str, Any]):
    """Commands by name, each imported when it is asked for; those below `prefix` ("plan ")."""

    def __init__(self, prefix: str) -> None:
        entries = {name: entry for group in COMMANDS.values() for name, entry in group.items()}
        self.prefix = prefix
        self.entries = {name.removeprefix(prefix): e for name, e in entries.items() if name.startswith(prefix)}

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys(name.split(" ")[0] for name in self.entries))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __getitem__(self, name: str) -> Any:
        if name in self.entries:
            module, _, function = self.entries[name].place.partition(":")
            one = typer.Typer(add_completion=False, rich_markup_mode=None)
            settings = {**CONTEXT, "ignore_unknown_options": self.entries[name].passes_on}
            one.command(name, cls=Command, context_settings=settings)(
                getattr(import_module(f"kdata.pipelines.cli.{module}"), function)
            )
            return get_command(one)
        if name not in list(iter(self)):
            raise KeyError(name)
        return Group(name=name, prefix=f"{self.prefix}{name} ", help="Look at plans.", **GROUP_SETTINGS)


class Group(TyperGroup):
    """A group of commands that are imported when they are called."""

    def __init__(self, *, prefix: str = "", **settings: Any) -> None:
        super().__init__(**settings)
        self.commands = Loaded(prefix)  # type: ignore[assignment]  # commands are not added later

    def list_commands(self, ctx: typer.Context) -> list[str]:  # type: ignore[override]
        """Names, in the order of the table."""
        return list(self.commands)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Name the command that does what another word asks for."""
        if args and args[0] in OTHER_WORDS and self.commands.prefix == "":  # type: ignore[attr-defined]
            raise ConfigError(f"No such command {args[0]!r}. Did you mean {OTHER_WORDS[args[0]]!r}? See `kdata --help`")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        """Run a command; without one, print the help."""
        if not ctx._protected_args:
            typer.echo(ctx.get_help())
            return 0
        return super().invoke(ctx)

    def format_commands(self, ctx: typer.Context, formatter: Any) -> None:  # type: ignore[override]
        """The commands by what they are for, a line each."""
        prefix = self.commands.prefix  # type: ignore[attr-defined]
        groups = {
            title: [(name.removeprefix(prefix), entry.line) for name, entry in group.items() if name.startswith(prefix)]
            for title, group in COMMANDS.items()
        }
        width = max(len(name) for rows in groups.values() for name, _ in rows)
        for title, rows in groups.items():
            if rows:
                with formatter.section(title):
                    formatter.write_dl([(name.ljust(width), line) for name, line in rows])


GROUP_SETTINGS: dict[str, Any] = {"context_settings": CONTEXT, "rich_markup_mode": None}
app = typer.Typer(
    name="kdata",
    help="Logit datasets: capture what a teacher believes, query it, share it, and train students offline.\n\n"
    "`kdata COMMAND --help` explains a command.",
    cls=Group,
    pretty_exceptions_enable=False,
    **GROUP_SETTINGS,
)


def print_version(wanted: bool) -> None:
    """Print the version and end."""
    if wanted:
        typer.echo(f"kdata {kdata.__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=print_version, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


# Errors of libraries that reach the user in one line, where the library is loaded, and what to do.
LIBRARY_ERRORS = {
    "pyarrow": ("ArrowException", "the data cannot be read or written; `kdata verify` checks a dataset"),
    "duckdb": ("Error", "check the query and the free memory and disk space"),
    "pydantic": ("ValidationError", "check the file that it names"),
    "yaml": ("YAMLError", "correct the YAML"),
    "safetensors": ("SafetensorError", "a file of weights cannot be read or written; check the file and the disk"),
    "torch": ("OutOfMemoryError", "out of memory on the device; lower batch_tokens or micro_batch_tokens"),
}
ADVICE = {
    errno.ENOSPC: "free some space on the disk",
    errno.EDQUOT: "free some of the disk quota",
    errno.EACCES: "check its permissions",
    errno.EPERM: "check its permissions",
    errno.EROFS: "choose a folder that can be written",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "check the path",
    errno.EISDIR: "name a file, not a folder",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
}


# The extra that brings a package, for commands that start without it. Most stages say so themselves.
EXTRA_OF = {
    "torch": "train",
    "transformers": "train",
    "safetensors": "train",
    "matplotlib": "report",
    "polars": "polars",
}


def missing_package(error: BaseException) -> str | None:
    """The package of an extra that is not installed, where that is what is wrong."""
    package = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    return package if package in EXTRA_OF else None


def library_errors() -> tuple[type[BaseException], ...]:
    """The error classes of LIBRARY_ERRORS whose library is loaded."""
    loaded = [(sys.modules[name], kind) for name, (kind, _) in LIBRARY_ERRORS.items() if name in sys.modules]
    return tuple(getattr(module, kind) for module, kind in loaded)


def explained() -> tuple[type[BaseException], ...]:
    """Every error that ends as one line."""
    return (typer.TyperException, KdataError, OSError, MemoryError, UnicodeDecodeError, *library_errors())


def status_and_text(error: BaseException) -> tuple[int, str]:
    """Exit status, and the line that says what is wrong, where, and what to do."""
    if isinstance(error, typer.TyperException):
        context = getattr(error, "ctx", None)
        command = "kdata" if context is None else context.command_path
        message = error.format_message().rstrip(".")
        return error.exit_code, f"{message}{' See' if message.endswith('?') else '; see'} `{command} --help`"
    if isinstance(error, KdataError):
        return 2 if isinstance(error, ConfigError) else 1, str(error)
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError):
        return 1, f"out of memory{': ' + text if text else ''}; close other programs, or take smaller batches (--set)"
    if isinstance(error, UnicodeDecodeError):
        return 1, f"a file is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8"
    if isinstance(error, OSError):
        what = error.strerror or text or type(error).__name__
        return (
            1,
            f"{error.filename or 'input or output'}: {what}; {ADVICE.get(error.errno or 0, 'check the path and the disk')}",
        )
    [advice] = [
        advice for name, (kind, advice) in LIBRARY_ERRORS.items()
        if name in sys.modules and isinstance(error, getattr(sys.modules[name], kind))
    ][:1]  # fmt: skip
    return 1, f"{text}; {advice}"


interrupted = False  # whether Ctrl-C was pressed, whatever became of the exception


def interrupt(number: int, frame: FrameType | None) -> NoReturn:
    """What a signal of Ctrl-C does: note it, and raise KeyboardInterrupt."""
    global interrupted  # a lock, as of threading.Event, could be held by what the signal interrupts
    interrupted = True
    raise KeyboardInterrupt


def flush_output() -> None:
    """Write what is buffered; where that fails, drop it, so that the interpreter does not try again. Raises OSError."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


def refuse_bytes(arguments: Sequence[str]) -> None:
    """Raise ConfigError for an argument that is no text: Arrow and DuckDB take names of files in UTF-8 only."""
    for argument in arguments:
        if any("\ud800" <= character <= "\udfff" for character in argument):
            raise ConfigError(
                f"{argument} is not UTF-8 text, or the locale is not; rename the file, or set LC_ALL=C.UTF-8"
            )


def call(arguments: Sequence[str]) -> int:
    """Run a command, print an error as one line on stderr, and return the exit status."""
    errors = PlainConsole(stderr=True, soft_wrap=True)
    try:
        try:
            refuse_bytes(arguments)
            status = get_command(app).main(list(arguments), prog_name="kdata", standalone_mode=False) or 0
        except Exception as error:  # numpy makes an ImportError of it, DuckDB an error of its own
            if interrupted:
                raise KeyboardInterrupt from error
            raise
        finally:
            flush_output()
    except BrokenPipeError:  # whoever read the output has seen enough: `kdata sql ... | head`
        return 1
    except explained() as error:
        if "--debug" in arguments:
            raise
        status, text = status_and_text(error)
        errors.print("error: ", style="bold red", end="")
        errors.print(redacted(text))
    except ModuleNotFoundError as error:
        package = missing_package(error)
        if "--debug" in arguments or package is None:
            raise
        status = 1
        errors.print("error: ", style="bold red", end="")
        message = f"this command needs {package}, which is not installed: pip install 'kdata[{EXTRA_OF[package]}]'"
        errors.print(message)
    except KeyboardInterrupt:
        status = 130
    if status == 130:
        errors.print(STOPPED)
    return int(status)


def report_defect(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Show the traceback of an error that ended the program, and ask for a report of one that nobody expected."""
    print(redacted(visible("".join(traceback.format_exception(kind, error, trace)))), end="", file=sys.stderr)
    if not isinstance(error, explained()):
        print("error: this is a defect of kdata; please report the lines above and `kdata --version`", file=sys.stderr)


class VisibleFormatter(logging.Formatter):
    """Log lines in which control characters are escapes and secrets are ***: a server's answer may be in them."""

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter.format`."""
        return redacted(visible(super().format(record)))


def main() -> None:
    """Entry point."""
    prepare_streams()
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, interrupt)
    set_environment()
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(VisibleFormatter())
    # vLLM and torch talk to stderr while they load; what matters of it reaches the user as an error of ours.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)
    for name in (
        "torchao",
        "torch.utils._pytree",
    ):  # transformers imports torchao, which logs the kernels that it lacks
        logging.getLogger(name).setLevel(logging.ERROR)
    sys.excepthook = report_defect
    sys.exit(call(sys.argv[1:]))
