"""Fixtures on tiny real objects, and the two markers: `gpu` and `slow` run only when -m asks."""

import atexit
import dataclasses
import functools
import gc
import logging
import os
import shutil
import sys
import tempfile
from pathlib import Path

# Before torch is imported: tiny models gain nothing from a second thread, which would spin for
# its core beside any other load.
os.environ.setdefault("OMP_NUM_THREADS", "1")
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
sys.path.append(str(ROOT / "tests" / "benchmarks"))

from competition_folder import Folder, copy_demo_rows  # noqa: E402
from machine import Machine  # noqa: E402
from notebook_run import NotebookRun  # noqa: E402
from running import quiet, run_all  # noqa: E402
from stored_models import store_in_4_bit  # noqa: E402
from twins import TINY, TWINS, build_twin  # noqa: E402

import vqa_helpers as vqa  # noqa: E402

# Temporary files, the cached vision features among them, also those of the workers of tests.
tempfile.tempdir = tempfile.mkdtemp(prefix="vqa-tests-")
os.environ["TMPDIR"] = tempfile.tempdir
atexit.register(shutil.rmtree, tempfile.tempdir, ignore_errors=True)
MARKERS = {
    "gpu": "needs a CUDA device",
    "slow": "takes long, or repeats for more models what a quick test shows for one",
}


def pytest_configure(config):
    for name, meaning in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {meaning}")


def is_marked(item):
    return any(item.get_closest_marker(name) for name in MARKERS)


def pytest_collection_modifyitems(config, items):
    """Without -m, marked tests are left out."""
    if config.getoption("-m"):
        return
    config.hook.pytest_deselected(items=[item for item in items if is_marked(item)])
    items[:] = [item for item in items if not is_marked(item)]


# --- Around every test ----------------------------------------------------------------------------


@functools.cache
def leave_libraries_to_themselves():
    """Let the garbage collector pass over all that the libraries have made; once is enough.

    clear_memory collects often, and would walk through it: a third of a second each time.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def quick_collection():
    if "peft" in sys.modules:  # the last one that is loaded
        leave_libraries_to_themselves()


@pytest.fixture(autouse=True)
def quiet_logger():
    """Take back what setup_logging did: tests do not write into each other's files or streams."""
    yield
    for handler in list(vqa.LOGGER.handlers):
        vqa.LOGGER.removeHandler(handler)
        handler.close()
    vqa.LOGGER.propagate = True
    vqa.LOGGER.setLevel(logging.NOTSET)


@pytest.fixture
def replace():
    return dataclasses.replace


# --- Competitions and machines --------------------------------------------------------------------


@pytest.fixture(scope="session")
def demo_rows() -> vqa.Competition:
    """The built-in demo competition, loaded once."""
    return vqa.load_competition(vqa.DEMO)


@pytest.fixture(scope="session")
def mini_data(tmp_path_factory) -> Path:
    """A competition folder of 36 training and 12 test rows of the demo."""
    return copy_demo_rows(tmp_path_factory.mktemp("mini"), train=36, test=12)


@pytest.fixture
def folder(tmp_path) -> Folder:
    """A little competition of four rows a split."""
    return Folder(tmp_path)


@pytest.fixture
def machine(tmp_path, monkeypatch) -> Machine:
    """A platform for the notebook's first cells, without GPUs and without a competition."""
    return Machine(tmp_path.resolve(), monkeypatch)


@pytest.fixture(scope="session", autouse=True)
def notebook_run(request, tmp_path_factory):
    """Execute the notebook on the mini competition, in the background of all other tests.

    It takes a minute, in processes of its own. Begun only where some test looks at it.
    """
    if not any("executed" in item.fixturenames for item in request.session.items):
        yield None
        return
    run = NotebookRun(tmp_path_factory.mktemp("notebook"), request.getfixturevalue("mini_data"))
    yield run
    run.stop()


