"""Tables and pictures of one or many evaluations, of a training run, and of sweeps.

python -m openvla_lightning.report runs/demo
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from openvla_lightning.report.results import FILE_NAME
from openvla_lightning.report.run_page import is_run, write_run_page
from openvla_lightning.report.shards import ShardError, merge
from openvla_lightning.report.sweep_page import write_sweep
from openvla_lightning.report.sweeps import find_runs
from openvla_lightning.report.writing import compare, write_report
from openvla_lightning.runtime.files import below


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of `python -m openvla_lightning.report`."""
    parser = argparse.ArgumentParser("python -m openvla_lightning.report", description=compare.__doc__.split("\n")[0])  # type: ignore[union-attr]
    what = "results.json files, folders searched for them, or the folder of a training run"
    parser.add_argument("paths", nargs="+", type=Path, help=what)
    parser.add_argument("--out", type=Path, help="folder for report.md and the chart (default: the first folder named)")
    parser.add_argument("--merge", action="store_true", help="first make one evaluation of the shards in each folder")
    options = parser.parse_args(arguments)
    if options.merge:
        try:
            for path in options.paths:
                write_report(merge(path), path)
        except ShardError as error:
            parser.error(str(error))
    for path in filter(is_run, options.paths):
        print(f"written to {write_run_page(path)}")
    if all(map(is_run, options.paths)):
        return
    sweeps = {path: runs for path in options.paths if path.is_dir() and (runs := find_runs(path))}
    for folder, runs in sweeps.items():
        print(f"written to {write_sweep(folder, runs)}")
    trained = {run.resolve() for runs in sweeps.values() for run in runs}
    named = [path for path in options.paths if path.is_file()]
    results = [file.resolve() for path in options.paths for file in below(path, FILE_NAME)]
    if sweeps and not named and all(trained & {*file.parents} for file in results):  # these are on the sweep's page
        return
    try:
        print(f"written to {compare(options.paths, options.out)}")
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
