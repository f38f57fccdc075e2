"""Several ranks are one process, to rounding: dealing, gradients, whole runs with the real engine."""

import contextlib
import importlib
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import rank_gradients
import torch
from kill_and_resume import differences_to_rounding, find_differences, start
from ranks import end
from safetensors.torch import load_file, save_file
from test_benchmark_tasks import arguments_of as benchmark_arguments
from test_benchmark_tasks import make_data
from test_DPO_train import DATA as PAIRS
from test_DPO_train import dpo_arguments
from tiny import expert_iteration_arguments, grpo_arguments, read_lines, tiny_arguments, write_lines

from plainrl import devices, distributed, startup
from plainrl.microbatches import plan_microbatches
from plainrl.records import UserError

GRPO = {
    "n_grpo_steps": 3,
    "rollout_batch_size": 64,
    "train_batch_size": 64,
    "gradient_accumulation_steps": 16,
    "arithmetic_max_term": 5,
    "learning_rate": 5e-5,
    "eval_interval": 2,
    "checkpoint_interval": 1,
    "keep_last": 9,
    "num_logged_groups": 16,  # all: the samples of every engine are compared
}
OFF_POLICY = GRPO | {"loss_type": "grpo_clip", "train_batch_size": 32}
AHEAD = GRPO | {"rollouts_ahead": 1, "engine_correction": "token_truncate", "n_grpo_steps": 4}
ONE_ENGINE = GRPO | {"engine_tensor_parallel": 2}
SFT = {"max_steps": 3, "gradient_accumulation_steps": 4, "num_eval_examples": 11}
EXPERT_ITERATION = {"train_batch_size": 8, "gradient_accumulation_steps": 4, "arithmetic_max_term": 5}
DPO = {
    "max_steps": 3,
    "learning_rate": 5e-5,
    "gradient_accumulation_steps": 2,
    "eval_interval": 2,
    "validation_data": "arithmetic",  # so that responses are sampled, too
}
STALE = GRPO | {"learning_rate": 1e-2, "eval_interval": 1}
TRAINED = ["sft", "grpo", "off-policy", "expert-iteration", "dpo"]


def write_plan(num_ranks, background, kind="usual"):
    """Write a plan of scripts for run_scripts.py; return the folder of the runs."""
    folder = background.new_folder(f"ranks-{num_ranks}")
    model = background.answering_model
    pairs = write_lines(folder / "pairs.jsonl", PAIRS)
    benchmark = benchmark_arguments(model, folder, make_data(folder / "data"), run_name="benchmark")
    iteration = expert_iteration_arguments(model, folder, run_name="expert-iteration", **EXPERT_ITERATION)
    plans = {
        "usual": [  # the first one never puts a policy into the engine
            ["supplement.evaluate_benchmark", benchmark],
            ["SFT_train", tiny_arguments(model, folder, run_name="sft", **SFT)],
            ["GRPO_train", grpo_arguments(model, folder, run_name="grpo", **GRPO)],
            ["GRPO_train", grpo_arguments(model, folder, run_name="off-policy", **OFF_POLICY)],
            ["experiments.expert_iteration", iteration],
            ["supplement.DPO_train", dpo_arguments(model, folder, pairs, run_name="dpo", **DPO)],
            ["policy_evaluation", tiny_arguments(model, folder, run_name="evaluation", num_eval_examples=11)],
        ],
        "ahead": [["GRPO_train", grpo_arguments(model, folder, run_name="ahead", **AHEAD)]],
        "one engine": [["GRPO_train", grpo_arguments(model, folder, run_name="grpo", **ONE_ENGINE)]],
    }
    plan = plans[kind][1:-1] if num_ranks == 1 else plans[kind]  # of one rank TRAINED alone is compared
    if num_ranks == 2 and kind == "usual":
        plan += [["rank_stale_engine", grpo_arguments(model, folder, run_name="stale", **STALE)]]
    (folder / "plan.json").write_text(json.dumps(plan))
    return folder


