"""The report of a run in a real browser, headless Chromium, from disk."""

import json
import math
import re
import shutil
import socket
from itertools import pairwise

import pytest
from test_report_ladder import RUNGS, make_ladder
from test_reporting import (
    THOUGHTS,
    broken,
    emptied,
    killed,
    make_run,
    sample,
    without_a_metric,
    without_validation,
    write_samples,
)

from verl_recipes.measure.intervals import figure
from verl_recipes.reporting.page import PAGE_BYTES, write_report

pytestmark = pytest.mark.slow
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
# Of Chromium's own background work, which would look for hosts of its maker's.
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = make_run(tmp_path_factory.mktemp("runs") / "plain")
    write_report([run], run / "report.html")
    return run


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("Chromium is missing: `apt-get install chromium` (Debian), or put `chromium` on PATH")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


def open_page(browser, path, **context):
    """The page of a file, with what was wrong in `trouble` and what was asked for in `asked`."""
    page = browser.new_context(**context).new_page()
    page.trouble, page.asked = [], []
    page.on("console", lambda message: page.trouble.append(message.text))
    page.on("pageerror", lambda error: page.trouble.append(str(error)))
    page.on("dialog", lambda dialog: (page.trouble.append("a dialog"), dialog.dismiss()))
    page.on("request", lambda request: page.asked.append(request.url))
    page.goto(path.resolve().as_uri())
    page.wait_for_selector("body[data-ready]")  # the samples are unpacked
    page.evaluate("document.querySelectorAll('details.part').forEach(each => each.open = true)")
    return page


@pytest.fixture
def visit(browser):
    """A function that opens a file and gives the page; afterwards all must have been quiet."""
    pages = []

    def visit(path, **context):
        pages.append(open_page(browser, path, **context))
        return pages[-1]

    yield visit
    for page in pages:
        page.context.close()
        assert page.trouble == []
        assert page.asked == [page.url]


@pytest.fixture(scope="module")
def one_page(browser, run):
    return open_page(browser, run / "report.html")


@pytest.fixture
def plain(one_page):
    """The page of a whole run, as it is when opened; afterwards all must have been quiet."""
    one_page.evaluate("form.reset(); filter()")
    yield one_page
    assert one_page.trouble == []
    assert one_page.asked == [one_page.url]


def test_every_chart_is_drawn_and_has_its_table(plain):
    page = plain
    counts = page.evaluate(
        "figures.map(figure => [figure.querySelectorAll('svg path[style*=\"--c\"]:not(defs path)').length, "
        "figure.querySelectorAll('.legend li').length, charts[figure.dataset.chart].lines.length])"
    )
    assert len(counts) >= 13
    assert all(drawn >= legends == lines > 0 for drawn, legends, lines in counts)
    page.get_by_text("Table: Reward in training").click()
    assert page.locator("figure:has-text('Reward in training') table").inner_text().split()[:4] == [
        "step",
        "reward",
        "1",
        "0.1",
    ]


def test_the_pointer_reads_the_values_of_a_step(plain):
    page = plain
    figure = page.locator("figure:has-text('Reward in training')").first
    figure.scroll_into_view_if_needed()
    box = figure.locator("svg").bounding_box()
    page.mouse.move(box["x"] + box["width"] - 8, box["y"] + box["height"] / 2)
    assert figure.locator("output").inner_text() == "step 6: 0.6"
    page.mouse.move(0, 0)
    assert figure.locator("output").inner_text() == ""


def test_every_question_mark_opens_its_term(plain):
    page = plain
    asked = page.evaluate(
        "[...document.querySelectorAll('[popovertarget]')].map(each => each.getAttribute('popovertarget'))"
    )
    assert len(set(asked)) > 20
    assert page.evaluate("ids => ids.filter(id => !document.getElementById(id)?.matches('[popover]'))", asked) == []
    page.get_by_role("button", name="What is entropy?").first.click()
    assert page.locator("#term-entropy").is_visible()
    page.keyboard.press("Escape")
    assert not page.locator("#term-entropy").is_visible()


def test_filters_and_search_narrow_the_samples(plain):
    page = plain
    count = page.locator("#count")
    assert count.inner_text() == f"{6 * 16 + 2 * 36} of {6 * 16 + 2 * 36} samples"
    page.get_by_role("combobox", name="Part").select_option("validation")
    assert count.inner_text().startswith("72 of")
    page.get_by_role("combobox", name="Step").select_option("6")
    page.get_by_role("combobox", name="Verdict").select_option("right")
    assert count.inner_text().startswith("12 of")
    page.get_by_role("combobox", name="Problem").first.select_option("[11, 18, 25] → 171")
    assert {text.strip() for text in page.locator("#list .right").all_inner_texts()} == {"✓ right"}
    page.get_by_role("searchbox", name="Search in responses").fill("凑出")
    assert set(page.locator("#list pre").all_inner_texts()) == {THOUGHTS[2] + "</think>\n<answer> (18-11)*25 </answer>"}
    page.get_by_role("combobox", name="Reason").select_option("wrong_value")
    assert count.inner_text().startswith("0 of")


