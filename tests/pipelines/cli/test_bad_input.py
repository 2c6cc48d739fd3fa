"""Whatever is wrong ends as one line that names it, with status 2 (usage) or 1 (the rest), and nothing half written.

CALLS has a call of every command; the cases below change one thing in it. A new command needs a line there.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import pyarrow as pa
import pytest
import yaml

from kdata.errors import ConfigError, CorruptError
from kdata.pipelines.cli import look, main
from kdata.pipelines.cli.main import COMMANDS, call
from kdata.pipelines.ray.tasks import RayTasks
from tests.fakes import digests, rows_of_text, run_capture, write_jsonl
from tests.tokenizers_of_kinds import byte_tokenizer, saved

TEACHER = ["--teacher", "{llama}", "--backend", "transformers"]
CALLS = {
    "run": ["{recipe}", "--out", "{new}"],
    "estimate": ["{recipe}"],
    "capture": ["{new}", *TEACHER, "--corpus", "{corpus}"],
    "generate": ["{new}", *TEACHER, "--prompts", "{corpus}", "--text-column", "text"],
    "reread": ["{dataset}", "{new}", *TEACHER],
    "combine": ["{dataset}", "{dataset}", "{local}"],
    "retokenize": ["{dataset}", "{local}", "--tokenizer", "{pupil}"],
    "soften": ["{dataset}", "{local}", "--pattern", "the"],
    "import": ["{files}", "{local}", "--format", "plain", "--vocab-size", "300"],
    "hygiene": ["{dataset}", "--set", "workers=1"],
    "score": ["{dataset}", "--model", "{llama}"],
    "hidden": ["{dataset}", "--teacher", "{llama}"],
    "select": ["{dataset}", "--method", "random"],
    "plan show": ["{dataset}", "chosen"],
    "plan compare": ["{dataset}", "chosen", "other"],
    "train": ["{dataset}", "--out", "{local}"],
    "evaluate": ["{llama}", "{dataset}"],
    "hacking": ["{llama}", "{dataset}"],
    "verify": ["{dataset}"],
    "repair": ["{dataset}"],
    "audit": ["{dataset}"],
    "exposure": ["{llama}", "--canaries", "{canaries}"],
    "push": ["{dataset}", "{local}"],
    "pull": ["{dataset}", "{local}", "--where", "num_tokens > 0"],
    "diff": ["{dataset}", "{other}"],
    "export": ["{dataset}", "{local}"],
    "merge": ["{dataset}", "{other}", "{local}"],
    "split": ["{dataset}", "{local}"],
    "head": ["{dataset}", "{local}"],
    "info": ["{dataset}"],
    "sql": ["{dataset}", "select 1"],
    "view": ["{dataset}", "--export", "{local}"],
    "status": ["{dataset}"],
    "report": ["{run}"],
    "advise": ["{dataset}"],
}
ENTRIES = [name for group in COMMANDS.values() for name in group]
READERS = [name for name, arguments in CALLS.items() if "{dataset}" in arguments]
WRITERS = [name for name, arguments in CALLS.items() if "{local}" in arguments]
LOCAL_ONLY = {"status", "repair"}  # they work on a folder of this machine


@dataclass
class World:
    """Files that calls name, in a folder that anybody may read."""

    root: Path
    capsys: pytest.CaptureFixture[str]

    def arguments(self, command: str, **places: object) -> list[str]:
        """The call of a command, with the places that differ."""
        names = ("recipe", "llama", "pupil", "corpus", "files", "dataset", "other", "run", "new", "local", "canaries")
        known = {name: self.root / name for name in names} | {"recipe": self.root / "recipe.yaml"} | places
        return [*command.split(), *(argument.format(**known) for argument in CALLS[command])]

    def fails(self, arguments: list[str]) -> tuple[int, str]:
        """Status and line of a call that must fail, and must leave nothing behind."""
        before = sorted(self.root.rglob("*"))
        self.capsys.readouterr()
        status = call(arguments)
        printed = self.capsys.readouterr()
        lines = [line for line in printed.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, printed.err
        assert "Traceback" not in printed.err and len(lines[0]) > len("error: ") + 10
        assert status in (1, 2)
        left = {p for p in self.root.rglob("*") if p.suffix not in (".lock", ".jsonl")} - set(before)
        assert not left, left
        return status, lines[0]


@pytest.fixture(scope="module")
def folder(captured: Path, llama_dir: Path, tokenizer_dir: Path) -> Iterator[Path]:
    root = Path(tempfile.mkdtemp(prefix="kdata-bad-input-"))
    root.chmod(0o755)
    shutil.copytree(captured, root / "dataset")
    shutil.copytree(llama_dir, root / "llama")
    saved(byte_tokenizer(), root / "pupil")
    shutil.copytree(captured, root / "newer")
    about = root / "newer/dataset.json"
    about.write_text(about.read_text().replace('"format_version": "1.', '"format_version": "9.'))
    (root / "corpus").mkdir()
    (root / "files").mkdir()
    write_jsonl(root / "corpus/c.jsonl", rows_of_text(4))
    row = {"id": "a", "token_ids": [1, 2, 3], "topk_ids": [[], [1], [2]], "topk_logprobs": [[], [-0.5], [-0.5]]}
    write_jsonl(root / "files/rows.jsonl", [row])
    others = [{**row, "id": f"other-{row['id']}"} for row in rows_of_text(6)]
    run_capture(root / "other", write_jsonl(root / "others.jsonl", others), tokenizer_dir)
    (root / "canaries").write_text(json.dumps({"id": "pin", "before": "a ", "secret": "4", "choices": "0123456789"}))
    (root / "empty").mkdir()
    (root / "text.txt").write_text("no dataset")
    student = {"label": "a", "objective": {"weights": {"cross_entropy": 1.0}}}
    (root / "recipe.yaml").write_text(yaml.safe_dump({"name": "tiny", "students": {"a": student}}))
    yield root
    shutil.rmtree(root)


@pytest.fixture
def world(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> World:
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setenv("KDATA_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return World(folder, capsys)


def test_every_command_is_called_here() -> None:
    assert set(CALLS) == set(ENTRIES)


@pytest.mark.parametrize(("word", "command"), main.OTHER_WORDS.items())
def test_another_word_for_a_command_is_answered_with_it(world: World, word: str, command: str) -> None:
    assert word not in ENTRIES and command in ENTRIES
    status, line = world.fails([word, "d"])
    assert status == 2 and f"Did you mean {command!r}? See `kdata --help`" in line


@pytest.mark.parametrize("command", ENTRIES)
def test_an_unknown_option_is_usage(world: World, command: str) -> None:
    status, line = world.fails([*world.arguments(command), "--no-such-option"])
    assert status == 2 and "--no-such-option" in line and f"`kdata {command} --help`" in line


@pytest.mark.parametrize("command", ENTRIES)
def test_a_missing_argument_is_usage(world: World, command: str) -> None:
    status, line = world.fails(command.split())
    assert status == 2 and "Missing" in line


@pytest.mark.parametrize("command", [name for name in ENTRIES if name in (
    "run", "capture", "generate", "reread", "combine", "retokenize", "soften", "import", "hygiene", "score", "select",
    "train", "evaluate", "hacking",
)])  # fmt: skip
@pytest.mark.parametrize("setting", ["seeed=1", "seeed", "a.b=[1"])
def test_a_wrong_setting_is_usage_and_is_named(world: World, command: str, setting: str) -> None:
    status, line = world.fails([*world.arguments(command), "--set", setting])
    assert status == 2 and setting.partition("=")[0].partition(".")[0] in line


@pytest.mark.parametrize(
    ("command", "setting", "message"),
    [
        ("capture", "corpus.pth=x", "unknown key 'corpus.pth' (did you mean 'path'?)"),
        ("capture", "corpus.limit=many", "corpus.limit: Input should be a valid integer"),
        ("capture", "k.x=3", "k: Input should be a valid integer (got {'x': 3})"),
        (
            "capture",
            "kind=top",
            "kind: Input should be 'topk', 'adaptive', 'sampled', 'hybrid' or 'threshold' (got 'top')",
        ),
        ("capture", "threshold=2", "threshold: Input should be less than 1 (got 2"),
        ("capture", "teacher.dtyp=x", "unknown key 'dtyp' (did you mean 'dtype'?)"),
        ("generate", "sampling.temprature=1", "(did you mean 'temperature'?)"),
        ("train", "decay=cosin", "decay: Input should be"),
        ("evaluate", "batch_token=1", "unknown key 'batch_token' (did you mean 'batch_tokens'?)"),
        ("evaluate", "sample_temperature=-1", "sample_temperature: Input should be greater than or equal to 0"),
        ("train", "student.kinds=scratch", "student"),
        ("select", "wher=1", "(did you mean 'where'?)"),
        ("run", "capture.unit_token=1", "unknown key 'capture.unit_token' (did you mean 'unit_tokens'?)"),
    ],
)
def test_a_wrong_key_or_value_names_what_is_allowed(world: World, command: str, setting: str, message: str) -> None:
    status, line = world.fails([*world.arguments(command), "--set", setting])
    assert status == 2 and message in line


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_a_wrong_key_is_refused_before_torch_is_loaded(world: World, command: str) -> None:
    """In a process of its own: this one has loaded torch."""
    arguments = [*world.arguments(command), "--set", "batch_token=1"]
    code = f"import sys\nfrom kdata.pipelines.cli.main import call\nprint(call({arguments}), 'torch' in sys.modules)"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process.stdout.split() == ["2", "False"]
    assert len(process.stderr.splitlines()) == 1 and "(did you mean 'batch_tokens'?)" in process.stderr


@pytest.mark.parametrize("command", READERS)
@pytest.mark.parametrize(("place", "status"), [("nowhere", 1), ("empty", 1), ("text.txt", None), ("newer", 1)])
def test_what_is_no_dataset_is_refused_by_name(world: World, command: str, place: str, status: int | None) -> None:
    answered, line = world.fails(world.arguments(command, dataset=world.root / place))
    assert place in line
    assert answered == (status or answered)


@pytest.mark.parametrize("command", READERS)
@pytest.mark.parametrize("address", ["memory://nowhere/d", "hf://nobody/nothing", "s3x://bucket/d"])
def test_a_dataset_may_be_at_a_url_or_on_the_hub(world: World, command: str, address: str) -> None:
    """The address arrives as it was typed: the error names it, and no folder of that name is made."""
    _, line = world.fails(world.arguments(command, dataset=address))
    assert address in line or (address == "s3x://bucket/d" and "s3x" in line)
    assert not list(Path().iterdir()) or {p.name for p in Path().iterdir()} <= {"cache"}


@pytest.mark.parametrize(
    "command", ["info", "sql", "verify", "audit", "hygiene", "select", "head", "export", "split", "push"]
)
def test_a_dataset_at_a_url_is_read(world: World, command: str, tmp_path: Path) -> None:
    dataset = f"file://{world.root / 'dataset'}"
    extra = ["--hidden-size", "4"] if command == "audit" else []
    assert call([*world.arguments(command, dataset=dataset, local=tmp_path / "out"), *extra]) in (0, command == "audit")


@pytest.mark.parametrize("command", WRITERS)
@pytest.mark.parametrize("address", ["memory://bucket/new", "hf://somebody/new"])
def test_a_command_that_writes_a_folder_says_so_at_a_url(world: World, command: str, address: str) -> None:
    if command == "push":
        pytest.skip("push writes to the Hub and to URLs")
    status, line = world.fails(world.arguments(command, local=address))
    assert status == 2 and address in line


@pytest.fixture
def nobody() -> Iterator[None]:
    """Run as a user without rights, where the tests run as root; what commands import is loaded before."""
    for module in {entry.place.partition(":")[0] for group in COMMANDS.values() for entry in group.values()}:
        import_module(f"kdata.pipelines.cli.{module}")
    import_module("kdata.pipelines.report.report")
    was_root = os.geteuid() == 0
    if was_root:
        os.seteuid(65534)
    yield
    if was_root:
        os.seteuid(0)


@pytest.fixture
def locked(folder: Path) -> Iterator[Path]:
    """A dataset that nobody may read, in a folder that nobody may write."""
    place = folder / "locked"
    shutil.copytree(folder / "dataset", place / "dataset")
    (place / "dataset").chmod(0)
    place.chmod(0o555)
    yield place
    place.chmod(0o755)
    (place / "dataset").chmod(0o755)
    shutil.rmtree(place)


@pytest.mark.parametrize("command", READERS)
def test_a_dataset_that_may_not_be_read_is_named(world: World, locked: Path, command: str, nobody: None) -> None:
    status, line = world.fails(world.arguments(command, dataset=locked / "dataset"))
    assert status == 1 and "locked/" in line and "ermission" in line


@pytest.mark.parametrize("command", [name for name in WRITERS if name not in ("train", "combine")])
def test_a_folder_that_may_not_be_written_is_named(world: World, locked: Path, command: str, nobody: None) -> None:
    status, line = world.fails(world.arguments(command, local=locked / "out"))
    assert status == 1 and "locked" in line and "ermission" in line


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with 16 KiB."""
    place = tmp_path / "full"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("mounting a file system needs rights that these tests do not have")
    yield place
    subprocess.run(["umount", place], check=True)


