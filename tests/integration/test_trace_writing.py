"""Traces are written while the next steps train: the same values, in their order, all of them, and errors are known."""

import ast
import json
import signal
import threading
from types import SimpleNamespace

import pytest
import torch
from processes import needs_megatron, python

from megatron_moe_spec.traces.schema import DROPPED, PADDING

pytestmark = needs_megatron

FILE = "router_trace_rank0.jsonl"


def _lines(path):
    text = path.read_text()
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def tracer(megatron, tmp_path):
    """Of a model of 2 experts, in which a token goes to one."""
    from megatron_moe_spec.integration.step.tracer import Tracer

    model = SimpleNamespace(num_layers=1, num_moe_experts=2, moe_router_topk=1, hidden_size=4)
    tracer = Tracer(str(tmp_path), SimpleNamespace(tracing=True), model)
    yield tracer
    tracer._background._join()


def _write(tracer, step, experts=(0, 1)):
    for layer, expert in enumerate(experts):
        tracer.add(layer, 0, torch.arange(2)[None] == expert, None, 1)
    tracer.write(step)


@pytest.mark.parametrize(
    ("num_experts", "rows"),
    [
        (2, [[0], [1]]),
        (4, [[0, 3], [1, DROPPED], [DROPPED, DROPPED], [PADDING, PADDING]]),
        (10, [[0, 9, DROPPED]]),
        (11, [[9, 10, DROPPED], [PADDING] * 3]),
        (128, [[0, 7, 99, 127], [12, 100, DROPPED, DROPPED], [PADDING] * 4]),
        (2**15 - 1, [[5, 2**15 - 2], [PADDING, PADDING]]),
        (8, torch.empty(0, 2).tolist()),
    ],
)
def test_a_line_has_the_values_of_json_dumps(num_experts, rows):
    from megatron_moe_spec.integration.step.trace_lines import TraceLines

    record = {"step": 3, "block": "decoder", "top_indices": None, "micro_batch": 0}
    rows_TK = torch.tensor(rows, dtype=torch.int16).reshape(len(rows), -1 if rows else 2)
    line = TraceLines(num_experts).line(record, rows_TK.numpy())
    expected = json.dumps({**record, "top_indices": rows})
    assert line.endswith(b"\n") and line.count(b"\n") == 1
    assert json.loads(line) == json.loads(expected)
    assert list(json.loads(line)) == list(record)


def test_random_lines_have_the_values_of_json_dumps():
    from megatron_moe_spec.integration.step.trace_lines import TraceLines

    generator = torch.Generator().manual_seed(0)
    for num_experts, top_k in ((5, 1), (64, 6), (160, 8), (1024, 3)):
        rows_TK = torch.randint(PADDING, num_experts, (500, top_k), generator=generator).short()
        assert json.loads(TraceLines(num_experts).rows(rows_TK.numpy())) == rows_TK.tolist()


def test_a_number_of_no_expert_is_an_error():
    from megatron_moe_spec.integration.step.trace_lines import TraceLines

    with pytest.raises(IndexError):
        TraceLines(4).rows(torch.tensor([[4]]).numpy())


def test_a_step_is_written_while_the_next_one_trains_and_the_one_after_waits(tracer, tmp_path, monkeypatch):
    begun, go_on = threading.Event(), threading.Event()
    extend = tracer._file.extend

    def slow(lines):
        begun.set()
        assert go_on.wait(60)
        extend(lines)

    monkeypatch.setattr(tracer._file, "extend", slow)
    _write(tracer, 1, (0, 1))
    assert begun.wait(60) and (tmp_path / FILE).read_text() == ""
    second = threading.Thread(target=_write, args=(tracer, 2, (1, 0)))
    second.start()
    second.join(0.2)
    assert second.is_alive()
    go_on.set()
    second.join(60)
    assert not second.is_alive()
    _write(tracer, 3, (1, 1))
    tracer.close()
    found = [(line["step"], line["layer"], line["top_indices"]) for line in _lines(tmp_path / FILE)]
    assert found == [
        *[(1, 0, [[0]]), (1, 1, [[1]])],
        *[(2, 0, [[1]]), (2, 1, [[0]])],
        *[(3, 0, [[1]]), (3, 1, [[1]])],
    ]


def test_the_thread_waits_for_the_copy_from_the_device_and_the_step_does_not(tracer, tmp_path, monkeypatch):
    """On stand-ins for a GPU: a copy has the rows once its event has been waited for."""
    from megatron_moe_spec.integration.step import tracer as module

    main, finished, waited, host = threading.current_thread(), threading.Event(), [], []

    class Rows:
        is_cuda = True

        def to(self, device, non_blocking):
            assert device == "cpu" and non_blocking
            host.append(torch.full((1, 1), 99, dtype=torch.int16))
            return host[-1]

    class Event:
        device = torch.device("cuda", 3)

        def __init__(self, blocking):
            assert blocking  # or the thread would keep a core busy

        def record(self):
            self.rows_TK = host[-1]

        def synchronize(self):
            assert finished.wait(60)
            waited.append(threading.current_thread())
            self.rows_TK.fill_(len(waited) - 1)

    devices = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: devices.append((device, threading.current_thread())))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: pytest.fail("the step waits for the device"))
    monkeypatch.setattr(module, "_rows", lambda *args: Rows())
    _write(tracer, 1, (0, 1))
    finished.set()
    tracer.close()
    assert [line["top_indices"] for line in _lines(tmp_path / FILE)] == [[[0]], [[1]]]
    assert len(waited) == 2 and main not in waited
    assert devices == [(Event.device, thread) for thread in waited]


