"""Reports as a reader sees them: in a browser without a window, with real clicks and keys."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from browser import Chromium
from report_cases import HOSTILE, write_card, write_evaluation, write_run

from megatron_rlpt.config import Role
from megatron_rlpt.evaluation.results import EVALUATION_FILE
from megatron_rlpt.plain_text import plain
from megatron_rlpt.reports import write_report
from megatron_rlpt.reports.samples import LONGEST_TEXT
from megatron_rlpt.teacher.judge_card import kept_card

pytestmark = pytest.mark.chromium

PHONE = 360
OPEN_ALL = "document.querySelectorAll('details').forEach(one => { one.open = true; })"
CONTRAST = """(() => {
  const parts = (color) => color.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (node) => {
    for (let at = node; at; at = at.parentElement) {
      const found = parts(getComputedStyle(at).backgroundColor);
      if (found.length < 4 || found[3] === 1) return found;
    }
    return [255, 255, 255];
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const low = new Set();
  let seen = 0;
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !node.checkVisibility() || node.closest("button:disabled, option")) continue;
    const style = getComputedStyle(node);
    const color = parts(node instanceof SVGElement ? style.fill : style.color);
    const [one, other] = [light(color), light(behind(node))];
    const ratio = (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
    seen += 1;
    if (ratio < 4.5) low.add(`${node.tagName}.${node.className.baseVal ?? node.className} ${ratio.toFixed(2)}: ${walker.currentNode.data.trim().slice(0, 40)}`);
  }
  return [seen, [...low]];
})()"""  # noqa: E501


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Chromium(tmp_path_factory.mktemp("browser") / "home") as started:
        yield started


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Reports by name: a finished run, two comparisons, a run in progress, one with nothing yet, hostile texts."""
    root = tmp_path_factory.mktemp("runs")
    write_run(root / "sip", steps=60)
    write_evaluation(root / "sip")
    write_card(kept_card(root / "sip", Role.judge))
    write_run(root / "running", steps=35, of=60, seed=2, gain=0.4, state="running", age=1.0, **{"optimizer.lr": 1e-5})
    write_evaluation(root / "running", seed=5)
    for name in ("metrics.jsonl", "samples.jsonl"):
        whole = (root / "running" / name).read_bytes()
        (root / "running" / name).write_bytes(whole[:-40])
    write_run(root / "new", steps=0, of=60, state="running", age=1.0)
    write_run(root / "hostile", steps=len(HOSTILE), per_step=1, texts=HOSTILE, state="killed by </script><b>")
    found = write_evaluation(root / "hostile", prompts=len(HOSTILE))
    examples = [
        {**example, "prefix": text, "label": text[:80], "continuations": {"greedy": {"start": text, "sip": text}}}
        for example, text in zip(found.examples, HOSTILE.values(), strict=True)
    ]
    judges = tuple(replace(judge, description=HOSTILE["image"]) for judge in found.judges)
    write_evaluation(root / "hostile", prompts=len(HOSTILE), examples=tuple(examples), judges=judges,
                     notes=tuple(text[:500] for text in HOSTILE.values()))  # fmt: skip
    written = {name: write_report([root / name]) for name in ("sip", "running", "new", "hostile")}
    many = [write_run(root / f"run-{number}", steps=3, seed=number) for number in range(9)]
    written["many"] = write_report(many, root / "many")
    return written | {"comparison": write_report([root / "sip", root / "running"], root / "both")}


@pytest.mark.parametrize("name", ["sip", "comparison", "many", "running", "new", "hostile"])
def test_a_page_fits_its_window_is_readable_and_asks_for_nothing(browser, pages, name, subtests):
    browser.open(pages[name])
    tabs = browser.run("document.querySelectorAll('.tab').length")
    for width, dark in ((1280, False), (1280, True), (PHONE, False), (PHONE, True)):
        with subtests.test(width=width, dark=dark):
            browser.resize(width, dark=dark)
            for tab in range(max(tabs, 1)):
                if tabs:
                    browser.click(".tab", tab)
                browser.run(OPEN_ALL)
                browser.settle()
                assert browser.run("document.documentElement.scrollWidth") <= width
                seen, low = browser.run(CONTRAST)
                assert seen > 20
                assert low == []
    assert browser.problems == []
    assert browser.requests == [pages[name].as_uri()]


def test_plots_are_drawn_for_the_width_that_they_have(browser, pages):
    browser.open(pages["sip"])
    wide = browser.run("[...document.querySelectorAll('.plot svg')].map(one => one.viewBox.baseVal.width)")
    assert len(wide) > 10
    browser.resize(PHONE)
    narrow = browser.run("[...document.querySelectorAll('.plot svg')].map(one => one.viewBox.baseVal.width)")
    assert len(narrow) == len(wide)
    assert all(width < PHONE for width in narrow)