@pytest.mark.parametrize("command", ["push", "export", "merge", "split", "head"])
def test_a_full_disk_leaves_no_half_written_result(world: World, full_disk: Path, command: str) -> None:
    status, line = world.fails(world.arguments(command, local=full_disk / "out"))
    assert status == 1 and ("space" in line or "full" in line)
    assert not [p.name for p in full_disk.iterdir() if p.suffix != ".lock"]


@pytest.mark.parametrize("command", ["capture", "generate", "reread"])
def test_a_teacher_s_work_that_meets_a_full_disk_ends_in_one_line(world: World, full_disk: Path, command: str) -> None:
    status, line = world.fails(world.arguments(command, new=full_disk / "out"))
    assert status == 1 and "disk is full" in line and "run the same command again" in line


@pytest.mark.parametrize("command", ["train", "hygiene", "score", "select"])
def test_work_on_a_dataset_that_meets_a_full_disk_ends_in_one_line(
    world: World, full_disk: Path, command: str, folder: Path
) -> None:
    """The dataset fits on the disk, and nothing else does."""
    subprocess.run(["mount", "-o", "remount,size=1m", full_disk], check=True)
    shutil.copytree(folder / "dataset", full_disk / "dataset")
    (full_disk / "ballast").write_bytes(b"")
    with open(full_disk / "ballast", "wb", buffering=0) as ballast, pytest.raises(OSError, match="No space left"):
        while True:
            ballast.write(b"0" * 4096)
    before = digests(full_disk / "dataset")
    status, line = world.fails(world.arguments(command, dataset=full_disk / "dataset", local=full_disk / "out"))
    assert status == 1 and ("space" in line or "full" in line)
    assert digests(full_disk / "dataset") == before


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (ConfigError("unit: use tokens"), 2, "error: unit: use tokens"),
        (CorruptError("data/a.arrow is damaged"), 1, "error: data/a.arrow is damaged"),
        (
            OSError(errno.ENOSPC, "No space left on device", "/x/y"),
            1,
            "error: /x/y: No space left on device; free some",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 1, "error: /x: Permission denied; check its"),
        (MemoryError(), 1, "error: out of memory; "),
        (pa.ArrowInvalid("not an\nArrow file"), 1, "error: not an Arrow file; "),
        (yaml.YAMLError("bad"), 1, "error: bad; correct the YAML"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), 1, "error: a file is not UTF-8 text"),
        (ModuleNotFoundError("no", name="matplotlib.figure"), 1, "pip install 'kdata[report]'"),
    ],
)
def test_an_error_of_a_library_is_one_line(
    world: World, monkeypatch: pytest.MonkeyPatch, error: Exception, status: int, message: str
) -> None:
    def fail(*arguments: Any) -> NoReturn:
        raise error

    monkeypatch.setattr(look.kdata, "open", fail, raising=False)
    answered, line = world.fails(world.arguments("info"))
    assert answered == status and message in line