def test_readers_meanwhile_find_whole_lines(tracer, tmp_path, monkeypatch):
    seen = []
    line = tracer._text.line

    def read_before(*args):
        seen.append((tmp_path / FILE).read_bytes())
        return line(*args)

    monkeypatch.setattr(tracer._text, "line", read_before)
    _write(tracer, 1, (0, 1, 0))
    tracer.close()
    assert [text.count(b"\n") for text in seen] == [0, 1, 2]
    assert all(text.endswith(b"\n") for text in seen[1:])


def _break(tracer, monkeypatch):
    """The second layer's line is an error, once the event that is returned is set."""
    line, go_on = tracer._text.line, threading.Event()

    def fail(record, rows_TK):
        if record["layer"] == 1:
            assert go_on.wait(60)
            raise MemoryError("no room for it")
        return line(record, rows_TK)

    monkeypatch.setattr(tracer._text, "line", fail)
    return go_on


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_what_goes_wrong_in_the_background_is_raised_once_and_names_the_file(tracer, tmp_path, monkeypatch):
    _write(tracer, 1)
    tracer.close()
    with monkeypatch.context() as context:
        _break(tracer, context).set()
        _write(tracer, 2)
        tracer._background._join()
    _write(tracer, 3)  # what is raised waits for ``check``, after the step's collectives
    with pytest.raises(RuntimeError, match=f"{tmp_path / FILE} has no whole trace of step 2: no room for it"):
        tracer.check()
    tracer.check()
    tracer.close()
    assert [line["step"] for line in _lines(tmp_path / FILE)] == [1, 1, 3, 3]  # nothing of step 2

    _break(tracer, monkeypatch).set()
    _write(tracer, 4)
    with pytest.raises(RuntimeError, match="step 4"):
        tracer.close()
    tracer.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_the_handle_raises_it_when_a_step_has_ended_or_the_hooks_go(mm, tmp_path, monkeypatch):
    from megatron_moe_spec import SpecConfig, attach

    model = mm.build_model()
    handle = attach(model, SpecConfig(trace_path=str(tmp_path), trace_interval=1))
    go_on = _break(handle._tracer, monkeypatch)
    batches = mm.micro_batches(1)
    mm.train_step(model, batches)
    handle.end_step()
    go_on.set()
    handle._tracer._background._join()
    with pytest.raises(RuntimeError, match=f"{FILE} has no whole trace of step 1"):
        handle.end_step()  # which traced nothing
    assert handle._clock.iteration == 2
    go_on.clear()
    mm.train_step(model, batches)
    handle.end_step()
    go_on.set()
    with pytest.raises(RuntimeError, match=f"{FILE} has no whole trace of step 3"):
        handle.detach()
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


PROGRAM = """
import os, signal, sys, time
from types import SimpleNamespace

import torch
import torch.distributed as dist

from megatron_moe_spec.integration.step.tracer import Tracer


def train(folder, end):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    model = SimpleNamespace(num_layers=4, num_moe_experts=128, moe_router_topk=8, hidden_size=4)
    tracer = Tracer(folder, SimpleNamespace(tracing=True), model)
    write(tracer, 1)
    tracer.close()
    extend = tracer._file.extend
    half, to_write = os.pipe()

    def slow(lines):
        lines = list(lines)
        extend(lines[:2])
        os.write(to_write, b"x")
        time.sleep(1)
        if end == "breaks":
            raise MemoryError("no room for it")
        extend(lines[2:])

    tracer._file.extend = slow
    write(tracer, 2)
    os.read(half, 1)
    if end == "is killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if end == "fails":
        raise KeyError("training failed")
    if end == "forks":
        child = os.fork()
        if child == 0:
            tracer.close()
            sys.exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    sys.exit(3)


def write(tracer, step):
    for layer in range(4):
        tracer.add(layer, 0, torch.rand(512, 128).argsort(dim=1) < 8, None, 1)
    tracer.write(step)


children = {}
for end in sys.argv[2:]:
    folder = f"{sys.argv[1]}/{end}"
    os.mkdir(folder)
    children[end] = os.fork()
    if children[end] == 0:
        os.dup2(os.open(f"{folder}/stderr", os.O_CREAT | os.O_WRONLY), 2)
        train(folder, end)
print({end: os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for end, child in children.items()})
"""


@pytest.mark.slow
def test_a_program_that_does_not_detach_writes_everything_once(tmp_path):
    """However it ends. One that is killed loses the step that is being written, or the rest of it, and nothing else."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    statuses = {"exits": 3, "fails": 1, "forks": 3, "breaks": 3, "is killed": -signal.SIGKILL}
    run = python(program, tmp_path, *statuses, timeout=120)
    assert ast.literal_eval(run.stdout or "{}") == statuses, run.stderr
    for end in statuses:
        file = tmp_path / end / FILE
        found = [(line["step"], line["layer"]) for line in _lines(file)]
        last = 2 if end in ("is killed", "breaks") else 4
        assert found == [*((1, layer) for layer in range(4)), *((2, layer) for layer in range(last))], end
        errors = (tmp_path / end / "stderr").read_text()
        assert (f"{file} has no whole trace of step 2: no room for it" in errors) == (end == "breaks"), errors
