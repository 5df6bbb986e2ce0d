"""How the native operators run: threads, memory, torch.compile, the choice of instruction set."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from mla.ops import native
from tests.ops.cases import Case
from tests.ops.native_cases import (
    FORMATS,
    ISAS,
    OPERATORS,
    Options,
    arithmetic,
    check,
    distance,
    kept_call,
    make_call,
)

needs_kernels = pytest.mark.skipif(not native.instruction_sets(), reason="built without kernels")
by_isa = pytest.mark.parametrize("isa", ISAS)
by_operator = pytest.mark.parametrize("operator", OPERATORS)
by_cache = pytest.mark.parametrize("cache", FORMATS)

# Items of many sizes, cut at many places: rows in several blocks, long and short sequences, one without keys.
UNEVEN = Case(b=4, s=9, t=500, h=17, n=16, r=64, p=16, v=24)
LENGTHS = (500, 3, 0, 361)


@by_isa
@by_operator
@by_cache
def test_numbers_of_threads_agree(isa, operator, cache):
    """To rounding; and to the bit from call to call."""
    call = kept_call(UNEVEN, cache, Options(lengths=LENGTHS))
    torch.set_num_threads(1)
    out, lse = call.run(operator, isa)
    for threads in (1, 2, 3, 7, 64):
        torch.set_num_threads(threads)
        got = [call.run(operator, isa) for _ in range(3)]
        for again in got[1:]:
            assert torch.equal(again[0], got[0][0])
            assert torch.equal(again[1], got[0][1])
        # Partial sums meet in another order, tiles are cut elsewhere: probabilities round to other integers.
        kind = "fp32" if operator == "prefill" else arithmetic(isa, operator, cache)
        assert distance(got[0][0], out.double()) < {"fp32": 1e-6, "int16": 3e-4}.get(kind, 2e-3)
        torch.testing.assert_close(got[0][1], lse, atol=2e-6, rtol=1e-6)
        check(call, operator, isa, cache)


@by_isa
@by_operator
@pytest.mark.parametrize("t", [1, 119, 121, 240, 1000])
def test_more_threads_than_work(isa, operator, t):
    torch.set_num_threads(16)
    for s, h in ((1, 1), (2, 5), (40, 4)):
        check(kept_call(Case(s=s, t=t, h=h), "fp32", Options()), operator, isa, "fp32")


@by_isa
@by_operator
@by_cache
def test_two_callers_at_once(isa, operator, cache):
    """Nothing is shared between calls: to the bit what each gives alone."""
    calls = [kept_call(UNEVEN, cache, Options(lengths=LENGTHS, seed=seed)) for seed in (0, 1)]

    def run(call):
        torch.set_num_threads(2)  # a setting of the thread that calls
        return [call.run(operator, isa) for _ in range(5)]

    with ThreadPoolExecutor(1) as one:
        alone = [one.submit(run, call).result()[0] for call in calls]
    with ThreadPoolExecutor(2) as two:
        together = list(two.map(run, calls))
    for (out, lse), results in zip(alone, together, strict=True):
        for got in results:
            assert torch.equal(got[0], out)
            assert torch.equal(got[1], lse)


MEMORY = """
import sys
import torch
from mla.ops import native
def status(name):  # of the process: ru_maxrss would begin with what the parent once had
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))
isa, t, h, r, p, threads = sys.argv[1], 65536, 128, 512, 64, 2
torch.set_num_threads(threads)
c_kv = torch.empty(1, t, r, dtype=torch.bfloat16).fill_(0.01)
k_rope = torch.empty(1, t, p, dtype=torch.bfloat16).fill_(0.01)
q_latent, q_rope = torch.ones(1, 1, h, r), torch.ones(1, 1, h, p)
def run(length):
    length = torch.tensor([length], dtype=torch.int32)
    return native.decode(q_latent, q_rope, c_kv, k_rope, length, scale=0.1, isa=isa)