def test_an_error_that_nobody_expected_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, world: World) -> None:
    def fail(*arguments: Any) -> NoReturn:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr(look.kdata, "open", fail, raising=False)
    with pytest.raises(ZeroDivisionError) as caught:
        call(world.arguments("info"))
    main.report_defect(caught.type, caught.value, caught.tb)
    printed = world.capsys.readouterr().err
    assert "Traceback" in printed and printed.splitlines()[-1].startswith(
        "error: this is a defect of kdata; please report"
    )
    main.report_defect(CorruptError, CorruptError("x"), None)  # --debug of an error that is known
    assert "please report" not in world.capsys.readouterr().err


def test_ctrl_c_says_that_the_same_command_continues(monkeypatch: pytest.MonkeyPatch, world: World) -> None:
    def stop(*arguments: Any) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr(look.kdata, "open", stop, raising=False)
    assert call(world.arguments("info")) == 130
    assert world.capsys.readouterr().err == "stopped; run the same command again: what it committed is kept\n"


def test_ctrl_c_of_which_a_library_made_another_error_is_still_ctrl_c(
    monkeypatch: pytest.MonkeyPatch, world: World
) -> None:
    def stop(*arguments: Any) -> NoReturn:
        try:
            main.interrupt(signal.SIGINT, None)
        except KeyboardInterrupt:
            raise ImportError("numpy._core.multiarray failed to import") from None

    monkeypatch.setattr(main, "interrupted", False)
    monkeypatch.setattr(look.kdata, "open", stop, raising=False)
    assert call(world.arguments("info")) == 130
    assert world.capsys.readouterr().err == "stopped; run the same command again: what it committed is kept\n"


