"""Part 8, Workers: which devices take which folds, and what is said of a process that ended."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cards import T4
from running import adapter_file, quiet, read_logits

import vqa_helpers as vqa

CORE = vqa.CPU_CORE

# --- Who does what --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("folds", "devices", "rounds"),
    [
        ((0, 1, 2), [0], [[((0,), (0, 1, 2))]]),
        ((0, 1), [0, 1], [[((0,), (0,)), ((1,), (1,))]]),
        ((0, 1, 2), [0, 1], [[((0,), (0,)), ((1,), (1,))], [((0, 1), (2,))]]),
        ((0,), [0, 1], [[((0, 1), (0,))]]),
        ((0, 1, 2, 3, 4), [0, 1], [[((0,), (0, 2)), ((1,), (1, 3))], [((0, 1), (4,))]]),
        ((0, 1, 2), [0, 1, 2, 3], [[((0, 1, 2, 3), (0, 1, 2))]]),
        (tuple(range(9)), list(range(10)), [[((n,), (n,)) for n in range(9)]]),
        # Cores share no fold: its sums would depend on their number.
        ((0, 1, 2), [CORE, CORE], [[((CORE,), (0, 2)), ((CORE,), (1,))]]),
    ],
)
def test_no_device_is_idle_where_a_group_is_faster(folds, devices, rounds):
    """A round is a list of jobs, a job the devices that share it and the folds it has."""
    assert vqa.schedule_folds(folds, devices) == rounds


def test_without_a_gpu_a_small_model_has_a_worker_of_one_thread_for_each_fold(monkeypatch):
    without_gpu = vqa.Runtime("local", (), "fp32", "sdpa", ())
    monkeypatch.setattr(vqa, "detect_runtime", lambda *_: without_gpu)
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    assert vqa.worker_devices(vqa.Config.preset("demo")) == [CORE, CORE, CORE]
    assert vqa.worker_devices(vqa.Config.preset("demo", train_folds=(1,))) == [CORE]
    assert vqa.device_environment(CORE)["OMP_NUM_THREADS"] == "1"
    # A large one has all cores, and as many threads as the user allows.
    assert vqa.worker_devices(vqa.Config.preset("kaggle_t4x2")) == [None]
    assert vqa.device_environment(None)["OMP_NUM_THREADS"] == "8"


@pytest.mark.parametrize(
    ("available_gib", "cores", "workers"),
    [
        pytest.param(20, 2, 5, id="one for each fold, although the cores are fewer"),
        pytest.param(6, 2, 3, id="as many as fit into memory"),
        pytest.param(1, 2, 2, id="one for each core, where memory is short"),
        pytest.param(64, 16, 5, id="never more than folds"),
    ],
)
def test_workers_on_a_cpu_are_as_many_as_folds_and_memory_allow(
    available_gib, cores, workers, monkeypatch
):
    memory = SimpleNamespace(available=available_gib * 2**30)
    monkeypatch.setattr(vqa.psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(vqa, "usable_cores", lambda: cores)
    assert vqa.cpu_worker_count(5) == workers


def test_one_worker_sees_all_gpus_of_a_spread_model(monkeypatch):
    two_gpus = vqa.Runtime("kaggle", (T4, T4 | {"index": 1}), "fp16", "sdpa", ())
    monkeypatch.setattr(vqa, "detect_runtime", lambda *_: two_gpus)
    assert vqa.worker_devices(vqa.Config.preset("kaggle_t4x2")) == ["0", "1"]
    (together,) = vqa.worker_devices(vqa.Config.preset("kaggle_t4x2", spread_model=True))
    (environment,) = vqa.process_group_environments([together])
    assert environment["CUDA_VISIBLE_DEVICES"] == "0,1"
    assert "RANK" not in environment


def test_each_worker_sees_its_own_gpu(mini_run, monkeypatch):
    run = mini_run()
    seen = []

    class Process:
        def __init__(self, command, env, **_):
            seen.append((env["CUDA_VISIBLE_DEVICES"], command[command.index("--folds") + 1]))

        def poll(self):
            return 0

        wait = terminate = poll

    monkeypatch.setattr(vqa.subprocess, "Popen", Process)
    vqa.launch_workers(run, [((0,), [0, 2]), ((1,), [1])], ["train"])
    assert seen == [("0", "0,2"), ("1", "1")]


@pytest.mark.slow
def test_several_devices_share_folds_and_the_odd_one_and_predict_in_further_rounds(
    mini_run, monkeypatch
):
    run = mini_run(n_folds=3, tta_rotations=1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(vqa, "worker_devices", lambda config: [None, None])
    rounds = []
    launch = vqa.launch_workers

    def noting(run, jobs, stages):
        rounds.append((jobs, stages))
        launch(run, jobs, stages)

    monkeypatch.setattr(vqa, "launch_workers", noting)
    results = vqa.run_folds(run.config)
    assert [result.fold for result in results] == [0, 1, 2]
    a_fold_each = [((None,), (0,)), ((None,), (1,))]
    one_shared = [((None, None), (2,))]
    assert rounds == [
        (a_fold_each, ["train"]),
        (one_shared, ["train", "predict"]),
        (a_fold_each, ["predict", "base"]),
    ]
    for fold in range(3):
        for name in ("oof", "test"):
            logits = read_logits(run, fold, name)
            assert np.isfinite(logits).all()  # the parts of both processes


def test_what_a_submission_needs_is_done_on_all_folds_before_anything_else(mini_run, monkeypatch):
    run = mini_run(
        n_folds=3,
        quantization="4bit",
        score_precision="16bit",
        final_retrain=True,
    )
    launched = []
    monkeypatch.setattr(vqa, "worker_devices", lambda config: ["0", "1"])
    monkeypatch.setattr(vqa.Run, "unfinished_folds", lambda self, stage, folds: folds)

    def launch(_, jobs, stages):
        all_folds = [fold for _, folds in jobs for fold in folds]
        launched.append((all_folds, stages))

    monkeypatch.setattr(vqa, "launch_workers", launch)
    vqa.run_folds(run.config)
    assert launched == [
        ([0, 1], ["train"]),
        ([2], ["train", "predict"]),
        ([0, 1], ["predict", "base"]),
        ([0, 1], ["rescore"]),
        ([2], ["rescore"]),
        ([3], ["train", "predict", "rescore"]),
    ]


def test_on_kaggle_the_budget_runs_from_the_start_of_the_session(mini_run, monkeypatch):
    run = mini_run()
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    monkeypatch.setattr(vqa, "launch_workers", quiet)
    vqa.run_folds(run.config)
    started = json.loads((run.directory / "session.json").read_text())["started"]
    assert started == vqa.session_start() <= vqa.psutil.Process().create_time()


# --- Stopped and dead -----------------------------------------------------------------------------


def worker(run, *arguments):
    command = [
        sys.executable,
        vqa.__file__,
        "worker",
        "--run",
        str(run.directory),
        "--folds",
        "0",
        *arguments,
    ]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def wait_for(condition, process, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_worker_saves_and_ends_with_its_own_status_and_the_next_one_continues(
    mini_run, number
):
    settings = {"num_epochs": 8, "n_folds": 3, "train_folds": (0,)}
    whole = mini_run(run_name="a", **settings)
    stopped = mini_run(run_name="b", **settings)
    vqa.train_fold(whole.config, 0)
    process = worker(stopped, "--stages", "train")
    metrics = stopped.fold_dir(0) / "metrics.jsonl"
    wait_for(metrics.exists, process)
    process.send_signal(number)
    assert process.wait(60) == vqa.INTERRUPTED
    checkpoints = vqa.CheckpointManager(stopped.fold_dir(0) / "checkpoints")
    _, _, saved = checkpoints.restore(checkpoints.latest_verified())
    steps = len(metrics.read_text().splitlines())
    assert saved["epoch"] * 3 + saved["step_in_epoch"] == steps  # not one step was lost
    assert not (stopped.fold_dir(0) / "result.json").exists()
    vqa.train_fold(stopped.config, 0)
    expected = adapter_file(whole, 0, "ema").read_bytes()
    assert adapter_file(stopped, 0, "ema").read_bytes() == expected


class Ended:
    """A process that has ended."""

    def __init__(self, status):
        self.status = status

    def wait(self):
        return self.status

    terminate = wait


def test_the_notebook_says_that_an_interrupted_run_can_be_continued(mini_run, monkeypatch):
    run = mini_run()
    monkeypatch.setattr(vqa, "_show_progress", quiet)  # straight on to terminate()
    monkeypatch.setattr(vqa.subprocess, "Popen", lambda *_, **__: Ended(vqa.INTERRUPTED))
    with pytest.raises(vqa.Interrupted, match="Its work is saved: run the cell again"):
        vqa.launch_workers(run, [((None,), [0])], ["train"])


@pytest.mark.slow
def test_a_worker_that_dies_is_shown_with_its_last_lines(mini_run, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    run = mini_run(model_id="no/such-model")
    with pytest.raises(
        RuntimeError, match="(?s)A worker stopped. Run the cell again.*worker_0.log.*OSError"
    ):
        vqa.run_zeroshot(run)


# --- What is said of a process that was killed, and of its log ------------------------------------


@pytest.fixture
def quick_polls(monkeypatch):
    sleep = time.sleep
    monkeypatch.setattr(vqa.time, "sleep", lambda seconds: sleep(min(seconds, 0.02)))


@pytest.fixture
def worker_program(tmp_path, monkeypatch, quick_polls):
    """Let the workers run this code instead of the module: worker_program("print(1)")."""

    def replace_module(code):
        path = tmp_path / "worker.py"
        path.write_text(code)
        monkeypatch.setattr(vqa, "__file__", str(path))

    return replace_module


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (0, "ended with exit status 0"),
        (2, "ended with exit status 2"),
        (-6, "was killed by signal 6 (SIGABRT)"),
        (-9, "was killed by signal 9 (SIGKILL), probably out of memory: lower the batch sizes"),
        (-11, "was killed by signal 11 (SIGSEGV)"),
        (-200, "was killed by signal 200 (unknown)"),
    ],
)
def test_an_exit_status_is_put_into_words(status, words):
    assert vqa.exit_in_words(status) == words


def test_a_worker_that_the_system_kills_is_reported_as_that(mini_run, worker_program):
    worker_program(
        "import os\nprint('loading the model', flush=True)\nos.kill(os.getpid(), 9)\n",
    )
    run = mini_run()
    with pytest.raises(RuntimeError) as caught:
        vqa.launch_workers(run, [((None,), [0])], ["train"])
    first, second, third = str(caught.value).splitlines()
    assert first == "A worker stopped. Run the cell again to continue where it was."
    assert second.startswith("Worker 0 was killed by signal 9 (SIGKILL), probably out of memory")
    assert second.endswith("worker_0.log:")
    assert third == "loading the model"


def test_who_is_ended_because_of_another_one_did_not_run_out_of_memory(
    mini_run, worker_program, monkeypatch
):
    monkeypatch.setattr(vqa, "GROUP_GRACE_SECONDS", 0)
    worker_program(
        "import os, time\nif os.environ['RANK'] == '1':\n    os._exit(3)\ntime.sleep(60)\n"
    )
    with pytest.raises(RuntimeError) as caught:
        vqa.launch_workers(mini_run(), [((None, None), [0])], ["train"])
    said = str(caught.value)
    assert "Worker 0 was ended, because another one of its group had stopped." in said
    assert "Worker 1 ended with exit status 3." in said
    assert "memory" not in said


BAR = "\rLoading weights:   0%|          | 0/97 [00:00<?, ?it/s]\rLoading weights: 100%|##| 97/97\n"
PYTHON_WARNING = (
    "/venv/lib/python3.11/site-packages/transformers/modeling_utils.py:3312: FutureWarning: "
    "`is_gradient_checkpointing` is deprecated and will be removed in v6.\n"
    "  warnings.warn(\n"
)
NO_KERNELS = "Failed to load CPU gemm_4bit_forward from kernels-community: No module named 'k'.\n"
NO_TOKEN = "Warning: You are sending unauthenticated requests to the HF Hub. Set a HF_TOKEN\n"
FORKED = (
    "huggingface/tokenizers: The current process just got forked, after parallelism has been "
    "used. Disabling parallelism to avoid deadlocks...\n"
    "To disable this warning, you can either:\n"
    "\t- Avoid using `tokenizers` before the fork if possible\n"
    "\t- Explicitly set the environment variable TOKENIZERS_PARALLELISM=(true | false)\n"
)
HARMLESS = {
    "progress bar": BAR,
    "Python's warning": PYTHON_WARNING,
    "kernels": NO_KERNELS,
    "no token": NO_TOKEN,
    "dtype": "[transformers] `torch_dtype` is deprecated! Use `dtype` instead!\n",
    "fork": FORKED,
    "process group": "[rank0]:[W1128 18:00:00] Warning: destroy_process_group() was not called\n",
}


@pytest.mark.parametrize("harmless", HARMLESS.values(), ids=HARMLESS)
def test_the_end_of_a_log_is_without_what_every_worker_writes(harmless):
    log = f"12:00:00 INFO model loaded\n{harmless}ValueError: row 7\n{harmless}"
    assert vqa.log_tail(log) == "12:00:00 INFO model loaded\nValueError: row 7"


@pytest.mark.parametrize(
    "line",
    [
        "UserWarning: the loss is not finite",
        "12:00:00 WARNING 40 % of the rows were left out",
        "RuntimeError: CUDA error: device-side assert triggered",
    ],
)
def test_the_end_of_a_log_keeps_what_may_be_the_cause(line):
    assert vqa.log_tail(f"{BAR}{line}\n") == line


def test_the_end_of_a_log_has_25_lines_that_say_something():
    log = "".join(f"line {number}\n\n{PYTHON_WARNING}" for number in range(100))
    assert vqa.log_tail(log).splitlines() == [f"line {number}" for number in range(75, 100)]


@pytest.mark.parametrize(
    ("hours_ago", "said"),
    [
        (1, "INFO Time budget: 10 hours left"),
        (10.5, "INFO Time budget: 30 minutes left"),
        (11.5, "WARNING The time budget ended 30 minutes ago: folds that are not trained yet get"),
    ],
)
def test_the_start_says_how_much_time_is_left_and_what_to_do_without_any(
    mini_run, monkeypatch, caplog, hours_ago, said
):
    run = mini_run(time_budget_hours=11)
    started = time.time() - 3600 * hours_ago
    monkeypatch.setattr(vqa, "session_start", lambda: started)
    caplog.set_level("INFO")
    caplog.clear()
    vqa.note_start(run)
    (record,) = caplog.records
    assert f"{record.levelname} {record.getMessage()}".startswith(said)


def test_a_model_that_arrives_late_has_a_line_beside_the_workers_own(tmp_path, monkeypatch, capsys):
    for name in ("HF_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    blobs = tmp_path / "hub" / "models--some--base" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / "a.incomplete").write_bytes(b"x" * 20_000_000)
    config = vqa.Config(score_precision="16bit", score_model_id="some/base")
    run = SimpleNamespace(config=config, directory=tmp_path)
    progress = '{"stage": "predict", "done": 1, "total": 2}'
    vqa._progress_path(run, 0).write_text(progress)
    ended = SimpleNamespace(poll=lambda: 0)
    vqa._show_progress(run, [[ended]], lambda: False, [])
    shown = capsys.readouterr().out
    assert "worker 0 predict:  50%" in shown
    assert shown.endswith(" | downloading some/base: 0.02 GB, 0.0 MB/s")


# --- One process for all that a model does --------------------------------------------------------


def loads(run):
    """How often each worker of the run has loaded the model, by its log."""
    counts = []
    for log in sorted(run.directory.glob("worker_*.log")):
        counts.append(log.read_text().count("model loaded:"))
    return counts


@pytest.fixture
def one_thread():
    """As a worker on a CPU core has it: sums depend on their order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_a_worker_scores_with_the_model_that_it_has_trained_with(mini_run, monkeypatch, one_thread):
    """Its files are those of processes that load the model anew for each stage."""
    monkeypatch.setattr(vqa, "worker_devices", lambda config: [CORE, CORE])
    settings = {"tta_rotations": 2, "use_base_member": "on"}
    anew = mini_run(run_name="anew", **settings)
    for stage in ("train", "predict", "base"):
        vqa.run_stages(anew, [0, 1], [stage], quiet)
    kept = mini_run(run_name="kept", **settings)
    vqa.run_folds(kept.config)
    assert loads(kept) == [1, 1]
    for path in sorted(anew.directory.glob("fold_*/*.npz")):
        name = path.relative_to(anew.directory)
        assert (kept.directory / name).read_bytes() == path.read_bytes(), name
    assert not list(kept.directory.glob("progress_*.waiting"))


