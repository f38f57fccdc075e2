"""`benchmark gpu` and experiments/gpu_first_run.sh: the whole command on a tiny model, its arithmetic, its files.

The script is run with a stand-in for Python, so that its parts take no time. One test runs the whole command with the
real engine, in the background.
"""

import csv
import itertools
import json
import math
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from tiny import REPOSITORY, run_python
from transformers import AutoModelForCausalLM

import GRPO_train
from experiments.benchmark import gpu
from experiments.benchmark.__main__ import main
from experiments.benchmark.engine_step import OfStatedLengths
from experiments.benchmark.first_run import summarize
from experiments.benchmark.gpu_settings import SHAPES, load_settings, make_inputs
from experiments.benchmark.training_step import count_update, count_work
from plainrl.lora import add_adapters
from plainrl.microbatches import microbatches
from plainrl.prefix_tree import share_prefixes
from plainrl.processor import fast_dtype
from plainrl.records import UserError

TINY = ["device=cpu", "shape=tiny"]
DTYPE = fast_dtype("cpu")
UPDATE = ("GRPO update", f"microbatches of 160 tokens, {DTYPE}, checkpointing")


def read_figures(path):
    """The figures of a CSV file by part and setting; those with a unit as numbers."""
    found = {}
    with path.open() as file:
        for row in csv.DictReader(file):
            assert row["card"] == "cpu"
            value = float(row["value"]) if row["unit"] else row["value"]
            found.setdefault((row["part"], row["setting"]), {})[row["figure"]] = value
    return found


def measure_on_cpu(background):
    """The whole command, with the real engine."""
    path = background.new_folder("gpu_benchmark") / "folder" / "gpu.csv"
    return path, run_python("-m", "experiments.benchmark", "gpu", *TINY, f"results={path}", start=background.start)


@pytest.mark.background(job=measure_on_cpu)
def test_the_whole_command(background):
    path, process = background.result(measure_on_cpu)
    assert process.returncode == 0, process.stderr
    found = read_figures(path)
    parts = ["environment", "settings", "GRPO update", "old log-probs", "SFT step"]
    assert [part for part, _ in found] == [*parts, "start", "weights", "GRPO step", "rollout", "rollout"]
    assert found["environment", ""]["torch"] == torch.__version__.partition("+")[0]
    assert found["settings", ""]["response_tokens"] == "[5, 16, 40]"
    step = found["GRPO step", UPDATE[1]]
    phases = [step[f"{phase}_seconds"] for phase in ("sync", "rollout", "grade", "old_log_probs", "train")]
    assert step["step_seconds"] >= sum(phases) * 0.8 and all(seconds > 0 for seconds in phases)
    assert found["weights", DTYPE]["sync_seconds"] > 0
    rollouts, _ = make_inputs(load_settings(TINY)[0])
    num_tokens = sum(len(row.response.token_ids) for row in rollouts)
    for setting in ("with log-probs", "without log-probs"):
        figures = found["rollout", setting]
        assert figures["sampled_tokens_per_second"] == pytest.approx(num_tokens / figures["seconds"], rel=1e-4)
    assert list(path.parent.iterdir()) == [path]  # the random model is gone


def test_the_training_half_alone_and_off_policy(tmp_path, capsys, monkeypatch):
    """The file is complete up to the part that was measured last."""
    monkeypatch.setattr(gpu, "matmul_peak", lambda device, compute_dtype: 0.5)  # measuring it takes seconds
    off_policy = ["epochs_per_rollout_batch=2", "train_batch_size=8", "loss_type=grpo_clip"]
    main(["gpu", *TINY, *off_policy, "part=training", f"results={tmp_path}/gpu.csv"])
    found = read_figures(tmp_path / "gpu.csv")
    assert list(found)[2:] == [UPDATE, ("old log-probs", "16 rows a pass"), ("SFT step", UPDATE[1])]
    assert found["environment", ""]["matmul_tflop_per_second"] == 0.5
    for figures in list(found.values())[2:]:
        row_tokens = int(figures["row_tokens"])
        assert figures["tokens_per_second"] == pytest.approx(row_tokens / figures["seconds"], rel=1e-4)
        assert figures["mfu"] == pytest.approx(figures["useful_tflop"] / figures["seconds"] / 0.5, rel=1e-4)
        assert 0 < int(figures["nodes"]) < row_tokens and figures["peak_gib"] > 0
    config, _ = load_settings([*TINY, *off_policy])
    trained = [row for row in make_inputs(config)[0] if row.advantage != 0]
    num_tokens = sum(len(row.response.prompt_ids) + len(row.response.token_ids) for row in trained)
    assert int(found[UPDATE]["row_tokens"]) == 2 * num_tokens  # each row in each epoch
    assert int(found[UPDATE]["microbatches"]) >= 4  # two optimizer steps in each
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"written to {tmp_path}/gpu.csv" and lines[-2].startswith("SFT step (microbatches of 160")