# Sends itself Ctrl-C when a module is looked for.
AT_IMPORT = """
import os, signal, sys
class Finder:
    def find_spec(self, name, *rest):
        if name == "{module}":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
from kdata.pipelines.cli.start import main
main()
"""


@pytest.mark.parametrize("module", ["typer", "numpy", "kdata.pipelines.cli.look"])
def test_ctrl_c_while_libraries_are_loaded_is_one_line(world: World, module: str, interruptible: None) -> None:
    arguments = [sys.executable, "-c", AT_IMPORT.replace("{module}", module), "info", str(world.root / "dataset")]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stderr) == (130, "stopped; run the same command again: what it committed is kept\n")


def test_ctrl_c_ends_a_query(world: World, interruptible: None) -> None:
    """DuckDB would look for no signal before the end of the query, which is hours away."""
    query = "select count(*) from range(1000000000000) t(a) where a % 7 = 3"
    code = "import os, signal, threading; threading.Timer(4, os.kill, (os.getpid(), signal.SIGINT)).start()\n"
    arguments = [sys.executable, "-c", code + COMMAND[-1], "sql", str(world.root / "dataset"), query]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stderr) == (130, "stopped; run the same command again: what it committed is kept\n")


# A query that does not end when it is interrupted, as DuckDB's long functions of one value.
DEAF = """
import os, signal, sys, threading, time
from kdata.pipelines.cli import main
from kdata.store import background
def work():
    for after in {signals}:
        threading.Timer(after, os.kill, (os.getpid(), signal.SIGINT)).start()
    time.sleep(3600)
class Deaf:
    interrupt = print
main.get_command = lambda app: type("", (), {{"main": lambda *a, **k: background.interruptible(Deaf(), work)}})()
background.PATIENCE_SEC = {patience}
main.main()
"""


