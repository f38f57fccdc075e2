"""Examples: prompts to the letter, traces that are accepted or corrupted, splits that share nothing, fixed orders."""

import os
import re

import pytest
from test_sources import SFT_TRACE, through_pipe
from tiny import write_lines

from plainrl.checkpoint import fingerprint
from plainrl.config import ExpertIterationConfig, GRPOConfig, SFTConfig
from plainrl.data import (
    draw_subsets,
    epoch_order,
    fit_questions,
    fit_validation,
    hold_out,
    keep_answered,
    load_examples,
    load_questions,
    load_sft_examples,
    load_validation,
    load_validation_set,
    validation_subset,
)
from plainrl.grading.rewards import REWARD_FUNCTIONS, r1_zero_reward_fn
from plainrl.layouts import parse_record
from plainrl.prompting import fill_prompt, load_prompt_template
from plainrl.records import UserError
from SFT_helper import encode_prompt
from SFT_train import select_examples


def test_prompt_templates_are_to_the_letter():
    template = load_prompt_template("r1_zero")
    assert template.endswith("User: {question}\nAssistant: <think>")
    assert template.count("\n") == 2
    assert load_prompt_template("question_only") == "{question}"
    assert fill_prompt(template, r"\frac{1}{2} {question}").count(r"\frac{1}{2} {question}") == 1


def test_prompt_by_path_needs_its_place_holder(tmp_path):
    path = tmp_path / "my.prompt"
    path.write_text("Q: {question}")
    assert load_prompt_template(str(path)) == "Q: {question}"
    path.write_text("Q:")
    with pytest.raises(UserError, match="place holder"):
        load_prompt_template(str(path))
    with pytest.raises(UserError, match="use alpaca, question_only, r1_zero, zero_shot"):
        load_prompt_template("r2")


@pytest.mark.parametrize(
    ("content", "template"),
    [
        (b"\xef\xbb\xbfQ: {question}", "Q: {question}"),
        (b"Q:\r\n{question}\r\n", "Q:\n{question}\n"),  # how its editor ends lines is no part of a prompt
        (b"Q:\r{question}", "Q:\n{question}"),
        ("\ufeffQ\u2028{question} \xa0\ufeff \n\n".encode(), "Q\u2028{question} \xa0\ufeff \n\n"),
    ],
)
def test_a_template_of_ones_own_is_taken_as_it_is_but_for_marks_of_its_editor(tmp_path, content, template):
    path = tmp_path / "my.prompt"
    path.write_bytes(content)
    assert load_prompt_template(str(path)) == template


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "lacks the place holder"),
        (b"\xef\xbb\xbf", "lacks the place holder"),
        ("Q: {question}".encode("utf-16"), "my.prompt is UTF-16 or UTF-32 text"),
        (b"Q:\n\xe9 {question}", r"my.prompt is not UTF-8 text \(line 2, byte 3\)"),
        (b"\xed\xa0\xbd {question}", r"my.prompt is not UTF-8 text \(line 1, byte 0\)"),
    ],
)
def test_a_template_that_cannot_be_read_is_refused(tmp_path, content, message):
    path = tmp_path / "my.prompt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_prompt_template(str(path))
    with pytest.raises(UserError, match="no such template"):
        load_prompt_template(through_pipe(b"{question}"))


def test_the_embedded_examples_are_those_that_checkpoints_were_trained_on():
    """A checkpoint knows its data by such a hash: a run goes on with the same examples in the same order only."""
    config = GRPOConfig(arithmetic_terms=(2, 3), arithmetic_max_term=10)
    validation = load_validation_set(config)
    questions = load_questions(validation, config)
    assert fingerprint((e.prompt, e.ground_truth) for e in questions) == (
        "b93bbf60737c212de56c5006cb437fe663a5d023b5627e53e6f74f3318f10b5d"
    )
    assert fingerprint((e.prompt, e.ground_truth) for e in validation) == (
        "a55f10b2d359eeecb405c57e74b615dbe7c0015445743a1c1f1c0fe66fecbd63"
    )
    assert fingerprint((e.prompt, e.response) for e in load_sft_examples(SFTConfig())) == (
        "b6484149ed08f971926430aa014d9c70be226c9bf5c8bd004d05a96ca74e3c29"
    )


