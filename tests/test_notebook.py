"""The notebook runs from top to bottom on the demo, keeps its own rules, and finds its module."""

import ast
import json
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pandas as pd
import pytest
from machine import COLAB, DRIVE, FIND, IMPORT
from notebook_run import NOTEBOOK

import vqa_helpers as vqa


@pytest.fixture(scope="module")
def executed(notebook_run):
    """The notebook after a small run, and its output folder."""
    return notebook_run.result(), notebook_run.folder


def outputs(notebook):
    """What the cells have shown and printed, in order."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [output for cell in cells for output in cell.outputs]


def shown(notebook, kind):
    """The outputs of this media type."""
    all_data = [output.get("data", {}) for output in outputs(notebook)]
    return [data[kind] for data in all_data if kind in data]


def printed(notebook):
    return [output.text for output in outputs(notebook) if output.output_type == "stream"]


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
    pages = "".join(shown(notebook, "text/html"))
    assert len(re.findall(r'<img alt="[^"]{5,}" src="data:image/png', pages)) >= 7
    assert re.search("[가-힣]{2}.*<img|<img.*[가-힣]{2}", pages)
    for text in printed(notebook):
        assert "Traceback" not in text
        assert "Warning" not in text


def test_every_image_of_the_notebook_has_a_text_in_its_place(executed):
    notebook, _ = executed
    pages = "".join(shown(notebook, "text/html"))
    assert pages.count("<img ") == pages.count("<img alt=")
    assert not shown(notebook, "image/png")


def test_the_notebook_shows_the_verdict_and_only_the_settings_that_differ(executed):
    notebook, _ = executed
    pages = shown(notebook, "text/html")
    assert any("Accuracy to expect on the leaderboard" in page for page in pages)
    (settings,) = [page for page in pages if "<details>" in page and "num_epochs" in page]
    above, folded = settings.split("<details>")
    assert "num_epochs" in above
    assert "weight_decay" not in above
    assert "weight_decay" in folded


def test_the_notebook_says_whether_anything_was_learned_before_its_curves(executed):
    notebook, _ = executed
    pages = shown(notebook, "text/html")
    boxes = [page for page in pages if page.startswith('<div style="border-left:10px')]
    learned, verdict = boxes
    assert "The model has learned" in learned or "Training " in learned
    assert "Accuracy to expect on the leaderboard" in verdict
    if "Alarm" in learned:
        alarm = learned.split("<br>")[1].removesuffix("</div>")
        assert f"<li>{alarm}</li>" in verdict
    (curves,) = [page for page in pages if 'alt="Training loss' in page]
    assert pages.index(learned) < pages.index(curves) < pages.index(verdict)


def test_the_notebook_counts_copies_as_the_file_lists_them(executed):
    notebook, folder = executed
    (file,) = folder.glob("demo-*/tables/copies.csv")
    sentence = vqa.describe_copies(vqa.count_copies(pd.read_csv(file)))
    assert any(sentence in text for text in printed(notebook))


def test_the_notebook_says_why_it_runs_that_preset_and_what_memory_is_computed(executed):
    notebook, _ = executed
    assert any("preset demo: chosen by name" in text for text in printed(notebook))
    pages = shown(notebook, "text/html")
    (table,) = [page for page in pages if "memory of one training pass" in page]
    assert "computed GiB" in table
    assert "measured GiB" in table
    assert "NaN" not in table


def test_the_notebook_process_never_initialises_cuda_or_loads_the_model(executed):
    """`load_model` and everything on a GPU belong to workers."""
    notebook, _ = executed
    source = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    source = re.sub(r"^%.*$", "", source, flags=re.M)
    calls = [node.func for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    called = {function.attr for function in calls if isinstance(function, ast.Attribute)}
    of_workers = {
        "load_model",
        "open_session",
        "train_fold",
        "predict_logits",
        "seed_everything",
        "cuda",
    }
    assert not called & of_workers


def test_cells_are_small_define_nothing_and_have_a_sentence_before_them():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    for index, cell in enumerate(cells):
        if cell["cell_type"] != "code":
            continue
        source = "".join(cell["source"])
        assert source.count("\n") < 16, index
        assert not re.search(r"^(def|class) ", source, re.M), index
        assert cells[index - 1]["cell_type"] == "markdown", index
        assert not cell["outputs"], index
    tags = [tag for cell in cells for tag in cell["metadata"].get("tags", [])]
    assert tags.count("parameters") == 1


# --- Its first cells ------------------------------------------------------------------------------


HELPER_FOLDERS = {
    "beside the notebook": "kaggle/working",
    "dataset": "kaggle/input/vqa-helpers",
    "dataset with its owner": "kaggle/input/datasets/me/vqa-helpers",
    "zipped project as a dataset": "kaggle/input/vqa-project/project",
    "zipped project, two folders deeper": (
        "kaggle/input/datasets/me/vqa-project/project-main/project"
    ),
    "utility script": "kaggle/usr/lib/notebooks/me/vqa-helpers",
    "uploaded to Colab": "content",
    "Colab clone": "content/vqa-project",
    "Drive": "content/drive/MyDrive",
    "folder on Drive": "content/drive/MyDrive/vqa-project",
}


@pytest.mark.parametrize("folder", HELPER_FOLDERS.values(), ids=HELPER_FOLDERS)
def test_the_helper_is_found_and_named(machine, capsys, folder):
    path = machine.helper(folder)
    assert machine.run(FIND, IMPORT).vqa.__file__ == str(path)
    assert capsys.readouterr().out == f"vqa_helpers {vqa.__version__}: {path}\n"


def test_without_a_helper_the_error_says_where_it_looked_and_what_to_do(machine):
    with pytest.raises(FileNotFoundError) as caught:
        machine.run(FIND)
    message = str(caught.value)
    assert str(Path.cwd()) in message
    assert "/kaggle/input/*/'" in message
    assert "/kaggle/usr/lib/notebooks/*/*/'" in message
    assert "/content/drive/MyDrive/*/'" in message
    assert message.endswith("upload it, or Add Input on Kaggle")


def test_stale_helpers_are_all_named_with_their_versions(machine):
    first = machine.helper(version="0.0.7")
    second = machine.helper("kaggle/input/old", version="0.0.8")
    with pytest.raises(ImportError) as caught:
        machine.run(FIND, IMPORT)
    message = str(caught.value)
    assert f"{vqa.__version__} is needed" in message
    assert f"{first} is 0.0.7, {second} is 0.0.8" in message
    assert "update it there" in message


def test_the_right_version_wins_over_a_stale_copy_before_it(machine):
    machine.helper(version="0.0.7")
    path = machine.helper("kaggle/input/datasets/me/vqa-helpers")
    machine.helper("kaggle/usr/lib/notebooks/me/vqa-helpers")
    assert machine.run(FIND, IMPORT).vqa.__file__ == str(path)


def test_a_copy_loaded_earlier_in_the_session_is_replaced(machine):
    machine.monkeypatch.setitem(sys.modules, "vqa_helpers", ModuleType("vqa_helpers"))
    path = machine.helper("content")
    assert machine.run(FIND, IMPORT).vqa.__file__ == str(path)


@pytest.mark.parametrize(
    ("asked", "mounted"),
    [
        ({}, []),
        ({"VQA_MOUNT_DRIVE": "1"}, ["/content/drive"]),
    ],
)
def test_drive_is_mounted_only_when_asked(machine, asked, mounted):
    calls = []
    colab = ModuleType("google.colab")
    colab.drive = SimpleNamespace(mount=calls.append)
    machine.monkeypatch.setitem(sys.modules, "google.colab", colab)
    machine.monkeypatch.setitem(sys.modules, "google", ModuleType("google"))
    machine.environment(**COLAB, **asked)
    machine.run(DRIVE)
    assert calls == [f"{machine.root}{place}" for place in mounted]


def test_the_notebook_says_how_even_the_folds_are(executed):
    notebook, _ = executed
    said = [text for text in printed(notebook) if "olds are " in text]
    (balance,) = [line for text in said for line in text.splitlines() if "olds are " in line]
    assert balance.startswith("Folds are even: they differ most in ")