@pytest.mark.parametrize(("signals", "patience"), [([0.2], 0.5), ([0.2, 1], 3600)])
def test_a_query_that_does_not_end_is_left_behind(signals: list[float], patience: float, interruptible: None) -> None:
    code = DEAF.format(signals=signals, patience=patience)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (130, "stopped; run the same command again: what it committed is kept\n")


COMMAND = [sys.executable, "-c", "from kdata.pipelines.cli.main import main; main()"]


def test_a_reader_that_stops_reading_is_no_error(world: World) -> None:
    query = "select repeat('x', 100000) from rows cross join range(20)"
    arguments = [*COMMAND, "sql", str(world.root / "dataset"), query, "--format", "csv"]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(10)
    process.stdout.close()
    said = process.stderr.read()
    assert process.wait(timeout=120) == 1 and said == b""


def test_output_to_a_full_disk_is_one_line(world: World) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*COMMAND, "info", str(world.root / "dataset")], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 1 and done.stderr.splitlines()[-1].endswith("free some space on the disk")
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_what_the_output_s_encoding_lacks_is_an_escape(world: World, encoding: str) -> None:
    text, dataset = "\u00fc\u0416\U0001f600", str(world.root / "dataset")
    for format in ("json", "table"):
        arguments = [*COMMAND, "sql", dataset, f"select '{text}' as v", "--format", format]
        done = subprocess.run(
            arguments, env={**os.environ, "PYTHONIOENCODING": encoding}, capture_output=True, check=True
        )
        printed = done.stdout.decode(encoding)
        if format == "json":
            assert json.loads(printed) == [{"v": text}]
        assert "\\u0416\\ud83d\\ude00" in printed