# --- Models ---------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory) -> dict[str, Path]:
    """Family name -> folder of its tiny model."""
    folders = {"qwen3_vl": TINY}
    for family in TWINS:
        folders[family] = build_twin(family, tmp_path_factory.mktemp(family))
    return folders


@pytest.fixture
def open_tiny(model_folders, demo_rows):
    """Makes a session of a family's tiny model."""

    def make(family, **settings):
        config = vqa.Config.preset("demo", model_id=str(model_folders[family]), **settings)
        return vqa.open_session(config, demo_rows.train.iloc[0])

    return make


@pytest.fixture(scope="session")
def stored_double(model_folders, tmp_path_factory) -> Path:
    """The demo's model in 4 bits, as our own quantisation makes it."""
    return store_in_4_bit(model_folders["qwen3_vl"], tmp_path_factory.mktemp("double"))


@pytest.fixture
def demo_config(tmp_path) -> vqa.Config:
    return vqa.Config.preset("demo", output_dir=str(tmp_path / "outputs"), data_dir=str(vqa.DEMO))


@pytest.fixture(params=["qwen3_vl", "qwen2_5_vl"])
def session(request, model_folders, demo_rows) -> vqa.Session:
    """An open session of each family on the CPU, without smoothing: only the path matters."""
    model = str(model_folders[request.param])
    config = vqa.Config.preset("demo", model_id=model, label_smoothing=0.0)
    return vqa.open_session(config, demo_rows.train.iloc[0])


@pytest.fixture
def four_bits_on_the_cpu(monkeypatch):
    """A quantised base model also without a GPU, which `load_model` refuses."""
    import bitsandbytes

    monkeypatch.setattr(vqa, "_refuse_quantisation_without_gpu", lambda config, runtime: None)
    # By itself bitsandbytes repacks weights for this CPU as soon as they only score.
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: False)


# --- Runs -----------------------------------------------------------------------------------------


def start_run(config):
    """The run of a config, with folds of its own competition."""
    competition = vqa.load_competition(config.data_dir)
    folds = vqa.make_folds(competition.train, config.n_folds, config.seed)
    return vqa.start_run(config, competition, folds)


@pytest.fixture
def mini_run(mini_data, tmp_path):
    """Make a run on the mini competition: mini_run(num_epochs=1, ...) -> Run."""

    def make(**overrides) -> vqa.Run:
        settings = {
            "data_dir": str(mini_data),
            "output_dir": str(tmp_path / "outputs"),
            "num_epochs": 1,
            "n_folds": 2,
            "max_fallback_share": 0.5,
        }
        return start_run(vqa.Config.preset("demo", **(settings | overrides)))

    return make


@pytest.fixture(scope="session")
def finished(tmp_path_factory, mini_data) -> vqa.Run:
    """One small run, done by a real worker; tests may add reports to it, but change no scores."""
    config = vqa.Config.preset(
        "demo",
        data_dir=str(mini_data),
        output_dir=str(tmp_path_factory.mktemp("outputs")),
        num_epochs=1,
        n_folds=2,
        tta_scales=(1.0, 1.5),
        max_pixels=6 * 32 * 32,
    )
    run = start_run(config)
    vqa.launch_workers(run, [((None,), [0, 1])], ["zeroshot", "train", "predict"])
    return run


@pytest.fixture(scope="session")
def with_final(tmp_path_factory, mini_data) -> vqa.Run:
    """A run of two folds and the model on all rows, whose images and wordings change."""
    folder = tmp_path_factory.mktemp("final")
    config = vqa.Config.preset(
        "demo",
        data_dir=str(mini_data),
        output_dir=str(folder / "outputs"),
        cache_dir=str(folder / "cache"),
        num_epochs=2,
        n_folds=2,
        max_fallback_share=0.5,
        tta_rotations=2,
        final_retrain=True,
        augment_images=2,
        paraphrases=4,
    )
    run = run_all(start_run(config))
    vqa.run_stages(run, [run.final_fold], ["train", "predict"], quiet)
    return run