def run_plan(num_ranks, background, kind="usual"):
    """Run scripts in one process, or in several by torchrun, with one engine in each; return the folder of the runs."""
    folder = write_plan(num_ranks, background, kind)
    log = folder / "log"
    process = start("tests/run_scripts.py", [folder / "plan.json"], log, background.start, num_ranks)
    assert end(process, log, seconds=3600) == 0, log.read_text()[-3000:]
    return folder


def run_usual(background):
    """Run the usual scripts in one process and in two ranks at once; return both folders."""
    folders = {num_ranks: write_plan(num_ranks, background) for num_ranks in (0, 2)}
    jobs = [(num_ranks, f"{folder}/plan.json", f"{folder}/log") for num_ranks, folder in folders.items()]
    path, log = folders[0] / "jobs.json", folders[0] / "forks.log"
    path.write_text(json.dumps(jobs))
    process = start("tests/forked_scripts.py", [path, background.answering_model], log, background.start)
    status = end(process, log, seconds=3600)
    assert status == 0, "".join(Path(file).read_text()[-3000:] for file in (log, *(job[2] for job in jobs)))
    return list(folders.values())


def run_as_one_rank(background):
    return run_plan(1, background)


def run_with_one_engine(background):
    return run_plan(2, background, "one engine")


def run_ahead_alone(background):
    return run_plan(0, background, "ahead")


def run_ahead_as_two_ranks(background):
    return run_plan(2, background, "ahead")


def tensors_in(folder):
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


@pytest.mark.background(job=run_usual)
@pytest.mark.parametrize("name", TRAINED)
def test_two_ranks_are_one_process_to_rounding(name, background, answering_model_folder):
    one, two = (folder / name for folder in background.result(run_usual))
    assert differences_to_rounding(one, two) == []
    rows = [json.loads(line) for line in (two / "metrics.jsonl").open()]
    lowest = 0.4 if name == "expert-iteration" else 0.5  # it may keep one response, which one rank trains on
    assert all(lowest < row["train/rank_efficiency"] <= 1 for row in rows if "train/loss" in row)
    if name in ("grpo", "off-policy"):
        rollouts = [read_lines(file) for file in (two / "samples").glob("rollout*")]
        assert rollouts and all(len(lines) == 64 for lines in rollouts)
    before, after = tensors_in(Path(answering_model_folder)), tensors_in(two / "final")
    assert any(not torch.equal(before[key], after[key]) for key in before)  # there was something to compute
    printed = (two.parent / "log").read_text()
    assert printed.count("first 8 of 11 questions: ") == 2  # of SFT and of the evaluation, by one of the ranks


@pytest.mark.background(job=run_usual)
def test_an_evaluation_by_two_ranks_is_that_of_one_process(background):
    folders = [folder / "evaluation" for folder in background.result(run_usual)]
    assert differences_to_rounding(*folders) == []
    assert [len(read_lines(folder / "samples/eval_000000.jsonl")) for folder in folders] == [11, 11]


@pytest.mark.background(job=run_usual)
def test_the_four_evaluations_by_two_ranks_are_those_of_one_process(background):
    folders = [folder / "benchmark" for folder in background.result(run_usual)]
    files = [{str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} for folder in folders]
    assert files[0] == files[1] >= {"alpaca_eval.json", "simple_safety_tests.jsonl", "mmlu_by_subject.csv"}
    for name in ("samples/mmlu.jsonl", "samples/gsm8k.jsonl", "alpaca_eval.json", "simple_safety_tests.jsonl"):
        assert (folders[0] / name).read_text() == (folders[1] / name).read_text()
    metrics = [read_lines(folder / "metrics.jsonl") for folder in folders]
    for row in (row for rows in metrics for row in rows):
        row.pop(next(key for key in row if key.endswith("examples_per_second")))
    assert metrics[0] == metrics[1] and len(metrics[0]) == 4


