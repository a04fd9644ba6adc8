"""Many requests at once: every answer is the same as alone."""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import random
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
from conftest import GOLDEN
from helpers import Failing

import qvl_runtime as qvl
from qvl_convert.convert import convert
from qvl_kernels.cpu.runner import Pool
from qvl_kernels.ops import DeviceError
from qvl_runtime.engine.prefill import slice_end
from qvl_runtime.inputs.pictures import LOCAL


@pytest.fixture
def make(blob):
    """``make(**options)``: a small chat model."""
    return lambda **options: qvl.load(blob("tiny-vl", bits=16), device="cpu", **options)


# the facade


def test_a_batch_gives_results_in_order_and_errors_in_their_place(make, in_golden):
    model, seen = make(), {}
    requests = [
        {"prompt": "What is this?", "max_new_tokens": 6, "seed": 1, "temperature": 1.0},
        {"prompt": ""},
        {"query": "<img>images/rgba.png</img>Hello", "history": [("a", "b")], "temperature": 0, "max_new_tokens": 5},
        {"prompt": "x", "n": 2, "max_new_tokens": 3},
        {"prompt": "x", "temprature": 1},
        "no dict",
        {"prompt": "x", "n": 129, "max_new_tokens": 0},
    ]
    results = model.generate_batch(iter(requests), max_batch=3, on_result=seen.__setitem__)
    assert [seen[i] for i in range(len(requests))] == results
    alone = make(conversations=0)
    assert results[0].token_ids == alone.generate(**requests[0]).token_ids
    assert results[2].token_ids == alone.chat(**requests[2]).token_ids and len(results[2].history) == 2
    assert [r.token_ids for r in results[3]] == [alone.generate("x", max_new_tokens=3).token_ids] * 2
    for i, said in ((1, "empty"), (4, "temperature"), (5, "no dict"), (6, "n is 129; ")):
        assert isinstance(results[i], qvl.QvlError) and said in str(results[i])
    for wrong in (0, 17):
        with pytest.raises(qvl.QvlError, match=f"max_batch is {wrong}"):
            model.generate_batch([], max_batch=wrong)
    with pytest.raises(qvl.QvlError, match="requests is None; expected dicts"):
        model.generate_batch(None)


def test_what_is_cached_is_used_only_with_its_salt(make, in_golden):
    model = make(conversations=4)
    prompt = "<img>images/rgba.png</img>What is this?"

    def cached(salt):
        timings = model.generate(prompt, max_new_tokens=2, cache_salt=salt).timings
        return timings.cached_tokens, timings.cached_images

    length = len(model.prompts.build(prompt, None, LOCAL).ids)
    for salt in ("a", None, "b"):
        assert cached(salt) == (0, 0)
    for salt in ("a", None, "b"):
        assert cached(salt) == (length, 1)
    model.forget()
    assert cached("a") == (0, 1), "the picture is still known to the same user"
    with pytest.raises(qvl.QvlError, match="cache_salt is 3"):
        model.generate("x", cache_salt=3)


def test_a_cancelled_answer_has_no_result(make):
    model = make()
    stream = model.stream("What is this?", max_new_tokens=200)
    next(stream)
    stream.cancel()
    stream.cancel()
    with pytest.raises(qvl.QvlError, match="cancelled"):
        stream.result()
    assert model.generate("What is this?", max_new_tokens=3).token_ids


# side by side