def test_without_vllm_one_line_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu, "matmul_peak", lambda device, compute_dtype: 0.5)
    monkeypatch.setattr("plainrl.devices.has_module", lambda name: False)
    main(["gpu", *TINY, "part=engine", f"results={tmp_path}/gpu.csv"])
    (skipped,) = [line for line in capsys.readouterr().out.splitlines() if "vLLM" in line]
    assert skipped.startswith("engine: skipped evaluator_device = cpu needs the CPU build of vLLM")
    assert read_figures(tmp_path / "gpu.csv")["engine", ""]["skipped"] in skipped


def test_memory_that_does_not_suffice_is_one_line(tmp_path, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nAnd more lines.")

    monkeypatch.setattr(gpu, "matmul_peak", lambda device, compute_dtype: 0.5)
    monkeypatch.setattr(gpu, "measure_training", fail)
    with pytest.raises(UserError, match=r"part = training: .* Tried to allocate 2.00 GiB\.\); lower microbatch_tokens"):
        main(["gpu", *TINY, "part=training", f"results={tmp_path}/gpu.csv"])
    assert ("settings", "") in read_figures(tmp_path / "gpu.csv")


def test_operations_are_those_counted_by_hand():
    policy = AutoModelForCausalLM.from_config(SHAPES["tiny"].model)
    # Two rows of 2 prompt tokens and 1 response token: both share the 2 nodes, the first sees 1 node, the second 2.
    work = count_work(policy, [([1, 2], [3]), ([1, 2], [4])], max_rows=2, max_tokens=0)
    weights = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)  # 2 layers: queries and output, keys and values, the MLP
    attention = 4 * 2 * 64 * (1 + 2)
    forward = 2 * 2 * weights + attention + 2 * 2 * 64 * 512  # weights, attention, the output layer
    assert work == (6, 2, 1, pytest.approx(3 * forward / 1e12))
    apart = count_work(policy, [([1, 2], [3]), ([1, 2], [4])], max_rows=1, max_tokens=0, is_training=False)
    assert apart == (6, 4, 2, pytest.approx((forward + 2 * 2 * weights + attention) / 1e12))
    config, _ = load_settings([*TINY, "lora_rank=2"])
    add_adapters(policy, config)  # frozen weights have no gradient of their own, attention's products have both
    adapted = count_work(policy, [([1, 2], [3]), ([1, 2], [4])], max_rows=2, max_tokens=0)
    assert adapted.tflop == pytest.approx((2 * forward + attention) / 1e12)


def test_the_work_of_an_update_is_that_of_its_microbatches(monkeypatch):
    """Counted where GRPO_train.py divides the rows: the same numbers of rows and microbatches."""
    config, _ = load_settings([*TINY, "epochs_per_rollout_batch=2", "train_batch_size=8", "microbatch_tokens=60"])
    policy = AutoModelForCausalLM.from_config(SHAPES["tiny"].model)
    assert share_prefixes(policy)
    rollouts, _ = make_inputs(config)
    for rollout in rollouts:
        rollout.old_log_probs = torch.zeros(len(rollout.response.token_ids))
    taken = []

    def count(policy, prompts, tokens, *limits):
        for part in microbatches(policy, prompts, tokens, *limits):
            taken.append(sum(len(prompts[index]) + len(tokens[index]) for index in part.indices))
            yield part

    monkeypatch.setattr(GRPO_train, "microbatches", count)
    config = config.model_copy(update={"max_sync_error": math.inf})
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
    GRPO_train.update_policy(policy, optimizer, rollouts, 0, 1, config)
    work = count_update(policy, rollouts, config)
    assert (work.microbatches, work.row_tokens) == (len(taken), sum(taken))


def test_rollouts_have_the_stated_lengths_and_advantages():
    config, sft_config = load_settings(TINY)
    rollouts, examples = make_inputs(config)
    lengths = [len(row.response.token_ids) for row in rollouts]
    assert sum(lengths) / 16 == pytest.approx(16, abs=0.5) and min(lengths) >= 5 and max(lengths) <= 40
    assert [row.advantage for row in rollouts] == [1, -1] * 4 + [0] * 8  # 60 % of 4 groups are 2
    assert all(13 <= len(row.prompt_ids) <= 17 for row in examples)
    assert len(examples) == sft_config.train_batch_size == 8
    assert make_inputs(config) == (rollouts, examples)


