"""What dropping a test set's last, smaller batch does to a forecasting score.

    python recipes/dropped_batch.py runs/forecasting/ETTh2/lmm@336-h*-seed0

Code of the field such as PatchTST's (github.com/yuqinie98/PatchTST, issues 7 and 129) scores test
windows in batches and drops those that fill none: with batches of 128 the last 113 of the 2,545 of
ETTh2 at horizon 336. Numbers made so differ from ours.
This table says how much, for trained runs; the project's own protocol drops nothing.
"""

import argparse
import statistics

from torch.utils.data import Subset

from pytitans.data.series import load_splits
from pytitans.forecasting.backtest import score
from pytitans.forecasting.runs import load_run

SIZES = (1, 32, 128, 512)


def kept(windows: int, batch: int) -> int:
    """How many windows are left without the last batch, unless it is whole."""
    return windows // batch * batch


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", help="folders of runs, one for each horizon")
    args = parser.parse_args()
    loaded = sorted(map(load_run, args.runs), key=lambda run: run.horizon)
    tests = [
        load_splits(run.data, run.horizon).windows("test", run.reads, run.horizon) for run in loaded
    ]
    sizes = [size for size in SIZES if size <= min(map(len, tests))]
    header = [f"in batches of {size}" if size > 1 else "all windows" for size in sizes]
    print(f"| horizon | {' | '.join(header)} |\n|---{'|---' * len(sizes)}|")
    scores: list[list[tuple[float, float]]] = [[] for _ in sizes]
    for run, windows in zip(loaded, tests, strict=True):
        for found, size in zip(scores, sizes, strict=True):
            whole = score(run.model, Subset(windows, range(kept(len(windows), size))))
            found.append((whole.mse, whole.mae))
        row = [f"{found[-1][0]:.3f} / {found[-1][1]:.3f}" for found in scores]
        print(f"| {run.horizon} | {' | '.join(row)} |", flush=True)
    means = [[statistics.mean(x) for x in zip(*found, strict=True)] for found in scores]
    print(f"| average | {' | '.join(f'{mse:.3f} / {mae:.3f}' for mse, mae in means)} |")


if __name__ == "__main__":
    main()
