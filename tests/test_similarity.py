"""nTVD against torch.cdist over many shapes, its threads, its memory, and the Triton kernels in the interpreter and the compiler."""

import importlib.util
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hiernb.errors import ArgumentError, HiernbError, ShapeError
from hiernb.retreever import similarity
from hiernb.retreever.similarity import _cdist, _kernel, _share, ntvd

HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is published for Linux only")
on_a_kernel = pytest.mark.skipif(
    not HAS_TRITON or not (INTERPRETED or torch.cuda.is_available()), reason="no GPU here; test_the_interpreter_agrees runs these in Triton's interpreter"
)
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def inputs(rows: int, columns: int, leaves: int, seed: int, tied: bool, strided: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    "Rows that do not sum to 1, with ties where asked, as views of a transposed and of a wider matrix where asked; and a weight for each pair."
    g = torch.Generator().manual_seed(seed)
    a, b = (torch.rand(n, leaves, generator=g) for n in (rows, columns))
    if tied:
        a, b = (a * 4).round() / 4, (b * 4).round() / 4
    if strided:
        a, b = a.T.contiguous().T, torch.stack([b, b + 1], -1)[..., 0]
    return a, b, torch.randn(rows, columns, generator=g)


def run(f, a: torch.Tensor, b: torch.Tensor, weights: torch.Tensor) -> list[torch.Tensor]:
    "Scores and both gradients."
    a, b = a.detach().requires_grad_(), b.detach().requires_grad_()
    out = f(a, b)
    return [out.detach(), *torch.autograd.grad(out, (a, b), weights)]


def assert_close(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    for x, y in zip(ours, theirs, strict=True):
        assert x.shape == y.shape and x.dtype == y.dtype
        torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-5)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 80), st.integers(0, 2**31), st.booleans(), st.booleans())
def test_cpu_agrees_with_cdist(rows, columns, leaves, seed, tied, strided):
    a, b, weights = inputs(rows, columns, leaves, seed, tied, strided)
    assert_close(run(ntvd, a, b, weights), run(_cdist, a, b, weights))


def test_where_the_work_is_shared():
    a, b, weights = inputs(130, 67, 1000, 0, True, True)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 8, 2):
            torch.set_num_threads(threads)
            results.append(run(ntvd, a, b, weights))
    finally:
        torch.set_num_threads(before)
    assert_close(results[0], run(_cdist, a, b, weights))
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other))


def test_gradients_with_any_strides_and_for_one_side():
    a, b, weights = inputs(9, 6, 40, 1, False, False)
    for g in (torch.ones(()).expand(9, 6), weights.T.contiguous().T, torch.zeros(9, 12)[:, ::2] + 1):
        assert_close(run(ntvd, a, b, g), run(_cdist, a, b, g))
    left = a.clone().requires_grad_()
    ntvd(left, b).backward(weights)
    right = b.clone().requires_grad_()
    ntvd(a, right).backward(weights)
    assert_close([left.grad, right.grad], run(_cdist, a, b, weights)[1:])
    with torch.no_grad():
        assert not ntvd(left, right).requires_grad


@pytest.mark.parametrize("rows, columns, leaves", [(0, 3, 8), (3, 0, 8), (0, 0, 8), (2, 3, 0)])
def test_nothing_to_compare(rows, columns, leaves):
    scores, da, db = run(ntvd, torch.rand(rows, leaves), torch.rand(columns, leaves), torch.ones(rows, columns))
    assert scores.shape == (rows, columns) and da.shape == (rows, leaves) and db.shape == (columns, leaves)
    assert not scores.any() and not da.any() and not db.any()