@pytest.mark.background(job=run_usual)
@pytest.mark.background(job=run_with_one_engine)
def test_one_engine_over_two_ranks_is_one_process_to_rounding(background):
    """Each rank holds half of the engine's weights. Responses and weights are those of an engine in one process."""
    folders = [folder / "grpo" for folder in (background.result(run_usual)[0], background.result(run_with_one_engine))]
    assert differences_to_rounding(*folders) == []
    for folder, size in zip(folders, (1, 2), strict=True):
        assert f"tensor_parallel_size: {size}\n" in (folder.parent / "log").read_text()


@pytest.mark.background(job=run_usual)
def test_an_engine_whose_weights_did_not_arrive_is_named(background):
    folder = background.result(run_usual)[1]
    told = re.findall(r"rank (\d) was told: (.*)", (folder / "log").read_text())
    assert sorted(number for number, _ in told) == ["0"]  # what another rank prints is muted
    assert "after the weight sync, the engine of rank 1 and policy disagree on sampled tokens" in told[0][1]
    steps = [row.get("train_step", 0) for row in read_lines(folder / "stale/metrics.jsonl")]
    assert max(steps) == 1  # found by the first evaluation after the weights moved
    assert "torchrun --nproc-per-node 2 run_scripts.py resume=" in (folder / "log").read_text()  # how to go on


@pytest.mark.background(job=run_usual)
@pytest.mark.background(job=run_as_one_rank)
def test_one_rank_of_torchrun_is_no_torchrun(background):
    alone, one = background.result(run_usual)[0], background.result(run_as_one_rank)
    for name in TRAINED:
        assert find_differences(alone / name, one / name) == []


@pytest.mark.background(job=run_ahead_alone)
@pytest.mark.background(job=run_ahead_as_two_ranks)
def test_two_ranks_that_sample_ahead_are_one_process_to_rounding(background):
    """The engine of each has a process of its own."""
    one, two = background.result(run_ahead_alone) / "ahead", background.result(run_ahead_as_two_ranks) / "ahead"
    assert differences_to_rounding(one, two) == []
    rows = [json.loads(line) for line in (two / "metrics.jsonl").open()]
    assert [row["rollout/policy_lag"] for row in rows if "rollout/policy_lag" in row] == [0, 1, 1, 1]


@pytest.mark.parametrize(
    ("program", "arguments"),
    [
        ("experiments.benchmark.__main__", []),
        ("experiments.chat", []),
        ("experiments.pass_at_k", []),
        ("experiments.plot_results", []),
        ("experiments.sweep", ["sweep.yaml"]),
        ("supplement.preference_data", ["pairs.jsonl"]),
    ],
)
def test_programs_for_one_process_refuse_several_ranks(program, arguments, monkeypatch, tmp_path):
    """They would write the same files."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="runs in one process: start it without torchrun"):
        importlib.import_module(program).main(arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"policy_device": "cuda:1", "evaluator_device": "cuda:0"}, "or rollouts_ahead = 1 with two for each"),
        ({"engine_tensor_parallel": 2}, "an engine that samples ahead belongs to one rank"),
        ({"policy_device": "cuda:1", "evaluator_device": "cuda:0", "rollouts_ahead": 1}, ""),
        ({"policy_device": "cuda:0", "evaluator_device": "cuda:0"}, ""),
    ],
)
def test_a_second_gpu_of_each_rank_is_for_an_engine_that_samples_ahead(settings, message, tiny_model_folder):
    ahead = {"rollouts_ahead": 1} if "engine_tensor_parallel" in settings else {}
    config = rank_gradients.config_of(tiny_model_folder, {}).model_copy(update=settings | ahead)
    with pytest.raises(UserError, match=message) if message else contextlib.nullcontext():
        distributed._require_divisible(config, 2)


def test_by_torchrun_auto_is_a_preset_for_one_gpu_each(monkeypatch):
    """Also where a rank sees a second one, which is for an engine that samples ahead."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    card = SimpleNamespace(total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    found = []
    for num_ranks, of_machine, present in (("1", "1", ""), ("2", "2", "8"), ("2", "1", "")):
        monkeypatch.setenv("WORLD_SIZE", num_ranks)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", of_machine)
        monkeypatch.setenv(startup.NUM_GPUS_VARIABLE, present)
        found.append(devices.choose_preset())
    assert [preset for preset, _ in found] == ["two-gpu", "one-gpu", "one-gpu"]
    assert found[1][1].startswith("2 of 8 CUDA devices of this machine, one for each rank, memory 80.0")
    assert found[2][1].startswith("1 of 2 CUDA devices of this machine, one for each rank, memory 80.0")


