"""Part 3, Prompt: order of its parts, control tokens that stay text, tokens of the letters."""

import itertools
import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from chat_templates import (
    BY_EFFORT,
    BY_ENABLE_THINKING,
    BY_THINKING,
    THINKS_BY_DEFAULT,
    thinking_template,
)
from competition_folder import Folder
from running import quiet, run_all
from small_competition import R1, R2, table, write
from twins import TINY

import vqa_helpers as vqa

# --- Messages -------------------------------------------------------------------------------------


ROW = {
    "question": "사과는 몇 개인가요?",
    "a": "1개",
    "b": "2개",
    "c": "3개",
    "d": "4개",
    "image_path": "x.jpg",
    "type": "counting",
}


ALL_ORDERS = list(itertools.permutations(range(4)))


def user_text(row, *arguments, **options):
    """The text of the user's message."""
    _, user = vqa.build_messages(row, *arguments, **options)
    return user["content"][1]["text"]


@pytest.mark.parametrize("order", ALL_ORDERS)
def test_every_choice_order_has_its_inverse(order):
    values = np.array([10.0, 20.0, 30.0, 40.0])
    shuffled = vqa.permute_choices(values, order)
    assert np.array_equal(vqa.unpermute_scores(shuffled, order), values)
    a, b, c, d = [ROW["abcd"[original]] for original in order]
    assert user_text(ROW, order).endswith(f"a. {a}\nb. {b}\nc. {c}\nd. {d}")


def test_order_means_position_to_original_choice():
    """DESIGN: with order (2, 0, 3, 1) the prompt's choice a is the row's choice c."""
    assert vqa.permute_choices(["A", "B", "C", "D"], (2, 0, 3, 1)) == ["C", "A", "D", "B"]
    assert vqa.unpermute_scores([9, 0, 0, 0], (2, 0, 3, 1)).tolist() == [0, 0, 9, 0]


def test_prompt_order_is_system_image_hint_question_choices():
    system, user = vqa.build_messages(ROW)
    assert system["role"] == "system"
    assert user["content"][0] == {"type": "image", "image": "x.jpg"}
    text = user["content"][1]["text"]
    assert text.index("세어") < text.index(ROW["question"]) < text.index("a. 1개")
    texts = [user_text(ROW, order) for order in ALL_ORDERS]
    shared_prefixes = {text[: text.index("a. ")] for text in texts}
    assert len(shared_prefixes) == 1


def test_a_blank_choice_is_left_out_and_letters_stay_with_positions():
    text = user_text({**ROW, "c": " "}, (2, 0, 3, 1))
    assert text.endswith("\nb. 1개\nc. 4개\nd. 2개")


def test_special_tokens_in_the_data_are_broken_up():
    row = {
        **ROW,
        "question": "<|im_end|> <|image_pad|> <think> a < b",
        "a": "{question} {0}",
        "b": "<|vision_start|>",
    }
    text = user_text(row)
    assert "<|" not in text
    assert "<think>" not in text
    assert "< |im_end| > < |image_pad| > < think > a < b" in text
    assert "a. {question} {0}" in text


def test_every_question_type_has_a_template_that_can_be_replaced():
    assert set(vqa.PROMPT_TEMPLATES) == set(vqa.QUESTION_TYPES)
    templates = {**vqa.PROMPT_TEMPLATES, "counting": "Q {question}\n{choices}"}
    assert user_text(ROW, templates=templates).startswith("Q 사과는")


# --- Wordings -------------------------------------------------------------------------------------


def test_paraphrases_ask_the_same_and_are_no_longer_than_the_first():
    first, *others = vqa._INSTRUCTIONS
    assert len(others) == 3
    assert len(set(vqa._INSTRUCTIONS)) == 4
    for task in others:
        assert len(task) <= len(first)
        assert task.index("{question}") < task.index("{choices}")
        before_question = task.split("{question}")[0]
        assert all(letter in before_question for letter in "abcd")
        assert task.endswith("{choices}")


def test_a_template_of_the_config_has_one_wording(demo_config, replace):
    config = replace(demo_config, paraphrases=4, prompt_templates={"ocr": "{question}\n{choices}"})
    wordings = [vqa.prompt_templates(config, number) for number in range(4)]
    assert {wording["ocr"] for wording in wordings} == {"{question}\n{choices}"}
    assert len({wording["color"] for wording in wordings}) == 4
    assert wordings[0] == vqa.prompt_templates(config)


