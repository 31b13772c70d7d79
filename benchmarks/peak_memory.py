"""python benchmarks/peak_memory.py [overrides of verl_recipes.train]: the peak memory of the tiny run.

Once a second this adds up what the processes hold (proportional set sizes, so shared pages count once), and prints the
largest sum with its largest processes. The peak comes late in the run, when responses are long.
"""

import sys
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent


def held(command: psutil.Popen) -> list[tuple[int, str]]:
    """Bytes and name of each process of the command, the largest first."""
    processes = []
    for process in [command, *command.children(recursive=True)]:
        try:
            processes.append((process.memory_full_info().pss, process.name()))
        except psutil.Error:  # it ended in between
            continue
    return sorted(processes, reverse=True)


def main(*overrides: str) -> None:
    options = ["fresh=true", f"run_dir={ROOT / 'runs' / 'peak_memory'}", *overrides]
    command = psutil.Popen([sys.executable, "-m", "verl_recipes.train", *options], cwd=ROOT)
    peak: list[tuple[int, str]] = []
    while command.poll() is None:
        peak = max(peak, held(command), key=lambda processes: sum(size for size, _ in processes))
        time.sleep(1)
    print(f"{sum(size for size, _ in peak) / 1e9:.2f} GB at the peak, in {len(peak)} processes")
    for size, name in peak[:10]:
        print(f"{size / 1e6:6.0f} MB {name}")
    sys.exit(command.returncode)


if __name__ == "__main__":
    main(*sys.argv[1:])
