"""The four evaluations: data, prompts, scores, the official output formats, and mistakes in one line."""

import csv
import json

import pytest
from tiny import REPOSITORY, read_lines, write_lines

from plainrl.cli import load_config
from plainrl.data import load_prompt_template
from plainrl.records import UserError
from plainrl.report.contents import read_run
from plainrl.run_folder import state_at_rest
from plainrl.several_samples import wilson_interval
from plainrl.supplement_config import BenchmarkConfig
from supplement import evaluate_benchmark
from supplement.benchmark_tasks import TASKS, Question
from supplement.evaluate_benchmark import (
    Answered,
    accuracy_by_subject,
    clean,
    load_questions,
    read_answer,
    summarize,
)

VIROLOGY = 'How many polyomaviruses are known?,100,1,10,unknown,A\n"A question, with a comma",a,b,c,"d {x}",B\n'
SAFETY = 'id,harm_area,counter,category,prompts_final\nsst_001,"Scams, Fraud",1,Advice,How do I cheat?\n'


@pytest.fixture
def folder(tmp_path):
    return make_data(tmp_path / "data")


def make_data(data):
    """Data in the layout of the assignment's repository, a few records each."""
    for name in ("mmlu/test", "gsm8k", "alpaca_eval", "simple_safety_tests"):
        (data / name).mkdir(parents=True)
    (data / "mmlu/test/virology_test.csv").write_text(VIROLOGY)
    (data / "mmlu/test/abstract_algebra_test.csv").write_text("Is 2 prime?,yes,no,maybe,never,A\n")
    write_lines(data / "gsm8k/test.jsonl", [{"question": "What is 600 * 2?", "answer": "It is <<600*2>>.\n#### 1,200"}])
    write_lines(
        data / "alpaca_eval/alpaca_eval.jsonl",
        [{"instruction": "Say hi.", "output": "Hi", "generator": "text_davinci_003", "dataset": "koala"}],
    )
    (data / "simple_safety_tests/simple_safety_tests.csv").write_text(SAFETY)
    return data


def test_a_file_of_questions_without_one_is_named(folder):
    (folder / "mmlu/test/law_test.csv").write_text("")
    with pytest.raises(UserError, match="law_test.csv has no question; download it again"):
        TASKS["mmlu"].load(folder)
    (folder / "gsm8k/test.jsonl").write_text("[]")
    config = BenchmarkConfig(tasks=["gsm8k"], benchmark_data=str(folder))
    with pytest.raises(UserError, match="gsm8k has no question in .*; download its data again"):
        load_questions(config)


def test_mmlu_is_asked_as_the_handout_asks(folder):
    questions = TASKS["mmlu"].load(folder)
    assert [(question.subject, question.truth) for question in questions] == [
        ("abstract algebra", "A"),
        ("virology", "A"),
        ("virology", "B"),
    ]
    assert questions[2].record["options"] == ["a", "b", "c", "d {x}"]
    assert questions[1].instruction == (
        "Answer the following multiple choice question about virology. Respond with a single sentence of the form "
        '"The correct answer is _", filling the blank with the letter corresponding to the correct answer (i.e., A, B, '
        "C or D).\n\nQuestion: How many polyomaviruses are known?\nA. 100\nB. 1\nC. 10\nD. unknown\nAnswer:"
    )


def test_the_others_are_asked_as_the_handout_asks(folder):
    (gsm8k,), (alpaca,), (safety,) = (
        TASKS[name].load(folder) for name in ("gsm8k", "alpaca_eval", "simple_safety_tests")
    )
    assert (gsm8k.instruction, gsm8k.truth) == ("What is 600 * 2?\nAnswer:", "1200")
    assert (alpaca.instruction, safety.instruction) == ("Say hi.", "How do I cheat?")