def test_thought_answer_false_arithmetic_and_verdict_are_marked(plain):
    page = plain
    page.get_by_role("searchbox", name="Search in responses").fill("11*18=190")
    assert page.locator("#list pre").first.locator(".false").all_inner_texts() == ["11*18=190"]
    assert page.locator("#list pre").first.locator(".answer").inner_text() == " (18-11)*25 "
    assert "✗ misses the target" in page.locator("#list").inner_text()


def test_the_first_screen_says_what_happened_and_shows_a_problem_and_the_curve_with_its_interval(plain):
    said = plain.locator(".lead").inner_text()
    assert re.search(r"^(From )?\d+( to \d+)? of 100 test responses right after 6 steps of training", said)
    assert "equations" in said
    assert len(plain.locator(".example pre").all_inner_texts()) == 2
    chart = plain.evaluate("charts[0]")
    assert [line["label"] for line in chart["lines"]] == ["in training", "test problems"]
    assert all(
        low < y < high
        for line in chart["lines"]
        for low, y, high in zip(line["low"], line["y"], line["high"], strict=True)
    )


def test_a_problem_is_seen_at_the_first_and_the_last_step(plain):
    page = plain
    page.locator("#pair").select_option("[11, 18, 25] → 173")
    sides = page.locator("#sides > section")
    assert [side.locator("p").first.inner_text()[:6] for side in sides.all()] == ["Step 0", "Step 6"]
    assert [side.locator("article").count() for side in sides.all()] == [4, 4]


def test_the_keyboard_reaches_everything(plain):
    page = plain
    everything = page.evaluate(
        "(() => { const all = [...document.querySelectorAll('a, select, input, button, summary, [tabindex=\"0\"]')]"
        ".filter(each => each.checkVisibility()); all.forEach((each, i) => each.dataset.stop = i);"
        " return all.length })()"
    )
    reached = []
    for _ in range(everything + 20):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.dataset.stop"))
    assert {int(stop) for stop in reached if stop is not None} == set(range(everything))
    page.locator("#more").focus()
    page.keyboard.press("Enter")
    assert page.locator("#list article").count() == 40
    assert page.evaluate("document.activeElement === document.querySelectorAll('#list pre')[20]")
    page.locator("figure summary").last.focus()
    page.keyboard.press("Enter")
    page.locator("figure details").last.locator("table").wait_for()  # it is filled by an event
    assert page.locator("figure details").last.locator("table").count() == 1


def test_a_screen_reader_finds_landmarks_names_and_headings(plain):
    page = plain
    for landmark in ("header", "nav[aria-label]", "main", "footer"):
        assert page.locator(landmark).count() >= 1
    nameless = page.evaluate(
        "[...document.querySelectorAll('select, input, [role=img], [role=region], section')].filter(each => "
        "!(each.labels?.length || each.getAttribute('aria-label')"
        " || document.getElementById(each.getAttribute('aria-labelledby'))?.textContent)).map(each => each.outerHTML)"
    )
    assert nameless == []
    label = page.locator("figure:has-text('Reward in training') [role=img]").get_attribute("aria-label")
    assert "reward from 0.1 at step 1 to 0.6 at step 6" in label
    levels = page.evaluate("[...document.querySelectorAll('h1, h2, h3')].map(each => +each.tagName[1])")
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))


