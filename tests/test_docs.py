"""The documentation agrees with the code: metrics, defaults, worked examples, recipes, links, the toy script.

No test starts an engine of its own: whole runs take that of all tests.
"""

import doctest
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import yaml
from tiny import (
    REPOSITORY,
    expert_iteration_arguments,
    grpo_arguments,
    run_python,
    tiny_arguments,
    tracked_files,
    without_sft_keys,
)

import GRPO_helper
import GRPO_train
import policy_evaluation
import SFT_helper
import SFT_train
from experiments import expert_iteration, sweep
from experiments.sweep_plan import plan
from experiments.sweep_results import read_table
from GRPO_helper import LossInputs, compute_policy_gradient_loss
from plainrl.cli import load_config
from plainrl.config import ExpertIterationConfig, GRPOConfig, SFTConfig
from plainrl.data import load_examples, load_questions, load_validation
from plainrl.grading.rewards import grade_responses
from plainrl.prompting import fill_prompt, load_prompt_template
from plainrl.records import Example, Response, Rollout, mean
from plainrl.report.samples import printable, read_samples
from plainrl.supplement_config import BenchmarkConfig, DPOConfig
from supplement import DPO_train

DOCS = REPOSITORY / "docs"
PAGES = ["grpo", "sft", "expert_iteration", "supplement", "metrics", "how_to"]
TEXTS = sorted([*REPOSITORY.glob("*.md"), *DOCS.glob("*.md"), *REPOSITORY.glob("[rs]*/**/README.md")])
SCHEMAS = {
    "SFT_train.py": (SFTConfig, "config.yaml"),
    "policy_evaluation.py": (SFTConfig, "config.yaml"),
    "GRPO_train.py": (GRPOConfig, "grpo_train.yaml"),
    "experiments.expert_iteration": (ExpertIterationConfig, "experiments/expert_iteration.yaml"),
    "supplement.DPO_train": (DPOConfig, "supplement/dpo_train.yaml"),
    "supplement.evaluate_benchmark": (BenchmarkConfig, "supplement/evaluate_benchmark.yaml"),
}
HOW_TO = (DOCS / "how_to.md").read_text()


