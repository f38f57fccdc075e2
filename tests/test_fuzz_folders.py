"""Damaged YAML, keys and folders by the hundred: each ends in status 0, or in status 2 with one line on stderr.

The damages are drawn from a fixed seed. A traceback is a failure, and so is a second line.
"""

import json
import os
import random
import shutil
import sys

import pytest
from tiny import REPOSITORY

from experiments import runs
from experiments.sweep_plan import read_sweep
from experiments.sweep_results import read_table, summarize_run
from plainrl.checkpoint_files import describe_files_by_ranks
from plainrl.cli import load_config, run_main
from plainrl.config import GRPOConfig, SFTConfig
from plainrl.run_folder import RunFolder

SMALL_YAML = "preset: laptop\nsampling_max_tokens: 16\npresets:\n  laptop: &a {seed: 1}\n  other: {<<: *a, seed: 2}\n"
PIECES = (
    *(b"\0", b"\xff", b"\xef\xbb\xbf", b"\t", b"\n", b": ", b"- ", b"&a ", b"*a", b"<<: ", b"!!", b"!x ", b"%", b"? "),
    *(b"[", b"]", b"{", b"}", b"'", b'"', b"|", b">", b"#", b"---\n", b"...\n", b"\\", b"\x1b", b"\xed\xa0\x80", b"~"),
    *(b"seed: 1\n", b"presets: 3\n", b"1: 2\n", b"null: 3\n", b"[[[[[[", b"\xe2\x80\xa8", b"\r", b"=", b"\xc2\x85"),
)
VALUES = (
    *("", "nan", ".nan", "-1", "0", "1e999", "-.inf", "[", "]", "{a: b}", "null", "true", "off", "0x10", "1_0", "*a"),
    *("!!python/object:os.system 1", "a: b", "9" * 5000, "x" * 5000, "[1, 2, 3]", "[[[[1]]]]", "\udcff", "\ud800", "é"),
    *("1:30", "2024-13-45", "'", '"', '"\\U00110000"', "a\nb", "\t", "/", "..", "../..", "/dev/null", "x.py:f", ":"),
)


def ending(capsys, main):
    """The status of a program, checked to have ended as a user may expect."""
    status = 0
    try:
        run_main(main)
    except SystemExit as error:
        status = error.code
    error = capsys.readouterr().err
    assert (status == 0 and error == "") or (status == 2 and error.startswith("error: ") and error.count("\n") == 1)
    assert len(error) < 3000
    return status


def count(endings):
    """How many ended in 0 and how many in 2, so that neither of the two is what always happens."""
    return endings.count(0), endings.count(2)


@pytest.fixture(autouse=True)
def arguments(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["SFT_train.py"])


def test_damaged_yaml(tmp_path, capsys):
    draw, endings = random.Random(0), []
    text = SMALL_YAML.encode()
    for number in range(300):
        damaged = text
        for _ in range(draw.choice((1, 1, 2, 5))):
            start = draw.randrange(len(damaged) + 1)
            end = start + draw.choice((0, 0, 1, 5, 30))
            damaged = damaged[:start] + draw.choice(PIECES) * draw.choice((1, 1, 3)) + damaged[end:]
        path = tmp_path / f"{number}.yaml"
        path.write_bytes(damaged)
        endings.append(ending(capsys, lambda _, path=path: load_config(SFTConfig, path, [])))
        ending(capsys, lambda _, path=path: read_sweep(path))
        ending(capsys, lambda _, path=path: load_config(SFTConfig, path, ["resume=auto", f"runs_dir={path}"]))
    assert min(count(endings)) > 10


