"""What one looks at in a run: training.png, the printed examples, and report.html, opened in a real browser."""

import csv
import json
import re
import shutil

import pytest
from browser import PATH, WHY_NOT, Browser
from test_run_records import BrokenWandb, read_wandb
from tiny import REPOSITORY, read_lines

from experiments import runs
from experiments.sweep_results import collect_run, summarize_run
from plainrl.cli import load_config
from plainrl.clock import is_out_of_time
from plainrl.config import GRPOConfig, SFTConfig
from plainrl.records import Example, Response, Rollout, UserError
from plainrl.report import contents, curves, page, renew
from plainrl.report.contents import describe_responses, read_run
from plainrl.report.curves import with_axes
from plainrl.report.samples import (
    Template,
    describe_examples,
    list_sample_files,
    read_samples,
    shorten,
    split_into_groups,
)
from plainrl.rollouts import write_rollouts
from plainrl.run_folder import RunFolder
from plainrl.several_samples import interval_of_mean, summarize_samples, wilson_interval
from policy_evaluation import log_generations

HOSTILE = "<script>document.title = 'broken'</script><img src=x onerror=alert(1)>&amp; \u202e </script><!-- "
needs_browser = pytest.mark.skipif(PATH is None, reason=WHY_NOT)


@pytest.fixture(autouse=True)
def drawn(monkeypatch):
    """The folders whose training.png is drawn, which here takes no time."""
    folders = []
    monkeypatch.setattr(renew, "draw_training_figure", folders.append)
    return folders


def grpo_config(folder, *arguments, **values):
    values = {"preset": "laptop", "runs_dir": folder, "wandb_mode": "disabled", **values}
    return load_config(
        GRPOConfig, REPOSITORY / "grpo_train.yaml", [*(f"{k}={v}" for k, v in values.items()), *arguments]
    )


def response(text, num_tokens=12, reason="stop"):
    return Response([1], text, [7] * num_tokens, [], reason)


def right(answer):
    return f" so it is {answer} </think> <answer> {answer} </answer>"


def write_evaluation(run, step, texts, template, prefix="eval"):
    """The samples of an evaluation, as the scripts write them: question i is `i + 1`, whose answer is i + 1."""
    rewards = []
    for number, text in enumerate(texts):
        kept = float("</answer>" in text)
        answer = float(f"<answer> {number + 1} </answer>" in text)
        rewards.append({"format_reward": kept, "answer_reward": answer, "reward": answer})
    log_generations(
        [template.replace("{question}", f"What is {number} + 1?") for number in range(len(texts))],
        [response(text, 12 + number, "stop" if "</answer>" in text else "length") for number, text in enumerate(texts)],
        [str(number + 1) for number in range(len(texts))],
        rewards,
        [0.5] * len(texts),
        run.path / "samples" / f"{prefix}_{step:06d}.jsonl",
    )
    score = sum(reward["answer_reward"] for reward in rewards) / len(texts)
    values = {"answer_reward": score, "format_reward": 0.75, "num_examples": len(texts), "seconds": 30.0}
    values |= {"num_format_1_answer_1": round(score * len(texts)), "num_format_1_answer_0": 0}
    values |= {"num_format_0": len(texts) - round(score * len(texts)), "response_length": 14.0 + step}
    run.log({"eval_step": step} | {f"{prefix}/{name}": value for name, value in values.items()})


def make_run(folder, num_steps=3, texts=(), name="mine", **values):
    """A run of GRPO: an evaluation before it and after each step, of which the last has all of `texts`."""
    config = grpo_config(folder, run_name=name, n_grpo_steps=num_steps, num_logged_groups=1, group_size=4, **values)
    template = (REPOSITORY / "plainrl/prompts/r1_zero.prompt").read_text()
    texts = list(texts) or [right(1), right(7), "no end", right(4)]
    with RunFolder.create(config, "grpo") as run:
        write_evaluation(run, 0, ["nothing"] * len(texts), template)
        for step in range(1, num_steps + 1):
            example = Example("q", template.replace("{question}", f"Is it {step}?"), "5", None, "here")
            rewards = {"format_reward": 1.0, "reward": 1.0, "answer_reward": 1.0}
            wrong = {"format_reward": 0.0, "reward": 0.0, "answer_reward": 0.0}
            pair = [Rollout(example, response(right(5)), rewards, -0.25), Rollout(example, response("x"), wrong, 0.75)]
            write_rollouts(run.path / "samples" / f"rollouts_{step:06d}.jsonl", pair * 2, config)
            row = {"train/grad_norm": 1.0 / 3 + step, "rollout/reward": 0.1 * step, "rollout/format_reward": 1.0}
            row |= {"train/token_entropy": 0.5, "rollout/log_prob_gap_multiplicative": 1.001}
            row |= {"time/rollout": 20.0, "time/train": 40.0, "time/step": 60.0}
            run.log({"train_step": step, **row})
            write_evaluation(run, step, texts if step == num_steps else ["nothing"] * len(texts), template)
            run.show_evaluation(step, config.num_printed_examples)
        write_evaluation(run, num_steps, texts * 2, template, "eval_all")
        (run.path / "final").mkdir()
    return run.path


