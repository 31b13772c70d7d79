"""What several files of tests share: a small data set, and the short run that most of them look at."""

import gc
import os
import pickle
import re
import signal
import sys
import time
from pathlib import Path

import pytest
from commands import RESUMED, listeners, metrics_of, titles, train, workers_of
from hydra.core.plugins import Plugins
from hypothesis import settings
from xdist.scheduler import LoadScopeScheduling

from verl_recipes.run.folder import read_lines

HOUR = "test_fuzzing_finds_nothing[3600]"
ALONE = "test_(the_one_command|somebody_elses|a_run_that|a_run_with_stale)"  # runs that one test makes for itself
# The same examples each time, so that a change is judged by the change; tests/run.sh --all draws new ones. Without a
# deadline, as other processes share the machine.
settings.register_profile("tests", derandomize="NEW_EXAMPLES" not in os.environ, deadline=None)
settings.load_profile("tests")
# Thousands of modules stay in memory, and looking through them for garbage took an eighth of the tests' time.
gc.set_threshold(200_000, 50, 100)
Plugins.instance()  # imports Hydra's readers anew, so that what was imported before is not what Hydra uses
FileConfigSource = sys.modules["hydra._internal.core_plugins.file_config_source"].FileConfigSource


def read_once(self, config_path, read=FileConfigSource.load_config, known={}):  # noqa: B006
    """Hydra's reader of a file: the tests compose verl's hundreds of times, and reading them is a third of that."""
    file = Path(self.path, self._normalize_file_name(config_path))
    key = self.provider, file, file.exists() and file.stat().st_mtime_ns
    if key not in known:
        known[key] = pickle.dumps(read(self, config_path))
    return pickle.loads(known[key])  # a tenth of the time of copy.deepcopy


FileConfigSource.load_config = read_once


def pytest_collection_modifyitems(items):
    """What takes longest begins first, an hour of fuzzing before all, so that at the end no worker waits."""
    items.sort(
        key=lambda item: (item.name != HOUR, not {"end_to_end", "long"} & {mark.name for mark in item.iter_markers()})
    )


class RunsAreShared(LoadScopeScheduling):
    """pytest-xdist's scheduler: one worker runs all tests that look at one run, so that it is made once."""

    def _split_scope(self, nodeid):
        """The name of what runs on one worker: `runs`; a test with a run of its own; a file, whose tests share much."""
        file, _, test = nodeid.partition("::")
        if file.endswith(("test_evaluation.py", "test_launch.py", "test_end_to_end.py")):
            return nodeid if re.match(ALONE, test) else "runs"
        return file


def pytest_xdist_make_scheduler(config, log):
    return RunsAreShared(config, log)


@pytest.fixture(scope="session")
def small_data(tmp_path_factory):
    """Overrides that name a small data set; beside it lie sets out of distribution."""
    from test_data import prepare  # not above: Hypothesis' decorators take the profile that is loaded then

    out = tmp_path_factory.mktemp("data") / "small"
    prepare(out, "train_size=512", "test_size=16", "ood=standard", "ood.size=16", "ood.names=[5_numbers,needs_product]")
    return [f"data.train_files={out}/train.parquet", f"data.val_files={out}/test.parquet"]


@pytest.fixture(scope="session")
def resumed(tmp_path_factory, small_data):
    """A run of 4 steps, saved every 2, killed with its whole process group after step 3 and started again,
    with one rank for two.

    There, in step 3 once more, the training worker alone is killed, and the run goes on by itself. Two steps are an
    epoch, so the run is twice resumed at the end of one.
    """
    run_dir = tmp_path_factory.mktemp("runs") / "resumed [1] 中文='~ {x}"  # a path as people have them
    arguments = [*RESUMED, *small_data]

    def third_step_is_done():
        return any(line["step"] == 3 for line in metrics_of(run_dir, "metrics.part.jsonl"))

    first = train(run_dir, *arguments)
    first.wait_for(third_step_is_done)
    os.killpg(first.process.pid, signal.SIGKILL)
    first.process.communicate()
    events, started = run_dir / "samples" / "events.jsonl", time.time()
    second = train(run_dir, *arguments, "gpus=1", "trainer.restarts=1")

    def third_step_is_begun():
        """The first run's processes may have written for a moment after they were killed; a start takes longer."""
        return any(event["split"] == "train" and event["time"] > started + 5 for event in read_lines(events))

    second.wait_for(lambda: workers_of(second))
    worker = workers_of(second)[0]
    second.wait_for(third_step_is_begun)
    worker.suspend()  # the run must not go on while it is looked at
    names, parent, listening = set(titles(second).values()), worker.parent().cmdline(), listeners(second)
    worker.kill()
    status = second.wait()
    assert status == 0, second.output
    seen = {"parent": parent, "listening": listening, "names": names}
    return {"run_dir": run_dir, "first": first, "second": second, "arguments": arguments} | seen