def test_every_wording_goes_through_the_check_of_the_template(
    demo_config, demo_rows, replace, monkeypatch
):
    checked = []
    check = vqa.check_template

    def noting(processor, messages):
        checked.append(str(messages))
        return check(processor, messages)

    monkeypatch.setattr(vqa, "check_template", noting)
    vqa.open_session(replace(demo_config, paraphrases=3), demo_rows.train.iloc[0])
    assert len(set(checked)) == 3


# --- Letters --------------------------------------------------------------------------------------


@pytest.fixture
def processor(demo_config):
    return vqa.load_processor(demo_config)


QUESTION = {
    "question": "몇 개인가요?",
    "a": "1",
    "b": "2",
    "c": "3",
    "d": "4",
    "image_path": "x.jpg",
}
MESSAGES = vqa.build_messages(QUESTION)


def test_every_letter_is_one_token_with_its_variants(processor):
    letters = vqa.check_template(processor, MESSAGES)
    for choice, variants in zip("abcd", letters, strict=True):
        decoded = [processor.tokenizer.decode([token]) for token in variants]
        assert decoded == [choice, choice.upper(), f" {choice}"]


MESSAGE_START = "{{- '<|im_start|>' + message.role + '\\n' }}"
THINKING = "{%- if message.role == 'assistant' %}<think>\n\n</think>\n\n{%- endif %}"
ALL_MESSAGES = "{%- for message in messages %}"
SYSTEM_PROMPT = "{%- if add_generation_prompt %}You are helpful.{%- endif %}"
SPOILED_TEMPLATES = {
    "a thinking block in finished chats only": (MESSAGE_START, MESSAGE_START + THINKING),
    "a default system prompt in prompts only": (ALL_MESSAGES, SYSTEM_PROMPT + ALL_MESSAGES),
}


@pytest.mark.parametrize(("old", "new"), SPOILED_TEMPLATES.values(), ids=SPOILED_TEMPLATES)
def test_a_template_that_renders_prompt_and_training_text_differently_is_refused(
    processor, old, new
):
    assert old in processor.chat_template
    processor.chat_template = processor.chat_template.replace(old, new, 1)
    with pytest.raises(vqa.TemplateError, match="(?s)inference prompt:.*training text:"):
        vqa.check_template(processor, MESSAGES)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("\nb", "\na", "Two letters share a token"),
        ("\nb", "\nbb bb", "The letter 'b' is not one token"),
    ],
)
def test_letters_that_share_a_token_or_take_several_are_refused(processor, old, new, message):
    prompt = vqa.render_prompt(processor, MESSAGES)

    def tokenizer(text):
        return processor.tokenizer(text.removeprefix(prompt[:-1]).replace(old, new))

    with pytest.raises(vqa.TemplateError, match=message):
        vqa.choice_token_ids(SimpleNamespace(tokenizer=tokenizer), prompt)


# --- Text of a competition ------------------------------------------------------------------------


def control_tokens(processor, row):
    """How often each control token occurs in the prompt of a row whose image takes one token."""
    ids = vqa.encode_prompt(processor, vqa.build_messages(row), (1, 2, 2)).tolist()
    known = processor.tokenizer.added_tokens_decoder
    return {str(token): ids.count(number) for number, token in known.items()}


CONTROL_TOKENS = [
    "<|im_end|>",
    "<|im_start|>",
    "<|endoftext|>",
    "<|image_pad|>",
    "<|vision_start|>",
    "<|video_pad|>",
    "<|object_ref_start|>",
    "<|fim_prefix|>",
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_response>",
]


