"""Tiny models, a real vLLM engine that runs them on the CPU, and long processes that run beside the tests."""

import os
import signal
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from subprocess import Popen
from typing import Any

import pytest
from jaxtyping import install_import_hook

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: more threads only slow a tiny model down
if sys.dont_write_bytecode:  # else each process that the tests start compiles torch and vLLM anew, for 10 seconds
    sys.dont_write_bytecode, sys.pycache_prefix = False, str(Path(__file__).parent.parent / ".pytest_cache/bytecode")
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix
# Whoever imports these modules from here on gets them with their annotated shapes and dtypes checked.
CHECKED_MODULES = ["SFT_helper", "GRPO_helper", "plainrl.log_probs", "plainrl.prefix_tree"]
install_import_hook(CHECKED_MODULES, "beartype.beartype")

NUM_WORKERS = 2  # processes of the whole suite: each may have an engine, and ranks of its own
NO_CPU_ENGINE = "needs the CPU build of vLLM; pytest -m gpu tests the CUDA build"


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """Divide the whole suite among processes, file by file. `-n 0` leaves it in one, as single files are anyway."""
    option, is_all = config.option, config.args_source is pytest.Config.ArgsSource.TESTPATHS
    is_whole = is_all and option.markexpr.startswith("not gpu") and not (option.usepdb or is_worker(config))
    if is_whole and getattr(option, "numprocesses", 0) is None:  # 0: without pytest-xdist
        option.numprocesses, option.dist, option.loadscopereorder = NUM_WORKERS, "loadfile", False


def is_worker(config) -> bool:
    """Return whether this process runs a part of the suite, beside others."""
    return hasattr(config, "workerinput")


def pytest_configure(config):
    """Ignore no signal, though the tests may run under nohup or in a script's background: scripts inherit that."""
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)
    config.addinivalue_line("markers", "background(job): the test waits for this job, which starts with the first test")


def pytest_collection_modifyitems(config, items):
    """Let the tests that wait for a job come last. All jobs run scripts with the CPU's engine."""
    if not is_worker(config):
        items.sort(key=lambda item: item.get_closest_marker("background") is not None)
    with_job = [item for item in items if item.get_closest_marker("background")]
    if with_job and not has_cpu_engine():
        for item in with_job:
            item.add_marker(pytest.mark.skip(reason=NO_CPU_ENGINE))


@pytest.fixture(scope="session")
def cpu_engine():
    """Skip what needs the CPU build of vLLM where it is absent."""
    if not has_cpu_engine():
        pytest.skip(NO_CPU_ENGINE)


def has_cpu_engine() -> bool:
    from plainrl.devices import check_engine_device
    from plainrl.records import UserError

    try:
        check_engine_device("cpu")
    except UserError:
        return False
    return True


class Background:
    """Does long jobs one after the other beside the tests.

    A job is a function of this object. It starts processes by `start`, writes to `new_folder()`, and what it returns is
    its result.
    """

    def __init__(self, new_folder: Callable[[str], Path], tiny_model: str, answering_model: str) -> None:
        self.new_folder, self.tiny_model, self.answering_model = new_folder, tiny_model, answering_model
        self._thread = ThreadPoolExecutor(1)
        self._futures: dict[Any, Future] = {}
        self._processes: list[Popen] = []
        self._is_closed = False

    def submit(self, job: Callable[["Background"], Any]) -> Future:
        """Do a job when those before it are done; once, however often it is asked for."""
        if job not in self._futures:
            self._futures[job] = self._thread.submit(job, self)
        return self._futures[job]

    def result(self, job: Callable[["Background"], Any]) -> Any:
        """Wait for a job; return what it returned, or raise what it raised."""
        return self.submit(job).result()

    def start(self, *arguments: Any, **options: Any) -> Popen:
        """Start a process that ends with the tests at the latest."""
        from plainrl.distributed import environment_of_one_process

        if self._is_closed:
            raise RuntimeError("the tests are over")
        # The test that runs at this moment may have set torchrun's variables for itself.
        environment = environment_of_one_process(options.get("env") or os.environ)
        self._processes.append(Popen(*arguments, **(options | {"env": environment})))
        return self._processes[-1]

    def close(self) -> None:
        """End whatever still runs: the tests were interrupted."""
        self._is_closed = True
        self._thread.shutdown(wait=False, cancel_futures=True)
        for process in self._processes:
            if process.poll() is None:
                process.kill()


@pytest.fixture(scope="session", autouse=True)
def background(request, tmp_path_factory):
    """The jobs that the chosen tests wait for. They begin here, or with several workers when a test asks for them."""
    jobs = [marker.kwargs["job"] for item in request.session.items for marker in item.iter_markers("background")]
    if not jobs or not has_cpu_engine():
        yield None
        return
    models = [request.getfixturevalue(name) for name in ("tiny_model_folder", "answering_model_folder")]
    background = Background(tmp_path_factory.mktemp, *models)
    for job in [] if is_worker(request.config) else jobs:
        background.submit(job)
    yield background
    background.close()


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory) -> str:
    """A Llama of 2 layers, width 64, with a byte-level BPE trained on the embedded data."""
    from tiny import make_tiny_model

    folder = tmp_path_factory.mktemp("models") / "tiny"
    make_tiny_model(folder)
    return str(folder)


@pytest.fixture(scope="session")
def answering_model_folder(tmp_path_factory, tiny_model_folder) -> str:
    """The same model after it has learnt to guess a digit in the format of r1_zero."""
    from tiny import make_answering_model

    folder = tmp_path_factory.mktemp("models") / "answering"
    make_answering_model(folder, tiny_model_folder)
    return str(folder)


@pytest.fixture(scope="session")
def tokenizer(tiny_model_folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model_folder)


@pytest.fixture
def tiny_model(tiny_model_folder):
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32)


@pytest.fixture(scope="session")
def engine(cpu_engine, tiny_model_folder):
    """One float32 engine for all tests; a test that changes its weights puts them in by itself.

    Its settings are those of a script with `tiny_arguments`.
    """
    from plainrl.engine import init_vllm

    return init_vllm(tiny_model_folder, "cpu", seed=0, dtype="float32", max_model_len=384)