WAITING_OR_BROKEN = """
import os, pathlib, signal, sys
sys.path.insert(0, {folder!r})
import vqa_helpers as vqa
name = sys.argv[sys.argv.index("--name") + 1]
directory = pathlib.Path(sys.argv[sys.argv.index("--run") + 1])
assert "--wait" in sys.argv
if name == "0" and {fault!r} == "fails":
    sys.exit("no such row")
if name == "0" and {fault!r} == "is killed":
    vqa._waiting_path(directory, name, os.getppid()).touch()  # at the end of its training
    os.kill(os.getpid(), signal.SIGKILL)
progress = vqa.ProgressFile(directory / f"progress_{{name}}.json")
signal.signal(signal.SIGTERM, progress.request_stop)
try:
    vqa.wait_for_other_workers(directory, name, progress.update)
except vqa.Interrupted:
    (directory / f"{{name}} has saved").touch()
    sys.exit(vqa.INTERRUPTED)
(directory / f"{{name}} goes on").touch()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("", ""),
        ("fails", "(?s)Worker 0 ended with exit status 1.*no such row"),
        ("is killed", "Worker 0 was killed by signal 9"),
    ],
)
def test_workers_wait_for_each_other_and_not_for_one_that_is_gone(
    mini_run, worker_program, fault, message
):
    run = mini_run()
    worker_program(WAITING_OR_BROKEN.format(folder=str(vqa.HERE), fault=fault))
    jobs = [((CORE,), (0,)), ((CORE,), (1,))]
    left_behind = ["0 goes on", "1 goes on"]
    failure = contextlib.nullcontext()
    if fault:
        left_behind = ["1 has saved"]
        failure = pytest.raises(RuntimeError, match=message)
    with failure:
        vqa.launch_workers(run, jobs, ["train", "predict"])
    assert sorted(path.name for path in run.directory.glob("? *")) == left_behind
    assert not list(run.directory.glob("progress_*.waiting"))


def test_a_worker_that_waits_ends_with_the_notebook(tmp_path):
    progress = vqa.ProgressFile(tmp_path / "progress_0.json", parent=os.getpid())  # not its parent
    with pytest.raises(vqa.Interrupted, match="the end of the notebook's process"):
        vqa.wait_for_other_workers(tmp_path, "0", progress.update)
    assert not list(tmp_path.glob("*.waiting"))


def test_a_second_notebook_does_not_let_waiting_workers_go_on(mini_run, worker_program):
    """It finds the folds locked; the first one's worker, here a thread, waits as before."""
    run = mini_run()
    looks = []

    def progress(*_):
        looks.append(time.monotonic())
        if ended and ended[0] < looks[-2]:
            raise vqa.Interrupted

    ended = []
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(vqa.wait_for_other_workers, run.directory, "0", progress)
        worker_program("raise SystemExit('another process is working on fold 0')")
        with pytest.raises(RuntimeError, match="another process is working on fold 0"):
            vqa.launch_workers(run, [((CORE,), (0,))], ["train"])
        ended.append(time.monotonic())
        with pytest.raises(vqa.Interrupted):
            waiting.result(10)
    assert not list(run.directory.glob("progress_*.waiting"))