def luminance(colour):
    parts = [int(each) / 255 for each in re.findall(r"\d+", colour)[:3]]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_both_schemes_and_nothing_is_wider_than_a_phone(run, visit, scheme):
    page = visit(run / "report.html", viewport={"width": 360, "height": 1200}, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    paper = luminance(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert (paper < 0.1) == (scheme == "dark")
    for selector in ("body", ".small", "a", ".right", ".wrong", ".rest"):
        ink = luminance(page.locator(selector).first.evaluate("each => getComputedStyle(each).color"))
        assert (max(ink, paper) + 0.05) / (min(ink, paper) + 0.05) >= 4.5, selector
    card = luminance(page.locator("figure").first.evaluate("each => getComputedStyle(each).backgroundColor"))
    style = "getComputedStyle(document.querySelector"
    text = luminance(page.evaluate(f"{style}('figure svg text')).fill"))
    lines = page.evaluate(
        "[...Array(8).keys()].map(i => { const each = document.createElement('p');"
        " each.style.color = `var(--c${i})`; document.body.append(each);"
        " return getComputedStyle(each).color })"
    )
    assert (max(text, card) + 0.05) / (min(text, card) + 0.05) >= 4.5
    for line in map(luminance, lines):
        assert (max(line, card) + 0.05) / (min(line, card) + 0.05) >= 3


def test_the_pages_of_a_ladder_and_of_its_warm_start_are_whole_and_no_wider_than_a_phone(tmp_path, visit):
    run, rungs = make_ladder(tmp_path)
    page = visit(write_report([run], run / "report.html", measured=rungs), viewport={"width": 360, "height": 1200})
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    assert page.locator(".hero figcaption").all_inner_texts()[1].startswith("Loss of the warm start")
    assert len(page.locator(".example pre").all_inner_texts()) == len(RUNGS)
    warm = visit(
        write_report([tmp_path / "ladder-warm"], tmp_path / "warm.html"), viewport={"width": 360, "height": 900}
    )
    assert warm.evaluate("document.documentElement.scrollWidth") == 360
    assert warm.locator("details.part:visible h2").all_inner_texts() == ["Cost", "Set-up", "Repeat it"]
    links = warm.locator("nav a").evaluate_all("all => all.map(each => each.hash.slice(1))")
    assert links == ["cost", "setup", "repeat"]


def test_the_page_may_load_nothing_and_run_nothing_else(run, browser):
    page = open_page(browser, run / "report.html")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.5)
        address = f"http://127.0.0.1:{server.getsockname()[1]}/"
        assert page.evaluate(f"fetch('{address}').then(() => 'loaded', () => 'refused')") == "refused"
        page.evaluate(
            "document.body.append(Object.assign(document.createElement('script'), {textContent: 'hacked = 1'}));"
            f"document.body.insertAdjacentHTML('beforeend', '<img src={address}x onerror=hacked=1>');"
            f"navigator.sendBeacon('{address}'); new WebSocket('{address}'.replace('http', 'ws'))"
        )
        with pytest.raises(TimeoutError):
            server.accept()
    assert page.evaluate("typeof hacked") == "undefined"
    page.context.close()


HOSTILE = [
    "<script>hacked = 1</script><img src=x onerror='hacked = 1'>",
    "</script><script>hacked = 1</script><!-- <script>",
    "</pre></article></main><h1>gone</h1>",
    "&lt;b&gt; &amp; {{ 7 * 7 }} {% raw %} ${hacked = 1} \\u003cscript\\u003e",
    "\x00\x01\x1b[31m\x7f\x85\u2028\u2029\u202eright\u202c",
    "lone \ud800 and \udfff and a pair \U0001f600",
    "x" * 1_000_000,
    "1+1=2," * 100_000,
    "](javascript:hacked=1)",
]


def test_hostile_text_is_shown_as_text(tmp_path, visit):
    evil = "</title><script>hacked = 1</script>"
    run = make_run(tmp_path / "<img src=x onerror=hacked=1>", note=evil, data={"train_files": evil})
    rows = [sample(0, i, 0, text) | {"reason": evil, "data_source": evil} for i, text in enumerate(HOSTILE)]
    rows.append({"prompt": evil, "response": evil, "ground_truth": evil, "reason": None, "score": float("nan")})
    rows.append(sample(0, 0, 0) | {"acc": 10**400, "format": math.inf, "response_tokens": "many", "score": 10**400})
    rows.append({"response": None, "ground_truth": {"numbers": [evil], "target": 1}})
    write_samples(run, "validation", 0, rows)
    metrics = {"step": 1, "data": {f"reward/reason/{evil}": 0.5, "reward/score": float("nan"), "timing_s/x": "text"}}
    (run / "metrics.jsonl").write_text(json.dumps(metrics) + "\n", encoding="utf-8")
    (run / "summary.json").write_text(
        json.dumps({"versions": {evil: evil}, "git_commit": evil, "seconds": evil}), encoding="utf-8"
    )
    page = visit(write_report([run], run / "report.html"))
    for details in page.locator("details").all():
        details.evaluate("each => each.open = true")
    assert page.evaluate("typeof hacked") == "undefined"
    assert page.locator("h1").all_inner_texts() == [run.name]
    page.get_by_role("combobox", name="Part").select_option("validation")
    page.get_by_role("combobox", name="Step").select_option("0")
    texts = page.locator("#list pre").all_inner_texts()
    for text in HOSTILE[:4] + HOSTILE[-1:]:
        assert text in texts
    assert "⟨U+0000⟩⟨U+0001⟩⟨U+001B⟩[31m⟨U+007F⟩⟨U+0085⟩" in "".join(texts)
    assert "⟨U+202E⟩right⟨U+202C⟩" in "".join(texts)
    assert "lone ⟨U+D800⟩ and ⟨U+DFFF⟩ and a pair \U0001f600" in texts
    assert sum("994,000 characters left out" in text for text in texts) == 1
    assert len((run / "report.html").read_bytes()) < 2_000_000
    assert evil in page.locator("#setup ~ details, section[aria-labelledby=setup]").first.inner_text()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (killed, ["no summary.json"]),
        (without_validation, ["no validation with samples"]),
        (without_a_metric, ["Gradient norm: none of actor/grad_norm", "KL divergence: none of"]),
        (
            emptied,
            ["no config.yaml", "no metrics.jsonl", "no summary.json", "no samples/", "Reward in training: none"],
        ),
        (broken, ["config.yaml is not readable", "no metrics.jsonl with a step"]),
    ],
)
def test_a_report_is_made_from_what_there_is_and_says_what_is_missing(tmp_path, visit, damage, said):
    run = make_run(tmp_path / "run")
    damage(run)
    page = visit(write_report([run], run / "report.html"))
    missing = page.locator("section[aria-labelledby=missing]").inner_text()
    for each in said:
        assert each in missing
    assert (page.locator("figure").count() == 0) == (damage is emptied)


