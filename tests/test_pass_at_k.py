"""The experiment on pass@k: from the metrics of runs to a CSV file, a figure and a table."""

import json
import re

import pytest
import yaml

from experiments import pass_at_k, plot_results
from plainrl.devices import run_command
from plainrl.records import UserError
from plainrl.several_samples import summarize_samples


def write_run(folder, rights, num_samples=4, prefix="eval", **settings):
    """A run whose evaluation has these numbers of right responses per question, after an earlier one with none."""
    folder.mkdir(parents=True)
    settings = {"num_eval_samples": num_samples, "sampling_temperature": 1.0} | settings
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    rows = []
    for counts in ([0] * len(rights), rights):
        examples = [
            {"question": question, "response": str(int(sample < right)), "answer_reward": float(sample < right)}
            for question, right in enumerate(counts)
            for sample in range(num_samples)
        ]
        metrics = summarize_samples(examples, str) | {"num_examples": len(rights)}
        rows.append({f"{prefix}/{name}": value for name, value in metrics.items()})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """A base model; SFT with two seeds; GRPO with two seeds, trained with final evaluations on all questions."""
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "base", [1, 0, 0, 0])
    write_run(tmp_path / "sft0", [2, 2, 0, 0])
    write_run(tmp_path / "sft1", [2, 2, 1, 0])
    for seed, right in enumerate((3, 4)):
        folder = write_run(tmp_path / f"grpo{seed}", [right, right, 0, 0], prefix="eval_all")
        other = write_run(tmp_path / f"other{seed}", [1, 1, 1, 1])  # its last evaluation during training
        (folder / "metrics.jsonl").write_text(
            (folder / "metrics.jsonl").read_text() + (other / "metrics.jsonl").read_text()
        )
    return ["sft=sft0", "base model=base", "sft=sft1", "GRPO=grpo0", "GRPO=grpo1"]