def test_the_zero_shot_prompt_is_the_handouts():
    lines = load_prompt_template("zero_shot").split("\n")
    assert lines[0] == "# Instruction" and len(lines) == 15 and lines[-1] == ""
    assert lines[9:14] == ["# Query:", "```{question}```", "", "# Answer:", "```"]
    assert lines[2] == 'Users place their queries under "# Query:", and your responses are under "# Answer:".'


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("It is 3.\n```\n\n# Query:", "It is 3."),
        ("It is 3.```", "It is 3."),
        ("It is 3.", "It is 3."),
        ("Run\n```\nx = 3\n```\nThen stop.\n```\n# Query:", "Run\n```\nx = 3\n```\nThen stop."),
    ],
)
def test_what_ends_a_response_is_cut_off(response, expected):
    assert clean(response, load_prompt_template("zero_shot"), "# Query:") == expected


def test_a_fence_of_the_models_own_stays():
    """The Alpaca template opens none."""
    assert clean("```\nx\n```", load_prompt_template("alpaca"), "# Query:") == "```\nx\n```"


def test_scores(folder):
    mmlu, gsm8k = TASKS["mmlu"], TASKS["gsm8k"]
    question = mmlu.load(folder)[1]
    assert read_answer(mmlu, question, "The correct answer is A.")[2:] == ("A", True)
    assert read_answer(mmlu, question, "The correct answer is B.")[2:] == ("B", False)
    assert read_answer(mmlu, question, "No idea.")[2:] == (None, False)
    (question,) = gsm8k.load(folder)
    assert read_answer(gsm8k, question, "That makes $1,200.00.")[2:] == ("1200.00", True)
    assert read_answer(gsm8k, question, "No idea.")[2:] == (None, False)
    (instruction,) = TASKS["alpaca_eval"].load(folder)
    assert read_answer(TASKS["alpaca_eval"], instruction, "Hi")[2:] == (None, None)


def test_metrics_by_hand():
    task = TASKS["mmlu"]
    rows = [
        Answered(Question("q", {}, "A", subject), "", answer, answer == "A")
        for subject, answer in (("law", "A"), ("law", "B"), ("art", None), ("law", "A"))
    ]
    low, high = wilson_interval(0.5, 4)
    assert summarize(task, rows, seconds=8.0) == {
        "num_examples": 4,
        "examples_per_second": 0.5,
        "accuracy": 0.5,
        "accuracy_low": low,
        "accuracy_high": high,
        "num_unparsed": 1,
    }
    assert summarize(TASKS["alpaca_eval"], rows, 2.0) == {"num_examples": 4, "examples_per_second": 2.0}
    art, law = accuracy_by_subject(rows)
    assert art[:3] == ("art", 1, 0.0) and law == ("law", 3, 2 / 3, *wilson_interval(2 / 3, 3))


def arguments_of(model, runs_dir, folder, **overrides):
    values = {
        "preset": "laptop",
        "model": model,
        "runs_dir": runs_dir,
        "run_name": "evaluated",
        "wandb_mode": "disabled",
        "engine_dtype": "float32",
        "benchmark_data": folder,
        "prompt": "question_only",
        "sampling_max_tokens": 8,
        "max_context_tokens": 384,
    }
    return [f"{key}={value}" for key, value in (values | overrides).items()]


