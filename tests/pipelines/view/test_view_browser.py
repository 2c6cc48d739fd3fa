"""The page of a dataset in a real browser: clicks, keys, colors; text that would be a script is shown as text."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http import HTTPStatus
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import kdata
from kdata.pipelines.view.export import export
from kdata.pipelines.view.server import ViewServer, _Handler
from kdata.pipelines.view.values import View
from kdata.selection.ranked import Random
from kdata.selection.score_file import bring
from tests.browser import needs_browser, result_of
from tests.fakes import StandInTeacher, run_capture, write_jsonl

pytestmark = needs_browser
HOSTILE = "<img src=x onerror=\"document.title='taken'\"><script>document.title='taken'</script> \u202eabc & \x01"

# It clicks and types in a page, and says what it saw. STEPS is the script of a test.
PROBE = """
const sleep = ms => new Promise(done => setTimeout(done, ms));
async function probe(page, view) {
  const $ = id => page.getElementById(id);
  const until = async what => { for (let n = 0; n < 300 && !what(); n += 1) await sleep(20); return what(); };
  const key = name => page.activeElement.dispatchEvent(new view.KeyboardEvent("keydown", { key: name, bubbles: true }));
  const listed = () => [...$("rows").children].map(one => one.querySelector("b").textContent);
  const ask = async (id, value) => { $(id).value = value; $("filter").requestSubmit(); await sleep(200); };
  const histogram = async column => {
    const before = $("histogram").firstChild;
    $("column").value = column;
    $("column").onchange();
    await until(() => $("histogram").firstChild && $("histogram").firstChild !== before);
  };
  let result;
  try { result = await (async () => { STEPS })(); } catch (error) { result = { failed: String(error.stack) }; }
  const output = document.createElement("pre");
  output.id = "result";
  output.textContent = JSON.stringify(result);
  document.body.append(output);
}
"""


def around(page: str, steps: str, width: int = 1280) -> str:
    """A page with another one in a frame, which it looks into."""
    start = "frame.onload = () => probe(frame.contentDocument, frame.contentWindow);"
    script = f"const frame = document.querySelector('iframe'); {start} {PROBE.replace('STEPS', steps)}"
    style = f"border:0;width:{width}px;height:900px"
    return f'<!doctype html><iframe style="{style}" src="{page}"></iframe><script>{script}</script>'


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> kdata.Dataset:
    folder = tmp_path_factory.mktemp("view")
    lines = [
        "the cat sat on the mat",
        "a dog ran",
        HOSTILE,
        "naive words\nin two lines",
        *(f"text {n}" for n in range(70)),
    ]
    rows = [{"id": f"r{n:02}", "domain": "ab"[n % 2], "text": text} for n, text in enumerate(lines)]
    corpus = write_jsonl(folder / "texts.jsonl", rows)
    data = run_capture(folder / "data", corpus, tokenizer_dir, teacher=StandInTeacher(context=512))
    kdata.select(data, Random(name="half", share=0.5))
    ids = data.index(["id"])["id"]
    mine = pa.table({"id": ids, "odd": np.arange(len(ids)) % 2.0, "same": np.full(len(ids), 2.5)})
    pq.write_table(mine, folder / "odd.parquet")
    bring(data, folder / "odd.parquet", "mine")
    ref = pa.table({"id": ids, "nll": np.arange(len(ids)) / 7.0})
    pq.write_table(ref, folder / "ref.parquet")
    bring(data, folder / "ref.parquet", "ref")
    return kdata.open(folder / "data")


def visible(text: str) -> str:
    """Control characters as the page shows them."""
    return "".join(chr(0x2400 + ord(sign)) if sign < " " and sign not in "\t\n" else sign for sign in text).replace(
        "\n", "\u23ce\n"
    )


def shown(text: str, number: int) -> str:
    """A token in the table of beliefs."""
    if not text.strip("\ufffd"):
        return f"\u2039{number}\u203a" if text else "\u2205"
    inner = visible(text)
    left, right = len(inner) - len(inner.lstrip(" ")), len(inner) - len(inner.rstrip(" "))
    return "\u2423" * len(inner) if not inner.strip(" ") else "\u2423" * left + inner.strip(" ") + "\u2423" * right


@contextmanager
def served(view: View, harness: str) -> Iterator[str]:
    """The real server of the page, and the harness beside it (same origin, so that it may look inside)."""

    class Handler(_Handler):
        def do_GET(self) -> None:
            if self.path != "/harness":
                return super().do_GET()
            self.send_response(HTTPStatus.OK)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(harness.encode())))
            self.end_headers()
            self.wfile.write(harness.encode())
            return None

    with ViewServer(view) as server:
        server.RequestHandlerClass = Handler  # type: ignore[assignment]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"{server.url}harness"
        server.shutdown()


def seen(
    dataset: kdata.Dataset, steps: str, folder: Path, *, width: int = 1280, beside: kdata.Dataset | None = None
) -> Any:
    with served(View(dataset, beside), around("/", steps, width)) as address:
        return result_of(address, folder)


def test_rows_tokens_and_beliefs(dataset: kdata.Dataset, tmp_path: Path) -> None:
    steps = """
      await until(() => $("rows").children.length && $("tokens").children.length);
      const out = { rows: listed(), total: $("total").textContent, facts: $("facts").textContent };
      const tokens = [...$("tokens").children];
      out.text = tokens.map(one => one.textContent).join("");
      out.shares = tokens.map(one => Number(one.style.getPropertyValue("--share")));
      tokens[2].dispatchEvent(new view.PointerEvent("pointerover", { bubbles: true, pointerType: "mouse" }));
      out.token = $("token").textContent;
      out.token_facts = $("token-facts").textContent;
      const cells = one => [...one.cells].map(cell => cell.textContent);
      out.believed = [...page.querySelectorAll("#believed tr")].map(one => [one.className, ...cells(one)]);
      tokens[3].click();
      key("ArrowRight");
      out.focus = [page.activeElement.dataset.n, $("token").textContent.replaceAll("\u2423", " ") === tokens[4].textContent];
      key("j");
      await until(() => $("row-id").textContent === "r01");
      out.next = $("row-id").textContent;
      $("after").click();
      await until(() => listed()[0] === "r50");
      out.page = listed().length;
      return out;
    """
    got = seen(dataset, steps, tmp_path)
    assert "failed" not in got, got
    row = dataset[0]
    assert got["rows"] == [f"r{n:02}" for n in range(50)] and got["total"] == "Rows 1 to 50 of 74" and got["page"] == 24
    assert got["text"] == "".join(row.tokens) and "74 rows" in got["facts"]
    expected = [0 if n == 0 else min(-float(row.logprob[n]) / 8, 1) * 0.75 for n in range(len(row))]
    assert got["shares"] == pytest.approx(expected, abs=1e-4)
    assert got["token"] == shown(row.tokens[2], row.token_ids[2]) and f"id {row.token_ids[2]}" in got["token_facts"]
    kept = row.kept(2)
    entries = [line for line in got["believed"] if "rest" not in line[0]]
    order = sorted(range(len(kept)), key=lambda k: (kept.is_draw[k], -float(kept.logprobs[k])))
    assert [line[1] for line in entries] == [shown(kept.tokens[k], kept.ids[k]) for k in order]
    assert ["drawn" in line[0] for line in entries] == [bool(kept.is_draw[k]) for k in order]
    assert ["actual" in line[0] for line in entries] == [bool(kept.ids[k] == row.token_ids[2]) for k in order]
    assert got["focus"] == ["4", True] and got["next"] == "r01"


def test_conditions_plans_and_bars(dataset: kdata.Dataset, tmp_path: Path) -> None:
    steps = """
      await until(() => $("rows").children.length && $("histogram").children.length);
      const out = {};
      await ask("where", "domain = 'b' and nll > 0");
      out.domain = $("total").textContent;
      await ask("where", "nll >");
      out.error = [$("error").hidden, $("error").textContent];
      await ask("where", "read_text('/etc/passwd') is null");
      out.escape = $("error").textContent;
      await ask("where", "");
      $("plan").value = "+half"; $("plan").onchange(); await sleep(200);
      out.plan = $("total").textContent;
      await ask("where", "1=1) or (1=1");
      out.inside = [$("error").hidden, $("total").textContent];
      out.all_inside = [false, out.plan];
      await ask("where", "");
      $("plan").value = "-half"; $("plan").onchange(); await sleep(200);
      out.outside = $("total").textContent;
      $("plan").value = ""; $("plan").onchange(); await sleep(200);
      $("order").value = "nll"; $("descending").checked = true; $("order").onchange(); await sleep(200);
      out.largest = listed()[0];
      const bars = [...$("histogram").children];
      out.counts = bars.map(one => Number(one.title.match(/: (\\d+) of/)[1]));
      const place = out.counts.indexOf(Math.max(...out.counts));
      bars[place].click(); await sleep(200);
      out.bar = [out.counts[place], $("total").textContent, $("range").textContent];
      await histogram("mine.odd");
      $("histogram").children[39].click(); await sleep(200);
      out.score_bar = [Number($("histogram").children[39].title.match(/: (\\d+) of/)[1]), $("total").textContent];
      await histogram("num_tokens");
      out.whole = [];
      for (const [n, one] of [...$("histogram").children].entries()) {
        const count = Number(one.title.match(/: (\\d+) of/)[1]);
        if (!count || n % 3) continue;
        $("histogram").children[n].click(); await sleep(150);
        out.whole.push([count, Number($("total").textContent.split(" of ")[1])]);
        $("histogram").children[n].click(); await sleep(100);
      }
      return out;
    """
    got = seen(dataset, steps, tmp_path)
    assert "failed" not in got, got
    count = dataset.sql("select count(*) as n from rows where domain = 'b' and nll > 0")["n"][0].as_py()
    assert got["domain"] == f"Rows 1 to {count} of {count}"
    assert got["error"][0] is False and got["error"][1].startswith("condition 'nll >' is not SQL")
    assert got["escape"]
    assert got["inside"] == got["all_inside"] and got["score_bar"][1].endswith(f"of {got['score_bar'][0]}")
    taken = dataset.sql("select count(*) as n from plans.half")["n"][0].as_py()
    assert got["plan"].endswith(f"of {taken}") and got["outside"].endswith(f"of {74 - taken}")
    assert got["largest"] == dataset.sql("select id from rows order by nll desc limit 1")["id"][0].as_py()
    assert sum(got["counts"]) == dataset.sql("select count(nll) as n from rows")["n"][0].as_py()
    assert got["whole"] and all(count == listed for count, listed in got["whole"])
    assert got["bar"][1].endswith(f"of {got['bar'][0]}") and got["bar"][2].startswith("only")


def test_the_overview_counts_a_plan_and_leads_to_the_rows_of_a_bin(dataset: kdata.Dataset, tmp_path: Path) -> None:
    steps = """
      await until(() => $("rows").children.length && $("tokens").children.length);
      const seen = one => view.getComputedStyle(page.querySelector(one)).display !== "none";
      const out = { before: [seen(".overview"), seen(".text")] };
      key("o");
      await until(() => $("histograms").children.length);
      out.after = [seen(".overview"), seen(".text"), $("show-overview").getAttribute("aria-pressed")];
      $("plan").value = "+half"; $("plan").onchange();
      await until(() => /Chosen: (?!74)/.test($("overview-facts").textContent));
      out.facts = $("overview-facts").textContent;
      const lines = [...page.querySelectorAll("#domains tbody tr, #domains tfoot tr")];
      out.lines = lines.map(one => [...one.cells].map(cell => cell.textContent));
      out.captions = [...page.querySelectorAll("#histograms figcaption")].map(one => one.textContent);
      const difference = [...$("histograms").children].at(-1).querySelector(".bars");
      out.counts = [...difference.children].map(one => one.title.match(/: (\\d+) of (\\d+)/).slice(1).map(Number));
      difference.children[0].focus();
      key("ArrowRight");
      out.focus = page.activeElement === difference.children[1];
      const place = out.counts.findIndex(([chosen, every]) => chosen > 1 && chosen < every);
      difference.children[place].click();
      await until(() => $("total").textContent.endsWith(`of ${out.counts[place][0]}`));
      out.bin = [out.counts[place], $("total").textContent, $("range").textContent, $("order").value, $("column").value];
      out.text = [seen(".overview"), seen(".text"), $("tokens").children.length];
      out.error = $("error").hidden;
      key("o");
      await until(() => page.querySelector("#domains button"));
      page.querySelector("#domains button").click();
      await until(() => $("domain").value === "=a" && listed().length && $("range").textContent === "");
      await sleep(200);
      out.domain = $("total").textContent;
      return out;
    """
    got = seen(dataset, steps, tmp_path)
    assert "failed" not in got, got
    taken = dataset.sql(
        "select count(*) as n, sum(num_tokens)::bigint as tokens from rows where id in (select id from plans.half)"
    ).to_pylist()[0]
    assert got["before"] == [False, True] and got["after"] == [True, False, "true"]
    assert f"Chosen: {taken['n']} of 74 rows, {taken['tokens']:,} of {dataset.num_tokens:,} tokens" in got["facts"]
    assert [line[0] for line in got["lines"]] == ["a", "b", "all"] and len(got["captions"]) == 3
    assert [sum(int(line[5]) for line in got["lines"][:2]), int(got["lines"][2][5])] == [taken["n"], taken["n"]]
    assert [sum(column) for column in zip(*got["counts"], strict=True)] == [taken["n"], 74]
    assert got["focus"] and got["error"] and got["text"][:2] == [False, True] and got["text"][2] > 0
    assert got["bin"][2].startswith("only") and got["bin"][3:] == ["random", "ref.nll - nll"]
    in_a = dataset.sql("select count(*) as n from rows where domain = 'a' and id in (select id from plans.half)")
    assert got["domain"].endswith(f"of {in_a['n'][0].as_py()}")


def test_other_scripts_are_read_as_they_are_written(tmp_path: Path, tokenizer_dir: Path) -> None:
    """Tokens that are parts of characters show the characters; names from right to left leave the numbers beside them."""
    texts = ["\u0647\u0630\u0627 \u0646\u0635", "\u8fd9\u662f text", "\U0001f389 party"]
    names = [("\u0627\u0628-0", "\u0627\u0628"), ("r1", "zh"), ("r2", "")]
    rows = [{"id": one, "domain": domain, "text": text} for (one, domain), text in zip(names, texts, strict=True)]
    data = run_capture(tmp_path / "data", write_jsonl(tmp_path / "texts.jsonl", rows), tokenizer_dir)
    assert any("\ufffd" in token for row in data for token in row.tokens)
    steps = """
      await until(() => $("rows").children.length && $("tokens").children.length);
      const out = { texts: [], colored: [] };
      const parts = [$("rows").querySelector("b"), ...$("rows").querySelectorAll("bdi")];
      const [id, domain, length] = parts.map(one => one.getBoundingClientRect());
      out.order = id.right <= domain.left && domain.right <= length.left;
      for (const one of [...$("rows").children]) {
        const before = $("row-id").textContent;
        one.click();
        await until(() => $("row-id").textContent === one.querySelector("b").textContent);
        const tokens = [...$("tokens").children];
        out.texts.push($("tokens").textContent);
        out.colored.push(tokens.every(token => token.getBoundingClientRect().width > 0));
      }
      $("show-overview").click();
      await until(() => page.querySelectorAll("#domains button").length);
      const empty = [...page.querySelectorAll("#domains button")].find(one => one.textContent === "(empty)");
      empty.click();
      await until(() => listed().length === 1);
      out.empty = listed();
      return out;
    """
    got = seen(data, steps, tmp_path)
    assert "failed" not in got, got
    assert got["texts"] == [f"<s>{text}" for text in texts] and got["colored"] == [True] * 3
    assert got["order"] and got["empty"] == ["r2"]


def test_a_histogram_of_equal_numbers_names_no_larger_one(dataset: kdata.Dataset, tmp_path: Path) -> None:
    steps = """
      await until(() => $("rows").children.length);
      const ends = async column => {
        $("column").value = column; $("column").onchange(); await sleep(300);
        return [...$("ends").children].map(one => one.textContent);
      };
      return { same: await ends("mine.same"), odd: await ends("mine.odd") };
    """
    assert seen(dataset, steps, tmp_path) == {"same": ["2.5", ""], "odd": ["0", "1"]}


@pytest.mark.parametrize("width", [1280, 390])
def test_the_overview_does_not_scroll_sideways(dataset: kdata.Dataset, tmp_path: Path, width: int) -> None:
    steps = """
      await until(() => $("rows").children.length);
      $("show-overview").click();
      await until(() => $("histograms").children.length);
      await sleep(100);
      return { scroll: page.documentElement.scrollWidth, width: page.documentElement.clientWidth,
        bars: [...page.querySelectorAll("#histograms .bars")].map(one => one.getBoundingClientRect().width) };
    """
    got = seen(dataset, steps, tmp_path, width=width)
    assert "failed" not in got, got
    assert got["scroll"] <= got["width"] == width and min(got["bars"]) > 200


@pytest.mark.parametrize("width", [1280, 390])
def test_hostile_text_is_text_and_nothing_scrolls_sideways(dataset: kdata.Dataset, tmp_path: Path, width: int) -> None:
    steps = """
      await until(() => $("rows").children.length && $("tokens").children.length);
      const at = listed().indexOf("r02");
      $("rows").children[at].click();
      await until(() => $("row-id").textContent === "r02");
      $("tokens").children[3].click();
      await sleep(200);
      const snippet = $("rows").children[at].querySelector("span").textContent;
      return { title: page.title, text: $("tokens").textContent, snippet,
        made: page.querySelectorAll("#tokens img, #tokens script, #rows img, #believed img").length,
        scroll: page.documentElement.scrollWidth, width: page.documentElement.clientWidth,
        loads: view.performance.getEntriesByType("resource").map(one => new URL(one.name).origin === location.origin) };
    """
    got = seen(dataset, steps, tmp_path, width=width)
    assert "failed" not in got, got
    assert got["title"] == "data \u00b7 kdata" and got["made"] == 0 and all(got["loads"])
    assert "<script>document.title='taken'</script>" in got["text"] and "\u202e" not in got["text"]
    assert (
        "\u2039U+202E\u203a" in got["snippet"] and "\u2401" in got["text"] and got["snippet"].startswith("<img src=x")
    )
    assert got["scroll"] <= got["width"] == width


@pytest.mark.parametrize("as_file", [False, True])
def test_the_folder_is_the_page_without_a_server(dataset: kdata.Dataset, tmp_path: Path, as_file: bool) -> None:
    folder = tmp_path / "page"
    assert export(View(dataset), folder, rows=60, where="num_tokens > 3") == 60
    steps = """
      await until(() => $("rows").children.length && $("tokens").children.length);
      const out = { total: $("total").textContent, facts: $("facts").textContent, text: $("tokens").textContent };
      out.bars = $("histogram").children.length;
      $("show-overview").click();
      await until(() => $("histograms").children.length);
      out.overview = $("overview-facts").textContent;
      $("where").value = "text 7"; $("filter").requestSubmit();
      await until(() => listed()[0] !== "r00");
      out.found = listed();
      out.title = page.title;
      return out;
    """
    if as_file:  # a file may not look into a frame: the page itself has the script
        page = folder / "index.html"
        page.write_text(page.read_text("utf-8").replace("</body>", "<script src='probe.js'></script></body>"), "utf-8")
        script = f"{PROBE.replace('STEPS', steps)} window.onload = () => probe(document, window);"
        (folder / "probe.js").write_text(script, encoding="utf-8")
        got = result_of(page.as_uri(), tmp_path)
    else:
        (folder / "harness.html").write_text(around("index.html", steps), encoding="utf-8")
        handler = partial(SimpleHTTPRequestHandler, directory=str(folder))
        with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            got = result_of(f"http://127.0.0.1:{server.server_address[1]}/harness.html", tmp_path)
            server.shutdown()
    assert "failed" not in got, got
    assert got["total"].endswith("of 60") and "60 rows are in this folder" in got["facts"] and got["bars"] == 40
    assert got["text"] == "".join(dataset[0].tokens)
    count = dataset.sql("select count(*) as n from rows where num_tokens > 3")["n"][0].as_py()
    assert f"Chosen: {count} of 74 rows" in got["overview"]
    assert got["found"] and all(one.startswith("r") for one in got["found"]) and "r11" in got["found"]
    assert json.dumps(got) and got["title"] == "data \u00b7 kdata"


def test_numbers_are_whole(dataset: kdata.Dataset, tmp_path: Path) -> None:
    steps = """
      await until(() => $("rows").children.length);
      return { numbers: [1020.3, 1200.4, 100.2, 1.5e-10, 3, 12345678, -0.5, null].map(value => view.kdataNumber(value)) };
    """
    got = seen(dataset, steps, tmp_path)
    assert got["numbers"] == ["1020", "1200", "100.2", "1.5e-10", "3", "12,345,678", "-0.5", "unknown"]