def data_of(path):
    """The JSON block of a page."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', path.read_text())[1])


# --- the contents ---------------------------------------------------------------------------------------------------


def test_the_axes_of_an_off_policy_run():
    """Two optimizer steps a batch: the first half way to the batch's end. Evaluations take time, too."""
    rows = [
        {"eval_step": 0, "eval/seconds": 60.0},
        *({"train_step": 1}, {"train_step": 2, "time/step": 120.0}),
        *({"train_step": 3}, {"train_step": 4, "time/step": 60.0}),
        {"eval_step": 2, "eval/seconds": 30.0},
        {"eval_step": 2, "eval_all/seconds": 90.0},
    ]
    placed = with_axes(rows)
    assert [row["step"] for row in placed] == [0, 0.5, 1, 1.5, 2, 2, 2]
    assert [row["minutes"] for row in placed] == [1, 2, 3, 3.5, 4, 4.5, 6]
    assert with_axes([{"eval_step": 4}, {"train_step": 9}])[1]["step"] == 5  # a resumed run's, before it is complete


def test_the_time_in_which_dpo_scores_its_pairs_counts(tmp_path):
    """It is most of the time of an evaluation, or all of it: `max_training_hours`, the table and the page have it."""
    with RunFolder.create(SFTConfig(runs_dir=str(tmp_path), wandb_mode="disabled", run_name="mine"), "dpo") as run:
        run.log({"eval_step": 0, "eval/accuracy": 0.5, "eval/pair_seconds": 40.0})
        run.log({"eval_step": 0, "eval/answer_reward": 0.5, "eval/seconds": 20.0})
        run.log({"train_step": 1, "time/step": 60.0})
        run.log({"eval_step": 1, "eval/accuracy": 0.75, "eval/pair_seconds": 60.0})
    rows = run.read_metrics()
    assert [row["minutes"] for row in with_axes(rows)] == [pytest.approx(40 / 60, abs=1e-4), 1, 2, 3]
    used = run.used()
    assert used.seconds == 180
    assert is_out_of_time(used, max_hours=0.08) and not is_out_of_time(used, max_hours=0.09)  # another 140 seconds
    assert runs.describe_run(run.path)[0]["time"] == "0:03:00"
    assert summarize_run(run.path)["minutes"] == 3
    assert dict(contents.sum_times(with_axes(rows)))["evaluation"] == 120


def test_the_values_of_a_page_are_those_of_the_metrics_and_of_the_committed_csv(tmp_path):
    folder = make_run(tmp_path)
    (run,) = data_of(folder / "report.html")["runs"]
    rows = read_lines(folder / "metrics.jsonl")
    names = {name for row in rows for name, value in row.items() if value is not None}
    assert run["curves"]["metrics"].keys() == names
    for name in names:
        assert run["curves"]["metrics"][name][1] == [row[name] for row in rows if row.get(name) is not None]
    places = run["curves"]["metrics"]["train/grad_norm"][0]
    assert [run["curves"]["step"][place] for place in places] == [1, 2, 3]
    collect_run(folder, tmp_path / "results", {"variant": "a", "seed": 0, "fingerprint": ""}, 1.0, ["a"])
    with (tmp_path / "results/metrics.csv").open() as file:
        table = list(csv.DictReader(file))
    for name in ("train/grad_norm", "eval/answer_reward", "eval_all/answer_reward"):
        assert [row[name] for row in table if row[name]] == [f"{v:.5g}" for v in run["curves"]["metrics"][name][1]]
    assert run["summary"] == {
        **{"step": "3 of 3", "first": "0.000", "last": "0.500", "best": "0.500", "all questions": "0.250"},
        "time": "5 min 30 s",  # three steps of a minute, five evaluations of 30 seconds
    }
    # Wilson's interval of 2 right of 4, by hand: (0.5 + 0.4802 -+ 1.96 sqrt(0.0625 + 0.06)) / 1.9604
    assert run["tiles"][0] == {
        "label": "validation answer reward",
        "value": "0.000 \u2192 0.500",
        "note": "4 questions, 95 % interval 0.150 to 0.850; best 0.500 at step 3",
    }
    assert run["times"] == [["rollout", 60.0], ["train", 120.0], ["evaluation", 150.0]]


def test_the_data_of_a_page_are_those_that_were_read():
    def facts(**settings):
        return dict(contents.describe_facts({"train_data": "a.jsonl", "validation_data": "b.jsonl"} | settings, {}))

    assert facts()["data"] == "a.jsonl, validated on b.jsonl"
    assert facts(validation_data="a.jsonl")["data"] == "a.jsonl"
    assert facts(validation_fraction=0.05)["data"] == "a.jsonl, validated on 5 % of a.jsonl"
    assert facts(validation_data="")["data"] == "a.jsonl"  # DPO without questions