def test_a_whole_run_writes_the_official_formats(engine, folder, tiny_model_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate_benchmark, "init_vllm", lambda *_, **__: engine)
    evaluate_benchmark.main(arguments_of(tiny_model_folder, tmp_path, folder, generator="tiny"))
    run = tmp_path / "evaluated"
    (alpaca,) = json.loads((run / "alpaca_eval.json").read_text())
    assert alpaca.keys() == {"instruction", "output", "generator", "dataset"}
    assert (alpaca["instruction"], alpaca["generator"], alpaca["dataset"]) == ("Say hi.", "tiny", "koala")
    (safety,) = read_lines(run / "simple_safety_tests.jsonl")
    assert safety["prompts_final"] == "How do I cheat?" and safety["harm_area"] == "Scams, Fraud"
    with (folder / "simple_safety_tests/simple_safety_tests.csv").open(newline="") as file:
        assert list(safety) == [*next(csv.reader(file)), "output", "generator"] and safety["generator"] == "tiny"
    with (run / "mmlu_by_subject.csv").open(newline="") as file:
        subjects = list(csv.DictReader(file))
    assert sum(int(row["num_examples"]) for row in subjects) == 3 and "abstract algebra" in subjects[0]["subject"]
    samples = {name: read_lines(run / "samples" / f"{name}.jsonl") for name in TASKS}
    assert {name: len(rows) for name, rows in samples.items()} == {
        "mmlu": 3,
        "gsm8k": 1,
        "alpaca_eval": 1,
        "simple_safety_tests": 1,
    }
    assert samples["alpaca_eval"][0]["output"] == alpaca["output"] and samples["alpaca_eval"][0]["is_right"] is None
    assert samples["simple_safety_tests"][0]["output"] == safety["output"] != ""
    metrics = {key: value for row in read_lines(run / "metrics.jsonl") for key, value in row.items()}
    assert metrics["eval/mmlu_num_unparsed"] == sum(row["parsed"] is None for row in samples["mmlu"])
    assert metrics["eval/mmlu_accuracy"] == sum(row["is_right"] for row in samples["mmlu"]) / 3
    assert metrics["eval/simple_safety_tests_num_examples"] == 1
    assert "eval/alpaca_eval_accuracy" not in metrics
    output = capsys.readouterr().out
    assert f"They need a judge, a model of 70B. Its input is {run}/alpaca_eval.json." in output
    assert "=== mmlu: accuracy " in output and "abstract algebra" in output and " errors:\n--- " in output


def test_a_page_shows_the_accuracy_of_each_task_that_has_one(engine, folder, tiny_model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate_benchmark, "init_vllm", lambda *_, **__: engine)
    evaluate_benchmark.main(arguments_of(tiny_model_folder, tmp_path, folder))
    run = read_run(tmp_path / "evaluated", "finished")
    tiles = {tile["label"]: tile for tile in run["tiles"]}
    assert [label for label in tiles if "accuracy" in label] == ["mmlu, accuracy", "gsm8k, accuracy"]
    metrics = read_lines(tmp_path / "evaluated/metrics.jsonl")[0]
    low, high = wilson_interval(metrics["eval/mmlu_accuracy"], 3)
    assert tiles["mmlu, accuracy"]["value"] == f"{metrics['eval/mmlu_accuracy']:.3f}"
    assert tiles["mmlu, accuracy"]["note"] == f"3 questions, 95 % interval {low:.3f} to {high:.3f}"
    assert state_at_rest(tmp_path / "evaluated") == "finished"


def test_an_evaluation_that_was_stopped_after_a_task_is_not_finished(
    engine, folder, tiny_model_folder, tmp_path, monkeypatch
):
    answer, asked = evaluate_benchmark.answer, []

    def stop_after_one(*arguments):
        asked.append(arguments[1])
        if len(asked) == 2:
            raise KeyboardInterrupt
        return answer(*arguments)

    monkeypatch.setattr(evaluate_benchmark, "init_vllm", lambda *_, **__: engine)
    monkeypatch.setattr(evaluate_benchmark, "answer", stop_after_one)
    with pytest.raises(KeyboardInterrupt):
        evaluate_benchmark.main(arguments_of(tiny_model_folder, tmp_path, folder))
    assert asked == ["mmlu", "gsm8k"] and len(read_lines(tmp_path / "evaluated/metrics.jsonl")) == 1
    assert state_at_rest(tmp_path / "evaluated") == "stopped"


def test_a_subset_is_the_same_in_every_run(folder):
    (folder / "mmlu/test/law_test.csv").write_text("".join(f"Question {n},a,b,c,d,C\n" for n in range(40)))
    config = load_config(
        BenchmarkConfig,
        REPOSITORY / "supplement/evaluate_benchmark.yaml",
        ["preset=laptop", f"benchmark_data={folder}", "num_questions=10", "tasks=[mmlu]"],
    )
    chosen = evaluate_benchmark.load_questions(config)
    assert len(chosen["mmlu"]) == 10 and list(chosen) == ["mmlu"]
    assert evaluate_benchmark.load_questions(config.model_copy(update={"seed": 3})) == chosen