run(1)  # starts the threads
before = status("VmRSS")
out, _ = run(t)
assert abs(out.mean().item() - 0.01) < 1e-4
print(status("VmHWM") - before)
"""


def run_python(code, *arguments, **variables):
    """Python's output with these environment variables; its errors where it fails."""
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env=os.environ | variables,
    )


@needs_kernels
@pytest.mark.skipif(sys.platform != "linux", reason="read from /proc")
@pytest.mark.skipif("ASAN_OPTIONS" in os.environ, reason="the sanitizer's own memory is counted")
def test_memory_does_not_grow_with_the_context():
    """Less than 64 MiB beside a cache of 72 MiB, whose scores alone would be 32 MiB for each query token."""
    done = run_python(MEMORY, ISAS[0])
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 64


FEW_THREADS = """
import array, resource, sys
from mla import _kernels  # without torch there is no OpenMP: every call starts its own threads
rows, n, k, threads = 2, 4096, 64, 64
x, weight = array.array("f", [1.0] * (rows * k)), array.array("f", [0.5] * (n * k))
out = array.array("f", [0.0] * (rows * n))
addresses = [each.buffer_info()[0] for each in (x, weight, out)]
with open("/proc/self/statm") as file:
    used = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**26, resource.RLIM_INFINITY))  # their stacks take more
_kernels.linear(sys.argv[1], addresses[0], k * 4, addresses[1], k * 4, addresses[2], 0, rows, n, k, threads)
assert set(out) == {0.5 * k}
assert "torch" not in sys.modules
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")
@pytest.mark.skipif("ASAN_OPTIONS" in os.environ, reason="the sanitizer needs the address space")
@by_isa
def test_a_system_that_gives_no_more_threads(isa):
    done = run_python(FEW_THREADS, isa)
    assert done.returncode == 0, done.stderr


MEMORY_OF_ABSORBED = """
import sys
import torch
from mla.ops import native
def status(name):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))
s, h, n, r, p, v = 16384, 16, 4, 128, 32, 4
q_nope, q_rope = torch.ones(1, s, h, n), torch.ones(1, s, h, p)
c_kv, k_rope = torch.ones(1, 64, r), torch.ones(1, 64, p)
w_uk, w_uv = torch.ones(h, n, r), torch.ones(h, v, r) / r
lengths = torch.tensor([64], dtype=torch.int32)
def run(s):
    queries = q_nope[:, :s], q_rope[:, :s]
    cache = c_kv, k_rope, w_uk, w_uv, lengths
    return native.absorbed(*queries, *cache, scale=0.1, causal=False, isa=sys.argv[1])
