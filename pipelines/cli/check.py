"""Commands that check: verify, repair, audit, exposure."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

import kdata
from kdata.check.audit import audit as find_weights
from kdata.check.audit import load_head
from kdata.check.exposure import BY_CHANCE, candidates_of, exposures, read_canaries
from kdata.check.remeasure import against_teacher as read_again
from kdata.check.repair import repair as set_aside
from kdata.check.verify import outdated, unbound
from kdata.check.verify import verify as find_problems
from kdata.errors import ConfigError, CorruptError
from kdata.format.files import lock_of
from kdata.jobs.reread import work_on
from kdata.pipelines.cli.common import (
    DatasetArgument,
    DatasetsArgument,
    Format,
    FormatOption,
    ReadingModel,
    local_folder,
    option,
    print_json,
    print_rows,
    say,
    teacher_config,
)
from kdata.store.url import is_url
from kdata.teachers.load import check_teacher, load_teacher
from kdata.teachers.model import load_tokenizer


def verify(
    dataset: DatasetArgument,
    deep: Annotated[bool, typer.Option("--deep", help="Also decode every row and compare it with the index.")] = False,
    against_teacher: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Also have the teacher read N rows again, and measure the difference."),
    ] = None,
    teacher: Annotated[str | None, option("model", ReadingModel, flag="--teacher", metavar="MODEL")] = None,
    backend: Annotated[str | None, option("backend", ReadingModel)] = None,
    format: FormatOption = Format.table,
) -> None:
    """Check every byte of a dataset.

    Ends with status 1 and a list of problems if the dataset is damaged. --against-teacher reads with the dataset's own
    teacher unless --teacher names it.

    \b
    Examples:
      kdata verify my-dataset
      kdata verify my-dataset --deep --against-teacher 100 --teacher MODEL
    """
    if not against_teacher and (teacher is not None or backend is not None):
        raise ConfigError("--teacher and --backend are for --against-teacher N; name the number of rows")
    opened = kdata.open(dataset)
    problems = find_problems(opened, deep=deep)
    if format is Format.json:
        counts = {"rows": opened.num_rows, "tokens": opened.num_tokens, "shards": len(opened.manifest)}
        also = {"not_bound": unbound(opened), "outdated": outdated(opened)}
        print_json({"whole": not problems, **counts, **also, "problems": [vars(problem) for problem in problems]})
        if problems:
            raise typer.Exit(1)
    elif problems:
        listing = "\n".join(f"  {p.path}: {p.what}" for p in problems)
        if all(problem.stray for problem in problems):
            raise CorruptError(
                f"{opened.path} is whole, but holds what is no part of it; remove it, or let `kdata repair` set it aside:\n"
                f"{listing}"
            )
        raise CorruptError(f"{opened.path} is damaged; `kdata repair` sets damaged shards aside:\n{listing}")
    else:
        say(f"whole: {len(opened.manifest)} shards, {opened.num_rows:,} rows, {opened.num_tokens:,} tokens")
        if names := outdated(opened):
            say(f"not of this state of the dataset, so nothing reads them: {', '.join(names)}; make them again")
        if names := unbound(opened):
            say(
                f"not bound: {len(names)} shards ({names[0]}, ...) were written before shards named their dataset, so one "
                "of another teacher or corpus would not be noticed"
            )
        if holder := lock_of(opened.path).holder():
            say(f"it is being written by {holder}, and what that has not committed yet was not checked")
    if against_teacher:
        compare_with_teacher(opened, against_teacher, teacher, backend)


def compare_with_teacher(dataset: kdata.Dataset, num_rows: int, model: str | None, backend: str | None) -> None:
    """Have a teacher read rows again, and print how far it is from what is stored. Raises CorruptError where it is far."""
    about = dataset.info.teacher
    if about.lora_hash is not None and model is None:
        raise ConfigError(
            f"{dataset.path} was made with a LoRA adapter, which is not in the dataset; merge the adapter into the model, "
            "and name the merged folder (--teacher)"
        )
    name = model or about.model
    # Arguments of vLLM's engine that change numbers, such as quantization, are part of what the teacher believed.
    own = {"engine_args": about.engine_args} if about.engine_args and backend in (None, "vllm") else {}
    config = teacher_config({"teacher": own}, name, backend, ReadingModel)
    max_k = max(dataset.info.codec.parameters.get("k", 1), 1)
    loaded = load_teacher(config, max_k=max_k, work=work_on(dataset))
    try:
        again = read_again(dataset, loaded, num_rows)
    finally:
        loaded.close()
    written = [entry.codec_error for entry in dataset.manifest if entry.codec_error is not None]
    errors = {"mean error, nats": "mean_nats", "largest error, nats": "max_nats", "KL, nats": "kl_nats"}
    rows = []
    for label, field in errors.items():
        before = max((getattr(error, field) for error in written), default=0.0)
        rows.append([label, f"{getattr(again.codec, field):.2e}", f"at most {before:.2e}"])
    rows.append(["largest difference of a token's logprob", f"{again.max_logprob_nats:.2e}", "beyond rounding"])
    rows.append(["largest difference of log_tail", f"{again.max_log_tail_nats:.2e}", "beyond rounding"])
    if again.same_draws is not None:
        rows.append(["positions with the same draws", f"{again.same_draws:.1%}", ""])
    title = f"{again.rows:,} rows, {again.positions:,} positions"
    print_rows(["", "measured again", "when written"], rows, right=[False, True, True], title=title)
    limit = 10 * max((error.kl_nats for error in written), default=0.0) + 1e-4
    if again.codec.kl_nats > limit or again.max_logprob_nats > 0.1:
        raise CorruptError(
            f"{dataset.path} does not hold what {name} believes: KL {again.codec.kl_nats:.2e} nats (limit {limit:.1e}), a "
            f"token's log-probability off by {again.max_logprob_nats:.2e}; check that it is the teacher of this dataset"
        )


def repair(
    dataset: DatasetArgument,
    copy: Annotated[
        str | None, typer.Option(metavar="FILE", help="An undamaged dataset.json to restore a damaged one from.")
    ] = None,
) -> None:
    """Set damaged shards aside, so that the rest is a dataset again.

    Nothing is deleted. Says which work to run again. A dataset at a URL is read whole.
    """
    root = dataset if is_url(dataset) else local_folder(dataset)
    done = set_aside(root, copy=None if copy is None else Path(copy))
    if not done.problems:
        say(f"{root} is whole: nothing to repair")
        return
    say(*(f"  {p.path}: {p.what}" for p in done.problems))
    if done.aside is not None:
        say(f"set aside in {done.aside}: {len(done.moved)} files")
    for source, units in done.units.items():
        say(f"run again: units {', '.join(map(str, units))} of {source!r}")
    say(*(f"  {command}" for command in done.commands))
    if done.remaining:
        listing = "\n".join(f"  {p.path}: {p.what}" for p in done.remaining)
        raise CorruptError(f"{root} is still damaged; restore these files from a copy:\n{listing}")


def audit(
    datasets: DatasetsArgument,
    hidden_size: Annotated[
        int | None, typer.Option(metavar="N", help="The teacher's hidden size, if you know it.")
    ] = None,
    head: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="The teacher's folder: compare with its true output projection."),
    ] = None,
    block: Annotated[
        int | None,
        typer.Option(metavar="N", help="Frequent ids in the second attack; twice the hidden size if not given."),
    ] = None,
    format: FormatOption = Format.table,
) -> None:
    """Test whether a release reveals the teacher's weights.

    Name everything that you release of one teacher. Ends with status 1 if an attack finds the output projection.
    """
    opened = [kdata.open(name) for name in datasets]
    head_VD = None if head is None else load_head(Path(head))
    result = find_weights(opened, hidden_size=hidden_size, head_VD=head_VD, block=block)
    if format is Format.json:
        print_json(result.as_dict())
    else:
        say(*(f"  {line}" for line in result.lines()))
    if result.verdict == "FAIL":
        raise typer.Exit(1)


def exposure(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL", help="Models to compare: a teacher, and students of it.")
    ],
    canaries: Annotated[
        str,
        typer.Option(
            metavar="FILE",
            help="Planted secrets, one JSON object a line: id, before, secret, after, choices.",
        ),
    ],
    candidates: Annotated[
        int, typer.Option(metavar="N", help="Candidates to compare for each secret, at most.", min=2)
    ] = 1000,
    backend: Annotated[str | None, option("backend", ReadingModel)] = None,
    format: FormatOption = Format.table,
) -> None:
    """Measure how far models give planted secrets away.

    In bits: log2 of the number of candidates for the secret, minus log2 of its
    rank among them by the model's NLL. A model that knows nothing has 1.44.
    """
    planted = read_canaries(Path(canaries))
    configs = [teacher_config({}, name, backend, ReadingModel) for name in models]
    for config in configs:  # all before the first is measured
        check_teacher(config, max_k=1)
    tokenizers = [load_tokenizer(config.model, config.revision, bos=config.bos) for config in configs]
    for tokenizer in tokenizers:
        candidates_of(tokenizer, planted, most=candidates)
    results = []
    for name, config, tokenizer in zip(models, configs, tokenizers, strict=True):
        loaded = load_teacher(config, max_k=1)
        try:
            measured = exposures(loaded, tokenizer, planted, most=candidates)
        finally:
            loaded.close()
        mean = sum(one.exposure for one in measured) / len(measured)
        results.append({"model": name, "mean": mean, "canaries": [one.as_dict() for one in measured]})
    if format is Format.json:
        print_json({"by_chance": BY_CHANCE, "models": results})
        return
    columns = [[one["exposure"] for one in result["canaries"]] + [result["mean"]] for result in results]  # type: ignore[attr-defined]
    names = [*(canary.id for canary in planted), "mean"]
    sizes = [f"{min(math.log2(canary.space), math.log2(candidates)):.1f}" for canary in planted]
    lines = [
        [name, size, *(f"{column[row]:.2f}" for column in columns)]
        for row, (name, size) in enumerate(zip(names, [*sizes, ""], strict=True))
    ]
    print_rows(
        ["canary", "at most", *models], lines, right=[False, *[True] * (1 + len(models))], title="Exposure, bits"
    )
    say(f"a model that knows nothing of a secret: {BY_CHANCE:.2f} on average")