@pytest.mark.parametrize("column", ["question", "c"])
@pytest.mark.parametrize("token", CONTROL_TOKENS)
def test_a_control_token_in_the_data_is_counted_and_stays_text(tmp_path, processor, token, column):
    plain = vqa.load_competition(write(tmp_path / "plain", {})).train.iloc[1]
    text = f"앞{token}뒤"
    noisy = table("train", R1, R2.replace(plain[column], text))
    loaded = vqa.load_competition(write(tmp_path / "noisy", noisy))
    row = loaded.train.iloc[1]
    assert row[column] == text
    assert +loaded.fallbacks == {"train_special_tokens_neutralised": 1}
    prompt = vqa.render_prompt(processor, vqa.build_messages(row))
    assert f"앞< {token[1:-1]} >뒤" in prompt
    assert prompt.count("<|image_pad|>") == 1
    assert control_tokens(processor, row) == control_tokens(processor, plain)
    assert control_tokens(processor, row)["<|image_pad|>"] == 1


def test_no_choice_is_cut_from_an_over_long_prompt(tmp_path, processor):
    middle = "아주 긴 보기 " * 400
    long = {letter: f"{letter}의 시작 {middle}{letter}의 끝" for letter in "abcd"}
    row = ",".join(["r1", "train/1.png", "아주 긴 질문 " * 4000, *long.values(), "d"])
    loaded = vqa.load_competition(write(tmp_path, table("train", row)))
    ids = vqa.encode_prompt(processor, vqa.build_messages(loaded.train.iloc[0]), (1, 2, 2))
    text = processor.tokenizer.decode(ids)
    for letter in "abcd":
        assert f"\n{letter}. {long[letter]}" in text
    assert text.endswith("<|im_start|>assistant\n")


# --- Templates that think -------------------------------------------------------------------------


EMPTY_BLOCK = "<think>\n\n</think>\n\n"
EFFORT = f"('' if {BY_ENABLE_THINKING} else 'Think hard.\\n\\n')"
CHECKED_EFFORT = (
    "(raise_exception('Unexpected effort ' ~ reasoning_effort) "
    "if reasoning_effort is defined and reasoning_effort == 'none' else '')"
)
# Name -> template, and how it has to be rendered.
TEMPLATES_THAT_AGREE = {
    "opens a block": (thinking_template(BY_ENABLE_THINKING), {"enable_thinking": False}),
    "closes an empty block": (thinking_template("true"), {}),
    "closes it unless told to think": (
        thinking_template("enable_thinking is not defined or enable_thinking is false"),
        {},
    ),
    "writes an effort into the system's text": (
        thinking_template(BY_ENABLE_THINKING, effort=EFFORT),
        {"enable_thinking": False},
    ),
    "calls its switch thinking": (thinking_template(BY_THINKING), {"thinking": False}),
    "calls its switch reasoning_effort": (
        thinking_template(BY_EFFORT),
        {"reasoning_effort": "none"},
    ),
    "refuses an unknown effort": (
        thinking_template(BY_ENABLE_THINKING, effort=CHECKED_EFFORT),
        {"enable_thinking": False},
    ),
}


@pytest.mark.parametrize(
    ("template", "options"), TEMPLATES_THAT_AGREE.values(), ids=TEMPLATES_THAT_AGREE
)
def test_a_template_that_can_think_is_rendered_without_thinking(processor, template, options):
    processor.chat_template = template
    assert vqa.template_options(processor) == options
    letters = vqa.check_template(processor, MESSAGES)
    assert [processor.tokenizer.decode([ids[0]]) for ids in letters] == list("abcd")

    text = MESSAGES[1]["content"][1]["text"]
    prompt = vqa.render_prompt(processor, MESSAGES)
    assert prompt == (
        f"<|im_start|>system\n{vqa.SYSTEM_PROMPT}<|im_end|>\n"
        f"<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>{text}<|im_end|>\n"
        f"<|im_start|>assistant\n{EMPTY_BLOCK}"
    )
    answered = [*MESSAGES, {"role": "assistant", "content": "c"}]
    trained = processor.apply_chat_template(answered, tokenize=False, **options)
    assert trained == f"{prompt}c<|im_end|>\n"
    ids = vqa.encode_prompt(processor, MESSAGES, (1, 2, 2))
    assert processor.tokenizer.decode(ids) == prompt


def test_a_template_without_thinking_is_rendered_as_it_is(processor):
    assert vqa.template_options(processor) == {}
    plain = processor.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert vqa.render_prompt(processor, MESSAGES) == plain


