"""The notebook runs from top to bottom on the demo, and keeps its own rules."""

import ast
import json
import os
import re
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from nbclient import NotebookClient
from packaging.requirements import Requirement

import vqa_helpers as vqa

NOTEBOOK = vqa.HERE / "Kaggle_AllInOne.ipynb"


@pytest.fixture(scope="module")
def executed(tmp_path_factory, mini_data):
    """The notebook after a small run: few rows, one epoch, two folds; and its output folder."""
    folder = tmp_path_factory.mktemp("notebook")
    overrides = {
        "num_epochs": 1,
        "n_folds": 2,
        "tta_rotations": 2,
        "zeroshot_rows": 32,
        "use_ema": False,
    }
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    names = {
        "VQA_PRESET": "demo",
        "VQA_OUTPUT_DIR": str(folder),
        "VQA_OVERRIDES": json.dumps(overrides),
    }
    names |= {"VQA_DATA_DIR": str(mini_data)}
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    try:
        NotebookClient(
            notebook, timeout=400, resources={"metadata": {"path": str(vqa.HERE)}}
        ).execute()
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    return notebook, folder


def outputs(notebook, kind):
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [
        output["data"][kind]
        for cell in cells
        for output in cell.outputs
        if kind in output.get("data", {})
    ]


def test_the_notebook_writes_everything_it_promises(executed, mini_data):
    _, folder = executed
    (run,) = folder.glob("demo-*")
    sample = pd.read_csv(mini_data / "sample_submission.csv", dtype=str, keep_default_na=False)
    for name in ("single", "ensemble"):
        checked = vqa.validate_submission(run / f"submission_{name}.csv", sample)
        assert sum(checked["letters"].values()) == len(sample)
    report = (run / "report.md").read_text(encoding="utf-8")
    for name in ("learning_curves", "reliability", "ladder", "errors"):
        assert (run / "figures" / f"{name}.png").stat().st_size > 5000
        assert f"figures/{name}.png" in report
    assert pd.read_csv(folder / "experiments.csv")["run"].tolist() == [run.name]


def test_the_notebook_shows_figures_korean_questions_and_no_error(executed):
    notebook, _ = executed
    assert len(outputs(notebook, "image/png")) >= 7
    pages = "".join(outputs(notebook, "text/html"))
    assert re.search("[가-힣]{2}.*<img|<img.*[가-힣]{2}", pages)
    streams = [
        out.text
        for cell in notebook.cells
        for out in cell.get("outputs", ())
        if out.output_type == "stream"
    ]
    assert not any("Traceback" in text or "Warning" in text for text in streams)


def test_the_notebook_says_why_it_runs_that_preset_and_what_memory_is_computed(executed):
    notebook, _ = executed
    streams = [
        out.text
        for cell in notebook.cells
        for out in cell.get("outputs", ())
        if out.output_type == "stream"
    ]
    assert any("preset demo: chosen by name" in text for text in streams)
    (table,) = [
        page for page in outputs(notebook, "text/html") if "memory of one training pass" in page
    ]
    assert "computed GiB" in table and "measured GiB" in table and "NaN" not in table


def test_the_notebook_process_never_initialises_cuda_or_loads_the_model(executed):
    """`load_model` and everything on a GPU belong to workers."""
    source = "\n".join(cell.source for cell in executed[0].cells if cell.cell_type == "code")
    source = re.sub(r"^%.*$", "", source, flags=re.M)
    called = {
        node.func.attr
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and hasattr(node.func, "attr")
    }
    assert not called & {
        "load_model",
        "open_session",
        "train_fold",
        "predict_logits",
        "seed_everything",
        "cuda",
    }


def test_cells_are_small_define_nothing_and_have_a_sentence_before_them():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    for index, cell in enumerate(cells):
        source = "".join(cell["source"])
        if cell["cell_type"] != "code":
            continue
        assert source.count("\n") < 16 and not re.search(r"^(def|class) ", source, re.M), index
        assert cells[index - 1]["cell_type"] == "markdown" and not cell["outputs"], index
    assert sum("parameters" in cell["metadata"].get("tags", []) for cell in cells) == 1


def test_notebook_and_module_have_one_version():
    assert f'"{vqa.__version__}"' in NOTEBOOK.read_text(encoding="utf-8").replace('\\"', '"')


def test_requirements_ask_for_the_notebooks_own_minimum_versions():
    lines = (vqa.HERE / "requirements.txt").read_text().splitlines()
    wanted = {
        Requirement(line).name: Requirement(line).specifier
        for line in lines
        if line and line[0] != "#"
    }
    for name, version in vqa.MINIMUM_VERSIONS.items():
        assert str(wanted[name]) == f">={version}"


def test_missing_and_old_packages_are_named():
    minimum = {"pandas": "1.0", "transformers": "999.0", "no-such-package": "1.2"}
    assert vqa.missing_requirements(minimum) == ["transformers>=999.0", "no-such-package>=1.2"]


def test_readme_and_ci_run_the_same_two_commands():
    readme = (vqa.HERE / "README.md").read_text(encoding="utf-8")
    script = (vqa.HERE / ".ci" / "run").read_text(encoding="utf-8")
    commands = [
        line
        for line in readme.splitlines()
        if line.startswith("pip install -r requirements.txt && ")
    ]
    assert len(commands) == 2
    for command in commands:
        assert command.removeprefix("pip install -r requirements.txt && ") in script


def test_top_level_holds_nothing_but_the_agreed_files():
    allowed = {
        "Kaggle_AllInOne.ipynb",
        "vqa_helpers.py",
        "requirements.txt",
        "tests",
        "data",
        "README.md",
        "outputs",
    }
    assert {path.name for path in Path(vqa.HERE).iterdir() if path.name[0] not in "._"} <= allowed