def test_the_score_of_several_responses_has_its_interval_over_questions():
    samples = [{"question": n, "response": str(s), "answer_reward": float(s < 3 * n)} for n in (0, 1) for s in range(4)]
    several = {f"eval/{name}": value for name, value in summarize_samples(samples, None).items()}
    row = {"eval_step": 0, "step": 0, "minutes": 0.0, "eval/answer_reward": 3 / 8, "eval/num_examples": 2} | several
    row |= {"eval/num_format_1_answer_1": 3, "eval/num_format_1_answer_0": 5, "eval/num_format_0": 0}
    (tile, _) = contents.describe_tiles([row], {})
    low, high = interval_of_mean([0.0, 0.75])
    assert tile["note"] == f"2 questions, 95 % interval {low:.3f} to {high:.3f}"
    (tile, _) = contents.describe_tiles([row | {"eval/answer_reward": 0.5}], {})  # rewards between 0 and 1
    assert tile["note"] == "2 questions"
    of_one = {"eval_step": 0, "step": 0, "minutes": 0.0, "eval/num_examples": 8, "eval/num_format_0": 0}
    halves = of_one | {"eval/answer_reward": 0.5, "eval/num_format_1_answer_1": 0, "eval/num_format_1_answer_0": 8}
    assert contents.describe_tiles([halves], {})[0]["note"] == "8 questions"  # each response is half right
    low, high = wilson_interval(0.5, 8)
    right = halves | {"eval/num_format_1_answer_1": 4, "eval/num_format_1_answer_0": 4}
    assert contents.describe_tiles([right], {})[0]["note"] == f"8 questions, 95 % interval {low:.3f} to {high:.3f}"


def test_the_settings_that_differ_from_the_preset(tmp_path):
    run = read_run(make_run(tmp_path, learning_rate="3e-5"), "finished")
    changed = {key: (old, new) for key, old, new in run["preset"]["changed"]}
    assert changed.pop("learning_rate") == ("2e-05", "3e-05")
    assert changed.keys() == {"n_grpo_steps", "num_logged_groups", "group_size"}
    assert dict(run["settings"])["learning_rate"] == "3e-05"


def test_remarks_name_their_steps(tmp_path):
    run = read_run(make_run(tmp_path), "finished", config=grpo_config(tmp_path, max_grad_norm=0.02))
    ((remark, steps),) = run["remarks"]
    assert "gradient norm is over 100 times" in remark and steps == "steps 2 to 3"  # norms of 1.3, 2.3 and 3.3
    assert read_run(make_run(tmp_path, name="other"), "finished")["remarks"] == []


def test_printed_examples_page_and_samples_agree(tmp_path, capsys):
    """The first right and the first wrong response of the last evaluation, far behind in its file."""
    texts = ["cut"] * 300 + [right(301), "cut", right(303)]
    folder = make_run(tmp_path, texts=texts)
    printed = capsys.readouterr().out
    last = printed[printed.rindex("  right (") :]
    assert "  right (312 tokens)\n    question  What is 300 + 1?\n" in last
    assert (
        "    response  so it is 301 </think> <answer> 301 </answer>\n    truth     301\n  wrong (12 tokens, cut)"
        in last
    )
    samples, damaged = read_samples(folder / "samples/eval_000003.jsonl")
    assert damaged == 0 and samples[300]["response"] == right(301)
    (run,) = data_of(folder / "report.html")["runs"]
    groups = {(g["kind"], g["step"], g["rank"]): g for g in run["groups"]}
    shown = groups["eval", 3, 300]
    assert (shown["question"], shown["truth"], shown["members"][0]["response"]) == (
        "What is 300 + 1?",
        "301",
        right(301),
    )
    assert samples[0]["response"] == "cut" and "    response  cut\n    truth     1" in last  # the first wrong one
    shown = groups["eval", 3, 0]
    assert (shown["question"], shown["truth"], shown["members"][0]["response"]) == ("What is 0 + 1?", "1", "cut")
    assert run["numResponses"] == 4 * 303 + 606 + 3 * 4


def test_no_example_is_printed_if_none_is_asked_for(tmp_path, capsys):
    make_run(tmp_path, num_printed_examples=0)
    assert "question" not in capsys.readouterr().out


def test_a_printed_response_cannot_command_the_terminal():
    samples = [
        {"answer_reward": 1.0, "prompt": "Q: x\nA:", "response": "\x1b[2Jred\r\nb\ud800", "ground_truth": "a\tb"}
    ]
    (text,) = describe_examples(samples, 1, Template("Q: ", "\nA:"))
    assert text.splitlines()[1:] == [
        "    question  x",
        "    response  \\x1b[2Jred\\r",
        "              b\\ud800",
        "    truth     a\\tb",
    ]
    assert shorten("a" * 1000, 600).count("a") == 602 and "[... 400 characters ...]" in shorten("a" * 1000, 600)