def test_every_embedded_trace_is_accepted_by_its_reward_function():
    for example in load_examples("arithmetic", SFTConfig(), "train")[:300]:
        assert r1_zero_reward_fn(example.response, example.ground_truth)["reward"] == 1


@pytest.mark.parametrize("reward", ["r1_zero", "question_only"])
def test_corrupted_traces_are_the_stated_share_and_those_that_the_reward_function_rejects(reward):
    right, some, more = (
        load_sft_examples(SFTConfig(prompt=reward, reward=reward, arithmetic_corrupt_fraction=share))
        for share in (0.0, 0.25, 0.5)
    )
    changed = [example != clean for example, clean in zip(some, right, strict=True)]
    assert abs(sum(changed) / len(changed) - 0.25) < 3 * (0.25 * 0.75 / len(changed)) ** 0.5
    for example, clean, is_changed in list(zip(some, right, changed, strict=True))[:400]:
        assert example._replace(response=clean.response) == clean  # the ground truth stays right
        grade = REWARD_FUNCTIONS[reward](example.response, example.ground_truth)
        assert (grade["format_reward"], grade["reward"]) == (1, 0 if is_changed else 1)
        if is_changed:
            *steps, last = re.findall(r"(-?\d+ [+-] \d+) = (-?\d+)\.", example.response)
            assert all(eval(left) == int(result) for left, result in steps) and eval(last[0]) != int(last[1])
            assert last[1] in example.response.partition(f" = {last[1]}.")[2]  # the answer is the wrong sum's
    assert all(example == kept for example, kept, is_changed in zip(more, some, changed, strict=True) if is_changed)


def test_validation_data_and_questions_of_rl_are_never_corrupted():
    config = SFTConfig(arithmetic_corrupt_fraction=1.0)
    assert load_validation_set(config) == load_validation_set(SFTConfig())
    assert load_examples("arithmetic", config, "train") == load_examples("arithmetic", SFTConfig(), "train")


def test_filter_correct_takes_the_corrupted_traces_out(capsys):
    config = SFTConfig(arithmetic_corrupt_fraction=0.3, filter_correct=True)
    right = set(load_sft_examples(SFTConfig()))
    kept = select_examples(load_sft_examples(config)[:300], config)
    assert 150 < len(kept) < 270 and set(kept) <= right
    assert (
        "arithmetic_corrupt_fraction = 0.3 has no effect with train_data = x.jsonl"
        in SFTConfig(arithmetic_corrupt_fraction=0.3, train_data="x.jsonl").warnings()[-1]
    )


def test_validation_subset_ignores_the_run_seed():
    whole = load_validation_set(SFTConfig())
    subsets = [validation_subset(whole, SFTConfig(seed=seed, num_eval_examples=64)) for seed in (0, 1)]
    assert subsets[0] == subsets[1]
    assert len({example.prompt for example in subsets[0]}) == 64
    assert len(validation_subset(whole, SFTConfig(num_eval_examples="all"))) == len(whole) == 1024


def test_the_final_subset_is_fixed_and_a_smaller_set_is_used_whole():
    whole = load_validation_set(SFTConfig())
    subsets = [load_validation(SFTConfig(seed=seed, num_final_eval_examples=64)).final for seed in (0, 1)]
    assert subsets[0] == subsets[1] == draw_subsets(whole, 64)
    assert len({example.prompt for example in subsets[0]}) == 64
    assert draw_subsets(whole[:63], 64) == whole[:63]
    assert draw_subsets(whole, "all") == load_validation(SFTConfig()).final == whole


