"""What several files of tests share."""

import multiprocessing

import pytest
import torch

from hiernb.errors import FileFormatError
from hiernb.files import write_tensors


@pytest.fixture(scope="module")
def one_thread():
    "Tiny models are faster on one thread."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def refuses_damage():
    "A check: a file of tensors that is empty, cut off, of another program or of another kind is refused by its name."

    def check(path, load):
        whole = path.read_bytes()
        for damaged in (b"", whole[:50], whole[:70], whole[:-2], b"PK\x03\x04" + whole):
            path.write_bytes(damaged)
            with pytest.raises(FileFormatError, match=path.name.replace(".", r"\.")):
                load()
        write_tensors(path, {"x": torch.zeros(1)}, kind="flat-index")
        with pytest.raises(FileFormatError, match="flat-index"):
            load()
        path.write_bytes(whole)

    return check


@pytest.fixture
def after_fork():
    "Runs a function here, with two threads, and then in a child of a fork, to which these threads do not follow."

    def run(work):  # -> what it gives here, and in the child
        before = torch.get_num_threads()
        torch.set_num_threads(2)
        try:
            here = work()
            context = multiprocessing.get_context("fork")
            queue = context.SimpleQueue()
            child = context.Process(target=lambda: queue.put(work()))
            child.start()
            child.join(30)
            if child.is_alive():
                child.kill()
            assert child.exitcode == 0
            return here, queue.get()
        finally:
            torch.set_num_threads(before)

    return run
