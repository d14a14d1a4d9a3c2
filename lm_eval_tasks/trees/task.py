"""The class of the tasks in this folder: lm-eval 0.4.11 looks for it only beside their files."""

from pathlib import Path

import lm_eval_tasks.task


class SubliminalTask(lm_eval_tasks.task.SubliminalTask):
    folder = Path(__file__).parent


class SampledTask(lm_eval_tasks.task.SampledTask):
    folder = Path(__file__).parent
