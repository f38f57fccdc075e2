"""A run that was killed by SIGKILL goes on with the same data and the same optimizer. No case needs an engine."""

import math

import pytest
import torch
from kill_and_resume import find_differences, find_torn, start, steps_of
from safetensors.torch import load_file
from small_qwen import DEVICE, GPU_CHECK, ON_GPU, VARIANTS
from tiny import tiny_arguments, train_rows
from train_without_engine import WITHOUT_ENGINE

import SFT_train
from plainrl.checkpoint import optimizer_tensors
from plainrl.loop import TrainingLoop

pytestmark = GPU_CHECK
NUM_STEPS, SAVED_AT, KILLED_AT = 5, 2, 4


def arguments_of(variant, model, folder, name):
    settings = {"max_steps": NUM_STEPS, "checkpoint_interval": SAVED_AT, "eval_interval": NUM_STEPS}
    settings |= {"policy_device": DEVICE, "keep_best": False, **variant}
    return tiny_arguments(model, folder, run_name=name, **settings)


@pytest.fixture(scope="module")
def killed(tmp_path_factory, tiny_model_folder):
    """For each variant the folder of its runs, and the process that is being killed. All start at once."""
    found = {}
    for name, variant in VARIANTS.items():
        folder = tmp_path_factory.mktemp("runs")
        arguments = [str(KILLED_AT), *arguments_of(variant, tiny_model_folder, folder, "killed")]
        found[name] = folder, start("tests/gpu/train_without_engine.py", arguments, folder / "killed.log")
    yield found
    for _, process in found.values():
        process.kill()


@pytest.fixture
def batches(monkeypatch):
    """SFT_train without an engine; the token ids of each batch that it trains on."""
    for name, substitute in WITHOUT_ENGINE.items():
        monkeypatch.setattr(SFT_train, name, substitute)
    accumulate, drawn = SFT_train.accumulate_gradients, []

    def watched(policy, batch, *args, **kwargs):
        drawn.append([row.response_ids for row in batch])
        return accumulate(policy, batch, *args, **kwargs)

    monkeypatch.setattr(SFT_train, "accumulate_gradients", watched)
    return drawn


@pytest.mark.parametrize("name", VARIANTS)
def test_a_killed_and_resumed_run_goes_on_as_if_nothing_had_been(
    name, killed, tiny_model_folder, batches, monkeypatch, record_property
):
    """Killed in step 4, resumed after step 2. On a CPU bit for bit. A GPU adds in another order, so it comes close."""
    runs, process = killed[name]
    SFT_train.main(arguments_of(VARIANTS[name], tiny_model_folder, runs, "straight"))  # meanwhile
    drawn = list(batches)
    batches.clear()
    assert process.wait(timeout=1800) == -9, (runs / "killed.log").read_text()[-3000:]
    folder = runs / "killed"
    assert find_torn(folder) == [] and steps_of(folder) == list(range(1, KILLED_AT))
    saved = load_file(folder / f"checkpoints/step_{SAVED_AT:06d}/optimizer.safetensors")

    loaded = {}

    class WatchedLoop(TrainingLoop):
        def __enter__(self):
            loop = super().__enter__()
            tensors = optimizer_tensors(self._state.policy, self._state.optimizer)
            loaded.update({name: tensor.cpu().clone() for name, tensor in tensors.items()})
            return loop

    monkeypatch.setattr(SFT_train, "TrainingLoop", WatchedLoop)
    SFT_train.main([f"resume={folder}"])
    assert len(drawn) == NUM_STEPS and batches == drawn[SAVED_AT:]
    assert loaded.keys() == saved.keys() and all(torch.equal(loaded[name], saved[name]) for name in saved)
    losses = [[row["train/loss"] for row in train_rows(runs / run)] for run in ("straight", "killed")]
    record_property("losses", losses)
    assert steps_of(folder) == list(range(1, NUM_STEPS + 1))
    assert losses[0][-1] < 0.9 * losses[0][SAVED_AT - 1]  # what the limit below is compared with
    if ON_GPU:
        assert all(math.isclose(one, other, rel_tol=0.01) for one, other in zip(*losses, strict=True))
    else:
        # Without an engine, neither run has samples.
        assert find_differences(runs / "straight", folder) == ["samples/* differ"]