def test_what_does_not_fit_is_left_out_evenly_and_counted(tmp_path, monkeypatch):
    folder = make_run(tmp_path, num_steps=9)
    monkeypatch.setattr(contents, "SHOWN_BYTES", 6000)
    found = describe_responses(folder, {"prompt": "r1_zero", "group_size": 4})
    rollout_steps = {group["step"] for group in found["groups"] if group["kind"] == "rollouts"}
    assert {1, 9, 5} <= rollout_steps < set(range(1, 10))  # the first, the last and the middle before the others
    assert {("eval", 0), ("eval", 9)} <= {(group["kind"], group["step"]) for group in found["groups"]}
    assert len(contents.to_json(found["groups"])) < 6000 and found["numResponses"] == 10 * 4 + 8 + 9 * 4


def test_of_many_files_some_are_read_and_all_counted(tmp_path, monkeypatch):
    """A run of 100,000 steps has thousands, which would all be read again at each evaluation."""
    folder = make_run(tmp_path, num_steps=9)
    monkeypatch.setattr(contents, "MOST_FILES", 3)
    found = describe_responses(folder, {"prompt": "r1_zero", "group_size": 4})
    assert {group["step"] for group in found["groups"] if group["kind"] == "rollouts"} == {1, 5, 9}
    assert found["numResponses"] == 10 * 4 + 8 + 9 * 4


def test_no_group_has_responses_to_two_questions():
    """After a resume with another group_size the files of before have smaller groups."""
    samples = [{"prompt": prompt} for prompt in "aabbbb"]
    assert split_into_groups(samples, "rollouts", 4) == [[0, 1], [2, 3], [4, 5]]
    assert split_into_groups(samples[:4], "rollouts", 2) == [[0, 1], [2, 3]]


def test_runs_of_one_name_are_told_apart(tmp_path):
    folders = [make_run(tmp_path / name) for name in ("one", "two")]
    path = runs.write_report([*map(str, folders), str(tmp_path / "both.html")])
    names = [f"{folder.parent.name}/{folder.name}" for folder in folders]
    assert all(json.dumps(name) in path.read_text() for name in names) and names[0] != names[1]


@pytest.mark.parametrize("num_printed", [1, 3])
def test_what_was_printed_stays_in_a_full_page(tmp_path, monkeypatch, num_printed):
    """Right answers that come last. Without their precedence they would be the first to be left out."""
    folder = make_run(tmp_path, num_steps=2)
    for step in range(3):
        rows = [{"prompt": f"Q{n}", "question": n, "response": "r" * 80, "answer_reward": n > 96} for n in range(100)]
        lines = [json.dumps(row | {"answer_reward": float(row["answer_reward"])}) for row in rows]
        (folder / f"samples/eval_{step:06d}.jsonl").write_text("\n".join(lines) + "\n")
    monkeypatch.setattr(contents, "SHOWN_BYTES", 12000)
    found = describe_responses(folder, {"prompt": "r1_zero", "group_size": 4, "num_printed_examples": num_printed})
    shown = {(group["step"], group["rank"]) for group in found["groups"] if group["kind"] == "eval"}
    printed = {(step, rank) for step in range(3) for rank in [*range(num_printed), *range(97, 97 + num_printed)]}
    assert printed <= shown and len(shown) < 150


def test_without_training_responses_the_page_is_filled_with_evaluations(tmp_path, monkeypatch):
    """SFT and an evaluation sample no training responses. They had half a page."""
    folder = make_run(tmp_path, num_steps=9)
    for file in (folder / "samples").glob("rollouts_*"):
        file.unlink()
    monkeypatch.setattr(contents, "SHOWN_BYTES", 6000)
    groups = describe_responses(folder, {"prompt": "r1_zero", "group_size": 4})["groups"]
    assert 5000 < len(contents.to_json(groups)) < 6000


def test_a_damaged_line_of_the_samples_is_counted(tmp_path):
    folder = make_run(tmp_path)
    with (folder / "samples/eval_000003.jsonl").open("a") as file:
        file.write('{"prompt": "x", "resp\n[1]\n{"prompt": 1}\n')
    found = describe_responses(folder, {"prompt": "gone.prompt", "group_size": 4})
    assert found["numDamaged"] == 3 and found["template"] == ["", ""]
    assert all(not group["hasTemplate"] for group in found["groups"])


def test_several_validation_sets_share_a_panel():
    names = ["eval/aime/answer_reward", "eval/gsm8k/answer_reward", "rollout/reward"]
    assert list(curves.lines_of(curves.PANELS[0], names)) == names


# --- when it is written ---------------------------------------------------------------------------------------------