def test_runs_stand_side_by_side_and_seeds_of_one_recipe_are_a_band(tmp_path, visit):
    runs = [make_run(tmp_path / f"a-seed{seed}", seed=seed) for seed in range(3)]
    runs.append(make_run(tmp_path / "b-seed0", data={"train_batch_size": 7}))
    page = visit(write_report(runs, tmp_path / "both.html"))
    line = page.evaluate("charts.find(chart => chart.title.startsWith('Reward in')).lines")
    assert [each["run"] for each in line] == ["a-seed0 and 2 more seeds", "b-seed0"]
    assert (line[0]["low"][0], line[0]["y"][0], line[0]["high"][0]) == (0.1, 0.11, 0.12)
    assert page.locator("section[aria-labelledby=headline] table").count() == 4
    page.get_by_role("combobox", name="Run").select_option("b-seed0")
    assert page.locator("#count").inner_text() == f"168 of {4 * 168} samples"
    names = page.locator("table.runs tbody th").all_inner_texts()
    assert names == ["a-seed0", "a-seed1", "a-seed2", "mean of 3 seeds", "b-seed0"]
    assert {name.rpartition(", ")[2] for name in page.locator("#pair option").all_inner_texts()} == set(names) - {
        "mean of 3 seeds"
    }
    assert "Band and bars of one run are 95% intervals" in page.locator("body").inner_text()


def test_the_headline_and_the_cost_are_what_the_files_say(plain):
    page = plain
    cells = page.locator("section[aria-labelledby=headline] tbody tr").first
    assert "mean@4" in cells.locator("th").inner_text()
    means = [sum(sample(0, problem, i)["acc"] for i in range(4)) / 4 for problem in range(9)]
    mean, low, high = (100 * each for each in figure(means))
    assert cells.locator("td").first.inner_text() == f"{mean:.1f} ({low:.1f} to {high:.1f})"
    assert "2 × cuda" in (cost := page.locator("section[aria-labelledby=cost] tbody tr").first.inner_text())
    assert "0.200 (the whole run)" in cost  # two devices for 360 s
    assert "1 to 1.4" in cost
    assert "0.1 to 0.14 a step" in cost  # 36 s


def make_large_run(run):
    """A run with a hundred thousand training samples of some 2,000 characters."""
    make_run(run)
    prose = "First 18-11=7, then 7*25=175, which is not what was asked for. " * 30
    for step in range(1, 101):
        rows = [sample(step, i // 8, i % 8, f"{prose}</think><answer>{i}+{step}</answer>") for i in range(1000)]
        write_samples(run, "train", step, rows)
    return run


@pytest.mark.long
def test_a_hundred_thousand_samples_stay_under_7_megabytes_and_the_page_says_that_it_samples(
    tmp_path, visit, monkeypatch
):
    monkeypatch.setattr("verl_recipes.reporting.run.BEHAVIOUR_ROWS", 4)  # most of the time, and no part of the size
    run = make_large_run(tmp_path / "run")
    path = write_report([run], run / "report.html")
    assert path.stat().st_size < 7_000_000
    page = visit(path)
    shown = re.search(r"(\d+) of 100072 samples are on this page", page.locator("body").inner_text())
    assert 1000 < int(shown[1]) < PAGE_BYTES / 1000
    page.get_by_role("combobox", name="Step").select_option(index=30)
    assert page.locator("#list article").count() > 5