def test_values_are_read_under_the_pointer_and_with_keys(browser, pages):
    metrics = [json.loads(line) for line in (pages["sip"].parent / "metrics.jsonl").read_text().splitlines()]
    browser.open(pages["sip"])
    titles = browser.run("[...document.querySelectorAll('.charts h3')].map(one => one.textContent)")
    plot = f".charts figure:nth-child({titles.index('Loss') + 1})"
    tip = f"document.querySelector('{plot} .tip')"
    assert browser.run(f"{tip}.hidden")
    browser.hover(f"{plot} svg")
    first, second = browser.run(f"[...{tip}.children].map(one => one.textContent)")
    step = int(first.removeprefix("step "))
    assert 25 < step < 35
    assert second == f"loss: {metrics[step]['loss']:.4g}"
    browser.run(f"document.querySelector('{plot} svg').focus()")
    browser.press("ArrowRight")
    assert browser.run(f"{tip}.children[0].textContent") == f"step {step + 1}"
    # A hidden line is not in the reading.
    who = f".charts figure:nth-child({titles.index('Who wins') + 1})"
    browser.click(f"{who} .legend button", 1)
    browser.hover(f"{who} svg")
    assert "original" not in browser.run(f"document.querySelector('{who} .tip').textContent")


def test_any_metric_can_be_drawn(browser, pages):
    browser.open(pages["sip"])
    browser.choose("#any-metric", "judge/flip_rate")
    assert browser.run("document.querySelector('#any-plot svg').getAttribute('aria-label')").startswith(
        "judge/flip_rate"
    )


def count(browser) -> str:
    return browser.run("[...document.querySelectorAll('.pager output')].find(one => one.checkVisibility()).textContent")


def shown(browser) -> list[str]:
    return browser.run(
        "[...document.querySelectorAll('.items > li')].filter(one => one.checkVisibility()).map(one => one.textContent)"
    )


def test_search_finds_texts_and_marks_them(browser, pages):
    browser.open(pages["sip"])
    browser.click(".tab", 1)
    assert count(browser) == "1 to 10 of 120"
    rows = [json.loads(line) for line in (pages["sip"].parent / "samples.jsonl").read_text().splitlines()]
    phrase = rows[33]["candidates"][3]["text"][5:40].upper()
    browser.press("/")
    browser.type(f'"{phrase}"')
    assert count(browser) == "1 to 1 of 1 (120 in all)"
    assert browser.run("[...document.querySelectorAll('mark')].map(one => one.textContent)") == [phrase.lower()]
    browser.press("Escape")
    assert count(browser) == "1 to 10 of 120"
    browser.type("hmm nowhere")
    assert count(browser) == "None of 120 match"
    browser.press("Escape")
    browser.type("hmm")  # the cause of a failure, in every second sample
    assert count(browser) == "1 to 10 of 60 (120 in all)"


def test_training_samples_are_filtered_by_outcome_axis_and_step(browser, pages):
    rows = [json.loads(line) for line in (pages["sip"].parent / "samples.jsonl").read_text().splitlines()]
    browser.open(pages["sip"])
    browser.click(".tab", 1)

    def chosen(row) -> str:
        return "" if row["chosen"] is None else row["candidates"][row["chosen"]]["source"]

    browser.choose("[data-filter=chosen]", "source rollout")
    expected = sum(chosen(row) == "rollout" for row in rows)
    assert count(browser).startswith(f"1 to 10 of {expected} ")
    browser.choose("[data-filter=chosen]", "skipped")
    assert count(browser).startswith(f"1 to 10 of {sum(row['skipped'] is not None for row in rows)} ")
    browser.choose("[data-filter=chosen]", "")

    def ahead(row) -> float:
        values = [(one["source"] == "rollout", one.get("detail", {}).get("axes", {}).get("safety", {}).get("value"))
                  for one in row["candidates"]]  # fmt: skip
        best = [max(v for ours, v in values if ours is side and v is not None) for side in (True, False)]
        return best[0] - best[1]

    browser.choose("[data-filter=axis]", "safety")
    browser.choose("[data-filter=outcome]", "lost")
    assert count(browser) == f"1 to {(lost := sum(ahead(row) < 0 for row in rows))} of {lost} (120 in all)"
    assert 0 < lost < 10
    browser.choose("[data-filter=outcome]", "")
    browser.choose("[data-filter=axis]", "")
    browser.run("document.querySelector('[data-filter=from]').focus()")
    browser.type("58")
    assert count(browser) == "1 to 4 of 4 (120 in all)"
    assert all(text.startswith(("step 58", "step 59")) for text in shown(browser))