def test_each_request_has_its_own_length():
    shared = SimpleNamespace(clone=lambda: SimpleNamespace(stop=["</answer>"], max_tokens=1024, ignore_eos=False))
    settings = OfStatedLengths(shared, [7, 5])
    requests = [settings.clone(), settings.clone()]
    assert [(request.max_tokens, request.ignore_eos) for request in requests] == [(7, True), (5, True)]
    assert requests[0].stop == ["</answer>"]


def test_settings_hold_for_both_scripts_and_suit_the_card(monkeypatch):
    config, sft_config = load_settings([*TINY, "compute_dtype=float32", "gradient_accumulation_steps=2"])
    for settings in (config, sft_config):
        assert (settings.compute_dtype, settings.gradient_accumulation_steps) == ("float32", 2)
        assert settings.policy_device == "cpu" and settings.microbatch_tokens == 160 and settings.preset == "one-gpu"
    assert load_settings([*TINY, "microbatch_tokens=99"])[0].microbatch_tokens == 99
    of_grpo = load_settings([*TINY, "length_normalization=masked_normalize"])  # SFT has other choices
    assert [settings.length_normalization for settings in of_grpo] == ["masked_normalize", "sum"]
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    sizes = {"cuda:0": 24e9, "cuda:1": 80e9}
    monkeypatch.setattr(
        "torch.cuda.get_device_properties", lambda device: SimpleNamespace(total_memory=sizes[str(device)])
    )
    for device, rank in (("cuda:0", 32), ("cuda:1", 0)):
        config, sft_config = load_settings([f"device={device}"])
        assert config.lora_rank == sft_config.lora_rank == rank and config.shares_gpu
        assert config.policy_device == config.evaluator_device == sft_config.policy_device == device


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("device=cuda:1", "device = cuda:1: there is no such device"),
        ("shape=small", "shape = 'small'"),
        ("response_tokens=[16,5,40]", r"response_tokens = \[16, 5, 40\]: give numbers"),
        ("response_tokens=[5,16,65]", "sampling_max_tokens = 64 the most"),
        ("template_tokens=200", "have up to 271 tokens .* raise it to that"),
        ("resulst=a.csv", "did you mean results"),
        ("config=mine.yaml", "^config: a benchmark takes single keys alone"),
    ],
)
def test_mistakes_are_named(argument, message, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    others = [setting for setting in TINY if not argument.startswith(setting.partition("=")[0])]
    with pytest.raises(UserError, match=message):
        load_settings([*others, argument])


def test_help_has_the_keys_of_each_command(capsys):
    for arguments, key in ((["--help"], "num_pairs"), (["gpu", "--help"], "advantage_fraction")):
        with pytest.raises(SystemExit):
            main(arguments)
        text = capsys.readouterr().out
        assert f"\n  {key}=" in text and "\n  microbatch_tokens=" in text
    assert "-m experiments.benchmark gpu [key=value ...]" in text


# --- the first run ----------------------------------------------------------------------------------------------------

CASES = [
    {"case": "test_scores[a]", "outcome": "passed", "seconds": 1.0},
    {"case": "test_memory", "outcome": "failed", "seconds": 1.0, "why": "trace\nassert 3 < 2"},
    {"case": "test_flash[a]", "outcome": "skipped", "seconds": 0.0, "why": "needs flash-attn"},
    {"case": "test_flash[b]", "outcome": "skipped", "seconds": 0.0, "why": "needs flash-attn"},
]
FIGURES = """card,part,setting,figure,unit,value
NVIDIA H100,environment,,torch,,2.11.0
NVIDIA H100,environment,,vllm,,absent
NVIDIA H100,GRPO update,checkpointing,seconds,s,3.7216
NVIDIA H100,GRPO update,checkpointing,repetitions,,3
NVIDIA H100,SFT st"""  # cut off while it was written

STAND_IN = """#!/usr/bin/env bash
case "$*" in
  "-m experiments.benchmark.first_run "*) exec {python} "$@";;
  "-m pytest tests/gpu -m gpu and not engine") cat {cases} > "$GPU_CHECK_JSONL"; echo "1 failed"; exit $FIRST_STATUS;;
  "-m pytest tests/gpu -m gpu and engine -k not killed") if ((HANGS)); then sleep 60; fi;;
  "-m experiments.benchmark gpu part=training "*) cat {figures} > "${{5#results=}}"; echo "$@" > {called};;
  "-m experiments.benchmark gpu part=engine results="*" num_engine_repetitions=1 device="*) ;;
  *) echo "unexpected: $*"; exit 9;;
esac
"""


@pytest.fixture
def first_run(tmp_path):
    """Run the script with a stand-in for Python, which fails, hangs and writes what a real part would."""
    (tmp_path / "cases").write_text("".join(json.dumps(case) + "\n" for case in CASES))
    (tmp_path / "figures").write_text(FIGURES)
    names = {name: tmp_path / name for name in ("cases", "figures", "called")}
    python = tmp_path / "python"
    python.write_text(STAND_IN.format(python=sys.executable, **names))
    python.chmod(0o755)

    def run(*keys, first_status=0, hangs=0, **environment):
        environment = {"PYTHON": str(python), "FIRST_STATUS": str(first_status), "HANGS": str(hangs), **environment}
        command = [str(REPOSITORY / "experiments" / "gpu_first_run.sh"), "results", *keys]
        inherited = {name: value for name, value in os.environ.items() if name != "GPU_CHECK_DEVICE"}
        return subprocess.run(
            command, capture_output=True, text=True, cwd=tmp_path, timeout=100, env=inherited | environment
        )

    return run


def test_the_first_run_goes_on_after_a_failing_part(first_run, tmp_path):
    process = first_run("preset=small-gpu", first_status=1)
    assert process.returncode == 1, process.stderr
    assert "check_training: exit status 1; the last line of its log: 1 failed" in process.stdout
    summary = (tmp_path / "results/summary.md").read_text()
    assert summary in process.stdout and "**NVIDIA H100**\n\ntorch 2.11.0, vllm absent\n" in summary
    assert "| check_training | exit status 1: 1 passed, 1 failed, 2 skipped |" in summary
    assert "- test_memory: trace assert 3 < 2" in summary and "- needs flash-attn (cases: 2)" in summary
    assert "| GRPO update | checkpointing | seconds 3.72, repetitions 3 |\n" in summary and "SFT" not in summary
    assert [
        f"| {part} | ended |" in summary for part in ("benchmark_training", "check_engine", "benchmark_engine")
    ] == [True] * 3
    called = (tmp_path / "called").read_text().split()
    assert called[-2:] == ["device=cuda:0", "preset=small-gpu"]


def test_the_first_run_ends_in_time(first_run, tmp_path):
    """With 10 seconds, the third part must have ended after 7, and the fourth still runs."""
    process = first_run(hangs=1, TIME_LIMIT="10", GPU_CHECK_DEVICE="cpu")
    assert process.returncode == 1, process.stderr
    summary = (tmp_path / "results/summary.md").read_text()
    assert "| check_engine | cut off by its time limit |" in summary
    assert "| benchmark_engine | ended |" in summary
    assert (tmp_path / "called").read_text().split()[-2:] == ["device=cpu", "shape=tiny"]


def test_the_first_run_has_time_for_what_its_parts_are_estimated_to_take():
    """Each part ends by its share of the time also if those before it take as long as the guide says at most."""
    script = (REPOSITORY / "experiments/gpu_first_run.sh").read_text()
    shares = {f"{name}_{half}": int(share) for name, half, share in re.findall(r"^(\w+) (\w+) (\d+)\b", script, re.M)}
    guide = (REPOSITORY / "docs/gpu.md").read_text()
    rows = re.findall(r"^\| `(\w+_\w+)` \|.*\| (\d+) % \| (?:\d+ to )?(\d+) \|$", guide, re.M)
    assert {part: int(share) for part, share, _ in rows} == shares and len(shares) == 4
    ends = list(itertools.accumulate(int(seconds) for _, _, seconds in rows))
    limit = int(re.search(r"TIME_LIMIT:-(\d+)", script)[1])
    assert all(end <= limit * share / 100 for end, share in zip(ends, shares.values(), strict=True))
    assert f"to {ends[-1]}** |" in guide
    assert "_that_was_killed_" in (REPOSITORY / "tests/gpu/test_gpu_engine.py").read_text()  # what `-k` leaves out


def test_the_first_run_succeeds_and_forgets_the_one_before(first_run, tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "check_engine.jsonl").write_text(json.dumps(CASES[1] | {"case": "test_old"}) + "\n")
    assert first_run().returncode == 0
    assert "test_old" not in "\n".join(summarize(tmp_path / "results"))
