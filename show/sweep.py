"""A sweep ends with a report of its own: one table, one figure, one page over all of its jobs.

Nothing heavy is imported before that: Hydra builds the callback at the start of every command.
"""

import sys
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback

from errors import UserError


class SweepReport(Callback):
    """Writes report.html, .md, .csv, .tex and the figures into the folder of a sweep when its last job has ended."""

    def on_multirun_end(self, config: Any, **kwargs: Any) -> None:
        """Report the jobs that scored layers; what cannot be compared is said, and costs the sweep nothing."""
        from show import across_runs  # here: it imports torch

        folder = Path(config.hydra.sweep.dir)
        try:
            directories = across_runs.jobs_of(folder)
            if len(directories) < 2:
                return
            tables = across_runs.open_tables(directories, across_runs.EVERYTHING)
            across_runs.write_report(tables, folder)
        except UserError as error:
            print(f"note: the jobs of this sweep are not compared: {error}", file=sys.stderr)
            return
        print("\n".join(f"{table.title}\n{across_runs.text_table(table)}\n" for table in tables))
        print(f"report of the sweep: {folder / 'report.html'}")
