"""The page in Chromium, from rows to chat on SmolLM2; a run that is stopped and resumed, and a classifier.

Each is used by keyboard and on a phone, has enough contrast in light and dark, and logs nothing.
"""

import json
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

sys.path += [str(Path(__file__).parents[1] / name) for name in ("", "core/models", "evaluation")]
from test_report_browser import STICKS_OUT, missing_requirement, open_page
from tiny_gguf import write_gguf
from tiny_run import write_rows
from walk import WAIT, make_home, serve_page, walk

from slimtune.extras.row_files import read_rows
from slimtune.ui.column_choices import ROLE_LABELS

pytestmark = [
    pytest.mark.prove,
    pytest.mark.timeout(2400),
    pytest.mark.skipif(bool(missing_requirement()), reason=missing_requirement()),
]

LOW_CONTRAST = """
() => {
  const numbers = s => s.match(/[\\d.]+/g).map(Number), found = [];
  const light = c => {
    const [r, g, b] = c.map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = e => {
    for (; e; e = e.parentElement) {
      const c = numbers(getComputedStyle(e).backgroundColor);
      if (c.length < 4 || c[3] === 1) return c;
    }
    return [255, 255, 255];
  };
  const check = (e, style, text) => {
    const [a, b] = [light(numbers(style.color)), light(ground(e))].sort((x, y) => y - x);
    const size = parseFloat(style.fontSize), bold = Number(style.fontWeight) >= 700;
    const least = size >= 24 || (size >= 18.66 && bold) ? 3 : 4.5, ratio = (a + 0.05) / (b + 0.05);
    if (ratio < least) found.push(`${ratio.toFixed(2)} of ${least}: ${e.tagName} ${text.slice(0, 40)}`);
  };
  for (const e of document.body.querySelectorAll('*')) {
    if (!e.checkVisibility()) continue;
    const text = [...e.childNodes].filter(n => n.nodeType === 3).map(n => n.textContent.trim()).join('');
    if (text && e.tagName !== 'OPTION') check(e, getComputedStyle(e), text);
    if (e.placeholder) check(e, getComputedStyle(e, '::placeholder'), e.placeholder);
  }
  return found;
}
"""
REACHABLE = """
() => [...document.querySelectorAll('a[href], button, input:not([type=hidden]), select, textarea, summary')]
  .filter(e => e.checkVisibility()).map((e, i) => (e.dataset.number = i))
"""
FOCUSED = """
() => {
  const e = document.activeElement, style = getComputedStyle(e);
  return [Number(e.dataset.number ?? -1), style.outlineStyle !== 'none' && parseFloat(style.outlineWidth) >= 2];
}
"""
UNNAMED = """
() => [...document.querySelectorAll('input:not([type=hidden]), select, textarea')]
  .filter(e => !e.labels.length && !e.ariaLabel).map(e => e.outerHTML)
"""
OUTSIDE_SCROLLERS = STICKS_OUT.replace("const box", "if (e.closest('.wide > *, .skip, .hidden')) continue; const box")


def check_keyboard(page) -> None:
    """Press Tab until every control was reached, each with an outline."""
    page.evaluate("document.activeElement.blur()")
    wanted = set(page.evaluate(REACHABLE))
    reached, without_outline = set(), set()
    for _ in range(len(wanted) + 12):
        page.keyboard.press("Tab")
        number, outlined = page.evaluate(FOCUSED)
        reached.add(number)
        if number >= 0 and not outlined:
            without_outline.add(number)
    assert wanted - reached == set()
    assert without_outline == set()


def check_page(page, name: str) -> None:
    """Check that a page is usable by keyboard, on a phone, and in light and dark."""
    assert page.evaluate(UNNAMED) == [], name
    check_keyboard(page)
    for width in (1280, 390):
        for scheme in ("light", "dark"):
            page.set_viewport_size({"width": width, "height": 900})
            page.emulate_media(color_scheme=scheme)
            assert page.evaluate("document.scrollingElement.scrollWidth <= innerWidth"), (name, width)
            assert page.evaluate(OUTSIDE_SCROLLERS) == [], (name, width)
            assert page.evaluate(LOW_CONTRAST) == [], (name, scheme)
    page.set_viewport_size({"width": 1280, "height": 900})
    page.emulate_media(color_scheme="light")


