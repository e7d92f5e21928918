"""Part 8, Transcripts: what the base model reads in the images, as context."""

import dataclasses
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from running import quiet, raising, work_in_this_process

import vqa_helpers as vqa


@pytest.fixture
def config(mini_data, tmp_path):
    settings = {"data_dir": str(mini_data), "output_dir": str(tmp_path / "outputs")}
    return vqa.Config.preset("demo", max_fallback_share=0.5, infer_batch_size=4, **settings)


@pytest.fixture
def in_this_process(monkeypatch):
    """Read images without a worker; a list of how many times that was begun."""
    return work_in_this_process(monkeypatch, "transcribe", vqa.fill_transcripts)


@pytest.fixture
def fake_reading(monkeypatch):
    """Let the model read each image's name; the list of batches that were read."""
    batches = []

    def read(session, images):
        names = [Path(path).stem for path in images["image_path"]]
        batches.append(names)
        return names

    monkeypatch.setattr(vqa, "read_images", read)
    monkeypatch.setattr(vqa, "open_session", lambda config, _: SessionOf(config))
    return batches


class SessionOf:
    """What planning batches needs of a session."""

    def __init__(self, config):
        self.processor = vqa.load_processor(config)


def read_by_the_model_alone(session, path):
    """The text by transformers' own generation, of one image without padding."""
    processor = session.processor
    budget = vqa.pixel_budget(session.config, processor)
    pixels, grid = vqa.prepare_image(vqa.load_image(path), processor, budget)
    ids = vqa.encode_prompt(processor, vqa.transcript_messages(path), grid)
    input_ids = torch.from_numpy(ids)[None]
    inputs = session.family.images.model_inputs(processor.image_token_id, input_ids, [grid])
    limit = vqa.TRANSCRIPT_TOKENS
    with torch.inference_mode():
        written = session.model.generate(
            input_ids=input_ids,
            pixel_values=pixels,
            do_sample=False,
            max_new_tokens=limit,
            **inputs,
        )
    text = processor.tokenizer.decode(written[0, len(ids) :], skip_special_tokens=True)
    return vqa.prompt_text(text)


def check_a_batch(session, demo_rows, monkeypatch):
    monkeypatch.setattr(vqa, "TRANSCRIPT_TOKENS", 12)
    special = session.processor.tokenizer.all_special_ids  # a random model writes little else
    session.model.generation_config.suppress_tokens = special
    generate = session.model.generate
    written = []

    def recorded(**inputs):
        ids = generate(**inputs)
        written.append(ids[:, inputs["input_ids"].shape[1] :].tolist())
        return ids

    monkeypatch.setattr(session.model, "generate", recorded)
    images = demo_rows.train.sort_values("width").iloc[[0, 200, 559]]
    found = vqa.read_images(session, images)
    assert found == [read_by_the_model_alone(session, path) for path in images["image_path"]]
    in_a_batch, *alone = written
    assert in_a_batch == [ids for (ids,) in alone]
    assert {len(ids) for ids in in_a_batch} == {12}


def test_a_batch_is_read_as_the_model_reads_each_image_alone(session, demo_rows, monkeypatch):
    check_a_batch(session, demo_rows, monkeypatch)


def test_a_batch_that_does_not_fit_into_memory_is_read_in_halves(monkeypatch):
    session = None  # nothing is read
    monkeypatch.setattr(vqa, "clear_memory", quiet)
    sizes = []

    def read(session, images):
        sizes.append(len(images))
        if len(images) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return images["image_path"].tolist()

    monkeypatch.setattr(vqa, "_read_batch", read)
    images = pd.DataFrame({"image_path": list("abcde")})
    assert vqa.read_images(session, images) == list("abcde")
    assert sizes == [5, 2, 3, 1, 2]
    monkeypatch.setattr(vqa, "_read_batch", raising(torch.OutOfMemoryError("out of memory")))
    with pytest.raises(RuntimeError, match="Out of GPU memory with one question"):
        vqa.read_images(session, images)


def test_each_image_is_read_once_and_the_file_is_context_for_a_run(
    config, mini_run, mini_data, in_this_process, fake_reading
):
    path = vqa.transcribe_images(config)
    competition = vqa.load_competition(mini_data, 0.5)
    rows = pd.concat([competition.train, competition.test])
    of_type = rows[rows["type"] == "ocr"]
    written = pd.read_csv(path, dtype=str)
    assert written["id"].tolist() == of_type["id"].tolist()
    assert written["context"].tolist() == [Path(path).stem for path in of_type["image_path"]]
    read = [name for batch in fake_reading for name in batch]
    assert len(read) == of_type["pixel_hash"].nunique()
    assert {len(batch) for batch in fake_reading[:-1]} == {4}

    run = mini_run(context_tokens=8, context_file=str(path), infer_batch_size=2)
    shown = run.train.set_index("id")["context"]
    assert (shown[of_type["id"][: len(shown)].loc[lambda ids: ids.isin(shown.index)]] != "").all()
    assert run.fallbacks["train_rows_without_context"] == (run.train["type"] != "ocr").sum()

    again = vqa.transcribe_images(run, ("ocr", "counting"))  # the same images, and some more
    assert again == path
    more = rows[rows["type"].isin(["ocr", "counting"])]
    assert pd.read_csv(path, dtype=str)["id"].tolist() == more["id"].tolist()
    read = [name for batch in fake_reading for name in batch]
    assert len(read) == more["pixel_hash"].nunique()
    vqa.transcribe_images(run, ("ocr", "counting"))
    assert len(in_this_process) == 2  # nothing is left to read, and no process is started


