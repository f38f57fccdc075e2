"""DPO training on tiny models: gradients, reference scores, learning, and a run that is killed and resumed."""

import math
import random
import signal
import sys
import time
from subprocess import DEVNULL

import pytest
import torch
from kill_and_resume import comparable_metrics
from tiny import REPOSITORY, read_lines, run_python, tiny_arguments, train_rows, without_sft_keys, write_lines
from transformers import AutoTokenizer

from plainrl.cli import load_config
from plainrl.policy import load_policy, prepare_training
from plainrl.prompting import fill_prompt, load_prompt_template
from plainrl.run_folder import RunFolder
from plainrl.supplement_config import DPOConfig
from SFT_helper import pad_token_id
from supplement import DPO_train
from supplement.DPO_helper import compute_dpo_loss, score_pair
from supplement.preference_data import TokenizedPair, load_pairs, tokenize_pairs
from supplement.preference_scores import SCORES, PairScore, reference_scores, score_pairs

DATA = [  # which of two words is preferred depends on the instruction's first word alone
    {
        "prompt": f"{first} {number}",
        "chosen": f"{right} it is",
        "rejected": f"{wrong} it is",
    }
    for number in range(24)
    for first, right, wrong in (("Add", "yes", "no"), ("Take", "no", "yes"))
]


def dpo_arguments(model, runs_dir, data, **overrides):
    """The arguments of a run of DPO_train.py without an engine: 12 steps of 8 pairs, measured every 4."""
    values = {
        "warm_start": "",
        "train_data": data,
        "validation_data": "",
        "num_pairs": "all",
        "num_validation_pairs": 16,
        "beta": 0.5,
        "max_steps": 12,
        "eval_interval": 4,
        "checkpoint_interval": 4,
        "prompt": "alpaca",
        "stop_string": "",
        "learning_rate": "3e-3",
    }
    return without_sft_keys(tiny_arguments(model, runs_dir, **(values | overrides)))


@pytest.fixture
def data(tmp_path):
    return write_lines(tmp_path / "pairs.jsonl", DATA)


def config_of(arguments):
    return load_config(DPOConfig, REPOSITORY / "supplement/dpo_train.yaml", arguments)


@pytest.fixture
def batch(tiny_model_folder, tmp_path, data):
    """Configuration, policy, six pairs of two prompts and made-up reference scores."""
    config = config_of(dpo_arguments(tiny_model_folder, tmp_path, data))
    policy, tokenizer = load_policy(config)
    pairs = tokenize_pairs(load_pairs([], config)[0][:4], tokenizer, config)
    pairs += [TokenizedPair(pairs[0].pair, pairs[0].prompt_ids, [*pairs[n].chosen_ids, 7], [9] * n) for n in (1, 2)]
    chance = random.Random(0)
    references = [PairScore(chance.gauss(-30, 9), chance.gauss(-30, 9)) for _ in pairs]
    return config, policy, pairs, references, pad_token_id(tokenizer)


@pytest.mark.parametrize("limits", [(8, 0), (1, 0), (8, 150)])
def test_the_gradient_is_that_of_the_mean_over_pairs(batch, limits):
    """Whatever the microbatches, and though prompts are shared: against one plain forward pass for each pair."""
    config, policy, pairs, references, padding_id = batch
    config = config.model_copy(
        update={
            "train_batch_size": 8,
            "gradient_accumulation_steps": 8 // limits[0],
            "microbatch_tokens": limits[1],
        }
    )
    losses = []
    for pair, reference in zip(pairs, references, strict=True):
        chosen, rejected = score_pair(policy, pair.prompt_ids, [pair.chosen_ids, pair.rejected_ids]).split(1)
        loss, _ = compute_dpo_loss(chosen, rejected, *torch.tensor(reference).split(1), config.beta)
        losses.append(loss)
    expected = torch.cat(losses).mean()
    expected.backward()
    gradients = {name: part.grad.clone() for name, part in policy.named_parameters()}
    policy.zero_grad(set_to_none=True)
    metrics = DPO_train.accumulate_gradients(policy, pairs, references, padding_id, config)
    assert metrics["train/loss"] == pytest.approx(expected.item(), abs=1e-5)
    assert metrics["train/num_response_tokens"] == sum(len(p.chosen_ids) + len(p.rejected_ids) for p in pairs)
    for name, part in policy.named_parameters():
        torch.testing.assert_close(part.grad, gradients[name], atol=1e-5, rtol=1e-4)