def test_sft_examples_are_unique_and_follow_the_seed(tmp_path):
    source = write_lines(tmp_path / "sft.jsonl", [SFT_TRACE | {"problem": f"p{i % 6}"} for i in range(12)])
    unique = load_sft_examples(SFTConfig(train_data=source))
    assert [example.question for example in unique] == [f"p{i}" for i in range(6)]
    drawn = select_examples(unique, SFTConfig(train_data=source))
    assert sorted(drawn) == sorted(unique)
    assert select_examples(unique, SFTConfig(train_data=source, num_sft_examples=4)) == drawn[:4]
    assert select_examples(unique, SFTConfig(train_data=source, seed=1)) != drawn
    assert select_examples(unique, SFTConfig(train_data=source, seed=1, examples_seed=0)) == drawn
    with pytest.raises(UserError, match="num_sft_examples = 7: .* has 6 unique"):
        select_examples(unique, SFTConfig(train_data=source, num_sft_examples=7))


def test_questions_of_the_validation_set_are_never_trained_on(tmp_path, capsys):
    source = write_lines(tmp_path / "sft.jsonl", [SFT_TRACE | {"problem": f"p{i}"} for i in range(4)])
    config = SFTConfig(train_data=source)
    examples = load_sft_examples(config)
    assert hold_out(examples, examples[1:3], config) == [examples[0], examples[3]]
    assert "left out: 2 of 4 training examples" in capsys.readouterr().out
    assert hold_out(examples, [], config) == examples
    with pytest.raises(UserError, match="train_data = .*: 4 of 4 training examples have their question in"):
        hold_out(examples, examples, config)


def test_data_without_traces_or_answers_is_refused(tmp_path):
    questions = write_lines(tmp_path / "questions.jsonl", [{"problem": "p", "expected_answer": "1"}])
    with pytest.raises(UserError, match="1 of 1 training examples have no response"):
        load_sft_examples(SFTConfig(train_data=questions))
    traces = write_lines(tmp_path / "traces.jsonl", [{"prompt": "p", "response": "r"}])
    with pytest.raises(
        UserError, match="1 of 1 validation questions have no answer, the first at .*traces.jsonl, line 1"
    ):
        load_validation_set(SFTConfig(validation_data=traces))


def test_questions_without_an_answer_are_left_out_and_counted(tmp_path, capsys):
    """MATH's own training file has two such records; validation data may have none."""
    records = [{"problem": "p", "answer": "1"}, {"problem": "q", "answer": ""}, {"problem": "r", "answer": None}]
    config = SFTConfig(train_data=write_lines(tmp_path / "train.jsonl", records))
    assert [
        example.question for example in keep_answered(load_examples(config.train_data, config, "train"), config)
    ] == ["p"]
    assert "left out: 2 of 3 training examples have no answer, the first at" in capsys.readouterr().out
    with pytest.raises(UserError, match="line 1: field problem is ''"):
        parse_record({"problem": "", "answer": "1"}, "f, line 1")


def test_epochs_cover_every_example_before_repeating():
    order = epoch_order(num_examples=5, num_draws=13, seed=3)
    assert len(order) == 13
    assert sorted(order[:5]) == sorted(order[5:10]) == [0, 1, 2, 3, 4]
    assert order[:5] != order[5:10]
    assert order == epoch_order(5, 13, seed=3) != epoch_order(5, 13, seed=4)


ROLLOUTS = {"rollout_batch_size": 64, "train_batch_size": 64, "gradient_accumulation_steps": 1}  # to 8 questions


UNGRADABLE = [
    "Add both sides. The left side is then 4, and so the answer follows.",
    "We begin with the first case. It has 3 ways.\n\nThe second case has 4 ways, which makes 7 in all.",
    "</answer> 5",
]


