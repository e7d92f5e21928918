"""The notebook, executed on a small competition by a process of its own."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import nbformat

import vqa_helpers as vqa

NOTEBOOK = vqa.HERE / "Kaggle_AllInOne.ipynb"
OVERRIDES = {
    "num_epochs": 1,
    "n_folds": 2,
    "tta_rotations": 2,
    "zeroshot_rows": 32,
    "use_ema": False,
}


class NotebookRun:
    """A notebook that is being executed: few rows, one epoch, two folds."""

    folder: Path  # what the notebook writes, and `executed.ipynb`
    process: subprocess.Popen

    def __init__(self, folder: Path, data_dir: Path):
        self.folder = folder
        environment = {
            **os.environ,
            "VQA_PRESET": "demo",
            "VQA_OUTPUT_DIR": str(folder),
            "VQA_OVERRIDES": json.dumps(OVERRIDES),
            "VQA_DATA_DIR": str(data_dir),
        }
        command = [sys.executable, "-m", "nbconvert", "--to", "notebook", "--execute"]
        command += [str(NOTEBOOK), "--output-dir", str(folder), "--output", "executed.ipynb"]
        with (folder / "nbconvert.log").open("wb") as log:
            self.process = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # one group with its kernel and workers, for `stop`
            )

    def result(self) -> nbformat.NotebookNode:
        """The executed notebook, as soon as it is there."""
        status = self.process.wait(timeout=400)
        assert status == 0, (self.folder / "nbconvert.log").read_text("utf-8", "replace")
        return nbformat.read(self.folder / "executed.ipynb", as_version=4)

    def stop(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