def blocks(text, language):
    """The code blocks of a page in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def block(name):
    """The code block of how_to.md that begins with a comment of this name."""
    (found,) = [code for code in blocks(HOW_TO, "python") if code.startswith(f"# {name}\n")]
    return found.partition("\n")[2] if "," in name else found


def rows_of(table_text):
    """The cells of each row of a page's tables."""
    lines = [line for line in table_text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


# --- whole runs -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared_engine(engine):
    """The scripts' own evaluator, with the engine of all tests in place of a new one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(policy_evaluation, "init_vllm", lambda *_, **__: engine)
        yield engine


@pytest.fixture(scope="module")
def logged_keys(shared_engine, answering_model_folder, tmp_path_factory):
    """The keys that a tiny run of each script logs: off-policy, and with probes, so that none is missing."""
    folder = tmp_path_factory.mktemp("docs")
    data = folder / "questions.jsonl"
    questions = [{"problem": f"What is {a} + {b}?", "answer": str(a + b)} for a in range(1, 6) for b in range(1, 5)]
    data.write_text("".join(json.dumps(question) + "\n" for question in questions))
    model = answering_model_folder
    off_policy = {"loss_type": "grpo_clip", "train_batch_size": 4, "sampling_top_p": 0.9}
    several = {"num_eval_samples": 2}
    grpo = grpo_arguments(model, folder, run_name="GRPO", n_grpo_steps=1, train_data=data, **off_policy, **several)
    SFT_train.main(tiny_arguments(model, folder, run_name="SFT", max_steps=1, **several))
    GRPO_train.main(grpo)
    ei = {"run_name": "EI", "n_ei_steps": 1, "train_data": data, **several}
    expert_iteration.main(expert_iteration_arguments(model, folder, **ei))
    dpo = {"run_name": "DPO", "warm_start": "", "max_steps": 1, "num_pairs": 8, "num_validation_pairs": 8, **several}
    DPO_train.main(without_sft_keys(tiny_arguments(model, folder, **dpo)))
    return {  # eval/pass_at_2 is a line of its own in no table
        name: {re.sub(r"_at_\d+", "_at_k", key) for row in metrics_of(folder / name) for key in row}
        for name in ("SFT", "GRPO", "EI", "DPO")
    }


def metrics_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("script", ["SFT", "GRPO", "EI", "DPO"])
def test_metrics_page_has_what_is_logged_and_nothing_else(script, logged_keys):
    documented = set()
    for metric, _, over, scripts, _ in [row for row in rows_of((DOCS / "metrics.md").read_text()) if len(row) == 5]:
        if metric.startswith("`") and script in scripts.split(", "):
            name = metric.strip("`")
            documented.add(name)
            if "held-out pairs" not in over:
                documented.add(re.sub("^eval/", "eval_all/", name))
    documented.discard("train/rank_efficiency")  # of several ranks: tests/test_distributed.py
    assert sorted(documented - logged_keys[script]) == []
    assert sorted(logged_keys[script] - documented) == []


def test_metrics_page_names_functions_that_exist():
    for row in rows_of((DOCS / "metrics.md").read_text()):
        if len(row) == 5 and row[0].startswith("`"):
            for file, function in re.findall(r"`([\w/]+\.py)`: `(?:\w+\.)?(\w+)`", row[-1]):
                assert f"def {function}(" in (REPOSITORY / file).read_text(), row


def test_a_run_with_everything_of_ones_own(shared_engine, answering_model_folder, tmp_path, monkeypatch, capsys):
    """Loss, reward function, prompt and data of how_to.md in one tiny run, which trains and logs their metrics."""
    monkeypatch.chdir(tmp_path)
    for name in ("my_losses.py", "my_level_reward.py"):
        Path(name).write_text(block(name))
    exec(compile(block("make_my_data.py"), "make_my_data.py", "exec"), {})
    hard = [{"question": f"What is 10 + {n}?", "answer": str(10 + n), "level": 2} for n in (20, 21, 22)]
    Path("hard.jsonl").write_text("".join(json.dumps(row) + "\n" for row in hard))
    template = load_prompt_template("r1_zero")  # the tiny model answers in no other format
    Path("my.prompt").write_text(template)
    overrides = {
        "run_name": "mine",
        "loss_type": "my_losses.py:sapo",
        "reward": "my_level_reward.py:by_level",
        "prompt": "my.prompt",
        "train_data": "my.csv",
        "validation_fraction": 0.2,
        "extra_validation_data": "{hard: hard.jsonl}",
        "rollout_batch_size": 32,
        "group_size": 8,
        "train_batch_size": 16,
        "n_grpo_steps": 1,
    }
    GRPO_train.main(grpo_arguments(answering_model_folder, tmp_path, **overrides))
    responses_agree(tmp_path / "mine", capsys.readouterr().out)
    rows = [row for row in metrics_of(tmp_path / "mine") if "train_step" in row]
    assert len(rows) == 2
    assert {row["train/num_trained_rows"] for row in rows} == {16}  # a loss of one's own skips no row
    assert all(0 <= row["train/outside_clip_fraction"] <= 1 for row in rows)
    assert rows[0]["train/ratio_mean"] == pytest.approx(1.0, abs=1e-5)
    assert rows[1]["train/ratio_mean"] != rows[0]["train/ratio_mean"]
    batch = rows[-1]
    assert batch["rollout/answer_reward"] <= batch["rollout/reward"] <= 2 * batch["rollout/answer_reward"]
    assert batch["reward/characters"] > 0 and batch["reward/errors"] == 0
    evaluation = next(row for row in metrics_of(tmp_path / "mine") if "eval_step" in row)
    assert evaluation["eval/num_examples"] == 8 and evaluation["eval/hard/num_examples"] == 3
    code = block("read_samples.py").replace("runs/grpo/samples/eval_000024", "mine/samples/hard/eval_000000")
    exec(compile(code, "read_samples.py", "exec"), names := {})
    rows = names["rows"]
    assert [row["ground_truth"] for row in rows] == ["30", "31", "32"]
    assert evaluation["eval/hard/reward_characters"] == pytest.approx(mean([row["characters"] for row in rows]))


def responses_agree(folder, printed):
    """Each printed response stands in samples/ and in the page."""
    page = (folder / "report.html").read_text()
    (run,) = json.loads(re.search(r'id="data">(.*?)</script>', page)[1])["runs"]
    shown = {printable(member["response"].strip()) for group in run["groups"] for member in group["members"]}
    rows = [row for path in folder.glob("samples/eval*.jsonl") for row in read_samples(path)[0]]
    sampled = {printable(row["response"].strip()) for row in rows}
    responses = re.findall(r"^    response  (.*(?:\n {14}.*)*)$", printed, re.M)
    assert responses
    for response in responses:
        text = response.replace("\n" + " " * 14, "\n")
        assert text in sampled and text in shown


# --- the pages --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", ["grpo", "sft", "expert_iteration", "supplement"])
def test_worked_examples_give_what_they_show(page):
    code = "\n".join(blocks((DOCS / f"{page}.md").read_text(), "python"))
    test = doctest.DocTestParser().get_doctest(code, {}, page, None, 0)
    assert len(test.examples) >= 5
    report = []
    doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test, out=report.append)
    assert not report, "".join(report)


@pytest.mark.parametrize(
    ("page", "schema"),
    [
        ("grpo", GRPOConfig),
        ("sft", SFTConfig),
        ("expert_iteration", ExpertIterationConfig),
        ("supplement", DPOConfig),
    ],
)
def test_key_tables_have_the_defaults(page, schema):
    text = (DOCS / f"{page}.md").read_text().partition("## The keys that matter")[2].partition("\n## ")[0]
    rows = [row for row in rows_of(text) if row[0].startswith("`")]
    assert len(rows) >= 10
    for name, shown, _ in rows:
        default = schema.model_fields[name.strip("`")].default
        value = yaml.safe_load(shown) if shown else ""
        assert type(default)(value) == default, name


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_links_lead_somewhere(path):
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#]*)(?:#[^)]*)?\)", text):
        assert not target or (path.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES)
def test_metrics_that_a_page_mentions_are_defined(page):
    defined = {row[0].strip("`") for row in rows_of((DOCS / "metrics.md").read_text()) if len(row) == 5}
    of_recipes = {"train/outside_clip_fraction", "eval/reward_NAME"}
    mentioned = re.findall(r"`((?:train|rollout|reward|eval|time|memory)/[a-z]\w*)`", (DOCS / f"{page}.md").read_text())
    assert set(mentioned) - defined - of_recipes == set()


def test_the_first_screen_of_the_readme():
    """At most 80 words before the first commands: a clone, and two; a figure and an answer that exist; 130 lines."""
    text = (REPOSITORY / "README.md").read_text()
    assert len(text.splitlines()) <= 130
    first = text.partition("```bash\n")
    assert len(first[0].split()) <= 80
    clone, *commands = first[2].partition("```")[0].splitlines()
    assert clone.startswith("git clone ") and [command.partition("uv run ")[2].split()[1] for command in commands] == [
        "SFT_train.py",
        "GRPO_train.py",
    ]
    (figure,) = re.findall(r'<img src="([^"]+)"', text)
    assert (REPOSITORY / figure).is_file()
    answers = dict(row for row in rows_of(text) if len(row) == 2)
    examples = (REPOSITORY / "results/warm-start/examples.txt").read_text().partition("What is 8 - 10 - 2?")[2]
    before, after = examples.splitlines()[1:3]
    assert (
        answers["before training"] in before.replace("\\n", "") and answers["after 16 steps of SFT"].strip("`") in after
    )
    commands = "".join(blocks(text, "bash"))
    assert "git clone" in commands and "<" not in commands  # bash would read from a file of that name


def test_the_readme_names_the_limits_that_are_asked_for_most():
    limits = (REPOSITORY / "README.md").read_text().partition("## What it cannot do\n")[2].partition("\n## ")[0]
    asked_for = ("macOS", "Windows", "ARM", "Docker", "Several GPUs", "SLURM", "24 GB", "tools", "critic")
    asked_for += ("reward model", "text only", "mixtures of experts", "8-bit optimizer", "quantized")
    assert [name for name in asked_for if name not in limits] == []


def test_the_index_of_results_has_every_experiment():
    """Each once, with its finding before it."""
    rows = rows_of((REPOSITORY / "results/README.md").read_text())[2:]
    linked = [name for row in rows for name in re.findall(r"\]\(([\w-]+)\)", row[1])]
    assert sorted(linked) == sorted(path.parent.name for path in tracked_files("results/*/README.md"))
    assert all(len(row) == 3 and len(row[0]) > 20 for row in rows)


def test_grpo_by_hand_learns():
    started = subprocess.run(
        [sys.executable, "docs/grpo_by_hand.py"],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        timeout=600,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert started.returncode == 0, started.stderr
    rewards = [float(value) for value in re.findall(r"reward (\d\.\d+)", started.stdout)]
    assert len(rewards) == len(started.stdout.splitlines()) <= 12
    assert rewards[0] < 0.1
    assert rewards[-1] > 0.95


# --- the recipes ------------------------------------------------------------------------------------------------------


def test_every_command_is_accepted(tmp_path, monkeypatch):
    """Scripts with their keys, tests that exist; in a folder with the files that the page writes."""
    monkeypatch.chdir(tmp_path)
    for name in ("my_losses.py", "my_rewards.py", "my_reward.py", "my_level_reward.py"):
        Path(name).write_text(block(name))
    monkeypatch.setitem(GRPO_helper.LOSSES, "sapo", GRPO_helper.LOSSES["grpo_clip"])  # as if the recipe were done
    num_scripts = 0
    for code in blocks(HOW_TO, "bash"):
        for line in code.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:3] == ["uv", "run", "pytest"]:
                for file in [word for word in words if word.endswith(".py")]:
                    assert (REPOSITORY / file).is_file(), line
            elif words[:3] == ["uv", "run", "python"] and words[3] in SCHEMAS:
                schema, yaml_file = SCHEMAS[words[3]]
                arguments = words[4:] if any("preset=" in word for word in words) else ["preset=laptop", *words[4:]]
                load_config(schema, REPOSITORY / yaml_file, arguments)
                num_scripts += 1
    assert num_scripts >= 7


def test_the_sweeps_of_the_page_are_planned(tmp_path, monkeypatch, capsys):
    """Each as a file of its name. That of the recipes has the recipes that any preset can take, at equal tokens."""
    monkeypatch.chdir(tmp_path)
    sweeps = [code for code in blocks(HOW_TO, "yaml") if "script: " in code]
    names = [re.match(r"# (\w+\.yaml)\n", code)[1] for code in sweeps]
    assert names == ["my_sweep.yaml", "compare_losses.yaml", "compare_recipes.yaml"]
    Path("my_losses.py").write_text(block("my_losses.py"))
    for name, code in zip(names, sweeps, strict=True):
        Path(name).write_text(code)
        sweep.main([name, "--dry-run", "preset=laptop"])
        lines = capsys.readouterr().out.splitlines()
        _, runs = plan(Path(name), ["preset=laptop"])
        assert lines[-1].startswith(f"{len(runs)} of {len(runs)} runs to go")
    recipes = yaml.safe_load((REPOSITORY / "grpo_train.yaml").read_text())["recipes"].keys() - {"leaderboard"}
    assert {run.settings["recipe"] for run in runs} == recipes and {run.seed for run in runs} == {0, 1, 2}
    assert {run.settings["max_sampled_tokens"] for run in runs} == {94000}


def test_a_reward_of_another_format_reads_what_its_warm_start_writes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my_format.py").write_text(block("my_format.py"))
    reward = GRPOConfig(reward="my_format.py:mine").reward_function
    written = reward.write_response("3 + 4 = 7.", "7")
    assert written.startswith(" 3 + 4 = 7.") and reward(written, "7")["reward"] == 1
    assert [reward(text, "7")["reward"] for text in ("Answer: 8", "7")] == [0, 0]
    assert [reward(text, "7")["format_reward"] for text in ("Answer: 8", "7")] == [1, 0]


@pytest.mark.parametrize("page", ["README.md", "docs/assignment.md", "docs/data.md", "docs/running.md"])
def test_commands_of_other_pages_are_accepted(page, tmp_path, monkeypatch):
    """Also those inside tables; sweep files exist. What goes on with a run needs that run, and is left out."""
    monkeypatch.chdir(tmp_path)
    for name in ("my_losses.py", "my_rewards.py"):
        Path(name).write_text(block(name).replace("sapo", "my_loss").replace("format_counts", "my_reward"))
    text = (REPOSITORY / page).read_text().replace("\\\n", " ")
    commands = re.findall(r"uv run (?:--no-sync )?(python [^`\n]*)", text)
    num_scripts = 0
    for words in (shlex.split(command, comments=True)[1:] for command in commands if "resume=" not in command):
        name = " ".join(words[: 2 if words[0] == "-m" else 1]).removeprefix("-m ")
        arguments = words[2 if words[0] == "-m" else 1 :]
        if name in SCHEMAS and not {"--help", "--show"} & set(arguments):
            schema, yaml_file = SCHEMAS[name]
            arguments = [re.sub("^data=", "validation_data=", argument) for argument in arguments]
            preset = [] if any(argument.startswith("preset=") for argument in arguments) else ["preset=laptop"]
            if "recipe=leaderboard" not in arguments:  # 1,024 tokens do not fit into the laptop's context
                load_config(schema, REPOSITORY / yaml_file, [*preset, *arguments])
            num_scripts += 1
        elif name == "experiments.sweep" and not arguments[0].startswith("-"):
            assert (REPOSITORY / arguments[0]).is_file() or "NAME" in arguments[0], arguments
    assert num_scripts >= 2


def test_the_page_of_the_assignment_has_every_problem_and_function():
    """66 points in all, as the handout counts them."""
    page = (DOCS / "assignment.md").read_text()
    rows = [row for row in rows_of(page) if re.match(r"`\w+`", row[0]) and len(row) in (4, 6)]
    assert sum(int(row[1]) for row in rows if row[1]) == 66
    named = {re.findall(r"`(\w+)`", row[0])[0] for row in rows}
    assert len(named) == 26
    source = "".join(
        (REPOSITORY / name).read_text() for name in ("SFT_helper.py", "GRPO_helper.py", "policy_evaluation.py")
    )
    for row in rows:
        if len(row) == 4 and "helper" in row[2]:
            assert f"def {row[0].strip('`')}(" in source, row


def test_helpers_that_no_loop_calls_say_what_the_loops_call():
    """What a student reads is what runs, or names it. The siblings exist, and are called."""
    loops = "".join(path.read_text() for path in [*REPOSITORY.glob("*_train.py"), *REPOSITORY.glob("plainrl/*.py")])
    siblings = {
        SFT_helper.tokenize_prompt_and_output: "join_prompt_and_response_ids",
        SFT_helper.compute_entropy: "get_masked_response_log_probs",
        SFT_helper.get_response_log_probs: "get_masked_response_log_probs",
        SFT_helper.sft_microbatch_train_step: "accumulate_gradients",
        GRPO_helper.compute_group_normalized_rewards: "normalize_within_groups",
        GRPO_helper.grpo_microbatch_train_step: "accumulate_gradients",
    }
    for function, sibling in siblings.items():
        assert f"`{sibling}`" in (function.__doc__ or "")
        assert re.search(rf"(?<!def )\b{sibling}[(,]", loops.replace("import", "")), sibling


def test_the_recipe_of_the_leaderboard_keeps_the_rules():
    for preset in ("one-gpu", "two-gpu", "eight-gpu"):
        arguments = ["recipe=leaderboard", f"preset={preset}"]
        config = load_config(GRPOConfig, REPOSITORY / "grpo_train.yaml", arguments)
        assert (config.model, config.warm_start) == ("Qwen/Qwen2.5-Math-1.5B", "")
        assert (config.prompt, config.reward, config.num_eval_examples) == ("r1_zero", "r1_zero", "all")
        assert (config.evaluation_temperature, config.sampling_max_tokens, config.sampling_top_p) == (1, 1024, 1)
        assert config.max_training_hours == 4 and config.n_grpo_steps * 1.0 > 4 * 3600  # steps of a second
        assert config.warnings() == []


def test_a_loss_of_ones_own_is_what_the_page_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my_losses.py").write_text(block("my_losses.py"))
    keys = ["preset=laptop", "loss_type=my_losses.py:sapo", "train_batch_size=32"]
    config = load_config(GRPOConfig, REPOSITORY / "grpo_train.yaml", keys)
    log_probs, inputs, expected = sapo_case()
    losses, metadata = config.loss(inputs)
    torch.testing.assert_close(losses, expected)
    losses.sum().backward()
    gate = -expected / 4 / inputs.advantages
    torch.testing.assert_close(log_probs.grad, expected * (1 - gate) * (log_probs.detach() + 2).exp())
    assert metadata["outside_clip_fraction"].tolist() == [[False, True], [True, False]]
    assert config.loss.zero_with is None
    keys[1] = "loss_type=my_losses.py:faster"
    faster = load_config(GRPOConfig, REPOSITORY / "grpo_train.yaml", keys).loss
    assert faster.zero_with == "advantages" and torch.equal(faster(inputs)[0], losses)


def sapo_case():
    """Log-probs, the inputs made of them, and the losses that they have by hand: - 4 A / (1 + exp(1 - ratio))."""
    ratios = torch.tensor([[1.0, 1.5], [0.5, 1.1]])
    old = torch.full((2, 2), -2.0)
    log_probs = (old + ratios.log()).requires_grad_()
    mask = torch.ones(2, 2, dtype=torch.bool)
    inputs = LossInputs(log_probs, mask, torch.tensor([[2.0], [-1.0]]), None, old, 0.2)
    return log_probs, inputs, -4 * torch.tensor([[2.0], [-1.0]]) / (1 + (1 - ratios).exp())


def test_a_loss_in_the_table_passes_the_tests_of_the_table(tmp_path):
    """The two blocks go into a copy of GRPO_helper.py; then the recipe's command runs there."""
    source = (REPOSITORY / "GRPO_helper.py").read_text()
    place, end = "@dataclass(frozen=True)\nclass Loss:", '    "grpo_no_clip": Loss('
    assert source.count(place) == source.count(end) == 1
    source = source.replace(place, block("GRPO_helper.py, the function") + "\n\n" + place)
    source = source.replace(end, block("GRPO_helper.py, the line in LOSSES") + end)
    ignored = shutil.ignore_patterns("__pycache__")
    for folder in ("plainrl", "tests"):
        shutil.copytree(REPOSITORY / folder, tmp_path / folder, ignore=ignored)
    for file in [*REPOSITORY.glob("*.py"), *REPOSITORY.glob("*.yaml"), REPOSITORY / "pyproject.toml"]:
        shutil.copy(file, tmp_path)
    (tmp_path / "GRPO_helper.py").write_text(source)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_losses.py", "-k", "sapo"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=600)
    assert result.returncode == 0, result.stdout
    assert int(re.search(r"(\d+) passed", result.stdout)[1]) >= 5
    module = load_module(tmp_path / "GRPO_helper.py", "GRPO_helper_with_sapo")
    _, inputs, expected = sapo_case()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(GRPO_helper.LOSSES, "sapo", module.LOSSES["sapo"])
        losses, _ = compute_policy_gradient_loss(
            inputs.log_probs, "sapo", None, inputs.advantages, inputs.old_log_probs, inputs.cliprange
        )
    torch.testing.assert_close(losses, expected)


def load_module(path, name):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def test_math_verify_can_grade(tmp_path, monkeypatch):
    """Also from other threads than the main one, as training calls a reward."""
    monkeypatch.chdir(tmp_path)
    Path("my_reward.py").write_text(block("my_reward.py"))
    config = load_config(
        GRPOConfig, REPOSITORY / "grpo_train.yaml", ["preset=laptop", "reward=my_reward.py:math_verify_reward"]
    )
    responses = [f"so </think> <answer> {answer} </answer>" for answer in (r"\frac{1}{2}", "0.5", "2")]
    with ThreadPoolExecutor(1) as thread:
        grades = thread.submit(grade_responses, [*responses, "0.5"], ["1/2"] * 4, config.reward_function).result()
    assert [grade.rewards["reward"] for grade in grades] == [1, 1, 0, 0]
    assert [grade.rewards["format_reward"] for grade in grades] == [1, 1, 1, 0]


def test_a_reward_of_ones_own_is_what_the_page_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my_rewards.py").write_text(block("my_rewards.py"))
    keys = ["preset=laptop", "reward=my_rewards.py:format_counts"]
    config = load_config(GRPOConfig, REPOSITORY / "grpo_train.yaml", keys)
    texts = [" </think> <answer> 5 </answer>", " </think> <answer> 6 </answer>", "5"]
    grades = grade_responses(texts, ["5"] * 3, config.reward_function)
    assert [grade.rewards["reward"] for grade in grades] == [1.0, 0.1, 0.0]
    line = block("plainrl/grading/rewards.py, the line in REWARD_FUNCTIONS")
    source = (REPOSITORY / "plainrl/grading/rewards.py").read_text()
    end = '    "question_only": Reward('
    assert source.count(end) == 1
    table = "REWARD_FUNCTIONS: dict"
    definition = block("my_rewards.py").partition("\n\n\n")[2]
    Path("rewards.py").write_text(source.replace(table, f"{definition}\n\n{table}").replace(end, line + end))
    module = load_module(tmp_path / "rewards.py", "rewards_with_format_counts")
    assert module.as_reward("format_counts")("6", "5")["reward"] == 0


def test_data_of_ones_own_are_read(tmp_path, monkeypatch):
    """144 sums; a fifth of them is 28.8."""
    monkeypatch.chdir(tmp_path)
    exec(compile(block("make_my_data.py"), "make_my_data.py", "exec"), {})
    keys = ["train_data=my.csv", "validation_fraction=0.2"]
    config = load_config(GRPOConfig, REPOSITORY / "grpo_train.yaml", ["preset=laptop", *keys])
    validation = load_validation(config)
    questions = load_questions(validation.everything, config)
    assert (len(questions), len(validation.everything)) == (115, 29)
    assert {example.question: example.ground_truth for example in questions + validation.everything} == {
        f"What is {a} + {b}?": str(a + b) for a in range(1, 13) for b in range(1, 13)
    }


def test_a_reward_that_sees_a_column_is_what_the_page_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my_level_reward.py").write_text(block("my_level_reward.py"))
    exec(compile(block("make_my_data.py"), "make_my_data.py", "exec"), {})
    keys = ["reward=my_level_reward.py:by_level", "train_data=my.csv", "validation_fraction=0.2"]
    config = load_config(GRPOConfig, REPOSITORY / "grpo_train.yaml", ["preset=laptop", *keys])
    levels = {example.question: example.fields for example in load_questions([], config)}
    assert levels["What is 4 + 5?"] == {"level": "1"} and levels["What is 5 + 5?"] == {"level": "2"}
    texts = [" </think> <answer> 10 </answer>", "9"]
    fields = [levels["What is 5 + 5?"]] * 2
    grades = grade_responses(texts, ["10"] * 2, config.reward_function, fields)
    assert [grade.rewards["reward"] for grade in grades] == [2.0, 0.0]
    assert [grade.rewards["characters"] for grade in grades] == [len(text) for text in texts]


def run_the_small_sweep(background):
    """The sweep of how_to.md in its form of five minutes, with the tiny model; its folder, and what it printed."""
    folder = background.new_folder("sweep")
    (text,) = [code for code in blocks(HOW_TO, "yaml") if code.startswith("# my_sweep.yaml\n")]
    (folder / "my_sweep.yaml").write_text(text)
    tiny = tiny_arguments(background.tiny_model, folder / "runs")
    tiny = [argument for argument in tiny if not argument.startswith(("learning_rate=", "eval_interval="))]
    return folder, run_command_of_the_page("experiments.sweep my_sweep.yaml max_steps", tiny, folder, background.start)


def run_command_of_the_page(wanted, tiny, folder, start):
    """Run the only command of how_to.md that has these words, with further keys for the tiny model."""
    commands = "".join(blocks(HOW_TO, "bash")).replace("\\\n", " ").splitlines()
    (command,) = [" ".join(command.split()) for command in commands if wanted in " ".join(command.split())]
    own = {argument.partition("=")[0] for argument in command.split()}
    further = [argument for argument in tiny if argument.partition("=")[0] not in own]
    program, *arguments = shlex.split(command.partition("python ")[2])
    words = [str(REPOSITORY / program) if program.endswith(".py") else program, *arguments, *further]
    return run_python(*words, folder=folder, start=start, env=os.environ | {"PYTHONPATH": str(REPOSITORY)})


def run_the_own_reward(background):
    """The run of how_to.md with a reward that sees a column of an own CSV file, with the tiny model."""
    folder = background.new_folder("own")
    (folder / "my_level_reward.py").write_text(block("my_level_reward.py"))
    (folder / "make_my_data.py").write_text(block("make_my_data.py"))
    subprocess.run([sys.executable, "make_my_data.py"], cwd=folder, check=True)
    tiny = grpo_arguments(background.tiny_model, folder / "runs", run_name="mine")
    wanted = "train_data=my.csv validation_fraction=0.2 warm_start= n_grpo_steps=1"
    return folder, run_command_of_the_page(f"by_level {wanted}", tiny, folder, background.start)


@pytest.mark.background(job=run_the_own_reward)
def test_an_own_reward_with_a_column_of_an_own_file_trains(background):
    folder, result = background.result(run_the_own_reward)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = [json.loads(line) for line in (folder / "runs/mine/metrics.jsonl").read_text().splitlines()]
    (trained,) = [row for row in rows if "rollout/reward" in row]
    assert trained["reward/characters"] > 0 and "eval/reward_characters" in rows[0]
    assert rows[-1]["eval_all/num_examples"] == 16


@pytest.mark.background(job=run_the_small_sweep)
def test_a_sweep_of_ones_own_gets_its_figure_and_table(background):
    folder, result = background.result(run_the_small_sweep)
    assert result.returncode == 0, result.stdout + result.stderr
    results = folder / "results/my_sweep"
    assert (results / "my_sweep.png").read_bytes().startswith(b"\x89PNG")
    readme = (results / "README.md").read_text()
    assert "![curves](my_sweep.png)" in readme
    variants = [f"learning_rate={rate}" for rate in ("0.0001", "0.0003")]
    assert [row[0] for row in rows_of(readme)[2:]] == variants
    rows = [row for row in read_table(results / "metrics.csv") if row["eval/answer_reward"]]
    assert [(row["variant"], row["eval_step"]) for row in rows] == [(v, step) for v in variants for step in "02"]


def test_a_sweep_of_ones_own_is_planned(tmp_path, monkeypatch, capsys):
    """Two variants with one seed each. tests/test_sweep.py runs one of one's own, and looks at its figure."""
    monkeypatch.chdir(tmp_path)
    (text,) = [code for code in blocks(HOW_TO, "yaml") if code.startswith("# my_sweep.yaml\n")]
    Path("my_sweep.yaml").write_text(text)
    sweep.main(["my_sweep.yaml", "--dry-run"])
    planned = [line for line in capsys.readouterr().out.splitlines() if line.startswith("to do")]
    assert len(planned) == 2 and all("my_sweep-" in line for line in planned)


def test_a_prompt_of_ones_own_is_filled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = [code for code in blocks(HOW_TO, "bash") if "my.prompt <<" in code]
    subprocess.run(["bash", "-c", code.partition("\nEND\n")[0] + "\nEND\n"], check=True)
    prompt = fill_prompt(load_prompt_template("my.prompt"), "What is 1 + 2?")
    assert "Problem: What is 1 + 2?\n" in prompt and r"\boxed{...}" in prompt
    config = load_config(SFTConfig, REPOSITORY / "config.yaml", ["preset=warm-start", "prompt=my.prompt"])
    assert load_examples("arithmetic", config, "validation")[0].prompt.startswith("Solve the problem step by step.")


def test_a_metric_of_the_rollouts_is_one_line(tmp_path):
    source = (REPOSITORY / "plainrl/rollouts.py").read_text()
    end = '        "rollout/response_length_max": '
    assert source.count(end) == 1
    line = block("plainrl/rollouts.py, a line in summarize_rollouts")
    (tmp_path / "rollouts.py").write_text(source.replace(end, line + end))
    module = load_module(tmp_path / "rollouts.py", "rollouts_with_minimum")
    rewards = {"reward": 1.0, "format_reward": 1.0, "answer_reward": 1.0}
    responses = [Response([1], "", [5] * length, [0.0] * length, "stop") for length in (3, 2)]
    rollouts = [Rollout(Example("q", "p", "1", None, "s"), response, rewards, 0.0) for response in responses]
    config = GRPOConfig(
        group_size=2, rollout_batch_size=2, train_batch_size=2, gradient_accumulation_steps=1, preset="laptop"
    )
    assert module.summarize_rollouts(rollouts, config)["rollout/response_length_min"] == 2


def test_a_model_of_ones_own_is_loaded(tiny_model_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_model_folder, "my_model")
    exec(compile(block("check_my_model.py"), "check_my_model.py", "exec"), {})
    output = capsys.readouterr().out
    assert "LlamaForCausalLM with " in output and "shared prefixes are computed once" in output