def test_the_figure_has_the_training_reward(tmp_path, monkeypatch, drawn):
    folder = make_run(tmp_path)
    assert drawn == [folder] * 3  # at each evaluation
    monkeypatch.setattr(curves, "plot_metrics", lambda panels, *_: drawn.append(panels))
    curves.draw_training_figure(folder)
    lines = {line.label: line.points for line in drawn[-1]["reward (share)"]}
    assert lines["training"] == [(1, 0.1), (2, 0.2), (3, pytest.approx(0.3))]
    assert lines["validation, answer"] == [(0, 0.0), (1, 0.0), (2, 0.0), (3, 0.5)]
    (folder / "metrics.jsonl").write_text('{"eval_step": 0, "eval/answer_reward": 0.5}\n')
    curves.draw_training_figure(folder)
    assert len(drawn) == 4  # a single point is no curve


def state_in(folder):
    (run,) = data_of(folder / "report.html")["runs"]
    return run["state"], run["ending"]


def test_a_page_says_how_its_run_is(tmp_path):
    folder = make_run(tmp_path)
    assert state_in(folder) == ("finished", "")
    config = grpo_config(tmp_path, run_name="other")
    with pytest.raises(UserError), RunFolder.create(config, "grpo") as run:
        run.log({"train_step": 1, "train/loss": 1.0})
        run.show_evaluation(0, num_printed=1)
        assert state_in(run.path) == ("running", "")
        (run.path / "checkpoints/step_000001").mkdir(parents=True)
        raise UserError("lower learning_rate")
    assert state_in(run.path) == ("stopped, can be resumed", "ended by: lower learning_rate")


def test_a_page_that_cannot_be_written_ends_no_run(tmp_path, monkeypatch, capsys):
    def broken(*_):
        raise RecursionError("no page\nmore")

    monkeypatch.setattr(renew, "write_page", broken)
    folder = make_run(tmp_path)
    assert f"warning: {folder}/report.html could not be written (no page)\n" in capsys.readouterr().err


def test_wandb_gets_a_table_of_samples(tmp_path):
    config = SFTConfig(runs_dir=str(tmp_path), wandb_mode="offline", run_name="mine")
    with RunFolder.create(config, "sft") as run:
        run.start_wandb()
        write_evaluation(run, 0, [right(1), "x"], "{question}")
        run.show_evaluation(0, num_printed=1)
    (written,) = run.path.glob("wandb/offline-run-*/*.wandb")
    items = [item for record in read_wandb(written) for item in record.history.item]
    logged = {"/".join(item.nested_key): json.loads(item.value_json) for item in items}
    assert logged["eval/samples/_type"] == "table-file" and logged["eval/samples/nrows"] == 2
    (file,) = run.path.glob("wandb/offline-run-*/files/media/table/**/*.json")
    values = json.loads(file.read_text())
    assert dict(zip(values["columns"], values["data"][0], strict=True)).items() >= {
        ("question", "What is 0 + 1?"),
        ("response", right(1)),
        ("reward", 1),
    }


def test_a_table_that_wandb_refuses_ends_no_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("wandb.init", lambda **_: BrokenWandb("log"))
    with RunFolder.create(SFTConfig(runs_dir=str(tmp_path), wandb_mode="offline", run_name="mine"), "sft") as run:
        run.start_wandb()
        write_evaluation(run, 0, [right(1)], "{question}")
        run.show_evaluation(0, num_printed=1)
    assert "wandb failed (log failed)" in capsys.readouterr().out


def test_the_command_for_one_run_and_for_several(tmp_path, capsys):
    one, other = make_run(tmp_path), make_run(tmp_path, name="other", learning_rate="3e-5")
    (one / "report.html").unlink()
    capsys.readouterr()
    runs.main(["report", str(one)])
    assert capsys.readouterr().out == f"page: {one / 'report.html'}\n"
    assert [run["name"] for run in data_of(one / "report.html")["runs"]] == ["mine"]
    runs.main(["report", str(one), str(other)])
    beside = tmp_path / "report_mine_other.html"
    assert [run["state"] for run in data_of(beside)["runs"]] == ["finished", "finished"]
    runs.main(["report", str(one), str(other), str(tmp_path / "both.html")])
    assert (tmp_path / "both.html").stat().st_size == beside.stat().st_size
    for arguments, message in (
        (["report"], "usage: "),
        (["report", "x.html"], "name one run or several"),
        (["report", str(tmp_path)], f"{tmp_path} is no run"),
        (["report", str(one), str(tmp_path / "none/x.html")], "cannot be written .No such file"),
    ):
        with pytest.raises(UserError, match=message):
            runs.main(arguments)


# --- in a browser ---------------------------------------------------------------------------------------------------


