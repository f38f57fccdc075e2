"""The benchmark: its arithmetic, by hand; its files; our SFT turn on a tiny model. TRL itself is not run."""

import importlib
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from tiny import REPOSITORY

from experiments.benchmark import our_side, random_model
from experiments.benchmark.__main__ import main
from experiments.benchmark.against_trl import benchmarks_to_take
from experiments.benchmark.environment import discard_another_machines, record_environment, trl_record
from experiments.benchmark.figures import Row, Summary, read_rows, summarize, write_rows
from experiments.benchmark.report import plot, table
from experiments.benchmark.settings import BenchmarkConfig, grpo_settings, sft_settings
from experiments.benchmark.trl_task import TRL_CHECKPOINTING, require_same_work, trl_task
from experiments.benchmark.turns import TURNS, only_visible, take_turn
from plainrl.cli import load_config
from plainrl.config import SFTConfig
from plainrl.devices import run_command
from plainrl.records import UserError
from plainrl.run_records import describe_environment

RESULTS = REPOSITORY / "results"
ROWS = [
    Row("sft", "ours", 1, "tokens_per_second", "tokens/s", 600.0),
    Row("sft", "trl", 1, "tokens_per_second", "tokens/s", 150.0),
    Row("sft", "ours", 2, "tokens_per_second", "tokens/s", 500.0),
    Row("sft", "trl", 2, "tokens_per_second", "tokens/s", 100.0),
    Row("sft", "ours", 3, "tokens_per_second", "tokens/s", 550.0),
    Row("sft", "trl", 3, "tokens_per_second", "tokens/s", 137.5),
    Row("grpo", "ours", 1, "rollout_seconds", "s", 8.0),
    Row("grpo", "ours", 1, "train_seconds", "s", 10.0),
    Row("grpo", "trl", 1, "rollout_seconds", "s", 60.0),
    Row("grpo", "trl", 1, "train_seconds", "s", 100.0),
    Row("logprob", "ours", 1, "both_seconds", "s", 10.0),
    Row("logprob", "twice the questions", 1, "both_seconds", "s", 21.0),
]


def tiny_config(model, **values):
    sizes = {"rollout_batch_size": 8, "group_size": 4, "train_batch_size": 8, "gradient_accumulation_steps": 2}
    lengths = {"sampling_max_tokens": 16, "max_context_tokens": 384}
    return BenchmarkConfig(preset="laptop", model=model, **sizes, **lengths, **values)


def test_figures_are_summarized_over_pairs_and_compared_pair_by_pair():
    summaries = {(row.figure, row.side): row for row in summarize(ROWS)}
    assert summaries["tokens_per_second", "ours"] == Summary(
        "sft", "tokens_per_second", "tokens/s", "ours", (500.0, 550.0, 600.0), None
    )
    trl = summaries["tokens_per_second", "trl"]
    assert trl.spread == (100.0, 137.5, 150.0)
    assert trl.ratio == (4.0, 4.0, 5.0)  # ours / trl: 600 / 150, 500 / 100, 550 / 137.5
    assert summaries["both_seconds", "twice the questions"].ratio == (2.1, 2.1, 2.1)  # twice the work / ours
    line = "| sft | tokens_per_second | tokens/s | trl | 100 | 137.5 | 150 | 4, 4, 5 |"
    assert table(summarize(ROWS))[3] == line


def test_figures_survive_the_file_and_are_drawn(tmp_path):
    write_rows(tmp_path / "benchmark.csv", ROWS)
    assert read_rows(tmp_path / "benchmark.csv") == ROWS
    plot(ROWS, tmp_path / "benchmark.png")
    assert (tmp_path / "benchmark.png").read_bytes().startswith(b"\x89PNG")
    plot([row for row in ROWS if row.benchmark == "logprob"], tmp_path / "nothing.png")
    assert not (tmp_path / "nothing.png").exists()


def test_a_turn_of_ours_on_a_tiny_model(tiny_model_folder):
    config = tiny_config(tiny_model_folder, sft_batch_size=4, num_measured_steps=1)
    figures = take_turn("sft", "ours", config, {})["ours"]
    assert figures["tokens_per_second"] * figures["step_seconds"] == pytest.approx(4 * 150, rel=0.5)
    # 6 FLOP per weight and token: 2 layers of 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128 weights; less for shared prompts
    assert 0 < figures["computed_tflop"] < 6 * 4 * 384 * (2 * 36864 + 512 * 64) / 1e12
    assert 0.1 < figures["peak_memory_gib"] < 4
    assert our_side.work_grade(config, "ours")["ours"]["graded_responses_per_second"] > 1000