def test_another_template_of_the_same_processor_is_looked_at_anew(processor):
    assert vqa.template_options(processor) == {}
    processor.chat_template = thinking_template(BY_THINKING)
    assert vqa.template_options(processor) == {"thinking": False}
    processor.chat_template = thinking_template(BY_ENABLE_THINKING)
    assert vqa.template_options(processor) == {"enable_thinking": False}


TEMPLATES_THAT_DO_NOT_AGREE = {
    "always opens a block": (
        thinking_template("false"),
        ["Tried as it is.\n--- inference prompt:", "assistant\n<think>\n\n--- training text:"],
    ),
    "drops the empty block from answers": (
        thinking_template(BY_ENABLE_THINKING, before_answer="''"),
        ["Tried as it is.", f"Tried with enable_thinking=False.{{}}{EMPTY_BLOCK}"],
    ),
    "closes the block in another way": (
        thinking_template(BY_ENABLE_THINKING, closed="'<think></think>'"),
        ["Tried with enable_thinking=False.{}assistant\n<think></think>\n--- training text"],
    ),
    "cannot be told not to think": (
        thinking_template("false", effort=CHECKED_EFFORT),
        [
            "Tried as it is.",
            "Tried with reasoning_effort='none'.\n"
            "The template refuses to be rendered so: Unexpected effort none",
        ],
    ),
}


@pytest.mark.parametrize(
    ("template", "said"),
    TEMPLATES_THAT_DO_NOT_AGREE.values(),
    ids=TEMPLATES_THAT_DO_NOT_AGREE,
)
def test_a_template_that_no_way_of_rendering_suits_is_refused_with_all_ways(
    processor, template, said
):
    processor.chat_template = template
    with pytest.raises(vqa.TemplateError, match="Take a model whose template") as raised:
        vqa.check_template(processor, MESSAGES)
    for text in said:
        pattern = ".*".join(re.escape(part) for part in text.split("{}"))
        assert re.search(pattern, str(raised.value), re.DOTALL), text
    ways = vqa.renderings_to_try(template)
    assert str(raised.value).count("Tried ") == len(ways)


def test_a_template_that_only_mentions_a_switch_in_another_word_does_not_try_it():
    assert vqa.renderings_to_try("{{ message.my_thinking }} rethinking enable_thinkings") == [{}]


def test_a_template_for_text_alone_is_refused(processor):
    """It would drop the question: both texts then agree, on nothing."""
    dropping = "{%- if message.content is string %}{{ message.content }}{%- endif %}"
    content = processor.chat_template
    start = content.index("    {%- if message.content is string %}")
    end = content.index("    {{- '<|im_end|>")
    processor.chat_template = content[:start] + dropping + content[end:]
    with pytest.raises(vqa.TemplateError, match="(?s)leaves out the .*몇 개인가요") as raised:
        vqa.check_template(processor, MESSAGES)
    assert "user\n<|im_end|>" in str(raised.value)


# --- The choice in a run --------------------------------------------------------------------------


@pytest.fixture
def thinking_folder(tmp_path):
    """The demo's model with a template that thinks by default."""
    folder = tmp_path / "thinking"
    shutil.copytree(TINY, folder)
    (folder / "chat_template.jinja").write_text(THINKS_BY_DEFAULT, encoding="utf-8")
    return folder


def test_how_the_template_is_rendered_is_logged_and_kept_with_the_run(
    thinking_folder, mini_run, mini_data, caplog
):
    run = mini_run(model_id=str(thinking_folder))
    with caplog.at_level("INFO"):
        session = vqa.open_stage_session(run, "zeroshot", [0], quiet)
    assert "Decision: chat template with enable_thinking=False" in caplog.text
    content = json.loads((run.directory / "prompt.json").read_text(encoding="utf-8"))
    assert content["chat_template"] == "with enable_thinking=False"
    assert content["prompt"].endswith(EMPTY_BLOCK)
    assert run.train["question"][0] in content["prompt"]
    prompt = vqa.make_prompt(session, run.train, 0, [(0, 1, 2, 3)])
    assert session.processor.tokenizer.decode(prompt.input_ids).endswith(EMPTY_BLOCK)
    lengths = vqa.prompt_lengths(run.config, session.processor, vqa.load_competition(mini_data))
    assert lengths["tokens"][0] == len(prompt.input_ids)


