"""python -m verl_recipes.report RUN [RUN ...] [out=FILE] [watch=true | serve=true]: a page that shows a run.

Writes RUN/report.html, or `out` for several runs: one file that opens from disk without a network. It begins with what
happened in two sentences, the curve of right answers with its interval, and one problem before and after. Behind it are
all figures with intervals, every curve, behaviours over the steps, a browser of samples, configuration, versions, data
sheet, cost, and the command that repeats the run. It also works while a run goes on or after it was killed, and says
what is missing. Several seeds of one recipe are drawn as one line with a band from the least to the most.

    python -m verl_recipes.report runs/tiny-seed0 serve=true
    python -m verl_recipes.report runs/tiny-seed0 runs/tiny-seed1 out=two.html
    python -m verl_recipes.report runs/ladder runs/evaluations/ladder-{base,warm,trained}

Evaluations beside one run are compared in their order, in place of the run's own tests: a column each, the gain of each
over the one before, and one problem answered by all. That page is RUN/ladder.html.

`watch=true` makes the page again whenever the run has done something, until it ends; the page refreshes itself.
`serve=true` does the same and serves the page to this machine alone; the address is printed, and Ctrl-C ends it.

The page holds some of the samples and says how many there are. Everything else is computed from all samples, in a
run of more than 500 steps from those of 500, except behaviours, which are read from 64 responses of each step.
"""

import time
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from data_prep.cli import Checked, Integer, PathText, Text, UserError, command
from verl_recipes.reporting.page import apart, check_out, write_report
from verl_recipes.reporting.watch import EVERY, HOST, serve, watch
from verl_recipes.settings.schema import Price


class ReportKeys(Checked):
    """Keys of configs/report.yaml."""

    runs: list[Text] = Field(description="folders of runs, or one and evaluations, named without `runs=`")
    out: PathText | None = Field(description="the file to write; null: in the run's folder report.html, or ladder.html")
    price: Price = Field(
        description="of a GPU-hour, a number or [low,high]; null: plan.price of the run's configuration"
    )
    currency: Text | None = Field(description="of the price; null: plan.currency of the run's configuration")
    watch: bool = Field(description="make the page again while the run goes on, until it ends")
    serve: bool = Field(description="watch, and serve the page at an address of this machine that is printed")
    port: Annotated[Integer, Field(ge=0, le=65535)] = Field(description="of that address; 0: any that is free")


@command("report", ReportKeys, positional="runs")
def main(cfg: Any) -> None:
    if not cfg.runs:
        raise UserError("name a run's folder: python -m verl_recipes.report runs/tiny-seed0")
    folders, measured = apart([Path(each) for each in cfg.runs])
    if len(folders) > 1 and cfg.out is None:
        raise UserError("a page of several runs needs a name: out=FILE")
    out = Path(cfg.out or folders[0] / ("ladder.html" if measured else "report.html"))
    check_out(out)

    def make(refresh: int = 0) -> Path:
        return write_report(folders, out, cfg.price, cfg.currency, refresh, measured)

    try:
        print(make(EVERY if cfg.serve or cfg.watch else 0))
        if cfg.serve:
            server = serve(out, cfg.port)
            print(f"http://{HOST}:{server.server_port}/    (Ctrl-C ends it)", flush=True)
        if cfg.serve or cfg.watch:
            watch(folders, make)
        while cfg.serve:
            time.sleep(EVERY)
    except KeyboardInterrupt:
        return
    except (FileNotFoundError, FileExistsError) as error:  # about the folder of `out`
        raise UserError(f"{error.filename or out}: {error.strerror}; name another file with out=FILE") from None


if __name__ == "__main__":
    main()
