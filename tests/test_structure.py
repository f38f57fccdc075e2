"""The house rules: who imports whom, what stands at the top level, how long files and functions are, what is named."""

import ast
import importlib
import importlib.metadata
import sys
import typing
from pathlib import Path

import pytest
from tiny import REPOSITORY, run_python, tracked_files

import SFT_helper
from GRPO_helper import LENGTH_NORMALIZATIONS, LOSSES
from plainrl.corrections import ENGINE_CORRECTIONS, KL_ESTIMATORS, RATIO_LEVELS
from plainrl.grading.rewards import REWARD_FUNCTIONS

HELPERS = ("SFT_helper", "GRPO_helper")
SUPPLEMENT_HELPERS = ("supplement.DPO_helper",)  # mathematics, too: they import no machinery
SCRIPTS = ("SFT_train", "GRPO_train")
TOP_LEVEL = {
    *("SFT_helper.py", "GRPO_helper.py", "policy_evaluation.py", "SFT_train.py", "GRPO_train.py"),
    *("config.yaml", "grpo_train.yaml", "pyproject.toml", "README.md", "LICENSE", "CONTRIBUTING.md"),
    *("docs", "experiments", "plainrl", "results", "supplement", "tests"),
}
NEEDS_TRL = {"experiments.benchmark.trl_side"}  # it runs in an environment of TRL's own


def python_files(*folders):
    """The project's Python files of the top level, and those of these folders. A user may have others beside them."""
    top = [REPOSITORY / name for name in TOP_LEVEL if name.endswith(".py")]
    return sorted([*top, *(path for name in folders for path in (REPOSITORY / name).rglob("*.py"))])


def module_name(path):
    """The name under which a file is imported, from the repository's folder."""
    return ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")


OURS = python_files("plainrl", "experiments", "supplement", "docs")
PACKAGES = ("plainrl", "experiments", "supplement")
MODULES = [module_name(path) for path in python_files(*PACKAGES) if module_name(path) not in NEEDS_TRL]