def test_double_precision_and_half():
    a, b, weights = inputs(5, 7, 33, 2, True, True)
    assert_close(run(ntvd, a.double(), b.double(), weights.double()), run(_cdist, a.double(), b.double(), weights.double()))
    scores, da, db = run(ntvd, a.bfloat16(), b.bfloat16(), weights)
    assert (scores.dtype, da.dtype, db.dtype) == (torch.float32, torch.bfloat16, torch.bfloat16)
    assert ntvd(a.double(), b).dtype == ntvd(a, b.double()).dtype == torch.float64


def test_a_diverged_model_is_not_hidden():
    a, b, _ = inputs(5, 7, 33, 3, False, False)
    a[2, 5] = torch.nan
    b[4, 0] = torch.inf
    bad = ~torch.isfinite(ntvd(a, b))
    assert bad[2].all() and bad[:, 4].all() and bad.sum() == 5 + 7 - 1


@pytest.mark.parametrize("b", [torch.rand(3, 5), torch.rand(4), torch.rand(2, 3, 4), torch.tensor(1.0)])
def test_shapes_that_do_not_fit(b):
    with pytest.raises(ShapeError, match="two matrices of equal width"):
        ntvd(torch.rand(3, 4), b)


def test_there_is_no_second_derivative():
    a, b = torch.rand(3, 8, requires_grad=True), torch.rand(2, 8)
    (first,) = torch.autograd.grad(ntvd(a, b).sum(), a, create_graph=True)
    assert not first.requires_grad  # rather than a wrong zero


def test_from_many_threads_at_once():
    a, b, weights = inputs(70, 70, 1024, 4, False, False)
    want = run(ntvd, a, b, weights)
    with ThreadPoolExecutor(6) as pool:
        for got in pool.map(lambda _: run(ntvd, a, b, weights), range(12)):
            assert all(torch.equal(x, y) for x, y in zip(got, want))


def a_similarity() -> float:
    torch.manual_seed(0)
    return ntvd(torch.rand(70, 1024), torch.rand(70, 1024)).sum().item()