@pytest.mark.parametrize(("name", "kv_cache"), [("tiny-vl", "fp16"), ("tiny-vl", "int8"), ("q3-tied", "fp16")])
def test_answers_are_the_same_alone_and_among_others(name, kv_cache, tmp_path, monkeypatch):
    """A sample of bench/batch_equal.py."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "bench"))
    import batch_equal

    path = tmp_path / "model.qvl"
    convert(GOLDEN / ("ckpt" if name == "tiny-vl" else "families/ckpt") / name, path, bits=16)
    together, alone = (qvl.load(path, device="cpu", kv_cache=kv_cache, conversations=n) for n in (3, 0))
    rng, images = random.Random(f"{name} {kv_cache}"), batch_equal.pictures()
    asked = [batch_equal.request(rng, together, images) for _ in range(10)]
    assert batch_equal.differing(together, alone, asked, 5) == []


@pytest.fixture
def watched(make, monkeypatch):
    """A model, and what its engine does in each tick: ``step N`` with N answers, ``slice ROWS`` or ``picture``."""
    monkeypatch.setattr("qvl_runtime.families.qwen_vl.vision.SLICE_LAYERS", 1)
    model, done = make(conversations=4), []
    engine = model._scheduler
    decode, compute = engine._decode, engine._compute_slice

    def decoding(jobs):
        done.append(f"step {len(jobs)}")
        decode(jobs)

    def computing(job, rows):
        compute(job, rows)
        done.append("picture" if job.slice is not None and job.slice.picture else f"slice {rows}")

    monkeypatch.setattr(engine, "_decode", decoding)
    monkeypatch.setattr(engine, "_compute_slice", computing)
    return model, done


def paused(model):
    """Nothing is computed while this is held."""
    stack = contextlib.ExitStack()
    stack.enter_context(model._scheduler.gate)
    stack.enter_context(model._scheduler.device)
    return stack


IDS = [int(i) for i in np.random.default_rng(0).integers(32, 127, 900)]


def test_a_long_prompt_delays_an_answer_by_one_slice_a_token(watched):
    model, done = watched
    with paused(model):
        first = model.stream(IDS[:10], max_new_tokens=40, speculate=False)
        second = model.stream(IDS[10:], max_new_tokens=40, speculate=False)
        third = model.stream(IDS[50:70], max_new_tokens=40, speculate=False)
    for stream in (first, second, third):
        stream.result()
    # The first and the third share a slice; once somebody decodes, a step stands between any two of the second's 14.
    began = done.index("step 2")
    assert not any(a.startswith("slice") and b.startswith("slice") for a, b in itertools.pairwise(done[began:]))
    assert {entry for entry in done[began:] if entry.startswith("slice")} == {"slice 64"}
    assert sum(entry.startswith("slice") for entry in done) == 15
    assert done.index("step 3") > began, "the short one does not wait for the long one"


def test_short_prompts_share_a_slice_beside_an_answer(watched):
    """Up to 128 tokens, so that the gap between two tokens of the answer stays short."""
    model, done = watched
    talking = model.stream(IDS[:10], max_new_tokens=60, speculate=False)
    next(talking)
    with paused(model):
        done.clear()
        streams = [model.stream(IDS[50 * i : 50 * i + 50], max_new_tokens=40, speculate=False) for i in range(5)]
    for stream in (talking, *streams):
        stream.result()
    assert done[:6] == ["step 1", "slice 64", "step 3", "slice 64", "step 5", "slice 64"]
    assert sum(entry.startswith("slice") for entry in done) == 3


def test_slices_end_where_it_does_not_show():
    assert all(slice_end(first, 4000, rows) % 64 == 0 for rows in (64, 512) for first in (0, 64, 512, 700))
    for rows, first, length in itertools.product((64, 512), (0, 1, 50, 63, 64, 500), (501, 512, 520, 528, 529, 1025)):
        cuts = [first]
        while cuts[-1] < length:
            cuts.append(slice_end(cuts[-1], length, rows))
        sizes = [b - a for a, b in itertools.pairwise(cuts)]
        assert (cuts[-1] == length and all(16 < size <= rows + 32 for size in sizes)) or length - first <= 16


def test_prompts_may_go_first(make):
    """As in jobs, where nobody reads a stream: most answers are computed together."""
    requests = [{"prompt": f"{i} " * 100, "max_new_tokens": 8} for i in range(4)]
    steps, found = [], []
    for first in (False, True):
        model = make(conversations=0, prompts_first=first)
        found.append([result.token_ids for result in model.generate_batch(requests)])
        steps.append(model._scheduler.steps)
    assert found[0] == found[1] and max(map(len, found[0])) == 8
    assert steps[1] <= 8 < steps[0]


def test_a_picture_goes_in_slices_and_ends_between_its_layers(watched, golden):
    model, done = watched
    layers = model.config.vision.layers
    picture = (golden / "images" / "rgba.png").read_bytes()
    with paused(model):
        talking = model.stream(IDS[:10], max_new_tokens=40, speculate=False)
        asked = model.stream("What?", [picture], max_new_tokens=3)
    asked.result()
    talking.result()
    assert done.count("picture") == layers and layers > 1
    began = done.index("step 1")
    assert not any(a == b == "picture" for a, b in itertools.pairwise(done[began:]))

    model.pictures.cache._features.clear()
    model.forget()
    done.clear()
    compute = model._scheduler._compute_slice

    def computing(job, rows):
        compute(job, rows)
        dropped.cancel()  # in the midst of the picture

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model._scheduler, "_compute_slice", computing)
        with paused(model):
            dropped = model.stream("What?", [picture], max_new_tokens=3)
        assert list(dropped) == []
        with paused(model):  # the tick is over
            pass
    assert model.generate("What?", max_new_tokens=2).token_ids
    assert done.count("picture") == 1
    assert not model._scheduler.prefix_cache._busy


def test_answers_begin_in_order_while_there_is_room_for_them(blob, monkeypatch):
    path = blob("tiny-vl", bits=16)
    page = qvl.load(path, device="cpu")._scheduler._page_bytes
    model = qvl.load(path, device="cpu", kv_cache_bytes=3 * page)
    engine, most, order = model._scheduler, [], []
    tick = engine._tick

    def ticking():
        tick()
        most.append(sum(job.nbytes for job in engine._running) // page)
        order.extend(id(job) for job in engine._running if id(job) not in order)

    monkeypatch.setattr(engine, "_tick", ticking)
    with paused(model):
        lengths = [10, 500, 10, 900, 10, 10]  # 1, 2, 1, 4, 1, 1 pages
        streams = [model.stream(IDS[i : i + n], max_new_tokens=8) for i, n in enumerate(lengths)]
    results = [stream.result() for stream in streams]
    assert max(most) == 4 and set(most) - {4} <= {0, 1, 2, 3}, "one alone may take more"
    alone = qvl.load(path, device="cpu", conversations=0)
    wanted = [alone.generate(IDS[i : i + n], max_new_tokens=8) for i, n in enumerate(lengths)]
    assert [r.token_ids for r in results] == [r.token_ids for r in wanted]
    assert order == [id(stream._job) for stream in streams]
    for wrong in ({"max_batch": 17}, {"max_batch": 0}, {"kv_cache_bytes": -1}):
        with pytest.raises(qvl.QvlError, match=next(iter(wrong))):
            qvl.load(path, device="cpu", **wrong)


def test_equal_beginnings_are_computed_once(make):
    model = make(conversations=0)
    with paused(model):
        streams = [model.stream(IDS[:200] + [40 + i] * 3, max_new_tokens=4) for i in range(4)]
        salted = model.stream(IDS[:203], max_new_tokens=4, cache_salt="another")
    cached = [stream.result().timings.cached_tokens for stream in streams]
    assert cached == [0, 200, 200, 200]
    assert salted.result().timings.cached_tokens == 0


def test_one_that_fails_does_not_end_the_others(make):
    model, alone = make(), make(conversations=0)

    with paused(model):
        forms = [None, Failing(model.config.vocab_size), None]
        streams = [model.stream(IDS[i : i + 9], max_new_tokens=12, constraint=forms[i]) for i in range(3)]
    with pytest.raises(RuntimeError, match="no way on"):
        streams[1].result()
    for i in (0, 2):
        assert streams[i].result().token_ids == alone.generate(IDS[i : i + 9], max_new_tokens=12).token_ids


def test_an_error_of_a_step_reaches_all_of_it_and_the_engine_goes_on(make):
    model = make()
    wanted = model.generate(IDS[:9], max_new_tokens=12).token_ids
    with pytest.MonkeyPatch.context() as patch:
        with paused(model):
            streams = [model.stream(IDS[i : i + 9], max_new_tokens=12) for i in range(2)]
            patch.setattr("qvl_runtime.engine.scheduler.step", None)
        for stream in streams:
            with pytest.raises(TypeError):
                stream.result()
    assert model.generate(IDS[:9], max_new_tokens=12).token_ids == wanted


# the thread


def engines():
    return [thread for thread in threading.enumerate() if thread.name == "qvl-engine"]


def test_the_thread_ends_when_idle_and_begins_again(make, monkeypatch):
    monkeypatch.setattr("qvl_runtime.engine.scheduler.IDLE_SECONDS", 0.02)
    model = make()
    before = set(engines())
    for _ in range(2):
        model.generate("x", max_new_tokens=2)
        for thread in set(engines()) - before:
            assert thread.daemon
            thread.join(20)
            assert not thread.is_alive()


def test_no_thread_to_be_had_is_said_in_one_line_and_leaves_nothing_behind(make, monkeypatch):
    def refused(self):
        raise RuntimeError("can't start new thread")

    model = make()
    with monkeypatch.context() as broken:
        broken.setattr(threading.Thread, "start", refused)
        with pytest.raises(DeviceError, match=r"^no thread can be started \(can't start .*\): raise the"):
            model.generate("x", max_new_tokens=2)
        with pytest.raises(DeviceError, match="no thread can be started"):
            Pool(2)
    assert model._scheduler.load == (0, 0)
    assert len(model.generate("x", max_new_tokens=2).token_ids) == 2


def test_a_model_that_is_let_go_takes_its_thread_along(make):
    before = set(engines())
    model = make()
    stream = model.stream("x", max_new_tokens=30)
    decoder = weakref.ref(model.decoder)
    del model
    assert stream.result().token_ids, "an answer that was asked for is computed"
    (thread,) = set(engines()) - before
    del stream
    thread.join(20)
    gc.collect()
    assert not thread.is_alive() and decoder() is None


def test_letting_go_of_a_stream_ends_it(make):
    model = make()
    stream = model.stream(IDS[:9], max_new_tokens=8000)
    next(stream)
    del stream
    assert model.generate(IDS[:9], max_new_tokens=2).token_ids
    assert model._scheduler.load == (0, 0)


def test_a_reader_that_waits_is_woken_by_cancel(make):
    model = make()
    with paused(model):
        stream, read = model.stream("x", max_new_tokens=5), []
        reader = threading.Thread(target=lambda: read.extend(stream))
        reader.start()
        stream.cancel()
    reader.join(20)
    assert not reader.is_alive() and read == []


@pytest.fixture
def computed_by(make, monkeypatch):
    """A model, and the names of the threads that have computed a tick."""
    model, names = make(), []
    tick = model._scheduler._tick

    def ticking():
        names.append(threading.current_thread().name)
        tick()

    monkeypatch.setattr(model._scheduler, "_tick", ticking)
    return model, names


def test_an_answer_alone_is_computed_by_the_thread_that_reads_it(computed_by, monkeypatch):
    model, names = computed_by
    monkeypatch.setattr("qvl_runtime.engine.scheduler.LOOK_SECONDS", 60)
    wanted = model.generate(IDS[:9], max_new_tokens=8).token_ids
    pieces = list(model.stream(IDS[:9], max_new_tokens=8))
    assert [token for piece in pieces for token in piece.token_ids] == wanted
    assert set(names) == {threading.current_thread().name}
    names.clear()
    both = [model.stream(IDS[i : i + 9], max_new_tokens=8) for i in range(2)]
    assert both[0].result().token_ids == wanted and both[1].result().token_ids
    assert "qvl-engine" in names, "a second one ends it"


def test_an_answer_that_nobody_reads_is_computed_by_the_engine(computed_by):
    model, names = computed_by
    stream = model.stream(IDS[:9], max_new_tokens=30, speculate=False)
    next(stream)
    deadline = time.monotonic() + 60
    while model._scheduler.load != (0, 0):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert len(stream.result().token_ids) > 3 and names[-1] == "qvl-engine"


def test_another_thread_gets_the_device_between_two_ticks(make):
    model = make()
    engine, stream = model._scheduler, model.stream(IDS[:9], max_new_tokens=8000, min_new_tokens=8000)
    reader = threading.Thread(target=lambda: list(stream))
    reader.start()
    waited = []
    for _ in range(5):
        begun = engine.ticks
        with engine.gate, engine.device:
            waited.append(engine.ticks - begun)
        while engine.ticks < begun + 5:
            time.sleep(0.001)
    stream.cancel()
    reader.join(20)
    assert not reader.is_alive() and max(waited) <= 3


def test_who_is_called_at_the_end_need_not_wait(computed_by, monkeypatch):
    model, names = computed_by
    monkeypatch.setattr("qvl_runtime.engine.scheduler.LOOK_SECONDS", 60)
    ended = threading.Event()
    model.stream(IDS[:9], max_new_tokens=8).when_ended(ended.set)
    assert ended.wait(30) and set(names) == {"qvl-engine"}


def test_an_error_of_who_is_called_at_the_end_is_logged_and_the_engine_goes_on(make, caplog):
    """A loop of asyncio that is closed raises one, for example."""
    model, ended = make(), threading.Event()
    wanted = model.generate(IDS[:9], max_new_tokens=8).token_ids

    def failing():
        raise RuntimeError("the loop is closed")

    stream = model.stream(IDS[:9], max_new_tokens=8)
    stream.when_ended(failing)
    stream.when_ended(ended.set)
    assert ended.wait(10) and stream.result().token_ids == wanted
    assert model.generate_batch([{"prompt": IDS[:9], "max_new_tokens": 8}])[0].token_ids == wanted
    assert "the loop is closed" in caplog.text


@pytest.mark.parametrize("where", ["_drop_ended", "_forget", "_decode", "_compute_slice", "give"])
def test_ctrl_c_in_the_midst_of_a_tick_leaves_nothing_behind(make, monkeypatch, where):
    model = make()
    engine, struck = model._scheduler, []
    owner = engine.prefix_cache if where == "give" else engine
    wanted = model.generate(IDS[:9], max_new_tokens=8).token_ids
    original = getattr(owner, where)

    def interrupted(*args):
        if threading.current_thread() is threading.main_thread() and not struck and engine.ticks > 3:
            struck.append(where)
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(owner, where, interrupted)
    engine.ticks = 0
    for _ in range(3):
        with contextlib.suppress(KeyboardInterrupt):
            assert model.generate(IDS[:9], max_new_tokens=8).token_ids == wanted
    assert struck
    deadline = time.monotonic() + 60
    while engine._busy:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert not engine.prefix_cache._busy


def test_no_answer_waits_for_one_that_ctrl_c_ended(make, monkeypatch):
    """It came twice: within the prompt, and as its session was to be returned. Another answer had come meanwhile."""
    model, others = make(), []
    wanted = model.generate(IDS[:60], max_new_tokens=4).token_ids
    model.forget()

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    def interrupted_again(session):
        monkeypatch.undo()
        others.append(model.stream(IDS[:60], max_new_tokens=4))
        raise KeyboardInterrupt

    monkeypatch.setattr(model.decoder, "forward", interrupted)
    monkeypatch.setattr(model._prefix_cache, "give", interrupted_again)
    with pytest.raises(KeyboardInterrupt):
        model.generate(IDS[:60], max_new_tokens=4)
    ended = threading.Event()
    others[0].when_ended(ended.set)
    assert ended.wait(10), "it waits for the prompt that was interrupted"
    assert others[0].result().token_ids == wanted


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_computes_by_itself(make):
    model = make()
    wanted = model.generate("What is this?", max_new_tokens=8).token_ids
    with paused(model):
        stream = model.stream("What is this?", max_new_tokens=8)
        child = os.fork()
        if child == 0:
            status = 1
            with contextlib.suppress(BaseException):
                model._scheduler.device.release()
                model._scheduler.gate.release()
                with contextlib.suppress(qvl.QvlError):
                    next(stream)
                    os._exit(2)
                status = 0 if model.generate("What is this?", max_new_tokens=8).token_ids == wanted else 3
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert stream.result().token_ids == wanted


LEAVE = """
import gc, sys, threading, time, weakref
import qvl_runtime as qvl