def test_both_sides_are_given_the_same_work(tiny_model_folder, tmp_path):
    config = tiny_config(tiny_model_folder)
    ours, trl = grpo_settings(config, tmp_path), trl_task("grpo", "trl", config, tmp_path)
    assert ours.stop_string == "" and ours.sampling_min_tokens == ours.sampling_max_tokens == trl["response_tokens"]
    assert len(trl["prompts"]) == ours.n_grpo_steps * ours.num_questions_per_step == 4
    assert trl["batch_size"] == ours.rollout_batch_size and trl["microbatch_size"] == 8
    assert trl_task("sft", TRL_CHECKPOINTING, config, tmp_path)["gradient_checkpointing"]
    sft = trl_task("sft", "trl", config, tmp_path)
    assert not sft["gradient_checkpointing"]
    assert len(sft["prompt_ids"]) == len(sft["response_ids"]) == config.sft_batch_size
    assert json.loads(json.dumps(sft))["adam_betas"] == [0.9, 0.95]


@pytest.mark.parametrize(
    "folder", sorted({RESULTS / "benchmark", *(path.parent for path in RESULTS.glob("benchmark*/README.md"))}), ids=str
)
def test_the_table_in_the_results_is_what_the_figures_say(folder):
    lines = table(summarize(read_rows(folder / "benchmark.csv")))
    text = (folder / "README.md").read_text()
    assert [line for line in lines if line not in text] == []
    environment = json.loads((folder / "environment.json").read_text())
    assert {"cpu", "cpu_count", "memory_gib", "versions"} <= environment.keys()
    assert trl_record(environment)["versions"]["trl"]


def test_the_record_of_a_later_measurement_keeps_what_an_older_file_calls_peer(tiny_model_folder, tmp_path):
    path = tmp_path / "environment.json"
    path.write_text(json.dumps({"ours": {"grade": {"seed": 3}}, "peer": {"grpo, trl": {"beta": 0}, "versions": 1}}))
    record_environment(path, ["sft"], tiny_config(tiny_model_folder), {"versions": {"trl": "2"}})
    record = json.loads(path.read_text())
    assert record["trl"] == {"grpo, trl": {"beta": 0}, "versions": {"trl": "2"}} and "peer" not in record
    assert record["ours"]["grade"] == {"seed": 3} and record["ours"]["sft"]["train_batch_size"] == 32


def test_mistakes_are_named():
    for arguments in ([], ["speed"]):
        with pytest.raises(UserError, match=f"usage: {run_command('python -m experiments.benchmark sft')}"):
            main(arguments)
    with pytest.raises(UserError, match="^config: a benchmark takes single keys alone"):
        main(["sft", "config=mine.yaml"])
    with pytest.raises(UserError, match="^train_data: the benchmark has data of its own"):
        main(["grpo", "train_data=mine.jsonl"])


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("sft", {"sft_batch_size": 20}, "sft_batch_size = 20: TRL would leave rows out; use a multiple of trl_sft"),
        ("grpo", {"trl_grpo_microbatch": 3}, "train_batch_size = 8: TRL would leave rows out"),
        ("grpo", {"train_batch_size": 4}, "train_batch_size = 4: TRL's side does the work of train_batch_size = 8"),
        ("sft", {"lora_rank": 4}, "lora_rank = 4: TRL's side does the work of lora_rank = 0; use that"),
        ("grpo", {"mask_truncated_responses": True}, "mask_truncated_responses = True: TRL's side does the work of"),
    ],
)
def test_what_would_be_unequal_work_is_refused(name, settings, message):
    config = tiny_config("m").model_copy(update=settings)
    with pytest.raises(UserError, match=f"^{message}"):
        require_same_work(config, [name])
    require_same_work(config, ["rollout", "grade"])
    require_same_work(tiny_config("m"), ["sft", "grpo"])


def test_a_random_model_is_whole_or_not_there_and_grpo_has_no_use_for_it(tmp_path, monkeypatch):
    def stop(folder):
        folder.mkdir(parents=True)
        raise KeyboardInterrupt

    monkeypatch.setattr(random_model, "resolve_model", lambda name: (_ for _ in ()).throw(UserError("absent")))
    config = tiny_config(random_model.QWEN, runs_dir=str(tmp_path))
    monkeypatch.setattr(random_model, "make_random_model", stop)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            random_model.choose_model(config)
    monkeypatch.setattr(random_model, "make_random_model", lambda folder: folder.mkdir())
    assert random_model.choose_model(config).model == str(tmp_path / "random-1.5b")
    keys = ["preset=laptop", f"model={random_model.QWEN}", f"runs_dir={tmp_path}", f"results_dir={tmp_path}/results"]
    with pytest.raises(UserError, match="^grpo: Qwen/Qwen2.5-Math-1.5B is not on this machine, .*hf download Qwen"):
        main(["grpo", *keys])


