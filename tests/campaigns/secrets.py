"""Tokens and passwords in every place where people put them, and a search for them in everything that comes out.

    python -m tests.campaigns.secrets --seed 0 --count 400

A case plants a secret (in the environment, in a URL, in a setting, in a recipe), runs one command in a folder of its own, and
searches the command's output and every file in the folder for the secret. The command may succeed or refuse.
"""

from __future__ import annotations

import os
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import yaml

import kdata
from tests.campaigns.campaign import Campaign, Outcome, child, kdata_command, main
from tests.fakes import rows_of_text, run_capture, save_llama, save_tokenizer, write_jsonl

LETTERS = "abcdefghijkmnopqrstuvwxyzABCDEFGHIJKLMNPQRSTUVWXYZ23456789"


def _letters(rng: random.Random, count: int, alphabet: str = LETTERS) -> str:
    return "".join(rng.choice(alphabet) for _ in range(count))


# Tokens with a form of their own.
TOKENS: dict[str, Callable[[random.Random], str]] = {
    "hugging face": lambda rng: "hf_" + _letters(rng, 34),
    "openai": lambda rng: "sk-proj-" + _letters(rng, 40),
    "github": lambda rng: "ghp_" + _letters(rng, 36),
    "aws": lambda rng: "AKIA" + _letters(rng, 16, "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"),
    "jwt": lambda rng: f"eyJ{_letters(rng, 20)}.{_letters(rng, 30)}.{_letters(rng, 20)}",
}
# URLs; any text is a secret there.
URLS: dict[str, str] = {
    "password": "{scheme}://someone:{secret}@127.0.0.1:1/place",
    "token as user": "{scheme}://{secret}@127.0.0.1:1/place",
    "?token": "{scheme}://127.0.0.1:1/place?token={secret}",
    "&api_key": "{scheme}://127.0.0.1:1/place?a=1&api_key={secret}&b=2",
    "signature": "{scheme}://127.0.0.1:1/place?X-Amz-Signature={secret}",
}
SCHEMES = ("https", "http", "s3", "gs", "az", "ftp", "hf", "memory")
# Commands that take a place; the URL stands for PLACE.
WITH_PLACE = (
    "info PLACE",
    "sql PLACE 'select 1'",
    "verify PLACE",
    "verify --deep PLACE",
    "status PLACE",
    "report PLACE",
    "repair PLACE",
    "plan show PLACE some",
    "plan compare PLACE some some",
    "push data PLACE",
    "push PLACE copy",
    "export data PLACE",
    "export PLACE x.parquet",
    "merge out data PLACE",
    "merge PLACE data",
    "split PLACE out --parts 2",
    "head PLACE out --rows 1",
    "head data PLACE --rows 1",
    "import PLACE out --format plain --vocab-size 300",
    "import peer.parquet PLACE --format plain --vocab-size 300",
    "capture PLACE --teacher model --corpus rows.jsonl --backend transformers",
    "capture out --teacher model --corpus PLACE --backend transformers",
    "capture out --teacher PLACE --corpus rows.jsonl --backend transformers",
    "generate out --teacher model --prompts PLACE --backend transformers",
    "reread PLACE out --teacher model",
    "reread data PLACE --teacher model",
    "combine data PLACE out",
    "hygiene PLACE",
    "hygiene PLACE --out columns.parquet",
    "score PLACE --model model",
    "score data --model PLACE",
    "score data --from PLACE --name x",
    "select PLACE --method all",
    "select data --method sql --sql PLACE",
    "train PLACE --out student",
    "train data --out PLACE",
    "evaluate PLACE data",
    "evaluate model PLACE",
    "audit PLACE",
    "run PLACE",
    "run quickstart --out PLACE",
    "estimate PLACE",
    "capture out --teacher model --corpus rows.jsonl --backend vllm-server --set teacher.server.endpoints=[PLACE]",
)
# Commands that take a setting; the secret stands for SECRET.
WITH_SETTING = (
    "capture out --teacher model --corpus rows.jsonl --backend vllm-server "
    "--set teacher.server.endpoints=[http://127.0.0.1:1] --set teacher.server.auth_env=SECRET",
    "capture out --teacher SECRET --corpus rows.jsonl --backend transformers",
    "run quickstart --out r --set teacher.model=SECRET",
    "run quickstart --out r --set SECRET",
    "run quickstart --out r --set name=SECRET",
    "run quickstart --out r --set teacher.engine_args.hf_token=SECRET",
    "run quickstart --out r --set SECRET=1",
    "estimate quickstart --set student.model=SECRET",
    "capture out --teacher model --corpus SECRET",
    "info SECRET",
    "info data --token SECRET",
    "info data SECRET",
    "SECRET",
    "sql data 'select SECRET'",
    "select data --method SECRET",
    "select data --method sql --sql 'select id from SECRET'",
    "train data --out s --set model=SECRET",
    "train data --out s --plan SECRET",
    "push data hf://SECRET/x",
    "plan show data SECRET",
    "import peer.parquet out --format plain --vocab-size 300 --teacher SECRET",
)
# Recipes: keys at which the secret, or a URL that holds it, is put.
RECIPE_KEYS = (
    "teacher.server.auth_env",
    "teacher.server.name",
    "teacher.model",
    "teacher.lora",
    "teacher.revision",
    "corpus.path",
    "heldout.path",
    "student.model",
    "reference.model",
    "name",
    "teacher.engine_args.download_dir",
    "teacher.server.endpoints",
    "SECRET",
    "select.sql",
)
# Commands that work, with secrets in the environment alone.
WORKING = (
    "info data",
    "sql data 'select * from rows'",
    "verify data --deep",
    "status data",
    "push data copy",
    "head data out --rows 2",
    "export data x.parquet --format plain",
    "import peer.parquet out --format plain --vocab-size 300",
    "plan show data some",
    "select data --method all --name other",
    "capture out --teacher model --corpus rows.jsonl --backend transformers --set limit=1",
    "run nothing.yaml",
    "estimate nothing.yaml",
    "info absent",
    "info hf://nobody/nothing",
    "train data --out student --set steps=1",
)
VARIABLES = (
    "HF_TOKEN",
    "OPENAI_API_KEY",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_ACCESS_KEY_ID",
    "WANDB_API_KEY",
    "DB_PASSWORD",
    "GITHUB_TOKEN",
)