@contextmanager
def open_watched_page(profile):
    """Open a page in Chromium; whatever it logs or asks of another machine is an error."""
    logged, asked = [], []
    with open_page(profile, 1280, "light") as page:
        page.set_default_timeout(30_000)  # a busy machine
        page.on("console", lambda m: logged.append(m.text))
        page.on("pageerror", lambda e: logged.append(str(e)))
        page.on("request", lambda r: asked.append(r.url))
        yield page
    assert logged == [], logged
    assert [address for address in asked if not address.startswith(("http://127.0.0.1:", "data:"))] == []


@pytest.mark.real
def test_the_page_leads_from_rows_to_chat(smollm2_folder, tmp_path):
    seen = []
    with serve_page(make_home(tmp_path / "home")) as url, open_watched_page(tmp_path / "profile") as page:

        def look(name: str) -> None:
            seen.append(name)
            check_page(page, name)

        walk(page, url, look)
        said = page.locator(".answer .said").all_inner_texts()
    assert seen == ["rows", "plan", "train", "chat"]
    assert len(said) == 2
    assert all(text.strip() for text in said)


CLASSES = [(f"{word} {i}", word) for i in range(16) for word in ("good", "bad")]


@pytest.fixture
def tiny_home(tmp_path, tiny_llama, tiny_tokenizer, monkeypatch):
    """A folder with a tiny base as GGUF, conversations, and texts with classes."""
    monkeypatch.setenv("SLIMTUNE_CACHE", str(tmp_path / "cache"))
    home, tokenizer = tmp_path / "home", tiny_tokenizer()
    home.mkdir()
    tokenizer.add_tokens(["Ġa", "Ġ1"])  # what write_gguf's merges make
    write_gguf(home / "tiny.gguf", tiny_llama(vocab_size=261, head_dim=8), tokenizer)
    write_rows(home / "rows.jsonl", 24)
    texts = ({"text": text, "label": label} for text, label in CLASSES)
    (home / "classes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    questions = [f"What is {i}?" for i in range(24)]
    pairs = "".join(f"{q},It is a {i},No {i}\n" for i, q in enumerate(questions))
    (home / "pairs.csv").write_text("Question,good,bad\n" + pairs)
    thumbs = "".join(f"{q},It is a {i},{'up' if i % 2 else 'down'}\n" for i, q in enumerate(questions))
    (home / "thumbs.csv").write_text("Question,Reply,Thumb\n" + thumbs)
    return home


class Visit:
    """A person who goes over the pages of one folder."""

    def __init__(self, page, url: str) -> None:
        self.page, self.origin = page, url.split("/?")[0]
        page.goto(url)

    def go(self, path: str) -> None:
        self.page.goto(self.origin + path)

    def press(self, name: str, page=None) -> None:
        """Press a button by the keyboard; a click waits for a button that is not drawn anew meanwhile."""
        (page or self.page).get_by_role("button", name=name, exact=True).press("Enter", timeout=WAIT)

    def wait_for(self, text: str) -> None:
        self.page.get_by_text(text).first.wait_for(timeout=WAIT)

    def run_command(self, name: str) -> None:
        """Press a button, and wait until the command that it starts has ended."""
        self.press(name)
        stop = self.page.get_by_role("button", name="Stop", exact=True)
        stop.wait_for()
        stop.wait_for(state="detached", timeout=WAIT)

    def start_and_stop(self, name: str) -> None:
        self.press(name)
        self.press("Stop")
        self.page.get_by_text("It was stopped before it had a result.").wait_for(timeout=WAIT)

    def choose(self, rows: str, task: str, steps: int, **columns: str) -> None:
        """Choose base, rows and settings; the reports, which another test reads, are stopped.

        `columns` are those that the page must guess, by their roles.
        """
        self.go("/")
        self.page.get_by_label("Base model").fill("tiny.gguf")
        self.page.get_by_label("Objective").select_option(task)
        self.page.get_by_label("Rows", exact=True).fill(rows)
        self.page.get_by_label("Rows", exact=True).press("Tab")
        asked = {role: self.page.get_by_label(ROLE_LABELS[role], exact=True) for role in columns}
        for field in asked.values():
            field.wait_for()
        self.page.get_by_text("Which column is what").wait_for()
        assert {role: field.input_value() for role, field in asked.items()} == columns
        self.start_and_stop("Check the rows")
        self.go("/plan")
        self.page.get_by_role("textbox", name="Steps").fill(str(steps))
        self.page.get_by_label("Validation share").fill("0.2")
        if not self.page.get_by_label("One a line").is_visible():
            self.page.get_by_text("More settings").click()
        self.page.get_by_label("Learning rate").fill("0.01")
        self.page.get_by_label("One a line").fill("train.save_steps=50\ntrain.batch_size=2")
        self.start_and_stop("Plan the run")

    def start(self, run: str) -> None:
        self.go("/train")
        self.page.get_by_label("New run").fill(run)
        self.press("Start the training")
        self.page.get_by_role("heading", name=run).wait_for(timeout=WAIT)

    def evaluate(self, run: str) -> None:
        self.go(f"/evaluate?run={run}")
        self.page.get_by_label("Rows that were kept").select_option("validation")
        self.run_command("Evaluate")
        self.page.get_by_role("link", name="Next: talk to it").wait_for()


def test_a_run_is_stopped_in_another_tab_resumed_and_evaluated(tiny_home, tmp_path):
    with serve_page(tiny_home) as url, open_watched_page(tmp_path / "profile") as page:
        visit = Visit(page, url)
        visit.choose("rows.jsonl", "", 600)
        visit.start("runs/first")
        page.get_by_role("progressbar").wait_for(timeout=WAIT)
        check_page(page, "training")
        second = page.context.new_page()
        second.goto(visit.origin + "/train")
        visit.press("Stop, with a checkpoint", second)
        visit.wait_for("stopped before its end")
        check_page(page, "stopped")
        visit.press("Resume")
        page.get_by_role("link", name="Next: evaluate").wait_for(timeout=WAIT)

        visit.evaluate("runs/first")
        assert page.get_by_role("heading", name="Answers").is_visible()
        check_page(page, "evaluated")


def test_a_classifier_is_trained_evaluated_asked_and_merged(tiny_home, tmp_path):
    with serve_page(tiny_home) as url, open_watched_page(tmp_path / "profile") as page:
        visit = Visit(page, url)
        visit.choose("classes.jsonl", "classification", 40)
        visit.start("runs/classes")
        page.get_by_role("link", name="Next: evaluate").wait_for(timeout=WAIT)
        visit.evaluate("runs/classes")
        check_page(page, "classes evaluated")
        page.get_by_role("link", name="Next: talk to it").click()
        page.get_by_label("Text").fill("good 3")
        visit.run_command("Predict")
        assert page.get_by_role("cell", name="%").count() == 2
        check_page(page, "predicted")
        visit.go("/export?run=runs/classes")
        assert page.get_by_label("For").locator("option").count() == 1
        page.get_by_label("New folder").fill("exports/classes")
        visit.run_command("Export")
        assert page.get_by_text("merged and adapted model differ by").is_visible()
        check_page(page, "merged")


def test_pairs_in_columns_of_any_names_are_learned_evaluated_compared_and_exported(tiny_home, tmp_path):
    with serve_page(tiny_home) as url, open_watched_page(tmp_path / "profile") as page:
        visit = Visit(page, url)
        visit.choose("pairs.csv", "dpo", 8, prompt="Question", chosen="good", rejected="bad")
        for run, rate in (("runs/a", "0.01"), ("runs/b", "0.001")):
            visit.go("/plan")
            page.get_by_label("Learning rate").fill(rate)
            visit.start_and_stop("Plan the run")
            visit.start(run)
            page.get_by_role("link", name="Next: evaluate").wait_for(timeout=WAIT)
            visit.evaluate(run)
        check_page(page, "pairs evaluated")
        page.get_by_text("2.7 times as likely").wait_for()
        visit.go("/runs")
        for run in ("runs/a", "runs/b"):
            page.get_by_label(f"{run} side by side").check()
        visit.press("Side by side")
        page.get_by_role("heading", name="Side by side").wait_for()
        rates = page.get_by_role("row", name="Learning rate").get_by_role("cell")
        assert rates.all_inner_texts() == ["0.001", "0.01"]
        page.get_by_role("heading", name="nats per token").wait_for()
        check_page(page, "compared")
        visit.go("/export?run=runs/a")
        page.get_by_label("For").select_option("merge")
        page.get_by_label("New folder").fill("exports/a")
        visit.run_command("Export")
        page.get_by_text("written").first.wait_for()
        page.locator("#out[value='exports/a-2']").wait_for()
        visit.run_command("Check it again")
        page.get_by_text("exports/a is the trained model").wait_for()
    rates = [
        json.loads(line)["learning_rate"] for line in (tiny_home / "runs/b/metrics.jsonl").open() if "rate" in line
    ]
    assert max(rates) == 0.001
    assert (tiny_home / "exports/a/model.safetensors").is_file()


def test_thumbs_are_learned_given_in_the_chat_and_learned_again(tiny_home, tmp_path):
    with serve_page(tiny_home) as url, open_watched_page(tmp_path / "profile") as page:
        visit = Visit(page, url)
        visit.choose("thumbs.csv", "kto", 8, prompt="Question", completion="Reply", label="Thumb")
        visit.start("runs/first")
        page.get_by_role("link", name="Next: evaluate").wait_for(timeout=WAIT)
        visit.evaluate("runs/first")
        visit.go("/chat?run=runs/first")
        visit.press("Load")
        page.get_by_text("with the lora adapter in runs/first").wait_for(timeout=WAIT)
        page.get_by_text("How they answer").click()
        page.get_by_label("Longest answer").fill("24")
        page.get_by_label("Temperature").fill("2")  # the likeliest bytes of a model this small cannot be seen
        page.get_by_label("Your message").fill("What is 3?")
        page.get_by_label("Your message").press("Control+Enter")
        for number, answer in enumerate(("tuned is good", "base is bad")):
            page.get_by_label(f"The answer of {answer}").click(timeout=WAIT)
            page.locator("[aria-pressed=true]").nth(number).wait_for()
        check_page(page, "rated")
        visit.press("Train on it")
        page.get_by_text("Which column is what").wait_for()
        assert page.get_by_label("Objective").input_value() == "kto"
        check_page(page, "rated rows")
    rows = read_rows(tiny_home / "ratings/runs-first.jsonl", format="unpaired-preference")
    assert [row.is_good for row in rows] == [True, False]


def test_fields_are_checked_as_they_are_typed_and_help_is_found(tiny_home, tmp_path):
    with serve_page(tiny_home) as url, open_watched_page(tmp_path / "profile") as page:
        visit = Visit(page, url)
        page.get_by_label("Base model").fill("tiny.gguf")
        page.get_by_label("Or upload rows").set_input_files(tiny_home / "pairs.csv")
        page.get_by_text("uploads/pairs.csv").first.wait_for()
        page.get_by_label("Base model").press("Enter")
        visit.press("Stop")
        visit.go("/plan")
        wrong = page.get_by_label("Batch size").locator("xpath=..").locator(".wrong")
        page.get_by_label("Batch size").press_sequentially("ten")
        wrong.filter(has_text="integer").wait_for()
        check_page(page, "wrong")
        page.get_by_label("Batch size").fill("10")
        wrong.filter(has_text="integer").wait_for(state="detached")
        visit.go("/machines")
        check_page(page, "machines")
        visit.go("/help")
        page.get_by_label("Error or question").fill("cuda out of memory")
        visit.press("Search")
        page.get_by_role("heading", name="Fix").wait_for(timeout=WAIT)
        check_page(page, "help")
        page.get_by_label("Error or question").fill("does it work on windows")
        visit.press("Search")
        page.get_by_role("heading", name="If that is not what you mean").wait_for(timeout=WAIT)
        check_page(page, "help with alternatives")
        visit.press("Does it work on AMD, Intel, Windows?")
        visit.wait_for("AMD with ROCm is expected to work")
