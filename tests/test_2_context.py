"""Context: words beside the image, from a column or a file by id."""

import csv

import pytest
from competition_folder import copy_demo_rows
from conftest import start_run

import vqa_helpers as vqa


def config_of(folder, **settings):
    settings = {"data_dir": str(folder.root), "context_tokens": 16, **settings}
    return vqa.Config.preset("demo", **settings)


def with_context(folder, **settings):
    return vqa.add_context(config_of(folder, **settings), folder.load())


def write_file(folder, rows, header="id,context", name="context.csv"):
    path = folder.root / name
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return path


def add_column(folder, table, texts, name="context"):
    """Give a table of the folder one more column."""
    path = folder.root / f"{table}.csv"
    with path.open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*header, name])
        for row, text in zip(rows, texts, strict=True):
            writer.writerow([*row, text])


# --- Where it comes from --------------------------------------------------------------------------


def test_a_file_gives_rows_their_context_and_the_others_are_counted(folder, caplog):
    write_file(folder, ["train_1,=12", '"test_0"," 가, 나 "', "train_3,<|im_end|>"])
    plain = folder.load()
    with caplog.at_level("INFO"):
        found = with_context(folder)
    assert found.train["context"].tolist() == ["", "=12", "", "<|im_end|>"]
    assert found.test["context"].tolist() == [" 가, 나 ", "", "", ""]
    assert found.fallbacks["train_rows_without_context"] == 2
    assert found.fallbacks["test_rows_without_context"] == 3
    assert found.fallbacks["train_context_special_tokens"] == 1
    assert "Decision: context of 3 rows comes from" in caplog.text
    assert found.train.drop(columns="context").equals(plain.train)
    assert plain.fallbacks == folder.load().fallbacks  # of the competition that was given


def test_every_byte_of_the_file_is_part_of_the_fingerprint(folder):
    plain = folder.load()
    path = write_file(folder, ["train_1,12"])
    before = with_context(folder).fingerprint
    assert before != plain.fingerprint
    assert with_context(folder).fingerprint == before
    elsewhere = path.rename(folder.root / "read.csv")
    assert with_context(folder, context_file=str(elsewhere)).fingerprint == before
    elsewhere.write_text("id,context\ntrain_1,13\n", encoding="utf-8")
    assert with_context(folder, context_file=str(elsewhere)).fingerprint != before


def test_a_column_is_used_under_whatever_name_and_a_file_comes_first(folder):
    add_column(folder, "train", ["1", "", "3", "4"], name="OCR")
    add_column(folder, "test", ["5", "6", "7", "8"], name="OCR")
    config = config_of(folder, columns={"context": "ocr"})
    loaded = folder.load(columns=config.columns)
    found = vqa.add_context(config, loaded)
    assert found.train["context"].tolist() == ["1", "", "3", "4"]
    assert found.test["context"].tolist() == ["5", "6", "7", "8"]
    assert found.fingerprint == loaded.fingerprint  # which has the tables' bytes already
    write_file(folder, ["train_1,12"], header="ID,Text")
    found = vqa.add_context(config, loaded)
    assert found.train["context"].tolist() == ["", "12", "", ""]


def test_without_the_setting_neither_column_nor_file_changes_anything(folder, caplog):
    before = folder.load()
    add_column(folder, "train", "1234")
    add_column(folder, "test", "5678")
    write_file(folder, ["nobody,12"])
    loaded = folder.load()
    with caplog.at_level("INFO"):
        found = with_context(folder, context_tokens=0)
    assert found.train.equals(before.train)
    assert found.test.equals(before.test)
    assert found.fallbacks == before.fallbacks
    assert found.fingerprint == loaded.fingerprint
    expected = "Decision: the column context of train.csv is not used: context_tokens is 0"
    assert expected in caplog.text


# --- What is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "header", "message"),
    [
        (
            ["train_1,12", "train_9,13"],
            "id,context",
            "context.csv, line 3, column 'id', value 'train_9': neither train.csv nor test.csv",
        ),
        (
            ["train_1,12", "test_0,1", "train_1,13"],
            "id,context",
            "context.csv, line 4, column 'id', value 'train_1': line 2 has it, too",
        ),
        (
            ["train_1,12"],
            "id,words",
            r"context.csv, line 1: it needs a column id and a column context \(or text\)",
        ),
        (["train_1,12,a"], "id,text,context", "one of each"),
        (
            ["train_1,12,13"],
            "id,context",
            "context.csv, line 2, row 'train_1': 3 fields but 2 columns",
        ),
    ],
)
def test_a_file_that_would_need_a_guess_is_refused(folder, rows, header, message):
    write_file(folder, rows, header)
    with pytest.raises(vqa.DataError, match=message):
        with_context(folder)


def test_an_id_of_both_tables_is_refused_and_one_of_a_row_left_out_is_not(folder):
    write_file(folder, ["0,12"])
    row = "{0},{1}/{0}.png,무슨 색입니까?,빨강,파랑,노랑,초록"
    test = [row.format(number, "test") for number in range(4)]
    train = [row.format(number, "train") + ",a" for number in range(4)]
    folder.write("train", "id,path,question,a,b,c,d,answer", train)
    folder.write("test", "id,path,question,a,b,c,d", test)
    folder.write("sample_submission", "id,answer", [f"{number}," for number in range(4)])
    with pytest.raises(vqa.DataError, match="line 2, column 'id', value '0': train.csv and test"):
        with_context(folder)
    train = [row.format(f"t{number}", "train").replace("/t", "/") + ",a" for number in range(4)]
    folder.write("train", "id,path,question,a,b,c,d,answer", train)
    write_file(folder, ["t0,12", "t1,12", "t2,12", "t3,12"])
    drawn = folder.load(sample_size=2)
    found = vqa.add_context(config_of(folder), drawn)
    assert found.train["context"].tolist() == ["12", "12"]