def test_every_key_with_every_strange_value(tmp_path, capsys):
    """On the command line, and in the file: both must refuse, or both must take it."""
    path, mine, presets = tmp_path / "empty.yaml", tmp_path / "mine.yaml", "presets: {laptop: {}}\n"
    path.write_text(presets)
    draw, endings = random.Random(1), []
    for key in sorted({*GRPOConfig.model_fields} - {"preset", "resume"}):  # of these two the file's are overridden
        for value in draw.sample(VALUES, 6):
            of_line = ending(capsys, lambda _, a=f"{key}={value}": load_config(GRPOConfig, path, ["preset=laptop", a]))
            endings.append(of_line)
            if value.isascii() and value.replace(".", "").replace("_", "").isalnum():  # no quotes are needed in a file
                mine.write_text(f"{presets}{key}: {value}\n")
                assert ending(capsys, lambda _: load_config(GRPOConfig, mine, ["preset=laptop"])) == of_line
    assert len(endings) > 300 and min(count(endings)) > 50


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("key", ["preset", "resume", "config"])
def test_strange_names_of_presets_runs_and_files(tmp_path, monkeypatch, capsys, key, value):
    (tmp_path / "small.yaml").write_text(SMALL_YAML)
    monkeypatch.chdir(tmp_path)
    arguments = [f"{key}={value}"]
    if key == "preset":
        arguments.append("config=small.yaml")
    assert ending(capsys, lambda _: load_config(SFTConfig, "small.yaml", arguments)) == (
        0 if (key, value) == ("resume", "") else 2
    )
    assert ending(capsys, lambda _: load_config(SFTConfig, "small.yaml", [f"--help{value}", value])) == 2


@pytest.fixture(scope="module")
def made_run(tmp_path_factory):
    """A run with metrics, samples and a checkpoint of which only the JSON is real."""
    runs_dir = tmp_path_factory.mktemp("fuzz") / "runs"
    config = SFTConfig(preset="laptop", runs_dir=str(runs_dir), run_name="mine", wandb_mode="disabled")
    with RunFolder.create(config, "sft") as run:
        for step in range(1, 4):
            run.log({"train_step": step, "time/step": 1.5})
            run.log({"eval_step": step, "eval/answer_reward": 0.5, "eval/seconds": 2.0})
        checkpoint = run.path / "checkpoints/step_000003"
        (checkpoint / "model").mkdir(parents=True)
        record = {"step": 3, "metrics_bytes": run.metrics_bytes(), "data_fingerprint": "", "random_states": {}}
        record["config"] = run.config.model_dump(mode="json")
        (checkpoint / "state.json").write_text(json.dumps(record))
        (checkpoint / "manifest.json").write_text(json.dumps(describe_files_by_ranks(checkpoint)))
    shutil.copytree(run.path, runs_dir / "other")
    return run.path


def replaced_by(content):
    def damage(path):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        path.write_bytes(content)

    return damage