def test_metrics_of_a_batch_are_those_of_its_scores(batch):
    config, policy, pairs, references, padding_id = batch
    metrics = DPO_train.accumulate_gradients(policy, pairs, references, padding_id, config)
    scores = score_pairs(policy, pairs, padding_id, config)
    rewards = [
        [config.beta * (own - other) for own, other in zip(score, reference, strict=True)]
        for score, reference in zip(scores, references, strict=True)
    ]
    chosen, rejected = zip(*rewards, strict=True)
    expected = {
        "chosen_reward": chosen,
        "rejected_reward": rejected,
        "margin": [a - b for a, b in rewards],
        "accuracy": [float(score.chosen > score.rejected) for score in scores],
        "reward_accuracy": [float(a > b) for a, b in rewards],
        "chosen_log_prob": [score.chosen for score in scores],
        "rejected_log_prob": [score.rejected for score in scores],
    }
    for name, values in expected.items():
        assert metrics[f"train/{name}"] == pytest.approx(sum(values) / len(values), abs=1e-3), name


def test_reference_scores_are_kept_with_the_run(batch, tmp_path):
    """Scored once; of other pairs, or if the file is damaged, again; and then they are the same numbers."""
    config, policy, pairs, _, padding_id = batch
    num_calls = 0

    def first_policy():
        nonlocal num_calls
        num_calls += 1
        return policy

    with RunFolder.create(config.model_copy(update={"run_name": "scores"}), "dpo") as run:
        scores = reference_scores(run, pairs, padding_id, config, first_policy)
        assert reference_scores(run, pairs, padding_id, config, first_policy) == scores and num_calls == 2, "begun anew"
        run.checkpoint = run.path / "checkpoints/step_000001"
        assert reference_scores(run, pairs, padding_id, config, first_policy) == scores and num_calls == 2
        assert reference_scores(run, pairs[:3], padding_id, config, first_policy) != scores and num_calls == 3
        (run.path / SCORES).write_text('{"data": ')
        assert reference_scores(run, pairs, padding_id, config, first_policy) == scores and num_calls == 4
    for pair, score in zip(pairs, scores, strict=True):
        with torch.no_grad():
            plain = score_pair(policy, pair.prompt_ids, [pair.chosen_ids, pair.rejected_ids])
        assert score == pytest.approx(plain.tolist(), abs=1e-3)