def test_differences_beyond_rounding_are_found(tmp_path):
    for name, number, text in (("one", 1.0, "a"), ("near", 1.000001, "a"), ("other", 1.1, "b")):
        for folder in ("samples", "final"):
            (tmp_path / name / folder).mkdir(parents=True)
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps({"train_step": 1, "train/loss": number}) + "\n")
        (tmp_path / name / "samples/a.jsonl").write_text(json.dumps({"response": text}) + "\n")
        save_file({"w": torch.tensor([number])}, tmp_path / name / "final/model.safetensors")
    one, near, other = (tmp_path / name for name in ("one", "near", "other"))
    assert differences_to_rounding(one, one) == differences_to_rounding(one, near) == []
    assert len(differences_to_rounding(one, other)) == 3


def test_the_first_rank_of_each_machine_is_known(monkeypatch):
    monkeypatch.setattr(distributed, "exchange", lambda name: ["a", "b", "b", "a"])
    found = []
    for number in range(4):
        monkeypatch.setattr(distributed, "rank", lambda number=number: number)
        found.append(distributed.first_on_machine())
    assert found == [0, 1, 1, 0]


@pytest.fixture(scope="module")
def gradients(answering_model_folder, tmp_path_factory):
    """The gradients of each case, computed by one rank and by two; those of replicas by four, too."""
    folder = tmp_path_factory.mktemp("gradients")
    process = start("tests/rank_gradients.py", [answering_model_folder, folder], folder / "log")
    assert end(process, folder / "log", seconds=600) == 0, (folder / "log").read_text()[-3000:]
    return [folder / str(num_ranks) for num_ranks in rank_gradients.CASES_OF_RANKS]


@pytest.mark.parametrize("case", rank_gradients.CASES)
def test_the_gradient_is_the_same_by_two_ranks(case, gradients):
    one, two = (load_file(folder / f"{case}.safetensors") for folder in gradients[:2])
    first, second = (torch.cat([part[name].flatten() for name in one]) for part in (one, two))
    assert bool(first.any()) == (case != "nothing to learn")
    is_half = "bfloat16" in case  # alone, a working copy computes; its embeddings are looked up in float32
    rounding = 2e-6 if "another division" in case else 1e-6
    assert (first - second).norm() <= (0.05 if is_half else rounding) * first.norm()
    sums = [json.loads((folder / "sums.json").read_text())["sums"][case] for folder in gradients[:2]]
    if case == "DPO" or case.startswith("SFT"):
        assert "train/rank_efficiency" not in sums[0] and 0.5 < sums[1]["train/rank_efficiency"] < 1
    assert sums[0]["num_tokens"] == sums[1]["num_tokens"]
    assert sums[0]["loss"] == pytest.approx(sums[1]["loss"], rel=0.05 if is_half else 1e-5, abs=1e-7)
    assert sums[0]["grad_norm"] == pytest.approx(sums[1]["grad_norm"], rel=0.05 if is_half else 1e-5, abs=1e-9)