def imports_of(tree, name):
    """The names of the modules that a module imports, wherever in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = name.split(".")[: -node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)  # it may be a module


def may_import(name):
    """What of ours a module may import, by the first part of a name, or by the first two inside plainrl."""
    package = name.partition(".")[0]
    if name in HELPERS:
        return ()
    if name in SUPPLEMENT_HELPERS:
        return HELPERS
    if is_in(name, ["plainrl.grading"]):
        return ("plainrl.grading",)
    if package == "plainrl":
        return (*HELPERS, "plainrl")
    if name == "policy_evaluation":
        return (*HELPERS, "plainrl")
    if name in SCRIPTS:
        return (*HELPERS, "plainrl", "policy_evaluation")
    assert package in ("experiments", "supplement", "docs"), f"{name}: say here what it may import"
    return (*HELPERS, *SCRIPTS, "plainrl", "policy_evaluation", package)


def is_in(name, packages):
    return any(f"{name}.".startswith(f"{package}.") for package in packages)


def find_forbidden_imports(name, source):
    """The modules of ours that a module imports and may not."""
    ours = {module_name(path).partition(".")[0] for path in OURS} | {"tests"}
    found = {module for module in imports_of(ast.parse(source), name) if is_in(module, ours)}
    return sorted(module for module in found if not is_in(module, may_import(name)))


def test_the_rule_of_imports():
    """Helpers <- plainrl <- policy_evaluation <- scripts <- experiments, supplement. The grader needs itself alone."""
    found = {module_name(path): find_forbidden_imports(module_name(path), path.read_text()) for path in OURS}
    assert {name: modules for name, modules in found.items() if modules} == {}


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("SFT_helper", "def f():\n    import plainrl.records"),
        ("GRPO_helper", "from SFT_helper import masked_normalize"),
        ("plainrl.data", "from policy_evaluation import Evaluator"),
        ("plainrl.data", "import experiments.sweep"),
        ("plainrl.grading.rewards", "from plainrl.records import UserError"),
        ("plainrl.grading.rewards", "from .. import records"),
        ("policy_evaluation", "import SFT_train"),
        ("GRPO_train", "from SFT_train import report"),
        ("SFT_train", "from supplement.instruction_data import iterate_batches"),
        ("plainrl.data", "import supplement"),
        ("supplement.DPO_train", "from experiments.curves import something"),
        ("supplement.DPO_helper", "from plainrl.data import fill_prompt"),
    ],
)
def test_the_rule_of_imports_finds(name, source):
    assert find_forbidden_imports(name, source)


def test_no_file_and_no_function_is_too_long():
    """450 lines and 60; 300 for the two scripts that show the algorithms."""
    found = []
    for path in OURS:
        text, name = path.read_text(), path.relative_to(REPOSITORY)
        limit = 300 if module_name(path) in SCRIPTS else 450
        if (length := len(text.splitlines())) > limit:
            found.append(f"{name}: {length} lines, at most {limit}")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > 60:
                    found.append(f"{name}:{node.lineno}: {node.name} has {length} lines, at most 60")
    assert not found, "\n" + "\n".join(found)


def test_the_top_level_shows_the_card():
    entries = {path.relative_to(REPOSITORY).parts[0] for path in tracked_files()}
    assert {name for name in entries if not name.startswith(".")} == TOP_LEVEL


def test_no_module_shadows_a_library():
    """Neither a file nor a folder of the top level, which stands first in the path that Python searches."""
    taken = set(sys.stdlib_module_names) | {name.lower() for name in importlib.metadata.packages_distributions()}
    packages = {path.parent.name for path in REPOSITORY.glob("*/__init__.py")}
    ours = {Path(name).stem.lower() for name in TOP_LEVEL if name.endswith(".py")} | packages
    assert {"plainrl", "experiments", "sft_train"} <= ours
    assert not ours & taken
    # Inside a package `from plainrl import types` would be read for the library, and a script in it would import it.
    inside = {path.stem for name in packages - {"tests"} for path in (REPOSITORY / name).rglob("*.py")}
    assert not (inside - {"__init__", "__main__"}) & (set(sys.stdlib_module_names) | {"datasets", "wandb", "vllm"})


def import_everything(background):
    """Import every module in one process, and look at what that has brought in."""
    code = (
        f"import importlib, sys; sys.argv.append('nonsense')\nfor name in {MODULES!r}: importlib.import_module(name)\n"
        "import torch; assert not torch.cuda.is_initialized(); assert not {'vllm', 'wandb'} & set(sys.modules)"
    )
    return run_python("-c", code, start=background.start)


@pytest.mark.background(job=import_everything)
def test_importing_a_module_is_light(background):
    """No import parses arguments, starts CUDA, or brings in vLLM or wandb."""
    result = background.result(import_everything)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("name", MODULES)
def test_public_functions_are_documented(name):
    module = importlib.import_module(name)
    assert module.__doc__, name
    for attribute, value in vars(module).items():
        if (
            not attribute.startswith("_")
            and getattr(value, "__module__", None) == name
            and callable(value)
            and typing.get_origin(value) is None  # the alias of a type
        ):
            assert value.__doc__, f"{name}.{attribute}"


def find_compared_names(source):
    """The lines that compare something with a name in a table: of losses, of their parts, or of reward functions."""
    tables = (LOSSES, LENGTH_NORMALIZATIONS, SFT_helper.LENGTH_NORMALIZATIONS, REWARD_FUNCTIONS)
    names = {name for table in (*tables, RATIO_LEVELS, ENGINE_CORRECTIONS, KL_ESTIMATORS) for name in table}
    for node in ast.walk(ast.parse(source)):
        compared = [node.subject, *node.cases] if isinstance(node, ast.Match) else [node]
        if isinstance(node, ast.Compare | ast.Match):
            texts = {n.value for part in compared for n in ast.walk(part) if isinstance(n, ast.Constant)}
            if texts & names:
                yield node.lineno


def test_no_name_of_a_table_is_compared_as_a_string():
    """What differs between losses, normalizations or rewards stands in their tables."""
    found = [
        f"{path.relative_to(REPOSITORY)}:{line}" for path in OURS for line in find_compared_names(path.read_text())
    ]
    assert found == []


def test_a_comparison_with_a_name_is_found():
    assert list(find_compared_names('if config.loss_type == "grpo_clip": pass')) == [1]
    assert list(find_compared_names('x = loss in ("no_baseline", "other")')) == [1]
    assert list(find_compared_names('match reward:\n    case "r1_zero": pass')) == [1]
    assert list(find_compared_names('loss = LOSSES["grpo_clip"]')) == []