def test_a_tiny_run_learns_what_is_preferred(tiny_model_folder, tmp_path, data, monkeypatch, capsys):
    """Held-out accuracy rises; the loss begins at log 2; the best checkpoint is that of the best accuracy."""
    monkeypatch.setattr(DPO_train, "check_devices", lambda config: None)  # no engine is used, so none need be there
    DPO_train.main(dpo_arguments(tiny_model_folder, tmp_path, data, run_name="learns"))
    rows = read_lines(tmp_path / "learns" / "metrics.jsonl")
    measured = {row["eval_step"]: row for row in rows if "eval_step" in row}
    assert list(measured) == [0, 4, 8, 12]
    assert measured[0]["eval/loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert measured[0]["eval/accuracy"] <= 0.75
    assert measured[12]["eval/accuracy"] >= measured[0]["eval/accuracy"] + 0.25
    assert measured[12]["eval/margin"] > 1 > abs(measured[0]["eval/margin"])
    assert train_rows(tmp_path / "learns")[0]["train/loss"] == pytest.approx(math.log(2), abs=1e-3)
    best = max((4, 8, 12), key=lambda step: measured[step]["eval/accuracy"])
    kept = {path.name for path in (tmp_path / "learns/checkpoints").iterdir()}
    assert kept == {f"step_{step:06d}" for step in {best, 12}}
    last_lines = capsys.readouterr().out.splitlines()[-2:]
    assert last_lines[0].startswith(
        f"16 held-out pairs: the chosen response is likelier in {measured[12]['eval/accuracy']:.3f} of them (before "
        f"training {measured[0]['eval/accuracy']:.3f}, best "
    )
    assert not list((tmp_path / "learns/samples").iterdir())  # nothing was sampled
    assert (tmp_path / "learns/training.png").stat().st_size > 10_000
    report = (tmp_path / "learns/report.html").read_text()
    for title in ("preference loss (nats per pair)", "preference pairs (share)", "implicit reward (beta times nats)"):
        assert title in report


def test_the_best_checkpoint_is_that_of_the_best_accuracy(tiny_model_folder, tmp_path, data):
    config = config_of(dpo_arguments(tiny_model_folder, tmp_path, data, run_name="best"))
    with RunFolder.create(config, "dpo") as run:
        for step, accuracy, reward in ((1, 0.9, 0.1), (2, 0.5, 0.8), (3, 0.6, 0.2)):
            (run.path / f"checkpoints/step_{step:06d}").mkdir(parents=True)
            run.log({"eval_step": step, "eval/accuracy": accuracy})
            run.log({"eval_step": step, "eval/answer_reward": reward})
        run.prune_checkpoints(keep_last=1, keep_best=True)
        assert sorted(path.name for path in (run.path / "checkpoints").iterdir()) == ["step_000001", "step_000003"]


def kill_and_resume(background):
    """Two runs with RMSprop; one is killed after its second checkpoint, loses its reference scores, and goes on."""
    folder = background.new_folder("dpo")
    data = write_lines(folder / "pairs.jsonl", DATA)
    options = {"optimizer": "rmsprop", "learning_rate": "3e-4", "checkpoint_interval": 2}
    command = ["-m", "supplement.DPO_train"]
    straight = dpo_arguments(background.tiny_model, folder, data, run_name="straight", **options)
    results = [run_python(*command, *straight, start=background.start)]
    killed = dpo_arguments(background.tiny_model, folder, data, run_name="killed", **options)
    process = background.start(
        [sys.executable, "-c", SLOW_SCRIPT, *killed], cwd=REPOSITORY, stdout=DEVNULL, stderr=DEVNULL
    )
    deadline = time.monotonic() + 1800
    while not (folder / "killed/checkpoints/step_000004").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (folder / "killed" / SCORES).unlink()
    resumed = [f"resume={folder / 'killed'}"]
    results.append(run_python(*command, *resumed, start=background.start))
    return folder, process.returncode, results


# The killed run waits in each step, so that the signal meets it between two checkpoints.
SLOW_SCRIPT = """
import time
import supplement.DPO_train as script
accumulate = script.accumulate_gradients
def slowly(*arguments, **options):
    time.sleep(0.3)
    return accumulate(*arguments, **options)
script.accumulate_gradients = slowly
script.run_main(script.main)
"""


@pytest.mark.background(job=kill_and_resume)
def test_a_killed_run_goes_on_bit_for_bit(background):
    folder, status, results = background.result(kill_and_resume)
    assert status == -signal.SIGKILL
    for result in results:
        assert result.returncode == 0, result.stderr
    assert "going on after step" in results[1].stdout
    straight, killed = folder / "straight", folder / "killed"
    assert comparable_metrics(straight) == comparable_metrics(killed)
    assert [row["train_step"] for row in train_rows(killed)] == list(range(1, 13))
    for name in ("final/model.safetensors", "checkpoints/step_000012/optimizer.safetensors", SCORES):
        assert (straight / name).read_bytes() == (killed / name).read_bytes(), name


def test_rmsprop_by_hand(tiny_model_folder, tmp_path, data):
    """v = 0.01 g^2 after the first step, and the weights move by lr g / (sqrt(v) + 1e-8)."""
    config = config_of(dpo_arguments(tiny_model_folder, tmp_path, data, optimizer="rmsprop"))
    policy, _ = load_policy(config)
    optimizer = prepare_training(policy, config)
    name, weight = next(iter(policy.named_parameters()))
    before = weight.detach().clone()
    for parameter in policy.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)
    optimizer.step()
    moved = config.learning_rate * 0.5 / (math.sqrt(0.01 * 0.25) + 1e-8)
    torch.testing.assert_close(weight.detach(), before - moved, atol=1e-6, rtol=0, msg=name)


def test_the_template_is_the_one_that_the_helper_takes(tiny_model_folder, tmp_path, data):
    config = config_of(dpo_arguments(tiny_model_folder, tmp_path, data))
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    (row,) = tokenize_pairs(load_pairs([], config)[0][:1], tokenizer, config)
    expected = fill_prompt(load_prompt_template("alpaca"), row.pair.instruction)
    assert tokenizer.decode(row.prompt_ids) == expected