def test_no_text_of_a_run_is_html(tmp_path):
    """Without a browser: whatever a response says, the page has its own two elements alone, and its policy holds."""
    folder = make_run(tmp_path, texts=[HOSTILE, right(HOSTILE)], name="a<b>")
    text = (folder / "report.html").read_text()
    assert text.count("<script") == 2 and text.count("</script>") == 2 and "<img" not in text
    assert "<title>a&lt;b&gt;</title>" in text
    for kind, block in re.findall(r"<(style|script)>(.*?)</\1>", text, re.DOTALL):
        assert f"{kind}-src '{page._hash(block)}'" in text
    assert {g["members"][0]["response"] for g in data_of(folder / "report.html")["runs"][0]["groups"]} >= {HOSTILE}


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


@needs_browser
def test_a_page_works_in_a_browser(browser, tmp_path):
    folder = make_run(tmp_path, texts=[right(1), right(7), "no end", HOSTILE])
    browser.open(folder / "report.html")
    assert browser.texts("h1") == ["mine"] and browser.texts(".state") == ["finished"]
    assert browser.texts(".tile .value")[0] == "0.000 \u2192 0.250"
    assert browser.texts("h2") == ["Curves", "Time by phase", "Responses", "Settings"]
    assert browser.evaluate("document.querySelectorAll('.chart svg path').length") > 3
    assert browser.texts(".responses button[data-key]") == ["all 4", "right 1", "wrong 3", "truncated 2", "no format 2"]
    for key, questions in {
        "right": ["What is 0 + 1?"],
        "wrong": ["What is 1 + 1?", "What is 2 + 1?", "What is 3 + 1?"],
        "truncated": ["What is 2 + 1?", "What is 3 + 1?"],
        "unformatted": ["What is 2 + 1?", "What is 3 + 1?"],
    }.items():
        browser.click(f".responses button[data-key={key}]")
        assert browser.texts(".question") == questions
    assert browser.texts(".response")[1] == HOSTILE and browser.evaluate("document.title") == "mine"
    assert browser.evaluate("document.querySelectorAll('.responses script, .responses img').length") == 0
    browser.click(".responses button[data-key=all]")
    assert browser.texts(".member.right .answer") == [" 1 "] and browser.texts(".member.right .think") == [
        "so it is 1 "
    ]
    assert browser.errors == []


@needs_browser
def test_what_needs_attention_and_what_differs_from_the_preset_stand_in_the_page(browser, tmp_path):
    folder = make_run(tmp_path, learning_rate="3e-5", max_grad_norm=0.02)
    browser.open(folder / "report.html")
    (remark,) = browser.texts(".remarks li")
    assert "gradient norm is over 100 times" in remark and "steps 2 to 3" in remark
    rows = browser.evaluate(
        "[...document.querySelectorAll('.changed > .scroll tbody tr')]"
        ".map((row) => [...row.cells].map((cell) => cell.textContent))"
    )
    assert browser.texts(".changed h3") == ["what differs from preset laptop"]
    assert ["learning_rate", "2e-05", "3e-05"] in rows and ["n_grpo_steps", "24", "3"] in rows and len(rows) == 5
    titles = " ".join(browser.texts(".chart h3"))
    assert "entropy (nats per token)" in titles and "engine against policy (factor)" in titles
    assert browser.errors == []


def give(browser, selector, value, event):
    """Put a value into an element as a user would: the page hears of it by an event."""
    element = f"document.querySelector({json.dumps(selector)})"
    browser.evaluate(
        f"{element}.value = {json.dumps(value)}; {element}.dispatchEvent(new Event('{event}', {{bubbles: true}}));"
        "new Promise((done) => setTimeout(done, 300))"  # the search waits for the next letter
    )


@needs_browser
def test_the_step_and_the_search_are_chosen_by_hand(browser, tmp_path):
    browser.open(make_run(tmp_path) / "report.html")
    assert browser.texts(".response") == [right(1).strip(), right(7).strip(), "no end", right(4).strip()]
    assert browser.texts(".truth") == ["1", "2", "3", "4"]
    give(browser, ".responses select[aria-label=step]", "0", "change")
    assert browser.texts(".response") == ["nothing"] * 4
    give(browser, ".responses select[aria-label=step]", "3", "change")
    give(browser, ".responses input", "NO EN", "input")
    assert browser.texts(".response mark") == ["no en"] and browser.texts(".truth") == ["3"]
    assert browser.evaluate("document.activeElement.value") == "NO EN"  # one can go on typing
    give(browser, ".responses input", "nowhere", "input")
    assert browser.texts(".response") == [] and browser.texts(".responses .list + *") == ["None."]
    assert browser.errors == []