class Weights:
    def __del__(self):
        time.sleep(0.3)
        print("released by", thread, flush=True)

model = qvl.load(sys.argv[1], device="cpu")
model._scheduler.weights = Weights()
model.generate([5, 6, 7], max_new_tokens=1)
scheduler, thread = weakref.ref(model._scheduler), "the engine"
del model
gc.collect()
while scheduler() is not None:
    time.sleep(0.001)
"""


LATE = """
import atexit, sys
@atexit.register  # called after what is registered later, by the engine
def late():
    for ask in (lambda: stream.result(), lambda: list(stream), lambda: model.generate([5, 6, 7])):
        try:
            print(ask())
        except qvl.QvlError as error:
            print(error)
import qvl_runtime as qvl
model = qvl.load(sys.argv[1], device="cpu")
stream = model.stream([5, 6, 7], max_new_tokens=30)
next(stream)
"""


def test_no_call_at_the_end_of_a_program_waits_for_the_engine(blob):
    command = [sys.executable, "-c", LATE, str(blob("tiny-vl", bits=16))]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    unfinished, rest, refused = result.stdout.splitlines()
    assert unfinished == refused and refused.startswith("this process is ending") and rest == "[]"
    assert "Traceback" not in result.stderr


def test_a_program_ends_after_its_thread_has_released_a_model(blob):
    """The thread may be in a call of a GPU's driver, which would abort."""
    command = [sys.executable, "-c", LEAVE, str(blob("tiny-vl", bits=16))]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout == "released by the engine\n" and "terminate called" not in result.stderr