def test_a_run_is_not_continued_with_prompts_that_are_rendered_otherwise(thinking_folder, mini_run):
    run = mini_run(model_id=str(thinking_folder))
    vqa.open_stage_session(run, "zeroshot", [0], quiet)
    vqa.open_stage_session(run, "train", [0], quiet)
    template = THINKS_BY_DEFAULT.replace("user\\n", "user\\n\\n")
    (thinking_folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    with pytest.raises(vqa.CheckpointError, match="prompt.json: this run's prompts were rendered"):
        vqa.open_stage_session(run, "train", [0], quiet)

    path = run.directory / "prompt.json"
    path.unlink()  # a run of an earlier version has none, and goes on
    vqa.open_stage_session(run, "train", [0], quiet)
    assert "user\n\n<|vision_start|>" in json.loads(path.read_text(encoding="utf-8"))["prompt"]


def test_a_damaged_file_of_the_prompt_is_written_anew(mini_run, caplog):
    run = mini_run()
    vqa.open_stage_session(run, "zeroshot", [0], quiet)
    path = run.directory / "prompt.json"
    before = path.read_bytes()
    path.write_bytes(before[:20])
    vqa.open_stage_session(run, "zeroshot", [0], quiet)
    assert path.read_bytes() == before
    assert "Written anew" in caplog.text


# --- A whole run ----------------------------------------------------------------------------------


def write_easy_rows(folder, rows):
    """A competition whose questions tell the letter of the answer, whatever the choices are."""
    folder.mkdir()
    competition = Folder(folder, rows)
    lines = []
    for number in range(rows):
        letter = "abcd"[number % 4]
        lines.append(f"train_{number},train/{number}.png,정답은 {letter} 입니다,1,2,3,4,{letter}")
    competition.write("train", "id,path,question,a,b,c,d,answer", lines)
    return folder


def write_thinking_twin(twin, folder):
    """A random Qwen3.5 that thinks by default; its weights are large enough to learn by LoRA."""
    shutil.copytree(twin, folder)
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder)
    with torch.no_grad():
        for name, parameter in model.model.language_model.named_parameters():
            if parameter.ndim == 2:
                parameter.mul_(8 if "embed" in name else 4)
    model.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(THINKS_BY_DEFAULT, encoding="utf-8")
    return folder


@pytest.mark.slow
def test_a_model_that_thinks_by_default_learns_and_resumes_to_the_same_bytes(
    model_folders, mini_run, tmp_path
):
    settings = {
        "model_id": str(write_thinking_twin(model_folders["qwen3_5"], tmp_path / "model")),
        "data_dir": str(write_easy_rows(tmp_path / "data", 64)),
        "train_folds": (0,),
        "num_epochs": 10,
        "batch_size": 8,
        "learning_rate": 3e-3,
        "use_ema": False,
        "shuffle_choices": False,
        "tta_rotations": 1,  # an order of its own would contradict the question
        "save_every_steps": 2,
    }
    plain = mini_run(**settings, output_dir=str(tmp_path / "plain"))
    run_all(plain)
    zeroshot = vqa.read_arrays(plain.directory / "zeroshot.npz", plain.fingerprint)
    oof = vqa.read_arrays(plain.fold_dir(0) / "oof.npz", plain.fingerprint)
    zeroshot_accuracy = np.mean(zeroshot["logits"][:, 0].argmax(1) == zeroshot["labels"])
    oof_accuracy = np.mean(oof["logits"][:, 0].argmax(1) == oof["labels"])
    assert zeroshot_accuracy < 0.5
    assert oof_accuracy > 0.9

    def stop(stage, done, total, **_):
        if (stage, done) == ("fold 0 training", 9):
            raise vqa.Interrupted

    stopped = mini_run(**settings, output_dir=str(tmp_path / "stopped"))
    with pytest.raises(vqa.Interrupted):
        run_all(stopped, progress=stop)
    names = ("adapter_raw/adapter_model.safetensors", "oof.npz", "test.npz")
    assert not [name for name in names if (stopped.fold_dir(0) / name).exists()]
    run_all(stopped)
    for name in names:
        resumed = stopped.fold_dir(0) / name
        assert resumed.read_bytes() == (plain.fold_dir(0) / name).read_bytes()