def removed(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def linked_to(target):
    def damage(path):
        removed(path)
        path.symlink_to(target)

    return damage


def made_a_folder(path):
    removed(path)
    path.mkdir(parents=True)


def torn(path):
    content = path.read_bytes() if path.is_file() else b"x"
    removed(path)
    path.write_bytes(content[: len(content) // 2])


def zeroed(path):
    """What a power loss may leave: the length is right, the end is zeros."""
    content = path.read_bytes() if path.is_file() else b"x"
    removed(path)
    path.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))


DAMAGES = {
    **{"removed": removed, "folder": made_a_folder, "torn": torn, "zeroed": zeroed},
    **{"link to nothing": linked_to("no/thing"), "link to itself": linked_to("mine")},
    **{name: replaced_by(content) for name, content in {"empty": b"", "ff": b"\xff\xfe\n", "list": b"[1]\n"}.items()},
    **{"deep": replaced_by(b"[" * 50_000 + b"\n"), "null": replaced_by(b"null\n"), "text": replaced_by(b'"a"\n')},
    **{"foreign": replaced_by(b'{"train_step": "x", "script": 5, "step": []}\n'), "nan": replaced_by(b'{"a": NaN}\n')},
    **{"nulls": replaced_by(b'{"train_step": null, "eval_step": null, "eval/answer_reward": null}\n')},
}
FILES = (
    *("config.yaml", "environment.json", "metrics.jsonl", "lock", "samples", "checkpoints", "final"),
    *("checkpoints/step_000003", "checkpoints/step_000003/state.json", "checkpoints/step_000003/manifest.json"),
)


def resume(folder):
    """What the scripts do before they load the model: `resume=`, then read what was logged."""
    config = load_config(SFTConfig, REPOSITORY / "unused.yaml", [f"resume={folder}"])
    with RunFolder.open(config, "sft") as run:
        run.start_wandb()
        raise KeyboardInterrupt


@pytest.mark.parametrize("name", FILES)
def test_damaged_folders(tmp_path, made_run, capsys, name):
    """Resumed, by name and by auto; listed; compared; summed up by a sweep."""
    (tmp_path / "small.yaml").write_text(SMALL_YAML)
    resumed, listed = [], []
    for number, (kind, damage) in enumerate(DAMAGES.items()):
        runs_dir = tmp_path / str(number)
        shutil.copytree(made_run.parent, runs_dir)
        folder = runs_dir / "mine"
        damage(folder / name)

        def main(arguments, folder=folder):
            try:
                resume(folder)
            except KeyboardInterrupt:
                return

        def auto(arguments, runs_dir=runs_dir):
            load_config(SFTConfig, tmp_path / "small.yaml", ["resume=auto", f"runs_dir={runs_dir}"])

        def compare(arguments, folder=folder):
            runs.compare_settings(folder, folder.with_name("other"))
            runs.read_metrics(folder)

        listed.append(ending(capsys, lambda _, runs_dir=runs_dir: print(runs.list_runs(runs_dir))))
        ending(capsys, compare)
        ending(capsys, lambda _, folder=folder: summarize_run(folder))
        ending(capsys, auto)
        resumed.append(ending(capsys, main))
        assert (runs_dir / "other/metrics.jsonl").read_bytes() == (made_run / "metrics.jsonl").read_bytes(), kind
    assert listed == [0] * len(DAMAGES)  # one damaged run hides no other
    assert 2 in resumed or name in ("samples", "lock")


@pytest.mark.parametrize("name", ["runs_dir", "run"])
@pytest.mark.parametrize("kind", ["removed", "empty", "link to nothing", "link to itself"])
def test_folders_that_are_none(tmp_path, capsys, kind, name):
    path = tmp_path / "runs" if name == "runs_dir" else tmp_path / "runs/mine"
    (tmp_path / "runs/mine").mkdir(parents=True)
    DAMAGES[kind](path)
    config = SFTConfig(runs_dir=str(tmp_path / "runs"), run_name="mine", wandb_mode="disabled")
    status = ending(capsys, lambda _: RunFolder.create(config, "sft"))
    assert status == (0 if kind == "removed" else 2)
    assert ending(capsys, lambda _: runs.main([str(tmp_path / "runs/nowhere")])) == 2
    ending(capsys, lambda _: load_config(SFTConfig, REPOSITORY / "config.yaml", [f"resume={tmp_path / 'runs/mine'}"]))


@pytest.mark.parametrize(
    "content",
    [b"\0\0\n", b"variant\n", b"", b"variant,seed\na,0\n", b"\xff\xfe", b'"', b"a,b\n" * 3, b"\n\n"],
)
def test_damaged_tables_of_results(tmp_path, capsys, content):
    (tmp_path / "runs.csv").write_bytes(content)
    assert ending(capsys, lambda _: read_table(tmp_path / "runs.csv")) == 2
    header = (REPOSITORY / "results/zero_shot/runs.csv").read_bytes().splitlines(keepends=True)[0]
    (tmp_path / "runs.csv").write_bytes(header + content.replace(b"variant", b"x"))
    ending(capsys, lambda _: read_table(tmp_path / "runs.csv"))
    assert os.listdir(tmp_path) == ["runs.csv"]