def test_examples_are_filtered_by_who_won_and_read_with_keys(browser, pages):
    examples = json.loads((pages["sip"].parent / EVALUATION_FILE).read_text())["examples"]
    browser.open(pages["sip"])
    assert count(browser) == "1 to 10 of 24"
    for name, value in (("model", "sip"), ("judge", "second"), ("decoding", "greedy"), ("outcome", "lost")):
        browser.choose(f"[data-filter={name}]", value)
    lost = sum(example["wins"]["second"]["greedy"]["sip"] == 0 for example in examples)
    assert 0 < lost < 10
    assert count(browser) == f"1 to {lost} of {lost} (24 in all)"
    assert (
        browser.run("[...document.querySelectorAll('.items .card')].filter(one => one.checkVisibility()).length") == 4
    )  # three models, greedy, and the original
    browser.choose("[data-filter=outcome]", "")
    browser.click("#samples h2")
    browser.press("/")
    browser.press("ArrowDown")
    opened = "[...document.querySelectorAll('.items > li > details')].map(one => one.open)"
    where = "[...document.querySelectorAll('.items summary')].indexOf(document.activeElement)"
    browser.press("j", "ArrowDown", "k")
    assert browser.run(where) == 1
    browser.press("Enter")
    assert browser.run(opened)[:3] == [True, True, False]
    browser.press("n")
    assert count(browser) == "11 to 20 of 24"
    browser.click(".pager button", 1)
    assert count(browser) == "21 to 24 of 24"
    browser.run("document.querySelector('.items summary').focus()")
    browser.press("ArrowLeft", "ArrowLeft", "ArrowLeft")
    assert count(browser) == "1 to 10 of 24"


def test_a_comparison_shows_the_same_prompt_of_all_runs(browser, pages):
    browser.open(pages["comparison"])
    assert browser.run("document.querySelectorAll('#differences tbody tr').length") >= 2
    browser.click(".tab", 1)
    browser.choose("[data-filter=run]", "all")
    first = shown(browser)[0]
    assert "sip, step 0" in first
    assert "running, step 0" in first
    lines = browser.run("document.querySelector('[data-chart] svg').querySelectorAll('path').length")
    assert lines == 2


def test_hostile_texts_are_shown_and_do_nothing(browser, pages):
    browser.open(pages["hostile"])
    assert browser.run("document.title") == "hostile"
    assert browser.run("document.scripts.length") == 2
    for tab in (0, 1):
        browser.click(".tab", tab)
        browser.run(OPEN_ALL)
        browser.settle()
        page = browser.run(
            "[...document.querySelectorAll('[role=tabpanel] .text')].filter(one => one.checkVisibility())"
            ".map(one => one.textContent)"
        )
        for name, text in HOSTILE.items():
            cut = text[:LONGEST_TEXT] + (
                f" [{len(text) - LONGEST_TEXT} characters left out]" if name == "long line" else ""
            )
            assert plain(cut, keep="\n\t") in page, name
    assert browser.run("document.querySelectorAll('img, b script, main script').length") == 0
    assert browser.run("document.title") == "hostile"


def test_the_page_may_not_reach_the_network_or_run_other_scripts(browser, pages):
    asked = []

    class Ear(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Ear)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        browser.open(pages["sip"])
        address = f"http://127.0.0.1:{server.server_port}"
        outcome = browser.run(
            f"""(async () => {{
            const add = (name, more) => document.body.append(Object.assign(document.createElement(name), more));
            add("img", {{src: "{address}/image"}});
            add("script", {{src: "{address}/script"}});
            add("script", {{textContent: "window.ran = true"}});
            add("iframe", {{src: "{address}/frame"}});
            add("link", {{rel: "stylesheet", href: "{address}/style"}});
            document.body.setAttribute("onclick", "window.ran = true");
            document.body.click();
            const failed = await fetch("{address}/fetch").then(() => false, () => true);
            await new Promise(done => setTimeout(done, 300));
            return [failed, window.ran === true];
            }})()"""
        )
    finally:
        server.shutdown()
        server.server_close()
    assert outcome == [True, False]
    assert asked == []
    assert any("Content Security Policy" in problem for problem in browser.problems)


def test_without_scripts_the_tables_are_there(browser, pages):
    browser.open(pages["sip"], scripts=False)
    text = browser.run("document.body.innerText")
    assert "Plots and samples need JavaScript" in text
    assert "likelihood in-sample" in text


def test_it_prints(browser, pages):
    browser.open(pages["comparison"])
    assert browser.pdf().startswith(b"%PDF")