@needs_browser
def test_steps_groups_search_and_one_question_over_time(browser, tmp_path):
    folder = make_run(tmp_path)
    browser.open(folder / "report.html", "#kind=rollouts&step=2")
    assert browser.texts(".question") == ["Is it 2?"] and len(browser.texts(".member")) == 4  # a group side by side
    assert browser.texts(".member .numbers")[1] == "reward 0 \u00b7 advantage +0.75 \u00b7 12 tokens"
    rights = "[...document.querySelectorAll('.member')].map((m) => m.getBoundingClientRect().top)"
    assert len(set(browser.evaluate(rights))) == 1
    browser.open(folder / "report.html", "#search=IS+7")
    assert browser.texts(".question") == ["What is 1 + 1?"] and browser.texts(".response mark") == ["is 7"]
    browser.open(folder / "report.html", "#show=right")
    browser.click(".follow")
    assert browser.texts(".responses h2") == ["One question, step by step"]
    assert [text.split(", ")[-1] for text in browser.texts(".group .row > .small.soft")] == [
        *("step 0", "step 1", "step 2", "step 3", "step 3"),
    ]
    browser.click(".unfollow")
    assert browser.texts(".responses h2") == ["Responses"]
    # The whole prompt is folded, with the template around the question.
    assert browser.evaluate("document.querySelector('details').open") is False
    assert browser.texts(".prompt")[0].startswith("A conversation between User and Assistant.")
    assert browser.texts(".prompt")[0].endswith("User: What is 0 + 1?\nAssistant: <think>")
    assert browser.errors == []


@needs_browser
def test_curves_show_their_values_by_step_and_by_clock(browser, tmp_path):
    folder = make_run(tmp_path)
    browser.open(folder / "report.html")
    browser.evaluate("document.querySelector('.chart svg').focus()")
    for _ in range(2):
        browser.evaluate(
            "document.querySelector('.chart svg').dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowRight'}))"
        )
    assert browser.texts(".tip:not([hidden]) .soft") == ["step 1, 2 min"]
    assert browser.texts(".tip:not([hidden]) b") == ["0", "0.1", "0.75"]
    browser.click(".axis button[data-key=minutes]")
    assert "minutes of steps and evaluations" in browser.texts(".chart text")
    assert browser.errors == []


def test_a_metric_that_is_thinned_out_keeps_the_means_of_all_its_values(monkeypatch):
    """One value of ten is 1. The mean of the least and the greatest of each stretch would be one half."""
    rows = with_axes(
        [{"train_step": step, "train/a": float(step % 10 == 0), "time/step": 1.0} for step in range(1, 5001)]
    )
    places, values, means, window = contents.describe_curves(rows)["metrics"]["train/a"]
    assert len(places) == len(values) == len(means) == 1000 and window == 250
    assert sum(values) == 500 and max(abs(mean - 0.1) for mean in means[100:]) < 0.001
    assert len(contents.describe_curves(rows[:1000])["metrics"]["train/a"]) == 2  # the page smooths these itself


