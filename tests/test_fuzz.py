"""Damaged data and damaged models: each is read, or refused in one line. The damages come from a fixed seed."""

import json
import random
import shutil
from pathlib import Path

from plainrl.config import ExpertIterationConfig, SFTConfig
from plainrl.data import load_prompt_template, load_questions, load_sft_examples, load_validation
from plainrl.policy import load_policy
from plainrl.preflight import preflight
from plainrl.records import UserError

ROWS = (
    {
        "problem": "What is 1 + 2?",
        "expected_answer": "3",
        "reasoning_trace": "1 + 2 = 3. </think> <answer> 3 </answer>",
    },
    {"problem": "Solve.", "answer": r"\frac{1}{2}", "level": 3, "solution": "It is one half."},
    {"prompt": "User: 2 + 2\nAssistant:", "response": "4 </think> <answer> 4 </answer>", "ground_truth": "4"},
    {"question": "How many?", "answer": "2 + 2 = <<2+2=4>>4. #### 4"},
)
# What a field may hold that is no ordinary text, as JSON
VALUES = (
    "null", "true", "NaN", "Infinity", "-Infinity", "1e999", "7", "7.0", "-0.0", '""', '" "', "[]", "{}", "[1, 2]",
    '{"a": 1}', r'"\ud83d"', r'"\u0000"', r'"\u2028"', "1" * 5000, "[" * 3000 + "]" * 3000,
    '{"a":' * 3000 + "1" + "}" * 3000,
    r'"\\boxed{5}"', '"#### 5"', '"The answer is 5"', r'"\\frac{1}{"', '"</answer>"', '"<eos>"', '"{question}"',
)  # fmt: skip
BYTES = (
    b"\xef\xbb\xbf",
    b"\xff\xfe",
    b"\x00",
    b"\r\n",
    b"\xe2\x80\xa8",
    b",",
    b"}",
    b"[",
    b"\\",
    b'"',
    b"NaN",
    b"\xc3",
)


def ends_well(function, *arguments):
    """Call it; return its result, or None where it was refused as a user's mistake. Other errors are bugs."""
    said = ""
    try:
        return function(*arguments)
    except UserError as error:
        said = str(error)
    assert "\n" not in said, said
    return None


def damage(content, generator):
    """Damage bytes in one place: cut, drop, double, overwrite or insert."""
    at, length = generator.randrange(len(content)), generator.randrange(1, 40)
    return generator.choice(
        (
            lambda: content[:at],
            lambda: content[:at] + content[at + length :],
            lambda: content[:at] + content[at : at + length] * 2 + content[at + length :],
            lambda: content[:at] + generator.randbytes(length) + content[at + length :],
            lambda: content[:at] + generator.choice(BYTES) + content[at:],
            lambda: generator.choice(BYTES) + content,
            lambda: content + generator.choice(BYTES),
        )
    )()


def odd_files():
    """One file for each odd value in each field of each layout, as JSON lines and as one array."""
    for row in ROWS:
        for name in row:
            for value in VALUES:
                texts = [json.dumps(other) for other in (*ROWS, row)]
                texts[-1] = texts[-1].replace(json.dumps(row[name]), value, 1)
                yield f"{name} = {value[:30]}", "\n".join(texts).encode()
                yield f"{name} = {value[:30]}, in an array", f"[{', '.join(texts)}]".encode()


def test_odd_values_and_damaged_files_of_data_are_read_or_refused_in_one_line(tmp_path, capsys):
    generator = random.Random(0)
    inputs = list(odd_files())
    whole = "\n".join(json.dumps(row) for row in ROWS).encode()
    inputs += [(f"damage {index}", damage(whole, generator)) for index in range(200)]
    assert len(inputs) > 600
    path, num_read = tmp_path / "data.jsonl", 0
    for name, content in inputs:
        path.write_bytes(content)
        config = SFTConfig(train_data=str(path), num_eval_examples=1)
        examples = ends_well(load_sft_examples, config)
        num_read += bool(examples)
        config = ExpertIterationConfig(train_data=str(path), ei_batch_size=1)
        questions = ends_well(load_questions, [], config)
        for example in [*(examples or []), *(questions or [])]:
            texts = [text for text in example if isinstance(text, str)]
            assert not any(word in texts for word in ("nan", "inf", "-inf", "NaN", "None")), name
            "".join(texts).encode()  # no half of a surrogate pair
        ends_well(load_validation, SFTConfig(validation_data=str(path), num_eval_examples="all"))
        ends_well(load_prompt_template, str(path))
    capsys.readouterr()
    assert 50 < num_read < len(inputs) - 50, "some are read, and some are refused"


def odd_model_files(folder, generator):
    """For each file of a model's folder what may stand in its place; None: nothing, a tuple: a folder."""
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        yield from ((path.name, odd) for odd in (None, (), b"", b"{}", b"[]", b"null", b"\xff\xfe", content[:-1]))
        yield from ((path.name, damage(content, generator)) for _ in range(4))
        if path.suffix == ".json":
            values = json.loads(content)
            for key in sorted(values) if isinstance(values, dict) else ():
                for odd in (None, -1, 999, "text", [], {}, float("nan")):
                    if generator.random() < 0.2:
                        yield path.name, json.dumps(values | {key: odd}).encode()


def test_damaged_models_are_loaded_and_can_be_saved_or_are_refused_in_one_line(tiny_model_folder, tmp_path, capsys):
    inputs = list(odd_model_files(Path(tiny_model_folder), random.Random(0)))
    assert len(inputs) > 100
    folder = tmp_path / "model"
    for index, (name, content) in enumerate(inputs):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tiny_model_folder, folder)
        (folder / name).unlink()
        if content == ():
            (folder / name).mkdir()
        elif content is not None:
            (folder / name).write_bytes(content)
        config = SFTConfig(model=str(folder), max_context_tokens=384, sampling_max_tokens=16)
        loaded = ends_well(load_policy, config)
        if loaded:
            (run := tmp_path / f"run {index}").mkdir()
            ends_well(preflight, *loaded, run, config)
            assert not any(run.iterdir()), (name, content)
    capsys.readouterr()