def run_command(arguments: list[str], folder: str, variables: dict[str, str]) -> int:
    """The child: a command with further variables in its environment."""
    os.environ.update(variables)
    return kdata_command(arguments, folder)


def words(command: str) -> list[str]:
    """The words of a command; quotes hold one together."""
    parts = command.split("'")
    return [word for n, part in enumerate(parts) for word in ([part] if n % 2 else part.split())]


class Secrets(Campaign):
    """Secrets in every place, looked for in all output and in all files."""

    name = "secrets"

    def prepare(self, folder: Path, seed: int) -> None:
        """See `Campaign.prepare`."""
        self._example = folder / "example"
        self._example.mkdir()
        save_tokenizer(folder / "tokenizer")
        corpus = write_jsonl(self._example / "rows.jsonl", rows_of_text(4))
        dataset = run_capture(self._example / "data", corpus, folder / "tokenizer")
        ids = dataset.index(["id"])["id"].to_pylist()
        kdata.make_plan(dataset, "some", ids[:2], method="sql", parameters={}).save(dataset.path / "plans")
        from kdata.share.interchange.exporter import export_dataset

        export_dataset(dataset, self._example / "peer.parquet", "plain")
        assert pq.read_metadata(self._example / "peer.parquet").num_rows
        save_llama(self._example / "model")
        self._recipe = yaml.safe_load((Path(kdata.__file__).parent.parent / "pipelines/quickstart.yaml").read_text())

    def run(self, number: int, rng: random.Random, folder: Path) -> Outcome:
        """See `Campaign.run`."""
        case = folder / "case"
        shutil.copytree(self._example, case)
        kind = ("environment", "url", "url", "setting", "recipe")[number % 5]
        # What commands keep outside of their folder is searched too.
        variables = {"KDATA_CACHE": str(case / "cache"), "HF_HOME": str(case / "hub"), "TMPDIR": str(case)}
        form = rng.choice(sorted(TOKENS))
        secret = TOKENS[form](rng)
        if kind == "environment":
            name = rng.choice(VARIABLES)
            secret = _letters(rng, 24) if rng.random() < 0.5 else secret
            variables[name] = secret
            command = words(rng.choice((*WORKING, *(c.replace("SECRET", secret) for c in WITH_SETTING))))
            what = name
        elif kind == "url":
            form = rng.choice(sorted(URLS))
            secret = _letters(rng, 24)
            url = URLS[form].format(scheme=rng.choice(SCHEMES), secret=secret)
            template = rng.choice(WITH_PLACE)
            command, what = [word.replace("PLACE", url) for word in words(template)], template
        elif kind == "setting":
            template = rng.choice(WITH_SETTING)
            if "auth_env" in template and rng.random() < 0.5:
                secret = _letters(rng, 24)
            command, what = [word.replace("SECRET", secret) for word in words(template)], template
        else:
            what = rng.choice(RECIPE_KEYS)
            if what == "teacher.server.auth_env" and rng.random() < 0.5:
                secret = _letters(rng, 24)
            self._write_recipe(case / "recipe.yaml", what, secret, rng)
            command = [rng.choice(("run", "estimate")), "recipe.yaml"]
        seconds = 60.0  # training and capturing load torch
        ended = child(run_command, command, str(case), variables, seconds=seconds)
        return Outcome(kind, self._problem(ended.stdout + ended.stderr, case, secret, what) or ended.complaint())

    def _write_recipe(self, path: Path, key: str, secret: str, rng: random.Random) -> None:
        value: object = secret
        if "auth_env" not in key and rng.random() < 0.5:
            value = rng.choice(sorted(URLS.values())).format(scheme=rng.choice(SCHEMES), secret=secret)
        recipe = yaml.safe_load(yaml.safe_dump(self._recipe))
        inner = recipe
        *parents, last = key.replace("SECRET", secret).split(".") if key != "SECRET" else (secret,)
        for part in parents:
            if not isinstance(inner.get(part), dict):
                inner[part] = {}
            inner = inner[part]
        inner[last] = [value] if last == "endpoints" else value
        path.write_text(yaml.safe_dump(recipe))

    def _problem(self, output: str, case: Path, secret: str, what: str) -> str | None:
        if secret in output:
            return f"{what}: the secret is printed: {output[max(0, output.index(secret) - 300) :][:600]}"
        for path in sorted(case.rglob("*")):
            if path.name == "recipe.yaml" or not path.is_file():
                continue
            if secret.encode() in path.read_bytes():
                return f"{what}: the secret is in {path.relative_to(case)}"
            if secret in path.name:
                return f"{what}: the secret is in the name of {path.relative_to(case)}"
        return None


if __name__ == "__main__":
    sys.exit(main(Secrets))