def test_after_a_kill_the_file_is_the_same(config, in_this_process, fake_reading, monkeypatch):
    whole = vqa.transcribe_images(config, vqa.QUESTION_TYPES)
    before = whole.read_bytes()
    batches = list(fake_reading)
    texts = whole.with_name("texts.jsonl")
    kept = texts.read_bytes()[: len(texts.read_bytes()) // 2]  # a kill while it was written
    assert not kept.endswith(b"\n")
    whole.unlink()
    texts.write_bytes(kept)
    fake_reading.clear()
    assert vqa.transcribe_images(config, vqa.QUESTION_TYPES).read_bytes() == before
    assert fake_reading == batches[-len(fake_reading) :]
    assert 0 < len(fake_reading) < len(batches)


def test_other_pixels_are_another_folder(config, in_this_process, fake_reading):
    first = vqa.transcribe_images(config)
    fewer = dataclasses.replace(config, max_pixels=4 * 32 * 32)
    assert vqa.transcribe_images(fewer).parent != first.parent
    other_batches = dataclasses.replace(config, infer_batch_size=2, num_epochs=1)
    assert vqa.transcribe_images(other_batches) == first


def test_what_cannot_be_transcribed_is_refused(config, monkeypatch):
    with pytest.raises(ValueError, match="Unknown question type 'orc'; did you mean 'ocr'"):
        vqa.transcribe_images(config, ("orc",))
    competition = vqa.load_competition(config.data_dir, 0.5)
    other = dataclasses.replace(competition, test=competition.test.assign(type="general"))
    train = other.train[other.train["type"] != "ocr"]
    other = dataclasses.replace(other, train=train)
    monkeypatch.setattr(vqa, "load_competition", lambda *_: other)
    with pytest.raises(vqa.DataError, match="no row has a question of the types ocr"):
        vqa.transcribe_images(config)
    ids = competition.train["id"].head(len(competition.test)).to_numpy()
    shared = dataclasses.replace(competition, test=competition.test.assign(id=ids))
    monkeypatch.setattr(vqa, "load_competition", lambda *_: shared)
    with pytest.raises(vqa.DataError, match="train.csv and test.csv share 12 ids, such as 'train_"):
        vqa.transcribe_images(config)


# --- In a process of its own ----------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_vl_moe", "qwen3_5", "internvl"])
def test_a_batch_of_other_families_is_read_as_each_image_alone(
    family, model_folders, demo_rows, monkeypatch
):
    model = str(model_folders[family])
    config = vqa.Config.preset("demo", model_id=model, loss="vocabulary")
    session = vqa.open_session(config, demo_rows.train.iloc[0])
    check_a_batch(session, demo_rows, monkeypatch)


@pytest.mark.slow
def test_a_worker_reads_and_goes_on_after_a_kill_to_the_same_file(config):
    whole = vqa.transcribe_images(config, vqa.QUESTION_TYPES)
    before = whole.read_bytes()
    texts = whole.with_name("texts.jsonl")
    settings = json.loads(whole.with_name("config.json").read_text(encoding="utf-8"))
    assert settings["loss"] == "vocabulary"
    read = texts.read_text(encoding="utf-8").splitlines()
    texts.unlink()
    whole.unlink()
    command = [sys.executable, vqa.__file__, "transcribe", "--folder", str(whole.parent)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while not texts.exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(texts.read_text(encoding="utf-8").splitlines()) < len(read)
    assert vqa.transcribe_images(config, vqa.QUESTION_TYPES).read_bytes() == before


@pytest.mark.slow
def test_the_end_of_the_log_is_shown_where_the_worker_fails(config, monkeypatch):
    start_worker = vqa.run_side_process

    def without_images(command, doing, config, folder, device):
        images = vqa.read_table(folder / "images.csv").assign(image_path="gone.png")
        vqa.write_table(images, folder / "images.csv")
        start_worker(command, doing, config, folder, device)

    monkeypatch.setattr(vqa, "run_side_process", without_images)
    with pytest.raises(
        RuntimeError, match=r"Reading images stopped[^~]*exit status 1[^~]*gone.png"
    ):
        vqa.transcribe_images(config)