@pytest.mark.parametrize(("closed", "status"), [((1,), 0), ((0, 1, 2), 0), ((2,), 1)])
def test_a_closed_stream_is_the_null_device(world: World, closed: tuple[int, ...], status: int, tmp_path: Path) -> None:
    """No file that the command opens gets the number of a stream."""
    dataset = world.root / ("nowhere" if status else "dataset")
    shell = f'"$@" {" ".join(f"{number}>&-" for number in closed)}'
    arguments = ["sh", "-c", shell, "sh", *COMMAND, "head", str(dataset), str(tmp_path / "copy"), "--num-rows", "3"]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == status and "Traceback" not in done.stderr
    assert status or call(["verify", str(tmp_path / "copy"), "--deep"]) == 0


def test_a_closed_stream_is_the_null_device_before_libraries_are_loaded(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text(
        "import os\nopen('number', 'w').write(str(os.open(__file__, os.O_RDONLY)))\nos._exit(0)\n"
    )
    code = "from kdata.pipelines.cli.start import main; main()"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)])}
    arguments = ["sh", "-c", '"$@" 0>&- 1>&- 2>&-', "sh", sys.executable, "-c", code]
    subprocess.run(arguments, env=environment, cwd=tmp_path, check=True)
    assert int((tmp_path / "number").read_text()) > 2


def test_a_name_that_is_not_utf_8_is_refused(world: World) -> None:
    status, line = world.fails(["info", os.fsdecode(b"d\xff")])
    assert status == 2 and "d\\udcff is not UTF-8 text" in line and "rename" in line


@pytest.mark.parametrize(
    "arguments",
    [
        ["select", "{dataset}", "--engine", "ray", "--method", "prune", "--set", "keep=hardest"],
        ["select", "missing", "--engine", "ray"],
        ["hygiene", "{dataset}", "--engine", "ray", "--set", "language.nothing=1"],
        ["hygiene", "missing.parquet", "--engine", "ray", "--out", "h.parquet"],
    ],
)
def test_no_cluster_is_joined_for_what_cannot_be(
    arguments: list[str], captured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Starting Ray takes most of a minute on a small machine."""
    joined = []
    monkeypatch.setattr(RayTasks, "_start", lambda self: joined.append(1))
    monkeypatch.chdir(tmp_path)
    assert call([one.format(dataset=captured) for one in arguments]) in (1, 2)
    assert not joined


def test_an_unknown_command_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["vew"]) == 2
    assert "Did you mean 'view'? See `kdata --help`" in capsys.readouterr().err