run(1)  # starts the threads
before = status("VmRSS")
out, _ = run(s)
assert abs(out.mean().item() - 1) < 1e-4
print(status("VmHWM") - before)
"""


@needs_kernels
@pytest.mark.skipif(sys.platform != "linux", reason="read from /proc")
@pytest.mark.skipif("ASAN_OPTIONS" in os.environ, reason="the sanitizer's own memory is counted")
def test_memory_does_not_grow_with_the_queries():
    """Queries and sums would be 288 MiB; 64 are allowed, and what the C library keeps of those before."""
    done = run_python(MEMORY_OF_ABSORBED, ISAS[0])
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 160


@by_isa
@by_cache
@pytest.mark.parametrize("queries", [1, 4, 7], ids=lambda queries: f"{queries} at once")
@pytest.mark.parametrize(
    "options",
    [
        Options(lengths=(500, 3, 0, 361)),
        Options(lengths=(500, 3, 0, 361), causal=False, transposed=True),
        Options(lengths=(71, 1, 0, 9), mask=True, sinks=True, page=16, queries="bf16"),
    ],
    ids=["causal", "not causal", "paged"],
)
def test_queries_served_part_by_part(monkeypatch, isa, cache, queries, options):
    """As all at once, to rounding: sequences with fewer keys than queries, and none, among them."""
    call = kept_call(UNEVEN, cache, options)
    torch.set_num_threads(2)
    want, want_lse = call.run("absorbed", isa)
    served = []

    class Counted:
        def absorbed(self, isa, cache, sizes, *others):
            served.append(sizes[1])
            native_kernels.absorbed(isa, cache, sizes, *others)

    native_kernels = native._kernels
    monkeypatch.setattr(native, "_kernels", Counted())
    monkeypatch.setattr(native, "_AT_ONCE", UNEVEN.b * UNEVEN.h * (UNEVEN.r + UNEVEN.p) * 4 * queries)
    check(call, "absorbed", isa, cache, options.queries)
    out, lse = call.run("absorbed", isa)
    assert max(served) <= queries
    assert sum(served) == 2 * UNEVEN.s
    kind = arithmetic(isa, "absorbed", cache)
    least = 4e-3 if options.queries == "bf16" else {"fp32": 1e-6, "int16": 3e-4}.get(kind, 4e-3)
    assert distance(out, want.double()) < least
    torch.testing.assert_close(lse, want_lse, atol=2e-6 if kind == "fp32" else 1e-2, rtol=1e-6)


@needs_kernels
@by_operator
@pytest.mark.parametrize("lengths", [(-1, 3), (21, 3), (3, -5)])
def test_lengths_are_checked_before_any_part(monkeypatch, operator, lengths):
    call = make_call(Case(b=2, s=5, t=20), "bf16", Options())
    call.cache["lengths"] = torch.tensor(lengths, dtype=torch.int32)
    monkeypatch.setattr(native, "_AT_ONCE", 1)
    with pytest.raises(ValueError, match=r"lengths\[.\]: expected 0 to 20"):
        call.run(operator, None)


@needs_kernels
@by_operator
@pytest.mark.parametrize(
    "options",
    [
        Options(),
        Options(page=16, mask=True, sinks=True, queries="bf16"),
        Options(holes=True, page=1, causal=False),
    ],
    ids=["plain", "paged", "sparse"],
)
@pytest.mark.parametrize("s", [2, 0])
def test_opcheck(operator, options, s):
    call = make_call(Case(b=2, s=s, t=9), "int8" if options.page else "fp32", options)
    arguments = call.arguments(operator)
    names = [a.name for a in getattr(torch.ops.mla, operator).default._schema.arguments]
    values = [arguments.get(name) for name in names]  # isa is None
    torch.library.opcheck(getattr(torch.ops.mla, operator).default, tuple(values))


@needs_kernels
@by_operator
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile_traces_the_operators(operator, backend):
    def around(arguments):
        name = "q_latent" if operator == "decode" else "q_nope"
        scaled = arguments | {name: arguments[name] * 2}
        out, lse = getattr(native, operator)(**scaled)
        return out + 1, lse.exp()

    torch._dynamo.reset()
    traced = torch.compile(around, fullgraph=True, backend=backend)
    for s in (1, 2, 3):  # the third is traced with a size that varies
        call = kept_call(Case(b=2, s=s, t=9), "bf16", Options(page=3))
        for got, want in zip(traced(call.arguments(operator)), around(call.arguments(operator)), strict=True):
            torch.testing.assert_close(got, want)


@needs_kernels
@by_operator
def test_export_leaves_every_size_open(operator):
    """What has to be equal stays equal; nothing else is fixed."""
    options = Options(page=3, mask=True, sinks=True)
    calls = [
        make_call(Case(b=b, s=s, t=t, h=h, n=n, r=r, p=p, v=v), "int8", options).arguments(operator)
        for b, s, t, h, n, r, p, v in ((2, 3, 9, 4, 8, 24, 6, 10), (3, 2, 11, 5, 6, 20, 8, 12))
    ]
    first, second = ({k: x for k, x in call.items() if isinstance(x, torch.Tensor)} for call in calls)

    class Around(torch.nn.Module):
        def forward(self, tensors):
            return getattr(native, operator)(**tensors, scale=0.3)

    sizes = {name: dict.fromkeys(range(x.ndim), torch.export.Dim.AUTO) for name, x in first.items()}
    exported = torch.export.export(Around(), (first,), dynamic_shapes={"tensors": sizes}).module()
    for tensors in (first, second):
        for got, want in zip(exported(tensors), Around()(tensors), strict=True):
            torch.testing.assert_close(got, want)


@needs_kernels
@by_operator
def test_shapes_without_data(operator):
    """All arguments on "meta": shapes and dtypes of the results, as export and planning need them."""
    call = make_call(Case(b=2, s=3, t=9), "bf16", Options(queries="bf16"))
    meta = {
        name: x.to("meta") if isinstance(x, torch.Tensor) else x
        for name, x in call.arguments(operator).items()
    }
    for got, want in zip(getattr(native, operator)(**meta), call.run(operator, None), strict=True):
        assert (got.shape, got.dtype, got.device.type) == (want.shape, want.dtype, "meta")


@needs_kernels
@by_operator
def test_another_default_device(operator):
    call = make_call(Case(b=2, s=3, t=9), "bf16", Options())
    want = call.run(operator, None)
    with torch.device("meta"):
        got = call.run(operator, None)
    for made, wanted in zip(got, want, strict=True):
        assert torch.equal(made, wanted)


CHOICE = "from mla.ops import native; print(native.best(), *native.instruction_sets())"


@needs_kernels
def test_the_environment_names_an_instruction_set():
    lowest = native.instruction_sets()[-1]
    done = run_python(CHOICE, MLA_ISA=lowest)
    assert done.stdout.split() == [lowest, *native.instruction_sets()], done.stderr
    assert native.best() == (os.environ.get("MLA_ISA") or native.instruction_sets()[0])


@needs_kernels
def test_an_unknown_instruction_set_in_the_environment_is_named():
    done = run_python(CHOICE, MLA_ISA="mmx")
    assert done.returncode != 0
    have = ", ".join(native.instruction_sets())
    wanted = f"environment variable MLA_ISA: expected an instruction set of this machine ({have}), got mmx"
    assert f"MLAError: {wanted}; name one of them or unset the variable" in done.stderr


WITHOUT = """
import importlib.abc, logging, sys
class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "mla._kernels":
            if "broken" in sys.argv:
                raise ImportError("GLIBCXX_3.4.99 not found")
            raise ModuleNotFoundError("No module named 'mla._kernels'", name=name)