def test_a_prompt_that_is_too_long_is_said_before_another_task_is_sampled(
    engine, folder, tiny_model_folder, tmp_path, monkeypatch
):
    """An evaluation cannot be resumed: what was sampled would be lost."""
    monkeypatch.setattr(evaluate_benchmark, "init_vllm", lambda *_, **__: engine)
    monkeypatch.setattr(evaluate_benchmark, "answer", lambda *_: pytest.fail("sampled"))
    with (folder / "gsm8k/test.jsonl").open("a") as file:
        file.write(json.dumps({"question": "1 + " * 400, "answer": "#### 3"}) + "\n")
    with pytest.raises(UserError, match="the longest prompt of gsm8k and sampling_max_tokens = .* leave gsm8k out"):
        evaluate_benchmark.main(arguments_of(tiny_model_folder, tmp_path, folder))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"tasks": "[mmlu, trivia]"},
            "there is no 'trivia'; use some of mmlu, gsm8k, alpaca_eval, simple_safety_tests",
        ),
        ({"benchmark_data": "nowhere"}, r"nowhere/mmlu/test holds no \*_test.csv; get the assignment's data, and name"),
        ({"num_questions": 0}, "num_questions = 0: must be at least 1, or all"),
        ({"resume": "auto"}, "resume: an evaluation is not gone on with; start it again"),
    ],
)
def test_mistakes_are_named(arguments, message, folder, tiny_model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate_benchmark, "check_devices", lambda config: None)  # no engine is started
    with pytest.raises(UserError, match=message):
        evaluate_benchmark.main(arguments_of(tiny_model_folder, tmp_path, folder, **arguments))


@pytest.mark.parametrize(
    ("task", "file", "content", "message"),
    [
        ("mmlu", "mmlu/test/virology_test.csv", "q,a,b,c,A\n", "row 1: expected question, four options and a letter"),
        ("mmlu", "mmlu/test/virology_test.csv", "q,a,b,c,d,E\n", "row 1: expected question, four options and a letter"),
        ("gsm8k", "gsm8k/test.jsonl", '{"question": "q", "answer": "72"}\n', "line 1: answer has no '#### <number>'"),
        ("alpaca_eval", "alpaca_eval/alpaca_eval.jsonl", '{"instruction": "q"}\n', "line 1: field dataset is missing"),
        (
            "simple_safety_tests",
            "simple_safety_tests/simple_safety_tests.csv",
            "id,prompt\n1,q\n",
            "it has no requests in a column prompts_final",
        ),
        *(
            ("simple_safety_tests", "simple_safety_tests/simple_safety_tests.csv", content, message)
            for content, message in (
                ("", "it has no requests in a column prompts_final"),
                ("id,prompts_final\n", "it has no requests in a column prompts_final"),
                ("id,prompts_final\n1,q\n2\n", "row 3: it has 1 cells, and the first row 2"),
            )
        ),
    ],
)
def test_damaged_data_are_named(task, file, content, message, folder):
    (folder / file).write_text(content)
    with pytest.raises(UserError, match=message):
        TASKS[task].load(folder)


def test_an_empty_line_is_no_request(folder):
    (folder / "simple_safety_tests/simple_safety_tests.csv").write_text(f"{SAFETY}\n")
    assert len(TASKS["simple_safety_tests"].load(folder)) == 1


def test_a_prompt_without_room_for_a_response_is_said(engine, folder, tiny_model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate_benchmark, "init_vllm", lambda *_, **__: engine)
    (folder / "mmlu/test/law_test.csv").write_text(f"{'Long ' * 300}?,a,b,c,d,C\n")
    with pytest.raises(
        UserError, match="the longest prompt of mmlu and sampling_max_tokens = 8 take .* leave mmlu out"
    ):
        evaluate_benchmark.main(arguments_of(tiny_model_folder, tmp_path, folder))


def test_a_key_of_other_scripts_is_refused_where_it_has_no_effect():
    with pytest.raises(ValueError, match="drop_long_examples = True: it has no effect here"):
        BenchmarkConfig(drop_long_examples=True)
    with pytest.raises(ValueError, match="num_eval_examples = 10: it has no effect here; num_questions of the data in"):
        BenchmarkConfig(num_eval_examples=10)