@needs_browser
def test_the_thick_line_of_a_thinned_metric_is_its_mean(browser, tmp_path):
    folder = make_run(tmp_path)
    rows = [{"train_step": n, "train/grad_norm": float(n % 10 == 0), "time/step": 1.0} for n in range(1, 5001)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    runs.main(["report", str(folder)])
    browser.open(folder / "report.html")
    assert any("(mean of 250)" in text for text in browser.texts(".legend"))
    paths = "[...document.querySelectorAll('.chart svg path:not(.raw)')].map((path) => path.getBBox().height)"
    assert max(browser.evaluate(paths)) < 25  # of 210 pixels: near 0.1 all along, but for its first values
    assert browser.errors == []


@needs_browser
def test_a_page_fits_a_phone_in_both_schemes(tmp_path):
    folder = make_run(tmp_path, texts=[right(1), "w" * 3000, right(3), HOSTILE])
    with Browser(tmp_path / "profile", width=390, height=800, dark=True) as phone:
        phone.open(folder / "report.html", "#step=every")
        assert phone.evaluate("document.documentElement.scrollWidth") == 390
        ground = phone.evaluate("getComputedStyle(document.body).backgroundColor")
        assert ground == "rgb(19, 19, 20)" and phone.errors == []


@needs_browser
def test_two_runs_in_one_page(browser, tmp_path):
    folders = [make_run(tmp_path), make_run(tmp_path, name="other", learning_rate="3e-5")]
    runs.main(["report", *map(str, folders)])
    browser.open(tmp_path / "report_mine_other.html")
    assert browser.texts("h1") == ["2 runs"]
    assert [row.split(" ")[0] for row in browser.texts(".runs tbody tr td:first-child")] == ["mine", "other"]
    assert browser.texts(".differ td") == ["learning_rate", "2e-05", "3e-05"]
    assert browser.errors == []


LOOKS = """[...document.querySelector('.chart').querySelectorAll('svg path:not(.raw)')].map(
    (path) => `${path.getAttribute('class')} ${path.getAttribute('stroke-dasharray')}`)"""


@needs_browser
def test_no_two_curves_of_a_panel_look_alike(browser, tmp_path):
    """Further validation sets of one run, and more runs than there are colors; the legend shows each as it is."""
    folders = [make_run(tmp_path, num_steps=2, name=f"run{number}") for number in range(8)]
    runs.main(["report", *map(str, folders), str(tmp_path / "page.html")])
    browser.open(tmp_path / "page.html")
    looks = browser.evaluate(LOOKS)
    assert len(looks) == len(set(looks)) == 8 * 3
    swatches = "[...document.querySelectorAll('.chart:first-child .legend > span .swatch')].map((s) => s.className)"
    assert len(set(browser.evaluate(swatches)[:8])) == 8
    rows = read_lines(folders[0] / "metrics.jsonl")
    for row in rows:
        row |= {f"eval/set{n}/answer_reward": n / 8 for n in range(4)} if "eval/answer_reward" in row else {}
    (folders[0] / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    runs.main(["report", str(folders[0])])
    browser.open(folders[0] / "report.html")
    looks = browser.evaluate(LOOKS)
    assert len(looks) == len(set(looks)) == 3 + 4
    assert browser.errors == []


@needs_browser
def test_times_have_no_part_of_sixty(browser, tmp_path):
    browser.open(make_run(tmp_path) / "report.html")
    for seconds, text in (
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (119.7, "2 min 0 s"),
        (3599.8, "1 h 0 min"),
        (7180, "2 h 0 min"),
    ):
        assert browser.evaluate(f"duration({seconds})") == text
    assert [browser.evaluate(f"duration({seconds})") for seconds in (0.25, 90, 5400)] == [
        "0.25 s",
        "1 min 30 s",
        "1 h 30 min",
    ]


@needs_browser
def test_a_run_without_responses_leaves_the_choice_of_the_run(browser, tmp_path):
    folders = [make_run(tmp_path), make_run(tmp_path, name="other")]
    shutil.rmtree(folders[0] / "samples")
    runs.main(["report", *map(str, folders)])
    for place in ("", "#run=0", "#run=0&kind=eval&step=2&search=x"):
        browser.open(tmp_path / "report_mine_other.html", place)
        assert browser.texts(".responses .list + *") == ["None."] and browser.texts(".question") == []
        assert browser.evaluate("document.querySelector('.responses select').value") == "0"
    browser.evaluate(
        "(() => { const s = document.querySelector('.responses select'); s.value = '1'; "
        "s.dispatchEvent(new Event('change')); })()"
    )
    assert browser.texts(".responses h2") == ["Responses"]
    assert browser.evaluate("document.querySelector('.responses select').value") == "1"
    assert browser.errors == []


@pytest.fixture(scope="module")
def long_page(tmp_path_factory):
    """Responses of 3 kB in 20 evaluations of 128 questions and in each of 200 batches: more than a page holds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(renew, "draw_training_figure", lambda _: None)
        folder = make_run(tmp_path_factory.mktemp("long"), num_steps=1)
    template = (REPOSITORY / "plainrl/prompts/r1_zero.prompt").read_text()
    long = " We have x < 3 & y." * 150
    rows = read_lines(folder / "metrics.jsonl")
    trained = [
        row | {f"train/{n}": n / 7 for n in range(50)} | {"train_step": step}
        for row in rows[1:2]
        for step in range(1, 201)
    ]
    metrics = [*trained, *({**rows[0], "eval_step": step} for step in range(0, 201, 10))]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    sample = {"response": long + right(1), "ground_truth": "1", "answer_reward": 1.0, "finish_reason": "stop"}
    for step in range(1, 201):
        lines = [json.dumps({"prompt": template.replace("{question}", f"{step} {n // 4}"), **sample}) for n in range(8)]
        (folder / f"samples/rollouts_{step:06d}.jsonl").write_text("\n".join(lines) + "\n")
    for step in range(10, 201, 10):
        lines = [
            json.dumps({"question": n, "prompt": template.replace("{question}", str(n)), **sample}) for n in range(128)
        ]
        (folder / f"samples/eval_{step:06d}.jsonl").write_text("\n".join(lines) + "\n")
    runs.main(["report", str(folder)])
    return folder / "report.html"


def test_the_page_of_200_steps_is_light(long_page):
    assert 2_000_000 < long_page.stat().st_size < 5_000_000


@needs_browser
def test_the_page_of_200_steps_opens_at_once(browser, long_page):
    assert min(browser.open(long_page) for _ in range(3)) < 2  # the fastest: other programs may be busy
    assert browser.errors == []


def test_the_samples_of_further_validation_sets_are_listed_under_their_names(tmp_path):
    for name in ("eval_000008", "gsm8k/eval_000008", "all/eval_000008", "gsm8k/eval_all_000008", "rollouts_000001"):
        path = tmp_path / f"samples/{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    kinds = [(file.kind, file.step) for file in list_sample_files(tmp_path)]
    assert kinds == [("eval", 8), ("eval/all", 8), ("eval/gsm8k", 8), ("eval_all/gsm8k", 8), ("rollouts", 1)]
