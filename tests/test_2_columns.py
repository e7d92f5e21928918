"""Part 2, Columns: other names are understood where one reading is possible, else refused.

Most cases are data in cases/column_names.toml; what they mean is said in small_competition.py.
"""

import logging

import pytest
from small_competition import R1, T1, T2, read_cases, table, write

import vqa_helpers as vqa

HEADER = "id,path,Frage,a,b,c,d,answer"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("changes", "outcome"), read_cases("column_names"))
def test_a_header_is_understood_or_refused_by_name(tmp_path, changes, outcome):
    outcome.check(write(tmp_path / "data", changes))


def test_each_mapping_separator_and_unused_column_is_logged(tmp_path, caplog):
    header = "id|img_path|question|a|b|c|d|answer|width"
    row = R1.replace(",", "|") + "|16"
    root = write(tmp_path / "data", table("train", row, header=header))
    with caplog.at_level(logging.INFO, logger="vqa"):
        vqa.load_competition(root)
    assert "train.csv: its columns are separated by a pipe" in caplog.messages
    assert "train.csv: column 'img_path' is read as path" in caplog.messages
    assert "train.csv: columns that are not used: ['width']" in caplog.messages


def test_that_submissions_are_separated_by_commas_all_the_same_is_a_warning(tmp_path, caplog):
    sample = table("sample_submission", "t1;", "t2;", header="id;answer")
    loaded = vqa.load_competition(write(tmp_path / "data", sample))
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert warnings == ["Submissions are separated by commas, unlike sample_submission.csv"]
    vqa.make_submission(loaded.sample, {"t1": "a", "t2": "b"}, tmp_path / "submission.csv")
    assert (tmp_path / "submission.csv").read_text() == "id,answer\nt1,a\nt2,b\n"


# --- The setting columns --------------------------------------------------------------------------


def test_the_setting_names_a_column_and_is_part_of_the_fingerprint(tmp_path, caplog):
    header = "id,path,Frage,a,b,c,d,answer,question"
    root = write(tmp_path / "data", table("train", f"{R1},무엇입니까?", header=header))
    plain = vqa.load_competition(root)
    assert plain.train["question"].tolist() == ["무엇입니까?"]
    with caplog.at_level(logging.INFO, logger="vqa"):
        loaded = vqa.load_competition(root, columns={"question": "frage"})
    assert loaded.train["question"].tolist() == ["무슨 색입니까?"]
    assert loaded.fingerprint != plain.fingerprint
    assert vqa.load_competition(root, columns={}).fingerprint == plain.fingerprint
    assert "train.csv: column 'Frage' is read as question" in caplog.messages
    # The test file has no such column: it is read as it would be, and that is said.
    text = "test.csv: no column 'frage', as the setting columns has it; 'question' is read as"
    assert f"{text} question" in caplog.messages


def test_the_setting_decides_between_two_columns(tmp_path):
    header = "id,img,question,a,b,c,d,answer,image_path"
    row = R1.replace("train/1.png", "somewhere") + ",train/1.png"
    root = write(tmp_path / "data", table("train", row, header=header))
    loaded = vqa.load_competition(root, columns={"path": "image_path"})
    assert loaded.train["image_path"].tolist() == [str(root.resolve() / "train" / "1.png")]
    assert loaded.fallbacks["columns_under_other_names"] == 0


def test_the_setting_may_name_the_columns_of_the_sample(tmp_path):
    changes = table("sample_submission", "t1,", "t2,", header="Nr,answer")
    changes |= table("test", T1, T2, header="Nr,path,question,a,b,c,d")
    changes |= table("train", R1, header="Nr,path,question,a,b,c,d,answer")
    root = write(tmp_path / "data", changes)
    with pytest.raises(vqa.DataError, match=r"train.csv, line 1: columns \['id'\] are missing"):
        vqa.load_competition(root)
    loaded = vqa.load_competition(root, columns={"id": "Nr"})
    assert loaded.sample.columns.tolist() == ["Nr", "answer"]


def test_a_column_that_looks_like_a_fifth_choice_may_be_named_by_the_setting(tmp_path):
    header = "id,e,question,a,b,c,d,answer"
    root = write(tmp_path / "data", table("train", R1, header=header))
    with pytest.raises(vqa.DataError, match="column 'e' is a fifth choice"):
        vqa.load_competition(root)
    assert vqa.load_competition(root, columns={"path": "e"}).train["width"].tolist() == [16]


BAD_SETTINGS = {
    "an unknown name of ours": {"questions": "Frage"},
    "no text": {"question": 3},
    "a blank text": {"question": " "},
    "one column twice": {"question": "Frage", "a": "Frage"},
}


@pytest.mark.parametrize("columns", BAD_SETTINGS.values(), ids=BAD_SETTINGS)
def test_an_impossible_setting_is_refused_with_the_names_that_are_known(columns):
    message = (
        "Config field 'columns' is .* needs names among id, path, question, a, b, c, d, answer"
    )
    with pytest.raises(ValueError, match=message):
        vqa.Config.preset("demo", columns=columns)


def test_preflight_reads_with_the_setting_which_makes_no_new_run(tmp_path):
    changes = table("train", R1, header=HEADER) | {"test.csv": None}
    settings = {"data_dir": str(write(tmp_path / "data", changes))}
    plain = vqa.Config.preset("demo", **settings)
    with pytest.raises(vqa.DataError, match=r"train.csv, line 1: columns \['question'\]"):
        vqa.preflight(plain)
    config = vqa.Config.preset("demo", **settings, columns={"question": "Frage"})
    with pytest.raises(vqa.DataError, match="test.csv: no such file"):
        vqa.preflight(config)
    assert config.fingerprint == plain.fingerprint