def test_runs_become_a_csv_a_figure_and_a_table(runs, tmp_path, capsys):
    readme = tmp_path / "results/pass_at_k/README.md"
    readme.parent.mkdir(parents=True)
    readme.write_text("# T\n<!-- table -->\nold\n<!-- end of table -->\nafter\n")
    pass_at_k.main(runs)
    lines = (tmp_path / "results/pass_at_k/pass_at_k.csv").read_text().splitlines()
    assert len(lines) == 1 + 5 * 3  # k = 1, 2, 4
    assert lines[0].startswith("variant,seed,k,num_questions,num_samples,temperature,pass,pass_low,pass_high,majority,")
    assert lines[1].startswith("sft,0,1,4,4,1,0.25,")  # 4 of 16
    assert lines[4].startswith("base model,0,1,4,4,1,0.0625,")
    assert lines[12].startswith("GRPO,0,4,4,4,1,0.5,")  # on all questions, and not the last one during training
    assert (tmp_path / "results/pass_at_k/pass_at_k.png").stat().st_size > 10_000
    table = readme.read_text()
    assert "old" not in table and table.endswith("after\n")
    cells = {line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ") for line in table.splitlines()[2:-2]}
    assert cells["policy"][1:] == ["runs", "pass@1", "pass@2", "pass@4", "maj@4"]
    # pass@4: 2 and 3 of 4 questions; a t-interval of two values has half a width of 12.7 times half their distance.
    assert cells["sft"][4] == "0.625 +- 1.588"
    assert re.fullmatch(r"0\.250 \(0\.\d{3} to 0\.\d{3}\)", cells["base model"][4])
    assert cells["GRPO"][4].startswith("0.500 +- 0.000; -0.125 +- ")
    assert cells["GRPO"][2].startswith("0.438 +- ")  # pass@1: 6 and 8 of 16
    # maj@4 of sft: two ties of two right and two wrong answers; in the other run one more question is 1 of 4.
    assert cells["sft"][5] == "0.250 +- 0.000" and cells["GRPO"][5].startswith("0.500 +- 0.000")
    assert "drawn: results/pass_at_k/pass_at_k.png" in capsys.readouterr().out


def test_what_was_collected_is_drawn_again(runs, tmp_path, capsys):
    pass_at_k.main(runs)
    first = capsys.readouterr().out.partition("drawn: ")[2]
    (tmp_path / "results/pass_at_k/pass_at_k.png").unlink()
    pass_at_k.main([])
    assert capsys.readouterr().out.partition("drawn: ")[2] == first
    assert (tmp_path / "results/pass_at_k/pass_at_k.png").exists()
    plot_results.write_all(tmp_path / "results", tmp_path / "elsewhere")  # with all other figures
    assert (tmp_path / "elsewhere/pass_at_k/pass_at_k.png").exists()


def test_what_is_collected_elsewhere_leaves_the_committed_results(runs, tmp_path):
    pass_at_k.main(runs)
    before = (tmp_path / "results/pass_at_k/pass_at_k.csv").read_bytes()
    pass_at_k.main(["--results=mine", *runs[:2]])
    assert (tmp_path / "results/pass_at_k/pass_at_k.csv").read_bytes() == before
    assert {path.name for path in (tmp_path / "mine/pass_at_k").iterdir()} == {"pass_at_k.csv", "pass_at_k.png"}


def test_without_votes_pass_at_k_is_shown_alone(runs, tmp_path, capsys):
    """A reward function of one's own does not say what the answer is."""
    path = tmp_path / "base/metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [{name: None if "majority" in name else value for name, value in row.items()} for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pass_at_k.main(runs[:3])
    assert re.search(r"\| base model \|.*\| - \|$", capsys.readouterr().out, re.MULTILINE)


def test_runs_that_cannot_be_compared_are_refused(runs, tmp_path):
    write_run(tmp_path / "more", [1, 1, 1, 1, 1])
    with pytest.raises(UserError, match="^num_questions: 5 in more, but 4 in base; evaluate both alike$"):
        pass_at_k.main(["a=base", "b=more"])
    write_run(tmp_path / "cold", [1, 1, 1, 1], eval_sampling_temperature=0.5)
    with pytest.raises(UserError, match="^temperature: 0.5 in cold, but 1 in base; "):
        pass_at_k.main(["a=base", "b=cold"])
    write_run(tmp_path / "few", [1, 1, 1, 1], num_samples=2)
    with pytest.raises(UserError, match="^num_samples: 2 in few, but 4 in base; "):
        pass_at_k.main(["a=base", "b=few"])
    write_run(tmp_path / "one", [1, 1], num_samples=1)
    with pytest.raises(UserError, match="^one has no pass@k: evaluate its model with num_eval_samples above 1$"):
        pass_at_k.main(["a=one"])
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"arithmetic_max_term": 10}, "arithmetic_max_term: 10 in other, but 20 in base"),
        ({"arithmetic_terms": [5, 6]}, r"arithmetic_terms: \[5, 6\] in other, but \[2, 4\] in base"),
        ({"validation_data": "test.jsonl"}, "validation_data: test.jsonl in other, but arithmetic in base"),
        ({"validation_fraction": 0.1}, "validation_fraction: 0.1 in other, but 0.0 in base"),
    ],
)
def test_runs_on_other_questions_are_refused(settings, message, runs, tmp_path):
    write_run(tmp_path / "other", [1, 1, 1, 1], **settings)
    with pytest.raises(UserError, match=f"^{message}; evaluate both alike$"):
        pass_at_k.main(["a=base", "b=other"])


def test_only_what_decides_about_the_questions_is_compared(runs, tmp_path):
    """The training data where questions of them are held out; how embedded questions are made where there are any."""
    of_file = {"validation_data": "test.jsonl"}
    write_run(tmp_path / "one", [1, 1], **of_file, train_data="a.jsonl")
    write_run(tmp_path / "two", [1, 1], **of_file, train_data="b.jsonl", arithmetic_max_term=10, validation_seed=1)
    pass_at_k.main(["a=one", "b=two"])
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        part = {
            "validation_fraction": 0.5,
            "validation_seed": seed,
            "train_data": "a.jsonl" if seed else f"{name}.jsonl",
        }
        write_run(tmp_path / name, [1, 1], **part)
    with pytest.raises(UserError, match="^train_data: b.jsonl in b, but a.jsonl in a; "):
        pass_at_k.main(["a=a", "b=b"])
    with pytest.raises(UserError, match="^validation_seed: 1 in c, but 0 in a; "):
        pass_at_k.main(["a=a", "c=c"])


@pytest.mark.parametrize("arguments", [["base"], ["=base"], ["a="]])
def test_mistakes_on_the_command_line(arguments, runs):
    with pytest.raises(UserError, match=f"^usage: {run_command('python')} -m experiments.pass_at_k"):
        pass_at_k.main(arguments)


def test_a_folder_that_is_no_run_and_results_that_are_not_there(runs):
    with pytest.raises(UserError, match="^nothing is no run, for it has no config.yaml; name the folder of a run$"):
        pass_at_k.main(["a=nothing"])
    with pytest.raises(UserError, match="^results/pass_at_k/pass_at_k.csv is not there; name runs to collect: "):
        pass_at_k.main([])
