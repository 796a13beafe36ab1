"""mode=check_data: every scene of every split is read and counted, then some are shown with masks, names and purity."""

from typing import Any

from datasets import check
from datasets.codes import CodeScenes
from errors import UserError
from runs.progress import stage
from runs.run import Run
from show import look
from show.text import format_table
from store.index import build_dataset


def run(cfg: Any, run: Run) -> dict[str, Any]:
    """Entry of mode=check_data: `datasets.check.run`, then a contact sheet of the data sets that have label maps.

    Raises:
        UserError: as `datasets.check.run`; the sheet alone costs no check, what it cannot show is said.
    """
    counted = check.run(cfg, run, format_table)
    dataset = build_dataset(cfg, str(cfg.show.split))
    if isinstance(dataset, CodeScenes):
        return counted
    stage("contact sheet", parts=2)
    try:
        look.contact_sheet(dataset, cfg, run)
    except UserError as error:
        run.say(f"note: no contact sheet: {error}")
    return counted