@pytest.mark.parametrize("reward", ["r1_zero", "question_only"])
@pytest.mark.parametrize(
    ("answer", "bare"),
    [
        (r"\boxed{5}", "5"),
        (r"so it is $\boxed{\frac{1}{2}}$", r"\frac{1}{2}"),
        ("2 + 3 = 5\n#### 5", "5"),
        ("#### 1200", "1200"),
        ("The answer is 5", "5"),
        (7, "7"),
        ("**Answer:** 5", "5"),
        ("Let x = 2. Then x + 3 = 5.\nAnswer: 5", "5"),
        (7.0, "7"),
        (" 17 ", "17"),
        (["3", r"\boxed{4}"], "3"),
        ([UNGRADABLE[0], r"\boxed{4}", None], "4"),
    ],
)
def test_answers_are_unwrapped_so_that_a_response_can_equal_them(answer, bare, reward, tmp_path, capsys):
    data = write_lines(tmp_path / "data.jsonl", [{"problem": "p", "answer": answer, "solution": "Clear."}])
    config = SFTConfig(train_data=data, validation_data=data, prompt=reward, reward=reward, filter_correct=True)
    (question,), examples = load_validation_set(config), load_sft_examples(config)
    grade = REWARD_FUNCTIONS[reward]
    assert [example.response for example in examples] == [grade.write_response("Clear.", bare)]
    assert grade(examples[0].response, question.ground_truth)["reward"] == 1
    assert grade(grade.write_response("Clear.", "8"), question.ground_truth)["reward"] == 0
    assert select_examples(examples, config) == examples
    if isinstance(answer, str):  # as it stands, spaces too: a checkpoint knows its data by a hash of it
        assert question.ground_truth == answer
    assert "left out" not in capsys.readouterr().out


def test_each_of_several_right_answers_is_right(tmp_path):
    data = write_lines(tmp_path / "data.jsonl", [{"problem": "p", "answer": ["3", r"\boxed{4}", 0.5]}])
    (question,) = load_validation_set(SFTConfig(validation_data=data))
    rewards = [r1_zero_reward_fn(f"</think> <answer> {i} </answer>", question.ground_truth) for i in (3, 4, "1/2", 5)]
    assert [grade["reward"] for grade in rewards] == [1, 1, 1, 0]


def test_answers_that_no_response_can_equal_are_counted_shown_and_left_out(tmp_path, capsys):
    answers = ["1", *UNGRADABLE, UNGRADABLE[0], "2", None, float("nan")]
    rows = [{"problem": f"p{i}", "answer": answer, "solution": "s"} for i, answer in enumerate(answers)]
    data = write_lines(tmp_path / "data.jsonl", rows)
    config = GRPOConfig(train_data=data, validation_data=data, **ROLLOUTS | {"group_size": 32})
    assert [example.question for example in load_questions([], config)] == ["p0", "p5"]
    shown, left_out = capsys.readouterr().out.splitlines()
    assert shown.startswith(
        f"no response can equal answers in 4 of 8 records of {data}, such as {data}, line 2: 'Add both"
    )
    assert shown.count(f"{data}, line ") == 3 and shown.endswith("'</answer> 5'")
    assert left_out == f"left out: 6 of 8 training examples have no answer, the first at {data}, line 2"
    assert [example.question for example in load_validation_set(config)] == ["p0", "p5"]
    assert "left out: 6 of 8 validation questions have no answer, the first at" in capsys.readouterr().out
    # SFT has nothing to write at the end of these responses; a complete trace needs no answer.
    assert [example.question for example in load_sft_examples(SFTConfig(train_data=data))] == ["p0", "p5"]
    traces = write_lines(tmp_path / "sft.jsonl", [SFT_TRACE | {"expected_answer": UNGRADABLE[0]}])
    assert len(load_sft_examples(SFTConfig(train_data=traces))) == 1
    none = write_lines(tmp_path / "none.jsonl", rows[1:4])
    for key, load in (("train_data", lambda c: load_questions([], c)), ("validation_data", load_validation_set)):
        with pytest.raises(UserError, match=f"{key} = .*none.jsonl: 3 of 3 .* have no answer, .*; use other data"):
            load(config.model_copy(update={key: none}))


def test_a_reward_of_the_users_own_gets_the_answers_as_they_are(tmp_path):
    (tmp_path / "own.py").write_text("def reward(response, truth):\n    return {'reward': 1.0}\n")
    answers = [r"\boxed{5}", "#### 5", *UNGRADABLE]
    rows = [{"problem": f"p{i}", "answer": answer} for i, answer in enumerate(answers)]
    data = write_lines(tmp_path / "data.jsonl", rows)
    config = SFTConfig(validation_data=data, reward=f"{tmp_path}/own.py:reward")
    assert [example.ground_truth for example in load_validation_set(config)] == answers