def test_of_all_benchmarks_those_are_left_out_that_make_no_sense(capsys):
    assert benchmarks_to_take("all", tiny_config("m")) == list(TURNS)
    assert benchmarks_to_take("all", tiny_config("m", lora_rank=4)) == ["rollout", "logprob", "grade"]
    assert "sft is left out: TRL's side trains all weights, and lora_rank = 4" in capsys.readouterr().out
    assert benchmarks_to_take("sft", tiny_config("m", lora_rank=4)) == ["sft"]  # require_same_work refuses it


def test_sft_is_measured_with_the_keys_that_are_given():
    def settings(*arguments):
        path = REPOSITORY / "grpo_train.yaml"
        config = load_config(BenchmarkConfig, path, ["preset=laptop", *arguments])
        given = [argument.partition("=")[0] for argument in arguments]
        return sft_settings(config.model_copy(update={"given": given}))

    preset = load_config(SFTConfig, REPOSITORY / "config.yaml", ["preset=laptop"])
    assert settings().microbatch_tokens == preset.microbatch_tokens
    assert settings().learning_rate == preset.learning_rate
    changed = settings("compute_dtype=float32", "microbatch_tokens=512", "compile_policy=true")
    assert (changed.compute_dtype, changed.microbatch_tokens, changed.compile_policy) == ("float32", 512, True)
    assert settings("length_normalization=masked_normalize").length_normalization == preset.length_normalization
    grpo_preset = load_config(BenchmarkConfig, REPOSITORY / "grpo_train.yaml", ["preset=laptop"])
    assert grpo_preset.microbatch_tokens != preset.microbatch_tokens
    same_as_in_grpo = settings(f"microbatch_tokens={grpo_preset.microbatch_tokens}")
    assert same_as_in_grpo.microbatch_tokens == grpo_preset.microbatch_tokens


def test_figures_of_another_machine_do_not_stay(tmp_path, monkeypatch, capsys):
    write_rows(tmp_path / "benchmark.csv", ROWS)
    here = describe_environment()
    for cpu, stays in ((here["cpu"], True), ("another", False)):
        (tmp_path / "environment.json").write_text(json.dumps({**here, "cpu": cpu}))
        discard_another_machines(tmp_path)
        assert (tmp_path / "benchmark.csv").exists() == (tmp_path / "environment.json").exists() == stays
    assert "figures of another machine (another) are removed" in capsys.readouterr().out


def test_trl_sees_one_gpu_alone():
    assert only_visible("cpu", "4,5") == {}
    assert only_visible("cuda:1", "4,5") == {"CUDA_VISIBLE_DEVICES": "5"}
    assert only_visible("cuda:1", "") == {"CUDA_VISIBLE_DEVICES": "1"}


def test_the_steps_of_trl_are_timed_and_counted_as_ours(monkeypatch):
    """A warm-up, two measured steps of one second each with its own peak, and one more that alone is counted."""
    names = ("GRPOConfig", "GRPOTrainer", "SFTConfig", "SFTTrainer")
    monkeypatch.setitem(sys.modules, "trl", SimpleNamespace(**dict.fromkeys(names)))
    trl_side = importlib.import_module("experiments.benchmark.trl_side")
    times, peaks = iter([10.0, 11.0, 12.0, 50.0]), iter([1.0, 2.0, 3.0, 9.0])
    monkeypatch.setattr(trl_side, "peak_memory_gib", lambda: next(peaks))
    monkeypatch.setattr(trl_side, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    weight = torch.ones(2, 3, requires_grad=True)
    accelerator = SimpleNamespace(backward=torch.Tensor.backward)
    trainer = SimpleNamespace(compute_loss=lambda: (torch.ones(4, 2) @ weight).sum(), accelerator=accelerator)
    clock = trl_side.StepClock()
    counter = trl_side.MatmulCounter(trainer, clock, first_step=3)
    for _ in range(4):
        trainer.accelerator.backward(trainer.compute_loss())
        clock.on_step_end()
    assert clock.figures(num_measured_steps=2) == {"step_seconds": 1.0, "peak_memory_gib": 3.0}
    assert counter.tflop == pytest.approx(2 * (2 * 4 * 2 * 3) / 1e12)  # forward, and the weight's gradient