sys.meta_path.insert(0, Blocker())
logging.basicConfig(format="%(name)s: %(message)s")
from mla.ops import attention, native, portable
import torch
assert native.best() is None and native.instruction_sets() == ()
x = torch.zeros(1, 1, 1, 2)
try:
    native.decode(x, x, x[0], x[0], torch.ones(1, dtype=torch.int32), scale=1.0)
except ValueError as error:
    print(error)
w = torch.zeros(1, 2, 2)
out, _ = portable.absorbed(x, x, x[0], x[0], w, w, scale=1.0)
assert out.shape == x.shape
"""


def test_without_kernels_torch_runs_alone():
    done = run_python(WITHOUT, MLA_ISA="")
    assert done.returncode == 0, done.stderr
    assert "isa: expected an instruction set of this machine (none: mla was installed without" in done.stdout
    assert done.stderr.count("mla was installed without its C++ kernels") == 1


def test_kernels_that_do_not_load_are_not_called_missing():
    done = run_python(WITHOUT, "broken", MLA_ISA="")
    assert done.returncode == 0, done.stderr
    why = "mla's C++ kernels do not load (GLIBCXX_3.4.99 not found)"
    assert f"isa: expected an instruction set of this machine (none: {why})" in done.stdout
    assert done.stderr.count(f"{why}: attention runs on torch alone") == 1