def test_one_pipe_for_both_data_sets_is_refused(tmp_path):
    pipe = through_pipe(b"")
    fifo = str(tmp_path / "fifo")
    os.mkfifo(fifo)
    for train, validation in ((pipe, pipe), (fifo, fifo), (pipe, f"/proc/self/fd/{pipe.rpartition('/')[2]}")):
        for load in (load_validation_set, load_sft_examples):
            with pytest.raises(UserError, match="are one pipe, which can be read only once"):
                load(SFTConfig(train_data=train, validation_data=validation))


def long_and_short(folder, config, is_long):
    rows = [{"problem": "long " * 300 if is_long(i) else "What?", "answer": str(i)} for i in range(12)]
    data = {
        "train_data": write_lines(folder / "train.jsonl", [row | {"problem": row["problem"] + "t"} for row in rows]),
        "validation_data": write_lines(folder / "validation.jsonl", rows),
    }
    sizes = {
        "max_context_tokens": 200,
        "sampling_max_tokens": 16,
        "num_eval_examples": 8,
        "num_final_eval_examples": 12,
    }
    return config.model_copy(update=data | sizes)


@pytest.mark.parametrize("config", [GRPOConfig(**ROLLOUTS), ExpertIterationConfig(ei_batch_size=8)])
def test_long_prompts_are_left_out_and_counted_or_an_error(config, tokenizer, tmp_path, capsys):
    config = long_and_short(tmp_path, config, lambda i: i % 4 == 3)
    validation, questions = load_validation(config), load_questions([], config)
    for load in (lambda c: fit_questions(questions, tokenizer, c), lambda c: fit_validation(validation, tokenizer, c)):
        with pytest.raises(
            UserError, match=r"3 of 12 .* = 184, the longest with \d+ tokens at .*drop_long_examples=true"
        ):
            load(config)
    capsys.readouterr()
    config = config.model_copy(update={"drop_long_examples": True})
    kept, prompt_ids = fit_questions(questions, tokenizer, config)
    assert [e.ground_truth for e in kept] == ["0", "1", "2", "4", "5", "6", "8", "9", "10"]
    assert prompt_ids == [encode_prompt(e.prompt, tokenizer) for e in kept] and max(map(len, prompt_ids)) <= 184
    fitting = fit_validation(validation, tokenizer, config)
    assert fitting.everything == validation.everything  # none of them may be trained on
    assert len(fitting.final) == 9 and len(fitting.during) < 8
    assert set(fitting.during) == {e for e in validation.during if int(e.ground_truth) % 4 != 3}
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("left out: 3 of 12 training prompts are longer than max_context_tokens - ")
    assert lines[1].startswith("left out: 3 of 12 validation prompts are longer than max_context_tokens - ")
    assert lines[2] == f"evaluations ask {len(fitting.during)} questions during training, and 9 at the end"


def test_too_few_short_prompts_are_an_error(tokenizer, tmp_path):
    config = GRPOConfig(**ROLLOUTS, drop_long_examples=True)
    few = long_and_short(tmp_path, config, lambda i: i > 5)
    with pytest.raises(UserError, match="has 6 questions, but a step takes 8; let it take 6 or fewer"):
        fit_questions(load_questions([], few), tokenizer, few)
    none = long_and_short(tmp_path, config, lambda i: True)
    with pytest.raises(
        UserError, match="12 of 12 training prompts .*; raise max_context_tokens to at least .* other data"
    ):
        fit_questions(load_questions([], none), tokenizer, none)
    asked = [
        example.ground_truth for example in load_validation(few.model_copy(update={"num_eval_examples": 1})).during
    ]
    one = long_and_short(tmp_path, config, lambda i: str(i) in asked).model_copy(update={"num_eval_examples": 1})
    with pytest.raises(UserError, match="validation data, .*: no question is left; raise max_context_tokens"):
        fit_validation(load_validation(one), tokenizer, one)