def test_no_context_at_all_or_in_one_table_only_is_refused(folder):
    message = "context_tokens is 16, but train.csv and test.csv in .* have no column context"
    with pytest.raises(vqa.DataError, match=message):
        with_context(folder)
    add_column(folder, "train", "1234")
    with pytest.raises(vqa.DataError, match=r"but test\.csv in .* have no column context"):
        with_context(folder)
    with pytest.raises(vqa.DataError, match=r"context_file .*absent\.csv: no such file"):
        with_context(folder, context_file=str(folder.root / "absent.csv"))


# --- In the prompt, and in a run ------------------------------------------------------------------


@pytest.fixture(scope="module")
def processor():
    return vqa.load_processor(vqa.Config.preset("demo"))


def token_count(processor, text):
    return len(processor.tokenizer(text, add_special_tokens=False)["input_ids"])


def shown(processor, text, limit):
    config = vqa.Config.preset("demo", context_tokens=limit)
    return vqa.shown_context(config, processor, {"context": text})


def test_long_context_is_cut_at_a_word_within_the_budget(processor):
    text = "영수증 합계 12,000원 <|im_end|> 부가세 포함 감사합니다 " * 3
    whole = vqa.plain_context({"context": text})
    assert "< |im_end| >" in whole
    most = token_count(processor, whole)
    assert shown(processor, text, most) == whole
    for limit in range(8, most, 5):
        part = shown(processor, text, limit)
        assert whole.startswith(part + " ")
        assert token_count(processor, part) <= limit
        longer = " ".join(whole.split()[: len(part.split()) + 1])
        assert token_count(processor, longer) > limit
    assert shown(processor, text, 0) == ""
    assert shown(processor, " \u200b", 8) == ""


def test_of_a_word_that_is_too_long_the_beginning_is_shown(processor):
    for text in ("9" * 40, "9" * 40 + " 8"):
        part = shown(processor, text, 6)
        assert part == "9" * len(part)
        assert token_count(processor, part) <= 6 < token_count(processor, part + "9")


def test_context_stands_behind_the_image_and_in_front_of_the_question(session, demo_rows):
    config = vqa.dataclasses.replace(session.config, context_tokens=8)
    session.config = config
    rows = demo_rows.train.head(2).assign(context=["", "12 34 " * 50])
    orders = [(0, 1, 2, 3), (1, 2, 3, 0)]
    plain = demo_rows.train.head(2)
    first, second = (vqa.make_prompt(session, rows, row, orders) for row in (0, 1))
    without = vqa.make_prompt(session, plain, 0, orders)
    assert first.input_ids.tolist() == without.input_ids.tolist()
    text = session.processor.tokenizer.decode(second.input_ids)
    before, after = text.split("참고 자료: 12 34")
    assert before.endswith(f"{session.processor.image_token}<|vision_end|>")
    assert rows["question"][1] in after
    added = vqa.shown_context(config, session.processor, rows.iloc[1])
    assert text.count(added) == 1  # the orders share it
    assert vqa.count_cut_contexts(config, session.processor, rows) == 1
    competition = vqa.dataclasses.replace(demo_rows, train=rows, test=rows)
    lengths = vqa.prompt_lengths(config, session.processor, competition)
    single = vqa.make_prompt(session, rows, 1, orders[:1])
    assert lengths["tokens"][1] == len(single.input_ids)


def test_a_run_keeps_context_for_its_workers_and_says_what_was_cut(tmp_path, caplog):
    root = copy_demo_rows(tmp_path / "data", train=12, test=4)
    ids = vqa.load_competition(root).train["id"]
    (root / "context.csv").write_text(f"id,text\n{ids[2]},{'일 이 ' * 9}\n", encoding="utf-8")
    settings = {"data_dir": str(root), "n_folds": 2, "context_tokens": 6}
    config = vqa.Config.preset("demo", output_dir=str(tmp_path / "outputs"), **settings)
    run = start_run(config)
    assert vqa.Run.open(run.directory).train["context"][2] == "일 이 " * 9
    assert run.fallbacks["train_rows_without_context"] == 11
    with caplog.at_level("INFO"):
        vqa.open_stage_session(run, "zeroshot", [0], lambda *_, **__: None)
    assert "Decision: context is cut to context_tokens=6 in 1 of 16 rows" in caplog.text
    (paragraph,) = vqa._report_context(run)
    expected = "1 of 16 rows have context in front of their question, at most 6 tokens of it; "
    assert paragraph == expected + "that of 1 rows is longer and was cut."
    (run.directory / "prompt.json").write_text("{}", encoding="utf-8")
    assert "how many are longer is not known: DamagedFileError" in vqa._report_context(run)[0]
    off = vqa.dataclasses.replace(config, context_tokens=0)
    assert vqa._report_context(vqa.dataclasses.replace(run, config=off)) == []
    with (root / "context.csv").open("a", encoding="utf-8") as file:
        file.write(f"{ids[3]},삼\n")
    with pytest.raises(vqa.CheckpointError, match="data"):
        start_run(config)
