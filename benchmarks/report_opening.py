"""python benchmarks/report_opening.py [RUN ...]: how large a report is, how long it takes to make and to open.

Without an argument it makes a run with 100,000 samples of 2,000 characters. It opens the page seven times in headless
Chromium, each time in a new context, and prints the median seconds until the page has loaded (with all text, filters
and the first samples), and until the main chart is seen.
"""

import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from playwright.sync_api import sync_playwright

from verl_recipes.reporting.page import write_report

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from test_report import CHROMIUM, FLAGS, make_large_run


def main(runs: list[Path]) -> None:
    print("| run | making (s) | size (MB) | loaded (s) | main chart (s) |")
    print("| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        for run in runs or [make_large_run(Path(folder) / "100,000 samples")]:
            started = time.perf_counter()
            report = write_report([run], Path(folder) / "report.html")
            making, loaded, drawn = time.perf_counter() - started, [], []
            for _ in range(7):
                page = browser.new_context().new_page()
                started = time.perf_counter()
                page.goto(report.as_uri())
                page.wait_for_selector("figure svg")
                drawn.append(time.perf_counter() - started)
                page.wait_for_selector("body[data-ready]")
                loaded.append(time.perf_counter() - started)
                page.context.close()
            figures = f"{making:.1f} | {report.stat().st_size / 1e6:.1f} | {median(loaded):.2f} | {median(drawn):.2f}"
            print(f"| {run.name} | {figures} |")
        browser.close()


if __name__ == "__main__":
    main([Path(each) for each in sys.argv[1:]])