@pytest.mark.skipif(os.name == "nt", reason="no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_after_a_fork(after_fork):
    here, in_child = after_fork(a_similarity)
    assert here == in_child


def test_a_failure_in_a_helper_is_raised():
    before = torch.get_num_threads()
    torch.set_num_threads(3)

    def kernel(low: int, high: int) -> None:
        raise ZeroDivisionError(low)

    try:
        with pytest.raises(ZeroDivisionError):
            _share(kernel, 100, 1, 1 << 30)
    finally:
        torch.set_num_threads(before)


def test_with_and_without_the_threads_of_pytorch(monkeypatch):
    a, b, weights = inputs(130, 67, 1000, 7, True, False)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        default = run(ntvd, a, b, weights)
        monkeypatch.setattr(similarity, "_openmp", lambda: None)
        assert all(torch.equal(x, y) for x, y in zip(default, run(ntvd, a, b, weights)))
        assert similarity._pool.cache_info().currsize > 0
        test_a_failure_in_a_helper_is_raised()
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(sys.platform != "linux", reason="PyTorch brings the GNU OpenMP library on Linux")
def test_the_threads_are_those_of_pytorch():
    assert similarity._openmp() is not None


MEMORY = """
import resource, torch
from hiernb.retreever.similarity import ntvd
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
torch.set_num_threads(2)
a, b = (torch.rand(n, 1024).requires_grad_() for n in (600, 500))
ntvd(a[:90], b[:90]).sum().backward()  # compiled, threads started
before = peak()
ntvd(a, b).square().sum().backward()
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kB on Linux only")
def test_memory_is_not_pairs_times_leaves():
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 40_000  # kB; 600 × 500 × 1024 numbers would take 1,200,000


def test_without_triton_a_gpu_gets_cdist_and_a_warning(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "hiernb.retreever.triton_ntvd", raising=False)
    similarity._kernel.cache_clear()
    try:
        with pytest.warns(UserWarning, match="Triton cannot be imported"):
            assert _kernel("cuda", torch.float32) is _cdist
    finally:
        similarity._kernel.cache_clear()
    assert _kernel("cuda", torch.float64) is _cdist and _kernel("mps", torch.float32) is _cdist


@needs_triton
def test_a_gpu_gets_triton():
    assert _kernel("cuda", torch.float32).__name__ == "triton_ntvd"


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes CPU tensors")
def test_compiled_triton_refuses_cpu_tensors():
    from hiernb.retreever.triton_ntvd import triton_ntvd

    with pytest.raises(ArgumentError, match="two tensors on one GPU"):
        triton_ntvd(torch.rand(2, 4), torch.rand(3, 4))


@on_a_kernel
@settings(deadline=None, max_examples=6)
@given(st.integers(1, 70), st.integers(1, 40), st.integers(1, 20), st.integers(0, 2**31), st.booleans(), st.booleans())
def test_triton_kernel_agrees_with_cdist(rows, columns, leaves, seed, tied, strided):
    from hiernb.retreever.triton_ntvd import triton_ntvd

    a, b, weights = (t.to(device) for t in inputs(rows, columns, leaves, seed, tied, strided))
    ours = run(triton_ntvd, a, b, weights)
    assert_close(ours, run(_cdist, a, b, weights))
    assert all(torch.equal(x, y) for x, y in zip(ours, run(triton_ntvd, a, b, weights)))  # deterministic


@on_a_kernel
def test_triton_kernel_in_both_tiles(monkeypatch):
    from hiernb.retreever import triton_ntvd as room

    a, b, weights = (t.to(device) for t in inputs(66, 70, 20, 5, True, False))
    small = run(room.triton_ntvd, a, b, weights)
    monkeypatch.setattr(room, "_tile", lambda *_: 64)
    assert all(torch.equal(x, y) for x, y in zip(small, run(room.triton_ntvd, a, b, weights)))


@on_a_kernel
def test_triton_kernel_checks_its_input():
    from hiernb.retreever.triton_ntvd import triton_ntvd

    a, b, weights = (t.to(device) for t in inputs(5, 4, 8, 6, False, False))
    for bad in (b.double(), b.long(), b[:, :7], b[0], b.to("meta")):
        with pytest.raises(HiernbError):
            triton_ntvd(a, bad)
    huge = torch.empty(1, 1, device=device).expand(2**16, 2**15)  # 2^31 entries, of which one exists
    with pytest.raises(ShapeError, match="2\\^31"):
        triton_ntvd(huge, huge)
    scores, da, db = run(triton_ntvd, a.half(), b.half(), weights)
    assert (scores.dtype, da.dtype, db.dtype) == (torch.float32, torch.float16, torch.float16)


@needs_triton
@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="the kernels run in this process")
def test_the_interpreter_agrees():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "triton_kernel"]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0 and "3 passed" in done.stdout, done.stdout


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from hiernb.retreever.triton_ntvd import _gradient, _scores
for kernel, pointers in ((_scores, 3), (_gradient, 4)):
    *names, tile = kernel.arg_names
    signature = {n: "*fp32" if k < pointers else "i32" for k, n in enumerate(names)} | {tile: "constexpr"}
    source = ASTSource(fn=kernel, signature=signature, constexprs={(len(names),): 64}, attrs={(k,): [["tt.divisibility", 16]] for k in range(len(names))})
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    print(kernel.__name__, len(compiled.asm["cubin"]) > 0, "atom." in compiled.asm["ptx"], "local" in compiled.asm["ptx"], compiled.metadata.shared)
"""


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="compiles the kernels")
def test_kernels_compile_for_hopper_without_a_gpu(tmp_path):
    env = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # machine code came out, without atomics (deterministic) and local memory (no spills); a 64 × 64 tile in shared memory would take 16384 bytes
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [line[:4] for line in lines] == [["_scores", "True", "False", "False"], ["_gradient", "True", "False", "False"]]
    assert all(int(line[4]) <= 1024 for line in lines)