def test_the_gradient_is_the_same_by_two_replicas_of_two_ranks_each(gradients):
    one, four = (load_file(gradients[number] / "num_replicas.safetensors") for number in (0, 2))
    first, second = (torch.cat([part[name].flatten() for name in one]) for part in (one, four))
    assert bool(first.any()) and (first - second).norm() <= 1e-6 * first.norm()
    norms = [
        json.loads((gradients[number] / "sums.json").read_text())["sums"]["num_replicas"]["grad_norm"]
        for number in (0, 2)
    ]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_a_rank_holds_its_share_of_weights_gradients_and_moments(gradients):
    alone, by_two, by_four = (json.loads((folder / "sums.json").read_text())["held"] for folder in gradients)
    for name, size in alone[0].items():
        assert sum(part[name] for part in by_two) == size
        assert max(part[name] for part in by_two) <= 0.51 * size
        assert sum(part[name] for part in by_four) == 2 * size  # two replicas
        assert max(part[name] for part in by_four) <= 0.51 * size


def test_no_rank_waits_much_longer_for_the_others_than_a_phase_may_last(gradients):
    """Longer waits only who waits for what has no limit, such as a warm start."""
    found = json.loads((gradients[1] / "sums.json").read_text())
    longest, patient = max(found["limits"]), found["timeouts"].pop("patient")
    assert len(found["limits"]) >= 5 and len(found["timeouts"]["replicas"]) == 2
    assert all(longest < value <= longest + 600 for values in found["timeouts"].values() for value in values)
    assert min(patient) > 24 * 3600


def test_dealt_items_are_gathered_in_their_order(monkeypatch):
    items = list(range(23))
    for num_ranks, hand, per_engine in ((1, 4, 1), (3, 4, 1), (4, 3, 2), (5, 1, 1)):
        monkeypatch.setattr(distributed._world, "ranks_per_engine", per_engine)
        monkeypatch.setattr(distributed, "num_ranks", lambda num_ranks=num_ranks: num_ranks)
        shares = []
        for rank in range(num_ranks):
            monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
            shares.append(distributed.deal(items, hand))
        assert sorted(item for share in shares[::per_engine] for item in share) == items
        assert all(shares[rank] == shares[rank - rank % per_engine] for rank in range(num_ranks))
        monkeypatch.setattr(distributed, "exchange", lambda share, shares=shares: shares)
        assert distributed.gather([], hand) == items


def test_every_rank_makes_as_many_passes_and_each_microbatch_counts_once(monkeypatch):
    monkeypatch.setattr(distributed, "num_ranks", lambda: 4)
    for num_parts in range(10):
        dealt = []
        for rank in range(4):
            monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
            dealt.append(distributed.deal_microbatches(list(range(num_parts))))
        assert len({len(share) for share in dealt}) == 1
        assert sorted(part for share in dealt for part, weight in share if weight) == list(range(num_parts))


def test_the_plan_for_ranks_is_even(monkeypatch):
    """17 rows of 40 to 60 tokens: three microbatches of at most 400 become four of about equal size."""
    generator = torch.Generator().manual_seed(0)
    prompts = [[1000 + index] * 10 for index in range(17)]
    responses = [[5] * int(torch.randint(30, 50, (), generator=generator)) for _ in range(17)]
    alone = plan_microbatches(prompts, responses, 256, 400)
    plan = plan_microbatches(prompts, responses, 256, 400, multiple_of=4)
    assert len(alone) == 3 and len(plan) == 4
    assert sorted(row for part in plan for row in part.indices) == list(range(17))
    sizes = [sum(10 + len(responses[row]) for row in part.indices) for part in plan]
    assert sizes == sorted(sizes, reverse=True) == [part.num_tokens for part in plan]
    assert sum(sizes) / (4 * sizes[0]) > 0.85
    assert len(plan_microbatches(prompts[:3], responses[:3], 256, 400, multiple_of=4)) == 3  # a row cannot be divided
    assert plan_microbatches([], [], 256, 400, multiple_of=4) == []


def test_a_child_that_runs_alone_finds_nothing_of_torchrun(monkeypatch):
    names = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    names |= {"TORCHELASTIC_RUN_ID", "GROUP_RANK", "ROLE_NAME", "ROLE_WORLD_SIZE"}
    for name in names:
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("MINE", "1")
    found = distributed.environment_of_one_process()
    assert found["MINE"] == "1" and not names & found.keys()
